"""ZeRO (arXiv 1910.02054): data-parallel training where each rank keeps a shard of what it would otherwise repeat.

Plain data parallelism keeps, on every one of N ranks, all parameters, all gradients and all optimizer state. ZeRO gives
each rank one N-th of the optimizer state (stage 1), of the gradients too (stage 2), of the parameters too (stage 3).
The sums stay the same, so every stage trains what plain PyTorch trains on the whole batch.

The unit of sharding and communication is a **bucket**: a flat tensor into which many parameters are views.

    flat       | weight 0        .| bias 0 .| weight 1                 .| padding |     "." aligns what follows
               |<---- shard of rank 0 ---->|<---- shard of rank 1 ----->|               N shards of equal size, or where
                                                                                        no weight may be cut, of any
    buffer     the same layout for gradients, copied in as autograd finishes them
    master     the part of the parameters that this rank's optimizer updates: its shard (stage 0: everything)

One step of N ranks, where *reduce* makes gradients sums over ranks and *gather* makes shards whole again:

    stage      forward               backward                                       step
    0          -                     reduce: all-reduce, at the window's end        update everything
    1          -                     reduce: reduce-scatter, at the window's end    update the shard, gather parameters
    2          -                     reduce-scatter after every micro-batch,        the same
                                     add to the gradient shard, drop the rest
    3          gather each unit,     gather it again, free it; reduce-scatter       update the shard
               use it, free it       as in stage 2

Why there: the optimizer needs only its shard of the *sum*, so a reduce-scatter (half an all-reduce) is enough. The
other half follows later, as the gather of the updated weights. Stages 0 and 1 keep a full gradient buffer, so they can
add up an accumulation window locally and send once. Stage 2 has no room for other ranks' slices and must send every
micro-batch. Elements sent per rank, for P parameters and m micro-batches, times (N-1)/N: 2P, 2P, (m+1)P, 3mP.

Follow one gradient: ``Gradients.take`` copies it into its bucket's buffer. ``Reducer.launch_ready`` starts the
reduction of a full bucket (``Gradients.launch``), and ``Gradients.finish`` leaves the sum over ranks in ``sum``.
``Zero.step`` takes the global norm (``_agree``) and folds every factor into one, which ``Updater.update`` applies.
``Gradients.arm`` gives the sum to the optimizer, which updates the master. ``Bucket.publish`` sends the result to all
ranks.

The file, from top to bottom: config, collectives, offload to the host, buckets and their gradients, units and the
``Gatherer`` (stage 3), the ``Reducer``, ``Zero`` which ties them together, ``Init`` which builds models straight into
shards, reading and writing what is sharded, the shares of a checkpoint, and memory. To understand ZeRO, read up to
the end of ``Zero``; the rest uses it. With one process there is nothing to shard: no collective runs at any stage.
"""

import atexit
import copy
import ctypes
import difflib
import gc
import hashlib
import logging
import math
import mmap
import os
import runpy
import shutil
import socket
import sys
import tempfile
import time
import warnings
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from enum import Enum
from functools import partial
from itertools import accumulate, count, pairwise, zip_longest
from threading import Thread
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  see end_process_group
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

logger = logging.getLogger("engine.zero")

C_LIBRARY = ctypes.CDLL(None) if os.name == "posix" else None


# --- The config -------------------------------------------------------------------------------------------------------


def _key(default: Any, **rules: Any) -> Any:
    """A field whose values are restricted: to ``choices``, or to numbers from ``least`` to ``most``."""
    return field(default=default, metadata=rules)


@dataclass
class LeafModules:
    """``leaf_module``: which modules become one unit of stage 3 each, with their submodules."""
    classes: list | None = None         # class names, with or without their module's name in front
    names: list | None = None           # names as in model.named_modules()
    name_suffixes: list | None = None   # ends of such names


@dataclass
class _OffloadSection:
    """The keys that both offload sections share."""
    device: str = _key("none", choices=("none", "cpu", "nvme"))  # "cpu": to host memory; "nvme": to files, but reduced
                                   # gradients always to host memory; "none": stay
    nvme_path: str | None = None   # the folder of the files
    pin_memory: bool = True        # host memory that a GPU copies from and to while it computes

    KEY: ClassVar[str]

    def __post_init__(self) -> None:
        if self.device == "nvme" and not self.nvme_path:
            raise ValueError(f"zero_optimization.{self.KEY}.nvme_path is missing, and device is nvme; needed: a folder")


@dataclass
class OffloadOptimizer(_OffloadSection):
    """``offload_optimizer``: masters, reduced gradients and optimizer state leave the GPU; the CPU takes the step."""
    ratio: float = _key(1.0, least=0, most=1)  # the fraction that leaves, by elements, in whole buckets
    # DeepSpeed's keys without effect here; NO_EFFECT says why.
    buffer_count: int = 4
    fast_init: bool = False
    pipeline_read: bool = False
    pipeline_write: bool = False

    KEY: ClassVar[str] = "offload_optimizer"
    NO_EFFECT: ClassVar[dict[str, str]] = {
        "buffer_count": "buckets and units are the buffers",
        "fast_init": "files are written once, at the start",
        "pipeline_read": "the system reads ahead in the files",
        "pipeline_write": "the system writes the files behind the step"}


@dataclass
class OffloadParam(_OffloadSection):
    """``offload_param``, stage 3: the shards of the parameters leave the GPU, and come back as they are gathered."""
    # DeepSpeed's keys without effect here; NO_EFFECT says why.
    buffer_count: int = 5
    buffer_size: int = 10**8
    max_in_cpu: int = 10**9

    KEY: ClassVar[str] = "offload_param"
    NO_EFFECT: ClassVar[dict[str, str]] = {
        "buffer_count": "buckets and units are the buffers",
        "buffer_size": "buckets and units are the buffers",
        "max_in_cpu": "the system caches the files as far as memory allows"}


@dataclass
class ZeroConfig:
    """The ``zero_optimization`` section. Sizes are in elements (parameters), not bytes."""
    stage: int = _key(0, choices=(0, 1, 2, 3))        # how much is sharded, see the top of this file
    reduce_bucket_size: int | str = _key("auto", choices=("auto",), least=1)  # a bucket is full from here (stage 3: a
                                                      # unit is one bucket); auto: see bucket_size (DeepSpeed: 5e8)
    overlap_comm: bool = True                         # reduce while backward runs; false: all at its end
    reduce_scatter: bool = True                       # false: all-reduce and keep the shard, twice the traffic
    ignore_unused_parameters: bool = True             # false: a trained parameter without gradient is an error
    stage3_prefetch_bucket_size: int | str = _key("auto", choices=("auto",), least=0)  # largest unit gathered ahead of
                                                      # use; auto: any; 0: none
    stage3_max_live_parameters: int = _key(10**9, least=0)  # nothing is gathered ahead past this many gathered elements
    stage3_param_persistence_threshold: int = _key(0, least=0)  # parameters up to this size stay whole (DeepSpeed: 1e5)
    leaf_module: LeafModules | None = None            # the units of stage 3; none: found by find_units
    offload_optimizer: OffloadOptimizer = field(default_factory=OffloadOptimizer)
    offload_param: OffloadParam = field(default_factory=OffloadParam)
    # DeepSpeed's keys without effect here; NO_EFFECT says why.
    allgather_partitions: bool = True
    allgather_bucket_size: int | str = _key("auto", choices=("auto",), least=0)
    contiguous_gradients: bool = True
    round_robin_gradients: bool = False
    load_from_fp32_weights: bool = True
    sub_group_size: int | str = _key("auto", choices=("auto",), least=0)
    stage3_max_reuse_distance: int | str = _key("auto", choices=("auto",), least=0)
    stage3_module_granularity_threshold: int = _key(0, least=0)
    stage3_gather_16bit_weights_on_model_save: bool = False

    NO_EFFECT: ClassVar[dict[str, str]] = {
        "allgather_partitions": "parameters are always gathered by all-gather",
        "allgather_bucket_size": "parameters are gathered in the buckets that reduce_bucket_size gives",
        "contiguous_gradients": "gradients always lie in flat buckets",
        "round_robin_gradients": "every bucket is divided evenly among all ranks",
        "load_from_fp32_weights": "master weights are always kept in full",
        "sub_group_size": "the optimizer steps bucket by bucket",
        "compute_grad_norm": "the norm is always taken, as it detects overflow",
        "cpu_offload_use_pin_memory": "pin_memory of the offload sections says it",
        "elastic_checkpoint": "any checkpoint loads at any number of ranks",
        "stage3_max_reuse_distance": "a unit is freed after each use",
        "stage3_module_granularity_threshold": "units are found by find_units, or given by leaf_module",
        "stage3_model_persistence_threshold": "stage3_param_persistence_threshold alone says what stays",
        "stage3_gather_16bit_weights_on_model_save": "a call that needs whole weights gathers them by itself",
        **dict.fromkeys((
            "enable_sanity_checks", "legacy_stage1", "log_trace_cache_warnings", "memory_efficient_linear",
            "override_module_apply", "parameter_alignment", "pipeline_loading_checkpoint",
            "save_muon_momentum_buffer_in_memory", "stage3_allgather_sequential",
            "stage3_use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce"),
            "it steers DeepSpeed's own code")}

    def __post_init__(self) -> None:
        if self.offload_param.device != "none" and self.stage != 3:
            logger.warning("zero_optimization.offload_param has no effect at stage %d, which keeps whole parameters "
                           "where they are used; stage 3 offloads them", self.stage)
            self.offload_param = OffloadParam()


class Sharded(NamedTuple):
    """Which states a stage shards over the ranks."""
    optimizer: bool
    gradients: bool
    parameters: bool


SHARDED = {0: Sharded(False, False, False), 1: Sharded(True, False, False), 2: Sharded(True, True, False),
           3: Sharded(True, True, True)}

ALIGN = 64  # elements; parameters and shards start at multiples of it: 128 bytes in half precision, 256 in fp32


# --- Collectives ------------------------------------------------------------------------------------------------------


def own_device(local_rank: int) -> torch.device:
    """This process's GPU, or the CPU on a machine without any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count, needed = torch.cuda.device_count(), max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if count == 1:  # Slurm, or a script around this one, may show each process its own GPU alone; else check_gpus
        local_rank = 0
    elif needed > count:  # the same on all ranks: all raise, none waits
        raise ValueError(f"{needed} processes on this machine need as many GPUs; it has {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


# By launcher, the variable that holds the number of processes. Under Slurm it is that of the job's step: a batch
# script, or an interactive shell of one task, is alone whatever the job asked for.
STARTERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun (Open MPI)",
            "PMI_SIZE": "mpirun (Intel MPI, MPICH)", "MV2_COMM_WORLD_SIZE": "mpirun (MVAPICH)"}


def start_process_group(device: torch.device, port: int = 29500, required: bool | None = None,
                        backend: str | None = None, timeout: timedelta | None = None) -> bool:
    """Start the default process group unless there is one; True when it was started here.

    The launcher's variables say who is in it; without a launcher, this process is a group of its own. ``timeout`` is
    that of each collective; None: PyTorch's.
    """
    if dist.is_initialized():
        if timeout is not None and dist.get_rank() == 0:
            logger.warning("a timeout of %s has no effect: the process group is there already, and keeps its own",
                           timeout)
        if device.type == "cuda" and dist.group.WORLD._get_backend(device).name() == "nccl":
            check_gpus(device, dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size())
        return False
    if required is False:
        raise ValueError("dist_init_required is False, but torch.distributed is not initialized")
    backend = backend or _backend(device)
    own = device if backend == "nccl" else None  # NCCL then connects ranks now, and not in the first backward
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        for name, starter in STARTERS.items():
            if os.environ.get(name, "1") not in ("", "1"):
                raise ValueError(f"this process is one of {os.environ[name]} that were started by {starter}, which "
                                 f"does not set RANK and WORLD_SIZE; it would train alone. Start the script with "
                                 f"torchrun or launch.py; if it is to train alone, unset {name}")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=own)
        atexit.register(end_process_group)
        return True
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise ValueError(f"the environment sets some of the launcher's variables but not {', '.join(missing)}; "
                         f"start the script with torchrun, or unset RANK and WORLD_SIZE for a single process")
    os.environ.setdefault("MASTER_PORT", str(port))
    store, rank, world_size = next(dist.rendezvous("env://"))
    # A second group must not find the first one's addresses in the launcher's store.
    store = dist.PrefixStore(f"start {next(Communicator.starts)}", store)
    if own is not None:
        check_gpus(device, store, rank, world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=own)
    atexit.register(end_process_group)
    return True


def check_gpus(device: torch.device, store: Any, rank: int, world_size: int) -> None:
    """Raise ValueError on all ranks where two have one GPU: NCCL's own error, later, does not say so."""
    store.set(f"gpu/{rank}", f"{torch.cuda.get_device_properties(device).uuid} of {socket.gethostname()}")
    every = [gpu.decode() for gpu in store.multi_get([f"gpu/{other}" for other in range(world_size)])]
    (gpu, users), = Counter(every).most_common(1)
    if users > 1:
        ranks = ", ".join(str(other) for other in range(world_size) if every[other] == gpu)
        raise ValueError(f"ranks {ranks} all use the GPU {gpu}; needed: as many GPUs as processes on each machine, and "
                         "where CUDA_VISIBLE_DEVICES shows a process one alone, another one to each")


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"


def end_process_group() -> None:
    """End the default process group, if there still is one.

    Otherwise it ends with the interpreter, which one of the group's threads may still need: the process then aborts
    after its right output. The threads end with the last reference to the group. The default arguments in
    torch.distributed.nn.functional would be such a reference if an optimizer were the first to import it. After an
    error NCCL's group is left alone: ending it would wait for collectives that the other ranks never join.
    """
    failed = hasattr(sys, "last_value")
    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        with suppress(RuntimeError):  # another rank is gone already
            dist.destroy_process_group()


@dataclass(eq=False)
class Groups:
    """What all engines on one default process group share; on GPUs, further groups.

    abandoned    collectives that nobody waits for, with their memory; see Handle
    reductions   gives reductions an order of their own, see Reducer.launch_ready; all-gathers use the default group
    host         gloo: objects and barriers take no GPU memory there, and do not disturb the order of NCCL's collectives
    communicators   the engines' own, as long as they live
    """
    reductions: Any = None
    host: Any = None
    users: int = 0  # engines that have the groups; the last one to leave ends them
    abandoned: list[Any] = field(default_factory=list)
    communicators: Any = field(default_factory=weakref.WeakSet)

    @classmethod
    def current(cls) -> "Groups":
        """Those of the current default group."""
        return _GROUPS.setdefault(dist.group.WORLD, cls())

    def join(self, device: torch.device, timeout: timedelta | None) -> None:
        """Make the groups, unless another engine has. One all-reduce connects NCCL's ranks now, not in a backward."""
        if not self.users:
            self.reductions = dist.new_group(timeout=timeout)
            self.host = dist.new_group(backend="gloo", timeout=timeout)
            for group in (None, self.reductions):
                dist.all_reduce(torch.zeros(1, device=device), group=group)
        self.users += 1

    def leave(self) -> None:
        """An engine no longer needs them."""
        self.users -= 1
        if not self.users and dist.is_initialized():
            dist.destroy_process_group(self.reductions)
            dist.destroy_process_group(self.host)
            self.reductions = self.host = None


_GROUPS: "weakref.WeakKeyDictionary[Any, Groups]" = weakref.WeakKeyDictionary()  # by the default group


def gather(value: Any, group: Any = None) -> list[Any]:
    """Every rank's ``value``, in rank order."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value, group or Groups.current().host)
    return every


def agree(work: Callable[[], Any], same: bool = False, kind: type[Exception] | None = None,
          group: Any = None) -> list[Any]:
    """Run ``work()`` on every rank; returns all results. Where it raises on any rank, all raise, so that none waits.

    same   ``work()`` returns lines of text that must be equal; ValueError names the first difference. Ranks with
           different models, configs or calls would wait for each other for ever
    kind   the exception that all raise; None: a failing rank raises its own, and the others ValueError
    """
    result = failure = told = None
    try:
        result = work()
    except Exception as error:
        failure = error
        told = str(error) if isinstance(error, (ValueError, kind or ValueError)) else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.strerror:
            told = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    digest = hashlib.sha256("\n".join(result).encode()).digest() if same and failure is None else None
    every = gather((told, digest if same else result), group)
    if failure is not None and kind is None:
        raise failure
    for rank, (told, _) in enumerate(every):
        if told is not None:
            raise (kind or ValueError)(f"rank {rank}: {told}") from failure
    if same and len(set(every)) > 1:
        _tell_difference(gather(result, group))
    return [result] * len(every) if same else [given for _, given in every]


def meet(call: str, timeout: timedelta | None) -> None:
    """Wait until all ranks make this call; RuntimeError where one is not there in time."""
    try:
        group = Groups.current().host
        if group is not None or dist.get_backend() == "gloo":  # gloo waits for 30 minutes, whatever the timeout is
            dist.monitored_barrier(group, timeout)
    except RuntimeError as error:
        raise RuntimeError(f"{call} was not called by every rank in time; each must call it, not rank 0 alone: "
                           f"{str(error).splitlines()[0]}") from None


def _tell_difference(texts: list[Sequence[str]]) -> None:
    rank = next(rank for rank, text in enumerate(texts) if text != texts[0])
    pairs = zip_longest(texts[0], texts[rank], fillvalue="nothing")
    first, other = next(pair for pair in pairs if pair[0] != pair[1])
    raise ValueError(f"ranks disagree: rank 0 has {first}, where rank {rank} has {other}; give every rank the same "
                     "config, the same model and the same calls")


class Clock:
    """Where time goes, once ``runs`` is set: a list of moments, each with the name of the phase that begins there.

    On a GPU the moments are events in its queue, because waiting does not block the host there. Only ``read`` waits.
    """

    def __init__(self, device: torch.device):
        self.device, self.runs, self.name = device, False, ""
        self.moments: list[tuple[str, Any]] = []

    def phase(self, name: str) -> AbstractContextManager:
        """Time inside counts for ``name``, and not for an enclosing phase."""
        return self._phase(name) if self.runs else nullcontext()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        outer = self.name
        self._begin(name)
        try:
            yield
        finally:
            self._begin(outer)

    def _begin(self, name: str) -> None:
        self.name, moment = name, time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.moments.append((name, moment))

    def read(self) -> Counter[str]:
        """The milliseconds of each phase since the last call."""
        spent: Counter[str] = Counter()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for (name, began), (_, ended) in pairwise(self.moments):
            spent[name] += began.elapsed_time(ended) if self.device.type == "cuda" else 1e3 * (ended - began)
        self.moments.clear()
        return spent


class Handle:
    """A collective in flight. Its tensors must not be touched before ``wait()`` has returned.

    received   what messages are received into, on their way to the sum
    """

    def __init__(self, communicator: "Communicator | None" = None, works: Sequence[Any] = (),
                 finish: Callable[[], None] | None = None):
        self.communicator, self.works, self.finish = communicator, list(works), finish
        self.received: list[Tensor] = []

    def wait(self) -> None:
        """Block until the collective is done (on a GPU: until the work queued from now on will find it done)."""
        if not self.works and self.finish is None:
            return
        with self.communicator.clock.phase("communication"):
            while self.works:
                self.works.pop().wait()  # removed first: to wait again after an error would block gloo for ever
            finish, self.finish = self.finish, None
            if finish is not None:
                finish()
        self.received.clear()

    def __del__(self) -> None:
        # Nobody waited, for example after an error in a backward. Gloo must still receive the message: without a place
        # for it, nothing that the sender sends later arrives.
        if self.works and self.communicator.direct and not sys.is_finalizing() and dist.is_initialized():
            Groups.current().abandoned += self.works


@dataclass
class Traffic:
    """What this rank has sent so far by one kind of collective."""
    calls: int = 0
    elements: int = 0
    bytes: int = 0


class Communicator:
    """Every collective of this file, over flat tensors of which each rank owns a slice.

    All slices have one size, or lie between ``bounds``: where each rank's begins, and where the last one ends. With
    bounds, PyTorch's collectives become one broadcast, or one reduce, per slice; sums and traffic stay the same.

    NCCL and other backends use PyTorch's collectives. Gloo's versions of reduce-scatter and all-gather copy everything
    and run an all-reduce. So with gloo each rank exchanges slices with every other one directly. Each element is sent
    once, received where it belongs, and added in rank order, so that two runs give the same bits.

    traffic    what was sent, by kind: (N-1)/N of each tensor, twice that for an all-reduce
    clock      where this rank's time goes; "communication" is waiting and adding up
    logbook    where each rank is; None with one rank
    debug      compare, before each collective, what the ranks are about to do
    gathered   a digest of the order in which units were gathered, and of what was written to them
    """

    numbers = count()  # rank 0's count tells the messages of several engines apart
    starts = count()   # tells successive process groups apart, see start_process_group

    number, logbook, debug = 0, None, False
    groups: Groups | None = None  # other than the default group

    def __init__(self, device: torch.device, debug: bool = False, timeout: float | None = None, timed: bool = False):
        gloo = device.type == "cpu" and dist.group.WORLD._get_backend(device).name() == "gloo"
        self._prepare(dist.get_rank(), dist.get_world_size(), device, direct=gloo)
        self.clock.runs = timed
        number = torch.tensor([next(Communicator.numbers)], device=device)
        self.broadcast(number, source=0)
        self.number = int(number)
        if self.world_size > 1:
            usual = dist.distributed_c10d._get_default_timeout(_backend(device)).total_seconds()
            self.logbook, self.debug = Logbook(self.number, timeout or usual), debug
            if device.type == "cuda":
                self.logbook.watch()

    def join(self, timeout: float | None) -> None:
        """On GPUs, use further groups until ``leave``."""
        Groups.current().communicators.add(self)
        if self.device.type == "cuda" and self.world_size > 1:
            self.groups = Groups.current()
            self.groups.join(self.device, None if timeout is None else timedelta(seconds=timeout))

    def leave(self) -> None:
        """The last collective is over. RuntimeError where another rank still trains on more micro-batches."""
        if self.groups is not None:
            self.groups.leave()
            self.groups = None
        if self.logbook is not None:
            self.logbook.end()

    def enter(self, micro_batch: int) -> None:
        """This rank begins a micro-batch that needs the other ranks."""
        if self.logbook is not None:
            self.logbook.write(micro_batch)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A timed phase of a step. If communication fails in it, the error says where the ranks were."""
        try:
            with self.clock.phase(name):
                yield
        except (RuntimeError, ValueError) as error:
            if self.logbook is None or not any(sign in str(error) for sign in Logbook.LOST):
                raise
            raise RuntimeError(f"{self.logbook.report()} ({str(error).splitlines()[0]})") from error

    @property
    def _reductions(self) -> Any:
        return None if self.groups is None else self.groups.reductions

    def _prepare(self, rank: int, world_size: int, device: torch.device, direct: bool) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self.clock, self.gathered = Clock(device), 0
        self.messages: Counter[str] = Counter()  # numbers the exchanges: no message can be taken for another one's
        self.direct = direct

    def shard_of(self, flat: Tensor, rank: int | None = None, bounds: Sequence[int] | None = None) -> Tensor:
        """The slice of ``flat`` that belongs to ``rank`` (default: this one)."""
        rank, size = self.rank if rank is None else rank, flat.numel() // self.world_size
        return flat.narrow(0, rank * size, size) if bounds is None else flat[bounds[rank]:bounds[rank + 1]]

    def all_gather(self, flat: Tensor, what: Callable[[], str] = str, bounds: Sequence[int] | None = None) -> Handle:
        """Send every rank's own slice of ``flat`` to all others. ``what()`` describes it for the debug mode."""
        if self.world_size == 1:
            return Handle(self)
        self._begin("all-gather", flat, 1, what)
        if not self.direct and bounds is not None:  # as bytes, since backends don't know every dtype
            return Handle(self, [dist.broadcast(part.view(torch.uint8), owner, async_op=True)
                                 for owner, part in self._parts(flat, bounds)])
        if not self.direct:
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            if not flat.dtype.is_floating_point:
                flat = flat.view(torch.uint8)  # backends don't know every dtype
            return Handle(self, [gather(flat, self.shard_of(flat), async_op=True)])
        tag, handle, own = self._tag("all-gather"), Handle(self), self.shard_of(flat, None, bounds)
        for other in self._others():
            theirs = self.shard_of(flat, other, bounds)
            handle.works += [dist.irecv(theirs, other, tag=tag)] if theirs.numel() else []
            handle.works += [dist.isend(own, other, tag=tag)] if own.numel() else []
        return handle

    def reduce_scatter(self, flat: Tensor, out: Tensor, add: bool, what: Callable[[], str] = str,
                       bounds: Sequence[int] | None = None) -> Handle:
        """Write this rank's slice of the sum of all ``flat`` into ``out``, or add it there if ``add``.

        ``out`` may be this rank's slice of ``flat``. The other slices of ``flat`` are undefined afterwards.
        """
        own = self.shard_of(flat, None, bounds)
        if self.world_size == 1:
            return Handle(self, finish=partial(_sum, [own], out, add))
        self._begin("reduce-scatter", flat, 1, what)
        if not self.direct and bounds is not None:
            works = [dist.reduce(_as_real(part), owner, group=self._reductions, async_op=True)
                     for owner, part in self._parts(flat, bounds)]
            return Handle(self, works, lambda: _sum([own], out, add))
        if not self.direct:
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            work = scatter(_as_real(own), _as_real(flat), group=self._reductions, async_op=True)
            return Handle(self, [work], lambda: _sum([own], out, add))
        tag, handle, parts = self._tag("reduce-scatter"), Handle(self), {self.rank: own}
        for other in self._others():
            parts[other], theirs = torch.empty_like(own), self.shard_of(flat, other, bounds)
            handle.works += [dist.irecv(parts[other], other, tag=tag)] if own.numel() else []
            handle.works += [dist.isend(theirs, other, tag=tag)] if theirs.numel() else []
            handle.received.append(parts[other])
        handle.finish = lambda: _sum([parts[rank] for rank in sorted(parts)], out, add)
        return handle

    def all_reduce(self, tensor: Tensor, kind: str = "all-reduce", finish: Callable[[], None] | None = None,
                   what: Callable[[], str] = str) -> Handle:
        """The sum over ranks, on every rank, in place. ``finish`` runs once it is complete."""
        if self.world_size == 1:
            return Handle(self, finish=finish)
        self._begin(kind, tensor, 2, what)
        return Handle(self, [dist.all_reduce(_as_real(tensor), group=self._reductions, async_op=True)], finish)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Send ``source``'s contiguous ``tensor`` to all; as bytes, since backends don't know every dtype."""
        if self.world_size > 1 and tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), source)

    def note(self, number: int) -> None:
        """A unit's gather begins, or it was written to. All ranks must do so alike, which ``Zero.step`` checks."""
        self.gathered = (31 * self.gathered + number + 1) % (2**20 - 3)  # a prime, so that all bits of a checksum count

    def _parts(self, flat: Tensor, bounds: Sequence[int]) -> list[tuple[int, Tensor]]:
        """The slices that are not empty, each with the rank that owns it."""
        parts = [(rank, self.shard_of(flat, rank, bounds)) for rank in range(self.world_size)]
        return [(rank, part) for rank, part in parts if part.numel()]

    def _others(self) -> list[int]:
        """The other ranks, beginning with this one's successor, so that not all send to the same rank at once."""
        return [(self.rank + k) % self.world_size for k in range(1, self.world_size)]

    def _tag(self, kind: str) -> int:
        """Each kind has its own count, as only within a kind is the order the same on all ranks."""
        self.messages[kind] += 1
        return (2 * self.messages[kind] + (kind == "all-gather")) % 2**24 + 2**24 * (self.number % 64)

    def _begin(self, kind: str, tensor: Tensor, times: int, what: Callable[[], str]) -> None:
        """Count a collective; in debug mode first check that all ranks are about to do the same."""
        if self.debug:
            self.logbook.compare(f"{kind} of {what()} ({tensor.numel()} elements, {str(tensor.dtype)[6:]})")
        record = self.traffic[kind]
        elements = times * tensor.numel() * (self.world_size - 1) // self.world_size
        record.calls += 1
        record.elements += elements
        record.bytes += elements * tensor.element_size()


def traffic_table(traffic: Mapping[str, Traffic]) -> str:
    """Traffic by kind of collective, as text."""
    return text_table(("collective", "calls", "elements sent", "bytes sent"),
                      [(kind, t.calls, t.elements, t.bytes) for kind, t in traffic.items()])


def text_table(head: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """Rows as text, each a name and numbers, in columns under ``head``."""
    texts = [head, *([cell if isinstance(cell, str) else f"{cell:,}" for cell in row] for row in rows)]
    return "\n".join(f"{name:<28}" + "".join(f"{cell:>17}" for cell in cells) for name, *cells in texts)


class Rehearsal(Communicator):
    """One rank of ``world_size`` on the meta device, alone: it counts what it would send, and sends nothing.

    direct   as with gloo: it also has memory for what it would receive
    watch    is called while each collective is under way
    """

    watch: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, world_size: int, rank: int = 0, direct: bool = False):
        self._prepare(rank, world_size, torch.device("meta"), direct)

    def all_gather(self, flat: Tensor, *_: Any, **__: Any) -> Handle:
        """Count it."""
        return self._count("all-gather", flat, 1)

    def reduce_scatter(self, flat: Tensor, *_: Any, bounds: Sequence[int] | None = None) -> Handle:
        """Count it."""
        handle = self._count("reduce-scatter", flat, 1, self.watch)
        if self.direct:  # as one tensor for all other ranks
            own = self.shard_of(flat, None, bounds)
            handle.received.append(own.new_empty((self.world_size - 1) * own.numel()))
        return handle

    def all_reduce(self, tensor: Tensor, kind: str = "all-reduce", finish: Callable[[], None] | None = None,
                   what: Callable[[], str] = str) -> Handle:
        """Count it."""
        return self._count(kind, tensor, 2, finish)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Not counted: parameters are broadcast once at the start, and the traffic is that of a step."""

    def _count(self, kind: str, tensor: Tensor, times: int, finish: Callable[[], None] | None = None) -> Handle:
        if self.world_size > 1:
            self._begin(kind, tensor, times, str)
        self.watch()
        return Handle(self, finish=finish)


class Logbook:
    """Where each rank is, kept in the process group's store: it explains what would otherwise only hang.

    Ranks with different numbers of micro-batches wait for each other, while one has left or waits in ``destroy()``. So
    each writes down its micro-batch, and ``report`` reads all. In debug mode ranks also compare what they are about to
    do before each collective: different ones would wait until the timeout, or mix up each other's numbers.
    """

    LOST = ("Timed out", "timed out", "Timeout", "Connection closed", "Connection reset", "Broken pipe")  # in errors
    PATIENCE = 2.0  # seconds that a rank waits for the others to end as well, and for the store to answer

    def __init__(self, number: int, timeout: float):
        self.store = dist.PrefixStore(f"logbook/{number}", dist.distributed_c10d._get_default_store())
        self.rank, self.world_size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self.collectives, self.last = 0, "nothing"
        self.micro_batch, self.since = -1, 0.0  # since: when this rank last began something
        self.write(0)

    def watch(self) -> None:
        """Log where ranks are before a collective times out: NCCL's then raises nothing, but ends the process."""
        Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()

    def compare(self, operation: str) -> None:
        """Raise RuntimeError on every rank unless all are about to do ``operation``."""
        self.collectives += 1
        keys = [f"{self.collectives}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], operation)
        self.store.delete_key(f"{self.collectives - 2}/{self.rank}")  # all have read it, or they could not be here
        try:
            self.store.wait(keys, timedelta(seconds=self.timeout))
        except RuntimeError:
            missing = ", ".join(f"rank {rank}" for rank, key in enumerate(keys) if not self.store.check([key]))
            raise RuntimeError(f"rank {self.rank} is about to do its collective {self.collectives}: {operation}; for "
                               f"{self.timeout:g} seconds it has waited for {missing}, whose last was {self.last}"
                               ) from None
        first, *others = [self.store.get(key).decode() for key in keys]
        for rank, other in enumerate(others, 1):
            if other != first:
                raise RuntimeError(f"ranks go apart at their collective {self.collectives}: rank 0 is about to do "
                                   f"{first}, rank {rank} {other}; all ranks have to run the same parts of the model, "
                                   "in the same order")
        self.last = f"{self.collectives}: {operation}"

    def write(self, micro_batch: int) -> None:
        """This rank begins with a micro-batch, or goes on with it."""
        self.since = time.monotonic()
        if micro_batch != self.micro_batch:
            self.micro_batch = micro_batch
            self.store.set(f"at/{self.rank}", str(micro_batch))

    def end(self) -> None:
        """This rank's last micro-batch is over; RuntimeError where others still train on more of them."""
        self.since = math.inf
        try:
            self.store.set(f"at/{self.rank}", f"{self.micro_batch} ended")
            deadline = time.monotonic() + self.PATIENCE
            while time.monotonic() < deadline:
                places = self.read()
                if all(ended for _, ended in places):
                    return
                time.sleep(0.002)
        except RuntimeError:  # the process that kept the store has ended already
            return
        if any(micro_batch > self.micro_batch and not ended for micro_batch, ended in places):
            raise RuntimeError(self.report())

    def read(self) -> list[tuple[int, bool]]:
        """Each rank's micro-batch, and whether it was its last."""
        texts = [self.store.get(f"at/{rank}").decode() for rank in range(self.world_size)]
        return [(int(text.split()[0]), text.endswith("ended")) for text in texts]

    def report(self) -> str:
        """A sentence on where each rank is, and what to do."""
        found: list[list[tuple[int, bool]]] = []

        def look() -> None:
            with suppress(RuntimeError):
                found.append(self.read())

        looker = Thread(target=look, daemon=True)
        looker.start()
        looker.join(self.PATIENCE)
        if not found:  # the process that keeps the store is gone, or its machine, and PyTorch would wait for long
            return f"rank {self.rank} lost the others in its micro-batch {self.micro_batch}"
        places = found[0]
        lines = ", ".join(f"rank {rank} {'ended after' if ended else 'is in its'} micro-batch {micro_batch}"
                          for rank, (micro_batch, ended) in enumerate(places))
        if len({micro_batch for micro_batch, _ in places}) > 1:
            return (f"ranks have had different numbers of micro-batches: {lines}; give all ranks equally many, as the "
                    "loader that initialize() makes of training_data does")
        return f'ranks lost each other: {lines}; the config\'s "debug": true names what each was about to do'


def _watch(reference: "weakref.ref[Logbook]") -> None:
    """Log where ranks are whenever nothing has begun for four fifths of the timeout."""
    while (logbook := reference()) is not None:
        pause, waited = logbook.timeout / 50, time.monotonic() - logbook.since
        if waited > 0.8 * logbook.timeout:
            logger.error("rank %d has begun nothing for %.0f seconds; NCCL ends a process whose collective takes "
                         "%g. %s", logbook.rank, waited, logbook.timeout, logbook.report())
            logbook.since = math.inf
        del logbook  # an engine that is dropped ends the thread
        time.sleep(pause)


def _as_real(flat: Tensor) -> Tensor:
    """A complex tensor's memory as real numbers: NCCL knows no other."""
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def _sum(parts: list[Tensor], out: Tensor, add: bool) -> None:
    """Write the sum of ``parts``, in their order, into ``out``, which may be one of them; ``parts`` are overwritten."""
    total = parts[0].to(torch.promote_types(parts[0].dtype, out.dtype))  # sums are taken in the wider dtype
    for part in parts[1:-1]:
        total.add_(part)
    if len(parts) > 1 and not add:
        torch.add(total, parts[-1], out=out)
    elif add:
        out.add_(total.add_(parts[-1]) if len(parts) > 1 else total)
    elif out.data_ptr() != total.data_ptr():
        out.copy_(total)


# --- Offload ----------------------------------------------------------------------------------------------------------


class Host:
    """Where offloaded tensors live: in host memory, or in files of ``folder`` that are mapped into memory.

    A file's pages come and go as the system has room for them. Its name is removed at once, so that nothing is left
    behind however the process ends. With a GPU, host memory is pinned, and copies run on two streams of their own:
    ``up`` to the GPU and ``down`` from it. Without one, the same steps copy from memory to memory.
    """

    def __init__(self, device: torch.device, folder: str | None, pin_memory: bool, clock: Clock):
        self.folder, self.clock = folder, clock
        self.place = torch.device("meta" if device.type == "meta" else "cpu")
        self.pinned = pin_memory and device.type == "cuda"
        self.up, self.down = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        self.is_settled = True

    def empty(self, numel: int, dtype: torch.dtype, in_memory: bool = False) -> Tensor:
        """An uninitialised tensor here, or in host memory. Raises OSError where the disk has no room."""
        if self.folder is None or numel == 0 or in_memory or self.place.type == "meta":
            pinned = self.pinned and numel > 0
            return _pinned(numel, dtype) if pinned else torch.empty(numel, dtype=dtype, device=self.place)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="zero_") as file:  # gone at the end, but for the map
            if hasattr(os, "posix_fallocate"):  # else a disk that fills up later ends the process by a signal
                os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=numel, dtype=dtype)

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor with these values here: ``tensor`` itself if it lives here, else a copy."""
        if tensor.device == self.place and (self.folder is None or tensor.untyped_storage().filename is not None):
            return tensor
        return self.empty(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)

    def going_up(self) -> AbstractContextManager:
        """Work queued inside runs on the stream ``up``, after all that the GPU has been given so far."""
        if self.up is None:
            return nullcontext()
        self.up.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.up)

    def bring_up(self, source: Tensor, target: Tensor) -> list[Any]:
        """Start copying ``source``, which lives here, into the device's ``target``; returns what to wait for."""
        with self.going_up():
            if self.up is not None:
                self.up.wait_stream(self.down)  # which may still bring it
            target.copy_(source, non_blocking=True)
            return [] if self.up is None else [self.up.record_event()]

    def bring_down(self, source: Tensor, target: Tensor) -> None:
        """Start copying the device's ``source`` into ``target``, which lives here; see settle."""
        with self.clock.phase("offload"):
            if self.down is None:
                target.copy_(source)
                return
            self.down.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.down):
                target.copy_(source, non_blocking=True)
            source.record_stream(self.down)  # its memory must not go to another tensor before it was read
            self.is_settled = False

    def settle(self) -> None:
        """Wait for every copy down; the GPU waits for those that go up."""
        if self.up is not None:
            torch.cuda.current_stream().wait_stream(self.up)
        if not self.is_settled:
            with self.clock.phase("offload"):
                self.down.synchronize()
            self.is_settled = True


def _pinned(numel: int, dtype: torch.dtype) -> Tensor:
    """Host memory that a GPU copies from and to while it computes. PyTorch's own takes up to twice as much.

    It is pinned in whole pages that nothing else shares, and unpinned once the last tensor in it is gone.
    """
    size = numel * dtype.itemsize
    pages = _round_up(size, mmap.PAGESIZE)
    memory = np.empty(pages + mmap.PAGESIZE, np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE
    address, cuda = memory.ctypes.data + start, torch.cuda.cudart()
    try:
        torch.cuda.check_error(cuda.cudaHostRegister(address, pages, 0))
    except RuntimeError as error:
        raise RuntimeError(f"{pages:,} bytes of host memory can't be pinned for offload ({error}); give "
                           'zero_optimization\'s offload sections "pin_memory": false, or more memory') from None

    def unpin() -> None:
        torch.cuda.synchronize()  # the GPU may still read it
        cuda.cudaHostUnregister(address)

    weakref.finalize(memory, unpin).atexit = False  # a tensor keeps the array, and the array's end calls this
    return torch.from_numpy(memory[start:start + size]).view(dtype)


class Offload:
    """The config's hosts: of masters, gradients and optimizer state, and of sharded parameters; None: on the device."""

    def __init__(self, config: ZeroConfig, device: torch.device, clock: Clock):
        hosts: dict[Any, Host | None] = {None: None}  # the same one for the same place
        keys = []
        for section in (config.offload_optimizer, config.offload_param):
            folder = section.nvme_path if section.device == "nvme" else None
            keys.append(None if section.device == "none" else (folder, section.pin_memory))
            if keys[-1] not in hosts:
                hosts[keys[-1]] = Host(device, folder, section.pin_memory, clock)
        self.optimizer, self.parameters = (hosts[key] for key in keys)
        self.ratio = config.offload_optimizer.ratio
        if self.optimizer is not None and device.type == "cuda" and torch.get_num_threads() == 1:  # as torchrun sets it
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    def host_for(self, numel: int, buckets: "Sequence[Bucket]") -> Host | None:
        """The host of the next bucket's master; with a ratio below 1 some stay on the device."""
        if self.optimizer is None or self.ratio == 1:
            return self.optimizer
        gone = sum(bucket.numel for bucket in buckets if bucket.host is not None)
        every = sum(bucket.numel for bucket in buckets if bucket.trained)
        return self.optimizer if gone + numel <= self.ratio * (every + numel) else None


def check_room(needs: Mapping[tuple[str, str], int], communicator: Communicator) -> None:
    """Raise ValueError on all ranks if one rank's folder for offload is missing or lacks the room.

    needs   this rank's bytes, by the config's section and the folder. Those of a machine's ranks add up.
    """
    if not needs:
        return
    reports = gather([(key, path, size, *_disk(path)) for (key, path), size in needs.items()])
    together: Counter[Any] = Counter()
    for key, path, size, disk, free in (line for report in reports for line in report):
        together[disk] += size
        if free is None:
            raise ValueError(f"zero_optimization.{key}.nvme_path is {path!r}; needed: a folder that can be written to, "
                             f"on a disk with {size:,} bytes free for each rank")
        if together[disk] > free:
            raise ValueError(f"zero_optimization.{key}.nvme_path is {path!r}, where {free:,} bytes are free; needed: "
                             f"{sum(need for r in reports for _, _, need, d, _ in r if d == disk):,} for all ranks of "
                             "that machine")


def _disk(folder: str) -> tuple[Any, int | None]:
    """The disk, by machine and device, and the bytes free on it; None where nothing can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return (socket.gethostname(), os.stat(folder).st_dev), shutil.disk_usage(folder).free
    except OSError:
        return (socket.gethostname(), folder), None


def _state_dtypes(optimizer: Optimizer, group: Mapping[str, Any]) -> list[torch.dtype]:
    """The dtypes of an optimizer's state with a value per element, found by a step on four numbers."""
    if type(optimizer) not in ELEMENTWISE and not hasattr(optimizer, "is_elementwise"):
        return [torch.float32] * 2  # as Adam's: a trial step of an unknown optimizer may have side effects
    trial, probe = nn.Parameter(torch.zeros(2, 2)), type(optimizer).__new__(type(optimizer))
    probe.__setstate__({"defaults": optimizer.defaults, "state": defaultdict(dict), "param_groups": [
        {**group, "params": [trial], "capturable": False, "fused": False}]})
    trial.grad = torch.zeros(2, 2)
    probe.step()
    return [v.dtype for v in probe.state[trial].values() if isinstance(v, Tensor) and v.shape == trial.shape]


# --- Buckets: parameters ----------------------------------------------------------------------------------------------


class Dtypes(NamedTuple):
    """The dtypes of one parameter."""
    compute: torch.dtype    # the parameter itself, which forward and backward read
    master: torch.dtype     # what the optimizer updates; shares the parameter's memory where the dtype is the same
    gradient: torch.dtype   # in which gradients are accumulated
    reduction: torch.dtype  # in which they are sent


@dataclass(eq=False)
class Slot:
    """A parameter's place in its bucket."""
    name: str
    parameter: nn.Parameter
    offset: int   # where it begins and ends, in elements of the flat tensor
    end: int
    shape: torch.Size
    stride: tuple[int, ...]
    group: int | None = None           # the optimizer's param group, if it is in one
    kind: type = nn.Parameter          # its Python class while its values can be used, see ShardedParameter
    bucket: "Bucket | None" = None
    place: tuple[int, int] = (0, 0)    # start and length within what this rank updates of the bucket
    piece: nn.Parameter | None = None  # this rank's part of the master, as the optimizer knows it; None: it has none
    version: int = 0                   # the parameter's version when master and shard last had its values
    taken: "TakenGradient | None" = None   # the parameter's grad once the bucket has the gradient
    closed: "TakenGradient | None" = None  # the piece's grad outside of a step: every use of it raises

    def enter(self, bucket: "Bucket") -> None:
        """Move into ``bucket``."""
        self.bucket, _SLOTS[id(self.parameter)] = bucket, self
        inside = self.overlap(bucket.own.start, bucket.own.stop)
        size = inside.stop - inside.start
        self.place = (self.offset + inside.start - bucket.own.start if size else 0, size)

    def check_place(self) -> None:
        """Raise RuntimeError where other memory was assigned to the parameter."""
        p = self.parameter
        if not _same_memory(p, self.bucket.flat) or p.storage_offset() != self.offset:
            raise RuntimeError(
                f"{self.name} no longer lies where initialize() put it; do not call the model's to(), half() or "
                "load_state_dict(assign=True) after initialize(), nor assign p.data; to set values, call p.copy_() "
                "under torch.no_grad(), or zero.safe_set_full_fp32_param()")

    def view(self, flat: Tensor, start: int = 0) -> Tensor:
        """The parameter's elements in its own shape, where ``flat`` begins at element ``start`` of the bucket."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset - start)

    def overlap(self, start: int, end: int) -> slice:
        """The range of its elements, from 0, that lies in the bucket's elements ``start`` to ``end``."""
        low = min(max(start, self.offset), self.end)
        return slice(low - self.offset, max(low, min(end, self.end)) - self.offset)

    def part(self, flat: Tensor, start: int) -> Tensor:
        """The view of its elements (1-D, perhaps empty) in ``flat``, which begins at the bucket's element ``start``."""
        inside = self.overlap(start, start + flat.numel())
        return flat.narrow(0, min(max(0, self.offset + inside.start - start), flat.numel()), inside.stop - inside.start)

    def in_order(self, value: Tensor) -> Tensor:
        """A value for the parameter, or for its piece, 1-D in the order of the elements in memory."""
        return _in_memory_order(value, self.stride) if value.shape == self.shape else value

    def own(self, flat: Tensor) -> Tensor:
        """The view of its elements in a tensor that covers what this rank updates of the bucket."""
        return flat.narrow(0, *self.place)

    def own_values(self, value: Tensor) -> Tensor:
        """This rank's part of ``value``, which has the parameter's shape, in the shape of the piece."""
        part = self._own_part(value).to(self.bucket.master.device, copy=True)
        return part if self.piece.shape == part.shape else self.view(part, self.offset)

    def write(self, value: Tensor, flat: Tensor) -> None:
        """Write ``value``, in the parameter's shape, into a tensor that covers what this rank updates."""
        self.own(flat).copy_(self._own_part(value))

    def _own_part(self, value: Tensor) -> Tensor:
        return self.in_order(value)[self.overlap(self.bucket.own.start, self.bucket.own.stop)]

    def collect(self, part: Tensor, start: int) -> Tensor:
        """Assemble the parameter, in its own shape, from the ranks' shards. Every rank must call it.

        part    this rank's values, from element ``start`` of the bucket; all of it where the optimizer is not sharded
        """
        bucket, flat = self.bucket, torch.empty(self.end - self.offset, dtype=part.dtype, device=self.bucket.device)
        if not bucket.sharded.optimizer:
            return self.view(flat.copy_(self.part(part, start)), self.offset)
        for owner, (low, high) in enumerate(pairwise(bucket.bounds)):
            stretch = flat[self.overlap(low, high)]
            if stretch.numel():
                if owner == bucket.communicator.rank:
                    stretch.copy_(self.part(part, start))
                bucket.communicator.broadcast(stretch, owner)
        return self.view(flat, self.offset)


# Slots by the parameter's id, as long as an engine or ``Init`` has the parameter: DeepSpeed's documented functions take
# nothing but a parameter. A slot keeps its parameter alive, so no other one can have the same id meanwhile.
_SLOTS: "weakref.WeakValueDictionary[int, Slot]" = weakref.WeakValueDictionary()


def _slot_of(parameter: nn.Parameter) -> Slot:
    """A parameter's slot; ValueError where no engine has the parameter."""
    slot = _SLOTS.get(id(parameter))
    if slot is None:
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} belongs to no engine; allowed: the parameters "
                         "of a model that was given to initialize(), until its engine's destroy()")
    slot.check_place()
    return slot


def _owner_of(parameter: nn.Parameter) -> "Gatherer | Init | None":
    """What gathers a sharded parameter; None for a parameter that stays whole."""
    slot = _SLOTS.get(id(parameter))
    return None if slot is None or slot.bucket.unit is None else slot.bucket.unit.owner


def _append_slot(slots: list[Slot], name: str, p: nn.Parameter, group: int | None = None) -> None:
    """Append a slot for ``p`` behind the last one."""
    before, offset = _SLOTS.get(id(p)), _round_up(slots[-1].end, ALIGN) if slots else 0
    dense = torch.empty_like(torch.empty_strided(p.shape, p.stride(), device="meta"))  # as a copy without gaps lies
    slots.append(Slot(name, p, offset, offset + p.numel(), p.shape, dense.stride(), group,
                      type(p) if before is None else before.kind))


class Bucket:
    """Parameters of one dtype that communicate together; the picture is at the top of this file.

    flat       (numel,), compute dtype: the whole parameters. In stage 3 it has no memory while its unit is sharded
    shard      (numel / N,), stage 3: this rank's slice. It is the master unless one is offloaded, or nothing is trained
    master     (numel / N,), stage 0 (numel,): what the optimizer updates; shares memory with ``flat`` or ``shard``
               where dtype and place are the same. None if the bucket is not trained
    bounds     where each rank's shard begins, and where the last one ends; equally far apart unless no parameter may be
               cut, see lay_out_whole
    own        the slice that this rank updates: its shard; at stage 0 all
    gradients  reduces the bucket's gradients; None if the bucket is not trained
    unit       gathers and frees it; None: it stays whole
    host       where master, summed gradients and optimizer state live if offloaded; ``shard_host``: the same of shard
    """

    def __init__(self, plan: "Plan", communicator: Communicator, sharded: Sharded, host: Host | None = None,
                 shard_host: Host | None = None, zero: "Zero | None" = None):
        self.unit, trained, self.whole, self.dtypes, self.slots, bounds = plan
        self.communicator, self.device, self.sharded = communicator, communicator.device, sharded
        self.host, self.shard_host, self.zero = host, shard_host, zero
        self.gradients: Gradients | None = None
        rank, ranks = communicator.rank, communicator.world_size
        size = _round_up(self.slots[-1].end, ALIGN * ranks) // ranks
        self.uneven = {} if bounds is None else {"bounds": bounds}  # the collectives' argument; none: equal slices
        self.bounds = bounds or (range(0, size * ranks + 1, size) if size else [0] * (ranks + 1))
        self.numel = self.bounds[-1]
        self.own = slice(self.bounds[rank], self.bounds[rank + 1]) if sharded.optimizer else slice(0, self.numel)
        self.gather = Handle()  # the latest one
        self._flatten(trained)
        if self.unit is not None:
            self.unit.buckets.append(self)
            self.unit.numel += self.numel

    def _flatten(self, trained: bool) -> None:
        """Make the parameters views of ``flat``, with rank 0's values; their former memory is freed.

        A large bucket that will be sharded goes parameter by parameter: never do all of them have memory twice.
        """
        self.shard = self.master = None
        large = self.unit is not None and self.numel >= 2**20
        start, end = (self.own.start, self.own.stop) if large else (0, self.numel)
        values = torch.zeros(end - start, dtype=self.dtypes.master, device=self.device)
        if self.unit is not None:
            self.flat = torch.empty(self.numel, dtype=self.dtypes.compute, device=self.device)
        for slot in self.slots:
            with _taken_over(slot.parameter) as whole:
                whole = _in_memory_order(whole, slot.stride).to(self.device)
                if large:
                    self.communicator.broadcast(whole, source=0)
                slot.part(values, start).copy_(whole[slot.overlap(start, end)])
                del whole
            slot.enter(self)
            if self.unit is not None:
                self._point(slot)
        if not large:
            self.communicator.broadcast(values, source=0)
        own = values[self.own.start - start:self.own.stop - start]
        if self.unit is not None:
            self.free()
        else:
            self.flat = values.to(self.dtypes.compute)  # values itself where the dtype is the same
            for slot in self.slots:
                self._point(slot)
        self._make_master(own, trained)
        if large:  # else the holes that large parameters leave add up to another model
            _return_free_memory()

    def _point(self, slot: Slot) -> None:
        slot.parameter.data = slot.view(self.flat)
        slot.version = slot.parameter._version

    def _make_master(self, own: Tensor, trained: bool) -> None:
        """Make master and shard from the values ``own``; they share memory where possible."""
        if trained:
            own = own.to(self.dtypes.master)
            in_place = self.host is None and _same_memory(own, self.flat)
            self.master = own if in_place else _copy_at(self.host, own)
        if self.unit is not None:
            together = trained and self.host is self.shard_host and (
                self.host is None or self.dtypes.compute == self.dtypes.master)
            self.shard = self.master if together else _copy_at(self.shard_host, own.to(self.dtypes.compute))

    def thaw(self, dtypes: Dtypes, host: Host | None) -> None:
        """Train the frozen bucket from now on; the master begins with the values that the model computed with."""
        self.dtypes, self.host = dtypes, host
        own = self.flat[self.own] if self.shard is None else self.shard
        self._make_master(own.to(self.device), trained=True)

    @property
    def trained(self) -> bool:
        """Whether the optimizer updates it."""
        return self.master is not None

    def label(self) -> str:
        """A name for it, for messages."""
        names = [slot.name for slot in self.slots]
        block = f"the block {self.unit.name}: " if self.unit is not None and self.unit.name else ""
        return f"{block}{names[-1]}" + (f" to {names[0]}" if len(names) > 1 else "")

    @property
    def finest(self) -> tuple[Tensor, int]:
        """The most precise values that this rank keeps, and the element at which they begin."""
        if self.master is None and self.shard is None:
            return self.flat, 0
        return self.shard if self.master is None else self.master, self.own.start

    # The optimizer's view.

    def hand_over(self, optimizer: Optimizer) -> None:
        """Give the optimizer this rank's pieces in place of the parameters, with the state that it has for them.

        A piece is a view of the master: in the parameter's own shape if none may be cut, else 1-D. A parameter
        outside of this rank's shard has no piece; one of no elements has an empty one, as in plain PyTorch.
        """
        for slot in self.slots:
            state, part = optimizer.state.pop(slot.parameter, {}), slot.own(self.master)
            if part.numel() or not slot.shape.numel():
                slot.piece = nn.Parameter(slot.view(part, slot.offset) if self.whole else part)
                slot.piece.grad = slot.closed = TakenGradient(slot, slot.piece)
            if slot.piece is not None and state:
                optimizer.state[slot.piece] = {
                    key: slot.own_values(value) if _is_like(key, value, slot.shape) else value
                    for key, value in state.items()}

    def keep_state(self, optimizer: Optimizer) -> None:
        """Move optimizer state that a step or a checkpoint has made to this bucket's host."""
        moved = False
        for slot in self.slots if self.host is not None else ():
            state = optimizer.state.get(slot.piece, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    state[key] = self.host.keep(value)
                    moved = moved or state[key] is not value
        if moved:  # once per bucket, else the C library keeps the memory of all buckets' state
            del value
            _return_free_memory()

    @property
    def pieces(self) -> list[nn.Parameter]:
        """This rank's pieces, which the optimizer updates."""
        return [slot.piece for slot in self.slots if slot.piece is not None]

    # Parameters: from the masters back to what the model computes with.

    def publish(self) -> None:
        """After a change of the masters: start to send every rank the whole new parameters."""
        if self.unit is not None:  # the next gather reads the shard
            if self.master is not None and self.shard is not self.master:
                self.shard.copy_(self.master, non_blocking=True)  # only gathers read it, and streams keep that order
            if self.unit.state is UnitState.WHOLE:  # GatheredParameters is open around the step: show the new values
                self._start_gather()
        elif self.master is not None:
            if not _same_memory(self.master, self.flat):
                self.flat[self.own].copy_(self.master, non_blocking=True)
            if self.sharded.optimizer:
                self.gather = self.communicator.all_gather(self.flat, self.label, **self.uneven)

    def start_gather(self) -> None:
        """Give ``flat`` memory again and start to fill it with every rank's shard."""
        with torch._C.DisableTorchFunctionSubclass():
            written = [slot.name for slot in self.slots if slot.parameter._version != slot.version]
        if written:
            raise RuntimeError(f"a view of the parameter {written[0]} was written to while it was sharded (stage 3); "
                               "that is lost. Write inside forward, or inside zero.GatheredParameters")
        # The same storage as before: a graph, or a view that somebody keeps, sees the weights again.
        if not self.has_memory:
            self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
        self._start_gather()

    def _start_gather(self) -> None:
        _GATHERED_INTO[self.flat.untyped_storage()._cdata] = self
        with nullcontext() if self.shard_host is None else self.shard_host.going_up():
            self.flat[self.own].copy_(self.shard, non_blocking=True)
            self.gather = self.communicator.all_gather(self.flat, self.label, **self.uneven)
            if self.shard_host is not None and self.shard_host.up is not None:
                self.gather.works.append(self.shard_host.up.record_event())

    def free(self) -> None:
        """Release the whole parameters' memory, unless other code has a view of it; each rank keeps its shard.

        What autograd saves is no such view, see _pack.
        """
        self.gather.wait()
        self.keep_writes(uncounted=False)  # of a hook in backward, for example
        if self.is_viewed:  # Gatherer.free_unused tries again
            return
        try:
            self.flat.untyped_storage().resize_(0)
        except RuntimeError:  # a numpy array shared the memory, which then can't be resized: take another
            self.flat = torch.empty_like(self.flat)
            with torch._C.DisableTorchFunctionSubclass():
                for slot in self.slots:
                    self._point(slot)
            self.flat.untyped_storage().resize_(0)

    @property
    def is_viewed(self) -> bool:
        """Whether anything but the parameters is a view of ``flat``."""
        memories = [_memory_of(slot.parameter) for slot in self.slots]
        return _holders(self.flat) > 1 + memories.count(_memory_of(self.flat))

    @property
    def has_memory(self) -> bool:
        """Whether the whole parameters have memory now."""
        return self.flat.untyped_storage().nbytes() > 0

    def keep_writes(self, uncounted: bool = True) -> None:
        """Take over in-place writes to the parameters, such as a clamp between steps.

        All ranks must write the same: what is written to gathered parameters counts in the digest of gathers, and the
        rest is compared by ``Zero.step``. Writes through ``p.data`` are not compared, as PyTorch counts no version for
        them. With ``uncounted`` they are seen in sharded parameters whose old values are on the same device; elsewhere
        only where the parameter itself is the master.
        """
        written = any(slot.parameter._version != slot.version for slot in self.slots)
        comparable = uncounted and self.unit is not None and (
            self.finest[0].device == self.shard.device == self.flat.device)
        if written and self.unit is not None:
            self.communicator.note(self.checksum())
        elif written:
            self.zero.written = True
        if comparable or written:
            self.keep_changes()
            self.note_versions()

    def checksum(self) -> int:
        """Of the whole parameters: a sum, which is as fast as reading them."""
        return int(self.flat.view(torch.int64).sum())

    def note_versions(self) -> None:
        """Remember that master and shard have the parameters' values now."""
        with torch._C.DisableTorchFunctionSubclass():
            for slot in self.slots:
                slot.version = slot.parameter._version

    def keep_changes(self) -> None:
        """Copy what was written into the whole parameters to shard and master."""
        finest, start = self.finest
        if _same_memory(finest, self.flat):
            return
        new = self.flat[start:start + finest.numel()].to(finest.device)
        old = finest.to(new.dtype)
        if finest.device.type == "cpu" and _same_bytes(new, old):  # on a GPU the comparison would wait for it
            return
        if new.dtype == finest.dtype:
            finest.copy_(new)
        else:  # unchanged elements keep the finer value
            torch.where(new == old, finest, new.to(finest.dtype), out=finest)
        if self.shard is not None and self.shard is not finest:
            self.shard.copy_(new)


# --- Buckets: gradients -----------------------------------------------------------------------------------------------


class Life(Enum):
    """How far the reduction of a bucket's gradients is in a backward pass."""
    COLLECTING = "gradients come in; the reduction has no place in the order yet"
    QUEUED = "the reduction has its place in the order of all"
    SENDING = "the collective is in flight"
    SENT = "the sum is complete; a gradient that comes now is late"


LAUNCHED = Life.SENDING, Life.SENT


class Gradients:
    """The gradients of one bucket: from autograd into a flat buffer, and their sum over ranks.

    buffer       (numel,), gradient dtype: the window's gradients on this rank. Stages 2, 3: only during backward
    sum          (numel / N,), stage 0 (numel,): their sum over ranks, divided by ``predivide``; in stages 0 and 1 a
                 slice of ``buffer``
    send_buffer  what is reduced: ``buffer``, or a copy in another dtype
    landing      where the collective writes the sum: ``sum``, or if that is offloaded, memory on the device
    reduced      whether ``sum`` belongs to this window
    used         the parameters with a gradient in this window: on this rank, or once ``Zero.step`` has agreed, on any;
                 ``filled``: those with values in ``buffer``
    arrived      those with a gradient in this backward; ``expected``: those in its graph; ``hidden``: those whose
                 gradient came in the last backward without being in its graph, and at first all
    late         gradients that came after the reduction had begun
    """

    def __init__(self, bucket: Bucket, predivide: float | None, all_reduces: bool):
        self.bucket, self.communicator, self.host = bucket, bucket.communicator, bucket.host
        ranks, half = self.communicator.world_size, bucket.dtypes.reduction == torch.float16
        if ranks == 1 or predivide is None:  # in fp16 a sum over ranks may overflow where a mean fits
            predivide = float(ranks) if half else 1.0
        self.predivide, self.all_reduces = predivide, all_reduces
        self.buffer: Tensor | None = None
        self.sum: Tensor | None = None
        self.send_buffer: Tensor | None = None
        self.landing: Tensor | None = None
        self.reduced = False
        self.used: set[Slot] = set()
        self.filled: set[Slot] = set()
        self.arrived: set[Slot] = set()
        self.expected: set[Slot] = set()
        self.hidden = set(bucket.slots)
        self.late: dict[Slot, Tensor] = {}
        self.life = Life.COLLECTING
        self.reduction = Handle()
        slots, dtypes = bucket.slots, bucket.dtypes
        # Whether the bucket is one parameter whose gradient from autograd can become the buffer.
        self.adopts = slots[0].shape.numel() == bucket.numel and dtypes.compute == dtypes.gradient
        self.keeps_buffer = not bucket.sharded.gradients and self.host is None  # between backward passes
        ends = [0, *(slot.end for slot in slots)]
        self.gaps = [(end, start) for end, start in zip(ends, [*(slot.offset for slot in slots), bucket.numel])
                     if end < start]

    def take(self, slot: Slot, gradient: Tensor) -> None:
        """Move a parameter's ``gradient`` into the buffer. The only full copy of a gradient in a step.

        Where the bucket is this parameter alone, autograd's tensor becomes the buffer, and nothing is copied.
        """
        self.used.add(slot)
        self.arrived.add(slot)
        if self.life in LAUNCHED:  # as reentrant recomputation gives them; see Zero._agree
            self.late[slot] = gradient if slot not in self.late else self.late[slot] + gradient
            return
        if gradient.is_sparse:  # of nn.Embedding(sparse=True): here every gradient is summed densely
            gradient = gradient.to_dense()
        if (self.adopts and self.buffer is None and gradient.stride() == slot.stride
                and gradient.dtype == self.bucket.dtypes.gradient
                and _holders(gradient) == 1):  # autograd may give several parameters views of one tensor
            self.buffer = slot.in_order(gradient.resolve_conj().resolve_neg())
        else:
            self._prepare_buffer()
            place = slot.view(self.buffer)
            place.add_(gradient) if slot in self.filled else place.copy_(gradient)
        self.filled.add(slot)

    def drop(self, slot: Slot) -> None:
        """Drop a parameter's gradient of this window."""
        self.used.discard(slot)
        self.filled.discard(slot)
        self.late.pop(slot, None)
        for flat in (self.sum, self.landing) if self.reduced else ():
            if flat is not None:  # the landing, where the window's sum is added to what is in flight, has it too
                slot.own(flat).zero_()

    def _prepare_buffer(self) -> None:
        """Make ``buffer`` ready to be written."""
        if self.buffer is None:
            numel, dtype = self.bucket.numel, self.bucket.dtypes.gradient
            self.buffer = torch.empty(numel, dtype=dtype, device=self.bucket.flat.device)
            for start, end in self.gaps:
                self.buffer[start:end] = 0  # gaps belong to no parameter, but count in norms
        elif self.reduced and _same_memory(self.buffer, self.sum):
            self.sum = self.sum.clone()  # a backward after the window's reduction: keep the sum out of it

    @property
    def complete(self) -> bool:
        """Whether this backward should bring no more gradients; one that comes nevertheless is ``late``.

        The graph does not show the gradients of a backward inside this one, as reentrant recomputation runs it. Where
        no unit's end shows that they are complete, those that came last time are waited for.
        """
        return len(self.arrived) >= len(self.expected) and (  # called at every gradient, so the cheap test comes first
            self.arrived >= (self.expected if self.bucket.unit else self.expected | self.hidden))

    def launch(self) -> None:
        """Start the reduction. A parameter without a gradient counts as zero: another rank may have one."""
        self._prepare_buffer()
        for slot in self.bucket.slots:
            if slot not in self.filled:
                slot.view(self.buffer).zero_()
        own = self.bucket.own
        if self.sum is None:
            if self.host is not None:
                self.sum = self.host.empty(own.stop - own.start, self.bucket.dtypes.gradient, in_memory=True)
            else:
                self.sum = self.buffer[own] if self.keeps_buffer else torch.empty_like(self.buffer[own])
        self.landing = self.sum if self.host is None else torch.empty_like(self.buffer[own])
        before = self.host.bring_up(self.sum, self.landing) if self.host is not None and self.reduced else []
        self.send_buffer = self._to_send()
        if self.all_reduces or not self.bucket.sharded.optimizer:
            finish = partial(_sum, [self.send_buffer[own]], self.landing, self.reduced)
            self.reduction = self.communicator.all_reduce(self.send_buffer, finish=finish, what=self.bucket.label)
        else:
            self.reduction = self.communicator.reduce_scatter(self.send_buffer, self.landing, self.reduced,
                                                              self.bucket.label, **self.bucket.uneven)
        self.reduction.works += before
        self.life = Life.SENDING

    def _to_send(self) -> Tensor:
        """The gradients in the dtype of reductions, divided by ``predivide`` so that their sum does not overflow."""
        dtypes = self.bucket.dtypes
        if self.communicator.world_size == 1:
            return self.buffer
        if dtypes.reduction != dtypes.gradient:
            return torch.mul(self.buffer, 1 / self.predivide, out=torch.empty_like(self.buffer, dtype=dtypes.reduction))
        return self.buffer if self.predivide == 1 else self.buffer.mul_(1 / self.predivide)

    def finish(self) -> None:
        """Wait for the sum. Unless the buffer is kept, drop it, and with it the slices of other ranks."""
        self.reduction.wait()
        if self.host is not None:
            self.host.bring_down(self.landing, self.sum)
        self.send_buffer = self.landing = None
        self.reduced, self.life = True, Life.SENT
        self.filled.clear()
        if not self.keeps_buffer:
            self.buffer = None

    def end_backward(self, ran: bool = False) -> None:
        """Get ready for the next backward of the window; ``ran``: there was one."""
        if ran:
            self.hidden = self.arrived - self.expected
        self.arrived, self.life = set(), Life.COLLECTING

    def reduce_late(self) -> None:
        """Reduce the gradients that came after this backward's launch: sums are linear. Every rank must call it."""
        self.life, late, self.late = Life.COLLECTING, self.late, {}
        for slot, gradient in late.items():
            self.take(slot, gradient)
        self.launch()
        self.finish()
        self.end_backward()

    def reset(self) -> None:
        """Drop the window's gradients; persistent buffers stay allocated for the next one."""
        self.reduction.wait()
        self.send_buffer = self.landing = None
        if self.keeps_buffer:
            self.sum = None
            if self.adopts:
                self.buffer = None
        self.end_backward()
        self.reduced = False
        with torch._C.DisableTorchFunctionSubclass():
            for slot in self.used:
                slot.parameter.grad = None
        self.used, self.filled, self.late = set(), set(), {}

    # Uses of the sum. No other code knows that it is divided by ``predivide``.

    @staticmethod
    def square(every: "Iterable[Gradients]", device: torch.device, exact: bool = False) -> Tensor:
        """The squared 2-norm of this rank's slices of the sums, in float64; ``exact`` where squares leave float32."""
        kinds: defaultdict[Any, list[Tensor]] = defaultdict(list)  # tensors whose norms one call can take
        for each in every:
            part = _as_real(each.sum if each.bucket.sharded.optimizer else each.communicator.shard_of(each.sum))
            pieces = part.split(2**20) if exact else [part]  # each may become a copy in float64
            kinds[part.device, part.dtype, each.predivide] += pieces
        total = torch.zeros((), dtype=torch.float64, device=device)
        for (_, dtype, predivide), parts in kinds.items():
            wider = torch.float64 if exact else torch.float32 if dtype.itemsize == 2 else None
            norms = torch.stack(torch._foreach_norm(parts, dtype=wider)).double()
            total += norms.square().sum() * predivide ** 2
        return total

    def whole(self, slot: Slot) -> Tensor:
        """The sum of one parameter's gradients, in its shape. Every rank must call it."""
        return slot.collect(self.sum, self.bucket.own.start) * self.predivide

    def set_sum(self, slot: Slot, value: Tensor) -> None:
        """Make ``value``, in the parameter's shape, the sum of its gradients."""
        slot.write(value / self.predivide, self.sum)
        self.used.add(slot)
        slot.parameter.grad = slot.taken  # else the step would take it for a dropped one

    def arm(self, factor: float) -> None:
        """Give the pieces their gradients times ``factor``, for the parameters that have one on any rank.

        An optimizer skips a piece without one: no decay, no momentum, and its step count stays.
        """
        if factor * self.predivide != 1.0:
            self.sum.mul_(factor * self.predivide)
        gradients = self.sum.to(self.bucket.dtypes.master)
        for slot in self.bucket.slots:
            if slot in self.used and slot.piece is not None:
                part = slot.own(gradients)
                slot.piece.grad = part if slot.piece.dim() == 1 else slot.view(part, slot.offset)

    def disarm(self) -> None:
        """Take the gradients back, so that the optimizer's next step skips these pieces."""
        for piece in self.bucket.pieces:
            piece.grad = None

    def close(self) -> None:
        """The step is over: from now on every use of a piece's gradient, such as clipping it, raises."""
        for slot in self.bucket.slots:
            if slot.piece is not None:
                slot.piece.grad = slot.closed


class TakenGradient(Tensor):
    """A parameter's ``grad`` once its bucket has taken the gradient: a shape without numbers.

    With it PyTorch's own calls do what they say. ``zero_grad()``, of the model or a part of it, and ``p.grad = None``
    remove it, and ``Zero`` then drops the gradient. Autograd's next gradient of the window is added to the bucket. Any
    other operation raises: the numbers are elsewhere, and at stages 2 and 3 no rank has all of them. So does any
    operation on the ``grad`` of the optimizer's ``piece`` of a parameter.
    """

    @staticmethod
    def __new__(cls, slot: Slot, piece: nn.Parameter | None = None) -> "TakenGradient":
        p = slot.parameter if piece is None else piece
        return Tensor._make_wrapper_subclass(cls, p.shape, strides=p.stride(), dtype=p.dtype, device=p.device)

    def __init__(self, slot: Slot, piece: nn.Parameter | None = None):
        self.is_whole = piece is None
        self.slot = weakref.ref(slot)  # weak: the garbage collector does not see what a tensor keeps

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet = func.overloadpacket
        if packet is torch.ops.aten.detach:
            return args[0]
        taken = [t for t in tensors_in(args) if isinstance(t, TakenGradient)]
        slot = taken[0].slot()
        if not all(each.is_whole for each in taken):
            raise cls._refusal(packet.__name__, slot)
        if slot is not None and packet in (torch.ops.aten.zero_, torch.ops.aten._foreach_zero_):
            for each in taken:
                each.slot().bucket.zero.reducer.drop(each.slot())
            return args[0]
        added = packet in (torch.ops.aten.add_, torch.ops.aten.add) and args[0] is taken[0]
        if slot is not None and added and _in_backward():  # autograd adds up the window's gradients
            slot.bucket.zero.reducer.take_more(slot, args[1])
            return args[0] if packet is torch.ops.aten.add_ else TakenGradient(slot)
        raise cls._refusal(packet.__name__, slot)

    @staticmethod
    def _refusal(operation: str, slot: Slot | None) -> RuntimeError:
        return RuntimeError(
            f"{operation} of p.grad: the gradient of {slot.name if slot else 'this parameter'} is in its bucket after "
            "backward(). zero.safe_get_full_grad(p) and zero.safe_set_full_grad(p, value) read and write it; the "
            "config's gradient_clipping clips it, and zero_grad() drops it")

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise self._refusal("use", self.slot())

    def _set_data(self, value: Tensor) -> None:
        if value is not self:  # as a module's to() does that changes nothing
            self._refuse()

    share_memory_ = numpy = tolist = __reduce_ex__ = _refuse  # where PyTorch would end the process, or not say why
    data = property(lambda self: self, _set_data)  # what is assigned would be lost

    def __repr__(self, *, tensor_contents: None = None) -> str:
        return f"TakenGradient(shape={tuple(self.shape)}, dtype={self.dtype})"


class Plan(NamedTuple):
    """What a Bucket is made from."""
    unit: "Unit | None"   # of stage 3; None: the parameters stay whole
    trained: bool         # in a param group of the optimizer, and not frozen
    whole: bool           # none of them may be cut
    dtypes: Dtypes
    slots: list[Slot]
    bounds: list[int] | None = None  # of the ranks' shards; None: all are of one size


def plan_buckets(model: nn.Module, config: ZeroConfig, device: torch.device,
                 dtypes: Callable[[nn.Parameter], Sequence[torch.dtype]], groups: Mapping[int, int],
                 units: "Mapping[int, Unit]", whole: Collection[int] = (), ranks: int = 1) -> list[Plan]:
    """Sort a model's parameters into buckets, in reverse order of registration: roughly the order of their gradients.

    groups   the param group of each parameter that is in one, by its id
    units    the unit of each parameter that is to be sharded, by its id; see assign_units
    whole    the groups whose parameters must not be cut into the shards of ``ranks``; see lay_out_whole
    """
    named = list(model.named_parameters())[::-1]
    size = bucket_size(config, sum(p.numel() for _, p in named), device)
    limit = config.stage3_param_persistence_threshold
    plans: list[Plan] = []
    open_slots: dict[Any, list[Slot]] = {}
    for name, p in named:
        unit = units.get(id(p)) if p.numel() > limit else None
        group = groups.get(id(p))
        key = (unit, group is not None and p.requires_grad, group in whole, Dtypes(*dtypes(p)))
        place = None if key[1] else group  # frozen groups may be thawed one by one
        slots = open_slots.setdefault((key, place), [])
        _append_slot(slots, name, p, group)
        if unit is None and slots[-1].end >= size:
            plans.append(Plan(*key, open_slots.pop((key, place))))
    plans += [Plan(*key, slots) for (key, _), slots in open_slots.items()]
    bounds = lay_out_whole([plan.slots for plan in plans if plan.whole], ranks) if ranks > 1 else []
    return [plan._replace(bounds=bounds.pop(0)) if plan.whole and bounds else plan for plan in plans]


def lay_out_whole(buckets: list[list[Slot]], ranks: int) -> list[list[int]]:
    """Move parameters within their buckets so that each lies in one rank's shard; returns the bounds of the shards.

    Largest first, each goes to the rank with the least so far. A bucket's shards are as large as their contents, or
    empty: otherwise a matrix alone in its bucket would need padding for all other ranks.
    """
    loads, owners = [0] * ranks, {}
    for slot in sorted((slot for slots in buckets for slot in slots), key=lambda slot: -slot.shape.numel()):
        owners[slot] = loads.index(min(loads))
        loads[owners[slot]] += _round_up(slot.shape.numel(), ALIGN)
    found = []
    for slots in buckets:
        sizes = [0] * ranks
        for slot in slots:
            sizes[owners[slot]] += _round_up(slot.shape.numel(), ALIGN)
        found.append([0, *accumulate(sizes)])
        starts = found[-1][:-1]
        for slot in slots:
            slot.offset = starts[owners[slot]]
            slot.end = slot.offset + slot.shape.numel()
            starts[owners[slot]] += _round_up(slot.shape.numel(), ALIGN)
        slots.sort(key=lambda slot: (slot.offset, slot.end))
        found[-1][-1] = max(ALIGN, found[-1][-1])  # where none has elements
    return found


def bucket_size(config: ZeroConfig, total: int, device: torch.device) -> int:
    """Elements per bucket. A few buckets per model let communication overlap with computation; many cost more calls.

    On the CPU at most 4 million: the allocator returns blocks above 32 MB to the system each time they are freed, and
    getting them again costs more than the communication.
    """
    if config.reduce_bucket_size != "auto":
        return config.reduce_bucket_size
    return min(max(total // 8, 2**20), 2**22 if device.type == "cpu" else 2**25)


def _copy_at(host: Host | None, tensor: Tensor) -> Tensor:
    """These values at ``host``, or on the device: copied if they are a slice of a larger tensor, which can then go."""
    if host is None:
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    return host.empty(tensor.numel(), tensor.dtype).copy_(tensor)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether contiguous CPU tensors of one dtype and size have the same bytes, in a fifth of torch.equal's time."""
    if os.name != "posix":
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    pointers = ctypes.c_void_p(a.data_ptr()), ctypes.c_void_p(b.data_ptr())
    return C_LIBRARY.memcmp(*pointers, ctypes.c_size_t(a.nbytes)) == 0


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return _memory_of(a) == _memory_of(b)


def _in_memory_order(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The elements of a tensor in memory order, 1-D; of a copy with this ``stride`` where the tensor has another."""
    if tensor.stride() != stride:
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _is_like(key: str, value: Any, shape: torch.Size) -> bool:
    """Whether an entry of an optimizer's state has one value per element, and not one for the whole parameter."""
    return isinstance(value, Tensor) and value.shape == shape and key not in ("step", "mu_product", "mu", "eta")


# --- Units: what stage 3 gathers and frees together -------------------------------------------------------------------


def check_memory(model: nn.Module) -> None:
    """Raise ValueError where a parameter shares memory with another one, a buffer or a view that a module keeps.

    Each gets its own place. A tied weight, one Parameter under several names, is one parameter.
    """
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            several = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
            if any(isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and isinstance(t._base, nn.Parameter)
                   for t in several if name != "_buffers"):  # others' containers may be long, or compute their values
                raise ValueError(f"{f'{path}.{name}'.lstrip('.')} is a view of a parameter, and would keep its present "
                                 "values; make the view in forward")
    spans = []
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.layout == torch.strided and t.numel() and t.untyped_storage().nbytes():
            last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
            place = t.storage_offset() * t.element_size(), (last + 1) * t.element_size()
            spans.append((t.untyped_storage()._cdata, *place, name))
    names = {name for name, _ in model.named_parameters()}
    for (storage, _, end, name), (same, start, _, other) in pairwise(sorted(spans)):
        if storage == same and start < end and {name, other} & names:
            raise ValueError(f"{name} and {other} share memory, and would be two tensors from now on; to tie weights, "
                             "use one Parameter for both, as in head.weight = embedding.weight; else give one of them "
                             "a copy")


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model, by name: a transformer's layers, a ResNet's blocks.

    A block is a child of a ModuleList, ModuleDict or Sequential that has children itself and a sibling of its class.
    A block with blocks inside counts as one, unless it holds more than a third of the model.
    """
    modules, repeated = dict(model.named_modules()), []
    for path, parent in modules.items():
        if isinstance(parent, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            kinds = Counter(map(type, parent.children()))
            repeated += [f"{path}.{name}".lstrip(".") for name, child in parent.named_children()
                         if kinds[type(child)] > 1 and any(child.children())]
    outer, size = {above for path in repeated for above in _above(path)}, _numel(model)
    blocks = {path for path in repeated if path not in outer or 3 * _numel(model.get_submodule(path)) <= size}
    return {path: module for path, module in modules.items() if path in blocks and not _is_inside(path, blocks)}


def find_units(model: nn.Module, leaf: LeafModules | None) -> dict[str, nn.Module]:
    """The modules that become one unit of stage 3 each: those that ``leaf`` names.

    Without it: the model's repeated blocks, and every other module that itself has a twentieth of all parameters or
    more. Modules marked by ``set_z3_leaf_modules`` are always one unit, without units inside. The model itself is
    always one: it takes the parameters that are in no other.
    """
    units = _found_units(model) if leaf is None else _named_units(model, leaf)
    marked = {name: module for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)}
    return {name: module for name, module in (units | marked).items() if name and not _is_inside(name, marked)
            and not isinstance(module, torch.jit.ScriptModule)}  # which takes no hooks


def _found_units(model: nn.Module) -> dict[str, nn.Module]:
    units = find_blocks(model)
    # A module with parameters of its own may also read its submodules' parameters without calling them.
    others = {name: module for name, module in model.named_modules() if name and name not in units
              and not _is_inside(name, units) and _numel(module, recurse=False)}
    size = _numel(model)
    return units | {name: module for name, module in others.items() if not _is_inside(name, others)
                    and 20 * _numel(module, recurse=False) >= size}


def _named_units(model: nn.Module, leaf: LeafModules) -> dict[str, nn.Module]:
    wanted = {(key, what) for key in ("classes", "names", "name_suffixes") for what in getattr(leaf, key) or ()}
    units: dict[str, nn.Module] = {}
    matched = set()
    for name, module in model.named_modules():
        kind = type(module)
        hits = {("classes", kind.__name__), ("classes", f"{kind.__module__}.{kind.__qualname__}"), ("names", name)}
        hits |= {("name_suffixes", name[start:]) for start in range(len(name))}
        if name and hits & wanted:
            units[name] = module
            matched |= hits
    if wanted - matched:
        raise ValueError("zero_optimization.leaf_module: the model has no module of "
                         + ", ".join(f"{key} {what!r}" for key, what in sorted(wanted - matched)))
    return units


def _above(name: str) -> list[str]:
    """The names of the modules that the module of this name is part of."""
    return ["", *(name[:index] for index, letter in enumerate(name) if letter == ".")]


def _is_inside(name: str, others: Collection[str]) -> bool:
    """Whether the module of this name is part of one of the others; all are part of the model itself, ``""``."""
    return any(above in others for above in _above(name))


def _numel(module: nn.Module, recurse: bool = True) -> int:
    return sum(p.numel() for p in module.parameters(recurse))


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[type | str],
                        raise_if_not_found: bool = True) -> list[nn.Module]:
    """Make each module of these classes or class names one unit of stage 3, before ``initialize()``; returns them."""
    return _mark_leaves(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[type | str],
                          raise_if_not_found: bool = True) -> list[nn.Module]:
    """Undo ``set_z3_leaf_modules`` for modules of these classes."""
    return _mark_leaves(model, leaf_module_classes, False, raise_if_not_found)


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that ``set_z3_leaf_modules`` has marked."""
    return [module for module in model.modules() if getattr(module, "_z3_leaf", False)]


def _mark_leaves(model: nn.Module, classes: Iterable[type | str], flag: bool, must_be: bool) -> list[nn.Module]:
    classes = list(classes)
    if not all(isinstance(cls, (type, str)) for cls in classes):
        raise ValueError(f"leaf_module_classes is {classes!r}; allowed: a list of classes or class names")
    if is_trained(model):
        raise RuntimeError("an engine trains this model, and its units are made; mark leaf modules before initialize()")
    found = [module for module in model.modules() for kind in [type(module)] if any(
        isinstance(module, cls) if isinstance(cls, type) else cls in (
            kind.__name__, f"{kind.__module__}.{kind.__qualname__}") for cls in classes)]
    if must_be and not found:
        raise ValueError(f"the model has no module of {classes}")
    for module in found:
        module._z3_leaf = flag
    return found


class UnitState(Enum):
    """A unit's state; it goes through all three once per use."""
    SHARDED = "each rank has only its shard"
    GATHERING = "all of it has memory, and the other ranks' shards are on their way"
    WHOLE = "its parameters can be used"
    NOT_AVAILABLE, INFLIGHT, AVAILABLE = SHARDED, GATHERING, WHOLE  # DeepSpeed's words


class Unit:
    """A module whose parameters are gathered and freed together.

    owner   the engine's ``Gatherer``, or ``Init`` until an engine takes the model over
    users   whoever needs the parameters: calls of the module in forward, the same calls in backward, a
            GatheredParameters. The last one to leave frees them
    calls   the module's forward calls in progress
    number  its place among the model's units, the same on every rank
    """

    def __init__(self, name: str, module: nn.Module, number: int, owner: "Gatherer | Init | None" = None):
        self.name, self.module, self.number, self.owner = name, module, number, owner
        self.buckets: list[Bucket] = []
        self.state = UnitState.SHARDED
        self.users: set[Any] = set()
        self.calls: list[Call] = []
        self.numel = 0  # of all its buckets

    def __deepcopy__(self, memo: dict) -> "Unit":
        return self  # see Zero

    def __reduce__(self) -> tuple:
        return LeftBehind, ()

    def acquire(self, user: Any) -> None:
        """Make the parameters whole until ``user`` releases them."""
        self.users.add(user)
        if self.state is UnitState.SHARDED:
            self.start_gather()
        if self.state is UnitState.GATHERING:
            self.finish_gather()

    def release(self, user: Any) -> None:
        """``user`` no longer needs them; the last one to leave frees them."""
        self.users.discard(user)
        if not self.users and self.state is not UnitState.SHARDED:
            self.free()

    def start_gather(self) -> None:
        """SHARDED to GATHERING."""
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None and transform.key() != torch._C._functorch.TransformType.Vmap:
            raise RuntimeError(f"torch.func's {transform.key().name.lower()} goes through {self.name or 'the model'}, "
                               "whose weights are sharded (stage 3), and it can't see them come and go; use "
                               "torch.autograd.grad(create_graph=True) or torch.autograd.functional, or stage 2")
        for bucket in self.buckets:
            bucket.start_gather()
        if self.buckets:
            self.buckets[0].communicator.note(self.number)
        self.state = UnitState.GATHERING

    def finish_gather(self) -> None:
        """GATHERING to WHOLE."""
        for bucket in self.buckets:
            bucket.gather.wait()
            for slot in bucket.slots:
                slot.parameter.__class__ = slot.kind
        self.state = UnitState.WHOLE

    def free(self) -> None:
        """To SHARDED."""
        for bucket in self.buckets:
            bucket.free()
            for slot in bucket.slots:
                slot.parameter.__class__ = ShardedParameter
        self.state = UnitState.SHARDED


class LeftBehind:
    """Stands for an engine and its units in a pickled module: the hooks do nothing."""

    def _before_forward(self, *_: Any) -> None:
        pass

    _after_forward = _before_forward


class Call:
    """A module's forward call, alive as long as the graph that autograd recorded of it."""


def assign_units(root: Unit, leaf: LeafModules | None) -> tuple[list[Unit], dict[int, Unit]]:
    """The units of a model, its own (``root``) first, and the unit of each parameter, by its id.

    That is the innermost one that has all modules which share the parameter.
    """
    modules = find_units(root.module, leaf)
    by_path = {path: Unit(path, module, number, root.owner) for number, (path, module) in enumerate(modules.items(), 1)}
    common: dict[int, list[Unit]] = {}
    for name, p in root.module.named_parameters(remove_duplicate=False):
        prefixes = [name[:end] for end, letter in enumerate(name) if letter == "."]
        around = [root, *(by_path[path] for path in prefixes if path in by_path)]
        common[id(p)] = [unit for unit in around if unit in common.get(id(p), around)]
    return [root, *by_path.values()], {key: units[-1] for key, units in common.items()}


class ShardedParameter(nn.Parameter):
    """The class of a parameter while its unit is sharded: it has a shape, but its memory is freed.

    Reading its values would read freed memory. So within a forward pass of the model they are gathered at once, and
    from then on together with the model's own unit (a parent uses a child's weight without calling the child). Within
    a backward pass they stay until it ends; in another method of a module, and under ``Init``, for the one operation.
    Elsewhere reading is an error.
    """

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, uses = kwargs or {}, []
        caller = sys._getframe(1).f_back
        if (func in MOVES and caller is not None and caller.f_code is nn.Module._apply.__code__
                and id(args[0]) in _SLOTS and cls._stays(func, args, kwargs)):
            return args[0]  # which Module._apply() then assigns to its own data
        if func == Tensor.data.__set__ and args[0] is args[1]:
            return None
        if func == Tensor.detach and _is_left_out(caller):
            return args[0]
        if func not in METADATA:
            name = getattr(func, "__name__", str(func))
            name = func.__self__.__name__ if name in ("__get__", "__set__") else name  # of an attribute
            for tensor in tensors_in((args, kwargs)):
                if type(tensor) is ShardedParameter:
                    slot = _SLOTS.get(id(tensor))
                    if slot is None:
                        raise RuntimeError(f"{name}: a parameter of shape {tuple(tensor.shape)} was sharded at stage 3 "
                                           "by an engine that is gone; read the model before destroy(), inside "
                                           "zero.GatheredParameters")
                    owner = slot.bucket.unit.owner
                    uses.append((owner, slot, owner.begin_use(slot, name)))
        result = None
        try:
            with torch._C.DisableTorchFunctionSubclass(), _saving() if uses else nullcontext():
                result = func(*args, **kwargs)
                return result
        finally:
            for owner, slot, user in uses:
                owner.end_use(slot, user, result)

    @staticmethod
    def _stays(func: Callable, args: tuple, kwargs: dict) -> bool:
        """Whether a module's to(), cpu() or the like keeps the dtype. Then the shards stay where the config puts them.

        Scripts end with it to free a GPU, and Lightning's Trainer does.
        """
        if "memory_format" in kwargs:
            return False
        now = torch.empty((), dtype=args[0].dtype, device=args[0].device)
        wanted = func(now, *args[1:], **kwargs)
        if wanted.device != now.device and wanted.dtype == now.dtype:
            warnings.warn(f"sharded parameters (stage 3) stay on {now.device}, and do not go to {wanted.device}")
        return wanted.dtype == now.dtype

    # What scripts ask of DeepSpeed's: whether it has to be gathered, and its sizes.
    ds_id, ds_numel, ds_shape = property(id), property(lambda p: p.numel()), property(lambda p: p.shape)
    ds_status = UnitState.SHARDED

    def partition_numel(self) -> int:
        """How many of its elements this rank has."""
        return _slot_of(self).place[1]

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        """A whole copy, which belongs to no engine. All ranks must make it."""
        if id(self) not in _SLOTS:
            self.clone()  # raises, and says why
        with GatheredParameters(self):
            memo[id(self)] = self.__class__.__deepcopy__(self, memo)  # its class while it is whole
        return memo[id(self)]

    def __repr__(self, *, tensor_contents: None = None) -> str:
        return f"ShardedParameter(shape={tuple(self.shape)}, dtype={self.dtype})"


# What a sharded parameter can still answer.
METADATA = {getattr(Tensor, name).__get__ for name in (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu",
    "is_meta", "is_sparse", "is_quantized", "is_mkldnn", "is_nested", "itemsize", "_backward_hooks",
    "_post_accumulate_grad_hooks", "_version", "retains_grad")}
METADATA |= {Tensor.requires_grad.__set__, Tensor.grad.__set__, Tensor.grad.__delete__, Tensor._backward_hooks.__set__,
             Tensor._post_accumulate_grad_hooks.__set__}
METADATA |= {torch.is_floating_point, torch.is_complex, torch.numel, torch._has_compatible_shallow_copy_type}
METADATA |= {getattr(Tensor, name) for name in (
    "size", "dim", "numel", "nelement", "stride", "element_size", "is_contiguous", "is_floating_point", "is_complex",
    "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "__len__", "__hash__", "ndimension",
    "storage_offset", "get_device", "untyped_storage")} | {torch.empty_like}


# What a module's to(), cpu(), float() and their like call.
MOVES = {getattr(Tensor, name) for name in ("to", "cpu", "cuda", "float", "half", "double", "bfloat16")}


# These share the memory and may be written to later, unseen; state_dict() may use them on one rank alone.
ALIASES = ("data", "detach", "detach_", "numpy")


def _in_method_of(model: nn.Module) -> bool:
    """Whether a method of one of the model's modules is running, other than those that PyTorch gives every module."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and any(owner is module for module in model.modules()) and any(
                code.co_qualname == f"{kind.__qualname__}.{code.co_name}" for kind in type(owner).__mro__
                if kind is not nn.Module):
            return True
        frame = frame.f_back
    return False


def _is_left_out(frame: Any) -> bool:
    """Whether this is for a state dict that Lightning asks for, and that its DeepSpeedStrategy leaves out of the file.

    There a parameter stands for itself, and reading its values stays an error.
    """
    while frame is not None and frame.f_code.co_name != "lightning_module_state_dict":
        frame = frame.f_back
    owner = object if frame is None else type(frame.f_locals.get("self"))
    return any(kind.__name__ == "DeepSpeedStrategy" for kind in owner.__mro__)


def _saving() -> AbstractContextManager:
    """Hooks that let autograd save a weight's place, and not the weight, whose memory that would keep.

    Other active hooks, such as recomputation's or the caller's own, save the weight itself.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return nullcontext()
    return saved_tensors_hooks(_pack, _unpack)


# Buckets by the address of the memory that their whole parameters are gathered into.
_GATHERED_INTO: "weakref.WeakValueDictionary[int, Bucket]" = weakref.WeakValueDictionary()


class SavedWeight(NamedTuple):
    """What autograd keeps in place of a weight, or a view of one, that it saves."""
    name: str
    slot: "weakref.ref[Slot]"  # weak: the garbage collector does not see what a graph keeps
    version: int               # of the parameter
    call: Any                  # the forward call that uses it
    dtype: torch.dtype         # differs from the parameter's where autocast has cast it
    geometry: tuple            # size, stride and offset: in the bucket, or of a cast weight, in itself


def _pack(tensor: Tensor) -> SavedWeight | tuple[Tensor, int]:
    """What autograd keeps in place of a tensor that it saves.

    Backward gathers the unit when it needs the weight. The output's hook is not enough for that: an in-place operation
    on a view rebuilds its graph without the hook. A side output, such as a loss that the module keeps as an attribute,
    has no hook.
    """
    slot = _weight_behind(tensor) if torch._C._has_storage(tensor) else None  # a sparse tensor has none
    if slot is not None:
        unit, geometry = slot.bucket.unit, (tensor.size(), tensor.stride(), tensor.storage_offset())
        return SavedWeight(slot.name, weakref.ref(slot), slot.parameter._version, unit.owner.call_of(unit),
                           tensor.dtype, geometry)
    return tensor.detach(), tensor._version  # detached: a node that keeps its own output would keep itself alive


def _weight_behind(tensor: Tensor) -> Slot | None:
    """The gathered weight that a tensor is a view of, or a view of autocast's copy of it."""
    slot = None
    memory, start, base = _memory_of(tensor), tensor.storage_offset(), tensor._base
    bucket = _GATHERED_INTO.get(memory)
    if bucket is not None and _memory_of(bucket.flat) == memory and tensor.dtype == bucket.flat.dtype:
        slot = next((slot for slot in bucket.slots if slot.offset <= start < slot.end), None)
    else:
        cast = tensor if base is None else base
        graph = cast.grad_fn
        if graph is not None and graph.name() == "ToCopyBackward0":
            slot = _SLOTS.get(id(getattr(graph.next_functions[0][0], "variable", None)))
            slot = slot if slot is not None and slot.stride == cast.stride() else None
    known = slot is not None and slot.bucket.unit is not None and isinstance(slot.bucket.unit.owner, Gatherer)
    return slot if known and not (tensor.is_conj() or tensor.is_neg()) else None


def _unpack(saved: SavedWeight | tuple[Tensor, int]) -> Tensor:
    """The inverse of _pack, when backward needs the tensor."""
    if isinstance(saved, SavedWeight):
        slot, version = saved.slot(), saved.version
        if slot is None:
            raise RuntimeError(f"backward needs the parameter {saved.name}, whose engine is gone")
        slot.bucket.unit.owner.before_backward(slot.bucket.unit, saved.call)
        source, flat = slot.parameter, slot.bucket.flat
        tensor = (flat if saved.dtype == flat.dtype else slot.view(flat).to(saved.dtype)).as_strided(*saved.geometry)
    else:
        tensor, version = saved
        source = tensor
    if source._version != version:  # PyTorch leaves this check to the hooks
        raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} that backward needs was modified in place after "
                           "forward had saved it; step() modifies the weights")
    return tensor


def tensors_in(value: Any, outer: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Every tensor inside nested lists, tuples, sets, mappings and dataclasses, which may contain themselves."""
    if isinstance(value, Tensor):
        yield value
        return
    items: Iterable[Any] = ()
    if id(value) in outer:
        return
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple, set)):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, f.name, None) for f in fields(value)]
    for item in items:
        yield from tensors_in(item, (*outer, id(value)))


def _return_free_memory() -> None:
    """With glibc, return the memory of the parameters' former places to the system.

    It lies in holes between blocks in use, too small for the next large tensor.
    """
    trim = getattr(C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _keep_memory_that_is_freed() -> None:
    """With glibc, keep freed blocks of up to 32 MiB, its limit, for the next ones: up to 1 GiB of them.

    Otherwise each backward gets its gradients' memory anew, page by page. The caller's environment may say otherwise.
    """
    mallopt = getattr(C_LIBRARY, "mallopt", None)
    if mallopt is not None and not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD of <malloc.h>
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # there is no public call; PyTorch's checkpointing uses this one


# --- Stage 3: parameters come before each use and go after it ---------------------------------------------------------


RECOMPUTED = "recomputed activations"  # users of a unit, besides its calls
DIFFERENTIABLE = "a backward with create_graph, which the next backward may differentiate"


class Trace:
    """The order in which the last pass needed units, to predict which one to gather next."""

    def __init__(self) -> None:
        self.order: list[Unit] = []
        self.position = 0

    def restart(self) -> None:
        """A new pass begins."""
        self.position = 0

    def next_after(self, unit: Unit) -> Unit | None:
        """Note that ``unit`` is needed now; returns the unit that is probably needed next."""
        if self.order[self.position:self.position + 1] != [unit]:
            self.order[self.position:] = [unit]  # a new path through the model: what follows is unknown
        self.position += 1
        return self.order[self.position] if self.position < len(self.order) else None


class Gatherer:
    """Stage 3: hooks on modules gather a unit before its forward and its backward, and free it after each.

    units       the model's own unit, ``root``, and the others
    companions  units that are gathered with the root until its forward ends, see ShardedParameter
    traces      of forward passes (False) and of backward passes (True)
    saving      the outermost call in progress, and its hooks on what autograd saves
    """

    def __init__(self, zero: "Zero", model: nn.Module):
        self.zero, self.config = zero, zero.config
        scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
        if scripted:
            logger.warning("%s is scripted, so it takes no hooks: at stage 3 its weights come and go with the module "
                           "around it", scripted[0])
        self.root = Unit("", model, 0, self)
        self.units, self.unit_of = assign_units(self.root, self.config.leaf_module)
        self.numel = sum(p.numel() for p in model.parameters())
        self.companions: list[Unit] = []
        self.traces = {False: Trace(), True: Trace()}
        self.saving: tuple[Call, AbstractContextManager] | None = None

    def __deepcopy__(self, memo: dict) -> "Gatherer":
        return self  # a deep copy of the model takes its hooks along; on the copy's modules they do nothing

    def __reduce__(self) -> tuple:
        return LeftBehind, ()

    def hooks(self) -> Iterator[Any]:
        """Free all units, and hook the modules; yields the hooks."""
        for unit in self.units:
            unit.free()
            yield unit.module.register_forward_pre_hook(
                partial(self._before_forward, unit), prepend=True, with_kwargs=True)
            yield unit.module.register_forward_hook(partial(self._after_forward, unit), always_call=True)

    def _before_forward(self, unit: Unit, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if module is not unit.module:
            return None  # a deep copy
        call = Call()
        if unit is self.root and not unit.calls and not _in_backward():
            self.zero.end_if_pending()  # the caller ran backward() on the loss itself
            self.traces[False].restart()
        unit.calls.append(call)
        self._acquire(unit, call)
        if not torch.is_grad_enabled():
            return None
        if self.saving is None and not _in_backward():
            self.saving = call, _saving()
            self.saving[1].__enter__()
        # The call's part of backward is over when the gradients of all its inputs are complete. A call whose inputs
        # need none (the first layers) ends with the backward pass. Autograd may finish a leaf before the rest of the
        # call, so the call gets a view of the leaf, which keeps the order.
        inputs = {id(t): t for t in tensors_in((args, kwargs)) if t.requires_grad}
        leaves = {key: t.view_as(t) for key, t in inputs.items() if t.is_leaf and not isinstance(t, nn.Parameter)}
        inputs |= leaves
        if inputs:
            # PyTorch's hook and the inputs' graph nodes keep each other alive; so it is removed with the call's graph.
            tensors, ended = list(inputs.values()), partial(self._after_backward, unit, weakref.ref(call))
            hook = tensors[0].register_hook(ended) if len(tensors) == 1 else register_multi_grad_hook(tensors, ended)
            weakref.finalize(call, hook.remove).atexit = False
        if not leaves:
            return None
        return tuple(leaves.get(id(a), a) for a in args), {key: leaves.get(id(a), a) for key, a in kwargs.items()}

    def _after_forward(self, unit: Unit, module: nn.Module, args: tuple, output: Any) -> None:
        if module is not unit.module:
            return
        call = unit.calls.pop()
        if self.saving is not None and self.saving[0] is call:
            self.saving[1].__exit__(None, None, None)
            self.saving = None
        if torch.is_grad_enabled():
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:  # hooks on a leaf, such as a parameter, would stay for ever
                    tensor.register_hook(partial(self.before_backward, unit, call))
        if _in_backward():  # recomputed activations: their backward follows at once, so the parameters stay
            unit.users.add(RECOMPUTED)
        for needed in self._with_companions(unit):
            for bucket in needed.buckets if needed.state is UnitState.WHOLE else ():  # else the gather has failed
                bucket.keep_writes()
        self._release(unit, call)

    def before_backward(self, unit: Unit, call: Any, grad: Tensor | None = None) -> None:
        """A call's backward begins: its output has a gradient, or autograd needs a weight that it saved."""
        self.zero.reducer.begin_backward()
        self._acquire(unit, call)

    def _after_backward(self, unit: Unit, call: "weakref.ref[Call]", grads: Any) -> None:
        """The gradients of all of a call's inputs are complete."""
        if torch.is_grad_enabled():  # create_graph: the backward of this backward reads the parameters again
            unit.users.add(DIFFERENTIABLE)
            return
        unit.users.discard(RECOMPUTED)
        self._release(unit, call())
        if unit is not self.root:  # the root shares its inputs with its first block, and ends with the backward
            self.zero.reducer.enqueue(bucket.gradients for bucket in unit.buckets)
        self.zero.reducer.launch_ready()

    def end_backward(self, over: bool = True) -> None:
        """The backward pass is over: free the units that it used. ``over``: also its own backward."""
        for unit in self.units:
            unit.users = {user for user in unit.users if user in unit.calls or isinstance(user, GatheredParameters)
                          or not over and user is DIFFERENTIABLE}
        self.free_unused()

    def may_be_differentiated(self, came: bool) -> bool:
        """Whether a backward of this backward may follow: on no rank weights got gradients (``came``), and on some rank
        a graph still has weights. All ranks must decide alike, since they gather together."""
        kept = [bucket for unit in self.units if DIFFERENTIABLE in unit.users for bucket in unit.buckets]
        if not kept:
            return False
        flags = _numbers([came, any(bucket.is_viewed for bucket in kept)], self.zero.device)
        self.zero.communicator.all_reduce(flags, "scalars", what=lambda: "whether a second backward may follow").wait()
        came, viewed = flags.tolist()
        return not came and viewed > 0

    def call_of(self, unit: Unit) -> Any:
        """The innermost forward call that uses a unit now."""
        return (unit.calls or self.root.calls or [RECOMPUTED])[-1]

    def _with_companions(self, unit: Unit) -> list[Unit]:
        return [unit, *self.companions] if unit is self.root else [unit]

    def _acquire(self, unit: Unit, call: Any) -> None:
        """A call's forward or backward begins: gather its unit, and start gathering the one that is needed next."""
        if call in unit.users:
            return
        for needed in self._with_companions(unit):
            needed.acquire(call)
        if not (self.root.calls or _in_backward()):
            return  # a part of the model is called by itself, which teaches no order of the whole
        following = self.traces[_in_backward()].next_after(unit)
        if following is not None and following.state is UnitState.SHARDED and self._may_prefetch(following):
            following.start_gather()

    def _may_prefetch(self, unit: Unit) -> bool:
        limit, most = self.config.stage3_prefetch_bucket_size, self.config.stage3_max_live_parameters
        live = 0 if self.numel <= most else sum(u.numel for u in self.units if u.state is not UnitState.SHARDED)
        return (limit == "auto" or unit.numel <= limit) and live + unit.numel <= most

    def _release(self, unit: Unit, call: Any) -> None:
        """A call's forward or backward is over."""
        for needed in self._with_companions(unit):
            needed.release(call)
        if unit is self.root and not unit.calls and not _in_backward():
            self.free_unused()

    def surrender(self, slot: Slot) -> None:
        """Another engine has the parameter now."""
        slot.parameter.__class__ = slot.kind
        slot.bucket.slots.remove(slot)

    def free_unused(self) -> None:
        """Free units gathered ahead for a use that did not come, and those that views kept at the end of their use."""
        for unit in self.units:
            if not unit.users and (unit.state is not UnitState.SHARDED or any(b.has_memory for b in unit.buckets)):
                unit.free()

    def begin_use(self, slot: Slot, operation: str) -> Any:
        """``operation`` needs a sharded parameter's values: gather the unit, if this is in a pass of the model.

        It stays whole until the forward or the backward ends. The end of another method of the model can't be seen, so
        there it stays for the one operation.
        """
        unit = slot.bucket.unit
        if self.root.calls:
            self.companions.append(unit)
            unit.acquire(self.root.calls[0])
        elif _in_backward():
            self.before_backward(unit, RECOMPUTED)
        elif operation not in ALIASES and _in_method_of(self.root.module):
            user = object()
            unit.acquire(user)
            return user
        else:
            raise RuntimeError(f"{operation}: the parameter {slot.name} is sharded over "
                               f"{slot.bucket.communicator.world_size} ranks (stage 3); read or change it inside "
                               "zero.GatheredParameters, or with zero.safe_get_full_fp32_param")
        return None

    def end_use(self, slot: Slot, user: Any, result: Any) -> None:
        """The operation whose begin_use returned ``user`` is over: keep what it wrote."""
        if user is not None:
            for bucket in slot.bucket.unit.buckets:
                bucket.keep_writes()
            slot.bucket.unit.release(user)


# --- The order of reductions ------------------------------------------------------------------------------------------


class Reducer:
    """Backward: gradients come in, full buckets go out, in an order that is the same on all ranks.

    pending    a backward pass has begun, and ``Zero.finish_backward`` has not been called yet
    task       autograd's number for it
    foreseen   its first gradient has come, and ``expected`` is known for every bucket
    queue      the order of this backward's reductions; ``in_flight``: those that have started
    dropped    a digest of the reduced gradients that were dropped
    nodes      by parameter, the node of autograd's graph that accumulates its gradient
    """

    def __init__(self, zero: "Zero"):
        self.zero = zero
        self.pending = self.foreseen = False
        self.task = -1
        self.queue: deque[Gradients] = deque()
        self.in_flight: deque[Gradients] = deque()
        self.dropped = 0
        self.nodes: dict[Slot, Any] = {}

    @property
    def every(self) -> list[Gradients]:
        """The gradients of all trained buckets."""
        return [bucket.gradients for bucket in self.zero.trained]

    def listen(self, slot: Slot) -> Any:
        """Hook a parameter, so that autograd reports its finished gradient; returns the hook."""
        with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
            self.nodes[slot] = slot.parameter.view_as(slot.parameter).grad_fn.next_functions[0][0]
        slot.taken = TakenGradient(slot)
        return slot.parameter.register_post_accumulate_grad_hook(partial(_on_gradient, weakref.ref(slot)))

    def begin_backward(self) -> None:
        """A backward pass begins, unless one is under way."""
        if self.pending:
            return
        self.pending, self.task = True, torch._C._current_graph_task_id()
        if self.zero.gatherer is not None:
            self.zero.gatherer.traces[True].restart()
        else:
            self.enqueue(self.every)

    def enqueue(self, several: Iterable[Gradients | None]) -> None:
        """Queue them for reduction, each once per backward."""
        for gradients in several:
            if gradients is not None and gradients.life is Life.COLLECTING:
                gradients.life = Life.QUEUED
                self.queue.append(gradients)

    def receive(self, slot: Slot) -> None:
        """Autograd has finished a parameter's gradient."""
        gradient = slot.parameter.grad
        if gradient is not slot.taken:
            if not isinstance(gradient, TakenGradient):  # else take_more() has taken it already
                if slot in slot.bucket.gradients.used:  # grad was empty: zero_grad() was called since the last backward
                    self.drop(slot)
                self.take(slot, gradient)
            try:
                slot.parameter.grad = slot.taken
            except RuntimeError:  # the parameter was cast or moved, which step() will refuse
                slot.parameter.grad = slot.taken = TakenGradient(slot)
        self.launch_ready()

    def take_more(self, slot: Slot, gradient: Tensor) -> None:
        """Autograd adds ``gradient``, which other code may still read, to what it believes to be ``p.grad``."""
        into = slot.bucket.gradients
        self.take(slot, gradient.clone() if into.adopts or into.life in LAUNCHED else gradient)

    def take(self, slot: Slot, gradient: Tensor) -> None:
        """Put a parameter's gradient into its bucket."""
        if not self.foreseen:
            self.begin_backward()
            self.foreseen = True
            for each in self.every:
                each.expected = {s for s in each.bucket.slots if s in self.nodes
                                 and torch._C._will_engine_execute_node(self.nodes[s])}
        slot.bucket.gradients.take(slot, gradient.detach() if gradient.requires_grad else gradient)  # of create_graph

    @torch.no_grad()
    def drop(self, slot: Slot) -> None:
        """Drop a parameter's gradient of this window, as zero_grad() asks; a reduced one must go on every rank."""
        if self.task != torch._C._current_graph_task_id():  # else the pending backward is running now
            self.zero.end_if_pending()
        if slot.bucket.gradients.reduced:
            self.settle()
            self.dropped = (31 * self.dropped + slot.offset + 1) % 2**20
        slot.bucket.gradients.drop(slot)

    @property
    def reduces_now(self) -> bool:
        """Whether this backward pass ends with reduced gradients."""
        return self.zero.boundary or self.zero.sharded.gradients

    def launch_ready(self) -> None:
        """Start the reduction of every full bucket whose turn it is.

        Gradients may come in a different order on each rank, but collectives must not. So buckets go out in the order
        of ``queue``, which is the same on all. In stages 0 to 2 that is the order of the buckets. In stage 3 it is the
        order in which units end their backward: gradients then don't pile up where a model runs in another order than
        it was written in. Gradients that this rank's backward does not bring are not waited for. Otherwise the other
        ranks would wait for this one here, and this one for them in its next gather.
        """
        if self.zero.config.overlap_comm and self.reduces_now and self.foreseen:
            while self.queue and self.queue[0].complete:
                self.launch(self.queue.popleft())

    def launch(self, gradients: Gradients) -> None:
        """Start one reduction. At most one buffer is being filled and one being sent."""
        while len(self.in_flight) > (0 if self.zero.sharded.gradients else 1):
            self.in_flight.popleft().finish()
        gradients.launch()
        self.in_flight.append(gradients)

    def finish(self) -> None:
        """Backward is over: reduce what is left, if this backward reduces at all."""
        if self.reduces_now:
            if self.zero.gatherer is not None:  # calls whose inputs need no gradient end here, on some ranks perhaps
                forward = self.zero.gatherer.traces[False]
                self.enqueue(bucket.gradients for unit in reversed(forward.order[:forward.position])
                             for bucket in unit.buckets)
            self.enqueue(self.every)
            for gradients in self.queue:
                self.launch(gradients)
            while self.in_flight:
                self.in_flight.popleft().finish()
            if self.zero.boundary:  # else copies to the host may take until they are needed
                self.settle()
        for gradients in self.every:
            gradients.end_backward(self.foreseen)
        self._end()

    def settle(self) -> None:
        """Wait for sums on their way to the host."""
        if self.zero.offload.optimizer is not None:
            self.zero.offload.optimizer.settle()

    def any_rank_has(self, slot: Slot) -> bool:
        """Whether any rank has a gradient of the parameter; reduces those that came late. All ranks must call it."""
        gradients = slot.bucket.gradients
        flags = _numbers([bool(gradients.late), slot in gradients.used], self.zero.device)
        self.zero.communicator.all_reduce(flags, "scalars", what=lambda: f"who has a gradient of {slot.name}").wait()
        late, found = flags.tolist()
        if late:
            gradients.reduce_late()
        self.settle()
        return found > 0

    def first_not_finite(self) -> str | None:
        """The first parameter, in the model's order, whose summed gradient has infinity or NaN on any rank."""
        slots = [slot for gradients in self.every for slot in gradients.bucket.slots]
        finite = torch.stack([slot.own(slot.bucket.gradients.sum).isfinite().all().to(self.zero.device)
                              for slot in slots])
        flags = (~finite).float()
        self.zero.communicator.all_reduce(flags, "scalars", what=lambda: "which gradients are not finite").wait()
        names = [slot.name for slot, flag in zip(slots, flags.tolist()) if flag]
        return names[-1] if names else None  # buckets begin with the model's last parameters

    def clear(self) -> None:
        """Drop the window's gradients and their buffers."""
        for gradients in self.every:
            gradients.reset()
            gradients.buffer = None
        self.settle()
        self.in_flight.clear()
        self._end()

    def _end(self) -> None:
        self.queue, self.pending, self.foreseen = deque(), False, False


def _on_gradient(reference: "weakref.ref[Slot]", parameter: nn.Parameter) -> None:
    """Autograd has finished a parameter's gradient. Weak: the garbage collector does not see a tensor's hooks."""
    slot = reference()
    if slot is not None:
        slot.bucket.zero.reducer.receive(slot)


def _numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """The host's numbers on the device, in float64; the host does not wait for a GPU."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


# --- Everything together ----------------------------------------------------------------------------------------------


ELEMENTWISE = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam,
               torch.optim.RAdam, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop,
               torch.optim.ASGD}


NO_TRANSFORMS = (
    "torch.func.grad, vjp and what is made of them can't be used inside the model or zero.GatheredParameters at stage "
    "3, nor where blocks are recomputed, as both change what autograd saves; use "
    "torch.autograd.grad(create_graph=True), or stage 2 without recomputation")


class StepResult(NamedTuple):
    """The scalars of a step."""
    norm: float            # 2-norm of the mean gradient over the whole model, before clipping
    clip: float            # the factor that clipping applied to the gradient, at most 1
    overflow: bool         # the norm is not finite, and nothing was updated
    culprit: str | None    # the first parameter whose gradient is not finite
    spoiled: bool = False  # a backward of the window raised on some rank, and nothing was updated


class Updater:
    """The optimizer, which updates masters wave by wave. Its own calls do what they say, or raise and name another."""

    def __init__(self, zero: "Zero", optimizer: Optimizer):
        self.zero, self.optimizer, self.updating = zero, optimizer, False
        here = weakref.ref(self)  # an optimizer that is kept does not keep an engine that nobody refers to
        optimizer.zero_grad = lambda set_to_none=True: here() and here().zero.clear_gradients()
        optimizer.add_param_group = self._refusal("add_param_group", (
            "its parameters belong to no bucket of the optimizer. Give all groups to initialize(), those for later "
            "with requires_grad False; each is trained from when it is thawed (requires_grad_(True))"))
        optimizer.load_state_dict = self._refusal("load_state_dict", (
            "the state lies in shards. engine.load_checkpoint() loads it, and zero.safe_set_full_optimizer_state() "
            "sets it; a state dict of plain PyTorch can be loaded before initialize()"))
        refuse = self._refusal("step", "engine.step() updates the weights, whose gradients lie in buckets")
        self.hook = optimizer.register_step_pre_hook(lambda *_: None if here() and here().updating else refuse())

    @staticmethod
    def _refusal(call: str, instead: str) -> Callable:
        def refused(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f"optimizer.{call}() after initialize(): {instead}")
        return refused

    def remove(self) -> None:
        """Restore the optimizer's own calls; its pieces' gradients refuse to be used."""
        self.hook.remove()
        for name in ("zero_grad", "add_param_group", "load_state_dict"):
            vars(self.optimizer).pop(name, None)

    def update(self, factor: float) -> None:
        """Step on the summed gradients times ``factor``; the optimizer's step hooks run once, around all waves."""
        optimizer, every = self.optimizer, self.zero.reducer.every
        hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        hooked = sum(map(len, (*hooks, _global_optimizer_pre_hooks, _global_optimizer_post_hooks))) > 1
        # A fused kernel can divide by a scale on the way, as GradScaler has it do. A hook must see true gradients.
        fused = not hooked and 2.0 ** -126 < factor != 1.0 and all(  # else float32 does not have room for 1 / factor
            b.master.dtype == torch.float32 and b.gradients.predivide == 1 for b in self.zero.trained
        ) and type(optimizer) in ELEMENTWISE and getattr(optimizer, "_step_supports_amp_scaling", False)
        for gradients in every:
            gradients.disarm()
            if hooked:
                gradients.arm(factor)
        self.updating = True
        try:
            Optimizer.profile_hook_step(lambda _: self._step_waves(None if hooked else factor, fused))(optimizer)
        finally:
            self.updating = False
            for gradients in every:
                gradients.close()
            vars(optimizer).pop("grad_scale", None)
        optimizer._opt_called = True  # PyTorch's schedulers check that a step came before theirs

    def _waves(self) -> list[list[Bucket]]:
        """The buckets in waves: gathering one wave overlaps with updating the next."""
        trained, offloads = self.zero.trained, self.zero.offload.optimizer is not None
        # An optimizer that is not PyTorch's may count its steps in a param group: it is stepped once.
        casts = any(bucket.dtypes.gradient != bucket.dtypes.master for bucket in trained)  # to hold one wave's copies
        known = type(self.optimizer) in ELEMENTWISE or hasattr(self.optimizer, "is_elementwise")
        in_waves = known and (self.zero.sharded.optimizer or offloads or casts)
        waves = 1 if not in_waves else len(trained) if offloads else 8
        size = max(1, -(-len(trained) // waves))
        return [trained[start:start + size] for start in range(0, len(trained), size)]

    def _step_waves(self, factor: float | None, fused: bool) -> None:
        """Update and publish wave by wave, and wait until every rank has the new weights.

        factor   multiplies the gradients; None: the pieces have their gradients already
        fused    the optimizer's kernel applies it
        """
        step = type(self.optimizer).step.__wrapped__  # without the hooks, which run around all waves
        scales: dict[torch.device, Tensor] = {}  # one for all waves
        for wave in [self.zero.trained] if factor is None else self._waves():
            armed = wave if factor is not None else ()
            if fused:
                device = wave[0].master.device  # filled there: copying a number to a GPU would wait for it
                self.optimizer.grad_scale = scales.setdefault(device, torch.full((), 1 / factor, device=device))
            try:
                for bucket in armed:
                    bucket.gradients.arm(1.0 if fused else factor)
                step(self.optimizer)
            finally:
                for bucket in armed:
                    bucket.gradients.disarm()
            for bucket in wave:
                bucket.keep_state(self.optimizer)
                bucket.publish()
        for bucket in self.zero.trained:
            bucket.gather.wait()
            # The update bypassed autograd: a graph from before it must not be used with the new weights.
            torch.autograd.graph.increment_version([slot.parameter for slot in bucket.slots])
            bucket.note_versions()


def groups_of_whole_parameters(optimizer: Optimizer | None, allow_untested: bool) -> set[int]:
    """The param groups whose parameters must not be cut, since the optimizer needs them whole.

    An optimizer class may say by ``is_elementwise(group)`` whether it treats every element alike. A class without this
    method that is not known here is untested: its parameters stay whole, unless the caller allows cutting them.
    """
    if optimizer is None or type(optimizer) in ELEMENTWISE:
        return set()
    rule = getattr(optimizer, "is_elementwise", lambda group: allow_untested)
    return {index for index, group in enumerate(optimizer.param_groups) if not rule(group)}


class Zero:
    """A model's parameters, gradients and optimizer state under one ZeRO stage.

    It makes the model's parameters views of buckets, with rank 0's values, and gives the optimizer the masters in their
    place. From then on autograd's hooks feed it, ``finish_backward`` must be called after each backward pass, and
    ``step`` updates the weights.

    boundary   whether the current backward pass is the last of its accumulation window; stages 0 and 1 reduce only then
    spoiled    whether a backward pass of the window raised, and left gradients of only a part of the model
    written    whether parameters that stay whole were written to, which ranks have not compared yet
    divisor    turns a window's gradients, summed over ranks and micro-batches, into their mean; includes the loss scale
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, config: ZeroConfig, device: torch.device,
                 dtypes: Callable[[nn.Parameter], Sequence[torch.dtype]] | None = None, allow_untested: bool = False,
                 predivide: float | None = None, communicator: Communicator | None = None):
        self.model, self.optimizer, self.config, self.device, self.predivide = (
            model, optimizer, config, device, predivide)
        self.communicator = communicator or Communicator(device)
        if self.communicator.debug:  # else ranks may rightly start collectives in different orders
            self.config = replace(config, overlap_comm=False, stage3_prefetch_bucket_size=0)
        self.whole = groups_of_whole_parameters(optimizer, allow_untested and config.stage > 0)
        self.dtypes = dtypes or (lambda p: [p.dtype] * 4)
        alone = self.communicator.world_size == 1 and config.offload_param.device == "none"
        self.sharded = SHARDED[0 if alone else config.stage]
        check_room(self._room_needed(), self.communicator)
        self.offload = Offload(config, device, self.communicator.clock)
        self.boundary, self.spoiled, self.written = True, False, False
        self.user: Callable[[], Any] = lambda: self  # what trains with it; None once that is garbage
        self.divisor = float(self.communicator.world_size)
        self.reducer = Reducer(self)
        self.gatherer = Gatherer(self, model) if self.sharded.parameters else None
        self._make_buckets()
        self._frozen = [slot for bucket in self.buckets if not bucket.trained for slot in bucket.slots
                        if slot.group is not None]  # in the optimizer, but frozen; see thaw
        self.hooks: list[Any] = []
        self.updater = None if optimizer is None else Updater(self, optimizer)
        self._train([bucket for bucket in self.buckets if bucket.trained])
        if self.gatherer is not None:
            self.hooks += self.gatherer.hooks()
            model._gatherer = self.gatherer  # its weights live as long as it does, also without an engine or hooks
        _return_free_memory()
        _keep_memory_that_is_freed()

    # Setting up.

    def _room_needed(self) -> Counter[tuple[str, str]]:
        """This rank's bytes in the folders of offload, see ``check_room``."""
        optimizer, parameters = self.config.offload_optimizer, self.config.offload_param
        share = self.communicator.world_size if self.sharded.optimizer else 1
        needs: Counter[tuple[str, str]] = Counter()
        if optimizer.device == "nvme" and self.optimizer is not None:
            for group in self.optimizer.param_groups:
                state = sum(dtype.itemsize for dtype in _state_dtypes(self.optimizer, group))
                needs["offload_optimizer", optimizer.nvme_path] += sum(
                    p.numel() * (Dtypes(*self.dtypes(p)).master.itemsize + state)
                    for p in group["params"] if p.requires_grad) // share
        if parameters.device == "nvme":
            needs["offload_param", parameters.nvme_path] = sum(
                p.numel() * Dtypes(*self.dtypes(p)).compute.itemsize for p in self.model.parameters()) // share
        return needs

    def _make_buckets(self) -> None:
        """Make the parameters views of buckets."""
        groups = {id(p): i for i, g in enumerate(self.optimizer.param_groups if self.optimizer else ())
                  for p in g["params"]}
        check_free(self.model)
        left = _engines_of(self.model)  # garbage, of stage 3, which the model has kept
        _drop_taken(self.model)
        self.buckets: list[Bucket] = []
        plans = plan_buckets(self.model, self.config, self.device, self.dtypes, groups,
                             self.gatherer.unit_of if self.gatherer is not None else {},
                             self.whole, self.communicator.world_size if self.sharded.optimizer else 1)
        for plan in plans:
            host = self.offload.host_for(plan.slots[-1].end, self.buckets) if plan.trained else None
            shard_host = None if plan.unit is None else self.offload.parameters
            self.buckets.append(Bucket(plan, self.communicator, self.sharded, host, shard_host, self))
        for other in left:
            other.release()

    def _train(self, buckets: list[Bucket]) -> None:
        """From now on these buckets' gradients are reduced, and the optimizer updates their masters."""
        for bucket in buckets:
            bucket.gradients = Gradients(bucket, self.predivide, not self.config.reduce_scatter)
            bucket.hand_over(self.optimizer)
            bucket.keep_state(self.optimizer)
            self.hooks += [self.reducer.listen(slot) for slot in bucket.slots if slot not in self._frozen]
        self.trained = [bucket for bucket in self.buckets if bucket.trained]
        for group, slots in zip(self.optimizer.param_groups if self.optimizer else (), self.slots_by_group()):
            group["params"] = [slot.piece for slot in slots if slot.piece is not None]

    @property
    def units(self) -> list[Unit]:
        """At stage 3 the model's own unit, and the others."""
        return self.gatherer.units if self.gatherer is not None else []

    @property
    def is_inside_window(self) -> bool:
        """Whether there are gradients that no step has used yet."""
        return any(gradients.used for gradients in self.reducer.every)

    @property
    def has_taken(self) -> bool:
        """Whether an unfinished backward pass has brought gradients."""
        return self.reducer.pending and any(gradients.arrived for gradients in self.reducer.every)

    def slots_by_group(self) -> list[list[Slot]]:
        """The parameters in each of the optimizer's param groups, frozen ones included."""
        groups: list[list[Slot]] = [[] for _ in (self.optimizer.param_groups if self.optimizer else ())]
        for slot in (slot for bucket in self.buckets for slot in bucket.slots if slot.group is not None):
            groups[slot.group].append(slot)
        return groups

    def release(self) -> None:
        """Release the model. At stages 0 to 2 another engine can take it; at stage 3 its parameters stay sharded.

        Raises RuntimeError where another rank still trains on more micro-batches.
        """
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        vars(self.model).pop("_gatherer", None)
        _drop_taken(self.model)
        if self.updater is not None:
            self.updater.remove()
        for slot in (slot for bucket in self.buckets for slot in bucket.slots):
            if _SLOTS.get(id(slot.parameter)) is slot:
                del _SLOTS[id(slot.parameter)]
        self.communicator.leave()

    # The end of a backward pass.

    def end_if_pending(self) -> None:
        """Finish a backward pass that the caller ran on the loss itself."""
        if self.reducer.pending:
            self.finish_backward()

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish_backward(self) -> None:
        """The backward pass is over: reduce the rest. Every rank must call this, with gradients or without."""
        self.reducer.begin_backward()
        self.thaw()
        came = self.reducer.foreseen
        self.reducer.finish()
        if self.gatherer is not None:
            self.gatherer.end_backward(not self.gatherer.may_be_differentiated(came))

    def thaw(self) -> None:
        """Train the optimizer's frozen parameters that now require grad, from the current gradients on.

        These have no hooks yet, so their gradients are where autograd leaves them, in ``p.grad``.
        """
        thawed = [slot for slot in self._frozen if slot.parameter.requires_grad]
        if not thawed:
            return
        self._frozen = [slot for slot in self._frozen if slot not in thawed]
        new = [bucket for bucket in self.buckets if not bucket.trained and any(s.bucket is bucket for s in thawed)]
        for bucket in new:
            bucket.thaw(Dtypes(*self.dtypes(bucket.slots[0].parameter)),
                        self.offload.host_for(bucket.numel, self.buckets))
        self._train(new)
        self.hooks += [self.reducer.listen(slot) for slot in thawed if slot not in self.reducer.nodes]
        for slot in thawed:
            if slot.parameter.grad is not None:
                slot.bucket.gradients.take(slot, slot.parameter.grad)
                slot.parameter.grad = slot.taken

    @torch.inference_mode(False)
    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Drop the window's gradients. Every rank must call it."""
        self.thaw()  # else gradients of what was thawed stay in p.grad
        self.end_if_pending()
        self.reducer.clear()
        self.spoiled = False
        if self.gatherer is not None:
            self.gatherer.end_backward()

    # The step.

    @torch.no_grad()
    def step(self, clip: float = 0.0, divisor: float = 1.0, skip_overflow: bool = True) -> StepResult:
        """Reduce the rest, agree on the scalars, fold every factor into one, update and gather, clear.

        clip            the largest allowed norm of the mean gradient; 0: no clipping
        divisor         turns the gradients, summed over ranks and micro-batches, into their mean: the number of ranks
                        for a mean over them, times the loss scale
        skip_overflow   leave the update out when the norm is not finite
        """
        self._reduce_the_rest()
        for bucket in self.buckets:
            if bucket.unit is None:
                bucket.keep_writes()
        norm = self._agree() / divisor
        coefficient = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        overflow = skip_overflow and not math.isfinite(norm)
        spoiled, self.spoiled = self.spoiled, False  # on any rank, as all have agreed
        culprit = self.reducer.first_not_finite() if overflow and not spoiled else None
        if not (overflow or spoiled):
            self.updater.update(coefficient / divisor)
        for gradients in self.reducer.every:
            gradients.reset()
        return StepResult(norm, coefficient, overflow, culprit, spoiled)

    def _reduce_the_rest(self) -> None:
        """End the backward pass, and a window without a boundary, as flush() needs it; check the model."""
        if self.reducer.pending or any(slot.parameter.requires_grad for slot in self._frozen):
            self.finish_backward()
        check_model(self)
        check_gradients(self)
        if not all(gradients.reduced for gradients in self.reducer.every):
            boundary, self.boundary = self.boundary, True
            self.finish_backward()
            self.boundary = boundary
        self.reducer.settle()

    def _agree(self, exact: bool = False) -> float:
        """Agree, in one all-reduce, on the norm, on which parameters have a gradient, ``spoiled`` and ``written``.

        Returns the norm of the summed gradients. Raises on all ranks where their digests have gone apart.
        """
        every, communicator = self.reducer.every, self.communicator
        places = [(gradients, slot) for gradients in every for slot in gradients.bucket.slots]
        flags = [float(slot in gradients.used) for gradients, slot in places] + [bool(g.late) for g in every]
        flags += [self.spoiled, self.written]
        for digest in (communicator.gathered, self.reducer.dropped):
            flags += [digest, digest ** 2]  # only where all ranks have the same do both sums agree
        square = Gradients.square(every, communicator.device, exact)
        message = torch.cat([square.view(1), _numbers(flags, communicator.device)])
        communicator.all_reduce(message, "scalars", what=lambda: "the step's norm and flags").wait()
        square, *flags, spoiled, written, gathered, gathered_squares, dropped, dropped_squares = message.tolist()
        self.spoiled, self.written = spoiled > 0, written > 0
        check_alike(self, gathered, gathered_squares, dropped, dropped_squares)
        late = [gradients for gradients, flag in zip(every, flags[len(places):]) if flag]
        if late:
            for gradients in late:
                gradients.reduce_late()
            self.reducer.settle()
            return self._agree()
        if not (exact or math.isfinite(square)):  # perhaps only the squares overflow, and not the gradients
            return self._agree(exact=True)
        for (gradients, slot), flag in zip(places, flags):
            if flag:
                gradients.used.add(slot)
        if not self.spoiled:
            check_used(self)
        return math.sqrt(square)


def _engines_of(model: nn.Module) -> set[Zero]:
    """Those that have parameters of the model."""
    slots = [_SLOTS.get(id(p)) for p in model.parameters()]
    return {slot.bucket.zero for slot in slots if slot is not None and slot.bucket.zero is not None}


def is_trained(model: nn.Module) -> bool:
    """Whether an engine has the model's parameters."""
    return bool(_engines_of(model))


def check_free(model: nn.Module) -> None:
    """Raise ValueError where an engine that somebody still has trains the model."""
    if is_trained(model):
        gc.collect()  # perhaps that engine is garbage
    if any(zero.user() is not None for zero in _engines_of(model)):
        raise ValueError("another engine already trains this model; call its destroy() first")


def _drop_taken(model: nn.Module) -> None:
    """Empty every p.grad that an engine has left: its bucket would take the next gradients, too."""
    with torch._C.DisableTorchFunctionSubclass():
        for p in model.parameters():
            if isinstance(p.grad, TakenGradient):
                p.grad = None


def check_model(zero: Zero) -> None:
    """Raise RuntimeError, naming the parameter, where model or optimizer were changed after initialize().

    That part would not be trained, or not saved.
    """
    slots = {id(slot.parameter): slot for bucket in zero.buckets for slot in bucket.slots}
    if slots.keys() != {id(p) for module in zero.model.modules() for p in module._parameters.values() if p is not None}:
        names = {id(p): name for name, p in zero.model.named_parameters()}  # too slow for each step
        new = [name for key, name in names.items() if key not in slots]
        if new:
            raise RuntimeError(f"{new[0]} came into the model after initialize(), so nothing trains or saves it; "
                               "change the model first, then call initialize()")
        gone = next(slot.name for key, slot in slots.items() if key not in names)
        raise RuntimeError(f"{gone} has left the model since initialize(); call destroy(), change the model, and call "
                           "initialize() again")
    with torch._C.DisableTorchFunctionSubclass():
        for bucket in zero.buckets:
            master = None if bucket.master is None else _memory_of(bucket.master)
            for slot in bucket.slots:
                slot.check_place()
                if slot.piece is not None and _memory_of(slot.piece) != master:
                    raise RuntimeError(f"the optimizer's parameter for {slot.name} was given other memory (p.data = "
                                       "...); write into it (p.data.copy_()) instead")
    for index, slots in enumerate(zero.slots_by_group()):
        given = zero.optimizer.param_groups[index]["params"]
        if list(map(id, given)) != [id(slot.piece) for slot in slots if slot.piece is not None]:
            raise RuntimeError(f"the params of the optimizer's param group {index} were changed after initialize(); "
                               "give the optimizer all of its parameters before it")


def check_alike(zero: Zero, gathered: float, gathered_squares: float, dropped: float, dropped_squares: float) -> None:
    """Raise on all ranks where they differ in what they dropped, gathered or wrote; all ranks must call it.

    The numbers are sums over ranks of digests, and of their squares.
    """
    ranks = zero.communicator.world_size
    if dropped ** 2 != dropped_squares * ranks:
        raise RuntimeError("zero_grad(), or p.grad = None, dropped gradients on some ranks alone, which were summed "
                           "over all already; drop them on every rank")
    if gathered ** 2 != gathered_squares * ranks:
        raise RuntimeError("ranks used the units of stage 3 in different orders, or wrote different weights, so that "
                           "these were mixed up. Name a module that chooses among units in zero_optimization."
                           "leaf_module; write the same on all ranks. What differs between ranks can be a buffer")
    if zero.written and ranks > 1:
        agree(lambda: [f"values of checksum {bucket.checksum()} in {bucket.label()} (written in place, as max_norm of "
                       "an embedding does; what differs between ranks can be a buffer)"
                       for bucket in zero.buckets if bucket.unit is None], same=True)
        zero.written = False


def check_used(zero: Zero) -> None:
    """Raise RuntimeError where no parameter has a gradient on any rank, or where a required one is missing."""
    slots = [slot for bucket in zero.trained for slot in bucket.slots]
    unused = [slot.name for slot in slots if slot not in slot.bucket.gradients.used]
    if len(unused) == len(slots):
        raise RuntimeError("step(): no parameter has a gradient; call backward(loss) before it, with a loss that "
                           "depends on parameters of the optimizer")
    if unused and not zero.config.ignore_unused_parameters:
        raise RuntimeError(f"zero_optimization.ignore_unused_parameters is false, and no rank has a gradient for "
                           f"{', '.join(unused)}")


def check_gradients(zero: Zero) -> None:
    """Drop the gradients that zero_grad() or ``p.grad = None`` removed; refuse those that the caller set."""
    for bucket in zero.trained:
        with torch._C.DisableTorchFunctionSubclass():
            gradients = [slot.parameter.grad for slot in bucket.slots]
        for slot, gradient in zip(bucket.slots, gradients):
            if gradient is None:
                if slot in bucket.gradients.used:
                    zero.reducer.drop(slot)
            elif not isinstance(gradient, TakenGradient):
                raise RuntimeError(f"p.grad of {slot.name} was set after backward(), and would not be used; call "
                                   "zero.safe_set_full_grad(p, value), or change the loss")


# --- Building a model straight into shards ----------------------------------------------------------------------------


class BuiltUnit(Unit):
    """A parameter that was built under ``Init``. Views of it keep its memory, perhaps on some ranks only."""

    def start_gather(self) -> None:
        """Take over writes through views first."""
        self.keep_views()
        super().start_gather()

    def keep_views(self) -> None:
        """Take over writes through views."""
        for bucket in self.buckets:
            if bucket.has_memory:
                bucket.keep_changes()
                bucket.note_versions()

    @property
    def is_viewed(self) -> bool:
        """Whether a view keeps its memory."""
        return any(bucket.is_viewed for bucket in self.buckets)


class Init:
    """A context in which every parameter of a model becomes shards as soon as its module is built.

        with zero.Init():
            model = GPT()               # a model larger than the memory of one rank
        engine, *_ = initialize(model=model, config=...)

    A rank holds its shards and the module being built. A module counts as built when its parent takes it in; the model
    itself, at the end of the context. Operations on parameters of finished modules work, and so does
    ``GatheredParameters``. A parameter that was read as a view (``p.data``, ``state_dict()``) stays whole until the
    first use of another one after the view is gone. All ranks must build the same. On the CPU they draw rank 0's random
    numbers meanwhile, so the weights are those of a model that rank 0 builds without this context.

    module         an existing model to shard at once: ``zero.Init(module=model)``. Its parts on the meta device get
                   memory and values module by module
    param_init_fn  gives a module that was on the meta device its values; default: its reset_parameters()
    remote_device  "cpu": keep the shards in host memory until ``initialize``; default: on this rank's device
    dtype          of the floating-point parameters; default: as they are built. Masters begin from it
    enabled        False: do nothing
    others         DeepSpeed's other arguments: those of WITHOUT_EFFECT; those of NOT_COVERED if None or False
    """

    # ``initialize`` reads its own config; linear layers are PyTorch's own.
    WITHOUT_EFFECT = ("config_dict_or_path", "config", "mem_efficient_linear", "pin_memory")
    NOT_COVERED = ("data_parallel_group", "sequence_data_parallel_group", "zero_param_parallel_group", "mpu",
                   "zero_quantized_weights", "zero_quantized_nontrainable_weights", "param_swapper")

    def __init__(self, module: nn.Module | None = None, *, remote_device: str | None = None, enabled: bool = True,
                 dtype: torch.dtype | None = None, param_init_fn: Callable[[nn.Module], Any] | None = None,
                 **others: Any):
        allowed = ("module", *Init.__init__.__kwdefaults__, *self.WITHOUT_EFFECT, *self.NOT_COVERED)
        for name, value in others.items():
            if name not in allowed:
                near = "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(name, allowed, 1))
                raise TypeError(f"zero.Init: unknown argument {name!r}{near} (allowed: {', '.join(allowed)})")
            if name in self.NOT_COVERED and value is not None and value is not False:
                raise ValueError(f"zero.Init: {name} is {value!r}; allowed: nothing, as that part of DeepSpeed is not "
                                 "covered")
        if remote_device not in (None, "none", "cpu"):
            raise ValueError(f"zero.Init: remote_device is {remote_device!r}; allowed: 'cpu' or None. For files, give "
                             "initialize() an offload_param section")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"zero.Init: dtype is {dtype}; allowed: a floating-point dtype")
        self.enabled, self.dtype, self.param_init_fn = enabled, dtype, param_init_fn
        self.remote, self.started_group = remote_device == "cpu", False
        self.buckets: list[Bucket] = []    # one for each parameter
        self.viewed: list[BuiltUnit] = []  # those that had a view when they were last used
        self.modules: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()  # that have parameters
        if module is not None and enabled:
            with self:
                for part in list(module.modules()):
                    self._materialize(part, module)
                    self._shard(part)

    def __enter__(self) -> "Init":
        if not self.enabled:
            return self
        device = own_device(int(os.environ.get("LOCAL_RANK", 0)))
        self.started_group = start_process_group(device)
        self.communicator = Communicator(device)
        self.host = Host(device, None, True, self.communicator.clock) if self.remote and device.type == "cuda" else None
        self.random_state = _share_random_state(self.communicator)
        registration = nn.modules.module
        self.hooks = [registration.register_module_parameter_registration_hook(
                          lambda module, name, parameter: self.modules.setdefault(module)),
                      registration.register_module_module_registration_hook(self._on_child)]
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.enabled:
            return
        for hook in self.hooks:
            hook.remove()
        if error[0] is None:
            self._finish()
        if self.random_state is not None:
            torch.set_rng_state(self.random_state)
        _return_free_memory()

    def __deepcopy__(self, memo: dict) -> "Init":
        return self  # a copied module takes its hook along

    def _on_child(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        """A parent takes a module in, so the module and all in it are built."""
        self._free_viewed()
        for part in child.modules() if child is not None else ():
            self._shard(part)

    def _finish(self) -> None:
        """Shard what no parent took in; drop what was replaced, such as the weight of a layer that was then tied."""
        self._free_viewed()
        modules = list(self.modules)
        for module in modules:
            self._shard(module)
        used = {id(p) for module in modules for p in module.parameters(recurse=False)}
        self.buckets = [bucket for bucket in self.buckets if id(bucket.slots[0].parameter) in used]

    def _shard(self, module: nn.Module) -> None:
        """Shard the module's own parameters, except those that are sharded already or have no values yet."""
        new = [(name, p) for name, p in module.named_parameters(recurse=False) if not (p.is_meta or id(p) in _SLOTS)]
        for _, p in new:
            if self.dtype is not None and p.is_floating_point():
                p.data = p.data.to(self.dtype)
        if not new or self.communicator.world_size == 1:
            return
        for name, p in new:
            slots: list[Slot] = []
            _append_slot(slots, name, p)
            plan = Plan(BuiltUnit(type(module).__name__, module, 0, self), False, False, Dtypes(*[p.dtype] * 4), slots)
            self.buckets.append(Bucket(plan, self.communicator, SHARDED[3], shard_host=self.host))
            plan.unit.free()
        self.modules.setdefault(module)  # for copies of modules, which have registered nothing
        module.register_forward_pre_hook(self._refuse_forward)  # also keeps this object alive as long as the model

    def _materialize(self, part: nn.Module, model: nn.Module) -> None:
        """Give the module's own tensors on the meta device memory, and then values."""
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        missing = {name: tensor for name, tensor in own if tensor.is_meta}
        if not missing:
            return
        path = next(name for name, module in model.named_modules() if module is part) or type(part).__name__
        initialise = self.param_init_fn or getattr(type(part), "reset_parameters", None)
        if initialise is None:
            raise ValueError(f"zero.Init: {path} has {', '.join(missing)} on the meta device, and no "
                             "reset_parameters() to give them values; needed: a param_init_fn")
        for tensor in missing.values():  # the same Python object, so that tied weights stay tied
            new = torch.empty_like(tensor, device=self.communicator.device)
            new.fill_(math.nan if tensor.is_floating_point() else 0)
            is_parameter = isinstance(tensor, nn.Parameter)
            torch.utils.swap_tensors(tensor, nn.Parameter(new, tensor.requires_grad) if is_parameter else new)
        initialise(part)
        for name in missing:
            tensor = getattr(part, name)
            if tensor.is_floating_point() and tensor.isnan().any():
                raise ValueError(f"zero.Init: {path}.{name} was on the meta device and has got no values; needed: a "
                                 "param_init_fn, or a reset_parameters(), that fills it")

    def _refuse_forward(self, module: nn.Module, args: tuple) -> None:
        if any(_owner_of(p) is self for p in module.parameters(recurse=False)):
            raise RuntimeError(f"{type(module).__name__} was built under zero.Init, and each rank has a part of its "
                               "weights; give the model to initialize() first, and call the engine")

    def begin_use(self, slot: Slot, operation: str) -> Any:
        """Gather the values for one operation."""
        self._free_viewed()
        user = object()
        slot.bucket.unit.acquire(user)
        return user

    def end_use(self, slot: Slot, user: Any, result: Any) -> None:
        """Keep what the operation wrote. A view that it returned, such as ``p.data``, may be written to later."""
        unit = slot.bucket.unit
        unit.keep_views()
        unit.release(user)
        if unit.is_viewed and unit not in self.viewed:
            self.viewed.append(unit)

    def _free_viewed(self) -> None:
        """Free the units whose views are gone, and keep what was written through them."""
        for unit in [unit for unit in self.viewed if not (unit.users or unit.is_viewed)]:
            self.viewed.remove(unit)
            unit.keep_views()
            unit.free()

    def surrender(self, slot: Slot) -> None:
        """An engine has the parameter now."""
        slot.parameter.__class__ = slot.kind
        self.buckets.remove(slot.bucket)
        slot.bucket.unit.buckets.clear()  # breaks a cycle: the shard must go now
        slot.bucket.slots.clear()


@contextmanager
def _taken_over(parameter: nn.Parameter) -> Iterator[Tensor]:
    """A parameter's whole values; if ``Init``, or an engine that is garbage, has it, that releases it afterwards."""
    slot = _SLOTS.get(id(parameter))
    if slot is None or slot.bucket.unit is None:
        yield parameter.data
        return
    unit = slot.bucket.unit
    unit.acquire(parameter)
    yield parameter.data
    unit.release(parameter)
    unit.owner.surrender(slot)


def _holders(flat: Tensor) -> int:
    """How many tensors share this memory."""
    return torch._C._storage_Use_Count(flat.untyped_storage()._cdata) - 1  # there is no public call; one is storage's


def _share_random_state(communicator: Communicator) -> Tensor | None:
    """Make every rank draw rank 0's random numbers on the CPU; returns this rank's own state, if it differed."""
    own = torch.get_rng_state()
    state = own.clone().to(communicator.device)
    communicator.broadcast(state, source=0)
    if torch.equal(state.cpu(), own):
        return None
    torch.set_rng_state(state.cpu())
    return own


def started_group(model: nn.Module) -> bool:
    """Whether ``Init`` started the process group to build this model, so that the model's engine has to end it."""
    owners = [_owner_of(p) for p in model.parameters()]
    return any(isinstance(owner, Init) and owner.started_group for owner in owners)


# --- Reading and writing what is sharded ------------------------------------------------------------------------------


class GatheredParameters:
    """A context in which parameters are whole, to be read, or written with ``modifier_rank``. All ranks must enter it.

    params          a parameter or several; those that belong to no engine are left alone
    modifier_rank   the rank whose changes to ``params`` all ranks take over at the end. None: reading only
    fwd_module      DeepSpeed's argument, without effect here
    enabled         False: the context does nothing
    """

    def __init__(self, params: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = None,
                 fwd_module: nn.Module | None = None, enabled: bool = True):
        params = [params] if isinstance(params, Tensor) else list(params)
        self.slots = [_SLOTS[id(p)] for p in params if id(p) in _SLOTS] if enabled else []
        self.sharded = [slot for slot in self.slots if slot.bucket.unit is not None]
        self.modifier_rank = modifier_rank
        size = dist.get_world_size() if dist.is_initialized() else 1
        if modifier_rank is not None and not (isinstance(modifier_rank, int) and 0 <= modifier_rank < size):
            raise ValueError(f"modifier_rank is {modifier_rank!r}; allowed: a rank from 0 to {size - 1}, or None")

    def __enter__(self) -> None:
        for slot in self.sharded:
            slot.bucket.unit.acquire(self)
        self.saving = _saving() if self.sharded else nullcontext()  # the backward of what is computed here may follow
        self.saving.__enter__()

    def __exit__(self, error: Any, value: Any, *rest: Any) -> None:
        self.saving.__exit__(None, None, None)
        moved = [slot.name for slot in self.slots if not _same_memory(slot.parameter, slot.bucket.flat)]
        if moved:
            raise RuntimeError(f"{', '.join(moved)}: p.data was assigned inside GatheredParameters, and the bucket "
                               "kept its values; write into it (p.data.copy_()), with a modifier_rank")
        if error is None and self.modifier_rank is not None:
            self._keep_changes()
        lost = self._changed() if error is None and self.modifier_rank is None and self.sharded else []
        for slot in self.sharded:
            slot.version = slot.parameter._version  # their values are kept, or lost on purpose; free() sees the others
        for slot in self.sharded:  # after all versions: the first release frees the whole unit
            slot.bucket.unit.release(self)
        if value is not None and "support saved tensor hooks" in str(value):
            raise RuntimeError(NO_TRANSFORMS) from value
        if lost:
            raise ValueError(f"values were changed inside GatheredParameters({', '.join(lost)}) without a "
                             "modifier_rank, and are lost; give the rank whose changes are to be kept")

    def _keep_changes(self) -> None:
        """Take the modifier rank's changes over."""
        for slot in self.slots:
            values = slot.bucket.flat[slot.offset:slot.end].clone()  # gloo may keep what it sent for a moment
            slot.bucket.communicator.broadcast(values, self.modifier_rank)
            slot.bucket.flat[slot.offset:slot.end] = values
        for slot in self.slots:
            slot.bucket.keep_changes()

    def _changed(self) -> list[str]:
        """The names of the sharded parameters that were changed. Each rank sees only changes in its own shard."""
        communicator, flags = self.sharded[0].bucket.communicator, []
        for slot in self.sharded:
            own = slot.own(slot.bucket.flat[slot.bucket.own])
            shard = slot.own(slot.bucket.shard).to(own.device, own.dtype)
            flags.append(not torch.equal(own.view(torch.uint8), shard.view(torch.uint8)))  # as bytes: NaN equals NaN
        changed = _numbers(flags, communicator.device)
        communicator.all_reduce(changed, "scalars").wait()
        return [slot.name for slot, flag in zip(self.sharded, changed.tolist()) if flag]


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Without effect, and not needed: stage 3 sees by itself where a module uses another's parameter."""


def safe_get_full_fp32_param(parameter: nn.Parameter) -> Tensor:
    """A copy of the whole parameter from the masters, in its shape. All ranks must call it, here and below."""
    slot = _slot_of(parameter)
    bucket = slot.bucket
    if bucket.unit is None:
        bucket.keep_writes()
    elif isinstance(bucket.unit, BuiltUnit):
        bucket.unit.keep_views()
    finest, start = bucket.finest
    return slot.view(finest).clone() if finest is bucket.flat else slot.collect(finest, start)


@torch.no_grad()
def safe_set_full_fp32_param(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the whole parameter, masters included. ``value``, in the parameter's shape, must be the same on all ranks."""
    slot = _slot_of(parameter)
    bucket = slot.bucket
    _check_shape(slot, value)
    if bucket.has_memory:
        slot.view(bucket.flat).copy_(value)
    for own in (bucket.master, bucket.shard):
        if own is not None:
            slot.write(value, own)


def safe_get_full_grad(parameter: nn.Parameter) -> Tensor | None:
    """The whole gradient of the window so far: the mean over ranks, without the loss scale, before clipping.

    None if no rank has one.
    """
    slot = _slot_of(parameter)
    bucket, zero = slot.bucket, slot.bucket.zero
    if zero is not None:
        zero.end_if_pending()  # which may thaw it
    gradients = bucket.gradients
    if gradients is None:
        return None
    if slot in gradients.used and slot.parameter.grad is None:
        zero.reducer.drop(slot)
    if not zero.reducer.any_rank_has(slot):
        return None
    if gradients.reduced:
        return gradients.whole(slot) / zero.divisor
    own = torch.zeros(slot.end - slot.offset, dtype=bucket.dtypes.gradient, device=bucket.flat.device)
    if slot in gradients.filled:
        slot.view(own, slot.offset).copy_(slot.view(gradients.buffer))
    bucket.communicator.all_reduce(own, "scalars").wait()
    return slot.view(own / zero.divisor, slot.offset)


@torch.no_grad()
def safe_set_full_grad(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the whole reduced gradient, as safe_get_full_grad gives it; between backward() and step() at a boundary."""
    slot = _slot_of(parameter)
    gradients, zero = slot.bucket.gradients, slot.bucket.zero
    _check_shape(slot, value)
    if zero is not None:
        zero.end_if_pending()
    if gradients is None or not gradients.reduced:
        raise RuntimeError(f"{slot.name} has no reduced gradient to set; call this between the window's last "
                           "backward() and step()")
    gradients.set_sum(slot, value * zero.divisor)


def safe_get_full_optimizer_state(parameter: nn.Parameter, key: str) -> Tensor | None:
    """The optimizer's state ``key`` (such as "exp_avg") of a parameter: whole in its shape, or a scalar such as "step".

    None for a parameter that is not trained. Raises ValueError where the optimizer keeps no such state, or keeps none
    before the first update.
    """
    slot = _slot_of(parameter)
    if not slot.bucket.trained:
        return None
    value, scalar = _find_state(slot, key)
    if scalar is not None:
        return torch.as_tensor(scalar).clone()
    part = slot.bucket.master[:0] if value is None else slot.in_order(value)
    return slot.collect(part, max(slot.offset, slot.bucket.own.start))


@torch.no_grad()
def safe_set_full_optimizer_state(parameter: nn.Parameter, value: Tensor, key: str) -> None:
    """Set a parameter's optimizer state that has a value per element, as safe_get_full_optimizer_state gives it."""
    slot = _slot_of(parameter)
    if not slot.bucket.trained:
        raise ValueError(f"{slot.name} is not trained, so it has no optimizer state")
    state, scalar = _find_state(slot, key)
    _check_shape(slot, value)
    if scalar is not None:
        raise ValueError(f"the optimizer state {key!r} of {slot.name} is one value for many elements; allowed: state "
                         "with a value per element")
    if state is not None:
        state.copy_(slot.own_values(value))


def _find_state(slot: Slot, key: str) -> tuple[Tensor | None, Any]:
    """This rank's part of a parameter's optimizer state with a value per element, or the state that is one number.

    All ranks exchange their keys and numbers, since a rank may have no part of the parameter.
    """
    state, value, report = _state_of(slot), None, None
    if slot.piece is not None:
        number = state.get(key)
        if _is_like(key, number, slot.piece.shape):
            value, number = number, None
        elif isinstance(number, Tensor):
            number = number.cpu()  # else each rank takes memory on all GPUs
        report = sorted(state), number
    reports = gather(report) if slot.bucket.sharded.optimizer else [report]
    keys, scalar = next((r for r in reports if r is not None), ([], None))
    if key not in keys:
        raise ValueError(f"{slot.name} has no optimizer state {key!r} (has: "
                         f"{', '.join(keys) or 'none before an update'})")
    return value, scalar


def _check_shape(slot: Slot, value: Any) -> None:
    if not isinstance(value, Tensor) or value.shape != slot.shape:
        given = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"the value for {slot.name} is {given}; allowed: a tensor of shape {tuple(slot.shape)}")


# --- Shares of a checkpoint -------------------------------------------------------------------------------------------


class CheckpointError(RuntimeError):
    """A checkpoint can't be written or read; the message names the file, the parameter and what to do."""


# A range of a parameter, or of its optimizer state: the parameter's name, the state's key ("" for the parameter
# itself), the first element in memory order, and the values, 1-D. A reader takes the ranges that it needs, so a
# checkpoint knows nothing of buckets, stages or ranks. State in a shape of its own (Adafactor's rows) comes whole, with
# a leading dimension of 1.
Share = tuple[str, str, int, Tensor]


def shares(zero: Zero, with_frozen: bool = True, whole: bool = False) -> Iterator[Share]:
    """What this rank saves: its slice of every bucket, parameter by parameter, as views.

    whole   all that this rank has of each, even where other ranks have it too: what ``fill`` writes into
    """
    rank = zero.communicator.rank
    for bucket in zero.buckets:
        if bucket.unit is None and not whole:
            bucket.keep_writes()
        mine = (0, bucket.numel) if whole else (bucket.bounds[rank], bucket.bounds[rank + 1])
        held, start = bucket.finest
        for slot in bucket.slots if with_frozen else filter(_asks_for_gradients, bucket.slots):
            yield from _cut(slot, "", held, start, mine)
            for key, value in _state_of(slot).items():
                if _is_like(key, value, slot.piece.shape):
                    yield from _cut(slot, key, slot.in_order(value), max(slot.offset, bucket.own.start), mine)
                elif _is_whole(slot, value) and (whole or bucket.sharded.optimizer or rank == 0):
                    yield slot.name, key, 0, value[None]


def _asks_for_gradients(slot: Slot) -> bool:
    """Whether the parameter is not frozen; the optimizer need not have it."""
    return slot.bucket.trained or slot.parameter.requires_grad


def _cut(slot: Slot, key: str, held: Tensor, start: int, mine: tuple[int, int]) -> Iterator[Share]:
    """The part of a parameter that lies in ``held``, which begins at the bucket's element ``start``, and ``mine``."""
    low, high = max(mine[0], slot.offset, start), min(mine[1], slot.end, start + held.numel())
    if low < high or slot.offset == slot.end and mine[0] == 0:  # a parameter without elements is saved as well
        yield slot.name, key, low - slot.offset, held[low - start:max(low, high) - start]


def _state_of(slot: Slot) -> dict[str, Any]:
    """The optimizer's state of this rank's piece."""
    return {} if slot.piece is None else slot.bucket.zero.optimizer.state.get(slot.piece, {})


def _is_whole(slot: Slot, value: Any) -> bool:
    """Whether state without a value per element is a tensor, for a parameter that this rank has whole."""
    return isinstance(value, Tensor) and value.dim() > 0 and slot.piece.numel() == slot.shape.numel()


def scalars(zero: Zero) -> dict[str, dict[str, Any]]:
    """The optimizer state that ``shares`` leaves out, such as step counts, by parameter name and key."""
    return {slot.name: {key: value for key, value in _state_of(slot).items()
                        if not (_is_like(key, value, slot.piece.shape) or _is_whole(slot, value))}
            for bucket in zero.trained for slot in bucket.slots if _state_of(slot)}


def describe(zero: Zero, with_frozen: bool = True) -> dict[str, dict[str, Any]]:
    """Shape, layout, dtype and param group of every parameter by name, and its other names (tied weights)."""
    check_model(zero)
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, p in zero.model.named_parameters(remove_duplicate=False):
        names[p].append(name)
    slots = {known[0]: (_slot_of(p), known[1:]) for p, known in names.items()}
    for name, (slot, _) in slots.items():
        slot.name = name  # pruning, for example, has renamed it
    return {name: {"shape": list(slot.shape), "stride": list(slot.stride), "trained": _asks_for_gradients(slot),
                   "dtype": str(slot.bucket.dtypes.compute)[6:], "group": slot.group, "aliases": aliases}
            for name, (slot, aliases) in slots.items() if with_frozen or _asks_for_gradients(slot)}


def check_fits(own: Mapping[str, Mapping[str, Any]], saved: Mapping[str, Mapping[str, Any]], source: str,
               strict: bool, with_state: bool) -> None:
    """Raise CheckpointError unless ``saved``, from ``source``, fits the model; both as ``describe`` returns them."""
    missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if strict and (missing or extra):
        raise CheckpointError(f"{source} is of another model: it lacks {missing or 'nothing'}, and also has "
                              f"{extra or 'nothing'}; load it into the model that saved it, or with "
                              "load_module_strict=False")
    for name in sorted(own.keys() & saved.keys()):
        for fact in ("shape", "kind", "group") if with_state else ("shape", "kind"):
            there, here = saved[name].get(fact), own[name].get(fact)
            if there != here and None not in (there, here):  # None: it was, or is, not trained
                way = "with load_optimizer_states=False" if fact == "group" else "into the model that saved it"
                raise CheckpointError(f"{source}: {name} has the {'param ' * (fact == 'group')}{fact} {there}, and in "
                                      f"this model {here}; load it {way}")


@torch.no_grad()
def fill(zero: Zero, read: Callable[[str, str, int, Tensor], None], state: dict[str, dict[str, Any]] | None) -> None:
    """Load saved values, on each rank its own part of every parameter. All ranks must call it.

    read    ``read(name, key, first element, out)`` writes saved values into ``out``, the values of a share
    state   replaces the optimizer's, by name and key. A dtype stands for values per element, and a meta tensor for
            state in a shape of its own; ``read`` brings both. None: the optimizer keeps its state
    """
    for bucket in zero.trained if state is not None else ():
        for slot in bucket.slots:
            before = zero.optimizer.state.pop(slot.piece, {})
            if slot.piece is not None and slot.name in state:
                zero.optimizer.state[slot.piece] = {
                    key: _entry(slot, value, before.get(key), partial(read, slot.name, key))
                    for key, value in state[slot.name].items()}
        bucket.keep_state(zero.optimizer)
    for name, key, start, values in shares(zero, whole=True):
        if not key or state is not None and values.dim() == 1:
            read(name, key, start, values)
    for bucket in zero.buckets:
        bucket.publish()
    for bucket in zero.buckets:
        bucket.gather.wait()


def _entry(slot: Slot, value: Any, before: Any, read: Callable[[int, Tensor], None]) -> Any:
    """An entry of a piece's optimizer state as ``fill`` needs it, in the memory of the previous one if that fits."""
    piece, group = slot.piece, slot.bucket.zero.optimizer.param_groups[slot.group]
    if isinstance(value, torch.dtype):  # to be filled with the shares
        new = torch.zeros_like(piece, dtype=value, requires_grad=False)
        fits = _is_like("", before, new.shape) and (before.dtype, before.stride()) == (value, new.stride())
        return before if fits else new
    if not isinstance(value, Tensor):
        return value
    if value.is_meta:
        new = torch.empty_like(value, device=piece.device)
        read(0, new[None])
        return new
    on_device = value.dim() > 0 or group.get("fused") or group.get("capturable")  # else a step count: on the CPU
    return value.to(piece.device if on_device else "cpu")


# --- Memory, estimated and measured -----------------------------------------------------------------------------------
#
# An estimate is a rehearsal: the code above takes two steps on the meta device, where tensors have no memory, with a
# communicator that sends nothing. ``measure`` then reads what it holds, as for an engine.


CATEGORIES = {
    "parameters": "whole (stages 0 to 2), or this rank's shards, which may be the masters at the same time",
    "gradients": "whole, accumulated (stages 0 and 1), or this rank's shards of their sum",
    "masters": "what the optimizer updates, where that is not the parameter itself",
    "optimizer_state": "what the optimizer keeps per element",
    "buffers": "the model's: running means and the like",
    "live": "gathered units (stage 3), and the buffers that gradients pass through; more of these where gradients come "
            "in another order than the reverse of registration, as buckets wait then"}
PLACES = ("device", "cpu", "nvme")  # the memory that the model computes in; offloaded to host memory; to files
NOT_COUNTED = "activations, the update's own temporary tensors, and the gaps that the allocator keeps"


def measure(zero: Zero, model: nn.Module) -> dict[tuple[str, str], int]:
    """The bytes that this rank holds now, by category and place; each storage is counted once."""
    return _measure(zero, zero.buckets, model.buffers())


def _measure(zero: Zero, buckets: Iterable[Bucket], buffers: Iterable[Tensor] = ()) -> dict[tuple[str, str], int]:
    seen: set[int] = set()
    found = dict.fromkeys([(category, "device") for category in CATEGORIES], 0)

    def add(category: str, host: Host | None, *tensors: Tensor | None) -> None:
        place = "device" if host is None else "nvme" if host.folder and category != "gradients" else "cpu"
        for storage in (t.untyped_storage() for t in tensors if t is not None):
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                found[category, place] = found.get((category, place), 0) + storage.nbytes()

    add("buffers", None, *buffers)
    for bucket in buckets:
        add("parameters", bucket.shard_host, bucket.flat if bucket.unit is None else bucket.shard)
        add("masters", bucket.host, bucket.master)
        entries = [value for piece in bucket.pieces for value in zero.optimizer.state.get(piece, {}).values()]
        add("optimizer_state", bucket.host, *(v for v in entries if isinstance(v, Tensor) and v.dim()))
        gradients = bucket.gradients
        if gradients is not None:
            add("gradients", bucket.host, gradients.buffer if gradients.keeps_buffer else gradients.sum)
            add("live", None, gradients.buffer, gradients.send_buffer, gradients.landing,
                *gradients.reduction.received)
        add("live", None, bucket.flat)
    return found


def groups_to_estimate(zero: Zero) -> list[dict[str, Any]]:
    """The optimizer's param groups, as ``estimate`` takes them."""
    groups = zip(zero.optimizer.param_groups if zero.optimizer else (), zero.slots_by_group())
    return [{"params": [slot.parameter for slot in slots], "state_tensors": len(_state_dtypes(zero.optimizer, group)),
             "whole": index in zero.whole} for index, (group, slots) in enumerate(groups)]


@dataclass
class Estimate:
    """What one rank holds, in bytes by category and place, and what it sends in one optimizer step, by collective.

    ``NOT_COUNTED`` and the step's scalars are not in it. ``str()`` makes a table of it.
    """
    stage: int
    world_size: int
    held: dict[tuple[str, str], int]  # see CATEGORIES and PLACES
    traffic: dict[str, Traffic]
    measured: dict[tuple[str, str], int] | None = None  # what it holds now, from ``measure``

    def bytes(self, category: str | None = None, place: str | None = None) -> int:
        """The bytes of one category or all, in one place or all."""
        for name, given, allowed in (("category", category, CATEGORIES), ("place", place, PLACES)):
            if given is not None and given not in allowed:
                raise ValueError(f"{name} is {given!r}; allowed: {', '.join(allowed)}, or None for all")
        return sum(size for (kind, where), size in self.held.items() if category in (None, kind)
                   and place in (None, where))

    def __str__(self) -> str:
        columns = []
        for held in (self.held,) if self.measured is None else (self.held, self.measured):
            totals = Counter()
            for (_, place), size in held.items():
                totals["total", place] += size
            columns.append(held | totals)
        rows = [(f"{kind.replace('_', ' ')}, {place}", *(column.get((kind, place), 0) for column in columns))
                for kind, place in dict.fromkeys(key for column in columns for key in column)]
        head = f"bytes at stage {self.stage}, {self.world_size} ranks", "estimated", "measured"
        return "\n".join([text_table(head[:1 + len(columns)], rows),
                          f"not in it: {NOT_COUNTED}; live: what comes and goes, at its most",
                          "one optimizer step:", traffic_table(self.traffic)])


class RehearsedZero(Zero):
    """``Zero`` under a ``Rehearsal``, with a model on the meta device.

    It needs no folder for offload, and counts the norm of gradients as 0, since they have no values.

    most   the largest number of live bytes so far
    """

    most = 0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.communicator.watch = self.watch

    def _room_needed(self) -> Counter[tuple[str, str]]:
        return Counter()

    def _agree(self, exact: bool = False) -> float:
        return 0.0

    def watch(self) -> None:
        """Note the live bytes now.

        Below stage 3, the next bucket counts as begun: a model's gradients don't come in the exact order of buckets.
        """
        if self.gatherer is None and self.reducer.queue and self.reducer.queue[0].life is Life.QUEUED:
            self.reducer.queue[0]._prepare_buffer()
        busy = [b for b in self.buckets if b.unit is not None and b.has_memory or b.gradients is not None and (
            b.gradients.send_buffer is not None or b.gradients.buffer is not None and not b.gradients.keeps_buffer)]
        self.most = max(self.most, _measure(self, busy)["live", "device"])


class StandIn(nn.Module):
    """A module's parameters and submodules on the meta device, by name; no code and no data of it.

    memo   receives the stand-in of each module and parameter, by its id
    """

    def __init__(self, module: nn.Module, memo: dict[int, Any]):
        super().__init__()
        memo[id(module)] = self
        for name, p in module._parameters.items():  # set in the dictionaries, where no hook of zero.Init sees it
            if p is not None and id(p) not in memo:
                like = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta")
                memo[id(p)] = nn.Parameter(like, p.requires_grad)
            self._parameters[name] = memo.get(id(p))
        for name, child in module._modules.items():
            self._modules[name] = None if child is None else memo.get(id(child)) or StandIn(child, memo)

    def forward(self, x: Tensor) -> Tensor:
        """Use each trained parameter once, in the order of registration."""
        for p in self._parameters.values():
            if p is not None and p.requires_grad:
                x = x + p.sum()
        for child in self.children():
            x = child(x)
        return x


class StandInOptimizer(Optimizer):
    """Keeps a group's ``state_tensors`` per parameter, updates nothing, and knows which groups are ``whole``."""

    def is_elementwise(self, group: Mapping[str, Any]) -> bool:
        """What Zero asks."""
        return not group["whole"]

    def step(self, closure: None = None) -> None:
        """Make the state of what has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.state[p] = self.state[p] or {i: torch.empty_like(p) for i in range(group["state_tensors"])}


def estimate(model_or_counts: nn.Module | int | tuple[int, int], config: ZeroConfig | None = None,
             world_size: int = 1, *, dtypes: Dtypes | Callable[[nn.Parameter], Sequence[torch.dtype]] | None = None,
             buffer_dtype: torch.dtype | None = None, state_tensors: int = 2, device: torch.device | str | None = None,
             micro_batches: int = 1, groups: Sequence[Mapping[str, Any]] | None = None, rank: int = 0) -> Estimate:
    """What a rank of ``world_size`` will hold, in bytes, and send, before anything is allocated.

    model_or_counts   a model, of which only shapes and dtypes are read; or the number of parameters; or that and the
                      largest unit's. Numbers stand for equal blocks, as large as the unit or a bucket, and 100 at most
    config            None: stage 0. For a whole config, a dict or a file, there is ``engine.estimate``
    dtypes            of every parameter, or a function of the parameter. None: a parameter's own throughout
    buffer_dtype      of floating-point buffers. None: their own
    state_tensors     how many values the optimizer keeps per element: Adam 2, SGD 0
    device            the ranks' kind of device, which decides the size of buckets. None: the model's; meta is a GPU
    micro_batches     per optimizer step, for the traffic
    groups            the optimizer's param groups, each with "params", and perhaps "state_tensors" of its own, and
                      "whole" if no parameter may be cut, as for Muon. None: all that require grad, in one
    rank              which one; they differ by padding alone

    Raises ValueError, which names the argument, what was given and what is allowed.
    """
    config, model = config or ZeroConfig(), model_or_counts
    if not isinstance(config, ZeroConfig):
        raise ValueError(f"config is a {type(config).__name__}; allowed: a ZeroConfig; for others engine.estimate")
    if not isinstance(model, nn.Module):
        model = _blocks(model, config, torch.device(device or "meta"))
    device = torch.device(device or next((p.device for p in model.parameters()), "cpu"))
    for name, value, least in (("world_size", world_size, 1), ("micro_batches", micro_batches, 1), ("rank", rank, 0),
                               ("state_tensors", state_tensors, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; allowed: a whole number from {least} up")
    if rank >= world_size:
        raise ValueError(f"rank is {rank}; allowed: less than world_size, which is {world_size}")
    if groups is None:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    groups = [{"state_tensors": state_tensors, "whole": False, **group} for group in groups]
    with torch.inference_mode(False), torch.enable_grad():
        zero = _stand_in_zero(model, config, dtypes, device, groups,
                              Rehearsal(world_size, rank, direct=device.type == "cpu"))
        held = _rehearse(zero, micro_batches)
        zero.release()
    held["buffers", "device"] = sum({
        id(b): b.numel() * (buffer_dtype if buffer_dtype and b.is_floating_point() else b.dtype).itemsize
        for b in model.buffers()}.values())
    return Estimate(config.stage, world_size, held, dict(zero.communicator.traffic))


def _stand_in_zero(model: nn.Module, config: ZeroConfig, dtypes: Any, device: torch.device,
                   groups: list[dict[str, Any]], communicator: Rehearsal) -> RehearsedZero:
    """A copy of the model's ``Zero`` on ``device`` that has no memory."""
    memo: dict[int, Any] = {}
    twin = StandIn(model, memo)
    names = {name for name, _ in twin.named_modules()}  # a module that has two names is a unit once
    units = find_units(model, config.leaf_module) if config.stage == 3 else ()
    config = replace(config, leaf_module=LeafModules(names=[name for name in units if name in names]),
                     reduce_bucket_size=bucket_size(config, sum(p.numel() for p in model.parameters()), device))
    chosen = {id(memo[id(p)]): dtypes(p) if callable(dtypes) else dtypes or [p.dtype] * 4 for p in model.parameters()}
    for group in groups:
        strange = [tuple(p.shape) for p in group["params"] if id(p) not in memo]
        if strange:
            raise ValueError(f"groups has a parameter of shape {strange[0]} that the model has not; allowed: the "
                             "model's own")
        group["params"] = [memo[id(p)] for p in group["params"]]
    optimizer = StandInOptimizer(groups, {}) if any(group["params"] for group in groups) else None
    return RehearsedZero(twin, optimizer, config, communicator.device, lambda p: chosen[id(p)],
                         communicator=communicator)


def _rehearse(zero: RehearsedZero, micro_batches: int) -> dict[tuple[str, str], int]:
    """Take two steps, and read what the second holds and sends; the first learns the order of the units."""
    traffic = zero.communicator.traffic
    for _ in range(2):
        traffic.clear()
        for boundary in (False, True) if micro_batches > 1 else (True,):
            zero.boundary = boundary
            loss = zero.model(torch.zeros((), device="meta"))
            if loss.requires_grad:
                loss.backward(torch.zeros_like(loss))
            zero.finish_backward()
            for record in traffic.values() if not boundary else ():  # this micro-batch stands for all but the last
                vars(record).update({name: value * (micro_batches - 1) for name, value in vars(record).items()})
        held = _measure(zero, zero.buckets)
        if zero.optimizer is not None:
            zero.step()
    return held | {("live", "device"): zero.most}


def _blocks(counts: Any, config: ZeroConfig, device: torch.device) -> nn.Module:
    """A model of the given number of parameters, in blocks."""
    total, unit = counts if isinstance(counts, tuple) and len(counts) == 2 else (counts, 0)
    for value in (total, unit):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"model_or_counts is {counts!r}; allowed: a model, a number of parameters, or a pair of "
                             "that and the largest unit's")
    if unit > total:
        raise ValueError(f"the largest unit has {unit} parameters, of {total} in all; allowed: at most all of them")
    size = max(unit or bucket_size(config, total, device), -(-total // 100), 1)
    sizes = [size] * (total // size) + [total % size] * (total % size > 0)
    with torch.device("meta"):
        return nn.Sequential(*[nn.Sequential(nn.ParameterList([nn.Parameter(torch.empty(n))])) for n in sizes])


# DeepSpeed's documented functions print this project's own figures, in 16 bits with gradients summed in 32, and not
# DeepSpeed's. ``additional_buffer_factor`` has no effect, as the figures need no allowance.
MIXED = Dtypes(torch.bfloat16, torch.float32, torch.float32, torch.float32)


def estimate_zero2_model_states_mem_needs_all_live(
        model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5, *,
        stage: int = 2) -> None:
    """Print what a rank holds and sends at stage 2, for a model."""
    print(estimate(model, ZeroConfig(stage=stage), num_gpus_per_node * num_nodes, dtypes=MIXED))


def estimate_zero2_model_states_mem_needs_all_cold(total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1,
                                                   additional_buffer_factor: float = 1.5) -> None:
    """Print what a rank holds and sends at stage 2, for a number of parameters."""
    estimate_zero2_model_states_mem_needs_all_live(int(total_params), num_gpus_per_node, num_nodes)


estimate_zero3_model_states_mem_needs_all_live = partial(estimate_zero2_model_states_mem_needs_all_live, stage=3)


def estimate_zero3_model_states_mem_needs_all_cold(total_params: int, largest_layer_params: int,
                                                   num_gpus_per_node: int = 1, num_nodes: int = 1,
                                                   additional_buffer_factor: float = 1.5) -> None:
    """Print what a rank holds and sends at stage 3, for a number of parameters and that of the largest unit."""
    counts = int(total_params), int(largest_layer_params)
    estimate_zero3_model_states_mem_needs_all_live(counts, num_gpus_per_node, num_nodes)


# --- The command line ------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    runpy.run_path(os.path.join(os.path.dirname(__file__), "engine.py"), run_name="__main__")  # has the commands
