"""What one run directory holds: names, ids, the index of its checkpoints, small state.

The `.pt` files decide; `checkpoint_metadata.json` and `training_state.json` are derived from them
and may be lost. Loads nothing into anything, and does not decide what is kept.
    from persistence.run_index import RunIndex, TrainingState
"""

from __future__ import annotations

import os
import re
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persistence.checkpoint_file import FORMAT_VERSION, Loaded, seal_of, verify_checkpoint_file
from persistence.files import (
    REAL_FS,
    TEMP_NAME,
    CheckpointError,
    FileSystem,
    atomic_write_json,
    exists,
    names_in,
    read_json,
    timestamp_now,
)

MAX_ID = 10**9
CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{5,9})\.pt")
MAX_FOLDERS = 200  # looked into for checkpoints that were copied by hand
_state_file_guard = threading.Lock()  # the loop and the writer thread update the same small file


def remove_temporaries(run_dir: Path, fs: FileSystem) -> bool:
    """Remove what interrupted writes left in a run directory. False if the disk forbids it."""
    done = True
    for folder in (run_dir, run_dir / "checkpoints"):
        try:
            for name in names_in(fs, folder):
                if TEMP_NAME.fullmatch(name):
                    fs.unlink(folder / name)
        except OSError:
            done = False
    return done


def _may_be_folder(name: str) -> bool:
    """False for what lies beside checkpoints: hidden files, our small files, the quarantine."""
    small = name.endswith((".pt", ".json", ".ok"))
    return not (small or name.startswith(".") or name == "quarantine")


class TrainingState:
    """`training_state.json`: a few facts about the run for people and tools; may be lost."""

    def __init__(self, output_dir: str | os.PathLike[str], fs: FileSystem = REAL_FS) -> None:
        self.path = Path(output_dir) / "training_state.json"
        self._fs = fs

    def save(self, state: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """Merge fields into the file, atomically. Returns everything that is in it now."""
        with _state_file_guard:
            merged = {**self._read(), **(state or {}), **fields, "updated": timestamp_now()}
            self._fs.mkdir(self.path.parent)
            atomic_write_json(self.path, merged, self._fs)
            return merged

    def load(self) -> dict[str, Any]:
        """What was saved; empty if there is no readable file."""
        with _state_file_guard:
            return self._read()

    def _read(self) -> dict[str, Any]:
        found = read_json(self.path, self._fs)
        return found if isinstance(found, dict) else {}


class RunIndex:
    """The checkpoints of one run directory: files, ids, what is known of each.

    Reads at every call: other processes, and people, move files. Nothing is created before `claim`.

    Args:
        output_dir: the run directory; it need not exist.
        fs: the file operations.
    """

    def __init__(self, output_dir: Path, fs: FileSystem = REAL_FS) -> None:
        self.output_dir, self.fs = output_dir, fs
        self.checkpoints_dir = output_dir / "checkpoints"
        self.quarantine_dir = self.checkpoints_dir / "quarantine"
        self.set_aside_dir = output_dir / "set_aside"
        self.best_path = output_dir / "best_model.pt"
        self.manifest_path = output_dir / "checkpoint_metadata.json"
        self.best_metadata_path = output_dir / "best_metadata.json"
        self.training_state = TrainingState(output_dir, fs)
        self.run_id: str | None = None  # with next_id from `claim` on
        self.next_id: int | None = None
        self._verified: dict[tuple[Any, ...], dict[str, Any]] = {}

    def own_path(self, checkpoint_id: int) -> Path:
        """Where this run writes that checkpoint."""
        return self.checkpoints_dir / f"checkpoint_{checkpoint_id:05d}.pt"

    def files(self) -> dict[int, Path]:
        """id -> file. `cp -r backup checkpoints/` nests folders: those count where no own file is,
        later names (dates) first."""
        found: dict[int, Path] = {}
        folders = [(self.checkpoints_dir, 0)]
        for folder, depth in folders:  # grows while it is walked
            for name in reversed(names_in(self.fs, folder)):
                match = CHECKPOINT_NAME.fullmatch(name)
                if match:
                    found.setdefault(int(match[1]), folder / name)
                elif depth < 3 and len(folders) < MAX_FOLDERS and _may_be_folder(name):
                    folders.append((folder / name, depth + 1))
        return found

    def own_files(self) -> dict[int, Path]:
        """id -> file of those that this run wrote, without nested folders."""
        return {i: p for i, p in self.files().items() if p.parent == self.checkpoints_dir}

    def manifest(self) -> dict[str, Any]:
        """`checkpoint_metadata.json` with everything implausible left out."""
        raw = read_json(self.manifest_path, self.fs)
        raw = raw if isinstance(raw, dict) else {}
        entries: dict[int, dict[str, Any]] = {}
        listed = raw.get("checkpoints")
        for key, entry in listed.items() if isinstance(listed, dict) else ():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < MAX_ID):
                continue
            if (
                isinstance(entry, dict)
                and all(type(entry.get(k)) is int for k in ("epoch", "batch", "size"))
                and isinstance(entry.get("metrics"), dict)
                and isinstance(entry.get("sha256"), str)
            ):
                entries[int(key)] = entry
        next_id, run_id = raw.get("next_id"), raw.get("run_id")
        return {
            "run_id": run_id if isinstance(run_id, str) else None,
            "next_id": next_id if type(next_id) is int and 0 <= next_id < MAX_ID else 0,
            "checkpoints": entries,
        }

    def describe(self, path: Path) -> dict[str, Any]:
        """Metadata of a file that the index does not know, from its seal. Not verified."""
        seal = seal_of(path, self.fs)
        keys = ("epoch", "batch", "metrics", "timestamp", "run_id", "checkpoint_id")
        described = {k: (seal or {}).get(k) for k in keys}
        if not isinstance(described["metrics"], dict):
            described["metrics"] = {}
        return described

    def have_text(self) -> str:
        """For messages: which ids there are."""
        have = ", ".join(str(i) for i in sorted(self.files())) or "none"
        return f"There are: {have}."

    def verify(self, path: Path, checkpoint_id: int | None, manifest: dict[str, Any]) -> Loaded:
        """`verify_checkpoint_file` against what the index says of an id; None: a best model."""
        return verify_checkpoint_file(
            path,
            expect_id=checkpoint_id,
            entry=manifest["checkpoints"].get(checkpoint_id),
            run_id=manifest["run_id"],
            fs=self.fs,
        )

    def verified_info(
        self, path: Path, checkpoint_id: int, manifest: dict[str, Any]
    ) -> dict[str, Any]:
        """{epoch, batch, metrics} of a file that verifies; read once while it stays as it is."""
        stat = self.fs.stat(path)
        key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._verified:
            loaded = self.verify(path, checkpoint_id, manifest)
            self._verified[key] = {k: loaded.payload[k] for k in ("epoch", "batch", "metrics")}
        return dict(self._verified[key])

    def is_good(self, checkpoint_id: int, path: Path) -> bool:
        """Whether a file can be read and verifies."""
        try:
            self.verified_info(path, checkpoint_id, self.manifest())
        except (OSError, CheckpointError):
            return False
        return True

    def read_best(self) -> dict[str, Any] | None:
        """Metadata of best_model.pt: its own seal, or the JSON if the seal has no metrics.

        A kill between the two leaves a JSON that speaks of the best model before; the file decides.
        """
        try:
            size = self.fs.stat(self.best_path).st_size
        except FileNotFoundError:
            return None
        described = self.describe(self.best_path)
        if described["metrics"]:
            return described
        recorded = read_json(self.best_metadata_path, self.fs)
        if (
            isinstance(recorded, dict)
            and recorded.get("size") == size
            and isinstance(recorded.get("metrics"), dict)
        ):
            return recorded
        return described

    def protected_id(self) -> int | None:
        """The checkpoint that best points to, unless best_model.pt holds those bytes itself."""
        if exists(self.fs, self.best_path):
            return None
        recorded = read_json(self.best_metadata_path, self.fs)
        return recorded.get("checkpoint_id") if isinstance(recorded, dict) else None

    def highest_id(self, manifest: dict[str, Any]) -> int:
        """The largest id ever seen, from every place that may remember one; -1 if none."""
        seen = [-1, manifest["next_id"] - 1, *manifest["checkpoints"], *self.files()]
        for folder in (self.checkpoints_dir, self.quarantine_dir, self.set_aside_dir):
            for name in names_in(self.fs, folder):
                match = CHECKPOINT_NAME.search(name)
                if match:
                    seen.append(int(match[1]))
        best = self.read_best()
        remembered = [best.get("checkpoint_id") if best else None]
        remembered.append(self.training_state.load().get("checkpoint_id"))
        seen += [i for i in remembered if type(i) is int and 0 <= i < MAX_ID]
        return max(seen)

    def make_folders(self) -> None:
        """The run directory and its checkpoints folder, durably."""
        self.fs.mkdir(self.checkpoints_dir)
        self.fs.fsync_dir(self.output_dir)
        self.fs.fsync_dir(self.output_dir.parent)

    def claim(self) -> None:
        """Settle who this run is and which id comes next. Only with the run's lock."""
        manifest = self.manifest()
        run_id = manifest["run_id"]
        if run_id is None:
            seals = (self.describe(p).get("run_id") for p in self.files().values())
            run_id = next((s for s in seals if isinstance(s, str)), None)
        self.run_id = run_id or uuid.uuid4().hex
        self.next_id = self.highest_id(manifest) + 1

    def write(self, checkpoint_id: int, entry: dict[str, Any]) -> None:
        """Add a checkpoint's entry to the index; those of files that are gone go."""
        entries = self.manifest()["checkpoints"]
        files = self.files()
        kept = {i: e for i, e in entries.items() if i in files and i != checkpoint_id}
        kept[checkpoint_id] = entry
        index = {
            "format_version": FORMAT_VERSION,
            "run_id": self.run_id,
            "next_id": self.next_id,
            "checkpoints": {str(i): kept[i] for i in sorted(kept)},
        }
        atomic_write_json(self.manifest_path, index, self.fs)

    def move(self, path: Path, folder: Path) -> Path:
        """Move a file into a folder of the run, durably, under a name that is free there."""
        self.fs.mkdir(folder)
        taken = set(names_in(self.fs, folder))
        name, number = path.name, 1
        while name in taken:
            number += 1
            name = f"{path.stem}.{number}{path.suffix}"
        target = folder / name
        self.fs.replace(path, target)
        self.fs.fsync_dir(folder)
        self.fs.fsync_dir(path.parent)
        return target

    def wanted_on_drive(self, keep: int) -> list[tuple[Path, str]]:
        """(local file, name on Drive) of what the backup should hold, most important first."""
        files = self.own_files()
        wanted = [(files[i], files[i].name) for i in sorted(files, reverse=True)[:keep]]
        if exists(self.fs, self.best_path):
            wanted.insert(min(1, len(wanted)), (self.best_path, self.best_path.name))
        return wanted
