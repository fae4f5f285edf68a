"""Tests of dataset_arc: loading and its messages, views, the training stream,
honesty, collation."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset_arc as da
import grid_features as gf

ROOT = Path(da.__file__).parent


@pytest.fixture(scope="session")
def arc2():
    return da.load_tasks("arcagi2")


@pytest.fixture(scope="session")
def collator():
    return da.Collator(256 << 20)


def grid(rows, cols, seed=0):
    return np.random.default_rng(seed).integers(0, 10, (rows, cols)).astype(np.uint8)


def make_task(task_id, shapes, tests=((3, 3),), seed=0):
    """A task with random grids; shapes: one (input shape, output shape) a demonstration."""
    pairs = [
        da.Pair(grid(*a, seed=seed + 2 * i), grid(*b, seed=seed + 2 * i + 1))
        for i, (a, b) in enumerate(shapes)
    ]
    queries = [
        da.Pair(grid(*a, seed=seed + 91 + i), grid(*a, seed=seed + 71)) for i, a in enumerate(tests)
    ]
    return da.Task(task_id, tuple(pairs), tuple(queries))


def same_size(n, *shapes):
    return [(shape, shape) for shape in (shapes * n)[:n]]


def small_tasks():
    """Tasks of several kinds: same size, growing, shrinking, growing beyond the blind canvas."""
    return [
        make_task("grow", [((2, 2), (4, 4)), ((3, 3), (6, 6)), ((2, 3), (4, 6))], seed=10),
        make_task("huge", [((4, 4), (16, 16)), ((4, 4), (16, 16)), ((4, 4), (16, 16))], seed=20),
        make_task("same", same_size(4, (5, 6), (7, 4)), seed=30),
        make_task("crop", [((8, 8), (3, 3)), ((9, 7), (3, 3))], seed=40),
        make_task("six", same_size(6, (6, 6)), seed=50),
        make_task("two", [((3, 5), (12, 12)), ((3, 4), (3, 4))], seed=60),
    ]


def assert_same(a, b, but=()):
    """Two Batch or Targets objects are bit-identical."""
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name in but:
            continue
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype, f.name
            assert torch.equal(x, y), f.name
        else:
            assert x == y, f.name


# ---------------------------------------------------------------- loading


GOOD = {
    "train": [
        {"input": [[1, 2]], "output": [[2, 1]]},
        {"input": [[3], [4]], "output": [[4], [3]]},
    ],
    "test": [{"input": [[5, 6]], "output": [[6, 5]]}],
}


def edited(change):
    raw = json.loads(json.dumps(GOOD))
    change(raw)
    return raw


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def ids(tasks):
    return [task.task_id for task in tasks]


def test_arcagi2_counts(arc2):
    assert (len(arc2.train), len(arc2.evaluation)) == (1000, 120)
    assert sum(len(task.demonstrations) for task in arc2.train) == 3232
    assert sum(len(task.tests) for task in arc2.train) == 1076
    assert ids(arc2.train) == sorted(ids(arc2.train))
    assert arc2.warnings == ()
    assert arc2.sha256 == da.load_tasks().sha256


def test_arcagi1_warns_of_overlap_with_counts():
    tasks = da.load_tasks("arcagi1")
    assert (len(tasks.train), len(tasks.evaluation)) == (400, 400)
    assert any("3 evaluation pairs of 1782 also among" in text for text in tasks.warnings)


def test_slices_have_the_published_counts(arc2):
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


def test_slices_do_not_need_outputs(arc2):
    some = [task.without_test_outputs() for task in arc2.train[:5]]
    found = da.slices_of(some)
    assert not found["arc1_train"] | found["arc1_eval"] | found["arc2_new"]


def test_combined_file_is_sorted_and_read_only(tmp_path):
    file = write(tmp_path / "training.json", {"b": GOOD, "a": GOOD})
    tasks = da.load_tasks(file)
    assert ids(tasks.train) == ["a", "b"]
    assert tasks.evaluation == ()
    pair = tasks.train[0].demonstrations[0]
    assert pair.input.tolist() == [[1, 2]]
    assert pair.input.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        pair.input[0, 0] = 3


def test_one_task_file_takes_its_name_as_id(tmp_path):
    assert ids(da.load_tasks(write(tmp_path / "007bbfb7.json", GOOD)).train) == ["007bbfb7"]


def test_both_splits_in_one_file(tmp_path):
    tasks = da.load_tasks(write(tmp_path / "all.json", {"train": {"a": GOOD}, "eval": {"b": GOOD}}))
    assert (ids(tasks.train), ids(tasks.evaluation)) == (["a"], ["b"])


def without_output(raw):
    for pair in raw["test"]:
        del pair["output"]


def test_kaggle_pair(tmp_path):
    asked = edited(without_output)
    file = write(tmp_path / "arc-agi_training_challenges.json", {"a": asked})
    assert da.load_tasks(file).train[0].tests[0].output is None
    assert any("1 task without test outputs" in text for text in da.load_tasks(file).warnings)
    write(tmp_path / "arc-agi_training_solutions.json", {"a": [[[6, 5]]]})
    assert da.load_tasks(file).train[0].tests[0].output.tolist() == [[6, 5]]
    write(tmp_path / "arc-agi_evaluation_challenges.json", {"b": asked})
    write(tmp_path / "arc-agi_test_challenges.json", {"c": asked})
    both = da.load_tasks(tmp_path)
    assert (ids(both.train), ids(both.evaluation)) == (["a"], ["b"])
    assert any("arc-agi_test_challenges.json was not read" in text for text in both.warnings)
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
def test_kaggle_solutions_that_do_not_fit(tmp_path, solutions, message):
    file = write(tmp_path / "arc-agi_training_challenges.json", {"a": edited(without_output)})
    write(tmp_path / "arc-agi_training_solutions.json", solutions)
    with pytest.raises(da.DataError, match=message):
        da.load_tasks(file)


def test_folders(tmp_path):
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


def test_data_folder_and_variable(tmp_path, monkeypatch):
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


def set_at(*path):
    *way, last, value = path

    def change(raw):
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
            r"task a, pair train\[1\]\.output\[1\]: row has 1 cells but row 0 has 2",
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
def test_bad_files_give_one_line_that_names_the_place(tmp_path, raw, message):
    file = write(tmp_path / "bad.json", raw)
    with pytest.raises(da.DataError, match=message) as caught:
        da.load_tasks(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "bad.json"
    file.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(da.DataError, match="not JSON"):
        da.load_tasks(file)


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(da.DataError, match="no such data; give arcagi2, arcagi1, a JSON file"):
        da.load_tasks(tmp_path / "nothing.json")
    with pytest.raises(da.DataError, match="no task files"):
        da.load_tasks(tmp_path)
    write(tmp_path / "x.json", {"a": GOOD})
    with pytest.raises(da.DataError, match=r"x\.json: keys 'train' and 'test' are missing"):
        da.load_tasks(tmp_path)


def test_duplicate_ids_across_files(tmp_path):
    write(tmp_path / "training" / "a.json", GOOD)
    write(tmp_path / "evaluation" / "a.json", GOOD)
    with pytest.raises(da.DataError, match="duplicate task id 'a'"):
        da.load_tasks(tmp_path)


def test_counted_warnings(tmp_path):
    single = edited(lambda raw: raw["train"].pop())
    leaked = edited(set_at("test", 0, GOOD["train"][0]))
    tasks = da.load_tasks(write(tmp_path / "t.json", {"a": single, "b": leaked}))
    text = " / ".join(tasks.warnings)
    assert "1 task with one demonstration" in text
    assert ": a /" in text
    assert "1 training test pair also among the demonstrations" in text
    stream = da.TrainingStream(tasks.train, 0, 8)
    assert stream.n_skipped_single == 1
    assert ids(stream.tasks) == ["b"]


def test_hash_follows_all_but_test_outputs(tmp_path):
    def digest(raw):
        return da.load_tasks(write(tmp_path / "t.json", raw)).sha256

    first = digest({"a": GOOD})
    assert digest({"a": edited(set_at("test", 0, "output", [[9, 9, 9]]))}) == first
    assert digest({"a": edited(without_output)}) == first
    assert digest({"b": GOOD}) != first
    assert digest({"a": edited(set_at("test", 0, "input", [[5], [6]]))}) != first
    assert digest({"a": edited(set_at("train", 0, "output", 0, 0, 9))}) != first


def test_parsing_needs_no_torch(tmp_path):
    file = write(tmp_path / "t.json", GOOD)
    code = (
        "import sys, dataset_arc as d; d.load_tasks(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT, check=True)


# ---------------------------------------------------------------- views


grids = st.builds(grid, st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
views = st.builds(
    da.View,
    st.integers(0, 7),
    st.permutations(list(range(1, 10))).map(lambda p: (0, *p)),
)


@given(grids, views)
def test_views_are_invertible(g, view):
    shown = view.apply(g)
    assert shown.shape == (g.shape[::-1] if view.swaps_axes else g.shape)
    assert np.array_equal(view.invert(shown), g)
    assert np.array_equal(view.apply(view.invert(g)), g)
    assert np.array_equal(shown == 0, da.View(view.dihedral).apply(g) == 0)


def test_eight_dihedrals_are_distinct_and_identity_changes_nothing():
    g = np.arange(6, dtype=np.uint8).reshape(2, 3)
    seen = {(v.shape, v.tobytes()) for v in (da.View(d).apply(g) for d in range(8))}
    assert len(seen) == 8
    assert np.array_equal(da.View().apply(g), g)
    assert da.View(1).apply(g).tolist() == [[2, 5], [1, 4], [0, 3]]
    assert da.View(4).apply(g).tolist() == g.T.tolist()


@pytest.mark.parametrize(
    ("dihedral", "colours"), [(8, range(10)), (0, (1, 0, *range(2, 10))), (0, (0,) * 10), (0, ())]
)
def test_view_refuses_nonsense(dihedral, colours):
    with pytest.raises(ValueError, match="expected"):
        da.View(dihedral, tuple(colours))


def test_evaluation_views():
    found = da.evaluation_views(20, seed=3)
    assert found[0] == da.View()
    assert len(set(found)) == 20
    assert [v.dihedral for v in found[:8]] == list(range(8))
    assert found == da.evaluation_views(20, seed=3)
    assert found[:5] == da.evaluation_views(5, seed=3)
    assert found[1:] != da.evaluation_views(20, seed=4)[1:]
    with pytest.raises(ValueError, match="at least one"):
        da.evaluation_views(0)


def test_random_views_depend_on_the_key_alone():
    np.random.seed(1)  # noqa: NPY002 - shows that global state has no part
    a = [da.random_view(1, 2, k) for k in range(50)]
    assert a == [da.random_view(1, 2, k) for k in range(50)]
    assert {view.dihedral for view in a} == set(range(8))
    assert len(set(a)) == 50
    assert da.random_view(1, 2, 0) != da.random_view(2, 1, 0)


# ---------------------------------------------------------------- the training stream


@pytest.fixture(scope="module")
def stream(collator):
    return da.TrainingStream(small_tasks(), 7, 8, collator=collator)


def test_stream_is_a_pure_function(stream):
    again = da.TrainingStream(small_tasks(), 7, 8, collator=da.Collator(0))
    state = np.random.get_state()[1].tobytes()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    for position in reversed(range(stream.n_batches(3))):
        for a, b in zip(stream.batch(3, position), again.batch(3, position), strict=True):
            assert_same(a, b)
    assert np.random.get_state()[1].tobytes() == state  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_epochs_and_seeds_differ(stream):
    def content(s, epoch):
        return [(b.pair_ids, b.views) for b, _ in s.epoch(epoch)]

    other = da.TrainingStream(small_tasks(), 8, 8, collator=stream.collator)
    assert content(stream, 0) != content(stream, 1)
    assert content(stream, 0) != content(other, 0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(0, 99),
    st.integers(0, 3),
)
def test_every_demonstration_is_asked_once_an_epoch(counts, batch_size, seed, epoch):
    tasks = [make_task(f"t{i}", same_size(n, (2, 3)), seed=i) for i, n in enumerate(counts)]
    s = da.TrainingStream(tasks, seed, batch_size)
    asked = []
    for position in range(s.n_batches(epoch)):
        got = s.pair_ids(epoch, position)
        assert len(got) <= batch_size or len({task_id for task_id, _, _ in got}) == 1
        asked += got
    wanted = [(f"t{i}", "train", k) for i, n in enumerate(counts) if n > 1 for k in range(n)]
    assert sorted(asked) == sorted(wanted)
    assert s.n_pairs == len(wanted)


def test_context_is_the_other_demonstrations(stream):
    pairs = {t.task_id: t.demonstrations for t in stream.tasks}
    n_contexts = set()
    for epoch in range(3):
        for batch, targets in stream.epoch(epoch):
            rows = {}
            for c, t in enumerate(batch.demo_task.tolist()):
                rows.setdefault(t, []).append(c)
            for q, (task_id, kind, number) in enumerate(batch.pair_ids):
                assert kind == "train"
                view = batch.views[q]
                assert batch.view_id[q] == view.dihedral
                h, w = batch.query_input_size[q].tolist()
                shown = batch.query_input[q, :h, :w].numpy()
                asked = pairs[task_id][number]
                assert np.array_equal(view.invert(shown), asked.input)
                assert (batch.query_input[q] >= 0).sum() == h * w
                h, w = targets.size[q].tolist()
                assert np.array_equal(view.invert(targets.output[q, :h, :w].numpy()), asked.output)
                seen = [c for c in batch.context[q].tolist() if c >= 0]
                assert len(seen) == min(4, len(pairs[task_id]) - 1) == len(set(seen))
                n_contexts.add(tuple(seen))
                for c in seen:
                    assert batch.demo_task[c] == batch.query_task[q]
                    h, w = batch.demo_input_size[c].tolist()
                    given_input = view.invert(batch.demo_input[c, :h, :w].numpy())
                    matching = [
                        i
                        for i, p in enumerate(pairs[task_id])
                        if np.array_equal(p.input, given_input)
                    ]
                    assert matching
                    assert number not in matching
    assert len(n_contexts) > 6


def test_skips_and_options(collator):
    tasks = [
        make_task("one", same_size(1, (3, 3))),
        make_task("big", [((3, 3), (3, 3)), ((3, 3), (11, 3))]),
        make_task("ok", same_size(3, (4, 5))),
    ]
    s = da.TrainingStream(tasks, 0, 4, max_side=10, max_context=1, canvas_step=4, collator=collator)
    assert (s.n_skipped_single, s.n_skipped_large, ids(s.tasks)) == (1, 1, ["ok"])
    batch, _ = s.batch(0, 0)
    assert set(batch.query_sources.shape[2:]) == {4, 8}  # 4 x 5 in steps of 4, perhaps turned
    assert batch.context.shape == (3, 1)
    assert batch.task_index.tolist() == [2, 2, 2]
    assert s.task_table == {"one": 0, "big": 1, "ok": 2}
    unseen = da.TrainingStream(tasks, 0, 4, task_table={}, collator=collator)
    assert unseen.batch(0, 0)[0].task_index.tolist()[0] == -1
    plain = da.TrainingStream(tasks, 0, 4, augment=False, collator=collator)
    assert set(plain.batch(0, 0)[0].views) == {da.View()}
    with pytest.raises(IndexError, match="position 99"):
        s.batch(0, 99)
    with pytest.raises(ValueError, match="batch_size"):
        da.TrainingStream(tasks, 0, 0)
    with pytest.raises(ValueError, match="seed"):
        da.TrainingStream(tasks, -1, 4)


def test_task_weights():
    tasks = [make_task(f"t{i}", same_size(2, (2, 2)), seed=i) for i in range(3)]
    s = da.TrainingStream(tasks, 0, 2, task_weights={"t0": 0.0, "t1": 2.5})
    counts = np.zeros(3)
    views = set()
    for epoch in range(40):
        for position in range(s.n_batches(epoch)):
            counts[int(s.pair_ids(epoch, position)[0][0][1:])] += 1
    for batch, _ in s.epoch(0):
        if batch.pair_ids[0][0] == "t1":
            views.add(batch.views[0])
    assert counts[0] == 0
    assert 90 <= counts[1] <= 110
    assert counts[2] == 40
    assert len(views) >= 2
    with pytest.raises(ValueError, match="weight -1"):
        da.TrainingStream(tasks, 0, 2, task_weights=lambda task: -1)


def test_overflow_queries_fit_in_their_own_batches(stream):
    fits = {}
    for batch, targets in stream.epoch(0):
        whole = len(batch.pair_ids) > batch.n_tasks
        if not whole:
            assert len({task_id for task_id, _, _ in batch.pair_ids}) == len(batch.pair_ids)
        for key, ok in zip(batch.pair_ids, targets.fits.tolist(), strict=True):
            fits.setdefault(key[0], []).append((whole, ok))
    assert fits["huge"].count((True, False)) == 3
    assert fits["huge"].count((False, True)) == 3
    assert fits["grow"].count((False, True)) == 3  # asked again, whether or not it fitted before
    assert len(fits["two"]) == 3  # the query whose context holds the 12 x 12 output, once more
    quiet = da.TrainingStream(small_tasks(), 7, 8, overflow=False, collator=stream.collator)
    assert quiet.n_batches(0) == stream.n_batches(0) - sum(
        len(b.pair_ids) == b.n_tasks for b, _ in stream.epoch(0)
    )


# ---------------------------------------------------------------- honesty


def fake_analysis(g):
    return gf.GridAnalysis(
        planes=np.full((gf.N_SOURCES, 30, 30), gf.OUTSIDE, np.uint8),
        sizes=np.zeros((gf.N_SOURCES, 2), np.uint8),
        cells=np.zeros((gf.N_CELL_FEATURES, *g.shape), np.uint8),
        size_values=np.zeros((2, gf.N_SIZE_RULES), np.uint8),
        background=0,
    )


def test_no_test_pair_in_the_stream_of_all_tasks(arc2, monkeypatch):
    # Which pairs are in a batch does not hang on the features, so the quick fake will do.
    monkeypatch.setattr(gf, "analyse", fake_analysis)
    monkeypatch.setattr(gf, "control_features", lambda *_: np.zeros(gf.N_CONTROL, np.float32))
    tests = {c for task in arc2.train for c in da._contents(task.tests)}
    test_inputs = {c[:2] for c in tests}
    demos = {c for task in arc2.train for c in da._contents(task.demonstrations)}
    demo_inputs = {c[:2] for c in demos}
    assert len(tests) == 1076
    s = da.TrainingStream(arc2.train, 0, 32, collator=da.Collator(0))
    asked = set()
    for batch, targets in s.epoch(0):
        for q, view in enumerate(batch.views):
            h, w = batch.query_input_size[q].tolist()
            shown = view.invert(batch.query_input[q, :h, :w].numpy())
            h, w = targets.size[q].tolist()
            wanted = view.invert(targets.output[q, :h, :w].numpy())
            key = da._content(da.Pair(shown, wanted))
            asked.add(key)
            for c in batch.context[q].tolist():
                if c >= 0:
                    h, w = batch.demo_input_size[c].tolist()
                    seen = view.invert(batch.demo_input[c, :h, :w].numpy())
                    assert (seen.shape, seen.tobytes()) in demo_inputs
    assert asked == demos
    assert not asked & tests
    assert not {key[:2] for key in asked} & (test_inputs - demo_inputs)


def test_test_outputs_have_no_part_in_training(arc2, collator):
    tasks = [t for t in arc2.train if max(p.input.size for p in t.demonstrations) < 60][:30]
    noisy = [
        replace(t, tests=tuple(da.Pair(p.input, grid(9, 4, k)) for k, p in enumerate(t.tests)))
        for t in tasks
    ]
    blank = [t.without_test_outputs() for t in tasks]
    streams = [da.TrainingStream(t, 5, 16, collator=collator) for t in (tasks, noisy, blank)]
    assert len({s.n_batches(2) for s in streams}) == 1
    for position in range(streams[0].n_batches(2)):
        first, *rest = (s.batch(2, position) for s in streams)
        for other in rest:
            assert_same(first[0], other[0])
            assert_same(first[1], other[1])


QUERY_FIELDS = (
    "task_index",
    "view_id",
    "query_input",
    "query_input_size",
    "query_sources",
    "query_cells",
    "query_canvas",
    "size_candidates",
    "size_support",
    "query_task",
    "context",
)
DEMO_FIELDS = tuple(f.name for f in fields(da.Batch) if f.name.startswith("demo_"))


def rows_of(stream, epoch, key):
    """All that a model may use of one query, for each batch that asks it."""
    out = []
    for position in range(stream.n_batches(epoch)):
        if key not in stream.pair_ids(epoch, position):
            continue
        batch, _ = stream.batch(epoch, position)
        q = batch.pair_ids.index(key)
        seen = batch.context[q][batch.context[q] >= 0]
        shown = {name: getattr(batch, name)[q] for name in QUERY_FIELDS}
        shown |= {name: getattr(batch, name)[seen] for name in DEMO_FIELDS}
        shape = {name: tuple(getattr(batch, name).shape) for name in QUERY_FIELDS + DEMO_FIELDS}
        out.append((shown, shape, batch.pair_ids, batch.views, batch.n_tasks))
    return out


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 2),
)
def test_own_output_reaches_nothing_of_its_query(collator, which, number, rows, cols, epoch):
    tasks = small_tasks()
    task = tasks[which]
    number %= len(task.demonstrations)
    pairs = list(task.demonstrations)
    pairs[number] = da.Pair(pairs[number].input, grid(rows, cols, seed=rows * 31 + cols))
    changed = [*tasks[:which], replace(task, demonstrations=tuple(pairs)), *tasks[which + 1 :]]
    key = (task.task_id, "train", number)
    first, second = (
        rows_of(da.TrainingStream(t, 3, 8, collator=collator), epoch, key) for t in (tasks, changed)
    )
    assert len(first) == len(second) >= 1
    for a, b in zip(first, second, strict=True):
        assert a[1:] == b[1:]
        for name in a[0]:
            assert torch.equal(a[0][name], b[0][name]), name


def test_a_query_in_its_own_context_is_refused(collator):
    task = small_tasks()[0]
    request = da.Request(task, da.View(), 0, (0, 1), (("train", 0),), ((0, 1),))
    with pytest.raises(ValueError, match="its own context"):
        collator.collate([request])


# ---------------------------------------------------------------- collation


def test_planes_are_those_of_the_viewed_grids(stream):
    for batch, _ in stream.epoch(1):
        for q, view in enumerate(batch.views):
            h, w = batch.query_input_size[q].tolist()
            analysis = gf.analyse(batch.query_input[q, :h, :w].numpy())
            h, w = batch.query_canvas[q].tolist()
            canvas = tuple(batch.query_sources.shape[2:])
            wanted = gf.place(gf.place(analysis.planes, (h, w)), canvas)
            assert np.array_equal(batch.query_sources[q].numpy(), wanted)
            cells = gf.place(analysis.cells, (h, w), gf.CELL_FEATURE_BINS)
            wanted = gf.place(cells, canvas, gf.CELL_FEATURE_BINS)
            assert np.array_equal(batch.query_cells[q].numpy(), wanted)
            sides = np.concatenate((analysis.sizes.T, analysis.size_values), 1)
            got = batch.size_candidates[q, :, : da.N_INPUT_CANDIDATES].numpy()
            assert np.array_equal(got, sides)
            assert view == batch.views[q]


def test_control_features_are_those_of_the_viewed_pair(collator):
    task = make_task("t", [((4, 5), (4, 5)), ((5, 5), (2, 3)), ((3, 4), (8, 8))], seed=3)
    view = da.View(3, (0, 4, 3, 2, 1, 9, 8, 7, 6, 5))
    request = da.Request(task, view, -1, (0, 1, 2), (("test", 0),), ((0, 1, 2),))
    batch = collator.collate([request])
    n_right = np.zeros((2, da.N_INPUT_CANDIDATES), int)
    for c, pair in enumerate(task.demonstrations):
        shown, wanted = view.apply(pair.input), view.apply(pair.output)
        analysis = gf.analyse(shown)
        control = gf.control_features(analysis, shown, wanted)
        assert np.allclose(batch.demo_control[c].numpy(), control, atol=1e-6)
        h, w = wanted.shape
        assert batch.demo_output_size[c].tolist() == [h, w]
        assert np.array_equal(batch.demo_output[c, :h, :w].numpy(), wanted)
        assert (batch.demo_output[c] >= 0).sum() == h * w
        assert np.array_equal(batch.demo_sources[c, :, :h, :w].numpy(), analysis.planes[:, :h, :w])
        assert (batch.demo_sources[c, :, h:] == gf.OUTSIDE).all()
        right = np.concatenate((analysis.sizes.T, analysis.size_values), 1) == [[h], [w]]
        n_right += right
    assert batch.demo_output.shape[1:] == batch.demo_sources.shape[2:] == (8, 8)
    support = batch.size_support[0, :, : da.N_INPUT_CANDIDATES].numpy()
    assert np.allclose(support, n_right / 3)


def test_constants_and_dtypes(stream):
    batch, targets = stream.batch(0, 0)
    assert da.N_SIZE_CANDIDATES == len(set(da.SIZE_CANDIDATE_NAMES)) == gf.N_SOURCES + 32 + 7
    n_q, n_c = len(batch.pair_ids), len(batch.demo_task)
    assert batch.n_queries == n_q
    assert batch.size_candidates.shape == (n_q, 2, da.N_SIZE_CANDIDATES)
    assert batch.demo_control.shape == (n_c, gf.N_CONTROL)
    assert batch.query_sources.dtype == batch.demo_cells.dtype == torch.uint8
    assert batch.size_support.dtype == batch.demo_control.dtype == torch.float32
    assert batch.size_candidates.dtype == batch.context.dtype == targets.output.dtype == torch.long
    assert_same(batch.to("cpu", non_blocking=True), batch)
    assert_same(targets.to(torch.device("cpu")), targets)
    assert batch.to("meta").query_sources.is_meta
    whole = [b for b, _ in stream.epoch(0) if len(b.pair_ids) > b.n_tasks]
    assert all(len(b.demo_task) == len(b.pair_ids) for b in whole)


def slow_rules(ins, outs, query, axis):
    """The demonstration rules of one axis, spelled out."""
    wanted = [o[axis] for o in outs]
    values = dict.fromkeys(da.DEMONSTRATION_RULE_NAMES, 0)
    if not wanted:
        return list(values.values())
    values["constant"] = wanted[0] if len(set(wanted)) == 1 else 0
    values["modal"] = max(wanted, key=lambda side: (wanted.count(side), side))
    values["maximum"] = max(wanted)
    for other, name in ((axis, ""), (1 - axis, "_swapped")):
        given = [i[other] for i in ins]
        own = query[other]
        ratios = {o / i for i, o in zip(given, wanted, strict=True)}
        if len(ratios) == 1:
            o, i = wanted[0], given[0]
            if o % i == 0:
                values["ratio" + name] = own * (o // i)
            elif i % o == 0 and own % (i // o) == 0:
                values["ratio" + name] = own // (i // o)
        steps = {o - i for i, o in zip(given, wanted, strict=True)}
        if len(steps) == 1:
            values["difference" + name] = own + steps.pop()
    return [v if 1 <= v <= 30 else 0 for v in values.values()]


side = st.integers(1, 8)
sizes = st.tuples(side, side)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(sizes, sizes, st.booleans()), max_size=4), sizes, st.integers(1, 4))
def test_demonstration_rules_against_the_slow_way(demos, query, factor):
    demos = [(a, (b if k else (a[0] * factor, a[1] + 1)), k) for a, b, k in demos]
    ins = np.array([[a for a, _, _ in demos]], np.int64).reshape(1, -1, 2)
    outs = np.array([[b for _, b, _ in demos]], np.int64).reshape(1, -1, 2)
    known = np.array([[k or factor > 2 for _, _, k in demos]], bool).reshape(1, -1)
    got = da.demonstration_rules(ins, outs, known, np.array([query], np.int64))
    used = [d for d, k in zip(demos, known[0], strict=True) if k]
    for axis in (0, 1):
        wanted = slow_rules([d[0] for d in used], [d[1] for d in used], query, axis)
        assert got[0, axis].tolist() == wanted


def rule(batch, name, values="size_candidates"):
    k = da.SIZE_CANDIDATE_NAMES.index(f"demonstrations_{name}")
    return getattr(batch, values)[0, :, k].tolist()


def test_support_of_demonstration_rules_is_leave_one_out(collator):
    def asked(shapes, query):
        task = make_task("t", shapes, tests=(query,))
        numbers = tuple(range(len(shapes)))
        return collator.collate(
            [da.Request(task, da.View(), -1, numbers, (("test", 0),), (numbers,))]
        )

    batch = asked([((2, 3), (4, 9)), ((3, 4), (6, 9)), ((4, 2), (8, 7))], (5, 5))
    assert rule(batch, "ratio") == [10, 0]
    assert rule(batch, "ratio", "size_support") == [1, 0]
    assert rule(batch, "constant") == [0, 0]
    # without the third demonstration the other two agree on 9, which is wrong on the third
    assert rule(batch, "modal") == [8, 9]
    assert rule(batch, "modal", "size_support")[1] == pytest.approx(2 / 3)
    # the longest of the other two is never right where all three differ
    assert rule(batch, "maximum") == [8, 9]
    assert rule(batch, "maximum", "size_support")[0] == 0
    assert batch.query_canvas[0, 0] >= 10
    batch = asked([((2, 3), (4, 9))], (5, 5))
    assert rule(batch, "ratio") == [10, 15]
    assert rule(batch, "ratio", "size_support") == [da.UNCHECKED_SUPPORT] * 2
    assert batch.size_support.max() <= 1


def test_canvas_bound():
    candidates = np.array([[3, 9, 30], [0, 4, 5]])
    outs = np.array([[2, 6], [2, 7]])
    own = np.array([1, 2])

    def bound(support):
        return da.canvas_bound(candidates, np.array(support, np.float32), outs, own).tolist()

    assert bound([[1, 1, 0.5], [1, 1, 0]]) == [9, 4]  # an absent full candidate says nothing
    assert bound([[0, 0, 0], [0, 0, 0]]) == [2, 7]
    assert bound([[0.5, 0, 0], [0, 0, 0.5]]) == [3, 7]
    none = da.canvas_bound(candidates, np.zeros((2, 3), np.float32), outs[:0], own)
    assert none.tolist() == [1, 2]


def test_cache_is_bounded_and_changes_nothing():
    tiny = da.Collator(40_000)
    roomy = da.Collator()
    a = da.TrainingStream(small_tasks(), 1, 8, collator=tiny)
    b = da.TrainingStream(small_tasks(), 1, 8, collator=roomy)
    for position in range(a.n_batches(0)):
        assert_same(a.batch(0, position)[0], b.batch(0, position)[0])
        assert tiny._cache.n_bytes <= 40_000
    held = sum(size for size, _ in roomy._cache._items.values())
    assert roomy._cache.n_bytes == held > 40_000


# ---------------------------------------------------------------- evaluation


def test_evaluation_asks_every_test_input_once_a_view(collator):
    tasks = [
        make_task(f"t{i}", same_size(3, (4, 5)), tests=((3, 3),) * i, seed=i) for i in (1, 2, 5)
    ]
    some = da.evaluation_views(3)
    asked = []
    for batch in da.evaluation_batches(tasks, some, 4, task_table={"t2": 9}, collator=collator):
        assert len(batch.pair_ids) <= 4
        asked += zip(batch.views, batch.pair_ids, strict=True)
        for row, (task_id, _, _) in enumerate(batch.pair_ids):
            assert batch.task_index[row] == (9 if task_id == "t2" else -1)
    wanted = [(f"t{i}", "test", k) for i in (1, 2, 5) for k in range(i)]
    assert [view for view, _ in asked] == [view for view in some for _ in wanted]
    for view in some:
        assert sorted(key for v, key in asked if v == view) == wanted


def test_evaluation_does_not_read_test_outputs(arc2, collator):
    tasks = arc2.train[:12]
    noisy = [replace(t, tests=tuple(da.Pair(p.input, grid(1, 1)) for p in t.tests)) for t in tasks]
    hidden = [t.without_test_outputs() for t in tasks]
    view = da.evaluation_views(3)[2]
    found = [
        list(da.evaluation_batches(t, view, collator=collator)) for t in (tasks, noisy, hidden)
    ]
    for first, *rest in zip(*found, strict=True):
        for other in rest:
            assert_same(first, other)
        targets = da.evaluation_targets(tasks, first)
        for row, (task_id, _, number) in enumerate(first.pair_ids):
            output = next(t for t in tasks if t.task_id == task_id).tests[number].output
            h, w = targets.size[row].tolist()
            assert np.array_equal(view.invert(targets.output[row, :h, :w].numpy()), output)
        with pytest.raises(da.DataError, match="cannot be scored"):
            da.evaluation_targets(hidden, first)


def test_evaluation_context_is_limited_and_single_demonstrations_work(collator):
    tasks = [make_task("nine", same_size(9, (3, 3))), make_task("one", same_size(1, (3, 3)))]
    (batch,) = da.evaluation_batches(tasks, collator=collator)
    seen = dict(zip([key[0] for key in batch.pair_ids], (batch.context >= 0).sum(1), strict=True))
    assert seen == {"nine": 6, "one": 1}
    assert len(batch.demo_task) == 7


def test_identity_view_of_one_view(collator):
    tasks = [make_task("a", same_size(2, (3, 4)))]
    default = list(da.evaluation_batches(tasks, collator=collator))
    assert_same(default[0], next(da.evaluation_batches(tasks, da.View(), collator=collator)))


# ---------------------------------------------------------------- prefetching


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_prefetch_keeps_order(depth):
    assert list(da.prefetch(lambda k: k * k, range(20), depth)) == [k * k for k in range(20)]


def test_prefetch_raises_in_turn():
    def make(k):
        if k == 3:
            raise RuntimeError("third")
        return k

    found = da.prefetch(make, range(10), 4)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="third"):
        next(found)


def test_prefetch_stops_with_its_reader():
    made = []
    found = da.prefetch(lambda k: made.append(k), range(1000), 2)
    next(found)
    found.close()
    assert len(made) <= 4
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetched_batches_are_the_same(stream):
    plain = list(stream.epoch(0))
    ahead = da.prefetch(lambda p: stream.batch(0, p), range(stream.n_batches(0)))
    for (a, x), (b, y) in zip(plain, ahead, strict=True):
        assert_same(a, b)
        assert_same(x, y)


# ---------------------------------------------------------------- proposals


class Offers:
    """Proposes, per demonstration, its own output and grids that say which demonstration it is."""

    def __init__(self, extra=(), none=()):
        self.asked, self.extra, self.none = [], extra, none

    def ask(self, tasks):
        self.asked.append([t.task_id for t in tasks])

    def leave_one_out(self, task):
        return [
            None if i in self.none else self.offer(p.output, *self.extra)
            for i, p in enumerate(task.demonstrations)
        ]

    def offer(self, *grids):
        facts = np.zeros((len(grids), da.N_PROPOSAL_FACTS), np.float32)
        facts[:, 0] = [g.sum() + 1 for g in grids]
        return da.Proposals(tuple(grids), facts)


def shown(batch, q, a):
    """A proposal of a batch in the task's own colours and orientation."""
    rows, cols = batch.proposed_size[q, a].tolist()
    canvas = batch.proposed[q, a].numpy()
    assert (canvas[rows:] == da.OUTSIDE).all()
    assert (canvas[:, cols:] == da.OUTSIDE).all()
    return batch.views[q].invert(canvas[:rows, :cols])


def test_proposals_are_shown_in_the_batch_s_view(collator):
    """Breaks: the view (dihedral or colours) not applied; another query's proposals or facts."""
    tasks = small_tasks()
    stream = da.TrainingStream(tasks, 0, 6, collator=collator, proposals=Offers())
    dihedrals, n = set(), 0
    for epoch in range(6):
        for batch, targets in stream.epoch(epoch):
            for q, (task_id, _, i) in enumerate(batch.pair_ids):
                pair = next(t for t in tasks if t.task_id == task_id).demonstrations[i]
                if not targets.fits[q]:
                    continue
                n += 1
                dihedrals.add(batch.views[q].dihedral)
                assert np.array_equal(shown(batch, q, 0), pair.output)
                assert batch.proposed_size[q, 0].tolist() == targets.size[q].tolist()
                rows, cols = targets.size[q].tolist()
                target = targets.output[q, :rows, :cols]
                assert torch.equal(batch.proposed[q, 0, :rows, :cols].long(), target)
                assert batch.proposed_facts[q, 0, 0] == pair.output.sum() + 1
    assert len(dihedrals) == 8
    assert n > 40


def test_what_a_training_canvas_cannot_hold_is_left_out(collator):
    """Breaks: a proposal cut to the canvas, or one that stretches it (the canvas would tell)."""
    tasks = small_tasks()
    large = np.ones((30, 30), np.uint8)
    plain = da.TrainingStream(tasks, 0, 6, collator=collator)
    offering = da.TrainingStream(tasks, 0, 6, collator=collator, proposals=Offers((large,)))
    n_left_out = 0
    for position in range(plain.n_batches(0)):
        (a, ta), (b, tb) = plain.batch(0, position), offering.batch(0, position)
        if plain._plan(0)[position].query is not None:
            continue  # what no canvas of its task holds is asked on one that its context calls for
        assert a.query_sources.shape == b.query_sources.shape
        assert torch.equal(a.query_canvas, b.query_canvas)
        assert torch.equal(ta.output, tb.output)
        assert a.proposed.shape[:2] == (a.n_queries, 0)
        gone = b.proposed_size[:, 1].eq(0).all(-1)
        n_left_out += int(gone.sum())
        assert (b.proposed[:, 1][gone] == da.OUTSIDE).all()
        assert (b.proposed_facts[:, 1][gone] == 0).all()
        assert (b.proposed_size[:, 0] > 0).all() or not tb.fits.all()
    assert n_left_out > 5


def test_queries_without_proposals_have_none(collator):
    """Breaks: None of one query taken for the next one's."""
    tasks = small_tasks()
    stream = da.TrainingStream(tasks, 0, 6, collator=collator, proposals=Offers(none=(1,)))
    for batch, targets in stream.epoch(0):
        for q, (_, _, i) in enumerate(batch.pair_ids):
            if not targets.fits[q]:
                continue
            n = (
                0
                if not batch.proposed.shape[1]
                else int((batch.proposed_size[q] > 0).all(-1).sum())
            )
            assert n == (i != 1)


def test_proposals_are_asked_for_before_their_turn(collator):
    """Breaks: training waits for each batch's proposals in turn."""
    tasks = small_tasks()
    offers = Offers()
    stream = da.TrainingStream(tasks, 0, 3, collator=collator, proposals=offers)
    stream.batch(0, 0)
    ids = [p[0] for i in range(min(5, stream.n_batches(0))) for p in stream.pair_ids(0, i)]
    assert list(dict.fromkeys(offers.asked[0])) == list(dict.fromkeys(ids))
    assert len(set(ids)) > 1


def test_the_canvas_of_an_evaluation_grows_with_its_proposals(collator):
    """Breaks: large proposals cut or left out at prediction; a proposal under another query's
    number, in another view."""
    tasks = [make_task("t", same_size(2, (3, 4), (4, 3)), tests=((3, 3), (4, 4)))]
    large = np.arange(9 * 12, dtype=np.uint8).reshape(9, 12) % 10
    small = grid(2, 2, seed=5)
    offers = {("t", 1): Offers().offer(large, small)}
    for view in da.evaluation_views(8):
        (batch,) = da.evaluation_batches(tasks, view, proposals=offers, collator=collator)
        assert batch.proposed.shape[:2] == (2, 2)
        assert sorted(batch.proposed.shape[2:]) == sorted(batch.query_sources.shape[2:])
        assert batch.proposed_size[0].tolist() == [[0, 0], [0, 0]]
        assert np.array_equal(shown(batch, 1, 0), large)
        assert np.array_equal(shown(batch, 1, 1), small)
        facts = batch.proposed_facts[1, :, 0].tolist()
        assert facts == [large.sum() + 1, small.sum() + 1]
        assert batch.query_canvas.max() <= 8  # the bound of the agent's own size stays
    (none,) = da.evaluation_batches(tasks, collator=collator)
    assert none.proposed.shape[1] == 0
