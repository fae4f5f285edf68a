"""Elementary transforms of one ARC grid: the bank of sources that an output's cells may point at.

`transforms(anatomy)` makes all of them, by name, from a grid that `grid_parts` took apart. It never
sees an output, learns and scores nothing, and needs NumPy alone. Everything follows a colour
permutation that keeps colour 0.
Use: `from grid_transforms import transforms, SOURCE_NAMES, SOURCE_INDEX, N_SOURCES`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from grid_parts import (
    COLOURS,
    MAX_SIDE,
    OUTSIDE,
    Anatomy,
    Bools,
    Grid,
    Ints,
    Parts,
    Rays,
    colour_counts,
    commonest_colour,
    mask_box,
    part_box,
    rarest_colour,
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


# ---------------------------------------------------------------- shifted, fallen, shining


def _between(a: Grid, b: Grid) -> Grid:
    return a * (a == b)


def _put_shifts_and_rays(bank: _Bank, g: Grid, rays: Rays) -> None:
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


# ---------------------------------------------------------------- completed by symmetry


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


def _put_mosaic(bank: _Bank, g: Grid, n_ids: int, same: Parts) -> None:
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
    box = mask_box(hidden)
    plane = _completed(work)
    plane = np.where(plane == 0, np.uint8(cover), plane - np.uint8(1))
    bank.fill("mosaic_period", plane)
    mirrored = _symmetric(work)
    mirrored = np.where(mirrored == 0, np.uint8(cover), mirrored - np.uint8(1))
    bank.put("mosaic_symmetry", mirrored)
    if box is not None:
        bank.put("crop_hidden_period", plane[box])
        bank.put("crop_hidden_symmetry", mirrored[box])


# ---------------------------------------------------------------- by component, object, line


def _put_objects(
    bank: _Bank, g: Grid, same: Parts, objects: Parts, object_counts: Ints, open_part: Bools
) -> None:
    """Sources with one colour per component, object, row or column."""
    rows, cols = g.shape
    # An enclosed background region takes the colour above its first cell.
    colour = same.colour.copy()
    holes = np.flatnonzero((same.colour == 0) & ~open_part)
    colour[holes] = g.ravel()[same.first[holes] - cols]
    bank.put("fill_enclosed", colour[same.label])
    bank.put("object_majority", commonest_colour(object_counts)[objects.label])
    bank.put("object_minority", rarest_colour(object_counts)[objects.label])
    bank.put("denoise_small", g * (same.size[same.label] > 1))

    line = np.arange(max(rows, cols))
    by_row = commonest_colour(colour_counts(np.broadcast_to(line[:rows, None], g.shape), g, rows))
    by_col = commonest_colour(colour_counts(np.broadcast_to(line[None, :cols], g.shape), g, cols))
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
    touching = commonest_colour(near_counts.reshape(-1, COLOURS))
    bank.put("component_neighbour", touching[same.label])

    # Larger components first, so that smaller ones stay visible on top.
    boxed = g.copy()
    real = np.flatnonzero((same.colour > 0) & (same.size > 2))
    for i in real[np.argsort(-same.size[real], kind="stable")].tolist():
        area = boxed[same.top[i] : same.bottom[i] + 1, same.left[i] : same.right[i] + 1]
        area[area == 0] = same.colour[i]
    bank.put("object_bbox", boxed)


def _put_crops(
    bank: _Bank,
    g: Grid,
    n_ids: int,
    box: tuple[slice, slice] | None,
    same: Parts,
    objects: Parts,
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
    bank.put("crop_largest_component", g[part_box(same, real[sizes.argmax()])])
    bank.put("crop_smallest_component", g[part_box(same, real[sizes.argmin()])])
    real = np.flatnonzero(objects.colour)
    sizes = objects.size[real]
    bank.put("crop_largest_object", g[part_box(objects, real[sizes.argmax()])])
    bank.put("crop_smallest_object", g[part_box(objects, real[sizes.argmin()])])
    shades = (object_counts[real, 1:] > 0).sum(1)
    rank = shades * 1024 + sizes
    model = real[rank.argmax()]
    template = g[part_box(objects, model)]
    bank.put("crop_most_coloured_object", template)
    # Objects with a bounding box of the same size take the most coloured object's cells.
    like = real[
        (objects.bottom[real] - objects.top[real] == objects.bottom[model] - objects.top[model])
        & (objects.right[real] - objects.left[real] == objects.right[model] - objects.left[model])
    ]
    copies_of = g.copy()
    for i in like.tolist():
        copies_of[part_box(objects, i)] = template
    bank.put("object_template", copies_of)
    shape, _ = shape_hashes(objects, None)
    _, mirrored = shape_hashes(objects, g)
    kinds, copies = np.unique(shape[real], return_counts=True)
    if (copies == 1).sum() == 1 and kinds.size > 1:
        i = real[shape[real] == kinds[copies == 1][0]][0]
        bank.put("crop_odd_shape", g[part_box(objects, i)])
    chosen = real[mirrored[real]]
    if chosen.size == 1 or (chosen.size and real.size > chosen.size):
        bank.put(
            "crop_symmetric_object", g[part_box(objects, chosen[objects.size[chosen].argmax()])]
        )
    rare = mask_box(g == n_ids - 1)
    if rare is not None:
        bank.put("crop_rarest", g[rare])
    common = mask_box(g == 1)
    if common is not None:
        bank.put("crop_commonest", g[common])
    frames = np.flatnonzero(solid_frame)
    if frames.size:
        area = (same.bottom - same.top) * (same.right - same.left)
        bank.put(
            "crop_frame_interior", g[part_box(same, frames[area[frames].argmax()])][1:-1, 1:-1]
        )


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
    n_r, n_c = int(seg_r.max()) + 1, int(seg_c.max()) + 1
    rank = np.zeros(g.shape, np.int64)
    if n_r * n_c < 2:
        return rank
    inside_r, inside_c = np.flatnonzero(seg_r >= 0), np.flatnonzero(seg_c >= 0)
    content = g[inside_r[:, None], inside_c]
    label = seg_r[inside_r][:, None] * n_c + seg_c[inside_c]
    counts = colour_counts(label, content, n_r * n_c)
    filled = counts[:, 1:].sum(1)
    bank.put("panel_map", commonest_colour(counts).reshape(n_r, n_c))
    window = (inside_r[:, None], inside_c)
    majority = g.copy()
    majority[window] = commonest_colour(counts)[label]
    bank.put("panel_majority", majority)
    of_panel = np.where(filled == filled.max(), 1, np.where(filled == filled.min(), 2, 3))
    rank[window] = of_panel[label]
    high, low = inside_r.size // n_r, inside_c.size // n_c
    even = (np.bincount(seg_r[inside_r]) == high).all() and (
        np.bincount(seg_c[inside_c]) == low
    ).all()
    if even:
        panels = content.reshape(n_r, high, n_c, low).transpose(0, 2, 1, 3).reshape(-1, high, low)
        bank.put("panel_fullest", panels[filled.argmax()])
        seen = [panel.tobytes() for panel in panels]
        odd = [i for i, key in enumerate(seen) if seen.count(key) == 1]
        if len(odd) == 1:
            bank.put("panel_odd", panels[odd[0]])
        overlay = panels[0]
        for panel in panels[1:]:
            overlay = overlay + panel * (overlay == 0)
        bank.put("panel_overlay", overlay)
        everywhere = g.copy()
        everywhere[window] = np.tile(overlay, (n_r, n_c))
        bank.put("panel_overlay_everywhere", everywhere)
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
    bank = _Bank()
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
    _put_shifts_and_rays(bank, g, a.rays)
    _put_symmetric(bank, g, a.box)
    _put_mosaic(bank, g, n_ids, same)
    ranks = np.minimum(np.arange(1, MAX_SIDE + 1), n_ids) % n_ids
    bank.fill("rank_by_row", ranks[:, None])
    bank.fill("rank_by_col", ranks[None, :])
    _put_objects(bank, g, same, a.objects, a.object_counts, a.open_part)
    _put_crops(bank, g, n_ids, a.box, same, a.objects, a.object_counts, a.frame)
    _put_blocks(bank, g)
    panel_rank = _put_panels(bank, g, a.row_segments, a.col_segments)
    return recoloured(bank.planes, a.back), bank.sizes, panel_rank
