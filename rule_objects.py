"""Further sources and facts for rule lists: whole components and objects, places against counts.

Made from one input grid; nothing here sees an output's colours. NumPy alone.
Use: `from rule_objects import object_bank, count_facts, OBJECT_SOURCES, OBJECT_FACT_NAMES`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from grid_features import SIZE_RULE_NAMES, GridAnalysis, in_order
from grid_parts import (
    COLOURS,
    MAX_SIDE,
    OUTSIDE,
    Grid,
    Ints,
    Parts,
    canonical,
    colour_counts,
    line_counts,
    part_box,
    parts_of,
    recoloured,
    segments_of,
    separators_of,
    shape_hashes,
)

# ---------------------------------------------------------------- names

# Facts about whole objects, one uint8 row of values 0..7 each; 8 outside the input.
_PART_FACTS = (
    "height",
    "width",
    "order from above",
    "order from the left",
    "order by size",
    "order by size, smallest first",
    "row inside",
    "row inside from below",
    "col inside",
    "col inside from the right",
    "ring inside",
    "twins of another colour",
    "twins of its colour",
    "largest of its colour",
    "taller or wider",
)
# Those of them that are one value per part.
_WHOLE_PART_FACTS = (
    "height",
    "width",
    "order from above",
    "order from the left",
    "order by size",
    "order by size, smallest first",
    "twins of another colour",
    "twins of its colour",
)
OBJECT_FACT_NAMES: tuple[str, ...] = (
    *(f"component {name}" for name in _PART_FACTS),
    *(f"object {name}" for name in _PART_FACTS),
    "object minority cells",
    "object symmetric",
    "nearest side",
)
_IN_PLACE = (
    "slide_down",
    "slide_up",
    "slide_left",
    "slide_right",
    "flip_objects_lr",
    "flip_objects_ud",
    "turn_objects",
    "twin_colour",
    "nearest_colour",
    "keep_largest",
    "bars_rows",
    "bars_cols",
    "bars_rising",
    "bars_parts_rows",
    "bars_parts_cols",
)
_PART_CHOICES = (
    "size",
    "height",
    "width",
    "colours",
    "holes",
    "minority",
    "top",
    "left",
    "copies",
    "density",
    "symmetry",
    "others",
)
OBJECT_SOURCES: tuple[str, ...] = (
    *_IN_PLACE,
    *(
        f"crop_{most}_{name}_{kind}"
        for kind in ("component", "object", "alone", "panel")
        for name in _PART_CHOICES
        for most in ("most", "least")
    ),
)
_SOURCE_AT = {name: i for i, name in enumerate(OBJECT_SOURCES)}


# ---------------------------------------------------------------- whole components and objects


def _ranks(values: Ints, falling: bool) -> Ints:
    """Dense ranks 1.., equal values share one."""
    levels, which = np.unique(-values if falling else values, return_inverse=True)
    del levels
    return which + 1


def _part_facts(parts: Parts, g: Grid, hashes: Ints) -> Grid:
    """Rows of _PART_FACTS (n, rows, cols) for one labelling."""
    rows, cols = g.shape
    label = parts.label
    real = parts.colour > 0
    high, wide = parts.bottom - parts.top + 1, parts.right - parts.left + 1
    # One value per part, spread over its cells at once.
    whole = {name: np.zeros(real.size, np.int64) for name in _WHOLE_PART_FACTS}
    whole["height"][:], whole["width"][:] = high, wide
    if real.any():
        whole["order from above"][real] = _ranks(parts.top[real], False)
        whole["order from the left"][real] = _ranks(parts.left[real], False)
        whole["order by size"][real] = _ranks(parts.size[real], True)
        whole["order by size, smallest first"][real] = _ranks(parts.size[real], False)
        same = hashes[real][:, None] == hashes[real]
        alike = parts.colour[real][:, None] == parts.colour[real]
        whole["twins of another colour"][real] = (same & ~alike).sum(1)
        whole["twins of its colour"][real] = (same & alike).sum(1)
    fact = dict(zip(whole, np.stack(list(whole.values()))[:, label], strict=True))
    row, col = np.arange(rows)[:, None], np.arange(cols)[None]
    inside = {
        "row inside": row - parts.top[label],
        "row inside from below": parts.bottom[label] - row,
        "col inside": col - parts.left[label],
        "col inside from the right": parts.right[label] - col,
    }
    fact |= inside
    fact["ring inside"] = np.minimum.reduce(list(inside.values()))
    largest = np.zeros(COLOURS, np.int64)
    np.maximum.at(largest, parts.colour, parts.size)
    is_largest = real & (parts.size == largest[parts.colour])
    fact["largest of its colour"] = is_largest.astype(np.int64)[label]
    fact["taller or wider"] = (1 + np.sign(high - wide))[label]
    return np.minimum(np.stack(in_order(fact, _PART_FACTS)), 7).astype(np.uint8)


def _slid(g: Grid, label: Ints, colour: Ints) -> Grid:
    """Every labelled part with a colour moved down, rigidly, until border or another stop it."""
    rows, cols = g.shape
    ids = np.flatnonzero(colour > 0).tolist()
    if len(ids) > 40:
        return g
    cells = {i: np.nonzero(label == i) for i in ids}
    taken = np.zeros((rows + 1, cols), bool)
    taken[rows] = True
    out = np.zeros_like(g)
    # Parts whose lowest cell is lowest go first; a part is blocked by those already at rest.
    for i in sorted(ids, key=lambda i: (-int(cells[i][0].max()), int(cells[i][1].min()))):
        r, c = cells[i]
        step = 0
        while not taken[r + step + 1, c].any():
            step += 1
        taken[r + step, c] = True
        out[r + step, c] = g[r, c]
    return out


def _nearest(g: Grid) -> Grid:
    """Colour of the nearest filled cell in 4-steps, 0 in a tie of colours; filled cells keep."""
    out = g.copy()
    open_cells = out == 0
    for _ in range(g.shape[0] + g.shape[1]):
        if not open_cells.any() or open_cells.all():
            break
        pad = np.zeros((g.shape[0] + 2, g.shape[1] + 2), np.uint8)
        pad[1:-1, 1:-1] = np.where(out == 255, 0, out)
        near = np.stack([pad[:-2, 1:-1], pad[2:, 1:-1], pad[1:-1, :-2], pad[1:-1, 2:]])
        most = near.max(0)
        least = np.where(near > 0, near, 255).min(0)
        reached = open_cells & (most > 0)
        if not reached.any():
            break
        out[reached] = np.where(most == least, most, 255)[reached]
        open_cells &= ~reached
    out[out == 255] = 0
    return out


def _bars(counts: Ints, colours: Ints) -> Grid | None:
    """One row per colour, as long as its count, filled from the left."""
    if not counts.size or counts.max() > MAX_SIDE or counts.max() < 1:
        return None
    return np.where(np.arange(counts.max()) < counts[:, None], colours[:, None], 0).astype(np.uint8)


def object_bank(grid: Grid) -> tuple[Grid, Grid, Grid]:
    """Planes (n, 30, 30) and sizes (n, 2) of the n OBJECT_SOURCES, and facts (f, rows, cols) of the
    f OBJECT_FACT_NAMES, of one grid; all uint8.

    grid (rows, cols) uint8, colours 0..9, sides 1..30. A plane holds colours, OUTSIDE beyond its
    size; a source that the grid does not give has size 0. Raises nothing for such a grid.
    """
    g, back, _ = canonical(grid)
    same, objects = parts_of(g)
    rows, cols = g.shape
    counts = colour_counts(objects.label, g, objects.size.size)
    plain, _ = shape_hashes(same, None)
    shape, mirrored = shape_hashes(objects, g)
    minority = np.where(counts[:, 1:] > 0, counts[:, 1:], 1 << 20).min(1)
    minority = np.where((counts[:, 1:] > 0).sum(1) > 1, minority, 0)
    row, col = np.arange(rows)[:, None], np.arange(cols)[None]
    away = np.stack(np.broadcast_arrays(row, rows - 1 - row, col, cols - 1 - col))
    facts = np.concatenate(
        (
            _part_facts(same, g, plain),
            _part_facts(objects, g, shape),
            np.minimum(minority, 7)[objects.label][None].astype(np.uint8),
            (mirrored & (objects.colour > 0))[objects.label][None].astype(np.uint8),
            away.argmin(0)[None].astype(np.uint8),
        )
    )
    planes = np.full((len(OBJECT_SOURCES), MAX_SIDE, MAX_SIDE), OUTSIDE, np.uint8)
    sizes = np.zeros((len(OBJECT_SOURCES), 2), np.uint8)

    def put(name: str, part: Grid) -> None:
        if 0 < part.shape[0] <= MAX_SIDE and 0 < part.shape[1] <= MAX_SIDE:
            at = _SOURCE_AT[name]
            planes[at, : part.shape[0], : part.shape[1]] = part
            sizes[at] = part.shape

    put("slide_down", _slid(g, objects.label, objects.colour))
    put("slide_up", _slid(g[::-1], objects.label[::-1], objects.colour)[::-1])
    put("slide_left", _slid(g.T[::-1], objects.label.T[::-1], objects.colour)[::-1].T)
    put("slide_right", _slid(g.T, objects.label.T, objects.colour).T)
    real = np.flatnonzero(objects.colour)
    turned = [np.zeros_like(g) for _ in range(3)]
    for i in real.tolist():
        box = part_box(objects, i)
        own = g[box] * (objects.label[box] == i)
        for out, part in zip(turned, (own[:, ::-1], own[::-1], own[::-1, ::-1]), strict=True):
            out[box] = np.where(part > 0, part, out[box])
    for name, out in zip(
        ("flip_objects_lr", "flip_objects_ud", "turn_objects"), turned, strict=True
    ):
        put(name, out)
    filled = np.flatnonzero(same.colour)
    twin = same.colour.copy()
    for i in filled.tolist():
        others = filled[(plain[filled] == plain[i]) & (same.colour[filled] != same.colour[i])]
        if others.size:
            twin[i] = same.colour[others[0]]
    put("twin_colour", twin.astype(np.uint8)[same.label])
    put("nearest_colour", _nearest(g))
    if filled.size:
        put("keep_largest", g * (same.label == filled[same.size[filled].argmax()]))
    total = np.bincount(g.ravel(), minlength=COLOURS)[1:]
    seen = np.flatnonzero(total)
    bars = _bars(total[seen], seen + 1)
    if bars is not None:
        put("bars_rows", bars)
        put("bars_cols", bars.T)
        put("bars_rising", bars.T[::-1])
    pieces = np.bincount(same.colour[filled], minlength=COLOURS)[1:]
    order = np.argsort(-pieces, kind="stable")[: np.count_nonzero(pieces)]
    bars = _bars(pieces[order], order + 1)
    if bars is not None:
        put("bars_parts_rows", bars)
        put("bars_parts_cols", bars.T)
    for kind, parts in (("component", same), ("object", objects), ("alone", objects)):
        members = filled if kind == "component" else real
        if 1 < members.size <= 60:
            boxes = [part_box(parts, i) for i in members.tolist()]
            crops = [g[b] for b in boxes]
            if kind == "alone":
                crops = [
                    c * (parts.label[b] == i)
                    for c, b, i in zip(crops, boxes, members.tolist(), strict=True)
                ]
            marks = plain if kind == "component" else shape
            _put_choices(put, kind, crops, parts.top[members], parts.left[members], marks[members])
    row_line, col_line = separators_of(*line_counts(g))
    seg_r, seg_c = segments_of(row_line), segments_of(col_line)
    n_r, n_c = int(seg_r.max()) + 1, int(seg_c.max()) + 1
    if 1 < n_r * n_c <= 60:
        panels = [g[seg_r == i][:, seg_c == j] for i in range(n_r) for j in range(n_c)]
        top, left = np.divmod(np.arange(n_r * n_c), n_c)
        keys = [c.tobytes() + bytes(c.shape) for c in panels]
        marks = np.array([keys.index(k) for k in keys])
        _put_choices(put, "panel", panels, top, left, marks)
    return recoloured(planes, back), sizes, facts


def _put_choices(
    put: Callable[[str, Grid], None],
    kind: str,
    crops: list[Grid],
    top: Ints,
    left: Ints,
    marks: Ints,
) -> None:
    """For each of _PART_CHOICES the part with most and with least, where it is the only one."""
    n = len(crops)
    values = np.zeros((len(_PART_CHOICES), n), np.int64)
    for i, crop in enumerate(crops):
        counts = np.bincount(crop.ravel(), minlength=COLOURS)
        own = counts[1:][counts[1:] > 0]
        filled = int(own.sum())
        choice = {
            "size": filled,
            "height": crop.shape[0],
            "width": crop.shape[1],
            "colours": own.size,
            "holes": counts[0],
            "minority": own.min() if own.size > 1 else 0,
            "top": top[i],
            "left": left[i],
            "copies": np.count_nonzero(marks == marks[i]),
            "density": 1000 * filled // crop.size,
            "symmetry": 2 * bool((crop == crop[:, ::-1]).all()) + bool((crop == crop[::-1]).all()),
            "others": own.max() if own.size else 0,
        }
        values[:, i] = in_order(choice, _PART_CHOICES)
    for name, value in zip(_PART_CHOICES, values, strict=True):
        for most, target in (("most", value.max()), ("least", value.min())):
            chosen = np.flatnonzero(value == target)
            if chosen.size == 1:
                put(f"crop_{most}_{name}_{kind}", crops[int(chosen[0])])


# ---------------------------------------------------------------- counts

# Comparisons of a cell's place in the output with a count: 0 before it, 1 at it, 2 after it.
_COUNTS = (
    "components",
    "objects",
    "colours_filled",
    "filled_cells",
    "commonest_cells",
    "rarest_cells",
    "largest_component_cells",
    "components_commonest",
    "own",
)
COUNT_FACT_NAMES: tuple[str, ...] = tuple(
    f"{place} against {name}"
    for name in _COUNTS
    for place in ("row", "col", "number", "row from below")
)


def count_facts(analysis: GridAnalysis, shape: tuple[int, int]) -> Grid:
    """Rows of COUNT_FACT_NAMES (n, cells)."""
    rows, cols = shape
    number = np.arange(rows * cols)
    row, col = np.divmod(number, cols)
    places = np.stack([row, col, number, rows - 1 - row])
    counts = analysis.size_values[0, [SIZE_RULE_NAMES.index(name) for name in _COUNTS]].astype(
        np.int64
    )
    return (
        (1 + np.sign(places[None] - counts[:, None, None]))
        .reshape(-1, number.size)
        .astype(np.uint8)
    )
