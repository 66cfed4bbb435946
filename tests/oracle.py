"""One oracle: a model in plain PyTorch on the rows of all ranks, and the same through the engine on each rank's own.

Both are in fp64, so that equal means equal. ``Pair`` has the parts, for tests that write a loop of their own; ``train``
is the usual loop.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import engine as deepspeed
import zero

STAGES = range(4)
WIDTH, ROWS, LENGTH = 8, 2, 3  # a batch of one rank is (ROWS, LENGTH, WIDTH)
BUCKET = 150                   # elements: every model below has several buckets
TOLERANCE = 1e-10


def twins(kind: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model in fp64 and its equal, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().double()
    return model, copy.deepcopy(model)


def sgd(parameters: Iterable) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def start(model: nn.Module, stage: int, make_optimizer: Any = sgd, zero_options: dict | None = None,
          **options: Any) -> deepspeed.Engine:
    """An engine that clips nothing; ``options`` are keys of the config."""
    return deepspeed.initialize(model=model, optimizer=make_optimizer, config={
        "train_micro_batch_size_per_gpu": ROWS, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, **(zero_options or {})}, **options})[0]


def batches(step: int) -> list[Tensor]:
    """The rows of every rank."""
    generator = torch.Generator().manual_seed(step)
    return list(torch.randn(dist.get_world_size(), ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64))


def mine(of_all_ranks: Any) -> Any:
    return of_all_ranks[dist.get_rank()]


def plain_backward(losses: Iterable[Tensor]) -> None:
    """Backward on the mean over ranks."""
    for loss in losses:
        (loss / dist.get_world_size()).backward()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights, at any stage."""
    return {name: zero.safe_get_full_fp32_param(p) for name, p in model.named_parameters()}


def assert_same(model: nn.Module, reference: nn.Module, what: str = "", tolerance: float = TOLERANCE) -> None:
    """The weights of the engine's model and of the reference."""
    weights = whole(model)
    for name, expected in reference.named_parameters():
        assert_close(weights[name], expected, f"{what}: {name}", tolerance)


def assert_close(got: Tensor | None, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert got is not None, f"{what}: None, plain PyTorch has a tensor"
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, plain PyTorch {tuple(expected.shape)}"
    difference = float((got.detach() - expected.detach()).abs().max()) if got.numel() else 0.0
    assert difference <= tolerance, f"{what}: largest difference {difference:.3g}"


class Mlp(nn.Module):
    """Blocks, of which each is a unit of stage 3."""

    def __init__(self, blocks: int = 4):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
                                      for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def inside(model: nn.Module) -> nn.Module:
    """The model itself, of an engine too."""
    return model.module if isinstance(model, deepspeed.Engine) else model


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


class Pair:
    """A model with its engine, and its equal in plain PyTorch."""

    def __init__(self, kind: Callable[[], nn.Module], stage: int, make_optimizer: Any = sgd, **options: Any) -> None:
        self.model, self.reference = twins(kind)
        self._start(stage, make_optimizer, options)

    @classmethod
    def of(cls, model: nn.Module, reference: nn.Module, stage: int, **options: Any) -> "Pair":
        """Of two models that are there already."""
        pair = cls.__new__(cls)
        pair.model, pair.reference = model, reference
        pair._start(stage, sgd, options)
        return pair

    def _start(self, stage: int, make_optimizer: Any, options: dict) -> None:
        self.engine = start(self.model, stage, make_optimizer, **options)
        self.optimizer = make_optimizer(self.reference.parameters())
        self.clip, self.norm = options.get("gradient_clipping", 0.0) or float("inf"), 0.0

    def backward(self, step: int, loss: Callable = square) -> None:
        """The engine's backward, on this rank's rows."""
        self.engine.backward(loss(self.engine, mine(batches(step))))

    def plain(self, *steps: int, loss: Callable = square) -> None:
        """A step of plain PyTorch, on the mean of some micro-batches of all ranks."""
        for step in steps:
            plain_backward(loss(self.reference, x) / len(steps) for x in batches(step))
        self.plain_step()

    def plain_step(self) -> None:
        """Clip, step, and drop the gradients, whose norm was ``norm``."""
        self.norm = float(nn.utils.clip_grad_norm_(self.reference.parameters(), self.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, *steps: int, loss: Callable = square) -> None:
        """A step of each, of as many micro-batches as the engine accumulates."""
        for step in steps:
            self.backward(step, loss)
            self.engine.step()
        self.plain(*steps, loss=loss)

    def check(self, what: str = "", tolerance: float = TOLERANCE) -> None:
        """The weights are the same."""
        assert_same(self.model, self.reference, what, tolerance)


# --- Three steps ------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A model, made by ``kind``, and how it is trained."""
    kind: Callable
    loss: Callable = square
    whole: bool = False  # the reference takes all rows at once: what a forward changes must not see them in parts


def train(case: Case, stage: int) -> None:
    """Three steps, and an evaluation after each, with the engine and with plain PyTorch."""
    pair = Pair(case.kind, stage)
    engine, reference = pair.engine, pair.reference
    for part in reference.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            part.sparse = False  # SGD with momentum takes no sparse gradients
    for step in range(3):
        pair.backward(step, case.loss)
        engine.step()
        rows = batches(step)
        plain_backward([case.loss(reference, torch.cat(rows)) * len(rows)] if case.whole else
                       [case.loss(reference, x) for x in rows])
        pair.plain_step()
        engine.eval(), reference.eval()
        with torch.no_grad():
            x = mine(batches(100 + step))
            assert_close(case.loss(engine, x), case.loss(reference, x), f"step {step}: the loss in evaluation")
            out, expected = engine(x), reference(x)
            if isinstance(expected, Tensor):
                assert_close(out, expected, f"step {step}: the output in evaluation")
        engine.train(), reference.train()
    pair.check()
    for (buffer, a), b in zip(pair.model.named_buffers(), reference.buffers(), strict=True):
        assert_close(a, b, f"the buffer {buffer}")
