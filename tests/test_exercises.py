"""The tests by which the grader judges exercises; the project's own code passes them too.

    .venv/bin/python -m pytest -q tests/test_exercises.py

They ask what docstrings promise, and measure what a rank really has in memory and sends, whatever an answer calls: see
oracle.py. test_grade.py runs each on wrong answers, as a plain function.
"""

import copy
import gc
import itertools
import json
import math
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import amp
import checkpointing
import engine as deepspeed
import schedulers
import steps
import test_amp
import test_zero
import zero
from conftest import on_ranks
from oracle import CPU, PATIENCE, Wire, after_rank_0, bytes_of, held, living
from test_checkpointing import peak


def random(count: int, seed: int = 0) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def error_of(net: nn.Module, reference: nn.Module) -> float:
    """The largest difference of two models' weights."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(net.parameters(), reference.parameters()))


def worst(net: nn.Module, reference: nn.Module) -> str:
    """Where that difference is, for messages."""
    differences = {name: float((p - q).detach().abs().nan_to_num(torch.inf).max()) for (name, p), q in zip(
        net.named_parameters(), reference.parameters())}
    return f"most in {max(differences, key=differences.get)}"


# --- A learning-rate schedule -----------------------------------------------------------------------------------------


def optimizer_of(*rates: float, **more: float) -> torch.optim.Optimizer:
    """An optimizer with a param group for each rate."""
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr, **more} for lr in rates])


def go_on(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[list[float]]:
    """The rates of the next steps, each a list over param groups."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step(), schedule.step()
    return rates


def test_a_warmup_follows_its_formula_in_every_group():
    for kind, steps, low, high in itertools.product(
            ("log", "linear"), (1, 2, 3, 10), (0.0, [0.01, 0.02]), (None, 0.3, [0.2, 0.5])):
        optimizer = optimizer_of(0.1, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one top for groups that differ
            schedule = schedulers.WarmupLR(optimizer, low, high, steps, kind)
        lows, highs = ([value] * 2 if isinstance(value, float) else value for value in (low, high or [0.1, 0.5]))
        for step, rates in enumerate(go_on(optimizer, schedule, 14)):
            n, k = max(2, steps), max(step - 1, 0)
            up = min(1.0, k / n if kind == "linear" else math.log(k + 1) / math.log(n))
            assert rates == pytest.approx([a + (b - a) * up for a, b in zip(lows, highs)], abs=1e-12), \
                f"WarmupLR(optimizer, {low}, {high}, {steps}, {kind!r}), groups of 0.1 and 0.5, step {step}: {rates}"


def test_a_warmup_goes_on_where_it_was():
    def begin(optimizer: torch.optim.Optimizer, kind: str, at: int = -1) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the optimizer's first step, which PyTorch misses
            return schedulers.WarmupLR(optimizer, warmup_num_steps=7, warmup_type=kind, last_batch_iteration=at)

    for kind, cut in itertools.product(("log", "linear"), range(1, 12)):
        optimizer = optimizer_of(0.1, 0.4)
        whole = go_on(optimizer, begin(optimizer, kind), 12)[cut:]
        before = optimizer_of(0.1, 0.4)
        schedule = begin(before, kind)
        go_on(before, schedule, cut)
        saved = copy.deepcopy((before.state_dict(), schedule.state_dict()))
        for loads_first in (False, True):  # the optimizer's state before the schedule is made: its lr is halfway up
            optimizer = optimizer_of(0.1, 0.4)
            if loads_first:
                optimizer.load_state_dict(saved[0])
            schedule = begin(optimizer, kind)
            optimizer.load_state_dict(saved[0]), schedule.load_state_dict(saved[1])
            assert go_on(optimizer, schedule, 12 - cut) == [pytest.approx(rates) for rates in whole], \
                f"{kind}: state_dict() after {cut} steps"
        assert go_on(before, begin(before, kind, cut - 1), 12 - cut) == [pytest.approx(rates) for rates in whole], \
            f"{kind}: last_batch_iteration {cut - 1}"


def test_the_top_of_a_warmup_is_each_groups_own_and_that_of_the_start():
    for optimizer, top, expected in ((optimizer_of(0.1, 0.5), None, [0.1, 0.5]),
                                     (optimizer_of(0.1, 0.5), [0.3, 0.2], [0.3, 0.2]),
                                     (optimizer_of(0.01, initial_lr=0.1), None, [0.1])):
        groups = [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in optimizer.param_groups]
        schedule = schedulers.WarmupLR(optimizer, warmup_max_lr=top, warmup_num_steps=3)
        last = go_on(optimizer, schedule, 6)[-1]
        assert last == pytest.approx(expected), f"warmup_max_lr {top}, groups {groups}: the rates end at {last}"


# --- A loss scale, and dtypes -----------------------------------------------------------------------------------------


def test_a_loss_scale_goes_on_where_it_was_after_any_short_history():
    for power, window, hysteresis, consecutive in itertools.product((0, 60), (1, 2, 3), (1, 2, 3), (False, True)):
        settings = 2.0 ** power, window, hysteresis, consecutive, 2.0 ** -20
        for overflows in itertools.product((False, True), repeat=6):
            expected = test_amp.rule(overflows, power, *settings[1:])
            for cut in range(7):
                scaler = amp.DynamicLossScaler(*settings)
                for count, overflow in enumerate(overflows):
                    if count == cut:
                        state = json.loads(json.dumps(scaler.state_dict()))
                        scaler = amp.DynamicLossScaler(*settings)
                        scaler.load_state_dict(state)
                    scaler.update(overflow)
                assert scaler.scale == expected, (
                    f"from 2 ** {power}, window {window}, hysteresis {hysteresis}, consecutive {consecutive}, "
                    f"overflows {overflows}, resumed after {cut}: {scaler.scale}, and not {expected}")


def test_an_overflow_at_the_smallest_scale_is_an_error():
    for hysteresis, minimum in itertools.product((1, 3), (1.0, 0.75)):  # the second is no power of two below the scale
        scaler = amp.DynamicLossScaler(2.0, 1000, hysteresis, False, minimum)
        for _ in range(hysteresis + (minimum < 1)):
            scaler.update(True, "blocks.0.weight")
        assert scaler.scale == minimum, f"hysteresis {hysteresis}, minimum {minimum}: {scaler.scale}"
        with pytest.raises(amp.MinimumLossScaleError):
            scaler.update(True, "blocks.0.weight")
        assert scaler.scale == minimum


def test_every_parameter_has_the_dtypes_that_the_config_says():
    kept, safe, both, other = (nn.Linear(1, 1) for _ in range(4))
    other.count = nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)
    other.fine = nn.Parameter(torch.ones(1, dtype=torch.float64))
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    parameters = {"a weight": other.weight, "one in float64": other.fine, "one in int64": other.count, "a kept one":
                  kept.weight, "a safe one": safe.weight, "one that is kept and safe": both.weight}
    for half, small, low, added, sent in itertools.product(
            (None, fp16, bf16), (False, True), (fp16, bf16), (None, fp32, bf16), (None, fp32, fp16)):
        config = amp.PrecisionConfig(
            amp.FP16Config(half is fp16, fp16_master_weights_and_grads=small and half is fp16),
            amp.BF16Config(half is bf16, bf16_master_weights_and_grads=small and half is bf16,
                           bf16_optimizer_states=small and half is bf16),
            amp.AutocastConfig(dtype=low), amp.DataTypesConfig(added), sent)
        precision = amp.Precision(config, CPU, [kept, both], [safe, both])
        for name, p in parameters.items():
            compute = p.dtype if half is None else fp32 if "kept" in name else half
            master = compute if half is None or small else fp32
            reduction = sent or (low if "safe" in name else added or master)
            expected = (compute, master, added or master, reduction) if p.is_floating_point() else (p.dtype,) * 4
            assert tuple(precision.path(p)) == expected, f"{name}: {precision.path(p)}, and not {expected}; {config}"


# --- A checkpointed function ------------------------------------------------------------------------------------------


def stretch(x: Tensor, weight: Tensor, *, scale: float = 1.0) -> Tensor:
    """Several activations, dropout, and an argument by name."""
    return F.dropout(torch.tanh(x @ weight), 0.5).sin().exp() * scale


def outer(x: Tensor, weight: Tensor) -> Tensor:
    """A region with a region inside."""
    return checkpointing.checkpoint(stretch, stretch(x, weight), weight, scale=0.5).cos()


def packed(x: Tensor, weight: Tensor) -> Tensor:
    """A region whose inputs and outputs are of several kinds."""
    def function(pair: tuple, table: dict, row: Tensor, times: int = 1) -> dict:
        y = (pair[0] @ table["weight"])[row].tanh() * times
        return {"rows": y.exp(), "count": len(row), "more": [pair[0].sin()]}

    found = checkpointing.checkpoint(function, (x, None), table={"weight": weight}, row=torch.arange(32), times=2)
    return found["rows"] / found["count"] + found["more"][0]


def stack(run: Callable, function: Callable, weight: Tensor, layers: int = 6) -> list[Any]:
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
    for function, run in ((stretch, checkpointing.checkpoint), (outer, checkpointing.checkpoint), (outer, plainly),
                          (packed, plainly)):
        results = stack(run, function, weight)
        with mock.patch.object(checkpointing, "checkpoint", plainly):
            expected = stack(plainly, function, weight)
        for what, a, b in zip(("result", "input's gradient", "weight's gradient", "random state"), results, expected):
            assert torch.equal(a, b), f"{what} of {function.__name__} is off by {(a - b).abs().max()}"


def test_a_checkpointed_function_trains_its_parameters_where_no_input_needs_a_gradient():
    layer = nn.Linear(4, 4)
    expected, = torch.autograd.grad(layer(torch.ones(2, 4)).tanh().sum(), layer.weight)
    checkpointing.checkpoint(lambda x: layer(x).tanh(), torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None, "the weight has no gradient"
    assert torch.equal(layer.weight.grad, expected)


def test_a_checkpointed_function_runs_under_the_autocast_of_its_call():
    weight = torch.randn(8, 8, requires_grad=True)
    for inside, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float16)):
        seen = []

        def function(x: Tensor) -> Tensor:
            y = x @ weight
            seen.append(y.dtype)
            return y.exp()

        def gradient(run: Callable) -> Tensor:
            weight.grad = None
            with torch.autocast("cpu", dtype, enabled=inside):
                loss = run(function, torch.ones(2, 8) / 8).float().sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
                loss.backward()
                assert torch.is_autocast_enabled("cpu") is not inside, "backward leaves autocast changed"
            return weight.grad

        expected = gradient(plainly)
        assert torch.equal(gradient(checkpointing.checkpoint), expected), "the gradient is another one"
        assert set(seen) == {dtype if inside else torch.float32}, f"autocast is {inside}, {dtype}; it runs in {seen}"


def test_a_checkpointed_function_runs_twice():
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        for _ in range(6):
            x = x.sin().exp()
        return x

    with mock.patch("torch.utils.checkpoint.checkpoint", side_effect=AssertionError("that is PyTorch's own")):
        loss = checkpointing.checkpoint(function, torch.ones(2, requires_grad=True)).sum()
    assert len(calls) == 1, f"the function ran {len(calls)} times before backward"
    loss.backward()
    assert len(calls) == 2, f"the function ran {len(calls)} times"


def test_a_checkpointed_function_keeps_its_inputs_only():
    weight, held_then = torch.randn(64, 64, requires_grad=True), {}
    for run in (plainly, checkpointing.checkpoint):
        before, x = living(), torch.rand(512, 64)
        for _ in range(12):
            x = run(stretch, x, weight)
        held_then[run] = held(before), peak(lambda: stack(run, stretch, weight, layers=12))
        del x
    for what, without, with_it in zip(("between forward and backward", "at the peak"), *held_then.values()):
        assert with_it < 0.5 * without, f"{with_it / without:.0%} of the memory without recomputation {what}"


def test_a_checkpointed_function_leaves_nothing_behind():
    weight = torch.randn(256, 256, requires_grad=True)
    for turn in range(10):
        if turn == 2:  # the gradient, and what PyTorch keeps, are there from here on
            before = living()
        stack(checkpointing.checkpoint, stretch, weight)
        checkpointing.checkpoint(stretch, torch.ones(32, 256), weight)  # no backward follows
    kept = held(before)
    assert kept < 4 * 32 * 256 * 4, f"{kept} bytes are left when the results of eight turns are gone"


def test_a_checkpointed_function_does_nothing_without_grad_mode():
    calls = []
    with torch.no_grad():
        y = checkpointing.checkpoint(lambda x: calls.append(1) or x.exp(), torch.ones(2, requires_grad=True))
    assert not y.requires_grad and calls == [1]


# --- Collectives ------------------------------------------------------------------------------------------------------


def slices_of_sums() -> None:
    """Reduce-scatters of three tensors at a time: plainly, added, and in place."""
    communicator, rank, ranks = zero.Communicator(CPU), dist.get_rank(), dist.get_world_size()
    flats = [random(ranks * 64, seed=10 * rank + i) for i in range(3)]
    outs = [torch.full((64,), math.nan), torch.ones(64), communicator.shard_of(flats[2])]
    with Wire(delay=0.02 * rank):  # who does not wait adds up what has not come
        handles = [communicator.reduce_scatter(flat, out, add)
                   for flat, out, add in zip(flats, outs, (False, True, False))]
    for handle in handles[::-1]:
        handle.wait()
    for i, (out, what) in enumerate(zip(outs, ("", ", added to ones", ", out is a slice of flat"))):
        expected = sum(random(ranks * 64, seed=10 * r + i) for r in range(ranks)).chunk(ranks)[rank] + (i == 1)
        assert torch.allclose(out, expected, atol=1e-5), \
            f"rank {rank} of {ranks}{what}: off by {(out - expected).abs().max():.3g}"


def test_a_reduce_scatter_gives_each_rank_its_slice_of_the_sum(run_ranks):
    for ranks in (1, 3):
        run_ranks(slices_of_sums, ranks)


@on_ranks(3)
def test_a_reduce_scatter_adds_in_one_order_whoever_comes_first():
    store, sums = dist.distributed_c10d._get_default_store(), {}
    for order in itertools.permutations(range(3)):
        communicator = zero.Communicator(CPU)
        flat, out = torch.tensor([1e8, 1.0, -1e8])[dist.get_rank()].repeat(6), torch.empty(2)
        turn, key = order.index(dist.get_rank()), f"turn of {communicator.number} after "
        if turn:
            store.wait([f"{key}{turn - 1}"], PATIENCE)
        handle = communicator.reduce_scatter(flat, out, False)
        store.set(f"{key}{turn}", "")
        handle.wait()
        sums[order] = out
    for order, out in sums.items():
        assert torch.equal(out, sums[0, 1, 2]), \
            f"ranks come in the order {order}: {out}; in the order (0, 1, 2): {sums[0, 1, 2]}"


@on_ranks(2)
def test_a_reduce_scatter_returns_at_once():
    communicator = zero.Communicator(CPU)
    with after_rank_0() as early, Wire() as wire:
        handle = communicator.reduce_scatter(torch.ones(2**18), torch.empty(2**17), False)
    handle.wait()
    assert early, "rank 0 waits for rank 1 inside the call"
    assert wire.elements == 2**17, f"{wire.elements} elements are on their way when the call returns, and not {2**17}"


@on_ranks(2)
def test_a_reduce_scatter_keeps_nothing():
    communicator = zero.Communicator(CPU)
    for turn in range(9):
        before = living() if turn == 1 else before if turn else 0
        communicator.reduce_scatter(torch.ones(2**19), torch.empty(2**18), False).wait()
    kept = held(before) / 2**20  # gloo's thread may still have the last call's two tensors, 4
    assert kept < 6, f"eight calls leave {kept:.1f} times the bytes of a slice behind"


@on_ranks(3)
def test_what_is_counted_is_what_is_sent():  # of two ranks, each would send all it has in any way
    for stage in (0, 1, 2):
        engine = test_zero.train_wide(stage, steps=1)
        traffic = engine.zero.communicator.traffic
        before = sum(record.bytes for record in traffic.values())
        with Wire() as wire:
            engine.backward(engine(torch.randn(2, 64)).square().mean())
            engine.step()
        counted = (sum(record.bytes for record in traffic.values()) - before) // 4
        assert abs(wire.elements - counted) < 0.01 * counted, \
            f"stage {stage}: {wire.elements} elements sent, {counted} counted"


# --- Buckets ----------------------------------------------------------------------------------------------------------


@on_ranks(2)
def test_gradients_that_come_in_another_order_on_each_rank():
    def run(layers: nn.ModuleList, rank: int, step: int) -> Tensor:
        x = random(48, 2 * step + rank).view(3, 16)
        for index in (range(4), (2, 0, 3, 1))[rank]:
            x = layers[index](x).tanh()
        return x.square().mean()

    for stage in (0, 1, 2):
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        reference = copy.deepcopy(model)
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
        error = error_of(model, reference)
        where = f"stage {stage}, rank {dist.get_rank()}"
        assert error < 1e-6, f"{where}: weights are off by {error:.3g}, {worst(model, reference)}"


def two_buckets(overlap: bool = True, width: int = 64) -> tuple[nn.Module, Any, list[str]]:
    """A model of two buckets at stage 0, and a list to which each finished gradient adds its name."""
    torch.manual_seed(0)
    model, log = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: log.append("gradient"))
    config = zero.ZeroConfig(stage=0, reduce_bucket_size=width * (width + 2), overlap_comm=overlap)
    mine = zero.Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), config, CPU)
    assert len(mine.buckets) == 2
    return model, mine, log


class Layers(nn.ModuleList):
    """Layers of which each window leaves out others, the first one used twice, behind an embedding."""

    def __init__(self, sparse: bool):
        torch.manual_seed(0)
        super().__init__([nn.Embedding(20, 8, sparse=sparse), *(nn.Linear(8, 8) for _ in range(4))])

    def forward(self, step: int, micro: int, rank: int) -> Tensor:
        seed = step + 100 * micro + 10_000 * rank
        x = random(24, seed).view(3, 8) + self[0](torch.arange(seed, seed + 3) % 20)
        used = [layer for i, layer in enumerate(list(self)[1:]) if i != step and (i != 0 or micro == 0)]
        for layer in [*used, used[0]]:
            x = layer(x).tanh()
        return x.square().mean()


@on_ranks(2)
def test_training_by_buckets_equals_plain_pytorch():
    for stage, overlap, sparse in ((0, False, False), (0, True, True), (1, False, True), (1, True, False)):
        model, reference = Layers(sparse), Layers(sparse)
        mine = zero.Zero(model, torch.optim.SGD(model.parameters(), lr=1.0),
                         zero.ZeroConfig(stage=stage, reduce_bucket_size=80, overlap_comm=overlap), CPU)
        theirs, size = torch.optim.SGD(reference.parameters(), lr=1.0), 4 * 128 + 192  # with what aligns and pads
        where = f"stage {stage}, overlap_comm {overlap}, sparse embedding {sparse}, rank {dist.get_rank()}, window"
        for step in range(3):
            with Wire() as wire:
                for micro in range(2):
                    mine.boundary = micro == 1
                    model(step, micro, dist.get_rank()).backward()
                    mine.finish_backward()
                mine.step(divisor=4)
            for micro, rank in itertools.product(range(2), range(2)):
                (reference(step, micro, rank) / 4).backward()
            theirs.step(), theirs.zero_grad()
            error = error_of(model, reference)
            assert error < 1e-5, f"{where} {step}: weights are off by {error:.3g}, {worst(model, reference)}"
            assert wire.elements < 1.3 * size, f"{where} {step}: {wire.elements} elements sent, the buckets have {size}"


@on_ranks(2)
def test_a_late_gradient_counts():
    for there in (False, True):
        model, mine, _ = two_buckets()
        before = copy.deepcopy(model)
        model(torch.ones(1, 64)).square().mean().backward()
        before(torch.ones(1, 64)).square().mean().backward()
        slot = next(slot for b in mine.buckets for slot in b.slots if slot.parameter is model[2].weight)
        gradients = slot.bucket.gradients
        assert gradients.life is zero.Life.SENDING, "the bucket is not on its way when backward ends"
        if there:
            mine.reducer.in_flight.remove(gradients), gradients.finish()
        for work in gradients.reduction.works:
            work.wait()  # what is added to the sum from now on is this rank's alone
        for size in (1.0, 2.0):
            with torch.no_grad():
                gradients.take(slot, torch.full((64, 64), size * (1 + dist.get_rank())))
        mine.finish_backward()
        mine.step(divisor=2)
        error = (model[2].weight - before[2].weight + 0.1 * (before[2].weight.grad + 3.0 * 1.5)).detach().abs().max()
        assert error < 1e-5, f"two gradients late, the bucket's sum is there: {there}; a weight is off by {error:.3g}"


def finished_all_reduce() -> None:
    communicator, log, tensor = zero.Communicator(CPU), [], torch.ones(8) * (1 + dist.get_rank())
    with after_rank_0():
        handle = communicator.all_reduce(tensor, "sums", lambda: log.append(f"finish {tensor.sum()}"))
        log.append("returned")
    handle.wait(), handle.wait()
    ranks = dist.get_world_size()
    total = sum(range(1, ranks + 1))
    assert tensor.tolist() == [total] * 8, f"{ranks} ranks: the sum is {tensor}"
    assert log == ["returned", f"finish {total * 8.0}"], f"{ranks} ranks: {log}"


def test_an_all_reduce_runs_its_finish_once_when_the_sum_is_there(run_ranks):
    for ranks in (1, 2):
        run_ranks(finished_all_reduce, ranks)


@on_ranks(2)
def test_full_buckets_go_out_while_backward_runs():
    for overlap in (True, False):
        model, mine, log = two_buckets(overlap)
        with after_rank_0() as early, Wire(log):
            model(torch.ones(1, 64)).square().mean().backward()
        mine.finish_backward()
        mine.step(divisor=2)
        if overlap:
            last = len(log) - 1 - log[::-1].index("gradient")
            assert "allreduce" in log[:last], f"nothing is sent before the last gradient: {log}"
            assert early, "backward on rank 0 waits for that of rank 1"
        else:
            assert set(log) == {"gradient"}, f"overlap_comm is false, and backward does this: {log}"


@on_ranks(2)
def test_gradients_are_kept_once():
    before = living()
    model, mine, _ = two_buckets(width=512)
    for _ in range(2):
        model(torch.ones(1, 512)).square().mean().backward()
        mine.finish_backward()
        kept = held(before) / sum(p.numel() for p in model.parameters())
        mine.step(divisor=2)
    assert kept < 1.1 * 8, f"a rank has {kept:.2f} bytes per parameter; weights and gradients are 8"


# --- Stage 3 ----------------------------------------------------------------------------------------------------------


def with_frozen_biases(net: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the matrices: biases are frozen, and so each unit has two buckets."""
    for p in net.parameters():
        p.requires_grad_(p.dim() > 1)
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)


def late_gathers() -> float:
    """Training where nothing arrives before it is waited for; returns how often a step gathers each bucket."""
    torch.manual_seed(0)
    model = test_zero.Wide(2, 16)
    reference = copy.deepcopy(model)
    theirs = with_frozen_biases(reference)
    mine = zero.Zero(model, with_frozen_biases(model), zero.ZeroConfig(stage=3), CPU)
    assert all(len(unit.buckets) != 1 for unit in mine.units)
    gather, counts = mine.communicator.all_gather, {"begun": 0, "ended": 0}

    def late(flat: Tensor, what: Callable[[], str] = str) -> zero.Handle:
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
        x = random(64, step).view(4, 16)
        for net in (model, reference):
            net(x).square().mean().backward()
        mine.finish_backward()
        mine.step(divisor=2)
        theirs.step(), theirs.zero_grad()
    unit, before = next(unit for unit in mine.units if unit.buckets), counts["begun"]
    unit.start_gather()  # a prefetch that nobody will come for
    assert counts["begun"] == before + len(unit.buckets), "start_gather() leaves gathers to be started later"
    assert counts["ended"] == before, "start_gather() waits for what it starts"
    assert unit.state is zero.UnitState.GATHERING, f"after start_gather() the state is {unit.state}"
    unit.free()
    with zero.GatheredParameters(list(model.parameters())):
        error = error_of(model, reference)
    assert error < 1e-6, f"weights are off by {error:.3g}, {worst(model, reference)}"
    assert counts["begun"] == counts["ended"], f"{counts['begun']} gathers began, {counts['ended']} were waited for"
    return before / 2 / len(mine.buckets)


@on_ranks(2)
def test_gathers_may_come_late():
    late_gathers()


@on_ranks(2)
def test_a_pass_gathers_each_unit_once():
    times = late_gathers()
    assert times == 2, f"a step gathers each bucket {times} times; forward and backward need it once each"


@on_ranks(2)
def test_a_unit_that_two_use_stays_until_both_are_done():
    model = test_zero.Wide(1, 16)
    mine = zero.Zero(model, with_frozen_biases(model), zero.ZeroConfig(stage=3), CPU)
    unit, weight = next(unit for unit in mine.units if unit.buckets), model.blocks[0][0].weight
    for ahead in (False, True):
        if ahead:
            unit.start_gather()
        with Wire() as wire:
            unit.acquire("first"), unit.acquire("second"), unit.acquire("second"), unit.release("first")
        sent = 0 if ahead else sum(bucket.numel for bucket in unit.buckets) // 2
        assert wire.elements == sent, f"gathered ahead: {ahead}, two users send {wire.elements} elements, not {sent}"
        assert unit.state is zero.UnitState.WHOLE, f"two use it, one releases it, and it is {unit.state}"
        assert bool(weight.isfinite().all()) and type(weight) is nn.Parameter
        unit.release("second")
        assert unit.state is zero.UnitState.SHARDED, f"nobody uses it, and it is {unit.state}"
        unit.release("second")
        size = sum(bucket.flat.untyped_storage().nbytes() for bucket in unit.buckets)
        assert size == 0, f"nobody uses it, and it has {size} bytes"
        with pytest.raises(RuntimeError, match="is sharded"):
            weight.sum()


def held_at_stage_3() -> tuple[dict[str, float], float]:
    """By how many units a rank grows in each kind of pass; and bytes per parameter between steps."""
    there, most = living(), {"forward": [], "backward": [], "evaluation": []}
    torch.manual_seed(0)
    model, x = test_zero.Wide(8, 256), torch.ones(1, 256)
    mine = zero.Zero(model, torch.optim.AdamW(model.parameters()), zero.ZeroConfig(stage=3), CPU)

    def watch(kind: str) -> None:
        most[kind].append(held(there))

    def in_forward(module: nn.Module, args: tuple, output: Tensor) -> None:
        watch("forward" if torch.is_grad_enabled() else "evaluation")
        if output.requires_grad:
            output.register_hook(lambda _: watch("backward"))

    for block in model.blocks:
        block[0].register_forward_hook(in_forward)
    for _ in range(3):
        model(x).square().mean().backward()
        mine.finish_backward()
        mine.step(divisor=2)
        between = held(there)
    with torch.no_grad():
        model(x)
    unit = 4 * max(unit.numel for unit in mine.units)
    return {kind: (max(sizes) - between) / unit for kind, sizes in most.items()}, 4 * between / unit / 8


@on_ranks(2)
def test_no_pass_holds_more_than_two_units():
    for kind, units in held_at_stage_3()[0].items():
        most = 5.5 if kind == "backward" else 2.5  # in backward two buffers of gradients, and room to receive
        assert units < most, f"a rank holds {units:.1f} units in {kind}; there are 8"


@on_ranks(2)
def test_stage_3_keeps_shards_alone_between_steps():
    between = held_at_stage_3()[1]
    assert between < 1.1 * 16 / 2, f"each of 2 ranks holds {between:.2f} bytes per parameter; its shards are 8"


# --- Stage 1 without the engine ---------------------------------------------------------------------------------------


class Awkward(nn.Module):
    """Two layers with one weight, a layer that nobody uses, one that some ranks use at some steps, and a weight whose
    gradient is 0, which decays all the same. No number of ranks divides its length.
    """

    def __init__(self, width: int):
        super().__init__()
        self.unused, self.still = nn.Linear(width, 2), nn.Parameter(torch.ones(4))
        self.first, self.second, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.second.weight = self.first.weight
        self.side = nn.Linear(width, 3)

    def forward(self, x: Tensor, side: bool) -> Tensor:
        y = self.out(self.second(self.first(x).tanh()).tanh()) + 0 * self.still.sum()
        return y + self.side(x) if side else y


def started(width: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(dist.get_rank())  # ranks start from different weights: rank 0's must win
    model = Awkward(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, weight_decay=0.5)
    return model, optimizer, zero.Zero(model, optimizer, zero.ZeroConfig(stage=1), CPU)


def by_hand(width: int, accumulation: int, clip: float, scale: float = 1.0, bad: float = 0.0,
            delay: float = 0.0) -> float:
    """Four steps with ``zero.Zero`` alone, compared with plain PyTorch; elements per parameter that the last one sent.

    scale   what the loss is larger by; the rate falls from step to step
    bad     what is in the gradients of rank 1 at the third step: infinity, or NaN in one element of one
    delay   by which rank 1 begins each collective later: who does not wait for it goes on with other numbers
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    reference = Awkward(width)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01, eps=1e-3, weight_decay=0.5)
    model, optimizer, mine = started(width)

    def loss(net: nn.Module, step: int, micro: int, r: int) -> Tensor:
        x = random(2 * width, 100 * step + 10 * micro + r).view(2, width)
        loss = net(x, side=(step, r) in ((1, 1), (3, 0))).square().mean() / accumulation * scale
        if (step, r) == (2, 1) and bad:
            return loss * bad if bad == math.inf else loss + net.out.bias[0] * bad
        return loss

    for step in range(4):
        wrong = step == 2 and bad != 0
        for group in (*optimizer.param_groups, *theirs.param_groups):
            group["lr"] = 0.01 / (step + 1)
        with Wire(delay=delay * (rank == 1)) as wire:
            for micro in range(accumulation):
                mine.boundary = micro == accumulation - 1
                loss(model, step, micro, rank).backward()
                mine.finish_backward()
            result = mine.step(clip=clip, divisor=ranks * scale)
        weights = copy.deepcopy(model)  # at once: nothing may arrive any more
        for micro, r in itertools.product(range(accumulation), range(ranks)):
            (loss(reference, step, micro, r) / ranks / scale).backward()
        norm = float(nn.utils.clip_grad_norm_(reference.parameters(), clip or 1e9))
        if not wrong:
            theirs.step()
        theirs.zero_grad()
        error, least = error_of(weights, reference), min(1.0, clip / norm) if clip else 1.0
        where = (f"rank {rank} of {ranks}, step {step}, clip {clip}, divisor {ranks * scale}, micro-batches "
                 f"{accumulation}, {bad or 'nothing'} is wrong with a loss, rank 1 is late by {delay} s")
        assert result.overflow == wrong, f"overflow is {result.overflow}; {where}"
        assert wrong or abs(result.norm - norm) < 1e-5, f"norm {result.norm}, plain PyTorch {norm}; {where}"
        assert wrong or abs(result.clip - least) < 1e-4, f"clip {result.clip}, plain PyTorch {least}; {where}"
        off = f"weights are off by {error:.3g}, {worst(weights, reference)}; {where}"
        assert error < 1e-5, off  # NaN is not below either
    return wire.elements / sum(p.numel() for p in model.parameters())


def test_stage_1_by_hand_equals_plain_pytorch(run_ranks):
    for ranks, clip, scale in ((2, 0.0, 1.0), (2, 0.1, 8.0), (3, 0.1, 1.0), (2, 100.0, 1.0), (1, 0.1, 2.0)):
        run_ranks(by_hand, ranks, 7, 1, clip, scale)


@on_ranks(2)
def test_stage_1_by_hand_waits_for_what_it_sends():
    by_hand(7, 1, 0.1, delay=0.1)


@on_ranks(2)
def test_stage_1_by_hand_leaves_out_a_step_that_is_not_finite():
    for bad, clip in itertools.product((math.inf, math.nan), (0.0, 0.1)):
        by_hand(7, 1, clip, bad=bad)


@on_ranks(2)
def test_stage_1_by_hand_takes_a_step_that_must_not_be_skipped():
    model, _, mine = started(7)
    (model(torch.ones(1, 7), False).sum() * math.inf).backward()
    mine.finish_backward()
    overflow = mine.step(divisor=2, skip_overflow=False).overflow
    assert not all(bool(p.isfinite().all()) for p in model.parameters()), \
        f"skip_overflow is False, the norm is infinite, and the weights did not change ({overflow})"


@on_ranks(2)
def test_stage_1_by_hand_accumulates():
    window, once = by_hand(7, 3, 0.1), by_hand(7, 1, 0.1)
    assert window == once, f"{window:.2f} elements per parameter for 3 micro-batches, {once:.2f} for one"


def kept_by_hand() -> dict[str, float]:
    """Bytes per parameter: before the third step and after it; the optimizer's state; and that of other optimizers."""
    others = {id(o) for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer)}
    there, sizes = living(), []
    model, optimizer, mine = started(1200)
    for _ in range(3):
        model(torch.ones(1, 1200), False).square().mean().backward()
        mine.finish_backward()
        sizes.append(held(there))
        mine.step(divisor=dist.get_world_size())
    kept = {"before": sizes[-1], "after": held(there), "state": 0, "foreign": 0}
    for each in [o for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer) and id(o) not in others]:
        kept["state" if each is optimizer else "foreign"] += bytes_of(
            t for entry in each.state.values() for t in entry.values() if isinstance(t, Tensor) and t.dim())
    return {what: size / sum(p.numel() for p in model.parameters()) for what, size in kept.items()}


def test_stage_1_by_hand_shards_the_optimizer(run_ranks):
    results = run_ranks(kept_by_hand, 3)
    for rank, kept in enumerate(results):
        assert kept["state"] < 1.05 * 8 / 3, \
            f"rank {rank} of 3 holds {kept['state']:.2f} bytes of optimizer state per parameter; 8 / 3 are its third"
        assert kept["foreign"] == 0, f"rank {rank}: another optimizer holds {kept['foreign']:.2f} bytes of state"
    used = sum(kept["state"] for kept in results) / 8  # of the layers that have gradients
    assert 0.9 < used < 1.01, f"all ranks together hold the state of {used:.0%} of the parameters"


@on_ranks(3)
def test_stage_1_by_hand_keeps_nothing_else():
    kept = kept_by_hand()
    for when in ("before", "after"):
        assert kept[when] < 4 + 4 + 12 / 3 + 0.45, f"each of 3 ranks holds {kept[when]:.2f} bytes per parameter " \
            f"{when} a step; weights, gradients, its third of the state and masters of its own are 12"


@on_ranks(2)
def test_stage_1_by_hand_sends_as_much_as_an_all_reduce():
    sent = by_hand(100, 1, 0.0)
    assert 0.95 < sent < 1.05, f"each of 2 ranks sent {sent:.2f} elements per parameter; 1 is an all-reduce's"


# --- The small steps --------------------------------------------------------------------------------------------------

FLAT = torch.arange(8.0)


def sum_by_hand() -> Tensor:
    rank, ranks, log = dist.get_rank(), dist.get_world_size(), []
    tensor = random(1000, rank)
    with Wire(log, delay=0.02 * rank):  # who does not wait adds up what has not come
        steps.all_reduce(tensor)
    error = (tensor - sum(random(1000, r) for r in range(ranks))).abs().max()
    assert error < 1e-5, f"rank {rank} of {ranks}: the sum is off by {error:.3g}"
    assert log == ["send"] * (ranks - 1), f"one isend to each other rank, and rank {rank} of {ranks} did {log}"
    return tensor


def test_all_reduce(run_ranks):
    for ranks in (1, 3):
        first, *others = run_ranks(sum_by_hand, ranks)
        assert all(torch.equal(first, other) for other in others), "ranks differ in bits: they add in another order"


def test_pad():
    for count, ranks, length in ((8, 4, 8), (9, 4, 12), (1, 3, 3), (0, 2, 0), (7, 1, 7)):
        flat = torch.arange(1.0, count + 1)
        padded = steps.pad(flat, ranks)
        assert padded.tolist() == flat.tolist() + [0.0] * (length - count), f"{count} elements, {ranks} ranks: {padded}"
        assert steps.pad(flat.half(), ranks).dtype is torch.half, "the dtype has changed"


def test_shard():
    for ranks in (1, 2, 4):
        flat = FLAT.clone()
        shards = [steps.shard(flat, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(shards), flat), f"{ranks} ranks: the shards are {shards}"
        assert {len(shard) for shard in shards} == {8 // ranks}, f"{ranks} ranks: shards differ in length"
        shards[-1].zero_()
        assert flat[-1] == 0, "writing to a shard does not change flat: it is a copy, and not a view"


def test_bucket():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    values = [p.detach().clone() for p in model.parameters()]
    flat = steps.bucket(list(model.parameters()), 4)
    assert flat.shape == (12,) and not flat.requires_grad, f"11 elements for 4 ranks: flat is {flat}"
    assert torch.equal(flat, torch.cat([*(v.flatten() for v in values), torch.zeros(1)])), "flat has other values"
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values)), "the parameters have other values"
    flat.fill_(2.0)
    assert all(bool((p == 2).all()) for p in model.parameters()), "a parameter is no view of flat"


def test_gradient_hook():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    plain, flat = copy.deepcopy(model), torch.zeros(24)
    steps.gradient_hook(list(model.parameters()), flat)
    for micro_batch in range(2):
        for net in (plain, model):
            net(torch.ones(2, 3) * (micro_batch + 1)).sum().backward()
        expected = torch.cat([*(p.grad.flatten() for p in plain.parameters()), torch.zeros(3)])
        assert torch.allclose(flat, expected), f"after backward {micro_batch}: off by {(flat - expected).abs().max()}"
        assert all(p.grad is None for p in model.parameters()), "a gradient is kept in p.grad too"


@on_ranks(2)
def test_overlap():
    torch.manual_seed(0)
    model, log = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), []
    plain = copy.deepcopy(model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: log.append("gradient"))
    buckets = [(list(layer.parameters()), torch.zeros(20)) for layer in (model[2], model[0])]
    works = steps.overlap(buckets)
    with after_rank_0() as early, Wire(log):
        model(torch.ones(2, 4) * (1 + dist.get_rank())).sum().backward()
    for work in works:
        work.wait()
    for rank in range(2):
        plain(torch.ones(2, 4) * (1 + rank)).sum().backward()
    assert len(works) == 2 == log.count("allreduce"), f"2 buckets, {len(works)} works, and in backward {log}"
    assert log[:3] == ["gradient", "gradient", "allreduce"], f"a bucket goes out with its second gradient: {log}"
    assert early, "backward on rank 0 waits for that of rank 1"
    for (_, flat), layer in zip(buckets, (plain[2], plain[0])):
        error = (flat - torch.cat([p.grad.flatten() for p in layer.parameters()])).abs().max()
        assert error < 1e-5, f"a bucket's sum is off by {error:.3g}"


@on_ranks(2)
def test_clip():
    whole, rank = torch.cat([random(10, rank) for rank in range(2)]), dist.get_rank()
    for limit in (0.5, 100.0):
        shard = random(10, rank)
        with Wire() as wire:
            norm = steps.clip(shard, limit)
        expected = whole.chunk(2)[rank] * min(1.0, limit / (float(whole.norm()) + 1e-6))
        assert abs(norm - whole.norm()) < 1e-4, f"rank {rank}: norm {norm}; over all ranks it is {whole.norm()}"
        assert wire.elements <= 2, f"rank {rank} sends {wire.elements} elements; the sum of squares is one"
        assert torch.allclose(shard, expected), f"limit {limit}: the shard is clipped to {shard}, and not {expected}"


def gathered_and_freed() -> tuple[Tensor, Tensor, Tensor]:
    """A bucket that was gathered, a view of it, and this rank's shard; both have what gather left."""
    flat, own = FLAT.clone(), torch.arange(4.0) + 4 * dist.get_rank()
    view = flat[2:6].view(2, 2)
    flat.untyped_storage().resize_(0)
    with after_rank_0() as early, Wire() as wire:
        work = steps.gather(flat, own)
    work.wait()
    assert early, "rank 0 waits for rank 1 inside the call"
    assert wire.elements == 4, f"each rank sends {wire.elements} elements, and its shard has 4"
    return flat, view, own


@on_ranks(2)
def test_gather():
    flat, view, _ = gathered_and_freed()
    assert flat.tolist() == FLAT.tolist(), f"rank {dist.get_rank()} gathered {flat}"
    assert view.tolist() == [[2.0, 3.0], [4.0, 5.0]], f"a view of flat has {view}: another storage"


@on_ranks(2)
def test_free():
    flat, view, own = gathered_and_freed()
    expected = (flat + 10).chunk(2)[dist.get_rank()].tolist()
    flat += 10
    steps.free(flat, own)
    size = flat.untyped_storage().nbytes() + view.untyped_storage().nbytes()
    assert size == 0, f"{size} bytes of flat are left"
    assert view.shape == (2, 2), f"a view of flat has the shape {tuple(view.shape)}"
    assert own.tolist() == expected, f"rank {dist.get_rank()} keeps {own}: changes go"


class Gathered:
    """Layers that multiply by their number plus 1, and compute only while they are whole; ``log`` says what came."""

    def __init__(self, count: int):
        self.log, self.state = [], ["sharded"] * count
        self.calls = [lambda x, i=i: self.compute(i, x) for i in range(count)]

    def start(self, number: int) -> mock.Mock:
        self.log.append(f"start {number}")
        assert self.state[number] == "sharded", f"layer {number} is gathered twice: {self.log}"
        self.state[number] = "coming"
        on_their_way = [i for i, state in enumerate(self.state) if state in ("coming", "whole")]
        assert len(on_their_way) <= 2, f"layers {on_their_way} are whole or on their way: {self.log}"
        return mock.Mock(wait=lambda: self.become("whole", number))

    def become(self, state: str, number: int) -> None:
        self.log.append(f"{state} {number}")
        self.state[number] = state

    def compute(self, number: int, x: Tensor) -> Tensor:
        self.log.append(f"compute {number}")
        assert self.state[number] == "whole", f"layer {number} computes while it is {self.state[number]}: {self.log}"
        last = number + 1 == len(self.state)
        assert last or self.state[number + 1] == "coming", f"layer {number + 1} is not on its way: {self.log}"
        return x * (number + 1)


def test_prefetch():
    for count in (1, 2, 5):
        layers = Gathered(count)
        result = steps.prefetch(layers.calls, layers.start, lambda i: layers.become("freed", i), torch.ones(1))
        assert float(result) == torch.arange(1.0, count + 1).prod(), f"{count} layers give {result}: {layers.log}"
        assert layers.state == ["freed"] * count, f"not every layer is freed: {layers.log}"


def test_message_and_ring():
    assert steps.message(1000, 0.5, 2000.0) == pytest.approx(1.0), "1,000 bytes at 2,000 a second, after half a second"
    for ranks, seconds in ((1, 0.0), (2, 2 * (0.5 + 4.0)), (4, 6 * (0.5 + 2.0)), (8, 14 * (0.5 + 1.0))):
        got = steps.ring(8000, ranks, 0.5, 1000.0)
        assert got == pytest.approx(seconds), f"8,000 bytes, {ranks} ranks: {got} seconds, and not {seconds}"


def test_communication():
    for stage, seconds in ((0, 0.7505), (1, 0.7505), (2, 0.7505), (3, 1.12575)):
        for compute in (1.0, 0.5, 2.0):
            told = steps.communication(stage, 10**9 // 2, 4, 1e-3 / 12, 2e9, compute)
            assert told == (pytest.approx(seconds), seconds > compute), f"stage {stage}, {compute} s computing: {told}"
