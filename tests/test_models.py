"""Any model, used the way people use models: under every stage it trains what plain PyTorch trains, or says why not.

    .venv/bin/python -m pytest -q tests/test_models.py

Every rank has its own rows of a batch; the reference is the same model in plain PyTorch, on the rows of all ranks.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import zero
from oracle import LENGTH, RANKS, STAGES, WIDTH, Mlp, assert_close, assert_same, batches, inside, mine, \
    plain_backward, plain_step, sgd, start, twins

# --- Models -----------------------------------------------------------------------------------------------------------


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


class SparseEmbedding(nn.Module):
    """Some of a vocabulary's rows, by the signs of the input."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Embedding(9, WIDTH, sparse=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(self.token((x > 0).sum(-1)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x, x, x)[0]
        return x


class Encoder(nn.Module):
    """In evaluation without gradients PyTorch's layer takes another path, which reads its children's weights itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
                                    for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class WeightNorm(nn.Module):
    """Weights that are computed from two parameters each."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Choice(nn.Module):
    """One of several experts, by the caller's choice."""

    def __init__(self):
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(WIDTH, WIDTH), Mlp(2).blocks, nn.Linear(WIDTH, WIDTH)

    def forward(self, x, expert):
        return self.last(self.experts[expert](self.first(x)))


def loss_of(model, x):
    """The loss, with the side output where the model keeps one."""
    loss = model(x).pow(2).mean()
    return loss + getattr(inside(model), "side", 0)


# --- Inputs that require grad -----------------------------------------------------------------------------------------


def leaf_inputs(kind, stage: int):
    """Gradients with respect to the input: from a backward of its own, and along with those of the weights."""
    model, reference = twins(kind)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    for step in range(3):
        leaves = [x.requires_grad_() for x in batches(step)]
        x = mine(batches(step)).requires_grad_()
        got, = torch.autograd.grad(engine(x).sum(), x)
        expected, = torch.autograd.grad(reference(mine(leaves)).sum(), mine(leaves))
        assert_close(got, expected, f"stage {stage}, step {step}: torch.autograd.grad of the input")
        engine.backward(loss_of(engine, x))
        plain_backward(loss_of(reference, leaf) for leaf in leaves)
        assert_close(x.grad, mine(leaves).grad * RANKS, f"stage {stage}, step {step}: the input's gradient")
        engine.step()
        plain_step(optimizer)
    assert_same(model, reference, f"stage {stage}")


@pytest.mark.parametrize("kind", [Mlp, Tables])
def test_a_leaf_input_has_its_gradient_and_the_weights_theirs(run_ranks, kind):
    for stage in STAGES:
        run_ranks(leaf_inputs, RANKS, kind, stage)


def penalized(model, x):
    """A loss with the norm of a gradient in it."""
    x = x.detach().requires_grad_()
    out = model(x).pow(2).mean()
    gradient, = torch.autograd.grad(out, x, create_graph=True)
    return out + (gradient.norm() - 1).square()


def gradient_penalty(stage: int):
    model, reference = twins(Mlp)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    for step in range(3):
        engine.backward(penalized(engine, mine(batches(step))))
        engine.step()
        plain_backward(penalized(reference, x) for x in batches(step))
        plain_step(optimizer)
    assert_same(model, reference, f"stage {stage}")


def test_a_gradient_penalty_differentiates_twice(run_ranks):
    for stage in STAGES:
        run_ranks(gradient_penalty, RANKS, stage)


# --- Loops that are not forward, backward, step -----------------------------------------------------------------------


def real_loss(critic, x):
    return critic(x).square().mean()


def gan(stage: int):
    """Two engines. The maker's backward leaves gradients in the critic, which zero_grad() must drop."""
    (maker, plain_maker), (critic, plain_critic) = twins(Mlp, 3), twins(Mlp, 4)
    make, judge = start(maker, stage), start(critic, stage)
    maker_optimizer, critic_optimizer = sgd(plain_maker.parameters()), sgd(plain_critic.parameters())
    for step in range(3):
        noise = batches(100 + step)
        judge.zero_grad()
        judge.backward(real_loss(judge, mine(batches(step))))
        judge.backward(judge(make(mine(noise)).detach()).mean())
        judge.step()
        make.zero_grad()
        make.backward((judge(make(mine(noise))) - 1).square().mean())
        make.step()

        critic_optimizer.zero_grad()
        plain_backward(real_loss(plain_critic, x) for x in batches(step))
        plain_backward(plain_critic(plain_maker(z).detach()).mean() for z in noise)
        critic_optimizer.step()
        maker_optimizer.zero_grad()
        plain_backward((plain_critic(plain_maker(z)) - 1).square().mean() for z in noise)
        maker_optimizer.step()
        assert_same(critic, plain_critic, f"stage {stage}, step {step}: critic")
        assert_same(maker, plain_maker, f"stage {stage}, step {step}: maker")


def test_a_gan_trains_with_two_engines(run_ranks):
    for stage in STAGES:
        run_ranks(gan, RANKS, stage)


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


def backward_raises(stage: int):
    """A backward that ends halfway, with some gradients sent and others not: zero_grad() forgets it all."""
    model, reference = twins(RaisesHalfway)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    for step in range(4):
        model.raises = step == 1
        loss = loss_of(engine, mine(batches(step)))
        if model.raises:
            with pytest.raises(ArithmeticError, match="raised in backward"):
                engine.backward(loss)
            engine.zero_grad()
            continue
        engine.backward(loss)
        engine.step()
        plain_backward(loss_of(reference, x) for x in batches(step))
        plain_step(optimizer)
    assert_same(model, reference, f"stage {stage}")


def test_training_goes_on_after_a_backward_that_raised(run_ranks):
    for stage in STAGES:
        run_ranks(backward_raises, RANKS, stage)


def ranks_choose(stage: int):
    """Each rank uses an expert of its own: the error, or None."""
    model, reference = twins(Choice)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    try:
        for step in range(3):
            engine.backward(engine(mine(batches(step)), dist.get_rank()).square().mean())
            engine.step()
            plain_backward(reference(x, rank).square().mean() for rank, x in enumerate(batches(step)))
            plain_step(optimizer)
    except RuntimeError as error:
        return str(error)
    assert_same(model, reference, f"stage {stage}")


def test_ranks_may_use_different_layers_below_stage_3_and_are_all_told_at_it(run_ranks):
    for stage in (0, 1, 2):
        assert run_ranks(ranks_choose, RANKS, stage) == [None] * RANKS, f"stage {stage}"
    for rank, told in enumerate(run_ranks(ranks_choose, RANKS, 3)):
        assert "ranks used the units of stage 3 in different orders" in str(told), f"rank {rank}: {told}"


def evaluate_in_between(stage: int):
    """The caller runs backward() itself, and evaluates before step()."""
    model, reference = twins(Mlp)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    for step in range(3):
        loss_of(engine, mine(batches(step))).backward()
        with torch.inference_mode():
            x = mine(batches(100 + step))
            assert_close(engine(x), reference(x), f"stage {stage}: the output in evaluation before step {step}")
        engine.step()
        plain_backward(loss_of(reference, x) for x in batches(step))
        plain_step(optimizer)
    assert_same(model, reference, f"stage {stage}")


def test_evaluation_may_come_between_ones_own_backward_and_step(run_ranks):
    for stage in STAGES:
        run_ranks(evaluate_in_between, RANKS, stage)


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


def counted_in_the_group(stage: int):
    model, reference = twins(Mlp)
    engine, optimizer = start(model, stage, Slowing), Slowing(reference.parameters())
    for step in range(3):
        engine.backward(loss_of(engine, mine(batches(step))))
        engine.step()
        plain_backward(loss_of(reference, x) for x in batches(step))
        plain_step(optimizer)
    assert_same(model, reference, f"stage {stage}")
    assert engine.optimizer.param_groups[0]["step"] == 3, f"stage {stage}"


def test_an_optimizer_that_counts_its_steps_in_a_group_is_stepped_once_per_step(run_ranks):
    for stage in STAGES:
        run_ranks(counted_in_the_group, RANKS, stage)


# --- Reading, copying and changing the model --------------------------------------------------------------------------


def gathered_around_a_backward(stage: int):
    """Forward and backward inside GatheredParameters, which must not free what is still to be read."""
    model, reference = twins(Mlp)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    with zero.GatheredParameters(model.parameters()):
        engine.backward(loss_of(engine, mine(batches(0))))
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in reference.named_parameters():
        assert_close(whole[name], p, f"stage {stage}: {name} after backward")
    engine.step()
    engine.backward(loss_of(engine, mine(batches(1))))
    engine.step()
    for step in range(2):
        plain_backward(loss_of(reference, x) for x in batches(step))
        plain_step(optimizer)
    assert_same(model, reference, f"stage {stage}")


def test_forward_and_backward_inside_gathered_parameters(run_ranks):
    for stage in STAGES:
        run_ranks(gathered_around_a_backward, RANKS, stage)


def whole_gradients(stage: int):
    """safe_get_full_grad in the middle of a window of two, at its end, and after the step."""
    model, reference = twins(Mlp)
    engine, optimizer = start(model, stage, accumulation=2), sgd(reference.parameters())
    for window in range(2):
        for micro in range(2):
            rows = batches(2 * window + micro)
            loss_of(engine, mine(rows)).backward()  # the mean over the window is the engine's
            plain_backward(loss_of(reference, x) / 2 for x in rows)
            got = {name: zero.safe_get_full_grad(p) for name, p in model.named_parameters()}
            for name, p in reference.named_parameters():
                what = f"stage {stage}, window {window}, micro-batch {micro}: the gradient of {name}"
                assert_close(got[name], p.grad, what)
            engine.step()
        plain_step(optimizer)
        for name, p in model.named_parameters():
            assert zero.safe_get_full_grad(p) is None, f"stage {stage}, window {window}: {name} after step()"
    assert_same(model, reference, f"stage {stage}")


def test_whole_gradients_can_be_read_after_ones_own_backward(run_ranks):
    for stage in STAGES:
        run_ranks(whole_gradients, RANKS, stage)


def copied_whole(stage: int):
    """A deep copy, such as a target network, trains without the engine, and the model with it."""
    model, reference = twins(Mlp)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    with zero.GatheredParameters(model.parameters()):
        copied = copy.deepcopy(model)
    alone, expected = sgd(copied.parameters()), copy.deepcopy(reference)
    expected_optimizer = sgd(expected.parameters())
    for step in range(3):
        for network, its_optimizer in ((copied, alone), (expected, expected_optimizer)):
            loss_of(network, mine(batches(100 + step))).backward()
            plain_step(its_optimizer)
        engine.backward(loss_of(engine, mine(batches(step))))
        engine.step()
        plain_backward(loss_of(reference, x) for x in batches(step))
        plain_step(optimizer)
    for (name, p), q in zip(copied.named_parameters(), expected.parameters(), strict=True):
        assert_close(p, q, f"stage {stage}: {name} of the copy")
    assert_same(model, reference, f"stage {stage}")


def test_a_deep_copy_trains_alone(run_ranks):
    for stage in STAGES:
        run_ranks(copied_whole, RANKS, stage)


def thawed(stage: int, offload: str):
    """Blocks are frozen and thawed between steps, in part and again, also with accumulation; the same as plain."""
    model, reference = twins(Mlp)
    for net in (model, reference):
        net.blocks[1].requires_grad_(False)
        net.blocks[3][2].bias.requires_grad_(False)
    engine = start(model, stage, accumulation=2, offload_optimizer={"device": offload})
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
            engine.backward(loss_of(engine, mine(batches(2 * step + part))))
            engine.step()
        plain_backward(loss_of(reference, x) / 2 for part in range(2) for x in batches(2 * step + part))
        plain_step(optimizer)
        assert_same(model, reference, f"stage {stage}, step {step}")


def test_freezing_and_thawing_between_steps(run_ranks):
    for stage in STAGES:
        run_ranks(thawed, RANKS, stage, "cpu" if stage == 2 else "none")


def halved(stage: int):
    """Whether half() went through, and the error that it or the next step gives."""
    model, _ = twins(Mlp)
    engine = start(model, stage)
    went_through = False
    try:
        model.half()
        went_through = True
        engine.backward(loss_of(engine, mine(batches(0)).half()).float())
        engine.step()
    except RuntimeError as error:
        return went_through, str(error)
    return went_through, "no error"


def test_a_cast_behind_the_engines_back_is_an_error(run_ranks):
    for stage in (0, 1, 2):
        for went_through, told in run_ranks(halved, RANKS, stage):
            assert went_through and "no longer lies where initialize() put it" in told, f"stage {stage}: {told}"
    for went_through, told in run_ranks(halved, RANKS, 3):
        assert not went_through and "is sharded over 2 ranks (stage 3)" in told, told


class Spoils(Mlp):
    """Changes what its backward needs."""

    def forward(self, x):
        y = torch.sigmoid(self.blocks(x))
        z = y * y
        y.add_(1)
        return z


def spoiled(stage: int):
    model, reference = twins(Spoils)
    engine = start(model, stage)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(reference, mine(batches(0))).backward()
    try:
        engine.backward(loss_of(engine, mine(batches(0))))
    except RuntimeError as error:
        return str(error)


def test_a_saved_tensor_modified_in_place_is_found_at_every_stage(run_ranks):
    for stage in STAGES:
        for told in run_ranks(spoiled, RANKS, stage):
            assert "modified by an inplace operation" in str(told) or "modified in place" in str(told), f"stage {stage}"


def gathered_around_steps(stage: int, modifier_rank: int | None):
    """Two whole training steps inside GatheredParameters, and then one outside."""
    model, reference = twins(Mlp)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    with zero.GatheredParameters(model.parameters(), modifier_rank=modifier_rank):
        for step in range(2):
            engine.backward(loss_of(engine, mine(batches(step))))
            engine.step()
    engine.backward(loss_of(engine, mine(batches(2))))
    engine.step()
    for step in range(3):
        plain_backward(loss_of(reference, x) for x in batches(step))
        plain_step(optimizer)
    assert_same(model, reference, f"stage {stage}, modifier_rank {modifier_rank}")


@pytest.mark.parametrize("modifier_rank", [None, 0])
def test_training_steps_inside_gathered_parameters(run_ranks, modifier_rank):
    for stage in STAGES:
        run_ranks(gathered_around_steps, RANKS, stage, modifier_rank)


class Pooler(Mlp):
    """Ends with a module that is never used: the first one that backward would wait for."""

    def __init__(self):
        super().__init__(8)
        self.pooler = nn.Linear(WIDTH, 3 * WIDTH)


def buffers_alive(stage: int):
    """The most full gradient buffers alive at once, per step, and how many buckets there are."""
    model, reference = twins(Pooler)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    alive, most = [], []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(gradients.buffer is not None for gradients in engine.zero.reducer.every)))
    for step in range(3):
        alive.clear()
        engine.backward(loss_of(engine, mine(batches(step))))
        most.append(max(alive))
        engine.step()
        plain_backward(loss_of(reference, x) for x in batches(step))
        plain_step(optimizer)
    assert_same(model, reference, f"stage {stage}")
    return most, len(engine.zero.trained)


def test_a_module_that_is_never_used_holds_no_gradients_up(run_ranks):
    for most, buckets in run_ranks(buffers_alive, RANKS, 2):
        assert buckets > 6 and max(most[1:]) <= 3, f"stage 2: {most} of {buckets} gradient buffers alive, by step"


class Picky(nn.Module):
    """A block whose call says which of its two layers it uses beside the first."""

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


def experts(stage: int):
    """By step: buckets launched within the backward, full gradients that wait at its end, and how many buckets are."""
    model, reference = twins(Experts)
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    finish, launched, held = engine.zero.finish_backward, [], []

    def look_and_finish():
        sent = [g.life in (zero.Life.SENDING, zero.Life.SENT) for g in engine.zero.reducer.every]
        launched.append(sum(sent))
        held.append(sum(g.buffer is not None and not s for g, s in zip(engine.zero.reducer.every, sent)))
        finish()

    engine.zero.finish_backward = look_and_finish
    for step in range(5):
        engine.backward(engine(mine(batches(step)), of_rank(step, dist.get_rank())).square().mean())
        engine.step()
        plain_backward(reference(x, of_rank(step, rank)).square().mean() for rank, x in enumerate(batches(step)))
        plain_step(optimizer)
    assert_same(model, reference, f"stage {stage}")
    return launched, held, len(engine.zero.trained)


def test_ranks_use_other_parameters_and_neither_wait_nor_pile_up(run_ranks):
    for stage in STAGES:
        for launched, held, buckets in run_ranks(experts, RANKS, stage):
            assert buckets >= 8 and min(launched[1:]) >= buckets - 2, f"stage {stage}: {launched} of {buckets} launched"
            assert stage < 2 or max(held) <= 2, f"stage {stage}: {held} of {buckets} full gradients wait"


def taken_inside(stage: int):
    """What GatheredParameters showed stays, whoever holds it, and goes with its holder."""
    model, reference = twins(Mlp)
    engine = start(model, stage)
    with zero.GatheredParameters(model.parameters()):
        taken = model.state_dict()
        views = [p.detach().t() for p in model.parameters()]
        array = model.blocks[0][0].weight.detach().numpy()
    file = io.BytesIO()
    torch.save(taken, file)
    file.seek(0)
    for name, value in torch.load(file).items():
        assert_close(value, reference.state_dict()[name], f"stage {stage}: {name} in the file")
    for view, p in zip(views, reference.parameters(), strict=True):
        assert_close(view.t(), p, f"stage {stage}: a view")
    assert_close(torch.from_numpy(array), reference.blocks[0][0].weight, f"stage {stage}: an array")
    for step in range(2):
        engine.backward(loss_of(engine, mine(batches(step))))
        engine.step()
        taken = views = view = array = None
    with torch.no_grad():
        engine(mine(batches(0)))
    if stage == 3:
        assert not any(bucket.has_memory for bucket in engine.zero.buckets)


def test_what_was_taken_inside_gathered_parameters_can_be_read_after_it(run_ranks):
    for stage in STAGES:
        run_ranks(taken_inside, RANKS, stage)


def pickled_whole(stage: int):
    model, reference = twins(Mlp)
    engine = start(model, stage)
    with zero.GatheredParameters(model.parameters()):
        text = pickle.dumps(model)
    copied = pickle.loads(text)
    x = mine(batches(0))
    assert_close(copied(x), reference(x), f"stage {stage}: the output of the copy")
    loss_of(copied, x).backward()
    loss_of(reference, x).backward()
    for p, q in zip(copied.parameters(), reference.parameters(), strict=True):
        assert_close(p.grad, q.grad, f"stage {stage}: a gradient of the copy")
    engine.backward(loss_of(engine, x))
    engine.step()


def test_a_whole_model_is_pickled_without_its_engine(run_ranks):
    for stage in STAGES:
        run_ranks(pickled_whole, RANKS, stage)


class Transformed(Mlp):
    def forward(self, x, transform=None):
        if transform is None:
            return self.blocks(x)
        return transform(lambda x: self.blocks(x).square().mean(), x)


def transformed():
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
    assert_close(engine(x, lambda f, x: torch.func.vmap(f)(x)), torch.stack([engine(row).square().mean() for row in x]),
                 "vmap")
    engine.backward(loss_of(engine, x))
    engine.step()


def test_transforms_of_functions_are_refused_at_stage_3(run_ranks):
    run_ranks(transformed, RANKS)


class Returning(Mlp):
    """Gives back a parameter, and views of one."""

    def __init__(self):
        super().__init__(2)
        self.scale, self.table = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(WIDTH, WIDTH))

    def forward(self, x):
        return self.blocks(x) * self.scale, self.scale, self.table[:LENGTH]


def returned_parameter():
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


def test_a_returned_parameter_collects_no_hooks_and_a_lost_write_is_told(run_ranks):
    run_ranks(returned_parameter, RANKS)


def outside_of_passes():
    """A script's own operation on a sharded parameter, and what would be written to unseen, stay errors."""
    model, _ = twins(Mlp)
    model.clip = lambda: [p.data.clamp_(-1, 1) for p in model.parameters()]
    start(model, 3)
    for touch in (model.state_dict, model.clip, lambda: model.blocks[0][0].weight + 1):
        with pytest.raises(RuntimeError, match="is sharded over 2 ranks"):
            touch()


def test_a_scripts_own_operation_on_a_sharded_parameter_is_refused(run_ranks):
    run_ranks(outside_of_passes, RANKS)
