"""Right answers to the exercises, by exercise: the first one by following the hints, the others in styles of their own.

test_grade.py sees each pass, and makes wrong answers of the first ones.
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

RIGHT: dict[str, list[str]] = {  # for steps.py stands itself as the first one
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
''', '''
class WarmupLR(Schedule):
    def __init__(self, optimizer: Optimizer, warmup_min_lr: Rates = 0.0, warmup_max_lr: Rates | None = None,
                 warmup_num_steps: int = 1000, warmup_type: str = "log", last_batch_iteration: int = -1):
        self.settings = {"warmup_min_lr": warmup_min_lr, "warmup_max_lr": warmup_max_lr,
                         "warmup_num_steps": warmup_num_steps, "warmup_type": warmup_type}
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        super().__init__(optimizer, last_batch_iteration)

    def of(self, name, group):
        value = self.settings[name]
        if value is None:
            return self.optimizer.param_groups[group]["initial_lr"]
        return value[group] if isinstance(value, list) else value

    def height(self, t):
        kind = self.settings["warmup_type"]
        last = max(2, self.settings["warmup_num_steps"]) - (kind == "log")
        return CURVES[kind](0.0, 1.0, min(max(t - 1, 0), last), last)

    def rate(self, t, group):
        low = self.of("warmup_min_lr", group)
        return low + (self.of("warmup_max_lr", group) - low) * self.height(t)
'''],
    "amp:DynamicLossScaler": [SCALER, '''
class DynamicLossScaler(LossScaler):
    def __init__(self, scale, window, hysteresis, consecutive, minimum):
        self.__dict__.update(scale=float(scale), window=window, hysteresis=hysteresis, consecutive=consecutive,
                             minimum=minimum, spent=0, step=0, last=-1)

    def update(self, overflow, culprit=None):
        good = self.step - self.last - 1
        self.step += 1
        if not overflow:
            doubles = good > 0 and good % self.window == 0
            self.scale *= 2.0 if doubles else 1.0
            self.spent = 0 if doubles or self.consecutive else self.spent
            return
        self.last = self.step - 1
        if self.spent < self.hysteresis - 1:
            self.spent += 1
            return
        if self.scale == self.minimum:
            raise MinimumLossScaleError("the loss scale can't fall any more")
        self.scale = max(self.scale * 0.5, self.minimum)

    def state_dict(self):
        return {name: getattr(self, name) for name in ("scale", "spent", "step", "last")}
''', '''
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
    "amp:Precision.path": [PATH, '''
class Precision:
    def path(self, parameter):
        if not parameter.dtype.is_floating_point:
            return Dtypes(*[parameter.dtype] * 4)
        c, key = self.config, id(parameter)
        if self.half is None:
            compute = master = parameter.dtype
        elif key in self.kept:
            compute = master = torch.float32
        elif c.fp16.fp16_master_weights_and_grads or c.bf16.bf16_master_weights_and_grads:
            compute = master = self.half
        else:
            compute, master = self.half, torch.float32
        gradient = master if c.data_types.grad_accum_dtype is None else c.data_types.grad_accum_dtype
        if c.communication_data_type is not None:
            reduction = c.communication_data_type
        elif key in self.low:
            reduction = c.torch_autocast.dtype
        else:
            reduction = gradient
        return Dtypes(compute=compute, master=master, gradient=gradient, reduction=reduction)
'''],
    "checkpointing:checkpoint": [CHECKPOINT, '''
class Region:
    def __init__(self, function, args, kwargs):
        self.call, self.count, self.tensors = (function, args, kwargs), 0, {}
        self.random = torch.get_rng_state()
        self.casts = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def number(self, tensor):
        self.count += 1
        return self.count

    def tensor(self, number):
        if number not in self.tensors:
            self.run_again()
        return self.tensors.pop(number)

    def run_again(self):
        function, args, kwargs = self.call
        saved = []

        def keep(tensor):
            saved.append(tensor.detach())
            return len(saved)

        def fresh(value):
            return value.detach().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value

        enabled, dtype = self.casts
        before = torch.get_rng_state()
        try:
            torch.set_rng_state(self.random)
            with torch.enable_grad(), torch.autocast("cpu", dtype=dtype, enabled=enabled):
                with saved_tensors_hooks(keep, lambda number: saved[number - 1]):
                    function(*map(fresh, args), **{name: fresh(value) for name, value in kwargs.items()})
        finally:
            torch.set_rng_state(before)
        self.tensors = {number: tensor for number, tensor in enumerate(saved, 1)}

def checkpoint(function, *args, **kwargs):
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    region = Region(function, args, kwargs)
    with saved_tensors_hooks(region.number, region.tensor):
        return function(*args, **kwargs)
'''],
    "zero:reduce_scatter": [REDUCE_SCATTER, '''
class Communicator:
    def reduce_scatter(self, flat, out, add, what=str, bounds=None):
        mine = torch.empty_like(self.shard_of(flat))
        works = []
        if self.world_size == 1:
            mine.copy_(flat)
        else:
            self._begin("reduce-scatter", flat, 1, what)
            works.append(dist.reduce_scatter_tensor(mine, flat, async_op=True))

        def finish():
            out.add_(mine) if add else out.copy_(mine)

        return Handle(self, works, finish)
''', '''
class Communicator:
    def reduce_scatter(self, flat, out, add, what=str, bounds=None):
        slices = [self.shard_of(flat, rank).clone() for rank in range(self.world_size)]
        if self.world_size > 1:
            self._begin("reduce-scatter", flat, 1, what)
        got = torch.empty_like(torch.cat(slices))
        works = [dist.all_to_all_single(got, torch.cat(slices), async_op=True)] if self.world_size > 1 else []

        def finish():
            rows = got.view(self.world_size, -1) if works else slices[0][None]
            total = rows[0].clone()
            for row in rows[1:]:
                total += row
            out.copy_(out + total if add else total)

        return Handle(self, works, finish)
'''],
    "zero:bucketed_all_reduce": [BUCKETS, '''
class Communicator:
    def all_reduce(self, tensor, kind="all-reduce", finish=None, what=str):
        works = []
        if self.world_size > 1:
            self._begin(kind, tensor, 2, what)
            works = [dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self._reductions, async_op=True)]
        return Handle(communicator=self, works=works, finish=finish)

class Gradients:
    def take(self, slot, gradient):
        for known in (self.used, self.arrived):
            known.add(slot)
        if self.life is Life.SENDING or self.life is Life.SENT:
            kept = self.late.get(slot)
            self.late[slot] = gradient if kept is None else kept + gradient
        else:
            self._prepare_buffer()
            place = slot.view(self.buffer)
            if slot not in self.filled:
                place.zero_()
            place += gradient.to_dense() if gradient.is_sparse else gradient
            self.filled.add(slot)

class Reducer:
    def launch_ready(self):
        early = self.zero.config.overlap_comm and self.reduces_now
        while early and len(self.queue) > 0:
            first = self.queue[0]
            if not first.complete:
                return
            self.queue.popleft()
            self.launch(first)
'''],
    "zero:stage_1": [STAGE_1, '''
class Zero:
    def __init__(self, model, optimizer, config, device):
        self.model, self.optimizer = model, optimizer
        self.communicator = Communicator(device)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        ps = [p for p in dict.fromkeys(model.parameters())]
        ends = list(accumulate(p.numel() for p in ps))
        size = (ends[-1] + self.ranks - 1) // self.ranks
        self.weights = torch.cat([p.detach().flatten() for p in ps] + [torch.zeros(size * self.ranks - ends[-1])])
        dist.broadcast(self.weights, 0)
        self.gradients = torch.zeros_like(self.weights)
        self.table = []  # parameter, its place among gradients, its part here, where that lies
        begin, end = self.rank * size, (self.rank + 1) * size
        for p, stop in zip(ps, ends):
            start = stop - p.numel()
            p.data = self.weights[start:stop].view_as(p)
            lo, hi = max(start, begin), min(stop, end)
            part = nn.Parameter(self.weights[lo:hi]) if lo < hi else None
            self.table.append((p, self.gradients[start:stop], part, slice(lo, hi)))
            p.register_post_accumulate_grad_hook(self.collect)
        self.places = {id(p): place for p, place, *_ in self.table}
        self.seen = torch.zeros(len(ps))
        self.number = {id(p): number for number, p in enumerate(ps)}
        optimizer.param_groups[0]["params"] = [part for *_, part, _ in self.table if part is not None]

    def collect(self, p):
        self.places[id(p)].add_(p.grad.flatten())
        self.seen[self.number[id(p)]] = 1
        p.grad = None

    def finish_backward(self):
        return None

    @torch.no_grad()
    def step(self, clip=0.0, divisor=1.0, skip_overflow=True):
        own = self.gradients.chunk(self.ranks)[self.rank]
        for rank, piece in enumerate(self.gradients.chunk(self.ranks)):
            dist.reduce(piece, rank)
        own.div_(divisor)
        counts = torch.cat([own.double().square().sum()[None], self.seen.double()])
        dist.all_reduce(counts)
        norm = math.sqrt(counts[0]) if counts[0] == counts[0] else math.nan
        factor = 1.0
        if clip and norm > clip:
            factor = clip / (norm + 1e-6)
        skip = skip_overflow and not math.isfinite(norm)
        if not skip:
            for (p, _, part, where), used in zip(self.table, counts[1:].tolist()):
                if part is not None:
                    part.grad = self.gradients[where].mul_(factor) if used else None
            self.optimizer.step()
            for rank, piece in enumerate(self.weights.chunk(self.ranks)):
                dist.broadcast(piece, rank)
            for *_, part, _ in self.table:
                if part is not None:
                    part.grad = None
        self.gradients.zero_()
        self.seen.zero_()
        return StepResult(norm, factor, skip, None)
''', '''
class Zero:
    @torch.no_grad()
    def __init__(self, model, optimizer, config, device):
        self.communicator, self.optimizer = Communicator(device), optimizer
        self.params = list(model.parameters())
        for p in self.params:
            self.communicator.broadcast(p.data, 0)
        self.flat = self.cat([p.data for p in self.params])
        for p, view in zip(self.params, self.cut(self.flat)):
            p.data = view
        self.mine = []
        start = self.communicator.rank * self.flat.numel() // self.communicator.world_size
        position = 0
        for index, p in enumerate(self.params):
            low = max(position, start)
            high = min(position + p.numel(), start + self.flat.numel() // self.communicator.world_size)
            if low < high:
                self.mine.append((index, low - start, high - start, nn.Parameter(self.flat[low:high].clone())))
            position += p.numel()
        optimizer.param_groups[0]["params"] = [piece for *_, piece in self.mine]

    def cat(self, tensors):
        flat = torch.cat([t.reshape(-1) for t in tensors])
        return torch.cat([flat, flat.new_zeros(-len(flat) % self.communicator.world_size)])

    def cut(self, flat):
        sizes = [p.numel() for p in self.params]
        return [t.view(p.shape) for t, p in zip(flat.split([*sizes, len(flat) - sum(sizes)]), self.params)]

    def finish_backward(self):
        pass

    @torch.no_grad()
    def step(self, clip=0.0, divisor=1.0, skip_overflow=True):
        used = torch.tensor([0.0 if p.grad is None else 1.0 for p in self.params])
        flat = self.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params])
        for p in self.params:
            p.grad = None
        handles = [self.communicator.all_reduce(used)]
        shard = torch.empty(len(flat) // self.communicator.world_size)
        handles.append(self.communicator.reduce_scatter(flat, shard, False))
        for handle in handles:
            handle.wait()
        shard /= divisor
        square = shard.norm() ** 2
        self.communicator.all_reduce(square).wait()
        norm = float(square.sqrt())
        if skip_overflow and (norm != norm or norm == math.inf):
            return StepResult(norm, 1.0, True, None)
        coefficient = 1.0 if clip == 0 else min(1.0, clip / (norm + 1e-6))
        for index, low, high, piece in self.mine:
            if used[index] > 0:
                piece.grad = coefficient * shard[low:high]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for _, low, high, piece in self.mine:
            self.communicator.shard_of(self.flat)[low:high] = piece
        self.communicator.all_gather(self.flat).wait()
        return StepResult(norm, coefficient, False, None)
'''],
    "zero:stage_3": [STAGE_3, '''
class Bucket:
    def start_gather(self):
        storage = self.flat.untyped_storage()
        storage.resize_(self.flat.nbytes)
        own = self.communicator.shard_of(self.flat)
        own.copy_(self.shard)
        self.gather = self.communicator.all_gather(self.flat)

    def free(self):
        if self.gather is not None:
            self.gather.wait()
        self.flat.untyped_storage().resize_(0)

class Unit:
    def start_gather(self):
        if self.state is not UnitState.SHARDED:
            return
        for bucket in self.buckets:
            bucket.start_gather()
        self.state = UnitState.GATHERING

    def finish_gather(self):
        for bucket in self.buckets:
            bucket.gather.wait()
        for slot in (slot for bucket in self.buckets for slot in bucket.slots):
            slot.parameter.__class__ = slot.kind
        self.state = UnitState.WHOLE

    def free(self):
        for slot in (slot for bucket in self.buckets for slot in bucket.slots):
            slot.parameter.__class__ = ShardedParameter
        for bucket in self.buckets:
            bucket.free()
        self.state = UnitState.SHARDED

    def acquire(self, user):
        if not user in self.users:
            self.users |= {user}
        self.start_gather()
        if self.state is UnitState.WHOLE:
            return
        self.finish_gather()

    def release(self, user):
        if user in self.users:
            self.users.remove(user)
        if len(self.users) == 0 and self.state != UnitState.SHARDED:
            self.free()
'''],
}
