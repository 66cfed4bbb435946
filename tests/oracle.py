"""One oracle: a model in plain PyTorch on the rows of all ranks, and the same through the engine on each rank's own.

Both are in fp64, so that equal means equal. ``Pair`` has the parts, for tests that write a loop of their own; ``train``
is the usual loop. ``draws`` gives models, optimizers and configs; ``plain`` and ``sharded`` train them. ``Wire`` and
``held`` measure what a rank sends and holds, for the tests by which exercises are graded.
"""

import copy
import ctypes
import gc
import itertools
import mmap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    assert_alike(whole(model), dict(reference.named_parameters()), what, tolerance)


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], what: str = "", tolerance: float = 0.0,
                 but: Iterable = ()) -> None:
    """The same names, and the same numbers, to the last bit unless a tolerance is given."""
    assert found.keys() == expected.keys(), f"{what}: not in both: {found.keys() ^ expected.keys()}"
    for name in found.keys() - set(but):
        assert_close(found[name], expected[name], f"{what}: {name}", tolerance)


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


class Model(nn.Module):
    """Parts by name (a list of them is a ModuleList, a tensor a buffer), and what forward does with them."""

    def __init__(self, body: Callable, **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, nn.ModuleList(part) if isinstance(part, list) else part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def chain(model: nn.Module, x: Any) -> Any:
    """Through all blocks, one after another."""
    for block in model.blocks:
        x = block(x)
    return x


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
    assert_alike(dict(pair.model.named_buffers()), dict(reference.named_buffers()), "the buffers", TOLERANCE)


# --- Drawn models, which are awkward in all ways ----------------------------------------------------------------------


BATCH, SIZE = 12, 6  # rows, divisible by every ranks * accumulation that is drawn; width


@dataclass
class Answer:
    """A model's output that no container of PyTorch's knows."""
    value: Tensor
    extra: dict


class Block(nn.Module):
    """Two layers and a residual, with an odd parameter or two."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(SIZE), nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)
        if odd:
            self.turned = nn.Parameter(torch.randn(3, SIZE).t())  # not contiguous
            self.gain = nn.Parameter(torch.ones(()))              # one element, no dimension
            self.nothing = nn.Parameter(torch.ones(0, SIZE))      # no element at all
            self.side = nn.Linear(SIZE, SIZE)                     # used in some steps, on some ranks
        self.odd = odd

    def forward(self, x: Tensor, side: bool) -> Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        if self.odd:
            x = x * self.gain + (x @ self.turned).mean() + (x @ self.nothing.t()).sum()
        return x + self.side(x) if self.odd and side else x


class Net(nn.Module):
    """Blocks between an embedding and a head; what ``draw`` names is in it."""

    def __init__(self, draw: dict, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token, self.head = nn.Embedding(7, SIZE), nn.Linear(SIZE, 7, bias=False)
            self.blocks = nn.ModuleList(Block(draw["odd"]) for _ in range(draw["layers"]))
            self.never = nn.Linear(2, 2)
        if draw["tied"]:
            self.head.weight = self.token.weight
        if draw["frozen"]:
            self.blocks[0].requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.draw = draw
        self.to(draw["dtype"])
        if draw["mixed"]:
            self.never.to(torch.float16)

    def forward(self, ids: Tensor, side: bool = False) -> Any:
        self.seen += 1
        x = self.token(ids)
        for block in [*self.blocks, *self.blocks[:self.draw["twice"]]]:
            x = block(x, side)
        logits = self.head(x)
        return {"tensor": logits, "tuple": (x, logits), "dict": {"a": {"logits": logits}},
                "dataclass": Answer(logits, {"x": x})}[self.draw["output"]]


def drawn_loss(model: nn.Module, draw: dict, step: int, part: int, rank: int, ranks: int) -> Tensor:
    """Of one micro-batch of a rank."""
    generator = torch.Generator().manual_seed(step)
    ids, targets = (torch.randint(0, 7, (BATCH, 4), generator=generator).chunk(ranks)[rank].chunk(
        draw["accumulation"])[part] for _ in range(2))
    side = step % 2 == 1 and (rank == 0 or not draw["uneven"])  # in which steps, for whose rows the layer is used
    output = model(ids, side=side)
    while not isinstance(output, Tensor):
        output = output[-1] if isinstance(output, tuple) else output.value if isinstance(output, Answer) else \
            next(iter(output.values()))
    return nn.functional.cross_entropy(output.flatten(0, 1).double(), targets.flatten())


def drawn_optimizer(draw: dict, model: nn.Module) -> torch.optim.Optimizer:
    """One of PyTorch's; of two param groups with their own rate and decay, or one."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() < 2], "lr": 0.003},
              {"params": [p for p in parameters if p.dim() >= 2]}] if draw["groups"] else parameters
    return getattr(torch.optim, draw["optimizer"])(groups, **draw["params"])


def plain(draw: dict, ranks: int, optimizer_of: Callable = drawn_optimizer, steps: int = 5) -> tuple[list, dict, dict]:
    """Plain PyTorch on whole batches: the norms, the weights and the optimizer's state, by name."""
    model, norms = Net(draw), []
    optimizer = optimizer_of(draw, model)
    for step in range(steps):
        for rank in range(ranks):
            for part in range(draw["accumulation"]):
                loss = drawn_loss(model, draw, step, part, rank, ranks)
                (loss / draw["accumulation"] / ranks).backward()
        used = [p for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.stack([p.grad.double().norm() for p in used]))))
        for p in used if draw["clip"] else ():
            p.grad.mul_(min(1.0, draw["clip"] / (norms[-1] + 1e-6)))
        optimizer.step()
        model.zero_grad()
    state = {name: {key: torch.as_tensor(value).clone() for key, value in optimizer.state.get(p, {}).items()
                    if key in draw["state"] and p.requires_grad}
             for name, p in model.named_parameters()} if draw["state"] else {}
    return norms, {name: p.detach().clone() for name, p in model.named_parameters()}, state


def start_drawn(draw: dict, stage: int, optimizer_of: Callable = drawn_optimizer) -> deepspeed.Engine:
    """Ranks start from different weights: rank 0's must win. An ``optimizer_of`` that is a dict is the config's."""
    model, by_name = Net(draw, seed=dist.get_rank()), isinstance(optimizer_of, dict)
    return deepspeed.initialize(model=model, optimizer=None if by_name else optimizer_of(draw, model), config={
        "train_batch_size": BATCH, "gradient_accumulation_steps": draw["accumulation"],
        "gradient_clipping": draw["clip"], **({"optimizer": optimizer_of} if by_name else {}), **draw.get("more", {}),
        "zero_optimization": {"stage": stage, "reduce_bucket_size": draw["bucket"], "overlap_comm": draw["overlap"],
                              "stage3_param_persistence_threshold": draw["threshold"], **draw.get("offload", {})}})[0]


def train_drawn(engine: deepspeed.Engine, draw: dict, steps: int = 5) -> list[float]:
    """The norm of each step."""
    norms = []
    for step in range(steps):
        for part in range(draw["accumulation"]):
            loss = drawn_loss(engine, draw, step, part, dist.get_rank(), dist.get_world_size())
            if draw["split_loss"]:  # several backward calls per micro-batch
                engine.backward(0.25 * loss, retain_graph=True)
                loss = 0.75 * loss
            engine.backward(loss)
            engine.step()
        norms.append(engine.get_global_grad_norm())
    return norms


def read_drawn(engine: deepspeed.Engine, draw: dict) -> tuple[dict, dict]:
    """Weights, and of every third parameter the optimizer's state: reading takes longer than training."""
    state: dict = {}
    for name, p in list(engine.module.named_parameters())[::3] if draw["state"] else ():
        state[name] = {}
        for key in draw["state"] if p.requires_grad else ():
            try:
                state[name][key] = zero.safe_get_full_optimizer_state(p, key)
            except ValueError as error:  # never used, so it has no state
                assert "has no optimizer state" in str(error)
    return whole(engine.module), state


def sharded(draw: dict, stage: int, optimizer_of: Callable = drawn_optimizer, steps: int = 5) -> tuple:
    """What ``plain`` gives, through the engine."""
    engine = start_drawn(draw, stage, optimizer_of)
    found = train_drawn(engine, draw, steps), *read_drawn(engine, draw)
    engine.destroy()
    return found


def assert_equal(mine: tuple, reference: tuple, tolerance: float, what: str) -> None:
    """Norms, weights and state, by step and by name."""
    (norms, weights, state), (their_norms, their_weights, their_state) = mine, reference
    for step, (a, b) in enumerate(zip(norms, their_norms, strict=True)):
        assert abs(a - b) <= tolerance * max(1.0, b), f"{what}, step {step}: norm {a!r}, plain PyTorch {b!r}"
    pairs = [(name, weights[name], value) for name, value in their_weights.items()]
    for name in state:
        if their_weights[name].numel():
            assert state[name].keys() == their_state[name].keys(), f"{what}: the optimizer's state for {name}"
            pairs += [(f"{key} of {name}", value, their_state[name][key]) for key, value in state[name].items()]
    for name, a, b in pairs:
        assert_close(a, b, f"{what}: {name}", tolerance * max(1.0, float(b.abs().max())) if b.numel() else 0.0)


PLAIN = {"layers": 3, "odd": False, "tied": False, "frozen": False, "mixed": False, "twice": False, "uneven": False,
         "split_loss": False, "output": "tensor", "groups": False, "accumulation": 1, "clip": 1.0, "bucket": 200,
         "overlap": True, "threshold": 0, "dtype": torch.float32, "optimizer": "AdamW",
         "params": {"lr": 0.01, "fused": True}, "state": ["exp_avg"]}
# Where an optimizer divides by a gradient's size, eps keeps it from blowing rounding errors of tiny gradients up.
OPTIMIZERS = [
    ("SGD", {"lr": 0.1, "momentum": 0.9}, ["momentum_buffer"]), ("SGD", {"lr": 0.1, "fused": True}, []),
    ("Adam", {"lr": 0.01, "amsgrad": True, "eps": 1e-3}, ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"]),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}, ["exp_avg", "exp_avg_sq", "step"]),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3, "fused": True}, ["exp_avg", "exp_avg_sq", "step"]),
    ("Adagrad", {"lr": 0.05, "initial_accumulator_value": 0.1}, ["sum", "step"]),
    ("RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True, "eps": 0.01},
     ["square_avg", "grad_avg", "momentum_buffer", "step"]),
    ("Adadelta", {"lr": 0.5}, ["square_avg", "acc_delta"]), ("NAdam", {"lr": 0.01, "eps": 1e-3}, ["exp_avg"]),
    ("ASGD", {"lr": 0.01}, ["ax", "eta"])]


@st.composite
def draws(draw: Callable) -> dict:
    """A model, an optimizer, and how they are trained."""
    name, params, state = draw(st.sampled_from(OPTIMIZERS))
    chosen = {key: draw(st.booleans()) for key, value in PLAIN.items() if isinstance(value, bool)}
    chosen |= {"optimizer": name, "params": params, "state": state, **draw(st.fixed_dictionaries({
        "layers": st.integers(1, 3), "output": st.sampled_from(["tensor", "tuple", "dict", "dataclass"]),
        "accumulation": st.sampled_from([1, 1, 2, 3]), "clip": st.sampled_from([0.0, 0.1, 1.0]),
        "bucket": st.sampled_from(["auto", 1, 100, 500]), "threshold": st.sampled_from([0, 0, 20]),
        "dtype": st.sampled_from([torch.float64, torch.float32])}))}
    # Centered RMSprop subtracts squares that are nearly equal, and SGD without clipping may diverge: either makes
    # float32's rounding errors large.
    if "centered" in params or name == "SGD" and not chosen["clip"]:
        chosen["dtype"] = torch.float64
    return chosen


def fitting(draw: dict, ranks: int) -> dict:
    """The draw, with as many micro-batches as so many ranks can have."""
    return draw | {"accumulation": 1 if BATCH % (ranks * draw["accumulation"]) else draw["accumulation"]}


# --- What a rank really sends and holds, whatever it calls ------------------------------------------------------------


CPU = torch.device("cpu")
PATIENCE = timedelta(seconds=20)  # for another rank that should not wait; only an answer that does takes so long
TURNS = itertools.count()


class Wire(TorchDispatchMode):
    """Counts what this rank sends. Whichever function is called, it ends in operations that a mode sees.

    elements   of 4 bytes that were sent, by the count of zero.py's table
    log        gets the name of each collective or message; ``times`` is when each began, in seconds
    delay      seconds before each
    """

    def __init__(self, log: list[str] | None = None, delay: float = 0.0):
        super().__init__()
        self.elements, self.log, self.delay = 0, [] if log is None else log, delay
        self.times: list[float] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = operation.overloadpacket.__name__.replace("_", "")
        if operation.namespace in ("c10d", "_c10d_functional") and not name.startswith(("recv", "wait", "wrap")):
            largest = max((sum(t.nbytes for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args),
                          default=0) // 4  # by bytes: a view in another dtype has fewer elements
            ranks = dist.get_world_size()
            times = 2 if name.startswith("allreduce") else 1
            self.elements += largest if name == "send" else times * largest * (ranks - 1) // ranks
            self.log.append(name)
            self.times.append(time.perf_counter())
            time.sleep(self.delay)
        return operation(*args, **(kwargs or {}))


def storages() -> dict[int, Tensor]:
    """A tensor for each storage that lives in this process."""
    gc.collect()
    found = {}
    with torch._C.DisableTorchFunctionSubclass():
        for thing in [o for o in gc.get_objects() if issubclass(type(o), Tensor)]:
            if type(thing).__name__ != "TakenGradient" and thing.device == CPU:
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None and type(tensor).__name__ != "TakenGradient":
                        found[tensor.untyped_storage()._cdata] = tensor.detach()
    return found


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost").split()]


def living() -> int:
    """Bytes that this process has in use, whoever holds them: tensors, graphs, lists, NumPy, mappings, globals."""
    tensors, allocator = storages().values(), ctypes.CDLL(None)
    if not hasattr(allocator, "mallinfo2"):  # of glibc alone; elsewhere tensors must do
        return bytes_of(tensors)
    allocator.mallinfo2.restype = _Mallinfo
    told = allocator.mallinfo2()
    mapped = {id(thing): len(thing) for holder in gc.get_objects() for thing in gc.get_referents(holder)
              if type(thing) is mmap.mmap and not thing.closed}
    return told.uordblks + told.hblkhd + sum(mapped.values()) + bytes_of(
        t for t in tensors if t.untyped_storage().is_shared())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def held(before: int) -> int:
    """Bytes in use that were not when ``living`` was ``before``."""
    return living() - before


@contextmanager
def after_rank_0() -> Iterator[bool]:
    """Rank 1 enters when rank 0 has left, and learns whether that was soon: whether rank 0 did not wait for it."""
    if dist.get_world_size() == 1:
        yield True
        return
    key, store, soon = f"rank 0 has left {next(TURNS)}", dist.distributed_c10d._get_default_store(), True
    if dist.get_rank() == 1:
        try:
            store.wait([key], PATIENCE)
        except RuntimeError:
            soon = False
    yield soon
    if dist.get_rank() == 0:
        store.set(key, "")
