"""Make the course's pictures, each from a real run of this project's code.

    python tutorials/figures.py                             all of them, into tutorials/figures
    python tutorials/figures.py holdings recompute          some of them
    python tutorials/figures.py --output DIR --format png   elsewhere, and as PNG

    schedules     the learning rate of every schedule over 1000 steps
    collectives   what 4 ranks hold before and after each of the four collectives
    bucket        a real bucket on 4 ranks: its parameters, the padding, the shards
    holdings      what each of 4 ranks holds at each ZeRO stage, from the live tensors of an engine, to scale
    timeline      computation and collectives in one step of 2 ranks, as recorded; on top, the naive loop
    unit_life     when each unit of a model is gathered, whole and freed in a step at stage 3, as recorded
    step_memory   the live bytes of one of 4 ranks through one step, counted after every operation
    loss_scale    the loss scale of an fp16 training run, with its overflows
    recompute     peak activation memory against the share of the forward pass that is computed twice
    same_losses   the losses of plain PyTorch and of stages 0 to 3, and how far they are apart

Nothing is drawn by hand. Bytes, losses and scales are the same in every run of a version; the times of ``timeline`` are
those of the quickest of some steps on the current machine, and so are those of ``unit_life``.
"""

import argparse
import gc
import io
import multiprocessing
import re
import sys
import tempfile
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.transforms import Bbox
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]
import engine as deepspeed  # noqa: E402
import schedulers  # noqa: E402
import zero  # noqa: E402
from train_gpt import GPT, mean_over_ranks  # noqa: E402

# The palette of Okabe and Ito, which people with any kind of colour vision can tell apart.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
GREY, PALE = "#595959", "#E8E8E8"
STYLE = {"font.size": 15, "axes.titlesize": 15, "axes.labelsize": 15, "xtick.labelsize": 13, "ytick.labelsize": 13,
         "legend.fontsize": 14, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
         "axes.linewidth": 1.0, "xtick.color": GREY, "ytick.color": GREY, "lines.linewidth": 2.5,
         "svg.hashsalt": "course", "path.simplify_threshold": 0.5, "hatch.linewidth": 1.0}
WIDTH = 7.2  # inches: 15 points are still to be read where a phone shows it 7 cm wide
MARGIN = 0.2  # inches of white around it


# --- Running ----------------------------------------------------------------------------------------------------------


def on_ranks(function: Callable, ranks: int, *args: Any) -> list[Any]:
    """``function(*args)`` in ``ranks`` new processes with a gloo group: what each returned."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(ranks, spawn) as pool:
        tasks = [pool.submit(_rank, rank, ranks, f"{folder}/store", function, args) for rank in range(ranks)]
        return [task.result() for task in tasks]


def _rank(rank: int, ranks: int, store: str, function: Callable, args: tuple) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
                            timeout=timedelta(minutes=2))  # where another rank has failed, this one ends too
    return function(*args)


def at_all_stages(function: Callable[[int], Any]) -> list[Any]:
    """``function(stage)`` for each stage."""
    return [function(stage) for stage in range(4)]


def text_windows(step: int, batch: int, length: int) -> Tensor:
    """``batch`` stretches of this project's own source: (batch, length + 1), int64; the same for each ``step``."""
    source = torch.frombuffer(bytearray((ROOT / "zero.py").read_bytes()), dtype=torch.uint8)
    starts = torch.randint(len(source) - length, (batch,), generator=torch.Generator().manual_seed(step))
    return torch.stack([source[i:i + length + 1] for i in starts.tolist()]).long()


class Region(torch.nn.Sequential):
    """Several blocks, recomputed as one."""

    def forward(self, x: Tensor) -> Tensor:
        return deepspeed.checkpointing.checkpoint(super().forward, x)


def gpt(width: int, layers: int, context: int, config: dict, region: int = 0) -> deepspeed.Engine:
    """An engine with a GPT, the same on every call; AdamW unless the config says otherwise.

    ``region`` is how many blocks are recomputed as one; 0: as the config says.
    """
    torch.manual_seed(0)
    model = GPT(width, layers, 4, context)
    if region:
        model.blocks = torch.nn.ModuleList(Region(*model.blocks[i:i + region]) for i in range(0, layers, region))
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    engine, *_ = deepspeed.initialize(model=model, config={"optimizer": optimizer} | config)
    return engine


def train_step(engine: deepspeed.Engine, step: int, rows: int) -> Tensor:
    """One optimizer step, on this rank's ``rows`` of the step's batch; its loss."""
    windows = text_windows(step, rows * engine.world_size, engine.module.context)
    windows = windows[engine.global_rank::engine.world_size]
    loss = engine(windows[:, :-1], windows[:, 1:])
    engine.backward(loss)
    engine.step()
    return loss


# --- Measuring live bytes ---------------------------------------------------------------------------------------------


KINDS = ("parameters", "optimizer state", "gradients", "receive buffers", "activations")
COLOURS = dict(zip(KINDS, (BLUE, GREEN, ORANGE, PURPLE, SKY)))


def known_storages(engine: deepspeed.Engine) -> dict[int, tuple[str, int]]:
    """The kind and bytes of each storage that a rank keeps for parameters, optimizer state and gradients, by its id."""
    found: dict[int, tuple[str, int]] = {}

    def note(kind: str, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                found.setdefault(storage._cdata, (kind, storage.nbytes()))

    for bucket in engine.zero.buckets:
        note("parameters", bucket.flat, bucket.shard)
        note("optimizer state", bucket.master)  # where it is not a part of the parameters
        if bucket.gradients is not None:
            note("gradients", bucket.gradients.buffer, bucket.gradients.sum, bucket.gradients.send_buffer)
    for state in engine.optimizer.state.values():
        note("optimizer state", *(v for v in state.values() if isinstance(v, Tensor) and v.dim()))
    grads = [slot.parameter.grad for bucket in engine.zero.buckets for slot in bucket.slots]
    note("gradients", *(grad for grad in grads if not isinstance(grad, zero.TakenGradient)))  # that has no memory
    return found


class LiveBytes(TorchDispatchMode):
    """Counts, after every operation, the bytes that are alive, by kind; what is of no known kind is an activation.

    samples   one dict of bytes by kind per operation
    """

    def __init__(self, engine: deepspeed.Engine):
        super().__init__()
        self.engine = engine
        self.made: dict[int, tuple[str, int]] = {}  # kind and bytes of the storages made inside, by their ids
        self.samples: list[dict[str, int]] = []
        self.kind = "activations"  # of what is made now
        engine.communicator.reduce_scatter = partial(self._receiving, engine.communicator.reduce_scatter)

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before | self.made.keys():
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = self.kind, storage.nbytes()
                weakref.finalize(storage, self.made.pop, storage._cdata, None).atexit = False
        self.sample()
        return result

    def sample(self) -> None:
        """Note what is alive now."""
        counts = dict.fromkeys(KINDS, 0)
        for kind, size in (self.made | known_storages(self.engine)).values():
            counts[kind] += size
        self.samples.append(counts)

    def _receiving(self, reduce_scatter: Callable[..., zero.Handle], *args: Any, **kwargs: Any) -> zero.Handle:
        """Start a reduce-scatter; what it makes is no activation."""
        self.kind = "receive buffers"
        try:
            return reduce_scatter(*args, **kwargs)
        finally:
            self.kind = "activations"


# --- Drawing ----------------------------------------------------------------------------------------------------------


def new_figure(height: float) -> Figure:
    """A figure on a white sheet with round corners, so that it stands out on light and dark pages alike."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    edge = MARGIN - 0.03
    figure.patches.append(FancyBboxPatch(
        (-edge / WIDTH, -edge / height), 1 + 2 * edge / WIDTH, 1 + 2 * edge / height,
        boxstyle=f"round,pad=0,rounding_size={0.2 / WIDTH}", mutation_aspect=WIDTH / height,
        transform=figure.transFigure, facecolor="white", edgecolor="#BBBBBB", linewidth=1.0, zorder=-1, clip_on=False))
    return figure


def legend(figure: Figure, colours: dict[str, str], columns: int) -> None:
    """A legend of coloured squares below everything else."""
    figure.legend([Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()], list(colours),
                  loc="outside lower center", ncols=columns, frameon=False, handlelength=1.0, handleheight=1.0,
                  columnspacing=1.4, handletextpad=0.5)


def name_rows(axis: Axes, names: Sequence[str], middles: Sequence[float]) -> None:
    """A picture of rows: their names on the left at these heights, without axis or ticks."""
    axis.set_yticks(middles, names)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def draw_phases(axis: Axes, ends: Sequence[float]) -> None:
    """A dotted line where each phase of a step ends."""
    for end in ends:
        axis.axvline(end, color=BLACK, linewidth=1.0, linestyle=":")


def schedules() -> Figure:
    """Every schedule's learning rate over 1000 steps."""
    figure = new_figure(6.4)
    for index, (name, params) in enumerate(schedulers.GALLERY):
        axis = figure.add_subplot(3, 3, index + 1)
        rates = [row[0] for row in schedulers.preview({"type": name, "params": params}, 1001, lr=0.01)]
        axis.plot(rates, color=BLUE)
        axis.set_title(name, fontsize=14)
        axis.set(xlim=(0, 1000), ylim=(0, 1.12 * max(rates)), xticks=[0, 1000], yticks=[0, max(rates)])
        axis.set_xticklabels(["0", "1000"] if index > 5 else [])
        axis.set_yticklabels(["0", f"{max(rates):.2g}"])
    figure.supxlabel("optimizer step", fontsize=15)
    figure.supylabel("learning rate", fontsize=15)
    return figure


# What each rank holds.


def pieces_held(stage: int) -> tuple[list[tuple[str, int, int, int]], int]:
    """After a step: for each kind the bytes held, and the bytes of the whole with where what is held begins."""
    engine = gpt(64, 4, 32, {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}})
    for step in range(2):
        train_step(engine, step, 1)
    known = known_storages(engine).values()
    count = sum(bucket.numel for bucket in engine.zero.buckets)
    sharded = engine.zero.sharded
    rows = []
    for kind, size, apart in (("parameters", 4 * count, sharded.parameters),
                              ("gradients", 4 * count, sharded.gradients),
                              ("optimizer state", 8 * count, sharded.optimizer)):
        held = sum(n for k, n in known if k == kind)  # of optimizer state a little less: padding has none
        rows.append((kind, held, engine.global_rank * size // engine.world_size if apart else 0, size))
    return rows, count


def holdings() -> Figure:
    """Four ranks at each stage: the whole model state as pale columns, and in colour what each rank holds of it."""
    ranks = on_ranks(at_all_stages, 4, pieces_held)
    figure = new_figure(5.4)
    axes = figure.subplots(1, 4, sharey=True)
    for stage, axis in enumerate(axes):
        for rank in range(4):
            rows, count = ranks[rank][stage]
            bottom = 0.0
            for kind, held, start, whole in rows:
                axis.bar(rank, whole / count, bottom=bottom, color=PALE, width=0.84)
                axis.bar(rank, held / count, bottom=bottom + start / count, color=COLOURS[kind], width=0.84)
                bottom += whole / count + 0.3
        total = sum(held for _, held, _, _ in rows) / count
        axis.set_title(f"stage {stage}\n{total:.1f} bytes", fontsize=15)
        axis.set(xticks=range(4), yticks=[], xlim=(-0.6, 3.6))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel("rank")
    axes[0].set_ylabel("bytes per parameter")
    legend(figure, {kind: COLOURS[kind] for kind in ("parameters", "gradients", "optimizer state")}, 3)
    return figure


# What collectives do.


def before_and_after() -> list[tuple[str, list[int], list[int]]]:
    """For each collective its name and this rank's four numbers before and after it; 0 is what it does not have."""
    communicator, rank = zero.Communicator(torch.device("cpu")), dist.get_rank()
    mine, nothing = torch.full((4,), 10 ** rank), torch.zeros(4, dtype=torch.int64)
    shard = nothing.clone()
    communicator.shard_of(shard).copy_(communicator.shard_of(mine))

    def reduce_scatter(flat: Tensor) -> None:
        summed = torch.zeros(1, dtype=flat.dtype)
        communicator.reduce_scatter(flat.clone(), summed, add=False).wait()
        flat.zero_()
        communicator.shard_of(flat).copy_(summed)

    rows = []
    for name, start, collective in (
            ("broadcast", mine if rank == 0 else nothing, lambda flat: communicator.broadcast(flat, source=0)),
            ("all-reduce", mine, lambda flat: communicator.all_reduce(flat).wait()),
            ("reduce-scatter", mine, reduce_scatter),
            ("all-gather", shard, lambda flat: communicator.all_gather(flat).wait())):
        flat = start.clone()
        collective(flat)
        rows.append((name, start.tolist(), flat.tolist()))
    return rows


RANKS = {1: SKY, 10: ORANGE, 100: YELLOW, 1000: PURPLE, 1111: GREEN}  # the colour of what each number is


def draw_numbers(axis: Axes, left: float, ranks: list[list[int]]) -> None:
    """A row of four boxes for each rank, from ``left`` on; empty where it holds nothing."""
    for rank, numbers in enumerate(ranks):
        for index, number in enumerate(numbers):
            axis.add_patch(Rectangle((left + index, 3 - rank), 0.94, 0.86, color=RANKS.get(number, PALE)))
            if number:
                axis.text(left + index + 0.47, 3.42 - rank, number, ha="center", va="center", fontsize=13)


def collectives() -> Figure:
    """A row for each: four ranks with four numbers each, before and after."""
    ranks = on_ranks(before_and_after, 4)
    figure = new_figure(7.6)
    axes = figure.subplots(4, 1)
    for axis, rows in zip(axes, zip(*ranks)):
        draw_numbers(axis, 0.0, [before for _, before, _ in rows])
        draw_numbers(axis, 5.2, [after for _, _, after in rows])
        axis.annotate("", (5.1, 2.0), (4.0, 2.0), arrowprops={"arrowstyle": "-|>", "color": BLACK, "linewidth": 2.0})
        axis.set_title(rows[0][0], loc="left", fontsize=15, pad=2)
        axis.set(xlim=(0, 9.2), ylim=(0, 3.9), xticks=[])
        name_rows(axis, [f"rank {rank}" for rank in range(4)], [3.43, 2.43, 1.43, 0.43])
        axis.spines["bottom"].set_visible(False)
    legend(figure, {"rank 0's": SKY, "rank 1's": ORANGE, "rank 2's": YELLOW, "rank 3's": PURPLE, "the sum": GREEN}, 5)
    return figure


def layout_of_a_bucket() -> tuple[list[tuple[str, int, int]], list[int]]:
    """The parameters in a bucket of a small model, with begin and end, and where the shards begin and end."""
    model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Tanh(), torch.nn.Linear(20, 10))
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1}})
    (bucket,) = engine.zero.buckets
    return [(slot.name, slot.offset, slot.end) for slot in bucket.slots], list(bucket.bounds)


def bucket() -> Figure:
    """One flat tensor: above it the parameters that lie in it, below it the shards of four ranks."""
    slots, bounds = on_ranks(layout_of_a_bucket, 4)[0]
    figure = new_figure(3.2)
    axis = figure.subplots()
    axis.add_patch(Rectangle((0, 1), bounds[-1], 0.9, facecolor="white", edgecolor=GREY, hatch="///"))
    for (name, begin, end), colour in zip(slots, (SKY, ORANGE, YELLOW, PURPLE)):
        axis.add_patch(Rectangle((begin, 1), end - begin, 0.9, facecolor=colour, edgecolor=GREY))
        middle = (begin + end) / 2
        height = 2.25 if name.endswith("weight") else 2.75
        axis.annotate(name, (middle, 1.9), (middle, height), ha="center", fontsize=14,
                      arrowprops={"arrowstyle": "-", "color": GREY})
    for rank, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        axis.add_patch(Rectangle((begin + 2, 0), end - begin - 4, 0.6, facecolor=PALE))
        axis.text((begin + end) / 2, 0.3, f"rank {rank}", ha="center", va="center", fontsize=14)
        axis.axvline(end, 0, 1.95 / 3.2, color=RED, linestyle="--", linewidth=1.5)
    axis.set(xlim=(0, bounds[-1] + 2), ylim=(0, 3.2), xticks=bounds, xlabel="element of the flat tensor")
    name_rows(axis, [], [])
    return figure


# One step over time.


class Watched:
    """Works of torch.distributed that tell when they were done: a thread of their own waits for them."""

    def __init__(self, works: list[Any], done: Callable[[], None]):
        self.thread = threading.Thread(target=self._run, args=(works, done), daemon=True)
        self.thread.start()

    def _run(self, works: list[Any], done: Callable[[], None]) -> None:
        for work in works:
            work.wait()
        done()

    def wait(self) -> None:
        """Block until all are done."""
        self.thread.join()


class Recorder:
    """Notes what a rank does when: (what, begin, end) in seconds, while it is in place."""

    def __init__(self) -> None:
        self.events: list[tuple[str, float, float]] = []

    def note(self, what: str, began: float) -> None:
        """``what`` has gone on since ``began``, and ends now."""
        self.events.append((what, began, time.perf_counter()))

    def watch(self) -> None:
        """From now on note this process's collectives, its waits for them, and what becomes of its units."""
        for name in ("all_gather", "reduce_scatter", "all_reduce"):
            original = getattr(zero.Communicator, name)
            setattr(zero.Communicator, name, self._collective(name.replace("_", "-"), original))
        for name in ("start_gather", "finish_gather", "free"):
            setattr(zero.Unit, name, self._timed(lambda unit, name=name: f"{name} {unit.name or '(root)'}",
                                                 getattr(zero.Unit, name)))
        zero.Handle.wait = self._timed(lambda handle: "waiting", zero.Handle.wait)

    def _timed(self, what: Callable[[Any], str], original: Callable) -> Callable:
        def call(owner: Any) -> None:
            began = time.perf_counter()
            original(owner)
            self.note(what(owner), began)

        return call

    def _collective(self, kind: str, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> zero.Handle:
            began = time.perf_counter()
            handle = original(*args, **kwargs)
            if handle.works and args[1].numel() > 4096:  # the scalars are over at once
                handle.works = [Watched(list(handle.works), partial(self.note, kind, began))]
            return handle

        return call


def recorded_step(engine: Any, recorder: Recorder, step: int) -> list[tuple[str, float, float]]:
    """The events of one step of both ranks, in seconds from its begin on."""
    windows = text_windows(step, 8, 64)[dist.get_rank()::2]
    dist.barrier()
    recorder.events = []
    began = time.perf_counter()
    loss = engine(windows[:, :-1], windows[:, 1:])
    recorder.note("forward", began)
    middle = time.perf_counter()
    engine.backward(loss)
    recorder.note("backward", middle)
    late = time.perf_counter()
    engine.step()
    recorder.note("update", late)
    return [(what, begin - began, end - began) for what, begin, end in recorder.events]


class NaiveLoop:
    """Chapter 5's: backward, then one all-reduce for each gradient, then the update; in the engine's words."""

    def __init__(self, model: torch.nn.Module, recorder: Recorder):
        self.model, self.recorder = model, recorder
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        for p in self.model.parameters():
            began = time.perf_counter()
            dist.all_reduce(p.grad)
            for what in ("waiting", "all-reduce"):
                self.recorder.note(what, began)
            p.grad /= dist.get_world_size()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def quickest_steps(rounds: int, stages: list[int | None]) -> list[list[tuple[str, float, float]]]:
    """The events of the quickest of ``rounds`` steps at each of ``stages``; None: of the naive loop."""
    recorder = Recorder()
    recorder.watch()
    loops: list[Any] = []
    for stage in stages:
        torch.manual_seed(0)
        loops.append(NaiveLoop(GPT(256, 6, 4, 64), recorder) if stage is None else gpt(256, 6, 64, {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 780_000}}))
    times, quickest = [float("inf")] * len(loops), [[] for _ in loops]
    for number in range(rounds):  # in turns, so that a busy moment of the machine meets all of them
        for index, loop in enumerate(loops):
            events = recorded_step(loop, recorder, number)
            slowest = torch.tensor([max(event[-1] for event in events)])
            dist.all_reduce(slowest, dist.ReduceOp.MAX)  # all ranks choose the same step
            if number > 1 and float(slowest) < times[index]:
                times[index], quickest[index] = float(slowest), events
    return quickest


COMPUTE = {"forward": SKY, "backward": BLUE, "update": GREEN}
NETWORK = {"all-reduce": RED, "reduce-scatter": ORANGE, "all-gather": PURPLE}


def timeline() -> Figure:
    """The naive loop and stages 0 to 3 below each other: what the rank computes, and what its collectives do."""
    rows = on_ranks(quickest_steps, 2, 30, [None, 0, 1, 2, 3])[0]
    figure = new_figure(8.6)
    axes = figure.subplots(5, 1, sharex=True)
    for name, axis, events in zip(("naive loop", *(f"stage {stage}" for stage in range(4))), axes, rows):
        def bars(kind: str) -> list[tuple[float, float]]:
            return [(1e3 * begin, 1e3 * (end - begin)) for what, begin, end in sorted(events, key=lambda e: e[1])
                    if what == kind and end - begin > 2e-4]

        for kind, colour in COMPUTE.items():
            axis.broken_barh(bars(kind), (2, 0.9), facecolor=colour)
        axis.broken_barh(bars("waiting"), (2, 0.9), facecolor="white", alpha=0.75)
        for kind, colour in NETWORK.items():
            axis.broken_barh(bars(kind), (0 if kind == "all-gather" else 1, 0.8), facecolor=colour, edgecolor="white",
                             linewidth=0.3 if name == "naive loop" else 0.8)
        name_rows(axis, ["computes", "reduces", "gathers"], [2.45, 1.4, 0.4])
        axis.set_ylim(-0.4, 2.9)
        axis.set_title(name, loc="left", fontsize=15, pad=2)
        axis.spines["bottom"].set_visible(axis is axes[-1])
        axis.tick_params(axis="x", length=4 if axis is axes[-1] else 0)
    axes[-1].set(xlabel="milliseconds", xlim=(0, None))
    legend(figure, COMPUTE | {"waits": "#D0D0D0"} | NETWORK, 4)
    return figure


# The life of units.


def unit_life() -> Figure:
    """A row for each unit, coloured while its gather is under way and while it is whole."""
    (events,) = on_ranks(quickest_steps, 2, 30, [3])[0]
    phases = {what: 1e3 * end for what, _, end in events if what in COMPUTE}
    moments = defaultdict(list)  # by unit: (when, the colour from then on)
    for what, begin, end in events:
        kind, _, unit = what.partition(" ")
        if unit:
            colour = {"start_gather": PURPLE, "finish_gather": BLUE, "free": PALE}[kind]
            moments[unit].append((1e3 * (end if kind == "finish_gather" else begin), colour))
    figure = new_figure(4.8)
    axis = figure.subplots()
    for row, unit in enumerate(sorted(moments, reverse=True)):
        changes = [(0.0, PALE), *moments[unit], (phases["update"], PALE)]
        for (begin, colour), (end, _) in pairwise(changes):
            axis.broken_barh([(begin, end - begin)], (row + 0.1, 0.8), facecolor=colour)
    draw_phases(axis, list(phases.values()))
    for begin, name in zip((0.0, *phases.values()), phases):
        axis.text(begin + phases["update"] / 100, len(moments) + 0.1, name, fontsize=14)
    axis.set(xlim=(0, phases["update"]), ylim=(0, len(moments) + 0.5), xlabel="milliseconds")
    name_rows(axis, sorted(moments, reverse=True), [row + 0.5 for row in range(len(moments))])
    legend(figure, {"sharded": PALE, "being gathered": PURPLE, "whole": BLUE}, 3)
    return figure


# Memory through one step.


def memory_of_a_step(stage: int) -> tuple[list[dict[str, int]], list[int]]:
    """The bytes by kind after every operation of one step, and where forward and backward end."""
    engine = gpt(64, 6, 32, {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {
        "stage": stage, "reduce_bucket_size": 50_000}})
    for step in range(2):
        train_step(engine, step, 2)
    windows = text_windows(2, 8, 32)[dist.get_rank()::4]
    live, marks = LiveBytes(engine), []
    gc.collect()
    with live:
        loss = engine(windows[:, :-1], windows[:, 1:])
        marks.append(len(live.samples))
        engine.backward(loss)
        marks.append(len(live.samples))
        engine.step()
        live.sample()
    return live.samples, marks


def stretched(samples: list[dict[str, int]], marks: list[int]) -> list[float]:
    """A place on the horizontal axis for each sample: forward from 0 to 1, backward to 3, update to 4."""
    ends = [0, *marks, len(samples)]
    places = []
    for begin, width, first, last in zip((0, 1, 3), (1, 2, 1), ends, ends[1:]):
        places += [begin + width * (i + 1) / (last - first) for i in range(last - first)]
    return places


def thinned(places: list[float], samples: list[dict[str, int]], count: int) -> list[tuple[float, dict[str, int]]]:
    """At most ``count`` places with their samples: of those that lie together, the one with most bytes."""
    groups = defaultdict(list)
    for place, sample in zip(places, samples):
        groups[int(place * count / places[-1])].append((place, sample))
    return [max(group, key=lambda pair: sum(pair[1].values())) for group in groups.values()]


def step_memory() -> Figure:
    """Stages 0 to 3: what is alive on one of 4 ranks, from the begin of forward to the end of the update."""
    stages = on_ranks(at_all_stages, 4, memory_of_a_step)[0]
    figure = new_figure(6.4)
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for stage, (axis, (samples, marks)) in enumerate(zip(axes.flat, stages)):
        shown = thinned(stretched(samples, marks), samples, 120)
        for upto in range(len(KINDS), 0, -1):  # the whole first, and over it ever fewer kinds
            line = [(place, sum(sample[kind] for kind in KINDS[:upto]) / 2**20) for place, sample in shown]
            corners = [here for before, here, after in zip([(0, 0), *line], line, [*line[1:], (0, 0)])
                       if not before[1] == here[1] == after[1]]
            axis.fill(*zip((0, 0), (0, line[0][1]), *corners, (4, 0)), color=COLOURS[KINDS[upto - 1]], linewidth=0)
        most = max(sum(sample.values()) for sample in samples) / 2**20
        axis.set_title(f"stage {stage}: at most {most:.1f} MiB", fontsize=15)
        draw_phases(axis, (1, 3))
        axis.set(xlim=(0, 4), ylim=(0, None), xticks=[0.5, 2, 3.5])
        axis.set_xticklabels(["forward", "backward", "update"])
        axis.tick_params(axis="x", length=0)
    figure.supylabel("MiB alive on one of 4 ranks", fontsize=15)
    legend(figure, COLOURS, 3)
    return figure


# Mixed precision.


def scale_history(steps: int) -> tuple[list[float], list[int]]:
    """The loss scale in force at each step of an fp16 run, and the steps that overflowed."""
    engine = gpt(32, 2, 16, {"train_micro_batch_size_per_gpu": 4, "fp16": {
        "enabled": True, "initial_scale_power": 24, "loss_scale_window": 20, "hysteresis": 1}})
    scales, overflows = [], []
    for step in range(steps):
        scales.append(engine.loss_scale())
        skipped = engine.skipped_steps
        train_step(engine, step, 4)
        if engine.skipped_steps > skipped:
            overflows.append(step)
    return scales, overflows


def loss_scale() -> Figure:
    """The scale as stairs, and a cross at every overflow."""
    (scales, overflows), = on_ranks(scale_history, 1, 240)
    figure = new_figure(4.6)
    axis = figure.subplots()
    axis.step(range(len(scales)), scales, where="post", color=BLUE, label="loss scale: doubled after 20 good steps")
    axis.plot(overflows, [scales[step] for step in overflows], "X", color=RED, markersize=11, markeredgecolor="white",
              clip_on=False, label="overflow: step skipped, scale halved")
    axis.legend(frameon=False, loc="upper right")
    axis.set_yscale("log", base=2)
    axis.set(xlabel="step", ylabel="loss scale", xlim=(0, len(scales)))
    axis.grid(axis="y", color=PALE)
    return figure


# Recomputation.


def activations_and_flops(choices: list[tuple[dict, int]]) -> list[tuple[int, int]]:
    """The peak of live activations in bytes and the floating-point operations of a step, per config section and region.
    """
    results = []
    for section, region in choices:
        engine = gpt(64, 12, 64, {"train_micro_batch_size_per_gpu": 4} | section, region)
        train_step(engine, 0, 4)
        live = LiveBytes(engine)
        with live:
            train_step(engine, 1, 4)
        with FlopCounterMode(display=False) as flops:  # a step of its own, as it keeps tensors that are recomputed
            train_step(engine, 2, 4)
        results.append((max(sample["activations"] for sample in live.samples), flops.get_total_flops()))
        engine.destroy()
    return results


def recompute() -> Figure:
    """A curve for ever more of 12 blocks, and points for larger regions and for the selective mode."""
    def section(**more: Any) -> dict:
        return {"activation_checkpointing": more}

    counts, regions = [0, 2, 4, 6, 8, 10, 12], [2, 3, 4, 6]
    partly = [section(modules=[f"blocks.{i}" for i in range(count)]) if count else {} for count in counts]
    choices = [*((config, 0) for config in partly), *(({}, k) for k in regions), (section(mode="selective"), 0)]
    (results,) = on_ranks(activations_and_flops, 1, choices)
    base = results[0][1]
    points = [(100 * (flops - base) / (base / 3), held / 2**20) for held, flops in results]  # forward is a third
    figure = new_figure(4.6)
    axis = figure.subplots()
    curve, larger, selective = points[:len(counts)], points[len(counts):-1], points[-1]
    axis.plot(*zip(*curve), "o-", color=BLUE, markersize=9)
    axis.plot(*zip(*larger), "s", color=ORANGE, markersize=11)
    axis.plot(*selective, "D", color=GREEN, markersize=11)
    for count, (x, y) in zip(counts, curve):
        axis.annotate(f"{count}", (x, y), xytext=(9, 5), textcoords="offset points", color=BLUE)
    for blocks, (x, y) in zip(regions, larger):
        axis.annotate(f"{blocks}", (x, y), xytext=(12, -5), textcoords="offset points", color=RED)
    axis.annotate("blocks recomputed, of 12", curve[2], xytext=(40, 14), textcoords="offset points", color=BLUE)
    axis.annotate("all 12, in regions\nof several blocks", larger[-1], xytext=(30, 16), textcoords="offset points",
                  ha="right", color=RED)
    axis.annotate("selective\nmode", selective, xytext=(-4, -50), textcoords="offset points", color=GREEN)
    axis.set(xlabel="matrix products computed twice, % of those in forward", ylabel="activations, MiB", xlim=(-3, 100),
             ylim=(0, None))
    axis.grid(axis="y", color=PALE)
    return figure


# The same training.


def loss_of(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """The mean loss in nats per byte, in the dtype of the model."""
    return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def losses_of_all_stages(steps: int, dtype: torch.dtype) -> list[list[float]]:
    """For each stage the mean loss over ranks at each step."""
    stages = []
    for stage in range(4):
        torch.manual_seed(0)
        engine, *_ = deepspeed.initialize(model=GPT(64, 4, 4, 64).to(dtype), config={
            "train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
            "zero_optimization": {"stage": stage}})
        losses = []
        for step in range(steps):
            loss = loss_of(engine, text_windows(step, 8, 64)[dist.get_rank()::dist.get_world_size()])
            engine.backward(loss)
            engine.step()
            losses.append(float(mean_over_ranks(loss)))
        engine.destroy()
        stages.append(losses)
    return stages


def plain_losses(steps: int, dtype: torch.dtype) -> list[float]:
    """The same training in plain PyTorch, in one process on the whole batch."""
    torch.manual_seed(0)
    model = GPT(64, 4, 4, 64).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for step in range(steps):
        loss = loss_of(model, text_windows(step, 8, 64))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same_losses(steps: int = 100) -> Figure:
    """Five loss curves on top of each other, ever thinner; below, how far the stages have been from plain PyTorch."""
    figure = new_figure(6.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for dtype, name, colour in ((torch.float32, "float32", RED), (torch.float64, "float64", BLUE)):
        (plain,), stages = on_ranks(plain_losses, 1, steps, dtype), on_ranks(losses_of_all_stages, 2, steps, dtype)[0]
        apart = [max(abs(loss - expected) for loss in losses) for expected, *losses in zip(plain, *stages)]
        lower.plot([max(1e-17, most) for most in accumulate(apart, max)], color=colour, drawstyle="steps-post",
                   label=f"{name}: {max(apart):.0e}")
        if dtype == torch.float32:
            curves = [plain, *stages]
    names = {"plain PyTorch": PALE, "stage 0": ORANGE, "stage 1": SKY, "stage 2": RED, "stage 3": BLACK}
    for width, (name, colour), losses in zip((20, 13, 8, 4, 1.2), names.items(), curves):
        upper.plot(losses, color=colour, linewidth=width, solid_capstyle="butt", label=name)
    upper.set_ylabel("loss")
    upper.legend(frameon=False, labelspacing=0.4)
    lower.set_yscale("log")
    lower.set(ylabel="largest\ndifference", xlabel="step", ylim=(1e-17, 1e2), yticks=[1e-15, 1e-10, 1e-5, 1])
    lower.minorticks_off()
    lower.grid(axis="y", color=PALE)
    lower.legend(frameon=False, ncols=2, loc="upper center", handlelength=1.2, columnspacing=1.2)
    return figure


# --- Command line -----------------------------------------------------------------------------------------------------


FIGURES: dict[str, Callable[[], Figure]] = {f.__name__: f for f in (
    schedules, holdings, collectives, bucket, timeline, unit_life, step_memory, loss_scale, recompute, same_losses)}


def write(figure: Figure, path: Path) -> int:
    """Save a figure; its size in bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    width, height = figure.get_size_inches()
    sheet = Bbox.from_extents(-MARGIN, -MARGIN, width + MARGIN, height + MARGIN)
    figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata=metadata, bbox_inches=sheet)
    data = buffer.getvalue()
    if path.suffix == ".svg":
        data = compact(data.decode()).encode()
    path.write_bytes(data)
    return len(data)


def compact(svg: str) -> str:
    """The same picture in half the bytes: paths to a tenth of a point, in one line each."""
    def rounded(path: re.Match) -> str:
        numbers = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), path[0])
        return " ".join(numbers.split())

    return re.sub(r"\n +", "\n", re.sub(r'(?<= d=")[^"]*', rounded, svg))


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="Make the course's pictures from real runs of this project's code.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "tutorials" / "figures", metavar="DIR",
                        help="the folder to write to (default: tutorials/figures)")
    parser.add_argument("--format", choices=["svg", "png"], default="svg", help="default: svg")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in FIGURES]
    if unknown:
        parser.error(f"the figure is {unknown[0]!r}; allowed: {', '.join(FIGURES)}")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.names or FIGURES:
        path = options.output / f"{name}.{options.format}"
        with matplotlib.rc_context(STYLE):
            size = write(FIGURES[name](), path)
        print(f"wrote {path}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
