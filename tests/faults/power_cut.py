"""Power cuts: replay the log of file operations and lose what was never made durable.

A run is recorded once, operation by operation. For every point of the log, states of the disk are
built that a power cut there may leave: bytes written but not fsynced are dropped, torn, zeroed or
kept; renames, links and deletions since the directory's last fsync happen or not, in any
combination. From every state a resume must find a good checkpoint, no older than the newest that
was acknowledged, and no file under a final name may be damaged.
    python tests/faults/power_cut.py --states 2500
"""

from __future__ import annotations

import hashlib
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import ModelPersistence, Toy, WatchedFS, arguments, finish, scratch
from kill_points import expected_states, manager, save


class RecordingFS(WatchedFS):
    """Does everything for real and keeps the log."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.operations: list[tuple[Any, ...]] = []
        self._open: dict[int, int] = {}
        self._files = 0

    def _name(self, path: Path) -> str:
        return str(Path(path).relative_to(self.root))

    def note(self, *operation: Any) -> None:
        self.operations.append(operation)

    def after(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if name == "create":
            self._files += 1
            self._open[result] = self._files
            self.note("create", self._name(arguments[0]), self._files)
        elif name == "write":
            self.note("write", self._open[arguments[0]], bytes(arguments[1])[:result])
        elif name == "fsync":
            self.note("fsync", self._open[arguments[0]])
        elif name == "open_read":
            self._open.pop(result, None)
        elif name in ("replace", "link"):
            self.note(name, self._name(arguments[0]), self._name(arguments[1]))
        elif name == "unlink" or (
            name == "fsync_dir" and Path(arguments[0]).is_relative_to(self.root)
        ):
            self.note(name, self._name(arguments[0]))


@dataclass
class Content:
    """One file's bytes: what is durable, and what was written since."""

    durable: bytes = b""
    pending: list[bytes] = field(default_factory=list)


@dataclass
class Disk:
    """Names and contents; per directory the changes since its last fsync."""

    files: dict[int, Content] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)  # as a running process sees it
    durable: dict[str, int] = field(default_factory=dict)
    changes: dict[str, list[tuple[tuple[str, int | None], ...]]] = field(default_factory=dict)

    def change(self, *entries: tuple[str, int | None]) -> None:
        for name, number in entries:
            if number is None:
                self.live.pop(name, None)
            else:
                self.live[name] = number
        self.changes.setdefault(str(Path(entries[0][0]).parent), []).append(entries)

    def apply(self, operation: tuple[Any, ...]) -> None:
        kind = operation[0]
        if kind == "create":
            self.files[operation[2]] = Content()
            self.change((operation[1], operation[2]))
        elif kind == "write":
            self.files[operation[1]].pending.append(operation[2])
        elif kind == "fsync":
            content = self.files[operation[1]]
            content.durable += b"".join(content.pending)
            content.pending = []
        elif kind == "replace":
            number = self.live[operation[1]]
            self.change((operation[1], None), (operation[2], number))
        elif kind == "link":
            self.change((operation[2], self.live[operation[1]]))
        elif kind == "unlink":
            self.change((operation[1], None))
        elif kind == "fsync_dir":
            for entries in self.changes.pop(operation[1], []):
                _put(self.durable, entries)

    def after_cut(self, how: str, rng: random.Random) -> dict[str, bytes]:
        """name -> bytes after the power came back."""
        names = dict(self.durable)
        for changes in self.changes.values():
            for entries in changes:
                kept = {"nothing": False, "names": True, "data": False, "all": True}.get(how)
                if rng.random() < 0.5 if kept is None else kept:
                    _put(names, entries)
        keep_data = {"nothing": "drop", "names": "drop", "data": "keep", "all": "keep"}.get(how)
        contents = {}
        for name, number in names.items():
            content = self.files[number]
            tail = b"".join(content.pending)
            fate = keep_data or rng.choice(("drop", "tear", "zero", "keep"))
            if fate == "drop":
                tail = b""
            elif fate == "tear":
                tail = tail[: rng.randrange(len(tail) + 1)]
            elif fate == "zero" and tail:
                start = rng.randrange(len(tail))
                tail = tail[:start] + bytes(len(tail) - start)
            contents[name] = content.durable + tail
        return contents


def _put(names: dict[str, int], entries: tuple[tuple[str, int | None], ...]) -> None:
    for name, number in entries:
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


def record(root: Path) -> list[tuple[Any, ...]]:
    """The log of a run with rotation, new best models and a resume in the middle."""
    fs = RecordingFS(root)
    toy = Toy()
    persistence = manager(root, fs)
    for batch in range(8):
        best = batch in (0, 2, 3, 6)
        saved = save(toy, persistence, batch, best=best)
        fs.note("ack", saved, batch if best else None)
        if batch == 2:
            persistence.close()
            persistence = manager(root, fs)
            persistence.load_latest(*toy.six)
    persistence.close()
    return fs.operations


def check(folder: Path, newest: int, best: int | None, expected: dict[int, str]) -> str:
    """Resume from one state; returns what is wrong, or an empty text."""
    persistence, toy = manager(folder), Toy()
    if not persistence.checkpoints:
        return "nothing to resume from" if newest >= 0 else ""
    found = persistence.load_latest(*toy.six)
    toy.restore(found["extra"])
    if found["skipped"]:
        return f"a published file is damaged: {found['skipped'][0]['reason']}"
    if toy.fingerprint() != expected[found["batch"]]:
        return "the state is not the one that was saved"
    if found["checkpoint_id"] < newest:
        return f"acknowledged checkpoint {newest} is gone"
    if best is not None:
        loaded = persistence.load_best_model(*toy.six)
        toy.restore(loaded["extra"])
        if loaded["batch"] < best or toy.fingerprint() != expected[loaded["batch"]]:
            return f"the acknowledged best model of batch {best} is gone"
    return ""


def run(states: int = 2500, seed: int = 0) -> dict[str, Any]:
    """Cut the power in `states` different ways; returns the figures."""
    expected = expected_states()
    rng = random.Random(seed)
    figures: dict[str, Any] = {"states": 0, "distinct": 0, "good": 0, "problems": []}
    seen: set[bytes] = set()
    with scratch() as root:
        operations = record(root / "run")
        figures["operations"] = len(operations)
        work = root / "work"
        rounds = 0
        while figures["distinct"] < states and rounds < 400:
            systematic = ("nothing", "names", "data", "all")
            how = systematic[rounds] if rounds < len(systematic) else "random"
            rounds += 1
            disk, newest, best = Disk(), -1, None
            for operation in operations:
                if operation[0] == "ack":
                    newest, best = operation[1], operation[2] if operation[2] is not None else best
                    continue
                disk.apply(operation)
                figures["states"] += 1
                contents = disk.after_cut(how, rng)
                key = hashlib.sha256(repr((newest, best, sorted(contents.items()))).encode())
                if key.digest() in seen:
                    continue
                seen.add(key.digest())
                figures["distinct"] += 1
                write_out(contents, work)
                problem = check(work, newest, best, expected)
                if problem:
                    figures["problems"].append(f"after {operation[:2]}, {how}: {problem}")
                else:
                    figures["good"] += 1
                if figures["distinct"] >= states:
                    break
    return figures


def write_out(contents: dict[str, bytes], work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    (work / "checkpoints").mkdir(parents=True)
    for name, data in contents.items():
        (work / name).write_bytes(data)


def main() -> None:
    args = arguments(__doc__ or "", states=2500)
    figures = run(args.states, args.seed)
    finish(figures, not figures["problems"] and figures["distinct"] >= args.states)


if __name__ == "__main__":
    main()

__all__ = ["Disk", "ModelPersistence", "RecordingFS", "check", "record", "run"]
