"""Lion, Lamb and Muon, which PyTorch lacks or has for matrices alone; in plain PyTorch.

Each is a ``torch.optim.Optimizer`` for any training loop, with DeepSpeed's arguments and defaults, and raises
ValueError that names the argument, its value and what is allowed. What each means for ZeRO, which gives every rank a
piece of the parameters to update:

    Lion    works element by element, so parameters may be cut anywhere
    Lamb    needs the norm of each whole parameter, so none may be cut
    Muon    needs whole matrices; the other parameters, which AdamW updates, may be cut

``is_elementwise(group)`` says which, of a param group. This file needs none of the others.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class _Base(Optimizer):
    """What the three share: ``step()``, for which each defines ``update()``, and the check of numbers."""

    def __init__(self, params: Iterable, **options: Any):
        self.check(**options)
        super().__init__(params, options)

    @staticmethod
    def check(betas: Any, **options: Any) -> None:
        """Refuse what no step could use."""
        if not isinstance(betas, (list, tuple)) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {betas!r}; allowed: two numbers from 0 up and below 1")
        for name, value in options.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; allowed: a number from 0 up")

    def is_elementwise(self, group: Mapping[str, Any]) -> bool:
        """What ZeRO asks before it cuts a group's parameters."""
        return False

    def update(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        """Update those of a group's parameters that have a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Update every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, group)
        return loss


class Lion(_Base):
    """Lion (arXiv 2302.06675, algorithm 2): each weight moves the same distance, in the direction of a sign.

        c = beta1 * m + (1 - beta1) * g
        p = p - lr * (sign(c) + weight_decay * p)
        m = beta2 * m + (1 - beta2) * g

    ``m``, in the state as ``exp_avg``, begins at 0: one number per element, where Adam keeps two.

    lr             the distance per step, from 0; the paper takes a third to a tenth of what AdamW gets
    betas          how much of ``m`` counts in the direction, and how much of it stays: from 0, below 1
    weight_decay   decoupled, from 0; the paper takes 3 to 10 times what AdamW gets
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    def is_elementwise(self, group: Mapping[str, Any]) -> bool:
        return True

    def update(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        (beta1, beta2), rate = group["betas"], group["lr"]
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        gradients, averages = [p.grad for p in params], [self.state[p]["exp_avg"] for p in params]
        direction = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(direction, gradients, alpha=1 - beta1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        torch._foreach_add_(params, direction, alpha=-rate)
        torch._foreach_lerp_(averages, gradients, 1 - beta2)


class Lamb(_Base):
    """LAMB (arXiv 1904.00962, algorithm 2): Adam's direction, as long as each whole parameter's own length asks for.

        m = beta1 * m + (1 - beta1) * g             v = beta2 * v + (1 - beta2) * g ** 2
        r = m / (1 - beta1 ** t) / (sqrt(v / (1 - beta2 ** t)) + eps) + weight_decay * p
        p = p - lr * clamp(|p| / |r|, min_coeff, max_coeff) * r

    The 2-norms of the trust ratio ``|p| / |r|`` are those of a whole parameter; where one of them is 0, the ratio is 1.
    The arguments are those of DeepSpeed's FusedLamb, whose ``max_grad_norm`` is the config's ``gradient_clipping``. The
    state is ``step``, ``exp_avg`` and ``exp_avg_sq``.

    lr                     from 0; the trust ratio has no unit, so it is a relative change of a weight's length
    bias_correction        False leaves out the two divisions by 1 - beta ** t
    betas                  how much of m and v stays: from 0, below 1
    eps                    from 0; with ``eps_inside_sqrt`` it is added to v, before the root
    weight_decay           from 0
    max_coeff, min_coeff   bounds of the trust ratio, from 0
    amsgrad                only False: the paper's LAMB has no such variant
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, bias_correction: bool = True,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, eps_inside_sqrt: bool = False,
                 weight_decay: float = 0.0, max_coeff: float = 10.0, min_coeff: float = 0.01, amsgrad: bool = False):
        if amsgrad:
            raise ValueError("amsgrad is True; allowed: False, as LAMB has no such variant")
        super().__init__(params, lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                         eps_inside_sqrt=eps_inside_sqrt, weight_decay=weight_decay, max_coeff=max_coeff,
                         min_coeff=min_coeff)
        if min_coeff > max_coeff:
            raise ValueError(f"min_coeff is {min_coeff}; allowed: at most max_coeff, which is {max_coeff}")

    def update(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        for p in params:
            direction = self._direction(p, group).add_(p, alpha=group["weight_decay"])
            norm, length = torch.linalg.vector_norm(p), torch.linalg.vector_norm(direction)
            ratio = (norm / length).clamp(group["min_coeff"], group["max_coeff"])
            ratio = torch.where((norm > 0) & (length > 0), ratio, 1.0)  # without waiting for a GPU
            p.sub_(direction.mul_(ratio * group["lr"]))

    def _direction(self, p: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Adam's step for a parameter, without rate and decay."""
        state, (beta1, beta2), eps = self.state[p], group["betas"], group["eps"]
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        taken = state["step"].item()
        left = [1 - beta ** taken if group["bias_correction"] else 1.0 for beta in (beta1, beta2)]
        square = state["exp_avg_sq"] / left[1]
        root = square.add_(eps).sqrt_() if group["eps_inside_sqrt"] else square.sqrt_().add_(eps)
        return torch.div(state["exp_avg"], root, out=root).div_(left[0])


class Muon(_Base):
    """Muon for hidden matrices and AdamW for all else, as one optimizer with one state.

    Muon (K. Jordan, https://kellerjordan.github.io/posts/muon/) makes a matrix's momentum orthogonal: each direction
    in which it would move the matrix gets the same length. Both are PyTorch's, ``torch.optim.Muon`` and
    ``torch.optim.AdamW``.

    params          param groups with ``use_muon``, True or False, in each; ``muon_groups`` makes them
    lr              of both, unless ``muon_lr`` (default 0.02) or ``adam_lr`` (default 3e-4) is given
    momentum, nesterov, ns_steps    Muon's: of its average; whether the newest gradient counts once more; iterations
    betas, eps      AdamW's
    weight_decay    decoupled, of both
    """

    def __init__(self, params: Iterable, lr: float | None = None, muon_lr: float | None = None,
                 adam_lr: float | None = None, momentum: float = 0.95, nesterov: bool = True, ns_steps: int = 5,
                 betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-10, weight_decay: float = 0.0):
        matrices, others = ([rate for rate in (own, lr, default) if rate is not None][0]
                            for own, default in ((muon_lr, 0.02), (adam_lr, 3e-4)))
        self.check(betas, muon_lr=matrices, adam_lr=others, momentum=momentum, eps=eps, weight_decay=weight_decay)
        if not isinstance(ns_steps, int) or not 0 < ns_steps < 100:
            raise ValueError(f"ns_steps is {ns_steps!r}; allowed: a whole number from 1 to 99")
        options = {True: {"lr": matrices, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps},
                   False: {"lr": others, "betas": betas, "eps": eps}}
        groups = list(params)
        for group in groups:
            if not isinstance(group, dict) or not isinstance(group.get("use_muon"), bool):
                raise ValueError("a param group of Muon has no use_muon; needed: True for hidden matrices, False for "
                                 "other parameters; muon_groups() makes such groups")
        Optimizer.__init__(self, [{**options[group["use_muon"]], "weight_decay": weight_decay, **group}
                                  for group in groups], {})
        for group in self.param_groups:
            if not group["use_muon"]:
                group.setdefault("fused", not any(p.is_complex() for p in group["params"]))
            self._pytorchs(group)  # its own checks

    def _pytorchs(self, group: dict[str, Any]) -> Optimizer:
        """PyTorch's optimizer over a group; made for each step, as others may exchange the groups and the state."""
        optimizer = (torch.optim.Muon if group["use_muon"] else torch.optim.AdamW)([group])
        optimizer.state = self.state
        return optimizer

    def is_elementwise(self, group: Mapping[str, Any]) -> bool:
        return not group["use_muon"]

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        optimizer = self._pytorchs(group)
        type(optimizer).step.__wrapped__(optimizer)  # without the global step hooks, which run once, around this


def muon_groups(parameters: Iterable, model: nn.Module | None = None) -> list[dict[str, Any]]:
    """Param groups for Muon: of each given one, the hidden matrices with ``use_muon`` True, and all else with False.

    A hidden matrix has two dimensions and is no embedding and no head. An embedding belongs to an ``nn.Embedding`` or
    has "embed" in its name; a head has a name in which "head" or "lm_head" stands between dots. A parameter's own
    attribute ``use_muon``, True or False, comes before this rule.

    parameters   tensors, or param groups
    model        theirs, which knows the names; None: all have none
    """
    modules = list(model.modules()) if model is not None else []
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    embeddings = {id(p) for module in modules if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
                  for p in module.parameters()}

    def use_muon(p: Tensor) -> bool:
        name = names.get(id(p), "")
        edge = id(p) in embeddings or "embed" in name.lower() or {"head", "lm_head"} & set(name.lower().split("."))
        chosen = getattr(p, "use_muon", p.dim() == 2 and not edge)
        if not isinstance(chosen, bool) or chosen and p.dim() != 2:
            raise ValueError(f"use_muon of the parameter {name} of shape {tuple(p.shape)} is {chosen!r}; allowed: True "
                             "for a matrix, False for any")
        return chosen

    listed, found = list(parameters), []
    for group in listed if listed and isinstance(listed[0], dict) else [{"params": listed}]:
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for p in group["params"]:
            p = p[1] if isinstance(p, tuple) else p  # from named_parameters()
            parts[group["use_muon"] if "use_muon" in group else use_muon(p)].append(p)
        found += [{**group, "params": part, "use_muon": choice} for choice, part in parts.items() if part]
    return found
