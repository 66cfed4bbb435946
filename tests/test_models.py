"""Any model and any call: under every stage they do what they do in plain PyTorch, or say why not.

    .venv/bin/python -m pytest -q tests/test_models.py
    .venv/bin/python -m pytest -q tests/test_models.py --long     compiles at every stage

Every rank has its own rows of a batch; the reference is the same model in plain PyTorch, on the rows of all ranks: see
``oracle.py``.
"""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, parametrize, prune, rnn, \
    vector_to_parameters
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import zero
from conftest import on_ranks, warnings_of
from engine import consolidate
from oracle import LENGTH, STAGES, TOLERANCE, WIDTH, Case, Mlp, Model, Pair, assert_alike, assert_close, assert_same, \
    batches, chain, inside, mine, plain_backward, sgd, square, start, train, twins, whole


def linear(outs: int = WIDTH, ins: int = WIDTH) -> nn.Linear:
    return nn.Linear(ins, outs)


def random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 4)


# --- Modules of PyTorch's ---------------------------------------------------------------------------------------------


def transformer() -> Model:
    """Encoder and decoder as PyTorch has them, with masks of both kinds."""
    def forward(m, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -1] = True  # in evaluation the encoder packs such rows into a nested tensor
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=x.dtype)
        memory = m.encoder(x, src_key_padding_mask=padding)
        return m.decoder(x, memory[:, :LENGTH - 1], tgt_mask=causal, tgt_is_causal=True)

    layers = {"dim_feedforward": 2 * WIDTH, "dropout": 0.0, "batch_first": True}
    return Model(forward, encoder=nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 2, **layers), 2, nn.LayerNorm(WIDTH)),
        decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, **layers), 2))


def self_attention() -> Model:
    def forward(m, x):
        for block in m.blocks:
            x = x + block(x, x, x)[0]
        return x

    return Model(forward, blocks=[nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2)])


def recurrent() -> Model:
    """Recurrent layers keep a list of their weights as attributes, and pass it on as a whole."""
    def forward(m, x):
        packed = rnn.pack_padded_sequence(x, torch.tensor([LENGTH] + [2] * (len(x) - 1)), batch_first=True)
        m.gru.flatten_parameters()
        x, _ = rnn.pad_packed_sequence(m.gru(packed)[0], batch_first=True)
        x, state = m.lstm(x)[0], None
        for step in range(LENGTH):
            state = m.cell(x[:, step], state)
        return state

    return Model(forward, gru=nn.GRU(WIDTH, 5, 2, batch_first=True, bidirectional=True),
                 lstm=nn.LSTM(10, WIDTH, batch_first=True, proj_size=3), cell=nn.GRUCell(3, WIDTH))


def sparse_embeddings() -> Model:
    """Gradients that autograd gives as sparse tensors."""
    def forward(m, x):
        ids = (4 + 2 * x).long().clamp(0, 8)[..., :3]
        return m.token(ids[..., 0]) + m.bag(ids.flatten(0, 1)).view(*ids.shape[:2], WIDTH)

    return Model(forward, bag=nn.EmbeddingBag(9, WIDTH, mode="sum", sparse=True, padding_idx=0),
                 token=nn.Embedding(9, WIDTH, sparse=True))


def convolutions() -> Model:
    """Weights whose elements lie channel by channel in memory, and of every kind of convolution."""
    def forward(m, x):
        assert m.layers[0].weight.is_contiguous(memory_format=torch.channels_last)
        x = x[..., :6].reshape(len(x), 2, LENGTH, LENGTH).to(memory_format=torch.channels_last)
        return m.layers(x)

    return Model(forward, layers=nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.ConvTranspose2d(4, 2, 2, stride=2)).to(memory_format=torch.channels_last))


# --- Weights that are computed, listed or changed ---------------------------------------------------------------------


class Symmetric(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)

    def right_inverse(self, weight):
        return weight.triu()


def parametrized() -> Model:
    """Weights computed from parameters, which are used once and, cached, twice."""
    def forward(m, x):
        x = m.normed(torch.tanh(m.turning(m.symmetric(x))))
        with parametrize.cached():
            for block in m.blocks:
                x = block(block(x))
        return x

    symmetric = linear()
    parametrize.register_parametrization(symmetric, "weight", Symmetric())
    return Model(forward, symmetric=symmetric, normed=parametrizations.weight_norm(linear()),
                 turning=parametrizations.orthogonal(linear(), orthogonal_map="cayley"),
                 blocks=[nn.Sequential(parametrizations.weight_norm(linear()), nn.Tanh()) for _ in range(2)])


def spectral() -> Model:
    """Weights over their largest singular value, which each forward in training estimates better in buffers."""
    return Model(lambda m, x: m.old(torch.tanh(m.new(x))), new=parametrizations.spectral_norm(linear()),
                 old=nn.utils.spectral_norm(linear()))


def listed() -> Model:
    """Parameters in lists and dictionaries, which have no forward of their own."""
    def forward(m, x):
        for weight in m.weights:
            x = torch.tanh(x @ weight) * m.gains["first"]
        return x + m.gains["second"]

    return Model(forward, weights=nn.ParameterList([random(WIDTH, WIDTH) for _ in range(3)]),
                 gains=nn.ParameterDict({name: torch.rand(WIDTH) for name in ("first", "second", "unused")}))


def adapters() -> Model:
    """A frozen model with small trained parts beside its layers."""
    def forward(m, x):
        for block, down, up in zip(m.base, m.down, m.up):
            x = block(x) + up(down(x))
        return x

    return Model(forward, base=Mlp().requires_grad_(False).blocks, down=[linear(2) for _ in range(4)],
                 up=[linear(WIDTH, 2) for _ in range(4)])


def reader() -> Model:
    """A parent that reads a child's weight without calling the child, as tied heads are often written."""
    def forward(m, x):
        x = m.token((x > 0).sum(-1))
        return m.mix(x, x, x)[0] * m.scale.weight.sum() @ m.token.weight.t()

    return Model(forward, token=nn.Embedding(9, WIDTH), mix=nn.MultiheadAttention(WIDTH, 2, batch_first=True),
                 scale=linear())


def tables() -> Model:
    """Blocks with an input-independent part, whose backward comes after that of the input."""
    def block() -> Model:
        return Model(lambda m, x: m.inner(m.table) + m.outer(x), table=nn.Parameter(torch.randn(LENGTH, WIDTH)),
                     inner=nn.Sequential(linear(), nn.Tanh()), outer=linear())
    return Model(chain, blocks=[block() for _ in range(3)])


class Writes(Mlp):
    """Changes its weights in forward: also in the way that PyTorch does not count, after their use, and by max_norm."""

    def __init__(self):
        super().__init__(3)
        self.scale, self.first = nn.Parameter(torch.ones(WIDTH)), linear()
        self.rows = nn.Embedding(LENGTH, WIDTH, max_norm=0.5)

    def forward(self, x):
        for p in [self.scale, self.blocks[1][0].weight]:
            p.data.mul_(0.9)
        with torch.no_grad():
            self.blocks[0][0].weight.mul_(0.9)
        x = self.blocks((self.first(x) + self.rows(torch.arange(LENGTH))) * self.scale)
        with torch.no_grad():
            self.first.weight.clamp_(-0.1, 0.1)
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


def nested() -> Model:
    """Gives and takes dataclasses within dataclasses."""
    def forward(m, x):
        return m.head(Outer(Inner(m.blocks[0](x), [m.blocks[1](x)]), "text")).inner.rest[0]["loss"]

    def head(m, given):
        out = m.layer(given.inner.hidden) + given.inner.rest[0]
        return Outer(Inner(out.detach(), [{"loss": out.square().mean()}]), given.note)

    return Model(forward, blocks=Mlp(2).blocks, head=Model(head, layer=linear()))


class Loop(list):
    """Contains itself."""


@dataclass
class Unset:
    out: torch.Tensor
    rest: Loop = field(init=False)  # never set


def gives_cycles(m, x):
    loop = Loop([Unset(m.blocks(x))])
    loop.append(loop)
    return loop


def added_in_place() -> Model:
    """A linear layer's output is a view where its input has three dimensions; it's added to in place."""
    def forward(m, x):
        for block in m.blocks:
            y = block(x)
            y += x
            x = y
        return x

    return Model(forward, blocks=[nn.Sequential(linear()) for _ in range(4)])


def side_outputs() -> Model:
    """Blocks keep a side output as an attribute, as mixtures of experts their balance loss; the model keeps the sum."""
    def block(m, x):
        m.side = m.router(x).square().mean()
        return x + m.layer(torch.tanh(x))

    def forward(m, x):
        x = chain(m, x)
        m.side = sum(block.side for block in m.blocks)
        return x

    return Model(forward, blocks=[Model(block, layer=linear(), router=linear()) for _ in range(3)])


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


def views(recompute: bool = False) -> Model:
    """Every module but the last gives a view of its weight, which its parent uses."""
    def forward(m, x):
        for form, view in m.views.items():
            if recompute and form != "kept":
                given = checkpoint(view, x.shape[1], use_reentrant=False)
            else:
                given = view(x.shape[1])
            if form == "kept":
                given = view.__dict__.pop("kept")
            elif isinstance(given, (tuple, dict)):
                given = given[0] + given[1][1:x.shape[1] + 1] if isinstance(given, tuple) else given["a"][0]
            x = x + torch.tanh(given[:x.shape[1]]) if form != "whole" else x @ given
        return m.last(x)

    return Model(forward, last=nn.Linear(WIDTH, WIDTH, bias=False), views=nn.ModuleDict(
        {form: Model(view, table=nn.Parameter(torch.randn(WIDTH, WIDTH))) for form, view in VIEWS.items()}))


# --- Other ways through a model than its forward ----------------------------------------------------------------------


class Methods(Mlp):
    def __init__(self):
        super().__init__(2)
        self.scale, self.table = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.randn(2 * LENGTH, WIDTH))
        self.head = linear()

    def encode(self, x):
        return self.head(self.blocks(x * self.scale + self.table[:x.shape[1]])) @ self.head.weight


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


class Reversible(Model):
    def __init__(self):
        half = WIDTH // 2
        super().__init__(self.go, first=linear(), last=linear(), blocks=[
            Model(lambda m, x: Coupling.apply(x, m), f=linear(half, half), g=linear(half, half)) for _ in range(3)])

    @staticmethod
    def go(m, x):
        return Weighted.apply(chain(m, m.first(x)), m.last.weight, m.last) + m.last.bias

    def run(self, x):
        return self.forward(x)


# --- Losses -----------------------------------------------------------------------------------------------------------


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
    """With the norm of a gradient in it, and a Jacobian: backward differentiates twice, after another forward."""
    x = x.detach().requires_grad_()
    loss = square(model, x)
    gradient, = torch.autograd.grad(loss, x, create_graph=True)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x).sum((0, 1))[:2], x, create_graph=True)
    return loss + (gradient.norm() - 1).square() + jacobian.square().mean() + square(model, -x)


def hooked_by_the_caller(model, x):
    loss = 0
    for hooks in (save_on_cpu(), saved_tensors_hooks(lambda t: t, lambda t: t),
                  saved_tensors_hooks(lambda t: t.to(torch.bfloat16), torch.Tensor.double)):
        with hooks:
            loss = loss + square(model, x)
    return loss


# --- The table --------------------------------------------------------------------------------------------------------


CASES = {
    "transformer": Case(transformer), "self-attention": Case(self_attention),
    # Queries, keys and values of different widths, which have a weight each, with biases that are parameters.
    "cross attention": Case(lambda: Model(
        lambda m, x: m.attention(x, x[..., :3], x[..., 3:], need_weights=False)[0],
        attention=nn.MultiheadAttention(WIDTH, 2, kdim=3, vdim=5, add_bias_kv=True, batch_first=True))),
    # In evaluation without gradients each takes another path, which reads its children's weights itself.
    "encoder layers": Case(lambda: nn.Sequential(*(
        nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True) for _ in range(2)))),
    "recurrent": Case(recurrent), "sparse embeddings": Case(sparse_embeddings),
    "channels_last convolutions": Case(convolutions), "parametrized": Case(parametrized),
    "spectral norm": Case(spectral, whole=True), "parameter lists": Case(listed),
    "a weight cast into another order in memory": Case(lambda: Model(
        lambda m, x: m.layer(x).float() @ m.turned.to(torch.float32, memory_format=torch.contiguous_format),
        layer=linear(), turned=nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64).t()))),
    "complex parameters": Case(lambda: Model(
        lambda m, x: (torch.fft.fft(m.layer(x)) @ m.filters * m.phases).abs(), layer=linear(),
        filters=nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex128) / 4),
        phases=nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128)))),
    "adapters": Case(adapters), "a child's weight, read": Case(reader),
    "a residual, added in place": Case(added_in_place), "a parameter with a path of its own": Case(tables),
    "side outputs": Case(side_outputs, lambda model, x: square(model, x) + inside(model).side),
    "dataclasses": Case(nested, lambda model, x: model(x)),
    "objects": Case(lambda: Model(  # of a class that nothing is known of
        lambda m, x: chain(m, SimpleNamespace(value=x)), blocks=[
            Model(lambda m, x: SimpleNamespace(value=torch.tanh(m.layer(x.value)) * x.value), layer=linear())
            for _ in range(3)]), lambda model, x: model(x).value.square().mean()),
    "nothing returned": Case(
        lambda: Model(lambda m, x: setattr(m, "loss", m.blocks(x).square().mean()), blocks=Mlp().blocks),
        lambda model, x: inside(model).loss if model(x) is None else x),
    "a loss returned": Case(lambda: Model(lambda m, x: {"loss": m.blocks(x).square().mean()}, blocks=Mlp().blocks),
                            lambda model, x: model(x)["loss"]),
    "unset fields and cycles": Case(lambda: Model(gives_cycles, blocks=Mlp(2).blocks),
                                    lambda model, x: model(x)[0].out.square().mean()),
    "views of weights": Case(views), "views of weights, recomputed": Case(partial(views, True)),
    "written to in forward": Case(Writes, whole=True), "methods": Case(Methods, encoded),
    "reversible": Case(Reversible), "reversible, in a method": Case(Reversible, lambda m, x: m.run(x).square().mean()),
    **{name: Case(partial(Mlp, 2), loss) for name, loss in (
        ("two forwards", lambda model, x: (model(x) - model(-x)).square().mean()), ("unrolled", unrolled),
        ("penalties", penalized), ("a gradient penalty", gradient_penalized),
        ("the caller's hooks", hooked_by_the_caller))}}


@on_ranks(2, name=CASES, stage=STAGES)
def test_training_and_evaluation_equal_plain_pytorch(name, stage):
    train(CASES[name], stage)


@on_ranks(2)
def test_a_scripted_layer_belongs_to_the_unit_around_it():
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(linear(), torch.jit.script(linear())).double())
    pairs = []
    assert "1 is scripted" in "".join(warnings_of(lambda: pairs.append(Pair.of(*models, 3))))
    pairs[0].train(0)
    pairs[0].check()


# --- Buffers, hooks and inputs ----------------------------------------------------------------------------------------


def counting() -> Model:
    """Running statistics, a count that is changed in place, and a mean that is assigned."""
    def forward(m, x):
        if m.training:
            m.count += len(x)
            m.mean = 0.9 * m.mean + 0.1 * x.detach().mean((0, 1))
        return m.layers(x) + m.mean / m.count.clamp(min=1)

    return Model(forward, count=torch.zeros(()), mean=torch.zeros(WIDTH), layers=nn.Sequential(
        linear(), nn.BatchNorm1d(LENGTH), linear(),
        nn.InstanceNorm1d(LENGTH, affine=True, track_running_stats=True)))


@on_ranks(2, stage=STAGES)
def test_each_rank_keeps_the_statistics_of_its_own_rows(stage):
    """Those of a model that has the weights of all ranks, and has seen this rank's rows."""
    pair = Pair(counting, stage)
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


def put_hooks(model: nn.Module, seen: list) -> None:
    """Hooks on parameters, activations and modules, which look on or change something."""
    def look(gradient):
        seen.append(gradient.clone())

    blocks = model.blocks
    blocks[0][0].weight.register_hook(lambda gradient: gradient / 2)
    blocks[1][2].bias.register_hook(look)
    blocks[1].register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 3,))
    blocks[2].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    blocks[2][0].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    blocks[3].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    blocks[3].register_forward_hook(lambda module, args, out: out.register_hook(look) and None)
    model.register_full_backward_hook(lambda module, inputs, outputs: look(outputs[0]))


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


@on_ranks(2, stage=STAGES, kind=[Mlp, tables])
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


def choice() -> Model:
    """One of several experts, by the caller's choice."""
    return Model(lambda m, x, expert: m.last(m.experts[expert](m.first(x))), first=linear(), experts=Mlp(2).blocks,
                 last=linear())


def skipping() -> Model:
    """All layers or none, by the caller's choice."""
    return Model(lambda m, x, skip: x if skip else m.blocks(x), blocks=Mlp().blocks)


def train_by_rank(pair: Pair) -> None:
    for step in range(3):
        rows = [x.requires_grad_() for x in batches(step)]
        pair.engine.backward(pair.engine(mine(rows), dist.get_rank()).square().mean())
        pair.engine.step()
        assert mine(rows).grad is not None
        plain_backward(pair.reference(x, rank).square().mean() for rank, x in enumerate(rows))
        pair.plain_step()


@on_ranks(2, stage=range(3), kind=[choice, skipping], debug=[False, True])
def test_below_stage_3_ranks_may_use_different_layers_or_none(stage, kind, debug):
    pair = Pair(kind, stage, debug=debug)
    train_by_rank(pair)
    pair.check()


@on_ranks(2)
def test_at_stage_3_ranks_that_use_different_layers_are_all_told():
    with pytest.raises(RuntimeError, match="ranks used the units of stage 3 in different orders"):
        train_by_rank(Pair(choice, 3))


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


def crossing() -> Model:
    """Parameters alone in their buckets, whose gradients autograd gives as views of one tensor, or as conjugates."""
    def forward(m, x):
        real = m.a + m.b.view(16, WIDTH) + m.c.view(WIDTH, 16).view(16, WIDTH)
        return real.pow(3) * x.mean() + (m.d.conj() * x.sum()).imag

    return Model(forward, a=random(16, WIDTH), b=random(16 * WIDTH), c=random(4, 4 * WIDTH),
                 d=nn.Parameter(torch.randn(16, WIDTH, dtype=torch.complex128)))


@on_ranks(2, stage=STAGES)
def test_gradients_that_share_memory_are_summed_apart(stage):
    """PyTorch itself would add a second backward to all of them at once."""
    pair = Pair(crossing, stage, zero_options={"reduce_bucket_size": 16 * WIDTH})
    for step in range(3):
        pair.backward(step)
        pair.engine.step()
        parameters = list(pair.reference.parameters())
        loss = sum(square(pair.reference, x) for x in batches(step)) / dist.get_world_size()
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.grad = gradient.clone().resolve_conj()
        pair.plain_step()
        pair.check(f"step {step}")


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


def reused() -> Model:
    """Its layers are used inside and outside of a recomputed part, so a gradient comes twice in a backward."""
    return Model(lambda m, x: m.layers(checkpoint(m.layers, x.requires_grad_(), use_reentrant=True)), layers=net())


@on_ranks(2, stage=STAGES, kind=[Mlp, reused])
def test_whole_gradients_can_be_read_after_ones_own_backward(stage, kind):
    """In the middle of a window of two, at its end, and after the step; a gradient that comes late is in them."""
    pair = Pair(kind, stage, gradient_accumulation_steps=2)
    for window in range(2):
        for micro in range(2):
            rows = batches(2 * window + micro)
            square(pair.engine, mine(rows)).backward()  # the mean over the window is the engine's
            plain_backward(square(pair.reference, x) / 2 for x in rows)
            got = {name: zero.safe_get_full_grad(p) for name, p in pair.model.named_parameters()}
            expected = {name: p.grad for name, p in pair.reference.named_parameters()}
            assert_alike(got, expected, f"window {window}, micro-batch {micro}: the gradients", TOLERANCE)
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
        copied = copy.deepcopy(pair.model) if how == "deepcopy" else pickle.loads(pickle.dumps(pair.model))
    networks = [(net, sgd(net.parameters())) for net in (copied, copy.deepcopy(pair.reference))]
    for step in range(3):
        for network, optimizer in networks:
            optimizer.zero_grad()
            square(network, mine(batches(100 + step))).backward()
            optimizer.step()
        if dist.get_rank() == 0:
            square(copied, mine(batches(step)))  # alone: the copy has the engine's hooks, and they do nothing
        pair.train(step)
    assert_alike(*(dict(net.named_parameters()) for net, _ in networks), "the copy", TOLERANCE)
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


def partly_frozen() -> Mlp:
    model = Mlp()
    model.blocks[1].requires_grad_(False)
    model.blocks[3][2].bias.requires_grad_(False)
    return model


@on_ranks(2, stage=STAGES)
def test_freezing_and_thawing_between_steps(stage):
    """Blocks, in part and again, also with accumulation."""
    pair = Pair(partly_frozen, stage, gradient_accumulation_steps=2,
                zero_options={"offload_optimizer": {"device": "cpu" if stage == 2 else "none"}})
    changes = {1: ("blocks.1.2.weight", True), 2: ("blocks.1", True), 3: ("blocks.0", False), 4: ("blocks", True),
               5: ("blocks.3", False), 6: ("blocks.2", False), 7: ("blocks", True)}
    for step in range(8):
        for net in (pair.model, pair.reference) if step else ():
            name, trained = changes[step]
            (net.get_parameter(name) if name.endswith("weight") else net.get_submodule(name)).requires_grad_(trained)
        for micro in (2 * step, 2 * step + 1):
            pair.backward(micro)
            pair.engine.step()
        pair.plain(2 * step, 2 * step + 1)
        pair.check(f"step {step}")


def spoils(m, x):
    """Changes what its backward needs."""
    y = torch.sigmoid(m.blocks(x))
    z = y * y
    y.add_(1)
    return z


@on_ranks(2, stage=STAGES)
def test_a_saved_tensor_modified_in_place_is_found_at_every_stage(stage):
    pair = Pair(lambda: Model(spoils, blocks=Mlp().blocks), stage)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square(pair.reference, mine(batches(0))).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation|modified in place"):
        pair.backward(0)


@on_ranks(2)
def test_a_module_that_is_never_used_holds_no_gradients_up():
    """At stage 2 there are at most three full gradient buffers at once, from the second step on.

    The module is the last: the first one that backward would wait for.
    """
    pair, alive = Pair(lambda: Model(chain, blocks=[*Mlp(8).blocks], pooler=linear(3 * WIDTH)), 2), []
    for p in pair.model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(g.buffer is not None for g in pair.engine.zero.reducer.every)))
    for step in range(3):
        alive.clear()
        pair.train(step)
        assert step == 0 or max(alive) <= 3 < 6 < len(pair.engine.zero.trained), f"step {step}: {max(alive)}"
    pair.check()


def experts() -> Model:
    """Each rank uses layers of its own, within blocks that all ranks go through, after one that it always uses."""
    def block(m, x, picks):
        x = x + torch.tanh(m.always(x))
        for pick in picks:
            x = x + torch.tanh((m.second if pick else m.first)(x))
        return x

    def forward(m, x, picks):
        for each, chosen in zip(m.blocks, picks):
            x = each(x, chosen)
        return x

    return Model(forward, blocks=[Model(block, always=linear(), first=linear(), second=linear()) for _ in range(8)])


def of_rank(step: int, rank: int):
    """Both layers of all blocks at first; then the last block uses another on each rank, or one block none at all."""
    return [[0, 1]] * 7 + [[[0, 1], [rank], [], [0], [1 - rank]][step]]


@on_ranks(2, stage=STAGES)
def test_ranks_use_other_parameters_and_neither_wait_nor_pile_up(stage):
    """Counted where backward ends: buckets whose reductions were launched, and full gradients that wait."""
    pair = Pair(experts, stage)
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
    assert_alike(torch.load(file), pair.reference.state_dict(), "in the file", TOLERANCE)
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


def transformed(m, x, transform=None):
    return m.blocks(x) if transform is None else transform(lambda x: m.blocks(x).square().mean(), x)


@on_ranks(2)
def test_transforms_of_functions_are_refused_at_stage_3():
    model, _ = twins(lambda: Model(transformed, blocks=Mlp().blocks))
    engine, x = start(model, 3), mine(batches(0))
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


@on_ranks(2)
def test_a_returned_parameter_collects_no_hooks_and_a_lost_write_is_told():
    """The model gives back a parameter, and a view of one."""
    engine = start(Model(lambda m, x: (m.blocks(x) * m.scale, m.scale, m.table[:LENGTH]), blocks=Mlp(2).double().blocks,
                         scale=nn.Parameter(torch.ones(1)), table=nn.Parameter(torch.ones(WIDTH, WIDTH))), 3)
    for step in range(3):
        y, scale, table = engine(mine(batches(step)))
        engine.backward((y + table).square().mean())
        engine.step()
    assert not scale._backward_hooks
    with torch.no_grad():
        table.mul_(2)
    with pytest.raises(RuntimeError, match="a view of the parameter table was written to while it was sharded"):
        engine(mine(batches(0)))


# --- PyTorch's own calls on a model and an optimizer that initialize() was given: gradients that are dropped ----------


def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))


DROPS = {
    "model.zero_grad()": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "optimizer.zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "a part's zero_grad()": lambda model, optimizer: model[1].zero_grad(),
    "p.grad = None": lambda model, optimizer: setattr(model[2][0].weight, "grad", None),
    "p.grad.data.zero_()": lambda model, optimizer: model[0][0].weight.grad.data.zero_(),
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


@on_ranks(2, stage=STAGES, within=[torch.enable_grad, torch.inference_mode])
def test_what_is_dropped_right_after_thawing_does_not_train(stage, within):
    """No other part is trained then, so the engine has heard of no gradient."""
    pair = Pair(partly_frozen, stage)
    for model in (pair.model, pair.reference):
        model.requires_grad_(False)
        model.blocks[1].requires_grad_(True)
    square(pair.engine, mine(batches(0))).backward()
    with within():
        pair.engine.optimizer.zero_grad()
    pair.train(1)
    pair.check()


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
            lambda: p.grad.copy_(torch.ones(WIDTH, WIDTH)), lambda: torch._foreach_mul_([p.grad], 2.0),
            lambda: setattr(p.grad, "data", torch.ones(WIDTH, WIDTH)), p.grad.tolist, lambda: pickle.dumps(p.grad),
            lambda: clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0),
            lambda: optimizer.param_groups[0]["params"][0].sum().backward()],
    }
    for name, some in calls.items():
        for call in some:
            with pytest.raises(RuntimeError, match=name):
                call()
    assert_alike(whole(model), before)
    p.grad = torch.ones(WIDTH, WIDTH, dtype=p.dtype)
    with pytest.raises(RuntimeError, match="p.grad of 1.0.weight was set after backward"):
        engine.step()
    p.grad = None
    engine.zero_grad()
    pair.train(0)
    pair.check()
    engine.destroy()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})  # it is the caller's again, but for its pieces
    with pytest.raises(RuntimeError, match="p.grad"):
        optimizer.step()
    own = nn.Parameter(torch.ones(2))
    optimizer.param_groups = [optimizer.param_groups[-1] | {"params": [own]}]
    own.grad = torch.ones(2)
    optimizer.step()
    assert not own.eq(1).any()


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
    "assign another's data": (
        lambda model, optimizer: setattr(model[0][0].bias, "data", model[0][0].weight.data[0]),  # of the same bucket
        "0.0.bias no longer lies|data: the parameter 0.0.weight is sharded"),
    "cast": (lambda model, optimizer: (model.zero_grad(), model.half()),
             r"no longer lies where initialize\(\) put it|is sharded over 2 ranks \(stage 3\)"),
    "cast, and go on": (
        lambda model, optimizer: (model.zero_grad(), model.half()(batches(0)[0].half()).sum().backward()),
        r"no longer lies where initialize\(\) put it|is sharded over 2 ranks \(stage 3\)"),
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


@on_ranks(2, stage=range(3))
def test_nothing_gives_the_values_from_before_data_was_assigned(stage):
    pair = Pair(net, stage)
    vector_to_parameters(torch.zeros(3 * (WIDTH + 1) * WIDTH).double(), pair.model.parameters())
    for read in (pair.engine.consolidated_fp32_state_dict, lambda: whole(pair.model)):
        with pytest.raises(RuntimeError, match="0.0.weight no longer lies"):
            read()


@on_ranks(2, stage=STAGES)
def test_a_model_that_is_pruned_later_trains_and_is_saved_under_its_new_names(stage, tmp_path):
    pair = Pair(net, stage)
    for model in (pair.model, pair.reference):
        with zero.GatheredParameters(model.parameters()):
            prune.l1_unstructured(model[1][0], "weight", 0.4)
    pair.train(0)
    pair.check()
    pair.engine.save_checkpoint(tmp_path, "pruned")
    if dist.get_rank() == 0:
        assert_alike(consolidate(tmp_path / "pruned"), pair.reference.state_dict(), tolerance=TOLERANCE)


@on_ranks(2)
def test_assigning_data_inside_gathered_parameters_is_an_error():
    model, _ = twins(net)
    start(model, 3)
    with pytest.raises(RuntimeError, match="0.0.weight: p.data was assigned inside GatheredParameters"):
        with zero.GatheredParameters(model.parameters(), modifier_rank=0):
            model[0][0].weight.data = torch.ones(WIDTH, WIDTH).double()


@pytest.mark.parametrize("share", ["a parameter", "a buffer", "a part", "a view"])
def test_parameters_over_one_memory_are_refused(share):
    model = nn.ModuleDict({"emb": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    if share == "a parameter":
        model["head"].weight = nn.Parameter(model["emb"].weight.data)
    elif share == "a buffer":
        model["head"].register_buffer("table", model["emb"].weight.data[1:3])
    elif share == "a part":
        model["head"].weight = nn.Parameter(model["emb"].weight.data[2:])
    else:
        model["head"].parts = [model["emb"].weight[2:]]
    with pytest.raises(ValueError, match="emb.weight and head.* share memory|head.parts is a view"):
        start(model, 0)
    parts = torch.ones(9, 4)  # parts that don't overlap are parameters like others
    model["emb"].weight, model["head"].weight = nn.Parameter(parts[:5]), nn.Parameter(parts[5:])
    model["head"]._buffers.clear()
    vars(model["head"]).pop("parts", None)
    model["head"].settings = MagicMock(spec=Mapping, values=MagicMock(side_effect=KeyError))  # nobody asks it for values
    start(model, 0).destroy()


@pytest.mark.parametrize("make, told", [
    (lambda: torch.jit.script(nn.Linear(3, 1)), "model is a ScriptModule"),
    (lambda: nn.LazyLinear(3), "weight has no shape yet; run a lazy model once"),
    (lambda: nn.ParameterList([TwoTensor(torch.ones(2), torch.ones(2))]), "0 is a TwoTensor, whose memory"),
    ], ids=["script", "lazy", "wrapped"])
def test_models_whose_parameters_cannot_be_placed_are_refused_by_name(make, told):
    with pytest.raises(ValueError, match=told):
        start(make(), 0, make_optimizer=None)


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


def take_steps(engine, *inputs: torch.Tensor) -> None:
    for x in inputs or (torch.ones(4, WIDTH),):
        engine.backward(engine(x).sum())
        engine.step()


def largest(*parameters: nn.Parameter) -> float:
    return max(float(zero.safe_get_full_fp32_param(p).abs().max()) for p in parameters)


@on_ranks(2, stage=STAGES, options=[{}, AMP, {"zero_options": {"offload_optimizer": {"device": "cpu"}}}])
def test_what_a_script_writes_between_steps_is_not_undone_by_the_next(stage, options):
    """WGAN's clipping of weights."""
    torch.manual_seed(0)
    model = net()
    engine = start(model, stage, SGD, **options)
    for _ in range(2):
        take_steps(engine)
        with torch.no_grad(), zero.GatheredParameters(model.parameters(), modifier_rank=0 if stage == 3 else None):
            for p in model.parameters() if stage < 3 or dist.get_rank() == 0 else ():
                p.clamp_(-0.01, 0.01)
    take_steps(engine)
    assert largest(*model.parameters()) <= 0.01001


@on_ranks(2, stage=range(3))
def test_what_was_written_just_before_is_saved_and_a_state_dict_that_is_loaded_stays(stage, tmp_path):
    """With fp32 masters beside bf16 weights."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH)
    engine = start(model, stage, SGD, **AMP)
    take_steps(engine)
    with torch.no_grad():
        model.weight.fill_(0.5)
        assert torch.equal(zero.safe_get_full_fp32_param(model.weight), torch.full((WIDTH, WIDTH), 0.5))
        model.bias.fill_(0.25)
    engine.save_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path)
    assert torch.equal(zero.safe_get_full_fp32_param(model.bias), torch.full((WIDTH,), 0.25))
    model.load_state_dict({name: torch.full_like(p, 0.125) for name, p in model.state_dict().items()})
    take_steps(engine)
    assert all(bool((value == 0.125).all()) for value in whole(model).values())


@on_ranks(2, stage=STAGES)
def test_what_a_hook_writes_in_backward_stays(stage):
    pair = Pair(net, stage)

    def halve(module, *_):
        with torch.no_grad():
            module[0].weight.mul_(0.5)

    pair.model[1].register_full_backward_hook(halve)
    before = whole(pair.model)["1.0.weight"]
    pair.backward(0)
    assert_close(whole(pair.model)["1.0.weight"], before / 2, "the weight")


@on_ranks(2)
def test_what_one_rank_writes_to_a_neighbour_that_was_gathered_along_is_an_error_on_all():
    pair = Pair(net, 3)
    with torch.no_grad(), zero.GatheredParameters(pair.model[0][0].weight, modifier_rank=0):
        if dist.get_rank() == 0:
            pair.model[0][0].bias.fill_(1.0)
    pair.backward(0)
    with pytest.raises(RuntimeError, match="wrote different weights"):
        pair.engine.step()


def bounded() -> Model:
    """Forward shortens the rows that it takes, which each rank chooses."""
    return Model(lambda m, rows: m.table(rows), table=nn.Embedding(8, WIDTH, max_norm=0.1))


def odd() -> Model:
    """Forward writes a number of the rank's own into every other column."""
    def forward(m: Model, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            m.table.weight[:, 1::2] = 2.0 ** dist.get_rank()
        return m.table(rows)

    return Model(forward, table=nn.Embedding(8, WIDTH))


@on_ranks(2, stage=STAGES)
def test_weights_that_ranks_write_differently_are_an_error_on_all(stage):
    for kind, rows in ((bounded, torch.tensor([0, 6 + dist.get_rank()])), (odd, torch.arange(8))):
        engine = Pair(kind, stage).engine
        engine.backward(engine(rows).sum())
        with pytest.raises(RuntimeError if stage == 3 else ValueError, match="wrote different weights|can be a buffer"):
            engine.step()


@on_ranks(2, stage=STAGES)
def test_a_move_inside_a_window_that_changes_nothing_is_none(stage):
    pair = Pair(net, stage)
    pair.backward(0)
    pair.model.to("cpu").double()
    pair.engine.step()
    pair.plain(0)
    pair.check()


@on_ranks(2)
def test_units_are_freed_alike_after_a_backward_that_may_be_differentiated():
    """Also where the loss of one rank has no weights in it, and where no second backward comes."""
    pair = Pair(net, 3)
    x = torch.ones(2, WIDTH, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(pair.engine(x).sum(), x, create_graph=True)
    pair.engine.backward(torch.ones((), requires_grad=True) * 2 if dist.get_rank() else (gradient.norm() - 1).square())
    pair.engine.step()
    gradient, = torch.autograd.grad(pair.engine(x).sum(), x, create_graph=True)
    del gradient
    with torch.no_grad():
        pair.engine(x)
    assert {unit.state for unit in pair.engine.zero.units} == {zero.UnitState.SHARDED}


# --- Compiled ---------------------------------------------------------------------------------------------------------


def residuals() -> Model:
    return Model(chain, blocks=[Model(lambda m, x: x + torch.tanh(m.layer(x)), layer=linear()) for _ in range(2)])


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
    model, reference = twins(residuals)
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
