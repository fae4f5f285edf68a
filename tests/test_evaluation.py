"""Prediction without targets, voting, inverted views, scoring, slices."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dataset_arc
from dataset_arc import Pair, Task, View, evaluation_views
from evaluation import (
    REVERSIBLE_WEIGHT,
    SURE_WEIGHT,
    Prediction,
    predict_tasks,
    reversibility,
    score,
    without_outputs,
)


def grid(*rows):
    return np.array(rows, np.uint8)


def keys_of(tasks):
    return {(t.task_id, i) for t in tasks for i in range(len(t.tests))}


@pytest.fixture(scope="module")
def hidden(task_set):
    return without_outputs(task_set.train)


# ---------------------------------------------------------------- voting


def test_the_two_heaviest_grids_are_the_attempts():
    p = Prediction()
    p.add(grid([1]), 1.0)
    p.add(grid([2]), 1.4)
    p.add(grid([3]), 1.2)
    p.add(grid([1]), 1.0)
    assert [g.tolist() for g in p.attempts()] == [[[1]], [[2]]]
    assert [g.tolist() for g in p.attempts(9)] == [[[1]], [[2]], [[3]]]
    assert sorted(c.votes for c in p.candidates.values()) == [1, 1, 2]


def test_votes_that_weigh_the_same_keep_the_order_they_came_in():
    p = Prediction()
    for value in (5, 3, 4):
        p.add(grid([value]), 1.0)
    assert [int(g[0, 0]) for g in p.attempts(3)] == [5, 3, 4]


def test_grids_with_the_same_cells_in_another_shape_are_different():
    p = Prediction()
    p.add(grid([1, 2]), 1.0)
    p.add(grid([1], [2]), 1.0)
    assert len(p.candidates) == 2
    assert len(p.attempts()) == 2


def test_one_grid_is_one_attempt():
    p = Prediction()
    p.add(grid([1]), 1.0)
    assert len(p.attempts()) == 1


# ---------------------------------------------------------------- predicting


def test_tasks_with_a_test_output_in_sight_are_refused(system, task_set, hidden):
    with pytest.raises(ValueError, match="must not see test outputs"):
        predict_tasks(system, task_set.train, [View()])
    with pytest.raises(ValueError, match="must not see test outputs"):
        predict_tasks(system, [*hidden[1:], task_set.train[0]], [View()])


def test_without_outputs_leaves_inputs_and_demonstrations(task_set, hidden):
    for before, after in zip(task_set.train, hidden, strict=True):
        assert all(pair.output is None for pair in after.tests)
        assert [p.input for p in after.tests] == [p.input for p in before.tests]
        assert after.demonstrations is before.demonstrations
        assert all(pair.output is not None for pair in before.tests)


def test_every_query_gets_one_vote_per_view(system, hidden):
    done: list[int] = []
    found = predict_tasks(system, hidden, evaluation_views(3), batch_size=4, progress=done.append)
    assert set(found) == keys_of(hidden)
    assert sum(done) == 3 * len(found)
    for prediction in found.values():
        assert sum(c.votes for c in prediction.candidates.values()) == 3
        weight = sum(c.weight for c in prediction.candidates.values())
        assert 3.0 <= weight <= 3.0 * (1 + SURE_WEIGHT + REVERSIBLE_WEIGHT) + 1e-6
        for candidate in prediction.candidates.values():
            assert candidate.grid.dtype == np.uint8
            assert candidate.grid.max() <= 9


def test_only_the_wanted_queries_are_returned(system, hidden):
    wanted = {sorted(keys_of(hidden))[2]}
    assert set(predict_tasks(system, hidden, [View()], only=wanted)) == wanted


def test_a_deadline_never_costs_the_first_view(system, hidden):
    past = time.monotonic() - 1.0
    found = predict_tasks(system, hidden, evaluation_views(4), deadline=past)
    assert set(found) == keys_of(hidden)
    assert all(sum(c.votes for c in p.candidates.values()) == 1 for p in found.values())


def test_small_tasks_get_all_their_views_before_large_ones_their_second(system, hidden):
    order = []
    views = evaluation_views(3)

    class Spy:
        def __getattr__(self, name):
            return getattr(system, name)

        def predict(self, batch, generator, **options):
            order.extend(task_id for task_id, _, _ in batch.pair_ids)
            return system.predict(batch, generator, **options)

    predict_tasks(Spy(), hidden, views, deadline=time.monotonic() + 600)
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


def test_max_batches_ends_the_voting_and_never_the_first_view(system, hidden):
    def votes(max_batches):
        done = []
        found = predict_tasks(
            system,
            hidden,
            evaluation_views(3),
            batch_size=2,
            max_batches=max_batches,
            progress=done.append,
        )
        assert set(found) == keys_of(hidden)
        return len(done)

    first_view = votes(1)
    assert first_view > 1
    assert votes(first_view + 2) == first_view + 2
    assert votes(1000) > first_view + 2


def test_batch_size_changes_no_prediction(system, hidden):
    a = predict_tasks(system, hidden, [View()], batch_size=1)
    b = predict_tasks(system, hidden, [View()], batch_size=32)
    for key in a:
        assert np.array_equal(a[key].attempts(1)[0], b[key].attempts(1)[0])


def test_the_system_keeps_its_mode(system, hidden):
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

    def __init__(self, rule):
        self.agent = SimpleNamespace(training=False)
        self.rule = rule

    def train(self, mode=True):
        return self

    def predict(self, batch, generator, **options):
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
        told = torch.zeros(*batch.query_input.shape, 10)
        return SimpleNamespace(
            before=output, after=output, refinement=None, backward=told, backward_before=told
        )


@pytest.mark.parametrize("rule", [np.rot90, np.flipud, lambda g: g[:1, :2], lambda g: g])
def test_views_are_inverted_so_that_they_vote_for_one_grid(hidden, rule):
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


def test_a_perfect_predictor_scores_everything(task_set, hidden):
    turned = [t for t in hidden if t.task_id.endswith("turn")]
    oracle: Any = Oracle(np.rot90)
    found = predict_tasks(oracle, turned, evaluation_views(8))
    result = score(found, task_set.train)
    assert (result["n"], result["exact_at_1"], result["exact_at_2"]) == (1, 1, 1)
    assert result["size_accuracy"] == result["cell_accuracy"] == 1.0


# ---------------------------------------------------------------- scoring


def predictions(**grids):
    found: dict[Any, Prediction] = {}
    for name, attempts in grids.items():
        task, number = name.rsplit("_", 1)
        p = found.setdefault((task, int(number)), Prediction())
        for weight, attempt in zip((9.0, 5.0, 1.0), attempts, strict=False):
            p.add(attempt, weight)
    return found


RIGHT, WRONG, OFF = grid([1, 2], [3, 4]), grid([1, 2], [3, 5]), grid([1, 2, 3])


def task(name, *outputs):
    demo = Pair(grid([0]), grid([0]))
    return Task(name, (demo, demo), tuple(Pair(grid([0]), output) for output in outputs))


def test_score_by_hand():
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


def test_unknown_outputs_and_missing_predictions_are_not_counted():
    tasks = [task("a", RIGHT, None), task("b", RIGHT)]
    assert score(predictions(a_0=[RIGHT], a_1=[RIGHT]), tasks)["n"] == 1
    empty = score({}, tasks)
    assert (empty["n"], empty["size_accuracy"], empty["cell_accuracy"]) == (0, 0.0, 0.0)


def test_slices_of_the_real_set_have_the_published_counts():
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


def test_reversibility_is_what_is_told_beyond_what_is_shown():
    inp = torch.tensor([[[1, 2], [3, -1]], [[1, 2], [3, -1]]])
    batch: Any = SimpleNamespace(query_input=inp, query_input_size=torch.tensor([[2, 2]] * 2))
    grids = torch.tensor([[[1, 2], [3, 0]], [[0, 0], [0, 0]]])
    sure = torch.nn.functional.one_hot(inp.clamp(min=0), 10).float().clamp(min=1e-5).log()
    half = torch.where(sure > -1, -np.log(2.0), sure)
    got = reversibility(batch, grids, batch.query_input_size, torch.stack([sure[0], half[1]]))
    assert got.tolist() == pytest.approx([0.5, 0.75])  # a copy; told by half, nothing shown
