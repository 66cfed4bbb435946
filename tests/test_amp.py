"""Mixed precision: the same training on any number of ranks, masters that forget nothing, and DeepSpeed's loss scale.

    .venv/bin/python -m pytest -q tests/test_amp.py
"""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import amp
import engine as deepspeed
import zero
from conftest import on_ranks
from engine import ConfigError
from oracle import STAGES, start, whole
from test_zero import model_state_bytes, train_wide

ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
HALF = {"fp16": {"fp16": {"enabled": True, "auto_cast": True, "initial_scale_power": 8}},
        "bf16": {"bf16": {"enabled": True, "auto_cast": True}}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(16, 4)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x) * self.scale
        return self.head(x)


def trained(precision: dict, stage: int, micro_batches: int, steps: int = 5, **more):
    """Weights after training on ``micro_batches`` per step: divided among the ranks, the rest accumulated."""
    torch.manual_seed(0)
    model = Net()
    config = {"train_batch_size": 4 * micro_batches,
              "gradient_accumulation_steps": micro_batches // dist.get_world_size(),
              "gradient_clipping": 0.0, "optimizer": ADAM,
              "zero_optimization": {"stage": stage, "reduce_bucket_size": 500}} | precision | more
    engine, *_ = deepspeed.initialize(model=model, config=config)
    generator, scales = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        x, y = (torch.randn(micro_batches, 4, n, generator=generator) for n in (16, 4))
        for i in range(dist.get_rank(), micro_batches, dist.get_world_size()):
            engine.backward((engine(x[i]).float() - y[i]).square().mean())
            engine.step()
        scales.append(engine.loss_scale())
    assert all(p.dtype == (torch.float16 if engine.fp16_enabled() else torch.bfloat16 if engine.bfloat16_enabled()
                           else torch.float32) for p in model.parameters())
    return [zero.safe_get_full_fp32_param(p) for p in model.parameters()], scales


# --- The same training everywhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_stage_and_number_of_ranks_trains_what_one_process_trains(run_ranks, name, world_size):
    (reference, scales), = run_ranks(trained, 1, HALF[name], 0, world_size)
    for stage in range(4):
        for rank, (weights, their_scales) in enumerate(run_ranks(trained, world_size, HALF[name], stage, world_size)):
            worst = max(float((a - b).abs().max()) for a, b in zip(weights, reference))
            # The same sums in the same order, and division by a power of two: the same bits. With 3 ranks the mean is
            # rounded at another place, and stage 0 leaves the order of more than two summands to the all-reduce.
            exact = world_size in (1, 2) or world_size == 4 and stage > 0
            assert worst == 0 if exact else worst < {"fp16": 5e-3, "bf16": 2e-2}[name], \
                f"stage {stage}, rank {rank} of {world_size}: {worst:.3g}"
            assert their_scales == scales


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_precision_follows_fp32(run_ranks, name):
    (reference, _), = run_ranks(trained, 1, {}, 0, 2, 40)
    (weights, _), *_ = run_ranks(trained, 2, HALF[name], 2, 2, 40)
    worst = max(float((a - b).abs().max()) for a, b in zip(weights, reference))
    assert 0 < worst < {"fp16": 0.05, "bf16": 0.15}[name]


def masters_at_start(precision: dict, stage: int):
    torch.manual_seed(0)
    model = Net()
    given = [p.detach().clone() for p in model.parameters()]
    deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1, "optimizer": ADAM,
                                              "zero_optimization": {"stage": stage}} | precision)
    rounded = []
    for p in model.parameters():
        with zero.GatheredParameters(p):
            rounded.append(p.detach().clone())
    return (all(torch.equal(zero.safe_get_full_fp32_param(p), g) for p, g in zip(model.parameters(), given)),
            all(torch.equal(r, g.to(r.dtype)) for r, g in zip(rounded, given)))


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_masters_are_the_weights_as_they_were_before_rounding(run_ranks, name):
    for stage in range(4):
        assert run_ranks(masters_at_start, 2, HALF[name], stage) == [(True, True)] * 2, f"stage {stage}"


# --- Accumulation -----------------------------------------------------------------------------------------------------


def tiny_sums(data_types: dict, stage: int):
    """The gradient of a weight after 1 and 256 times 1/256."""
    model = nn.Linear(1, 1, bias=False)
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1024, "optimizer": ADAM,
        "bf16": {"enabled": True, "auto_cast": True}, "data_types": data_types,
        "zero_optimization": {"stage": stage}})
    for i in range(257):
        engine.backward(engine(torch.ones(1, 1)).sum() * (1.0 if i == 0 else 1 / 256), scale_wrt_gas=False)
        engine.step()
    return float(zero.safe_get_full_grad(model.weight))


def test_many_small_bf16_gradients_add_up_to_their_fp32_sum(run_ranks):
    for stage in range(4):
        assert run_ranks(tiny_sums, 2, {}, stage) == [2.0, 2.0], f"stage {stage}"
    assert run_ranks(tiny_sums, 2, {"grad_accum_dtype": "bf16"}, 1) == [1.0, 1.0], "as it stands still in bf16"


def half_bytes(stage: int, data_types: dict):
    engine = train_wide(stage, precision={"bf16": {"enabled": True, "auto_cast": True}, "data_types": data_types})
    count = sum(b.numel for b in engine.zero.buckets)
    own = sum(piece.numel() for bucket in engine.zero.buckets for piece in bucket.pieces)
    padding = count // (engine.world_size if stage else 1) - own
    return (model_state_bytes(engine) + 8 * padding) / count  # padding has no optimizer state


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_per_rank_are_those_of_the_table_in_bf16(run_ranks, stage, world_size):
    n = world_size
    table = {0: (16, 18), 1: (4 + 12 / n, 6 + 12 / n), 2: (2 + 14 / n, 2 + 16 / n), 3: (14 / n, 16 / n)}[stage]
    if n == 1:
        table = (16, 18)  # the masters are kept beside the weights that the model reads
    for dtype, expected in zip(("bf16", "fp32"), table):
        for held in run_ranks(half_bytes, n, stage, {"grad_accum_dtype": dtype}):
            assert held == pytest.approx(expected, abs=1e-9), f"gradients accumulated in {dtype}"


def reductions(precision: dict):
    """Bytes per element sent by reductions, the gradient, its norm, and what was divided by before the sum."""
    torch.manual_seed(0)
    model = Net()
    engine, *_ = deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1, "optimizer": ADAM,
                                                           "zero_optimization": {"stage": 2}} | precision)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.backward(engine(x).float().square().mean())
    sent = engine.zero.communicator.traffic["reduce-scatter"]
    gradient = zero.safe_get_full_grad(model.head.weight)
    engine.step()
    return sent.bytes / sent.elements, gradient, engine.get_global_grad_norm(), engine.zero.reducer.every[0].predivide


def test_gradients_are_sent_in_the_dtype_that_the_config_says(run_ranks):
    (_, exact, norm, _), *_ = run_ranks(reductions, 2, {})
    for precision, size, divided in (
            ({}, 4, 1), ({"communication_data_type": "bf16"}, 2, 1), ({"communication_data_type": "fp16"}, 2, 2),
            ({"prescale_gradients": True}, 4, 2), ({"gradient_predivide_factor": 4.0}, 4, 4),
            ({"gradient_predivide_factor": 0.7, "communication_data_type": "fp16"}, 2, 0.7),
            ({"prescale_gradients": True, "gradient_predivide_factor": 4.0}, 4, 2),
            ({"bf16": {"enabled": True, "auto_cast": True}}, 4, 1)):
        for per_element, gradient, their_norm, predivide in run_ranks(reductions, 2, precision):
            assert (per_element, predivide) == (size, divided), precision
            assert torch.allclose(gradient, exact, atol=0.02 * float(exact.abs().max())), precision
            assert their_norm == pytest.approx(norm, rel=0.01), precision


def sum_or_mean(op: str):
    model = nn.Linear(2, 1, bias=False)
    engine, *_ = deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1, "optimizer": ADAM,
                                                           "gradient_allreduce_op": op})
    engine.backward(engine(torch.ones(1, 2)).sum())
    gradient = zero.safe_get_full_grad(model.weight).tolist()
    engine.step()
    return gradient, engine.get_global_grad_norm()


def test_gradients_may_be_summed_over_ranks(run_ranks):
    assert run_ranks(sum_or_mean, 2, "sum")[0] == ([[2.0, 2.0]], pytest.approx(8 ** 0.5))
    assert run_ranks(sum_or_mean, 2, "mean")[0] == ([[1.0, 1.0]], pytest.approx(2 ** 0.5))


# --- Overflow ---------------------------------------------------------------------------------------------------------


def overflowing(precision: dict, stage: int):
    """Two steps, of which the first has an infinite gradient on rank 1 alone."""
    torch.manual_seed(0)
    model = Net()
    model.blocks[0][0].weight.requires_grad_(False)
    engine, optimizer, _, schedule = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "optimizer": ADAM, "zero_optimization": {"stage": stage},
        "scheduler": {"type": "StepLR", "params": {"step_size": 1}}} | precision)
    before = [zero.safe_get_full_fp32_param(p) for p in model.parameters()]
    seen = []
    for step in range(2):
        loss = engine(torch.ones(1, 16)).float().mean()
        engine.backward(loss * float("inf") if step == 0 and dist.get_rank() == 1 else loss)
        model.blocks[0][0].weight.grad = None if stage == 3 else torch.full((16, 16), float("nan"),
                                                                            dtype=model.head.weight.dtype)
        engine.step()
        after = [zero.safe_get_full_fp32_param(p) for p in model.parameters()]
        seen.append((all(map(torch.equal, before, after)), engine.skipped_steps, engine.global_steps, engine.get_lr(),
                     engine.loss_scale(), optimizer.loss_scale == optimizer.cur_scale == engine.loss_scale()))
    return seen


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_an_infinite_gradient_on_one_rank_skips_the_step_and_the_schedule_on_all(run_ranks, name):
    precision = copy.deepcopy(HALF[name])
    if name == "fp16":
        precision["fp16"]["hysteresis"] = 1
    second = 128.0 if name == "fp16" else 1.0
    for stage in range(4):
        assert run_ranks(overflowing, 2, precision, stage) == [[
            (True, 1, 0, [0.01], second, True),
            (False, 1, 1, [pytest.approx(0.001)], second, True)]] * 2, f"stage {stage}"


def at_the_minimum():
    torch.manual_seed(0)
    model = Net()
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "optimizer": ADAM, "zero_optimization": {"stage": 2},
        "fp16": {"enabled": True, "auto_cast": True, "initial_scale_power": 0, "hysteresis": 1}})
    engine.module.blocks[1].register_full_backward_hook(lambda *_: (torch.full((1, 16), torch.inf).half(),))
    engine.backward(engine(torch.ones(1, 16)).float().mean())
    try:
        engine.step()
    except amp.MinimumLossScaleError as error:
        return str(error), engine.skipped_steps
    return None


def test_at_the_minimum_scale_the_error_names_the_parameter_and_suggests_bf16(run_ranks):
    for told, skipped in run_ranks(at_the_minimum, 2):
        assert "the gradient of blocks.0.0.weight is not finite" in told and "Use bf16" in told and skipped == 1


def fp16(hysteresis: int) -> dict:
    return {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": hysteresis, "auto_cast": True}}


NORMAL = ": normal at the start, until it has come down far enough"
OVERFLOWS = {"fp32": ({}, ""), "bf16": (HALF["bf16"], ""), "fp16": (fp16(1), "; loss scale 16, now 8" + NORMAL),
             "fp16, forgiving": (fp16(2), "; forgiven, the loss scale stays 16" + NORMAL)}


@on_ranks(2, stage=STAGES, precision=OVERFLOWS)
def test_an_overflow_changes_nothing_is_counted_and_is_told_once_in_every_precision(stage, precision):
    """An infinite gradient on rank 1 alone; the step after it is taken."""
    config, outcome = OVERFLOWS[precision]
    torch.manual_seed(0)
    engine = start(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)), stage, **config)
    before, told, handler = whole(engine.module), [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("engine").addHandler(handler)
    for factor in (float("inf") if dist.get_rank() == 1 else 1.0, 1.0):
        loss = engine(torch.ones(2, 6)).float().mean()
        engine.backward(loss * factor)
        engine.step()
        if engine.global_steps == 0:
            assert all(torch.equal(value, before[name]) for name, value in whole(engine.module).items())
    logging.getLogger("engine").removeHandler(handler)
    assert (engine.skipped_steps, engine.global_steps) == (1, 1)
    warning = f"step skipped, nothing was changed: the gradient of 0.weight is not finite{outcome} (1 skipped so far)"
    assert told == ([warning] if dist.get_rank() == 0 else [])


def test_bf16_takes_such_a_step_when_told_to(run_ranks):
    precision = {"bf16": {"enabled": True, "auto_cast": True, "check_grad_overflow": False}}
    ((same, skipped, *_), _), _ = run_ranks(overflowing, 2, precision, 1)
    assert (same, skipped) == (False, 0)


def steps_with(scale: float, stage: int, optimizer: dict, precision: dict):
    """Whether a step is taken whose gradients are ``scale``, its norm, and what clipping at 1.0 made of the weights."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 1, "optimizer": optimizer, "zero_optimization": {"stage": stage},
        **precision})
    engine.backward(engine(torch.full((1, 4), scale, dtype=model.weight.dtype)).sum())
    engine.step()
    return engine.was_step_applied(), engine.get_global_grad_norm(), zero.safe_get_full_fp32_param(model.weight)


@pytest.mark.parametrize("kind", [{"type": "SGD", "params": {"lr": 0.1}}, {"type": "SGD", "params": {
    "lr": 0.1, "momentum": 0.9}}])
def test_a_finite_gradient_is_no_overflow_however_large_its_square_is(run_ranks, kind):
    for stage in (0, 1, 3):
        for scale in (3e19, 1.6e38):  # the sum of the last has a norm that float32 does not hold
            for applied, norm, weight in run_ranks(steps_with, 2, scale, stage, kind, {}):
                assert applied and norm == pytest.approx(2 * scale, rel=1e-6), f"stage {stage}, {scale}: norm {norm}"
                assert torch.allclose(weight, torch.full((1, 4), -0.05), rtol=1e-3), f"stage {stage}, {scale}: {weight}"


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad", "RMSprop"])
def test_an_infinite_norm_is_clipped_as_by_pytorch_where_such_a_step_is_taken(run_ranks, kind):
    weight = nn.Parameter(torch.zeros(1, 4))
    optimizer = getattr(torch.optim, kind)([weight], lr=0.1)
    weight.grad = torch.full((1, 4), torch.inf)
    nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()
    precision = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    for stage in (0, 3):
        for applied, norm, ours in run_ranks(steps_with, 2, torch.inf, stage, {"type": kind, "params": {"lr": 0.1}},
                                             precision):
            assert applied and norm == torch.inf and torch.equal(ours.isnan(), weight.isnan()), f"stage {stage}: {ours}"


# --- The dynamic loss scale -------------------------------------------------------------------------------------------


TRACES = json.loads((Path(__file__).parent / "data" / "loss_scale_traces.json").read_text())["traces"]


def scaler_of(settings: dict) -> amp.LossScaler:
    precision = amp.Precision(amp.PrecisionConfig(fp16=amp.FP16Config(enabled=True, **settings)), torch.device("cpu"))
    return precision.make_scaler()


@pytest.mark.parametrize("trace", TRACES, ids=range(len(TRACES)))
def test_the_scale_is_deepspeeds_to_the_last_bit(trace):
    scaler, seen = scaler_of(trace["fp16"]), []
    for overflow in trace["overflow"]:
        seen.append(scaler.scale)
        try:
            scaler.update(overflow)
        except amp.MinimumLossScaleError:  # the traces were taken with this error switched off
            assert scaler.scale == trace["fp16"]["min_loss_scale"]
    assert seen == trace["scale_before_step"] and scaler.scale == trace["scale_after"]


def rule(overflows, power, window, hysteresis, consecutive, minimum):
    """The documented rule, from the whole history each time: the scale after it."""
    scale, left, since = 2.0 ** power, hysteresis, 0
    for overflow in overflows:
        if overflow and left == 1:
            scale = max(scale / 2, minimum)
        elif overflow:
            left -= 1
        grows = not overflow and since and since % window == 0
        left = hysteresis if grows or consecutive and not overflow else left
        scale, since = scale * (2 if grows else 1), 0 if overflow else since + 1
    return scale


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 16), st.integers(1, 6), st.integers(1, 4), st.booleans(),
       st.integers(0, 60))
def test_the_scale_follows_the_rule_also_when_it_is_resumed(overflows, power, window, hysteresis, consecutive, cut):
    settings = {"initial_scale_power": power, "loss_scale_window": window, "hysteresis": hysteresis,
                "consecutive_hysteresis": consecutive, "min_loss_scale": 2.0 ** -200}
    scaler = scaler_of(settings)
    for count, overflow in enumerate(overflows):
        if count == cut:
            state = json.loads(json.dumps(scaler.state_dict()))
            scaler = scaler_of(settings)
            scaler.load_state_dict(state)
        scaler.update(overflow)
    assert scaler.scale == rule(overflows, power, window, hysteresis, consecutive, 2.0 ** -200)


def test_a_fixed_scale_stays():
    scaler = scaler_of({"loss_scale": 128.0})
    scaler.update(True), scaler.update(False)
    assert scaler.scale == 128.0 and str(scaler) == "128"


# --- Casting, autocast, and the caller's own backward -----------------------------------------------------------------


def autocast_losses(ours: bool):
    torch.manual_seed(0)
    model, losses = Net(), []
    if ours:
        engine, *_ = deepspeed.initialize(model=model, config={
            "train_batch_size": 2, "optimizer": ADAM, "torch_autocast": {
                "enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["Linear"]}})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAM["params"]) if not ours else None
    for step in range(4):
        x = torch.randn(2, 16, generator=torch.Generator().manual_seed(step))
        if ours:
            loss = engine(x).float().square().mean()
            engine.backward(loss)
            engine.step()
        else:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_autocast_is_pytorchs(run_ranks):
    (ours,), (plain,) = run_ranks(autocast_losses, 1, True), run_ranks(autocast_losses, 1, False)
    assert ours == pytest.approx(plain, rel=1e-5)


def kept_in_fp32(name: str):
    model = Net()
    inside = []
    model.blocks[0][1].register_forward_hook(lambda _, args, out: inside.append((args[0].dtype, out.dtype)))
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_batch_size": 2, "optimizer": ADAM, **copy.deepcopy(HALF[name]),
        name: HALF[name][name] | {"keep_fp32": ["LayerNorm", "head"]}})
    out = engine(torch.ones(2, 16))
    engine.backward(out.float().mean())
    engine.step()
    return str(inside[0][0]), [str(p.dtype) for p in model.blocks[0].parameters()], str(model.head.weight.dtype), \
        str(out.dtype), engine.skipped_steps


@pytest.mark.parametrize("name, dtype", [("fp16", "torch.float16"), ("bf16", "torch.bfloat16")])
def test_chosen_modules_stay_in_fp32(run_ranks, name, dtype):
    (inside, block, head, out, skipped), = run_ranks(kept_in_fp32, 1, name)
    assert inside == "torch.float32" and block == [dtype] * 2 + ["torch.float32"] * 2 and head == "torch.float32"
    assert out == dtype and skipped == 0


def kept_twice(stage: int):
    """What leaves a block and the norm in it, where a pattern names both."""
    model, dtypes = Net(), []
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 2, "optimizer": ADAM, "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True, "keep_fp32": ["blocks.*"]}})
    for module in (model.blocks[1][1], model.blocks[1]):
        module.register_forward_hook(lambda _, args, out: dtypes.append(out.dtype))
    engine.backward(engine(torch.ones(2, 16, dtype=torch.bfloat16)).float().mean())
    engine.step()
    return dtypes, engine.was_step_applied()


def test_a_module_kept_in_fp32_inside_of_another_meets_fp32(run_ranks):
    for stage in (0, 3):
        for dtypes, applied in run_ranks(kept_twice, 2, stage):
            assert dtypes == [torch.float32, torch.bfloat16] and applied, f"stage {stage}"


class Timed(nn.Module):
    """A model of time steps, with frequencies in a buffer, as of rotary embeddings."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("frequencies", torch.tensor([1 / 3, 1.001, 999.0]))

    def forward(self, x, times):
        self.seen = x, times, self.frequencies
        return self.linear(x.to(self.linear.weight.dtype))


def seen_by_the_model(precision: dict):
    model = Timed()
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 3, "optimizer": ADAM, **precision})
    engine(torch.full((3, 4), 1 / 3), times=torch.tensor([999.0, 257.0, 501.0]))
    seen, engine.module.seen = model.seen, None
    estimate = deepspeed.estimate(Timed(), {key: precision.get(key, {}) for key in ("fp16", "bf16", "data_types")})
    return seen, model.linear.weight.dtype, sum(b.nbytes for b in model.buffers()) - estimate.bytes("buffers")


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_inputs_and_buffers_are_left_alone_unless_the_config_says_otherwise(run_ranks, name):
    plain = (torch.full((3, 4), 1 / 3), torch.tensor([999.0, 257.0, 501.0]), torch.tensor([1 / 3, 1.001, 999.0]))
    half = amp.NAMES[name]
    for more, inputs, buffers in (({}, torch.float32, torch.float32), ({"auto_cast": True}, half, torch.float32),
                                  ({"data_types": {"buffer_dtype": name, "param_dtype": name}}, torch.float32, half)):
        precision = {name: {"enabled": True, "auto_cast": more.get("auto_cast", False)},
                     "data_types": more.get("data_types", {})}
        (seen, compute, off), = run_ranks(seen_by_the_model, 1, precision)
        assert compute == half and off == 0, f"the estimate of buffers is off by {off} bytes with {more}"
        for got, given, dtype in zip(seen, plain, (inputs, inputs, buffers), strict=True):
            assert got.dtype == dtype and torch.equal(got, given.to(dtype)), f"{more}: {got} for {given}"


def mixed_up(name: str, module: str):
    """What PyTorch says when fp32 inputs meet 16-bit weights, or 16-bit inputs an fp32 buffer."""
    model = {"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "conv": nn.Conv1d(2, 4, 1), "rnn": nn.RNN(4, 4),
             "batchnorm": nn.BatchNorm1d(4)}[module]
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 2, "optimizer": ADAM, name: {"enabled": True}})
    x = torch.ones((2, 2, 4) if module in ("conv", "rnn") else (2, 4))
    try:
        engine(x.to(amp.NAMES[name]) if module == "batchnorm" else x)
    except (RuntimeError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_where_two_dtypes_meet_the_error_says_what_to_do(run_ranks, name):
    for module in ("linear", "norm", "conv", "rnn", "batchnorm"):
        (said,) = run_ranks(mixed_up, 1, name, module)
        for way_out in (f"{name}.auto_cast", "data_types.buffer_dtype", f"{name}.keep_fp32"):
            assert way_out in said, f"{module}: {said}"


def own_backward(stage: int, own: bool):
    torch.manual_seed(0)
    model = Net()
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "optimizer": ADAM,
        "zero_optimization": {"stage": stage}, **HALF["fp16"]})
    for step in range(4):
        loss = engine(torch.full((2, 16), 1.0 + step)).float().square().mean()
        engine.scale(loss).backward() if own else engine.backward(loss)
        engine.step()
    return [zero.safe_get_full_fp32_param(p) for p in model.parameters()]


def test_a_caller_may_run_backward_on_the_scaled_loss(run_ranks):
    for stage in range(4):
        a, b = (run_ranks(own_backward, 2, stage, own)[0] for own in (False, True))
        assert all(map(torch.equal, a, b)), f"stage {stage}"


def test_the_precision_in_force_is_told_in_a_table():
    model = Net()
    config = amp.PrecisionConfig(bf16=amp.BF16Config(enabled=True, keep_fp32=["blocks.*.1"]),
                                 communication_data_type=torch.bfloat16)
    precision = amp.Precision(config, torch.device("cpu"), [block[1] for block in model.blocks])
    header, half, full, last = precision.table(model, precision.make_scaler()).splitlines()
    assert header.split() == ["parameters", "compute", "masters,", "state", "accumulation", "reduction"]
    assert half.split() == ["884", "bf16", "fp32", "fp32", "bf16"]
    assert full.split() == ["96", "fp32", "fp32", "fp32", "bf16"]
    assert last == "autocast: off; loss scale: none; steps with gradients that are not finite are skipped"


def test_casting_reaches_into_containers_and_leaves_whole_numbers():
    pair = torch.ones(2), {"a": [torch.ones(1)], "b": torch.arange(2)}
    floats, nested = amp.cast(pair, torch.bfloat16)
    assert floats.dtype == nested["a"][0].dtype == torch.bfloat16 and nested["b"].dtype == torch.int64


def kept_for_backward_under_autocast(stage: int):
    """Gradients after backward twice, and bytes of weights, 16-bit copies included, that the graph keeps meanwhile."""
    torch.manual_seed(0)
    model, kept, pack = Net(), {}, zero._pack
    config = {"train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
              "torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": stage}}
    engine, *_ = deepspeed.initialize(model=model, config=config)

    def counting(tensor):
        saved = pack(tensor)
        if not isinstance(saved, zero.SavedWeight) and tensor.shape in [(16, 16), (4, 16)]:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return saved

    zero._pack = counting
    try:
        loss = engine(torch.ones(8, 16)).float().square().mean()
    finally:
        zero._pack = pack
    engine.backward(loss, retain_graph=True)
    engine.backward(loss)
    return sum(kept.values()), [zero.safe_get_full_grad(p) for p in model.parameters()]


def test_stage_3_keeps_no_16_bit_copies_of_weights_for_backward(run_ranks):
    for stage in (2, 3):
        results = run_ranks(kept_for_backward_under_autocast, 2, stage)
        whole = results[0][1] if stage == 2 else whole
        for kept, gradients in results:
            assert kept == 0, f"stage {stage}: {kept} bytes of weights"
            for index, (mine, theirs) in enumerate(zip(gradients, whole)):
                assert torch.equal(mine, theirs), f"stage {stage}: the gradient of parameter {index}"


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_autocast_beside_16_bit_weights_is_both(kind):
    """As in DeepSpeed: weights in 16 bits, and PyTorch chooses each operation's dtype."""
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1)), []
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    reference, plain = copy.deepcopy(model).to(dtype), torch.optim.SGD(masters, lr=0.1)
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    engine, *_ = deepspeed.initialize(model=model, config={
        "train_batch_size": 2, "gradient_clipping": 0.0, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        kind: {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": str(dtype)},
        "zero_optimization": {"stage": 1}})
    x = torch.randn(2, 4)  # fp32: without autocast the weights' dtype would not fit it
    for _ in range(3):
        engine.backward(engine(x).float().square().mean())
        engine.step()
        with torch.autocast("cpu", dtype):
            loss = reference(x).float().square().mean()
        (loss * engine.loss_scale()).backward()
        for master, p in zip(masters, reference.parameters()):
            master.grad, p.grad = p.grad.float() / engine.loss_scale(), None
        plain.step()
        for master, p in zip(masters, reference.parameters()):
            p.data.copy_(master.data)
    assert set(seen) == {dtype} == {p.dtype for p in model.parameters()}
    for p, master in zip(model.parameters(), masters):
        torch.testing.assert_close(zero.safe_get_full_fp32_param(p), master.detach(), atol=1e-6, rtol=1e-6)
    engine.destroy()


# --- Wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, told", [
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled; allowed: one of them"),
    ({"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}},
     "data_types.param_dtype is torch.float16; allowed: bf16"),
    ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype is torch.bfloat16; allowed: fp32"),
    ({"data_types": {"buffer_dtype": "int8"}}, "data_types.buffer_dtype is 'int8'; allowed: fp32, .* or null"),
    ({"bf16": {"enabled": True, "loss_scale": 1}}, "bf16.loss_scale is 1; allowed: 0 or null"),
    ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale is -1; allowed: 0 or a number"),
    ({"fp16": {"loss_scale_window": 0}}, "fp16.loss_scale_window is 0"),
    ({"fp16": {"hysteresis": 0}}, "fp16.hysteresis is 0; allowed: a whole number from 1 up"),
    ({"fp16": {"min_loss_scale": 0}}, "fp16.min_loss_scale is 0; allowed: a number above 0"),
    ({"fp16": {"enabled": True, "min_loss_scale": 4, "initial_scale_power": 1}},
     "min_loss_scale is 4.0; allowed: at most"),
    ({"fp16": {"enable": True}}, "unknown key fp16.enable, .* did you mean 'enabled'"),
    ({"fp16": {"enabled": 2}}, "fp16.enabled is 2; allowed: true or false"),
    ({"bf16": {"bf16_optimizer_states": True}}, "bf16_optimizer_states is True; allowed: the value of"),
    ({"torch_autocast": {"dtype": "int8"}}, "torch_autocast.dtype is 'int8'; allowed: .*bf16.*bfloat16"),
    ({"data_types": {"grad_accum_dtype": "fp8"}}, "data_types.grad_accum_dtype is 'fp8'; allowed: fp32, fp16, bf16"),
    ({"communication_data_type": "half"}, "communication_data_type is 'half'"),
    ({"gradient_allreduce_op": "max"}, "gradient_allreduce_op is 'max'; allowed: mean or sum"),
    ({"bf16": {"enabled": True, "keep_fp32": ["Norm"]}},
     "bf16.keep_fp32 has 'Norm', which no module matches"),
])
def test_contradictions_are_refused_by_key(change, told):
    with pytest.raises(ValueError, match=told):
        deepspeed.initialize(model=Net(), config={"train_batch_size": 8, "optimizer": ADAM} | change)
    assert not dist.is_initialized() and issubclass(ConfigError, ValueError)
