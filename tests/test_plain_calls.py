"""PyTorch's own calls on a model and an optimizer that initialize() was given: they mean what they say, or raise.

    .venv/bin/python -m pytest -q tests/test_plain_calls.py

So do writes in place, by the model or the script: what is written into a weight stays, at every stage and precision.
"""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint

import zero
from conftest import on_ranks
from oracle import STAGES, WIDTH, Model, Pair, assert_close, batches, chain, mine, plain_backward, square, start, \
    twins, whole


def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))


# --- Gradients that are dropped ---------------------------------------------------------------------------------------


DROPS = {
    "model.zero_grad()": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "optimizer.zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "a part's zero_grad()": lambda model, optimizer: model[1].zero_grad(),
    "p.grad = None": lambda model, optimizer: setattr(model[2][0].weight, "grad", None),
    "p.grad.zero_()": lambda model, optimizer: model[0][0].weight.grad.zero_(),
}


@pytest.mark.parametrize("stage, drop, raw", [
    pytest.param(stage, drop, raw, marks=() if (stage + index + raw) % 2 else pytest.mark.long)
    for stage in STAGES for index, drop in enumerate(DROPS) for raw in (False, True)])
@on_ranks(2)
def test_dropped_gradients_do_not_train(stage, drop, raw):
    """Of a micro-batch, all or some; by either kind of backward."""
    accumulation = 1 + (stage + raw) % 2
    pair = Pair(net, stage, gradient_accumulation_steps=accumulation)
    for step in range(3):
        for micro in range(accumulation):
            for bad in (True, False) if step < 2 else (False,):
                data = 10 * step + 2 * micro + bad
                loss = square(pair.engine, mine(batches(data)))
                loss.backward() if raw else pair.engine.backward(loss)
                plain_backward(square(pair.reference, x) / accumulation for x in batches(data))
                if bad and micro == accumulation - 1:
                    DROPS[drop](pair.model, pair.engine.optimizer)
                    DROPS[drop](pair.reference, pair.optimizer)
            pair.engine.step()
        pair.plain_step()
        pair.check(f"step {step}")


@on_ranks(2, stage=STAGES)
def test_a_backward_after_zero_grad_reduces_each_bucket_once(stage):
    pair, counts = Pair(net, stage, gradient_accumulation_steps=2 if stage > 1 else 1), [0]
    for step in range(2):
        pair.backward(step)
        traffic = pair.engine.zero.communicator.traffic
        counts.append(sum(record.calls for kind, record in traffic.items() if kind != "all-gather"))
        pair.model.zero_grad()
    assert counts[2] - counts[1] == counts[1] > 0


@on_ranks(2, stage=STAGES)
def test_a_reduced_gradient_that_one_rank_drops_is_an_error_on_all(stage):
    pair = Pair(net, stage)
    pair.backward(0)
    if dist.get_rank() == 1:
        pair.model.zero_grad()
    with pytest.raises(RuntimeError, match="dropped gradients on some ranks alone"):
        pair.engine.step()


# --- Calls that can't do what they say --------------------------------------------------------------------------------


@on_ranks(2, stage=STAGES)
def test_calls_that_move_nothing_raise_and_name_the_one_that_does(stage):
    pair = Pair(net, stage)
    model, engine, optimizer, p = pair.model, pair.engine, pair.engine.optimizer, pair.model[1][0].weight
    before = whole(model)
    pair.backward(0)
    calls = {
        "engine.step": [optimizer.step, lambda: torch.amp.GradScaler("cpu", enabled=False).step(optimizer)],
        "initialize": [lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})],
        "engine.load_checkpoint": [lambda: optimizer.load_state_dict(optimizer.state_dict())],
        "safe_get_full_grad": [
            lambda: clip_grad_norm_(model.parameters(), 1.0), lambda: clip_grad_value_(model.parameters(), 1.0),
            lambda: p.grad.mul_(0.5), lambda: p.grad + 1, lambda: float(p.grad.norm()), lambda: p.grad.clone(),
            lambda: p.grad.copy_(torch.ones(WIDTH, WIDTH)), lambda: torch._foreach_mul_([p.grad], 2.0)],
    }
    for name, some in calls.items():
        for call in some:
            with pytest.raises(RuntimeError, match=name):
                call()
    assert all(torch.equal(value, before[name]) for name, value in whole(model).items())
    p.grad = torch.ones(WIDTH, WIDTH, dtype=p.dtype)
    with pytest.raises(RuntimeError, match="p.grad of 1.0.weight was set after backward"):
        engine.step()
    p.grad = None
    engine.zero_grad()
    pair.train(0)
    pair.check()
    engine.destroy()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})  # it is the caller's again


CHANGES = {
    "replace a layer": (lambda model, optimizer: model[1].__setitem__(0, nn.Linear(WIDTH, WIDTH).double()),
                        "1.0.weight came into the model"),
    "add a layer": (lambda model, optimizer: model[2].add_module("adapter", nn.Linear(WIDTH, WIDTH).double()),
                    "2.adapter.weight came into the model"),
    "replace a parameter": (
        lambda model, optimizer: setattr(model[0][0], "weight", nn.Parameter(torch.ones(WIDTH, WIDTH).double())),
        "0.0.weight came into the model"),
    "remove a layer": (lambda model, optimizer: model[2].__setitem__(0, nn.Identity()), "2.0.bias has left the model"),
    "assign data": (lambda model, optimizer: setattr(model[0][0].weight, "data", torch.ones(WIDTH, WIDTH).double()),
                    "0.0.weight no longer lies|data: the parameter 0.0.weight is sharded"),
    "assign data of the optimizer's": (
        lambda model, optimizer: [setattr(p, "data", p.data.mul(0.9)) for p in optimizer.param_groups[0]["params"]],
        "was given other memory"),
    "append to a group": (
        lambda model, optimizer: optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2))),
        "param group 0 were changed"),
    "append a group": (
        lambda model, optimizer: optimizer.param_groups.append(
            {**optimizer.param_groups[0], "params": [nn.Parameter(torch.ones(2))]}), "param group 1 were changed"),
}


@on_ranks(2, change=CHANGES, stage=STAGES, then=["save_checkpoint", "step"])
def test_a_model_or_optimizer_that_was_changed_behind_the_engine_is_named(change, stage, then, tmp_path):
    pair = Pair(net, stage)
    pair.backward(0)
    call, told = CHANGES[change]
    with pytest.raises(RuntimeError, match=told):
        call(pair.model, pair.engine.optimizer)
        getattr(pair.engine, then)(*[tmp_path] * (then == "save_checkpoint"))


@on_ranks(2)
def test_assigning_data_inside_gathered_parameters_is_an_error():
    model, _ = twins(net)
    start(model, 3)
    with pytest.raises(RuntimeError, match="0.0.weight: p.data was assigned inside GatheredParameters"):
        with zero.GatheredParameters(model.parameters(), modifier_rank=0):
            model[0][0].weight.data = torch.ones(WIDTH, WIDTH).double()


@pytest.mark.parametrize("share", ["a parameter", "a buffer", "a part"])
def test_parameters_over_one_memory_are_refused(share):
    model = nn.ModuleDict({"emb": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    if share == "a parameter":
        model["head"].weight = nn.Parameter(model["emb"].weight.data)
    elif share == "a buffer":
        model["head"].register_buffer("table", model["emb"].weight.data[1:3])
    else:
        model["head"].weight = nn.Parameter(model["emb"].weight.data[2:])
    with pytest.raises(ValueError, match="emb.weight and head.* share memory"):
        start(model, 0)
    parts = torch.ones(9, 4)  # parts that don't overlap are parameters like others
    model["emb"].weight, model["head"].weight = nn.Parameter(parts[:5]), nn.Parameter(parts[5:])
    model["head"]._buffers.clear()
    start(model, 0).destroy()


@pytest.mark.parametrize("make, told", [
    (lambda: torch.jit.script(nn.Linear(3, 1)), "model is a ScriptModule"),
    (lambda: nn.LazyLinear(3), "weight has no shape yet; run a lazy model once")], ids=["script", "lazy"])
def test_scripted_and_lazy_models_are_refused_by_name(make, told):
    with pytest.raises(ValueError, match=told):
        start(make(), 0, make_optimizer=None)


# --- Hooks of the optimizer -------------------------------------------------------------------------------------------


@on_ranks(2, stage=STAGES, kind=[torch.optim.SGD, torch.optim.AdamW])
def test_step_hooks_run_once_around_the_whole_step(stage, kind):
    """One doubles the gradients before the step, and one sees the model after it."""
    seen: list[list] = []

    def double(optimizer, *_):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(2)

    def make(parameters):
        parameters, weights = list(parameters), []
        optimizer, read = kind(parameters, lr=0.01), torch.clone if seen else zero.safe_get_full_fp32_param
        seen.append(weights)
        optimizer.register_step_pre_hook(double)
        optimizer.register_step_post_hook(lambda *_: weights.append([read(p) for p in parameters]))
        return optimizer

    pair = Pair(net, stage, make)  # the engine makes its own first
    for step in range(2):
        pair.train(step)
    pair.check()
    assert len(seen[0]) == len(seen[1]) == 2
    for step, (ours, theirs) in enumerate(zip(*seen)):
        assert all(map(torch.allclose, ours, theirs)), f"the hook of step {step} saw other weights"


# --- The caller's own backward ----------------------------------------------------------------------------------------


@on_ranks(2, stage=STAGES, call=["engine", "raw", "scale"])
def test_the_mean_over_micro_batches_is_the_engines(stage, call):
    """Whether backward is the engine's, its scaled loss's or the loss's own."""
    pair = Pair(net, stage, gradient_accumulation_steps=3)
    for micro in range(3):
        loss = square(pair.engine, mine(batches(micro)))
        if call == "engine":
            pair.engine.backward(loss)
        else:
            (pair.engine.scale(loss) if call == "scale" else loss).backward()
        pair.engine.step()
    pair.plain(0, 1, 2)
    pair.check()


def test_a_backward_without_the_loss_scale_is_an_error():
    engine = start(nn.Linear(2, 2), 0, fp16={"enabled": True, "initial_scale_power": 4})
    x = torch.ones(1, 2, dtype=torch.float16)
    for after in (lambda: engine(x), engine.step, lambda: engine.backward(engine.module(x).sum()), engine.flush):
        engine.module(x).sum().backward()
        with pytest.raises(RuntimeError, match=r"engine.backward\(loss\), or engine.scale\(loss\).backward\(\)"):
            after()
    engine.scale(engine(x).sum()).backward()
    engine.step()
    assert engine.global_steps == 1
    engine.destroy()


@on_ranks(2, stage=STAGES)
def test_a_loss_from_before_the_step_is_refused_as_in_pytorch(stage):
    pair = Pair(net, stage)
    old = square(pair.engine, mine(batches(0)))
    pair.train(1)
    with pytest.raises(RuntimeError, match="modified"):
        pair.engine.backward(old)


def reused() -> Model:
    """Its layers are used inside and outside of a recomputed part, so a gradient comes twice in a backward."""
    return Model(lambda m, x: m.layers(checkpoint(m.layers, x.requires_grad_(), use_reentrant=True)), layers=net())


@on_ranks(2, stage=STAGES)
def test_a_gradient_that_comes_late_is_in_the_whole_gradient(stage):
    pair = Pair(reused, stage)
    pair.backward(0)
    plain_backward(square(pair.reference, x) for x in batches(0))
    for (name, p), q in zip(pair.model.named_parameters(), pair.reference.parameters()):
        assert_close(zero.safe_get_full_grad(p), q.grad, f"the gradient of {name}")


@pytest.mark.parametrize("stage", [0, 2])
def test_create_graph_leaves_no_graph_behind_the_bucket(stage):
    engine = start(net(), stage, gradient_accumulation_steps=2)
    for _ in range(2):
        x = torch.randn(2, WIDTH, requires_grad=True)
        graph = weakref.ref(engine(x).square())
        square(engine, x).backward(create_graph=True)
        for bucket in engine.zero.buckets:
            held = [bucket.gradients.buffer, bucket.gradients.sum, *(slot.parameter.grad for slot in bucket.slots)]
            assert not any(t is not None and t.requires_grad for t in held)
        engine.step()
    assert graph() is None
    engine.destroy()


@on_ranks(ranks=[1, 2], stage=STAGES)
def test_an_engine_that_nobody_refers_to_is_collected_with_its_model(ranks, stage):
    """On several ranks once it is destroyed."""
    model, before = net(), set(zero._SLOTS)
    engine = start(model, stage)
    engine.backward(square(engine, torch.randn(2, WIDTH)))
    engine.step()
    alive = weakref.ref(engine), weakref.ref(model), weakref.ref(engine.zero)
    if ranks > 1:
        engine.destroy()
    del model, engine
    gc.collect()
    assert [thing() for thing in alive] == [None] * 3 and not set(zero._SLOTS) - before


# --- Writes in place --------------------------------------------------------------------------------------------------


SGD, AMP = partial(torch.optim.SGD, lr=0.0), {"bf16": {"enabled": True, "auto_cast": True}}


def train(engine, *inputs: torch.Tensor) -> None:
    for x in inputs or (torch.ones(4, WIDTH),):
        engine.backward(engine(x).sum())
        engine.step()


def largest(*parameters: nn.Parameter) -> float:
    return max(float(zero.safe_get_full_fp32_param(p).abs().max()) for p in parameters)


def clamps(m, ids):
    """In forward its embedding renormalizes rows of its weight, and it writes into a child's."""
    x = chain(m, torch.ones(len(ids), WIDTH))
    with torch.no_grad():
        m.blocks[0][0].weight.clamp_(-0.01, 0.01)
    return x + m.rows(ids)


@on_ranks(2, stage=STAGES)
def test_what_a_model_writes_into_its_weights_in_forward_stays(stage):
    torch.manual_seed(0)
    model = Model(clamps, rows=nn.Embedding(4, WIDTH, max_norm=0.1),
                  blocks=[nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(3)])
    train(start(model, stage, SGD), torch.arange(4))
    assert largest(model.blocks[0][0].weight) <= 0.01001
    assert float(zero.safe_get_full_fp32_param(model.rows.weight).norm(dim=1).max()) <= 0.1 + 1e-6


@on_ranks(2, stage=STAGES, options=[{}, AMP, {"zero_options": {"offload_optimizer": {"device": "cpu"}}}])
def test_what_a_script_writes_between_steps_is_not_undone_by_the_next(stage, options):
    """WGAN's clipping of weights."""
    torch.manual_seed(0)
    model = net()
    engine = start(model, stage, SGD, **options)
    for _ in range(2):
        train(engine)
        with torch.no_grad(), zero.GatheredParameters(model.parameters(), modifier_rank=0 if stage == 3 else None):
            for p in model.parameters():
                p.clamp_(-0.01, 0.01)
    train(engine)
    assert largest(*model.parameters()) <= 0.01001


@on_ranks(2, stage=range(3))
def test_what_was_written_just_before_is_saved_and_a_state_dict_that_is_loaded_stays(stage, tmp_path):
    """With fp32 masters beside bf16 weights."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH)
    engine = start(model, stage, SGD, **AMP)
    train(engine)
    with torch.no_grad():
        model.weight.fill_(0.5)
        assert torch.equal(zero.safe_get_full_fp32_param(model.weight), torch.full((WIDTH, WIDTH), 0.5))
        model.bias.fill_(0.25)
    engine.save_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path)
    assert torch.equal(zero.safe_get_full_fp32_param(model.bias), torch.full((WIDTH,), 0.25))
    model.load_state_dict({name: torch.full_like(p, 0.125) for name, p in model.state_dict().items()})
    train(engine)
    assert all(bool((value == 0.125).all()) for value in whole(model).values())
