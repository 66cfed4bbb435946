"""The grader, and those of its tests that belong to no other file.

    .venv/bin/python -m pytest -q tests/test_grade.py
    .venv/bin/python -m pytest -q tests/test_grade.py --long     every answer below through the whole grader

The first half are tests of this project by which exercises are graded. They measure what a rank really has in memory
and sends, whatever an answer calls. The second half tests the grader: it has to pass the project's own code, and
answers that were written by following its hints; and to fail the mistakes in WRONG.
"""

import ast
import copy
import gc
import importlib
import itertools
import json
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import amp
import checkpointing
import engine as deepspeed
import grade
import schedulers
import test_amp
import test_schedulers
import test_zero
import zero
from test_checkpointing import peak

CPU = torch.device("cpu")
PATIENCE = timedelta(seconds=10)  # for another rank that should not wait; only an answer that does takes so long


# --- A learning-rate schedule -----------------------------------------------------------------------------------------


def warmed_up(steps: int, lr: float = 0.1, **params: Any) -> tuple[torch.optim.Optimizer, Any, list[float]]:
    """An optimizer, its WarmupLR, and the rates of its first steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = schedulers.WarmupLR(optimizer, warmup_num_steps=7, **params)
    return optimizer, schedule, go_on(optimizer, schedule, steps)


def go_on(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), schedule.step()
    return rates


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_a_warmup_goes_on_where_it_was(kind):
    whole = warmed_up(12, warmup_type=kind)[2]
    for cut in range(1, 12):
        before, schedule, _ = warmed_up(cut, warmup_type=kind)
        saved = copy.deepcopy((before.state_dict(), schedule.state_dict()))
        optimizer, schedule, _ = warmed_up(0, warmup_type=kind)
        optimizer.load_state_dict(saved[0]), schedule.load_state_dict(saved[1])
        assert go_on(optimizer, schedule, 12 - cut) == pytest.approx(whole[cut:]), f"state_dict() after {cut} steps"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the optimizer's first step, which PyTorch misses
            schedule = schedulers.WarmupLR(before, warmup_num_steps=7, warmup_type=kind, last_batch_iteration=cut - 1)
            assert go_on(before, schedule, 12 - cut) == pytest.approx(whole[cut:]), f"last_batch_iteration {cut - 1}"


def test_the_top_of_a_warmup_is_the_rate_that_the_optimizer_began_with():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.01, "initial_lr": 0.1}], lr=0.5)
    schedule = schedulers.WarmupLR(optimizer, warmup_num_steps=3)
    assert go_on(optimizer, schedule, 6)[-1] == pytest.approx(0.1)


# --- A loss scale, and dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("consecutive", [False, True])
def test_a_loss_scale_goes_on_where_it_was_after_any_short_history(consecutive):
    settings = {"initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 2, "min_loss_scale": 2.0 ** -20,
                "consecutive_hysteresis": consecutive}
    for overflows in itertools.product((False, True), repeat=7):
        expected = test_amp.rule(overflows, 8, 2, 2, consecutive, 2.0 ** -20)
        for cut in range(8):
            scaler = test_amp.scaler_of(settings)
            for count, overflow in enumerate(overflows):
                if count == cut:
                    state = json.loads(json.dumps(scaler.state_dict()))
                    scaler = test_amp.scaler_of(settings)
                    scaler.load_state_dict(state)
                scaler.update(overflow)
            assert scaler.scale == expected, f"{overflows}, resumed after {cut}: {scaler.scale}, and not {expected}"


def test_an_overflow_at_the_smallest_scale_is_an_error():
    for hysteresis in (1, 3):
        scaler = test_amp.scaler_of({"initial_scale_power": 2, "hysteresis": hysteresis, "min_loss_scale": 1.0})
        for _ in range(hysteresis + 1):
            scaler.update(True, "blocks.0.weight")
        assert scaler.scale == 1.0
        with pytest.raises(amp.MinimumLossScaleError):
            scaler.update(True, "blocks.0.weight")
        assert scaler.scale == 1.0


def test_every_parameter_has_the_dtypes_that_the_config_says():
    kept, safe, other = (nn.Linear(1, 1) for _ in range(3))
    other.count = nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)
    other.fine = nn.Parameter(torch.ones(1, dtype=torch.float64))
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    for half, small, low, added, sent in itertools.product(
            (None, fp16, bf16), (False, True), (fp16, bf16), (None, fp32, bf16), (None, fp32, fp16)):
        config = amp.PrecisionConfig(
            amp.FP16Config(half is fp16, fp16_master_weights_and_grads=small and half is fp16),
            amp.BF16Config(half is bf16, bf16_master_weights_and_grads=small and half is bf16,
                           bf16_optimizer_states=small and half is bf16),
            amp.AutocastConfig(dtype=low), amp.DataTypesConfig(added), sent)
        precision = amp.Precision(config, CPU, [kept], [safe])
        for parameter in (kept.weight, safe.weight, other.weight, other.fine, other.count):
            given = parameter.dtype
            compute = given if half is None else fp32 if parameter is kept.weight else half
            master = compute if half is None or small else fp32
            reduction = sent or (low if parameter is safe.weight else added or master)
            expected = (compute, master, added or master, reduction) if parameter.is_floating_point() else (given,) * 4
            assert tuple(precision.path(parameter)) == expected, f"{config}, a parameter in {given}"


# --- A checkpointed function ------------------------------------------------------------------------------------------


def stretch(x: torch.Tensor, weight: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Several activations, dropout, and an argument by name."""
    return F.dropout(torch.tanh(x @ weight), 0.5).sin().exp() * scale


def outer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A region with a region inside."""
    return checkpointing.checkpoint(stretch, stretch(x, weight), weight, scale=0.5).cos()


def stack(run: Callable, function: Callable, weight: torch.Tensor, layers: int = 6) -> list[Any]:
    """A result, its gradients and the random state after ``layers`` calls."""
    torch.manual_seed(3)
    weight.grad = None
    x = start = torch.rand(32, weight.shape[0]).requires_grad_()
    for _ in range(layers):
        x = run(function, x, weight)
    x.sum().backward()
    return [x.detach(), start.grad, weight.grad, torch.get_rng_state()]


def plainly(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def test_a_checkpointed_function_equals_plain_autograd():
    weight = torch.randn(32, 32, requires_grad=True)
    for function in (stretch, outer):
        expected = stack(plainly, function, weight)
        results = stack(checkpointing.checkpoint, function, weight)
        for what, a, b in zip(("result", "input's gradient", "weight's gradient", "random state"), results, expected):
            assert torch.equal(a, b), f"{what} of {function.__name__} is off by {(a - b).abs().max()}"


def test_a_checkpointed_function_trains_its_parameters_where_no_input_needs_a_gradient():
    layer = nn.Linear(4, 4)
    expected, = torch.autograd.grad(layer(torch.ones(2, 4)).tanh().sum(), layer.weight)
    checkpointing.checkpoint(lambda x: layer(x).tanh(), torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None, "the weight has no gradient"
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpointed_function_runs_under_the_autocast_of_its_call(inside):
    weight, seen = torch.randn(8, 8, requires_grad=True), []

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x @ weight
        seen.append(y.dtype)
        return y.exp()

    def gradient(run: Callable) -> torch.Tensor:
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss = run(function, torch.ones(2, 8) / 8).float().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            loss.backward()
        return weight.grad

    expected = gradient(plainly)
    assert torch.equal(gradient(checkpointing.checkpoint), expected), "the gradient is another one"
    assert set(seen) == {torch.bfloat16 if inside else torch.float32}, f"runs in {seen}"


def test_a_checkpointed_function_runs_twice():
    calls = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        for _ in range(6):
            x = x.sin().exp()
        return x

    checkpointing.checkpoint(function, torch.ones(2, requires_grad=True)).sum().backward()
    assert len(calls) == 2, f"the function ran {len(calls)} times"


def test_a_checkpointed_function_keeps_its_inputs_only():
    weight = torch.randn(64, 64, requires_grad=True)
    without = peak(lambda: stack(plainly, stretch, weight, layers=12))
    held = peak(lambda: stack(checkpointing.checkpoint, stretch, weight, layers=12))
    assert held < 0.6 * without, f"{held / without:.0%} of the memory without recomputation"


def test_a_checkpointed_function_does_nothing_without_grad_mode():
    calls = []
    with torch.no_grad():
        y = checkpointing.checkpoint(lambda x: calls.append(1) or x.exp(), torch.ones(2, requires_grad=True))
    assert not y.requires_grad and calls == [1]


# --- What a rank really holds and sends -------------------------------------------------------------------------------


class Wire(TorchDispatchMode):
    """Elements that this rank sends, by the table's count, and ``log``, to which each collective adds its name.

    Whichever of torch.distributed's functions is called, it ends in operations that a mode sees.
    """

    def __init__(self, log: list[str] | None = None):
        super().__init__()
        self.elements, self.log = 0, [] if log is None else log

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = operation.overloadpacket.__name__.replace("_", "")
        if operation.namespace in ("c10d", "_c10d_functional") and not name.startswith(("recv", "wait", "wrap")):
            largest = max(sum(t.numel() for t in tree_leaves(a) if isinstance(t, torch.Tensor)) for a in args)
            ranks = dist.get_world_size()
            times = 2 if name.startswith("allreduce") else 1
            self.elements += largest if name == "send" else times * largest * (ranks - 1) // ranks
            self.log.append(name)
        return operation(*args, **(kwargs or {}))


def storages() -> dict[int, torch.Tensor]:
    """A tensor for each storage that lives in this process."""
    gc.collect()
    found = {}
    with torch._C.DisableTorchFunctionSubclass():
        for thing in [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]:
            if type(thing) is not zero.TakenGradient and thing.device == CPU:
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None and type(tensor) is not zero.TakenGradient:
                        found[tensor.untyped_storage()._cdata] = tensor.detach()
    return found


def held(but: dict[int, torch.Tensor]) -> int:
    """Bytes of all storages that are not among ``but``."""
    return sum(t.untyped_storage().nbytes() for key, t in storages().items() if key not in but)


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    return test_zero.storage_bytes(t for optimizer in optimizers for entry in optimizer.state.values()
                                   for t in entry.values() if isinstance(t, torch.Tensor) and t.dim())


def waited_for(communicator: Any, what: str) -> bool:
    """Whether the other rank said so in time."""
    try:
        dist.distributed_c10d._get_default_store().wait([f"{what} {communicator.number}"], PATIENCE)
    except RuntimeError:
        return False
    return True


def say(communicator: Any, what: str) -> None:
    dist.distributed_c10d._get_default_store().set(f"{what} {communicator.number}", "1")


# --- Collectives ------------------------------------------------------------------------------------------------------


def slices_of_a_sum(add: bool):
    """What a reduce-scatter of (rank + 1) times 0, 1, 2, ... leaves on this rank."""
    communicator = zero.Communicator(CPU)
    ranks, size = dist.get_world_size(), 64
    out = torch.ones(size)
    flat = torch.arange(ranks * size, dtype=torch.float32) * (dist.get_rank() + 1)
    communicator.reduce_scatter(flat, out, add).wait()
    return out


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_reduce_scatter_gives_each_rank_its_slice_of_the_sum(run_ranks, world_size):
    total = torch.arange(world_size * 64.0) * sum(range(1, world_size + 1))
    for add in (False, True):
        for rank, out in enumerate(run_ranks(slices_of_a_sum, world_size, add)):
            assert torch.equal(out, total.chunk(world_size)[rank] + add), f"rank {rank} of {world_size}, add {add}"


def returns_at_once() -> tuple[bool, int]:
    """Whether rank 0's reduce-scatter returned before rank 1 began its own; elements on their way by then."""
    communicator = zero.Communicator(CPU)
    early = dist.get_rank() == 0 or waited_for(communicator, "returned")
    with Wire() as wire:
        handle = communicator.reduce_scatter(torch.ones(2**18), torch.empty(2**17), False)
    if dist.get_rank() == 0:
        say(communicator, "returned")
    handle.wait()
    return early, wire.elements


def test_a_reduce_scatter_returns_at_once(run_ranks):
    for early, sent in run_ranks(returns_at_once, 2):
        assert early, "rank 0 waits for rank 1 inside the call"
        assert sent == 2**17, f"{sent} elements are on their way when the call returns, and not {2**17}"


def sent_and_counted(stage: int) -> tuple[int, int]:
    """Elements that a step sends, and those that the communicator has counted."""
    engine = test_zero.train_wide(stage, steps=1)
    traffic = engine.zero.communicator.traffic
    before = sum(record.elements for record in traffic.values())
    with Wire() as wire:
        engine.backward(engine(torch.randn(2, 64)).square().mean())
        engine.step()
    return wire.elements, sum(record.elements for record in traffic.values()) - before


def test_what_is_counted_is_what_is_sent(run_ranks):
    for stage in (0, 1, 2):
        for sent, counted in run_ranks(sent_and_counted, 2, stage):
            assert sent == counted, f"stage {stage}: {sent} elements went out, and {counted} were counted"


def another_order(stage: int):
    """The largest error of the weights after two steps in which each rank goes through the layers in its own order."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    reference = copy.deepcopy(model)

    def run(layers: nn.ModuleList, rank: int, step: int) -> torch.Tensor:
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2 * step + rank))
        for index in (range(4), (2, 0, 3, 1))[rank]:
            x = layers[index](x).tanh()
        return x.square().mean()

    model.forward = lambda step: run(model, dist.get_rank(), step)
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.0, "zero_optimization": {
            "stage": stage, "reduce_bucket_size": 1}, "optimizer": {"type": "SGD", "params": {"lr": 1.0}}})
    optimizer = torch.optim.SGD(reference.parameters(), lr=1.0)
    for step in range(2):
        engine.backward(engine(step))
        engine.step()
        for rank in range(2):
            (run(reference, rank, step) / 2).backward()
        optimizer.step(), optimizer.zero_grad()
    return max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), reference.parameters()))


def test_gradients_that_come_in_another_order_on_each_rank(run_ranks):
    for stage in (0, 1, 2):
        for rank, error in enumerate(run_ranks(another_order, 2, stage)):
            assert error < 1e-6, f"stage {stage}, rank {rank}: weights are off by {error:.3g}"


def two_buckets(overlap: bool = True) -> tuple[nn.Module, Any, list[str]]:
    """A model of two buckets at stage 0, and a list to which each finished gradient adds its name."""
    torch.manual_seed(0)
    model, log = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: log.append("gradient"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = zero.ZeroConfig(stage=0, reduce_bucket_size=4200, overlap_comm=overlap)
    mine = zero.Zero(model, optimizer, config, CPU)
    assert len(mine.buckets) == 2
    return model, mine, log


def overlapping(overlap: bool) -> tuple[list[str], bool]:
    """What happened during a backward pass, and whether rank 0 ended its own before rank 1 began."""
    model, mine, log = two_buckets(overlap)
    early = dist.get_rank() == 0 or waited_for(mine.communicator, "backward")
    with Wire(log):
        model(torch.ones(1, 64)).square().mean().backward()
    if dist.get_rank() == 0:
        say(mine.communicator, "backward")
    mine.finish_backward()
    mine.step(divisor=2)
    return log, early


def test_full_buckets_go_out_while_backward_runs(run_ranks):
    for log, early in run_ranks(overlapping, 2, True):
        last = len(log) - 1 - log[::-1].index("gradient")
        assert "allreduce" in log[:last], f"nothing is sent before the last gradient: {log}"
        assert early, "backward on rank 0 waits for that of rank 1"
    for log, _ in run_ranks(overlapping, 2, False):
        assert set(log) == {"gradient"}, f"overlap_comm is false, and backward does this: {log}"


def held_after_backward() -> tuple[int, int]:
    """Bytes of a model with its gradients, after backward and before the step, and its parameters."""
    before = storages()
    model, mine, _ = two_buckets()
    for _ in range(2):
        model(torch.ones(1, 64)).square().mean().backward()
        mine.finish_backward()
        kept = held(before)
        mine.step(divisor=2)
    return kept, sum(p.numel() for p in model.parameters())


def test_gradients_are_kept_once(run_ranks):
    for rank, (kept, count) in enumerate(run_ranks(held_after_backward, 2)):
        assert kept < 1.1 * 8 * count, \
            f"rank {rank} has {kept / count:.2f} bytes per parameter; weights and gradients are 8"


# --- Stage 3 ----------------------------------------------------------------------------------------------------------


def late_gathers() -> tuple[float, int, int]:
    """Training where nothing arrives before it is waited for: the weights' error; gathers begun, and waited for."""
    torch.manual_seed(0)
    model = test_zero.Wide(2, 16)
    reference = copy.deepcopy(model)

    def groups(net: nn.Module) -> list[dict]:  # two groups: each unit has two buckets
        return [{"params": [p for p in net.parameters() if (p.dim() > 1) == matrices]} for matrices in (True, False)]

    theirs = torch.optim.SGD(groups(reference), lr=0.1)
    mine = zero.Zero(model, torch.optim.SGD(groups(model), lr=0.1), zero.ZeroConfig(stage=3), CPU)
    assert all(len(unit.buckets) != 1 for unit in mine.units)
    gather, counts = mine.communicator.all_gather, {"begun": 0, "ended": 0}

    def late(flat: torch.Tensor, what: Callable[[], str] = str) -> zero.Handle:
        for rank in mine.communicator._others():
            mine.communicator.shard_of(flat, rank).fill_(torch.nan)
        counts["begun"] += 1

        def arrive() -> None:
            assert flat.untyped_storage().nbytes(), "the memory is gone before the gather has ended"
            counts["ended"] += 1
            gather(flat, what).wait()

        return zero.Handle(mine.communicator, finish=arrive)

    mine.communicator.all_gather = late
    for step in range(2):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        for net in (model, reference):
            net(x).square().mean().backward()
        mine.finish_backward()
        mine.step(divisor=2)
        theirs.step(), theirs.zero_grad()
    unit, before = next(unit for unit in mine.units if unit.buckets), counts["begun"]
    unit.start_gather()  # a prefetch that nobody will come for
    assert counts["begun"] == before + len(unit.buckets), "start_gather() leaves gathers to be started later"
    unit.free()
    with zero.GatheredParameters(list(model.parameters())):
        error = max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), reference.parameters()))
    return error, counts["begun"], counts["ended"]


def test_gathers_may_come_late(run_ranks):
    for rank, (error, begun, ended) in enumerate(run_ranks(late_gathers, 2)):
        assert error < 1e-6, f"rank {rank}: weights are off by {error:.3g}"
        assert begun == ended, f"rank {rank}: {begun} gathers began, and {ended} were waited for"


def held_at_stage_3() -> tuple[int, int, float]:
    """By how many bytes this rank grows in evaluation; those of the largest unit; bytes per parameter between steps."""
    before, most = storages(), []

    def watch(engine: Any) -> None:
        if not engine.module.training:
            most.append(held(before))

    engine = test_zero.train_wide(3, watch=watch, stage3_prefetch_bucket_size=10**9)
    engine.zero.communicator.spare.by_size.clear()
    between = held(before)
    engine.eval()
    with torch.no_grad():
        engine(torch.randn(2, 64))
    count = sum(unit.numel for unit in engine.zero.units)
    return max(most) - between, 4 * max(unit.numel for unit in engine.zero.units), between / count


def test_evaluation_holds_two_units_at_most(run_ranks):
    for rank, (grown, unit, _) in enumerate(run_ranks(held_at_stage_3, 2)):
        assert grown < 2.5 * unit, f"rank {rank} holds {grown / unit:.1f} units in evaluation"


def test_stage_3_keeps_shards_alone_between_steps(run_ranks):
    for rank, (*_, kept) in enumerate(run_ranks(held_at_stage_3, 2)):
        assert kept < 1.1 * 16 / 2, f"rank {rank} of 2 holds {kept:.2f} bytes per parameter; its shards are 8"


# --- Stage 1 without the engine ---------------------------------------------------------------------------------------


class Awkward(nn.Module):
    """Two layers with one weight, a layer that some ranks use at some steps, and one that nobody uses."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.second.weight = self.first.weight
        self.side, self.unused = nn.Linear(width, 3), nn.Linear(width, 2)

    def forward(self, x: torch.Tensor, side: bool) -> torch.Tensor:
        y = self.out(self.second(self.first(x).tanh()).tanh())
        return y + self.side(x) if side else y


def started(width: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(dist.get_rank())  # ranks start from different weights: rank 0's must win
    model = Awkward(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, weight_decay=0.5)
    return model, optimizer, zero.Zero(model, optimizer, zero.ZeroConfig(stage=1), CPU)


def by_hand(width: int, accumulation: int, clip: float, scale: float = 1.0, bad: int | None = None):
    """Four steps with ``zero.Zero`` alone: what ``assert_plain`` compares, and the elements that the last one sent.

    scale   what the loss is larger by; ``bad`` is the step at which rank 1's is infinite
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    reference = Awkward(width)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01, eps=1e-3, weight_decay=0.5)
    model, _, mine = started(width)

    def loss(net: nn.Module, step: int, micro: int, r: int) -> torch.Tensor:
        x = torch.randn(2, width, generator=torch.Generator().manual_seed(100 * step + 10 * micro + r))
        factor = float("inf") if (step, r) == (bad, 1) else scale
        return net(x, side=(step, r) == (1, 1)).square().mean() / accumulation * factor

    rows = []
    for step in range(4):
        with Wire() as wire:
            for micro in range(accumulation):
                mine.boundary = micro == accumulation - 1
                loss(model, step, micro, rank).backward()
                mine.finish_backward()
            result = mine.step(clip=clip, divisor=ranks * scale)
        for micro, r in itertools.product(range(accumulation), range(ranks)):
            (loss(reference, step, micro, r) / ranks / scale).backward()
        norm = float(nn.utils.clip_grad_norm_(reference.parameters(), clip or 1e9))
        if step != bad:
            theirs.step()
        theirs.zero_grad()
        error = max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), reference.parameters()))
        rows.append((step == bad, result.overflow, norm, result.norm, error))
    return rows, wire.elements, sum(p.numel() for p in model.parameters())


def assert_plain(results: list) -> None:
    for rank, (rows, *_) in enumerate(results):
        for step, (bad, overflow, expected, norm, error) in enumerate(rows):
            where = f"rank {rank}, step {step}"
            assert bad == overflow, f"{where}: overflow is {overflow}"
            assert bad or abs(norm - expected) < 1e-5, f"{where}: norm {norm}, plain PyTorch {expected}"
            assert error < 1e-5, f"{where}: weights are off by {error:.3g}"


def test_stage_1_by_hand_equals_plain_pytorch(run_ranks):
    for world_size, clip, scale in ((2, 0.0, 1.0), (2, 0.1, 8.0), (3, 0.1, 1.0), (2, 100.0, 1.0)):
        assert_plain(run_ranks(by_hand, world_size, 7, 1, clip, scale))


def test_stage_1_by_hand_leaves_out_a_step_that_is_not_finite(run_ranks):
    assert_plain(run_ranks(by_hand, 2, 7, 1, 0.1, 1.0, 2))


def test_stage_1_by_hand_accumulates(run_ranks):
    results = run_ranks(by_hand, 2, 7, 3, 0.1)
    assert_plain(results)
    window, once = results[0][1], run_ranks(by_hand, 2, 7, 1, 0.1)[0][1]
    assert window == once, f"{window} elements for a window of 3 micro-batches, {once} for one micro-batch"


def kept_by_hand(width: int):
    """After two steps: bytes per parameter, in all, and of the optimizer's state; other optimizers' bytes of state; and
    the part of the weights that is there a second time.
    """
    before = storages()
    others = {id(o) for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer)}
    model, optimizer, mine = started(width)
    for _ in range(2):
        model(torch.ones(1, width), False).square().mean().backward()
        mine.finish_backward()
        mine.step(divisor=dist.get_world_size())
    mine.communicator.spare.by_size.clear()  # room to receive into, which is not a part of the answer
    kept = {key: t for key, t in storages().items() if key not in before}
    foreign = [o for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer) and id(o) not in others
               and o is not optimizer]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    flats = [torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).float() for key, t in kept.items()
             if key not in own]
    copied = torch.isin(weights, torch.cat(flats)).float().mean()
    return [float(x) for x in (test_zero.storage_bytes(kept.values()) / len(weights),
                               state_bytes([optimizer]) / len(weights), state_bytes(foreign), copied)]


def test_stage_1_by_hand_shards_the_optimizer(run_ranks):
    results = run_ranks(kept_by_hand, 3, 100)
    for rank, (_, state, foreign, _) in enumerate(results):
        assert state < 1.05 * 8 / 3, \
            f"rank {rank} of 3 holds {state:.2f} bytes of optimizer state per parameter; 8 / 3 are its third"
        assert foreign == 0, f"rank {rank} has another optimizer, which holds {foreign} bytes of state"
    used = sum(state for _, state, *_ in results) / 8  # of the layers that have gradients
    assert 0.9 < used < 1.01, f"all ranks together hold the state of {used:.0%} of the parameters"


def test_stage_1_by_hand_keeps_nothing_else(run_ranks):
    for rank, (kept, _, _, copied) in enumerate(run_ranks(kept_by_hand, 3, 100)):
        assert kept < 1.05 * (4 + 4 + 8 / 3), \
            f"rank {rank} of 3 holds {kept:.2f} bytes per parameter; weights, gradients and its state are 10.67"
        assert copied < 1 / 3 + 0.05, f"rank {rank} of 3 has {copied:.0%} of the weights a second time"


def test_stage_1_by_hand_sends_as_much_as_an_all_reduce(run_ranks):
    for rank, (_, sent, count) in enumerate(run_ranks(by_hand, 2, 100, 1, 0.0)):
        assert 0.95 * count < sent < 1.05 * count, \
            f"rank {rank} of 2 sent {sent / count:.2f} elements per parameter; 1 is an all-reduce's"


# --- Answers ----------------------------------------------------------------------------------------------------------

SCHEDULE = '''
from schedulers import *

class WarmupLR(Schedule):
    def __init__(self, optimizer, warmup_min_lr=0.0, warmup_max_lr=None, warmup_num_steps=1000, warmup_type="log",
                 last_batch_iteration=-1):
        if warmup_max_lr is None:
            warmup_max_lr = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.low, self.high = _range(optimizer, "warmup_min_lr", warmup_min_lr, "warmup_max_lr", warmup_max_lr)
        self.steps, self.type = max(2, warmup_num_steps), warmup_type
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, t, group):
        k = max(t - 1, 0)
        up = k / self.steps if self.type == "linear" else math.log(k + 1) / math.log(self.steps)
        return self.low[group] + (self.high[group] - self.low[group]) * min(1.0, up)
'''

SCALER = '''
class DynamicLossScaler(LossScaler):
    def __init__(self, scale, window, hysteresis, consecutive, minimum):
        super().__init__(scale)
        self.window, self.hysteresis, self.consecutive, self.minimum = window, hysteresis, consecutive, minimum
        self.left, self.good = hysteresis, 0

    def update(self, overflow, culprit=None):
        if overflow:
            self.good = 0
            if self.left > 1:
                self.left -= 1
            elif self.scale <= self.minimum:
                raise MinimumLossScaleError(f"the gradient of {culprit} is not finite. Use bf16")
            else:
                self.scale = max(self.minimum, self.scale / 2)
        else:
            if self.good and self.good % self.window == 0:
                self.scale *= 2
                self.left = self.hysteresis
            if self.consecutive:
                self.left = self.hysteresis
            self.good += 1

    def state_dict(self):
        return {"scale": self.scale, "left": self.left, "good": self.good}
'''

PATH = '''
class Precision:
    def path(self, parameter):
        given = parameter.dtype
        if not parameter.is_floating_point():
            return Dtypes(given, given, given, given)
        compute = master = given
        if self.half:
            compute = torch.float32 if id(parameter) in self.kept else self.half
            small = self.config.fp16.fp16_master_weights_and_grads or self.config.bf16.bf16_master_weights_and_grads
            master = compute if small else torch.float32
        gradient = self.config.data_types.grad_accum_dtype or master
        low = self.config.torch_autocast.dtype if id(parameter) in self.low else None
        return Dtypes(compute, master, gradient, self.config.communication_data_type or low or gradient)
'''

CHECKPOINT = '''
import torch
from torch.utils._pytree import tree_map
from checkpointing import *

def checkpoint(function, *args, **kwargs):
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    state, slots, found = torch.get_rng_state(), [], {}
    autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    def pack(tensor):
        slots.append(None)
        return len(slots) - 1

    def unpack(slot):
        if slot not in found:
            recompute()
        return found.pop(slot)

    def recompute():
        tensors = []
        again = tree_map(lambda a: a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a,
                         (args, kwargs))
        keep = saved_tensors_hooks(lambda tensor: tensors.append(tensor.detach()), lambda nothing: nothing)
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), keep, torch.autocast("cpu", *autocast):
            torch.set_rng_state(state)
            function(*again[0], **again[1])
        found.update(enumerate(tensors))

    with saved_tensors_hooks(pack, unpack):
        return function(*args, **kwargs)
'''

REDUCE_SCATTER = '''
class Communicator:
    def reduce_scatter(self, flat, out, add, what=str):
        parts = {self.rank: self.shard_of(flat)}
        works = []
        if self.world_size > 1:
            self._begin("reduce-scatter", flat, 1, what)
            tag = self._tag("reduce-scatter")
        for other in self._others():
            parts[other] = torch.empty_like(parts[self.rank])
            works.append(dist.irecv(parts[other], other, tag=tag))
            works.append(dist.isend(self.shard_of(flat, other), other, tag=tag))
        return Handle(self, works, lambda: _sum([parts[rank] for rank in sorted(parts)], out, add))
'''

ALL_REDUCE_INSTEAD = '''
class Communicator:
    def reduce_scatter(self, flat, out, add, what=str):
        return self.all_reduce(flat, "reduce-scatter", lambda: _sum([self.shard_of(flat)], out, add), what)
'''

SENDS_LATE = '''
class Communicator:
    def reduce_scatter(self, flat, out, add, what=str):
        def everything():
            parts, works = {self.rank: self.shard_of(flat)}, []
            if self.world_size > 1:
                self._begin("reduce-scatter", flat, 1, what)
                tag = self._tag("reduce-scatter")
            for other in self._others():
                parts[other] = torch.empty_like(parts[self.rank])
                works.append(dist.irecv(parts[other], other, tag=tag))
                works.append(dist.isend(self.shard_of(flat, other), other, tag=tag))
            for work in works:
                work.wait()
            _sum([parts[rank] for rank in sorted(parts)], out, add)

        return Handle(self, finish=everything)
'''

BY_OTHER_MEANS = '''
class Communicator:
    def reduce_scatter(self, flat, out, add, what=str):
        all_ = [torch.empty_like(flat) for _ in range(self.world_size)]
        if self.world_size > 1:
            self._begin("reduce-scatter", flat, 1, what)
            {exchange}
        else:
            all_[0].copy_(flat)
        parts = [self.shard_of(each) for each in all_]
        return Handle(self, finish=lambda: _sum(parts, out, add))
'''

BUCKETS = '''
class Communicator:
    def all_reduce(self, tensor, kind="all-reduce", finish=None, what=str):
        if self.world_size == 1:
            return Handle(self, finish=finish)
        self._begin(kind, tensor, 2, what)
        return Handle(self, [dist.all_reduce(tensor, group=self._reductions, async_op=True)], finish)

class Gradients:
    def take(self, slot, gradient):
        self.used.add(slot)
        self.arrived.add(slot)
        if self.life in (Life.SENDING, Life.SENT):
            self.late[slot] = gradient if slot not in self.late else self.late[slot] + gradient
            return
        self._prepare_buffer()
        place = slot.view(self.buffer)
        place.add_(gradient) if slot in self.filled else place.copy_(gradient)
        self.filled.add(slot)

class Reducer:
    def launch_ready(self):
        if self.zero.config.overlap_comm and self.reduces_now:
            while self.queue and self.queue[0].complete:
                self.launch(self.queue.popleft())
'''

AS_THEY_COME = '''
            for gradients in [gradients for gradients in self.queue if gradients.complete]:
                self.queue.remove(gradients)
                self.launch(gradients)
'''

STAGE_1 = '''
import torch

class Zero:
    @torch.no_grad()
    def __init__(self, model, optimizer, config, device):
        self.optimizer, self.communicator = optimizer, Communicator(device)
        self.parameters = list(model.parameters())
        count, ranks = sum(p.numel() for p in self.parameters), self.communicator.world_size
        self.flat = torch.zeros(-(-count // ranks) * ranks)
        for p, place in zip(self.parameters, self.places(self.flat)):
            place.copy_(p)
            p.data = place
        self.communicator.broadcast(self.flat, 0)
        self.parts = list(self.parts_of(self.communicator.shard_of(self.flat)))
        self.pieces = [nn.Parameter(part) for _, part in self.parts]
        optimizer.param_groups[0]["params"] = self.pieces

    def places(self, flat):
        start = 0
        for p in self.parameters:
            yield flat[start:start + p.numel()].view(p.shape)
            start += p.numel()

    def parts_of(self, shard):
        start = -self.communicator.rank * shard.numel()
        for number, p in enumerate(self.parameters):
            part = shard[max(start, 0):max(start + p.numel(), 0)]
            start += p.numel()
            if part.numel():
                yield number, part

    def finish_backward(self):
        pass

    @torch.no_grad()
    def step(self, clip=0.0, divisor=1.0, skip_overflow=True):
        gradients = torch.zeros_like(self.flat)
        shard = self.communicator.shard_of(gradients)
        message = torch.tensor([0.0] + [float(p.grad is not None) for p in self.parameters])
        for p, place in zip(self.parameters, self.places(gradients)):
            if p.grad is not None:
                place.copy_(p.grad)
                p.grad = None
        self.communicator.reduce_scatter(gradients, shard, add=False).wait()
        shard /= divisor
        message[0] = shard.square().sum()
        self.communicator.all_reduce(message).wait()
        square, *used = message.tolist()
        norm = square ** 0.5
        coefficient = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        if skip_overflow and not math.isfinite(norm):
            return StepResult(norm, coefficient, True, None)
        for (number, part), piece in zip(self.parts_of(shard), self.pieces):
            piece.grad = part * coefficient if used[number] else None
        self.optimizer.step()
        for piece in self.pieces:
            piece.grad = None
        self.communicator.all_gather(self.flat).wait()
        return StepResult(norm, coefficient, False, None)
'''

STAGE_3 = '''
class Bucket:
    def start_gather(self):
        self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        self.communicator.shard_of(self.flat).copy_(self.shard)
        self.gather = self.communicator.all_gather(self.flat, self.label)

    def free(self):
        self.gather.wait()
        self.flat.untyped_storage().resize_(0)

class Unit:
    def start_gather(self):
        self.state = UnitState.GATHERING
        for bucket in self.buckets:
            bucket.start_gather()

    def finish_gather(self):
        self.state = UnitState.WHOLE
        for bucket in self.buckets:
            bucket.gather.wait()
            for slot in bucket.slots:
                slot.parameter.__class__ = slot.kind

    def free(self):
        self.state = UnitState.SHARDED
        for bucket in self.buckets:
            bucket.free()
            for slot in bucket.slots:
                slot.parameter.__class__ = ShardedParameter

    def acquire(self, user):
        self.users.add(user)
        if self.state is UnitState.SHARDED:
            self.start_gather()
        if self.state is UnitState.GATHERING:
            self.finish_gather()

    def release(self, user):
        self.users.discard(user)
        if not self.users and self.state is not UnitState.SHARDED:
            self.free()
'''

RIGHT = {"schedulers:WarmupLR": SCHEDULE, "amp:DynamicLossScaler": SCALER, "amp:Precision.path": PATH,
         "checkpointing:checkpoint": CHECKPOINT, "zero:reduce_scatter": REDUCE_SCATTER,
         "zero:bucketed_all_reduce": BUCKETS, "zero:stage_1": STAGE_1, "zero:stage_3": STAGE_3}


def changed(text: str, *pairs: str) -> str:
    """``text`` with each of the pairs' first strings, which must be there, replaced by its second one."""
    for before, after in zip(pairs[::2], pairs[1::2], strict=True):
        assert before in text, before
        text = text.replace(before, after)
    return text


SCATTER = "self.communicator.reduce_scatter(gradients, shard, add=False).wait()"
GATHER = "        self.communicator.all_gather(self.flat).wait()\n"
SUM = "self.communicator.all_reduce(gradients).wait()"
DATA_PARALLEL = changed(
    STAGE_1, "self.parts_of(self.communicator.shard_of(self.flat))", "enumerate(self.places(self.flat))",
    "self.parts_of(shard)", "enumerate(self.places(gradients))", SCATTER, SUM, "shard /= divisor",
    "gradients /= divisor", GATHER, "")
OWN_ADAM = changed(
    STAGE_1, '        optimizer.param_groups[0]["params"] = self.pieces\n',
    '        optimizer.param_groups[0]["params"] = self.pieces\n'
    "        self.whole = [nn.Parameter(place) for place in self.places(self.flat)]\n"
    '        settings = {key: optimizer.defaults[key] for key in ("lr", "eps", "weight_decay")}\n'
    "        self.optimizer = type(optimizer)(self.whole, **settings)\n",
    SCATTER, SUM, "shard /= divisor", "gradients /= divisor",
    "zip(self.parts_of(shard), self.pieces)", "zip(enumerate(self.places(gradients)), self.whole)",
    "for piece in self.pieces:", "for piece in self.whole:", GATHER, "")


def stage_1(asks: str, test: Callable, *pairs: str) -> tuple:
    return "zero:stage_1", changed(STAGE_1, *pairs), asks, test


PLAIN = "training equals plain PyTorch on the whole batch, with clipping"
TRAFFIC_OF_1 = "no more traffic than plain data parallelism"
RESUMED = "a warm-up that is resumed goes on where it was"
PATHS = "the four dtypes of every parameter, under every config"
OVERLAP = "full buckets go out while backward runs, and with overlap_comm false after it"
AT_ONCE = "it begins to send at once, and returns before the other ranks have called it"
WAITS = "every bucket's gather begins early, and is waited for before use and before its memory goes"


def as_deepspeed() -> None:
    with mock.patch.dict(schedulers.SCHEDULES, WarmupLR=schedulers.WarmupLR):  # made when the module was imported
        test_schedulers.test_rates_and_momenta_equal_deepspeeds(test_schedulers.TRACES[0])


# The mistakes: the exercise, the answer, what the grader asks where it fails, and a test that finds it, given a
# run_ranks. Those whose test needs no processes are tried by default, the others where they are the first of theirs.
WRONG: dict[str, tuple[str, str, str, Callable]] = {
    "a schedule one step off": (
        "schedulers:WarmupLR", changed(SCHEDULE, "max(t - 1, 0)", "t"), "the same rates as DeepSpeed, at every step",
        lambda run: as_deepspeed()),
    "a warm-up that starts over on resume": (
        "schedulers:WarmupLR", changed(SCHEDULE, "(optimizer, last_batch_iteration)", "(optimizer)"), RESUMED,
        lambda run: test_a_warmup_goes_on_where_it_was("log")),
    "a warm-up that counts its own calls": (
        "schedulers:WarmupLR", changed(
            SCHEDULE, "        k = max(t - 1, 0)\n",
            "        self.calls = getattr(self, 'calls', -1) + 1\n        k = max(self.calls - 1, 0)\n"), RESUMED,
        lambda run: test_a_warmup_goes_on_where_it_was("linear")),
    "a top taken from the rate of the moment": (
        "schedulers:WarmupLR", changed(SCHEDULE, 'group.get("initial_lr", group["lr"])', 'group["lr"]'),
        "each param group ends at its own rate",
        lambda run: test_the_top_of_a_warmup_is_the_rate_that_the_optimizer_began_with()),
    "a loss scale that never grows": (
        "amp:DynamicLossScaler", changed(SCALER, "self.scale *= 2", "pass"),
        "the scale after any history is DeepSpeed's, to the last bit",
        lambda run: test_amp.test_the_scale_is_deepspeeds_to_the_last_bit(test_amp.TRACES[0])),
    **{f"a loss scale that forgets {what}": (
        "amp:DynamicLossScaler", changed(SCALER, state, ""),
        "the rule holds for any window and hysteresis, and after resuming",
        lambda run: test_a_loss_scale_goes_on_where_it_was_after_any_short_history(False))
       for what, state in (("its good steps", ', "good": self.good'), ("its hysteresis", ', "left": self.left'))},
    "a loss scale that stays at the minimum in silence": (
        "amp:DynamicLossScaler", changed(
            SCALER, 'raise MinimumLossScaleError(f"the gradient of {culprit} is not finite. Use bf16")', "pass"),
        "an overflow at the smallest scale is an error",
        lambda run: test_an_overflow_at_the_smallest_scale_is_an_error()),
    "master weights in half precision": (
        "amp:Precision.path", changed(PATH, "compute if small else torch.float32", "compute"),
        "masters are the weights as they were before rounding",
        lambda run: test_every_parameter_has_the_dtypes_that_the_config_says()),
    **{f"dtypes that ignore {what}": (
        "amp:Precision.path", changed(PATH, before, after), PATHS,
        lambda run: test_every_parameter_has_the_dtypes_that_the_config_says())
       for what, before, after in (
           ("16-bit masters", "compute if small else torch.float32", "torch.float32"),
           ("bf16's own key", " or self.config.bf16.bf16_master_weights_and_grads", ""),
           ("what autocast reduces", "or low or gradient", "or gradient"),
           ("integers", "not parameter.is_floating_point()", "False"),
           ("what is kept in fp32", "torch.float32 if id(parameter) in self.kept else self.half", "self.half"),
           ("the dtype of accumulation", "self.config.data_types.grad_accum_dtype or master", "master"))},
    "recomputation without the random state": (
        "checkpointing:checkpoint", changed(CHECKPOINT, "            torch.set_rng_state(state)\n", ""),
        "results, gradients and random state of plain autograd, with dropout and nested",
        lambda run: test_a_checkpointed_function_equals_plain_autograd()),
    "a checkpoint that keeps everything": (
        "checkpointing:checkpoint",
        CHECKPOINT[:CHECKPOINT.index("    if not")] + "    return function(*args, **kwargs)\n",
        "memory of the inputs alone", lambda run: test_a_checkpointed_function_keeps_its_inputs_only()),
    "recomputation for every tensor": (
        "checkpointing:checkpoint", changed(CHECKPOINT, "        if slot not in found:\n            recompute()\n",
                                            "        recompute()\n"),
        "it runs twice: once forward, once for backward", lambda run: test_a_checkpointed_function_runs_twice()),
    **{f"recomputation {what}": (
        "checkpointing:checkpoint", changed(CHECKPOINT, ', torch.autocast("cpu", *autocast)', after),
        "autocast is on again in the second run, and off where it was off",
        lambda run, inside=inside: test_a_checkpointed_function_runs_under_the_autocast_of_its_call(inside))
       for what, after, inside in (("without autocast", "", True), ("under the autocast of backward", "", False),
                                   ("always under autocast", ', torch.autocast("cpu", autocast[0])', False))},
    "an all-reduce in place of a reduce-scatter": (
        "zero:reduce_scatter", ALL_REDUCE_INSTEAD, "half the elements of an all-reduce are sent",
        lambda run: test_zero.test_elements_sent_are_those_of_the_table(run, 2, 1)),
    **{f"a reduce-scatter by {what}": (
        "zero:reduce_scatter", BY_OTHER_MEANS.format(exchange=exchange),
        "half the elements of an all-reduce are sent", lambda run: test_what_is_counted_is_what_is_sent(run))
       for what, exchange in (
           ("an all-gather of everything", "dist.all_gather(all_, flat.contiguous())"),
           ("broadcasts of everything", "all_[self.rank].copy_(flat)\n"
            "            for rank in range(self.world_size):\n                dist.broadcast(all_[rank], rank)"),
           ("objects", "dist.all_gather_object(all_, flat)"),
           ("an all-to-all of everything",
            "dist.all_to_all_single(torch.cat(all_), flat.repeat(self.world_size));"
            " dist.all_gather(all_, flat.contiguous())"))},
    "a reduce-scatter that waits before it returns": (
        "zero:reduce_scatter", changed(
            REDUCE_SCATTER, "        return Handle(self, works,",
            "        for work in works:\n            work.wait()\n        return Handle(self, [],"),
        AT_ONCE, test_a_reduce_scatter_returns_at_once),
    "a reduce-scatter that sends when it is waited for": (
        "zero:reduce_scatter", SENDS_LATE, AT_ONCE, test_a_reduce_scatter_returns_at_once),
    "buckets that go out as they come": (
        "zero:bucketed_all_reduce", BUCKETS[:BUCKETS.index("            while")] + AS_THEY_COME,
        "gradients may come in another order on each rank", test_gradients_that_come_in_another_order_on_each_rank),
    **{f"buckets {what}": ("zero:bucketed_all_reduce", changed(BUCKETS, *pairs), OVERLAP,
                           test_full_buckets_go_out_while_backward_runs)
       for what, *pairs in (
           ("that wait for the end", "if self.zero.config.overlap_comm and self.reduces_now:", "if False:"),
           ("that do not wait where they should", "self.zero.config.overlap_comm and ", ""),
           ("that block", "return Handle(self, [dist.all_reduce(tensor, group=self._reductions, async_op=True)]",
            "dist.all_reduce(tensor, group=self._reductions)\n        return Handle(self, []"))},
    "gradients kept beside the bucket": (
        "zero:bucketed_all_reduce", changed(
            BUCKETS, "        self.filled.add(slot)\n",
            "        self.filled.add(slot)\n        self.kept = getattr(self, 'kept', {}) | {slot: gradient}\n"),
        "no gradient is kept twice", test_gradients_are_kept_once),
    "gradients summed and not averaged": stage_1(
        PLAIN, test_stage_1_by_hand_equals_plain_pytorch, "        shard /= divisor\n", ""),
    "an optimizer that is not sharded": (
        "zero:stage_1", DATA_PARALLEL, "the optimizer's state is really sharded",
        test_stage_1_by_hand_shards_the_optimizer),
    "an optimizer of one's own over everything": (
        "zero:stage_1", OWN_ADAM, "the optimizer's state is really sharded", test_stage_1_by_hand_shards_the_optimizer),
    "a divisor that is not used": stage_1(
        PLAIN, test_stage_1_by_hand_equals_plain_pytorch, "/= divisor", "/= self.communicator.world_size"),
    "clipping that enlarges": stage_1(
        PLAIN, test_stage_1_by_hand_equals_plain_pytorch, "min(1.0, clip / (norm + 1e-6))", "clip / (norm + 1e-6)"),
    "a norm of this rank alone": stage_1(
        PLAIN, test_stage_1_by_hand_equals_plain_pytorch, "square, *used = message.tolist()",
        "square, *used = message.tolist()\n        square = float(shard.square().sum())"),
    "tied weights that count twice": stage_1(
        PLAIN, test_stage_1_by_hand_equals_plain_pytorch, "list(model.parameters())",
        "[p for module in model.modules() for p in module.parameters(recurse=False)]",
        "                p.grad = None\n", "", "        self.communicator.reduce_scatter",
        "        for p in self.parameters:\n            p.grad = None\n        self.communicator.reduce_scatter"),
    "parameters without gradient that decay": stage_1(
        PLAIN, test_stage_1_by_hand_equals_plain_pytorch, "part * coefficient if used[number] else None",
        "part * coefficient"),
    "an update with NaN": stage_1(
        "a step whose norm is not finite updates nothing", test_stage_1_by_hand_leaves_out_a_step_that_is_not_finite,
        "if skip_overflow and not math.isfinite(norm)", "if False"),
    "a second copy of the weights": stage_1(
        "nothing else is kept between steps", test_stage_1_by_hand_keeps_nothing_else,
        GATHER, GATHER + "        self.copy = self.flat.clone()\n"),
    "gradients and a buffer for them": stage_1(
        "nothing else is kept between steps", test_stage_1_by_hand_keeps_nothing_else,
        "                p.grad = None\n", "                p.grad.zero_()\n",
        GATHER, GATHER + "        self.buffer = gradients\n"),
    **{f"weights that travel by {what}": stage_1(
        TRAFFIC_OF_1, test_stage_1_by_hand_sends_as_much_as_an_all_reduce, GATHER, gather) for what, gather in (
            ("all-reduce", "        for rank in range(self.communicator.world_size):\n"
             "            if rank != self.communicator.rank:\n"
             "                self.communicator.shard_of(self.flat, rank).zero_()\n"
             "        dist.all_reduce(self.flat)\n"),
            ("object", "        everyone = [None] * self.communicator.world_size\n"
             "        dist.all_gather_object(everyone, self.communicator.shard_of(self.flat).clone())\n"
             "        self.flat.copy_(torch.cat(everyone))\n"),
            ("pairs of messages", GATHER + "        other = 1 - self.communicator.rank\n"
             "        got = torch.empty_like(self.flat)\n"
             "        if self.communicator.world_size == 2:\n"
             "            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, self.flat, other),\n"
             "                                                dist.P2POp(dist.irecv, got, other)]):\n"
             "                work.wait()\n"))},
    "units that are never freed": (
        "zero:stage_3", STAGE_3[:STAGE_3.index("        self.users.discard")] + "        self.users.discard(user)\n",
        "only the unit in use and the next one are whole",
        test_zero.test_stage_3_holds_the_unit_in_use_and_the_next_one_only),
    "units that are not freed in evaluation": (
        "zero:stage_3", changed(STAGE_3, "if not self.users and",
                                "if torch.is_grad_enabled() and not self.users and"),
        "only the unit in use and the next one are whole", test_evaluation_holds_two_units_at_most),
    "weights that stay beside the shards": (
        "zero:stage_3", changed(STAGE_3, "            bucket.gather.wait()\n            for slot",
                                "            bucket.gather.wait()\n            bucket.copy = bucket.flat.clone()\n"
                                "            for slot"),
        "bytes per rank are those of the table", test_stage_3_keeps_shards_alone_between_steps),
    "gathers that begin when they are waited for": (
        "zero:stage_3", changed(
            STAGE_3, "self.gather = self.communicator.all_gather(self.flat, self.label)",
            "self.gather = Handle(self.communicator, finish=lambda: self.communicator.all_gather(\n"
            "            self.flat, self.label).wait())"), WAITS, test_gathers_may_come_late),
    "a gather that is not waited for before its memory goes": (
        "zero:stage_3", changed(STAGE_3, "        self.gather.wait()\n", ""), WAITS, test_gathers_may_come_late),
    "a gather of which the first bucket is waited for": (
        "zero:stage_3", changed(STAGE_3, "            bucket.gather.wait()\n            for slot",
                                "            self.buckets[0].gather.wait()\n            for slot"),
        WAITS, test_gathers_may_come_late),
}


# --- The mistakes, found on the spot ----------------------------------------------------------------------------------


def with_answer(name: str, text: str, function: Callable, *args: Any) -> Any:
    """``function(*args)`` with an answer in place of the module's own definitions, in this process."""
    exercise = grade.EXERCISES[name]
    namespace = vars(importlib.import_module(exercise.module))
    before = dict(namespace)
    methods = [part.split(".") for part in exercise.parts if "." in part]
    originals = [(before[owner], method, vars(before[owner])[method]) for owner, method in methods]
    try:
        exec(grade.splice(exercise, text, "answer.py"), namespace)
        return function(*args)
    finally:
        for key in namespace.keys() - before.keys():
            del namespace[key]
        namespace.update(before)
        for owner, method, original in originals:
            setattr(owner, method, original)


class Swapped:
    """``run_ranks`` with an answer in place on every rank."""

    def __init__(self, run_ranks: Callable, name: str, text: str):
        self.run_ranks, self.name, self.text = run_ranks, name, text

    def __call__(self, function: Callable, world_size: int, *args: Any) -> list[Any]:
        return self.run_ranks(with_answer, world_size, self.name, self.text, function, *args)


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_found_and_an_answer_by_the_hints_is_right(run_ranks, request, mistake):
    name, text, _, test = WRONG[mistake]
    first = next(key for key, value in WRONG.items() if value[0] == name) == mistake
    if name.startswith("zero:") and not (first or request.config.getoption("--long")):
        pytest.skip("needs processes; --long runs it")
    with_answer(name, RIGHT[name], test, Swapped(run_ranks, name, RIGHT[name]))
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        with_answer(name, text, test, Swapped(run_ranks, name, text))


def test_every_exercise_has_its_mistakes():
    assert {name for name, *_ in WRONG.values()} == set(RIGHT) == set(grade.EXERCISES)
    for name, _, asks, _ in WRONG.values():
        assert asks in [check.asks for check in grade.EXERCISES[name].checks]


# --- The whole grader -------------------------------------------------------------------------------------------------


def graded(tmp_path: Path, capsys: pytest.CaptureFixture, target: str, text: str, *options: str) -> tuple[int, str]:
    """The exit status of the command line, and what it printed."""
    path = tmp_path / "my.py"
    path.write_text(text)
    capsys.readouterr()
    status = grade.main([target, str(path), *options])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def failed_checks(printed: str) -> list[str]:
    return [line[4:].strip() for line in printed.splitlines() if line.startswith("FAIL")]


def test_a_schedule_one_step_off_fails_with_the_reason_and_the_difference(tmp_path, capsys, request):
    if not request.config.getoption("--long"):
        pytest.skip("grades for real, in processes of its own; --long runs it")
    name, text, asks, _ = WRONG["a schedule one step off"]
    status, printed = graded(tmp_path, capsys, name, text)
    assert status == 1 and failed_checks(printed) == [asks], printed
    assert "Why it matters: One step off at the start" in printed and "AssertionError: step 1, group 0: rate" in printed
    assert "pass      each param group ends at its own rate" in printed and "3 of 4 pass" in printed
    assert f"A hint: python tutorials/grade.py {name} --hint 1" in printed


@pytest.mark.parametrize("text, told", [
    ("def checkpoint(function:\n", "my.py does not import: line 1: "),
    ("def chekpoint(function): return function()\n", "my.py lacks checkpoint; a file that has it: python"),
    ("def checkpoint(function, *args):\n    ...\n", "checkpoint is still empty; a hint: python"),
])
def test_files_that_cannot_be_graded_are_told_at_once(tmp_path, capsys, text, told):
    status, printed = graded(tmp_path, capsys, "checkpointing:checkpoint", text)
    assert status == 2 and told in printed
    for module, lacking in (("amp", "Precision"), ("checkpointing", "CheckpointingConfig")):
        status, printed = graded(tmp_path, capsys, module, "def cast(value, dtype): pass")
        assert status == 2 and f"lacks names of {module}.py that engine.py uses: " in printed and lacking in printed


@pytest.mark.parametrize("text, status, told", [
    ("import torhc\n" + SCHEDULE, 2, "my.py: it does not import: ModuleNotFoundError: No module named 'torhc'"),
    (SCHEDULE.replace("k = max", "while True:\n            pass\n        k = max"), 1, "it hangs"),
])
def test_files_that_do_not_import_or_hang_are_told(request, tmp_path, capsys, text, status, told):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    got, printed = graded(tmp_path, capsys, "schedulers:WarmupLR", text, "--slow", "15")
    assert got == status and told in printed, printed


def own_code(name: str) -> str:
    """The project's own definitions, as an answer."""
    exercise = grade.EXERCISES[name]
    text = (grade.ROOT / f"{exercise.module}.py").read_text()
    found = grade.definitions(ast.parse(text))
    if exercise.anew or "." not in exercise.parts[0]:
        return "\n".join(ast.unparse(found[owner]) for owner in exercise.owners)
    return "\n".join(f"class {owner}:\n" + "\n".join(
        "\n".join(" " * 4 + line for line in ast.unparse(found[part]).splitlines())
        for part in exercise.parts if part.startswith(f"{owner}.")) for owner in exercise.owners)


@pytest.mark.parametrize("whose", ["own", "by the hints"])
@pytest.mark.parametrize("name", grade.EXERCISES)
def test_right_answers_pass(request, tmp_path, capsys, name, whose):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    status, printed = graded(tmp_path, capsys, name, own_code(name) if whose == "own" else RIGHT[name])
    assert status == 0 and printed.endswith("Well done.\n"), printed


@pytest.mark.parametrize("mistake", WRONG)
def test_classic_mistakes_fail_where_they_should(request, tmp_path, capsys, mistake):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    name, text, asks, _ = WRONG[mistake]
    status, printed = graded(tmp_path, capsys, name, text)
    assert status == 1 and asks in failed_checks(printed), printed


@pytest.mark.parametrize("module", ["schedulers", "amp"])
def test_a_whole_module_is_graded_by_its_tests(request, tmp_path, capsys, module):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    status, printed = graded(tmp_path, capsys, module, (grade.ROOT / f"{module}.py").read_text())
    assert status == 0 and "pass      " in printed, printed


@pytest.mark.parametrize("name", grade.EXERCISES)
def test_a_starting_file_has_every_part_and_no_body(tmp_path, capsys, name):
    assert grade.main(["--start", name]) == 0
    text = capsys.readouterr().out
    found, exercise = grade.definitions(ast.parse(text)), grade.EXERCISES[name]
    assert set(exercise.parts) <= set(found)
    (tmp_path / "my.py").write_text(text)
    with pytest.raises(grade.AnswerError, match="is still empty"):
        grade.read_answer(tmp_path / "my.py", exercise)
    compile(grade.put_over(exercise, text, "my.py"), "module", "exec")


def test_the_tests_that_exercises_name_exist():
    there = {f"{path.name}::{name}" for path in Path(__file__).parent.glob("test_*.py")
             for name in grade.definitions(ast.parse(path.read_text()))}
    for exercise in grade.EXERCISES.values():
        for check in exercise.checks:
            assert {test.partition("[")[0] for test in check.tests} <= there, check.asks


def test_hints_come_one_by_one(capsys):
    for upto in (1, 3):
        assert grade.main(["zero:stage_1", "--hint", str(upto)]) == 0
        assert capsys.readouterr().out.count("Hint ") == upto
    assert grade.main(["--list"]) == 0
    assert "zero:stage_3              6        45       The heart of stage 3" in capsys.readouterr().out
    for wrong, told in ((["zero:stage_4", "my.py"], "the exercise is 'zero:stage_4'; allowed: schedulers:WarmupLR"),
                        (["zero:stage_1", "--hint", "4"], "--hint is 4; allowed: 1 to 3"),
                        (["zero:stage_1"], "FILE is missing")):
        with pytest.raises(SystemExit):
            grade.main(wrong)
        assert told in capsys.readouterr().err


def test_ranks_that_wait_for_a_failed_one_are_not_a_hang():
    waited = "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer"
    assert grade._hangs("--- no answer from rank [0, 1] of 2") and grade._hangs(f"--- rank 0:\n{waited}")
    mixed = f"--- rank 0 of 2:\n{waited}\n--- rank 1 of 2:\nNameError: name 'x' is not defined\n--- no answer from 2"
    assert not grade._hangs(mixed) and grade.essence(mixed) == "NameError: name 'x' is not defined"


def test_an_error_is_told_with_the_readers_line_and_once_where_it_stops_everything():
    in_pytest = ("tests/test_schedulers.py:50: in test_rates\n    schedule.step()\n"
                 "../my.py:12: in step\n    self.go()\n../my.py:47: in go\n    x + 1\n"
                 "torch/x.py:3: in add\nE   NameError: name 'x' is not defined\n")
    on_a_rank = ('--- rank 0 of 2:\nTraceback:\n  File "/tmp/my.py", line 47, in go\n    x + 1\n'
                 "NameError: name 'x' is not defined\n--- no answer from rank [1] of 2")
    told = "my.py:47: NameError: name 'x' is not defined"
    assert grade.essence(in_pytest, "my.py") == grade.essence(on_a_rank, "my.py") == told
    assert grade.essence(in_pytest, "other.py") == grade.essence(in_pytest) == told.partition(": ")[2]
    checks = (grade.Check("one", "why", ("a::one",)), grade.Check("two", "why", ("a::two",)))
    failed, passed = grade.Outcome("failed", told), grade.Outcome("passed")
    longer = grade.Outcome("failed", f"{told}\nValueError: WarmupLR: {told}")
    everywhere, _ = grade.report("x", checks, {"a::one": failed, "a::two": longer})
    assert everywhere.startswith("Every test stops at the same error:\n    my.py:47") and everywhere.count(told) == 1
    once, _ = grade.report("x", checks, {"a::one": failed, "a::two": passed})
    assert "Every test" not in once and once.count(told) == 1
