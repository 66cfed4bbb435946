"""What recomputation costs: a training step beside the same choice made with ``torch.utils.checkpoint``.

    .venv/bin/python tests/bench_checkpointing.py --rounds 30

Each row is a choice of regions in a stack of transformer blocks. Per round, each contender takes one step (forward,
backward), in turns at going first, so that whatever else the machine does hits all. Prints the median milliseconds of
both and the median of the rounds' ratios (ours to PyTorch's), then the peak memory of what a step allocates. Runs on
the GPU if there is one.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as theirs

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "tutorials"), str(TESTS)]
import checkpointing  # noqa: E402
from test_checkpointing import PeakBytes  # noqa: E402
from train_gpt import Block  # noqa: E402

KEPT_BY_THEIRS = list(checkpointing.EXPENSIVE)
CHOICES = {"every block": {}, "2 blocks": {"region": 2}, "4 blocks": {"region": 4}, "selective": {"mode": "selective"},
           "selective, 2 blocks": {"region": 2, "mode": "selective"}}


def with_torch(blocks: nn.Sequential, region: int = 1, mode: str = "full") -> Callable[[Tensor], Tensor]:
    """A forward pass that recomputes by ``torch.utils.checkpoint``."""
    options = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(theirs.create_selective_checkpoint_contexts, KEPT_BY_THEIRS)

    def forward(x: Tensor) -> Tensor:
        for start in range(0, len(blocks), region):
            x = theirs.checkpoint(blocks[start:start + region], x, **options)
        return x

    return forward


def with_ours(blocks: nn.Sequential, region: int = 1, **config: str) -> Callable[[Tensor], Tensor]:
    """A forward pass that recomputes by ``checkpointing.apply``, or by ``checkpoint`` around several blocks."""
    if region == 1:
        checkpointing.apply(dict(blocks.named_children()), checkpointing.CheckpointingConfig(**config))
        return blocks
    checkpointing.configure(checkpointing.CheckpointingConfig(**config))

    def forward(x: Tensor) -> Tensor:
        for start in range(0, len(blocks), region):
            x = checkpointing.checkpoint(blocks[start:start + region], x)
        return x

    return forward


def seconds(forward: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The time of one step."""
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    began = time.perf_counter()
    forward(x).square().mean().backward()
    synchronize()
    return time.perf_counter() - began


def peak_mebibytes(forward: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The most memory held at one time by what one step allocates."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(forward, x)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with PeakBytes() as measured:
        seconds(forward, x)
    return measured.peak / 2**20


def compare(choice: dict, options: argparse.Namespace) -> tuple[float, float, float, list[float]]:
    """Median milliseconds of theirs and ours, the median ratio, and the peaks of neither, theirs and ours in MiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stacks = []
    for _ in range(3):
        torch.manual_seed(0)
        stacks.append(nn.Sequential(*[Block(options.dim, 4) for _ in range(options.layers)]).to(device))
    contenders = [with_torch(stacks[0], **choice), with_ours(stacks[1], **choice)]
    x = torch.randn(options.batch, options.context, options.dim, device=device)
    times: list[list[float]] = [[], []]
    for index in range(options.rounds + 2):
        for which in ((0, 1), (1, 0))[index % 2]:
            took = seconds(contenders[which], x)
            if index >= 2:  # after warming up
                times[which].append(took)
    for ours, reference in zip(stacks[1].parameters(), stacks[0].parameters()):
        if not torch.equal(ours.grad, reference.grad):
            raise SystemExit("the gradients differ, so this compares nothing")
    seconds(stacks[2], x)  # makes the gradients, as the others have
    peaks = [peak_mebibytes(forward, x) for forward in (stacks[2], *contenders)]
    ratio = statistics.median(b / a for a, b in zip(*times))
    return 1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1]), ratio, peaks


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 30), ("layers", 8), ("dim", 128), ("batch", 4), ("context", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    print(f"{'':20} {'step, ms':>25}   {'peak, MiB':>38}")
    print(f"{'regions':20} {'torch':>8} {'ours':>8} {'ratio':>7}   {'none':>9} {'torch':>9} {'ours':>9} {'ratio':>8}")
    for name, choice in CHOICES.items():
        torchs, ours, ratio, peaks = compare(choice, options)
        print(f"{name:20} {torchs:8.1f} {ours:8.1f} {ratio:7.3f}   {peaks[0]:9.2f} {peaks[1]:9.2f} {peaks[2]:9.2f} "
              f"{peaks[2] / peaks[1]:8.3f}", flush=True)


if __name__ == "__main__":
    main()
