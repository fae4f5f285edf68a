"""Grids as pictures: in a terminal, coloured or in plain characters, and on an HTML page.

Pure text in, text out; grids are anything with rows of colours 0..9 (lists or arrays). Needs the
standard library alone. `from grid_pictures import Picture, answers_page, colours_of, in_terminal`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TextIO

# The colours 0..9 as the ARC web pages show them.
PALETTE = (
    "#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00",
    "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25",
)  # fmt: skip


def _luminance(colour: str) -> float:
    """Relative luminance of #rrggbb in [0, 1], by WCAG."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    """How well one colour is read on another: 1 (not at all) to 21, by WCAG; both #rrggbb."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


# Of each colour: what a digit or mark on it is read best in, black or white.
INK = tuple(max(("#000000", "#ffffff"), key=partial(contrast, colour)) for colour in PALETTE)
PALETTE_256 = (16, 32, 203, 41, 220, 248, 199, 208, 117, 88)  # nearest of a terminal's 256
WRONG = "!"
GAP = "   "  # between pictures side by side
PICTURE_PX, CELL_PX = 160, 16  # longest side of a picture on a page, largest side of a cell

STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;margin:1rem auto;max-width:1100px;padding:0 1rem}
figure{margin:.2rem;text-align:center;font-size:12px}
svg{border:1px solid #777;display:block;margin:auto;max-width:100%}
.strip{display:flex;flex-wrap:wrap;align-items:flex-start;gap:.6rem;margin:.4rem 0}
section{border-top:1px solid #888;padding:.4rem 0}
h2{font-size:16px;margin:.2rem 0}
"""


@dataclass(frozen=True)
class Picture:
    """A grid, what it is, and, if known, what it should be: cells that differ are marked."""

    title: str
    grid: Sequence[Sequence[int]]
    truth: Sequence[Sequence[int]] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.grid), len(self.grid[0])

    @property
    def caption(self) -> str:
        """Title and size, and "right", "wrong size" or how many cells are wrong."""
        rows, cols = self.shape
        text = f"{self.title}, {rows} x {cols}"
        if self.truth is None:
            return text
        if (len(self.truth), len(self.truth[0])) != self.shape:
            return f"{text}, wrong size"
        n = len(self.wrong())
        return f"{text}, {f'{n} wrong' if n else 'right'}"

    def wrong(self) -> frozenset[tuple[int, int]]:
        """The (row, column) of the cells that are not as they should be; none of a wrong size."""
        if self.truth is None or (len(self.truth), len(self.truth[0])) != self.shape:
            return frozenset()
        rows, cols = self.shape
        return frozenset(
            (r, c) for r in range(rows) for c in range(cols) if self.grid[r][c] != self.truth[r][c]
        )


# ---------------------------------------------------------------------------------------------
# Terminal
# ---------------------------------------------------------------------------------------------


def colours_of(stream: TextIO, environment: Mapping[str, str]) -> int:
    """How many colours text on this stream may have: 0, 256 or 1 << 24. None in a file or pipe, in
    a terminal that is `dumb`, and where NO_COLOR is set to anything but nothing."""
    if not stream.isatty() or environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
        return 0
    return 1 << 24 if environment.get("COLORTERM") in ("truecolor", "24bit") else 256


def in_terminal(pictures: Sequence[Picture], width: int, colours: int = 0) -> list[str]:
    """The pictures as lines of text, side by side as far as they fit in `width` columns, each under
    its caption.

    A cell is two columns wide where its picture fits, else one. colours: as of `colours_of`; 0:
    digits. A wrong cell has a WRONG mark, beside its digit or, one column wide, in its place. Lines
    are wider than `width` only where one picture with one column a cell, or its caption, is.
    """
    widest = max(picture.shape[1] for picture in pictures)
    together = sum(picture.shape[1] for picture in pictures)
    gaps = len(GAP) * (len(pictures) - 1)
    # Digits are hard to read without space; colours may be narrow to stand side by side.
    narrow = 2 * widest > width or (colours > 0 and 2 * together + gaps > width >= together + gaps)
    lines: list[str] = []
    for row in _rows_of(pictures, width, 1 if narrow else 2):
        lines += _beside(row, width, 1 if narrow else 2, colours)
    return lines


def _rows_of(pictures: Sequence[Picture], width: int, cell: int) -> list[list[Picture]]:
    """The pictures in rows that fit."""
    rows: list[list[Picture]] = [[]]
    taken = 0
    for picture in pictures:
        needed = _column(picture, width, cell)
        if rows[-1] and taken + len(GAP) + needed > width:
            rows.append([])
        taken = needed + (taken + len(GAP) if rows[-1] else 0)
        rows[-1].append(picture)
    return rows


def _column(picture: Picture, width: int, cell: int) -> int:
    """Columns that a picture takes, its caption included."""
    longest = max(map(len, _caption_lines(picture.caption)))
    return max(cell * picture.shape[1], min(longest, width))


def _caption_lines(caption: str) -> list[str]:
    """A caption, a line for each of its parts: side by side there is little room."""
    return caption.split(", ")


def _beside(pictures: Sequence[Picture], width: int, cell: int, colours: int) -> list[str]:
    columns = [_column(picture, width, cell) for picture in pictures]
    blocks = []
    for picture in pictures:
        captions = [(text, len(text)) for text in _caption_lines(picture.caption)]
        wrong = picture.wrong()
        cells = [
            (
                "".join(
                    _cell(int(value), (r, c) in wrong, cell, colours) for c, value in enumerate(row)
                )
                + ("\x1b[0m" if colours else ""),
                cell * len(row),
            )
            for r, row in enumerate(picture.grid)
        ]
        blocks.append(captions + cells)
    # Captions of fewer parts get empty lines below, so that the grids begin side by side.
    most = max(len(_caption_lines(p.caption)) for p in pictures)
    for block, picture in zip(blocks, pictures, strict=True):
        n = len(_caption_lines(picture.caption))
        block[n:n] = [("", 0)] * (most - n)
    lines = []
    for r in range(max(map(len, blocks))):
        parts = [block[r] if r < len(block) else ("", 0) for block in blocks]
        line = GAP.join(
            text + " " * (column - length)
            for (text, length), column in zip(parts, columns, strict=True)
        )
        lines.append(line.rstrip(" "))
    return lines


def _cell(value: int, wrong: bool, cell: int, colours: int) -> str:
    if not colours and cell == 1:
        return WRONG if wrong else str(value)
    if not colours:
        return f"{WRONG if wrong else ' '}{value}"
    if colours > 256:
        red, green, blue = (int(PALETTE[value][i : i + 2], 16) for i in (1, 3, 5))
        background = f"48;2;{red};{green};{blue}"
    else:
        background = f"48;5;{PALETTE_256[value]}"
    front = "38;5;16" if INK[value] == "#000000" else "38;5;231"
    return f"\x1b[{background};{front}m{(WRONG if wrong else ' ') * cell}"


# ---------------------------------------------------------------------------------------------
# Page
# ---------------------------------------------------------------------------------------------


def svg(picture: Picture) -> str:
    """A picture as inline SVG: one path per colour, runs of cells in a row drawn as one; wrong
    cells are crossed."""
    rows, cols = picture.shape
    side = min(CELL_PX, PICTURE_PX / max(rows, cols))
    runs: dict[int, list[str]] = {}
    for r, row in enumerate(picture.grid):
        start = 0
        for c in range(1, cols + 1):
            if c == cols or row[c] != row[start]:
                path = f"M{start} {r}h{c - start}v1h{start - c}z"
                runs.setdefault(int(row[start]), []).append(path)
                start = c
    paths = "".join(
        f'<path fill="{PALETTE[k]}" d="{"".join(d)}"/>' for k, d in sorted(runs.items())
    )
    lines = "".join(f"M0 {r}h{cols}" for r in range(1, rows))
    lines += "".join(f"M{c} 0v{rows}" for c in range(1, cols))
    paths += f'<path d="{lines}" stroke="#555" stroke-width=".04" fill="none"/>'
    crosses = "".join(
        f"M{c + 0.2:g} {r + 0.2:g}l.6.6m-.6 0l.6-.6" for r, c in sorted(picture.wrong())
    )
    for colour, thick in (("#fff", ".22"), ("#000", ".1")) if crosses else ():
        paths += f'<path d="{crosses}" stroke="{colour}" stroke-width="{thick}" fill="none"/>'
    return (
        f'<svg role="img" aria-label="{html.escape(picture.caption)}" viewBox="0 0 {cols} {rows}" '
        f'width="{cols * side:.0f}" height="{rows * side:.0f}">{paths}</svg>'
    )


def _strip(pictures: Sequence[Picture]) -> str:
    """Pictures side by side, each over its caption."""
    figures = (
        f"<figure>{svg(p)}<figcaption>{html.escape(p.caption)}</figcaption></figure>"
        for p in pictures
    )
    return f'<div class="strip">{"".join(figures)}</div>'


Card = tuple[str, Sequence[Picture], Sequence[Picture]]  # heading, pictures, demonstrations


def answers_page(title: str, totals: Iterable[str], cards: Iterable[Card]) -> str:
    """A page that needs no other file: a title, lines of totals, and a card per query: a heading,
    its pictures, and the demonstrations, folded away."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>"
    ]
    parts += [f"<p>{html.escape(line)}</p>" for line in totals]
    for heading, pictures, demonstrations in cards:
        parts.append(
            f"<section><h2>{html.escape(heading)}</h2>{_strip(pictures)}<details><summary>"
            f"Demonstrations</summary>{_strip(demonstrations)}</details></section>"
        )
    parts.append("</body></html>\n")
    return "\n".join(parts)
