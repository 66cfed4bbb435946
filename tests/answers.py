"""Answers to the exercises: RIGHT ones, in several styles, and what makes them WRONG, with the test that finds it.

The first right answer to an exercise follows the hints; for steps.py it is that file. The others are texts, or changes
of the first: pairs of what is replaced and by what. Wrong ones are changes of the first, too.
"""

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

SCATTER = "        self.communicator.reduce_scatter(gradients, shard, add=False).wait()\n"
GATHER = "        self.communicator.all_gather(self.flat).wait()\n"


def changed(text: str, *pairs: str) -> str:
    """``text`` with each of the pairs' first strings, which must be there, replaced by its second one."""
    for before, instead in zip(pairs[::2], pairs[1::2], strict=True):
        assert before in text, before
        text = text.replace(before, instead)
    return text


def after(place: str, *lines: str) -> tuple[str, str]:
    """The pair that puts lines behind a place."""
    return place, place + "".join(f"        {line}\n" for line in lines)


def scattered(*lines: str) -> tuple[str, str]:
    """The pair that puts another way to send gradients in the place of stage 1's reduce-scatter."""
    return SCATTER, "".join(f"        {line}\n" for line in lines)


def gathered(*lines: str) -> tuple[str, str]:
    """The same for its all-gather."""
    return GATHER, "".join(f"        {line}\n" for line in lines)


def sent_by(*lines: str) -> tuple[str, str]:
    """The pair that sends a reduce-scatter's slices in another way."""
    start = REDUCE_SCATTER.index("        for other in self._others")
    return REDUCE_SCATTER[start:], "".join(f"        {line}\n" for line in lines)


def reduce_scatter_by(exchange: str) -> tuple[str, str]:
    """The pair that fills ``every``, all ranks' gradients, by another exchange."""
    return sent_by("every = [flat.clone() for _ in range(self.world_size)]", "if self.world_size > 1:",
                   f"    {exchange}", "parts = [self.shard_of(each) for each in every]",
                   "return Handle(self, [], lambda: _sum(parts, out, add))")


RIGHT: dict[str, list[str | tuple[str, ...]]] = {  # for steps.py stands itself as the first one
    "steps:all_reduce": ['''
def all_reduce(tensor):
    me, ranks = dist.get_rank(), dist.get_world_size()
    room = torch.empty(ranks, *tensor.shape)
    room[me] = tensor
    sends = [dist.isend(room[me], other) for other in range(ranks) if other != me]
    for work in [dist.irecv(room[other], other) for other in range(ranks) if other != me] + sends:
        work.wait()
    tensor.zero_()
    for row in room:
        tensor += row
'''],
    "steps:pad": ['''
def pad(flat, ranks):
    missing = (ranks - len(flat) % ranks) % ranks
    return nn.functional.pad(flat, (0, missing))
'''],
    "steps:shard": ['''
def shard(flat, rank, ranks):
    return flat.view(ranks, -1)[rank]
'''],
    "steps:bucket": ['''
def bucket(parameters, ranks):
    count = sum(p.numel() for p in parameters)
    flat = torch.zeros(-(-count // ranks) * ranks, dtype=parameters[0].dtype)
    rest = flat
    with torch.no_grad():
        for p in parameters:
            place, rest = rest[:p.numel()], rest[p.numel():]
            place.copy_(p.view(-1))
            p.data = place.view_as(p)
    return flat
'''],
    "steps:gradient_hook": ['''
def gradient_hook(parameters, flat):
    places = dict(zip(parameters, flat[:sum(p.numel() for p in parameters)].split([p.numel() for p in parameters])))

    def move(p):
        places[p] += p.grad.reshape(-1)
        p.grad = None

    for p in parameters:
        p.register_post_accumulate_grad_hook(move)
'''],
    "steps:overlap": ['''
class Countdown:
    def __init__(self, left, flat, works):
        self.left, self.flat, self.works = left, flat, works

    def __call__(self, p):
        self.left -= 1
        if self.left == 0:
            self.works += [dist.all_reduce(self.flat, async_op=True)]

def overlap(buckets):
    works = []
    for parameters, flat in buckets:
        gradient_hook(parameters, flat)
        hook = Countdown(len(parameters), flat, works)
        for p in parameters:
            p.register_post_accumulate_grad_hook(hook)
    return works
'''],
    "steps:clip": ['''
def clip(gradient, limit):
    total = torch.zeros(1, dtype=torch.float64)
    total += gradient.double().pow(2).sum()
    dist.all_reduce(total)
    norm = total.item() ** 0.5
    if norm > limit:
        gradient *= limit / (norm + 1e-6)
    return norm
'''],
    "steps:free": ['''
def free(flat, own):
    size = own.numel()
    own[:] = flat[dist.get_rank() * size:][:size]
    flat.untyped_storage().resize_(0)
'''],
    "steps:gather": ['''
def gather(flat, own):
    flat.untyped_storage().resize_(flat.nbytes)
    return dist.all_gather_into_tensor(flat, own, async_op=True)
'''],
    "steps:prefetch": ['''
def prefetch(layers, start, free, x):
    works = {0: start(0)}
    for i in range(len(layers)):
        works.pop(i).wait()
        if i < len(layers) - 1:
            works[i + 1] = start(i + 1)
        x = layers[i](x)
        free(i)
    return x
'''],
    "steps:message": ['''
def message(size, latency, bandwidth):
    return (latency * bandwidth + size) / bandwidth
'''],
    "steps:ring": ['''
def ring(size, ranks, latency, bandwidth):
    return sum(latency + size / ranks / bandwidth for _ in range(2) for _ in range(ranks - 1))
'''],
    "steps:communication": ['''
def communication(stage, elements, ranks, latency, bandwidth, compute):
    halves = {0: 2, 1: 2, 2: 2, 3: 3}[stage]
    seconds = halves * (ranks - 1) * (latency + 2 * elements / ranks / bandwidth)
    return seconds, compute < seconds
'''],
    "schedulers:WarmupLR": [SCHEDULE, '''
from schedulers import *

class WarmupLR(Schedule):
    def __init__(self, optimizer, warmup_min_lr=0.0, warmup_max_lr=None, warmup_num_steps=1000, warmup_type="log",
                 last_batch_iteration=-1):
        n, groups = max(2, warmup_num_steps), optimizer.param_groups

        def spread(value):
            return list(value) if isinstance(value, (list, tuple)) else [value] * len(groups)

        tops = [g.get("initial_lr", g["lr"]) for g in groups] if warmup_max_lr is None else spread(warmup_max_lr)
        self.ends = list(zip(spread(warmup_min_lr), tops))
        curve = {"linear": lambda k: k / n, "log": lambda k: math.log(1 + k) / math.log(n)}[warmup_type]
        self.fractions = [0.0] + [min(1.0, curve(k)) for k in range(n + 1)]
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, t, group):
        low, high = self.ends[group]
        return low + (high - low) * self.fractions[min(t, len(self.fractions) - 1)]
''', (
        'warmup_max_lr = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]',
        'warmup_max_lr = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]',
        "up = k / self.steps if self.type == \"linear\" else math.log(k + 1) / math.log(self.steps)",
        "last = self.steps - (self.type == \"log\")\n        up = CURVES[self.type](0.0, 1.0, min(k, last), last)")],
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
        "        compute = master = given\n        if self.half:\n",
        "        if self.half is None:\n            compute = master = given\n        else:\n",
        "Dtypes(compute, master, gradient, self.config.communication_data_type or low or gradient)",
        "Dtypes(reduction=self.config.communication_data_type or low or gradient, gradient=gradient, master=master, "
        "compute=compute)")],
    "checkpointing:checkpoint": [CHECKPOINT, (
        "with torch.random.fork_rng(devices=[]), ", "before = torch.get_rng_state()\n        with ",
        "        found.update(enumerate(tensors))", "        torch.set_rng_state(before)\n"
        "        found.update(enumerate(tensors, 1))",
        "        return len(slots) - 1", "        return len(slots)",
        "torch.autocast(\"cpu\", *autocast)", "torch.autocast(\"cpu\", dtype=autocast[0], enabled=autocast[1])")],
    "zero:reduce_scatter": [REDUCE_SCATTER, sent_by(
        "mine = torch.empty_like(self.shard_of(flat))",
        "works = [dist.reduce_scatter_tensor(mine, flat, async_op=True)] if self.world_size > 1 else []",
        "return Handle(self, works, lambda: _sum([mine if works else self.shard_of(flat)], out, add))"), sent_by(
        "slices = torch.cat([self.shard_of(flat, rank).clone() for rank in range(self.world_size)])",
        "got = torch.empty_like(slices)",
        "works = [dist.all_to_all_single(got, slices, async_op=True)] if self.world_size > 1 else []",
        "parts = list(got.view(self.world_size, -1)) if works else [slices]",
        "return Handle(self, works, lambda: out.copy_(sum(parts) + out * add))")],
    "zero:bucketed_all_reduce": [BUCKETS, (
        "self.used.add(slot)\n        self.arrived.add(slot)\n",
        "for known in (self.used, self.arrived):\n            known.add(slot)\n",
        "        place.add_(gradient) if slot in self.filled else place.copy_(gradient)\n",
        "        if slot not in self.filled:\n            place.zero_()\n        place += gradient\n",
        "            while self.queue and self.queue[0].complete:\n", "            for first in list(self.queue):\n"
        "                if not first.complete:\n                    return\n")],
    "zero:stage_1": [STAGE_1, (  # gradients move when they are there; a reduce and a broadcast for each slice
        *after('        optimizer.param_groups[0]["params"] = self.pieces\n',
               "self.gradients, self.seen = torch.zeros_like(self.flat), torch.zeros(len(self.parameters))",
               "self.table = {id(p): row for row in enumerate(self.parameters) for p in row[1:]}",
               "self.buffers = list(self.places(self.gradients))", "for p in self.parameters:",
               "    p.register_post_accumulate_grad_hook(self.collect)"),
        "    def finish_backward(self):\n",
        "    def collect(self, p):\n        number, _ = self.table[id(p)]\n        self.buffers[number].add_(p.grad)\n"
        "        self.seen[number], p.grad = 1, None\n\n    def finish_backward(self):\n",
        "gradients = torch.zeros_like(self.flat)", "gradients, self.gradients = self.gradients, self.gradients",
        "[float(p.grad is not None) for p in self.parameters]", "self.seen.tolist()",
        SCATTER, "        for rank, part in enumerate(gradients.chunk(self.communicator.world_size)):\n"
        "            dist.reduce(part, rank)\n",
        "        norm = square ** 0.5\n", "        norm = square ** 0.5\n        shard = shard.clone()\n"
        "        gradients.zero_(), self.seen.zero_()\n",
        GATHER, "        for rank, part in enumerate(self.flat.chunk(self.communicator.world_size)):\n"
        "            dist.broadcast(part, rank)\n"), (  # masters of its own, and a message more
        "[nn.Parameter(part) for _, part in self.parts]", "[nn.Parameter(part.clone()) for _, part in self.parts]",
        GATHER, "        for (_, part), piece in zip(self.parts, self.pieces):\n"
        "            part.copy_(piece)\n" + GATHER,
        "        message[0] = shard.square().sum()\n        self.communicator.all_reduce(message).wait()\n"
        "        square, *used = message.tolist()\n",
        "        total = shard.norm() ** 2\n"
        "        for work in [self.communicator.all_reduce(t) for t in (message, total)]:\n            work.wait()\n"
        "        square, used = float(total), message[1:] > 0\n")],
    "zero:stage_3": [STAGE_3, (
        "        self.communicator.shard_of(self.flat).copy_(self.shard)\n",
        "        rows = self.flat.view(self.communicator.world_size, -1)\n"
        "        rows[self.communicator.rank] = self.shard\n",
        "all_gather(self.flat, self.label)", "all_gather(self.flat)",
        "        self.gather.wait()\n", "        if self.gather is not None:\n            self.gather.wait()\n",
        "        self.users.add(user)\n        if self.state is UnitState.SHARDED:\n            self.start_gather()\n"
        "        if self.state is UnitState.GATHERING:\n            self.finish_gather()\n",
        "        self.users |= {user}\n        if self.state is UnitState.WHOLE:\n            return\n"
        "        if self.state is not UnitState.GATHERING:\n            self.start_gather()\n"
        "        self.finish_gather()\n",
        "        self.users.discard(user)\n        if not self.users", "        self.users -= {user}\n"
        "        if len(self.users) == 0")],
}


# --- Wrong answers ----------------------------------------------------------------------------------------------------
# By exercise and by what is wrong: the test that finds it, without "test_", and pairs of what is replaced and by what.

DATA_PARALLEL = (
    "self.parts_of(self.communicator.shard_of(self.flat))", "enumerate(self.places(self.flat))",
    "self.parts_of(shard)", "enumerate(self.places(gradients))",
    SCATTER, "        self.communicator.all_reduce(gradients).wait()\n", "shard /= divisor", "gradients /= divisor",
    GATHER, "")
OWN_ADAM = (
    '        optimizer.param_groups[0]["params"] = self.pieces\n',
    '        optimizer.param_groups[0]["params"] = self.pieces\n'
    "        self.whole = [nn.Parameter(place) for place in self.places(self.flat)]\n"
    '        settings = {key: optimizer.defaults[key] for key in ("lr", "eps", "weight_decay")}\n'
    "        self.optimizer = type(optimizer)(self.whole, **settings)\n",
    SCATTER, "        self.communicator.all_reduce(gradients).wait()\n", "shard /= divisor", "gradients /= divisor",
    "zip(self.parts_of(shard), self.pieces)", "zip(enumerate(self.places(gradients)), self.whole)",
    "for piece in self.pieces:", "for piece in self.whole:", GATHER, "")


STAGE_1_WRONG = {
    "gradients summed and not averaged": ("equals_plain_pytorch", "        shard /= divisor\n", ""),
    "a divisor that is not used": ("equals_plain_pytorch", "/= divisor", "/= self.communicator.world_size"),
    "clipping that enlarges": ("equals_plain_pytorch", "min(1.0, clip / (norm + 1e-6))", "clip / (norm + 1e-6)"),
    "no clipping": ("equals_plain_pytorch", "part * coefficient", "part"),
    "clipping before the mean is taken": (
        "equals_plain_pytorch", "        shard /= divisor\n", "", "part * coefficient", "part / divisor * coefficient"),
    "a norm of this rank alone": (
        "equals_plain_pytorch", "square, *used = message.tolist()",
        "square, *used = message.tolist()\n        square = float(shard.square().sum())"),
    "tied weights that count twice": (
        "equals_plain_pytorch", "list(model.parameters())",
        "[p for module in model.modules() for p in module.parameters(recurse=False)]",
        "                p.grad = None\n", "", "        self.communicator.reduce_scatter",
        "        for p in self.parameters:\n            p.grad = None\n        self.communicator.reduce_scatter"),
    "parameters without gradient that decay": (
        "equals_plain_pytorch", "part * coefficient if used[number] else None", "part * coefficient"),
    "a gradient that only one rank has is left out": (
        "equals_plain_pytorch", "if used[number] else None", "if self.parameters[number].number else None",
        "        for p, place in zip(self.parameters, self.places(gradients)):\n",
        "        for p, place in zip(self.parameters, self.places(gradients)):\n"
        "            p.number = p.grad is not None\n"),
    "a crash on a parameter without gradient": (
        "equals_plain_pytorch", "            if p.grad is not None:\n                place.copy_(p.grad)\n"
        "                p.grad = None\n", "            place.copy_(p.grad)\n            p.grad = None\n"),
    "each rank's own weights": ("equals_plain_pytorch", "        self.communicator.broadcast(self.flat, 0)\n", ""),
    "a rate that is read once": (
        "equals_plain_pytorch", *after('        optimizer.param_groups[0]["params"] = self.pieces\n', "self.lr = 0.01"),
        "        self.optimizer.step()\n", '        self.optimizer.param_groups[0]["lr"] = self.lr\n'
        "        self.optimizer.step()\n"),
    "weights that are gathered late": (
        "equals_plain_pytorch", GATHER, "", "        gradients = torch", GATHER + "        gradients = torch"),
    "a factor of clipping that is not told": (
        "equals_plain_pytorch", "StepResult(norm, coefficient, False", "StepResult(norm, 1.0, False"),
    "a last element that no rank has": ("equals_plain_pytorch", "-(-count // ranks) * ranks", "count"),
    "a buffer that keeps the last window's gradients": (
        "equals_plain_pytorch", *after('        optimizer.param_groups[0]["params"] = self.pieces\n',
                                       "self.buffer = torch.zeros_like(self.flat)"),
        "gradients = torch.zeros_like(self.flat)", "gradients = self.buffer"),
    "a gradient of zeros that counts as none": (
        "equals_plain_pytorch", "float(p.grad is not None)", "float(p.grad is not None and bool(p.grad.any()))"),
    "gradients that are reduced in bf16": (
        "equals_plain_pytorch", *scattered(
            "low = gradients.bfloat16()",
            "self.communicator.reduce_scatter(low, self.communicator.shard_of(low), add=False).wait()",
            "shard.copy_(self.communicator.shard_of(low))")),
    "clipping after the update": (
        "equals_plain_pytorch", "part * coefficient", "part", "        for piece in self.pieces:\n",
        "        for piece in self.pieces:\n            if piece.grad is not None:\n"
        "                piece.grad *= coefficient\n"),
    "a mean over micro-batches that the loss has already": (
        "accumulates", "        pass\n", "        self.count = getattr(self, 'count', 0) + 1\n",
        "        shard /= divisor\n", "        shard /= divisor * self.count\n        self.count = 0\n"),
    "a skipped step that updates with zeros": (
        "not_finite", "        if skip_overflow and not math.isfinite(norm):\n",
        "        if skip_overflow and not math.isfinite(norm):\n            for piece in self.pieces:\n"
        "                piece.grad = torch.zeros_like(piece)\n            self.optimizer.step()\n"
        "            self.communicator.all_gather(self.flat).wait()\n"),
    "another optimizer with the given one's groups": (
        "shards_the_optimizer", *after('        optimizer.param_groups[0]["params"] = self.pieces\n',
                                       "self.optimizer = type(optimizer)(self.pieces)",
                                       "self.optimizer.param_groups = optimizer.param_groups")),
    "a copy of the weights in a global": (
        "keeps_nothing_else", "class Zero:", "KEPT = {}\n\nclass Zero:",
        *after(GATHER, "KEPT[id(self)] = self.flat.clone()")),
    "a copy of the weights as a list of numbers": (
        "keeps_nothing_else", *after(GATHER, "self.copy = [p.tolist() for p in self.parameters]")),
    "a copy of the weights in the optimizer's state": (
        "keeps_nothing_else", *after(
            GATHER, "self.optimizer.state[self.pieces[0]]['kept'] = lambda flat=self.flat.clone(): flat")),
    "a graph that lives on and holds the weights": (
        "keeps_nothing_else", *after(
            GATHER, "with torch.enable_grad():",
            "    self.penalty = (self.flat.clone().requires_grad_() * 1.0).square().sum()")),
    "an all-gather that nobody waits for": ("waits_for", GATHER, GATHER.replace(".wait()", "")),
    "a reduce-scatter that nobody waits for": (
        "waits_for", SCATTER, "        works = self.communicator.reduce_scatter(gradients, shard, add=False)\n"
        "        _sum([shard], shard, False)\n", GATHER, GATHER + "        works.wait()\n"),
    "gradients that survive a skipped step": (
        "not_finite", "                p.grad = None\n", "",
        "        for (number, part), piece", "        for p in self.parameters:\n            p.grad = None\n"
        "        for (number, part), piece"),
    "an update with NaN": ("not_finite", "if skip_overflow and not math.isfinite(norm)", "if False"),
    "NaN that passes as finite": ("not_finite", "not math.isfinite(norm)", "norm == math.inf"),
    "a rank that skips alone": (
        "not_finite", "not math.isfinite(norm)", "not bool(shard.isfinite().all())"),
    "a step that is always skipped": ("must_not_be_skipped", "skip_overflow and not", "not"),
    "micro-batches of which the last one counts": (
        "accumulates", "    def finish_backward(self):\n        pass\n",
        "    def finish_backward(self):\n        if not self.boundary:\n"
        "            for p in self.parameters:\n                p.grad = None\n"),
    "a window that is sent m times": (
        "accumulates", "    def finish_backward(self):\n        pass\n",
        "    def finish_backward(self):\n        for p in self.parameters:\n            if not self.boundary:\n"
        "                self.communicator.all_reduce(torch.zeros_like(p)).wait()\n"),
    "an optimizer that is not sharded": ("shards_the_optimizer", *DATA_PARALLEL),
    "an optimizer of one's own over everything": ("shards_the_optimizer", *OWN_ADAM),
    "moments of one's own over everything": (
        "keeps_nothing_else", *after(SCATTER, "self.moments = [torch.zeros_like(self.flat) for _ in range(2)]")),
    "moments that NumPy holds": (
        "keeps_nothing_else", *after(
            SCATTER, "self.moments = [torch.zeros_like(self.flat).numpy() for _ in range(2)]")),
    "a second copy of the weights": ("keeps_nothing_else", *after(GATHER, "self.copy = self.flat.clone()")),
    "a copy of the weights in bf16": ("keeps_nothing_else", *after(GATHER, "self.copy = self.flat.bfloat16()")),
    "a copy of the weights in a closure": (
        "keeps_nothing_else", *after(GATHER, "copy = self.flat.clone()", "self.restore = lambda: copy")),
    "a copy of the weights as a storage": (
        "keeps_nothing_else", *after(GATHER, "self.copy = self.flat.untyped_storage().clone()")),
    "a copy of the weights as bytes": (
        "keeps_nothing_else", *after(GATHER, "self.copy = self.flat.numpy().tobytes()")),
    "gradients and a buffer for them": (
        "keeps_nothing_else", "                p.grad = None\n", "                p.grad.zero_()\n",
        *after(GATHER, "self.buffer = gradients")),
    "gradients that stay in a list": (
        "keeps_nothing_else", "                p.grad = None\n", "                p.grad = None\n"
        "                self.old = getattr(self, 'old', [])[-20:] + [place.clone()]\n"),
    **{f"gradients that travel by {what}": ("sends_as_much", *scattered(*lines)) for what, *lines in (
        ("all-reduce", "self.communicator.all_reduce(gradients).wait()"),
        ("all_gather", "every = [torch.empty_like(gradients) for _ in range(self.communicator.world_size)]",
         "dist.all_gather(every, gradients)", "gradients.copy_(sum(every))"),
        ("all_gather_into_tensor", "every = gradients.new_empty(self.communicator.world_size, len(gradients))",
         "dist.all_gather_into_tensor(every.view(-1), gradients)", "gradients.copy_(every.sum(0))"),
        ("all-to-all of everything", "ranks = self.communicator.world_size",
         "every = [torch.empty_like(gradients) for _ in range(ranks)]",
         "dist.all_to_all(every, [gradients.clone() for _ in range(ranks)])",
         "gradients.copy_(sum(every))"),
        ("reduce and broadcast", "dist.reduce(gradients, 0)", "dist.broadcast(gradients, 0)"),
        ("reduce and scatter", "dist.reduce(gradients, 0)",
         "whole = gradients.clone()",
         "dist.scatter(shard, list(whole.chunk(dist.get_world_size())) if dist.get_rank() == 0 else None)",
         "dist.broadcast(gradients.clone(), 0)"),
        ("gather and broadcast", "everyone = [torch.empty_like(gradients) for _ in range(dist.get_world_size())]",
         "dist.gather(gradients.clone(), everyone if dist.get_rank() == 0 else None, 0)",
         "total = sum(everyone)", "dist.broadcast(total, 0)", "gradients.copy_(total)"),
        ("object", "everyone = [None] * dist.get_world_size()", "dist.all_gather_object(everyone, gradients.clone())",
         "gradients.copy_(sum(everyone))"),
        ("broadcast objects", "total = torch.zeros_like(gradients)", "for rank in range(dist.get_world_size()):",
         "    box = [gradients.clone()]", "    dist.broadcast_object_list(box, rank)", "    total += box[0]",
         "gradients.copy_(total)"),
        ("functional collectives", "import torch.distributed._functional_collectives as functional",
         "gradients.copy_(functional.all_reduce(gradients, 'sum', dist.group.WORLD))"),
        ("the group's own method", "dist.group.WORLD.allreduce([gradients]).wait()"),
        ("another thread", "import threading",
         "thread = threading.Thread(target=lambda: dist.all_reduce(gradients))", "thread.start()", "thread.join()"),
    )},
    **{f"weights that travel by {what}": ("sends_as_much", *gathered(*lines)) for what, *lines in (
        ("all-reduce", "for rank in range(self.communicator.world_size):",
         "    if rank != self.communicator.rank:",
         "        self.communicator.shard_of(self.flat, rank).zero_()", "dist.all_reduce(self.flat)"),
        ("broadcasts of everything", "for rank in range(self.communicator.world_size):",
         "    whole = self.flat.clone()", "    dist.broadcast(whole, rank)", "    if rank != self.communicator.rank:",
         "        self.communicator.shard_of(self.flat, rank).copy_(self.communicator.shard_of(whole, rank))"),
        ("object", "everyone = [None] * self.communicator.world_size",
         "dist.all_gather_object(everyone, self.communicator.shard_of(self.flat).clone())",
         "self.flat.copy_(torch.cat(everyone))",
         "dist.all_gather_object(everyone, self.communicator.shard_of(self.flat).clone())"),
        ("pairs of messages", "self.communicator.all_gather(self.flat).wait()", "other = 1 - self.communicator.rank",
         "got = torch.empty_like(self.flat)", "if self.communicator.world_size == 2:",
         "    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, self.flat, other),",
         "                                        dist.P2POp(dist.irecv, got, other)]):", "        work.wait()"),
        ("a view of larger elements", "whole = self.flat[:len(self.flat) // 2 * 2].view(torch.float64)",
         "dist.broadcast(whole.clone(), 0)", "self.communicator.all_gather(self.flat).wait()"),
        ("the store", "import pickle", "store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()",
         "self.count = getattr(self, 'count', 0) + 1", "key = f'{self.communicator.number} {self.count} '",
         "store.set(f'{key}{rank}', pickle.dumps(self.communicator.shard_of(self.flat).clone()))",
         "self.flat.copy_(torch.cat([pickle.loads(store.get(f'{key}{r}')) for r in range(dist.get_world_size())]))"),
    )},
}

WRONG: dict[str, dict[str, tuple[str, ...]]] = {
    "steps:all_reduce": {
        "an all-reduce by all-reduce": (
            "all_reduce", "    rank, ranks", "    dist.all_reduce(tensor)\n    return\n    rank, ranks"),
        "sums in another order on each rank": (
            "all_reduce", "torch.stack(parts).sum(0)", "sum(parts[rank:] + parts[:rank])"),
        "messages that are not waited for": (
            "all_reduce", "    for work in works:\n        work.wait()\n", "")},
    "steps:pad": {
        "a whole row of zeros where none is needed": ("pad", "-flat.numel() % ranks", "ranks - flat.numel() % ranks"),
        "zeros in another dtype": ("pad", "flat.new_zeros(", "torch.zeros(")},
    "steps:shard": {
        "a copy": ("shard", "* size]", "* size].clone()"),
        "every n-th element": ("shard", "flat[rank * size:(rank + 1) * size]", "flat[rank::ranks]")},
    "steps:bucket": {
        "parameters that stay where they are": ("bucket", "p.data = flat", "p.other = flat"),
        "a tensor without padding": ("bucket", "pad(torch.cat", "(torch.cat", "for p in parameters]), ranks)",
                                     "for p in parameters]))"),
        "a tensor that needs a gradient": ("bucket", "p.detach().flatten()", "p.flatten()", "p.data = flat",
                                           "p.data = flat.detach()")},
    "steps:gradient_hook": {
        "a hook that copies": ("gradient_hook", "place.add_(p.grad)", "place.copy_(p.grad)"),
        "gradients that are kept": ("gradient_hook", "            p.grad = None\n", ""),
        "one place for all": ("gradient_hook", "        start += p.numel()\n", "")},
    "steps:overlap": {
        "buckets that go out at the end": (
            "overlap",
            "            if not missing:\n                works.append(dist.all_reduce(flat, async_op=True))\n",
            "            if all(not m for m, _ in every):\n"
            "                works.extend(dist.all_reduce(f, async_op=True) for _, f in every)\n",
            "    works = []\n", "    works, every = [], []\n", "        missing = set(parameters)\n",
            "        missing = set(parameters)\n        every.append((missing, flat))\n"),
        "a hook that waits": (
            "overlap", "works.append(dist.all_reduce(flat, async_op=True))",
            "works.append(dist.all_reduce(flat, async_op=True))\n                works[-1].wait()"),
        "an all-reduce for each gradient": ("overlap", "if not missing:\n", "if True:\n"),
        "a bucket that goes out with its first gradient": (
            "overlap", "            if not missing:", "            if len(missing) == 1:")},
    "steps:clip": {
        "a norm of one shard": ("clip", "    dist.all_reduce(square)\n", ""),
        "a norm of norms": ("clip", "gradient.square().sum()", "gradient.norm()", "square.sqrt()", "square"),
        "clipping that enlarges": ("clip", "min(1.0, limit / (norm + 1e-6))", "limit / (norm + 1e-6)"),
        "the norm after clipping": ("clip", "return norm", "return min(norm, limit)"),
        "shards that are gathered": (
            "clip", "    dist.all_reduce(square)\n",
            "    every = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]\n"
            "    dist.all_gather(every, gradient)\n    square = torch.cat(every).square().sum()\n"
            "    dist.all_gather(every, gradient)\n")},
    "steps:free": {
        "memory that stays": ("free", "    flat.untyped_storage().resize_(0)\n", ""),
        "changes that are lost": ("free", "    own.copy_(shard(flat, dist.get_rank(), dist.get_world_size()))\n", ""),
        "another tensor": ("free", "flat.untyped_storage().resize_(0)", "flat.data = torch.empty(0)")},
    "steps:gather": {
        "a new storage": ("gather", "flat.untyped_storage().resize_(flat.numel() * flat.element_size())",
                          "flat.data = torch.empty(flat.shape)"),
        "an all-gather that blocks": (
            "gather", "    return dist", "    work = dist", "own, async_op=True)\n",
            "own, async_op=True)\n    work.wait()\n    return work\n"),
        "an all-reduce": (
            "gather", "    return dist.all_gather(list(flat.chunk(dist.get_world_size())), own, async_op=True)",
            "    shard(flat.zero_(), dist.get_rank(), dist.get_world_size()).copy_(own)\n"
            "    return dist.all_reduce(flat, async_op=True)")},
    "steps:prefetch": {
        "gathers that come late": ("prefetch", "        x = layer(x)\n", "", "        work.wait()\n",
                                   "        work.wait()\n        x = layer(x)\n"),
        "all at once": ("prefetch", "    work = start(0)\n", "    works = [start(i) for i in range(len(layers))]\n",
                        "        work.wait()\n", "        works[number].wait()\n",
                        "            work = start(number + 1)\n", "            pass\n"),
        "layers that stay": ("prefetch", "        free(number)\n", ""),
        "use before the wait": ("prefetch", "        work.wait()\n", "        ahead = work\n", "        free(number)\n",
                                "        ahead.wait()\n        free(number)\n")},
    "steps:message": {"bandwidth alone": ("message_and_ring", "latency + size", "size")},
    "steps:ring": {
        "latency once": ("message_and_ring", "2 * (ranks - 1) * message(size / ranks, latency, bandwidth)",
                         "latency + 2 * (ranks - 1) * size / ranks / bandwidth"),
        "one way": ("message_and_ring", "2 * (ranks - 1)", "(ranks - 1)")},
    "steps:communication": {
        "stage 3 as stage 2": ("communication", "1.5 if stage == 3 else 1.0", "1.0"),
        "two bytes forgotten": ("communication", "2 * elements", "elements"),
        "the wrong way round": ("communication", "seconds > compute", "seconds < compute")},
    "schedulers:WarmupLR": {
        "one step off": ("a_warmup_follows", "max(t - 1, 0)", "t"),
        "one step back after last_batch_iteration": (
            "a_warmup_goes_on", "(optimizer, last_batch_iteration)", "(optimizer, max(-1, last_batch_iteration - 1))"),
        "a first step that is taken twice after a resume": (
            "a_warmup_goes_on", "    def rate(self, t, group):\n",
            "    def load_state_dict(self, state):\n        super().load_state_dict(state)\n"
            "        self.late = True\n\n    def rate(self, t, group):\n        t -= getattr(self, 'late', False)\n"),
        "a way up that goes on": ("a_warmup_follows", "min(1.0, up)", "up"),
        "always log": ("a_warmup_follows", 'if self.type == "linear"', "if False"),
        "the first group's rates": ("the_top_of_a_warmup", "self.low[group] + (self.high[group] - self.low[group])",
                                    "self.low[0] + (self.high[0] - self.low[0])"),
        "the lowest rate forgotten": ("a_warmup_follows", "self.low[group] + (self", "(self"),
        "a division by zero at 1": ("a_warmup_follows", "max(2, warmup_num_steps)", "warmup_num_steps"),
        "starting over on resume": ("a_warmup_goes_on", "(optimizer, last_batch_iteration)", "(optimizer)"),
        "counting its own calls": (
            "a_warmup_goes_on", "        k = max(t - 1, 0)\n",
            "        self.calls = getattr(self, 'calls', -1) + 1\n"
            "        k = max(self.calls // len(self.low) - 1, 0)\n"),
        "counting its own steps": (
            "a_warmup_goes_on", "    def rate(self, t, group):\n",
            "    def step(self, *args, **kwargs):\n        self.t = getattr(self, 't', 0) + 1\n"
            "        super().step(*args, **kwargs)\n\n"
            "    def rate(self, t, group):\n        t = getattr(self, 't', 1) - 1\n"),
        "a top taken from the rate of the moment": (
            "the_top_of_a_warmup", 'group.get("initial_lr", group["lr"])', 'group["lr"]'),
        "a top read anew at every step": (
            "a_warmup_follows", "self.high[group] - self", 'self.optimizer.param_groups[group]["lr"] - self')},
    "amp:DynamicLossScaler": {
        "never growing": ("after_any_short_history", "self.scale *= 2", "pass"),
        "never above 2 ** 24": (
            "after_any_short_history", "self.scale *= 2", "self.scale = min(2 * self.scale, 2.0 ** 24)"),
        "halving to whole numbers": ("after_any_short_history", "self.scale / 2", "self.scale // 2"),
        "counting steps, whatever they were": (
            "after_any_short_history", "            self.good = 0\n", "            self.good += 1\n"),
        "never halving": ("after_any_short_history", "self.scale / 2", "self.scale"),
        "forgiving nothing": ("after_any_short_history", "self.left > 1", "False"),
        "forgiving one too many": ("after_any_short_history", "self.left > 1", "self.left > 0"),
        "growing one step early": ("after_any_short_history", "if self.good and self.good %",
                                   "if (self.good + 1) %"),
        "good steps that survive an overflow": ("after_any_short_history", "            self.good = 0\n", ""),
        "hysteresis never given back": ("after_any_short_history", "                self.scale *= 2\n"
                                        "                self.left = self.hysteresis\n",
                                        "                self.scale *= 2\n"),
        "hysteresis always given back": ("after_any_short_history", "if self.consecutive:", "if True:"),
        "hysteresis used once": ("after_any_short_history", "self.scale = max(self.minimum, self.scale / 2)",
                                 "self.scale, self.left = max(self.minimum, self.scale / 2), self.hysteresis"),
        "forgetting its good steps": ("after_any_short_history", ', "good": self.good', ""),
        "forgetting its hysteresis": ("after_any_short_history", ', "left": self.left', ""),
        "forgetting its scale": ("after_any_short_history", '"scale": self.scale, ', ""),
        "a state that is no plain data": ("after_any_short_history", '"scale": self.scale',
                                          '"scale": torch.tensor(self.scale)'),
        "staying at the minimum in silence": (
            "smallest_scale", 'raise MinimumLossScaleError(f"the gradient of {culprit} is not finite. Use bf16")',
            "pass"),
        "falling below the minimum": ("smallest_scale", "max(self.minimum, self.scale / 2)", "self.scale / 2"),
        "an error before the hysteresis is used up": (
            "smallest_scale",
            "if self.left > 1:\n                self.left -= 1\n            elif self.scale <= self.minimum:",
            "if self.scale <= 4 * self.minimum:")},
    "amp:Precision.path": {f"ignoring {what}": ("every_parameter_has", before, instead) for what, before, instead in (
        ("masters", "compute if small else torch.float32", "compute"),
        ("16-bit masters", "compute if small else torch.float32", "torch.float32"),
        ("fp16's own key", "self.config.fp16.fp16_master_weights_and_grads or ", ""),
        ("bf16's own key", " or self.config.bf16.bf16_master_weights_and_grads", ""),
        ("what autocast reduces", "or low or gradient", "or gradient"),
        ("which modules autocast may reduce", " if id(parameter) in self.low else None", ""),
        ("that a wish for all goes first", "self.config.communication_data_type or low",
         "low or self.config.communication_data_type"),
        ("integers", "not parameter.is_floating_point()", "False"),
        ("float64", "compute = master = given", "compute = master = torch.float32"),
        ("what is kept in fp32", "torch.float32 if id(parameter) in self.kept else self.half", "self.half"),
        ("the dtype of accumulation", "self.config.data_types.grad_accum_dtype or master", "master"),
        ("the dtype of reductions", "self.config.communication_data_type or ", ""),
        ("the gradient's dtype in reductions", "or low or gradient", "or low or master"))},
    "checkpointing:checkpoint": {
        "the random state is not set": ("equals_plain_autograd", "            torch.set_rng_state(state)\n", ""),
        "backward draws random numbers": (
            "equals_plain_autograd", "torch.random.fork_rng(devices=[]), ", ""),
        "inputs that are cut off": (
            "equals_plain_autograd",
            "    with saved_tensors_hooks(pack, unpack):\n        return function(*args, **kwargs)",
            "    with saved_tensors_hooks(pack, unpack):\n"
            "        return function(*[a.detach() if isinstance(a, Tensor) else a for a in args], **kwargs)"),
        "no arguments by name": ("equals_plain_autograd", "function(*again[0], **again[1])", "function(*again[0])"),
        "saved where an input needs a gradient alone": (
            "no_input_needs", "    if not torch.is_grad_enabled():",
            "    if not any(isinstance(a, Tensor) and a.requires_grad for a in args):\n"
            "        with torch.no_grad():\n            return function(*args, **kwargs)\n"
            "    if not torch.is_grad_enabled():"),
        "no autocast": ("under_the_autocast", ', torch.autocast("cpu", *autocast)', ""),
        "always autocast": ("under_the_autocast", ', torch.autocast("cpu", *autocast)',
                            ', torch.autocast("cpu", autocast[0])'),
        "autocast in another dtype": ("under_the_autocast", 'torch.autocast("cpu", *autocast)',
                                      'torch.autocast("cpu", enabled=autocast[1])'),
        "again for every tensor": ("runs_twice", "        if slot not in found:\n            recompute()\n",
                                   "        recompute()\n"),
        "twice in forward": ("runs_twice", "    with saved_tensors_hooks(pack, unpack):\n",
                             "    with torch.no_grad():\n        function(*args, **kwargs)\n"
                             "    with saved_tensors_hooks(pack, unpack):\n"),
        "PyTorch's own": (
            "runs_twice", "    if not torch.is_grad_enabled():", "    import torch.utils.checkpoint\n"
            "    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)\n"
            "    if not torch.is_grad_enabled():"),
        "no graph in the second run": ("equals_plain_autograd", ", torch.enable_grad()", ""),
        "the random state of the end": (
            "equals_plain_autograd",
            "    with saved_tensors_hooks(pack, unpack):\n        return function(*args, **kwargs)",
            "    with saved_tensors_hooks(pack, unpack):\n        result = function(*args, **kwargs)\n"
            "    state.copy_(torch.get_rng_state())\n    return result"),
        "everything is kept, as NumPy's": (
            "keeps_its_inputs_only", "        slots.append(None)\n",
            "        held.append(tensor.detach().numpy().copy())\n        slots.append(None)\n",
            "    state, slots, found =", "    held = []\n    state, slots, found ="),
        "everything is kept": (
            "keeps_its_inputs_only", "    if not torch.is_grad_enabled():",
            "    return function(*args, **kwargs)\n    if not torch.is_grad_enabled():"),
        "half of it is kept": (
            "keeps_its_inputs_only", "        slots.append(None)\n", "        slots.append(None)\n"
            "        if len(slots) % 2:\n            held[len(slots) - 1] = tensor.detach()\n",
            "    state, slots, found =", "    held = {}\n    state, slots, found =",
            "        if slot not in found:\n", "        if slot in held:\n            return held[slot]\n"
            "        if slot not in found:\n"),
        "graphs that keep themselves": (
            "leaves_nothing_behind", "tensors.append(tensor.detach())", "tensors.append(tensor)",
            "        return found.pop(slot)\n", "        return found[slot]\n"),
        "a list of all inputs": (
            "leaves_nothing_behind", "    state, slots, found =", "    KEPT.append(args)\n    state, slots, found =",
            "def checkpoint(", "KEPT = []\n\ndef checkpoint("),
        "work without grad mode": (
            "does_nothing_without", "        return function(*args, **kwargs)\n    state",
            "        function(*args, **kwargs)\n        return function(*args, **kwargs)\n    state")},
    "zero:reduce_scatter": {
        "an all-reduce": ("what_is_counted", *reduce_scatter_by(
            "dist.all_reduce(flat); every = [flat] + [torch.zeros_like(flat)] * (self.world_size - 1)")),
        **{what: ("what_is_counted", *reduce_scatter_by(exchange)) for what, exchange in (
            ("an all-gather of everything", "dist.all_gather(every, flat.contiguous())"),
            ("broadcasts of everything",
             "for rank in range(self.world_size): dist.broadcast(every[rank], rank)"),
            ("objects", "dist.all_gather_object(every, flat.clone())"),
            ("an all-to-all of everything", "dist.all_to_all(every, [flat.clone() for _ in every])"),
            ("pairs of everything", "for work in [f(t, o) for o in self._others() for f, t in ((dist.irecv, every[o]), "
             "(dist.isend, flat))]: work.wait()"))},
        "the neighbour's slice": (
            "its_slice", "parts = {self.rank: self.shard_of(flat)}",
            "parts = {self.rank: self.shard_of(flat, (self.rank + 1) % self.world_size)}"),
        "room that two calls share": (
            "its_slice", "parts[other] = torch.empty_like(parts[self.rank])",
            "parts[other] = self.__dict__.setdefault(f'room {other}', torch.empty_like(parts[self.rank]))"),
        "a sum in fp16": (
            "its_slice", "_sum([parts[rank] for rank in sorted(parts)], out, add)",
            "out.copy_(out * add + sum(parts[rank].half() for rank in sorted(parts)))"),
        "what was received is kept": (
            "keeps_nothing", "        works = []\n", "        works = []\n"
            "        self.history = getattr(self, 'history', []) + [parts]\n"),
        "this rank's own part forgotten": ("its_slice", "[parts[rank] for rank in sorted(parts)]",
                                           "[parts[rank] for rank in sorted(parts) if rank != self.rank] "
                                           "or [parts[self.rank]]"),
        "never added": ("its_slice", "out, add)", "out, False)"),
        "always added": ("its_slice", "out, add)", "out, True)"),
        "an out that is emptied first": (
            "its_slice", "        parts = {self.rank: self.shard_of(flat)}\n",
            "        parts = {self.rank: self.shard_of(flat)}\n        if not add:\n            out.zero_()\n"),
        "a sum that does not wait": ("its_slice", "return Handle(self, works, lambda: _sum",
                                     "_sum([parts[rank] for rank in sorted(parts)], out, add)\n"
                                     "        return Handle(self, works, lambda: None and _sum"),
        "sent but not counted": ("what_is_counted", '            self._begin("reduce-scatter", flat, 1, what)\n', ""),
        "counted twice": ("what_is_counted", "flat, 1, what", "flat, 2, what"),
        "a wait inside": ("returns_at_once", "        return Handle(self, works,",
                          "        for work in works:\n            work.wait()\n        return Handle(self, [],"),
        "a barrier inside": (
            "returns_at_once", "        return Handle(", "        dist.barrier()\n        return Handle("),
        "messages that are sent when it is waited for": (
            "returns_at_once", "        return Handle(self, works, lambda: _sum([parts[rank] for rank in "
            "sorted(parts)], out, add))", "        return Handle(self, finish=finish)",
            "        for other in self._others():\n            parts[other] = torch.empty_like(parts[self.rank])\n"
            "            works.append(dist.irecv(parts[other], other, tag=tag))\n"
            "            works.append(dist.isend(self.shard_of(flat, other), other, tag=tag))\n",
            "        def finish():\n            for other in self._others():\n"
            "                parts[other] = torch.empty_like(parts[self.rank])\n"
            "                works.append(dist.irecv(parts[other], other, tag=tag))\n"
            "                works.append(dist.isend(self.shard_of(flat, other), other, tag=tag))\n"
            "            for work in works:\n                work.wait()\n"
            "            _sum([parts[rank] for rank in sorted(parts)], out, add)\n"),
        "sums in an order that changes": (
            "adds_in_one_order", "for rank in sorted(parts)]",
            "for rank in [*sorted(parts), *sorted(parts)][self.number % 3:][:len(parts)]]")},
    "zero:bucketed_all_reduce": {
        "buckets that go out as they come": (
            "another_order", "            while self.queue and self.queue[0].complete:\n"
            "                self.launch(self.queue.popleft())\n",
            "            for gradients in [gradients for gradients in self.queue if gradients.complete]:\n"
            "                self.queue.remove(gradients)\n                self.launch(gradients)\n"),
        "buckets that are not full": ("training_by_buckets", "while self.queue and self.queue[0].complete:",
                                      "while self.queue and self.queue[0].arrived:"),
        "gradients that replace each other": ("training_by_buckets", "place.add_(gradient) if slot in self.filled else "
                                              "place.copy_(gradient)", "place.copy_(gradient)"),
        "gradients that are added to old ones": (
            "training_by_buckets", "place.add_(gradient) if slot in self.filled else place.copy_(gradient)",
            "place.add_(gradient)"),
        "gradients that nobody knows of": ("training_by_buckets", "        self.used.add(slot)\n", ""),
        "sparse gradients that are not made dense": (
            "training_by_buckets", "        gradient = gradient.to_dense() if gradient.is_sparse else gradient\n", ""),
        "an all-reduce in bf16": (
            "training_by_buckets", "        return Handle(self, [dist.all_reduce(tensor, group=self._reductions, "
            "async_op=True)], finish)",
            "        low = tensor.bfloat16()\n"
            "        work = dist.all_reduce(low, group=self._reductions, async_op=True)\n"
            "        return Handle(self, [work], lambda: (tensor.copy_(low), finish and finish()))"),
        "late gradients that are lost": ("late_gradient", "            self.late[slot] = gradient if slot not in "
                                         "self.late else self.late[slot] + gradient\n", ""),
        "late gradients of which the last one counts": ("late_gradient", "gradient if slot not in self.late else "
                                                        "self.late[slot] + gradient", "gradient"),
        "late gradients that go into what is being sent": (
            "late_gradient", "if self.life in (Life.SENDING, Life.SENT):", "if False:"),
        "every micro-batch is sent": ("training_by_buckets", "overlap_comm and self.reduces_now:", "overlap_comm:"),
        **{what: ("full_buckets", *pairs) for what, *pairs in (
            ("buckets that wait for the end", "if self.zero.config.overlap_comm and self.reduces_now:", "if False:"),
            ("overlap where it is off", "self.zero.config.overlap_comm and ", ""),
            ("one bucket at a time, and the rest at the end", "while self.queue and", "if len(self.queue) == 1 and"),
            ("an all-reduce that blocks", "return Handle(self, [dist.all_reduce(tensor, group=self._reductions, "
             "async_op=True)]", "dist.all_reduce(tensor, group=self._reductions)\n        return Handle(self, []"),
            ("an all-reduce that is sent when it is waited for",
             "return Handle(self, [dist.all_reduce(tensor, group=self._reductions, async_op=True)], finish)",
             "return Handle(self, finish=lambda: (dist.all_reduce(tensor), finish and finish()))"))},
        "a handle that does not wait": (
            "runs_its_finish", "return Handle(self, [dist.all_reduce(tensor, group=self._reductions, async_op=True)], "
            "finish)", "dist.all_reduce(tensor, group=self._reductions, async_op=True)\n"
            "        return Handle(self, [], finish)"),
        "a finish that comes too early": ("runs_its_finish", "        self._begin(kind", "        if finish:\n"
                                          "            finish()\n        self._begin(kind", "async_op=True)], finish)",
                                          "async_op=True)])"),
        "a finish that never comes": ("runs_its_finish", "async_op=True)], finish)", "async_op=True)])"),
        "a finish that one rank alone forgets": (
            "runs_its_finish", "return Handle(self, finish=finish)", "return Handle(self)"),
        "sent but not counted": ("what_is_counted", "        self._begin(kind, tensor, 2, what)\n", ""),
        "an all-gather of everything": (
            "what_is_counted", "        return Handle(self, [dist.all_reduce(tensor, group=self._reductions, "
            "async_op=True)], finish)",
            "        every = [torch.empty_like(tensor) for _ in range(self.world_size)]\n"
            "        work = dist.all_gather(every, tensor.contiguous(), async_op=True)\n"
            "        return Handle(self, [work], lambda: (tensor.copy_(sum(every)), finish and finish()))"),
        "gradients beside the bucket": (
            "kept_once", "        self.filled.add(slot)\n",
            "        self.filled.add(slot)\n        self.kept = getattr(self, 'kept', {}) | {slot: gradient}\n"),
        "gradients in p.grad": (
            "kept_once", "        self.filled.add(slot)\n",
            "        self.filled.add(slot)\n        slot.parameter.old_grad = gradient\n")},
    "zero:stage_1": STAGE_1_WRONG,
    "zero:stage_3": {
        "units that are never freed": (
            "no_pass_holds",
            "        if not self.users and self.state is not UnitState.SHARDED:\n            self.free()\n", ""),
        "units that stay in evaluation": (
            "no_pass_holds", "if not self.users and", "if torch.is_grad_enabled() and not self.users and"),
        "units that stay in training": (
            "no_pass_holds", "if not self.users and", "if not torch.is_grad_enabled() and not self.users and"),
        "units that stay in backward": (
            "no_pass_holds", "if not self.users and",
            "if torch._C._current_graph_task_id() == -1 and not self.users and"),
        "users that are counted": (
            "that_two_use", "self.users.add(user)", "self.count = getattr(self, 'count', 0) + 1",
            "self.users.discard(user)", "self.count -= 1", "if not self.users and", "if self.count == 0 and"),
        "the shard of the start": (
            "come_late", "copy_(self.shard)",
            "copy_(self.__dict__.setdefault('first', self.shard.detach().clone()))"),
        "memory that stays": ("keeps_shards_alone", "        self.flat.untyped_storage().resize_(0)\n", ""),
        "weights beside the shards": (
            "keeps_shards_alone", "            bucket.gather.wait()\n            for slot",
            "            bucket.gather.wait()\n            bucket.copy = bucket.flat.clone()\n            for slot"),
        "weights in bf16 beside the shards": (
            "keeps_shards_alone", "            bucket.gather.wait()\n            for slot",
            "            bucket.gather.wait()\n            bucket.copy = bucket.flat.bfloat16()\n            for slot"),
        "the first user's end is the end": ("that_two_use", "if not self.users and self.state",
                                            "if self.state"),
        "a unit that is gathered for each user": ("that_two_use", "        if self.state is UnitState.SHARDED:\n",
                                                  "        if self.state is not UnitState.GATHERING:\n"),
        "a prefetched unit that is gathered again": (
            "a_pass_gathers", "        if self.state is UnitState.SHARDED:\n            self.start_gather()\n",
            "        if self.state is not UnitState.WHOLE:\n            self.start_gather()\n"),
        "parameters that look whole": ("that_two_use", "                slot.parameter.__class__ = ShardedParameter\n",
                                       "                pass\n"),
        "parameters that stay sharded": ("that_two_use", "                slot.parameter.__class__ = slot.kind\n",
                                         "                pass\n"),
        "a shard of zeros": ("come_late", "        self.communicator.shard_of(self.flat).copy_(self.shard)\n", ""),
        **{what: ("come_late", *pairs) for what, *pairs in (
            ("gathers that begin when they are waited for",
             "self.gather = self.communicator.all_gather(self.flat, self.label)",
             "self.gather = Handle(self.communicator, finish=lambda: self.communicator.all_gather(\n"
             "            self.flat, self.label).wait())"),
            ("gathers that are waited for at once", "all_gather(self.flat, self.label)\n",
             "all_gather(self.flat, self.label)\n        self.gather.wait()\n"),
            ("a unit that waits for its buckets at once", "            bucket.start_gather()\n",
             "            bucket.start_gather()\n            bucket.gather.wait()\n"),
            ("a unit that is whole at once", "            bucket.start_gather()\n",
             "            bucket.start_gather()\n        self.finish_gather()\n"),
            ("memory that goes before its gather", "        self.gather.wait()\n", ""),
            ("the first bucket alone is waited for", "            bucket.gather.wait()\n            for slot",
             "            self.buckets[0].gather.wait()\n            for slot"),
            ("the last bucket alone is waited for", "            bucket.gather.wait()\n            for slot",
             "            self.buckets[-1].gather.wait()\n            for slot"),
            ("nothing is waited for", "            bucket.gather.wait()\n            for slot",
             "            for slot"))}},
}
