"""Tests of batches: views, the training stream, honesty, collation, evaluation, prefetching."""

from __future__ import annotations

import threading
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import batches
import dataset_arc
import grid_features as gf
import size_rules
from grid_parts import OUTSIDE
from grid_transforms import N_SOURCES
from hypotheses import N_PROPOSAL_FACTS, Proposals


@pytest.fixture(scope="session")
def arc2() -> Any:
    return dataset_arc.load_tasks("arcagi2")


@pytest.fixture(scope="session")
def collator() -> Any:
    return batches.Collator(256 << 20)


def ids(tasks: Any) -> Any:
    return [task.task_id for task in tasks]


def grid(rows: Any, cols: Any, seed: Any = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 10, (rows, cols)).astype(np.uint8)


def make_task(task_id: Any, shapes: Any, tests: Any = ((3, 3),), seed: Any = 0) -> Any:
    """A task with random grids; shapes: one (input shape, output shape) a demonstration."""
    pairs = [
        dataset_arc.Pair(grid(a[0], a[1], seed + 2 * i), grid(b[0], b[1], seed + 2 * i + 1))
        for i, (a, b) in enumerate(shapes)
    ]
    queries = [
        dataset_arc.Pair(grid(a[0], a[1], seed + 91 + i), grid(a[0], a[1], seed + 71))
        for i, a in enumerate(tests)
    ]
    return dataset_arc.Task(task_id, tuple(pairs), tuple(queries))


def same_size(n: Any, *shapes: Any) -> Any:
    return [(shape, shape) for shape in (shapes * n)[:n]]


def small_tasks() -> Any:
    """Tasks of several kinds: same size, growing, shrinking, growing beyond the blind canvas."""
    return [
        make_task("grow", [((2, 2), (4, 4)), ((3, 3), (6, 6)), ((2, 3), (4, 6))], seed=10),
        make_task("huge", [((4, 4), (16, 16)), ((4, 4), (16, 16)), ((4, 4), (16, 16))], seed=20),
        make_task("same", same_size(4, (5, 6), (7, 4)), seed=30),
        make_task("crop", [((8, 8), (3, 3)), ((9, 7), (3, 3))], seed=40),
        make_task("six", same_size(6, (6, 6)), seed=50),
        make_task("two", [((3, 5), (12, 12)), ((3, 4), (3, 4))], seed=60),
    ]


def assert_same(a: Any, b: Any, but: Any = ()) -> None:
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


# ---------------------------------------------------------------- views


grids = st.builds(grid, st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
views = st.builds(
    batches.View,
    st.integers(0, 7),
    st.permutations(list(range(1, 10))).map(lambda p: (0, *p)),
)


@given(grids, views)
def test_views_are_invertible(g: Any, view: Any) -> None:
    shown = view.apply(g)
    assert shown.shape == (g.shape[::-1] if view.swaps_axes else g.shape)
    assert np.array_equal(view.invert(shown), g)
    assert np.array_equal(view.apply(view.invert(g)), g)
    assert np.array_equal(shown == 0, batches.View(view.dihedral).apply(g) == 0)


def test_eight_dihedrals_are_distinct_and_identity_changes_nothing() -> None:
    g = np.arange(6, dtype=np.uint8).reshape(2, 3)
    seen = {(v.shape, v.tobytes()) for v in (batches.View(d).apply(g) for d in range(8))}
    assert len(seen) == 8
    assert np.array_equal(batches.View().apply(g), g)
    assert batches.View(1).apply(g).tolist() == [[2, 5], [1, 4], [0, 3]]
    assert batches.View(4).apply(g).tolist() == g.T.tolist()


@pytest.mark.parametrize(
    ("dihedral", "colours"), [(8, range(10)), (0, (1, 0, *range(2, 10))), (0, (0,) * 10), (0, ())]
)
def test_view_refuses_nonsense(dihedral: Any, colours: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        batches.View(dihedral, tuple(colours))


def test_evaluation_views() -> None:
    found = batches.evaluation_views(20, seed=3)
    assert found[0] == batches.View()
    assert len(set(found)) == 20
    assert [v.dihedral for v in found[:8]] == list(range(8))
    assert found == batches.evaluation_views(20, seed=3)
    assert found[:5] == batches.evaluation_views(5, seed=3)
    assert found[1:] != batches.evaluation_views(20, seed=4)[1:]
    with pytest.raises(ValueError, match="at least one"):
        batches.evaluation_views(0)


def test_random_views_depend_on_the_key_alone() -> None:
    np.random.seed(1)  # noqa: NPY002 - shows that global state has no part
    a = [batches.random_view(1, 2, k) for k in range(50)]
    assert a == [batches.random_view(1, 2, k) for k in range(50)]
    assert {view.dihedral for view in a} == set(range(8))
    assert len(set(a)) == 50
    assert batches.random_view(1, 2, 0) != batches.random_view(2, 1, 0)


# ---------------------------------------------------------------- the training stream


@pytest.fixture(scope="module")
def stream(collator: Any) -> Any:
    return batches.TrainingStream(small_tasks(), 7, 8, collator=collator)


def global_state() -> bytes:
    """NumPy's own, which nothing may draw from."""
    state = np.random.get_state()  # noqa: NPY002
    assert isinstance(state, tuple)
    return state[1].tobytes()


def test_stream_is_a_pure_function(stream: Any) -> None:
    again = batches.TrainingStream(small_tasks(), 7, 8, collator=batches.Collator(0))
    state = global_state()
    torch_state = torch.get_rng_state()
    for position in reversed(range(stream.n_batches(3))):
        for a, b in zip(stream.batch(3, position), again.batch(3, position), strict=True):
            assert_same(a, b)
    assert global_state() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_epochs_and_seeds_differ(stream: Any) -> None:
    def content(s: Any, epoch: Any) -> Any:
        return [(b.pair_ids, b.views) for b, _ in s.epoch(epoch)]

    other = batches.TrainingStream(small_tasks(), 8, 8, collator=stream.collator)
    assert content(stream, 0) != content(stream, 1)
    assert content(stream, 0) != content(other, 0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(0, 99),
    st.integers(0, 3),
)
def test_every_demonstration_is_asked_once_an_epoch(
    counts: Any, batch_size: Any, seed: Any, epoch: Any
) -> None:
    tasks = [make_task(f"t{i}", same_size(n, (2, 3)), seed=i) for i, n in enumerate(counts)]
    s = batches.TrainingStream(tasks, seed, batch_size)
    asked: list[Any] = []
    for position in range(s.n_batches(epoch)):
        got = s.pair_ids(epoch, position)
        assert len(got) <= batch_size or len({task_id for task_id, _, _ in got}) == 1
        asked += got
    wanted = [(f"t{i}", "train", k) for i, n in enumerate(counts) if n > 1 for k in range(n)]
    assert sorted(asked) == sorted(wanted)
    assert s.n_pairs == len(wanted)


def test_context_is_the_other_demonstrations(stream: Any) -> None:
    pairs = {t.task_id: t.demonstrations for t in stream.tasks}
    n_contexts = set()
    for epoch in range(3):
        for batch, targets in stream.epoch(epoch):
            rows: dict[int, list[int]] = {}
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


def test_skips_and_options(collator: Any) -> None:
    tasks = [
        make_task("one", same_size(1, (3, 3))),
        make_task("big", [((3, 3), (3, 3)), ((3, 3), (11, 3))]),
        make_task("ok", same_size(3, (4, 5))),
    ]
    s = batches.TrainingStream(tasks, 0, 4, max_side=10, max_context=1, collator=collator)
    assert (s.n_skipped_single, s.n_skipped_large, ids(s.tasks)) == (1, 1, ["ok"])
    batch, _ = s.batch(0, 0)
    assert set(batch.query_sources.shape[2:]) == {4, 5}  # perhaps turned
    assert batch.context.shape == (3, 1)
    assert batch.task_index.tolist() == [2, 2, 2]
    assert s.task_table == {"one": 0, "big": 1, "ok": 2}
    unseen = batches.TrainingStream(tasks, 0, 4, task_table={}, collator=collator)
    assert unseen.batch(0, 0)[0].task_index.tolist()[0] == -1
    plain = batches.TrainingStream(tasks, 0, 4, augment=False, collator=collator)
    assert set(plain.batch(0, 0)[0].views) == {batches.View()}
    with pytest.raises(IndexError, match="position 99"):
        s.batch(0, 99)
    with pytest.raises(ValueError, match="batch_size"):
        batches.TrainingStream(tasks, 0, 0)
    with pytest.raises(ValueError, match="seed"):
        batches.TrainingStream(tasks, -1, 4)


def test_task_weights() -> None:
    tasks = [make_task(f"t{i}", same_size(2, (2, 2)), seed=i) for i in range(3)]
    s = batches.TrainingStream(tasks, 0, 2, task_weights={"t0": 0.0, "t1": 2.5})
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
        batches.TrainingStream(tasks, 0, 2, task_weights=lambda task: -1)


def test_overflow_queries_fit_in_their_own_batches(stream: Any) -> None:
    fits: dict[Any, Any] = {}
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
    quiet = batches.TrainingStream(small_tasks(), 7, 8, overflow=False, collator=stream.collator)
    assert quiet.n_batches(0) == stream.n_batches(0) - sum(
        len(b.pair_ids) == b.n_tasks for b, _ in stream.epoch(0)
    )


# ---------------------------------------------------------------- honesty


def fake_analysis(g: Any) -> Any:
    return gf.GridAnalysis(
        planes=np.full((N_SOURCES, 30, 30), OUTSIDE, np.uint8),
        sizes=np.zeros((N_SOURCES, 2), np.uint8),
        cells=np.zeros((gf.N_CELL_FEATURES, *g.shape), np.uint8),
        size_values=np.zeros((2, gf.N_SIZE_RULES), np.uint8),
        background=0,
    )


def test_no_test_pair_in_the_stream_of_all_tasks(
    arc2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which pairs are in a batch does not hang on the features, so the quick fake will do.
    monkeypatch.setattr(gf, "analyse", fake_analysis)
    monkeypatch.setattr(gf, "control_features", lambda *_: np.zeros(gf.N_CONTROL, np.float32))
    tests = {c for task in arc2.train for c in dataset_arc._contents(task.tests)}
    test_inputs = {c[:2] for c in tests}
    demos = {c for task in arc2.train for c in dataset_arc._contents(task.demonstrations)}
    demo_inputs = {c[:2] for c in demos}
    assert len(tests) == 1076
    s = batches.TrainingStream(arc2.train, 0, 32, collator=batches.Collator(0))
    asked = set()
    for batch, targets in s.epoch(0):
        for q, view in enumerate(batch.views):
            h, w = batch.query_input_size[q].tolist()
            shown = view.invert(batch.query_input[q, :h, :w].numpy())
            h, w = targets.size[q].tolist()
            wanted = view.invert(targets.output[q, :h, :w].numpy())
            key = dataset_arc._content(dataset_arc.Pair(shown, wanted))
            asked.add(key)
            for c in batch.context[q].tolist():
                if c >= 0:
                    h, w = batch.demo_input_size[c].tolist()
                    seen = view.invert(batch.demo_input[c, :h, :w].numpy())
                    assert (seen.shape, seen.tobytes()) in demo_inputs
    assert asked == demos
    assert not asked & tests
    assert not {key[:2] for key in asked} & (test_inputs - demo_inputs)


def test_test_outputs_have_no_part_in_training(arc2: Any, collator: Any) -> None:
    tasks = [t for t in arc2.train if max(p.input.size for p in t.demonstrations) < 60][:30]
    noisy = [
        replace(
            t, tests=tuple(dataset_arc.Pair(p.input, grid(9, 4, k)) for k, p in enumerate(t.tests))
        )
        for t in tasks
    ]
    blank = [t.without_test_outputs() for t in tasks]
    streams = [batches.TrainingStream(t, 5, 16, collator=collator) for t in (tasks, noisy, blank)]
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
DEMO_FIELDS = tuple(
    f.name for f in fields(batches.Batch) if f.name.startswith("demo_") and f.type == "torch.Tensor"
)


def rows_of(stream: Any, epoch: Any, key: Any) -> Any:
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
        rooms = batch.demo_rooms, batch.most_seen
        out.append((shown, shape, rooms, batch.pair_ids, batch.views, batch.n_tasks))
    return out


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 2),
)
def test_own_output_reaches_nothing_of_its_query(
    collator: Any, which: Any, number: Any, rows: Any, cols: Any, epoch: Any
) -> None:
    tasks = small_tasks()
    task = tasks[which]
    number %= len(task.demonstrations)
    pairs = list(task.demonstrations)
    pairs[number] = dataset_arc.Pair(pairs[number].input, grid(rows, cols, seed=rows * 31 + cols))
    changed = [*tasks[:which], replace(task, demonstrations=tuple(pairs)), *tasks[which + 1 :]]
    key = (task.task_id, "train", number)
    first, second = (
        rows_of(batches.TrainingStream(t, 3, 8, collator=collator), epoch, key)
        for t in (tasks, changed)
    )
    assert len(first) == len(second) >= 1
    for a, b in zip(first, second, strict=True):
        assert a[1:] == b[1:]
        for name in a[0]:
            assert torch.equal(a[0][name], b[0][name]), name


def test_a_query_in_its_own_context_is_refused(collator: Any) -> None:
    task = small_tasks()[0]
    request = batches.Request(task, batches.View(), 0, (0, 1), (("train", 0),), ((0, 1),))
    with pytest.raises(ValueError, match="its own context"):
        collator.collate([request])


# ---------------------------------------------------------------- collation


def test_planes_are_those_of_the_viewed_grids(stream: Any) -> None:
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
            got = batch.size_candidates[q, :, : size_rules.N_INPUT_CANDIDATES].numpy()
            assert np.array_equal(got, sides)
            assert view == batch.views[q]


def test_control_features_are_those_of_the_viewed_pair(collator: Any) -> None:
    task = make_task("t", [((4, 5), (4, 5)), ((5, 5), (2, 3)), ((3, 4), (8, 8))], seed=3)
    view = batches.View(3, (0, 4, 3, 2, 1, 9, 8, 7, 6, 5))
    request = batches.Request(task, view, -1, (0, 1, 2), (("test", 0),), ((0, 1, 2),))
    batch = collator.collate([request])
    n_right = np.zeros((2, size_rules.N_INPUT_CANDIDATES), int)
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
        assert (batch.demo_sources[c, :, h:] == OUTSIDE).all()
        right = np.concatenate((analysis.sizes.T, analysis.size_values), 1) == [[h], [w]]
        n_right += right
    assert batch.demo_output.shape[1:] == batch.demo_sources.shape[2:] == (8, 8)
    support = batch.size_support[0, :, : size_rules.N_INPUT_CANDIDATES].numpy()
    assert np.allclose(support, n_right / 3)


def test_a_bare_grid_is_a_query_that_sees_no_demonstration() -> None:
    """Breaks: a size rule beside the input's own; a demonstration in sight; another canvas."""
    g = grid(3, 2)
    batch = batches.bare_batch(g.tolist(), 4, "cpu")
    analysis = gf.analyse(g)
    assert np.array_equal(batch.query_sources[0].numpy(), gf.place(analysis.planes, (3, 2)))
    assert np.array_equal(batch.query_cells[0].numpy(), analysis.cells)
    assert np.array_equal(batch.query_input[0].numpy(), g)
    assert batch.query_canvas.tolist() == batch.query_input_size.tolist() == [[3, 2]]
    assert batch.size_candidates.tolist() == [[[3, 0, 0, 0], [2, 0, 0, 0]]]
    assert not batch.size_support.any()
    assert batch.context.tolist() == [[-1]]
    assert batch.task_index.tolist() == [-1]
    for wrong in ([1, 2], np.zeros((31, 1)), np.zeros((1, 0))):
        with pytest.raises(ValueError, match=r"sides 1\.\.30"):
            batches.bare_batch(wrong, 4, "cpu")


def test_constants_and_dtypes(stream: Any) -> None:
    batch, targets = stream.batch(0, 0)
    assert (
        size_rules.N_SIZE_CANDIDATES
        == len(set(size_rules.SIZE_CANDIDATE_NAMES))
        == N_SOURCES + 32 + 7
    )
    n_q, n_c = len(batch.pair_ids), len(batch.demo_task)
    assert batch.n_queries == n_q
    assert batch.size_candidates.shape == (n_q, 2, size_rules.N_SIZE_CANDIDATES)
    assert batch.demo_control.shape == (n_c, gf.N_CONTROL)
    assert batch.query_sources.dtype == batch.demo_cells.dtype == torch.uint8
    assert batch.size_support.dtype == batch.demo_control.dtype == torch.float32
    assert batch.size_candidates.dtype == batch.context.dtype == targets.output.dtype == torch.long
    assert_same(batch.to("cpu", non_blocking=True), batch)
    assert_same(targets.to(torch.device("cpu")), targets)
    assert batch.to("meta").query_sources.is_meta
    whole = [b for b, _ in stream.epoch(0) if len(b.pair_ids) > b.n_tasks]
    assert all(len(b.demo_task) == len(b.pair_ids) for b in whole)


def rule(batch: Any, name: Any, values: Any = "size_candidates") -> Any:
    k = size_rules.SIZE_CANDIDATE_NAMES.index(f"demonstrations_{name}")
    return getattr(batch, values)[0, :, k].tolist()


def test_support_of_demonstration_rules_is_leave_one_out(collator: Any) -> None:
    def asked(shapes: Any, query: Any) -> Any:
        task = make_task("t", shapes, tests=(query,))
        numbers = tuple(range(len(shapes)))
        return collator.collate(
            [batches.Request(task, batches.View(), -1, numbers, (("test", 0),), (numbers,))]
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
    assert rule(batch, "ratio", "size_support") == [size_rules.UNCHECKED_SUPPORT] * 2
    assert batch.size_support.max() <= 1


def test_cache_is_bounded_and_changes_nothing() -> None:
    tiny = batches.Collator(40_000)
    roomy = batches.Collator()
    a = batches.TrainingStream(small_tasks(), 1, 8, collator=tiny)
    b = batches.TrainingStream(small_tasks(), 1, 8, collator=roomy)
    for position in range(a.n_batches(0)):
        assert_same(a.batch(0, position)[0], b.batch(0, position)[0])
        assert tiny._cache.n_bytes <= 40_000
    held = sum(size for size, _ in roomy._cache._items.values())
    assert roomy._cache.n_bytes == held > 40_000


# ---------------------------------------------------------------- evaluation


def test_evaluation_asks_every_test_input_once_a_view(collator: Any) -> None:
    tasks = [
        make_task(f"t{i}", same_size(3, (4, 5)), tests=((3, 3),) * i, seed=i) for i in (1, 2, 5)
    ]
    some = batches.evaluation_views(3)
    asked: list[Any] = []
    for batch in batches.evaluation_batches(
        tasks, some, 4, task_table={"t2": 9}, collator=collator
    ):
        assert len(batch.pair_ids) <= 4
        asked += zip(batch.views, batch.pair_ids, strict=True)
        for row, (task_id, _, _) in enumerate(batch.pair_ids):
            assert batch.task_index[row] == (9 if task_id == "t2" else -1)
    wanted = [(f"t{i}", "test", k) for i in (1, 2, 5) for k in range(i)]
    assert [view for view, _ in asked] == [view for view in some for _ in wanted]
    for view in some:
        assert sorted(key for v, key in asked if v == view) == wanted


def test_evaluation_does_not_read_test_outputs(arc2: Any, collator: Any) -> None:
    tasks = arc2.train[:12]
    noisy = [
        replace(t, tests=tuple(dataset_arc.Pair(p.input, grid(1, 1)) for p in t.tests))
        for t in tasks
    ]
    hidden = [t.without_test_outputs() for t in tasks]
    view = batches.evaluation_views(3)[2]
    found = [
        list(batches.evaluation_batches(t, view, collator=collator)) for t in (tasks, noisy, hidden)
    ]
    for first, *rest in zip(*found, strict=True):
        for other in rest:
            assert_same(first, other)
        targets = batches.evaluation_targets(tasks, first)
        for row, (task_id, _, number) in enumerate(first.pair_ids):
            output = next(t for t in tasks if t.task_id == task_id).tests[number].output
            h, w = targets.size[row].tolist()
            assert np.array_equal(view.invert(targets.output[row, :h, :w].numpy()), output)
        with pytest.raises(dataset_arc.DataError, match="cannot be scored"):
            batches.evaluation_targets(hidden, first)


def test_evaluation_context_is_limited_and_single_demonstrations_work(collator: Any) -> None:
    tasks = [make_task("nine", same_size(9, (3, 3))), make_task("one", same_size(1, (3, 3)))]
    (batch,) = batches.evaluation_batches(tasks, collator=collator)
    seen = dict(zip([key[0] for key in batch.pair_ids], (batch.context >= 0).sum(1), strict=True))
    assert seen == {"nine": 6, "one": 1}
    assert len(batch.demo_task) == 7


def test_identity_view_of_one_view(collator: Any) -> None:
    tasks = [make_task("a", same_size(2, (3, 4)))]
    default = list(batches.evaluation_batches(tasks, collator=collator))
    assert_same(
        default[0], next(batches.evaluation_batches(tasks, batches.View(), collator=collator))
    )


# ---------------------------------------------------------------- prefetching


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_prefetch_keeps_order(depth: Any) -> None:
    assert list(batches.prefetch(lambda k: k * k, range(20), depth)) == [k * k for k in range(20)]


def test_prefetch_raises_in_turn() -> None:
    def make(k: Any) -> Any:
        if k == 3:
            raise RuntimeError("third")
        return k

    found = batches.prefetch(make, range(10), 4)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="third"):
        next(found)


def test_prefetch_stops_with_its_reader() -> None:
    made = []
    found = batches.prefetch(lambda k: made.append(k), range(1000), 2)
    next(found)
    found.close()
    assert len(made) <= 4
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetched_batches_are_the_same(stream: Any) -> None:
    plain = list(stream.epoch(0))
    ahead = batches.prefetch(lambda p: stream.batch(0, p), range(stream.n_batches(0)))
    for (a, x), (b, y) in zip(plain, ahead, strict=True):
        assert_same(a, b)
        assert_same(x, y)


# ---------------------------------------------------------------- proposals


class Offers:
    """Proposes, per demonstration, its own output and grids that say which demonstration it is."""

    def __init__(self, extra: Any = (), none: Any = ()) -> None:
        self.asked: list[Any] = []
        self.extra, self.none = extra, none

    def ask(self, tasks: Any) -> None:
        self.asked.append([t.task_id for t in tasks])

    def leave_one_out(self, task: Any) -> Any:
        return [
            None if i in self.none else self.offer(p.output, *self.extra)
            for i, p in enumerate(task.demonstrations)
        ]

    def offer(self, *grids: Any) -> Any:
        facts = np.zeros((len(grids), N_PROPOSAL_FACTS), np.float32)
        facts[:, 0] = [g.sum() + 1 for g in grids]
        return Proposals(tuple(grids), facts)


def shown(batch: Any, q: Any, a: Any) -> Any:
    """A proposal of a batch in the task's own colours and orientation."""
    rows, cols = batch.proposed_size[q, a].tolist()
    canvas = batch.proposed[q, a].numpy()
    assert (canvas[rows:] == OUTSIDE).all()
    assert (canvas[:, cols:] == OUTSIDE).all()
    return batch.views[q].invert(canvas[:rows, :cols])


def test_proposals_are_shown_in_the_batch_s_view(collator: Any) -> None:
    """Breaks: the view (dihedral or colours) not applied; another query's proposals or facts."""
    tasks = small_tasks()
    stream = batches.TrainingStream(tasks, 0, 6, collator=collator, proposals=Offers())
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


def test_some_queries_of_a_batch_are_selected_with_all_that_is_theirs(collator: Any) -> None:
    """Breaks: a field of the queries left whole, or in another order; demonstrations cut."""
    stream = batches.TrainingStream(small_tasks(), 0, 8, collator=collator, proposals=Offers())
    batch = next(b for b, _ in stream.epoch(0) if b.n_queries > 4)
    rows = torch.tensor([3, 0])
    some = batch.select(rows)
    assert some.n_queries == 2
    assert some.pair_ids == some.views == []
    theirs = (*QUERY_FIELDS, "proposed", "proposed_size", "proposed_facts")
    for name in theirs:
        assert torch.equal(getattr(some, name), getattr(batch, name)[rows]), name
    assert_same(some, batch, but=(*theirs, "pair_ids", "views"))


def test_what_a_training_canvas_cannot_hold_is_left_out(collator: Any) -> None:
    """Breaks: a proposal cut to the canvas, or one that stretches it (the canvas would tell)."""
    tasks = small_tasks()
    large = np.ones((30, 30), np.uint8)
    plain = batches.TrainingStream(tasks, 0, 6, collator=collator)
    offering = batches.TrainingStream(tasks, 0, 6, collator=collator, proposals=Offers((large,)))
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
        assert (b.proposed[:, 1][gone] == OUTSIDE).all()
        assert (b.proposed_facts[:, 1][gone] == 0).all()
        assert (b.proposed_size[:, 0] > 0).all() or not tb.fits.all()
    assert n_left_out > 5


def test_queries_without_proposals_have_none(collator: Any) -> None:
    """Breaks: None of one query taken for the next one's."""
    tasks = small_tasks()
    stream = batches.TrainingStream(tasks, 0, 6, collator=collator, proposals=Offers(none=(1,)))
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


def test_proposals_are_asked_for_before_their_turn(collator: Any) -> None:
    """Breaks: training waits for each batch's proposals in turn."""
    tasks = small_tasks()
    offers = Offers()
    stream = batches.TrainingStream(tasks, 0, 3, collator=collator, proposals=offers)
    stream.batch(0, 0)
    ids = [p[0] for i in range(min(5, stream.n_batches(0))) for p in stream.pair_ids(0, i)]
    assert list(dict.fromkeys(offers.asked[0])) == list(dict.fromkeys(ids))
    assert len(set(ids)) > 1


def test_the_canvas_of_an_evaluation_grows_with_its_proposals(collator: Any) -> None:
    """Breaks: large proposals cut or left out at prediction; a proposal under another query's
    number, in another view."""
    tasks = [make_task("t", same_size(2, (3, 4), (4, 3)), tests=((3, 3), (4, 4)))]
    large = np.arange(9 * 12, dtype=np.uint8).reshape(9, 12) % 10
    small = grid(2, 2, seed=5)
    offers = {("t", 1): Offers().offer(large, small)}
    for view in batches.evaluation_views(8):
        (batch,) = batches.evaluation_batches(tasks, view, proposals=offers, collator=collator)
        assert batch.proposed.shape[:2] == (2, 2)
        assert sorted(batch.proposed.shape[2:]) == sorted(batch.query_sources.shape[2:])
        assert batch.proposed_size[0].tolist() == [[0, 0], [0, 0]]
        assert np.array_equal(shown(batch, 1, 0), large)
        assert np.array_equal(shown(batch, 1, 1), small)
        facts = batch.proposed_facts[1, :, 0].tolist()
        assert facts == [large.sum() + 1, small.sum() + 1]
        assert batch.query_canvas.max() <= 8  # the bound of the agent's own size stays
    (none,) = batches.evaluation_batches(tasks, collator=collator)
    assert none.proposed.shape[1] == 0


# ---------------------------------------------------------------- how large evaluation batches are


def test_an_evaluation_batch_ends_where_the_next_task_would_pad_too_much(collator: Any) -> None:
    """Breaks: small grids on the canvas of large ones; a bound that another canvas is held to."""
    sides = (2, 2, 3, 9, 9)
    tasks = [
        make_task(f"t{i}", same_size(2, (side, side)), ((side, side),), seed=i)
        for i, side in enumerate(sides)
    ]

    def canvases(**bounds: Any) -> list[Any]:
        made = batches.evaluation_batches(tasks, batch_size=8, collator=collator, **bounds)
        return [(batch.n_queries, *batch.query_sources.shape[2:]) for batch in made]

    assert canvases() == canvases(padding=216) == [(5, 9, 9)]  # 4 * 81 - 3 * 9 - 81
    assert canvases(padding=215) == [(3, 3, 3), (2, 9, 9)]
    assert canvases(padding=10) == [(3, 3, 3), (2, 9, 9)]  # 3 * 9 - 2 * 4 - 9
    assert canvases(padding=9) == [(2, 2, 2), (1, 3, 3), (2, 9, 9)]
    assert canvases(batch_cells=27) == [(3, 3, 3), (1, 9, 9), (1, 9, 9)]
    assert canvases(batch_cells=26) == [(2, 2, 2), (1, 3, 3), (1, 9, 9), (1, 9, 9)]
