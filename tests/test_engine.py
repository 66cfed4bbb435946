"""The engine's calls on one process and on ranks, its windows of micro-batches, and its data.

    .venv/bin/python -m pytest -q tests/test_engine.py

That it trains what plain PyTorch trains is in test_zero.py and test_models.py; what is refused in test_config.py.
"""

import itertools
import logging

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

import amp
import engine as deepspeed
import zero
from conftest import on_ranks
from oracle import ROWS, STAGES, Mlp, Pair, batches, plain_backward, square, start

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


def test_param_groups_keep_their_own_rates(alone):
    model = Mlp(2)
    groups = [{"params": model.blocks[0].parameters(), "lr": 0.1},
              {"params": [model.blocks[1][0].weight], "weight_decay": 0.3}]
    engine, optimizer, _, _ = alone({"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 0.01}}},
                                    model=model, model_parameters=groups)
    assert engine.get_lr() == [0.1, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]


def test_wrong_use_of_the_engine_is_told(alone):
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


def test_the_times_of_a_step_and_the_traffic_are_printed_on_request(alone, capsys):
    engine, *_ = alone({"train_batch_size": 1, "wall_clock_breakdown": True, "comms_logger": {"enabled": True}, **SGD},
                       model=nn.Linear(2, 2))
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 2)).sum())
        engine.step()
    engine.destroy()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["step 1", "step 2"]
    assert all(f"{phase} " in lines[0] for phase in ("forward", "backward", "communication", "update"))
    assert lines[2].split() == ["collective", "calls", "elements", "sent", "bytes", "sent"]


# --- Windows ----------------------------------------------------------------------------------------------------------


@on_ranks(2, stage=STAGES, how=["caller", "boundary", "sizes"])
def test_windows_of_any_length_train_what_plain_pytorch_trains(stage, how):
    """Ended by the caller's step(), by set_gradient_accumulation_boundary(), or by a batch size that changes."""
    pair = Pair(Mlp, stage, gradient_accumulation_steps=2, managed_gradient_accumulation=how != "caller")
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
    loader.num_local_io_workers = 2
    with pytest.raises(ValueError, match="num_local_io_workers is 2, .* each worker would read all"):
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
