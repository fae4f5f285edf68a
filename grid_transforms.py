"""Elementary transforms of one ARC grid: the bank of sources that an output's cells may point at.

`transforms(anatomy)` makes all of them, by name, from a grid that `grid_parts` took apart. It never
sees an output, learns and scores nothing, and needs NumPy alone. Everything follows a colour
permutation that keeps colour 0.
Use: `from grid_transforms import transforms, SOURCE_NAMES, SOURCE_INDEX, N_SOURCES`.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
from numpy.typing import NDArray

from grid_parts import (
    COLOURS,
    MAX_SIDE,
    OUTSIDE,
    Anatomy,
    Grid,
    Ints,
    Parts,
    colour_box,
    colour_counts,
    commonest_colour,
    lattice,
    part_box,
    rarest_colour,
    read_only,
    recoloured,
    shape_hashes,
)

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
    "panel_overlay_everywhere",
    "panel_majority",
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
    "panel_fullest",
    "panel_odd",
    "panel_overlay",
    "panel_map",
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


def _run(first: str, last: str) -> slice:
    """Neighbours in the list of sources, written at once."""
    return slice(SOURCE_INDEX[first], SOURCE_INDEX[last] + 1)


_TILINGS = _run("tile", "tile_row_blocks_flipped")
_COLOURS = _run("colour_rank_1", "colour_background")
_SAME_SIZE = _run(SAME_SIZE_SOURCES[0], SAME_SIZE_SOURCES[-1])
_RAYS = _run("ray_up", "ray_down_left")
_OBJECTS = _run("object_majority", "object_minority")


# ---------------------------------------------------------------- the bank


class _Bank:
    """Collects source grids in canonical colours, for an input of (rows, cols)."""

    def __init__(self, rows: int, cols: int) -> None:
        self.planes = np.full((N_SOURCES, MAX_SIDE, MAX_SIDE), OUTSIDE, np.uint8)
        # (N_SOURCES, rows, cols): the corner of each plane that a grid of the input's shape fills.
        self.own = self.planes[:, :rows, :cols]
        self._sizes = bytearray(2 * N_SOURCES)

    def put(self, name: str, grid: NDArray[np.generic]) -> None:
        """A grid with its own size; silently absent when empty or above 30 a side."""
        rows, cols = grid.shape
        if 0 < rows <= MAX_SIDE and 0 < cols <= MAX_SIDE:
            i = SOURCE_INDEX[name]
            self.planes[i, :rows, :cols] = grid
            self._sizes[2 * i] = rows
            self._sizes[2 * i + 1] = cols

    def keep(self, name: str, grid: NDArray[np.generic]) -> None:
        """The grid of one of SAME_SIZE_SOURCES, or what can be spread over it."""
        self.own[SOURCE_INDEX[name]] = grid

    def fill(self, name: str, plane: NDArray[np.generic]) -> None:
        """A whole plane without a size opinion."""
        self.planes[SOURCE_INDEX[name]] = plane

    def sizes(self) -> Grid:
        """Rows and columns of each source, (N_SOURCES, 2), when all of them are there."""
        sizes = np.frombuffer(self._sizes, np.uint8).reshape(N_SOURCES, 2)
        present = self.own[_SAME_SIZE, 0, 0] != OUTSIDE
        sizes[_SAME_SIZE][present] = self.own.shape[1:]
        return sizes


# ---------------------------------------------------------------- turned, tiled, repeated, scaled


def _put_geometric(bank: _Bank, g: Grid) -> None:
    t = g.T
    for name, grid in zip(
        GEOMETRIC_SOURCES,
        (g, g[:, ::-1], g[::-1], g[::-1, ::-1], t, t[::-1], t[:, ::-1], t[::-1, ::-1]),
        strict=True,
    ):
        bank.put(name, grid)


@cache
def _fold(side: int) -> Ints:
    """Plane index -> grid index for periodic tiling."""
    return read_only(np.arange(MAX_SIDE) % side)


@cache
def _tiling_cols(cols: int) -> Ints:
    """Plane column -> grid column (4, 30), tiled: plain, mirrored, flipped mirrored, flipped."""
    plain = _fold(cols)
    mirrored = np.arange(MAX_SIDE) % (2 * cols)
    mirrored = np.minimum(mirrored, 2 * cols - 1 - mirrored)
    return read_only(np.stack((plain, mirrored, cols - 1 - mirrored, cols - 1 - plain)))


@cache
def _tiling_rows(rows: int) -> Ints:
    """Plane row -> row of the _TILINGS among 4 * grid row + one of _tiling_cols, (6, 30)."""
    plain, mirrored, upside, _ = 4 * _tiling_cols(rows)
    odd = np.arange(MAX_SIDE) // rows % 2
    tilings = (plain, mirrored + 1, mirrored + 2, upside + 1, upside + 2, plain + 3 * odd)
    return read_only(np.stack(tilings))


def _tiled(unit: Grid) -> Grid:
    """A grid repeated all over a plane (30, 30)."""
    return unit.take(_fold(unit.shape[0]), axis=0).take(_fold(unit.shape[1]), axis=1)


def _exact_period(lines: bytes, width: int) -> int:
    """Smallest p such that lines of so many cells repeat every p (their number if none)."""
    for start in range(width, len(lines), width):
        if lines.startswith(lines[start:]):
            return start // width
    return len(lines) // width


_FILLED_BYTES = bytes([0]) + bytes([255]) * 255


def _loose_period(lines: bytes, width: int, n: int) -> int:
    """Smallest p up to half of n lines of so many cells so that no two filled cells at one place
    of lines that are p, 2 p, .. apart differ; n itself when there is none.

    As long integers, a byte a cell, the lines are compared with the later ones at one stroke.
    """
    cells = int.from_bytes(lines, "little")
    filled = int.from_bytes(lines.translate(_FILLED_BYTES), "little")
    clashes: dict[int, int] = {}
    for p in range(1, n // 2 + 1):
        for distance in range(p, n, p):
            if distance not in clashes:
                shift = 8 * width * distance
                clashes[distance] = (cells ^ cells >> shift) & filled & filled >> shift
            if clashes[distance]:
                break
        else:
            return p
    return n


def _completed(g: Grid, by_row: bytes, by_col: bytes) -> Grid:
    """The plane (30, 30) of the smallest two-way period that fits all filled cells; 0 = unknown.

    g (rows, cols), and its cells by row and by column.
    """
    rows, cols = g.shape
    width, height = _loose_period(by_col, rows, cols), _loose_period(by_row, cols, rows)
    plane = _tiled(_unit(g, height, width))
    if width < cols and height < rows and ((plane[:rows, :cols] != g) & (g > 0)).any():
        return _tiled(_unit(g, rows, width))  # each fits by itself, but not both
    return plane


def _unit(g: Grid, height: int, width: int) -> Grid:
    """The greatest colour at each place of a unit (height, width) that g is cut into."""
    rows, cols = g.shape
    if (rows, cols) == (height, width):
        return g
    down, across = -(-rows // height), -(-cols // width)
    padded = np.zeros((down * height, across * width), np.uint8)
    padded[:rows, :cols] = g
    return padded.reshape(down, height, across, width).max((0, 2))


def _put_planes(bank: _Bank, a: Anatomy) -> None:
    g = a.g
    rows, cols = g.shape
    across = g.take(_tiling_cols(cols), axis=1).reshape(4 * rows, MAX_SIDE)
    bank.planes[_TILINGS] = across.take(_tiling_rows(rows), axis=0)
    unit = g[: _exact_period(a.by_row, cols), : _exact_period(a.by_col, rows)]
    bank.fill("period_exact", _tiled(unit))
    bank.put("unit_period", unit)
    bank.fill("period_complete", _completed(g, a.by_row, a.by_col))
    _put_slanted(bank, g)


@cache
def _slanted(period: int) -> Ints:
    """The place of each cell of a plane, by antidiagonals and by diagonals; (2, 30, 30)."""
    line = np.arange(MAX_SIDE)
    places = np.stack((line[:, None] + line, line[:, None] - line)) % period
    return read_only(places)


def _put_slanted(bank: _Bank, g: Grid) -> None:
    """Antidiagonals and diagonals that repeat."""
    rows, cols = g.shape
    side = rows + cols
    row, col = g.nonzero()
    values = g[row, col]
    for i, (name, place) in enumerate(
        (("period_antidiagonal", row + col), ("period_diagonal", row - col))
    ):
        along = np.zeros(side, np.uint8)  # by place; one below 0 counts from the end
        along[place] = values
        period = side
        if along[place].tobytes() == values.tobytes():  # each line is of one colour
            lines = along.tobytes()
            period = _loose_period(lines[rows:] + lines[:rows] if i else lines, 1, side)
            along = np.zeros(period, np.uint8)
            along[place % period] = values
        bank.fill(name, along[_slanted(period)[i]])


def _put_scaled(bank: _Bank, a: Anatomy) -> None:
    g, n_filled_colours = a.g, a.counts.size - 1
    rows, cols = g.shape
    if rows * rows <= MAX_SIDE and cols * cols <= MAX_SIDE:
        blocks = a.filled[:, None, :, None] * g[:, None]  # (rows, rows, cols, cols)
        bank.put("fractal", blocks.reshape(rows * rows, cols * cols))
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
    deduped = _dedup(a)
    bank.put("dedup", deduped)
    if a.box is not None:
        # Background all around it, if any, is one line wide now.
        inner = tuple(
            slice(int(box.start > 0), left - int(box.stop < side))
            for box, left, side in zip(a.box, deduped.shape, g.shape, strict=True)
        )
        bank.put("bbox_dedup", deduped[inner])
    if rows == cols and 2 * rows <= MAX_SIDE:
        t = g.T
        wheel = np.empty((2 * rows, 2 * rows), np.uint8)
        wheel[:rows, :rows] = g
        wheel[:rows, rows:] = t[:, ::-1]
        wheel[rows:, :rows] = t[::-1]
        wheel[rows:, rows:] = g[::-1, ::-1]
        bank.put("pinwheel", wheel)


def _dedup(a: Anatomy) -> Grid:
    """Collapse equal neighbouring rows and equal neighbouring columns, to the last of them."""
    rows, cols = a.g.shape
    keep_rows, keep_cols = np.empty(rows, np.bool_), np.empty(cols, np.bool_)
    keep_rows[-1] = keep_cols[-1] = True
    np.logical_not(a.next_rows.all(1), out=keep_rows[:-1])
    np.logical_not(a.next_cols.all(0), out=keep_cols[:-1])
    return a.g[keep_rows][:, keep_cols]


# ---------------------------------------------------------------- shifted, fallen, shining


def _put_shifts_and_rays(bank: _Bank, a: Anatomy) -> None:
    g, filled, padded, rays = a.g, a.filled, a.padded, a.rays
    rows, cols = g.shape
    bank.keep("shift_up", padded[2:, 1:-1])
    bank.keep("shift_down", padded[:-2, 1:-1])
    bank.keep("shift_left", padded[1:-1, 2:])
    bank.keep("shift_right", padded[1:-1, :-2])
    # What falls keeps its order: the filled cells of each line go to as many places at its end.
    up = np.arange(rows)[:, None] < rows - a.col_counts[:, 0]
    left = np.arange(cols) < cols - a.row_counts[:, :1]
    by_row, by_col = g[filled], g.T[filled.T]
    for name, ends, cells in (
        ("gravity_down", up[::-1].T, by_col),
        ("gravity_up", up.T, by_col),
        ("gravity_left", left, by_row),
        ("gravity_right", left[:, ::-1], by_row),
    ):
        fallen = np.zeros(ends.shape, np.uint8)
        fallen[ends] = cells
        bank.keep(name, fallen if cells is by_row else fallen.T)
    bank.own[_RAYS] = rays.stack
    # Where both opposite directions show one colour: columns, rows, diagonals and antidiagonals.
    one, other = rays.stack[::2], rays.stack[1::2]
    by_cols, by_rows, *slanted = one * (one == other) * ~filled
    bank.keep("between_rows", g + by_rows)
    bank.keep("between_cols", g + by_cols)
    bank.keep("between_diagonals", g + np.maximum(*slanted))


# ---------------------------------------------------------------- completed by symmetry


@cache
def _mirror_axes(cols: int) -> tuple[Ints, Ints]:
    """Doubled centre columns: of each two columns (cols * cols,), 2 * cols - 1 for one with
    itself; and those in the middle half, from the middle outwards."""
    col = np.arange(cols)
    axis = col[:, None] + col
    axis[col, col] = 2 * cols - 1
    tried = range(cols // 2, cols - 1 + (cols + 1) // 2)
    outwards = sorted(tried, key=lambda centre: (abs(centre - cols + 1), centre))
    return read_only(axis.ravel()), read_only(np.array(outwards))


# In `_best_axis`: 1..10, one colour more than a grid has, as `_put_mosaic` needs; 0 is for all.
_COLOUR_IDS = np.arange(COLOURS + 1, dtype=np.uint8)[:, None, None]
_AXIS_WEIGHTS = np.where(_COLOUR_IDS == 0, -2, 3).astype(np.float32)


def _best_axis(g: Grid, n_colours: int) -> int:
    """Doubled centre column of the mirror axis with the best agreement; g has colours
    0..n_colours.

    The score is the number of compared cells minus three times the disagreeing ones; cells that
    are background on either side are not compared. Only axes in the middle half are tried; ties
    go to the one nearest the middle, cols - 1.
    """
    cols = g.shape[1]
    # Agreeing cells of every two columns, three times, less those filled in both, twice.
    shown = g == _COLOUR_IDS[: n_colours + 1]
    np.logical_not(shown[0], out=shown[0])
    cells = shown.astype(np.float32).reshape(-1, cols)
    weighted = (shown * _AXIS_WEIGHTS[: n_colours + 1]).reshape(-1, cols)
    axis, outwards = _mirror_axes(cols)
    score = np.bincount(axis, (weighted.T @ cells).ravel())[outwards]
    best = int(score.argmax())
    return int(outwards[best]) if score[best] >= -1 else cols - 1


def _mirror_into(g: Grid, centre: int) -> None:
    """Give background cells of g the colour of their image about the doubled centre column."""
    cols = g.shape[1]
    both = g[:, max(0, centre - cols + 1) : min(cols - 1, centre) + 1]
    both += both[:, ::-1] * (both == 0)


def _symmetric(g: Grid, n_colours: int) -> Grid:
    """Fill background cells from the mirror image about the best column and row axes."""
    out = g.copy()
    _mirror_into(out, _best_axis(out, n_colours))
    _mirror_into(out.T, _best_axis(out.T, n_colours))
    if g.shape[0] == g.shape[1]:
        out += out.T * (out == 0)
    return out


def _put_symmetric(bank: _Bank, a: Anatomy) -> None:
    """Own colour where filled, else a mirror image's."""
    if a.box is not None:
        whole = a.g.copy()
        inner = whole[a.box]
        inner += inner[::-1, ::-1] * (inner == 0)
        bank.keep("fill_bbox_rot180", whole)
    bank.keep("fill_best_symmetry", _symmetric(a.g, a.counts.size - 1))


def _put_mosaic(bank: _Bank, a: Anatomy) -> None:
    """Patterns with a covered part: one colour, background or not, seen as solid patches only.

    Absent unless the grid has four colours and some colour's components are all solid rectangles
    of at least 2 x 2; the one with the most cells is taken as the cover.
    """
    n_ids, same = a.counts.size, a.same
    if n_ids < 4:
        return
    patch = a.solid & (same.high > 1) & (same.wide > 1)
    loose = np.bincount(same.colour[~patch], minlength=n_ids)
    cells = a.counts * (loose == 0)
    cover = int(cells.argmax())
    if cells[cover] == 0:
        return
    # The cover is unknown, 0, and each colour one more than it is, for the time being.
    table = bytearray(range(1, COLOURS + 1)) + bytearray(256 - COLOURS)
    table[cover] = 0
    by_row, by_col = a.by_row.translate(table), a.by_col.translate(table)
    work = np.frombuffer(by_row, np.uint8).reshape(a.g.shape)
    back = np.array([cover, *range(COLOURS)], np.uint8)
    plane = back[_completed(work, by_row, by_col)]
    bank.fill("mosaic_period", plane)
    mirrored = back[_symmetric(work, n_ids)]
    bank.keep("mosaic_symmetry", mirrored)
    box = colour_box(a.by_row, a.by_col, cover, a.g.shape[1])
    if box is not None:
        bank.put("crop_hidden_period", plane[box])
        bank.put("crop_hidden_symmetry", mirrored[box])


# ---------------------------------------------------------------- by component, object, line


def _put_objects(bank: _Bank, a: Anatomy) -> None:
    """Sources with one colour per component, object, row or column."""
    g, filled, same = a.g, a.filled, a.same
    rows, cols = g.shape
    flat = g.ravel()
    # An enclosed background region takes the colour above its first cell.
    colour = same.colour.astype(np.uint8)
    colour[a.holes] = flat[a.above_holes]
    bank.keep("fill_enclosed", colour[same.label])
    of_objects = np.zeros((2, a.objects.size.size), np.uint8)
    of_objects[0, a.objects.real] = commonest_colour(a.object_counts)
    of_objects[1, a.objects.real] = rarest_colour(a.object_counts)
    bank.own[_OBJECTS] = of_objects[:, a.objects.label]
    bank.keep("denoise_small", g * (same.size > 1)[same.label])

    bank.keep("row_common", commonest_colour(a.row_counts)[:, None])
    bank.keep("col_common", commonest_colour(a.col_counts))
    bank.keep("row_first", flat[filled.argmax(1) + np.arange(0, g.size, cols)][:, None])
    bank.keep("col_first", flat[filled.argmax(0) * cols + np.arange(cols)])
    bank.keep("cols_sorted", g[:, (-a.col_counts[:, 0]).argsort(kind="stable")])

    padded = a.padded
    across = np.maximum(np.maximum(padded[:, :-2], padded[:, 2:]), padded[:, 1:-1])
    near = np.maximum(np.maximum(across[:-2], across[2:]), across[1:-1])
    bank.keep("outline", np.where(filled, g, near))

    # The commonest other filled colour that touches each component or background region.
    pairs = lattice(rows, cols).pairs
    one, other = flat[pairs]
    touching = pairs[:, (one != other).nonzero()[0]]
    near_counts = colour_counts(same.label.ravel()[touching], flat[touching[::-1]], same.size.size)
    bank.keep("component_neighbour", commonest_colour(near_counts)[same.label])

    # The boxes of components below the grid: larger ones on top, solid ones show nothing.
    boxed = np.zeros(g.shape, np.uint8)
    real = same.real[(~a.solid & (same.size > 2))[same.real]]
    for i in real[(-same.size[real]).argsort(kind="stable")][::-1].tolist():
        boxed[part_box(same, i)] = same.colour[i]
    np.copyto(boxed, g, where=filled)
    bank.keep("object_bbox", boxed)


def _put_crops(bank: _Bank, a: Anatomy) -> None:
    if a.box is None:
        return
    g, same, objects = a.g, a.same, a.objects

    def crop(name: str, parts: Parts, i: int) -> Grid:
        """The box of one part."""
        grid = g[part_box(parts, i)]
        bank.put(name, grid)
        return grid

    bank.put("bbox", g[a.box])
    bank.put("bbox_fliplr", g[a.box][:, ::-1])
    sizes = same.size[same.real]
    crop("crop_largest_component", same, same.real[sizes.argmax()])
    crop("crop_smallest_component", same, same.real[sizes.argmin()])
    real = objects.real
    sizes = objects.size[real]
    crop("crop_largest_object", objects, real[sizes.argmax()])
    crop("crop_smallest_object", objects, real[sizes.argmin()])
    model = real[(a.object_shades * 1024 + sizes).argmax()]
    template = crop("crop_most_coloured_object", objects, model)
    # Objects with a bounding box of the same size take the most coloured object's cells.
    high, wide = objects.high, objects.wide
    like = real[(high[real] == high[model]) & (wide[real] == wide[model])]
    copies_of = g.copy()
    for i in like.tolist():
        copies_of[part_box(objects, i)] = template
    bank.keep("object_template", copies_of)
    hashes, mirrored = shape_hashes(objects, g)
    shapes = hashes[real].tolist()
    copies = Counter(shapes)
    odd = [i for i, shape in zip(real.tolist(), shapes, strict=True) if copies[shape] == 1]
    if len(odd) == 1 and len(shapes) > 1:
        crop("crop_odd_shape", objects, odd[0])
    chosen = real[mirrored[real]]
    if chosen.size == 1 or (chosen.size and real.size > chosen.size):
        crop("crop_symmetric_object", objects, chosen[objects.size[chosen].argmax()])
    for name, colour in (("crop_rarest", a.counts.size - 1), ("crop_commonest", 1)):
        box = colour_box(a.by_row, a.by_col, colour, g.shape[1])
        if box is not None:
            bank.put(name, g[box])
    frames = a.frame.nonzero()[0]
    if frames.size:
        area = (same.high[frames] - 1) * (same.wide[frames] - 1)
        bank.put("crop_frame_interior", g[part_box(same, frames[area.argmax()])][1:-1, 1:-1])


# ---------------------------------------------------------------- by blocks and panels


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


def _put_panels(bank: _Bank, g: Grid, seg_r: Ints, seg_c: Ints) -> Ints:
    """Sources "panel_.." from a grid's panels; seg_r (rows,), seg_c (cols,) say which is where.

    Returns the panels' rank, see `transforms`.
    """
    of_rows, of_cols = seg_r.tolist(), seg_c.tolist()
    n_r, n_c = max(of_rows) + 1, max(of_cols) + 1
    rank = np.zeros(g.shape, np.int64)
    if n_r * n_c < 2:
        return rank
    inside_r, inside_c = (seg_r >= 0).nonzero()[0], (seg_c >= 0).nonzero()[0]
    window = (inside_r[:, None], inside_c)
    content = g[window]
    label = seg_r[inside_r][:, None] * n_c + seg_c[inside_c]
    counts = colour_counts(label, content, n_r * n_c)
    filled = counts[:, 1:].sum(1).tolist()
    common = commonest_colour(counts)
    bank.put("panel_map", common.reshape(n_r, n_c))
    majority = g.copy()
    majority[window] = common[label]
    bank.keep("panel_majority", majority)
    most, fewest = max(filled), min(filled)
    of_panel = [1 if n == most else 2 if n == fewest else 3 for n in filled]
    rank[window] = np.array(of_panel)[label]
    heights = {of_rows.count(i) for i in range(n_r)}
    widths = {of_cols.count(i) for i in range(n_c)}
    if len(heights) == len(widths) == 1:
        (high,), (wide,) = heights, widths
        panels = content.reshape(n_r, high, n_c, wide).transpose(0, 2, 1, 3).reshape(-1, high, wide)
        bank.put("panel_fullest", panels[filled.index(most)])
        seen = [panel.tobytes() for panel in panels]
        odd = [i for i, key in enumerate(seen) if seen.count(key) == 1]
        if len(odd) == 1:
            bank.put("panel_odd", panels[odd[0]])
        overlay = panels[0].copy()
        for panel in panels[1:]:
            overlay += panel * (overlay == 0)
        bank.put("panel_overlay", overlay)
        everywhere = g.copy()
        everywhere[window] = _tiled(overlay)[: inside_r.size, : inside_c.size]
        bank.keep("panel_overlay_everywhere", everywhere)
    return rank


# ---------------------------------------------------------------- all of them


def transforms(a: Anatomy) -> tuple[Grid, Grid, Ints]:
    """Every source of a grid, and the rank of its panels.

    Returns planes uint8 (N_SOURCES, MAX_SIDE, MAX_SIDE), in the grid's own colours, and sizes uint8
    (N_SOURCES, 2), both as `grid_features.GridAnalysis` holds them. A panel is what lies between
    separator lines: the rank (rows, cols) of each cell's panel is 1 fullest, 2 emptiest, 3 other, 0
    on a separator or without any.
    """
    g, same = a.g, a.same
    n_ids = a.counts.size
    bank = _Bank(*g.shape)
    _put_geometric(bank, g)
    _put_planes(bank, a)
    last = n_ids - 1
    largest = same.colour[same.real[same.size[same.real].argmax()]] if same.real.size else 0
    colours = [min(1, last), min(2, last), min(3, last), last, largest, 0]
    bank.planes[_COLOURS] = np.array(colours, np.uint8)[:, None, None]
    _put_scaled(bank, a)
    _put_shifts_and_rays(bank, a)
    _put_symmetric(bank, a)
    _put_mosaic(bank, a)
    ranks = np.minimum(np.arange(1, MAX_SIDE + 1), n_ids) % n_ids
    bank.fill("rank_by_row", ranks[:, None])
    bank.fill("rank_by_col", ranks)
    _put_objects(bank, a)
    _put_crops(bank, a)
    _put_blocks(bank, g)
    panel_rank = _put_panels(bank, g, a.row_segments, a.col_segments)
    return recoloured(bank.planes, a.back), bank.sizes(), panel_rank
