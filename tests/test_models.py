"""Any model, used the way people use models: under every stage it trains what plain PyTorch trains, or says why not.

    .venv/bin/python -m pytest -q tests/test_models.py
    .venv/bin/python -m pytest -q tests/test_models.py --long     compiles at every stage

Every rank has its own rows of a batch; the reference is the same model in plain PyTorch, on the rows of all ranks: see
``oracle.py``. Models of the package ``transformers`` are tested where it is installed.
"""

import copy
import importlib.util
import io
import pickle
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils import parametrizations, parametrize, rnn
from torch.utils.checkpoint import checkpoint

import zero
from conftest import on_ranks
from oracle import LENGTH, STAGES, WIDTH, Case, Mlp, Pair, assert_close, assert_same, batches, inside, mine, \
    plain_backward, sgd, square, start, train, twins


# --- Modules of PyTorch's ---------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Encoder and decoder as PyTorch has them, with masks of both kinds."""

    def __init__(self):
        super().__init__()
        layers = {"dim_feedforward": 2 * WIDTH, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, **layers), 2, nn.LayerNorm(WIDTH))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, **layers), 2)

    def forward(self, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -1] = True  # in evaluation the encoder packs such rows into a nested tensor
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=x.dtype)
        memory = self.encoder(x, src_key_padding_mask=padding)
        return self.decoder(x, memory[:, :LENGTH - 1], tgt_mask=causal, tgt_is_causal=True)


class CrossAttention(nn.Module):
    """Queries, keys and values of different widths, which have a weight each, with biases that are parameters."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, kdim=3, vdim=5, add_bias_kv=True, batch_first=True)

    def forward(self, x):
        return self.attention(x, x[..., :3], x[..., 3:], need_weights=False)[0]


class Recurrent(nn.Module):
    """Recurrent layers keep a list of their weights as attributes, and pass it on as a whole."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, 5, 2, batch_first=True, bidirectional=True)
        self.lstm = nn.LSTM(10, WIDTH, batch_first=True, proj_size=3)
        self.cell = nn.GRUCell(3, WIDTH)

    def forward(self, x):
        packed = rnn.pack_padded_sequence(x, torch.tensor([LENGTH] + [2] * (len(x) - 1)), batch_first=True)
        self.gru.flatten_parameters()
        x, _ = rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        x, state = self.lstm(x)[0], None
        for step in range(LENGTH):
            state = self.cell(x[:, step], state)
        return state


class SparseEmbeddings(nn.Module):
    """Gradients that autograd gives as sparse tensors."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, WIDTH, mode="sum", sparse=True, padding_idx=0)
        self.token = nn.Embedding(9, WIDTH, sparse=True, scale_grad_by_freq=False)

    def forward(self, x):
        ids = (4 + 2 * x).long().clamp(0, 8)[..., :3]
        return self.token(ids[..., 0]) + self.bag(ids.flatten(0, 1)).view(*ids.shape[:2], WIDTH)


class Convolutions(nn.Module):
    """Weights whose elements lie channel by channel in memory, and of every kind of convolution."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.ConvTranspose2d(4, 2, 2, stride=2)).to(memory_format=torch.channels_last)

    def forward(self, x):
        assert self.convolutions[0].weight.is_contiguous(memory_format=torch.channels_last)
        x = x[..., :6].reshape(len(x), 2, LENGTH, LENGTH).to(memory_format=torch.channels_last)
        return self.convolutions(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x, x, x)[0]
        return x


# --- Weights that are computed, listed or changed ---------------------------------------------------------------------


class Symmetric(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)

    def right_inverse(self, weight):
        return weight.triu()


class Parametrized(nn.Module):
    """Weights computed from parameters, which are used once and, cached, twice."""

    def __init__(self):
        super().__init__()
        self.symmetric = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(self.symmetric, "weight", Symmetric())
        self.normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.turning = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH), orthogonal_map="cayley")
        self.blocks = nn.ModuleList(nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())
                                    for _ in range(2))

    def forward(self, x):
        x = self.normed(torch.tanh(self.turning(self.symmetric(x))))
        with parametrize.cached():
            for block in self.blocks:
                x = block(block(x))
        return x


class Spectral(nn.Module):
    """Weights over their largest singular value, which each forward in training estimates better in buffers."""

    def __init__(self):
        super().__init__()
        self.new = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.old = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.old(torch.tanh(self.new(x)))


class Listed(nn.Module):
    """Parameters in lists and dictionaries, which have no forward of their own."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH) / 4) for _ in range(3)])
        self.gains = nn.ParameterDict({name: torch.rand(WIDTH) for name in ("first", "second", "unused")})

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ weight) * self.gains["first"]
        return x + self.gains["second"]


class Complex(nn.Module):
    """Complex parameters beside real ones."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.filters = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex128) / 4)
        self.phases = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))

    def forward(self, x):
        return (torch.fft.fft(self.layer(x)) @ self.filters * self.phases).abs()


class Adapted(nn.Module):
    """A frozen model with small trained parts beside its layers."""

    def __init__(self):
        super().__init__()
        self.base = Mlp().requires_grad_(False).blocks
        self.down = nn.ModuleList(nn.Linear(WIDTH, 2, bias=False) for _ in self.base)
        self.up = nn.ModuleList(nn.Linear(2, WIDTH, bias=False) for _ in self.base)

    def forward(self, x):
        for block, down, up in zip(self.base, self.down, self.up):
            x = block(x) + up(down(x))
        return x


# --- What a model gives back ------------------------------------------------------------------------------------------


@dataclass
class Inner:
    hidden: torch.Tensor
    rest: list


@dataclass
class Outer:
    inner: Inner
    note: str


class Nested(Mlp):
    """Gives and takes dataclasses within dataclasses."""

    def __init__(self):
        super().__init__(2)
        self.head = Head()

    def forward(self, x):
        return self.head(Outer(Inner(self.blocks[0](x), [self.blocks[1](x)]), "text")).inner.rest[0]["loss"]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Outer) -> Outer:
        out = self.layer(given.inner.hidden) + given.inner.rest[0]
        return Outer(Inner(out.detach(), [{"loss": out.square().mean()}]), given.note)


class Plain:
    """An object that nothing is known of."""

    def __init__(self, value):
        self.value = value


class GivesObjects(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(GivesObject() for _ in range(3))

    def forward(self, x):
        x = Plain(x)
        for block in self.blocks:
            x = block(x)
        return x


class GivesObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return Plain(torch.tanh(self.layer(x.value)) * x.value)


class GivesNothing(Mlp):
    """Keeps its loss, and returns None."""

    def forward(self, x):
        self.loss = self.blocks(x).square().mean()


class GivesLoss(Mlp):
    def forward(self, x):
        return {"loss": self.blocks(x).square().mean()}


class Loop(list):
    """Contains itself."""


@dataclass
class Unset:
    out: torch.Tensor
    rest: Loop = field(init=False)  # never set


class GivesCycles(Mlp):
    def forward(self, x):
        loop = Loop([Unset(self.blocks(x))])
        loop.append(loop)
        return loop


class InPlaceResidual(Mlp):
    """A linear layer's output is a view where its input has three dimensions; it's added to in place."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            y = block(x)
            y += x
            x = y
        return x


class Router(nn.Module):
    """A block that keeps a side output as an attribute, as mixtures of experts keep their balance loss."""

    def __init__(self):
        super().__init__()
        self.layer, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        self.side = self.router(x).square().mean()
        return x + self.layer(torch.tanh(x))


class SideOutput(nn.Module):
    """Adds the side outputs up, and keeps the sum as an attribute itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Router() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        self.side = sum(block.side for block in self.blocks)
        return x


class Table(nn.Module):
    """A block with an input-independent part, whose backward comes after that of the input."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.inner, self.outer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner(self.table) + self.outer(x)


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Table() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


# --- Memory of weights that goes further than the module that has them ------------------------------------------------

VIEWS = {
    "slice": lambda m, n: m.table[:n], "view": lambda m, n: m.table.view(-1)[8:8 + n * WIDTH].view(n, WIDTH),
    "transpose": lambda m, n: m.table.t()[:n], "narrow": lambda m, n: m.table.narrow(0, 2, n),
    "expand": lambda m, n: m.table[:1].expand(n, WIDTH), "unbind": lambda m, n: m.table.unbind(0)[1][None],
    "detach": lambda m, n: m.table.detach()[:n], "data": lambda m, n: m.table.data[:n],
    "tuple": lambda m, n: (m.table[:n], m.table), "dict": lambda m, n: {"a": [m.table[1:n + 1]]},
    "numpy": lambda m, n: torch.from_numpy(m.table.detach().numpy())[:n],
    "state dict": lambda m, n: m.state_dict()["table"][:n], "kept": lambda m, n: setattr(m, "kept", m.table[:n]),
    "kept for ever": lambda m, n: m.__dict__.setdefault("cached", m.table.t()[:n]), "whole": lambda m, n: m.table,
}


class View(nn.Module):
    def __init__(self, form: str):
        super().__init__()
        self.table, self.form = nn.Parameter(torch.randn(WIDTH, WIDTH)), form

    def forward(self, length: int):
        return VIEWS[self.form](self, length)


class Views(nn.Module):
    """Every module but the last gives a view of its weight, which its parent uses."""

    def __init__(self, recompute: bool = False):
        super().__init__()
        self.views = nn.ModuleDict({form: View(form) for form in VIEWS})
        self.last, self.recompute = nn.Linear(WIDTH, WIDTH, bias=False), recompute

    def forward(self, x):
        for view in self.views.values():
            if self.recompute and view.form != "kept":
                given = checkpoint(view, x.shape[1], use_reentrant=False)
            else:
                given = view(x.shape[1])
            if view.form == "kept":
                given = view.__dict__.pop("kept")
            elif isinstance(given, (tuple, dict)):
                given = given[0] + given[1][1:x.shape[1] + 1] if isinstance(given, tuple) else given["a"][0]
            x = x + torch.tanh(given[:x.shape[1]]) if view.form != "whole" else x @ given
        return self.last(x)


class WritesData(Mlp):
    """Changes its weights in forward in the way that PyTorch does not count."""

    def __init__(self):
        super().__init__(3)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        for p in [self.scale, self.blocks[1][0].weight]:
            p.data.mul_(0.9)
        with torch.no_grad():
            self.blocks[0][0].weight.mul_(0.9)
        return self.blocks(x * self.scale)


# --- Other ways through a model than its forward ----------------------------------------------------------------------


class Methods(Mlp):
    def __init__(self):
        super().__init__(2)
        self.scale, self.table = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.randn(2 * LENGTH, WIDTH))
        self.head = nn.Linear(WIDTH, WIDTH)

    def encode(self, x):
        return self.head(self.blocks(x * self.scale + self.table[:x.shape[1]])) @ self.head.weight

    def forward(self, x):
        return self.blocks(x)


class Weighted(torch.autograd.Function):
    """x w^T, of which backward reads w as an attribute of a module."""

    @staticmethod
    def forward(ctx, x, w, module):
        ctx.save_for_backward(x)
        ctx.module = module
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return grad @ ctx.module.weight, grad.flatten(0, 1).t() @ x.flatten(0, 1), None


class Coupling(torch.autograd.Function):
    """Reversible: backward computes the inputs from the outputs, and runs two submodules anew."""

    @staticmethod
    def forward(ctx, x, module):
        a, b = x.chunk(2, -1)
        a = a + module.f(b)
        b = b + module.g(a)
        ctx.module = module
        ctx.save_for_backward(a, b)
        return torch.cat([a, b], -1)

    @staticmethod
    def backward(ctx, grad):
        (a, b), (da, db) = ctx.saved_tensors, grad.chunk(2, -1)
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            g = ctx.module.g(a)
            torch.autograd.backward(g, db)
        da = da + a.grad
        with torch.enable_grad():
            b = (b - g.detach()).requires_grad_()
            torch.autograd.backward(ctx.module.f(b), da)
        return torch.cat([da, db + b.grad], -1), None


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH // 2, WIDTH // 2), nn.Linear(WIDTH // 2, WIDTH // 2)

    def forward(self, x):
        return Coupling.apply(x, self)


class Reversibles(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Reversible() for _ in range(3))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return Weighted.apply(x, self.last.weight, self.last) + self.last.bias

    def run(self, x):
        return self.forward(x)


def encoded(model, x):
    """By a method of the engine, by one of the model, and by parts of it."""
    return (model.encode(x) + inside(model).encode(-x) + inside(model).head(model(x))).square().mean()


def penalized(model, x):
    """With penalties on gathered weights, the backward of which comes after the context."""
    loss = square(model, x)
    with zero.GatheredParameters(model.parameters()):
        loss = loss + sum(p.square().sum() + (p.t() @ p).square().mean() for p in model.parameters())
    with torch.enable_grad(), zero.GatheredParameters(p := inside(model).blocks[0][0].weight):
        grad, = torch.autograd.grad(p.pow(3).sum(), p, create_graph=True)
    return loss + grad.square().mean()


def hooked_by_the_caller(model, x):
    def to_16_bits(tensor):
        return tensor.to(torch.bfloat16)

    loss = 0
    for hooks in (save_on_cpu(), saved_tensors_hooks(lambda t: t, lambda t: t),
                  saved_tensors_hooks(to_16_bits, torch.Tensor.double)):
        with hooks:
            loss = loss + square(model, x)
    return loss


class Reader(nn.Module):
    """A parent that reads a child's weight without calling the child, as tied heads are often written."""

    def __init__(self):
        super().__init__()
        self.token, self.mix = nn.Embedding(9, WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.scale = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.token((x > 0).sum(-1))
        return self.mix(x, x, x)[0] * self.scale.weight.sum() @ self.token.weight.t()


# --- Losses -----------------------------------------------------------------------------------------------------------


def with_side(model, x):
    """With the side output that the model keeps."""
    return square(model, x) + inside(model).side


def kept_loss(model, x):
    assert model(x) is None
    return inside(model).loss


def twice(model, x):
    """Two forward passes, each of which one backward goes through."""
    return (model(x) - model(-x)).square().mean()


def unrolled(model, x):
    """Forward passes that feed each other."""
    total = 0
    for _ in range(3):
        x = model(x)
        total = total + x.square().mean()
    return total


def encoded(model, x):
    """By a method of the engine, by one of the model, and by parts of it."""
    return (model.encode(x) + inside(model).encode(-x) + inside(model).head(model(x))).square().mean()


def penalized(model, x):
    """With penalties on gathered weights, the backward of which comes after the context."""
    loss = square(model, x)
    with zero.GatheredParameters(model.parameters()):
        loss = loss + sum(p.square().sum() + (p.t() @ p).square().mean() for p in model.parameters())
    with torch.enable_grad(), zero.GatheredParameters(p := inside(model).blocks[0][0].weight):
        grad, = torch.autograd.grad(p.pow(3).sum(), p, create_graph=True)
    return loss + grad.square().mean()


@torch.enable_grad()
def gradient_penalized(model, x):
    """With the norm of a gradient in it: backward differentiates twice."""
    x = x.detach().requires_grad_()
    loss = square(model, x)
    gradient, = torch.autograd.grad(loss, x, create_graph=True)
    return loss + (gradient.norm() - 1).square()


def hooked_by_the_caller(model, x):
    def to_16_bits(tensor):
        return tensor.to(torch.bfloat16)

    loss = 0
    for hooks in (save_on_cpu(), saved_tensors_hooks(lambda t: t, lambda t: t),
                  saved_tensors_hooks(to_16_bits, torch.Tensor.double)):
        with hooks:
            loss = loss + square(model, x)
    return loss


# --- The table --------------------------------------------------------------------------------------------------------


def encoder_layer():
    """In evaluation without gradients it takes another path, which reads its children's weights itself."""
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)


CASES = {
    "transformer": Case(Transformer), "cross attention": Case(CrossAttention), "self-attention": Case(Attention),
    "encoder layers": Case(lambda: nn.Sequential(encoder_layer(), encoder_layer())),
    "recurrent": Case(Recurrent), "sparse embeddings": Case(SparseEmbeddings),
    "channels_last convolutions": Case(Convolutions), "parametrized": Case(Parametrized),
    "spectral norm": Case(Spectral, whole=True), "parameter lists": Case(Listed), "complex parameters": Case(Complex),
    "adapters": Case(Adapted), "a child's weight, read": Case(Reader), "a residual, added in place": Case(
        InPlaceResidual), "a parameter with a path of its own": Case(Tables), "side outputs": Case(SideOutput, with_side),
    "dataclasses": Case(Nested, lambda model, x: model(x)),
    "objects": Case(GivesObjects, lambda model, x: model(x).value.square().mean()),
    "nothing returned": Case(GivesNothing, kept_loss), "a loss returned": Case(GivesLoss, lambda m, x: m(x)["loss"]),
    "unset fields and cycles": Case(partial(GivesCycles, 2), lambda model, x: model(x)[0].out.square().mean()),
    "views of weights": Case(Views), "views of weights, recomputed": Case(partial(Views, True)),
    "written through .data": Case(WritesData, whole=True), "methods": Case(Methods, encoded),
    "reversible": Case(Reversibles),
    "reversible, in a method": Case(Reversibles, lambda model, x: model.run(x).square().mean()),
    **{name: Case(partial(Mlp, 2), loss) for name, loss in (
        ("two forwards", twice), ("unrolled", unrolled), ("penalties", penalized),
        ("a gradient penalty", gradient_penalized), ("the caller's hooks", hooked_by_the_caller))}}


@on_ranks(2, name=CASES, stage=STAGES)
def test_training_and_evaluation_equal_plain_pytorch(name, stage):
    train(CASES[name], stage)


# --- Buffers that change in forward -----------------------------------------------------------------------------------


class Counting(nn.Module):
    """Running statistics, a count that is changed in place, and a mean that is assigned."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(LENGTH), nn.Linear(WIDTH, WIDTH),
                                    nn.InstanceNorm1d(LENGTH, affine=True, track_running_stats=True))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        if self.training:
            self.count += len(x)
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return self.layers(x) + self.mean / self.count.clamp(min=1)


@on_ranks(2, stage=STAGES)
def test_each_rank_keeps_the_statistics_of_its_own_rows(stage):
    """Those of a model that has the weights of all ranks, and has seen this rank's rows."""
    pair = Pair(Counting, stage)
    shared = {id(p): p for p in pair.reference.parameters()}
    per_rank = [copy.deepcopy(pair.reference, dict(shared)) for _ in batches(0)]
    for step in range(3):
        pair.backward(step)
        pair.engine.step()
        plain_backward(square(net, x) for net, x in zip(per_rank, batches(step)))
        pair.plain_step()
        pair.check(f"step {step}")
        for (name, a), b in zip(pair.model.named_buffers(), mine(per_rank).buffers(), strict=True):
            assert_close(a, b, f"step {step}: the buffer {name}")
        pair.engine.eval(), mine(per_rank).eval()
        with torch.no_grad():
            x = batches(100)[0]
            assert_close(pair.engine(x), mine(per_rank)(x), f"step {step}: the output in evaluation")
        pair.engine.train(), mine(per_rank).train()
    assert not torch.equal(per_rank[0].mean, per_rank[1].mean), "else nothing was compared"


# --- Hooks of one's own -----------------------------------------------------------------------------------------------


def put_hooks(model: nn.Module, seen: list) -> None:
    """Hooks on parameters, activations and modules, which look on or change something."""
    blocks = model.blocks
    blocks[0][0].weight.register_hook(lambda gradient: gradient / 2)
    blocks[1][2].bias.register_hook(lambda gradient: seen.append(gradient.clone()))
    blocks[1].register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 3,))
    blocks[2].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    blocks[2][0].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    blocks[3].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    blocks[3].register_forward_hook(lambda module, args, out: look(out, seen))
    model.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].clone()))


def look(activation: torch.Tensor, seen: list) -> None:
    activation.register_hook(lambda gradient: seen.append(gradient.clone()))


@on_ranks(2, stage=STAGES, before=[True, False])
def test_hooks_of_ones_own_see_and_change_what_they_do_in_plain_pytorch(stage, before):
    """Put before initialize() or after it."""
    model, reference = twins(Mlp)
    seen, expected = [], []
    if before:
        put_hooks(model, seen)
    pair = Pair.of(model, reference, stage)
    if not before:
        put_hooks(model, seen)
    put_hooks(reference, expected)
    for step in range(3):
        pair.backward(step)
        pair.engine.step()
        for rank, x in enumerate(batches(step)):
            expected.clear()
            square(reference, x).backward()  # the mean over ranks comes after the hooks
            if rank == dist.get_rank():
                assert len(seen) == len(expected) == 4
                for index, (a, b) in enumerate(zip(seen, expected)):
                    assert_close(a, b, f"step {step}: what was seen, {index}")
        for p in reference.parameters():
            p.grad /= dist.get_world_size()
        seen.clear()
        pair.plain_step()
        pair.check(f"step {step}")


# --- Inputs that require grad -----------------------------------------------------------------------------------------


@on_ranks(2, stage=STAGES, kind=[Mlp, Tables])
def test_a_leaf_input_has_its_gradient_and_the_weights_theirs(stage, kind):
    """From a backward of its own, and along with those of the weights."""
    pair = Pair(kind, stage)
    for step in range(3):
        leaves = [x.requires_grad_() for x in batches(step)]
        x = mine(batches(step)).requires_grad_()
        got, = torch.autograd.grad(pair.engine(x).sum(), x)
        expected, = torch.autograd.grad(pair.reference(mine(leaves)).sum(), mine(leaves))
        assert_close(got, expected, f"step {step}: torch.autograd.grad of the input")
        pair.engine.backward(square(pair.engine, x))
        plain_backward(square(pair.reference, leaf) for leaf in leaves)
        assert_close(x.grad, mine(leaves).grad * dist.get_world_size(), f"step {step}: the input's gradient")
        pair.engine.step()
        pair.plain_step()
    pair.check()


@on_ranks(2, stage=STAGES)
def test_gradients_of_gathered_parameters_can_be_taken_by_autograd_grad(stage):
    """They leave the training step around them alone."""
    pair, x = Pair(partial(Mlp, 2), stage), mine(batches(100))
    for step in range(2):
        with zero.GatheredParameters(pair.model.parameters()):
            gradients = torch.autograd.grad(square(pair.engine, x), list(pair.model.parameters()))
        expected = torch.autograd.grad(square(pair.reference, x), list(pair.reference.parameters()))
        for (name, _), a, b in zip(pair.model.named_parameters(), gradients, expected, strict=True):
            assert_close(a, b, f"step {step}: the gradient of {name}")
        pair.train(step)
        pair.check(f"step {step}")


# --- Loops that are not forward, backward, step -----------------------------------------------------------------------


@on_ranks(2, stage=STAGES)
def test_a_gan_trains_with_two_engines(stage):
    """The maker's backward leaves gradients in the critic, which zero_grad() must drop."""
    maker, critic = Pair(partial(Mlp, 3), stage), Pair(partial(Mlp, 4), stage)
    for step in range(3):
        noise = batches(100 + step)
        critic.engine.zero_grad()
        critic.backward(step)
        critic.engine.backward(critic.engine(maker.engine(mine(noise)).detach()).mean())
        critic.engine.step()
        maker.engine.zero_grad()
        maker.engine.backward((critic.engine(maker.engine(mine(noise))) - 1).square().mean())
        maker.engine.step()

        critic.optimizer.zero_grad()
        plain_backward(square(critic.reference, x) for x in batches(step))
        plain_backward(critic.reference(maker.reference(z).detach()).mean() for z in noise)
        critic.optimizer.step()
        maker.optimizer.zero_grad()
        plain_backward((critic.reference(maker.reference(z)) - 1).square().mean() for z in noise)
        maker.optimizer.step()
        critic.check(f"step {step}: critic")
        maker.check(f"step {step}: maker")


@on_ranks(2, stages=[(0, 3), (3, 1), (2, 3)])
def test_one_loss_trains_two_engines_at_stages_of_their_own(stages):
    """Then each has a step alone."""
    first, second = (Pair(partial(Mlp, blocks), stage) for blocks, stage in zip((2, 1), stages))
    for step in range(2):
        second.engine.backward(second.engine(first.engine(mine(batches(step)))).square().mean())
        plain_backward(second.reference(first.reference(x)).square().mean() for x in batches(step))
        for what, pair in (("first", first), ("second", second)):
            pair.engine.step()
            pair.plain_step()
            pair.check(f"step {step}: the {what} model")
            pair.train(10 + step)
            pair.check(f"step {step}: the {what} model alone")


class Raising(torch.autograd.Function):
    """The identity, of which the backward may raise."""

    @staticmethod
    def forward(context, x, raises):
        context.raises = raises
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        if context.raises:
            raise ArithmeticError("raised in backward")
        return gradient, None


class RaisesHalfway(Mlp):
    raises = False

    def forward(self, x):
        return self.blocks[2:](Raising.apply(self.blocks[:2](x), self.raises))


@on_ranks(2, stage=STAGES)
def test_training_goes_on_after_a_backward_that_raised(stage):
    """Some gradients were sent and others not: zero_grad() forgets it all."""
    pair = Pair(RaisesHalfway, stage)
    pair.train(0)
    pair.model.raises = True
    with pytest.raises(ArithmeticError, match="raised in backward"):
        pair.backward(1)
    pair.model.raises = False
    pair.engine.zero_grad()
    pair.train(2)
    pair.train(3)
    pair.check()


class Choice(nn.Module):
    """One of several experts, by the caller's choice."""

    def __init__(self):
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(WIDTH, WIDTH), Mlp(2).blocks, nn.Linear(WIDTH, WIDTH)

    def forward(self, x, expert):
        return self.last(self.experts[expert](self.first(x)))


class Skipping(Mlp):
    """All layers or none, by the caller's choice."""

    def forward(self, x, skip):
        return x if skip else self.blocks(x)


def train_by_rank(pair: Pair) -> None:
    for step in range(3):
        rows = [x.requires_grad_() for x in batches(step)]
        pair.engine.backward(pair.engine(mine(rows), dist.get_rank()).square().mean())
        pair.engine.step()
        assert mine(rows).grad is not None
        plain_backward(pair.reference(x, rank).square().mean() for rank, x in enumerate(rows))
        pair.plain_step()


@on_ranks(2, stage=range(3), kind=[Choice, Skipping])
def test_below_stage_3_ranks_may_use_different_layers_or_none(stage, kind):
    pair = Pair(kind, stage)
    train_by_rank(pair)
    pair.check()


@on_ranks(2)
def test_at_stage_3_ranks_that_use_different_layers_are_all_told():
    with pytest.raises(RuntimeError, match="ranks used the units of stage 3 in different orders"):
        train_by_rank(Pair(Choice, 3))


@on_ranks(2, stage=STAGES)
def test_evaluation_may_come_between_ones_own_backward_and_step(stage):
    pair = Pair(Mlp, stage)
    for step in range(3):
        square(pair.engine, mine(batches(step))).backward()
        with torch.inference_mode():
            x = mine(batches(100 + step))
            assert_close(pair.engine(x), pair.reference(x), f"the output in evaluation before step {step}")
        pair.engine.step()
        pair.plain(step)
    pair.check()


class Slowing(torch.optim.Optimizer):
    """An optimizer of one's own that counts its steps in its param group, and slows down with them."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "step": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * group["lr"] / group["step"])


@on_ranks(2, stage=STAGES)
def test_an_optimizer_that_counts_its_steps_in_a_group_is_stepped_once_per_step(stage):
    pair = Pair(Mlp, stage, Slowing)
    for step in range(3):
        pair.train(step)
    pair.check()
    assert pair.engine.optimizer.param_groups[0]["step"] == 3


# --- Reading, copying and changing the model --------------------------------------------------------------------------


@on_ranks(2, stage=STAGES, modifier_rank=[None, 0], steps_inside=[0, 2])
def test_training_inside_gathered_parameters(stage, modifier_rank, steps_inside):
    """Whole steps, and at last a backward, whose step comes after the context."""
    pair = Pair(Mlp, stage)
    with zero.GatheredParameters(pair.model.parameters(), modifier_rank=modifier_rank):
        for step in range(steps_inside):
            pair.train(step)
        pair.backward(steps_inside)
        if steps_inside == 0:
            for (name, p), q in zip(pair.model.named_parameters(), pair.reference.parameters()):
                assert_close(p, q, f"{name} after backward")
    pair.engine.step()
    pair.plain(steps_inside)
    pair.train(9)
    pair.check()


@on_ranks(2, stage=STAGES)
def test_whole_gradients_can_be_read_after_ones_own_backward(stage):
    """In the middle of a window of two, at its end, and after the step."""
    pair = Pair(Mlp, stage, gradient_accumulation_steps=2)
    for window in range(2):
        for micro in range(2):
            rows = batches(2 * window + micro)
            square(pair.engine, mine(rows)).backward()  # the mean over the window is the engine's
            plain_backward(square(pair.reference, x) / 2 for x in rows)
            got = {name: zero.safe_get_full_grad(p) for name, p in pair.model.named_parameters()}
            for name, p in pair.reference.named_parameters():
                assert_close(got[name], p.grad, f"window {window}, micro-batch {micro}: the gradient of {name}")
            pair.engine.step()
        pair.plain_step()
        for name, p in pair.model.named_parameters():
            assert zero.safe_get_full_grad(p) is None, f"window {window}: {name} after step()"
    pair.check()


@on_ranks(2, stage=STAGES, how=["deepcopy", "pickle"])
def test_a_copy_trains_alone(stage, how):
    """A whole copy, such as a target network, trains without the engine, and the model with it."""
    pair = Pair(Mlp, stage)
    with zero.GatheredParameters(pair.model.parameters()):
        copied = copy.deepcopy(pair.model) if how == "deepcopy" else pickle.dumps(pair.model)
    copied = pickle.loads(copied) if how == "pickle" else copied
    networks = [(net, sgd(net.parameters())) for net in (copied, copy.deepcopy(pair.reference))]
    for step in range(3):
        for network, optimizer in networks:
            optimizer.zero_grad()
            square(network, mine(batches(100 + step))).backward()
            optimizer.step()
        pair.train(step)
    for (name, p), q in zip(copied.named_parameters(), networks[1][0].parameters(), strict=True):
        assert_close(p, q, f"{name} of the copy")
    pair.check()


@on_ranks(2, stage=STAGES)
def test_copies_from_before_and_after_initialize_train_apart(stage):
    """One from before initialize() and one from after a step get engines of their own."""
    model, reference = twins(partial(Mlp, 2))
    early = copy.deepcopy(model)
    first, second = Pair.of(model, copy.deepcopy(reference), stage), Pair.of(early, reference, stage)
    first.train(0)
    late = copy.deepcopy(model)
    assert_same(model, first.reference, "the copied model")
    third = Pair.of(late, copy.deepcopy(first.reference), stage)
    for offset, (what, pair) in enumerate({"early copy": second, "late copy": third, "original": first}.items()):
        for step in range(1, 3):
            pair.train(step + 10 * offset)
            pair.check(f"the {what}, step {step}")


@on_ranks(2, stage=STAGES)
def test_freezing_and_thawing_between_steps(stage):
    """Blocks, in part and again, also with accumulation."""
    model, reference = twins(Mlp)
    for net in (model, reference):
        net.blocks[1].requires_grad_(False)
        net.blocks[3][2].bias.requires_grad_(False)
    engine = start(model, stage, gradient_accumulation_steps=2,
                   zero_options={"offload_optimizer": {"device": "cpu" if stage == 2 else "none"}})
    optimizer = sgd(reference.parameters())
    changes = {1: ("blocks.1.2.weight", True), 2: ("blocks.1", True), 3: ("blocks.0", False), 4: ("blocks", True),
               5: ("blocks.3", False), 6: ("blocks.2", False), 7: ("blocks", True)}
    for step in range(8):
        name, trained = changes.get(step, ("", None))
        for net in (model, reference):
            part = net.get_parameter(name) if name.endswith("weight") else net.get_submodule(name)
            if trained is not None:
                part.requires_grad_(trained)
        for part in range(2):
            engine.backward(square(engine, mine(batches(2 * step + part))))
            engine.step()
            plain_backward(square(reference, x) / 2 for x in batches(2 * step + part))
        optimizer.step(), optimizer.zero_grad()
        assert_same(model, reference, f"step {step}")


@on_ranks(2, stage=STAGES)
def test_a_cast_behind_the_engines_back_is_an_error(stage):
    """At stage 3 by the cast itself, else by the next step."""
    pair = Pair(Mlp, stage)
    with pytest.raises(RuntimeError, match=r"is sharded over 2 ranks \(stage 3\)") if stage == 3 else nullcontext():
        pair.model.half()
    if stage < 3:
        with pytest.raises(RuntimeError, match=r"no longer lies where initialize\(\) put it"):
            pair.engine.backward(square(pair.engine, mine(batches(0)).half()).float())
            pair.engine.step()


class Spoils(Mlp):
    """Changes what its backward needs."""

    def forward(self, x):
        y = torch.sigmoid(self.blocks(x))
        z = y * y
        y.add_(1)
        return z


@on_ranks(2, stage=STAGES)
def test_a_saved_tensor_modified_in_place_is_found_at_every_stage(stage):
    pair = Pair(Spoils, stage)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square(pair.reference, mine(batches(0))).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation|modified in place"):
        pair.backward(0)


class Pooler(Mlp):
    """Ends with a module that is never used: the first one that backward would wait for."""

    def __init__(self):
        super().__init__(8)
        self.pooler = nn.Linear(WIDTH, 3 * WIDTH)


@on_ranks(2)
def test_a_module_that_is_never_used_holds_no_gradients_up():
    """At stage 2 there are at most three full gradient buffers at once, from the second step on."""
    pair, alive = Pair(Pooler, 2), []
    for p in pair.model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(g.buffer is not None for g in pair.engine.zero.reducer.every)))
    for step in range(3):
        alive.clear()
        pair.train(step)
        assert step == 0 or max(alive) <= 3 < 6 < len(pair.engine.zero.trained), f"step {step}: {max(alive)}"
    pair.check()


class Picky(nn.Module):
    """A block whose call says which of its two layers it uses, after the one that it always uses."""

    def __init__(self):
        super().__init__()
        self.always, self.first, self.second = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, picks):
        x = x + torch.tanh(self.always(x))
        for pick in picks:
            x = x + torch.tanh((self.second if pick else self.first)(x))
        return x


class Experts(nn.Module):
    """Each rank uses layers of its own, within blocks that all ranks go through."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Picky() for _ in range(8))

    def forward(self, x, picks):
        for block, chosen in zip(self.blocks, picks):
            x = block(x, chosen)
        return x


def of_rank(step: int, rank: int):
    """Both layers of all blocks at first; then the last block uses another on each rank, or one block none at all."""
    return [[0, 1]] * 7 + [[[0, 1], [rank], [], [0], [1 - rank]][step]]


@on_ranks(2, stage=STAGES)
def test_ranks_use_other_parameters_and_neither_wait_nor_pile_up(stage):
    """Counted where backward ends: buckets whose reductions were launched, and full gradients that wait."""
    pair = Pair(Experts, stage)
    state, launched, held = pair.engine.zero, [], []
    finish = state.finish_backward

    def look_and_finish():
        sent = [g.life in (zero.Life.SENDING, zero.Life.SENT) for g in state.reducer.every]
        launched.append(sum(sent))
        held.append(sum(g.buffer is not None and not s for g, s in zip(state.reducer.every, sent)))
        finish()

    state.finish_backward = look_and_finish
    for step in range(5):
        pair.engine.backward(pair.engine(mine(batches(step)), of_rank(step, dist.get_rank())).square().mean())
        pair.engine.step()
        plain_backward(pair.reference(x, of_rank(step, rank)).square().mean() for rank, x in enumerate(batches(step)))
        pair.plain_step()
    pair.check()
    buckets = len(state.trained)
    assert buckets >= 8 and min(launched[1:]) >= buckets - 2, f"{launched} of {buckets} launched"
    assert stage < 2 or max(held) <= 2, f"{held} of {buckets} full gradients wait"


@on_ranks(2, stage=STAGES)
def test_what_was_taken_inside_gathered_parameters_can_be_read_after_it(stage):
    """What it showed stays, whoever holds it, and goes with its holder."""
    pair = Pair(Mlp, stage)
    with zero.GatheredParameters(pair.model.parameters()):
        taken = pair.model.state_dict()
        views = [p.detach().t() for p in pair.model.parameters()]
        array = pair.model.blocks[0][0].weight.detach().numpy()
    file = io.BytesIO()
    torch.save(taken, file)
    file.seek(0)
    for name, value in torch.load(file).items():
        assert_close(value, pair.reference.state_dict()[name], f"{name} in the file")
    for view, p in zip(views, pair.reference.parameters(), strict=True):
        assert_close(view.t(), p, "a view")
    old = pair.reference.blocks[0][0].weight.detach().clone()
    pair.train(0)  # a numpy array keeps its memory: below stage 3 that of the weight
    assert_close(torch.from_numpy(array), old if stage == 3 else pair.reference.blocks[0][0].weight, "an array")
    taken = views = view = array = None
    pair.train(1)
    pair.check()
    with torch.no_grad():
        pair.engine(mine(batches(0)))
    assert stage < 3 or not any(bucket.has_memory for bucket in pair.engine.zero.buckets)


class Transformed(Mlp):
    def forward(self, x, transform=None):
        if transform is None:
            return self.blocks(x)
        return transform(lambda x: self.blocks(x).square().mean(), x)


@on_ranks(2)
def test_transforms_of_functions_are_refused_at_stage_3():
    model, _ = twins(Transformed)
    engine = start(model, 3)
    x = mine(batches(0))
    forms = {"grad": lambda f, x: torch.func.grad(f)(x), "vjp": lambda f, x: torch.func.vjp(f, x),
             "jvp goes through blocks.0": lambda f, x: torch.func.jvp(f, (x,), (x,))}
    for told, transform in forms.items():
        with pytest.raises(RuntimeError, match=f"{told}.*torch.autograd.grad"):
            engine(x, transform)
    with pytest.raises(RuntimeError, match="inside the model or zero.GatheredParameters"), \
            zero.GatheredParameters(model.parameters()):
        torch.func.grad(lambda x: model(x).mean())(x)
    with pytest.raises(RuntimeError, match="grad goes through blocks.0"):
        torch.func.grad(lambda x: model.blocks[0](x).mean())(x)
    assert_close(engine(x, lambda f, x: torch.func.vmap(f)(x)), torch.stack([square(engine, row) for row in x]), "vmap")
    engine.backward(square(engine, x))
    engine.step()


class Returning(Mlp):
    """Gives back a parameter, and views of one."""

    def __init__(self):
        super().__init__(2)
        self.scale, self.table = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(WIDTH, WIDTH))

    def forward(self, x):
        return self.blocks(x) * self.scale, self.scale, self.table[:LENGTH]


@on_ranks(2)
def test_a_returned_parameter_collects_no_hooks_and_a_lost_write_is_told():
    model, _ = twins(Returning)
    engine = start(model, 3)
    for step in range(3):
        y, scale, table = engine(mine(batches(step)))
        engine.backward((y + table).square().mean())
        engine.step()
    assert not scale._backward_hooks
    with torch.no_grad():
        table.mul_(2)
    with pytest.raises(RuntimeError, match="a view of the parameter table was written to while it was sharded"):
        engine(mine(batches(0)))


# --- Compiled ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.layer(x))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


USUAL = [("a model around the model", 1, "eager"), ("by the engine", 0, "eager"), ("by the engine", 2, "eager")]
COMPILED = [(how, stage, backend) for how in ("a model around the model", "in place", "block by block", "by the engine")
            for stage in STAGES for backend in ("eager", "aot_eager")]


@pytest.mark.parametrize("how, stage, backend", [
    case if case in USUAL else pytest.param(*case, marks=pytest.mark.long) for case in COMPILED])
@on_ranks(2)
def test_compiled_models_train_the_same(how, stage, backend):
    """Compiled by whom and when ``how`` says; the backends need no compiler of another language."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, reference = twins(Blocks)
    given = torch.compile(model, backend=backend) if how == "a model around the model" else model
    if how == "in place":
        model.compile(backend=backend)
    for block in model.blocks if how == "block by block" else ():
        block.compile(backend=backend)
    pair = Pair.of(given, reference, stage)
    if how == "by the engine":
        pair.engine.compile(backend=backend)
        assert model._compiled_call_impl is None and all(block._compiled_call_impl for block in model.blocks)
    for step in range(3):
        pair.train(step)
        assert_same(model, reference, f"step {step}")
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"


# --- Hugging Face's models --------------------------------------------------------------------------------------------


SIZES = {"GPT2": {"vocab_size": 17, "n_positions": 8, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0,
                  "embd_pdrop": 0.0, "attn_pdrop": 0.0},
         "Llama": {"vocab_size": 17, "max_position_embeddings": 8, "hidden_size": WIDTH, "intermediate_size": 16,
                   "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                   "tie_word_embeddings": True}}
MODELS = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}


def make_hugging_face(name: str) -> nn.Module:
    """A language model of random weights, the same at each call."""
    import transformers
    torch.manual_seed(0)
    return getattr(transformers, MODELS[name])(getattr(transformers, f"{name}Config")(**SIZES[name]))


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name, sharded, recomputed", [
    ("GPT2", False, None), ("GPT2", True, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ("Llama", True, None), ("Llama", False, {})])
@on_ranks(2, stage=STAGES)
def test_hugging_face_models_train_and_generate_the_same(name, sharded, recomputed, stage):
    """Perhaps built straight into shards, and with the model's own switch for recomputation."""
    reference = make_hugging_face(name)
    with zero.Init(enabled=sharded):
        model = make_hugging_face(name)
    if recomputed is not None:
        model.gradient_checkpointing_enable(**recomputed)
    pair = Pair.of(model, reference, stage)
    for step in range(3):
        ids = torch.randint(0, 17, (dist.get_world_size(), 2, 6), generator=torch.Generator().manual_seed(step))
        pair.engine.backward(pair.engine(input_ids=mine(ids), labels=mine(ids)).loss)
        pair.engine.step()
        plain_backward(reference(input_ids=of_rank, labels=of_rank).loss for of_rank in ids)
        pair.plain_step()
        pair.check(f"step {step}", tolerance=1e-6)
    written = [net.eval().generate(torch.tensor([[1, 2]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
               for net in (pair.engine.module, reference)]
    assert torch.equal(*written), "generation"
