"""Prediction without targets, voting, inverted views, scoring, slices."""

from __future__ import annotations

import dataclasses
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lively_system

import dataset_arc
import evaluation
import rule_list
from arc_agent import AgentOutput
from batches import View, evaluation_batches, evaluation_views
from dataset_arc import Pair, Task
from evaluation import (
    OVERRULED,
    SURE_WEIGHT,
    Change,
    Prediction,
    answered_all,
    batch_bounds,
    content,
    contested,
    demonstration_scores,
    gains,
    joined,
    left_out,
    predict_tasks,
    proposals_for,
    refined,
    reversibility,
    score,
    second_best,
    validation_keys,
    without_outputs,
)
from hypotheses import N_PROPOSAL_FACTS, Proposals
from proposal_policy import PRIOR
from rule_list import Explained, Hypothesis, Verdict


def grid(*rows: Any) -> Any:
    return np.array(rows, np.uint8)


def keys_of(tasks: Any) -> Any:
    return {(t.task_id, i) for t in tasks for i in range(len(t.tests))}


@pytest.fixture(scope="module")
def hidden(task_set: Any) -> Any:
    return without_outputs(task_set.train)


# ---------------------------------------------------------------- voting


def test_the_two_heaviest_grids_are_the_attempts() -> None:
    p = Prediction()
    p.add(grid([1]), 1.0)
    p.add(grid([2]), 1.4)
    p.add(grid([3]), 1.2)
    p.add(grid([1]), 1.0)
    assert [g.tolist() for g in p.attempts()] == [[[1]], [[2]]]
    assert [g.tolist() for g in p.attempts(9)] == [[[1]], [[2]], [[3]]]
    assert sorted(c.votes for c in p.candidates.values()) == [1, 1, 2]


def test_votes_that_weigh_the_same_keep_the_order_they_came_in() -> None:
    p = Prediction()
    for value in (5, 3, 4):
        p.add(grid([value]), 1.0)
    assert [int(g[0, 0]) for g in p.attempts(3)] == [5, 3, 4]


def test_grids_with_the_same_cells_in_another_shape_are_different() -> None:
    p = Prediction()
    p.add(grid([1, 2]), 1.0)
    p.add(grid([1], [2]), 1.0)
    assert len(p.candidates) == 2
    assert len(p.attempts()) == 2


def test_one_grid_is_one_attempt() -> None:
    p = Prediction()
    p.add(grid([1]), 1.0)
    assert len(p.attempts()) == 1


def test_a_spare_is_the_second_attempt_only_where_nothing_else_came_up() -> None:
    """Breaks: a spare that takes the place of a candidate, repeats one, or a less likely one kept;
    and ballots that forget it when they are joined."""
    p = Prediction(spare=(grid([2]), 0.1))
    p.add(grid([1]), 1.0)
    assert [g.tolist() for g in p.attempts()] == [[[1]], [[2]]]
    assert [g.tolist() for g in p.attempts(1)] == [[[1]]]
    p.take(Prediction(spare=(grid([3]), 0.2)))
    p.take(Prediction(spare=(grid([4]), 0.1)))
    assert [g.tolist() for g in p.attempts()] == [[[1]], [[3]]]
    whole = joined({("a", 0): p}, {})
    assert [g.tolist() for g in whole["a", 0].attempts()] == [[[1]], [[3]]]
    p.add(grid([5]), 1e-12, votes=0)
    assert [g.tolist() for g in p.attempts()] == [[[1]], [[5]]]
    same = Prediction(spare=(grid([1]), 1.0))
    same.add(grid([1]), 1.0)
    assert [g.tolist() for g in same.attempts()] == [[[1]]]


def test_the_second_best_answer_differs_in_the_least_sure_cell_inside() -> None:
    """Breaks: a cell outside the size, the surest cell, its third colour, or a wrong chance."""
    share = torch.full((1, 3, 4, 10), 0.001)
    share[..., 4] = 0.9
    share[0, 1, 2, 4], share[0, 1, 2, 7], share[0, 1, 2, 1] = 0.5, 0.3, 0.1
    share[0, 2, 3, 4], share[0, 2, 3, 5] = 0.5, 0.49  # outside
    size = torch.tensor([[2, 3]])
    nothing = torch.zeros(1, 1)
    output = AgentOutput(share.log()[None], nothing, size, nothing, nothing)
    other, chance = second_best(output)
    expected = output.grids().clone()
    expected[0, 1, 2] = 7
    assert torch.equal(other, expected)
    assert (other[0, 2] == -1).all()
    assert chance.tolist() == pytest.approx([0.6])


# ---------------------------------------------------------------- predicting


def test_tasks_with_a_test_output_in_sight_are_refused(
    system: Any, task_set: Any, hidden: Any
) -> None:
    with pytest.raises(ValueError, match="must not see test outputs"):
        predict_tasks(system, task_set.train, [View()])
    with pytest.raises(ValueError, match="must not see test outputs"):
        predict_tasks(system, [*hidden[1:], task_set.train[0]], [View()])


def test_without_outputs_leaves_inputs_and_demonstrations(task_set: Any, hidden: Any) -> None:
    for before, after in zip(task_set.train, hidden, strict=True):
        assert all(pair.output is None for pair in after.tests)
        assert [p.input for p in after.tests] == [p.input for p in before.tests]
        assert after.demonstrations is before.demonstrations
        assert all(pair.output is not None for pair in before.tests)


def test_every_query_gets_one_vote_per_view(system: Any, hidden: Any) -> None:
    done: list[tuple[int, float]] = []
    found = predict_tasks(
        system,
        hidden,
        evaluation_views(3),
        batch_size=4,
        progress=lambda n, share: done.append((n, share)),
    )
    assert set(found) == keys_of(hidden)
    assert sum(n for n, _ in done) == 3 * len(found)
    assert sum(share for _, share in done) == pytest.approx(1)  # a bar ends at 100%
    for prediction in found.values():
        assert sum(c.votes for c in prediction.candidates.values()) == 3
        weight = sum(c.weight for c in prediction.candidates.values())
        assert 3.0 <= weight <= 3.0 * (1 + SURE_WEIGHT) + 1e-6
        for candidate in prediction.candidates.values():
            assert candidate.grid.dtype == np.uint8
            assert candidate.grid.max() <= 9


def test_only_the_wanted_queries_are_returned(system: Any, hidden: Any) -> None:
    wanted = {sorted(keys_of(hidden))[2]}
    assert set(predict_tasks(system, hidden, [View()], only=wanted)) == wanted


def test_a_deadline_never_costs_the_first_view(system: Any, hidden: Any) -> None:
    past = time.monotonic() - 1.0
    found = predict_tasks(system, hidden, evaluation_views(4), deadline=past)
    assert set(found) == keys_of(hidden)
    assert all(sum(c.votes for c in p.candidates.values()) == 1 for p in found.values())


def test_small_tasks_get_all_their_views_before_large_ones_their_second(
    system: Any, hidden: Any
) -> None:
    order: list[str] = []
    views = evaluation_views(3)

    class Spy:
        def __getattr__(self, name: Any) -> Any:
            return getattr(system, name)

        def predict(self, batch: Any, generator: Any, **options: Any) -> Any:
            order.extend(task_id for task_id, _, _ in batch.pair_ids)
            return system.predict(batch, generator, **options)

    spy: Any = Spy()
    predict_tasks(spy, hidden, views, deadline=time.monotonic() + 600)
    n = len(keys_of(hidden))
    assert len(order) == 3 * n
    assert set(order[:n]) == {t.task_id for t in hidden}
    cells = {
        t.task_id: max(
            g.size
            for p in (*t.tests, *t.demonstrations)
            for g in (p.input, p.output)
            if g is not None
        )
        for t in hidden
    }
    later = [cells[task_id] for task_id in order[n:]]
    assert later == sorted(later)


def test_max_batches_ends_the_voting_and_never_the_first_view(system: Any, hidden: Any) -> None:
    def votes(max_batches: Any) -> Any:
        done: list[int] = []
        found = predict_tasks(
            system,
            hidden,
            evaluation_views(3),
            batch_size=2,
            max_batches=max_batches,
            progress=lambda n, _: done.append(n),
        )
        assert set(found) == keys_of(hidden)
        return len(done)

    first_view = votes(1)
    assert first_view > 1
    assert votes(first_view + 2) == first_view + 2
    assert votes(1000) > first_view + 2


def test_batches_suit_the_device() -> None:
    """Breaks: a user's own bound passed over; a GPU held to what fits a CPU's caches."""
    assert batch_bounds("cuda:1") == {"batch_size": 256, "batch_cells": None, "padding": None}
    assert batch_bounds("cuda", 4, 99) == {"batch_size": 4, "batch_cells": 99, "padding": None}
    cpu = batch_bounds("cpu")
    assert cpu["batch_size"] == 32
    assert cpu["batch_cells"] is not None
    assert cpu["padding"] is not None
    assert batch_bounds("cpu", 4, 99) == {**cpu, "batch_size": 4, "batch_cells": 99}
    assert batch_bounds("cpu", None, 10**9) == cpu


def test_predictions_are_made_within_the_bounds_of_the_device(
    system: Any, hidden: Any, monkeypatch: Any
) -> None:
    """Breaks: batches that are as large on a CPU as on a GPU."""
    given: list[dict[str, Any]] = []
    real = evaluation.evaluation_requests

    def batches(*args: Any, **options: Any) -> Any:
        given.append(options)
        return real(*args, **options)

    monkeypatch.setattr(evaluation, "evaluation_requests", batches)
    predict_tasks(system, hidden[:1], [View()], batch_size=3)
    bounds: dict[str, Any] = {**batch_bounds("cpu", 3)}
    assert [{**options, **bounds} == options for options in given] == [True]


def test_batch_size_changes_no_prediction(system: Any, hidden: Any) -> None:
    a = predict_tasks(system, hidden, [View()], batch_size=1)
    b = predict_tasks(system, hidden, [View()], batch_size=32)
    for key in a:
        assert np.array_equal(a[key].attempts(1)[0], b[key].attempts(1)[0])


def content_of(found: Any) -> Any:
    """All that predictions hold, in an order of their own, to be compared bit for bit."""

    def of(p: Any) -> Any:
        votes = [(key, c.votes, c.weight) for key, c in p.candidates.items()]
        changes = [(content(c.before), content(c.after), c.accepted) for c in p.changes]
        spare = None if p.spare is None else (content(p.spare[0]), p.spare[1])
        return votes, p.views, p.steps, changes, spare, p.refined and of(p.refined)

    return {key: of(p) for key, p in found.items()}


@pytest.mark.parametrize("policy", ["on", "random"])
def test_batches_side_by_side_change_no_bit(
    system: Any, hidden: Any, monkeypatch: Any, policy: str
) -> None:
    """Breaks: weights, draws or an order of votes that depend on which thread is first; one batch
    after the other all the same."""
    facts = np.zeros((1, N_PROPOSAL_FACTS), np.float32)
    offered = {key: Proposals((grid([n]),), facts) for n, key in enumerate(sorted(keys_of(hidden)))}
    chooser = dataclasses.replace(system, config=dataclasses.replace(system.config, policy=policy))
    inside, most = [0], [0]
    lock, met = threading.Lock(), threading.Event()
    real = evaluation._ballots

    def counting(*args: Any) -> Any:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            if inside[0] > 1:
                met.set()
        if not met.wait(5):  # for another one, which is under way too
            met.set()
        try:
            return list(real(*args))
        finally:
            with lock:
                inside[0] -= 1

    def asked(at_once: int) -> Any:
        met.clear()
        if at_once == 1:
            met.set()
        most[0] = 0
        options: Any = {"batch_size": 1, "proposals": offered, "accept": False}
        found = predict_tasks(
            chooser, hidden, evaluation_views(2), at_once=at_once, max_batches=9, **options
        )
        return content_of(found), most[0]

    monkeypatch.setattr(evaluation, "_ballots", counting)
    alone, one = asked(1)
    together, several = asked(3)
    assert alone == together
    assert one == 1
    assert several > 1


def test_an_error_of_a_batch_ends_the_prediction(system: Any, hidden: Any) -> None:
    """Breaks: a batch lost in its thread, or the others asked first."""
    done: list[int] = []

    class Failing:
        def __getattr__(self, name: Any) -> Any:
            return getattr(system, name)

        def predict(self, batch: Any, generator: Any, **options: Any) -> Any:
            done.append(batch.n_queries)
            if len(done) == 2:
                raise MemoryError("too large")
            return system.predict(batch, generator, **options)

    spy: Any = Failing()
    with pytest.raises(MemoryError, match="too large"):
        predict_tasks(spy, hidden, evaluation_views(9), batch_size=1, at_once=2)
    assert len(done) < 9
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_the_system_keeps_its_mode(system: Any, hidden: Any) -> None:
    system.train(True)
    try:
        predict_tasks(system, hidden[:1], [View()])
        assert system.agent.training
    finally:
        system.train(False)


class Oracle:
    """Stands in for a system: it turns the batch's own input by 90 degrees, in the view's terms.

    Turning commutes with the colours and not with the flips, so only a correct inversion of the
    whole view brings the same answer back in every view.
    """

    def __init__(self, rule: Any) -> None:
        self.agent = SimpleNamespace(training=False)
        self.rule = rule

    def train(self, mode: Any = True) -> Any:
        return self

    def predict(self, batch: Any, generator: Any, **options: Any) -> Any:
        n = batch.n_queries
        grids, sizes = [], []
        for row in range(n):
            rows, cols = (int(v) for v in batch.query_input_size[row])
            view = batch.views[row]
            shown = batch.query_input[row, :rows, :cols].numpy().astype(np.uint8)
            wanted = view.apply(self.rule(view.invert(shown)))
            grids.append(torch.full((30, 30), -1, dtype=torch.long))
            grids[-1][: wanted.shape[0], : wanted.shape[1]] = torch.from_numpy(wanted.astype(int))
            sizes.append(wanted.shape)
        stack = torch.stack(grids)
        output = SimpleNamespace(
            grids=lambda step=-1: stack,
            size=torch.tensor(sizes),
            logits=torch.zeros(5, n, 30, 30, 10),
            n_steps=torch.tensor([2] * n),
        )
        nobody = torch.zeros(0, dtype=torch.long)
        return SimpleNamespace(
            before=output, after=output, refinement=None, again=nobody, backward_before=None,
            backward_after=None,
        )  # fmt: skip


@pytest.mark.parametrize("rule", [np.rot90, np.flipud, lambda g: g[:1, :2], lambda g: g])
def test_views_are_inverted_so_that_they_vote_for_one_grid(hidden: Any, rule: Any) -> None:
    oracle: Any = Oracle(rule)
    views = [
        View(d, colours)
        for d in range(8)
        for colours in (tuple(range(10)), (0, 2, 3, 1, 5, 4, 9, 8, 6, 7))
    ]
    found = predict_tasks(oracle, hidden[:3], views)
    for task in hidden[:3]:
        for number, pair in enumerate(task.tests):
            (candidate,) = found[task.task_id, number].candidates.values()
            assert candidate.votes == 16
            assert np.array_equal(candidate.grid, rule(pair.input))


def test_a_perfect_predictor_scores_everything(task_set: Any, hidden: Any) -> None:
    turned = [t for t in hidden if t.task_id.endswith("turn")]
    oracle: Any = Oracle(np.rot90)
    found = predict_tasks(oracle, turned, evaluation_views(8))
    result = score(found, task_set.train)
    assert (result["n"], result["exact_at_1"], result["exact_at_2"]) == (1, 1, 1)
    assert result["size_accuracy"] == result["cell_accuracy"] == 1.0


# ---------------------------------------------------------------- scoring


def predictions(**grids: Any) -> Any:
    found: dict[Any, Prediction] = {}
    for name, attempts in grids.items():
        task, number = name.rsplit("_", 1)
        p = found.setdefault((task, int(number)), Prediction())
        for weight, attempt in zip((9.0, 5.0, 1.0), attempts, strict=False):
            p.add(attempt, weight)
    return found


RIGHT, WRONG, OFF = grid([1, 2], [3, 4]), grid([1, 2], [3, 5]), grid([1, 2, 3])


def task(name: Any, *outputs: Any) -> Any:
    demo = Pair(grid([0]), grid([0]))
    return Task(name, (demo, demo), tuple(Pair(grid([0]), output) for output in outputs))


def test_score_by_hand() -> None:
    tasks = [task("a", RIGHT, RIGHT), task("b", RIGHT), task("c", RIGHT), task("d", RIGHT)]
    found = predictions(
        a_0=[RIGHT], a_1=[WRONG, RIGHT], b_0=[OFF, WRONG, RIGHT], c_0=[WRONG, OFF], d_0=[RIGHT]
    )
    slices = {"x": {("a", 0), ("b", 0)}, "y": {("a", 1)}, "none": {("z", 0)}}
    result = score(found, tasks, slices)
    assert {k: result[k] for k in ("n", "exact_at_1", "exact_at_2")} == {
        "n": 5, "exact_at_1": 2, "exact_at_2": 3,
    }  # fmt: skip
    assert result["size_accuracy"] == pytest.approx(4 / 5)
    assert result["cell_accuracy"] == pytest.approx((1 + 0.75 + 0 + 0.75 + 1) / 5)
    assert (result["tasks"], result["tasks_solved"]) == (4, 2)  # a and d
    assert result["slices"] == {
        "x": {"n": 2, "exact_at_1": 1, "exact_at_2": 1},
        "y": {"n": 1, "exact_at_1": 0, "exact_at_2": 1},
        "none": {"n": 0, "exact_at_1": 0, "exact_at_2": 0},
    }
    each = evaluation.outcomes_by_task(found, tasks)
    assert [[o and o["exact"] for o in each[name]] for name in "abcd"] == [
        [True, True], [False], [False], [True],
    ]  # fmt: skip
    assert each["b"] == [
        {"attempt_1": False, "attempt_2": False, "size": False, "cells": 0.0, "exact": False}
    ]


def test_unknown_outputs_and_missing_predictions_are_not_counted() -> None:
    tasks = [task("a", RIGHT, None), task("b", RIGHT)]
    assert score(predictions(a_0=[RIGHT], a_1=[RIGHT]), tasks)["n"] == 1
    empty = score({}, tasks)
    assert (empty["n"], empty["size_accuracy"], empty["cell_accuracy"]) == (0, 0.0, 0.0)


def test_slices_of_the_real_set_have_the_published_counts() -> None:
    tasks = dataset_arc.load_tasks("arcagi2")
    slices = dataset_arc.slices_of(tasks)
    assert {name: len(keys) for name, keys in slices.items()} == {
        "arc1_train": 408, "arc1_eval": 394, "arc2_new": 274, "small": 325,
    }  # fmt: skip
    everything = keys_of(tasks.train)
    assert len(everything) == 1076
    parts = [slices[name] for name in ("arc1_train", "arc1_eval", "arc2_new")]
    assert set().union(*parts) == everything
    right = {key: Prediction() for key in everything}
    for t in tasks.train:
        for number, pair in enumerate(t.tests):
            assert pair.output is not None
            right[t.task_id, number].add(pair.output, 1.0)
    result = score(right, tasks.train, slices)
    assert result["exact_at_1"] == result["n"] == 1076
    assert result["tasks_solved"] == 1000
    assert {name: c["exact_at_2"] for name, c in result["slices"].items()} == {
        "arc1_train": 408, "arc1_eval": 394, "arc2_new": 274, "small": 325,
    }  # fmt: skip


def test_reversibility_is_what_is_told_beyond_what_is_shown() -> None:
    inp = torch.tensor([[[1, 2], [3, -1]], [[1, 2], [3, -1]]])
    batch: Any = SimpleNamespace(query_input=inp, query_input_size=torch.tensor([[2, 2]] * 2))
    grids = torch.tensor([[[1, 2], [3, 0]], [[0, 0], [0, 0]]])
    sure = torch.nn.functional.one_hot(inp.clamp(min=0), 10).float().clamp(min=1e-5).log()
    half = torch.where(sure > -1, -np.log(2.0), sure)
    got = reversibility(
        grids,
        batch.query_input_size,
        torch.stack([sure[0], half[1]]),
        batch.query_input,
        batch.query_input_size,
    )
    assert got.tolist() == pytest.approx([0.5, 0.75])  # a copy; recovered by half, nothing shown


# ---------------------------------------------------------------- refinements and both ballots


def change(before: Any, after: Any, told: Any = (0.0, 0.0), accepted: Any = True) -> Any:
    return Change(before, after, told[0], told[1], accepted)


def test_what_no_demonstration_judged_is_not_called_accepted() -> None:
    won = {"reward": 0.5, "d_acc": 0.25, "accepted": 0.1}
    assert "10.0% accepted by the demonstrations" in evaluation.gains_line(won)
    assert "accepted" not in evaluation.gains_line(won, accept=False)


def test_gains_by_hand() -> None:
    """Breaks: before and after exchanged, cells compared across sizes, accepted ones alone
    averaged, another weight of a part."""
    found = {("a", 0): Prediction(), ("b", 0): Prediction(), ("z", 0): Prediction()}
    found["a", 0].changes = [
        change(WRONG, RIGHT, (0.2, 0.6)),  # a cell and a colour: +0.25 each
        change(OFF, RIGHT, (0.5, 0.5)),  # 1 x 3 to 2 x 2
    ]
    same = change(WRONG, WRONG, (0.3, 0.3), accepted=False)
    found["b", 0].changes = [dataclasses.replace(same, after=same.before), change(RIGHT, WRONG)]
    found["z", 0].changes = [change(WRONG, RIGHT)]  # no output is known
    tasks = [task("a", RIGHT), task("b", RIGHT), task("c", RIGHT)]
    parts = gains(found, tasks)
    assert parts["n"] == 4
    assert parts["accepted"] == 3 / 4
    # OFF: 1 x 3 of 2 x 2: sides 1/2 and 2/3; colours 1, 2 and 3 of four quarters: 3/4
    assert parts["d_acc"] == pytest.approx((0.25 + 1.0 + 0 - 0.25) / 4)
    assert parts["d_size"] == pytest.approx((0 + (1 - 7 / 12) + 0 + 0) / 4)
    assert parts["d_color"] == pytest.approx((0.25 + 0.25 + 0 - 0.25) / 4)
    assert parts["d_rev"] == pytest.approx(0.4 / 4)
    assert parts["reward"] == pytest.approx(
        parts["d_acc"] + 0.5 * (parts["d_size"] + parts["d_color"] + parts["d_rev"])
    )
    assert gains({}, tasks)["reward"] == 0.0


class Chooser:
    """A system whose own answer is WRONG for every query,
    refined to `answer` where it takes one."""

    def __init__(self, taken: Any, answer: Any, chances: Any) -> None:
        self.agent = SimpleNamespace(training=False)
        self.taken, self.answer, self.chances = taken, answer, chances
        self.seen: list[Any] = []

    def train(self, mode: Any = True) -> Any:
        return self

    def predict(self, batch: Any, generator: Any, **options: Any) -> Any:
        self.seen.append((batch, options))
        n = batch.n_queries

        def output(grid: Any) -> Any:
            canvas = torch.full((n, 8, 8), -1, dtype=torch.long)
            sizes = []
            for row, view in enumerate(batch.views):
                seen = torch.from_numpy(view.apply(grid).astype(int))
                sizes.append(list(seen.shape))
                canvas[row, : seen.shape[0], : seen.shape[1]] = seen
            return SimpleNamespace(
                grids=lambda step=-1: canvas,
                size=torch.tensor(sizes),
                logits=torch.zeros(2, n, 8, 8, 10),
                n_steps=torch.tensor([2] * n),
            )

        told = torch.zeros(*batch.query_input.shape, 10)
        choice = SimpleNamespace(
            taken=torch.tensor([self.taken] * n), chance=torch.tensor([self.chances] * n)
        )
        after = output(self.answer) if self.taken else output(WRONG)
        refinement = SimpleNamespace(choice=choice)
        return SimpleNamespace(
            before=output(WRONG), after=after, refinement=refinement, again=torch.arange(n),
            backward_before=told, backward_after=told,
        )  # fmt: skip


def offers(*grids: Any) -> Any:
    facts = np.zeros((len(grids), N_PROPOSAL_FACTS), np.float32)
    return {("a", 0): Proposals(tuple(grids), facts)}


def ballots(chooser: Any, proposals: Any, n_views: Any = 8) -> Any:
    hidden = without_outputs([task("a", RIGHT)])
    system: Any = chooser
    return predict_tasks(system, hidden, evaluation_views(n_views), proposals=proposals)["a", 0]


def weights_of(prediction: Any) -> Any:
    return {g: c.weight for g, c in
            ((c.grid.tobytes(), c) for c in prediction.candidates.values())}  # fmt: skip


def test_both_ballots_are_in_the_task_s_own_view_and_apart() -> None:
    """Breaks: proposals or refined answers not inverted; the network's ballot told of proposals."""
    found = ballots(Chooser(1, RIGHT, [0.2, 0.7, 0.1]), offers(RIGHT, OFF))
    assert {c.grid.tobytes() for c in found.candidates.values()} == {WRONG.tobytes()}
    both = found.refined
    assert {c.grid.tobytes() for c in both.candidates.values()} == {
        WRONG.tobytes(), RIGHT.tobytes(), OFF.tobytes(),
    }  # fmt: skip
    assert [g.tolist() for g in both.attempts()] == [RIGHT.tolist(), WRONG.tolist()]
    weight = weights_of(both)
    assert weight[RIGHT.tobytes()] == pytest.approx(8 * 0.7)
    assert weight[OFF.tobytes()] == pytest.approx(8 * 0.1)
    assert weight[WRONG.tobytes()] == pytest.approx(8 * 0.2, rel=0.02)
    assert both.views == found.views == 8
    assert len(found.changes) == 8
    for c in found.changes:
        assert c.accepted
        assert np.array_equal(c.before, WRONG)
        assert np.array_equal(c.after, RIGHT)
    predictions = {("a", 0): found}
    assert refined(predictions)["a", 0] is both
    bare = {("a", 0): Prediction()}
    assert refined(bare)["a", 0] is bare["a", 0]


def test_a_change_says_how_well_each_answer_is_told_backwards(hidden: Any) -> None:
    """Breaks: reversibility of another query, of the other answer,
    or of queries that did not change."""
    system = lively_system()
    explained_tasks = fitted(hidden)
    offered = proposals_for(explained_tasks)
    with torch.no_grad():
        system.policy_rl.proposals.wide.weight[0, 0] = 20.0  # a full verdict is preferred
    found = predict_tasks(system, hidden, [View()], proposals=offered)
    n_changed = 0
    for batch in evaluation_batches(hidden, View(), 32, proposals=offered):
        answered = system.predict(batch, torch.Generator())
        with torch.no_grad():
            reading = system.read(batch)
            told = [
                reversibility(
                    a.grids(),
                    a.size,
                    system.backward_of(reading, a.grids(), a.size),
                    batch.query_input,
                    batch.query_input_size,
                )
                for a in (answered.before, answered.after)
            ]
        for row, (task_id, _, number) in enumerate(batch.pair_ids):
            (change,) = found[task_id, number].changes
            changed = bool(answered.refinement.choice.taken[row] > 0)
            assert change.accepted == changed
            n_changed += changed
            wanted = [float(t[row]) * changed for t in told]
            assert [change.reversible_before, change.reversible_after] == pytest.approx(
                wanted, abs=1e-4
            )
    assert 2 < n_changed < len(found)


def test_an_answer_that_overrules_its_proposal_outweighs_it() -> None:
    """Breaks: OVERRULED not applied, applied to every proposal,
    or the refined answer without its vote."""
    found = ballots(Chooser(1, OFF, [0.2, 0.6, 0.5]), offers(RIGHT, grid([7])), 1)
    weight = weights_of(found.refined)
    assert weight[OFF.tobytes()] == pytest.approx(0.6)
    assert weight[RIGHT.tobytes()] == pytest.approx(0.6 * OVERRULED)
    assert weight[grid([7]).tobytes()] == pytest.approx(0.5)
    kept = ballots(Chooser(0, OFF, [0.2, 0.6, 0.5]), offers(RIGHT, grid([7])), 1)
    weight = weights_of(kept.refined)
    assert OFF.tobytes() not in weight
    assert weight[RIGHT.tobytes()] == pytest.approx(0.6)
    assert not kept.changes[0].accepted


def test_a_grid_that_several_say_counts_once_with_the_best_chance() -> None:
    """Breaks: agreement counted twice, or the last said in place of the best."""
    found = ballots(Chooser(0, RIGHT, [0.3, 0.6]), offers(WRONG), 2)
    weight = weights_of(found.refined)
    assert weight[WRONG.tobytes()] == pytest.approx(2 * 0.6, rel=0.01)


def test_two_attempts_are_two_grids_wherever_there_are_two(
    system: Any, hidden: Any, task_set: Any
) -> None:
    """Breaks: an attempt given away to the same grid, also where all views agree."""
    explained_tasks = fitted(hidden)
    found = predict_tasks(
        system, hidden, evaluation_views(2), proposals=proposals_for(explained_tasks)
    )
    for ballot in (*found.values(), *refined(found).values()):
        attempts = ballot.attempts()
        grids = {(g.shape, g.tobytes()) for g in attempts}
        assert len(grids) == len(attempts) == 2
        assert content(attempts[0]) in ballot.candidates
        assert len(ballot.attempts(1)) == 1
    assert any(len(p.candidates) == 1 for p in found.values())
    assert any(len(p.attempts()) == 2 for p in refined(found).values())
    both = joined(found, explained_tasks)
    for key, p in both.items():
        assert p is refined(found)[key]  # they have voted
    assert score(both, task_set.train)["exact_at_2"] >= 4


def fitted(tasks: Any) -> Any:
    return {
        (t.task_id, i): e
        for t in tasks
        for i, e in enumerate(
            rule_list.fit_task(
                [(p.input, p.output) for p in t.demonstrations], [p.input for p in t.tests]
            )
        )
    }


def test_hypotheses_that_came_late_vote_without_the_policy() -> None:
    """Breaks: late hypotheses lost, or those that voted counted again."""
    found = {("a", 0): ballots(Chooser(0, RIGHT, [0.4, 0.6]), offers(OFF), 2)}
    asked, late = (
        Hypothesis("pairs", g, Verdict(3, 3, 1.0), True, 1, "identity", "own") for g in (OFF, RIGHT)
    )
    in_time = joined(found, {("a", 0): Explained((asked,), 10, ())})
    assert in_time["a", 0] is found["a", 0].refined
    both = joined(found, {("a", 0): Explained((asked, late), 10, ())})["a", 0]
    assert [g.tolist() for g in both.attempts()] == [OFF.tolist(), RIGHT.tolist()]
    assert weights_of(both)[RIGHT.tobytes()] == pytest.approx(PRIOR["full"])
    unasked = joined({("a", 0): ballots(Chooser(0, RIGHT, [0.4]), {}, 2)},
                     {("a", 0): Explained((late,), 10, ())})  # fmt: skip
    assert unasked["a", 0].attempts()[0].tolist() == RIGHT.tolist()
    assert len(unasked["a", 0].attempts()) == 2


def test_the_system_is_told_how_well_it_does_on_the_demonstrations() -> None:
    """Breaks: own scores not handed on, of another task, 0 where nothing was measured."""
    chooser: Any = Chooser(0, RIGHT, [0.4])
    tasks = without_outputs([task("a", RIGHT), task("b", RIGHT)])
    predict_tasks(chooser, tasks, [View()], own_scores={"b": 0.25}, accept=False)
    ((batch, options),) = chooser.seen
    given = dict(zip((i[0] for i in batch.pair_ids), options["own_score"].tolist(), strict=True))
    assert given["b"] == 0.25
    assert np.isnan(given["a"])
    assert options["accept"] is False
    predict_tasks(chooser, tasks, [View()])
    assert chooser.seen[-1][1]["accept"] is True
    assert chooser.seen[-1][1]["own_score"].isnan().all()


def test_demonstrations_are_scored_from_the_others_alone(system: Any, task_set: Any) -> None:
    """Breaks: the demonstration among its own context, the refined answer scored,
    one score for all."""
    tasks = without_outputs(task_set.train[:3])
    index = {task.task_id: i for i, task in enumerate(tasks)}
    found = demonstration_scores(system, tasks, task_index=index)
    for t in tasks:
        shares = []
        for k, pair in enumerate(t.demonstrations):
            others = (*t.demonstrations[:k], *t.demonstrations[k + 1 :])
            bare = Task(t.task_id, others, (Pair(pair.input, None),))
            said = predict_tasks(system, [bare], [View()], task_index=index)[t.task_id, 0]
            grid_said = said.attempts(1)[0]
            assert pair.output is not None
            same = grid_said.shape == pair.output.shape
            shares.append(float((grid_said == pair.output).mean()) if same else 0.0)
        assert found[t.task_id] == pytest.approx(np.mean(shares))
    lone = Task("one", tasks[0].demonstrations[:1], tasks[0].tests)
    assert demonstration_scores(system, [lone]) == {}


def test_contested_are_tasks_of_which_the_demonstrations_are_in_two_minds() -> None:
    """Breaks: the network asked for every task, or where a full verdict decides."""

    def said(*verdicts: Any) -> Any:
        hypotheses = [
            Hypothesis("pairs", RIGHT, Verdict(n, 3, n / 3), True, 1, "identity", "own")
            for n in verdicts
        ]
        return Explained(tuple(hypotheses), 10, ())

    explained = {
        ("full", 0): said(3, 1), ("some", 0): said(1, 0), ("none", 0): said(0, 0),
        ("late", 0): said(0), ("late", 1): said(2), ("no", 0): said(),
    }  # fmt: skip
    assert contested(explained) == {"some", "late"}


def test_contested_tasks_alone_are_asked_for_their_own_scores(
    system: Any, task_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: the network asked for every task, or for one that is not among the tasks."""
    tasks = without_outputs(task_set.train[:3])
    asked = {task.task_id for task in tasks[1:]} | {"another"}
    monkeypatch.setattr(evaluation, "contested", lambda _: asked)
    found = evaluation.contested_scores(system, tasks, {}, seed=3)
    assert found == demonstration_scores(system, tasks[1:], seed=3)
    assert set(found) == {task.task_id for task in tasks[1:]}


def test_a_question_is_one_demonstration_without_itself_in_sight(task_set: Any) -> None:
    """Breaks: another demonstration asked, or shown; a question under another task's name."""
    task = task_set.train[0]
    for number, pair in enumerate(task.demonstrations):
        question = left_out(task, number)
        assert question.task_id == task.task_id
        assert question.tests == (pair,)
        assert pair not in question.demonstrations
        assert len(question.demonstrations) == len(task.demonstrations) - 1
    assert left_out(task, 0, "other").task_id == "other"


def test_where_hypotheses_answer_the_deadline_cuts_the_first_view_too(
    system: Any, hidden: Any
) -> None:
    """Breaks: a time budget overrun by a whole view; queries without any answer,
    left out of the count."""
    past = time.monotonic() - 1.0
    assert (
        predict_tasks(system, hidden, evaluation_views(2), deadline=past, whole_first=False) == {}
    )
    some = predict_tasks(
        system, hidden, evaluation_views(2), batch_size=1, max_batches=2, whole_first=False
    )
    assert len(some) == 2
    keys = keys_of(hidden)
    whole = answered_all(some, hidden, keys)
    assert set(whole) == keys
    for task in hidden:
        for number, pair in enumerate(task.tests):
            if (task.task_id, number) not in some:
                (grid,) = whole[task.task_id, number].attempts()
                assert np.array_equal(grid, pair.input)
    (task, *_) = hidden
    key, lone = (task.task_id, 0), Prediction()
    lone.add(np.full((1, 1), 7, np.uint8), 1.0)
    grids = answered_all({key: lone}, [task], {key})[key].attempts()
    assert [g.tolist() for g in grids] == [[[7]], task.tests[0].input.tolist()]
    assert lone.spare is None
    assert len(some) == 2


def test_the_validation_subset_is_fixed_by_the_seed(train: Any) -> None:
    tasks = dataset_arc.load_tasks(train.data)
    keys = validation_keys(tasks.train, 3, 0)
    assert keys == validation_keys(tasks.train, 3, 0)
    assert len(keys) == 3
    assert any(validation_keys(tasks.train, 3, seed) != keys for seed in range(1, 9))
