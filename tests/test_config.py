"""The config and the arguments of calls: what people have is read as it is meant, and what is invalid is refused.

    .venv/bin/python -m pytest -q tests/test_config.py
    .venv/bin/python -m pytest -q tests/test_config.py --long     with many more mistakes on two ranks

A mistake on one rank or all must raise on every rank an error that names the key or the argument, and leave nothing
behind. The right call after it, on the same model, trains what plain PyTorch trains.
"""

import copy
import json
import math
import random
import re
import string
import types
import typing
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import engine as deepspeed
import zero
from engine import ConfigError
from oracle import LENGTH, Mlp, Model, Pair, twins


@pytest.mark.parametrize("total, micro, steps, expected", [
    (8, None, None, (8, 4, 1)), (8.0, None, None, (8, 4, 1)), (None, 3, None, (6, 3, 1)), (12, None, 3, (12, 2, 3)),
    (12, 2, None, (12, 2, 3)), (None, 2, 3, (12, 2, 3)), (12, 2, 3, (12, 2, 3)),
    (None, None, None, "at least one"), (None, None, 2, "at least one"),
    (9, None, None, r"4 \* 1 \* 2 != 9 \(given: train_batch_size 9; world size 2\)"),
    (8, 3, None, r"3 \* 1 \* 2 != 8"), (1, None, None, r"1 \* 1 \* 2 != 1"), (8, 2, 3, r"2 \* 3 \* 2 != 8")])
def test_batch_sizes_give_one_another_or_are_refused_with_the_equation(total, micro, steps, expected):
    config = deepspeed.load_config(dict(zip(deepspeed.Config.SIZES, (total, micro, steps))))
    with pytest.raises(ConfigError, match=expected) if isinstance(expected, str) else nullcontext():
        config.settle_batch_sizes(2)
        assert tuple(getattr(config, key) for key in config.SIZES) == expected


# --- Files ------------------------------------------------------------------------------------------------------------


Z, MICRO = "zero_optimization", '"train_micro_batch_size_per_gpu": 2'


@pytest.mark.parametrize("text, holds", [
    ('{"train_batch_size": 8, # eight\n "fp16": {"hysteresis": 3,}, // 3\n /* "x": 1,\n */}', {"fp16.hysteresis": 3}),
    ('\ufeff{"_note": 1, "//": "http://a", "//": "b", "comment": {}, "bf16": {"__doc": "", "enabled": true}}',
     {"bf16.enabled": True}),
    (r'{"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/a//b #c,}\" /*d*/"},}}',
     {f"{Z}.offload_optimizer.nvme_path": '/a//b #c,}" /*d*/'}),
    ('{"train_batch_size": "128", "gradient_clipping": "0.5", "prescale_gradients": "true", "dump_state": 1}',
     {"train_batch_size": 128, "gradient_clipping": 0.5, "prescale_gradients": True, "dump_state": True}),
    ('{"gradient_allreduce_op": "SUM", "communication_data_type": "FP32", "zero_optimization": {"stage": "2"}}',
     {"gradient_allreduce_op": "sum", "communication_data_type": torch.float32, f"{Z}.stage": 2}),
    ('{"steps_per_print": Infinity}', {"steps_per_print": None}),
    ('{"steps_per_print": "inf"}', {"steps_per_print": None}),
    ('{"bf16": {"enabled": true, "loss_scale": 0, "initial_scale_power": 16}}', {"bf16.enabled": True}),
    ('{"bfloat16": {"enabled": true}}', {"bf16.enabled": True}),
    ('{"fp16": {"enabled": false, "opt_level": "O1", "loss_scale": -1}}', {"fp16.enabled": False}),
    ('{"fp16": {"enabled": "auto", "loss_scale_window": 0}, "bf16": {"enabled": "AUTO"}}',
     {"fp16.enabled": False, "bf16.enabled": False, "fp16.loss_scale_window": 1000}),
    ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "none", "nvme_path": "auto", "x": 1}}}',
     {f"{Z}.offload_param.device": "none"}),
    ('{"zero_optimization": true}', {f"{Z}.stage": 1}),
    ('{"zero_optimization": false, "allgather_size": 5e8}', {f"{Z}.stage": 0}),
    ('{"zero_optimization": {"stage": 2, "cpu_offload": true}}', {f"{Z}.offload_optimizer.device": "cpu"}),
    ('{"zero_optimization": {"cpu_offload": true, "offload_optimizer": {"device": "cpu", "pin_memory": false}}}',
     {f"{Z}.offload_optimizer.device": "cpu", f"{Z}.offload_optimizer.pin_memory": False}),
    ('{"zero_optimization": {"cpu_offload": false}}', {f"{Z}.offload_optimizer.device": "none"}),
    ('{"zero_optimization": {"stage": 3, "cpu_offload_param": true}}', {f"{Z}.offload_param.device": "cpu"}),
    ('{"zero_optimization": {"stage": 3, "cpu_offload_params": "true"}}', {f"{Z}.offload_param.device": "cpu"}),
    ('{"zero_optimization": {"offload_optimizer": {"device": "CPU"}}}', {f"{Z}.offload_optimizer.device": "cpu"}),
    ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', {f"{Z}.offload_param.device": "none"}),
    ('{"zero_optimization": {"max_live_parameters": 1e6, "param_persistence_threshold": 7, "prefetch_bucket_size": "9",'
     '"max_reuse_distance": 1, "gather_16bit_weights_on_model_save": true, "elastic_checkpoint": true}}',
     {f"{Z}.stage3_max_live_parameters": 10**6, f"{Z}.stage3_param_persistence_threshold": 7,
      f"{Z}.stage3_prefetch_bucket_size": 9, f"{Z}.stage3_gather_16bit_weights_on_model_save": True}),
    ('{"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": true, "zero_hpz_partition_size": 1}}',
     {f"{Z}.stage3_gather_16bit_weights_on_model_save": True}),
    ('{%s, "train_batch_size": "auto", "gradient_clipping": "auto", "gradient_accumulation_steps": "auto"}' % MICRO,
     {"train_batch_size": None, "gradient_clipping": 1.0, "gradient_accumulation_steps": None}),
    ('{"zero_optimization": {"reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",'
     '"stage3_max_live_parameters": "auto", "overlap_comm": "auto"}}',
     {f"{Z}.reduce_bucket_size": "auto", f"{Z}.stage3_max_live_parameters": 10**9}),
    ('{"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-6, "max_grad_norm": 1}},'
     '"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto", "total_num_steps": 9.5}}}',
     {"optimizer.params": {"eps": 1e-6}, "scheduler.params": {"warmup_max_lr": None, "total_num_steps": 9.5}}),
    ('{"activation_checkpointing": {"partition_activations": true}}',
     {"activation_checkpointing.partition_activations": True}),
    ('{"activation_checkpointing": {"partition_activations": false, "cpu_checkpointing": "false", "profile": 0,'
     '"number_checkpoints": null}}', {"activation_checkpointing": None}),
    ('{"activation_checkpointing": {}}', {"activation_checkpointing.mode": "full"}),
    ('{"activation_checkpointing": {"profile": false, "modules": null}}', {"activation_checkpointing.mode": "full"}),
    ('{"activation_checkpointing": {"profile": false, "mode": "full"}}', {"activation_checkpointing.mode": "full"}),
    ('{"activation_checkpointing": {"cpu_checkpointing": true, "profile": false}}',
     {"activation_checkpointing.cpu_checkpointing": True}),
    ('{"bf16": {"enabled": true}, "torch_autocast": {"enabled": true}}', {"bf16.enabled": True}),
    ("{", "is not JSON"), ("[]", r"the config is \[\]"), ('{"train_batch_size": 1, "train_batch_size": 2}', "twice"),
    ('{ # one\n  "train_batch_size": 8, /* two\n */ "stage" 3,\n}', "is not JSON: .* line 3 column 13"),
    (None, "can't be read: No such file")])
def test_configs_that_people_have_are_read_as_they_are_meant_or_refused(tmp_path, text, holds):
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=holds) if isinstance(holds, str) else nullcontext():
        config = deepspeed.load_config(tmp_path / "ds.json")
        assert {path: attrgetter(path)(config) for path in holds} == holds


def test_config_from_a_file_from_args_and_under_its_old_name(tmp_path, alone):
    config, path = {"train_batch_size": 4}, tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    for kwargs in ({"config": path}, {"config": None, "config_params": config},
                   {"config": None, "args": Namespace(deepspeed_config=str(path))},
                   {"config": str(path), "args": Namespace(deepspeed_config=None, local_rank=-1)}):
        assert alone(**kwargs)[0].train_batch_size() == 4


def test_what_is_not_taken_literally_is_told_once(caplog, monkeypatch):
    config = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 1, "aio": {"a": 1},
              "zero_optimization": {"stage": 2, "cpu_offload": True, "elastic_checkpoint": False,
                                    "contiguous_gradients": True, "sub_group_size": 1e8, "round_robin_gradients": True,
                                    "offload_optimizer": {"device": "cpu", "buffer_count": 7}},
              "tensorboard": {"enabled": True}, "wandb": {"enabled": False}, "comms_logger": {"prof_all": False},
              "optimizer": {"type": "Adam", "adam_w_mode": False}}
    given = copy.deepcopy(config)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # as where the launcher has set RANK
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        deepspeed.load_config(config)
    assert config == given
    now, auto, none = [record.message for record in caplog.records]
    assert "zero_optimization.cpu_offload" in now and "zero_optimization.offload_optimizer" in now
    assert "train_batch_size" in auto and "aio" in none
    for key in ("optimizer.adam_w_mode (it", "prof_all (all", "tensorboard (no", "sub_group_size (",
                "round_robin_gradients (", "zero_optimization.offload_optimizer.buffer_count (buckets"):
        assert key in none
    assert not re.search("wandb|elastic|contiguous", caplog.text), "off, or the default"
    config = zero.ZeroConfig(stage=2, offload_param=zero.OffloadParam(device="cpu"))
    assert "offload_param has no effect at stage 2" in caplog.text and config.offload_param.device == "none"


def test_all_that_auto_leaves_open_is_told_at_once():
    config = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
              "fp16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
              "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
              "zero_optimization": {"stage": "auto", "offload_optimizer": {"device": "auto", "nvme_path": "auto"}}}
    with pytest.raises(ConfigError, match="can't be decided here: .*Hugging Face's Trainer") as caught:
        deepspeed.load_config(config)
    assert re.search("here: (.*); write", str(caught.value))[1].split(", ") == [
        "scheduler.params.total_num_steps", "zero_optimization.stage", "zero_optimization.offload_optimizer.device",
        "zero_optimization.offload_optimizer.nvme_path", "train_batch_size", "train_micro_batch_size_per_gpu"]
    with pytest.raises(ConfigError, match="can't be decided here: optimizer.type, scheduler.type; write"):
        deepspeed.load_config({"train_batch_size": 1, "optimizer": {"type": "auto"}, "scheduler": {"type": "auto"}})


CONFIG = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
          "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
INF, NAN, HUGE = float("inf"), float("nan"), 10**400
ON = {"enabled": True}


def normed() -> Model:
    """With buffers."""
    return Model(lambda m, x: m.blocks(m.norm(x)), blocks=Mlp(2).blocks, norm=nn.BatchNorm1d(LENGTH))


class Mistake(typing.NamedTuple):
    """What is wrong, and a regular expression that the error must match."""
    what: str       # "config", "initialize", or a method of the engine's
    arguments: Any  # a config; or keyword arguments
    told: str


# --- Mistakes: configs ------------------------------------------------------------------------------------------------


VALUES: dict[str, list] = {  # that a key can't have
    "train_batch_size": [0, -8, "eight", 8.5, True], "train_micro_batch_size_per_gpu": [0, -1, 1e30],
    "gradient_accumulation_steps": [0, -3, HUGE], "gradient_clipping": [-1.0, INF, NAN, None],
    "steps_per_print": [0, -5], "timeout": [0, -1, INF, NAN, 1e12], "gradient_allreduce_op": ["max", "means"],
    "communication_data_type": ["fp8", "int32"], "gradient_predivide_factor": [0, -1, INF],
    "dataloader_drop_last": [2], "data_types.grad_accum_dtype": ["fp8", ""], "torch_autocast.dtype": ["fp8"],
    "data_types.buffer_dtype": ["int8"], "fp16.enabled": [2], "bf16.bf16_optimizer_states": [True],
    "zero_optimization.stage": [4, -1, 100], "zero_optimization.reduce_bucket_size": [0, -1, "big"],
    "zero_optimization.stage3_prefetch_bucket_size": [-1], "zero_optimization.stage3_max_live_parameters": [-1],
    "zero_optimization.leaf_module": [["Block"]], "zero_optimization.leaf_module.classes": [[["a"]], [1, "a"]],
    "zero_optimization.cpu_offload": ["perhaps"], "zero_optimization.offload_optimizer": ["cpu"],
    "zero_optimization.offload_optimizer.device": ["disk", "tape"],
    "zero_optimization.offload_optimizer.ratio": [1.5],
    "checkpoint.keep_last": [0, -1], "activation_checkpointing.number_checkpoints": [0, -1],
    "activation_checkpointing.mode": ["some"], "activation_checkpointing.modules": ["Block", [3]],
    "fp16.loss_scale": [-1.0, 5e-324], "fp16.loss_scale_window": [0], "fp16.hysteresis": [0],
    "fp16.min_loss_scale": [-1.0, 0], "fp16.initial_scale_power": [5000], "bf16.loss_scale": [3.0],
    "bf16": [True], "optimizer": ["Adam"], "optimizer.type": ["LBFGS", ""], "optimizer.params.fused": [NAN],
    "optimizer.params.lr": ["fast", True, INF, HUGE], "optimizer.params.momentum": ["much"]}
PARAMS = [  # of an optimizer, and what the error says
    ("Adam", {"adam_w_mode": "false"}, ""), ("SGD", {"maximize": "false"}, ""), ("AdamW", {"fused": "true"}, ""),
    ("RMSprop", {"centered": "no"}, ""), ("AdamW", {"amsgrad": 2}, ""), ("Adam", {"torch_adam": "on"}, ""),
    ("AdamW", {"weight_decay": NAN}, ""), ("AdamW", {"betas": [0.9, True]}, ""),
    ("AdamW", {"betas": [0.9]}, "for AdamW"), ("AdamW", {"betas": [2.0, 0.9]}, ""),
    ("Adam", {"lr": -1.0}, "Invalid learning rate: -1.0"), ("Adam", {"bias_correction": False}, "allowed: true"),
    ("Adam", {"max_grad_norm": 0.5}, "gradient_clipping: 0.5"), ("Lion", {"lr": -0.1}, "lr is -0.1"),
    ("Lion", {"betas": [0.9]}, "betas is"), ("Lion", {"betas": [0.9, 1.0]}, "betas is"),
    ("Lion", {"weight_decay": -1}, "weight_decay is -1"), ("Lion", {"momentum": 0.9}, "lr, betas, weight_decay"),
    ("Lamb", {"amsgrad": True}, "amsgrad is True"), ("Lamb", {"eps": "tiny"}, "eps is 'tiny'"),
    ("Lamb", {"min_coeff": 3, "max_coeff": 2}, "min_coeff is 3.*max_coeff.*2"),
    ("FusedLamb", {"eps_inside_sqrt": "yes"}, "eps_inside_sqrt is 'yes'"),
    ("FusedLamb", {"max_coef": 2}, "did you mean 'max_coeff'"), ("FusedLamb", {"max_grad_norm": 0.5}, "0.5.*1.0"),
    ("Muon", {"muon_lr": -1}, "muon_lr is -1"), ("Muon", {"adam_lr": "fast"}, "adam_lr is 'fast'"),
    ("Muon", {"ns_steps": 100}, "ns_steps is 100"), ("Muon", {"mun_lr": 1}, "did you mean 'muon_lr'"),
    ("FusedAdam", {"adam_w_mode": "no"}, "adam_w_mode is 'no'"), ("CPUAdam", {"bias_correction": False}, "")]
CONTRADICTIONS = [  # sections, and what the error says
    ({"train_batch_size": 7}, "train_batch_size"), ({"bf16": {1: 2}}, "bf16 has the key 1"),
    ({"pipeline": {}}, "pipeline .*not covered"), ({"overlap_comm": True}, "overlap_comm.*zero_optimization"),
    ({"gradient_cliping": "auto"}, "gradient_cliping.*'auto'.*'gradient_clipping'"),
    ({"fp16": ON, "bf16": ON}, "fp16 and bf16 are both enabled; allowed: one of them"),
    ({"bf16": ON | {"keep_fp32": ["Nothing"]}}, "bf16.keep_fp32 has 'Nothing', which no module matches"),
    ({"bf16": ON, "data_types": {"param_dtype": "fp16"}}, "data_types.param_dtype is torch.float16; allowed: bf16"),
    ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype is torch.bfloat16; allowed: fp32"),
    ({"fp16": ON | {"min_loss_scale": 4, "initial_scale_power": 1}}, "min_loss_scale is 4.0; allowed: at most"),
    ({"activation_checkpointing": {"modules": ["Liner", "norm"]}},
     "modules has 'Liner', which no module matches; did you mean 'Linear'"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights"),
    ({"zero_optimization": {"leaf_module": {"classes": ["Nothing"]}}}, "leaf_module.*Nothing"),
    ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.nvme_path is missing"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "enabled": False, "ratio": 2}}},
     "offload_optimizer"),
    ({"fp16": ON | {"device": "none", "loss_scale": 1}}, "fp16.device"),
    ({"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
     "cpu_offload.*zero_optimization.offload_optimizer"),
    ({"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 2}}, "live_parameters.* 1,.* 2"),
    ({"optimizer": {"params": {"lr": 0.1}}}, "optimizer.type is missing"),
    ({"optimizer": {"type": "Adan"}}, "'Adan'.*'Adam'"), ({"optimizer": {"type": "FusedAdamm"}}, "'FusedAdam'"),
    ({"optimizer": None, "scheduler": {"type": "WarmupLR"}}, "scheduler needs an optimizer"),
    ({"scheduler": {"type": "WarmLR"}}, "scheduler.*'WarmLR'.*'WarmupLR'"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, "warmup_steps.*'warmup_num_steps'"),
    ({"scheduler": {"type": "StepLR", "params": {"step_size": True}}}, "scheduler.params.step_size is True"),
    ({"scheduler": {"type": "StepLR", "params": {"step_size": 1, "gamma": INF}}}, "params.gamma is inf")]


def sections(cls: type = deepspeed.Config, path: tuple[str, ...] = ()) -> list[tuple[type, tuple[str, ...]]]:
    """Every section of a config: its class and where it stands."""
    found = [(cls, path)]
    for name, hint in typing.get_type_hints(cls).items():
        for kind in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
            if is_dataclass(kind):
                found += sections(kind, (*path, name))
    return found


def with_key(path: tuple[str, ...], key: str, value: Any) -> dict:
    """CONFIG with ``key`` in the section at ``path``."""
    config = inner = json.loads(json.dumps(CONFIG))
    for part in path:
        inner = inner.setdefault(part, {})
    inner[key] = value
    if path and path[0] in ("fp16", "torch_autocast"):
        config[path[0]].setdefault("enabled", True)
    if path == ("scheduler",):
        config["scheduler"].setdefault("type", "WarmupLR")
    return config


def one_edit_apart(a: str, b: str) -> bool:
    """Whether one letter more, less, another, or two exchanged make ``b`` of ``a``."""
    short, long = sorted((a, b), key=len)
    if len(short) != len(long):
        return len(long) - len(short) == 1 and any(long[:i] + long[i + 1:] == short for i in range(len(long)))
    differing = [i for i in range(len(a)) if a[i] != b[i]]
    return len(differing) == 1 or (len(differing) == 2 and differing[1] == differing[0] + 1
                                   and a[differing[0]] == b[differing[1]] and a[differing[1]] == b[differing[0]])


def misspelt(draw: random.Random) -> Mistake:
    """A key with one letter too many, missing, wrong, or two in the wrong order."""
    while True:
        cls, path = draw.choice(sections())
        keys = [f.name.removesuffix("_") for f in fields(cls)]
        key, letter = draw.choice(keys), draw.choice(string.ascii_lowercase)
        at = draw.randrange(len(key))
        wrong = draw.choice([key[:at] + letter + key[at:], key[:at] + key[at + 1:], key[:at] + letter + key[at + 1:],
                             key[:at] + key[at + 1:at + 2] + key[at:at + 1] + key[at + 2:]])
        near = "|".join(re.escape(name) for name in keys if one_edit_apart(name, wrong))
        if wrong not in keys and near and len(wrong) > 1:
            told = rf"{'.'.join((*path, wrong))}.*did you mean .*'({near})'"
            return Mistake("config", with_key(path, wrong, 1), told)


def mistyped(draw: random.Random) -> Mistake:
    """A value of another type than the key's."""
    cls, path = draw.choice(sections())
    f = draw.choice(fields(cls))
    hint = typing.get_type_hints(cls)[f.name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    wrong = [value for kind, value in ((bool, True), (str, "many"), (list, [1]), (types.NoneType, None), (float, 2.5))
             if kind not in kinds and (kind, f.name) != (types.NoneType, "enabled")]  # that says off, of any section
    wrong += [] if dict in kinds or any(map(is_dataclass, kinds)) else [{"a": 1}]
    key = f.name.removesuffix("_")
    return Mistake("config", with_key(path, key, draw.choice(wrong)), rf"{'.'.join((*path, key))} is ")


def table() -> list[Mistake]:
    """The mistakes of the tables above."""
    found = []
    for path, values in VALUES.items():
        *outer, key = path.split(".")
        found += [Mistake("config", with_key(tuple(outer), key, value), rf"{path} is {re.escape(repr(value))}.*allowed")
                  for value in values]
    for kind, params, told in PARAMS:
        told = told or rf"optimizer.params.*{next(iter(params))}"
        found.append(Mistake("config", CONFIG | {"optimizer": {"type": kind, "params": params}}, told))
    return found + [Mistake("config", CONFIG | change, told) for change, told in CONTRADICTIONS]


# --- Mistakes: calls --------------------------------------------------------------------------------------------------


def other_optimizer(*_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)


def fail(*_: Any) -> None:
    raise RuntimeError("the caller's own mistake")


DATA = TensorDataset(torch.ones(8, 6))
STREAM = torch.utils.data.ChainDataset([])
CALLS: dict[str, list[tuple[str, list]]] = {  # arguments, and values that they can't have; the error names the argument
    "initialize": [
        ("model", [None, 5, nn.Linear(2, 2, device="meta")]), ("mpu", [1]), ("mesh_param", [(1, 2)]),
        ("optimizer", [3, other_optimizer, "Adam", torch.optim.LBFGS]),
        ("lr_scheduler", [5, str, torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)]), 1)]),
        ("training_data", [7, DataLoader(DATA), DataLoader(STREAM), TensorDataset(torch.ones(0, 6))]),
        ("collate_fn", [4]),
        ("model_parameters", [5]), ("config", [None, "/nowhere.json", 3]), ("config_params", [CONFIG]),
        ("dist_init_required", ["no"]), ("distributed_port", [-1]), ("args", [Namespace(local_rank="a"),
                                                                          Namespace(deepspeed_config="x")])],
    "backward": [("loss", [None, "loss", 3.0, torch.ones(2)])],
    "step": [("lr_kwargs", [5, "x", [1], {"speed": 1}])],
    "save_checkpoint": [("save_dir", [5, None]), ("tag", [
        "a/b", "", [5], "..", "latest", "../x", ".hidden", "a ", "a.", " a", "a\n", True]),
                        ("client_state", [[1], 5, {"f": fail}]), ("save_latest", ["no"]),
                        ("exclude_frozen_parameters", [1])],
    "load_checkpoint": [("load_dir", [5, None]), ("tag", ["../x", "nothing", True]), ("load_module_strict", ["no"]),
                        ("load_optimizer_states", [None]), ("load_module_only", [1])],
    "save_16bit_model": [("save_dir", [None]), ("save_filename", [5])],
    "set_train_batch_size": [("train_batch_size", [0, -4, 2.5, "8", None, True, 7])],
    "set_train_micro_batch_size": [("micro_batch_size", [0, -1, 1.5, "2", None, True])],
    "set_gradient_accumulation_boundary": [("is_boundary", [1, None, "yes"])],
    "set_lr": [("lr", [-1, "0.1", True, math.inf, [0.1, 0.2], None])],
    "compile": [("schedule", [[1]]), ("compiled_autograd_enabled", [True]), ("compile_kwargs", [
        {"mode": "max-autotune"}, {"options": {"triton.cudagraphs": True}}])]}
NAMED = {"loss": "backward", "tag": "tag is .*; allowed|nothing", "compile_kwargs": "CUDA graphs"}  # else its name
ON_ONE_RANK = {"config", "initialize", "save_checkpoint", "load_checkpoint", "save_16bit_model",
               "set_train_batch_size", "set_train_micro_batch_size"}  # all ranks hear of a mistake that one has made


def calls() -> list[Mistake]:
    found = [Mistake(call, {name: value}, NAMED.get(name, name))
             for call, arguments in CALLS.items() for name, values in arguments for value in values]
    found += [Mistake("initialize", {name: fail}, "the caller's own") for name in ("optimizer", "lr_scheduler")]
    found += [Mistake("initialize", {"model_parameters": []}, "optimizer.params"), Mistake("no_sync", {}, "no_sync")]
    return found


# --- Making them ------------------------------------------------------------------------------------------------------


def error_of(function: Callable, **kwargs: Any) -> str:
    try:
        function(**kwargs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{function} took {kwargs}")


def make_mistake(mistake: Mistake, stage: int, one_rank: bool, folder: str) -> None:
    """Make it, on rank 1 alone or on all ranks; then train with the same model."""
    what, wrong = mistake.what, mistake.arguments if not one_rank or dist.get_rank() == 1 else {}
    model, reference = twins(normed)
    right, told = {"model": model, "config": CONFIG | {"zero_optimization": {"stage": stage}}}, mistake.told
    if what == "config":
        said = error_of(deepspeed.initialize, **right | ({"config": wrong} if wrong else {}))
        if one_rank:  # ranks whose configs differ hear of the first difference
            changed = "|".join(key for key, value in mistake.arguments.items() if value != CONFIG.get(key))
            told += rf"|ranks disagree.*rank 1 has ({changed})\b"
    elif what == "initialize":
        said = error_of(deepspeed.initialize, **right | wrong)
    pair = Pair.of(model, reference, stage, scheduler={"type": "ConstantLR", "params": {"factor": 1.0}})
    if what == "no_sync":
        said = error_of(pair.engine.no_sync().__enter__)
    elif what not in ("config", "initialize", "step"):
        good = {"save_checkpoint": {"save_dir": folder}, "load_checkpoint": {"load_dir": folder},
                "save_16bit_model": {"save_dir": folder}, "set_train_micro_batch_size": {"micro_batch_size": 2},
                "set_train_batch_size": {"train_batch_size": 2 * dist.get_world_size()}}
        said = error_of(getattr(pair.engine, what), **good.get(what, {}) | wrong)
        if one_rank:
            told += rf"|ranks disagree.*rank 1 has {what}\(\), where ({'|'.join(mistake.arguments)}) is"
    pair.backward(0)
    if what == "step":
        said = error_of(pair.engine.step, **wrong)
    pair.engine.step()
    pair.plain(0)
    pair.check("the right calls after it")
    assert re.search(told, said, re.DOTALL), f"said {said!r}, without {told!r}"
    pair.engine.destroy()


def make_mistakes(mistakes: list[tuple[Mistake, int, bool]], folder: str) -> list[str]:
    """Make each one; what went otherwise than it should, in words."""
    wrong = []
    for drawn in mistakes:
        try:
            make_mistake(*drawn, folder)
        except AssertionError as error:
            wrong.append(f"{drawn}: {error}")
    return wrong


@pytest.mark.parametrize("mistake", table(), ids=lambda mistake: mistake.told[:50])
def test_configs_that_cannot_be_meant_are_refused_by_key(mistake):
    with pytest.raises(ValueError, match=f"(?s){mistake.told}"):
        deepspeed.initialize(model=normed(), config=mistake.arguments)
    assert not dist.is_initialized(), "what a refused call has started, it ends"


def test_every_wrong_call_is_refused(run_ranks, tmp_path):
    """On one process."""
    mistakes = [(mistake, 2 + index % 2, False) for index, mistake in enumerate(calls())]
    (wrong,) = run_ranks(make_mistakes, 1, mistakes, str(tmp_path))
    assert not wrong, "\n".join(wrong)


def test_mistakes_are_refused_on_every_rank_and_leave_nothing_behind(run_ranks, tmp_path, is_long):
    draw, mistakes, tables = random.Random(2), [], {call: [] for call in [*CALLS, "no_sync"]}
    for mistake in calls():
        tables[mistake.what].append(mistake)
    for index in range(300 if is_long else 44):
        kinds = (lambda: misspelt(draw), lambda: mistyped(draw), lambda: draw.choice(table()))
        if index % 2:
            mistake = kinds[index // 2 % 3]()
        else:  # each call in turn
            mistake = draw.choice(tables[list(tables)[index // 2 % len(tables)]])
        stage = draw.randrange(2, 4) if mistake.what == "no_sync" else draw.randrange(4)
        mistakes.append((mistake, stage, mistake.what in ON_ONE_RANK and draw.random() < 0.5))
    for rank, wrong in enumerate(run_ranks(make_mistakes, 2, mistakes, str(tmp_path))):
        assert not wrong, f"rank {rank} of 2:\n" + "\n".join(wrong)


def test_a_refused_call_gives_model_and_optimizer_back_as_they_were():
    """Also one that is refused last of all, after all that can be changed: since another engine has the model."""
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, options = dict(vars(model)), dict(optimizer.param_groups[0])
    config = {"train_batch_size": 2, "bf16": {"enabled": True, "keep_fp32": ["Linear"]},
              "zero_optimization": {"stage": 3}, "data_types": {"buffer_dtype": "bf16"},
              "activation_checkpointing": {"modules": ["Tanh"]}, "scheduler": {"type": "WarmupLR"}}
    refused = error_of(deepspeed.initialize, model=model, optimizer=optimizer, config=config | {
        "activation_checkpointing": {"modules": ["Tanh", "Nothing"]}})
    assert "'Nothing'" in refused
    nowhere = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}  # seen after the schedule
    assert "/nowhere" in error_of(deepspeed.initialize, model=model, optimizer=optimizer, config=config | {
        "zero_optimization": nowhere})
    first, *_ = deepspeed.initialize(model=model, config=CONFIG)
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="another engine already trains this model; call its destroy"):
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    assert vars(model).keys() == before.keys() and optimizer.param_groups[0] == options
    assert hooks == [dict(module._forward_hooks) for module in model.modules()]
    assert not any("forward" in vars(module) for module in model.modules())
    first.destroy()
    for _ in range(2):  # nobody destroys the first of these, but nobody refers to it either
        deepspeed.initialize(model=model, config=CONFIG)
