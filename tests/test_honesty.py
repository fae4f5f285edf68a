"""Honest by construction: no answer reaches its own prediction, no test output the training.

Every check is bit for bit and goes through the real system, script or command.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Proposer, differing, lively_system, make_tasks, write_tasks

import arc_system
import dataset_arc
import evaluation
from batches import (
    Collator,
    TrainingStream,
    View,
    evaluation_batches,
    evaluation_views,
    longest_side,
)
from dataset_arc import Pair
from evaluation import predict_tasks, without_outputs
from grid_features import N_CONTROL
from hypotheses import N_ARM_SLOTS

SIDE = 12  # of the real tasks used here


@pytest.fixture(scope="module")
def real_tasks() -> Any:
    """Forty real training tasks that fit SIDE x SIDE, with all their demonstrations."""
    tasks = dataset_arc.load_tasks("arcagi2").train
    small = [task for task in tasks if longest_side(task) <= SIDE]
    return small[:40]


@pytest.fixture(scope="module")
def lively() -> Any:
    """No weight at zero, so that no path is closed; memory holds entries."""
    system = lively_system(n_tasks=40)
    generator = torch.Generator().manual_seed(3)
    system.solver2.store(
        torch.randn(4, 32, generator=generator),
        torch.tensor([0, 5, 9, -1]),
        torch.ones(4),
        torch.ones(4, dtype=torch.bool),
    )
    system.solver2.store_arms(
        torch.rand(4, N_CONTROL, generator=generator),
        torch.tensor([0, 5, 9, -1]),
        torch.rand(4, N_ARM_SLOTS, generator=generator),
    )
    return system


@torch.no_grad()
def everything_said(system: Any, batch: Any, generator_seed: Any = 1) -> Any:
    """All that the system says about each query of a batch."""
    reading = system.read(batch)
    before = system.answer(reading)
    refinement = system.refine(reading, before, torch.Generator().manual_seed(generator_seed))
    after = system.answer(reading, refinement)
    tokens, info, choice = refinement.tokens, refinement.info, refinement.choice
    answered = system.predict(batch, torch.Generator().manual_seed(generator_seed))
    offered = [(size > 0).all(-1) for size in batch.proposed_size]
    mask = choice.candidates.mask
    return {
        # Which neighbours answer again decides how many are computed at once, and so the last bits;
        # in training batches alone may that hang on this query's output, and no training batch is
        # predicted.
        "predicted": answered.after.grids(),
        "predicted size": answered.after.size,
        "drawn": choice.drawn,
        "chances": [x[m] for x, m in zip(choice.chance, mask, strict=True)],
        "relations": [x[m] for x, m in zip(choice.candidates.relation, mask, strict=True)],
        "proposed": [x[m] for x, m in zip(batch.proposed, offered, strict=True)],
        "proposed size": [x[m] for x, m in zip(batch.proposed_size, offered, strict=True)],
        "facts": [x[m] for x, m in zip(batch.proposed_facts, offered, strict=True)],
        "recalled": system.solver2.recall(arc_system.fingerprint(batch), batch.task_index),
        "before": before.logits.transpose(0, 1),
        "after": after.logits.transpose(0, 1),
        "size logits": after.size_logits,
        "size": after.size,
        "confidence": after.confidence.transpose(0, 1),
        "prompt": tokens,
        "action": info.action,
        "backward": system.backward(reading, after),
        "canvas": batch.query_canvas,
        "candidates": batch.size_candidates,
        "support": batch.size_support,
    }


def occurrences(stream: Any, query: Any, epoch: Any = 0) -> Any:
    """(position, row) of every batch that asks this query."""
    return [
        (position, row)
        for position in range(stream.n_batches(epoch))
        for row, asked in enumerate(stream.pair_ids(epoch, position))
        if asked == query
    ]


def with_output(tasks: Any, number: Any, demonstration: Any, output: Any) -> Any:
    """The tasks with one demonstration's output replaced."""
    task = tasks[number]
    pairs = list(task.demonstrations)
    pairs[demonstration] = Pair(pairs[demonstration].input, output)
    changed = list(tasks)
    changed[number] = dataclasses.replace(task, demonstrations=tuple(pairs))
    return changed


# ---------------------------------------------------------------- a query's own output


@pytest.mark.parametrize("kind", ["cells", "size"])
def test_an_own_output_changes_no_bit_of_its_answer_in_training_batches(
    real_tasks: Any, lively: Any, kind: Any
) -> None:
    """Leave-one-out: the other queries of the batch see the changed pair, this one must not."""
    collator, proposer = Collator(), Proposer()

    def stream(tasks: Any) -> Any:
        return TrainingStream(tasks, 0, 8, collator=collator, proposals=proposer)

    rng = np.random.default_rng(0 if kind == "cells" else 1)
    plain = stream(real_tasks)
    others_changed = others_told = n_taken = 0
    for _ in range(8):
        number = int(rng.integers(len(real_tasks)))
        task = real_tasks[number]
        demonstration = int(rng.integers(len(task.demonstrations)))
        shape = task.demonstrations[demonstration].output.shape
        if kind == "size":
            shape = tuple(rng.integers(1, 25, 2))
        output = rng.integers(0, 10, shape).astype(np.uint8)
        changed = stream(with_output(real_tasks, number, demonstration, output))
        query = (task.task_id, "train", demonstration)
        asked, again = occurrences(plain, query), occurrences(changed, query)
        assert len(asked) == len(again) >= 1
        for (position, row), (position_b, row_b) in zip(asked, again, strict=True):
            assert plain.pair_ids(0, position) == changed.pair_ids(0, position_b)
            a = everything_said(lively, plain.batch(0, position)[0])
            b = everything_said(lively, changed.batch(0, position_b)[0])
            for name in a:
                assert differing(a[name][row], b[name][row_b]) == [], (kind, query, name)
            others_changed += not torch.equal(a["prompt"], b["prompt"])
            others_told += differing(a["proposed"], b["proposed"]) != []
            n_taken += int(a["drawn"][row, 0]) > 0
    assert others_changed > 3  # the change was there for the neighbours to see
    assert others_told > 3  # and changed what was proposed to them
    assert n_taken > 1


def test_training_with_another_own_output_starts_from_the_same_prediction(
    train: Any, tasks_file: Any
) -> None:
    """Through the script's own step: same logits for the query, another loss."""
    raw = json.loads(tasks_file.read_text())
    seen = {}
    for name in ("plain", "changed"):
        if name == "changed":
            raw["t0_flip"]["train"][1]["output"] = [[7] * 2] * 9
        path = write_tasks(tasks_file.parent / f"{name}.json", raw)
        run = train("--dry_run", data=path).run
        run.stream.proposals = Proposer()
        position, row = occurrences(run.stream, ("t0_flip", "train", 1))[0]
        batch, targets = run.stream.batch(0, position)
        said = everything_said(run.system.train(False), batch)
        seen[name] = {k: v[row] for k, v in said.items()}, targets.size[row].tolist()
    assert differing(seen["plain"][0], seen["changed"][0]) == []
    assert set(seen["plain"][1]) != set(seen["changed"][1]) == {2, 9}


def test_test_outputs_change_no_bit_in_evaluation_batches(real_tasks: Any, lively: Any) -> None:
    noisy = [noise_outputs(task, seed=4) for task in real_tasks[:10]]
    for view in evaluation_views(3):
        both = zip(
            evaluation_batches(real_tasks[:10], view, batch_size=8),
            evaluation_batches(noisy, view, batch_size=8),
            strict=True,
        )
        for a, b in both:
            assert a.pair_ids == b.pair_ids
            assert differing(everything_said(lively, a), everything_said(lively, b)) == []


def noise_outputs(task: Any, seed: Any) -> Any:
    rng = np.random.default_rng(seed)
    tests = tuple(
        Pair(p.input, rng.integers(0, 10, rng.integers(1, 30, 2)).astype(np.uint8))
        for p in task.tests
    )
    return dataclasses.replace(task, tests=tests)


def test_the_oracle_would_be_caught(real_tasks: Any, lively: Any) -> None:
    """The check above is not blind: a demonstration's output does change the answers."""
    task = real_tasks[0]
    output = 9 - task.demonstrations[0].output
    a = next(evaluation_batches([task]))
    b = next(evaluation_batches(with_output([task], 0, 0, output)))
    assert differing(everything_said(lively, a), everything_said(lively, b)) != []


# ---------------------------------------------------------------- the training stream


def test_none_of_the_1076_test_pairs_is_in_the_training_stream() -> None:
    tasks = dataset_arc.load_tasks("arcagi2").train
    stream = TrainingStream(tasks, seed=0, batch_size=8)
    assert all(task.tests == () for task in stream.tasks)
    asked = {
        query for position in range(stream.n_batches(0)) for query in stream.pair_ids(0, position)
    }
    assert {kind for _, kind, _ in asked} == {"train"}
    assert len(asked) == sum(len(task.demonstrations) for task in tasks) == 3232

    def content(pair: Any) -> Any:
        return pair.input.shape, pair.input.tobytes(), pair.output.shape, pair.output.tobytes()

    shown = {content(pair) for task in stream.tasks for pair in task.demonstrations}
    held_out = [content(pair) for task in tasks for pair in task.tests]
    assert len(held_out) == 1076
    assert not shown & set(held_out)


# ---------------------------------------------------------------- whole runs


def variants(tmp_path: Path) -> Any:
    """The same tasks with true, random and no test outputs."""
    raw = make_tasks(("flip", "recolour", "double"), n_tests=2)
    noisy, bare = copy.deepcopy(raw), copy.deepcopy(raw)
    rng = random.Random(0)
    for task in noisy.values():
        for pair in task["test"]:
            rows, cols = rng.randint(1, 12), rng.randint(1, 12)
            pair["output"] = [[rng.randint(0, 9) for _ in range(cols)] for _ in range(rows)]
    for task in bare.values():
        for pair in task["test"]:
            del pair["output"]
    return {
        name: write_tasks(tmp_path / f"{name}.json", tasks)
        for name, tasks in (("true", raw), ("noise", noisy), ("none", bare))
    }


# What may differ between two runs that trained alike: clocks, and what validation measured.
MEASURED = ("elapsed_s", "epoch_s", "best", "untrained_accuracy", "untrained", "validated")
LEARNED = ("agent", "qwen", "solver2", "efe_loss", "policy_rl", "optimizer")


def learned_state(outcome: Any) -> Any:
    """The final weights, optimizers, averages and counters of a run, from its checkpoint."""
    file = outcome.checkpoint()
    progress = {k: v for k, v in file["extra"]["progress"].items() if k not in MEASURED}
    names = ("policy_optimizer", "choice_optimizer", "average", "threshold", "schedule")
    return {
        **{name: file[name] for name in LEARNED},
        **{name: file["extra"][name] for name in names},
        "progress": progress,
    }


def test_noise_for_all_test_outputs_gives_the_same_training_run(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted: dict[str, list[Any]] = {}
    real_predict = evaluation.predict_tasks

    def spy(system: Any, tasks: Any, *args: Any, **options: Any) -> Any:
        assert all(pair.output is None for task in tasks for pair in task.tests)
        found = real_predict(system, tasks, *args, **options)
        said: dict[Any, Any]
        said = {k: [g.tolist() for g in p.attempts()] for k, p in found.items()}
        both = evaluation.refined(found)
        said |= {(*k, "both"): [g.tolist() for g in p.attempts()] for k, p in both.items()}
        predicted.setdefault(name, []).append(said)
        return found

    monkeypatch.setattr(evaluation, "predict_tasks", spy)
    outcomes = {}
    for name, path in variants(tmp_path).items():
        outcomes[name] = train("--epochs", 1, "--hypotheses", "on", data=path, runs=name)
        assert outcomes[name].code == 0, outcomes[name].err
    batches = {name: outcome.figures() for name, outcome in outcomes.items()}
    states = {name: learned_state(outcome) for name, outcome in outcomes.items()}
    for name in ("noise", "none"):
        assert batches[name] == batches["true"]
        assert all(row["proposed_frac"] > 0 for row in batches[name])
        assert differing(states["true"], states[name]) == []
    # Untrained, after the epoch, the doubtful tasks' demonstrations, and at the end: the same
    # grids, judged differently.
    assert len(predicted["true"]) == 4
    assert predicted["noise"] == predicted["true"]
    results = [json.loads((outcomes[n].folder / "results.json").read_text()) for n in predicted]
    assert results[0]["cell_accuracy"] > results[1]["cell_accuracy"]
    assert "none" not in predicted  # nothing to score, nothing predicted

    # And a predictor that is given the bare file says the same of every query.
    said = {}
    for name in ("true", "none"):
        run = outcomes[name].run
        tasks = without_outputs(dataset_arc.load_tasks(tmp_path / f"{name}.json").train)
        table = run.stream.task_table
        found = predict_tasks(run.system, tasks, [View()], task_index=table)
        said[name] = {k: [g.tolist() for g in p.attempts()] for k, p in found.items()}
    assert len(said["none"]) == 6
    assert said["true"] == said["none"]


def test_the_data_hash_that_a_resume_checks_is_blind_to_test_outputs(tmp_path: Path) -> None:
    hashes = {dataset_arc.load_tasks(path).sha256 for path in variants(tmp_path).values()}
    assert len(hashes) == 1


def test_headline_results_come_from_the_last_weights_not_the_best(reference: Any) -> None:
    """results.json is about the end of training whatever validation liked most."""
    results = json.loads((reference.folder / "results.json").read_text())
    assert results["batch"] == reference.run.progress.total == len(reference.rows("batch"))
    assert results["epoch"] == 2
