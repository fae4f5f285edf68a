"""Which sides an output may have: rules read off the demonstrations, and a query's canvas.

A *candidate* is a side that a rule gives, from the input alone (sources of `grid_transforms`, rules
of `grid_features`) or from the demonstrations too; its *support* is the share of the context on
which that rule is right. No query's own output is looked at, nor any colour. NumPy alone.
`from size_rules import demonstration_rules`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from grid_features import N_SIZE_RULES, SIZE_RULE_NAMES
from grid_parts import MAX_SIDE
from grid_transforms import N_SOURCES, SOURCE_NAMES

Ints = NDArray[np.int64]

DEMONSTRATION_RULE_NAMES = (
    "constant",  # all outputs agree on this side
    "modal",  # the commonest side of the outputs, the longer one in a tie
    "maximum",  # the longest side of the outputs
    "ratio",  # output / input is one whole number, or one over it
    "difference",  # output - input is one number
    "ratio_swapped",  # the same two, with the input's other axis
    "difference_swapped",
)
SIZE_CANDIDATE_NAMES: tuple[str, ...] = (
    tuple(f"source_{name}" for name in SOURCE_NAMES)
    + tuple(f"input_{name}" for name in SIZE_RULE_NAMES)
    + tuple(f"demonstrations_{name}" for name in DEMONSTRATION_RULE_NAMES)
)
N_INPUT_CANDIDATES = N_SOURCES + N_SIZE_RULES
N_SIZE_CANDIDATES = len(SIZE_CANDIDATE_NAMES)
DEMONSTRATION_RULE_INDEX = {name: k for k, name in enumerate(DEMONSTRATION_RULE_NAMES)}
# One demonstration cannot check a rule made from itself: neither refuted nor confirmed.
UNCHECKED_SUPPORT = 0.5


def demonstration_rules(ins: Ints, outs: Ints, known: NDArray[np.bool_], query: Ints) -> Ints:
    """Output sides by the rules of DEMONSTRATION_RULE_NAMES, for P problems at once.

    ins, outs (P, n, 2): input and output sides of the demonstrations; known (P, n): which of them
    count; query (P, 2): sides of the input in question. Returns (P, 2, rules), 0 = none.
    """
    at = DEMONSTRATION_RULE_INDEX
    p, n = known.shape
    values = np.zeros((p, 2, len(DEMONSTRATION_RULE_NAMES)), np.int64)
    if n == 0:
        return values
    any_known: NDArray[np.bool_] = np.logical_or.reduce(known, axis=1)
    first = known.argmax(1)
    problem = np.arange(p)
    mask = known[:, :, None]
    out0 = outs[problem, first]  # (P, 2)

    def everywhere(holds: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.all(holds | ~mask, axis=1) & any_known[:, None]

    values[..., at["constant"]] = np.where(everywhere(outs == out0[:, None]), out0, 0)
    votes = ((outs[:, :, None] == outs[:, None]) & mask[:, None]).sum(2)  # (P, n, 2)
    rank = np.where(mask, votes * (MAX_SIDE + 1) + outs, -1)
    values[..., at["modal"]] = np.take_along_axis(outs, rank.argmax(1)[:, None], 1)[:, 0]
    values[..., at["maximum"]] = np.where(mask, outs, 0).max(1)
    for suffix, swap in (("", False), ("_swapped", True)):
        side = ins[..., ::-1] if swap else ins
        own = query[:, ::-1] if swap else query
        in0 = np.maximum(side[problem, first], 1)
        whole = (out0 % in0 == 0) | (in0 % np.maximum(out0, 1) == 0)
        scaled = own * out0
        ratio = everywhere(outs * in0[:, None] == side * out0[:, None]) & whole
        whole_ratio = ratio & (scaled % in0 == 0)
        values[..., at[f"ratio{suffix}"]] = np.where(whole_ratio, scaled // in0, 0)
        change = out0 - side[problem, first]
        steady = everywhere(outs - side == change[:, None])
        values[..., at[f"difference{suffix}"]] = np.where(steady, own + change, 0)
    values[~any_known] = 0
    return np.where((values >= 1) & (values <= MAX_SIDE), values, 0)


def canvas_bound(candidates: Ints, support: NDArray[np.float32], outs: Ints, own: Ints) -> Ints:
    """Upper bound (2,) of a query's output sides, from its input and its context alone.

    candidates, support (2, S); outs (n, 2) the context's output sides; own (2,) the input's sides.
    Per axis: the largest candidate that is right on the whole context; where there is none, the
    largest of the context's outputs, the input and the best supported candidates.
    """
    full = np.where(support >= 1, candidates, 0).max(1)
    best = support.max(1, keepdims=True)
    likely = np.where((support >= best) & (best > 0), candidates, 0).max(1)
    wide = np.maximum(np.maximum(likely, own), outs.max(0, initial=1))
    return np.clip(np.where(full > 0, full, wide), 1, MAX_SIDE)


def input_capacity(shapes: Iterable[tuple[int, ...]]) -> tuple[int, int]:
    """Canvas (rows, cols) of a training task, from the sizes of its demonstrations' inputs alone.

    Being blind to outputs, no output can reach its own query through padding or bucketing. Queries
    that need more are asked again in overflow batches, see TrainingStream; a roomier canvas for
    small inputs would spare some of those, but cost a quarter more cells (measured).
    """
    rows, cols = (max(sides) for sides in zip(*shapes, strict=True))
    return rows, cols
