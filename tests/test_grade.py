"""The grader: right answers pass, and wrong ones fail where they should.

    .venv/bin/python -m pytest -q tests/test_grade.py
    .venv/bin/python -m pytest -q tests/test_grade.py --long     every answer, and the first ones by the whole grader

WRONG is a table of mistakes, each a change of the right answer in answers.py and the test of test_exercises.py that
finds it. They run in the processes that are there already, which takes a second or less; the whole grader starts its
own.
"""

import ast
import importlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import answers
import compare
import grade
import test_exercises
import wire
from exercises import EXERCISES, Check


def own_code(name: str) -> str:
    """The project's own definitions, as an answer."""
    exercise = EXERCISES[name]
    text = exercise.file.read_text()
    found = grade.definitions(ast.parse(text))
    if exercise.module == "steps":
        return ast.get_source_segment(text, found[exercise.parts[0]]) + "\n"
    if exercise.anew or "." not in exercise.parts[0]:
        return "\n".join(ast.unparse(found[owner]) for owner in exercise.owners)
    return "\n".join(f"class {owner}:\n" + "\n".join(
        "\n".join(" " * 4 + line for line in ast.unparse(found[part]).splitlines())
        for part in exercise.parts if part.startswith(f"{owner}.")) for owner in exercise.owners)


RIGHT = {name: [own_code(name), *texts] if name.startswith("steps:") else [*texts, own_code(name)]
         for name, texts in answers.RIGHT.items()}  # the first one is what mistakes are made of


# --- Wrong answers ----------------------------------------------------------------------------------------------------
# By exercise and by what is wrong: the test that finds it, without "test_", and pairs of what is replaced and by what.

SCATTER = "        self.communicator.reduce_scatter(gradients, shard, add=False).wait()\n"
GATHER = "        self.communicator.all_gather(self.flat).wait()\n"
DATA_PARALLEL = (
    "self.parts_of(self.communicator.shard_of(self.flat))", "enumerate(self.places(self.flat))",
    "self.parts_of(shard)", "enumerate(self.places(gradients))",
    SCATTER, "        self.communicator.all_reduce(gradients).wait()\n", "shard /= divisor", "gradients /= divisor",
    GATHER, "")
OWN_ADAM = (
    '        optimizer.param_groups[0]["params"] = self.pieces\n',
    '        optimizer.param_groups[0]["params"] = self.pieces\n'
    "        self.whole = [nn.Parameter(place) for place in self.places(self.flat)]\n"
    '        settings = {key: optimizer.defaults[key] for key in ("lr", "eps", "weight_decay")}\n'
    "        self.optimizer = type(optimizer)(self.whole, **settings)\n",
    SCATTER, "        self.communicator.all_reduce(gradients).wait()\n", "shard /= divisor", "gradients /= divisor",
    "zip(self.parts_of(shard), self.pieces)", "zip(enumerate(self.places(gradients)), self.whole)",
    "for piece in self.pieces:", "for piece in self.whole:", GATHER, "")


def after(place: str, *lines: str) -> tuple[str, str]:
    """The pair that puts lines behind a place."""
    return place, place + "".join(f"        {line}\n" for line in lines)


def scattered(*lines: str) -> tuple[str, str]:
    """The pair that puts another way to send gradients in the place of stage 1's reduce-scatter."""
    return SCATTER, "".join(f"        {line}\n" for line in lines)


def gathered(*lines: str) -> tuple[str, str]:
    """The same for its all-gather."""
    return GATHER, "".join(f"        {line}\n" for line in lines)


def reduce_scatter_by(exchange: str) -> tuple[str, str]:
    """The pair that fills ``every``, all ranks' gradients, by another exchange."""
    start = answers.REDUCE_SCATTER.index("        for other in self._others")
    return answers.REDUCE_SCATTER[start:], f"""        every = [flat.clone() for _ in range(self.world_size)]
        if self.world_size > 1:
            {exchange}
        parts = [self.shard_of(each) for each in every]
        return Handle(self, [], lambda: _sum(parts, out, add))
"""


STAGE_1 = {
    "gradients summed and not averaged": ("equals_plain_pytorch", "        shard /= divisor\n", ""),
    "a divisor that is not used": ("equals_plain_pytorch", "/= divisor", "/= self.communicator.world_size"),
    "clipping that enlarges": ("equals_plain_pytorch", "min(1.0, clip / (norm + 1e-6))", "clip / (norm + 1e-6)"),
    "no clipping": ("equals_plain_pytorch", "part * coefficient", "part"),
    "clipping before the mean is taken": (
        "equals_plain_pytorch", "        shard /= divisor\n", "", "part * coefficient", "part / divisor * coefficient"),
    "a norm of this rank alone": (
        "equals_plain_pytorch", "square, *used = message.tolist()",
        "square, *used = message.tolist()\n        square = float(shard.square().sum())"),
    "tied weights that count twice": (
        "equals_plain_pytorch", "list(model.parameters())",
        "[p for module in model.modules() for p in module.parameters(recurse=False)]",
        "                p.grad = None\n", "", "        self.communicator.reduce_scatter",
        "        for p in self.parameters:\n            p.grad = None\n        self.communicator.reduce_scatter"),
    "parameters without gradient that decay": (
        "equals_plain_pytorch", "part * coefficient if used[number] else None", "part * coefficient"),
    "a gradient that only one rank has is left out": (
        "equals_plain_pytorch", "if used[number] else None", "if self.parameters[number].number else None",
        "        for p, place in zip(self.parameters, self.places(gradients)):\n",
        "        for p, place in zip(self.parameters, self.places(gradients)):\n"
        "            p.number = p.grad is not None\n"),
    "a crash on a parameter without gradient": (
        "equals_plain_pytorch", "            if p.grad is not None:\n                place.copy_(p.grad)\n"
        "                p.grad = None\n", "            place.copy_(p.grad)\n            p.grad = None\n"),
    "each rank's own weights": ("equals_plain_pytorch", "        self.communicator.broadcast(self.flat, 0)\n", ""),
    "a rate that is read once": (
        "equals_plain_pytorch", *after('        optimizer.param_groups[0]["params"] = self.pieces\n', "self.lr = 0.01"),
        "        self.optimizer.step()\n", '        self.optimizer.param_groups[0]["lr"] = self.lr\n'
        "        self.optimizer.step()\n"),
    "weights that are gathered late": (
        "equals_plain_pytorch", GATHER, "", "        gradients = torch", GATHER + "        gradients = torch"),
    "a factor of clipping that is not told": (
        "equals_plain_pytorch", "StepResult(norm, coefficient, False", "StepResult(norm, 1.0, False"),
    "an all-gather that nobody waits for": ("waits_for", GATHER, GATHER.replace(".wait()", "")),
    "a reduce-scatter that nobody waits for": (
        "waits_for", SCATTER, "        works = self.communicator.reduce_scatter(gradients, shard, add=False)\n"
        "        _sum([shard], shard, False)\n", GATHER, GATHER + "        works.wait()\n"),
    "gradients that survive a skipped step": (
        "not_finite", "                p.grad = None\n", "",
        "        for (number, part), piece", "        for p in self.parameters:\n            p.grad = None\n"
        "        for (number, part), piece"),
    "an update with NaN": ("not_finite", "if skip_overflow and not math.isfinite(norm)", "if False"),
    "NaN that passes as finite": ("not_finite", "not math.isfinite(norm)", "norm == math.inf"),
    "a rank that skips alone": (
        "not_finite", "not math.isfinite(norm)", "not bool(shard.isfinite().all())"),
    "a step that is always skipped": ("must_not_be_skipped", "skip_overflow and not", "not"),
    "micro-batches of which the last one counts": (
        "accumulates", "    def finish_backward(self):\n        pass\n",
        "    def finish_backward(self):\n        if not self.boundary:\n"
        "            for p in self.parameters:\n                p.grad = None\n"),
    "a window that is sent m times": (
        "accumulates", "    def finish_backward(self):\n        pass\n",
        "    def finish_backward(self):\n        for p in self.parameters:\n            if not self.boundary:\n"
        "                self.communicator.all_reduce(torch.zeros_like(p)).wait()\n"),
    "an optimizer that is not sharded": ("shards_the_optimizer", *DATA_PARALLEL),
    "an optimizer of one's own over everything": ("shards_the_optimizer", *OWN_ADAM),
    "moments of one's own over everything": (
        "keeps_nothing_else", *after(SCATTER, "self.moments = [torch.zeros_like(self.flat) for _ in range(2)]")),
    "moments that NumPy holds": (
        "keeps_nothing_else", *after(
            SCATTER, "self.moments = [torch.zeros_like(self.flat).numpy() for _ in range(2)]")),
    "a second copy of the weights": ("keeps_nothing_else", *after(GATHER, "self.copy = self.flat.clone()")),
    "a copy of the weights in bf16": ("keeps_nothing_else", *after(GATHER, "self.copy = self.flat.bfloat16()")),
    "a copy of the weights in a closure": (
        "keeps_nothing_else", *after(GATHER, "copy = self.flat.clone()", "self.restore = lambda: copy")),
    "a copy of the weights as a storage": (
        "keeps_nothing_else", *after(GATHER, "self.copy = self.flat.untyped_storage().clone()")),
    "a copy of the weights as bytes": (
        "keeps_nothing_else", *after(GATHER, "self.copy = self.flat.numpy().tobytes()")),
    "gradients and a buffer for them": (
        "keeps_nothing_else", "                p.grad = None\n", "                p.grad.zero_()\n",
        *after(GATHER, "self.buffer = gradients")),
    "gradients that stay in a list": (
        "keeps_nothing_else", "                p.grad = None\n", "                p.grad = None\n"
        "                self.old = getattr(self, 'old', [])[-20:] + [place.clone()]\n"),
    **{f"gradients that travel by {what}": ("sends_as_much", *scattered(*lines)) for what, *lines in (
        ("all-reduce", "self.communicator.all_reduce(gradients).wait()"),
        ("all_gather", "every = [torch.empty_like(gradients) for _ in range(self.communicator.world_size)]",
         "dist.all_gather(every, gradients)", "gradients.copy_(sum(every))"),
        ("all_gather_into_tensor", "every = gradients.new_empty(self.communicator.world_size, len(gradients))",
         "dist.all_gather_into_tensor(every.view(-1), gradients)", "gradients.copy_(every.sum(0))"),
        ("all-to-all of everything", "ranks = self.communicator.world_size",
         "every = [torch.empty_like(gradients) for _ in range(ranks)]",
         "dist.all_to_all(every, [gradients.clone() for _ in range(ranks)])",
         "gradients.copy_(sum(every))"),
        ("reduce and broadcast", "dist.reduce(gradients, 0)", "dist.broadcast(gradients, 0)"),
        ("reduce and scatter", "dist.reduce(gradients, 0)",
         "whole = gradients.clone()",
         "dist.scatter(shard, list(whole.chunk(dist.get_world_size())) if dist.get_rank() == 0 else None)",
         "dist.broadcast(gradients.clone(), 0)"),
        ("gather and broadcast", "everyone = [torch.empty_like(gradients) for _ in range(dist.get_world_size())]",
         "dist.gather(gradients.clone(), everyone if dist.get_rank() == 0 else None, 0)",
         "total = sum(everyone)", "dist.broadcast(total, 0)", "gradients.copy_(total)"),
        ("object", "everyone = [None] * dist.get_world_size()", "dist.all_gather_object(everyone, gradients.clone())",
         "gradients.copy_(sum(everyone))"),
        ("broadcast objects", "total = torch.zeros_like(gradients)", "for rank in range(dist.get_world_size()):",
         "    box = [gradients.clone()]", "    dist.broadcast_object_list(box, rank)", "    total += box[0]",
         "gradients.copy_(total)"),
        ("functional collectives", "import torch.distributed._functional_collectives as functional",
         "gradients.copy_(functional.all_reduce(gradients, 'sum', dist.group.WORLD))"),
        ("the group's own method", "dist.group.WORLD.allreduce([gradients]).wait()"),
        ("another thread", "import threading",
         "thread = threading.Thread(target=lambda: dist.all_reduce(gradients))", "thread.start()", "thread.join()"),
    )},
    **{f"weights that travel by {what}": ("sends_as_much", *gathered(*lines)) for what, *lines in (
        ("all-reduce", "for rank in range(self.communicator.world_size):",
         "    if rank != self.communicator.rank:",
         "        self.communicator.shard_of(self.flat, rank).zero_()", "dist.all_reduce(self.flat)"),
        ("broadcasts of everything", "for rank in range(self.communicator.world_size):",
         "    whole = self.flat.clone()", "    dist.broadcast(whole, rank)", "    if rank != self.communicator.rank:",
         "        self.communicator.shard_of(self.flat, rank).copy_(self.communicator.shard_of(whole, rank))"),
        ("object", "everyone = [None] * self.communicator.world_size",
         "dist.all_gather_object(everyone, self.communicator.shard_of(self.flat).clone())",
         "self.flat.copy_(torch.cat(everyone))",
         "dist.all_gather_object(everyone, self.communicator.shard_of(self.flat).clone())"),
        ("pairs of messages", "self.communicator.all_gather(self.flat).wait()", "other = 1 - self.communicator.rank",
         "got = torch.empty_like(self.flat)", "if self.communicator.world_size == 2:",
         "    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, self.flat, other),",
         "                                        dist.P2POp(dist.irecv, got, other)]):", "        work.wait()"),
        ("a view of larger elements", "whole = self.flat[:len(self.flat) // 2 * 2].view(torch.float64)",
         "dist.broadcast(whole.clone(), 0)", "self.communicator.all_gather(self.flat).wait()"),
        ("the store", "import pickle", "store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()",
         "self.count = getattr(self, 'count', 0) + 1", "key = f'{self.communicator.number} {self.count} '",
         "store.set(f'{key}{rank}', pickle.dumps(self.communicator.shard_of(self.flat).clone()))",
         "self.flat.copy_(torch.cat([pickle.loads(store.get(f'{key}{r}')) for r in range(dist.get_world_size())]))"),
    )},
}

WRONG: dict[str, dict[str, tuple[str, ...]]] = {
    "steps:all_reduce": {
        "an all-reduce by all-reduce": (
            "all_reduce", "    rank, ranks", "    dist.all_reduce(tensor)\n    return\n    rank, ranks"),
        "sums in another order on each rank": (
            "all_reduce", "torch.stack(parts).sum(0)", "sum(parts[rank:] + parts[:rank])"),
        "messages that are not waited for": (
            "all_reduce", "    for work in works:\n        work.wait()\n", "")},
    "steps:pad": {
        "a whole row of zeros where none is needed": ("pad", "-flat.numel() % ranks", "ranks - flat.numel() % ranks"),
        "zeros in another dtype": ("pad", "flat.new_zeros(", "torch.zeros(")},
    "steps:shard": {
        "a copy": ("shard", "* size]", "* size].clone()"),
        "every n-th element": ("shard", "flat[rank * size:(rank + 1) * size]", "flat[rank::ranks]")},
    "steps:bucket": {
        "parameters that stay where they are": ("bucket", "p.data = flat", "p.other = flat"),
        "a tensor without padding": ("bucket", "pad(torch.cat", "(torch.cat", "for p in parameters]), ranks)",
                                     "for p in parameters]))"),
        "a tensor that needs a gradient": ("bucket", "p.detach().flatten()", "p.flatten()", "p.data = flat",
                                           "p.data = flat.detach()")},
    "steps:gradient_hook": {
        "a hook that copies": ("gradient_hook", "place.add_(p.grad)", "place.copy_(p.grad)"),
        "gradients that are kept": ("gradient_hook", "            p.grad = None\n", ""),
        "one place for all": ("gradient_hook", "        start += p.numel()\n", "")},
    "steps:overlap": {
        "buckets that go out at the end": (
            "overlap",
            "            if not missing:\n                works.append(dist.all_reduce(flat, async_op=True))\n",
            "            if all(not m for m, _ in every):\n"
            "                works.extend(dist.all_reduce(f, async_op=True) for _, f in every)\n",
            "    works = []\n", "    works, every = [], []\n", "        missing = set(parameters)\n",
            "        missing = set(parameters)\n        every.append((missing, flat))\n"),
        "a hook that waits": (
            "overlap", "works.append(dist.all_reduce(flat, async_op=True))",
            "works.append(dist.all_reduce(flat, async_op=True))\n                works[-1].wait()"),
        "an all-reduce for each gradient": ("overlap", "if not missing:\n", "if True:\n"),
        "a bucket that goes out with its first gradient": (
            "overlap", "            if not missing:", "            if len(missing) == 1:")},
    "steps:clip": {
        "a norm of one shard": ("clip", "    dist.all_reduce(square)\n", ""),
        "a norm of norms": ("clip", "gradient.square().sum()", "gradient.norm()", "square.sqrt()", "square"),
        "clipping that enlarges": ("clip", "min(1.0, limit / (norm + 1e-6))", "limit / (norm + 1e-6)"),
        "the norm after clipping": ("clip", "return norm", "return min(norm, limit)"),
        "shards that are gathered": (
            "clip", "    dist.all_reduce(square)\n",
            "    every = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]\n"
            "    dist.all_gather(every, gradient)\n    square = torch.cat(every).square().sum()\n"
            "    dist.all_gather(every, gradient)\n")},
    "steps:free": {
        "memory that stays": ("free", "    flat.untyped_storage().resize_(0)\n", ""),
        "changes that are lost": ("free", "    own.copy_(shard(flat, dist.get_rank(), dist.get_world_size()))\n", ""),
        "another tensor": ("free", "flat.untyped_storage().resize_(0)", "flat.data = torch.empty(0)")},
    "steps:gather": {
        "a new storage": ("gather", "flat.untyped_storage().resize_(flat.numel() * flat.element_size())",
                          "flat.data = torch.empty(flat.shape)"),
        "an all-gather that blocks": (
            "gather", "    return dist", "    work = dist", "own, async_op=True)\n",
            "own, async_op=True)\n    work.wait()\n    return work\n"),
        "an all-reduce": (
            "gather", "    return dist.all_gather(list(flat.chunk(dist.get_world_size())), own, async_op=True)",
            "    shard(flat.zero_(), dist.get_rank(), dist.get_world_size()).copy_(own)\n"
            "    return dist.all_reduce(flat, async_op=True)")},
    "steps:prefetch": {
        "gathers that come late": ("prefetch", "        x = layer(x)\n", "", "        work.wait()\n",
                                   "        work.wait()\n        x = layer(x)\n"),
        "all at once": ("prefetch", "    work = start(0)\n", "    works = [start(i) for i in range(len(layers))]\n",
                        "        work.wait()\n", "        works[number].wait()\n",
                        "            work = start(number + 1)\n", "            pass\n"),
        "layers that stay": ("prefetch", "        free(number)\n", ""),
        "use before the wait": ("prefetch", "        work.wait()\n", "        ahead = work\n", "        free(number)\n",
                                "        ahead.wait()\n        free(number)\n")},
    "steps:message": {"bandwidth alone": ("message_and_ring", "latency + size", "size")},
    "steps:ring": {
        "latency once": ("message_and_ring", "2 * (ranks - 1) * message(size / ranks, latency, bandwidth)",
                         "latency + 2 * (ranks - 1) * size / ranks / bandwidth"),
        "one way": ("message_and_ring", "2 * (ranks - 1)", "(ranks - 1)")},
    "steps:communication": {
        "stage 3 as stage 2": ("communication", "1.5 if stage == 3 else 1.0", "1.0"),
        "two bytes forgotten": ("communication", "2 * elements", "elements"),
        "the wrong way round": ("communication", "seconds > compute", "seconds < compute")},
    "schedulers:WarmupLR": {
        "one step off": ("a_warmup_follows", "max(t - 1, 0)", "t"),
        "a way up that goes on": ("a_warmup_follows", "min(1.0, up)", "up"),
        "always log": ("a_warmup_follows", 'if self.type == "linear"', "if False"),
        "the first group's rates": ("the_top_of_a_warmup", "self.low[group] + (self.high[group] - self.low[group])",
                                    "self.low[0] + (self.high[0] - self.low[0])"),
        "the lowest rate forgotten": ("a_warmup_follows", "self.low[group] + (self", "(self"),
        "a division by zero at 1": ("a_warmup_follows", "max(2, warmup_num_steps)", "warmup_num_steps"),
        "starting over on resume": ("a_warmup_goes_on", "(optimizer, last_batch_iteration)", "(optimizer)"),
        "counting its own calls": (
            "a_warmup_goes_on", "        k = max(t - 1, 0)\n",
            "        self.calls = getattr(self, 'calls', -1) + 1\n"
            "        k = max(self.calls // len(self.low) - 1, 0)\n"),
        "counting its own steps": (
            "a_warmup_goes_on", "    def rate(self, t, group):\n",
            "    def step(self, *args, **kwargs):\n        self.t = getattr(self, 't', 0) + 1\n"
            "        super().step(*args, **kwargs)\n\n"
            "    def rate(self, t, group):\n        t = getattr(self, 't', 1) - 1\n"),
        "a top taken from the rate of the moment": (
            "the_top_of_a_warmup", 'group.get("initial_lr", group["lr"])', 'group["lr"]'),
        "a top read anew at every step": (
            "a_warmup_follows", "self.high[group] - self", 'self.optimizer.param_groups[group]["lr"] - self')},
    "amp:DynamicLossScaler": {
        "never growing": ("after_any_short_history", "self.scale *= 2", "pass"),
        "never halving": ("after_any_short_history", "self.scale / 2", "self.scale"),
        "forgiving nothing": ("after_any_short_history", "self.left > 1", "False"),
        "forgiving one too many": ("after_any_short_history", "self.left > 1", "self.left > 0"),
        "growing one step early": ("after_any_short_history", "if self.good and self.good %",
                                   "if (self.good + 1) %"),
        "good steps that survive an overflow": ("after_any_short_history", "            self.good = 0\n", ""),
        "hysteresis never given back": ("after_any_short_history", "                self.scale *= 2\n"
                                        "                self.left = self.hysteresis\n",
                                        "                self.scale *= 2\n"),
        "hysteresis always given back": ("after_any_short_history", "if self.consecutive:", "if True:"),
        "hysteresis used once": ("after_any_short_history", "self.scale = max(self.minimum, self.scale / 2)",
                                 "self.scale, self.left = max(self.minimum, self.scale / 2), self.hysteresis"),
        "forgetting its good steps": ("after_any_short_history", ', "good": self.good', ""),
        "forgetting its hysteresis": ("after_any_short_history", ', "left": self.left', ""),
        "forgetting its scale": ("after_any_short_history", '"scale": self.scale, ', ""),
        "a state that is no plain data": ("after_any_short_history", '"scale": self.scale',
                                          '"scale": torch.tensor(self.scale)'),
        "staying at the minimum in silence": (
            "smallest_scale", 'raise MinimumLossScaleError(f"the gradient of {culprit} is not finite. Use bf16")',
            "pass"),
        "falling below the minimum": ("smallest_scale", "max(self.minimum, self.scale / 2)", "self.scale / 2"),
        "an error before the hysteresis is used up": (
            "smallest_scale",
            "if self.left > 1:\n                self.left -= 1\n            elif self.scale <= self.minimum:",
            "if self.scale <= 4 * self.minimum:")},
    "amp:Precision.path": {f"ignoring {what}": ("every_parameter_has", before, instead) for what, before, instead in (
        ("masters", "compute if small else torch.float32", "compute"),
        ("16-bit masters", "compute if small else torch.float32", "torch.float32"),
        ("fp16's own key", "self.config.fp16.fp16_master_weights_and_grads or ", ""),
        ("bf16's own key", " or self.config.bf16.bf16_master_weights_and_grads", ""),
        ("what autocast reduces", "or low or gradient", "or gradient"),
        ("which modules autocast may reduce", " if id(parameter) in self.low else None", ""),
        ("that a wish for all goes first", "self.config.communication_data_type or low",
         "low or self.config.communication_data_type"),
        ("integers", "not parameter.is_floating_point()", "False"),
        ("float64", "compute = master = given", "compute = master = torch.float32"),
        ("what is kept in fp32", "torch.float32 if id(parameter) in self.kept else self.half", "self.half"),
        ("the dtype of accumulation", "self.config.data_types.grad_accum_dtype or master", "master"),
        ("the dtype of reductions", "self.config.communication_data_type or ", ""),
        ("the gradient's dtype in reductions", "or low or gradient", "or low or master"))},
    "checkpointing:checkpoint": {
        "the random state is not set": ("equals_plain_autograd", "            torch.set_rng_state(state)\n", ""),
        "backward draws random numbers": (
            "equals_plain_autograd", "torch.random.fork_rng(devices=[]), ", ""),
        "inputs that are cut off": (
            "equals_plain_autograd",
            "    with saved_tensors_hooks(pack, unpack):\n        return function(*args, **kwargs)",
            "    with saved_tensors_hooks(pack, unpack):\n"
            "        return function(*[a.detach() if isinstance(a, Tensor) else a for a in args], **kwargs)"),
        "no arguments by name": ("equals_plain_autograd", "function(*again[0], **again[1])", "function(*again[0])"),
        "saved where an input needs a gradient alone": (
            "no_input_needs", "    if not torch.is_grad_enabled():",
            "    if not any(isinstance(a, Tensor) and a.requires_grad for a in args):\n"
            "        with torch.no_grad():\n            return function(*args, **kwargs)\n"
            "    if not torch.is_grad_enabled():"),
        "no autocast": ("under_the_autocast", ', torch.autocast("cpu", *autocast)', ""),
        "always autocast": ("under_the_autocast", ', torch.autocast("cpu", *autocast)',
                            ', torch.autocast("cpu", autocast[0])'),
        "autocast in another dtype": ("under_the_autocast", 'torch.autocast("cpu", *autocast)',
                                      'torch.autocast("cpu", enabled=autocast[1])'),
        "again for every tensor": ("runs_twice", "        if slot not in found:\n            recompute()\n",
                                   "        recompute()\n"),
        "twice in forward": ("runs_twice", "    with saved_tensors_hooks(pack, unpack):\n",
                             "    with torch.no_grad():\n        function(*args, **kwargs)\n"
                             "    with saved_tensors_hooks(pack, unpack):\n"),
        "PyTorch's own": (
            "runs_twice", "    if not torch.is_grad_enabled():", "    import torch.utils.checkpoint\n"
            "    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)\n"
            "    if not torch.is_grad_enabled():"),
        "everything is kept": (
            "keeps_its_inputs_only", "    if not torch.is_grad_enabled():",
            "    return function(*args, **kwargs)\n    if not torch.is_grad_enabled():"),
        "half of it is kept": (
            "keeps_its_inputs_only", "        slots.append(None)\n", "        slots.append(None)\n"
            "        if len(slots) % 2:\n            held[len(slots) - 1] = tensor.detach()\n",
            "    state, slots, found =", "    held = {}\n    state, slots, found =",
            "        if slot not in found:\n", "        if slot in held:\n            return held[slot]\n"
            "        if slot not in found:\n"),
        "graphs that keep themselves": (
            "leaves_nothing_behind", "tensors.append(tensor.detach())", "tensors.append(tensor)",
            "        return found.pop(slot)\n", "        return found[slot]\n"),
        "a list of all inputs": (
            "leaves_nothing_behind", "    state, slots, found =", "    KEPT.append(args)\n    state, slots, found =",
            "def checkpoint(", "KEPT = []\n\ndef checkpoint("),
        "work without grad mode": (
            "does_nothing_without", "        return function(*args, **kwargs)\n    state",
            "        function(*args, **kwargs)\n        return function(*args, **kwargs)\n    state")},
    "zero:reduce_scatter": {
        "an all-reduce": ("what_is_counted", *reduce_scatter_by(
            "dist.all_reduce(flat); every = [flat] + [torch.zeros_like(flat)] * (self.world_size - 1)")),
        **{what: ("what_is_counted", *reduce_scatter_by(exchange)) for what, exchange in (
            ("an all-gather of everything", "dist.all_gather(every, flat.contiguous())"),
            ("broadcasts of everything",
             "for rank in range(self.world_size): dist.broadcast(every[rank], rank)"),
            ("objects", "dist.all_gather_object(every, flat.clone())"),
            ("an all-to-all of everything", "dist.all_to_all(every, [flat.clone() for _ in every])"),
            ("pairs of everything", "for work in [f(t, o) for o in self._others() for f, t in ((dist.irecv, every[o]), "
             "(dist.isend, flat))]: work.wait()"))},
        "the neighbour's slice": (
            "its_slice", "parts = {self.rank: self.shard_of(flat)}",
            "parts = {self.rank: self.shard_of(flat, (self.rank + 1) % self.world_size)}"),
        "this rank's own part forgotten": ("its_slice", "[parts[rank] for rank in sorted(parts)]",
                                           "[parts[rank] for rank in sorted(parts) if rank != self.rank] "
                                           "or [parts[self.rank]]"),
        "never added": ("its_slice", "out, add)", "out, False)"),
        "always added": ("its_slice", "out, add)", "out, True)"),
        "an out that is emptied first": (
            "its_slice", "        parts = {self.rank: self.shard_of(flat)}\n",
            "        parts = {self.rank: self.shard_of(flat)}\n        if not add:\n            out.zero_()\n"),
        "a sum that does not wait": ("its_slice", "return Handle(self, works, lambda: _sum",
                                     "_sum([parts[rank] for rank in sorted(parts)], out, add)\n"
                                     "        return Handle(self, works, lambda: None and _sum"),
        "sent but not counted": ("what_is_counted", '            self._begin("reduce-scatter", flat, 1, what)\n', ""),
        "counted twice": ("what_is_counted", "flat, 1, what", "flat, 2, what"),
        "a wait inside": ("returns_at_once", "        return Handle(self, works,",
                          "        for work in works:\n            work.wait()\n        return Handle(self, [],"),
        "a barrier inside": (
            "returns_at_once", "        return Handle(", "        dist.barrier()\n        return Handle("),
        "messages that are sent when it is waited for": (
            "returns_at_once", "        return Handle(self, works, lambda: _sum([parts[rank] for rank in "
            "sorted(parts)], out, add))", "        return Handle(self, finish=finish)",
            "        for other in self._others():\n            parts[other] = torch.empty_like(parts[self.rank])\n"
            "            works.append(dist.irecv(parts[other], other, tag=tag))\n"
            "            works.append(dist.isend(self.shard_of(flat, other), other, tag=tag))\n",
            "        def finish():\n            for other in self._others():\n"
            "                parts[other] = torch.empty_like(parts[self.rank])\n"
            "                works.append(dist.irecv(parts[other], other, tag=tag))\n"
            "                works.append(dist.isend(self.shard_of(flat, other), other, tag=tag))\n"
            "            for work in works:\n                work.wait()\n"
            "            _sum([parts[rank] for rank in sorted(parts)], out, add)\n"),
        "sums in an order that changes": (
            "adds_in_one_order", "for rank in sorted(parts)]",
            "for rank in [*sorted(parts), *sorted(parts)][self.number % 3:][:len(parts)]]")},
    "zero:bucketed_all_reduce": {
        "buckets that go out as they come": (
            "another_order", "            while self.queue and self.queue[0].complete:\n"
            "                self.launch(self.queue.popleft())\n",
            "            for gradients in [gradients for gradients in self.queue if gradients.complete]:\n"
            "                self.queue.remove(gradients)\n                self.launch(gradients)\n"),
        "buckets that are not full": ("training_by_buckets", "while self.queue and self.queue[0].complete:",
                                      "while self.queue and self.queue[0].arrived:"),
        "gradients that replace each other": ("training_by_buckets", "place.add_(gradient) if slot in self.filled else "
                                              "place.copy_(gradient)", "place.copy_(gradient)"),
        "gradients that are added to old ones": (
            "training_by_buckets", "place.add_(gradient) if slot in self.filled else place.copy_(gradient)",
            "place.add_(gradient)"),
        "gradients that nobody knows of": ("training_by_buckets", "        self.used.add(slot)\n", ""),
        "late gradients that are lost": ("late_gradient", "            self.late[slot] = gradient if slot not in "
                                         "self.late else self.late[slot] + gradient\n", ""),
        "late gradients of which the last one counts": ("late_gradient", "gradient if slot not in self.late else "
                                                        "self.late[slot] + gradient", "gradient"),
        "late gradients that go into what is being sent": (
            "late_gradient", "if self.life in (Life.SENDING, Life.SENT):", "if False:"),
        "every micro-batch is sent": ("training_by_buckets", "overlap_comm and self.reduces_now:", "overlap_comm:"),
        **{what: ("full_buckets", *pairs) for what, *pairs in (
            ("buckets that wait for the end", "if self.zero.config.overlap_comm and self.reduces_now:", "if False:"),
            ("overlap where it is off", "self.zero.config.overlap_comm and ", ""),
            ("one bucket at a time, and the rest at the end", "while self.queue and", "if len(self.queue) == 1 and"),
            ("an all-reduce that blocks", "return Handle(self, [dist.all_reduce(tensor, group=self._reductions, "
             "async_op=True)]", "dist.all_reduce(tensor, group=self._reductions)\n        return Handle(self, []"),
            ("an all-reduce that is sent when it is waited for",
             "return Handle(self, [dist.all_reduce(tensor, group=self._reductions, async_op=True)], finish)",
             "return Handle(self, finish=lambda: (dist.all_reduce(tensor), finish and finish()))"))},
        "a handle that does not wait": (
            "runs_its_finish", "return Handle(self, [dist.all_reduce(tensor, group=self._reductions, async_op=True)], "
            "finish)", "dist.all_reduce(tensor, group=self._reductions, async_op=True)\n"
            "        return Handle(self, [], finish)"),
        "a finish that comes too early": ("runs_its_finish", "        self._begin(kind", "        if finish:\n"
                                          "            finish()\n        self._begin(kind", "async_op=True)], finish)",
                                          "async_op=True)])"),
        "a finish that never comes": ("runs_its_finish", "async_op=True)], finish)", "async_op=True)])"),
        "a finish that one rank alone forgets": (
            "runs_its_finish", "return Handle(self, finish=finish)", "return Handle(self)"),
        "sent but not counted": ("what_is_counted", "        self._begin(kind, tensor, 2, what)\n", ""),
        "an all-gather of everything": (
            "what_is_counted", "        return Handle(self, [dist.all_reduce(tensor, group=self._reductions, "
            "async_op=True)], finish)",
            "        every = [torch.empty_like(tensor) for _ in range(self.world_size)]\n"
            "        work = dist.all_gather(every, tensor.contiguous(), async_op=True)\n"
            "        return Handle(self, [work], lambda: (tensor.copy_(sum(every)), finish and finish()))"),
        "gradients beside the bucket": (
            "kept_once", "        self.filled.add(slot)\n",
            "        self.filled.add(slot)\n        self.kept = getattr(self, 'kept', {}) | {slot: gradient}\n"),
        "gradients in p.grad": (
            "kept_once", "        self.filled.add(slot)\n",
            "        self.filled.add(slot)\n        slot.parameter.old_grad = gradient\n")},
    "zero:stage_1": STAGE_1,
    "zero:stage_3": {
        "units that are never freed": (
            "no_pass_holds",
            "        if not self.users and self.state is not UnitState.SHARDED:\n            self.free()\n", ""),
        "units that stay in evaluation": (
            "no_pass_holds", "if not self.users and", "if torch.is_grad_enabled() and not self.users and"),
        "units that stay in training": (
            "no_pass_holds", "if not self.users and", "if not torch.is_grad_enabled() and not self.users and"),
        "units that stay in backward": (
            "no_pass_holds", "if not self.users and",
            "if torch._C._current_graph_task_id() == -1 and not self.users and"),
        "memory that stays": ("keeps_shards_alone", "        self.flat.untyped_storage().resize_(0)\n", ""),
        "weights beside the shards": (
            "keeps_shards_alone", "            bucket.gather.wait()\n            for slot",
            "            bucket.gather.wait()\n            bucket.copy = bucket.flat.clone()\n            for slot"),
        "weights in bf16 beside the shards": (
            "keeps_shards_alone", "            bucket.gather.wait()\n            for slot",
            "            bucket.gather.wait()\n            bucket.copy = bucket.flat.bfloat16()\n            for slot"),
        "the first user's end is the end": ("that_two_use", "if not self.users and self.state",
                                            "if self.state"),
        "a unit that is gathered for each user": ("that_two_use", "        if self.state is UnitState.SHARDED:\n",
                                                  "        if self.state is not UnitState.GATHERING:\n"),
        "a prefetched unit that is gathered again": (
            "a_pass_gathers", "        if self.state is UnitState.SHARDED:\n            self.start_gather()\n",
            "        if self.state is not UnitState.WHOLE:\n            self.start_gather()\n"),
        "parameters that look whole": ("that_two_use", "                slot.parameter.__class__ = ShardedParameter\n",
                                       "                pass\n"),
        "parameters that stay sharded": ("that_two_use", "                slot.parameter.__class__ = slot.kind\n",
                                         "                pass\n"),
        "a shard of zeros": ("come_late", "        self.communicator.shard_of(self.flat).copy_(self.shard)\n", ""),
        **{what: ("come_late", *pairs) for what, *pairs in (
            ("gathers that begin when they are waited for",
             "self.gather = self.communicator.all_gather(self.flat, self.label)",
             "self.gather = Handle(self.communicator, finish=lambda: self.communicator.all_gather(\n"
             "            self.flat, self.label).wait())"),
            ("gathers that are waited for at once", "all_gather(self.flat, self.label)\n",
             "all_gather(self.flat, self.label)\n        self.gather.wait()\n"),
            ("a unit that waits for its buckets at once", "            bucket.start_gather()\n",
             "            bucket.start_gather()\n            bucket.gather.wait()\n"),
            ("a unit that is whole at once", "            bucket.start_gather()\n",
             "            bucket.start_gather()\n        self.finish_gather()\n"),
            ("memory that goes before its gather", "        self.gather.wait()\n", ""),
            ("the first bucket alone is waited for", "            bucket.gather.wait()\n            for slot",
             "            self.buckets[0].gather.wait()\n            for slot"),
            ("the last bucket alone is waited for", "            bucket.gather.wait()\n            for slot",
             "            self.buckets[-1].gather.wait()\n            for slot"),
            ("nothing is waited for", "            bucket.gather.wait()\n            for slot",
             "            for slot"))}},
}


def changed(text: str, *pairs: str) -> str:
    """``text`` with each of the pairs' first strings, which must be there, replaced by its second one."""
    for before, instead in zip(pairs[::2], pairs[1::2], strict=True):
        assert before in text, before
        text = text.replace(before, instead)
    return text


def own_tests(name: str) -> list[Callable]:
    """The tests of test_exercises.py that judge an exercise."""
    return [getattr(test_exercises, test[2:]) for check in EXERCISES[name].checks for test in check.tests
            if test.startswith("::")]


def wrong_answer(name: str, mistake: str) -> tuple[str, Callable]:
    """The answer, and the test that finds it."""
    finds, *pairs = WRONG[name][mistake]
    found = {test for test in own_tests(name) if finds in test.__name__}
    assert len(found) == 1, f"{finds!r} is in the names of {len(found)} tests"
    return changed(RIGHT[name][0], *pairs), found.pop()


# --- Found on the spot ------------------------------------------------------------------------------------------------


def with_answer(name: str, text: str, patience: timedelta, function: Callable, *args: Any) -> Any:
    """``function(*args)`` with an answer in place of the module's own definitions, in this process."""
    exercise = EXERCISES[name]
    namespace = vars(importlib.import_module(exercise.module))
    before = dict(namespace)
    methods = [part.split(".") for part in exercise.parts if "." in part]
    originals = [(before[owner], method, vars(before[owner])[method]) for owner, method in methods]
    try:
        exec(grade.splice(exercise, text, "answer.py"), namespace)
        with mock.patch.object(wire, "PATIENCE", patience):
            return function(*args)
    finally:
        for key in namespace.keys() - before.keys():
            del namespace[key]
        namespace.update(before)
        for owner, method, original in originals:
            setattr(owner, method, original)


class Swapped:
    """``run_ranks`` with an answer in place on every rank."""

    def __init__(self, run_ranks: Callable, *answer: Any):
        self.run_ranks, self.answer = run_ranks, answer

    def __call__(self, function: Callable, world_size: int, *args: Any) -> list[Any]:
        patience = self.answer[-1].total_seconds()
        return self.run_ranks(with_answer, world_size, *self.answer, function, *args, timeout=20 * patience)


def run_test(test: Callable, run_ranks: Callable, name: str, text: str, patience: timedelta = wire.PATIENCE) -> None:
    """One of test_exercises.py's tests, on an answer."""
    answer = name, text, patience
    wants_ranks = "run_ranks" in test.__code__.co_varnames[:test.__code__.co_argcount]
    with_answer(*answer, test, *([Swapped(run_ranks, *answer)] if wants_ranks else []))


@pytest.mark.parametrize("name, number", [(name, number) for name, texts in RIGHT.items()
                                          for number in range(len(texts))])
def test_right_answers_pass(run_ranks, request, name, number):
    if number > 0 and not request.config.getoption("--long"):
        pytest.skip("the exercise's first answer is tried always, the others with --long")
    for test in own_tests(name):
        run_test(test, run_ranks, name, RIGHT[name][number])


@pytest.mark.parametrize("name, mistake", [(name, mistake) for name in WRONG for mistake in WRONG[name]])
def test_a_mistake_is_found(run_ranks, request, name, mistake):
    text, test = wrong_answer(name, mistake)
    if mistake != next(iter(WRONG[name])) and not request.config.getoption("--long"):
        pytest.skip("the exercise's first mistake is tried always, the others with --long")
    with pytest.raises((Exception, pytest.fail.Exception)):
        run_test(test, run_ranks, name, text, timedelta(seconds=1))


def test_every_exercise_has_its_answers_and_its_tests():
    assert set(WRONG) == set(RIGHT) == set(EXERCISES)
    for name in WRONG:
        for mistake in WRONG[name]:
            wrong_answer(name, mistake)
    there = {f"{path.name}::{name}" for path in Path(__file__).parent.glob("test_*.py")
             for name in grade.definitions(ast.parse(path.read_text()))}
    for exercise in EXERCISES.values():
        for check in exercise.checks:
            assert {test.partition("[")[0] for test in check.ids} <= there, check.asks
    assert set(compare.WORKLOADS) <= set(EXERCISES)


# --- The whole grader -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_is_passed(monkeypatch, tmp_path):
    monkeypatch.setattr(grade, "DONE", tmp_path / "graded")


def graded(tmp_path: Path, capsys: pytest.CaptureFixture, target: str, text: str, *options: str) -> tuple[int, str]:
    """The exit status of the command line, and what it printed."""
    path = tmp_path / "my.py"
    path.write_text(text)
    capsys.readouterr()
    status = grade.main([target, str(path), *options])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def failed_checks(printed: str) -> list[str]:
    return [line[4:].strip() for line in printed.splitlines() if line.startswith("FAIL")]


@pytest.mark.long
def test_a_wrong_answer_is_told_with_the_reason_the_difference_and_what_it_printed(tmp_path, capsys):
    text, _ = wrong_answer("schedulers:WarmupLR", "one step off")
    text = text.replace("        k = t\n", "        k = t\n        if t == 3: print('three', group)\n")
    status, printed = graded(tmp_path, capsys, "schedulers:WarmupLR", text)
    assert status == 1 and failed_checks(printed) == ["the same rates as DeepSpeed, at every step"], printed
    assert "Why it matters: One step off at the start" in printed and "AssertionError: step 1, group 0: rate" in printed
    assert "pass      each param group ends at its own rate" in printed and "3 of 4 pass" in printed
    assert "What your code printed, on all ranks:\n    three 0  (" in printed
    assert "A hint: python tutorials/grade.py schedulers:WarmupLR --hint 1" in printed and not grade.done()


@pytest.mark.long
def test_a_property_that_fails_shows_its_arguments(tmp_path, capsys):
    text, _ = wrong_answer("amp:DynamicLossScaler", "never halving")
    status, printed = graded(tmp_path, capsys, "amp:DynamicLossScaler", text)
    assert status == 1 and "case: test_the_scale_follows_the_rule" in printed.replace("example", "case"), printed
    assert "overflows=[" in printed and "window 1, hysteresis 1, consecutive False, overflows (" in printed, printed


@pytest.mark.parametrize("text, told", [
    ("def checkpoint(function:\n", "my.py does not import: line 1: "),
    ("def chekpoint(function): return function()\n", "my.py lacks checkpoint; a file that has it: python"),
    ("def checkpoint(function, *args):\n    ...\n", "checkpoint is still empty; a hint: python"),
])
def test_files_that_cannot_be_graded_are_told_at_once(tmp_path, capsys, text, told):
    status, printed = graded(tmp_path, capsys, "checkpointing:checkpoint", text)
    assert status == 2 and told in printed
    text = answers.STAGE_1.replace("class Zero", "class Zero(Zero)")
    status, printed = graded(tmp_path, capsys, "zero:stage_1", text)
    assert status == 2 and "Zero inherits from the project's own Zero" in printed
    for module, lacking in (("amp", "Precision"), ("checkpointing", "CheckpointingConfig")):
        status, printed = graded(tmp_path, capsys, module, "def cast(value, dtype): pass")
        assert status == 2 and f"lacks names of {module}.py that engine.py uses: " in printed and lacking in printed


@pytest.mark.long
@pytest.mark.parametrize("text, status, told", [
    ("import torhc\n" + answers.SCHEDULE, 2,
     "it does not import: my.py:1: ModuleNotFoundError: No module named 'torhc'"),
    (answers.SCHEDULE.replace("k = max", "while True:\n            pass\n        k = max"), 1, "it hangs"),
])
def test_files_that_do_not_import_or_hang_are_told(tmp_path, capsys, text, status, told):
    got, printed = graded(tmp_path, capsys, "schedulers:WarmupLR", text, "--slow", "15")
    assert got == status and told in printed, printed


@pytest.mark.long
@pytest.mark.parametrize("name", ["steps:overlap", *(name for name in EXERCISES if not name.startswith("steps:"))])
def test_a_right_answer_passes_the_whole_grader(tmp_path, capsys, name):
    status, printed = graded(tmp_path, capsys, name, RIGHT[name][1])
    assert status == 0 and "Well done.\n" in printed, printed
    assert list(grade.done()) == [name]
    assert (name in compare.WORKLOADS) is ("this project" in printed and "yours 1.0 x" in printed), printed


@pytest.mark.long
@pytest.mark.parametrize("module", ["schedulers", "amp"])
def test_a_whole_module_is_graded_by_its_tests(tmp_path, capsys, module):
    status, printed = graded(tmp_path, capsys, module, (grade.ROOT / f"{module}.py").read_text())
    assert status == 0 and "pass      " in printed, printed


@pytest.mark.parametrize("name", EXERCISES)
def test_a_starting_file_has_every_part_and_no_body(tmp_path, capsys, name):
    assert grade.main(["--start", name]) == 0
    text, exercise = capsys.readouterr().out, EXERCISES[name]
    assert set(exercise.parts) <= set(grade.definitions(ast.parse(text)))
    assert "Useful: " in text and "Looked at: " in text and max(map(len, text.splitlines())) <= 120
    (tmp_path / "my.py").write_text(text)
    with pytest.raises(grade.AnswerError, match="is still empty"):
        grade.read_answer(tmp_path / "my.py", exercise)
    compile(grade.put_over(exercise, text, "my.py"), "module", "exec")


def test_hints_come_one_by_one_and_the_list_shows_what_is_passed(capsys):
    for upto in (1, 3):
        assert grade.main(["zero:stage_1", "--hint", str(upto)]) == 0
        assert capsys.readouterr().out.count("Hint ") == upto
    grade.DONE.write_text('{"zero:stage_3": "2026-11-29"}')
    assert grade.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "zero:stage_3               6        45       2026-11-29  The heart of stage 3" in printed
    assert "zero:stage_1               6        60                   ZeRO" in printed
    for wrong, told in ((["zero:stage_4", "my.py"], "the exercise is 'zero:stage_4'; allowed: steps:all_reduce"),
                        (["zero:stage_1", "--hint", "4"], "--hint is 4; allowed: 1 to 3"),
                        (["zero:stage_1"], "FILE is missing")):
        with pytest.raises(SystemExit):
            grade.main(wrong)
        assert told in capsys.readouterr().err


def test_ranks_that_wait_for_a_failed_one_are_not_a_hang():
    waited = "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer"
    assert grade._hangs("--- no answer from rank [0, 1] of 2") and grade._hangs(f"--- rank 0:\n{waited}")
    mixed = f"--- rank 0 of 2:\n{waited}\n--- rank 1 of 2:\nNameError: name 'x' is not defined\n--- no answer from 2"
    assert not grade._hangs(mixed) and grade.essence(mixed) == "NameError: name 'x' is not defined"


def test_an_error_is_told_with_the_readers_line_and_once_where_it_stops_everything():
    in_pytest = ("tests/test_schedulers.py:50: in test_rates\n    schedule.step()\n"
                 "../my.py:12: in step\n    self.go()\n../my.py:47: in go\n    x + 1\n"
                 "torch/x.py:3: in add\nE   NameError: name 'x' is not defined\n")
    on_a_rank = ('--- rank 0 of 2:\nTraceback:\n  File "/tmp/my.py", line 47, in go\n    x + 1\n'
                 "NameError: name 'x' is not defined\n--- no answer from rank [1] of 2")
    told = "my.py:47: NameError: name 'x' is not defined"
    assert grade.essence(in_pytest, "my.py") == grade.essence(on_a_rank, "my.py") == told
    assert grade.essence(in_pytest, "other.py") == grade.essence(in_pytest) == told.partition(": ")[2]
    drawn = "Failing test case: test_rates(\n    steps=3,\n)\n"
    for text in (in_pytest + "".join(f"E   {line}\n" for line in drawn.splitlines()), f"{on_a_rank}\n{drawn}"):
        assert grade.essence(f"{text}more\n", "my.py") == f"{told}\nFailing test case: test_rates(\nsteps=3,\n)"
    checks = (Check("one", "why", ("a::one",)), Check("two", "why", ("a::two",)))
    failed, passed = grade.Outcome("failed", told), grade.Outcome("passed")
    longer = grade.Outcome("failed", f"{told}\nValueError: WarmupLR: {told}")
    everywhere, _ = grade.report("x", checks, {"a::one": failed, "a::two": longer})
    assert everywhere.startswith("Every test stops at the same error:\n    my.py:47") and everywhere.count(told) == 1
    once, _ = grade.report("x", checks, {"a::one": failed, "a::two": passed}, ["here", "there", "here"])
    assert "Every test" not in once and once.count(told) == 1
    assert "on all ranks:\n    here  (2 times)\n    there\n" in once


def test_a_timeline_has_a_letter_per_phase_and_a_mark_per_message():
    measured = {"phases": [["forward", 0.0, 0.4], ["backward", 0.4, 1.0]], "sends": [0.5, 0.501, 0.99]}
    phases, marks = grade.timeline("yours", measured, 2.0)
    assert phases == f"{'yours':<14}{'f' * 14}{'b' * 22} 1000.0 ms"
    assert [place - 14 for place, mark in enumerate(marks) if mark == "^"] == [17, 34]
    assert grade.timeline("yours", measured | {"sends": []}, 2.0) == [phases]
