"""Recomputation against plain autograd, against ``torch.utils.checkpoint``, and against what theory says it costs.

    .venv/bin/python -m pytest -q tests/test_checkpointing.py
"""

import copy
import gc
import math
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import checkpointing
import engine as deepspeed
from checkpointing import CheckpointingConfig, RecomputationError, checkpoint
from conftest import on_ranks, warnings_of
from oracle import start, whole

WIDTH = 8


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch):
    monkeypatch.setattr(checkpointing, "_explicit", checkpointing._DEFAULTS)


# --- Models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention, dropout and a feed-forward layer; what it returns is ``tensor``, ``tuple`` or ``dict``."""

    def __init__(self, returns: str = "tensor", dropout: float = 0.3):
        super().__init__()
        self.norm, self.qkv, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout, self.returns = nn.Dropout(dropout), returns

    def forward(self, x, mask=None, scale=1.0):
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(1)
        x = x + scale * self.dropout(F.gelu(self.down(self.dropout(attended))))
        return {"tensor": x, "tuple": (x, None), "dict": {"hidden": x, "scale": scale}}[self.returns]


def hidden(output):
    return output if isinstance(output, torch.Tensor) else output["hidden"] if isinstance(output, dict) else output[0]


class LinearTanh(nn.Linear):
    """A matrix product, and tanh, which saves its result: so a recomputation runs to the end."""

    def forward(self, x):
        return super().forward(x).tanh()


class Net(nn.Module):
    """Blocks in the order of ``order`` (a block may come twice), with whatever ``between`` does between them."""

    def __init__(self, blocks, order=None, between="nothing", mask=False):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(WIDTH, 2)
        self.order, self.between = order or range(len(blocks)), between
        self.mask = torch.rand(5, 5) < 0.8 if mask else None
        self.register_buffer("stretch", torch.linspace(0.5, 2, WIDTH))

    def forward(self, x):
        for number in self.order:
            if self.between == "layerdrop" and torch.rand(()) < 0.3:
                continue
            x = hidden(self.blocks[number](x, mask=self.mask, scale=1.5))
            if self.between == "add":
                x = x + self.stretch
            elif self.between == "in place":
                x.mul_(self.stretch)
        return self.head(x)


@contextmanager
def recomputed(model, modules=None, **config):
    """``apply`` for the length of a with statement: to the modules that are named, or the blocks, or the children."""
    modules = modules or (["Block"] if isinstance(model, Net) else ["*"])
    handle = checkpointing.apply(deepspeed.find_modules(model, modules, "modules"), CheckpointingConfig(**config))
    try:
        yield handle
    finally:
        handle.remove()


def gradients(model, x, steps=2, autocast=False):
    """Losses, gradients and the random state after some micro-batches."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    results = []
    for _ in range(steps):
        x = x.detach().clone().requires_grad_(x.requires_grad)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(x).float().square().mean()
        loss.backward()
        results += [loss.detach(), x.grad]
    return results + [p.grad for p in model.parameters()] + [torch.get_rng_state()]


def assert_equal(results, expected):
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if wanted is None or result is None:
            assert result is wanted, f"result {index}: {result} instead of {wanted}"
        else:
            assert torch.equal(result, wanted), f"result {index} is off by {(result - wanted).abs().max()}"


# --- Measures ---------------------------------------------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """The most memory that tensors created inside have held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.storages:
                storage = leaf.untyped_storage()
                if any(isinstance(a, torch.Tensor) and a.untyped_storage()._cdata == storage._cdata
                       for a in tree_leaves((args, kwargs))):
                    continue  # a view of a tensor from outside
                self.storages.add(storage._cdata)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def freed(self, key, size):
        self.storages.discard(key)
        self.now -= size


def saved_bytes(run):
    """What autograd holds for backward after ``run()``, each tensor counted as often as it is saved."""
    sizes = []
    with saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        results = [run()]  # kept until the sizes are added up
    return sum(sizes) if results else 0


def peak(step):
    """The peak of ``step()``, which runs once before to get lasting allocations out of the way."""
    step()
    with PeakBytes() as measured:
        step()
    return measured.peak


# --- Equal to plain autograd, and to torch.utils.checkpoint -----------------------------------------------------------


@st.composite
def nets(draw):
    kinds = draw(st.lists(st.sampled_from(["tensor", "tuple", "dict"]), min_size=1, max_size=5))
    torch.manual_seed(draw(st.integers(0, 99)))
    order = draw(st.one_of(st.none(), st.lists(st.integers(0, len(kinds) - 1), min_size=1, max_size=6)))
    net = Net([Block(kind, draw(st.sampled_from([0.0, 0.4]))) for kind in kinds], order,
              draw(st.sampled_from(["nothing", "nothing", "layerdrop", "add", "in place"])), draw(st.booleans()))
    for p in net.blocks.parameters():
        p.requires_grad_(draw(st.sampled_from([True, True, True, False])))
    return net


@st.composite
def configs(draw, blocks):
    chosen = st.lists(st.sampled_from([f"blocks.{i}" for i in range(blocks)]), min_size=1)
    config = {"modules": draw(st.one_of(st.none(), chosen, st.just(["Block"]), st.just(["*.qkv", "*.down"]))),
              "mode": draw(st.sampled_from(["full", "selective"])), "profile": draw(st.booleans())}
    return config | draw(st.sampled_from([{}, {"number_checkpoints": 2}]))


@given(st.data(), nets(), st.booleans(), st.sampled_from(["fp32", "bf16", "autocast to bf16"]))
def test_gradients_and_random_state_equal_plain_autograd_bit_for_bit(data, net, input_needs_grad, precision):
    dtype, autocast = torch.bfloat16 if precision == "bf16" else torch.float32, precision.startswith("autocast")
    net.to(dtype).train(data.draw(st.booleans()))
    x = torch.randn(2, 5, WIDTH, dtype=dtype, requires_grad=input_needs_grad)
    expected = gradients(net, x, autocast=autocast)
    with recomputed(net, **data.draw(configs(len(net.blocks)))):
        assert_equal(gradients(net, x, autocast=autocast), expected)
    assert_equal(gradients(net, x, autocast=autocast), expected)


def in_regions(blocks, every):
    """A forward pass that recomputes so many consecutive blocks as one region."""
    def forward(x):
        for start in range(0, len(blocks), every):
            x = checkpoint(blocks[start:start + every], x)
        return x
    return forward


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_call_of_checkpoint_around_several_blocks_is_one_region(mode):
    checkpointing.configure(CheckpointingConfig(mode=mode))
    blocks = nn.Sequential(*[Block() for _ in range(7)])
    x = torch.randn(2, 5, WIDTH)
    torch.manual_seed(1)
    blocks(x).square().sum().backward()
    expected = [p.grad for p in blocks.parameters()]
    for every, regions in ((1, 7), (2, 4), (3, 3), (9, 1)):
        kept = []
        blocks.zero_grad()
        torch.manual_seed(1)
        with saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            y = in_regions(blocks, every)(x)
        y.square().sum().backward()
        assert kept.count(x.shape) == regions
        assert_equal([p.grad for p in blocks.parameters()], expected)


def test_checkpoint_equals_torchs_in_results_and_peak_memory():
    def torchs(function, *args, **kwargs):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)

    torch.manual_seed(0)
    weight = torch.randn(256, 256, requires_grad=True)

    def small(x, factor, *, shift=0.0):
        y = F.dropout(torch.tanh(x @ weight), 0.5) * factor
        return {"y": y.sin(), "pair": (torch.relu(y + shift), "text")}

    def outer(run):
        def function(x, factor):
            first = run(small, x.exp(), factor, shift=x)
            return run(small, first["y"] + first["pair"][0], 2)["pair"][0].cos() * first["y"]
        return function

    def step(run, needs_grad, nested):
        torch.manual_seed(5)
        weight.grad = None
        x = torch.rand(64, 256).requires_grad_(needs_grad)
        for _ in range(6):
            out = run(outer(run) if nested else small, x, 3)
            x = out if nested else out["y"] + out["pair"][0]
        x.sum().backward()
        return x.detach(), weight.grad, torch.get_rng_state()

    def plain(function, *args, **kwargs):
        return function(*args, **kwargs)

    for needs_grad in (False, True):
        for nested in (False, True):
            case = (needs_grad, nested)
            assert_equal(step(checkpoint, *case), step(plain, *case))
            ours, theirs = peak(lambda: step(checkpoint, *case)), peak(lambda: step(torchs, *case))
            assert ours <= theirs * 1.001, case
            assert ours < 0.8 * peak(lambda: step(plain, *case)), case


# --- What it costs, against theory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [4, 16, 64])
def test_saved_bytes_fall_from_L_to_L_over_k_plus_k(layers):
    every = math.isqrt(layers)
    model = nn.Sequential(*[nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Tanh()) for _ in range(layers)])
    x = torch.randn(1000, requires_grad=True)
    activation, saves = x.nbytes, 3  # each operation saves its result

    def step():
        model(x).sum().backward()

    assert saved_bytes(lambda: model(x)) == saves * layers * activation
    assert peak(step) / activation == pytest.approx(saves * layers + 1, abs=0.01)  # and a gradient
    regions = in_regions(model, every)
    assert saved_bytes(lambda: regions(x)) == pytest.approx(layers / every * activation, abs=0.01 * activation)
    # The kept inputs and one region; a gradient comes on top, and the first input was there before.
    assert peak(lambda: regions(x).sum().backward()) / activation == pytest.approx(
        layers / every + saves * every + 1 - 1, abs=0.01)


def test_three_units_of_flops_become_four_and_the_selective_mode_recomputes_only_the_cheap_ones(monkeypatch):
    calls, tanh = [], torch.Tensor.tanh
    monkeypatch.setattr(torch.Tensor, "tanh", lambda x: calls.append(x.shape) or tanh(x))
    model = nn.Sequential(*[LinearTanh(WIDTH, WIDTH) for _ in range(6)])
    x = torch.randn(16, WIDTH, requires_grad=True)
    unit = 6 * 2 * 16 * WIDTH * WIDTH  # the forward pass

    def cost():
        calls.clear()
        with FlopCounterMode(display=False) as flops:
            model(x).sum().backward()
        return flops.get_total_flops() / unit, len(calls)

    assert cost() == (3, 6)
    with recomputed(model):
        assert cost() == (4, 12)
    with recomputed(model, mode="selective"):
        assert cost() == (3, 12)


def test_selective_peak_memory_lies_between_and_equals_torchs_and_a_retained_graph_works_again():
    policy = partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, list(checkpointing.EXPENSIVE))
    net = Net([Block(dropout=0.0) for _ in range(3)])
    x = torch.randn(16, 64, WIDTH, requires_grad=True)

    def theirs():
        y = x
        for block in net.blocks:
            y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=False, context_fn=policy)
        net.head(y).sum().backward()

    def ours():
        net(x).sum().backward()

    reference = peak(theirs)
    with recomputed(net):
        full = peak(ours)
    assert full < reference < peak(ours)
    with recomputed(net, mode="selective"):
        assert peak(ours) <= 1.001 * reference
        y = net(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True) for _ in range(2))
    assert_equal(first + second, torch.autograd.grad(net(x).sum(), x) * 2)


def test_selective_mode_takes_a_weight_that_autocast_has_cached():
    """A block used twice casts its weights once in the forward pass, and again in each recomputation."""
    net = Net([Block(dropout=0.0)], order=[0, 0])
    x = torch.randn(2, 5, WIDTH)
    expected = gradients(net, x, autocast=True)
    with recomputed(net, mode="selective"):
        assert_equal(gradients(net, x, autocast=True), expected)


def test_selective_mode_recomputes_attention_that_drops_out_and_keeps_the_rest():
    assert not checkpointing._is_kept(torch.ops.aten.tanh.default, (), {})
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.zeros(1)
    assert checkpointing._is_kept(flash, (q, q, q), {})
    assert not checkpointing._is_kept(flash, (q, q, q, 0.1), {})
    assert not checkpointing._is_kept(flash, (q, q, q), {"dropout_p": 0.1})


# --- Backward in other ways -------------------------------------------------------------------------------------------


def twice(x):
    return (x * x).sin().exp()


@pytest.mark.parametrize("run", [checkpoint, lambda f, x: checkpoint(checkpoint, f, x)], ids=["once", "nested"])
def test_several_backward_calls_parts_of_the_graph_and_second_derivatives(run):
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: run(twice, x), x)
    assert torch.autograd.gradgradcheck(lambda x: run(twice, x), x)
    y, expected = run(lambda v: twice(v * w), x), twice(x * w)
    for inputs in (x, w, (x, w)):  # each call needs other parts of the region
        assert_equal(torch.autograd.grad(y.sum(), inputs, retain_graph=True),
                     torch.autograd.grad(expected.sum(), inputs, retain_graph=True))
    for _ in range(3):
        y.sum().backward(retain_graph=True)
    assert torch.equal(x.grad, 3 * torch.autograd.grad(expected.sum(), x)[0])


def test_each_backward_call_recomputes_afresh_and_leaves_nothing():
    x, v, w = torch.randn(1000, requires_grad=True), torch.randn(1000, requires_grad=True), torch.randn(1000)
    y = checkpoint(lambda x, v: (x * w).exp() + (v * w).exp(), x, v)
    torch.autograd.grad(y.sum(), x, retain_graph=True)  # recomputes what the other half needs, too
    with torch.no_grad():
        w.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), v, retain_graph=True)[0], torch.zeros(1000))
    with PeakBytes() as memory:
        torch.autograd.grad(y.sum(), (x, v), retain_graph=True)
    assert memory.peak > 2 * x.nbytes and memory.now == 0


def test_a_function_that_reads_its_saved_tensors_twice_and_one_that_differentiates_inside():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x + 1)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return grad * (ctx.saved_tensors[0] + ctx.saved_tensors[1] - 1)

    def penalized(x):
        y = x.sin() * x.exp()
        slope, = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope.square()

    for function in (Twice.apply, penalized):
        x = torch.randn(4, requires_grad=True)
        expected, = torch.autograd.grad(function(x).sum(), x)
        assert torch.equal(torch.autograd.grad(checkpoint(function, x).sum(), x)[0], expected)


def test_recomputation_stops_after_the_last_saved_tensor():
    seen = []

    def function(x):
        seen.append("start")
        y = x.tanh()
        seen.append("end")
        return y + 1

    def stubborn(x):
        try:
            return x.tanh()
        except Exception:
            return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(function, x).sum().backward()
    assert seen == ["start", "end", "start"]
    expected, = torch.autograd.grad(x.tanh().sum(), x)
    assert torch.equal(torch.autograd.grad(checkpoint(stubborn, x).sum(), x)[0], expected)


def test_a_default_device_is_restored():
    seen = []

    def function(x):
        seen.append(torch.empty(1).device.type)
        return x.exp()

    with torch.device("meta"):
        y = checkpoint(function, torch.ones(2, device="cpu", requires_grad=True))
    y.sum().backward()
    assert seen == ["meta", "meta"]


class Taking(LinearTanh):
    """Takes its input a second time, in an object that can't be looked into."""

    def forward(self, x, box=None):
        return super().forward(x)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_nothing_is_left_of_regions_that_were_used_or_dropped(mode):
    def regions():
        return sum(type(o) is checkpointing._Region for o in gc.get_objects())

    model = nn.Sequential(*[Taking(WIDTH, WIDTH) for _ in range(4)])
    gc.collect()
    gc.disable()  # cycles would stay
    try:
        with recomputed(model, mode=mode):
            y = model(torch.randn(2, WIDTH))
            assert regions() == 4
            y.sum().backward()
            assert regions() == 0
            y = model(torch.randn(2, WIDTH))
            del y
            assert regions() == 0
            y = model[0](torch.randn(2, WIDTH))
            y = model[1](y, box=SimpleNamespace(content=y))
            del y
            assert regions() == 0
    finally:
        gc.enable()


def test_without_grad_mode_nothing_is_done_at_all():
    model = nn.Sequential(LinearTanh(2, 2), LinearTanh(2, 2))
    with recomputed(model, profile=True) as handle:
        with torch.no_grad():
            y = model(torch.ones(1, 2))
            assert not checkpoint(twice, torch.ones(2, requires_grad=True)).requires_grad
        assert not y.requires_grad and handle.report() == {}


# --- From outside the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_blocks_that_backward_does_not_reach_are_not_recomputed(mode):
    model, outputs = nn.Sequential(*[LinearTanh(WIDTH, WIDTH) for _ in range(3)]), []
    model[0].register_forward_hook(lambda *args: outputs.append(args[-1]))
    x = torch.randn(4, WIDTH, requires_grad=True)
    with recomputed(model, mode=mode, profile=True) as handle:
        assert model(x).requires_grad
        grad, = torch.autograd.grad(outputs[0].square().sum(), x)
        assert [block.recomputations for block in handle.report().values()] == [1, 0, 0]
    assert torch.equal(grad, torch.autograd.grad(model[0](x).square().sum(), x)[0])


def test_hooks_that_change_arguments_or_results_do_it_once():
    model = nn.Sequential(*[LinearTanh(WIDTH, WIDTH) for _ in range(4)])
    for number, block in enumerate(model):
        block.register_forward_pre_hook(lambda _, args: (args[0] * 2 if number == 0 else args[0],))
        if number == 2:
            block.register_forward_hook(lambda *args: args[-1] + 1)
    x = torch.randn(3, WIDTH)
    expected = gradients(model, x)
    with recomputed(model):
        assert_equal(gradients(model, x), expected)


def test_removal_restores_and_copies_are_independent():
    model = nn.Sequential(LinearTanh(2, 2), LinearTanh(2, 2))
    own = model[1].forward = lambda x: LinearTanh.forward(model[1], x) + 1
    names = [sorted(vars(block)) for block in model]
    with recomputed(model) as handle:
        y = model(torch.ones(1, 2))
        twin = copy.deepcopy(model[0])
    assert model[1].forward is own and [sorted(vars(block)) for block in model] == names
    assert not handle.blocks
    y.sum().backward()  # the graph from before still works
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.zero_()
    assert torch.equal(twin(torch.ones(1, 2)), torch.zeros(1, 2)), "the copy must use its own weights"


def test_profile_tells_bytes_kept_and_recomputations_per_module():
    model = nn.Sequential(*[LinearTanh(WIDTH, WIDTH) for _ in range(4)])
    x = torch.randn(5, WIDTH)
    with recomputed(model, profile=True) as handle:
        for _ in range(3):
            model(x).sum().backward()
        report = handle.report()
    assert [(n, p.calls, p.bytes_kept, p.recomputations) for n, p in report.items()] == [
        (str(number), 3, 3 * x.nbytes, 3) for number in range(4)]
    assert all(0 < p.seconds_recomputed < 10 for p in report.values())
    with recomputed(model, mode="selective", profile=True) as handle:
        model(x).sum().backward()
        assert [p.bytes_kept for p in handle.report().values()] == [2 * x.nbytes] * 4  # input, and product
    with recomputed(model) as handle, pytest.raises(RuntimeError, match="profile"):
        handle.report()


# --- What goes wrong must say so --------------------------------------------------------------------------------------


def flaky(first, later):
    """A function that does ``first`` when called first and ``later`` after that."""
    calls = []

    def function(x):
        calls.append(1)
        return (first if len(calls) == 1 else later)(x)

    return function


@pytest.mark.parametrize("first, later, told", [
    (lambda x: x.exp().exp(), lambda x: x.exp(), "saved 2 tensors .* only 1"),
    (lambda x: x.exp(), lambda x: x[:2].exp(), r"tensor 1 of 1 .* was \(torch.float32, \(3, 3\), .* is .* \(2, 3\)"),
    (lambda x: x.exp(), lambda x: x.double().exp(), "was .*float32.* is .*float64"),
    (lambda x: x.exp(), lambda x: x.to("meta").exp(), "was .*cpu.* is .*meta"),
    (lambda x: x.mm(x).exp(), lambda x: torch.addmm(x, x, x).exp(), "was aten.mm.default .* is aten.addmm.default"),
    (lambda x: x.mm(x).exp().exp().exp(), lambda x: x.mm(x).mm(x).exp(), "was None .* is aten.mm.default"),
], ids=["fewer", "shape", "dtype", "device", "an operation whose result is kept", "one more of these"])
def test_a_function_that_does_not_do_the_same_twice_is_an_error(first, later, told):
    checkpointing.configure(CheckpointingConfig(mode="selective" if "aten" in told else "full"))
    y = checkpoint(flaky(first, later), torch.ones(3, 3, requires_grad=True))
    with pytest.raises(RecomputationError, match=told):
        y.sum().backward()


def test_modifications_in_place_are_noticed():
    x = torch.ones(3, requires_grad=True)
    given = x * 1
    y = checkpoint(torch.exp, given)
    given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = checkpoint(lambda v: v.exp().add_(1).sin(), x)
    with pytest.raises(RuntimeError, match="modified in place in the recomputed"):
        y.sum().backward()
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Tanh()))
    with recomputed(model, mode="selective"):
        y = model(x)
        with pytest.raises(RuntimeError, match="0: the kept result of aten.addmm.default was modified in place"):
            y.sum().backward()


def test_modules_are_chosen_by_class_or_pattern_and_the_outermost_wins():
    net = Net([Block(), Block()])

    for modules, names in ((["Block"], ["blocks.0", "blocks.1"]), (["blocks.*"], ["blocks.0", "blocks.1"]),
                           (["blocks*"], ["blocks.0", "blocks.1"]), (["Block", "*.qkv"], ["blocks.0", "blocks.1"]),
                           (["head", "blocks.1"], ["blocks.1", "head"]),
                           ([f"{Block.__module__}.Block"], ["blocks.0", "blocks.1"])):
        with recomputed(net, modules) as handle:
            assert list(handle.blocks) == names, modules


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they have an effect")
def test_what_has_no_effect_says_so_once():
    model = nn.Sequential(LinearTanh(2, 2))

    def run(config, blocks):
        checkpointing.apply(dict(enumerate(blocks)), CheckpointingConfig(**config))
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()

    for key in ("cpu_checkpointing", "synchronize_checkpoint_boundary"):
        message, = warnings_of(lambda: run({key: True}, list(model)))
        assert message.startswith(f"activation_checkpointing.{key} has no effect: ")
    section = {"contiguous_memory_optimization": True, "partition_activations": True, "number_checkpoints": 2}
    message, = warnings_of(lambda: deepspeed.load_config({"activation_checkpointing": section}))
    assert message.startswith("config: without effect here: ")
    assert all(f"activation_checkpointing.{key} (" in message for key in section)
    assert warnings_of(lambda: run({}, list(model))) == []
    assert "no repeated blocks" in warnings_of(lambda: run({}, []))[0]
    assert "configure()" in warnings_of(lambda: run({"modules": []}, []))[0]


def test_configure_takes_deepspeeds_arguments_and_a_config(tmp_path):
    assert not checkpointing.is_configured()
    x = torch.ones(3, requires_grad=True)
    checkpoint(twice, x).sum().backward()
    path = tmp_path / "ds_config.json"
    path.write_text('{"activation_checkpointing": {"mode": "selective", "profile": true,}} # as in any other config')
    configure = deepspeed.checkpointing.configure
    explicit = configure(None, deepspeed_config=path)
    assert checkpointing.is_configured() and explicit.config == CheckpointingConfig(mode="selective", profile=True)
    checkpoint(twice, x).sum().backward()
    assert explicit.report()["twice"].recomputations == 1
    checkpointing.reset()
    assert explicit.report() == {} and checkpointing.is_configured()
    explicit = configure(None, {"activation_checkpointing": {"profile": True}}, profile=False)
    assert not explicit.config.profile
    said, = warnings_of(lambda: configure(None, contiguous_checkpointing=True, num_checkpoints=4))
    assert "contiguous_memory_optimization (" in said and "number_checkpoints (" in said
    for call, told in (({"mpu_": object()}, "mpu_ is <object"),
                        ({"mpu_": None, "deepspeed_config": {"activation_checkpointing": {"evry": 2}}},
                         "unknown key activation_checkpointing.evry"),
                        ({"mpu_": None, "deepspeed_config": {"activation_checkpointing": True}},
                         "activation_checkpointing is True; allowed: an object")):
        with pytest.raises(ValueError, match=told):
            configure(**call)


# --- On a GPU ---------------------------------------------------------------------------------------------------------


def test_in_host_memory_inputs_keep_their_strides_and_parameters_are_not_copied(monkeypatch):
    copied, empty_like = [], torch.empty_like

    def unpinned(tensor: torch.Tensor, device: str, pin_memory: bool) -> torch.Tensor:
        assert device == "cpu" and pin_memory
        copied.append(tensor)
        return empty_like(tensor)

    def function(x, weight):
        weights.append(weight)
        return (x.permute(0, 2, 3, 1).view(-1) @ weight).sin()  # a view that the strides of channels_last allow

    weights, weight = [], nn.Parameter(torch.randn(24, dtype=torch.double))
    image = torch.randn(1, 2, 3, 4, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    expected = torch.autograd.grad(function(image, weight), [image, weight])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # whose random state is another matter
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch, "empty_like", unpinned)
    checkpointing.configure(CheckpointingConfig(cpu_checkpointing=True))
    assert_equal(torch.autograd.grad(checkpoint(function, image, weight), [image, weight]), expected)
    assert len(copied) == 1 and copied[0] is image
    assert len(weights) == 3 and all(each.data_ptr() == weight.data_ptr() for each in weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [{}, {"cpu_checkpointing": True}, {"mode": "selective"}])
def test_on_a_gpu_dropout_and_host_memory(config):
    net = Net([Block() for _ in range(4)]).cuda()
    x = torch.randn(2, 5, WIDTH, device="cuda", requires_grad=True)
    expected = gradients(net, x)
    with recomputed(net, **config):
        torch.testing.assert_close(gradients(net, x), expected)  # GPU kernels may add up in another order


# --- Through the engine, over every ZeRO stage ------------------------------------------------------------------------


def trained_with(sections: list[dict], stage: int, layers: int = 4, shared: bool = False, frozen: bool = False,
                 half: bool = False, backwards: int = 1) -> list:
    """For each section (None: no recomputation): the weights after two steps, and the elements that gathers sent."""
    results = []
    for section in sections:
        torch.manual_seed(0)
        net = Net([Block() for _ in range(layers)], order=[*range(layers), 0] if shared else None)
        net.blocks[0].qkv.requires_grad_(not frozen)
        engine = start(net, stage, None, optimizer={"type": "AdamW", "params": {"lr": 0.01}},
                       bf16={"enabled": half, "auto_cast": True},
                       **({} if section is None else {"activation_checkpointing": section}))
        torch.manual_seed(dist.get_rank())
        for step in range(2):
            loss = engine(torch.randn(2, 5, WIDTH)).float().square().mean()
            for turn in range(backwards):
                engine.backward(loss / backwards, retain_graph=turn + 1 < backwards)
            engine.step()
        results.append((list(whole(net).values()), engine.zero.communicator.traffic["all-gather"].elements))
        engine.destroy()
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
@given(st.integers(0, 3), st.integers(2, 4), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 2),
       st.sampled_from([{}, {"modules": ["blocks.1*", "head"]}, {"mode": "selective"}, {"modules": ["Block"]},
                        {"modules": ["Net"]}, {"modules": ["Net"], "mode": "selective"}]))
@settings(max_examples=max(8, settings().max_examples // 10), phases=[Phase.generate])
def test_training_with_dropout_is_bit_equal_with_and_without_it_at_every_stage(
        run_ranks, world_size, stage, layers, shared, frozen, half, backwards, section):
    for (plain, _), (again, _) in run_ranks(trained_with, world_size, [None, section], stage, layers, shared, frozen,
                                            half, backwards):
        assert_equal(again, plain)


@on_ranks(2)
def test_at_stage_3_recomputation_gathers_each_unit_once_more_and_not_twice():
    (_, without), *others = trained_with([None, {}, {"mode": "selective"}], 3)
    assert {gathered for _, gathered in others} == {without} != {0}, "once in forward, once in backward, as without"


@on_ranks(1)
def test_the_config_alone_recomputes_and_profiles_each_module():
    engine = start(Net([Block(), Block()]), 0, activation_checkpointing={"profile": True})
    engine.backward(engine(torch.randn(2, 5, WIDTH)).square().mean())
    report = engine.checkpointing.report()
    assert set(report) == {"blocks.0", "blocks.1"}
    assert all(row.recomputations == row.calls == 1 for row in report.values())
    assert all(row.bytes_kept == 2 * 5 * WIDTH * 4 and row.seconds_recomputed > 0 for row in report.values())
