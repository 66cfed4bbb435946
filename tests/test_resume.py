"""Saving and resuming: nothing is lost, any checkpoint loads anywhere, a damaged one is refused with nothing changed.

    .venv/bin/python -m pytest -q tests/test_resume.py
    .venv/bin/python -m pytest -q tests/test_resume.py --long     with many more draws
"""

import json
import math
import os
import pickle
import random
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import engine as deepspeed
import zero
from conftest import DEADLINE, on_ranks, warnings_of
from oracle import STAGES, WIDTH, Mlp, Pair, assert_alike, batches, mine, square

ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
PRECISIONS = {  # on the CPU, PyTorch's batch norm takes no 16-bit weights beside running means in fp32
    "fp32": {}, "bf16": {"bf16": {"enabled": True, "auto_cast": True}, "data_types": {"buffer_dtype": "bf16"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6, "auto_cast": True},
             "data_types": {"buffer_dtype": "fp16"}}}


class Net(nn.Module):
    """Tied, frozen, turned, zero-size and unused parameters, a module with two names, dropout, extra state, and buffers
    of which one is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.token.weight
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2))
                                    for _ in range(3))
        self.turned = nn.Parameter(torch.randn(3, 6).t())
        self.nothing = nn.Parameter(torch.ones(0, 6))
        self.never = nn.Parameter(torch.ones(3))
        self.blocks[0][0].weight.requires_grad_(False)
        self.blocks[2].requires_grad_(False)
        self.again = self.blocks[1]
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.calls = torch.tensor(0)

    def get_extra_state(self) -> Tensor:
        return self.calls

    def set_extra_state(self, calls: Tensor) -> None:
        self.calls = calls

    def forward(self, ids: Tensor) -> Tensor:
        self.calls = self.calls + 1
        x = self.token(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + (x @ self.turned).mean() + (x @ self.nothing.t()).sum())


FROZEN = {name for name, p in Net().named_parameters() if not p.requires_grad}


def make(stage: int = 1, precision: str = "fp32", groups: bool = False, seed: int = 0,
         **more: object) -> deepspeed.Engine:
    """An engine of Net; its ``batches`` are this file's own: the loader's, epoch after epoch."""
    torch.manual_seed(seed)
    model = Net()
    parameters = [p for p in model.parameters() if p.requires_grad or not groups]
    if groups:
        parameters = [{"params": parameters[:3], "lr": 0.003}, {"params": parameters[3:]}]
    data = TensorDataset(torch.arange(40) % 7, torch.arange(40) % 5)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, training_data=data, config={
        "train_batch_size": 12, "optimizer": ADAM, "gradient_clipping": 0.5,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": [0.01] * (1 + groups)}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 40}} | PRECISIONS[precision] | more)
    engine.batches = (batch for _ in iter(int, 1) for batch in engine.loader)
    return engine


def train(engine: deepspeed.Engine, steps: int = 1) -> list[tuple]:
    """The rate, loss, norm and loss scale of each step."""
    seen = []
    for _ in range(steps):
        ids, targets = next(engine.batches)
        rate, loss = engine.get_lr(), nn.functional.cross_entropy(engine(ids).float(), targets)
        engine.backward(loss)
        engine.step()
        seen.append((rate, loss.item(), engine.get_global_grad_norm(), engine.loss_scale()))
    return seen


def everything(engine: deepspeed.Engine) -> dict[str, Tensor]:
    """Weights, optimizer state, kept buffers and counters, by name."""
    found = {name: zero.safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    for name, p in engine.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            with suppress(ValueError):  # frozen, or never used: it has none
                state = zero.safe_get_full_optimizer_state(p, key)
                found |= {} if state is None else {f"{name} {key}": state}
    found |= {name: b.clone() for name, b in engine.module.named_buffers() if name != "scratch"}
    found |= {"calls": getattr(engine.module, "calls", torch.tensor(0))}
    return found | {"steps": torch.tensor(engine.global_steps), "rate": torch.tensor(engine.get_lr() or [0.0])}


def unchanged_by(engine: deepspeed.Engine, told: str, call: Callable, error: type = zero.CheckpointError) -> None:
    """``call`` raises, and no weight, state, buffer or counter has changed."""
    before = everything(engine)
    with pytest.raises(error, match=told):
        call()
    assert_alike(everything(engine), before, told)


def saved(folder: Path, stage: int = 1, precision: str = "fp32", groups: bool = False, steps: int = 2, **more: object):
    """An engine that has been saved."""
    engine = make(stage, precision, groups, **more)
    torch.manual_seed(dist.get_rank() + 1)
    train(engine, steps)
    engine.save_checkpoint(folder, client_state={"note": ["text", 1, torch.ones(2)], "rank": dist.get_rank()})
    return engine


def resumed(folder: Path, stage: int = 1, precision: str = "fp32", groups: bool = False) -> deepspeed.Engine:
    """An engine that has been loaded; what it was before must not matter."""
    engine = make(stage, precision, groups, seed=1)
    train(engine)
    path, client = engine.load_checkpoint(folder)
    assert path.endswith(f"global_step{engine.global_steps}") and client["note"][:2] == ["text", 1]
    ranks = json.loads(Path(path, "meta.json").read_text())["content"]["ranks"]
    assert client["rank"] == (engine.global_rank if ranks == engine.world_size else 0)
    engine.batches = (batch for _ in iter(int, 1) for batch in engine.loader)
    return engine


def state_of(make: Callable, *arguments: object) -> dict[str, Tensor]:
    """What ``run_ranks`` can bring back of an engine."""
    return everything(make(*arguments))


def folders(place: Path) -> list[str]:
    return sorted(name for name in os.listdir(place) if not name.startswith("."))


# --- Resuming ---------------------------------------------------------------------------------------------------------


@on_ranks(2, stage=STAGES, precision=PRECISIONS)
def test_n_steps_save_load_m_steps_equal_n_plus_m_bit_for_bit(stage, precision, tmp_path):
    saver = saved(tmp_path, stage, precision, steps=3)
    state, seen, end = everything(saver), train(saver, 4), everything(saver)
    loader = resumed(tmp_path, stage, precision)
    assert_alike(everything(loader), state, "loaded")
    assert train(loader, 4) == seen
    assert_alike(everything(loader), end, "trained on")
    assert loader.module.head.weight is loader.module.token.weight


@given(st.tuples(st.integers(1, 4), st.integers(0, 3), st.sampled_from(list(PRECISIONS))),
       st.tuples(st.integers(1, 4), st.integers(0, 3), st.sampled_from(list(PRECISIONS))), st.booleans())
@settings(phases=[Phase.generate], max_examples=max(8, settings().max_examples // 10))
def test_a_checkpoint_loads_at_any_stage_number_of_ranks_and_precision(run_ranks, saver, loader, groups):
    with tempfile.TemporaryDirectory() as folder:
        state, *_ = run_ranks(state_of, saver[0], saved, folder, *saver[1:], groups)
        for found in run_ranks(state_of, loader[0], resumed, folder, *loader[1:], groups):
            # Half precision rounds frozen weights; running means are each rank's own, or rank 0's on other ranks.
            half = FROZEN if (saver[2], loader[2]) != ("fp32", "fp32") else set()
            assert_alike(found, state, f"{saver} to {loader}", but=half | {name for name in state if "running" in name})
            assert all(float((found[name] - state[name]).abs().max()) < 0.01 for name in FROZEN)


@on_ranks(2, stage=STAGES)
def test_after_a_weights_only_load_a_step_at_rate_0_keeps_the_loaded_weights(stage, tmp_path):
    state = everything(saved(tmp_path))
    engine = make(stage, "bf16", seed=1)
    train(engine)
    average = partial(zero.safe_get_full_optimizer_state, engine.module.token.weight, "exp_avg")
    own = average()
    engine.load_checkpoint(tmp_path, load_module_only=True)
    assert torch.equal(average(), own)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    with mock.patch.object(engine.lr_scheduler, "step"):
        train(engine)
    assert engine.global_steps == 2
    for name, p in engine.module.named_parameters():
        assert name in FROZEN or torch.equal(zero.safe_get_full_fp32_param(p), state[name]), name


def half_frozen() -> nn.Module:
    model = Mlp(3)
    model.blocks[0].requires_grad_(False)
    return model


@on_ranks(2, stage=[1, 3])
def test_a_thawed_layers_state_is_resumed(stage, tmp_path):
    """Its step count, after a resume in which it is thawed before loading."""
    counts = []
    for steps in (3, 1):
        pair = Pair(half_frozen, stage, partial(torch.optim.AdamW, lr=0.01))
        pair.model.blocks[0].requires_grad_(True)
        if counts:
            pair.engine.load_checkpoint(tmp_path)
        for step in range(steps):
            pair.engine.backward(square(pair.engine, mine(batches(step))))
            pair.engine.step()
        pair.engine.save_checkpoint(tmp_path)
        counts.append(float(zero.safe_get_full_optimizer_state(pair.model.blocks[0][0].weight, "step")))
    assert counts == [3.0, 4.0]


@on_ranks(2)
def test_the_tag_that_is_asked_for_is_loaded_and_old_ones_go_when_the_new_is_complete(tmp_path):
    engine, states = make(checkpoint={"keep_last": 2}), []
    for tag in ("a", "b", "c", "c"):  # the second c replaces the first
        train(engine)
        engine.save_checkpoint(tmp_path, tag)
        states.append(everything(engine))
    assert folders(tmp_path) == ["b", "c", "latest"]
    for tag, state in (("b", states[1]), (None, states[3])):
        engine.load_checkpoint(tmp_path, tag)
        assert_alike(everything(engine), state, f"tag {tag}")


@on_ranks(2)
def test_an_engine_without_optimizer_is_saved_and_loaded(tmp_path):
    for stage in (0, 3):
        engine, *_ = deepspeed.initialize(model=nn.Linear(1, 1, bias=False), config={
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}})
        if stage == 0:
            nn.init.ones_(engine.module.weight)
            engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)  # it is not frozen
        engine.load_checkpoint(tmp_path)
        assert float(zero.safe_get_full_fp32_param(engine.module.weight)) == 1.0


@on_ranks(1)
def test_a_fixed_loss_scale_is_the_configs_and_a_schedule_goes_on_without_the_optimizers_state(tmp_path):
    decay = {"type": "ExponentialLR", "params": {"gamma": 0.5}}
    for step, (precision, scale) in enumerate((("bf16", 1), ("fp16", 64), ("fp16", 128), ("bf16", 1))):
        engine = make(1, precision, scheduler=decay, fp16={
            "enabled": precision == "fp16", "auto_cast": True, "loss_scale": scale})
        engine.load_checkpoint(tmp_path, load_optimizer_states=False)
        assert engine.loss_scale() == scale and engine.get_lr() == [0.01 * 0.5 ** step]
        train(engine)
        engine.save_checkpoint(tmp_path)
    rate, anew = engine.get_lr(), make(1, scheduler=decay)
    anew.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert anew.get_lr() == rate  # as in PyTorch, whose callers load the schedule's state themselves


class Counting(nn.Linear):
    """Its extra state is its own rank's, and takes a collective to make; that of its child can't be loaded."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.child, self.rank = type("Child", (nn.Module,), {"get_extra_state": lambda _: 1})(), dist.get_rank()

    def get_extra_state(self) -> list[int]:
        return [self.rank, *zero.gather(self.rank)]

    def set_extra_state(self, state: list[int]) -> None:
        self.loaded = state


@on_ranks(2, stage=[1, 3])
def test_each_rank_has_its_extra_state_back_and_what_rank_0_alone_gave(stage, tmp_path):
    engine, *_ = deepspeed.initialize(model=Counting(), config={
        "train_micro_batch_size_per_gpu": 1, "optimizer": ADAM, "zero_optimization": {"stage": stage}})
    rank = engine.global_rank
    engine.save_checkpoint(tmp_path, client_state=None if rank else {"epoch": 3})
    _, client = engine.load_checkpoint(tmp_path)
    assert client == {"epoch": 3} and engine.module.loaded == [rank, 0, 1]
    whole = engine.consolidated_fp32_state_dict()
    assert whole.keys() == ({"weight", "bias", "_extra_state"} if rank == 0 else set())


@on_ranks(1)
def test_a_checkpoint_without_extra_state_and_a_shared_modules_second_buffers_loads(tmp_path):
    """As earlier versions wrote it."""
    engine, buffers = make(), deepspeed._persistent_buffers
    with mock.patch.object(deepspeed, "_with_extra_state", return_value={}), \
            mock.patch.object(deepspeed, "_persistent_buffers", lambda model, shared=False: buffers(model)):
        engine.save_checkpoint(tmp_path)
    state = everything(engine)
    train(engine)
    engine.load_checkpoint(tmp_path)
    assert_alike(everything(engine), state, but={"calls"})


@on_ranks(2, stage=STAGES)
def test_a_checkpoint_loads_into_a_model_that_lays_a_weight_out_in_another_way(stage, tmp_path):
    states = []
    for turned in (False, True):
        torch.manual_seed(turned)
        model = nn.Linear(6, 10)
        if turned:
            model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
        engine, *_ = deepspeed.initialize(model=model, config={
            "train_micro_batch_size_per_gpu": 1, "optimizer": ADAM,
            "zero_optimization": {"stage": 3 - stage if turned else stage}})
        engine.backward(engine(torch.ones(1, 6)).sum())
        engine.step()
        engine.load_checkpoint(tmp_path) if turned else engine.save_checkpoint(tmp_path)
        states.append(everything(engine))
    assert_alike(*states)


@on_ranks(1)
def test_numbers_are_tags_and_numpy_numbers_are_client_state(tmp_path):
    engine = make(0)
    for tag in (0.125, 3, np.float64(0.5)):
        engine.save_checkpoint(tmp_path, tag, {"best": np.float32(0.5), "n": [np.int64(3), (np.bool_(True),)]})
        folder, state = engine.load_checkpoint(tmp_path)
        assert folder == f"{tmp_path}/{tag}" == engine.load_checkpoint(tmp_path, tag)[0]
        assert state == {"best": 0.5, "n": [3, (True,)]} and type(state["best"]) is float
    assert folders(tmp_path) == ["0.125", "0.5", "3", "latest"]
    for data in (b"", b"\xff\xfe", b"../a"):
        Path(tmp_path, "latest").write_bytes(data)
        unchanged_by(engine, "/latest is damaged", lambda: engine.load_checkpoint(tmp_path))


# --- Exports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 3])
def test_a_consolidated_checkpoint_has_the_models_shapes_and_ties(run_ranks, tmp_path, stage, capsys):
    state, *_ = run_ranks(state_of, 3, saved, tmp_path, stage, "bf16")
    out, model = tmp_path / "whole.pt", Net()
    assert deepspeed.main(["consolidate", str(tmp_path), str(out)]) == 0
    whole = torch.load(out, weights_only=True)
    assert all(t.shape == model.state_dict()[name].shape for name, t in whole.items())
    model.load_state_dict(whole, strict=True)
    assert model.head.weight is model.token.weight
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters() if name not in FROZEN)
    assert deepspeed.main(["consolidate", str(tmp_path), str(out), "--dtype", "bfloat16"]) == 0
    assert torch.load(out, weights_only=True)["turned"].dtype == torch.bfloat16
    capsys.readouterr()
    assert deepspeed.main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"global_step2: step 2, saved at stage {stage} by 3 rank(s)" in printed and "turned" in printed
    assert deepspeed.main(["inspect", str(tmp_path / "none")]) == 2
    assert "engine.py: error: " in capsys.readouterr().err
    values = max((tmp_path / "global_step2").glob("rank*"), key=lambda path: path.stat().st_size)
    values.write_bytes(b"\1" + values.read_bytes()[1:])
    assert deepspeed.main(["consolidate", str(tmp_path), str(out)]) == 2
    assert "the checksum of the values of" in capsys.readouterr().err


@on_ranks(2, stage=[1, 3])
def test_exports_in_16_bits_and_in_fp32_are_whole_and_tied(stage, tmp_path):
    engine, model, first = make(stage, "bf16"), Net(), dist.get_rank() == 0
    train(engine)
    engine.save_16bit_model(tmp_path, "half.bin")
    engine.save_16bit_model(tmp_path, "thawed.bin", exclude_frozen_parameters=True)
    engine.save_checkpoint(tmp_path, "whole")
    engine.save_checkpoint(tmp_path, "thawed", exclude_frozen_parameters=True)
    fp32, half = engine.consolidated_fp32_state_dict(), engine._zero3_consolidated_16bit_state_dict()
    assert (half is not None) == bool(fp32) == first and engine.zero_gather_16bit_weights_on_model_save()
    with pytest.raises(zero.CheckpointError, match="is of another model: it lacks .'blocks.0.0.weight'."):
        engine.load_checkpoint(tmp_path, "thawed")
    engine.load_checkpoint(tmp_path, "thawed", load_module_strict=False)
    masters = {name: zero.safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    dist.barrier()
    if not first:
        return
    assert fp32.keys() == half.keys() == model.state_dict().keys() and fp32["head.weight"] is fp32["token.weight"]
    for name, value in masters.items():
        assert torch.equal(fp32[name], value.float()) and torch.equal(half[name], value.to(half[name].dtype)), name
    assert half["turned"].dtype == torch.bfloat16
    files = {name: torch.load(tmp_path / name, weights_only=True) for name in ("half.bin", "thawed.bin")}
    assert_alike(files["half.bin"], half)
    from_checkpoint = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
    assert from_checkpoint(tmp_path, "whole", True).keys() == files["thawed.bin"].keys() < half.keys()
    assert_alike(from_checkpoint(tmp_path, "whole"), fp32)
    deepspeed.utils.zero_to_fp32.load_state_dict_from_zero_checkpoint(model, tmp_path, "whole")
    assert_alike(model.state_dict(), fp32)
    with pytest.raises(zero.CheckpointError, match="there is no checkpoint in .*none, which has no file latest"):
        from_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match="tag is '../x'; allowed: a plain folder name"):
        from_checkpoint(tmp_path, "../x")


@on_ranks(2)
def test_a_copy_for_torch_save_holds_no_more_than_its_tensors():
    clone = deepspeed.checkpoint.utils.clone_tensors_for_torch_save
    for name, value in make(2).module.state_dict().items():
        copy = clone({"a": [value, 3], "b": (value,)})
        assert torch.equal(copy["a"][0], value) and torch.equal(copy["b"][0], value) and copy["a"][1] == 3, name
        assert copy["a"][0].untyped_storage().nbytes() == value.nbytes and not copy["a"][0].requires_grad


# --- Saves that go wrong ----------------------------------------------------------------------------------------------


@on_ranks(2)
def test_an_asynchronous_save_writes_what_was_there_and_the_next_one_waits_for_it(tmp_path):
    engine, write, trained = make(2, checkpoint={"async": True}), deepspeed._write_pieces, threading.Event()
    train(engine)
    with mock.patch.object(deepspeed, "_write_pieces", lambda *args: trained.wait(DEADLINE) and write(*args)):
        engine.save_checkpoint(tmp_path)
        state = everything(engine)
        train(engine, 3)
        trained.set()
        engine.wait_for_save()
    engine.save_checkpoint(tmp_path / "no", "later")
    engine.load_checkpoint(tmp_path)
    assert_alike(everything(engine), state)
    assert folders(tmp_path / "no") == ["later", "latest"]
    engine.destroy()


@on_ranks(2)
def test_whatever_fails_on_one_rank_raises_on_all_and_an_asynchronous_save_says_so_at_once(tmp_path):
    """Such as a full disk, where the old checkpoint stays."""
    engine, rank, deep = saved(tmp_path / "old", timeout=20), dist.get_rank(), []
    full = OSError(28, "No space left on device", "rank_00001.bin")
    with mock.patch.object(deepspeed, "_write_pieces", side_effect=full) if rank else suppress():
        unchanged_by(engine, "rank 1: No space left on device: rank_00001.bin",
                     lambda: engine.save_checkpoint(tmp_path / "old", "bad"))
    assert engine.load_checkpoint(tmp_path / "old")[0] and folders(tmp_path / "old") == ["global_step2", "latest"]
    engine.config.checkpoint.async_ = True
    deep.append(deep)
    with pytest.raises(zero.CheckpointError, match="rank 1: RecursionError"):
        engine.save_checkpoint(tmp_path, client_state={"deep": deep if rank else 0})
    if rank == 0:
        Path(tmp_path, "file").write_text("")
    with pytest.raises(zero.CheckpointError, match="rank 0: .*(Not a directory|File exists)"):
        engine.save_16bit_model(tmp_path / "file")
    engine.save_16bit_model(tmp_path, "file")
    with mock.patch.object(torch, "save", side_effect=RuntimeError("stream")), \
            pytest.raises(zero.CheckpointError, match="rank 0: .*/file can't be written .stream"):
        engine.save_16bit_model(tmp_path, "file")
    assert not rank or torch.load(tmp_path / "file")
    if rank == 0:
        Path(tmp_path, "link").symlink_to("file")
        Path(tmp_path, "file").write_text("")
    engine.save_16bit_model(tmp_path, "link")
    assert Path(tmp_path, "link").is_symlink() and torch.load(tmp_path / "file")
    with ExitStack() as patches:
        group = patches.enter_context(mock.patch.object(dist, "new_group", wraps=dist.new_group))
        if rank:
            patches.enter_context(mock.patch.object(deepspeed, "_write_pieces", side_effect=MemoryError("none left")))

        def save_and_wait() -> None:
            engine.save_checkpoint(tmp_path, "a")
            with pytest.raises(zero.CheckpointError, match="/a was not saved: rank 1: MemoryError: none left"):
                engine.wait_for_save()

        assert any("was not saved" in line for line in warnings_of(save_and_wait))
        assert group.call_args.kwargs["timeout"].seconds == 20
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "old"]


@pytest.mark.usefixtures("fresh_ranks")
@on_ranks(2)
def test_saving_on_rank_0_alone_raises_and_says_so(tmp_path):
    engine = make(timeout=1)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"save_checkpoint\(\) was not called by every rank in time"):
            engine.save_checkpoint(tmp_path)


@on_ranks(2)
def test_what_does_not_fit_is_refused_on_every_rank(tmp_path):
    saved(tmp_path)
    other, *_ = deepspeed.initialize(model=nn.Linear(3, 3), config={"train_micro_batch_size_per_gpu": 1,
                                                                   "optimizer": ADAM})
    unchanged_by(other, "is of another model: it lacks .'bias', 'weight'.", lambda: other.load_checkpoint(tmp_path))
    told = warnings_of(lambda: other.load_checkpoint(tmp_path / "nothing here"))
    assert dist.get_rank() or any("there is no checkpoint in" in line for line in told)
    assert other.load_checkpoint(tmp_path / "nothing here") == (None, None)
    sgd = make(optimizer={"type": "SGD", "params": {"lr": 0.1}})
    unchanged_by(sgd, "AdamW, and this engine's optimizer is SGD", lambda: sgd.load_checkpoint(tmp_path))
    assert sgd.load_checkpoint(tmp_path, load_optimizer_states=False, load_lr_scheduler_states=False)[0]
    with pytest.raises(zero.CheckpointError, match=r"client_state\['a'\]\[1\]\['model'\], a object, can't be saved"):
        other.save_checkpoint(tmp_path, "unsafe", client_state={"a": [1, {"model": object()}]})
    with pytest.raises(ValueError, match="ranks disagree: .*where tag is 'tag0', .* where tag is 'tag1'"):
        other.save_checkpoint(tmp_path, f"tag{dist.get_rank()}")
    with pytest.raises(zero.CheckpointError, match="rank 0: .*Not a directory"):
        other.save_checkpoint(tmp_path / "latest")
    assert folders(tmp_path) == ["global_step2", "latest"]


@on_ranks(2)
def test_what_others_put_beside_a_checkpoint_stays_and_old_ones_go_by_their_steps(tmp_path):
    """Also what ``latest`` or a link names stays."""
    engine, first = make(checkpoint={"keep_last": 2}), dist.get_rank() == 0
    if first:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "meta.json").write_text('{"fps": 30}')
        (tmp_path / "step7").mkdir(parents=True)
        (tmp_path / "step7" / "tokenizer.json").write_text("{}")
    for step in (3, 9, 5, 7, 7):
        engine.global_steps = step
        engine.save_checkpoint(tmp_path, f"step{step}", save_latest=step == 5)
        if first and step == 3:
            os.symlink("step3", tmp_path / "best")
        if first and step == 9:
            os.utime(tmp_path / "step9" / "meta.json", (1, 1))  # where the clock was behind
    dist.barrier()
    left = ["best", "data", "latest", "step3", "step5", "step7", "step9"]
    assert folders(tmp_path) == left
    files = folders(tmp_path / "step7")
    assert [name.split(".")[0] for name in files] == ["meta", "rank_00000", "rank_00001", "state", "tokenizer"]
    dist.barrier()
    if first:
        (tmp_path / "step7" / "file").write_text("")
    for save_dir, tag, told in ((tmp_path, "best", "best is a link"),
                                (tmp_path, "data", "data/meta.json is there, and is no index"),
                                (tmp_path / "step7", "file", "File exists|Not a directory")):
        with pytest.raises(zero.CheckpointError, match=told):
            engine.save_checkpoint(save_dir, tag)
    assert folders(tmp_path) == left and len(folders(tmp_path / "step7")) == 6
    assert engine.load_checkpoint(tmp_path)[0].endswith("step5") and engine.load_checkpoint(tmp_path, "best")


class Killed(BaseException):
    """Ends a save in the middle. No handler of the code catches it: the files stay as a killed process leaves them."""


@on_ranks(1)
def test_two_jobs_that_save_to_one_tag_never_mix_and_dead_saves_leave_nothing(tmp_path):
    """A save inside another one's, to the same tag: by one that ends, and by one that dies."""
    engine, other, write = saved(tmp_path), make(seed=1), deepspeed._write_pieces
    engine.save_checkpoint(tmp_path, "best")

    def write_then_die(*args: object) -> None:
        write(*args)
        raise Killed

    for dies in (False, True):
        def write_with_the_other(*args: object) -> object:
            pieces = write(*args)
            with mock.patch.object(deepspeed, "_write_pieces", write_then_die if dies else write), \
                    pytest.raises(Killed) if dies else suppress():
                other.save_checkpoint(tmp_path, "best")
            return pieces

        with mock.patch.object(deepspeed, "_write_pieces", write_with_the_other):
            engine.save_checkpoint(tmp_path, "best")
        reader = make(0, seed=2)
        reader.load_checkpoint(tmp_path)
        assert_alike(everything(reader), everything(engine))
    with mock.patch.object(deepspeed, "_write_pieces", write_then_die), pytest.raises(Killed):
        engine.save_checkpoint(tmp_path, "dead")
    engine.save_checkpoint(tmp_path, "best")
    assert os.listdir(tmp_path).count("dead") == 0 and len(os.listdir(tmp_path)) == 3
    assert len(os.listdir(tmp_path / "best")) == 3


@on_ranks(2)
def test_a_load_beside_a_save_gives_one_checkpoint_or_an_error(tmp_path):
    """Another job saves the tag anew between a load's check and its reading; then ranks find different saves."""
    engine, loader, check, read = make(2), make(seed=1), deepspeed._check_fits, deepspeed._Reader
    engine.save_checkpoint(tmp_path, "a", client_state={"which": 1})
    old = everything(engine)
    train(engine)
    new = everything(engine)

    def check_then_save(*args: object) -> object:
        seen = check(*args)
        with mock.patch.object(deepspeed, "_check_fits", check):
            engine.save_checkpoint(tmp_path, "a", client_state={"which": 2})
        return seen

    with mock.patch.object(deepspeed, "_check_fits", check_then_save):
        assert loader.load_checkpoint(tmp_path)[1] == {"which": 1}
    assert_alike(everything(loader), old)
    assert loader.load_checkpoint(tmp_path)[1] == {"which": 2}
    assert_alike(everything(loader), new)
    engine.save_checkpoint(tmp_path, "b")
    other = dist.get_rank() == 1
    with mock.patch.object(deepspeed, "_Reader", lambda path: read(path.parent / "a")) if other else suppress():
        unchanged_by(loader, "b was saved anew while it was read", lambda: loader.load_checkpoint(tmp_path))
    elsewhere = mock.patch.object(deepspeed, "_checkpoint_folder", lambda *args: Path(tmp_path, "a"))
    with elsewhere if other else suppress():
        assert loader.load_checkpoint(tmp_path)[0].endswith("/b")  # where rank 0 looked


# --- Damage -----------------------------------------------------------------------------------------------------------


def damage(folder: Path, generator: random.Random) -> str:
    """Harm one file of a checkpoint; says how."""
    file = generator.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    how = generator.choice(["flip", "cut", "remove", "swap"])
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[:generator.randrange(len(data))])
    elif how == "remove":
        file.unlink()
    else:  # with the same file of another tag
        shutil.copy(next((folder.parent / "other").glob(f"{file.name.split('.')[0]}.*")), file)
        if file.read_bytes() == data:
            file.unlink()
    return f"{how} {file.name}"


@on_ranks(2)
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(tmp_path, is_long):
    engine, generator = make(2), random.Random(0)
    for tag in ("other", "good"):
        train(engine)
        engine.save_checkpoint(tmp_path, tag)
    engines = [make(stage, seed=1) for stage in STAGES]
    kept = shutil.copytree(tmp_path / "good", tmp_path / f"kept{dist.get_rank()}")
    dist.barrier()  # before rank 0 removes what the other one copies
    for round_ in range(200 if is_long else 15):
        if dist.get_rank() == 0:
            shutil.rmtree(tmp_path / "good")
            shutil.copytree(kept, tmp_path / "good")
        how = zero.gather(damage(tmp_path / "good", generator) if dist.get_rank() == 0 else None)[0]
        loader = engines[round_ % 4]
        unchanged_by(loader, f"(?s){tmp_path}.*load another tag", lambda: loader.load_checkpoint(tmp_path))
        dist.barrier()
        assert how


class Bad:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@on_ranks(1)
def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    engine = saved(tmp_path)
    folder, evil = tmp_path / "global_step2", pickle.dumps(Bad(tmp_path / "ran-code"))
    index = deepspeed._read_index(folder)
    (folder / index["state"]).write_bytes(evil)
    index["files"][index["state"]] = {"size": len(evil), "checksum": zlib.crc32(evil)}
    deepspeed._write_index(folder / "meta.json", index)
    unchanged_by(engine, "(?is)/state[.].*weights.only", lambda: engine.load_checkpoint(tmp_path))
    assert not (tmp_path / "ran-code").exists()


@on_ranks(1)
def test_pieces_that_overlap_or_are_short_and_newer_versions_are_refused(tmp_path):
    """Each with its right checksum."""
    engine = saved(tmp_path)
    path, load = tmp_path / "global_step2" / "meta.json", partial(engine.load_checkpoint, tmp_path)
    kept = path.read_text()
    for count in (None, 1, 2):
        index = json.loads(kept)["content"]
        piece = index["pieces"][0]
        data = torch.full((count or piece["end"] - piece["start"],), 666.0).numpy().tobytes()
        path.with_name("extra").write_bytes(data)
        index["files"]["extra"] = {"size": len(data)}
        new = {**piece, "file": "extra", "offset": 0, "size": len(data), "checksum": zlib.crc32(data),
               "end": piece["start"] + 2 if count == 2 else piece["end"]}
        index["pieces"] = index["pieces"] + [new] if count is None else [new] + index["pieces"][1:]
        deepspeed._write_index(path, index)
        unchanged_by(engine, "overlap|lacks a part", load)
    index = json.loads(kept)["content"]
    for version in (3, 1):
        saved_version = {} if version == 1 else {"version": version}  # the first had no number
        content = json.dumps({k: v for k, v in index.items() if k != "version"} | saved_version, sort_keys=True)
        path.write_text(f'{{"checksum": {zlib.crc32(content.encode())}, "content": {content}}}')
        unchanged_by(engine, f"is of version {version} of the format", load)


# --- Everything is checked first --------------------------------------------------------------------------------------


def buffered(stage: int, groups: int = 2, schedule: str = "WarmupLR", accumulate: int = 1, optimizer: dict = ADAM,
             **buffers: Tensor) -> deepspeed.Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 1))
    for name, value in buffers.items():
        model.register_buffer(name, value)
    parts = [list(part.parameters()) for part in model]
    parts = {2: [parts[0], parts[1] + parts[2]], 3: parts, -2: [parts[0] + parts[1], parts[2]]}[groups]
    return deepspeed.initialize(model=model, model_parameters=[{"params": part} for part in parts], config={
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulate, "optimizer": optimizer,
        "scheduler": {"type": schedule, "params": {"total_num_steps": 2000} if schedule == "WarmupDecayLR" else {}},
        "zero_optimization": {"stage": stage}})[0]


def step(engine: deepspeed.Engine, value: float = 1.0) -> None:
    engine.backward(engine(value * torch.ones(1, 3)).sum())
    engine.step()


MISFITS = [  # what the error says, and what this model has that the saved one had not
    ("mean has the shape .3., and in this model .2.", {"mean": torch.zeros(2)}),
    ("mean has the shape .3., and in this model .1.", {"mean": torch.zeros(1)}),
    ("mean has the kind floating, .*int64", {"mean": torch.zeros(3, dtype=torch.int64)}),
    ("lacks .'the buffer more'.", {"mean": torch.zeros(3), "more": torch.zeros(1)}),
    ("also has .'the buffer mean'.", {}), ("param group", {"mean": torch.zeros(3), "groups": 3}),
    ("has the param group 1, and in this model 0", {"mean": torch.zeros(3), "groups": -2}),
    ("scheduler WarmupLR", {"mean": torch.zeros(3), "schedule": "WarmupDecayLR"})]


@on_ranks(2, stage=[0, 3])
def test_buffers_param_groups_and_schedule_are_checked_before_anything_changes(stage, tmp_path):
    engine = buffered(stage, mean=torch.ones(3))
    step(engine)
    engine.save_checkpoint(tmp_path)
    for told, other in MISFITS:
        loader = buffered(stage, **other)
        unchanged_by(loader, told, lambda: loader.load_checkpoint(tmp_path))
    loader = buffered(stage, more=torch.zeros(1))
    assert loader.load_checkpoint(tmp_path, load_module_strict=False)[0] and loader.global_steps == 1


@on_ranks(2, stage=STAGES)
def test_a_window_begins_empty_after_a_load_and_saving_inside_one_is_warned_of(stage, tmp_path):
    """A window that is given up by load_checkpoint() leaves no gradient behind."""
    sgd = {"type": "SGD", "params": {"lr": 0.1}}  # whose first update shows every gradient, as Adam's does not
    engine, ends = buffered(stage, schedule="ConstantLR", accumulate=3, optimizer=sgd), []
    engine.save_checkpoint(tmp_path)
    for left_behind in (None, {}, {"load_module_only": True}):
        engine.load_checkpoint(tmp_path)
        if left_behind is not None:
            step(engine, 50.0)
            engine.load_checkpoint(tmp_path, **left_behind)
        for value in range(3):
            step(engine, value)
        ends.append({name: zero.safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()})
    engine.load_checkpoint(tmp_path)
    step(engine, 50.0)
    told = warnings_of(lambda: engine.save_checkpoint(tmp_path, "inside"))
    assert dist.get_rank() or any("inside an accumulation window" in line for line in told)
    engine.load_checkpoint(tmp_path, "inside")  # after micro-batches that the accumulation steps do not divide
    for value in range(3):
        step(engine, value)
    ends.append({name: zero.safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()})
    for end in ends[1:]:
        assert_alike(end, ends[0])
    engine.destroy()


class Odd(torch.optim.Optimizer):
    """Momentum, with all kinds of things in its state."""

    def __init__(self, params: object, lr: float = 0.1, extra: object = None) -> None:
        super().__init__(params, {"lr": lr})
        self.extra = extra

    @torch.no_grad()
    def step(self) -> None:
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


def cut() -> nn.Module:
    """Weights that lie in the shards of both ranks."""
    return nn.Sequential(nn.Linear(WIDTH, 100), nn.Linear(100, 2))


@on_ranks(2, saver=STAGES)
def test_state_of_any_kind_is_kept_as_it_is_or_refused_by_name(saver, tmp_path):
    pair = Pair(cut, saver, Odd)
    for each in range(3):
        pair.train(each)
    pair.engine.save_checkpoint(tmp_path)
    loaded = Pair(cut, (saver + 2) % 4, Odd)
    loaded.engine.load_checkpoint(tmp_path)
    for state in loaded.engine.optimizer.state.values():
        assert (state["kind"], state["rates"], state["nothing"], state["on"], state["pair"]) == \
            ("odd", [0.5, 0.25], None, True, (1, "a")) and type(state["calls"]) is int and state["on"] is True
        assert state["count"].dtype == torch.int64 and state["weights"].shape == (3,)
    for each in (pair, loaded):
        each.backward(3)
        each.engine.step()
    pair.plain(3)
    pair.check()
    loaded.reference = pair.reference
    loaded.check("resumed")
    for extra, told in ((lambda: 0, r"optimizer_state\['.*'\]\['extra'\].*, a function"),
                        (f"of rank {dist.get_rank()}", "state 'extra' of .* differs from rank to rank")):
        refused = Pair(cut, max(saver, 1), partial(Odd, extra=extra))
        refused.train(0)
        with pytest.raises(zero.CheckpointError, match=told):
            refused.engine.save_checkpoint(tmp_path / "bad")
    assert not (tmp_path / "bad").exists() or not folders(tmp_path / "bad")


# --- Killed while saving ----------------------------------------------------------------------------------------------


class Countdown:
    """Calls, of which the n-th and all later ones raise ``Killed`` in place of what they do."""

    def __init__(self, left: int) -> None:
        self.left = left

    def guard(self, call: Callable) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return call(*args, **kwargs)
        return run


@on_ranks(1, tag=["global_step1", "new"])
def test_a_save_that_ends_before_any_of_its_changes_of_files_leaves_one_that_loads(tag, tmp_path):
    """The save ends before its n-th change of files, for every n."""
    calls = [(os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (deepspeed, "_write_pieces")]
    for n in range(1000):
        folder, countdown = tmp_path / str(n), Countdown(n)
        engine = saved(folder, steps=1)
        states = [everything(engine)]
        train(engine)
        states.append(everything(engine))
        with ExitStack() as patches:
            for place, name in calls:
                patches.enter_context(mock.patch.object(place, name, countdown.guard(getattr(place, name))))
            with suppress(Killed):
                engine.save_checkpoint(folder, tag)
        engine.destroy()
        reader = make(2)
        assert reader.load_checkpoint(folder)[0], f"nothing loads after {n} changes"
        assert_alike(everything(reader), states[reader.global_steps - 1], f"after {n} changes")
        assert countdown.left < 0 or reader.global_steps == 2
        reader.save_checkpoint(folder, "third", save_latest=False)
        assert reader.load_checkpoint(folder)[0], "what the dead save had claimed, and not replaced, stays"
        train(reader)
        reader.save_checkpoint(folder, tag)  # and what the dead save left behind is in nobody's way
        reader.destroy()
        if countdown.left >= 0:
            break
    assert n >= 10


@on_ranks(2)
def test_a_save_that_ends_between_the_ranks_files_leaves_the_one_before(tmp_path):
    """All ranks end when rank 0 has written its file and rank 1 has not, and then when both have."""
    engine, write = saved(tmp_path), deepspeed._write_pieces
    state = everything(engine)
    train(engine)
    for last_rank in (0, 1):
        def write_then_stop(*args: object) -> object:
            pieces = write(*args) if dist.get_rank() <= last_rank else None
            gather.side_effect = Killed
            if pieces is None:
                raise Killed
            return pieces

        with mock.patch.object(zero, "gather", wraps=zero.gather) as gather, pytest.raises(Killed), \
                mock.patch.object(deepspeed, "_write_pieces", write_then_stop):
            engine.save_checkpoint(tmp_path, f"tag{last_rank}")
        dist.barrier()
        reader = make(3)
        with pytest.raises(zero.CheckpointError, match="this is no complete checkpoint"):
            reader.load_checkpoint(tmp_path, f"tag{last_rank}")
        reader.load_checkpoint(tmp_path)
        assert_alike(everything(reader), state)


def save_again_and_again(folder: Path) -> None:
    """What is saved goes along as client state: no other process trains the same to the last bit."""
    engine = make()
    while True:
        train(engine)
        engine.save_checkpoint(folder, "only" if engine.global_steps % 3 else None, client_state=everything(engine))


def load_after_kill(folder: Path) -> None:
    engine = make(2)
    path, saved = engine.load_checkpoint(folder)
    state = everything(engine)
    assert path and saved["steps"] > 0
    assert_alike(state, saved)
    before, (_, loss, *_) = state["steps"], train(engine)[0]
    assert math.isfinite(loss) and engine.global_steps == before + 1


def test_killed_at_any_moment_of_a_save_the_last_complete_checkpoint_loads(run_ranks, tmp_path, is_long):
    generator = random.Random(1)
    for round_ in range(50 if is_long else 2):
        folder = tmp_path / str(round_)
        saver = run_ranks.context.Process(target=save_again_and_again, args=(folder,))
        saver.start()
        deadline = time.monotonic() + DEADLINE
        while not (folder / "latest").exists():
            assert saver.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        saver.kill()
        saver.join()
        run_ranks(load_after_kill, 1, folder)
