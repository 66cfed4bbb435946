"""Mixed precision (arXiv 1710.03740): compute in 16 bits, update in 32.

Half the bits take half the memory and traffic, and matrix units run several times faster on them. But a weight in 16
bits has no room for a small update, and fp16 has no room for small gradients. The right dtypes solve both problems:

                        fp32   fp16      bf16      autocast
    parameters          fp32   fp16      bf16      fp32        what forward and backward read
    forward, backward   fp32   fp16      bf16      16 or 32    autocast: PyTorch chooses per operation
    gradients           fp32   fp16      bf16      fp32        as autograd makes them
    accumulation        fp32   fp32      fp32      fp32        data_types.grad_accum_dtype
    reduction           fp32   fp32      fp32      fp32        communication_data_type
    master weights      fp32   fp32      fp32      fp32        what the optimizer updates, and its state
    loss scale          -      dynamic   -         fp16 only

**Master weights** exist once over all ranks where the optimizer is sharded. They are copies of the weights as given,
before rounding: a copy of the rounded weights would have lost precision for good.

**Accumulation.** bf16 has 8 bits of precision, so 1 + 1/512 is 1: a sum of many small gradients stops growing.
Therefore gradients are added up in fp32, and nothing rounds them on their way to the optimizer.

**Loss scale.** The smallest positive number of fp16 is 6e-8; smaller gradients vanish. Backward is linear: multiply the
loss by a large scale before it, and divide the gradients by it afterwards. How large? As large as possible. The scale
doubles after every window of steps without overflow. When a step overflows to infinity, the step is skipped and the
scale halves (DynamicLossScaler).

**The overflow check costs no extra pass.** The step takes the global gradient norm anyway, over all ranks in one
scalar; it is infinite or NaN exactly when a gradient is. And unscaling is one more factor in the one multiplication
that averages and clips. So a step passes over gradients and weights as in fp32: copy into the bucket (which widens),
reduce, norm, update. One pass is added: it rounds the updated shard into the 16-bit weights.

This file knows nothing about sharding: it chooses dtypes, casts inputs, and keeps the scale.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

MAX_SCALE_POWER = 126  # a loss scale of 2 to this power, or one over it, is still an ordinary fp32 number

SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NAMES = {short: dtype for dtype, short in SHORT.items()} | {
    prefix + str(dtype).removeprefix("torch."): dtype for prefix in ("", "torch.") for dtype in SHORT}


# --- The config -------------------------------------------------------------------------------------------------------


def _key(default: Any, **rules: Any) -> Any:
    """A field whose values are restricted: to ``choices``, or to numbers from ``least`` to ``most``."""
    return field(default=default, metadata=rules)


@dataclass
class FP16Config:
    """The ``fp16`` section."""
    enabled: bool = False
    auto_cast: bool = False               # cast floating-point inputs of the model to fp16
    loss_scale: float = _key(0.0, choices=(0,), least=2.0**-MAX_SCALE_POWER, most=2.0**MAX_SCALE_POWER)  # 0: dynamic
    initial_scale_power: int = _key(16, least=0, most=MAX_SCALE_POWER)  # the dynamic scale starts at 2 to this power
    loss_scale_window: int = _key(1000, least=1)  # steps without overflow after which the scale doubles
    hysteresis: int = _key(2, least=1)    # overflows until the scale halves: all but the last are forgiven
    consecutive_hysteresis: bool = False  # every step without overflow restores the hysteresis, not only a full window
    min_loss_scale: float = _key(1.0, above=0)  # an overflow at this scale is an error
    fp16_master_weights_and_grads: bool = False  # masters, optimizer state and accumulation in fp16 too
    keep_fp32: list | None = None         # modules that stay in fp32: class names, or patterns of module names

    def __post_init__(self) -> None:
        if self.enabled and not self.loss_scale and 2.0 ** self.initial_scale_power < self.min_loss_scale:
            raise ValueError(f"fp16.min_loss_scale is {self.min_loss_scale}; allowed: at most the initial scale, 2 to "
                             f"the power of initial_scale_power = {self.initial_scale_power}")


@dataclass
class BF16Config:
    """The ``bf16`` section."""
    enabled: bool = False
    auto_cast: bool = False                # cast floating-point inputs of the model to bf16
    check_grad_overflow: bool = True       # skip a step whose gradients are not finite
    immediate_grad_update: bool = False    # no effect
    bf16_master_weights_and_grads: bool = False  # masters and accumulation in bf16 too
    bf16_optimizer_states: bool = False    # must equal bf16_master_weights_and_grads
    loss_scale: float | None = _key(None, choices=(0,))  # none for bf16, which has the range of fp32
    keep_fp32: list | None = None          # modules that stay in fp32: class names, or patterns of module names

    NO_EFFECT: ClassVar[dict[str, str]] = {
        "immediate_grad_update": "gradients are always taken as autograd finishes them",
        **dict.fromkeys(("initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
                         "min_loss_scale"), "bf16 has the range of fp32 and needs no loss scale")}

    def __post_init__(self) -> None:
        if self.bf16_optimizer_states != self.bf16_master_weights_and_grads:
            raise ValueError(f"bf16.bf16_optimizer_states is {self.bf16_optimizer_states}; allowed: the value of "
                             "bf16_master_weights_and_grads, since PyTorch's optimizers keep their state in the dtype "
                             "of the weights that they update")


@dataclass
class AutocastConfig:
    """The ``torch_autocast`` section: weights stay in fp32, and PyTorch chooses the dtype of each operation."""
    enabled: bool = False
    dtype: torch.dtype = _key(torch.bfloat16, choices={
        name: dtype for name, dtype in NAMES.items() if dtype is not torch.float32})  # fp16: with a loss scale
    lower_precision_safe_modules: list | None = None  # classes whose gradients are reduced in ``dtype``; none: no class


@dataclass
class DataTypesConfig:
    """The ``data_types`` section."""
    grad_accum_dtype: torch.dtype | None = _key(None, choices=NAMES)  # none: the dtype of the masters
    param_dtype: torch.dtype | None = _key(None, choices=NAMES)   # must agree with fp16.enabled and bf16.enabled
    buffer_dtype: torch.dtype | None = _key(None, choices=NAMES)  # of floating-point buffers; none: unchanged


@dataclass
class PrecisionConfig:
    """The parts of the config that set the precision."""
    fp16: FP16Config = field(default_factory=FP16Config)
    bf16: BF16Config = field(default_factory=BF16Config)
    torch_autocast: AutocastConfig = field(default_factory=AutocastConfig)
    data_types: DataTypesConfig = field(default_factory=DataTypesConfig)
    communication_data_type: torch.dtype | None = _key(None, choices=NAMES)  # ranks sum gradients in it

    def __post_init__(self) -> None:
        if self.fp16.enabled and self.bf16.enabled:
            raise ValueError("fp16 and bf16 are both enabled; allowed: one of them")
        if self.data_types.param_dtype not in (None, NAMES[self.mode]):
            raise ValueError(f"data_types.param_dtype is {self.data_types.param_dtype}; allowed: {self.mode}, which "
                             "fp16.enabled and bf16.enabled choose, or null")

    @property
    def mode(self) -> str:
        """The short name of the parameters' dtype."""
        return "fp16" if self.fp16.enabled else "bf16" if self.bf16.enabled else "fp32"


# --- Which dtype where ------------------------------------------------------------------------------------------------


class Dtypes(NamedTuple):
    """The dtypes of one parameter, from forward to update."""
    compute: torch.dtype    # the parameter itself, in forward and backward
    master: torch.dtype     # what the optimizer updates, and its state
    gradient: torch.dtype   # accumulation
    reduction: torch.dtype  # gradients are sent, and summed over ranks, in it


class Precision:
    """A config's precision for one model: ``apply`` adds casts to the model, ``path`` gives a parameter's dtypes.

    ``kept``: the modules that stay in fp32; ``safe``: those whose gradients are reduced in autocast's dtype.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device, kept: Iterable[nn.Module] = (),
                 safe: Iterable[nn.Module] = ()):
        self.config, self.device = config, device
        self.half = NAMES[config.mode] if config.mode != "fp32" else None
        self.modules = list(kept)
        self.kept = {id(p) for module in self.modules for p in module.parameters()}
        self.low = {id(p) for module in safe for p in module.parameters(recurse=False)}

    def apply(self, model: nn.Module) -> None:
        """Cast the model's buffers to ``buffer_dtype``, if given, and inputs and outputs of modules in fp32."""
        stay = {id(b) for module in self.modules for b in module.buffers()}
        for module in model.modules() if self.config.data_types.buffer_dtype else ():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point() and id(buffer) not in stay:
                    module._buffers[name] = buffer.to(self.config.data_types.buffer_dtype)
        inside = {id(child) for module in self.modules for child in module.modules() if child is not module}
        for module in self.modules:
            if id(module) not in inside:  # a module inside a kept one gets fp32 anyway
                module.register_forward_pre_hook(
                    lambda _, args, kwargs: (cast(args, torch.float32), cast(kwargs, torch.float32)), with_kwargs=True)
                module.register_forward_hook(lambda _, args, output: cast(output, self.half))

    def path(self, parameter: nn.Parameter) -> Dtypes:
        """The dtypes of a parameter."""
        given, config = parameter.dtype, self.config
        if not parameter.is_floating_point():
            return Dtypes(given, given, given, given)
        compute = master = config.data_types.param_dtype or given
        if self.half:
            compute = torch.float32 if id(parameter) in self.kept else self.half
            is_16_bit = config.fp16.fp16_master_weights_and_grads or config.bf16.bf16_master_weights_and_grads
            master = compute if is_16_bit else torch.float32
        gradient = config.data_types.grad_accum_dtype or master
        low = config.torch_autocast.dtype if id(parameter) in self.low else None
        return Dtypes(compute, master, gradient, config.communication_data_type or low or gradient)

    def autocast(self, cache: bool = True) -> AbstractContextManager:
        """The context for the model's forward. ``cache``: keep 16-bit copies of weights until its end."""
        if not self.config.torch_autocast.enabled:
            return nullcontext()
        return torch.autocast(self.device.type, self.config.torch_autocast.dtype, cache_enabled=cache)

    def cast_inputs(self, value: Any) -> Any:
        """The model's inputs, unchanged; with ``auto_cast``, floating-point tensors become 16-bit."""
        return cast(value, self.half) if self.half and getattr(self.config, self.config.mode).auto_cast else value

    def advice(self, error: Exception) -> str:
        """How to mend a PyTorch error of forward or backward, if an operation got two dtypes; else ""."""
        is_mixed = re.search(r"type.*(Half|[fF]loat16)|(Half|[fF]loat16).*type|mixed dtype", str(error), re.DOTALL)
        if not (self.half and is_mixed and type(error) in (RuntimeError, ValueError)):
            return ""
        name = self.config.mode
        return (f". The weights are in {name}; inputs, targets and buffers keep the dtypes in which they were "
                f"given. Cast the model's inputs, or set {name}.auto_cast to true; compute the loss in one dtype, "
                f"such as that of output.float(); set data_types.buffer_dtype to {name}; or name the modules that "
                f"need fp32 in {name}.keep_fp32")

    def make_scaler(self) -> "LossScaler":
        """The loss scaler for this precision."""
        fp16 = self.config.fp16
        autocasts_fp16 = self.config.torch_autocast.enabled and self.config.torch_autocast.dtype == torch.float16
        if not (fp16.enabled or autocasts_fp16):
            return LossScaler(1.0)
        return LossScaler(fp16.loss_scale) if fp16.loss_scale else DynamicLossScaler(
            2.0 ** fp16.initial_scale_power, fp16.loss_scale_window, fp16.hysteresis, fp16.consecutive_hysteresis,
            fp16.min_loss_scale)

    @property
    def skips_overflow(self) -> bool:
        """Whether a step is skipped when its gradients are not finite."""
        return self.config.bf16.check_grad_overflow or not self.config.bf16.enabled

    def table(self, model: nn.Module, scaler: "LossScaler") -> str:
        """The dtypes in use, as text: one row for all parameters with the same dtypes."""
        counts: Counter[Dtypes] = Counter()
        for p in model.parameters():
            counts[self.path(p)] += p.numel()
        rows = [f"{'parameters':>14}  {'compute':<9}{'masters, state':<16}{'accumulation':<14}reduction"]
        for path, count in counts.items():
            names = (SHORT.get(dtype, str(dtype).removeprefix("torch.")) for dtype in path)
            rows.append("{:>14,}  {:<9}{:<16}{:<14}{}".format(count, *names))
        autocast = self.config.torch_autocast
        rows.append(f"autocast: {SHORT[autocast.dtype] if autocast.enabled else 'off'}; loss scale: {scaler}; "
                    f"steps with gradients that are not finite are {'skipped' if self.skips_overflow else 'taken'}")
        return "\n".join(rows)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating-point tensor in it as ``dtype``."""
    return mapped(value, lambda part: part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """``change(value)``; where that is ``value`` itself, ``change`` applies inside lists, tuples and mappings."""
    changed = change(value)
    if changed is not value:
        return changed
    if isinstance(value, dict):
        changed = copy.copy(value)  # keeps the class, such as that of a model's output
        if getattr(value, "__dict__", None) is value:  # its items are its attributes
            changed.__dict__ = changed
        for key, item in value.items():  # such a class may refuse update()
            changed[key] = mapped(item, change)
        return changed
    named = isinstance(value, tuple) and hasattr(value, "_make")
    make = value._make if named else type(value) if type(value) in (list, tuple) else None
    return make(mapped(item, change) for item in value) if make else value


# --- The loss scale ---------------------------------------------------------------------------------------------------


class MinimumLossScaleError(RuntimeError):
    """A gradient overflowed although the loss scale can't get smaller: the numbers themselves are too large."""


class LossScaler:
    """A fixed loss scale.

    scale   the loss is multiplied by it, and gradients must be divided by it
    """

    def __init__(self, scale: float):
        self.scale = float(scale)

    def update(self, overflow: bool, culprit: str | None = None) -> None:
        """Record a step's outcome; ``culprit`` names a parameter whose gradient was not finite."""

    def state_dict(self) -> dict[str, Any]:
        """The state that changes, as plain data: none of a fixed scale, which the config gives."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        for key in self.state_dict():
            setattr(self, key, state[key])

    def outcome(self, before: float) -> str:
        """How an overflow changed the scale, which was ``before``: the end of a warning's sentence."""
        return ""

    def __str__(self) -> str:
        return f"{self.scale:g}" if self.scale != 1 else "none"


class DynamicLossScaler(LossScaler):
    """A loss scale as large as the gradients allow; DeepSpeed's rule, to the last bit.

    window        after so many good steps the next one doubles the scale; so does every ``window``-th after that
    hysteresis    overflows until the scale halves: all but the last are forgiven. From then on every overflow halves it
    consecutive   every good step restores the hysteresis; else only a full window does
    minimum       the scale never gets smaller; an overflow there that is not forgiven raises MinimumLossScaleError
    """

    def __init__(self, scale: float, window: int, hysteresis: int, consecutive: bool, minimum: float):
        super().__init__(scale)
        self.window, self.hysteresis, self.consecutive, self.minimum = window, hysteresis, consecutive, minimum
        self.forgiving = hysteresis  # overflows until the scale halves
        self.good_steps = 0          # since the last overflow

    def update(self, overflow: bool, culprit: str | None = None) -> None:
        """Change the scale by the step's outcome."""
        if overflow:
            self.good_steps = 0
            if self.forgiving > 1:
                self.forgiving -= 1
            elif self.scale <= self.minimum:
                raise MinimumLossScaleError(
                    f"the gradient of {culprit or 'a parameter'} is not finite although the loss scale is at its "
                    f"minimum, {self.scale:g}: the numbers are too large for fp16, or the training has diverged. Use "
                    "bf16, which has fp32's range, or a lower learning rate; nothing was changed by this step")
            else:
                self.scale = max(self.scale / 2, self.minimum)
            return
        full = self.good_steps > 0 and self.good_steps % self.window == 0  # the current step is not counted
        self.good_steps += 1
        if full or self.consecutive:
            self.forgiving = self.hysteresis
        if full:
            self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        """The state that changes, as plain data."""
        return {"scale": self.scale, "forgiving": self.forgiving, "good_steps": self.good_steps}

    def outcome(self, before: float) -> str:
        """As above. At the start of fp16 an overflow is no failure, although it looks like one."""
        done = f"loss scale {before:g}, now {self.scale:g}" if self.scale < before else \
            f"forgiven, the loss scale stays {before:g}"
        return f"; {done}: normal at the start, until it has come down far enough"

    def __str__(self) -> str:
        return f"dynamic, now {self.scale:g}"
