"""The config: what people have is read as it is meant, what is not taken literally is reported; optimizers by name.

    .venv/bin/python -m pytest -q tests/test_config.py

What is refused is in test_mistakes.py.
"""

import copy
import json
import re
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import nn

import engine as deepspeed
import zero
from engine import ConfigError
from oracle import WIDTH, Mlp, square, twins


@pytest.mark.parametrize("total, micro, steps, settled", [
    (8, None, None, (8, 4, 1)), (8.0, None, None, (8, 4, 1)), (None, 3, None, (6, 3, 1)), (12, None, 3, (12, 2, 3)),
    (12, 2, None, (12, 2, 3)), (None, 2, 3, (12, 2, 3)), (12, 2, 3, (12, 2, 3))])
def test_batch_sizes_give_one_another(total, micro, steps, settled):
    config = deepspeed.load_config(dict(zip(deepspeed.Config.SIZES, (total, micro, steps))))
    config.settle_batch_sizes(2)
    assert tuple(getattr(config, key) for key in config.SIZES) == settled


@pytest.mark.parametrize("total, micro, steps, told", [
    (None, None, None, "at least one"), (None, None, 2, "at least one"),
    (9, None, None, r"4 \* 1 \* 2 != 9 \(given: train_batch_size 9; world size 2\)"),
    (8, 3, None, r"3 \* 1 \* 2 != 8"), (1, None, None, r"1 \* 1 \* 2 != 1"), (8, 2, 3, r"2 \* 3 \* 2 != 8")])
def test_batch_sizes_that_disagree_are_refused_with_the_equation(total, micro, steps, told):
    with pytest.raises(ConfigError, match=told):
        deepspeed.load_config(dict(zip(deepspeed.Config.SIZES, (total, micro, steps)))).settle_batch_sizes(2)


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
])
def test_configs_that_people_have_are_read_as_they_are_meant(tmp_path, text, holds):
    (tmp_path / "ds.json").write_text(text)
    config = deepspeed.load_config(tmp_path / "ds.json")
    for path, value in holds.items():
        found = config
        for key in path.split("."):
            found = getattr(found, key)
        assert found == value, path


@pytest.mark.parametrize("text, told", [
    ("{", "is not JSON"), ("[]", r"the config is \[\]"), ('{"train_batch_size": 1, "train_batch_size": 2}', "twice"),
    ('{ # one\n  "train_batch_size": 8, /* two\n */ "stage" 3,\n}', "is not JSON: .* line 3 column 13"),
    (None, "can't be read: No such file")])
def test_config_files_that_cannot_be_read_are_refused(tmp_path, text, told):
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=told):
        deepspeed.load_config(tmp_path / "ds.json")


def test_config_from_a_file_from_args_and_under_its_old_name(tmp_path):
    config, path = {"train_batch_size": 4}, tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    for kwargs in ({"config": path}, {"config_params": config}, {"args": Namespace(deepspeed_config=str(path))},
                   {"config": str(path), "args": Namespace(deepspeed_config=None, local_rank=-1)}):
        assert deepspeed.initialize(model=nn.Linear(1, 1), **kwargs)[0].train_batch_size() == 4


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


# --- Optimizers by name -----------------------------------------------------------------------------------------------


def built(name: str, model: nn.Module | None = None, parameters: Any = None, **params: Any) -> torch.optim.Optimizer:
    model = model or nn.Linear(2, 2)
    return deepspeed.build_optimizer(deepspeed.OptimizerConfig(name, params), parameters or model.parameters(),
                                     torch.device("cpu"), model)


@pytest.mark.parametrize("name, params, cls, holds, logs", [
    ("Adam", {}, torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}, False),
    ("AdamW", {}, torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}, False),
    ("Adam", {"adam_w_mode": False}, torch.optim.Adam, {"weight_decay": 0.0}, False),
    ("AdamW", {"torch_adam": True}, torch.optim.AdamW, {"weight_decay": 0.01}, False),
    ("adam", {"torch_adam": True, "adam_w_mode": False, "betas": [0.5, 0.6]}, torch.optim.Adam,
     {"betas": (0.5, 0.6)}, False),
    ("AdamW", {"foreach": True}, torch.optim.AdamW, {"foreach": True, "fused": None}, False),
    *((name, {"adam_w_mode": mode}, cls, {"weight_decay": 0.0, "fused": True}, True)
      for name in ("FusedAdam", "cpuadam", "DeepSpeedCPUAdam")
      for mode, cls in ((True, torch.optim.AdamW), (False, torch.optim.Adam))),
    ("SGD", {"momentum": 0.5}, torch.optim.SGD, {"momentum": 0.5, "fused": None}, False),
    ("SGD", {}, torch.optim.SGD, {"momentum": 0, "fused": True}, False),
    ("RMSprop", {"centered": 1, "lr": "0.1"}, torch.optim.RMSprop, {"centered": True, "lr": 0.1}, False),
    ("LION", {"betas": ["0.5", 0.6]}, deepspeed.Lion, {"betas": [0.5, 0.6]}, False),
    ("LAMB", {}, deepspeed.Lamb, {}, False),
    ("FusedLamb", {}, deepspeed.Lamb, {}, True), ("muon", {}, deepspeed.Muon, {}, False),
    ("Adagrad", {}, torch.optim.Adagrad, {"fused": True}, False)])
def test_optimizers_by_name(name, params, cls, holds, logs, caplog):
    """The log says once what takes the place of a kernel of DeepSpeed's."""
    optimizer = built(name, **params)
    assert type(optimizer) is cls
    assert {key: optimizer.param_groups[0][key] for key in holds} == holds
    assert len(caplog.records) == logs and all(cls.__name__ in record.getMessage() for record in caplog.records)


def test_lambs_norm_is_the_configs_clipping():
    section = {"type": "FusedLamb", "params": {"lr": 0.1, "max_grad_norm": 0.5}}
    config = deepspeed.load_config({"train_batch_size": 1, "optimizer": section, "gradient_clipping": 0.5})
    assert "max_grad_norm" not in config.optimizer.params


def test_muon_takes_hidden_matrices_alone_and_each_parameter_may_say_otherwise():
    model = nn.ModuleDict({"token": nn.Embedding(5, 4), "patch_embed": nn.Linear(4, 4), "body": nn.Linear(4, 4),
                           "conv": nn.Conv1d(4, 4, 1), "heads": nn.Linear(4, 4), "lm_head": nn.Linear(4, 5)})
    taken = {"body.weight", "heads.weight"}

    def split(optimizer: torch.optim.Optimizer) -> dict[bool, set[str]]:
        names = {id(p): name for name, p in model.named_parameters()}
        return {use: {names[id(p)] for group in optimizer.param_groups if group["use_muon"] is use
                      for p in group["params"]} for use in (True, False)}

    everything = {name for name, _ in model.named_parameters()}
    assert split(built("Muon", model)) == {True: taken, False: everything - taken}
    model["heads"].weight.use_muon, model["lm_head"].weight.use_muon = False, True
    taken = {"body.weight", "lm_head.weight"}
    assert split(built("Muon", model)) == {True: taken, False: everything - taken}
    groups = [{"params": list(model["body"].parameters()), "lr": 0.5}, {"params": list(model["lm_head"].parameters())}]
    optimizer = built("Muon", model, groups, lr=0.1, adam_lr=0.01)
    rates = [(group["use_muon"], group["lr"]) for group in optimizer.param_groups]
    assert rates == [(True, 0.5), (False, 0.5), (True, 0.1), (False, 0.01)]
    assert [group["lr"] for group in built("Muon", nn.Linear(2, 2)).param_groups] == [0.02, 3e-4]
    model["lm_head"].bias.use_muon = True
    with pytest.raises(deepspeed.ConfigError, match=r"use_muon of the parameter lm_head.bias of shape \(5,\) is True"):
        built("Muon", model)
    said = [{"params": list(model["body"].parameters())[:1], "use_muon": 0}]
    assert [group["use_muon"] is False for group in deepspeed.muon_groups(said, model)] == [True]
    empty = type("Empty", (nn.Linear,), {"__len__": lambda self: 0})(2, 2)  # counts as False
    empty.weight, empty.head = None, nn.Linear(2, 2, bias=False)
    assert [group["use_muon"] for group in deepspeed.muon_groups(empty.parameters(), empty)] == [False]
    with pytest.raises(ValueError, match="a param group of Muon has use_muon 'yes'"):
        deepspeed.Muon([{"params": [torch.ones(2, 2)], "use_muon": "yes"}])
    with pytest.raises(ValueError, match="a param group of Muon has no use_muon"):
        deepspeed.Muon(model.parameters())


@pytest.mark.parametrize("name", ["Lion", "Lamb", "Muon"])
def test_in_plain_pytorch_it_is_one_optimizer_that_schedules_copies_and_resumes(name):
    def loss(model: nn.Module) -> torch.Tensor:
        model.zero_grad()
        value = square(model, torch.ones(1, WIDTH).double())
        value.backward()
        return value.detach()

    model, twin = twins(Mlp)
    optimizer, other = built(name, model, lr=0.01), built(name, twin, lr=0.7)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert float(optimizer.step(lambda: loss(model))) > 0, "a closure's loss comes back"
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.005}
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (twin, other)):
        loss(each)
        its.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)
    assert all("fused" not in group or group["fused"] for group in optimizer.param_groups)
