"""The tools of the tests are tested too: a failing rank must fail the test, with its own traceback, and no hang."""

import os

import pytest
import torch
import torch.distributed as dist


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
