"""One grid taken apart: colours in canonical order, connected parts, rays, separator lines.

`take_apart(grid)` does it once for all that is made from a grid. The module makes no features and
no answers, learns nothing, and needs NumPy alone. All follows a colour permutation that keeps 0.
Use: `from grid_parts import take_apart, canonical, parts_of, rays_of, COLOURS, MAX_SIDE, OUTSIDE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.uint8]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

COLOURS = 10
OUTSIDE = 10  # plane value: no cell here
MAX_SIDE = 30


# ---------------------------------------------------------------- canonical colours


def canonical(grid: Grid) -> tuple[Grid, Grid, Ints]:
    """Rename colours: 0 = background, then 1, 2, .. by falling count, ties by first raster place.

    Returns the renamed grid, the table back to real colours (10,), and the counts of the new ids.
    All code below works on the renamed grid, so it follows any permutation that keeps colour 0.
    """
    flat = grid.ravel()
    counts = np.bincount(flat, minlength=COLOURS)
    first = np.zeros(COLOURS, np.int64)
    first[flat[::-1]] = np.arange(flat.size - 1, -1, -1)
    listed = counts.tolist()
    place_of = first.tolist()
    order = sorted(
        (c for c in range(COLOURS) if listed[c]), key=lambda c: (-listed[c], place_of[c])
    )
    if listed[0]:
        order.remove(0)
        order.insert(0, 0)
    back = np.zeros(COLOURS, np.uint8)
    back[: len(order)] = order
    table = np.zeros(COLOURS, np.uint8)
    table[order] = np.arange(len(order))
    return table[grid], back, counts[order]


def recoloured(planes: Grid, lut: Grid) -> Grid:
    """Planes through a colour table (10,), OUTSIDE kept.

    By a byte table, as indexing took 1.5 times as long.
    """
    table = bytearray([OUTSIDE]) * 256
    table[:COLOURS] = lut.tobytes()
    mapped = bytearray(planes.tobytes()).translate(table)
    return np.frombuffer(mapped, np.uint8).reshape(planes.shape)


# ---------------------------------------------------------------- connected components


@cache
def _shape_weights() -> Ints:
    """Fixed 35-bit hash weights (30, 30) by relative row and column (splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, MAX_SIDE * MAX_SIDE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(29)).astype(np.int64).reshape(MAX_SIDE, MAX_SIDE)


def _roots(n: int, u: Ints, v: Ints) -> Ints:
    """Smallest node of every node's connected component; edges u[i] - v[i] among n nodes."""
    parent = np.arange(n)
    while u.size:
        low = np.minimum(u, v)
        parent[np.maximum(u, v)] = low  # always a smaller root: no cycles; lost edges come back
        while True:
            jumped = parent[parent]
            if (jumped == parent).all():
                break
            parent = jumped
        u, v = parent[u], parent[v]
        open_edges = u != v
        u, v = u[open_edges], v[open_edges]
    return parent


@dataclass(eq=False)
class Parts:
    """Components of one labelling: label per cell, then one value per component."""

    label: Ints  # (rows, cols)
    first: Ints  # flat index of the first cell
    size: Ints
    top: Ints
    bottom: Ints
    left: Ints
    right: Ints
    colour: Ints  # of the first cell; 0 = background


def parts_of(g: Grid) -> tuple[Parts, Parts]:
    """Same-colour components (8-connected, background 4-connected) and many-coloured objects.

    In the second labelling every background cell is a component of its own with colour 0.
    """
    rows, cols = g.shape
    n = rows * cols
    index = np.arange(n).reshape(rows, cols)
    filled = g > 0
    us, vs = [], []
    for a, b, diagonal in (
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None)), False),
        ((slice(None, -1), slice(None)), (slice(1, None), slice(None)), False),
        ((slice(None, -1), slice(None, -1)), (slice(1, None), slice(1, None)), True),
        ((slice(None, -1), slice(1, None)), (slice(1, None), slice(None, -1)), True),
    ):
        same = g[a] == g[b]
        both = filled[a] & filled[b]
        if diagonal:
            same &= both
        ia, ib = index[a], index[b]
        us += [ia[same], ia[both] + n]
        vs += [ib[same], ib[both] + n]
    root = _roots(2 * n, np.concatenate(us), np.concatenate(vs))
    flat = g.ravel()
    return _summary(root[:n], flat, rows, cols), _summary(root[n:] - n, flat, rows, cols)


def _summary(root: Ints, flat: Grid, rows: int, cols: int) -> Parts:
    n = root.size
    index = np.arange(n)
    is_root = root == index
    number = np.cumsum(is_root) - 1
    label = number[root]
    first = index[is_root]
    k = first.size
    row = index // cols
    bottom = np.zeros(k, np.int64)
    bottom[label] = row  # raster order: the last write is the lowest row
    by_col = np.ascontiguousarray(label.reshape(rows, cols).T).ravel()
    col_by_col = index // rows
    right = np.zeros(k, np.int64)
    right[by_col] = col_by_col
    left = np.zeros(k, np.int64)
    left[by_col[::-1]] = col_by_col[::-1]
    return Parts(
        label=label.reshape(rows, cols),
        first=first,
        size=np.bincount(label, minlength=k),
        top=row[first],
        bottom=bottom,
        left=left,
        right=right,
        colour=flat[first].astype(np.int64),
    )


def shape_hashes(parts: Parts, weight_by: Grid | None) -> tuple[Ints, Bools]:
    """Translation-free hash of every component's shape, and whether it is mirror-symmetric.

    Symmetric means left-right or top-bottom. `weight_by` (rows, cols) adds the colours.
    """
    rows, cols = parts.label.shape
    lab = parts.label
    row = np.arange(rows)[:, None]
    col = np.arange(cols)[None, :]
    table = _shape_weights()
    dr, dc = row - parts.top[lab], col - parts.left[lab]
    ur, uc = parts.bottom[lab] - row, parts.right[lab] - col
    factor = 1 if weight_by is None else weight_by
    k = parts.size.size
    flat = lab.ravel()
    # float64 sums stay exact: 35 + 4 + 10 bits
    plain = np.bincount(flat, (table[dr, dc] * factor).ravel(), k)
    across = np.bincount(flat, (table[dr, uc] * factor).ravel(), k)
    down = np.bincount(flat, (table[ur, dc] * factor).ravel(), k)
    return plain.astype(np.int64), (plain == across) | (plain == down)


def part_box(parts: Parts, i: int) -> tuple[slice, slice]:
    """The bounding box of one part, for indexing."""
    return (
        slice(int(parts.top[i]), int(parts.bottom[i]) + 1),
        slice(int(parts.left[i]), int(parts.right[i]) + 1),
    )


def mask_box(mask: Bools) -> tuple[slice, slice] | None:
    """The bounding box of a mask (rows, cols), for indexing; None where it is empty."""
    rows = np.flatnonzero(mask.any(1))
    if rows.size == 0:
        return None
    cols = np.flatnonzero(mask.any(0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)


# ---------------------------------------------------------------- colours by count


def colour_counts(label: Ints, g: Grid, k: int) -> Ints:
    """Cells of every colour in every labelled part (parts, 10)."""
    return np.bincount((label * COLOURS + g).ravel(), minlength=k * COLOURS).reshape(k, COLOURS)


def rarest_colour(counts: Ints) -> Ints:
    """Rarest present filled colour of each row; 0 when there is none. Ties: overall rarer."""
    filled = counts[:, :0:-1]
    pick = np.where(filled > 0, filled, 1 << 20).argmin(1)
    return np.where(filled.any(1), COLOURS - 1 - pick, 0)


def commonest_colour(counts: Ints) -> Ints:
    """Commonest filled colour of each row; 0 when there is none. Ties: overall commoner."""
    filled = counts[:, 1:]
    return np.where(filled.any(1), filled.argmax(1) + 1, 0)


# ---------------------------------------------------------------- rays


@dataclass(eq=False)
class Rays:
    """First filled colour seen from each cell, the cell itself excluded; 0 = none."""

    up: Grid
    down: Grid
    left: Grid
    right: Grid
    up_left: Grid
    down_right: Grid
    up_right: Grid
    down_left: Grid


def _see(a: NDArray[np.int64]) -> tuple[Grid, Grid]:
    """First filled value above and below each cell of (rows, cols)."""
    rows = a.shape[0]
    step = np.arange(0, 16 * rows, 16)[:, None]
    filled = a > 0
    up = np.zeros(a.shape, np.int64)
    down = np.zeros(a.shape, np.int64)
    np.maximum.accumulate((step[:-1] + a[:-1]) * filled[:-1], axis=0, out=up[1:])
    np.maximum.accumulate((step[:-1] + a[:0:-1]) * filled[:0:-1], axis=0, out=down[-2::-1])
    return (up & 15).astype(np.uint8), (down & 15).astype(np.uint8)


def rays_of(g: Grid) -> Rays:
    """What each cell sees in the eight directions; g (rows, cols), values 0..15."""
    rows, cols = g.shape
    wide = rows + cols
    # One stack: columns, rows (transposed), antidiagonals and diagonals (skewed), along axis 0.
    tall = max(rows, cols)
    stack = np.zeros((tall, cols + rows + 2 * (wide - 1)), np.int64)
    stack[:rows, :cols] = g
    stack[:cols, cols : cols + rows] = g.T
    skewed = np.zeros((2, rows, wide), np.int64)
    skewed[0, :, :cols] = g
    skewed[1, :, :cols] = g[:, ::-1]
    start = cols + rows
    skew = skewed.reshape(2, -1)[:, : rows * (wide - 1)].reshape(2, rows, wide - 1)
    stack[:rows, start : start + wide - 1] = skew[0]
    stack[:rows, start + wide - 1 :] = skew[1]
    before, after = _see(stack)

    def unskew(part: Grid) -> Grid:
        buffer = np.zeros((rows * wide,), np.uint8)
        buffer[: rows * (wide - 1)] = part.ravel()
        return buffer.reshape(rows, wide)[:, :cols]

    one, two = slice(start, start + wide - 1), slice(start + wide - 1, None)
    return Rays(
        up=before[:rows, :cols],
        down=after[:rows, :cols],
        left=before[:cols, cols:start].T,
        right=after[:cols, cols:start].T,
        up_right=unskew(before[:rows, one]),
        down_left=unskew(after[:rows, one]),
        up_left=unskew(before[:rows, two])[:, ::-1],
        down_right=unskew(after[:rows, two])[:, ::-1],
    )


# ---------------------------------------------------------------- separator lines


def segments_of(is_line: Bools) -> Ints:
    """Number of the stretch between separator lines each row or column is in; -1 on a line."""
    inside = ~is_line
    starts = inside.copy()
    starts[1:] &= is_line[:-1]
    return np.where(inside, np.cumsum(starts) - 1, -1)


def separators_of(g: Grid) -> tuple[Bools, Bools]:
    """Rows and columns that are whole lines of one separator colour; none found: all False.

    Filled colours come before background; among them the one with the most lines.
    """
    rows, cols = g.shape
    row_flat, col_flat = (g == g[:, :1]).all(1), (g == g[:1]).all(0)
    row_count = np.bincount(g[row_flat, 0], minlength=COLOURS)
    col_count = np.bincount(g[0, col_flat], minlength=COLOURS)
    total = row_count + col_count
    total[(row_count == rows) | (col_count == cols)] = 0
    colour = int(total[1:].argmax()) + 1
    if total[colour] == 0:
        colour = 0
    row_line = row_flat & (g[:, 0] == colour) if total[colour] else np.zeros(rows, bool)
    col_line = col_flat & (g[0] == colour) if total[colour] else np.zeros(cols, bool)
    return row_line, col_line


# ---------------------------------------------------------------- a grid taken apart


@dataclass(frozen=True, eq=False)
class Anatomy:
    """All that sources and features are made from, worked out once. Arrays must not be written to.

    g: (rows, cols) the grid in canonical colours; back (10,), counts: as `canonical` returns them.
    box: bounding box of the filled cells, None without any.
    same, objects: see `parts_of`; object_counts (objects, 10): cells of each colour.
    open_part, frame: (parts of `same`,) whether it reaches the grid's border; whether it has a
        rectangle's whole outline, but not all of its inside.
    row_segments (rows,), col_segments (cols,): see `segments_of`.
    """

    g: Grid
    back: Grid
    counts: Ints
    box: tuple[slice, slice] | None
    same: Parts
    objects: Parts
    object_counts: Ints
    open_part: Bools
    frame: Bools
    rays: Rays
    row_segments: Ints
    col_segments: Ints


def take_apart(grid: Grid) -> Anatomy:
    """The anatomy of a grid (rows, cols) of colours 0..9, 1..30 a side; neither is checked here."""
    g, back, counts = canonical(grid)
    box = mask_box(g > 0)
    same, objects = parts_of(g)
    object_counts = colour_counts(objects.label, g, objects.size.size)
    rows, cols = g.shape
    open_part = (
        (same.top == 0) | (same.left == 0) | (same.bottom == rows - 1) | (same.right == cols - 1)
    )
    high, wide = same.bottom - same.top + 1, same.right - same.left + 1
    lab = same.label
    row, col = np.arange(rows)[:, None], np.arange(cols)[None, :]
    on_edge = (
        (row == same.top[lab])
        | (row == same.bottom[lab])
        | (col == same.left[lab])
        | (col == same.right[lab])
    )
    edge_cells = np.bincount(lab.ravel(), on_edge.ravel(), same.size.size)
    frame = (
        (same.colour > 0)
        & (high > 2)
        & (wide > 2)
        & (edge_cells == 2 * (high + wide) - 4)
        & (same.size < high * wide)
    )
    row_line, col_line = separators_of(g)
    return Anatomy(
        g=g,
        back=back,
        counts=counts,
        box=box,
        same=same,
        objects=objects,
        object_counts=object_counts,
        open_part=open_part,
        frame=frame,
        rays=rays_of(g),
        row_segments=segments_of(row_line),
        col_segments=segments_of(col_line),
    )
