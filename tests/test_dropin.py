"""What a DeepSpeed script calls: each name works or says why not; and what is wrong is refused on every rank.

    .venv/bin/python -m pytest -q tests/test_dropin.py          60 drawn mistakes
    .venv/bin/python -m pytest -q tests/test_dropin.py --long   300

The tables of names in tutorials/coming_from_deepspeed.md are read by the tests, so that they can't rot. A drawn mistake
must raise on every rank an error that names the key or the argument, and leave nothing behind: the right call after it,
on the same model, trains what a fresh model trains.
"""

import argparse
import ast
import json
import logging
import random
import re
import string
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import timedelta
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader, TensorDataset

import engine as deepspeed
from conftest import ROOT
from engine import ConfigError

PAGE = "tutorials/coming_from_deepspeed.md"
SECTION = (ROOT / PAGE).read_text()
SIZES = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
CONFIG = SIZES | {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}


def make_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def inputs(index: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * index + rank)
    return torch.randn(2, 6, generator=generator)


def weights(model: nn.Module) -> torch.Tensor:
    """All of a model's weights, in one tensor, at any stage."""
    return torch.cat([deepspeed.zero.safe_get_full_fp32_param(p).reshape(-1) for p in model.parameters()])


@pytest.fixture
def alone():
    """An engine of this process alone, made from a config and other arguments; ended after the test."""
    engines = []

    def build(config: Any = CONFIG, **kwargs: Any) -> deepspeed.Engine:
        engines.append(deepspeed.initialize(**{"model": make_model(), "config": config} | kwargs)[0])
        return engines[-1]

    yield build
    for engine in engines:
        engine.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()


# --- The page's tables ------------------------------------------------------------------------------------------------


def rows(header: str) -> list[tuple[str, ...]]:
    """The cells of the page's table with this header."""
    lines = SECTION[SECTION.index(header):].splitlines()[2:]
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in lines[:end]]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_name_that_works_by_the_page_is_there(alone):
    engine = alone()
    checked = 0
    for where, cell in rows("| where | works |"):
        cell = re.sub(r"\([^)]*\)", "", cell)  # remarks
        if where == "command line":
            options = deepspeed.add_config_arguments(argparse.ArgumentParser()).format_help()
            assert all(name in options for name in names_in(cell))
            continue
        place: Any = engine if where.startswith("`engine.`") else deepspeed
        for part in names_in(where)[0].split(".")[1:-1]:
            place = getattr(place, part)
        for name in names_in(cell):
            assert hasattr(place, name), f"{where} {name} is not there"
            checked += 1
    assert checked > 80, "the table was not read"


def test_every_name_that_is_absent_by_the_page_says_so_and_names_the_page(alone):
    engine = alone()
    for cell, reason in rows("| names | reason |"):
        assert reason and names_in(cell)
        for pattern in names_in(cell):
            *parts, name = pattern.replace("*", "some").split(".")
            place: Any = deepspeed
            for part in parts:
                place = engine if part == "engine" else getattr(place, part)
            with pytest.raises(AttributeError) as caught:
                getattr(place, name)
            assert PAGE in str(caught.value) and name in str(caught.value), pattern


def test_every_key_that_is_refused_by_the_page_is_refused_and_may_be_off():
    keys = [name for _, cell in rows("| part | keys |") for name in names_in(cell)]
    assert set(keys) == deepspeed.NOT_HERE and len(keys) == len(set(keys))
    idle = re.search(r"warning that says why: (.*`)\.\n", SECTION, re.DOTALL)[1]
    assert set(names_in(idle)) == {".".join((*path, key)) for cls, path in sections()
                                   for key in getattr(cls, "NO_EFFECT", {}) if key not in {f.name for f in fields(cls)}}
    for key in [*keys, *names_in(idle)]:
        def section(value: Any) -> dict:
            outer, _, inner = key.rpartition(".")
            more = {"type": "Adam"} if outer == "optimizer" else {}
            return {outer: {inner: value} | more} if outer else {inner: value}

        for wrong in (True, {}, {"enabled": True}) if key in keys else ():
            with pytest.raises(ConfigError, match=f"^{key} .*take it out of the config"):
                deepspeed.load_config(section(wrong))
        for off in (False, None, {"enabled": False, "more": 3}) if key in keys else (False, None, {"enabled": True}, 3):
            assert deepspeed.load_config(section(off)) == deepspeed.load_config(section(None))


def test_a_misspelt_name_is_named(alone):
    engine = alone()
    for place, name in ((deepspeed, "initialise"), (deepspeed.utils, "loger"), (engine, "backwards")):
        with pytest.raises(AttributeError, match=f"attribute '{name}'"):
            getattr(place, name)


# --- The table of pains -----------------------------------------------------------------------------------------------


@cache
def functions_of(file: str) -> set[str]:
    """The top-level functions of a test file."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_table_of_pains_names_tests_that_exist():
    reference = (ROOT / "tutorials" / "reference.md").read_text()
    section = reference.split("## What goes wrong elsewhere\n")[1].split("\n## ")[0]
    groups = re.findall(r"^\| ([^|]+) \| what happens here \| test \|$", section, re.MULTILINE)
    assert groups == ["resuming", "numbers", "hangs", "messages"]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|") and "`" in line]
    assert len(rows) == len([line for line in section.splitlines() if line.startswith("|")]) - 2 * len(groups)
    for pain, behaviour, tests in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert pain.strip() and behaviour.strip() and named, f"{pain}: no test is named"
        assert len(named) == tests.count("`") // 2, f"{pain}: {tests} names something else than tests"
        for file, name in named:
            assert name in functions_of(file), f"{pain}: there is no {name} in {file}"


# --- What it needs ----------------------------------------------------------------------------------------------------


NOT_ON_WINDOWS = {"fcntl", "grp", "pwd", "pty", "resource", "termios", "tty"}


def imported(nodes) -> set[str]:
    """The modules that these statements import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_nothing_needs_a_compiler_a_gpu_or_one_operating_system():
    files = [*ROOT.glob("*.py"), *(ROOT / "tutorials").glob("*.py")]
    own = {file.stem for file in files}
    for file in files:
        tree = ast.parse(file.read_text())
        for name in imported(ast.walk(tree)):
            package = name.split(".")[0]
            assert package in sys.stdlib_module_names | own | {"torch", "numpy", "matplotlib"}, f"{file.name}: {name}"
            assert "cpp_extension" not in name, f"{file.name} imports {name}"
        assert not imported(tree.body) & NOT_ON_WINDOWS, f"{file.name} can't be imported on Windows"
    assert not [file for kind in ("c", "cpp", "cu", "so", "pyx") for file in ROOT.glob(f"*.{kind}")]


# --- Calls that scripts make ------------------------------------------------------------------------------------------


def test_a_script_with_deepspeeds_arguments(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(SIZES | {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}))
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    assert deepspeed.add_config_arguments(parser) is parser
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=77))
    try:
        model = make_model()
        engine, optimizer, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
        assert isinstance(engine, deepspeed.DeepSpeedEngine) and args.deepspeed
        assert deepspeed.comm.get_rank() == engine.global_rank == 0 and deepspeed.comm.get_local_rank() == 0
        assert engine.get_mom() == [(0.9, 0.999)] and engine.zero_optimization_stage() == 0
        engine.destroy()
        assert deepspeed.comm.is_initialized(), "what init_distributed() has started, destroy() leaves alone"
    finally:
        dist.destroy_process_group()


def group_timeout() -> timedelta:
    return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout


def test_the_timeout_reaches_the_process_group_that_is_started(alone, caplog):
    alone(CONFIG | {"timeout": 77.5})
    assert group_timeout() == timedelta(seconds=77.5)
    with caplog.at_level(logging.WARNING, "engine"):
        alone(CONFIG | {"timeout": 5})
    assert group_timeout() == timedelta(seconds=77.5)
    assert "the process group is there already, and keeps its own" in caplog.text


@pytest.mark.parametrize("kwargs, told", [
    ({"dist_backend": "glo"}, "dist_backend is 'glo'"), ({"dist_backend": 3}, "dist_backend is 3"),
    ({"timeout": 60}, "timeout is 60; allowed: a positive datetime.timedelta"),
    ({"timeout": timedelta(seconds=-1)}, "timeout is"), ({"config": {}}, "config is {}; allowed: None"),
    ({"rank": 0}, "rank is 0; allowed: .*-1"), ({"rank": 2, "world_size": 2}, "rank is 2; .*world_size, which is 2"),
    ({"world_size": "2"}, "world_size is '2'"), ({"init_method": "host:1"}, "init_method is 'host:1'"),
    ({"distributed_port": 0}, "distributed_port is 0"), ({"dist_init_required": "no"}, "dist_init_required is 'no'"),
    ({"dist_init_required": False}, "dist_init_required is False"),
])
def test_init_distributed_refuses_what_it_cannot_use(kwargs, told):
    with pytest.raises(ValueError, match=told):
        deepspeed.init_distributed(**kwargs)
    assert not dist.is_initialized()


@pytest.mark.parametrize("name, starter", [
    ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun"), ("MV2_COMM_WORLD_SIZE", "mpirun"),
    ("SLURM_STEP_NUM_TASKS", "srun")])
def test_processes_that_would_each_train_alone_are_refused(alone, monkeypatch, name, starter):
    monkeypatch.setenv(name, "2")
    told = f"one of 2 that were started by {starter}.*if it is to train alone, unset {name}"
    for start in deepspeed.init_distributed, alone:
        with pytest.raises(ValueError, match=told):
            start()
        assert not dist.is_initialized()


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_NUM_TASKS": "1"}], ids=["batch script", "srun --pty"])
def test_one_task_of_a_larger_slurm_job_trains_alone(alone, monkeypatch, step):
    for name, value in ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"} | step).items():
        monkeypatch.setenv(name, value)
    assert alone().world_size == 1


def test_init_distributed_by_address(tmp_path):
    deepspeed.init_distributed(init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert dist.get_world_size() == 1
        with pytest.raises(ValueError, match="world_size is 2, but the process group that there is has 1"):
            deepspeed.init_distributed(rank=0, world_size=2)
    finally:
        dist.destroy_process_group()


def test_the_models_attributes_are_the_engines(alone):
    class Net(nn.Linear):
        flavour = "sweet"

        def generate(self) -> int:
            return self.in_features

    engine = alone(model=Net(3, 1))
    assert (engine.flavour, engine.generate(), engine.weight is engine.module.weight) == ("sweet", 3, True)
    with pytest.raises(AttributeError, match="neither the engine nor its model has the attribute 'colour'"):
        engine.colour
    Net.steps_per_print = 5  # the model's own, of a name that DeepSpeed's engine has
    assert engine.steps_per_print == 5


def test_dump_state_prints_the_whole_config(alone, capsys):
    alone(CONFIG | {"dump_state": True})
    printed = capsys.readouterr().out
    config = json.loads(printed[printed.index("{"):printed.index("\nprecision:")])
    assert config["train_batch_size"] == 4 and config["checkpoint"] == {"async": False, "keep_last": None}


def talk() -> tuple:
    comm = deepspeed.comm
    value = torch.tensor(comm.get_rank() + 1.0)
    comm.all_reduce(value, op=comm.ReduceOp.SUM)
    comm.barrier()
    return comm.get_world_size(), value.item(), comm.is_initialized()


def test_comm_speaks_to_all_ranks(run_ranks):
    assert run_ranks(talk, 2) == [(2, 3.0, True)] * 2


# --- Windows that the caller ends, and sizes that change --------------------------------------------------------------


def reference(windows: list[list[int]], ranks: int, accumulation: list[int]) -> torch.Tensor:
    """Plain PyTorch's weights: micro-batches by index, in windows, each divided by ``accumulation`` and the ranks."""
    model = make_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for window, steps in zip(windows, accumulation):
        for index in window:
            for rank in range(ranks):
                (model(inputs(index, rank)).square().mean() / steps / ranks).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def run_windows(stage: int, how: str, windows: list[list[int]]) -> tuple[torch.Tensor, int, list[bool]]:
    """Train ``windows`` at ``stage``; ``how`` says who ends them."""
    config = CONFIG | {"zero_optimization": {"stage": stage}, "managed_gradient_accumulation": how != "caller"}
    engine, *_ = deepspeed.initialize(model=make_model(), config=config)
    rank, applied = engine.global_rank, []
    for window in windows:
        if how == "sizes":
            engine.set_train_batch_size(2 * engine.world_size * len(window))
        for index in window:
            if how == "boundary":
                engine.set_gradient_accumulation_boundary(index == window[-1])
            engine.backward(engine(inputs(index, rank)).square().mean())
            if how != "caller" or index == window[-1]:
                assert engine.is_gradient_accumulation_boundary() == (how != "caller" and index == window[-1])
                engine.step()
                applied.append(engine.was_step_applied())
    result = weights(engine.module), engine.global_steps, applied
    engine.destroy()
    return result


@pytest.mark.parametrize("how", ["caller", "boundary", "sizes"])
@pytest.mark.parametrize("stage", range(4))
def test_windows_of_any_length_train_what_plain_pytorch_trains(run_ranks, stage, how):
    windows = [[0, 1, 2], [3], [4, 5]]
    divisors = [len(window) for window in windows] if how == "sizes" else [2, 2, 2]
    expected = reference(windows, 2, divisors)
    for rank, (found, steps, applied) in enumerate(run_ranks(run_windows, 2, stage, how, windows)):
        largest = (found - expected).abs().max()
        assert largest < 1e-6, f"stage {stage}, {how}, rank {rank}: weights differ by {largest} after {steps} steps"
        ends = [index == window[-1] for window in windows for index in window if how != "caller" or index == window[-1]]
        assert (steps, applied) == (3, ends)


def compiled(stage: int) -> torch.Tensor:
    engine, *_ = deepspeed.initialize(model=make_model(), config=CONFIG | {"zero_optimization": {"stage": stage}})
    engine.compile(backend="eager")
    for index in range(2):
        engine.backward(engine(inputs(index, engine.global_rank)).square().mean())
        engine.step()
    result = weights(engine.module)
    engine.destroy()
    torch._dynamo.reset()
    return result


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_compiled_model_trains_the_same(run_ranks, pytestconfig, stage):
    if stage == 3 and not pytestconfig.getoption("--long"):
        pytest.skip("compiling between the gathers takes a while; --long does it")
    expected = reference([[0, 1]], 2, [2])
    for found in run_ranks(compiled, 2, stage):
        assert (found - expected).abs().max() < 1e-6


# --- Drawn mistakes ---------------------------------------------------------------------------------------------------


class Mistake(typing.NamedTuple):
    """What is wrong, and a regular expression that the error must match."""
    what: str       # "config", "initialize", or a method of the engine's
    arguments: Any  # a config; or keyword arguments
    told: str
    stage: int
    one_rank: bool  # the other rank makes no mistake


def sections(cls: type = deepspeed.Config, path: tuple[str, ...] = ()) -> list[tuple[type, tuple[str, ...]]]:
    """Every section of a config: its class and where it stands."""
    found = [(cls, path)]
    for name, hint in typing.get_type_hints(cls).items():
        for kind in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
            if is_dataclass(kind):
                found += sections(kind, (*path, name))
    return found


def with_key(path: tuple[str, ...], key: str, value: Any) -> dict:
    """CONFIG with ``key`` in the section at ``path``."""
    config = inner = json.loads(json.dumps(CONFIG))
    for part in path:
        inner = inner.setdefault(part, {})
    inner[key] = value
    return config


def edited(draw: random.Random, word: str) -> str:
    """``word`` with one letter too many, missing, wrong, or two in the wrong order."""
    at, letter = draw.randrange(len(word)), draw.choice(string.ascii_lowercase)
    return draw.choice([word[:at] + letter + word[at:], word[:at] + word[at + 1:], word[:at] + letter + word[at + 1:],
                        word[:at] + word[at + 1:at + 2] + word[at:at + 1] + word[at + 2:]])


def one_edit_apart(a: str, b: str) -> bool:
    """Whether one letter more, less, another, or two exchanged make ``b`` of ``a``."""
    short, long = sorted((a, b), key=len)
    if len(short) != len(long):
        return len(long) - len(short) == 1 and any(long[:i] + long[i + 1:] == short for i in range(len(long)))
    differing = [i for i in range(len(a)) if a[i] != b[i]]
    return len(differing) == 1 or (len(differing) == 2 and differing[1] == differing[0] + 1
                                   and a[differing[0]] == b[differing[1]] and a[differing[1]] == b[differing[0]])


def misspelt(draw: random.Random) -> tuple[dict, str]:
    cls, path = draw.choice(sections())
    keys = [f.name.removesuffix("_") for f in fields(cls)]
    if draw.random() < 0.2:
        path, keys = ("optimizer", "params"), ["lr", "betas", "eps", "weight_decay", "amsgrad"]
    key = draw.choice(keys)
    wrong = edited(draw, key)
    near = [name for name in keys if one_edit_apart(name, wrong)]
    if wrong in keys or not near or len(wrong) < 2:
        return misspelt(draw)
    suggestion, config = "|".join(map(re.escape, near)), with_key(path, wrong, 1)
    if path == ("optimizer", "params"):
        config["optimizer"] = {"type": "AdamW", "params": {wrong: 1}}
    return config, rf"{re.escape('.'.join((*path, wrong)))}.*did you mean .*'({suggestion})'"


def mistyped(draw: random.Random) -> tuple[dict, str]:
    cls, path = draw.choice(sections())
    f = draw.choice(fields(cls))
    hint = typing.get_type_hints(cls)[f.name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    wrong = [value for kind, value in ((bool, True), (str, "many"), (list, [1]), (types.NoneType, None), (float, 2.5))
             if kind not in kinds and (kind, f.name) != (types.NoneType, "enabled")]  # that says off, of any section
    wrong += [] if dict in kinds or any(map(is_dataclass, kinds)) else [{"a": 1}]
    key = f.name.removesuffix("_")
    config = with_key(path, key, draw.choice(wrong))
    if path == ("scheduler",):
        config["scheduler"].setdefault("type", "WarmupLR")
    return config, rf"{re.escape('.'.join((*path, key)))} is "


OUT_OF_RANGE = {
    "train_batch_size": [0, -8], "train_micro_batch_size_per_gpu": [0, -1], "gradient_accumulation_steps": [0, -3],
    "gradient_clipping": [-1.0, float("inf"), float("nan")], "steps_per_print": [0, -5],
    "timeout": [0, -1, float("inf"), float("nan"), 1e12], "gradient_allreduce_op": ["max", "means"],
    "communication_data_type": ["fp8", "int32"], "gradient_predivide_factor": [0, -1, float("inf")],
    "zero_optimization.stage": [4, -1, 100], "zero_optimization.reduce_bucket_size": [0, -1, "big"],
    "zero_optimization.stage3_prefetch_bucket_size": [-1], "zero_optimization.stage3_max_live_parameters": [-1],
    "zero_optimization.leaf_module.classes": [["Nothing"]], "data_types.grad_accum_dtype": ["fp8", ""],
    "checkpoint.keep_last": [0, -1],
    "activation_checkpointing.number_checkpoints": [0, -1], "activation_checkpointing.mode": ["some"],
    "activation_checkpointing.modules": [["Nothing*"]], "optimizer.type": ["Adan", "LBFGS", ""],
    "optimizer.params.lr": [-1.0, "fast"], "optimizer.params.betas": [[0.9], [2.0, 0.9]],
    "fp16.loss_scale": [-1.0], "fp16.loss_scale_window": [0], "fp16.hysteresis": [0], "fp16.min_loss_scale": [-1.0],
    "torch_autocast.dtype": ["fp8"], "bf16.loss_scale": [3.0],
}
CONTRADICTIONS = [
    ({"train_batch_size": 7}, "train_batch_size"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.*bf16|bf16.*fp16"),
    ({"optimizer": None, "scheduler": {"type": "WarmupLR"}}, "scheduler needs an optimizer"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, "scheduler.*warmup_steps"),
    ({"scheduler": {"type": "WarmLR"}}, "scheduler.*WarmLR"),
    ({"bf16": {"enabled": True, "keep_fp32": ["Nothing"]}}, "keep_fp32"),
    ({"bf16": {"enabled": True}, "activation_checkpointing": {"modules": ["Nothing"]}}, "modules"),
    ({"bf16": {"enabled": True, "keep_fp32": ["BatchNorm1d"]}, "zero_optimization": {"stage": 1},
      "optimizer": {"type": "Adafactor"}}, "Adafactor"),
    ({"optimizer": {"params": {}}}, "optimizer.type is missing"), ({"pipeline": {}}, "pipeline"),
    ({"zero_optimization": {"offload_optimizer": {"device": "tape"}}}, "offload_optimizer"),
]


def wrong_config(draw: random.Random, stage: int) -> tuple[dict, str]:
    """A config with one mistake, and what the error must say."""
    kind = draw.choice(["misspelt", "misspelt", "mistyped", "mistyped", "range", "range", "contradiction"])
    if kind == "contradiction":
        change, told = draw.choice(CONTRADICTIONS)
        return CONFIG | {"zero_optimization": {"stage": stage}} | change, told
    if kind == "range":
        path = draw.choice(list(OUT_OF_RANGE))
        *outer, key = path.split(".")
        config = with_key(tuple(outer), key, draw.choice(OUT_OF_RANGE[path]))
        if outer and outer[0] in ("fp16", "torch_autocast"):
            config[outer[0]]["enabled"] = True
        if path == "optimizer.params.betas":
            config["optimizer"] = {"type": "AdamW", "params": {"betas": config["optimizer"]["params"]["betas"]}}
        told = re.escape(path if "params" not in path else "optimizer.params").replace(r"\.classes", "")
    else:
        config, told = misspelt(draw) if kind == "misspelt" else mistyped(draw)
    if isinstance(config.setdefault("zero_optimization", {}), dict):
        config["zero_optimization"].setdefault("stage", stage)
    return config, told


def other_optimizer(*_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)


def fail(*_: Any) -> None:
    raise RuntimeError("the caller's own mistake")


@cache
def wrong_calls() -> list[tuple[str, dict, str, bool]]:
    """Calls with one mistake: the call, its arguments, what the error must say, and whether all ranks hear of it."""
    data = TensorDataset(torch.ones(8, 6))
    calls = [("initialize", arguments, told, True) for arguments, told in (
        ({"model": None}, "model is None"), ({"model": 5}, "model is 5"),
        ({"model": nn.Linear(2, 2, device="meta")}, "meta device"), ({"mpu": 1}, "mpu and mesh_param"),
        ({"mesh_param": (1, 2)}, "mpu and mesh_param"), ({"optimizer": 3}, "optimizer is, or makes, 3"),
        ({"optimizer": other_optimizer}, "no parameter of the model"),
        ({"optimizer": "Adam"}, "optimizer is, or makes, 'Adam'"),
        ({"lr_scheduler": 5}, "lr_scheduler is, or makes, 5"), ({"lr_scheduler": str}, "lr_scheduler is, or makes"),
        ({"lr_scheduler": fail}, "the caller's own"), ({"optimizer": fail}, "the caller's own"),
        ({"training_data": 7}, "training_data is a int"),
        ({"training_data": DataLoader(data)}, "training_data is a DataLoader"),
        ({"training_data": TensorDataset(torch.ones(0, 6))}, "training_data is empty"),
        ({"collate_fn": 4}, "collate_fn is 4"),
        ({"model_parameters": 5}, "model_parameters is a int"), ({"model_parameters": []}, "optimizer.params"),
        ({"config": None}, "the config is given nowhere"), ({"config": "/nowhere.json"}, "/nowhere.json can't be read"),
        ({"config": 3}, "the config is 3"), ({"config_params": CONFIG}, "config and config_params"),
        ({"dist_init_required": "no"}, "dist_init_required is 'no'"),
        ({"distributed_port": -1}, "distributed_port is -1"),
        ({"args": argparse.Namespace(local_rank="a")}, "args.local_rank is 'a'"),
        ({"args": argparse.Namespace(deepspeed_config="x.json")}, "config and args.deepspeed_config"))]
    calls += [("backward", {"loss": loss}, "backward", False) for loss in (None, "loss", 3.0, torch.ones(2))]
    calls += [("step", {"lr_kwargs": wrong}, "lr_kwargs", False) for wrong in (5, "x", [1], {"speed": 1})]
    calls += [("no_sync", {}, "no_sync", False)]
    calls += [("save_checkpoint", arguments, told, True) for arguments, told in (
        ({"save_dir": 5}, "save_dir is 5"), ({"save_dir": None}, "save_dir is None"), ({"tag": "a/b"}, "tag is 'a/b'"),
        ({"tag": ""}, "tag is ''"), ({"tag": [5]}, "tag is"), ({"tag": ".."}, "tag is"), ({"tag": "latest"}, "tag is"),
        ({"client_state": [1]}, "client_state is"), ({"client_state": 5}, "client_state is 5"),
        ({"client_state": {"f": test_comm_speaks_to_all_ranks}}, "client_state"),
        ({"save_latest": "no"}, "save_latest is 'no'"),
        ({"exclude_frozen_parameters": 1}, "exclude_frozen_parameters is 1"))]
    calls += [("load_checkpoint", arguments, told, True) for arguments, told in (
        ({"load_dir": 5}, "load_dir is 5"), ({"load_dir": None}, "load_dir is None"), ({"tag": "../x"}, "tag is"),
        ({"tag": "nothing"}, "nothing"), ({"tag": True}, "tag is"), ({"load_module_strict": "no"}, "module_strict"),
        ({"load_optimizer_states": None}, "load_optimizer_states"), ({"load_module_only": 1}, "load_module_only"))]
    calls += [("save_16bit_model", arguments, told, True) for arguments, told in (
        ({"save_dir": None}, "save_dir is None"), ({"save_filename": 5}, "save_filename is 5"))]
    calls += [("set_train_batch_size", {"train_batch_size": wrong}, "train_batch_size is", True)
              for wrong in (0, -4, 2.5, "8", None, True, 7)]
    calls += [("set_train_micro_batch_size", {"micro_batch_size": wrong}, "micro_batch_size is", True)
              for wrong in (0, -1, 1.5, "2", None, True)]
    calls += [("set_gradient_accumulation_boundary", {"is_boundary": wrong}, "is_boundary is", False)
              for wrong in (1, None, "yes")]
    return calls + [("compile", {"schedule": [1]}, "schedule is", False),
                    ("compile", {"compile_kwargs": {"mode": "max-autotune"}}, "it replays CUDA graphs", False)]


def draw_mistakes(seed: int, count: int) -> list[Mistake]:
    draw, mistakes = random.Random(seed), []
    for index in range(count):
        stage = draw.randrange(4)
        if index % 2:
            what, (arguments, told), all_hear = "config", wrong_config(draw, stage), True
        else:
            names = list(dict.fromkeys(call[0] for call in wrong_calls()))  # each in turn
            what = names[index // 2 % len(names)]
            what, arguments, told, all_hear = draw.choice([call for call in wrong_calls() if call[0] == what])
            stage = max(stage, 2) if what == "no_sync" else stage
        mistakes.append(Mistake(what, arguments, told, stage, all_hear and draw.random() < 0.5))
    return mistakes


def error_of(function: Callable, **kwargs: Any) -> str:
    try:
        function(**kwargs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{function} took {kwargs}")


def make_mistake(mistake: Mistake, folder: str) -> tuple[str, torch.Tensor]:
    """What the mistake raises on this rank, and the weights that a step with the same model and right calls gives."""
    right = {"model": make_model(), "config": CONFIG | {"zero_optimization": {"stage": mistake.stage}}}
    mine = mistake.arguments if not mistake.one_rank or dist.get_rank() == 1 else {}
    if mistake.what == "config":
        said = error_of(deepspeed.initialize, **right | ({"config": mine} if mine else {}))
        mine = {}
    elif mistake.what == "initialize":
        said = error_of(deepspeed.initialize, **right | mine)
    engine, *_ = deepspeed.initialize(**right, lr_scheduler=partial(ConstantLR, factor=1.0))
    if mistake.what == "no_sync":
        said = error_of(engine.no_sync().__enter__)
    elif mistake.what not in ("config", "initialize", "step"):
        good = {"save_checkpoint": {"save_dir": folder}, "load_checkpoint": {"load_dir": folder},
                "save_16bit_model": {"save_dir": folder}, "set_train_micro_batch_size": {"micro_batch_size": 2},
                "set_train_batch_size": {"train_batch_size": 4 * dist.get_world_size()}}
        said = error_of(getattr(engine, mistake.what), **good.get(mistake.what, {}) | mine)
    for index in range(2):
        engine.backward(engine(inputs(index, engine.global_rank)).square().mean())
        if mistake.what == "step" and index == 1:
            said = error_of(engine.step, **mine)
        engine.step()
    found = weights(engine.module)
    engine.destroy()
    return said, found


def make_mistakes(mistakes: list[Mistake], folder: str) -> list[str]:
    """Make each one; what went otherwise than it should, in words."""
    wrong, expected = [], reference([[0, 1]], dist.get_world_size(), [2])
    for mistake in mistakes:
        said, found = make_mistake(mistake, folder)
        told = mistake.told
        if mistake.what == "config" and mistake.one_rank:  # ranks whose configs differ hear of the first difference
            changed = [key for key, value in mistake.arguments.items() if value != CONFIG.get(key)]
            told += rf"|ranks disagree.*rank 1 has ({'|'.join(changed)})\b"
        if not re.search(told, said, re.DOTALL):
            wrong.append(f"{mistake}: {said}")
        largest = (found - expected).abs().max()
        if not largest < 1e-6:
            wrong.append(f"{mistake}: the right calls after it train weights that differ by {largest}")
    return wrong


def test_a_refused_call_gives_model_and_optimizer_back_as_they_were(alone):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()}
    config = SIZES | {"bf16": {"enabled": True, "keep_fp32": ["Linear"]}, "zero_optimization": {"stage": 3},
                      "activation_checkpointing": {"modules": ["Tanh"]}, "scheduler": {"type": "WarmupLR"}}
    with pytest.raises(ValueError, match="modules has .*'Nothing'"):
        alone(config | {"activation_checkpointing": {"modules": ["Tanh", "Nothing"]}}, model=model, optimizer=optimizer)
    alone(CONFIG, model=model)
    with pytest.raises(ValueError, match="another engine already trains this model"):
        alone(config, model=model, optimizer=optimizer)  # refused last of all, after all that can be changed
    for name, value in model.state_dict().items():
        assert value.dtype == before[name][0] and torch.equal(value, before[name][1]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("ranks", [1, 2])
def test_mistakes_are_refused_on_every_rank_and_leave_nothing_behind(run_ranks, pytestconfig, tmp_path, ranks):
    mistakes = draw_mistakes(ranks, 150 if pytestconfig.getoption("--long") else 30)
    mistakes = [mistake._replace(one_rank=mistake.one_rank and ranks == 2) for mistake in mistakes]
    for rank, wrong in enumerate(run_ranks(make_mistakes, ranks, mistakes, str(tmp_path))):
        assert not wrong, f"rank {rank} of {ranks}:\n" + "\n".join(wrong)
