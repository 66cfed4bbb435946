"""The engine against plain PyTorch on the whole batch, and against bad input.

    .venv/bin/python -m pytest -q tests/test_engine.py
"""

import argparse
import copy
import itertools
import json
import logging
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import amp
import engine as deepspeed
import zero
from engine import ConfigError

BATCH = 18  # divisible by every ranks * accumulation below


class Net(nn.Module):
    """Two layers, a buffer, a layer that only some samples use, a frozen and a non-contiguous parameter."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second, self.rare = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 3)
            self.turned = nn.Parameter(torch.randn(3, 7).t())
            self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.register_buffer("shift", torch.full((7,), float(seed)))
        self.register_buffer("small", torch.full((2,), seed, dtype=torch.int16))  # a dtype gloo doesn't know
        self.never = nn.Parameter(torch.ones(2))

    def forward(self, x, rare=False):
        hidden = torch.tanh(self.first(x)) + self.frozen + self.shift
        return self.second(hidden) + hidden @ self.turned + (self.rare(hidden) if rare else 0)


def batches(steps: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(BATCH, 5, generator=generator), 3 * torch.randn(BATCH, 3, generator=generator)
        yield x.to(dtype), y.to(dtype)


def plain_training(steps: int, clip: float, dtype, name: str, params: dict, rare_rows: int = 0):
    """Plain PyTorch on whole batches: [(loss, norm, rate)] per step, and the weights."""
    model = Net().to(dtype)
    optimizer = getattr(torch.optim, name)(model.parameters(), **params)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    seen = []
    for x, y in batches(steps, dtype):
        out = model(x)
        if rare_rows:
            out = torch.cat([model(x[:rare_rows], rare=True), out[rare_rows:]])
        loss = (out - y).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        seen.append((loss.item(), norm.item(), optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return seen, [p.detach() for p in model.parameters()]


def engine_training(steps: int, accumulation: int, clip: float, dtype, name: str, params: dict,
                    rare_rank: bool = False):
    """The same through the engine. Ranks start from different weights: rank 0's must win."""
    model = Net(seed=dist.get_rank()).to(dtype)
    config = {"train_batch_size": BATCH, "gradient_accumulation_steps": accumulation, "gradient_clipping": clip,
              "optimizer": {"type": name, "params": params},
              "scheduler": {"type": "ExponentialLR", "params": {"gamma": 0.9}}}
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    world, rank, seen = dist.get_world_size(), dist.get_rank(), []
    for x, y in batches(steps, dtype):
        total, rate = torch.zeros((), dtype=dtype), engine.get_lr()[0]
        rows = BATCH // world
        mine = slice(rank * rows, (rank + 1) * rows)
        for part_x, part_y in zip(x[mine].chunk(accumulation), y[mine].chunk(accumulation)):
            loss = (engine(part_x, rare=rare_rank and rank == 0) - part_y).square().mean()
            total += engine.backward(loss).detach()
            assert engine.is_gradient_accumulation_boundary() == ((engine.micro_steps + 1) % accumulation == 0)
            engine.step()
        dist.all_reduce(total)
        seen.append((float(total) / world, engine.get_global_grad_norm(), rate))
    assert (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps) == \
        (steps, steps * BATCH, steps * accumulation, 0)
    assert all(p.grad is None for p in model.parameters())
    return seen, [p.detach() for p in model.parameters()]


def assert_same_training(mine, reference, tolerance: float):
    (seen, weights), (expected, expected_weights) = mine, reference
    for step, (got, wanted) in enumerate(zip(seen, expected, strict=True)):
        for what, a, b in zip(("loss", "norm", "rate"), got, wanted):
            assert a == pytest.approx(b, rel=tolerance), f"step {step}: {what}"
    for (name, _), a, b in zip(Net().named_parameters(), weights, expected_weights, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), \
            f"after step {len(seen) - 1}: {name}: largest difference {float((a - b).abs().max()):.3g}"


@pytest.mark.parametrize("clip", [0.0, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_equals_plain_pytorch_on_the_whole_batch(run_ranks, world_size, accumulation, clip):
    for name, params in (("SGD", {"lr": 0.1, "momentum": 0.9}), ("AdamW", {"lr": 0.01, "weight_decay": 0.1})):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            reference = plain_training(5, clip, dtype, name, params)
            for mine in run_ranks(engine_training, world_size, 5, accumulation, clip, dtype, name, params):
                assert_same_training(mine, reference, tolerance)


def test_a_layer_that_only_one_rank_uses_counts_as_zero_on_the_others(run_ranks):
    arguments = (0.5, torch.float64, "AdamW", {"lr": 0.01, "weight_decay": 0.1})
    reference = plain_training(3, *arguments, rare_rows=BATCH // 2)
    for mine in run_ranks(engine_training, 2, 3, 1, *arguments, True):
        assert_same_training(mine, reference, 1e-12)


def test_clipping_is_at_1_when_the_config_does_not_say(run_ranks):
    reference = plain_training(3, 1.0, torch.float64, "SGD", {"lr": 0.1})
    assert reference[0][0][1] > 1.0, "else nothing is clipped"
    config = {"train_batch_size": BATCH, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
              "scheduler": {"type": "ExponentialLR", "params": {"gamma": 0.9}}}
    for weights in run_ranks(final_weights, 2, config):
        for name, a, b in zip(dict(Net().named_parameters()), weights, reference[1], strict=True):
            assert (a - b).abs().max() < 1e-12, name


def final_weights(config: dict):
    model = Net().double()
    engine, *_ = deepspeed.initialize(model=model, config=config)
    for x, y in batches(3, torch.float64):
        rows = slice(dist.get_rank(), None, dist.get_world_size())
        engine.backward((engine(x[rows]) - y[rows]).square().mean())
        engine.step()
    return [p.detach() for p in model.parameters()]


# --- The engine's calls -----------------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    """A test without any launcher: the engine starts and ends its own group of one."""
    engines = []

    def make(config=None, model=None, **kwargs):
        model = model or Net()
        made = deepspeed.initialize(model=model, config=config or {"train_batch_size": 4, "optimizer": {
            "type": "Adam", "params": {"lr": 0.01}}}, **kwargs)
        engines.append(made[0])
        return made

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def test_without_a_launcher_a_process_is_a_group_of_its_own(alone):
    engine, optimizer, loader, schedule = alone()
    assert (engine.world_size, engine.global_rank, engine.local_rank) == (1, 0, 0)
    assert isinstance(optimizer, torch.optim.AdamW) and loader is schedule is None
    assert engine.optimizer is optimizer and isinstance(engine.module, Net)
    assert engine.train_batch_size() == engine.train_micro_batch_size_per_gpu() == 4
    assert engine.gradient_accumulation_steps() == 1 and engine.gradient_clipping() == 1.0
    assert engine.get_global_grad_norm() == 0.0 and engine.get_lr() == [0.01]
    assert not engine.eval().module.training and engine.train().module.training
    engine.destroy()
    assert not dist.is_initialized()


def test_config_from_a_file_from_args_and_under_its_old_name(alone, tmp_path):
    config = {"train_batch_size": 4}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert alone(path)[0].optimizer is None
    for kwargs in ({"config_params": config}, {"args": argparse.Namespace(deepspeed_config=str(path), local_rank=-1)},
                   {"config": str(path), "args": argparse.Namespace(deepspeed_config=None)}):
        assert deepspeed.initialize(model=Net(), **kwargs)[0].train_batch_size() == 4
    with pytest.raises(ConfigError, match="config and config_params; needed: one of"):
        deepspeed.initialize(model=Net(), config=config, config_params=config)
    with pytest.raises(ConfigError, match="nowhere"):
        deepspeed.initialize(model=Net())


def test_the_callers_optimizer_and_scheduler_win_as_objects_and_as_callables(alone, caplog):
    model = Net()
    mine = torch.optim.SGD(model.parameters(), lr=0.5)
    with caplog.at_level(logging.WARNING):
        _, optimizer, _, _ = alone(model=model, optimizer=mine)
    assert optimizer is mine and "the SGD given to initialize() is used" in caplog.text
    model, decay = Net(), torch.optim.lr_scheduler.ExponentialLR
    _, optimizer, _, schedule = alone(model=model, optimizer=lambda params: torch.optim.Adagrad(params, lr=0.3),
                                      lr_scheduler=lambda optimizer: decay(optimizer, 0.5))
    assert isinstance(optimizer, torch.optim.Adagrad) and isinstance(schedule, decay)
    model = Net()
    mine = torch.optim.SGD(model.parameters(), lr=0.5)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(mine, patience=0)
    engine, _, _, schedule = alone(model=model, optimizer=mine, lr_scheduler=plateau)
    for _ in range(3):
        engine.backward(engine(torch.ones(4, 5)).mean())
        engine.step(lr_kwargs={"metrics": 1.0})
    assert schedule is plateau and engine.get_lr() == [pytest.approx(0.005)]


def test_param_groups_keep_their_own_rates(alone):
    model = Net()
    groups = [{"params": model.first.parameters(), "lr": 0.1}, {"params": [model.turned], "weight_decay": 0.3}]
    engine, optimizer, _, _ = alone(model=model, model_parameters=groups)
    assert engine.get_lr() == [0.1, 0.01]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.3]


def test_wrong_use_of_the_engine_is_told(alone):
    engine, *_ = alone({"train_batch_size": 8, "gradient_accumulation_steps": 2,
                        "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    x = torch.ones(4, 5)
    with pytest.raises(ValueError, match=r"given: a tensor of shape \(4, 3\)"):
        engine.backward(engine(x))
    with pytest.raises(ValueError, match="given: 3.0"):
        engine.backward(3.0)
    engine.step()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        engine.step()
    with engine.no_sync(), pytest.raises(RuntimeError, match=r"step\(\) inside no_sync"):
        engine.step()
    blind, *_ = alone({"train_batch_size": 8})
    assert blind(x).shape == (4, 3)
    with pytest.raises(RuntimeError, match=r"step\(\) needs an optimizer"):
        blind.step()


def unsynced_norms():
    """The averaged gradient's norm, with the first of two passes inside no_sync() and without."""
    norms = []
    for inside in (True, False):
        model = nn.Linear(5, 1).double()
        nn.init.ones_(model.weight)
        engine, *_ = deepspeed.initialize(model=model, config={"train_batch_size": dist.get_world_size(), "optimizer": {
            "type": "SGD", "params": {"lr": 0.1}}})
        x = torch.full((1, 5), 1.0 + dist.get_rank(), dtype=torch.float64)
        if inside:
            with engine.no_sync():
                engine.backward(engine(x).sum())
            engine.backward(engine(2 * x).sum())
        else:
            engine.backward(engine(torch.cat([x, 2 * x])).sum())
        engine.step()
        norms.append(engine.get_global_grad_norm())
    return norms


def test_passes_inside_no_sync_add_up_and_are_averaged_afterwards(run_ranks):
    for inside, outside in run_ranks(unsynced_norms, 2):
        assert inside == pytest.approx(outside, rel=1e-12) and inside > 0


def test_a_progress_line_every_so_many_steps(alone, capsys):
    engine, *_ = alone({"train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_print": 2,
                        "optimizer": {"type": "SGD", "params": {"lr": 0.25}}}, model=nn.Linear(1, 1))
    nn.init.zeros_(engine.module.bias), nn.init.zeros_(engine.module.weight)
    for _ in range(10):
        engine.backward(engine(torch.zeros(4, 1)).mean() * 0 + 3)
        engine.step()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
    assert all("loss 3.0000, lr 0.25, " in line and line.endswith(" samples/s") for line in lines)


def test_a_progress_line_has_no_loss_where_the_caller_runs_backward(alone, capsys):
    engine, *_ = alone({"train_batch_size": 1, "steps_per_print": 1, "optimizer": {"type": "SGD"}},
                       model=nn.Linear(1, 1))
    engine.scale(engine(torch.ones(1, 1)).sum() + 5).backward()
    engine.step()
    assert capsys.readouterr().out.startswith("step 1: lr 0.001, ")


def windows(stage: int, reset: str) -> list[bool]:
    """Which steps update, with windows of 3 and something that begins the window anew after 4 micro-batches."""
    model = nn.Linear(5, 1)
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 3, "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "zero_optimization": {"stage": stage}})
    seen, kept = [], 0
    before = zero.safe_get_full_fp32_param(model.bias)
    for step in range(8):
        if step == 4:
            if reset == "zero_grad":
                engine.zero_grad()
                kept = 0
            else:
                engine.micro_steps = {"epoch": 0, "two": 2}[reset]
        engine.backward(engine(torch.ones(1, 5)).sum())
        kept += 1
        engine.step()
        seen.append(engine.was_step_applied())
        if seen[-1]:  # the gradient of the bias is 1 for each micro-batch
            assert float(before - zero.safe_get_full_fp32_param(model.bias)) == pytest.approx(kept / 3, rel=1e-5)
            before, kept = zero.safe_get_full_fp32_param(model.bias), 0
    assert engine.micro_steps == {"epoch": 4, "two": 6, "zero_grad": 8}[reset]
    return [step for step, applied in enumerate(seen) if applied]


def test_a_window_begins_anew_with_the_count_of_micro_batches_and_with_zero_grad(run_ranks):
    for stage in range(4):  # as in plain PyTorch, a count that is set drops no gradients
        for reset, updates in (("epoch", [2, 6]), ("two", [2, 4, 7]), ("zero_grad", [2, 6])):
            assert run_ranks(windows, 2, stage, reset) == [updates] * 2, f"stage {stage}, {reset}"


def moved() -> None:
    """At stage 3 moves and casts that change nothing do nothing; others say what to do, and change nothing."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3}})
    for call in (lambda: engine.to(engine.device), lambda: engine.to("cpu"), engine.cpu, engine.float,
                 lambda: engine.to(torch.float32), lambda: engine.to(torch.zeros(1))):
        assert call() is engine
    for call in (engine.half, engine.bfloat16, engine.double, lambda: engine.to("meta"),
                 lambda: engine.to(torch.float16), lambda: engine.to(memory_format=torch.channels_last)):
        with pytest.raises(RuntimeError, match=r"sharded \(stage 3\): it stays on cpu.*consolidated_fp32_state_dict"):
            call()
    engine.backward(engine(torch.ones(2, 2, 3, 3)).square().sum())
    engine.step()
    assert engine.was_step_applied() and all(t.dtype == torch.float32 for t in [*model.parameters()])


def test_a_sharded_model_stays_where_and_what_it_is(run_ranks):
    run_ranks(moved, 2)


# --- Data -------------------------------------------------------------------------------------------------------------


def epochs_seen(samples: int, drop_last: bool):
    torch.manual_seed(7 + dist.get_rank())  # rank 0's seed decides
    data = TensorDataset(torch.arange(samples), torch.arange(samples) * 10)
    _, _, loader, _ = deepspeed.initialize(model=Net(), training_data=data, config={
        "train_micro_batch_size_per_gpu": 2, "dataloader_drop_last": drop_last})
    return [[(x.tolist(), y.tolist()) for x, y in loader] for _ in range(2)], len(loader)


@pytest.mark.parametrize("samples, drop_last, per_rank", [(12, False, [2, 2, 2]), (11, False, [2, 2, 2]),
                                                          (9, False, [2, 2, 1]), (9, True, [2, 2])])
def test_ranks_share_the_data_out_in_a_new_order_every_epoch(run_ranks, samples, drop_last, per_rank):
    shares = run_ranks(epochs_seen, 2, samples, drop_last)
    orders = []
    for epoch in range(2):
        mine = [share[0][epoch] for share in shares]
        assert [[len(x) for x, _ in batches] for batches in mine] == [per_rank] * 2
        assert all(y == [10 * v for v in x] for batches in mine for x, y in batches)
        orders.append([v for batches in mine for x, _ in batches for v in x])
        if not drop_last:
            assert set(orders[-1]) == set(range(samples)), "every sample is seen"
    assert orders[0] != orders[1] and shares[0][1] == len(per_rank)
    assert shares == run_ranks(epochs_seen, 2, samples, drop_last), "the seed decides"


def loaders(monkeypatch, ranks: int, batch_size: int, samples: int = 24):
    """The loaders of so many ranks, in this one process."""
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "broadcast", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "initial_seed", lambda: 5)
    return [deepspeed.ShardedLoader(torch.arange(samples), batch_size, torch.device("cpu"), None, False)
            for _ in range(ranks)]


def give(monkeypatch, loaders: list, batches: int | None = None) -> list:
    """The samples of the next loop's first micro-batches, in the order in which they are given out."""
    shares = []
    for rank, loader in enumerate(loaders):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        shares.append([batch.tolist() for _, batch in zip(range(10**6 if batches is None else batches), loader)])
    return [v for together in zip(*shares) for v in sum(together, [])]


def test_an_epoch_is_resumed_with_any_number_of_ranks_and_batch_size_and_each_sample_seen_once(monkeypatch):
    sizes = [(ranks, batch_size) for ranks in (1, 2, 3) for batch_size in (1, 3, 8)]
    for (ranks, batch_size), (new_ranks, new_size), done in itertools.product(sizes, sizes, (1, 2)):
        case = (ranks, batch_size, new_ranks, new_size, done)
        if ranks * batch_size * done >= 24:
            continue
        before = loaders(monkeypatch, ranks, batch_size)
        seen = give(monkeypatch, before, done)
        state = before[0].state_dict()
        after = loaders(monkeypatch, new_ranks, new_size)
        for loader in after:
            loader.load_state_dict(state)
        rest = give(monkeypatch, after)
        spare = -(24 - len(seen)) % new_ranks  # given twice, where the ranks do not divide what is left
        assert len(seen + rest) == 24 + spare and set(seen + rest) == set(range(24)), case
        if (ranks, batch_size) == (new_ranks, new_size):
            assert seen + rest == give(monkeypatch, loaders(monkeypatch, ranks, batch_size)), case
        assert {loader.state_dict()["samples"] for loader in after} == {0}
        assert sorted(set(give(monkeypatch, after))) == list(range(24)) and after[0].epoch == 2, case


def test_a_place_that_is_loaded_inside_a_loop_is_where_it_goes_on(monkeypatch):
    (loader,), (other,) = loaders(monkeypatch, 1, 2), loaders(monkeypatch, 1, 2)
    whole = give(monkeypatch, [other])
    seen, state = [], None
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


# --- Optimizers by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section, cls, holds", [
    ({"type": "Adam"}, torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}),
    ({"type": "AdamW"}, torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}),
    ({"type": "Adam", "params": {"adam_w_mode": False}}, torch.optim.Adam, {"weight_decay": 0.0}),
    ({"type": "Adam", "params": {"adam_w_mode": "false"}}, torch.optim.Adam, {"weight_decay": 0.0}),
    ({"type": "SGD", "params": {"maximize": "false", "fused": "true"}}, torch.optim.SGD,
     {"maximize": False, "fused": True}),
    ({"type": "AdamW", "params": {"torch_adam": True}}, torch.optim.AdamW, {"weight_decay": 0.01}),
    ({"type": "adam", "params": {"torch_adam": True, "adam_w_mode": False, "betas": [0.5, 0.6]}}, torch.optim.Adam,
     {"betas": (0.5, 0.6)}),
    ({"type": "AdamW", "params": {"foreach": True}}, torch.optim.AdamW, {"foreach": True, "fused": None}),
    ({"type": "SGD", "params": {"momentum": 0.5}}, torch.optim.SGD, {"momentum": 0.5, "fused": None}),
    ({"type": "SGD", "params": {}}, torch.optim.SGD, {"momentum": 0, "fused": True}),
    ({"type": "RMSprop", "params": {"centered": 1, "lr": "0.1"}}, torch.optim.RMSprop, {"centered": True, "lr": 0.1}),
    ({"type": "LION", "params": {"betas": ["0.5", 0.6]}}, deepspeed.Lion, {"betas": [0.5, 0.6]}),
    ({"type": "adagrad"}, torch.optim.Adagrad, {}),
    ({"type": "Adagrad"}, torch.optim.Adagrad, {"fused": True}),
])
def test_optimizers_by_name(section, cls, holds):
    optimizer = deepspeed.build_optimizer(deepspeed.OptimizerConfig(**section), [nn.Parameter(torch.ones(2))],
                                          torch.device("cpu"))
    assert type(optimizer) is cls
    assert {key: optimizer.param_groups[0][key] for key in holds} == holds


# --- The config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, world_size, settled", [
    ({"train_batch_size": 8}, 2, (8, 4, 1)),
    ({"train_micro_batch_size_per_gpu": 3}, 2, (6, 3, 1)),
    ({"train_batch_size": 12, "gradient_accumulation_steps": 3}, 2, (12, 2, 3)),
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}, 2, (12, 2, 3)),
    ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 2, (12, 2, 3)),
    ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 2, (12, 2, 3)),
    ({"train_batch_size": 8.0}, 1, (8, 8, 1)),
])
def test_batch_sizes_give_one_another(given, world_size, settled):
    config = deepspeed.load_config(given)
    config.settle_batch_sizes(world_size)
    assert tuple(getattr(config, key) for key in config.SIZES) == settled


@pytest.mark.parametrize("given, told", [
    ({}, "at least one"),
    ({"gradient_accumulation_steps": 2}, "at least one"),
    ({"train_batch_size": 9}, r"4 \* 1 \* 2 != 9 \(given: train_batch_size 9; world size 2\)"),
    ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}, r"3 \* 1 \* 2 != 8"),
    ({"train_batch_size": 1}, r"1 \* 1 \* 2 != 1"),
    ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
     r"2 \* 3 \* 2 != 8"),
])
def test_batch_sizes_that_disagree_are_refused_with_the_equation(given, told):
    with pytest.raises(ConfigError, match=told):
        deepspeed.load_config(given).settle_batch_sizes(2)


@pytest.mark.parametrize("change, told", [
    ({"gradient_cliping": 1.0}, "unknown key gradient_cliping, set to 1.0; did you mean 'gradient_clipping'"),
    ({"zero_optimisation": {}}, "did you mean 'zero_optimization'"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; allowed: 0, 1, 2 or 3"),
    ({"zero_optimization": {"stages": 1}}, "unknown key zero_optimization.stages, .* did you mean 'stage'"),
    ({"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size is 'big'; allowed: auto or a whole number"),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size is 0; allowed: auto or a whole number from 1"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights belongs to a part"),
    ({"zero_optimization": {"leaf_module": ["Block"]}}, "zero_optimization.leaf_module is .*; allowed: an object"),
    ({"pipeline": {}}, "pipeline belongs to a part of DeepSpeed that is not covered"),
    ({"train_batch_size": "eight"}, "train_batch_size is 'eight'; allowed: a whole number from 1 up or null"),
    ({"train_micro_batch_size_per_gpu": 1e30}, "train_micro_batch_size_per_gpu is 1e.30; allowed: a whole number"),
    ({"gradient_accumulation_steps": 10**400}, "gradient_accumulation_steps is 10.*0; allowed: a whole number"),
    ({"bf16": {1: 2}}, "bf16 has the key 1; allowed: text"),
    ({"zero_optimization": {"leaf_module": {"classes": [["a"]]}}}, "leaf_module.classes is .*; allowed: a list of str"),
    ({"zero_optimization": {"leaf_module": {"classes": [1, "a"]}}}, "leaf_module.classes is .*; allowed: a list"),
    ({"fp16": {"enabled": True, "initial_scale_power": 5000}}, "fp16.initial_scale_power is 5000; allowed: .* 126"),
    ({"fp16": {"enabled": True, "loss_scale": 5e-324}}, "fp16.loss_scale is 5e-324; allowed: 0 or a number"),
    ({"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
     "cpu_offload is the former spelling of zero_optimization.offload_optimizer and says .* take .*cpu_offload out"),
    ({"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 2}}, "and says 1, but .* is 2"),
    ({"zero_optimization": {"cpu_offload": "perhaps"}}, "zero_optimization.cpu_offload is 'perhaps'; allowed: true"),
    ({"overlap_comm": True}, "unknown key overlap_comm, set to True; its place is in zero_optimization"),
    ({"gradient_cliping": "auto"}, "unknown key gradient_cliping, set to 'auto'; did you mean"),
    ({"train_batch_size": 8.5}, "train_batch_size is 8.5"),
    ({"train_batch_size": True}, "train_batch_size is True"),
    ({"train_batch_size": 0}, "train_batch_size is 0; allowed: a whole number from 1"),
    ({"gradient_clipping": None}, "gradient_clipping is None; allowed: a number"),
    ({"gradient_clipping": -1.0}, "gradient_clipping is -1.0"),
    ({"gradient_clipping": float("nan")}, "gradient_clipping is nan"),
    ({"dataloader_drop_last": 2}, "dataloader_drop_last is 2; allowed: true or false"),
    ({"optimizer": "Adam"}, "^optimizer is 'Adam'; allowed: an object"),
    ({"optimizer": {"params": {"lr": 0.1}}}, "optimizer.type is missing"),
    ({"optimizer": {"type": "Adam", "param": {}}}, "unknown key optimizer.param, .* did you mean 'params'"),
    ({"optimizer": {"type": "Adan"}}, "optimizer.type is 'Adan'; did you mean 'Adam'"),
    ({"optimizer": {"type": "LBFGS"}}, "optimizer.type is 'LBFGS'"),
    ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, "optimizer.params .* for AdamW"),
    ({"optimizer": {"type": "Adam", "params": {"learning_rate": 0.1}}}, "unknown key optimizer.params.learning_rate"),
    ({"optimizer": {"type": "Adam", "params": {"lr": -1.0}}}, "optimizer.params .*Invalid learning rate: -1.0"),
    ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, "bias_correction is false; allowed: true"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, "scheduler.params.warmup_steps; did you mean 'warmup_num_steps'"),
    ({"scheduler": {"type": "StepLR", "params": {"step_size": True}}}, "scheduler.params.step_size is True; allowed"),
    ({"scheduler": {"type": "StepLR", "params": {"step_size": 1, "gamma": float("inf")}}}, "params.gamma is inf"),
    ({"scheduler": {"type": "WarmLR"}}, "scheduler: scheduler type is 'WarmLR'; did you mean 'WarmupLR'"),
    ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 0.5}}}, "write gradient_clipping: 0.5 instead"),
    *(({"optimizer": {"type": kind, "params": {key: value}}}, rf"optimizer.params.{key} is .*; allowed: {allowed}")
      for kind, key, value, allowed in (
          ("RMSprop", "centered", "no", "true or false"), ("AdamW", "amsgrad", 2, "true or false"),
          ("Adam", "torch_adam", "on", "true or false"), ("SGD", "fused", float("nan"), "true or false"),
          ("SGD", "lr", True, "a finite number"), ("SGD", "lr", float("inf"), "a finite number"),
          ("AdamW", "weight_decay", float("nan"), "a finite number"), ("SGD", "lr", 10**400, "a finite number"),
          ("AdamW", "betas", [0.9, True], "a finite number"), ("SGD", "momentum", "much", "a finite number"))),
])
def test_configs_that_cannot_be_meant_are_refused_by_key(alone, change, told):
    with pytest.raises(ConfigError, match=told):
        alone({"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, **change})
    assert not dist.is_initialized(), "what a refused call has started, it ends"


def test_config_files_that_cannot_be_read_are_refused(alone, tmp_path):
    path = tmp_path / "ds.json"
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        alone(path)
    for text, told in (("{", "is not JSON"), ("[]", "the config is \\[\\]"),
                       ('{"train_batch_size": 1, "train_batch_size": 2}', "'train_batch_size' stands twice")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=told):
            alone(path)


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


def test_what_is_not_taken_literally_is_told_once(caplog, monkeypatch):
    config = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 1, "aio": {"a": 1},
              "zero_optimization": {"cpu_offload": True, "elastic_checkpoint": False},
              "tensorboard": {"enabled": True}, "wandb": {"enabled": False}, "comms_logger": {"prof_all": False},
              "optimizer": {"type": "Adam", "adam_w_mode": False}}
    given = copy.deepcopy(config)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        deepspeed.load_config(config)
    assert config == given
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "config: zero_optimization.cpu_offload is now zero_optimization.offload_optimizer {'device': 'cpu'}",
        'config: "auto", so the default or what the other keys say: train_batch_size',
        "config: without effect here: aio"]
    assert all(key in caplog.text for key in ("optimizer.adam_w_mode (it", "prof_all (all", "tensorboard (no"))
    assert "wandb" not in caplog.text and "elastic" not in caplog.text


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


def test_errors_in_files_with_comments_name_line_and_column(tmp_path):
    (tmp_path / "ds.json").write_text('{ # one\n  "train_batch_size": 8, /* two\n */ "stage" 3,\n}')
    with pytest.raises(ConfigError, match="is not JSON: .* line 3 column 13"):
        deepspeed.load_config(tmp_path / "ds.json")


@pytest.mark.parametrize("kwargs, told", [
    ({"mpu": object()}, "mpu and mesh_param"),
    ({"optimizer": 3}, "optimizer is, or makes, 3"),
    ({"optimizer": lambda params: 4}, "optimizer is, or makes, .*; allowed: a torch.optim.Optimizer"),
    ({"lr_scheduler": 5}, "lr_scheduler is, or makes, 5"),
    ({"optimizer": torch.optim.SGD([torch.ones(2, requires_grad=True)])}, r"shape \(2,\) that is no parameter"),
    ({"lr_scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)]), 1)}, "drives another"),
    ({"optimizer": torch.optim.LBFGS([torch.ones(1)])}, "optimizer is a LBFGS"),
    ({"training_data": torch.utils.data.DataLoader([1])}, "training_data is a DataLoader"),
    ({"training_data": torch.utils.data.ChainDataset([])}, "training_data is a ChainDataset.*a loader of your own"),
    ({"dist_init_required": False}, "dist_init_required is False"),
    ({"model": nn.Linear(2, 2, device="meta")}, "meta device"),
])
def test_arguments_that_cannot_be_meant_are_refused(alone, kwargs, told):
    with pytest.raises(ValueError, match=told):
        alone(**kwargs)


def test_a_model_is_needed():
    with pytest.raises(ValueError, match="model is None; allowed: an nn.Module"):
        deepspeed.initialize(config={"train_batch_size": 1})


def test_half_of_a_launchers_variables_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="but not WORLD_SIZE, MASTER_ADDR"):
        deepspeed.initialize(model=Net(), config={"train_batch_size": 1})


def test_scheduler_without_optimizer_is_refused(alone):
    with pytest.raises(ConfigError, match="a scheduler needs an optimizer"):
        alone({"train_batch_size": 1, "scheduler": {"type": "WarmupLR"}})


class Batch(dict):
    """Items that are attributes as well."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__ = self


def test_a_batch_keeps_its_class(alone):
    engine, _, loader, _ = deepspeed.initialize(
        model=nn.Linear(1, 1), training_data=[torch.ones(1)] * 4, collate_fn=lambda rows: Batch(x=torch.stack(rows)),
        config={"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    batch = next(iter(loader))
    assert type(batch) is Batch and torch.equal(batch.x, torch.ones(2, 1)) and batch.x is batch["x"]
    moved = deepspeed._to_device(batch, torch.device("meta"))
    assert type(moved) is Batch and moved.x.is_meta and moved["x"] is moved.x and not batch.x.is_meta
    assert amp.cast(batch, torch.float16).x.dtype == torch.float16 and batch.x.dtype == torch.float32


class Expanded(nn.Module):
    """Buffers whose elements share memory, and one buffer that two modules have."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(2, 2), nn.Module()
        self.register_buffer("mask", torch.full((1, 2), float(dist.get_rank())).expand(3, 2))
        self.other.register_buffer("mask", self.mask)

    def forward(self, x):
        return self.layer(x) + self.mask[:1]


def expanded_buffers(folder: str) -> None:
    for precision in ({}, {"bf16": {"enabled": True}}):
        engine, *_ = deepspeed.initialize(model=Expanded(), config={
            "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, **precision})
        assert torch.equal(engine.module.mask, torch.zeros(3, 2)) and engine.module.mask.is_contiguous()
        engine.module.mask.fill_(5)
        engine.save_checkpoint(folder, "a")
        engine.module.mask.zero_()
        engine.load_checkpoint(folder)
        assert torch.equal(engine.module.mask.float(), torch.full((3, 2), 5.0))
        assert precision or engine.module.other.mask is engine.module.mask
        engine.destroy()


def test_expanded_buffers_are_broadcast_saved_and_loaded(run_ranks, tmp_path):
    run_ranks(expanded_buffers, 1, str(tmp_path / "1"))
    run_ranks(expanded_buffers, 2, str(tmp_path / "2"))
