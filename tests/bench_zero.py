"""What ZeRO costs: a training step at each stage beside PyTorch's own ways to train one model on several processes.

    .venv/bin/python tests/bench_zero.py                                        2 processes on 2 CPU cores, some minutes
    .venv/bin/python tests/bench_zero.py --contenders ddp ours0 ours1 --rounds 5
    .venv/bin/python tests/bench_zero.py --nproc 1 --contenders none ours0      the engine beside a hand-written loop
    .venv/bin/python tests/bench_zero.py --device cuda --nproc 8 --precision bf16 --dim 2048 --layers 24 --batch 4
    .venv/bin/python tests/bench_zero.py --rounds 1 --steps 3 --dim 64 --layers 2      does it run at all: a minute

All train the GPT of ``tutorials/train_gpt.py`` (25 M parameters by default) from the same weights, a rank always on the
same batches, with fused AdamW, the gradient clipped to norm 1, and one CPU thread per process:

    none     each process by itself, nothing is communicated: the floor, and no training of one model
    ddp      DistributedDataParallel, whose gradients are views into its buckets
    zero1    ZeroRedundancyOptimizer on top of that: optimizer state sharded
    fsdp2    fully_shard on every block and on the whole: parameters, gradients and optimizer state sharded
    ours0-3  ``engine.initialize()`` with zero_optimization.stage 0 to 3 and no other setting

Every run is new processes; a round runs every contender once, and every second round in the opposite order, so that
whatever else the machine does hits all. Except for ``none`` the losses of all steps must agree, or nothing is compared.

The table: *step* is the median over the rounds of each round's median step, and the ratios are ratios of these.
*Memory* is that of the worst rank and round: on the CPU by how much a process at most grew once it had its model (VmHWM
at the end less VmRSS before the contender was set up, so this needs Linux), on CUDA the allocator's peak over the
training steps. *Loss* is that of the last step. In bf16 the floor, ddp and zero1 use autocast, fsdp2 a
MixedPrecisionPolicy with sums in fp32, and ours the config's bf16 section.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo  # noqa: F401  optimizers load it at first use; loaded here, it is not taken for their memory
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]
import engine as deepspeed  # noqa: E402
import train_gpt  # noqa: E402

CONTENDERS = ("none", "ddp", "zero1", "fsdp2", "ours0", "ours1", "ours2", "ours3")
ADAM = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
CLIPPING = 1.0
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # how far apart losses may be


# --- In the processes of one contender --------------------------------------------------------------------------------


class Trainer(NamedTuple):
    """A model that is set up to be trained."""
    forward: Callable[[Tensor], Tensor]  # ids, (batch, context) int64, to logits, (batch, context, 256)
    learn: Callable[[Tensor], None]      # from the loss to new weights


def peer(name: str, model: train_gpt.GPT, options: argparse.Namespace) -> Trainer:
    """The floor or one of PyTorch's own, in a hand-written loop."""
    trained: nn.Module = model
    if name == "fsdp2":
        shard(model, options)
    elif name != "none":
        trained = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = (ZeroRedundancyOptimizer(trained.parameters(), torch.optim.AdamW, fused=True, **ADAM)
                 if name == "zero1" else torch.optim.AdamW(trained.parameters(), fused=True, **ADAM))
    uses_autocast = options.precision == "bf16" and name != "fsdp2"

    def forward(ids: Tensor) -> Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=uses_autocast):
            return trained(ids)

    def learn(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()

    return Trainer(forward, learn)


def shard(model: train_gpt.GPT, options: argparse.Namespace) -> None:
    """FSDP2, in place: a unit per block, and one of what is left."""
    mesh = init_device_mesh(options.device, (dist.get_world_size(),))
    policy = (MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
              if options.precision == "bf16" else MixedPrecisionPolicy())
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def ours(name: str, model: train_gpt.GPT, options: argparse.Namespace) -> Trainer:
    """The engine; the name ends in the stage."""
    config = {"train_micro_batch_size_per_gpu": options.batch, "gradient_clipping": CLIPPING,
              "optimizer": {"type": "AdamW", "params": ADAM}, "zero_optimization": {"stage": int(name[-1])}}
    if options.precision == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, config=config)

    def learn(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return Trainer(engine, learn)


def train(trainer: Trainer, device: torch.device, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds and loss, the mean over ranks, of every step. A step ends when that loss is there: all wait for it."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (options.warmup + options.steps, options.batch, options.context + 1)
    text = torch.randint(8, shape, generator=generator).to(device)  # 8 kinds of byte: the loss falls fast towards ln 8
    times, losses = [], []
    began = time.perf_counter()
    for batch in text:
        logits = trainer.forward(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        trainer.learn(loss)
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
        now = time.perf_counter()
        times.append(now - began)
        began = now
    return times, losses


def memory_kib(key: str) -> int:
    """A line of Linux's account of this process: VmRSS, what it holds in memory, or VmHWM, the most it ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measure(name: str, options: argparse.Namespace) -> None:
    """Train as the contender ``name`` in a process that the launcher started; rank 0 prints a Run as JSON."""
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    model = train_gpt.GPT(options.dim, options.layers, options.heads, options.context).to(device)
    parameters = sum(p.numel() for p in model.parameters())

    held = memory_kib("VmRSS")
    trainer = (ours if name.startswith("ours") else peer)(name, model, options)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, losses = train(trainer, device, options)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else (memory_kib("VmHWM") - held) / 2**10

    worst = torch.tensor(peak, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    run = Run(parameters, statistics.median(times[options.warmup:]), worst.item(), losses)
    if dist.get_rank() == 0:
        print(json.dumps(run._asdict()), flush=True)
    # No orderly end: gloo's threads may still need Python's lock to let go of the last tensors, and where DDP or an
    # engine keeps the process group alive, PyTorch 2.13 then now and again hangs (DDP) or aborts (others).
    os._exit(0)


# --- In the process that compares -------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What one run of one contender gave."""
    parameters: int
    step_s: float         # the median step, in seconds
    memory_mib: float     # of the worst rank; see the top of this file
    losses: list[float]   # of every step, those that warm up included


def start(name: str, options: argparse.Namespace) -> Run:
    """Run the contender ``name`` on processes of its own, with this command line's options."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.nproc),
              "--"]  # what follows is not the launcher's: it would take our --nproc for an abbreviation of its own
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, *launch, __file__, *sys.argv[1:], "--worker", name], env=environment,
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def check_losses(runs: dict[str, Run], tolerance: float) -> None:
    """All but the floor must have trained the same model; a loss that is not a number agrees with none."""
    names = [name for name in runs if name != "none"]
    for step, losses in enumerate(zip(*(runs[name].losses for name in names)), 1):
        if not all(abs(loss - losses[0]) <= tolerance for loss in losses):
            told = ", ".join(f"{name} {loss:.5f}" for name, loss in zip(names, losses))
            raise SystemExit(f"step {step}: losses more than {tolerance} apart, so this compares nothing: {told}")


def print_table(rounds: list[dict[str, Run]], options: argparse.Namespace) -> None:
    """A row per contender; a ratio to one that did not run is a dash."""
    steps = {name: statistics.median(runs[name].step_s for runs in rounds) for name in options.contenders}
    parameters = rounds[-1][options.contenders[0]].parameters
    print(f"{parameters / 1e6:.2f} M parameters, {options.nproc} processes, {options.device}, {options.precision}, "
          f"{options.batch} x {options.context} bytes per process and step, {options.rounds} x {options.steps} steps")
    print(f"{'contender':10}{'step ms':>10}{'/ ddp':>8}{'/ none':>8}{'memory MiB':>12}{'loss':>9}")
    for name, step in steps.items():
        ratios = "".join(f"{step / steps[to]:8.2f}" if to in steps else f"{'-':>8}" for to in ("ddp", "none"))
        memory = max(runs[name].memory_mib for runs in rounds)
        print(f"{name:10}{1e3 * step:10.1f}{ratios}{memory:12.0f}{rounds[-1][name].losses[-1]:9.4f}")


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_options() -> argparse.Namespace:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="ZeRO's stages beside PyTorch's own: step time and memory.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="what to compare")
    parser.add_argument("--nproc", type=positive, default=2, help="processes per contender; on CUDA with a GPU each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=positive, default=3, help="runs of every contender")
    parser.add_argument("--steps", type=positive, default=8, help="steps that are timed in each run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--batch", type=positive, default=1, help="stretches of text per process and step")
    parser.add_argument("--context", type=positive, default=64, help="bytes per stretch of text")
    parser.add_argument("--dim", type=positive, default=512, help="width of the model")
    parser.add_argument("--layers", type=positive, default=8, help="blocks of the model")
    parser.add_argument("--heads", type=positive, default=8, help="attention heads per block; must divide --dim")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)  # for the processes that start() starts
    options = parser.parse_args()
    if options.dim % options.heads:
        parser.error(f"--heads {options.heads} does not divide --dim {options.dim}")
    if options.device == "cuda" and options.nproc > torch.cuda.device_count():
        parser.error(f"--nproc {options.nproc} needs as many GPUs; this machine has {torch.cuda.device_count()}")
    return options


def main() -> None:
    """Run every contender in every round, check, and print; or, as one of the processes, train."""
    options = parse_options()
    if options.worker:
        measure(options.worker, options)
        return
    rounds = []
    for index in range(options.rounds):
        order = options.contenders[::1 if index % 2 == 0 else -1]
        runs = {name: start(name, options) for name in order}
        check_losses(runs, TOLERANCE[options.precision])
        rounds.append(runs)
    print_table(rounds, options)


if __name__ == "__main__":
    main()
