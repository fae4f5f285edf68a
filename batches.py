"""What a model sees: views, batches, leave-one-out training streams, evaluation batches.

A `Batch` is all a model may see and a `Targets` holds the answers; no function puts a query's own
output into a `Batch`. The module knows nothing of files or models, trains nothing, prints nothing
and draws no global random numbers: every order and view is a function of (seed, epoch, task).
`from batches import TrainingStream, evaluation_batches`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import repeat
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

import grid_features
from dataset_arc import DataError, Grid, Pair, Task
from grid_features import CELL_FEATURE_BINS, N_CELL_FEATURES, N_CONTROL
from grid_parts import COLOURS, MAX_SIDE, OUTSIDE
from grid_transforms import N_SOURCES
from hypotheses import N_PROPOSAL_FACTS, Proposals
from ranks import ALONE, Part, Ranks
from size_rules import (
    DEMONSTRATION_RULE_INDEX,
    N_INPUT_CANDIDATES,
    N_SIZE_CANDIDATES,
    UNCHECKED_SUPPORT,
    Ints,
    canvas_bound,
    demonstration_rules,
    input_capacity,
)

PairId = tuple[str, str, int]  # task id, "train" or "test", number counted from 0
T = TypeVar("T")
R = TypeVar("R")
M = TypeVar("M", bound="_Movable")

N_DIHEDRAL = 8
DEFAULT_CACHE_BYTES = 1 << 30  # all 3232 pairs in all 8 orientations take about 0.8 GB
_ASKED_AHEAD = 4  # batches whose proposals are asked for before their turn


# ---------------------------------------------------------------- views


# What a generator is for: the first part of its key.
_ORDER, _OVERFLOW_ORDER, _VIEW, _CONTEXT, _TIMES, _EVALUATION = range(1, 7)


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on its key of non-negative integers alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def generator_for(device: str, *key: int) -> torch.Generator:
    """The same on a device, for torch's functions."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device=device).manual_seed(seed)


def _turn(grid: NDArray[Any], dihedral: int) -> NDArray[Any]:
    return np.rot90(grid.T if dihedral >= 4 else grid, dihedral % 4)


@dataclass(frozen=True)
class View:
    """One dihedral transform and one colour permutation.

    dihedral: 0..7; 4..7 transpose first, then dihedral % 4 quarter turns anticlockwise.
    colours: the new colour of each colour, a permutation of 0..9 with colours[0] == 0.
    """

    dihedral: int = 0
    colours: tuple[int, ...] = tuple(range(COLOURS))

    def __post_init__(self) -> None:
        if self.dihedral not in range(N_DIHEDRAL):
            raise ValueError(f"dihedral {self.dihedral}: expected 0..{N_DIHEDRAL - 1}")
        if self.colours[:1] != (0,) or sorted(self.colours) != list(range(COLOURS)):
            raise ValueError(f"colours {self.colours}: expected a permutation of 0..9 that keeps 0")

    @property
    def swaps_axes(self) -> bool:
        """Whether rows become columns."""
        return (self.dihedral % 2 == 1) != (self.dihedral >= 4)

    @property
    def lut(self) -> Grid:
        """uint8 (10,): the new colour by colour."""
        return np.array(self.colours, np.uint8)

    def apply(self, grid: NDArray[np.integer]) -> Grid:
        """The grid (rows, cols) as the view shows it, uint8."""
        return np.ascontiguousarray(self.lut[_turn(grid, self.dihedral)])

    def invert(self, grid: NDArray[np.integer]) -> Grid:
        """The grid (rows, cols) whose view is given: invert(apply(grid)) == grid."""
        back = np.rot90(grid, -(self.dihedral % 4))
        if self.dihedral >= 4:
            back = back.T
        return np.ascontiguousarray(np.argsort(self.lut).astype(np.uint8)[back])


def _colour_permutation(rng: np.random.Generator) -> tuple[int, ...]:
    return (0, *(int(c) + 1 for c in rng.permutation(COLOURS - 1)))


def random_view(*key: int) -> View:
    """A view that depends on its key alone, for instance (seed, epoch, task number)."""
    rng = generator(*key)
    return View(int(rng.integers(N_DIHEDRAL)), _colour_permutation(rng))


def evaluation_views(n: int, seed: int = 0) -> list[View]:
    """n distinct views: the identity, the other dihedrals in turn, each with its own colours."""
    if n < 1:
        raise ValueError(f"n {n}: expected at least one view")
    out, known = [View()], {View()}
    rng = generator(_EVALUATION, seed)
    while len(out) < n:
        view = View(len(out) % N_DIHEDRAL, _colour_permutation(rng))
        if view not in known:
            known.add(view)
            out.append(view)
    return out


# ---------------------------------------------------------------- what a model gets


class _Movable:
    """Moves every tensor field of a dataclass."""

    def to(self: M, device: torch.device | str, non_blocking: bool = False) -> M:
        """A copy with all tensors on the device."""
        moved = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                value = value.to(device, non_blocking=non_blocking)
            moved[f.name] = value
        return type(self)(**moved)


@dataclass
class Batch(_Movable):
    """Everything a model may see of Q queries and C demonstrations; no query's own output.

    Sizes and canvases are (rows, cols). K = N_SOURCES, F = N_CELL_FEATURES, S = N_SIZE_CANDIDATES,
    M = longest context, A = most proposals of a query. Grids sit at the top left; outside them is
    -1 (long) or OUTSIDE (sources) or CELL_FEATURE_BINS (cells). All colours and orientations are
    those of the query's view, but for own_*. Fields named demo_* and own_* have a row a
    demonstration, all other tensors a row a query.
    """

    task_index: torch.Tensor  # (Q,) long: row of the run's task table, -1 = unseen task
    view_id: torch.Tensor  # (Q,) long: dihedral 0..7
    query_input: torch.Tensor  # (Q, Hi, Wi) long
    query_input_size: torch.Tensor  # (Q, 2) long
    query_sources: torch.Tensor  # (Q, K, Hc, Wc) uint8, within query_canvas
    query_cells: torch.Tensor  # (Q, F, Hc, Wc) uint8, within query_canvas and the input
    query_canvas: torch.Tensor  # (Q, 2) long: bound of the output, <= (Hc, Wc)
    size_candidates: torch.Tensor  # (Q, 2, S) long: output side by rule, 0 = none
    size_support: torch.Tensor  # (Q, 2, S) float32: share of the context the rule is right on
    demo_sources: torch.Tensor  # (C, K, Hd, Wd) uint8, within the demonstration's output
    demo_cells: torch.Tensor  # (C, F, Hd, Wd) uint8, within the output and the input
    demo_output: torch.Tensor  # (C, Hd, Wd) long, cut at (Hd, Wd) when larger
    demo_input: torch.Tensor  # (C, Hi2, Wi2) long
    demo_input_size: torch.Tensor  # (C, 2) long
    demo_output_size: torch.Tensor  # (C, 2) long: the whole output's
    own_input: torch.Tensor  # (C, Hi3, Wi3) long: in the task's own colours and orientation, whole
    own_output: torch.Tensor  # (C, Ho3, Wo3) long
    own_input_size: torch.Tensor  # (C, 2) long
    own_output_size: torch.Tensor  # (C, 2) long
    demo_control: torch.Tensor  # (C, N_CONTROL) float32
    demo_task: torch.Tensor  # (C,) long: task number within the batch
    query_task: torch.Tensor  # (Q,) long
    context: torch.Tensor  # (Q, M) long: rows of demo_* this query may see, -1 pad
    proposed: torch.Tensor  # (Q, A, Hc, Wc) uint8: proposed answers, OUTSIDE beyond them
    proposed_size: torch.Tensor  # (Q, A, 2) long, 0 = no proposal, or one beyond (Hc, Wc)
    proposed_facts: torch.Tensor  # (Q, A, N_PROPOSAL_FACTS) float32, 0 without a proposal
    n_tasks: int
    demo_rooms: list[tuple[int, int]]  # (rows, cols) that hold each demonstration's output, as cut
    most_seen: int  # cells of these rooms that a query's context has at most
    pair_ids: list[PairId] = field(default_factory=list)  # of the queries
    views: list[View] = field(default_factory=list)  # of the queries
    part: Part | None = None  # of a larger batch, where several processes train; None: it is whole

    @property
    def n_queries(self) -> int:
        return len(self.task_index)

    def select(self, queries: torch.Tensor) -> Batch:
        """The batch of these queries (n,) long alone, in this order; the demonstrations stay.

        `pair_ids` and `views` are empty: to select them here would wait for the device.
        """
        selected: dict[str, Any] = {"pair_ids": [], "views": []}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor) and not f.name.startswith(("demo_", "own_")):
                selected[f.name] = value[queries]
        return replace(self, **selected)


@dataclass
class Targets(_Movable):
    """The answers to a batch's queries, for losses and scores only.

    fits: the target lies within query_canvas, so that the model can write all of it.
    """

    output: torch.Tensor  # (Q, Ht, Wt) long, -1 pad
    size: torch.Tensor  # (Q, 2) long
    fits: torch.Tensor  # (Q,) bool


# ---------------------------------------------------------------- collation


@dataclass(frozen=True, eq=False)
class _Analysed:
    """An input's analysis, planes cut to what was asked for so far."""

    planes: Grid
    cells: Grid
    sides: NDArray[np.uint8]  # (2, N_INPUT_CANDIDATES)

    @property
    def nbytes(self) -> int:
        return self.planes.nbytes + self.cells.nbytes + self.sides.nbytes


@dataclass(frozen=True, eq=False)
class _Compared:
    """A demonstration's output against its own input's analysis."""

    control: NDArray[np.float32]  # (N_CONTROL,)
    right: NDArray[np.bool_]  # (2, N_INPUT_CANDIDATES)

    @property
    def nbytes(self) -> int:
        return self.control.nbytes + self.right.nbytes


class _Lru:
    """A thread-safe map bounded in bytes that forgets what was used longest ago."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._items: OrderedDict[Any, tuple[int, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            found = self._items.get(key)
            if found is None:
                return None
            self._items.move_to_end(key)
            return found[1]

    def put(self, key: Any, value: Any, n_bytes: int) -> None:
        with self._lock:
            old = self._items.pop(key, None)
            self.n_bytes += n_bytes - (old[0] if old else 0)
            self._items[key] = (n_bytes, value)
            while self.n_bytes > self.max_bytes and self._items:
                self.n_bytes -= self._items.popitem(last=False)[1][0]


@dataclass(frozen=True, eq=False)
class Request:
    """One task's part of a batch.

    demonstrations: numbers of those that enter the batch. queries: (kind, number), kind "train" or
    "test". contexts: per query, the demonstrations it may see, among `demonstrations`. proposals:
    per query, empty for none at all.
    """

    task: Task
    view: View
    task_index: int
    demonstrations: tuple[int, ...]
    queries: tuple[tuple[str, int], ...]
    contexts: tuple[tuple[int, ...], ...]
    proposals: tuple[Proposals | None, ...] = ()


def _pair_of(task: Task, kind: str, number: int) -> Pair:
    return (task.demonstrations if kind == "train" else task.tests)[number]


class Collator:
    """Turns requests into batches; keeps the analyses of grids, by content, within max_bytes.

    One collator may serve several streams and threads.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._cache = _Lru(max_bytes)

    def _analysed(self, grid: Grid, rows: int = 1, cols: int = 1) -> _Analysed:
        """The analysis of a turned grid, with planes of at least (rows, cols)."""
        key = (grid.shape, grid.tobytes())
        found: _Analysed | None = self._cache.get(key)
        if found is not None:
            have = found.planes.shape[1:]
            if have[0] >= rows and have[1] >= cols:
                return found
            rows, cols = max(rows, have[0]), max(cols, have[1])
        full = grid_features.analyse(grid)
        return self._keep(key, full, rows, cols)

    def _keep(self, key: Any, full: grid_features.GridAnalysis, rows: int, cols: int) -> _Analysed:
        room = input_capacity([full.cells.shape[1:]])
        planes = full.planes[:, : max(rows, room[0]), : max(cols, room[1])]
        sides = np.concatenate((full.sizes.T, full.size_values), 1)
        kept = _Analysed(np.ascontiguousarray(planes), full.cells, sides)
        self._cache.put(key, kept, kept.nbytes + len(key[1]))
        return kept

    def _compared(self, grid: Grid, output: Grid) -> _Compared:
        """How a turned demonstration's output relates to its input; blind to colour views."""
        key = (grid.shape, grid.tobytes(), output.shape, output.tobytes())
        found: _Compared | None = self._cache.get(key)
        if found is None:
            full = grid_features.analyse(grid)
            kept = self._keep(key[:2], full, *output.shape)
            found = _Compared(
                grid_features.control_features(full, grid, output),
                kept.sides == np.array(output.shape)[:, None],
            )
            self._cache.put(key, found, found.nbytes + len(key[1]) + len(key[3]))
        return found

    def collate(self, requests: Sequence[Request], canvas: tuple[int, int] | None = None) -> Batch:
        """The batch of Q queries and C demonstrations of some tasks; `Batch` gives its shapes.

        requests: tasks with their views, queries and contexts; Q and C are the sums over them.
        canvas: (rows, cols) of both the queries' and the demonstrations' planes; what is larger is
        cut, a proposed answer left out. None: as large as the bounds of the queries, proposed
        answers and the outputs of the demonstrations ask. Raises ValueError where there is no query
        or one is in its own context.
        """
        # Demonstrations (C) and queries (Q) in the order of the requests, turned as their view has
        # them. Colours are left for later: what is kept of a grid then serves every permutation.
        demos: list[tuple[Grid, Grid, _Compared, View, int]] = []  # the last: number of its request
        own: list[Pair] = []
        contexts: list[list[int]] = []
        inputs: list[Grid] = []
        query_of: list[tuple[Request, int]] = []
        pair_ids: list[PairId] = []
        offers: list[Proposals | None] = []
        for number, request in enumerate(requests):
            dihedral = request.view.dihedral
            row_of = {}
            for d in request.demonstrations:
                pair = request.task.demonstrations[d]
                assert pair.output is not None
                shown = np.ascontiguousarray(_turn(pair.input, dihedral))
                wanted = np.ascontiguousarray(_turn(pair.output, dihedral))
                row_of[d] = len(demos)
                own.append(pair)
                compared = self._compared(shown, wanted)
                demos.append((shown, wanted, compared, request.view, number))
            for (kind, i), seen in zip(request.queries, request.contexts, strict=True):
                if kind == "train" and i in seen:
                    raise ValueError(f"query train[{i}] must not be in its own context {seen}")
                contexts.append([row_of[d] for d in seen])
                pair = _pair_of(request.task, kind, i)
                inputs.append(np.ascontiguousarray(_turn(pair.input, dihedral)))
                query_of.append((request, number))
                pair_ids.append((request.task.task_id, kind, i))
            offers += request.proposals or (None,) * len(request.queries)
        if not inputs:
            raise ValueError("a batch needs at least one query")

        # Sizes, size rules and the bound of every query's output, from its input and the context
        # alone; context (Q, M) holds rows of demo_*.
        n_q, n_c = len(inputs), len(demos)
        longest = max(1, max(len(c) for c in contexts))
        context = np.full((n_q, longest), -1, np.int64)
        for q, rows_of in enumerate(contexts):
            context[q, : len(rows_of)] = rows_of
        demo_in: Ints = np.array([d[0].shape for d in demos], np.int64).reshape(n_c, 2)
        demo_out = np.array([d[1].shape for d in demos], np.int64).reshape(n_c, 2)
        query_in: Ints = np.array([g.shape for g in inputs], np.int64)
        candidates, support = self._size_rules(demos, context, demo_in, demo_out, inputs, query_in)
        bounds = np.empty((n_q, 2), np.int64)
        for q, rows_of in enumerate(contexts):
            bounds[q] = canvas_bound(candidates[q], support[q], demo_out[rows_of], query_in[q])

        # The planes' canvases: (hc, wc) of the queries, (hd, wd) of the demonstrations.
        room = bounds.max(0)
        for offer, (request, _) in zip(offers, query_of, strict=True):
            for grid in () if offer is None else offer.grids:
                room = np.maximum(room, _swapped((grid.shape[0], grid.shape[1]), request.view))
        if canvas is None:
            hc, wc = np.minimum(room, MAX_SIDE).tolist()
            hd, wd = demo_out.max(0, initial=1).tolist()
            rooms = [(rows, cols) for rows, cols in demo_out.tolist()]
        else:
            hc, wc = hd, wd = canvas
            rooms = [canvas] * n_c
        n_cells = [rows * cols for rows, cols in rooms]
        most_seen = max([1, *(sum(n_cells[c] for c in rows_of) for rows_of in contexts)])
        bounds = np.minimum(bounds, (hc, wc))

        # Queries: planes and features within the bound of the output, whole inputs. Cells beyond
        # keep the value that means outside; a view's table puts its colours in.
        query_sources = np.full((n_q, N_SOURCES, hc, wc), OUTSIDE, np.uint8)
        query_cells = np.full((n_q, N_CELL_FEATURES, hc, wc), CELL_FEATURE_BINS, np.uint8)
        query_input = np.full((n_q, *query_in.max(0).tolist()), -1, np.int64)
        for q, grid in enumerate(inputs):
            table = _table(query_of[q][0].view)
            h, w = (int(s) for s in bounds[q])
            found = self._analysed(grid, h, w)
            query_sources[q, :, :h, :w] = table[found.planes[:, :h, :w]]
            cells = found.cells[:, :h, :w]
            query_cells[q, :, : cells.shape[1], : cells.shape[2]] = cells
            query_input[q, : grid.shape[0], : grid.shape[1]] = table[grid]

        # Demonstrations: the same within their outputs, which are cut where they are larger.
        demo_sources = np.full((n_c, N_SOURCES, hd, wd), OUTSIDE, np.uint8)
        demo_cells = np.full((n_c, N_CELL_FEATURES, hd, wd), CELL_FEATURE_BINS, np.uint8)
        demo_output = np.full((n_c, hd, wd), -1, np.int64)
        demo_input = np.full((n_c, *demo_in.max(0, initial=1).tolist()), -1, np.int64)
        demo_control = np.zeros((n_c, N_CONTROL), np.float32)
        for c, (grid, output, compared, view, _) in enumerate(demos):
            table = _table(view)
            h, w = min(output.shape[0], hd), min(output.shape[1], wd)
            found = self._analysed(grid, h, w)
            demo_sources[c, :, :h, :w] = table[found.planes[:, :h, :w]]
            cells = found.cells[:, :h, :w]
            demo_cells[c, :, : cells.shape[1], : cells.shape[2]] = cells
            demo_output[c, :h, :w] = table[output[:h, :w]]
            demo_input[c, : grid.shape[0], : grid.shape[1]] = table[grid]
            demo_control[c] = compared.control

        # Proposed answers, in their queries' views; what is larger than the canvas is left out.
        n_offered = max((len(o.grids) for o in offers if o is not None), default=0)
        proposed = np.full((n_q, n_offered, hc, wc), OUTSIDE, np.uint8)
        proposed_size = np.zeros((n_q, n_offered, 2), np.int64)
        proposed_facts = np.zeros((n_q, n_offered, N_PROPOSAL_FACTS), np.float32)
        for q, offer in enumerate(offers):
            for a, grid in enumerate(() if offer is None else offer.grids):
                answer = query_of[q][0].view.apply(grid)
                h, w = answer.shape
                if h <= hc and w <= wc:
                    assert offer is not None
                    proposed[q, a, :h, :w] = answer
                    proposed_size[q, a] = h, w
                    proposed_facts[q, a] = offer.facts[a]

        def long(values: Any) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, np.int64))

        # The pairs as their tasks have them, in no view: what readings of them are kept by.
        own_input, own_input_size = _padded([pair.input for pair in own])
        own_output, own_output_size = _padded([p.output for p in own if p.output is not None])
        return Batch(
            task_index=long([r.task_index for r, _ in query_of]),
            view_id=long([r.view.dihedral for r, _ in query_of]),
            query_input=long(query_input),
            query_input_size=long(query_in),
            query_sources=torch.from_numpy(query_sources),
            query_cells=torch.from_numpy(query_cells),
            query_canvas=long(bounds),
            size_candidates=long(candidates),
            size_support=torch.from_numpy(support),
            demo_sources=torch.from_numpy(demo_sources),
            demo_cells=torch.from_numpy(demo_cells),
            demo_output=long(demo_output),
            demo_input=long(demo_input),
            demo_input_size=long(demo_in),
            demo_output_size=long(demo_out),
            own_input=own_input,
            own_output=own_output,
            own_input_size=own_input_size,
            own_output_size=own_output_size,
            demo_control=torch.from_numpy(demo_control),
            demo_task=long([d[4] for d in demos]),
            query_task=long([number for _, number in query_of]),
            context=long(context),
            proposed=torch.from_numpy(proposed),
            proposed_size=long(proposed_size),
            proposed_facts=torch.from_numpy(proposed_facts),
            n_tasks=len(requests),
            demo_rooms=rooms,
            most_seen=most_seen,
            pair_ids=pair_ids,
            views=[r.view for r, _ in query_of],
        )

    def _size_rules(
        self,
        demos: list[tuple[Grid, Grid, _Compared, View, int]],
        context: Ints,
        demo_in: Ints,
        demo_out: Ints,
        inputs: list[Grid],
        query_in: Ints,
    ) -> tuple[Ints, NDArray[np.float32]]:
        """Candidates (Q, 2, S) and their support (Q, 2, S) from the context (Q, M) alone."""
        n_q, m = context.shape
        candidates = np.zeros((n_q, 2, N_SIZE_CANDIDATES), np.int64)
        support = np.zeros((n_q, 2, N_SIZE_CANDIDATES), np.float32)
        candidates[:, :, :N_INPUT_CANDIDATES] = np.stack([self._analysed(g).sides for g in inputs])
        known = context >= 0
        if not known.any():
            return candidates, support
        n_known = known.sum(1)
        right = np.stack([d[2].right for d in demos])[context]
        right &= known[:, :, None, None]
        share = right.sum(1, dtype=np.int64) / np.maximum(n_known, 1)[:, None, None]
        support[:, :, :N_INPUT_CANDIDATES] = share
        ins, outs = demo_in[context], demo_out[context]  # (Q, M, 2)
        mine = candidates[:, :, N_INPUT_CANDIDATES:]
        mine[:] = demonstration_rules(ins, outs, known, query_in)
        # each demonstration in turn as the query, the rest of the context as its demonstrations
        others = (known[:, None] & known[:, :, None] & ~np.eye(m, dtype=bool)).reshape(-1, m)
        again = demonstration_rules(
            np.repeat(ins, m, 0), np.repeat(outs, m, 0), others, ins.reshape(-1, 2)
        ).reshape(n_q, m, 2, -1)
        hits = ((again == outs[..., None]) & known[:, :, None, None]).sum(1, dtype=np.int64)
        checked = (hits / np.maximum(n_known, 1)[:, None, None]).astype(np.float32)
        guessed = np.where(mine > 0, np.float32(UNCHECKED_SUPPORT), np.float32(0))
        support[:, :, N_INPUT_CANDIDATES:] = np.where(
            (n_known == 1)[:, None, None], guessed, checked
        )
        return candidates, support


def bare_batch(input_grid: Any, n_candidates: int, device: torch.device | str) -> Batch:
    """A batch of one query that sees no demonstration, from a grid (H, W) of colours 0..9.

    n_candidates: rules of size that the agent knows; the first, the input's own size, is the only
    one here, without support. Raises ValueError where it is no grid of sides 1..30.
    """
    values = torch.as_tensor(input_grid).to("cpu", torch.uint8)
    shape = tuple(values.shape)
    if len(shape) != 2 or not all(1 <= side <= MAX_SIDE for side in shape):
        raise ValueError(f"a grid is (rows, cols) with sides 1..30, not {shape}")
    grid: Grid = values.numpy()
    # Its one demonstration, in no query's context, is the grid itself: no array is without a row.
    task = Task("grid", (Pair(grid, grid),), (Pair(grid, None),))
    batch = Collator(0).collate([Request(task, View(), -1, (0,), (("test", 0),), ((),))])
    candidates = torch.zeros(1, 2, n_candidates, dtype=torch.long)
    candidates[:, :, 0] = batch.query_input_size
    support = torch.zeros(1, 2, n_candidates)
    return replace(batch, size_candidates=candidates, size_support=support).to(device)


def _table(view: View) -> Grid:
    table = np.full(COLOURS + 1, OUTSIDE, np.uint8)
    table[:COLOURS] = view.colours
    return table


def _targets(outputs: Sequence[Grid], canvas: torch.Tensor) -> Targets:
    padded, size = _padded(outputs)
    return Targets(padded, size, (size <= canvas.cpu()).all(1))


def _padded(grids: Sequence[Grid]) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids at the top left of one canvas, (N, rows, cols) long, -1 outside, and sizes (N, 2)."""
    sizes: Ints = np.array([g.shape for g in grids], np.int64).reshape(-1, 2)
    padded = np.full((len(grids), *sizes.max(0, initial=1).tolist()), -1, np.int64)
    for i, grid in enumerate(grids):
        padded[i, : grid.shape[0], : grid.shape[1]] = grid
    return torch.from_numpy(padded), torch.from_numpy(sizes)


# ---------------------------------------------------------------- training


class Proposer(Protocol):
    """Who proposes answers to demonstrations; results are a pure function of the task."""

    def ask(self, tasks: Sequence[Task]) -> None:
        """These will be wanted soon, in this order."""

    def leave_one_out(self, task: Task) -> Sequence[Proposals | None]:
        """Per demonstration, answers proposed from the others alone; waits for them."""


class TrainingStream:
    """Leave-one-out batches of whole tasks: each demonstration is a query in turn.

    `batch(epoch, position)` is a pure function of the tasks' demonstrations, the options, the seed,
    epoch and position; test pairs are never looked at. A query's context is at most max_context of
    its task's other demonstrations.

    Nothing a query meets depends on its own output, padding included: canvases, buckets and order
    come from the sizes of inputs (`input_capacity`). Where the other demonstrations call for a
    larger canvas, the query is asked again in an *overflow batch*, which has at most one query a
    task, so that no other query's context can bring the output in; in its whole-task batch its
    `Targets.fits` is False when its output is cut.

    tasks: training tasks; those with one demonstration are skipped (n_skipped_single), as are those
    with a demonstration above max_side (n_skipped_large). batch_size: queries a batch at most; a
    larger task is a batch of its own. batch_cells: cells of its queries' canvases a batch at most
    (of its largest canvas, for each query), a task beyond it a batch of its own; None: no bound.
    task_weights: how often a task appears in an epoch on average
    (default 1), by task id or by a function of the task. task_table: task id -> task_index, by
    default the given order of all tasks, skipped ones included. ranks: where several processes
    train, `batch` gives this one's part of the batch: whole tasks, on the canvas of all.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        seed: int,
        batch_size: int,
        *,
        batch_cells: int | None = None,
        max_context: int = 4,
        max_side: int | None = None,
        task_weights: Mapping[str, float] | Callable[[Task], float] | None = None,
        task_table: Mapping[str, int] | None = None,
        overflow: bool = True,
        augment: bool = True,
        collator: Collator | None = None,
        proposals: Proposer | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if batch_size < 1 or max_context < 1:
            raise ValueError("batch_size and max_context must be at least 1")
        if seed < 0:
            raise ValueError(f"seed {seed}: must not be negative")
        self.seed = seed
        self.batch_size = batch_size
        self.batch_cells = batch_cells
        self.max_context = max_context
        self.overflow = overflow
        self.augment = augment
        self.collator = collator or Collator()
        self.proposals = proposals
        self.ranks = ranks
        if task_table is None:
            task_table = {task.task_id: i for i, task in enumerate(tasks)}
        self.task_table = task_table
        self.n_skipped_single = self.n_skipped_large = 0
        self.tasks: list[Task] = []
        for task in tasks:
            if len(task.demonstrations) < 2:
                self.n_skipped_single += 1
            elif max_side is not None and longest_side(task) > max_side:
                self.n_skipped_large += 1
            else:
                self.tasks.append(replace(task, tests=()))
        self._indices = [task_table.get(task.task_id, -1) for task in self.tasks]
        self._capacities = [
            input_capacity([p.input.shape for p in task.demonstrations]) for task in self.tasks
        ]
        self._weights = [_weight(task, task_weights) for task in self.tasks]
        self._overflowing = [
            _overflowing(task, capacity)
            for task, capacity in zip(self.tasks, self._capacities, strict=True)
        ]
        self._plans: OrderedDict[int, list[_Planned]] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"TrainingStream({len(self.tasks)} tasks, {self.n_pairs} pairs, seed={self.seed})"

    @property
    def n_pairs(self) -> int:
        """Demonstration pairs of the tasks trained on."""
        return sum(len(task.demonstrations) for task in self.tasks)

    def n_batches(self, epoch: int) -> int:
        return len(self._plan(epoch))

    def batch(self, epoch: int, position: int) -> tuple[Batch, Targets]:
        """The batch at a position (0 .. n_batches - 1) of an epoch, and its targets."""
        plan = self._plan(epoch)
        if not 0 <= position < len(plan):
            raise IndexError(f"position {position}: epoch {epoch} has {len(plan)} batches")
        planned = plan[position]
        if self.proposals is not None:
            soon = plan[position : position + 1 + _ASKED_AHEAD]
            self.proposals.ask([self.tasks[t] for coming in soon for t, _ in self._mine(coming)])
        requests = [self._request(epoch, planned, *member) for member in self._mine(planned)]
        canvas = None
        if planned.query is None:
            views = [request.view for request in requests]
            if self.ranks.many:
                views = [self._view(epoch, *member) for member in planned.members]
            shapes = [
                _swapped(self._capacities[task], view)
                for (task, _), view in zip(planned.members, views, strict=True)
            ]
            rows, cols = (max(s) for s in zip(*shapes, strict=True))
            canvas = (rows, cols)
        batch = self.collator.collate(requests, canvas)
        batch.part = self._part(planned)
        return batch, train_targets(requests, batch)

    def load(self, epoch: int, position: int) -> Load:
        """How large a batch is, without building it; the canvas of an overflow batch may be larger,
        where a size rule asks for more than the other demonstrations have."""
        planned = self._plan(epoch)[position]
        n_queries, sides, lengths = 0, (1, 1), []
        for task, time in planned.members:
            pairs = self.tasks[task].demonstrations
            n_queries += len(self._asked(task, planned.query))
            grids = [(p.input.shape, p.output.shape) for p in pairs if p.output is not None]
            lengths += [2 + sum(rows * (cols + 1) for rows, cols in both) for both in grids]
            room = self._capacities[task]
            if planned.query is not None:
                rest = grids[: planned.query] + grids[planned.query + 1 :]
                room = tuple(max(room[a], *(o[a] for _, o in rest)) for a in (0, 1))
            rows, cols = _swapped(room, self._view(epoch, task, time))
            sides = max(sides[0], rows), max(sides[1], cols)
        return Load(n_queries, n_queries * sides[0] * sides[1], tuple(lengths))

    def _part(self, planned: _Planned) -> Part | None:
        """This process's part of a batch; None where it has all of it."""
        if not self.ranks.many:
            return None
        sizes, partners = [], []
        for task, _ in planned.members:
            n = len(self.tasks[task].demonstrations)
            n_shown = n if planned.query is None else min(n - 1, self.max_context)
            sizes.append(len(self._asked(task, planned.query)))
            partners.append(n_shown if n_shown > 1 else 0)
        return self.ranks.part(sizes, partners)

    def _mine(self, planned: _Planned) -> Sequence[tuple[int, int]]:
        """The members of a batch that this process works on."""
        part = self._part(planned)
        return planned.members if part is None else planned.members[part.tasks]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Batch, Targets]]:
        """The batches of an epoch from a position on."""
        for position in range(start, self.n_batches(epoch)):
            yield self.batch(epoch, position)

    def pair_ids(self, epoch: int, position: int) -> list[PairId]:
        """The queries of a batch, without building it."""
        planned = self._plan(epoch)[position]
        return [
            (self.tasks[t].task_id, "train", i)
            for t, _ in planned.members
            for i in self._asked(t, planned.query)
        ]

    def _asked(self, task: int, query: int | None) -> Sequence[int]:
        return range(len(self.tasks[task].demonstrations)) if query is None else (query,)

    def _view(self, epoch: int, task: int, time: int) -> View:
        if not self.augment:
            return View()
        return random_view(_VIEW, self.seed, epoch, task, time)

    def _request(self, epoch: int, planned: _Planned, task: int, time: int) -> Request:
        n = len(self.tasks[task].demonstrations)
        asked = self._asked(task, planned.query)
        contexts = []
        for i in asked:
            others = [d for d in range(n) if d != i]
            if len(others) > self.max_context:
                rng = generator(_CONTEXT, self.seed, epoch, task, time, i)
                others = sorted(rng.choice(others, self.max_context, replace=False).tolist())
            contexts.append(tuple(others))
        offered = self.proposals.leave_one_out(self.tasks[task]) if self.proposals else ()
        return Request(
            task=self.tasks[task],
            view=self._view(epoch, task, time),
            task_index=self._indices[task],
            demonstrations=tuple(range(n)) if planned.query is None else contexts[0],
            queries=tuple(("train", i) for i in asked),
            contexts=tuple(contexts),
            proposals=tuple(offered[i] for i in asked) if offered else (),
        )

    def _plan(self, epoch: int) -> list[_Planned]:
        with self._lock:
            if epoch not in self._plans:
                self._plans[epoch] = self._make_plan(epoch)
                while len(self._plans) > 4:
                    self._plans.popitem(last=False)
            return self._plans[epoch]

    def _make_plan(self, epoch: int) -> list[_Planned]:
        """All batches of an epoch in order.

        Batches are ordered by random keys that no output has a part in; whether an overflow batch
        exists depends on outputs, but not on those of its own queries.
        """
        appearing = []
        for task, weight in enumerate(self._weights):
            times = int(weight)
            if weight > times:
                times += generator(_TIMES, self.seed, epoch, task).random() < weight - times
            appearing += [(task, time) for time in range(times)]
        rng = generator(_ORDER, self.seed, epoch)
        jitter = rng.random(len(appearing))
        size = {
            member: _swapped(self._capacities[member[0]], self._view(epoch, *member))
            for member in appearing
        }

        def bucket(k: int) -> tuple[int, float]:
            rows, cols = size[appearing[k]]
            return int(max(rows, cols) + 2 * jitter[k]), rows + jitter[k]

        order = sorted(range(len(appearing)), key=bucket)
        batches: list[list[tuple[int, int]]] = []
        filled, sides = self.batch_size, (0, 0)
        for k in order:
            n = len(self.tasks[appearing[k][0]].demonstrations)
            rows, cols = size[appearing[k]]
            wider = max(sides[0], rows), max(sides[1], cols)
            if filled + n > self.batch_size or self._exceeds(filled + n, wider):
                batches.append([])
                filled, wider = 0, (rows, cols)
            batches[-1].append(appearing[k])
            filled, sides = filled + n, wider
        keyed = [
            (key, _Planned(tuple(b)))
            for key, b in zip(rng.random(len(batches)), batches, strict=True)
        ]
        if self.overflow:
            keyed += self._overflow_plan(epoch, appearing)
        return [planned for _, planned in sorted(keyed, key=lambda item: item[0])]

    def _exceeds(self, n_queries: int, sides: tuple[int, int]) -> bool:
        """Whether so many queries on a canvas of (rows, cols) are beyond batch_cells."""
        return self.batch_cells is not None and n_queries * sides[0] * sides[1] > self.batch_cells

    def _overflow_plan(
        self, epoch: int, appearing: Sequence[tuple[int, int]]
    ) -> list[tuple[float, _Planned]]:
        rounds: dict[tuple[int, int], list[tuple[int, tuple[int, int]]]] = {}
        for task, time in appearing:
            for i, side in self._overflowing[task].items():
                rounds.setdefault((i, time), []).append((side, (task, time)))
        keyed = []
        for (i, time), asked in sorted(rounds.items()):
            members = [member for _, member in sorted(asked)]
            most = self.batch_size
            if self.batch_cells is not None:
                sides = [max(side, *self._capacities[member[0]]) for side, member in asked]
                most = min(most, max(1, self.batch_cells // max(sides) ** 2))
            for part, start in enumerate(range(0, len(members), most)):
                chunk = tuple(members[start : start + most])
                key = generator(_OVERFLOW_ORDER, self.seed, epoch, i, time, part).random()
                keyed.append((float(key), _Planned(chunk, i)))
        return keyed


@dataclass(frozen=True)
class Load:
    """What a training batch asks for: queries, the cells of their canvases, padding included, and
    the length of each of its demonstrations as text, in tokens."""

    n_queries: int
    n_cells: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class _Planned:
    """A batch to be: (task, appearance) members; query = the one asked, None = all."""

    members: tuple[tuple[int, int], ...]
    query: int | None = None


def _swapped(sides: tuple[int, int], view: View) -> tuple[int, int]:
    return sides[::-1] if view.swaps_axes else sides


def longest_side(task: Task) -> int:
    """The longest side of any grid among a task's demonstrations."""
    return max(
        max(g.shape) for p in task.demonstrations for g in (p.input, p.output) if g is not None
    )


def _overflowing(task: Task, capacity: tuple[int, int]) -> dict[int, int]:
    """Queries whose other demonstrations have outputs above the capacity -> their longest side."""
    shapes = [p.output.shape for p in task.demonstrations if p.output is not None]
    out = {}
    for i in range(len(shapes)):
        rest = shapes[:i] + shapes[i + 1 :]
        if any(rows > capacity[0] or cols > capacity[1] for rows, cols in rest):
            out[i] = max(max(shape) for shape in rest)
    return out


def _weight(task: Task, weights: Mapping[str, float] | Callable[[Task], float] | None) -> float:
    if weights is None:
        return 1.0
    value = weights(task) if callable(weights) else weights.get(task.task_id, 1.0)
    if not 0 <= value < float("inf"):
        raise ValueError(f"weight {value} of task {task.task_id}: must be finite and not negative")
    return float(value)


def train_targets(requests: Sequence[Request], batch: Batch) -> Targets:
    """The targets of a training batch: outputs of demonstrations only, in the batch's views."""
    outputs = []
    for request in requests:
        for kind, i in request.queries:
            if kind != "train":
                raise ValueError(f"{request.task.task_id} {kind}[{i}]: not a demonstration")
            output = request.task.demonstrations[i].output
            assert output is not None
            outputs.append(request.view.apply(output))
    return _targets(outputs, batch.query_canvas)


# ---------------------------------------------------------------- evaluation


def evaluation_requests(
    tasks: Sequence[Task],
    views: View | Sequence[View] | None = None,
    batch_size: int = 16,
    *,
    batch_cells: int | None = None,
    padding: int | None = None,
    max_context: int = 6,
    task_table: Mapping[str, int] | None = None,
    proposals: Mapping[tuple[str, int], Proposals] | None = None,
    turns: Iterator[bool] | None = None,
) -> Iterator[list[Request]]:
    """What `Collator.collate` makes batches of whose queries are the tasks' test inputs; test
    outputs are not read (may be None).

    The context is the first max_context demonstrations. Every view is gone through in turn, tasks
    ordered by the size that their inputs and demonstrations call for; a batch holds at most
    batch_size queries, and cells of the canvas that this asks for at most batch_cells (None: no
    bound); each task that would add more than `padding` cells which no query needs begins another
    batch (None: however many). task_table: task id -> task_index; without an entry a task is unseen
    (-1). proposals: by task id and number of the test input. turns: asked before each batch whether
    it is wanted; one that is not is left out.
    """
    wanted: Iterator[bool] = repeat(True) if turns is None else turns
    chosen = [View()] if views is None else [views] if isinstance(views, View) else list(views)
    if batch_size < 1 or max_context < 1:
        raise ValueError("batch_size and max_context must be at least 1")
    table = task_table or {}
    requests = []
    for task in tasks:
        context = tuple(range(min(max_context, len(task.demonstrations))))
        hidden = task.without_test_outputs()
        for start in range(0, len(task.tests), batch_size):
            numbers = range(start, min(start + batch_size, len(task.tests)))
            requests.append(
                Request(
                    task=hidden,
                    view=View(),
                    task_index=table.get(task.task_id, -1),
                    demonstrations=context,
                    queries=tuple(("test", i) for i in numbers),
                    contexts=(context,) * len(numbers),
                    proposals=tuple((proposals or {}).get((task.task_id, i)) for i in numbers),
                )
            )
    sides = [_likely_sides(request) for request in requests]
    for view in chosen:
        keyed = []
        for request, natural in zip(requests, sides, strict=True):
            rows, cols = _swapped(natural, view)
            key = (max(rows, cols), rows, cols, request.task.task_id, request.queries)
            keyed.append((key, replace(request, view=view)))
        pack: list[Request] = []
        filled, canvas = 0, (0, 0)
        for (_, rows, cols, *_), request in sorted(keyed, key=lambda item: item[0]):
            n = filled + len(request.queries)
            wide = max(canvas[0], rows), max(canvas[1], cols)
            cells = n * wide[0] * wide[1]
            needed = filled * canvas[0] * canvas[1] + len(request.queries) * rows * cols
            full = n > batch_size or (batch_cells is not None and cells > batch_cells)
            if pack and (full or (padding is not None and cells - needed > padding)):
                if next(wanted):
                    yield pack
                pack, filled, wide = [], 0, (rows, cols)
            pack.append(request)
            filled, canvas = filled + len(request.queries), wide
        if pack and bool(next(wanted)):
            yield pack


def evaluation_batches(
    tasks: Sequence[Task],
    views: View | Sequence[View] | None = None,
    batch_size: int = 16,
    *,
    collator: Collator | None = None,
    **options: Any,
) -> Iterator[Batch]:
    """The batches of `evaluation_requests`, which takes the options."""
    collator = collator or Collator()
    yield from map(collator.collate, evaluation_requests(tasks, views, batch_size, **options))


def _likely_sides(request: Request) -> tuple[int, int]:
    """(rows, cols) that the outputs will about have, for bucketing: from inputs and context."""
    pairs = [request.task.demonstrations[d] for d in request.demonstrations]
    outs = np.array([p.output.shape for p in pairs if p.output is not None], np.int64)[None]
    ins = np.array([p.input.shape for p in pairs], np.int64)[None]
    known = np.ones(ins.shape[:2], bool)
    unsteady = [DEMONSTRATION_RULE_INDEX[name] for name in ("modal", "maximum")]
    sides = []
    for kind, i in request.queries:
        own = np.array([_pair_of(request.task, kind, i).input.shape], np.int64)
        ruled = demonstration_rules(ins, outs, known, own)[0]
        steady = np.delete(ruled, unsteady, axis=1).max(1)
        sides.append(np.where(steady > 0, steady, np.maximum(own[0], outs[0].max(0))))
    rows, cols = np.max(sides, axis=0)
    return int(rows), int(cols)


def evaluation_targets(tasks: Iterable[Task], batch: Batch) -> Targets:
    """The targets of an evaluation batch, in the batch's views; for scoring only.

    Raises DataError where a test has no output.
    """
    known = {task.task_id: task for task in tasks}
    outputs = []
    for (task_id, kind, i), view in zip(batch.pair_ids, batch.views, strict=True):
        output = _pair_of(known[task_id], kind, i).output
        if output is None:
            raise DataError(f"task {task_id}, pair {kind}[{i}]: no output; it cannot be scored")
        outputs.append(view.apply(output))
    return _targets(outputs, batch.query_canvas)


# ---------------------------------------------------------------- prefetching


def prefetch(
    make: Callable[[T], R], positions: Iterable[T], depth: int = 2, threads: int = 1
) -> Generator[R, None, None]:
    """make(position) for each position in order, up to `depth` of them ahead, each in one of so
    many threads.

    An error in `make` is raised when its turn comes; closing the iterator waits for the calls under
    way. depth 0: no thread.
    """
    if depth <= 0:
        yield from map(make, positions)
        return
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        for position in positions:
            waiting.append(pool.submit(make, position))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
