"""Tests of grid_features: shapes and ranges, colour equivariance, and small examples by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import grid_features as gf


def grid_of(*rows: str) -> np.ndarray:
    return np.array([[int(ch) for ch in row] for row in rows], np.uint8)


def source(analysis: gf.GridAnalysis, name: str) -> np.ndarray:
    i = gf.SOURCE_INDEX[name]
    rows, cols = analysis.sizes[i]
    return analysis.planes[i, :rows, :cols]


def feature(analysis: gf.GridAnalysis, name: str) -> np.ndarray:
    return analysis.cells[gf.CELL_FEATURE_NAMES.index(name)]


def assert_same(a: gf.GridAnalysis, b: gf.GridAnalysis) -> None:
    assert a.background == b.background
    wrong = [
        n for n, p, q in zip(gf.SOURCE_NAMES, a.planes, b.planes, strict=True) if (p != q).any()
    ]
    assert wrong == []
    np.testing.assert_array_equal(a.sizes, b.sizes)
    np.testing.assert_array_equal(a.cells, b.cells)
    np.testing.assert_array_equal(a.size_values, b.size_values)


def check_ranges(analysis: gf.GridAnalysis, grid: np.ndarray) -> None:
    side = gf.MAX_SIDE
    assert analysis.planes.shape == (gf.N_SOURCES, side, side)
    assert analysis.sizes.shape == (gf.N_SOURCES, 2)
    assert analysis.cells.shape == (gf.N_CELL_FEATURES, *grid.shape)
    assert analysis.size_values.shape == (2, gf.N_SIZE_RULES)
    for array in (analysis.planes, analysis.sizes, analysis.cells, analysis.size_values):
        assert array.dtype == np.uint8
    assert analysis.planes.max() <= gf.OUTSIDE
    assert analysis.cells.max() < gf.CELL_FEATURE_BINS
    assert analysis.sizes.max() <= side
    assert analysis.size_values.max() <= side
    for name, plane, (rows, cols) in zip(
        gf.SOURCE_NAMES, analysis.planes, analysis.sizes.tolist(), strict=True
    ):
        inside = plane != gf.OUTSIDE
        if name in gf.PLANE_SOURCES:
            assert (rows, cols) == (0, 0), name
            assert inside.all() or not inside.any(), name
        else:
            assert inside[:rows, :cols].all(), name
            assert inside.sum() == rows * cols, name
    np.testing.assert_array_equal(source(analysis, "identity"), grid)


def dense_grids(limit: int = 12) -> st.SearchStrategy[np.ndarray]:
    shape = st.tuples(st.integers(1, limit), st.integers(1, limit))
    return hnp.arrays(np.uint8, shape, elements=st.integers(0, 9))


def sparse_grids() -> st.SearchStrategy[np.ndarray]:
    def build(seed: int, rows: int, cols: int, colours: int, blocks: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        grid = np.full((rows, cols), rng.choice([0, 0, 0, 7]), np.uint8)
        for _ in range(blocks):
            top, left = rng.integers(0, rows), rng.integers(0, cols)
            high, wide = rng.integers(1, 5, 2)
            grid[top : top + high, left : left + wide] = rng.integers(0, colours + 1)
        return grid

    return st.builds(
        build,
        st.integers(0, 2**32 - 1),
        st.integers(1, 30),
        st.integers(1, 30),
        st.integers(1, 9),
        st.integers(0, 12),
    )


any_grid = st.one_of(dense_grids(), sparse_grids())
luts = st.permutations(range(1, 10)).map(lambda rest: np.array([0, *rest], np.uint8))


@settings(max_examples=120, deadline=None)
@given(any_grid, luts)
def test_relabel_equals_analysing_the_recoloured_grid(grid: np.ndarray, lut: np.ndarray) -> None:
    assert_same(gf.relabel(gf.analyse(grid), lut), gf.analyse(lut[grid]))


@settings(max_examples=80, deadline=None)
@given(any_grid)
def test_shapes_ranges_and_determinism(grid: np.ndarray) -> None:
    before = grid.copy()
    analysis = gf.analyse(grid)
    check_ranges(analysis, grid)
    assert_same(analysis, gf.analyse(grid.copy()))
    np.testing.assert_array_equal(grid, before)


@settings(max_examples=80, deadline=None)
@given(any_grid, any_grid, luts)
def test_control_features_are_finite_and_colour_free(
    grid: np.ndarray, output: np.ndarray, lut: np.ndarray
) -> None:
    control = gf.control_features(gf.analyse(grid), grid, output)
    assert control.shape == (gf.N_CONTROL,)
    assert control.dtype == np.float32
    assert np.isfinite(control).all()
    assert control.min() >= -1.0
    assert control.max() <= 1.0
    again = gf.control_features(gf.analyse(lut[grid]), lut[grid], lut[output])
    np.testing.assert_allclose(again, control, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (30, 30), (2, 3)])
@pytest.mark.parametrize("colours", [1, 2, 10])
def test_extreme_grids(shape: tuple[int, int], colours: int) -> None:
    grid = np.random.default_rng(0).integers(0, colours, shape).astype(np.uint8)
    check_ranges(gf.analyse(grid), grid)
    check_ranges(gf.analyse(np.full(shape, 4)), np.full(shape, 4))


def test_names_are_unique_and_counted() -> None:
    for names, n in (
        (gf.SOURCE_NAMES, gf.N_SOURCES),
        (gf.CELL_FEATURE_NAMES, gf.N_CELL_FEATURES),
        (gf.SIZE_RULE_NAMES, gf.N_SIZE_RULES),
        (gf.CONTROL_NAMES, gf.N_CONTROL),
    ):
        assert len(set(names)) == len(names) == n
    assert gf.SOURCE_NAMES[0] == "identity"


@pytest.mark.parametrize(
    "bad", [np.zeros(4), np.zeros((0, 3)), np.zeros((31, 2)), np.full((2, 2), 10), -np.ones((2, 2))]
)
def test_bad_grids_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        gf.analyse(bad.astype(np.int64))


def test_bad_tables_are_refused() -> None:
    analysis = gf.analyse(np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="permutation"):
        gf.relabel(analysis, np.array([1, 0, *range(2, 10)]))
    with pytest.raises(ValueError, match="permutation"):
        gf.relabel(analysis, np.zeros(10, int))


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
    for parts, many in zip(gf._parts(grid), (False, True), strict=True):
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
    rays = gf._rays(grid)
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


EXAMPLES = [
    ("rot90", ("123", "456"), ("36", "25", "14")),
    ("transpose", ("123", "456"), ("14", "25", "36")),
    ("upscale_2", ("10",), ("1100", "1100")),
    ("fractal", ("10", "11"), ("1000", "1100", "1010", "1111")),
    ("pinwheel", ("12", "34"), ("1231", "3442", "2443", "1321")),
    ("dedup", ("1122", "1122", "3344"), ("12", "34")),
    ("unit_period", ("1212", "3434", "1212"), ("12", "34")),
    ("bbox", ("0000", "0120", "0300"), ("12", "30")),
    ("crop_largest_component", ("1100", "1000", "0002"), ("11", "10")),
    ("crop_rarest", ("1100", "1000", "0002"), ("2",)),
    ("crop_frame_interior", ("22220", "21320", "22220"), ("13",)),
    ("half_right", ("12534", "12534"), ("34", "34")),
    ("half_bottom", ("12", "34"), ("34",)),
    ("shift_down", ("12", "30"), ("00", "12")),
    ("gravity_down", ("12", "00", "30"), ("00", "10", "32")),
    ("gravity_right", ("1020",), ("0012",)),
    ("between_rows", ("10010", "20030"), ("11110", "20030")),
    ("fill_enclosed", ("3330", "3030", "3330"), ("3330", "3330", "3330")),
    ("object_minority", ("1120", "0000", "3000"), ("2220", "0000", "3000")),
    ("object_majority", ("1120", "0000", "3000"), ("1110", "0000", "3000")),
    ("row_common", ("1102", "0030"), ("1111", "3333")),
    ("outline", ("0000", "0500", "0000"), ("5550", "5550", "5550")),
    ("denoise_small", ("1100", "0002"), ("1100", "0000")),
    ("object_bbox", ("100", "100", "111"), ("111", "111", "111")),
    ("cell_map", ("12502", "10500", "55555", "00530", "00533"), ("12", "03")),
    ("cell_overlay", ("12500", "10540", "55555", "00530", "00533"), ("12", "13")),
    ("component_neighbour", ("11000", "12003", "00000"), ("22222", "21220", "22222")),
]


@pytest.mark.parametrize(("name", "given_rows", "expected"), EXAMPLES)
def test_source_examples(name: str, given_rows: tuple[str], expected: tuple[str]) -> None:
    np.testing.assert_array_equal(
        source(gf.analyse(grid_of(*given_rows)), name), grid_of(*expected)
    )


def test_plane_examples() -> None:
    analysis = gf.analyse(grid_of("12", "34"))
    planes = dict(zip(gf.SOURCE_NAMES, analysis.planes, strict=True))
    np.testing.assert_array_equal(planes["tile"][:3, :4], grid_of("1212", "3434", "1212"))
    np.testing.assert_array_equal(planes["mirror_tile"][:3, :4], grid_of("1221", "3443", "3443"))
    analysis = gf.analyse(grid_of("2012", "0220"))
    planes = dict(zip(gf.SOURCE_NAMES, analysis.planes, strict=True))
    assert (planes["colour_rank_1"] == 2).all()
    assert (planes["colour_rarest"] == 1).all()
    np.testing.assert_array_equal(planes["rank_by_row"][:3, :2], grid_of("22", "11", "00"))


def test_period_is_completed_over_unknown_cells() -> None:
    whole = np.tile(grid_of("123", "456"), (4, 4))
    part = whole.copy()
    part[2:5, 3:7] = 0
    plane = gf.analyse(part).planes[gf.SOURCE_INDEX["period_complete"]]
    np.testing.assert_array_equal(plane[:8, :12], whole)
    covered = whole.copy()
    covered[2:5, 3:7] = 9
    analysis = gf.analyse(covered)
    plane = analysis.planes[gf.SOURCE_INDEX["mosaic_period"]]
    np.testing.assert_array_equal(plane[:8, :12], whole)
    np.testing.assert_array_equal(source(analysis, "crop_hidden_period"), whole[2:5, 3:7])


def test_symmetry_is_completed_about_an_axis_off_the_middle() -> None:
    quarter = np.random.default_rng(1).integers(1, 8, (6, 6)).astype(np.uint8)
    half = np.concatenate((quarter, quarter[:, ::-1]), 1)
    whole = np.concatenate((half, half[::-1]), 0)[1:, 2:]
    covered = whole.copy()
    covered[1:4, 0:3] = 0
    np.testing.assert_array_equal(source(gf.analyse(covered), "fill_best_symmetry"), whole)


def test_most_coloured_object_is_the_template() -> None:
    grid = grid_of("010000", "121000", "010010", "000111", "000010")
    expected = grid_of("010000", "121000", "010010", "000121", "000010")
    np.testing.assert_array_equal(source(gf.analyse(grid), "object_template"), expected)


def test_absent_sources_say_so() -> None:
    analysis = gf.analyse(grid_of("000", "000"))
    for name in ("bbox", "crop_frame_interior", "pinwheel", "cell_map", "crop_odd_shape"):
        i = gf.SOURCE_INDEX[name]
        assert analysis.sizes[i].tolist() == [0, 0]
        assert (analysis.planes[i] == gf.OUTSIDE).all()


def test_background_is_zero_or_else_the_commonest_colour() -> None:
    assert gf.analyse(grid_of("333", "330")).background == 0
    assert gf.analyse(grid_of("377", "733")).background == 3  # a tie: first in raster order
    assert gf.analyse(grid_of("377", "737")).background == 7


def test_cell_feature_examples() -> None:
    analysis = gf.analyse(grid_of("3330", "3030", "3330", "0000", "0011"))
    np.testing.assert_array_equal(
        feature(analysis, "enclosure"), grid_of("0001", "0201", "0001", "1111", "1100")
    )
    kind = feature(analysis, "component_kind")
    assert kind[0, 0] == 5
    assert kind[4, 3] == 2
    assert kind[3, 0] == 0
    assert feature(analysis, "component_holes")[0, 0] == 1
    assert feature(analysis, "component_size")[4, 2] == 2
    assert feature(analysis, "component_size_rank")[0, 0] == 1
    assert feature(analysis, "component_size_rank")[4, 2] == 6


def test_size_rule_examples() -> None:
    analysis = gf.analyse(grid_of("1100", "0020", "3000"))
    rows = dict(zip(gf.SIZE_RULE_NAMES, analysis.size_values[0].tolist(), strict=True))
    cols = dict(zip(gf.SIZE_RULE_NAMES, analysis.size_values[1].tolist(), strict=True))
    assert (rows["own"], cols["own"], rows["other"]) == (3, 4, 4)
    assert (rows["own_third"], cols["own_third"], cols["own_half"]) == (1, 0, 2)
    assert (rows["colours_filled"], rows["components"], rows["objects"]) == (3, 3, 2)
    assert (rows["area"], rows["filled_cells"], cols["own_squared"]) == (12, 4, 16)


def test_place_pads_and_crops() -> None:
    planes = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(gf.place(planes, (1, 2)), planes[:, :1, :2])
    wide = gf.place(planes, (1, 4))
    assert wide.shape == (2, 1, 4)
    assert (wide[:, :, 3] == gf.OUTSIDE).all()


def test_match_and_control_of_a_flip() -> None:
    grid = grid_of("120", "400")
    output = np.ascontiguousarray(grid[:, ::-1])
    analysis = gf.analyse(grid)
    share, same_size = gf.match(analysis, output)
    flip = gf.SOURCE_INDEX["fliplr"]
    assert share[flip] == 1.0
    assert same_size[flip]
    assert not same_size[gf.SOURCE_INDEX["transpose"]]
    control = dict(
        zip(gf.CONTROL_NAMES, gf.control_features(analysis, grid, output).tolist(), strict=True)
    )
    assert control["share_fliplr"] == control["size_same"] == control["rows_own"] == 1.0
    assert control["palette_same"] == control["counts_same"] == control["covered"] == 1.0
    assert control["colour_map"] == 0.0
    assert control["changed"] == pytest.approx(4 / 6)
