"""The tools of the tests are tested too: a failing rank must fail the test, with its own traceback, and no hang."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lanes
from conftest import DEADLINE


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


def two_lanes(folder: Path, first: str, second: str) -> subprocess.CompletedProcess:
    """pytest on as many files as two lanes are for: what each lane's tests do, the first lane's once the second runs."""
    for number in range(lanes.FEWEST_FILES):
        (folder / f"test_{number}.py").write_text(f"""import multiprocessing, os, pathlib, time
def test_it():
    runs = pathlib.Path({str(folder / "runs")!r})
    if multiprocessing.parent_process():
        runs.touch()
        {second}
    while not runs.exists():
        time.sleep(0.01)
    {first}
""")
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "lanes", "-p", "no:cacheprovider", folder],
                          env=os.environ | {"PYTHONPATH": str(Path(lanes.__file__).parent)}, text=True,
                          timeout=DEADLINE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_what_fails_in_either_lane_is_told_with_what_it_printed(tmp_path):
    done = two_lanes(tmp_path, "assert not 'right here'", "print('there'); assert not 'right'")
    assert done.returncode == 1 and f"{lanes.FEWEST_FILES} failed" in done.stdout, done.stdout
    assert "assert not 'right here'" in done.stdout and re.search(r"stdout call -+\nthere\n", done.stdout), done.stdout


def test_a_lane_that_dies_fails_the_suite(tmp_path):
    done = two_lanes(tmp_path, "pass", "os._exit(4)")
    assert done.returncode == 3 and "the second lane died with exit code 4" in done.stdout, done.stdout
