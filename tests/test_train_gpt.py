"""The training script: it learns, it gives the same on any number of ranks, and it refuses in one line.

    .venv/bin/python -m pytest -q tests/test_train_gpt.py
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import train_gpt

from conftest import DEADLINE, ROOT

SMALL = ["--dim=16", "--layers=1", "--heads=2", "--context=16", "--batch=8", "--steps=20", "--report=10", "--sample=8"]


def run_script(arguments: list[str]) -> str:
    """What the script prints."""
    with mock.patch.object(sys, "argv", ["train_gpt.py", *arguments]), \
            contextlib.redirect_stdout(io.StringIO()) as out:
        train_gpt.main()
    return out.getvalue()


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", printed)]


def test_it_learns_real_text_the_same_on_one_rank_and_on_two(run_ranks, tmp_path):
    arguments = [*SMALL, f"--plot={tmp_path / 'loss.png'}"]
    (alone,) = run_ranks(run_script, 1, arguments)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    together, silent = run_ranks(run_script, 2, arguments)
    assert silent == "" and "the model writes:\ndef " in alone
    assert len(losses(alone)) == 4 and losses(alone)[0] > 5 > losses(alone)[2], "three steps' losses and a held-out one"
    assert losses(together) == pytest.approx(losses(alone), abs=2e-4)


def curves_of(arguments: list[str]) -> list[list[tuple[int, float]]]:
    """The curves that the script draws."""
    with mock.patch.object(train_gpt, "draw_curves") as drawn:
        run_script(arguments)
    return [list(curve) for curve in drawn.call_args.args[:2]] if drawn.called else []


def test_the_curve_has_every_step_also_those_before_a_resume(run_ranks, tmp_path):
    (whole, held_out), _ = run_ranks(curves_of, 2, SMALL)
    assert [step for step, _ in whole] == list(range(1, 21)) and [step for step, _ in held_out] == [20]
    saving = [*SMALL, f"--save_dir={tmp_path / 'runs'}", "--save_every=5", "--report=100", "--resume"]
    schedule = "--config=" + str(tmp_path / "constant.json")
    (tmp_path / "constant.json").write_text('{"train_batch_size": 8, "optimizer": {"type": "AdamW"}}')
    (expected, _), _ = run_ranks(curves_of, 2, [*SMALL, schedule])
    run_ranks(curves_of, 2, [*saving, schedule, "--steps=7"])
    (resumed, held_out), _ = run_ranks(curves_of, 2, [*saving, schedule, "--steps=20"])
    assert resumed == expected and [step for step, _ in held_out] == [7, 20]


def test_a_run_that_was_killed_goes_on_where_it_was(run_ranks, tmp_path, request):
    """A run of one process is killed after a checkpoint, and resumed on two."""
    if not request.config.getoption("--long"):
        pytest.skip("test_launch.py has runs killed and resumed in the other direction; --long runs this too")
    common = [*SMALL, "--sample=1", f"--plot={tmp_path / 'loss.png'}"]
    whole, _ = run_ranks(run_script, 2, common)
    saving = [*common, f"--save_dir={tmp_path / 'runs'}", "--save_every=5"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    run = subprocess.Popen([sys.executable, "-u", str(ROOT / "tutorials" / "train_gpt.py"), *saving, "--steps=2000"],
                           env=environment | {"CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE
    while not (tmp_path / "runs" / "latest").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    saved = int((tmp_path / "runs" / "latest").read_text().removeprefix("global_step"))
    resumed, _ = run_ranks(run_script, 2, [*saving, f"--steps={saved + 10}", "--resume"])
    assert f"resumed from {tmp_path / 'runs' / f'global_step{saved}'}" in resumed
    assert f"step {saved + 10:5d}/{saved + 10}" in resumed and losses(resumed)[-1] < losses(whole)[0]


@pytest.mark.parametrize("arguments, told", [
    (["--data", "no such file"], "train_gpt.py: error: --data no such file can't be read"),
    (["--data", "SHORT"], "too little text: 27 bytes to train on and 3 held out"),
    (["--config", "no such file"], "train_gpt.py: error: the config file no such file can't be read"),
    (["--resume"], "--resume needs --save_dir"), (["--heads", "5"], "--heads 5 does not divide --dim 96"),
    (["--steps", "0"], "--steps is 0; allowed")])
def test_bad_input_is_refused(tmp_path, capsys, arguments, told):
    (tmp_path / "short").write_text("x" * 30)
    arguments = [str(tmp_path / "short") if a == "SHORT" else a for a in arguments]
    with pytest.raises(SystemExit) as stopped:
        run_script(arguments)
    assert told in str(stopped.value) + capsys.readouterr().err
