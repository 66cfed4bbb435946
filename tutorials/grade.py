"""Write a part of this project yourself, and have the project's own tests grade it.

    python tutorials/grade.py --list                                  the exercises, from easy to hard
    python tutorials/grade.py --start zero:reduce_scatter > my.py     signatures and docstrings, to be filled in
    python tutorials/grade.py zero:reduce_scatter my.py               grade it
    python tutorials/grade.py zero:reduce_scatter --hint 1            a hint; 2 tells more
    python tutorials/grade.py zero my_zero.py                         a whole module of yours, by all of its tests

**How.** The project is copied into a temporary folder, and there your definitions take the place of its own: a whole
file replaces the module; a part is executed inside the module right behind the original, so that every name of the
module can be used in it. Then pytest runs there, in processes of its own, those tests that your part decides. Nothing
in the project's folder changes. A starting file is cut out of the modules as they are now.

The exit status is 0 where everything passes, 1 where a test fails, 2 where the file can't be graded: it does not
import, lacks a name, or hangs.

This file is also the pytest plugin that tells the grader what happens, test by test.
"""

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EVENTS = "GRADE_EVENTS"  # the environment variable that names the file to which the plugin writes
ANSWER = "GRADE_ANSWER"  # and the one that has the name of the reader's file, as tracebacks show it
MODULES = ("schedulers", "amp", "checkpointing", "zero")
SLOW = 120.0  # seconds after which a test counts as hanging


# --- The exercises ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Tests that ask one question.

    asks    what is tested
    why     why it matters
    tests   ids below ``tests/``
    """
    asks: str
    why: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Exercise:
    """Definitions of one module, to be written by the reader.

    parts     their names in the module: a function, a class, or Class.method
    chapter   which to read before; ``minutes`` are a rough guess
    anew      the class is written from nothing, with the methods in ``parts`` alone; else they replace single methods
    task      what to write
    hints     each tells more than the one before
    """
    name: str
    chapter: int
    minutes: int
    parts: tuple[str, ...]
    task: str
    checks: tuple[Check, ...]
    hints: tuple[str, ...]
    anew: bool = False

    @property
    def module(self) -> str:
        """The name of the module."""
        return self.name.partition(":")[0]

    @property
    def owners(self) -> list[str]:
        """The top-level names that ``parts`` belong to, in their order."""
        return list(dict.fromkeys(part.partition(".")[0] for part in self.parts))


EXERCISES = {exercise.name: exercise for exercise in (
    Exercise(
        "schedulers:WarmupLR", 4, 15, ("WarmupLR",),
        "A learning-rate schedule: up from the lowest to the highest rate, then flat.",
        (Check("the same rates as DeepSpeed, at every step",
               "One step off at the start, and every later step of a run has another rate than the one it is compared "
               "with.",
               tuple(f"test_schedulers.py::test_rates_and_momenta_equal_deepspeeds[WarmupLR-{i}]" for i in range(5))),
         Check("each param group ends at its own rate",
               "Groups have rates of their own because their parameters need them; one rate for all trains another "
               "model.",
               ("test_schedulers.py::test_warmup_keeps_each_groups_own_rate_unless_told_otherwise",
                "test_grade.py::test_the_top_of_a_warmup_is_the_rate_that_the_optimizer_began_with")),
         Check("a warm-up that is resumed goes on where it was",
               "One that starts over, or takes the rate of the moment for the top, trains another model from there on.",
               ("test_grade.py::test_a_warmup_goes_on_where_it_was",)),
         Check("a state for other param groups is refused",
               "A schedule that is resumed with another optimizer's rates goes wrong in silence.",
               ("test_schedulers.py::test_a_state_for_other_groups_is_refused",))),
        ("A Schedule is a function of one number: define rate(t, group), where t counts the schedule's steps. t = 0 is "
         "in force for the first optimizer step.",
         "As in DeepSpeed the way up begins one step late: at t = 0 and t = 1 the rate is the lowest. So use "
         "k = max(t - 1, 0). linear: k / n. log: log(k + 1) / log(n), which is 1 at k = n - 1. An n of 1 counts as 2.",
         "_range(optimizer, \"warmup_min_lr\", low, \"warmup_max_lr\", high) gives two lists, the lowest and the "
         "highest rate per group; CURVES has both ways up (log takes n - 1 steps). For warmup_max_lr None high is "
         "a list: each group's initial_lr, or its lr where it has none. Set what rate() needs before "
         "super().__init__(optimizer, last_batch_iteration), which already asks for it and keeps the position.")),
    Exercise(
        "amp:DynamicLossScaler", 7, 20, ("DynamicLossScaler",),
        "A loss scale that is as large as the gradients allow.",
        (Check("the scale after any history is DeepSpeed's, to the last bit",
               "A scale that never falls makes every step overflow, and one that never grows lets small gradients "
               "vanish for the rest of the run.",
               ("test_amp.py::test_the_scale_is_deepspeeds_to_the_last_bit",)),
         Check("the rule holds for any window and hysteresis, and after resuming",
               "What is not in state_dict() starts anew after a resume, and the run goes another way.",
               ("test_amp.py::test_the_scale_follows_the_rule_also_when_it_is_resumed",
                "test_grade.py::test_a_loss_scale_goes_on_where_it_was_after_any_short_history")),
         Check("an overflow at the smallest scale is an error",
               "Without it a diverged run skips every step for ever, and looks as if it trained.",
               ("test_grade.py::test_an_overflow_at_the_smallest_scale_is_an_error",)),
         Check("inside the engine, on two ranks: skip, halve, go on",
               "One rank that updates while another skips leaves two different models.",
               tuple("test_amp.py::test_an_overflow_changes_nothing_is_counted_and_is_told_once_in_every_precision"
                     f"[fp16-{stage}]" for stage in range(4)))),
        ("Two counters: good steps since the last overflow, and overflows that are still forgiven.",
         "Overflow: the good steps begin at 0 again. While more than one overflow is left of the hysteresis, use one "
         "up; then halve at every overflow, never below the minimum. At the minimum raise MinimumLossScaleError.",
         "No overflow: if the good steps before this one are a multiple of the window, and not 0, double the scale and "
         "give the hysteresis back; with ``consecutive`` any good step gives it back. Then count this step. "
         "state_dict() has to hold the scale and both counters, under the names of your attributes.")),
    Exercise(
        "amp:Precision.path", 7, 20, ("Precision.path",),
        "Which dtype goes where: compute, master weights, accumulation, reduction.",
        (Check("masters are the weights as they were before rounding",
               "Masters in 16 bits lose every update that is smaller than a 256th of the weight in bf16.",
               ("test_amp.py::test_masters_are_the_weights_as_they_were_before_rounding[fp16]",
                "test_amp.py::test_masters_are_the_weights_as_they_were_before_rounding[bf16]")),
         Check("many small gradients add up",
               "A sum in bf16 stands still at 1 + 1/512, so that long accumulation windows lose their gradients.",
               ("test_amp.py::test_many_small_bf16_gradients_add_up_to_their_fp32_sum",)),
         Check("bytes per rank are those of the table",
               "The bytes are what mixed precision and ZeRO are for.",
               tuple(f"test_amp.py::test_bytes_per_rank_are_those_of_the_table_in_bf16[{stage}-2]"
                     for stage in range(4))),
         Check("gradients travel in the dtype that the config names",
               "16 bits halve the traffic, and fp32 keeps the sum exact: the config decides, not chance.",
               ("test_amp.py::test_gradients_are_sent_in_the_dtype_that_the_config_says",)),
         Check("the four dtypes of every parameter, under every config",
               "A key that is read nowhere changes nothing, and says nothing: 16-bit masters, autocast's safe modules.",
               ("test_grade.py::test_every_parameter_has_the_dtypes_that_the_config_says",)),
         Check("chosen modules stay in fp32",
               "Norms and routers in 16 bits can make a run diverge.",
               ("test_amp.py::test_chosen_modules_stay_in_fp32[fp16]",
                "test_amp.py::test_chosen_modules_stay_in_fp32[bf16]"))),
        ("Four answers, one per field of Dtypes. self.half is the 16-bit dtype, or None; self.kept holds the id() of "
         "each parameter that stays in fp32.",
         "compute: half, or fp32 for what is kept. master: fp32, or that of compute where "
         "fp16.fp16_master_weights_and_grads or bf16.bf16_master_weights_and_grads is set. gradient: "
         "data_types.grad_accum_dtype, or that of the master. reduction: communication_data_type, or that of the "
         "gradient. self.config has these keys, with dtypes, or None, as values.",
         "Without a half dtype compute and master are the parameter's own dtype; a parameter that is not "
         "floating-point keeps its dtype everywhere. Parameters whose id() is in self.low (autocast's "
         "lower_precision_safe_modules) are reduced in torch_autocast.dtype, unless communication_data_type is set.")),
    Exercise(
        "checkpointing:checkpoint", 6, 45, ("checkpoint",),
        "Run a function, keep only its inputs, and run it again when backward needs what it saved.",
        (Check("results, gradients and random state of plain autograd, with dropout and nested",
               "A recomputation that draws new random numbers drops other elements in backward than in forward, and "
               "the gradient belongs to no loss.",
               ("test_grade.py::test_a_checkpointed_function_equals_plain_autograd",)),
         Check("parameters get gradients also where no input needs one",
               "The first block of a model gets data, which need no gradient; its weights would stop learning in "
               "silence.",
               ("test_grade.py::test_a_checkpointed_function_trains_its_parameters_where_no_input_needs_a_gradient",)),
         Check("autocast is on again in the second run, and off where it was off",
               "A second run in another dtype saves other tensors than the first, and their gradients are others.",
               ("test_grade.py::test_a_checkpointed_function_runs_under_the_autocast_of_its_call",)),
         Check("it runs twice: once forward, once for backward",
               "A function that runs again for each tensor that backward asks for costs many forward passes.",
               ("test_grade.py::test_a_checkpointed_function_runs_twice",)),
         Check("memory of the inputs alone",
               "Keeping less is the point: a function that saves everything passes every other test.",
               ("test_grade.py::test_a_checkpointed_function_keeps_its_inputs_only",)),
         Check("nothing is done where nothing is saved",
               "Evaluation would pay for a feature that it can't use.",
               ("test_grade.py::test_a_checkpointed_function_does_nothing_without_grad_mode",)),
         Check("second derivatives, and backward twice",
               "Gradient penalties and torch.autograd.grad are ordinary PyTorch; a backward pass inside a backward "
               "pass breaks them.",
               ("test_checkpointing.py::"
                "test_several_backward_calls_parts_of_the_graph_and_second_derivatives[once]",))),
        ("saved_tensors_hooks(pack, unpack) decides what autograd keeps. Let pack keep an empty slot, no tensor.",
         "At the first unpack run the function again, under other hooks whose pack puts the n-th tensor into the n-th "
         "slot. Run it in grad mode (torch.enable_grad()), on detached inputs that need a gradient where the originals "
         "did, so that it saves the same tensors; a detached copy keeps the new graph apart from the old one.",
         "Note torch.get_rng_state() before the first run; around the second use torch.random.fork_rng(devices=[]) and "
         "torch.set_rng_state(). Note torch.is_autocast_enabled(\"cpu\") and torch.get_autocast_dtype(\"cpu\") as "
         "well, and run the second time under torch.autocast with both. For backward twice and second derivatives "
         "hand a slot's tensor out once, and "
         "recompute when it is asked for again. Detach what goes into a slot: with its graph, which holds the hooks "
         "and so the slots, it would keep itself alive for ever.")),
    Exercise(
        "zero:reduce_scatter", 5, 20, ("Communicator.reduce_scatter",),
        "The collective of ZeRO: everyone's gradients in, one slice of the sum out.",
        (Check("the sum is right, on three ranks and in training",
               "A wrong slice, or a sum that misses a rank, trains another model.",
               ("test_zero.py::test_the_naive_reduction_gives_the_same",
                "test_zero.py::test_flush_applies_the_true_mean_of_a_partial_window",
                "test_grade.py::test_a_reduce_scatter_gives_each_rank_its_slice_of_the_sum")),
         Check("half the elements of an all-reduce are sent",
               "An all-reduce gives the same numbers for twice the traffic; then ZeRO-1 would cost more than no ZeRO.",
               ("test_grade.py::test_what_is_counted_is_what_is_sent",
                "test_zero.py::test_elements_sent_are_those_of_the_table[1-2]")),
         Check("it begins to send at once, and returns before the other ranks have called it",
               "What waits inside the call, or does nothing before it is waited for, can't overlap with backward.",
               ("test_grade.py::test_a_reduce_scatter_returns_at_once",)),
         Check("the same bits in every run",
               "Sums in the order of arrival differ from run to run, and a bug can no longer be reproduced.",
               ("test_zero.py::test_two_runs_and_all_ranks_give_the_same_bits[3]",))),
        ("Every other rank needs your flat's slice for it, and you need each one's slice for you: one isend and one "
         "irecv per other rank. self._others() lists them.",
         "Return a Handle(self, works, finish) at once. It waits for all works, then calls finish, which adds the "
         "parts in rank order: _sum(parts, out, add). self._begin(\"reduce-scatter\", flat, 1, what) counts what is "
         "sent.",
         "self._tag(\"reduce-scatter\") gives the messages of one call a tag of their own. Receive into "
         "self.spare.take(numel, dtype) and give it back in finish. With one rank nothing is sent, and _sum([own], "
         "out, add) is left.")),
    Exercise(
        "zero:bucketed_all_reduce", 5, 45, ("Communicator.all_reduce", "Gradients.take", "Reducer.launch_ready"),
        "Plain data parallelism, done well: gradients go into flat buckets, and full ones out while backward runs.",
        (Check("gradients may come in another order on each rank",
               "Collectives are matched by their order: two ranks that start different ones wait for each other, or "
               "mix up each other's numbers.",
               ("test_grade.py::test_gradients_that_come_in_another_order_on_each_rank",)),
         Check("training equals plain PyTorch on the whole batch",
               "With unused layers, accumulation and several backward calls, as in real models, each gradient must "
               "count exactly once.",
               ("test_zero.py::test_training_equals_plain_pytorch_on_the_whole_batch[2]",)),
         Check("full buckets go out while backward runs, and with overlap_comm false after it",
               "Communication that hides behind computation is what buckets and hooks are for; without it each step "
               "lasts as long as both together.",
               ("test_grade.py::test_full_buckets_go_out_while_backward_runs",)),
         Check("no gradient is kept twice",
               "A second copy of the gradients is a quarter of the memory of training with Adam.",
               ("test_grade.py::test_gradients_are_kept_once",)),
         Check("a gradient that comes after its bucket was sent still counts",
               "Recomputation and shared layers finish a gradient more than once in a backward pass.",
               ("test_zero.py::test_a_shared_layer_recomputed_twice_has_the_right_gradient[True]",)),
         Check("as much traffic as the table says",
               "A bucket that is sent twice, or gradient by gradient, costs the time that buckets save.",
               ("test_zero.py::test_elements_sent_are_those_of_the_table[1-2]",
                "test_grade.py::test_what_is_counted_is_what_is_sent"))),
        ("take(slot, gradient): the gradient's place is slot.view(self.buffer) once self._prepare_buffer() was called. "
         "Copy where the place is empty, add where it is not: self.filled has the slots whose place is not.",
         "take also adds the slot to self.used and to self.arrived, by which the bucket knows that it is complete. If "
         "self.life is Life.SENDING or Life.SENT, the sum is on its way or there: keep the gradient in "
         "self.late[slot], added to what is there. launch_ready: only where self.zero.config.overlap_comm and "
         "self.reduces_now.",
         "launch_ready calls self.launch(gradients) for the first of self.queue while that is complete, and never for "
         "one behind it: the queue has the same order on all ranks. all_reduce: self._begin(kind, tensor, 2, what), "
         "then a Handle with dist.all_reduce(..., group=self._reductions, async_op=True) and finish. A sparse gradient "
         "needs to_dense().")),
    Exercise(
        "zero:stage_1", 6, 60, ("Zero.__init__", "Zero.finish_backward", "Zero.step"),
        "ZeRO stage 1 from nothing, in about 60 lines: each rank updates its slice of the parameters, and only that.",
        (Check("training equals plain PyTorch on the whole batch, with clipping",
               "Sharding memory must not change what is learned: with tied weights, with parameters that have no "
               "gradient on some ranks, or on none, and with a scaled loss.",
               ("test_grade.py::test_stage_1_by_hand_equals_plain_pytorch",)),
         Check("a step whose norm is not finite updates nothing",
               "One update with NaN, and every later step is lost.",
               ("test_grade.py::test_stage_1_by_hand_leaves_out_a_step_that_is_not_finite",)),
         Check("micro-batches add up, and are sent once",
               "A window of m micro-batches that is sent m times costs m times the traffic, for nothing.",
               ("test_grade.py::test_stage_1_by_hand_accumulates",)),
         Check("the optimizer's state is really sharded",
               "8 bytes per parameter on every rank are what stage 1 exists to shard.",
               ("test_grade.py::test_stage_1_by_hand_shards_the_optimizer",)),
         Check("nothing else is kept between steps",
               "Another optimizer, or a second copy of the weights, takes the memory that sharding has saved.",
               ("test_grade.py::test_stage_1_by_hand_keeps_nothing_else",)),
         Check("no more traffic than plain data parallelism",
               "A reduce-scatter and an all-gather cost as much as one all-reduce; stage 1 is free, if done right.",
               ("test_grade.py::test_stage_1_by_hand_sends_as_much_as_an_all_reduce",))),
        ("Make all parameters views of one flat tensor whose length the number of ranks divides, with rank 0's values. "
         "This rank updates its slice of it. Give the optimizer, in the place of its parameters, one nn.Parameter for "
         "each part of a parameter that lies in the slice: a view of it. Communicator has shard_of, broadcast, "
         "reduce_scatter, all_reduce and all_gather; keep it as self.communicator.",
         "step: copy each p.grad into a flat tensor (zero where it is None: another rank may have one), reduce_scatter "
         "it, divide by divisor (the sum over ranks becomes the mean), set its slices as the grads of your parts, "
         "optimizer.step(), all_gather the flat parameters, and set every p.grad to None. A parameter that has no "
         "gradient on any rank must be skipped: its part's grad stays None. So all_reduce which ones have one. p.grad "
         "adds up micro-batches by itself, and finish_backward has nothing to do.",
         "The norm is over all ranks: all_reduce the sum of squares of your slice, take the root; clip by "
         "min(1, clip / (norm + 1e-6)), or not at all where clip is 0. Where the norm is not finite and skip_overflow "
         "is set, leave the update out. Return StepResult(norm, coefficient, whether it was left out, None). Handles "
         "need wait(). Work under torch.no_grad(). Let p.data be a view of the flat tensor, and the optimizer's "
         "param_groups[0][\"params\"] the list of your parts."),
        anew=True),
    Exercise(
        "zero:stage_3", 6, 45,
        ("Bucket.start_gather", "Bucket.free", "Unit.start_gather", "Unit.finish_gather", "Unit.free", "Unit.acquire",
         "Unit.release"),
        "The heart of stage 3: parameters that come just before their use, and go right after it.",
        (Check("only the unit in use and the next one are whole",
               "A unit that is never freed makes stage 3 a slow stage 2.",
               ("test_zero.py::test_stage_3_holds_the_unit_in_use_and_the_next_one_only",
                "test_zero.py::test_evaluation_and_generation_free_what_they_gathered",
                "test_grade.py::test_evaluation_holds_two_units_at_most")),
         Check("bytes per rank are those of the table",
               "16/N bytes per parameter are what stage 3 is for.",
               ("test_zero.py::test_bytes_per_rank_are_those_of_the_table[3-2]",
                "test_grade.py::test_stage_3_keeps_shards_alone_between_steps")),
         Check("training equals plain PyTorch, also with shared and recomputed layers",
               "A unit that is freed while a second use still needs it computes with garbage.",
               ("test_zero.py::test_training_equals_plain_pytorch_on_the_whole_batch[2]",
                "test_zero.py::test_a_shared_layer_recomputed_twice_has_the_right_gradient[False]")),
         Check("every bucket's gather begins early, and is waited for before use and before its memory goes",
               "A gather that is still under way writes into memory that is another tensor's by then.",
               ("test_grade.py::test_gathers_may_come_late",)),
         Check("one gather in forward, one in backward",
               "Each gather sends every parameter once; one too many is a third more traffic.",
               ("test_zero.py::test_elements_sent_are_those_of_the_table[1-2]",)),
         Check("touching a sharded parameter is an error",
               "Its memory is gone: reading it would give garbage, not a mistake that one sees.",
               ("test_zero.py::test_touching_a_sharded_parameter_is_an_error_and_not_garbage",))),
        ("A Bucket gives flat its memory, copies its own shard in and all-gathers the rest. A Unit does so for its "
         "buckets and keeps its state. It also counts users: the first one gathers, the last one frees.",
         "The memory comes and goes with flat.untyped_storage().resize_(bytes): the storage object stays, so that the "
         "parameters, and what autograd saved, remain views of it. Before it goes, wait for the gather under way.",
         "acquire: add the user; SHARDED: self.start_gather(); GATHERING: self.finish_gather(). A prefetched unit "
         "comes to acquire in state GATHERING. finish_gather gives each slot.parameter its class slot.kind back, free "
         "makes it a ShardedParameter. release: discard the user, and self.free() where none is left and the state is "
         "not SHARDED.")),
)}


# --- The reader's file ------------------------------------------------------------------------------------------------


class AnswerError(Exception):
    """A file that can't be graded; the message says why."""


def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    """The functions and classes of a module, and the methods of its classes as Class.method."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}": n for n in node.body if isinstance(n, ast.FunctionDef)}
    return found


def parsed(path: Path) -> tuple[str, ast.Module]:
    """A file's text and its syntax tree. Raises AnswerError where there is none."""
    try:
        text = path.read_text()
        return text, ast.parse(text)
    except OSError as error:
        raise AnswerError(f"{path} can't be read: {error.strerror}") from None
    except SyntaxError as error:
        raise AnswerError(f"{path} does not import: line {error.lineno}: {error.msg}") from None


def read_answer(path: Path, exercise: Exercise) -> str:
    """The text of the reader's file, with its imports of the module itself left out. Raises AnswerError."""
    text, tree = parsed(path)
    found = definitions(tree)
    missing = [part for part in exercise.parts if part not in found]
    if missing:
        raise AnswerError(f"{path} lacks {', '.join(missing)}; a file that has it: python tutorials/grade.py --start "
                          f"{exercise.name}")
    if all(_is_empty(found[part]) for part in exercise.parts):
        raise AnswerError(f"{path}: {', '.join(exercise.parts)} is still empty; a hint: python tutorials/grade.py "
                          f"{exercise.name} --hint 1")
    lines = text.splitlines()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == exercise.module:
            lines[node.lineno - 1:node.end_lineno] = ["pass"] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines) + "\n"


def _is_empty(node: ast.AST) -> bool:
    """Whether a function, or every method of a class, has no body beside its docstring."""
    if isinstance(node, ast.ClassDef):
        return all(_is_empty(n) for n in node.body if isinstance(n, ast.FunctionDef))
    return all(isinstance(n, ast.Pass) or isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
               for n in node.body)


def check_module(path: Path, module: str) -> str:
    """The text of a whole module of the reader's. Raises AnswerError where it lacks a name that engine.py uses."""
    text, tree = parsed(path)
    has = {name for node in ast.walk(tree) for name in _defined(node)}
    engine = list(ast.walk(ast.parse((ROOT / "engine.py").read_text())))
    called = {alias.asname or alias.name for node in engine if isinstance(node, ast.Import)
              for alias in node.names if alias.name == module}  # the module's name there
    used = {node.attr for node in engine
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in called}
    if used - has:
        raise AnswerError(f"{path} lacks names of {module}.py that engine.py uses: {', '.join(sorted(used - has))}")
    return text


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name for alias in node.names)


# --- A file to start from ---------------------------------------------------------------------------------------------


def starting_file(exercise: Exercise) -> str:
    """Signatures and docstrings of the exercise's parts, as they stand in the module."""
    text = (ROOT / f"{exercise.module}.py").read_text()
    lines, found = text.splitlines(), definitions(ast.parse(text))
    blocks = []
    for owner in exercise.owners:
        node = found[owner]
        if isinstance(node, ast.FunctionDef):
            blocks.append(_head(node, lines))
            continue
        whole = owner in exercise.parts
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)
                   and (whole or f"{owner}.{n.name}" in exercise.parts)]
        blocks.append("\n\n".join([_head(node, lines)] + [_head(method, lines) for method in methods]))
    checks = "\n".join(f"    {check.asks}" for check in exercise.checks)
    return (f'"""{exercise.name}. {exercise.task}\n\nEvery name of {exercise.module}.py can be used here as if this '
            f'stood in it; the import is for your editor.\nThe checks:\n\n{checks}\n"""\n\n'
            f"from {exercise.module} import *  # noqa: F403\n\n\n" + "\n\n\n".join(blocks) + "\n")


def _head(node: ast.AST, lines: list[str]) -> str:
    """A definition without its body: decorators, signature and docstring."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    if ast.get_docstring(node) is not None:
        return "\n".join(lines[first - 1:node.body[0].end_lineno])
    head = lines[first - 1:node.body[0].lineno - 1]
    while not head[-1].rstrip().endswith(":"):
        head.pop()  # comments above the body's first statement
    return "\n".join([*head, *([] if isinstance(node, ast.ClassDef) else [" " * (node.col_offset + 4) + "..."])])


# --- The project with the reader's part in it -------------------------------------------------------------------------


SPLICE = """

_kept = {{name: globals()[name] for name in {kept!r}}}
exec(compile({text!r}, {path!r}, "exec"), globals())
for _owner, _name in {methods!r}:
    setattr(_kept[_owner], _name, vars(globals()[_owner])[_name])
globals().update(_kept)

"""


def splice(exercise: Exercise, text: str, path: str) -> str:
    """Code that, executed in the module's namespace, puts the definitions in ``text`` over the module's own."""
    methods = [] if exercise.anew else [tuple(part.split(".")) for part in exercise.parts if "." in part]
    return SPLICE.format(kept=sorted({owner for owner, _ in methods}), text=text, path=path, methods=methods)


def put_over(exercise: Exercise, text: str, path: str) -> str:
    """The module's source with the reader's definitions behind the originals, before anything else uses them."""
    source = (ROOT / f"{exercise.module}.py").read_text()
    found = definitions(ast.parse(source))
    end = max(found[owner].end_lineno for owner in exercise.owners)
    lines = source.splitlines()
    return "\n".join(lines[:end]) + splice(exercise, text, path) + "\n".join(lines[end:]) + "\n"


def copy_project(folder: Path) -> None:
    """What the tests need of this project, into ``folder``."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tutorials/*.py"), *ROOT.glob("tests/**/*"), ROOT / "README.md"]:
        if path.is_file() and "__pycache__" not in path.parts:
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


# --- Running the tests ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one test: "passed", "failed", "hung" or "skipped", and the message where it failed."""
    result: str
    message: str = ""


def run_tests(folder: Path, tests: list[str], slow: float, answer: str) -> dict[str, Outcome]:
    """Run tests of the project in ``folder``: their outcomes by id, as far as they came. Raises AnswerError.

    The first test that hangs ends the run. ``answer`` is the name that the reader's code has in tracebacks.
    """
    events = folder / "events"
    events.touch()
    environment = {**os.environ, EVENTS: str(events), ANSWER: answer, "PYTHONPATH": str(folder / "tutorials"),
                   "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "grade", "-p", "no:cacheprovider", "--tb=short",
               *(f"tests/{test}" for test in tests)]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    try:
        outcomes = _follow(process, events, slow)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        process.wait()
    if not outcomes:
        raise AnswerError("pytest ran no test:\n" + (folder / "output").read_text())
    return outcomes


def _follow(process: subprocess.Popen, events: Path, slow: float) -> dict[str, Outcome]:
    """Read what the plugin writes until pytest ends or a test hangs."""
    outcomes: dict[str, Outcome] = {}
    running, seen, since = None, 0, time.monotonic()
    while True:
        ended = process.poll() is not None  # before reading: what was written before the end is read
        for line in events.read_text().splitlines()[seen:]:
            seen, since = seen + 1, time.monotonic()
            event = json.loads(line)
            if event["kind"] == "collect":
                raise AnswerError(f"it does not import: {event['message']}")
            running = event["test"] if event["kind"] == "start" else None
            if running is None:
                outcomes[event["test"]] = Outcome(event["kind"], event["message"])
                if event["kind"] == "hung":
                    return outcomes
        if ended:
            return outcomes
        if time.monotonic() - since > slow:
            if running is None:
                raise AnswerError(f"it hangs while it is imported: nothing happened for {slow:g} seconds")
            outcomes[running] = Outcome("hung", f"no end after {slow:g} seconds")
            return outcomes
        time.sleep(0.05)


def _write(**event: str) -> None:
    if EVENTS in os.environ:
        with open(os.environ[EVENTS], "a") as file:
            file.write(json.dumps(event) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    """A hook of pytest's: a test begins."""
    _write(kind="start", test=nodeid.removeprefix("tests/"))


def pytest_runtest_logreport(report: Any) -> None:
    """A hook of pytest's: the outcome of a test, or of what it needs before."""
    if report.when != "call" and report.passed or report.when == "teardown":
        return
    text = report.longreprtext if report.failed else ""
    _write(kind="hung" if _hangs(text) else report.outcome, test=report.nodeid.removeprefix("tests/"),
           message=essence(text, os.environ.get(ANSWER, "")))


def pytest_collectreport(report: Any) -> None:
    """A hook of pytest's: a test file that can't be imported."""
    if report.failed:
        _write(kind="collect", message=essence(str(report.longrepr), os.environ.get(ANSWER, "")))


def _errors(text: str) -> list[str]:
    """The last lines of the tracebacks in a failure, of all ranks; those of ranks that only waited for another last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
    return sorted(errors, key=_waited)


def _waited(error: str) -> bool:
    return any(sign in error for sign in ("imed out", "Connection closed by peer", "Connection reset by peer"))


def _hangs(text: str) -> bool:
    """Whether ranks waited until their time was up, and none had another error."""
    errors = _errors(text)
    return all(map(_waited, errors)) and ("no answer from rank" in text or bool(errors))


def essence(text: str, answer: str = "") -> str:
    """The lines of a failure that tell the error: those that pytest marks with E, or a traceback's last one.

    Before them stands the deepest line of the file ``answer`` that the error came through, as ``my.py:47``.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E  ")]
    told = (marked or _errors(text)[:1] or lines[-1:])[:4]
    before = text[:text.index(told[0])] if told else ""
    places = re.findall(rf'(?m)(?:^|[\s/"]){re.escape(answer)}(?:", line |:)(\d+)', before) if answer else []
    return "\n".join([f"{answer}:{places[-1]}: {told[0]}", *told[1:]] if places else told)


# --- The report -------------------------------------------------------------------------------------------------------


def report(name: str, checks: tuple[Check, ...], outcomes: dict[str, Outcome]) -> tuple[str, bool]:
    """The text for the reader, and whether all is well. One error that stops every test stands once, on top."""
    firsts = {outcome.message.partition("\n")[0] for outcome in outcomes.values() if outcome.result != "skipped"}
    everywhere = firsts.pop() if len(firsts) == 1 and len(outcomes) > 1 else ""
    if not re.match(r"\S+:\d+: ", everywhere):  # else it is the same line of the reader's
        everywhere = ""
    rows, passed = [f"Every test stops at the same error:\n    {everywhere}"] if everywhere else [], 0
    for check in checks:
        mine = {test: o for test, o in outcomes.items() if test in check.tests or test.partition("[")[0] in check.tests}
        bad = {test: o for test, o in mine.items() if o.result in ("failed", "hung")}
        complete = all(any(test.startswith(wanted) for test in mine) for wanted in check.tests)
        if complete and not bad:
            passed += 1
            rows.append(f"pass      {check.asks}")
            continue
        rows.append(f"{'FAIL' if bad else 'not run':<10}{check.asks}")
        if bad:
            rows.append(f"          Why it matters: {check.why}")
        for test, outcome in list(bad.items())[:3]:
            hangs = "; it hangs: the ranks wait for each other, or the code does not end"
            rows.append(f"          tests/{test}{hangs if outcome.result == 'hung' else ''}")
            if not everywhere:
                rows += [f"              {line}" for line in outcome.message.splitlines()]
        if len(bad) > 3:
            rows.append(f"          and {len(bad) - 3} more")
    rows.append(f"{name}: {passed} of {len(checks)} pass" + (". Well done." if passed == len(checks) else ""))
    return "\n".join(rows), passed == len(checks)


def checks_of_module(module: str, outcomes: dict[str, Outcome]) -> tuple[Check, ...]:
    """A check per test of a module; the tests' names are the sentences that say what has to hold."""
    names = dict.fromkeys(test.partition("[")[0] for test, outcome in outcomes.items() if outcome.result != "skipped")
    return tuple(Check(name.partition("::test_")[2].replace("_", " "),
                       f"The engine relies on it, wherever a config uses {module}.", (name,)) for name in names)


def grade(target: str, path: Path, slow: float = SLOW) -> tuple[str, bool]:
    """Grade the reader's file: the report, and whether all is well. Raises AnswerError where there is no report."""
    whole = target in MODULES
    exercise = None if whole else EXERCISES[target]
    module = target if whole else exercise.module
    text = check_module(path, module) if whole else put_over(
        exercise, read_answer(path, exercise), str(path.resolve()))
    tests = [f"test_{module}.py"] if whole else list(dict.fromkeys(t for c in exercise.checks for t in c.tests))
    with tempfile.TemporaryDirectory(prefix="grade_") as folder:
        copy_project(Path(folder))
        (Path(folder) / f"{module}.py").write_text(text)
        try:
            outcomes = run_tests(Path(folder), tests, slow, f"{module}.py" if whole else path.name)
        except AnswerError as error:
            raise AnswerError(f"{path}: {error}".replace(folder, ".")) from None
    return report(target, checks_of_module(module, outcomes) if whole else exercise.checks, outcomes)


# --- Command line -----------------------------------------------------------------------------------------------------


def listing() -> str:
    """The exercises, from easy to hard."""
    rows = [f"{'exercise':<26}{'chapter':<9}{'minutes':<9}task"]
    rows += [f"{name:<26}{exercise.chapter:<9}{exercise.minutes:<9}{exercise.task}"
             for name, exercise in EXERCISES.items()]
    return "\n".join([*rows, "", f"{', '.join(MODULES)}: a whole module, graded by all of its tests."])


def hints(exercise: Exercise, upto: int) -> str:
    """The hints up to number ``upto``."""
    return "\n".join(f"Hint {i}. {hint}" for i, hint in enumerate(exercise.hints[:upto], 1))


def main(argv: list[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="Grade your own version of a part of this project.")
    parser.add_argument("target", nargs="?", metavar="EXERCISE", help="an exercise of --list, or a module")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="your file")
    parser.add_argument("--list", action="store_true", help="list the exercises, from easy to hard")
    parser.add_argument("--start", metavar="EXERCISE", help="print a file to start from")
    parser.add_argument("--hint", type=int, metavar="N", help="print the hints up to the N-th, and do not grade")
    parser.add_argument("--slow", type=float, default=SLOW, metavar="SECONDS",
                        help="a test that takes longer counts as hanging (default: %(default)g)")
    options = parser.parse_args(argv)
    if options.list:
        print(listing())
        return 0
    target = options.start or options.target
    if target not in EXERCISES and (options.start or options.hint is not None or target not in MODULES):
        parser.error(f"the exercise is {target!r}; allowed: {', '.join(EXERCISES)}. A whole module has no starting "
                     f"file: grade a copy that you have changed ({', '.join(MODULES)})")
    if options.start:
        print(starting_file(EXERCISES[target]), end="")
        return 0
    if options.hint is not None:
        if not 1 <= options.hint <= len(EXERCISES[target].hints):
            parser.error(f"--hint is {options.hint}; allowed: 1 to {len(EXERCISES[target].hints)}")
        print(hints(EXERCISES[target], options.hint))
        return 0
    if options.file is None:
        parser.error("FILE is missing: your version of it; --start prints a file to start from")
    try:
        text, fine = grade(target, options.file, options.slow)
    except AnswerError as error:
        print(f"grade.py: error: {error}", file=sys.stderr)
        return 2
    print(text)
    if not fine and target in EXERCISES:
        print(f"A hint: python tutorials/grade.py {target} --hint 1")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
