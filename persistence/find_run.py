"""Which run: the one that was saved last, as the seals of its checkpoints say.

Only looks; nothing is loaded, moved or verified. Bringing a run back: `from_drive.py`.
    from persistence.find_run import find_latest_run, point_latest_at, run_of
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from persistence.checkpoint_file import seal_of
from persistence.files import (
    REAL_FS,
    expanded,
    is_file,
    is_folder,
    names_in,
    read_json,
    seconds_of,
    version_of,
)
from persistence.run_index import RunIndex

RUN_NAME = re.compile(r"[^./\\\0][^/\\\0]*")  # one folder that is not hidden
RESTORING = ".restoring.json"  # in a run directory that is not yet wholly back from Drive
LATEST_LINK = "arc_complete_latest"  # beside the runs: a link to the one that is, or was, trained


class Candidate(NamedTuple):
    """A folder that may be a run, or a run's backup."""

    folder: Path
    saved: float | None  # of its newest seal, seconds since 1970; 0 without one; None: no file
    run_id: Any
    touched: float  # a rough sign of life, for the notes alone


def newest_seal(folder: Path, files: Mapping[int, Path]) -> dict[str, Any] | None:
    """What a run's newest readable seal says (epoch, batch, timestamp, ...); not verified."""
    paths = [files[i] for i in sorted(files, reverse=True)]
    return next((seal for p in [*paths, folder / "best_model.pt"] if (seal := seal_of(p))), None)


def saved_last(folder: Path, files: Mapping[int, Path]) -> tuple[float | None, Any]:
    """When a run was last saved and its run_id, by its newest readable seal; not verified."""
    if (seal := newest_seal(folder, files)) is not None:
        return seconds_of(seal.get("timestamp")) or 0.0, seal.get("run_id")
    marker = read_json(folder / RESTORING)
    if isinstance(marker, dict):  # the first file is not yet back
        return seconds_of(marker.get("timestamp")) or 0.0, None
    return (0.0 if files or is_file(folder / "best_model.pt") else None), None


def local_files(folder: Path) -> dict[int, Path]:
    """id -> file of a run's checkpoints."""
    return RunIndex(folder).files()


def candidates(root: Path, files_of: Callable[[Path], dict[int, Path]]) -> list[Candidate]:
    """Folders below `root`; a link to one of the others is not a second one."""
    folders = [root / name for name in names_in(REAL_FS, root) if RUN_NAME.fullmatch(name)]
    found, seen = [], set()
    for folder in sorted(folders, key=lambda f: f.is_symlink()):
        if not is_folder(folder) or folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        with contextlib.suppress(OSError):  # one that cannot be read is none
            signs = [version_of(folder / name) for name in ("config.json", "training.log", ".")]
            touched = max((s[1] for s in signs if s is not None), default=0) / 1e9
            saved, run_id = saved_last(folder, files_of(folder))
            found.append(Candidate(folder, saved, run_id, touched))
    return found


def saved_order(c: Candidate) -> tuple[float, bool, str]:
    """By time; of two copies of a run not the one that a copied link has become."""
    return c.saved or 0.0, c.folder.name != LATEST_LINK, c.folder.name


def find_latest_run(
    runs_dir: str | os.PathLike[str] = "runs", notes: list[str] | None = None
) -> Path | None:
    """The run that was saved last, as the seals of its checkpoints say; None if there is none.

    What was passed over although it may be the one that is meant is appended to `notes`: newer
    folders without a usable checkpoint, and those that come later by name.
    """
    found = candidates(Path(runs_dir), local_files)
    usable = [c for c in found if c.saved is not None]
    best = max(usable, key=saved_order, default=None)
    for c in found:
        if notes is None or c is best:
            continue
        if c.saved and best is not None and best.saved:
            same = c.run_id is not None and c.run_id == best.run_id
            if same or c.folder.name > best.folder.name:
                kind = "the same run, " if same else ""
                notes.append(
                    f"passed over {c.folder}: {kind}last saved {date_text(c.saved)}, "
                    f"{best.folder.name} {date_text(best.saved)}"
                )
        elif _looks_like_run(c.folder) and (
            best is None or c.folder.name > best.folder.name or c.touched >= (best.saved or 0.0)
        ):
            why = "no checkpoint yet" if c.saved is None else "no readable seal in it"
            quarantine = c.folder / "checkpoints" / "quarantine"
            if c.saved is None and any(n.endswith(".pt") for n in names_in(REAL_FS, quarantine)):
                why = "only damaged files (checkpoints/quarantine)"
            notes.append(f"passed over {c.folder}: {why}")
    return None if best is None else best.folder


def date_text(seconds: float) -> str:
    """Seconds since 1970 for a message, in local time."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _looks_like_run(folder: Path) -> bool:
    signs = ("config.json", "training.log", "run.lock", "checkpoints")
    return folder.name.startswith("arc_complete_") or any((folder / s).exists() for s in signs)


def run_of(path: str | os.PathLike[str]) -> Path:
    """The run folder that a path means: RUN for RUN/checkpoints, the run behind the latest link."""
    folder = expanded(path)
    if folder.name == "checkpoints" and not is_folder(folder / "checkpoints"):
        folder = folder.parent
    if folder.name in ("", ".."):
        folder = folder.resolve()
    # Through runs/arc_complete_latest the run itself: its name is that of its backup, too.
    return folder.resolve() if folder.name == LATEST_LINK and folder.is_symlink() else folder


def point_latest_at(run_dir: str | os.PathLike[str]) -> None:
    """Make `<runs>/arc_complete_latest` a link to a run; silently not where links do not exist.

    A folder or file of that name, someone's own, stays as it is; so does a link given as the run.
    """
    run = Path(run_dir)
    link, temp = run.parent / LATEST_LINK, run.parent / f".{LATEST_LINK}.{os.getpid()}"
    if run.name == LATEST_LINK:
        return
    with contextlib.suppress(OSError, NotImplementedError):
        if link.is_symlink() or not link.exists():
            try:
                temp.unlink(missing_ok=True)
                temp.symlink_to(run.name)
                temp.replace(link)
            finally:
                temp.unlink(missing_ok=True)
