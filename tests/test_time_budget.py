"""Runs that a time budget, or a schedule in batches, ends; and their repetition bit for bit."""

from __future__ import annotations

import json
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import work_moves_the_clock

import run_lines
from time_budget import FINAL_RESERVE_S, Limits, batches_expected, share_time


def test_a_time_budget_ends_the_run_with_the_learning_rate_at_zero(train: Any) -> None:
    outcome = train("--schedule_batches", "6:10", "--warmup_batches", 2, "--qwen_train", "frozen")
    assert outcome.code == 0, outcome.err
    factors = [row["lr_factor"] for row in outcome.rows("batch")]
    assert factors == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_run_that_time_cut_short_is_repeated_and_resumed_to_the_same_batch(train: Any) -> None:
    whole = train("--schedule_batches", "6:10:8", "--save_every", 3)
    assert whole.code == 0, whole.err
    assert [row["lr_factor"] for row in whole.rows("batch")] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75]
    (whole.folder / "results.json").unlink()
    for file in (whole.folder / "checkpoints").glob("*.pt"):
        if file.name > "checkpoint_00000.pt":  # back to the first save
            file.unlink()
    again = train("--resume", whole.folder)
    assert again.code == 0, again.err
    assert again.figures()[-1] == whole.figures()[-1]
    other = train("--resume", whole.folder, "--schedule_batches", "8:20")
    assert other.code == 3
    assert "schedule_batches" in other.err


def test_a_time_budget_is_kept_and_its_run_can_be_repeated_bit_for_bit(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that the work moves: a step takes a second, a batch of predictions as long."""
    clock = work_moves_the_clock(monkeypatch)
    quick = ("--seed", 3, "--planning_steps", 2, "--batch_size", 3, "--hypotheses", "on")
    begun = clock[0]
    outcome = train("--time_budget", 0.7, *quick)
    assert outcome.code == 0, outcome.err
    assert 42 - FINAL_RESERVE_S - 1 < clock[0] - begun < 42
    results = json.loads((outcome.folder / "results.json").read_text())
    again = re.search(
        r"in place of --time_budget, (--schedule_batches \d+:(\d+):(\d+) --eval_views (\d+) "
        r"--vote_batches (\d+) --hypothesis_tasks \d+:\d+ --acceptance full)$",
        outcome.out,
        re.MULTILINE,
    )
    assert again, outcome.out
    assert int(again[5]) < 2 * int(again[4])  # time did not do for all views of both batches
    repeated = train(*again[1].split(), *quick)
    assert repeated.code == 0, repeated.err
    same = json.loads((repeated.folder / "results.json").read_text())
    untimed = {"minutes": 0, "trained_minutes": 0}
    assert same | untimed == results | untimed
    assert repeated.figures() == outcome.figures()
    n = len(outcome.figures())
    assert n > 10
    assert re.search(r"^Time:   training ends after 0\.[345] of 0\.7 minutes", outcome.out, re.M)
    assert results["trained_minutes"] == pytest.approx(n / 60, rel=0.1)  # a step takes a second
    said = f"       trained {n} batches in {results['trained_minutes']:.1f} minutes; "
    assert f"{said}{results['views_done']:.1f} views on average\n" in outcome.out
    assert f"warning: {n} trained batches are too few to learn from" in outcome.err
    assert "too few" not in repeated.err  # nobody gave it minutes


def test_voting_gets_less_of_the_budget_where_more_batches_are_answered_at_a_time() -> None:
    """Breaks: half of the voting's share unused on two cores, as its speed was measured on one."""

    def trains_until(at_once: int) -> float:
        run: Any = SimpleNamespace(
            args=SimpleNamespace(time_budget=10.0),
            clock=SimpleNamespace(query_s=0.1),
            at_once=at_once,
            fitter=None,
            started=time.monotonic(),
            log=SimpleNamespace(say=lambda *_, **__: None),
        )
        limits = Limits(deadline=run.started + 600)
        share_time(run, limits, 500, 2)
        assert limits.train_until is not None
        return limits.train_until - run.started

    # two views of 500 queries at 0.1 s, 1.2 times as long to be sure; and 6 s to leave
    assert trains_until(1) == pytest.approx(600 - 6 - 120, abs=1)
    assert trains_until(2) == pytest.approx(600 - 6 - 60, abs=1)
    assert trains_until(99) == pytest.approx(600 - 6 - 15, abs=1)  # never more than 8 at a time


def test_the_bar_expects_the_batches_that_schedule_or_clock_leave() -> None:
    """Breaks: a bar that shows the whole epoch though time ends it, and so an ETA past the end."""

    def expected(until: float | None = None, **schedule: int) -> int:
        ends = {"stop_at": None, "end_at": None, **schedule}
        run: Any = SimpleNamespace(
            progress=SimpleNamespace(batch=10, total=30),
            schedule=SimpleNamespace(**ends),
            resumed_at=20,
            train_started=time.monotonic() - 20,  # ten batches, two seconds each
        )
        until = None if until is None else time.monotonic() + until
        return batches_expected(run, Limits(train_until=until), 100)

    assert expected() == 100
    assert expected(stop_at=45) == 25
    assert expected(stop_at=45, end_at=40) == 20
    assert expected(stop_at=500) == 100
    assert expected(until=30.0) in (24, 25)
    assert expected(until=-5.0) == 10


def test_a_budget_that_was_overrun_is_said(reference: Any) -> None:
    run = reference.run
    result = json.loads((reference.folder / "results.json").read_text()) | {"minutes": 4.25}
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(
            run, "log", SimpleNamespace(say=lambda t, **_: said.append(t), warn=said.append)
        )
        for budget in (4.0, 5.0):
            patch.setattr(run.args, "time_budget", budget)
            run_lines.say_results(run, result | {"batch": 100}, True)
    late = [line for line in said if "overrun" in line]
    assert len(late) == 1
    assert late[0].endswith("; --time_budget 4 overrun by 15 s")
    assert not any("too few" in line for line in said)
