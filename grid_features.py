"""Analyse one ARC grid: a bank of elementary transforms, cell features and candidate output sides.

`analyse(grid)` looks at a single input grid and never at any output; `control_features` compares a
demonstration's own output with its analysis. It does not learn, choose or score anything, and needs
NumPy alone. Everything follows a colour permutation that keeps colour 0 (see `relabel`).
Use: `from grid_features import analyse, place, relabel, control_features, N_SOURCES`.
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
CELL_FEATURE_BINS = 8

# Sources that cover the whole 30 x 30 plane and hold no opinion on the output size: their row in
# `sizes` is (0, 0) although their plane is filled.
PLANE_SOURCES = (
    "tile",
    "mirror_tile",
    "mirror_tile_fliplr",
    "mirror_tile_flipud",
    "mirror_tile_rot180",
    "tile_row_blocks_flipped",
    "period_exact",
    "period_complete",
    "period_antidiagonal",
    "period_diagonal",
    "colour_rank_1",
    "colour_rank_2",
    "colour_rank_3",
    "colour_rarest",
    "colour_largest_object",
    "colour_background",
    "rank_by_row",
    "rank_by_col",
    "mosaic_period",
)
# Sources with the shape of the input.
SAME_SIZE_SOURCES = (
    "shift_up",
    "shift_down",
    "shift_left",
    "shift_right",
    "gravity_down",
    "gravity_up",
    "gravity_left",
    "gravity_right",
    "ray_up",
    "ray_down",
    "ray_left",
    "ray_right",
    "ray_up_left",
    "ray_down_right",
    "ray_up_right",
    "ray_down_left",
    "between_rows",
    "between_cols",
    "between_diagonals",
    "fill_bbox_rot180",
    "fill_best_symmetry",
    "mosaic_symmetry",
    "fill_enclosed",
    "object_majority",
    "object_minority",
    "row_common",
    "col_common",
    "row_first",
    "col_first",
    "object_bbox",
    "outline",
    "denoise_small",
    "cols_sorted",
    "component_neighbour",
    "object_template",
    "cell_overlay_everywhere",
    "cell_majority",
)
SIZED_SOURCES = (
    "fractal",
    "upscale_2",
    "upscale_3",
    "upscale_4",
    "upscale_colours",
    "upscale_sides",
    "downscale_3",
    "dedup",
    "unit_period",
    "pinwheel",
    "bbox",
    "bbox_fliplr",
    "bbox_dedup",
    "crop_largest_component",
    "crop_smallest_component",
    "crop_largest_object",
    "crop_smallest_object",
    "crop_most_coloured_object",
    "crop_odd_shape",
    "crop_symmetric_object",
    "crop_rarest",
    "crop_commonest",
    "crop_frame_interior",
    "crop_hidden_period",
    "crop_hidden_symmetry",
    "half_right",
    "half_bottom",
    "third_col_middle",
    "third_right",
    "third_row_middle",
    "third_bottom",
    "quadrant_top_right",
    "quadrant_bottom_left",
    "quadrant_bottom_right",
    "cell_fullest",
    "cell_odd",
    "cell_overlay",
    "cell_map",
)
GEOMETRIC_SOURCES = (
    "identity",
    "fliplr",
    "flipud",
    "rot180",
    "transpose",
    "rot90",
    "rot270",
    "antitranspose",
)
SOURCE_NAMES: tuple[str, ...] = (
    GEOMETRIC_SOURCES + PLANE_SOURCES + SAME_SIZE_SOURCES + SIZED_SOURCES
)
N_SOURCES = len(SOURCE_NAMES)
SOURCE_INDEX = {name: i for i, name in enumerate(SOURCE_NAMES)}

CELL_FEATURE_NAMES: tuple[str, ...] = (
    "colour_rank",  # 0 background, then by frequency
    "component_size",  # 1..6 exact, 7 = more; background by its 4-connected region
    "component_size_log",
    "component_size_rank",  # 0 background, 1 largest, 2 second, 3 third, 5 middle, 6 smallest, 7 only
    "object_size_rank",  # the same for many-coloured objects
    "component_sides_touched",  # how many grid borders the component reaches
    "enclosure",  # 0 non-background, 1 open background, 2.. enclosed by size, 6 square hole
    "same_neighbours_4",
    "filled_neighbours_8",
    "parity",
    "row_mod_3",
    "col_mod_3",
    "border_distance",
    "uniform_lines",
    "bbox_relation",
    "diagonals",
    "component_holes",
    "component_kind",  # 0 background, 1 cell, 2 row, 3 col, 4 solid, 5 frame, 6 symmetric, 7 other
    "shape_copies",
    "object_colours",
    "row_fill",
    "col_fill",
    "ray_rows",
    "ray_cols",
    "ray_diagonals",
    "cell_rank",  # of the separated cell this belongs to, 0 = on a separator or no separators
    "component_position",  # corner, edge, inside of the component's bounding box
    "half_rows",
    "half_cols",
    "colour_components",
)
N_CELL_FEATURES = len(CELL_FEATURE_NAMES)

SIZE_RULE_NAMES: tuple[str, ...] = (
    "own",
    "other",
    "own_x2",
    "own_x3",
    "own_x4",
    "own_half",
    "own_third",
    "own_plus_1",
    "own_minus_1",
    "own_plus_2",
    "own_minus_2",
    "own_x2_plus_1",
    "own_x2_minus_1",
    "own_half_down",
    "own_squared",
    "area",
    "one",
    "longer",
    "shorter",
    "colours_filled",
    "colours_all",
    "own_x_colours",
    "components",
    "objects",
    "filled_cells",
    "commonest_cells",
    "rarest_cells",
    "largest_component_cells",
    "components_commonest",
    "bbox_plus_2",
    "bbox_x2",
    "separators",
)
N_SIZE_RULES = len(SIZE_RULE_NAMES)


@dataclass(frozen=True, eq=False)
class GridAnalysis:
    """What one input grid offers. Arrays must not be written to.

    planes: uint8 (N_SOURCES, MAX_SIDE, MAX_SIDE), each source's grid at the top left, OUTSIDE
        elsewhere; an absent source is OUTSIDE throughout.
    sizes: uint8 (N_SOURCES, 2), rows and columns of each source; (0, 0) when it is absent or one
        of PLANE_SOURCES, which fill the plane and say nothing about the output size.
    cells: uint8 (N_CELL_FEATURES, rows, cols), values below CELL_FEATURE_BINS.
    size_values: uint8 (2, N_SIZE_RULES), candidate output rows and columns, 1..30, 0 = none.
    background: the colour taken as background.
    """

    planes: Grid
    sizes: Grid
    cells: Grid
    size_values: Grid
    background: int


# ---------------------------------------------------------------- canonical colours


def _canonical(grid: Grid) -> tuple[Grid, Grid, Ints]:
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
class _Parts:
    """Components of one labelling: label per cell, then one value per component."""

    label: Ints  # (rows, cols)
    first: Ints  # flat index of the first cell
    size: Ints
    top: Ints
    bottom: Ints
    left: Ints
    right: Ints
    colour: Ints  # of the first cell; 0 = background


def _parts(g: Grid) -> tuple[_Parts, _Parts]:
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


def _summary(root: Ints, flat: Grid, rows: int, cols: int) -> _Parts:
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
    return _Parts(
        label=label.reshape(rows, cols),
        first=first,
        size=np.bincount(label, minlength=k),
        top=row[first],
        bottom=bottom,
        left=left,
        right=right,
        colour=flat[first].astype(np.int64),
    )


def _hashes(parts: _Parts, weight_by: Grid | None) -> tuple[Ints, Bools]:
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


# ---------------------------------------------------------------- the bank


class _Bank:
    """Collects source grids in canonical colours."""

    def __init__(self) -> None:
        self.planes = np.full((N_SOURCES, MAX_SIDE, MAX_SIDE), OUTSIDE, np.uint8)
        self.sizes = np.zeros((N_SOURCES, 2), np.uint8)

    def put(self, name: str, grid: NDArray[np.generic]) -> None:
        """A grid with its own size; silently absent when empty or above 30 a side."""
        rows, cols = grid.shape
        if 0 < rows <= MAX_SIDE and 0 < cols <= MAX_SIDE:
            i = SOURCE_INDEX[name]
            self.planes[i, :rows, :cols] = grid
            self.sizes[i] = rows, cols

    def fill(self, name: str, plane: NDArray[np.generic] | int) -> None:
        """A whole plane without a size opinion."""
        self.planes[SOURCE_INDEX[name]] = plane


def _put_geometric(bank: _Bank, g: Grid) -> None:
    t = g.T
    for name, grid in zip(
        GEOMETRIC_SOURCES,
        (g, g[:, ::-1], g[::-1], g[::-1, ::-1], t, t[::-1], t[:, ::-1], t[::-1, ::-1]),
        strict=True,
    ):
        bank.put(name, grid)


@cache
def _fold(side: int) -> tuple[Ints, Ints]:
    """Plane index -> grid index for periodic and for mirrored tiling."""
    plain = np.arange(MAX_SIDE) % side
    mirrored = np.arange(MAX_SIDE) % (2 * side)
    return plain, np.minimum(mirrored, 2 * side - 1 - mirrored)


@cache
def _plane_axes() -> tuple[Ints, Ints]:
    line = np.arange(MAX_SIDE)
    return line[:, None], line[None, :]


def _exact_period(g: Grid) -> int:
    """Smallest p such that rows repeat every p rows (p = the number of rows if none)."""
    rows = [row.tobytes() for row in g]
    n = len(rows)
    for p in range(1, n):
        if rows[p:] == rows[:-p]:
            return p
    return n


def _loose_period(keys: Grid, fixed: Ints, moving: Ints, values: Grid, side: int) -> int:
    """Smallest p up to half the side so that no two filled cells with equal (fixed, moving % p)
    differ; the side itself when there is none. `keys` is scratch space."""
    for p in range(1, side // 2 + 1):
        where = fixed + moving % p
        keys[where] = values
        if (keys[where] == values).all():
            return p
    return side


def _completed(g: Grid) -> Grid:
    """The plane (30, 30) of the smallest two-way period that fits all filled cells; 0 = unknown."""
    rows, cols = g.shape
    at_r, at_c = np.nonzero(g)
    values = g[at_r, at_c]
    keys = np.zeros(64 * 64, np.uint8)
    row_line, col_line = _plane_axes()
    pw = _loose_period(keys, at_r * 64, at_c, values, cols)
    ph = _loose_period(keys, at_c * 64, at_r, values, rows)
    for height in (ph, rows):
        where = (at_r % height) * 64 + at_c % pw
        keys[:] = 0
        keys[where] = values
        if np.array_equal(keys[where], values):
            break
    return keys[(row_line % height) * 64 + col_line % pw]


def _put_planes(bank: _Bank, g: Grid) -> None:
    rows, cols = g.shape
    (pr, mr), (pc, mc) = _fold(rows), _fold(cols)
    tile = g[pr[:, None], pc]
    bank.fill("tile", tile)
    mirror_rows = g[mr]
    mirror = mirror_rows[:, mc]
    bank.fill("mirror_tile", mirror)
    flipped = mirror_rows[:, ::-1][:, mc]
    bank.fill("mirror_tile_fliplr", flipped)
    upside = g[::-1][mr]
    bank.fill("mirror_tile_flipud", upside[:, mc])
    bank.fill("mirror_tile_rot180", upside[:, ::-1][:, mc])
    line = np.arange(MAX_SIDE)
    odd = (line // rows) % 2 == 1
    bank.fill("tile_row_blocks_flipped", np.where(odd[:, None], g[:, ::-1][pr[:, None], pc], tile))

    ph, pw = _exact_period(g), _exact_period(np.ascontiguousarray(g.T))
    bank.fill("period_exact", g[:ph, :pw][_fold(ph)[0][:, None], _fold(pw)[0]])
    bank.put("unit_period", g[:ph, :pw])

    at_r, at_c = np.nonzero(g)
    values = g[at_r, at_c]
    keys = np.zeros(64 * 64, np.uint8)
    row_line, col_line = _plane_axes()
    bank.fill("period_complete", _completed(g))
    zero = np.zeros_like(at_r)
    for name, total, plane in (
        ("period_antidiagonal", at_r + at_c, row_line + col_line),
        ("period_diagonal", at_r - at_c + 30, row_line - col_line + 30),
    ):
        p = _loose_period(keys, zero, total, values, rows + cols)
        keys[:] = 0
        keys[total % p] = values
        bank.fill(name, keys[plane % p])


def _put_scaled(bank: _Bank, g: Grid, n_filled_colours: int) -> None:
    rows, cols = g.shape
    if rows * rows <= MAX_SIDE and cols * cols <= MAX_SIDE:
        block = np.ones((rows, cols), np.uint8)
        mask = np.kron((g > 0).astype(np.uint8), block)
        tiled = np.tile(g, (rows, cols))
        bank.put("fractal", tiled * mask)
    for name, kr, kc in (
        ("upscale_2", 2, 2),
        ("upscale_3", 3, 3),
        ("upscale_4", 4, 4),
        ("upscale_colours", n_filled_colours, n_filled_colours),
        ("upscale_sides", rows, cols),
    ):
        if kr and rows * kr <= MAX_SIDE and cols * kc <= MAX_SIDE:
            bank.put(name, g.repeat(kr, 0).repeat(kc, 1))
    if rows % 3 == 0 and cols % 3 == 0:
        bank.put("downscale_3", g[::3, ::3])
    bank.put("dedup", _dedup(g))
    if rows == cols and 2 * rows <= MAX_SIDE:
        t = g.T
        wheel = np.empty((2 * rows, 2 * rows), np.uint8)
        wheel[:rows, :rows] = g
        wheel[:rows, rows:] = t[:, ::-1]
        wheel[rows:, :rows] = t[::-1]
        wheel[rows:, rows:] = g[::-1, ::-1]
        bank.put("pinwheel", wheel)


def _dedup(g: Grid) -> Grid:
    """Collapse equal neighbouring rows, then equal neighbouring columns."""
    keep_rows = np.ones(g.shape[0], bool)
    keep_rows[1:] = (g[1:] != g[:-1]).any(1)
    g = g[keep_rows]
    keep_cols = np.ones(g.shape[1], bool)
    keep_cols[1:] = (g[:, 1:] != g[:, :-1]).any(0)
    return g[:, keep_cols]


@dataclass(eq=False)
class _Rays:
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


def _rays(g: Grid) -> _Rays:
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
    return _Rays(
        up=before[:rows, :cols],
        down=after[:rows, :cols],
        left=before[:cols, cols:start].T,
        right=after[:cols, cols:start].T,
        up_right=unskew(before[:rows, one]),
        down_left=unskew(after[:rows, one]),
        up_left=unskew(before[:rows, two])[:, ::-1],
        down_right=unskew(after[:rows, two])[:, ::-1],
    )


def _between(a: Grid, b: Grid) -> Grid:
    return a * (a == b)


def _put_shifts_and_rays(bank: _Bank, g: Grid, rays: _Rays) -> None:
    rows, cols = g.shape
    padded = np.zeros((rows + 2, cols + 2), np.uint8)
    padded[1:-1, 1:-1] = g
    bank.put("shift_up", padded[2:, 1:-1])
    bank.put("shift_down", padded[:-2, 1:-1])
    bank.put("shift_left", padded[1:-1, 2:])
    bank.put("shift_right", padded[1:-1, :-2])
    filled = g > 0
    down = np.argsort(filled, axis=0, kind="stable")
    bank.put("gravity_down", np.take_along_axis(g, down, 0))
    up = np.argsort(~filled, axis=0, kind="stable")
    bank.put("gravity_up", np.take_along_axis(g, up, 0))
    right = np.argsort(filled, axis=1, kind="stable")
    bank.put("gravity_right", np.take_along_axis(g, right, 1))
    left = np.argsort(~filled, axis=1, kind="stable")
    bank.put("gravity_left", np.take_along_axis(g, left, 1))
    bank.put("ray_up", rays.up)
    bank.put("ray_down", rays.down)
    bank.put("ray_left", rays.left)
    bank.put("ray_right", rays.right)
    bank.put("ray_up_left", rays.up_left)
    bank.put("ray_down_right", rays.down_right)
    bank.put("ray_up_right", rays.up_right)
    bank.put("ray_down_left", rays.down_left)
    bank.put("between_rows", np.where(filled, g, _between(rays.left, rays.right)))
    bank.put("between_cols", np.where(filled, g, _between(rays.up, rays.down)))
    slanted = np.maximum(
        _between(rays.up_left, rays.down_right), _between(rays.up_right, rays.down_left)
    )
    bank.put("between_diagonals", np.where(filled, g, slanted))


def _best_axis(g: Grid) -> int:
    """Doubled centre column of the mirror axis with the best agreement.

    The score is the number of compared cells minus three times the disagreeing ones; cells that
    are background on either side are not compared. Only axes in the middle half are tried; ties
    go to the one nearest the middle, cols - 1.
    """
    cols = g.shape[1]
    tried, mirrored = _axes(cols)
    padded = np.zeros((g.shape[0], cols + 1), np.uint8)
    padded[:, :cols] = g
    image = padded[:, mirrored]  # (rows, axes, cols), 0 where the mirror image lies outside
    filled = g > 0
    here = filled[:, None]
    # Every pair of columns is met twice, the axis itself once, where it agrees with itself.
    both = np.count_nonzero(here & (image > 0), axis=(0, 2))
    right = np.count_nonzero(here & (image == g[:, None]), axis=(0, 2))
    on_axis = np.where(tried % 2 == 0, filled.sum(0)[tried // 2], 0)
    score = 3 * (right - on_axis) - 2 * (both - on_axis)
    if score.max() < -1:
        return cols - 1
    return int(tried[np.lexsort((np.abs(tried - cols + 1), -score))[0]])


@cache
def _axes(cols: int) -> tuple[Ints, Ints]:
    """Doubled centre columns in the middle half (axes,), and for each the column of every column's
    mirror image (axes, cols), `cols` where there is none."""
    tried = np.arange(cols // 2, cols - 1 + (cols + 1) // 2)
    mirrored = tried[:, None] - np.arange(cols)
    return tried, np.where((mirrored >= 0) & (mirrored < cols), mirrored, cols)


def _reflect(g: Grid, s: int) -> Grid:
    """Mirror columns about s / 2; 0 where the mirror image lies outside."""
    cols = g.shape[1]
    out = np.zeros_like(g)
    low, high = max(0, s - cols + 1), min(cols - 1, s)
    out[:, low : high + 1] = g[:, low : high + 1][:, ::-1]
    return out


def _symmetric(g: Grid) -> Grid:
    """Fill background cells from the mirror image about the best column and row axes."""
    out = g + _reflect(g, _best_axis(g)) * (g == 0)
    t = out.T
    t = t + _reflect(t, _best_axis(t)) * (t == 0)
    out = t.T
    if g.shape[0] == g.shape[1]:
        out = out + t * (out == 0)
    return out


def _put_symmetric(bank: _Bank, g: Grid, box: tuple[slice, slice] | None) -> None:
    """Own colour where filled, else a mirror image's."""
    if box is not None:
        whole = g.copy()
        inner = whole[box]
        inner += g[box][::-1, ::-1] * (inner == 0)
        bank.put("fill_bbox_rot180", whole)
    bank.put("fill_best_symmetry", _symmetric(g))


def _put_mosaic(bank: _Bank, g: Grid, n_ids: int, same: _Parts) -> None:
    """Patterns with a covered part: one colour, background or not, seen as solid patches only.

    Absent unless the grid has four colours and some colour's components are all solid rectangles
    of at least 2 x 2; the one with the most cells is taken as the cover.
    """
    if n_ids < 4:
        return
    high, wide = same.bottom - same.top + 1, same.right - same.left + 1
    solid = (high * wide == same.size) & (high > 1) & (wide > 1)
    loose = np.bincount(same.colour, ~solid, n_ids)
    cells = np.bincount(same.colour, same.size, n_ids) * (loose == 0)
    cover = int(cells.argmax())
    if cells[cover] == 0:
        return
    hidden = g == cover
    work = (g + np.uint8(1)) * ~hidden
    box = _mask_box(hidden)
    plane = _completed(work)
    plane = np.where(plane == 0, np.uint8(cover), plane - np.uint8(1))
    bank.fill("mosaic_period", plane)
    mirrored = _symmetric(work)
    mirrored = np.where(mirrored == 0, np.uint8(cover), mirrored - np.uint8(1))
    bank.put("mosaic_symmetry", mirrored)
    if box is not None:
        bank.put("crop_hidden_period", plane[box])
        bank.put("crop_hidden_symmetry", mirrored[box])


def _colour_counts(label: Ints, g: Grid, k: int) -> Ints:
    """Cells of every colour in every labelled part (parts, 10)."""
    return np.bincount((label * COLOURS + g).ravel(), minlength=k * COLOURS).reshape(k, COLOURS)


def _least(counts: Ints) -> Ints:
    """Rarest present filled colour of each row; 0 when there is none. Ties: overall rarer."""
    filled = counts[:, :0:-1]
    pick = np.where(filled > 0, filled, 1 << 20).argmin(1)
    return np.where(filled.any(1), COLOURS - 1 - pick, 0)


def _most(counts: Ints) -> Ints:
    """Commonest filled colour of each row; 0 when there is none. Ties: overall commoner."""
    filled = counts[:, 1:]
    return np.where(filled.any(1), filled.argmax(1) + 1, 0)


def _put_objects(
    bank: _Bank, g: Grid, same: _Parts, objects: _Parts, object_counts: Ints, open_part: Bools
) -> None:
    """Sources with one colour per component, object, row or column."""
    rows, cols = g.shape
    # An enclosed background region takes the colour above its first cell.
    colour = same.colour.copy()
    holes = np.flatnonzero((same.colour == 0) & ~open_part)
    colour[holes] = g.ravel()[same.first[holes] - cols]
    bank.put("fill_enclosed", colour[same.label])
    bank.put("object_majority", _most(object_counts)[objects.label])
    bank.put("object_minority", _least(object_counts)[objects.label])
    bank.put("denoise_small", g * (same.size[same.label] > 1))

    line = np.arange(max(rows, cols))
    by_row = _most(_colour_counts(np.broadcast_to(line[:rows, None], g.shape), g, rows))
    by_col = _most(_colour_counts(np.broadcast_to(line[None, :cols], g.shape), g, cols))
    bank.put("row_common", np.broadcast_to(by_row[:, None], g.shape))
    bank.put("col_common", np.broadcast_to(by_col[None, :], g.shape))
    filled = g > 0
    row_first = g[line[:rows], filled.argmax(1)]
    col_first = g[filled.argmax(0), line[:cols]]
    bank.put("row_first", np.broadcast_to(row_first[:, None], g.shape))
    bank.put("col_first", np.broadcast_to(col_first[None, :], g.shape))
    bank.put("cols_sorted", g[:, np.argsort(filled.sum(0), kind="stable")])

    padded = np.zeros((rows + 2, cols + 2), np.uint8)
    padded[1:-1, 1:-1] = g
    across = np.maximum(np.maximum(padded[:, :-2], padded[:, 2:]), padded[:, 1:-1])
    near = np.maximum(np.maximum(across[:-2], across[2:]), across[1:-1])
    bank.put("outline", np.where(filled, g, near))

    # The commonest other filled colour that touches each component or background region.
    near_counts = np.zeros(same.size.size * COLOURS, np.int64)
    for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = (slice(0, rows - dr), slice(max(0, -dc), cols - max(0, dc)))
        b = (slice(dr, rows), slice(max(0, dc), cols - max(0, -dc)))
        ga, gb = g[a], g[b]
        differ = ga != gb
        near_counts += np.bincount(
            np.concatenate(
                ((same.label[a] * COLOURS + gb)[differ], (same.label[b] * COLOURS + ga)[differ])
            ),
            minlength=near_counts.size,
        )
    touching = _most(near_counts.reshape(-1, COLOURS))
    bank.put("component_neighbour", touching[same.label])

    # Larger components first, so that smaller ones stay visible on top.
    boxed = g.copy()
    real = np.flatnonzero((same.colour > 0) & (same.size > 2))
    for i in real[np.argsort(-same.size[real], kind="stable")].tolist():
        area = boxed[same.top[i] : same.bottom[i] + 1, same.left[i] : same.right[i] + 1]
        area[area == 0] = same.colour[i]
    bank.put("object_bbox", boxed)


def _box(parts: _Parts, i: int) -> tuple[slice, slice]:
    return (
        slice(int(parts.top[i]), int(parts.bottom[i]) + 1),
        slice(int(parts.left[i]), int(parts.right[i]) + 1),
    )


def _mask_box(mask: Bools) -> tuple[slice, slice] | None:
    rows = np.flatnonzero(mask.any(1))
    if rows.size == 0:
        return None
    cols = np.flatnonzero(mask.any(0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)


def _put_crops(
    bank: _Bank,
    g: Grid,
    n_ids: int,
    box: tuple[slice, slice] | None,
    same: _Parts,
    objects: _Parts,
    object_counts: Ints,
    solid_frame: Bools,
) -> None:
    if box is None:
        return
    inner = g[box]
    bank.put("bbox", inner)
    bank.put("bbox_fliplr", inner[:, ::-1])
    bank.put("bbox_dedup", _dedup(inner))
    real = np.flatnonzero(same.colour)
    sizes = same.size[real]
    bank.put("crop_largest_component", g[_box(same, real[sizes.argmax()])])
    bank.put("crop_smallest_component", g[_box(same, real[sizes.argmin()])])
    real = np.flatnonzero(objects.colour)
    sizes = objects.size[real]
    bank.put("crop_largest_object", g[_box(objects, real[sizes.argmax()])])
    bank.put("crop_smallest_object", g[_box(objects, real[sizes.argmin()])])
    shades = (object_counts[real, 1:] > 0).sum(1)
    rank = shades * 1024 + sizes
    model = real[rank.argmax()]
    template = g[_box(objects, model)]
    bank.put("crop_most_coloured_object", template)
    # Objects with a bounding box of the same size take the most coloured object's cells.
    like = real[
        (objects.bottom[real] - objects.top[real] == objects.bottom[model] - objects.top[model])
        & (objects.right[real] - objects.left[real] == objects.right[model] - objects.left[model])
    ]
    copies_of = g.copy()
    for i in like.tolist():
        copies_of[_box(objects, i)] = template
    bank.put("object_template", copies_of)
    shape, _ = _hashes(objects, None)
    _, mirrored = _hashes(objects, g)
    kinds, copies = np.unique(shape[real], return_counts=True)
    if (copies == 1).sum() == 1 and kinds.size > 1:
        i = real[shape[real] == kinds[copies == 1][0]][0]
        bank.put("crop_odd_shape", g[_box(objects, i)])
    chosen = real[mirrored[real]]
    if chosen.size == 1 or (chosen.size and real.size > chosen.size):
        bank.put("crop_symmetric_object", g[_box(objects, chosen[objects.size[chosen].argmax()])])
    rare = _mask_box(g == n_ids - 1)
    if rare is not None:
        bank.put("crop_rarest", g[rare])
    common = _mask_box(g == 1)
    if common is not None:
        bank.put("crop_commonest", g[common])
    frames = np.flatnonzero(solid_frame)
    if frames.size:
        area = (same.bottom - same.top) * (same.right - same.left)
        bank.put("crop_frame_interior", g[_box(same, frames[area[frames].argmax()])][1:-1, 1:-1])


def _split(g: Grid, parts: int) -> list[Grid]:
    """Column blocks of equal width, with or without one-colour separator columns between them."""
    cols = g.shape[1]
    width, rest = divmod(cols, parts)
    if width and rest == 0:
        return [g[:, i * width : (i + 1) * width] for i in range(parts)]
    width, rest = divmod(cols - parts + 1, parts)
    if width > 0 and rest == 0:
        lines = g[:, width :: width + 1]
        if (lines == lines[0, 0]).all():
            return [g[:, i * (width + 1) : i * (width + 1) + width] for i in range(parts)]
    return []


def _put_blocks(bank: _Bank, g: Grid) -> None:
    """Halves, thirds and quadrants, without the first ones: those are the identity, cropped."""
    halves, levels = _split(g, 2), _split(g.T, 2)
    columns, storeys = _split(g, 3), _split(g.T, 3)
    if halves:
        bank.put("half_right", halves[1])
    if levels:
        bank.put("half_bottom", levels[1].T)
    if columns:
        bank.put("third_col_middle", columns[1])
        bank.put("third_right", columns[2])
    if storeys:
        bank.put("third_row_middle", storeys[1].T)
        bank.put("third_bottom", storeys[2].T)
    if halves and levels:
        rows, cols = levels[0].shape[1], halves[0].shape[1]
        bank.put("quadrant_top_right", g[:rows, -cols:])
        bank.put("quadrant_bottom_left", g[-rows:, :cols])
        bank.put("quadrant_bottom_right", g[-rows:, -cols:])


def _segments(is_line: Bools) -> Ints:
    """Number of the stretch between separator lines each row or column is in; -1 on a line."""
    inside = ~is_line
    starts = inside.copy()
    starts[1:] &= is_line[:-1]
    return np.where(inside, np.cumsum(starts) - 1, -1)


def _separators(g: Grid) -> tuple[Bools, Bools]:
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


def _put_cells(bank: _Bank, g: Grid) -> tuple[Ints, Ints, Ints]:
    """Sources from a grid cut by separator lines; also returns a rank for every cell.

    Returns (rank (rows, cols): 0 outside cells, 1 fullest, 2 emptiest, 3 other; row and column
    stretch numbers).
    """
    row_line, col_line = _separators(g)
    seg_r, seg_c = _segments(row_line), _segments(col_line)
    n_r, n_c = int(seg_r.max()) + 1, int(seg_c.max()) + 1
    rank = np.zeros(g.shape, np.int64)
    if n_r * n_c < 2:
        return rank, seg_r, seg_c
    inside_r, inside_c = np.flatnonzero(seg_r >= 0), np.flatnonzero(seg_c >= 0)
    content = g[inside_r[:, None], inside_c]
    label = seg_r[inside_r][:, None] * n_c + seg_c[inside_c]
    counts = _colour_counts(label, content, n_r * n_c)
    filled = counts[:, 1:].sum(1)
    bank.put("cell_map", _most(counts).reshape(n_r, n_c))
    window = (inside_r[:, None], inside_c)
    majority = g.copy()
    majority[window] = _most(counts)[label]
    bank.put("cell_majority", majority)
    of_cell = np.where(filled == filled.max(), 1, np.where(filled == filled.min(), 2, 3))
    rank[window] = of_cell[label]
    high, low = inside_r.size // n_r, inside_c.size // n_c
    even = (np.bincount(seg_r[inside_r]) == high).all() and (
        np.bincount(seg_c[inside_c]) == low
    ).all()
    if even:
        cells = content.reshape(n_r, high, n_c, low).transpose(0, 2, 1, 3).reshape(-1, high, low)
        bank.put("cell_fullest", cells[filled.argmax()])
        seen = [cell.tobytes() for cell in cells]
        odd = [i for i, key in enumerate(seen) if seen.count(key) == 1]
        if len(odd) == 1:
            bank.put("cell_odd", cells[odd[0]])
        overlay = cells[0]
        for cell in cells[1:]:
            overlay = overlay + cell * (overlay == 0)
        bank.put("cell_overlay", overlay)
        everywhere = g.copy()
        everywhere[window] = np.tile(overlay, (n_r, n_c))
        bank.put("cell_overlay_everywhere", everywhere)
    return rank, seg_r, seg_c


# ---------------------------------------------------------------- cell features


def _size_ranks(size: Ints, real: Bools) -> Ints:
    """0 not real, 1 largest, 2 second, 3 third, 5 middle, 6 smallest, 7 all alike (by size)."""
    out = np.zeros(size.size, np.int64)
    levels = np.unique(size[real])
    if levels.size == 1:
        out[real] = 7
    elif levels.size:
        from_top = levels.size - 1 - np.searchsorted(levels, size[real])
        grade = np.where(from_top < 3, from_top + 1, 5)
        out[real] = np.where(from_top == levels.size - 1, 6, grade)
    return out


def _cell_features(
    g: Grid,
    same: _Parts,
    objects: _Parts,
    object_counts: Ints,
    open_part: Bools,
    solid_frame: Bools,
    rays: _Rays,
    box: tuple[slice, slice] | None,
    cell_rank: Ints,
) -> Grid:
    rows, cols = g.shape
    out = np.zeros((N_CELL_FEATURES, rows, cols), np.uint8)
    filled = g > 0
    lab = same.label
    part_real = same.colour > 0
    row = np.arange(rows)[:, None]
    col = np.arange(cols)[None, :]
    high, wide = same.bottom - same.top + 1, same.right - same.left + 1
    size = same.size
    k = size.size
    out[0] = np.minimum(g, 7)
    per_part = np.zeros((k, 8), np.uint8)  # features 1, 2, 3, 5, 6, 16, 17, 18, gathered once
    per_part[:, 0] = np.minimum(size, 7)
    per_part[:, 1] = np.minimum(np.log2(size), 7)
    per_part[:, 2] = _size_ranks(size, part_real)
    out[4] = _size_ranks(objects.size, objects.colour > 0)[objects.label]
    per_part[:, 3] = (
        (same.top == 0).astype(np.uint8)
        + (same.left == 0)
        + (same.bottom == rows - 1)
        + (same.right == cols - 1)
    )
    hole_kind = 2 + (size > 1).astype(np.int64) + (size > 4) + (size > 9)
    hole_kind = np.where((high == wide) & (high * wide == size) & (size > 1), 6, hole_kind)
    per_part[:, 4] = np.where(part_real, 0, np.where(open_part, 1, hole_kind))
    pad = np.full((rows + 2, cols + 2), OUTSIDE, np.uint8)
    pad[1:-1, 1:-1] = g
    four = (pad[:-2, 1:-1] == g).astype(np.uint8)
    four += pad[2:, 1:-1] == g
    four += pad[1:-1, :-2] == g
    four += pad[1:-1, 2:] == g
    out[7] = four
    solid = np.zeros((rows + 2, cols + 2), np.uint8)
    solid[1:-1, 1:-1] = filled
    eight = solid[:, :-2] + solid[:, 1:-1] + solid[:, 2:]
    eight = eight[:-2] + eight[1:-1] + eight[2:] - solid[1:-1, 1:-1]
    out[8] = np.minimum(eight, 7)
    out[9] = row % 2 + 2 * (col % 2)
    out[10] = row % 3
    out[11] = col % 3
    out[12] = np.minimum(
        np.minimum(np.minimum(row, rows - 1 - row), np.minimum(col, cols - 1 - col)), 7
    )
    out[13] = (g == g[:, :1]).all(1)[:, None] + 2 * (g == g[:1]).all(0)[None, :]
    if box is not None:
        out[14][box] = 2
        out[14][box][1:-1, 1:-1] = 1
    out[15] = (row == col) + 2 * (row + col == cols - 1) + 4 * (row == rows - 1 - col)
    holes = np.flatnonzero(~part_real & ~open_part)
    owner = lab.ravel()[same.first[holes] - cols]
    n_holes = np.bincount(owner, minlength=k)
    per_part[:, 5] = np.minimum(n_holes, 7)
    shape, mirrored = _hashes(same, None)
    kind = np.where(mirrored, 6, 7)
    kind[solid_frame] = 5
    kind[high * wide == size] = 4
    kind[(wide == 1) & (high == size)] = 3
    kind[(high == 1) & (wide == size)] = 2
    kind[size == 1] = 1
    kind[~part_real] = 0
    per_part[:, 6] = kind
    _, which, copies = np.unique(shape[part_real], return_inverse=True, return_counts=True)
    per_part[part_real, 7] = np.minimum(copies, 7)[which]
    out[[1, 2, 3, 5, 6, 16, 17, 18]] = per_part.T[:, lab]
    shades = (object_counts[:, 1:] > 0).sum(1)
    out[19] = np.minimum(shades, 7)[objects.label]
    for at, axis in ((20, 1), (21, 0)):
        n = filled.sum(axis)
        grade = np.where(n == 0, 0, 3)
        if n.any():
            grade = np.where(n == n[n > 0].min(), 1, grade)
            grade = np.where(n == n.max(), 2, grade)
        out[at] = np.expand_dims(grade, axis)
    for at, a, b in ((22, rays.left, rays.right), (23, rays.up, rays.down)):
        hits = (a > 0) + 2 * (b > 0).astype(np.uint8)
        out[at] = hits + ((hits == 3) & (a == b))
    out[24] = (
        (rays.up_left > 0).astype(np.uint8)
        + (rays.up_right > 0)
        + (rays.down_left > 0)
        + (rays.down_right > 0)
    )
    out[25] = cell_rank
    edge_r = (row == same.top[lab]) | (row == same.bottom[lab])
    edge_c = (col == same.left[lab]) | (col == same.right[lab])
    out[26] = edge_r.astype(np.uint8) + 2 * edge_c
    out[27] = 1 + np.sign(2 * row - rows + 1)
    out[28] = 1 + np.sign(2 * col - cols + 1)
    per_colour = np.bincount(same.colour, minlength=COLOURS)
    out[29] = np.minimum(per_colour, 7)[g]
    return out


# ---------------------------------------------------------------- sizes


def _size_values(
    g: Grid,
    counts: Ints,
    same: _Parts,
    objects: _Parts,
    box: tuple[slice, slice] | None,
    segments: tuple[Ints, Ints],
) -> Grid:
    real = same.colour > 0
    per_colour = np.bincount(same.colour[real], minlength=COLOURS)
    filled_colours = counts.size - 1
    n_parts, n_objects = int(real.sum()), int((objects.colour > 0).sum())
    n_filled = int(counts[1:].sum())
    commonest = int(counts[1]) if filled_colours else 0
    rarest = int(counts[-1]) if filled_colours else 0
    largest = int(same.size[real].max()) if n_parts else 0
    values = np.zeros((2, N_SIZE_RULES), np.uint8)
    for axis in (0, 1):
        own, other = g.shape[axis], g.shape[1 - axis]
        side = 0 if box is None else box[axis].stop - box[axis].start
        cuts = int((segments[axis] < 0).sum())
        row = (
            own,
            other,
            own * 2,
            own * 3,
            own * 4,
            own // 2 if own % 2 == 0 else 0,
            own // 3 if own % 3 == 0 else 0,
            own + 1,
            own - 1,
            own + 2,
            own - 2,
            own * 2 + 1,
            own * 2 - 1,
            (own - 1) // 2,
            own * own,
            own * other,
            1,
            max(own, other),
            min(own, other),
            filled_colours,
            filled_colours + 1,
            own * filled_colours,
            n_parts,
            n_objects,
            n_filled,
            commonest,
            rarest,
            largest,
            int(per_colour[1]),
            side + 2 if side else 0,
            side * 2,
            cuts,
        )
        values[axis] = [v if 0 < v <= MAX_SIDE else 0 for v in row]
    return values


# ---------------------------------------------------------------- public functions


def _recoloured(planes: Grid, lut: Grid) -> Grid:
    """Planes through a colour table (10,), OUTSIDE kept; a byte table, as indexing took 1.5 times as long."""
    table = bytearray([OUTSIDE]) * 256
    table[:COLOURS] = lut.tobytes()
    mapped = bytearray(planes.tobytes()).translate(table)
    return np.frombuffer(mapped, np.uint8).reshape(planes.shape)


def analyse(grid: NDArray[np.integer]) -> GridAnalysis:
    """Analyse one input grid (rows, cols), 1..30 a side, colours 0..9.

    Pure and deterministic. Background is colour 0 where present, else the commonest colour; ties
    go to the colour that comes first in raster order, never to a colour number.
    Raises ValueError for a wrong shape or colour.
    """
    return _analysed(grid, planes_only=False)


def analyse_planes(grid: NDArray[np.integer]) -> tuple[Grid, Grid]:
    """`planes` and `sizes` of analyse(grid) alone, in about three quarters of its time."""
    found = _analysed(grid, planes_only=True)
    return found.planes, found.sizes


def _analysed(grid: NDArray[np.integer], planes_only: bool) -> GridAnalysis:
    raw = np.asarray(grid)
    if raw.ndim != 2 or not 0 < raw.shape[0] <= MAX_SIDE or not 0 < raw.shape[1] <= MAX_SIDE:
        raise ValueError(f"grid shape {raw.shape}: expected (rows, cols) with 1..{MAX_SIDE} each")
    if raw.min() < 0 or raw.max() >= COLOURS:
        raise ValueError(f"grid colours {raw.min()}..{raw.max()}: expected 0..{COLOURS - 1}")
    g, back, counts = _canonical(raw.astype(np.uint8))
    n_ids = counts.size
    bank = _Bank()
    box = _mask_box(g > 0)
    same, objects = _parts(g)
    object_counts = _colour_counts(objects.label, g, objects.size.size)
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
    rays = _rays(g)

    _put_geometric(bank, g)
    _put_planes(bank, g)
    last = n_ids - 1
    bank.fill("colour_background", 0)
    bank.fill("colour_rank_1", min(1, last))
    bank.fill("colour_rank_2", min(2, last))
    bank.fill("colour_rank_3", min(3, last))
    bank.fill("colour_rarest", last)
    real = np.flatnonzero(same.colour)
    bank.fill(
        "colour_largest_object",
        int(same.colour[real[same.size[real].argmax()]]) if real.size else 0,
    )
    _put_scaled(bank, g, last)
    _put_shifts_and_rays(bank, g, rays)
    _put_symmetric(bank, g, box)
    _put_mosaic(bank, g, n_ids, same)
    ranks = np.minimum(np.arange(1, MAX_SIDE + 1), n_ids) % n_ids
    bank.fill("rank_by_row", ranks[:, None])
    bank.fill("rank_by_col", ranks[None, :])
    _put_objects(bank, g, same, objects, object_counts, open_part)
    _put_crops(bank, g, n_ids, box, same, objects, object_counts, frame)
    _put_blocks(bank, g)
    cell_rank, seg_r, seg_c = _put_cells(bank, g)

    if planes_only:
        nothing = np.zeros((0, 0, 0), np.uint8)
        return GridAnalysis(
            planes=_recoloured(bank.planes, back),
            sizes=bank.sizes,
            cells=nothing,
            size_values=np.zeros((2, 0), np.uint8),
            background=int(back[0]),
        )
    return GridAnalysis(
        planes=_recoloured(bank.planes, back),
        sizes=bank.sizes,
        cells=_cell_features(
            g, same, objects, object_counts, open_part, frame, rays, box, cell_rank
        ),
        size_values=_size_values(g, counts, same, objects, box, (seg_r, seg_c)),
        background=int(back[0]),
    )


def relabel(analysis: GridAnalysis, lut: NDArray[np.integer]) -> GridAnalysis:
    """The analysis of the recoloured grid: equals `analyse(lut[grid])`.

    lut: (10,) a permutation of 0..9 with lut[0] == 0. Raises ValueError otherwise.
    """
    lut = np.asarray(lut)
    if lut.shape != (COLOURS,) or lut[0] != 0 or sorted(lut.tolist()) != list(range(COLOURS)):
        raise ValueError(f"lut {lut.tolist()}: expected a permutation of 0..9 that keeps 0")
    return GridAnalysis(
        planes=_recoloured(analysis.planes, lut.astype(np.uint8)),
        sizes=analysis.sizes,
        cells=analysis.cells,
        size_values=analysis.size_values,
        background=int(lut[analysis.background]),
    )


def place(planes: Grid, canvas: tuple[int, int], outside: int = OUTSIDE) -> Grid:
    """Planes (.., rows, cols) cropped to, or padded with `outside` up to, canvas (rows, cols)."""
    rows, cols = canvas
    cut = planes[..., :rows, :cols]
    if cut.shape[-2:] == (rows, cols):
        return np.ascontiguousarray(cut)
    out = np.full((*planes.shape[:-2], rows, cols), outside, np.uint8)
    out[..., : cut.shape[-2], : cut.shape[-1]] = cut
    return out


def match(analysis: GridAnalysis, output: Grid) -> tuple[NDArray[np.float32], Bools]:
    """How each source agrees with a demonstration's output (rows, cols).

    Returns share (N_SOURCES,) float32, the part of the output's cells that the source shows at the
    same row and column, and same_size (N_SOURCES,) bool, its size equals the output's.
    """
    rows, cols = output.shape
    equal = analysis.planes[:, :rows, :cols] == output
    share = equal.reshape(N_SOURCES, -1).mean(1, dtype=np.float32)
    return share, (analysis.sizes == (rows, cols)).all(1)


_PAIR_NAMES = (
    "size_same",
    "size_swapped",
    "rows_same",
    "cols_same",
    "rows_smaller",
    "cols_smaller",
    "rows_larger",
    "cols_larger",
    "rows_divide",
    "cols_divide",
    "rows_multiple",
    "cols_multiple",
    "rows_log_ratio",
    "cols_log_ratio",
    "input_rows",
    "input_cols",
    "output_rows",
    "output_cols",
    "input_colours",
    "output_colours",
    "new_colours",
    "lost_colours",
    "palette_same",
    "palette_subset",
    "counts_same",
    "input_density",
    "output_density",
    "changed",
    "changed_filled",
    "changed_background",
    "added_only",
    "removed_only",
    "colour_map",
    "colour_bijection",
    "input_fliplr",
    "input_flipud",
    "input_transpose",
    "output_fliplr",
    "output_flipud",
    "output_transpose",
    "output_rot180",
    "output_uniform",
    "output_row_uniform",
    "output_col_uniform",
    "background_kept",
    "background_zero",
    "best_share",
    "covered",
)
CONTROL_NAMES: tuple[str, ...] = (
    tuple(f"share_{name}" for name in SOURCE_NAMES)
    + tuple(f"size_{name}" for name in SOURCE_NAMES)
    + tuple(f"rows_{name}" for name in SIZE_RULE_NAMES)
    + tuple(f"cols_{name}" for name in SIZE_RULE_NAMES)
    + _PAIR_NAMES
)
N_CONTROL = len(CONTROL_NAMES)


def _maps(a: Grid, b: Grid) -> Bools:
    """Which (colour of a, colour of b) pairs occur at one place; (10, 10)."""
    joint = np.bincount(a.ravel().astype(np.int64) * COLOURS + b.ravel(), minlength=100)
    return joint.reshape(COLOURS, COLOURS) > 0


def _self_symmetric(a: Grid) -> tuple[float, float, float]:
    square = a.shape[0] == a.shape[1]
    return (
        float((a == a[:, ::-1]).mean()),
        float((a == a[::-1]).mean()),
        float((a == a.T).mean()) if square else 0.0,
    )


def control_features(analysis: GridAnalysis, input_grid: Grid, output: Grid) -> NDArray[np.float32]:
    """Features of one demonstration pair, float32 (N_CONTROL,) in [-1, 1], laid out as CONTROL_NAMES.

    analysis must be `analyse(input_grid)`. For demonstrations only: it reads the output.
    """
    share, same_size = match(analysis, output)
    (hi, wi), (ho, wo) = input_grid.shape, output.shape
    rules = analysis.size_values == np.array([[ho], [wo]])
    in_counts = np.bincount(input_grid.ravel(), minlength=COLOURS)
    out_counts = np.bincount(output.ravel(), minlength=COLOURS)
    has_in, has_out = in_counts > 0, out_counts > 0
    bg = analysis.background
    changed = filled_changed = empty_changed = 0.0
    added = removed = functional = bijective = False
    if (hi, wi) == (ho, wo):
        differ = input_grid != output
        changed = float(differ.mean())
        empty = input_grid == bg
        filled_changed = float((differ & ~empty).mean())
        empty_changed = float((differ & empty).mean())
        added = changed > 0 and filled_changed == 0
        removed = changed > 0 and bool((output[differ] == bg).all())
        joint = _maps(input_grid, output)
        functional = bool((joint.sum(1) <= 1).all())
        bijective = functional and bool((joint.sum(0) <= 1).all())
    best = float(share[same_size].max()) if same_size.any() else 0.0
    covered = (analysis.planes[:, :ho, :wo] == output).any(0).mean()
    first_row, first_col = output[:1], output[:, :1]
    pair = (
        (hi, wi) == (ho, wo),
        (hi, wi) == (wo, ho),
        hi == ho,
        wi == wo,
        ho < hi,
        wo < wi,
        ho > hi,
        wo > wi,
        hi % ho == 0,
        wi % wo == 0,
        ho % hi == 0,
        wo % wi == 0,
        np.log2(ho / hi) / 5.0,
        np.log2(wo / wi) / 5.0,
        hi / MAX_SIDE,
        wi / MAX_SIDE,
        ho / MAX_SIDE,
        wo / MAX_SIDE,
        has_in.sum() / COLOURS,
        has_out.sum() / COLOURS,
        (has_out & ~has_in).sum() / COLOURS,
        (has_in & ~has_out).sum() / COLOURS,
        np.array_equal(has_in, has_out),
        not (has_out & ~has_in).any(),
        np.array_equal(in_counts, out_counts),
        1.0 - in_counts[bg] / (hi * wi),
        1.0 - out_counts[bg] / (ho * wo),
        changed,
        filled_changed,
        empty_changed,
        added,
        removed,
        functional,
        bijective,
        *_self_symmetric(input_grid),
        *_self_symmetric(output),
        float((output == output[::-1, ::-1]).mean()),
        bool((output == output[0, 0]).all()),
        bool((output == first_col).all()),
        bool((output == first_row).all()),
        has_out[bg],
        bg == 0,
        best,
        float(covered),
    )
    return np.concatenate(
        (share, same_size, rules[0], rules[1], np.asarray(pair, np.float32)), dtype=np.float32
    )
