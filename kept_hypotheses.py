"""Hypotheses as bytes: what a checkpoint holds of those fitted so far; none is fitted twice.

A record belongs to the grids it was fitted to, and all records to the program that fitted them:
anything else is passed over, as if it had not been kept. It fits nothing and opens no files but the
program's own. Use: `from kept_hypotheses import digest, packed, record, unpacked`.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from grid_parts import COLOURS, MAX_SIDE
from rule_list import Explained, Hypothesis, Verdict

# Whose text decides what is fitted, and how it is written here.
SOURCES = (
    "kept_hypotheses.py", "rule_arms.py", "rule_drawings.py", "rule_facts.py", "rule_list.py",
    "rule_objects.py", "rule_search.py", "grid_features.py", "grid_parts.py", "grid_transforms.py",
    "size_rules.py",
)  # fmt: skip
LENGTH = struct.Struct("<I")  # before each record


class Kept(NamedTuple):
    """What was fitted for one task: kind "tests" (an `Explained` a test input) or "demonstrations"
    (one for each); grids: `digest` of what it was fitted to; record: the same as bytes."""

    kind: str
    task_id: str
    grids: str
    found: list[Explained]
    record: bytes


@cache
def program() -> bytes:
    """sha256 of the sources that decide what is fitted: hypotheses of another version are none."""
    here = Path(__file__).resolve().parent
    texts = ((here / name).read_text(encoding="utf-8") for name in SOURCES)  # ends of lines alike
    return hashlib.sha256("\0".join(texts).encode()).digest()


def is_ours(data: bytes) -> bool:
    """Whether this program wrote it."""
    return data[: len(program())] == program()


def digest(grids: Iterable[NDArray[Any]]) -> str:
    """32 hex digits that stand for uint8 grids (rows, cols) in their order."""
    found = hashlib.sha256()
    for grid in grids:
        found.update(bytes(grid.shape) + grid.astype(np.uint8).tobytes())
    return found.hexdigest()[:32]


def record(kind: str, task_id: str, grids: str, found: list[Explained]) -> bytes:
    """One task's hypotheses as bytes, about 0.5 kB."""
    plain = [
        [e.context_cells, list(e.capped_arms), [_plain(h) for h in e.hypotheses]] for e in found
    ]
    text = json.dumps([kind, task_id, grids, plain], separators=(",", ":"))
    return zlib.compress(text.encode())


def packed(records: Iterable[bytes]) -> bytes:
    """All records of this program in one piece."""
    return program() + b"".join(LENGTH.pack(len(r)) + r for r in records)


def unpacked(data: bytes) -> Iterator[Kept]:
    """What `packed` was given; nothing of another program's, nor of what is damaged."""
    if not is_ours(data):
        return
    at = len(program())
    while at + LENGTH.size <= len(data):
        (length,) = LENGTH.unpack_from(data, at)
        one = data[at + LENGTH.size : at + LENGTH.size + length]
        at += LENGTH.size + length
        try:
            kind, task_id, grids, plain = json.loads(zlib.decompress(one))
            found = [
                Explained(tuple(_hypothesis(*h) for h in hypotheses), cells, tuple(capped))
                for cells, capped, hypotheses in plain
            ]
        except (zlib.error, ValueError, TypeError):
            continue
        yield Kept(kind, task_id, grids, found, one)


def _plain(h: Hypothesis) -> list[Any]:
    cells = (h.answer + ord("0")).tobytes().decode()
    of_all = [int(h.verdict.n_right), int(h.verdict.n_tried), float(h.verdict.cells_frac)]
    return [
        h.arm, int(h.answer.shape[0]), cells, of_all, bool(h.explains), int(h.n_rules), h.words,
        h.size_rule,
    ]  # fmt: skip


def _hypothesis(
    arm: str, rows: int, cells: str, of_all: list[Any], explains: bool, n_rules: int, words: str,
    size_rule: str,
) -> Hypothesis:  # fmt: skip
    answer = np.frombuffer(cells.encode(), np.uint8).reshape(rows, -1) - ord("0")
    if not answer.size or max(answer.shape) > MAX_SIDE or answer.max() >= COLOURS:
        raise ValueError("not a grid")
    return Hypothesis(arm, answer, Verdict(*of_all), explains, n_rules, words, size_rule)
