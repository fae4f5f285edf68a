"""Copies, lines and drawings, by hand."""

from __future__ import annotations

import pytest
from conftest import grid_of

from grid_features import analyse
from rule_drawings import BANKS, DRAWN_SOURCES, drawn_bank


def drawn(name: str, *rows: str) -> list[str]:
    planes, sizes = drawn_bank(grid_of(*rows))
    k = DRAWN_SOURCES.index(name)
    high, wide = sizes[k]
    return ["".join("0123456789x"[v] for v in row) for row in planes[k, :high, :wide]]


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("span_rows", ("40204", "00000"), ["44244", "00000"]),
        ("span_cols", ("40", "00", "40"), ["40", "40", "40"]),
        ("span_both", ("404", "000", "400"), ["444", "400", "400"]),
        ("span_rows_over", ("40204", "00000"), ["44444", "00000"]),
        ("lines_rows", ("0300550", "0000000"), ["3333550", "0000000"]),
        ("lines_cols", ("03", "00", "55"), ["03", "03", "55"]),
        ("lines_diagonal", ("000", "030", "000"), ["303", "030", "303"]),
        ("lines_all", ("000", "030", "000"), ["333", "333", "333"]),
        ("beams_diagonal", ("0000", "0220", "0000", "0000"), ["2222", "0220", "2222", "2002"]),
        ("flooded_commonest", ("2220", "2020", "2260", "2220"), ["2222", "2222", "2262", "2222"]),
        ("flooded_single", ("2222", "2032", "2222"), ["2222", "2332", "2222"]),
        ("flooded_rarest", ("2222", "2032", "2222"), ["2222", "2332", "2222"]),
        ("hollow", ("22220", "22220", "22220"), ["22220", "20020", "22220"]),
        ("rings_reversed", ("333330", "344430", "345430", "344430", "333330"),
         ["555550", "544450", "543450", "544450", "555550"]),
        ("objects_symmetric", ("1000", "1100", "1110", "0000"), ["1110", "1110", "1110", "0000"]),
        ("objects_exchanged", ("110", "120", "000"), ["220", "210", "000"]),
        ("largest_rectangle", ("0030", "0000", "3000"), ["0030", "0xxx", "3xxx"]),
        ("copies_filled", ("50", "06"), ["5000", "0600", "0050", "0006"]),
        ("copies_open", ("50", "06"), ["0050", "0006", "5000", "0600"]),
        ("copies_rarest", ("50", "55"), ["0050", "0055", "0000", "0000"]),
        ("copies_inverse", ("50", "00"), ["0500", "5500", "0000", "0000"]),
    ],
)  # fmt: skip
def test_drawn_sources(name: str, rows: tuple[str, ...], expected: list[str]) -> None:
    assert drawn(name, *rows) == expected


def bank_fact(bank: str, name: str, *rows: str) -> list[str]:
    g = grid_of(*rows)
    sources, facts, make = BANKS[bank]
    shown, values = make(g, analyse(g), g.shape)
    assert (len(shown), len(values)) == (len(sources), len(facts))
    rows_of = shown[sources.index(name)] if name in sources else values[facts.index(name)]
    return ["".join(map(str, row)) for row in rows_of.reshape(g.shape)]


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("colour 4 in the row", ("04040", "00000"), ["22311", "00000"]),
        ("colour 4 in the col", ("04", "00"), ["00", "01"]),
        ("colour 4 in the diagonals", ("400", "000", "000"), ["000", "010", "001"]),
        ("steps left", ("4000", "0000"), ["0123", "0000"]),
        ("steps down right", ("000", "000", "004"), ["200", "010", "000"]),
        ("steps left odd or even", ("4000",), ["0212"]),
        ("ring around the nearest", ("0000", "0400", "0000"), ["1112", "1012", "1112"]),
        ("steps to the nearest", ("0000", "0400", "0000"), ["2123", "1012", "2123"]),
        ("colour 4 beside", ("404", "000"), ["020", "101"]),
        ("colour 4 at a corner", ("404", "000"), ["000", "020"]),
        ("same around", ("44", "40"), ["22", "20"]),
        ("run in the row length", ("44400",), ["33322"]),
        ("run in the row before", ("44400",), ["01201"]),
        ("run in the col behind", ("4", "4", "0"), ["1", "0", "0"]),
        ("largest square around", ("4400", "4400", "0444"), ["2222", "2222", "1111"]),
        ("is the largest square", ("4400", "4400", "0444"), ["1111", "1111", "0000"]),
        ("ring_nearest", ("0000", "0400", "0009"), ["4449", "4499", "4499"]),
        ("common_around", ("0440", "0000"), ["4444", "4444"]),
        ("most_around", ("044", "044", "000"), ["044", "004", "000"]),
    ],
)
def test_line_facts(name: str, rows: tuple[str, ...], expected: list[str]) -> None:
    assert bank_fact("lines", name, *rows) == expected


def test_place_facts_on_a_larger_output() -> None:
    g = grid_of("12")
    sources, facts, make = BANKS["places"]
    shown, values = make(g, analyse(g), (2, 4))
    assert shown[sources.index("stretched")].tolist() == [1, 1, 2, 2, 1, 1, 2, 2]
    assert shown[sources.index("tile_fliplr")].tolist() == [2, 1, 2, 1, 2, 1, 2, 1]
    assert shown[sources.index("tile_transpose")].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    for name, expected in (
        ("copy row", [0, 0, 0, 0, 1, 1, 1, 1]),
        ("copy col", [0, 0, 1, 1, 0, 0, 1, 1]),
        ("copy col from the right", [1, 1, 0, 0, 1, 1, 0, 0]),
        ("copies alternate", [0, 0, 1, 1, 1, 1, 0, 0]),
        ("col in copy", [0, 1, 0, 1, 0, 1, 0, 1]),
        ("stretched half_cols", [0, 0, 2, 2, 0, 0, 2, 2]),
        ("tiled half_cols", [0, 2, 0, 2, 0, 2, 0, 2]),
    ):
        assert values[facts.index(name)].tolist() == expected, name
