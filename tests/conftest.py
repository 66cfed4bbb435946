"""What the tests share: ``run_ranks``, which runs a function on N gloo processes, and the ``--long`` option.

A test that is decorated with ``@on_ranks(N)`` runs on N such processes from its first line to its last. The others call
``run_ranks`` themselves: they draw their cases, or compare what the ranks return.

    .venv/bin/python -m pytest -q             everything, with a few draws per property
    .venv/bin/python -m pytest -q --long      the same properties with many more draws

The processes are started once per test session, and each stays for all the tests that need it. They are forked from a
server that has PyTorch and the tests' modules loaded already, since loading them takes longer than most tests.
"""

import gc
import inspect
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection as connections
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [str(ROOT), str(ROOT / "tutorials"), str(ROOT / "tests")]
sys.path[:0] = FOLDERS
from lanes import pytest_runtestloop  # noqa: E402, F401

MAX_RANKS = 4
# Deadlines are for what hangs, not for what is slow: a test must also pass on a machine that is busy with other things.
COLLECTIVE_TIMEOUT = timedelta(seconds=60)  # a lost rank shows as an error, not as a hang
DEADLINE = 600.0  # seconds, of whatever a test starts and waits for


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="draw many more cases per property")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(count): run the test in so many processes; see on_ranks")
    config.addinivalue_line("markers", "long: only with --long")
    torch.set_num_threads(1)  # the models are tiny: on a busy machine, threads would wait for each other
    hypothesis.settings.register_profile("short", max_examples=12, deadline=None, derandomize=True, database=None)
    hypothesis.settings.register_profile("long", max_examples=1000, deadline=None)
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "short")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("long") and not item.config.getoption("--long"):
        pytest.skip("only with --long")


def pytest_collection_finish() -> None:
    gc.freeze()  # collecting garbage need not look through PyTorch's half a million objects each time


def on_ranks(count: int | None = None, **tables: Iterable) -> Callable:
    """Run a test's whole body on ``count`` ranks, or on as many as its argument ``ranks`` says.

    Each table is an argument of the test, and the values that it has in turn: ``@on_ranks(2, stage=range(4))``.
    """
    def mark(test: Callable) -> Callable:
        for name, values in reversed(tables.items()):
            test = pytest.mark.parametrize(name, values)(test)
        return pytest.mark.usefixtures("run_ranks")(pytest.mark.ranks(count)(test))
    return mark


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Call a test in the worker processes, if ``on_ranks`` marks it; None leaves it to pytest."""
    mark = pyfuncitem.get_closest_marker("ranks")
    if mark is None:
        return None
    arguments = [pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters]
    pyfuncitem.funcargs["run_ranks"](pyfuncitem.obj, mark.args[0] or pyfuncitem.funcargs["ranks"], *arguments)
    return True


@pytest.fixture
def is_long(pytestconfig: pytest.Config) -> bool:
    """Whether many more cases are asked for."""
    return pytestconfig.getoption("--long")


# --- In a worker process ----------------------------------------------------------------------------------------------


def _serve(rank: int, connection: Any, store_path: str) -> None:
    """Run what comes down ``connection``, in a process group of the size it asks for."""
    torch.set_num_threads(1)
    gc.freeze()  # as in the tests' process
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
    """A pool of worker processes. Call it: ``ranks(function, world_size, *args)`` returns a result per rank.

    ``modules`` are loaded once, before the processes are forked.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed", *modules])
        path = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
        with mock.patch.dict(os.environ, PYTHONPATH=path, CUDA_VISIBLE_DEVICES=""):
            forkserver.ensure_running()
        self.workers: list[tuple[Any, Any]] = []
        self.groups = 0
        self.group: tuple[int, int] | None = None
        self.folder = tempfile.mkdtemp()

    def start(self) -> None:
        """Fork the workers; the next call makes a new process group."""
        store = tempfile.mktemp(dir=self.folder)
        for rank in range(MAX_RANKS):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(rank, theirs, store), daemon=True)
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

    def __call__(self, function: Callable, world_size: int, *args: Any, timeout: float = DEADLINE) -> list[Any]:
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
        while len(answers) < world_size and time.monotonic() < deadline:
            waiting = {self.workers[rank][1]: rank for rank in range(world_size) if rank not in answers}
            for connection in connections.wait(waiting, deadline - time.monotonic()):
                rank = waiting[connection]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self.workers[rank][0].join()
                    answers[rank] = (False, f"the process died with exit code {self.workers[rank][0].exitcode}")
                if not answers[rank][0]:  # the others may wait for it in a collective: give them a moment
                    deadline = min(deadline, time.monotonic() + 2.0)
        failed = [f"--- rank {rank} of {world_size}:\n{text}" for rank, (fine, text) in answers.items() if not fine]
        missing = [rank for rank in range(world_size) if rank not in answers]
        if missing:
            failed.append(f"--- no answer from rank {missing} of {world_size}")
        if failed:
            self.stop()  # a process group that has seen an error can't be trusted
            pytest.fail("\n".join(failed), pytrace=False)
        return [answers[rank][1] for rank in range(world_size)]


def memory(key: str) -> int:
    """Bytes that Linux tells of this process: VmRSS (now), VmHWM (at most so far), VmData (its own)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


@contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody else is given while in ``with``; a server of ours can still listen there (SO_REUSEADDR)."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def own_group() -> Iterator[None]:
    """Each file starts without a process group in this process, whichever came before it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def alone() -> Iterator[Callable[..., tuple]]:
    """``initialize()`` in a process without a launcher, with a config and a model unless others are given.

    What it has started ends with the test.
    """
    import engine as deepspeed
    from oracle import Mlp
    engines, config = [], {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}

    def make(config: Any = config, **kwargs: Any) -> tuple:
        engine, *others = deepspeed.initialize(**{"model": Mlp(), "config": config} | kwargs)
        engines.append(engine)
        return engine, *others

    yield make
    for engine in engines:
        engine.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def run_ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """See Ranks. A test that expects an error catches it inside its function."""
    ranks = Ranks(sorted({item.module.__name__ for item in request.session.items}))
    yield ranks
    ranks.stop()


@pytest.fixture
def fresh_ranks(run_ranks: Ranks) -> Iterator[Ranks]:
    """Processes in which nothing has run, and nothing will run after the test."""
    run_ranks.stop()
    yield run_ranks
    run_ranks.stop()
