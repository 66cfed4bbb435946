"""What a rank really sends and holds, whatever it calls, for the tests by which exercises are graded."""

import ctypes
import gc
import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
            if type(thing).__name__ != "TakenGradient" and thing.device == CPU:
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None and type(tensor).__name__ != "TakenGradient":
                        found[tensor.untyped_storage()._cdata] = tensor.detach()
    return found


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost").split()]


def living() -> int:
    """Bytes that this process has in use, whoever holds them: tensors, graphs, lists, NumPy, globals, closures.

    Room to receive into is given up first: it is the collectives', and not a part of what uses them.
    """
    for thing in gc.get_objects():
        if type(thing).__name__ == "SpareBuffers":
            thing.by_size.clear()
    gc.collect()
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):  # of glibc alone; elsewhere tensors must do
        return bytes_of(storages().values())
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    told = mallinfo()
    return told.uordblks + told.hblkhd


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
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
