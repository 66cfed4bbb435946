"""The course's pictures: there, small, and made by figures.py.

    .venv/bin/python -m pytest -q tests/test_figures.py
    .venv/bin/python -m pytest -q tests/test_figures.py --long     make all of them anew
"""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import figures

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
    figures.main(["schedules", "--output", str(tmp_path)])
    assert re.fullmatch(r"wrote .*schedules.svg: \d+ kB\n", capsys.readouterr().out)
    check(tmp_path / "schedules.svg")
    first = (tmp_path / "schedules.svg").read_bytes()
    figures.main(["schedules", "--output", str(tmp_path)])
    assert (tmp_path / "schedules.svg").read_bytes() == first


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


@pytest.mark.parametrize("name", figures.FIGURES)
def test_all_pictures_are_made(request, tmp_path, name):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    figures.main([name, "--output", str(tmp_path)])
    check(tmp_path / f"{name}.svg")


def test_an_unknown_picture_is_refused(capsys):
    with pytest.raises(SystemExit):
        figures.main(["scheduls"])
    assert "the figure is 'scheduls'; allowed: schedules, holdings" in capsys.readouterr().err
