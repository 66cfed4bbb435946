"""One oracle: a model in plain PyTorch on the rows of all ranks, and the same through the engine on each rank's own.

Both are in fp64, so that equal means equal. The parts are for tests that write a loop of their own; ``train`` is the
usual one.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import engine as deepspeed
import zero

RANKS, STAGES = 2, range(4)
WIDTH, ROWS, LENGTH = 8, 2, 3  # a batch of one rank is (ROWS, LENGTH, WIDTH)
BUCKET = 150                   # elements: every model below has several buckets
TOLERANCE = 1e-10


def twins(kind, *arguments):
    """A model in fp64 and its equal, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(*arguments).double()
    return model, copy.deepcopy(model)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def start(model: nn.Module, stage: int, make_optimizer=sgd, accumulation: int = 1, **options):
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer, config={
        "train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, **options}})
    return engine


def batches(step: int):
    """The rows of every rank."""
    generator = torch.Generator().manual_seed(step)
    return list(torch.randn(RANKS, ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64))


def mine(of_all_ranks):
    return of_all_ranks[dist.get_rank()]


def plain_backward(losses):
    """Backward on the mean over ranks."""
    for loss in losses:
        (loss / RANKS).backward()


def plain_step(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def assert_same(model: nn.Module, reference: nn.Module, what: str):
    """The weights of the engine's model and of the reference."""
    whole = {name: zero.safe_get_full_fp32_param(p) for name, p in model.named_parameters()}
    for name, expected in reference.named_parameters():
        assert_close(whole[name], expected, f"{what}: {name}")


def assert_close(got, expected, what: str):
    assert got is not None, f"{what}: None, plain PyTorch has a tensor"
    difference = float((got.detach() - expected.detach()).abs().max())
    assert difference <= TOLERANCE, f"{what}: largest difference {difference:.3g}"


class Mlp(nn.Module):
    """Blocks, of which each is a unit of stage 3."""

    def __init__(self, blocks: int = 4):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
                                      for _ in range(blocks)))

    def forward(self, x):
        return self.blocks(x)


# --- Three steps ------------------------------------------------------------------------------------------------------


def inside(model: nn.Module) -> nn.Module:
    """The model itself, of an engine too."""
    return model.module if isinstance(model, deepspeed.Engine) else model


def square(model, x):
    return model(x).square().mean()


class Case(NamedTuple):
    """A model, made by ``kind``, and how it is trained."""
    kind: Callable
    loss: Callable = square
    whole: bool = False  # the reference takes all rows at once: what a forward changes must not see them in parts


def train(name: str, case: Case, stage: int) -> None:
    """Three steps, and an evaluation after each, with the engine and with plain PyTorch."""
    model, reference = twins(case.kind)
    for part in reference.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            part.sparse = False  # SGD with momentum takes no sparse gradients
    engine, optimizer = start(model, stage), sgd(reference.parameters())
    for step in range(3):
        what = f"{name}, stage {stage}, step {step}"
        engine.backward(case.loss(engine, mine(batches(step))))
        engine.step()
        rows = batches(step)
        plain_backward([case.loss(reference, torch.cat(rows)) * RANKS] if case.whole else
                       [case.loss(reference, x) for x in rows])
        plain_step(optimizer)
        engine.eval(), reference.eval()
        with torch.no_grad():
            x = mine(batches(100 + step))
            assert_close(case.loss(engine, x), case.loss(reference, x), f"{what}: the loss in evaluation")
            out, expected = engine(x), reference(x)
            if isinstance(expected, torch.Tensor):
                assert_close(out, expected, f"{what}: the output in evaluation")
        engine.train(), reference.train()
    assert_same(model, reference, what)
    for (buffer, a), b in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert_close(a, b, f"{what}: the buffer {buffer}")
    engine.destroy()
