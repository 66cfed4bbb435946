"""Saving and resuming: nothing is lost, any checkpoint loads anywhere, a damaged one is refused with nothing changed.

    .venv/bin/python -m pytest -q tests/test_resume.py
    .venv/bin/python -m pytest -q tests/test_resume.py --long     with many more draws
"""

import logging
import os
import pickle
import random
import shutil
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import engine as deepspeed
import zero
from conftest import DEADLINE, on_ranks
from engine import ConfigError
from oracle import STAGES, Pair, batches, mine, square, whole

ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}


class Net(nn.Module):
    """Tied, frozen, turned, zero-size and unused parameters, dropout, and buffers of which one is not kept."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.token.weight
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2))
                                    for _ in range(2))
        self.turned = nn.Parameter(torch.randn(3, 6).t())
        self.nothing = nn.Parameter(torch.ones(0, 6))
        self.never = nn.Parameter(torch.ones(3))
        self.blocks[0][0].weight.requires_grad_(False)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, ids):
        x = self.token(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + (x @ self.turned).mean() + (x @ self.nothing.t()).sum())


def make(stage: int, precision: dict, groups: bool = False, **more):
    torch.manual_seed(random.randrange(10**6) if "seed" in more else 0)
    more.pop("seed", None)
    model = Net()
    parameters = [p for p in model.parameters() if p.requires_grad or not groups]
    if groups:
        parameters = [{"params": parameters[:3], "lr": 0.003}, {"params": parameters[3:]}]
    data = TensorDataset(torch.arange(40) % 7, torch.arange(40) % 5)
    config = {"train_batch_size": 12, "optimizer": ADAM, "gradient_clipping": 0.5,
              "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5,
                                                           "warmup_max_lr": [0.01] * (1 + groups)}},
              "zero_optimization": {"stage": stage, "reduce_bucket_size": 40}} | precision | more
    engine, _, loader, _ = deepspeed.initialize(model=model, model_parameters=parameters, training_data=data,
                                                config=config)
    return engine, endless(loader)


def endless(loader):
    """Epoch after epoch."""
    while True:
        yield from loader


def train(engine, batches, steps: int) -> list:
    """The rate, loss, norm and loss scale of each step."""
    seen = []
    for _ in range(steps):
        ids, targets = next(batches)
        rate = engine.get_lr()
        loss = nn.functional.cross_entropy(engine(ids).float(), targets)
        engine.backward(loss)
        engine.step()
        seen.append((rate, float(loss), engine.get_global_grad_norm(), engine.loss_scale()))
    return seen


def everything(engine) -> dict:
    """Weights, optimizer state and buffers, by name."""
    found = {name: zero.safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    for name, p in engine.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step") if p.requires_grad else ():
            try:
                found[f"{name} {key}"] = zero.safe_get_full_optimizer_state(p, key)
            except ValueError:
                found[f"{name} {key}"] = torch.tensor(-1.0)  # never used: it has none
    return found | {name: b.clone() for name, b in engine.module.named_buffers() if name != "scratch"}


def save_after(folder: str, stage: int, precision: dict, groups: bool, steps: int, more: int):
    torch.manual_seed(dist.get_rank())
    engine, loader = make(stage, precision, groups)
    torch.manual_seed(dist.get_rank() + 1)
    train(engine, loader, steps)
    engine.save_checkpoint(folder, client_state={"note": ["text", 1, torch.ones(2)]})
    state = everything(engine)
    return state, train(engine, loader, more), everything(engine)


def resume(folder: str, stage: int, precision: dict, groups: bool, more: int):
    engine, loader = make(stage, precision, groups, seed="another")  # what was there before must not matter
    train(engine, loader, 1)
    path, client = engine.load_checkpoint(folder)
    assert path.endswith(f"global_step{engine.global_steps}") and client["note"][:2] == ["text", 1]
    state = everything(engine)
    return (state, train(engine, endless(engine.loader), more), everything(engine),
            engine.module.head.weight is engine.module.token.weight)


def worst_of(a: dict, b: dict) -> tuple[float, str]:
    assert a.keys() == b.keys()
    return max((float((a[k] - b[k]).abs().max()) if a[k].numel() else 0.0, k) for k in a)


PRECISIONS = {  # on the CPU, PyTorch's batch norm takes no 16-bit weights beside running means in fp32
    "fp32": {}, "bf16": {"bf16": {"enabled": True, "auto_cast": True}, "data_types": {"buffer_dtype": "bf16"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6, "auto_cast": True},
             "data_types": {"buffer_dtype": "fp16"}}}


# --- Resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_n_steps_save_load_m_steps_equal_n_plus_m_bit_for_bit(run_ranks, tmp_path, stage, name):
    saved = run_ranks(save_after, 2, str(tmp_path), stage, PRECISIONS[name], False, 3, 4)
    resumed = run_ranks(resume, 2, str(tmp_path), stage, PRECISIONS[name], False, 4)
    for (state, steps, end), (their_state, their_steps, their_end, tied) in zip(saved, resumed):
        assert worst_of(state, their_state)[0] == 0 and steps == their_steps
        assert worst_of(end, their_end)[0] == 0 and tied


@given(st.tuples(st.integers(1, 4), st.integers(0, 3), st.sampled_from(list(PRECISIONS))),
       st.tuples(st.integers(1, 4), st.integers(0, 3), st.sampled_from(list(PRECISIONS))), st.booleans())
@settings(phases=[Phase.generate], max_examples=max(8, settings().max_examples // 10))
def test_a_checkpoint_loads_at_any_stage_number_of_ranks_and_precision(run_ranks, saver, loader, groups):
    with tempfile.TemporaryDirectory() as folder:
        (state, *_), *_ = run_ranks(save_after, saver[0], folder, saver[1], PRECISIONS[saver[2]], groups, 2, 0)
        for their_state, *_ in run_ranks(resume, loader[0], folder, loader[1], PRECISIONS[loader[2]], groups, 0):
            # A half-precision saver has rounded the frozen weight, and a half-precision loader rounds it; the running
            # means are each rank's own, and rank 0's where the number of ranks is another.
            exact = {k: v for k, v in state.items() if k != "blocks.0.0.weight" and "running" not in k}
            worst = worst_of(exact, {k: their_state[k] for k in exact})
            assert worst[0] == 0, f"{worst[1]} differs by {worst[0]:.3g}"
            name = "blocks.0.0.weight"
            assert float((state[name] - their_state[name]).abs().max()) < 0.01


def weights_only(folder: str, stage: int):
    engine, loader = make(stage, PRECISIONS["bf16"])
    engine.load_checkpoint(folder, load_module_only=True)
    before = everything(engine)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.lr_scheduler.step = lambda: None
    train(engine, loader, 1)
    after = everything(engine)
    return max(float((before[n] - after[n]).abs().max()) for n, p in engine.module.named_parameters() if p.numel()), \
        engine.global_steps


def test_after_a_weights_only_load_a_step_at_rate_0_keeps_the_loaded_weights(run_ranks, tmp_path):
    run_ranks(save_after, 2, str(tmp_path), 1, {}, False, 2, 0)
    for stage in range(4):
        assert run_ranks(weights_only, 2, str(tmp_path), stage) == [(0.0, 1)] * 2, f"stage {stage}"


def half_frozen() -> nn.Module:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
    model[:2].requires_grad_(False)
    model[3][0].bias.requires_grad_(False)
    return model


@on_ranks(2, saver=STAGES, other=[False, True])
def test_a_half_frozen_model_comes_back_bit_for_bit(saver, other, tmp_path):
    """Loaded at the stage that saved it, or at another, into a model that begins with other weights."""
    adam = partial(torch.optim.AdamW, lr=0.01)
    pair = Pair(half_frozen, saver, adam)
    pair.train(0)
    pair.engine.save_checkpoint(tmp_path)
    saved = whole(pair.model)
    pair = Pair(half_frozen, 3 - saver if other else saver, adam)
    pair.train(1)
    with zero.GatheredParameters(pair.model.parameters(), modifier_rank=0):
        pair.model[0][0].weight.data.fill_(7.0)
    pair.engine.load_checkpoint(tmp_path)
    for name, value in whole(pair.model).items():
        assert torch.equal(value, saved[name]), name
    assert [p.requires_grad for p in pair.model.parameters()] == [p.requires_grad for p in half_frozen().parameters()]


@on_ranks(2, stage=[1, 3])
def test_a_thawed_layers_state_is_resumed(stage, tmp_path):
    """Its step count, after a resume in which it is thawed before loading."""
    adam, counts = partial(torch.optim.AdamW, lr=0.01), []
    for steps in (3, 1):
        pair = Pair(half_frozen, stage, adam)
        pair.model[0].requires_grad_(True)
        if counts:
            pair.engine.load_checkpoint(tmp_path)
        for step in range(steps):
            pair.engine.backward(square(pair.engine, mine(batches(step))))
            pair.engine.step()
        pair.engine.save_checkpoint(tmp_path)
        counts.append(float(zero.safe_get_full_optimizer_state(pair.model[0][0].weight, "step")))
    assert counts == [3.0, 4.0]


def two_tags(folder: str):
    engine, loader = make(1, {}, checkpoint={"keep_last": 2})
    states = []
    for tag in ("a", "b", "c", "c"):  # the second c replaces the first
        train(engine, loader, 1)
        engine.save_checkpoint(folder, tag)
        states.append(everything(engine))
    tags = sorted(os.listdir(folder))
    engine.load_checkpoint(folder, "b")
    old = worst_of(everything(engine), states[1])[0]
    engine.load_checkpoint(folder)
    return tags, old, worst_of(everything(engine), states[3])[0]


def test_the_tag_that_is_asked_for_is_loaded_and_old_ones_go_when_the_new_is_complete(run_ranks, tmp_path):
    assert run_ranks(two_tags, 2, str(tmp_path)) == [(["b", "c", "latest"], 0.0, 0.0)] * 2


# --- Exports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 3])
def test_a_consolidated_checkpoint_has_the_models_shapes_and_ties(run_ranks, tmp_path, stage, capsys):
    (state, *_), *_ = run_ranks(save_after, 3, str(tmp_path), stage, PRECISIONS["bf16"], False, 2, 0)
    out = tmp_path / "whole.pt"
    assert deepspeed.main(["consolidate", str(tmp_path), str(out)]) == 0
    whole = torch.load(out, weights_only=True)
    model = Net()
    model.load_state_dict(whole, strict=True)
    assert model.head.weight is model.token.weight and torch.equal(model.token.weight, state["token.weight"])
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert all(t.shape == Net().state_dict()[name].shape for name, t in whole.items())
    assert deepspeed.main(["consolidate", str(tmp_path), str(out), "--dtype", "bfloat16"]) == 0
    assert torch.load(out, weights_only=True)["turned"].dtype == torch.bfloat16
    capsys.readouterr()
    assert deepspeed.main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"global_step2: step 2, saved at stage {stage} by 3 rank(s)" in printed and "turned" in printed
    assert deepspeed.main(["inspect", str(tmp_path / "none")]) == 2
    assert "engine.py: error: " in capsys.readouterr().err


def exported(folder: str, stage: int):
    engine, batches = make(stage, PRECISIONS["bf16"])
    train(engine, batches, 1)
    engine.save_16bit_model(folder, "half.bin")
    engine.save_16bit_model(folder, "thawed.bin", exclude_frozen_parameters=True)
    engine.save_checkpoint(folder, "whole")
    engine.save_checkpoint(folder, "thawed", exclude_frozen_parameters=True)
    fp32, half = engine.consolidated_fp32_state_dict(), engine._zero3_consolidated_16bit_state_dict()
    assert (half is None) == (dist.get_rank() == 1) and engine.zero_gather_16bit_weights_on_model_save()
    if half is not None:
        saved = torch.load(Path(folder) / "half.bin", weights_only=True)
        assert saved.keys() == half.keys() and all(torch.equal(saved[name], value) for name, value in half.items())
    with pytest.raises(zero.CheckpointError, match="is of another model: it lacks .'blocks.0.0.weight'."):
        engine.load_checkpoint(folder, "thawed")
    engine.load_checkpoint(folder, "thawed", load_module_strict=False)
    return fp32, {name: zero.safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}


def test_exports_in_16_bits_and_in_fp32_are_whole_and_tied(run_ranks, tmp_path):
    for stage in (1, 3):
        (fp32, masters), (nothing, _) = run_ranks(exported, 2, str(tmp_path), stage)
        half = torch.load(tmp_path / "half.bin", weights_only=True)
        thawed = torch.load(tmp_path / "thawed.bin", weights_only=True)
        frozen = half.keys() - thawed.keys()
        from_checkpoint = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
        assert frozen and from_checkpoint(tmp_path, "whole", True).keys() == thawed.keys()
        found, model = from_checkpoint(tmp_path, "whole"), Net()
        assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in fp32.items())
        deepspeed.utils.zero_to_fp32.load_state_dict_from_zero_checkpoint(model, tmp_path, "whole")
        assert all(torch.equal(value, fp32[name]) for name, value in model.state_dict().items())
        with pytest.raises(zero.CheckpointError, match="there is no checkpoint in .*none, which has no file latest"):
            from_checkpoint(tmp_path / "none")
        model = Net()
        assert fp32.keys() == half.keys() == model.state_dict().keys() and nothing == {}
        model.load_state_dict(fp32, strict=True)
        for name, value in masters.items():
            assert torch.equal(fp32[name], value.float()) and torch.equal(half[name], value.to(half[name].dtype)), name
        assert half["turned"].dtype == torch.bfloat16 and fp32["head.weight"] is fp32["token.weight"]


def cloned() -> None:
    engine, _ = make(2, {})
    clone = deepspeed.checkpoint.utils.clone_tensors_for_torch_save
    for name, value in engine.module.state_dict().items():
        copy = clone({"a": [value, 3], "b": (value,)})
        assert torch.equal(copy["a"][0], value) and torch.equal(copy["b"][0], value) and copy["a"][1] == 3, name
        assert copy["a"][0].untyped_storage().nbytes() == value.nbytes and not copy["a"][0].requires_grad


def test_a_copy_for_torch_save_holds_no_more_than_its_tensors(run_ranks):
    run_ranks(cloned, 2)


def saved_behind(folder: str):
    """Training goes on while the checkpoint is written, and what is written is what was there at the call."""
    engine, batches = make(2, {}, checkpoint={"async": True})
    train(engine, batches, 2)
    engine.save_checkpoint(folder)
    state = everything(engine)
    train(engine, batches, 3)
    engine.save_checkpoint(folder + "/no", "later")
    engine.load_checkpoint(folder)
    same = worst_of(state, everything(engine))[0]
    if dist.get_rank() == 0:
        (Path(folder) / "file").write_text("")
    dist.barrier()
    with pytest.raises(zero.CheckpointError, match="rank 0: "):
        engine.save_checkpoint(folder + "/file")
        engine.wait_for_save()
    engine.destroy()
    return same, sorted(os.listdir(folder + "/no"))


def test_an_asynchronous_save_writes_what_was_there_and_the_next_one_waits_for_it(run_ranks, tmp_path):
    assert run_ranks(saved_behind, 2, str(tmp_path)) == [(0.0, ["later", "latest"])] * 2


def full_disk(folder: str):
    """A save that finds the disk full on rank 1."""
    engine, batches = make(1, {})
    train(engine, batches, 1)
    engine.save_checkpoint(folder, "good")
    if dist.get_rank() == 1:
        write = deepspeed._write_pieces

        def fail(*args):
            deepspeed._write_pieces = write
            raise OSError(28, "No space left on device", "rank_00001.bin")

        deepspeed._write_pieces = fail
    with pytest.raises(zero.CheckpointError, match="rank 1: No space left on device: rank_00001.bin"):
        engine.save_checkpoint(folder, "bad")
    state = everything(engine)
    engine.load_checkpoint(folder)
    return worst_of(state, everything(engine))[0], [name for name in sorted(os.listdir(folder)) if name[0] != "."]


def test_a_full_disk_is_told_on_every_rank_and_the_old_checkpoint_stays(run_ranks, tmp_path):
    assert run_ranks(full_disk, 2, str(tmp_path)) == [(0.0, ["good", "latest"])] * 2


# --- Damage -----------------------------------------------------------------------------------------------------------


def load_damaged(folder: str, stage: int):
    engine, _ = make(stage, {})
    before = everything(engine)
    try:
        engine.load_checkpoint(folder)
    except zero.CheckpointError as error:
        return str(error), worst_of(before, everything(engine))[0]
    return "loaded", 0.0


def damage(folder: Path, generator: random.Random) -> str:
    """Harm one file of a checkpoint; says how."""
    file = generator.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = bytearray(file.read_bytes())
    how = generator.choice(["flip", "cut", "remove", "swap"])
    if how == "flip":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[:generator.randrange(len(data))])
    elif how == "remove":
        file.unlink()
    else:  # with the same file of another tag
        shutil.copy(next((folder.parent / "other").rglob(file.name)), file)
        if file.read_bytes() == data:
            file.unlink()
    return f"{how} {file.name}"


def save_two(folder: str):
    engine, loader = make(2, {})
    for tag in ("other", "good"):
        train(engine, loader, 1)
        engine.save_checkpoint(folder, tag)


def test_a_damaged_checkpoint_is_refused_and_nothing_changes(run_ranks, tmp_path, request):
    run_ranks(save_two, 2, str(tmp_path))
    generator = random.Random(0)
    shutil.copytree(tmp_path / "good", tmp_path / "kept")
    for _ in range(200 if request.config.getoption("--long") else 15):
        shutil.rmtree(tmp_path / "good")
        shutil.copytree(tmp_path / "kept", tmp_path / "good")
        how = damage(tmp_path / "good", generator)
        for told, changed in run_ranks(load_damaged, 2, str(tmp_path), generator.randrange(4)):
            assert "load another tag" in told and str(tmp_path) in told and changed == 0, f"{how}: {told}"


class Bad:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_code_is_refused(run_ranks, tmp_path):
    run_ranks(save_two, 2, str(tmp_path))
    evil = pickle.dumps(Bad(tmp_path / "ran-code"))
    (tmp_path / "good" / "index").write_bytes(zlib.crc32(evil).to_bytes(4) + evil)
    for told, _ in run_ranks(load_damaged, 2, str(tmp_path), 1):
        assert "good/index " in told and "weights_only" in told.lower()
    assert not (tmp_path / "ran-code").exists()


def other_model(folder: str):
    model = nn.Linear(3, 3)
    engine, *_ = deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1, "optimizer": ADAM})
    with pytest.raises(zero.CheckpointError, match="is of another model: it lacks .'bias', 'weight'."):
        engine.load_checkpoint(folder)
    assert engine.load_checkpoint(folder + "/nothing here") == (None, None)
    sgd, *_ = deepspeed.initialize(model=Net(), config={"train_micro_batch_size_per_gpu": 2, "optimizer": {
        "type": "SGD", "params": {"lr": 0.1}}})
    with pytest.raises(zero.CheckpointError, match="the optimizer AdamW, and this engine's optimizer is SGD"):
        sgd.load_checkpoint(folder)
    assert sgd.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)[0]
    for tag in ("../x", "a/b", "", ".hidden", "latest", "a ", "a.", " a", "a\n", True, [3]):
        with pytest.raises(ValueError, match="allowed: a plain folder name"):
            engine.save_checkpoint(folder, tag)
    with pytest.raises(zero.CheckpointError, match=r"client_state\['a'\]\[1\]\['model'\], a object .* can't be saved"):
        engine.save_checkpoint(folder, "unsafe", client_state={"a": [1, {"model": object()}]})
    with pytest.raises(ValueError, match="ranks disagree: .*where tag is 'tag0', .* where tag is 'tag1'"):
        engine.save_checkpoint(folder, f"tag{dist.get_rank()}")
    with pytest.raises(zero.CheckpointError, match="rank 0: .*Not a directory"):
        engine.save_checkpoint(folder + "/latest")
    return sorted(os.listdir(folder))


def test_what_does_not_fit_is_refused_on_every_rank(run_ranks, tmp_path):
    run_ranks(save_two, 2, str(tmp_path))
    for left in run_ranks(other_model, 2, str(tmp_path)):
        assert [name for name in left if not name.startswith(".")] == ["good", "latest", "other"]


def only_rank_0_saves(folder: str):
    engine, _ = make(1, {"timeout": 1})
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"save_checkpoint\(\) was not called by every rank in time"):
            engine.save_checkpoint(folder)
    return True


def test_saving_on_rank_0_alone_raises_and_says_so(run_ranks, tmp_path):
    assert run_ranks(only_rank_0_saves, 2, str(tmp_path)) == [True, True]
    run_ranks.stop()  # the barrier has left the group in a state that no other test should meet


@pytest.mark.parametrize("section, told", [({"keep_last": 0}, "checkpoint.keep_last is 0"),
                                           ({"keep_lst": 2}, "unknown key checkpoint.keep_lst")])
def test_the_section_is_checked(section, told):
    with pytest.raises(ConfigError, match=told):
        deepspeed.load_config({"train_batch_size": 1, "checkpoint": section})


# --- What is not this engine's ----------------------------------------------------------------------------------------


def unchanged_by(engine, error: type, told: str, call) -> None:
    """``call`` raises, and no weight, state or counter has changed."""
    before, counters = everything(engine), (engine.global_steps, engine.get_lr())
    with pytest.raises(error, match=told):
        call()
    assert worst_of(before, everything(engine))[0] == 0 and counters == (engine.global_steps, engine.get_lr())


def beside_others(folder: str):
    engine, _ = make(1, {}, checkpoint={"keep_last": 2})
    root, first = Path(folder), dist.get_rank() == 0
    if first:
        (root / "data").mkdir()
        (root / "data" / "index").write_text('{"fps": 30}')
        (root / "step7").mkdir()
        (root / "step7" / "tokenizer.json").write_text("{}")
    for step in (3, 9, 5, 7, 7):
        engine.global_steps = step
        engine.save_checkpoint(folder, f"step{step}", save_latest=step == 9)
        if first and step == 3:
            os.symlink("step3", root / "best")
        if first and step == 9:
            os.utime(root / "step9" / "index", (1, 1))  # where the clock was behind
    left = sorted(os.listdir(folder)), sorted(os.listdir(root / "step7"))
    dist.barrier()
    if first:
        (root / "step7" / "file").write_text("")
    for save_dir, tag, told in ((folder, "best", "best is a link"), (folder + "/step7", "file", "File exists|Not a directory"),
                                (folder, "data", "data/index is there, and is no index")):
        with pytest.raises(zero.CheckpointError, match=told):
            engine.save_checkpoint(save_dir, tag)
    assert sorted(os.listdir(folder)) == left[0] and len(os.listdir(root / "step7")) == len(left[1]) + 1
    assert engine.load_checkpoint(folder)[0].endswith("step9") and engine.load_checkpoint(folder, "best")
    return left


def test_what_others_put_beside_a_checkpoint_stays_and_old_ones_go_by_their_steps(run_ranks, tmp_path):
    """Also what ``latest`` or a link names stays."""
    for folders, files in run_ranks(beside_others, 2, str(tmp_path)):
        assert folders == ["best", "data", "latest", "step3", "step7", "step9"]
        assert len(files) == 3 and files[1:] == ["index", "tokenizer.json"], "and the folder of one save"


def two_jobs(folder: str):
    """A save inside another one's, to the same tag: by one that ends, and by one that dies."""
    engine, batches = make(1, {})
    engine.save_checkpoint(folder, "best")
    train(engine, batches, 1)
    other, _ = make(1, {}, seed="another")
    write, ends = deepspeed._write_pieces, []

    def write_with_the_other(*args):
        deepspeed._write_pieces = write
        pieces = write(*args)
        if ends:
            deepspeed._write_pieces = write_then_die
            with pytest.raises(Killed):
                other.save_checkpoint(folder, "best")
        else:
            other.save_checkpoint(folder, "best")
        return pieces

    def write_then_die(*args):
        write(*args)
        raise Killed

    for _ in range(2):
        deepspeed._write_pieces = write_with_the_other
        engine.save_checkpoint(folder, "best")
        deepspeed._write_pieces = write
        reader, _ = make(0, {}, seed="another")
        reader.load_checkpoint(folder)
        assert worst_of(everything(engine), everything(reader))[0] == 0
        ends.append(0)
    deepspeed._write_pieces = write_then_die
    with pytest.raises(Killed):
        engine.save_checkpoint(folder, "dead")
    deepspeed._write_pieces = write
    engine.save_checkpoint(folder, "best")
    return sorted(os.listdir(folder)), len(os.listdir(folder + "/best"))


def test_two_jobs_that_save_to_one_tag_never_mix_and_dead_saves_leave_nothing(run_ranks, tmp_path):
    assert run_ranks(two_jobs, 1, str(tmp_path)) == [(["best", "latest"], 2)]


def saved_while_loaded(folder: str):
    """Another job saves the tag anew between a load's check and its reading; then ranks find different saves."""
    engine, batches = make(2, {})
    engine.save_checkpoint(folder, "a", client_state={"which": 1})
    old = everything(engine)
    train(engine, batches, 1)
    new, check, read = everything(engine), deepspeed._check_fits, deepspeed._Reader

    def check_then_save(*args):
        seen = check(*args)
        deepspeed._check_fits = check
        engine.save_checkpoint(folder, "a", client_state={"which": 2})
        return seen

    loader, _ = make(1, {}, seed="another")
    deepspeed._check_fits = check_then_save
    assert loader.load_checkpoint(folder)[1] == {"which": 1} and loader.global_steps == 0
    assert worst_of(old, everything(loader))[0] == 0
    assert loader.load_checkpoint(folder)[1] == {"which": 2} and worst_of(new, everything(loader))[0] == 0
    engine.save_checkpoint(folder, "b")
    if dist.get_rank() == 1:
        deepspeed._Reader = lambda path: read(path.parent / "a")
    unchanged_by(loader, zero.CheckpointError, "b was saved anew while it was read",
                 lambda: loader.load_checkpoint(folder))
    deepspeed._Reader = read
    if dist.get_rank() == 1:
        find, deepspeed._checkpoint_folder = deepspeed._checkpoint_folder, lambda *args: Path(folder, "a")
    assert loader.load_checkpoint(folder)[0].endswith("/b")  # where rank 0 looked
    if dist.get_rank() == 1:
        deepspeed._checkpoint_folder = find
    return True


def test_a_load_beside_a_save_gives_one_checkpoint_or_an_error(run_ranks, tmp_path):
    assert run_ranks(saved_while_loaded, 2, str(tmp_path)) == [True, True]


def fails_on_one_rank(folder: str):
    engine, _ = make(1, {"timeout": 20}, checkpoint={"async": True})
    rank, told, write, group = dist.get_rank(), [], deepspeed._write_pieces, dist.new_group
    deep = []
    deep.append(deep)
    with pytest.raises(zero.CheckpointError, match="rank 1: RecursionError"):
        engine.save_checkpoint(folder, client_state={"deep": deep if rank else 0})
    if rank == 0:
        Path(folder, "file").write_text("")
    with pytest.raises(zero.CheckpointError, match="rank 0: .*(Not a directory|File exists)"):
        engine.save_16bit_model(folder + "/file")

    def fail(*args):
        raise MemoryError("none left")

    handler, options = logging.Handler(), []
    handler.emit = lambda record: told.append(record.getMessage())
    deepspeed.logger.addHandler(handler)
    deepspeed._write_pieces, dist.new_group = fail if rank else write, lambda **more: options.append(more) or group(**more)
    engine.save_checkpoint(folder, "a")
    with pytest.raises(zero.CheckpointError, match="/a was not saved: rank 1: MemoryError: none left"):
        engine.wait_for_save()
    deepspeed.logger.removeHandler(handler)
    deepspeed._write_pieces, dist.new_group = write, group
    return any("was not saved" in line for line in told), options[0]["timeout"].seconds, sorted(os.listdir(folder))


def test_whatever_fails_on_one_rank_raises_on_all_and_an_asynchronous_save_says_so_at_once(run_ranks, tmp_path):
    assert run_ranks(fails_on_one_rank, 2, str(tmp_path)) == [(True, 20, ["file"])] * 2


def test_an_engine_without_optimizer_is_saved_and_loaded(run_ranks, tmp_path):
    assert run_ranks(without_optimizer, 2, str(tmp_path)) == [[1.0, 1.0]] * 2


def without_optimizer(folder: str):
    weights = []
    for stage in (0, 3):
        engine, *_ = deepspeed.initialize(model=nn.Linear(1, 1, bias=False), config={
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}})
        if stage == 0:
            nn.init.ones_(engine.module.weight)
            engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)
        weights.append(float(zero.safe_get_full_fp32_param(engine.module.weight)))
    return weights


def laid_out(folder: str, stage: int, turned: bool):
    """Weights and moments after a save or, where the weight is ``turned``, after a load of that save."""
    torch.manual_seed(turned)
    model = nn.Linear(6, 10)
    if turned:
        model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "optimizer": ADAM, "zero_optimization": {"stage": stage}})
    engine.backward(engine(torch.ones(1, 6)).sum())
    engine.step()
    engine.load_checkpoint(folder) if turned else engine.save_checkpoint(folder)
    return [read(model.weight) for read in (zero.safe_get_full_fp32_param, *(
        partial(zero.safe_get_full_optimizer_state, key=key) for key in ("exp_avg", "exp_avg_sq")))]


def test_a_checkpoint_loads_into_a_model_that_lays_a_weight_out_in_another_way(run_ranks, tmp_path):
    for stage in range(4):
        saved = run_ranks(laid_out, 2, str(tmp_path), stage, False)
        for loaded in run_ranks(laid_out, 2, str(tmp_path), 3 - stage, True):
            assert all(torch.equal(a, b) for a, b in zip(loaded, saved[0])), f"saved at stage {stage}"


def names_and_numbers(folder: str):
    engine, _ = make(0, {})
    for tag in (0.125, 3, np.float64(0.5)):
        engine.save_checkpoint(folder, tag, {"best": np.float32(0.5), "n": [np.int64(3), (np.bool_(True),)]})
        folder_, state = engine.load_checkpoint(folder)
        assert folder_ == f"{folder}/{tag}" == engine.load_checkpoint(folder, tag)[0]
        assert state == {"best": 0.5, "n": [3, (True,)]} and type(state["best"]) is float
    for data in (b"", b"\xff\xfe", b"../a"):
        Path(folder, "latest").write_bytes(data)
        unchanged_by(engine, zero.CheckpointError, "/latest is damaged", lambda: engine.load_checkpoint(folder))
    return sorted(os.listdir(folder))


def test_numbers_are_tags_and_numpy_numbers_are_client_state(run_ranks, tmp_path):
    assert run_ranks(names_and_numbers, 1, str(tmp_path)) == [["0.125", "0.5", "3", "latest"]]


# --- Everything is checked first --------------------------------------------------------------------------------------


class Buffered(nn.Sequential):
    def __init__(self, **buffers):
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 1))
        for name, value in buffers.items():
            self.register_buffer(name, value)


def buffered(stage: int, groups: int = 2, schedule: str = "WarmupLR", accumulate: int = 1, **buffers):
    torch.manual_seed(0)
    model = Buffered(**buffers)
    parts = [list(part.parameters()) for part in model]
    parts = {2: [parts[0], parts[1] + parts[2]], 3: parts, -2: [parts[0] + parts[1], parts[2]]}[groups]
    return deepspeed.initialize(model=model, model_parameters=[{"params": part} for part in parts], config={
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulate, "optimizer": ADAM,
        "scheduler": {"type": schedule, "params": {"total_num_steps": 2000} if schedule == "WarmupDecayLR" else {}},
        "zero_optimization": {"stage": stage}})[0]


def misfits(folder: str, stage: int):
    engine = buffered(stage, mean=torch.ones(3))
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    engine.save_checkpoint(folder)
    for told, other in (("the buffer mean has the shape .3., and in this model .2.", {"mean": torch.zeros(2)}),
                        ("the buffer mean has the shape .3., and in this model .1.", {"mean": torch.zeros(1)}),
                        ("the buffer mean has the kind floating, .*int64", {"mean": torch.zeros(3, dtype=torch.int64)}),
                        ("lacks .'the buffer more'.", {"mean": torch.zeros(3), "more": torch.zeros(1)}),
                        ("also has .'the buffer mean'.", {}),
                        ("param group", {"mean": torch.zeros(3), "groups": 3}),
                        ("has the param group 1, and in this model 0", {"mean": torch.zeros(3), "groups": -2}),
                        ("the scheduler WarmupLR", {"mean": torch.zeros(3), "schedule": "WarmupDecayLR"})):
        loader = buffered(stage, **other)
        before = {name: b.clone() for name, b in loader.module.named_buffers()}
        weights = loader.consolidated_fp32_state_dict()
        with pytest.raises(zero.CheckpointError, match=told):
            loader.load_checkpoint(folder)
        after = loader.consolidated_fp32_state_dict()
        assert all(torch.equal(weights[name], after[name]) for name in weights) and loader.global_steps == 0
        assert all(torch.equal(b, before[name]) for name, b in loader.module.named_buffers()), told
    loader = buffered(stage, more=torch.zeros(1))
    assert loader.load_checkpoint(folder, load_module_strict=False)[0] and loader.global_steps == 1
    return True


def test_buffers_param_groups_and_schedule_are_checked_before_anything_changes(run_ranks, tmp_path):
    for stage in (0, 3):
        assert run_ranks(misfits, 2, str(tmp_path / str(stage)), stage) == [True, True]


def loaded_inside_a_window(folder: str):
    """A window that is given up by load_checkpoint() leaves no gradient behind."""
    worst, told, handler = [], [], logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    deepspeed.logger.addHandler(handler)
    for stage in range(4):
        engine, ends = buffered(stage, accumulate=3), []
        engine.save_checkpoint(folder)
        for bad in (False, True):
            for only_weights in (False, True) if bad else (False,):
                engine.load_checkpoint(folder)
                if bad:
                    engine.backward(engine(torch.full((1, 3), 50.0)).sum())
                    engine.step()
                    engine.load_checkpoint(folder, load_module_only=only_weights)
                for i in range(3):
                    engine.backward(engine(torch.ones(1, 3) * i).sum())
                    engine.step()
                ends.append({name: zero.safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()})
        worst += [worst_of(ends[0], end)[0] for end in ends]
        engine.backward(engine(torch.ones(1, 3)).sum())
        told.clear()
        engine.save_checkpoint(folder)
        assert dist.get_rank() or any("inside an accumulation window" in line for line in told)
        engine.destroy()
    deepspeed.logger.removeHandler(handler)
    return worst


def test_a_window_begins_empty_after_a_load_and_saving_inside_one_is_warned_of(run_ranks, tmp_path):
    assert run_ranks(loaded_inside_a_window, 2, str(tmp_path)) == [[0.0] * 12] * 2


def crafted(folder: str):
    """Pieces that overlap or are too short, each with its right checksum."""
    engine, _ = make(0, {})
    engine.save_checkpoint(folder, "a")
    path, index = Path(folder, "a", "index"), deepspeed._read_index(Path(folder, "a"))
    piece = deepspeed._Piece(*index["pieces"][0])
    for count in (None, 1, 2):
        data = torch.full((count or piece.end - piece.start,), 666.0).numpy().tobytes()
        (path.parent / index["id"] / "rank_00007.bin").write_bytes(data)
        new = piece._replace(rank=7, offset=0, checksum=zlib.crc32(data), end=piece.start + (count or len(data) // 4))
        pieces = index["pieces"] + [tuple(new)] if count is None else [tuple(new)] + index["pieces"][1:]
        deepspeed._write_index(path, index | {"pieces": pieces})
        unchanged_by(engine, zero.CheckpointError, "overlap or", lambda: engine.load_checkpoint(folder, "a"))
    with mock.patch.object(deepspeed, "VERSION", 7):
        deepspeed._write_index(path, index)
    unchanged_by(engine, zero.CheckpointError, "is of version 7 of the", lambda: engine.load_checkpoint(folder, "a"))
    return True


def test_pieces_that_overlap_or_are_short_and_newer_versions_are_refused(run_ranks, tmp_path):
    assert run_ranks(crafted, 1, str(tmp_path)) == [True]


# --- An optimizer's state of any kind ---------------------------------------------------------------------------------


class Odd(torch.optim.Optimizer):
    """Momentum, with all kinds of things in its state."""

    def __init__(self, params, lr=0.1, extra=None):
        super().__init__(params, {"lr": lr})
        self.extra = extra

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state.update(calls=0, kind="odd", rates=[0.5, 0.25], nothing=None, on=True, pair=(1, "a"),
                             weights=torch.tensor([0.5, 0.25, 0.25]), count=torch.tensor(0), mean=torch.zeros_like(p))
            state["calls"] += 1
            state["count"] += 1
            state["weights"] = state["weights"].roll(1)
            state["mean"].mul_(state["rates"][state["calls"] % 2]).add_(p.grad)
            p.sub_(state["mean"] * state["weights"][0] * self.param_groups[0]["lr"])
            if self.extra is not None:
                state["extra"] = self.extra


def odd(stage: int, extra=None):
    torch.manual_seed(0)
    return deepspeed.initialize(model=nn.Sequential(nn.Linear(3, 100), nn.Linear(100, 2)), config={
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage}}, optimizer=lambda parameters: Odd(parameters, extra=extra))[0]


def odd_steps(engine, steps: range) -> dict:
    for i in steps:
        engine.backward(engine(torch.full((1, 3), 1.0 + i)).pow(2).mean())
        engine.step()
    return {name: zero.safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}


def odd_state(folder: str, saver: int, loader: int):
    engine = odd(saver)
    odd_steps(engine, range(3))
    engine.save_checkpoint(folder, f"{saver}")
    want = odd_steps(engine, range(3, 5))
    resumed = odd(loader)
    resumed.load_checkpoint(folder)
    for state in resumed.optimizer.state.values():
        assert (state["kind"], state["rates"], state["nothing"], state["on"], state["pair"]) == \
            ("odd", [0.5, 0.25], None, True, (1, "a")) and type(state["calls"]) is int and state["on"] is True
        assert state["count"].dtype == torch.int64 and state["weights"].shape == (3,)
    return worst_of(want, odd_steps(resumed, range(3, 5)))[0]


def odd_refused(folder: str):
    for extra, told in ((lambda: 0, r"optimizer_state\['1.bias'\]\['extra'\].*, a function"),
                        (f"of rank {dist.get_rank()}", "state 'extra' of .* differs from rank to rank")):
        engine = odd(1, extra)
        odd_steps(engine, range(1))
        with pytest.raises(zero.CheckpointError, match=told):
            engine.save_checkpoint(folder)
    return os.listdir(folder)


def test_state_of_any_kind_is_kept_as_it_is_or_refused_by_name(run_ranks, tmp_path):
    for saver, loader in ((0, 2), (1, 0), (2, 3), (3, 1)):
        assert max(run_ranks(odd_state, 2, str(tmp_path / "good"), saver, loader)) < 1e-6, (saver, loader)
    (tmp_path / "bad").mkdir()
    assert run_ranks(odd_refused, 2, str(tmp_path / "bad")) == [[], []]


# --- Killed while saving ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a save in the middle. No handler of the code catches it: the files stay as a killed process leaves them."""


def killed_at_every_call(folder: str, tag: str):
    """Ends a save before its n-th change of files, for every n; loads after each; returns how many there were."""
    (Path(folder) / tag).parent.mkdir(exist_ok=True)
    calls = [(os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (deepspeed, "_write_pieces")]
    for n in range(1000):
        shutil.rmtree(folder)
        engine, batches = make(1, {})
        train(engine, batches, 1)
        engine.save_checkpoint(folder, "old")
        states = [everything(engine)]
        train(engine, batches, 1)
        states.append(everything(engine))
        left, kept = [n], {(place, name): getattr(place, name) for place, name in calls}

        def guarded(call):
            def run(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return call(*args, **kwargs)
            return run

        for (place, name), call in kept.items():
            setattr(place, name, guarded(call))
        try:
            engine.save_checkpoint(folder, tag)
            killed = False
        except Killed:
            killed = True
        for (place, name), call in kept.items():
            setattr(place, name, call)
        engine.destroy()
        resumed, batches = make(2, {})
        assert resumed.load_checkpoint(folder)[0], f"nothing loads after {n} changes"
        which = min(range(2), key=lambda i: worst_of(states[i], everything(resumed))[0])
        assert worst_of(states[which], everything(resumed))[0] == 0, f"after {n} changes: neither the old nor the new"
        assert killed or which == 1
        train(resumed, batches, 1)
        resumed.save_checkpoint(folder, tag)  # and what the dead save left behind is in nobody's way
        resumed.destroy()
        if not killed:
            return n
    return None


@pytest.mark.parametrize("tag", ["old", "new"])
def test_a_save_that_ends_before_any_of_its_changes_of_files_leaves_one_that_loads(run_ranks, tmp_path, tag):
    (changes,) = run_ranks(killed_at_every_call, 1, str(tmp_path / "runs"), tag)
    assert changes >= 10


def killed_between_files(folder: str):
    """All ranks end when rank 0 has written its file and rank 1 has not, and then when both have."""
    engine, batches = make(1, {})
    train(engine, batches, 1)
    engine.save_checkpoint(folder, "good")
    state, write, gather = everything(engine), deepspeed._write_pieces, zero.gather
    train(engine, batches, 1)
    for last_rank in (0, 1):
        def stop(*args):
            raise Killed

        def write_then_stop(*args):
            pieces = write(*args) if dist.get_rank() <= last_rank else stop()
            zero.gather = stop
            return pieces

        deepspeed._write_pieces = write_then_stop
        with pytest.raises(Killed):
            engine.save_checkpoint(folder, f"tag{last_rank}")
        deepspeed._write_pieces, zero.gather = write, gather
        dist.barrier()
        resumed, _ = make(3, {})
        resumed.load_checkpoint(folder)
        assert worst_of(state, everything(resumed))[0] == 0
        with pytest.raises(zero.CheckpointError, match="this is no complete checkpoint"):
            resumed.load_checkpoint(folder, f"tag{last_rank}")
    return True


def test_a_save_that_ends_between_the_ranks_files_leaves_the_one_before(run_ranks, tmp_path):
    assert run_ranks(killed_between_files, 2, str(tmp_path)) == [True, True]


def save_again_and_again(folder: str) -> None:
    engine, loader = make(1, {})
    while True:
        train(engine, loader, 1)
        engine.save_checkpoint(folder, "only" if engine.global_steps % 3 else None)


def load_after_kill(folder: str):
    engine, loader = make(2, {})
    path, _ = engine.load_checkpoint(folder)
    steps, state = engine.global_steps, everything(engine)
    following = train(engine, loader, 1)
    reference, other = make(2, {})
    train(reference, other, steps)
    return path is not None, worst_of(state, everything(reference))[0], following == train(reference, other, 1)


def test_killed_at_any_moment_of_a_save_the_last_complete_checkpoint_loads(run_ranks, tmp_path, request):
    generator = random.Random(1)
    for round_ in range(50 if request.config.getoption("--long") else 2):
        folder = tmp_path / str(round_)
        saver = run_ranks.context.Process(target=save_again_and_again, args=(str(folder),))
        saver.start()
        deadline = time.monotonic() + DEADLINE
        while not (folder / "latest").exists():
            assert saver.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        saver.kill()
        saver.join()
        for loaded, difference, goes_on in run_ranks(load_after_kill, 1, str(folder)):
            assert loaded and difference < 1e-5 and goes_on, f"round {round_}"
