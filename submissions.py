"""Kaggle's submission.json: read, checked to the last cell, and scored, without a model.

A submission is `{task id: [{"attempt_1": grid, "attempt_2": grid}, one per test input]}`. Scores
are Kaggle's (the share of test outputs that one of the two attempts has exactly right) and
arcprize.org's (the same share within each task, and the mean of that over tasks). Reads one file,
writes none, prints nothing. Needs the standard library alone.
`from submissions import check, read_submission, score`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import EXIT_MISSING, UserError, counted
from persistence.files import MAX_JSON_BYTES, REAL_FS, CorruptCheckpointError, open_reader

if TYPE_CHECKING:
    from dataset_arc import Task

Key = tuple[str, int]  # task id, number of the test input
Grid = list[list[int]]
Answers = dict[str, list[dict[str, Grid]]]

ATTEMPTS = ("attempt_1", "attempt_2")
MAX_SIDE, COLOURS = 30, 10
MOST_SHOWN = 200  # problems in one message


def named(text: str, most: int = 40) -> str:
    """An id or key of a file nobody has checked, for a message: short, on one line, and in ASCII,
    so that any terminal can show it."""
    plain = text if text.isascii() and text.isprintable() and text else ascii(text)
    return plain if len(plain) <= most else plain[: most - 2] + ".."


def shown(value: object) -> str:
    """A value of such a file, likewise."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    return named(ascii(value) if isinstance(value, str) else json.dumps(value))


# ---------------------------------------------------------------------------------------------
# Reading and checking
# ---------------------------------------------------------------------------------------------


class _Twice(dict[str, Any]):
    """A JSON object that has a key more than once, and which."""

    key = ""


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) == len(items):
        return found
    seen: set[str] = set()
    twice = _Twice(found)
    for key, _ in items:
        if key in seen:
            twice.key = key
            break
        seen.add(key)
    return twice


def read_submission(path: str | Path) -> Any:
    """The JSON in a file, unchecked. Raises UserError (exit 3) where there is none to be had."""

    def refused(why: str) -> UserError:
        return UserError(f"{path}: {why}. Give a submission.json.", EXIT_MISSING)

    try:
        with open_reader(REAL_FS, Path(path)) as (reader, size):
            if size > MAX_JSON_BYTES:
                raise refused(f"{size / 1e6:.0f} MB, which no submission has")
            return json.loads(reader.read().decode("utf-8-sig"), object_pairs_hook=_object)
    except OSError as error:
        raise refused(f"cannot be read ({error.strerror or error})") from error
    except CorruptCheckpointError as error:
        raise refused("not a regular file") from error
    except (ValueError, RecursionError) as error:
        raise refused(f"not JSON ({' '.join(str(error).split())})") from error


def check(raw: Any, tasks: Sequence[Task]) -> list[str]:
    """Everything that is wrong with a parsed submission for these tasks, a line each with its path,
    counted from 0: `task 007bbfb7, test 0, attempt_2, row 3: 4 cells, 3 in the rows before`. Empty
    if it is valid; then it is of the type `Answers`."""
    return list(_problems(raw, tasks))


def _problems(raw: Any, tasks: Sequence[Task]) -> Iterator[str]:
    if not isinstance(raw, dict):
        yield f"{shown(raw)}: not an object of answers by task id"
        return
    if isinstance(raw, _Twice):
        yield f"task {named(raw.key)}: twice in the file"
    n_tests = {task.task_id: len(task.tests) for task in tasks}
    for task_id in raw:
        if task_id not in n_tests:
            yield f"task {named(task_id)}: not one of the tasks of the data"
    for task_id, n in n_tests.items():
        if task_id in raw:
            yield from _problems_of_task(f"task {named(task_id)}", raw[task_id], n)
        else:
            yield f"task {named(task_id)}: missing"


def _problems_of_task(where: str, answers: Any, n_tests: int) -> Iterator[str]:
    if not isinstance(answers, list):
        yield f"{where}: {shown(answers)} is not a list with an object for each test input"
        return
    if len(answers) != n_tests:
        yield f"{where}: answers {counted(len(answers), 'test input')}, the task has {n_tests}"
    for i, answer in enumerate(answers):
        at = f"{where}, test {i}"
        if not isinstance(answer, dict):
            yield f"{at}: {shown(answer)} is not an object with attempt_1 and attempt_2"
            continue
        if isinstance(answer, _Twice):
            yield f"{at}: {named(answer.key)} twice"
        for name in ATTEMPTS:
            if name in answer:
                yield from _problems_of_grid(f"{at}, {name}", answer[name])
            else:
                yield f"{at}, {name}: missing"
        for name in answer:
            if name not in ATTEMPTS:
                yield f"{at}, {named(name)}: unknown; there are attempt_1 and attempt_2"


def _problems_of_grid(where: str, grid: Any) -> Iterator[str]:
    if not isinstance(grid, list) or not grid:
        yield f"{where}: {shown(grid)} is not a grid, a list of rows"
        return
    if len(grid) > MAX_SIDE:
        yield f"{where}: {len(grid)} rows, more than {MAX_SIDE}"
    width: int | None = None
    for r, row in enumerate(grid):
        at = f"{where}, row {r}"
        if not isinstance(row, list) or not row:
            yield f"{at}: {shown(row)} is not a row, a list of colours"
            continue
        if len(row) > MAX_SIDE and width != len(row):
            yield f"{at}: {len(row)} cells, more than {MAX_SIDE}"
        if width is not None and len(row) != width:
            yield f"{at}: {counted(len(row), 'cell')}, {width} in the rows before"
        width = len(row) if width is None else width
        for c, cell in enumerate(row):
            if type(cell) is not int or not 0 <= cell < COLOURS:
                yield f"{at}, cell {c}: {shown(cell)} is not a colour, a whole number in 0..9"


def checked(path: str | Path, tasks: Sequence[Task], others: Iterable[Task] = ()) -> Answers:
    """The submission in a file. Raises UserError (exit 3) with every problem, up to MOST_SHOWN.

    others: the tasks of the data's other split; whether the file answers those is said.
    """
    raw = read_submission(path)
    problems = check(raw, tasks)
    if not problems:
        return raw
    lines = [f"{path}: not a valid submission, {counted(len(problems), 'problem')}:"]
    lines += [f"  {problem}" for problem in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        lines.append(f"  and {len(problems) - MOST_SHOWN} more")
    ids = {task.task_id for task in others}
    if isinstance(raw, dict) and raw and ids >= set(raw):
        lines.append("All its tasks are of the other --split of the data.")
    raise UserError("\n".join(lines), EXIT_MISSING)


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How one answer compares with the known output: attempt 1 exact; attempt 2 exact and not
    attempt 1; attempt 1 of the right size; its share of right cells, 0 for a wrong size."""

    attempt_1: bool
    attempt_2: bool
    size: bool
    cells: float

    @property
    def exact(self) -> bool:
        """Whether one of the two attempts is exact."""
        return self.attempt_1 or self.attempt_2

    def row(self) -> dict[str, Any]:
        """For a file: its fields, and `exact`."""
        return {**asdict(self), "exact": self.exact}


def counts(some: Sequence[Outcome]) -> dict[str, int]:
    """How many, and how many of them are exact in one attempt and in one of two."""
    return {
        "n": len(some),
        "exact_at_1": sum(o.attempt_1 for o in some),
        "exact_at_2": sum(o.exact for o in some),
    }


def outcome(answer: Mapping[str, Grid], output: Grid) -> Outcome:
    """One answer of a valid submission beside the known output."""
    first, second = (answer[name] for name in ATTEMPTS)
    size = (len(first), len(first[0])) == (len(output), len(output[0]))
    right = sum(a == b for row, true in zip(first, output) for a, b in zip(row, true))  # noqa: B905
    cells = right / (len(output) * len(output[0])) if size else 0.0
    return Outcome(first == output, first != output and second == output, size, cells)


def outcomes(answers: Answers, tasks: Iterable[Task]) -> dict[str, list[Outcome | None]]:
    """By task id, in the order of its tests; None where the output is not known."""
    return {
        task.task_id: [
            None if pair.output is None else outcome(answer, pair.output.tolist())
            for pair, answer in zip(task.tests, answers[task.task_id], strict=True)
        ]
        for task in tasks
    }


def score(
    answers: Answers,
    tasks: Sequence[Task],
    slices: Mapping[str, AbstractSet[Key]] | None = None,
) -> dict[str, Any]:
    """The figures of a valid submission, over test outputs that are known.

    `n`, `exact_at_1`, `exact_at_2` (Kaggle's score is exact_at_2 / n), `size_accuracy`,
    `cell_accuracy` (of attempt 1; 0 for a wrong size); `tasks` with a known output, `tasks_solved`:
    every known output of them exact; `task_mean`: arcprize.org's score, in [0, 1]; `unknown` test
    inputs; the three counts per slice; `by_task`: each `Outcome`, None where nothing is known.
    """
    found = outcomes(answers, tasks)
    known = {task_id: [o for o in some if o is not None] for task_id, some in found.items()}
    known = {task_id: some for task_id, some in known.items() if some}
    rows = [o for some in known.values() for o in some]

    def of_slice(keys: AbstractSet[Key]) -> list[Outcome]:
        numbered = ((key[0], key[1]) for key in keys if key[0] in found)
        return [o for task_id, i in numbered if (o := found[task_id][i]) is not None]

    n = max(1, len(rows))
    shares = [sum(o.exact for o in some) / len(some) for some in known.values()]
    return {
        **counts(rows),
        "size_accuracy": sum(o.size for o in rows) / n,
        "cell_accuracy": sum(o.cells for o in rows) / n,
        "tasks": len(known),
        "tasks_solved": sum(all(o.exact for o in some) for some in known.values()),
        "task_mean": sum(shares) / max(1, len(shares)),
        "slices": {name: counts(of_slice(keys)) for name, keys in (slices or {}).items()},
        "unknown": sum(o is None for some in found.values() for o in some),
        "by_task": {
            task_id: [None if o is None else o.row() for o in some]
            for task_id, some in found.items()
        },
    }


# ---------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------


def outcome_words(found: Mapping[str, Any] | None) -> str:
    """One entry of `score`'s by_task."""
    if found is None:
        return "no known output"
    if found["exact"]:
        return f"exact in attempt {1 if found['attempt_1'] else 2}"
    if not found["size"]:
        return "wrong size"
    wrong = 100 * (1 - found["cells"])
    return f"{wrong:.1f}% of cells wrong" if wrong >= 0.1 else "less than 0.1% of cells wrong"


def task_lines(by_task: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> list[str]:
    """A line per task with each of its outputs: those without a known output first, then by the
    share of outputs that are exact, solved ones last."""

    def rank(task_id: str) -> tuple[float, str]:
        scored = [o for o in by_task[task_id] if o is not None]
        share = sum(o["exact"] for o in scored) / len(scored) if scored else -1.0
        return share, task_id

    lines = []
    for task_id in sorted(by_task, key=rank):
        scored = [o for o in by_task[task_id] if o is not None]
        right = sum(o["exact"] for o in scored)
        mark = "" if right < len(scored) else "solved" if scored else "unknown"
        words = (f"test {i}: {outcome_words(o)}" for i, o in enumerate(by_task[task_id]))
        lines.append(f"{task_id:<10} {mark:<7} {right}/{len(scored)}  " + "; ".join(words))
    return lines


def total_lines(figures: Mapping[str, Any]) -> list[str]:
    """The lines that end a scoring, from `score`."""
    n, unknown = figures["n"], figures["unknown"]
    if unknown == 1 and not n:
        return ["Nothing to score: the test input has no known output."]
    if not n:
        return [f"Nothing to score: none of the {unknown} test inputs has a known output."]
    share, mean = 100 * figures["exact_at_2"] / n, 100 * figures["task_mean"]
    size, cells = 100 * figures["size_accuracy"], 100 * figures["cell_accuracy"]
    lines = [
        f"Outputs: {figures['exact_at_2']}/{n} exact in two attempts ({share:.2f}%, Kaggle's "
        f"score), {figures['exact_at_1']} in one",
        f"         size right {size:.1f}%, cells {cells:.1f}%",
        f"Tasks:   {figures['tasks_solved']}/{figures['tasks']} solved, that is with every known "
        "output exact",
        f"         mean of the tasks' own shares {mean:.2f}% (arcprize.org's score)",
    ]
    if unknown:
        lines.append(f"Not scored: {counted(unknown, 'test input')} without a known output")
    for name, c in figures["slices"].items():
        lines.append(f"  {name:<11} {c['exact_at_2']}/{c['n']}  ({c['exact_at_1']} in one)")
    return lines
