"""The training script, the documented example, and the launcher: by its command line, for real, and on two machines.

    .venv/bin/python -m pytest -q tests/test_launch.py
    .venv/bin/python -m pytest -q tests/test_launch.py --long     also kills, and one machine without the other

The two machines are two network namespaces joined by a cable that can be cut, with a launcher in each. They need root,
on Linux. Both have the same host name, which stands for the loopback address, as on many real machines: an address
taken from the name would lead each to itself. This file is also the script that the launchers start.
"""

import errno
import io
import ipaddress
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import engine as deepspeed
import launch
import train_gpt
from conftest import DEADLINE, ROOT, Program, Ranks, free_port

STEP_LOSS = re.compile(r"step +(\d+)/\d+  loss (\d+\.\d+)")
SMALL = ["--dim=16", "--layers=1", "--heads=2", "--context=16", "--batch=8", "--steps=20", "--report=10", "--sample=8"]


def run_script(arguments: list[str]) -> str:
    """What the script prints."""
    with mock.patch.object(sys, "argv", ["train_gpt.py", *arguments]), redirect_stdout(io.StringIO()) as out:
        train_gpt.main()
    return out.getvalue()


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", printed)]


def test_it_learns_real_text_the_same_on_one_rank_and_on_two(run_ranks, tmp_path):
    arguments = [*SMALL, f"--plot={tmp_path / 'loss.png'}"]
    (alone,) = run_ranks(run_script, 1, arguments)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    together, silent = run_ranks(run_script, 2, arguments)
    assert silent == "" and "the model writes:\ndef " in alone
    assert len(losses(alone)) == 4 and losses(alone)[0] > 5 > losses(alone)[2], "three steps' losses and a held-out one"
    assert losses(together) == pytest.approx(losses(alone), abs=2e-4)


def curves_of(arguments: list[str]) -> list[list[tuple[int, float]]]:
    """The curves that the script draws."""
    with mock.patch.object(train_gpt, "draw_curves") as drawn:
        run_script(arguments)
    return [list(curve) for curve in drawn.call_args.args[:2]] if drawn.called else []


def test_the_curve_has_every_step_also_those_before_a_resume(run_ranks, tmp_path):
    (whole, held_out), _ = run_ranks(curves_of, 2, SMALL)
    assert [step for step, _ in whole] == list(range(1, 21)) and [step for step, _ in held_out] == [20]
    saving = [*SMALL, f"--save_dir={tmp_path / 'runs'}", "--save_every=5", "--report=100", "--resume"]
    schedule = "--config=" + str(tmp_path / "constant.json")
    (tmp_path / "constant.json").write_text('{"train_batch_size": 8, "optimizer": {"type": "AdamW"}}')
    (expected, _), _ = run_ranks(curves_of, 2, [*SMALL, schedule])
    run_ranks(curves_of, 2, [*saving, schedule, "--steps=7"])
    (resumed, held_out), _ = run_ranks(curves_of, 2, [*saving, schedule, "--steps=20"])
    assert resumed == expected and [step for step, _ in held_out] == [7, 20]


@pytest.mark.parametrize("arguments, told", [
    (["--data", "no such file"], "train_gpt.py: error: --data no such file can't be read"),
    (["--data", "SHORT"], "too little text: 27 bytes to train on and 3 held out"),
    (["--config", "no such file"], "train_gpt.py: error: the config file no such file can't be read"),
    (["--resume"], "--resume needs --save_dir"), (["--heads", "5"], "--heads 5 does not divide --dim 96"),
    (["--steps", "0"], "--steps is 0; allowed")])
def test_bad_input_is_refused(tmp_path, capsys, arguments, told):
    (tmp_path / "short").write_text("x" * 30)
    arguments = [str(tmp_path / "short") if a == "SHORT" else a for a in arguments]
    with pytest.raises(SystemExit) as stopped:
        run_script(arguments)
    assert told in str(stopped.value) + capsys.readouterr().err


# --- The documented example, and the command line ---------------------------------------------------------------------


RATE = "Learning rate after warm-up step: 0.0023546349804879152"  # DeepSpeed 0.19.8's own, to the last digit


def run_main(arguments: list[str]) -> tuple[int, str, str]:
    """The exit code of launch.main and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = launch.main(arguments)
        except SystemExit as stop:  # argparse's way out
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def test_the_documented_example_ends_at_deepspeeds_rate():
    code, out, err = run_main([])
    lines = out.splitlines()
    assert (code, err) == (0, "") and not dist.is_initialized()
    assert lines[0] == RATE and lines[1].startswith("Loss: ") and lines[2:] == ["Training step completed"]


@pytest.mark.parametrize("world_size, stage", [(2, 0), (4, 0), (2, 1), (2, 2), (2, 3)])
def test_every_rank_takes_its_share_and_rank_0_prints_what_one_process_prints(run_ranks, world_size, stage):
    """At every stage of ZeRO."""
    arguments = ["--zero_stage", str(stage)] if stage else []
    first, *others = run_ranks(run_main, world_size, arguments)
    assert first == run_main([]) == run_main(arguments) and others == [(0, "", "")] * (world_size - 1)


def test_a_batch_that_cannot_be_shared_out_is_refused_on_every_rank(run_ranks):
    answers = run_ranks(run_main, 3, [])
    assert all(code == 2 and out == "" and "!= 8" in err for code, out, err in answers)


def test_user_errors_take_one_line_and_a_code_and_help_says_how_to_start():
    code, out, _ = run_main(["--help"])
    assert code == 0
    assert all(text in out for text in ("torchrun --nproc_per_node 2 launch.py", "--zero_stage", "SCRIPT"))
    for arguments, told in (["--bogus"], "unrecognized arguments"), (["--zero_stage", "4"], "invalid choice: 4"), \
            (["none.py"], "there is no script 'none.py'"), (["--nproc_per_node", "0"], "--nproc_per_node is 0"), \
            (["--zero_stage", "1", __file__], "--zero_stage changes the example's config"), \
            (["--nnodes", "2"], "several machines need --rdzv_endpoint HOST:PORT"), \
            (["--nnodes", "2", "--master_addr", "h"], "each machine needs its own --node_rank, 0 to 1"), \
            (["--nnodes", "3:2", "--master_addr", "h"], "allowed: N or MIN:MAX from 1 up"), \
            (["--nnodes", "2", "--node_rank", "2", "--master_addr", "h"], "--node_rank 2; allowed: 0 to 1"), \
            (["--nnodes", "2", "--node_rank", "1", "--master_addr", "no.such.host.invalid"], "no way to node 0"), \
            (["--nproc_per_node", "2", "--rdzv_endpoint", "a:1", "--master_addr", "b"],
             "--rdzv_endpoint is a:1 and --master_addr b; allowed: one of them"), \
            (["--launcher", "pdsh", __file__], "--launcher is not an option here: nothing is started on other"), \
            (["--launcher=pdsh", __file__], "--launcher is not an option here"), \
            (["-i", "a:0,2"], "-i is not an option here: run launch.py on the machines that you want"), \
            (["--exclude=a"], "set CUDA_VISIBLE_DEVICES=0,2 for GPUs 0 and 2"), \
            (["--hostfile", "hosts", __file__], "--hostfile is not an option here: nothing is started on other "
             "machines; run launch.py on each, with --nnodes, --node_rank and --rdzv_endpoint"):
        code, out, err = run_main(arguments)
        assert code == 2 and told in err.splitlines()[-1]


def test_deepspeeds_launcher_options_are_pytorchs():
    def settled(*argv: str) -> dict:
        options = launch.build_parser().parse_args([*argv, __file__, "--num_gpus", "7"])
        assert options.training_script_args == ["--num_gpus", "7"], "behind SCRIPT, options are the script's"
        with mock.patch.dict(os.environ):
            launch.settle(options)
            return vars(options) | {"card": os.environ.get("GLOO_SOCKET_IFNAME")}

    def expect(argv: str, **expected: object) -> None:
        found = settled(*argv.split())
        assert {key: found[key] for key in expected} == expected, argv

    expect("--num_gpus 2", nproc_per_node="2", nnodes="1", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1")
    for argv, tee in ("", "2"), ("--redirects 1", "2"), ("--redirects 2", "0"), ("--redirects 3", "0"), \
            ("--redirects 0:1", "0"), ("--redirects 1 --tee 0", "0"):
        expect(argv, tee=tee)
    expect("--num_gpus 2 --master_port 1234", rdzv_endpoint="127.0.0.1:1234", rdzv_backend="static", node_rank=0)
    expect("--num_nodes 2 --no_ssh --node_rank 1 --master_addr 127.0.0.1 --module", nnodes="2", node_rank=1,
           module=True, rdzv_endpoint="127.0.0.1:29500", rdzv_backend="static", local_addr="127.0.0.1", card="lo")
    expect("--nnodes 1:2 --node_rank 1 --rdzv_endpoint 127.0.0.1:1234 --rdzv_conf a=1", rdzv_backend="c10d",
           rdzv_conf="a=1,is_host=0", rdzv_endpoint="127.0.0.1:1234")


def test_processes_of_one_machine_need_no_connection_to_port_0(monkeypatch):
    """Linux makes one; macOS and Windows refuse."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: tuple) -> None:
        if address[1] == 0:
            raise OSError(errno.EADDRNOTAVAIL, "Can't assign requested address")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for argv in ["--num_gpus", "2"], ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]:
        options = launch.build_parser().parse_args([*argv, __file__])
        launch.settle(options)
        assert options.rdzv_endpoint.endswith(":0") and ipaddress.ip_address(options.local_addr).is_loopback


def failed(folder: Path, *ranks: tuple[int, int, float]) -> tuple[int, str]:
    """The exit code and the report, where each rank had ``(exit code, seconds until it was seen, until its words)``."""
    failures = {}
    for rank, (code, seen, wrote) in enumerate(ranks):
        for attempt, words in enumerate(("of the start before\n", f"words of {rank}\n")):
            stderr = folder / f"attempt_{attempt}" / str(rank) / "stderr.log"
            stderr.parent.mkdir(parents=True, exist_ok=True)
            stderr.write_text(words)
            os.utime(stderr, (1e9 + wrote - 100 * (1 - attempt), 1e9 + wrote - 100 * (1 - attempt)))
        if code:
            failures[rank] = ProcessFailure(rank, 0, code, "")
            failures[rank].timestamp = int(1e9 + seen)
    with redirect_stderr(io.StringIO()) as err:
        code = launch.report_failure(ChildFailedError("train.py", failures), "train.py", str(folder))
    return code, err.getvalue()


def test_the_report_is_about_the_rank_that_failed_first(tmp_path):
    for ranks, told, code in (
            ([(1, 9.9, 9.5), (-9, 40.1, 2)], "rank 0 with exit code 1", 1),       # rank 1 did not hear SIGTERM
            ([(1, 40.1, 2), (1, 9.9, 9.5)], "rank 1 with exit code 1", 1),        # rank 0 ended itself, in silence
            ([(1, 9.9, 9.5), (-15, 10.0, 2)], "rank 0 with exit code 1", 1),      # rank 1 was stopped by SIGTERM
            ([(-15, 9.9, 9.5), (-9, 40.1, 2)], "rank 0 with signal SIGTERM", 143),  # from outside; rank 1 did not hear
            ([(-9, 9.9, 2), (1, 10.0, 9.8)], "rank 0 with signal SIGKILL", 137),  # rank 1 failed because of that
            ([(1, 10.1, 9.8), (7, 9.9, 9.5)], "rank 1 with exit code 7", 7)):
        found, report = failed(tmp_path, *ranks)
        rank = told.split()[1]
        assert found == code and f"train.py failed on {told}\n" in report and report.endswith(f"words of {rank}\n"), \
            (ranks, report)
        assert ("hint: Linux kills a process in this way when memory runs out" in report) == (code == 137), ranks


# --- Started for real -------------------------------------------------------------------------------------------------


FAILS = """import fcntl, os, signal, sys, time, traceback
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told to stop or not, each comes to its own end
os.write(1, f"{os.environ['RANK']} {os.environ['WORLD_SIZE']} {sys.argv[2:]}\\n".encode())  # in one piece
lock = open(sys.argv[1], "w")
if os.environ["RANK"] == "1":
    while not os.path.exists(sys.argv[1] + ".ready"):
        time.sleep(0.01)
    fcntl.flock(lock, fcntl.LOCK_EX)
    open(sys.argv[1] + ".taken", "w")
    try:
        raise KeyError("the cause")
    except KeyError:
        traceback.print_exc()
        sys.exit(7)
open(sys.argv[1] + ".ready", "w")
while not os.path.exists(sys.argv[1] + ".taken"):
    time.sleep(0.01)
fcntl.flock(lock, fcntl.LOCK_EX)  # free as soon as rank 1 has ended
time.sleep(0.02)  # some ticks of the clock that files are stamped by; a real process takes longer to end
raise RuntimeError("a consequence")
"""
KILLED = """import os
os.write(2, b"10%\\r20%\\r")  # a progress bar
os.kill(os.getpid(), 9)
"""
DIES = """import os, signal, sys, time
from pathlib import Path
import engine, train_gpt
step, once, gone = engine.Engine.step, Path(os.environ["FOLDER"], "once"), Path(os.environ["FOLDER"], "gone")
while os.environ["WORLD_SIZE"] == "1" and not gone.exists():
    time.sleep(0.01)  # until the other machine, which may be slow, joins, and the launcher starts both anew
def step_or_die(self, *args):
    if os.environ["NODE"] == "1" and self.global_steps == 7 and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["NODE"] == "1" and self.global_steps == 17:
        gone.touch()
        os.kill(os.getppid(), signal.SIGKILL)  # the launcher: the machine is gone
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)
engine.Engine.step = step_or_die
train_gpt.main()
"""
TRAINING = [*SMALL, "--report=1", f"--data={ROOT / 'engine.py'}", f"--plot={os.devnull}"]


class Launches:
    """Launchers that run side by side, as each takes a while; each test collects its own."""

    def __init__(self, run_ranks: Ranks, folder: Path, port: int) -> None:
        self.run_ranks, self.folder, self.running = run_ranks, folder, []
        for name, text in ("fails", FAILS), ("killed", KILLED), ("dies", DIES):
            (folder / f"{name}.py").write_text(text)
        # Until the launcher that is left gives the other one up: as long as a busy machine may take to stop a process.
        elastic = ["--nnodes", "1:2", "--max_restarts", "3", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_conf",
                   "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=8"]
        self.machines = [self._start(
            [*elastic, "--node_rank", node, str(folder / "dies.py"), *TRAINING,
             f"--save_dir={folder / 'runs'}", "--save_every=5", "--resume"],
            NODE=node, FOLDER=str(folder), PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tutorials'}",
            OMP_NUM_THREADS="1") for node in "01"]
        self.failing = self._start(
            ["--nproc_per_node", "2", str(folder / "fails.py"), str(folder / "lock"), "--x", "1"])
        other_job = folder / "logs" / "none_1" / "attempt_0" / "0" / "stderr.log"
        other_job.parent.mkdir(parents=True)
        other_job.write_text("words of another job")
        os.utime(other_job, (2e9, 2e9))
        self.killed = self._start(["--redirects", "1", "--log_dir", str(folder / "logs"), str(folder / "killed.py")])
        self.example = self._start(["--nproc_per_node", "2"])

    def _start(self, arguments: list[str], **variables: str) -> Program:
        printed = self.folder / f"launcher{len(self.running)}"
        self.running.append(Program(self.run_ranks, printed, ["launch.py", *arguments], TMPDIR=str(self.folder),
                                    **variables))
        return self.running[-1]

    def stop(self) -> None:
        for launcher in self.running:
            launcher.stop()


@pytest.fixture(scope="module", autouse=True)  # they run beside the tests above
def launches(run_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launches]:
    with free_port() as port:
        launches = Launches(run_ranks, tmp_path_factory.mktemp("launches"), port)
        yield launches
        launches.stop()


def test_the_command_line_is_a_program(launches):
    """With one process it is started by a new interpreter, and starts one."""
    done = subprocess.run([sys.executable, ROOT / "launch.py", "--nproc_per_node", "1"], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=DEADLINE)
    for code, out, err in (done.returncode, done.stdout, done.stderr), launches.example.end():
        assert code == 0, err
        assert out.splitlines()[0] == RATE and len(out.splitlines()) == 3


def test_scripts_run_on_processes_of_their_own_and_their_failure_is_the_launchers(launches):
    """Rank 0 of the failing script fails because rank 1 did, as soon as that has ended."""
    code, out, err = launches.failing.end()
    assert code == 7, err
    assert sorted(out.splitlines()) == [f"{rank} 2 ['--x', '1']" for rank in (0, 1)]
    streamed, _, last = err.partition(
        f"launch.py: error: {launches.folder / 'fails.py'} failed on rank 1 with exit code 7\n")
    assert last.startswith("Traceback (most recent call last):\n") and last.endswith("\nKeyError: 'the cause'\n"), err
    assert "KeyError: 'the cause'" in streamed and "a consequence" in streamed, "as it was written"
    code, out, err = launches.killed.end()
    assert code == 137 and err.startswith("[rank0]: 10%\n20%\n"), err  # as text, in which "\r" is read as "\n"
    hint = "launch.py: hint: Linux kills a process in this way when memory runs out"
    assert f"failed on rank 0 with signal SIGKILL\n{hint}" in err
    assert err.endswith("\n10%\n20%\n"), err


def test_a_run_goes_on_by_itself_after_kill_9_and_without_a_machine_that_is_gone(launches, run_ranks):
    """Two launchers of one process each, as two machines. One process is killed after step 7, its machine after 17."""
    together, _ = run_ranks(run_script, 2, TRAINING)
    (code, out, err), (other_code, other_out, _) = [machine.end() for machine in launches.machines]
    assert (code, other_code) == (0, -signal.SIGKILL), err
    assert all(f"launch.py: starting again, on {left} machine(s)\n" in err for left in (2, 1)), err
    whole = dict(STEP_LOSS.findall(together))
    printed = STEP_LOSS.findall(other_out + out)  # by rank 0 of each start: on machine 0 or 1, but the last on 0
    assert [int(step) for step, _ in printed] == [*range(1, 8), *range(6, 18), *range(16, 21)], err
    for step, loss in printed[:-5]:
        assert loss == whole[step], f"step {step} on 2 processes: {loss}, where no kill gave {whole[step]}"
    for step, loss in printed[-5:]:
        assert float(loss) == pytest.approx(float(whole[step]), abs=2e-4), f"step {step} on the process that was left"
    assert losses(out)[-1] == pytest.approx(losses(together)[-1], abs=2e-4), "held-out text"


FORGETFUL = """
import atexit, sys, time, weakref
import torch, torch.distributed as dist
import engine as deepspeed
groups = []
atexit.register(lambda: print("gone" if groups[0]() is None else "kept"))  # runs after what is registered later
deepspeed.init_distributed()
groups.append(weakref.ref(dist.group.WORLD))
optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
if sys.argv[1] == "engine":
    model = torch.nn.Linear(4, 1)
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": int(sys.argv[2])}})
    engine.backward(engine(torch.ones(2, 4)).mean())
    engine.step()
parts = [torch.zeros(3) for _ in range(2)]
dist.all_gather(parts, torch.full((3,), float(dist.get_rank())))
time.sleep(float(sys.argv[3]) * dist.get_rank())  # one rank ends earlier than the other
print("right", dist.get_rank())
"""


def test_a_script_that_forgets_the_process_group_ends_cleanly(tmp_path, is_long):
    script = tmp_path / "forgetful.py"
    script.write_text(FORGETFUL)
    cases = [("engine", "3", "0.3"), ("alone", "0", "0")]
    for run, case in enumerate(cases * 25 if is_long else cases[:1]):
        with free_port() as port:
            common = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            ranks = [subprocess.Popen([sys.executable, script, *case],
                                      env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
            told = [process.communicate(timeout=DEADLINE) for process in ranks]
        for rank, (process, (out, err)) in enumerate(zip(ranks, told)):
            assert (process.returncode, out) == (0, f"right {rank}\ngone\n"), f"run {run}, {case}, rank {rank}: {err}"
            assert "terminate" not in err and "Error" not in err, f"run {run}, {case}, rank {rank}: {err}"


@pytest.mark.long  # six restarts take a minute or two
def test_kills_at_any_moment_leave_the_same_losses(run_ranks, tmp_path):
    common = [*TRAINING, "--steps=3000", "--report=100"]
    (together, _), moments = run_ranks(run_script, 2, common), random.Random(0)
    launcher = Program(run_ranks, tmp_path / "printed", [
        "launch.py", "--nproc_per_node", "2", "--max_restarts", "6", str(ROOT / "tutorials" / "train_gpt.py"), *common,
        f"--save_dir={tmp_path / 'runs'}", "--save_every=20", "--resume"], OMP_NUM_THREADS="1")
    pid = launcher.process.pid
    for _ in range(6):
        time.sleep(moments.uniform(4, 10))  # a start takes some of this: kills also hit loading and connecting
        processes = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if processes:
            with suppress(ProcessLookupError):
                os.kill(int(moments.choice(processes)), signal.SIGKILL)
    code, out, err = launcher.end()
    assert code == 0 and err.count("launch.py: starting again, on 1 machine(s)\n") >= 2, err
    whole, resumed = dict(STEP_LOSS.findall(together)), STEP_LOSS.findall(out)
    assert resumed[-1][0] == "3000" and all(whole[step] == loss for step, loss in resumed), (resumed, whole)


ADDRESSES = ["10.71.0.1", "10.71.0.2"]
CARD = "cable"  # the network interface's name, on both
TIMEOUT = 8  # seconds that a collective waits
STEPS, SAVED, CUT = 8, 4, 6  # of the last run: all, the one saved after, the one in which the cable is cut


# --- Two machines -----------------------------------------------------------------------------------------------------


def cut_cable() -> None:
    """From inside a machine: from here on its packets get lost, without an error."""
    subprocess.run(["ip", "link", "set", CARD, "down"], check=True)


def train(stage: int, steps: int, folder: str | None = None, cut: bool = False) -> dict[int, float]:
    """{step: loss of the whole batch}, from ``folder``'s checkpoint on, if any; saved there after step SAVED."""
    torch.manual_seed(0)
    model = train_gpt.GPT(dim=16, layers=2, heads=2, context=8)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
        "train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage}})
    if folder:
        engine.load_checkpoint(folder)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(256, (8, 9), generator=generator) for _ in range(steps)]
    losses = {}
    for step, batch in list(enumerate(batches, 1))[engine.global_steps:]:
        share = batch[engine.global_rank::engine.world_size]
        loss = engine(share[:, :-1], share[:, 1:])
        if cut and step == CUT and os.environ["GROUP_RANK"] == "1" and os.environ["LOCAL_RANK"] == "0":
            cut_cable()
        engine.backward(loss)
        engine.step()
        losses[step] = float(train_gpt.mean_over_ranks(loss))
        if folder and step == SAVED:
            engine.save_checkpoint(folder)
    engine.destroy()
    return losses


def train_at_all_stages() -> list[dict[int, float]]:
    return [train(stage, 3) for stage in range(4)]


def main(folder: str) -> None:
    """A process on one of the machines: all stages, then a run in which the cable is cut; resumed, the rest of that."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    first = not Path(folder, "checkpoints").exists()
    if first:
        place = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")}
        Path(folder, f"rank{place['RANK']}.json").write_text(json.dumps([place, train_at_all_stages()]))
    last = train(2, STEPS, f"{folder}/checkpoints", cut=first)
    Path(folder, "last.json").write_text(json.dumps(last))

class Machines:
    """Two network namespaces; ``launch`` starts the launcher in both."""

    def __init__(self) -> None:
        self.names = [f"machine{number}_{os.getpid()}" for number in (0, 1)]

    def connect(self) -> None:
        """Make them; CalledProcessError where that is not allowed."""
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", CARD, "netns", self.names[0], "type", "veth", "peer", "name", CARD, "netns",
                 self.names[1])
        for name, address in zip(self.names, ADDRESSES):
            self.ip("-n", name, "address", "add", f"{address}/24", "dev", CARD)
            for card in ("lo", CARD):
                self.ip("-n", name, "link", "set", card, "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    @staticmethod
    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    @contextmanager
    def launch(self, run_ranks: Ranks, options: list[str], folder: Path) -> Iterator[list[Program]]:
        """A launcher of this file per machine; stopped at the end if they still run."""
        launchers = [Program(run_ranks, folder / name, ["launch.py", "--node_rank", str(number), "--rdzv_endpoint",
                                                        f"{ADDRESSES[0]}:29500", *options, __file__, str(folder)],
                             network=name, OMP_NUM_THREADS="1") for number, name in enumerate(self.names)]
        try:
            yield launchers
        finally:
            for launcher in launchers:
                launcher.stop()


@pytest.fixture()
def machines() -> Iterator[Machines]:
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, and its command ip")
    machines = Machines()
    try:
        try:
            machines.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces can't be made here: {error.stderr.strip()}")
        yield machines
    finally:
        machines.remove()


def assert_close(losses: dict[int, float], expected: dict[int, float], what: str) -> None:
    differences = {step: abs(losses[step] - expected[step]) for step in losses}
    step = max(differences, key=differences.get)
    assert differences[step] < 1e-5, f"{what}, step {step}: {losses[step]} where one process has {expected[step]}"


def read(path: Path) -> list:
    """JSON, with whole-number keys again."""
    return json.loads(path.read_text(), object_hook=lambda d: {int(k) if k.isdecimal() else k: v for k, v in d.items()})


def test_two_machines_train_as_one_process_and_a_cut_cable_ends_them_all(machines, run_ranks, tmp_path, is_long):
    each = 2 if is_long else 1  # processes per machine
    with machines.launch(run_ranks, ["--nnodes", "2", "--nproc_per_node", str(each)], tmp_path) as launchers:
        (stages,), (whole,) = run_ranks(train_at_all_stages, 1), run_ranks(train, 1, 2, STEPS)
        ends = [launcher.end() for launcher in launchers]
    for rank in range(2 * each):
        path = tmp_path / f"rank{rank}.json"
        assert path.exists(), ends
        place, losses = read(path)
        assert place == {"RANK": str(rank), "LOCAL_RANK": str(rank % each), "WORLD_SIZE": str(2 * each),
                         "GLOO_SOCKET_IFNAME": CARD}
        for stage in range(4):
            assert list(losses[stage]) == [1, 2, 3]
            assert_close(losses[stage], stages[stage], f"rank {rank} of {2 * each}, stage {stage}")
    assert not (tmp_path / "last.json").exists(), "trained on with the cable cut"
    for code, _, machine in ends:
        assert code == 1, machine
        summary = machine[machine.index("launch.py: error: "):]
        assert re.search(r"failed on rank \d with exit code 1\n", summary) and "Traceback" in summary, machine
        assert re.search("Timed out waiting|Connection closed by peer|Connection reset by peer", summary), machine
    for world_size in (1, 4):
        (resumed, *_) = run_ranks(train, world_size, 1, STEPS, str(tmp_path / "checkpoints"))
        assert list(resumed) == list(range(SAVED + 1, STEPS + 1))
        assert_close(resumed, whole, f"resumed on {world_size} processes of one machine")


@pytest.mark.long  # waits a minute for the other machine
def test_with_the_cable_cut_one_machine_goes_on_without_the_other(machines, run_ranks, tmp_path):
    options = ["--nnodes", "1:2", "--nproc_per_node", "2", "--max_restarts", "1",
               "--rdzv_conf", "last_call_timeout=5,read_timeout=20"]
    for name in machines.names:  # a dead connection ends after seconds, not after Linux' quarter of an hour
        machines.ip("netns", "exec", name, "sh", "-c", "echo 4 > /proc/sys/net/ipv4/tcp_retries2")
    with machines.launch(run_ranks, options, tmp_path) as launchers:
        (whole,) = run_ranks(train, 1, 2, STEPS)
        (code, _, first), (lost, _, second) = [launcher.end() for launcher in launchers]
    assert code == 0 and "launch.py: starting again, on 1 machine(s)" in first, first
    assert lost == 1 and "other machines can't be reached" in second.splitlines()[-1], second
    last = read(tmp_path / "last.json")
    assert list(last) == list(range(SAVED + 1, STEPS + 1))
    assert_close(last, whole, "resumed on one machine of two")


if __name__ == "__main__":
    main(*sys.argv[1:])
