"""What the tests share: ``run_ranks``, which runs a function on N gloo processes, and the ``--long`` option.

    .venv/bin/python -m pytest -q             everything, with a few draws per property
    .venv/bin/python -m pytest -q --long      the same properties with many more draws

The processes are started once per test session, and each stays for all the tests that need it. They are forked from a
server that has PyTorch loaded already, since loading it takes longer than most tests.
"""

import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials"), str(Path(__file__).parent)]

MAX_RANKS = 4
COLLECTIVE_TIMEOUT = timedelta(seconds=30)  # a lost rank shows as an error, not as a hang


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="draw many more cases per property")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the models are tiny: on a busy machine, threads would wait for each other
    hypothesis.settings.register_profile("short", max_examples=12, deadline=None, derandomize=True, database=None)
    hypothesis.settings.register_profile("long", max_examples=1000, deadline=None)
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "short")


# --- In a worker process ----------------------------------------------------------------------------------------------


def _serve(rank: int, connection: Any, store_path: str, folders: list[str]) -> None:
    """Run what comes down ``connection``, in a process group of the size it asks for."""
    sys.path[:0] = folders
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    group = None  # (world size, how many groups came before)
    while True:
        wanted, function, args = pickle.loads(connection.recv_bytes())
        try:
            if wanted != group:
                if dist.is_initialized():
                    dist.destroy_process_group()
                store = dist.PrefixStore(str(wanted), dist.FileStore(store_path, -1))
                dist.init_process_group("gloo", store=store, rank=rank, world_size=wanted[0],
                                        timeout=COLLECTIVE_TIMEOUT)
                group = wanted
            answer = (True, function(*args))
        except BaseException:  # also SystemExit, which a tested command line may raise
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


# --- In the test process ----------------------------------------------------------------------------------------------


class Ranks:
    """A pool of worker processes. Call it: ``ranks(function, world_size, *args)`` returns a result per rank."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed"])
        self.workers: list[tuple[Any, Any]] = []
        self.groups = 0
        self.group: tuple[int, int] | None = None
        self.folder = tempfile.mkdtemp()

    def start(self) -> None:
        """Fork the workers; the next call makes a new process group."""
        store = tempfile.mktemp(dir=self.folder)
        for rank in range(MAX_RANKS):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(rank, theirs, store, sys.path[:3]), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def stop(self) -> None:
        """End the workers, whatever they are doing."""
        for process, connection in self.workers:
            process.kill()
            process.join()
            connection.close()
        self.workers, self.group = [], None

    def __call__(self, function: Callable, world_size: int, *args: Any, timeout: float = 90.0) -> list[Any]:
        """``function(*args)`` on every rank: a list of what each returned, or a failure with each one's traceback.

        ``function`` must be importable: a top-level function of a test module.
        """
        if not self.workers:
            self.start()
        if self.group is None or self.group[0] != world_size:
            self.groups += 1
            self.group = (world_size, self.groups)
        for _, connection in self.workers[:world_size]:
            connection.send_bytes(pickle.dumps((self.group, function, args)))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < world_size:
            for rank, (process, connection) in enumerate(self.workers[:world_size]):
                if rank not in answers and connection.poll(0.001):
                    try:
                        answers[rank] = pickle.loads(connection.recv_bytes())
                    except EOFError:
                        answers[rank] = (False, f"the process died with exit code {process.exitcode}")
                    if not answers[rank][0]:  # the others may wait for it in a collective: give them a moment
                        deadline = min(deadline, time.monotonic() + 2.0)
            if time.monotonic() > deadline:
                break
        failed = [f"--- rank {rank} of {world_size}:\n{text}" for rank, (fine, text) in answers.items() if not fine]
        missing = [rank for rank in range(world_size) if rank not in answers]
        if missing:
            failed.append(f"--- no answer from rank {missing} of {world_size}")
        if failed:
            self.stop()  # a process group that has seen an error can't be trusted
            pytest.fail("\n".join(failed), pytrace=False)
        return [answers[rank][1] for rank in range(world_size)]


def two_ranks(program: str) -> list[str]:
    """What two fresh processes print that run ``program`` as ranks 0 and 1; AssertionError where one prints nothing."""
    port = 20000 + (os.getpid() + hash(program)) % 20000
    processes = [subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(output for output, _ in outputs), outputs
    return [output for output, _ in outputs]


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Ranks]:
    """See Ranks. A test that expects an error catches it inside its function."""
    ranks = Ranks()
    yield ranks
    ranks.stop()
