"""What a rank really sends and holds, whatever it calls, for the tests by which exercises are graded."""

import gc
import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zero

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
            largest = max((sum(t.nbytes for t in tree_leaves(a) if isinstance(t, torch.Tensor)) for a in args),
                          default=0) // 4  # by bytes: a view in another dtype has fewer elements
            ranks = dist.get_world_size()
            times = 2 if name.startswith("allreduce") else 1
            self.elements += largest if name == "send" else times * largest * (ranks - 1) // ranks
            self.log.append(name)
            self.times.append(time.perf_counter())
            time.sleep(self.delay)
        return operation(*args, **(kwargs or {}))


def storages() -> dict[int, torch.Tensor]:
    """A tensor for each storage that lives in this process."""
    gc.collect()
    found = {}
    with torch._C.DisableTorchFunctionSubclass():
        for thing in [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]:
            if type(thing) is not zero.TakenGradient and thing.device == CPU:
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None and type(tensor) is not zero.TakenGradient:
                        found[tensor.untyped_storage()._cdata] = tensor.detach()
    for storage in [o for o in gc.get_objects() if type(o) is torch.UntypedStorage and o.device == CPU]:
        found.setdefault(storage._cdata, torch.empty(0, dtype=torch.uint8).set_(storage))
    return found


def blobs() -> dict[int, int]:
    """The sizes of large things in memory that are no tensors: what bytes and NumPy's arrays hold of their own."""
    found = {id(thing): thing for holder in gc.get_objects() for thing in gc.get_referents(holder)
             if type(thing) in (bytes, bytearray, np.ndarray)}
    return {key: size for key, thing in found.items() if (size := len(thing) if type(thing) is not np.ndarray
            else 0 if thing.base is not None else thing.nbytes) >= 4096}


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def held(but: Iterable[int]) -> int:
    """Bytes of all storages, and of other large things, that are not among ``but``.

    Room to receive into is given up first: it is the collectives', and not a part of what uses them.
    """
    for thing in gc.get_objects():
        if type(thing) is zero.SpareBuffers:
            thing.by_size.clear()
    return bytes_of(t for key, t in storages().items() if key not in but) + sum(
        size for key, size in blobs().items() if key not in but)


def living() -> set[int]:
    """What ``held`` leaves out from now on."""
    return {*storages(), *blobs()}


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
