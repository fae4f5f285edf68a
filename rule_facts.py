"""Facts: what the exceptions of a rule list may ask of an output's cell.

A fact compares a *value row* with a number or another row; value rows (rows, cells) are what
sources show at an output's cells, then features of the cells, then their positions. `fact_table`
lists all facts over given rows, `FactTable.of` says where they hold. No fact sees an output's
colours. NumPy alone.
Use: `from rule_facts import fact_table, placed, positions, ABSENT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from grid_features import CELL_FEATURE_BINS, place
from grid_parts import COLOURS, OUTSIDE, Bools, Grid, Ints
from grid_transforms import SOURCE_INDEX, SOURCE_NAMES

# A fact is (operation, row, argument) over value rows.
EQUALS, AT_LEAST, NOT, LIKE, UNLIKE = range(5)
POSITIONS = ("row", "row from below", "col", "col from the right")
_MAX_POSITION = 6
ABSENT = CELL_FEATURE_BINS  # a cell feature outside the input

# Sources that facts compare with each other: few, as there is a fact for every two of them.
_COMPARED = tuple(
    SOURCE_INDEX[name]
    for name in SOURCE_NAMES
    if name.startswith(("ray_", "shift_", "half_", "third_", "quadrant_", "row_", "col_", "rot"))
    or name
    in (
        "fliplr",
        "flipud",
        "transpose",
        "antitranspose",
        "component_neighbour",
        "object_majority",
        "object_minority",
        "colour_rarest",
        "colour_rank_1",
        "colour_rank_2",
        "panel_overlay",
        "panel_map",
    )
)


@dataclass(eq=False)
class FactTable:
    """Facts as arrays: op, row, argument (F,), those of lower `tier_of` first."""

    op: Ints
    row: Ints
    arg: Ints
    names: list[str]  # of the value rows
    n_sources: int  # the first value rows are sources

    def of(self, values: Grid, which: Ints | None = None) -> Bools:
        """Facts (F, cells) of value rows (rows, cols); `which` picks facts."""
        op, row, arg = (
            (self.op, self.row, self.arg)
            if which is None
            else (self.op[which], self.row[which], self.arg[which])
        )
        out = np.empty((op.size, values.shape[1]), bool)
        small = arg.astype(np.uint8)[:, None]
        for code in np.unique(op).tolist():
            here = op == code
            left = values[row[here]]
            right = values[arg[here]] if code in (LIKE, UNLIKE) else small[here]
            if code in (EQUALS, LIKE):
                out[here] = left == right
            elif code == AT_LEAST:
                out[here] = (left >= right) & (left != ABSENT)
            else:
                out[here] = left != right
        return out

    def words(self, which: int) -> str:
        """Fact number `which` in words, for instance "enclosure = 2"."""
        op, arg = int(self.op[which]), int(self.arg[which])
        sign = ("=", ">=", "is not", "=", "is not")[op]
        if op in (LIKE, UNLIKE):
            return f"{self.names[self.row[which]]} {sign} {self.names[arg]}"
        source = self.row[which] < self.n_sources
        value = ("outside" if arg == OUTSIDE else f"colour {arg}") if source else str(arg)
        return f"{self.names[self.row[which]]} {sign} {value}"


def fact_table(names: list[str], n_sources: int, n_features: int, compare: bool) -> FactTable:
    """All facts over value rows: sources first, then cell features, then positions."""
    parts: list[tuple[int, Any, Any]] = [(EQUALS, [n_sources + n_features + 4], [0])]  # always
    source = np.arange(n_sources)
    parts.append((LIKE, source[1:], np.zeros(n_sources - 1, np.int64)))
    for value in (0, OUTSIDE, *range(1, COLOURS)):
        parts.append((EQUALS, source, np.full(n_sources, value)))
    feature = n_sources + np.arange(n_features)
    for value in range(CELL_FEATURE_BINS + 1):
        parts.append((EQUALS, feature, np.full(n_features, value)))
    for value in range(1, CELL_FEATURE_BINS):
        parts.append((AT_LEAST, feature, np.full(n_features, value)))
    position = n_sources + n_features + np.arange(4)
    for value in range(_MAX_POSITION):
        parts.append((EQUALS, position, np.full(4, value)))
    if compare:
        pairs = np.array(list(combinations(_COMPARED, 2)))
        parts.append((LIKE, pairs[:, 0], pairs[:, 1]))
        parts.append((UNLIKE, pairs[:, 0], pairs[:, 1]))
        parts.append((UNLIKE, source[1:], np.zeros(n_sources - 1, np.int64)))
        for value in range(COLOURS):
            parts.append((NOT, source, np.full(n_sources, value)))
        for value in range(CELL_FEATURE_BINS):
            parts.append((NOT, feature, np.full(n_features, value)))
    names = [*names, *POSITIONS, "everywhere"]
    tier = np.array([tier_of(name, k < n_sources) for k, name in enumerate(names)], float)
    op = np.concatenate([np.full(len(row), op) for op, row, _ in parts])
    row = np.concatenate([row for _, row, _ in parts]).astype(np.int64)
    arg = np.concatenate([arg for _, _, arg in parts]).astype(np.int64)
    compared = (op == LIKE) | (op == UNLIKE)
    other = np.where(compared, np.maximum(tier[np.where(compared, arg, 0)], 2), 0)
    order = np.argsort(np.maximum(tier[row], other) + 0.5 * (op > EQUALS), kind="stable")
    return FactTable(op=op[order], row=row[order], arg=arg[order], names=names, n_sources=n_sources)


# Among facts that hold on the same cells, and pointers that are right on the same cells, the first
# of this order stands for all. Chosen by leave-one-out: 196 of 652 demonstrations in two attempts
# against 187 in the bank's order; with cell features before sources 62 of 288 against 67.
_NEAR_SOURCES = (
    "ray_",
    "shift_",
    "fill_enclosed",
    "component_neighbour",
    "object_m",
    "object_bbox",
    "outline",
    "denoise",
    "between_",
    "row_first",
    "col_first",
    "row_common",
    "col_common",
    "half_",
    "third_",
    "quadrant_",
    "panel_overlay",
    "panel_map",
    "ring_nearest",
    "stretched",
    "tile",
)


def tier_of(name: str, is_source: bool) -> int:
    """The input itself 0, sources of near cells 1, other sources 2, cell features 3."""
    name = name.removeprefix("answer's ")
    if name in ("identity", "everywhere"):
        return 0
    if not is_source:
        return 3
    return 1 if name.startswith(_NEAR_SOURCES) else 2


# ---------------------------------------------------------------- value rows


def placed(rows: Grid, shape: tuple[int, int], outside: int) -> Grid:
    """Rows (n, height, width) at an output's shape, flattened: (n, cells)."""
    return place(rows, shape, outside).reshape(len(rows), -1)


def positions(shape: tuple[int, int]) -> Grid:
    """Rows of POSITIONS at an output's shape, and one of zeros for "everywhere": (5, cells)."""
    rows, cols = shape
    row, col = np.divmod(np.arange(rows * cols), cols)
    zero = np.zeros_like(row)
    return np.stack([row, rows - 1 - row, col, cols - 1 - col, zero]).astype(np.uint8)
