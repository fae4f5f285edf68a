"""Hypotheses that a checkpoint holds: the same again, and nothing that is another's or damaged."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import interrupt_after, same_proposals
from hypothesis import given, settings
from hypothesis import strategies as st

import kept_hypotheses
import rule_list
from dataset_arc import Pair
from evaluation import without_outputs
from hypotheses import Fitter, by_size, digest_of, explain_demonstrations, pairs_of
from kept_hypotheses import packed, record, unpacked
from rule_list import Explained, Hypothesis, Verdict


def parts(explained: Any) -> Any:
    """All that an explanation holds, to be compared."""
    return (
        [
            (h.arm, h.answer.shape, h.answer.tobytes(), h.answer.dtype, h.verdict, h.explains,
             h.n_rules, h.words, h.size_rule)
            for h in explained.hypotheses
        ],
        explained.context_cells,
        explained.capped_arms,
    )  # fmt: skip


@pytest.fixture(scope="module")
def hidden(task_set: Any) -> Any:
    return without_outputs(task_set.train)


@pytest.fixture(scope="module")
def fitted(hidden: Any) -> Any:
    """(what test inputs got, proposals for demonstrations by task, all of it as bytes)"""
    fitter = Fitter(hidden)
    try:
        found = fitter.collect(time.monotonic() + 60)
        proposals = {task.task_id: fitter.leave_one_out(task) for task in hidden}
        return found, proposals, fitter.kept()
    finally:
        fitter.close()


def test_what_was_kept_is_not_fitted_again_and_is_the_same(hidden: Any, fitted: Any) -> None:
    """Breaks: a record that is taken for another task's, or lost; facts that are rounded."""
    found, proposals, kept = fitted
    again = Fitter(hidden, 0, kept)  # nobody works
    try:
        assert again.n_known == len(hidden)
        same = again.collect(time.monotonic())
        assert {key: parts(e) for key, e in same.items()} == {
            key: parts(e) for key, e in found.items()
        }
        again.ask(hidden)
        assert not again._asked
        assert not again._later
        for task in hidden:
            same_proposals(again.leave_one_out(task), proposals[task.task_id])
        assert again.kept() == kept
    finally:
        again.close()


def test_what_was_fitted_to_other_grids_is_fitted_anew(hidden: Any, fitted: Any) -> None:
    """Breaks: hypotheses of an edited task, by its name."""
    first, second = hidden[0], hidden[1]
    shown = first.demonstrations[0]
    changed = dataclasses.replace(
        first, demonstrations=(Pair(shown.output, shown.input), *first.demonstrations[1:])
    )
    asked = dataclasses.replace(second, tests=(Pair(second.demonstrations[0].input, None),))
    fitter = Fitter([changed, asked, *hidden[2:]], 0, fitted[2])
    try:
        assert set(fitter.done) == {task.task_id for task in hidden[2:]}
        fitter.ask([changed, asked])
        assert list(fitter._asked) == [changed.task_id]  # the other's demonstrations are the same
    finally:
        fitter.close()


def test_another_version_s_hypotheses_are_none(
    hidden: Any, fitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: answers of rules that have been mended since."""
    monkeypatch.setattr(kept_hypotheses, "program", lambda: b"another".ljust(32))
    fitter = Fitter(hidden, 0, fitted[2])
    try:
        assert fitter.n_known == 0
        assert len(fitter._later) == len(hidden)
    finally:
        fitter.close()


def test_the_version_is_that_of_every_file_a_fit_goes_through() -> None:
    """Breaks: a rule in a new file, whose change nobody would notice."""
    here = Path(kept_hypotheses.__file__).parent
    used = {"rule_list.py", "kept_hypotheses.py"}
    while True:
        more = {
            f"{name}.py"
            for file in used
            for line in (here / file).read_text(encoding="utf-8").splitlines()
            if line.startswith(("import ", "from "))
            for name in [line.split()[1]]
            if (here / f"{name}.py").exists()
        }
        if more <= used:
            break
        used |= more
    assert used == set(kept_hypotheses.SOURCES)


grids = st.integers(1, 4).flatmap(
    lambda cols: st.lists(
        st.lists(st.integers(0, 9), min_size=cols, max_size=cols), min_size=1, max_size=4
    )
).map(lambda rows: np.array(rows, np.uint8))  # fmt: skip
hypotheses = st.builds(
    Hypothesis,
    arm=st.sampled_from(["plain", "pairs"]),
    answer=grids,
    verdict=st.builds(Verdict, st.integers(0, 4), st.integers(0, 4), st.floats(0, 1)),
    explains=st.booleans(),
    n_rules=st.integers(0, 7),
    words=st.text(max_size=20),
    size_rule=st.text(max_size=9),
)
explanations = st.lists(
    st.builds(
        Explained,
        st.lists(hypotheses, max_size=3).map(tuple),
        st.integers(0, 9999),
        st.lists(st.text(max_size=5), max_size=2).map(tuple),
    ),
    max_size=3,
)


@settings(max_examples=50, deadline=None)
@given(explanations)
def test_a_record_gives_back_all_that_it_was_made_of(found: Any) -> None:
    made = record("tests", "ä", "12ab", found)
    (one,) = unpacked(packed([made]))
    assert (one.kind, one.task_id, one.grids, one.record) == ("tests", "ä", "12ab", made)
    assert [parts(e) for e in one.found] == [parts(e) for e in found]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damage_costs_records_and_raises_nothing(data: Any) -> None:
    """Breaks: a resume that ends in a traceback, or an answer that was never given."""
    answer = np.array([[1, 2], [3, 4]], np.uint8)
    one = Explained((Hypothesis("plain", answer, Verdict(2, 2, 1.0), True, 1, "w", "own"),), 8, ())
    whole = packed([record("tests", name, "12ab", [one]) for name in "abc"])
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.one_of(
            st.just(whole[:at]),
            st.binary(max_size=40).map(lambda b: whole[:at] + b + whole[at + len(b) :]),
            st.binary(max_size=200),
        )
    )
    for found in unpacked(damaged):
        assert found.task_id in "abc"
        assert [parts(e) for e in found.found] == [parts(one)]


@pytest.mark.parametrize("cells", ["", "12a4", "1:34", "123", "é234"])
def test_an_answer_that_is_no_grid_is_none(cells: str) -> None:
    plain = [[8, [], [["plain", 2, cells, [2, 2, 1.0], True, 1, "w", "own"]]]]
    text = json.dumps(["tests", "a", "12ab", plain]).encode()
    assert list(unpacked(packed([kept_hypotheses.zlib.compress(text)]))) == []


# ---------------------------------------------------------------- runs


def test_a_resumed_run_fits_nothing_again(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Breaks: hypotheses that a disconnect costs: within a time budget fewer of them would vote."""
    flags = ("--hypotheses", "on", "--val_pairs", 1, "--epochs", 1)
    whole = train(*flags, runs="whole")
    interrupt_after(monkeypatch, 3)
    collected: list[int] = []
    real = Fitter.kept

    def kept(fitter: Fitter) -> bytes:
        fitter.collect(time.monotonic() + 60)  # all of them, so that the test knows how many
        collected.append(len(fitter.done))
        return real(fitter)

    monkeypatch.setattr(Fitter, "kept", kept)
    stopped = train(*flags)
    assert stopped.code == 130, stopped.err
    assert collected
    assert "in no file" not in stopped.out
    monkeypatch.undo()
    asked: list[str] = []
    work = Fitter._next

    def following(fitter: Fitter) -> Any:
        found = work(fitter)
        if found is not None:
            asked.append(found[0])
        return found

    monkeypatch.setattr(Fitter, "_next", following)
    resumed = train("--resume", stopped.folder, *flags)
    assert resumed.code == 0, resumed.err
    assert "Hypotheses: 6 of 6 tasks are in the checkpoint" in resumed.out
    assert "Resume: EXACT" in resumed.out
    assert "tests" not in asked
    names = ("exact_at_2", "alone", "gains", "hypothesis_tasks", "hypothesis_queries")
    ends = [json.loads((o.folder / "results.json").read_text()) for o in (whole, resumed)]
    assert [[end[name] for name in names] for end in ends] == [[ends[0][n] for n in names]] * 2


def test_a_checkpoint_without_hypotheses_is_resumed_all_the_same(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: runs of versions that kept none."""
    flags = ("--hypotheses", "on", "--val_pairs", 1, "--epochs", 1)
    interrupt_after(monkeypatch, 2)
    monkeypatch.setattr(Fitter, "kept", lambda _: b"")
    stopped = train(*flags)
    assert "hypotheses" not in stopped.checkpoint()["extra"]
    monkeypatch.undo()
    resumed = train("--resume", stopped.folder, *flags)
    assert resumed.code == 0, resumed.err
    assert "are in the checkpoint" not in resumed.out
    kept = resumed.checkpoint()["extra"]["hypotheses"]
    assert kept.dtype == torch.uint8
    found = list(unpacked(kept.numpy().tobytes()))
    assert {one.kind for one in found} == {"tests", "demonstrations"}


def test_a_resume_by_another_version_says_that_it_fits_anew(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--hypotheses", "on", "--val_pairs", 1, "--epochs", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_hypotheses, "program", lambda: b"another".ljust(32))
        interrupt_after(patch, 2)
        stopped = train(*flags)
    resumed = train("--resume", stopped.folder, *flags)
    assert resumed.code == 0, resumed.err
    assert "Hypotheses: the checkpoint's are of another version of the rules" in resumed.out
    assert json.loads((resumed.folder / "results.json").read_text())["hypothesis_queries"] == 6


def test_a_process_keeps_what_is_known_of_the_others_tasks(hidden: Any, fitted: Any) -> None:
    """Breaks: a resume by several processes that throws most of a checkpoint's away."""
    mine = Fitter(hidden[:2], 0, fitted[2], hidden)
    try:
        assert set(mine.done) == {task.task_id for task in hidden[:2]}
        assert mine.kept() == fitted[2]
    finally:
        mine.close()


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_an_error_while_a_result_is_taken_in_is_said(
    hidden: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Breaks: a run that waits for ever for a task whose result was lost."""

    def record(*_: Any) -> bytes:
        raise error("not to be written")

    monkeypatch.setattr(kept_hypotheses, "record", record)
    fitter = Fitter(hidden, 2)
    try:
        begun = time.monotonic()
        assert fitter.collect() == {}
        assert time.monotonic() - begun < 60
        assert fitter.failed == f"{error.__name__}: not to be written"
    finally:
        fitter.close()


def test_what_is_kept_is_what_is_worked_out_here(hidden: Any, fitted: Any) -> None:
    for one in unpacked(fitted[2]):
        (task,) = [t for t in by_size(hidden) if t.task_id == one.task_id]
        inputs = [p.input for p in task.tests]
        wanted = (
            rule_list.fit_task(pairs_of(task), inputs)
            if one.kind == "tests"
            else explain_demonstrations(pairs_of(task))
        )
        assert [parts(e) for e in one.found] == [parts(e) for e in wanted]
        assert one.grids == digest_of(pairs_of(task), inputs if one.kind == "tests" else ())
