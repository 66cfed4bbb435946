"""What saving and loading cost, beside plain ``torch.save`` and ``torch.load`` of the same bytes per rank.

    .venv/bin/torchrun --nproc_per_node 2 tests/bench_resume.py                 33 M parameters, each rank its share
    .venv/bin/torchrun --nproc_per_node 2 tests/bench_resume.py --rounds 9 --dir /some/disk

A round saves and loads once each way, in turn; the medians over the rounds are printed. Both sync their file to the
disk before they count as saved; plain PyTorch writes one file per rank, with no index, no checksum and nothing renamed.
At last, what an asynchronous save adds to the time until ``save_checkpoint`` returns, beside the copy that it has to
make.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]
import engine as deepspeed  # noqa: E402
import train_gpt  # noqa: E402
import zero  # noqa: E402


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


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="Time save_checkpoint and load_checkpoint.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where to write")
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()
