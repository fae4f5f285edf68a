"""Test-time training: demonstrations only, new tasks only, repeatable; it learns, or is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAST, differing, lively_system, make_tasks, write_tasks

import adaptation
import evaluation
import predict
import trainloop_complete_with_fixes as trainloop
from adaptation import FOLDS, Adapted, Measure, adapt
from batches import View
from dataset_arc import Pair, load_tasks
from evaluation import predict_tasks, without_outputs


@pytest.fixture
def unseen(task_set: Any) -> Any:
    return without_outputs(task_set.train)


def small() -> Any:
    return lively_system(planning_steps=2)


def weights(system: Any) -> Any:
    return {
        f"{module}.{name}": p.detach().clone()
        for module, part in system.modules().items()
        for name, p in part.named_parameters()
    }


def test_new_tasks_start_as_unseen_ones_answer(unseen: Any) -> None:
    system, unseen = small(), unseen[:3]
    before = predict_tasks(system, unseen, [View()])
    first = system.solver2.add_tasks(len(unseen))
    index = {task.task_id: first + i for i, task in enumerate(unseen)}
    after = predict_tasks(system, unseen, [View()], task_index=index)
    for key, found in before.items():
        assert np.array_equal(found.attempts(1)[0], after[key].attempts(1)[0])


def test_only_the_tokens_of_new_tasks_change_if_only_they_may(
    unseen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = small()
    known = {unseen[0].task_id: 2}
    before = weights(system)
    monkeypatch.setattr(Adapted, "accepted", property(lambda self: frozenset()))
    learners = spied(monkeypatch, "_train")
    adapted = adapt(system, unseen, known, n_batches=3, parts="tokens")
    assert differing(before, weights(system)) == []  # what is given stays as it is
    assert len(learners) >= FOLDS
    after = weights(learners[-1][0])
    name = "solver2.task_tokens.weight"
    n_old = len(before[name])
    new_rows = [row for task_id, row in adapted.task_index.items() if task_id not in known]
    assert sorted(new_rows) == list(range(n_old, n_old + len(unseen) - 1))
    assert adapted.task_index[unseen[0].task_id] == 2
    assert torch.equal(after[name][:n_old], before[name])
    start = system.solver2.unknown.detach().flatten()
    assert any(not torch.equal(after[name][row], start) for row in new_rows)
    same = {key for key in before if key != name and not key.startswith("policy_rl.rl.")}
    assert all(torch.equal(before[key], after[key]) for key in same)
    policy = [key for key in before if key.startswith("policy_rl.rl.")]
    assert any(not torch.equal(before[key], after[key]) for key in policy)


def spied(monkeypatch: pytest.MonkeyPatch, name: Any, owner: Any = adaptation) -> Any:
    """Arguments of every call of a function, from now on."""
    calls: list[Any] = []
    real = getattr(owner, name)

    def spy(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        calls.append((*args, result))
        return result

    monkeypatch.setattr(owner, name, spy)
    return calls


def test_no_demonstration_is_judged_by_weights_that_have_trained_on_it(
    unseen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another output of it: the same grids are said of it before and after, of others not."""
    tasks = unseen[:2]
    d = tasks[0].demonstrations
    first = Pair(d[0].input, ((d[0].output.astype(int) + 1) % 10).astype(np.uint8))
    other = [dataclasses.replace(tasks[0], demonstrations=(first, *d[1:])), tasks[1]]
    said = []
    for given in (tasks, other):
        with monkeypatch.context() as patch:
            calls = spied(patch, "predict_tasks", evaluation)
            trained = spied(patch, "_train")
            adapt(small(), given, {}, n_batches=2, lr=0.01)
        asked = [(call[1], call[-1]) for call in calls]
        assert len(asked) == 2 * 3  # three demonstrations, before and after
        for some, _ in asked:
            assert all(pair.output is None for task in some for pair in task.tests)
            assert all(len(task.demonstrations) == 2 for task in some)
        said.append([found[tasks[0].task_id, 0].candidates for _, found in asked])
        shown = [call[1].tasks for call in trained[:FOLDS]]
        for fold, stream_tasks in enumerate(shown):
            for task, whole in zip(
                stream_tasks, sorted(given, key=adaptation._largest_grid), strict=True
            ):
                kept = [p for i, p in enumerate(whole.demonstrations) if i % FOLDS != fold]
                assert list(task.demonstrations) == kept

    def same(a: Any, b: Any) -> Any:
        return a.keys() == b.keys() and all(a[k].weight == b[k].weight for k in a)

    agree = [same(a, b) for a, b in zip(*said, strict=True)]
    assert agree == [True, False, False, True, False, False]


def test_the_same_batches_give_the_same_weights_whatever_the_tests_are(
    unseen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen = unseen[:3]
    other = [
        dataclasses.replace(task, tests=(Pair(np.full((9, 9), 7, np.uint8), None),))
        for task in unseen
    ]
    monkeypatch.setattr(adaptation.Measure, "__gt__", lambda a, b: True)  # all are accepted
    found = []
    for tasks in (unseen, unseen, other):
        adapted = adapt(small(), tasks, {}, n_batches=1)
        found.append((weights(adapted.system), adapted.before, adapted.after, adapted.task_index))
    assert differing(found[0], found[1]) == differing(found[0], found[2]) == []


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A task whose rule four demonstrations show."""
    tasks = make_tasks(("top",), n_demonstrations=4, sides=(4, 5))
    path = write_tasks(tmp_path_factory.mktemp("alike") / "training.json", tasks)
    return without_outputs(load_tasks(path).train)


def test_what_helps_on_held_out_demonstrations_is_accepted(alike: Any) -> None:
    system = small()
    adapted = adapt(system, alike, {}, n_batches=8, lr=3e-3)
    assert adapted.accepted
    for task_id in adapted.accepted:
        assert adapted.after[task_id] > adapted.before[task_id]

    def exact_and_cells(system: Any, index: Any) -> Any:
        rows = adaptation._outcomes_of_folds(
            system, alike, index, range(FOLDS), device="cpu", dtype=None, seed=0
        )
        return {task_id: adaptation._measure(answers) for task_id, answers in rows.items()}

    assert exact_and_cells(system, {}) == adapted.before
    fitted = exact_and_cells(adapted.system, adapted.task_index)
    assert all(fitted[task_id] > adapted.before[task_id] for task_id in adapted.accepted)
    said = []
    for change in (
        0.0,
        3.0,
    ):  # the rows are used: others in their place say it less surely, or more
        with torch.no_grad():
            adapted.system.solver2.task_tokens.weight[list(adapted.task_index.values())] += change
        found = predict_tasks(adapted.system, alike, [View()], task_index=adapted.task_index)
        said.append([c.weight for p in found.values() for c in p.candidates.values()])
    assert said[0] != said[1]


def test_what_makes_a_task_worse_is_refused(alike: Any) -> None:
    system = small()
    adapted = adapt(system, alike, {}, n_batches=2, lr=30.0)
    assert all(adapted.after[task_id] < adapted.before[task_id] for task_id in adapted.before)
    assert len(adapted.before) == 1
    assert adapted.accepted == frozenset()
    assert adapted.system is system
    assert adapted.n_batches == 2 * FOLDS  # nobody needs the training that answers


@pytest.mark.parametrize(
    ("before", "after", "accepted"),
    [
        ((1, 0.5), (2, 0.3), True),
        ((1, 0.5), (1, 0.6), True),
        ((1, 0.5), (1, 0.5), False),
        ((1, 0.5), (1, 0.4), False),
        ((2, 0.5), (1, 0.9), False),
    ],
)
def test_more_exact_or_as_many_and_more_cells(before: Any, after: Any, accepted: Any) -> None:
    adapted = Adapted(None, {}, {"a": Measure(*before)}, {"a": Measure(*after)})  # type: ignore[arg-type]
    assert adapted.accepted == ({"a"} if accepted else set())


def test_a_task_of_two_demonstrations_is_judged_without_training_on_either(unseen: Any) -> None:
    """Nothing is left to train on, so nothing changes, so it is refused."""
    tasks = [dataclasses.replace(unseen[0], demonstrations=unseen[0].demonstrations[:2])]
    adapted = adapt(small(), tasks, {}, n_batches=2, parts="tokens")
    assert adapted.n_batches == 2  # those of the fold that leaves both
    assert adapted.before == adapted.after
    assert not adapted.accepted


def test_what_stood_still_may_move_again(unseen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    system = small()
    learners = spied(monkeypatch, "_train")
    adapt(system, unseen[:1], {}, n_batches=1, parts="tokens")
    for one in (system, learners[0][0]):
        modules = one.modules().items()
        still = [n for _, m in modules for n, p in m.named_parameters() if not p.requires_grad]
        assert still == []


def test_known_tasks_are_left_alone_and_an_end_is_needed(unseen: Any) -> None:
    system = small()
    known = {task.task_id: 0 for task in unseen}
    adapted = adapt(system, unseen, known, n_batches=3)
    assert (adapted.system, adapted.n_batches, adapted.before) == (system, 0, {})
    with pytest.raises(ValueError, match="one of seconds and n_batches"):
        adapt(system, unseen, {})
    with pytest.raises(ValueError, match="parts is one of"):
        adapt(system, unseen, {}, n_batches=1, parts="none")


def test_seconds_end_it_and_progress_is_told(unseen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a batch of training moves by a second, one of measuring by half of one."""
    clock = [0.0]
    monkeypatch.setattr(adaptation.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(adaptation, "MEASURED_AT_ONCE", 2)

    def slower(owner: Any, name: Any, seconds: Any) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            clock[0] += seconds
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    slower(adaptation, "_leave_one_out", 1.0)
    slower(evaluation, "predict_tasks", 0.5)
    shares: list[float] = []
    adapted = adapt(small(), unseen, {}, seconds=15, progress=shares.append)
    assert clock[0] <= 15 + 1 + FOLDS  # a batch that has begun is finished
    assert adapted.n_late == len(unseen) - 4 == 2  # 1.5 s for two tasks, until a sixth is over
    assert set(adapted.before) == set(adapted.after)
    assert len(adapted.before) == 4
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1
    begun = clock[0]
    late = adapt(small(), unseen, {}, seconds=1e-9)
    assert late.n_late == len(unseen) - 2
    assert clock[0] - begun <= 2 * 1.5 + FOLDS + 1


def test_predict_keeps_the_answers_of_refused_tasks_and_leaves_the_run_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tasks(tmp_path / "training.json", make_tasks(("flip", "same", "recolour")))
    flags: list[Any] = ["--data", data, "--runs_dir", tmp_path / "runs", "--max_batches", 2, *FAST]
    assert trainloop.main([*map(str, flags), "--quiet"]) == 0
    new = write_tasks(tmp_path / "new.json", make_tasks(("turn", "top"), seed=4))
    files = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    adapt_too = ("--adapt_batches", 1)

    def answers(name: str, *more: Any) -> dict[str, Any]:
        call = [tmp_path / "runs", "--data", new, "--out", tmp_path / name, *more]
        settings = ["--device", "cpu", "--views", "2", "--hypotheses", "off"]
        assert predict.main([*map(str, call), *settings]) == 0
        return json.loads((tmp_path / name).read_text())

    plain = answers("plain.json")
    capsys.readouterr()
    refused, accepted = "t0_turn", "t1_top"
    real = adaptation.adapt

    def worse(system: Any, *args: Any, **options: Any) -> Adapted:
        """What real adaptation gives, its system made to say other things,
        and one task accepted."""
        found = real(system, *args, **options)
        copied = adaptation._copy(system, len(found.before))
        with torch.no_grad():
            for p in copied.agent.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        return dataclasses.replace(found, system=copied)

    with monkeypatch.context() as patch:
        patch.setattr(adaptation, "adapt", worse)
        patch.setattr(Adapted, "accepted", property(lambda self: frozenset({accepted})))
        mixed = answers("mixed.json", *adapt_too)
        printed = capsys.readouterr().out
        assert "Adapted: 2 tasks, 1 accepted, 1 refused; " in printed
        assert "their demonstrations, held out: " in printed
        assert mixed[refused] == plain[refused]
        assert mixed[accepted] != plain[accepted]
    assert files == {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
