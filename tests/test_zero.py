"""ZeRO against plain PyTorch: equal, really sharded, no more traffic than the table says; models built into shards.

    .venv/bin/python -m pytest -q tests/test_zero.py
    .venv/bin/python -m pytest -q tests/test_zero.py --long     with a thousand drawn models, and one of 1 GB
"""

import copy
import gc
import io
import itertools
import os
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import engine as deepspeed
import zero
from conftest import memory, on_ranks
from oracle import PLAIN, STAGES, Mlp, Model, Net, Pair, assert_alike, assert_close, assert_equal, batches, bytes_of, \
    drawn_loss, drawn_optimizer, draws, fitting, mine, plain, plain_backward, sgd, sharded, square, start, whole

ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}


# --- Equal to plain PyTorch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@given(draws(), st.integers(0, 3))
@settings(phases=[Phase.generate], max_examples=settings().max_examples * 2 // 3)  # shrinking restarts processes
def test_training_equals_plain_pytorch_on_the_whole_batch(run_ranks, world_size, draw, stage):
    draw = fitting(draw, world_size)
    reference, tolerance = plain(draw, world_size), 1e-10 if draw["dtype"] == torch.float64 else 1e-5
    for rank, mine in enumerate(run_ranks(sharded, world_size, draw, stage)):
        assert_equal(mine, reference, tolerance, f"stage {stage}, rank {rank} of {world_size}")


def tiny() -> Model:
    """Parameters without an element, and with fewer than there are ranks."""
    return Model(lambda m, x: torch.cat([m.none(x), m.gain * x], dim=-1) * m.three.sum(), none=nn.Linear(8, 0),
                 gain=nn.Parameter(torch.ones(())), three=nn.Parameter(torch.ones(3)))


def one_by_one(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [p]} for p in parameters], lr=0.1)


@on_ranks(4, stage=STAGES)
def test_parameters_without_elements_and_groups_smaller_than_the_ranks_train(stage):
    pair = Pair(tiny, stage, one_by_one)
    for step in range(3):
        pair.train(step)
        pair.check(f"step {step}", tolerance=1e-12)


@on_ranks(2)
def test_a_large_unit_starts_as_on_rank_0():
    """One that is sharded parameter by parameter; smaller ones are drawn above."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024)) for _ in range(2)))
    expected = zero.gather(model[1][0].weight.detach()[-1])[0]
    start(model, 3)
    assert torch.equal(zero.safe_get_full_fp32_param(model[1][0].weight)[-1], expected)


@on_ranks(3, stage=STAGES)
def test_the_norm_returned_is_that_of_one_process_before_clipping(stage):
    pair = Pair(Mlp, stage, gradient_clipping=0.01)
    pair.train(0, loss=lambda model, x: 2000 * square(model, x))
    assert pair.engine.get_global_grad_norm() == pytest.approx(pair.norm, rel=1e-12) and pair.norm > 1.0
    pair.check()
    assert "before clipping" in deepspeed.Engine.get_global_grad_norm.__doc__


# --- The same bits, on every stage and in every run -------------------------------------------------------------------


@on_ranks(ranks=[2, 3])
def test_two_runs_and_all_ranks_give_the_same_bits(ranks):
    for stage in STAGES:
        first, second = (sharded(PLAIN | {"odd": True}, stage) for _ in range(2))
        assert_equal(second, first, 0, f"stage {stage}, the second run")
        assert_equal((*first[:2], {}), (*zero.gather(first[:2])[0], {}), 0, f"stage {stage}, another rank")


@on_ranks(3)
def test_the_naive_reduction_gives_the_same():
    """A reduce-scatter, and an all-reduce of which a rank keeps its shard."""
    for reduce_scatter in (True, False):
        pair = Pair(Mlp, 2, zero_options={"reduce_scatter": reduce_scatter})
        pair.train(0)
        pair.check(f"reduce_scatter {reduce_scatter}", tolerance=1e-12)


# --- Really sharded, and what is sent ---------------------------------------------------------------------------------


def model_state_bytes(engine) -> int:
    """What a rank holds between steps: parameters, masters, gradients and optimizer state, by their storages."""
    tensors = [p for p in engine.module.parameters()]
    for bucket in engine.zero.buckets:
        held = [bucket.flat, bucket.shard, bucket.master]
        if bucket.gradients is not None:
            held += [bucket.gradients.buffer, bucket.gradients.sum]
        tensors += [t for t in held if t is not None]
    for entry in engine.optimizer.state.values():
        tensors += [t for t in entry.values() if isinstance(t, torch.Tensor) and t.dim()]
    return bytes_of(tensors)


class Wide(nn.Module):
    """Equal blocks, large enough for padding to be small, and nothing outside of them."""

    def __init__(self, layers: int = 4, width: int = 64):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
                                    for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def train_wide(stage: int, accumulation: int = 1, steps: int = 2, watch=None, precision: dict | None = None, **extra):
    """An engine that has trained a Wide for ``steps`` steps; ``watch(engine)`` is called in each block's forward."""
    torch.manual_seed(0)
    model = Wide()
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulation,
        "optimizer": ADAM, "zero_optimization": {"stage": stage, "reduce_bucket_size": 9000} | extra,
        **(precision or {})})
    if watch:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_: watch(engine))
    for _ in range(steps * accumulation):
        engine.backward(engine(torch.randn(2, 64)).float().square().mean())
        engine.step()
    return engine


@on_ranks(ranks=[1, 2, 4], stage=STAGES)
def test_bytes_per_rank_are_those_of_the_table(ranks, stage):
    engine = train_wide(stage)
    held, buckets = model_state_bytes(engine), engine.zero.buckets
    count, whole = sum(p.numel() for p in engine.module.parameters()), sum(bucket.numel for bucket in buckets)
    own = sum(piece.numel() for bucket in buckets for piece in bucket.pieces)
    assert sum(zero.gather(own)) == count * (1 if stage else ranks)
    # Beside the optimizer's state, 8 bytes for each element that is this rank's, padding counts too.
    per_parameter = {0: 8, 1: 8, 2: 4 + 4 / ranks, 3: 8 / ranks}[stage]
    assert held == per_parameter * whole + 8 * own, f"{held / count:.2f} bytes per parameter"
    padding = sum(bucket.numel - sum(slot.shape.numel() for slot in bucket.slots) for bucket in buckets)
    assert padding < 0.05 * count and all(unit.state is zero.UnitState.SHARDED for unit in engine.zero.units)
    assert zero.measure(engine.zero, engine.module)["live", "device"] == 0


@on_ranks(2)
def test_stage_3_holds_the_unit_in_use_and_the_next_one_only():
    for prefetch, units in ((10**9, 2), (0, 1)):
        most = [0]

        def watch(engine):
            live = sum(u.numel for u in engine.zero.units if u.state is not zero.UnitState.SHARDED)
            most[0] = max(most[0], live)
            held = bytes_of(b.flat for b in engine.zero.buckets)
            assert held == 4 * live, "what is said to be sharded has no memory"

        engine = train_wide(3, watch=watch, stage3_prefetch_bucket_size=prefetch)
        size, = {u.numel for u in engine.zero.units if u.buckets}
        assert most[0] == units * size


def traffic_of_a_step(stage: int, accumulation: int, **extra) -> tuple[int, int, int]:
    """Elements sent per rank in the second step, scalars apart; calls for scalars; the padded parameters."""
    engine = train_wide(stage, accumulation, steps=1, **extra)
    engine.zero.communicator.traffic.clear()
    for _ in range(accumulation):
        engine.backward(engine(torch.randn(2, 64)).square().mean())
        engine.step()
    sent = dict(engine.zero.communicator.traffic)
    scalars = sent.pop("scalars").calls
    return sum(record.elements for record in sent.values()), scalars, sum(b.numel for b in engine.zero.buckets)


@on_ranks(ranks=[2, 4], accumulation=[1, 3])
def test_elements_sent_are_those_of_the_table(ranks, accumulation):
    for stage, times in ((0, 2), (1, 2), (2, accumulation + 1), (3, 3 * accumulation)):
        sent, scalars, count = traffic_of_a_step(stage, accumulation)
        assert sent == times * count * (ranks - 1) // ranks, f"stage {stage}"
        assert scalars == 1, "norm, overflow and unused parameters go in one all-reduce"
    naive, _, count = traffic_of_a_step(2, accumulation, reduce_scatter=False)
    assert naive == (2 * accumulation + 1) * count * (ranks - 1) // ranks, "and it is counted"


# --- Any model, unmodified --------------------------------------------------------------------------------------------


def recomputing(reentrant: bool) -> Model:
    """Layers whose activations PyTorch recomputes; the reentrant way fires a shared layer's hooks at each use."""
    def forward(m, x):
        x = m.first(x)
        for _ in range(4):
            x = torch.utils.checkpoint.checkpoint(m.shared, torch.tanh(x), use_reentrant=reentrant)
        return x

    return Model(forward, first=nn.Linear(8, 8), shared=nn.Linear(8, 8))


@on_ranks(2, reentrant=[False, True])
def test_a_shared_layer_recomputed_twice_has_the_right_gradient(reentrant):
    for stage in STAGES:
        pair = Pair(partial(recomputing, reentrant), stage, one_by_one, gradient_accumulation_steps=2)
        for step in (0, 2):
            pair.train(step, step + 1)
        pair.check(f"stage {stage}", tolerance=1e-12)
        assert all(unit.state is zero.UnitState.SHARDED for unit in pair.engine.zero.units)


@on_ranks(2)
def test_evaluation_and_generation_free_what_they_gathered():
    engine = train_wide(3)
    x = torch.randn(2, 64)
    engine.eval()
    with torch.no_grad():
        outputs = [engine(x) for _ in range(3)]
    with_grad = engine(x)  # and a forward pass that no backward follows
    assert {unit.state for unit in engine.zero.units} == {zero.UnitState.SHARDED}
    assert all(torch.equal(outputs[0], o) for o in [*outputs, with_grad])
    engine.train()
    engine.backward(engine(x).sum())
    engine.step()
    assert bytes_of(b.flat for b in engine.zero.buckets) == 0


def test_units_are_found_named_and_shared():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    model = nn.ModuleDict({"token": nn.Embedding(50, 4), "stages": nn.ModuleList(
        nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(3))}) for _ in range(2)),
        "norm": nn.LayerNorm(4)})
    layers = [f"stages.{i}.layers.{j}" for i in range(2) for j in range(3)]
    assert list(zero.find_blocks(model)) == layers
    assert list(zero.find_units(model, None)) == [*layers, "token"]
    assert list(zero.find_units(model, zero.LeafModules(classes=["Layer"]))) == layers
    assert list(zero.find_units(model, zero.LeafModules(names=["norm"], name_suffixes=["0.mlp"]))) == \
        ["stages.0.layers.0.mlp", "stages.1.layers.0.mlp", "norm"]
    with pytest.raises(ValueError, match="no module of classes 'Blok'"):
        zero.find_units(model, zero.LeafModules(classes=["Blok"]))


def test_marked_modules_are_units_without_units_inside():
    class Expert(nn.Sequential):
        pass

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.experts = nn.Linear(4, 4), nn.ModuleList(Expert(nn.Linear(4, 4)) for _ in range(3))

    model = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(2)), "norm": nn.LayerNorm(4)})
    plain, lists = list(zero.find_units(model, None)), [layer.experts for layer in model["layers"]]
    assert deepspeed.utils.set_z3_leaf_modules(model, ["ModuleList"]) == [model["layers"], *lists]
    assert list(zero.find_units(model, None)) == ["layers"], "the outermost that is marked"
    deepspeed.utils.unset_z3_leaf_modules(model, [nn.ModuleList])
    assert list(zero.find_units(model, None)) == plain != ["layers"]
    assert len(zero.set_z3_leaf_modules(model, [Expert, nn.LayerNorm])) == 7 == len(zero.get_z3_leaf_modules(model))
    assert set(zero.find_units(model, zero.LeafModules(classes=["Layer"]))) == {
        "layers.0", "layers.1", "norm", *(f"layers.{i}.experts.{j}" for i in range(2) for j in range(3))}
    with pytest.raises(ValueError, match="the model has no module of .'Blok'."):
        zero.set_z3_leaf_modules(model, ["Blok"])
    assert zero.set_z3_leaf_modules(model, ["Blok"], raise_if_not_found=False) == []
    with pytest.raises(ValueError, match=r"leaf_module_classes is \[3\]"):
        zero.set_z3_leaf_modules(model, [3])
    engine = start(nn.Linear(2, 2), 0)
    with pytest.raises(RuntimeError, match="mark leaf modules before initialize"):
        zero.set_z3_leaf_modules(engine.module, [nn.Linear])
    engine.destroy()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_whole_parameters_lie_in_one_shard_each_and_do_not_overlap(ranks):
    buckets = []
    for sizes in ([1, 64, 0, 65, 1000, 10, 300, 7], [500], [0], [900, 200, 200]):
        slots, end = [], 0
        for index, size in enumerate(sizes):
            p = nn.Parameter(torch.zeros(size))
            slots.append(zero.Slot(f"{len(buckets)} {index}", p, end, end + size, p.shape, (1,)))
            end = -(-slots[-1].end // zero.ALIGN) * zero.ALIGN
        buckets.append((slots, end))
    loads = [0] * ranks
    for (slots, end), bounds in zip(buckets, zero.lay_out_whole([slots for slots, _ in buckets], ranks), strict=True):
        assert len(bounds) == ranks + 1 and bounds[0] == 0 and bounds == sorted(bounds)
        assert bounds[-1] == max(end, zero.ALIGN), "nothing but what aligns the parameters is padding"
        for slot, following in zip(slots, [*slots[1:], None]):
            assert slot.end - slot.offset == slot.shape.numel() and slot.offset % zero.ALIGN == 0
            inside = [low <= slot.offset and slot.end <= high for low, high in itertools.pairwise(bounds)]
            assert any(inside), f"{slot.name} is cut"
            assert slot.end <= (following.offset if following else bounds[-1])
        loads = [load + high - low for load, (low, high) in zip(loads, itertools.pairwise(bounds))]
    assert max(loads) - min(loads) <= 1024 + zero.ALIGN, "no rank has more than another by more than one parameter"


# --- Windows: no_sync, flush ------------------------------------------------------------------------------------------


@on_ranks(2, stage=STAGES)
def test_flush_applies_the_true_mean_of_a_partial_window(stage):
    """A window of 4 that is cut short after 3 micro-batches."""
    pair = Pair(Mlp, stage, gradient_accumulation_steps=4, gradient_clipping=0.05)
    engine = pair.engine
    assert engine.flush() is False, "nothing to apply"
    for micro in range(3):
        pair.backward(micro)
        engine.step()
    assert engine.flush() is True and engine.global_steps == 1 and engine.is_gradient_accumulation_boundary() is False
    pair.plain(0, 1, 2)
    assert abs(engine.get_global_grad_norm() - pair.norm) < 1e-12
    pair.check()


@on_ranks(2, stage=STAGES)
def test_no_sync_sends_nothing_at_stages_0_and_1_and_explains_itself_above(stage):
    pair = Pair(partial(nn.Linear, 8, 8), stage)
    if stage > 1:
        with pytest.raises(RuntimeError, match=rf"no_sync\(\) at stage {stage}: a rank keeps only its shard"), \
                pair.engine.no_sync():
            pass
        return
    with pair.engine.no_sync():
        pair.backward(0)
    pair.backward(1)
    pair.engine.step()
    calls = {kind: record.calls for kind, record in pair.engine.zero.communicator.traffic.items()}
    assert calls == ({"reduce-scatter": 1, "scalars": 1, "all-gather": 1} if stage else {"all-reduce": 1, "scalars": 1})
    pair.plain(0, 1, loss=lambda model, x: 2 * square(model, x))
    pair.check()


@on_ranks(2, stage=STAGES)
def test_unused_parameters_are_named_when_asked(stage):
    pair = Pair(partial(Net, PLAIN), stage, zero_options={"ignore_unused_parameters": False})
    pair.engine.backward(drawn_loss(pair.engine, PLAIN, 0, 0, 0, 1))
    with pytest.raises(RuntimeError, match="no rank has a gradient for never.bias, never.weight"):
        pair.engine.step()


# --- Reading and writing; ranks that disagree -------------------------------------------------------------------------


def partly_frozen() -> Mlp:
    model = Mlp(2)
    model.blocks[1][2].weight.requires_grad_(False)
    return model


@on_ranks(2, stage=STAGES)
def test_parameters_gradients_and_states_are_read_and_written_whole(stage):
    pair = Pair(partly_frozen, stage, partial(torch.optim.AdamW, lr=0.01))
    model, engine = pair.model, pair.engine
    p, q = model.blocks[0][0].weight, pair.reference.blocks[0][0].weight
    bias, frozen = model.blocks[1][0].bias, model.blocks[1][2].weight
    counted = torch.arange(64.0, dtype=torch.float64).view(8, 8).t()  # in another order in memory than the weights
    read, write = zero.safe_get_full_optimizer_state, zero.safe_set_full_optimizer_state
    assert read(frozen, "exp_avg") is zero.safe_get_full_grad(frozen) is zero.safe_get_full_grad(p) is None
    with pytest.raises(RuntimeError, match="blocks.0.0.weight has no reduced gradient to set"):
        zero.safe_set_full_grad(p, counted)
    pair.backward(0)
    plain_backward(square(pair.reference, x) for x in batches(0))
    assert torch.allclose(zero.safe_get_full_grad(p), q.grad)
    bias.grad = None
    assert zero.safe_get_full_grad(bias) is None, "dropped, from a bucket that is reduced"
    with pytest.raises(RuntimeError, match="p.grad: the gradient of blocks.0.0.weight is in its bucket"):
        p.grad.norm()
    with pytest.raises(RuntimeError, match="use of p.grad: the gradient of .* is in its bucket"):
        p.grad.share_memory_()
    refused = [(lambda: write(frozen, counted, "exp_avg"), "blocks.1.2.weight is not trained"),
               (lambda: read(p, "exp_avg"), "'exp_avg' .has: none before an update"),
               (lambda: zero.safe_get_full_fp32_param(q), "belongs to no engine"),
               (lambda: zero.GatheredParameters(p, modifier_rank=2), "modifier_rank is 2"),
               *((lambda bad=bad: zero.safe_set_full_grad(p, bad), r"shape \(8, 8\)") for bad in (None, torch.ones(2)))]
    for call, told in refused:
        with pytest.raises(ValueError, match=told):
            call()
    zero.safe_set_full_grad(p, counted)
    assert torch.equal(zero.safe_get_full_grad(p), counted)
    engine.step()
    assert torch.allclose(read(p, "exp_avg"), counted / 10) and float(read(p, "step")) == 1.0
    for call, told in ((lambda: read(p, "momentum"), "'momentum' .has: exp_avg, exp_avg_sq, step"),
                       (lambda: write(p, counted, "step"), "one value for many"),
                       (lambda: write(p, counted[:1], "exp_avg"), r"is \(1, 8\); allowed: .* shape \(8, 8\)")):
        with pytest.raises(ValueError, match=told):
            call()
    write(p, counted, "exp_avg_sq")
    assert torch.equal(read(p, "exp_avg_sq"), counted)
    zero.safe_set_full_fp32_param(p, counted)
    with zero.GatheredParameters(p):
        assert torch.equal(p.detach(), counted)
    with zero.GatheredParameters(model.parameters(), modifier_rank=1):
        if dist.get_rank() == 1:
            bias.data.fill_(6.0)
    pair.reference.load_state_dict(whole(model))
    assert torch.equal(zero.safe_get_full_fp32_param(p), counted)
    assert bool((zero.safe_get_full_fp32_param(bias) == 6).all())
    assert_close(engine(mine(batches(1))), pair.reference(mine(batches(1))), "what it computes with what was written")


@on_ranks(2, stage=STAGES)
def test_a_gradient_that_is_set_trains_a_parameter_that_has_none(stage):
    """On rank 0, or at stage 3 on both: the loss does not depend on the parameter. The caller's own backward."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    engine, parts = start(model, stage), model if stage < 3 and dist.get_rank() == 1 else model[:1]
    sum(part(torch.ones(2, 2)).sum() for part in parts).backward()
    before = zero.safe_get_full_fp32_param(model[1].weight)
    zero.safe_set_full_grad(model[1].weight, torch.ones(2, 2))
    engine.step()
    assert (zero.safe_get_full_fp32_param(model[1].weight) < before).all()


@on_ranks(2)
def test_lightning_gets_a_state_dict_that_it_can_only_leave_out():
    """Its DeepSpeedStrategy asks every rank for one, and saves nothing of it."""
    class Strategy:
        def lightning_module_state_dict(self) -> dict:
            return model.state_dict()

    class DeepSpeedStrategy(Strategy):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    start(model, 3)
    state = DeepSpeedStrategy().lightning_module_state_dict()
    assert {name: value.shape for name, value in state.items()} == {n: p.shape for n, p in model.named_parameters()}
    for use in (lambda: torch.save(state, io.BytesIO()), lambda: state["0.weight"].sum(), model.state_dict,
                Strategy().lightning_module_state_dict, lambda: nn.Linear(8, 8).weight.data.copy_(state["0.weight"])):
        with pytest.raises(RuntimeError, match="sharded over 2 ranks"):
            use()


class Clipped(nn.Linear):
    def clip(self) -> None:
        self.weight.data.clamp_(-1, 1)


@on_ranks(2)
def test_touching_a_sharded_parameter_is_an_error_and_not_garbage():
    model = nn.Sequential(Clipped(8, 8), nn.Linear(8, 8))
    model.clip = lambda: [p.data.clamp_(-1, 1) for p in model.parameters()]  # what would be written to unseen
    start(model, 3)
    p = model[0].weight
    assert (p.shape, p.numel(), p.dtype, p.requires_grad) == ((8, 8), 64, torch.float32, True) and "8, 8" in repr(p)
    assert isinstance(p, nn.Parameter) and sum(q.numel() for q in model.parameters()) == 144
    for touch in (lambda: p.sum(), model.state_dict, model[0].clip, lambda: p[0], lambda: float(p.max()), model.clip,
                  lambda: p + 1):
        with pytest.raises(RuntimeError, match="the parameter 0.weight is sharded over 2 ranks"):
            touch()
    with pytest.raises(ValueError, match=r"inside GatheredParameters\(0.weight\) without a modifier_rank"), \
            zero.GatheredParameters(p):
        p.data.fill_(1.0)
    assert float(zero.safe_get_full_fp32_param(p).max()) < 1
    assert (p.ds_status, p.ds_numel, p.ds_shape) == (zero.UnitState.SHARDED, 64, p.shape) and hasattr(p, "ds_id")
    assert sum(zero.gather(p.partition_numel())) == 64 and not hasattr(nn.Linear(1, 1).weight, "ds_id")
    assert model.cpu().to(torch.float32).float()[0].weight is p, "what changes nothing is allowed"
    with pytest.warns(UserWarning, match="stay on cpu, and do not go to meta"):
        model.to("meta")
    assert float(zero.safe_get_full_fp32_param(p).max()) < 1
    images = start(nn.Sequential(nn.Conv2d(8, 8, 1)), 3).module
    with pytest.raises(RuntimeError, match=r"to: the parameter 0.weight is sharded over 2 ranks \(stage 3\)"):
        images.to(memory_format=torch.channels_last)


def test_the_c_library_is_left_alone_where_the_environment_says_how_it_keeps_memory():
    for there, calls in (({}, 2), ({"MALLOC_MMAP_THRESHOLD_": "8388608"}, 0)):
        with mock.patch.object(zero, "C_LIBRARY") as library, mock.patch.dict(os.environ, there):
            zero._keep_memory_that_is_freed()
        assert library.mallopt.call_count == calls, there


@on_ranks(2)
def test_what_an_engine_that_is_gone_leaves_sharded_says_so():
    model = nn.Sequential(nn.Linear(8, 8))
    p = model[0].weight
    start(model, 3)
    with zero.GatheredParameters(p):
        loss = p.square().sum()
    zero._slot_of(p).bucket.zero.release()
    gc.collect()
    for call, told in ((model.cpu, "cpu: .* was sharded at stage 3 by an engine that is gone"),
                       (lambda: copy.deepcopy(model), "clone: .* was sharded at stage 3 by an engine that is gone"),
                       (loss.backward, "backward needs the parameter 0.weight, whose engine is gone")):
        with pytest.raises(RuntimeError, match=told):
            call()


@on_ranks(2, stage=STAGES)
def test_an_engine_that_nobody_refers_to_gives_its_model_to_the_next_one(stage):
    """Though its optimizer is kept, and its hooks were taken away: so Lightning's trainer validates after training."""
    first = Pair(Mlp, stage)
    first.train(0)
    model, reference, kept = first.model, first.reference, first.engine.optimizer
    with pytest.raises(ValueError, match="another engine already trains this model"):
        Pair.of(model, reference, 3 - stage)
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    del first
    second = Pair.of(model, reference, 3 - stage)
    second.train(1)
    second.train(2)
    second.check()
    kept.zero_grad()
    second.check("what the first optimizer can still be asked")


@on_ranks(2, stage=STAGES, end=["drop", "destroy"])
def test_gradients_that_an_engine_has_left_take_none_of_the_next_ones(stage, end):
    """After a micro-batch whose window has not ended, where a loss or a caller still has the former engine."""
    first = Pair(Mlp, stage, gradient_accumulation_steps=2)
    loss = square(first.engine, mine(batches(0)))
    first.engine.backward(loss, retain_graph=True)
    model, kept = first.model, first.engine
    if end == "destroy" and stage < 3:  # where parameters stay whole
        kept.destroy()
        assert all(p.grad is None for p in model.parameters())
    else:
        kept = loss
    reference = first.reference
    del first
    second = Pair.of(model, reference, stage)
    second.train(1)
    second.train(2)
    second.check()
    del kept


@on_ranks(2)
def test_parameters_that_stay_whole_at_stage_3_go_to_the_next_engine():
    options = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 20}}
    first = Pair(Mlp, 3, **options)
    first.train(0)
    model, reference = first.model, first.reference
    del first
    second = Pair.of(model, reference, 3, **options)
    second.train(1)
    second.train(2)
    second.check()


@on_ranks(2, stage=STAGES)
def test_a_thawed_group_leaves_the_other_frozen_ones_alone(stage):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    for p in model[:2].parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": list(part.parameters())} for part in model], lr=0.1)
    engine = start(model, stage, lambda _: optimizer, {"ignore_unused_parameters": False})
    for step in range(2):
        engine.backward(engine(torch.ones(2, 8)).sum())
        engine.step()
        for p in model[1].parameters():
            p.requires_grad_(True)
    trained = {slot.name.split(".")[0] for bucket in engine.zero.trained for slot in bucket.slots}
    assert trained == {"1", "2"}


@on_ranks(2)
def test_all_ranks_refuse_a_model_that_one_rank_still_trains():
    engine, *_ = deepspeed.initialize(model=Mlp(), config={"train_batch_size": 2})
    model, engine = engine.module, engine if dist.get_rank() == 0 else None
    with pytest.raises(ValueError, match="another engine already trains this model"):
        deepspeed.initialize(model=model, config={"train_batch_size": 2})
    del engine


@pytest.mark.parametrize("what, told", [
    ("model", r"rank 0 has the parameter 1.weight of shape \(2, 2\), .* where rank 1 has .* shape \(3, 2\)"),
    ("order", "rank 0 has the parameter 0.bias .* where rank 1 has the parameter 1.weight"),
    ("config", "rank 0 has gradient_clipping 0.0 in its config, where rank 1 has gradient_clipping 0.5"),
    ("error", "^(rank 1: )?unknown key gradient_cliping"),
])
@on_ranks(3)
def test_ranks_that_disagree_all_raise_and_name_the_first_difference(what, told):
    one = dist.get_rank() == 1
    model = nn.Sequential(nn.Linear(2, 2, bias=not (one and what == "order")),
                          nn.Linear(2, 3 if one and what == "model" else 2))
    wrong = {"config": {"gradient_clipping": 0.5}, "error": {"gradient_cliping": 0.5}}.get(what, {}) if one else {}
    with pytest.raises(ValueError, match=told):
        start(model, 0, **wrong)


# --- The collectives that NCCL uses, on the CPU -----------------------------------------------------------------------
# gloo has them too, and the product's own exchange is for gloo alone. NCCL's contract is imitated: until wait() an
# output is garbage, an input must not change and its memory must be there, and each collective is waited for once.


NAMES = [name for name in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single",
                           "reduce_scatter_tensor", "all_reduce", "broadcast", "reduce") if hasattr(dist, name)]


class Late:
    """A collective that is done, whose output shows it at wait() alone."""

    def __init__(self, output, result, inputs, open_works):
        self.output, self.result, self.inputs, self.open = output, result, [(t, t.clone()) for t in inputs], open_works
        output.fill_(float("nan") if output.is_floating_point() else 77)
        self.open.append(self)

    def wait(self):
        assert self in self.open, "waited twice"
        self.open.remove(self)
        assert self.output.untyped_storage().nbytes(), "memory went while a collective was in flight"
        for now, before in self.inputs:
            assert torch.equal(now, before), "an input changed in flight"
        self.output.copy_(self.result)


def poisoned(real: dict, open_works: list) -> dict:
    """The collectives, each with a result that comes late."""
    def all_gather(output, own, group=None, async_op=False):
        assert async_op
        result, own = torch.empty_like(output), own.clone()
        real["all_gather_into_tensor"](result, own, group=group)
        work = Late(output, result, [], open_works)
        place = output[dist.get_rank() * own.numel():][:own.numel()]
        place.copy_(own)
        work.inputs = [(place, own)]
        return work

    def reduce_scatter(output, flat, op=dist.ReduceOp.SUM, group=None, async_op=False):
        assert async_op
        result, size, rank = torch.empty_like(output), output.numel(), dist.get_rank()
        real["reduce_scatter_tensor"](result, flat.clone(), group=group)
        return Late(output, result, [flat[:rank * size], flat[(rank + 1) * size:]], open_works)

    def in_place(name: str):
        def collective(tensor, *args, op=dist.ReduceOp.SUM, group=None, async_op=False, **kwargs):
            """An all-reduce; a broadcast from or a reduce to one rank: on the others the tensor is only read."""
            if not async_op:
                return real[name](tensor, *args, group=group, **kwargs)
            result, root = tensor.clone(), [*args, *kwargs.values()]
            real[name](result, *args, group=group, **kwargs)
            if not root or (root[0] == dist.get_rank()) == (name == "reduce"):
                return Late(tensor, result, [], open_works)
            return Late(torch.empty(1), torch.zeros(1), [tensor], open_works)
        return collective

    return {name: all_gather if "gather" in name else reduce_scatter if "scatter" in name else in_place(name)
            for name in NAMES}


class Stream(TorchDispatchMode):
    """A GPU's stream besides the one that computes. Copies on it arrive when somebody waits for it, or its events."""

    def __init__(self, *device):
        super().__init__()
        self.copies, self.begun = [], 0

    def __enter__(self):
        self.begun += 1
        return super().__enter__()

    def __exit__(self, *error):
        self.begun -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.copy_.default:
            if not function.is_view:
                self.wait()  # what is queued here finds what was queued before
            return function(*args, **kwargs or {})
        target, source = args[:2]
        self.copies.append((target, source.to(target.dtype, copy=True), source, source.clone()))
        return target.fill_(float("nan") if target.is_floating_point() else 77)

    def wait(self, *_):
        copies, self.copies = self.copies, []
        with _disable_current_modes():
            for target, result, source, before in copies:
                assert torch.equal(source, before), "what is copied was changed before it was"
                target.copy_(result)

    def wait_stream(self, other):
        other.wait()

    def record_event(self):
        return self

    synchronize = wait


@contextmanager
def streams():
    """What is offloaded goes up and down on streams, as on a GPU."""
    init, ups = zero.Host.__init__, []

    def with_streams(self, *args):
        init(self, *args)
        self.up, self.down = Stream(), Stream()
        ups.append(self.up)

    def beside(collective):
        def called(*args, **kwargs):
            for up in (up for up in ups if up.begun):  # as any work of that stream, it finds what was copied before
                up.wait()
            with _disable_current_modes():
                return collective(*args, **kwargs)
        return called

    with (mock.patch.object(zero.Host, "__init__", with_streams), mock.patch.object(torch.cuda, "stream", lambda s: s),
          mock.patch.object(torch.cuda, "current_stream", Stream),
          mock.patch.object(torch.Tensor, "record_stream", lambda *_: None),
          mock.patch.multiple(dist, **{name: beside(getattr(dist, name)) for name in NAMES})):
        yield


@contextmanager
def collectives(late: bool):
    """PyTorch's collectives in place of the exchange between gloo ranks; ``late``: under NCCL's contract."""
    prepare, real, open_works = zero.Communicator._prepare, {name: getattr(dist, name) for name in NAMES}, []

    def native(self, rank, world_size, device, direct):
        prepare(self, rank, world_size, device, direct=False)

    zero.Communicator._prepare = native
    for name in NAMES if late else ():
        setattr(dist, name, poisoned(real, open_works)[name])
    try:
        with streams() if late else nullcontext():
            yield
        assert not open_works, "collectives that nobody waited for"
    finally:
        zero.Communicator._prepare = prepare
        for name in NAMES:
            setattr(dist, name, real[name])


CASES = list(itertools.product([False, True], repeat=5))


def trained_natively(stage: int, case: tuple, late: bool) -> tuple:
    whole, half, accumulate, recompute, offload = case  # whole: parameters are not cut
    optimizer = {"type": "Lamb", "params": {"lr": 0.01}} if whole else drawn_optimizer
    with collectives(late):
        return sharded(PLAIN | {
            "accumulation": 1 + accumulate, "offload": {
                key: {"device": "cpu" if offload else "none"} for key in ("offload_optimizer", "offload_param")},
            "more": ({"activation_checkpointing": {}} if recompute else {}) | (
                {"bf16": {"enabled": True}, "communication_data_type": "bf16"} if half else {})}, stage, optimizer, 3)


@on_ranks(ranks=[1, 2], stage=STAGES)
def test_nccls_collectives_train_the_same_whenever_their_results_come(ranks, stage, is_long):
    short = [CASES[5], *([CASES[0], CASES[stage + 6], CASES[31 - stage]] if ranks > 1 else ())]
    for case in CASES if is_long else short:
        results = [trained_natively(stage, case, late) for late in (False, True)]
        assert_equal(*results, 0, f"a result was used before wait(), or an input changed, with {case}")
    with collectives(late=True):
        pair = Pair(Mlp, stage, gradient_clipping=0.5)
        for step in range(3):
            pair.engine.zero.communicator.traffic.clear()
            pair.train(step)
        pair.check()
        traffic, count = pair.engine.zero.communicator.traffic, sum(b.numel for b in pair.engine.zero.buckets)
        sent = sum(record.elements for kind, record in traffic.items() if kind != "scalars")
        assert sent == (3 if stage == 3 else 2) * count * (ranks - 1) // ranks, traffic
        pair.engine.destroy()


@on_ranks(2, offload=["none", "cpu"])
def test_a_gradient_that_is_dropped_while_the_next_sum_is_in_flight_counts_no_more(offload):
    """As zero_grad() inside a window drops it where the parameter's next gradient comes late."""
    with collectives(late=True):
        engine = start(Mlp(), 2, zero_options={"offload_optimizer": {"device": offload}}, gradient_accumulation_steps=3)
        reducer = engine.zero.reducer
        gradients = reducer.every[0]
        dropped, *kept = slots = gradients.bucket.slots
        for _ in range(2):
            for slot in slots:
                gradients.take(slot, torch.ones(slot.shape))
            gradients.launch()
            if gradients.reduced:
                reducer.drop(dropped)
            gradients.finish()
            gradients.end_backward()
        reducer.settle()
        for each, expected in ((dropped, {2.0}), *((slot, {4.0}) for slot in kept)):
            assert set(each.own(gradients.sum).tolist()) <= expected, each.name
        reducer.clear()
        engine.destroy()


def in_groups(parameters):
    parameters = list(parameters)
    return torch.optim.SGD([{"params": [p for p in parameters if p.dim() > 1], "momentum": 0.9},
                            {"params": [p for p in parameters if p.dim() < 2], "lr": 0.3}], lr=0.1)


@on_ranks(2, stage=STAGES)
def test_param_groups_travel_together(stage):
    sent = []
    for optimizer in (sgd, in_groups):
        pair = Pair(Mlp, stage, optimizer)
        pair.train(0)
        sent.append({kind: record.calls for kind, record in pair.engine.zero.communicator.traffic.items()})
        pair.train(1)
        pair.check()
        pair.engine.destroy()
    assert sent[0] == sent[1], f"collectives with one param group, and with two: {sent}"


@on_ranks(2)
def test_engines_share_their_groups_and_the_last_one_ends_them():
    counts, groups = [len(dist.distributed_c10d._world.pg_map)], zero.Groups.current()
    for call in (groups.join, groups.join, groups.leave, groups.leave):
        call(*(torch.device("cpu"), None) if call == groups.join else ())
        counts.append(len(dist.distributed_c10d._world.pg_map))
    assert counts == [counts[0] + more for more in (0, 2, 2, 2, 0)] and zero.gather(dist.get_rank()) == [0, 1]


# --- zero.Init: models that initialise themselves in every way that people use ----------------------------------------


WIDTH = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        nn.init.normal_(self.down.weight, std=0.01)   # of a finished child
        self.gain = nn.Parameter(torch.rand(3))       # of its own, after the children

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain.sum() * self.down(torch.tanh(self.up(self.norm(x))))


class Plain(nn.Module):
    """Tied weights, a parameter of the model itself, a late one, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, WIDTH))
        self.token = nn.Embedding(7, WIDTH)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            self.blocks.append(Block())
        self.head = nn.Linear(WIDTH, 7, bias=False)
        self.head.weight = self.token.weight
        self.register_buffer("scale", torch.rand(()))
        self.late = nn.Parameter(torch.randn(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.late.sum()


class Applied(Plain):
    """Initialises all of itself at the end, by values and by ``.data``, as GPT-2's code does."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(self.set_up)
        for name, p in self.named_parameters():
            if name.endswith("down.weight"):
                nn.init.normal_(p, std=0.02)
        with torch.no_grad():
            self.blocks[1].up.weight[2:4] *= 3
            self.blocks[1].up.weight += self.blocks[0].up.weight

    def set_up(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_()
            module.weight.data[3].zero_()
            module.weight.detach().data.mul_(0.5)  # a view of a view outlives the first


class Gathered(Plain):
    """Initialises itself through GatheredParameters."""

    def __init__(self) -> None:
        super().__init__()
        with zero.GatheredParameters(self.blocks.parameters(), modifier_rank=0):
            for p in self.blocks.parameters() if dist.get_rank() == 0 else ():
                p.data.add_(1.0)


class Copies(nn.Module):
    """Copies its layers, as nn.TransformerEncoder does, and has weight normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.second = copy.deepcopy(self.first)
        self.token, self.head = nn.Embedding(7, WIDTH), weight_norm(nn.Linear(WIDTH, 7))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.token(ids))))


KINDS = [Plain, Applied, Gathered, Copies]


def build(kind: type, sharded: bool = True) -> nn.Module:
    torch.manual_seed(0)
    with zero.Init(enabled=sharded) as init:
        model = kind()
    model.init = init if sharded else None
    return model


def values(model: nn.Module) -> dict[str, Tensor]:
    """All weights, also of a model that no engine has."""
    with zero.GatheredParameters(model.parameters()):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


@on_ranks(3, kind=KINDS, own_seeds=[False, True])
def test_weights_are_those_of_a_model_built_as_usual(kind, own_seeds):
    """On rank 0; every rank holds its share, and random numbers go on as they would."""
    usual = {key: p.detach().clone() for key, p in build(kind, sharded=False).named_parameters()}
    for value in usual.values():
        dist.broadcast(value, src=0)
    after = torch.rand(3)
    torch.manual_seed(dist.get_rank() if own_seeds else 0)
    before = torch.get_rng_state()
    with zero.Init() as init:
        model = kind()
    assert_alike(values(model), usual)
    if own_seeds and dist.get_rank() != 0:
        assert torch.equal(torch.get_rng_state(), before), "this rank's own random state is lost"
    else:
        assert torch.equal(torch.rand(3), after)
    for bucket in init.buckets:
        assert bucket.flat.untyped_storage().nbytes() == 0, f"{bucket.slots[0].name} is whole"
        assert bucket.shard.untyped_storage().nbytes() == 4 * bucket.numel // dist.get_world_size()
    assert sum(len(bucket.slots) for bucket in init.buckets) == len(list(model.parameters()))


@on_ranks(2, case=[(Plain, 1), (Applied, 2)])  # one of its lines reads one weight and writes another
def test_initialising_finished_modules_gathers_one_at_a_time(case):
    (kind, units), live, most = case, set(), [0]

    def noting(name: str) -> object:
        change = getattr(zero.Bucket, name)

        def note(bucket: zero.Bucket) -> None:
            change(bucket)
            (live.add if name == "start_gather" else live.discard)(bucket)
            most[0] = max(most[0], sum(b.numel for b in live))
        return mock.patch.object(zero.Bucket, name, note)

    with noting("start_gather"), noting("free"):
        model = build(kind)
    assert 0 < most[0] <= units * max(bucket.numel for bucket in model.init.buckets)


@on_ranks(2, kind=[Plain, Applied, Copies])
def test_views_of_a_model_in_shards_keep_it_whole_only_as_long_as_they_are_there(kind):
    """state_dict() and ``p.data``, on one rank for longer: values, writes, and no memory once the views are gone."""
    usual, model = build(kind, sharded=False), build(kind)
    state = model.state_dict()
    assert_alike(state, usual.state_dict())
    if dist.get_rank() == 1:
        del state  # and rank 0 keeps its views
    for key, value in model.state_dict().items():
        value.mul_(2)  # a write through a view
        usual.state_dict()[key].mul_(2)
    state = value = None
    for net in (model, usual):
        for p in net.parameters():
            p.data.add_(1)
    first, before = next(model.parameters()), next(usual.parameters()).detach().clone()
    view = first.data
    view.add_(1)
    assert torch.equal(zero.safe_get_full_fp32_param(first), before + 1), "a view's write is not seen"
    zero.safe_set_full_fp32_param(first, before)
    assert torch.equal(view, before)
    del view
    first.sum()  # a use of any frees what the last view has kept
    for bucket in model.init.buckets:
        assert not bucket.has_memory and not bucket.unit.users, f"{bucket.slots[0].name} is whole"
    assert all(type(p) is zero.ShardedParameter for p in model.parameters()) and not model.init.viewed
    assert_alike(values(model), dict(usual.named_parameters()))


@pytest.mark.parametrize("how", ["with", "module"])
@pytest.mark.parametrize("ranks, kind, stage", [(2, Plain, 3), (2, Applied, 0), (2, Copies, 3), (2, Gathered, 2),
                                                (2, Plain, 1), (1, Applied, 3)])
@on_ranks()
def test_a_model_that_was_built_in_shards_trains_like_one_built_as_usual(ranks, kind, stage, how):
    ends = []
    gc.collect()
    for sharded in (False, True):
        model = build(kind, sharded=sharded and how == "with")
        if sharded and how == "module":
            zero.Init(module=model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if how == "with" else None
        engine = start(model, stage, optimizer, optimizer={"type": "AdamW", "params": {"lr": 0.01}})
        weights = {id(p) for p in model.parameters()}
        left = [each for each in gc.get_objects() if isinstance(each, zero.Bucket) and each.zero is None
                and weights >= {id(slot.parameter) for slot in each.slots}]
        assert not left, "shards that the engine has taken over, until the garbage collector comes"
        for step in range(3):
            ids = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(step + dist.get_rank()))
            engine.backward(engine(ids).square().mean())
            engine.step()
        ends.append(values(model))
        assert not any(type(p) is zero.ShardedParameter for p in model.parameters()) or engine.zero.sharded.parameters
        engine.destroy()
    assert_alike(*ends[::-1])


def on_meta() -> nn.Module:
    """Ties and flags, which a model without memory keeps."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4, bias=False), nn.Linear(6, 4))
    model[3].weight = model[2].weight
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("ranks, use_function", [(1, True), (2, True), (2, False)])
@on_ranks()
def test_a_model_on_the_meta_device_gets_its_values_module_by_module(ranks, use_function):
    def ones(module: nn.Module) -> None:
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            tensor.data.fill_(1.0)

    torch.manual_seed(0)
    usual = on_meta()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = on_meta()
    zero.Init(module=model, param_init_fn=ones if use_function else None)
    if use_function:
        assert all(bool((value == 1).all()) for value in values(model).values())
    else:
        # A usual model draws tied weights in both modules and drops the second draw, which is the one that stays here.
        found = {key: value for key, value in values(model).items() if not key.startswith("2")}
        assert_alike(found, {key: usual.get_parameter(key) for key in found})
    assert model[3].weight is model[2].weight and not model[0].bias.requires_grad
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    engine = start(model[:3], 3)
    engine.backward(engine(torch.randn(2, 4)).square().mean())
    engine.step()


class HalfFilled(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


@on_ranks(2)
def test_what_init_cannot_build_is_told():
    with torch.device("meta"):
        bare, half = nn.Sequential(Model(None, weight=nn.Parameter(torch.ones(3)))), HalfFilled(2, 2)
    for call, told in (
            (lambda: zero.Init(module=bare), r"0 has weight on the meta device.*param_init_fn"),
            (lambda: zero.Init(module=half), "bias was on the meta device and has got no values"),
            (lambda: zero.Init(mpu=object()), "mpu is <object"),
            (lambda: zero.Init(remote_device="nvme"), "'nvme'"),
            (lambda: zero.Init(zero_quantized_weights=True), "zero_quantized_weights is True"),
            (lambda: zero.Init(dtype=torch.int32), "dtype is torch.int32"),
            *((partial(zero.Init, enable=value), "'enable'; did you mean 'enabled'[?] .allowed: module, .*mpu")
              for value in (False, None, True)), (lambda: zero.Init(qqq=None), "unknown argument 'qqq' .allowed: "),
            (lambda: build(lambda: nn.Linear(4, 4))(torch.ones(1, 4)), "Linear was built under zero.Init"),
            (lambda: deepspeed.initialize(model=bare, config={"train_batch_size": 2}), r"zero.Init\(module=model\)")):
        with pytest.raises((ValueError, RuntimeError, TypeError), match=told):
            call()
    zero.Init(enabled=False, mpu=None, zero_quantized_weights=False, config_dict_or_path={}, pin_memory=True)


@on_ranks(2)
def test_finished_modules_can_be_written_after_the_context():
    """A tied module's own parameters can still be written, and a failing operation holds nothing."""
    with zero.Init() as init:
        model = nn.ModuleDict({"token": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
        model["head"].weight = model["token"].weight
    nn.init.ones_(model["head"].bias)
    with pytest.raises(RuntimeError):
        model["token"].weight @ torch.ones(3)
    assert all(bucket.unit.state is zero.UnitState.SHARDED for bucket in init.buckets)
    assert bool((zero.safe_get_full_fp32_param(model["head"].bias) == 1).all())


@on_ranks(ranks=[1, 2])
def test_a_dtype_can_be_given_and_the_whole_switched_off(ranks):
    with zero.Init(dtype=torch.bfloat16):
        model = nn.Sequential(nn.Linear(4, 4))
        model.register_module("nothing", None)
        model.ids = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    assert [p.dtype for p in model.parameters()] == [torch.int64, torch.bfloat16, torch.bfloat16]
    if ranks == 1:
        assert model[0](torch.ones(1, 4).bfloat16()).shape == (1, 4), "one process has nothing to shard"
    with zero.Init(), torch.device("meta"):
        late = nn.Linear(4, 4)
    assert late.weight.is_meta and zero.Init(module=late) and not late.weight.is_meta
    with zero.Init(enabled=False):
        assert type(nn.Linear(4, 4).weight) is nn.Parameter


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory with Linux's clear_refs")
@pytest.mark.usefixtures("fresh_ranks")
@on_ranks(2)
def test_memory_while_building_is_the_shards_and_one_unit(is_long):
    """At most half of the model, one unit, and 15 %."""
    width, blocks = 1024, 32 if is_long else 8
    with zero.Init():  # what the libraries take is not the model's
        warm = nn.Linear(1024, 4096)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    with zero.Init():
        model = nn.Sequential(*(nn.Sequential(nn.Linear(width, 4 * width), nn.Linear(4 * width, width))
                                for _ in range(blocks)))
    grown, size = memory("VmHWM") - before, sum(4 * p.numel() for p in model.parameters())
    dist.barrier()
    del warm
    limit = 1.15 * (size / 2 + 4 * (width * 4 * width + 4 * width))
    assert grown <= limit, f"grew by {grown / 2**20:.0f} MiB; allowed: {limit / 2**20:.0f}"
