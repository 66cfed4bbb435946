"""Optimizers that need whole parameters, and those of this project: plain PyTorch's numbers at any stage; by name.

    .venv/bin/python -m pytest -q tests/test_optimizers.py
    .venv/bin/python -m pytest -q tests/test_optimizers.py --long     many more draws
"""

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import engine as deepspeed
from conftest import on_ranks
from oracle import WIDTH, Mlp, Pair, assert_alike, assert_equal, draws, fitting, plain, read_drawn, square, start, \
    start_drawn, train_drawn, twins
from test_zero import collectives

# --- The optimizers, as plainly as the papers have them ---------------------------------------------------------------


class PlainLion(torch.optim.Optimizer):
    """Line by line from algorithm 2 of arXiv 2302.06675; beta2 is by default DeepSpeed's."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].get("m", torch.zeros_like(p))
                c = 0.9 * m + 0.1 * p.grad
                p.copy_(p - group["lr"] * (torch.sign(c) + group["decay"] * p))
                self.state[p]["m"] = 0.999 * m + 0.001 * p.grad


class PlainLamb(torch.optim.Optimizer):
    """Line by line from algorithm 2 of arXiv 1904.00962."""

    def __init__(self, params, lr, weight_decay=0.0, eps=1e-8, inside=False, corrects=True, most=10.0):
        super().__init__(params, {"lr": lr, "decay": weight_decay, "eps": eps})
        self.inside, self.corrects, self.most = inside, corrects, most

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                t, m, v = self.state[p].get("all", (0, torch.zeros_like(p), torch.zeros_like(p)))
                t, m, v = t + 1, 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad ** 2
                self.state[p]["all"] = t, m, v
                if self.corrects:
                    m, v = m / (1 - 0.9 ** t), v / (1 - 0.999 ** t)
                root = (v + group["eps"]).sqrt() if self.inside else v.sqrt() + group["eps"]
                r = m / root + group["decay"] * p
                ratio = float(p.norm() / r.norm()) if p.norm() > 0 and r.norm() > 0 else 1.0
                p.copy_(p - group["lr"] * (min(max(ratio, 0.01), self.most) if ratio != 1.0 else 1.0) * r)


class PlainMuon:
    """Two optimizers of PyTorch's: for the matrices between embedding and head, and for the rest."""

    def __init__(self, model: nn.Module) -> None:
        hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith(("blocks", "never"))]
        rest = [p for p in model.parameters() if not any(p is other for other in hidden)]
        self.parts = [torch.optim.Muon(hidden, lr=0.05, weight_decay=0.1, momentum=0.9),
                      torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-10)]

    def step(self) -> None:
        for part in self.parts:
            part.step()


class Lars(torch.optim.Optimizer):
    """A client's optimizer, about which nothing is known: its rate goes by the norms of a whole parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.mul_(0.9).add_(p.grad)
                    p.sub_(momentum, alpha=group["lr"] * float(p.norm() / (momentum.norm() + 1e-3)))


def lars(draw: dict, model: nn.Module) -> Lars:
    return Lars(model.parameters())


def muon(draw: dict, model: nn.Module) -> torch.optim.Muon:
    return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.05)


LION, LAMB = {"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.1, "max_coeff": 3.0}
# By kind: the config's section, or what makes a client's; and the same in plain PyTorch.
KINDS: dict[str, tuple[Any, Callable]] = {
    "Lion": ({"type": "Lion", "params": LION}, lambda draw, model: PlainLion(model.parameters(), **LION)),
    "Lamb": ({"type": "Lamb", "params": LAMB},
             lambda draw, model: PlainLamb(model.parameters(), lr=0.02, weight_decay=0.1, most=3.0)),
    "FusedLamb": ({"type": "FusedLamb", "params": {"lr": 0.02, "eps_inside_sqrt": True, "bias_correction": False}},
                  lambda draw, model: PlainLamb(model.parameters(), lr=0.02, inside=True, corrects=False)),
    "Muon": ({"type": "Muon", "params": {"muon_lr": 0.05, "adam_lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}},
             lambda draw, model: PlainMuon(model)),
    "Adafactor": ({"type": "Adafactor", "params": {"lr": 0.05}},
                  lambda draw, model: torch.optim.Adafactor(model.parameters(), lr=0.05)),
    "a client's LARS": (lars, lars), "a client's Muon": (muon, muon)}
TENSORS = {"Lion": 1, "Lamb": 2, "FusedLamb": 2, "a client's LARS": 1, "a client's Muon": 1}  # of a parameter's size


def trained(kind: str, draw: dict, stage: int) -> tuple:
    """Norms, weights and no state; elements of the optimizer's state here, as they should be; parameters' here."""
    with collectives(late=False) if draw["native"] else nullcontext():
        engine = start_drawn(draw, stage, KINDS[kind][0])
        norms = train_drawn(engine, draw)
        state, groups, buckets = engine.optimizer.state, engine.optimizer.param_groups, engine.zero.trained
        for index in engine.zero.whole:
            shapes = {slot.shape for bucket in buckets for slot in bucket.slots if slot.group == index}
            assert all(p.shape in shapes for p in groups[index]["params"]), f"{kind}: group {index} has pieces"
        held = sum(v.numel() for s in state.values() for k, v in s.items() if isinstance(v, Tensor) and k != "step")
        expected = elements = 0
        for bucket in buckets:
            for slot in bucket.slots:
                tensors = TENSORS.get(kind, 2 - groups[slot.group].get("use_muon", 0))
                here = max(0, min(bucket.own.stop, slot.end) - max(bucket.own.start, slot.offset))
                elements += here
                if "never" not in slot.name:  # which never had a gradient
                    expected += tensors * here
        weights, _ = read_drawn(engine, draw)
        engine.destroy()
    return norms, weights, held, expected, elements


def drawn(kind: str) -> st.SearchStrategy:
    """fp64 without param groups, since what is drawn is the optimizer's own."""
    offload = [{}, {}, {"offload_optimizer": {"device": "cpu"}}]
    return st.tuples(draws(), st.sampled_from(offload), st.booleans()).map(lambda all_: all_[0] | {
        "offload": all_[1], "native": all_[2], "dtype": torch.float64, "state": [], "mixed": False, "frozen": False,
        "odd": all_[0]["odd"] and kind != "Adafactor",  # PyTorch's divides by the number of elements
        "clip": all_[0]["clip"] if kind != "a client's Muon" else 0.0})


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 3), st.integers(1, 4), st.data())
@settings(phases=[Phase.generate], max_examples=settings().max_examples // 4)  # shrinking would restart processes
def test_an_optimizer_has_plain_pytorchs_numbers_at_any_stage(run_ranks, kind, stage, ranks, data):
    draw = fitting(data.draw(drawn(kind)), ranks)
    reference, results = plain(draw, ranks, KINDS[kind][1]), run_ranks(trained, ranks, kind, draw, stage)
    case = f"{kind}, stage {stage}, {ranks} ranks"
    for norms, weights, held, expected, _ in results:
        norms = reference[0] if kind == "a client's Muon" else norms  # plain PyTorch's has all parameters
        assert_equal((norms, weights, {}), reference, 1e-10, case)
        assert kind == "Adafactor" or held == expected, f"{case}: the state is that of the rank's own pieces"
    whole = max(elements for *_, elements in results)
    total = sum(elements for *_, elements in results) // (1 if stage else ranks)
    assert total == sum(w.numel() for w in reference[1].values() if kind != "a client's Muon" or w.dim() == 2), case
    assert whole < total if stage and ranks > 1 else whole == total, f"{case}: nobody has all"


def saved(folder: str, kind: str, draw: dict, stage: int) -> tuple[dict, dict]:
    """Weights when they were saved, and after more steps."""
    engine = start_drawn(draw, stage, KINDS[kind][0])
    train_drawn(engine, draw, 2)
    engine.save_checkpoint(folder)
    weights, _ = read_drawn(engine, draw)
    train_drawn(engine, draw, 2)
    return weights, read_drawn(engine, draw)[0]


def resumed(folder: str, kind: str, draw: dict, stage: int) -> tuple[dict, dict]:
    engine = start_drawn(draw, stage, KINDS[kind][0])
    train_drawn(engine, draw, 1)  # what was there before must not matter
    engine.load_checkpoint(folder)
    weights, _ = read_drawn(engine, draw)
    train_drawn(engine, draw, 2)
    return weights, read_drawn(engine, draw)[0]


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.data())
@settings(phases=[Phase.generate], max_examples=settings().max_examples // 6)
def test_it_resumes_at_another_stage_and_number_of_ranks(run_ranks, kind, stage, ranks, then, others, data):
    """To the bit where the sums are taken in the same order; else as close as they are."""
    draw = data.draw(drawn(kind))
    # An odd block's mean is over a rank's rows, and rank 0's rows alone use the uneven layer.
    draw |= {key: draw[key] and ranks == others for key in ("odd", "uneven")}
    with tempfile.TemporaryDirectory() as folder:
        (weights, after), *_ = run_ranks(saved, ranks, folder, kind, fitting(draw, ranks), stage)
        for loaded, then_after in run_ranks(resumed, others, folder, kind, fitting(draw, others), then):
            case = f"{kind}, from stage {stage} of {ranks} to stage {then} of {others}"
            assert_equal(([], loaded, {}), ([], weights, {}), 0, f"{case}, loaded")
            tolerance = 0 if (stage, ranks) == (then, others) else 1e-10
            assert_equal(([], then_after, {}), ([], after, {}), tolerance, f"{case}, trained on")


@on_ranks(3)
def test_at_stage_0_the_last_elements_count_and_are_saved(tmp_path):
    """Of a matrix whose elements three ranks do not divide."""
    pair = Pair(lambda: nn.Linear(8, 8, bias=False), 0, Lars, gradient_clipping=1.0)
    pair.train(0)
    assert abs(pair.engine.get_global_grad_norm() - pair.norm) < 1e-12
    pair.engine.save_checkpoint(tmp_path)
    pair.model.weight.data.fill_(7.0)
    pair.engine.load_checkpoint(tmp_path)
    pair.check()


@on_ranks(2)
def test_an_unknown_optimizer_may_be_vouched_for_and_a_known_one_knows_better():
    for make, known in ((Lars, False), (deepspeed.Lamb, True)):
        engine = start(Mlp(), 2, make)  # which says zero_allow_untested_optimizer
        assert bool(engine.zero.whole) == known
        engine.destroy()


# --- By name, in a config ---------------------------------------------------------------------------------------------


def built(name: str, model: nn.Module | None = None, parameters: Any = None, **params: Any) -> torch.optim.Optimizer:
    model = model or nn.Linear(2, 2)
    return deepspeed.build_optimizer(deepspeed.OptimizerConfig(name, params), parameters or model.parameters(),
                                     torch.device("cpu"), model)


@pytest.mark.parametrize("name, params, cls, holds, logs", [
    ("Adam", {}, torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}, False),
    ("AdamW", {}, torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}, False),
    ("Adam", {"adam_w_mode": False}, torch.optim.Adam, {"weight_decay": 0.0}, False),
    ("AdamW", {"torch_adam": True}, torch.optim.AdamW, {"weight_decay": 0.01}, False),
    ("adam", {"torch_adam": True, "adam_w_mode": False, "betas": [0.5, 0.6]}, torch.optim.Adam,
     {"betas": (0.5, 0.6)}, False),
    ("AdamW", {"foreach": True}, torch.optim.AdamW, {"foreach": True, "fused": None}, False),
    *((name, {"adam_w_mode": mode}, cls, {"weight_decay": 0.0, "fused": True}, True)
      for name in ("FusedAdam", "cpuadam", "DeepSpeedCPUAdam")
      for mode, cls in ((True, torch.optim.AdamW), (False, torch.optim.Adam))),
    ("SGD", {"momentum": 0.5}, torch.optim.SGD, {"momentum": 0.5, "fused": None}, False),
    ("SGD", {}, torch.optim.SGD, {"momentum": 0, "fused": True}, False),
    ("RMSprop", {"centered": 1, "lr": "0.1"}, torch.optim.RMSprop, {"centered": True, "lr": 0.1}, False),
    ("LION", {"betas": ["0.5", 0.6]}, deepspeed.Lion, {"betas": [0.5, 0.6]}, False),
    ("LAMB", {}, deepspeed.Lamb, {}, False),
    ("FusedLamb", {}, deepspeed.Lamb, {}, True), ("muon", {}, deepspeed.Muon, {}, False),
    ("Adagrad", {}, torch.optim.Adagrad, {"fused": True}, False)])
def test_optimizers_by_name(name, params, cls, holds, logs, caplog):
    """The log says once what takes the place of a kernel of DeepSpeed's."""
    optimizer = built(name, **params)
    assert type(optimizer) is cls
    assert {key: optimizer.param_groups[0][key] for key in holds} == holds
    assert len(caplog.records) == logs and all(cls.__name__ in record.getMessage() for record in caplog.records)


def test_lambs_norm_is_the_configs_clipping():
    section = {"type": "FusedLamb", "params": {"lr": 0.1, "max_grad_norm": 0.5}}
    config = deepspeed.load_config({"train_batch_size": 1, "optimizer": section, "gradient_clipping": 0.5})
    assert "max_grad_norm" not in config.optimizer.params


def test_muon_takes_hidden_matrices_alone_and_each_parameter_may_say_otherwise():
    model = nn.ModuleDict({"token": nn.Embedding(5, 4), "patch_embed": nn.Linear(4, 4), "body": nn.Linear(4, 4),
                           "conv": nn.Conv1d(4, 4, 1), "heads": nn.Linear(4, 4), "lm_head": nn.Linear(4, 5)})
    taken = {"body.weight", "heads.weight"}

    def split(optimizer: torch.optim.Optimizer) -> dict[bool, set[str]]:
        names = {id(p): name for name, p in model.named_parameters()}
        return {use: {names[id(p)] for group in optimizer.param_groups if group["use_muon"] is use
                      for p in group["params"]} for use in (True, False)}

    everything = {name for name, _ in model.named_parameters()}
    assert split(built("Muon", model)) == {True: taken, False: everything - taken}
    model["heads"].weight.use_muon, model["lm_head"].weight.use_muon = False, True
    taken = {"body.weight", "lm_head.weight"}
    assert split(built("Muon", model)) == {True: taken, False: everything - taken}
    groups = [{"params": list(model["body"].parameters()), "lr": 0.5}, {"params": list(model["lm_head"].parameters())}]
    optimizer = built("Muon", model, groups, lr=0.1, adam_lr=0.01)
    rates = [(group["use_muon"], group["lr"]) for group in optimizer.param_groups]
    assert rates == [(True, 0.5), (False, 0.5), (True, 0.1), (False, 0.01)]
    assert [group["lr"] for group in built("Muon", nn.Linear(2, 2)).param_groups] == [0.02, 3e-4]
    model["lm_head"].bias.use_muon = True
    with pytest.raises(deepspeed.ConfigError, match=r"use_muon of the parameter lm_head.bias of shape \(5,\) is True"):
        built("Muon", model)
    said = [{"params": list(model["body"].parameters())[:1], "use_muon": 0}]
    assert [group["use_muon"] is False for group in deepspeed.muon_groups(said, model)] == [True]
    empty = type("Empty", (nn.Linear,), {"__len__": lambda self: 0})(2, 2)  # counts as False
    empty.weight, empty.head = None, nn.Linear(2, 2, bias=False)
    assert [group["use_muon"] for group in deepspeed.muon_groups(empty.parameters(), empty)] == [False]
    with pytest.raises(ValueError, match="a param group of Muon has use_muon 'yes'"):
        deepspeed.Muon([{"params": [torch.ones(2, 2)], "use_muon": "yes"}])
    with pytest.raises(ValueError, match="a param group of Muon has no use_muon"):
        deepspeed.Muon(model.parameters())


@pytest.mark.parametrize("name", ["Lion", "Lamb", "Muon"])
def test_in_plain_pytorch_it_is_one_optimizer_that_schedules_copies_and_resumes(name):
    def loss(model: nn.Module) -> torch.Tensor:
        model.zero_grad()
        value = square(model, torch.ones(1, WIDTH).double())
        value.backward()
        return value.detach()

    model, twin = twins(Mlp)
    optimizer, other = built(name, model, lr=0.01), built(name, twin, lr=0.7)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert float(optimizer.step(lambda: loss(model))) > 0, "a closure's loss comes back"
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.005}
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (twin, other)):
        loss(each)
        its.step()
    assert_alike(model.state_dict(), twin.state_dict())
    assert all("fused" not in group or group["fused"] for group in optimizer.param_groups)
