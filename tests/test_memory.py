"""What it costs: memory and traffic, estimated and measured; offload; and what a GPU would be asked to do.

    .venv/bin/python -m pytest -q tests/test_memory.py
    .venv/bin/python -m pytest -q tests/test_memory.py --long     every stage and number of ranks of the ZeRO paper
"""

import copy
import ctypes
import gc
import json
import os
import re
import shutil
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  knows the backend "fake"
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine as deepspeed
import train_gpt
import zero
from conftest import DEADLINE, ROOT, memory, on_ranks
from oracle import STAGES, Mlp, Model, Pair, assert_equal, chain, draws, fitting, read_drawn, square, start, \
    start_drawn, train_drawn

COUNT = 64 * 64 * 12 * 20  # parameters, of which none is padding at any number of ranks below
CPU, NVME, BF16 = {"device": "cpu"}, {"device": "nvme", "nvme_path": "."}, {"bf16": {"enabled": True}}
CONFIGS: dict[str, dict[str, Any]] = {
    "fp32": {}, "bf16": BF16 | {"data_types": {"grad_accum_dtype": "bf16"}}, "bf16-fp32": BF16}
PAPER_GB = {1: [120, 52.5, 35.6, 31.4, 30.4, 30.1], 2: [120, 41.3, 21.6, 16.6, 15.4, 15.1],
            3: [120, 30, 7.5, 1.88, 0.47, 0.12]}  # arXiv 1910.02054: 7.5 B parameters, at the ranks of RANKS


def config_of(stage: int, precision: str, **section: Any) -> dict[str, Any]:
    return {**CONFIGS[precision], "zero_optimization": {"stage": stage, **section}}


RANKS = (1, 4, 16, 64, 256, 1024)
PAPERS = zero.Dtypes(torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16)  # gradients in 16 bits
TABLE: dict[str, list[Callable[[int], float]]] = {  # bytes per parameter with N ranks, by stage; N = 1 is stage 0
    "fp32": [lambda n: 16, lambda n: 8 + 8 / n, lambda n: 4 + 12 / n, lambda n: 16 / n],
    "bf16": [lambda n: 16, lambda n: 4 + 12 / n, lambda n: 2 + 14 / n, lambda n: 14 / n],
    "bf16-fp32": [lambda n: 18, lambda n: 6 + 12 / n, lambda n: 2 + 16 / n, lambda n: 16 / n]}
STATES = ("parameters", "gradients", "masters", "optimizer_state")


def states_of(held: zero.Estimate) -> int:
    return sum(held.bytes(name, "device") for name in STATES)


# --- The estimate against its table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", CONFIGS)
@pytest.mark.parametrize("stage", STAGES)
def test_bytes_per_parameter_are_those_of_the_table(stage, precision):
    for ranks in (1, 3, 64):
        held = deepspeed.estimate(COUNT, config_of(stage, precision), ranks)
        expected = TABLE[precision][stage if ranks > 1 else 0](ranks) * COUNT
        assert states_of(held) == pytest.approx(expected, rel=1e-12), f"{ranks} ranks: {held}"


@pytest.mark.parametrize("stage", STAGES)
def test_traffic_is_that_of_the_table(stage):
    """Elements and calls per rank and step, with m micro-batches of four blocks, each a bucket."""
    for ranks, m in ((1, 1), (2, 1), (3, 4), (4, 2), (64, 5)):
        config = {"gradient_accumulation_steps": m, **config_of(stage, "bf16", reduce_bucket_size=COUNT // 4)}
        traffic = deepspeed.estimate((COUNT, COUNT // 4), config, ranks).traffic
        rounds = {0: {"all-reduce": 2}, 1: {"reduce-scatter": 1, "all-gather": 1},
                  2: {"reduce-scatter": m, "all-gather": 1}, 3: {"reduce-scatter": m, "all-gather": 2 * m}}[stage]
        padded = 4 * -(-COUNT // 4 // (64 * ranks)) * 64 * ranks
        expected = {kind: (4 * times // (2 if kind == "all-reduce" else 1), times * padded * (ranks - 1) // ranks)
                    for kind, times in rounds.items()}
        assert {kind: (t.calls, t.elements) for kind, t in traffic.items()} == (expected if ranks > 1 else {}), ranks


@pytest.mark.parametrize("stage, precision, section, ranks, device, cpu, nvme", [
    (2, "bf16-fp32", {"offload_optimizer": CPU}, 4, 2, 16 / 4, 0),
    (3, "bf16-fp32", {"offload_optimizer": NVME, "offload_param": CPU}, 4, 0, 6 / 4, 12 / 4),  # gradients: in memory
    (3, "bf16-fp32", {"offload_optimizer": CPU, "offload_param": CPU}, 4, 0, 18 / 4, 0),  # and a small shard to send up
    (3, "fp32", {"offload_optimizer": CPU, "offload_param": CPU}, 4, 0, 16 / 4, 0),       # the shard is the master
    (1, "fp32", {"offload_optimizer": CPU}, 1, 4, 16, 0)])
def test_offload_moves_what_the_optimizer_works_on_and_shards_of_parameters(
        stage, precision, section, ranks, device, cpu, nvme):
    """In bytes per parameter."""
    held = deepspeed.estimate(COUNT, config_of(stage, precision, **section), ranks)
    assert [states_of(held), held.bytes(place="cpu"), held.bytes(place="nvme")] == [
        each * COUNT for each in (device, cpu, nvme)]


def test_an_estimate_takes_what_a_config_and_an_optimizer_mean():
    bf16, dtypes = config_of(2, "bf16"), PAPERS
    sizes = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, **bf16}
    assert deepspeed.estimate(COUNT, sizes, 4) == deepspeed.estimate(COUNT, bf16, 4, micro_batches=3)
    assert deepspeed.estimate(COUNT, sizes, 4) != deepspeed.estimate(COUNT, bf16, 4)
    assert zero.estimate(COUNT, zero.ZeroConfig(stage=2), 4, dtypes=dtypes) == deepspeed.estimate(COUNT, bf16, 4)
    assert zero.estimate(COUNT).bytes() == 16 * COUNT
    config = zero.ZeroConfig(stage=2, offload_optimizer=zero.OffloadOptimizer(device="cpu"))
    assert zero.estimate(COUNT, config, 4).bytes(place="cpu") == 16 * COUNT // 4
    for tensors in (0, 1, 2):
        held = deepspeed.estimate(COUNT, config_of(1, "bf16"), 4, state_tensors=tensors)
        assert held.bytes("optimizer_state") == tensors * COUNT
    half = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}, "reduce_bucket_size": COUNT // 4}  # of four buckets
    held = deepspeed.estimate((COUNT, COUNT // 4), config_of(1, "bf16-fp32", **half), 4)
    for category, size in (("optimizer_state", 2 * COUNT), ("masters", COUNT)):
        assert [held.bytes(category, place) for place in zero.PLACES] == [size // 2, size // 2, 0]
    few, many = (zero.estimate(chain_of(layers), zero.ZeroConfig(stage=3), 4).bytes("live") for layers in (40, 140))
    assert few == many, "two blocks at a time, however many there are"
    frozen = zero.estimate(nn.Linear(8, 8).requires_grad_(False), zero.ZeroConfig(stage=3), 2)
    assert frozen.bytes("masters") == 0 < frozen.bytes("parameters")
    text = str(deepspeed.estimate((COUNT, COUNT // 4), config_of(3, "bf16", offload_optimizer=CPU), 4))
    for word in (*zero.CATEGORIES, "device", "cpu", f"{COUNT:,}"):
        assert word.replace("_", " ") in text


def note_live(most: dict[str, int], state: zero.Zero, model: nn.Module) -> None:
    """Raise ``most`` to the bytes that are held now, by category, anywhere."""
    held: Counter = Counter()
    for (category, _), size in zero.measure(state, model).items():
        held[category] += size
    for name, size in held.items():
        most[name] = max(most.get(name, 0), size)


# --- Against engines that are alive -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """A GPT beside frozen layers, a buffer, and weights of awkward sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = train_gpt.GPT(16, 3, 2, 8)
        self.first, self.second = nn.Linear(7, 5), nn.Linear(8, 8, bias=False)
        self.first.requires_grad_(False)
        self.register_buffer("scale", torch.ones(11))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        loss = self.gpt(ids, targets)  # first: so gradients come in the reverse order of registration
        x = self.second(self.scale[:8].expand(2, 8).to(self.second.weight.dtype))
        return loss + x.sum() + self.first(x[:, :7]).sum()


class Tangled(Odd):
    """With a block under two names, tied weights, no elements, and what can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.lock = nn.ModuleList(self.gpt.blocks[:1]), threading.Lock()
        self.tied, self.empty = nn.Linear(8, 8, bias=False), nn.Parameter(torch.empty(0, 3))
        self.tied.weight = self.second.weight
        self.seen = self.second.weight * 2

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return super().forward(ids, targets) + self.tied(self.scale[:8].to(self.tied.weight.dtype)).sum()


class Whole(torch.optim.AdamW):
    """An optimizer that may need whole parameters, as far as can be known."""


def muon(groups: list[dict], lr: float) -> deepspeed.Muon:
    """Keeps one tensor for each hidden matrix, and two for what is AdamW's."""
    return deepspeed.Muon(deepspeed.muon_groups(groups), lr=lr)


SGD, ADAM = partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW
ALIVE = [  # ranks, stage, precision, section, micro-batches, model, how many param groups, optimizer
    *((ranks, stage, *(("fp32", {}, 1), ("bf16", {}, 1), ("bf16", {}, 3), ("bf16-fp32", {}, 1))[
        (stage + 2 * ranks) % 4], Odd, 1, ADAM) for ranks in (1, 2, 3) for stage in STAGES),
    (2, 1, "bf16", {"offload_optimizer": CPU}, 2, Odd, 1, SGD),
    (1, 0, "fp32", {"offload_optimizer": NVME}, 2, Odd, 1, SGD),
    (2, 3, "bf16-fp32", {"offload_optimizer": NVME, "offload_param": CPU}, 2, Odd, 1, SGD),
    (1, 3, "bf16-fp32", {"offload_optimizer": CPU, "offload_param": CPU}, 2, Odd, 1, SGD),
    (2, 3, "fp32", {"offload_param": NVME}, 2, Odd, 1, SGD),
    *((2, stage, "bf16", section, 2, model, groups, kind)
      for stage in (3, 0, 1, 2) for section, model, groups, kind in (
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, Odd, 2, ADAM), ({}, Odd, 2, muon),
        ({}, Tangled, 1, torch.optim.SGD), ({}, Odd, 2, Whole)))]


@pytest.mark.parametrize("ranks, stage, precision, section, steps, model, groups, kind", [
    pytest.param(*case, marks=[pytest.mark.long] if index > 20 else []) for index, case in enumerate(ALIVE)])
@on_ranks()
def test_an_engine_holds_and_sends_what_was_estimated_to_the_byte(
        ranks, stage, precision, section, steps, model, groups, kind, tmp_path):
    """At most at any time in a window, and by its memory report. Live, what comes and goes, may be less."""
    torch.manual_seed(0)
    section = {key: value | ({"nvme_path": str(tmp_path)} if "nvme_path" in value else {})
               for key, value in section.items()}
    model, offloads, most = model(), bool(section), {}
    parts = [[p for p in model.parameters() if (p.dim() > 1) == matrix or groups == 1] for matrix in (True, False)]
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": steps, **config_of(
        stage, precision, reduce_bucket_size=1000, stage3_param_persistence_threshold=20, **section)}
    before = deepspeed.estimate(model, config, ranks, rank=dist.get_rank()) if kind is ADAM and groups == 1 else None
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=kind([{"params": part} for part in parts[:groups]], lr=0.01), config=config)

    def watch(*_: Any) -> None:
        note_live(most, engine.zero, engine.module)

    for module in model.modules() if not offloads else ():
        module.register_forward_hook(watch)
    launch = engine.zero.reducer.launch
    engine.zero.reducer.launch = lambda gradients: (launch(gradients), watch())
    for micro_batch in range(2 * steps):
        if micro_batch == steps:
            engine.zero.communicator.traffic.clear()
        ids = torch.randint(0, 256, (2, 8))
        engine.backward(engine(ids, ids))
        if micro_batch == 2 * steps - 1:  # gradients are complete, and there is state from the window before
            report = engine.memory_report()
        for act in (watch, engine.step, watch):
            act()
    measured, estimated = report.measured, report.held
    for key in estimated.keys() | {key for key, size in measured.items() if size}:
        fits = measured.get(key, 0) <= estimated[key] if key[0] == "live" else \
            measured.get(key, 0) == estimated.get(key, 0)
        assert fits, f"{key}: {measured.get(key, 0)}, estimated {estimated.get(key, 0)}\n{report}"
    if before is not None and not offloads:
        for name in ("parameters", "gradients", "masters", "optimizer_state", "buffers"):
            assert most[name] == before.bytes(name), name
        assert before.bytes("live") / 3 <= most["live"] <= before.bytes("live")
        sent = {kind: vars(record) for kind, record in engine.zero.communicator.traffic.items() if kind != "scalars"}
        assert sent == {kind: vars(record) for kind, record in before.traffic.items()}
        assert before == zero.estimate(
            engine.module, engine.config.zero_optimization, ranks, dtypes=engine.precision.path, micro_batches=steps,
            groups=zero.groups_to_estimate(engine.zero), rank=dist.get_rank()), "it changes once the engine is there"
    engine.destroy()


def test_an_estimate_leaves_no_trace():
    """Nor does it matter where it is called."""
    gc.collect()  # what other tests have left
    config, model = config_of(3, "bf16"), Tangled()
    places, state, values = set(zero._SLOTS), torch.get_rng_state(), copy.copy(vars(model))
    expected = deepspeed.estimate(model, config, 4)
    for context in (torch.no_grad, torch.inference_mode, torch.autograd.graph.save_on_cpu,
                    lambda: torch.device("meta"), lambda: torch.autocast("cpu")):
        with context():
            assert deepspeed.estimate(model, config, 4) == expected
    assert torch.equal(torch.get_rng_state(), state) and vars(model) == values and set(zero._SLOTS) == places
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())


# --- One simulated rank of many ---------------------------------------------------------------------------------------
# One process takes the place of one rank of N and runs the real code: the rehearsal of ``zero.estimate``, with a real
# model in the stand-in's place. Tensors are on the meta device: they have a shape and a storage of so many bytes, but
# no memory; collectives are counted, and nothing is sent.


class Size(NamedTuple):
    """A GPT's shape."""
    dim: int
    layers: int
    heads: int


SIZES = {"7.5B": Size(4224, 35, 33), "128B": Size(11264, 84, 88), "1T": Size(25600, 127, 200)}
META, BUCKET = torch.device("meta"), 2**25  # elements; what reduce_bucket_size "auto" means on a GPU for a large model


def shard(model: nn.Module, config: zero.ZeroConfig, dtypes: zero.Dtypes, world_size: int) -> zero.RehearsedZero:
    """The model, which is on the meta device, under ZeRO with AdamW: the rank in the middle."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    return zero.RehearsedZero(model, optimizer, config, META, lambda parameter: dtypes,
                              communicator=zero.Rehearsal(world_size, world_size // 2))


def gpt(size: Size) -> train_gpt.GPT:
    """A GPT without memory."""
    with META:
        return train_gpt.GPT(*size, context=1024)


def step(model: nn.Module, state: zero.Zero) -> None:
    """One optimizer step of one micro-batch of 8 tokens."""
    ids = torch.zeros(1, 8, dtype=torch.int64, device=META)
    model(ids, ids).backward()
    state.finish_backward()
    state.step(clip=1.0, divisor=state.divisor)


def measure(size: Size, stage: int, world_size: int, dtypes: zero.Dtypes) -> tuple[int, dict[str, int], int]:
    """Parameters; bytes at most in a step, by category; elements that a step sends."""
    model, most = gpt(size), {}
    state = shard(model, zero.ZeroConfig(stage=stage, reduce_bucket_size=BUCKET), dtypes, world_size)

    def watch(*_: Any) -> None:
        note_live(most, state, model)

    handle = state.optimizer.register_step_pre_hook(watch)
    step(model, state)
    watch()
    handle.remove()
    state.communicator.traffic.clear()
    step(model, state)
    most["live"] = max(most["live"], state.most)
    state.release()
    sent = sum(record.elements for record in state.communicator.traffic.values())
    return sum(p.numel() for p in model.parameters()), most, sent


@pytest.mark.parametrize("size, stage, ranks", [
    pytest.param(size, stage, ranks, marks=() if (size, stage, ranks) == ("7.5B", 3, 1024) else pytest.mark.long)
    for size in SIZES for stage in STAGES for ranks in RANKS])
def test_a_rank_of_a_large_model_holds_what_the_papers_table_says(size, stage, ranks):
    parameters, held, sent = measure(SIZES[size], stage, ranks, PAPERS)
    effective = stage if ranks > 1 else 0
    table, states = TABLE["bf16"][effective](ranks) * parameters, sum(held[name] for name in STATES)
    assert table <= states <= 1.01 * table
    if size == "7.5B":
        shard16 = 2 * 7.5e9 / ranks if effective == 3 else 0  # the paper counts it beside the masters
        paper = PAPER_GB[max(1, stage)][RANKS.index(ranks)] * 1e9 if stage else 120e9
        # 1 %, and half of the last digit that the paper prints
        assert states + shard16 == pytest.approx(paper, rel=0.01, abs=0.05e9 if paper > 2e9 else 0.005e9)
    estimated = zero.estimate(gpt(SIZES[size]), zero.ZeroConfig(stage=stage, reduce_bucket_size=BUCKET), ranks,
                              dtypes=PAPERS)
    for name in zero.CATEGORIES:  # no estimate knows that norm2, registered before what follows it, begins a bucket early
        off = {"7.5B": 1.05}.get(size, 1.1) if name == "live" else 1
        assert held[name] / off <= estimated.bytes(name) <= off * held[name], name
    least = (0 if ranks == 1 else 3 if stage == 3 else 2) * parameters * (ranks - 1) / ranks
    assert least <= sent <= 1.01 * least, "elements sent"


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


def chain_of(layers: int) -> Model:
    """Blocks of two small layers: little work for the model, so that the work for its units shows."""
    return Model(lambda m, ids, targets: chain(m, m.token(ids)).sum(), token=nn.Embedding(16, 16), blocks=[
        nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(layers)])


def work_of(layers: int, world_size: int, config: zero.ZeroConfig) -> dict[str, float]:
    """Lines of zero.py that one rank runs for a chain of so many blocks: for set-up, and for the second step."""
    with META:
        model = chain_of(layers)
    made: list[zero.Zero] = []
    work = {"set-up": lines_run(lambda: made.append(shard(model, config, PAPERS, world_size)))}
    made[0].communicator.watch = lambda: None  # no engine does that
    step(model, made[0])
    work["step"] = lines_run(lambda: step(model, made[0]))
    made[0].release()
    return work


@pytest.mark.parametrize("section", [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 3, "overlap_comm": False}])
def test_work_grows_no_faster_than_the_units(section, is_long):
    """From 8 blocks to 24; with --long, from 12 to 48."""
    config, (layers, most) = zero.ZeroConfig(reduce_bucket_size=512, **section), (12, 48) if is_long else (8, 24)
    few, many, ranks = (work_of(*case, config) for case in ((layers, 4), (most, 4), (layers, 1024)))
    for phase in few:
        per_unit = [few[phase] / (layers + 1), many[phase] / (most + 1)]
        assert per_unit[1] <= 1.05 * per_unit[0], f"{phase}: lines of zero.py per unit with {layers}, {most} blocks"
        assert ranks[phase] <= 1.05 * few[phase], f"{phase}: lines with 1024 ranks and with 4"


# --- DeepSpeed's functions and the command line -----------------------------------------------------------------------


def test_deepspeeds_functions_print_the_table_of_their_stage(capsys):
    model, counts = nn.Sequential(nn.Linear(1000, 3000), nn.Linear(3000, 5000)), (2851 * 10**6, 32 * 10**6)
    for stage, what, ranks, call in (
            (2, model, 8, lambda: zero.estimate_zero2_model_states_mem_needs_all_live(
                model, num_gpus_per_node=4, num_nodes=2)),
            (3, model, 8, lambda: zero.estimate_zero3_model_states_mem_needs_all_live(
                model, 4, 2, additional_buffer_factor=1.0)),
            (2, counts[0], 16, lambda: zero.estimate_zero2_model_states_mem_needs_all_cold(
                total_params=2851e6, num_gpus_per_node=8, num_nodes=2)),
            (3, counts, 16, lambda: zero.estimate_zero3_model_states_mem_needs_all_cold(
                2851e6, 32e6, num_gpus_per_node=8, num_nodes=2))):
        call()
        assert capsys.readouterr().out == str(deepspeed.estimate(what, config_of(stage, "bf16-fp32"), ranks)) + "\n"


def test_the_command_line_prints_the_papers_table_and_draws_it(capsys, tmp_path):
    picture = tmp_path / "memory.png"
    world = [str(ranks) for ranks in RANKS[::4]]
    assert deepspeed.main(["estimate", "--params", "7.5e9", "--world", *world, "--plot", str(picture)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert picture.read_bytes().startswith(b"\x89PNG")
    for index, ranks in zip((0, 4), world):
        row = next(row for row in rows if row[:1] == [ranks])
        printed, fitting = [float(figure) for figure in row[1::2]], [gpu.removeprefix("/") for gpu in row[2::2]]
        assert all(size <= int(gpu) for size, gpu in zip(printed, fitting))
        shard16 = 15 / int(ranks) if ranks != "1" else 0
        for stage, expected in enumerate([120, *(PAPER_GB[stage][index] for stage in (1, 2, 3))]):
            assert printed[stage] + (shard16 if stage == 3 else 0) == pytest.approx(expected, rel=0.01, abs=0.01)


def test_the_command_line_takes_a_config_and_the_largest_unit(capsys, caplog, tmp_path):
    """All that the config offloads counts at the stages that can offload it, whatever stage it names."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 8, "fp16": {"enabled": True}, "zero_optimization": {
        "stage": 1, "offload_optimizer": CPU, "offload_param": CPU}}))
    assert deepspeed.main(["estimate", "--params", "1e9", "--world", "4", "--config", str(path),
                           "--largest-unit", "1e8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "float16" in lines[0]
    tables = {line.split("  ")[0]: lines[index + 1].split() for index, line in enumerate(lines) if "stage 0" in line}
    assert tables["ranks, device"] == ["4", "2.00", "/24", "2.00", "/24", "2.00", "/24", "0", "/24"]
    assert tables["ranks, cpu"] == ["4", "16.00", "4.00", "4.00", "4.50"] and "no effect" not in caplog.text
    # Where a unit's backward ends, three are whole, in 16 bits; there are two gradients in 32, and where one lands.
    assert tables["units in use"][4] == "1.50"
    assert deepspeed.main(["estimate", "--params", "5e10", "--world", "1"]) == 0
    text = capsys.readouterr().out
    assert "give --largest-unit" in text and "units in use   " not in text, "what is not known has no figure"
    assert " /-" in text and " 0.00" not in text


@pytest.mark.parametrize("arguments, told", [
    (["--params", "many", "--world", "4"], "--params is 'many'"), (["--params", "7.5", "--world", "4"], "'7.5'"),
    (["--params", "5", "--world", "0"], "--world is '0'"),
    (["--params", "5", "--world", "2", "--largest-unit", "6"], "6 parameters"),
    (["--params", "5", "--world", "2", "--config", "/nowhere.json"], "/nowhere.json"),
    (["--params", "5", "--world", "2", "--config", '{"stag": 1}'], "stag"),  # which test_config.py has more of
    (["--params", "5", "--world", "2", "--config", '{"stage": 4}'], "zero_optimization.stage is 4"),
    (["--params", "5", "--world", "2", "--plot", "/nowhere/memory.png"], "/nowhere/memory.png")])
def test_a_command_line_that_cant_be_meant_is_one_line_and_exit_code_2(arguments, told, capsys, tmp_path):
    config, section = tmp_path / "ds.json", arguments[-1]
    config.write_text(f'{{"zero_optimization": {section}}}')
    assert deepspeed.main(["estimate", *arguments[:-1], str(config) if section[0] == "{" else section]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize("call, told", [
    (lambda: zero.estimate(COUNT, None, 0), "world_size is 0"),
    (lambda: zero.estimate(COUNT, None, 1.5), "world_size is 1.5"),
    (lambda: zero.estimate(COUNT, None, 2, rank=2), "rank is 2; .*world_size, which is 2"),
    (lambda: zero.estimate(-1), "model_or_counts is -1"), (lambda: zero.estimate(True), "model_or_counts is True"),
    (lambda: zero.estimate(7.5e9), "model_or_counts is 7500000000.0"),
    (lambda: zero.estimate({"model": 5}), "model_or_counts is {'model': 5}"),
    (lambda: zero.estimate((5, 6)), "the largest unit has 6 parameters, of 5"),
    (lambda: zero.estimate(nn.Linear(2, 2), groups=[{"params": [nn.Parameter(torch.zeros(3))]}]), "groups has .*.3,."),
    (lambda: zero.estimate(COUNT, {"zero_optimization": {}}), "config is a dict.*engine.estimate"),
    (lambda: zero.estimate(COUNT).bytes(place="gpu"), "place is 'gpu'")])
def test_arguments_that_cant_be_meant_are_errors(call, told):
    with pytest.raises(ValueError, match=told):
        call()


# --- No more after many steps than after a few ------------------------------------------------------------------------


@on_ranks(2, stage=[0, 2, 3])
def test_steps_leave_nothing_behind(stage):
    """No Python objects, with a forward pass that is not followed by backward in each step."""
    engine = start(Mlp().float(), stage, **({"activation_checkpointing": {}} if stage == 2 else {}))

    def run(steps: int) -> Counter:
        for _ in range(steps):
            engine(torch.randn(2, 3, 8, requires_grad=True))
            engine.backward(square(engine, torch.randn(2, 3, 8)).exp())
            engine.step()
        gc.collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects())

    run(4)
    before = run(1)
    left = run(25) - before
    assert left.total() < 25, f"left after 25 steps: {left.most_common(5)}"


def peaks(stage: int, steps: tuple[int, ...], exact: bool) -> list[int]:
    """The most bytes that this process has had until each of ``steps``; ``exact``: what is freed goes back at once."""
    def width(k: int) -> int:
        return 256 + 64 * (k % 3)

    def block(width: int) -> Model:
        return Model(lambda m, x: x + m.down(torch.relu(m.up(x))), up=nn.Linear(width, 4 * width),
                     down=nn.Linear(4 * width, width))

    if exact:
        assert ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD of <malloc.h>: no hole stays
    model = nn.Sequential(*(nn.Linear(width(k - 1), width(k + 1)) if k % 2 else block(width(k)) for k in range(12)))
    with mock.patch.object(zero, "_keep_memory_that_is_freed") if exact else nullcontext():  # it sets other thresholds
        engine, *_ = deepspeed.initialize(model=model, config={
            "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 300000}})
    found = []
    for step in range(1, steps[-1] + 1):
        engine.backward(engine(torch.randn(4, 256)).square().mean())
        engine.step()
        if step in steps:
            found.append(memory("VmHWM"))
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory with Linux's /proc")
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_the_peak_does_not_grow_with_the_steps(fresh_ranks, stage, is_long):
    """What is in use: at most 0.5 %. With the holes between it, which grow until the allocator has settled: 2 %."""
    for exact, steps, most in (True, (8, 50 if is_long else 24), 1.005), (False, (10, 50 if is_long else 30), 1.02):
        fresh_ranks.stop()
        for rank, (early, late) in enumerate(fresh_ranks(peaks, 2, stage, steps, exact)):
            assert late <= most * early, f"stage {stage}, rank {rank}, exact {exact}: {early / 2**20:.1f} MiB after " \
                f"{steps[0]} steps grew to {late / 2**20:.1f} after {steps[1]}"


# --- Offload: the same numbers, and the memory really goes elsewhere --------------------------------------------------


def placed(offload: dict, folder: Path | str) -> dict:
    """The sections of ``offload``, each with a folder for files."""
    return {key: {**section, "nvme_path": str(folder)} for key, section in offload.items()}


def check_places(state: zero.Zero, offload: dict) -> None:
    """What the config sends to files is in files."""
    for bucket in state.buckets:
        if offload.get("offload_optimizer", {}).get("device") == "nvme" and bucket.host is not None:
            kept = [bucket.master, *(value for piece in bucket.pieces for value in state.optimizer.state[piece].values()
                                     if isinstance(value, torch.Tensor) and value.dim())]
            assert all(t.untyped_storage().filename for t in kept if t.numel()), f"{bucket.slots[0].name}: in memory"
        if offload.get("offload_param", {}).get("device") == "nvme" and bucket.unit is not None:
            assert bucket.shard.untyped_storage().filename, f"{bucket.slots[0].name}: the shard is in memory"


def same_with_and_without(draw: dict, stage: int, offload: dict, folder: Path) -> None:
    """Norms, weights and optimizer state, bit for bit; nothing is left in the folder."""
    results = []
    for sections in ({}, offload):
        engine = start_drawn(draw | {"offload": placed(sections, folder)}, stage)
        results.append((train_drawn(engine, draw, 3), *read_drawn(engine, draw)))
        check_places(engine.zero, sections)
        engine.destroy()
        assert not os.listdir(folder), f"left in the folder: {os.listdir(folder)}"
    # One process has units only with offloaded parameters; the norm is then added up unit by unit, in another order.
    regrouped = dist.get_world_size() == 1 and offload.get("offload_param", {"device": "none"})["device"] != "none"
    assert_equal(results[1], results[0], 2e-6 if regrouped else 0, f"{draw} with {offload}")


DEVICES = st.sampled_from(["nvme", "cpu", "none"])
OFFLOADS = st.tuples(st.sampled_from([3, 0, 1, 2, 3]), DEVICES, st.sampled_from([1.0, 0.5]), DEVICES)


@given(draws(), OFFLOADS, st.booleans(), st.sampled_from([2, 1, 3]))
@settings(max_examples=max(10, settings().max_examples // 3), phases=[Phase.generate])
def test_offload_changes_no_number(run_ranks, tmp_path_factory, draw, offload, bf16, ranks):
    stage, device, ratio, of_parameters = offload
    sections = {"offload_optimizer": {"device": device, "ratio": ratio}} | (
        {"offload_param": {"device": of_parameters}} if stage == 3 else {})
    draw |= {"dtype": torch.float32, "mixed": False, "more": BF16 | {"communication_data_type": "bf16"}} if bf16 else {}
    run_ranks(same_with_and_without, ranks, fitting(draw, ranks), stage, sections, tmp_path_factory.mktemp("files"))


@on_ranks(2, stage=[1, 3])
def test_a_checkpoint_goes_from_offload_to_none_and_back(stage, tmp_path):
    """Two steps, save, two more; the same from the checkpoint with another offload, or none."""
    reference, scratch = None, tmp_path / f"scratch_{dist.get_rank()}"
    scratch.mkdir()
    for device in ("nvme", "none", "cpu"):
        offload = {"offload_optimizer": {"device": device}}
        pair = Pair(Mlp, stage, partial(torch.optim.AdamW, lr=0.01), zero_options=placed(offload, scratch))
        if reference:
            pair.engine.load_checkpoint(tmp_path / "saved")
        for step in range(2 if reference else 0, 4):
            pair.backward(step)
            pair.engine.step()
            if not reference:
                pair.plain(step)
            if not reference and step == 1:
                pair.engine.save_checkpoint(tmp_path / "saved")
        reference = reference or pair.reference
        pair.reference = reference
        pair.check(device)
        check_places(pair.engine.zero, offload)
        pair.engine.destroy()


def refusal(section: dict, stage: int, free: int | None = None) -> str:
    """The error that initialize() gives on this rank; ``free`` is how much room the disk says it has."""
    room = shutil.disk_usage(".")
    with mock.patch.object(shutil, "disk_usage", lambda path: room if free is None else room._replace(free=free)):
        try:
            start(Mlp().float(), stage, None, section, optimizer={"type": "AdamW", "params": {"lr": 0.01}})
        except ValueError as error:
            return str(error)
    return "no error"


@on_ranks(2)
def test_a_folder_that_is_missing_or_full_is_refused_with_the_bytes_it_needs(tmp_path):
    count = sum(p.numel() for p in Mlp().parameters())
    place = {"device": "nvme", "nvme_path": "/no/such/folder"}
    for stage, needed in ((0, 12 * count), (2, 6 * count)):  # fp32 masters and Adam's two moments
        told = refusal({"offload_optimizer": place}, stage)
        assert "offload_optimizer.nvme_path is '/no/such/folder'" in told and f"{needed:,} bytes" in told, told
    place = {"device": "nvme", "nvme_path": str(tmp_path)}
    needed = 2 * (6 * count) + 2 * (2 * count)  # 2 ranks: each half of masters and moments, and of weights
    told = refusal({"offload_optimizer": place, "offload_param": place}, 3, needed - 1)
    assert f"{needed - 1:,} bytes" in told and f"{needed:,} for all ranks" in told, told
    assert refusal({"offload_optimizer": place, "offload_param": place}, 3, needed) == "no error"


@on_ranks(1)
def test_one_process_keeps_two_blocks_at_a_time_with_offloaded_parameters(tmp_path):
    pair = Pair(partial(Mlp, 8), 3, zero_options=placed({"offload_param": {"device": "nvme"}}, tmp_path))
    live = []

    def look(*_: object) -> None:
        live.append(sum(b.flat.untyped_storage().nbytes() for b in pair.engine.zero.buckets))

    look()
    pair.train(0)  # from now on the order of the blocks is known, and the next is gathered ahead
    for block in pair.model.blocks:
        block[0].register_forward_hook(look)
    pair.train(1)
    look()
    pair.check()
    block, *_ = {8 * unit.numel for unit in pair.engine.zero.units if unit.buckets}
    assert live[0] == live[-1] == 0 and max(live) == 2 * block, f"bytes of whole parameters: {live}"
    pair.engine.destroy()


def limited(device: str, folder: str) -> str:
    """Train with less memory than gradients and Adam's state take; what comes of it."""
    import resource  # not on Windows

    libc = ctypes.CDLL(None)  # holes that are free would count too: large tensors go back to the system
    assert libc.mallopt(-8, 1) and libc.mallopt(-3, 2**20)  # M_ARENA_MAX, M_MMAP_THRESHOLD of <malloc.h>
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))  # 96 MiB of fp32
    with mock.patch.object(zero, "_keep_memory_that_is_freed"):  # which sets other thresholds
        engine, *_ = deepspeed.initialize(model=model, config={
            "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": device, "nvme_path": folder}}})
    # From here on it may have, beside files: its gradients (96 MiB) and some buffers, but no Adam (192 more).
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + 270 * 2**20, -1))
    try:
        for _ in range(3):
            engine.backward(engine(torch.ones(1, 1024)).square().mean())
            engine.step()
    except (RuntimeError, MemoryError) as error:
        return str(error) or type(error).__name__
    return f"trained {engine.global_steps}"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits memory by Linux's RLIMIT_DATA")
def test_state_larger_than_the_memory_limit_trains_from_files_and_not_without(fresh_ranks, tmp_path):
    """RLIMIT_DATA bounds what a process holds in memory of its own; pages of files are the system's to evict."""
    assert fresh_ranks(limited, 1, "nvme", str(tmp_path)) == ["trained 3"]
    fresh_ranks.stop()
    (without,) = fresh_ranks(limited, 1, "cpu", str(tmp_path))
    assert re.search("can't allocate memory|MemoryError|not enough memory", without), without


# --- What a GPU would be asked to do ----------------------------------------------------------------------------------
# Device operations, and how often the host waits for it, counted without a GPU: a copy of the program takes the meta
# device for its GPU, as rank 0 of 8. Each copy between device and host that the host waits for counts, and so does each
# wait for a stream. Functions that run there import the copy themselves.


WORLD, LAYERS, WINDOW = 8, 4, 2
VIEWS = {"view", "as_strided", "slice", "detach", "alias", "t", "transpose", "permute", "expand", "unsqueeze", "select",
         "_unsafe_view", "split", "empty", "empty_like", "empty_strided", "set_", "unbind", "squeeze", "_reshape_alias"}


class Device(TorchDispatchMode):
    """The meta device in the place of a GPU: counts operations, and what the host waits for."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits = Counter(), Counter()
        self.message = lambda numel: [0.0] * numel  # what the host reads of a tensor in float64

    def wait(self, what):
        lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in traceback.extract_stack()
                 if Path(frame.filename).name in ("zero.py", "engine.py", "amp.py")]
        self.waits[f"{what} at {lines[-1] if lines else 'the test'}"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.wait("item")
            return 0.0
        if name == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            if not kwargs.get("non_blocking"):
                self.wait("copy to the host")
            numbers = self.message(args[0].numel()) if args[0].dtype == torch.float64 else [0.0] * args[0].numel()
            return torch.tensor(numbers, dtype=kwargs.get("dtype") or args[0].dtype).view(args[0].shape)
        if name == "copy_" and args[0].is_meta != args[1].is_meta:
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                self.wait("copy between host and device")
            return args[0] if args[0].is_meta else args[0].zero_()
        result = function(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.operations[name] += name not in VIEWS and any(t.is_meta for t in tensors)
        if name == "_to_copy" and result.is_meta != args[0].is_meta and not kwargs.get("non_blocking"):
            self.wait("copy to the device")
        return result


groups: list[int] = []  # the process groups that were made and not ended


class Work:
    """A collective, stream or event that never has anything to wait for."""

    def __init__(self, *args, **kwargs):
        pass

    def wait(self, *args):
        pass

    wait_stream = wait_event = record = wait

    def record_event(self, *args):
        return Work()

    def synchronize(self):
        device.wait("synchronize")


pinned: dict[int, int] = {}  # bytes by address


class Runtime:
    """The part of CUDA's runtime that pins memory."""

    @staticmethod
    def cudaHostRegister(address, size, flags):
        assert size and address % 4096 == size % 4096 == flags == 0, "not in whole pages"
        assert address not in pinned, "pinned twice"
        pinned[address] = size

    @staticmethod
    def cudaHostUnregister(address):
        del pinned[address]


def on_device(*tensors):
    assert all(tensor.is_meta for tensor in tensors), "a host tensor in a collective of the device"
    return Work()


def pretend(zero):
    """A process group of 8 on the meta device, and CUDA's names for it."""
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=dist.HashStore())
    for name in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor"):
        setattr(dist, name, lambda output, given, group=None, async_op=False: on_device(output, given))
    dist.all_reduce = dist.broadcast = lambda tensor, *args, **kwargs: on_device(tensor)
    dist.new_group = lambda *args, **kwargs: groups.append(len(groups)) or groups[-1]
    dist.destroy_process_group = lambda group=None: groups.remove(group)
    zero.gather = lambda value, group=None: [value] * WORLD
    zero.own_device = lambda local_rank: torch.device("meta")
    zero.start_process_group = lambda *args, **kwargs: False
    zero.Logbook = mock.MagicMock()
    torch.cuda.Stream = torch.cuda.Event = Work
    torch.cuda.current_stream, torch.cuda.stream = Work, lambda stream: nullcontext()
    torch.cuda.cudart, torch.cuda.check_error, torch.cuda.synchronize = Runtime, lambda code: None, lambda *args: None
    torch.Tensor.record_stream = lambda self, stream: None
    make = torch.tensor

    def tensor(*args, **kwargs):
        if torch.device(kwargs.get("device") or "cpu").type == "meta":
            device.wait("torch.tensor on the device")
        return make(*args, **kwargs)

    torch.tensor = tensor


def count_one(section: dict, options: dict) -> dict:
    """Operations of the last forward, backward and step of a window, and the host's waits in the whole window."""
    import engine as deepspeed
    import train_gpt
    import zero
    torch.manual_seed(0)
    model = train_gpt.GPT(32, LAYERS, 4, 8).to("meta")
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": WINDOW, "gradient_clipping": 0.5,
              "optimizer": {"type": "AdamW", "params": {"fused": True}}, **options,
              "zero_optimization": {"reduce_bucket_size": 6000, **section}}
    nothing = {"new": lambda *args, **kwargs: None}
    with (mock.patch.object(deepspeed, "_check_arguments", **nothing),  # it refuses a model on the meta device
          mock.patch("torch.optim.adam._device_dtype_check_for_fused", **nothing)):
        engine = deepspeed.initialize(model=model, config=config)[0]
        slots = sum(len(bucket.slots) for bucket in engine.zero.trained)
        device.message = lambda numel: [1.0] + [8.0] * slots + [0.0] * (numel - slots - 1)
        batch = torch.zeros(2, 8, dtype=torch.long, device="meta")
        for micro_batch in range(2 * WINDOW):
            if micro_batch == WINDOW:
                device.waits.clear()
            device.operations.clear()
            loss = engine(batch, batch)
            forward = device.operations.total()
            engine.backward(loss)
            backward = device.operations.total() - forward
            device.operations.clear()
            engine.step()
        most, waits, step = sum(pinned.values()), dict(device.waits), device.operations.total()
        device.waits.clear()
        assert all(t.device.type == "cpu" for *_, t in deepspeed._in_host_memory(zero.shares(engine.zero), META))
        engine.destroy()
        del engine, loss, model
        gc.collect()
    return {"waits": waits, "waits of a save": device.waits.total(), "forward": forward, "backward": backward,
            "step": step, "pinned": most, "pinned after": sum(pinned.values()), "groups left": len(groups)}


def plain() -> tuple[int, int]:
    """Operations of plain PyTorch's forward and backward."""
    import train_gpt
    model, batch = train_gpt.GPT(32, LAYERS, 4, 8).to("meta"), torch.zeros(2, 8, dtype=torch.long, device="meta")
    for _ in range(2):
        device.operations.clear()
        loss = model(batch, batch)
        forward = device.operations.total()
        loss.backward()
    return forward, device.operations.total() - forward


def load() -> list:
    """At each micro-batch that a loader gives: how many were copied to the device, and the place that is saved."""
    import engine as deepspeed
    loader = deepspeed.ShardedLoader(torch.arange(80), 2, torch.device("meta"), None, False)
    loader.num_local_io_workers = 1
    device.operations.clear()
    device.waits.clear()
    given = [(device.operations["_to_copy"], loader.state_dict()["samples"]) for batch in loader if batch.is_meta]
    return [given, dict(device.waits)]


def count_all(folder: Path) -> None:
    """In a process that has the program's own modules already: the same with those of ``folder``, for all CASES."""
    global device
    for name in ("zero", "engine", "amp", "checkpointing", "schedulers", "train_gpt"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    import engine  # before train_gpt puts the program's own folder first
    import zero
    assert all(module.__file__.startswith(str(folder)) for module in (engine, zero))
    gc.freeze()  # collecting garbage need not look through PyTorch's half a million objects each time
    device = Device()
    pretend(zero)
    with device:
        found = [plain(), [count_one(section, options) for section, options in CASES], load()]
    (folder / "counts.json").write_text(json.dumps(found))
    os._exit(0)


def copy_program(folder: Path) -> None:
    """The program with the meta device in the place of CUDA's."""
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        if path.name in ("zero.py", "engine.py"):
            assert 'device.type == "cuda"' in text
            text = text.replace('"meta" if device.type == "meta" else "cpu"', '"cpu"')  # the host of a real GPU
            text = text.replace('device.type == "cuda"', 'device.type == "meta"')
            text = text.replace('device.type != "cuda"', 'device.type != "meta"')
        (folder / path.name).write_text(text)


CASES = [({"stage": stage} | section, options) for stage, section, options in [
    (0, {}, {}), (1, {}, {}), (2, {}, {}), (3, {}, {}), (1, {}, BF16), (3, {}, BF16),
    (3, {}, {"fp16": {"enabled": True}}),
    (2, {"offload_optimizer": CPU}, BF16), (3, {"offload_optimizer": CPU}, BF16), (3, {"offload_param": CPU}, BF16),
    (3, {"offload_optimizer": CPU, "offload_param": CPU}, BF16), (2, {"offload_optimizer": CPU | {"ratio": 0.5}}, {})]]


@pytest.fixture(scope="module")
def counts(run_ranks, tmp_path_factory):
    """What plain PyTorch asks of the device, and what each of CASES does."""
    folder = tmp_path_factory.mktemp("program")
    copy_program(folder)
    process = run_ranks.context.Process(target=count_all, args=(folder,))
    process.start()
    process.join(DEADLINE)
    assert process.exitcode == 0
    return json.loads((folder / "counts.json").read_text())


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: json.dumps(CASES[case]))
def test_the_host_waits_once_a_step_and_few_operations_come_to_plain_pytorchs(counts, case):
    (forward, backward), found = counts[0], counts[1][case]
    offloads = "offload_optimizer" in CASES[case][0]
    waits = found["waits"]
    assert sum(waits.values()) <= (2 if offloads else 1), f"{CASES[case]}: the host waits for {waits}"
    for name, most, plain in ("forward", 1.55, forward), ("backward", 1.6, backward):
        assert found[name] <= most * plain, f"{CASES[case]}: {found[name]} operations in {name}, plain PyTorch {plain}"
    assert found["step"] <= 60, f"{CASES[case]}: {found['step']} operations in a step, four for each wave of updates"
    assert found["waits of a save"] == 1, f"{CASES[case]}: one for all that comes together"
    assert found["groups left"] == found["pinned after"] == 0
    assert (found["pinned"] > 0) == any(key.startswith("offload") for key in CASES[case][0])


def test_a_gpu_gets_the_next_micro_batch_beside_its_work_and_the_place_is_that_of_the_one_in_use(counts):
    assert counts[2] == [[[min(k + 1, 5), 16 * k] for k in range(1, 6)], {}]


@pytest.mark.parametrize("count, variables, expected", [
    (8, {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, 5),
    (1, {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, 0),  # check_gpus refuses what all see
    (4, {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none"}, "need as many GPUs; it has 4"),
])
def test_each_process_takes_its_own_gpu(count, variables, expected):
    """Also where each process is shown one alone."""
    names = "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"
    variables = {name: value for name, value in os.environ.items() if name not in names} | variables
    with mock.patch.dict(os.environ, variables, clear=True), mock.patch.multiple(
            torch.cuda, is_available=lambda: True, device_count=lambda: count, set_device=mock.DEFAULT) as patched:
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                zero.own_device(5)
        else:
            assert zero.own_device(5) == torch.device("cuda", expected)
            patched["set_device"].assert_called_once_with(expected)


@on_ranks(3)
def test_two_processes_on_one_gpu_are_refused_on_all_ranks_before_nccl_starts():
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    for name, gpus, told in (("two", "aab", "ranks 0, 1 all use the GPU a of"), ("none", "abc", None)):
        properties = mock.Mock(uuid=gpus[rank])
        with (mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
              pytest.raises(ValueError, match=told) if told else nullcontext()):
            zero.check_gpus(torch.device("cuda", 0), dist.PrefixStore(name, store), rank, 3)
