"""Run the documented example, or start any script on several processes and machines.

    python launch.py                                      the documented DeepSpeed example, in this process
    python launch.py --nproc_per_node 2                   the same on 2 processes, each with its share of the batch
    python launch.py --nproc_per_node 2 train.py --steps 100    your script and its own arguments, on 2 processes
    python launch.py --as_deepspeed --nproc_per_node 2 train.py    a script with "import deepspeed", unchanged
    torchrun --nproc_per_node 2 launch.py                 the same as the second line, with PyTorch's own command

On two machines, run the same command on each, except for --node_rank. Both must reach node 0 at the given address:

    python launch.py --nnodes 2 --node_rank 0 --rdzv_endpoint 10.0.0.1:29500 --nproc_per_node 4 train.py
    python launch.py --nnodes 2 --node_rank 1 --rdzv_endpoint 10.0.0.1:29500 --nproc_per_node 4 train.py

PyTorch's launcher (torch.distributed.run, "torchrun") starts the processes, and all of its options are accepted. In
addition:

- When a process fails, all are stopped. The last lines on the screen are the stderr of the process that failed first.
  The exit code is that process's own, or 128 + N where signal N ended it (137: SIGKILL). For this, stderr goes through
  a file, and each line begins with the rank (--tee 2); --tee 0 switches both off.
- With --max_restarts M, all processes start again, up to M times; the script must resume from its last checkpoint.
  With --nnodes MIN:MAX training continues on the remaining machines, if node 0 is one of them. With PyTorch's settings
  that takes 45 seconds (--rdzv_conf keep_alive_interval=5,keep_alive_max_attempt=3,last_call_timeout=30). With either
  option, ranks may change at each start; without, they follow --node_rank.
- When a connection is cut, collectives time out; this ends each process, and then its launcher. But with --max_restarts
  or MIN:MAX, a launcher that has lost node 0 may wait a quarter of an hour, until Linux gives up the connection.
- On Linux, gloo uses the network interface that leads to the other machines. To choose another, set GLOO_SOCKET_IFNAME.
- DeepSpeed's launcher options work as they do there, or are refused with another way to do it. Nothing is started on
  other machines, so there is no --hostfile.

A script reads its rank from the variables RANK, LOCAL_RANK and WORLD_SIZE. With --as_deepspeed it also gets
--local_rank, if its own text has this option. Without --nproc_per_node, SCRIPT gets one process per GPU, or one in all
without GPUs.
"""

import argparse
import os
import re
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.machinery import PathFinder
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

PORT = 29500  # node 0's, if the command line names none: as in PyTorch and DeepSpeed
LAST_LINES = 60  # shown of a failed process's stderr: a traceback through a model and the engine fits


# --- The documented example -------------------------------------------------------------------------------------------


class SimpleModel(nn.Module):
    """The example's model: one layer, (batch, 10) to (batch, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def documented_example(zero_stage: int = 0) -> None:
    """The example of the introduction named in tutorials/README.md. Our additions, except for printing, say "ours"."""
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
    inputs = inputs[model_engine.global_rank::model_engine.world_size]  # ours: this rank's share; with one rank, all
    outputs = model_engine(inputs)
    loss = outputs.mean()

    model_engine.backward(loss)
    # One training step, two schedule steps: the engine's step() takes one, as DeepSpeed's does, and then the example
    # takes another. Its 0.0023 is the rate after both, 0.001 + 0.009 * log(2) / log(100). A schedule's first value
    # applies for two steps, so after one step the rate would still be 0.001.
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
    """Set the options that PyTorch's launcher needs; ValueError where options are missing or contradict each other.

    Where machines and processes are fixed, they meet once, and node 0 is known ("static"). Where processes may restart
    or machines may be missing, they meet before each start, through a store on node 0 ("c10d").
    """
    fewest, most = run.parse_min_max_nnodes(options.nnodes)
    endpoint = options.rdzv_endpoint or options.master_addr or ("127.0.0.1" if options.master_port else "")
    for is_wrong, told in (
            (not 1 <= fewest <= most or options.max_restarts < 0,
             f", --max_restarts {options.max_restarts}; allowed: N or MIN:MAX from 1 up for the first, a number from 0 "
             "up for the second"),
            (most > 1 and (options.standalone or not endpoint),
             ": several machines need --rdzv_endpoint HOST:PORT, the address of node 0, and no --standalone"),
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
        options.rdzv_backend, endpoint = "c10d", "127.0.0.1:0"  # 0: any free port
    options.rdzv_endpoint = endpoint if ":" in endpoint else f"{endpoint}:{options.master_port or PORT}"
    if options.rdzv_backend == "static" and (fewest < most or options.max_restarts):
        options.rdzv_backend = "c10d"
    if options.rdzv_backend == "c10d" and options.node_rank is not None and "is_host" not in options.rdzv_conf:
        options.rdzv_conf += f"{options.rdzv_conf and ','}is_host={int(options.node_rank == 0)}"
    if options.rdzv_backend != "static" or options.node_rank is None:
        options.node_rank = 0  # PyTorch no longer uses it
    set_addresses(options, most)


def set_addresses(options: argparse.Namespace, most: int) -> None:
    """Give PyTorch the address by which node 0 reaches this machine, and gloo the network interface of this address.

    Otherwise both use the machine's own name, which often stands for an address that only this machine can reach.
    """
    host, _, port = options.rdzv_endpoint.rpartition(":")
    try:
        port = PORT if port == "0" else port  # any port will do, except 0: macOS and Windows refuse to connect to it
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket chooses its route and sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"there is no way to node 0 at {options.rdzv_endpoint}: {error.strerror}") from error
    options.local_addr = options.local_addr or own
    if most > 1 and sys.platform == "linux":
        for _, name in socket.if_nameindex():
            if address_of(name) == own:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface, or "" if it has none; Linux only."""
    from fcntl import ioctl

    get_address = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        return socket.inet_ntoa(ioctl(probe, get_address, struct.pack("256s", interface.encode()))[20:24])
    return ""


# --- Running, and reporting failures ----------------------------------------------------------------------------------


def join_with_new_store(handler: DynamicRendezvousHandler,
                        join: Callable = DynamicRendezvousHandler.next_rendezvous) -> RendezvousInfo:
    """PyTorch's ``next_rendezvous``, but rank 0's launcher makes a new store for the processes at each start.

    In the old store a restart would find the addresses of the previous start, and would fail to connect to them.
    """
    is_restart = handler._bootstrap_store_info is not None
    handler._bootstrap_store_info = handler._shared_tcp_store_server = None
    joined = join(handler)
    if is_restart:
        print(f"launch.py: starting again, on {joined.world_size} machine(s)", file=sys.stderr, flush=True)
    return joined


def stderr_of(failure: ProcessFailure, run_dir: str) -> Path:
    """The file with the stderr of a process in the latest start, by PyTorch's names; the null device if none exists."""
    files = Path(run_dir).glob(f"attempt_*/{failure.local_rank}/stderr.log")
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=Path(os.devnull))


def report_failure(error: ChildFailedError, script: str, run_dir: str) -> int:
    """Report which process failed first, and the end of its stderr, if a file has it; returns the exit code."""
    # The others failed later, because it did, or the launcher stopped them: with SIGTERM, and those that ignore it with
    # SIGKILL 30 seconds later. PyTorch's times are whole seconds, so the files' times decide. The first process wrote
    # its last line before its end; a process that fails because of it writes after that. (Files are stamped by a clock
    # that ticks every few milliseconds; a process that has loaded PyTorch takes longer to end.)
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
        words.append("launch.py: hint: Linux kills a process in this way when memory runs out (see dmesg). Smaller "
                     "micro-batches, a higher ZeRO stage or fewer processes per machine take less memory")
    words += files[rank].read_text(errors="replace").splitlines()[-LAST_LINES:]
    print("\n".join(words), file=sys.stderr, flush=True)
    return code


def takes_local_rank(script: str) -> bool:
    """Whether a script, or the module of --module, has the option that DeepSpeed's launcher gives to all."""
    files = [path for path in (Path(script), Path(*script.split(".")).with_suffix(".py")) if path.is_file()]
    return any(re.search(r"""["']--local_rank["']""", path.read_text(errors="replace")) for path in files)


def start_processes(options: argparse.Namespace) -> int:
    """Run the script on this machine's processes; returns the exit code that the top of this file describes."""
    # PyTorch would give each process one thread, so that they don't slow each other down; equal shares do so as well.
    processes = run.determine_local_world_size(options.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank${rank}]: ")  # of the lines that tee shows
    tail_log.open = partial(open, newline="\n")  # else each "\r" of a progress bar would become a new line
    with tempfile.TemporaryDirectory(prefix="launch_") as folder:
        if options.as_deepspeed:
            deepspeed.as_deepspeed()
            if not options.no_local_rank and takes_local_rank(options.training_script):
                options.training_script_args.insert(0, "--local_rank=${local_rank}")  # PyTorch fills it in
        options.log_dir = options.log_dir or folder
        config, command, arguments = run.config_from_args(options)
        DynamicRendezvousHandler.next_rendezvous = join_with_new_store
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as error:
            # Private: this launcher's folder in --log_dir, which other jobs and machines may use too.
            run_dir = getattr(config.logs_specs, "_run_log_dir", None) or folder
            return report_failure(error, options.training_script, run_dir)
        except SignalException as error:
            print(f"launch.py: stopped by {error.sigval.name}", file=sys.stderr)
            return 128 + error.sigval
        except (RendezvousError, dist.DistError) as error:
            print(f"launch.py: error: the other machines can't be reached through {options.rdzv_endpoint}, or have "
                  f"stopped: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
    return 0


# --- The command line -------------------------------------------------------------------------------------------------


REFUSED = {  # DeepSpeed's options without a counterpart, and what to do instead
    ("-H", "--hostfile"):
        "nothing is started on other machines; run launch.py on each, with --nnodes, --node_rank and --rdzv_endpoint",
    ("-i", "--include", "-e", "--exclude"):
        "run launch.py on the machines that you want; set CUDA_VISIBLE_DEVICES=0,2 for GPUs 0 and 2 of a machine",
    ("--launcher", "--launcher_args", "--ssh_port", "--force_multi"):
        "nothing is started on other machines; have srun, mpirun or a shell loop run launch.py on each",
    ("--bind_cores_to_rank", "--bind_core_list"):
        "--numa_binding does it on machines with GPUs; elsewhere put taskset --cpu-list LIST before the command",
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
    """PyTorch's command line, plus the example's options and DeepSpeed's."""
    parser = run.get_args_parser()
    parser.prog, parser.usage, parser.allow_abbrev = "launch.py", "launch.py [options] [SCRIPT [ARGS ...]]", False
    parser.formatter_class, parser.description = argparse.RawDescriptionHelpFormatter, __doc__
    parser.epilog = "Options of launch.py stand before SCRIPT; everything after SCRIPT goes to the script."
    for action in parser._actions:  # there is no public way to make it optional
        if action.dest == "training_script":
            action.nargs, action.required, action.metavar = "?", False, "SCRIPT"
    for name in ("nnodes", "nproc_per_node", "node_rank", "master_addr", "tee"):  # None: not given; PET_...: as PyTorch
        parser.set_defaults(**{name: os.environ.get(f"PET_{name.upper()}")})
    parser.add_argument("--zero_stage", type=int, choices=range(4), metavar="{0,1,2,3}",
                        help="the example's ZeRO stage: 1 shards optimizer state, 2 gradients too, 3 parameters too")
    parser.add_argument("--as_deepspeed", action="store_true",
                        help="let SCRIPT's import deepspeed find engine.py, so that it runs unchanged")
    theirs = parser.add_argument_group("DeepSpeed's options")
    theirs.add_argument("--num_gpus", "--num_accelerators", dest="nproc_per_node", help="as --nproc_per_node")
    theirs.add_argument("--num_nodes", dest="nnodes", help="as --nnodes")
    theirs.add_argument("--no_ssh", "--no_ssh_check", action="store_true", help="always so here")
    theirs.add_argument("--no_local_rank", action="store_true", help="with --as_deepspeed: pass no --local_rank")
    for names, way in REFUSED.items():
        theirs.add_argument(*names, action=Refused, nargs="*", help=way)
    return parser


def settle(options: argparse.Namespace) -> None:
    """Check the options of a launch, and fill in missing ones; ValueError says what is wrong."""
    options.nnodes = options.nnodes or "1"
    options.nproc_per_node = options.nproc_per_node or str(max(1, torch.cuda.device_count()))
    if run.determine_local_world_size(options.nproc_per_node) < 1:
        raise ValueError(f"--nproc_per_node is {options.nproc_per_node}; allowed: a whole number from 1 up, or auto")
    if options.tee is None:
        # Stderr goes to files and the screen, unless --redirects sends it elsewhere; "1" stands for stdout.
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
        here, folder = Path(__file__).resolve().parent, Path(script).resolve().parent
        found = [PathFinder.find_spec(name, [str(folder)]) for name in (
            "amp", "checkpointing", "engine", "schedulers", "zero")]
        if folder != here and any(found):
            names = ", ".join(spec.name for spec in found if spec)
            parser.error(f"{folder} has a module named {names}, and --as_deepspeed imports one of that name from "
                         f"{here}; rename yours")
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
    except ValueError as error:  # the user's input is wrong; any other error shows its traceback
        if os.environ.get("RANK", "0") == "0":
            print(f"launch.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
