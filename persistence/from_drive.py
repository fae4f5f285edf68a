"""Bringing a run back from Drive, or up to date, and finding the run that --resume means.

Writes nothing to Drive. Every file is verified before it gets its name; what was interrupted is
finished by the next call.
    from persistence.from_drive import locate_run, restore_run_from_drive
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from persistence.checkpoint_file import seal_of, verify_checkpoint_file
from persistence.drive import (
    RUN_SIDE_FILES,
    branch_conflict,
    flat_files,
    refuse_unmounted_colab,
)
from persistence.files import (
    CHUNK_BYTES,
    REAL_FS,
    AtomicFile,
    CheckpointError,
    CorruptCheckpointError,
    FileSystem,
    PersistenceError,
    atomic_write_json,
    exists,
    expanded,
    is_file,
    is_folder,
    open_reader,
    read_json,
    seconds_of,
)
from persistence.find_run import (
    LATEST_LINK,
    RESTORING,
    RUN_NAME,
    Candidate,
    candidates,
    date_text,
    find_latest_run,
    local_files,
    newest_seal,
    run_of,
    saved_last,
    saved_order,
)
from persistence.run_guard import RunLock
from persistence.run_index import CHECKPOINT_NAME, RunIndex, remove_temporaries

FIRST_BACK = ("config.json", "best_metadata.json")  # a resume needs them before any checkpoint
FLAT_NAME = "arc_complete_restored"  # of a run whose checkpoints were laid into Drive by hand
DRIVE_ANSWER_S = 30.0  # a mount that says nothing for so long is left out of account


def copy_back_from_drive(
    source: Path,
    output_dir: Path,
    skipped: list[dict[str, str]],
    fs: FileSystem = REAL_FS,
    *,
    above: int = -1,
    say: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Copy a run's good files from a backup folder into its run directory.

    Settings and best model come first, then checkpoints, the newest first, then the rest. Until all
    are there `.restoring.json` lies in the run directory, so that an interrupted copy is finished.
    Only what is missing here is copied, and only what verifies; with `above` checkpoints with
    higher ids alone, and the other files replace those here. Returns the files written; rejected
    ones are appended to `skipped`. A backup that is not this run's history is rejected as a whole.
    Raises PersistenceError if the local disk does not take the files.
    """
    flat = flat_files(source)
    places: list[tuple[Path, Path, int | None]] = [
        (path, output_dir / "checkpoints" / path.name, i)
        for i, path in sorted(flat.items(), reverse=True)
        if i > above
    ]
    for place in (source / "checkpoints", source):
        if exists(REAL_FS, place / "best_model.pt"):
            places = [p for p in places if p[2] is not None]
            places.insert(0, (place / "best_model.pt", output_dir / "best_model.pt", None))
    here = RunIndex(output_dir, fs).files()
    marker = output_dir / RESTORING
    if why := branch_conflict(here, flat):
        skipped.append({"file": str(source), "reason": f"it holds another branch: {why}"})
        with contextlib.suppress(OSError):
            fs.unlink(marker)
        return []
    if above >= 0:  # an interrupted one may have brought some already
        places = [(p, t, i) for p, t, i in places if not _same_seal(p, t, fs)]
    else:
        places = [(p, t, i) for p, t, i in places if not exists(fs, t)]
    written: list[Path] = []
    if not places and not exists(fs, marker):
        return written
    seals = [seal for p, _, _ in places if (seal := seal_of(p)) is not None]
    newest = max(seals, key=lambda s: seconds_of(s.get("timestamp")) or 0.0, default={})
    record = {"from": str(source.absolute()), "above": above, "timestamp": newest.get("timestamp")}
    sizes = [path.stat().st_size for path, _, _ in places]
    say(f"Restoring {output_dir} from {source}: {len(sizes)} model files, {sum(sizes) >> 20} MiB")
    try:
        fs.mkdir(output_dir / "checkpoints")
        atomic_write_json(marker, record, fs)
        for name in FIRST_BACK:
            _copy_side_file(source / name, output_dir / name, above >= 0, written, fs)
        for path, target, checkpoint_id in places:
            try:
                _copy_in(path, target, fs, partial(_check_copy, path, checkpoint_id))
            except CheckpointError as e:
                skipped.append({"file": str(path), "reason": str(e).removeprefix(f"{path}: ")})
                continue
            written.append(target)
        if not any(p.suffix == ".pt" for p in written) and not here:
            for path in written:  # nothing good came: leave no settings without a run
                fs.unlink(path)
            written = []
        else:
            for name in RUN_SIDE_FILES:
                if name not in FIRST_BACK:
                    _copy_side_file(source / name, output_dir / name, above >= 0, written, fs)
        _forget_drive_state(output_dir, fs)
        fs.unlink(marker)
    except OSError as e:
        raise PersistenceError(
            f"{output_dir} is not wholly restored from {source}",
            str(e),
            "Put that right and repeat the command: it goes on where this one stopped.",
        ) from e
    return written


def _same_seal(there: Path, here: Path, fs: FileSystem) -> bool:
    seal = seal_of(here, fs)
    return seal is not None and seal == seal_of(there)


def _forget_drive_state(output_dir: Path, fs: FileSystem) -> None:
    """training_state.json from another machine: how its backup was doing says nothing here."""
    state = read_json(output_dir / "training_state.json", fs)
    if isinstance(state, dict) and "drive" in state:
        del state["drive"]
        atomic_write_json(output_dir / "training_state.json", state, fs)


def _copy_side_file(
    source: Path, target: Path, replace: bool, written: list[Path], fs: FileSystem
) -> None:
    """Copy one small file if it is there; without it a resume is only less comfortable."""
    with contextlib.suppress(CheckpointError):
        if is_file(source) and (replace or not exists(fs, target)):
            _copy_in(source, target, fs)
            written.append(target)


def _check_copy(source: Path, checkpoint_id: int | None, copy: Path) -> None:
    """Raise CorruptCheckpointError unless a copied file holds what its seal, or its mark, says."""
    record = read_json(source.with_name(f"{source.name}.ok"))
    entry = record if isinstance(record, dict) and "sha256" in record else None
    try:
        found = verify_checkpoint_file(copy, entry=entry, load=False).payload.get("checkpoint_id")
    except CorruptCheckpointError as e:
        what = e.what.removeprefix(f"{copy}: ")
        raise CorruptCheckpointError(f"{source}: {what}", e.why, e.fix) from e
    if None not in (found, checkpoint_id) and found != checkpoint_id:
        raise CorruptCheckpointError(f"{source}: it holds checkpoint {found}")


def _copy_in(
    source: Path, target: Path, fs: FileSystem, check: Callable[[Path], None] = lambda _: None
) -> None:
    """Copy one file durably; `check` sees the copy before it gets its name. CheckpointError if the
    source cannot be read, OSError if the copy cannot be written."""
    file = AtomicFile(target, fs)
    try:
        for block in _blocks_of(source):
            file.write(block)
        file.sync()
        check(file.temp)
        file.publish()
    except BaseException:
        file.abort()
        raise


def _blocks_of(path: Path) -> Iterator[bytes]:
    try:
        with open_reader(REAL_FS, path) as (reader, _):
            while block := reader.read(CHUNK_BYTES):
                yield block
    except OSError as e:
        raise CheckpointError(f"{path}: it cannot be read", str(e)) from e


def restore_run_from_drive(
    drive_dir: str | os.PathLike[str],
    runs_dir: str | os.PathLike[str],
    run_name: str | None = None,
    fs: FileSystem = REAL_FS,
    *,
    skipped: list[dict[str, str]] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path | None:
    """Rebuild a run directory from its backup, e.g. on a new machine. Returns it, or None.

    Without `run_name` the run that was saved last (by the seals) and has a good checkpoint is
    taken. Checkpoints laid flat into the Drive folder by hand are restored as
    `arc_complete_restored`. Bad copies that were passed over are appended to `skipped`. An
    interrupted restore is finished by the next call, or by `--resume`.
    """
    if run_name is not None and not RUN_NAME.fullmatch(run_name):
        raise PersistenceError(f"not a run name: {run_name!r}", "", "Use the run directory's name.")
    wanted = [b for b in backups_in(Path(drive_dir)) if run_name in (None, b.name)]
    return _restore_first(wanted, Path(runs_dir), fs, [] if skipped is None else skipped, say)


class Backup(NamedTuple):
    """A run on Drive: where its files are, and the name it gets here."""

    folder: Path
    name: str
    saved: float  # of its newest seal, seconds since 1970; 0 without one
    run_id: Any  # copies of one run have the same; None: unknown
    seal: Mapping[str, Any]  # what its newest file says of itself: epoch, batch, ...; not verified


def backups_in(root: Path) -> list[Backup]:
    """The runs in a Drive folder, saved last first; checkpoints laid flat into it by hand last."""
    found = [c for c in candidates(root, flat_files) if c.saved is not None]
    found.sort(key=saved_order, reverse=True)
    places = [(c.folder, c.folder.name, c.saved, c.run_id) for c in found]
    saved, run_id = saved_last(root, flat_files(root))
    if saved is not None:
        places.append((root, FLAT_NAME, saved, run_id))
    return [
        Backup(folder, name, saved or 0.0, run_id, newest_seal(folder, flat_files(folder)) or {})
        for folder, name, saved, run_id in places
    ]


def _restore_first(
    sources: Sequence[Backup],
    runs_dir: Path,
    fs: FileSystem,
    skipped: list[dict[str, str]],
    say: Callable[[str], None],
) -> Path | None:
    """The run directory of the first of these backups that has a good checkpoint; None: none."""
    for source, name, *_ in sources:
        target = runs_dir / name
        new = not target.exists()
        with RunLock(target):
            remove_temporaries(target, fs)
            if copy_back_from_drive(source, target, skipped, fs, say=say):
                return target
            if new:
                with contextlib.suppress(OSError):
                    (target / "run.lock").unlink()
                    (target / "checkpoints").rmdir()
                    target.rmdir()
    return None


Choose = Callable[[list[Backup], list[str]], list[Backup]]


def runs_among(backups: Sequence[Backup]) -> list[Backup]:
    """Of copies of one run the first alone."""
    first = {b.name if b.run_id is None else str(b.run_id): b for b in reversed(backups)}
    return [b for b in backups if any(b is kept for kept in first.values())]


class Located(NamedTuple):
    """The run that --resume means; None: nothing to resume. What was passed over on the way there,
    or done, in lines to show; and the copies on Drive that were rejected."""

    folder: Path | None
    notes: list[str]
    skipped: list[dict[str, str]]


def locate_run(
    resume: str,
    runs_dir: str | os.PathLike[str] = "runs",
    drive: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
    choose: Choose = lambda backups, _: backups,
) -> Located:
    """Find the run to resume, and bring it back, or up to date, from Drive.

    resume: "latest" or "auto" (what was saved last in `runs_dir`), or a run folder. An interrupted
    restore is finished; a run that is gone is restored; if its backup is newer than the run here
    and the run here is that one's past, the newer state is taken. Where no run is here, none is
    named and Drive has several, `choose` gets them, saved last first, and the notes, and returns
    those to be tried in turn. Raises PersistenceError.
    """
    notes: list[str] = []
    skipped: list[dict[str, str]] = []
    latest = resume in ("latest", "auto")
    try:
        if latest:
            folder, parent, name = find_latest_run(runs_dir, notes), Path(runs_dir), None
        else:
            if is_file(expanded(resume)):
                raise _a_file(expanded(resume))
            folder = run_of(resume)
            parent, name = folder.parent, folder.name
            if name == LATEST_LINK and not is_folder(folder):
                name = None
        usable = folder is not None and saved_last(folder, local_files(folder))[0] is not None
        if folder is not None and exists(REAL_FS, folder / RESTORING):
            _finish_restore(folder, drive, skipped, say)
            notes.append(f"Finished the restore of {folder}")
        elif usable and drive is not None:
            assert folder is not None
            _take_newer(folder, Path(drive), latest, notes, skipped, say)
        elif drive is not None:  # a new machine
            refuse_unmounted_colab(Path(drive))
            backups = [b for b in backups_in(Path(drive)) if name in (None, b.name)]
            if name is None and len(runs_among(backups)) > 1:
                backups = choose(backups, notes)
            folder = _restore_first(backups, parent, REAL_FS, skipped, say)
            if folder is not None:
                notes.append(f"Restored {folder} from {drive}")
        if folder is not None and saved_last(folder, local_files(folder))[0] is None:
            folder = None
    except OSError as e:
        raise PersistenceError(
            f"cannot look for the run to resume in {runs_dir if latest else resume}",
            str(e),
            "Check the disk and its permissions.",
        ) from e
    notes += [f"Drive: passed over {s['file']}: {s['reason']}" for s in skipped]
    return Located(folder, notes, skipped)


def _a_file(path: Path) -> PersistenceError:
    """Why a file is not what --resume takes, and what to give instead."""
    match, folder = CHECKPOINT_NAME.fullmatch(path.name), path.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    if match and folder.name == "checkpoints":
        this = f"--resume {run} --checkpoint {int(match[1])}"
        fix = f"Use {this} to go on from this one, or --resume {run}."
    elif path.name == "best_model.pt":
        fix = f"Use --resume {run}, which goes on from its newest checkpoint."
    else:
        fix = "Put it into RUN/checkpoints/ of a run folder, and use --resume RUN."
    return PersistenceError(f"--resume {path}", "it is a file, and a run is a folder", fix)


def _finish_restore(
    folder: Path,
    drive: str | os.PathLike[str] | None,
    skipped: list[dict[str, str]],
    say: Callable[[str], None],
) -> None:
    """Finish a restore that was interrupted, from the Drive named now or the one it came from."""
    marker = folder / RESTORING
    record = read_json(marker)
    record = record if isinstance(record, dict) else {}
    sources = [] if drive is None else [Path(drive) / folder.resolve().name]
    if isinstance(record.get("from"), str):
        sources.append(Path(record["from"]))
    for source in sources:
        if saved_last(source, flat_files(source))[0] is not None:
            above = record.get("above")
            with RunLock(folder):
                remove_temporaries(folder, REAL_FS)
                copy_back_from_drive(
                    source, folder, skipped, above=above if type(above) is int else -1, say=say
                )
            return
    raise PersistenceError(
        f"{folder} is not wholly restored",
        f"the rest is not in {' or '.join(map(str, sources)) or 'any Drive folder named'}",
        f"Mount the Drive and repeat the command, or delete {marker} to go on with what is here.",
    )


def _take_newer(
    folder: Path,
    drive: Path,
    latest: bool,
    notes: list[str],
    skipped: list[dict[str, str]],
    say: Callable[[str], None],
) -> None:
    """Bring a run up to date if its backup is newer; say it where that must not be done."""
    backup = drive / folder.resolve().name
    run = RunIndex(folder)
    known = run.highest_id(run.manifest())

    def compare() -> tuple[list[int], str, Candidate | None]:
        there = flat_files(backup)
        why = branch_conflict(run.files(), there)
        others = [c for c in candidates(drive, flat_files) if c.saved] if latest else []
        newest = max(others, key=lambda c: c.saved or 0.0, default=None)
        return [i for i in there if i > known], why, newest

    try:
        newer, why, other = _in_time(compare, DRIVE_ANSWER_S)
    except (OSError, TimeoutError) as e:
        notes.append(f"Drive: {drive} was not compared with the run here: {e}")
        return
    if why:
        notes.append(
            f"Drive: {backup} holds another branch of this run ({why}): going on with the one "
            f"here; nothing is copied from there, or to there"
        )
    elif newer:
        with RunLock(folder):
            remove_temporaries(folder, REAL_FS)
            took = copy_back_from_drive(backup, folder, skipped, above=known, say=say)
        ids = [str(p.stem.removeprefix("checkpoint_").lstrip("0") or 0) for p in took
               if CHECKPOINT_NAME.fullmatch(p.name)]  # fmt: skip
        if ids:
            notes.append(
                f"Drive is newer than the run here (its newest checkpoint was {known}): took "
                f"{', '.join(reversed(ids))} from {backup}"
            )
    saved, run_id = saved_last(folder, run.files())
    if other is not None and other.run_id != run_id and (other.saved or 0.0) > (saved or 0.0):
        notes.append(
            f"Drive: {other.folder} was saved later ({date_text(other.saved or 0.0)}): "
            f"--resume {folder.parent / other.folder.name} takes that run"
        )


def _in_time(action: Callable[[], Any], timeout_s: float) -> Any:
    """What `action` returns or raises; TimeoutError if a hanging mount holds it longer."""
    result: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            result.put((action(), None))
        except Exception as e:  # noqa: BLE001 - raised again below, in the caller's thread
            result.put((None, e))

    threading.Thread(target=run, name="drive-look", daemon=True).start()
    try:
        value, error = result.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer in {timeout_s:g} s") from None
    if error is not None:
        raise error
    return value
