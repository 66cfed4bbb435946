"""What goes wrong elsewhere: the table in tutorials/reference.md names a test for each; those that no other file has are here.

    .venv/bin/python -m pytest -q tests/test_pains.py
"""

import ast
import copy
import functools
import logging
import re
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import engine as deepspeed
import schedulers
import zero
from conftest import ROOT

SGD = {"type": "SGD", "params": {"lr": 1.0}}
STAGES = range(4)


def start(model: nn.Module, stage: int, **options):
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": SGD, "gradient_clipping": 0.0,
              "zero_optimization": {"stage": stage, "reduce_bucket_size": 100}} | options
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: zero.safe_get_full_fp32_param(p) for name, p in model.named_parameters()}


# --- The table --------------------------------------------------------------------------------------------------------


@functools.cache
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


# --- Resuming ---------------------------------------------------------------------------------------------------------


def half_frozen(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))
    model[:2].requires_grad_(False)
    model[3][0].bias.requires_grad_(False)
    return model


def frozen_round_trip(folder: str) -> None:
    """Saved at each stage, and loaded at it and at another into a model that begins with other weights."""
    for saver in STAGES:
        engine = start(half_frozen(0), saver)
        engine.backward(engine(torch.ones(2, 6)).sum())
        engine.step()
        engine.save_checkpoint(folder, f"stage{saver}")
        saved = weights(engine.module)
        engine.destroy()
        for loader in {saver, 3 - saver}:
            engine = start(half_frozen(1), loader)
            engine.load_checkpoint(folder, f"stage{saver}")
            for name, value in weights(engine.module).items():
                assert torch.equal(value, saved[name]), f"saved at stage {saver}, loaded at {loader}: {name}"
            assert [p.requires_grad for p in engine.module.parameters()] == \
                [p.requires_grad for p in half_frozen(0).parameters()]
            engine.destroy()


def test_a_half_frozen_model_comes_back_bit_for_bit(run_ranks, tmp_path):
    run_ranks(frozen_round_trip, 2, str(tmp_path))


# --- Numbers ----------------------------------------------------------------------------------------------------------


SCHEDULES = [
    {"type": "WarmupLR", "params": {"warmup_min_lr": 0.125, "warmup_num_steps": 4, "warmup_type": "linear"}},
    {"type": "OneCycle", "params": {"cycle_min_lr": 0.25, "cycle_max_lr": 0.5, "cycle_first_step_size": 2}},
    {"type": "MultiPhaseLR", "params": {"phases": [{"type": "linear", "steps": 2, "start_lr": 0.0, "end_lr": 0.5}]}},
]


def moved_by() -> None:
    """How far a weight whose gradient is 1 moves in each step: the rate that was in force."""
    for schedule in SCHEDULES:
        expected = [rates[0] for rates in schedulers.preview(schedule, 4, lr=1.0)]
        assert expected[0] != 1.0, "else it says nothing"
        for stage in STAGES:
            model = nn.Linear(1, 1, bias=False).double()
            engine, moved = start(model, stage, scheduler=schedule), []
            for _ in expected:
                before = zero.safe_get_full_fp32_param(model.weight).item()
                engine.backward(engine(torch.ones(2, 1, dtype=torch.float64)).mean())
                engine.step()
                moved.append(before - zero.safe_get_full_fp32_param(model.weight).item())
            assert moved == pytest.approx(expected, abs=1e-12), f"{schedule['type']}, stage {stage}"
            engine.destroy()


def test_the_first_update_uses_the_schedules_first_rate_and_not_the_optimizers(run_ranks):
    run_ranks(moved_by, 2)


PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True, "auto_cast": True}},
              "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "auto_cast": True}}}


def overflow(precision: str) -> list:
    """By stage: whether a step with an infinite gradient on rank 1 changed nothing, what it counts as, what is told."""
    found, told = [], []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    for stage in STAGES:
        torch.manual_seed(0)
        engine = start(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)), stage, **PRECISIONS[precision])
        before = weights(engine.module)
        loss = engine(torch.ones(2, 6)).float().mean()
        engine.backward(loss * float("inf") if dist.get_rank() == 1 else loss)
        logging.getLogger("engine").addHandler(handler)
        engine.step()
        logging.getLogger("engine").removeHandler(handler)
        unchanged = all(torch.equal(value, before[name]) for name, value in weights(engine.module).items())
        found.append((unchanged, engine.skipped_steps, engine.global_steps, told.copy()))
        told.clear()
        engine.destroy()
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_overflow_changes_nothing_is_counted_and_is_told_once_in_every_precision(run_ranks, precision):
    scale = "; loss scale 16, now 8: normal at the start, until it has come down far enough" if precision == "fp16" else ""
    warning = f"step skipped, nothing was changed: the gradient of 0.weight is not finite{scale} (1 skipped so far)"
    for rank, found in enumerate(run_ranks(overflow, 2, precision)):
        assert found == [(True, 1, 0, [warning] if rank == 0 else [])] * 4, f"rank {rank}"


def norms() -> None:
    """What get_global_grad_norm() returns where the gradient is clipped to a hundredth and more."""
    for stage in STAGES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
        reference = copy.deepcopy(model)
        engine = start(model, stage, gradient_clipping=0.01)
        rows = torch.randn(dist.get_world_size(), 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        engine.backward(20 * engine(rows[dist.get_rank()]).square().mean())
        engine.step()
        (20 * reference(rows.flatten(0, 1)).square().mean()).backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.01).item()
        assert expected > 1.0 and engine.get_global_grad_norm() == pytest.approx(expected, rel=1e-12), f"stage {stage}"
        for (name, value), p in zip(weights(model).items(), reference.parameters(), strict=True):
            difference = float((value - (p - p.grad)).abs().max())
            assert difference < 1e-12, f"stage {stage}: {name} differs by {difference:.3g}"
        engine.destroy()
    assert "before clipping" in deepspeed.Engine.get_global_grad_norm.__doc__


def test_the_norm_returned_is_that_of_one_process_before_clipping(run_ranks):
    run_ranks(norms, 3)


class Tiny(nn.Module):
    """Parameters without an element, and with fewer than there are ranks."""

    def __init__(self):
        super().__init__()
        self.none, self.gain, self.three = nn.Linear(8, 0), nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.cat([self.none(x), self.gain * x], dim=1) * self.three.sum()


def train_tiny() -> None:
    for stage in STAGES:
        model, reference = Tiny().double(), Tiny().double()
        optimizers = [torch.optim.AdamW([{"params": [p]} for p in net.parameters()], lr=0.1)
                      for net in (model, reference)]
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizers[0], config={
            "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}})
        for step in range(3):
            rows = torch.randn(dist.get_world_size(), 2, 8, dtype=torch.float64,
                               generator=torch.Generator().manual_seed(step))
            engine.backward(engine(rows[dist.get_rank()]).square().mean())
            engine.step()
            reference(rows.flatten(0, 1)).square().mean().backward()
            optimizers[1].step(), optimizers[1].zero_grad()
            for (name, value), p in zip(weights(model).items(), reference.parameters(), strict=True):
                assert value.shape == p.shape, f"stage {stage}, step {step}: {name} has the shape {tuple(value.shape)}"
                difference = max((value - p.detach()).abs().flatten().tolist(), default=0.0)
                assert difference < 1e-12, f"stage {stage}, step {step}: {name} differs by {difference:.3g}"
        engine.destroy()


def test_parameters_without_elements_and_groups_smaller_than_the_ranks_train(run_ranks):
    run_ranks(train_tiny, 4)


# --- Messages ---------------------------------------------------------------------------------------------------------


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
