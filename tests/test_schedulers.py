"""Schedules against DeepSpeed's own rates, against their definitions, and against themselves resumed.

    .venv/bin/python -m pytest -q tests/test_schedulers.py

``data/lr_traces.json`` holds, for 14 configurations, the rates and momenta that DeepSpeed 0.19.8's own classes put in
force before each optimizer step.
"""

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import engine as deepspeed
import schedulers
import zero
from conftest import on_ranks
from oracle import STAGES, start

TRACES = json.loads((Path(__file__).parent / "data" / "lr_traces.json").read_text())["traces"]


def adam(lrs=(0.01,), betas=(0.9, 0.99)) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    return torch.optim.Adam(groups, betas=betas)


def rates(optimizer, schedule, steps: int) -> list[list[float]]:
    """The rates of the next ``steps`` optimizer steps."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


# --- Equal to DeepSpeed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: f"{t['type']}-{TRACES.index(t)}")
def test_rates_and_momenta_equal_deepspeeds(trace):
    optimizer = adam(trace["optimizer"]["lrs"], tuple(trace["optimizer"]["betas"]))
    schedule = schedulers.build(optimizer, trace["type"], trace["params"])
    for step, (lrs, betas) in enumerate(zip(trace["lr_before_step"], trace["beta1_before_step"], strict=True)):
        for index, group in enumerate(optimizer.param_groups):
            assert group["lr"] == pytest.approx(lrs[index], rel=1e-12, abs=0), f"step {step}, group {index}: rate"
            assert group["betas"][0] == pytest.approx(betas[index], rel=1e-12), f"step {step}, group {index}: momentum"
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: f"{t['type']}-{TRACES.index(t)}")
def test_a_step_to_a_position_and_a_state_from_deepspeed_go_there(trace):
    last = len(trace["lr_before_step"]) - 2
    for goes in (lambda s, n: s.step(n), lambda s, n: s.step(last_batch_iteration=n),
                 lambda s, n: s.step(batch_iteration=n), lambda s, n: s.load_state_dict({"last_batch_iteration": n}),
                 lambda s, n: (setattr(s, "last_batch_iteration", n - 1), s.step())):
        optimizer = adam(trace["optimizer"]["lrs"], tuple(trace["optimizer"]["betas"]))
        schedule = schedulers.build(optimizer, trace["type"], trace["params"])
        for position in (min(4, last), 0, last):
            optimizer.step()
            goes(schedule, position)
            assert schedule.last_batch_iteration == position == schedule.state_dict()["last_batch_iteration"]
            for group, lr, beta in zip(optimizer.param_groups, trace["lr_before_step"][position + 1],
                                       trace["beta1_before_step"][position + 1], strict=True):
                assert group["lr"] == pytest.approx(lr, rel=1e-12, abs=0), f"position {position}: rate"
                assert group["betas"][0] == pytest.approx(beta, rel=1e-12), f"position {position}: momentum"
    with pytest.raises(ValueError, match="last_batch_iteration is -2; allowed: a whole number, at least -1"):
        schedule.step(-2)
    assert schedule.last_batch_iteration == position and optimizer.param_groups[0]["lr"] == pytest.approx(
        trace["lr_before_step"][-1][0]), "a refused step changes nothing"


def test_one_cycle_tells_its_momentum_and_may_come_down_in_stairs():
    params = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 4}
    optimizer = adam()
    schedule = schedulers.build(optimizer, "OneCycle", params)
    assert schedule.get_mom() == [(0.8, 0.99)]
    optimizer.step()
    schedule.step(1)
    assert schedule.get_mom() == [(pytest.approx(0.85), 0.99)]
    assert schedulers.build(adam(), "OneCycle", params | {"cycle_momentum": False}).get_mom() is None
    stairs = schedulers.preview({"type": "OneCycle", "params": params | {"cycle_second_stair_count": 2}}, 9)
    assert stairs[5:] == [[pytest.approx(rate)] for rate in (0.0505, 0.0505, 0.001, 0.001)]


def test_warmup_keeps_each_groups_own_rate_unless_told_otherwise():
    optimizer = adam((0.1, 0.2))
    schedule = schedulers.build(optimizer, "WarmupLR", {"warmup_num_steps": 3})
    assert rates(optimizer, schedule, 6)[-1] == [0.1, 0.2]
    with pytest.warns(UserWarning, match="warmup_max_lr is 0.05 for every param group"):
        schedulers.build(adam((0.1, 0.2)), "WarmupLR", {"warmup_max_lr": 0.05})


def test_a_fraction_of_a_step_counts_as_in_deepspeed():
    schedule = schedulers.build(adam(), "WarmupDecayLR", {"total_num_steps": 10.5, "warmup_num_steps": 2,
                                                          "warmup_max_lr": 0.1, "warmup_type": "linear"})
    assert [row[0] for row in schedulers.preview(schedule, 12)][3:] == pytest.approx(
        [0.1 * max(0.0, (10.5 - step) / 8.5) for step in range(2, 11)])


# --- Properties on drawn configurations -------------------------------------------------------------------------------

RATE = st.floats(1e-6, 1.0)
COUNT = st.integers(1, 40)


@st.composite
def phases(draw) -> list[dict]:
    """Phases with a start only at the very start, so that they must join."""
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["constant", "linear", "cosine", "log", "exponential", "step"]))
        phase = {"type": kind, "steps": draw(COUNT)}
        if kind in schedulers.CURVES:
            phase["end_lr"] = draw(RATE)
        if kind == "step":
            phase |= {"step_size": draw(COUNT), "decay_rate": draw(st.floats(0.1, 1.0))}
        drawn.append(phase)
    if draw(st.booleans()):
        drawn[0]["start_lr"] = draw(RATE)
    return drawn


@st.composite
def configs(draw) -> dict:
    """A schedule of any type with valid parameters."""
    low, high = sorted((draw(RATE), draw(RATE)))
    warm, extra = draw(COUNT), draw(st.integers(0, 40))
    kind = draw(st.sampled_from(["log", "linear"]))
    low, high = (0.0, None) if draw(st.booleans()) else (low, high)
    warm_up = {"warmup_min_lr": low, "warmup_max_lr": high, "warmup_num_steps": warm, "warmup_type": kind}
    params = {
        "WarmupLR": warm_up,
        "WarmupDecayLR": {**warm_up, "total_num_steps": warm + extra},
        "WarmupCosineLR": {"warmup_num_steps": warm, "total_num_steps": warm + extra, "warmup_type": kind,
                           "warmup_min_ratio": draw(st.floats(0, 1)), "cos_min_ratio": draw(st.floats(0, 1))},
        "OneCycle": {"cycle_min_lr": low, "cycle_max_lr": high or 0.5, "cycle_first_step_size": warm,
                     "cycle_second_step_size": draw(COUNT), "cycle_first_stair_count": draw(st.integers(0, 5)),
                     "decay_step_size": draw(COUNT), "decay_lr_rate": draw(st.floats(0, 1))},
        "LRRangeTest": {"lr_range_test_min_lr": low, "lr_range_test_step_size": warm,
                        "lr_range_test_staircase": draw(st.booleans())},
        "LinearDecayLR": {"total_num_steps": warm, "end_lr": 0.0},
        "CosineDecayLR": {"total_num_steps": warm, "end_lr": 0.0},
        "StepDecayLR": {"step_size": warm, "decay_rate": draw(st.floats(0.1, 1.0))},
        "MultiPhaseLR": {"phases": draw(phases())}}
    name = draw(st.sampled_from(sorted(params)))
    return {"type": name, "params": params[name]}


@given(configs(), st.integers(0, 60), st.integers(1, 60))
def test_resumed_equals_uninterrupted_and_the_rate_is_in_force_at_once(config, before, after):
    whole, half, resumed = adam(), adam(), adam((0.5,))
    straight = rates(whole, schedulers.build(whole, **named(config)), before + after)
    first = schedulers.build(half, **named(config))
    rates(half, first, before)
    resumed.load_state_dict(half.state_dict())  # as when resuming, where the rate is then in the middle of the schedule
    state = json.loads(json.dumps(first.state_dict()))  # and it is plain data
    second = schedulers.build(resumed, **named(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as PyTorch's, that no optimizer step came before
        second.load_state_dict(state)
    assert [g["betas"][0] for g in resumed.param_groups] == [g["betas"][0] for g in half.param_groups]
    assert second.get_last_lr() == [g["lr"] for g in resumed.param_groups]
    assert rates(resumed, second, after) == straight[before:]


def named(config: dict) -> dict:
    return {"name": config["type"], "params": config["params"]}


@given(configs(), st.integers(1, 120))
def test_preview_gives_the_rates_of_training_and_of_a_schedule_in_mid_training(config, steps):
    optimizer = adam()
    schedule = schedulers.build(optimizer, **named(config))
    expected = schedulers.preview(config, steps, lr=0.01)
    assert rates(optimizer, schedule, steps // 2) == expected[:steps // 2]
    state = copy.deepcopy((schedule.state_dict(), optimizer.state_dict()))
    assert schedulers.preview(schedule, steps - steps // 2) == expected[steps // 2:]
    assert (schedule.state_dict(), optimizer.state_dict()) == state


@given(configs())
def test_rates_are_finite_bounded_and_monotone_where_they_should_be(config):
    seen = [row[0] for row in schedulers.preview(config, 130, lr=0.01)]
    params, name = config["params"], config["type"]
    assert all(math.isfinite(rate) and rate >= 0 for rate in seen)
    if name.startswith("Warmup"):
        low, high = params.get("warmup_min_lr", 0.0), params.get("warmup_max_lr") or 0.01
        top = max(2, params["warmup_num_steps"]) + 1
        assert seen[:top] == sorted(seen[:top])
        assert seen[top:] == sorted(seen[top:], reverse=True)
        assert all(low * (1 - 1e-12) <= rate <= high * (1 + 1e-12) for rate in seen)
    elif name.endswith("DecayLR"):
        assert seen == sorted(seen, reverse=True)
    elif name == "OneCycle":
        top, end = params["cycle_first_step_size"], params["cycle_second_step_size"]
        assert seen[:top + 1] == sorted(seen[:top + 1])
        assert seen[top:] == sorted(seen[top:], reverse=True)
        assert max(seen) == pytest.approx(params["cycle_max_lr"])
        assert seen[top + end:][:1] in ([], [pytest.approx(params["cycle_min_lr"])])
    elif name == "LRRangeTest":
        assert seen == sorted(seen)


@given(phases())
def test_phases_meet_at_their_borders(drawn):
    seen = [row[0] for row in schedulers.preview({"type": "MultiPhaseLR", "params": {"phases": drawn}},
                                                 sum(phase["steps"] for phase in drawn) + 2, lr=0.01)]
    border = 0
    for phase in drawn:
        begin, border = border, border + phase["steps"]
        if phase["type"] == "constant":
            assert seen[border] == seen[begin]
        elif phase["type"] == "step":
            times = phase["steps"] // phase["step_size"]
            assert seen[border] == pytest.approx(seen[begin] * phase["decay_rate"] ** times, rel=1e-9)
        else:
            assert seen[border] == phase["end_lr"]  # reached there, and where the next phase starts
    assert seen[-1] == seen[-2], "after the last phase its final rate stays"


def test_an_exponential_phase_multiplies_by_the_same_factor_at_every_step():
    config = {"type": "MultiPhaseLR", "params": {"phases": [{"type": "exponential", "steps": 3, "end_lr": 0.008}]}}
    assert [rate for rate, in schedulers.preview(config, 5, lr=1.0)] == pytest.approx([1, 0.2, 0.04, 0.008, 0.008])
    far = {"type": "MultiPhaseLR", "params": {"phases": [{"type": "exponential", "steps": 2, "end_lr": 1e-300}]}}
    assert schedulers.preview(far, 2, lr=1e300)[1] == pytest.approx([1.0])
    assert schedulers.preview(config, 0) == []


def test_phases_with_a_list_give_each_group_its_own_rates():
    config = {"type": "MultiPhaseLR", "params": {"phases": [
        {"type": "linear", "steps": 2, "start_lr": [0.0, 0.2], "end_lr": [0.1, 0.4]}, {"type": "constant"}]}}
    assert schedulers.preview(config, 4, lr=[1.0, 1.0]) == [pytest.approx(row) for row in (
        [0.0, 0.2], [0.05, 0.3], [0.1, 0.4], [0.1, 0.4])]


SCHEDULES = [
    {"type": "WarmupLR", "params": {"warmup_min_lr": 0.125, "warmup_num_steps": 4, "warmup_type": "linear"}},
    {"type": "OneCycle", "params": {"cycle_min_lr": 0.25, "cycle_max_lr": 0.5, "cycle_first_step_size": 2}},
    {"type": "MultiPhaseLR", "params": {"phases": [{"type": "linear", "steps": 2, "start_lr": 0.0, "end_lr": 0.5}]}},
]


@on_ranks(2, stage=STAGES, schedule=SCHEDULES)
def test_the_first_update_uses_the_schedules_first_rate_and_not_the_optimizers(stage, schedule):
    """A weight whose gradient is 1 moves by the rate that is in force."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    engine = start(model, stage, None, optimizer={"type": "SGD", "params": {"lr": 1.0}}, scheduler=schedule)
    expected, values = schedulers.preview(schedule, 4, lr=1.0), [zero.safe_get_full_fp32_param(model.weight).item()]
    assert expected[0] != [1.0], "else it says nothing"
    for _ in expected:
        engine.backward(engine(torch.ones(2, 1, dtype=torch.float64)).mean())
        engine.step()
        values.append(zero.safe_get_full_fp32_param(model.weight).item())
    assert [[a - b] for a, b in zip(values, values[1:])] == [pytest.approx(row, abs=1e-12) for row in expected]


# --- PyTorch's side ---------------------------------------------------------------------------------------------------


def test_torch_schedulers_go_by_name_and_ours_go_into_torchs_own():
    optimizer = adam((0.1,))
    seen = rates(optimizer, schedulers.build(optimizer, "StepLR", {"step_size": 2, "gamma": 0.5}), 4)
    assert [row[0] for row in seen] == [0.1, 0.1, 0.05, 0.05]
    optimizer = adam((0.1,))
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        schedulers.WarmupLR(optimizer, warmup_num_steps=2, warmup_type="linear"),
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)], milestones=[3])
    expected = schedulers.preview(both, 6)
    assert rates(optimizer, both, 6) == expected
    assert [row[0] for row in expected[:4]] == [0.0, 0.0, 0.05, 0.1]


@pytest.mark.parametrize("before", range(6))
def test_a_schedule_inside_of_pytorchs_and_a_rate_that_the_caller_set_are_resumed(before):
    def joined(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [
            schedulers.WarmupLR(optimizer, warmup_num_steps=2, warmup_type="linear"),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)], milestones=[3])

    whole, half, resumed = adam((0.1,)), adam((0.1,)), adam((0.1,))
    straight, first, second = rates(whole, joined(whole), before + 4), joined(half), joined(resumed)
    rates(half, first, before)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert rates(resumed, second, 4) == straight[before:]
    schedule, other = schedulers.WarmupLR(half), schedulers.WarmupLR(resumed)
    half.param_groups[0]["lr"] = 0.75
    other.load_state_dict(schedule.state_dict())
    assert resumed.param_groups[0]["lr"] == 0.75


def test_one_cycle_moves_sgds_momentum_only_where_it_has_one():
    weights = [torch.nn.Parameter(torch.zeros(1))]
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 2}
    sgd = torch.optim.SGD(weights, lr=0.1, momentum=0.5)
    schedule = schedulers.build(sgd, "OneCycle", params)
    rates(sgd, schedule, 2)
    assert sgd.param_groups[0]["momentum"] == pytest.approx(0.8)
    with pytest.warns(UserWarning, match="this SGD has no momentum"):
        schedulers.build(torch.optim.SGD(weights, lr=0.1), "OneCycle", params)


# --- Wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, params, told", [
    ("WarmUpLR", {}, "did you mean 'WarmupLR'"),
    (None, {}, "scheduler type is None"),
    (["WarmupLR"], {}, "scheduler type"),
    ("ReduceLROnPlateau", {}, "needs a metric"),
    ("SequentialLR", {}, "MultiPhaseLR joins phases"),
    ("StepLR", {}, "step_size"),
    ("WarmupLR", {"warmup_steps": 10}, "did you mean 'warmup_num_steps'"),
    ("WarmupLR", {"warmup_num_steps": 0}, "warmup_num_steps is 0; allowed: a whole number, at least 1"),
    ("WarmupLR", {"warmup_num_steps": 2.5}, "warmup_num_steps is 2.5"),
    ("WarmupLR", {"warmup_num_steps": True}, "warmup_num_steps is True"),
    ("WarmupLR", {"warmup_max_lr": float("nan")}, "warmup_max_lr is nan"),
    ("WarmupLR", {"warmup_max_lr": float("inf")}, "warmup_max_lr is inf"),
    ("WarmupLR", {"warmup_min_lr": -1}, "warmup_min_lr is -1"),
    ("WarmupLR", {"warmup_min_lr": "0.1"}, "warmup_min_lr is '0.1'"),
    ("WarmupLR", {"warmup_min_lr": 0.2, "warmup_max_lr": 0.1}, "warmup_max_lr is 0.1; allowed: at least warmup_min_lr"),
    ("WarmupLR", {"warmup_max_lr": [0.1, 0.2]}, "warmup_max_lr has 2 values, but the optimizer has 1"),
    ("WarmupLR", {"warmup_type": "exp"}, "warmup_type is 'exp'"),
    ("WarmupDecayLR", {}, "total_num_steps"),
    ("WarmupDecayLR", {"total_num_steps": 5, "warmup_num_steps": 6}, "total_num_steps is 5; .* at least 6"),
    ("WarmupCosineLR", {"total_num_steps": 0, "warmup_num_steps": 1}, "total_num_steps is 0"),
    ("WarmupCosineLR", {"total_num_steps": 9, "warmup_num_steps": 1, "cos_min_ratio": 1.5}, "cos_min_ratio is 1.5"),
    ("OneCycle", {"cycle_min_lr": 0.1}, "cycle_max_lr"),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 0}, "cycle_first_step_size is 0"),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_max_mom": 1.0}, "cycle_max_mom is 1.0"),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_momentum": "yes"}, "cycle_momentum is 'yes'"),
    ("LRRangeTest", {"lr_range_test_step_size": 0}, "lr_range_test_step_size is 0"),
    ("LinearDecayLR", {"total_num_steps": 0}, r"phases\[0\].steps is 0"),
    ("StepDecayLR", {"step_size": 3, "decay_rate": -1}, "decay_rate is -1"),
    ("MultiPhaseLR", {"phases": []}, "a list of one phase or more"),
    ("MultiPhaseLR", {"phases": ["linear"]}, r"phases\[0\] is 'linear'"),
    ("MultiPhaseLR", {"phases": [{"type": "cos", "steps": 1}]}, r"phases\[0\].type is 'cos'; did you mean"),
    ("MultiPhaseLR", {"phases": [{"type": "linear", "steps": 1}]},
     r"phases\[0\].end_lr is missing; a linear phase needs steps, end_lr$"),
    ("MultiPhaseLR", {"phases": [{"type": "linear", "end_lr": 1}]}, r"phases\[0\].steps is missing"),
    ("MultiPhaseLR", {"phases": [{"type": "constant"}, {"type": "constant"}]}, r"phases\[0\].steps is missing"),
    ("MultiPhaseLR", {"phases": [{"type": "constant", "steps": 1, "end_lr": 1}]},
     r"phases\[0\]: a key of a constant phase is 'end_lr' \(allowed: type, steps, start_lr\)"),
    ("MultiPhaseLR", {"phases": [{"type": "constant", "step": 1}]}, "did you mean 'steps'"),
    ("MultiPhaseLR", {"phases": [{"type": "exponential", "steps": 9, "end_lr": 0.0}]}, "phase leads from 0.01 to 0.0"),
    ("MultiPhaseLR", {"phases": [{"type": "linear", "steps": 9, "end_lr": 0.0},
                                 {"type": "exponential", "steps": 9, "end_lr": 1.0}]}, "phase leads from 0.0 to 1.0"),
    ("WarmupLR", 5, "WarmupLR: params is 5; allowed: a section of parameters by name"),
    ("WarmupLR", [], r"WarmupLR: params is \[\]"),
])
def test_wrong_parameters_are_refused_by_name(name, params, told):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=told):
        warnings.simplefilter("error")
        schedulers.build(adam(), name, params)


def test_a_state_for_other_groups_is_refused():
    one, two = (schedulers.WarmupLR(adam(lrs)) for lrs in ((0.1,), (0.1, 0.2)))
    for state, told in ((two.state_dict(), r"2 param group\(s\), this one 1"),
                        ({"last_epoch": 4}, "has last_epoch; needed: last_batch_iteration")):
        with pytest.raises(ValueError, match=told):
            one.load_state_dict(state)


def test_momentum_that_would_grow_to_one_is_an_error_not_a_divergence():
    optimizer = adam()
    schedule = schedulers.OneCycle(optimizer, 0.1, 0.2, cycle_first_step_size=1, decay_step_size=1, decay_mom_rate=0.1)
    with pytest.raises(ValueError, match="momentum, raised by decay_mom_rate 0.1"):
        rates(optimizer, schedule, 20)
    with pytest.warns(UserWarning, match="have no effect while decay_step_size is 0"):
        schedulers.OneCycle(optimizer, 0.1, 0.2, decay_lr_rate=0.1)


# --- Command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section, last", [
    ({"type": "WarmupLR", "params": {"warmup_num_steps": 40}}, 44),
    ({"type": "WarmupDecayLR", "params": {"total_num_steps": 500, "warmup_num_steps": 40}}, 550),
    ({"type": "WarmupCosineLR", "params": {"total_num_steps": 500.5, "warmup_num_steps": 40}}, 550),
    ({"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_first_step_size": 70,
                                     "cycle_second_step_size": 30}}, 110),
    ({"type": "LRRangeTest", "params": {"lr_range_test_step_size": 50}}, 220),
    ({"type": "LinearDecayLR", "params": {"total_num_steps": 500}}, 550),
    ({"type": "StepDecayLR", "params": {"step_size": 50}}, 220),
    ({"type": "MultiPhaseLR", "params": {"phases": [{"type": "linear", "steps": 30, "end_lr": 0.1},
                                                    {"type": "cosine", "steps": 70, "end_lr": 0.0}]}}, 110),
    ({"type": "MultiPhaseLR", "params": {"phases": [{"type": "constant"}]}}, 1100),
    ({"type": "StepLR", "params": {"step_size": 50}}, 1100),
])
def test_a_configs_schedule_is_drawn_in_its_own_length_and_into_its_own_file(tmp_path, monkeypatch, section, last):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: figures.append((self, path)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps({"scheduler": section}))
    for more in ([], ["--steps", "7"]):
        schedulers.main(["mine.json", *more])
    assert [len(figure.axes[0].lines[0].get_xdata()) - 1 for figure, _ in figures] == [last, 6]
    assert [path for _, path in figures] == ["mine_lr.png"] * 2, "schedules.png is the picture of them all"


def test_command_line_draws_a_picture_and_refuses_in_one_line(tmp_path, capsys):
    config, picture = tmp_path / "ds.json", tmp_path / "lr.png"
    config.write_text(json.dumps({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}))
    schedulers.main(["--output", str(picture), "--steps", "50"])
    everything = picture.read_bytes()
    schedulers.main([str(config), "--output", str(picture), "--steps", "50", "--lr", "0.1", "0.2"])
    assert everything[:4] == picture.read_bytes()[:4] == b"\x89PNG" and everything != picture.read_bytes()
    drawn = picture.read_bytes()
    config.write_text('{"type": "WarmupLR", "params": {"warmup_num_steps": 5,}} # the section alone')
    schedulers.main([str(config), "--output", str(picture), "--steps", "50", "--lr", "0.1", "0.2"])
    assert picture.read_bytes() == drawn
    config.write_text('{"optimizer": {"type": "SGD", "params": {"lr": 0.4}}, "scheduler": {"type": "WarmupLR"}}')
    assert deepspeed.read_scheduler(config) == ({"type": "WarmupLR", "params": {}}, 0.4)
    for bad in ("[1]", "{", "{}", '{"scheduler": {"type": "Warmup"}}', '{"scheduler": 3}',
                '{"type": "WarmupLR", "params": 3}'):
        config.write_text(bad)
        with pytest.raises(SystemExit, match="^schedulers.py: error: .*$"):
            schedulers.main([str(config), "--output", str(picture)])
    with pytest.raises(SystemExit, match="^schedulers.py: error: .*$"):
        schedulers.main([str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="^schedulers.py: error: --steps is 0; allowed: a number, at least 1, finite$"):
        schedulers.main(["--steps", "0"])
