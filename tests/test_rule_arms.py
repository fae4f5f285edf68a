"""Arms name only what exists."""

from __future__ import annotations

import pytest

from rule_arms import ARMS, EXTRA_SOURCES, LIMITS, groups_of
from rule_drawings import BANKS


def test_arms_ask_for_what_there_is() -> None:
    for name, arm in ARMS.items():
        assert {kind for kind, _ in groups_of(arm.extra)} == set(arm.extra), name
        assert set(arm.banks) <= set(BANKS), name
        assert arm.facts in (1, 2), name
        assert arm.max_cells <= LIMITS.max_cells, name
    assert {kind for arm in ARMS.values() for kind in arm.extra} == set(EXTRA_SOURCES)
    assert {bank for arm in ARMS.values() for bank in arm.banks} == set(BANKS)


def test_an_unknown_extra_source_is_refused() -> None:
    with pytest.raises(ValueError, match="extra sources 'nothing'"):
        groups_of(("objects", "nothing"))
