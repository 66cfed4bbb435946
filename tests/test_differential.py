"""The same training runs as DeepSpeed's: losses, norms, rates, momenta, counters and final weights of every case.

    .venv/bin/python -m pytest -q tests/test_differential.py
    python tests/test_differential.py --output tests/data/deepspeed_runs.json      record the reference, with DeepSpeed
    python tests/test_differential.py --library engine --output ours.json          the same with this project
    python tests/test_differential.py --cases stage3_2_ranks --output one.json     one case

Only the import differs between the libraries. Recording is on the CPU with gloo; DeepSpeed needs a C++ compiler there.
A case is a model, a config, and data that a seed gives; it takes 20 optimizer steps. What it leaves:

    losses         per optimizer step: what ``backward()`` returns, summed over the micro-batches, mean over the ranks
    evaluated      the same for some cases in ``eval()`` mode after each step; without gradients
    norms          ``get_global_grad_norm()`` after each step; null where DeepSpeed has none (fp32 at stage 0)
    rates          the rate of each param group before each step, and one more after the last
    momenta        the momentum, or the pair of betas, at the same times
    boundaries     ``is_gradient_accumulation_boundary()`` before each ``step()`` of the first two windows
    counters       global_steps, global_samples, micro_steps and skipped_steps at the end
    weights        of each parameter at the end: its 2-norm, and its first and last element

A list whose entries are all the same is stored as ``[entry]``. Numbers that come of fp32 have 8 digits, others all.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "data" / "deepspeed_runs.json"

STEPS = 20
ROWS = 12         # samples per optimizer step, over all ranks and micro-batches
FEATURES = 6      # of a sample for the models that take numbers
CLASSES = 3
VOCABULARY = 13   # for the models that take tokens
CONTEXT = 5       # tokens of a sample


# --- Models -----------------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """Two layers: (rows, FEATURES) to (rows, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(FEATURES, 9), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x)))


class PartlyFrozen(Perceptron):
    """Its first layer, and one bias, are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(9, 9)
        for p in (*self.hidden.parameters(), self.middle.bias):
            p.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(torch.tanh(self.hidden(x)))))


class WithUnused(Perceptron):
    """A layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 5)


class Sometimes(Perceptron):
    """A layer that takes part in every second forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.calls = nn.Linear(FEATURES, CLASSES), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + (self.side(x) if self.calls % 2 else 0.0)


class Normalized(Perceptron):
    """Batch normalization, which differs between training and evaluation, and a dropout that drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(9), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.norm(torch.tanh(self.hidden(x)))))


class Tied(nn.Module):
    """The embedding is the output layer too: (rows, CONTEXT) tokens to (rows, CONTEXT, VOCABULARY)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + functional.gelu(self.hidden(self.norm(x))))


class Recomputed(nn.Module):
    """Three residual blocks, each recomputed in backward by the library's ``checkpointing.checkpoint``."""

    def __init__(self, checkpoint: Callable) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.checkpoint = checkpoint

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = x + self.checkpoint(block, x)
        return self.out(x)


# --- Cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One run. The config is ``{"train_batch_size": ROWS, "optimizer": ADAM}`` unless ``config`` says otherwise."""
    stage: int
    ranks: int
    config: dict[str, Any] = field(default_factory=dict)
    model: type[nn.Module] = Perceptron
    groups: bool = False                        # param groups: matrices, and vectors with a rate and decay of their own
    optimizer: Callable[[Iterable], Optimizer] | None = None    # makes the object that initialize() is given
    schedule: Callable[[Optimizer], Any] | None = None          # the callable that initialize() is given
    scale_wrt_gas: bool = True                  # as backward() takes it
    backward_on_loss: bool = False              # engine.scale(loss).backward() in place of engine.backward(loss)
    evaluates: bool = False                     # also in eval() mode after each step
    loader: str = "none"                        # "client": a DataLoader of the caller's; "engine": training_data


def adam(kind: str = "Adam", **params: Any) -> dict[str, Any]:
    """The ``optimizer`` section with a rate of 0.01."""
    return {"optimizer": {"type": kind, "params": {"lr": 0.01, **params}}}


def sgd(**params: Any) -> dict[str, Any]:
    """The ``optimizer`` section of SGD with a rate of 0.1 and momentum."""
    return {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, **params}}}


def schedule(kind: str, **params: Any) -> dict[str, Any]:
    """The ``scheduler`` section."""
    return {"scheduler": {"type": kind, "params": params}}


WARM = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.02, "warmup_num_steps": 8}
CYCLE = {"cycle_min_lr": 0.002, "cycle_max_lr": 0.02, "cycle_min_mom": 0.85, "cycle_max_mom": 0.95,
         "cycle_first_step_size": 7, "cycle_second_step_size": 5,
         "decay_step_size": 3, "decay_lr_rate": 0.2, "decay_mom_rate": 0.01}
THIRDS = {"gradient_accumulation_steps": 3}
BF16 = {"bf16": {"enabled": True}}

CASES: dict[str, Case] = {
    **{f"stage{stage}_{ranks}_rank{'s' * (ranks > 1)}": Case(stage, ranks) for ranks in (1, 2) for stage in range(4)},

    "warmup_log": Case(1, 1, schedule("WarmupLR", **WARM, warmup_type="log")),
    "warmup_linear": Case(2, 2, schedule("WarmupLR", **WARM, warmup_type="linear")),
    "warmup_decay": Case(0, 2, schedule("WarmupDecayLR", **WARM, total_num_steps=18)),
    "warmup_cosine": Case(3, 2, schedule("WarmupCosineLR", warmup_num_steps=6, total_num_steps=18, cos_min_ratio=0.1)),
    "one_cycle": Case(1, 2, adam(betas=[0.9, 0.99]) | schedule("OneCycle", **CYCLE)),
    "one_cycle_default_betas": Case(1, 2, schedule("OneCycle", **CYCLE)),
    "one_cycle_sgd": Case(0, 1, sgd() | schedule("OneCycle", **CYCLE, cycle_momentum=False)),
    "one_cycle_sgd_momentum": Case(0, 1, sgd() | schedule("OneCycle", **CYCLE)),
    "range_test": Case(2, 1, schedule("LRRangeTest", lr_range_test_min_lr=0.001, lr_range_test_step_size=4,
                                      lr_range_test_step_rate=2.0)),
    "range_test_staircase": Case(3, 1, schedule("LRRangeTest", lr_range_test_min_lr=0.001, lr_range_test_step_size=4,
                                                lr_range_test_step_rate=2.0, lr_range_test_staircase=True)),

    "clipping_off": Case(2, 2, sgd(lr=0.02) | {"gradient_clipping": 0.0}),
    "clipping_small": Case(3, 2, sgd() | {"gradient_clipping": 0.1}),
    "clipping_default_sgd": Case(0, 2, sgd()),
    "clipping_large_stage0": Case(0, 2, sgd(lr=0.02) | {"gradient_clipping": 100.0}),

    **{f"accumulation_stage{stage}": Case(stage, 2, adam("AdamW", weight_decay=0.1) | THIRDS) for stage in range(4)},
    "accumulation_and_warmup": Case(1, 1, THIRDS | schedule("WarmupLR", **WARM)),
    "unscaled_accumulation": Case(2, 2, sgd() | THIRDS, scale_wrt_gas=False),
    "unscaled_accumulation_stage0": Case(0, 2, sgd() | THIRDS, scale_wrt_gas=False),
    "backward_on_loss": Case(2, 2, THIRDS, backward_on_loss=True),

    "micro_batch_size_given": Case(1, 2, {"train_batch_size": None, "train_micro_batch_size_per_gpu": 2} | THIRDS),
    "summed_stage1": Case(1, 2, sgd(lr=0.02) | {"gradient_allreduce_op": "sum"}),
    "summed_stage2": Case(2, 2, sgd(lr=0.02) | {"gradient_allreduce_op": "sum"}),
    "predivided_stage0": Case(0, 2, sgd() | {"prescale_gradients": True, "gradient_predivide_factor": 4.0}),
    "predivided_stage2": Case(2, 2, sgd() | {"prescale_gradients": True, "gradient_predivide_factor": 4.0,
                                             "zero_optimization": {"stage": 2, "reduce_scatter": False}}),
    "persistent_stage3": Case(3, 2, {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 60}}),

    "adam_decays_decoupled": Case(1, 2, adam(weight_decay=0.3)),
    "adam_decays_coupled": Case(2, 2, adam(weight_decay=0.3, adam_w_mode=False)),
    "adamw_ignores_adam_w_mode": Case(0, 1, adam("AdamW", weight_decay=0.3, adam_w_mode=False)),
    "torch_adam": Case(3, 2, adam(torch_adam=True, betas=[0.8, 0.95], eps=1e-6)),
    "sgd_nesterov_decay": Case(3, 2, sgd(nesterov=True, weight_decay=0.1)),
    "adagrad": Case(0, 2, {"optimizer": {"type": "Adagrad", "params": {"lr": 0.05}}}),
    "client_optimizer": Case(2, 2, {"optimizer": None} | schedule("WarmupLR", **WARM),
                             optimizer=partial(torch.optim.AdamW, lr=0.01)),
    "client_optimizer_wins": Case(3, 1, adam(lr=0.5), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.5)),

    "groups_stage0": Case(0, 2, adam(weight_decay=0.2), groups=True),
    "groups_stage2": Case(2, 2, adam("AdamW", weight_decay=0.2) | schedule("WarmupLR", **WARM), groups=True),
    "groups_stage3": Case(3, 2, sgd() | schedule(
        "WarmupLR", warmup_min_lr=[0.0, 0.01], warmup_max_lr=[0.1, 0.05], warmup_num_steps=8), groups=True),
    "tied_stage2": Case(2, 2, adam("AdamW", weight_decay=0.1), model=Tied),
    "tied_stage3": Case(3, 2, adam("AdamW", weight_decay=0.1), model=Tied),
    "frozen_stage1": Case(1, 2, sgd(), model=PartlyFrozen),
    "frozen_stage3": Case(3, 2, model=PartlyFrozen),
    **{f"unused_stage{stage}": Case(stage, 2, model=WithUnused) for stage in (0, 2, 3)},
    **{f"unused_decayed_stage{stage}": Case(stage, 2, adam(weight_decay=0.3), model=WithUnused) for stage in (0, 2, 3)},
    "unused_decayed_1_rank": Case(0, 1, adam(weight_decay=0.3), model=WithUnused),
    **{f"sometimes_stage{stage}": Case(stage, 2, model=Sometimes) for stage in (0, 2, 3)},
    "sometimes_1_rank": Case(0, 1, model=Sometimes),

    **{f"bf16_stage{stage}_1_rank": Case(stage, 1, BF16) for stage in (1, 2, 3)},
    "bf16_stage1": Case(1, 2, BF16),
    "bf16_stage2": Case(2, 2, BF16 | THIRDS),
    "bf16_stage3": Case(3, 2, BF16 | schedule("WarmupLR", **WARM)),

    "recomputed_stage1": Case(1, 2, model=Recomputed),
    "recomputed_stage3": Case(3, 2, model=Recomputed),
    "evaluated_stage0": Case(0, 2, model=Normalized, evaluates=True),
    "evaluated_stage3": Case(3, 2, model=Normalized, evaluates=True),
    "client_loader": Case(1, 2, THIRDS, loader="client"),
    "engine_loader": Case(2, 2, loader="engine"),
    "client_schedule": Case(2, 2, sgd(), schedule=partial(
        torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9 ** step)),
}


# --- Running one ------------------------------------------------------------------------------------------------------


def run_case(deepspeed: Any, name: str) -> dict[str, Any]:
    """The record of one case on this rank; ``deepspeed`` is either library. The process group may exist already."""
    case = CASES[name]
    torch.manual_seed(0)  # the engine's loader shuffles by it
    model = make_model(case, deepspeed.checkpointing.checkpoint)
    parameters = make_groups(case, model)
    dtype = torch.bfloat16 if "bf16" in case.config else torch.float32
    dataset = TensorDataset(*samples(STEPS * ROWS, case.model is Tied, dtype)) if case.loader == "engine" else None
    engine, optimizer, loader, _ = deepspeed.initialize(
        model=model, model_parameters=parameters, training_data=dataset, config=make_config(case),
        optimizer=None if case.optimizer is None else case.optimizer(parameters), lr_scheduler=case.schedule)
    batches = iter(loader) if case.loader == "engine" else micro_batches(case, dtype)
    record: dict[str, Any] = {key: [] for key in ("losses", "evaluated", "norms", "rates", "momenta", "boundaries")}
    for step in range(STEPS):
        note_rates(record, optimizer)
        train_step(record, case, engine, batches)
        if case.evaluates:
            record["evaluated"].append(evaluate(engine, step))
    note_rates(record, optimizer)
    record["boundaries"] = record["boundaries"][:2 * engine.gradient_accumulation_steps()]
    record["counters"] = [engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        record["weights"] = {key: digest(p) for key, p in model.named_parameters()}
    engine.destroy()
    return record


def make_model(case: Case, checkpoint: Callable) -> nn.Module:
    """The model; its weights come from a seed.

    Those for bf16 are numbers of bf16, because DeepSpeed's fp32 master weights start from the rounded ones, and this
    project's from the model's own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = case.model(checkpoint) if case.model is Recomputed else case.model()
    return model.bfloat16().float() if "bf16" in case.config else model


def make_groups(case: Case, model: nn.Module) -> list[Any]:
    """What ``model_parameters`` is given: trained parameters, or two groups of them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not case.groups:
        return trained
    return [{"params": [p for p in trained if p.dim() > 1]},
            {"params": [p for p in trained if p.dim() == 1], "lr": 0.003, "weight_decay": 0.0}]


def make_config(case: Case) -> dict[str, Any]:
    """The config; where a key is None the case does without it."""
    zero = {"stage": case.stage}
    if case.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # DeepSpeed leaves parameters of such a size whole otherwise
    config = {"train_batch_size": ROWS, "zero_optimization": zero, **adam(), **case.config,
              "zero_allow_untested_optimizer": True}  # DeepSpeed has tested its own Adam
    return {key: value for key, value in config.items() if value is not None}


def samples(count: int, tokens: bool, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``count`` inputs and targets: (count, FEATURES) and (count, CLASSES), or twice (count, CONTEXT) tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if tokens:
        drawn = torch.randint(VOCABULARY, (count, CONTEXT + 1), generator=generator)
        return drawn[:, :-1], drawn[:, 1:]
    x, y = torch.randn(count, FEATURES, generator=generator), 3 * torch.randn(count, CLASSES, generator=generator)
    return x.to(dtype), y.to(dtype)


def micro_batches(case: Case, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of all steps."""
    rank, accumulation = dist.get_rank(), case.config.get("gradient_accumulation_steps", 1)
    size = ROWS // case.ranks // accumulation
    if case.loader == "client":
        dataset = TensorDataset(*samples(STEPS * ROWS, case.model is Tied, dtype))
        yield from DataLoader(dataset, size, sampler=DistributedSampler(dataset, case.ranks, rank, shuffle=False))
        return
    for step in range(STEPS):
        x, y = samples(ROWS, case.model is Tied, dtype, seed=step)
        for start in range(rank * accumulation * size, (rank + 1) * accumulation * size, size):
            yield x[start:start + size], y[start:start + size]


def train_step(record: dict[str, Any], case: Case, engine: Any, batches: Iterator) -> None:
    """One optimizer step; appends to the losses, norms and boundaries of ``record``."""
    total = 0.0
    for _ in range(engine.gradient_accumulation_steps()):
        x, y = next(batches)
        loss = loss_of(engine(x), y)
        if case.backward_on_loss:
            engine.scale(loss).backward()
        else:
            loss = engine.backward(loss, scale_wrt_gas=case.scale_wrt_gas)
        total += float(loss.detach())
        record["boundaries"].append(bool(engine.is_gradient_accumulation_boundary()))
        engine.step()
    norm = engine.get_global_grad_norm()
    record["losses"].append(mean_over_ranks(total))
    record["norms"].append(None if norm is None else float(norm))


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    """The mean squared error, or the cross-entropy where the targets are tokens; fp32."""
    if target.is_floating_point():
        return (out - target).float().square().mean()
    return functional.cross_entropy(out.float().flatten(0, 1), target.flatten())


@torch.no_grad()
def evaluate(engine: Any, step: int) -> float:
    """The loss on other samples in eval() mode, mean over the ranks; the engine trains again afterwards."""
    engine.eval()
    x, y = samples(ROWS, False, torch.float32, seed=500 + step + dist.get_rank())
    loss = float(loss_of(engine(x), y))
    engine.train()
    return mean_over_ranks(loss)


def mean_over_ranks(value: float) -> float:
    """The mean of a number that each rank has one of."""
    mean = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def note_rates(record: dict[str, Any], optimizer: Optimizer) -> None:
    """Append the rate and the momentum of every param group."""
    record["rates"].append([float(group["lr"]) for group in optimizer.param_groups])
    record["momenta"].append([list(group["betas"]) if "betas" in group else group.get("momentum")
                              for group in optimizer.param_groups])


def digest(p: Tensor) -> list[float]:
    """The 2-norm of a tensor and its first and last element, in fp64."""
    flat = p.detach().double().flatten()
    return [float(value) for value in (flat.norm(), flat[0], flat[-1])]


# --- Comparing --------------------------------------------------------------------------------------------------------


FP32 = 1e-5    # relative, after up to 20 steps: both round to 6e-8, but sum in another order
EXACT = 1e-12  # relative: rates and momenta are computed in fp64
# A master weight that is 1e-7 off may lie across a border of bf16's rounding; the weight then jumps by 2**-8 of itself.
BF16_ROUNDS = 1e-3
# On two ranks DeepSpeed also sums gradients in bf16, which rounds each by up to 2**-9; here that is done in fp32.
BF16_SUMS = 1e-2

# Where this project means to differ. Each must fail: once it doesn't, its line has to go.
DIFFERENT = {
    "one_cycle_default_betas": "DeepSpeed's OneCycle also sets betas[1], to 0.99; here it stays what the config says",
    "one_cycle_sgd_momentum": "DeepSpeed's OneCycle leaves SGD's momentum alone; here it cycles",
    "sometimes_stage3": "DeepSpeed uses the gradient of the step before once more; here such a parameter is left out",
}
for name in CASES:
    if name.startswith(("unused_decayed", "sometimes")):
        DIFFERENT.setdefault(name, "DeepSpeed updates what got no gradient with zeros, so decay and momentum go on; "
                                   "here, as in PyTorch, it is left out")


def replay(name: str) -> dict[str, Any]:
    """One case with this project, on this rank."""
    import engine as deepspeed
    with torch.random.fork_rng(devices=[]):  # other tests come after it in this process
        return run_case(deepspeed, name)


@cache
def reference_runs() -> dict[str, Any]:
    return json.loads(REFERENCE.read_text())["runs"]


def assert_close(case: str, what: str, mine: Any, reference: Any, tolerance: float) -> None:
    """Compare two numbers, or two lists of them in any depth."""
    if isinstance(reference, list):
        assert isinstance(mine, list) and len(mine) == len(reference), \
            f"{case}: {what}: {mine} here, {reference} with DeepSpeed"
        for index, (own, other) in enumerate(zip(mine, reference)):
            assert_close(case, f"{what}[{index}]", own, other, tolerance)
    elif reference is None or isinstance(reference, bool):
        assert mine is reference, f"{case}: {what} is {mine!r} here, {reference!r} with DeepSpeed"
    else:
        assert math.isclose(mine, reference, rel_tol=tolerance, abs_tol=tolerance * 1e-3), \
            f"{case}: {what} is {mine!r} here, {reference!r} with DeepSpeed, allowed: {tolerance:g} apart"


def assert_same_run(case: str, mine: dict[str, Any], reference: dict[str, Any], tolerance: float) -> None:
    """Compare two records, step by step; ``reference`` as it is stored, a list of equal entries as one of them."""
    for key in ("rates", "momenta", "boundaries", "losses", "norms", "evaluated"):
        values = reference[key] * (len(mine[key]) if len(reference[key]) == 1 else 1)
        assert len(mine[key]) == len(values), f"{case}: {len(mine[key])} {key} here, {len(values)} with DeepSpeed"
        for step, (own, other) in enumerate(zip(mine[key], values)):
            if key == "norms" and other is None:
                continue  # DeepSpeed has none
            assert_close(case, f"step {step}: {key}", own, other, EXACT if key in ("rates", "momenta") else tolerance)
    assert_close(case, "counters", mine["counters"], reference["counters"], 0.0)
    assert mine["weights"].keys() == reference["weights"].keys(), f"{case}: {list(mine['weights'])} here"
    for name, (norm, *elements) in reference["weights"].items():
        own_norm, *own_elements = mine["weights"][name]
        assert_close(case, f"2-norm of {name}", own_norm, norm, tolerance)
        for own, other in zip(own_elements, elements, strict=True):  # against the size of the parameter
            assert abs(own - other) <= tolerance * max(norm, 0.1), \
                f"{case}: an element of {name} is {own!r} here, {other!r} with DeepSpeed; 2-norm {norm:.3g}"


@pytest.mark.parametrize("case", [
    pytest.param(name, marks=pytest.mark.xfail(reason=DIFFERENT[name], strict=True, raises=AssertionError))
    if name in DIFFERENT else name for name in sorted(CASES, key=lambda name: CASES[name].ranks)])  # few process groups
def test_training_equals_deepspeeds(run_ranks, case):
    config, ranks = CASES[case].config, CASES[case].ranks
    tolerance = FP32 if "bf16" not in config else BF16_ROUNDS if ranks == 1 else BF16_SUMS
    for mine in run_ranks(replay, ranks, case):
        assert_same_run(case, mine, reference_runs()[case], tolerance)


# --- Recording --------------------------------------------------------------------------------------------------------


def record_case(library: str, name: str, output: Path) -> None:
    """In each process of a case: run it; rank 0 leaves the record."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    record = run_case(importlib.import_module(library), name)
    if os.environ["RANK"] == "0":
        output.write_text(json.dumps(record))


def record_all(library: str, names: list[str], output: Path) -> None:
    """Run the cases one after another, each in processes of its own, and write those that ran, a line each."""
    runs, failed = [], []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            one = Path(folder) / "record.json"
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                                   str(CASES[name].ranks), __file__, "--library", library, "--case", name,
                                   "--output", str(one)], capture_output=True, text=True)
            if done.returncode:
                failed.append(name)
                print(f"--- {name}: {done.stderr[-3000:]}", flush=True)
                continue
            record = json.loads(one.read_text())
        print(f"{name}: loss {record['losses'][0]:.6f} to {record['losses'][-1]:.6f}", flush=True)
        runs.append(f'{json.dumps(name)}: {json.dumps(shortened(record), separators=(",", ":"))}')
    version = metadata.version("deepspeed") if library == "deepspeed" else None
    head = json.dumps({"library": library, "version": version, "torch": torch.__version__, "steps": STEPS})
    output.write_text(f'{head[:-1]}, "runs": {{\n' + ",\n".join(runs) + "\n}}\n")
    if failed:
        sys.exit(f"not recorded: {', '.join(failed)}")


def shortened(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` as it is stored (see the top)."""
    short = {}
    for key, values in record.items():
        values = values if key in ("rates", "momenta") else rounded(values)
        constant = isinstance(values, list) and key != "counters" and all(value == values[0] for value in values)
        short[key] = values[:1] if constant else values
    return short


def rounded(values: Any) -> Any:
    """Every float in lists and dictionaries to 8 digits."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.8g}") if isinstance(values, float) else values


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the runs that the tests compare with.")
    parser.add_argument("--library", choices=["deepspeed", "engine"], default="deepspeed")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)  # in the processes of one
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    options = parser.parse_args()
    if options.case:
        record_case(options.library, options.case, options.output)
    else:
        record_all(options.library, options.cases, options.output)


if __name__ == "__main__":
    main()
