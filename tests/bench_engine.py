"""What the engine costs: its step beside a hand-written PyTorch loop of the same model, in one process.

    .venv/bin/python tests/bench_engine.py --steps 200

Both train the GPT of ``tutorials/train_gpt.py`` on the same batches with the same optimizer and clipping, a step of one
and then a step of the other, so that whatever else the machine does hits both. Prints both medians, their ratio and the
median of the ratios of neighbouring steps.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both on the CPU
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]
import engine as deepspeed  # noqa: E402
import train_gpt  # noqa: E402

ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def hand_written(options: argparse.Namespace) -> Callable[[Tensor, Tensor], float]:
    """A step of plain PyTorch; returns the loss."""
    model = train_gpt.GPT(options.dim, options.layers, options.heads, options.context)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAM)

    def step(x: Tensor, y: Tensor) -> float:
        loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def through_the_engine(options: argparse.Namespace) -> Callable[[Tensor, Tensor], float]:
    """The same step through ``initialize()``."""
    model = train_gpt.GPT(options.dim, options.layers, options.heads, options.context)
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_batch_size": options.batch, "gradient_clipping": 1.0, "optimizer": {"type": "AdamW", "params": ADAM}})

    def step(x: Tensor, y: Tensor) -> float:
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def main() -> None:
    """The command line; see the top of this file."""
    options = train_gpt.parse_options()
    steps = []
    for make in (hand_written, through_the_engine):
        torch.manual_seed(0)
        steps.append(make(options))
    text, _ = train_gpt.read_text(options.data)
    generator = torch.Generator().manual_seed(0)
    times: list[list[float]] = [[], []]
    for index in range(options.steps + 5):
        offsets = torch.randint(len(text) - options.context, (options.batch,), generator=generator)
        batch = train_gpt.batch_at(text, offsets, options.context)
        losses = [0.0, 0.0]
        for which in ((0, 1), (1, 0))[index % 2]:  # take turns at going first
            began = time.perf_counter()
            losses[which] = steps[which](*batch)
            if index >= 5:  # after warming up
                times[which].append(time.perf_counter() - began)
        if abs(losses[0] - losses[1]) > 1e-4:
            raise SystemExit(f"step {index}: the losses differ, so this compares nothing: {losses}")
    plain, ours = (statistics.median(t) for t in times)
    ratio = statistics.median(b / a for a, b in zip(*times))
    print(f"hand-written loop {1e3 * plain:.1f} ms, engine {1e3 * ours:.1f} ms, ratio of medians {ours / plain:.3f}, "
          f"median of the {options.steps} ratios {ratio:.3f}")


if __name__ == "__main__":
    main()
