"""Weights that the model or the script writes in place stay written, at every stage and precision.

    .venv/bin/python -m pytest -q tests/test_writes.py
"""

import pytest
import torch
from torch import nn

import engine as deepspeed
import zero


class Lookup(nn.Module):
    """Renormalizes rows of its own weight in forward."""

    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Embedding(4, 3, max_norm=0.1), nn.Linear(3, 1)

    def forward(self, ids):
        return self.head(self.rows(ids))


def start(model: nn.Module, stage: int, **options):
    return deepspeed.initialize(model=model, config={
        "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "zero_optimization": {"stage": stage, "offload_optimizer": options.pop("offload", {})}, **options})[0]


def renormalized(stage: int) -> float:
    torch.manual_seed(0)
    engine = start(Lookup(), stage)
    engine.backward(engine(torch.arange(4)).sum())
    engine.step()
    return float(zero.safe_get_full_fp32_param(engine.module.rows.weight).norm(dim=1).max())


def test_what_a_model_writes_into_its_weights_in_forward_stays(run_ranks):
    for stage in range(4):
        for norm in run_ranks(renormalized, 2, stage):
            assert norm <= 0.1 + 1e-6, f"stage {stage}: the longest row is {norm:.3g}"


def clamped(stage: int, options: dict) -> float:
    """WGAN's clipping of weights between steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    engine = start(model, stage, **options)
    for _ in range(2):
        engine.backward(engine(torch.ones(4, 4)).sum())
        engine.step()
        with torch.no_grad(), zero.GatheredParameters(model.parameters(), modifier_rank=0 if stage == 3 else None):
            for p in model.parameters():
                p.clamp_(-0.01, 0.01)
    engine.backward(engine(torch.ones(4, 4)).sum())
    engine.step()
    return max(float(zero.safe_get_full_fp32_param(p).abs().max()) for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"bf16": {"enabled": True}}, {"offload": {"device": "cpu"}}],
                         ids=["fp32", "bf16", "offload"])
def test_what_a_script_writes_between_steps_is_not_undone_by_the_next(run_ranks, options):
    for stage in range(4):
        for largest in run_ranks(clamped, 2, stage, options):
            assert largest <= 0.01001, f"stage {stage}: the largest weight is {largest:.3g}"


def loaded(stage: int) -> float:
    """Plain load_state_dict between steps, in bf16 with fp32 masters: the largest difference after a step at rate 0."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    engine = start(model, stage, bf16={"enabled": True})
    engine.backward(engine(torch.ones(4, 4)).sum())
    engine.step()
    state = {name: torch.full_like(p, 0.5) for name, p in model.state_dict().items()}
    model.load_state_dict(state)
    engine.backward(engine(torch.ones(4, 4)).sum())
    engine.step()
    return max(float((zero.safe_get_full_fp32_param(p) - 0.5).abs().max()) for p in model.parameters())


def test_a_state_dict_that_is_loaded_after_initialize_stays(run_ranks):
    for stage in range(3):
        assert run_ranks(loaded, 2, stage) == [0.0, 0.0], f"stage {stage}"


def refused(kind: str) -> str:
    model = {"script": lambda: torch.jit.script(nn.Linear(3, 1)), "lazy": lambda: nn.LazyLinear(3)}[kind]()
    with pytest.raises(ValueError) as error:
        start(model, 0)
    return str(error.value)


def test_scripted_and_lazy_models_are_refused_by_name(run_ranks):
    assert "model is a ScriptModule" in run_ranks(refused, 1, "script")[0]
    assert "weight has no shape yet; run a lazy model once" in run_ranks(refused, 1, "lazy")[0]
