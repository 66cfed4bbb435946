"""zero.Init: models built straight into shards have the weights, and the training, of models built as usual.

    .venv/bin/python -m pytest -q tests/test_init.py
    .venv/bin/python -m pytest -q tests/test_init.py --long     with a model of 1 GB
"""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import engine as deepspeed
import zero
from conftest import memory

WIDTH = 12


# --- Models that initialise themselves in every way that people use ---------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        nn.init.normal_(self.down.weight, std=0.01)   # of a finished child
        self.gain = nn.Parameter(torch.rand(3))       # of its own, after the children

    def forward(self, x):
        return x + self.gain.sum() * self.down(torch.tanh(self.up(self.norm(x))))


class Plain(nn.Module):
    """Tied weights, a parameter of the model itself, a late one, and buffers."""

    def __init__(self):
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

    def forward(self, ids):
        x = self.token(ids) + self.position * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.late.sum()


class Applied(Plain):
    """Initialises all of itself at the end, by values and by ``.data``, as GPT-2's code does."""

    def __init__(self):
        super().__init__()
        self.apply(self.set_up)
        for name, p in self.named_parameters():
            if name.endswith("down.weight"):
                nn.init.normal_(p, std=0.02)
        with torch.no_grad():
            self.blocks[1].up.weight[2:4] *= 3
            self.blocks[1].up.weight += self.blocks[0].up.weight

    def set_up(self, module):
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

    def __init__(self):
        super().__init__()
        with zero.GatheredParameters(self.blocks.parameters(), modifier_rank=0):
            if dist.get_rank() == 0:
                for p in self.blocks.parameters():
                    p.data.add_(1.0)


class Copies(nn.Module):
    """Copies its layers, as nn.TransformerEncoder does, and has weight normalization."""

    def __init__(self):
        super().__init__()
        self.first = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.second = copy.deepcopy(self.first)
        self.token, self.head = nn.Embedding(7, WIDTH), weight_norm(nn.Linear(WIDTH, 7))

    def forward(self, ids):
        return self.head(self.second(self.first(self.token(ids))))


KINDS = {kind.__name__: kind for kind in (Plain, Applied, Gathered, Copies)}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    if dist.get_world_size() == 1:
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    return {name: zero.safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters()}


def assert_same(found: dict, expected: dict, what: str, tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys(), f"{what}: other parameters"
    for name, value in expected.items():
        difference = float((found[name] - value.detach()).abs().max())
        assert difference <= tolerance, f"{what}: {name} differs by up to {difference:.3g}"


def built(name: str, own_seeds: bool) -> None:
    """Equal to a model that rank 0 builds as usual; every rank holds its share; random numbers go on as they would."""
    kind, rank = KINDS[name], dist.get_rank()
    torch.manual_seed(0)
    usual = {key: p.detach().clone() for key, p in kind().named_parameters()}
    for value in usual.values():
        dist.broadcast(value, src=0)
    after = torch.rand(3)
    torch.manual_seed(rank if own_seeds else 0)
    before = torch.get_rng_state()
    with zero.Init() as init:
        model = kind()
    assert_same(whole(model), usual, f"{name}, own seeds {own_seeds}")
    if own_seeds and rank != 0:
        assert torch.equal(torch.get_rng_state(), before), "this rank's own random state is lost"
    else:
        assert torch.equal(torch.rand(3), after)
    for bucket in init.buckets:
        assert bucket.flat.untyped_storage().nbytes() == 0, f"{bucket.slots[0].name} is whole"
        assert bucket.shard.untyped_storage().nbytes() == 4 * bucket.numel // dist.get_world_size()
    assert sum(len(bucket.slots) for bucket in init.buckets) == len(list(model.parameters()))


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_of_a_model_built_as_usual(run_ranks, name):
    for own_seeds in (False, True):
        run_ranks(built, 3, name, own_seeds)


def most_live(name: str) -> tuple[int, int]:
    """Bytes of whole parameters at most, while the model is built, and of the largest module's own."""
    most, start, finish = [0], zero.Bucket.start_gather, zero.Bucket.free
    live: set = set()

    def note(change, bucket):
        change(bucket)
        (live.add if change is start else live.discard)(bucket)
        most[0] = max(most[0], sum(b.numel * 4 for b in live))

    zero.Bucket.start_gather, zero.Bucket.free = (lambda b: note(start, b)), (lambda b: note(finish, b))
    try:
        with zero.Init() as init:
            model = KINDS[name]()
    finally:
        zero.Bucket.start_gather, zero.Bucket.free = start, finish
    assert model is not None
    return most[0], max(4 * bucket.numel for bucket in init.buckets)


def test_initialising_finished_modules_gathers_one_at_a_time(run_ranks):
    for name, units in (("Plain", 1), ("Applied", 2)):  # one of its lines reads one weight and writes another
        for most, largest in run_ranks(most_live, 2, name):
            assert 0 < most <= units * largest, f"{name}: {most} bytes, the largest module has {largest}"


def read_as_views(name: str) -> None:
    """state_dict() and ``p.data``, on one rank for longer: values, writes, and no memory once the views are gone."""
    torch.manual_seed(0)
    usual = KINDS[name]()
    torch.manual_seed(0)
    with zero.Init() as init:
        model = KINDS[name]()
    state = model.state_dict()
    for key, value in usual.state_dict().items():
        assert torch.equal(state[key], value), key
    if dist.get_rank() == 1:
        del state  # and rank 0 keeps its views
    for key, value in model.state_dict().items():
        value.mul_(2)  # a write through a view
        usual.state_dict()[key].mul_(2)
    state = value = None
    for p in model.parameters():
        p.data.add_(1)
    for p in usual.parameters():
        p.data.add_(1)
    first, before = next(model.parameters()), next(usual.parameters()).detach().clone()
    view = first.data
    view.add_(1)
    assert torch.equal(zero.safe_get_full_fp32_param(first), before + 1), "a view's write is not seen"
    zero.safe_set_full_fp32_param(first, before)
    assert torch.equal(view, before)
    del view
    first.sum()  # a use of any frees what the last view has kept
    for bucket in init.buckets:
        assert not bucket.has_memory and not bucket.unit.users, f"{bucket.slots[0].name} is whole"
    assert all(type(p) is zero.ShardedParameter for p in model.parameters()) and not init.viewed
    assert_same(whole(model), dict(usual.named_parameters()), name)


def test_views_of_a_model_in_shards_keep_it_whole_only_as_long_as_they_are_there(run_ranks):
    for name in ("Plain", "Applied", "Copies"):
        run_ranks(read_as_views, 2, name)


# --- Training ---------------------------------------------------------------------------------------------------------


def trained(name: str, stage: int, how: str) -> None:
    """The same weights after some steps, built as usual or straight into shards; both in one process group."""
    ends = []
    for sharded in (False, True):
        torch.manual_seed(0)
        if not sharded:
            model = KINDS[name]()
        elif how == "with":
            with zero.Init():
                model = KINDS[name]()
        else:
            model = KINDS[name]()
            zero.Init(module=model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if how == "with" else None
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={
            "train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 200}})
        for step in range(3):
            ids = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(step + dist.get_rank()))
            engine.backward(engine(ids).square().mean())
            engine.step()
        ends.append(whole(model))
        assert not any(type(p) is zero.ShardedParameter for p in model.parameters()) or engine.zero.sharded.parameters
        engine.destroy()
    assert_same(ends[1], ends[0], f"{name}, stage {stage}, {how}")


@pytest.mark.parametrize("how", ["with", "module"])
def test_training_is_that_of_a_model_built_as_usual(run_ranks, how):
    for name, stage in (("Plain", 3), ("Applied", 0), ("Copies", 3), ("Gathered", 2), ("Plain", 1)):
        run_ranks(trained, 2, name, stage, how)
    run_ranks(trained, 1, "Applied", 3, how)


def from_meta(use_function: bool) -> None:
    """A model without memory gets values module by module, ties and flags kept, and trains."""
    def build():
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4, bias=False), nn.Linear(6, 4))
        model[3].weight = model[2].weight
        model[0].bias.requires_grad_(False)
        return model

    def ones(module):
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            tensor.data.fill_(1.0)

    torch.manual_seed(0)
    usual = build()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build()
    zero.Init(module=model, param_init_fn=ones if use_function else None)
    if use_function:
        assert all(bool((value == 1).all()) for value in whole(model).values())
    else:
        # A usual model draws tied weights in both modules and drops the second draw, which is the one that stays here.
        found = {key: value for key, value in whole(model).items() if not key.startswith("2")}
        assert_same(found, {key: usual.get_parameter(key) for key in found}, "meta")
    assert model[3].weight is model[2].weight and not model[0].bias.requires_grad
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    engine, *_ = deepspeed.initialize(model=model[:3], config={
        "train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3}})
    engine.backward(engine(torch.randn(2, 4)).square().mean())
    engine.step()


def test_a_model_on_the_meta_device_gets_its_values_module_by_module(run_ranks):
    for world_size, use_function in ((1, True), (2, True), (2, False)):
        run_ranks(from_meta, world_size, use_function)


# --- What is refused --------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class HalfFilled(nn.Linear):
    def reset_parameters(self):
        nn.init.ones_(self.weight)


def errors() -> list[str]:
    told = []

    def attempt(call):
        try:
            call()
            told.append("no error")
        except (ValueError, RuntimeError) as error:
            told.append(str(error))

    with torch.device("meta"):
        bare, half = nn.Sequential(Bare()), HalfFilled(2, 2)
    attempt(lambda: zero.Init(module=bare))
    attempt(lambda: zero.Init(module=half))
    attempt(lambda: zero.Init(mpu=object()))
    attempt(lambda: zero.Init(remote_device="nvme"))
    attempt(lambda: zero.Init(zero_quantized_weights=True))
    attempt(lambda: zero.Init(dtype=torch.int32))
    with zero.Init():
        model = nn.Linear(4, 4)
    attempt(lambda: model(torch.ones(1, 4)))
    attempt(lambda: deepspeed.initialize(model=bare, config={"train_batch_size": 2}))
    return told


def test_what_cannot_be_built_is_told(run_ranks):
    told = run_ranks(errors, 2)[1]
    for message, expected in zip(told, [
            "0 has weight on the meta device, and no reset_parameters() to give them values; needed: a param_init_fn",
            "bias was on the meta device and has got no values", "mpu is <object", "'nvme'; allowed: 'cpu'",
            "zero_quantized_weights is True; allowed: nothing", "dtype is torch.int32; allowed: a floating-point",
            "Linear was built under zero.Init, and each rank has a part of its weights", "zero.Init(module=model)"],
            strict=True):
        assert expected in message, message


def test_an_unknown_argument_is_refused_whatever_its_value():
    for value in (False, None, True):
        with pytest.raises(TypeError, match="argument 'enable'; did you mean 'enabled'[?] .allowed: module, .*mpu"):
            zero.Init(enable=value)
    with pytest.raises(TypeError, match="unknown argument 'qqq' .allowed: "):
        zero.Init(qqq=None)
    zero.Init(enabled=False, mpu=None, zero_quantized_weights=False, config_dict_or_path={}, pin_memory=True)


def after_the_context() -> None:
    """A tied module's own parameters can still be written, and a failing operation holds nothing."""
    with zero.Init() as init:
        model = nn.ModuleDict({"token": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
        model["head"].weight = model["token"].weight
    nn.init.ones_(model["head"].bias)
    with pytest.raises(RuntimeError):
        model["token"].weight @ torch.ones(3)
    assert all(bucket.unit.state is zero.UnitState.SHARDED for bucket in init.buckets)
    assert bool((zero.safe_get_full_fp32_param(model["head"].bias) == 1).all())


def test_finished_modules_can_be_written_after_the_context(run_ranks):
    run_ranks(after_the_context, 2)


def in_other_dtype() -> None:
    with zero.Init(dtype=torch.bfloat16):
        model = nn.Linear(4, 4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with zero.Init(enabled=False):
        assert type(nn.Linear(4, 4).weight) is nn.Parameter


def test_a_dtype_can_be_given_and_the_whole_switched_off(run_ranks):
    run_ranks(in_other_dtype, 2)
    run_ranks(in_other_dtype, 1)


# --- Memory -----------------------------------------------------------------------------------------------------------


def memory_while_building(width: int, blocks: int) -> tuple[int, int]:
    """By how many bytes a rank grows at most while it builds a model, and the model's bytes."""
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    with zero.Init():  # what the libraries take is not the model's
        warm = nn.Linear(1024, 4096)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    with zero.Init():
        model = nn.Sequential(*(Wide() for _ in range(blocks)))
    grown = memory("VmHWM") - before
    dist.barrier()
    del warm
    return grown, sum(4 * p.numel() for p in model.parameters())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory with Linux's clear_refs")
def test_memory_while_building_is_the_shards_and_one_unit(run_ranks, request):
    """At 2 ranks: at most half of the model, one unit, and 15 %."""
    width, blocks = (1024, 32) if request.config.getoption("--long") else (1024, 8)
    run_ranks.stop()  # new processes, which hold no memory that other tests have freed
    for grown, size in run_ranks(memory_while_building, 2, width, blocks):
        limit = 1.15 * (size / 2 + 4 * (width * 4 * width + 4 * width))
        assert grown <= limit, f"grew by {grown / 2**20:.0f} MiB; allowed: {limit / 2**20:.0f}"
        print(f"model {size / 2**20:.0f} MiB, grown {grown / 2**20:.0f}, allowed {limit / 2**20:.0f}")
    run_ranks.stop()
