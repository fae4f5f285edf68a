"""One self-contained HTML page about a run, or about two beside each other.

The templates lie in templates/ beside this file: jinja2 fills them in, everything escaped;
style and script are inline, so that the page needs no network and no other file. Curves are drawn
here as SVG; the grids of the gallery go into the page as digits and are drawn by its script.
`from report_page import Answer, render, compare`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray

import run_record
from command_line import counted
from grid_pictures import INK, PALETTE
from run_record import Record, Row, figure, part, percent

if TYPE_CHECKING:
    from dataset_arc import Task

Grid = NDArray[np.uint8]
TEMPLATES = Path(__file__).with_name("templates")
NEARLY = 0.9  # share of right cells from which a wrong answer of the right size is called so
SHOWN_DEMONSTRATIONS = 6
STATES = {
    # of a query, best first, by its better attempt: (name of the filter, what it means)
    "solved": ("Solved", "one of the two attempts is exact"),
    "nearly": ("Nearly", f"right size, at least {100 * NEARLY:.0f}% of the cells right"),
    "wrong": ("Wrong cells", "right size, fewer cells right"),
    "size": ("Size wrong", "no attempt has the right size"),
    "unknown": ("No known output", "nothing to compare with"),
}
FLAGS = {
    "won": ("Won by refinement", "a refinement mended a wrong first answer in one view at least"),
    "lost": (
        "Lost by refinement",
        "a refinement spoilt a right first answer in one view at least, or the network alone had "
        "an exact attempt and the joint vote has none",
    ),
}


# ---------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 360, 196  # of a panel, in its own units: about a phone's pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 30
MAX_POINTS = 240  # of a line; longer ones are averaged in pieces


@dataclass
class Line:
    """A curve of one panel. style: line, points (marked) or raw (faint, not in the legend); x in
    minutes, y may hold NaN.

    colour: 1..4, of the style sheet; dashed and mark tell lines apart without colours.
    """

    name: str
    x: list[float]
    y: list[float]
    colour: int = 1
    style: str = "line"
    dashed: bool = False
    mark: str = "circle"


@dataclass
class Panel:
    """One picture of curves over the common x axis. share: y is between 0 and 1; log: a
    logarithmic axis, on which figures of 0 are not shown."""

    title: str
    note: str
    lines: list[Line] = field(default_factory=list)
    share: bool = False
    log: bool = False


# (title, note, keys of batch rows with their names, key of epoch rows, kind)
PANELS: tuple[tuple[str, str, dict[str, str], str, str], ...] = (
    ("Loss", "lower is better; look at the trend", {"loss": ""}, "", ""),
    ("Exact grids", "every cell and both sides right", {"exact": ""},
     "val_accuracy", "share"),
    ("Cell accuracy", "right cells, 0 where the size is wrong", {"accuracy": ""},
     "cell_accuracy", "share"),
    ("Size accuracy", "both sides right", {"size": ""}, "size_accuracy", "share"),
    ("Reward and d_acc", "what refinement won: above 0 is good",
     {"reward": "reward", "d_acc": "d_acc: cells won"}, "", ""),
    ("Learning rates", "they rise, stay and fall to 0", {"agent_lr": "agent", "qwen_lr": "Qwen"},
     "", ""),
    ("Mask ratio", "share of wrong cells: lower is better", {"mask_ratio": ""}, "", "share"),
    ("Qwen gradient", "its norm; 0 for long means no learning",
     {"qwen_grad": ""}, "", "log"),
    ("Memory", "accuracy a task needs to be kept", {"threshold": "threshold"}, "", "share"),
)  # fmt: skip
STEADY = {"agent_lr", "qwen_lr", "threshold"}  # set, not measured: shown as they are
UNTRAINED = {
    "val_accuracy": "exact_at_1",
    "cell_accuracy": "cell_accuracy",
    "size_accuracy": "size_accuracy",
}


SPLIT = {  # titles of the panels of two runs, where a panel of one run holds several figures
    "reward": "Reward of refinement",
    "d_acc": "Cells won by refinement (d_acc)",
    "agent_lr": "Learning rate: agent",
    "qwen_lr": "Learning rate: Qwen",
}


def panels(records: Sequence[Record]) -> list[Panel]:
    """The panels of one run, or of two over each other (colour and dashes say which run)."""
    found = []
    for title, note, keys, epoch_key, kind in PANELS:
        groups = [keys] if len(records) == 1 else [{key: name} for key, name in keys.items()]
        for group in groups:
            name = title if len(groups) == 1 else SPLIT[next(iter(group))]
            panel = Panel(name, note, share=kind == "share", log=kind == "log")
            for number, record in enumerate(records):
                of = f"{'AB'[number]}: " if len(records) > 1 else ""
                panel.lines += _lines(record, group, epoch_key, number, of)
            if panel.lines:
                found.append(panel)
    return found


def _lines(
    record: Record, keys: dict[str, str], epoch_key: str, number: int, of: str
) -> list[Line]:
    found = []
    for i, (key, name) in enumerate(keys.items()):
        x, y = run_record.points(record.batches, key)
        if any(map(math.isfinite, y)):
            label = of + (name or "training batches")
            width = 1 if key in STEADY else max(3, len(record.batches) // 15)
            shade = 1 + number if of else 1 + 3 * i
            if len(keys) == 1 and not of and key not in STEADY:
                found.append(Line(f"{label}, one by one", x, y, shade, "raw"))
            found.append(
                Line(label, x, run_record.smooth(y, width), shade, dashed=bool(number or i))
            )
    if not epoch_key or not found:
        return found
    mark = "square" if number else "circle"
    x, y = run_record.points(record.epochs, epoch_key)
    start = figure(record.untrained, UNTRAINED[epoch_key])
    n = figure(record.untrained, "n")
    if epoch_key == "val_accuracy" and start is not None:
        start = start / n if n else None
    if start is not None:
        x, y = [found[0].x[0], *x], [start, *y]
    shade = 1 + number if of else 2
    if y:
        first = " (first: untrained)" if start is not None else ""
        found.append(Line(f"{of}validation, one view{first}", x, y, shade, "points", mark=mark))
    final = figure(record.results, epoch_key)
    if epoch_key == "val_accuracy":
        right, of_n = figure(record.results, "exact_at_2"), figure(record.results, "n")
        final = right / of_n if right is not None and of_n else None
    at = figure(record.results, "minutes")
    if final is not None and at is not None:
        what = "final, two attempts" if epoch_key == "val_accuracy" else "final"
        shade = 1 + number if of else 3
        found.append(Line(f"{of}{what}", [at], [final], shade, "points", mark="star"))
    return found


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means of pieces of equal length, over what is finite."""
    step = math.ceil(len(x) / MAX_POINTS)
    if step <= 1:
        return list(x), list(y)
    xs, ys = [], []
    for i in range(0, len(x), step):
        finite = [v for v in y[i : i + step] if math.isfinite(v)]
        xs.append(sum(x[i : i + step]) / len(x[i : i + step]))
        ys.append(sum(finite) / len(finite) if finite else math.nan)
    return xs, ys


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two limits."""
    if not low < high:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """The logarithms of round numbers between two logarithms: powers of ten, and where those are
    few 2 and 5 times them."""
    whole = range(math.floor(low), math.ceil(high) + 1)
    found = [float(i) for i in whole if low <= i <= high]
    if len(found) < 3:
        found = [y for i in whole for m in (1, 2, 5) if low <= (y := i + math.log10(m)) <= high]
    return found[:: math.ceil(len(found) / 5)] if found else [low, high]


def short(value: float) -> str:
    """A figure for an axis."""
    if value == 0:
        return "0"
    text = f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.0e}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def _limits(panel: Panel) -> tuple[float, float]:
    values: list[float] = []
    for line in panel.lines:
        finite = sorted(v for v in line.y if math.isfinite(v))
        cut = 0 if line.style == "points" else len(finite) // 100  # outliers flatten no curve
        values += finite[cut : len(finite) - cut]
    if panel.share:
        return 0.0, min(1.0, 1.08 * max(values, default=1.0) or 1.0)
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def draw(panel: Panel, minutes: float, unit: str) -> Markup:
    """A panel as inline SVG; its colours follow the page's style, so it suits light and dark."""
    lines = panel.lines
    if panel.log:
        lines = [
            Line(**{**vars(s), "y": [math.log10(v) if v > 0 else math.nan for v in s.y]})
            for s in lines
        ]
        lines = [s for s in lines if any(map(math.isfinite, s.y))]
    if not lines:
        return Markup('<p class="quiet">all figures are 0</p>')
    low, high = _limits(Panel(panel.title, "", lines, panel.share))
    span = minutes or 1.0

    def at_x(x: float) -> float:
        return LEFT + min(1.0, max(0.0, x / span)) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        share = (min(high, max(low, y)) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []
    marks = ticks(low, high, 4)
    if panel.log:
        marks = decades(low, high)
    for y in marks:
        text = short(10.0**y if panel.log else y)
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at_y(y) + 4:.1f}" class="end">{text}</text>')
    for x in ticks(0, span, 5):
        parts.append(f'<path class="grid" d="M{at_x(x):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 13}" class="mid">{short(x)}</text>'
        )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" class="end">{unit}</text>')
    if not panel.log and low < 0 < high:
        parts.append(f'<path class="zero" d="M{LEFT} {at_y(0):.1f}H{WIDTH - RIGHT}"/>')
    for line in lines:
        parts.append(_drawn(line, at_x, at_y))
    label = escape(f"{panel.title} over {short(minutes)} minutes. {spoken(panel)}")
    return Markup(
        f'<svg class="curve" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"{''.join(parts)}</svg>"
    )


def _drawn(line: Line, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> str:
    kind = f"c{line.colour}" + (" dashed" if line.dashed else "")
    if line.style == "points":
        return "".join(
            mark_of(line.mark, at_x(x), at_y(y), kind)
            for x, y in zip(line.x, line.y, strict=True)
            if math.isfinite(y)
        )
    path, pen = [], "M"
    for x, y in zip(*thinned(line.x, line.y), strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{at_x(x):.1f} {at_y(y):.1f}")
        pen = "L"
    return f'<path class="{line.style} {kind}" d="{"".join(path)}"/>'


def mark_of(mark: str, x: float, y: float, kind: str) -> str:
    """The sign of a point: a circle, a square or a star."""
    if mark == "square":
        return f'<path class="mark {kind}" d="M{x - 4:.1f} {y - 4:.1f}h8v8h-8z"/>'
    if mark == "star":
        turns = [(i * math.pi / 5, 7.5 if i % 2 == 0 else 3.2) for i in range(10)]
        corners = [(x + r * math.sin(a), y - r * math.cos(a)) for a, r in turns]
        return (
            f'<path class="mark {kind}" d="M'
            + "L".join(f"{cx:.1f} {cy:.1f}" for cx, cy in corners)
            + 'z"/>'
        )
    return f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def key_of(line: Line) -> Markup:
    """The sign of a line for a legend."""
    if line.style == "points":
        inner = mark_of(line.mark, 13, 8, f"c{line.colour}")
    else:
        dashed = " dashed" if line.dashed else ""
        inner = f'<path class="line c{line.colour}{dashed}" d="M1 8H25"/>'
    return Markup(f'<svg class="key" aria-hidden="true" viewBox="0 0 26 16">{inner}</svg>')


def spoken(panel: Panel) -> str:
    """What a panel shows, in words: the first and last value of each line."""
    found = []
    for line in panel.lines:
        finite = [v for v in line.y if math.isfinite(v) and line.style != "raw"]
        if len(finite) == 1:
            found.append(f"{line.name}: {short(finite[0])}.")
        elif finite:
            found.append(f"{line.name}: from {short(finite[0])} to {short(finite[-1])}.")
    return " ".join(found)


# ---------------------------------------------------------------------------------------------
# The gallery
# ---------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What a model says to one test query, for the gallery. Grids are uint8 (rows, cols).

    attempts: one or two, in the order of the vote; sources: where each comes from, in words;
    steps: answers of the first and the last planning step, in the first view, n_steps taken;
    refined: (first answer, second answer, was a proposal taken) of that view, None without a
    policy; won, lost: of FLAGS.
    """

    task: Task
    number: int
    attempts: list[Grid]
    sources: list[str]
    steps: tuple[Grid, Grid]
    n_steps: int
    refined: tuple[Grid, Grid, bool] | None = None
    won: bool = False
    lost: bool = False

    @property
    def truth(self) -> Grid | None:
        return self.task.tests[self.number].output

    @property
    def solved(self) -> bool:
        """Whether an attempt is exact; False, too, where the output is not known."""
        truth = self.truth
        return truth is not None and any(np.array_equal(a, truth) for a in self.attempts)


def share_right(grid: Grid, truth: Grid) -> float:
    """Share of right cells, 0 for a wrong size."""
    return float((grid == truth).mean()) if grid.shape == truth.shape else 0.0


def shape_of(grid: Grid) -> str:
    return f"{grid.shape[0]} x {grid.shape[1]}"


def verdict_on(grid: Grid, truth: Grid | None) -> tuple[str, str]:
    """(right, wrong or unknown; what is wrong in words) of an answer."""
    if truth is None:
        return "unknown", "output not known"
    if grid.shape != truth.shape:
        return "wrong", f"size wrong: {shape_of(grid)}, should be {shape_of(truth)}"
    n_wrong = int((grid != truth).sum())
    if not n_wrong:
        return "right", "exact"
    return "wrong", f"{n_wrong} of {grid.size} cells wrong"


def state_of(answer: Answer) -> tuple[str, float]:
    """(one of STATES, share of right cells of the better attempt)."""
    truth = answer.truth
    if truth is None:
        return "unknown", 0.0
    share = max(share_right(a, truth) for a in answer.attempts)
    if answer.solved:
        return "solved", 1.0
    if not any(a.shape == truth.shape for a in answer.attempts):
        return "size", 0.0
    return ("nearly" if share >= NEARLY else "wrong"), share


def changed(before: Grid, after: Grid, truth: Grid | None) -> str:
    """What differs between two answers, in words."""
    if before.shape != after.shape:
        return f"the size changed from {shape_of(before)} to {shape_of(after)}"
    differ = before != after
    n = int(differ.sum())
    if not n:
        return "no cell changed"
    text = f"{counted(n, 'cell')} changed"
    if truth is not None and truth.shape == after.shape:
        mended = int((differ & (after == truth)).sum())
        spoilt = int((differ & (before == truth)).sum())
        text += f": {mended} mended, {spoilt} spoilt"
        text += f", {n - mended - spoilt} wrong before and after" if n > mended + spoilt else ""
    return text


def digits(grid: Grid) -> str:
    """A grid as text: a digit a cell, rows parted by |."""
    return "|".join("".join(map(str, row)) for row in grid.tolist())


def card(answer: Answer) -> Row:
    """One query as the page's script takes it; grids are numbers into its own list `g`."""
    task, truth = answer.task, answer.truth
    known: dict[str, int] = {}

    def number(grid: Grid) -> int:
        return known.setdefault(digits(grid), len(known))

    state, share = state_of(answer)
    shown = task.demonstrations[:SHOWN_DEMONSTRATIONS]
    first, last = answer.steps
    attempts = []
    for grid, source in zip(answer.attempts, answer.sources, strict=True):
        right, words = verdict_on(grid, truth)
        attempts.append({"g": number(grid), "is": right, "says": words, "by": source})
    found: Row = {
        "id": task.task_id,
        "test": answer.number,
        "state": state,
        "share": round(share, 4),
        "says": says(state, share, answer),
        "flags": [name for name in FLAGS if getattr(answer, name)],
        "demos": [
            [number(pair.input), number(pair.output)] for pair in shown if pair.output is not None
        ],
        "more": len(task.demonstrations) - len(shown),
        "query": number(task.tests[answer.number].input),
        "truth": None if truth is None else number(truth),
        "attempts": attempts,
        "steps": {
            "n": answer.n_steps,
            "first": number(first),
            "last": number(last),
            "says": changed(first, last, truth),
            "is": [verdict_on(g, truth)[0] for g in (first, last)],
        },
    }
    if answer.refined is not None:
        before, after, taken = answer.refined
        found["refined"] = {
            "taken": taken,
            "before": number(before),
            "after": number(after),
            "says": changed(before, after, truth) if taken else "the first answer stands",
            "is": [verdict_on(g, truth)[0] for g in (before, after)],
        }
    found["g"] = list(known)
    return found


def says(state: str, share: float, answer: Answer) -> str:
    """The state of a query in words."""
    if state == "solved":
        truth = answer.truth
        assert truth is not None
        first = next(i for i, a in enumerate(answer.attempts) if np.array_equal(a, truth))
        return f"solved in attempt {first + 1}"
    if state == "size":
        return "size wrong"
    if state == "unknown":
        return "no known output"
    return f"{'nearly' if state == 'nearly' else 'not solved'}: {percent(share)} of the cells right"


@dataclass
class Gallery:
    """Answers of one model, and how they were made, in words."""

    answers: list[Answer]
    how: str

    @property
    def filters(self) -> list[tuple[str, str, str, int]]:
        """(key, name, meaning, number of queries) of each filter that finds something."""
        states = [state_of(answer)[0] for answer in self.answers]
        found = [("all", "All", "every query", len(states))]
        found += [(key, *words, states.count(key)) for key, words in STATES.items()]
        for key, words in FLAGS.items():
            found.append((key, *words, sum(getattr(a, key) for a in self.answers)))
        return [row for row in found if row[3] or row[0] in ("all", "solved", "lost")]


# ---------------------------------------------------------------------------------------------
# The page of one run
# ---------------------------------------------------------------------------------------------


def environment() -> Environment:
    """The templates, everything escaped but what is Markup."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.globals |= {
        "source": lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8")),
        "key_of": key_of,
    }
    made.filters |= {"percent": percent, "breaks": breaks}
    return made


def breaks(name: str) -> Markup:
    """A name that may be broken after its underscores."""
    return escape(name).replace("_", Markup("_<wbr>"))


def curves_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each panel with its picture."""
    minutes = max(record.minutes for record in records)
    return [{"panel": p, "svg": draw(p, minutes, "minutes")} for p in panels(records)]


def slices_of(results: Row) -> list[tuple[str, int, int, int, str]]:
    """(name, n, exact in one attempt, in two, share) of the whole and of every slice."""
    found = []
    for name, counts in {"all": results, **part(results, "slices")}.items():
        some = counts if isinstance(counts, dict) else {}
        n, one, two = (figure(some, key) for key in ("n", "exact_at_1", "exact_at_2"))
        if n and one is not None and two is not None:
            found.append((name, int(n), int(one), int(two), percent(two / n)))
    return found


def epochs_of(record: Record) -> list[tuple[str, ...]]:
    """The validation after each epoch, the untrained network's first: the curves as a table."""
    keys = ("val_accuracy", "cell_accuracy", "size_accuracy")
    found = []
    start, n = record.untrained, figure(record.untrained, "n")
    if start and n:
        shares = [(figure(start, "exact_at_1") or 0.0) / n, *(figure(start, k) for k in keys[1:])]
        found.append(("untrained", "-", *(percent(s) for s in shares)))
    for row in record.epochs:
        epoch, minutes = figure(row, "epoch"), figure(row, "minutes")
        found.append(
            (
                "-" if epoch is None else f"{epoch:.0f}",
                "-" if minutes is None else f"{minutes:.1f}",
                *(percent(figure(row, key)) for key in keys),
            )
        )
    if len(found) > 40:  # a page, not a log: metrics.jsonl has all
        found = [*found[:20], ("...",) * 5, *found[-20:]]
    return found


def settings_of(record: Record) -> list[tuple[str, str]]:
    return [(f"--{name}", str(value)) for name, value in sorted(record.arguments.items())]


def about(record: Record) -> dict[str, Any]:
    """What the template says of one run."""
    scores = run_record.headline(record)
    results = record.results
    return {
        "name": record.name,
        "scores": scores,
        "final": next((s for s in scores if s.kind == "final"), None),
        "results": bool(results),
        "size": figure(results, "size_accuracy"),
        "cells": figure(results, "cell_accuracy"),
        "views": run_record.views_line(results),
        "acceptance": results.get("acceptance"),
        "gains": gains_words(results),
        "slices": slices_of(results),
        "facts": run_record.facts(record),
        "summary": run_record.summary_rows(record),
        "fixes": run_record.seven_fixes(record),
        "health": run_record.health_rows(record),
        "few": run_record.few_batches(record),
        "monitored": run_record.was_monitored(record),
        "history": run_record.history(record),
        "has_log": bool(record.log),
        "n_skipped": run_record.n_skipped(record),
        "skipped": run_record.skipped_lines(record)[:20],
        "settings": settings_of(record),
        "epochs": epochs_of(record),
        "minutes": record.minutes,
    }


def gains_words(results: Row) -> str:
    """What the refinements won on the test queries; empty where it was not measured."""
    gains = part(results, "gains")
    reward, cells, n = (figure(gains, key) for key in ("reward", "d_acc", "n"))
    accepted = figure(gains, "accepted")
    if reward is None or cells is None or not n:
        return ""
    text = f"Refinements: reward {reward:+.4f} and cells {cells:+.4f} a query and view"
    return text + ("." if accepted is None else f"; {percent(accepted)} of them accepted.")


def render(record: Record, gallery: Gallery) -> str:
    """The page of one run."""
    cards = [card(answer) for answer in gallery.answers]
    return environment().get_template("run.html").render(
        title=record.name,
        run=about(record),
        curves=curves_of([record]),
        gallery=gallery,
        palette=PALETTE,
        ink=INK,
        cards=cards,
        outcomes=[(one["id"], one["test"], one["says"]) for one in cards],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Two runs
# ---------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Which of the queries that both answered each run solves. only: their names, of A and of B."""

    n: int
    both: int
    neither: int
    only: tuple[list[str], list[str]]
    p: float


def split_of(
    a: dict[str, bool], b: dict[str, bool], mcnemar: Callable[[int, int], float]
) -> Split | None:
    """Two runs' outcomes by query; None where they share no query. mcnemar(won, lost): its p."""
    names = [name for name in a if name in b]
    if not names:
        return None
    only = [name for name in names if a[name] > b[name]], [n for n in names if b[n] > a[n]]
    both = sum(a[name] and b[name] for name in names)
    neither = len(names) - both - len(only[0]) - len(only[1])
    return Split(len(names), both, neither, only, mcnemar(len(only[0]), len(only[1])))


def recorded_outcomes(results: Row) -> dict[str, bool]:
    """Whether each query was exact, by `task, test number`, as `by_task` of results.json says;
    empty where it does not, as of runs of before it was written."""
    found = {}
    for task_id, rows in part(results, "by_task").items():
        for number, row in enumerate(rows if isinstance(rows, list) else ()):
            if isinstance(row, dict) and isinstance(row.get("exact"), bool):
                found[f"{task_id}, test {number}"] = row["exact"]
    return found


def outcomes_of(answers: Iterable[Answer]) -> dict[str, bool]:
    """Whether each query with a known output was solved, by `task, test number`."""
    return {f"{a.task.task_id}, test {a.number}": a.solved for a in answers if a.truth is not None}


# Flags that say where a run is, or what its console shows: no settings to compare.
NO_SETTINGS = {"resume", "config", "runs_dir", "quiet", "checkpoint"}


def differing(a: Row, b: Row, nothing: str) -> list[tuple[str, str, str]]:
    """(name, of A, of B) of what is not the same in two objects of plain values; `nothing` stands
    for None, "-" for what is not there."""

    def word(row: Row, name: str) -> str:
        value = row.get(name, "-")
        return nothing if value is None else str(value)

    names = sorted({*a, *b})
    return [(name, word(a, name), word(b, name)) for name in names if a.get(name) != b.get(name)]


def other_settings(a: Record, b: Record) -> list[tuple[str, str, str]]:
    """Flags, data, versions, commit and device in which two runs differ."""
    flags = [{f"--{k}": v for k, v in r.arguments.items() if k not in NO_SETTINGS} for r in (a, b)]
    rest = [
        {
            "data": part(r.config, "data").get("name"),
            "commit": str(r.config.get("commit") or "-")[:12],
            "device": r.config.get("device"),
            **part(r.config, "versions"),
        }
        for r in (a, b)
    ]
    return [
        *differing(flags[0], flags[1], "not given"),
        *differing(rest[0], rest[1], "-"),
    ]


def side_by_side(a: Record, b: Record) -> list[tuple[str, str, str]]:
    """(what, of A, of B): results of two runs; those that neither has are left out."""
    rows: list[tuple[str, str | None, str | None]] = []

    def add(name: str, read: Callable[[Record], str | None]) -> None:
        rows.append((name, read(a), read(b)))

    def score(name: str, kind: str = "") -> Callable[[Record], str | None]:
        def read(record: Record) -> str | None:
            found = [
                s
                for s in run_record.headline(record)
                if (s.kind == "final" if kind == "final" else s.name == name)
            ]
            return f"{found[0].text} ({percent(found[0].share)})" if found else None

        return read

    def number(key: str, form: str, *path: str) -> Callable[[Record], str | None]:
        def read(record: Record) -> str | None:
            row = record.results
            for name in path:
                row = part(row, name)
            value = figure(row, key)
            return None if value is None else format(value, form)

        return read

    add("Exact in two attempts", score("", "final"))
    add("Exact in one attempt", number("exact_at_1", ".0f"))
    for name in ("Hypotheses alone", "Network alone", "Untrained network", "Trained network"):
        add(name, score(name))
    for name in dict.fromkeys(n for r in (a, b) for n, *_ in slices_of(r.results)[1:]):

        def of_slice(record: Record, name: str = name) -> str | None:
            found = [row for row in slices_of(record.results) if row[0] == name]
            return f"{found[0][3]} of {found[0][1]} ({found[0][4]})" if found else None

        add(f"Slice {name}", of_slice)
    add("Right sizes", number("size_accuracy", ".1%"))
    add("Right cells", number("cell_accuracy", ".1%"))
    add("Reward of refinements, test queries", number("reward", "+.4f", "gains"))
    add("Views a query, really done", number("views_done", ".3g"))
    add("Minutes", lambda record: f"{record.minutes:.1f}")
    add("Batches", lambda record: str(len(record.batches)))
    add("Skipped batches", lambda record: str(run_record.n_skipped(record)))
    return [(name, x or "-", y or "-") for name, x, y in rows if x is not None or y is not None]


def compare(
    records: tuple[Record, Record],
    galleries: tuple[Gallery, Gallery],
    mcnemar: Callable[[int, int], float],
) -> str:
    """The page that sets two runs beside each other. mcnemar: (won, lost) -> p."""
    a, b = records
    recorded = recorded_outcomes(a.results), recorded_outcomes(b.results)
    lacking = [name for name, found in zip("AB", recorded, strict=True) if not found]
    sampled = outcomes_of(galleries[0].answers), outcomes_of(galleries[1].answers)
    return environment().get_template("compare.html").render(
        title=f"{a.name} and {b.name}",
        runs=[about(a), about(b)],
        settings=other_settings(a, b),
        results=side_by_side(a, b),
        curves=curves_of(records),
        final=split_of(recorded[0], recorded[1], mcnemar),
        lacking=lacking,
        sample=split_of(sampled[0], sampled[1], mcnemar),
        how=[gallery.how for gallery in galleries],
        counts=[figure(r.results, "n") for r in records],
    )  # fmt: skip
