"""What it costs: a training step with ZeRO, recomputation, saving and loading, each compared with PyTorch's own.

    .venv/bin/python tests/bench.py zero                                        2 processes on 2 CPU cores, some minutes
    .venv/bin/python tests/bench.py zero --contenders ddp ours0 ours1 --rounds 5
    .venv/bin/python tests/bench.py zero --nproc 1 --contenders none ours0      the engine and a hand-written loop
    .venv/bin/python tests/bench.py zero --device cuda --nproc 8 --precision bf16 --dim 2048 --layers 24 --batch 4
    .venv/bin/python tests/bench.py zero --rounds 1 --steps 3 --dim 64 --layers 2      does it run at all: a minute
    .venv/bin/python tests/bench.py checkpointing --rounds 30
    .venv/bin/torchrun --nproc_per_node 2 tests/bench.py resume                 33 M parameters, each rank its share
    .venv/bin/torchrun --nproc_per_node 2 tests/bench.py resume --rounds 9 --dir /some/disk

Contenders take turns at going first, so that whatever else the machine does hits all.

zero: all train the GPT of ``tutorials/train_gpt.py`` (25 M parameters by default) from the same weights, a rank always
on the same batches, with fused AdamW, the gradient clipped to norm 1, and one CPU thread per process:

    none     each process by itself, nothing is communicated: the floor, and no training of one model
    ddp      DistributedDataParallel, whose gradients are views into its buckets
    zero1    ZeroRedundancyOptimizer on top of that: optimizer state sharded
    fsdp2    fully_shard on every block and on the whole: parameters, gradients and optimizer state sharded
    ours0-3  ``engine.initialize()`` with zero_optimization.stage 0 to 3 and no other setting

Every run is new processes; a round runs every contender once. Except for ``none`` the losses of all steps must agree,
or nothing is compared. *Step* is the median over the rounds of each round's median step, and the ratios are ratios of
these. *Memory* is that of the worst rank and round: on the CPU by how much a process at most grew once it had its model
(VmHWM at the end less VmRSS before the contender was set up, so this needs Linux), on CUDA the allocator's peak over
the training steps. *Loss* is that of the last step. In bf16 the floor, ddp and zero1 use autocast, fsdp2 a
MixedPrecisionPolicy with sums in fp32, and ours the config's bf16 section.

checkpointing: each row is a choice of regions in a stack of transformer blocks, made here and with
``torch.utils.checkpoint``: the median milliseconds of both, the median of the rounds' ratios (ours to PyTorch's), and
the peak memory of what a step allocates. Runs on the GPU if there is one.

resume: a round saves and loads once each way; the medians over the rounds are printed. Both sync their file to the disk
before they count as saved; plain PyTorch writes one file per rank, with no index, no checksum and nothing renamed. At
last, what an asynchronous save adds to the time until ``save_checkpoint`` returns, compared with its copy.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
from torch.utils import checkpoint as theirs

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials"), str(ROOT / "tests")]
import checkpointing  # noqa: E402
import engine as deepspeed  # noqa: E402
import train_gpt  # noqa: E402
import zero  # noqa: E402

CONTENDERS = ("none", "ddp", "zero1", "fsdp2", "ours0", "ours1", "ours2", "ours3")
ADAM = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
CLIPPING = 1.0
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # how far apart losses may be


# --- zero: in the processes of one contender --------------------------------------------------------------------------


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


# --- zero: in the process that compares -------------------------------------------------------------------------------


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


def bench_zero(options: argparse.Namespace) -> None:
    """Run every contender in every round, check, and print; or, as one of the processes, train."""
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


# --- checkpointing ----------------------------------------------------------------------------------------------------


KEPT_BY_THEIRS = list(checkpointing.EXPENSIVE)
CHOICES = {"every block": {}, "2 blocks": {"region": 2}, "4 blocks": {"region": 4}, "selective": {"mode": "selective"},
           "selective, 2 blocks": {"region": 2, "mode": "selective"}}


def with_torch(blocks: nn.Sequential, region: int = 1, mode: str = "full") -> Callable[[Tensor], Tensor]:
    """A forward pass that recomputes by ``torch.utils.checkpoint``."""
    options = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(theirs.create_selective_checkpoint_contexts, KEPT_BY_THEIRS)

    def forward(x: Tensor) -> Tensor:
        for start in range(0, len(blocks), region):
            x = theirs.checkpoint(blocks[start:start + region], x, **options)
        return x

    return forward


def with_ours(blocks: nn.Sequential, region: int = 1, **config: str) -> Callable[[Tensor], Tensor]:
    """A forward pass that recomputes by ``checkpointing.apply``, or by ``checkpoint`` around several blocks."""
    if region == 1:
        checkpointing.apply(dict(blocks.named_children()), checkpointing.CheckpointingConfig(**config))
        return blocks
    checkpointing.configure(checkpointing.CheckpointingConfig(**config))

    def forward(x: Tensor) -> Tensor:
        for start in range(0, len(blocks), region):
            x = checkpointing.checkpoint(blocks[start:start + region], x)
        return x

    return forward


def seconds(forward: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The time of one step."""
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    began = time.perf_counter()
    forward(x).square().mean().backward()
    synchronize()
    return time.perf_counter() - began


def peak_mebibytes(forward: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The most memory held at one time by what one step allocates."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(forward, x)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    from test_checkpointing import PeakBytes
    with PeakBytes() as measured:
        seconds(forward, x)
    return measured.peak / 2**20


def compare(choice: dict, options: argparse.Namespace) -> tuple[float, float, float, list[float]]:
    """Median milliseconds of theirs and ours, the median ratio, and the peaks of neither, theirs and ours in MiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stacks = []
    for _ in range(3):
        torch.manual_seed(0)
        stacks.append(nn.Sequential(*[train_gpt.Block(options.dim, 4) for _ in range(options.layers)]).to(device))
    contenders = [with_torch(stacks[0], **choice), with_ours(stacks[1], **choice)]
    x = torch.randn(options.batch, options.context, options.dim, device=device)
    times: list[list[float]] = [[], []]
    for index in range(options.rounds + 2):
        for which in ((0, 1), (1, 0))[index % 2]:
            took = seconds(contenders[which], x)
            if index >= 2:  # after warming up
                times[which].append(took)
    for ours, reference in zip(stacks[1].parameters(), stacks[0].parameters()):
        if not torch.equal(ours.grad, reference.grad):
            raise SystemExit("the gradients differ, so this compares nothing")
    seconds(stacks[2], x)  # makes the gradients, as the others have
    peaks = [peak_mebibytes(forward, x) for forward in (stacks[2], *contenders)]
    ratio = statistics.median(b / a for a, b in zip(*times))
    return 1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1]), ratio, peaks


def bench_checkpointing(options: argparse.Namespace) -> None:
    """Print a row for each choice."""
    print(f"{'':20} {'step, ms':>25}   {'peak, MiB':>38}")
    print(f"{'regions':20} {'torch':>8} {'ours':>8} {'ratio':>7}   {'none':>9} {'torch':>9} {'ours':>9} {'ratio':>8}")
    for name, choice in CHOICES.items():
        torchs, ours, ratio, peaks = compare(choice, options)
        print(f"{name:20} {torchs:8.1f} {ours:8.1f} {ratio:7.3f}   {peaks[0]:9.2f} {peaks[1]:9.2f} {peaks[2]:9.2f} "
              f"{peaks[2] / peaks[1]:8.3f}", flush=True)


# --- resume -----------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], object], on_all: bool = True) -> float:
    """Seconds until ``call`` has returned, on every rank or on this one."""
    dist.barrier()
    began = time.perf_counter()
    call()
    if on_all:
        dist.barrier()
    return time.perf_counter() - began


def plain_save(tensors: list, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def bench_resume(options: argparse.Namespace) -> None:
    """Save and load in turn; rank 0 prints."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = train_gpt.GPT(options.dim, options.layers, 8, 64)
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "checkpoint": {"async": False}, "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}})
    ids = torch.randint(0, 256, (1, 65))
    engine.backward(engine(ids[:, :-1], ids[:, 1:]))
    engine.step()
    folder = Path(options.dir) / "bench_resume"
    plain = folder / f"plain_{engine.global_rank}.pt"
    shares = [tensor.clone() for *_, tensor in zero.shares(engine.zero)]
    times: dict[str, list[float]] = {name: [] for name in ("save", "load", "torch.save", "torch.load", "copy", "async")}
    for round_ in range(options.rounds):
        if engine.global_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        engine.config.checkpoint.async_ = False
        times["torch.save"].append(timed(lambda: plain_save(shares, plain)))
        times["save"].append(timed(lambda: engine.save_checkpoint(folder, "sync")))
        times["torch.load"].append(timed(lambda: [
            own.copy_(new) for own, new in zip(shares, torch.load(plain, weights_only=True))]))
        times["load"].append(timed(lambda: engine.load_checkpoint(folder, "sync")))
        times["copy"].append(timed(lambda: [tensor.clone() for *_, tensor in zero.shares(engine.zero)],
                                   on_all=False))
        engine.config.checkpoint.async_ = True
        times["async"].append(timed(lambda: engine.save_checkpoint(folder, "async"), on_all=False))
        engine.wait_for_save()
    if engine.global_rank == 0:
        count, size = sum(p.numel() for p in model.parameters()), sum(share.nbytes for share in shares)
        shutil.rmtree(folder)
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(f"{count / 1e6:.1f} M parameters, {engine.world_size} ranks, {size / 2**20:.0f} MiB per rank")
        for ours, theirs in (("save", "torch.save"), ("load", "torch.load"), ("async", "copy")):
            print(f"{ours:<6}{1e3 * medians[ours]:>9.1f} ms   {theirs:<12}{1e3 * medians[theirs]:>9.1f} ms   "
                  f"speed {medians[theirs] / medians[ours]:.2f}")
    engine.destroy()


# --- The command line -------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_options() -> argparse.Namespace:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="What this project costs, compared with PyTorch's own.")
    whats = parser.add_subparsers(dest="what", required=True)

    def of(what: str, **sizes: int) -> argparse.ArgumentParser:
        its = whats.add_parser(what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name, default in sizes.items():
            its.add_argument(f"--{name}", type=positive, default=default)
        return its

    its = of("zero", nproc=2, rounds=3, steps=8, batch=1, context=64, dim=512, layers=8, heads=8)
    its.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="what to compare")
    its.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    its.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    its.add_argument("--warmup", type=int, default=2, help="steps before those that are timed")
    its.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)  # for the processes that start() starts
    of("checkpointing", rounds=30, layers=8, dim=128, batch=4, context=128)
    its = of("resume", rounds=5, dim=576, layers=8)
    its.add_argument("--dir", default=tempfile.gettempdir(), help="where to write")
    options = parser.parse_args()
    if options.what == "zero" and options.dim % options.heads:
        parser.error(f"--heads {options.heads} does not divide --dim {options.dim}")
    if options.what == "zero" and options.device == "cuda" and options.nproc > torch.cuda.device_count():
        parser.error(f"--nproc {options.nproc} needs as many GPUs; this machine has {torch.cuda.device_count()}")
    return options


if __name__ == "__main__":
    chosen = parse_options()
    {"zero": bench_zero, "checkpointing": bench_checkpointing, "resume": bench_resume}[chosen.what](chosen)
