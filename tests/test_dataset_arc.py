"""Tests of dataset_arc: loading, its messages and warnings, the slices, the hash."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dataset_arc as da
from batches import TrainingStream

ROOT = Path(da.__file__).parent


@pytest.fixture(scope="session")
def arc2() -> Any:
    return da.load_tasks("arcagi2")


# ---------------------------------------------------------------- loading


GOOD = {
    "train": [
        {"input": [[1, 2]], "output": [[2, 1]]},
        {"input": [[3], [4]], "output": [[4], [3]]},
    ],
    "test": [{"input": [[5, 6]], "output": [[6, 5]]}],
}


def edited(change: Any) -> Any:
    raw = json.loads(json.dumps(GOOD))
    change(raw)
    return raw


def write(path: Any, value: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def ids(tasks: Any) -> Any:
    return [task.task_id for task in tasks]


def test_arcagi2_counts(arc2: Any) -> None:
    assert (len(arc2.train), len(arc2.evaluation)) == (1000, 120)
    assert sum(len(task.demonstrations) for task in arc2.train) == 3232
    assert sum(len(task.tests) for task in arc2.train) == 1076
    assert ids(arc2.train) == sorted(ids(arc2.train))
    assert arc2.warnings == ()
    assert arc2.sha256 == da.load_tasks().sha256


def test_arcagi1_warns_of_overlap_with_counts() -> None:
    tasks = da.load_tasks("arcagi1")
    assert (len(tasks.train), len(tasks.evaluation)) == (400, 400)
    assert any("3 evaluation pairs of 1782 also among" in text for text in tasks.warnings)


def test_slices_have_the_published_counts(arc2: Any) -> None:
    slices = da.slices_of(arc2)
    assert {name: len(slices[name]) for name in slices} == {
        "arc1_train": 408,
        "arc1_eval": 394,
        "arc2_new": 274,
        "small": 325,
    }
    parts = [slices[name] for name in da.SLICE_NAMES[:3]]
    assert len(frozenset.union(*parts)) == 1076 == sum(map(len, parts))
    assert len({task_id for task_id, _ in slices["small"]}) == 301


def test_slices_do_not_need_outputs(arc2: Any) -> None:
    some = [task.without_test_outputs() for task in arc2.train[:5]]
    found = da.slices_of(some)
    assert set(found) == {"small"}


def test_combined_file_is_sorted_and_read_only(tmp_path: Path) -> None:
    file = write(tmp_path / "training.json", {"b": GOOD, "a": GOOD})
    tasks = da.load_tasks(file)
    assert ids(tasks.train) == ["a", "b"]
    assert tasks.evaluation == ()
    pair = tasks.train[0].demonstrations[0]
    assert pair.input.tolist() == [[1, 2]]
    assert pair.input.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        pair.input[0, 0] = 3


def test_one_task_file_takes_its_name_as_id(tmp_path: Path) -> None:
    assert ids(da.load_tasks(write(tmp_path / "007bbfb7.json", GOOD)).train) == ["007bbfb7"]


def test_both_splits_in_one_file(tmp_path: Path) -> None:
    tasks = da.load_tasks(write(tmp_path / "all.json", {"train": {"a": GOOD}, "eval": {"b": GOOD}}))
    assert (ids(tasks.train), ids(tasks.evaluation)) == (["a"], ["b"])


def without_output(raw: Any) -> None:
    for pair in raw["test"]:
        del pair["output"]


def test_kaggle_pair(tmp_path: Path) -> None:
    asked = edited(without_output)
    file = write(tmp_path / "arc-agi_training_challenges.json", {"a": asked})
    assert da.load_tasks(file).train[0].tests[0].output is None
    assert any(
        "1 test input without a known output" in text for text in da.load_tasks(file).warnings
    )
    write(tmp_path / "arc-agi_training_solutions.json", {"a": [[[6, 5]]]})
    output = da.load_tasks(file).train[0].tests[0].output
    assert output is not None
    assert output.tolist() == [[6, 5]]
    write(tmp_path / "arc-agi_evaluation_challenges.json", {"b": asked})
    write(tmp_path / "arc-agi_test_challenges.json", {"c": asked})
    both = da.load_tasks(tmp_path)
    assert (ids(both.train), ids(both.evaluation)) == (["a"], ["b"])
    assert any("arc-agi_test_challenges.json was not read" in text for text in both.left_out)
    alone = da.load_tasks(tmp_path / "arc-agi_test_challenges.json")
    assert ids(alone.evaluation) == ["c"]


@pytest.mark.parametrize(
    ("solutions", "message"),
    [
        ({}, "task a: no outputs in"),
        ({"a": []}, r"pair test\[0\]: .*solutions.json has no output for it"),
        ({"a": [[[6, 5]], [[1]]]}, "2 solutions for 1 test inputs"),
        ({"a": [[[6, 10]]]}, r"training_solutions.json: task a, output \[0\]\[0\]\[1\]: colour 10"),
        ([], "not an object of outputs"),
    ],
)
def test_kaggle_solutions_that_do_not_fit(tmp_path: Path, solutions: Any, message: Any) -> None:
    file = write(tmp_path / "arc-agi_training_challenges.json", {"a": edited(without_output)})
    write(tmp_path / "arc-agi_training_solutions.json", solutions)
    with pytest.raises(da.DataError, match=message):
        da.load_tasks(file)


def test_folders(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    write(flat / "b.json", GOOD)
    write(flat / "a.json", GOOD)
    assert ids(da.load_tasks(flat).train) == ["a", "b"]
    split = tmp_path / "split"
    write(split / "training" / "a.json", GOOD)
    write(split / "evaluation" / "b.json", GOOD)
    tasks = da.load_tasks(split)
    assert (ids(tasks.train), ids(tasks.evaluation)) == (["a"], ["b"])
    assert any("3 evaluation pairs of 3 also among" in text for text in tasks.warnings)
    assert ids(da.load_tasks(split / "evaluation").evaluation) == ["b"]
    combined = tmp_path / "combined"
    write(combined / "training.json", {"a": GOOD})
    write(combined / "evaluation.json", {"b": GOOD})
    tasks = da.load_tasks(combined)
    assert (ids(tasks.train), ids(tasks.evaluation)) == (["a"], ["b"])


def test_data_folder_and_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(da.DATA_DIR_VARIABLE, raising=False)
    assert len(da.load_tasks("auto").train) == 1000
    write(tmp_path / "data" / "training.json", {"here": GOOD})
    assert ids(da.load_tasks("auto").train) == ["here"]
    assert ids(da.load_tasks("training.json").train) == ["here"]
    assert ids(da.load_tasks("training").train) == ["here"]
    write(tmp_path / "other" / "training.json", {"there": GOOD})
    monkeypatch.setenv(da.DATA_DIR_VARIABLE, str(tmp_path / "other"))
    assert ids(da.load_tasks("auto").train) == ["there"]
    assert ids(da.load_tasks("training").train) == ["there"]
    monkeypatch.setenv(da.DATA_DIR_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(da.DataError, match=r"ARC_DATA_DIR=.*no such folder"):
        da.load_tasks("auto")


def set_at(*path: Any) -> Any:
    *way, last, value = path

    def change(raw: Any) -> None:
        for key in way:
            raw = raw[key]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([], "no tasks"),
        ({}, "no tasks"),
        ({"a": 3}, "task a: 3 is not a task"),
        ({"a": [[[1]]]}, "task a: .*looks like a solutions file"),
        ({"a": {"train": GOOD["train"]}}, "task a: key 'test' is missing"),
        ({"a": {"test": GOOD["test"]}}, "task a: key 'train' is missing"),
        ({"a": edited(set_at("train", []))}, "task a: no demonstrations"),
        ({"a": edited(set_at("test", []))}, "task a: no test inputs"),
        ({"a": edited(set_at("train", {}))}, "task a, train: not a list"),
        ({"a": edited(set_at("train", 0, []))}, r"task a, pair train\[0\]: not an object"),
        ({"a": edited(lambda r: r["train"][1].pop("input"))}, r"pair train\[1\]: key 'input' is"),
        ({"a": edited(lambda r: r["train"][1].pop("output"))}, r"pair train\[1\]: key 'output' is"),
        ({"a": edited(set_at("train", 0, "input", 5))}, r"pair train\[0\]\.input: 5 is not a grid"),
        (
            {"a": edited(set_at("train", 0, "input", [3]))},
            r"train\[0\]\.input\[0\]: 3 is not a row",
        ),
        (
            {"a": edited(set_at("train", 1, "output", [[1, 2], [3]]))},
            r"task a, pair train\[1\]\.output\[1\]: row has 1 cell but row 0 has 2",
        ),
        ({"a": edited(set_at("test", 0, "input", [[]]))}, r"test\[0\]\.input: grid is 1 x 0"),
        ({"a": edited(set_at("test", 0, "input", [[1] * 31]))}, "grid is 1 x 31; both sides must"),
        ({"a": edited(set_at("test", 0, "output", [[1]] * 31))}, "grid is 31 x 1; both sides must"),
        *(
            (
                {"a": edited(set_at("train", 0, "output", 0, 1, bad))},
                rf"task a, pair train\[0\]\.output\[0\]\[1\]: colour {text} is not",
            )
            for bad, text in [(10, "10"), (-1, "-1"), (1.0, "1.0"), (True, "True"), ("1", "'1'")]
        ),
        ({"a": edited(set_at("train", 0, "output", 0, 1, None))}, "colour None is not"),
        ('{"a": 1, "a": 2}', "duplicate id or key 'a'"),
    ],
)
def test_bad_files_give_one_line_that_names_the_place(
    tmp_path: Path, raw: Any, message: Any
) -> None:
    file = write(tmp_path / "bad.json", raw)
    with pytest.raises(da.DataError, match=message) as caught:
        da.load_tasks(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(da.DataError, match="not JSON"):
        da.load_tasks(file)


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(da.DataError, match="no such data; give arcagi2, arcagi1, a JSON file"):
        da.load_tasks(tmp_path / "nothing.json")
    with pytest.raises(da.DataError, match="no task files"):
        da.load_tasks(tmp_path)
    write(tmp_path / "x.json", {"a": [1]})
    with pytest.raises(da.DataError, match=r"no task in x\.json: keys 'train' and 'test' are mis"):
        da.load_tasks(tmp_path)


@pytest.mark.parametrize("text", [json.dumps({"a": GOOD}), "[1, 2"])
@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_collected_afterwards_as_before(
    tmp_path: Path, text: str, collecting: bool
) -> None:
    """Breaks: what load_tasks pauses stays off, or comes on, where the file is bad too."""
    path = tmp_path / "training.json"
    path.write_text(text, encoding="utf-8")
    before = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        with contextlib.suppress(da.DataError):
            da.load_tasks(path)
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()


def test_duplicate_ids_across_files(tmp_path: Path) -> None:
    write(tmp_path / "training" / "a.json", GOOD)
    write(tmp_path / "evaluation" / "a.json", GOOD)
    with pytest.raises(da.DataError, match="duplicate task id 'a'"):
        da.load_tasks(tmp_path)


def test_counted_warnings(tmp_path: Path) -> None:
    single = edited(lambda raw: raw["train"].pop())
    leaked = edited(set_at("test", 0, GOOD["train"][0]))
    tasks = da.load_tasks(write(tmp_path / "t.json", {"a": single, "b": leaked}))
    text = " / ".join(tasks.warnings)
    assert "1 task with one demonstration" in text
    assert ": a /" in text
    assert "1 training test pair also among the demonstrations" in text
    stream = TrainingStream(tasks.train, 0, 8)
    assert stream.n_skipped_single == 1
    assert ids(stream.tasks) == ["b"]


def test_hash_follows_all_but_test_outputs(tmp_path: Path) -> None:
    def digest(raw: Any) -> Any:
        return da.load_tasks(write(tmp_path / "t.json", raw)).sha256

    first = digest({"a": GOOD})
    assert digest({"a": edited(set_at("test", 0, "output", [[9, 9, 9]]))}) == first
    assert digest({"a": edited(without_output)}) == first
    assert digest({"b": GOOD}) != first
    assert digest({"a": edited(set_at("test", 0, "input", [[5], [6]]))}) != first
    assert digest({"a": edited(set_at("train", 0, "output", 0, 0, 9))}) != first


def test_parsing_needs_no_torch(tmp_path: Path) -> None:
    file = write(tmp_path / "t.json", GOOD)
    code = (
        "import sys, dataset_arc as d; d.load_tasks(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT, check=True)
