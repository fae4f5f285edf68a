"""report.py end to end on a tiny run: what stands in its page, and its errors. What the page's own
script does is in test_report_browser.py."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAST, grid_of, make_task, make_tasks, write_tasks

import report
import report_page
import run_lines
import run_record
import trainloop_complete_with_fixes as trainloop
from dataset_arc import Pair, Task
from evaluation import Change, Prediction, mcnemar
from grid_pictures import INK, PALETTE
from run_record import Record

VOID = {"meta", "img", "br", "wbr"}
POLICY = {"http-equiv": "Content-Security-Policy"}
SHAPES = {"path", "circle"}  # of SVG, closed where they open


def train(tmp: Path, *flags: str) -> Path:
    """A finished run on tasks of which one has an id that would be markup."""
    tasks = {**make_tasks(("flip", "same", "crop")), "a<b>&c": make_task("double")}
    data = write_tasks(tmp / "training.json", tasks)
    where = ["--data", str(data), "--runs_dir", str(tmp / "runs"), "--quiet"]
    assert trainloop.main([*where, *FAST, *flags]) == 0
    return next((tmp / "runs").glob("arc_complete_2*"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run"), "--epochs", "1", "--hypotheses", "on")


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of that run's page."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main([str(run), "--out", str(out), "--device", "cpu", "--quiet"]) == 0
    return out.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element with its attributes and own text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")
        if tag not in VOID | SHAPES:
            self.open.append(len(self.seen) - 1)

    def handle_endtag(self, tag: str) -> None:
        if tag not in SHAPES:
            assert self.seen[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]] += data

    def all(self, tag: str, **having: str) -> list[tuple[dict[str, str], str]]:
        """(attributes, text) of each element of a tag with these attributes."""
        return [
            (attrs, text)
            for (name, attrs), text in zip(self.seen, self.texts, strict=True)
            if name == tag and having.items() <= attrs.items()
        ]


def visible(page: str) -> str:
    """A page's words in their order, without tags, styles and scripts."""
    bare = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", bare)).split())


def cards_of(page: str) -> list[dict[str, Any]]:
    """What the page's script gets."""
    ((_, text),) = Elements(page).all("script", id="cards")
    return json.loads(text)


def grid(card: dict[str, Any], number: int) -> Any:
    """One of a card's grids."""
    return grid_of(*card["g"][number].split("|"))


# ---------------------------------------------------------------- the page


def test_the_page_stands_alone(run: Path, page: str, tmp_path: Path) -> None:
    """Breaks: anything that a page without network would lack, or that escapes its text."""
    found = Elements(page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    for tag, attrs in found.seen:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert "src" not in attrs
        assert not [name for name in attrs if name.startswith("on")]
        assert attrs.get("href", "#").startswith("#")
    ids = [attrs["id"] for _, attrs in found.seen if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {a["href"][1:] for a, _ in found.all("a")} <= set(ids)
    assert "default-src 'none'" in found.all("meta", **POLICY)[0][0]["content"]
    assert "a<b>" not in page
    assert any(card["id"] == "a<b>&c" for card in cards_of(page))
    before = sorted(p.name for p in run.rglob("*"))
    again = tmp_path / "again.html"
    assert report.main([str(run), "--out", str(again), "--device", "cpu", "--quiet"]) == 0
    assert again.read_text(encoding="utf-8") == page
    assert sorted(p.name for p in run.rglob("*")) == before  # nothing is written to the run


def test_the_page_suits_phones_dark_rooms_keyboards_and_screen_readers(page: str) -> None:
    found = Elements(page)
    (viewport,) = found.all("meta", name="viewport")
    assert viewport[0]["content"] == "width=device-width, initial-scale=1"
    assert "prefers-color-scheme:dark" in page
    assert ":focus-visible" in page
    tables = found.all("table")
    assert len(tables) == len(found.all("caption")) > 2
    assert all(attrs["scope"] in ("col", "row") for attrs, _ in found.all("th"))
    assert all(attrs["type"] == "button" for attrs, text in found.all("button") if text != "Close")
    pictures = [attrs for attrs, _ in found.all("svg") if "aria-hidden" not in attrs]
    assert len(pictures) == len(report_page.PANELS)
    assert all(attrs["role"] == "img" and "minutes" in attrs["aria-label"] for attrs in pictures)
    headings = [tag for tag, _ in found.seen if re.fullmatch(r"h\d", tag)]
    assert headings.count("h1") == 1
    assert found.seen[0] == ("html", {"lang": "en"})


def test_the_headline_stands_beside_its_parts_and_the_untrained_network(
    run: Path, page: str
) -> None:
    """Breaks: views that were asked for, shown as views that were done."""
    results = json.loads((run / "results.json").read_text())
    words = visible(page)
    assert f"{results['exact_at_2']} of {results['n']} test outputs exact in two attempts" in words
    assert results["views_done"] != results["views"] or results["views_done"] == 2
    assert f"{results['views_done']:.2g} views a query voted on average of the" in words
    for part in ("network", "hypotheses"):
        counts = results["alone"][part]
        assert f"{part.capitalize()} alone {counts['exact_at_2']} of {results['n']}" in words
    first = results["untrained"]
    assert f"Untrained network {first['exact_at_1']} of {first['n']}" in words
    assert f"Seed {results['seed']}" in words
    assert f"Hardware {results['device']}" in words
    assert f"{results['minutes']:.1f}" in words
    for title in ("By origin", "How to read this page", "What the pictures are"):
        assert title in words


def test_the_gallery_holds_every_query_with_what_it_took(run: Path, page: str) -> None:
    cards = cards_of(page)
    data = json.loads(Path(run_record.read_record(run).arguments["data"]).read_text())
    assert {card["id"] for card in cards} == set(data)
    for card in cards:
        task = data[card["id"]]
        truth = np.array(task["test"][0]["output"])
        np.testing.assert_array_equal(grid(card, card["truth"]), truth)
        np.testing.assert_array_equal(grid(card, card["query"]), task["test"][0]["input"])
        for pair, (inp, out) in zip(task["train"], card["demos"], strict=True):
            np.testing.assert_array_equal(grid(card, inp), pair["input"])
            np.testing.assert_array_equal(grid(card, out), pair["output"])
        exact = [np.array_equal(grid(card, a["g"]), truth) for a in card["attempts"]]
        assert [a["is"] for a in card["attempts"]] == ["right" if e else "wrong" for e in exact]
        assert (card["state"] == "solved") == any(exact)
        assert card["steps"]["n"] in range(1, 6)
        assert all(a["by"] for a in card["attempts"])
    flipped = next(card for card in cards if card["id"] == "t0_flip")
    assert flipped["state"] == "solved"  # a rule list finds a flip
    assert 'hypothesis "fliplr"' in flipped["attempts"][0]["by"]
    assert "re-predicts 3 of 3 demonstrations" in flipped["attempts"][0]["by"]
    words = visible(page)
    assert "in 2 views and two attempts, network and hypotheses voting" in words
    assert "This is a sample and not the headline, which counts 4 queries" in words


def test_the_gallery_has_its_colours_from_one_owner(page: str) -> None:
    ((gallery, _),) = Elements(page).all("div", id="gallery")
    assert gallery["data-palette"].split() == list(PALETTE)
    assert gallery["data-ink"].split() == list(INK)
    assert "dataset.ink" in page


def test_filters_count_what_they_find(page: str) -> None:
    cards = cards_of(page)
    buttons = {
        attrs["data-filter"]: attrs["aria-pressed"]
        for attrs, _ in Elements(page).all("button")
        if "data-filter" in attrs
    }
    assert {"all", "solved", "lost"} <= set(buttons)
    assert [key for key, pressed in buttons.items() if pressed == "true"] == ["all"]
    counts = re.findall(r'data-filter="(\w+)".*?<span>(\d+)</span>', page)
    for key, n in counts:
        found = [c for c in cards if key in ("all", c["state"], *c["flags"])]
        assert len(found) == int(n)


# ---------------------------------------------------------------- one answer in words

TRUTH = grid_of("123", "456")


def answer(*attempts: Any, **more: Any) -> report_page.Answer:
    task = Task("task", (Pair(TRUTH, TRUTH),), (Pair(TRUTH, TRUTH),))
    given = {"sources": ["-"] * len(attempts), "steps": (TRUTH, TRUTH), "n_steps": 1, **more}
    return report_page.Answer(task, 0, list(attempts), **given)


def spoilt(n: int, base: Any = TRUTH) -> Any:
    """The grid with its first n cells wrong."""
    made = base.copy()
    made.ravel()[:n] = 9
    return made


def test_states_say_how_far_an_answer_is() -> None:
    turned = TRUTH.T
    large = np.zeros((10, 10), np.uint8)
    nearly = report_page.Answer(
        Task("t", (Pair(large, large),), (Pair(large, large),)),
        0, [spoilt(10, large)], ["-"], (large, large), 1,
    )  # fmt: skip
    for some, state, share, says in (
        (answer(TRUTH, spoilt(1)), "solved", 1.0, "solved in attempt 1"),
        (answer(turned, TRUTH), "solved", 1.0, "solved in attempt 2"),
        (answer(turned, spoilt(3)), "wrong", 0.5, "not solved: 50.0% of the cells right"),
        (answer(turned), "size", 0.0, "size wrong"),
        (nearly, "nearly", 0.9, "nearly: 90.0% of the cells right"),
    ):
        assert report_page.state_of(some) == (state, share)
        assert report_page.card(some)["says"] == says
    assert report_page.verdict_on(turned, TRUTH) == ("wrong", "size wrong: 3 x 2, should be 2 x 3")
    assert report_page.verdict_on(spoilt(2), TRUTH) == ("wrong", "2 of 6 cells wrong")
    assert report_page.verdict_on(TRUTH, None) == ("unknown", "output not known")


def test_what_changed_is_counted_by_what_it_did() -> None:
    says = report_page.changed
    assert says(TRUTH, TRUTH, TRUTH) == "no cell changed"
    assert says(spoilt(2), TRUTH, TRUTH) == "2 cells changed: 2 mended, 0 spoilt"
    assert says(TRUTH, spoilt(1), TRUTH) == "1 cell changed: 0 mended, 1 spoilt"
    other = spoilt(1)
    other[0, 0] = 8
    assert says(spoilt(1), other, TRUTH).endswith("0 mended, 0 spoilt, 1 wrong before and after")
    assert says(TRUTH, TRUTH.T, TRUTH) == "the size changed from 2 x 3 to 3 x 2"


def test_an_unknown_output_is_neither_right_nor_wrong() -> None:
    task = Task("t", (Pair(TRUTH, TRUTH),), (Pair(TRUTH, None),))
    some = report_page.Answer(task, 0, [TRUTH], ["-"], (TRUTH, TRUTH), 1)
    card = report_page.card(some)
    assert (card["state"], card["truth"], some.solved) == ("unknown", None, False)
    assert card["attempts"][0]["is"] == "unknown"
    assert report_page.outcomes_of([some]) == {}


def test_refinements_that_win_or_lose_are_found() -> None:
    """Breaks: a flag that looks at what was not accepted, or at one view alone."""
    task = Task("task", (Pair(TRUTH, TRUTH),), (Pair(TRUTH, TRUTH),))

    bad = spoilt(1)

    def flags(vote: Any, *changes: tuple[Any, Any, bool], own: Any = bad) -> Any:
        network, joint = Prediction(views=1), Prediction(views=1)
        network.add(own, 1.0)
        joint.add(vote, 1.0)
        network.changes = [Change(b, a, 0.0, 0.0, taken) for b, a, taken in changes]
        some = report.answer_of(task, 0, network, joint, None, (TRUTH, TRUTH, 1))
        return some.won, some.lost

    assert flags(TRUTH, (bad, bad, False), (bad, TRUTH, True)) == (True, False)
    assert flags(bad, (TRUTH, bad, True)) == (False, True)
    assert flags(bad, (TRUTH, bad, False)) == (False, False)
    assert flags(bad, (bad, bad, False), own=TRUTH) == (False, True)  # lost in the vote
    assert flags(TRUTH, own=TRUTH) == (False, False)


def test_a_thousand_tasks_stay_below_five_megabytes() -> None:
    """Grids of the mean size of ARC's, all cells random: nothing repeats."""
    rng = np.random.default_rng(0)

    def any_grid() -> Any:
        return rng.integers(0, 10, (13, 14)).astype(np.uint8)

    def one(i: int) -> report_page.Answer:
        pairs = tuple(Pair(any_grid(), any_grid()) for _ in range(3))
        task = Task(f"{i:08x}", pairs, (Pair(any_grid(), any_grid()),))
        grids = [any_grid() for _ in range(5)]
        refined = (grids[3], grids[4], True)
        words = ["x" * 200, "x" * 200]
        return report_page.Answer(task, 0, grids[:2], words, (grids[2], grids[3]), 5, refined)

    record = Record(Path("run"), {}, {}, [{"kind": "batch", "minutes": 1.0, "loss": 2.0}], [])
    text = report_page.render(record, report_page.Gallery([one(i) for i in range(1000)], "-"))
    assert 2e6 < len(text.encode()) < 5e6


# ---------------------------------------------------------------- damaged, old and stopped runs


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "runs" / run.name))


def shown(folder: Path, *flags: str) -> str:
    """The page of a run without its gallery."""
    out = folder.parent / "page.html"
    assert report.main([str(folder), "--out", str(out), "--tasks", "0", "--quiet", *flags]) == 0
    text = out.read_text(encoding="utf-8")
    Elements(text)
    return text


DAMAGE: dict[str, dict[str, bytes | None]] = {
    "nothing but metrics": {"results.json": None, "config.json": None, "training.log": None},
    "cut": {"results.json": b'{"n": 10, "exa', "config.json": b"{", "training.log": b"\xff\x00"},
    "other kinds": {
        "results.json": b'{"n": "many", "exact_at_2": [], "slices": {"a": 3}, "alone": {"x": 1},'
        b' "untrained": 7, "views_done": "all", "gains": [], "minutes": true}',
        "config.json": b'{"arguments": [1], "versions": "no", "data": null, "commit": 5}',
        "training.log": b"2026-01-01 00:00:00,000 Resume: what?\n2026-01-01 no line\n",
    },
    "lists": {"results.json": b"[]", "config.json": b"[]"},
    "empty": {"results.json": b"", "config.json": b"", "training.log": b""},
    "huge": {"results.json": b'{"n": 1e999, "exact_at_2": 1, "minutes": ' + b"9" * 400 + b"}"},
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_damaged_files_give_a_page_with_gaps(copied: Path, damage: str) -> None:
    for name, content in DAMAGE[damage].items():
        (copied / name).unlink()
        if content is not None:
            (copied / name).write_bytes(content)
    with (copied / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "batch", "loss": NaN, "minutes": 9.0, "epoch": "x", "size_weight": 1}\n'
            '{"kind": "epoch", "skipped": "no", "minutes": null, "val_accuracy": 1}\n'
            '{"kind": "start", "untrained": 4}\n{"kind": "health"}\n{"kind": "ba'
        )
    words = visible(shown(copied))
    assert copied.name in words
    assert "Learning curves" in words
    if damage != "huge":
        assert "test outputs exact in two attempts" not in words


def test_a_part_that_did_not_answer_all_is_counted_on_what_it_answered(copied: Path) -> None:
    """Breaks: queries that the time did not reach, shown and tested as wrong answers."""
    path = copied / "results.json"
    results = json.loads(path.read_text())
    counts = {"exact_at_1": 30, "exact_at_2": 40, "both_won": 9, "both_lost": 1, "p": 0.02}
    results |= {"n": 1076, "exact_at_1": 50, "exact_at_2": 80}
    for n, says in (
        (150, "Network alone 40 of the 150 that it reached (of 1076), 26.7% two attempts"),
        (1076, "Network alone 40 of 1076, 3.7% two attempts; together wins 9 of its misses"),
        (None, "Network alone 40 of 1076, 3.7% two attempts; together wins 9 of its misses"),
    ):
        made: dict[str, Any] = {"alone": {"network": counts | {"n": 9}}}  # n: of those answered
        results.pop("network_queries", None)
        made |= {} if n is None else {"network_queries": n}
        path.write_text(json.dumps(results | made))
        words = visible(shown(copied))
        assert says in words
        assert ("McNemar p = 0.02" in words) == (n in (1076, None))
    reached = {"network_queries": 150, "hypothesis_queries": 0}
    alone = {"network": counts, "hypotheses": counts | {"exact_at_2": 0}}
    path.write_text(json.dumps(results | {"alone": alone} | reached))
    record = run_record.read_record(copied)
    rows = {name: a for name, a, _ in report_page.side_by_side(record, record)}
    assert rows["Network alone"] == "40 of the 150 that it reached (of 1076) (26.7%)"
    assert "Hypotheses alone" not in rows  # none was answered, so nothing can be said


def test_a_stopped_run_says_that_there_is_no_result(copied: Path) -> None:
    (copied / "results.json").unlink()
    text = shown(copied)
    assert "No final evaluation yet" in text
    record = run_record.read_record(copied)
    names = [score.name for score in run_record.headline(record)]
    assert names == ["Untrained network", "Trained network"]  # metrics.jsonl has both


def test_an_old_run_without_later_keys_is_shown_and_its_gaps_are_said(copied: Path) -> None:
    results = json.loads((copied / "results.json").read_text())
    for key in ("views_done", "alone", "gains", "untrained", "validated", "device"):
        results.pop(key, None)
    (copied / "results.json").write_text(json.dumps(results))
    words = visible(shown(copied))
    assert "how many really did was not recorded" in words
    assert "alone" not in words.split("By origin")[0]


def test_views_that_were_done_are_told_not_those_that_were_asked_for() -> None:
    for results, says in (
        ({"views_done": 1.82, "views": 8}, "1.8 views a query voted on average of the 8 that"),
        ({"views": 8}, "up to 8 views voted; how many really did was not recorded"),
        ({"views_done": "x"}, "how many views voted was not recorded"),
    ):
        assert run_record.views_line(results).startswith(says)


def test_without_batches_or_a_folder_there_is_one_line(copied: Path, capsys: Any) -> None:
    (copied / "metrics.jsonl").write_text('{"kind": "start"}\n{"kind": "batch", "lo')
    assert report.main([str(copied), "--out", str(copied.parent / "p.html")]) == 3
    assert "no batches in it yet" in capsys.readouterr().err
    assert not (copied.parent / "p.html").exists()


def add_rows(folder: Path, *rows: dict[str, Any]) -> Record:
    """The run's record with more rows in metrics.jsonl."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return run_record.read_record(folder)


def test_health_says_warnings_no_warnings_and_not_watched(copied: Path) -> None:
    """Breaks: a run that nobody watched and that is called healthy."""
    path = copied / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if row["kind"] != "health"]
    for row in kept:
        for name in run_record.WATCHED:
            row.pop(name, None)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert "made without the health monitor" in shown(copied)
    warning = {"kind": "health", "name": "qwen_grad", "epoch": 2, "batch": 7, "value": 0.0}
    add_rows(copied, warning | {"message": "the <b> is 0", "fix": "raise --qwen_lr"})
    words = visible(shown(copied))
    assert "qwen_grad epoch 2, batch 7, value 0" in words
    assert "the <b> is 0" in words
    assert "raise --qwen_lr" in words
    assert "No warnings" not in words
    assert "! qwen_grad" in words
    add_rows(copied, warning | {"name": "frozen", "level": "note"})
    assert "note: frozen" in visible(shown(copied))
    watched = kept[-1] | {"kind": "batch", "minutes": 9.0, "answer_spread": 0.5}
    path.write_text(json.dumps(kept[-2] | watched) + "\n")
    assert "No warnings" in shown(copied)  # its batches have the monitor's figures


def test_too_few_batches_are_said_as_on_the_console(run: Path) -> None:
    record = run_record.read_record(run)

    def says(n: int, results: Any) -> str:
        made = Record(run, record.config, results, record.batches[:1] * n, [])
        return visible(report_page.render(made, report_page.Gallery([], "-")))

    assert run_record.FEW_BATCHES == run_lines.FEW_BATCHES
    assert "! few batches 26 batches: too few to learn from." in says(26, record.results)
    assert "1 batch so far: too few to learn from." in says(1, {})
    assert "too few" not in says(50, record.results)


LOG = """
2026-01-01 10:00:00,000 Data:   arcagi2: 4 tasks
2026-01-01 10:00:01,000 Data: training.json was found by itself, /d; --data arcagi2 for ARC-AGI-2
2026-01-01 10:01:00,000 [Batch    3] skipped: loss nan, gradient norm nan (not finite; 1 so far)
2026-01-01 10:02:00,000 Stopped by SIGTERM; everything is saved. Go on with:
2026-01-01 11:00:00,000 Data:   arcagi2: 4 tasks
2026-01-01 11:00:01,000 Resume: EXACT (same state, same (odd) order) | from checkpoint 1, epoch 0, \
batch 9 | batches lost: 2 | files skipped: 0
2026-01-01 11:05:00,000 [Batch    9] Reward: +0.0000
2026-01-01 12:00:00,000 Data:   arcagi2: 4 tasks
2026-01-01 12:00:01,000 Resume: something new
2026-01-01 12:00:02,000 Resume: EQUIVALENT (other) | from checkpoint 0, epoch 0, batch -1 | files
2026-01-01 12:30:00,000 Final: 1/4 exact in two attempts
""".lstrip()


def test_history_tells_of_stops_resumes_and_sudden_ends(copied: Path) -> None:
    (copied / "training.log").write_text(LOG)
    record = run_record.read_record(copied)
    events = run_record.history(record)
    assert [e.kind for e in events] == [
        "start", "end", "start", "resume", "sudden", "start", "resume", "resume", "end",
    ]  # fmt: skip
    assert events[3].text.startswith(
        "Resumed EXACT from checkpoint 1, after batch 9 of epoch 0; batches lost: 2. same state"
    )
    assert events[4].when == "2026-01-01 11:05:00"
    assert events[6].text == "Resume: something new"
    fresh = "Resumed EQUIVALENT from checkpoint 0, before the first batch of epoch 0. other"
    assert events[7].text == fresh
    assert run_record.n_skipped(record) == 1
    words = visible(shown(copied))
    assert "batch 3: loss nan" in words
    assert "Stopped by SIGTERM; everything is saved." in words


def test_a_real_resume_is_in_the_history(tmp_path: Path) -> None:
    folder = train(tmp_path, "--epochs", "1", "--max_batches", "2")
    flags = ["--resume", str(folder), "--epochs", "2", "--device", "cpu", "--quiet"]
    assert trainloop.main(flags) == 0
    kinds = [event.kind for event in run_record.history(run_record.read_record(folder))]
    assert kinds == ["start", "end", "start", "resume", "end"]


# ---------------------------------------------------------------- the seven fixes


def fixes(rows: list[dict[str, Any]], **arguments: Any) -> dict[str, run_record.Fix]:
    """The seven by number, of a run with these batches."""
    record = Record(Path("run"), {"arguments": arguments}, {}, rows, [])
    return {fix.title[0]: fix for fix in run_record.seven_fixes(record)}


def healthy(**other: Any) -> dict[str, Any]:
    row = {
        "kind": "batch", "epoch": 0, "minutes": 1.0, "loss": 2.0, "reward": 0.1, "soft_reward": 0.1,
        "qwen_grad": 0.01, "qwen_lr": 1e-3, "mask_ratio": 0.25, "size_weight": 1.0, "size": 1.0,
        "stored": 2.0, "threshold": 0.22, "d_acc": 0.05, "agent_grad": 0.5,
    }  # fmt: skip
    return row | other


def test_a_real_run_shows_all_seven(run: Path) -> None:
    found = run_record.seven_fixes(run_record.read_record(run))
    assert [fix.title[0] for fix in found] == list("1234567")
    assert "missing" not in {fix.state for fix in found}


def test_a_fix_that_is_seen_is_not_judged(page: str) -> None:
    """Breaks: praise beside a figure that fell or stood still."""
    words = visible(page).split("The seven fixes, as they showed")[1].split("History")[0]
    assert "4. Sizes first seen in this run Weight of the size loss" in words
    assert "at work" not in words
    assert "badge good" not in page.split('id="fixes"')[1].split('id="history"')[0]


def test_each_fix_notices_when_it_is_not_at_work() -> None:
    assert {fix.state for fix in fixes([healthy()] * 10).values()} == {"seen"}
    for number, change, state in (
        ("1", {"qwen_grad": 0.0}, "doubtful"),
        ("1", {"qwen_lr": 0.0}, "off"),
        ("2", {"soft_reward": 0.0}, "doubtful"),
        ("5", {"stored": 0.0}, "doubtful"),
        ("6", {"reward": -0.1}, "doubtful"),
        ("6", {"d_acc": 0.0}, "doubtful"),
        ("7", {"loss": None}, "doubtful"),
    ):
        assert fixes([healthy(**change)] * 10)[number].state == state, (number, change)
    for number, flag in (
        ("1", {"qwen_train": "frozen"}),
        ("2", {"no_reward": True}),
        ("3", {"no_hard_cells": True}),
        ("5", {"no_memory": True}),
        ("6", {"policy": "off"}),
    ):
        assert fixes([healthy()] * 10, **flag)[number].state == "off", flag
    bare = fixes([{"kind": "batch", "minutes": 1.0}])
    assert [bare[n].state for n in "123456"] == ["missing"] * 6
    weights = [healthy(epoch=e, size_weight=w) for e, w in enumerate((1.0, 0.8333, 0.6667, 0.5))]
    assert "1.000 in epoch 0, 0.833 in epoch 1" in fixes(weights)["4"].evidence


# ---------------------------------------------------------------- curves


def test_curves_follow_the_figures() -> None:
    """Breaks: an axis upside down, a panel without the untrained point, a final at another time."""
    rows = [healthy(minutes=float(m), loss=5.0 - m, exact=0.1 * m, batch=m) for m in range(5)]
    rows[2]["loss"] = None
    results = {"n": 4, "exact_at_2": 2, "minutes": 8.0, "untrained": {"n": 4, "exact_at_1": 1}}
    epochs = [{"kind": "epoch", "minutes": 4.0, "val_accuracy": 0.5}]
    record = Record(Path("run"), {}, results, rows, epochs)
    found = {panel.title: panel for panel in report_page.panels([record])}
    exact = found["Exact grids"].lines
    assert (exact[-2].x, exact[-2].y) == ([0.0, 4.0], [0.25, 0.5])  # untrained, then the epoch
    assert (exact[-1].x, exact[-1].y, exact[-1].mark) == ([8.0], [0.5], "star")
    drawing = report_page.draw(found["Loss"], 8.0, "minutes")
    Elements(drawing)
    (path,) = re.findall(r'<path class="raw c1" d="([^"]+)"', drawing)
    corners = [tuple(map(float, p.split())) for p in re.split("[ML]", path)[1:]]
    assert path.count("M") == 2  # what is not finite leaves a gap
    assert [x for x, _ in corners] == sorted(x for x, _ in corners)
    assert [y for _, y in corners] == sorted(y for _, y in corners)  # falling: down is larger
    assert corners[0][0] == report_page.LEFT
    half = (report_page.WIDTH - report_page.LEFT - report_page.RIGHT) / 2
    assert corners[-1][0] == pytest.approx(report_page.LEFT + half)
    assert "Loss over 8 minutes" in drawing


def test_long_curves_are_thinned_and_ticks_are_round() -> None:
    x, y = report_page.thinned(list(range(10_000)), [1.0] * 5_000 + [3.0] * 5_000)
    assert len(x) <= report_page.MAX_POINTS
    assert (y[0], y[-1]) == (1.0, 3.0)
    assert report_page.ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert report_page.ticks(-0.3, 0.35, 4) == pytest.approx([-0.2, 0, 0.2])
    assert report_page.ticks(2.0, 2.0) == [2.0]
    assert report_page.decades(-4.2, 0.5) == [-4, -3, -2, -1, 0]
    assert report_page.decades(-1.6, -1.4) == [-1.6, -1.4]  # no round number is between
    assert report_page.decades(-2.1, -1.5) == pytest.approx(list(map(math.log10, (0.01, 0.02))))


def test_a_gradient_of_zero_everywhere_is_said() -> None:
    record = Record(Path("run"), {}, {}, [healthy(qwen_grad=0.0)] * 3, [])
    panel = next(p for p in report_page.panels([record]) if p.log)
    assert "all figures are 0" in report_page.draw(panel, 1.0, "minutes")


def test_smoothing_ignores_what_is_not_finite() -> None:
    assert run_record.smooth([1.0, float("nan"), 3.0], 3) == [1.0, 2.0, 3.0]
    assert run_record.smooth([1.0, 2.0], 1) == [1.0, 2.0]


def test_curves_alone_are_a_png(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "curves.png"
    assert report.main([str(run), "--curves", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [out]


def test_the_png_of_a_run_without_results_and_with_a_torn_line(copied: Path) -> None:
    pytest.importorskip("matplotlib")
    (copied / "results.json").unlink()
    n = len(run_record.read_record(copied).batches)
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "batch", "loss": NaN, "minutes": 9.0}\n{"kind": "ba')
    record = run_record.read_record(copied)
    assert len(record.batches) == n + 1
    assert report.draw_curves(record).startswith(b"\x89PNG")


def test_only_the_png_needs_matplotlib(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.main([str(run), "--curves", str(tmp_path / "c.png")]) == 3
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    page = tmp_path / "r.html"
    assert report.main([str(run), "--out", str(page), "--tasks", "0", "--quiet"]) == 0
    assert "<svg" in page.read_text()


# ---------------------------------------------------------------- two runs


def test_two_runs_are_set_beside_each_other(run: Path, copied: Path, tmp_path: Path) -> None:
    """Breaks: a comparison of a run with itself that finds a difference, or hides a flag's."""
    config = json.loads((copied / "config.json").read_text())
    config["arguments"] |= {"agent_lr": 0.125, "seed": None}
    config["arguments"] |= dict.fromkeys(report_page.NO_SETTINGS, "elsewhere")
    (copied / "config.json").write_text(json.dumps(config))
    out = tmp_path / "both.html"
    flags = ["--out", str(out), "--device", "cpu", "--quiet", "--views", "1"]
    assert report.main([str(run), str(copied), *flags]) == 0
    text = out.read_text(encoding="utf-8")
    words = visible(text)
    assert "--agent_lr 0.003 0.125" in words
    assert "--seed 0 not given" in words
    found = Elements(text)
    flags = [name for attrs, name in found.all("th", scope="row") if name.startswith("--")]
    assert flags == ["--agent_lr", "--seed"]
    assert len(found.all("th", **{"class": "flag"})) == 2
    assert ".flag{white-space:nowrap}" in text
    assert "Learning rate: agent" in words
    assert "Reward of refinement" in words
    split = "Of 4 queries both solve 4, neither 0; only A 0, only B 0. Exact McNemar test: p = 1"
    assert words.count(split) == 2  # of the final evaluations, and of the answers made here
    assert "A: training batches" in words
    assert "B: training batches" in words
    results = json.loads((run / "results.json").read_text())
    score = f"{results['exact_at_2']} of {results['n']}"
    assert len(re.findall(f"<td>{score} ", text)) >= 2


def test_two_runs_of_which_one_is_too_old_for_outcomes(run: Path, copied: Path) -> None:
    results = json.loads((copied / "results.json").read_text())
    del results["by_task"]
    (copied / "results.json").write_text(json.dumps(results))
    out = copied.parent / "both.html"
    argv = [str(copied), str(run), "--out", str(out), "--tasks", "0", "--quiet"]
    assert report.main(argv) == 0
    words = visible(out.read_text(encoding="utf-8"))
    assert "results.json of A holds counts and no outcome per query" in words


def test_every_panel_of_two_runs_says_what_it_shows(run: Path) -> None:
    """Breaks: panels called `agent`, `Qwen` and `reward`."""
    record = run_record.read_record(run)
    titles = [panel.title for panel in report_page.panels([record, record])]
    assert len(set(titles)) == len(titles) == len(report_page.PANELS) + 2
    own = {title for title, _, keys, *_ in report_page.PANELS if len(keys) == 1}
    assert set(titles) == own | set(report_page.SPLIT.values())


def test_outcomes_by_query_are_tested_exactly() -> None:
    names = [f"t{i}, test 0" for i in range(20)]
    a = dict.fromkeys(names, False) | dict.fromkeys(names[:8], True)
    b = dict.fromkeys(names, False) | dict.fromkeys(names[7:8], True)
    found = report_page.split_of(a, b | {"elsewhere": True}, mcnemar)
    assert found is not None
    assert (found.n, found.both, found.neither) == (20, 1, 12)
    assert found.only == (names[:7], [])
    assert found.p == 2 / 2**7  # seven of seven
    assert report_page.split_of(a, {}, mcnemar) is None
    by_task = {"t0": [{"exact": True}, None], "t1": [{"exact": False}], "t2": 5}
    recorded = report_page.recorded_outcomes({"by_task": by_task})
    assert recorded == {"t0, test 0": True, "t1, test 0": False}


# ---------------------------------------------------------------- the script


def test_errors_are_one_line_and_a_code(
    run: Path, copied: Path, tmp_path: Path, capsys: Any
) -> None:
    (copied / "metrics.jsonl").unlink()
    for argv, code, says in (
        ([str(tmp_path / "nothing")], 3, "no such run"),
        ([str(copied)], 3, "metrics.jsonl: cannot be read"),
        ([str(run), "--data", "no_such_data"], 3, "no such data"),
        ([str(run), "--curves", str(tmp_path)], 2, "is a folder"),
        ([str(run), "--task", "3"], 2, "Did you mean --tasks?"),
        ([str(run), str(run)], 2, "the first run again"),
        ([str(run), str(run), "--curves", str(tmp_path / "c.png")], 2, "it draws one run"),
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

    tasks = load_tasks(run_record.read_record(run).arguments["data"]).train
    some = report.sample_tasks(tasks, 3)
    assert some == report.sample_tasks(tasks, 4)[:3]
    assert report.sample_tasks(tuple(t.without_test_outputs() for t in tasks), 3) == []


def test_help_needs_neither_torch_nor_jinja() -> None:
    code = (
        "import sys, report\ntry:\n    report.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'jinja2', 'numpy'} & set(sys.modules), 'slow'"
    )
    root = Path(report.__file__).parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)
