"""Pictures of grids: what a terminal gets, how it fits, and the page."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid_pictures import (
    INK,
    PALETTE,
    Picture,
    answers_page,
    colours_of,
    contrast,
    in_terminal,
    svg,
)

ESCAPE = re.compile(r"\x1b\[[\d;]*m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "colours"),
    [
        (io.StringIO(), {}, 0),
        (io.StringIO(), {"COLORTERM": "truecolor"}, 0),
        (Terminal(), {}, 256),
        (Terminal(), {"TERM": "xterm-256color"}, 256),
        (Terminal(), {"COLORTERM": "truecolor"}, 1 << 24),
        (Terminal(), {"COLORTERM": "24bit"}, 1 << 24),
        (Terminal(), {"COLORTERM": "truecolor", "NO_COLOR": "1"}, 0),
        (Terminal(), {"NO_COLOR": ""}, 256),  # as no-color.org says
        (Terminal(), {"TERM": "dumb"}, 0),
    ],
)
def test_when_there_are_colours(stream: Any, environment: Any, colours: int) -> None:
    assert colours_of(stream, environment) == colours


def test_digits_with_wrong_cells_marked() -> None:
    pictures = [
        Picture("input", [[1, 2, 3]]),
        Picture("attempt 1", [[0, 1], [2, 3]], [[0, 1], [2, 4]]),
        Picture("attempt 2", [[5]], [[0, 1], [2, 4]]),
    ]
    assert in_terminal(pictures, 80) == [
        "input    attempt 1   attempt 2",
        "1 x 3    2 x 2       1 x 1",
        "         1 wrong     wrong size",
        " 1 2 3    0 1         5",
        "          2!3",
    ]
    assert pictures[1].caption == "attempt 1, 2 x 2, 1 wrong"
    assert Picture("a", [[1]], [[1]]).caption == "a, 1 x 1, right"


def test_colours_and_a_reset_at_every_row_s_end() -> None:
    """Breaks: a background that runs on over captions, marks that cannot be seen, other colours."""
    picture = Picture("a", [[0, 4], [9, 1]], [[1, 1], [9, 1]])
    for colours, backgrounds in (
        (256, ("48;5;16", "48;5;220")),
        (1 << 24, ("48;2;0;0;0", "48;2;255;220;0")),
    ):
        lines = in_terminal([picture], 80, colours)
        assert all(line.endswith("\x1b[0m") for line in lines[-2:])
        assert [ESCAPE.sub("", line) for line in lines[-2:]] == ["!!!!", "    "]
        for background in backgrounds:
            assert background in lines[-2]
        assert f"{backgrounds[0]};38;5;231m!!" in lines[-2]  # light on black
        assert f"{backgrounds[1]};38;5;16m!!" in lines[-2]  # dark on yellow


def test_ink_is_read_on_every_colour() -> None:
    """Breaks: a digit or mark that is hard to see, on the page or in a terminal."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    for value, (colour, ink) in enumerate(zip(PALETTE, INK, strict=True)):
        assert contrast(colour, ink) >= 4.5, value
        assert ink in ("#000000", "#ffffff")
        front = "38;5;16m" if ink == "#000000" else "38;5;231m"
        assert front in in_terminal([Picture("a", [[value]])], 80, 256)[-1]


_sides = st.integers(1, 30)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.tuples(_sides, _sides), min_size=1, max_size=4),
    width=st.integers(40, 200),
    colours=st.sampled_from([0, 256, 1 << 24]),
)
def test_every_cell_is_drawn_once_and_nothing_is_wider_than_the_terminal(
    shapes: Any, width: int, colours: int
) -> None:
    pictures = [
        Picture(f"attempt {i}", [[(r + c) % 10 for c in range(cols)] for r in range(rows)])
        for i, (rows, cols) in enumerate(shapes)
    ]
    lines = in_terminal(pictures, width, colours)
    assert all(len(ESCAPE.sub("", line)) <= width for line in lines)
    n_cells = sum(rows * cols for rows, cols in shapes)
    if colours:
        assert sum(line.count("[48;") for line in lines) == n_cells
    else:
        drawn = [line for line in lines if not re.search(r"[a-z]", line)]
        assert sum(len(re.findall(r"\d", line)) for line in drawn) == n_cells


def test_three_large_grids_stand_side_by_side_only_where_they_fit() -> None:
    large = [Picture("g", [[1] * 30] * 2) for _ in range(3)]
    assert len(in_terminal(large, 200)) == 2 + 2  # captions of two lines, two rows
    assert len(in_terminal(large, 100, 256)) == 2 + 2  # one column a cell
    assert len(in_terminal(large, 100)) == 3 * (2 + 2)  # digits keep their distance
    assert in_terminal([Picture("g", [[1] * 30], [[2] * 30])], 40)[-1] == "!" * 30


def test_svg_holds_every_cell_once_and_crosses_the_wrong_ones() -> None:
    picture = Picture("<a & b>", [[0, 0, 7], [7, 7, 7]], [[0, 1, 7], [7, 7, 2]])
    root = ElementTree.fromstring(svg(picture))
    assert root.get("aria-label") == "<a & b>, 2 x 3, 2 wrong"
    area = dict.fromkeys(PALETTE, 0)
    for path in root:
        for width in re.findall(r"h(\d+)v1", path.get("d") or ""):
            area[path.get("fill") or ""] += int(width)
    assert (area[PALETTE[0]], area[PALETTE[7]], sum(area.values())) == (2, 4, 6)
    crosses = [path.get("d") or "" for path in root if path.get("stroke") in ("#fff", "#000")]
    assert len(crosses) == 2
    assert all(cross.startswith("M1.2 0.2") and "M2.2 1.2" in cross for cross in crosses)
    assert "#fff" not in svg(Picture("a", [[0]], [[0]]))


def test_the_page_is_one_file_for_a_phone_too_with_all_text_escaped() -> None:
    picture = Picture("input", [[1]])
    page = answers_page("<t>", ["a < b"], [("task <x>", [picture, picture], [picture])])
    assert "<t>" not in page
    assert "<x>" not in page
    assert "a &lt; b" in page
    assert 'name="viewport"' in page
    assert page.count("<svg") == 3
    assert not re.search(r'(src|href)="|https?:', page)
    root = ElementTree.fromstring(page.split("<body>")[1].join(("<body>", "")).split("</html>")[0])
    assert [e.text for e in root.iter("h2")] == ["task <x>"]
