"""Features of grids and pairs: shapes and ranges, colour equivariance, every value by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import grid_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import grid_features as gf
from grid_parts import MAX_SIDE, OUTSIDE
from grid_transforms import N_SOURCES, PLANE_SOURCES, SOURCE_INDEX, SOURCE_NAMES


def feature(analysis: gf.GridAnalysis, name: str) -> np.ndarray:
    return analysis.cells[gf.CELL_FEATURE_NAMES.index(name)]


def assert_same(a: gf.GridAnalysis, b: gf.GridAnalysis) -> None:
    assert a.background == b.background
    wrong = [n for n, p, q in zip(SOURCE_NAMES, a.planes, b.planes, strict=True) if (p != q).any()]
    assert wrong == []
    np.testing.assert_array_equal(a.sizes, b.sizes)
    np.testing.assert_array_equal(a.cells, b.cells)
    np.testing.assert_array_equal(a.size_values, b.size_values)


def check_ranges(analysis: gf.GridAnalysis, grid: np.ndarray) -> None:
    side = MAX_SIDE
    assert analysis.planes.shape == (N_SOURCES, side, side)
    assert analysis.sizes.shape == (N_SOURCES, 2)
    assert analysis.cells.shape == (gf.N_CELL_FEATURES, *grid.shape)
    assert analysis.size_values.shape == (2, gf.N_SIZE_RULES)
    for array in (analysis.planes, analysis.sizes, analysis.cells, analysis.size_values):
        assert array.dtype == np.uint8
    assert analysis.planes.max() <= OUTSIDE
    assert analysis.cells.max() < gf.CELL_FEATURE_BINS
    assert analysis.sizes.max() <= side
    assert analysis.size_values.max() <= side
    for name, plane, (rows, cols) in zip(
        SOURCE_NAMES, analysis.planes, analysis.sizes.tolist(), strict=True
    ):
        inside = plane != OUTSIDE
        if name in PLANE_SOURCES:
            assert (rows, cols) == (0, 0), name
            assert inside.all() or not inside.any(), name
        else:
            assert inside[:rows, :cols].all(), name
            assert inside.sum() == rows * cols, name
    np.testing.assert_array_equal(analysis.planes[0, : grid.shape[0], : grid.shape[1]], grid)


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
def test_a_recoloured_grid_has_the_recoloured_analysis(grid: np.ndarray, lut: np.ndarray) -> None:
    """Renaming colours, but for 0, renames planes and background and leaves all else alone."""
    plain = gf.analyse(grid)
    expected = replace(
        plain,
        planes=np.append(lut, np.uint8(OUTSIDE))[plain.planes],
        background=int(lut[plain.background]),
    )
    assert_same(expected, gf.analyse(lut[grid]))


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
        (SOURCE_NAMES, N_SOURCES),
        (gf.CELL_FEATURE_NAMES, gf.N_CELL_FEATURES),
        (gf.SIZE_RULE_NAMES, gf.N_SIZE_RULES),
        (gf.CONTROL_NAMES, gf.N_CONTROL),
    ):
        assert len(set(names)) == len(names) == n
    assert SOURCE_NAMES[0] == "identity"


@pytest.mark.parametrize(
    "bad", [np.zeros(4), np.zeros((0, 3)), np.zeros((31, 2)), np.full((2, 2), 10), -np.ones((2, 2))]
)
def test_bad_grids_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        gf.analyse(bad.astype(np.int64))


def test_background_is_zero_or_else_the_commonest_colour() -> None:
    assert gf.analyse(grid_of("333", "330")).background == 0
    assert gf.analyse(grid_of("377", "733")).background == 3  # a tie: first in raster order
    assert gf.analyse(grid_of("377", "737")).background == 7


def test_values_are_ordered_by_name_and_none_is_missing() -> None:
    assert gf.in_order({"b": 2, "a": 1}, ("a", "b")) == [1, 2]
    for named in ({"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "c": 3}):
        with pytest.raises(KeyError, match=r"'[bc]'"):
            gf.in_order(named, ("a", "b"))


# ---------------------------------------------------------------- every cell feature

# A ring, two colours that make one object, two parts on the border; row 3 and col 3 separate.
CELLS: tuple[str, ...] = ("333000", "303010", "333020", "000000", "110001")
CELL_FEATURES: list[tuple[str, tuple[str, ...]]] = [
    ("colour_rank", ("111000", "101020", "111030", "000000", "220002")),
    ("component_size", ("777777", "717717", "777717", "777777", "227771")),
    ("component_size_log", ("333444", "303404", "333404", "444444", "114440")),
    ("component_size_rank", ("111000", "101060", "111060", "000000", "220006")),
    ("object_size_rank", ("111000", "101020", "111020", "000000", "220006")),
    ("component_sides_touched", ("222444", "202404", "222404", "444444", "224442")),
    ("enclosure", ("000111", "020101", "000101", "111111", "001110")),
    ("same_neighbours_4", ("222222", "202202", "222202", "123432", "112320")),
    ("filled_neighbours_8", ("242311", "474512", "242412", "453222", "111010")),
    ("parity", ("020202", "131313", "020202", "131313", "020202")),
    ("row_mod_3", ("000000", "111111", "222222", "000000", "111111")),
    ("col_mod_3", ("012012", "012012", "012012", "012012", "012012")),
    ("border_distance", ("000000", "011110", "012210", "011110", "000000")),
    ("uniform_lines", ("000200", "000200", "000200", "111311", "000200")),
    ("bbox_relation", ("222222", "211112", "211112", "211112", "222222")),
    ("diagonals", ("100042", "010420", "005200", "042100", "420010")),
    ("component_holes", ("111000", "101000", "111000", "000000", "000000")),
    ("component_kind", ("555000", "505010", "555010", "000000", "220001")),
    ("shape_copies", ("111000", "101030", "111030", "000000", "110003")),
    ("object_colours", ("111000", "101020", "111020", "000000", "110001")),
    ("row_fill", ("111111", "111111", "222222", "000000", "111111")),
    ("col_fill", ("233031", "233031", "233031", "233031", "233031")),
    ("ray_rows", ("241111", "243311", "243311", "000000", "244441")),
    ("ray_cols", ("222022", "444022", "331012", "331012", "111010")),
    ("ray_diagonals", ("122211", "243311", "122411", "233221", "112111")),
    ("panel_rank", ("111033", "111033", "111033", "000000", "333022")),
    ("component_position", ("313113", "232032", "313032", "200002", "331113")),
    ("half_rows", ("000000", "000000", "111111", "222222", "222222")),
    ("half_cols", ("000222", "000222", "000222", "000222", "000222")),
    ("colour_components", ("111222", "121232", "111212", "222222", "332223")),
]
MORE_CELL_FEATURES: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("component_size_rank", ("1022033304444055555",), ("6055033302222011111",)),
    ("component_size_rank", ("10", "01"), ("70", "07")),
    ("enclosure", ("3333", "3003", "3333"), ("0000", "0330", "0000")),
    ("enclosure", ("333", "303", "303", "333"), ("000", "030", "030", "000")),
    ("enclosure", ("3333333", "3000003", "3333333"), ("0000000", "0444440", "0000000")),
    ("enclosure", ("3" * 12, "300000000003", "3" * 12), ("0" * 12, "055555555550", "0" * 12)),
    ("enclosure", ("3333", "3003", "3003", "3333"), ("0000", "0660", "0660", "0000")),
    ("bbox_relation", ("00000", "01110", "01010", "01110"), ("00000", "02220", "02120", "02220")),
    (
        "component_kind",  # solid, col, symmetric, other
        ("1103", "1103", "0000", "2220", "0200", "0004", "0044"),
        ("4403", "4403", "0000", "6660", "0600", "0007", "0077"),
    ),
    ("row_fill", ("111", "110", "100", "000"), ("222", "333", "111", "000")),
    ("panel_rank", ("12", "30"), ("00", "00")),
]


def test_every_cell_feature_has_its_value() -> None:
    assert tuple(name for name, _ in CELL_FEATURES) == gf.CELL_FEATURE_NAMES


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [*((name, CELLS, expected) for name, expected in CELL_FEATURES), *MORE_CELL_FEATURES],
)
def test_cell_features(name: str, rows: tuple[str, ...], expected: tuple[str, ...]) -> None:
    np.testing.assert_array_equal(feature(gf.analyse(grid_of(*rows)), name), grid_of(*expected))


# ---------------------------------------------------------------- every size rule

SIZES = ("0000000", "1120100", "1000000", "0033300", "3033300")
SIZE_RULES = {  # of SIZES: rows, cols
    "own": (5, 7),
    "other": (7, 5),
    "own_x2": (10, 14),
    "own_x3": (15, 21),
    "own_x4": (20, 28),
    "own_half": (0, 0),
    "own_third": (0, 0),
    "own_plus_1": (6, 8),
    "own_minus_1": (4, 6),
    "own_plus_2": (7, 9),
    "own_minus_2": (3, 5),
    "own_x2_plus_1": (11, 15),
    "own_x2_minus_1": (9, 13),
    "own_half_down": (2, 3),
    "own_squared": (25, 0),
    "area": (0, 0),
    "one": (1, 1),
    "longer": (7, 7),
    "shorter": (5, 5),
    "colours_filled": (3, 3),
    "colours_all": (4, 4),
    "own_x_colours": (15, 21),
    "components": (5, 5),
    "objects": (4, 4),
    "filled_cells": (12, 12),
    "commonest_cells": (7, 7),
    "rarest_cells": (1, 1),
    "largest_component_cells": (6, 6),
    "components_commonest": (2, 2),
    "bbox_plus_2": (6, 7),
    "bbox_x2": (8, 10),
    "separators": (1, 2),
}


def size_rules(*rows: str) -> dict[str, tuple[int, int]]:
    sides = gf.analyse(grid_of(*rows)).size_values.T.tolist()
    return {name: (a, b) for name, (a, b) in zip(gf.SIZE_RULE_NAMES, sides, strict=True)}


def test_every_size_rule_has_its_value() -> None:
    assert tuple(SIZE_RULES) == gf.SIZE_RULE_NAMES
    assert size_rules(*SIZES) == SIZE_RULES


def test_size_rule_examples() -> None:
    of = size_rules("1100", "0020", "3000")
    assert (of["own_half"], of["own_third"], of["own_squared"]) == ((0, 2), (1, 0), (9, 16))
    assert (of["area"], of["objects"], of["components"]) == ((12, 12), (2, 2), (3, 3))
    empty = size_rules("00", "00")
    assert all(
        empty[name] == (0, 0)
        for name in ("components", "commonest_cells", "bbox_plus_2", "bbox_x2", "colours_filled")
    )
    assert (empty["colours_all"], empty["area"]) == ((1, 1), (4, 4))


# ---------------------------------------------------------------- every feature of a pair

PAIR_FEATURES = [
    (  # two cells added; the new colour is in no source
        ("1020", "0030"),
        ("1920", "0930"),
        dict.fromkeys(
            [
                "size_same",
                "rows_same",
                "cols_same",
                "rows_divide",
                "cols_divide",
                "rows_multiple",
                "cols_multiple",
                "added_only",
                "background_kept",
                "background_zero",
            ],
            1,
        )
        | dict.fromkeys(
            [
                "size_swapped",
                "rows_smaller",
                "cols_smaller",
                "rows_larger",
                "cols_larger",
                "rows_log_ratio",
                "cols_log_ratio",
                "lost_colours",
                "palette_same",
                "palette_subset",
                "counts_same",
                "removed_only",
                "changed_filled",
                "colour_map",
                "colour_bijection",
                "input_transpose",
                "output_transpose",
                "output_uniform",
                "output_row_uniform",
                "output_col_uniform",
            ],
            0,
        )
        | {
            "input_rows": 2 / 30,
            "input_cols": 4 / 30,
            "output_rows": 2 / 30,
            "output_cols": 4 / 30,
            "input_colours": 0.4,
            "output_colours": 0.5,
            "new_colours": 0.1,
            "input_density": 3 / 8,
            "output_density": 5 / 8,
            "changed": 2 / 8,
            "changed_background": 2 / 8,
            "input_fliplr": 2 / 8,
            "input_flipud": 4 / 8,
            "output_fliplr": 2 / 8,
            "output_flipud": 4 / 8,
            "output_rot180": 2 / 8,
            "best_share": 6 / 8,
            "covered": 6 / 8,
        },
    ),
    (  # background 5, sides swapped, nothing of the input left
        ("5555", "5255"),
        ("77", "77", "77", "77"),
        dict.fromkeys(
            [
                "size_swapped",
                "cols_smaller",
                "rows_larger",
                "cols_divide",
                "rows_multiple",
                "output_density",
                "output_fliplr",
                "output_flipud",
                "output_rot180",
                "output_uniform",
                "output_row_uniform",
                "output_col_uniform",
            ],
            1,
        )
        | dict.fromkeys(
            [
                "size_same",
                "rows_same",
                "cols_same",
                "rows_smaller",
                "cols_larger",
                "rows_divide",
                "cols_multiple",
                "changed",
                "added_only",
                "background_kept",
                "background_zero",
                "best_share",
                "covered",
            ],
            0,
        )
        | {
            "rows_log_ratio": 0.2,
            "cols_log_ratio": -0.2,
            "output_rows": 4 / 30,
            "output_cols": 2 / 30,
            "lost_colours": 0.2,
            "output_colours": 0.1,
            "input_density": 1 / 8,
            "input_fliplr": 6 / 8,
            "input_flipud": 6 / 8,
        },
    ),
    (  # the other way about
        ("10", "10", "20", "20"),
        ("1111", "2222"),
        {
            "rows_smaller": 1,
            "cols_smaller": 0,
            "rows_larger": 0,
            "cols_larger": 1,
            "rows_divide": 1,
            "cols_divide": 0,
            "rows_multiple": 0,
            "cols_multiple": 1,
            "input_rows": 4 / 30,
            "input_cols": 2 / 30,
            "output_uniform": 0,
            "output_row_uniform": 1,
            "output_col_uniform": 0,
            "background_kept": 0,
        },
    ),
    (  # one cell removed
        ("100", "020", "001"),
        ("100", "000", "001"),
        {
            "removed_only": 1,
            "added_only": 0,
            "changed": 1 / 9,
            "changed_filled": 1 / 9,
            "changed_background": 0,
            "colour_map": 1,
            "colour_bijection": 0,
            "palette_same": 0,
            "palette_subset": 1,
            "input_transpose": 1,
            "output_transpose": 1,
            "output_flipud": 5 / 9,
            "new_colours": 0,
        },
    ),
    (  # colours renamed, background too
        ("12", "21"),
        ("34", "43"),
        {
            "size_same": 1,
            "size_swapped": 1,
            "changed": 1,
            "changed_filled": 0.5,
            "colour_map": 1,
            "colour_bijection": 1,
            "output_fliplr": 0,
            "input_colours": 0.2,
        },
    ),
    (
        ("120", "400"),
        ("021", "004"),
        {
            "palette_same": 1,
            "counts_same": 1,
            "colour_map": 0,
            "changed": 4 / 6,
            "best_share": 1,
            "covered": 1,
        },
    ),
]


def pair_features(given_rows: tuple[str, ...], output_rows: tuple[str, ...]) -> dict[str, float]:
    grid, output = grid_of(*given_rows), grid_of(*output_rows)
    values = gf.control_features(gf.analyse(grid), grid, output).tolist()
    control = dict(zip(gf.CONTROL_NAMES, values, strict=True))
    return {name: control[name] for name in gf.PAIR_FEATURE_NAMES}


@pytest.mark.parametrize(("given_rows", "output_rows", "expected"), PAIR_FEATURES)
def test_features_of_a_pair(
    given_rows: tuple[str, ...], output_rows: tuple[str, ...], expected: dict[str, float]
) -> None:
    found = pair_features(given_rows, output_rows)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_every_feature_of_a_pair_has_two_values() -> None:
    assert set(PAIR_FEATURES[0][2]) == set(gf.PAIR_FEATURE_NAMES)
    for name in gf.PAIR_FEATURE_NAMES:
        assert len({expected[name] for *_, expected in PAIR_FEATURES if name in expected}) > 1, name


# ---------------------------------------------------------------- comparing and placing


def test_place_pads_and_crops() -> None:
    planes = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(gf.place(planes, (1, 2)), planes[:, :1, :2])
    wide = gf.place(planes, (1, 4))
    assert wide.shape == (2, 1, 4)
    assert (wide[:, :, 3] == OUTSIDE).all()


def test_match_and_control_of_a_flip() -> None:
    grid = grid_of("120", "400")
    output = np.ascontiguousarray(grid[:, ::-1])
    analysis = gf.analyse(grid)
    share, same_size, covered = gf.match(analysis, output)
    flip = SOURCE_INDEX["fliplr"]
    assert share[flip] == covered == 1.0
    assert same_size[flip]
    assert not same_size[SOURCE_INDEX["transpose"]]
    control = gf.control_features(analysis, grid, output)
    for name in ("share_fliplr", "size_fliplr", "rows_own", "cols_own"):
        assert control[gf.CONTROL_NAMES.index(name)] == 1.0, name
    for name in ("size_transpose", "rows_other", "cols_area"):
        assert control[gf.CONTROL_NAMES.index(name)] == 0.0, name
