"""Run the documented example, or start any script on several processes and machines.

    python launch.py                                      the documented DeepSpeed example, in this process
    python launch.py --nproc_per_node 2                   the same on 2 processes, each with its share of the batch
    python launch.py --nproc_per_node 2 train.py --steps 100    your script and its own arguments, on 2 processes
    python launch.py --as_deepspeed --nproc_per_node 2 train.py    a script that has "import deepspeed", as it is
    torchrun --nproc_per_node 2 launch.py                 what the second line does, through PyTorch's own command

On two machines, the same command on each, but for its --node_rank; the address is one by which both reach node 0:

    python launch.py --nnodes 2 --node_rank 0 --rdzv_endpoint 10.0.0.1:29500 --nproc_per_node 4 train.py
    python launch.py --nnodes 2 --node_rank 1 --rdzv_endpoint 10.0.0.1:29500 --nproc_per_node 4 train.py

Processes are started by PyTorch's launcher (torch.distributed.run, "torchrun"), and all of its options may be given.
In addition:

- When a process fails, all are stopped. The last lines on the screen are what the first one to fail wrote to stderr.
  The exit code is that process's own, or 128 + N where signal N ended it (137: SIGKILL). For this, stderr goes through
  a file, and each line begins with the rank (--tee 2); --tee 0 leaves it alone.
- With --max_restarts M, all start again, up to M times; a script that resumes from its last checkpoint goes on by
  itself. With --nnodes MIN:MAX it goes on with the machines that are left, as long as node 0 is one of them: with
  PyTorch's settings 45 seconds later (--rdzv_conf keep_alive_interval=5,keep_alive_max_attempt=3,last_call_timeout=30).
  With either, ranks may be others after each start; without, they follow --node_rank.
- A cut connection ends each process once its collectives time out, and with that its launcher; but with --max_restarts
  or MIN:MAX, a launcher that has lost node 0 may wait until Linux gives the connection up, a quarter of an hour.
- On Linux, gloo uses the network interface that leads to the other machines: GLOO_SOCKET_IFNAME, unless you set it.
- DeepSpeed's launcher options do what they do there, or are refused with the way to do it. Nothing is started on other
  machines, so there is no --hostfile.

A script finds its place in the variables RANK, LOCAL_RANK and WORLD_SIZE; no --local_rank is passed to it. Without
--nproc_per_node, SCRIPT gets a process per GPU, or one.
"""

import argparse
import os
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException, tail_log
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.launcher.api import elastic_launch

import engine as deepspeed

PORT = 29500  # on node 0, where the command line names none: as in PyTorch and DeepSpeed
LAST_LINES = 60  # of a failed process's stderr: a traceback through a model and the engine fits


# --- The documented example -------------------------------------------------------------------------------------------


class SimpleModel(nn.Module):
    """The example's model: one layer, (batch, 10) to (batch, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def documented_example(zero_stage: int = 0) -> None:
    """The example of the introduction in tutorials/README.md. What is ours, apart from the printing, is marked so."""
    torch.manual_seed(0)  # ours: the same figures every time

    model = SimpleModel()
    optimizer = optim.Adam(model.parameters(), lr=0.01)

    ds_config = {
        "train_batch_size": 8,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 100},
        },
    }
    ds_config["zero_optimization"] = {"stage": zero_stage}  # ours: the command line's

    model_engine, optimizer, _, lr_scheduler = deepspeed.initialize(
        model=model, optimizer=optimizer, config_params=ds_config)

    inputs = torch.randn(8, 10)
    inputs = inputs[model_engine.global_rank::model_engine.world_size]  # ours: this rank's share; alone, all of it
    outputs = model_engine(inputs)
    loss = outputs.mean()

    model_engine.backward(loss)
    # Two steps of the schedule in one of training: the engine's step() takes one, as DeepSpeed's does, and then the
    # example takes another. Its 0.0023 is the rate after both, 0.001 + 0.009 * log(2) / log(100): a schedule's
    # first value is in force for two steps, so after one alone the rate would still be 0.001.
    model_engine.step()
    lr_scheduler.step()

    loss = loss.detach() / model_engine.world_size  # ours: equal shares, so the mean over ranks is the batch's loss
    if model_engine.world_size > 1:
        dist.all_reduce(loss)
    if model_engine.global_rank == 0:
        print(f"Learning rate after warm-up step: {lr_scheduler.get_last_lr()[0]}")
        print(f"Loss: {loss.item():.6f}")
        print("Training step completed")
    model_engine.destroy()


# --- How the machines find each other ---------------------------------------------------------------------------------


def set_rendezvous(options: argparse.Namespace) -> None:
    """Turn the options into what PyTorch's launcher needs; ValueError where they say too little, or contradict.

    Where machines and processes are fixed, they meet once, and node 0 is known ("static"). Where processes may start
    again, or machines may be missing, they meet before each start, in a store that node 0 keeps ("c10d").
    """
    fewest, most = run.parse_min_max_nnodes(options.nnodes)
    endpoint = options.rdzv_endpoint or options.master_addr or ("127.0.0.1" if options.master_port else "")
    for is_wrong, told in (
            (not 1 <= fewest <= most or options.max_restarts < 0,
             f", --max_restarts {options.max_restarts}; allowed: N or MIN:MAX from 1 up, and a number from 0 up"),
            (most > 1 and (options.standalone or not endpoint),
             ": several machines need --rdzv_endpoint HOST:PORT, by which all reach node 0, and no --standalone"),
            (most > 1 and options.node_rank is None and options.rdzv_backend == "static",
             f": each machine needs its own --node_rank, 0 to {most - 1}"),
            (not 0 <= (options.node_rank or 0) < most,
             f" and --node_rank {options.node_rank}; allowed: 0 to {most - 1}")):
        if is_wrong:
            raise ValueError(f"--nnodes is {options.nnodes}{told}")
    if options.rdzv_endpoint and options.master_addr:
        raise ValueError(f"--rdzv_endpoint is {options.rdzv_endpoint} and --master_addr {options.master_addr}; "
                         f"allowed: one of them")
    if not endpoint:
        options.rdzv_backend, endpoint = "c10d", "127.0.0.1:0"  # any port that is free
    options.rdzv_endpoint = endpoint if ":" in endpoint else f"{endpoint}:{options.master_port or PORT}"
    if options.rdzv_backend == "static" and (fewest < most or options.max_restarts):
        options.rdzv_backend = "c10d"
    if options.rdzv_backend == "c10d" and options.node_rank is not None and "is_host" not in options.rdzv_conf:
        options.rdzv_conf += f"{options.rdzv_conf and ','}is_host={int(options.node_rank == 0)}"
    if options.rdzv_backend != "static" or options.node_rank is None:
        options.node_rank = 0  # PyTorch has no further use for it
    set_addresses(options, most)


def set_addresses(options: argparse.Namespace, most: int) -> None:
    """Tell PyTorch this machine's address towards node 0, and gloo the network interface that has it.

    Both go by the machine's own name otherwise, which often stands for an address that only this machine can reach.
    """
    host, _, port = options.rdzv_endpoint.rpartition(":")
    try:
        port = PORT if port == "0" else port  # any does, but 0, to which macOS and Windows connect nothing
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket chooses its route, and sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"there is no way to node 0 at {options.rdzv_endpoint}: {error.strerror}") from error
    options.local_addr = options.local_addr or own
    if most > 1 and sys.platform == "linux":
        for _, name in socket.if_nameindex():
            if address_of(name) == own:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface, "" where it has none; on Linux."""
    from fcntl import ioctl

    get_address = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        return socket.inet_ntoa(ioctl(probe, get_address, struct.pack("256s", interface.encode()))[20:24])
    return ""


# --- Running, and reporting failures ----------------------------------------------------------------------------------


def join_with_new_store(handler: DynamicRendezvousHandler,
                        join: Callable = DynamicRendezvousHandler.next_rendezvous) -> RendezvousInfo:
    """PyTorch's ``next_rendezvous``, where rank 0's launcher keeps a store for the processes, but a new one each time.

    In the old one a restart would find the addresses of the start before it, fail to connect, and be lost.
    """
    is_restart = handler._bootstrap_store_info is not None
    handler._bootstrap_store_info = handler._shared_tcp_store_server = None
    joined = join(handler)
    if is_restart:
        print(f"launch.py: starting again, on {joined.world_size} machine(s)", file=sys.stderr, flush=True)
    return joined


def stderr_of(failure: ProcessFailure, run_dir: str) -> Path:
    """The file to which a process of the latest start wrote its stderr, by PyTorch's names; none: the empty one."""
    files = Path(run_dir).glob(f"attempt_*/{failure.local_rank}/stderr.log")
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=Path(os.devnull))


def report_failure(error: ChildFailedError, script: str, run_dir: str) -> int:
    """Report which process failed first, and the end of its stderr, if that is in a file; returns the exit code."""
    # Others failed because it did, and later, or were stopped by the launcher: by SIGTERM, and what does not hear it,
    # by SIGKILL 30 seconds later. PyTorch knows whole seconds only; a process's last words are from before its end, and
    # those of one that misses it from after that. (Files are stamped by a clock that ticks every few milliseconds; a
    # process that has loaded PyTorch takes longer to end.)
    began = min(failure.timestamp for failure in error.failures.values())
    first = {rank: failure for rank, failure in error.failures.items() if failure.timestamp < began + 2}
    alone = {rank: failure for rank, failure in first.items() if failure.exitcode != -signal.SIGTERM}
    files = {rank: stderr_of(failure, run_dir) for rank, failure in error.failures.items()}
    rank, failure = min((alone or first).items(), key=lambda item: files[item[0]].stat().st_mtime_ns)
    code, how = failure.exitcode, f"exit code {failure.exitcode}"
    if code < 0:
        code, how = 128 - code, f"signal {failure.signal_name()}"
    words = [f"launch.py: error: {script} failed on rank {rank} with {how}"]
    if code == 128 + signal.SIGKILL:
        words.append("launch.py: hint: so Linux ends a process when memory runs out (dmesg tells). It takes less with "
                     "smaller micro-batches, a higher ZeRO stage, or fewer processes per machine")
    words += files[rank].read_text(errors="replace").splitlines()[-LAST_LINES:]
    print("\n".join(words), file=sys.stderr, flush=True)
    return code


def start_processes(options: argparse.Namespace) -> int:
    """Run the script on this machine's processes; returns the exit code, as the top of this file has it."""
    # PyTorch would give each process one thread, so that they don't crowd each other; an equal share does as well.
    processes = run.determine_local_world_size(options.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank${rank}]: ")  # of lines that are shown by tee
    tail_log.open = partial(open, newline="\n")  # else each of a progress bar's "\r" would become a line of its own
    with tempfile.TemporaryDirectory(prefix="launch_") as folder:
        if options.as_deepspeed:
            deepspeed.as_deepspeed(folder)
        options.log_dir = options.log_dir or folder
        config, command, arguments = run.config_from_args(options)
        DynamicRendezvousHandler.next_rendezvous = join_with_new_store
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as error:
            # Private: this launcher's own folder in --log_dir, which other jobs and machines may share.
            run_dir = getattr(config.logs_specs, "_run_log_dir", None) or folder
            return report_failure(error, options.training_script, run_dir)
        except SignalException as error:
            print(f"launch.py: stopped by {error.sigval.name}", file=sys.stderr)
            return 128 + error.sigval
        except (RendezvousError, dist.DistError) as error:
            print(f"launch.py: error: the other machines can't be reached by way of {options.rdzv_endpoint}, or have "
                  f"stopped: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
    return 0


# --- The command line -------------------------------------------------------------------------------------------------


REFUSED = {  # DeepSpeed's options that have no counterpart, and the way to do it
    ("-H", "--hostfile"):
        "nothing is started on other machines; run launch.py on each, with --nnodes, --node_rank and --rdzv_endpoint",
    ("-i", "--include", "-e", "--exclude"):
        "run launch.py on the machines that are meant, under CUDA_VISIBLE_DEVICES=0,2 for GPUs 0 and 2 of one",
    ("--launcher", "--launcher_args", "--ssh_port", "--force_multi"):
        "nothing is started on other machines; have srun, mpirun or a shell loop run launch.py on each",
    ("--bind_cores_to_rank", "--bind_core_list"):
        "--numa_binding does it where there are GPUs; else put taskset --cpu-list LIST before the command",
    ("--enable_each_rank_log",): "--log_dir DIR --redirects 3 writes each rank's output to files",
    ("--log_level", "-q", "--quiet"): "the variable LOGLEVEL does it: INFO, WARNING, ERROR",
    ("--venv_script",): "start launch.py with the python of that environment",
    ("--save_pid",): "the shell knows it: $! after a command that ends with &",
    ("--autotuning",): "try the settings in a shell loop",
}


class Refused(argparse.Action):
    """An option that ends the program with its ``help``."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
                 option_string: str | None = None) -> None:
        parser.error(f"{option_string} is not an option here: {self.help}")


def build_parser() -> argparse.ArgumentParser:
    """PyTorch's command line, with the example's options and DeepSpeed's added."""
    parser = run.get_args_parser()
    parser.prog, parser.usage, parser.allow_abbrev = "launch.py", "launch.py [options] [SCRIPT [ARGS ...]]", False
    parser.formatter_class, parser.description = argparse.RawDescriptionHelpFormatter, __doc__
    parser.epilog = "Options of launch.py stand before SCRIPT; everything behind SCRIPT is the script's own."
    for action in parser._actions:  # there is no public way to make it optional
        if action.dest == "training_script":
            action.nargs, action.required, action.metavar = "?", False, "SCRIPT"
    for name in ("nnodes", "nproc_per_node", "node_rank", "master_addr", "tee"):  # None: not given; PET_...: as PyTorch
        parser.set_defaults(**{name: os.environ.get(f"PET_{name.upper()}")})
    parser.add_argument("--zero_stage", type=int, choices=range(4), metavar="{0,1,2,3}",
                        help="the example's ZeRO stage: of what each process keeps a shard only")
    parser.add_argument("--as_deepspeed", action="store_true",
                        help="let SCRIPT's import deepspeed find engine.py, so that it runs as it is")
    theirs = parser.add_argument_group("DeepSpeed's options")
    theirs.add_argument("--num_gpus", "--num_accelerators", dest="nproc_per_node", help="as --nproc_per_node")
    theirs.add_argument("--num_nodes", dest="nnodes", help="as --nnodes")
    theirs.add_argument("--no_ssh", "--no_ssh_check", "--no_local_rank", action="store_true", help="always so here")
    for names, way in REFUSED.items():
        theirs.add_argument(*names, action=Refused, nargs="*", help=way)
    return parser


def settle(options: argparse.Namespace) -> None:
    """Check the options of a launch, and fill in what they leave open; ValueError says what is wrong."""
    options.nnodes = options.nnodes or "1"
    options.nproc_per_node = options.nproc_per_node or str(max(1, torch.cuda.device_count()))
    if run.determine_local_world_size(options.nproc_per_node) < 1:
        raise ValueError(f"--nproc_per_node is {options.nproc_per_node}; allowed: a whole number from 1 up, or auto")
    if options.tee is None:
        # Stderr to files and the screen, unless told where to; "1" is stdout's.
        options.tee = "2" if options.redirects in ("0", "1") else "0"
    set_rendezvous(options)


def main(argv: list[str] | None = None) -> int:
    """The command line; see the top of this file. Returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
    script, stage = options.training_script, options.zero_stage
    if script and stage is not None:
        parser.error(f"--zero_stage changes the example's config; give {script} its own")
    if script and not (options.module or options.no_python or Path(script).is_file()):
        parser.error(f"there is no script {script!r}")
    if options.as_deepspeed:
        if not script:
            parser.error("--as_deepspeed is for a SCRIPT that imports deepspeed")
        folder = Path(script).resolve().parent
        clash = [f"{name}.py" for name in ("amp", "checkpointing", "engine", "schedulers", "zero")
                 if (folder / f"{name}.py").exists() and folder != Path(__file__).resolve().parent]
        if clash:
            parser.error(f"{folder} has {', '.join(clash)}, and --as_deepspeed imports a file of that name from here; "
                         "rename yours")
    if script or options.nproc_per_node or options.nnodes:
        if not script:
            options.training_script, options.training_script_args = __file__, [f"--zero_stage={stage or 0}"]
        try:
            settle(options)
        except ValueError as error:
            parser.error(str(error))
        return start_processes(options)
    try:
        documented_example(stage or 0)
    except ValueError as error:  # what the user gave; anything else is worth its traceback
        if os.environ.get("RANK", "0") == "0":
            print(f"launch.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
