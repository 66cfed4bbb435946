"""ZeRO at sizes that no machine here has: one process takes the place of one rank of N and runs the real code.

    .venv/bin/python tests/simulate_scale.py                                       everything, in several minutes
    .venv/bin/python tests/simulate_scale.py --sizes 7.5B --ranks 1 64 --stages 2 3      half a minute
    .venv/bin/python tests/simulate_scale.py --growth                                 only how the work grows
    .venv/bin/python tests/simulate_scale.py --sizes 7.5B --precision fp32         another column of TABLE

It is the rehearsal of ``zero.estimate``, with a real model in the stand-in's place. Tensors are on PyTorch's ``meta``
device: they have a shape and a storage of so many bytes, but no memory. ``zero.Rehearsal`` counts collectives and sends
nothing. All else is real: the GPT of ``tutorials/train_gpt.py`` goes through forward and backward, ``zero.Zero`` makes
its buckets and units, its hooks start collectives, gather and free, and PyTorch's AdamW steps. So what the tables show
was measured on live storages, counted at the collectives, and timed; it was not worked out with a formula.

*States* are parameters, gradients, masters and optimizer state. *Paper* is what the ZeRO paper (arXiv 1910.02054)
counts for as many parameters, *table* what this code has to hold, see TABLE; the differences are padding, and at stage 3
the 16-bit shard that the paper counts beside the masters and that this code has not. One rank has nothing to shard:
all its stages are stage 0, and it is measured once. *Live* is the most of gathered units and of buckets of gradients at
any time, *update* the gradients in the masters' dtype while the optimizer steps. *Sent* is elements per rank and
step, divided by the parameters and by (N-1)/N. Seconds are of this process's CPU time: for set-up, and for one step, of
which the model's own forward and backward on meta tensors take what stands in brackets.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]
import train_gpt  # noqa: E402
import zero  # noqa: E402

META = torch.device("meta")
BUCKET = 2**25  # elements; what reduce_bucket_size "auto" means on a GPU for a large model


class Size(NamedTuple):
    """A GPT's shape, and the number of parameters that it comes close to."""
    dim: int
    layers: int
    heads: int
    wanted: float


SIZES = {"7.5B": Size(4224, 35, 33, 7.5e9), "128B": Size(11264, 84, 88, 128e9), "1T": Size(25600, 127, 200, 1e12)}
RANKS = (1, 4, 16, 64, 256, 1024)
PRECISIONS = {
    "fp32": zero.Dtypes(*[torch.float32] * 4),
    "bf16": zero.Dtypes(torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),      # the paper's case
    "bf16-fp32": zero.Dtypes(torch.bfloat16, torch.float32, torch.float32, torch.float32)}   # gradients in fp32
TABLE: dict[str, list[Callable[[int], float]]] = {  # bytes per parameter with N ranks, by stage; N = 1 is stage 0
    "fp32": [lambda n: 16, lambda n: 8 + 8 / n, lambda n: 4 + 12 / n, lambda n: 16 / n],
    "bf16": [lambda n: 16, lambda n: 4 + 12 / n, lambda n: 2 + 14 / n, lambda n: 14 / n],
    "bf16-fp32": [lambda n: 18, lambda n: 6 + 12 / n, lambda n: 2 + 16 / n, lambda n: 16 / n]}
PAPER: list[Callable[[int], float]] = [lambda n: 16, lambda n: 4 + 12 / n, lambda n: 2 + 14 / n, lambda n: 16 / n]


# --- One rank of many -------------------------------------------------------------------------------------------------


def shard(model: nn.Module, config: zero.ZeroConfig, dtypes: zero.Dtypes, world_size: int) -> zero.RehearsedZero:
    """The model, which is on the meta device, under ZeRO with AdamW: the rank in the middle."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    return zero.RehearsedZero(model, optimizer, config, META, lambda parameter: dtypes,
                              communicator=zero.Rehearsal(world_size, world_size // 2))


def gpt(size: Size) -> train_gpt.GPT:
    """A GPT without memory."""
    with META:
        return train_gpt.GPT(size.dim, size.layers, size.heads, context=1024)


def forward_backward(model: nn.Module) -> None:
    """One micro-batch of 8 tokens."""
    ids = torch.zeros(1, 8, dtype=torch.int64, device=META)
    model(ids, ids).backward()


def step(model: nn.Module, state: zero.Zero) -> None:
    """One optimizer step of one micro-batch."""
    forward_backward(model)
    state.finish_backward()
    state.step(clip=1.0, divisor=state.divisor)


def live_bytes(state: zero.Zero, model: nn.Module) -> dict[str, int]:
    """Bytes of the storages that are alive, by category; and *update*, gradients that were cast for the masters."""
    found = zero.measure(state, model)
    held = {name: sum(size for (category, _), size in found.items() if category == name) for name in CATEGORIES}
    passing = {t.untyped_storage()._cdata for g in state.reducer.every for t in (g.buffer, g.sum) if t is not None}
    gradients = [p.grad for b in state.trained for p in b.pieces if p.grad is not None]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in gradients}
    return held | {"update": sum(size for key, size in storages.items() if key not in passing)}


STATES = ("parameters", "gradients", "masters", "optimizer_state")
CATEGORIES = (*STATES, "buffers", "live")


class Measured(NamedTuple):
    """One rank of one training."""
    parameters: int
    bytes: dict[str, int]    # by category, the most
    calls: dict[str, int]    # collectives per step, by kind
    largest: int             # elements of the largest collective
    sent: int                # elements per step, scalars apart
    setup_s: float
    step_s: float

    @property
    def states(self) -> int:
        """Bytes of parameters, gradients, masters and optimizer state."""
        return sum(self.bytes[name] for name in STATES)


def measure(size: Size, stage: int, world_size: int, dtypes: zero.Dtypes) -> Measured:
    """Set up, take a step that is watched and a step that is timed."""
    model = gpt(size)
    parameters = sum(p.numel() for p in model.parameters())
    began = time.process_time()
    state = shard(model, zero.ZeroConfig(stage=stage, reduce_bucket_size=BUCKET), dtypes, world_size)
    setup = time.process_time() - began
    most: dict[str, int] = {}

    def watch(*_: Any) -> None:
        for name, size_now in live_bytes(state, model).items():
            most[name] = max(most.get(name, 0), size_now)

    handle = state.optimizer.register_step_pre_hook(watch)
    step(model, state)
    watch()
    handle.remove()
    traffic = state.communicator.traffic
    traffic.clear()
    began = time.process_time()
    step(model, state)
    seconds = time.process_time() - began
    most["live"] = max(most["live"], state.most)
    state.release()
    return Measured(parameters, most, {kind: t.calls for kind, t in traffic.items()},
                    max(bucket.numel for bucket in state.buckets), sum(t.elements for t in traffic.values()), setup,
                    seconds)


# --- How the work grows -----------------------------------------------------------------------------------------------


def lines_run(work: Callable[[], None]) -> int:
    """Lines of zero.py that ``work`` runs, a turn of a loop or comprehension counting as one: no clock is needed."""
    lines = 0

    def each(frame: FrameType, event: str, argument: Any) -> Callable | None:
        nonlocal lines
        lines += event == "line"
        return each

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: each if frame.f_code.co_filename == zero.__file__ else None)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


class Chain(nn.Module):
    """Blocks of two small layers: little work for the model, so that the work for its units shows."""

    def __init__(self, layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(layers))
        self.token = nn.Embedding(16, 16)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        return x.sum()


class Work(NamedTuple):
    """Lines of zero.py, and seconds, for set-up and for a step."""
    units: int
    setup: int
    step: int
    setup_s: float
    step_s: float


def work_of(layers: int, world_size: int, config: zero.ZeroConfig) -> Work:
    """What one rank has to do for a chain of so many blocks."""
    def timed(work: Callable[[], None]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    states: list[tuple[nn.Module, zero.Zero]] = []

    def set_up() -> None:
        with META:
            model = Chain(layers)
        states.append((model, shard(model, config, PRECISIONS["bf16"], world_size)))
        states[-1][1].communicator.watch = lambda: None  # no engine does that

    def one_step() -> None:
        step(*states[-1])

    setup_s = timed(set_up)
    one_step()
    step_s = timed(one_step)
    states.pop()[1].release()
    setup = lines_run(set_up)
    one_step()
    work = Work(layers + 1, setup, lines_run(one_step), setup_s, step_s)
    states.pop()[1].release()
    return work


# --- Tables -----------------------------------------------------------------------------------------------------------


def print_size(name: str, stages: list[int], ranks: list[int], precision: str) -> float:
    """Measure and print one size; the largest difference of the states from the table, as a part of it."""
    size, dtypes = SIZES[name], PRECISIONS[precision]
    model = gpt(size)
    began = time.process_time()
    forward_backward(model)
    plain, model = time.process_time() - began, None
    print(f"\n{name}: a GPT of {size.layers} layers, {size.dim} wide, {precision}; GB (1e9 bytes) per rank")
    print(f"{'stage':>5}{'ranks':>6}{'params':>9}{'grads':>9}{'masters':>9}{'Adam':>9}{'states':>10}{'paper':>10}"
          f"{'differs':>9}{'table':>10}{'differs':>9}{'live':>7}{'update':>9}{'sent':>7}{'set-up s':>9}"
          f"{'step s':>7}{'':8} collectives per step (largest, elements)")
    worst = 0.0
    for stage in stages:
        for world_size in ranks:
            if world_size == 1 and stage != stages[0]:
                continue
            got = measure(size, stage, world_size, dtypes)
            effective = stage if world_size > 1 else 0
            expected, paper = (table[effective](world_size) * got.parameters for table in (TABLE[precision], PAPER))
            worst = max(worst, abs(got.states / expected - 1))
            share = got.parameters * (world_size - 1) / world_size
            calls = ", ".join(f"{calls} {kind}" for kind, calls in got.calls.items()) or "none"
            print(f"{stage:>5}{world_size:>6}" + "".join(f"{got.bytes[each] / 1e9:>9.2f}" for each in STATES)
                  + f"{got.states / 1e9:>10.2f}{paper / 1e9:>10.2f}{got.states / paper - 1:>9.2%}"
                  f"{expected / 1e9:>10.2f}{got.states / expected - 1:>9.2%}"
                  f"{got.bytes['live'] / 1e9:>7.2f}{got.bytes['update'] / 1e9:>9.2f}"
                  f"{got.sent / share if share else 0:>7.3f}{got.setup_s:>9.2f}{got.step_s:>7.2f}"
                  f"{f' ({plain:.2f})':<8} {calls} ({got.largest:,})", flush=True)
    return worst


def print_growth() -> None:
    """Work for set-up and for a step beside the number of layers and of ranks."""
    print("\nHow the work grows: lines of zero.py that run, per unit (a block), and seconds in all")
    print(f"{'stage':>5}{'ranks':>6}{'blocks':>8}{'set-up lines per unit':>23}{'step lines per unit':>21}"
          f"{'set-up s':>10}{'step s':>8}")
    for stage in (2, 3):
        for world_size, layers in [(64, 64), (64, 128), (64, 256), (4, 64), (1024, 64)]:
            work = work_of(layers, world_size, zero.ZeroConfig(stage=stage, reduce_bucket_size=512))
            print(f"{stage:>5}{world_size:>6}{layers:>8}{work.setup / work.units:>23.1f}{work.step / work.units:>21.1f}"
                  f"{work.setup_s:>10.2f}{work.step_s:>8.2f}", flush=True)


def main() -> None:
    """Print what the options ask for; exit code 1 where the states are more than 1 % off the table."""
    parser = argparse.ArgumentParser(description="Run one rank of N on tensors without memory, and measure.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--stages", nargs="+", type=int, choices=range(4), default=list(range(4)))
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="default: bf16, the paper's case")
    parser.add_argument("--growth", action="store_true", help="only how the work grows with layers and ranks")
    options = parser.parse_args()
    if min(options.ranks) < 1:
        parser.error(f"--ranks is {min(options.ranks)}; allowed: whole numbers from 1 up")
    worst = 0.0
    if not options.growth:
        worst = max(print_size(name, options.stages, options.ranks, options.precision) for name in options.sizes)
        print(f"\nlargest difference from the table: {worst:.2%}")
    print_growth()
    sys.exit(worst > 0.01)


if __name__ == "__main__":
    main()
