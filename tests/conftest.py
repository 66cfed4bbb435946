"""What the tests share: ``run_ranks``, which runs a function on N gloo processes, and the ``--long`` option.

A test that is decorated with ``@on_ranks(N)`` runs on N such processes from its first line to its last. The others call
``run_ranks`` themselves: they draw their cases, or compare what the ranks return.

    .venv/bin/python -m pytest -q             everything, with a few draws per property
    .venv/bin/python -m pytest -q --long      the same properties with many more draws

The processes are started once per test session, and each stays for all the tests that need it. They are forked from a
server that has PyTorch and the tests' modules loaded already, since loading them takes longer than most tests.
``Program`` runs scripts of the project from there, as ``python SCRIPT ARGS`` would. The whole suite runs in two lanes.
"""

import ctypes
import gc
import inspect
import logging
import multiprocessing
import os
import pickle
import queue
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import groupby
from multiprocessing import connection as connections
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import hypothesis
import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [str(ROOT), str(ROOT / "tutorials"), str(ROOT / "tests")]
sys.path[:0] = FOLDERS
FORK = multiprocessing.get_context("fork")
MAX_RANKS = 4
FEWEST_FILES = 6  # of tests that a second lane is worth
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


def warnings_of(call: Callable[[], object]) -> list[str]:
    """What the project's loggers warn of while ``call`` runs, on a rank too."""
    told, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    call()
    logging.getLogger().removeHandler(handler)
    return told


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


# --- Scripts, run as ``python SCRIPT ARGS`` runs them, in processes that have PyTorch loaded already ------------------
# Where the script is the launcher, what it starts is forked in the same way. test_launch.py also starts one for real.


def run_script(command: Sequence[str], variables: dict[str, str], streams: tuple[int, ...]) -> None:
    """Be ``python SCRIPT ARGS`` in this process: with these environment variables, and these stdout and stderr."""
    os.environ.clear()
    os.environ |= variables
    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", "1")))
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the launcher catches them
        signal.signal(number, signal.SIG_DFL)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = list(command)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


class Forked:
    """The launcher's ``subprocess.Popen(["python", "-u", SCRIPT, ARGS])``, without a new interpreter."""

    def __init__(self, args: Sequence[str], env: dict[str, str], stdout: TextIO | None, stderr: TextIO | None,
                 start_new_session: bool) -> None:
        assert args[:2] == (sys.executable, "-u") and start_new_session, args
        ready, begun = FORK.Pipe(duplex=False)
        streams = tuple(stream.fileno() if stream else number for number, stream in ((1, stdout), (2, stderr)))
        self.process = FORK.Process(target=self.run, args=(begun, args[2:], env, streams))
        self.process.start()
        self.args, self.pid = args, self.process.pid
        begun.close()
        with suppress(EOFError):
            ready.recv()  # from here on its process group can be signalled

    @staticmethod
    def run(begun: Any, *command: Any) -> None:
        os.setsid()
        begun.close()
        run_script(*command)

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode


def begin(command: Sequence[str], variables: dict[str, str], printed: Path, folder: Path, network: str) -> None:
    """In a forked process: become the program, in a folder and, if named, a network namespace of ``ip netns``."""
    if network:
        with open(f"/run/netns/{network}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0, network
    os.chdir(folder)
    subprocess_handler.Popen = Forked
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND  # several processes write
    streams = tuple(os.open(printed.with_suffix(f".{name}"), flags) for name in ("out", "err"))
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    run_script(command, inherited | variables | {"CUDA_VISIBLE_DEVICES": ""}, streams)


class Program:
    """``python SCRIPT ARGS`` in the background; what it prints goes into files whose names start with ``printed``."""

    def __init__(self, run_ranks: Ranks, printed: Path, command: Sequence[str], folder: Path = ROOT, network: str = "",
                 **variables: str) -> None:
        self.printed = printed
        self.process = run_ranks.context.Process(target=begin, args=(command, variables, printed, folder, network))
        self.process.start()

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: the exit code, and what it printed."""
        self.process.join(DEADLINE)
        out, err = (self.printed.with_suffix(f".{name}").read_text() for name in ("out", "err"))
        assert self.process.exitcode is not None, err
        return self.process.exitcode, out, err

    def stop(self) -> None:
        """End it, and with it what it has started."""
        self.process.terminate()
        self.process.join(DEADLINE)


# --- Two lanes: pytest and a fork of it, each with a file of tests at a time ------------------------------------------
# Most tests keep one core busy, or wait. Where few files are asked for there is one lane, and everything is as usual.


class Sender:
    """A plugin of the second lane: what happens to each test goes to the first one."""

    def __init__(self, config: pytest.Config, reports: Any) -> None:
        self.config, self.reports = config, reports

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.put(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """A hook of pytest's: run the tests; None leaves it to pytest."""
    groups = [list(items) for _, items in groupby(session.items, lambda item: item.path)]
    if len(groups) < FEWEST_FILES or session.config.option.collectonly or session.testsfailed or os.name != "posix":
        return None
    groups.sort(key=lambda items: -items[0].path.stat().st_size)  # so that both lanes end at about the same time
    session.config._tmp_path_factory.getbasetemp()  # one for both
    counter, numbers = os.pipe()
    os.write(numbers, bytes(range(len(groups))))
    os.close(numbers)

    def take() -> list[pytest.Item]:
        """The next file's tests, if there is one; each number is read by one lane."""
        number = os.read(counter, 1)
        return groups[number[0]] if number else []

    reports = FORK.Queue()
    other = FORK.Process(target=second_lane, args=(session, take, reports))
    other.start()
    try:
        for _ in lane(session, take):
            tell(session, reports, other, wait=False)
        tell(session, reports, other, wait=True)
    finally:
        other.kill()
        other.join()
        os.close(counter)
    return True


def lane(session: pytest.Session, take: Callable[[], list[pytest.Item]]) -> Iterator[None]:
    """Run files of tests until none is left; pauses after each test."""
    items = take()
    while items:
        following = take()
        for item, nextitem in zip(items, [*items[1:], *(following[:1] or [None])]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
            yield
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
        items = following


def second_lane(session: pytest.Session, take: Callable[[], list[pytest.Item]], reports: Any) -> None:
    """In the fork: run tests, and send what happens in place of printing it. What is captured goes to its own files."""
    plugins = session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(Sender(session.config, reports))
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    capture.suspend_global_capture()
    try:
        for _ in lane(session, take):
            if not multiprocessing.parent_process().is_alive():
                break
    except (session.Failed, session.Interrupted):
        pass  # the first lane stops for the same report


def tell(session: pytest.Session, reports: Any, other: Any, wait: bool) -> None:
    """Report the second lane's tests as if they had run here: those that have ended, or all."""
    hook = session.config.hook
    while wait or not reports.empty():
        try:
            data = reports.get(timeout=0.1)
        except queue.Empty:
            if other.exitcode is None or not reports.empty():
                continue
            if other.exitcode:
                pytest.exit(f"the second lane died with exit code {other.exitcode}", 3)
            return
        hook.pytest_runtest_logreport(report=hook.pytest_report_from_serializable(config=session.config, data=data))
