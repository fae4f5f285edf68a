"""The copy of a run on a mounted Drive: which folder, and the worker beside the training.

Never blocks training, never writes over another branch of a run. The way back: `from_drive.py`.
    from persistence.drive import DriveBackup, configured_drive_backup, setup_drive_backup
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from persistence.checkpoint_file import is_intact, seal_of
from persistence.files import (
    CHUNK_BYTES,
    REAL_FS,
    SPACE_SLACK_BYTES,
    TEMP_NAME,
    AtomicFile,
    FileSystem,
    PersistenceError,
    atomic_write_bytes,
    atomic_write_json,
    exists,
    expanded,
    log,
    names_in,
    open_reader,
    read_json,
    seconds_of,
    timestamp_now,
    version_of,
)
from persistence.run_guard import DRIVE_HURRY_S
from persistence.run_index import CHECKPOINT_NAME, MAX_ID

# Written beside the checkpoints; small, derived, and worth having on a new machine.
RUN_SIDE_FILES = (
    "config.json",
    "best_metadata.json",
    "training_state.json",
    "results.json",
    "metrics.jsonl",
    "training.log",
    "report_to.json",
)
MAX_SIDE_FILE_BYTES = 64 << 20
DRIVE_SILENT_S = 1.0  # of waiting for a copy at the end, before a line says so
DRIVE_SAY_EVERY_S = 10.0  # ... and between two such lines
DRIVE_LOOK_S = 0.1  # between two looks for a signal
DRIVE_MARKER = ".arc_drive_backup"


class DriveBackup:
    """Copies the newest checkpoints and the best model to a mounted Drive, beside the training.

    A worker thread does everything that touches the mount; if it hangs there it is abandoned and
    replaced, and training never waits. A file counts as backed up when its copy was read back with
    the right size and hash, renamed, and `<name>.ok` was written, in this order. "In the Drive
    folder" is not yet "in the cloud": the mount uploads when it likes, and nothing here can see
    that.

    `state`: waiting (the first copies are under way), ok (everything wanted is there), degraded
    (behind for long, or failing and retrying), lost (five failures in a row, or three workers
    hung), off (the folder must not be written: it holds another branch of this run, or the run
    itself).

    known_id: the newest checkpoint id that the run here has ever had. A folder that holds another
    run under this run's name, the same ids with other content, or newer ones than that, is left
    alone: nothing is copied to it, and nothing there is replaced or removed.
    """

    LOST_AFTER = 5
    MAX_ABANDONED = 3
    BEHIND_AFTER_S = 300.0  # of copying without catching up; then a line says so

    def __init__(
        self,
        drive_dir: str | os.PathLike[str],
        run_dir: str | os.PathLike[str],
        *,
        wanted: Callable[[int], list[tuple[Path, str]]],
        known_id: Callable[[], int] | None = None,
        keep: int = 2,
        fs: FileSystem = REAL_FS,
        on_message: Callable[[str], None] = log.warning,
        stall_timeout_s: float = 120.0,
        backoff_s: float = 2.0,
        max_backoff_s: float = 300.0,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.drive_dir, self.run_dir = Path(drive_dir), Path(run_dir)
        self.folder = self.drive_dir / self.run_dir.resolve().name
        if why := _holds_run(self.drive_dir.absolute(), self.run_dir.resolve()):
            raise PersistenceError(
                f"cannot back up to {drive_dir}", why, "Use a folder apart from the runs."
            )
        self.keep = keep
        self._wanted, self._fs, self._say = wanted, fs, on_message
        self._known_id = known_id
        self._stall_timeout_s, self._chunk_bytes = stall_timeout_s, chunk_bytes
        self._backoff_s, self._max_backoff_s = backoff_s, max_backoff_s
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._guard = threading.Lock()
        self._worker: threading.Thread | None = None
        self._generation = 0
        self._progress_s = 0.0
        self._busy = False
        self._seen_mount = False
        self._stopped = False
        self._pending = False
        self._hung: list[threading.Thread] = []
        self.failures_in_a_row = 0
        self.abandoned = 0
        self.last_error = ""
        self.last_ok = ""
        self.state = "waiting"
        self.asked = False  # notify() was called: before that this process knows nothing of Drive
        self._asked_s = 0.0
        self._moved = 0  # bytes of the file that is being copied
        self._done: dict[
            str, tuple[int, int, int]
        ] = {}  # name -> (size, mtime, inode) of its source

    # -- called by the training thread: never touch the mount --------------------------------------
    def notify(self) -> None:
        """There is something new to copy."""
        with self._guard:
            if self._stopped or self.state == "off":
                return
            if not self._pending:
                self._asked_s = time.monotonic()
            self.asked = self._pending = True
            self._idle.clear()
            self._wake.set()
            self._spawn_if_allowed()

    def check(self) -> None:
        """Replace a worker that has made no progress for `stall_timeout_s`."""
        with self._guard:
            if self._stopped:
                return
            now = time.monotonic()
            if self._busy and now - self._progress_s > self._stall_timeout_s:
                self.abandoned += 1
                self.last_error = f"no progress for {self._stall_timeout_s:g} s"
                self._generation += 1
                self._busy = False
                if self._worker is not None:
                    self._hung.append(self._worker)
                self._worker = None
                self._hung = [t for t in self._hung if t.is_alive()]
                lost = len(self._hung) >= self.MAX_ABANDONED
                self._set_state("lost" if lost else "degraded")
                if lost:  # tried again when one of them comes back
                    self._idle.set()
                self._wake.set()
            late = now - self._asked_s > self.BEHIND_AFTER_S
            if self._pending and late and self.state in ("waiting", "ok"):
                self.last_error = f"{self.behind_text()} to copy, for {now - self._asked_s:.0f} s"
                self._set_state("degraded")
            if self._pending:
                self._spawn_if_allowed()

    def behind(self) -> list[tuple[str, int]]:
        """(name, bytes) of the models that are not on Drive yet. Looks at the local disk alone."""
        with contextlib.suppress(OSError):
            found = [(name, version_of(path)) for path, name in self._wanted(self.keep)]
            return [(n, i[0]) for n, i in found if i is not None and self._done.get(n) != i]
        return []

    def behind_text(self) -> str:
        """How much that is, less what is copied of the first: "2 files, 310 MiB"."""
        missing = self.behind()
        left = max(0, sum(size for _, size in missing) - self._moved)
        return f"{len(missing)} file{'s' * (len(missing) != 1)}, {left / 2**20:.1f} MiB"

    def _spawn_if_allowed(self) -> None:
        self._hung = [t for t in self._hung if t.is_alive()]
        if self._worker is None and len(self._hung) < self.MAX_ABANDONED:
            self._spawn()

    def status(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "folder": str(self.folder),
            "backed_up": sorted(self._done),
            "last_ok": self.last_ok,
            "last_error": self.last_error,
            "failures_in_a_row": self.failures_in_a_row,
            "abandoned_workers": self.abandoned,
        }

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything wanted is on Drive, but no longer than `timeout_s`."""
        end = time.monotonic() + timeout_s
        while not self._idle.wait(min(0.05, max(0.0, end - time.monotonic()))):
            self.check()
            if self.state == "off":
                return False
            if time.monotonic() >= end:
                return False
        return self.state == "ok"

    def wait_visibly(
        self, timeout_s: float, hurry: Callable[[], bool], say: Callable[[str], None]
    ) -> bool:
        """Give the last copy up to `timeout_s`, and `say` how far it is, and what is missing.

        Once `hurry` says so it gets DRIVE_HURRY_S more at most; False if that cut it short.
        """
        started = time.monotonic()
        end, shown, hurried = started + timeout_s, False, hurry()
        cut = False
        say_at = started + DRIVE_SILENT_S
        done = self.drain(min(DRIVE_LOOK_S, timeout_s))
        while not done and self.state not in ("lost", "off") and time.monotonic() < end:
            now = time.monotonic()
            if hurry() and not hurried:
                hurried, say_at = True, now
                cut = end > now + DRIVE_HURRY_S
                end = min(end, now + DRIVE_HURRY_S)
            if now >= say_at:
                left = end - now
                say(f"Drive backup: {self.behind_text()} to copy; waiting, {left:.0f} s at most")
                shown, say_at = True, now + DRIVE_SAY_EVERY_S
            done = self.drain(min(DRIVE_LOOK_S, max(0.0, end - time.monotonic())))
        missing = self.behind()
        if missing:
            names = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in missing)
            why = f" ({self.state}: {self.last_error})" if self.last_error else ""
            waited_s = time.monotonic() - started
            say(
                f"Drive backup: NOT complete after {waited_s:.0f} s{why}: {names} "
                f"not in {self.folder}. Here they are in {self.run_dir}; --resume copies them."
            )
        elif not done and timeout_s > 0:
            say("Drive backup: complete but for logs and results")
        elif shown:
            say(f"Drive backup: complete, {self.folder}")
        return done or not cut

    def stop(self) -> None:
        """Tell the worker to end at its next step. A hung one is left behind; it is a daemon."""
        with self._guard:
            self._stopped = True
            self._generation += 1
        self._wake.set()
        worker = self._worker
        if worker is not None:
            worker.join(0.5)

    def _spawn(self) -> None:
        self._progress_s = time.monotonic()
        self._worker = threading.Thread(
            target=self._loop, args=(self._generation,), name="drive-backup", daemon=True
        )
        self._worker.start()

    def _set_state(self, state: str) -> None:
        if state != self.state:
            self.state = state
            why = f" ({self.last_error})" if state != "ok" and self.last_error else ""
            self._say(f"Drive backup: {state}{why}")

    # -- the worker --------------------------------------------------------------------------------
    def _loop(self, generation: int) -> None:
        while generation == self._generation:
            self._wake.wait()
            if generation != self._generation:
                return
            self._wake.clear()
            self._busy = True
            try:
                self._step(generation)
                self._pass(generation)
            except _Abandoned:
                return
            except _Refused as e:
                if generation == self._generation:
                    self.last_error = str(e)
                    self._set_state("off")
                    self._busy = self._pending = False
                    self._idle.set()
                return
            except Exception as e:  # noqa: BLE001 - whatever a mount does, training goes on
                if generation != self._generation:
                    return
                self.failures_in_a_row += 1
                self.last_error = f"{type(e).__name__}: {e}"
                lost = self.failures_in_a_row >= self.LOST_AFTER
                self._set_state("lost" if lost else "degraded")
                self._busy = False
                self._wake.set()
                self._sleep(generation)
                continue
            self._busy = False
            self.failures_in_a_row = 0
            self.last_ok, self.last_error = timestamp_now(), ""
            self._asked_s = time.monotonic()
            self._set_state("ok")
            with self._guard:
                if not self._wake.is_set():
                    self._pending = False
                    self._idle.set()

    def _sleep(self, generation: int) -> None:
        delay = min(self._max_backoff_s, self._backoff_s * 2 ** (self.failures_in_a_row - 1))
        end = time.monotonic() + delay
        while time.monotonic() < end and generation == self._generation:
            time.sleep(min(0.05, delay))

    def _step(self, generation: int) -> None:
        """Before every operation: still wanted? And a sign of life."""
        if generation != self._generation:
            raise _Abandoned
        self._progress_s = time.monotonic()

    def _pass(self, generation: int) -> None:
        """Bring Drive up to date once. After every file, look again at what is wanted."""
        if why := _holds_run(self.drive_dir.resolve(), self.run_dir.resolve()):
            raise _Refused(why)
        self._check_mount(generation)
        self._refuse_other_branch(generation)
        self._copy_side_files(("config.json",), generation)
        while True:
            self._step(generation)
            wanted = self._wanted(self.keep)
            todo = [(p, n) for p, n in wanted if self._done.get(n) != version_of(p)]
            if not todo:
                break
            path, name = todo[0]
            identity = version_of(path)
            if identity is not None and self._copy(path, name, generation):
                self._done[name] = identity
                self.failures_in_a_row = 0  # slow and flaky is not lost
        self._copy_side_files(RUN_SIDE_FILES, generation)
        self._prune({n for _, n in wanted}, generation)

    def _copy_side_files(self, names: Iterable[str], generation: int) -> None:
        for name in names:
            path = self.run_dir / name
            identity = version_of(path)
            if identity is None or identity == self._done.get(name):
                continue
            if identity[0] <= MAX_SIDE_FILE_BYTES and self._copy(path, name, generation, False):
                self._done[name] = identity
                self.failures_in_a_row = 0

    def _refuse_other_branch(self, generation: int) -> None:
        """Never write over, or beside, another branch of the run: two machines, one folder."""
        self._step(generation)
        there = flat_files(self.folder, self._fs)
        here = {
            int(match[1]): path
            for path, name in self._wanted(MAX_ID)
            if (match := CHECKPOINT_NAME.fullmatch(name))
        }
        known = None if self._known_id is None else self._known_id()
        why = branch_conflict(
            here, there, known=known, there_fs=self._fs, tick=lambda: self._step(generation)
        )
        if why:
            raise _Refused(
                f"{self.folder} holds another branch of this run: {why}. Nothing there is changed. "
                "To back up this one, give another --drive_backup folder, or move that folder away"
            )

    def _check_mount(self, generation: int) -> None:
        """An unmounted Drive leaves an empty folder; copies into that would be no backup."""
        marker = self.drive_dir / DRIVE_MARKER
        self._step(generation)
        if exists(self._fs, marker):
            self._seen_mount = True
        elif self._seen_mount:
            raise OSError(
                errno.ENOTCONN, "the Drive folder is no longer mounted", str(self.drive_dir)
            )
        else:
            refuse_unmounted_colab(self.drive_dir)
            self._fs.mkdir(self.drive_dir)
            self._step(generation)
            atomic_write_bytes(
                marker, b"Backups of training runs are in the folders here.\n", self._fs
            )
            self._seen_mount = True
        self._step(generation)
        self._fs.mkdir(self.folder)

    def _copy(self, source: Path, name: str, generation: int, mark: bool = True) -> bool:
        """Copy, read back, rename, mark. False if the source is gone by now."""
        target, ok = self.folder / name, self.folder / f"{name}.ok"
        try:
            fd = REAL_FS.open_read(source)  # held open: rotation may remove the name meanwhile
        except FileNotFoundError:
            return False
        try:
            size = REAL_FS.fstat(fd).st_size
            self._step(generation)
            if mark and self._already_there(target, ok, fd, size, generation):
                return True
            free = self._fs.free_bytes(self.folder)
            if free is not None and free < size + SPACE_SLACK_BYTES:
                raise OSError(errno.ENOSPC, "the Drive is full", str(self.folder))
            self._step(generation)
            file = AtomicFile(target, self._fs)
            try:
                sha256 = self._transfer(fd, size, file, generation)
                self._step(generation)
                found = self._hash_back(file.temp, generation)
                if found != (size, sha256):
                    why = f"read back {found[0]} bytes of {size}, or other content"
                    raise OSError(errno.EIO, why, str(file.temp))
                if mark and exists(self._fs, ok):  # it speaks of the file about to be replaced
                    self._fs.unlink(ok)
                self._step(generation)
                self._fs.replace(file.temp, target)
                with contextlib.suppress(OSError):  # a FUSE mount may not know how
                    self._fs.fsync_dir(self.folder)
            except BaseException:
                file.abort()
                raise
            self._step(generation)
            if mark:
                self._mark(ok, name, size, sha256)
            return True
        finally:
            self._moved = 0
            REAL_FS.close(fd)

    def _transfer(self, fd: int, size: int, file: AtomicFile, generation: int) -> str:
        digest, left = hashlib.sha256(), size
        buffer = memoryview(bytearray(self._chunk_bytes))
        self._moved = 0
        REAL_FS.seek(fd, 0)
        while left:
            got = REAL_FS.readinto(fd, buffer[: min(left, len(buffer))])
            if not got:
                raise OSError(errno.EIO, "the local file became shorter while it was copied")
            digest.update(buffer[:got])
            self._step(generation)
            file.write(buffer[:got])
            left -= got
            self._moved = size - left
        self._step(generation)
        file.sync()
        return digest.hexdigest()

    def _hash_back(self, path: Path, generation: int) -> tuple[int, str]:
        with open_reader(self._fs, path) as (reader, _):
            return self._hash_of(reader.readinto, generation)

    def _hash_of(self, readinto: Callable[[memoryview], int], generation: int) -> tuple[int, str]:
        """(bytes, sha256) of what is left to read."""
        digest, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(self._chunk_bytes))
        while True:
            self._step(generation)
            got = readinto(buffer)
            if not got:
                return size, digest.hexdigest()
            digest.update(buffer[:got])
            size += got

    def _already_there(self, target: Path, ok: Path, fd: int, size: int, generation: int) -> bool:
        """A complete copy from an earlier attempt or process; a missing mark is added."""
        if not exists(self._fs, target) or self._fs.stat(target).st_size != size:
            return False
        record = read_json(ok, self._fs)
        REAL_FS.seek(fd, 0)
        _, mine = self._hash_of(partial(REAL_FS.readinto, fd), generation)
        if isinstance(record, dict) and record.get("sha256") != mine:
            return False
        if self._hash_back(target, generation) != (size, mine):
            return False
        if not isinstance(record, dict):
            self._mark(ok, target.name, size, mine)
        return True

    def _mark(self, ok: Path, name: str, size: int, sha256: str) -> None:
        record = {"name": name, "size": size, "sha256": sha256, "copied": timestamp_now()}
        atomic_write_json(ok, record, self._fs)

    def _prune(self, wanted: set[str], generation: int) -> None:
        """Remove older checkpoints from Drive, their marks first; and temporary files there."""
        self._step(generation)
        present = self._fs.listdir(self.folder)
        newest = max((n for n in wanted if CHECKPOINT_NAME.fullmatch(n)), default="")
        for name in present:
            self._step(generation)
            if TEMP_NAME.fullmatch(name):
                self._fs.unlink(self.folder / name)
            elif CHECKPOINT_NAME.fullmatch(name) and name not in wanted and name < newest:
                if f"{name}.ok" in present:
                    self._fs.unlink(self.folder / f"{name}.ok")
                self._fs.unlink(self.folder / name)
                self._done.pop(name, None)


class _Abandoned(Exception):
    """This worker was replaced while it hung."""


class _Refused(Exception):
    """The Drive folder must not be written, now or later."""


# --------------------------------------------------------------------------------------------------
# Which folder
# --------------------------------------------------------------------------------------------------
def backup_folder(path: Any) -> Path:
    """The folder that is meant for backups. PersistenceError for what names none: "" would be the
    current folder."""
    if isinstance(path, bool) or not str(path).strip():
        raise PersistenceError(
            f"cannot back up to {path!r}",
            "it names no folder",
            "Give a folder, e.g. /content/drive/MyDrive/ARC-EFE-Backups, or leave it out.",
        )
    return expanded(path)


def _holds_run(drive_dir: Path, run_dir: Path) -> str:
    """Why backups of a run in `run_dir` must not go to `drive_dir`; "". Both absolute."""
    drive_dir = Path(os.path.normpath(drive_dir))
    folder = drive_dir / run_dir.name
    if drive_dir.is_relative_to(run_dir):
        return f"it lies in the run itself, {run_dir}"
    if run_dir.is_relative_to(folder):
        return f"the backup would go to {folder}, where the run itself is"
    return ""


def refuse_runs_folder(drive_dir: Any, runs_dir: str | os.PathLike[str]) -> None:
    """PersistenceError where backups would lie among the runs: they would be taken for runs."""
    drive, runs = backup_folder(drive_dir).absolute(), expanded(runs_dir).absolute()
    drive, runs = Path(os.path.normpath(drive)), Path(os.path.normpath(runs))
    if drive.is_relative_to(runs):
        raise PersistenceError(
            f"cannot back up to {drive_dir}",
            f"it is {'the' if drive == runs else 'in the'} folder of the runs themselves, {runs}",
            "Give a folder on another disk, e.g. a mounted Drive, or leave it out.",
        )


def refuse_unmounted_colab(path: Path) -> None:
    """`/content/drive` is a mount on Colab; a folder made there without it is not a Drive."""
    mount = Path("/content/drive")
    if path.is_relative_to(mount) and not mount.is_mount():
        raise PersistenceError(
            f"cannot back up to {path}",
            "Google Drive is not mounted",
            "Run: from google.colab import drive; drive.mount('/content/drive')",
        )


def _project_folder() -> str:
    """The folder that this program lies in, links resolved: whose setting it is."""
    return str(Path(__file__).resolve().parents[1])


def _drive_config_path() -> Path:
    """Where `setup_drive_backup` records the folder, a file for each project folder: beside the
    user's other settings, so that a copy of the project does not take it along.
    `ARC_TRAINER_CONFIG_DIR` overrides where that is."""
    override = os.environ.get("ARC_TRAINER_CONFIG_DIR")
    base = os.environ.get("XDG_CONFIG_HOME")
    folder = (Path(base) if base else Path.home() / ".config") / "arc_trainer"
    name = hashlib.sha256(_project_folder().encode()).hexdigest()[:16]
    return (Path(override) if override else folder) / "drive_backup" / f"{name}.json"


def setup_drive_backup(path: str | os.PathLike[str] | None) -> Path | None:
    """Use `path` for backups from now on, in this and in every later process of this project folder
    (the one that this file lies in) on this machine; other copies of the project know nothing of
    it.

    Prints `Drive backup enabled: <path>` and returns the path. None switches the backup off.
    """
    config = _drive_config_path()
    if path is None:
        config.unlink(missing_ok=True)
        print("Drive backup disabled")  # noqa: T201 - the notebook cell shows this line
        return None
    folder = backup_folder(path)
    refuse_unmounted_colab(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_bytes(b"ok")
        probe.unlink()
        (folder / DRIVE_MARKER).write_bytes(b"Backups of training runs are in the folders here.\n")
    except OSError as e:
        raise PersistenceError(
            f"cannot back up to {folder}",
            str(e),
            "Mount the Drive, or choose a folder you may write.",
        ) from e
    folder = folder.resolve()
    config.parent.mkdir(parents=True, exist_ok=True)
    record = {"project": _project_folder(), "path": str(folder), "since": timestamp_now()}
    atomic_write_json(config, record)
    print(f"Drive backup enabled: {path}")  # noqa: T201 - the notebook cell shows this line
    return folder


def configured_drive_backup() -> Path | None:
    """The folder that `setup_drive_backup` recorded for this project folder, or None."""
    try:
        record = read_json(_drive_config_path())
    except OSError:
        return None
    mine = isinstance(record, dict) and record.get("project") == _project_folder()
    path = record.get("path") if mine else None
    return Path(path) if isinstance(path, str) and path else None


def flat_files(folder: Path, fs: FileSystem = REAL_FS) -> dict[int, Path]:
    """id -> file of a backup's folder: beside its marks, or in a `checkpoints` folder put there."""
    found: dict[int, Path] = {}
    for place in (folder, folder / "checkpoints"):
        for name in names_in(fs, place):
            if match := CHECKPOINT_NAME.fullmatch(name):
                found.setdefault(int(match[1]), place / name)
    return found


def branch_conflict(
    here: Mapping[int, Path],
    there: Mapping[int, Path],
    *,
    known: int | None = None,
    there_fs: FileSystem = REAL_FS,
    tick: Callable[[], None] = lambda: None,
) -> str:
    """Why two sets of checkpoints are not one history of one run, as far as seals tell; or "".

    Speaks against it: another run's id, the same id with other content, ids in another order than
    their times, and (with `known`, the newest id that was ever here) one there that is newer. A
    damaged file counts for nothing.
    """
    mine = {i: seal for i, path in here.items() if (seal := seal_of(path)) is not None}
    runs = [seal.get("run_id") for seal in mine.values()]
    for i, path in sorted(there.items()):
        tick()
        seal = seal_of(path, there_fs)
        if seal is None:
            continue
        why, saved = "", seconds_of(seal.get("timestamp"))
        if mine and seal.get("run_id") not in runs:
            why = f"checkpoint {i} there is of another run"
        elif i in mine and mine[i]["seal_sha256"] != seal["seal_sha256"]:
            if is_intact(here[i], REAL_FS, tick):
                why = f"checkpoint {i} there is another than here"
        elif known is not None and i > known:
            why = f"checkpoint {i} there is newer than any here"
        for j, own in mine.items():
            at = seconds_of(own.get("timestamp"))
            if why or saved is None or at is None or i == j:
                continue
            if saved > at if i < j else saved < at:
                order = "after" if i < j else "before"
                why = f"checkpoint {i} there was saved {order} checkpoint {j} here"
        if why and is_intact(path, there_fs, tick):
            return why
    return ""
