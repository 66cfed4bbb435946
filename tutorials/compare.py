"""What the code of an exercise holds, sends and takes: grade.py sets a reader's numbers beside the project's."""

import importlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import checkpointing
import steps
import zero
from oracle import CPU, Wire, held, living
from test_checkpointing import peak

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
    before = living()
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


def numbers(name: str, run_ranks: Callable) -> list[dict[str, Any]]:
    """What rank 0 measures of the code in the exercise's module, and of that in ``project_`` and its name."""
    ranks = WORKLOADS[name][0]
    module = name.partition(":")[0]
    return [run_ranks(_measured, ranks, name, code)[0] if ranks > 1 else _measured(name, code)
            for code in (module, f"project_{module}")]


def _measured(name: str, code: str) -> dict[str, Any]:
    with mock.patch.dict(globals(), {name.partition(":")[0]: importlib.import_module(code)}):
        return asdict(WORKLOADS[name][1]())
