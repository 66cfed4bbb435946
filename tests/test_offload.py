"""Offload to host memory and to files: the same numbers as without, and the memory really goes elsewhere.

    .venv/bin/python -m pytest -q tests/test_offload.py
    .venv/bin/python -m pytest -q tests/test_offload.py --long     with hundreds of drawn runs
"""

import copy
import ctypes
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import engine as deepspeed
import zero
from conftest import memory

WIDTH, ROWS = 8, 3


class Net(nn.Module):
    """Blocks, a tied embedding and a layer that is used in some steps."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.token.weight
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
                                    for _ in range(3))
        self.side = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids, side):
        x = self.token(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + self.side(x) if side else x)


def trained(draw: dict, offload: dict, folder: str, steps: int = 4) -> dict:
    """Norms, and bit for bit the weights, masters and optimizer state after some steps."""
    torch.manual_seed(0)
    model = Net()
    engine, optimizer, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": draw["accumulation"],
        "gradient_clipping": draw["clip"], "optimizer": {"type": draw["optimizer"], "params": draw["params"]},
        "bf16": {"enabled": draw["bf16"]}, "communication_data_type": "bf16" if draw["bf16"] else None,
        "zero_optimization": {"stage": draw["stage"], "reduce_bucket_size": draw["bucket"], **placed(offload, folder)}})
    norms = []
    for step in range(steps):
        for part in range(draw["accumulation"]):
            generator = torch.Generator().manual_seed(100 * step + 10 * part + dist.get_rank())
            ids = torch.randint(0, 11, (ROWS, 5), generator=generator)
            logits = engine(ids, side=step == 2)
            engine.backward(nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()))
            engine.step()
        norms.append(engine.get_global_grad_norm())
    found = {"norm": torch.tensor(norms)}
    for name, p in model.named_parameters():
        found[name] = zero.safe_get_full_fp32_param(p)
        for key in draw["state"]:
            found[f"{key} of {name}"] = zero.safe_get_full_optimizer_state(p, key)
    if "nvme" in {section["device"] for section in offload.values()} and draw.get("all", True):
        check_places(engine.zero, offload)
    engine.destroy()
    assert not os.listdir(folder), f"left in the folder: {os.listdir(folder)}"
    return found


def placed(offload: dict, folder: str) -> dict:
    return {key: {**section, "nvme_path": folder} for key, section in offload.items()}


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


OPTIMIZERS = {"AdamW": ({"lr": 0.01, "weight_decay": 0.1}, ["exp_avg", "exp_avg_sq"]),
              "SGD": ({"lr": 0.1, "momentum": 0.9}, ["momentum_buffer"]), "Adagrad": ({"lr": 0.1}, ["sum"]),
              "RMSprop": ({"lr": 0.01}, ["square_avg"])}


@st.composite
def draws(draw):
    optimizer = draw(st.sampled_from(sorted(OPTIMIZERS)))
    stage = draw(st.sampled_from([3, 0, 1, 2, 3]))
    offload = {"offload_optimizer": {"device": draw(st.sampled_from(["nvme", "cpu"])),
                                     "ratio": draw(st.sampled_from([1.0, 0.5]))}}
    if stage == 3:
        offload["offload_param"] = {"device": draw(st.sampled_from(["nvme", "cpu", "none"]))}
        if draw(st.booleans()):
            offload["offload_optimizer"]["device"] = draw(st.sampled_from(["none", "cpu", "nvme"]))
    return {"optimizer": optimizer, "params": OPTIMIZERS[optimizer][0], "state": OPTIMIZERS[optimizer][1],
            "stage": stage, "accumulation": draw(st.sampled_from([1, 3])), "clip": draw(st.sampled_from([0.0, 0.3])),
            "bf16": draw(st.booleans()), "bucket": draw(st.sampled_from([100, 10**6])),
            "world_size": draw(st.sampled_from([2, 1, 3]))}, offload


def same_with_and_without(draw: dict, offload: dict, folder: str) -> None:
    expected, found = trained(draw, {}, folder), trained(draw, offload, folder)
    # One process has units only with offloaded parameters; the norm is then added up unit by unit, in another order.
    regrouped = draw["world_size"] == 1 and offload.get("offload_param", {"device": "none"})["device"] != "none"
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).abs().max()
        assert difference <= (2e-6 * value.abs().max() if regrouped else 0), (
            f"{draw} with {offload}: {name} differs by up to {difference:.3g}")


def test_offload_changes_no_number(run_ranks, tmp_path, request):
    is_long = request.config.getoption("--long")

    @settings(max_examples=300 if is_long else 10, deadline=None, database=None, derandomize=not is_long,
              phases=[Phase.generate])
    @given(draws())
    def check(drawn):
        draw, offload = drawn
        run_ranks(same_with_and_without, draw["world_size"], draw, offload, str(tmp_path))

    check()


def saved_and_resumed(stage: int, folder: str) -> None:
    """Two steps, save, two more; the same from the file with another offload, or none."""
    draw = {"optimizer": "AdamW", "params": {"lr": 0.01}, "state": ["exp_avg"], "stage": stage, "accumulation": 1,
            "clip": 0.0, "bf16": False, "bucket": 100}
    scratch = os.path.join(folder, f"scratch_{dist.get_rank()}")
    os.makedirs(scratch, exist_ok=True)
    ends = []
    for offload in ({"offload_optimizer": {"device": "nvme"}}, {}, {"offload_optimizer": {"device": "cpu"}}):
        torch.manual_seed(len(ends))
        model = Net()
        engine, *_ = deepspeed.initialize(model=model, config={
            "train_micro_batch_size_per_gpu": ROWS, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 100, **placed(offload, scratch)}})
        if ends:
            engine.load_checkpoint(folder)
        for step in range(2 if ends else 0, 4):
            ids = torch.randint(0, 11, (ROWS, 5), generator=torch.Generator().manual_seed(step + dist.get_rank()))
            engine.backward(nn.functional.cross_entropy(engine(ids, side=True).flatten(0, 1), ids.flatten()))
            engine.step()
            if not ends and step == 1:
                engine.save_checkpoint(folder)
        if offload:
            check_places(engine.zero, offload)
        ends.append({name: zero.safe_get_full_fp32_param(p) for name, p in model.named_parameters()})
        engine.destroy()
    for end in ends[1:]:
        for name, value in ends[0].items():
            assert torch.equal(end[name], value), f"stage {draw['stage']}: {name} after resuming differs"


def test_a_checkpoint_goes_from_offload_to_none_and_back(run_ranks, tmp_path):
    for stage in (1, 3):
        run_ranks(saved_and_resumed, 2, stage, str(tmp_path / str(stage)))


# --- What is refused --------------------------------------------------------------------------------------------------


def refusal(section: dict, stage: int, free: int | None) -> str:
    """The error that initialize() gives on this rank; ``free`` is how much room the disk says it has."""
    usage = shutil.disk_usage
    if free is not None:
        shutil.disk_usage = lambda path: usage(path)._replace(free=free)
    try:
        deepspeed.initialize(model=Net(), config={
            "train_micro_batch_size_per_gpu": ROWS, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": stage, **section}})
    except ValueError as error:
        return str(error)
    finally:
        shutil.disk_usage = usage
    return "no error"


def test_a_missing_folder_is_refused_with_the_bytes_it_needs(run_ranks):
    parameters = sum(p.numel() for p in Net().parameters())
    section = {"offload_optimizer": {"device": "nvme", "nvme_path": "/no/such/folder"}}
    for stage, needed in ((0, 12 * parameters), (2, 6 * parameters)):  # fp32 masters and Adam's two moments
        for told in run_ranks(refusal, 2, section, stage, None):
            assert "offload_optimizer.nvme_path is '/no/such/folder'; needed: a folder" in told
            assert f"with {needed:,} bytes free for each rank" in told


def test_a_full_disk_is_refused_with_the_bytes_that_all_ranks_need(run_ranks, tmp_path):
    parameters = sum(p.numel() for p in Net().parameters())
    place = {"device": "nvme", "nvme_path": str(tmp_path)}
    sections = {"offload_optimizer": place, "offload_param": place}
    needed = 2 * (6 * parameters) + 2 * (2 * parameters)  # 2 ranks: each half of masters and moments, and of weights
    for told in run_ranks(refusal, 2, sections, 3, needed - 1):
        assert f"where {needed - 1:,} bytes are free; needed: {needed:,} for all ranks" in told
    assert set(run_ranks(refusal, 2, sections, 3, needed)) == {"no error"}


# --- Memory -----------------------------------------------------------------------------------------------------------


def alone_at_stage_3(folder: str) -> list[int]:
    """Bytes of whole parameters outside of forward, and in it, of one process with offloaded parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32)) for _ in range(8)))
    reference = copy.deepcopy(model)
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1}},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": folder}}})
    live = []

    def look(*_) -> None:
        live.append(sum(b.flat.untyped_storage().nbytes() for b in engine.zero.buckets))

    look()
    with torch.no_grad():  # from now on the order of the blocks is known, and the next is gathered ahead
        engine(torch.ones(1, 32))
    for block in model:
        block[0].register_forward_hook(look)
    loss = engine(torch.ones(1, 32)).square().sum()
    engine.backward(loss)
    engine.step()
    look()
    reference(torch.ones(1, 32)).square().sum().backward()
    for p, q in zip(model.parameters(), reference.parameters()):
        assert torch.equal(zero.safe_get_full_fp32_param(p), q.detach() - q.grad)
    engine.destroy()
    return live


def test_one_process_keeps_two_blocks_at_a_time_with_offloaded_parameters(run_ranks, tmp_path):
    [live] = run_ranks(alone_at_stage_3, 1, str(tmp_path))
    block = 4 * zero._round_up(32 * 32 + 32, zero.ALIGN)
    assert live[0] == live[-1] == 0
    assert max(live) == 2 * block, f"bytes of whole parameters: {live}"


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
def test_state_larger_than_the_memory_limit_trains_from_files_and_not_without(run_ranks, tmp_path):
    """RLIMIT_DATA bounds what a process holds in memory of its own; pages of files are the system's to evict."""
    def run(device: str) -> str:
        run_ranks.stop()  # a new process, which holds no memory that other tests have freed
        return run_ranks(limited, 1, device, str(tmp_path))[0]

    assert run("nvme") == "trained 3"
    assert re.search("can't allocate memory|MemoryError|not enough memory", without := run("cpu")), without
    run_ranks.stop()
