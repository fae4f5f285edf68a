"""What a run has written, read for people: scores, health, history, the seven fixes as they showed.

It trusts no file: a missing, cut or damaged one leaves gaps that are said, never a traceback. It
draws nothing and needs the standard library alone. `from run_record import read_record`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from command_line import EXIT_MISSING, UserError, counted
from health import FEW_BATCHES
from persistence.files import read_json
from run_log import read_metrics

LOG_BYTES = 32 << 20  # of a training.log, from its end
LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} (.*)")
RESUME_LINE = re.compile(
    r"Resume: (?P<verdict>\w+) \((?P<why>.*)\) \| from (?P<source>.*?), epoch (?P<epoch>\d+), "
    r"batch (?P<batch>-?\d+)(?: \| batches lost: (?P<lost>\d+))?"
)
SKIPPED_LINE = re.compile(r"\[Batch +(\d+)\] skipped: (.*)")
# How the log says that a process ended; a start without one of these before it was a sudden end.
ENDS = ("Stopped by ", "Final: ", "Nothing is left to train", "results.json stays", "NOT SAVED")
START = "Data:   "  # a banner's first line; notes on how data were found have one space
SHOWN_EVENTS = 60
WATCHED = {"answer_spread", "retrieved_frac"}  # a batch's row has these where a monitor looked

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


@dataclass
class Record:
    """The files of a run that a report reads; `results` is empty before the final evaluation.

    others: rows of metrics.jsonl that are neither batch nor epoch; log: (time, text) of each line
    of training.log.
    """

    folder: Path
    config: Row
    results: Row
    batches: list[Row]
    epochs: list[Row]
    others: list[Row] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's own, also where it was reached by a link such as arc_complete_latest."""
        return self.folder.resolve().name

    @property
    def arguments(self) -> Row:
        return part(self.config, "arguments")

    @property
    def untrained(self) -> Row:
        """Counts of the validation before the first batch; empty where none was recorded."""
        start = next((row for row in self.others if row["kind"] == "start"), {})
        return part(self.results, "untrained") or part(start, "untrained")

    @property
    def minutes(self) -> float:
        """Of all the run's processes, as far as the files tell."""
        rows = [*self.batches, *self.epochs]
        last = max((figure(row, "minutes") or 0.0 for row in rows), default=0.0)
        return max(last, figure(self.results, "minutes") or 0.0)


def read_record(folder: Path) -> Record:
    """Read a run's files. Raises UserError where there is nothing to report on."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        why = "it is not a file" if path.exists() else "there is no such file"
        raise UserError(
            f"{path}: cannot be read ({why}). Give the folder of a run that trained.", EXIT_MISSING
        )
    rows = read_metrics(path)
    batches = [row for row in rows if row["kind"] == "batch"]
    if not batches:
        raise UserError(f"{path}: no batches in it yet. Wait for the first save.", EXIT_MISSING)
    config, results = (read_object(folder / name) for name in ("config.json", "results.json"))
    return Record(
        folder,
        config,
        results,
        batches,
        [row for row in rows if row["kind"] == "epoch"],
        [row for row in rows if row["kind"] not in ("batch", "epoch")],
        read_lines(folder / "training.log"),
    )


def read_object(path: Path) -> Row:
    """The JSON object in a file, empty where there is none to be read."""
    try:
        found = read_json(path)
    except OSError:
        return {}
    return found if isinstance(found, dict) else {}


def read_lines(path: Path) -> list[tuple[str, str]]:
    """(time, text) of a training.log's lines; what is no such line is left out."""
    try:
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            text = file.read(LOG_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    found = (LOG_LINE.fullmatch(line) for line in text.splitlines())
    return [(match[1], match[2]) for match in found if match]


def part(row: Row, key: str) -> Row:
    """An object within an object, empty where there is none."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def figure(row: Row, key: str) -> float | None:
    """A finite number, None where there is none."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def figures(rows: Iterable[Row], key: str) -> list[float]:
    """The finite numbers under a key, in the rows' order."""
    return [value for row in rows if (value := figure(row, key)) is not None]


def points(rows: list[Row], key: str) -> tuple[list[float], list[float]]:
    """(minutes, values) of the rows that have both as numbers; null, not finite, is NaN."""
    some = [row for row in rows if key in row and figure(row, "minutes") is not None]
    some = [row for row in some if row[key] is None or figure(row, key) is not None]
    return (
        [float(row["minutes"]) for row in some],
        [math.nan if row[key] is None else float(row[key]) for row in some],
    )


def smooth(values: list[float], width: int) -> list[float]:
    """Mean of up to `width` values around each, over those that are finite."""
    out = []
    for i in range(len(values)):
        window = values[max(0, i - width // 2) : i + width // 2 + 1]
        finite = [v for v in window if math.isfinite(v)]
        out.append(sum(finite) / len(finite) if finite else math.nan)
    return out


# ---------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------


def percent(share: float | None, places: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{places}f}%"


def ends_of(values: list[float]) -> tuple[float, float]:
    """Means of the first and of the last tenth, at least one value each."""
    n = max(1, len(values) // 10)
    return fmean(values[:n]), fmean(values[-n:])


def summary_rows(record: Record) -> list[tuple[str, str]]:
    """What was run, in a few lines; what an interrupted run has not written is left out."""
    config, arguments = record.config, record.arguments
    data, versions = part(config, "data"), part(config, "versions")
    epoch = figure(record.batches[-1], "epoch")
    batches = counted(len(record.batches), "batch", "batches")
    commit = config.get("commit")
    rows: list[tuple[str, Any]] = [
        ("Data", f"{data['name']}: {data.get('tasks', '?')} tasks" if "name" in data else None),
        ("Language model", _joined(arguments, ("qwen_model", ""), ("qwen_train", "trained: "))),
        ("Agent", _joined(arguments, ("width", "width "), ("planning_steps", "planning steps: "))),
        ("Trained", batches + ("" if epoch is None else f", the last in epoch {epoch:.0f}")),
        ("Commit", str(commit)[:12] if commit else "not a git checkout" if config else None),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or None),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def facts(record: Record) -> list[tuple[str, str]]:
    """What has to stand beside a score: minutes, seed, hardware."""
    config, results, arguments = record.config, record.results, record.arguments
    trained = figure(results, "trained_minutes")
    ended = "" if results else ", up to the last row of metrics.jsonl"
    rows: list[tuple[str, Any]] = [
        ("Minutes, evaluation included" if results else "Minutes", f"{record.minutes:.1f}{ended}"),
        ("Minutes of training", None if trained is None else f"{trained:.1f}"),
        ("Seed", results.get("seed", arguments.get("seed"))),
        ("Hardware", results.get("device", config.get("device"))),
        ("Skipped batches", n_skipped(record)),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _joined(row: Row, *keys: tuple[str, str]) -> str | None:
    return ", ".join(f"{word}{row[key]}" for key, word in keys if row.get(key) is not None) or None


@dataclass
class Score:
    """One line of the headline: `right` of `n` exact; note: what it is, or is not.

    of: how many there are to answer, where only `n` of them were; 0: n is all.
    """

    name: str
    right: int
    n: int
    note: str = ""
    kind: str = ""  # final, part or validation
    of: int = 0

    @property
    def text(self) -> str:
        """`40 of 1076`, or `40 of the 150 that it reached (of 1076)`."""
        if not self.of:
            return f"{self.right} of {self.n}"
        return f"{self.right} of the {self.n} that it reached (of {self.of})"

    @property
    def share(self) -> float:
        return self.right / self.n if self.n else 0.0


def score_of(row: Row, name: str, kind: str, note: str = "", n: float | None = None) -> list[Score]:
    """A score from counts of results.json, none where they lack; n: of all, if not in the row."""
    of = figure(row, "n") if n is None else n
    key = "exact_at_2" if kind != "validation" and "exact_at_2" in row else "exact_at_1"
    right = figure(row, key)
    if not of or right is None:
        return []
    return [Score(name, int(right), int(of), note, kind)]


def headline(record: Record) -> list[Score]:
    """The final score first, then each part alone, then the untrained and the trained network on
    the validation pairs. Those that the run has not recorded are left out."""
    results = record.results
    n = figure(results, "n")
    found = score_of(results, "All together", "final", "two attempts")
    alone = part(results, "alone")
    names = {"hypotheses": "Hypotheses alone", "network": "Network alone"}
    for key in sorted(alone, key=list(names).index if set(alone) <= set(names) else str):
        counts = part(alone, key)
        reached = reached_of(results, key)
        note = "two attempts"
        won, lost, p = (figure(counts, k) for k in ("both_won", "both_lost", "p"))
        if reached is None and won is not None and lost is not None:
            note += f"; together wins {won:.0f} of its misses and loses {lost:.0f} of its hits"
            note += "" if p is None else f" (McNemar p = {p:.2g})"
        of_all = n if reached is None else reached
        for score in score_of(counts, names.get(key, f"{key} alone"), "part", note, of_all):
            found.append(score if reached is None else replace(score, of=int(n or 0)))
    of = "validation pairs, one view, one attempt"
    found += score_of(record.untrained, "Untrained network", "validation", of)
    trained = part(results, "validated")
    if not trained and record.epochs and record.untrained:
        last, n_val = record.epochs[-1], figure(record.untrained, "n")
        share = figure(last, "val_accuracy")
        if share is not None and n_val:
            trained = {"n": n_val, "exact_at_1": round(share * n_val)}
    return found + score_of(trained, "Trained network", "validation", of)


REACHED = {"network": "network_queries", "hypotheses": "hypothesis_queries"}


def reached_of(results: Row, name: str) -> int | None:
    """How many queries the time let the network or the hypotheses look at, where those are not all;
    None where they are, or where the file does not say so."""
    n, own = figure(results, "n"), figure(results, REACHED.get(name, ""))
    return None if n is None or own is None or own >= n else int(own)


def views_line(results: Row) -> str:
    """How many views really voted in the final evaluation."""
    done, most = figure(results, "views_done"), figure(results, "views")
    if done is not None:
        asked = "" if most is None else f" of the {most:.0f} that were allowed"
        return f"{done:.2g} views a query voted on average{asked}"
    if most is not None:
        return f"up to {most:.0f} views voted; how many really did was not recorded"
    return "how many views voted was not recorded"


# ---------------------------------------------------------------------------------------------
# The seven fixes, as they showed in this run
# ---------------------------------------------------------------------------------------------


@dataclass
class Fix:
    """One of docs/ALL_7_FIXES_EXPLAINED.md. state: seen, off, missing (of the files) or doubtful;
    evidence: what the run's own figures say."""

    title: str
    state: str
    evidence: str


def seven_fixes(record: Record) -> list[Fix]:
    """Each fix with what metrics.jsonl and config.json show of it in this run."""
    rows, flags = record.batches, record.arguments
    return [
        _language_model(rows, flags),
        _reward_in_loss(rows, flags),
        _hard_cells(rows, flags),
        _sizes_first(rows),
        _memory(rows, flags),
        _better_is_positive(rows, record.results, flags),
        _stable_steps(record),
    ]


def _missing(title: str, *keys: str) -> Fix:
    return Fix(title, "missing", f"metrics.jsonl of this run does not record {' or '.join(keys)}.")


def _language_model(rows: list[Row], flags: Row) -> Fix:
    title = "1. The language model trains"
    norms = figures(rows, "qwen_grad")
    if not norms:
        return _missing(title, "qwen_grad")
    moving = [v for v in norms if v > 0]
    text = f"Gradient above 0 in {len(moving)} of {counted(len(norms), 'batch', 'batches')}"
    if moving:
        text += f", median {median(moving):.2g}"
    rates = figures(rows, "qwen_lr")
    text += f"; highest learning rate {max(rates):.2g}." if rates else "."
    if flags.get("qwen_train") == "frozen" or (rates and max(rates) == 0):
        why = "--qwen_train frozen" if flags.get("qwen_train") == "frozen" else "its rate is 0"
        return Fix(title, "off", f"{text} It does not train: {why}.")
    return Fix(title, "seen" if 2 * len(moving) >= len(norms) else "doubtful", text)


def _reward_in_loss(rows: list[Row], flags: Row) -> Fix:
    title = "2. The loss means solving"
    soft, hard = figures(rows, "soft_reward"), figures(rows, "reward")
    if not soft or not hard:
        return _missing(title, "soft_reward", "reward")
    text = (
        f"Reward of the refinement {fmean(hard):+.4f} on average, {ends_of(hard)[1]:+.4f} in the "
        f"last tenth; its soft form, which carries gradient, {fmean(soft):+.4f}."
    )
    if flags.get("no_reward"):
        return Fix(title, "off", f"{text} It was kept out of the loss: --no_reward.")
    if flags.get("policy") == "off":
        return Fix(title, "off", f"{text} Nothing was refined: --policy off.")
    return Fix(title, "seen" if any(soft) else "doubtful", text)


def _hard_cells(rows: list[Row], flags: Row) -> Fix:
    title = "3. Wrong cells count more"
    shares = figures(rows, "mask_ratio")
    if not shares:
        return _missing(title, "mask_ratio")
    first, last = ends_of(shares)
    text = (
        f"Share of wrong cells {percent(first)} in the first tenth of the batches, {percent(last)} "
        "in the last; a wrong cell weighs 1 / that share."
    )
    off = bool(flags.get("no_hard_cells"))
    return Fix(title, "off" if off else "seen", text + (" Off: --no_hard_cells." if off else ""))


def _sizes_first(rows: list[Row]) -> Fix:
    title = "4. Sizes first"
    by_epoch: dict[int, float] = {}
    for row in rows:
        epoch, weight = figure(row, "epoch"), figure(row, "size_weight")
        if epoch is not None and weight is not None:
            by_epoch[int(epoch)] = weight
    if not by_epoch:
        return _missing(title, "size_weight")
    shown = list(by_epoch.items())[:4]
    text = "Weight of the size loss " + ", ".join(f"{w:.3f} in epoch {e}" for e, w in shown)
    text += ", then the last." if len(by_epoch) > len(shown) else "."
    sizes = figures(rows, "size")
    if sizes:
        first, last = ends_of(sizes)
        text += f" Right sizes in training {percent(first)} at first, {percent(last)} at last."
    return Fix(title, "seen" if by_epoch.get(0, 1.0) > 0 else "doubtful", text)


def _memory(rows: list[Row], flags: Row) -> Fix:
    title = "5. The memory fills"
    stored, levels = figures(rows, "stored"), figures(rows, "threshold")
    if not stored or not levels:
        return _missing(title, "stored", "threshold")
    filling = sum(n > 0 for n in stored)
    text = (
        f"{sum(stored):.0f} times a task was above the threshold, in {filling} of "
        f"{counted(len(stored), 'batch', 'batches')}; threshold {levels[0]:.3f} at first, "
        f"{levels[-1]:.3f} at last."
    )
    if flags.get("no_memory"):
        return Fix(title, "off", f"{text} Nothing was kept: --no_memory.")
    return Fix(title, "seen" if filling else "doubtful", text)


def _better_is_positive(rows: list[Row], results: Row, flags: Row) -> Fix:
    title = "6. Better is positive"
    if not figures(rows, "d_acc"):
        return _missing(title, "d_acc")
    both = [(figure(row, "d_acc"), figure(row, "reward")) for row in rows]
    known = [(d, r) for d, r in both if d is not None and r is not None]
    won = [r for d, r in known if d > 1e-6]
    lost = [r for d, r in known if d < -1e-6]
    text = (
        f"Cells won (d_acc) {fmean(figures(rows, 'd_acc')):+.4f} a batch on average. Where cells "
        f"were won, the reward was positive in {sum(r > 0 for r in won)} of "
        f"{counted(len(won), 'batch', 'batches')}; where they were lost, negative in "
        f"{sum(r < 0 for r in lost)} of {len(lost)}."
    )
    gain = figure(part(results, "gains"), "d_acc")
    if gain is not None:
        text += f" On the test queries {gain:+.4f} a query and view."
    if flags.get("policy") == "off":
        return Fix(title, "off", f"{text} Nothing was refined: --policy off.")
    right = sum(r > 0 for r in won) + sum(r < 0 for r in lost)
    if not won and not lost:
        return Fix(title, "doubtful", text + " No batch won or lost a cell.")
    return Fix(title, "seen" if 2 * right >= len(won) + len(lost) else "doubtful", text)


def _stable_steps(record: Record) -> Fix:
    title = "7. Stable steps"
    bad = n_skipped(record)
    losses, norms = figures(record.batches, "loss"), figures(record.batches, "agent_grad")
    text = f"{counted(bad, 'batch', 'batches')} skipped of {len(record.batches)}"
    if losses:
        text += f"; largest loss {max(losses):.3g}"
    if norms:
        text += f"; largest gradient norm of the agent after clipping {max(norms):.3g}"
    clip = record.arguments.get("clip")
    text += "." if clip is None else f" (--clip {clip})."
    return Fix(title, "seen" if bad <= len(record.batches) // 100 else "doubtful", text)


def skipped_lines(record: Record) -> list[tuple[str, str]]:
    """(time, what was wrong) of every skipped batch that training.log tells of."""
    found = []
    for when, text in record.log:
        match = SKIPPED_LINE.match(text)
        if match:
            found.append((when, f"batch {match[1]}: {match[2]}"))
    return found


def n_skipped(record: Record) -> int:
    """Batches whose loss or gradient was not finite, as far as the files tell."""
    of_epochs = int(max(figures(record.epochs, "skipped"), default=0))
    null = sum("loss" in row and row["loss"] is None for row in record.batches)
    return max(of_epochs, null, len(skipped_lines(record)))


# ---------------------------------------------------------------------------------------------
# Health, and what happened
# ---------------------------------------------------------------------------------------------


def health_rows(record: Record) -> list[Row]:
    """The findings of the health monitor, as texts: name, where, value, message, fix; note: it is
    so by choice, and no warning."""
    found = []
    for row in record.others:
        if row["kind"] != "health":
            continue
        epoch, batch = figure(row, "epoch"), figure(row, "batch")
        where = "" if epoch is None or epoch < 0 else f"epoch {epoch:.0f}"
        where += "" if batch is None or batch < 0 else f", batch {batch:.0f}"
        value = figure(row, "value")
        found.append(
            {
                "name": str(row.get("name", "warning")),
                "where": where.strip(", ") or "-",
                "value": "" if value is None else f"{value:.4g}",
                "message": str(row.get("message", "")),
                "fix": str(row.get("fix", "")),
                "note": row.get("level") == "note",
            }
        )
    return found


def few_batches(record: Record) -> str:
    """That too few batches were trained, or yet; empty where there were enough."""
    n = len(record.batches)
    if n >= FEW_BATCHES:
        return ""
    so_far = "" if record.results else " so far"
    return f"{counted(n, 'batch', 'batches')}{so_far}: too few to learn from"


def was_monitored(record: Record) -> bool:
    """Whether the files say that the run had a health monitor: rows of it, or figures that are
    there for it alone. Of a run by several versions the newest counts."""
    rows = any(row["kind"] == "health" for row in record.others)
    return rows or bool(WATCHED & set(record.batches[-1]))


@dataclass
class Event:
    """Something that happened to a run. kind: start, resume, end, sudden or trouble."""

    when: str
    kind: str
    text: str


def history(record: Record) -> list[Event]:
    """Starts, resumes and ends of the run's processes, as training.log tells them, oldest first.

    A start that follows no end means that the process before it went without a word.
    """
    found: list[Event] = []
    running, last = False, ""
    for when, text in record.log:
        resumed = RESUME_LINE.match(text)
        if text.startswith(START):
            if running:
                found.append(
                    Event(
                        last,
                        "sudden",
                        "The last line of a process that ended without saying so: "
                        "killed, broken off by an error, or its machine was gone",
                    )
                )
            found.append(Event(when, "start", "A process started"))
            running = True
        elif resumed:
            lost, batch = resumed["lost"], int(resumed["batch"])
            place = f"after batch {batch}" if batch >= 0 else "before the first batch"
            told = f"Resumed {resumed['verdict']} from {resumed['source']}, {place} of epoch "
            told += resumed["epoch"] + ("" if lost is None else f"; batches lost: {lost}")
            found.append(Event(when, "resume", f"{told}. {resumed['why']}"))
        elif text.startswith("Resume: "):
            found.append(Event(when, "resume", text))
        elif text.startswith(ENDS):
            kind = "trouble" if text.startswith("NOT SAVED") else "end"
            found.append(Event(when, kind, text.split(" Go on with:")[0]))
            running = False
        elif "was not written" in text or "Set aside in" in text:
            found.append(Event(when, "trouble", text))
        last = when
    if running:
        found.append(Event(last, "sudden", "The last line so far: it goes on, or was killed"))
    if len(found) > SHOWN_EVENTS:
        left = len(found) - SHOWN_EVENTS
        note = Event("", "trouble", f"{left} events between these are left out here")
        found = [*found[: SHOWN_EVENTS // 2], note, *found[-SHOWN_EVENTS // 2 :]]
    return found
