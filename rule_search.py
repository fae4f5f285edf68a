"""The search for one rule list: all facts and pointers of some demonstrations' cells, as bits.

`Space.fit` takes the default that is right most often, and then exceptions of one or two facts,
each the one that explains most of the cells left; `Space.answer` applies a list to a grid. Which
sources and facts there are, and which demonstrations count, the caller says (`rule_list`). Learns
nothing across tasks; NumPy alone.
Use: `from rule_search import RuleList, Space`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grid_parts import COLOURS, Bools, Grid, Ints
from rule_arms import Arm, Group
from rule_facts import LIKE, UNLIKE, FactTable, tier_of

Words = NDArray[np.uint64]
Subset = tuple[int, ...]  # numbers of demonstrations, rising


# ---------------------------------------------------------------- bits


def pack(rows: Bools) -> Words:
    """Bools (n, cells) as words (n, ceil(cells / 64)); the rest of the last word is 0."""
    n, cells = rows.shape
    width = -(-cells // 64)
    packed = np.zeros((n, width * 8), np.uint8)
    packed[:, : -(-cells // 8)] = np.packbits(rows, axis=1, bitorder="little")
    return packed.view(np.uint64)


def mixed(words: Words, key: int) -> Words:
    """A 64-bit hash (n,) of words (n, width); key tells pairs apart, so sums over pairs work."""
    with np.errstate(over="ignore"):
        z = np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(key + 1) * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9) | np.uint64(1)
        h = (words ^ (words >> np.uint64(32))) * z
        h ^= h >> np.uint64(29)
        h *= np.uint64(0x94D049BB133111EB)
        h ^= h >> np.uint64(32)
        return h.sum(1, dtype=np.uint64)


def bytes_as_words(rows: Grid) -> Words:
    """Bytes (n, cells) as words (n, ceil(cells / 8)), to be `mixed`."""
    n, cells = rows.shape
    out = np.zeros((n, -(-cells // 8) * 8), np.uint8)
    out[:, :cells] = rows
    return out.view(np.uint64)


def bits_by_word(b: Words) -> Ints:
    """How many bits are set in each column of b (m, width): (width,) int64."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(b).sum(0, dtype=np.int64)
    bits = np.unpackbits(np.ascontiguousarray(b).view(np.uint8), axis=1)
    return bits.reshape(*b.shape, 64).sum((0, 2), dtype=np.int64)


_DENSE = 3  # words compared for all pairs at once


def _most_apart(gain: NDArray[np.float32], above: float, a: Words, b: Words) -> tuple[float, Ints]:
    """The greatest gain (n, m) above a bound among rows of a (n, width) and b (m, width) that share
    no bit, and the flat places that have it, rising; 0 and none."""
    free = gain > above
    words = np.flatnonzero(b.any(0))
    # Words with most of b's bits first: nearly every pair that shares a bit is gone after a few.
    words = words[np.argsort(-bits_by_word(b[:, words]), kind="stable")]
    for w in words[:_DENSE].tolist():
        free &= (a[:, w, None] & b[:, w]) == 0
    places = np.flatnonzero(free)
    if not places.size:
        return 0.0, places
    value = gain.ravel()[places]
    rest = words[_DENSE:]
    if not rest.size:
        return float(value.max()), places[value == value.max()]
    a, b = a[:, rest], b[:, rest]
    below, high = np.inf, float(value.max())
    while high > above:
        low = max(above, 0.6 * high)
        band = np.flatnonzero((value >= low) & (value < below))
        for first, last in ((0, 2), (2, rest.size)):
            i, j = np.divmod(places[band], b.shape[0])
            shared = a[i, first:last] & b[j, first:last]
            band = band[~shared.any(1)]
        if band.size:
            most = value[band].max()
            return float(most), places[band[value[band] == most]]
        below = high = low
    return 0.0, places[:0]


# ---------------------------------------------------------------- a task's cells


@dataclass(frozen=True)
class RuleList:
    """Fitted rules: pointers and facts as numbers of a space; exceptions in order of precedence."""

    default: int
    exceptions: tuple[tuple[tuple[int, ...], int], ...]
    explains: bool


class Space:
    """All facts and pointers of the demonstrations' cells for one set of sources and facts.

    Pointers: every source row, then the ten colours.
    table: the facts over the value rows. values(k, shape): value rows (rows, cells) of grid number
    k at an output's shape; the demonstrations' inputs come first. outputs: theirs. allowed(subset):
    which value rows (rows,) bool a subset may use, None for all. background: of each grid, where a
    source shows nothing. context: the demonstrations looked at, None for all. extra_rows (rows,)
    bool: those that some subsets lack.
    """

    def __init__(
        self,
        table: FactTable,
        values: Callable[[int, tuple[int, int]], Grid],
        outputs: Sequence[Grid],
        allowed: Callable[[Subset], Bools | None],
        background: Sequence[int],
        context: Subset | None,
        extra_rows: Bools,
    ) -> None:
        self.values, self.table, self.background = values, table, background
        self.allowed = allowed
        self.extras: list[tuple[Group, int]] = []
        members = range(len(outputs)) if context is None else context
        self.at = {k: i for i, k in enumerate(members)}
        outputs = [outputs[k] for k in members]
        rows = [values(k, out.shape) for k, out in zip(members, outputs, strict=True)]
        columns = [table.of(z) for z in rows]
        packed = [pack(c) for c in columns]
        hashes = np.stack([mixed(p, k) for k, p in enumerate(packed)])  # (n, F)
        like = (table.op == LIKE) | (table.op == UNLIKE)
        used = np.stack([table.row, np.where(like, table.arg, table.row)])  # (2, F)
        with np.errstate(over="ignore"):
            whole = hashes.sum(0, dtype=np.uint64)
            # A fact about an extra source, which some subsets lack, stands for no other row's fact.
            whole += (used * extra_rows[used]).sum(0).astype(np.uint64) * np.uint64(
                0x9E3779B97F4A7C15
            )
        first = np.sort(np.unique(whole, return_index=True)[1])
        seen = np.zeros(table.op.size, bool)
        for p in packed:
            seen |= p.any(1)
        self.facts = first[seen[first]]  # of the table
        self.rows_used = used[:, self.facts]
        self.hashes = hashes[:, self.facts]
        self.packed = [np.ascontiguousarray(p[self.facts]) for p in packed]
        self.support = np.stack([np.count_nonzero(c[self.facts], 1) for c in columns])
        self.holds = [np.ascontiguousarray(c[self.facts].T) for c in columns]  # (cells, F)
        right, self.colours = [], []
        for z, out in zip(rows, outputs, strict=True):
            flat = out.ravel()
            colours = np.arange(COLOURS, dtype=np.uint8)[:, None]
            shown = np.concatenate(
                (z[: table.n_sources], np.broadcast_to(colours, (COLOURS, flat.size)))
            )
            self.colours.append(shown)
            right.append(shown == flat)
        self.right = [np.ascontiguousarray(r.T) for r in right]  # (cells, P)
        self.wrong = [pack(~r) for r in right]
        self.score = np.stack([np.count_nonzero(r, 1) for r in right])  # (n, P)
        self.right_hashes = np.stack([mixed(w, k) for k, w in enumerate(self.wrong)])
        self.n_pointers = self.score.shape[1]
        rank = [tier_of(name, True) for name in table.names[: table.n_sources]] + [9] * COLOURS
        self.preferred = np.argsort(rank, kind="stable")  # pointers, colours last

    def open_to(self, subset: Subset) -> tuple[Bools, Bools]:
        """Which facts (F,) and pointers (P,) a subset may use: allowed, and no repetition."""
        s = [self.at[k] for k in subset]
        with np.errstate(over="ignore"):
            fact = self.hashes[s].sum(0, dtype=np.uint64)
            pointer = self.right_hashes[s].sum(0, dtype=np.uint64)
        may_fact, may_point = np.ones(fact.size, bool), np.ones(pointer.size, bool)
        rows = self.allowed(subset)
        if rows is not None:
            may_fact = rows[self.rows_used].all(0)
            may_point[: self.table.n_sources] = rows[: self.table.n_sources]
        open_facts, open_pointers = np.zeros(fact.size, bool), np.zeros(pointer.size, bool)
        for hashes, may, out, order in (
            (fact, may_fact, open_facts, np.arange(fact.size)),
            (pointer, may_point, open_pointers, self.preferred),
        ):
            those = order[may[order]]
            out[those[np.unique(hashes[those], return_index=True)[1]]] = True
        return open_facts, open_pointers

    def fit(self, subset: Subset, arm: Arm, max_rules: int) -> RuleList:
        """The list, of at most `max_rules` exceptions, that an arm finds for a subset."""
        s = [self.at[k] for k in subset]
        facts, pointers = (np.flatnonzero(x) for x in self.open_to(subset))
        pointers = self.preferred[np.isin(self.preferred, pointers)]
        colour = pointers >= self.n_pointers - COLOURS
        score = self.score[s].sum(0)[pointers] * np.where(colour, 0.98, 1.0)
        order = np.argsort(-score, kind="stable")
        default = int(pointers[order[min(arm.default, order.size - 1)]])
        # The cells that the default gets wrong, and what can say anything about them.
        where = [np.flatnonzero(~self.right[k][:, default]) for k in s]
        owner = np.repeat(s, [w.size for w in where])
        holds = np.concatenate([self.holds[k][w] for k, w in zip(s, where, strict=True)])
        right = np.concatenate([self.right[k][w] for k, w in zip(s, where, strict=True)])
        facts = facts[np.logical_or.reduce(holds, axis=0)[facts]]
        pointers = pointers[np.logical_or.reduce(right, axis=0)[pointers]]
        if not facts.size or not pointers.size:
            return RuleList(default, (), not len(owner))
        holds, right = holds[:, facts], right[:, pointers]
        support = self.support[s].sum(0)[facts]
        inside, good = holds.astype(np.float32), right.astype(np.float32)
        search = _Search(self, s, facts, pointers, support)
        covered = inside.T @ good
        exceptions: list[tuple[tuple[int, ...], int]] = []
        while len(owner) and len(exceptions) < max_rules:
            most, fact, pointer = search.clean(covered)
            chosen: tuple[tuple[int, ...], int] | None = None
            if arm.facts > 1 and most < max(1, 0.34 * len(owner)):
                chosen = search.best(inside, good, covered, most)
            if chosen is None:
                hopeless = most * (max_rules - len(exceptions)) < len(owner)
                if most < 1 or (hopeless and not arm.always_tried):
                    break  # no list of this length explains what is left
                shown_in = np.zeros(fact.size)
                for k in s:
                    mine = owner == k
                    if mine.any():
                        shown_in += holds[mine].any(0)[fact]
                tie = shown_in * 1e6 + np.minimum(support[fact], 1e5)
                best = int(tie.argmax())
                chosen = ((int(fact[best]),), int(pointer[best]))
            which, to = chosen
            gone = holds[:, list(which)].all(1)
            left = ~gone
            if arm.shadow:
                search.leave_out(which)
            exceptions.append((tuple(int(self.facts[facts[f]]) for f in which), int(pointers[to])))
            few = 2 * np.count_nonzero(gone) < gone.size
            if few:
                covered -= inside[gone].T @ good[gone]
            owner, holds, inside, good = owner[left], holds[left], inside[left], good[left]
            if not few:
                covered = inside.T @ good
        return RuleList(default, tuple(exceptions), not len(owner))

    def answer(self, rules: RuleList, grid: int, shape: tuple[int, int]) -> Grid:
        """The grid (rows, cols) that the rules say for grid number `grid`."""
        values = self.values(grid, shape)
        n_sources = self.table.n_sources

        def shown(pointer: int) -> Grid:
            if pointer < n_sources:
                return values[pointer]
            return np.full(values.shape[1], pointer - n_sources, np.uint8)

        out = shown(rules.default).copy()
        done = np.zeros(out.size, bool)
        for which, pointer in rules.exceptions:
            here = self.table.of(values, np.array(which)).all(0) & ~done
            out[here] = shown(pointer)[here]
            done |= here
        out[out >= COLOURS] = self.background[grid]
        return out.reshape(shape)

    def words(self, rules: RuleList) -> str:
        """The rules in words, see `rule_list.Hypothesis`."""

        def name(pointer: int) -> str:
            n = self.table.n_sources
            return self.table.names[pointer] if pointer < n else f"colour {pointer - n}"

        parts = [name(rules.default)]
        for which, pointer in rules.exceptions:
            facts = " and ".join(self.table.words(f) for f in which)
            parts.append(f"where {facts}: {name(pointer)}")
        return "; ".join(parts)


# Of an exception of two, the first facts tried; 6 lost 8 of 547 left-out demonstrations.
_FIRST_FACTS = 12
_PAIR_POINTERS = 12


class _Search:
    """One fit's cells as packed bits: what is right where, and exceptions of two facts."""

    def __init__(
        self, space: Space, s: list[int], facts: Ints, pointers: Ints, support: Ints
    ) -> None:
        self.facts = np.concatenate([space.packed[k][facts] for k in s], 1)
        self.wrong = np.concatenate([space.wrong[k][pointers] for k in s], 1)
        self.support = support

    def leave_out(self, which: tuple[int, ...]) -> None:
        """The cells of an exception are settled: from now on nothing is wrong there."""
        self.wrong = self.wrong & ~np.bitwise_and.reduce(self.facts[list(which)], axis=0)

    def clean(self, covered: NDArray[np.float32]) -> tuple[float, Ints, Ints]:
        """The most cells left, of `covered` (facts, pointers), that a fact and a pointer right
        wherever it holds explain, and all such facts (n,) and pointers (n,); 0 and none."""
        most, top = _most_apart(covered, 0.5, self.facts, self.wrong)
        fact, pointer = np.divmod(top, covered.shape[1])
        return most, fact, pointer

    def best(
        self,
        inside: NDArray[np.float32],
        good: NDArray[np.float32],
        covered: NDArray[np.float32],
        beat: float,
    ) -> tuple[tuple[int, int], int] | None:
        """The (fact, fact), pointer that explains most of the cells left, more than `beat`."""
        pointers = np.argsort(-covered.max(0), kind="stable")[:_PAIR_POINTERS]
        some = covered[:, pointers]
        precise = some / np.maximum(1, self.support[:, None])
        enough = some >= max(2, 0.34 * len(inside))
        promise = (some * enough * np.sqrt(precise)).max(1)
        firsts = np.argsort(-promise, kind="stable")[:_FIRST_FACTS]
        least = max(beat, 1) + 0.5
        firsts = firsts[(promise[firsts] > 0) & (some[firsts] > least).any(1)]
        if not firsts.size:
            return None
        seconds = np.flatnonzero((some > least).any(1))
        both = inside[:, firsts, None] * good[:, None, pointers]
        gain = inside[:, seconds].T @ both.reshape(len(inside), -1)
        bad = (self.facts[firsts, None] & self.wrong[pointers]).reshape(gain.shape[1], -1)
        most, top = _most_apart(gain, least, self.facts[seconds], bad)
        if not most:
            return None
        second, other = np.divmod(top, gain.shape[1])
        first, pointer = np.divmod(other, pointers.size)
        k = int(np.lexsort((pointer, second, first))[0])
        return (int(firsts[first[k]]), int(seconds[second[k]])), int(pointers[pointer[k]])
