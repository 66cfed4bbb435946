"""Ten small steps from an all-reduce to ZeRO stage 3, and three functions about time. Plain PyTorch, a few lines each.

    all_reduce, pad, shard, bucket, gradient_hook, overlap       data parallelism with buckets, and ZeRO-1's slices
    clip, gather, free, prefetch                                 what ZeRO-1 and ZeRO-3 need in addition
    message, ring, communication                                 seconds, from latency and bandwidth

These are the answers. To write them yourself: ``python tutorials/grade.py --start steps:all_reduce > my.py``. Each
step is a mechanism of zero.py without its special cases: one dtype, one process group, equal models on all ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def all_reduce(tensor: Tensor) -> None:
    """Sum ``tensor`` over all ranks, in place on every rank, with dist.isend and dist.irecv alone.

    Each rank sends its tensor to every other one. All add in rank order, so that all get the same bits.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = [tensor.clone() for _ in range(ranks)]
    works = []
    for other in range(ranks):
        if other != rank:
            works += [dist.irecv(parts[other], other), dist.isend(parts[rank], other)]
    for work in works:
        work.wait()
    tensor.copy_(torch.stack(parts).sum(0))


def pad(flat: Tensor, ranks: int) -> Tensor:
    """A flat tensor, with as few zeros behind it as make its length a multiple of ``ranks``."""
    return torch.cat([flat, flat.new_zeros(-flat.numel() % ranks)])


def shard(flat: Tensor, rank: int, ranks: int) -> Tensor:
    """The slice of a padded flat tensor that belongs to ``rank``: a view, so that writing to it changes ``flat``."""
    size = flat.numel() // ranks
    return flat[rank * size:(rank + 1) * size]


def bucket(parameters: list[nn.Parameter], ranks: int) -> Tensor:
    """One flat, padded tensor with the values of all parameters, of which each ``p.data`` becomes a view."""
    flat = pad(torch.cat([p.detach().flatten() for p in parameters]), ranks)
    start = 0
    for p in parameters:
        p.data = flat[start:start + p.numel()].view(p.shape)
        start += p.numel()
    return flat


def gradient_hook(parameters: list[nn.Parameter], flat: Tensor) -> None:
    """From now on add each finished gradient to its place in ``flat``, and set ``p.grad`` to None.

    The places are those of ``bucket``: one parameter behind the other.
    """
    start = 0
    for p in parameters:
        def take(p: nn.Parameter, place: Tensor = flat[start:start + p.numel()].view(p.shape)) -> None:
            place.add_(p.grad)
            p.grad = None

        p.register_post_accumulate_grad_hook(take)
        start += p.numel()


def overlap(buckets: list[tuple[list[nn.Parameter], Tensor]]) -> list[Any]:
    """Sum the gradients of each bucket, its parameters and its flat tensor, over the ranks while backward still runs.

    Call ``gradient_hook(parameters, flat)`` first: it fills the flat tensor. As soon as a bucket's last gradient has
    come, its all-reduce starts and its work goes into the list that this returns. Nothing waits here: whoever needs the
    sums waits for the works.
    """
    works = []
    for parameters, flat in buckets:
        gradient_hook(parameters, flat)
        missing = set(parameters)

        def count(p: nn.Parameter, missing: set = missing, flat: Tensor = flat) -> None:
            missing.remove(p)
            if not missing:
                works.append(dist.all_reduce(flat, async_op=True))

        for p in parameters:
            p.register_post_accumulate_grad_hook(count)
    return works


def clip(gradient: Tensor, limit: float) -> float:
    """Scale this rank's shard of the gradient so that the norm over the shards of all ranks is at most ``limit``.

    In place, by limit / (norm + 1e-6), and never up. Only the sum of squares is sent. Returns the norm from before.
    """
    square = gradient.square().sum()
    dist.all_reduce(square)
    norm = float(square.sqrt())
    gradient.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def gather(flat: Tensor, own: Tensor) -> Any:
    """Give ``flat``, whose storage ``free`` has emptied, its memory back, and start to fill it from the ranks' shards.

    Returns the work of an asynchronous all-gather. The storage object stays the same, so that all views of it live on.
    """
    flat.untyped_storage().resize_(flat.numel() * flat.element_size())
    return dist.all_gather(list(flat.chunk(dist.get_world_size())), own, async_op=True)


def free(flat: Tensor, own: Tensor) -> None:
    """Keep this rank's slice of ``flat`` in ``own``, and give the memory of ``flat`` back.

    ``flat`` and its views remain tensors of the same shape, over an empty storage.
    """
    own.copy_(shard(flat, dist.get_rank(), dist.get_world_size()))
    flat.untyped_storage().resize_(0)


def prefetch(layers: list[Callable[[Tensor], Tensor]], start: Callable[[int], Any], free: Callable[[int], None],
             x: Tensor) -> Tensor:
    """Run the layers one after the other on ``x``; the gather of the next one is under way while one computes.

    ``start(i)`` starts to gather layer i and returns a work; layer i needs it to be waited for, and ``free(i)`` as soon
    as it has computed. Each layer is gathered once. At most two are whole, or on their way, at any time.
    """
    work = start(0)
    for number, layer in enumerate(layers):
        work.wait()
        if number + 1 < len(layers):
            work = start(number + 1)
        x = layer(x)
        free(number)
    return x


def message(size: float, latency: float, bandwidth: float) -> float:
    """Seconds that a message of ``size`` bytes takes: the latency, and then so many bytes per second."""
    return latency + size / bandwidth


def ring(size: float, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds of an all-reduce of ``size`` bytes in a ring.

    Each rank sends an N-th of the tensor to the next one, all at once: N - 1 rounds add the parts up, and N - 1 more
    pass the sums on. Reduce-scatter and all-gather are half of it each.
    """
    return 2 * (ranks - 1) * message(size / ranks, latency, bandwidth)


def communication(stage: int, elements: int, ranks: int, latency: float, bandwidth: float,
                  compute: float) -> tuple[float, bool]:
    """Seconds that a step of a ZeRO stage communicates, and whether that is longer than the ``compute`` seconds.

    One bucket of 2-byte elements, by rings. Stage 0: an all-reduce. Stages 1 and 2: a reduce-scatter and an
    all-gather. Stage 3: a reduce-scatter and two all-gathers, one for forward and one for backward.
    """
    seconds = ring(2 * elements, ranks, latency, bandwidth) * (1.5 if stage == 3 else 1.0)
    return seconds, seconds > compute
