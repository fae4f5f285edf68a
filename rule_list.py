"""Hypotheses: short lists of exact rules fitted to a query's demonstrations, and their verdict.

A *rule list* is a default pointer and up to six exceptions "fact (and fact) -> pointer"; a pointer
is a source of `grid_transforms`, `rule_objects` or `rule_drawings`, or a colour. Every exception is
right on every demonstration cell it touches (in `shadow` arms: that no earlier exception took). An
*arm* is one way of fitting, see `rule_arms`. A *verdict* says how many of the demonstrations the
same arm re-predicts exactly, own size included, each from the others.
The module never sees a query's output, learns nothing across tasks, prints nothing, draws no random
numbers and keeps nothing between calls, so calls may run in threads. NumPy alone. It fits in the
identity view; whoever wants other views maps the answers.
Use: `from rule_list import fit_task, leave_one_out`; `benchmarks/bench_hypotheses.py` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grid_features import (
    CELL_FEATURE_NAMES,
    SIZE_RULE_NAMES,
    GridAnalysis,
    analyse,
    analyse_planes,
)
from grid_parts import COLOURS, MAX_SIDE, OUTSIDE, Bools, Grid, Ints
from grid_transforms import N_SOURCES, SOURCE_NAMES
from rule_arms import ARMS, LIMITS, Arm, Group, Limits, groups_of
from rule_drawings import BANKS, DRAWN_SOURCES, drawn_bank
from rule_facts import ABSENT, POSITIONS, fact_table, placed, positions
from rule_objects import (
    COUNT_FACT_NAMES,
    OBJECT_FACT_NAMES,
    OBJECT_SOURCES,
    count_facts,
    object_bank,
)
from rule_search import RuleList, Space, Subset, Words, bytes_as_words, mixed
from size_rules import DEMONSTRATION_RULE_NAMES, UNCHECKED_SUPPORT, demonstration_rules

# ---------------------------------------------------------------- what is handed out


@dataclass(frozen=True)
class Verdict:
    """How an arm does on the demonstrations of a context, each predicted from the others.

    n_right of n_tried were exact, own size included; cells_frac is the mean share of right cells, 0
    where the size is wrong. A context of one demonstration tries none, nor does a list that leaves
    demonstration cells unexplained (see `Arm.always_tried`).
    """

    n_right: int
    n_tried: int
    cells_frac: float

    @property
    def full(self) -> bool:
        """Every demonstration was re-predicted from the others."""
        return 0 < self.n_tried == self.n_right

    @property
    def share(self) -> float:
        """n_right / n_tried, 0 where nothing could be tried."""
        return self.n_right / self.n_tried if self.n_tried else 0.0


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """One explanation of a context and its answer to the query.

    answer: uint8 (rows, cols), colours 0..9, at the size the hypothesis predicts.
    explains: the rules are right on every cell of every demonstration of the context.
    words: the rules, for instance "identity; where enclosure = 2: colour 4".
    size_rule: the name of what predicted the size.
    """

    arm: str
    answer: Grid
    verdict: Verdict
    explains: bool
    n_rules: int
    words: str
    size_rule: str


@dataclass(frozen=True, eq=False)
class Explained:
    """What one query got: hypotheses best first, and what was left out for size.

    context_cells: output cells of the context's demonstrations. capped_arms: the arms that were not
    run because of `Limits.max_cells` or `Arm.max_cells`.
    """

    hypotheses: tuple[Hypothesis, ...]
    context_cells: int
    capped_arms: tuple[str, ...]

    def attempts(self, n: int = 2) -> list[Grid]:
        """The n best different answers, best first; fewer where there are not that many."""
        chosen: list[Grid] = []
        for h in self.hypotheses:
            if len(chosen) < n and not any(np.array_equal(h.answer, a) for a in chosen):
                chosen.append(h.answer)
        return chosen


# ---------------------------------------------------------------- sizes

_SIZE_NAMES = tuple(
    [f"size of {name}" for name in SOURCE_NAMES]
    + list(SIZE_RULE_NAMES)
    + [f"demonstrations' {name}" for name in DEMONSTRATION_RULE_NAMES]
)


class _Sizes:
    """Predicts output sizes of one task's grids from subsets of its demonstrations."""

    def __init__(self, seen: Sequence[GridAnalysis], shapes: Ints, outs: Ints) -> None:
        self.n = len(outs)
        self.ins, self.outs = shapes, outs
        self.candidates = np.stack(
            [np.concatenate((a.sizes.T, a.size_values), 1).astype(np.int64) for a in seen]
        )  # (grids, 2, S)
        self.right = self.candidates[: self.n] == outs[:, :, None]
        self._by_demonstrations: dict[Subset, tuple[Ints, Bools]] = {}

    def _rules(self, subset: Subset) -> tuple[Ints, Bools]:
        """Sides by DEMONSTRATION_RULE_NAMES for every grid, and right ones on left-out pairs."""
        found = self._by_demonstrations.get(subset)
        if found is None:
            s = np.array(subset)
            grids, m = len(self.ins), len(s)
            problems = grids + m
            known = np.ones((problems, m), bool)
            known[grids:] = ~np.eye(m, dtype=bool)
            values = demonstration_rules(
                np.broadcast_to(self.ins[s], (problems, m, 2)),
                np.broadcast_to(self.outs[s], (problems, m, 2)),
                known,
                np.concatenate((self.ins, self.ins[s])),
            )
            right = values[grids:] == self.outs[s][:, :, None]
            found = self._by_demonstrations[subset] = (values[:grids], right)
        return found

    def predict(self, subset: Subset, grid: int) -> tuple[tuple[int, int], str]:
        """The size of a grid's output and the rule's name."""
        values, again = self._rules(subset)
        s = list(subset)
        right = np.concatenate((self.right[s], again), 2)  # (m, 2, S)
        mine = np.concatenate((self.candidates[grid], values[grid]), 1)  # (2, S)
        usable = mine > 0
        both: Bools = np.logical_and.reduce(usable, axis=0)
        joint = right.all(1).sum(0) * both.astype(np.float64)
        if len(s) == 1:  # a rule made from one pair is unchecked
            n_rules = len(DEMONSTRATION_RULE_NAMES)
            joint[-n_rules:] = UNCHECKED_SUPPORT * both[-n_rules:]
        weight = _SIZE_ORDER
        best = int((joint + weight).argmax())
        if joint[best] < len(s):
            each = right.sum(0) * usable
            full = (each == len(s)).any(1)
            if full.all():
                pick = (each + weight).argmax(1)
                return (int(mine[0, pick[0]]), int(mine[1, pick[1]])), (
                    f"{_SIZE_NAMES[pick[0]]} x {_SIZE_NAMES[pick[1]]}"
                )
        if joint[best] == 0:
            return (int(self.ins[grid, 0]), int(self.ins[grid, 1])), "no rule: the input's"
        return (int(mine[0, best]), int(mine[1, best])), _SIZE_NAMES[best]


# Among equally supported rules: earlier is better. A fraction below the worth of one pair.
_SIZE_ORDER = -np.arange(len(_SIZE_NAMES)) * 1e-4


# ---------------------------------------------------------------- a task

_KEPT_EXTRA = 40  # of a context's extra sources, those right most often (guess)
_EXTRA_SHARE = 0.6  # of the demonstration cells that an extra source must show


class _Problem:
    """One call's work on one task: analyses, spaces and fits, shared by contexts and arms."""

    def __init__(
        self,
        pairs: Sequence[tuple[Grid, Grid]],
        queries: Sequence[Grid],
        limits: Limits,
        depth: int,
    ) -> None:
        self.n, self.limits, self.depth = len(pairs), limits, depth
        self.grids = [np.asarray(i, np.uint8) for i, _ in pairs]
        self.grids += [np.asarray(q, np.uint8) for q in queries]
        self.outputs = [np.asarray(o, np.uint8) for _, o in pairs]
        self.seen = [analyse(g) for g in self.grids]
        self.sizes = _Sizes(
            self.seen,
            np.array([g.shape for g in self.grids], np.int64).reshape(-1, 2),
            np.array([o.shape for o in self.outputs], np.int64).reshape(-1, 2),
        )
        self.background = [a.background for a in self.seen]
        self._spaces: dict[Any, Space] = {}
        self._fits: dict[Any, RuleList] = {}
        self._groups: dict[tuple[int, Group], tuple[Grid, Grid]] = {}
        self._analysed: dict[bytes, GridAnalysis] = {}
        self._deep: dict[bytes, tuple[Grid, Grid]] = {}
        self._base: dict[tuple[int, tuple[int, int]], tuple[Grid, Grid]] = {}
        self._kept: dict[tuple[str, ...], _Extras] = {}
        self._objects: dict[int, tuple[Grid, Grid, Grid]] = {}
        for grid, analysis in zip(self.grids, self.seen, strict=True):
            self._deep[_key(grid)] = analysis.planes, analysis.sizes
            self._analysed[_key(grid)] = analysis
        self._shares: dict[Group, tuple[NDArray[np.float64], Words] | None] = {}

    # ---- extra sources

    def group(self, grid: int, group: Group) -> tuple[Grid, Grid]:
        key = (grid, group)
        if key not in self._groups:
            self._groups[key] = self._make(grid, group)
        return self._groups[key]

    def _make(self, grid: int, group: Group) -> tuple[Grid, Grid]:
        kind, k = group
        if kind == "objects":
            return self.objects(grid)[:2]
        if kind == "drawn":
            return drawn_bank(self.grids[grid])
        inner = _whole(self.seen[grid].planes[k])
        if inner is None:
            return _NOTHING
        key = _key(inner)
        if key not in self._deep:
            self._deep[key] = analyse_planes(inner)
        return self._deep[key]

    def analysed(self, grid: Grid) -> GridAnalysis:
        key = _key(grid)
        if key not in self._analysed:
            self._analysed[key] = analyse(grid)
        return self._analysed[key]

    def base(self, grid: int, shape: tuple[int, int]) -> tuple[Grid, Grid]:
        """Sources and cell features (n, cells) of a grid at a shape."""
        key = (grid, shape)
        if key not in self._base:
            a = self.seen[grid]
            self._base[key] = placed(a.planes, shape, OUTSIDE), placed(a.cells, shape, ABSENT)
        return self._base[key]

    def objects(self, grid: int) -> tuple[Grid, Grid, Grid]:
        if grid not in self._objects:
            self._objects[grid] = object_bank(self.grids[grid])
        return self._objects[grid]

    def _share(self, group: Group) -> tuple[NDArray[np.float64], Words] | None:
        """Per demonstration and source of a group: right cells, and a hash of what is shown.

        None where no source is right on enough cells of any subset; then the demonstrations after
        the first ones that show this were not looked at.
        """
        if group not in self._shares:
            cells = np.array([o.size for o in self.outputs], np.float64)
            member = np.array([[k in s for k in range(self.n)] for s in self._subsets()], float)
            enough = _EXTRA_SHARE * (member @ cells)
            order = np.argsort(-cells, kind="stable").tolist()
            right: dict[int, Ints] = {}
            hashes: dict[int, Words] = {}
            self._shares[group] = None
            for k in order:
                out = self.outputs[k]
                shown = placed(self.group(k, group)[0], out.shape, OUTSIDE)
                right[k] = (shown == out.ravel()).sum(1)
                hashes[k] = mixed(bytes_as_words(shown), k)
                seen = list(right)
                sure = member[:, seen] @ np.stack([right[j] for j in seen])  # (subsets, sources)
                most = sure + np.delete(member, seen, 1) @ np.delete(cells, seen)[:, None]
                if not (most >= enough[:, None] - 1e-6).any():
                    break
            else:
                everyone = range(self.n)
                self._shares[group] = (
                    np.array([right[k] for k in everyone], np.float64),
                    np.stack([hashes[k] for k in everyone]),
                )
        return self._shares[group]

    def _extras(self, names: tuple[str, ...]) -> _Extras:
        """The extra sources that any subset keeps, and which of them each keeps."""
        if names in self._kept:
            return self._kept[names]
        subsets = self._subsets()
        groups = groups_of(names)
        share, hashes, at = [], [], []
        for group in groups:
            found = self._share(group)
            if found is None:
                continue
            share.append(found[0])
            hashes.append(found[1])
            at += [(group, j) for j in range(found[0].shape[1])]
        cells = np.array([o.size for o in self.outputs], np.float64)
        base = np.stack(
            [mixed(bytes_as_words(self.base(k, o.shape)[0]), k) for k, o in enumerate(self.outputs)]
        )
        right = np.concatenate([np.zeros((self.n, 0)), *share], 1)
        shown = np.concatenate([base, *hashes], 1)
        kept: dict[Subset, Ints] = {}
        for subset in subsets:
            s = list(subset)
            with np.errstate(over="ignore"):
                seen = shown[s].sum(0, dtype=np.uint64)
            new = np.zeros(seen.size, bool)
            new[np.unique(seen, return_index=True)[1]] = True
            part = right[s].sum(0) / cells[s].sum()
            good = np.flatnonzero(new[N_SOURCES:] & (part >= _EXTRA_SHARE))
            kept[subset] = good[np.argsort(-part[good], kind="stable")[:_KEPT_EXTRA]]
        union = np.unique(np.concatenate([*kept.values()])) if kept else np.zeros(0, np.int64)
        self._kept[names] = _Extras(
            sources=[at[i] for i in union.tolist()],
            kept={subset: np.searchsorted(union, np.sort(k)) for subset, k in kept.items()},
        )
        return self._kept[names]

    # ---- spaces

    def space(self, arm: Arm, context: Subset, first: Mapping[int, Grid] | None) -> Space | None:
        """Facts and pointers for an arm; `first` are first answers by grid, for a second pass."""
        extras = self._extras(arm.extra) if arm.extra else _Extras([], {})
        if arm.extra and not arm.objects:
            needed = (context, *(tuple(j for j in context if j != k) for k in context))
            if not any(extras.kept[subset].size for subset in needed if subset):
                return None
        if "places" in arm.banks and not all(
            self.outputs[k].shape != self.grids[k].shape
            and all(a >= b for a, b in zip(self.outputs[k].shape, self.grids[k].shape, strict=True))
            for k in context
        ):
            return None
        key = (arm.compare, arm.objects, arm.extra, arm.banks, context if arm.second else None)
        if key in self._spaces:
            return self._spaces[key]
        n_extra = len(extras.sources)
        names = list(SOURCE_NAMES) + [_extra_name(group, j) for group, j in extras.sources]
        features = list(CELL_FEATURE_NAMES)
        banks = [BANKS[name] for name in arm.banks]
        for bank_sources, bank_facts, _ in banks:
            names += bank_sources
            features += bank_facts
        if arm.objects:
            features += [*OBJECT_FACT_NAMES, *COUNT_FACT_NAMES]
        if arm.second:
            names += [f"answer's {name}" for name in SOURCE_NAMES]
            features += [f"answer's {name}" for name in CELL_FEATURE_NAMES]
        made: dict[tuple[int, tuple[int, int]], Grid] = {}

        def values(grid: int, shape: tuple[int, int]) -> Grid:
            if (grid, shape) not in made:
                made[grid, shape] = make(grid, shape)
            return made[grid, shape]

        def make(grid: int, shape: tuple[int, int]) -> Grid:
            planes, features = self.base(grid, shape)
            parts, cells = [planes], [features]
            if n_extra:
                planes = np.stack([self.group(grid, g)[0][j] for g, j in extras.sources])
                parts.append(placed(planes, shape, OUTSIDE))
            for *_, bank in banks:
                shown, facts = bank(self.grids[grid], self.seen[grid], shape)
                parts.append(shown)
                cells.append(facts)
            if arm.objects:
                cells.append(placed(self.objects(grid)[2], shape, ABSENT))
                cells.append(count_facts(self.seen[grid], shape))
            if first is not None:
                again = self.analysed(first[grid])
                parts.append(placed(again.planes, shape, OUTSIDE))
                cells.append(placed(again.cells, shape, ABSENT))
            return np.concatenate([*parts, *cells, positions(shape)])

        table = fact_table([*names, *features], len(names), len(features), arm.compare)
        n_rows = len(names) + len(features) + len(POSITIONS) + 1

        def allowed(subset: Subset) -> Bools | None:
            if not n_extra:
                return None
            rows = np.ones(n_rows, bool)
            rows[N_SOURCES : N_SOURCES + n_extra] = False
            rows[N_SOURCES + extras.kept[subset]] = True
            return rows

        extra_rows = np.zeros(n_rows, bool)
        extra_rows[N_SOURCES : N_SOURCES + n_extra] = True
        space = Space(
            table,
            values,
            self.outputs,
            allowed,
            self.background,
            context if arm.second else None,
            extra_rows,
        )
        space.extras = extras.sources
        self._spaces[key] = space
        return space

    def _subsets(self) -> list[Subset]:
        """Every subset that fits may be made on: all demonstrations but at most `depth`."""
        everyone = range(self.n)
        return [
            tuple(k for k in everyone if k not in left)
            for size in range(self.depth + 1)
            for left in combinations(everyone, size)
            if size < self.n
        ]

    # ---- fitting

    def fit(self, name: str, arm: Arm, space: Space, subset: Subset, context: Subset) -> RuleList:
        key = (name, subset, context if arm.second else None)
        if key not in self._fits:
            self._fits[key] = space.fit(subset, arm, self.limits.max_rules)
        return self._fits[key]

    def predict(
        self, name: str, arm: Arm, space: Space, subset: Subset, context: Subset, grid: int
    ) -> tuple[Grid, str]:
        """A grid's answer from a subset of the demonstrations, and its size rule."""
        rules = self.fit(name, arm, space, subset, context)
        shape, size_rule = self.sizes.predict(subset, grid)
        own = self._own_size(space, rules.default, subset, grid)
        if own is not None:
            shape, size_rule = own
        return space.answer(rules, grid, shape), size_rule

    def _own_size(
        self, space: Space, pointer: int, subset: Subset, grid: int
    ) -> tuple[tuple[int, int], str] | None:
        """The size of the default pointer's own grid, where right on the whole subset."""
        i = pointer - N_SOURCES
        if not 0 <= i < len(space.extras):
            return None
        group, j = space.extras[i]
        if any(tuple(self.group(k, group)[1][j]) != self.outputs[k].shape for k in subset):
            return None
        rows, cols = self.group(grid, group)[1][j].tolist()
        if not rows:
            return None
        return (rows, cols), f"size of {space.table.names[pointer]}"

    def explore(
        self, context: Subset, queries: Sequence[int], arms: Mapping[str, Arm]
    ) -> list[Explained]:
        """Hypotheses of every arm for each query grid, from the context alone."""
        out: list[list[Hypothesis]] = [[] for _ in queries]
        capped: list[str] = []
        cells = sum(self.outputs[k].size for k in context)
        best: _Tried | None = None
        for name, arm in arms.items():
            if cells > min(arm.max_cells, self.limits.max_cells):
                capped.append(name)
                continue
            if best is not None and best.verdict.full and self.limits.stop:
                break
            first = None
            if arm.second:
                if best is None or len(context) < 2:
                    continue
                first = {**best.others, **dict(zip(queries, best.answers, strict=True))}
            space = self.space(arm, context, first)
            if space is None:
                continue
            others: dict[int, Grid] = {}
            hits, shares = 0, 0.0
            rules = self.fit(name, arm, space, context, context)
            tries = len(context) > 1 and (rules.explains or arm.always_tried)
            for k in context if tries else ():
                rest = tuple(j for j in context if j != k)
                others[k], _ = self.predict(name, arm, space, rest, context, k)
                same = others[k].shape == self.outputs[k].shape
                share = float((others[k] == self.outputs[k]).mean()) if same else 0.0
                hits += share == 1.0
                shares += share
            verdict = Verdict(hits, len(others), shares / max(1, len(others)))
            answers = []
            for i, query in enumerate(queries):
                answer, size_rule = self.predict(name, arm, space, context, context, query)
                answers.append(answer)
                out[i].append(
                    Hypothesis(
                        name,
                        answer,
                        verdict,
                        rules.explains,
                        len(rules.exceptions),
                        space.words(rules),
                        size_rule,
                    )
                )
            tried = _Tried(verdict, rules.explains, others, answers)
            if others and (best is None or tried.rank > best.rank):
                best = tried
        return [Explained(_ranked(h), cells, tuple(capped)) for h in out]


@dataclass(frozen=True, eq=False)
class _Extras:
    sources: list[tuple[Group, int]]
    kept: dict[Subset, Ints]


@dataclass(frozen=True, eq=False)
class _Tried:
    """What a second pass builds on."""

    verdict: Verdict
    explains: bool
    others: dict[int, Grid]
    answers: list[Grid]

    @property
    def rank(self) -> tuple[float, float]:
        return (self.verdict.share, self.verdict.cells_frac)


def _ranked(hypotheses: Sequence[Hypothesis]) -> tuple[Hypothesis, ...]:
    """Best first: verdict, explains all, fewer rules, answer shared by more arms, order of arms.

    Chosen by leave-one-out on demonstrations: without the number of rules 2 to 5 of
    405 were lost, by set of arms.
    """
    keys = [(h.answer.shape, h.answer.tobytes()) for h in hypotheses]

    def rank(i: int) -> tuple[float, ...]:
        h = hypotheses[i]
        return (-h.verdict.share, -float(h.explains), h.n_rules, -keys.count(keys[i]))

    return tuple(hypotheses[i] for i in sorted(range(len(keys)), key=rank))


def _extra_name(group: Group, j: int) -> str:
    if group[0] == "objects":
        return OBJECT_SOURCES[j]
    if group[0] == "drawn":
        return DRAWN_SOURCES[j]
    return f"{SOURCE_NAMES[j]} of {SOURCE_NAMES[group[1]]}"


def _whole(plane: Grid) -> Grid | None:
    """The grid at the top left of a plane (30, 30); None where it is no whole rectangle."""
    inside = plane != OUTSIDE
    if not inside[0, 0]:
        return None
    rows, cols = int(inside[:, 0].sum()), int(inside[0].sum())
    if inside.sum() != rows * cols or not inside[:rows, :cols].all():
        return None
    return np.ascontiguousarray(plane[:rows, :cols])


_NOTHING: tuple[Grid, Grid] = (
    np.full((N_SOURCES, MAX_SIDE, MAX_SIDE), OUTSIDE, np.uint8),
    np.zeros((N_SOURCES, 2), np.uint8),
)


def _key(grid: Grid) -> bytes:
    return bytes(grid.shape) + grid.tobytes()


# ---------------------------------------------------------------- public functions


def fit_task(
    demonstrations: Sequence[tuple[Grid, Grid]],
    queries: Sequence[Grid],
    *,
    arms: Mapping[str, Arm] = ARMS,
    limits: Limits = LIMITS,
) -> list[Explained]:
    """Explain the demonstrations and answer the queries.

    demonstrations: (input, output) grids, integers 0..9 of (rows, cols), 1..30 a side; queries:
    inputs alike. arms: tried in this order, cheap ones first. Returns one Explained per query; with
    no demonstrations it holds no hypothesis. Pure and deterministic.
    Raises ValueError for a wrong shape or colour, or an unknown name in `Arm.extra`.
    """
    _check(demonstrations)
    if not demonstrations:
        return [Explained((), 0, ()) for _ in queries]
    problem = _Problem(demonstrations, queries, limits, depth=1)
    everyone = tuple(range(problem.n))
    return problem.explore(everyone, range(problem.n, len(problem.grids)), arms)


def leave_one_out(
    demonstrations: Sequence[tuple[Grid, Grid]],
    *,
    arms: Mapping[str, Arm] = ARMS,
    limits: Limits = LIMITS,
) -> list[Explained]:
    """Each demonstration as the query, explained from the others alone, for training.

    Verdicts are taken within the others (pair-excluded refits): a query's own output takes part in
    nothing, so each result equals `fit_task(others, [query])`. What several contexts need is fitted
    once. Arguments, errors: as fit_task. A lone demonstration gets no hypothesis.
    """
    _check(demonstrations)
    if len(demonstrations) < 2:
        return [Explained((), 0, ()) for _ in demonstrations]
    problem = _Problem(demonstrations, (), limits, depth=2)
    out: list[Explained] = []
    for q in range(problem.n):
        context = tuple(k for k in range(problem.n) if k != q)
        out += problem.explore(context, (q,), arms)
    return out


def _check(demonstrations: Sequence[tuple[Grid, Grid]]) -> None:
    for number, pair in enumerate(demonstrations):
        output = np.asarray(pair[1])
        if output.ndim != 2 or not all(0 < side <= MAX_SIDE for side in output.shape):
            raise ValueError(
                f"demonstration {number}: output shape {output.shape}, expected (rows, cols) with "
                f"1..{MAX_SIDE} each"
            )
        if output.min() < 0 or output.max() >= COLOURS:
            raise ValueError(
                f"demonstration {number}: output colours {output.min()}..{output.max()}, expected "
                f"0..{COLOURS - 1}"
            )
