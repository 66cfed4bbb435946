"""Run the documented example, or start any script on several processes.

    python launch.py                                      the documented DeepSpeed example, in this process
    python launch.py --nproc_per_node 2                   the same on 2 processes, each with its share of the batch
    python launch.py --nproc_per_node 2 train.py --steps 100    your script and its own arguments, on 2 processes
    torchrun --nproc_per_node 2 launch.py                 what the second line does, through PyTorch's own command

Processes are started by PyTorch's launcher (torch.distributed.run), which tells each one its rank. A failed run ends
with a non-zero exit code.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn, optim

import engine as deepspeed


class SimpleModel(nn.Module):
    """The document's model: one layer, (batch, 10) to (batch, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def documented_example(zero_stage: int | None = None, config_file: str | None = None) -> None:
    """DeepSpeed's documented example. What is ours, beside the printing, is marked so."""
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
    if zero_stage is not None:  # ours: the command line's changes
        ds_config["zero_optimization"] = {"stage": zero_stage}
    if config_file is not None:
        ds_config = config_file

    model_engine, optimizer, _, lr_scheduler = deepspeed.initialize(
        model=model, optimizer=optimizer, config_params=ds_config)

    if lr_scheduler is None or model_engine.train_batch_size() != 8:  # ours: for configs from the command line
        raise ValueError("the example needs a config with a scheduler section and a train_batch_size of 8")

    inputs = torch.randn(8, 10)
    inputs = inputs[model_engine.global_rank::model_engine.world_size]  # ours: this rank's share; alone, all of it
    outputs = model_engine(inputs)
    loss = outputs.mean()

    model_engine.backward(loss)
    # Two steps of the schedule in one of training: the engine's step() takes one, as DeepSpeed's does, and then the
    # document takes another. Its 0.0023 is the rate after both, 0.001 + 0.009 * log(2) / log(100): a schedule's first
    # value holds for two steps, so after one alone the rate would still be 0.001.
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


def start_processes(processes: int, script: str, arguments: list[str]) -> int:
    """Run ``script`` on ``processes`` processes of this machine; returns 0, or the first failed one's exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # PyTorch would give each process one thread, so that they don't crowd each other; an equal share does as well.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    try:
        # "--": or the launcher takes an option of the script's, such as --nproc, for a short form of its own.
        run.main(["--standalone", "--nproc_per_node", str(processes), "--", script, *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"launch.py: error: {script} failed on rank {rank} with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if 0 < failure.exitcode < 256 else 1  # killed by a signal: negative
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; see the top of this file. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="launch.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="Options of launch.py stand before SCRIPT; everything behind SCRIPT is the script's own.")
    parser.add_argument("--nproc_per_node", type=int, metavar="N",
                        help="processes to start on this machine (default: none, run the example in this one)")
    parser.add_argument("--zero_stage", type=int, choices=range(4), metavar="{0,1,2,3}",
                        help="the example's ZeRO stage: what its processes share out instead of each holding all")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="a JSON config to use in place of the example's")
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help="a Python script to start (default: the example)")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="the script's own arguments")
    options = parser.parse_args(argv)
    example = [f"--{name}={value}" for name, value in (
        ("zero_stage", options.zero_stage), ("deepspeed_config", options.deepspeed_config)) if value is not None]

    if options.nproc_per_node is not None and options.nproc_per_node < 1:
        parser.error(f"--nproc_per_node is {options.nproc_per_node}; allowed: a whole number from 1 up")
    if len(example) == 2:
        parser.error(f"--zero_stage changes the example's own config; with --deepspeed_config, put the stage into "
                     f"{options.deepspeed_config}")
    if options.script and example:
        parser.error(f"{example[0].split('=')[0]} changes the example's config; give {options.script} its own")
    if options.script and not Path(options.script).is_file():
        parser.error(f"there is no script {options.script!r}")
    if options.nproc_per_node or options.script:
        script, arguments = (options.script, options.arguments) if options.script else (__file__, example)
        return start_processes(options.nproc_per_node or 1, script, arguments)
    try:
        documented_example(options.zero_stage, options.deepspeed_config)
    except ValueError as error:  # what the user gave; anything else is worth its traceback
        if os.environ.get("RANK", "0") == "0":
            print(f"launch.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
