"""The grader, and those of its tests that belong to no other file.

    .venv/bin/python -m pytest -q tests/test_grade.py
    .venv/bin/python -m pytest -q tests/test_grade.py --long     every answer below through the whole grader

The first half are tests of this project by which exercises are graded. The second half tests the grader: it has to
pass the project's own code, and answers that were written by following its hints; and to fail the classic mistakes.
"""

import ast
import copy
import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import checkpointing
import engine as deepspeed
import grade
import test_amp
import test_zero
import zero
from test_checkpointing import peak

CPU = torch.device("cpu")


# --- A checkpointed function ------------------------------------------------------------------------------------------


def stretch(x: torch.Tensor, weight: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Several activations, dropout, and an argument by name."""
    return F.dropout(torch.tanh(x @ weight), 0.5).sin().exp() * scale


def outer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A region with a region inside."""
    return checkpointing.checkpoint(stretch, stretch(x, weight), weight, scale=0.5).cos()


def stack(run: Callable, function: Callable, weight: torch.Tensor, layers: int = 6) -> list[Any]:
    """A result, its gradients and the random state after ``layers`` calls."""
    torch.manual_seed(3)
    weight.grad = None
    x = start = torch.rand(32, weight.shape[0]).requires_grad_()
    for _ in range(layers):
        x = run(function, x, weight)
    x.sum().backward()
    return [x.detach(), start.grad, weight.grad, torch.get_rng_state()]


def plainly(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def test_a_checkpointed_function_equals_plain_autograd():
    weight = torch.randn(32, 32, requires_grad=True)
    for function in (stretch, outer):
        expected = stack(plainly, function, weight)
        results = stack(checkpointing.checkpoint, function, weight)
        for what, a, b in zip(("result", "input's gradient", "weight's gradient", "random state"), results, expected):
            assert torch.equal(a, b), f"{what} of {function.__name__} is off by {(a - b).abs().max()}"


def test_a_checkpointed_function_trains_its_parameters_where_no_input_needs_a_gradient():
    layer = nn.Linear(4, 4)
    expected, = torch.autograd.grad(layer(torch.ones(2, 4)).tanh().sum(), layer.weight)
    checkpointing.checkpoint(lambda x: layer(x).tanh(), torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None, "the weight has no gradient"
    assert torch.equal(layer.weight.grad, expected)


def test_a_checkpointed_function_keeps_its_inputs_only():
    weight = torch.randn(64, 64, requires_grad=True)
    without = peak(lambda: stack(plainly, stretch, weight, layers=12))
    held = peak(lambda: stack(checkpointing.checkpoint, stretch, weight, layers=12))
    assert held < 0.6 * without, f"{held / without:.0%} of the memory without recomputation"


def test_a_checkpointed_function_does_nothing_without_grad_mode():
    calls = []
    with torch.no_grad():
        y = checkpointing.checkpoint(lambda x: calls.append(1) or x.exp(), torch.ones(2, requires_grad=True))
    assert not y.requires_grad and calls == [1]


# --- Collectives ------------------------------------------------------------------------------------------------------


def slices_of_a_sum(add: bool):
    """What a reduce-scatter of (rank + 1) times 0, 1, 2, ... leaves on this rank."""
    communicator = zero.Communicator(CPU)
    ranks, size = dist.get_world_size(), 64
    out = torch.ones(size)
    flat = torch.arange(ranks * size, dtype=torch.float32) * (dist.get_rank() + 1)
    communicator.reduce_scatter(flat, out, add).wait()
    return out


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_reduce_scatter_gives_each_rank_its_slice_of_the_sum(run_ranks, world_size):
    total = torch.arange(world_size * 64.0) * sum(range(1, world_size + 1))
    for add in (False, True):
        for rank, out in enumerate(run_ranks(slices_of_a_sum, world_size, add)):
            assert torch.equal(out, total.chunk(world_size)[rank] + add), f"rank {rank} of {world_size}, add {add}"


def elements_through_torch(run: Callable[[], Any]) -> tuple[int, Any]:
    """Elements that this rank hands to torch.distributed while ``run()`` runs, by the table's count; its result."""
    sent: Counter[str] = Counter()
    share = (dist.get_world_size() - 1) / dist.get_world_size()
    # Per function: the argument whose elements count, and how often each crosses the wire.
    counted = {"isend": (0, 1), "send": (0, 1), "all_reduce": (0, 2 * share), "all_gather_single": (0, share),
               "all_gather_into_tensor": (0, share), "reduce_scatter_single": (1, share),
               "reduce_scatter_tensor": (1, share)}

    def count(name: str, original: Callable) -> Callable:
        place, times = counted[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            sent[name] += int(args[place].numel() * times)
            return original(*args, **kwargs)

        return call

    replaced = {name: count(name, getattr(dist, name)) for name in counted if hasattr(dist, name)}
    with mock.patch.multiple(dist, **replaced):
        result = run()
    return sent.total(), result


def sent_and_counted(stage: int):
    sent, engine = elements_through_torch(lambda: test_zero.train_wide(stage))
    return sent, sum(record.elements for record in engine.zero.communicator.traffic.values())


def test_what_is_counted_is_what_is_sent(run_ranks):
    for stage in (0, 1, 2):
        for sent, counted in run_ranks(sent_and_counted, 2, stage):
            assert sent == counted, f"stage {stage}: {sent} elements went out, and {counted} were counted"


def another_order(stage: int):
    """The largest error of the weights after two steps in which each rank goes through the layers in its own order."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    reference = copy.deepcopy(model)

    def run(layers: nn.ModuleList, rank: int, step: int) -> torch.Tensor:
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2 * step + rank))
        for index in (range(4), (2, 0, 3, 1))[rank]:
            x = layers[index](x).tanh()
        return x.square().mean()

    model.forward = lambda step: run(model, dist.get_rank(), step)
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.0, "zero_optimization": {
            "stage": stage, "reduce_bucket_size": 1}, "optimizer": {"type": "SGD", "params": {"lr": 1.0}}})
    optimizer = torch.optim.SGD(reference.parameters(), lr=1.0)
    for step in range(2):
        engine.backward(engine(step))
        engine.step()
        for rank in range(2):
            (run(reference, rank, step) / 2).backward()
        optimizer.step(), optimizer.zero_grad()
    return max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), reference.parameters()))


def test_gradients_that_come_in_another_order_on_each_rank(run_ranks):
    for stage in (0, 1, 2):
        for rank, error in enumerate(run_ranks(another_order, 2, stage)):
            assert error < 1e-6, f"stage {stage}, rank {rank}: weights are off by {error:.3g}"


# --- Stage 1 without the engine ---------------------------------------------------------------------------------------


def by_hand(width: int, accumulation: int, clip: float, steps: int = 3):
    """Steps with ``zero.Zero`` alone: norms, the weights' errors against plain PyTorch, state bytes, elements sent."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    torch.manual_seed(rank)  # ranks start from different weights: rank 0's must win
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    settings = {"lr": 0.01, "eps": 1e-3}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    theirs = torch.optim.AdamW(reference.parameters(), **settings)
    mine = zero.Zero(model, optimizer, zero.ZeroConfig(stage=1), CPU)
    errors, norms, sent = [], [], 0
    for step in range(steps):
        x = torch.randn(accumulation, ranks, 2, width, generator=torch.Generator().manual_seed(step))

        def ours() -> Any:
            for micro in range(accumulation):
                mine.boundary = micro == accumulation - 1
                (model(x[micro, rank]).square().mean() / accumulation).backward()
                mine.finish_backward()
            return mine.step(clip=clip, divisor=ranks)

        sent, result = elements_through_torch(ours)
        reference(x.flatten(0, 2)).square().mean().backward()
        norm = float(nn.utils.clip_grad_norm_(reference.parameters(), clip or 1e9))
        theirs.step(), theirs.zero_grad()
        norms.append((result.norm, norm))
        pairs = zip(model.parameters(), reference.parameters())
        errors.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
    state = sum(t.untyped_storage().nbytes() for entry in optimizer.state.values() for t in entry.values()
                if isinstance(t, torch.Tensor) and t.dim())
    return norms, errors, state, sent, sum(p.numel() for p in model.parameters())


def assert_plain(results: list) -> None:
    for rank, (norms, errors, *_) in enumerate(results):
        for step, ((norm, expected), error) in enumerate(zip(norms, errors)):
            assert abs(norm - expected) < 1e-5, f"rank {rank}, step {step}: norm {norm}, plain PyTorch {expected}"
            assert error < 1e-5, f"rank {rank}, step {step}: weights are off by {error:.3g}"


def test_stage_1_by_hand_equals_plain_pytorch(run_ranks):
    for world_size, clip in ((2, 0.0), (2, 0.1), (3, 0.1)):
        assert_plain(run_ranks(by_hand, world_size, 7, 1, clip))


def test_stage_1_by_hand_accumulates(run_ranks):
    assert_plain(run_ranks(by_hand, 2, 7, 3, 0.1))
    (*_, once, _), (*_, window, _) = run_ranks(by_hand, 2, 7, 1, 0.1)[0], run_ranks(by_hand, 2, 7, 3, 0.1)[0]
    assert window == once, f"{window} elements for a window of 3 micro-batches, {once} for one micro-batch"


def test_stage_1_by_hand_shards_the_optimizer(run_ranks):
    for rank, (*_, state, _, count) in enumerate(run_ranks(by_hand, 2, 100, 1, 0.0)):
        per_parameter = state / count
        assert per_parameter < 1.05 * 8 / 2, \
            f"rank {rank} of 2 holds {per_parameter:.2f} bytes of optimizer state per parameter; 4 are its half"


def test_stage_1_by_hand_sends_as_much_as_an_all_reduce(run_ranks):
    for rank, (*_, sent, count) in enumerate(run_ranks(by_hand, 2, 100, 1, 0.0)):
        assert sent < 1.05 * 2 * count / 2, \
            f"rank {rank} of 2 sent {sent / count:.2f} elements per parameter; 1 is an all-reduce's"


# --- Answers ----------------------------------------------------------------------------------------------------------

SCHEDULE = '''
from schedulers import *

class WarmupLR(Schedule):
    def __init__(self, optimizer, warmup_min_lr=0.0, warmup_max_lr=None, warmup_num_steps=1000, warmup_type="log",
                 last_batch_iteration=-1):
        if warmup_max_lr is None:
            warmup_max_lr = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.low, self.high = _range(optimizer, "warmup_min_lr", warmup_min_lr, "warmup_max_lr", warmup_max_lr)
        self.steps, self.type = max(2, warmup_num_steps), warmup_type
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, t, group):
        k = max(t - 1, 0)
        up = k / self.steps if self.type == "linear" else math.log(k + 1) / math.log(self.steps)
        return self.low[group] + (self.high[group] - self.low[group]) * min(1.0, up)
'''

SCALER = '''
class DynamicLossScaler(LossScaler):
    def __init__(self, scale, window, hysteresis, consecutive, minimum):
        super().__init__(scale)
        self.window, self.hysteresis, self.consecutive, self.minimum = window, hysteresis, consecutive, minimum
        self.left, self.good = hysteresis, 0

    def update(self, overflow, culprit=None):
        if overflow:
            self.good = 0
            if self.left > 1:
                self.left -= 1
            elif self.scale <= self.minimum:
                raise MinimumLossScaleError(f"the gradient of {culprit} is not finite. Use bf16")
            else:
                self.scale = max(self.minimum, self.scale / 2)
        else:
            if self.good and self.good % self.window == 0:
                self.scale *= 2
                self.left = self.hysteresis
            if self.consecutive:
                self.left = self.hysteresis
            self.good += 1

    def state_dict(self):
        return {"scale": self.scale, "left": self.left, "good": self.good}
'''

PATH = '''
class Precision:
    def path(self, parameter):
        given = parameter.dtype
        if not parameter.is_floating_point():
            return Dtypes(given, given, given, given)
        compute = master = given
        if self.half:
            compute = torch.float32 if id(parameter) in self.kept else self.half
            small = self.config.fp16.fp16_master_weights_and_grads or self.config.bf16.bf16_master_weights_and_grads
            master = compute if small else torch.float32
        gradient = self.config.data_types.grad_accum_dtype or master
        low = self.config.torch_autocast.dtype if id(parameter) in self.low else None
        return Dtypes(compute, master, gradient, self.config.communication_data_type or low or gradient)
'''

CHECKPOINT = '''
import torch
from torch.utils._pytree import tree_map
from checkpointing import *

def checkpoint(function, *args, **kwargs):
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    state, slots, found = torch.get_rng_state(), [], {}

    def pack(tensor):
        slots.append(None)
        return len(slots) - 1

    def unpack(slot):
        if slot not in found:
            recompute()
        return found.pop(slot)

    def recompute():
        tensors = []
        again = tree_map(lambda a: a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a,
                         (args, kwargs))
        keep = saved_tensors_hooks(lambda tensor: tensors.append(tensor.detach()), lambda nothing: nothing)
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), keep:
            torch.set_rng_state(state)
            function(*again[0], **again[1])
        found.update(enumerate(tensors))

    with saved_tensors_hooks(pack, unpack):
        return function(*args, **kwargs)
'''

REDUCE_SCATTER = '''
class Communicator:
    def reduce_scatter(self, flat, out, add, what=str):
        parts = {self.rank: self.shard_of(flat)}
        works = []
        if self.world_size > 1:
            self._begin("reduce-scatter", flat, 1, what)
            tag = self._tag("reduce-scatter")
        for other in self._others():
            parts[other] = torch.empty_like(parts[self.rank])
            works.append(dist.irecv(parts[other], other, tag=tag))
            works.append(dist.isend(self.shard_of(flat, other), other, tag=tag))
        return Handle(self, works, lambda: _sum([parts[rank] for rank in sorted(parts)], out, add))
'''

ALL_REDUCE_INSTEAD = '''
class Communicator:
    def reduce_scatter(self, flat, out, add, what=str):
        return self.all_reduce(flat, "reduce-scatter", lambda: _sum([self.shard_of(flat)], out, add), what)
'''

BUCKETS = '''
class Communicator:
    def all_reduce(self, tensor, kind="all-reduce", finish=None, what=str):
        if self.world_size == 1:
            return Handle(self, finish=finish)
        self._begin(kind, tensor, 2, what)
        return Handle(self, [dist.all_reduce(tensor, group=self._reductions, async_op=True)], finish)

class Gradients:
    def take(self, slot, gradient):
        self.used.add(slot)
        self.arrived.add(slot)
        if self.life in (Life.SENDING, Life.SENT):
            self.late[slot] = gradient if slot not in self.late else self.late[slot] + gradient
            return
        self._prepare_buffer()
        place = slot.view(self.buffer)
        place.add_(gradient) if slot in self.filled else place.copy_(gradient)
        self.filled.add(slot)

class Reducer:
    def launch_ready(self):
        if self.zero.config.overlap_comm and self.reduces_now:
            while self.queue and self.queue[0].complete:
                self.launch(self.queue.popleft())
'''

AS_THEY_COME = '''
            for gradients in [gradients for gradients in self.queue if gradients.complete]:
                self.queue.remove(gradients)
                self.launch(gradients)
'''

STAGE_1 = '''
import torch

class Zero:
    @torch.no_grad()
    def __init__(self, model, optimizer, config, device):
        self.optimizer, self.communicator = optimizer, Communicator(device)
        self.parameters = list(model.parameters())
        count, ranks = sum(p.numel() for p in self.parameters), self.communicator.world_size
        self.flat = torch.zeros(-(-count // ranks) * ranks)
        for p, place in zip(self.parameters, self.places(self.flat)):
            place.copy_(p)
            p.data = place
        self.communicator.broadcast(self.flat, 0)
        self.mine = nn.Parameter(self.communicator.shard_of(self.flat))
        optimizer.param_groups[0]["params"] = [self.mine]

    def places(self, flat):
        start = 0
        for p in self.parameters:
            yield flat[start:start + p.numel()].view(p.shape)
            start += p.numel()

    def finish_backward(self):
        pass

    @torch.no_grad()
    def step(self, clip=0.0, divisor=1.0):
        gradients, shard = torch.zeros_like(self.flat), torch.empty_like(self.mine)
        for p, place in zip(self.parameters, self.places(gradients)):
            place.copy_(p.grad)
            p.grad = None
        self.communicator.reduce_scatter(gradients, shard, add=False).wait()
        shard /= divisor
        square = shard.square().sum().view(1)
        self.communicator.all_reduce(square).wait()
        norm = float(square) ** 0.5
        coefficient = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        self.mine.grad = shard * coefficient
        self.optimizer.step()
        self.communicator.all_gather(self.flat).wait()
        return StepResult(norm, coefficient, False, None)
'''

STAGE_3 = '''
class Bucket:
    def start_gather(self):
        self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        self.communicator.shard_of(self.flat).copy_(self.shard)
        self.gather = self.communicator.all_gather(self.flat, self.label)

    def free(self):
        self.gather.wait()
        self.flat.untyped_storage().resize_(0)

class Unit:
    def start_gather(self):
        self.state = UnitState.GATHERING
        for bucket in self.buckets:
            bucket.start_gather()

    def finish_gather(self):
        self.state = UnitState.WHOLE
        for bucket in self.buckets:
            bucket.gather.wait()
            for slot in bucket.slots:
                slot.parameter.__class__ = slot.kind

    def free(self):
        self.state = UnitState.SHARDED
        for bucket in self.buckets:
            bucket.free()
            for slot in bucket.slots:
                slot.parameter.__class__ = ShardedParameter

    def acquire(self, user):
        self.users.add(user)
        if self.state is UnitState.SHARDED:
            self.start_gather()
        if self.state is UnitState.GATHERING:
            self.finish_gather()

    def release(self, user):
        self.users.discard(user)
        if not self.users and self.state is not UnitState.SHARDED:
            self.free()
'''

RIGHT = {"schedulers:WarmupLR": SCHEDULE, "amp:DynamicLossScaler": SCALER, "amp:Precision.path": PATH,
         "checkpointing:checkpoint": CHECKPOINT, "zero:reduce_scatter": REDUCE_SCATTER,
         "zero:bucketed_all_reduce": BUCKETS, "zero:stage_1": STAGE_1, "zero:stage_3": STAGE_3}


def changed(text: str, before: str, after: str) -> str:
    assert before in text
    return text.replace(before, after)


NOT_SHARDED = changed(changed(changed(
    STAGE_1, "nn.Parameter(self.communicator.shard_of(self.flat))", "nn.Parameter(self.flat)"),
    "reduce_scatter(gradients, shard, add=False).wait()",
    "all_reduce(gradients, finish=lambda: shard.copy_(gradients)).wait()"),
    "        self.communicator.all_reduce(square).wait()\n", "")
NOT_SHARDED = changed(NOT_SHARDED, "        self.communicator.all_gather(self.flat).wait()\n", "")

# The classic mistakes: the exercise, the answer, and what the grader asks where it fails.
WRONG = {
    "a schedule one step off": (
        "schedulers:WarmupLR", changed(SCHEDULE, "max(t - 1, 0)", "t"), "the same rates as DeepSpeed, at every step"),
    "a loss scale that never grows": (
        "amp:DynamicLossScaler", changed(SCALER, "self.scale *= 2", "pass"),
        "the scale after any history is DeepSpeed's, to the last bit"),
    "master weights in half precision": (
        "amp:Precision.path", changed(PATH, "compute if small else torch.float32", "compute"),
        "masters are the weights as they were before rounding"),
    "recomputation without the random state": (
        "checkpointing:checkpoint", changed(CHECKPOINT, "            torch.set_rng_state(state)\n", ""),
        "results, gradients and random state of plain autograd, with dropout and nested"),
    "a checkpoint that keeps everything": (
        "checkpointing:checkpoint",
        CHECKPOINT[:CHECKPOINT.index("    if not")] + "    return function(*args, **kwargs)\n",
        "memory of the inputs alone"),
    "an all-reduce in place of a reduce-scatter": (
        "zero:reduce_scatter", ALL_REDUCE_INSTEAD, "half the elements of an all-reduce are sent"),
    "buckets that go out as they come": (
        "zero:bucketed_all_reduce", BUCKETS[:BUCKETS.index("            while")] + AS_THEY_COME,
        "gradients may come in another order on each rank"),
    "gradients summed and not averaged": (
        "zero:stage_1", changed(STAGE_1, "        shard /= divisor\n", ""),
        "training equals plain PyTorch on the whole batch, with clipping"),
    "an optimizer that is not sharded": (
        "zero:stage_1", NOT_SHARDED, "the optimizer's state is really sharded"),
    "units that are never freed": (
        "zero:stage_3", STAGE_3[:STAGE_3.index("        self.users.discard")] + "        self.users.discard(user)\n",
        "only the unit in use and the next one are whole"),
}


# --- The mistakes, found on the spot ----------------------------------------------------------------------------------


def with_answer(name: str, text: str, function: Callable, *args: Any) -> Any:
    """``function(*args)`` with an answer in place of the module's own definitions, in this process."""
    exercise = grade.EXERCISES[name]
    namespace = vars(importlib.import_module(exercise.module))
    before = dict(namespace)
    methods = [part.split(".") for part in exercise.parts if "." in part]
    originals = [(before[owner], method, vars(before[owner])[method]) for owner, method in methods]
    try:
        exec(grade.splice(exercise, text, "answer.py"), namespace)
        return function(*args)
    finally:
        for key in namespace.keys() - before.keys():
            del namespace[key]
        namespace.update(before)
        for owner, method, original in originals:
            setattr(owner, method, original)


class Swapped:
    """``run_ranks`` with an answer in place on every rank."""

    def __init__(self, run_ranks: Callable, name: str, text: str):
        self.run_ranks, self.name, self.text = run_ranks, name, text

    def __call__(self, function: Callable, world_size: int, *args: Any) -> list[Any]:
        return self.run_ranks(with_answer, world_size, self.name, self.text, function, *args)


# One test that finds the mistake, given a run_ranks. The schedule's goes through the whole grader, below.
DECISIVE: dict[str, Callable] = {
    "a loss scale that never grows": lambda run: test_amp.test_the_scale_is_deepspeeds_to_the_last_bit(
        test_amp.TRACES[0]),
    "master weights in half precision": lambda run:
        test_amp.test_masters_are_the_weights_as_they_were_before_rounding(run, "bf16"),
    "recomputation without the random state": lambda run: test_a_checkpointed_function_equals_plain_autograd(),
    "a checkpoint that keeps everything": lambda run: test_a_checkpointed_function_keeps_its_inputs_only(),
    "an all-reduce in place of a reduce-scatter": lambda run:
        test_zero.test_elements_sent_are_those_of_the_table(run, 2, 1),
    "buckets that go out as they come": test_gradients_that_come_in_another_order_on_each_rank,
    "gradients summed and not averaged": test_stage_1_by_hand_equals_plain_pytorch,
    "an optimizer that is not sharded": test_stage_1_by_hand_shards_the_optimizer,
    "units that are never freed": test_zero.test_stage_3_holds_the_unit_in_use_and_the_next_one_only,
}


@pytest.mark.parametrize("mistake", DECISIVE)
def test_a_classic_mistake_is_found_and_an_answer_by_the_hints_is_right(run_ranks, mistake):
    name, text, _ = WRONG[mistake]
    with_answer(name, RIGHT[name], DECISIVE[mistake], Swapped(run_ranks, name, RIGHT[name]))
    with pytest.raises(AssertionError):
        with_answer(name, text, DECISIVE[mistake], Swapped(run_ranks, name, text))


def test_every_mistake_has_its_test():
    assert {name for name, _, _ in WRONG.values()} == set(RIGHT) == set(grade.EXERCISES)
    assert WRONG.keys() - DECISIVE.keys() == {"a schedule one step off"}
    for name, _, asks in WRONG.values():
        assert asks in [check.asks for check in grade.EXERCISES[name].checks]


# --- The whole grader -------------------------------------------------------------------------------------------------


def graded(tmp_path: Path, capsys: pytest.CaptureFixture, target: str, text: str, *options: str) -> tuple[int, str]:
    """The exit status of the command line, and what it printed."""
    path = tmp_path / "my.py"
    path.write_text(text)
    capsys.readouterr()
    status = grade.main([target, str(path), *options])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def failed_checks(printed: str) -> list[str]:
    return [line[4:].strip() for line in printed.splitlines() if line.startswith("FAIL")]


def test_a_schedule_one_step_off_fails_with_the_reason_and_the_difference(tmp_path, capsys, request):
    if not request.config.getoption("--long"):
        pytest.skip("grades for real, in processes of its own; --long runs it")
    name, text, asks = WRONG["a schedule one step off"]
    status, printed = graded(tmp_path, capsys, name, text)
    assert status == 1 and failed_checks(printed) == [asks], printed
    assert "Why it matters: One step off at the start" in printed and "AssertionError: step 1, group 0: rate" in printed
    assert "pass      each param group ends at its own rate" in printed and "2 of 3 pass" in printed
    assert f"A hint: python tutorials/grade.py {name} --hint 1" in printed


@pytest.mark.parametrize("text, told", [
    ("def checkpoint(function:\n", "my.py does not import: line 1: "),
    ("def chekpoint(function): return function()\n", "my.py lacks checkpoint; a file that has it: python"),
    ("def checkpoint(function, *args):\n    ...\n", "checkpoint is still empty; a hint: python"),
])
def test_files_that_cannot_be_graded_are_told_at_once(tmp_path, capsys, text, told):
    status, printed = graded(tmp_path, capsys, "checkpointing:checkpoint", text)
    assert status == 2 and told in printed
    for module, lacking in (("amp", "Precision"), ("checkpointing", "CheckpointingConfig")):
        status, printed = graded(tmp_path, capsys, module, "def cast(value, dtype): pass")
        assert status == 2 and f"lacks names of {module}.py that engine.py uses: " in printed and lacking in printed


@pytest.mark.parametrize("text, status, told", [
    ("import torhc\n" + SCHEDULE, 2, "my.py: it does not import: ModuleNotFoundError: No module named 'torhc'"),
    (SCHEDULE.replace("k = max", "while True:\n            pass\n        k = max"), 1, "it hangs"),
])
def test_files_that_do_not_import_or_hang_are_told(request, tmp_path, capsys, text, status, told):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    got, printed = graded(tmp_path, capsys, "schedulers:WarmupLR", text, "--slow", "15")
    assert got == status and told in printed, printed


def own_code(name: str) -> str:
    """The project's own definitions, as an answer."""
    exercise = grade.EXERCISES[name]
    text = (grade.ROOT / f"{exercise.module}.py").read_text()
    found = grade.definitions(ast.parse(text))
    if exercise.anew or "." not in exercise.parts[0]:
        return "\n".join(ast.unparse(found[owner]) for owner in exercise.owners)
    return "\n".join(f"class {owner}:\n" + "\n".join(
        "\n".join(" " * 4 + line for line in ast.unparse(found[part]).splitlines())
        for part in exercise.parts if part.startswith(f"{owner}.")) for owner in exercise.owners)


@pytest.mark.parametrize("whose", ["own", "by the hints"])
@pytest.mark.parametrize("name", grade.EXERCISES)
def test_right_answers_pass(request, tmp_path, capsys, name, whose):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    status, printed = graded(tmp_path, capsys, name, own_code(name) if whose == "own" else RIGHT[name])
    assert status == 0 and printed.endswith("Well done.\n"), printed


@pytest.mark.parametrize("mistake", WRONG)
def test_classic_mistakes_fail_where_they_should(request, tmp_path, capsys, mistake):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    name, text, asks = WRONG[mistake]
    status, printed = graded(tmp_path, capsys, name, text)
    assert status == 1 and asks in failed_checks(printed), printed


@pytest.mark.parametrize("module", ["schedulers", "amp"])
def test_a_whole_module_is_graded_by_its_tests(request, tmp_path, capsys, module):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    status, printed = graded(tmp_path, capsys, module, (grade.ROOT / f"{module}.py").read_text())
    assert status == 0 and "pass      " in printed, printed


@pytest.mark.parametrize("name", grade.EXERCISES)
def test_a_starting_file_has_every_part_and_no_body(tmp_path, capsys, name):
    assert grade.main(["--start", name]) == 0
    text = capsys.readouterr().out
    found, exercise = grade.definitions(ast.parse(text)), grade.EXERCISES[name]
    assert set(exercise.parts) <= set(found)
    (tmp_path / "my.py").write_text(text)
    with pytest.raises(grade.AnswerError, match="is still empty"):
        grade.read_answer(tmp_path / "my.py", exercise)
    compile(grade.put_over(exercise, text, "my.py"), "module", "exec")


def test_the_tests_that_exercises_name_exist():
    there = {f"{path.name}::{name}" for path in Path(__file__).parent.glob("test_*.py")
             for name in grade.definitions(ast.parse(path.read_text()))}
    for exercise in grade.EXERCISES.values():
        for check in exercise.checks:
            assert {test.partition("[")[0] for test in check.tests} <= there, check.asks


def test_hints_come_one_by_one(capsys):
    for upto in (1, 3):
        assert grade.main(["zero:stage_1", "--hint", str(upto)]) == 0
        assert capsys.readouterr().out.count("Hint ") == upto
    assert grade.main(["--list"]) == 0 and "zero:stage_3" in capsys.readouterr().out
    for wrong, told in ((["zero:stage_4", "my.py"], "the exercise is 'zero:stage_4'; allowed: schedulers:WarmupLR"),
                        (["zero:stage_1", "--hint", "4"], "--hint is 4; allowed: 1 to 3"),
                        (["zero:stage_1"], "FILE is missing")):
        with pytest.raises(SystemExit):
            grade.main(wrong)
        assert told in capsys.readouterr().err


def test_ranks_that_wait_for_a_failed_one_are_not_a_hang():
    waited = "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer"
    assert grade._hangs("--- no answer from rank [0, 1] of 2") and grade._hangs(f"--- rank 0:\n{waited}")
    mixed = f"--- rank 0 of 2:\n{waited}\n--- rank 1 of 2:\nNameError: name 'x' is not defined\n--- no answer from 2"
    assert not grade._hangs(mixed) and grade.essence(mixed) == "NameError: name 'x' is not defined"
