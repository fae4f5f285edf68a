"""Hypotheses beside the network: the child process, votes by verdict,
the scripts with and without."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    Proposer,
    grid_of,
    make_task,
    make_tasks,
    same_proposals,
    write_tasks,
)

import dataset_arc
import rule_list
from dataset_arc import Pair, Task
from evaluation import NETWORK, Prediction, alone, joined, score, trust, without_outputs
from hypotheses import (
    MAX_PROPOSALS,
    N_ARM_SLOTS,
    PROPOSAL_FACTS,
    Fitter,
    by_size,
    pairs_of,
    proposals_of,
)
from proposal_policy import PRIOR
from rule_arms import ARMS
from rule_list import Explained, Hypothesis, Verdict

ROOT = Path(rule_list.__file__).parent
A, B, C = (np.full((2, 2), colour, np.uint8) for colour in (1, 2, 3))


def hypothesis(answer: Any, n_right: Any, n_tried: Any = 3) -> Any:
    verdict = Verdict(n_right, n_tried, n_right / max(1, n_tried))
    return Hypothesis("pairs", answer, verdict, True, 1, "identity", "own")


def explained(*hypotheses: Any) -> Any:
    return Explained(tuple(hypotheses), 10, ())


def network(*weights: Any) -> Any:
    prediction = Prediction(views=4)
    for grid, weight in weights:
        prediction.add(grid, weight)
    return prediction


def first_two(predictions: Any) -> Any:
    return [grid.ravel()[0] for grid in predictions[("t", 0)].attempts()]


def test_a_full_verdict_goes_first_and_the_network_second() -> None:
    both = joined({("t", 0): network((A, 4.0), (B, 1.0))}, {("t", 0): explained(hypothesis(C, 3))})
    assert first_two(both) == [3, 1]


def test_without_any_demonstration_right_the_network_goes_first() -> None:
    both = joined({("t", 0): network((A, 4.0))}, {("t", 0): explained(hypothesis(C, 0))})
    assert first_two(both) == [1, 3]


def test_a_grid_that_both_give_counts_both_and_equal_answers_count_once() -> None:
    some = explained(hypothesis(B, 0), hypothesis(B, 0), hypothesis(C, 0))
    both = joined({("t", 0): network((A, 1.0), (B, 1.0))}, {("t", 0): some})
    weights = {c.grid.ravel()[0]: c.weight for c in both[("t", 0)].candidates.values()}
    none = trust(Verdict(0, 3, 0.0))
    assert weights == pytest.approx({1: NETWORK / 2, 2: NETWORK / 2 + none, 3: none})
    assert first_two(both) == [2, 1]


def test_trust_rises_with_the_verdict_and_nothing_tried_is_nothing_proved() -> None:
    verdicts = [Verdict(0, 0, 0.0), Verdict(0, 3, 0.9), Verdict(1, 3, 0.9), Verdict(2, 3, 0.9)]
    trusts = [trust(v) for v in (*verdicts, Verdict(3, 3, 1.0))]
    assert trusts == sorted(trusts)
    assert trusts[0] < trusts[1] < NETWORK < trusts[3] < trusts[4] == PRIOR["full"]


def test_joining_changes_neither_side_and_covers_what_only_one_has() -> None:
    mine = {("t", 0): network((A, 2.0))}
    other = {("u", 0): explained(hypothesis(B, 3)), ("v", 0): explained()}
    both = joined(mine, other)
    assert set(both) == {("t", 0), ("u", 0), ("v", 0)}
    assert next(iter(mine[("t", 0)].candidates.values())).weight == 2.0
    assert set(alone(other)) == {("u", 0)}


def test_the_child_gives_what_a_call_gives_smallest_task_first(task_set: Any) -> None:
    hidden = without_outputs(task_set.train)
    fitter = Fitter(hidden)
    try:
        found = fitter.collect(time.monotonic() + 60)
        assert fitter.failed is None
        assert list(fitter.done) == [task.task_id for task in by_size(hidden)]
        for task in hidden:
            here = pairs_of(task)
            for i, wanted in enumerate(rule_list.fit_task(here, [p.input for p in task.tests])):
                got = found[(task.task_id, i)]
                assert [h.words for h in got.hypotheses] == [h.words for h in wanted.hypotheses]
                pairs = zip(got.hypotheses, wanted.hypotheses, strict=True)
                assert all(np.array_equal(a.answer, b.answer) for a, b in pairs)
        fewer = fitter.collect(n_tasks=2)
        assert {key[0] for key in fewer} == {task.task_id for task in by_size(hidden)[:2]}
        solved = score(alone(found), task_set.train)
        assert solved["exact_at_1"] >= 5  # flip, turn, recolour, crop, double, same
    finally:
        fitter.close()


def test_a_child_loads_no_torch() -> None:
    """Breaks: seconds and hundreds of megabytes for every child."""
    program = "import sys, hypotheses; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_outputs_in_sight_are_refused(task_set: Any) -> None:
    with pytest.raises(ValueError, match="must not see test outputs"):
        Fitter(task_set.train)


def test_a_child_that_dies_is_said_and_what_it_had_is_kept(task_set: Any) -> None:
    fitter = Fitter(without_outputs(task_set.train))
    try:
        fitter._children[0].kill()
        found = fitter.collect(time.monotonic() + 30)
        assert fitter.failed is not None
        assert "exit code -9" in fitter.failed
        assert {key[0] for key in found} == set(fitter.done)
    finally:
        fitter.close()


def test_the_child_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    """Killed without a word, the parent leaves no process behind."""
    write_tasks(tmp_path / "t.json", {"big": make_task("drop", sides=(12, 14), n_demonstrations=6)})
    program = (
        "import sys, time\n"
        "from dataset_arc import load_tasks\n"
        "from evaluation import without_outputs\n"
        "from hypotheses import Fitter\n"
        f"fitter = Fitter(without_outputs(load_tasks({str(tmp_path / 't.json')!r}).train) * 50)\n"
        "print(fitter._children[0].pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while time.monotonic() < until and running(child):
        time.sleep(0.05)
    assert not running(child)


def running(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def test_the_script_lets_hypotheses_vote_and_tells_each_part_alone(train: Any) -> None:
    outcome = train("--epochs", 1, "--hypotheses", "on")
    assert outcome.code == 0, outcome.err
    results = json.loads((outcome.folder / "results.json").read_text(encoding="utf-8"))
    assert results["hypothesis_queries"] == results["n"] == 6
    assert results["hypothesis_tasks"] == [6, 6]
    assert results["acceptance"] == "demonstrations"
    assert results["gains"]["n"] == 6 * results["views"]
    assert 0 < results["gains"]["accepted"] <= 1
    assert results["alone"]["hypotheses"]["exact_at_2"] >= 5
    assert results["exact_at_2"] >= results["alone"]["hypotheses"]["exact_at_2"]
    assert f"hypotheses alone: {results['alone']['hypotheses']['exact_at_2']}/6" in outcome.out
    parts = results["alone"]["hypotheses"]
    assert parts["exact_at_2"] + parts["both_won"] - parts["both_lost"] == results["exact_at_2"]
    assert results["untrained"]["n"] == results["validated"]["n"] == 6
    assert "untrained network, one view: " in outcome.out
    assert f"network alone: {results['alone']['network']['exact_at_2']}/6" in outcome.out
    assert outcome.run.fitter._children[0].poll() is not None  # it is gone when the run is


def test_so_many_hypotheses_are_taken_as_asked(train: Any) -> None:
    outcome = train("--epochs", 1, "--hypotheses", "on", "--hypothesis_tasks", 2)
    results = json.loads((outcome.folder / "results.json").read_text(encoding="utf-8"))
    assert results["hypothesis_queries"] == 2
    right = results["alone"]["hypotheses"]["exact_at_2"]
    assert f"       hypotheses alone: {right} exact of the 2 reached\n" in outcome.out


def test_another_test_output_changes_no_hypothesis(tmp_path: Path) -> None:
    tasks = make_tasks(("flip", "swap"))
    answers = []
    for shift in (0, 1):
        for task in tasks.values():
            for pair in task["test"]:
                pair["output"] = ((np.array(pair["output"]) + shift) % 10).tolist()
        data = dataset_arc.load_tasks(write_tasks(tmp_path / f"{shift}.json", tasks))
        fitter = Fitter(without_outputs(data.train))
        found = fitter.collect(time.monotonic() + 60)
        fitter.close()
        answers.append(
            {key: [h.answer.tobytes() for h in e.hypotheses] for key, e in found.items()}
        )
    assert answers[0] == answers[1]


# ---------------------------------------------------------------- demonstrations, for training


def test_a_demonstration_is_explained_from_the_others_alone(task_set: Any) -> None:
    """Breaks: proposals of training made with the own pair, or of another demonstration."""
    for task in task_set.train:
        made = Proposer().leave_one_out(task)
        for k, pair in enumerate(task.demonstrations):
            other = dataclasses.replace(pair, output=9 - pair.output[:1])
            pairs = (*task.demonstrations[:k], other, *task.demonstrations[k + 1 :])
            changed = Proposer().leave_one_out(dataclasses.replace(task, demonstrations=pairs))
            same_proposals([made[k]], [changed[k]])
    flip = Proposer().leave_one_out(task_set.train[0])
    for pair, offer in zip(task_set.train[0].demonstrations, flip, strict=True):
        assert np.array_equal(offer.grids[0], pair.output)


def test_equal_answers_make_one_proposal_with_the_best_verdict() -> None:
    """Breaks: proposals twice, facts of the worst, arms of one, verdicts in the wrong place."""
    found = proposals_of(
        Explained(
            (
                Hypothesis("pairs", A, Verdict(3, 3, 0.95), True, 2, "identity", "own"),
                Hypothesis("plain", B, Verdict(1, 3, 0.5), False, 1, "identity", "own"),
                Hypothesis("objects", A, Verdict(0, 3, 0.1), True, 3, "identity", "own"),
            ),
            10,
            (),
        )
    )
    assert found is not None
    assert [g.ravel()[0] for g in found.grids] == [1, 2]
    facts = dict(zip(PROPOSAL_FACTS, found.facts.T.tolist(), strict=True))
    assert facts["full"] == [1, 0]
    assert facts["some"] == [0, 1]
    assert facts["share_right"] == pytest.approx([1, 1 / 3])
    assert facts["cells_right"] == pytest.approx([0.95, 0.5])
    assert facts["n_tried"] == [3 / 8, 3 / 8]
    assert facts["explains"] == [1, 0]
    assert facts["n_rules"] == [2 / 8, 1 / 8]
    assert facts["n_arms"] == [2 / 8, 1 / 8]
    assert facts["rank"] == pytest.approx([0, 1 / MAX_PROPOSALS])
    arms = list(ARMS)
    wanted = {"pairs": [1, 0], "plain": [0, 1], "objects": [1, 0]}
    for i, arm in enumerate(arms):
        assert facts[f"arm_{i}"] == wanted.get(arm, [0, 0]), arm
    assert proposals_of(Explained((), 10, ())) is None
    assert len(arms) <= N_ARM_SLOTS


def test_what_training_asks_for_comes_before_the_tests(task_set: Any) -> None:
    """Breaks: training waits for all test inputs."""
    hidden = without_outputs(task_set.train)
    fitter = Fitter(hidden, 0)  # nobody works: the order of the work is looked at
    try:
        fitter.ask(hidden[3:5])
        fitter.ask(hidden[:1] + hidden[3:4])
        work: list[Any] = [fitter._next() for _ in range(4)]
        assert [kind for kind, _ in work] == ["demonstrations"] * 3 + ["tests"]
        assert [w[0] for _, w in work[:3]] == [t.task_id for t in (*hidden[3:5], hidden[0])]
        assert work[3][1][0] == by_size(hidden)[0].task_id
    finally:
        fitter.close()


def test_the_children_give_what_is_worked_out_here_also_when_they_are_gone(task_set: Any) -> None:
    """Breaks: proposals that depend on who made them, or a wait for ever."""
    hidden = without_outputs(task_set.train)
    wanted = {task.task_id: Proposer().leave_one_out(task) for task in hidden}
    fitter = Fitter(hidden, 2)
    try:
        for task in hidden[::-1]:
            same_proposals(fitter.leave_one_out(task), wanted[task.task_id])
        assert set(fitter._proposed) == set(wanted)
    finally:
        fitter.close()
    closed = Fitter(hidden)
    closed.close()
    same_proposals(closed.leave_one_out(hidden[2]), wanted[hidden[2].task_id])
    killed = Fitter(hidden)
    try:
        for child in killed._children:
            child.kill()
        for task in hidden:
            same_proposals(killed.leave_one_out(task), wanted[task.task_id])
    finally:
        killed.close()


def test_children_are_busy_while_they_have_work(task_set: Any) -> None:
    """Breaks: cores kept free for hypotheses that are all fitted, or taken from those that are
    not."""
    fitter = Fitter(without_outputs(task_set.train), 2)
    try:
        assert fitter.n_busy > 0
        fitter.collect()
        end = time.monotonic() + 30  # the children hand in their last task, and ask for another
        while fitter.n_busy and time.monotonic() < end:
            time.sleep(0.01)
        assert fitter.n_busy == 0
    finally:
        fitter.close()
    assert fitter.n_busy == 0


def test_a_worker_that_dies_hands_its_work_on(task_set: Any) -> None:
    """Breaks: the dead worker's task lost, so that the rest waits behind its gap."""
    hidden = without_outputs(task_set.train)
    many = [dataclasses.replace(t, task_id=f"{t.task_id}{i}") for i in range(3) for t in hidden]
    fitter = Fitter(many, 2)
    try:
        fitter._children[0].kill()
        found = fitter.collect(time.monotonic() + 45)
        assert fitter.failed is None
        assert {key[0] for key in found} == {task.task_id for task in many}
        fitter._children[1].kill()
        fitter._children[1].wait()
        same_proposals(fitter.leave_one_out(hidden[0]), Proposer().leave_one_out(hidden[0]))
    finally:
        fitter.close()


def test_what_is_collected_has_no_gap(task_set: Any) -> None:
    """Breaks: tasks fitted out of turn are taken, and no number of tasks repeats the run."""
    hidden = without_outputs(task_set.train)
    order = [task.task_id for task in by_size(hidden)]
    fitter = Fitter(hidden, 0)
    try:
        made = explained(hypothesis(A, 3))
        for i in (0, 1, 3):
            fitter.done[order[i]] = [made]
        found = fitter.collect(time.monotonic())
        assert [key[0] for key in found] == order[:2]
        assert fitter.n_first() == 2
        fitter.done[order[2]] = [made]
        assert [key[0] for key in fitter.collect(time.monotonic())] == order[:4]
        assert [key[0] for key in fitter.collect(None, 3)] == order[:3]
    finally:
        fitter.close()


def test_asking_how_many_are_fitted_does_not_go_through_all_of_them_again() -> None:
    """Breaks: as many steps as tasks each time a task is done, so the square of 100,000 tasks."""

    class Counting(dict[str, Any]):
        asked = 0

        def __contains__(self, key: object) -> bool:
            Counting.asked += 1
            return super().__contains__(key)

    grid = grid_of("12", "30")
    n = 200
    some = [Task(f"{i:03d}", (Pair(grid, grid),), (Pair(grid, None),)) for i in range(n)]
    fitter = Fitter(some, 0)
    fitter.done = Counting()
    try:
        for i, task in enumerate(some, start=1):
            fitter.done[task.task_id] = []
            assert fitter.n_first() == i
        assert Counting.asked <= 2 * n
    finally:
        fitter.close()
