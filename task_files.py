"""Files that may hold tasks: of a folder, of a zip archive; and what a file is that is not JSON.

Names and bytes go in, parsed JSON comes out; which of it is a task, `dataset_arc` says. Nothing is
unpacked to the disk, nothing printed; what cannot be used is a `DataError` of one line. The
standard library alone. `from task_files import open_tree, layout, parse_json`.
"""

from __future__ import annotations

import json
import lzma
import os
import stat
import zipfile
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

Split = Literal["train", "evaluation"]

MAX_ENTRIES = 250_000  # files and folders that are looked at below one folder, or in one archive
MAX_DEPTH = 12  # folders within folders
MAX_BYTES = 1 << 30  # of one file; all JSON files of an archive: four times as much
# What a folder of this name holds, where it lies beside nothing or beside its like.
SPLIT_FOLDERS: dict[str, Split] = {
    "training": "train",
    "train": "train",
    "evaluation": "evaluation",
    "eval": "evaluation",
}
NAMED_FILES = ("training.json", "evaluation.json")
# Of a file that is not JSON: its first bytes, what it is, what to do.
FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", "give it by its name, or unpack it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it (tar -xzf, or gunzip) and give what is in it"),
    (b"BZh", "a bzip2 archive", "unpack it and give what is in it"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it and give what is in it"),
    (b"(\xb5/\xfd", "a Zstandard archive", "unpack it and give what is in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and give what is in it"),
    (b"Rar!", "a rar archive", "unpack it and give what is in it"),
    (b"PAR1", "a Parquet table", "save its tasks as ARC's JSON"),
    (b"ARROW1", "an Arrow table", "save its tasks as ARC's JSON"),
    (b"SQLite format 3", "an SQLite database", "save its tasks as ARC's JSON"),
    (b"\x89HDF", "an HDF5 file", "save its tasks as ARC's JSON"),
    (b"\x93NUMPY", "a NumPy array", "save its tasks as ARC's JSON"),
    (b"\x80", "a Python pickle", "save its tasks as ARC's JSON"),
    (b"%PDF", "a PDF", "give a file of ARC tasks"),
    (b"\x89PNG", "a picture", "give a file of ARC tasks"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run git lfs pull"),
)
# Names that say that a folder holds something, though no JSON.
KNOWN_SUFFIXES = frozenset(
    (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar", ".parquet", ".arrow",
     ".csv", ".jsonl", ".npz", ".npy", ".pkl", ".h5")
)  # fmt: skip


class DataError(Exception):
    """Data that cannot be used: one line saying what, where and how to fix it.

    Pairs and cells are named as in the JSON file, counted from 0: `train[1].output[0][2]`.
    """


def one_line(text: str) -> str:
    """The text with what cannot be printed escaped, as of a file's name."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    )


def some(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", .." if len(names) > 3 else "")


# ---------------------------------------------------------------- folders and archives


@dataclass
class Tree:
    """The JSON files below a folder, or in a zip archive.

    names: their paths from `root`, with slashes, sorted. foreign: names of files that hold
    something else. closed: folders and files that could not be looked at, a line each.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    _readers: dict[str, Callable[[], bytes]] = field(default_factory=dict, repr=False)

    def label(self, name: str) -> str:
        """The file's name for a message."""
        return one_line(str(self.root / name))

    def parse(self, name: str) -> Any:
        """The file's JSON. Raises DataError."""
        return parse_json(self._readers[name](), self.label(name))

    def add(self, name: str, read: Callable[[], bytes]) -> None:
        """Take a file in by its name; JSON can then be read."""
        suffix = PurePosixPath(name).suffix.lower()
        if suffix == ".json":
            self._readers[name] = read
        elif suffix in KNOWN_SUFFIXES:
            self.foreign.append(name)

    def sort(self) -> None:
        """Bring the names into their order, which the file system does not decide."""
        self.names = sorted(self._readers)
        self.foreign.sort()

    def nothing(self) -> DataError:
        """What to say of a tree without JSON files."""
        what = "no task files; give a folder that holds ARC JSON files"
        if self.foreign:
            what += f" (there are {some([one_line(name) for name in self.foreign])}: "
            what += "give a zip archive by its own name, unpack others)"
        if self.closed:
            what += f" ({self.closed[0]})"
        return DataError(f"{one_line(str(self.root))}: {what}")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _too_many(root: Path) -> DataError:
    return DataError(
        f"{root}: more than {MAX_ENTRIES} files and folders; give the folder that holds the tasks"
    )


def read_file(path: Path) -> bytes:
    """The file's bytes. Raises DataError where it cannot be read or is larger than MAX_BYTES."""
    label = one_line(str(path))
    try:
        about = path.stat()
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISFIFO(about.st_mode)):
            raise DataError(f"{label}: neither a file nor a folder; give a JSON file or a folder")
        if about.st_size > MAX_BYTES:
            raise DataError(
                f"{label}: {about.st_size / 2**30:.1f} GiB, more than one file may have; "
                "give its tasks in several files"
            )
        return path.read_bytes()
    except OSError as e:
        raise DataError(f"{label}: cannot be read ({e.strerror}); check the path and rights") from e


def _folder(root: Path) -> Tree:
    tree = Tree(root)
    n, seen = 0, set()
    waiting: list[tuple[Path, str, int]] = [(root, "", 0)]
    while waiting:
        folder, prefix, depth = waiting.pop()
        try:
            about = folder.stat()
            if (about.st_dev, about.st_ino) in seen:  # a link back, or two links to one folder
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    n += 1
                    if n > MAX_ENTRIES:
                        raise _too_many(root)
                    name = prefix + entry.name
                    if _hidden(entry.name):
                        continue
                    try:
                        is_folder, is_file = entry.is_dir(), entry.is_file()
                    except OSError as e:  # a link that leads to itself
                        tree.closed.append(f"{tree.label(name)}: cannot be opened ({e.strerror})")
                        continue
                    if is_folder:
                        if depth < MAX_DEPTH:
                            waiting.append((Path(entry.path), name + "/", depth + 1))
                        else:
                            tree.closed.append(
                                f"{tree.label(name)}: deeper than {MAX_DEPTH} folders"
                            )
                    elif is_file:
                        tree.add(name, partial(read_file, Path(entry.path)))
        except OSError as e:
            if folder == root:
                raise DataError(
                    f"{one_line(str(root))}: cannot be opened ({e.strerror}); check the rights"
                ) from e
            tree.closed.append(f"{tree.label(prefix)}: cannot be opened ({e.strerror})")
    return tree


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, label: str) -> bytes:
    try:
        return archive.read(info)
    except (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError,
        NotImplementedError, RuntimeError,
    ) as e:  # fmt: skip
        cause = " ".join(str(e).split())
        raise DataError(
            f"{label}: cannot be unpacked ({cause}); unpack the archive yourself"
        ) from e


def _archive(path: Path, archive: zipfile.ZipFile) -> Tree:
    tree, n_bytes = Tree(path), 0
    members = archive.infolist()
    if len(members) > MAX_ENTRIES:
        raise _too_many(path)
    for info in members:
        parts = PurePosixPath(info.filename).parts
        if info.is_dir() or any(map(_hidden, parts)):
            continue
        name = "/".join(parts)
        if len(parts) > MAX_DEPTH + 1:
            tree.closed.append(f"{tree.label(name)}: deeper than {MAX_DEPTH} folders")
            continue
        if name.lower().endswith(".json"):
            n_bytes += info.file_size
            if info.file_size > MAX_BYTES or n_bytes > 4 * MAX_BYTES:
                raise DataError(
                    f"{one_line(str(path))}: its JSON files have more than "
                    f"{(MAX_BYTES if info.file_size > MAX_BYTES else 4 * MAX_BYTES) >> 30} GiB; "
                    "unpack it and give a part"
                )
        tree.add(name, partial(_read_member, archive, info, one_line(str(path / name))))
    return tree


@contextmanager
def open_tree(path: Path) -> Iterator[Tree]:
    """The tree of a folder or of a zip archive, readable within the block.

    Hidden files and folders are passed over; links are followed, each folder once. Raises
    DataError where it cannot be opened, or holds more than MAX_ENTRIES.
    """
    if path.is_dir():
        tree = _folder(path)
        tree.sort()
        yield tree
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        cause = " ".join(str(e).split())
        raise DataError(
            f"{one_line(str(path))}: a damaged zip archive ({cause}); fetch it again"
        ) from e
    with archive:
        tree = _archive(path, archive)
        tree.sort()
        yield tree


def is_zip(path: Path) -> bool:
    """Whether the file is a zip archive, by its first bytes."""
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(4) == b"PK\x03\x04"
    except OSError:
        return False  # who reads it next says why


# ---------------------------------------------------------------- which files are read


@dataclass
class Layout:
    """Which files of a tree are read. Splits are by name; None: the file decides.

    solutions: challenges file -> its solutions file. spare: why a file is not read, by its name.
    """

    read: list[tuple[str, Split | None]] = field(default_factory=list)
    solutions: dict[str, str] = field(default_factory=dict)
    spare: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def layout(names: Iterable[str], root_name: str = "") -> Layout:
    """Which of these files are read, as they lie.

    The uppermost folders that hold `training` and `evaluation` folders, Kaggle's challenges or
    training.json and evaluation.json decide, in this order, and only what these name is read;
    without such a folder everything is, as evaluation tasks in a folder of this name.
    """
    names = sorted(names)
    files: dict[str, list[str]] = {}
    folders: dict[str, set[str]] = {}
    for name in names:
        *above, file = name.split("/")
        files.setdefault("/".join(above), []).append(file)
        for i in range(len(above)):
            folders.setdefault("/".join(above[:i]), set()).add(above[i])

    def decides(folder: str) -> bool:
        here = files.get(folder, ())
        return bool(
            folders.get(folder, set()) & set(SPLIT_FOLDERS)
            or any(_challenges(file) or file in NAMED_FILES for file in here)
        )

    found = Layout()
    deciding = sorted(filter(decides, {*files, *folders}), key=lambda f: (_depth(f), f))
    for folder in deciding:
        if _depth(folder) > _depth(deciding[0]):
            break
        prefix = folder + "/" if folder else ""
        parts = [part for part in SPLIT_FOLDERS if part in folders.get(folder, ())]
        here = files.get(folder, [])
        if parts:
            for part in parts:
                begin = bisect_left(names, f"{prefix}{part}/")
                end = bisect_left(names, f"{prefix}{part}0", begin)  # 0 is what follows a slash
                found.read += [(name, SPLIT_FOLDERS[part]) for name in names[begin:end]]
        else:
            _read_combined(found, prefix, here)
    if not deciding:
        split: Split = SPLIT_FOLDERS.get(root_name, "train")
        found.read = [(name, None if split == "train" else split) for name in names]
    taken = {name for name, _ in found.read} | set(found.solutions.values()) | set(found.spare)
    found.unread = [name for name in names if name not in taken]
    return found


def _read_combined(found: Layout, prefix: str, here: list[str]) -> None:
    chosen = [file for file in here if _challenges(file)] or [f for f in here if f in NAMED_FILES]
    if any("evaluation" in file for file in chosen):
        spare = [file for file in chosen if "test" in file]
        chosen = [file for file in chosen if file not in spare]
        found.spare |= {prefix + file: "beside the evaluation tasks" for file in spare}
    for file in sorted(chosen, key=lambda file: ("evaluation" in file, file)):
        found.read.append((prefix + file, None))
        beside = solutions_name(file)
        if beside in here:
            found.solutions[prefix + file] = prefix + beside


def _challenges(file: str) -> bool:
    return "challenges" in file


def solutions_name(file: str) -> str:
    """The name of the solutions of a Kaggle challenges file; empty for another file."""
    return file.replace("challenges", "solutions") if _challenges(file) else ""


def _depth(folder: str) -> int:
    return folder.count("/") + 1 if folder else 0


# ---------------------------------------------------------------- what a file is


def parse_json(data: bytes, label: str) -> Any:
    """The JSON of a file's bytes, with the order of its keys.

    Raises DataError saying what the bytes are instead, or where the JSON breaks; also where an
    object has a key twice.
    """
    foreign = _foreign(data, label)
    if foreign:
        raise DataError(f"{label}: not JSON: {foreign}")
    try:
        text = data.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=partial(_unique_keys, label))
    except json.JSONDecodeError as e:
        raise DataError(f"{label}: not JSON{_where_it_breaks(e)}") from e
    except (ValueError, RecursionError) as e:
        cause = " ".join(str(e).split())
        raise DataError(f"{label}: not JSON ({cause}); give an ARC task file") from e


def _unique_keys(label: str, items: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(items)
    if len(out) < len(items):
        key = one_line(Counter(key for key, _ in items).most_common(1)[0][0])
        raise DataError(f"{label}: duplicate id or key '{key}' in one object; remove or rename one")
    return out


def _foreign(data: bytes, label: str) -> str | None:
    """What the bytes are, and what to do; None for what may be JSON."""
    for begin, what, remedy in FOREIGN:
        if data.startswith(begin):
            return f"this is {what}; {remedy}"
    if data[257:262] == b"ustar":
        return "this is a tar archive; unpack it (tar -xf) and give what is in it"
    begin = data[:1000].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not begin:
        return "the file is empty; fetch it again" if len(data) < 1000 else None
    if begin.startswith(b"<"):
        return "this is a web page or XML; download the raw file instead"
    if label.lower().endswith((".csv", ".tsv")):
        return "this is a table (CSV); save its tasks as ARC's JSON"
    return None


def _where_it_breaks(error: json.JSONDecodeError) -> str:
    text = error.doc
    begin = text.lstrip()[:1]
    cause = " ".join(str(error).split())
    if begin not in ("{", "["):
        words = one_line(" ".join(text[:200].split()))
        words = words[:37] + "..." if len(words) > 40 else words
        return f": it begins with '{words}'; remove what is not JSON, or fetch the file again"
    if error.msg == "Extra data" and error.lineno > 1:
        return (
            f" ({cause}): something follows the JSON, or each line is an object of its own "
            "(JSON lines); make it one object of tasks by id"
        )
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return f" ({cause}): it ends in the middle; fetch the file again"
    return f" ({cause}); give an ARC task file"
