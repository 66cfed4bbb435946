"""Write a part of this project yourself, and have the project's own tests grade it.

    python tutorials/grade.py --list                                  the exercises, and which you have passed
    python tutorials/grade.py --start zero:reduce_scatter > my.py     signatures and docstrings, to be filled in
    python tutorials/grade.py zero:reduce_scatter my.py               grade it
    python tutorials/grade.py zero:reduce_scatter --hint 1            a hint; 2 tells more
    python tutorials/grade.py zero my_zero.py                         a whole module of yours, by all of its tests

**How.** The project is copied into a temporary folder, and there your definitions take the place of its own: a whole
file replaces the module; a part is executed inside the module right behind the original, so that every name of the
module can be used in it. Then pytest runs there, in processes of its own, those tests that your part decides. Where
all pass, your numbers are set beside the project's (compare.py). In the project's folder nothing changes but the file
``.graded``, which has the names of what you have passed. exercises.py has the exercises.

The exit status is 0 where everything passes, 1 where a test fails, 2 where the file can't be graded: it does not
import, lacks a name, or hangs.

This file is also the pytest plugin that tells the grader what happens, test by test.
"""

import argparse
import ast
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exercises import EXERCISES, ROOT, Check, Exercise

DONE = ROOT / ".graded"
EVENTS = "GRADE_EVENTS"  # the environment variable that names the file to which the plugin writes
ANSWER = "GRADE_ANSWER"  # the one that has the name of the reader's file, as tracebacks show it
NUMBERS = "GRADE_NUMBERS"  # and the one that has the exercise whose numbers are measured where all tests pass
MODULES = ("schedulers", "amp", "checkpointing", "zero")
SLOW = 120.0  # seconds after which a test counts as hanging
DRAWN = ("Failing test case", "Falsifying example")  # what Hypothesis says before a property's arguments
PRINTED = 40  # lines of the reader's that are shown
WIDTH = 70  # characters of a timeline


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
    for owner in exercise.owners:
        if owner in [base.id for base in getattr(found[owner], "bases", ()) if isinstance(base, ast.Name)]:
            raise AnswerError(f"{path}: {owner} inherits from the project's own {owner}, which is the exercise")
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
    """Signatures and docstrings of the exercise's parts, and what to know about the checks."""
    text = exercise.file.read_text()
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
    told = [f"{exercise.name}. {exercise.task}", "",
            f"Every name of {exercise.module}.py can be used here as if this stood in it, those with an underscore "
            "too; the import is for your editor.", *(["Classes are put over the module's own method by method."]
                                                if "." in exercise.parts[0] and not exercise.anew else []),
            f"Useful: {exercise.uses}.", f"Looked at: {exercise.looks}.", "The checks:", "",
            *(f"    {check.asks}" for check in exercise.checks)]
    head = "\n".join(line for row in told for line in textwrap.wrap(row, 116, subsequent_indent="    ") or [""])
    return (f'"""{head}\n"""\n\nfrom {exercise.module} import *  # noqa: F403\n\n\n'
            + (exercise.start or "\n\n\n".join(blocks)) + "\n")


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
    source = exercise.file.read_text()
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


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of processes that run in a copy of the project; what the reader prints is not held back in them."""
    return {**os.environ, "PYTHONPATH": str(folder / "tutorials"), "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1", **more}


def run_tests(folder: Path, tests: list[str], slow: float, answer: str,
              numbers: str) -> tuple[dict[str, Outcome], list[str]]:
    """Run tests of the project in ``folder``: their outcomes by id, as far as they came, and the lines that were
    printed. Raises AnswerError.

    The first test that hangs ends the run. ``answer`` is the name that the reader's code has in tracebacks. Where all
    pass, the numbers of the exercise ``numbers`` are the message of the last outcome, unless it is "".
    """
    events = folder / "events"
    events.touch()
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "grade", "-p", "no:cacheprovider", "--tb=short",
               *(f"tests/{test}" for test in tests)]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(folder, **{EVENTS: str(events), ANSWER: answer, NUMBERS: numbers}),
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        outcomes = _follow(process, events, slow)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        process.wait()
    printed = [line for line in (folder / "output").read_text(errors="replace").splitlines()
               if line.strip() and not line.startswith("[Gloo]")]
    if not outcomes:
        raise AnswerError("\n".join(["pytest ran no test:", *printed]))
    return outcomes, printed


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
            if running is not None:
                outcomes[running] = Outcome("failed", f"the process died with exit code {process.returncode}")
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


def pytest_sessionstart(session: Any) -> None:
    """A hook of pytest's: its own report does not come between what the reader prints."""
    if EVENTS in os.environ:
        session.config.pluginmanager.unregister(name="terminalreporter")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """A hook of pytest's: the numbers are measured last, by the processes that ran the tests."""
    if os.environ.get(NUMBERS) and items:
        items.append(type(items[0]).from_parent(items[0].parent, name="numbers", callobj=_numbers))


def _numbers(run_ranks: Any, request: Any, record_property: Any) -> None:
    if request.session.testsfailed == 0:
        import compare
        record_property("numbers", json.dumps(compare.numbers(os.environ[NUMBERS], run_ranks)))


def pytest_runtest_logstart(nodeid: str) -> None:
    """A hook of pytest's: a test begins."""
    _write(kind="start", test=nodeid.removeprefix("tests/"))


def pytest_runtest_logreport(report: Any) -> None:
    """A hook of pytest's: the outcome of a test, or of what it needs before."""
    if report.when != "call" and report.passed or report.when == "teardown":
        return
    text = report.longreprtext if report.failed else ""
    _write(kind="hung" if _hangs(text) else report.outcome, test=report.nodeid.removeprefix("tests/"),
           message=essence(text, os.environ.get(ANSWER, "")) or dict(report.user_properties).get("numbers", ""))


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

    Before them stands the deepest line of the file ``answer`` that the error came through, as ``my.py:47``, or if it
    came through none, that of the project; behind them the arguments with which a property failed.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E  ")]
    told = (marked or _errors(text)[:1] or lines[-1:])[:4]
    before = text[:text.index(told[0])] if told else ""
    files = [re.escape(answer), r"(?:amp|checkpointing|engine|schedulers|zero)\.py"] if answer else []
    places = [found for file in files
              for found in re.findall(rf'(?m)(?:^|[\s/"])({file})(?:", line |:)(\d+)', before)[-1:]]
    plain = [line.removeprefix("E  ").strip() for line in lines]
    first = next((i for i, line in enumerate(plain) if line.startswith(DRAWN)), len(plain))
    drawn = plain[first:first + 1 + (plain[first:] + [")"]).index(")")]
    told = [line for line in told if line not in drawn] + drawn
    return "\n".join([f"{':'.join(places[0])}: {told[0]}", *told[1:]] if places else told)


# --- The report -------------------------------------------------------------------------------------------------------


def report(name: str, checks: tuple[Check, ...], outcomes: dict[str, Outcome],
           printed: list[str] | None = None) -> tuple[str, bool]:
    """The text for the reader, and whether all is well. One error that stops every test stands once, on top."""
    firsts = {outcome.message.partition("\n")[0] for outcome in outcomes.values() if outcome.result != "skipped"}
    everywhere = firsts.pop() if len(firsts) == 1 and len(outcomes) > 1 else ""
    if not re.match(r"\S+:\d+: ", everywhere):  # else it is the same line of the reader's
        everywhere = ""
    rows, passed = [f"Every test stops at the same error:\n    {everywhere}"] if everywhere else [], 0
    for check in checks:
        mine = {test: o for test, o in outcomes.items() if test in check.ids or test.partition("[")[0] in check.ids}
        bad = {test: o for test, o in mine.items() if o.result in ("failed", "hung")}
        complete = all(any(test.startswith(wanted) for test in mine) for wanted in check.ids)
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
    if printed:
        lines = [f"    {line}" + (f"  ({times} times)" if times > 1 else "")
                 for line, times in Counter(printed).items()]
        more = [f"    and {len(lines) - PRINTED} more lines"] if len(lines) > PRINTED else []
        rows += ["What your code printed, on all ranks:", *lines[:PRINTED], *more]
    rows.append(f"{name}: {passed} of {len(checks)} pass" + (". Well done." if passed == len(checks) else ""))
    return "\n".join(rows), passed == len(checks)


def checks_of_module(module: str, outcomes: dict[str, Outcome]) -> tuple[Check, ...]:
    """A check per test of a module; the tests' names are the sentences that say what has to hold."""
    names = dict.fromkeys(test.partition("[")[0] for test, outcome in outcomes.items() if outcome.result != "skipped")
    return tuple(Check(name.partition("::test_")[2].replace("_", " "),
                       f"The engine relies on it, wherever a config uses {module}.", (name,)) for name in names)


def grade(target: str, path: Path, slow: float = SLOW) -> tuple[str, bool]:
    """Grade the reader's file: the report, and whether all is well. Raises AnswerError where there is no report."""
    exercise = EXERCISES.get(target)  # None: a whole module
    if exercise is None:
        text, file, tests = check_module(path, target), ROOT / f"{target}.py", [f"test_{target}.py"]
    else:
        text, file = put_over(exercise, read_answer(path, exercise), str(path.resolve())), exercise.file
        tests = list(dict.fromkeys(test for check in exercise.checks for test in check.ids))
    with tempfile.TemporaryDirectory(prefix="grade_") as name:
        folder = Path(name)
        copy_project(folder)
        (folder / file.relative_to(ROOT)).write_text(text)
        measured = exercise is not None and f'"{target}"' in (ROOT / "tutorials/compare.py").read_text()
        if measured:  # else it takes no time and no memory to speak of
            shutil.copyfile(file, folder / "tutorials" / f"project_{file.name}")
        try:
            outcomes, printed = run_tests(folder, tests, slow, path.name if exercise else file.name,
                                          target if measured else "")
        except AnswerError as error:
            raise AnswerError(f"{path}: {error}".replace(name, ".")) from None
    numbers = outcomes.pop(next((test for test in outcomes if test.endswith("::numbers")), ""), None)
    checks = exercise.checks if exercise else checks_of_module(target, outcomes)
    told, fine = report(target, checks, outcomes, printed)
    if fine and measured:
        told += "\n" + (beside(*json.loads(numbers.message)) if numbers is not None and numbers.result == "passed" else
                        f"(Its numbers could not be measured: {numbers})")
    return told, fine


# --- The reader's numbers ---------------------------------------------------------------------------------------------


def beside(yours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The numbers and the timeline of the reader's code, and of the project's."""
    rows = ["", f"{'':<32}{'yours':>14}{'this project':>16}"]
    for name, value in yours["numbers"].items():
        other = theirs["numbers"][name]
        texts = [f"{number:,.4f}" if name == "seconds" else f"{number:,}" for number in (value, other)]
        rows.append(f"{name:<32}{texts[0]:>14}{texts[1]:>16}    yours {value / other:.1f} x")
    longest = max(measured["phases"][-1][2] for measured in (yours, theirs))
    phases = ", ".join(f"{name[0]} {name}" for name, *_ in yours["phases"])
    rows += ["", f"One run, slowed by counting: {phases}{'; ^ something is sent' if yours['sends'] else ''}"]
    return "\n".join(rows + timeline("yours", yours, longest) + timeline("this project", theirs, longest))


def timeline(name: str, measured: dict[str, Any], longest: float) -> list[str]:
    """A line with a letter per phase, and one with a mark under each moment at which something was sent, if any."""
    def column(moment: float) -> int:
        return min(WIDTH - 1, int(WIDTH * moment / longest))

    phases, marks = [" "] * WIDTH, [" "] * WIDTH
    for phase, start, end in measured["phases"]:
        for place in range(column(start), column(end) + 1):
            phases[place] = phase[0]
    for moment in measured["sends"]:
        marks[column(moment)] = "^"
    last = measured["phases"][-1][2]
    drawn = [f"{name:<14}{''.join(phases).rstrip()} {1000 * last:.1f} ms", f"{'':<14}{''.join(marks)}".rstrip()]
    return drawn if measured["sends"] else drawn[:1]


def done() -> dict[str, str]:
    """What was passed, and on which day."""
    with suppress(OSError, ValueError):
        return json.loads(DONE.read_text())
    return {}


# --- Command line -----------------------------------------------------------------------------------------------------


def listing() -> str:
    """The exercises, from easy to hard, and which are passed."""
    passed = done()
    rows = [f"{'exercise':<27}{'chapter':<9}{'minutes':<9}{'passed':<12}task"]
    rows += [f"{name:<27}{exercise.chapter:<9}{exercise.minutes:<9}{passed.get(name, ''):<12}{exercise.task}"
             for name, exercise in EXERCISES.items()]
    whole = ", ".join(f"{module} ({passed[module]})" if module in passed else module for module in MODULES)
    return "\n".join([*rows, "", f"{whole}: a whole module, graded by all of its tests."])


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
    if fine:
        DONE.write_text(json.dumps(done() | {target: datetime.date.today().isoformat()}))
    elif target in EXERCISES:
        print(f"A hint: python tutorials/grade.py {target} --hint 1")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
