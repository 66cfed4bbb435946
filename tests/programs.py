"""Scripts of the project, run as ``python SCRIPT ARGS`` runs them, in processes that have PyTorch loaded already.

Loading it takes longer than most of what they do. Where the script is the launcher, the processes that it starts are
forked in the same way. test_launch.py also starts one launcher for real.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from conftest import DEADLINE, Ranks

ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("fork")


def run_script(command: Sequence[str], variables: dict[str, str], streams: tuple[int, int]) -> None:
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


# --- In the launcher --------------------------------------------------------------------------------------------------


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
        with contextlib.suppress(EOFError):
            ready.recv()  # from here on its process group can be signalled

    @staticmethod
    def run(begun: Connection, *command: Any) -> None:
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


# --- In the tests' process --------------------------------------------------------------------------------------------


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
