"""report.py end to end on a tiny run, its SVG writer, and its errors."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAST, make_task, make_tasks, write_tasks

import report
import trainloop_complete_with_fixes as trainloop

VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on tasks of which one has an id that would be markup."""
    tasks = {**make_tasks(("flip", "same", "crop")), "a<b>&c": make_task("double")}
    data = write_tasks(tmp_path_factory.mktemp("data") / "training.json", tasks)
    runs = tmp_path_factory.mktemp("runs")
    flags = ["--data", str(data), "--runs_dir", str(runs), "--epochs", "1", "--quiet", *FAST]
    assert trainloop.main(flags) == 0
    return next(runs.glob("arc_complete_2*"))


class Balanced(HTMLParser):
    """Counts elements and fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID and tag != "path":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag == "path" or self.open.pop() == tag


def test_the_page_stands_alone_and_shows_everything(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "report.html"
    before = sorted(p.name for p in run.rglob("*"))
    assert report.main([str(run), "--out", str(out), "--device", "cpu"]) == 0
    assert f"Wrote {out}: " in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "http" not in text
    images = [attrs["src"] or "" for tag, attrs in parser.seen if tag == "img"]
    assert len(images) == 1
    assert images[0].startswith("data:image/png;base64,")
    for words in (run.name, "arc1_eval", "step 5", "truth", "a&lt;b&gt;&amp;c", "Not solved: "):
        assert words in text
    assert "a<b>" not in text
    # Four queries: three demonstrations of two grids, the query, five steps and the truth each.
    assert sum(tag == "svg" for tag, _ in parser.seen) == 4 * (6 + 1 + 5 + 1)
    assert sorted(p.name for p in run.rglob("*")) == before  # nothing is written to the run
    again = tmp_path / "again.html"
    assert report.main([str(run), "--out", str(again), "--device", "cpu", "--quiet"]) == 0
    assert again.read_text(encoding="utf-8") == text


def test_curves_alone(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    assert report.main([str(run), "--curves", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_without_results_and_with_a_torn_line(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / run.name
    shutil.copytree(run, folder)
    (folder / "results.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "batch", "loss": NaN, "minutes": 9.0}\n{"kind": "ba')
    record = report.read_record(folder)
    assert len(record.batches) == len(report.read_record(run).batches) + 1
    assert report.draw_curves(record).startswith(b"\x89PNG")
    assert "No final evaluation yet" in report.result_tables(record.results)


def test_missing_matplotlib_says_how_to_get_it(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.main([str(run), "--out", str(tmp_path / "r.html")]) == 3
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line_and_a_code(run: Path, tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / run.name
    shutil.copytree(run, empty)
    (empty / "metrics.jsonl").unlink()
    for argv, code, says in (
        ([str(tmp_path / "nothing")], 3, "no such run"),
        ([str(empty)], 3, "metrics.jsonl: cannot be read"),
        ([str(run), "--data", "no_such_data"], 3, "no such data"),
        ([str(run), "--curves", str(tmp_path)], 2, "is a folder"),
        ([str(run), "--picture", "3"], 2, "Did you mean --pictures?"),
    ):
        out = [] if "--curves" in argv else ["--out", str(tmp_path / "r.html")]
        try:
            found = report.main([*argv, *out])
        except SystemExit as left:
            found = int(left.code or 0)
        error = capsys.readouterr().err.strip()
        assert (found, len(error.splitlines())) == (code, 1), error
        assert says in error
    assert not (tmp_path / "r.html").exists()


def test_the_sample_is_fixed_and_has_known_outputs_only(run: Path) -> None:
    from dataset_arc import load_tasks

    config = json.loads((run / "config.json").read_text())
    tasks = load_tasks(config["arguments"]["data"]).train
    some = report.sample_queries(tasks, 3)
    assert some == report.sample_queries(tasks, 4)[:3]
    assert report.sample_queries(tuple(t.without_test_outputs() for t in tasks), 3) == []


def test_svg_paints_every_cell_once() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (3, 5), (30, 30), (1, 30)):
        grid = rng.integers(0, 10, shape).astype(np.uint8)
        painted = np.full(shape, 255)
        for colour, path in re.findall(r'<path fill="(#\w+)" d="([^"]*)"', report.svg(grid, "g")):
            for c, r, n, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path):
                assert n == back
                row, start, end = int(r), int(c), int(c) + int(n)
                assert (painted[row, start:end] == 255).all()
                painted[row, start:end] = report.PALETTE.index(colour)
        np.testing.assert_array_equal(painted, grid)


def test_smoothing_ignores_what_is_not_finite() -> None:
    assert report.smooth([1.0, float("nan"), 3.0], 3) == [1.0, 2.0, 3.0]
    assert report.smooth([1.0, 2.0], 1) == [1.0, 2.0]
