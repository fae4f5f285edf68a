"""What the page of report.py does in a browser: real clicks and keys in headless Chromium.

Skipped where playwright or Chromium is missing; tests/test_report.py checks what needs neither.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import report_page
from dataset_arc import Pair, Task
from grid_pictures import PALETTE
from report_page import Answer, Gallery
from run_record import Record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="pip install playwright"
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)"),
]

N_SOLVED = 14  # more than the page shows at once
RNG = np.random.default_rng(0)


def any_grid(rows: int = 6, cols: int = 7) -> Any:
    return RNG.integers(0, 10, (rows, cols)).astype(np.uint8)


def answer(name: str, *, wrong: int = 0, size: bool = True, **more: Any) -> Answer:
    """A query whose first attempt has so many wrong cells; the second one is all wrong."""
    truth = any_grid()
    pairs = tuple(Pair(any_grid(30, 30), any_grid()) for _ in range(3))
    task = Task(name, pairs, (Pair(any_grid(), truth),))
    first = truth.copy()
    first.ravel()[:wrong] = (first.ravel()[:wrong] + 1) % 10
    first = first if size else first[:, :-1]
    second = (truth + 1) % 10 if size else truth.T
    sources = [
        'hypothesis "<i>identity</i>"',
        "y" * 120,
    ]  # a long word must not widen a phone's page
    return Answer(task, 0, [first, second], sources, (second, first), 4, **more)


ANSWERS = [
    *(answer(f"solved{i:02d}") for i in range(N_SOLVED)),
    answer("nearly", wrong=3),
    answer("a<b>&wrong", wrong=20),
    answer("size", size=False),
    answer("lost", wrong=1, lost=True, refined=(any_grid(), any_grid(), True)),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with 18 queries and curves."""
    rows = [
        {"kind": "batch", "minutes": 0.1 * i, "epoch": 0, "batch": i, "loss": 2.0 - 0.01 * i,
         "exact": 0.1, "reward": 0.01, "d_acc": 0.0, "qwen_grad": 0.01, "mask_ratio": 0.2}
        for i in range(60)
    ]  # fmt: skip
    results = {"n": 18, "exact_at_1": 13, "exact_at_2": 14, "views_done": 1.5, "minutes": 7.0}
    arguments = {"data": "x" * 200, "seed": 3}
    record = Record(
        Path("arc_complete_20260101_000000"), {"arguments": arguments}, results, rows, []
    )
    found = tmp_path_factory.mktemp("page") / "report.html"
    found.write_text(report_page.render(record, Gallery(ANSWERS, "A sample.")), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def open_page(browser: Any, path: Path) -> Iterator[Any]:
    """open_page(width, scheme, ...): the page without network; a message or request fails it."""
    trouble: list[str] = []
    asked: list[str] = []
    contexts = []

    def make(width: int = 1280, scheme: str = "light", **options: Any) -> Any:
        viewport = {"width": width, "height": 844}
        context = browser.new_context(
            viewport=viewport, color_scheme=scheme, offline=True, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield make
    for context in contexts:
        context.close()
    assert trouble == []
    assert set(asked) == {path.as_uri()}


def tasks_shown(page: Any) -> list[str]:
    return page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.task)")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_off_the_right_edge(open_page: Any, width: int) -> None:
    """Breaks: a table, a word or a picture wider than a phone."""
    page = open_page(width)
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    wide = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter(one =>
             !one.closest(".scroll") && !one.closest("dialog") && !one.closest(".hidden") &&
             one.getBoundingClientRect().right > document.documentElement.clientWidth + 1
           ).map(one => one.outerHTML.slice(0, 80))"""
    )
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_filters_show_what_they_name(open_page: Any) -> None:
    page = open_page()
    assert page.inner_text("#count") == "12 of 18 shown"
    for key, names in (
        ("nearly", ["nearly", "lost"]), ("wrong", ["a<b>&wrong"]), ("size", ["size"]),
        ("lost", ["lost"]),
    ):  # fmt: skip
        page.click(f"[data-filter={key}]")
        assert tasks_shown(page) == names
        assert page.get_attribute(f"[data-filter={key}]", "aria-pressed") == "true"
        assert page.locator("[aria-pressed=true]").count() == 1
        assert page.inner_text("#count") == f"{len(names)} of {len(names)} shown"
    page.click("[data-filter=solved]")
    assert len(tasks_shown(page)) == 12
    page.click("#more")
    assert tasks_shown(page) == [f"solved{i:02d}" for i in range(N_SOLVED)]
    assert page.is_hidden("#more")


def test_sorting(open_page: Any) -> None:
    page = open_page()
    page.select_option("#sort", "worst")
    assert tasks_shown(page)[:4] == ["size", "a<b>&wrong", "nearly", "lost"]
    page.select_option("#sort", "id")
    assert tasks_shown(page)[:3] == ["a<b>&wrong", "lost", "nearly"]
    page.select_option("#sort", "best")
    page.click("#more")
    assert tasks_shown(page)[-4:] == ["lost", "nearly", "a<b>&wrong", "size"]
    page.select_option("#sort", "sample")
    assert tasks_shown(page)[0] == "solved00"


def painted(svg: str) -> Any:
    """The grid that a picture's paths paint, each cell once."""
    cols, rows = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
    grid = np.full((rows, cols), 255, np.uint8)
    for colour, path in re.findall(r'<path fill="(#\w+)" d="([^"]*)"', svg):
        for c, r, n, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path):
            cells = grid[int(r), int(c) : int(c) + int(n)]
            assert n == back
            assert (cells == 255).all()
            cells[:] = PALETTE.index(colour)
    return grid


def test_pictures_paint_every_cell_once_and_cross_the_wrong_ones(open_page: Any) -> None:
    """Breaks: transposed grids, crosses at right cells, a verdict by colour alone."""
    page = open_page()
    page.click("[data-filter=wrong]")
    some = next(a for a in ANSWERS if a.task.task_id == "a<b>&wrong")
    assert some.truth is not None
    pictures = page.eval_on_selector_all(".card svg", "all => all.map(one => one.outerHTML)")
    expected = [some.task.tests[0].input, *some.attempts, some.truth]
    for pair in some.task.demonstrations:
        assert pair.output is not None
        expected += [pair.input, pair.output]
    assert len(pictures) == len(expected)
    for picture, grid in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(painted(picture), grid)
    (crosses,) = re.findall(r'class="cross" d="([^"]*)"', pictures[1])
    at = {(int(r), int(c)) for c, r in re.findall(r"M(\d+)\.2 (\d+)\.2", crosses)}
    assert at == set(zip(*np.nonzero(some.attempts[0] != some.truth), strict=True))
    assert "cross" not in pictures[0]
    assert "cross" not in pictures[3]
    labels = page.eval_on_selector_all(".card svg", "all => all.map(x => x.ariaLabel)")
    assert labels[1] == "attempt 1, 6 x 7, 20 of 42 cells wrong (a<b>&wrong, test 0)"
    caption = page.locator(".card figcaption").nth(1).inner_text()
    assert caption.startswith("\u2717 attempt 1")
    assert page.locator(".card b, .card i").count() == 0  # texts stay texts


def test_digits_on_demand(open_page: Any) -> None:
    page = open_page()
    page.click("[data-filter=nearly]")
    assert page.locator(".card svg text").count() == 0
    page.click("#digits")
    assert page.get_attribute("#digits", "aria-pressed") == "true"
    some = next(a for a in ANSWERS if a.task.task_id == "nearly")
    told = page.locator(".card svg").nth(1).locator("text").all_text_contents()
    assert "".join(told) == "".join(map(str, some.attempts[0].ravel()))
    page.click("#digits")
    assert page.locator(".card svg text").count() == 0


def test_keys_alone_reach_everything(open_page: Any) -> None:
    page = open_page(390, "dark")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus("[data-filter=all]")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_attribute("[data-filter=solved]", "aria-pressed") == "true"
    page.focus(".card .zoom >> nth=1")
    page.keyboard.press("Enter")
    assert page.is_visible("dialog svg")
    page.keyboard.press("Escape")
    assert page.is_hidden("dialog")
    page.focus("#more")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.dataset.task") == "solved12"


def test_steps_and_refinement_open(open_page: Any) -> None:
    page = open_page()
    page.click("[data-filter=lost]")
    n = page.locator(".card svg").count()
    page.click(".card summary")
    page.wait_for_selector("text=after refinement")
    names = page.locator(".card details figcaption").all_inner_texts()
    assert [name.splitlines()[0] for name in names] == [
        "\u2717 step 1", "\u2717 step 4", "\u2717 before refinement", "\u2717 after refinement",
    ]  # fmt: skip
    assert page.locator(".card svg").count() == n + 4
    assert "Step 1 to 4: 41 cells changed: 41 mended, 0 spoilt" in page.inner_text(".card details")


def test_dark_rooms_get_a_dark_page(open_page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    dark, light = (
        sum(map(int, re.findall(r"\d+", open_page(scheme=scheme).evaluate(ground))))
        for scheme in ("dark", "light")
    )
    assert dark < 120 < 600 < light


def test_without_scripts_the_outcomes_are_told(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    words = page.inner_text("#answers")
    assert "scripts are switched off" in words
    assert re.search(r"nearly\s+0\s+nearly: 92.9% of the cells right", words)
    assert page.is_hidden("#tools")
