"""Activation checkpointing: keep few activations, and compute the rest again when backward needs them.

**What autograd saves.** While the forward pass runs, every operation saves the tensors that its derivative needs: a
matrix product its two factors, a gelu its input. They live until backward has used them, so that L blocks which save c
activations each hold c * L of them. Checkpointing (arXiv 1604.06174) runs a stretch of the forward pass, a *region*,
and drops what was saved in it; only the region's inputs are kept. When backward gets there, it runs the region once
more, uses what that saves, and goes on. L blocks in regions of k hold L/k inputs and, for the one region that backward
is in, c * k activations: least at k = sqrt(L / c). The price is a second forward pass: where forward and backward cost
1 + 2 units, it makes them 4. The selective mode also keeps what is expensive to compute (matrix products, attention)
and computes only the cheap rest again: it needs more memory than the full mode and less time.

**How.** ``torch.autograd.graph.saved_tensors_hooks`` calls ``pack(tensor)`` for each tensor that autograd saves, keeps
what that returns, and calls ``unpack`` on it when backward asks for the tensor. Here ``pack`` returns an empty slot.
The first ``unpack`` of a region runs it again with another ``pack``, which puts the n-th tensor into the n-th slot. It
stops at the last slot, as nothing after it is needed. The alternative, an autograd function that runs a backward pass
of its own ("reentrant"), fails with ``torch.autograd.grad``, and where no input needs a gradient; this one doesn't.

**What must be the same both times.** The second run starts from the random state of CPU and GPU that the first one
found (or dropout would drop other elements) and under the same autocast. Beyond that a function must do the same twice:
it may not modify its inputs, depend on what changes in between, or draw from a generator of its own. Where the saved
tensors then differ in number, shape, dtype or device, a RecomputationError tells the first difference; a difference in
their values alone goes unnoticed.

    CheckpointingConfig   the section ``activation_checkpointing``; its presence turns recomputation on
    checkpoint            one call, recomputed; for code that picks its own regions
    configure             what ``checkpoint`` does beside that: DeepSpeed's function and arguments
    apply                 blocks of a model, recomputed without changing its code: what the config section does

Limits: what a custom autograd function stores on ``ctx`` without ``save_for_backward`` is not dropped; a region stays
on one device's backward thread; no ``torch.func`` and no ``torch.compile``, which recomputes by itself; the selective
mode refuses a kept result that was modified in place (``ReLU(inplace=True)`` after a convolution).
"""

import json
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten  # has no public name

logger = logging.getLogger("checkpointing")


class RecomputationError(RuntimeError):
    """A region did something else when it ran again; the message names the first difference."""


# --- The config -------------------------------------------------------------------------------------------------------


@dataclass
class CheckpointingConfig:
    """The section ``activation_checkpointing``. Its presence is the switch: ``{}`` recomputes the default blocks."""
    partition_activations: bool = False           # no effect: there is no model parallelism to divide them over
    cpu_checkpointing: bool = False               # hold the regions' inputs in pinned host memory; GPU only
    contiguous_memory_optimization: bool = False  # no effect: PyTorch's allocator reuses freed blocks as they are
    number_checkpoints: int | None = None         # this many regions: instead of ``every``, ceil(blocks / this)
    synchronize_checkpoint_boundary: bool = False  # wait for the GPU before and after each block; GPU only
    profile: bool = False                         # measure bytes kept and seconds recomputed; waits for the GPU too
    modules: list | None = None  # class names, or patterns of module names; null: the default blocks; []: none
    every: int = 1               # consecutive blocks per region; they must feed one another directly to be joined
    mode: str = "full"           # "full": recompute everything; "selective": keep matrix products and attention

    def __post_init__(self) -> None:
        def refuse(key: str, allowed: str) -> None:
            raise ValueError(f"activation_checkpointing.{key} is {getattr(self, key)!r}; allowed: {allowed}")

        for f in fields(self):
            if f.type is bool and not isinstance(getattr(self, f.name), bool):
                refuse(f.name, "true or false")
        for key in ("every", "number_checkpoints"):
            value = getattr(self, key)
            if (type(value) is not int or value < 1) and not (value is None and key == "number_checkpoints"):
                refuse(key, "a whole number from 1 up")
        if self.mode not in ("full", "selective"):
            refuse("mode", "'full' or 'selective'")
        if self.modules is not None and not (isinstance(self.modules, list)
                                             and all(isinstance(name, str) for name in self.modules)):
            refuse("modules", "a list of class names or patterns of module names, or null")
        if self.number_checkpoints is not None and self.every != 1:
            refuse("number_checkpoints", f"null beside every {self.every}; either of them sets the size of a region")

    def without_effect(self) -> list[str]:
        """The keys that are set and change nothing on this machine, with the reasons."""
        reasons = {"contiguous_memory_optimization": "PyTorch's allocator has no need of it",
                   "partition_activations": "it divides what model-parallel ranks hold alike, and there are none"}
        if not torch.cuda.is_available():
            reasons |= {"cpu_checkpointing": "what is kept is in host memory already",
                        "synchronize_checkpoint_boundary": "there is no GPU to wait for"}
        return [f"{key} has no effect: {reason}" for key, reason in reasons.items() if getattr(self, key)]


# --- What a second run needs beside the arguments ---------------------------------------------------------------------


class _Surroundings:
    """The random state, autocast and default device that a call finds; ``restored()`` brings them back for a while."""

    def __init__(self, leaves: list[Any]):
        self.cpu_state = torch.get_rng_state()
        self.gpu_states: dict[torch.device, Tensor] = {}
        kinds = ["cpu"]
        if torch.cuda.is_initialized():
            kinds.append("cuda")
            devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
            devices.add(torch.device("cuda", torch.cuda.current_device()))
            self.gpu_states = {device: torch.cuda.get_rng_state(device) for device in devices}
        self.autocast = [{"device_type": kind, "dtype": torch.get_autocast_dtype(kind),
                          "enabled": torch.is_autocast_enabled(kind),
                          "cache_enabled": torch.is_autocast_cache_enabled()} for kind in kinds]
        self.default_device = torch.get_default_device()

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=list(self.gpu_states)):
            torch.set_rng_state(self.cpu_state)
            for device, state in self.gpu_states.items():
                torch.cuda.set_rng_state(state, device)
            with ExitStack() as stack:
                for state in self.autocast:
                    stack.enter_context(torch.autocast(**state))
                if self.default_device != torch.get_default_device():
                    stack.enter_context(self.default_device)
                yield


class _Keep(torch.autograd.Function):
    """Saves a region's inputs the way an operation would: so in-place changes are noticed, and hooks around see them.

    Those hooks may be an enclosing region's, which then drops the inputs of the regions in it.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)  # only its node in the graph, which holds the tensors, is of use


def _keep(tensors: list[Tensor], on_host: bool) -> Any:
    """An object whose ``saved_tensors`` are ``tensors``, with the graphs they came from."""
    anchor = torch.empty(0, requires_grad=True)  # without it there is no node where no tensor needs a gradient
    with saved_tensors_hooks(_to_host, _from_host) if on_host else nullcontext():
        return _Keep.apply(anchor, *tensors).grad_fn


def _to_host(tensor: Tensor) -> Any:
    """Start to copy a GPU tensor to pinned memory, beside the computation; parameters stay where they are anyway."""
    if not tensor.is_cuda or isinstance(tensor, nn.Parameter):
        return tensor
    stream = torch.cuda.Stream(tensor.device)  # one of a pool, so this is cheap
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # or its memory could be handed out before it is copied
    return copy, tensor.device, stream.record_event()


def _from_host(packed: Any) -> Tensor:
    """The inverse of ``_to_host``."""
    if isinstance(packed, Tensor):
        return packed
    copy, device, copied = packed
    torch.cuda.current_stream(device).wait_event(copied)
    return copy.to(device, non_blocking=True)  # pinned memory is not reused before its copies are through


# --- A region ---------------------------------------------------------------------------------------------------------


class _Sighting:
    """Knows a tensor again, as long as that has not been modified, without keeping it alive."""

    def __init__(self, tensor: Tensor):
        self.reference, self.version = weakref.ref(tensor), tensor._version

    def is_of(self, tensor: Tensor) -> bool:
        return self.reference() is tensor and self.version == tensor._version


@dataclass(slots=True)
class _Place:
    """Where a second run finds a tensor argument: the region's input, or the previous call's output, number index."""
    is_output: bool
    index: int


class _Slot:
    """What autograd keeps in place of a tensor that it saved in a region's call with this number."""
    __slots__ = ("region", "number", "value", "version", "__weakref__")

    def __init__(self, region: "_Region", number: int):
        self.region, self.number = region, number
        self.value: Tensor | None = None  # there between a recomputation and its use
        self.version = 0                  # of the value when it was saved again


@dataclass(slots=True)
class _Call:
    """One function call of a region."""
    name: str
    function: Callable
    module: nn.Module | None     # the block whose forward ``function`` is
    arguments: list[Any]         # the leaves of (args, kwargs); in place of a tensor, its _Place
    structure: Any               # how the leaves make up (args, kwargs)
    surroundings: _Surroundings
    saved: list[tuple] = field(default_factory=list)      # per tensor autograd saved: weakly its slot, and metadata
    expensive: list[tuple] = field(default_factory=list)  # selective mode: operations, their results, their versions
    filled_in: int = -1          # the backward pass that the slots' values belong to

    def arguments_from(self, inputs: Sequence[Tensor], outputs: list[Tensor]) -> tuple[tuple, dict]:
        """Its (args, kwargs), in a second run with these tensors."""
        leaves = [(outputs if leaf.is_output else inputs)[leaf.index] if isinstance(leaf, _Place) else leaf
                  for leaf in self.arguments]
        return tree_unflatten(leaves, self.structure)


class _Region:
    """A stretch of the forward pass that is recomputed as one: a call, or a chain of blocks that feed one another.

    A block joins the chain when its tensors are outputs of the block before it or inputs of the first one, the very
    same objects. Anything else that is done to them in between ends the chain: the next block starts a new region.

    It holds its inputs and calls, but no tensor computed in it, and is itself held by the slots it gave to autograd:
    what backward has used, or the user has dropped, goes away with its slot. A tensor computed here would, through its
    graph, hold slots that hold the region: a cycle that Python's garbage collector can't see.
    """

    def __init__(self, settings: "Checkpointing", leaves: list[Any]):
        tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
        self.settings = settings
        self.keeper = _keep(tensors, settings.config.cpu_checkpointing)
        self.input_bytes = sum(t.nbytes for t in tensors if not isinstance(t, nn.Parameter))
        self.inputs = [_Sighting(tensor) for tensor in tensors]
        self.others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        self.calls: list[_Call] = []
        self.outputs: list[_Sighting] = []  # of the last call, once that is complete

    def place(self, tensor: Tensor) -> _Place | None:
        """Where the next call's argument ``tensor`` is found in a second run; None when it can't be."""
        for is_output, known in ((True, self.outputs), (False, self.inputs)):
            for index, sighting in enumerate(known):
                if sighting.is_of(tensor):
                    return _Place(is_output, index)
        return None

    def can_grow(self, leaves: list[Any]) -> bool:
        """Whether a call with these arguments continues the chain and makes the region keep nothing more."""
        places = [self.place(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        return None not in places and any(place.is_output for place in places) and all(
            leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) or any(leaf is o for o in self.others)
            for leaf in leaves)

    def run(self, call: _Call, args: tuple, kwargs: dict) -> Any:
        """The forward pass of one call."""
        number = len(self.calls)

        def pack(tensor: Tensor) -> _Slot:
            slot = _Slot(self, number)
            call.saved.append((weakref.ref(slot), _metadata(tensor)))
            return slot

        self.calls.append(call)
        self.outputs = []  # so that nothing joins a call that is not complete
        with saved_tensors_hooks(pack, _unpack), self.mode(_KeepExpensive, call):
            output = call.function(*args, **kwargs)
        self.outputs = [_Sighting(tensor) for tensor in _tensors(output)]
        return output

    def recompute(self, asked: int, backward_pass: int) -> None:
        """Run the calls again, up to the one that backward asks for a tensor, and fill their slots."""
        inputs = self.keeper.saved_tensors  # comes first, as it may have to recompute an enclosing region
        outputs: list[Tensor] = []
        for call in self.calls[:asked + 1]:
            args, kwargs = call.arguments_from(inputs, outputs)
            outputs = _Replay(self, call, call is self.calls[asked]).run(args, kwargs)
            call.filled_in = backward_pass

    def mode(self, selective: Callable[[_Call], TorchDispatchMode], call: _Call) -> AbstractContextManager:
        return selective(call) if self.settings.config.mode == "selective" else nullcontext()


def _unpack(slot: _Slot) -> Tensor:
    """The tensor that ``slot`` stands for, after recomputing it unless that has been done in this backward pass."""
    call = slot.region.calls[slot.number]
    backward_pass = torch._C._current_graph_task_id()  # private: nothing else tells one from the next; -1 outside
    if slot.value is None or call.filled_in != backward_pass or backward_pass == -1:
        slot.region.recompute(slot.number, backward_pass)
    value, slot.value = slot.value, None  # so that its memory is free as soon as backward is done with it
    if value._version != slot.version:
        raise RuntimeError(f"a tensor {_metadata(value)} that is needed for backward was modified in place in the "
                           f"recomputed {call.name}; use the out-of-place operation there")
    return value


def _metadata(tensor: Tensor) -> tuple:
    """What has to be the same in both runs."""
    return tensor.dtype, tuple(tensor.shape), tensor.device


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _EnoughError(Exception):
    """Ends a recomputation. An Exception, so that module hooks registered with ``always_call`` still run."""


class _Replay:
    """One recomputation of one call."""

    def __init__(self, region: _Region, call: _Call, is_asked: bool):
        self.region, self.call = region, call
        self.is_asked = is_asked  # backward is in this very call; otherwise it stands before that in a chain
        self.filled = 0

    def run(self, args: tuple, kwargs: dict) -> list[Tensor]:
        """Fill the call's slots. Returns its outputs, unless it could stop before them."""
        region, call, outputs = self.region, self.call, []

        def compute(*_: Any, **__: Any) -> Any:  # with the arguments of then, which have been through pre-hooks
            with call.surroundings.restored(), torch.enable_grad(), region.mode(_ReuseExpensive, call), \
                    saved_tensors_hooks(self._pack, lambda tensor: tensor):
                output = call.function(*args, **kwargs)
            outputs.extend(_tensors(output))
            return output

        started = region.settings.boundary()
        try:
            # Hazard: a library that shards weights brings them to a block by module hooks. The block that is asked
            # for a tensor has them, since such a library gathers them when backward reaches the block's output. The
            # blocks before it don't have them yet: their hooks, called here without grad mode, must gather and free.
            if self.is_asked:
                compute()
            else:
                before = _put_forward(call.module, compute)
                try:
                    call.module(*args, **kwargs)
                finally:
                    _put_forward(call.module, before)
        except _EnoughError:
            pass
        region.settings.note_recomputed(call.name, started)
        if self.filled < len(call.saved):
            raise RecomputationError(f"{call.name} saved {len(call.saved)} tensors for backward in the forward pass, "
                                     f"but only {self.filled} when recomputed")
        return outputs

    def _pack(self, tensor: Tensor) -> Tensor:
        """Put the tensor into its slot, if that still exists."""
        saved = self.call.saved
        if self.filled == len(saved):
            if self.is_asked:
                raise _EnoughError  # once more: the function swallowed the first one
            raise RecomputationError(f"{self.call.name} saved {len(saved)} tensors for backward in the forward pass, "
                                     "and more when recomputed")
        reference, metadata = saved[self.filled]
        if metadata != _metadata(tensor):
            raise RecomputationError(
                f"{self.call.name}: tensor {self.filled + 1} of {len(saved)} saved for backward was {metadata} in the "
                f"forward pass and is {_metadata(tensor)} when recomputed; the function must do the same both times")
        tensor = tensor.detach()  # the graph of the recomputation is not used, only what its nodes save
        slot = reference()
        if slot is not None:
            slot.value, slot.version = tensor, tensor._version
        self.filled += 1
        # Hazard: leaving a block in the middle skips its forward hooks. That does no harm where backward goes on in
        # that very block. A block before it runs to its end, as its hooks may have to free weights.
        if self.filled == len(saved) and self.is_asked:
            raise _EnoughError
        return tensor


# --- The selective mode -----------------------------------------------------------------------------------------------

EXPENSIVE = {getattr(torch.ops.aten, name).default for name in (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")}


def _is_kept(operation: Any, args: tuple, kwargs: dict) -> bool:
    """Whether to keep the result. Not with dropout: leaving the operation out would shift the random state after it."""
    names = (argument.name for argument in operation._schema.arguments) if operation in EXPENSIVE else ()
    return operation in EXPENSIVE and not (dict(zip(names, args)) | kwargs).get("dropout_p")


def _alias(result: Any) -> Any:
    """The tensors in ``result`` without their place in the graph, but with their version counters."""
    # Private: a dispatch mode runs below the layer that counts versions, and has to switch it on again.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tree_map_only(Tensor, Tensor.detach, result)


class _KeepExpensive(TorchDispatchMode):
    """Sees every operation of a forward pass, below autograd, and keeps the results of the expensive ones."""

    def __init__(self, call: _Call):
        super().__init__()
        self.call = call

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if _is_kept(operation, args, kwargs or {}):
            kept = _alias(result)
            self.call.expensive.append((operation, kept, [tensor._version for tensor in _tensors(kept)]))
        return result


class _ReuseExpensive(TorchDispatchMode):
    """The inverse: hands out the kept results in order, in place of computing them again."""

    def __init__(self, call: _Call):
        super().__init__()
        self.call, self.used = call, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not _is_kept(operation, args, kwargs or {}):
            return operation(*args, **(kwargs or {}))
        known = self.call.expensive
        expected, kept, versions = known[self.used] if self.used < len(known) else (None, None, None)
        if operation is not expected:
            raise RecomputationError(f"{self.call.name}: expensive operation {self.used + 1} was {expected} in the "
                                     f"forward pass and is {operation} when recomputed")
        if versions != [tensor._version for tensor in _tensors(kept)]:
            raise RuntimeError(f"{self.call.name}: the kept result of {operation} was modified in place; use the "
                               "out-of-place operation (such as ReLU without inplace=True), or the mode 'full'")
        self.used += 1
        if kept is None:  # for a second backward call, through a graph that was retained
            return operation(*args, **(kwargs or {}))
        known[self.used - 1] = (operation, None, [])  # so that its memory is free as soon as backward is done with it
        return _alias(kept)


# --- Settings, and what they chose ------------------------------------------------------------------------------------


@dataclass
class Profile:
    """What one module (or checkpointed function) has cost since the profile began; sums over calls."""
    calls: int = 0              # in forward passes, also when an enclosing region runs again
    bytes_kept: int = 0         # inputs kept (without parameters) and, in the selective mode, results kept
    recomputations: int = 0
    seconds_recomputed: float = 0.0


class Checkpointing:
    """Recomputation as a config wants it, of blocks of a model if there are any; from ``apply`` and ``configure``.

    Each block's ``forward`` is replaced on the instance, so its module hooks run outside of what is recomputed: once,
    but for those of all blocks before the last in a chain, which run again with the block (see ``_Replay.run``).
    """

    def __init__(self, config: CheckpointingConfig, blocks: Mapping[str, nn.Module] | None = None):
        self.config = config
        self.blocks = [_Block(self, name, module) for name, module in (blocks or {}).items()]
        self.chain = config.every  # how many blocks a region may have
        if config.number_checkpoints is not None:
            self.chain = -(-len(self.blocks) // config.number_checkpoints)
        self.profiles: dict[str, Profile] = {}
        self._last_region: Callable[[], _Region | None] = lambda: None  # a weak reference

    def remove(self) -> None:
        """Give the blocks their own forward back. Graphs that exist can still be recomputed."""
        while self.blocks:
            self.blocks.pop().restore()

    def report(self) -> dict[str, Profile]:
        """What each module has cost, by name, since the start; needs ``profile``."""
        if not self.config.profile:
            raise RuntimeError("report() needs activation_checkpointing.profile to be true")
        return self.profiles

    def run(self, name: str, function: Callable, args: tuple, kwargs: dict, module: nn.Module | None = None) -> Any:
        """``function(*args, **kwargs)`` as a region of its own or, for a block, as the next one of the last region."""
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)  # nothing is saved, so there is nothing to drop
        leaves, structure = tree_flatten((args, kwargs))
        region = self._last_region() if module is not None else None
        if region is None or len(region.calls) >= self.chain or not region.can_grow(leaves):
            region = _Region(self, leaves)
        arguments = [region.place(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        call = _Call(name, function, module, arguments, structure, _Surroundings(leaves))
        self.boundary()
        output = region.run(call, args, kwargs)
        self.boundary()
        if module is not None:
            self._last_region = weakref.ref(region)
        if self.config.profile:
            profile = self.profiles.setdefault(name, Profile())
            profile.calls += 1
            profile.bytes_kept += sum(tensor.nbytes for tensor in _tensors(call.expensive))
            profile.bytes_kept += region.input_bytes if call is region.calls[0] else 0
        return output

    def boundary(self) -> float:
        """The time, after the GPU has come this far where the config asks for that."""
        if (self.config.synchronize_checkpoint_boundary or self.config.profile) and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def note_recomputed(self, name: str, started: float) -> None:
        """Take note of a recomputation that began at ``started`` and is over."""
        seconds = self.boundary() - started
        if self.config.profile:
            profile = self.profiles.setdefault(name, Profile())
            profile.recomputations += 1
            profile.seconds_recomputed += seconds


class _Block:
    """One module whose ``forward`` is replaced: by a bound method, so that a deep copy of the model gets its own."""

    def __init__(self, settings: Checkpointing, name: str, module: nn.Module):
        self.settings, self.name, self.module = settings, name, module
        self.own_forward = module.forward
        self.before = _put_forward(module, self.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.settings.run(self.name, self.own_forward, args, kwargs, self.module)

    def restore(self) -> None:
        _put_forward(self.module, self.before)


def _put_forward(module: nn.Module, forward: Callable | None) -> Callable | None:
    """Give the instance a ``forward``, or with None its class's; returns the one it had before, if any."""
    before = vars(module).get("forward")
    if forward is None:
        del module.forward
    else:
        module.forward = forward
    return before


# --- The public functions ---------------------------------------------------------------------------------------------


def apply(model: nn.Module, config: CheckpointingConfig, default_blocks: Sequence[nn.Module]) -> Checkpointing:
    """Make ``model`` recompute what ``config`` says, from outside: ``config.modules``, or else ``default_blocks``."""
    if config.modules is None:
        names = {id(module): name for name, module in model.named_modules()}
        blocks = {names[id(block)]: block for block in default_blocks}
    else:
        blocks = _matching(model, config.modules)
    for text in config.without_effect():
        logger.warning("activation_checkpointing.%s", text)
    if not blocks:
        logger.warning("activation_checkpointing has no effect on this model, as %s",
                       "no repeated blocks were found in it; name them in activation_checkpointing.modules"
                       if config.modules is None else "its modules are []; checkpoint() is set up by configure()")
    return Checkpointing(config, blocks)


def _matching(model: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    """The modules that the class names or patterns mean; of modules within one another the outermost."""
    chosen: dict[str, nn.Module] = {}
    inside: set[int] = set()  # ids of the modules of chosen modules
    unmatched = set(patterns)
    for name, module in model.named_modules():  # outer ones come first
        matched = {p for p in patterns if type(module).__name__ == p or fnmatchcase(name, p)}
        if not matched or isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # these have no forward
            continue
        unmatched -= matched
        if id(module) not in inside:
            chosen[name] = module
            inside |= {id(part) for part in module.modules()}
    if unmatched:
        names = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(f"activation_checkpointing.modules has {sorted(unmatched)}, which no module matches; allowed: "
                         f"class names ({', '.join(names)}) and patterns of module names, such as 'layers.*'")
    return chosen


_DEFAULTS = Checkpointing(CheckpointingConfig())
_explicit = _DEFAULTS  # the one configuration that checkpoint() follows; configure() puts another there


def checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, of which only the inputs are kept for backward, and the rest is recomputed."""
    name = getattr(function, "__qualname__", type(function).__name__)
    return _explicit.run(name, function, args, kwargs)


def configure(mpu_: Any, deepspeed_config: Mapping[str, Any] | str | PathLike | None = None,
              partition_activations: bool | None = None, contiguous_checkpointing: bool | None = None,
              num_checkpoints: int | None = None, checkpoint_in_cpu: bool | None = None,
              synchronize: bool | None = None, profile: bool | None = None) -> Checkpointing:
    """Set up ``checkpoint()``, with DeepSpeed's arguments; returns the object whose ``report()`` has the profile.

    ``deepspeed_config``, a whole config or the path of one, may have a section ``activation_checkpointing``; the other
    arguments, where they are given, win over it.
    """
    global _explicit
    if mpu_ is not None:
        raise ValueError(f"mpu_ is {mpu_!r}; allowed: None, as there is no model parallelism here")
    if isinstance(deepspeed_config, (str, PathLike)):
        deepspeed_config = json.loads(Path(deepspeed_config).read_text())
    section = dict((deepspeed_config or {}).get("activation_checkpointing") or {})
    given = {"partition_activations": partition_activations, "contiguous_memory_optimization": contiguous_checkpointing,
             "number_checkpoints": num_checkpoints, "cpu_checkpointing": checkpoint_in_cpu,
             "synchronize_checkpoint_boundary": synchronize, "profile": profile}
    section |= {key: value for key, value in given.items() if value is not None}
    known = [f.name for f in fields(CheckpointingConfig)]
    for key in section:
        if key not in known:
            raise ValueError(f"unknown key activation_checkpointing.{key} (known: {', '.join(known)})")
    config = CheckpointingConfig(**section)
    if num_checkpoints is not None:
        logger.warning("num_checkpoints has no effect: every call of checkpoint() is a region")
    for text in config.without_effect():
        logger.warning("activation_checkpointing.%s", text)
    _explicit = Checkpointing(config)
    return _explicit


def is_configured() -> bool:
    """Whether ``configure`` was called. ``checkpoint`` works without."""
    return _explicit is not _DEFAULTS


def reset() -> None:
    """Start the profile anew. DeepSpeed also clears buffers here, for loops without backward; this has none."""
    _explicit.profiles.clear()
