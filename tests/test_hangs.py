"""What would hang is told: ranks that take different branches, have different numbers of batches, or are alone.

    .venv/bin/python -m pytest -q tests/test_hangs.py
"""

import gc
import time
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import engine as deepspeed
import zero


class Choice(nn.Module):
    """Two experts, of which the caller chooses one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x, expert):
        return self.experts[expert](self.first(x))


def start(stage: int, **options):
    torch.manual_seed(0)
    return deepspeed.initialize(model=Choice(), config={
        "train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "debug": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10}, **options})[0]


def train(engine, expert: int) -> str:
    try:
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 4), expert).sum())
            engine.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def branch(stage: int) -> str:
    return train(start(stage), expert=dist.get_rank())


def test_debug_names_rank_module_parameter_and_operation_where_ranks_go_apart(run_ranks):
    for told in run_ranks(branch, 2, 3):
        assert "ranks go apart at their collective 3: rank 0 is about to do all-gather of the block experts.0: " \
            "experts.0.0.weight to experts.0.0.bias (128 elements, float32), rank 1 all-gather of the block " \
            "experts.1: experts.1.0.weight" in told, told


def test_debug_lets_ranks_take_their_own_branches_below_stage_3(run_ranks):
    for stage in range(3):
        assert run_ranks(branch, 2, stage) == ["no error"] * 2


def trained_in_debug(stage: int) -> tuple[list, list]:
    ends = []
    for debug in (False, True):
        engine = start(stage, debug=debug)
        assert train(engine, expert=0) == "no error"
        ends.append([zero.safe_get_full_fp32_param(p) for p in engine.module.parameters()])
        engine.destroy()
    return tuple(ends)


def test_debug_changes_no_number(run_ranks):
    for stage in range(4):
        for usual, watched in run_ranks(trained_in_debug, 2, stage):
            assert all(torch.equal(a, b) for a, b in zip(usual, watched)), f"stage {stage}"


def alone() -> str:
    """Rank 1 does not come to the second step."""
    engine = start(2, timeout=77)
    engine.backward(engine(torch.ones(2, 4), 0).sum())
    engine.step()
    logbook = engine.zero.communicator.logbook
    assert logbook.timeout == 77
    logbook.timeout = 0.5  # only now, since a rank that comes may be slow
    if dist.get_rank() == 1:
        return "left"
    return train(engine, 0)


def test_debug_names_the_rank_that_does_not_come_and_what_it_did_last(run_ranks):
    told = run_ranks(alone, 2)[0]
    run_ranks.stop()  # the ranks have gone apart
    assert "rank 0 is about to do its collective 10: reduce-scatter of experts.1.0.weight" in told, told
    assert "for 0.5 seconds it has waited for rank 1, whose last was 9: all-gather of first.0.weight" in told, told


def last_look_at_a_loss() -> str:
    """Rank 0 has one forward pass more, and ends later than rank 1 waits for it."""
    engine = start(1, debug=False)
    train(engine, expert=0)
    patience, zero.Logbook.PATIENCE = zero.Logbook.PATIENCE, 0.01
    try:
        if dist.get_rank() == 0:
            engine(torch.ones(2, 4), 0)
            dist.barrier()
            dist.barrier()
            engine.destroy()
        else:
            dist.barrier()
            engine.destroy()
            dist.barrier()
    finally:
        zero.Logbook.PATIENCE = patience
    return "no error"


def test_a_forward_pass_without_backward_is_no_micro_batch(run_ranks):
    assert run_ranks(last_look_at_a_loss, 2) == ["no error"] * 2


def uneven(stage: int) -> str:
    """Rank 1 runs out of data one step early."""
    rank = dist.get_rank()
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3)))
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage}})
    told = "no error"
    try:
        for _ in range(3 - rank):
            engine.backward(engine(torch.ones(2, 4)).sum())
            engine.step()
        while rank == 1 and engine._logbook.read()[0][0] < 3:
            time.sleep(0.01)  # until rank 0 has begun its third: it may be slow
        with mock.patch.object(zero.Logbook, "PATIENCE", 2.0):
            engine.destroy()
    except RuntimeError as error:
        told = str(error).replace("\n", " ")
    del model, engine
    gc.collect()  # or this rank's connection lives on, and the other one waits for its timeout
    dist.destroy_process_group()
    return told


def test_uneven_data_raises_on_every_rank_with_the_counts(run_ranks, request):
    for stage in (0, 1, 2, 3) if request.config.getoption("--long") else (3,):
        for rank, told in enumerate(run_ranks(uneven, 2, stage)):
            assert "ranks have had different numbers of micro-batches: rank 0 is in its micro-batch 3, rank 1 ended " \
                "after micro-batch 2; give all ranks equally many" in told, f"stage {stage}, rank {rank}: {told}"
        run_ranks.stop()  # their group is gone
