"""Test-time training: demonstrations only, new tasks only, repeatable, and it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAST, lively_system, make_tasks, write_tasks

import evaluation
import predict
import trainloop_complete_with_fixes as trainloop
from adaptation import adapt
from dataset_arc import Pair, TrainingStream, View
from evaluation import predict_tasks, without_outputs


@pytest.fixture
def unseen(task_set):
    return without_outputs(task_set.train)


def weights(system):
    return {
        f"{module}.{name}": p.detach().clone()
        for module, part in system.modules().items()
        for name, p in part.named_parameters()
    }


def test_new_tasks_start_as_unseen_ones_answer(unseen):
    system = lively_system()
    before = predict_tasks(system, unseen, [View()])
    first = system.solver2.add_tasks(len(unseen))
    index = {task.task_id: first + i for i, task in enumerate(unseen)}
    after = predict_tasks(system, unseen, [View()], task_index=index)
    for key, found in before.items():
        assert np.array_equal(found.attempts(1)[0], after[key].attempts(1)[0])


def test_only_the_tokens_of_new_tasks_change_if_only_they_may(unseen):
    system = lively_system()
    known = {unseen[0].task_id: 2}
    before = weights(system)
    adapted = adapt(system, unseen, known, n_batches=3, parts="tokens")
    after = weights(system)
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


def test_the_same_batches_give_the_same_weights_whatever_the_tests_are(unseen):
    other = [
        dataclasses.replace(task, tests=(Pair(np.full((2, 2), 7, np.uint8), None),))
        for task in unseen
    ]
    found = []
    for tasks in (unseen, unseen, other):
        system = lively_system()
        adapt(system, tasks, {}, n_batches=3)
        found.append(weights(system))
    for repeated in found[1:]:
        assert all(torch.equal(found[0][key], repeated[key]) for key in found[0])


def test_leave_one_out_loss_falls(unseen):
    system = lively_system()

    def loss(index):
        stream = TrainingStream(unseen, 0, 64, augment=False, task_table=index)
        batch, targets = stream.batch(0, 0)
        with torch.no_grad():
            answer = system.answer(system.read(batch))
        log_p = answer.size_logits.gather(-1, (targets.size - 1).unsqueeze(-1))
        return -float(log_p.mean())

    before = loss(dict.fromkeys((task.task_id for task in unseen), -1))
    adapted = adapt(system, unseen, {}, n_batches=25, lr=3e-3)
    assert loss(adapted.task_index) < before
    tokens = system.solver2.task_tokens.weight
    with torch.no_grad():  # the rows are used: others in their place answer differently
        with_rows = loss(adapted.task_index)
        tokens[list(adapted.task_index.values())] += 1.0
    assert loss(adapted.task_index) != with_rows


def test_what_stood_still_may_move_again(unseen):
    system = lively_system()
    able = [p.requires_grad for part in system.modules().values() for p in part.parameters()]
    adapt(system, unseen, {}, n_batches=1, parts="tokens")
    assert able == [
        p.requires_grad for part in system.modules().values() for p in part.parameters()
    ]


def test_known_tasks_are_left_alone_and_an_end_is_needed(unseen):
    system = lively_system()
    before = weights(system)
    known = {task.task_id: 0 for task in unseen}
    assert adapt(system, unseen, known, n_batches=3).n_batches == 0
    assert all(torch.equal(before[key], p) for key, p in weights(system).items())
    with pytest.raises(ValueError, match="one of seconds and n_batches"):
        adapt(system, unseen, {})
    with pytest.raises(ValueError, match="parts is one of"):
        adapt(system, unseen, {}, n_batches=1, parts="none")


def test_seconds_end_it_and_progress_is_told(unseen):
    shares: list[float] = []
    adapted = adapt(lively_system(), unseen, {}, seconds=0.5, progress=shares.append)
    assert adapted.n_batches == len(shares) >= 1
    assert shares == sorted(shares)
    late = adapt(lively_system(), unseen, {}, seconds=1e-9)
    assert late.n_batches == 1


def test_predict_adapts_and_leaves_the_run_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tasks(tmp_path / "training.json", make_tasks(("flip", "same", "recolour")))
    flags: list[Any] = ["--data", data, "--runs_dir", tmp_path / "runs", "--epochs", 1, *FAST]
    assert trainloop.main([*map(str, flags), "--quiet"]) == 0
    new = write_tasks(tmp_path / "new.json", {"other": next(iter(make_tasks(("turn",)).values()))})
    files = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    texts = []
    seen: list[dict[str, int]] = []
    real = evaluation.predict_tasks

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(options["task_index"])
        return real(*args, **options)

    monkeypatch.setattr(evaluation, "predict_tasks", spy)
    for name in ("a.json", "b.json"):
        call = [tmp_path / "runs", "--data", new, "--out", tmp_path / name, "--adapt_batches", 2]
        assert predict.main([*map(str, call), "--device", "cpu", "--views", "2"]) == 0
        texts.append((tmp_path / name).read_bytes())
    assert "Adapted: 2 batches of leave-one-out" in capsys.readouterr().out
    assert texts[0] == texts[1]
    assert all(index["other"] == 3 for index in seen)  # the row after the three of training
    assert files == {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
