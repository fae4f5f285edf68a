"""Features of one ARC grid, and of a demonstration: sources, cell features, candidate output sides.

`analyse(grid)` looks at a single input grid and never at any output; `control_features` compares a
demonstration's own output with its analysis. It does not learn, choose or score anything, and needs
NumPy alone. Everything follows a colour permutation that keeps colour 0.
Use: `from grid_features import analyse, place, control_features, CELL_FEATURE_NAMES`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from grid_parts import (
    COLOURS,
    KEPT_SHAPES,
    MAX_SIDE,
    OUTSIDE,
    Anatomy,
    Bools,
    Grid,
    Ints,
    Parts,
    read_only,
    shape_hashes,
    take_apart,
)
from grid_transforms import N_SOURCES, SOURCE_NAMES, transforms

CELL_FEATURE_BINS = 8

# A component is of one colour, an object of any but the background (see `grid_parts.parts_of`); a
# background region counts as a component. "Up to 7" means that 7 stands for more, too.
CELL_FEATURE_NAMES: tuple[str, ...] = (
    "colour_rank",  # 0 background, then by frequency, up to 7
    "component_size",  # cells of its component, up to 7
    "component_size_log",  # its logarithm to base 2, rounded down
    "component_size_rank",  # 0 background, 1 to 3 largest ones, 5 middle, 6 smallest, 7 only
    "object_size_rank",  # the same for objects
    "component_sides_touched",  # how many grid borders its component reaches
    "enclosure",  # 0 filled, 1 open; enclosed: 2 one cell, 3 to four, 4 to nine, 5 more, 6 square
    "same_neighbours_4",  # how many of the four beside it have its colour
    "filled_neighbours_8",  # how many of the eight around it are filled, up to 7
    "parity",  # row is odd + 2 * col is odd
    "row_mod_3",
    "col_mod_3",
    "border_distance",  # to the nearest grid border, 0 on it, up to 7
    "uniform_lines",  # its row is of one colour + 2 * its col is
    "bbox_relation",  # to the bounding box of all filled cells: 0 outside, 1 inside, 2 on its edge
    "diagonals",  # on that from top left + 2 * from top right + 4 * from bottom left
    "component_holes",  # enclosed background regions that start right below it, up to 7
    "component_kind",  # 0 background, 1 cell, 2 row, 3 col, 4 solid, 5 frame, 6 symmetric, 7 other
    "shape_copies",  # components of this shape in any colour, itself too, up to 7; 0 background
    "object_colours",  # colours of its object, up to 7; 0 background
    "row_fill",  # filled cells of its row: 0 none, 1 fewest of all rows with any, 2 most, 3 other
    "col_fill",
    "ray_rows",  # along its row something filled is seen: 0 none, 1 left, 2 right, 3 both, 4 alike
    "ray_cols",  # 1 up, 2 down
    "ray_diagonals",  # in how many of the four diagonal directions something filled is seen
    "panel_rank",  # of its panel: 0 on a separator or none, 1 fullest, 2 emptiest, 3 other
    "component_position",  # in its component's box: on top or bottom edge + 2 * on left or right
    "half_rows",  # 0 upper half, 1 middle row, 2 lower half
    "half_cols",
    "colour_components",  # components of its colour, up to 7
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


# ---------------------------------------------------------------- cell features

T = TypeVar("T")


def in_order(named: Mapping[str, T], names: tuple[str, ...]) -> list[T]:
    """The values in the order of `names`; KeyError unless each name has one, and no other has."""
    if len(named) != len(names):
        raise KeyError(f"without a value, or without a place: {sorted(named.keys() ^ set(names))}")
    return [named[name] for name in names]


def _rows_of(names: tuple[str, ...]) -> Ints:
    return np.array([CELL_FEATURE_NAMES.index(name) for name in names])


# The cell features that are one value per component, per object, or follow from the grid's shape.
_COMPONENT_FEATURES = (
    "colour_rank",
    "component_size",
    "component_size_log",
    "component_size_rank",
    "component_sides_touched",
    "enclosure",
    "component_holes",
    "component_kind",
    "shape_copies",
    "colour_components",
)
_OBJECT_FEATURES = ("object_size_rank", "object_colours")
_PLACE_FEATURES = (
    "parity",
    "row_mod_3",
    "col_mod_3",
    "border_distance",
    "diagonals",
    "half_rows",
    "half_cols",
)
_OTHER_FEATURES = tuple(
    name
    for name in CELL_FEATURE_NAMES
    if name not in (*_COMPONENT_FEATURES, *_OBJECT_FEATURES, *_PLACE_FEATURES)
)
_COMPONENT_ROWS, _OBJECT_ROWS = _rows_of(_COMPONENT_FEATURES), _rows_of(_OBJECT_FEATURES)
_PLACE_ROWS, _OTHER_ROWS = _rows_of(_PLACE_FEATURES), _rows_of(_OTHER_FEATURES)


@lru_cache(maxsize=KEPT_SHAPES)
def _place_features(rows: int, cols: int) -> Grid:
    """Features (features, rows, cols) in the order of _PLACE_FEATURES."""
    row, col = np.arange(rows)[:, None], np.arange(cols)
    value: dict[str, Ints] = {}
    value["parity"] = row % 2 + 2 * (col % 2)
    value["row_mod_3"] = row % 3
    value["col_mod_3"] = col % 3
    value["border_distance"] = np.minimum(
        np.minimum(np.minimum(row, rows - 1 - row), np.minimum(col, cols - 1 - col)), 7
    )
    value["diagonals"] = (row == col) + 2 * (row + col == cols - 1) + 4 * (row == rows - 1 - col)
    value["half_rows"] = 1 + np.sign(2 * row - rows + 1)
    value["half_cols"] = 1 + np.sign(2 * col - cols + 1)
    out = np.empty((len(_PLACE_FEATURES), rows, cols), np.uint8)
    for i, plane in enumerate(in_order(value, _PLACE_FEATURES)):
        out[i] = plane  # lines (rows, 1) and (cols,) are spread over the grid
    return read_only(out)


@cache
def _size_grades() -> Grid:
    """Of a size 0..900: up to 7, its logarithm up to 7, and a hole's value in "enclosure"."""
    size = np.arange(1, MAX_SIDE * MAX_SIDE + 1)
    out = np.zeros((3, size.size + 1), np.uint8)
    out[0, 1:] = np.minimum(size, 7)
    out[1, 1:] = np.minimum(np.log2(size), 7)
    out[2, 1:] = 2 + (size > 1).astype(np.int64) + (size > 4) + (size > 9)
    return read_only(out)


def _size_ranks(parts: Parts) -> Grid:
    """0 background, 1 largest, 2 second, 3 third, 5 middle, 6 smallest, 7 all alike (by size)."""
    sizes = parts.size[parts.real].tolist()
    levels = sorted(set(sizes), reverse=True)
    grades = dict.fromkeys(levels, 5) | dict(zip(levels, (1, 2, 3), strict=False))
    if levels:
        grades[levels[-1]] = 6 if len(levels) > 1 else 7
    out = np.zeros(parts.size.size, np.uint8)
    out[parts.real] = [grades[size] for size in sizes]
    return out


def _component_features(a: Anatomy) -> Grid:
    """A value for each component, (features, components) in the order of _COMPONENT_FEATURES."""
    same, size, holes = a.same, a.same.size, a.holes
    k = size.size
    filled = same.colour > 0
    value: dict[str, NDArray[Any]] = {}
    value["colour_rank"] = np.minimum(same.colour, 7)
    value["component_size"], value["component_size_log"], hole_kind = _size_grades()[:, size]
    value["component_size_rank"] = _size_ranks(same)
    value["component_sides_touched"] = a.sides_touched
    value["enclosure"] = ~filled
    value["component_holes"] = np.zeros(k, np.uint8)
    if holes.size:
        square = a.solid[holes] & (same.high[holes] == same.wide[holes]) & (size[holes] > 1)
        value["enclosure"] = value["enclosure"].astype(np.uint8)
        value["enclosure"][holes] = np.where(square, 6, hole_kind[holes])
        owner = same.label.ravel()[a.above_holes]
        value["component_holes"] = np.minimum(np.bincount(owner, minlength=k), 7)
    shape, mirrored = shape_hashes(same, None)
    kind = np.where(a.frame, 5, 7 - mirrored)
    solid_kind = 1 + 2 * (same.high > 1) + (same.wide > 1)
    value["component_kind"] = filled * np.where(a.solid, solid_kind, kind)
    shapes = shape[same.real].tolist()
    copies = Counter(shapes)
    value["shape_copies"] = np.zeros(k, np.uint8)
    value["shape_copies"][same.real] = [min(copies[shape], 7) for shape in shapes]
    per_colour = np.bincount(same.colour)
    value["colour_components"] = np.minimum(per_colour, 7)[same.colour]
    out = np.empty((len(_COMPONENT_FEATURES), k), np.uint8)
    for i, row in enumerate(in_order(value, _COMPONENT_FEATURES)):
        out[i] = row
    return out


def _object_features(a: Anatomy) -> Grid:
    """A value for each object, (features, objects) in the order of _OBJECT_FEATURES."""
    objects = a.objects
    shades = np.zeros(objects.size.size, np.uint8)
    shades[objects.real] = np.minimum(a.object_shades, 7)
    return np.stack((_size_ranks(objects), shades))


def _fill_grades(counts: Ints, length: int) -> Grid:
    """Of how many cells of each line are filled: 0 none, 1 the fewest but none, 2 the most, 3
    other. counts (lines, 10) as `grid_parts.line_counts` returns them, of lines of that length."""
    empty = counts[:, 0].tolist()
    most, fewest = min(empty), max((n for n in empty if n < length), default=length)
    grades = {fewest: 1, most: 2, length: 0}
    return np.array([grades.get(n, 3) for n in empty], np.uint8)


def _cell_features(a: Anatomy, panel_rank: Ints) -> Grid:
    """Cell features (N_CELL_FEATURES, rows, cols); panel_rank as `transforms` returns it."""
    rows, cols = a.g.shape
    cell: dict[str, NDArray[Any]] = {}
    four = np.zeros((rows, cols), np.uint8)
    four[1:] += a.next_rows
    four[:-1] += a.next_rows
    four[:, 1:] += a.next_cols
    four[:, :-1] += a.next_cols
    cell["same_neighbours_4"] = four
    solid = (a.padded > 0).view(np.uint8)
    eight = solid[:, :-2] + solid[:, 1:-1] + solid[:, 2:]
    eight = eight[:-2] + eight[1:-1] + eight[2:] - solid[1:-1, 1:-1]
    cell["filled_neighbours_8"] = np.minimum(eight, 7)
    row_uniform, col_uniform = (a.row_counts == cols).any(1), (a.col_counts == rows).any(1)
    cell["uniform_lines"] = row_uniform[:, None] + 2 * col_uniform
    in_box = np.zeros((rows, cols), np.uint8)
    if a.box is not None:
        in_box[a.box] = 2
        in_box[a.box][1:-1, 1:-1] = 1
    cell["bbox_relation"] = in_box
    cell["row_fill"] = _fill_grades(a.row_counts, cols)[:, None]
    cell["col_fill"] = _fill_grades(a.col_counts, rows)
    stack = a.rays.stack
    seen = (stack > 0).view(np.uint8)
    # Up and down, left and right: 1 for the one, 2 for the other, 1 more where they are alike.
    one, other = seen[0:4:2], seen[1:4:2]
    hits = one + 2 * other + (one & (stack[0:4:2] == stack[1:4:2]))
    cell["ray_cols"], cell["ray_rows"] = hits
    cell["ray_diagonals"] = seen[4:].sum(0, dtype=np.uint8)
    cell["panel_rank"] = panel_rank
    cell["component_position"] = a.box_edges
    out = np.empty((N_CELL_FEATURES, rows, cols), np.uint8)
    # All values of a component or object are spread over its cells at once.
    out[_COMPONENT_ROWS] = _component_features(a)[:, a.same.label]
    out[_OBJECT_ROWS] = _object_features(a)[:, a.objects.label]
    out[_PLACE_ROWS] = _place_features(rows, cols)
    for row, plane in zip(_OTHER_ROWS.tolist(), in_order(cell, _OTHER_FEATURES), strict=True):
        out[row] = plane
    return out


# ---------------------------------------------------------------- sizes


# The rules that need no more than the input's shape; the others count something in it.
_SHAPE_RULES = SIZE_RULE_NAMES[: SIZE_RULE_NAMES.index("colours_filled")]
_COUNT_RULES = SIZE_RULE_NAMES[len(_SHAPE_RULES) :]


def _in_range(sides: list[int]) -> list[int]:
    """Sides, 0 in place of those outside 1..MAX_SIDE."""
    return [side if 0 < side <= MAX_SIDE else 0 for side in sides]


@cache
def _shape_sides(own: int, other: int) -> list[int]:
    """Candidate output side by each of _SHAPE_RULES, of an input's side and its other one."""
    side = {
        "own": own,
        "other": other,
        "own_x2": own * 2,
        "own_x3": own * 3,
        "own_x4": own * 4,
        "own_half": own // 2 if own % 2 == 0 else 0,
        "own_third": own // 3 if own % 3 == 0 else 0,
        "own_plus_1": own + 1,
        "own_minus_1": own - 1,
        "own_plus_2": own + 2,
        "own_minus_2": own - 2,
        "own_x2_plus_1": own * 2 + 1,
        "own_x2_minus_1": own * 2 - 1,
        "own_half_down": (own - 1) // 2,  # two halves beside a separator
        "own_squared": own * own,
        "area": own * other,
        "one": 1,
        "longer": max(own, other),
        "shorter": min(own, other),
    }
    return _in_range(in_order(side, _SHAPE_RULES))


def _size_values(a: Anatomy) -> Grid:
    """Candidate output sides (2, N_SIZE_RULES), rows and then columns; 0 = none in 1..MAX_SIDE."""
    same, counts = a.same, a.counts.tolist()
    filled_colours = len(counts) - 1
    sizes = same.size[same.real].tolist()
    n_commonest = int(np.count_nonzero(same.colour == 1))
    values = []
    for axis, segments in ((0, a.row_segments), (1, a.col_segments)):
        own, other = a.g.shape[axis], a.g.shape[1 - axis]
        box = 0 if a.box is None else a.box[axis].stop - a.box[axis].start
        side = {
            "colours_filled": filled_colours,
            "colours_all": filled_colours + 1,  # with the background
            "own_x_colours": own * filled_colours,
            "components": len(sizes),
            "objects": a.objects.real.size,
            "filled_cells": a.g.size - counts[0],
            "commonest_cells": counts[1] if filled_colours else 0,
            "rarest_cells": counts[-1] if filled_colours else 0,
            "largest_component_cells": max(sizes, default=0),
            "components_commonest": n_commonest,  # those of the commonest colour
            "bbox_plus_2": box + 2 if box else 0,
            "bbox_x2": box * 2,
            "separators": segments.tolist().count(-1),
        }
        values.append(_shape_sides(own, other) + _in_range(in_order(side, _COUNT_RULES)))
    return np.array(values, np.uint8)


# ---------------------------------------------------------------- analysis


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
    if (raw.dtype.kind != "u" and raw.min() < 0) or raw.max() >= COLOURS:
        raise ValueError(f"grid colours {raw.min()}..{raw.max()}: expected 0..{COLOURS - 1}")
    a = take_apart(raw.astype(np.uint8))
    planes, sizes, panel_rank = transforms(a)
    if planes_only:
        cells, size_values = np.zeros((0, 0, 0), np.uint8), np.zeros((2, 0), np.uint8)
    else:
        cells, size_values = _cell_features(a, panel_rank), _size_values(a)
    return GridAnalysis(planes, sizes, cells, size_values, background=int(a.back[0]))


def place(planes: Grid, canvas: tuple[int, int], outside: int = OUTSIDE) -> Grid:
    """Planes (.., rows, cols) cropped to, or padded with `outside` up to, canvas (rows, cols)."""
    rows, cols = canvas
    cut = planes[..., :rows, :cols]
    if cut.shape[-2:] == (rows, cols):
        return np.ascontiguousarray(cut)
    out = np.full((*planes.shape[:-2], rows, cols), outside, np.uint8)
    out[..., : cut.shape[-2], : cut.shape[-1]] = cut
    return out


# ---------------------------------------------------------------- features of a demonstration

PAIR_FEATURE_NAMES = (
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
    + PAIR_FEATURE_NAMES
)
N_CONTROL = len(CONTROL_NAMES)


def match(analysis: GridAnalysis, output: Grid) -> tuple[NDArray[np.float32], Bools, float]:
    """How each source agrees with a demonstration's output (rows, cols).

    Returns share (N_SOURCES,) float32, the part of the output's cells that the source shows at the
    same row and column, same_size (N_SOURCES,) bool, its size equals the output's, and covered, the
    part of the output's cells that any source shows.
    """
    rows, cols = output.shape
    equal = (analysis.planes[:, :rows, :cols] == output).reshape(N_SOURCES, -1)
    # Up to 900 fits 16 bits, summed in a third of the time of 64 or of a mean.
    share = (equal.sum(1, dtype=np.uint16) / output.size).astype(np.float32)
    return share, (analysis.sizes == output.shape).all(1), _share(equal.any(0))


def _share(mask: Bools) -> float:
    """The part of a mask that is true, as its mean, but in half the time."""
    return int(np.count_nonzero(mask)) / mask.size


def _own_symmetry(name: str, a: Grid) -> dict[str, float]:
    """The share of cells that equal their mirror image, three ways; 0 for an impossible one."""
    square = a.shape[0] == a.shape[1]
    return {
        f"{name}_fliplr": _share(a == a[:, ::-1]),
        f"{name}_flipud": _share(a == a[::-1]),
        f"{name}_transpose": _share(a == a.T) if square else 0.0,
    }


def control_features(analysis: GridAnalysis, input_grid: Grid, output: Grid) -> NDArray[np.float32]:
    """Features of one demonstration, float32 (N_CONTROL,) in [-1, 1], laid out as CONTROL_NAMES.

    analysis must be `analyse(input_grid)`. For demonstrations only: it reads the output.
    """
    share, same_size, covered = match(analysis, output)
    (hi, wi), (ho, wo) = input_grid.shape, output.shape
    rules = analysis.size_values == np.array([[ho], [wo]])
    in_counts = np.bincount(input_grid.ravel(), minlength=COLOURS).tolist()
    out_counts = np.bincount(output.ravel(), minlength=COLOURS).tolist()
    has_in = {colour for colour, n in enumerate(in_counts) if n}
    has_out = {colour for colour, n in enumerate(out_counts) if n}
    bg = analysis.background
    changed = filled_changed = empty_changed = 0.0
    added = removed = functional = bijective = False
    if (hi, wi) == (ho, wo):
        differ = input_grid != output
        changed = _share(differ)
        empty = input_grid == bg
        filled_changed = _share(differ & ~empty)
        empty_changed = _share(differ & empty)
        added = changed > 0 and filled_changed == 0
        removed = changed > 0 and bool((output[differ] == bg).all())
        # Pairs of colours at one place: each colour is in one at least.
        joint = np.bincount(input_grid.ravel().astype(np.int64) * COLOURS + output.ravel())
        n_pairs = np.count_nonzero(joint)
        functional = n_pairs == len(has_in)
        bijective = functional and n_pairs == len(has_out)
    best = float(share[same_size].max()) if same_size.any() else 0.0
    pair: dict[str, Any] = {
        "size_same": (hi, wi) == (ho, wo),
        "size_swapped": (hi, wi) == (wo, ho),
        "rows_same": hi == ho,
        "cols_same": wi == wo,
        "rows_smaller": ho < hi,
        "cols_smaller": wo < wi,
        "rows_larger": ho > hi,
        "cols_larger": wo > wi,
        "rows_divide": hi % ho == 0,
        "cols_divide": wi % wo == 0,
        "rows_multiple": ho % hi == 0,
        "cols_multiple": wo % wi == 0,
        "rows_log_ratio": np.log2(ho / hi) / 5.0,
        "cols_log_ratio": np.log2(wo / wi) / 5.0,
        "input_rows": hi / MAX_SIDE,
        "input_cols": wi / MAX_SIDE,
        "output_rows": ho / MAX_SIDE,
        "output_cols": wo / MAX_SIDE,
        "input_colours": len(has_in) / COLOURS,
        "output_colours": len(has_out) / COLOURS,
        "new_colours": len(has_out - has_in) / COLOURS,
        "lost_colours": len(has_in - has_out) / COLOURS,
        "palette_same": has_in == has_out,
        "palette_subset": has_out <= has_in,
        "counts_same": in_counts == out_counts,
        "input_density": 1.0 - in_counts[bg] / (hi * wi),
        "output_density": 1.0 - out_counts[bg] / (ho * wo),
        "changed": changed,
        "changed_filled": filled_changed,
        "changed_background": empty_changed,
        "added_only": added,
        "removed_only": removed,
        "colour_map": functional,
        "colour_bijection": bijective,
        **_own_symmetry("input", input_grid),
        **_own_symmetry("output", output),
        "output_rot180": _share(output == output[::-1, ::-1]),
        "output_uniform": len(has_out) == 1,
        "output_row_uniform": bool((output == output[:, :1]).all()),
        "output_col_uniform": bool((output == output[:1]).all()),
        "background_kept": bg in has_out,
        "background_zero": bg == 0,
        "best_share": best,
        "covered": covered,
    }
    of_pair = np.asarray(in_order(pair, PAIR_FEATURE_NAMES), np.float32)
    return np.concatenate((share, same_size, rules[0], rules[1], of_pair), dtype=np.float32)
