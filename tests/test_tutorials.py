"""The course: every block of every chapter runs and prints what the chapter shows, all that it names exists, and its
pictures are there, small, and made by figures.py.

    .venv/bin/python -m pytest -q tests/test_tutorials.py
    .venv/bin/python -m pytest -q tests/test_tutorials.py -k 4_learning     one chapter
    .venv/bin/python -m pytest -q tests/test_tutorials.py --long            make all pictures anew

How fenced blocks are read. A chapter's blocks run in order, in a temporary folder of its own in which the project's
files can be named as from the project's folder. A traceback names the line of the chapter.

    ```python                   runs here; all these blocks of a chapter share one namespace
    ```python ranks=2           a file of its own, which launch.py runs on as many processes, as it does for a reader;
                                what all ranks print counts
    ```sh                       runs with bash; python and torchrun are those of this interpreter. Where all lines are
                                ``python SCRIPT ARGS``, in processes that have PyTorch loaded already
    ```sh skip                  too slow to run: its scripts must exist and know the options that they are given
    ```output                   directly behind one of these: what it prints. Needed where something is printed
    ```output tolerance=0.2     words are compared exactly, numbers within 1 % or this, those before ms, microseconds
                                and GB/s not at all; ``...`` ends a line in anything
"""

import contextlib
import importlib
import inspect
import io
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run

import checkpointing
import figures
import grade
from conftest import DEADLINE, ROOT, Program, Ranks

CHAPTERS = sorted(path for path in (ROOT / "tutorials").glob("*.md")
                  if path.name != "coming_from_deepspeed.md")  # names what is absent; test_dropin.py reads it
MODULES = "engine zero amp checkpointing schedulers launch".split()
FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)^```[ ]*$\n*", re.MULTILINE)
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")
TIMED = re.compile(r" (?:ms|microseconds|GB/s)\b")


@dataclass
class Block:
    """A fenced block of a chapter, with the output that the chapter shows for it."""
    place: str               # file and line, for messages
    line: int                # of its first line of code, from 1
    language: str            # the first word behind the fence
    words: list[str]         # the words after it
    code: str
    output: str | None = None
    tolerance: float = 0.01  # relative, for numbers in the output


def option(words: list[str], name: str, default: Any) -> Any:
    """The value of ``name=value`` among ``words``, as what ``default`` is."""
    return next((type(default)(word.partition("=")[2]) for word in words if word.startswith(f"{name}=")), default)


def blocks_of(chapter: Path) -> list[Block]:
    text, blocks, end = chapter.read_text(), [], -1
    for match in FENCED.finditer(text):
        language, *words = match[1].split() or [""]
        line = text.count("\n", 0, match.start()) + 2
        if language == "output":
            assert blocks and end == match.start(), f"{chapter.name}:{line}: output that stands behind no block"
            blocks[-1].output, blocks[-1].tolerance = match[2], option(words, "tolerance", 0.01)
        else:
            blocks.append(Block(f"{chapter.name}:{line}", line, language, words, match[2]))
        end = match.end()
    return blocks


# --- Running a block --------------------------------------------------------------------------------------------------


def run_python(block: Block, chapter: Path, folder: Path, namespace: dict) -> str:
    """What the code prints, run in ``folder``."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n" * (block.line - 1) + block.code, str(chapter), "exec"), namespace)
    return printed.getvalue()


def run_on_ranks(block: Block, chapter: Path, folder: Path, run_ranks: Ranks) -> str:
    """What launch.py prints with the code as its script; a traceback has the chapter's lines."""
    script = folder / f"{chapter.stem}_{block.line}.py"
    script.write_text("\n" * (block.line - 1) + block.code)
    command = f"python launch.py --nproc_per_node {option(block.words, 'ranks', 0)} {script.name}"
    return run_programs(block, [command], folder, run_ranks)


def run_programs(block: Block, commands: list[str], folder: Path, run_ranks: Ranks) -> str:
    """What commands ``python SCRIPT ARGS`` print, errors last; they must succeed."""
    printed = ""
    for command in commands:
        code, out, err = Program(run_ranks, folder / "printed", shlex.split(command)[1:], folder).end()
        printed += out + err
        assert code == 0, f"{block.place}: exit code {code}:\n{printed}"
    return printed


def run_shell(block: Block, folder: Path) -> str:
    """What the commands print, errors included; they must succeed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"PATH": f"{folder / '.bin'}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "",
                    "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-ec", block.code], cwd=folder, env=environment, text=True, timeout=DEADLINE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{block.place}: exit code {done.returncode}:\n{done.stdout}"
    return done.stdout


def check_command(block: Block, folder: Path) -> None:
    """For commands that take too long: their scripts are there, and know the options that follow them."""
    for command in block.code.replace("\\\n", " ").splitlines():
        script = None
        for word in shlex.split(command, comments=True):
            if word.endswith(".py"):
                script = folder / word
                assert script.exists(), f"{block.place}: there is no {word}"
            elif script and word.startswith("--"):
                name = word.partition("=")[0]
                passed_on = inspect.getsource(torch.distributed.run) if script.stem == "launch" else ""
                known = script.read_text() + passed_on
                assert f'"{name}"' in known, f"{block.place}: {script.name} has no option {name}"


def make_folder(folder: Path) -> None:
    """The project's files by their names, and the commands of this interpreter."""
    for name in ("tests", "tutorials", *(f"{module}.py" for module in MODULES)):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".bin").mkdir()
    for name, arguments in (("python", ""), ("torchrun", "-m torch.distributed.run")):
        (folder / ".bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (folder / ".bin" / name).chmod(0o755)


# --- Comparing what it prints -----------------------------------------------------------------------------------------


def lines_agree(shown: str, printed: str, tolerance: float) -> bool:
    """Whether words are the same, in the same order, and numbers close; how many spaces there are doesn't count.

    A number before a unit of time may be any.
    """
    text = shown.rstrip()
    words = [r"\s+".join(map(re.escape, part.split())) for part in NUMBER.split(text.removesuffix("..."))]
    pattern = r"\s*" + rf"\s*({NUMBER.pattern})\s*".join(words) + (".*" if text.endswith("...") else r"\s*")
    match = re.fullmatch(pattern, printed)
    pairs = zip(NUMBER.finditer(text), match.groups()) if match else ()
    return match is not None and all(
        TIMED.match(text, number.end())
        or math.isclose(*(float(n.replace(",", "")) for n in (number[0], other)), rel_tol=tolerance)
        for number, other in pairs)


def check_output(block: Block, printed: str) -> None:
    shown_lines, lines = [(text or "").rstrip().splitlines() for text in (block.output, printed)]
    assert block.output is not None or not lines, f"{block.place} prints, and no output is shown:\n{printed}"
    for shown, line in zip(shown_lines, lines):
        assert lines_agree(shown, line, block.tolerance), \
            f"{block.place} shows\n{shown}\nand prints\n{line}\nin the whole\n{printed}"
    assert len(lines) == len(shown_lines), \
        f"{block.place} shows {len(shown_lines)} lines and prints {len(lines)}:\n{printed}"


@pytest.fixture
def as_found():
    """Leave this process as it was: the random state, the threads, the process group, recomputation by hand."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)
    checkpointing.reset()
    if dist.is_initialized():
        dist.destroy_process_group()


def run_chapter(chapter: Path, folder: Path, run_ranks: Any) -> None:
    make_folder(folder)
    namespace = {"__name__": "__main__"}
    for block in blocks_of(chapter):
        if block.language == "python" and block.words:
            check_output(block, run_on_ranks(block, chapter, folder, run_ranks))
        elif block.language == "python":
            check_output(block, run_python(block, chapter, folder, namespace))
        elif block.language == "sh" and "skip" in block.words:
            check_command(block, folder)
        elif block.language == "sh" and all(re.match(r"python \w+\.py\b", line) for line in block.code.splitlines()):
            check_output(block, run_programs(block, block.code.splitlines(), folder, run_ranks))
        elif block.language == "sh":
            check_output(block, run_shell(block, folder))
        else:
            assert block.output is None, f"{block.place}: output behind a block that is not run"


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # chapter 4 does it to show what comes of it
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_every_block_prints_what_is_shown(chapter, tmp_path, run_ranks, as_found):
    run_chapter(chapter, tmp_path, run_ranks)


# --- What a chapter names ---------------------------------------------------------------------------------------------


def exists(path: str) -> bool:
    """Whether ``module.name.name`` is there; of a class also what its methods set. ``engine.`` may be an engine."""
    name, *rest = path.split(".")
    module = importlib.import_module(name)
    thing = module if name != "engine" or hasattr(module, rest[0]) else module.Engine
    for part in rest:
        if not hasattr(thing, part):
            bases = inspect.getmro(thing) if inspect.isclass(thing) else ()
            return any(re.search(rf"(\bself\.|^    ){part}\b", inspect.getsource(cls), re.MULTILINE)
                       for cls in bases if cls.__module__ == thing.__module__)
        thing = getattr(thing, part)
    return True


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def missing_in(chapter: Path) -> list[str]:
    """The links, pictures and names in a chapter that lead nowhere."""
    text = FENCED.sub("", chapter.read_text())
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = chapter.parent / path if path else chapter
        if re.match(r"[a-z]+:", target):
            continue
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor and file.exists() else []
        if not file.exists() or anchor and anchor not in map(slug, headings):
            missing.append(target)
    for name in re.findall(rf"`((?:{'|'.join(MODULES)})(?:\.\w+)+)", text):
        if not name.endswith(".py") and not exists(name):
            missing.append(name)
    for name in re.findall(r"`([A-Z]\w+(?:\.\w+)+)", text):  # Class.method, of any module
        if not any(exists(f"{module}.{name}") for module in MODULES):
            missing.append(name)
    for file, name in re.findall(r"`(test_\w+\.py)::(\w+)`", text):
        if f"def {name}(" not in (ROOT / "tests" / file).read_text():
            missing.append(f"{file}::{name}")
    return missing


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_every_link_and_every_name_of_the_code_exists(chapter):
    assert not missing_in(chapter)


def test_the_minutes_are_those_of_the_texts_and_of_the_grader():
    rows = re.findall(r"^\| \[.*\]\((\d.*\.md)\) \|.*\| (\d+) \| (\d+) \| (.*)\|$",
                      (ROOT / "tutorials" / "README.md").read_text(), re.MULTILINE)
    assert [name for name, *_ in rows] == [path.name for path in CHAPTERS if path.name[0].isdigit()]
    for name, reading, with_blocks, graded in rows:
        chapter = ROOT / "tutorials" / name
        words = len(FENCED.sub("", chapter.read_text()).split())
        lines = sum(block.code.count("\n") for block in blocks_of(chapter))
        assert int(reading) == pytest.approx(words / 200 + lines / 20, abs=2) and int(with_blocks) >= int(reading), name
        exercises = [exercise for exercise in grade.EXERCISES.values() if name.startswith(f"{exercise.chapter}_")]
        steps = [exercise.minutes for exercise in exercises if exercise.name.startswith("steps:")]
        minutes = [f"{sum(steps)} ({len(steps)} small steps)"] if steps else []
        minutes += [str(exercise.minutes) for exercise in exercises if not exercise.name.startswith("steps:")]
        assert graded.strip() == ", ".join(minutes), name


# --- The front page, and the words of all pages -----------------------------------------------------------------------


def test_the_front_page_is_short_and_its_line_counts_are_true():
    page = (ROOT / "README.md").read_text()
    assert len(page.encode()) <= 10_000 and page.count("\n") <= 170
    counts = {name: len((ROOT / name).read_text().splitlines()) for name in (f"{module}.py" for module in MODULES)}
    printed = {name: int(number.replace(",", "")) for name, number in
               re.findall(r"^\| \[`(\w+\.py)`\]\(\w+\.py\) \| ([\d,]+) \|", page, re.MULTILINE)}
    assert printed.keys() == counts.keys()
    assert printed == {name: pytest.approx(count, abs=50) for name, count in counts.items()}
    total = int(re.search(r"([\d,]+) lines in six files", page)[1].replace(",", ""))
    assert total == pytest.approx(sum(counts.values()), abs=50)


STILTED = ("at hand", "can't be meant", "is told", "are told", "shares out", "share out", "shall", "looks at whole",
           "beside it,")


def test_no_page_and_no_source_uses_a_stilted_phrase():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *(ROOT / "tutorials").glob("*.*"), *(ROOT / "tests").glob("*.py")]
    found = [f"{page.name}: {phrase}" for page in pages if page != Path(__file__)
             for phrase in STILTED if re.search(rf"\b{phrase}(?!\w)", page.read_text())]
    assert not found


# --- The runner itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown, printed, agree", [
    ("loss 0.500", "loss  0.503", True), ("loss 0.5", "loss 0.51", False), ("loss 0.5", "lost 0.5", False),
    ("rank 0: ...", "rank 0: what it wrote 17 times", True), ("rank 0: ...", "rank 1: more", False),
    ("it must be ...", "it must be 7 * 8", True), ("it is ...", "it was", False), ("step 1 ...", "step 12 of", False),
    ("1,024 bytes", "1024 bytes", True), ("-0.0000", "0.0000", True), ("nan", "1.0", False), ("a 1 ...", "a", False),
    ("1e-3, 2", "0.001, 2", True), ("1 2", "1", False), ("2 calls, 5 ms", "2 calls, 71 ms", True),
    ("2 calls, 5 ms", "3 calls, 5 ms", False), ("5 ms", "5 s", False)])
def test_how_lines_are_compared(shown, printed, agree):
    assert lines_agree(shown, printed, 0.01) == agree


@pytest.mark.parametrize("text, told", [
    ("```python\nprint(1)\n```\n", "prints, and no output is shown"),
    ("```python\nprint(1)\n```\n```output\n2\n```\n", "shows 2 and prints 1"),
    ("```python\nx = 1\n```\n\n```output\n2\n```\n", "shows 1 lines and prints 0"),
    ("```python ranks=2\nimport os\nprint(os.environ['WORLD_SIZE'])\n```\n```output\n3\n```\n", "shows 3 and prints 2"),
    ("```python ranks=2\nprint(2)\n```\n```output\n2\n```\n", "shows 1 lines and prints 2"),
    ("```sh\npython -c 'raise SystemExit(3)'\n```\n", "exit code 3"),
    ("```sh\npython launch.py --nproc_per_node 0\n```\n", "exit code 2: usage:"),
    ("```sh skip\npython launch.py --nproc_per_node 2 --fast\n```\n", "launch.py has no option --fast"),
    ("```output\n1\n```\n", "behind no block")],
    ids=["no output shown", "other number", "nothing printed", "ranks", "each rank prints",
         "exit code", "a script's", "unknown option", "stray output"])
def test_a_wrong_chapter_fails(tmp_path, run_ranks, text, told):
    chapter = tmp_path / "chapter.md"
    chapter.write_text(text)
    (tmp_path / "work").mkdir()
    with pytest.raises(AssertionError) as failure:
        run_chapter(chapter, tmp_path / "work", run_ranks)
    assert told in " ".join(str(failure.value).split())


def test_what_leads_nowhere_is_found(tmp_path):
    chapter = tmp_path / "chapter.md"
    chapter.write_text("# A heading, two\n`zero.Gradients.take`, `engine.step()`, `zero.Bucket.flat`, `launch.py`, "
                       "`engine.initialize(...)`, [here](#a-heading-two) and [there](chapter.md); `zero.Bucket.fly`, "
                       "`amp.nothing`, [nowhere](#b), ![a picture](figures/none.svg), `test_amp.py::test_nothing`, "
                       "`Gradients.take`, `Gradients.give`\n")
    assert missing_in(chapter) == ["#b", "figures/none.svg", "zero.Bucket.fly", "amp.nothing",
                                   "Gradients.give", "test_amp.py::test_nothing"]


# --- Pictures ---------------------------------------------------------------------------------------------------------


FOLDER = figures.ROOT / "tutorials" / "figures"


def check(path: Path) -> None:
    """A well-formed SVG below 80 kB, whose sheet has a light background of its own."""
    data = path.read_bytes()
    assert len(data) < 80_000, f"{path.name}: {len(data)} bytes"
    assert ElementTree.fromstring(data).tag.endswith("svg") and b"fill: #ffffff" in data


def test_every_picture_is_there_and_small():
    assert {path.stem for path in FOLDER.iterdir()} == set(figures.FIGURES)
    for path in FOLDER.iterdir():
        check(path)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 500_000


def test_schedules_are_drawn_the_same_each_time(tmp_path, capsys):
    drawn = []
    for _ in range(2):
        figures.main(["schedules", "--output", str(tmp_path)])
        assert re.fullmatch(r"wrote .*schedules.svg: \d+ kB\n", capsys.readouterr().out)
        check(tmp_path / "schedules.svg")
        drawn.append((tmp_path / "schedules.svg").read_bytes())
    assert drawn[0] == drawn[1]


def test_what_ranks_hold_lies_within_the_whole_and_covers_it(run_ranks):
    for stage, ranks in enumerate(zip(*run_ranks(figures.at_all_stages, 3, figures.pieces_held))):
        for rows in zip(*(rows for rows, _ in ranks)):
            end = 0
            for kind, held, start, whole in rows:
                assert start <= end + 0.02 * whole and start + held <= whole, f"stage {stage}, {kind}: {rows}"
                end = start + held
            assert end > 0.98 * whole, f"stage {stage}, {kind}: {rows}"


def test_a_gradient_that_a_bucket_took_is_counted_once(run_ranks):
    ((samples, _),) = run_ranks(figures.memory_of_a_step, 1, 0)
    parameters, most = (max(sample[kind] for sample in samples) for kind in ("parameters", "gradients"))
    assert parameters <= most < 1.2 * parameters, "a buffer as large as the parameters, and a gradient on its way"


@pytest.mark.long
@pytest.mark.parametrize("name", figures.FIGURES)
def test_all_pictures_are_made(tmp_path, name):
    figures.main([name, "--output", str(tmp_path)])
    check(tmp_path / f"{name}.svg")


def test_an_unknown_picture_is_refused(capsys):
    with pytest.raises(SystemExit):
        figures.main(["scheduls"])
    assert "the figure is 'scheduls'; allowed: schedules, holdings" in capsys.readouterr().err
