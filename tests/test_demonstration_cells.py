"""Demonstrations read in groups of about one size: grouping, what queries see, equal answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lively_system
from hypothesis import given
from hypothesis import strategies as st

from batches import Batch, TrainingStream, evaluation_batches
from dataset_arc import Pair, Task
from demonstration_cells import GROUP_CELLS, Group, context_cells, groups_of
from grid_parts import MAX_SIDE

SIDE = st.integers(1, MAX_SIDE)
ROOMS = st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=24)


def task_of(name: str, *shapes: tuple[tuple[int, int], tuple[int, int]]) -> Task:
    """A task with demonstrations of these sizes, input and output, and one test input."""
    rng = np.random.default_rng([len(shapes), *name.encode()])

    def grid(shape: tuple[int, int]) -> Any:
        return rng.integers(0, 10, shape).astype(np.uint8)

    pairs = tuple(Pair(grid(given), grid(wanted)) for given, wanted in shapes)
    return Task(name, pairs, (Pair(grid(shapes[0][0]), None),))


TASKS = [
    task_of("long", ((4, 4), (1, 12)), ((5, 3), (12, 2))),
    task_of("square", ((3, 3), (3, 3)), ((9, 9), (9, 9)), ((2, 7), (3, 3)), ((9, 9), (9, 9))),
]


@pytest.fixture
def mixed() -> Batch:
    """Outputs of 1 x 12 and 12 x 2 in one task, 3 x 3 and 9 x 9 in the other."""
    return next(evaluation_batches(TASKS, batch_size=8))


# ---------------------------------------------------------------- grouping


@given(ROOMS)
def test_each_demonstration_is_in_one_group_that_holds_it(rooms: Any) -> None:
    groups = groups_of(rooms)
    assert sorted(n for group in groups for n in group.members) == list(range(len(rooms)))
    for group in groups:
        assert group.rows == max(rooms[n][0] for n in group.members)
        assert group.cols == max(rooms[n][1] for n in group.members)
        assert list(group.members) == sorted(group.members)


@given(ROOMS)
def test_equal_ones_are_one_group_and_little_is_padded(rooms: Any) -> None:
    """Breaks: a further group where none is needed; padding that costs more than groups do."""
    groups = groups_of(rooms)
    for room in set(rooms):
        assert sum(any(rooms[n] == room for n in group.members) for group in groups) == 1
    computed = sum(len(group.members) * group.rows * group.cols for group in groups)
    padded = computed - sum(rows * cols for rows, cols in rooms)
    assert padded <= GROUP_CELLS * (len(set(rooms)) - len(groups))
    assert len(groups_of(rooms, "cuda")) <= len(groups)


def test_what_lies_on_one_canvas_is_one_group() -> None:
    """As in training, where a batch's canvas tells nothing of any output."""
    assert groups_of([(7, 9)] * 3) == [Group((0, 1, 2), 7, 9)]


# ---------------------------------------------------------------- what a batch says of its rooms


def test_an_evaluation_batch_has_a_room_for_each_output(mixed: Any) -> None:
    sizes = [tuple(size) for size in mixed.demo_output_size.tolist()]
    assert mixed.demo_rooms == sizes
    assert mixed.most_seen == 3 * 3 + 9 * 9 + 3 * 3 + 9 * 9


def test_a_training_batch_has_its_canvas_as_every_room() -> None:
    """Breaks: a room that tells how large a query's own output is."""
    stream = TrainingStream(TASKS, 0, 8, overflow=False)
    for batch, _ in stream.epoch(0):
        rows, cols = batch.demo_output.shape[1:]
        assert set(batch.demo_rooms) == {(rows, cols)}
        longest = int((batch.context >= 0).sum(1).max())
        assert batch.most_seen == longest * rows * cols


# ---------------------------------------------------------------- reading


def test_groups_change_no_answer(mixed: Any) -> None:
    """Breaks: a demonstration's cells looked for where another's are; a place that is not its own;
    the padding of a group in sight."""
    system = lively_system()
    rows, cols = mixed.demo_output.shape[1:]
    n = len(mixed.demo_output)
    assert len(groups_of(mixed.demo_rooms)) == 3  # one of them padded
    at_once = dataclasses.replace(
        mixed, demo_rooms=[(rows, cols)] * n, most_seen=mixed.context.shape[1] * rows * cols
    )
    with torch.no_grad():
        a, b = (system.answer(system.read(batch)) for batch in (mixed, at_once))
    torch.testing.assert_close(a.logits, b.logits, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(a.size_logits, b.size_logits)
    assert torch.equal(a.size, b.size)


def test_the_cells_are_those_of_the_demonstrations(mixed: Any) -> None:
    system = lively_system()
    with torch.no_grad():
        demos = system.agent.read_demonstrations(mixed)
    assert len(demos.mask) == int(demos.count.sum())
    for number, (rows, cols) in enumerate(mixed.demo_output_size.tolist()):
        first, count = int(demos.first[number]), int(demos.count[number])
        own = slice(first, first + count)
        there = demos.mask[own]
        wanted = [row * MAX_SIDE + col for row in range(rows) for col in range(cols)]
        assert demos.place[own][there].tolist() == wanted
        output = mixed.demo_output[number]
        for cell, place in zip(demos.right[own][there], wanted, strict=True):
            colour = int(output[place // MAX_SIDE, place % MAX_SIDE])
            assert cell[-10:].argmax() == colour


def test_context_cells_are_the_query_s_own_and_their_number_follows_rooms(
    system: Any, mixed: Any, whole_batch: Any
) -> None:
    for batch in (mixed, whole_batch):
        with torch.no_grad():
            demos = system.agent.read_demonstrations(batch)
        for limit in (10_000, 40, 7):
            where, seen = context_cells(demos, batch.context, limit)
            assert where.shape[1] == min(limit, batch.most_seen)
            for query, slots in enumerate(batch.context.tolist()):
                own = {
                    cell
                    for d in slots
                    if d >= 0
                    for cell in range(int(demos.first[d]), int(demos.first[d] + demos.count[d]))
                    if demos.mask[cell]
                }
                kept = where[query][seen[query]].tolist()
                assert len(set(kept)) == len(kept) == min(limit, len(own))
                assert set(kept) <= own


def test_cells_that_differ_from_the_input_come_first(mixed: Any) -> None:
    system = lively_system()
    with torch.no_grad():
        demos = system.agent.read_demonstrations(mixed)
    where, seen = context_cells(demos, mixed.context, 30)
    changed = demos.right[:, 0] == 0
    for query, slots in enumerate(mixed.context.tolist()):
        own = torch.zeros_like(changed)
        for d in slots:
            if d >= 0:
                own[int(demos.first[d]) : int(demos.first[d] + demos.count[d])] = True
        n_changed = int((own & demos.mask & changed).sum())
        kept = where[query][seen[query]]
        assert int(changed[kept].sum()) == min(n_changed, len(kept))


def test_another_task_s_demonstrations_are_all_in_sight(mixed: Any) -> None:
    """Breaks: shuffled demonstrations cut to as many cells as the batch's own contexts have."""
    system = lively_system(demonstrations="shuffled")
    few = dataclasses.replace(mixed, most_seen=1)
    with torch.no_grad():
        a, b = (system.answer(system.read(batch)).logits for batch in (mixed, few))
    assert torch.equal(a, b)
