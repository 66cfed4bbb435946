"""PyTorch's own calls on a model and an optimizer that initialize() was given: they mean what they say, or raise.

    .venv/bin/python -m pytest -q tests/test_plain_calls.py
"""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import engine as deepspeed
import zero

STAGES, RANKS, WIDTH = range(4), 2, 8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))).double()


def start(model, stage, optimizer=None, **config):
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0,
              "zero_optimization": {"stage": stage, "reduce_bucket_size": 100}, **config}
    if optimizer is None:
        config.setdefault("optimizer", {"type": "SGD", "params": {"lr": 0.1}})
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[:2]


def rows(step, rank, dtype=torch.float64):
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank), dtype=dtype)


def mine(step):
    return rows(step, dist.get_rank())


def plain_backward(model, step, weight=1.0):
    for rank in range(dist.get_world_size()):
        (weight * model(rows(step, rank)).square().mean() / dist.get_world_size()).backward()


def assert_equal_models(engine, reference, what):
    for (name, p), q in zip(engine.module.named_parameters(), reference.parameters()):
        difference = float((zero.safe_get_full_fp32_param(p) - q).abs().max())
        assert difference < 1e-12, f"{what}: {name} differs by {difference:.3g}"


# --- Gradients that are dropped ---------------------------------------------------------------------------------------


DROPS = {
    "model.zero_grad()": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "optimizer.zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "a part's zero_grad()": lambda model, optimizer: model[1].zero_grad(),
    "p.grad = None": lambda model, optimizer: setattr(model[2][0].weight, "grad", None),
    "p.grad.zero_()": lambda model, optimizer: model[0][0].weight.grad.zero_(),
}


def drop_gradients(stage, drop, accumulation, raw):
    """A micro-batch whose gradients, or some of them, are dropped; then more; equal to plain PyTorch."""
    model = net()
    reference = copy.deepcopy(model)
    engine, optimizer = start(model, stage, gradient_accumulation_steps=accumulation)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(3):
        for micro in range(accumulation):
            for bad in (True, False) if step < 2 else (False,):
                data = 10 * step + 2 * micro + bad
                loss = engine(mine(data)).square().mean()
                loss.backward() if raw else engine.backward(loss)
                plain_backward(reference, data, 1 / accumulation)
                if bad and micro == accumulation - 1:
                    DROPS[drop](model, optimizer)
                    DROPS[drop](reference, plain)
            engine.step()
        plain.step()
        plain.zero_grad()
        assert_equal_models(engine, reference, f"{drop}, stage {stage}, accumulation {accumulation}, step {step}")
    engine.destroy()


@pytest.mark.parametrize("raw", [False, True], ids=["engine.backward", "loss.backward"])
def test_dropped_gradients_do_not_train(run_ranks, raw, request):
    """Half of the pairs of a stage and a way to drop with each kind of backward, unless --long."""
    for stage in STAGES:
        for index, drop in enumerate(DROPS):
            if request.config.getoption("--long") or (stage + index + raw) % 2:
                run_ranks(drop_gradients, RANKS, stage, drop, 1 + (stage + raw) % 2, raw)


def reductions_of_two_backwards(stage):
    """The reductions of a window's first backward, and of one more after the model's own zero_grad()."""
    model, counts = net(), []
    engine, _ = start(model, stage, gradient_accumulation_steps=2 if stage > 1 else 1)
    for step in range(2):
        before = sum(t.calls for kind, t in engine.zero.communicator.traffic.items() if kind != "all-gather")
        engine.backward(engine(mine(step)).square().mean())
        counts.append(sum(t.calls for kind, t in engine.zero.communicator.traffic.items()
                          if kind != "all-gather") - before)
        model.zero_grad()
    engine.zero_grad()
    engine.destroy()
    return counts


def test_a_backward_after_zero_grad_reduces_each_bucket_once(run_ranks):
    for stage in STAGES:
        for first, second in run_ranks(reductions_of_two_backwards, RANKS, stage):
            assert first == second > 0, f"stage {stage}"


def drop_on_one_rank(stage):
    model = net()
    engine, _ = start(model, stage)
    engine.backward(engine(mine(0)).square().mean())
    if dist.get_rank() == 1:
        model.zero_grad()
    with pytest.raises(RuntimeError, match="dropped gradients on some ranks alone"):
        engine.step()
    engine.zero_grad()
    engine.destroy()


def test_a_reduced_gradient_that_one_rank_drops_is_an_error_on_all(run_ranks):
    for stage in STAGES:
        run_ranks(drop_on_one_rank, RANKS, stage)


# --- Calls that can't do what they say --------------------------------------------------------------------------------


def refused_calls(stage):
    model = net()
    engine, optimizer = start(model, stage)
    before = [zero.safe_get_full_fp32_param(p) for p in model.parameters()]
    engine.backward(engine(mine(0)).square().mean())
    p = model[1][0].weight
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
    after = [zero.safe_get_full_fp32_param(p) for p in model.parameters()]
    assert all(map(torch.equal, before, after))
    p.grad = torch.ones(WIDTH, WIDTH, dtype=p.dtype)
    with pytest.raises(RuntimeError, match="p.grad of 1.0.weight was set after backward"):
        engine.step()
    p.grad = None
    engine.zero_grad()
    engine.backward(engine(mine(0)).square().mean())
    engine.step()
    engine.destroy()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})  # it is the caller's again


def test_calls_that_move_nothing_raise_and_name_the_one_that_does(run_ranks):
    for stage in STAGES:
        run_ranks(refused_calls, RANKS, stage)


def replace_a_layer(model, optimizer):
    model[1][0] = nn.Linear(WIDTH, WIDTH).double()


def add_a_layer(model, optimizer):
    model[2].add_module("adapter", nn.Linear(WIDTH, WIDTH).double())


def replace_a_parameter(model, optimizer):
    model[0][0].weight = nn.Parameter(torch.ones(WIDTH, WIDTH).double())


def remove_a_layer(model, optimizer):
    model[2][0] = nn.Identity()


def assign_data(model, optimizer):
    model[0][0].weight.data = torch.ones(WIDTH, WIDTH).double()


def assign_data_of_the_optimizers(model, optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.data = p.data.mul(0.9)


def append_to_a_group(model, optimizer):
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))


def append_a_group(model, optimizer):
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [nn.Parameter(torch.ones(2))]})


CHANGES = {replace_a_layer: "1.0.weight came into the model", add_a_layer: "2.adapter.weight came into the model",
           replace_a_parameter: "0.0.weight came into the model", remove_a_layer: "2.0.bias has left the model",
           assign_data: "0.0.weight no longer lies|data: the parameter 0.0.weight is sharded",
           assign_data_of_the_optimizers: "was given other memory",
           append_to_a_group: "param group 0 were changed", append_a_group: "param group 1 were changed"}


def changed_model(stage, change, path):
    for then in (lambda engine: engine.save_checkpoint(path), lambda engine: engine.step()):
        model = net()
        engine, optimizer = start(model, stage)
        engine.backward(engine(mine(0)).square().mean())
        with pytest.raises(RuntimeError, match=CHANGES[change]):
            change(model, optimizer)
            then(engine)
        engine.destroy()


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_or_optimizer_that_was_changed_behind_the_engine_is_named(run_ranks, tmp_path, change):
    for stage in STAGES:
        run_ranks(changed_model, RANKS, stage, change, tmp_path)


def assign_inside_gathered():
    model = net()
    start(model, 3)
    with pytest.raises(RuntimeError, match="0.0.weight: p.data was assigned inside GatheredParameters"):
        with zero.GatheredParameters(model.parameters(), modifier_rank=0):
            model[0][0].weight.data = torch.ones(WIDTH, WIDTH).double()


def test_assigning_data_inside_gathered_parameters_is_an_error(run_ranks):
    run_ranks(assign_inside_gathered, RANKS)


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
    whole = torch.ones(9, 4)  # parts that don't overlap are parameters like others
    model["emb"].weight, model["head"].weight = nn.Parameter(whole[:5]), nn.Parameter(whole[5:])
    model["head"]._buffers.clear()
    start(model, 0)[0].destroy()


# --- Hooks of the optimizer -------------------------------------------------------------------------------------------


def hooked_steps(stage, kind):
    """A hook that doubles gradients before the step and one that averages the model after it, as plain PyTorch's."""
    engines = []
    for model in (net(), net()):
        optimizer, averages = kind(model.parameters(), lr=0.01), []

        def double(optimizer, *_):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad.mul_(2)

        def average(optimizer, *_, model=model, averages=averages, ours=bool(engines)):
            averages.append([zero.safe_get_full_fp32_param(p) if ours else p.detach().clone()
                             for p in model.parameters()])

        optimizer.register_step_pre_hook(double)
        optimizer.register_step_post_hook(average)
        if not engines:
            reference = model, optimizer, averages
            engines.append(None)
    engines[0] = start(model, stage, optimizer)[0]
    for step in range(2):
        engines[0].backward(engines[0](mine(step)).square().mean())
        engines[0].step()
        plain_backward(reference[0], step)
        reference[1].step()
        reference[1].zero_grad()
    assert_equal_models(engines[0], reference[0], f"stage {stage}, {kind.__name__}")
    assert len(averages) == len(reference[2]) == 2
    for step, (ours, theirs) in enumerate(zip(averages, reference[2])):
        assert all(map(torch.allclose, ours, theirs)), f"stage {stage}: the hook of step {step} saw other weights"
    engines[0].destroy()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_step_hooks_run_once_around_the_whole_step(run_ranks, kind):
    for stage in STAGES:
        run_ranks(hooked_steps, RANKS, stage, kind)


# --- The caller's own backward ----------------------------------------------------------------------------------------


def own_backward(stage, call):
    """A window of three: the engine's mean, whether backward is the engine's, its scaled loss's or the loss's own."""
    model = net()
    reference = copy.deepcopy(model)
    engine, _ = start(model, stage, gradient_accumulation_steps=3)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for micro in range(3):
        loss = engine(mine(micro)).square().mean()
        {"engine": engine.backward, "raw": torch.Tensor.backward,
         "scale": lambda loss: engine.scale(loss).backward()}[call](loss)
        engine.step()
        plain_backward(reference, micro, 1 / 3)
    plain.step()
    assert_equal_models(engine, reference, f"stage {stage}, {call}")
    engine.destroy()


def test_the_mean_over_micro_batches_is_the_engines(run_ranks):
    for stage in STAGES:
        for call in ("engine", "raw", "scale"):
            run_ranks(own_backward, RANKS, stage, call)


def test_a_backward_without_the_loss_scale_is_an_error():
    engine, _ = start(nn.Linear(2, 2), 0, fp16={"enabled": True, "initial_scale_power": 4})
    x = torch.ones(1, 2, dtype=torch.float16)
    for after in (lambda: engine(x), engine.step, lambda: engine.backward(engine.module(x).sum()), engine.flush):
        engine.module(x).sum().backward()
        with pytest.raises(RuntimeError, match=r"engine.backward\(loss\), or engine.scale\(loss\).backward\(\)"):
            after()
    engine.scale(engine(x).sum()).backward()
    engine.step()
    assert engine.global_steps == 1
    engine.destroy()


def old_loss(stage):
    engine, _ = start(net(), stage)
    old = engine(mine(0)).square().mean()
    engine.backward(engine(mine(1)).square().mean())
    engine.step()
    with pytest.raises(RuntimeError, match="modified"):
        engine.backward(old)
    engine.zero_grad()
    engine.destroy()


def test_a_loss_from_before_the_step_is_refused_as_in_pytorch(run_ranks):
    for stage in STAGES:
        run_ranks(old_loss, RANKS, stage)


class Reused(nn.Module):
    """Its middle layer is used inside and outside of a recomputed part, so its gradient comes twice in a backward."""

    def __init__(self):
        super().__init__()
        self.layers = net()

    def forward(self, x):
        y = torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=True)
        return self.layers(y)


def late_gradient(stage):
    model = Reused()
    reference = copy.deepcopy(model)
    engine, _ = start(model, stage)
    engine.backward(engine(mine(0).requires_grad_()).square().mean())
    for rank in range(RANKS):
        (reference(rows(0, rank).requires_grad_()).square().mean() / RANKS).backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        difference = float((zero.safe_get_full_grad(p) - q.grad).abs().max())
        assert difference < 1e-12, f"stage {stage}: the gradient of {name} differs by {difference:.3g}"
    engine.destroy()


def test_a_gradient_that_comes_late_is_in_the_whole_gradient(run_ranks):
    for stage in STAGES:
        run_ranks(late_gradient, RANKS, stage)


@pytest.mark.parametrize("stage", [0, 2])
def test_create_graph_leaves_no_graph_behind_the_bucket(stage):
    model = net()
    engine, _ = start(model, stage, gradient_accumulation_steps=2)
    for _ in range(2):
        x = rows(0, 0).requires_grad_()
        graph = weakref.ref(engine(x).square())
        engine(x).square().mean().backward(create_graph=True)
        for bucket in engine.zero.buckets:
            held = [bucket.gradients.buffer, bucket.gradients.sum, *(slot.parameter.grad for slot in bucket.slots)]
            assert not any(t is not None and t.requires_grad for t in held)
        engine.step()
    assert graph() is None
    engine.destroy()


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_nobody_refers_to_is_collected_with_its_model(stage):
    model = net()
    engine, optimizer = start(model, stage)
    engine.backward(engine(rows(0, 0)).square().mean())
    alive = weakref.ref(engine), weakref.ref(model)
    del model, engine, optimizer
    gc.collect()
    assert alive[0]() is None and alive[1]() is None
