"""DeepSpeed's ``initialize()`` in plain PyTorch: a model and a config become an engine that trains.

    import engine as deepspeed
    model_engine, optimizer, data_loader, lr_scheduler = deepspeed.initialize(model=model, config="ds_config.json")
    for inputs, targets in data_loader:
        loss = loss_function(model_engine(inputs), targets)
        model_engine.backward(loss)
        model_engine.step()

One optimizer step, from the loss to the updated weights, with these phases in this order:

    backward(loss)   scale       multiply the loss by the loss scale (fp16), and let autograd run; as it
                                 finishes gradients, ``zero.py`` collects them in buckets and adds them up over ranks
    step()           count       a micro-batch that does not end its accumulation window: nothing more to do
                     clip        take the global norm, and scale the gradients down to ``gradient_clipping``
                     update      each rank its share of the weights, as the ZeRO stage says; ``lr_scheduler.step()``

So with a loss that is the mean over its micro-batch, the gradient is the mean over the whole batch:
``train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * world_size``.

The file, from top to bottom: the config (dataclasses, and how JSON becomes one), optimizers by name, the process group,
data, the engine, saving and resuming, ``initialize``, and DeepSpeed's other names. A single process needs no launcher,
and runs no collective.

    python engine.py inspect CHECKPOINT_DIR               what is inside
    python engine.py consolidate CHECKPOINT_DIR OUT.pt    one plain state dict of it
    python engine.py estimate --params 7.5e9 --world 64   what a rank will hold and send, stage by stage
"""

import argparse
import atexit
import difflib
import importlib.machinery
import inspect
import io
import json
import logging
import math
import operator
import os
import random
import re
import secrets
import shutil
import sys
import tempfile
import time
import types
import typing
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import cached_property, partial, wraps
from itertools import chain, cycle, islice
from numbers import Real
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_map_only  # have no public names
from torch.utils.data import DataLoader, Dataset, IterableDataset

import amp
import checkpointing as recompute
import schedulers
import zero

logger = logging.getLogger("engine")


def _warn(text: str, *values: Any) -> None:
    """Log a warning, on rank 0."""
    if (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))) == 0:
        logger.warning(text, *values)


# --- The config -------------------------------------------------------------------------------------------------------


class ConfigError(ValueError):
    """An invalid config: the message names the key, what was given and what is allowed."""


def _key(default: Any, **rules: Any) -> Any:
    """A field whose values are restricted: to ``choices``, or to numbers in a range; see _Parser.value."""
    return field(default=default, metadata=rules)


@dataclass
class OptimizerConfig:
    """The ``optimizer`` section."""
    type: str                                    # "Adam", "Muon" or another that build_optimizer knows
    params: dict = field(default_factory=dict)   # its keyword arguments, such as lr

    NO_EFFECT: ClassVar[dict[str, str]] = {
        "adam_w_mode": "it counts inside optimizer.params", "torch_adam": "it counts inside optimizer.params",
        "legacy_fusion": "the optimizer is PyTorch's"}


@dataclass
class SchedulerConfig:
    """The ``scheduler`` section."""
    type: str                                    # a class of schedulers.py or torch.optim.lr_scheduler
    params: dict = field(default_factory=dict)   # its keyword arguments


@dataclass
class CommsLoggerConfig:
    """The ``comms_logger`` section."""
    enabled: bool = False   # print a table of all collectives with each progress line, and at destroy()

    NO_EFFECT: ClassVar[dict[str, str]] = {
        "prof_all": "all collectives are counted", "prof_ops": "all collectives are counted",
        "verbose": "the table comes with progress lines", "debug": "the table comes with progress lines"}


@dataclass
class CheckpointConfig:
    """The ``checkpoint`` section."""
    async_: bool = False           # "async": write in the background, from a copy in host memory
    keep_last: int | None = _key(None, least=1)  # how many checkpoints stay; older ones go once a new one is complete.
                                                 # None: all

    NO_EFFECT: ClassVar[dict[str, str]] = {
        "load_universal": "any checkpoint loads at any stage and number of ranks",
        "parallel_write": "every rank always writes its own share",
        "tag_validation": "ranks that save under different tags always raise",
        "use_node_local_storage": "all ranks save into one folder, which all must reach"}


MAX_TIMEOUT = 10**9  # seconds, 31 years: the clocks of PyTorch's process groups overflow soon above


@dataclass
class Config(amp.PrecisionConfig):
    """A whole config, with DeepSpeed's keys and defaults, those of precision included. Sizes are in samples."""
    train_batch_size: int | None = _key(None, least=1)  # per optimizer step, over all ranks and micro-batches
    train_micro_batch_size_per_gpu: int | None = _key(None, least=1)  # per rank and backward pass
    gradient_accumulation_steps: int | None = _key(None, least=1)  # micro-batches per optimizer step; 1 unless the
                                                                   # sizes say more
    gradient_clipping: float = _key(1.0, least=0)      # largest global gradient norm (2-norm); 0 does not clip
    steps_per_print: int | None = _key(None, least=1)  # optimizer steps between progress lines; none prints nothing
    dataloader_drop_last: bool = False                 # drop an epoch's last micro-batch when it is smaller
    zero_allow_untested_optimizer: bool = False        # shard an optimizer that is not known to work element by element
    wall_clock_breakdown: bool = False                 # print what a step's time goes into
    optimizer: OptimizerConfig | None = None
    scheduler: SchedulerConfig | None = None
    zero_optimization: zero.ZeroConfig = field(default_factory=zero.ZeroConfig)
    gradient_allreduce_op: str = _key("mean", choices=("mean", "sum"))  # over ranks
    prescale_gradients: bool = False                   # divide gradients before they are summed over ranks, not after
    activation_checkpointing: recompute.CheckpointingConfig | None = None  # there: recompute, unless all it says is no
    gradient_predivide_factor: float = _key(1.0, above=0)  # divide by it before the sum, and by ranks / factor after
    comms_logger: CommsLoggerConfig = field(default_factory=CommsLoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    managed_gradient_accumulation: bool = True         # false: the caller ends each window, by calling step()
    dump_state: bool = False                           # print the whole config and what became of it at the start
    debug: bool = False                                # compare, before each collective, what ranks are about to do
    timeout: float | None = _key(None, above=0, below=MAX_TIMEOUT)  # seconds a collective may take; none: as PyTorch
                                                                    # (Gloo 1800)

    given: ClassVar[dict[str, Any]] = {}  # of an instance: what load_config() was given
    SIZES: ClassVar = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    NO_EFFECT: ClassVar[dict[str, str]] = {
        "allgather_size": "parameters are gathered in the buckets that reduce_bucket_size gives",
        "aio": "the system reads and writes the files of offload",
        "disable_allgather": "parameters are always gathered by all-gather",
        "disable_python_gc": "Python's garbage collection is the script's own business",
        "flops_profiler": "wall_clock_breakdown prints times; torch.profiler counts operations",
        "log_level": "Python's logging has it",
        "memory_breakdown": "engine.memory_report() lists what takes memory",
        "sparse_gradients": "sparse gradients are summed densely",
        "vocabulary_size": "nothing depends on it",
        "zero_force_ds_cpu_optimizer": "the optimizer is PyTorch's, on any device",
        **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"),
                        "no log is written; the script can log engine.get_lr() and the loss")}

    def __post_init__(self) -> None:
        super().__post_init__()
        params = self.optimizer.params if self.optimizer else {}
        norm = params.pop("max_grad_norm", self.gradient_clipping)
        if norm != self.gradient_clipping or isinstance(norm, bool):
            raise ValueError(f"optimizer.params.max_grad_norm is {norm!r}, but gradient_clipping is "
                             f"{self.gradient_clipping}; write gradient_clipping: {norm!r} instead")

    def get(self, key: str, default: Any = None) -> Any:
        """A key's value as it was given, as scripts read it from DeepSpeed's dict."""
        return self.given.get(key, default)

    def collective_timeout(self) -> timedelta | None:
        """How long a collective may take; None: PyTorch's own limit."""
        return None if self.timeout is None else timedelta(seconds=self.timeout)

    def predivide(self, world_size: int) -> float | None:
        """The divisor of gradients before their sum over ranks; None: as their dtype needs it."""
        if self.prescale_gradients:  # as in DeepSpeed, whatever the factor is
            return float(world_size)
        return None if self.gradient_predivide_factor == 1 else self.gradient_predivide_factor

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per optimizer step: as given, or as the other two sizes imply, or 1."""
        train, micro = self.train_batch_size, self.train_micro_batch_size_per_gpu
        return self.gradient_accumulation_steps or (max(1, train // (micro * world_size)) if train and micro else 1)

    def settle_batch_sizes(self, world_size: int) -> None:
        """Work out the sizes that were left open, as DeepSpeed does, and check that all three agree."""
        given = ", ".join(f"{key} {getattr(self, key)}" for key in self.SIZES if getattr(self, key) is not None)
        train, micro = self.train_batch_size, self.train_micro_batch_size_per_gpu
        if train is None and micro is None:
            raise ConfigError("train_batch_size and train_micro_batch_size_per_gpu are missing; needed: at least one")
        steps = self.accumulation_steps(world_size)
        micro = micro or max(1, train // (steps * world_size))
        train = train or micro * steps * world_size
        if train != micro * steps * world_size:
            raise ConfigError(f"{' * '.join(self.SIZES[1:])} * world size must be {self.SIZES[0]}, but {micro} * "
                              f"{steps} * {world_size} != {train} (given: {given}; world size {world_size})")
        self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps = (
            train, micro, steps)


# Keys that DeepSpeed documents and this engine refuses: known, so not reported as misspelt.
NOT_HERE = {"amp", "autotuning", "compile", "compression_training", "curriculum_learning", "data_efficiency",
            "eigenvalue", "elasticity", "expert_parallel", "hybrid_engine", "nebula", "pipeline",
            "progressive_layer_drop", "quantize_training", "seq_parallel_communication_data_type",
            "sequence_parallel_size", "sparse_attention", "tensor_parallel", "use_data_before_expert_parallelism",
            "weight_quantization"}
NOT_HERE |= {f"zero_optimization.{key}" for key in (
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "mics_shard_size", "mics_hierarchical_params_gather", "zenflow")}

# Of the keys without effect (NO_EFFECT of each section), those where "false" needs a warning as well.
ALWAYS_ON = {"comms_logger.prof_all", "zero_optimization.compute_grad_norm", "optimizer.adam_w_mode"}

# Former spellings, and the key that takes the value now.
FORMER = {"bfloat16": "bf16", "zero_optimization.stage3_gather_fp16_weights_on_model_save":
          "zero_optimization.stage3_gather_16bit_weights_on_model_save"}
FORMER |= {f"zero_optimization.{key.removeprefix('stage3_')}": f"zero_optimization.{key}" for key in (
    *vars(zero.ZeroConfig()), *zero.ZeroConfig.NO_EFFECT) if key.startswith("stage3_")}
FORMER |= {f"zero_optimization.cpu_offload{what}": f"zero_optimization.{now}" for what, now in (
    ("", "offload_optimizer"), ("_param", "offload_param"), ("_params", "offload_param"))}  # were true or false

# Keys that name what the caller wants: "auto" has no default there that can be right.
UNDECIDED = (".type", ".stage", ".device", ".nvme_path", ".total_num_steps", ".cycle_min_lr", ".cycle_max_lr")


def load_config(config: Mapping[str, Any] | str | os.PathLike) -> Config:
    """A checked Config, from a dictionary or from the path of a JSON file.

    Former spellings and keys without effect are accepted, with a warning on rank 0. So is "auto" where it leaves no
    question open: the key then has its default.
    """
    raw, parser = read_config(config), _Parser()
    given = _object(raw.items())
    parser.respell(raw)
    result = parser.section(Config, raw)
    result.given = given
    off = raw.get("activation_checkpointing")  # only DeepSpeed's keys, all of them off
    if off and isinstance(off, dict) and not {"modules", "mode"} & off.keys() and all(map(_is_off, off.values())):
        result.activation_checkpointing = None
    if "scheduler.params.warmup_max_lr" in parser.autos:
        result.scheduler.params["warmup_max_lr"] = None  # the optimizer's own rate
    undecided = [path for path in parser.autos if path.endswith(UNDECIDED)]
    if result.train_batch_size is None and result.train_micro_batch_size_per_gpu is None:
        undecided += [key for key in result.SIZES[:2] if key in parser.autos]
    if undecided:
        raise ConfigError(f'"auto" can\'t be decided here: {", ".join(undecided)}; write values. Hugging Face\'s '
                          "Trainer and Accelerate fill them in before DeepSpeed reads the config")
    parser.warn()
    return result


def read_config(config: Mapping[str, Any] | str | os.PathLike) -> dict[str, Any]:
    """A config as given, without comments: from a dictionary or a JSON file.

    A file may contain comments (#, //, /* */) and commas before a closing bracket.
    """
    try:
        if isinstance(config, (str, os.PathLike)):
            text = Path(config).read_text(encoding="utf-8-sig")
            for pattern in (r"#[^\n]*|//[^\n]*|/\*.*?\*/", r",(?=\s*[}\]])"):  # blanks keep the positions in errors
                text = re.sub(rf'("(?:\\.|[^"\\\n])*")|{pattern}',
                              lambda found: found[1] or re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
            config = json.loads(text, object_pairs_hook=_object)
    except OSError as error:
        raise ConfigError(f"the config file {config} can't be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {config} is not JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"the config is {config!r}; allowed: an object, such as a dict")
    return _object(config.items())


def _object(pairs: Iterable[tuple[Any, Any]], place: str = "the config") -> dict[str, Any]:
    """A new dict of these keys and values, also for each mapping in it, without comments."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ConfigError(f"{place} has the key {key!r}; allowed: text")
        if key.startswith(("_", "#", "//")) or key.lower() in ("comment", "comments"):
            continue
        if key in result:
            raise ConfigError(f"the key {key!r} stands twice in the config file")
        result[key] = _object(value.items(), key) if isinstance(value, Mapping) else value
    return result


class _Parser:
    """Makes dataclasses from JSON, and remembers what needs a warning."""

    def __init__(self) -> None:
        self.former: list[str] = []          # former spellings
        self.autos: list[str] = []           # keys that are "auto"
        self.without_effect: list[str] = []  # keys, and why they have none

    def warn(self) -> None:
        """Log the warnings that the config needs."""
        for text in self.former:
            _warn("config: %s", text)
        if self.autos:
            _warn('config: "auto", so the default or what the other keys say: %s', ", ".join(self.autos))
        if self.without_effect:
            _warn("config: without effect here: %s", "; ".join(self.without_effect))

    def respell(self, raw: dict[str, Any]) -> None:
        """Replace former spellings by the current ones, in place."""
        if _number(raw.get("steps_per_print")) == math.inf:
            del raw["steps_per_print"]  # never
        if isinstance(raw.get("zero_optimization"), bool):
            now = {"stage": int(raw["zero_optimization"])}
            self.former.append(f"zero_optimization {raw['zero_optimization']} is now written {json.dumps(now)}")
            raw["zero_optimization"] = now
        for former, now in FORMER.items():
            place = raw.get(former.split(".")[0]) if "." in former else raw
            value = place.pop(former.split(".")[-1], None) if isinstance(place, dict) else None
            if value is None or _is_auto(value):
                continue
            if "cpu_offload" in former:
                value = {"device": "cpu" if self.value(bool, {}, value, former) else "none"}
            given = place.setdefault(now.split(".")[-1], value)
            if given != value and not (isinstance(given, dict) and isinstance(value, dict)
                                       and value.items() <= given.items()):
                raise ConfigError(f"{former} is the former spelling of {now} and says {value!r}, but {now} is "
                                  f"{given!r}; take {former} out")
            self.former.append(f"{former} is now {now}{f' {value}' if 'cpu_offload' in former else ''}")

    def section(self, cls: type, raw: Any, path: str = "") -> Any:
        """An instance of the dataclass ``cls`` from the JSON object ``raw``, whose keys begin with ``path``."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{path.rstrip('.')} is {raw!r}; allowed: an object, such as a dict")
        # The field of a key that is a Python keyword, such as async, ends in an underscore.
        known = {f.name.removesuffix("_"): f for f in fields(cls)}
        hints, idle, values = typing.get_type_hints(cls), getattr(cls, "NO_EFFECT", {}), {}
        needed = {f.name for f in fields(cls) if f.default is f.default_factory}  # where both are MISSING
        switches = {"enabled", "device"} & known.keys()
        if _is_off({key: raw[key] for key in switches & raw.keys()}):  # then the other keys are not checked
            raw = {key: raw[key] for key in switches & raw.keys() if raw[key] is not None}
        for key, value in raw.items():
            if key not in known:
                self.check_unknown(f"{path}{key}", value, known, idle.get(key))
                continue
            f = known[key]
            if _is_auto(value):
                self.autos.append(f"{path}{key}")
            if not _is_auto(value) or f.name in needed:
                values[f.name] = self.value(hints[f.name], f.metadata, value, f"{path}{key}")
                if key in idle and values[f.name] != f.default:
                    self.without_effect.append(f"{path}{key} ({idle[key]})")
        for name in sorted(needed - values.keys()):
            raise ConfigError(f"{path}{name} is missing")
        try:
            return cls(**values)
        except ValueError as error:  # a section's own checks
            raise ConfigError(str(error)) from None

    def check_unknown(self, path: str, value: Any, known: Iterable[str], idle: str | None) -> None:
        """Refuse a key that is no field, unless it says that something is off. ``idle``: why it has no effect."""
        if idle is not None:
            if not _is_off(value) or path in ALWAYS_ON and value is not None:
                self.without_effect.append(f"{path} ({idle})")
        elif path not in NOT_HERE:
            homes = [f.name for f in fields(Config) if is_dataclass(f.default_factory)
                     and path in vars(f.default_factory())]
            hint = f"; its place is in {homes[0]}" if len(homes) == 1 else _nearest(path.rpartition(".")[2], known)
            raise ConfigError(f"unknown key {path}, set to {value!r}{hint} (known: {', '.join(known)})")
        elif not _is_off(value, path):
            raise ConfigError(f"{path} belongs to a part of DeepSpeed that is not covered; take it out of the config")

    def value(self, hint: Any, rules: Mapping[str, Any], value: Any, path: str) -> Any:
        """``value`` converted to what the annotation ``hint`` says: a number, text, a list, a section, or a union.

        ``rules`` are the field's metadata: ``choices`` (a mapping gives the values that names stand for), and the range
        of a number: ``least``, ``most``, ``above``, ``below``. Text that can only mean a number or a truth value means
        it, as do 0 and 1.
        """
        kinds = typing.get_args(hint) or (hint,)
        choices, number = rules.get("choices", ()), _number(value)
        word = str(value).lower() if isinstance(value, (str, torch.dtype)) else None
        for kind in kinds:
            if is_dataclass(kind) and value is not None:
                return self.section(kind, value, f"{path}.")
            if kind in (int, float) and number is not None and _is_within(number, rules) \
                    and (kind is float or number.is_integer() and abs(number) < 2**53):
                return kind(number)  # JSON files like to write 5e8
            if kind is bool and _truth(value) is not None:
                return _truth(value)
            if kind is list and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
                return list(value)
            if kind is dict and isinstance(value, dict):
                self.autos += [f"{path}.{key}" for key, item in value.items() if _is_auto(item)]
                return {key: item for key, item in value.items() if not _is_auto(item)}
            if kind in (str, torch.dtype) and word in choices:
                return choices[word] if isinstance(choices, Mapping) else word
            if kind in (str, types.NoneType) and isinstance(value, kind) and not (kind is str and choices):
                return value
        raise ConfigError(f"{path} is {value!r}; allowed: {_allowed(kinds, rules)}")


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == "auto"


def _is_off(value: Any, path: str = "") -> bool:
    """Whether a section or key only says that it is off: leaving it out would change nothing."""
    if isinstance(value, Mapping):
        return value.get("device") == "none" or "enabled" in value and _is_off(value["enabled"])
    if path.endswith("_size") and isinstance(value, int) and not isinstance(value, bool):
        return value <= 1  # a group of one rank; -1 is DeepSpeed's default for some
    return value in (False, None) or isinstance(value, str) and value.lower() in ("false", "auto")


def _nearest(name: Any, known: Iterable[str]) -> str:
    """The part of an error message that suggests the nearest names to a wrong one, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), cutoff=0.6 if len(str(name)) > 3 else 0.5)
    likeness = [difflib.SequenceMatcher(None, word, str(name)).ratio() for word in near]
    near = [word for word, like in zip(near, likeness) if like == likeness[0]]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _is_within(number: float, rules: Mapping[str, Any]) -> bool:
    """Whether a field with these ``rules`` may have the number."""
    choices = rules.get("choices", ())
    return number in choices or rules.keys() != {"choices"} and math.isfinite(number) and (
        rules.get("least", number) <= number <= rules.get("most", number)
        and rules.get("above", -math.inf) < number < rules.get("below", math.inf))


def _allowed(kinds: Iterable[type], rules: Mapping[str, Any]) -> str:
    """The values that a field of these kinds and ``rules`` may have, in words."""
    span = "".join(f" {word} {rules[key]:g}" for key, word in (
        ("least", "from"), ("above", "above"), ("most", "to"), ("below", "and below")) if key in rules)
    span += " up" if "least" in rules and "most" not in rules else ""
    names = {int: f"a whole number{span}", float: f"a number{span}", bool: "true or false", str: "a string",
             dict: "an object", list: "a list of strings", types.NoneType: "null"}
    chosen = (str, torch.dtype) if span else (int, float, str, torch.dtype)  # kinds of which the choices are all
    words = [str(choice) for choice in rules.get("choices", ())]
    words += [names.get(kind, "an object") for kind in kinds if not (words and kind in chosen)]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _number(value: Any) -> float | None:
    """``value``, or the text in it, as a number; None if it is none, or too large."""
    try:
        return float(value) if isinstance(value, (Real, str)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


def _truth(value: Any) -> bool | None:
    """``value``, or the text in it, as a truth value, which 0 and 1 are as well; None if it is none."""
    number = {"true": 1, "false": 0}.get(str(value).lower(), _number(value))
    return bool(number) if number in (0, 1) else None


def _check_params(cls: type, params: dict[str, Any], path: str) -> dict[str, Any]:
    """``params``, checked for the constructor of ``cls`` without its first argument: known names, fitting values."""
    known = dict(list(inspect.signature(cls).parameters.items())[1:])
    for key in params:
        if key not in known:
            raise ConfigError(f"unknown key {path}.{key}{_nearest(key, known)} ({cls.__name__} takes: "
                              f"{', '.join(known)})")
    kinds = {key: next((kind for kind in (bool, str) if isinstance(p.default, kind)
                        or kind.__name__ in str(p.annotation)), float) for key, p in known.items()}
    return {key: _check_param(value, f"{path}.{key}", kinds[key]) for key, value in params.items()}


def _check_param(value: Any, path: str, kind: type) -> Any:
    """``value`` if it fits its parameter's kind: bool, str or float, or a list of these. Other objects pass.

    PyTorch's classes themselves would take any text for true, and true for 1.
    """
    number = _number(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_check_param(item, path, kind) for item in value)
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind is float and number is not None and math.isfinite(number):
        return value if not isinstance(value, str) else int(number) if number.is_integer() else number
    if value is None or not isinstance(value, {bool: object, str: bool, float: (Real, str)}[kind]):
        return value
    raise ConfigError(f"{path} is {value!r}; allowed: {'true or false' if kind is bool else 'a finite number'}")


def read_scheduler(config: Mapping[str, Any] | str | os.PathLike) -> tuple[dict[str, Any], Any]:
    """The scheduler section of a config, or of a file with only that section; and the optimizer's rate, if given."""
    raw = read_config(config)
    settings = load_config({"scheduler": raw} if "type" in raw else raw)
    if settings.scheduler is None:
        raise ConfigError("the config has no scheduler section")
    return asdict(settings.scheduler), settings.optimizer and settings.optimizer.params.get("lr")


# --- Optimizers by name -----------------------------------------------------------------------------------------------
#
# Lion, Lamb and Muon, which PyTorch lacks or has for matrices only, are optimizers for any training loop. ZeRO gives
# every rank a piece of the parameters to update, and asks is_elementwise(group) whether it may cut them:
#
#     Lion    works element by element, so parameters may be cut anywhere
#     Lamb    needs the norm of each whole parameter, so none may be cut
#     Muon    needs whole matrices; the other parameters, which AdamW updates, may be cut


class _Named(Optimizer):
    """The base of the three: ``step()``, for which each defines ``update()``, and the check of numbers.

    Betas are from 0 and below 1, all others from 0 up.
    """

    def __init__(self, params: Iterable, **options: Any):
        self.check(**options)
        super().__init__(params, options)

    @staticmethod
    def check(betas: Any, **options: Any) -> None:
        """Raise ValueError for numbers that no step could use."""
        if not isinstance(betas, (list, tuple)) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {betas!r}; allowed: two numbers from 0 up and below 1")
        for name, value in options.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; allowed: a number from 0 up")

    def is_elementwise(self, group: Mapping[str, Any]) -> bool:
        """Whether every element is treated alike, so that ZeRO may cut the group's parameters."""
        return False

    def update(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        """Update those of a group's parameters that have a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Update every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, group)
        return loss


class Lion(_Named):
    """Lion (arXiv 2302.06675, algorithm 2): each weight moves the same distance, in the direction of a sign.

        c = beta1 * m + (1 - beta1) * g
        p = p - lr * (sign(c) + weight_decay * p)
        m = beta2 * m + (1 - beta2) * g

    ``m``, in the state as ``exp_avg``, begins at 0: one number per element, where Adam keeps two.

    lr             the distance per step; the paper takes a third to a tenth of AdamW's
    betas          how much of ``m`` counts in the direction, and how much of it stays; the default is DeepSpeed's, and
                   the paper takes 0.9 and 0.99
    weight_decay   decoupled; the paper takes 3 to 10 times AdamW's
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 weight_decay: float = 0.0):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    def is_elementwise(self, group: Mapping[str, Any]) -> bool:
        return True

    def update(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        """One step of Lion."""
        (beta1, beta2), rate = group["betas"], group["lr"]
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        gradients, averages = [p.grad for p in params], [self.state[p]["exp_avg"] for p in params]
        direction = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(direction, gradients, alpha=1 - beta1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        torch._foreach_add_(params, direction, alpha=-rate)
        torch._foreach_lerp_(averages, gradients, 1 - beta2)


class Lamb(_Named):
    """LAMB (arXiv 1904.00962, algorithm 2): Adam's direction, scaled by the length of each whole parameter.

        m = beta1 * m + (1 - beta1) * g             v = beta2 * v + (1 - beta2) * g ** 2
        r = m / (1 - beta1 ** t) / (sqrt(v / (1 - beta2 ** t)) + eps) + weight_decay * p
        p = p - lr * clamp(|p| / |r|, min_coeff, max_coeff) * r

    The 2-norms of the trust ratio ``|p| / |r|`` are those of a whole parameter; where one of them is 0, the ratio is 1.
    The arguments are those of DeepSpeed's FusedLamb, whose ``max_grad_norm`` is the config's ``gradient_clipping``. The
    state is ``step``, ``exp_avg`` and ``exp_avg_sq``.

    lr                relative to a weight's length, as the trust ratio has no unit
    bias_correction   False leaves out the two divisions by 1 - beta ** t
    eps_inside_sqrt   add eps to v, before the root
    amsgrad           only False: the paper's LAMB has no such variant
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, *, bias_correction: bool = True,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, eps_inside_sqrt: bool = False,
                 weight_decay: float = 0.0, max_coeff: float = 10.0, min_coeff: float = 0.01, amsgrad: bool = False):
        if amsgrad:
            raise ValueError("amsgrad is True; allowed: False, as LAMB has no such variant")
        super().__init__(params, lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                         eps_inside_sqrt=eps_inside_sqrt, weight_decay=weight_decay, max_coeff=max_coeff,
                         min_coeff=min_coeff)
        if min_coeff > max_coeff:
            raise ValueError(f"min_coeff is {min_coeff}; allowed: at most max_coeff, which is {max_coeff}")

    def update(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        """One step of LAMB, parameter by parameter."""
        (beta1, beta2), eps = group["betas"], group["eps"]
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            left = [1 - beta ** state["step"].item() if group["bias_correction"] else 1.0 for beta in (beta1, beta2)]
            root = state["exp_avg_sq"] / left[1]
            root = root.add_(eps).sqrt_() if group["eps_inside_sqrt"] else root.sqrt_().add_(eps)
            r = torch.div(state["exp_avg"], root, out=root).div_(left[0]).add_(p, alpha=group["weight_decay"])
            norm, length = torch.linalg.vector_norm(p), torch.linalg.vector_norm(r)
            ratio = (norm / length).clamp(group["min_coeff"], group["max_coeff"])
            ratio = torch.where((norm > 0) & (length > 0), ratio, 1.0)  # without waiting for a GPU
            p.sub_(r.mul_(ratio * group["lr"]))


class Muon(_Named):
    """Muon for hidden matrices and AdamW for all other parameters, as one optimizer with one state.

    Muon (K. Jordan, https://kellerjordan.github.io/posts/muon/) makes a matrix's momentum orthogonal: each direction
    in which it would move the matrix gets the same length. Both are PyTorch's, ``torch.optim.Muon`` and
    ``torch.optim.AdamW``.

    params          param groups with ``use_muon``, True or False, in each; ``muon_groups`` makes them
    lr              of both, unless ``muon_lr`` (default 0.02) or ``adam_lr`` (default 3e-4) is given
    momentum, nesterov, ns_steps    Muon's: decay of its average; whether the newest gradient counts again; iterations
    betas, eps      AdamW's
    weight_decay    decoupled, of both
    """

    def __init__(self, params: Iterable, lr: float | None = None, muon_lr: float | None = None,
                 adam_lr: float | None = None, momentum: float = 0.95, nesterov: bool = True, ns_steps: int = 5,
                 betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-10, weight_decay: float = 0.0):
        matrices, others = ([rate for rate in (own, lr, default) if rate is not None][0]
                            for own, default in ((muon_lr, 0.02), (adam_lr, 3e-4)))
        self.check(betas, muon_lr=matrices, adam_lr=others, momentum=momentum, eps=eps, weight_decay=weight_decay)
        if not isinstance(ns_steps, int) or not 0 < ns_steps < 100:
            raise ValueError(f"ns_steps is {ns_steps!r}; allowed: a whole number from 1 to 99")
        options = {True: {"lr": matrices, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps},
                   False: {"lr": others, "betas": betas, "eps": eps}}
        groups = list(params)
        for group in groups:
            group = group if isinstance(group, dict) else {}
            if not isinstance(group.get("use_muon"), bool):
                said = f"use_muon {group['use_muon']!r}" if "use_muon" in group else "no use_muon"
                raise ValueError(f"a param group of Muon has {said}; needed: True for hidden matrices, False for other "
                                 "parameters; muon_groups() makes such groups")
        Optimizer.__init__(self, [{**options[group["use_muon"]], "weight_decay": weight_decay, **group}
                                  for group in groups], {})
        for group in self.param_groups:
            if not group["use_muon"]:
                group.setdefault("fused", not any(p.is_complex() for p in group["params"]))
            self._pytorchs(group)  # its own checks

    def _pytorchs(self, group: dict[str, Any]) -> Optimizer:
        """PyTorch's optimizer over a group; made anew for each step, as other code may exchange groups and state."""
        optimizer = (torch.optim.Muon if group["use_muon"] else torch.optim.AdamW)([group])
        optimizer.state = self.state
        return optimizer

    def is_elementwise(self, group: Mapping[str, Any]) -> bool:
        return not group["use_muon"]

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """One step of the group's own kind."""
        optimizer = self._pytorchs(group)
        type(optimizer).step.__wrapped__(optimizer)  # without the global step hooks, which run once, around this


def muon_groups(parameters: Iterable, model: nn.Module | None = None) -> list[dict[str, Any]]:
    """Param groups for Muon: each given one split into hidden matrices, ``use_muon`` True, and the rest, False.

    A hidden matrix has two dimensions and is no embedding and no head. An embedding belongs to an ``nn.Embedding`` or
    has "embed" in its name; a head has a name in which "head" or "lm_head" stands between dots. A parameter's own
    attribute ``use_muon``, True or False, comes before this rule.

    parameters   tensors, or param groups
    model        the model, for the parameters' names; None: they have none
    """
    model = nn.Module() if model is None else model
    names = {id(p): name for name, p in model.named_parameters()}
    embeddings = {id(p) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
                  for p in module.parameters()}

    def use_muon(p: Tensor) -> bool:
        """Whether the parameter itself says so, or is a hidden matrix."""
        name = names.get(id(p), "")
        edge = id(p) in embeddings or "embed" in name.lower() or {"head", "lm_head"} & set(name.lower().split("."))
        chosen = getattr(p, "use_muon", p.dim() == 2 and not edge)
        if not isinstance(chosen, bool) or chosen and p.dim() != 2:
            raise ValueError(f"use_muon of the parameter {name} of shape {tuple(p.shape)} is {chosen!r}; allowed: True "
                             "for a matrix, False for any")
        return chosen

    given, found = list(parameters), []
    for group in given if given and isinstance(given[0], dict) else [{"params": given}]:
        params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]  # tuples: from named_parameters()
        said = group.get("use_muon")
        parts = {bool(said) if said in (True, False) else said: params} if "use_muon" in group else {
            choice: [p for p in params if use_muon(p) is choice] for choice in (True, False)}
        found += [{**group, "params": part, "use_muon": choice} for choice, part in parts.items() if part]
    return found


UNFIT = (torch.optim.LBFGS, torch.optim.SparseAdam)  # one needs a closure, the other sparse gradients: not covered

# What a config may name besides the classes of torch.optim. The first three are DeepSpeed's names for its kernels.
BY_NAME: dict[str, type[Optimizer]] = {
    "FusedAdam": torch.optim.Adam, "CPUAdam": torch.optim.Adam, "DeepSpeedCPUAdam": torch.optim.Adam,
    "Lion": Lion, "Lamb": Lamb, "FusedLamb": Lamb, "Muon": Muon}


def build_optimizer(section: OptimizerConfig, parameters: Iterable, device: torch.device,
                    model: nn.Module | None = None) -> Optimizer:
    """The optimizer that ``section`` names, over ``parameters`` (tensors or param groups) of ``model``.

    ``Adam`` and ``AdamW`` mean what they mean in DeepSpeed. Both decay weights the decoupled way (AdamW, arXiv
    1711.05101), unless ``Adam`` has ``adam_w_mode: false``. Both decay by 0 by default; with ``torch_adam: true`` by
    PyTorch's default, 0.01 for AdamW. Other names are those of BY_NAME, and classes of ``torch.optim`` except UNFIT
    ones. PyTorch's fused implementation is used where there is one and ``params`` chooses no other.
    """
    known = {name: cls for name, cls in vars(torch.optim).items() if inspect.isclass(cls) and issubclass(cls, Optimizer)
             and cls not in (Optimizer, *UNFIT)} | BY_NAME
    name, params = {n.lower(): n for n in known}.get(section.type.lower()), dict(section.params)
    if name is None:
        raise ConfigError(f"optimizer.type is {section.type!r}{_nearest(section.type, known)} "
                          f"(allowed: {', '.join(sorted(known))})")
    cls = known[name]
    if cls in (torch.optim.Adam, torch.optim.AdamW):
        cls = _choose_adam(name, params)
    params = _check_params(cls, params, "optimizer.params")
    fused = {"fused": True} if _runs_fused(cls, params, device) else {}
    try:
        optimizer = cls(muon_groups(parameters, model) if cls is Muon else parameters, **params, **fused)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ConfigError(f"optimizer.params {section.params} for {cls.__name__}: {error}") from error
    for group in optimizer.param_groups if fused else ():
        group["fused"] = not any(p.is_complex() for p in group["params"])  # which PyTorch's kernels do not know
    if name in BY_NAME and name != cls.__name__:
        _warn("optimizer.type %s is %s.%s here%s", name, cls.__module__, cls.__name__,
              ", with PyTorch's fused kernel" if fused else "")
    return optimizer


def _choose_adam(name: str, params: dict[str, Any]) -> type[Optimizer]:
    """PyTorch's class for one of DeepSpeed's names for Adam; removes the flags that choose it from ``params``."""
    decoupled, torch_adam, corrects = (_check_param(params.pop(flag, default), f"optimizer.params.{flag}", bool)
                                       for flag, default in (("adam_w_mode", True), ("torch_adam", False),
                                                             ("bias_correction", True)))
    if not torch_adam:
        params.setdefault("weight_decay", 0.0)
    if not corrects:
        raise ConfigError("optimizer.params.bias_correction is false; allowed: true, as PyTorch always corrects")
    return torch.optim.AdamW if decoupled or name == "AdamW" else torch.optim.Adam


def _runs_fused(cls: type[Optimizer], params: Mapping[str, Any], device: torch.device) -> bool:
    """Whether PyTorch has a fused kernel for the class, and ``params`` choose no other implementation."""
    if cls is torch.optim.SGD and params.get("momentum"):
        return False  # PyTorch's fused kernel fails where some parameters get their first gradient later
    return ("fused" in inspect.signature(cls).parameters and (cls is not torch.optim.Adagrad or device.type == "cpu")
            and not {"fused", "foreach", "capturable", "differentiable"} & params.keys())


# --- The process group ------------------------------------------------------------------------------------------------


def init_distributed(dist_backend: str | None = None, auto_mpi_discovery: bool = True, distributed_port: int = 29500,
                     verbose: bool = True, timeout: timedelta | None = None, init_method: str | None = None,
                     dist_init_required: bool | None = None, config: Any = None, rank: int = -1,
                     world_size: int = -1) -> None:
    """Start the default process group, or keep the existing one; DeepSpeed's signature.

    ``initialize()`` does the same if needed. ``destroy()`` leaves a group alone that was started here.

    dist_backend        PyTorch's name of a backend; default: nccl on a GPU, else gloo
    auto_mpi_discovery  no effect: processes of mpirun or srun are refused, as each would train alone. Use torchrun
    distributed_port    the port of the process group when MASTER_PORT is not set
    verbose             whether to log what was started
    timeout             how long a collective may take before all ranks raise; default: PyTorch's (Gloo 30 minutes,
                        NCCL 10)
    init_method         an address as in torch.distributed.init_process_group; default: the launcher's variables
    dist_init_required  False: the process group must exist already
    config              refused: initialize() reads the config
    rank, world_size    who this is, instead of the launcher's variables

    Raises ValueError for invalid arguments and environments.
    """
    _check_start(distributed_port, dist_init_required)
    _check("config", config, config is None, "None, as initialize() takes it, and its comms_logger section")
    _check("timeout", timeout, timeout is None or isinstance(timeout, timedelta)
           and 0 < timeout.total_seconds() < MAX_TIMEOUT, "a positive datetime.timedelta, or None")
    for name, value in (("rank", rank), ("world_size", world_size)):
        _check(name, value, _is_whole(value, -1), "a whole number, or -1 for the launcher's")
    _check("rank", rank, rank == world_size == -1 or 0 <= rank < world_size,
           f"a rank below world_size, which is {world_size}; or -1 for both")
    _check("init_method", init_method, init_method is None or isinstance(init_method, str) and "://" in init_method,
           "an address such as 'tcp://host:port', or None")
    _check("dist_backend", dist_backend, dist_backend is None or dist.is_backend_available(str(dist_backend)),
           f"one of {', '.join(b for b in dist.Backend.backend_list if dist.is_backend_available(b))}")
    device, by_address = zero.own_device(int(os.environ.get("LOCAL_RANK", 0))), rank != -1 or init_method is not None
    if by_address and not dist.is_initialized() and dist_init_required is not False:
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
        dist.init_process_group(dist_backend, init_method, timeout, world_size, rank)
        started = True
    else:
        started = zero.start_process_group(device, distributed_port, dist_init_required, dist_backend, timeout)
    if not started and world_size not in (-1, dist.get_world_size()):
        raise ValueError(f"world_size is {world_size}, but the existing process group has {dist.get_world_size()}")
    if verbose and started:
        logger.info("process group: rank %d of %d, %s", dist.get_rank(), dist.get_world_size(), dist.get_backend())


def _check(name: str, value: Any, fits: bool, allowed: str) -> None:
    """Raise ValueError for an argument that does not fit."""
    if not fits:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_start(port: Any, required: Any) -> None:
    _check("dist_init_required", required, isinstance(required, bool | None), "True, False or None")
    _check("distributed_port", port, isinstance(port, int) and 0 < port < 2**16, "a whole number from 1 to 65535")


# --- Data -------------------------------------------------------------------------------------------------------------


def _to_device(value: Any, device: torch.device) -> Any:
    """``value`` with all tensors and other objects with ``to()`` in it on ``device``; in lists, tuples and mappings."""
    def move(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device, non_blocking=True)  # the host does not wait for a GPU's queue
        return part.to(device) if hasattr(part, "to") else part

    return amp.mapped(value, move)


def _check_data(dataset: Any) -> None:
    """Raise ValueError for data that a ShardedLoader can't serve."""
    if isinstance(dataset, IterableDataset) and dist.get_world_size() > 1:
        raise ValueError("training_data is an IterableDataset, which can't be divided among "
                         f"{dist.get_world_size()} ranks; allowed: a dataset with __len__ and __getitem__. "
                         "If yours shards itself, put it in a DataLoader of your own")
    if dataset is None or isinstance(dataset, IterableDataset):
        return
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):  # a DataLoader has no __getitem__
        raise ValueError(f"training_data is a {type(dataset).__name__}; allowed: a dataset with __len__ and "
                         "__getitem__, from which the engine makes the loader, or on one rank an IterableDataset")
    if len(dataset) == 0:
        raise ValueError("training_data is empty; allowed: at least one sample")


class ShardedLoader:
    """This rank's share of a dataset in micro-batches on its device; a new shuffle every epoch.

    The order comes from rank 0's PyTorch seed, so ``torch.manual_seed`` fixes it. Ranks get equally many samples: where
    the count does not divide, some come twice, as with PyTorch's DistributedSampler.

    ``num_local_io_workers``, to be set before a loop, is how many processes read ahead. What a dataset draws there does
    not go on in the middle of an epoch as it would have: checkpoints hold this process's random state alone.
    """

    num_local_io_workers = 0

    def __init__(self, dataset: Dataset, batch_size: int, device: torch.device, collate_fn: Callable | None,
                 drop_last: bool):
        self.dataset, self.batch_size, self.collate_fn, self.drop_last = dataset, batch_size, collate_fn, drop_last
        self.device, self.world_size = device, dist.get_world_size()
        self.seed = zero.gather(torch.initial_seed() % 2**62)[0]
        self.epoch = 0      # epochs that have begun
        self.samples = 0    # samples of the last one that all ranks together were given; 0 once it is over
        self.moved = False  # load_state_dict() has set the two, and no loop has used them yet

    def __len__(self) -> int:
        """Micro-batches per epoch and rank."""
        return self._batches(len(self.dataset))

    def __iter__(self) -> Iterator[Any]:
        """A new epoch's micro-batches; after load_state_dict(), also inside the loop, the rest of that epoch."""
        if not (self.moved and self.samples):
            self.epoch, self.samples = self.epoch + 1, 0
        while True:
            self.moved = False
            for batch in self._on_device(self._loader()):
                self.samples += self.batch_size * self.world_size
                yield batch
                if self.moved:
                    break
            else:
                self.samples = 0
            if not (self.moved and self.samples):
                return

    def _on_device(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches on the device. A GPU gets one that a worker has read while it works on the one before."""
        if self.device.type != "cuda" or not self.num_local_io_workers:
            yield from (_to_device(batch, self.device) for batch in batches)
            return
        copies, ready = torch.cuda.Stream(self.device), None
        for batch in chain(batches, [None]):
            copies.wait_stream(torch.cuda.current_stream())  # whose work may use the memory that a copy takes
            with torch.cuda.stream(copies):
                following = _to_device(batch, self.device), copies.record_event()
            if ready is not None:
                torch.cuda.current_stream().wait_event(ready[1])
                yield ready[0]
            ready = following

    def _batches(self, samples: int) -> int:
        """Micro-batches that each rank gets from this number of samples."""
        share = -(-samples // self.world_size)
        return max(0, share // self.batch_size if self.drop_last else -(-share // self.batch_size))

    def _loader(self) -> DataLoader:
        """This rank's share of the rest of the epoch."""
        rank, workers = dist.get_rank(), self.num_local_io_workers
        _check("num_local_io_workers", workers, _is_whole(workers, 0), "a whole number from 0 up")
        place = self.epoch + 2**20 * self.samples  # so that a resumed epoch does not repeat its first draws
        seeds = torch.Generator().manual_seed(self.seed + place * self.world_size + rank)  # of workers
        options = {"batch_size": self.batch_size, "collate_fn": self.collate_fn, "drop_last": self.drop_last,
                   "generator": seeds, "num_workers": workers, "pin_memory": self.device.type == "cuda"}
        if isinstance(self.dataset, IterableDataset):
            if workers > 1:
                raise ValueError(f"num_local_io_workers is {workers}, and training_data is an IterableDataset, which "
                                 "each worker would read in full; allowed: 0 or 1")
            return DataLoader(_Rest(self.dataset, self.samples) if self.samples else self.dataset, **options)
        generator = torch.Generator().manual_seed(self.seed + self.epoch - 1)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        left = order[self.samples:]
        left += islice(cycle(order), -len(left) % self.world_size)
        return DataLoader(self.dataset, sampler=left[rank::self.world_size], **options)

    def state_dict(self) -> dict[str, int]:
        """The place in the data: the epoch, the samples of it that all ranks together had, and the order's seed."""
        return {"epoch": self.epoch, "samples": self.samples, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` was taken, also with another number of ranks or another batch size.

        A running loop goes on there; otherwise the next one does.
        """
        self.epoch, self.samples, self.seed, self.moved = state["epoch"], state["samples"], state["seed"], True
        if not isinstance(self.dataset, IterableDataset) and not self._batches(len(self.dataset) - self.samples):
            self.samples = 0


class _Rest(IterableDataset):
    """A stream without its first samples."""

    def __init__(self, stream: IterableDataset, given: int):
        self.stream, self.given = stream, given

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.stream), self.given, None)


# --- The engine -------------------------------------------------------------------------------------------------------


CHECKED = {bool: "True or False", str | os.PathLike: "the path of a folder"}  # types that a call's arguments must have


def _by_all_ranks(*own: str) -> Callable:
    """A call that every rank must make, with the same arguments except ``own``; otherwise all ranks raise."""
    def decorate(method: Callable) -> Callable:
        """``method``, with the checks before it."""
        signature, name = inspect.signature(method), f"{method.__name__}()"

        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            """Meet, agree on the arguments, check their types, and run the method."""
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = {key: os.fspath(value) if isinstance(value, os.PathLike) else value
                     for key, value in bound.arguments.items() if key not in ("self", *own)}
            if self.world_size > 1:
                zero.meet(name, self.config.collective_timeout())
                zero.agree(lambda: [name, *(f"{name}, where {key} is {value!r}" for key, value in given.items())],
                           same=True)
            for key, value in given.items():
                kind = signature.parameters[key].annotation
                _check(key, value, kind not in CHECKED or isinstance(value, kind), CHECKED.get(kind, ""))
            return method(self, *args, **kwargs)

        return call
    return decorate


def _reads(path: str, meaning: str) -> Callable[["_State"], Any]:
    """A method that returns the engine's attribute at ``path``."""
    get = operator.attrgetter(path)

    def read(self: "_State") -> Any:
        return get(self)

    read.__doc__ = meaning
    return read


class _State(nn.Module):
    """Engine, first part: its state, its config, and where training is."""

    def __init__(self, model: nn.Module, config: Config, precision: amp.Precision, device: torch.device,
                 local_rank: int, started_process_group: bool):
        super().__init__()
        self.module, self.config, self.precision = model, config, precision
        self.device, self.local_rank, self.global_rank = device, local_rank, dist.get_rank()
        self.world_size, self._started_process_group = dist.get_world_size(), started_process_group
        self.optimizer: Optimizer | None = None
        self.lr_scheduler: Any = None
        self.loader: ShardedLoader | None = None
        self.checkpointing: recompute.Checkpointing | None = None
        self.scaler = precision.make_scaler()
        self.global_steps = self.global_samples = self.skipped_steps = self._micro_steps = 0
        self._window = 0  # micro-batches of the accumulation window that are done
        self._chosen_boundary: bool | None = None  # by set_gradient_accumulation_boundary()
        self._in_no_sync = self._step_applied = False
        self._scaled = False  # scale() has returned a loss whose backward has not been seen yet
        self._incomplete = False  # the last backward() raised
        self._grad_norm = 0.0
        self._writer: tuple[ThreadPoolExecutor, dist.ProcessGroup] | None = None  # of asynchronous saves
        self._writing: Future | None = None
        self._progress = _Progress(self)

    # The config's values.

    train_batch_size = _reads("config.train_batch_size", "Samples per optimizer step, over all ranks.")
    train_micro_batch_size_per_gpu = _reads("config.train_micro_batch_size_per_gpu", "Samples per rank and backward.")
    gradient_accumulation_steps = _reads("config.gradient_accumulation_steps", "Micro-batches per optimizer step.")
    gradient_clipping = _reads("config.gradient_clipping", "The largest global gradient norm; 0: no clipping.")
    steps_per_print = _reads("config.steps_per_print", "Optimizer steps between progress lines; None: none.")
    wall_clock_breakdown = _reads("config.wall_clock_breakdown", "Whether each step's times are printed.")
    zero_optimization_stage = _reads("config.zero_optimization.stage", "The ZeRO stage, see the top of zero.py.")
    fp16_enabled = _reads("config.fp16.enabled", "Whether the model computes in fp16.")
    bfloat16_enabled = _reads("config.bf16.enabled", "Whether the model computes in bf16.")
    loss_scale = _reads("scaler.scale", "The loss is multiplied by it before backward; 1.0 except in fp16.")
    was_step_applied = _reads("_step_applied", "Whether the last step() updated: at a boundary, and not skipped.")
    get_global_grad_norm = _reads("_grad_norm", "The last update's 2-norm of the averaged gradient, before clipping.")

    def __getattr__(self, name: str) -> Any:
        """An attribute set on the engine, else the model's own, as in DeepSpeed."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module" or name.startswith("__"):  # for example while a copy is made
                raise
        try:
            return getattr(self.module, name)
        except AttributeError as error:
            raise AttributeError(f"neither the engine nor its model has the attribute {name!r} ({error}){ELSEWHERE}"
                                 ) from None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_State":
        """``to()``, ``cpu()``, ``half()`` and the like call it; at stage 3 only what changes nothing is possible."""
        if not self.zero.sharded.parameters:
            return super()._apply(fn, recurse)
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            probe = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
            if fn(probe) is not probe:
                raise RuntimeError(
                    f"the model is sharded (stage 3): it stays on {self.device}, in the dtypes that fp16, bf16 and "
                    "data_types in the config give it; consolidated_fp32_state_dict() gives a whole copy, and "
                    "save_16bit_model() saves one")
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:  # of copies too
        raise TypeError("an engine can't be copied or pickled, as it speaks for its process; copy engine.module, at "
                        "stage 3 too, or call save_checkpoint()")

    # Changes between steps. Every rank must make them.

    @_by_all_ranks()
    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples per optimizer step by changing the accumulation steps.

        ``train_batch_size`` must be a multiple of the micro-batch size times the ranks (ValueError on every rank).
        """
        one = self.train_micro_batch_size_per_gpu() * self.world_size
        self._check_size("train_batch_size", train_batch_size, one)
        self.config.train_batch_size = train_batch_size
        self.config.gradient_accumulation_steps = train_batch_size // one
        self._tell_boundary()

    @_by_all_ranks()
    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples per rank and backward pass, and with it ``train_batch_size``; the caller feeds them.

        Refused where ``initialize()`` made the data loader, whose micro-batches keep their size.
        """
        self._check_size("micro_batch_size", micro_batch_size, 1)
        if self.loader is not None:
            raise ValueError(f"micro_batch_size is {micro_batch_size}, but the data loader that initialize() made "
                             f"gives {self.loader.batch_size}; make a loader of your own to change it")
        self.config.train_micro_batch_size_per_gpu = micro_batch_size
        self.config.train_batch_size = micro_batch_size * self.gradient_accumulation_steps() * self.world_size

    def _check_size(self, name: str, value: Any, multiple: int) -> None:
        _check(name, value, _is_whole(value, 1) and value % multiple == 0, "a whole number from 1 up" + (
            f" that {multiple} divides: the micro-batch size times the ranks" if multiple > 1 else ""))
        if any(zero.gather(self._inside_window())):
            raise ValueError(f"{name} is {value} inside an accumulation window; allowed: after the step() that ends it")

    def _inside_window(self) -> bool:
        """Whether there are gradients that no step has used."""
        return bool(self._window) or self.zero.is_inside_window

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Decide from now on, in place of the engine's counting, whether the current micro-batch ends its window.

        Call it before its ``backward()``. The divisor of gradients stays ``gradient_accumulation_steps``.
        """
        _check("is_boundary", is_boundary, isinstance(is_boundary, bool), "True or False")
        if not self.config.managed_gradient_accumulation:
            raise ValueError("set_gradient_accumulation_boundary() with managed_gradient_accumulation false: there "
                             "every step() updates")
        self._chosen_boundary = is_boundary
        self._tell_boundary()

    def compile(self, backend: str | Callable = "inductor", compile_kwargs: dict[str, Any] | None = None,
                schedule: Any = None, compiled_autograd_enabled: bool = False) -> None:
        """Compile the model's blocks, or a model without blocks, with ``torch.compile``; the last two are refused.

        A graph of the whole model would return all gradients at its end: no reduction would overlap with it. Modes that
        replay CUDA graphs are refused: they overwrite the gradients that buckets have taken from the last replay.
        """
        options = compile_kwargs or {}
        if schedule is not None or compiled_autograd_enabled:
            raise ValueError(f"schedule is {schedule!r} and compiled_autograd_enabled {compiled_autograd_enabled!r}; "
                             "allowed: None and False, as there are no compiler passes here but PyTorch's")
        mode, graphs = options.get("mode"), (options.get("options") or {}).get("triton.cudagraphs")
        if mode in ("reduce-overhead", "max-autotune") or graphs or backend == "cudagraphs":
            raise ValueError(f"backend is {backend!r}, compile_kwargs {options!r}: it replays CUDA graphs, which write "
                             "over gradients that are still needed; allowed: max-autotune-no-cudagraphs, for example")
        for block in (zero.find_blocks(self.module) or {"": self.module}).values():
            block.compile(backend=backend, **options)

    # Where training is.

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last of its accumulation window, so that ``step()`` will update.

        Always False with ``managed_gradient_accumulation`` false, where the caller alone knows.
        """
        if self._chosen_boundary is not None:
            return self._chosen_boundary
        return self.config.managed_gradient_accumulation and self._window + 1 >= self.gradient_accumulation_steps()

    @property
    def micro_steps(self) -> int:
        """Calls of ``step()``. Setting it, such as to 0 at an epoch's start, also sets the place in the window."""
        return self._micro_steps

    @micro_steps.setter
    def micro_steps(self, count: int) -> None:
        self._micro_steps, self._window = count, count % self.gradient_accumulation_steps()
        self._tell_boundary()

    def get_lr(self) -> list[float]:
        """The rate in force in each param group."""
        return [group["lr"] for group in self._groups("get_lr()")]

    def set_lr(self, lr: float | list[float]) -> None:
        """Set one rate for all param groups, or one for each. A scheduler sets its own at its next step."""
        groups = self._groups("set_lr()")
        rates = list(lr) if isinstance(lr, (list, tuple)) else [lr] * len(groups)
        _check("lr", lr, len(rates) == len(groups) and all(
            isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 <= rate < math.inf for rate in rates),
            f"a number from 0 up, or a list of one for each of the {len(groups)} param groups")
        for group, rate in zip(groups, rates):
            group["lr"] = float(rate)

    def get_mom(self) -> list[Any]:
        """Each param group's momentum: Adam's ``betas``, or ``momentum``, or 0."""
        return [group.get("betas", group.get("momentum", 0)) for group in self._groups("get_mom()")]

    def _groups(self, caller: str) -> list[dict[str, Any]]:
        """The optimizer's param groups, for a call that needs an optimizer."""
        if self.optimizer is None:
            raise RuntimeError(f"{caller} needs an optimizer; give initialize() one, or its config a section for it")
        return self.optimizer.param_groups

    def _tell_boundary(self) -> None:
        """Set in ``zero`` whether the next backward pass ends its accumulation window, and what makes sums means.

        The optimizer shows the loss scale, as in DeepSpeed, for reading only.
        """
        if self.optimizer is not None:
            self.optimizer.loss_scale = self.optimizer.cur_scale = self.scaler.scale
        self.zero.boundary = self.is_gradient_accumulation_boundary() and not self._in_no_sync
        ranks = 1 if self.config.gradient_allreduce_op == "sum" else self.world_size
        steps = self.gradient_accumulation_steps() if self.scaler.scale == 1 else 1  # see scale()
        self.zero.divisor = float(ranks * steps) * self.scaler.scale


class _Training(_State):
    """Engine, second part: one step, phase by phase; see the top of this file."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; tensors among the arguments move to its device, and are cast as ``amp.py`` says."""
        if self.device.type != "cpu":
            args, kwargs = _to_device(args, self.device), _to_device(kwargs, self.device)
        args, kwargs = self.precision.cast_inputs(args), self.precision.cast_inputs(kwargs)
        self._check_scaled()
        gathers = self.zero.sharded.parameters
        if gathers and self.training and torch.is_grad_enabled():  # it needs the other ranks
            self.communicator.enter(self.micro_steps + 1)
        # Where weights are gathered, autocast's cached copy of a weight would outlive it.
        with self._phase("forward"), self.precision.autocast(cache=not gathers):
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Run backward on ``loss``, a scalar, and reduce gradients; returns the loss over the accumulation steps.

        The update takes the mean over the window's micro-batches. With ``scale_wrt_gas=False`` this loss counts fully,
        as in a sum.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"backward() takes the loss, a tensor of one element; given: {given}")
        self.communicator.enter(self.micro_steps + 1)
        self._progress.add_loss(loss.detach())
        steps = self.gradient_accumulation_steps()
        with self._phase("backward"):
            self._check_scaled()
            scaled = self.scale(loss if scale_wrt_gas else loss * steps)
            self._incomplete = True  # until all of it has run
            scaled.backward(retain_graph=retain_graph)
            self._scaled = False
            self.zero.finish_backward()
            self._incomplete = False
        return loss / steps if scale_wrt_gas else loss

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for callers who run backward themselves.

        They call ``engine.scale(loss).backward()``; the next forward or ``step()`` then reduces the gradients. Without
        a loss scale the result is the loss itself, and ``loss.backward()`` does the same.
        """
        if self._incomplete:  # the script went on without step(), so on every rank
            logger.warning("the last backward() raised: the gradients of its window are dropped")
            self.zero_grad()
        self._scaled = True
        if self.scaler.scale == 1:
            return loss
        # fp16 has no room for a sum over micro-batches: there the loss is divided before it.
        factor = self.scaler.scale / self.gradient_accumulation_steps()
        return (loss if loss.dtype == torch.float64 else loss.float()) * factor

    def _spoil(self) -> None:
        """If the last ``backward()`` raised, perhaps on this rank only: all ranks drop its window at its end."""
        if self._incomplete:
            self.zero.spoiled, self._incomplete = True, False
            self.zero.finish_backward()  # the others have, if it is this rank alone

    def _check_scaled(self) -> None:
        """Raise where the caller's own ``backward()`` ran without the loss scale."""
        scaled, self._scaled = self._scaled, False
        if self.scaler.scale != 1 and not (scaled or self._incomplete) and self.zero.has_taken:
            self.zero.clear_gradients()
            raise RuntimeError("loss.backward() without the loss scale; call engine.backward(loss), or "
                               "engine.scale(loss).backward(). The window's gradients were dropped")

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Call it after every ``backward()``; at the end of an accumulation window it updates the weights.

        ``lr_kwargs`` go to the scheduler's ``step()``: ``{"metrics": loss}`` for ReduceLROnPlateau. With
        ``managed_gradient_accumulation`` false every call updates, with the gradients since the last one.
        """
        self._groups("step()")
        if self._in_no_sync:
            raise RuntimeError("step() inside no_sync(): leave no_sync() before the window's last backward()")
        self._step_applied = False
        self._spoil()
        self.communicator.enter(self.micro_steps + 1)
        self._check_scaled()
        if self.is_gradient_accumulation_boundary() or not self.config.managed_gradient_accumulation:
            self._update(lr_kwargs)
        else:
            self.zero.end_if_pending()  # the caller ran backward() on the loss itself, perhaps
            self._window += 1
        self._micro_steps += 1
        self._tell_boundary()

    def flush(self, lr_kwargs: dict[str, Any] | None = None) -> bool:
        """Update now, with the mean over the micro-batches of a window that is not full; False if it is empty.

        For the end of an epoch whose micro-batches the accumulation steps do not divide. Every rank must call it, after
        equally many micro-batches. With ``managed_gradient_accumulation`` false, ``step()`` ends any window instead.
        """
        self._groups("flush()")
        self._spoil()
        self._check_scaled()
        if not self._window:
            return False
        self._update(lr_kwargs, fraction=self._window / self.gradient_accumulation_steps())
        self._tell_boundary()
        return True

    def _update(self, lr_kwargs: dict[str, Any] | None, fraction: float = 1.0) -> None:
        """Update the weights with the window's gradients; ``fraction`` is how full it is."""
        if self.lr_scheduler is not None:  # check the arguments of its step() before anything changes
            try:
                inspect.signature(self.lr_scheduler.step).bind(**({} if lr_kwargs is None else lr_kwargs))
            except TypeError as error:
                raise ValueError(f"lr_kwargs is {lr_kwargs!r}; allowed: a dict of arguments for the step() of "
                                 f"{type(self.lr_scheduler).__name__} ({error})") from None
        with self._phase("update"):
            result = self.zero.step(self.gradient_clipping(), self.zero.divisor * fraction,
                                    self.precision.skips_overflow)
        self._grad_norm, self._window, self._step_applied = result.norm, 0, not (result.overflow or result.spoiled)
        if result.spoiled:
            _warn("step left out: a backward() of its window raised on some rank, so all drop the window's gradients")
            return
        before, self.skipped_steps = self.scaler.scale, self.skipped_steps + result.overflow
        self.scaler.update(result.overflow, result.culprit)
        self._tell_boundary()
        if result.overflow:
            _warn("step skipped, nothing was changed: the gradient of %s is not finite%s (%d skipped so far)",
                  result.culprit or "a parameter", self.scaler.outcome(before), self.skipped_steps)
            return
        if self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        self.global_steps += 1
        self.global_samples += round(fraction * self.train_batch_size())
        self._progress.after_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the window's gradients so far; the window begins anew."""
        self.zero.clear_gradients()
        super().zero_grad(set_to_none)
        self._window, self._incomplete = 0, False
        self._tell_boundary()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside add up on this rank alone; the next ``step()``, outside, takes the mean over ranks."""
        if self.zero_optimization_stage() >= 2:
            raise RuntimeError(f"no_sync() at stage {self.zero_optimization_stage()}: a rank keeps only its shard of "
                               "the gradients, so every backward() must reduce them. gradient_accumulation_steps needs "
                               "no no_sync(); to keep gradients local use stage 0 or 1")
        self._in_no_sync = True
        self._tell_boundary()
        try:
            yield
        finally:
            self._in_no_sync = False
            self._tell_boundary()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A timed phase. Where PyTorch's error says too little, add what to do."""
        try:
            with self.communicator.phase(name):
                yield
        except (RuntimeError, ValueError) as error:
            if "support saved tensor hooks" in str(error):
                raise RuntimeError(zero.NO_TRANSFORMS) from error
            advice = self.precision.advice(error)
            if not advice:
                raise
            raise type(error)(f"{error}{advice}") from error


class Engine(_Training):
    """A model with everything that trains it, in three parts. Call it as you would call the model.

    module           the model, on ``device``, the same on every rank
    optimizer        a torch optimizer, or None for an engine that only evaluates
    lr_scheduler     stepped by ``step()``, or None
    zero             the sharded model: its buckets, the order of reductions, the update
    communicator     the collectives, and the times of a step's phases
    checkpointing    recomputes activations, or None; its ``report()`` has bytes kept and seconds recomputed
    global_steps     optimizer steps taken; ``skipped_steps`` counts those that an overflow left out
    global_samples   samples that these steps used, over all ranks
    micro_steps      calls of ``step()``: micro-batches on this rank

    Any other attribute is the model's own: ``engine.generate`` is ``engine.module.generate``. For names of DeepSpeed's
    engine that are absent here, see tutorials/coming_from_deepspeed.md.
    """

    # Third part: save and resume.

    @_by_all_ranks("client_state")
    def save_checkpoint(self, save_dir: str | os.PathLike, tag: str | None = None,
                        client_state: dict[str, Any] | None = None, save_latest: bool = True,
                        exclude_frozen_parameters: bool = False) -> bool:
        """Save everything that training needs under ``save_dir/tag``; every rank must call it.

        Each rank writes its own share, into files whose names belong to this save alone. Once all of it has reached the
        disk, its index replaces the previous one, and ``latest`` changes last. So whenever a save dies, the one before
        it still loads, and two concurrent saves never mix. Other files in that folder stay; a link, a file or another
        program's ``meta.json`` in its place is refused before anything is written. Inside an accumulation window the
        gradients so far are not saved, and a warning says so.

        tag            a folder name, or a number; default: ``global_step`` and the step
        client_state   the caller's plain data (numbers, text, tensors, containers), which load_checkpoint() returns to
                       this rank; on another number of ranks rank 0's to all
        save_latest    make it the one that load_checkpoint() takes without a tag
        exclude_frozen_parameters   leave them out; such a checkpoint loads with ``load_module_strict=False``

        Returns True. With ``checkpoint.async`` it returns once the copy is made, and the next save, load, destroy() or
        the end of the program waits for the rest. Raises CheckpointError on every rank if any of them can't write (with
        ``async`` where it is waited for; the log has it at once); the previous checkpoint stays.
        """
        folder = Path(save_dir).absolute() / _folder_name(f"global_step{self.global_steps}" if tag is None else tag)
        self.wait_for_save()
        if self._inside_window():
            _warn("save_checkpoint() inside an accumulation window: its gradients so far are not saved, and a resumed "
                  "run goes on without them")
        save = _Save(self, folder, client_state, save_latest, not exclude_frozen_parameters)
        if not self.config.checkpoint.async_:
            save.write()
            return True
        if self._writer is None:  # a thread that the program's end waits for, and a process group of its own
            self._writer = (ThreadPoolExecutor(1, "checkpoint"),
                            dist.new_group(backend="gloo", timeout=self.config.collective_timeout()))
        thread, group = self._writer
        self._writing = thread.submit(save.write, group)
        self._writing.add_done_callback(  # logged at once, since perhaps no wait_for_save() follows
            lambda done: done.exception() and logger.error("%s", done.exception()))
        return True

    def wait_for_save(self) -> None:
        """Wait for an asynchronous save; raises its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @_by_all_ranks()
    def load_checkpoint(self, load_dir: str | os.PathLike, tag: str | None = None, load_module_strict: bool = True,
                        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True,
                        load_module_only: bool = False) -> tuple[str | None, dict[str, Any] | None]:
        """Resume a saved run, at any stage, number of ranks or precision. Every rank must call it.

        tag                        default: the one that the file ``latest`` names
        load_module_strict         False: parameters and buffers that the model or the checkpoint lacks are left alone
        load_optimizer_states      False: the optimizer starts anew, from the loaded weights
        load_lr_scheduler_states   False: the schedule goes on where it is, from its next step; until then the saved
                                   rates hold, unless the optimizer starts anew
        load_module_only           only the weights and buffers

        Returns the folder and the saved ``client_state``; ``(None, None)``, with a warning, where nothing was saved.
        Raises CheckpointError on every rank, with nothing changed, where the checkpoint is damaged or of another model,
        optimizer or schedule. The next accumulation window begins without gradients. A loop over the engine's loader
        goes on at the loaded place; without one, the next loop does.
        """
        tag = None if tag is None else _folder_name(tag)
        self.wait_for_save()
        nothing_there = tag is None and not (Path(load_dir) / "latest").exists()
        folder = _on_rank_0(lambda: None if nothing_there else _checkpoint_folder(load_dir, tag))
        if folder is None:
            _warn("load_checkpoint(): there is no checkpoint in %s, so nothing was loaded", load_dir)
            return None, None
        self.zero.thaw()  # the checkpoint may have state of what is trained by now
        with_optimizer = load_optimizer_states and not load_module_only and self.optimizer is not None
        with_schedule = load_lr_scheduler_states and not load_module_only and self.lr_scheduler is not None
        with closing(_Reader(folder)) as reader:
            seen = _agreed(lambda: _check_fits(self, reader, load_module_strict, with_optimizer, with_schedule))
            if len(set(seen)) > 1:
                raise CheckpointError(f"{folder} was saved anew while it was read; load it again")
            _take_over(self, reader, with_optimizer)
        if not load_module_only:
            _restore(self, reader.state, with_optimizer, with_schedule)
        self.zero_grad()  # last, as the number of micro-batches that it has restored also sets the place in a window
        return str(folder), _own(self, reader.state, "client_state")

    @_by_all_ranks()
    def consolidated_fp32_state_dict(self) -> dict[str, Tensor]:
        """The whole model's state dict on rank 0, in fp32 from the masters; empty elsewhere. All ranks must call it."""
        return self._whole_state_dict(torch.float32)

    @_by_all_ranks()
    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict | None:
        """The whole state dict on rank 0, in the model's compute dtypes; None elsewhere. All ranks must call it."""
        return self._whole_state_dict(None, not exclude_frozen_parameters) or None

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whether whole models can be saved at stage 3: always, here."""
        return True

    @_by_all_ranks()
    def save_16bit_model(self, save_dir: str | os.PathLike, save_filename: str = "pytorch_model.bin",
                         exclude_frozen_parameters: bool = False) -> bool:
        """Save the whole model's state dict, in its compute dtypes, as one file; every rank must call it."""
        _check("save_filename", save_filename, isinstance(save_filename, str) and save_filename, "the name of a file")
        whole = self._whole_state_dict(None, not exclude_frozen_parameters)
        _on_rank_0(lambda: _write_whole(whole, Path(save_dir) / save_filename))
        return True

    def _whole_state_dict(self, dtype: torch.dtype | None, with_frozen: bool = True) -> dict[str, Tensor]:
        """Parameters, read one after the other, and buffers; tied ones are one tensor."""
        whole: dict[int, Tensor] = {}
        for p in self.module.parameters():
            if with_frozen or p.requires_grad:
                value = zero.safe_get_full_fp32_param(p).to(dtype or p.dtype)
                whole |= {id(p): value.cpu()} if self.global_rank == 0 else {}
        named = {name: whole[id(p)] for name, p in self.module.named_parameters(remove_duplicate=False)
                 if id(p) in whole}
        extra: dict[str, Any] = {}
        _agreed(lambda: extra.update(_extra_state(self.module)))  # on every rank, as it may need the others
        return named | _copies(_persistent_buffers(self.module, shared=True)) | extra if self.global_rank == 0 else {}

    # Its memory, and its end.

    def memory_report(self) -> zero.Estimate:
        """The bytes that this rank holds now, by category, compared with ``estimate``; print it."""
        found = zero.estimate(self.module, self.config.zero_optimization, self.world_size,
                              dtypes=self.precision.path, device=self.device, rank=self.global_rank,
                              micro_batches=self.gradient_accumulation_steps(),
                              groups=zero.groups_to_estimate(self.zero))
        return replace(found, measured=zero.measure(self.zero, self.module))

    def destroy(self) -> None:
        """Release the model, and the process group if this engine started it; the engine can't train any more.

        Raises RuntimeError where another rank still trains on more micro-batches.
        """
        self.wait_for_save()
        self._progress.print_traffic()
        if self.checkpointing is not None:
            self.checkpointing.remove()
        try:
            self.zero.release()
        finally:
            if self._started_process_group and dist.is_initialized():
                dist.destroy_process_group()


class _Progress:
    """What rank 0 prints while training: progress lines, each step's times, and the traffic."""

    def __init__(self, engine: Engine):
        self.engine, self.every = engine, engine.config.steps_per_print
        self.loss_sum: Tensor | float = 0.0
        self.losses, self.since = 0, time.perf_counter()

    def add_loss(self, loss: Tensor) -> None:
        """Add one micro-batch's loss."""
        if self.every:
            self.loss_sum, self.losses = self.loss_sum + loss.float(), self.losses + 1

    def after_step(self) -> None:
        """Print what is due. Every rank must call it, as the loss is averaged over them."""
        if self.engine.config.wall_clock_breakdown:
            self._print(self._times())
        if self.every and self.engine.global_steps % self.every == 0:
            self._print(self._line())
            self.print_traffic()

    def _line(self) -> str:
        """Mean loss given to backward(), rate, and samples/s, since the last line."""
        engine, now = self.engine, time.perf_counter()
        mean = torch.as_tensor(self.loss_sum / max(1, self.losses), device=engine.device)
        if engine.world_size > 1:
            dist.all_reduce(mean)
        loss = f"loss {float(mean) / engine.world_size:.4f}, " if self.losses else ""
        rates, speed = engine.get_lr(), self.every * engine.train_batch_size() / (now - self.since)
        self.loss_sum, self.losses, self.since = 0.0, 0, now
        return f"{loss}lr {', '.join(f'{rate:.4g}' for rate in rates)}, {speed:.1f} samples/s"

    def _times(self) -> str:
        """Where an optimizer step's time went; on a GPU the host waits for it here.

        Communication is the time spent waiting for it and adding up, offload that of copying gradients down. The other
        phases do not include these. Communication that overlaps with computation costs no time and is not in it.
        """
        spent = self.engine.communicator.clock.read()  # begins anew
        offloads = self.engine.config.zero_optimization.offload_optimizer.device != "none"
        phases = ("forward", "backward", "communication", *(["offload"] if offloads else []), "update")
        return ", ".join(f"{name} {spent[name]:.1f} ms" for name in phases)

    def _print(self, text: str) -> None:
        if self.engine.global_rank == 0:
            print(f"step {self.engine.global_steps}: {text}", flush=True)

    def print_traffic(self) -> None:
        """The table that ``comms_logger`` asks for."""
        if self.engine.config.comms_logger.enabled and self.engine.global_rank == 0:
            print(zero.traffic_table(self.engine.communicator.traffic), flush=True)


# --- Save and resume --------------------------------------------------------------------------------------------------
#
# A checkpoint is a folder. In the names of its files, ID is the save's own, so that two saves never mix:
#     meta.json            the index: the parameters, and where each stretch of them lies; with its own checksum
#     rank_00000.ID.bin    what rank 0 saved, as raw numbers, one stretch after the other; so for every rank
#     state.ID             plain data: counters, schedule, generators, buffers, and state that is no value per element
#     meta.ID              a claim: the files of this ID are no checkpoint, or soon will be none
# Next to the folders is the file latest, with the name of the one that load_checkpoint() takes.
#
# The index of a save begins as its claim, on which rank 0 has a lock as long as the save lives; one rename makes it the
# checkpoint's meta.json. A checkpoint that a newer save replaces, or that keep_last drops, gets a claim again. Every
# save removes the files of claims that nobody has locked. So the remains of a dead save go, and another job's stay.


CheckpointError = zero.CheckpointError

VERSION = 2     # of this format
CHUNK = 2**20   # bytes that are read at a time to check them


def _agreed(work: Callable[[], Any], group: Any = None) -> list[Any]:
    """Every rank's result of ``work()``. If it raises on any rank, all ranks raise CheckpointError."""
    return zero.agree(work, kind=CheckpointError, group=group)


def _on_rank_0(work: Callable[[], Any], group: Any = None) -> Any:
    """Rank 0's result of ``work()``, on every rank."""
    return _agreed(work if dist.get_rank() == 0 else lambda: None, group)[0]


class _Piece(NamedTuple):
    """A share of ``zero.shares``, as the index describes it."""
    name: str
    key: str
    start: int
    end: int
    dtype: str
    file: str
    offset: int    # in bytes, in the file
    size: int      # in bytes
    checksum: int  # crc32
    shape: list[int] | None = None  # of state in a shape of its own; None: 1-D, from start to end


# Files: for each, the writer and the reader.


@contextmanager
def _synced(path: Path) -> Iterator[Any]:
    """A new file, which has reached the disk when the block ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` reach the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _in_host_memory(shares: Iterable[zero.Share], device: torch.device, most: int = 2**26) -> Iterator[zero.Share]:
    """The shares with their numbers in host memory. A GPU's come through pinned memory, about ``most`` bytes at a time.

    A copy that does not block goes into memory that PyTorch pins, rounds up, and keeps for the next one.
    """
    waiting: list[zero.Share] = []
    size = 0
    for share in chain(shares, [None]):  # None: those that wait are the last
        if waiting and (share is None or size >= most):
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            yield from waiting
            waiting, size = [], 0
        if share is not None:
            *place, tensor = share
            waiting.append((*place, tensor.detach().to("cpu", non_blocking=True)))
            size += tensor.nbytes


def _write_pieces(shares: Iterable[zero.Share], path: Path) -> list[dict]:
    """Write a rank's shares into a file of its own, one after the other; returns the pieces of the index."""
    offset, pieces = 0, []
    with _synced(path) as file:
        for name, key, start, tensor in shares:
            data = _memory(tensor.contiguous())
            shape = None if tensor.dim() == 1 else list(tensor.shape)
            pieces.append(_Piece(name, key, start, start + tensor.numel(), str(tensor.dtype)[6:], path.name, offset,
                                 len(data), zlib.crc32(data), shape)._asdict())
            file.write(data)
            offset += len(data)
    return pieces


def _write_whole(whole: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as a file, which replaces another one only when it is complete."""
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with _synced(unfinished) as file:
            torch.save(whole, file)
        os.replace(unfinished, path)
    except RuntimeError as error:  # PyTorch's own, after the system's
        raise CheckpointError(f"{path} can't be written ({error.__context__ or error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _write_index(path: Path, index: dict[str, Any]) -> None:
    content = json.dumps(index | {"version": VERSION}, sort_keys=True)
    with _synced(path) as file:
        file.write(f'{{"checksum": {zlib.crc32(content.encode())}, "content": {content}}}'.encode())


def _read_index(folder: Path) -> dict[str, Any]:
    """The contents of ``meta.json``; CheckpointError unless it is the undamaged index of a checkpoint."""
    path = folder / "meta.json"
    try:
        wrapped = json.loads(path.read_text())
        index, checksum, version = wrapped["content"], wrapped["checksum"], wrapped["content"].get("version", 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be read ({error}): this is no complete checkpoint; load another tag"
                              ) from None
    if checksum != zlib.crc32(json.dumps(index, sort_keys=True).encode()):
        raise CheckpointError(f"{path} is damaged: its checksum does not match; load another tag")
    if version != VERSION:
        raise CheckpointError(f"{path} is of version {version} of the format, and this program reads version "
                              f"{VERSION}; load another tag, or load it with the program that wrote it")
    return index | {"checksum": checksum}


def _to_bytes(value: Any, place: str = "") -> bytes:
    """``value`` as the contents of a file that loads safely; CheckpointError names the part that can't be saved so."""
    value, stored = tree_map_only(np.generic, np.generic.item, value), io.BytesIO()
    try:
        torch.save(value, stored)
        _from_bytes(stored.getvalue())
    except Exception:
        parts = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list | tuple) else {}
        for key, part in parts.items():
            _to_bytes(part, f"{place}[{key!r}]" if place else key)
        raise CheckpointError(f"{place}, a {type(value).__name__}, can't be saved so that it loads safely; allowed: "
                              "numbers, text, tensors and containers of these") from None
    return stored.getvalue()


def _from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def _folder_name(tag: Any) -> str:
    """The name of a tag's folder; ValueError for what is neither a plain folder name nor a number."""
    name = str(tag) if isinstance(tag, (str, Real)) and not isinstance(tag, bool) else ""
    if (not name or name != Path(name).name or name in (".", "..", "latest") or not name.isprintable()
            or name.startswith((".", " ")) or name.endswith((".", " "))):
        raise ValueError(f"tag is {tag!r}; allowed: a plain folder name, such as 'step100', or a number")
    return name


def _checkpoint_folder(directory: str | os.PathLike, tag: Any = None) -> Path:
    """The folder of ``tag``, or of the tag that ``latest`` names."""
    latest = Path(directory) / "latest"
    try:
        return Path(directory) / _folder_name(latest.read_text("utf-8").strip() if tag is None else tag)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"there is no checkpoint in {directory}, which has no file latest; give a tag") from None
    except ValueError as error:
        if tag is not None:
            raise
        raise CheckpointError(f"{latest} is damaged: it must hold the name of a checkpoint's folder ({error}); write "
                              "one into it, or load by a tag") from None


# The life of a save: take, claim, write, publish, sweep.


class _Save:
    """A checkpoint on its way to the disk."""

    def __init__(self, engine: Engine, folder: Path, client_state: Any, save_latest: bool, with_frozen: bool):
        """Take the data to write, and on rank 0 make the folder and the claim. All ranks must call it."""
        self.folder, self.save_latest, self.keep_last = folder, save_latest, engine.config.checkpoint.keep_last
        self.claim: Any = None  # rank 0's file, open and locked
        states = _agreed(lambda: self._take(engine, client_state, with_frozen))
        self.id = _on_rank_0(lambda: self._begin(states))

    def _take(self, engine: Engine, client_state: Any, with_frozen: bool) -> bytes:
        """Take this rank's shares; returns its plain data as the contents of a file."""
        if not isinstance(client_state, Mapping | None):
            raise CheckpointError(f"client_state is {client_state!r}; allowed: a dict, or None")
        self.index = {"step": engine.global_steps, "time": time.time_ns(), "ranks": engine.world_size,
                      "stage": engine.zero_optimization_stage(), "parameters": zero.describe(engine.zero, with_frozen)}
        self.shares = _in_host_memory(zero.shares(engine.zero, with_frozen), engine.device)
        if engine.config.checkpoint.async_:
            self.shares = [(*what, tensor.clone()) for *what, tensor in self.shares]
        return _to_bytes(_state_of(engine) | {"client_state": dict(client_state or {})})

    def _begin(self, states: list[bytes]) -> str:
        """Refuse a folder of another program, and claim this save's files; returns their ID."""
        meta, merged = self.folder / "meta.json", io.BytesIO()
        torch.save(_merged([_from_bytes(data) for data in states]), merged)
        self.state = merged.getvalue()
        if self.folder.is_symlink():
            raise CheckpointError(f"{self.folder} is a link, which a save would write through; allowed: a tag whose "
                                  "folder is none")
        if meta.exists():
            try:
                _read_index(self.folder)
            except CheckpointError:
                raise CheckpointError(f"{meta} is there, and is no index of a checkpoint that this program can read; "
                                      "move it away, or save under another tag") from None
        _sweep(self.folder.parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.id = secrets.token_hex(8)
        self.claim = open(self._file("meta"), "x")
        with suppress(OSError):  # a system without locks: _sweep can't lock it either, and leaves it
            _lock(self.claim)
        return self.id

    def _file(self, what: int | str) -> Path:
        """A rank's file, or another one."""
        return self.folder / (f"rank_{what:05d}.{self.id}.bin" if isinstance(what, int) else f"{what}.{self.id}")

    def write(self, group: Any = None) -> None:
        """Write this rank's file; rank 0 adds the rest and makes it the checkpoint. Uses only ``group``."""
        failure = None
        try:
            pieces = _agreed(lambda: _write_pieces(self.shares, self._file(dist.get_rank())), group)
            _on_rank_0(lambda: self._publish(sum(pieces, [])), group)
        except CheckpointError as error:  # on every rank
            failure = error
        finally:  # as the system does if the process dies
            if self.claim is not None:
                with suppress(OSError):
                    _lock(self.claim, release=True)  # close() would not do where the process was forked since
                self.claim.close()
        _on_rank_0(lambda: _sweep(self.folder.parent), group)
        if failure is not None:
            raise CheckpointError(f"{self.folder} was not saved: {failure}") from failure

    def _publish(self, pieces: list[dict]) -> None:
        """Add the plain data and the index to the ranks' files; then one rename makes them the checkpoint."""
        state, latest, meta = self._file("state"), self._file("latest"), self.folder / "meta.json"
        with _synced(state) as file:
            file.write(self.state)
        files = {path.name: {"size": path.stat().st_size} for path in (
            *map(self._file, range(self.index["ranks"])), state)}
        files[state.name]["checksum"] = zlib.crc32(self.state)
        _write_index(self._file("meta"), self.index | {"files": files, "state": state.name, "pieces": pieces})
        _sync_folder(self.folder)
        if meta.exists():
            _claim_of(self.folder).touch()
        os.replace(self._file("meta"), meta)
        _sync_folder(self.folder)
        if self.save_latest:
            with _synced(latest) as file:
                file.write(self.folder.name.encode())
            os.replace(latest, self.folder.parent / "latest")
        _sync_folder(self.folder.parent)
        for old in [] if self.keep_last is None else _outdated(self.folder, self.keep_last):
            os.replace(old / "meta.json", _claim_of(old))


def _claim_of(folder: Path) -> Path:
    """The claim under which the files of the current checkpoint in ``folder`` go, once its index is gone."""
    return folder / f"meta{Path(_read_index(folder)['state']).suffix}"


def _lock(file: Any, release: bool = False) -> None:
    """Lock a file, or release it; OSError where another process has locked it, or the system has no such locks."""
    try:
        import fcntl  # here, as not all systems have it
    except ImportError:
        raise OSError("no locks on files") from None
    fcntl.flock(file, fcntl.LOCK_UN if release else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sweep(save_dir: Path) -> None:
    """Remove the files of claims that nobody has locked, unless an index names them. Files that can't go stay."""
    for claim in save_dir.glob(f"[!.]*/meta.{'[0-9a-f]' * 16}"):
        folder = claim.parent
        with suppress(OSError, CheckpointError), open(claim) as file:
            _lock(file)
            if not (folder / "meta.json").exists() or _claim_of(folder) != claim:
                for path in [*folder.glob(f"[!m]*{claim.suffix}*"), claim]:
                    path.unlink(missing_ok=True)
                folder.rmdir()  # stays where others' files are in it, or a checkpoint


def _outdated(newest: Path, keep_last: int) -> list[Path]:
    """The checkpoints of the earliest steps, so that ``keep_last`` stay, ``newest`` included.

    Those that ``latest`` or a link names stay, and so do folders without a checkpoint.
    """
    save_dir, found = newest.parent, []
    kept = {path.resolve() for path in save_dir.iterdir() if path.is_symlink()}
    with suppress(CheckpointError, OSError):  # latest is missing, or damaged
        kept.add(_checkpoint_folder(save_dir).resolve())
    for folder in {path.parent for path in save_dir.glob("[!.]*/meta.json")} - {newest}:
        with suppress(CheckpointError):
            index = _read_index(folder)
            found += [] if folder.is_symlink() else [(index["step"], index.get("time", 0), folder)]
    old = [folder for *_, folder in sorted(found)][:max(0, len(found) - keep_last + 1)]
    return [folder for folder in old if folder.resolve() not in kept]


# The life of a load: open, check all, fill. Uses without an engine only open and check.


class _Reader:
    """A checkpoint's folder. Nothing in it is executed: the index is JSON, the rest raw numbers and plain data.

    An opened file stays open: ``read`` returns what ``verify`` has checked, whatever happens to the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, Any] = {}
        self.buffer = torch.empty(CHUNK, dtype=torch.uint8)

    @cached_property
    def index(self) -> dict[str, Any]:
        """The contents of ``meta.json``."""
        return _read_index(self.folder)

    @cached_property
    def pieces(self) -> dict[str, dict[str, list[_Piece]]]:
        """The pieces by parameter and key, in order; they cover each element once."""
        pieces: dict[str, dict[str, list[_Piece]]] = {name: {"": []} for name in self.index["parameters"]}
        for piece in sorted((_Piece(**raw) for raw in self.index["pieces"]), key=lambda piece: piece.start):
            pieces[piece.name].setdefault(piece.key, []).append(piece)
        for name, facts in self.index["parameters"].items():
            for key, parts in pieces[name].items():
                shape = parts[0].shape if parts and parts[0].shape is not None else facts["shape"]
                ends = [0, *(part.end for part in parts)]
                if [part.start for part in parts] != ends[:-1] or ends[-1] != math.prod(shape) or any(
                        part.size != (part.end - part.start) * getattr(torch, part.dtype).itemsize for part in parts):
                    raise CheckpointError(f"{self.folder}: the pieces of {key or 'the values'} of {name} overlap, "
                                          "leave gaps, or have another size than their values; load another tag")
        return pieces

    @cached_property
    def state(self) -> dict[str, Any]:
        """The plain data."""
        name = self.index["state"]
        facts = self.index["files"][name]
        data = bytearray(facts["size"])
        if zlib.crc32(self._fill(memoryview(data), name)) != facts["checksum"]:
            raise CheckpointError(f"{self.folder / name} is damaged: its checksum does not match; load another tag")
        try:
            return _from_bytes(data)
        except UnpicklingError:
            raise CheckpointError(f"{self.folder / name} holds something else than plain data, which weights_only=True "
                                  "refuses to unpickle: it was not written by save_checkpoint(); load another tag"
                                  ) from None

    def keys(self, name: str) -> list[str]:
        """The keys of a parameter's optimizer state that is saved as pieces."""
        return [key for key in self.pieces[name] if key]

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state as ``zero.fill`` takes it."""
        def room(piece: _Piece) -> Any:
            dtype = getattr(torch, piece.dtype)
            return dtype if piece.shape is None else torch.empty(piece.shape[1:], dtype=dtype, device="meta")

        return {name: {key: torch.tensor(value, dtype=getattr(torch, dtype)) if dtype else value
                       for key, (value, dtype) in entries.items()}
                | {key: room(self.pieces[name][key][0]) for key in self.keys(name)}
                for name, entries in self.state["optimizer_state"].items()}

    def verify(self, name: str, key: str = "", start: int = 0, end: float = math.inf) -> None:
        """Raise CheckpointError unless a parameter, or its state, is undamaged from ``start`` to ``end``."""
        for piece in self.pieces[name][key]:
            if piece.shape is None and not (piece.start < end and start < piece.end):
                continue
            checksum = 0
            for low in range(0, piece.size, CHUNK):
                chunk = _memory(self.buffer[:piece.size - low])
                checksum = zlib.crc32(self._fill(chunk, piece.file, piece.offset + low), checksum)
            if checksum != piece.checksum:
                raise CheckpointError(f"{self.folder / piece.file} is damaged: the checksum of "
                                      f"{key or 'the values'} of {name} does not match; load another tag")

    def read(self, name: str, key: str, start: int, out: Tensor, stride: list[int]) -> None:
        """Fill a share of ``zero.shares``, of a parameter whose elements lie by ``stride``."""
        facts = self.index["parameters"].get(name)
        if facts is None:  # not saved, so left as it is
            return
        if stride != facts["stride"] and out.dim() == 1:  # saved from a model with another memory layout
            there = self.whole(name, key)
            flat = torch.empty_strided(there.shape, stride, dtype=there.dtype).copy_(there)
            out.copy_(flat.as_strided((flat.numel(),), (1,))[start:start + len(out)])
            return
        flat = out.view(-1)
        for piece in self.pieces[name][key]:
            low, high = max(start, piece.start), min(start + len(flat), piece.end)
            if low < high:
                part, dtype = flat[low - start:high - start], getattr(torch, piece.dtype)
                values = part if (part.dtype, part.is_cpu) == (dtype, True) else torch.empty(high - low, dtype=dtype)
                self._fill(_memory(values), piece.file, piece.offset + (low - piece.start) * dtype.itemsize)
                if values is not part:
                    part.copy_(values)

    def whole(self, name: str, key: str = "") -> Tensor:
        """A parameter, or its state, in the parameter's shape."""
        facts, pieces = self.index["parameters"][name], self.pieces[name][key]
        dtype = getattr(torch, pieces[0].dtype if pieces else facts["dtype"])
        flat = torch.empty(math.prod(facts["shape"]), dtype=dtype)
        self.read(name, key, 0, flat, facts["stride"])
        return flat.as_strided(facts["shape"], facts["stride"])

    def _fill(self, memory: memoryview, name: str, start: int = 0) -> memoryview:
        """Fill ``memory`` with a file's bytes from ``start`` on; returns the part that could be filled."""
        if name not in self.files:
            path = self.folder / Path(name).name
            try:
                self.files[name] = open(path, "rb")
            except OSError as error:
                raise CheckpointError(f"{path} can't be read ({error.strerror}): the checkpoint is not complete, or is "
                                      "being saved anew; load another tag") from None
        self.files[name].seek(start)
        return memory[:self.files[name].readinto(memory)]

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


def _check_fits(engine: Engine, reader: _Reader, strict: bool, with_optimizer: bool, with_schedule: bool) -> int:
    """Raise CheckpointError unless all that this rank loads is undamaged and fits; returns the index's checksum."""
    saved, own, state, folder = reader.index["parameters"], zero.describe(engine.zero), reader.state, reader.folder

    def described(buffers: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
        return {f"the buffer {name}": {"shape": list(buffer.shape),
                                       "kind": "floating" if buffer.is_floating_point() else str(buffer.dtype)}
                for name, buffer in buffers.items()}

    zero.check_fits(own | described(_persistent_buffers(engine.module)), saved | described(_own_buffers(engine, state)),
                    str(folder), strict, with_optimizer)
    for name, key, start, values in zero.shares(engine.zero, whole=True):
        if name in saved and not key:
            mine = (start, start + len(values)) if saved[name]["stride"] == own[name]["stride"] else ()
            for each in ["", *(reader.keys(name) if with_optimizer else ())]:
                reader.verify(name, each, *mine)
    groups, now = len(state["groups"]), len(engine.optimizer.param_groups) if engine.optimizer else 0
    with_schedule = with_schedule and state["schedule"] is not None
    for matters, what, there, here, key in (
            (with_optimizer, "optimizer", state["optimizer"], type(engine.optimizer).__name__, "load_optimizer_states"),
            (with_schedule, "scheduler", state["scheduler"], type(engine.lr_scheduler).__name__,
             "load_lr_scheduler_states"),
            (with_optimizer or with_schedule, "number of param groups", groups, now,
             "load_optimizer_states=False and load_lr_scheduler_states")):
        if matters and there != here:
            raise CheckpointError(f"{folder} has the state of the {what} {there}, and this engine's {what} is {here}; "
                                  f"load it with {key}=False")
    return reader.index["checksum"]


def _take_over(engine: Engine, reader: _Reader, with_optimizer: bool) -> None:
    """Load weights, buffers and the optimizer's state."""
    strides = {name: facts["stride"] for name, facts in zero.describe(engine.zero).items()}
    zero.fill(engine.zero, lambda name, *place: reader.read(name, *place, strides[name]),
              reader.optimizer_state() if with_optimizer else None)
    saved = _own_buffers(engine, reader.state)
    for name, buffer in _persistent_buffers(engine.module).items():
        if name in saved:
            buffer.copy_(saved[name])
    extra = _own(engine, reader.state, "extra")
    for key, module in _with_extra_state(engine.module).items():
        if key in extra:
            module.set_extra_state(extra[key])


def consolidate(folder: Path, dtype: torch.dtype | None = None, with_frozen: bool = True) -> dict[str, Tensor]:
    """One plain state dict of a checkpoint folder, which ``model.load_state_dict`` takes; tied weights stay tied.

    dtype   of floating-point parameters; None: fp32 where the optimizer kept fp32, else as they were
    """
    whole: dict[str, Tensor] = {}
    with closing(_Reader(folder)) as reader:
        for name, facts in reader.index["parameters"].items():
            if with_frozen or facts["trained"]:
                reader.verify(name)
                tensor = reader.whole(name)
                whole[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
                whole |= dict.fromkeys(facts["aliases"], whole[name])
        return whole | reader.state["buffers"] | reader.state.get("extra", {})


# An engine's plain data in a checkpoint: taken and put back.


COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def _state_of(engine: Engine) -> dict[str, Any]:
    """This rank's plain data: everything except the shares of parameters."""
    def entry(value: Any) -> tuple[Any, str | None]:  # as a number: small, and quickly compared
        is_number = isinstance(value, Tensor) and value.dim() == 0
        return (value.item(), str(value.dtype)[6:]) if is_number else (value, None)

    scheduler = engine.lr_scheduler
    return {"training": {key: getattr(engine, key) for key in COUNTERS},
            "optimizer": type(engine.optimizer).__name__, "scaler": engine.scaler.state_dict(),
            "groups": [{key: value for key, value in group.items() if key != "params"}
                       for group in (engine.optimizer.param_groups if engine.optimizer else ())],
            "schedule": scheduler.state_dict() if hasattr(scheduler, "state_dict") else None,
            "scheduler": type(scheduler).__name__,
            "data": None if engine.loader is None else engine.loader.state_dict(),
            "random": _random_state(), "buffers": _copies(_persistent_buffers(engine.module, shared=True)),
            "extra": _extra_state(engine.module),
            "optimizer_state": {name: {key: entry(value) for key, value in kept.items()}
                                for name, kept in zero.scalars(engine.zero).items()}}


def _restore(engine: Engine, state: dict[str, Any], with_optimizer: bool, with_schedule: bool) -> None:
    """Put back counters, rates, schedule, loss scale, random state, and the place in the data."""
    for key, value in state["training"].items():
        setattr(engine, key, value)
    with_schedule = with_schedule and state["schedule"] is not None
    for group, saved in zip(engine.optimizer.param_groups, state["groups"]) if with_optimizer or with_schedule else ():
        group.update(saved if with_optimizer else {"lr": saved["lr"]})  # from which some of PyTorch's schedules go on
    if with_schedule:
        engine.lr_scheduler.load_state_dict(state["schedule"])
    if state["scaler"].keys() == engine.scaler.state_dict().keys():
        engine.scaler.load_state_dict(state["scaler"])
    if len(state["random"]) == engine.world_size:
        _set_random_state(state["random"][engine.global_rank])
    if engine.loader is not None and state["data"] is not None:
        engine.loader.load_state_dict(state["data"])


def _merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The plain data of all ranks: rank 0's, each rank's generators, and what else differs from rank to rank."""
    first, kept = states[0], {}
    for name, entries in (item for state in states for item in state["optimizer_state"].items()):
        known = kept.setdefault(name, entries)
        for key in known.keys() | entries.keys():
            if not _same(known.get(key), entries.get(key)):
                raise CheckpointError(f"the optimizer's state {key!r} of {name} differs from rank to rank, since each "
                                      "has a part of the parameter; it can be saved at stage 0")
    return first | {"random": [state["random"] for state in states], "optimizer_state": kept} | {f"rank_{part}": [
        {key: value for key, value in state[part].items() if not _same(value, first[part].get(key, first))}
        for state in states] for part in ("buffers", "extra", "client_state")}


def _own(engine: Engine, state: dict[str, Any], part: str) -> dict[str, Any]:
    """The inverse for one part: rank 0's, and over it this rank's, where the number of ranks is the same."""
    every = state.get(f"rank_{part}", ())  # a checkpoint may be older than the part
    return state.get(part, {}) | (every[engine.global_rank] if len(every) == engine.world_size else {})


def _own_buffers(engine: Engine, state: dict[str, Any]) -> dict[str, Tensor]:
    """The buffers for this rank, those of a shared module by its first name alone."""
    again = _persistent_buffers(engine.module, shared=True).keys() - _persistent_buffers(engine.module).keys()
    return {name: buffer for name, buffer in _own(engine, state, "buffers").items() if name not in again}


def _same(a: Any, b: Any) -> bool:
    """Whether two entries of an optimizer's state, of any kind, are equal."""
    (a, kind), (b, other) = tree_flatten(a), tree_flatten(b)
    return kind == other and all(
        type(x) is type(y) and (x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, Tensor) else
                                bool(x == y or x != x and y != y)) for x, y in zip(a, b))  # NaN equals NaN


def _random_state() -> dict[str, Any]:
    """The state of this rank's random generators, as plain data."""
    numpy_state = np.random.get_state()
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all(),
            "python": random.getstate(), "numpy": (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:])}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def _persistent_buffers(model: nn.Module, shared: bool = False) -> dict[str, Tensor]:
    """The buffers that are in a state dict; with ``shared``, those of a shared module by each of its names."""
    return {f"{prefix}{'.' if prefix else ''}{name}": buffer.detach()
            for prefix, module in model.named_modules(remove_duplicate=not shared)
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set}


def _with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that save and load more than tensors, by the key that this has in a state dict."""
    return {f"{prefix}{'.' if prefix else ''}_extra_state": module
            for prefix, module in model.named_modules(remove_duplicate=False)
            if type(module).get_extra_state is not nn.Module.get_extra_state
            and type(module).set_extra_state is not nn.Module.set_extra_state}


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """What they save."""
    return {key: module.get_extra_state() for key, module in _with_extra_state(model).items()}


def _copies(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {name: buffer.cpu().clone() for name, buffer in buffers.items()}


# --- initialize() -----------------------------------------------------------------------------------------------------


def initialize(args: Any = None, model: nn.Module | None = None,
               optimizer: Optimizer | Callable[[Iterable], Optimizer] | None = None,
               model_parameters: Iterable | None = None, training_data: Dataset | None = None,
               lr_scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
               distributed_port: int = 29500, mpu: Any = None, dist_init_required: bool | None = None,
               collate_fn: Callable | None = None, config: dict | str | os.PathLike | None = None,
               config_params: dict | str | os.PathLike | None = None, mesh_param: Any = None,
               ) -> tuple[Engine, Optimizer | None, ShardedLoader | None, Any]:
    """Make an engine out of ``model`` and a config; DeepSpeed's signature and return value.

    args                may have ``deepspeed_config``, the path of the config, and ``local_rank``
    model               an ``nn.Module``; moved to this rank's device and made equal to rank 0's
    optimizer           over the model's parameters, or a callable that makes one; wins over the config's section
    model_parameters    parameters or param groups for the config's optimizer; default: all
    training_data       a dataset, of which each rank gets a share in micro-batches
    lr_scheduler        or a callable that makes one from the optimizer; wins over the config's section
    distributed_port    the port of the process group when MASTER_PORT is not set
    dist_init_required  False: the process group must exist already
    collate_fn          how samples become a batch; default: PyTorch's
    config              a dict, or the path of a JSON file; ``config_params`` is its old name
    mpu, mesh_param     model parallelism, which is not covered: refused

    Returns ``(engine, optimizer or None, data loader or None, scheduler or None)``. Raises ConfigError or ValueError.
    """
    settings = engine = failure = None
    try:
        _check_arguments(args, model, mpu, mesh_param, collate_fn, distributed_port, dist_init_required)
        settings = load_config(_only_config(args, config, config_params))
    except ValueError as error:  # perhaps on this rank alone: the others must learn of it
        if not dist.is_initialized() and "RANK" not in os.environ:
            raise
        failure = error
    device, local_rank, started = _join_group(args, model, distributed_port, dist_init_required, settings)

    def build() -> list[str]:
        """Make an engine that does not train yet. All refusals come here, while the model is unchanged."""
        nonlocal engine
        if failure is not None:
            raise failure
        _check_fit(settings, model, training_data)
        engine = Engine(model, settings, _precision(settings, model, device), device, local_rank, started)
        engine.optimizer = _choose_optimizer(optimizer, settings.optimizer, model, model_parameters, device)
        engine.lr_scheduler = _choose_scheduler(lr_scheduler, settings.scheduler, engine.optimizer)
        return _describe(engine, training_data)

    with _undone_if_refused(optimizer, started):
        zero.agree(build, same=True)
        _equip(engine, training_data, collate_fn)
    return engine, engine.optimizer, engine.loader, engine.lr_scheduler


def _describe(engine: Engine, data: Any) -> list[str]:
    """Lines of text that must be the same on all ranks."""
    model, groups = engine.module, engine.optimizer.param_groups if engine.optimizer else ()
    names = {id(p): name for name, p in model.named_parameters()}
    settings, _ = tree_flatten_with_path(asdict(engine.config), lambda part: not (isinstance(part, dict) and part))
    lines = [f"{'.'.join(key.key for key in path)} {value!r} in its config" for path, value in settings
             if path[-1].key != "nvme_path"]  # each rank may have its own disk
    lines += [f"the parameter {name} of shape {tuple(p.shape)}, {p.dtype}, {'' if p.requires_grad else 'not '}trained"
              for name, p in model.named_parameters()]
    lines += [f"the buffer {name} of shape {tuple(b.shape)}, {b.dtype}" for name, b in model.named_buffers()]
    lines += [f"the optimizer {type(engine.optimizer).__name__}", f"the scheduler {type(engine.lr_scheduler).__name__}"]
    for index, group in enumerate(groups):
        options = {key: value for key, value in group.items() if isinstance(value, bool | int | float | tuple)}
        lines.append(f"param group {index} with {options} over {[names[id(p)] for p in group['params']]}")
    samples = "none" if data is None else len(data) if hasattr(data, "__len__") else "some"
    return [*lines, f"training_data: {samples} samples"]


@contextmanager
def _undone_if_refused(optimizer: Any, started: bool) -> Iterator[None]:
    """On an error, restore the options of the caller's optimizer, which a schedule changes, and end the process group.

    The group ends if it was ``started`` here: the next, corrected call would find one that no engine ends.
    """
    options = [(group, dict(group)) for group in getattr(optimizer, "param_groups", ())]
    try:
        yield
    except BaseException:
        for group, given in options:
            group.clear()
            group.update(given)
        if started:
            dist.destroy_process_group()
        raise


def _check_fit(settings: Config, model: nn.Module, training_data: Any) -> None:
    """Raise where the config does not fit the model, the number of ranks or their memory."""
    settings.settle_batch_sizes(dist.get_world_size())
    _check_data(training_data)
    zero.check_memory(model)
    zero.check_free(model)
    zero.find_units(model, settings.zero_optimization.leaf_module)  # names that fit nothing, at any stage
    _recomputed(settings, model)


def _join_group(args: Any, model: Any, port: int, required: bool | None, settings: Config | None
                ) -> tuple[torch.device, int, bool]:
    """This rank's device and local rank, and whether the process group was started for this model."""
    local_rank = getattr(args, "local_rank", None) if settings else None  # without settings it is unchecked
    local_rank = int(os.environ.get("LOCAL_RANK", max(0, local_rank or 0)))
    try:
        device = zero.own_device(local_rank)
        started = zero.start_process_group(device, port, required,
                                           timeout=settings.collective_timeout() if settings else None)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return device, local_rank, started or isinstance(model, nn.Module) and zero.started_group(model)


def _check_arguments(args: Any, model: Any, mpu: Any, mesh_param: Any, collate_fn: Any, port: Any, required: Any
                     ) -> None:
    _check_start(port, required)
    local_rank = getattr(args, "local_rank", None)
    _check("args.local_rank", local_rank, isinstance(local_rank, int | None), "a whole number")
    _check("model", model, isinstance(model, nn.Module), "an nn.Module")
    _check("collate_fn", collate_fn, collate_fn is None or callable(collate_fn),
           "a function from a list of samples to a batch")
    if mpu is not None or mesh_param is not None:
        raise ValueError("mpu and mesh_param are for model and sequence parallelism, which this engine does not cover")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model is a ScriptModule, whose parameters and buffers can't be placed anew; allowed: an "
                         "nn.Module. Give that to initialize(), and script it after training")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(f"{lazy[0]} has no shape yet; run a lazy model once, on any input, before initialize()")
    wrapped = [f"{name} is a {type(p).__name__}" for name, p in model.named_parameters()
               if is_traceable_wrapper_subclass(p)]
    if wrapped:
        raise ValueError(f"{wrapped[0]}, whose memory can't be placed anew; allowed: parameters of plain tensors")
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model has tensors on the meta device, without values; zero.Init(module=model) gives them "
                         "values and shards them")


def find_modules(model: nn.Module, wanted: Iterable[str], key: str) -> dict[str, nn.Module]:
    """The modules, by name, that the config's ``key`` names: by class name, or by a pattern of module names."""
    found: set[str] = set()
    for what in wanted:
        hits = {name for name, module in model.named_modules()
                if what in (type(module).__name__, f"{type(module).__module__}.{type(module).__qualname__}")
                or name and fnmatchcase(name, what)}
        if not hits:
            names = sorted({type(module).__name__ for module in model.modules()})
            raise ConfigError(f"{key} has {what!r}, which no module matches{_nearest(what, names)} (allowed: patterns "
                              f"of module names, such as 'layers.*', and class names: {', '.join(names)})")
        found |= hits
    return {name: module for name, module in model.named_modules() if name in found}


def _precision(settings: Config, model: nn.Module, device: torch.device) -> amp.Precision:
    """The config's precision, with the modules that it names."""
    kept, safe, autocast = {}, {}, settings.torch_autocast
    for key in ("fp16", "bf16"):
        if getattr(settings, key).enabled:
            kept = find_modules(model, getattr(settings, key).keep_fp32 or (), f"{key}.keep_fp32")
    if autocast.enabled:
        safe = find_modules(model, autocast.lower_precision_safe_modules or (),
                            "torch_autocast.lower_precision_safe_modules")
    return amp.Precision(settings, device, kept.values(), safe.values())


def _recomputed(settings: Config, model: nn.Module) -> dict[str, nn.Module] | None:
    """The modules whose activations are recomputed; None: there is no such section."""
    section = settings.activation_checkpointing
    if section is None:
        return None
    if section.modules is not None:
        return find_modules(model, section.modules, "activation_checkpointing.modules")
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(block)]: block for block in zero.find_blocks(model).values()}


def _equip(engine: Engine, training_data: Dataset | None, collate_fn: Callable | None) -> None:
    """Give the engine all that trains its model. Only ZeRO can still refuse, before it changes anything."""
    model, settings, device = engine.module, engine.config, engine.device
    table, recomputed = engine.precision.table(model, engine.scaler), _recomputed(settings, model)
    if training_data is not None:
        engine.loader = ShardedLoader(training_data, engine.train_micro_batch_size_per_gpu(), device, collate_fn,
                                      settings.dataloader_drop_last)
    engine.communicator = zero.Communicator(device, settings.debug, settings.timeout, settings.wall_clock_breakdown)
    engine.communicator.join(settings.timeout)
    engine.zero = zero.Zero(model, engine.optimizer, settings.zero_optimization, device,
                            engine.precision.path, settings.zero_allow_untested_optimizer,
                            settings.predivide(engine.world_size), engine.communicator)
    engine.zero.user = weakref.ref(engine)
    engine.precision.apply(model)
    _place_buffers(model, device)
    if recomputed is not None:
        engine.checkpointing = recompute.apply(recomputed, settings.activation_checkpointing)
    engine._tell_boundary()
    if engine.global_rank == 0:
        logger.info("precision:\n%s", table)
        if settings.dump_state:
            whole = asdict(settings, dict_factory=lambda pairs: {key.removesuffix("_"): value for key, value in pairs})
            print(f"config, with the defaults: {json.dumps(whole, indent=2, default=str)}\nprecision:\n{table}\n"
                  f"{engine.world_size} rank(s), {device}, {dist.get_backend()}", flush=True)


@torch.no_grad()
def _place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move every buffer to the device, with rank 0's values; parameters come with their buckets."""
    placed: dict[int, Tensor] = {}
    for module in model.modules():
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = placed.setdefault(id(b), _writable(b.to(device)))
    for b in model.buffers() if dist.get_world_size() > 1 else ():
        dense = b.contiguous()
        dist.broadcast(dense.view(-1).view(torch.uint8), src=0)  # as bytes, since backends don't know every dtype
        if dense is not b:
            b.copy_(dense)


def _writable(buffer: Tensor) -> Tensor:
    """A buffer, or a copy of it where its elements share memory, as expand() makes them."""
    overlaps = buffer.layout is torch.strided and torch._debug_has_internal_overlap(buffer) == 1
    return buffer.contiguous() if overlaps else buffer


def _only_config(args: Any, config: Any, config_params: Any) -> Any:
    """The one config among the three places where it may be given."""
    given = {"config": config, "config_params": config_params,
             "args.deepspeed_config": getattr(args, "deepspeed_config", None)}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"the config is given {' and '.join(given) or 'nowhere'}; needed: one of config (a dict or a "
                          "path), config_params (its old name) and args.deepspeed_config (a path)")
    return next(iter(given.values()))


def _choose_optimizer(client: Any, section: OptimizerConfig | None, model: nn.Module, model_parameters: Iterable | None,
                      device: torch.device) -> Optimizer | None:
    """The caller's optimizer, or what the caller's callable makes, or the config's, or none."""
    if not isinstance(model_parameters, Iterable | None):
        raise ValueError(f"model_parameters is a {type(model_parameters).__name__}; allowed: parameters or param "
                         "groups, such as model.parameters()")
    parameters = list(model.parameters() if model_parameters is None else model_parameters)
    if client is None and section is None:
        return None
    optimizer = client(parameters) if callable(client) else client
    if client is None:
        optimizer = build_optimizer(section, parameters, device, model)
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer is, or makes, {optimizer!r}; allowed: a torch.optim.Optimizer, or a callable that "
                         "makes one")
    if isinstance(optimizer, UNFIT):
        raise ValueError(f"optimizer is a {type(optimizer).__name__}; allowed: any other of torch.optim, as step() "
                         "gives no closure and sparse gradients are not covered")
    own = {id(p) for p in model.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in own:  # it would train something else, or nothing
                raise ValueError(f"the optimizer's param group {index} holds a tensor of shape {tuple(p.shape)} that "
                                 "is no parameter of the model; make the optimizer from this very model's parameters")
    if client is not None:
        _tell_unused("optimizer", section, optimizer)
    return optimizer


def _choose_scheduler(client: Any, section: SchedulerConfig | None, optimizer: Optimizer | None) -> Any:
    """The caller's scheduler, or what the caller's callable makes, or the config's, or none."""
    if client is None and section is None:
        return None
    if optimizer is None:
        raise ConfigError("a scheduler needs an optimizer; give initialize() one, or its config an optimizer section")
    if client is None:
        try:
            params = _check_params(schedulers.named(section.type), section.params, "scheduler.params")
            return schedulers.build(optimizer, section.type, params)
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"scheduler: {error}") from error
    scheduler = client(optimizer) if callable(client) else client
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("lr_scheduler drives another optimizer than the engine's; allowed: one made for the optimizer "
                         "that initialize() is given, or a callable that makes one from the optimizer")
    if not hasattr(scheduler, "step"):
        raise ValueError(f"lr_scheduler is, or makes, {scheduler!r}; allowed: an object with step(), or a callable "
                         "that makes one from the optimizer")
    if not hasattr(scheduler, "state_dict"):
        _warn("lr_scheduler %r has no state_dict(): a resumed run begins it anew", scheduler)
    _tell_unused("scheduler", section, scheduler)
    return scheduler


def _tell_unused(name: str, section: OptimizerConfig | SchedulerConfig | None, used: Any) -> None:
    if section is not None and section.type.lower() != type(used).__name__.lower():
        _warn("the %s given to initialize() is used; the config's %s section (%s) is not", type(used).__name__, name,
              section.type)


# --- The command line -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line: python engine.py consolidate|inspect CHECKPOINT_DIR ..., or estimate ..."""
    parser = argparse.ArgumentParser(
        prog="engine.py", description="Look into checkpoints, make plain state dicts of them, or estimate memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    parts = [commands.add_parser("inspect", help="print what is inside a checkpoint"),
             commands.add_parser("consolidate", help="write one state dict that model.load_state_dict takes")]
    for part in parts:
        part.add_argument("directory", metavar="CHECKPOINT_DIR", help="the save_dir of save_checkpoint()")
        part.add_argument("--tag", help="default: the one that the file latest names")
    parts[1].add_argument("output", metavar="OUT.pt")
    parts[1].add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as the masters are")
    part = commands.add_parser("estimate", help="print what a rank holds and sends at stages 0 to 3")
    part.add_argument("--params", required=True, help="parameters of the model, such as 7.5e9")
    part.add_argument("--world", nargs="+", required=True, metavar="RANKS", help="one or several numbers of ranks")
    part.add_argument("--config", help="a JSON file with a DeepSpeed config: its dtypes and offload count, its stage "
                                       "does not (default: bf16, with gradients in bf16)")
    part.add_argument("--largest-unit", default="0", metavar="PARAMS", help="parameters of the largest block")
    part.add_argument("--plot", metavar="OUT.png", help="draw the table as well")
    options = parser.parse_args(argv)
    try:
        print({"inspect": _inspect, "consolidate": _consolidate, "estimate": _compare}[options.command](options))
    except (CheckpointError, ValueError, OSError) as error:
        print(f"engine.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _inspect(options: argparse.Namespace) -> str:
    """What a checkpoint holds, a line per parameter."""
    reader = _Reader(_checkpoint_folder(options.directory, options.tag))
    index = reader.index
    rows = [f"{reader.folder}: step {index['step']}, saved at stage {index['stage']} by {index['ranks']} rank(s)"]
    for name, facts in index["parameters"].items():
        size = sum(piece.size for pieces in reader.pieces[name].values() for piece in pieces)
        state = ", ".join(reader.keys(name)) or "no optimizer state"
        rows.append(f"  {name:<40} {str(tuple(facts['shape'])):<16} {facts['dtype']:<10}{size:>12,} bytes  {state}")
    rows.append(f"{len(index['parameters'])} parameters, {sum(f['size'] for f in index['files'].values()):,} bytes in "
                f"{len(index['files'])} files")
    return "\n".join(rows)


def _consolidate(options: argparse.Namespace) -> str:
    """Write one plain state dict; says what was written."""
    whole = consolidate(_checkpoint_folder(options.directory, options.tag),
                        getattr(torch, options.dtype) if options.dtype else None)
    _write_whole(whole, Path(options.output))
    size = sum(value.nbytes for value in whole.values() if isinstance(value, Tensor))
    return f"wrote {options.output}: {len(whole)} tensors, {size / 2**20:.1f} MiB"


def estimate(model_or_counts: nn.Module | int | tuple[int, int], config: Mapping[str, Any] | str | os.PathLike | Config,
             world_size: int = 1, **options: Any) -> zero.Estimate:
    """What a rank will hold and send: ``zero.estimate``, with what a whole config says.

    config    a dict, a JSON file's path, or what load_config() made of them. Of it count ``zero_optimization``, what
              it says of dtypes, and the batch sizes, of which micro-batches follow
    options   the other arguments of ``zero.estimate``, which come before what the config says
    """
    settings = config if isinstance(config, Config) else load_config(config)
    device, is_model = torch.device("meta"), isinstance(model_or_counts, nn.Module)
    precision = (_precision(settings, model_or_counts, device) if is_model  # else there are no modules to be named
                 else amp.Precision(settings, device))
    said = {"dtypes": precision.path, "buffer_dtype": settings.data_types.buffer_dtype,
            "micro_batches": settings.accumulation_steps(world_size)}
    return zero.estimate(model_or_counts, settings.zero_optimization, world_size, **{**said, **options})


# Without a config the command line speaks of the ZeRO paper's case: gradients stay in 16 bits.
PAPER = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}
GPUS = (24, 40, 80, 141)  # GB of common ones


def _compare(options: argparse.Namespace) -> str:
    """A table of stages 0 to 3, a row per number of ranks; drawn as well, with ``--plot``."""
    counts = _whole("--params", options.params, 1), _whole("--largest-unit", options.largest_unit, 0)
    raw = read_config(options.config or PAPER)
    section = raw.setdefault("zero_optimization", {})
    if isinstance(section, dict) and section.get("stage", 0) in zero.SHARDED:
        section["stage"] = 3  # there all of the section counts
    settings = load_config(raw)
    given, rows = settings.zero_optimization, []
    for ranks in (_whole("--world", size, 1) for size in options.world):
        rows.append([])
        for stage in zero.SHARDED:
            settings.zero_optimization = replace(
                given, stage=stage, offload_param=given.offload_param if stage == 3 else zero.OffloadParam())
            rows[-1].append(estimate(counts, settings, ranks))
    if options.plot:
        _draw(rows, options.plot)
    dtypes = amp.Precision(settings, torch.device("meta")).path(nn.Parameter(torch.empty(0)))
    return _comparison(rows, counts[0], dtypes, knows_units=counts[1] > 0)


def _whole(option: str, text: str, least: int) -> int:
    number = _number(text)
    if number is None or number < least or not number.is_integer():
        raise ValueError(f"{option} is {text!r}; allowed: a whole number from {least} up, such as 64 or 7.5e9")
    return int(number)


def _comparison(rows: list[list[zero.Estimate]], parameters: int, dtypes: amp.Dtypes, knows_units: bool) -> str:
    """Estimates of all stages as text. Without ``knows_units``, what depends on the units is left out."""
    kinds = [f"{kind} {str(dtype)[6:]}" for kind, dtype in zip(("parameters", "masters", "gradients"), dtypes)]
    text = [f"{parameters:,} parameters with Adam, {', '.join(kinds)}; GB (1e9 bytes) per rank",
            f"/80 fits into 80 GB, of {', '.join(map(str, GPUS))}; /- into none of these",
            f"Not in it: {zero.NOT_COUNTED}; units in use: {'below' if knows_units else 'give --largest-unit'}"]

    def add(title: str, cell: Callable[[zero.Estimate], str]) -> None:
        text.append(zero.text_table((title, *(f"stage {stage}" for stage in zero.SHARDED)),
                                    [(str(row[0].world_size), *map(cell, row)) for row in rows]))

    def states(each: zero.Estimate) -> str:
        size = each.bytes(place="device") - each.bytes("live")
        return f"{_billions(size)}{next((f'/{gpu}' for gpu in GPUS if size <= gpu * 1e9), '/-'):>5}"

    add("ranks, device", states)
    for place in zero.PLACES[1:]:
        if any(each.bytes(place=place) for row in rows for each in row):
            add(f"ranks, {place}", lambda each: _billions(each.bytes(place=place)))
    if knows_units:
        add("units in use", lambda each: _billions(each.bytes("live")))
    text.append("Sent per rank and step: 1e9 elements")
    for kind in dict.fromkeys(kind for row in rows for each in row for kind in each.traffic):
        add(kind, lambda each: _billions(each.traffic[kind].elements) if kind in each.traffic else "-")
    return "\n".join(text)


def _billions(count: int) -> str:
    """In units of 1e9, with two figures at least."""
    return "0" if count == 0 else f"{count / 1e9:.2f}" if count >= 1e8 else f"{count / 1e9:.2g}"


def _draw(rows: list[list[zero.Estimate]], output: str) -> None:
    """A curve per stage over the number of ranks: all that is in the GPU's memory, units in use included."""
    import matplotlib.figure  # here, so that training does not wait for it

    figure = matplotlib.figure.Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.add_subplot()
    for stage in zero.SHARDED:
        axis.plot([row[0].world_size for row in rows], [row[stage].bytes(place="device") / 1e9 for row in rows],
                  marker="o", label=f"stage {stage}")
    for gpu in GPUS:
        axis.axhline(gpu, color="grey", linewidth=0.5, linestyle=":")
        axis.annotate(f"{gpu} GB", (rows[0][0].world_size, gpu), fontsize=7, color="grey", va="bottom")
    axis.set(xlabel="ranks", ylabel="GB per rank", xscale="log", yscale="log")
    axis.set_xticks([row[0].world_size for row in rows], [str(row[0].world_size) for row in rows])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(output, dpi=110)


# --- DeepSpeed's names ------------------------------------------------------------------------------------------------


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed``, a flag for the script's own use, and ``--deepspeed_config``, which initialize() reads."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="for the script's own use: train with DeepSpeed")
    group.add_argument("--deepspeed_config", metavar="FILE", help="a JSON config")
    return parser


__version__ = "0.19.8"  # of the DeepSpeed whose documented behaviour this follows: what scripts ask the version for

ELSEWHERE = "; if DeepSpeed has it, tutorials/coming_from_deepspeed.md says what takes its place"


def __getattr__(name: str) -> Any:
    return _absent(__name__, name) if name.startswith("_") else getattr(MODULES["deepspeed"], name)


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """``item`` with a copy of each tensor in it, whose file holds no more than the tensor: not the bucket around it."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to(device, copy=True), item)


def get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir: str | os.PathLike, tag: str | None = None,
                                             exclude_frozen_parameters: bool = False,
                                             lazy_mode: bool = False) -> dict[str, Tensor]:
    """A checkpoint's whole state dict in fp32; ``tag`` as in load_checkpoint(). ``lazy_mode`` has no effect."""
    return consolidate(_checkpoint_folder(checkpoint_dir, tag), torch.float32, not exclude_frozen_parameters)


def load_state_dict_from_zero_checkpoint(model: nn.Module, checkpoint_dir: str | os.PathLike,
                                         tag: str | None = None) -> nn.Module:
    """``model``, which no engine holds, on the CPU with a checkpoint's weights."""
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model.cpu().load_state_dict(state, strict=False)
    return model


def configure(mpu_: Any, deepspeed_config: Mapping[str, Any] | str | os.PathLike | None = None,
              partition_activations: bool | None = None, contiguous_checkpointing: bool | None = None,
              num_checkpoints: int | None = None, checkpoint_in_cpu: bool | None = None,
              synchronize: bool | None = None, profile: bool | None = None) -> recompute.Checkpointing:
    """Set up ``checkpointing.checkpoint()``, with DeepSpeed's arguments; its ``report()`` has the profile.

    ``deepspeed_config``, a whole config or the path of one, may have a section ``activation_checkpointing``; the other
    arguments, where they are given, win over it.
    """
    if mpu_ is not None:
        raise ValueError(f"mpu_ is {mpu_!r}; allowed: None, as there is no model parallelism here")
    raw, parser = read_config(deepspeed_config or {}), _Parser()
    section = raw.get("activation_checkpointing") or {}
    given = {"partition_activations": partition_activations, "contiguous_memory_optimization": contiguous_checkpointing,
             "number_checkpoints": num_checkpoints, "cpu_checkpointing": checkpoint_in_cpu,
             "synchronize_checkpoint_boundary": synchronize, "profile": profile}
    if isinstance(section, dict):
        section |= {key: value for key, value in given.items() if value is not None}
    config = parser.section(recompute.CheckpointingConfig, section, "activation_checkpointing.")
    parser.warn()
    return recompute.configure(config)


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Log on these ranks, where -1 means all and None means none; without a process group always, as DeepSpeed does."""
    rank = dist.get_rank() if dist.is_initialized() else -1
    if rank == -1 or {-1, rank} & set(ranks or ()):
        logger.log(level, "[rank %d] %s", rank, message)


def log_summary(show_straggler: bool = False) -> None:
    """Print on rank 0 what each engine has sent, as the section ``comms_logger`` does."""
    _check("show_straggler", show_straggler, show_straggler is False, "False; wall_clock_breakdown prints waiting")
    for communicator in zero.Groups.current().communicators if dist.is_initialized() and dist.get_rank() == 0 else ():
        print(zero.traffic_table(communicator.traffic), flush=True)


class RepeatingLoader:
    """A loader's batches, which begin anew when they end; ``loader`` is the loader, ``data_iter`` its current round."""

    def __init__(self, loader: Iterable):
        self.loader, self.data_iter = loader, iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self.data_iter, self)
        if batch is self:  # the round is over; another one of no batches ends the loop
            self.data_iter = iter(self.loader)
            batch = next(self.data_iter)
        return batch


def _current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def get_accelerator() -> types.ModuleType:
    """The current device: its names, and PyTorch's functions for it; a CPU also has CUDA's, which count 0."""
    device = _current_device()
    of_a_cpu = {"is_bf16_supported": lambda: True, "is_fp16_supported": lambda: True, "reset_peak_memory_stats": (
        lambda *_: None), "manual_seed_all": torch.manual_seed} | {name: getattr(torch, name) for name in (
            "manual_seed", "initial_seed", "get_rng_state", "set_rng_state")}
    return _module("accelerator.get_accelerator()", torch.cuda, of_a_cpu, torch.get_device_module(device), {
        "device_name": lambda index=None: device.type if index is None or device.index is None else
        f"{device.type}:{index}", "current_device_name": lambda: str(device),
        "communication_backend_name": lambda: dist.get_default_backend_for_device(device)})


class _OtherName(type):
    """The class of DeepSpeed's names for optimizers: isinstance() also accepts what they make, of their base class."""

    def __instancecheck__(cls, one: Any) -> bool:
        return super().__instancecheck__(one) or type(cls.__base__) is type and isinstance(one, cls.__base__)


def _other_name(name: str, base: type[Optimizer], **renamed: str) -> type[Optimizer]:
    """The class ``name``, which makes the optimizer of a config's section for ``base``. Its subclasses make their own.

    ``renamed``: the section's key, by the argument's. DeepSpeed calls the first argument params or model_params.
    """
    def make(params: Any = None, lr: float | None = None, *, model_params: Any = None, **options: Any) -> Optimizer:
        options = {renamed.get(key, key): value for key, value in options.items()} | ({} if lr is None else {"lr": lr})
        return build_optimizer(OptimizerConfig(base.__name__, options), model_params if params is None else params,
                               _current_device())

    def new(cls: type[Optimizer], *args: Any, **options: Any) -> Optimizer:
        return make(*args, **options) if type(cls.__base__) is type else base.__new__(cls)

    def init(self: Optimizer, *args: Any, **options: Any) -> None:
        made = make(*args, **options)
        base.__init__(self, made.param_groups, **made.defaults)

    return _OtherName(name, (base,), {"__new__": new, "__init__": init})


def split_params_into_different_moe_groups_for_optimizer(*_: Any, **__: Any) -> Any:
    """What scripts import always, and call only to train a mixture of experts."""
    raise NotImplementedError(f"mixtures of experts are not covered{ELSEWHERE}")


def as_deepspeed() -> None:
    """Let ``deepspeed`` mean this engine from now on, here and in processes that are started from here.

    Imports find a file in a temporary folder, which brings MODULES, and a version. Raises RuntimeError where the real
    DeepSpeed is imported. ``python launch.py --as_deepspeed SCRIPT`` does it for a script.
    """
    if sys.modules.get("deepspeed") not in (None, MODULES["deepspeed"]):
        raise RuntimeError(f"{sys.modules['deepspeed']} is imported already; call as_deepspeed() before that")
    folder, own = Path(tempfile.mkdtemp(prefix="as_deepspeed_")), os.getpid()
    atexit.register(lambda: os.getpid() == own and shutil.rmtree(folder, ignore_errors=True))  # not from a fork
    (folder / "deepspeed.dist-info").mkdir()
    (folder / "deepspeed.dist-info/METADATA").write_text(
        f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {__version__}\n")
    # engine.py comes from here whatever modules the script has; and what is unpickled later finds its module, too.
    (folder / "deepspeed.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport engine\n"
        "sys.path.append(sys.path.pop(0))\nsys.meta_path.insert(0, engine)\n"
        "sys.modules.update(engine.MODULES)\n")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def find_spec(name: str, *_: Any) -> None:
    """Where as_deepspeed() was called, Python's import calls it for modules that are not in MODULES."""
    if name.startswith("deepspeed."):
        raise ModuleNotFoundError(f"there is no {name}{ELSEWHERE}")  # with its name, import would hide the text


def _absent(place: str, name: str) -> None:
    raise AttributeError(f"{place} has no attribute {name!r}{ELSEWHERE}")


def _module(path: str, *things: Any) -> types.ModuleType:
    """``deepspeed.<path>`` with these functions and classes, the public names of modules, and dicts of more names."""
    module = types.ModuleType(f"deepspeed.{path}".rstrip("."))
    for thing in things:
        is_module = isinstance(thing, types.ModuleType)
        names = vars(thing) if is_module else thing if isinstance(thing, dict) else {thing.__name__: thing}
        vars(module).update({key: value for key, value in names.items() if not (is_module and key[0] == "_")})
    vars(module).update(__path__=[], __getattr__=partial(_absent, module.__name__),
                        __spec__=importlib.machinery.ModuleSpec(module.__name__, None, is_package=True))
    return module


# Where DeepSpeed has what is here: its modules, and what is in them.
DeepSpeedEngine, _LOGGING = Engine, {"logger": logger, "log_dist": log_dist}
MODULES = {"deepspeed": _module("", sys.modules[__name__], {"__version__": __version__})}
for _paths, *_things in (
        ("checkpoint moe ops runtime runtime.activation_checkpointing",), ("accelerator", get_accelerator),
        ("checkpoint.utils", clone_tensors_for_torch_save),
        ("checkpointing runtime.activation_checkpointing.checkpointing", recompute, configure),
        ("comm comm.comm", dist, init_distributed, log_summary, {
            "get_local_rank": partial(dist.get_node_local_rank, 0)}),
        ("moe.utils", split_params_into_different_moe_groups_for_optimizer),
        ("ops.adagrad", _other_name("DeepSpeedCPUAdagrad", torch.optim.Adagrad)),
        ("ops.adam ops.adam.cpu_adam ops.adam.fused_adam", _other_name("FusedAdam", torch.optim.Adam),
         _other_name("DeepSpeedCPUAdam", torch.optim.Adam, adamw_mode="adam_w_mode")), ("ops.lamb", {"FusedLamb": Lamb}),
        ("ops.lion", {"FusedLion": Lion}, _other_name("DeepSpeedCPULion", Lion)),
        ("runtime.dataloader", RepeatingLoader), ("runtime.engine", {"DeepSpeedEngine": Engine}),
        ("runtime.lr_schedules", schedulers, {"VALID_LR_SCHEDULES": [
            "LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]}),
        ("runtime.utils", {"see_memory_usage": lambda message, force=False: force and log_dist(
            f"{message}: {get_accelerator().memory_allocated() / 2**30:.2f} GiB", [0])}), ("zero runtime.zero", zero),
        ("runtime.zero.partition_parameters", zero, {
            "ZeroParamStatus": zero.UnitState, "is_zero_param": lambda p: hasattr(p, "ds_id"),
            "zero_wrapper_for_fp_tensor_constructor": None}),  # which Transformers replaces
        ("utils", zero, _LOGGING, RepeatingLoader), ("utils.logging", _LOGGING),
        ("utils.zero_to_fp32", get_fp32_state_dict_from_zero_checkpoint, load_state_dict_from_zero_checkpoint)):
    for _name in (f"deepspeed.{_path}" for _path in _paths.split()):
        MODULES[_name] = _module(_name.removeprefix("deepspeed."), *_things)
        setattr(MODULES[_name.rpartition(".")[0]], _name.rpartition(".")[2], MODULES[_name])


if __name__ == "__main__":
    sys.exit(main())
