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
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": options.pop("optimizer", {"type": "SGD", "params": {"lr": 0.0}}),
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


@pytest.mark.parametrize("options", [{}, {"bf16": {"enabled": True, "auto_cast": True}},
                                     {"offload": {"device": "cpu"}}], ids=["fp32", "bf16", "offload"])
def test_what_a_script_writes_between_steps_is_not_undone_by_the_next(run_ranks, options):
    for stage in range(4):
        for largest in run_ranks(clamped, 2, stage, options):
            assert largest <= 0.01001, f"stage {stage}: the largest weight is {largest:.3g}"


def saved(stage: int, folder: str) -> float:
    """A write in place just before a save, in bf16: the largest difference from it after loading."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    engine = start(model, stage, bf16={"enabled": True, "auto_cast": True})
    engine.backward(engine(torch.ones(4, 4)).sum())
    engine.step()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    assert float((zero.safe_get_full_fp32_param(model.weight) - 0.5).abs().max()) == 0
    with torch.no_grad():
        model.bias.fill_(0.25)
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    return float((zero.safe_get_full_fp32_param(model.bias) - 0.25).abs().max())


def test_what_was_written_just_before_is_saved(run_ranks, tmp_path):
    for stage in range(3):
        assert run_ranks(saved, 2, stage, str(tmp_path / str(stage))) == [0.0, 0.0], f"stage {stage}"


class Clamps(nn.Module):
    """Writes into a child's weight from the parent's forward."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        with torch.no_grad():
            self.blocks[0][0].weight.clamp_(-0.01, 0.01)
        return x


def clamped_by_parent(stage: int) -> float:
    torch.manual_seed(0)
    engine = start(Clamps(), stage)
    engine.backward(engine(torch.ones(4, 4)).sum())
    engine.step()
    return float(zero.safe_get_full_fp32_param(engine.module.blocks[0][0].weight).abs().max())


def test_what_a_parent_writes_into_a_childs_weight_stays(run_ranks):
    for stage in range(4):
        for largest in run_ranks(clamped_by_parent, 2, stage):
            assert largest <= 0.01001, f"stage {stage}: the largest weight is {largest:.3g}"


def read_by_numpy() -> float:
    """A numpy array of a gathered weight keeps its memory; training goes on."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
    engine = start(model, 3)
    with zero.GatheredParameters(model.parameters()):
        arrays = [p.detach().numpy() for p in model.parameters()]
    for _ in range(2):
        engine.backward(engine(torch.ones(4, 4)).sum())
        engine.step()
    whole = [zero.safe_get_full_fp32_param(p).numpy() for p in model.parameters()]
    return max(float(abs(a - b).max()) for a, b in zip(arrays, whole))


def test_a_gathered_weight_may_be_read_by_numpy(run_ranks):
    assert run_ranks(read_by_numpy, 2) == [0.0, 0.0]


def thawed_and_resumed(stage: int, folder: str) -> float:
    """The step count of a layer that was frozen at first, after a resume in which it is thawed before loading."""
    counts = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
        model[0].requires_grad_(False)
        engine = start(model, stage, bf16={"enabled": True, "auto_cast": True},
                       optimizer={"type": "AdamW", "params": {"lr": 0.01}})
        model[0].requires_grad_(True)
        if resumed:
            engine.load_checkpoint(folder)
        for _ in range(1 if resumed else 3):
            engine.backward(engine(torch.ones(4, 4)).float().square().sum())
            engine.step()
        if not resumed:
            engine.save_checkpoint(folder)
        counts.append(float(zero.safe_get_full_optimizer_state(model[0][0].weight, "step")))
        engine.destroy()
    return counts[1] - counts[0]


def test_a_thawed_layers_state_is_resumed(run_ranks, tmp_path):
    for stage in (1, 3):
        assert run_ranks(thawed_and_resumed, 2, stage, str(tmp_path / str(stage))) == [1.0, 1.0], f"stage {stage}"


def loaded(stage: int) -> float:
    """Plain load_state_dict between steps, in bf16 with fp32 masters: the largest difference after a step at rate 0."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    engine = start(model, stage, bf16={"enabled": True, "auto_cast": True})
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
