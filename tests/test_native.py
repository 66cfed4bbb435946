"""The collectives that NCCL uses, on the CPU: gloo has them too, and the product's own exchange is for gloo alone.

NCCL's contract is imitated: until wait() an output is garbage, an input must not change and its memory must be there,
and each collective is waited for once.
"""

import itertools
from contextlib import contextmanager

import engine as deepspeed
import pytest
import torch
import torch.distributed as dist
import zero
from torch import nn

NAMES = [name for name in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single",
                           "reduce_scatter_tensor", "all_reduce", "broadcast", "reduce") if hasattr(dist, name)]


class Late:
    """A collective that is done, whose output shows it at wait() alone."""

    def __init__(self, output, result, inputs, open_works):
        self.output, self.result, self.inputs, self.open = output, result, [(t, t.clone()) for t in inputs], open_works
        output.fill_(float("nan") if output.is_floating_point() else 77)
        self.open.append(self)

    def wait(self):
        assert self in self.open, "waited twice"
        self.open.remove(self)
        assert self.output.untyped_storage().nbytes(), "memory went while a collective was in flight"
        for now, before in self.inputs:
            assert torch.equal(now, before), "an input changed in flight"
        self.output.copy_(self.result)


def poisoned(real: dict, open_works: list):
    """The collectives, each with a result that comes late."""
    def others(flat):
        size, rank = flat.numel() // dist.get_world_size(), dist.get_rank()
        return [flat[:rank * size], flat[(rank + 1) * size:]]

    def all_gather(output, own, group=None, async_op=False):
        assert async_op
        result, own = torch.empty_like(output), own.clone()
        real["all_gather_into_tensor"](result, own, group=group)
        work = Late(output, result, [], open_works)
        output[dist.get_rank() * own.numel():][:own.numel()] = own
        work.inputs = [(output[dist.get_rank() * own.numel():][:own.numel()], own)]
        return work

    def reduce_scatter(output, flat, op=dist.ReduceOp.SUM, group=None, async_op=False):
        assert async_op
        result = torch.empty_like(output)
        real["reduce_scatter_tensor"](result, flat.clone(), group=group)
        return Late(output, result, others(flat), open_works)

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        result = tensor.clone()
        real["all_reduce"](result, group=group)
        if async_op:
            return Late(tensor, result, [], open_works)
        return tensor.copy_(result)

    def broadcast(tensor, src, group=None, async_op=False):
        if not async_op:
            return real["broadcast"](tensor, src, group=group)
        result = tensor.clone()
        real["broadcast"](result, src, group=group)
        if src != dist.get_rank():
            return Late(tensor, result, [], open_works)
        return Late(torch.empty(1), torch.zeros(1), [tensor], open_works)

    def reduce(tensor, dst, group=None, async_op=False):
        assert async_op
        result = tensor.clone()
        real["reduce"](result, dst, group=group)
        if dst == dist.get_rank():
            return Late(tensor, result, [], open_works)
        return Late(torch.empty(1), torch.zeros(1), [tensor], open_works)

    return {"broadcast": broadcast, "reduce": reduce, "all_gather_single": all_gather, "all_gather_into_tensor": all_gather, "all_reduce": all_reduce,
            "reduce_scatter_single": reduce_scatter, "reduce_scatter_tensor": reduce_scatter}


@contextmanager
def collectives(late: bool):
    """PyTorch's collectives in place of the exchange between gloo ranks; ``late``: under NCCL's contract."""
    prepare, real, open_works = zero.Communicator._prepare, {name: getattr(dist, name) for name in NAMES}, []

    def native(self, rank, world_size, device, direct):
        prepare(self, rank, world_size, device, direct=False)

    zero.Communicator._prepare = native
    for name in NAMES if late else ():
        setattr(dist, name, poisoned(real, open_works)[name])
    try:
        yield
        assert not open_works, "collectives that nobody waited for"
    finally:
        zero.Communicator._prepare = prepare
        for name in NAMES:
            setattr(dist, name, real[name])


def model_of(seed: int):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)) for _ in range(4)])


def batch(step: int, rank: int):
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(100 * step + rank))


ADAMW = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}
CASES = [dict(zip(("whole", "bf16", "accumulate", "recompute", "offload"), flags))  # whole: parameters are not cut
         for flags in itertools.product([False, True], repeat=5)]


def trained(stage: int, case: dict, late: bool, steps: int = 3):
    """The weights after some steps, and the traffic of the last one by kind."""
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2 if case["accumulate"] else 1,
              "gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": ADAMW},
              "zero_optimization": {"stage": stage, "reduce_bucket_size": 600}}
    if case["whole"]:
        config["optimizer"] = {"type": "Lamb", "params": {"lr": 0.01}}
    if case["bf16"]:
        config |= {"bf16": {"enabled": True, "auto_cast": True}, "communication_data_type": "bf16"}
    if case["recompute"]:
        config["activation_checkpointing"] = {}
    if case["offload"]:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    with collectives(late):
        engine, *_ = deepspeed.initialize(model=model_of(0), config=config)
        for step in range(steps * engine.gradient_accumulation_steps()):
            if step == (steps - 1) * engine.gradient_accumulation_steps():
                engine.zero.communicator.traffic.clear()
            engine.backward(engine(batch(step, dist.get_rank())).float().square().mean())
            engine.step()
        weights = [zero.safe_get_full_fp32_param(p) for p in engine.module.parameters()]
        traffic = {kind: record.elements for kind, record in engine.zero.communicator.traffic.items()}
        count = sum(bucket.numel for bucket in engine.zero.buckets)
        engine.destroy()
    return weights, traffic, count


def as_under_nccl(stage: int, chosen: list):
    """For each case, whether late results change any bit, and what the first case trained and sent."""
    same = [all(map(torch.equal, trained(stage, case, late=False)[0], trained(stage, case, late=True)[0]))
            for case in chosen]
    return same, *trained(stage, CASES[0], late=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nccls_collectives_train_the_same_whenever_their_results_come(run_ranks, stage, request):
    ranks, reference = 2, model_of(0)
    optimizer = torch.optim.AdamW(reference.parameters(), **ADAMW)
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(ranks):
            (reference(batch(step, rank)).square().mean() / ranks).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
    chosen = CASES if request.config.getoption("--long") else [CASES[0], CASES[stage + 6], CASES[31 - stage]]
    for same, weights, traffic, count in run_ranks(as_under_nccl, ranks, stage, chosen):
        wrong = [case for case, is_same in zip(chosen, same) if not is_same]
        assert not wrong, f"stage {stage}: a result was used before wait(), or an input changed, with {wrong}"
        for mine, (name, p) in zip(weights, reference.named_parameters()):
            difference = float((mine - p.detach()).abs().max())
            assert difference < 1e-6, f"stage {stage}: {name} differs from plain PyTorch by {difference:.3g}"
        sent = sum(elements for kind, elements in traffic.items() if kind != "scalars")
        assert sent == {0: 2, 1: 2, 2: 2, 3: 3}[stage] * count * (ranks - 1) // ranks, f"stage {stage}: {traffic}"


def groups_left():
    """How many process groups there are: at first, with two users, after one has left, after both have."""
    counts, groups = [len(dist.distributed_c10d._world.pg_map)], zero.Groups.current()
    for call in (groups.join, groups.join, groups.leave, groups.leave):
        call(*(torch.device("cpu"), None) if call == groups.join else ())
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts, zero.gather(dist.get_rank())


def test_engines_share_their_groups_and_the_last_one_ends_them(run_ranks):
    for counts, every in run_ranks(groups_left, 2):
        first = counts[0]
        assert counts == [first, first + 2, first + 2, first + 2, first] and every == [0, 1]
