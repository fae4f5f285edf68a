"""Whole components and objects, and places against counts, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import grid_of

from grid_features import analyse
from rule_objects import (
    COUNT_FACT_NAMES,
    OBJECT_FACT_NAMES,
    OBJECT_SOURCES,
    count_facts,
    object_bank,
)

# Four components; the first two make one object, the second and the last are twins of two colours.
PARTS = ("220000", "010030", "000030", "300000")
FACTS = [
    ("component height", ("114444", "414424", "444424", "144444")),
    ("component width", ("226666", "616616", "666616", "166666")),
    ("component order from above", ("110000", "020020", "000020", "300000")),
    ("component order from the left", ("110000", "020030", "000030", "100000")),
    ("component order by size", ("110000", "020010", "000010", "200000")),
    ("component order by size, smallest first", ("220000", "010020", "000020", "100000")),
    ("component row inside", ("000000", "101101", "222212", "033333")),
    ("component row inside from below", ("003333", "202212", "111101", "000000")),
    ("component col inside", ("012345", "002305", "012305", "012345")),
    ("component col inside from the right", ("103210", "503200", "543200", "043210")),
    ("component ring inside", ("000000", "001100", "011100", "000000")),
    ("component twins of another colour", ("000000", "010000", "000000", "100000")),
    ("component twins of its colour", ("110000", "010010", "000010", "100000")),
    ("component largest of its colour", ("110000", "010010", "000010", "000000")),
    ("component taller or wider", ("000000", "010020", "000020", "100000")),
    ("object height", ("221111", "121121", "111121", "111111")),
    ("object width", ("221111", "121111", "111111", "111111")),
    ("object order by size", ("110000", "010020", "000020", "300000")),
    ("object minority cells", ("110000", "010000", "000000", "000000")),
    ("object symmetric", ("000000", "000010", "000010", "100000")),
    ("nearest side", ("000000", "200003", "211113", "111111")),
]


def test_every_fact_about_components_has_its_value() -> None:
    components = [name for name in OBJECT_FACT_NAMES if name.startswith("component ")]
    assert [name for name, _ in FACTS[:15]] == components


@pytest.mark.parametrize(("name", "expected"), FACTS)
def test_facts_about_parts(name: str, expected: tuple[str, ...]) -> None:
    facts = object_bank(grid_of(*PARTS))[2]
    assert len(facts) == len(OBJECT_FACT_NAMES)
    np.testing.assert_array_equal(facts[OBJECT_FACT_NAMES.index(name)], grid_of(*expected))


PANELS = ("1150", "1050", "5555", "0053")


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("slide_down", PARTS, ("000000", "000000", "220030", "310030")),
        ("slide_up", PARTS, ("220030", "310030", "000000", "000000")),
        ("slide_left", PARTS, ("220000", "013000", "003000", "300000")),
        ("slide_right", PARTS, ("000220", "000013", "000003", "000003")),
        ("flip_objects_lr", PARTS, ("220000", "100030", "000030", "300000")),
        ("flip_objects_ud", PARTS, ("010000", "220030", "000030", "300000")),
        ("turn_objects", PARTS, ("100000", "220030", "000030", "300000")),
        ("twin_colour", PARTS, ("220000", "030030", "000030", "100000")),
        ("nearest_colour", ("10002",), ("11022",)),
        ("keep_largest", PARTS, ("220000", "000000", "000000", "000000")),
        ("bars_rows", PARTS, ("333", "220", "100")),
        ("bars_cols", PARTS, ("321", "320", "300")),
        ("bars_rising", PARTS, ("300", "320", "321")),
        ("bars_parts_rows", PARTS, ("33", "20", "10")),
        ("bars_parts_cols", PARTS, ("321", "300")),
        ("crop_most_size_object", PARTS, ("22", "01")),
        ("crop_most_height_component", PARTS, ("3", "3")),
        ("crop_most_width_component", PARTS, ("22",)),
        ("crop_most_colours_object", PARTS, ("22", "01")),
        ("crop_most_holes_object", PARTS, ("22", "01")),
        ("crop_most_minority_alone", PARTS, ("22", "01")),
        ("crop_most_top_component", PARTS, ("3",)),
        ("crop_least_top_component", PARTS, ("22",)),
        ("crop_most_left_component", PARTS, ("3", "3")),
        ("crop_least_density_object", PARTS, ("22", "01")),
        ("crop_least_symmetry_object", PARTS, ("22", "01")),
        ("crop_least_others_object", PARTS, ("3",)),
        ("crop_least_copies_component", ("4040", "0000", "3300"), ("33",)),
        ("crop_most_size_panel", PANELS, ("11", "10")),
        ("crop_least_height_object", PARTS, ("3",)),
        ("crop_most_copies_component", PARTS, ()),  # two parts have most: none is chosen
    ],
)
def test_sources(name: str, rows: tuple[str, ...], expected: tuple[str, ...]) -> None:
    planes, sizes, _ = object_bank(grid_of(*rows))
    assert len(planes) == len(sizes) == len(OBJECT_SOURCES)
    k = OBJECT_SOURCES.index(name)
    high, wide = sizes[k]
    assert tuple("".join(map(str, row)) for row in planes[k, :high, :wide].tolist()) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("number against components", [0, 0, 0, 0, 1, 2, 2, 2]),
        ("col against objects", [0, 0, 0, 1, 0, 0, 0, 1]),
        ("col against colours_filled", [0, 0, 0, 1, 0, 0, 0, 1]),
        ("number against filled_cells", [0, 0, 0, 0, 0, 0, 1, 2]),
        ("col against commonest_cells", [0, 0, 0, 1, 0, 0, 0, 1]),
        ("row against rarest_cells", [0, 0, 0, 0, 1, 1, 1, 1]),
        ("row from below against rarest_cells", [1, 1, 1, 1, 0, 0, 0, 0]),
        ("col against largest_component_cells", [0, 0, 1, 2, 0, 0, 1, 2]),
        ("number against components_commonest", [0, 0, 1, 2, 2, 2, 2, 2]),
        ("number against own", [0, 0, 0, 0, 1, 2, 2, 2]),
    ],
)
def test_places_against_counts(name: str, expected: list[int]) -> None:
    facts = count_facts(analyse(grid_of(*PARTS)), (2, 4))
    assert len(facts) == len(COUNT_FACT_NAMES)
    assert facts[COUNT_FACT_NAMES.index(name)].tolist() == expected
