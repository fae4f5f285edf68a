"""Tests of size_rules: rules read off the demonstrations against a slow way, a query's canvas."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from size_rules import DEMONSTRATION_RULE_NAMES, canvas_bound, demonstration_rules


def slow_rules(ins: Any, outs: Any, query: Any, axis: Any) -> Any:
    """The demonstration rules of one axis, spelled out."""
    wanted = [o[axis] for o in outs]
    values = dict.fromkeys(DEMONSTRATION_RULE_NAMES, 0)
    if not wanted:
        return list(values.values())
    values["constant"] = wanted[0] if len(set(wanted)) == 1 else 0
    values["modal"] = max(wanted, key=lambda side: (wanted.count(side), side))
    values["maximum"] = max(wanted)
    for other, name in ((axis, ""), (1 - axis, "_swapped")):
        given = [i[other] for i in ins]
        own = query[other]
        ratios = {o / i for i, o in zip(given, wanted, strict=True)}
        if len(ratios) == 1:
            o, i = wanted[0], given[0]
            if o % i == 0:
                values["ratio" + name] = own * (o // i)
            elif i % o == 0 and own % (i // o) == 0:
                values["ratio" + name] = own // (i // o)
        steps = {o - i for i, o in zip(given, wanted, strict=True)}
        if len(steps) == 1:
            values["difference" + name] = own + steps.pop()
    return [v if 1 <= v <= 30 else 0 for v in values.values()]


side = st.integers(1, 8)
sizes = st.tuples(side, side)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(sizes, sizes, st.booleans()), max_size=4), sizes, st.integers(1, 4))
def test_demonstration_rules_against_the_slow_way(demos: Any, query: Any, factor: Any) -> None:
    demos = [(a, (b if k else (a[0] * factor, a[1] + 1)), k) for a, b, k in demos]
    ins = np.array([[a for a, _, _ in demos]], np.int64).reshape(1, -1, 2)
    outs = np.array([[b for _, b, _ in demos]], np.int64).reshape(1, -1, 2)
    known = np.array([[k or factor > 2 for _, _, k in demos]], bool).reshape(1, -1)
    got = demonstration_rules(ins, outs, known, np.array([query], np.int64))
    used = [d for d, k in zip(demos, known[0], strict=True) if k]
    for axis in (0, 1):
        wanted = slow_rules([d[0] for d in used], [d[1] for d in used], query, axis)
        assert got[0, axis].tolist() == wanted


def test_canvas_bound() -> None:
    candidates = np.array([[3, 9, 30], [0, 4, 5]])
    outs = np.array([[2, 6], [2, 7]])
    own = np.array([1, 2])

    def bound(support: Any) -> Any:
        return canvas_bound(candidates, np.array(support, np.float32), outs, own).tolist()

    assert bound([[1, 1, 0.5], [1, 1, 0]]) == [9, 4]  # an absent full candidate says nothing
    assert bound([[0, 0, 0], [0, 0, 0]]) == [2, 7]
    assert bound([[0.5, 0, 0], [0, 0, 0.5]]) == [3, 7]
    none = canvas_bound(candidates, np.zeros((2, 3), np.float32), outs[:0], own)
    assert none.tolist() == [1, 2]
