"""What would hang is reported: ranks that take different branches, have different numbers of batches, or are alone.

    .venv/bin/python -m pytest -q tests/test_hangs.py

So it is in the tests' own tools: a failing rank must fail the test, with its own traceback, and no hang.
"""

import gc
import itertools
import os
import re
import sys
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import engine as deepspeed
import oracle
import zero
from conftest import FEWEST_FILES, Program, Ranks, on_ranks
from oracle import STAGES, Model

# --- In training ------------------------------------------------------------------------------------------------------


def choice() -> Model:
    """Two experts, of which the caller chooses one."""
    return Model(lambda m, x, expert: m.experts[expert](m.first(x)), first=nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4)), experts=[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])


def start(stage: int, **options):
    torch.manual_seed(0)
    return oracle.start(choice(), stage, partial(torch.optim.SGD, lr=0.1), {"reduce_bucket_size": 10},
                        **{"debug": True} | options)


def train(engine, expert: int, steps: int = 2) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, 4), expert).sum())
        engine.step()


@on_ranks(2)
def test_debug_names_rank_module_parameter_and_operation_where_ranks_go_apart():
    with pytest.raises(RuntimeError, match=r"collective 3: rank 0 .*all-gather of .*experts.0.0.weight to "
                                           r"experts.0.0.bias \(128 elements, float32\), rank 1 .*experts.1.0.weight"):
        train(start(3), expert=dist.get_rank())


@on_ranks(2, stage=STAGES)
def test_debug_changes_no_number(stage):
    ends = []
    for debug in (False, True):
        engine = start(stage, debug=debug)
        train(engine, expert=0)
        ends.append(oracle.whole(engine.module).values())
        engine.destroy()
    assert all(map(torch.equal, *ends))


@pytest.mark.usefixtures("fresh_ranks")  # the ranks go apart
@on_ranks(2)
def test_debug_names_the_rank_that_does_not_come_and_what_it_did_last():
    """Rank 1 does not come to the second step."""
    engine = start(2, timeout=77)
    train(engine, 0, steps=1)
    logbook = engine.zero.communicator.logbook
    assert logbook.timeout == 77
    logbook.timeout = 0.5  # only now, since a rank that comes may be slow
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="rank 0 .*collective 10: reduce-scatter of experts.1.0.weight.* 0.5 "
                                               "seconds .*rank 1, .*9: all-gather of first.0.weight"):
            train(engine, 0)


@on_ranks(2)
def test_a_forward_pass_without_backward_is_no_micro_batch():
    """Rank 0 has one forward pass more, and ends later than rank 1 waits for it."""
    engine = start(1, debug=False)
    train(engine, expert=0)
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
    engine = oracle.start(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))), stage)
    with pytest.raises(RuntimeError, match="(?s)rank 0 is in its micro-batch 3, rank 1 ended.after micro-batch 2"):
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


# --- In the tests' own tools ------------------------------------------------------------------------------------------


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


def interrupted(pair: oracle.Pair, work: Callable, points: int) -> Iterator[str]:
    """Interrupt ``work(pair)`` on all ranks at as many points; says where it did."""
    calls = min(zero.gather(in_zero(lambda: work(pair))))
    for point in range(1, calls, max(1, calls // points)):
        pair.__init__(oracle.Mlp, pair.engine.zero_optimization_stage())
        pair.train(0)
        ended = False
        with suppress(Interruption):
            in_zero(lambda: work(pair), point)
            ended = True  # what is raised where nothing can be is printed and lost
        if not ended:
            yield f"interrupted at call {point} of {calls}"


def fail_and_begin_anew(stage: int, points: int) -> None:
    """Interrupt steps; the engine is dropped, and a new one trains."""
    for where in interrupted(oracle.Pair(oracle.Mlp, stage), lambda pair: pair.train(1), points):
        pair = oracle.Pair(oracle.Mlp, stage)
        pair.train(0)
        pair.train(1)
        pair.check(f"another engine after a step that was {where}")


def fail_and_go_on(stage: int, points: int) -> None:
    """Interrupt backward passes; the engine leaves their gradients out."""
    pair = oracle.Pair(oracle.Mlp, stage)
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
        return engine(torch.ones(2, oracle.WIDTH).half()).float().square().sum()

    weights = []
    for fails in (False, True):
        model = oracle.twins(oracle.Mlp)[0]
        engine = oracle.start(model, 1, fp16={"enabled": True, "initial_scale_power": 4})
        if fails:
            hook = model.blocks[1][0].weight.register_hook(lambda grad: 1 / 0 if where == "in a hook" else grad)
            with pytest.raises(ZeroDivisionError), mock.patch.object(
                    engine.zero, "finish_backward", side_effect=ZeroDivisionError):
                engine.backward(loss(engine))
            hook.remove()
        engine.backward(loss(engine))
        engine.step()
        weights.append(oracle.whole(model))
        engine.destroy()
    for name, expected in weights[0].items():
        assert torch.equal(weights[1][name], expected), name
    assert [r.getMessage() for r in caplog.records if "backward() raised" in r.getMessage()] == [
        "the last backward() raised: the gradients of its window are dropped"]


def fail_in_a_window(engine) -> None:
    """A micro-batch whose backward raises, in a script that goes on to step()."""
    with suppress(ZeroDivisionError), mock.patch.object(engine.zero, "finish_backward", side_effect=ZeroDivisionError):
        engine.backward(oracle.square(engine, oracle.mine(oracle.batches(9))))


@on_ranks(1, calls=[("step",), ("scale",), ("step", "scale"), ()])
def test_the_micro_batch_of_a_backward_that_raised_does_not_count(calls):
    """Its window begins anew, whatever the script calls next."""
    pair = oracle.Pair(oracle.Mlp, 1, gradient_accumulation_steps=2)
    pair.backward(8)
    pair.engine.step()
    fail_in_a_window(pair.engine)
    if "step" in calls:
        pair.engine.step()  # the window's end
        assert not pair.engine.was_step_applied()
    for step in (1, 2):
        loss = oracle.square(pair.engine, oracle.mine(oracle.batches(step)))
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
    pair = oracle.Pair(oracle.Mlp, stage, gradient_accumulation_steps=window)
    for step in range(2 * window):
        fails = dist.get_rank() in failing and step == 0
        loss = oracle.square(pair.engine, oracle.mine(oracle.batches(step)))
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


def test_ranks_talk_to_each_other_in_groups_of_any_size(run_ranks):
    for world_size in (2, 1, 4, 3, 3):
        assert run_ranks(total, world_size, 2.0) == [world_size * (world_size + 1.0)] * world_size


@pytest.mark.parametrize("how, told", [("raise", "KeyError: 'told to'"), ("exit", "rank 1 of 2")])
def test_one_failing_rank_fails_the_test_and_the_next_test_works(run_ranks, how, told):
    run_ranks(total, 2, 1.0)
    with pytest.raises(pytest.fail.Exception, match=told):
        run_ranks(fail_on_one, 2, how)
    assert run_ranks(total, 2, 1.0) == [3.0, 3.0]


@on_ranks(ranks=[1, 3])
def test_a_marked_test_runs_on_its_ranks(ranks, tmp_path):
    assert (dist.get_world_size(), tmp_path.exists()) == (ranks, True)


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
