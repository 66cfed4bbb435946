"""Two machines, for real: two network namespaces joined by a cable that can be cut, a launcher in each.

    .venv/bin/python -m pytest -q tests/test_two_machines.py            as root, on Linux; skipped elsewhere
    .venv/bin/python -m pytest -q tests/test_two_machines.py --long     also: one machine goes on without the other

Both have the same host name, which stands for the loopback address, as on many real machines: an address taken from the
name would lead each to itself. This file is also the script that the launchers start.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import engine as deepspeed
import train_gpt
from conftest import Ranks
from programs import Program

ADDRESSES = ["10.71.0.1", "10.71.0.2"]
CARD = "cable"  # the network interface's name, on both
TIMEOUT = 8  # seconds that a collective waits
STEPS, SAVED, CUT = 8, 4, 6  # of the last run: all, the one saved after, the one in which the cable is cut


# --- What is trained, on any number of processes ----------------------------------------------------------------------


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


# --- The machines -----------------------------------------------------------------------------------------------------


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


def test_two_machines_train_as_one_process_and_a_cut_cable_ends_them_all(machines, run_ranks, tmp_path, request):
    each = 2 if request.config.getoption("--long") else 1  # processes per machine
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


def test_with_the_cable_cut_one_machine_goes_on_without_the_other(machines, run_ranks, tmp_path, request):
    if not request.config.getoption("--long"):
        pytest.skip("waits a minute for the other machine; --long runs it")
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
