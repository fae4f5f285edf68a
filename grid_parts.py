"""One grid taken apart: colours in canonical order, connected parts, rays, separator lines.

`take_apart(grid)` does it once for all that is made from a grid. The module makes no features and
no answers, learns nothing, and needs NumPy alone. All follows a colour permutation that keeps 0.
Use: `from grid_parts import take_apart, canonical, parts_of, rays_of, COLOURS, MAX_SIDE, OUTSIDE`.

A grid is small, so the time goes by the number of NumPy calls: what follows from the shape alone is
kept in tables, much is done for several planes at once, and short lists are left to plain Python.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.uint8]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

COLOURS = 10
OUTSIDE = 10  # plane value: no cell here
MAX_SIDE = 30
# Tables are kept for so many grid shapes: 67 kB each on average, 250 at most, 29 MB for all 434
# shapes of ARC-AGI-2's training inputs. Making them takes a fifth of what a grid takes as a whole.
KEPT_SHAPES = 512


# ---------------------------------------------------------------- canonical colours


def canonical(grid: Grid) -> tuple[Grid, Grid, Ints]:
    """Rename colours: 0 = background, then 1, 2, .. by falling count, ties by first raster place.

    Returns the renamed grid (read-only), the table back to real colours (10,), and the counts of
    the new ids. All code below works on the renamed grid, so it follows any permutation that keeps
    colour 0.
    """
    cells = grid.tobytes()
    order = sorted(set(cells), key=lambda c: (c > 0, -cells.count(c), cells.find(c)))
    back = np.zeros(COLOURS, np.uint8)
    back[: len(order)] = order
    table = bytearray(256)
    for new, old in enumerate(order):
        table[old] = new
    renamed = np.frombuffer(cells.translate(table), np.uint8).reshape(grid.shape)
    return renamed, back, np.array([cells.count(c) for c in order])


def recoloured(planes: Grid, lut: Grid) -> Grid:
    """Planes through a colour table (10,), OUTSIDE kept.

    By a byte table, as indexing took 1.5 times as long.
    """
    table = bytearray([OUTSIDE]) * 256
    table[:COLOURS] = lut.tobytes()
    mapped = bytearray(planes).translate(table)
    return np.frombuffer(mapped, np.uint8).reshape(planes.shape)


# ---------------------------------------------------------------- what follows from the shape

Table = TypeVar("Table", bound=NDArray[np.generic])


def read_only(table: Table) -> Table:
    """A table that is kept and shared, guarded against writing."""
    table.setflags(write=False)
    return table


@dataclass(frozen=True, eq=False)
class Lattice:
    """What follows from a grid's shape alone. Its n cells are counted in raster order.

    A node is a cell in one of two labellings: 0..n-1 in the first, n..2n-1 in the second.
    """

    places: Ints  # (4, n): each cell's row, row, column, column, to set beside a part's corners
    limits: Ints  # (4, 1): the grid's own corners
    pairs: Ints  # (2, pairs): neighbours, the earlier cell first; diagonal ones come first
    n_diagonal: int
    node_pairs: Ints  # (2, 2 * pairs): the same as nodes of the one labelling, then of the other
    node_row: Ints  # (2n,)
    by_col: Ints  # (2n,): the nodes in the order of their columns, and those columns
    col_by_col: Ints
    corner_codes: Ints  # (3, n): see `shape_hashes`


@lru_cache(maxsize=KEPT_SHAPES)
def lattice(rows: int, cols: int) -> Lattice:
    """The lattice of a grid's shape."""
    n = rows * cols
    index = np.arange(n).reshape(rows, cols)
    row, col = np.divmod(index.ravel(), cols)
    by_col = index.T.ravel()
    neighbours = (
        (index[:-1, 1:], index[1:, :-1]),
        (index[:-1, :-1], index[1:, 1:]),
        (index[:, :-1], index[:, 1:]),
        (index[:-1], index[1:]),
    )
    pairs = np.stack([np.concatenate([both[i].ravel() for both in neighbours]) for i in (0, 1)])
    node_pairs = read_only(np.concatenate((pairs, pairs + n), axis=1))
    return Lattice(
        places=read_only(np.stack((row, row, col, col))),
        limits=read_only(np.array([[0], [rows - 1], [0], [cols - 1]])),
        pairs=node_pairs[:, : pairs.shape[1]],
        n_diagonal=2 * (rows - 1) * (cols - 1),
        node_pairs=node_pairs,
        node_row=read_only(np.concatenate((row, row))),
        by_col=read_only(np.concatenate((by_col, by_col + n))),
        col_by_col=read_only(np.tile(col[by_col], 2)),
        corner_codes=read_only(
            np.stack((row * MAX_SIDE + col, row * MAX_SIDE - col, col - row * MAX_SIDE))
        ),
    )


# ---------------------------------------------------------------- connected components


@cache
def _shape_weights() -> NDArray[np.float64]:
    """Fixed 35-bit hash weights (900,) by 30 * relative row + relative column (splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, MAX_SIDE * MAX_SIDE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return read_only((z >> np.uint64(29)).astype(np.float64))


def _roots(n: int, low: Ints, high: Ints) -> Ints:
    """Smallest node of every node's connected component; edges low[i] < high[i] among n nodes."""
    parent = np.arange(n)
    while low.size:
        parent[high] = low  # always a smaller root: no cycles; lost edges come back
        while True:
            jumped = parent[parent]
            if jumped.tobytes() == parent.tobytes():  # a third of the time of NumPy's comparison
                break
            parent = jumped
        u, v = parent[low], parent[high]
        open_edges = u != v
        u, v = u[open_edges], v[open_edges]
        low, high = np.minimum(u, v), np.maximum(u, v)
    return parent


@dataclass(eq=False)
class Parts:
    """Components of one labelling: label per cell, then one value per component."""

    label: Ints  # (rows, cols)
    first: Ints  # flat index of the first cell
    size: Ints
    corners: Ints  # (4, parts): top, bottom, left and right, which also have names of their own
    high: Ints  # rows and columns of the bounding box
    wide: Ints
    colour: Ints  # of the first cell; 0 = background
    real: Ints  # the components that have a colour

    def __post_init__(self) -> None:
        self.top, self.bottom, self.left, self.right = self.corners


def parts_of(g: Grid) -> tuple[Parts, Parts]:
    """Same-colour components (8-connected, background 4-connected) and many-coloured objects.

    In the second labelling every background cell is a component of its own with colour 0.
    """
    rows, cols = g.shape
    shape = lattice(rows, cols)
    n = rows * cols
    flat = g.ravel()
    one, other = flat[shape.pairs]
    joined = np.empty((2, one.size), np.bool_)  # in the one labelling and in the other
    same, both = joined
    np.equal(one, other, out=same)
    np.logical_and(one, other, out=both)
    same[: shape.n_diagonal] &= both[: shape.n_diagonal]
    low, high = shape.node_pairs[:, joined.ravel().nonzero()[0]]
    root = _roots(2 * n, low, high)

    first = (root == np.arange(2 * n)).nonzero()[0]
    k = first.size
    number = np.empty(2 * n, np.int64)
    number[first] = np.arange(k)
    label = number[root]
    corners = np.empty((4, k), np.int64)
    top, bottom, left, right = corners
    top[:] = shape.node_row[first]
    bottom[label] = shape.node_row  # raster order: the last write is the lowest row
    by_col = label[shape.by_col]
    right[by_col] = shape.col_by_col
    left[by_col[::-1]] = shape.col_by_col[::-1]
    size = np.bincount(label)
    high_wide = corners[1::2] - corners[::2] + 1
    k_same = int(first.searchsorted(n))

    def cut(start: int, lowest: int, part: slice) -> Parts:
        """The labelling whose nodes begin at start, and its components at the lowest number."""
        colour = flat[first[part] - start].astype(np.int64)
        return Parts(
            label=(label[start : start + n] - lowest).reshape(rows, cols),
            first=first[part] - start,
            size=size[part],
            corners=corners[:, part],
            high=high_wide[0, part],
            wide=high_wide[1, part],
            colour=colour,
            real=colour.nonzero()[0],
        )

    return cut(0, 0, slice(k_same)), cut(n, k_same, slice(k_same, None))


# From the corners (top, bottom, left, right) to a part's share in `Lattice.corner_codes`.
_TO_CORNER_CODES = np.array(
    [[-MAX_SIDE, 0, -1, 0], [-MAX_SIDE, 0, 0, 1], [0, MAX_SIDE, -1, 0]], np.int64
)


def shape_hashes(parts: Parts, colours: Grid | None) -> tuple[Ints, Bools]:
    """Translation-free hash of every component's shape, and whether it is mirror-symmetric.

    Symmetric means left-right or top-bottom. With `colours` (rows, cols), a symmetric component's
    colours are so, too; the hash is of the shape alone.
    """
    label, k = parts.label.ravel(), parts.size.size
    # Codes are 30 * rows + columns from the top left, top right and bottom left corner.
    own = (_TO_CORNER_CODES @ parts.corners)[:, label]
    weights = _shape_weights()[lattice(*parts.label.shape).corner_codes + own]
    # float64 sums stay exact: 35 + 4 + 10 bits
    shape = np.bincount(label, weights[0], k)
    plain = shape
    if colours is not None:
        weights *= colours.ravel()
        plain = np.bincount(label, weights[0], k)
    across, down = np.bincount(label, weights[1], k), np.bincount(label, weights[2], k)
    return shape.astype(np.int64), (plain == across) | (plain == down)


def part_box(parts: Parts, i: int) -> tuple[slice, slice]:
    """The bounding box of one part, for indexing."""
    top, bottom, left, right = parts.corners[:, i].tolist()
    return slice(top, bottom + 1), slice(left, right + 1)


def colour_box(by_row: bytes, by_col: bytes, colour: int, cols: int) -> tuple[slice, slice] | None:
    """The bounding box of a colour in a grid of so many columns, for indexing; None without any.

    The grid is given as its cells by row and by column.
    """
    first = by_row.find(colour)
    if first < 0:
        return None
    rows = len(by_row) // cols
    return (
        slice(first // cols, by_row.rfind(colour) // cols + 1),
        slice(by_col.find(colour) // rows, by_col.rfind(colour) // rows + 1),
    )


def _filled_lines(cells: bytes, width: int) -> slice:
    """From the first to the last line, each of so many cells, that is not all background."""
    first = len(cells) - len(cells.lstrip(b"\0"))
    return slice(first // width, (len(cells.rstrip(b"\0")) - 1) // width + 1)


# ---------------------------------------------------------------- colours by count


def colour_counts(label: Ints, g: Grid, k: int) -> Ints:
    """Cells of every colour in every labelled part (parts, 10)."""
    return np.bincount((label * COLOURS + g).ravel(), minlength=k * COLOURS).reshape(k, COLOURS)


def rarest_colour(counts: Ints) -> Ints:
    """Rarest present filled colour of each row; 0 when there is none. Ties: overall rarer."""
    filled = counts[:, ::-1] - 1
    filled[:, -1] = 1 << 20  # background: above all that are present
    # Without a sign the -1 of an absent colour is the largest number of all.
    return COLOURS - 1 - filled.view(np.uint64).argmin(1)


def commonest_colour(counts: Ints) -> Ints:
    """Commonest filled colour of each row; 0 when there is none. Ties: overall commoner."""
    filled = counts.copy()
    filled[:, 0] = 0
    return filled.argmax(1)


# ---------------------------------------------------------------- rays


@dataclass(eq=False)
class Rays:
    """First filled colour seen from each cell, the cell itself excluded; 0 = none."""

    stack: Grid  # (8, rows, cols), all of them in this order
    up: Grid
    down: Grid
    left: Grid
    right: Grid
    up_left: Grid
    down_right: Grid
    up_right: Grid
    down_left: Grid


@lru_cache(maxsize=KEPT_SHAPES)
def _sight_lines(rows: int, cols: int) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """The lines of sight through a grid of n cells, side by side; 16 bits to keep the tables small.

    Returns cells (steps, lines): the cell that a line has passed before each step, n for none; and
    views (8, n): where in it, as a flat index, each cell looks in the directions of Rays.stack.
    """
    n = rows * cols
    row, col = np.divmod(np.arange(n), cols)
    # A number for each cell's column, row, diagonal and antidiagonal, and its step along it.
    side, slanted = rows + cols, rows + cols - 1  # lines that are straight, and of each slant
    line = np.stack((col, cols + row, side + row - col + cols - 1, side + slanted + row + col))
    step = np.stack((row, col, row, row))
    n_steps, n_lines = max(rows, cols), side + 2 * slanted
    cells = np.full((n_steps + 1, 2 * n_lines), n)
    views = np.empty((4, 2, n), np.int64)
    for way, (at, offset) in enumerate(((step, 0), (n_steps - 1 - step, n_lines))):
        cells[at + 1, line + offset] = np.arange(n)
        views[:, way] = at * (2 * n_lines) + line + offset
    return (
        read_only(cells[:-1].astype(np.int16)),
        read_only(views.reshape(8, n).astype(np.int16)),
    )


def rays_of(g: Grid) -> Rays:
    """What each cell sees in the eight directions; g (rows, cols), values 0..15."""
    cells, views = _sight_lines(*g.shape)
    padded = np.zeros(g.size + 1, np.uint8)
    padded[:-1] = g.ravel()
    seen = padded[cells]
    # The last filled value so far is the greatest one with 16 more at every step.
    nearest = np.arange(0, 16 * len(cells), 16, dtype=np.int16)[:, None] + seen
    nearest *= seen > 0
    for before, here in itertools.pairwise(nearest):  # two thirds of np.maximum.accumulate's time
        np.maximum(before, here, out=here)
    stack = (nearest.ravel()[views] & 15).astype(np.uint8).reshape(8, *g.shape)
    return Rays(stack, *stack)


# ---------------------------------------------------------------- separator lines


def segments_of(is_line: Bools) -> Ints:
    """Number of the stretch between separator lines each row or column is in; -1 on a line."""
    numbers = []
    current, inside = -1, False
    for line in is_line.tolist():
        current += not line and not inside
        inside = not line
        numbers.append(current if inside else -1)
    return np.array(numbers)


def line_counts(g: Grid) -> tuple[Ints, Ints]:
    """Cells of every colour in every row (rows, 10), and in every column (cols, 10)."""
    rows, cols = g.shape
    # As parts of a grid twice as large, the rows and then the columns.
    row, _, col, _ = lattice(rows, cols).places
    flat = g.ravel()
    label = np.concatenate((row, col + rows))
    counts = colour_counts(label, np.concatenate((flat, flat)), rows + cols)
    return counts[:rows], counts[rows:]


def separators_of(row_counts: Ints, col_counts: Ints) -> tuple[Bools, Bools]:
    """Rows and columns that are whole lines of one separator colour; none found: all False.

    Filled colours come before background; among them the one with the most lines. The counts are
    those of `line_counts`.
    """
    rows, cols = len(row_counts), len(col_counts)
    is_row, is_col = row_counts == cols, col_counts == rows  # whether a line is all of a colour
    of_rows, of_cols = is_row.nonzero()[1].tolist(), is_col.nonzero()[1].tolist()
    lines = {
        colour: of_rows.count(colour) + of_cols.count(colour)
        for colour in sorted({*of_rows, *of_cols})
        if of_rows.count(colour) < rows and of_cols.count(colour) < cols
    }
    if not lines:
        return np.zeros(rows, np.bool_), np.zeros(cols, np.bool_)
    colour = max(lines, key=lambda c: (c > 0, lines[c]))
    return is_row[:, colour], is_col[:, colour]


# ---------------------------------------------------------------- a grid taken apart


@dataclass(eq=False)
class Anatomy:
    """All that sources and features are made from, worked out once. Arrays must not be written to.

    g: (rows, cols) the grid in canonical colours; padded: with a border of background, one cell
        wide; by_row, by_col: its cells in that order; back (10,), counts: see `canonical`.
    filled: (rows, cols) where g is not background. box: bounding box of such cells, None without.
    next_rows (rows - 1, cols), next_cols (rows, cols - 1): where a cell equals the one after it.
    row_counts (rows, 10), col_counts (cols, 10): see `line_counts`.
    row_segments (rows,), col_segments (cols,): see `segments_of`.
    same, objects: see `parts_of`. object_counts (real objects, 10): cells of each colour;
        object_shades (real objects,): how many colours each has.
    sides_touched, open_part, solid, frame: (parts of `same`,) how many of the grid's borders it
        reaches; whether it reaches any; whether it is a whole rectangle; whether it has a
        rectangle's whole outline, but not all of its inside.
    holes, above_holes: the parts of `same` that are enclosed background, and for each the flat
        index of the cell above its first one.
    box_edges: uint8 (rows, cols) on top or bottom edge of its component's box + 2 * left or right.
    """

    g: Grid
    padded: Grid
    by_row: bytes
    by_col: bytes
    back: Grid
    counts: Ints
    filled: Bools
    box: tuple[slice, slice] | None
    next_rows: Bools
    next_cols: Bools
    row_counts: Ints
    col_counts: Ints
    row_segments: Ints
    col_segments: Ints
    same: Parts
    objects: Parts
    object_counts: Ints
    object_shades: Ints
    sides_touched: Ints
    open_part: Bools
    solid: Bools
    frame: Bools
    holes: Ints
    above_holes: Ints
    box_edges: Grid
    rays: Rays


def take_apart(grid: Grid) -> Anatomy:
    """The anatomy of a grid (rows, cols) of colours 0..9, 1..30 a side; neither is checked here."""
    g, back, counts = canonical(grid)
    rows, cols = g.shape
    padded = np.zeros((rows + 2, cols + 2), np.uint8)
    padded[1:-1, 1:-1] = g
    by_row, by_col = g.tobytes(), g.T.tobytes()
    filled = g > 0
    same, objects = parts_of(g)
    object_counts = colour_counts(objects.label, g, objects.size.size)[objects.real]
    shape = lattice(rows, cols)
    sides_touched = (same.corners == shape.limits).sum(0)
    holes = (sides_touched + same.colour == 0).nonzero()[0]
    solid = same.size == same.high * same.wide
    label = same.label.ravel()
    on_corners = shape.places == same.corners[:, label]
    row_edge, col_edge = (on_corners[::2] | on_corners[1::2]).view(np.uint8)
    box_edges = row_edge + 2 * col_edge
    edge_cells = np.bincount(label[box_edges > 0], minlength=same.size.size)
    row_counts, col_counts = line_counts(g)
    row_line, col_line = separators_of(row_counts, col_counts)
    return Anatomy(
        g=g,
        padded=padded,
        by_row=by_row,
        by_col=by_col,
        back=back,
        counts=counts,
        filled=filled,
        box=(_filled_lines(by_row, cols), _filled_lines(by_col, rows)) if counts.size > 1 else None,
        next_rows=g[1:] == g[:-1],
        next_cols=g[:, 1:] == g[:, :-1],
        row_counts=row_counts,
        col_counts=col_counts,
        row_segments=segments_of(row_line),
        col_segments=segments_of(col_line),
        same=same,
        objects=objects,
        object_counts=object_counts,
        object_shades=(object_counts[:, 1:] > 0).sum(1),
        sides_touched=sides_touched,
        open_part=sides_touched > 0,
        solid=solid,
        # With fewer than three rows or columns the outline is all of it.
        frame=(same.colour > 0) & ~solid & (edge_cells == 2 * (same.high + same.wide) - 4),
        holes=holes,
        above_holes=same.first[holes] - cols,
        box_edges=box_edges.reshape(rows, cols),
        rays=rays_of(g),
    )
