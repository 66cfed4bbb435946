"""What training takes: no more after many steps than after a few.

    .venv/bin/python -m pytest -q tests/test_memory.py
"""

import ctypes
import gc
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import engine as deepspeed
from conftest import memory


def grown(stage: int, checkpointed: bool) -> Counter:
    """Python objects that 25 steps leave behind, with a forward pass that is not followed by backward in each."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4)))
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage}, **({"activation_checkpointing": {}} if checkpointed else {})})

    def run(steps: int) -> Counter:
        for _ in range(steps):
            engine(torch.randn(2, 8, requires_grad=True))
            engine.backward(engine(torch.randn(2, 8)).exp().mean())
            engine.step()
        gc.collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects())

    run(4)
    before = run(1)
    return run(25) - before


def test_steps_leave_nothing_behind(run_ranks):
    for stage in (0, 2, 3):
        for rank, left in enumerate(run_ranks(grown, 2, stage, stage == 2)):
            assert left.total() < 25, f"stage {stage}, rank {rank}: left after 25 steps: {left.most_common(5)}"


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def peaks(stage: int, steps: tuple[int, ...], exact: bool) -> list[int]:
    """The most bytes that this process has had until each of ``steps``; ``exact``: what is freed goes back at once."""
    def width(k: int) -> int:
        return 256 + 64 * (k % 3)

    if exact:
        assert ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD of <malloc.h>: no hole stays
    model = nn.Sequential(*(nn.Linear(width(k - 1), width(k + 1)) if k % 2 else Block(width(k)) for k in range(12)))
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 300000}})
    found = []
    for step in range(1, steps[-1] + 1):
        engine.backward(engine(torch.randn(4, 256)).square().mean())
        engine.step()
        if step in steps:
            found.append(memory("VmHWM"))
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory with Linux's /proc")
@pytest.mark.parametrize("stage", [2, 3])
def test_the_peak_does_not_grow_with_the_steps(run_ranks, stage, request):
    """What is in use: at most 0.5 %. With the holes between it, which grow until the allocator has settled: 2 %."""
    is_long = request.config.getoption("--long")
    if stage == 2 and not is_long:
        pytest.skip("only with --long")
    for exact, steps, most in (True, (2, 50 if is_long else 12), 1.005), (False, (10, 50 if is_long else 30), 1.02):
        run_ranks.stop()  # new processes, in which no other test has had its peak
        for rank, (early, late) in enumerate(run_ranks(peaks, 2, stage, steps, exact)):
            assert late <= most * early, f"stage {stage}, rank {rank}, exact {exact}: {early / 2**20:.1f} MiB after " \
                f"{steps[0]} steps grew to {late / 2**20:.1f} after {steps[1]}"
    run_ranks.stop()
