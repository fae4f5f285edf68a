"""Facts about cells: where they hold, and in which order they stand for each other."""

from __future__ import annotations

import numpy as np
import pytest

from grid_parts import OUTSIDE
from grid_transforms import N_SOURCES, SOURCE_NAMES
from rule_facts import (
    ABSENT,
    AT_LEAST,
    EQUALS,
    LIKE,
    NOT,
    UNLIKE,
    FactTable,
    fact_table,
    placed,
    positions,
    tier_of,
)

VALUES = np.array([[1, 0, 4, OUTSIDE], [1, 2, 4, 4], [0, 3, 7, ABSENT]], np.uint8)
NAMES = ["identity", "fliplr", "enclosure"]


@pytest.mark.parametrize(
    ("op", "row", "arg", "holds", "words"),
    [
        (EQUALS, 0, 4, [0, 0, 1, 0], "identity = colour 4"),
        (EQUALS, 0, OUTSIDE, [0, 0, 0, 1], "identity = outside"),
        (NOT, 0, 4, [1, 1, 0, 1], "identity is not colour 4"),
        (LIKE, 1, 0, [1, 0, 1, 0], "fliplr = identity"),
        (UNLIKE, 1, 0, [0, 1, 0, 1], "fliplr is not identity"),
        (EQUALS, 2, 3, [0, 1, 0, 0], "enclosure = 3"),
        (AT_LEAST, 2, 3, [0, 1, 1, 0], "enclosure >= 3"),  # never where there is no cell
    ],
)
def test_facts(op: int, row: int, arg: int, holds: list[int], words: str) -> None:
    one = FactTable(np.array([op]), np.array([row]), np.array([arg]), NAMES, n_sources=2)
    assert one.of(VALUES).astype(int).tolist() == [holds]
    assert one.words(0) == words


@pytest.mark.parametrize("compare", [False, True])
def test_the_table_lists_each_fact_once(compare: bool) -> None:
    table = fact_table([*SOURCE_NAMES, "parity"], N_SOURCES, 1, compare)
    facts = set(zip(table.op.tolist(), table.row.tolist(), table.arg.tolist(), strict=True))
    assert len(facts) == table.op.size
    assert table.words(0) == "everywhere = 0"


def test_picked_facts_are_those_of_the_whole_table() -> None:
    values = np.concatenate((VALUES, positions((2, 2))))
    table = fact_table(NAMES, 2, 1, compare=False)
    which = np.array([3, 0, 7])
    np.testing.assert_array_equal(table.of(values)[which], table.of(values, which))
    known = {table.words(k) for k in range(table.op.size)}
    assert {"col = 0", "row from below = 5", "fliplr = identity", "enclosure >= 7"} <= known


def test_value_rows_of_an_output() -> None:
    assert positions((2, 3)).tolist() == [
        [0, 0, 0, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 2, 0, 1, 2],
        [2, 1, 0, 2, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    rows = np.array([[[1, 2]], [[3, 4]]], np.uint8)
    assert placed(rows, (2, 1), OUTSIDE).tolist() == [[1, OUTSIDE], [3, OUTSIDE]]


def test_sources_stand_for_facts_in_the_order_of_nearness() -> None:
    tiers = [
        tier_of(name, source)
        for name, source in (
            ("identity", True),
            ("ray_up", True),
            ("rot90", True),
            ("parity", False),
            ("answer's identity", True),
        )
    ]
    assert tiers == [0, 1, 2, 3, 0]
