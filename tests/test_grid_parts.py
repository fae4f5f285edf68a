"""A grid taken apart: components against a flood fill, rays against a walk, separators by hand."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import grid_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import grid_parts as gp


def dense_grids(limit: int) -> st.SearchStrategy[np.ndarray]:
    shape = st.tuples(st.integers(1, limit), st.integers(1, limit))
    return hnp.arrays(np.uint8, shape, elements=st.integers(0, 9))


def flood(grid: np.ndarray, many_coloured: bool) -> np.ndarray:
    """Slow component labels numbered in raster order."""
    rows, cols = grid.shape
    label = np.full(grid.shape, -1)
    n = 0
    for start in np.ndindex(rows, cols):
        if label[start] >= 0:
            continue
        label[start] = n
        todo = [start]
        while todo:
            r, c = todo.pop()
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    q = (r + dr, c + dc)
                    if not (0 <= q[0] < rows and 0 <= q[1] < cols) or label[q] >= 0:
                        continue
                    a, b = int(grid[r, c]), int(grid[q])
                    if many_coloured:
                        joined = a > 0 and b > 0
                    else:
                        joined = a == b and (a > 0 or dr == 0 or dc == 0)
                    if joined:
                        label[q] = n
                        todo.append(q)
        n += 1
    return label


@settings(max_examples=60, deadline=None)
@given(dense_grids(8), st.integers(1, 3))
def test_components_match_a_flood_fill(grid: np.ndarray, colours: int) -> None:
    grid = np.where(grid > colours, 0, grid).astype(np.uint8)
    for parts, many in zip(gp.parts_of(grid), (False, True), strict=True):
        expected = flood(grid, many)
        np.testing.assert_array_equal(parts.label, expected)
        for i in range(parts.size.size):
            rows, cols = np.nonzero(expected == i)
            assert parts.size[i] == rows.size
            box = (parts.top[i], parts.bottom[i], parts.left[i], parts.right[i])
            assert box == (rows.min(), rows.max(), cols.min(), cols.max())


@settings(max_examples=60, deadline=None)
@given(dense_grids(7))
def test_rays_match_a_walk(grid: np.ndarray) -> None:
    grid = np.where(grid > 4, 0, grid).astype(np.uint8)
    rays = gp.rays_of(grid)
    steps = {
        "up": (-1, 0),
        "down": (1, 0),
        "left": (0, -1),
        "right": (0, 1),
        "up_left": (-1, -1),
        "down_right": (1, 1),
        "up_right": (-1, 1),
        "down_left": (1, -1),
    }
    for name, (dr, dc) in steps.items():
        expected = np.zeros_like(grid)
        for r, c in np.ndindex(grid.shape):
            p, q = r + dr, c + dc
            while 0 <= p < grid.shape[0] and 0 <= q < grid.shape[1]:
                if grid[p, q]:
                    expected[r, c] = grid[p, q]
                    break
                p, q = p + dr, q + dc
        np.testing.assert_array_equal(getattr(rays, name), expected, err_msg=name)


def test_canonical_colours_count_down_and_ties_go_by_place() -> None:
    g, back, counts = gp.canonical(grid_of("7730", "3500"))
    assert back[:4].tolist() == [0, 7, 3, 5]  # 7 and 3 twice each, 7 first
    assert counts.tolist() == [3, 2, 2, 1]
    np.testing.assert_array_equal(g, grid_of("1120", "2300"))
    np.testing.assert_array_equal(back[g], grid_of("7730", "3500"))
    assert gp.canonical(grid_of("377", "737"))[1][0] == 7  # without 0 the commonest is background
    planes = np.array([0, 1, 2, gp.OUTSIDE], np.uint8)
    assert gp.recoloured(planes, back).tolist() == [0, 7, 3, gp.OUTSIDE]


def test_shapes_are_alike_wherever_they_lie() -> None:
    grid = grid_of("110220", "100200", "000000", "330044", "030040")
    same, _ = gp.parts_of(grid)
    shape, mirrored = gp.shape_hashes(same, None)
    part = {int(c): i for i, c in enumerate(same.colour) if c}
    assert shape[part[1]] == shape[part[2]] == shape[part[4]] != shape[part[3]]
    assert not mirrored[part[1]]


def test_a_symmetric_object_has_symmetric_colours() -> None:
    grid = grid_of("010", "111", "000", "010", "112")
    _, objects = gp.parts_of(grid)
    upper, lower = objects.real
    for colours, expected in ((None, (True, True)), (grid, (True, False))):
        shape, mirrored = gp.shape_hashes(objects, colours)
        assert shape[upper] == shape[lower]
        assert (mirrored[upper], mirrored[lower]) == expected


@pytest.mark.parametrize(
    ("rows", "row_segments", "col_segments"),
    [
        (("1250", "1050", "5555", "0053"), [0, 0, -1, 1], [0, 0, -1, 1]),
        (("120", "000", "304"), [0, -1, 1], [0, 0, 0]),  # background where no colour has a line
        (("12", "34"), [0, 0], [0, 0]),
        (("11", "11"), [0, 0], [0, 0]),  # one colour alone separates nothing
    ],
)
def test_separators_and_segments(
    rows: tuple[str, ...], row_segments: list[int], col_segments: list[int]
) -> None:
    a = gp.take_apart(grid_of(*rows))
    assert (a.row_segments.tolist(), a.col_segments.tolist()) == (row_segments, col_segments)


def test_anatomy_of_a_ring_and_a_cell() -> None:
    a = gp.take_apart(grid_of("00000", "03330", "03050", "03330"))
    assert a.box == (slice(1, 4), slice(1, 4))
    colour = a.same.colour.tolist()
    kinds = dict(zip(colour, zip(a.frame.tolist(), a.open_part.tolist(), strict=True), strict=True))
    assert kinds == {0: (False, False), 1: (False, True), 2: (False, False)}
    ring = gp.take_apart(grid_of("333", "303", "333"))
    assert ring.frame[ring.same.label[0, 0]]
    assert not ring.open_part[ring.same.label[1, 1]]
    assert gp.take_apart(grid_of("00", "00")).box is None
    both = a.objects.real.tolist().index(a.objects.label[1, 1])
    assert a.object_counts[both].tolist() == [0, 7, 1, 0, 0, 0, 0, 0, 0, 0]
