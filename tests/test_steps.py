"""The ten small steps, and what communication costs in time: the tests by which the grader judges them.

    .venv/bin/python -m pytest -q tests/test_steps.py
"""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import steps
from wire import Wire, after_rank_0

FLAT = torch.arange(8.0)


def filled(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def sum_by_hand() -> tuple[Tensor, list[str]]:
    tensor, log = filled(1000, dist.get_rank()), []
    with Wire(log):
        steps.all_reduce(tensor)
    return tensor, log


@pytest.mark.parametrize("ranks", [1, 3])
def test_all_reduce(run_ranks, ranks):
    expected, results = sum(filled(1000, rank) for rank in range(ranks)), run_ranks(sum_by_hand, ranks)
    for rank, (total, log) in enumerate(results):
        assert (total - expected).abs().max() < 1e-5, f"rank {rank} of {ranks} has another sum"
        assert torch.equal(total, results[0][0]), f"ranks 0 and {rank} differ in bits: they add in another order"
        assert set(log) <= {"send"}, f"only isend and irecv may be used, and rank {rank} called {set(log)}"


def test_pad():
    for count, ranks, length in ((8, 4, 8), (9, 4, 12), (1, 3, 3), (0, 2, 0), (7, 1, 7)):
        flat = torch.arange(1.0, count + 1)
        padded = steps.pad(flat, ranks)
        assert padded.tolist() == flat.tolist() + [0.0] * (length - count), f"{count} elements, {ranks} ranks: {padded}"
        assert steps.pad(flat.half(), ranks).dtype is torch.half, "the dtype has changed"


def test_shard():
    for ranks in (1, 2, 4):
        flat = FLAT.clone()
        shards = [steps.shard(flat, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(shards), flat), f"{ranks} ranks: the shards are {shards}"
        assert {len(shard) for shard in shards} == {8 // ranks}, f"{ranks} ranks: shards differ in length"
        shards[-1].zero_()
        assert flat[-1] == 0, "writing to a shard does not change flat: it is a copy, and not a view"


def test_bucket():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    values = [p.detach().clone() for p in model.parameters()]
    flat = steps.bucket(list(model.parameters()), 4)
    assert flat.shape == (12,) and not flat.requires_grad, f"11 elements for 4 ranks: flat is {flat}"
    assert torch.equal(flat, torch.cat([*(v.flatten() for v in values), torch.zeros(1)])), "flat has other values"
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values)), "the parameters have other values"
    flat.fill_(2.0)
    assert all(bool((p == 2).all()) for p in model.parameters()), "a parameter is no view of flat"


def test_gradient_hook():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    plain, flat = copy.deepcopy(model), torch.zeros(24)
    steps.gradient_hook(list(model.parameters()), flat)
    for micro_batch in range(2):
        for net in (plain, model):
            net(torch.ones(2, 3) * (micro_batch + 1)).sum().backward()
        expected = torch.cat([*(p.grad.flatten() for p in plain.parameters()), torch.zeros(3)])
        assert torch.allclose(flat, expected), f"after backward {micro_batch}: off by {(flat - expected).abs().max()}"
        assert all(p.grad is None for p in model.parameters()), "a gradient is kept in p.grad too"


def sums_of_buckets() -> tuple[list[str], bool, list[float], int]:
    """What happened in backward, whether rank 0 ended it before rank 1 began, the sums' errors, and how many works."""
    torch.manual_seed(0)
    model, log = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), []
    plain = copy.deepcopy(model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: log.append("gradient"))
    buckets = [(list(layer.parameters()), torch.zeros(20)) for layer in (model[2], model[0])]
    works = steps.overlap(buckets)
    with after_rank_0() as early, Wire(log):
        model(torch.ones(2, 4) * (1 + dist.get_rank())).sum().backward()
    for work in works:
        work.wait()
    for rank in range(2):
        plain(torch.ones(2, 4) * (1 + rank)).sum().backward()
    expected = [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in (plain[2], plain[0])]
    return log, early, [float((flat - e).abs().max()) for (_, flat), e in zip(buckets, expected)], len(works)


def test_overlap(run_ranks):
    for rank, (log, early, errors, works) in enumerate(run_ranks(sums_of_buckets, 2)):
        assert works == 2 == log.count("allreduce"), f"2 buckets, {works} works, and in backward {log}"
        assert "allreduce" in log[:log.index("gradient") + 3], f"the first bucket waits for the second one: {log}"
        assert early, f"backward on rank {rank} waits for that of the other rank"
        assert max(errors) < 1e-5, f"rank {rank}: the buckets' sums are off by {errors}"


def clipped(limit: float) -> tuple[float, Tensor]:
    shard = filled(10, dist.get_rank())
    return steps.clip(shard, limit), shard


def test_clip(run_ranks):
    whole = torch.cat([filled(10, rank) for rank in range(2)])
    for limit in (0.5, 100.0):
        results = run_ranks(clipped, 2, limit)
        expected = whole * min(1.0, limit / (float(whole.norm()) + 1e-6))
        for rank, (norm, _) in enumerate(results):
            assert abs(norm - whole.norm()) < 1e-4, f"rank {rank}: norm {norm}; over all ranks it is {whole.norm()}"
        gradient = torch.cat([shard for _, shard in results])
        assert torch.allclose(gradient, expected), f"limit {limit}: clipped to a norm of {gradient.norm()}"


def gathered_and_freed() -> dict[str, Any]:
    rank = dist.get_rank()
    flat, own = torch.arange(8.0), torch.arange(4.0) + 4 * rank
    view = flat[2:6].view(2, 2)
    flat.untyped_storage().resize_(0)
    with after_rank_0() as early:
        work = steps.gather(flat, own)
    work.wait()
    told = {"early": early, "values": flat.tolist(), "view": view.tolist()}
    flat += 10
    steps.free(flat, own)
    return told | {"bytes": flat.untyped_storage().nbytes(), "own": own.tolist(), "shape": tuple(view.shape)}


def test_gather(run_ranks):
    for rank, told in enumerate(run_ranks(gathered_and_freed, 2)):
        assert told["early"], "rank 0 waits for rank 1 inside the call"
        assert told["values"] == FLAT.tolist(), f"rank {rank} gathered {told['values']}"
        assert told["view"] == [[2.0, 3.0], [4.0, 5.0]], f"a view of flat has {told['view']}: its storage is another one"


def test_free(run_ranks):
    for rank, told in enumerate(run_ranks(gathered_and_freed, 2)):
        assert told["bytes"] == 0, f"{told['bytes']} bytes of flat are left"
        assert told["shape"] == (2, 2), f"a view of flat has the shape {told['shape']}"
        assert told["own"] == [10.0 + 4 * rank + i for i in range(4)], f"rank {rank} keeps {told['own']}: changes are lost"


class Layers:
    """Layers that multiply by their number plus 1, and may only compute while they are whole; ``log`` says what came."""

    def __init__(self, count: int):
        self.log, self.state = [], ["sharded"] * count
        self.calls = [lambda x, i=i: self.compute(i, x) for i in range(count)]

    def start(self, number: int) -> "Layers.Work":
        self.log.append(f"start {number}")
        assert self.state[number] == "sharded", f"layer {number} is gathered twice: {self.log}"
        self.state[number] = "coming"
        on_their_way = [i for i, state in enumerate(self.state) if state in ("coming", "whole")]
        assert len(on_their_way) <= 2, f"layers {on_their_way} are whole or on their way: {self.log}"
        return Layers.Work(self, number)

    class Work:
        def __init__(self, layers: "Layers", number: int):
            self.layers, self.number = layers, number

        def wait(self) -> None:
            self.layers.log.append(f"wait {self.number}")
            self.layers.state[self.number] = "whole"

    def compute(self, number: int, x: Tensor) -> Tensor:
        self.log.append(f"compute {number}")
        assert self.state[number] == "whole", f"layer {number} computes while it is {self.state[number]}: {self.log}"
        last = number + 1 == len(self.state)
        assert last or self.state[number + 1] == "coming", f"layer {number + 1} is not on its way: {self.log}"
        return x * (number + 1)

    def free(self, number: int) -> None:
        self.log.append(f"free {number}")
        self.state[number] = "freed"


def test_prefetch():
    for count in (1, 2, 5):
        layers = Layers(count)
        result = steps.prefetch(layers.calls, layers.start, layers.free, torch.ones(1))
        assert float(result) == torch.arange(1.0, count + 1).prod(), f"{count} layers give {result}: {layers.log}"
        assert layers.state == ["freed"] * count, f"not every layer is freed: {layers.log}"


def test_message_and_ring():
    assert steps.message(1000, 0.5, 2000.0) == pytest.approx(1.0), "1,000 bytes at 2,000 a second, after half a second"
    for ranks, seconds in ((1, 0.0), (2, 2 * (0.5 + 4.0)), (4, 6 * (0.5 + 2.0)), (8, 14 * (0.5 + 1.0))):
        got = steps.ring(8000, ranks, 0.5, 1000.0)
        assert got == pytest.approx(seconds), f"8,000 bytes, {ranks} ranks: {got} seconds, and not {seconds}"


def test_communication():
    for stage, seconds in ((0, 0.7505), (1, 0.7505), (2, 0.7505), (3, 1.12575)):
        for compute in (1.0, 0.5, 2.0):
            told = steps.communication(stage, 10**9 // 2, 4, 1e-3 / 12, 2e9, compute)
            assert told == (pytest.approx(seconds), seconds > compute), f"stage {stage}, {compute} s of computing: {told}"
