"""The documented example in one process and in several, and the command line around it.

    .venv/bin/python -m pytest -q tests/test_launch.py
"""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

import launch
from conftest import ROOT

RATE = "Learning rate after warm-up step: 0.0023546349804879152"  # DeepSpeed 0.19.8's own, to the last digit


def run_main(arguments: list[str]) -> tuple[int, str, str]:
    """The exit code of launch.main and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = launch.main(arguments)
        except SystemExit as stop:  # argparse's way out
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def test_the_documented_example_ends_at_deepspeeds_rate():
    code, out, err = run_main([])
    lines = out.splitlines()
    assert (code, err) == (0, "") and not dist.is_initialized()
    assert lines[0] == RATE and lines[1].startswith("Loss: ") and lines[2:] == ["Training step completed"]


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_takes_its_share_and_rank_0_prints_what_one_process_prints(run_ranks, world_size):
    alone = run_main([])
    first, *others = run_ranks(run_main, world_size, [])
    assert first == alone and others == [(0, "", "")] * (world_size - 1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_example_is_the_same_at_every_zero_stage(run_ranks, stage):
    arguments = ["--zero_stage", str(stage)]
    assert run_main(arguments) == run_ranks(run_main, 2, arguments)[0] == run_main([])


def test_a_batch_that_cannot_be_shared_out_is_refused_on_every_rank(run_ranks):
    answers = run_ranks(run_main, 3, [])
    assert all(code == 2 and out == "" and "!= 8" in err for code, out, err in answers)


def test_user_errors_take_one_line_and_a_code(tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_batch_sise": 8}))
    code, out, err = run_main(["--deepspeed_config", str(config)])
    assert (code, out) == (2, "") and err.count("\n") == 1 and "did you mean 'train_batch_size'" in err
    for arguments, told in (["--bogus"], "unrecognized arguments"), (["--zero_stage", "4"], "invalid choice: 4"), \
            (["--zero_stage", "1", "--deepspeed_config", "ds.json"], "put the stage into ds.json"), \
            (["none.py"], "there is no script 'none.py'"), (["--nproc_per_node", "0"], "--nproc_per_node is 0"), \
            (["--zero_stage", "1", __file__], "--zero_stage changes the example's config"):
        code, out, err = run_main(arguments)
        assert code == 2 and told in err.splitlines()[-1]


def test_a_config_file_takes_the_examples_place(tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_batch_size": 8, "scheduler": {
        "type": "LinearDecayLR", "params": {"total_num_steps": 4}}}))
    assert run_main(["--deepspeed_config", str(config)])[1].startswith("Learning rate after warm-up step: 0.005\n")


def test_help_says_how_to_start():
    code, out, _ = run_main(["--help"])
    assert code == 0
    assert all(text in out for text in ("torchrun --nproc_per_node 2 launch.py", "--zero_stage", "SCRIPT"))


def test_scripts_run_on_processes_of_their_own_and_their_failure_is_the_launchers(tmp_path):
    """Two launchers side by side, as starting one takes a while: the example, and a script that fails on one rank."""
    script = tmp_path / "fails.py"
    script.write_text("import os, sys, time\n"
                      "print(os.environ['RANK'], os.environ['WORLD_SIZE'], sys.argv[1:], flush=True)\n"
                      "sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(300)\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    example, failing = (subprocess.Popen([sys.executable, str(ROOT / "launch.py"), "--nproc_per_node", "2", *arguments],
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
                        for arguments in ([], [str(script), "--x", "1"]))
    out, err = failing.communicate(timeout=150)
    assert failing.returncode == 7, err
    assert sorted(out.splitlines()) == [f"{rank} 2 ['--x', '1']" for rank in (0, 1)]
    assert err.splitlines()[-1] == f"launch.py: error: {script} failed on rank 1 with exit code 7"
    out, err = example.communicate(timeout=150)
    assert example.returncode == 0, err
    assert out.splitlines()[0] == RATE and len(out.splitlines()) == 3
