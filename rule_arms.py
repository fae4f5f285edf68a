"""Arms: the ways of fitting hypotheses, and the bounds on their work.

What an arm may use is said here by name; `rule_list` runs arms, `rule_search` fits one. Learns and
computes nothing. Use: `from rule_arms import ARMS, Arm, Limits`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from grid_transforms import SOURCE_INDEX


@dataclass(frozen=True)
class Arm:
    """One way of fitting.

    default: which pointer is the default, 0 the one right most often, 1 the next different one.
    facts: at most so many facts in an exception, 1 or 2.
    compare: facts "source a shows what source b shows", and "is not", too.
    objects: facts about whole components and objects, and places against counts, too.
    extra: names of EXTRA_SOURCES; of their sources, those right on enough of the context's cells
        (`rule_list` says how many) become pointers. "objects": crops of the part with most or least
        of something, parts moved, turned or kept, bars by count. "deep": sources of a source.
        "drawn": lines from single cells, between cells of a colour, flooded regions, copies chosen
        by cell. Where none is kept, an arm with `extra` but without `objects` is not run.
    second: fitted again with the answer of the best arm so far analysed beside the input. A
        demonstration's first answer is the one from all others of the context, as the query's is.
    shadow: an exception need only be right where no earlier one has spoken.
    always_tried: take a verdict, and go on fitting, even where the list cannot explain the context;
        other arms then try no demonstration (n_tried 0): of 1,180 such lists 7 were exact on the
        demonstration left out.
    max_cells: the arm is not run above so many cells of the context's outputs.
    banks: names of `rule_drawings.BANKS`, further sources and facts. "places", of outputs of
        another size, no side shorter than the input's (for others the arm is not run): turned
        copies side by side, the input stretched, which copy and where in it. "lines": what lies
        along a cell's lines and how far, what is beside it, runs, squares.
    """

    default: int = 0
    facts: int = 2
    compare: bool = False
    objects: bool = False
    extra: tuple[str, ...] = ()
    second: bool = False
    always_tried: bool = False
    shadow: bool = False
    max_cells: int = 1600
    banks: tuple[str, ...] = ()


# Chosen by leave-one-out on demonstrations (405 queries, the last two 652), never by a test output.
ARMS: dict[str, Arm] = {
    "plain": Arm(facts=1, max_cells=6000),
    "pairs": Arm(always_tried=True, max_cells=4000),
    "shadow": Arm(shadow=True),
    "compare": Arm(compare=True, shadow=True),
    "objects": Arm(shadow=True, objects=True, extra=("objects",)),
    "again": Arm(second=True, shadow=True),
    "deep": Arm(extra=("objects", "deep"), objects=True, shadow=True),
    "deep_again": Arm(extra=("objects", "deep"), second=True, shadow=True),
    "second_default": Arm(default=1, shadow=True),
    "places": Arm(shadow=True, banks=("places",)),
    "drawn": Arm(shadow=True, extra=("drawn",), banks=("lines",)),
}


@dataclass(frozen=True)
class Limits:
    """Bounds on work, all stated in the result.

    max_cells: cells of a context's demonstration outputs; an arm's own bound applies where smaller.
    max_rules: exceptions in a list. stop: later arms are not run once an arm's verdict is full.
    """

    max_cells: int = 6000
    max_rules: int = 6
    stop: bool = True


LIMITS = Limits()
# What training's queries are explained with: half the time of all arms; any answer exact for 61 of
# 167 demonstrations of 50 tasks, 62 with `again` at 1.4 times the time.
TRAINING_ARMS = ("plain", "pairs", "shadow", "objects", "places", "drawn")
TRAINING_LIMITS = Limits(max_cells=1600)

# ---------------------------------------------------------------- extra sources, by name

EXTRA_SOURCES = ("deep", "objects", "drawn")

# An extra group is a function of one grid: planes uint8 (n, 30, 30) and sizes uint8 (n, 2), (0, 0)
# for a source without an opinion on the size. n and the names depend on the group alone: one of
# EXTRA_SOURCES and, of "deep", the number of the inner source, else 0.
Group = tuple[str, int]

# The inner sources of "deep": those of which another source is the answer to some demonstrations
# (measured).
_DEEP = tuple(
    SOURCE_INDEX[name]
    for name in (
        "fill_best_symmetry",
        "crop_largest_component",
        "crop_largest_object",
        "crop_commonest",
    )
)


def groups_of(names: Iterable[str]) -> list[Group]:
    """The groups that names of EXTRA_SOURCES stand for. Raises ValueError for another name."""
    groups: list[Group] = []
    for name in names:
        if name == "deep":
            groups += [("deep", k) for k in _DEEP]
        elif name == "objects":
            groups.append(("objects", 0))
        elif name == "drawn":
            groups.append(("drawn", 0))
        else:
            raise ValueError(f"extra sources {name!r}: expected one of {EXTRA_SOURCES}")
    return groups
