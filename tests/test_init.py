"""zero.Init: models built straight into shards have the weights, and the training, of models built as usual.

    .venv/bin/python -m pytest -q tests/test_init.py
    .venv/bin/python -m pytest -q tests/test_init.py --long     with a model of 1 GB
"""

import copy
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import engine as deepspeed
import zero
from conftest import memory, on_ranks
from oracle import start

WIDTH = 12


# --- Models that initialise themselves in every way that people use ---------------------------------------------------


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


def whole(model: nn.Module) -> dict[str, Tensor]:
    if dist.get_world_size() == 1:
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    return {name: zero.safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters()}


def assert_same(found: dict, expected: dict, what: str = "") -> None:
    assert found.keys() == expected.keys(), f"{what}: other parameters"
    for name, value in expected.items():
        assert torch.equal(found[name], value.detach()), f"{what}: {name} differs"


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
    assert_same(whole(model), usual)
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
    for key, value in usual.state_dict().items():
        assert torch.equal(state[key], value), key
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
    assert_same(whole(model), dict(usual.named_parameters()))


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["with", "module"])
@pytest.mark.parametrize("ranks, kind, stage", [(2, Plain, 3), (2, Applied, 0), (2, Copies, 3), (2, Gathered, 2),
                                                (2, Plain, 1), (1, Applied, 3)])
@on_ranks()
def test_training_is_that_of_a_model_built_as_usual(ranks, kind, stage, how):
    ends = []
    for sharded in (False, True):
        model = build(kind, sharded=sharded and how == "with")
        if sharded and how == "module":
            zero.Init(module=model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01) if how == "with" else None
        engine = start(model, stage, optimizer, optimizer={"type": "AdamW", "params": {"lr": 0.01}})
        for step in range(3):
            ids = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(step + dist.get_rank()))
            engine.backward(engine(ids).square().mean())
            engine.step()
        ends.append(whole(model))
        assert not any(type(p) is zero.ShardedParameter for p in model.parameters()) or engine.zero.sharded.parameters
        engine.destroy()
    assert_same(*ends[::-1])


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
        assert all(bool((value == 1).all()) for value in whole(model).values())
    else:
        # A usual model draws tied weights in both modules and drops the second draw, which is the one that stays here.
        found = {key: value for key, value in whole(model).items() if not key.startswith("2")}
        assert_same(found, {key: usual.get_parameter(key) for key in found})
    assert model[3].weight is model[2].weight and not model[0].bias.requires_grad
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    engine = start(model[:3], 3)
    engine.backward(engine(torch.randn(2, 4)).square().mean())
    engine.step()


# --- What is refused --------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class HalfFilled(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


@on_ranks(2)
def test_what_cannot_be_built_is_told():
    with torch.device("meta"):
        bare, half = nn.Sequential(Bare()), HalfFilled(2, 2)
    for call, told in (
            (lambda: zero.Init(module=bare), r"0 has weight on the meta device.*param_init_fn"),
            (lambda: zero.Init(module=half), "bias was on the meta device and has got no values"),
            (lambda: zero.Init(mpu=object()), "mpu is <object"),
            (lambda: zero.Init(remote_device="nvme"), "'nvme'"),
            (lambda: zero.Init(zero_quantized_weights=True), "zero_quantized_weights is True"),
            (lambda: zero.Init(dtype=torch.int32), "dtype is torch.int32"),
            (lambda: build(lambda: nn.Linear(4, 4))(torch.ones(1, 4)), "Linear was built under zero.Init"),
            (lambda: deepspeed.initialize(model=bare, config={"train_batch_size": 2}), r"zero.Init\(module=model\)")):
        with pytest.raises((ValueError, RuntimeError), match=told):
            call()


def test_an_unknown_argument_is_refused_whatever_its_value():
    for value in (False, None, True):
        with pytest.raises(TypeError, match="'enable'; did you mean 'enabled'[?] .allowed: module, .*mpu"):
            zero.Init(enable=value)
    with pytest.raises(TypeError, match="unknown argument 'qqq' .allowed: "):
        zero.Init(qqq=None)
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
        model = nn.Linear(4, 4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with zero.Init(enabled=False):
        assert type(nn.Linear(4, 4).weight) is nn.Parameter


# --- Memory -----------------------------------------------------------------------------------------------------------


class Wide(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.Linear(4 * width, width))


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
        model = nn.Sequential(*(Wide(width) for _ in range(blocks)))
    grown, size = memory("VmHWM") - before, sum(4 * p.numel() for p in model.parameters())
    dist.barrier()
    del warm
    limit = 1.15 * (size / 2 + 4 * (width * 4 * width + 4 * width))
    assert grown <= limit, f"grew by {grown / 2**20:.0f} MiB; allowed: {limit / 2**20:.0f}"
