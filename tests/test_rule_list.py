"""Hypotheses: exact rules, honest verdicts, one toy task per arm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_arc import Grid
from rule_arms import ARMS, Arm, Limits
from rule_list import Explained, Hypothesis, fit_task, leave_one_out

Pairs = list[tuple[Grid, Grid]]


def grids(seed: int, n: int, side: int = 6, colours: int = 4, density: float = 0.4) -> list[Grid]:
    rng = np.random.default_rng(seed)
    full = rng.integers(1, colours + 1, (n, side, side)) * (rng.random((n, side, side)) < density)
    return list(full.astype(np.uint8))


def task(change: Callable[[Grid], Grid], inputs: list[Grid]) -> tuple[Pairs, Grid, Grid]:
    """All but the last grid are demonstrations; returns them, the query and its answer."""
    *shown, query = inputs
    return [(g, change(g)) for g in shown], query, change(query)


def best(pairs: Pairs, query: Grid, *names: str) -> Hypothesis:
    arms = {name: ARMS[name] for name in names} if names else ARMS
    return fit_task(pairs, [query], arms=arms)[0].hypotheses[0]


def same(a: Explained, b: Explained) -> bool:
    return len(a.hypotheses) == len(b.hypotheses) and all(
        (x.arm, x.verdict, x.words, x.size_rule, x.explains)
        == (y.arm, y.verdict, y.words, y.size_rule, y.explains)
        and np.array_equal(x.answer, y.answer)
        for x, y in zip(a.hypotheses, b.hypotheses, strict=True)
    )


# ---------------------------------------------------------------- one toy task per arm


def enclosed_filled(g: Grid) -> Grid:
    """Rings get their inside filled with 4."""
    out = g.copy()
    for r, c in zip(*np.nonzero(g == 3), strict=True):
        if np.array_equal(g[r : r + 3, c : c + 3], RING):
            out[r + 1, c + 1] = 4
    return out


RING = np.array([[3, 3, 3], [3, 0, 3], [3, 3, 3]], np.uint8)


def with_rings(seed: int, n: int) -> list[Grid]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        g = np.zeros((9, 9), np.uint8)
        g[1:4, 1:4] = RING
        r, c = rng.integers(5, 7, 2)
        g[r : r + 3, c : c + 3] = RING
        g[0, int(rng.integers(5, 9))] = 5
        made.append(g)
    return made


def test_plain_solves_enclosures_and_says_so() -> None:
    pairs, query, answer = task(enclosed_filled, with_rings(0, 4))
    h = best(pairs, query, "plain")
    assert np.array_equal(h.answer, answer)
    assert h.verdict.full
    assert h.verdict.n_tried == 3
    assert h.explains
    assert h.n_rules == 1
    assert h.words.startswith("identity; where ")
    assert h.words.endswith(": colour 4")


def test_pairs_solve_what_needs_two_facts() -> None:
    def change(g: Grid) -> Grid:
        _, col = np.indices(g.shape)
        return np.where((g == 1) & (col == 0), 7, g).astype(np.uint8)

    pairs, query, answer = task(change, grids(1, 5, colours=2, density=0.7))
    assert not best(pairs, query, "plain").explains
    h = best(pairs, query, "pairs")
    assert h.explains
    assert h.verdict.n_right >= 2
    assert np.array_equal(h.answer, answer)
    assert h.words == "identity; where col = 0 and identity = colour 1: colour 7"


def test_shadow_lets_an_exception_overrule_a_later_one() -> None:
    def change(g: Grid) -> Grid:  # 1 becomes 7, but 8 in the first row
        out = np.where(g == 1, 7, g)
        out[0] = np.where(g[0] == 1, 8, out[0])
        return out.astype(np.uint8)

    pairs, query, answer = task(change, grids(2, 6, colours=4, density=0.8))
    h = best(pairs, query, "shadow")
    assert h.explains
    assert h.words.endswith("colour 8; where identity = colour 1: colour 7")
    assert np.array_equal(h.answer, answer)


def test_compare_solves_unequal_halves() -> None:
    def change(g: Grid) -> Grid:
        return np.where(g[:, :4] != g[:, 4:], 3, 0).astype(np.uint8)

    rng = np.random.default_rng(3)
    inputs = [rng.integers(1, 3, (4, 8)).astype(np.uint8) for _ in range(5)]
    pairs, query, answer = task(change, inputs)
    h = best(pairs, query, "compare")
    assert h.verdict.full
    assert np.array_equal(h.answer, answer)
    assert h.answer.shape == (4, 4)


def with_blocks(seed: int, n: int) -> list[Grid]:
    """Three blocks of one colour each; the tallest lies anywhere."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        g = np.zeros((9, 12), np.uint8)
        for slot, (high, wide) in enumerate(rng.permutation([(5, 1), (2, 2), (3, 3)])):
            top = int(rng.integers(0, 9 - high))
            g[top : top + high, 4 * slot : 4 * slot + wide] = rng.integers(1, 5)
        made.append(g)
    return made


def test_objects_crop_the_tallest() -> None:
    def change(g: Grid) -> Grid:
        for c in range(0, 12, 4):
            if np.count_nonzero(g[:, c]) == 5:
                rows = np.flatnonzero(g[:, c])
                return g[rows[0] : rows[-1] + 1, c : c + 1]
        raise AssertionError

    pairs, query, answer = task(change, with_blocks(4, 8))
    h = best(pairs, query, "objects")
    assert h.verdict.full
    assert np.array_equal(h.answer, answer)


def test_objects_slide_down_whole() -> None:
    def change(g: Grid) -> Grid:
        out = np.zeros_like(g)
        for c in range(0, 12, 4):
            part = g[:, c : c + 4]
            rows = np.flatnonzero(part.any(1))
            out[9 - rows.size :, c : c + 4] = part[rows[0] : rows[-1] + 1]
        return out

    inputs = with_blocks(5, 5)
    for g in inputs:  # a hole, so that single cells would fall differently
        for c in range(0, 12, 4):
            rows = np.flatnonzero(g[:, c : c + 4].any(1))
            g[rows[-1], c + 1] = g[rows[0], c] if rows.size == 5 else 0
    pairs, query, answer = task(change, inputs)
    h = best(pairs, query, "objects")
    assert h.verdict.full
    assert np.array_equal(h.answer, answer)


def test_again_reads_its_first_answer() -> None:
    """Both passes run, and the second is fitted with first answers as facts."""
    pairs, query, answer = task(lambda g: g[:, ::-1], grids(6, 4))
    arms = {"pairs": ARMS["pairs"], "again": ARMS["again"]}
    found = fit_task(pairs, [query], arms=arms, limits=Limits(stop=False))[0].hypotheses
    again = next(h for h in found if h.arm == "again")
    assert again.verdict.full
    assert np.array_equal(again.answer, answer)


def test_deep_solves_a_source_of_a_source() -> None:
    def change(g: Grid) -> Grid:  # the largest block, doubled
        block = g[np.ix_((g == 6).any(1), (g == 6).any(0))]
        return block.repeat(2, 0).repeat(2, 1)

    rng = np.random.default_rng(7)
    inputs = []
    for _ in range(4):
        g = np.zeros((9, 9), np.uint8)
        g[1:4, 1:5] = 6
        g[2, 2 + int(rng.integers(0, 2))] = 0
        g[3, 4] = rng.choice([0, 6])
        g[7, int(rng.integers(0, 9))] = 2
        inputs.append(np.roll(g, int(rng.integers(0, 3)), 1))
    pairs, query, answer = task(change, inputs)
    h = best(pairs, query, "deep")
    assert h.verdict.full
    assert np.array_equal(h.answer, answer)
    assert " of " in h.words


def test_second_default_is_another_list() -> None:
    pairs, query, _ = task(lambda g: np.where(g == 1, 2, g).astype(np.uint8), grids(8, 4))
    first, second = best(pairs, query, "pairs"), best(pairs, query, "second_default")
    assert first.words.split(";")[0] != second.words.split(";")[0]


def test_places_lay_turned_copies_side_by_side() -> None:
    """Six copies; which is turned depends on where it lies, and no one source shows it."""

    def change(g: Grid) -> Grid:
        turned = g[::-1, ::-1]
        return np.block([[g, turned, g], [g.T, g, g.T]]).astype(np.uint8)

    pairs, query, answer = task(change, grids(20, 4, side=3, colours=6, density=0.8))
    h = best(pairs, query, "places")
    assert h.verdict.full
    assert np.array_equal(h.answer, answer)
    assert h.answer.shape == (6, 9)


def test_places_choose_copies_by_the_cell_they_stand_for() -> None:
    def change(g: Grid) -> Grid:
        return np.kron((g == 3).astype(np.uint8), g)

    pairs, query, answer = task(change, grids(21, 5, side=3, colours=4, density=0.9))
    h = best(pairs, query, "places")
    assert h.verdict.full
    assert np.array_equal(h.answer, answer)
    assert "where stretched = colour 3: tile" in h.words


def test_places_is_not_run_for_outputs_of_the_inputs_size() -> None:
    pairs, query, _ = task(lambda g: g[::-1].copy(), grids(22, 3))
    assert fit_task(pairs, [query], arms={"places": ARMS["places"]})[0].hypotheses == ()


def test_drawn_crosses_from_single_cells_only() -> None:
    """Single cells shine along their row and column until something is met; blocks do not."""
    rng = np.random.default_rng(23)
    inputs = []
    for _ in range(5):
        g = np.zeros((10, 10), np.uint8)
        r, c = rng.integers(1, 5, 2)
        g[r, c] = rng.integers(2, 8)
        top, left = rng.integers(6, 8, 2)
        g[top : top + 2, left : left + 2] = rng.integers(2, 8)
        g[r, 8 + int(rng.integers(0, 2))] = 1
        g[r + 1 if r < 4 else r - 1, 9] = 1
        inputs.append(g)

    def change(g: Grid) -> Grid:
        lone = [
            (r, c)
            for r, c in np.argwhere(g > 0)
            if np.count_nonzero(g[max(0, r - 1) : r + 2, max(0, c - 1) : c + 2] == g[r, c]) == 1
        ]
        out = g.copy()
        for r, c in lone:
            for dr, dc in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                y, x = r + dr, c + dc
                while 0 <= y < 10 and 0 <= x < 10 and g[y, x] == 0:
                    out[y, x] = g[r, c]
                    y, x = y + dr, x + dc
        return out

    pairs, query, answer = task(change, inputs)
    h = best(pairs, query, "drawn")
    assert h.verdict.full
    assert np.array_equal(h.answer, answer)
    assert h.words == "lines_straight"


def test_of_facts_alike_the_nearer_stands_for_all() -> None:
    """Many facts hold where the input is 1 and shows 7 afterwards; the rule names the input."""
    pairs, query, answer = task(
        lambda g: np.where(g == 1, 7, g).astype(np.uint8), grids(24, 4, side=5, colours=3)
    )
    h = best(pairs, query, "plain")
    assert h.words == "identity; where identity = colour 1: colour 7"
    assert np.array_equal(h.answer, answer)


# ---------------------------------------------------------------- honesty


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_own_output_takes_part_in_nothing(seed: int, n: int) -> None:
    """With another output, even of another size, a demonstration's own hypotheses stay."""
    rng = np.random.default_rng(seed)
    inputs = grids(seed, n, side=4)
    pairs = [(g, g[::-1].copy()) for g in inputs]
    q = int(rng.integers(n))
    noise = rng.integers(0, 10, tuple(rng.integers(1, 7, 2))).astype(np.uint8)
    changed = [(g, noise if k == q else o) for k, (g, o) in enumerate(pairs)]
    assert same(leave_one_out(pairs)[q], leave_one_out(changed)[q])


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_is_fit_task_on_the_others(seed: int) -> None:
    pairs, _, _ = task(enclosed_filled, with_rings(seed, 5))
    limits = Limits(stop=False)
    for q, found in enumerate(leave_one_out(pairs, limits=limits)):
        others = [p for k, p in enumerate(pairs) if k != q]
        assert same(found, fit_task(others, [pairs[q][0]], limits=limits)[0])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_verdict_against_slow_reference(seed: int) -> None:
    """A first-pass arm's verdict is what fitting the others and asking for the pair gives."""
    inputs = grids(seed, 4, side=4, colours=2)
    pairs = [(g, np.where(g == 1, 3, g[:, ::-1]).astype(np.uint8)) for g in inputs]
    arms = {"pairs": ARMS["pairs"]}
    h = fit_task(pairs, [inputs[0]], arms=arms)[0].hypotheses[0]
    right = 0
    for k, (grid, output) in enumerate(pairs):
        again = fit_task(pairs[:k] + pairs[k + 1 :], [grid], arms=arms)[0].hypotheses[0]
        right += np.array_equal(again.answer, output)
    assert (h.verdict.n_right, h.verdict.n_tried) == (right, 4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["plain", "pairs", "shadow", "objects", "compare"]))
def test_rules_that_explain_are_right_on_every_demonstration(seed: int, name: str) -> None:
    """Asked for a demonstration's own input, an explaining list gives its output at its size."""
    inputs = grids(seed, 3, side=5, colours=3)
    pairs = [(g, np.where(g == 2, 1, g).astype(np.uint8)) for g in inputs]
    for k, found in enumerate(fit_task(pairs, inputs, arms={name: ARMS[name]})):
        h = found.hypotheses[0]
        assert h.explains
        assert np.array_equal(h.answer, pairs[k][1])


# ---------------------------------------------------------------- limits, edges


def test_deterministic() -> None:
    pairs, query, _ = task(enclosed_filled, with_rings(9, 4))
    limits = Limits(stop=False)
    assert same(
        fit_task(pairs, [query], limits=limits)[0], fit_task(pairs, [query], limits=limits)[0]
    )


def test_capped_arms_are_named() -> None:
    pairs, query, _ = task(lambda g: g, grids(10, 3))
    found = fit_task(pairs, [query], limits=Limits(max_cells=71))[0]
    assert found.context_cells == 72
    assert found.capped_arms == tuple(ARMS)
    assert found.hypotheses == ()
    assert found.attempts() == []
    assert fit_task(pairs, [query], limits=Limits(max_cells=72))[0].capped_arms == ()


def test_full_verdict_stops_and_attempts_differ() -> None:
    pairs, query, answer = task(lambda g: g[::-1].copy(), grids(11, 4))
    found = fit_task(pairs, [query])[0]
    assert [h.arm for h in found.hypotheses] == ["plain"]
    more = fit_task(pairs, [query], limits=Limits(stop=False))[0]
    assert len(more.hypotheses) > 1
    attempts = more.attempts()
    assert np.array_equal(attempts[0], answer)
    assert len(attempts) < 2 or not np.array_equal(attempts[0], attempts[1])


def test_no_and_one_demonstration() -> None:
    query = grids(12, 1)[0]
    assert fit_task([], [query])[0].hypotheses == ()
    found = fit_task([(query, query)], [query])[0].hypotheses
    assert found
    assert all(h.verdict.n_tried == 0 and not h.verdict.full for h in found)
    assert [e.hypotheses for e in leave_one_out([(query, query)])] == [()]
    assert leave_one_out([]) == []


def test_errors_say_which_pair() -> None:
    query = grids(13, 1)[0]
    with pytest.raises(ValueError, match=r"demonstration 1: output colours 11\.\.11"):
        fit_task([(query, query), (query, np.full((2, 2), 11))], [query])
    with pytest.raises(ValueError, match=r"demonstration 0: output shape \(3,\)"):
        fit_task([(query, np.zeros(3, np.uint8))], [query])
    with pytest.raises(ValueError, match="extra sources 'nothing'"):
        fit_task([(query, query)], [query], arms={"x": Arm(extra=("nothing",))})


def test_colours_other_than_0_are_only_names() -> None:
    """A renaming that keeps 0 renames the answer of a task with one clear explanation."""
    pairs, query, answer = task(lambda g: g[:, ::-1].copy(), grids(14, 4))
    lut = np.array([0, 4, 3, 1, 2, 5, 6, 7, 8, 9], np.uint8)
    renamed = [(lut[i], lut[o]) for i, o in pairs]
    h = fit_task(renamed, [lut[query]])[0].hypotheses[0]
    assert h.verdict.full
    assert np.array_equal(h.answer, lut[answer])
