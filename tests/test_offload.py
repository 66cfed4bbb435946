"""Offload to host memory and to files: the same numbers as without, and the memory really goes elsewhere.

    .venv/bin/python -m pytest -q tests/test_offload.py
    .venv/bin/python -m pytest -q tests/test_offload.py --long     with hundreds of drawn runs
"""

import ctypes
import os
import re
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import engine as deepspeed
import zero
from conftest import memory, on_ranks
from oracle import Mlp, Pair, assert_equal, draws, fitting, read_drawn, start, start_drawn, train_drawn

BF16 = {"bf16": {"enabled": True}, "communication_data_type": "bf16"}


def placed(offload: dict, folder: Path | str) -> dict:
    """The sections of ``offload``, each with a folder for files."""
    return {key: {**section, "nvme_path": str(folder)} for key, section in offload.items()}


def check_places(state: zero.Zero, offload: dict) -> None:
    """What the config sends to files is in files."""
    for bucket in state.buckets:
        if offload.get("offload_optimizer", {}).get("device") == "nvme" and bucket.host is not None:
            kept = [bucket.master] + [value for piece in bucket.pieces
                                      for value in state.optimizer.state[piece].values()
                                      if isinstance(value, torch.Tensor) and value.dim() and value.numel()]
            assert all(t.untyped_storage().filename for t in kept), f"{bucket.slots[0].name}: state is in memory"
        if offload.get("offload_param", {}).get("device") == "nvme" and bucket.unit is not None:
            assert bucket.shard.untyped_storage().filename, f"{bucket.slots[0].name}: the shard is in memory"


# --- The same numbers -------------------------------------------------------------------------------------------------


def same_with_and_without(draw: dict, stage: int, offload: dict, folder: Path) -> None:
    """Norms, weights and optimizer state, bit for bit; nothing is left in the folder."""
    results = []
    for sections in ({}, offload):
        engine = start_drawn(draw | {"offload": placed(sections, folder)}, stage)
        results.append((train_drawn(engine, draw, 3), *read_drawn(engine, draw)))
        check_places(engine.zero, sections)
        engine.destroy()
        assert not os.listdir(folder), f"left in the folder: {os.listdir(folder)}"
    # One process has units only with offloaded parameters; the norm is then added up unit by unit, in another order.
    regrouped = dist.get_world_size() == 1 and offload.get("offload_param", {"device": "none"})["device"] != "none"
    assert_equal(results[1], results[0], 2e-6 if regrouped else 0, f"{draw} with {offload}")


DEVICES = st.sampled_from(["nvme", "cpu", "none"])
OFFLOADS = st.tuples(st.sampled_from([3, 0, 1, 2, 3]), DEVICES, st.sampled_from([1.0, 0.5]), DEVICES)


@given(draws(), OFFLOADS, st.booleans(), st.sampled_from([2, 1, 3]))
@settings(max_examples=max(10, settings().max_examples // 3), phases=[Phase.generate])
def test_offload_changes_no_number(run_ranks, tmp_path_factory, draw, offload, bf16, ranks):
    stage, device, ratio, of_parameters = offload
    sections = {"offload_optimizer": {"device": device, "ratio": ratio}} | (
        {"offload_param": {"device": of_parameters}} if stage == 3 else {})
    draw |= {"dtype": torch.float32, "mixed": False, "more": BF16} if bf16 else {}
    run_ranks(same_with_and_without, ranks, fitting(draw, ranks), stage, sections, tmp_path_factory.mktemp("files"))


@on_ranks(2, stage=[1, 3])
def test_a_checkpoint_goes_from_offload_to_none_and_back(stage, tmp_path):
    """Two steps, save, two more; the same from the checkpoint with another offload, or none."""
    reference, scratch = None, tmp_path / f"scratch_{dist.get_rank()}"
    scratch.mkdir()
    for device in ("nvme", "none", "cpu"):
        offload = {"offload_optimizer": {"device": device}}
        pair = Pair(Mlp, stage, partial(torch.optim.AdamW, lr=0.01), zero_options=placed(offload, scratch))
        if reference:
            pair.engine.load_checkpoint(tmp_path / "saved")
        for step in range(2 if reference else 0, 4):
            pair.backward(step)
            pair.engine.step()
            if not reference:
                pair.plain(step)
            if not reference and step == 1:
                pair.engine.save_checkpoint(tmp_path / "saved")
        reference = reference or pair.reference
        pair.reference = reference
        pair.check(device)
        check_places(pair.engine.zero, offload)
        pair.engine.destroy()


# --- What is refused --------------------------------------------------------------------------------------------------


def refusal(section: dict, stage: int, free: int | None = None) -> str:
    """The error that initialize() gives on this rank; ``free`` is how much room the disk says it has."""
    room = shutil.disk_usage(".")
    with mock.patch.object(shutil, "disk_usage", lambda path: room if free is None else room._replace(free=free)):
        try:
            start(Mlp().float(), stage, None, section, optimizer={"type": "AdamW", "params": {"lr": 0.01}})
        except ValueError as error:
            return str(error)
    return "no error"


@on_ranks(2)
def test_a_folder_that_is_missing_or_full_is_refused_with_the_bytes_it_needs(tmp_path):
    count = sum(p.numel() for p in Mlp().parameters())
    place = {"device": "nvme", "nvme_path": "/no/such/folder"}
    for stage, needed in ((0, 12 * count), (2, 6 * count)):  # fp32 masters and Adam's two moments
        told = refusal({"offload_optimizer": place}, stage)
        assert "offload_optimizer.nvme_path is '/no/such/folder'" in told and f"{needed:,} bytes" in told, told
    place = {"device": "nvme", "nvme_path": str(tmp_path)}
    needed = 2 * (6 * count) + 2 * (2 * count)  # 2 ranks: each half of masters and moments, and of weights
    told = refusal({"offload_optimizer": place, "offload_param": place}, 3, needed - 1)
    assert f"{needed - 1:,} bytes" in told and f"{needed:,} for all ranks" in told, told
    assert refusal({"offload_optimizer": place, "offload_param": place}, 3, needed) == "no error"


# --- Memory -----------------------------------------------------------------------------------------------------------


@on_ranks(1)
def test_one_process_keeps_two_blocks_at_a_time_with_offloaded_parameters(tmp_path):
    pair = Pair(partial(Mlp, 8), 3, zero_options=placed({"offload_param": {"device": "nvme"}}, tmp_path))
    live = []

    def look(*_: object) -> None:
        live.append(sum(b.flat.untyped_storage().nbytes() for b in pair.engine.zero.buckets))

    look()
    pair.train(0)  # from now on the order of the blocks is known, and the next is gathered ahead
    for block in pair.model.blocks:
        block[0].register_forward_hook(look)
    pair.train(1)
    look()
    pair.check()
    block, *_ = {8 * unit.numel for unit in pair.engine.zero.units if unit.buckets}
    assert live[0] == live[-1] == 0 and max(live) == 2 * block, f"bytes of whole parameters: {live}"
    pair.engine.destroy()


def limited(device: str, folder: str) -> str:
    """Train with less memory than gradients and Adam's state take; what comes of it."""
    import resource  # not on Windows

    libc = ctypes.CDLL(None)  # holes that are free would count too: large tensors go back to the system
    assert libc.mallopt(-8, 1) and libc.mallopt(-3, 2**20)  # M_ARENA_MAX, M_MMAP_THRESHOLD of <malloc.h>
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))  # 96 MiB of fp32
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": device, "nvme_path": folder}}})
    # From here on it may have, beside files: its gradients (96 MiB) and some buffers, but no Adam (192 more).
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + 270 * 2**20, -1))
    try:
        for _ in range(3):
            engine.backward(engine(torch.ones(1, 1024)).square().mean())
            engine.step()
    except (RuntimeError, MemoryError) as error:
        return str(error) or type(error).__name__
    return f"trained {engine.global_steps}"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits memory by Linux's RLIMIT_DATA")
def test_state_larger_than_the_memory_limit_trains_from_files_and_not_without(fresh_ranks, tmp_path):
    """RLIMIT_DATA bounds what a process holds in memory of its own; pages of files are the system's to evict."""
    assert fresh_ranks(limited, 1, "nvme", str(tmp_path)) == ["trained 3"]
    fresh_ranks.stop()
    (without,) = fresh_ranks(limited, 1, "cpu", str(tmp_path))
    assert re.search("can't allocate memory|MemoryError|not enough memory", without), without
