"""Bits against their slow meaning, and what a fitted list promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rule_list
from rule_arms import ARMS, LIMITS
from rule_search import _most_apart, bits_by_word, bytes_as_words, mixed, pack


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200))
def test_packed_bits_count_and_hash_like_the_rows(seed: int, cells: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.random((6, cells)) < 0.4
    rows[5] = rows[0]
    words = pack(rows)
    assert words.shape == (6, -(-cells // 64))
    assert [int(bits_by_word(row[None]).sum()) for row in words] == rows.sum(1).tolist()
    hashes = mixed(words, 0)
    for i in range(6):
        for j in range(6):
            assert (hashes[i] == hashes[j]) == bool((rows[i] == rows[j]).all())
    assert (mixed(words, 1) != hashes)[rows.any(1)].all()  # the pair's number counts


def test_bits_are_counted_alike_with_an_older_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    words = pack(np.random.default_rng(0).random((7, 300)) < 0.4)
    newer = bits_by_word(words)
    assert newer.tolist() == [sum(int(word).bit_count() for word in column) for column in words.T]
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert bits_by_word(words).tolist() == newer.tolist()


def test_bytes_as_words_keep_every_byte() -> None:
    rows = np.arange(22, dtype=np.uint8).reshape(2, 11)
    words = bytes_as_words(rows)
    assert words.shape == (2, 2)
    assert words.view(np.uint8)[:, :11].tolist() == rows.tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_greatest_gain_without_a_shared_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = (int(k) for k in rng.integers(1, 12, 2))
    cells = int(rng.integers(1, 600))
    density = rng.choice([0.002, 0.02, 0.2])
    a, b = rng.random((n, cells)) < density, rng.random((m, cells)) < density
    gain = rng.integers(0, 5, (n, m)).astype(np.float32)
    most, places = _most_apart(gain, 0.5, pack(a), pack(b))
    free = {
        i * m + j: gain[i, j]
        for i in range(n)
        for j in range(m)
        if not (a[i] & b[j]).any() and gain[i, j] > 0.5
    }
    assert most == max(free.values(), default=0)
    assert places.tolist() == [k for k, value in free.items() if value == most]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6))
def test_exceptions_are_right_where_they_touch(seed: int) -> None:
    """Also in a list that does not explain all: random outputs, rules checked cell by cell."""
    rng = np.random.default_rng(seed)
    pairs = [(g[0], g[1]) for g in rng.integers(0, 3, (2, 2, 4, 4)).astype(np.uint8)]
    problem = rule_list._Problem(pairs, (), LIMITS, depth=1)
    arm = ARMS["pairs"]
    space = problem.space(arm, (0, 1), None)
    assert space is not None
    rules = space.fit((0, 1), arm, 6)
    for k, (_, output) in enumerate(pairs):
        values = space.values(k, output.shape)
        for facts, pointer in rules.exceptions:
            here = space.table.of(values, np.array(facts)).all(0)
            n = space.table.n_sources
            shown = values[pointer] if pointer < n else np.full(output.size, pointer - n)
            assert (shown[here] == output.ravel()[here]).all()
