"""The exercises of grade.py: what is to be written, which tests judge it, and hints. From easy to hard by module.

    python tutorials/grade.py --list
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Check:
    """Tests that ask one question.

    asks    what is tested
    why     why it matters
    tests   ids below ``tests/``; "::" stands for those in test_exercises.py
    """
    asks: str
    why: str
    tests: tuple[str, ...]

    @property
    def ids(self) -> list[str]:
        """The tests' whole ids."""
        return [f"test_exercises.py{test}" if test.startswith("::") else test for test in self.tests]


@dataclass(frozen=True)
class Exercise:
    """Definitions of one module, to be written by the reader.

    parts     their names in the module: a function, a class, or Class.method
    chapter   which to read before; ``minutes`` are a rough guess
    uses      names that help, and what they are
    looks     what the checks look at besides results, and what they leave out
    hints     each tells more than the one before
    start     signatures and docstrings; "": as they stand in the module
    anew      the class is written from nothing, with the methods in ``parts`` alone; else they replace single methods
    """
    name: str
    chapter: str
    minutes: int
    parts: tuple[str, ...]
    task: str
    uses: str
    looks: str
    checks: tuple[Check, ...]
    hints: tuple[str, ...]
    start: str = ""
    anew: bool = False

    @property
    def module(self) -> str:
        """The name of the module."""
        return self.name.partition(":")[0]

    @property
    def file(self) -> Path:
        """Where the module is."""
        return ROOT / ("tutorials" if self.module == "steps" else "") / f"{self.module}.py"

    @property
    def owners(self) -> list[str]:
        """The top-level names that ``parts`` belong to, in their order."""
        return list(dict.fromkeys(part.partition(".")[0] for part in self.parts))


def step(name: str, chapter: str, task: str, asks: str, why: str, *hints: str, minutes: int = 5,
         looks: str = "nothing more than the docstring says") -> Exercise:
    """An exercise of steps.py: a function, and the one test that has its name."""
    test = "::test_message_and_ring" if name in ("message", "ring") else f"::test_{name}"
    return Exercise(f"steps:{name}", chapter, minutes, (name,), task, "PyTorch's own, and the steps before this one",
                    looks, (Check(asks, why, (test,)),), hints)


STEPS = (
    step("all_reduce", "5", "Sum a tensor over all ranks, with messages alone.",
         "the same sum on every rank, to the last bit, by one isend to each other rank",
         "Ranks whose sums differ in one bit train models that drift apart.",
         "Start all messages before you wait for the first one, or ranks wait for each other.",
         "dist.irecv(room, other) and dist.isend(tensor, other) give works. Receive each rank's tensor into room of "
         "its own; add in rank order, your own at its place, when all works have been waited for.", minutes=10,
         looks="which of torch.distributed's functions you call; bits"),
    step("pad", "5", "Make a flat tensor's length a multiple of the number of ranks.",
         "as few zeros as it takes", "Collectives of slices need slices of one size.",
         "In Python -n % ranks is what is missing to the next multiple.",
         looks="lengths that are a multiple already, none at all, and dtypes"),
    step("shard", "5", "A rank's slice of a flat tensor.", "a view of the right slice",
         "What is updated in a copy never reaches the model.", "Slices of a tensor share its memory.",
         looks="whether writing to the slice changes the tensor"),
    step("bucket", "5", "Many parameters in one piece of memory.", "every parameter is a view of one flat tensor",
         "One large message takes less time than a hundred small ones.",
         "torch.cat of the flattened, detached values, then pad. flat[start:end].view(p.shape) is a place.",
         "p.data = place makes the parameter a view, and leaves it the same object.",
         looks="shapes, values, and whether flat needs a gradient", minutes=10),
    step("gradient_hook", "5", "Gradients go into the bucket as autograd finishes them.",
         "gradients are added up at their places, and kept nowhere else",
         "A second copy of all gradients is 4 bytes per parameter.",
         "p.register_post_accumulate_grad_hook(function) calls function(p) when p.grad is there.",
         "A function that is defined in a loop sees the loop's variables as they are when it runs: bind them as "
         "defaults.", looks="two backward passes in a row, and p.grad", minutes=10),
    step("overlap", "5", "Buckets are reduced while backward runs.",
         "each bucket goes out when its last gradient has come, and nobody waits in backward",
         "What is sent while backward computes costs no time.",
         "gradient_hook first; then a second hook per parameter, which counts. Hooks run in the order in which they "
         "were registered.",
         "dist.all_reduce(flat, async_op=True) returns a work at once.",
         looks="when each all-reduce begins, and whether a rank waits for the other in backward", minutes=15),
    step("clip", "6", "Clip a gradient of which each rank has a shard.",
         "the norm of the whole gradient, and one factor on all ranks",
         "Ranks that clip by norms of their own shards change the gradient's direction.",
         "The square of the norm is a sum over elements, and so over ranks.",
         looks="that gradients below the limit stay, and that one number is sent"),
    step("free", "6", "Give a bucket's memory back, and keep the shard.",
         "no byte is left of it, and the shard has what was written last",
         "Parameters without memory are what stage 3 is.",
         "flat.untyped_storage().resize_(0); copy the slice into own before.",
         looks="the storage's bytes, and that views keep their shapes"),
    step("gather", "6", "Give a bucket its memory back, and start to fill it.",
         "the values are there, in the same storage, after an all-gather that does not block",
         "A new storage would leave the parameters behind, as views of the old one.",
         "resize_ takes bytes: numel() times element_size().",
         "dist.all_gather(list of the slices of flat, own, async_op=True).",
         looks="a view from before, how many elements are sent, and whether the call waits for the other rank"),
    step("prefetch", "6", "The next layer's gather runs while this layer computes.",
         "each layer is gathered once, ahead of its use, and at most two are there",
         "Gathers that are waited for at once take as long as in a program without prefetching.",
         "Wait for a layer, start the next one, compute, free.", minutes=10,
         looks="the order of your calls of start, wait, the layers and free; one layer, and several"),
    step("message", "5", "Seconds that a message takes.", "latency and bandwidth, for a message and a ring",
         "Small messages cost latency, large ones bandwidth; buckets are made to pay more of the second.",
         "Latency is paid once per message."),
    step("ring", "5", "Seconds of an all-reduce in a ring.", "latency and bandwidth, for a message and a ring",
         "It tells how the time of a step grows with ranks, before you rent them.",
         "2 (N - 1) rounds, each with a message of an N-th.",
         looks="message() too; with one rank nothing is sent", minutes=10),
    step("communication", "6", "Seconds that a ZeRO stage communicates.",
         "seconds of each stage, and whether the network is slower than the computation",
         "Stage 3 sends half as much again; whether that costs time depends on what it can hide behind.",
         "A reduce-scatter, or an all-gather, is half a ring. How many halves has each stage?",
         looks="stages 0 to 3, below and above the computing time", minutes=10),
)

EXERCISES = {exercise.name: exercise for exercise in (
    *STEPS,
    Exercise(
        "schedulers:WarmupLR", "4", 15, ("WarmupLR",),
        "A learning-rate schedule: up from the lowest to the highest rate, then flat.",
        "Schedule, the base class; _range and CURVES, see the hints; math",
        "rates of two param groups, given as a number, a list or not at all; resuming by state_dict() and by "
        "last_batch_iteration. height() and what serves other schedules are not looked at",
        (Check("the same rates as DeepSpeed, at every step",
               "One step off at the start, and every later step of a run has another rate than the one it is compared "
               "with.",
               (*(f"test_schedulers.py::test_rates_and_momenta_equal_deepspeeds[WarmupLR-{i}]" for i in range(5)),
                "::test_a_warmup_follows_its_formula_in_every_group")),
         Check("each param group ends at its own rate",
               "Groups have rates of their own because their parameters need them; one rate for all trains another "
               "model.",
               ("::test_the_top_of_a_warmup_is_each_groups_own_and_that_of_the_start",)),
         Check("a warm-up that is resumed goes on where it was",
               "One that starts over, or takes the rate of the moment for the top, trains another model from there on.",
               ("::test_a_warmup_goes_on_where_it_was",)),
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
        "amp:DynamicLossScaler", "7", 20, ("DynamicLossScaler",),
        "A loss scale that is as large as the gradients allow.",
        "LossScaler, the base class: load_state_dict() sets the attributes that state_dict() names; "
        "MinimumLossScaleError",
        "scale after every history of steps, resumed at every point in a new object. outcome() and __str__() are not "
        "looked at",
        (Check("the scale after any history is DeepSpeed's, to the last bit",
               "A scale that never falls makes every step overflow, and one that never grows lets small gradients "
               "vanish for the rest of the run.",
               ("test_amp.py::test_the_scale_is_deepspeeds_to_the_last_bit",)),
         Check("the rule holds for any window and hysteresis, and after resuming",
               "What is not in state_dict() starts anew after a resume, and the run goes another way.",
               ("test_amp.py::test_the_scale_follows_the_rule_also_when_it_is_resumed",
                "::test_a_loss_scale_goes_on_where_it_was_after_any_short_history")),
         Check("an overflow at the smallest scale is an error",
               "Without it a diverged run skips every step for ever, and looks as if it trained.",
               ("::test_an_overflow_at_the_smallest_scale_is_an_error",)),
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
        "amp:Precision.path", "7", 20, ("Precision.path",),
        "Which dtype goes where: compute, master weights, accumulation, reduction.",
        "Dtypes(compute, master, gradient, reduction); self.config, a PrecisionConfig, whose dtypes may be None; "
        "self.half, the 16-bit dtype or None; self.kept and self.low, sets of id(parameter)",
        "the four dtypes under every combination of keys; parameters in float64 and int64",
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
               ("::test_every_parameter_has_the_dtypes_that_the_config_says",)),
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
        "checkpointing:checkpoint", "6b", 45, ("checkpoint",),
        "Run a function, keep only its inputs, and run it again when backward needs what it saved.",
        "saved_tensors_hooks; PyTorch's, but for torch.utils.checkpoint, which is this exercise",
        "results, gradients, random state and autocast; how often the function runs, and when; bytes at the peak, "
        "before backward, and when all is gone. Functions that change their inputs in place are not tried",
        (Check("results, gradients and random state of plain autograd, with dropout and nested",
               "A recomputation that draws new random numbers drops other elements in backward than in forward, and "
               "the gradient belongs to no loss.",
               ("::test_a_checkpointed_function_equals_plain_autograd",)),
         Check("parameters get gradients also where no input needs one",
               "The first block of a model gets data, which need no gradient; its weights would stop learning in "
               "silence.",
               ("::test_a_checkpointed_function_trains_its_parameters_where_no_input_needs_a_gradient",)),
         Check("autocast is on again in the second run, and off where it was off",
               "A second run in another dtype saves other tensors than the first, and their gradients are others.",
               ("::test_a_checkpointed_function_runs_under_the_autocast_of_its_call",)),
         Check("it runs twice: once forward, once for backward",
               "A function that runs again for each tensor that backward asks for costs many forward passes.",
               ("::test_a_checkpointed_function_runs_twice",)),
         Check("memory of the inputs alone",
               "Keeping less is the point: a function that saves everything passes every other test.",
               ("::test_a_checkpointed_function_keeps_its_inputs_only",)),
         Check("nothing is left behind",
               "A graph that keeps itself alive takes the memory of one more region in every step.",
               ("::test_a_checkpointed_function_leaves_nothing_behind",)),
         Check("nothing is done where nothing is saved",
               "Evaluation would pay for a feature that it can't use.",
               ("::test_a_checkpointed_function_does_nothing_without_grad_mode",)),
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
         "hand a slot's tensor out once, and recompute when it is asked for again. Detach what goes into a slot: with "
         "its graph, which holds the hooks and so the slots, it would keep itself alive for ever.")),
    Exercise(
        "zero:reduce_scatter", "5", 20, ("Communicator.reduce_scatter",),
        "The collective of ZeRO: everyone's gradients in, one slice of the sum out.",
        "self.rank, self.world_size, self._others(), self.shard_of(flat, rank), self._begin(), self._tag(), "
        "Handle, _sum",
        "sums, bits, bytes that leave this rank and what _begin counts, when the call returns, and what it leaves "
        "behind. ``bounds`` is always None, the device is the CPU",
        (Check("the sum is right, on three ranks and in training",
               "A wrong slice, or a sum that misses a rank, trains another model.",
               ("test_zero.py::test_the_naive_reduction_gives_the_same",
                "test_zero.py::test_flush_applies_the_true_mean_of_a_partial_window",
                "::test_a_reduce_scatter_gives_each_rank_its_slice_of_the_sum")),
         Check("half the elements of an all-reduce are sent",
               "An all-reduce gives the same numbers for twice the traffic; then ZeRO-1 would cost more than no ZeRO.",
               ("::test_what_is_counted_is_what_is_sent",
                "test_zero.py::test_elements_sent_are_those_of_the_table[1-2]")),
         Check("it begins to send at once, and returns before the other ranks have called it",
               "What waits inside the call, or does nothing before it is waited for, can't overlap with backward.",
               ("::test_a_reduce_scatter_returns_at_once",)),
         Check("the same bits in every run",
               "Sums in the order of arrival differ from run to run, and a bug can no longer be reproduced.",
               ("test_zero.py::test_two_runs_and_all_ranks_give_the_same_bits[3]",
                "::test_a_reduce_scatter_adds_in_one_order_whoever_comes_first")),
         Check("nothing is kept when it is done",
               "What stays of each call adds up, and a run that begins well ends without memory.",
               ("::test_a_reduce_scatter_keeps_nothing",))),
        ("Every other rank needs your flat's slice for it, and you need each one's slice for you: one isend and one "
         "irecv per other rank. self._others() lists them.",
         "Return a Handle(self, works, finish) at once. It waits for all works, then calls finish, which adds the "
         "parts in rank order: _sum(parts, out, add). self._begin(\"reduce-scatter\", flat, 1, what) counts what is "
         "sent.",
         "self._tag(\"reduce-scatter\") gives the messages of one call a tag of their own. Receive into a tensor per "
         "other rank. With one rank nothing is sent, and _sum([own], out, add) is left.")),
    Exercise(
        "zero:bucketed_all_reduce", "5", 45, ("Communicator.all_reduce", "Gradients.take", "Reducer.launch_ready"),
        "Plain data parallelism, done well: gradients go into flat buckets, and full ones out while backward runs.",
        "Handle, self._begin(), self._reductions; slot.view(), self._prepare_buffer(), self.filled, self.life; "
        "self.queue, self.launch(), self.reduces_now, self.zero.config; gradients.complete",
        "weights, bytes that leave this rank and what _begin counts, when each all-reduce begins, whether backward "
        "waits for another rank, and bytes that are held after it",
        (Check("gradients may come in another order on each rank",
               "Collectives are matched by their order: two ranks that start different ones wait for each other, or "
               "mix up each other's numbers.",
               ("::test_gradients_that_come_in_another_order_on_each_rank",)),
         Check("an all-reduce runs its finish once, when the sum is there",
               "What adds up a bucket before it has come adds up half a sum.",
               ("::test_an_all_reduce_runs_its_finish_once_when_the_sum_is_there",)),
         Check("training equals plain PyTorch on the whole batch",
               "With unused layers, sparse gradients, accumulation and several backward calls, as in real models, each "
               "gradient must count exactly once.",
               ("test_zero.py::test_training_equals_plain_pytorch_on_the_whole_batch[2]",
                "::test_training_by_buckets_equals_plain_pytorch")),
         Check("full buckets go out while backward runs, and with overlap_comm false after it",
               "Communication that hides behind computation is what buckets and hooks are for; without it each step "
               "lasts as long as both together.",
               ("::test_full_buckets_go_out_while_backward_runs",)),
         Check("no gradient is kept twice",
               "A second copy of the gradients is a quarter of the memory of training with Adam.",
               ("::test_gradients_are_kept_once",)),
         Check("a gradient that comes after its bucket was sent still counts",
               "Recomputation and shared layers finish a gradient more than once in a backward pass.",
               ("test_zero.py::test_a_shared_layer_recomputed_twice_has_the_right_gradient[True]",
                "::test_a_late_gradient_counts")),
         Check("as much traffic as the table says",
               "A bucket that is sent twice, or gradient by gradient, costs the time that buckets save.",
               ("test_zero.py::test_elements_sent_are_those_of_the_table[1-2]",
                "::test_what_is_counted_is_what_is_sent"))),
        ("take(slot, gradient): the gradient's place is slot.view(self.buffer) once self._prepare_buffer() was called. "
         "Copy where the place is empty, add where it is not: self.filled has the slots whose place is not.",
         "take also adds the slot to self.used and to self.arrived, by which the bucket knows that it is complete. If "
         "self.life is Life.SENDING or Life.SENT, the sum is on its way or there: keep the gradient in "
         "self.late[slot], added to what is there. launch_ready: only where self.zero.config.overlap_comm and "
         "self.reduces_now.",
         "launch_ready takes the first of self.queue out of it (popleft) while that is complete, and calls self.launch "
         "with it; never one behind it: the queue has the same order on all ranks. all_reduce: self._begin(kind, "
         "tensor, 2, what), then a Handle with dist.all_reduce(..., group=self._reductions, async_op=True) and finish. "
         "A sparse gradient needs to_dense().")),
    Exercise(
        "zero:stage_1", "6", 60, ("Zero.__init__", "Zero.finish_backward", "Zero.step"),
        "ZeRO stage 1 from nothing, in about 60 lines: each rank updates its slice of the parameters, and only that.",
        "Communicator(device), with rank, world_size, shard_of(flat), broadcast(tensor, 0), and reduce_scatter(flat, "
        "out, add=False), all_reduce(tensor) and all_gather(flat), which return Handles to wait() for; "
        "StepResult(norm, the factor that clipping applied, or 1.0, whether the norm was not finite, None); or "
        "torch.distributed itself",
        "weights and norms, against plain PyTorch with AdamW; the state of the optimizer that you were given; every "
        "byte that the process has in use before and after a step; bytes that leave this rank. There is one param "
        "group, all in float32",
        (Check("training equals plain PyTorch on the whole batch, with clipping",
               "Sharding memory must not change what is learned: with tied weights, with parameters that have a "
               "gradient on some ranks only, or on no rank, with a scaled loss and a rate that changes.",
               ("::test_stage_1_by_hand_equals_plain_pytorch", "::test_stage_1_by_hand_waits_for_what_it_sends")),
         Check("a step whose norm is not finite updates nothing",
               "One update with NaN, and every later step is lost.",
               ("::test_stage_1_by_hand_leaves_out_a_step_that_is_not_finite",
                "::test_stage_1_by_hand_takes_a_step_that_must_not_be_skipped")),
         Check("micro-batches add up, and are sent once",
               "A window of m micro-batches that is sent m times costs m times the traffic, for nothing.",
               ("::test_stage_1_by_hand_accumulates",)),
         Check("the optimizer's state is really sharded",
               "8 bytes per parameter on every rank are what stage 1 exists to shard.",
               ("::test_stage_1_by_hand_shards_the_optimizer",)),
         Check("nothing else is kept between steps",
               "Another optimizer, or a second copy of the weights, takes the memory that sharding has saved.",
               ("::test_stage_1_by_hand_keeps_nothing_else",)),
         Check("no more traffic than plain data parallelism",
               "A reduce-scatter and an all-gather cost as much as one all-reduce; stage 1 is free, if done right.",
               ("::test_stage_1_by_hand_sends_as_much_as_an_all_reduce",))),
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
        '''class Zero:
    """A model's parameters, gradients and optimizer state under ZeRO stage 1.

    It gives the model rank 0's weights, and the optimizer this rank's slice of them in their place. After each backward
    pass ``finish_backward`` is called, and at a window's end ``step``. Whoever trains sets ``boundary``: whether the
    backward pass is the last of its window.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: ZeroConfig, device: torch.device):
        ...

    def finish_backward(self) -> None:
        """The backward pass is over. Every rank calls this, with gradients or without."""

    def step(self, clip: float = 0.0, divisor: float = 1.0, skip_overflow: bool = True) -> StepResult:
        """Sum the gradients over ranks, update this rank's slice, and give every rank the whole new weights.

        clip            the largest allowed norm of the mean gradient; 0: no clipping
        divisor         what the gradients, summed over ranks and micro-batches, are larger by than they should be: the
                        number of ranks for a mean over them, times the loss scale
        skip_overflow   leave the update out when the norm is not finite
        """''',
        anew=True),
    Exercise(
        "zero:stage_3", "6", 45,
        ("Bucket.start_gather", "Bucket.free", "Unit.start_gather", "Unit.finish_gather", "Unit.free", "Unit.acquire",
         "Unit.release"),
        "The heart of stage 3: parameters that come just before their use, and go right after it.",
        "self.flat, self.shard, self.slots, self.gather, self.label, self.communicator; self.buckets, self.users, "
        "self.state, UnitState, ShardedParameter, slot.kind",
        "weights, bytes that are held in training, evaluation and between steps, bytes that leave this rank, and that "
        "each gather begins in start_gather() and is waited for in time. A view of flat that somebody else keeps, and "
        "offload, are not tried",
        (Check("only the unit in use and the next one are whole",
               "A unit that is never freed makes stage 3 a slow stage 2.",
               ("test_zero.py::test_stage_3_holds_the_unit_in_use_and_the_next_one_only",
                "test_zero.py::test_evaluation_and_generation_free_what_they_gathered",
                "::test_no_pass_holds_more_than_two_units")),
         Check("bytes per rank are those of the table",
               "16/N bytes per parameter are what stage 3 is for.",
               ("test_zero.py::test_bytes_per_rank_are_those_of_the_table[3-2]",
                "::test_stage_3_keeps_shards_alone_between_steps")),
         Check("training equals plain PyTorch, also with shared and recomputed layers",
               "A unit that is freed while a second use still needs it computes with garbage.",
               ("test_zero.py::test_training_equals_plain_pytorch_on_the_whole_batch[2]",
                "test_zero.py::test_a_shared_layer_recomputed_twice_has_the_right_gradient[False]",
                "::test_a_unit_that_two_use_stays_until_both_are_done")),
         Check("every bucket's gather begins early, and is waited for before use and before its memory goes",
               "A gather that is still under way writes into memory that is another tensor's by then.",
               ("::test_gathers_may_come_late",)),
         Check("one gather in forward, one in backward",
               "Each gather sends every parameter once; one too many is a third more traffic.",
               ("test_zero.py::test_elements_sent_are_those_of_the_table[1-2]",
                "::test_a_pass_gathers_each_unit_once")),
         Check("touching a sharded parameter is an error",
               "Its memory is gone: reading it would give garbage, not a mistake that one sees.",
               ("test_zero.py::test_touching_a_sharded_parameter_is_an_error_and_not_garbage",
                "::test_a_unit_that_two_use_stays_until_both_are_done"))),
        ("A Bucket gives flat its memory, copies its own shard in and all-gathers the rest. A Unit does so for its "
         "buckets and keeps its state. It also counts users: the first one gathers, the last one frees.",
         "The memory comes and goes with flat.untyped_storage().resize_(bytes): the storage object stays, so that the "
         "parameters, and what autograd saved, remain views of it. Before it goes, wait for the gather under way.",
         "acquire: add the user; SHARDED: self.start_gather(); GATHERING: self.finish_gather(). A prefetched unit "
         "comes to acquire in state GATHERING. finish_gather gives each slot.parameter its class slot.kind back, free "
         "makes it a ShardedParameter. release: discard the user, and self.free() where none is left and the state is "
         "not SHARDED.")),
)}
