"""The grader: right answers pass, and wrong ones fail where they should.

    .venv/bin/python -m pytest -q tests/test_grade.py
    .venv/bin/python -m pytest -q tests/test_grade.py --long     every answer, and the first ones by the whole grader

Answers are put to the tests of test_exercises.py in the processes that are there already, which takes a second or less;
the whole grader starts its own.
"""

import ast
import importlib
import inspect
import itertools
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import answers
import compare
import grade
import oracle
import test_exercises
from answers import RIGHT, WRONG
from exercises import EXERCISES, Check

long = pytest.mark.long


def first_answer(name: str) -> str:
    """What mistakes, and other styles, are made of."""
    if not name.startswith("steps:"):
        return RIGHT[name][0]
    text = EXERCISES[name].file.read_text()
    return ast.get_source_segment(text, grade.definitions(ast.parse(text))[name.partition(":")[2]]) + "\n"


def right_answer(name: str, number: int) -> str:
    """A text."""
    answer = RIGHT[name][number]
    return answer if isinstance(answer, str) else answers.changed(first_answer(name), *answer)


def own_tests(name: str) -> list[Callable]:
    """The tests of test_exercises.py that judge an exercise."""
    return [getattr(test_exercises, test[2:]) for check in EXERCISES[name].checks for test in check.tests
            if test.startswith("::")]


def wrong_answer(name: str, mistake: str) -> tuple[str, Callable]:
    """A text, and the test that finds the mistake in it."""
    finds, = {finds for exercise, finds in WRONG if exercise == name and mistake in WRONG[exercise, finds]}
    test, = {test for test in own_tests(name) if finds in test.__name__}
    return answers.changed(first_answer(name), *WRONG[name, finds][mistake]), test


def cases(table: dict[str, list]) -> list[Any]:
    """Name and case of each exercise; the first one of each is tried always, the others with --long."""
    return [pytest.param(name, case, marks=[long] * (case != rows[0]), id=f"{name}-{case}")
            for name, rows in table.items() for case in rows]


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
        with mock.patch.object(oracle, "PATIENCE", patience):
            return function(*args)
    finally:
        for key in namespace.keys() - before.keys():
            del namespace[key]
        namespace.update(before)
        for owner, method, original in originals:
            setattr(owner, method, original)


def run_test(test: Callable, run_ranks: Callable, name: str, text: str, patience: timedelta = oracle.PATIENCE) -> None:
    """One of test_exercises.py's tests, on an answer that is in place on every rank."""
    answer = name, text, patience

    def swapped(function: Callable, ranks: int, *args: Any) -> list[Any]:
        return run_ranks(with_answer, ranks, *answer, function, *args, timeout=20 * patience.total_seconds())

    ranks = [mark.args[0] for mark in getattr(test, "pytestmark", ()) if mark.name == "ranks"]
    if ranks:
        swapped(test, *ranks)
    else:
        with_answer(*answer, test, *([swapped] if "run_ranks" in inspect.signature(test).parameters else []))


@pytest.mark.parametrize("name, number", cases({name: list(range(len(rows))) for name, rows in RIGHT.items()}))
def test_right_answers_pass(run_ranks, name, number):
    for test in own_tests(name):
        run_test(test, run_ranks, name, right_answer(name, number))


MISTAKES = {name: [mistake for (exercise, _), mistakes in WRONG.items() if exercise == name for mistake in mistakes]
            for name in RIGHT}


@pytest.mark.parametrize("name, mistake", cases(MISTAKES))
def test_a_mistake_is_found(run_ranks, name, mistake):
    text, test = wrong_answer(name, mistake)
    with pytest.raises((Exception, pytest.fail.Exception)) as found:
        run_test(test, run_ranks, name, text, timedelta(seconds=1))
    told = f"{found.type.__name__}: {found.value}"
    assert not re.search("(Name|Syntax|Indentation|Import)Error", told), f"that is no answer at all: {told}"


def test_every_exercise_has_its_answers_and_its_tests():
    assert set(RIGHT) == set(EXERCISES) and all(MISTAKES.values())
    for name, mistakes in MISTAKES.items():
        for mistake in mistakes:
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


OFF = answers.changed(answers.SCHEDULE, "k = max(t - 1, 0)", "k = t\nif t == 3: print('three', group)")


@pytest.mark.parametrize("target, text, status, told", [
    ("checkpointing:checkpoint", "def checkpoint(function:\n", 2, ["my.py does not import: line 1: "]),
    ("checkpointing:checkpoint", "def chekpoint(function): return function()\n", 2,
     ["my.py lacks checkpoint; a file that has it: python"]),
    ("checkpointing:checkpoint", "def checkpoint(function, *args):\n    ...\n", 2,
     ["checkpoint is still empty; a hint: python"]),
    ("zero:stage_1", answers.STAGE_1.replace("class Zero", "class Zero(Zero)"), 2,
     ["Zero inherits from the project's own Zero"]),
    ("amp", "def cast(value, dtype): pass", 2, ["lacks names of amp.py that engine.py uses: ", "Precision"]),
    ("checkpointing", "x = 1", 2, ["lacks names of checkpointing.py that engine.py uses: ", "CheckpointingConfig"]),
    pytest.param("schedulers:WarmupLR", f"import torhc\n{answers.SCHEDULE}", 2,
                 ["it does not import: my.py:1: ModuleNotFoundError: No module named 'torhc'"], marks=long),
    pytest.param("schedulers:WarmupLR", answers.changed(answers.SCHEDULE, "k = max", "while 1:\n    pass\nk = max"), 1,
                 ["it hangs", "A hint: python"], marks=long),
    pytest.param("schedulers:WarmupLR", OFF, 1, [
        "FAIL      the same rates as DeepSpeed, at every step", "Why it matters: One step off at the start",
        "AssertionError: step 1, group 0: rate", "pass      each param group ends at its own rate", "3 of 4 pass",
        "What your code printed, on all ranks:\n    three 0  (",
        "A hint: python tutorials/grade.py schedulers:WarmupLR --hint 1"], marks=long),
    pytest.param("amp:DynamicLossScaler", answers.changed(answers.SCALER, "self.scale / 2", "self.scale"), 1, [
        ": test_the_scale_follows_the_rule", "overflows=[",
        "window 1, hysteresis 1, consecutive False, overflows ("], marks=long),
], ids=itertools.count())
def test_a_file_that_fails_or_cannot_be_graded_is_told_why(tmp_path, capsys, target, text, status, told):
    got, printed = graded(tmp_path, capsys, target, text, "--slow", "15")
    assert got == status and not grade.done() and all(words in printed for words in told), printed


@long
@pytest.mark.parametrize("name", ["steps:overlap", *(name for name in EXERCISES if not name.startswith("steps:"))])
def test_a_right_answer_passes_the_whole_grader(tmp_path, capsys, name):
    status, printed = graded(tmp_path, capsys, name, right_answer(name, -1))
    assert status == 0 and "Well done.\n" in printed, printed
    assert list(grade.done()) == [name]
    assert (name in compare.WORKLOADS) is ("this project" in printed and "yours 1.0 x" in printed), printed


@long
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
    elsewhere = in_pytest.replace("../my.py", "zero.py")
    assert grade.essence(elsewhere, "my.py") == told.replace("my.py", "zero.py") != grade.essence(elsewhere)
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
