"""Further sources and facts for rule lists: copies side by side, lines around a cell, drawings.

A bank of BANKS gives sources and facts of one analysed grid at an output's shape, `drawn_bank`
whole grids drawn from one. Nothing here sees an output's colours. NumPy alone.
Use: `from rule_drawings import BANKS, DRAWN_SOURCES, drawn_bank`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from grid_features import CELL_FEATURE_NAMES, GridAnalysis
from grid_parts import (
    COLOURS,
    MAX_SIDE,
    OUTSIDE,
    Bools,
    Grid,
    Ints,
    Rays,
    canonical,
    commonest_colour,
    part_box,
    parts_of,
    rarest_colour,
    rays_of,
    recoloured,
)
from rule_facts import ABSENT, placed

# A bank is a function of one analysed grid and an output shape: sources uint8 (n, cells), OUTSIDE
# where there is nothing, and facts uint8 (m, cells), 0..7 or ABSENT. n, m and the names depend on
# the bank alone.

# ---------------------------------------------------------------- places: copies side by side

_TURNS: dict[str, Callable[[Grid], Grid]] = {
    "fliplr": lambda g: g[:, ::-1],
    "flipud": lambda g: g[::-1],
    "rot180": lambda g: g[::-1, ::-1],
    "transpose": lambda g: g.T,
    "rot90": lambda g: g.T[::-1],
    "rot270": lambda g: g.T[:, ::-1],
    "antitranspose": lambda g: g.T[::-1, ::-1],
}
_PLACES = (
    *(f"tile_{name}" for name in _TURNS),
    "stretched",
)
_PLACE_FACTS = (
    "copy row",
    "copy col",
    "copy row from below",
    "copy col from the right",
    "copies alternate",
    "row in copy",
    "col in copy",
    "row in copy from below",
    "col in copy from the right",
    *(f"stretched {name}" for name in CELL_FEATURE_NAMES),
    *(f"tiled {name}" for name in CELL_FEATURE_NAMES),
)


def _places(grid: Grid, analysis: GridAnalysis, shape: tuple[int, int]) -> tuple[Grid, Grid]:
    """Sources of _PLACES and facts of _PLACE_FACTS.

    Those about copies mean something where a side is a multiple of the input's.
    """
    (high, wide), (rows, cols) = grid.shape, shape
    row, col = np.divmod(np.arange(rows * cols), cols)
    sources = [
        turned[row % turned.shape[0], col % turned.shape[1]]
        for turned in (turn(grid) for turn in _TURNS.values())
    ]
    near_row, near_col = row * high // rows, col * wide // cols
    sources.append(grid[near_row, near_col])
    copy_row, copy_col = row // high, col // wide
    facts = [
        copy_row,
        copy_col,
        (rows - 1 - row) // high,
        (cols - 1 - col) // wide,
        (copy_row + copy_col) % 2,
        row % high,
        col % wide,
        high - 1 - row % high,
        wide - 1 - col % wide,
    ]
    return np.stack(sources), np.concatenate(
        (
            np.minimum(np.stack(facts), 7).astype(np.uint8),
            analysis.cells[:, near_row, near_col],
            analysis.cells[:, row % high, col % wide],
        )
    )


# ---------------------------------------------------------------- lines around a cell

_WAYS = (
    ("up", (-1, 0)),
    ("down", (1, 0)),
    ("left", (0, -1)),
    ("right", (0, 1)),
    ("up left", (-1, -1)),
    ("down right", (1, 1)),
    ("up right", (-1, 1)),
    ("down left", (1, -1)),
)
_LINE_FACTS = (
    *(f"colour {c} in the {line}" for c in range(COLOURS) for line in ("row", "col", "diagonals")),
    *(f"steps {name}" for name, _ in _WAYS),
    *(f"steps {name} odd or even" for name, _ in _WAYS),
    "ring around the nearest",
    "ring odd or even",
    "steps to the nearest",
    *(f"colour {c} beside" for c in range(COLOURS)),
    *(f"colour {c} at a corner" for c in range(COLOURS)),
    "same around",
    *(
        f"run in the {line} {name}"
        for line in ("row", "col")
        for name in ("length", "before", "behind")
    ),
    "largest square around",
    "is the largest square",
)
_LINES = ("ring_nearest", "common_around", "most_around")


def _runs(grid: Grid) -> Ints:
    """Cells of its colour in a row: in all, before and behind each cell, (3, rows, cols)."""
    cols = grid.shape[1]
    col = np.broadcast_to(np.arange(cols), grid.shape)
    starts = np.ones(grid.shape, bool)
    starts[:, 1:] = grid[:, 1:] != grid[:, :-1]
    ends = np.ones(grid.shape, bool)
    ends[:, :-1] = starts[:, 1:]
    first = np.maximum.accumulate(np.where(starts, col, 0), 1)
    last = np.minimum.accumulate(np.where(ends, col, cols)[:, ::-1], 1)[:, ::-1]
    return np.stack([last - first + 1, col - first, last - col])


def _squares(grid: Grid) -> Ints:
    """Side of the largest square of one colour around each cell."""
    rows, cols = grid.shape
    side = np.ones(grid.shape, np.int64)
    whole = np.ones(grid.shape, bool)  # a square of side k has its top left here
    for k in range(2, min(rows, cols) + 1):
        n = (rows - k + 1, cols - k + 1)
        a, b, c, d = (whole[r : r + n[0], q : q + n[1]] for r in (0, 1) for q in (0, 1))
        corner = grid[: n[0], : n[1]]
        right, below = grid[k - 1 :, : n[1]], grid[: n[0], k - 1 :]
        whole = a & b & c & d & (corner == right) & (corner == below)
        whole &= corner == grid[k - 1 :, k - 1 :]
        if not whole.any():
            break
        at_row, at_col = np.nonzero(whole)
        count = np.zeros((rows + 1, cols + 1), np.int64)
        np.add.at(count, (at_row, at_col), 1)
        np.add.at(count, (at_row + k, at_col), -1)
        np.add.at(count, (at_row, at_col + k), -1)
        np.add.at(count, (at_row + k, at_col + k), 1)
        side[count.cumsum(0).cumsum(1)[:-1, :-1] > 0] = k
    return side


def _first_beyond(filled: Bools, step: tuple[int, int]) -> Ints:
    """Steps from each cell to the next filled one that way; 0 = none."""
    rows, cols = filled.shape
    pad = np.zeros((rows + 2, cols + 2), np.int64)
    out = pad[1:-1, 1:-1]
    known = np.zeros((rows + 2, cols + 2), bool)
    known[1:-1, 1:-1] = filled
    dr, dc = step
    near = np.s_[1 + dr : rows + 1 + dr, 1 + dc : cols + 1 + dc]
    for _ in range(max(rows, cols) - 1):
        found = np.where(known[near], 1, np.where(pad[near] > 0, pad[near] + 1, 0))
        if (found == out).all():
            break
        out[:] = found
    return out


def _lines(grid: Grid, analysis: GridAnalysis, shape: tuple[int, int]) -> tuple[Grid, Grid]:
    """Sources of _LINES and facts of _LINE_FACTS.

    A colour in the row: 1 before the cell, 2 behind it, 3 both; in the col alike; in the diagonals:
    1 in the falling one, 2 in the rising one, 3 both. Never the cell itself.
    """
    rows, cols = grid.shape
    one = np.arange(COLOURS)[:, None, None] == grid  # (10, rows, cols)
    before = np.logical_or.accumulate(one, 2)
    behind = np.logical_or.accumulate(one[:, :, ::-1], 2)[:, :, ::-1]
    in_row = np.zeros(one.shape, np.uint8)
    in_row[:, :, 1:] += before[:, :, :-1]
    in_row[:, :, :-1] += np.uint8(2) * behind[:, :, 1:]
    above = np.logical_or.accumulate(one, 1)
    below = np.logical_or.accumulate(one[:, ::-1], 1)[:, ::-1]
    in_col = np.zeros(one.shape, np.uint8)
    in_col[:, 1:] += above[:, :-1]
    in_col[:, :-1] += np.uint8(2) * below[:, 1:]
    row, col = np.indices(grid.shape)
    slanted = np.zeros(one.shape, np.uint8)
    for weight, line in ((1, row - col + cols - 1), (2, row + col)):
        n = np.zeros((COLOURS, rows + cols - 1), np.int64)
        np.add.at(n, (grid, line), 1)
        slanted += (weight * (n[:, line] - one > 0)).astype(np.uint8)
    filled = grid != analysis.background
    steps = np.stack([_first_beyond(filled, step) for _, step in _WAYS])
    far = np.where(filled, 0, 99)
    for axis in (0, 1):  # city-block distance, forwards and backwards
        ramp = np.arange(grid.shape[axis]).reshape((-1, 1) if axis == 0 else (1, -1))
        ahead = np.minimum.accumulate(far - ramp, axis) + ramp
        after = np.flip(np.minimum.accumulate(np.flip(far + ramp, axis), axis), axis) - ramp
        far = np.minimum(ahead, after)
    pad = np.zeros((COLOURS, rows + 2, cols + 2), np.uint8)
    pad[:, 1:-1, 1:-1] = one
    beside = pad[:, :-2, 1:-1] + pad[:, 2:, 1:-1] + pad[:, 1:-1, :-2] + pad[:, 1:-1, 2:]
    corner = pad[:, :-2, :-2] + pad[:, 2:, 2:] + pad[:, 2:, :-2] + pad[:, :-2, 2:]
    around = beside + corner
    g, back, counts = canonical(grid)
    shades = back[: counts.size]  # the background, then the commonest first
    others = around[shades[1:]]
    commonest = np.full(grid.shape, analysis.background, np.uint8)
    if others.size:
        commonest = np.where(others.any(0), shades[1:][others.argmax(0)], commonest)
    most = shades[(around + one)[shades].argmax(0)]
    ring, nearest = _rings(g)
    square = _squares(grid)
    # Whether the largest of its colour: the largest square of a colour with more than a cell.
    best = np.zeros(COLOURS, np.int64)
    np.maximum.at(best, grid, square)
    facts = np.concatenate(
        (
            np.stack([in_row, in_col, slanted], 1).reshape(-1, rows, cols),
            np.minimum(steps, 7),
            np.where(steps > 0, 1 + steps % 2, 0),
            np.minimum(ring, 7)[None],
            np.where(ring > 0, 1 + ring % 2, 0)[None],
            np.minimum(far, 7)[None],
            beside,
            corner,
            np.minimum(np.take_along_axis(around, grid[None].astype(np.int64), 0), 7),
            np.minimum(_runs(grid), 7),
            np.minimum(_runs(grid.T).transpose(0, 2, 1), 7),
            np.minimum(square, 7)[None],
            (square == best[grid])[None],
        )
    ).astype(np.uint8)
    planes = np.stack([back[nearest], commonest, most])
    return placed(planes, shape, OUTSIDE), placed(facts, shape, ABSENT)


def _rings(g: Grid) -> tuple[Ints, Grid]:
    """King's-move distance to the nearest filled cell, 0 on it and where there is none, and its
    colour, the greater in a tie; 0 = background."""
    rows, cols = g.shape
    ring = np.zeros(g.shape, np.int64)
    nearest = g.copy()
    for k in range(1, max(rows, cols)):
        if not nearest.any() or nearest.all():
            break
        pad = np.zeros((rows + 2, cols + 2), np.uint8)
        pad[1:-1, 1:-1] = nearest
        wide = np.maximum(np.maximum(pad[:-2], pad[1:-1]), pad[2:])
        wide = np.maximum(np.maximum(wide[:, :-2], wide[:, 1:-1]), wide[:, 2:])
        new = (nearest == 0) & (wide > 0)
        ring[new] = k
        nearest[new] = wide[new]
    return ring, nearest


# ---------------------------------------------------------------- both banks

_Bank = Callable[[Grid, GridAnalysis, tuple[int, int]], tuple[Grid, Grid]]
BANKS: dict[str, tuple[tuple[str, ...], tuple[str, ...], _Bank]] = {
    "places": (_PLACES, _PLACE_FACTS, _places),
    "lines": (_LINES, _LINE_FACTS, _lines),
}


# ---------------------------------------------------------------- drawings

# Sources of "drawn". Those from "copies_" on have a size of their own.
DRAWN_SOURCES: tuple[str, ...] = (
    "span_rows",
    "span_cols",
    "span_both",
    "span_rows_over",
    "span_cols_over",
    "span_both_over",
    "lines_rows",
    "lines_cols",
    "lines_straight",
    "lines_diagonal",
    "lines_all",
    "beams_diagonal",
    "flooded_commonest",
    "flooded_rarest",
    "flooded_single",
    "hollow",
    "rings_reversed",
    "objects_symmetric",
    "objects_exchanged",
    "largest_rectangle",
    "copies_filled",
    "copies_open",
    "copies_commonest",
    "copies_commonest_filled",
    "copies_rarest",
    "copies_inverse",
    "copies_inverse_open",
)


def drawn_bank(grid: Grid) -> tuple[Grid, Grid]:
    """Planes (n, 30, 30) and sizes (n, 2), uint8, of the n DRAWN_SOURCES of one grid.

    grid (rows, cols) uint8, colours 0..9, sides 1..30. A plane holds colours, OUTSIDE beyond its
    size; a source that the grid does not give has size 0. Raises nothing for such a grid.
    """
    g, back, counts = canonical(grid)
    same, objects = parts_of(g)
    rows, cols = g.shape
    found: dict[str, Grid] = {}
    found["span_rows"], found["span_rows_over"] = _spans(g)
    found["span_cols"], found["span_cols_over"] = (plane.T for plane in _spans(g.T))
    for end in ("", "_over"):
        across, down = found["span_rows" + end], found["span_cols" + end]
        found["span_both" + end] = np.where(across != g, across, down)
    # Rays on a grid where all but single cells shine with a value that no colour has.
    single = (same.size == 1)[same.label] & (g > 0)
    rays = rays_of(np.where(single | (g == 0), g, _NO_COLOUR))
    stack = np.where(rays.stack == _NO_COLOUR, np.uint8(0), rays.stack)
    dark = Rays(stack, *stack)
    bright = rays_of(g)
    across, down = np.maximum(dark.left, dark.right), np.maximum(dark.up, dark.down)
    slanted = np.maximum.reduce((dark.up_left, dark.up_right, dark.down_left, dark.down_right))
    beams = (bright.up_left, bright.up_right, bright.down_left, bright.down_right)
    for name, ray in (
        ("lines_rows", across),
        ("lines_cols", down),
        ("lines_straight", np.maximum(across, down)),
        ("lines_diagonal", slanted),
        ("lines_all", np.maximum(np.maximum(across, down), slanted)),
        ("beams_diagonal", np.maximum.reduce(beams)),
    ):
        found[name] = np.where(g > 0, g, ray)
    near = np.zeros((2, same.size.size, COLOURS), np.int64)
    for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        for here, there in ((a, b), (b, a)):
            meets = (g[here] == 0) & (g[there] > 0)
            np.add.at(near[0], (same.label[here][meets], g[there][meets]), 1)
            meets &= single[there]
            np.add.at(near[1], (same.label[here][meets], g[there][meets]), 1)
    for name, colour in (
        ("flooded_commonest", commonest_colour(near[0])),
        ("flooded_rarest", rarest_colour(near[0])),
        ("flooded_single", commonest_colour(near[1])),
    ):
        found[name] = np.where(g > 0, g, colour[same.label])
    pad = np.full((rows + 2, cols + 2), -1, np.int64)
    pad[1:-1, 1:-1] = same.label
    middle = np.ones(g.shape, bool)
    for dr, dc in ((0, 1), (2, 1), (1, 0), (1, 2)):
        middle &= pad[dr : dr + rows, dc : dc + cols] == same.label
    found["hollow"] = np.where(middle, 0, g)
    for name in ("rings_reversed", "objects_symmetric", "objects_exchanged"):
        found[name] = g.copy()
    for i in np.flatnonzero(objects.colour)[:40].tolist():
        box = part_box(objects, i)
        own = g[box] * (objects.label[box] == i)
        full = own.copy()
        for image in (own[:, ::-1], own[::-1], own[::-1, ::-1]):
            full = np.where(full > 0, full, image)
        if own.shape[0] == own.shape[1]:
            for image in (full.T, full.T[::-1, ::-1]):
                full = np.where(full > 0, full, image)
        out = found["objects_symmetric"]
        out[box] = np.where(out[box] > 0, out[box], full)
        shades = np.flatnonzero(np.bincount(own.ravel(), minlength=COLOURS)[1:]) + 1
        lut = np.arange(COLOURS, dtype=np.uint8)
        if shades.size == 2:
            lut[shades] = shades[::-1]
            out = found["objects_exchanged"]
            out[box] = np.where(own > 0, lut[own], out[box])
        # Colours from the border inwards along the first rows, in reversed order.
        deep = (min(own.shape) + 1) // 2
        line = own[np.arange(deep), np.arange(deep)]
        line = line[np.concatenate(([True], line[1:] != line[:-1]))]
        if 1 < line.size == np.unique(line).size:
            lut = np.arange(COLOURS, dtype=np.uint8)
            lut[line] = line[::-1]
            found["rings_reversed"][box] = lut[own]
    rectangle = g.copy()
    for top, bottom, left, right in _largest_rectangles(g == 0):
        rectangle[top:bottom, left:right] = OUTSIDE
    found["largest_rectangle"] = rectangle
    if rows * rows <= MAX_SIDE and cols * cols <= MAX_SIDE:
        total = np.bincount(g.ravel(), minlength=COLOURS)
        shown = np.flatnonzero(total)
        least = shown[total[shown] == total[shown].min()]
        masks = {
            "copies_filled": g > 0,
            "copies_open": g == 0,
            "copies_commonest": g == total.argmax(),
            "copies_commonest_filled": g == 1,
        }
        if least.size == 1:
            masks["copies_rarest"] = g == least[0]
        for name, mask in masks.items():
            found[name] = np.kron(mask.astype(np.uint8), g)
        if counts.size == 2 and not (g > 1).any():
            found["copies_inverse"] = np.kron((g > 0).astype(np.uint8), 1 - g)
            found["copies_inverse_open"] = np.kron((g == 0).astype(np.uint8), 1 - g)
    planes = np.full((len(DRAWN_SOURCES), MAX_SIDE, MAX_SIDE), OUTSIDE, np.uint8)
    sizes = np.zeros((len(DRAWN_SOURCES), 2), np.uint8)
    for name, plane in found.items():
        k = DRAWN_SOURCES.index(name)
        planes[k, : plane.shape[0], : plane.shape[1]] = plane
        sizes[k] = plane.shape
    return recoloured(planes, back), sizes


_NO_COLOUR = np.uint8(15)


def _spans(g: Grid) -> tuple[Grid, Grid]:
    """In each row the cells between a colour's outermost ones in that colour: empty ones, all."""
    one = np.arange(COLOURS)[:, None, None] == g
    between = np.logical_or.accumulate(one, 2)
    between &= np.logical_or.accumulate(one[:, :, ::-1], 2)[:, :, ::-1]
    between[0] = False
    colour = np.where(between.any(0), between.argmax(0), g).astype(np.uint8)
    return np.where(g > 0, g, colour), colour


def _largest_rectangles(empty: Bools) -> list[tuple[int, int, int, int]]:
    """Every largest rectangle of empty cells as (top, bottom, left, right), ends excluded."""
    cols = empty.shape[1]
    most = 0
    found: list[tuple[int, int, int, int]] = []
    high = [0] * (cols + 1)
    for r, line in enumerate(empty.tolist()):
        for c, is_empty in enumerate(line):
            high[c] = high[c] + 1 if is_empty else 0
        stack: list[tuple[int, int]] = []  # first col and height, heights rising
        for c in range(cols + 1):
            first = c
            while stack and stack[-1][1] >= high[c]:
                first, tall = stack.pop()
                area = tall * (c - first)
                if area >= most > 0 or area > most:
                    if area > most:
                        most, found = area, []
                    found.append((r + 1 - tall, r + 1, first, c))
            if high[c]:
                stack.append((first, high[c]))
    return found
