"""Activation checkpointing: keep few activations, and compute the rest again when backward needs them.

**What autograd saves.** While the forward pass runs, every operation saves the tensors that its derivative needs: a
matrix product its two factors, a gelu its input. They live until backward has used them: L blocks that save c
activations each keep c * L. Checkpointing (arXiv 1604.06174) runs a part of the forward pass, a *region*, and keeps
only its inputs. When backward reaches the region, it runs it once more and uses the activations of this second run.
L blocks in regions of k keep L/k inputs and, for the region in backward, c * k activations: least at k = sqrt(L / c).
The price is a second forward pass: where forward and backward cost 1 + 2 units, they now cost 4. The selective mode
also keeps results that are expensive to compute (matrix products, attention), and computes only the cheap rest again.
It needs more memory than the full mode, and less time.

**How.** ``torch.autograd.graph.saved_tensors_hooks`` calls ``pack(tensor)`` for each tensor that autograd saves. It
keeps the return value, and calls ``unpack`` on it when backward asks for the tensor. Here ``pack`` returns an empty
slot. The first ``unpack`` of a region runs the region again with another ``pack``, which puts the n-th tensor into the
n-th slot. The run stops at the last slot, as nothing after it is needed. The alternative is an autograd function that
runs its own backward pass ("reentrant"). It fails with ``torch.autograd.grad``, and where no input needs a gradient.

**What must be the same both times.** The second run starts from the random state of the first, on CPU and GPU. Without
it, dropout would drop other elements. It runs under the same autocast. Beyond that a function must do the same
twice. It must not modify its inputs, depend on state that changes in between, or draw from its own generator. Where the
saved tensors differ in number, shape, dtype or device, a RecomputationError names the first difference. A difference
in values alone goes unnoticed.

    CheckpointingConfig   the section ``activation_checkpointing``; its presence turns recomputation on
    checkpoint            makes one call a region; for code that picks its own regions, of one block or several
    configure             sets how ``checkpoint`` works; ``engine.py`` has DeepSpeed's function of this name
    apply                 makes each block of a model a region, as the config section asks; its code stays the same

Limits: tensors that a custom autograd function stores on ``ctx`` without ``save_for_backward`` are not dropped. A
region must stay on one device's backward thread. ``torch.func`` and ``torch.compile`` (which recomputes by itself) are
not supported. The selective mode refuses a kept result that was modified in place (``ReLU(inplace=True)`` after a
convolution).
"""

import logging
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only  # has no public name

logger = logging.getLogger("checkpointing")


class RecomputationError(RuntimeError):
    """A region behaved differently when it ran again; the message names the first difference."""


# --- The config -------------------------------------------------------------------------------------------------------


@dataclass
class CheckpointingConfig:
    """The section ``activation_checkpointing``. Its presence is the switch: ``{}`` recomputes the default blocks."""
    cpu_checkpointing: bool = False                # keep regions' inputs in host memory; waits for the copies; GPU only
    synchronize_checkpoint_boundary: bool = False  # wait for the GPU before and after each block; GPU only
    profile: bool = False        # measure bytes kept and seconds recomputed; waits for the GPU too
    modules: list | None = None  # class names, or patterns of module names; null: the default blocks; []: none
    mode: str = field(default="full", metadata={"choices": ("full", "selective")})  # recompute everything, or keep
                                                                                    # matrix products and attention
    # DeepSpeed's keys without effect here; NO_EFFECT says why.
    partition_activations: bool = False
    contiguous_memory_optimization: bool = False
    number_checkpoints: int | None = field(default=None, metadata={"least": 1})

    NO_EFFECT: ClassVar[dict[str, str]] = {
        "partition_activations": "it divides what model-parallel ranks have in common, and there are none",
        "contiguous_memory_optimization": "PyTorch's allocator does not need it",
        "number_checkpoints": "each block is a region; call checkpoint() around several for larger ones"}


# --- What a second run needs: its context and its inputs --------------------------------------------------------------


class RecomputeContext:
    """The random state, autocast and default device of a call; ``restored()`` brings them back temporarily."""

    def __init__(self, tensors: list[Tensor]):
        self.random = {torch.device("cpu"): torch.get_rng_state()}
        if torch.cuda.is_initialized():
            devices = {tensor.device for tensor in tensors if tensor.is_cuda}
            devices.add(torch.device("cuda", torch.cuda.current_device()))
            self.random |= {device: torch.cuda.get_rng_state(device) for device in devices}
        self.autocast = [{"device_type": kind, "dtype": torch.get_autocast_dtype(kind),
                          "enabled": torch.is_autocast_enabled(kind),
                          "cache_enabled": torch.is_autocast_cache_enabled()}
                         for kind in {device.type for device in self.random}]
        self.default_device = torch.get_default_device()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run with the call's random state, autocast and default device; afterwards restore the current ones."""
        cpu, *gpus = self.random
        with torch.random.fork_rng(devices=gpus), ExitStack() as stack:
            torch.set_rng_state(self.random[cpu])
            for device in gpus:
                torch.cuda.set_rng_state(self.random[device], device)
            for state in self.autocast:
                stack.enter_context(torch.autocast(**state))
            if self.default_device != torch.get_default_device():
                stack.enter_context(self.default_device)
            yield


class _Keep(torch.autograd.Function):
    """Saves a region's inputs as an operation would, so that PyTorch detects in-place changes and calls outer hooks.

    Those hooks may belong to an enclosing region, which then drops the inputs of its inner regions.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)  # only its node in the graph is used: it keeps the tensors


def _keep(tensors: list[Tensor], on_host: bool) -> Any:
    """An object whose ``saved_tensors`` are ``tensors``, with the graphs they came from."""
    anchor = torch.empty(0, requires_grad=True)  # makes a node even where no tensor needs a gradient
    with saved_tensors_hooks(_to_host, _from_host) if on_host else nullcontext():
        return _Keep.apply(anchor, *tensors).grad_fn


# Why not PyTorch's save_on_cpu: it loses strides, which a view in the region may need, and copies parameters each time.


def _to_host(tensor: Tensor) -> tuple[Tensor, torch.device]:
    """A copy in pinned memory, and the device it goes back to. A parameter is not copied, as it exists anyway."""
    if not tensor.is_cuda or isinstance(tensor, nn.Parameter):
        return tensor, tensor.device
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor), tensor.device


def _from_host(packed: tuple[Tensor, torch.device]) -> Tensor:
    """The inverse of ``_to_host``."""
    tensor, device = packed
    return tensor.to(device, non_blocking=True)


# --- A region ---------------------------------------------------------------------------------------------------------


_TENSOR = object()  # stands for a tensor among a call's arguments


class _Slot:
    """Autograd keeps it in place of a tensor that it saved in a region."""
    __slots__ = ("region", "value", "version", "__weakref__")

    def __init__(self, region: "_Region"):
        self.region = region
        self.value: Tensor | None = None  # set between a recomputation and its use
        self.version = 0                  # the value's version when it was saved again


class _Region:
    """One call in the forward pass, which runs again when backward needs the tensors that it saved.

    The slots that it gave to autograd keep it alive. So it goes away once backward has used them, or the user has
    dropped the graph. It keeps the call's arguments, but no tensor that was computed inside. The graph of such a tensor
    would keep slots that keep the region: a cycle that Python's garbage collector can't see.
    """

    def __init__(self, settings: "Checkpointing", name: str, function: Callable, args: tuple, kwargs: dict):
        tensors = _tensors((args, kwargs))
        self.settings, self.name, self.function = settings, name, function
        self.call = tree_map_only(Tensor, lambda _: _TENSOR, (args, kwargs))
        self.keeper = _keep(tensors, settings.config.cpu_checkpointing)
        self.context = RecomputeContext(tensors)
        self.saved: list[tuple] = []  # per tensor that autograd saved: a weak reference to its slot, and its metadata
        self.filled_in = -1           # the backward pass to which the slots' values belong
        # The selective mode: expensive operations in order, their results and the versions of these.
        self.kept: deque[tuple] | None = deque() if settings.config.mode == "selective" else None
        self.costs = settings.profiles[name]
        self.costs.calls += 1
        self.costs.bytes_kept += sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, nn.Parameter))

    def run(self, args: tuple, kwargs: dict) -> Any:
        """Make the call; autograd keeps slots instead of tensors."""
        def pack(tensor: Tensor) -> _Slot:
            """A slot in the tensor's place."""
            slot = _Slot(self)
            self.saved.append((weakref.ref(slot), _metadata(tensor)))
            return slot

        with saved_tensors_hooks(pack, _unpack), nullcontext() if self.kept is None else _KeepResults(self.kept):
            output = self.function(*args, **kwargs)
        self.costs.bytes_kept += sum(tensor.nbytes for _, result, _ in self.kept or () for tensor in _tensors(result))
        return output

    def recompute(self, backward_pass: int) -> None:
        """Run the call again, up to the last tensor that it saves, and fill the slots that still exist."""
        inputs = iter(self.keeper.saved_tensors)  # comes first, as it may have to recompute an enclosing region
        args, kwargs = tree_map(lambda leaf: next(inputs) if leaf is _TENSOR else leaf, self.call)
        # Hazard: kept results are used once, so that backward frees their memory early. A second backward call, through
        # a retained graph, has to compute them.
        kept, self.kept = self.kept, None
        reuse = nullcontext() if kept is None else _ReuseResults(self.name, kept)
        filled = 0

        def pack(tensor: Tensor) -> Tensor:
            """Fill the next slot; end the run with the last one."""
            nonlocal filled
            if filled < len(self.saved):
                tensor = self._fill(filled, tensor)
                filled += 1
            if filled == len(self.saved):
                raise _EnoughError  # again for each further tensor, if the function catches it
            return tensor

        started = self.settings.boundary()
        try:
            with self.context.restored(), torch.enable_grad(), reuse, saved_tensors_hooks(pack, lambda t: t):
                self.function(*args, **kwargs)
        except _EnoughError:
            pass
        self.filled_in = backward_pass
        self.costs.recomputations += 1
        self.costs.seconds_recomputed += self.settings.boundary() - started
        if filled < len(self.saved):
            raise RecomputationError(f"{self.name} saved {len(self.saved)} tensors for backward in the forward pass, "
                                     f"but only {filled} when recomputed")

    def _fill(self, number: int, tensor: Tensor) -> Tensor:
        """Put the tensor into its slot, if the slot still exists."""
        reference, metadata = self.saved[number]
        if metadata != _metadata(tensor):
            raise RecomputationError(
                f"{self.name}: tensor {number + 1} of {len(self.saved)} saved for backward was {metadata} in the "
                f"forward pass and is {_metadata(tensor)} when recomputed; the function must do the same both times")
        tensor = tensor.detach()  # the graph of the recomputation is not used, only what its nodes save
        slot = reference()
        if slot is not None:
            slot.value, slot.version = tensor, tensor._version
        return tensor


def _unpack(slot: _Slot) -> Tensor:
    """The tensor that ``slot`` stands for; recomputes the region unless this backward pass already has."""
    region = slot.region
    backward_pass = torch._C._current_graph_task_id()  # private: nothing public identifies a backward; -1 outside
    if slot.value is None or region.filled_in != backward_pass or backward_pass == -1:
        region.recompute(backward_pass)
    value, slot.value = slot.value, None  # so that its memory is free as soon as backward is done with it
    if value._version != slot.version:
        raise RuntimeError(f"a tensor {_metadata(value)} that is needed for backward was modified in place in the "
                           f"recomputed {region.name}; use the out-of-place operation there")
    return value


def _metadata(tensor: Tensor) -> tuple:
    """The properties that must be the same in both runs."""
    return tensor.dtype, tuple(tensor.shape), tensor.device


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _EnoughError(Exception):
    """Ends a recomputation. An Exception, so that module hooks registered with ``always_call`` still run."""


# --- The selective mode -----------------------------------------------------------------------------------------------

EXPENSIVE = {getattr(torch.ops.aten, name).default for name in (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")}


def _is_kept(operation: Any, args: tuple, kwargs: dict) -> bool:
    """Whether to keep the result. Not with dropout: skipping that operation would shift the random state after it."""
    if operation not in EXPENSIVE:
        return False
    names = (argument.name for argument in operation._schema.arguments)
    return not (dict(zip(names, args)) | kwargs).get("dropout_p")


def _alias(result: Any) -> Any:
    """The tensors in ``result``, detached from the graph, with the same version counters."""
    # Private: a dispatch mode runs below the layer that counts versions, and must switch that layer on again.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tree_map_only(Tensor, Tensor.detach, result)


# PyTorch's create_selective_checkpoint_contexts compares every operation of both runs, and fails where cheap ones
# differ. Autocast makes such a difference with a weight of two layers: cached in the first run, cast in the second.


class _KeepResults(TorchDispatchMode):
    """Sees every operation of a forward pass, below autograd, and keeps the results of expensive ones."""

    def __init__(self, kept: deque[tuple]):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if _is_kept(operation, args, kwargs or {}):
            alias = _alias(result)
            self.kept.append((operation, alias, [tensor._version for tensor in _tensors(alias)]))
        return result


class _ReuseResults(TorchDispatchMode):
    """The inverse: returns the kept results in order instead of computing them again."""

    def __init__(self, name: str, kept: deque[tuple]):
        super().__init__()
        self.name, self.kept = name, kept

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not _is_kept(operation, args, kwargs or {}):
            return operation(*args, **(kwargs or {}))
        expected, result, versions = self.kept.popleft() if self.kept else (None, None, [])
        if operation is not expected:
            raise RecomputationError(f"{self.name}: an expensive operation was {expected} in the forward pass and is "
                                     f"{operation} when recomputed")
        if versions != [tensor._version for tensor in _tensors(result)]:
            raise RuntimeError(f"{self.name}: the kept result of {operation} was modified in place; use the "
                               "out-of-place operation (such as ReLU without inplace=True), or the mode 'full'")
        return _alias(result)


# --- Settings, and the blocks they apply to ---------------------------------------------------------------------------


@dataclass
class Profile:
    """The cost of one module (or checkpointed function) since the profile began; sums over calls."""
    calls: int = 0              # in forward passes, also when an enclosing region runs again
    bytes_kept: int = 0         # of kept inputs (without parameters) and, in the selective mode, of kept results
    recomputations: int = 0
    seconds_recomputed: float = 0.0


class Checkpointing:
    """Recomputation as a config asks, of a model's blocks if any are given; made by ``apply`` and ``configure``.

    Each block's ``forward`` is replaced on the instance, so its module hooks stay outside of the region and run once.
    A library that shards weights gathers them in such hooks: for backward, when that reaches the block's output.
    The replacement is a partial object, so that a deep copy of the model gets a copy of its own.
    """

    def __init__(self, config: CheckpointingConfig, blocks: Mapping[str, nn.Module] | None = None):
        self.config = config
        for key, reason in {"cpu_checkpointing": "the kept tensors are in host memory already",
                            "synchronize_checkpoint_boundary": "there is no GPU to wait for"}.items():
            if getattr(config, key) and not torch.cuda.is_available():
                logger.warning("activation_checkpointing.%s has no effect: %s", key, reason)
        self.profiles: dict[str, Profile] = defaultdict(Profile)
        self.blocks: dict[str, tuple[nn.Module, Any]] = {}  # each with its instance's own forward, or None
        for name, module in (blocks or {}).items():
            self.blocks[name] = module, vars(module).get("forward")
            module.forward = partial(self.run, name, module.forward)

    def remove(self) -> None:
        """Give the blocks their own forward back. Existing graphs can still be recomputed."""
        for module, own in self.blocks.values():
            del module.forward
            if own is not None:
                module.forward = own
        self.blocks.clear()

    def report(self) -> dict[str, Profile]:
        """The cost of each module since the start, by name; needs ``profile``."""
        if not self.config.profile:
            raise RuntimeError("report() needs activation_checkpointing.profile to be true")
        return dict(self.profiles)

    def run(self, name: str, function: Callable, /, *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` as a region."""
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)  # nothing is saved, so there is nothing to drop
        region = _Region(self, name, function, args, kwargs)
        self.boundary()
        output = region.run(args, kwargs)
        self.boundary()
        return output

    def boundary(self) -> float:
        """Wait for the GPU, if the config asks for it; return the time."""
        if (self.config.synchronize_checkpoint_boundary or self.config.profile) and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


# --- The public functions ---------------------------------------------------------------------------------------------


def apply(modules: Mapping[str, nn.Module], config: CheckpointingConfig) -> Checkpointing:
    """Make these modules of a model recompute as ``config`` says; of nested modules, only the outermost."""
    modules = {name: module for name, module in modules.items()
               if not isinstance(module, (nn.ModuleList, nn.ModuleDict))}  # these have no forward
    inside = {id(part) for module in modules.values() for part in module.modules() if part is not module}
    blocks = {name: module for name, module in modules.items() if id(module) not in inside}
    if not blocks:
        logger.warning("activation_checkpointing has no effect on this model, as %s",
                       "no repeated blocks were found in it; name them in activation_checkpointing.modules"
                       if config.modules is None else "its modules are []; configure() sets up checkpoint()")
    return Checkpointing(config, blocks)


_DEFAULTS = Checkpointing(CheckpointingConfig())
_explicit = _DEFAULTS  # the one configuration that checkpoint() follows; configure() replaces it


def checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``; only its inputs are kept, and backward recomputes the rest."""
    name = getattr(function, "__qualname__", type(function).__name__)
    return _explicit.run(name, function, *args, **kwargs)


def configure(config: CheckpointingConfig) -> Checkpointing:
    """Set up ``checkpoint()``; returns the object whose ``report()`` has the profile."""
    global _explicit
    _explicit = Checkpointing(config)
    return _explicit


def is_configured() -> bool:
    """Whether ``configure`` was called. ``checkpoint`` also works without it."""
    return _explicit is not _DEFAULTS


def reset() -> None:
    """Start the profile again. DeepSpeed also clears buffers here, for loops without backward; this file has none."""
    _explicit.profiles.clear()
