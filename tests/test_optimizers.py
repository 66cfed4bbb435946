"""Optimizers by name, and those that look at whole parameters: plain PyTorch's numbers at any stage.

    .venv/bin/python -m pytest -q tests/test_optimizers.py
    .venv/bin/python -m pytest -q tests/test_optimizers.py --long     many more draws
"""

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import engine as deepspeed
import zero

ROWS = 12  # of a whole batch: 1 to 4 ranks, and 1 or 2 micro-batches for 1, 2 and 3 of them


class Net(nn.Module):
    """Embedding, hidden matrices and head, biases, a convolution, what is unused, frozen or empty."""

    def __init__(self):
        super().__init__()
        self.token, self.conv = nn.Embedding(7, 6), nn.Conv1d(2, 2, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 7, bias=False)
        self.blocks[1][0].bias.requires_grad_(False)
        self.never, self.empty = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(0, 6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for block in self.blocks:
            x = x + block(x)
        x = self.conv(x.view(-1, 2, 3)).view(-1, 6)
        return self.head(self.norm(x) + (x @ self.empty.t()).sum())


def net(kind: str = "") -> Net:
    torch.manual_seed(0)
    model = Net().double()
    model.empty.requires_grad_(kind != "Adafactor")  # PyTorch's divides by the number of elements
    return model


# --- The optimizers, as plainly as the papers have them ---------------------------------------------------------------


class PlainLion(torch.optim.Optimizer):
    """Line by line from algorithm 2 of arXiv 2302.06675."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].get("m", torch.zeros_like(p))
                c = 0.9 * m + 0.1 * p.grad
                p.copy_(p - group["lr"] * (torch.sign(c) + group["decay"] * p))
                self.state[p]["m"] = 0.99 * m + 0.01 * p.grad


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
    """Two optimizers of PyTorch's, over parameters that are named here one by one."""

    def __init__(self, model: nn.Module):
        hidden = {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in (0, 2)} | {"never", "empty"}
        named = dict(model.named_parameters())
        assert hidden <= named.keys()
        self.parts = [
            torch.optim.Muon([named[name] for name in sorted(hidden)], lr=0.05, weight_decay=0.1, momentum=0.9),
            torch.optim.AdamW([p for name, p in named.items() if name not in hidden], lr=0.01, weight_decay=0.1,
                              betas=(0.9, 0.95), eps=1e-10)]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


class Lars(torch.optim.Optimizer):
    """A client's optimizer, about which nothing is known: its rate goes by the norms of a whole parameter."""

    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.mul_(0.9).add_(p.grad)
                    p.sub_(momentum, alpha=group["lr"] * float(p.norm() / (momentum.norm() + 1e-3)))


LION, LAMB = {"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.1, "max_coeff": 3.0}
# By kind: the config's section, or a client's class; and the same in plain PyTorch.
KINDS: dict[str, tuple[Any, Any]] = {
    "Lion": ({"type": "Lion", "params": LION}, lambda model: PlainLion(model.parameters(), **LION)),
    "Lamb": ({"type": "Lamb", "params": LAMB},
             lambda model: PlainLamb(model.parameters(), lr=0.02, weight_decay=0.1, most=3.0)),
    "FusedLamb": ({"type": "FusedLamb", "params": {"lr": 0.02, "eps_inside_sqrt": True, "bias_correction": False}},
                  lambda model: PlainLamb(model.parameters(), lr=0.02, inside=True, corrects=False)),
    "Muon": ({"type": "Muon", "params": {"muon_lr": 0.05, "adam_lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}},
             PlainMuon),
    "Adafactor": ({"type": "Adafactor", "params": {"lr": 0.05}},
                  lambda model: torch.optim.Adafactor(model.parameters(), lr=0.05)),
    "a client's LARS": (Lars, lambda model: Lars(model.parameters())),
    "a client's Muon": (torch.optim.Muon, torch.optim.Muon)}
TENSORS = {"Lion": 1, "Lamb": 2, "FusedLamb": 2, "a client's LARS": 1, "a client's Muon": 1}  # of a parameter's size


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 7, (ROWS,), generator=generator), torch.randint(0, 7, (ROWS,), generator=generator)


def plain(kind: str, steps: int) -> dict[str, Tensor]:
    """The weights after each step of plain PyTorch's loop on the whole batch."""
    model = net(kind)
    optimizer = torch.optim.Muon(matrices(model), lr=0.05) if kind == "a client's Muon" else KINDS[kind][1](model)
    for step in range(steps):
        ids, targets = batch_of(step)
        nn.functional.cross_entropy(model(ids), targets).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad and (
            kind != "a client's Muon" or p.dim() == 2)], 1.0)
        optimizer.step(), model.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def without_exchange(prepare: Any) -> Any:
    """Make a communicator use PyTorch's collectives, as with NCCL, in place of the exchange between gloo ranks."""
    return lambda self, rank, world_size, device, direct: prepare(self, rank, world_size, device, direct=False)


def start(kind: str, stage: int, how: dict[str, Any]):
    with pytest.MonkeyPatch.context() as patch:
        if how["native"]:
            patch.setattr(zero.Communicator, "_prepare", without_exchange(zero.Communicator._prepare))
        return started(kind, stage, how)


def started(kind: str, stage: int, how: dict[str, Any]):
    model, choice = net(kind), KINDS[kind][0]
    config = {"train_batch_size": ROWS, "gradient_accumulation_steps": how["micro_batches"], "zero_optimization": {
        "stage": stage, "reduce_bucket_size": how["bucket"],
        "offload_optimizer": {"device": "cpu" if how["offload"] else "none"}}}
    if isinstance(choice, dict):
        return deepspeed.initialize(model=model, config=config | {"optimizer": choice})[0]
    optimizer = Lars(model.parameters()) if choice is Lars else choice(matrices(model), lr=0.05)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, steps: range, micro_batches: int) -> dict[str, Tensor]:
    rows = ROWS // dist.get_world_size()
    mine = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    for step in steps:
        ids, targets = batch_of(step)
        for part in zip(ids[mine].chunk(micro_batches), targets[mine].chunk(micro_batches)):
            engine.backward(nn.functional.cross_entropy(engine(part[0]), part[1]))
            engine.step()
    return weights_of(engine)


def weights_of(engine: Any) -> dict[str, Tensor]:
    return {name: zero.safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], what: str, tolerance: float = 1e-10) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = float((mine[name] - value).abs().max()) if value.numel() else 0.0
        assert difference <= tolerance, f"{what}: {name} differs by {difference:.3g}"


# --- Equal to plain PyTorch, sharded, and saved -----------------------------------------------------------------------


def trained(kind: str, stage: int, how: dict[str, Any]) -> tuple[dict[str, Tensor], int, int, int]:
    """Weights after training; elements of the optimizer's state here, as they should be; parameters' elements here."""
    engine = start(kind, stage, how)
    weights = train(engine, range(3), how["micro_batches"])
    state, groups, buckets = engine.optimizer.state, engine.optimizer.param_groups, engine.zero.trained
    for index in engine.zero.whole:
        shapes = {slot.shape for bucket in buckets if bucket.group == index for slot in bucket.slots}
        assert all(p.shape in shapes for p in groups[index]["params"]), f"{kind}: group {index} has pieces of matrices"
    held = sum(v.numel() for s in state.values() for v in s.values() if isinstance(v, Tensor) and v.dim())
    expected = elements = 0
    for bucket in buckets:
        tensors = TENSORS.get(kind, 2 - groups[bucket.group].get("use_muon", 0))
        for slot in bucket.slots:
            here = max(0, min(bucket.own.stop, slot.end) - max(bucket.own.start, slot.offset))
            elements += here
            expected += tensors * here * (slot.name != "never")  # which never had a gradient
    engine.destroy()
    return weights, held, expected, elements


HOW = st.fixed_dictionaries({
    "micro_batches": st.sampled_from([1, 1, 2]), "bucket": st.sampled_from([1, 100, 300, "auto"]),
    "offload": st.sampled_from([False, False, True]), "native": st.booleans()})


def fitting(how: dict[str, Any], ranks: int) -> dict[str, Any]:
    return how | {"micro_batches": how["micro_batches"] if ranks < 4 else 1}


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 3), st.integers(1, 4), HOW)
@settings(phases=[Phase.generate], max_examples=settings().max_examples // 4)  # shrinking would restart processes
def test_an_optimizer_has_plain_pytorchs_numbers_at_any_stage(run_ranks, kind, stage, ranks, how):
    results, expected = run_ranks(trained, ranks, kind, stage, fitting(how, ranks)), plain(kind, 3)
    case = f"{kind}, stage {stage}, {ranks} ranks, {how}"
    for weights, held, expected_state, _ in results:
        assert_close(weights, expected, case)
        assert kind == "Adafactor" or held == expected_state, f"{case}: the state is that of the rank's own pieces"
    listed = matrices(net()) if kind == "a client's Muon" else net().parameters()
    total = sum(p.numel() for p in listed if p.requires_grad)
    assert sum(elements for *_, elements in results) == total * (1 if stage else ranks), f"{case}: one owner each"
    assert not stage or ranks == 1 or max(elements for *_, elements in results) < total, f"{case}: nobody has all"


def save(folder: str, kind: str, stage: int, how: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    engine = start(kind, stage, how)
    saved = train(engine, range(2), how["micro_batches"])
    engine.save_checkpoint(folder)
    after = train(engine, range(2, 4), how["micro_batches"])
    engine.destroy()
    return saved, after


def resume(folder: str, kind: str, stage: int, how: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    engine = start(kind, stage, how)
    train(engine, range(7, 8), how["micro_batches"])  # what was there before must not matter
    engine.load_checkpoint(folder)
    loaded = weights_of(engine)
    after = train(engine, range(2, 4), how["micro_batches"])
    engine.destroy()
    return loaded, after


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), HOW)
@settings(phases=[Phase.generate], max_examples=settings().max_examples // 6)
def test_it_resumes_at_another_stage_and_number_of_ranks(run_ranks, kind, stage, ranks, then, others, how):
    """To the bit where the sums are taken in the same order; else as close as they are."""
    with tempfile.TemporaryDirectory() as folder:
        (saved, after), *_ = run_ranks(save, ranks, folder, kind, stage, fitting(how, ranks))
        for loaded, their_after in run_ranks(resume, others, folder, kind, then, fitting(how, others)):
            case = f"{kind}, from stage {stage} of {ranks} to stage {then} of {others}, {how}"
            assert_close(loaded, saved, f"{case}, loaded", 0)
            assert_close(their_after, after, f"{case}, trained on", 0 if (stage, ranks) == (then, others) else 1e-10)


def full_to_the_last_element(folder: str) -> tuple[float, float, bool]:
    """The norm, and plain PyTorch's, of a matrix whose elements three ranks do not divide; and whether it comes back."""
    model = nn.Linear(16, 8, bias=False).double()
    engine, *_ = deepspeed.initialize(model=model, optimizer=Lars(model.parameters()), config={
        "train_micro_batch_size_per_gpu": 1})
    engine.backward(engine(torch.ones(1, 16, dtype=torch.float64)).square().sum())
    row = 2 * model.weight.detach().sum(1)  # the gradient of each element of a row
    norm = float((16 * row.square().sum()).sqrt())
    engine.step()
    engine.save_checkpoint(folder)
    saved = weights_of(engine)
    model.weight.data.fill_(7.0)
    engine.load_checkpoint(folder)
    return engine.get_global_grad_norm(), norm, torch.equal(weights_of(engine)["weight"], saved["weight"])


def test_at_stage_0_the_last_elements_count_and_are_saved(run_ranks, tmp_path):
    for mine, plain_norm, came_back in run_ranks(full_to_the_last_element, 3, str(tmp_path)):
        assert abs(mine - plain_norm) < 1e-12 and came_back


def untested_but_allowed() -> list[bool]:
    found = []
    for make in (Lars, deepspeed.Lamb):
        model = nn.Linear(8, 4)
        engine, *_ = deepspeed.initialize(model=model, optimizer=make(model.parameters(), lr=0.1), config={
            "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 2}})
        found.append(not engine.zero.whole)
        engine.destroy()
    return found


def test_an_unknown_optimizer_may_be_vouched_for_and_a_known_one_knows_better(run_ranks):
    assert run_ranks(untested_but_allowed, 2) == [[True, False]] * 2


# --- By name ----------------------------------------------------------------------------------------------------------
