"""Sources of a grid, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import grid_of

from grid_features import GridAnalysis, analyse
from grid_parts import OUTSIDE
from grid_transforms import SOURCE_INDEX, SOURCE_NAMES


def source(analysis: GridAnalysis, name: str) -> np.ndarray:
    i = SOURCE_INDEX[name]
    rows, cols = analysis.sizes[i]
    return analysis.planes[i, :rows, :cols]


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
    ("panel_map", ("12502", "10500", "55555", "00530", "00533"), ("12", "03")),
    ("panel_overlay", ("12500", "10540", "55555", "00530", "00533"), ("12", "13")),
    ("component_neighbour", ("11000", "12003", "00000"), ("22222", "21220", "22222")),
]


@pytest.mark.parametrize(("name", "given_rows", "expected"), EXAMPLES)
def test_source_examples(name: str, given_rows: tuple[str], expected: tuple[str]) -> None:
    np.testing.assert_array_equal(source(analyse(grid_of(*given_rows)), name), grid_of(*expected))


def test_plane_examples() -> None:
    analysis = analyse(grid_of("12", "34"))
    planes = dict(zip(SOURCE_NAMES, analysis.planes, strict=True))
    np.testing.assert_array_equal(planes["tile"][:3, :4], grid_of("1212", "3434", "1212"))
    np.testing.assert_array_equal(planes["mirror_tile"][:3, :4], grid_of("1221", "3443", "3443"))
    analysis = analyse(grid_of("2012", "0220"))
    planes = dict(zip(SOURCE_NAMES, analysis.planes, strict=True))
    assert (planes["colour_rank_1"] == 2).all()
    assert (planes["colour_rarest"] == 1).all()
    np.testing.assert_array_equal(planes["rank_by_row"][:3, :2], grid_of("22", "11", "00"))


def test_period_is_completed_over_unknown_cells() -> None:
    whole = np.tile(grid_of("123", "456"), (4, 4))
    part = whole.copy()
    part[2:5, 3:7] = 0
    plane = analyse(part).planes[SOURCE_INDEX["period_complete"]]
    np.testing.assert_array_equal(plane[:8, :12], whole)
    covered = whole.copy()
    covered[2:5, 3:7] = 9
    analysis = analyse(covered)
    plane = analysis.planes[SOURCE_INDEX["mosaic_period"]]
    np.testing.assert_array_equal(plane[:8, :12], whole)
    np.testing.assert_array_equal(source(analysis, "crop_hidden_period"), whole[2:5, 3:7])


def test_symmetry_is_completed_about_an_axis_off_the_middle() -> None:
    quarter = np.random.default_rng(1).integers(1, 8, (6, 6)).astype(np.uint8)
    half = np.concatenate((quarter, quarter[:, ::-1]), 1)
    whole = np.concatenate((half, half[::-1]), 0)[1:, 2:]
    covered = whole.copy()
    covered[1:4, 0:3] = 0
    np.testing.assert_array_equal(source(analyse(covered), "fill_best_symmetry"), whole)


def test_most_coloured_object_is_the_template() -> None:
    grid = grid_of("010000", "121000", "010010", "000111", "000010")
    expected = grid_of("010000", "121000", "010010", "000121", "000010")
    np.testing.assert_array_equal(source(analyse(grid), "object_template"), expected)


def test_absent_sources_say_so() -> None:
    analysis = analyse(grid_of("000", "000"))
    for name in ("bbox", "crop_frame_interior", "pinwheel", "panel_map", "crop_odd_shape"):
        i = SOURCE_INDEX[name]
        assert analysis.sizes[i].tolist() == [0, 0]
        assert (analysis.planes[i] == OUTSIDE).all()
