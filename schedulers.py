"""Learning-rate (and momentum) schedules, with DeepSpeed's names, parameters and numbers.

A schedule here is a pure function of one integer ``t``, the number of its steps so far. Nothing accumulates. So ``t``
is the whole state to save, resuming is exact, and a schedule can be drawn without training.

When does a rate apply? The constructor sets ``rate(0)``, and the n-th ``step()`` sets ``rate(n)``. Training calls
``optimizer.step()`` and then ``scheduler.step()``, so optimizer step n, counted from 0, runs at ``rate(n)``. DeepSpeed
counts the same events from -1: iteration -1 after construction, 0 after the first step. Its warm-ups start at iteration
0. This explains the ``t - 1`` below, and why the first two optimizer steps run at the same rate.

    CURVES      how a rate goes from one value to another: linear, cosine, log, exponential
    Schedule    the base class: a PyTorch ``LRScheduler`` whose subclasses define ``rate(t, group)``
    From DeepSpeed: WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest
    New here: MultiPhaseLR, which joins phases, and single phases: LinearDecayLR, CosineDecayLR, StepDecayLR
    build       makes a schedule by its name; accepts most classes of ``torch.optim.lr_scheduler`` too
    preview     lists the rates of a schedule without training

Rates are values of the optimizer's ``lr``. A list in place of a rate gives one value per param group. An invalid value
raises a ``ValueError`` that names the parameter, the given value and the allowed ones.

    python schedulers.py                   draw one of each, as schedules.png
    python schedulers.py ds_config.json    draw the whole schedule of a config file, as ds_config_lr.png
"""

import argparse
import copy
import difflib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Rates = float | Sequence[float]  # one value for all param groups, or one for each


# --- Curves: the value after k of the n steps that lead from start to end; 0 <= k <= n, 1 <= n ------------------------


CURVES: dict[str, Callable[[float, float, int, int], float]] = {
    "linear": lambda start, end, k, n: start + (end - start) * (k / n),
    # Half a cosine wave, flat at both ends (SGDR, arXiv 1608.03983, equation 5, without restarts).
    "cosine": lambda start, end, k, n: start + (end - start) * (1 - math.cos(math.pi * k / n)) / 2,
    # Fast at first, then ever slower.
    "log": lambda start, end, k, n: start + (end - start) * (math.log(1 + k) / math.log(1 + n)),
    # The same factor at every step, so both ends must be above 0.
    "exponential": lambda start, end, k, n: start ** (1 - k / n) * end ** (k / n)}


# --- Checks of the user's values --------------------------------------------------------------------------------------


FINITE = sys.float_info.max
BELOW_ONE = math.nextafter(1.0, 0.0)


def _number(name: str, value: Any, low: float = 0.0, high: float = FINITE, whole: bool = False) -> Any:
    """``value``, checked to be a number from ``low`` to ``high``; with ``whole`` as an int (1e3 is whole)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high \
            or (whole and value != int(value)):
        upper = "finite" if high == FINITE else f"at most {high:g}"
        raise ValueError(f"{name} is {value!r}; allowed: a {'whole ' * whole}number, at least {low:g}, {upper}")
    return int(value) if whole else value


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """``value``, checked to be one of ``allowed``; the error suggests the nearest."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), map(str, allowed), n=1)
        raise ValueError(f"{name} is {value!r}{f'; did you mean {near[0]!r}?' if near else ''} "
                         f"(allowed: {', '.join(map(str, allowed))})")
    return value


def _rates(optimizer: Optimizer, name: str, value: Rates, high: float = FINITE) -> list[float]:
    """One number per param group of ``optimizer``."""
    groups = len(optimizer.param_groups)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * groups
    if len(values) != groups:
        raise ValueError(f"{name} has {len(values)} values, but the optimizer has {groups} param group(s)")
    return [_number(name, each, high=high) for each in values]


def _range(optimizer: Optimizer, low_name: str, low: Rates, high_name: str, high: Rates,
           limit: float = FINITE) -> tuple[list[float], list[float]]:
    """A lower and an upper value per param group. Warns where one rate replaces the groups' different ones."""
    lows, highs = _rates(optimizer, low_name, low, limit), _rates(optimizer, high_name, high, limit)
    if any(a > b for a, b in zip(lows, highs)):
        raise ValueError(f"{high_name} is {high}; allowed: at least {low_name}, which is {low}")
    if high_name.endswith("_lr") and not isinstance(high, (list, tuple)) and \
            len({float(group["lr"]) for group in optimizer.param_groups}) > 1:
        warnings.warn(f"{high_name} is {high} for every param group, although the optimizer gives them different "
                      f"rates; a list gives each group its own", stacklevel=4)
    return lows, highs


# --- The base class ---------------------------------------------------------------------------------------------------


class Schedule(LRScheduler):
    """A schedule in closed form: a subclass checks its parameters, calls this constructor, and defines ``rate``.

    ``last_batch_iteration`` is DeepSpeed's position, one less than PyTorch's ``last_epoch``: -1 at the start.
    """
    span: float = 1000  # the steps that a picture shows: enough to see the whole schedule

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int = -1):
        start = _number("last_batch_iteration", last_batch_iteration, low=-1, whole=True)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # LRScheduler requires it when it starts in the middle
        super().__init__(optimizer, start)

    def rate(self, t: int, group: int) -> float:
        """The learning rate of param group number ``group`` after ``t`` steps of the schedule."""
        raise NotImplementedError

    def get_lr(self) -> list[float]:
        """The rates at the current position, one per param group."""
        return [self.rate(self.last_epoch, group) for group in range(len(self.base_lrs))]

    @property
    def last_batch_iteration(self) -> int:
        """The position as DeepSpeed counts it."""
        return self.last_epoch - 1

    @last_batch_iteration.setter
    def last_batch_iteration(self, position: int) -> None:
        self.last_epoch = 1 + _number("last_batch_iteration", position, low=-1, whole=True)

    def step(self, last_batch_iteration: int | None = None, batch_iteration: int | None = None) -> None:
        """Go on by one step, or to a position as DeepSpeed counts it (under either of its names), and set the rates."""
        position = last_batch_iteration if batch_iteration is None else batch_iteration
        if position is not None:
            self.last_batch_iteration = position
            self.last_epoch -= 1  # PyTorch's step() adds one
        super().step()

    def state_dict(self) -> dict[str, Any]:
        """The position and the optimizer's initial rates; everything else comes from the constructor.

        ``rates`` are those in force, where another schedule around this one, or the caller, has set others since.
        """
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        own = all(math.isclose(rate, float(mine), rel_tol=1e-6) for rate, mine in zip(rates, self.get_lr()))
        return {"last_batch_iteration": self.last_batch_iteration, "base_lrs": list(self.base_lrs),
                "rates": None if own else rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position and set the rates at once; states of DeepSpeed have only the position."""
        if "last_batch_iteration" not in state_dict:
            raise ValueError(f"the saved schedule has {', '.join(map(str, state_dict)) or 'no keys'}; needed: "
                             f"last_batch_iteration, as in the states of this class and of DeepSpeed's")
        base_lrs = list(state_dict.get("base_lrs", self.base_lrs))
        if len(base_lrs) != len(self.base_lrs):
            raise ValueError(f"the saved schedule has {len(base_lrs)} param group(s), this one {len(self.base_lrs)}")
        self.last_batch_iteration = state_dict["last_batch_iteration"]
        self.base_lrs, self._step_count = base_lrs, 0  # 0: or PyTorch would warn that no optimizer step came before
        self.step(self.last_batch_iteration)
        for group, rate in zip(self.optimizer.param_groups, state_dict.get("rates") or ()):
            group["lr"] = rate


# --- DeepSpeed's five -------------------------------------------------------------------------------------------------


class WarmupLR(Schedule):
    """From ``warmup_min_lr`` to ``warmup_max_lr`` (default: the optimizer's own rates) in ``warmup_num_steps`` steps.

    ``warmup_type`` is "log" or "linear". Afterwards the rate stays constant.
    """

    def __init__(self, optimizer: Optimizer, warmup_min_lr: Rates = 0.0, warmup_max_lr: Rates | None = None,
                 warmup_num_steps: int = 1000, warmup_type: str = "log", last_batch_iteration: int = -1):
        if warmup_max_lr is None:
            # With a resumed schedule lr is a rate from its middle; initial_lr is the optimizer's own.
            warmup_max_lr = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self.min_lrs, self.max_lrs = _range(optimizer, "warmup_min_lr", warmup_min_lr, "warmup_max_lr", warmup_max_lr)
        # As DeepSpeed: 0 is refused, and 1 becomes 2, the least for which the log curve is defined.
        self.warmup_steps = max(2, _number("warmup_num_steps", warmup_num_steps, low=1, whole=True))
        self.warmup_type = _one_of("warmup_type", warmup_type, ("log", "linear"))
        self.span = self.warmup_steps
        super().__init__(optimizer, last_batch_iteration)

    def height(self, t: int) -> float:
        """The schedule's position after ``t`` steps, between the lowest rate (0) and the highest (1)."""
        n = self.warmup_steps - (self.warmup_type == "log")  # DeepSpeed's log curve arrives one step earlier
        return CURVES[self.warmup_type](0.0, 1.0, min(max(t - 1, 0), n), n)

    def rate(self, t: int, group: int) -> float:
        low, high = self.min_lrs[group], self.max_lrs[group]
        return low + (high - low) * self.height(t)


class WarmupDecayLR(WarmupLR):
    """WarmupLR, then a straight line down to ``warmup_min_lr`` at step ``total_num_steps``; constant afterwards."""

    def __init__(self, optimizer: Optimizer, total_num_steps: float, warmup_min_lr: Rates = 0.0,
                 warmup_max_lr: Rates | None = 0.001, warmup_num_steps: int = 1000, warmup_type: str = "log",
                 last_batch_iteration: int = -1):
        # DeepSpeed only warns where a schedule ends before its warm-up. As there, total_num_steps may be a fraction.
        least = _number("warmup_num_steps", warmup_num_steps, low=1, whole=True)
        self.total_num_steps = _number("total_num_steps", total_num_steps, low=least)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        self.span = self.total_num_steps

    def height(self, t: int) -> float:
        if t - 1 < self.warmup_steps:
            return super().height(t)
        return max(0.0, (self.total_num_steps - (t - 1)) / max(1, self.total_num_steps - self.warmup_steps))


class WarmupCosineLR(WarmupDecayLR):
    """Warm-up, then half a cosine wave down, in multiples of each param group's own rate.

    From ``warmup_min_ratio`` to 1 in ``warmup_num_steps`` steps, then to ``cos_min_ratio`` at step ``total_num_steps``;
    constant afterwards. As in DeepSpeed, the first optimizer step runs at rate 0, whatever ``warmup_min_ratio`` says.
    """

    def __init__(self, optimizer: Optimizer, total_num_steps: float, warmup_min_ratio: float = 0.0,
                 warmup_num_steps: int = 1000, cos_min_ratio: float = 0.0001, warmup_type: str = "log",
                 last_batch_iteration: int = -1):
        self.warmup_min_ratio = _number("warmup_min_ratio", warmup_min_ratio, high=1.0)
        self.cos_min_ratio = _number("cos_min_ratio", cos_min_ratio, high=1.0)
        super().__init__(optimizer, total_num_steps, 0.0, None, warmup_num_steps, warmup_type, last_batch_iteration)

    def height(self, t: int) -> float:
        start, end = self.warmup_steps, self.total_num_steps
        if t - 1 < start:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * super().height(t) if t else 0.0
        return CURVES["cosine"](1.0, self.cos_min_ratio, t - start, end - start) if t < end else self.cos_min_ratio

    def rate(self, t: int, group: int) -> float:
        return self.base_lrs[group] * self.height(t)


class OneCycle(Schedule):
    """Up and down once, then a slow decay; momentum moves the other way (1cycle, arXiv 1803.09820, section 4).

    The rate rises from ``cycle_min_lr`` to ``cycle_max_lr`` in ``cycle_first_step_size`` steps. It falls back in
    ``cycle_second_step_size`` steps (default: as many). Both may go in stairs, ``cycle_..._stair_count`` of them (0:
    smoothly). k steps after the cycle it is ``cycle_min_lr / (1 + decay_lr_rate * k / decay_step_size)``; a
    ``decay_step_size`` of 0 means no decay. Momentum (``betas[0]``, or ``momentum`` where the optimizer uses one) goes
    from ``cycle_max_mom`` to ``cycle_min_mom`` and back. After the cycle it is multiplied by
    ``1 + decay_mom_rate * k / decay_step_size``. As in DeepSpeed, the first optimizer step runs at ``cycle_min_mom``.
    """

    def __init__(self, optimizer: Optimizer, cycle_min_lr: Rates, cycle_max_lr: Rates, decay_lr_rate: float = 0.0,
                 cycle_first_step_size: int = 2000, cycle_second_step_size: int | None = None,
                 cycle_first_stair_count: int = 0, cycle_second_stair_count: int | None = None,
                 decay_step_size: int = 0, cycle_momentum: bool = True, cycle_min_mom: Rates = 0.8,
                 cycle_max_mom: Rates = 0.9, decay_mom_rate: float = 0.0, last_batch_iteration: int = -1):
        self.min_lrs, self.max_lrs = _range(optimizer, "cycle_min_lr", cycle_min_lr, "cycle_max_lr", cycle_max_lr)
        self.min_moms, self.max_moms = _range(optimizer, "cycle_min_mom", cycle_min_mom, "cycle_max_mom", cycle_max_mom,
                                              BELOW_ONE)
        self.first_size = self.second_size = _number("cycle_first_step_size", cycle_first_step_size, low=1, whole=True)
        if cycle_second_step_size is not None:
            self.second_size = _number("cycle_second_step_size", cycle_second_step_size, low=1, whole=True)
        self.first_stairs = self.second_stairs = _number("cycle_first_stair_count", cycle_first_stair_count, whole=True)
        if cycle_second_stair_count is not None:
            self.second_stairs = _number("cycle_second_stair_count", cycle_second_stair_count, whole=True)
        self.decay_step_size = _number("decay_step_size", decay_step_size, whole=True)
        self.decay_lr_rate = _number("decay_lr_rate", decay_lr_rate)
        self.decay_mom_rate = _number("decay_mom_rate", decay_mom_rate)
        if not self.decay_step_size and (self.decay_lr_rate or self.decay_mom_rate):
            warnings.warn("OneCycle: decay_lr_rate and decay_mom_rate have no effect while decay_step_size is 0")
        self.span = self.first_size + self.second_size + 4 * self.decay_step_size
        cycle_momentum = _one_of("cycle_momentum", cycle_momentum, (True, False))
        self.moved = [index for index, group in enumerate(optimizer.param_groups)  # the groups whose momentum moves
                      if cycle_momentum and ("betas" in group or group.get("momentum"))]
        if cycle_momentum and not self.moved:
            warnings.warn(f"OneCycle: this {type(optimizer).__name__} has no momentum, so only the rate is cycled")
        super().__init__(optimizer, last_batch_iteration)

    def height(self, t: int) -> float:
        """0 at both ends of the cycle and after it, 1 at its top. Integers as far as possible keep every stair flat."""
        rising = t <= self.first_size
        k, n = (t, self.first_size) if rising else (max(0, self.first_size + self.second_size - t), self.second_size)
        stairs = self.first_stairs if rising else self.second_stairs
        return (k * stairs // n) / stairs if stairs else k / n

    def decays(self, t: int) -> float:
        """How many decay intervals have passed since the cycle's end."""
        return max(0, t - self.first_size - self.second_size) / self.decay_step_size if self.decay_step_size else 0.0

    def rate(self, t: int, group: int) -> float:
        low, high = self.min_lrs[group], self.max_lrs[group]
        return (low + (high - low) * self.height(t)) / (1 + self.decay_lr_rate * self.decays(t))

    def momentum(self, t: int, group: int) -> float:
        """High where the rate is low. Raises once ``decay_mom_rate`` has brought it to 1, where nothing converges."""
        low, high = self.min_moms[group], self.max_moms[group]
        value = (high - (high - low) * self.height(t)) * (1 + self.decay_mom_rate * self.decays(t)) if t else low
        return _number(f"OneCycle: momentum, raised by decay_mom_rate {self.decay_mom_rate},", value, high=BELOW_ONE)

    def step(self, last_batch_iteration: int | None = None, batch_iteration: int | None = None) -> None:
        """As Schedule's; sets the momenta too."""
        super().step(last_batch_iteration, batch_iteration)
        for index in self.moved:
            group, momentum = self.optimizer.param_groups[index], self.momentum(self.last_epoch, index)
            group |= {"betas": (momentum, *group["betas"][1:])} if "betas" in group else {"momentum": momentum}

    def get_mom(self) -> list[Any] | None:
        """Each param group's current momentum, or Adam's ``betas``; None where momentum is not cycled."""
        return [group.get("betas", group.get("momentum")) for group in self.optimizer.param_groups] \
            if self.moved else None


class LRRangeTest(Schedule):
    """A rate that keeps growing, to find the largest one that still trains (arXiv 1506.01186, section 3.3).

    It is ``lr_range_test_min_lr * (1 + lr_range_test_step_rate * t / lr_range_test_step_size)``. With
    ``lr_range_test_staircase`` it changes only every ``lr_range_test_step_size`` steps.
    """

    def __init__(self, optimizer: Optimizer, lr_range_test_min_lr: Rates = 0.001, lr_range_test_step_size: int = 2000,
                 lr_range_test_step_rate: float = 1.0, lr_range_test_staircase: bool = False,
                 last_batch_iteration: int = -1):
        self.min_lrs = _rates(optimizer, "lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = _number("lr_range_test_step_size", lr_range_test_step_size, low=1, whole=True)
        self.step_rate = _number("lr_range_test_step_rate", lr_range_test_step_rate)
        self.span = 4 * self.step_size
        self.staircase = _one_of("lr_range_test_staircase", lr_range_test_staircase, (True, False))
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, t: int, group: int) -> float:
        intervals = t // self.step_size if self.staircase else t / self.step_size
        return self.min_lrs[group] * (1 + self.step_rate * intervals)


# --- Phases: in sequence, or one alone --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """One phase of a MultiPhaseLR. Rates are one per param group."""
    type: str                              # "constant", a name in CURVES, or "step"
    steps: int | None = None               # its length; a last phase of type constant or step may have no end
    start_lr: list[float] | None = None    # default: the rate at which the phase before ended; first, the optimizer's
    end_lr: list[float] | None = None      # the rate at the end of a curve
    step_size: int | None = None           # step: every so many steps ...
    decay_rate: float | None = None        # step: ... the rate is multiplied by this

    NEEDS = {"constant": ("steps",), "step": ("steps", "step_size", "decay_rate"),
             **dict.fromkeys(CURVES, ("steps", "end_lr"))}

    @classmethod
    def checked(cls, optimizer: Optimizer, name: str, raw: Any, is_last: bool) -> "Phase":
        """Make the phase of the config section ``raw``, which errors call ``name``."""
        if not isinstance(raw, dict):
            raise ValueError(f'{name} is {raw!r}; allowed: a section such as '
                             '{"type": "linear", "steps": 100, "end_lr": 0.001}')
        kind = _one_of(f"{name}.type", raw.get("type"), tuple(cls.NEEDS))
        values, may_miss = {}, ("start_lr", "steps") if is_last and kind not in CURVES else ("start_lr",)
        for key in raw:
            _one_of(f"{name}: a key of a {kind} phase", key, ("type", *cls.NEEDS[kind], "start_lr"))
        for key in (*cls.NEEDS[kind], "start_lr"):
            value, where, counts = raw.get(key), f"{name}.{key}", key in ("steps", "step_size")
            if value is None and key not in may_miss:
                raise ValueError(f"{where} is missing; a {kind} phase needs {', '.join(cls.NEEDS[kind])}")
            if value is not None:
                values[key] = _rates(optimizer, where, value) if key.endswith("_lr") else \
                    _number(where, value, low=int(counts), whole=counts)
        return cls(kind, **values)

    def at(self, k: int, start: float, group: int) -> float:
        """The rate after ``k`` steps of this phase, which begins at rate ``start``."""
        start = start if self.start_lr is None else self.start_lr[group]
        if self.type == "constant":
            return start
        if self.type == "step":
            return start * self.decay_rate ** (k // self.step_size)
        end = self.end_lr[group]
        if self.type == "exponential" and 0 in (start, end):
            raise ValueError(f"an exponential phase leads from {start} to {end}; allowed: rates above 0")
        return end if k == self.steps else CURVES[self.type](start, end, k, self.steps)


class MultiPhaseLR(Schedule):
    """Phases in sequence, each with its own behaviour (see Phase). After the last one its final rate stays.

    Each begins where the one before ended, unless it has a ``start_lr``. Warm-up, stable, decay is three lines:

        "phases": [{"type": "linear", "steps": 100, "start_lr": 0.0, "end_lr": 0.001},
                   {"type": "constant", "steps": 800},
                   {"type": "cosine", "steps": 100, "end_lr": 0.0}]
    """

    def __init__(self, optimizer: Optimizer, phases: Sequence[dict[str, Any]], last_batch_iteration: int = -1):
        if not isinstance(phases, (list, tuple)) or not phases:
            raise ValueError(f"phases is {phases!r}; allowed: a list of one phase or more")
        self.phases = [Phase.checked(optimizer, f"phases[{i}]", raw, is_last=i == len(phases) - 1)
                       for i, raw in enumerate(phases)]
        self.span = sum(phase.steps or 4 * (phase.step_size or 0) for phase in self.phases) or self.span
        super().__init__(optimizer, last_batch_iteration)
        for group in range(len(self.base_lrs)):  # pass through all phases once, so that a bad curve raises now
            self.rate(sum(phase.steps or 0 for phase in self.phases), group)

    def rate(self, t: int, group: int) -> float:
        """Walk through the phases up to ``t``; each starts at the rate at which the one before ends."""
        value = self.base_lrs[group]
        for phase in self.phases:
            if phase.steps is None or t < phase.steps:
                return phase.at(t, value, group)
            value = phase.at(phase.steps, value, group)
            t -= phase.steps
        return value


class LinearDecayLR(MultiPhaseLR):
    """A straight line from ``start_lr`` (default: the optimizer's rate) to ``end_lr`` at step ``total_num_steps``."""
    curve = "linear"

    def __init__(self, optimizer: Optimizer, total_num_steps: int, end_lr: Rates = 0.0, start_lr: Rates | None = None,
                 last_batch_iteration: int = -1):
        phase = {"type": self.curve, "steps": total_num_steps, "start_lr": start_lr, "end_lr": end_lr}
        super().__init__(optimizer, [phase], last_batch_iteration)


class CosineDecayLR(LinearDecayLR):
    """Half a cosine from ``start_lr`` (default: the optimizer's rate) to ``end_lr`` at step ``total_num_steps``."""
    curve = "cosine"


class StepDecayLR(MultiPhaseLR):
    """``start_lr`` (default: the optimizer's rate), multiplied by ``decay_rate`` after every ``step_size`` steps."""

    def __init__(self, optimizer: Optimizer, step_size: int, decay_rate: float = 0.1, start_lr: Rates | None = None,
                 last_batch_iteration: int = -1):
        phase = {"type": "step", "step_size": step_size, "decay_rate": decay_rate, "start_lr": start_lr}
        super().__init__(optimizer, [phase], last_batch_iteration)


# --- By name, and without training ------------------------------------------------------------------------------------


NOT_BY_NAME = {  # a config cannot name these
    "ReduceLROnPlateau": "it needs a metric at every step", "LRScheduler": "it is only a base class",
    "SequentialLR": "it is made of other schedulers; MultiPhaseLR joins phases",
    "ChainedScheduler": "it is made of other schedulers; MultiPhaseLR joins phases"}
SCHEDULES: dict[str, type[LRScheduler]] = {
    name: cls for name, cls in vars(torch.optim.lr_scheduler).items()
    if inspect.isclass(cls) and issubclass(cls, LRScheduler) and name not in NOT_BY_NAME and name[0] != "_"} | {
    cls.__name__: cls for cls in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, LinearDecayLR,
                                  CosineDecayLR, StepDecayLR, MultiPhaseLR)}


def named(name: str) -> type[LRScheduler]:
    """The schedule ``name``: one of this file's, or a class of ``torch.optim.lr_scheduler``."""
    if isinstance(name, str) and name in NOT_BY_NAME:
        raise ValueError(f"scheduler type {name!r} can't be used by name: {NOT_BY_NAME[name]}. Pass an object instead")
    return SCHEDULES[_one_of("scheduler type", name, tuple(SCHEDULES))]


def build(optimizer: Optimizer, name: str, params: dict[str, Any] | None = None) -> LRScheduler:
    """The schedule ``name`` with ``params``."""
    cls, params = named(name), {} if params is None else params
    if not isinstance(params, dict):
        raise ValueError(f"{name}: params is {params!r}; allowed: a section of parameters by name")
    for key in params:
        _one_of(f"{name}: a parameter", key, list(inspect.signature(cls).parameters)[1:])
    try:
        return cls(optimizer, **params)
    except (TypeError, AttributeError, LookupError) as error:  # PyTorch's classes raise these for bad parameters
        raise ValueError(f"{name}: {error}") from error


def _walk(source: LRScheduler | dict[str, Any], steps: int | None, lr: Rates) -> list[list[dict[str, Any]]]:
    """Each param group's hyperparameters at each of ``steps`` steps; None: the schedule's span and a tenth more."""
    real = source.optimizer if isinstance(source, LRScheduler) else None
    rates = lr if isinstance(lr, (list, tuple)) else [lr]
    groups = real.param_groups if real else [{"lr": rate, "betas": (0.9, 0.999)} for rate in rates]
    stand_in = torch.optim.SGD([{**group, "params": [torch.zeros(())]} for group in groups])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that the optimizer takes no steps
        # The memo makes the stand-in the optimizer's copy, also for schedulers inside the scheduler.
        schedule = copy.deepcopy(source, {id(real): stand_in}) if real else \
            build(stand_in, source.get("type"), source.get("params"))
        seen = []
        for _ in range(int(1.1 * getattr(schedule, "span", Schedule.span)) + 1 if steps is None else steps):
            seen.append([dict(group) for group in stand_in.param_groups])
            schedule.step()
    return seen


def preview(schedule: LRScheduler | dict[str, Any], steps: int, lr: Rates = 0.001) -> list[list[float]]:
    """The rates of the next ``steps`` optimizer steps: one row per step, one column per param group.

    A dict is a config's scheduler section, with ``type`` and ``params``. Its rates begin at the first step, for an
    optimizer with the rate ``lr`` (a list makes several param groups). A scheduler object's rates begin at its current
    position; the object and its optimizer stay unchanged.
    """
    steps = _number("steps", steps, whole=True)
    return [[float(group["lr"]) for group in groups] for groups in _walk(schedule, steps, lr)]


# --- Command line -----------------------------------------------------------------------------------------------------


GALLERY: list[tuple[str, dict[str, Any]]] = [  # one of each, for 1000 steps, where the optimizer's rate is 0.01
    ("WarmupLR", {"warmup_num_steps": 200}),
    ("WarmupDecayLR", {"warmup_num_steps": 200, "warmup_max_lr": 0.01, "total_num_steps": 1000,
                       "warmup_type": "linear"}),
    ("WarmupCosineLR", {"warmup_num_steps": 200, "total_num_steps": 1000}),
    ("OneCycle", {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 300, "decay_step_size": 100,
                  "decay_lr_rate": 1.0}),
    ("LRRangeTest", {"lr_range_test_step_size": 100}),
    ("LinearDecayLR", {"total_num_steps": 1000}),
    ("CosineDecayLR", {"total_num_steps": 1000}),
    ("StepDecayLR", {"step_size": 250, "decay_rate": 0.5}),
    ("MultiPhaseLR", {"phases": [{"type": "linear", "steps": 150, "start_lr": 0.0, "end_lr": 0.01},
                                 {"type": "constant", "steps": 500}, {"type": "cosine", "steps": 350, "end_lr": 0.0}]})]


def draw(sections: Sequence[dict[str, Any]], steps: int | None, output: str, lr: Rates) -> None:
    """Draw each scheduler section over ``steps`` steps, or its own span: rates, and a changing momentum dashed."""
    import matplotlib.figure  # here, so that training does not wait for it

    columns = min(3, len(sections))
    rows = -(-len(sections) // columns)
    figure = matplotlib.figure.Figure(figsize=(4.6 * columns, 3.1 * rows), layout="constrained")
    for position, section in enumerate(sections, 1):
        seen = _walk(section, steps, lr)
        axis = figure.add_subplot(rows, columns, position)
        axis.plot([[group["lr"] for group in groups] for groups in seen], linewidth=2)
        axis.set(title=section["type"], xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
        axis.grid(alpha=0.3)
        if len(seen[0]) > 1:
            axis.legend([f"group {i}" for i in range(len(seen[0]))])
        momenta = [groups[0]["betas"][0] for groups in seen]
        if len(set(momenta)) > 1:
            twin = axis.twinx()
            twin.plot(momenta, color="black", linestyle="--", linewidth=1)
            twin.set_ylabel("momentum (dashed)")
    figure.savefig(output, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="Draw learning-rate schedules: one of each, or the one in a config.")
    parser.add_argument("config", nargs="?", help="a JSON file with a DeepSpeed config, or its scheduler section")
    parser.add_argument("--output", help="the picture to write (default: schedules.png, or CONFIG_lr.png)")
    parser.add_argument("--steps", type=int, help="optimizer steps to draw (default: the whole schedule and a tenth "
                                                  "more; 1000 for PyTorch's)")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01], metavar="RATE",
                        help="the optimizer's rate if the config has none, one per param group (default: 0.01)")
    options = parser.parse_args(argv)
    try:
        if options.steps is not None:
            _number("--steps", options.steps, low=1)
        if options.config:
            from engine import read_scheduler  # reads configs; only the command line needs it

            section, rate = read_scheduler(options.config)
            output = options.output or f"{Path(options.config).stem}_lr.png"
            draw([section], options.steps, output, options.lr if rate is None else rate)
        else:
            output = options.output or "schedules.png"
            draw([{"type": name, "params": params} for name, params in GALLERY], options.steps, output, options.lr)
    except (OSError, ValueError) as error:
        sys.exit(f"schedulers.py: error: {error}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
