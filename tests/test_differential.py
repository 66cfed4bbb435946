"""The same training runs as DeepSpeed's: losses, norms, rates, momenta, counters and final weights of every case.

    .venv/bin/python -m pytest -q tests/test_differential.py

``differential.py`` holds the cases and has recorded them with DeepSpeed; here each one runs with this project.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import differential
import engine as deepspeed

REFERENCE = json.loads((Path(__file__).parent / "data" / "deepspeed_runs.json").read_text())

FP32 = 1e-5    # relative, after up to 20 steps: both round to 6e-8, but sum in another order
EXACT = 1e-12  # relative: rates and momenta are computed in fp64
# A master weight that is 1e-7 off may lie across a border of bf16's rounding; the weight then jumps by 2**-8 of itself.
BF16 = 1e-3
# On two ranks DeepSpeed also sums gradients in bf16, which rounds each by up to 2**-9; here that is done in fp32.
BF16_SUMS = 1e-2

# Where this project means to differ. Each must fail: once it doesn't, its line has to go.
DIFFERENT = {
    "one_cycle_default_betas": "DeepSpeed's OneCycle also sets betas[1], to 0.99; here it stays what the config says",
    "one_cycle_sgd_momentum": "DeepSpeed's OneCycle leaves SGD's momentum alone; here it cycles",
    "sometimes_stage3": "DeepSpeed uses the gradient of the step before once more; here such a parameter is left out",
}
for name in differential.CASES:
    if name.startswith(("unused_decayed", "sometimes")):
        DIFFERENT.setdefault(name, "DeepSpeed updates what got no gradient with zeros, so decay and momentum go on; "
                                   "here, as in PyTorch, it is left out")


def replay(name: str) -> dict[str, Any]:
    """One case with this project, on this rank."""
    with torch.random.fork_rng(devices=[]):  # other tests come after it in this process
        return differential.run_case(deepspeed, name)


def assert_close(case: str, what: str, mine: Any, reference: Any, tolerance: float) -> None:
    """Compare two numbers, or two lists of them in any depth."""
    if isinstance(reference, list):
        assert isinstance(mine, list) and len(mine) == len(reference), \
            f"{case}: {what}: {mine} here, {reference} with DeepSpeed"
        for index, (own, other) in enumerate(zip(mine, reference)):
            assert_close(case, f"{what}[{index}]", own, other, tolerance)
    elif reference is None or isinstance(reference, bool):
        assert mine is reference, f"{case}: {what} is {mine!r} here, {reference!r} with DeepSpeed"
    else:
        assert math.isclose(mine, reference, rel_tol=tolerance, abs_tol=tolerance * 1e-3), \
            f"{case}: {what} is {mine!r} here, {reference!r} with DeepSpeed, allowed: {tolerance:g} apart"


def assert_same_run(case: str, mine: dict[str, Any], reference: dict[str, Any], tolerance: float) -> None:
    """Compare two records, step by step; ``reference`` as it is stored, a list of equal entries as one of them."""
    for key in ("rates", "momenta", "boundaries", "losses", "norms", "evaluated"):
        values = reference[key] * (len(mine[key]) if len(reference[key]) == 1 else 1)
        assert len(mine[key]) == len(values), f"{case}: {len(mine[key])} {key} here, {len(values)} with DeepSpeed"
        for step, (own, other) in enumerate(zip(mine[key], values)):
            if key == "norms" and other is None:
                continue  # DeepSpeed has none
            assert_close(case, f"step {step}: {key}", own, other, EXACT if key in ("rates", "momenta") else tolerance)
    assert_close(case, "counters", mine["counters"], reference["counters"], 0.0)
    assert mine["weights"].keys() == reference["weights"].keys(), f"{case}: {list(mine['weights'])} here"
    for name, (norm, *elements) in reference["weights"].items():
        own_norm, *own_elements = mine["weights"][name]
        assert_close(case, f"2-norm of {name}", own_norm, norm, tolerance)
        for own, other in zip(own_elements, elements, strict=True):  # against the size of the parameter
            assert abs(own - other) <= tolerance * max(norm, 0.1), \
                f"{case}: an element of {name} is {own!r} here, {other!r} with DeepSpeed; 2-norm {norm:.3g}"


def tolerance_of(case: str) -> float:
    """What the losses, norms and weights of a case may differ by, relative."""
    config, ranks = differential.CASES[case].config, differential.CASES[case].ranks
    return FP32 if "bf16" not in config else BF16 if ranks == 1 else BF16_SUMS


def in_groups() -> list[Any]:
    """The cases by number of ranks, so that few process groups are made; those of DIFFERENT have to fail."""
    names = sorted(differential.CASES, key=lambda name: differential.CASES[name].ranks)
    return [pytest.param(name, marks=pytest.mark.xfail(reason=DIFFERENT[name], strict=True, raises=AssertionError))
            if name in DIFFERENT else name for name in names]


@pytest.mark.parametrize("case", in_groups())
def test_training_equals_deepspeeds(run_ranks, case):
    for mine in run_ranks(replay, differential.CASES[case].ranks, case):
        assert_same_run(case, mine, REFERENCE["runs"][case], tolerance_of(case))
