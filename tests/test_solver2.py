"""Permanent memory: tokens, retrieval of other tasks, storing, the ring,
and what it never holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from grid_features import N_CONTROL
from hypotheses import N_ARM_SLOTS
from solver2 import N_ALIKE, N_VIEWS, Solver2

WIDTH = 8


@pytest.fixture
def memory() -> Any:
    torch.manual_seed(0)
    return Solver2(5, WIDTH, n_task_tokens=3, capacity=4, n_retrieved=2)


def long(*values: Any) -> Any:
    return torch.tensor(values, dtype=torch.long)


def yes(*values: Any) -> Any:
    return torch.tensor([bool(v) for v in values])


def unit(*places: Any) -> Any:
    """Rows that are unit vectors along these channels."""
    return torch.eye(WIDTH)[list(places)]


def store(memory: Any, places: Any, tasks: Any, keep: Any = None, accuracy: Any = 0.5) -> None:
    keep = [True] * len(places) if keep is None else keep
    memory.store(unit(*places), long(*tasks), torch.full((len(places),), accuracy), yes(*keep))


# ---------------------------------------------------------------- tokens


def test_tokens_have_the_shape_of_task_view_and_retrieved_ones(memory: Any) -> None:
    tokens, mask = memory.tokens(long(0, 4), long(0, 7), yes(1, 1), torch.randn(2, WIDTH))
    assert tokens.shape == (2, 3 + 1 + 2, WIDTH)
    assert mask.tolist() == [[True] * 4 + [False] * 2] * 2  # the bank is empty


def test_known_tasks_have_their_own_tokens_and_others_the_unknown_ones(memory: Any) -> None:
    with torch.no_grad():
        memory.unknown.fill_(7.0)
    task, keep = long(2, -1, 2), yes(1, 1, 0)
    tokens, _ = memory.tokens(task, long(0, 0, 0), keep, torch.zeros(3, WIDTH))
    assert torch.equal(tokens[0, :3].flatten(), memory.task_tokens.weight[2])
    assert (tokens[1, :3] == 7.0).all()
    assert (tokens[2, :3] == 7.0).all()


def test_every_dihedral_view_has_its_token(memory: Any) -> None:
    view = torch.arange(N_VIEWS)
    tokens, _ = memory.tokens(
        torch.full((N_VIEWS,), -1), view, torch.ones(N_VIEWS, dtype=torch.bool), torch.zeros(8, 8)
    )
    assert torch.equal(tokens[:, 3], memory.view_tokens.weight)


def test_gradient_reaches_every_parameter(memory: Any) -> None:
    store(memory, [0], [4])
    tokens, mask = memory.tokens(long(0, -1), long(0, 1), yes(1, 1), torch.ones(2, WIDTH))
    ((tokens + 1.0) * mask.unsqueeze(-1)).square().sum().backward()
    for name, p in memory.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_without_memory_there_are_no_retrieved_tokens() -> None:
    memory = Solver2(5, WIDTH, n_task_tokens=3, use_memory=False)
    tokens, _ = memory.tokens(long(0), long(0), yes(1), torch.zeros(1, WIDTH))
    assert tokens.shape == (1, 4, WIDTH)


def test_a_run_without_known_tasks_still_builds() -> None:
    memory = Solver2(0, WIDTH)
    tokens, _ = memory.tokens(long(-1), long(0), yes(1), torch.zeros(1, WIDTH))
    assert torch.isfinite(tokens).all()


# ---------------------------------------------------------------- the bank


def test_retrieval_takes_the_most_alike_of_other_tasks(memory: Any) -> None:
    store(memory, [0, 1, 2], [0, 1, 2])
    query = unit(0) + 0.5 * unit(1) + 0.2 * unit(2)
    found, mask = memory.retrieve(query, long(3))
    likeness = torch.nn.functional.normalize(query, dim=-1)[0]
    assert mask.tolist() == [[True, True]]
    for slot, place in enumerate((0, 1)):
        expected = memory.gate * likeness[place] * memory.value(unit(place))[0]
        torch.testing.assert_close(found[0, slot], expected)


def test_a_task_s_own_entry_is_never_given_back(memory: Any) -> None:
    """However alike: the next best comes first, and its weight is its own likeness."""
    store(memory, [0, 1, 2], [0, 1, 2])
    query = unit(0) + 0.5 * unit(1) + 0.2 * unit(2)
    likeness = torch.nn.functional.normalize(query, dim=-1)[0]
    for task, places in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1)), (3, (0, 1))):
        found, mask = memory.retrieve(query, long(task))
        assert mask.tolist() == [[True, True]]
        expected = [memory.gate * likeness[p] * memory.value(unit(p))[0] for p in places]
        torch.testing.assert_close(found[0], torch.stack(expected))
    alone = Solver2(5, WIDTH, capacity=4)
    store(alone, [0], [0])
    found, mask = alone.retrieve(query, long(0))
    assert mask.tolist() == [[False, False]]
    assert torch.count_nonzero(found) == 0


def test_unseen_tasks_may_retrieve_every_entry(memory: Any) -> None:
    store(memory, [0], [-1])
    _, mask = memory.retrieve(unit(0), long(-1))
    assert mask.tolist() == [[True, False]]


def test_entries_pointing_away_are_given_no_weight(memory: Any) -> None:
    store(memory, [0], [1])
    found, _ = memory.retrieve(-unit(0), long(2))
    assert torch.count_nonzero(found) == 0


def test_store_keeps_what_it_is_told_and_counts_it(memory: Any) -> None:
    assert memory.n_updates == 0
    store(memory, [0, 1, 2], [0, 1, 2], keep=[1, 0, 1], accuracy=0.75)
    assert memory.n_updates == 2
    assert memory.owners.tolist() == [0, 2, -2, -2]
    assert torch.equal(memory.keys[:2], unit(0, 2))
    assert memory.scores.tolist() == [0.75, 0.75, 0.0, 0.0]


def test_a_task_that_comes_again_replaces_its_entry(memory: Any) -> None:
    store(memory, [0, 1], [0, 1])
    store(memory, [5], [0], accuracy=0.9)
    assert memory.owners.tolist() == [0, 1, -2, -2]
    assert torch.equal(memory.keys[:2], unit(5, 1))
    assert memory.counters.tolist() == [2, 3]  # two slots used, three updates


def test_a_full_bank_replaces_the_oldest(memory: Any) -> None:
    store(memory, [0, 1, 2, 3], [0, 1, 2, 3])
    store(memory, [4], [4])
    assert memory.owners.tolist() == [4, 1, 2, 3]
    store(memory, [5, 6], [-1, -1])  # unseen tasks never replace one another
    assert memory.owners.tolist() == [4, -1, -1, 3]


def test_the_bank_takes_no_gradient_and_no_graph(memory: Any) -> None:
    summary = torch.ones(1, WIDTH, requires_grad=True)
    memory.store(summary * 2, long(0), torch.ones(1), yes(1))
    assert not memory.keys.requires_grad
    found, _ = memory.retrieve(summary, long(1))
    found.sum().backward()
    assert summary.grad is None


def test_state_dict_carries_the_bank(memory: Any) -> None:
    store(memory, [0, 1], [0, 1])
    other = Solver2(5, WIDTH, n_task_tokens=3, capacity=4, n_retrieved=2)
    other.load_state_dict(copy.deepcopy(memory.state_dict()))
    assert other.n_updates == 2
    query = torch.randn(3, WIDTH)
    a, b = memory.retrieve(query, long(3, 3, -1)), other.retrieve(query, long(3, 3, -1))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_the_bank_has_no_room_for_grids(memory: Any) -> None:
    shapes = {name: tuple(b.shape) for name, b in memory.named_buffers()}
    assert shapes == {
        **{"keys": (4, WIDTH), "owners": (4,), "scores": (4,), "counters": (2,)},
        **{"fingerprints": (4, N_CONTROL), "arm_owners": (4,), "arm_counter": (1,)},
        "arms_right": (4, N_ARM_SLOTS),
    }


# ---------------------------------------------------------------- arms that were right, recalled


def prints(*places: Any) -> Any:
    """Fingerprints (N, N_CONTROL) far apart, one per place."""
    found = torch.zeros(len(places), N_CONTROL)
    found[range(len(places)), list(places)] = 10.0
    return found


def shares(*values: Any) -> Any:
    """(N, N_ARM_SLOTS): these for arm 0, arm 1 ..., -1 for the rest."""
    found = torch.full((len(values), N_ARM_SLOTS), -1.0)
    for row, of_task in enumerate(values):
        found[row, : len(of_task)] = torch.tensor(of_task)
    return found


def test_recall_is_right_over_tried_of_the_tasks_alike() -> None:
    """Breaks: untried arms counted as wrong, or as 0; entries of the empty bank counted."""
    memory = Solver2(9, WIDTH, capacity=64)
    nothing = memory.recall(prints(0), long(8))
    assert nothing.tolist() == [[-1.0] * N_ARM_SLOTS]
    memory.store_arms(prints(0, 1, 2), long(0, 1, 2), shares([1.0, 0.5], [0.0, -1.0], [0.5]))
    found = memory.recall(prints(0), long(8))[0]
    assert found[0] == pytest.approx(0.5)
    assert found[1] == pytest.approx(0.5)
    assert (found[2:] == -1).all()


def test_recall_asks_the_tasks_most_alike_alone() -> None:
    """Breaks: the farthest asked, or all."""
    memory = Solver2(99, WIDTH, capacity=64)
    near = prints(*[0] * N_ALIKE) + 0.01 * torch.arange(N_ALIKE)[:, None]
    memory.store_arms(prints(*[5] * 20), torch.arange(20), shares(*[[0.0]] * 20))
    memory.store_arms(near, 20 + torch.arange(N_ALIKE), shares(*[[1.0]] * N_ALIKE))
    assert memory.recall(prints(0, 5), long(90, 91))[:, 0].tolist() == [1.0, 0.0]


def test_a_task_s_own_arms_are_never_recalled() -> None:
    """Breaks: the own task among the tasks alike."""
    memory = Solver2(9, WIDTH, capacity=64)
    memory.store_arms(prints(0, 1), long(3, 4), shares([1.0], [0.0]))
    assert memory.recall(prints(0, 0, 0), long(3, 4, -1))[:, 0].tolist() == [0.0, 1.0, 0.5]
    alone = Solver2(9, WIDTH, capacity=64)
    alone.store_arms(prints(0), long(3), shares([1.0]))
    assert alone.recall(prints(0), long(3))[0, 0] == -1
    assert Solver2(9, WIDTH, use_memory=False).recall(prints(0), long(3))[0, 0] == -1


def test_without_memory_no_arm_is_recalled() -> None:
    """Breaks: --no_memory that remembers."""
    memory = Solver2(9, WIDTH, use_memory=False)
    memory.store_arms(prints(0), long(3), shares([1.0]))
    assert (memory.recall(prints(0), long(4)) == -1).all()


def test_a_task_that_comes_again_replaces_its_arms_and_a_full_bank_the_oldest() -> None:
    """Breaks: entries doubled, so that a task that comes often outweighs the others."""
    memory = Solver2(99, WIDTH, capacity=4)
    memory.store_arms(prints(0, 1), long(3, 4), shares([1.0], [1.0]))
    memory.store_arms(prints(2), long(3), shares([0.0]))
    assert memory.arm_owners.tolist() == [3, 4, -2, -2]
    assert torch.equal(memory.fingerprints[:2], prints(2, 1))
    assert memory.arms_right[:, 0].tolist() == [0.0, 1.0, -1.0, -1.0]
    assert int(memory.arm_counter) == 2
    memory.store_arms(prints(3, 4, 5), long(-1, -1, 8), shares([0.5], [0.5], [0.25]))
    assert memory.arm_owners.tolist() == [8, 4, -1, -1]  # the unseen replace nothing of theirs
    other = Solver2(99, WIDTH, capacity=4)
    other.load_state_dict(copy.deepcopy(memory.state_dict()))
    assert torch.equal(other.recall(prints(1), long(7)), memory.recall(prints(1), long(7)))
