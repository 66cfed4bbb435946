"""Answers to the exercises: RIGHT ones, in several styles, and what makes them WRONG, with the test that finds it.

The first right answer to an exercise follows the hints; for steps.py it is that file. The others are texts, or changes
of the first: pairs of what is replaced and by what. Wrong ones are changes of the first, too.
"""

import re

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
    autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

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
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), keep, torch.autocast("cpu", *autocast):
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
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        place.add_(gradient) if slot in self.filled else place.copy_(gradient)
        self.filled.add(slot)

class Reducer:
    def launch_ready(self):
        if self.zero.config.overlap_comm and self.reduces_now:
            while self.queue and self.queue[0].complete:
                self.launch(self.queue.popleft())
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
        self.parts = list(self.parts_of(self.communicator.shard_of(self.flat)))
        self.pieces = [nn.Parameter(part) for _, part in self.parts]
        optimizer.param_groups[0]["params"] = self.pieces

    def places(self, flat):
        start = 0
        for p in self.parameters:
            yield flat[start:start + p.numel()].view(p.shape)
            start += p.numel()

    def parts_of(self, shard):
        start = -self.communicator.rank * shard.numel()
        for number, p in enumerate(self.parameters):
            part = shard[max(start, 0):max(start + p.numel(), 0)]
            start += p.numel()
            if part.numel():
                yield number, part

    def finish_backward(self):
        pass

    @torch.no_grad()
    def step(self, clip=0.0, divisor=1.0, skip_overflow=True):
        gradients = torch.zeros_like(self.flat)
        shard = self.communicator.shard_of(gradients)
        message = torch.tensor([0.0] + [float(p.grad is not None) for p in self.parameters])
        for p, place in zip(self.parameters, self.places(gradients)):
            if p.grad is not None:
                place.copy_(p.grad)
                p.grad = None
        self.communicator.reduce_scatter(gradients, shard, add=False).wait()
        shard /= divisor
        message[0] = shard.square().sum()
        self.communicator.all_reduce(message).wait()
        square, *used = message.tolist()
        norm = square ** 0.5
        coefficient = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        if skip_overflow and not math.isfinite(norm):
            return StepResult(norm, coefficient, True, None)
        for (number, part), piece in zip(self.parts_of(shard), self.pieces):
            piece.grad = part * coefficient if used[number] else None
        self.optimizer.step()
        for piece in self.pieces:
            piece.grad = None
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

# What is replaced again and again.
SCATTER = "self.communicator.reduce_scatter(gradients, shard, add=False).wait()"
GATHER = "self.communicator.all_gather(self.flat).wait()"
PIECES = 'optimizer.param_groups[0]["params"] = self.pieces'
TAKE = "place.add_(gradient) if slot in self.filled else place.copy_(gradient)"
SENT = "return Handle(self, [dist.all_reduce(tensor, group=self._reductions, async_op=True)], finish)"
KEEP = "with saved_tensors_hooks(pack, unpack):\n    return function(*args, **kwargs)"
WAITS = "bucket.gather.wait()\n    for slot"
PLAIN = "if not torch.is_grad_enabled():"
SUM = "return Handle(self, works, lambda: _sum([parts[rank] for rank in sorted(parts)], out, add))"
LOOP = (
    "for other in self._others():\n    parts[other] = torch.empty_like(parts[self.rank])\n"
    "    works.append(dist.irecv(parts[other], other, tag=tag))\n"
    "    works.append(dist.isend(self.shard_of(flat, other), other, tag=tag))")


def changed(text: str, *pairs: str) -> str:
    """``text`` with each of the pairs' first strings, which must be there, replaced by its second one.

    Both are indented by as much as the line in which the first one begins.
    """
    for before, instead in zip(pairs[::2], pairs[1::2], strict=True):
        pattern = "(?m)^( *)(.*?)" + re.escape(before).replace("\\\n", "\n\\1")
        text, times = re.subn(pattern, lambda m: m[1] + m[2] + instead.replace("\n", "\n" + m[1]), text)
        assert times, before
    return text


def after(place: str, lines: str) -> tuple[str, str]:
    """The pair that puts lines behind a place."""
    return place, f"{place}\n{lines}"


def exchange(way: str) -> tuple[str, str]:
    """The pair that fills ``every``, all ranks' gradients, in another way."""
    return f"{LOOP}\n{SUM}", (
        f"every = [flat.clone() for _ in range(self.world_size)]\nif self.world_size > 1:\n    {way}\n"
        "parts = [self.shard_of(each) for each in every]\nreturn Handle(self, [], lambda: _sum(parts, out, add))")


RIGHT: dict[str, list[str | tuple[str, ...]]] = {
    "steps:all_reduce": [(
        "parts = [tensor.clone() for _ in range(ranks)]",
        "parts = torch.empty(ranks, *tensor.shape)\nparts[rank] = tensor",
        "tensor.copy_(torch.stack(parts).sum(0))", "tensor.zero_()\nfor part in parts:\n    tensor += part")],
    "steps:pad": [("torch.cat([flat, flat.new_zeros(-flat.numel() % ranks)])",
                   "nn.functional.pad(flat, (0, (ranks - len(flat) % ranks) % ranks))")],
    "steps:shard": [("flat[rank * size:(rank + 1) * size]", "flat.view(ranks, -1)[rank]")],
    "steps:bucket": [(
        "flat = pad(torch.cat([p.detach().flatten() for p in parameters]), ranks)",
        "flat = torch.zeros(-(-sum(p.numel() for p in parameters) // ranks) * ranks)",
        "p.data = flat[start:start + p.numel()].view(p.shape)", "place = flat[start:start + p.numel()].view_as(p)\n"
        "with torch.no_grad():\n    place.copy_(p)\np.data = place")],
    "steps:gradient_hook": ['''
def gradient_hook(parameters, flat):
    places = dict(zip(parameters, flat[:sum(p.numel() for p in parameters)].split([p.numel() for p in parameters])))

    def move(p):
        places[p] += p.grad.reshape(-1)
        p.grad = None

    for p in parameters:
        p.register_post_accumulate_grad_hook(move)
'''],
    "steps:overlap": [(
        "missing = set(parameters)", "left = [len(parameters)]", "missing: set = missing", "left: list = left",
        "missing.remove(p)", "left[0] -= 1", "if not missing:", "if left[0] == 0:")],
    "steps:clip": [(
        "gradient.square().sum()", "gradient.double().pow(2).sum()",
        "gradient.mul_(min(1.0, limit / (norm + 1e-6)))", "if norm > limit:\n    gradient *= limit / (norm + 1e-6)")],
    "steps:free": [("own.copy_(shard(flat, dist.get_rank(), dist.get_world_size()))",
                    "own[:] = flat[dist.get_rank() * own.numel():][:own.numel()]")],
    "steps:gather": [("flat.numel() * flat.element_size()", "flat.nbytes",
                      "dist.all_gather(list(flat.chunk(dist.get_world_size())), own, async_op=True)",
                      "dist.all_gather_into_tensor(flat, own, async_op=True)")],
    "steps:prefetch": [("work = start(0)", "works = {0: start(0)}", "work.wait()", "works.pop(number).wait()",
                        "work = start(number + 1)", "works[number + 1] = start(number + 1)")],
    "steps:message": [("latency + size / bandwidth", "(latency * bandwidth + size) / bandwidth")],
    "steps:ring": [("2 * (ranks - 1) * message(size / ranks, latency, bandwidth)",
                    "sum(latency + size / ranks / bandwidth for _ in range(2 * ranks - 2))")],
    "steps:communication": [("ring(2 * elements, ranks, latency, bandwidth) * (1.5 if stage == 3 else 1.0)",
                             "[2, 2, 2, 3][stage] * (ranks - 1) * (latency + 2 * elements / ranks / bandwidth)")],
    "schedulers:WarmupLR": [SCHEDULE, (
        '_range(optimizer, "warmup_min_lr", warmup_min_lr, "warmup_max_lr", warmup_max_lr)',
        "([value] * len(optimizer.param_groups) if isinstance(value, (int, float)) else list(value)\n"
        "    for value in (warmup_min_lr, warmup_max_lr))",
        "k = max(t - 1, 0)", "k = [0, *range(self.steps + 2)][min(t, self.steps + 2)]"), (
        'group.get("initial_lr", group["lr"])', 'group.setdefault("initial_lr", group["lr"])',
        'up = k / self.steps if self.type == "linear" else math.log(k + 1) / math.log(self.steps)',
        'last = self.steps - (self.type == "log")\nup = CURVES[self.type](0.0, 1.0, min(k, last), last)')],
    "amp:DynamicLossScaler": [SCALER, '''
class DynamicLossScaler(LossScaler):
    def __init__(self, scale, window, hysteresis, consecutive, minimum):
        super().__init__(scale)
        self.start, self.rules, self.history = float(scale), (window, hysteresis, consecutive, minimum), []

    def update(self, overflow, culprit=None):
        self.history.append(bool(overflow))
        window, hysteresis, consecutive, minimum = self.rules
        scale, forgiven, good = self.start, hysteresis - 1, 0
        for number, bad in enumerate(self.history, 1):
            if bad and forgiven:
                forgiven -= 1
            elif bad and scale <= minimum and number == len(self.history):
                raise MinimumLossScaleError("at the minimum")
            elif bad:
                scale = max(minimum, scale / 2)
            elif good and not good % window:
                scale, forgiven = 2 * scale, hysteresis - 1
            if consecutive and not bad:
                forgiven = hysteresis - 1
            good = 0 if bad else good + 1
        self.scale = scale

    def state_dict(self):
        return {"scale": self.scale, "history": list(self.history), "start": self.start}
'''],
    "amp:Precision.path": [PATH, (
        "compute = master = given\nif self.half:", "if self.half is None:\n    compute = master = given\nelse:",
        "Dtypes(compute, master, gradient, self.config.communication_data_type or low or gradient)",
        "Dtypes(reduction=self.config.communication_data_type or low or gradient, gradient=gradient, "
        "master=master, compute=compute)")],
    "checkpointing:checkpoint": [CHECKPOINT, (
        "with torch.random.fork_rng(devices=[]), torch.enable_grad()",
        "before = torch.get_rng_state()\nwith torch.enable_grad()",
        "found.update(enumerate(tensors))", "torch.set_rng_state(before)\nfound.update(enumerate(tensors, 1))",
        "return len(slots) - 1", "return len(slots)",
        '"cpu", *autocast)', '"cpu", dtype=autocast[0], enabled=autocast[1])')],
    "zero:reduce_scatter": [REDUCE_SCATTER, (
        f"{LOOP}\n{SUM}", "mine = torch.empty_like(self.shard_of(flat))\n"
        "works = [dist.reduce_scatter_tensor(mine, flat, async_op=True)] if self.world_size > 1 else []\n"
        "return Handle(self, works, lambda: _sum([mine if works else self.shard_of(flat)], out, add))"), (
        f"{LOOP}\n{SUM}",
        "slices = torch.cat([self.shard_of(flat, rank).clone() for rank in range(self.world_size)])\n"
        "got = torch.empty_like(slices)\n"
        "works = [dist.all_to_all_single(got, slices, async_op=True)] if self.world_size > 1 else []\n"
        "parts = list(got.view(self.world_size, -1)) if works else [slices]\n"
        "return Handle(self, works, lambda: out.copy_(sum(parts) + out if add else sum(parts)))")],
    "zero:bucketed_all_reduce": [BUCKETS, (
        "self.used.add(slot)\nself.arrived.add(slot)", "for known in (self.used, self.arrived):\n    known.add(slot)",
        TAKE, "if slot not in self.filled:\n    place.zero_()\nplace += gradient",
        "while self.queue and self.queue[0].complete:",
        "for first in list(self.queue):\n    if not first.complete:\n        return")],
    "zero:stage_1": [STAGE_1, (
        *after(PIECES, "self.gradients, self.seen = torch.zeros_like(self.flat), torch.zeros(len(self.parameters))\n"
        "self.table = {id(p): row for row in enumerate(self.parameters) for p in row[1:]}\n"
        "self.buffers = list(self.places(self.gradients))\nfor p in self.parameters:\n"
        "    p.register_post_accumulate_grad_hook(self.collect)"), "def finish_backward(self):",
        "def collect(self, p):\n    number, _ = self.table[id(p)]\n    self.buffers[number].add_(p.grad)\n"
        "    self.seen[number], p.grad = 1, None\n\ndef finish_backward(self):",
        "gradients = torch.zeros_like(self.flat)", "gradients = self.gradients",
        "[float(p.grad is not None) for p in self.parameters]", "self.seen.tolist()", SCATTER,
        "for rank, part in enumerate(gradients.chunk(self.communicator.world_size)):\n    dist.reduce(part, rank)",
        "norm = square ** 0.5", "norm = square ** 0.5\nshard = shard.clone()\ngradients.zero_(), self.seen.zero_()",
        GATHER, "for rank, part in enumerate(self.flat.chunk(self.communicator.world_size)):\n"
        "    dist.broadcast(part, rank)"), (
        "[nn.Parameter(part) for _, part in self.parts]", "[nn.Parameter(part.clone()) for _, part in self.parts]",
        GATHER, "for (_, part), piece in zip(self.parts, self.pieces):\n    part.copy_(piece)\n"
        "self.communicator.all_gather(self.flat).wait()",
        "message[0] = shard.square().sum()\nself.communicator.all_reduce(message).wait()\n"
        "square, *used = message.tolist()",
        "total = shard.norm() ** 2\nfor work in [self.communicator.all_reduce(t) for t in (message, total)]:\n"
        "    work.wait()\nsquare, used = float(total), message[1:] > 0")],
    "zero:stage_3": [STAGE_3, (
        "self.communicator.shard_of(self.flat).copy_(self.shard)",
        "rows = self.flat.view(self.communicator.world_size, -1)\nrows[self.communicator.rank] = self.shard",
        "all_gather(self.flat, self.label)", "all_gather(self.flat)", "self.gather.wait()",
        "if self.gather is not None:\n    self.gather.wait()",
        "self.users.add(user)\nif self.state is UnitState.SHARDED:\n    self.start_gather()\n"
        "if self.state is UnitState.GATHERING:\n    self.finish_gather()",
        "self.users |= {user}\nif self.state is UnitState.WHOLE:\n    return\n"
        "if self.state is not UnitState.GATHERING:\n    self.start_gather()\nself.finish_gather()",
        "self.users.discard(user)\nif not self.users", "self.users -= {user}\nif len(self.users) == 0")],
}


# By exercise and by the test that finds it, without "test_": what is wrong.
WRONG: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    ("steps:all_reduce", "all_reduce"): {
        "an all-reduce by all-reduce": ("rank, ranks", "dist.all_reduce(tensor)\nreturn\nrank, ranks"),
        "sums in another order on each rank": ("torch.stack(parts).sum(0)", "sum(parts[rank:] + parts[:rank])"),
        "messages that are not waited for": ("for work in works:\n    work.wait()", "pass")},
    ("steps:pad", "pad"): {
        "a whole row of zeros where none is needed": ("-flat.numel() % ranks", "ranks - flat.numel() % ranks"),
        "zeros in another dtype": ("flat.new_zeros(", "torch.zeros(")},
    ("steps:shard", "shard"): {
        "a copy": ("* size]", "* size].clone()"),
        "every n-th element": ("flat[rank * size:(rank + 1) * size]", "flat[rank::ranks]")},
    ("steps:bucket", "bucket"): {
        "parameters that stay where they are": ("p.data = flat", "p.other = flat"),
        "a tensor without padding": ("pad(torch.cat", "(torch.cat", "for p in parameters]), ranks)",
            "for p in parameters]))"),
        "a tensor that needs a gradient": ("p.detach().flatten()", "p.flatten()", "p.data = flat",
            "p.data = flat.detach()")},
    ("steps:gradient_hook", "gradient_hook"): {
        "a hook that copies": ("place.add_(p.grad)", "place.copy_(p.grad)"),
        "gradients that are kept": ("p.grad = None", "pass"),
        "one place for all": ("start += p.numel()", "pass")},
    ("steps:overlap", "overlap"): {
        "buckets that go out at the end": ("if not missing:\n    works.append(dist.all_reduce(flat, async_op=True))",
            "if all(not m for m, _ in every):\n    works.extend(dist.all_reduce(f, async_op=True) for _, f in every)",
            "works = []", "works, every = [], []", "missing = set(parameters)",
            "missing = set(parameters)\nevery.append((missing, flat))"),
        "a hook that waits": ("works.append(dist.all_reduce(flat, async_op=True))",
            "works.append(dist.all_reduce(flat, async_op=True))\nworks[-1].wait()"),
        "an all-reduce for each gradient": ("if not missing:", "if True:"),
        "a bucket that goes out with its first gradient": ("if not missing:", "if len(missing) == 1:")},
    ("steps:clip", "clip"): {
        "a norm of one shard": ("dist.all_reduce(square)", "pass"),
        "a norm of norms": ("gradient.square().sum()", "gradient.norm()", "square.sqrt()", "square"),
        "clipping that enlarges": ("min(1.0, limit / (norm + 1e-6))", "limit / (norm + 1e-6)"),
        "the norm after clipping": ("return norm", "return min(norm, limit)"),
        "shards that are gathered": ("dist.all_reduce(square)",
            "every = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]\n"
            "dist.all_gather(every, gradient)\nsquare = torch.cat(every).square().sum()\n"
            "dist.all_gather(every, gradient)")},
    ("steps:free", "free"): {
        "memory that stays": ("flat.untyped_storage().resize_(0)", "pass"),
        "changes that are lost": ("own.copy_(shard(flat, dist.get_rank(), dist.get_world_size()))", "pass"),
        "another tensor": ("flat.untyped_storage().resize_(0)", "flat.data = torch.empty(0)")},
    ("steps:gather", "gather"): {
        "a new storage": ("flat.untyped_storage().resize_(flat.numel() * flat.element_size())",
            "flat.data = torch.empty(flat.shape)"),
        "an all-gather that blocks": (
            "return dist.all_gather(list(flat.chunk(dist.get_world_size())), own, async_op=True)",
            "work = dist.all_gather(list(flat.chunk(dist.get_world_size())), own, async_op=True)\nwork.wait()\n"
            "return work"),
        "an all-reduce": ("return dist.all_gather(list(flat.chunk(dist.get_world_size())), own, async_op=True)",
            "shard(flat.zero_(), dist.get_rank(), dist.get_world_size()).copy_(own)\n"
            "return dist.all_reduce(flat, async_op=True)")},
    ("steps:prefetch", "prefetch"): {
        "gathers that come late": ("x = layer(x)", "pass", "work.wait()", "work.wait()\nx = layer(x)"),
        "all at once": ("work = start(0)", "works = [start(i) for i in range(len(layers))]", "work.wait()",
            "works[number].wait()", "work = start(number + 1)", "pass"),
        "layers that stay": ("free(number)", "pass"),
        "use before the wait": ("work.wait()", "ahead = work", "free(number)", "ahead.wait()\nfree(number)")},
    ("steps:message", "message_and_ring"): {"bandwidth alone": ("latency + size", "size")},
    ("steps:ring", "message_and_ring"): {
        "latency once": ("2 * (ranks - 1) * message(size / ranks, latency, bandwidth)",
            "latency + 2 * (ranks - 1) * size / ranks / bandwidth"),
        "one way": ("2 * (ranks - 1)", "(ranks - 1)")},
    ("steps:communication", "communication"): {
        "stage 3 as stage 2": ("1.5 if stage == 3 else 1.0", "1.0"),
        "two bytes forgotten": ("2 * elements", "elements"),
        "the wrong way round": ("seconds > compute", "seconds < compute")},
    ("schedulers:WarmupLR", "a_warmup_follows"): {
        "one step off": ("max(t - 1, 0)", "t"),
        "a way up that goes on": ("min(1.0, up)", "up"),
        "always log": ('if self.type == "linear"', "if False"),
        "the lowest rate forgotten": ("self.low[group] + (self", "(self"),
        "a division by zero at 1": ("max(2, warmup_num_steps)", "warmup_num_steps"),
        "a top read at every step": ("self.high[group] - self", 'self.optimizer.param_groups[group]["lr"] - self')},
    ("schedulers:WarmupLR", "a_warmup_goes_on"): {
        "one step back after last_batch_iteration": ("(optimizer, last_batch_iteration)",
            "(optimizer, max(-1, last_batch_iteration - 1))"),
        "a first step that is taken twice after a resume": ("def rate(self, t, group):",
            "def load_state_dict(self, state):\n    super().load_state_dict(state)\n    self.late = True\n\n"
            "def rate(self, t, group):\n    t -= getattr(self, 'late', False)"),
        "starting over on resume": ("(optimizer, last_batch_iteration)", "(optimizer)"),
        "counting its own calls": ("k = max(t - 1, 0)",
            "self.calls = getattr(self, 'calls', -1) + 1\nk = max(self.calls // len(self.low) - 1, 0)"),
        "counting its own steps": ("def rate(self, t, group):",
            "def step(self, *args, **kwargs):\n    self.t = getattr(self, 't', 0) + 1\n"
            "    super().step(*args, **kwargs)\n\ndef rate(self, t, group):\n    t = getattr(self, 't', 1) - 1")},
    ("schedulers:WarmupLR", "the_top_of_a_warmup"): {
        "the first group's rates": ("self.low[group] + (self.high[group] - self.low[group])",
            "self.low[0] + (self.high[0] - self.low[0])"),
        "a top taken from the rate of the moment": ('group.get("initial_lr", group["lr"])', 'group["lr"]')},
    ("amp:DynamicLossScaler", "after_any_short_history"): {
        "never growing": ("self.scale *= 2", "pass"),
        "never above 2 ** 24": ("self.scale *= 2", "self.scale = min(2 * self.scale, 2.0 ** 24)"),
        "halving to whole numbers": ("self.scale / 2", "self.scale // 2"),
        "counting steps, whatever they were": ("self.good = 0", "self.good += 1"),
        "never halving": ("self.scale / 2", "self.scale"),
        "forgiving nothing": ("self.left > 1", "False"),
        "forgiving one too many": ("self.left > 1", "self.left > 0"),
        "growing one step early": ("if self.good and self.good %", "if (self.good + 1) %"),
        "good steps that survive an overflow": ("self.good = 0", "pass"),
        "growing at an overflow too": ("if overflow:",
            "if overflow and self.good and self.good % self.window == 0:\n    self.scale *= 2\nif overflow:"),
        "hysteresis never given back": ("self.scale *= 2\nself.left = self.hysteresis", "self.scale *= 2"),
        "hysteresis always given back": ("if self.consecutive:", "if True:"),
        "hysteresis used once": ("self.scale = max(self.minimum, self.scale / 2)",
            "self.scale, self.left = max(self.minimum, self.scale / 2), self.hysteresis"),
        "forgetting its good steps": (', "good": self.good', ""),
        "forgetting its hysteresis": (', "left": self.left', ""),
        "forgetting its scale": ('"scale": self.scale, ', ""),
        "a state that is no plain data": ('"scale": self.scale', '"scale": torch.tensor(self.scale)')},
    ("amp:DynamicLossScaler", "smallest_scale"): {
        "staying at the minimum in silence": (
            'raise MinimumLossScaleError(f"the gradient of {culprit} is not finite. Use bf16")', "pass"),
        "falling below the minimum": ("max(self.minimum, self.scale / 2)", "self.scale / 2"),
        "an error before the hysteresis is used up": (
            "if self.left > 1:\n    self.left -= 1\nelif self.scale <= self.minimum:",
            "if self.scale <= 4 * self.minimum:")},
    ("amp:Precision.path", "every_parameter_has"): {
        "ignoring masters": ("compute if small else torch.float32", "compute"),
        "ignoring 16-bit masters": ("compute if small else torch.float32", "torch.float32"),
        "ignoring fp16's own key": ("self.config.fp16.fp16_master_weights_and_grads or ", ""),
        "ignoring bf16's own key": (" or self.config.bf16.bf16_master_weights_and_grads", ""),
        "ignoring what autocast reduces": ("or low or gradient", "or gradient"),
        "ignoring which modules autocast may reduce": (" if id(parameter) in self.low else None", ""),
        "ignoring that a wish for all goes first": ("self.config.communication_data_type or low",
            "low or self.config.communication_data_type"),
        "ignoring integers": ("not parameter.is_floating_point()", "False"),
        "ignoring float64": ("compute = master = given", "compute = master = torch.float32"),
        "ignoring what is kept in fp32": ("torch.float32 if id(parameter) in self.kept else self.half", "self.half"),
        "ignoring the dtype of accumulation": ("self.config.data_types.grad_accum_dtype or master", "master"),
        "ignoring the dtype of reductions": ("self.config.communication_data_type or ", ""),
        "ignoring the gradient's dtype in reductions": ("or low or gradient", "or low or master")},
    ("checkpointing:checkpoint", "equals_plain_autograd"): {
        "the random state is not set": ("torch.set_rng_state(state)", "pass"),
        "backward draws random numbers": ("torch.random.fork_rng(devices=[]), ", ""),
        "inputs that are cut off": (KEEP, "with saved_tensors_hooks(pack, unpack):\n"
            "    return function(*[a.detach() if isinstance(a, Tensor) else a for a in args], **kwargs)"),
        "no arguments by name": ("function(*again[0], **again[1])", "function(*again[0])"),
        "no graph in the second run": (", torch.enable_grad()", ""),
        "the random state of the end": (KEEP,
            "with saved_tensors_hooks(pack, unpack):\n    result = function(*args, **kwargs)\n"
            "state.copy_(torch.get_rng_state())\nreturn result")},
    ("checkpointing:checkpoint", "no_input_needs"): {
        "saved where an input needs a gradient alone": (PLAIN,
            "if not any(isinstance(a, Tensor) and a.requires_grad for a in args):\n    with torch.no_grad():\n"
            "        return function(*args, **kwargs)\nif not torch.is_grad_enabled():")},
    ("checkpointing:checkpoint", "under_the_autocast"): {
        "no autocast": (', torch.autocast("cpu", *autocast)', ""),
        "always autocast": (', torch.autocast("cpu", *autocast)', ', torch.autocast("cpu", autocast[0])'),
        "autocast to another": ('torch.autocast("cpu", *autocast)', 'torch.autocast("cpu", enabled=autocast[1])')},
    ("checkpointing:checkpoint", "runs_twice"): {
        "again for every tensor": ("if slot not in found:\n    recompute()", "recompute()"),
        "twice in forward": ("with saved_tensors_hooks(pack, unpack):",
            "with torch.no_grad():\n    function(*args, **kwargs)\nwith saved_tensors_hooks(pack, unpack):"),
        "PyTorch's own": (PLAIN, "import torch.utils.checkpoint\n"
            "return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)\n"
            "if not torch.is_grad_enabled():")},
    ("checkpointing:checkpoint", "keeps_its_inputs_only"): {
        "everything is kept, as NumPy's": ("slots.append(None)",
            "held.append(tensor.detach().numpy().copy())\nslots.append(None)", "state, slots, found =",
            "held = []\nstate, slots, found ="),
        "everything is kept": (PLAIN, "return function(*args, **kwargs)\nif not torch.is_grad_enabled():"),
        "half of it is kept": ("slots.append(None)",
            "slots.append(None)\nif len(slots) % 2:\n    held[len(slots) - 1] = tensor.detach()",
            "state, slots, found =", "held = {}\nstate, slots, found =", "if slot not in found:",
            "if slot in held:\n    return held[slot]\nif slot not in found:")},
    ("checkpointing:checkpoint", "leaves_nothing_behind"): {
        "graphs that keep themselves": ("tensors.append(tensor.detach())", "tensors.append(tensor)",
            "return found.pop(slot)", "return found[slot]"),
        "a list of all inputs, as NumPy's": ("state, slots, found =",
            "KEPT.append(args[0].detach().numpy().copy())\nstate, slots, found =", "def checkpoint(",
            "KEPT = []\n\ndef checkpoint("),
        "a list of all inputs": ("state, slots, found =", "KEPT.append(args)\nstate, slots, found =",
            "def checkpoint(", "KEPT = []\n\ndef checkpoint(")},
    ("checkpointing:checkpoint", "does_nothing_without"): {
        "work without grad mode": after(PLAIN, "    function(*args, **kwargs)")},
    ("zero:reduce_scatter", "what_is_counted"): {
        "an all-reduce": exchange(
            "dist.all_reduce(flat); every = [flat] + [torch.zeros_like(flat)] * (self.world_size - 1)"),
        "an all-gather of everything": exchange("dist.all_gather(every, flat.contiguous())"),
        "broadcasts of everything": exchange("for rank in range(self.world_size): dist.broadcast(every[rank], rank)"),
        "objects": exchange("dist.all_gather_object(every, flat.clone())"),
        "an all-to-all of everything": exchange("dist.all_to_all(every, [flat.clone() for _ in every])"),
        "pairs of everything": exchange(
            "for work in [f(t, o) for o in self._others() for f, t in "
            "((dist.irecv, every[o]), (dist.isend, flat))]: work.wait()"),
        "sent but not counted": ('self._begin("reduce-scatter", flat, 1, what)', "pass"),
        "counted twice": ("flat, 1, what", "flat, 2, what")},
    ("zero:reduce_scatter", "its_slice"): {
        "the neighbour's slice": ("parts = {self.rank: self.shard_of(flat)}",
            "parts = {self.rank: self.shard_of(flat, (self.rank + 1) % self.world_size)}"),
        "room that two calls share": ("parts[other] = torch.empty_like(parts[self.rank])",
            "parts[other] = self.__dict__.setdefault(f'room {other}', torch.empty_like(parts[self.rank]))"),
        "a sum in fp16": ("_sum([parts[rank] for rank in sorted(parts)], out, add)",
            "_sum([sum(parts[rank].half() for rank in sorted(parts)).float()], out, add)"),
        "an out that is read though nothing is added": ("_sum([parts[rank] for rank in sorted(parts)], out, add)",
            "out.copy_(out * add + sum(parts[rank] for rank in sorted(parts)))"),
        "this rank's own part forgotten": ("[parts[rank] for rank in sorted(parts)]",
            "[parts[rank] for rank in sorted(parts) if rank != self.rank] or [parts[self.rank]]"),
        "never added": ("out, add)", "out, False)"),
        "always added": ("out, add)", "out, True)"),
        "an out that is emptied first": ("parts = {self.rank: self.shard_of(flat)}",
            "parts = {self.rank: self.shard_of(flat)}\nif not add:\n    out.zero_()"),
        "a sum that does not wait": ("return Handle(self, works, lambda: _sum",
            "_sum([parts[rank] for rank in sorted(parts)], out, add)\n"
            "return Handle(self, works, lambda: None and _sum")},
    ("zero:reduce_scatter", "keeps_nothing"): {
        "what was received is kept": ("works = []",
            "works = []\nself.history = getattr(self, 'history', []) + [parts]")},
    ("zero:reduce_scatter", "returns_at_once"): {
        "a wait inside": ("return Handle(self, works,", "for work in works:\n    work.wait()\nreturn Handle(self, [],"),
        "a barrier inside": ("return Handle(", "dist.barrier()\nreturn Handle("),
        "messages that are sent when it is waited for": (SUM, "return Handle(self, finish=finish)", LOOP,
            "def finish():\n    for other in self._others():\n"
            "        parts[other] = torch.empty_like(parts[self.rank])\n"
            "        works.append(dist.irecv(parts[other], other, tag=tag))\n"
            "        works.append(dist.isend(self.shard_of(flat, other), other, tag=tag))\n    for work in works:\n"
            "        work.wait()\n    _sum([parts[rank] for rank in sorted(parts)], out, add)")},
    ("zero:reduce_scatter", "adds_in_one_order"): {
        "parts from whoever comes first": ("dist.irecv(parts[other], other, tag=tag)",
            "dist.irecv(parts[other], tag=tag)"),
        "sums in an order that changes": ("for rank in sorted(parts)]",
            "for rank in [*sorted(parts), *sorted(parts)][self.number % 3:][:len(parts)]]")},
    ("zero:bucketed_all_reduce", "another_order"): {
        "buckets that go out as they come": (
            "while self.queue and self.queue[0].complete:\n    self.launch(self.queue.popleft())",
            "for gradients in [gradients for gradients in self.queue if gradients.complete]:\n"
            "    self.queue.remove(gradients)\n    self.launch(gradients)")},
    ("zero:bucketed_all_reduce", "training_by_buckets"): {
        "buckets that are not full": ("while self.queue and self.queue[0].complete:",
            "while self.queue and self.queue[0].arrived:"),
        "gradients that replace each other": (TAKE, "place.copy_(gradient)"),
        "gradients that are added to old ones": (TAKE, "place.add_(gradient)"),
        "gradients that nobody knows of": ("self.used.add(slot)", "pass"),
        "sparse gradients that are not made dense": (
            "gradient = gradient.to_dense() if gradient.is_sparse else gradient", "pass"),
        "an all-reduce in bf16": (SENT,
            "low = tensor.bfloat16()\nwork = dist.all_reduce(low, group=self._reductions, async_op=True)\n"
            "return Handle(self, [work], lambda: (tensor.copy_(low), finish and finish()))"),
        "every micro-batch is sent": ("overlap_comm and self.reduces_now:", "overlap_comm:")},
    ("zero:bucketed_all_reduce", "late_gradient"): {
        "late gradients that are lost": (
            "self.late[slot] = gradient if slot not in self.late else self.late[slot] + gradient", "pass"),
        "late gradients of which the last one counts": (
            "gradient if slot not in self.late else self.late[slot] + gradient", "gradient"),
        "late gradients that go into what was sent": ("if self.life in (Life.SENDING, Life.SENT):",
            "if self.life is Life.SENDING:"),
        "late gradients that go into what is being sent": ("if self.life in (Life.SENDING, Life.SENT):", "if False:")},
    ("zero:bucketed_all_reduce", "full_buckets"): {
        "buckets that wait for the end": ("if self.zero.config.overlap_comm and self.reduces_now:", "if False:"),
        "overlap where it is off": ("self.zero.config.overlap_comm and ", ""),
        "one bucket at a time, and the rest at the end": ("while self.queue and", "if len(self.queue) == 1 and"),
        "an all-reduce that blocks": (SENT,
            "dist.all_reduce(tensor, group=self._reductions)\nreturn Handle(self, [], finish)"),
        "an all-reduce that is sent when it is waited for": (SENT,
            "return Handle(self, finish=lambda: (dist.all_reduce(tensor), finish and finish()))")},
    ("zero:bucketed_all_reduce", "runs_its_finish"): {
        "a handle that does not wait": (SENT,
            "dist.all_reduce(tensor, group=self._reductions, async_op=True)\nreturn Handle(self, [], finish)"),
        "a finish that comes too early": ("self._begin(kind", "if finish:\n    finish()\nself._begin(kind",
            "async_op=True)], finish)", "async_op=True)])"),
        "a finish that never comes": ("async_op=True)], finish)", "async_op=True)])"),
        "a finish that one rank alone forgets": ("return Handle(self, finish=finish)", "return Handle(self)")},
    ("zero:bucketed_all_reduce", "what_is_counted"): {
        "sent but not counted": ("self._begin(kind, tensor, 2, what)", "pass"),
        "an all-gather of everything": (SENT, "every = [torch.empty_like(tensor) for _ in range(self.world_size)]\n"
            "work = dist.all_gather(every, tensor.contiguous(), async_op=True)\n"
            "return Handle(self, [work], lambda: (tensor.copy_(sum(every)), finish and finish()))")},
    ("zero:bucketed_all_reduce", "kept_once"): {
        "gradients beside the bucket": ("self.filled.add(slot)",
            "self.filled.add(slot)\nself.kept = getattr(self, 'kept', {}) | {slot: gradient}"),
        "gradients in p.grad": ("self.filled.add(slot)", "self.filled.add(slot)\nslot.parameter.old_grad = gradient")},
    ("zero:stage_1", "equals_plain_pytorch"): {
        "gradients summed and not averaged": ("shard /= divisor", "pass"),
        "a divisor that is not used": ("/= divisor", "/= self.communicator.world_size"),
        "clipping that enlarges": ("min(1.0, clip / (norm + 1e-6))", "clip / (norm + 1e-6)"),
        "no clipping": ("part * coefficient", "part"),
        "clipping before the mean is taken": ("shard /= divisor", "pass", "part * coefficient",
            "part / divisor * coefficient"),
        "a norm of this rank alone": ("square, *used = message.tolist()",
            "square, *used = message.tolist()\nsquare = float(shard.square().sum())"),
        "tied weights that count twice": ("list(model.parameters())",
            "[p for module in model.modules() for p in module.parameters(recurse=False)]", "p.grad = None", "pass",
            "self.communicator.reduce_scatter",
            "for p in self.parameters:\n    p.grad = None\nself.communicator.reduce_scatter"),
        "parameters without gradient that decay": ("part * coefficient if used[number] else None",
            "part * coefficient"),
        "a gradient that only one rank has is left out": ("if used[number] else None",
            "if self.parameters[number].number else None",
            "for p, place in zip(self.parameters, self.places(gradients)):",
            "for p, place in zip(self.parameters, self.places(gradients)):\n    p.number = p.grad is not None"),
        "a crash on a parameter without gradient": (
            "if p.grad is not None:\n    place.copy_(p.grad)\n    p.grad = None", "place.copy_(p.grad)\np.grad = None"),
        "each rank's own weights": ("self.communicator.broadcast(self.flat, 0)", "pass"),
        "a rate that is read once": (*after(PIECES, "self.lr = 0.01"), "self.optimizer.step()",
            'self.optimizer.param_groups[0]["lr"] = self.lr\nself.optimizer.step()'),
        "weights that are gathered late": (GATHER, "pass", "gradients = torch",
            "self.communicator.all_gather(self.flat).wait()\ngradients = torch"),
        "a factor of clipping that is not told": ("StepResult(norm, coefficient, False", "StepResult(norm, 1.0, False"),
        "a last element that no rank has": ("-(-count // ranks) * ranks", "count"),
        "a buffer that keeps the last window's gradients": (*after(PIECES,
            "self.buffer = torch.zeros_like(self.flat)"), "gradients = torch.zeros_like(self.flat)",
            "gradients = self.buffer"),
        "a gradient of zeros that counts as none": ("float(p.grad is not None)",
            "float(p.grad is not None and bool(p.grad.any()))"),
        "gradients that are reduced in bf16": (SCATTER, "low = gradients.bfloat16()\n"
            "self.communicator.reduce_scatter(low, self.communicator.shard_of(low), add=False).wait()\n"
            "shard.copy_(self.communicator.shard_of(low))"),
        "clipping after the update": ("part * coefficient", "part", "for piece in self.pieces:",
            "for piece in self.pieces:\n    if piece.grad is not None:\n        piece.grad *= coefficient")},
    ("zero:stage_1", "accumulates"): {
        "a mean over micro-batches that the loss has already": ("pass", "self.count = getattr(self, 'count', 0) + 1",
            "shard /= divisor", "shard /= divisor * self.count\nself.count = 0"),
        "micro-batches of which the last one counts": ("def finish_backward(self):\n    pass",
            "def finish_backward(self):\n    if not self.boundary:\n        for p in self.parameters:\n"
            "            p.grad = None"),
        "a window that is sent m times": ("def finish_backward(self):\n    pass",
            "def finish_backward(self):\n    for p in self.parameters:\n        if not self.boundary:\n"
            "            self.communicator.all_reduce(torch.zeros_like(p)).wait()")},
    ("zero:stage_1", "not_finite"): {
        "a skipped step that updates with zeros": ("if skip_overflow and not math.isfinite(norm):",
            "if skip_overflow and not math.isfinite(norm):\n    for piece in self.pieces:\n"
            "        piece.grad = torch.zeros_like(piece)\n    self.optimizer.step()\n"
            "    self.communicator.all_gather(self.flat).wait()"),
        "gradients that survive a skipped step": ("p.grad = None", "pass", "for (number, part), piece",
            "for p in self.parameters:\n    p.grad = None\nfor (number, part), piece"),
        "an update with NaN": ("if skip_overflow and not math.isfinite(norm)", "if False"),
        "NaN that passes as finite": ("not math.isfinite(norm)", "norm == math.inf"),
        "a rank that skips alone": ("not math.isfinite(norm)", "not bool(shard.isfinite().all())")},
    ("zero:stage_1", "shards_the_optimizer"): {
        "rank 0 that does it all": (*after(PIECES,
            "self.pieces = [nn.Parameter(place) for place in self.places(self.flat)] if self.communicator.rank == "
            "0 else []\n" 'optimizer.param_groups[0]["params"] = self.pieces'), SCATTER, "dist.reduce(gradients, 0)",
            "shard /= divisor", "gradients /= divisor", "shard.square().sum()",
            "gradients.square().sum() if self.communicator.rank == 0 else 0",
            "zip(self.parts_of(shard), self.pieces)", "zip(enumerate(self.places(gradients)), self.pieces)", GATHER,
            "dist.broadcast(self.flat, 0)"),
        "another optimizer with the given one's groups": after(PIECES,
            "self.optimizer = type(optimizer)(self.pieces)\nself.optimizer.param_groups = optimizer.param_groups"),
        "an optimizer that is not sharded": ("self.parts_of(self.communicator.shard_of(self.flat))",
            "enumerate(self.places(self.flat))", "self.parts_of(shard)", "enumerate(self.places(gradients))", SCATTER,
            "self.communicator.all_reduce(gradients).wait()", "shard /= divisor", "gradients /= divisor", GATHER,
            "pass"),
        "an optimizer of one's own over everything": (*after(PIECES,
            "self.whole = [nn.Parameter(place) for place in self.places(self.flat)]\n"
            'settings = {key: optimizer.defaults[key] for key in ("lr", "eps", "weight_decay")}\n'
            "self.optimizer = type(optimizer)(self.whole, **settings)"), SCATTER,
            "self.communicator.all_reduce(gradients).wait()", "shard /= divisor", "gradients /= divisor",
            "zip(self.parts_of(shard), self.pieces)", "zip(enumerate(self.places(gradients)), self.whole)",
            "for piece in self.pieces:", "for piece in self.whole:", GATHER, "pass")},
    ("zero:stage_1", "keeps_nothing_else"): {
        "a copy of the weights in a global": ("class Zero:", "KEPT = {}\n\nclass Zero:", *after(GATHER,
            "KEPT[id(self)] = self.flat.clone()")),
        "a copy of the weights in shared memory": after(GATHER, "self.copy = self.flat.clone().share_memory_()"),
        "a copy of the weights in a mapping": after(GATHER,
            "import mmap\nself.map = mmap.mmap(-1, self.flat.nbytes)\nself.map.write(self.flat.numpy().tobytes())"),
        "a copy of the weights as a list of numbers": after(GATHER,
            "self.copy = [p.tolist() for p in self.parameters]"),
        "a copy of the weights in the optimizer's state": after(GATHER,
            "self.optimizer.state[self.pieces[0]]['kept'] = lambda flat=self.flat.clone(): flat"),
        "a graph that lives on and holds the weights": after(GATHER,
            "with torch.enable_grad():\n    self.penalty = (self.flat.clone().requires_grad_() * 1.0).square().sum()"),
        "moments of one's own over everything": after(SCATTER,
            "self.moments = [torch.zeros_like(self.flat) for _ in range(2)]"),
        "moments that NumPy holds": after(SCATTER,
            "self.moments = [torch.zeros_like(self.flat).numpy() for _ in range(2)]"),
        "a second copy of the weights": after(GATHER, "self.copy = self.flat.clone()"),
        "a copy of the weights in bf16": after(GATHER, "self.copy = self.flat.bfloat16()"),
        "a copy of the weights in a closure": after(GATHER, "copy = self.flat.clone()\nself.restore = lambda: copy"),
        "a copy of the weights as a storage": after(GATHER, "self.copy = self.flat.untyped_storage().clone()"),
        "a copy of the weights as bytes": after(GATHER, "self.copy = self.flat.numpy().tobytes()"),
        "gradients and a buffer for them": ("p.grad = None", "p.grad.zero_()", *after(GATHER,
            "self.buffer = gradients")),
        "gradients that stay in a list": ("p.grad = None",
            "p.grad = None\nself.old = getattr(self, 'old', [])[-20:] + [place.clone()]")},
    ("zero:stage_1", "waits_for"): {
        "an all-gather that nobody waits for": (GATHER, "self.communicator.all_gather(self.flat)"),
        "a reduce-scatter that nobody waits for": (SCATTER,
            "works = self.communicator.reduce_scatter(gradients, shard, add=False)\n_sum([shard], shard, False)",
            *after(GATHER, "works.wait()"))},
    ("zero:stage_1", "must_not_be_skipped"): {"a step that is always skipped": ("skip_overflow and not", "not")},
    ("zero:stage_1", "sends_as_much"): {
        "gradients by all-reduce": (SCATTER, "self.communicator.all_reduce(gradients).wait()"),
        "gradients by all_gather": (SCATTER,
            "every = [torch.empty_like(gradients) for _ in range(self.communicator.world_size)]\n"
            "dist.all_gather(every, gradients)\ngradients.copy_(sum(every))"),
        "gradients by all_gather_into_tensor": (SCATTER,
            "every = gradients.new_empty(self.communicator.world_size, len(gradients))\n"
            "dist.all_gather_into_tensor(every.view(-1), gradients)\ngradients.copy_(every.sum(0))"),
        "gradients by all-to-all of everything": (SCATTER,
            "ranks = self.communicator.world_size\nevery = [torch.empty_like(gradients) for _ in range(ranks)]\n"
            "dist.all_to_all(every, [gradients.clone() for _ in range(ranks)])\ngradients.copy_(sum(every))"),
        "gradients by reduce and broadcast": (SCATTER, "dist.reduce(gradients, 0)\ndist.broadcast(gradients, 0)"),
        "gradients by reduce and scatter": (SCATTER, "dist.reduce(gradients, 0)\nwhole = gradients.clone()\n"
            "dist.scatter(shard, list(whole.chunk(dist.get_world_size())) if dist.get_rank() == 0 else None)\n"
            "dist.broadcast(gradients.clone(), 0)"),
        "gradients by gather and broadcast": (SCATTER,
            "everyone = [torch.empty_like(gradients) for _ in range(dist.get_world_size())]\n"
            "dist.gather(gradients.clone(), everyone if dist.get_rank() == 0 else None, 0)\ntotal = sum(everyone)\n"
            "dist.broadcast(total, 0)\ngradients.copy_(total)"),
        "gradients by object": (SCATTER,
            "everyone = [None] * dist.get_world_size()\ndist.all_gather_object(everyone, gradients.clone())\n"
            "gradients.copy_(sum(everyone))"),
        "gradients by broadcast objects": (SCATTER,
            "total = torch.zeros_like(gradients)\nfor rank in range(dist.get_world_size()):\n"
            "    box = [gradients.clone()]\n    dist.broadcast_object_list(box, rank)\n    total += box[0]\n"
            "gradients.copy_(total)"),
        "gradients by functional collectives": (SCATTER,
            "import torch.distributed._functional_collectives as functional\n"
            "gradients.copy_(functional.all_reduce(gradients, 'sum', dist.group.WORLD))"),
        "gradients by the group's own method": (SCATTER, "dist.group.WORLD.allreduce([gradients]).wait()"),
        "gradients by another thread": (SCATTER,
            "import threading\nthread = threading.Thread(target=lambda: dist.all_reduce(gradients))\nthread.start()\n"
            "thread.join()"),
        "weights by all-reduce": (GATHER,
            "for rank in range(self.communicator.world_size):\n    if rank != self.communicator.rank:\n"
            "        self.communicator.shard_of(self.flat, rank).zero_()\ndist.all_reduce(self.flat)"),
        "weights by broadcasts of everything": (GATHER,
            "for rank in range(self.communicator.world_size):\n    whole = self.flat.clone()\n"
            "    dist.broadcast(whole, rank)\n    if rank != self.communicator.rank:\n"
            "        self.communicator.shard_of(self.flat, rank).copy_(self.communicator.shard_of(whole, rank))"),
        "weights by object": (GATHER, "everyone = [None] * self.communicator.world_size\n"
            "dist.all_gather_object(everyone, self.communicator.shard_of(self.flat).clone())\n"
            "self.flat.copy_(torch.cat(everyone))\n"
            "dist.all_gather_object(everyone, self.communicator.shard_of(self.flat).clone())"),
        "weights by pairs of messages": after(GATHER,
            "other = 1 - self.communicator.rank\ngot = torch.empty_like(self.flat)\n"
            "if self.communicator.world_size == 2:\n"
            "    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, self.flat, other),\n"
            "                                        dist.P2POp(dist.irecv, got, other)]):\n        work.wait()"),
        "weights by a view of larger elements": (GATHER,
            "whole = self.flat[:len(self.flat) // 2 * 2].view(torch.float64)\ndist.broadcast(whole.clone(), 0)\n"
            "self.communicator.all_gather(self.flat).wait()"),
        "weights by the store": (GATHER,
            "import pickle\nstore, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()\n"
            "self.count = getattr(self, 'count', 0) + 1\nkey = f'{self.communicator.number} {self.count} '\n"
            "store.set(f'{key}{rank}', pickle.dumps(self.communicator.shard_of(self.flat).clone()))\n"
            "every = [pickle.loads(store.get(f'{key}{r}')) for r in range(dist.get_world_size())]\n"
            "self.flat.copy_(torch.cat(every))")},
    ("zero:stage_3", "no_pass_holds"): {
        "units that are never freed": ("if not self.users and self.state is not UnitState.SHARDED:\n    self.free()",
            "pass"),
        "units that stay in evaluation": ("if not self.users and", "if torch.is_grad_enabled() and not self.users and"),
        "units that stay in training": ("if not self.users and",
            "if not torch.is_grad_enabled() and not self.users and"),
        "units that stay in backward": ("if not self.users and",
            "if torch._C._current_graph_task_id() == -1 and not self.users and")},
    ("zero:stage_3", "that_two_use"): {
        "users that are counted": ("self.users.add(user)", "self.count = getattr(self, 'count', 0) + 1",
            "self.users.discard(user)", "self.count -= 1", "if not self.users and", "if self.count == 0 and"),
        "the first user's end is the end": ("if not self.users and self.state", "if self.state"),
        "a unit that is gathered again for those who stay": ("self.users.discard(user)",
            "self.users.discard(user)\nif self.users and self.state is UnitState.WHOLE:\n    self.free()\n"
            "    self.start_gather()\n    self.finish_gather()"),
        "a unit that is gathered for each user": ("if self.state is UnitState.SHARDED:",
            "if self.state is not UnitState.GATHERING:"),
        "parameters that look whole": ("slot.parameter.__class__ = ShardedParameter", "pass"),
        "parameters that stay sharded": ("slot.parameter.__class__ = slot.kind", "pass")},
    ("zero:stage_3", "come_late"): {
        "the shard of the start": ("copy_(self.shard)",
            "copy_(self.__dict__.setdefault('first', self.shard.detach().clone()))"),
        "a shard of zeros": ("self.communicator.shard_of(self.flat).copy_(self.shard)", "pass"),
        "gathers that begin when they are waited for": (
            "self.gather = self.communicator.all_gather(self.flat, self.label)",
            "self.gather = Handle(self.communicator, finish=lambda: self.communicator.all_gather(\n"
            "            self.flat, self.label).wait())"),
        "gathers that are waited for at once": ("self.gather = self.communicator.all_gather(self.flat, self.label)",
            "self.gather = self.communicator.all_gather(self.flat, self.label)\nself.gather.wait()"),
        "a unit that waits for its buckets at once": ("bucket.start_gather()",
            "bucket.start_gather()\nbucket.gather.wait()"),
        "a unit that is whole at once": ("for bucket in self.buckets:\n    bucket.start_gather()",
            "for bucket in self.buckets:\n    bucket.start_gather()\nself.finish_gather()"),
        "memory that goes before its gather": ("self.gather.wait()", "pass"),
        "the first bucket alone is waited for": ("bucket.gather.wait()\nfor slot",
            "self.buckets[0].gather.wait()\nfor slot"),
        "the last bucket alone is waited for": ("bucket.gather.wait()\nfor slot",
            "self.buckets[-1].gather.wait()\nfor slot"),
        "nothing is waited for": ("bucket.gather.wait()\nfor slot", "for slot")},
    ("zero:stage_3", "keeps_shards_alone"): {
        "memory that stays": ("self.flat.untyped_storage().resize_(0)", "pass"),
        "weights beside the shards": ("bucket.gather.wait()\nfor slot",
            "bucket.gather.wait()\nbucket.copy = bucket.flat.clone()\nfor slot"),
        "weights in bf16 beside the shards": ("bucket.gather.wait()\nfor slot",
            "bucket.gather.wait()\nbucket.copy = bucket.flat.bfloat16()\nfor slot")},
    ("zero:stage_3", "a_pass_gathers"): {
        "a prefetched unit that is gathered again": ("if self.state is UnitState.SHARDED:\n    self.start_gather()",
            "if self.state is not UnitState.WHOLE:\n    self.start_gather()")},
}
