"""What a DeepSpeed script calls: each name works, or says why not.

    .venv/bin/python -m pytest -q tests/test_dropin.py

The tables of names in tutorials/coming_from_deepspeed.md and of pains in tutorials/pains.md are read by the tests,
so that they can't rot.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from datetime import timedelta
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import engine
import engine as deepspeed
from conftest import DEADLINE, ROOT, on_ranks
from engine import ConfigError
from oracle import Mlp
from test_config import sections

PAGE = "tutorials/coming_from_deepspeed.md"
SECTION = (ROOT / PAGE).read_text()
CONFIG = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


# --- The page's tables ------------------------------------------------------------------------------------------------


def rows(header: str) -> list[tuple[str, ...]]:
    """The cells of the page's table with this header."""
    lines = SECTION[SECTION.index(header):].splitlines()[2:]
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in lines[:end]]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_name_that_works_by_the_page_is_there(alone):
    engine, *_ = alone()
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
    engine, *_ = alone()
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
    engine, *_ = alone()
    for place, name in ((deepspeed, "initialise"), (deepspeed.utils, "loger"), (engine, "backwards")):
        with pytest.raises(AttributeError, match=f"attribute '{name}'"):
            getattr(place, name)
    assert not hasattr(deepspeed, "__path__"), "engine.py is no package"


# --- The name itself --------------------------------------------------------------------------------------------------


@pytest.fixture
def own_modules(monkeypatch) -> Iterator[None]:
    """Where Python looks for modules, to be changed."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    with mock.patch.dict(sys.modules):
        yield


def test_python_finds_the_engine_by_the_name_deepspeed(own_modules):
    engine.as_deepspeed()
    assert importlib.util.find_spec("deepspeed").name == importlib.metadata.metadata("deepspeed")["Name"] == "deepspeed"
    assert "deepspeed" not in sys.modules, "nothing happens before it is imported"
    import deepspeed as there
    import deepspeed.comm as comm
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES, WarmupLR
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.utils import see_memory_usage
    from deepspeed.utils.logging import log_dist
    assert there is sys.modules["deepspeed"] is engine.MODULES["deepspeed"] and there.initialize is engine.initialize
    assert comm.get_world_size is dist.get_world_size and WarmupLR.__name__ in VALID_LR_SCHEDULES and log_dist
    see_memory_usage("here", force=True)
    assert ZeroParamStatus.NOT_AVAILABLE and there.zero.Init is engine.zero.Init
    assert importlib.util.find_spec("deepspeed") and importlib.metadata.version("deepspeed") == there.__version__
    for absent in ("import deepspeed.pipe", "from deepspeed import PipelineModule",
                   "from deepspeed.utils import groups", "from deepspeed.runtime.config import DeepSpeedConfig"):
        with pytest.raises(ImportError, match=f"there is no deepspeed[.a-zA-Z]+; .*{PAGE}"):
            exec(absent)


def test_the_real_deepspeed_is_not_replaced(own_modules):
    there = sys.modules["deepspeed"] = ModuleType("deepspeed")
    there.__file__ = "/there/deepspeed/__init__.py"
    with pytest.raises(RuntimeError, match="from '/there/deepspeed/__init__.py'> is imported already; call as_deepsp"):
        deepspeed.as_deepspeed()
    assert "deepspeed.zero" not in sys.modules


def test_kernels_by_deepspeeds_names_are_the_configs_optimizers():
    adam, weights = deepspeed.ops.adam, [nn.Parameter(torch.ones(2))]
    fused = adam.FusedAdam(weights, lr=0.1, betas=(0.8, 0.9))
    assert type(fused) is torch.optim.AdamW and fused.defaults["lr"] == 0.1 and fused.defaults["betas"] == (0.8, 0.9)
    assert type(adam.DeepSpeedCPUAdam(weights, adamw_mode=False)) is torch.optim.Adam
    assert adam.FusedAdam([{"params": weights, "lr": 0.5}]).param_groups[0]["lr"] == 0.5
    with pytest.raises(ConfigError, match="unknown key optimizer.params.beta; did you mean 'betas'"):
        adam.FusedAdam(weights, beta=0.5)
    assert deepspeed.ops.adagrad.DeepSpeedCPUAdagrad(params=weights, eps=0.5).param_groups[0]["eps"] == 0.5
    assert deepspeed.ops.lion.FusedLion(weights).param_groups[0]["betas"] == (0.9, 0.999), "DeepSpeed's"
    assert adam.cpu_adam.DeepSpeedCPUAdam(model_params=weights, lr=0.3).param_groups[0]["lr"] == 0.3
    for positional in (deepspeed.ops.lamb.FusedLamb, deepspeed.ops.adagrad.DeepSpeedCPUAdagrad, adam.FusedAdam):
        with pytest.raises(TypeError, match="positional"):  # DeepSpeed's next argument is another one each time
            positional(weights, 0.1, 0.5)


def test_kernels_by_deepspeeds_names_are_classes(alone):
    """They recognize what they make, and a subclass trains as one of PyTorch's."""
    ops = deepspeed.ops
    for cls in ops.adam.FusedAdam, ops.adam.DeepSpeedCPUAdam, ops.adagrad.DeepSpeedCPUAdagrad, ops.lion.FusedLion, \
            ops.lion.DeepSpeedCPULion, ops.lamb.FusedLamb:
        assert issubclass(cls, torch.optim.Optimizer) and isinstance(cls(Mlp().parameters()), cls)
        assert not isinstance(torch.optim.SGD(Mlp().parameters()), cls)

    class Counting(ops.adam.FusedAdam):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    weights, config = [], CONFIG | {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    for kind, options in ((Counting, {}), (torch.optim.AdamW, {"weight_decay": 0.0, "fused": True})):
        torch.manual_seed(0)
        model = Mlp()
        engine, optimizer, *_ = alone(config, model=model, optimizer=kind(model.parameters(), lr=0.1, **options))
        for _ in range(2):
            engine.backward(engine(torch.ones(4, 8)).square().mean())
            engine.step()
        assert type(optimizer) is kind and isinstance(optimizer, ops.adam.FusedAdam)
        assert isinstance(optimizer, Counting) is (kind is Counting)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert Counting(model.parameters()).defaults["weight_decay"] == 0.0, "DeepSpeed's"
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_the_accelerator_is_the_current_device_and_its_seeds_count():
    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.manual_seed_all(3)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3))
    assert accelerator.device_name() == "cpu" and accelerator.get_rng_state().equal(torch.get_rng_state())
    with pytest.raises(AttributeError, match=f"no attribute 'range_push'.*{PAGE}"):
        accelerator.range_push


@on_ranks(2)
def test_log_dist_logs_on_the_ranks_that_are_named():
    rank = dist.get_rank()
    for ranks, here in ((None, False), ([], False), ([-1], True), ([1], rank == 1), ([0, 1], True)):
        with mock.patch.object(deepspeed.logger, "log") as log:
            deepspeed.utils.log_dist("x", ranks)
        assert log.called is here, f"rank {rank}, ranks {ranks}"


def test_an_engines_config_answers_with_what_was_given(alone):
    config = alone(CONFIG | {"fp16": {"enabled": "auto"}})[0].config
    assert config.get("fp16") == {"enabled": "auto"} and config.get("bf16") is None
    assert config.get("activation_checkpointing", {}) == {} and config.get("train_batch_size") == 4


def test_a_fork_that_ends_leaves_the_package_to_its_parent():
    done = subprocess.run([sys.executable, "-c", "import os, sys, engine; engine.as_deepspeed()\n"
                           "if os.fork() == 0: sys.exit(0)\nos.wait(); import deepspeed; print(deepspeed.__name__)"],
                          cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout == "deepspeed\n", done.stderr


def test_small_names(alone):
    engine, *_ = alone(CONFIG | {"steps_per_print": 7})
    assert (engine.steps_per_print(), engine.config.get("steps_per_print"), engine.config.get("none", 3)) == (7, 7, 3)
    batches = deepspeed.utils.RepeatingLoader([1, 2])
    assert [next(batches) for _ in range(5)] == [1, 2, 1, 2, 1] and iter(batches) is batches
    assert isinstance(batches, deepspeed.runtime.dataloader.RepeatingLoader) and len(batches.loader) == 2
    with pytest.raises(StopIteration):
        next(deepspeed.utils.RepeatingLoader([]))
    device = deepspeed.get_accelerator()
    assert (device.device_name(), device.device_name(0), device.current_device_name()) == ("cpu", "cpu", "cpu")
    assert device.communication_backend_name() == "gloo" and device.memory_allocated() == 0
    assert device.is_bf16_supported() and device.is_fp16_supported() and "safe_get_full_grad" in dir(deepspeed.utils)
    with pytest.raises(NotImplementedError, match="mixtures of experts are not covered"):
        deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer({})


SCRIPT = """
import os, subprocess, sys
import torch
import deepspeed
from deepspeed.ops.adam import FusedAdam

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
data = torch.randn(8, 4)
engine, *_ = deepspeed.initialize(model=model, optimizer=FusedAdam(model.parameters(), lr=0.1), config={
    "train_batch_size": 8, "gradient_clipping": 0.0, "zero_optimization": {"stage": int(sys.argv[1])}})
assert deepspeed.runtime.zero.partition_parameters.is_zero_param(model[0].weight)
for _ in range(5):
    loss = engine(data[engine.global_rank::2]).square().mean()
    engine.backward(loss)
    engine.step()
child = subprocess.run([sys.executable, "-c", "import deepspeed.zero; print(deepspeed.__version__)"],
                       capture_output=True, text=True)
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    found = child.stdout.strip(), sys.argv[1:], float(model(data).detach().square().mean())
    sys.stdout.write(f"{found}\\n")  # at once, as the ranks share the screen
engine.destroy()
"""


def launch(*arguments: Any) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "launch.py", *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=DEADLINE)


@pytest.mark.parametrize("option, taken, given", [
    ("'--local_rank'", (), ["--local_rank=0"]), ("'--rank'", (), []), ("'--local_rank'", ("--no_local_rank",), [])])
def test_a_script_gets_the_local_rank_that_it_takes(tmp_path, option, taken, given):
    script = tmp_path / "train.py"
    script.write_text(f"import sys\nassert sys.argv[1:] == {given} + ['x'], sys.argv  # takes {option}\n")
    done = launch("--as_deepspeed", *taken, script, "x")
    assert done.returncode == 0, done.stderr


def test_a_script_that_imports_deepspeed_runs_as_it_is(tmp_path):
    """Also in processes that it starts; a folder that has files of the engine's names is refused."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = launch("--as_deepspeed", "--nproc_per_node", 2, script, 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    data = torch.randn(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    expected = model(data).square().mean().item()
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert ast.literal_eval(line) == (deepspeed.__version__, ["3"], pytest.approx(expected, rel=1e-5))
    assert len(done.stdout.splitlines()) == 2
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").touch()
    assert f"{tmp_path} has a module named engine," in launch("--as_deepspeed", script).stderr
    assert "--as_deepspeed is for a SCRIPT" in launch("--as_deepspeed").stderr


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("library", ["transformers", "accelerate", "lightning"])
def test_libraries_train_as_with_deepspeed(library, stage, tmp_path):
    """And save, resume, and read the weights."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed, and only this test needs it")
    done = launch("--as_deepspeed", "--nproc_per_node", 2, ROOT / "tests" / "libraries.py", library, stage, tmp_path)
    assert done.returncode == 0 and done.stdout.count("as in plain PyTorch") == 2, done.stderr


# --- The table of pains -----------------------------------------------------------------------------------------------


@cache
def functions_of(file: str) -> set[str]:
    """The top-level functions of a test file."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_table_of_pains_names_tests_that_exist():
    section = (ROOT / "tutorials" / "pains.md").read_text()
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
    own = {file.stem for file in [*files, *(ROOT / "tests").glob("*.py")]}  # the grader runs tests
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
    path.write_text(json.dumps(CONFIG | {"optimizer": {"type": "AdamW"}}))
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    assert deepspeed.add_config_arguments(parser) is parser
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=77))
    try:
        model = Mlp()
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


@pytest.mark.parametrize("given, missing", [("RANK", "WORLD_SIZE, MASTER_ADDR"), ("WORLD_SIZE", "RANK, MASTER_ADDR")])
def test_half_of_a_launchers_variables_is_an_error_not_a_hang(given, missing, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(given, "0")
    with pytest.raises(ConfigError, match=f"but not {missing}"):
        deepspeed.initialize(model=nn.Linear(1, 1), config={"train_batch_size": 1})


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
    assert alone()[0].world_size == 1


def test_init_distributed_by_address(tmp_path):
    deepspeed.init_distributed(init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert dist.get_world_size() == 1
        with pytest.raises(ValueError, match="world_size is 2, but the existing process group has 1"):
            deepspeed.init_distributed(rank=0, world_size=2)
    finally:
        dist.destroy_process_group()


def test_the_models_attributes_are_the_engines(alone):
    class Net(nn.Linear):
        flavour = "sweet"

        def generate(self) -> int:
            return self.in_features

    engine, *_ = alone(model=Net(3, 1))
    assert (engine.flavour, engine.generate(), engine.weight is engine.module.weight) == ("sweet", 3, True)
    with pytest.raises(AttributeError, match="neither the engine nor its model has the attribute 'colour'"):
        engine.colour
    Net.get_batch_info = 5  # the model's own, of a name that DeepSpeed's engine has
    assert engine.get_batch_info == 5
    engine.head, engine.alpha = nn.Linear(1, 1), nn.Parameter(torch.ones(1))  # what a script sets comes first
    engine.register_buffer("seen", torch.ones(2))
    assert isinstance(engine.head, nn.Linear) and engine.alpha.shape == (1,) and engine.seen.sum() == 2


def test_dump_state_prints_the_whole_config(alone, capsys):
    alone(CONFIG | {"dump_state": True})
    printed = capsys.readouterr().out
    config = json.loads(printed[printed.index("{"):printed.index("\nprecision:")])
    assert config["train_batch_size"] == 4 and config["checkpoint"] == {"async": False, "keep_last": None}


@on_ranks(2)
def test_log_summary_prints_what_the_engines_have_sent():
    engine, *_ = deepspeed.initialize(model=Mlp(), config=CONFIG)
    engine.backward(engine(torch.ones(2, 8)).square().mean())
    engine.step()
    with mock.patch("builtins.print") as print_:
        deepspeed.comm.log_summary()
    table = deepspeed.zero.traffic_table(engine.zero.communicator.traffic)
    printed = [call.args for call in print_.mock_calls]  # former engines may live on
    assert (printed.count((table,)) == 1 if dist.get_rank() == 0 else not printed) and "all-" in table
    with pytest.raises(ValueError, match="show_straggler is True; allowed: False"):
        deepspeed.comm.log_summary(show_straggler=True)


@on_ranks(2)
def test_comm_speaks_to_all_ranks():
    comm = deepspeed.comm
    value = torch.tensor(comm.get_rank() + 1.0)
    comm.all_reduce(value, op=comm.ReduceOp.SUM)
    comm.barrier()
    assert (comm.get_world_size(), value.item(), comm.is_initialized()) == (2, 3.0, True)
