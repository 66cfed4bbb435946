"""What people train with: each kind of model and module trains, under every stage, what plain PyTorch trains.

    .venv/bin/python -m pytest -q tests/test_zoo.py
    .venv/bin/python -m pytest -q tests/test_zoo.py --long     compiles at every stage

Models of the package ``transformers`` are tested where it is installed.

Every rank has its own rows of a batch; the reference is the same model in plain PyTorch, on the rows of all ranks. The
models are in fp64, so that equal means equal. ``oracle.py`` trains them; ``test_models.py`` has the
loops that people write, and more models.
"""

import copy
import importlib.util
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils import parametrizations, parametrize, rnn
from torch.utils.checkpoint import checkpoint

import test_models as models
import zero
from oracle import LENGTH, RANKS, STAGES, WIDTH, Case, Mlp, assert_close, assert_same, batches, inside, mine, \
    plain_backward, plain_step, sgd, square, start, train, twins


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


# --- Training ---------------------------------------------------------------------------------------------------------


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


CASES = {
    "transformer": Case(Transformer), "cross attention": Case(CrossAttention), "recurrent": Case(Recurrent),
    "sparse embeddings": Case(SparseEmbeddings), "channels_last convolutions": Case(Convolutions),
    "parametrized": Case(Parametrized), "spectral norm": Case(Spectral, whole=True),
    "parameter lists": Case(Listed), "complex parameters": Case(Complex), "adapters": Case(Adapted),
    "dataclasses": Case(Nested, lambda model, x: model(x)),
    "objects": Case(GivesObjects, lambda model, x: model(x).value.square().mean()),
    "nothing returned": Case(GivesNothing, kept_loss), "a loss returned": Case(GivesLoss, lambda m, x: m(x)["loss"]),
    "two forwards": Case(partial(Mlp, 2), twice), "unrolled": Case(partial(Mlp, 2), unrolled),
    "unset fields and cycles": Case(partial(GivesCycles, 2), lambda model, x: model(x)[0].out.square().mean()),
    "views of weights": Case(Views), "views of weights, recomputed": Case(partial(Views, True)),
    "written through .data": Case(WritesData, whole=True), "methods": Case(Methods, encoded),
    "reversible": Case(Reversibles),
    "reversible, in a method": Case(Reversibles, lambda model, x: model.run(x).square().mean()),
    "penalties": Case(partial(Mlp, 2), penalized), "the caller's hooks": Case(partial(Mlp, 2), hooked_by_the_caller),
    **{kind.__name__: Case(kind, models.loss_of) for kind in (
        models.InPlaceResidual, models.SideOutput, models.SparseEmbedding, models.Recurrent, models.Attention,
        models.Encoder, models.WeightNorm)},
}


def train_at_every_stage(name: str):
    for stage in STAGES:
        train(name, CASES[name], stage)


@pytest.mark.parametrize("name", CASES)
def test_training_and_evaluation_equal_plain_pytorch(run_ranks, name):
    run_ranks(train_at_every_stage, RANKS, name)


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


def count(stage: int):
    """Each rank's buffers are its own: those of a model that has the weights of all ranks, and has seen its rows."""
    model, reference = twins(Counting)
    shared = {id(p): p for p in reference.parameters()}
    per_rank = [copy.deepcopy(reference, dict(shared)) for _ in range(RANKS)]
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    for step in range(3):
        what = f"stage {stage}, step {step}"
        engine.backward(square(engine, mine(batches(step))))
        engine.step()
        plain_backward(square(net, x) for net, x in zip(per_rank, batches(step)))
        plain_step(optimizer)
        assert_same(model, reference, what)
        for (name, a), b in zip(model.named_buffers(), mine(per_rank).buffers(), strict=True):
            assert_close(a, b, f"{what}: the buffer {name}")
        engine.eval(), mine(per_rank).eval()
        with torch.no_grad():
            x = batches(100)[0]
            assert_close(engine(x), mine(per_rank)(x), f"{what}: the output in evaluation")
        engine.train(), mine(per_rank).train()
    engine.destroy()
    return model.mean


def test_each_rank_keeps_the_statistics_of_its_own_rows(run_ranks):
    for stage in STAGES:
        first, second = run_ranks(count, RANKS, stage)
        assert not torch.equal(first, second), f"stage {stage}: else nothing was compared"


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


def hooked(stage: int, before: bool):
    model, reference = twins(Mlp)
    seen, expected = [], []
    if before:
        put_hooks(model, seen)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    if not before:
        put_hooks(model, seen)
    put_hooks(reference, expected)
    for step in range(3):
        what = f"stage {stage}, hooks {'before' if before else 'after'} initialize(), step {step}"
        engine.backward(square(engine, mine(batches(step))))
        engine.step()
        for rank, x in enumerate(batches(step)):
            expected.clear()
            square(reference, x).backward()
            for p in reference.parameters() if rank == RANKS - 1 else ():
                p.grad /= RANKS
            if rank == dist.get_rank():
                assert len(seen) == len(expected) == 4, what
                for index, (a, b) in enumerate(zip(seen, expected)):
                    assert_close(a, b, f"{what}: what was seen, {index}")
        seen.clear()
        plain_step(optimizer)
        assert_same(model, reference, what)
    engine.destroy()


def hooked_at_every_stage():
    for stage in STAGES:
        hooked(stage, before=True)
        hooked(stage, before=False)


def test_hooks_of_ones_own_see_and_change_what_they_do_in_plain_pytorch(run_ranks):
    run_ranks(hooked_at_every_stage, RANKS)


# --- Several models ---------------------------------------------------------------------------------------------------


class Pair:
    """A model with its engine, and its equal in plain PyTorch."""

    def __init__(self, model: nn.Module, stage: int, reference: nn.Module | None = None):
        self.model, self.reference = model, reference or copy.deepcopy(model)
        self.engine, self.optimizer = start(model, stage), sgd(self.reference.parameters())

    def train(self, step: int, what: str):
        self.engine.backward(square(self.engine, mine(batches(step))))
        self.engine.step()
        plain_backward(square(self.reference, x) for x in batches(step))
        plain_step(self.optimizer)
        assert_same(self.model, self.reference, f"{what}, step {step}")


def copies(stage: int):
    """A copy from before initialize() and one from after a step get engines of their own."""
    model, _ = twins(Mlp, 2)
    early = copy.deepcopy(model)
    first, second = Pair(model, stage), Pair(early, stage)
    first.train(0, f"stage {stage}: the original")
    late = copy.deepcopy(model)
    assert_same(model, first.reference, f"stage {stage}: the copied model")
    third = Pair(late, stage, copy.deepcopy(first.reference))
    for offset, (what, pair) in enumerate({"early copy": second, "late copy": third, "original": first}.items()):
        for step in range(1, 3):
            pair.train(step + 10 * offset, f"stage {stage}: the {what}")
    for pair in (first, second, third):
        pair.engine.destroy()


def copies_at_every_stage():
    for stage in STAGES:
        copies(stage)


def test_copies_from_before_and_after_initialize_train_apart(run_ranks):
    run_ranks(copies_at_every_stage, RANKS)


def chained(stages: tuple[int, int]):
    """Two engines, at stages of their own, through which one loss goes; then each has a step alone."""
    made = [Pair(twins(Mlp, blocks)[0], stage) for blocks, stage in zip((2, 1), stages)]
    first, second = made
    for step in range(2):
        loss = second.engine(first.engine(mine(batches(step)))).square().mean()
        second.engine.backward(loss)
        plain_backward(second.reference(first.reference(x)).square().mean() for x in batches(step))
        for pair in made:
            pair.engine.step()
            plain_step(pair.optimizer)
        for what, pair in zip(("first", "second"), made):
            assert_same(pair.model, pair.reference, f"stages {stages}, step {step}: the {what} model")
            pair.train(10 + step, f"stages {stages}: the {what} model")
    for pair in made:
        pair.engine.destroy()


def chained_at_mixed_stages():
    for stages in ((0, 3), (3, 1), (2, 3)):
        chained(stages)


def test_one_loss_trains_two_engines_at_stages_of_their_own(run_ranks):
    run_ranks(chained_at_mixed_stages, RANKS)


# --- Other ways to differentiate, and none ----------------------------------------------------------------------------


class Skipping(Mlp):
    """All layers or none, by the caller's choice."""

    def forward(self, x, skip):
        return x if skip else self.blocks(x)


def nothing_on_the_path(stage: int):
    """Rank 1's loss depends on its input alone."""
    model, reference = twins(Skipping)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    for step in range(3):
        x = mine(batches(step)).requires_grad_()
        engine.backward(engine(x, skip=dist.get_rank() == 1).square().mean())
        engine.step()
        plain_backward([reference(batches(step)[0], skip=False).square().mean()])
        plain_step(optimizer)
        assert x.grad is not None
    assert_same(model, reference, f"stage {stage}")
    engine.destroy()


def test_below_stage_3_a_rank_may_use_no_parameter_at_all(run_ranks):
    for stage in (0, 1, 2):  # at stage 3 ranks have to go through the blocks in the same order
        run_ranks(nothing_on_the_path, RANKS, stage)


def differentiated(stage: int):
    """torch.autograd.grad with respect to parameters, which leaves the training step around it alone."""
    model, _ = twins(Mlp, 2)
    pair, x = Pair(model, stage), mine(batches(100))
    for step in range(2):
        with zero.GatheredParameters(model.parameters()):
            gradients = torch.autograd.grad(square(pair.engine, x), list(model.parameters()))
        expected = torch.autograd.grad(square(pair.reference, x), list(pair.reference.parameters()))
        for (name, _), a, b in zip(model.named_parameters(), gradients, expected, strict=True):
            assert_close(a, b, f"stage {stage}, step {step}: the gradient of {name}")
        pair.train(step, f"stage {stage}")
    pair.engine.destroy()


def test_gradients_of_gathered_parameters_can_be_taken_by_autograd_grad(run_ranks):
    for stage in STAGES:
        run_ranks(differentiated, RANKS, stage)


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


def compiled(stage: int, how: str, backend: str):
    """Compiled by whom and when ``how`` says; the backends need no compiler of another language."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, reference = twins(Blocks)
    given = torch.compile(model, backend=backend) if how == "a model around the model" else model
    if how == "in place":
        model.compile(backend=backend)
    for block in model.blocks if how == "block by block" else ():
        block.compile(backend=backend)
    engine, optimizer = start(given, stage), sgd(reference.parameters())
    if how == "by the engine":
        engine.compile(backend=backend)
    for step in range(3):
        engine.backward(square(engine, mine(batches(step))))
        engine.step()
        plain_backward(square(reference, x) for x in batches(step))
        plain_step(optimizer)
        assert_same(model, reference, f"{how}, stage {stage}, step {step}")
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, f"{how}, stage {stage}: nothing was compiled"
    engine.destroy()


@pytest.mark.parametrize("how", ["a model around the model", "in place", "block by block", "by the engine"])
def test_compiled_models_train_the_same(run_ranks, pytestconfig, how):
    if pytestconfig.getoption("--long"):
        chosen = [(stage, backend) for stage in STAGES for backend in ("eager", "aot_eager")]
    elif how == "a model around the model":
        chosen = [(1, "eager")]
    else:
        pytest.skip("compiling takes a while; --long does it")
    for stage, backend in chosen:
        run_ranks(compiled, RANKS, stage, how, backend)


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


def hugging_face(name: str, sharded: bool, recomputed: dict | None):
    """At every stage; perhaps built straight into shards, and with its own switch for recomputation."""
    for stage in STAGES:
        reference = make_hugging_face(name)
        with zero.Init(enabled=sharded):
            model = make_hugging_face(name)
        if recomputed is not None:
            model.gradient_checkpointing_enable(**recomputed)
        engine, optimizer = start(model, stage), sgd(reference.parameters())
        for step in range(3):
            ids = torch.randint(0, 17, (RANKS, 2, 6), generator=torch.Generator().manual_seed(step))
            engine.backward(engine(input_ids=mine(ids), labels=mine(ids)).loss)
            engine.step()
            plain_backward(reference(input_ids=of_rank, labels=of_rank).loss for of_rank in ids)
            plain_step(optimizer)
            for (parameter, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
                difference = float((zero.safe_get_full_fp32_param(p) - q.detach()).abs().max())
                assert difference < 1e-6, f"{name}, stage {stage}, step {step}: {parameter} differs by {difference:.3g}"
        written = [net.eval().generate(torch.tensor([[1, 2]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
                   for net in (engine.module, reference)]
        assert torch.equal(*written), f"{name}, stage {stage}: generation"
        engine.destroy()


@pytest.mark.parametrize("name, sharded, recomputed", [
    ("GPT2", False, None), ("GPT2", True, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ("Llama", True, None), ("Llama", False, {})])
def test_hugging_face_models_train_and_generate_the_same(run_ranks, name, sharded, recomputed):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    run_ranks(hugging_face, RANKS, name, sharded, recomputed)
