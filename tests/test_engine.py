"""The engine's calls on one process and on ranks, its windows of micro-batches, its data; what would hang, or fails.

    .venv/bin/python -m pytest -q tests/test_engine.py
    .venv/bin/python -m pytest -q tests/test_engine.py --long     with more interruptions

That it trains what plain PyTorch trains is in test_zero.py and test_models.py; what is refused in test_config.py. The
tests' own tools are tested here too: a failing rank must fail the test, with its own traceback, and no hang.
"""

import copy
import gc
import io
import itertools
import logging
import os
import pickle
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import amp
import engine as deepspeed
import zero
from conftest import FEWEST_FILES, Program, Ranks, on_ranks
from oracle import ROWS, STAGES, WIDTH, Mlp, Model, Pair, assert_alike, batches, mine, plain_backward, square, start, \
    twins, whole

SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


# --- On one process ---------------------------------------------------------------------------------------------------


def test_without_a_launcher_a_process_is_a_group_of_its_own(alone):
    engine, optimizer, loader, schedule = alone({"train_batch_size": 4, "optimizer": {
        "type": "Adam", "params": {"lr": 0.01}}})
    assert (engine.world_size, engine.global_rank, engine.local_rank) == (1, 0, 0)
    assert isinstance(optimizer, torch.optim.AdamW) and loader is schedule is None
    assert engine.optimizer is optimizer and isinstance(engine.module, Mlp)
    assert engine.train_batch_size() == engine.train_micro_batch_size_per_gpu() == 4
    assert engine.gradient_accumulation_steps() == 1 and engine.gradient_clipping() == 1.0
    assert engine.get_global_grad_norm() == 0.0 and engine.get_lr() == [0.01]
    assert not engine.eval().module.training and engine.train().module.training
    engine.destroy()
    assert not dist.is_initialized()


def test_the_callers_optimizer_and_scheduler_win_as_objects_and_as_callables(alone, caplog):
    model, decay = nn.Linear(5, 1), torch.optim.lr_scheduler.ExponentialLR
    _, optimizer, _, schedule = alone(model=model, optimizer=lambda params: torch.optim.Adagrad(params, lr=0.3),
                                      lr_scheduler=lambda optimizer: decay(optimizer, 0.5))
    assert isinstance(optimizer, torch.optim.Adagrad) and isinstance(schedule, decay)
    given = torch.optim.SGD((model := nn.Linear(5, 1)).parameters(), lr=0.5)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(given, patience=0)
    with caplog.at_level(logging.WARNING):
        engine, optimizer, _, schedule = alone(model=model, optimizer=given, lr_scheduler=plateau)
    assert "given to initialize() is used" in caplog.text
    for _ in range(3):
        engine.backward(engine(torch.ones(4, 5)).mean())
        engine.step(lr_kwargs={"metrics": 1.0})
    assert optimizer is given and schedule is plateau and engine.get_lr() == [pytest.approx(0.005)]
    with caplog.at_level(logging.WARNING):
        alone(lr_scheduler=lambda optimizer: mock.Mock(spec=["step"]))
    assert "has no state_dict(): a resumed run begins it anew" in caplog.text


def test_param_groups_keep_their_own_rates(alone):
    model = Mlp(2)
    groups = [{"params": model.blocks[0].parameters(), "lr": 0.1},
              {"params": [model.blocks[1][0].weight], "weight_decay": 0.3}]
    engine, optimizer, _, _ = alone({"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 0.01}}},
                                    model=model, model_parameters=groups)
    assert engine.get_lr() == [0.1, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]


def test_rates_and_sizes_change_between_steps(alone):
    model = Mlp(2)
    engine, *_ = alone({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, **SGD}, model=model,
                       model_parameters=[{"params": block.parameters()} for block in model.blocks])
    for given, rates in ((1, [1.0, 1.0]), ([0.5, 0.25], [0.5, 0.25])):
        engine.set_lr(given)
        assert engine.get_lr() == rates
    engine.set_train_micro_batch_size(3)
    assert (engine.train_micro_batch_size_per_gpu(), engine.train_batch_size()) == (3, 6)
    engine.backward(square(engine, torch.ones(3, 8)))
    engine.step()
    with pytest.raises(ValueError, match="train_batch_size is 12 inside an accumulation window"):
        engine.set_train_batch_size(12)
    engine, *_ = alone({"train_batch_size": 4, "managed_gradient_accumulation": False, **SGD},
                       training_data=TensorDataset(torch.ones(4, 8)))
    with pytest.raises(ValueError, match="the data loader that initialize\\(\\) made gives 4"):
        engine.set_train_micro_batch_size(3)
    with pytest.raises(ValueError, match="with managed_gradient_accumulation false: there every step\\(\\) updates"):
        engine.set_gradient_accumulation_boundary(True)


def test_wrong_use_of_the_engine_is_told(alone, tmp_path):
    engine, *_ = alone({"train_batch_size": 8, "gradient_accumulation_steps": 2, **SGD}, model=nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        engine.backward(engine(torch.ones(4, 5)))
    engine.step()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        engine.step()
    with engine.no_sync(), pytest.raises(RuntimeError, match=r"step\(\) inside no_sync"):
        engine.step()
    blind, *_ = alone({"train_batch_size": 8}, model=nn.Linear(5, 3))
    assert blind(torch.ones(4, 5)).shape == (4, 3)
    with pytest.raises(RuntimeError, match=r"step\(\) needs an optimizer"):
        blind.step()
    with pytest.raises(RuntimeError, match=r"flush\(\) needs an optimizer"):
        blind.flush()
    for copies in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="an engine can't be copied or pickled"):
            copies(blind)
    blind.destroy()
    with pytest.raises(deepspeed.CheckpointError, match=r"\(3, 5\) belongs to no engine; .*until its engine's destroy"):
        blind.save_checkpoint(tmp_path)


def test_a_progress_line_every_so_many_steps(alone, capsys):
    """With the loss where the engine knows it: not where the caller runs backward."""
    engine, *_ = alone({"train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_print": 2,
                        "optimizer": {"type": "SGD", "params": {"lr": 0.25}}}, model=nn.Linear(1, 1))
    for index in range(12):
        loss = engine(torch.zeros(4, 1)).mean() * 0 + 3
        engine.scale(loss).backward() if index >= 8 else engine.backward(loss)
        engine.step()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4", "step 6"]
    assert all("loss 3.0000, lr 0.25, " in line and line.endswith(" samples/s") for line in lines[:2])
    assert "loss" not in lines[2] and "lr 0.25, " in lines[2]


@on_ranks(2)
def test_progress_lines_have_the_mean_loss_over_ranks():
    """And rank 0 alone prints them, with the traffic."""
    engine = start(nn.Linear(1, 1), 0, steps_per_print=1, comms_logger={"enabled": True})
    with redirect_stdout(io.StringIO()) as printed:
        engine.backward(engine(torch.zeros(ROWS, 1)).mean() * 0 + 1 + 2 * dist.get_rank())
        engine.step()
    assert bool(re.match("step 1: loss 2.0000, .*\ncollective ", printed.getvalue())) == (dist.get_rank() == 0)


def test_the_times_of_a_step_and_the_traffic_are_printed_on_request(alone, capsys):
    for device in ("none", "cpu"):
        engine, *_ = alone({"train_batch_size": 1, "wall_clock_breakdown": True, "comms_logger": {"enabled": True},
                            "zero_optimization": {"offload_optimizer": {"device": device}}, **SGD},
                           model=nn.Linear(2, 2))
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 2)).sum())
            engine.step()
        engine.destroy()
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines[:2]] == ["step 1", "step 2"]
        assert re.findall(r"(\w+) [0-9.]+ ms", lines[0]) == [
            "forward", "backward", "communication", *["offload"] * (device == "cpu"), "update"]
        assert lines[2].split() == ["collective", "calls", "elements", "sent", "bytes", "sent"]


def test_a_phase_counts_for_itself_and_not_for_the_one_around_it():
    clock = zero.Clock(torch.device("cpu"))
    clock.runs = True
    for _ in range(2):
        with mock.patch.object(time, "perf_counter", iter([0.0, 1.0, 3.0, 7.0]).__next__):
            with clock.phase("update"), clock.phase("communication"):
                pass
        assert clock.read() == {"update": 5000.0, "communication": 2000.0}


def test_a_loop_that_was_left_and_a_place_at_an_epochs_end_begin_a_new_epoch(alone):
    _, _, loader, _ = alone(training_data=TensorDataset(torch.arange(16.0)))
    next(iter(loader))
    assert sorted(torch.cat([x for x, in loader]).tolist()) == list(range(16)) and loader.epoch == 2
    place = loader.state_dict()
    third = [x.tolist() for x, in loader]
    for samples in (0, 16):  # after the loop, and in its last turn
        loader.load_state_dict(place | {"samples": samples})
        assert [x.tolist() for x, in loader] == third


# --- Windows ----------------------------------------------------------------------------------------------------------


@on_ranks(2, stage=STAGES, how=["caller", "boundary", "sizes"])
def test_windows_of_any_length_train_what_plain_pytorch_trains(stage, how):
    """Ended by the caller's step(), in debug mode; by set_gradient_accumulation_boundary(); by another batch size."""
    pair = Pair(Mlp, stage, gradient_accumulation_steps=2, managed_gradient_accumulation=how != "caller",
                debug=how == "caller")
    engine = pair.engine
    for window in ([0, 1, 2], [3], [4, 5]):
        if how == "sizes":
            engine.set_train_batch_size(ROWS * engine.world_size * len(window))
        for index in window:
            last = index == window[-1]
            if how == "boundary":
                engine.set_gradient_accumulation_boundary(last)
            pair.backward(index)
            if how != "caller" or last:
                assert engine.is_gradient_accumulation_boundary() == (how != "caller" and last)
                engine.step()
                assert engine.was_step_applied() == last
            divisor = len(window) if how == "sizes" else 2
            plain_backward(square(pair.reference, x) / divisor for x in batches(index))
        pair.plain_step()
        pair.check(f"window {window}")
    assert engine.global_steps == 3


@on_ranks(2, stage=STAGES, reset=["epoch", "two", "zero_grad"])
def test_a_window_begins_anew_with_the_count_of_micro_batches_and_with_zero_grad(stage, reset):
    """Of 3 micro-batches, after 4. As in plain PyTorch, a count that is set drops no gradients."""
    pair, updates = Pair(Mlp, stage, gradient_accumulation_steps=3), []
    for step in range(8):
        if step == 4 and reset == "zero_grad":
            pair.engine.zero_grad()
            pair.optimizer.zero_grad()
        elif step == 4:
            pair.engine.micro_steps = {"epoch": 0, "two": 2}[reset]
        pair.backward(step)
        plain_backward(square(pair.reference, x) / 3 for x in batches(step))
        pair.engine.step()
        if pair.engine.was_step_applied():
            updates.append(step)
            pair.plain_step()
        pair.check(f"micro-batch {step}")
    assert updates == {"epoch": [2, 6], "two": [2, 4, 7], "zero_grad": [2, 6]}[reset]
    assert pair.engine.micro_steps == {"epoch": 4, "two": 6, "zero_grad": 8}[reset]


@on_ranks(2)
def test_a_sharded_model_stays_where_and_what_it_is():
    """At stage 3 moves and casts that change nothing do nothing; others say what to do, and change nothing."""
    whole = start(nn.Linear(2, 2), 2)
    assert whole.half() is whole and whole.module.weight.dtype == torch.float16, "which step() refuses"
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    engine = start(model, 3)
    for call in (lambda: engine.to(engine.device), lambda: engine.to("cpu"), engine.cpu, engine.float,
                 lambda: engine.to(torch.float32), lambda: engine.to(torch.zeros(1))):
        assert call() is engine
    for call in (engine.half, engine.bfloat16, engine.double, lambda: engine.to("meta"),
                 lambda: engine.to(torch.float16), lambda: engine.to(memory_format=torch.channels_last)):
        with pytest.raises(RuntimeError, match=r"stage 3.*consolidated_fp32_state_dict"):
            call()
    engine.backward(engine(torch.ones(2, 2, 3, 3)).square().sum())
    engine.step()
    assert engine.was_step_applied() and all(t.dtype == torch.float32 for t in model.parameters())


class Expanded(nn.Module):
    """Buffers whose elements share memory, one that two modules have, and one of a dtype that gloo doesn't know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(2, 2), nn.Module()
        self.register_buffer("mask", torch.full((1, 2), float(dist.get_rank())).expand(3, 2))
        self.register_buffer("small", torch.full((2,), dist.get_rank(), dtype=torch.int16))
        self.other.register_buffer("mask", self.mask)
        self.register_buffer("table", torch.full((2, 3), float(dist.get_rank())))
        self.register_buffer("turned", self.table.t())  # a view, which follows it


@on_ranks(ranks=[1, 2])
def test_buffers_start_as_on_rank_0_and_are_saved_and_loaded_also_expanded_ones(ranks, tmp_path):
    for precision in ({}, {"bf16": {"enabled": True}}):
        engine = start(Expanded(), 0, **precision)
        mask = engine.module.mask
        assert torch.equal(mask, torch.zeros(3, 2)) and mask.is_contiguous() and not engine.module.small.any()
        engine.module.table[0, 1] = 7
        assert precision or engine.module.turned[1, 0] == 7 and engine.module.turned.sum() == 7
        mask.fill_(5)
        engine.save_checkpoint(tmp_path, "a")
        mask.zero_()
        engine.load_checkpoint(tmp_path)
        assert torch.equal(engine.module.mask.float(), torch.full((3, 2), 5.0))
        assert precision or engine.module.other.mask is engine.module.mask
        engine.destroy()


# --- Data -------------------------------------------------------------------------------------------------------------


@on_ranks(2, case=[(12, False, [2, 2, 2]), (11, False, [2, 2, 2]), (9, False, [2, 2, 1]), (9, True, [2, 2])])
def test_ranks_share_the_data_out_in_a_new_order_every_epoch(case):
    (samples, drop_last, per_rank), runs = case, []
    for _ in range(2):
        torch.manual_seed(7 + dist.get_rank())  # rank 0's seed decides
        data = TensorDataset(torch.arange(samples), torch.arange(samples) * 10)
        _, _, loader, _ = deepspeed.initialize(model=nn.Linear(1, 1), training_data=data, config={
            "train_micro_batch_size_per_gpu": 2, "dataloader_drop_last": drop_last})
        assert len(loader) == len(per_rank)
        runs.append([])
        for _ in range(2):
            given = [(x.tolist(), y.tolist()) for x, y in loader]
            assert [len(x) for x, _ in given] == per_rank and all(y == [10 * v for v in x] for x, y in given)
            runs[-1].append(sum(zero.gather(sum((x for x, _ in given), [])), []))
            assert drop_last or set(runs[-1][-1]) == set(range(samples)), "every sample is seen"
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1], "the seed decides"


def loaders(monkeypatch: pytest.MonkeyPatch, ranks: int, batch_size: int, samples: int = 24) -> list:
    """The loaders of so many ranks, in this one process."""
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(zero, "gather", lambda value: [value])
    monkeypatch.setattr(torch, "initial_seed", lambda: 5)
    return [deepspeed.ShardedLoader(torch.arange(samples), batch_size, torch.device("cpu"), None, False)
            for _ in range(ranks)]


def give(monkeypatch: pytest.MonkeyPatch, loaders: list, batches: int = 10**6) -> list:
    """The samples of the next loop's first micro-batches, in the order in which they are given out."""
    shares = []
    for rank, loader in enumerate(loaders):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        shares.append([batch.tolist() for _, batch in zip(range(batches), loader)])
    return [v for together in zip(*shares) for v in sum(together, [])]


def test_an_epoch_is_resumed_with_any_number_of_ranks_and_batch_size_and_each_sample_seen_once(monkeypatch):
    sizes = [(ranks, batch_size) for ranks in (1, 2, 3) for batch_size in (1, 3, 8)]
    for (ranks, batch_size), (new_ranks, new_size), done in itertools.product(sizes, sizes, (1, 2)):
        case = (ranks, batch_size, new_ranks, new_size, done)
        if ranks * batch_size * done >= 24:
            continue
        before, after = loaders(monkeypatch, ranks, batch_size), loaders(monkeypatch, new_ranks, new_size)
        seen = give(monkeypatch, before, done)
        for loader in after:
            loader.load_state_dict(before[0].state_dict())
        rest = give(monkeypatch, after)
        spare = -(24 - len(seen)) % new_ranks  # given twice, where the ranks do not divide what is left
        assert len(seen + rest) == 24 + spare and set(seen + rest) == set(range(24)), case
        if (ranks, batch_size) == (new_ranks, new_size):
            assert seen + rest == give(monkeypatch, loaders(monkeypatch, ranks, batch_size)), case
        assert {loader.state_dict()["samples"] for loader in after} == {0}
        assert sorted(set(give(monkeypatch, after))) == list(range(24)) and after[0].epoch == 2, case


@pytest.mark.parametrize("workers", [0, 2])
def test_a_place_that_is_loaded_inside_a_loop_is_where_it_goes_on(monkeypatch, workers):
    """Also where workers have read further."""
    (loader,), (other,) = loaders(monkeypatch, 1, 2), loaders(monkeypatch, 1, 2)
    loader.num_local_io_workers = workers
    whole, seen = give(monkeypatch, [other]), []
    for i, batch in enumerate(loader):
        seen += batch.tolist()
        if i == 2:
            state = loader.state_dict()
        if i == 5:
            loader.load_state_dict(state)
    assert seen == whole[:12] + whole[6:] and len(list(loader)) == 12 and loader.epoch == 2
    for i, batch in enumerate(loader):
        if i == 3:
            loader.load_state_dict(state)
            break
    assert give(monkeypatch, [loader]) == whole[6:]
    assert len(loader) == 12 and loader.epoch == 1


class Noisy(Dataset):
    """Each sample is a random number."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(())


def test_a_resumed_epoch_does_not_repeat_what_its_workers_drew(alone):
    _, _, loader, _ = alone({"train_batch_size": 1}, training_data=Noisy())
    loader.num_local_io_workers = 1
    first = [float(batch) for batch in loader]
    loader.load_state_dict({"epoch": 1, "samples": 3, "seed": loader.seed})
    rest = [float(batch) for batch in loader]
    assert len(rest) == 3 and not set(rest) & set(first)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(4.0))


@pytest.mark.parametrize("kind", [Stream, type("Sized", (Stream,), {"__len__": lambda self: 4})])
@pytest.mark.parametrize("size, rest", [(1, [[1.0], [2.0], [3.0]]), (2, [[1.0, 2.0], [3.0]])])
def test_a_stream_is_saved_and_goes_on_where_it_was(alone, tmp_path, kind, size, rest):
    engine, _, loader, _ = alone({"train_batch_size": 1}, training_data=kind())
    next(iter(loader))
    engine.save_checkpoint(tmp_path, 1)
    engine, _, loader, _ = alone({"train_batch_size": size}, training_data=kind())
    engine.load_checkpoint(tmp_path)
    assert [batch.tolist() for batch in loader] == rest
    loader.num_local_io_workers = 1
    assert sum(batch.numel() for batch in loader) == 4
    for workers, told in ((2, "is 2, .* each worker would read in full; allowed: 0 or 1"), (-1, "is -1; allowed")):
        loader.num_local_io_workers = workers
        with pytest.raises(ValueError, match=f"num_local_io_workers {told}"):
            next(iter(loader))


@on_ranks(2)
def test_a_stream_is_for_one_rank_only():
    with pytest.raises(ValueError, match="IterableDataset.*can't be divided among 2 ranks"):
        deepspeed.initialize(model=Mlp(), training_data=Stream(), config={"train_micro_batch_size_per_gpu": 2})


class Batch(dict):
    """Items that are attributes as well."""

    def __init__(self, **items: Tensor) -> None:
        super().__init__(items)
        self.__dict__ = self


def test_a_batch_keeps_its_class(alone):
    _, _, loader, _ = alone(model=nn.Linear(1, 1), training_data=[torch.ones(1)] * 4,
                            collate_fn=lambda rows: Batch(x=torch.stack(rows)))
    batch = next(iter(loader))
    assert type(batch) is Batch and torch.equal(batch.x, torch.ones(4, 1)) and batch.x is batch["x"]
    moved = deepspeed._to_device(batch, torch.device("meta"))
    assert type(moved) is Batch and moved.x.is_meta and moved["x"] is moved.x and not batch.x.is_meta
    assert amp.cast(batch, torch.float16).x.dtype == torch.float16 and batch.x.dtype == torch.float32


# --- What would hang is said ------------------------------------------------------------------------------------------


def choice() -> Model:
    """Two experts, of which the caller chooses one."""
    return Model(lambda m, x, expert: m.experts[expert](m.first(x)), first=nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4)), experts=[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])


def start_choice(stage: int, debug: bool = True, **options):
    torch.manual_seed(0)
    return start(choice(), stage, partial(torch.optim.SGD, lr=0.1), {"reduce_bucket_size": 10}, debug=debug, **options)


def choose(engine, expert: int, steps: int = 2) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, 4), expert).sum())
        engine.step()


@on_ranks(2)
def test_debug_names_rank_module_parameter_and_operation_where_ranks_go_apart():
    with pytest.raises(RuntimeError, match=r"collective 3: rank 0 .*all-gather of .*experts.0.0.weight to "
                                           r"experts.0.0.bias \(128 elements, float32\), rank 1 .*experts.1.0.weight"):
        choose(start_choice(3), expert=dist.get_rank())


@pytest.mark.usefixtures("fresh_ranks")  # the ranks go apart
@on_ranks(2)
def test_debug_names_the_rank_that_does_not_come_and_what_it_did_last():
    """Rank 1 does not come to the second step."""
    engine = start_choice(2, timeout=77)
    choose(engine, 0, steps=1)
    logbook = engine.zero.communicator.logbook
    assert logbook.timeout == 77
    logbook.timeout = 0.5  # only now, since a rank that comes may be slow
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="rank 0 .*collective 10: reduce-scatter of experts.1.0.weight.* 0.5 "
                                               "seconds .*rank 1, .*9: all-gather of first.0.weight"):
            choose(engine, 0)


@on_ranks(2)
def test_a_forward_pass_without_backward_is_no_micro_batch():
    """Rank 0 has one forward pass more, and ends later than rank 1 waits for it."""
    engine = start_choice(1, debug=False)
    choose(engine, expert=0)
    with mock.patch.object(zero.Logbook, "PATIENCE", 0.01):
        if dist.get_rank() == 0:
            engine(torch.ones(2, 4), 0)
            dist.barrier()
        dist.barrier()
        engine.destroy()
        if dist.get_rank() == 1:
            dist.barrier()


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.long) for stage in range(3)), 3])
@pytest.mark.usefixtures("fresh_ranks")  # their group is gone
@on_ranks(2)
def test_uneven_data_raises_on_every_rank_with_the_counts(stage):
    """Rank 1 runs out of data one step early."""
    rank = dist.get_rank()
    engine = start(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))), stage)
    with pytest.raises(RuntimeError, match="numbers of micro-batches: rank 0 is in its micro-batch 3, rank 1 ended"):
        for _ in range(3 - rank):
            engine.backward(engine(torch.ones(2, 4)).sum())
            engine.step()
        while rank == 1 and engine.zero.communicator.logbook.read()[0][0] < 3:
            time.sleep(0.01)  # until rank 0 has begun its third: it may be slow
        with mock.patch.object(zero.Logbook, "PATIENCE", 2.0):
            engine.destroy()
    del engine
    gc.collect()  # or this rank's connection lives on, and the other one waits for its timeout
    dist.destroy_process_group()


@on_ranks(2)
def test_a_waiting_rank_says_so_before_nccl_would_end_the_process():
    """Rank 1 waits in its second micro-batch, as on NCCL, whose collectives raise nothing."""
    logbook = zero.Logbook(77, timeout=1.0)
    dist.barrier()
    assert re.match("ranks lost each other: rank 0 is in its micro-batch 0, rank 1 is in its micro-batch 0; .*debug",
                    logbook.report())
    dist.barrier()
    logbook.write(1 + dist.get_rank())
    dist.barrier()
    told = []
    with mock.patch.object(zero.logger, "error", lambda text, *args: told.append(text % args)):
        logbook.watch()
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
    assert time.monotonic() - deadline + 60 > 0.7, "too early"
    dist.barrier()
    assert len(told) == 1, "told again, without anything having begun since"
    assert re.search(f"rank {dist.get_rank()} has begun nothing for 1 seconds; NCCL .*rank 0 is in its micro-batch 1, "
                     "rank 1 is in its micro-batch 2", told[0]), told


def mixture(blocks: int) -> Model:
    """In each block a rank uses the experts that it is given, perhaps none."""
    def block(m, x, chosen):
        x = x + torch.tanh(m.first(x))
        return x + sum(m.experts[index](x) for index in chosen)

    def forward(m, x, order, chosen):
        for index in order:
            x = m.blocks[index](x, chosen[index])
        return m.head(x)

    return Model(forward, head=nn.Linear(4, 1), blocks=[Model(
        block, first=nn.Linear(4, 4), experts=[nn.Linear(4, 4) for _ in range(3)]) for _ in range(blocks)])


def collectives_of(seed: int) -> list[str]:
    """What a rank sends, in its order, while ranks use different experts of a model that is drawn."""
    same, own = random.Random(seed), random.Random(f"{seed} {dist.get_rank()}")
    blocks = same.randint(2, 7)
    torch.manual_seed(seed)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": same.randint(1, 2),
              "optimizer": {"type": "AdamW", "params": {}},
              "zero_optimization": {"stage": seed % 4, "reduce_bucket_size": same.choice([10, 60, 1000])}}
    if same.random() < 0.4:
        config["activation_checkpointing"] = {}
    engine, *_ = deepspeed.initialize(model=mixture(blocks), config=config)
    sent, begin = [], zero.Communicator._begin

    def record(self, kind, tensor, times, what):
        sent.append(f"{kind} of {what()}")
        begin(self, kind, tensor, times, what)

    with mock.patch.object(zero.Communicator, "_begin", record):
        for _ in range(4):
            order = same.sample(range(blocks), same.randint(1, blocks))  # as LayerDrop takes some, on all ranks alike
            chosen = [own.sample(range(3), own.randint(0, 2)) for _ in range(blocks)]
            engine.backward(engine(torch.ones(2, 4, requires_grad=own.random() < 0.5), order, chosen).square().mean())
            engine.step()
    engine.destroy()
    return sent


def test_gathers_and_reductions_have_one_order_on_all_ranks_whatever_parts_of_blocks_they_use(run_ranks, is_long):
    """NCCL has a communicator for each of the two, and asks for one order of both: else ranks can wait for ever."""
    for seed in range(200 if is_long else 16):
        first, *others = run_ranks(collectives_of, 3, seed)
        for other in others:
            place = next((i for i, pair in enumerate(zip(first, other)) if len(set(pair)) > 1), None)
            assert first == other, f"seed {seed}: ranks go apart at {place}: {first[place]}, {other[place]}"
        assert any("reduce" in what for what in first)


# --- Errors in a step, and in the tests' own tools --------------------------------------------------------------------


@on_ranks(2)
def test_a_collective_that_nobody_waits_for_stops_no_other():
    """As after an error in a backward of stage 3, which has begun to gather what comes next."""
    store = dist.distributed_c10d._get_default_store()
    for attempt in range(3):
        communicator = zero.Communicator(torch.device("cpu"))
        flat = torch.full((2**20,), float(dist.get_rank()))
        if dist.get_rank() == 1:
            store.wait([f"dropped {attempt}"])  # what this rank sends has no receiver any more
        handle = communicator.all_gather(flat)
        del handle, flat, communicator
        gc.collect()
        store.set(f"dropped {attempt}", "by rank 0")
        assert zero.gather(dist.get_rank()) == [0, 1]


class Interruption(Exception):
    pass


def in_zero(work: Callable, interrupt_at: int = -1) -> int:
    """How many functions of zero.py are called in ``work()``; the one of that number raises Interruption."""
    calls = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        code = frame.f_code
        if event == "call" and code.co_filename == zero.__file__ and not code.co_qualname.startswith("Handle.__"):
            calls += 1
            if calls == interrupt_at:
                sys.setprofile(None)
                raise Interruption(f"call {calls}, {code.co_qualname}")

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def interrupted(pair: Pair, work: Callable, points: int) -> Iterator[str]:
    """Interrupt ``work(pair)`` on all ranks at as many points; says where it did."""
    calls = min(zero.gather(in_zero(lambda: work(pair))))
    for point in range(1, calls, max(1, calls // points)):
        pair.__init__(Mlp, pair.engine.zero_optimization_stage())
        pair.train(0)
        ended = False
        with suppress(Interruption):
            in_zero(lambda: work(pair), point)
            ended = True  # what is raised where nothing can be is printed and lost
        if not ended:
            yield f"interrupted at call {point} of {calls}"


def fail_and_begin_anew(stage: int, points: int) -> None:
    """Interrupt steps; the engine is dropped, and a new one trains."""
    for where in interrupted(Pair(Mlp, stage), lambda pair: pair.train(1), points):
        pair = Pair(Mlp, stage)
        pair.train(0)
        pair.train(1)
        pair.check(f"another engine after a step that was {where}")


def fail_and_go_on(stage: int, points: int) -> None:
    """Interrupt backward passes; the engine leaves their gradients out."""
    pair = Pair(Mlp, stage)
    for turn, where in enumerate(interrupted(pair, lambda pair: pair.backward(1), points)):
        if turn % 2:
            pair.engine.zero_grad()  # which changes nothing
        pair.train(2)
        pair.train(3)
        pair.check(f"after a backward that was {where}")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("body", [fail_and_begin_anew, fail_and_go_on])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_error_anywhere_in_a_step_does_no_harm_to_what_follows(run_ranks, body, stage, is_long):
    run_ranks(body, 2, stage, 80 if is_long else 5)


@pytest.mark.parametrize("where", ["in a hook", "at the end"])
def test_a_backward_that_raised_is_left_out_and_said(where, caplog):
    """In fp16 too, where gradients without a loss scale are an error."""
    def loss(engine):
        return engine(torch.ones(2, WIDTH).half()).float().square().sum()

    weights = []
    for fails in (False, True):
        model = twins(Mlp)[0]
        engine = start(model, 1, fp16={"enabled": True, "initial_scale_power": 4})
        if fails:
            hook = model.blocks[1][0].weight.register_hook(lambda grad: 1 / 0 if where == "in a hook" else grad)
            with pytest.raises(ZeroDivisionError), mock.patch.object(
                    engine.zero, "finish_backward", side_effect=ZeroDivisionError):
                engine.backward(loss(engine))
            hook.remove()
        engine.backward(loss(engine))
        engine.step()
        weights.append(whole(model))
        engine.destroy()
    assert_alike(*weights)
    assert [r.getMessage() for r in caplog.records if "backward() raised" in r.getMessage()] == [
        "the last backward() raised: the gradients of its window are dropped"]


def fail_in_a_window(engine) -> None:
    """A micro-batch whose backward raises, in a script that goes on to step()."""
    with suppress(ZeroDivisionError), mock.patch.object(engine.zero, "finish_backward", side_effect=ZeroDivisionError):
        engine.backward(square(engine, mine(batches(9))))


@on_ranks(1, calls=[("step",), ("scale",), ("step", "scale"), ()])
def test_the_micro_batch_of_a_backward_that_raised_does_not_count(calls):
    """Its window begins anew, whatever the script calls next."""
    pair = Pair(Mlp, 1, gradient_accumulation_steps=2)
    pair.backward(8)
    pair.engine.step()
    fail_in_a_window(pair.engine)
    if "step" in calls:
        pair.engine.step()  # the window's end
        assert not pair.engine.was_step_applied()
    for step in (1, 2):
        loss = square(pair.engine, mine(batches(step)))
        pair.engine.scale(loss / 2).backward() if "scale" in calls and step == 1 else pair.engine.backward(loss)
        pair.engine.step()
    assert pair.engine.was_step_applied()
    if "scale" not in calls:
        pair.plain(1, 2)
        pair.check()


@on_ranks(2, case=[case for case in itertools.product(STAGES, (1, 2), ("in autograd", "before"), ((1,), (0, 1)))
                   if case[0] < 3 or case[3] == (0, 1)])
def test_where_a_backward_raises_on_one_rank_alone_or_on_all_all_drop_its_window(case):
    """Alone at stage 3 they can't: there ranks wait for each other's weights within a backward."""
    stage, window, cause, failing = case
    pair = Pair(Mlp, stage, gradient_accumulation_steps=window)
    for step in range(2 * window):
        fails = dist.get_rank() in failing and step == 0
        loss = square(pair.engine, mine(batches(step)))
        hook = loss.register_hook(lambda grad: 1 / 0) if fails and cause == "in autograd" else None
        with pytest.raises((ZeroDivisionError, RuntimeError)) if fails else nullcontext():
            pair.engine.backward(loss.detach() if fails and cause == "before" else loss)
        if hook is not None:
            hook.remove()
        pair.engine.step()
        assert pair.engine.was_step_applied() == (step == 2 * window - 1)
    pair.plain(*range(window, 2 * window))
    pair.check(str(case))


def total(value: float) -> float:
    tensor = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(tensor)
    return tensor.item()


def fail_on_one(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "exit":
            os._exit(3)
        raise KeyError("told to")
    total(1.0)  # waits for rank 1


@pytest.mark.parametrize("how, told", [("raise", "KeyError: 'told to'"), ("exit", "rank 1 of 2")])
def test_one_failing_rank_fails_the_test_and_the_next_test_works(run_ranks, how, told):
    for world_size in (2, 1, 4):
        assert run_ranks(total, world_size, 2.0) == [world_size * (world_size + 1.0)] * world_size
    with pytest.raises(pytest.fail.Exception, match=told):
        run_ranks(fail_on_one, 2, how)
    assert run_ranks(total, 2, 1.0) == [3.0, 3.0]


def two_lanes(run_ranks: Ranks, folder: Path, first: str, second: str) -> tuple[int, str, str]:
    """pytest on files enough for two lanes: what each lane's tests do, the first lane's once the second runs."""
    for number in range(FEWEST_FILES):
        (folder / f"test_{number}.py").write_text(f"""import os, pathlib, time
first_lane = os.getpid()
def test_it():
    runs = pathlib.Path({str(folder / "runs")!r})
    if os.getpid() != first_lane:
        runs.touch()
        {second}
    while not runs.exists():
        time.sleep(0.01)
    {first}
""")
    script = str(Path(pytest.__file__).with_name("__main__.py"))
    return Program(run_ranks, folder / "printed", [script, "-q", "-p", "conftest", "-p", "no:cacheprovider"],
                   folder).end()


def test_what_fails_in_either_lane_is_told_with_what_it_printed(run_ranks, tmp_path):
    code, out, _ = two_lanes(run_ranks, tmp_path, "assert not 'right here'", "print('there'); assert not 'right'")
    assert code == 1 and f"{FEWEST_FILES} failed" in out, out
    assert "assert not 'right here'" in out and re.search(r"stdout call -+\nthere\n", out), out


def test_a_lane_that_dies_fails_the_suite(run_ranks, tmp_path):
    code, out, err = two_lanes(run_ranks, tmp_path, "pass", "os._exit(4)")
    assert code == 3 and "the second lane died with exit code 4" in out + err, out + err
