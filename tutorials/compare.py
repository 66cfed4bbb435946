"""What the code of an exercise holds, sends and takes, as JSON: grade.py sets a reader's numbers beside the project's.

    python tutorials/compare.py zero:stage_1
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("", "tests", "tutorials")]
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

import checkpointing  # noqa: E402
import steps  # noqa: E402
import zero  # noqa: E402
from conftest import Ranks  # noqa: E402
from test_checkpointing import peak  # noqa: E402
from wire import CPU, Wire, held, storages  # noqa: E402

RUNS = 10  # of which the fastest counts


@dataclass
class Measured:
    """Numbers by name, and the timeline of one run: where each phase begins and ends, and when something is sent."""
    numbers: dict[str, float]
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    sends: list[float] = field(default_factory=list)


class Phases:
    """The phases of one run."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """The first phase begins now, and not when this object was made."""
        self.marks = [("", time.perf_counter())]

    def end(self, name: str) -> None:
        """The phase of this name is over."""
        self.marks.append((name, time.perf_counter()))

    @property
    def seconds(self) -> float:
        """From the first phase's beginning to the last one's end."""
        return self.marks[-1][1] - self.marks[0][1]


def measure(run: Callable[[Phases], Any]) -> Measured:
    """The seconds of the fastest of several runs; the rest from one under ``Wire``, which slows everything down."""
    def once(wire: Wire | None) -> Phases:
        if dist.is_initialized():
            dist.barrier()
        counting: AbstractContextManager = nullcontext() if wire is None else wire
        with counting:
            phases = Phases()
            run(phases)
        return phases

    once(Wire())  # the first run pays for what Python and PyTorch load
    seconds = min(once(None).seconds for _ in range(RUNS))
    wire = Wire()
    marks = once(wire).marks
    start = marks[0][1]
    phases = [(name, before - start, end - start) for (_, before), (name, end) in zip(marks, marks[1:])]
    numbers = {"seconds": seconds}
    if dist.is_initialized():
        numbers |= {"elements sent": wire.elements, "collectives and messages": len(wire.times)}
    return Measured(numbers, phases, [moment - start for moment in wire.times])


def layers(count: int, width: int) -> nn.Sequential:
    """A model whose computing takes about as long as sending it."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count)))


def training(stage: int) -> Measured:
    """Steps of ``zero.Zero`` alone."""
    before = storages()
    model, x = layers(6, 256), torch.ones(64, 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    mine = zero.Zero(model, optimizer, zero.ZeroConfig(stage=stage, reduce_bucket_size=2**16), CPU)

    def run(phases: Phases) -> None:
        loss = model(x).square().mean()
        phases.end("forward")
        loss.backward()
        phases.end("backward")
        mine.finish_backward()
        mine.step(divisor=dist.get_world_size())
        phases.end("step")

    measured = measure(run)
    measured.numbers["bytes held between steps"] = held(before)
    return measured


def recomputing() -> Measured:
    """Forward and backward of a stack of checkpointed layers, in this process."""
    model, x = layers(12, 256), torch.ones(64, 256, requires_grad=True)

    def run(phases: Phases | None) -> None:
        y = x
        for layer in model:
            y = checkpointing.checkpoint(layer, y)
        if phases is not None:
            phases.end("forward")
        y.sum().backward()
        if phases is not None:
            phases.end("backward")

    measured = measure(run)
    measured.numbers["bytes at the peak"] = peak(partial(run, None))
    return measured


def summing() -> Measured:
    """``steps.all_reduce``."""
    tensor = torch.ones(2**20)

    def run(phases: Phases) -> None:
        steps.all_reduce(tensor.fill_(1.0))
        phases.end("step")

    return measure(run)


def overlapping() -> Measured:
    """``steps.overlap``: forward, backward, and waiting for the sums."""
    x = torch.ones(64, 256)

    def run(phases: Phases) -> None:
        model = layers(6, 256)  # a new one: hooks stay
        works = steps.overlap([(list(layer.parameters()), torch.zeros(256 * 257)) for layer in reversed(model)])
        phases.begin()
        loss = model(x).square().mean()
        phases.end("forward")
        loss.backward()
        phases.end("backward")
        for work in works:
            work.wait()
        phases.end("waiting")

    return measure(run)


WORKLOADS: dict[str, tuple[int, Callable[[], Measured]]] = {  # on how many ranks, and what
    "steps:all_reduce": (2, summing),
    "steps:overlap": (2, overlapping),
    "checkpointing:checkpoint": (1, recomputing),
    "zero:reduce_scatter": (2, partial(training, 1)),
    "zero:bucketed_all_reduce": (2, partial(training, 0)),
    "zero:stage_1": (2, partial(training, 1)),
    "zero:stage_3": (2, partial(training, 3)),
}


def main() -> None:
    """Measure one workload, and print rank 0's numbers."""
    ranks, workload = WORKLOADS[sys.argv[1]]
    torch.set_num_threads(1)
    if ranks == 1:
        print(json.dumps(asdict(workload())))
        return
    pool = Ranks(["compare"])
    try:
        print(json.dumps(asdict(pool(_measured, ranks, sys.argv[1])[0])))
    finally:
        pool.stop()


def _measured(name: str) -> Measured:
    return WORKLOADS[name][1]()


if __name__ == "__main__":
    import compare  # the processes must find these functions by the module's name

    compare.main()
