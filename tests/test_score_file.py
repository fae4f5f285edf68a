"""submission.json: every fault named with its place, scores against an independent scorer, and
`predict.py --score_file` without a model."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import environment, make_task, make_tasks, write_tasks
from hypothesis import given, settings
from hypothesis import strategies as st

import predict
import submissions
from dataset_arc import Pair, Task
from submissions import check, score, task_lines, total_lines

ROOT = Path(predict.__file__).parent


def grid(*rows: str) -> Any:
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


def task(task_id: str, *outputs: Any) -> Task:
    demonstration = Pair(grid("1"), grid("2"))
    return Task(task_id, (demonstration,), tuple(Pair(grid("3"), output) for output in outputs))


def both(first: Any, second: Any | None = None) -> dict[str, Any]:
    return {"attempt_1": first, "attempt_2": first if second is None else second}


TASKS = (task("a", grid("12", "34")), task("b", grid("5"), None))
VALID: dict[str, Any] = {
    "a": [both([[1, 2], [3, 4]])],
    "b": [both([[5]]), both([[0] * 30] * 30, [[9]])],
}


# ---------------------------------------------------------------- what is wrong


def changed(change: Callable[[Any], object]) -> Any:
    raw = copy.deepcopy(VALID)
    change(raw)
    return raw


def with_attempt(value: Any, name: str) -> Any:
    raw = copy.deepcopy(VALID)
    raw["a"][0][name] = value
    return raw


@pytest.mark.parametrize(
    ("raw", "problems"),
    [
        (VALID, []),
        ([], ["an empty list: not an object of answers by task id"]),
        ("text", ["'text': not an object of answers by task id"]),
        (None, ["null: not an object of answers by task id"]),
        ({}, ["task a: missing", "task b: missing"]),
        (changed(lambda r: r.pop("b")), ["task b: missing"]),
        (changed(lambda r: r.update(c=[])), ["task c: not one of the tasks of the data"]),
        (
            changed(lambda r: r["b"].pop()),
            ["task b: answers 1 test input, the task has 2"],
        ),
        (
            changed(lambda r: r["a"].append(both([[1]]))),
            ["task a: answers 2 test inputs, the task has 1"],
        ),
        (
            changed(lambda r: r.update(a={"attempt_1": [[1]]})),
            ["task a: an object is not a list with an object for each test input"],
        ),
        (
            changed(lambda r: r.update(a=[[[1]]])),
            ["task a, test 0: a list is not an object with attempt_1 and attempt_2"],
        ),
        (
            changed(lambda r: r["b"][1].pop("attempt_2")),
            ["task b, test 1, attempt_2: missing"],
        ),
        (
            changed(lambda r: r["b"][1].update(attempt_3=[[1]])),
            ["task b, test 1, attempt_3: unknown; there are attempt_1 and attempt_2"],
        ),
        *(
            (
                with_attempt(bad, "attempt_2"),
                [f"task a, test 0, attempt_2: {words} is not a grid, a list of rows"],
            )
            for bad, words in ((None, "null"), (7, "7"), ([], "an empty list"), ("1", "'1'"))
        ),
        *(
            (
                with_attempt([[1], bad], "attempt_1"),
                [f"task a, test 0, attempt_1, row 1: {words} is not a row, a list of colours"],
            )
            for bad, words in ((3, "3"), ([], "an empty list"), ({}, "an object"))
        ),
        (
            changed(lambda r: r["a"][0].update(attempt_2=[[1] * 3] * 3 + [[1] * 4])),
            ["task a, test 0, attempt_2, row 3: 4 cells, 3 in the rows before"],
        ),
        (
            changed(lambda r: r["a"][0].update(attempt_2=[[1, 1], [1]])),
            ["task a, test 0, attempt_2, row 1: 1 cell, 2 in the rows before"],
        ),
        *(
            (
                with_attempt([[1, bad]], "attempt_1"),
                [
                    f"task a, test 0, attempt_1, row 0, cell 1: {words} is not a colour, a whole "
                    "number in 0..9"
                ],
            )
            for bad, words in (
                (10, "10"), (-1, "-1"), (1.0, "1.0"), (True, "true"), (None, "null"), ("1", "'1'"),
                (float("nan"), "NaN"), ([1], "a list"),
            )
        ),
        (
            changed(lambda r: r["a"][0].update(attempt_1=[[1]] * 31)),
            ["task a, test 0, attempt_1: 31 rows, more than 30"],
        ),
        (
            changed(lambda r: r["a"][0].update(attempt_1=[[1] * 31] * 2)),
            ["task a, test 0, attempt_1, row 0: 31 cells, more than 30"],
        ),
        (
            changed(lambda r: (r.pop("a"), r["b"][0].update(attempt_1=[[11]]), r.update(z=1))),
            [
                "task z: not one of the tasks of the data",
                "task a: missing",
                "task b, test 0, attempt_1, row 0, cell 0: 11 is not a colour, a whole number in "
                "0..9",
            ],
        ),
    ],
)  # fmt: skip
def test_every_problem_is_named_with_its_place(raw: Any, problems: list[str]) -> None:
    assert check(raw, TASKS) == problems


def test_names_of_a_file_nobody_checked_are_shown_in_ascii() -> None:
    """Breaks: an id that moves the terminal's cursor, or that it cannot show."""
    for name in ("\x1b[2J", "\u00e4", "\ud800", "", "x" * 500):
        (line,) = (p for p in check({**VALID, name: []}, TASKS) if "not one" in p)
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 100


def text_of(text: bytes | str, path: Path) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


ONE = '"attempt_1": [[1]], "attempt_2": [[1]]'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ('{"t": [{' + ONE + '}], "t": []}', "task t: twice in the file"),
        ('{"t": [{"attempt_1": [[2]], ' + ONE + "}]}", "task t, test 0: attempt_1 twice"),
        ("null", "null: not an object"),
    ],
)
def test_any_file_is_exit_3_without_a_traceback(
    tmp_path: Path, capsys: Any, content: Any, says: str
) -> None:
    data = write_tasks(tmp_path / "data.json", {"t": make_task("flip")})
    file = text_of(content, tmp_path / "submission.json")
    assert predict.main(["--score_file", str(file), "--data", str(data)]) == 3
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO here")
def test_what_is_no_file_is_exit_3_and_does_not_wait(tmp_path: Path, capsys: Any) -> None:
    data = write_tasks(tmp_path / "data.json", {"t": make_task("flip")})
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, says in (
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "not a regular file"),
        (fifo, "not a regular file"),
        (Path(os.devnull), "not a regular file"),
    ):
        assert predict.main(["--score_file", str(path), "--data", str(data)]) == 3
        assert says in capsys.readouterr().err


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "b", "attempt_1", "attempt_2", "\x1b"]), inner)
    ),
    max_leaves=25,
)


@settings(max_examples=60, deadline=None)
@given(_json)
def test_no_json_is_too_odd_to_be_checked(raw: Any) -> None:
    """Breaks: an error while an error is described, or a value that is let through."""
    problems = check(raw, TASKS)
    assert all(line.isascii() and line.isprintable() for line in problems)
    if not problems:
        score(raw, TASKS)


# ---------------------------------------------------------------- scores

_small = st.lists(
    st.lists(st.integers(0, 1), min_size=2, max_size=2), min_size=1, max_size=2
)  # few enough grids for answers that are right
_answer = st.fixed_dictionaries({"attempt_1": _small, "attempt_2": _small})


@st.composite
def _cases(draw: Any) -> tuple[tuple[Task, ...], dict[str, Any]]:
    tasks, answers = [], {}
    for number in range(draw(st.integers(1, 4))):
        outputs = draw(st.lists(st.none() | _small, min_size=1, max_size=3))
        name = f"t{number}"
        arrays = (None if o is None else np.array(o, np.uint8) for o in outputs)
        tasks.append(task(name, *arrays))
        answers[name] = [draw(_answer) for _ in outputs]
    return tuple(tasks), answers


def kaggle(answers: dict[str, Any], tasks: tuple[Task, ...]) -> tuple[int, int, float, float]:
    """(right outputs, outputs, Kaggle's score, arcprize.org's), written from Kaggle's rule: "for
    each test output, 1 if either of the two predicted outputs is exactly it, else 0; the score is
    the sum over all divided by their number"; arcprize.org averages within tasks first."""
    points: dict[str, list[int]] = {}
    for one in tasks:
        for i, pair in enumerate(one.tests):
            if pair.output is not None:
                truth = json.dumps(pair.output.tolist())
                said = {json.dumps(grid) for grid in answers[one.task_id][i].values()}
                points.setdefault(one.task_id, []).append(int(truth in said))
    everything = [p for some in points.values() for p in some]
    per_task = [float(np.mean(some)) for some in points.values()]
    return (
        sum(everything),
        len(everything),
        float(np.mean(everything)) if everything else 0.0,
        float(np.mean(per_task)) if per_task else 0.0,
    )


@settings(max_examples=100, deadline=None)
@given(_cases())
def test_an_independent_scorer_agrees(case: tuple[tuple[Task, ...], dict[str, Any]]) -> None:
    tasks, answers = case
    assert check(answers, tasks) == []
    found = score(answers, tasks, {"first": {("t0", 0)}, "none": set()})
    right, n, share, mean = kaggle(answers, tasks)
    assert (found["exact_at_2"], found["n"]) == (right, n)
    assert found["exact_at_2"] / max(1, found["n"]) == pytest.approx(share)
    assert found["task_mean"] == pytest.approx(mean)
    firsts = {
        name: [{**a, "attempt_2": a["attempt_1"]} for a in some] for name, some in answers.items()
    }
    assert found["exact_at_1"] == kaggle(firsts, tasks)[0]
    assert found["unknown"] + found["n"] == sum(len(t.tests) for t in tasks)
    assert found["slices"]["first"]["n"] == (tasks[0].tests[0].output is not None)
    assert found["slices"]["none"] == {"n": 0, "exact_at_1": 0, "exact_at_2": 0}


def test_figures_of_a_small_case() -> None:
    answers: dict[str, Any] = {
        "a": [both([[1, 2], [3, 3]], [[1, 2], [3, 4]])],
        "b": [both([[1]]), both([[1]])],
    }
    found = score(answers, TASKS)
    assert (found["n"], found["exact_at_1"], found["exact_at_2"], found["unknown"]) == (2, 0, 1, 1)
    assert (found["tasks"], found["tasks_solved"], found["task_mean"]) == (2, 1, 0.5)
    assert (found["size_accuracy"], found["cell_accuracy"]) == (1.0, 0.375)
    assert found["by_task"]["b"][1] is None
    assert found["by_task"]["a"][0] == {
        "attempt_1": False, "attempt_2": True, "size": True, "cells": 0.75, "exact": True,
    }  # fmt: skip


def test_lines_say_what_is_wrong_and_end_with_what_is_solved() -> None:
    """Breaks: "83.2% of cells" for a wrong answer, totals that solved tasks follow, "1 tasks"."""
    tasks = (*TASKS, task("c", grid("11")), task("d", None), task("e", grid("1" * 30, "2" * 30)))
    answers: dict[str, Any] = {
        "a": [both([[1, 2], [3, 4]])],
        "b": [both([[6]]), both([[1]])],
        "c": [both([[1]])],
        "d": [both([[1]])],
        "e": [both([[1] * 30, [2] * 29 + [3]])],
    }
    figures = score(answers, tasks)
    lines = task_lines(figures["by_task"])
    assert [line.split()[0] for line in lines] == ["d", "b", "c", "e", "a"]
    assert "unknown 0/0  test 0: no known output" in lines[0]
    assert lines[1].endswith("0/1  test 0: 100.0% of cells wrong; test 1: no known output")
    assert lines[2].endswith("test 0: wrong size")
    assert lines[3].endswith("test 0: 1.7% of cells wrong")
    assert lines[4].split() == ["a", "solved", "1/1", "test", "0:", "exact", "in", "attempt", "1"]
    totals = total_lines(figures)
    assert totals[0] == "Outputs: 1/4 exact in two attempts (25.00%, Kaggle's score), 1 in one"
    assert totals[-1] == "Not scored: 2 test inputs without a known output"
    lone = score({"d": [both([[1]])]}, (tasks[3],))
    assert total_lines(lone) == ["Nothing to score: the test input has no known output."]
    almost = {"exact": False, "size": True, "cells": 1 - 1e-4}
    assert submissions.outcome_words(almost) == "less than 0.1% of cells wrong"


# ---------------------------------------------------------------- the script


def test_the_script_scores_without_torch(tmp_path: Path) -> None:
    """Breaks: a model, or torch, needed for what is counting."""
    tasks = make_tasks(("flip", "same", "crop"))
    data = write_tasks(tmp_path / "data.json", tasks)
    answers = {name: [both(t["test"][0]["output"])] for name, t in tasks.items()}
    answers["t2_crop"] = [both([[1]])]
    file, scores = tmp_path / "sub.json", tmp_path / "scores.json"
    file.write_text(json.dumps(answers))
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("raise SystemExit('torch was imported')")
    env = {**environment(tmp_path), "PYTHONPATH": str(tmp_path / "stub")}
    for path, code in ((file, 0), (tmp_path / "none.json", 3)):
        command = [sys.executable, str(ROOT / "predict.py"), "--score_file", str(path)]
        command += ["--data", str(data), "--score_json", str(scores)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == code, done.stderr
        if code == 0:
            last = done.stdout.splitlines()[-4]
            assert last == "Outputs: 2/3 exact in two attempts (66.67%, Kaggle's score), 2 in one"
            assert f"Data:   {data}: 3 tasks, 3 test inputs" in done.stdout
            assert done.stderr == ""
    assert json.loads(scores.read_text())["exact_at_2"] == 2


def test_a_reader_that_goes_away_does_not_stop_the_work(tmp_path: Path) -> None:
    """Breaks: `predict.py --show | head`, with a traceback in place of the rest."""
    tasks = make_tasks(("flip", "turn", "same"), sides=(20, 25))
    data = write_tasks(tmp_path / "data.json", tasks)
    answers = {name: [both(t["test"][0]["output"])] for name, t in tasks.items()}
    file = text_of(json.dumps(answers), tmp_path / "sub.json")
    command = [sys.executable, str(ROOT / "predict.py"), "--score_file", str(file), "--show"]
    with subprocess.Popen(
        [*command, "--data", str(data)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_file_of_the_other_split_is_told(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "data.json"
    file.write_text(
        json.dumps({"train": {"a": make_task("flip")}, "evaluation": {"b": make_task("same")}})
    )
    sub = text_of(json.dumps({"a": [both([[1]])]}), tmp_path / "sub.json")
    assert predict.main(["--score_file", str(sub), "--data", str(file)]) == 3
    err = capsys.readouterr().err
    assert "not a valid submission, 2 problems:" in err
    assert "All its tasks are of the other --split of the data." in err
    argv = ["--score_file", str(sub), "--data", str(file), "--split", "train"]
    assert predict.main(argv) == 0
    assert f"Data:   {file}, train: 1 task, 1 test input" in capsys.readouterr().out


def test_a_long_list_of_problems_ends_with_their_number(tmp_path: Path, capsys: Any) -> None:
    data = write_tasks(tmp_path / "data.json", {"t": make_task("flip")})
    sub = text_of(json.dumps({f"x{i}": [] for i in range(500)}), tmp_path / "sub.json")
    assert predict.main(["--score_file", str(sub), "--data", str(data)]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert "501 problems" in lines[0]
    assert lines[-1] == f"  and {501 - submissions.MOST_SHOWN} more"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give a RUN_OR_MODEL"),
        (["runs", "--score_file", "s.json"], "leave runs out"),
        (["--score_file", "s.json", "--views", "3"], "--views is for a model"),
        (["--score_file", "s.json", "--out", "x.json"], "--out is for a model"),
        (["runs", "--page", "a.json", "--out", "a.json"], "--out and --page name the same file"),
        (["runs", "--page", "."], "is a folder"),
    ],
)
def test_flags_that_do_not_go_together(capsys: Any, flags: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as left:
        predict.main(flags)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_an_answer_is_found_in_a_shuffled_file(tmp_path: Path) -> None:
    """Breaks: answers taken by their place in the file."""
    tasks = tuple(task(f"t{i}", grid(str(i))) for i in range(8))
    names = [t.task_id for t in tasks]
    random.Random(3).shuffle(names)
    answers: dict[str, Any] = {name: [both([[int(name[1:])]])] for name in names}
    assert score(answers, tasks)["exact_at_2"] == 8
