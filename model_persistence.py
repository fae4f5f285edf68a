"""Checkpoints that survive kills, power cuts, full disks and rotten files; best model; resuming.

The front door of `persistence/`: the calls that save and load one run directory, and the names that
its documents promise (`__all__`). Knows nothing about models: a module is anything that has
`state_dict` and `load_state_dict`. Never unpickles code, never seeds, never trains.
    from model_persistence import ModelPersistence
    persistence = ModelPersistence("runs/arc_complete_20260101_120000", max_checkpoints=5)
What is guaranteed, and how to recover by hand: docs/PERSISTENCE.md.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from persistence.checkpoint_file import (
    FORMAT_VERSION,
    Loaded,
    SixObjects,
    verify_checkpoint_file,
)
from persistence.drive import (
    DriveBackup,
    backup_folder,
    configured_drive_backup,
    setup_drive_backup,
)
from persistence.files import (
    REAL_FS,
    CheckpointError,
    CorruptCheckpointError,
    FileSystem,
    LockedError,
    MismatchError,
    NoCheckpointError,
    PersistenceError,
    atomic_write_json,
    exists,
    log,
    names_in,
    read_json,
    timestamp_now,
)
from persistence.from_drive import copy_back_from_drive
from persistence.restoring import (
    apply_state,
    capture_rng_state,
    check_device,
    collect_state,
    environment,
    foreign_optimizer,
    metadata_of,
    restore_rng_state,
    resume_report,
)
from persistence.run_guard import RunLock, StopSignals
from persistence.run_index import MAX_ID, RunIndex, TrainingState, remove_temporaries
from persistence.saving import CheckpointWriter, Job
from persistence.state_tree import SnapshotBuffers, clean_metrics, compact, free_memory_bytes

__all__ = [
    "CheckpointError",
    "CorruptCheckpointError",
    "LockedError",
    "MismatchError",
    "ModelPersistence",
    "NoCheckpointError",
    "PersistenceError",
    "RunLock",
    "StopSignals",
    "TrainingState",
    "capture_rng_state",
    "restore_rng_state",
    "resume_report",
    "setup_drive_backup",
    "verify_checkpoint_file",
]

FREE_MEMORY_FRAC = 0.6  # a snapshot that needs more of the free memory is streamed instead


def __getattr__(name: str) -> Any:
    """`DynamicMemoryThreshold` by this name, too; imported when asked for (PEP 562)."""
    if name == "DynamicMemoryThreshold":
        import curriculum

        return curriculum.DynamicMemoryThreshold
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class ModelPersistence:
    """Checkpoints of one run directory.

    Args:
        output_dir: the run directory; created at the first save.
        max_checkpoints: rolling checkpoints kept (at least 1). Old ones go only after the new one
            is durable and read back; one that only `best_metadata.json` points to is never removed.
        save_every_n_batches: interval of `should_save_checkpoint`; 0 never.
        drive_backup: folder of a mounted Drive; None uses what `setup_drive_backup` recorded, False
            switches it off.
        async_save: copy into memory and write in a thread; the loop is blocked only for the copy.
            At most one write is in flight; a save that comes too early is skipped and counted.
        fs, drive_fs: the file operations.
        drive_options: further arguments of `DriveBackup` (keep, stall_timeout_s, backoff_s, ...).
        on_message: receives one-line reports, always in the caller's thread; default: logging.
        lock: take the run's lock at the first save; LockedError if another process holds it.

    A save that fails for a reason of the disk is reported and counted (`failed_saves`), and
    training goes on; anything else a writer thread raised is raised at the next call.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        max_checkpoints: int = 5,
        save_every_n_batches: int = 50,
        *,
        drive_backup: str | os.PathLike[str] | bool | None = None,
        async_save: bool = False,
        fs: FileSystem = REAL_FS,
        drive_fs: FileSystem | None = None,
        drive_options: Mapping[str, Any] | None = None,
        on_message: Callable[[str], None] | None = None,
        lock: bool = True,
        verify_live: bool = True,
    ) -> None:
        if max_checkpoints < 1:
            raise PersistenceError(
                f"max_checkpoints is {max_checkpoints}", "a run needs one", "Use 1 or more."
            )
        self.output_dir = Path(output_dir)
        self._index = index = RunIndex(self.output_dir, fs)
        self.checkpoints_dir, self.quarantine_dir = index.checkpoints_dir, index.quarantine_dir
        self.set_aside_dir, self.best_path = index.set_aside_dir, index.best_path
        self.manifest_path = index.manifest_path
        self.best_metadata_path = index.best_metadata_path
        self.training_state = index.training_state
        self.save_every_n_batches = save_every_n_batches
        self.async_save = async_save
        self.loaded: dict[str, Any] = {}  # {checkpoint_id, epoch, batch, metrics} of the last load
        self.last_blocked_s = 0.0  # how long the last save held the caller
        self.passed_over: list[dict[str, str]] = []  # before this process looked: on Drive
        self._on_message = on_message or log.warning
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock = RunLock(self.output_dir) if lock else None
        self._verify_live = verify_live
        self._buffers = SnapshotBuffers()
        self._drive: DriveBackup | None = None
        if drive_backup is None:
            drive_backup = configured_drive_backup() or False
        if drive_backup is not False:  # True is refused: it names no folder
            self._drive = DriveBackup(
                backup_folder(drive_backup),
                self.output_dir,
                wanted=index.wanted_on_drive,
                known_id=lambda: index.highest_id(index.manifest()),
                on_message=self._messages.put,
                fs=drive_fs or REAL_FS,
                **(drive_options or {}),
            )
        self._writer = CheckpointWriter(index, max_checkpoints, self._messages, self._drive)

    # -- what is there ---------------------------------------------------------------------------
    @property
    def checkpoints(self) -> dict[int, dict[str, Any]]:
        """id -> {checkpoint_id, epoch, batch, metrics, timestamp, ...}, oldest first."""
        entries = self._index.manifest()["checkpoints"]
        found: dict[int, dict[str, Any]] = {}
        for checkpoint_id, path in sorted(self._index.files().items()):
            found[checkpoint_id] = entries.get(checkpoint_id) or self._index.describe(path)
            found[checkpoint_id] = {**found[checkpoint_id], "checkpoint_id": checkpoint_id}
        return found

    def checkpoint_path(self, checkpoint_id: int) -> Path:
        """Where a checkpoint lies, or would lie."""
        if type(checkpoint_id) is not int or not 0 <= checkpoint_id < MAX_ID:
            raise CheckpointError(
                f"no checkpoint {checkpoint_id!r}",
                "ids are whole numbers from 0",
                self._index.have_text(),
            )
        return self._index.files().get(checkpoint_id, self._index.own_path(checkpoint_id))

    def get_resume_info(self) -> dict[str, Any] | None:
        """{checkpoint_id, epoch, batch, metrics} of the newest checkpoint that verifies, or None.

        What does not verify is said, and stays where it is.
        """
        self._deliver()
        manifest = self._index.manifest()
        for checkpoint_id, path in sorted(self._index.files().items(), reverse=True):
            try:
                info = self._index.verified_info(path, checkpoint_id, manifest)
            except (OSError, CheckpointError) as e:
                self._on_message(f"Not resumable: {e}")
                continue
            return {"checkpoint_id": checkpoint_id, **info}
        return None

    # -- saving ----------------------------------------------------------------------------------
    def should_save_checkpoint(self, batch: int) -> bool:
        """True every `save_every_n_batches` batches, not at batch 0. Call it once per batch: it
        also delivers what the writer and the Drive worker have to say."""
        self.poll()
        n = self.save_every_n_batches
        return n > 0 and batch > 0 and batch % n == 0

    def poll(self) -> None:
        """Deliver messages, raise a writer's error, look after the Drive worker. Microseconds."""
        if self._drive is not None:
            self._drive.check()
        self._deliver()

    def _deliver(self) -> None:
        while True:
            try:
                self._on_message(self._messages.get_nowait())
            except queue.Empty:
                break
        error, self._writer.error = self._writer.error, None
        if error is not None:
            if isinstance(error, PersistenceError):
                raise error
            raise CheckpointError("the checkpoint writer failed", repr(error)) from error

    def prepare(
        self,
        agent: Any,
        qwen: Any,
        solver2: Any,
        efe_loss: Any,
        policy_rl: Any,
        optimizer: Any,
        *,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Allocate and touch the snapshot buffers, so that the first save blocks no longer than the
        later ones. Call it after the first batch, when the optimizer has its state."""
        objects = SixObjects(agent, qwen, solver2, efe_loss, policy_rl, optimizer)
        state = collect_state(objects, extra)
        if self.async_save and self._writer.job is None and self._fits_in_memory(state):
            self._buffers.copy(state)

    def save_checkpoint(
        self,
        agent: Any,
        qwen: Any,
        solver2: Any,
        efe_loss: Any,
        policy_rl: Any,
        optimizer: Any,
        epoch: int,
        batch: int,
        metrics: Mapping[str, Any],
        *,
        extra: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> int | None:
        """Save everything. Returns the checkpoint's id; None if the save was skipped or failed.

        Call it between batches only. With `async_save` the id is a promise until `flush()` returns
        or `last_durable_id` reaches it. `wait` waits for a write in flight and for this one: use it
        for the last save of a run or before stopping on a signal.
        """
        started = time.perf_counter()
        try:
            if wait:
                self._writer.join()
            self.poll()
            if self._writer.busy():
                self._writer.skipped_saves += 1
                self._on_message(
                    f"Skipped the checkpoint at epoch {epoch}, batch {batch}: the previous one is "
                    f"still being written ({self._writer.skipped_saves} skipped so far)."
                )
                return None
            objects = SixObjects(agent, qwen, solver2, efe_loss, policy_rl, optimizer)
            state = collect_state(objects, extra)
            if not self._ready():
                return None
            if self._writer.untidy:
                self.tidy()
            assert self._index.next_id is not None
            checkpoint_id = self._index.next_id
            head, seal = self._head(epoch, batch, metrics, checkpoint_id, "checkpoint")
            in_background = self.async_save and self._fits_in_memory(state)
            if in_background:
                state = self._buffers.copy(state)
            else:
                self._buffers.clear()
                state = compact(state)
            target = self._index.own_path(checkpoint_id)
            job = Job(checkpoint_id, target, {**head, **state}, seal, in_buffers=in_background)
            self._writer.enqueue(job)
            if wait:
                self._writer.join()
            if wait or not in_background:
                self._deliver()
                return None if job.entry is None else checkpoint_id
            return checkpoint_id
        finally:
            self.last_blocked_s = time.perf_counter() - started

    def _head(
        self,
        epoch: int,
        batch: int,
        metrics: Mapping[str, Any],
        checkpoint_id: int | None,
        kind: str,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what goes into the file beside the state, what goes into its seal)."""
        head = {
            "epoch": int(epoch),
            "batch": int(batch),
            "metrics": clean_metrics(metrics),
            "timestamp": timestamp_now(),
            "checkpoint_id": checkpoint_id,
            "run_id": self._index.run_id,
            "kind": kind,
            "format_version": FORMAT_VERSION,
        }
        seal = dict(head)
        return {**head, "environment": environment(), "sealed": True}, seal

    def _fits_in_memory(self, state: Any) -> bool:
        needed = self._buffers.missing_bytes(state)
        free = free_memory_bytes()
        return free is None or needed <= FREE_MEMORY_FRAC * free

    def _ready(self) -> bool:
        """Lock, directories, identity and next id, once. False if the disk does not let us yet."""
        if self._index.next_id is not None:
            return True
        if self._lock is not None:
            try:
                self._lock.acquire()
            except OSError as e:
                self._writer.failed(f"cannot lock {self.output_dir}", e)
                return False
        try:
            self._index.make_folders()
            self.tidy()
            self._index.claim()
        except OSError as e:
            self._writer.failed(f"cannot prepare {self.output_dir}", e)
            return False
        return True

    def tidy(self) -> None:
        """Remove temporary files of processes that are gone. Only with the run's lock, which says
        that nobody else writes here."""
        self._writer.untidy = not remove_temporaries(self.output_dir, self._index.fs)

    def flush(self, drive_timeout_s: float = 0.0) -> bool:
        """Wait for the writer, then up to `drive_timeout_s` for the Drive copy.

        Returns True if everything asked for so far is durable. Raises what the writer raised.
        """
        self._writer.join()
        if self._drive is not None and self._drive.asked and drive_timeout_s > 0:
            self._drive.drain(drive_timeout_s)
            self._writer.note_drive()
        failed = self._writer.job is not None and self._writer.job.entry is None
        self._deliver()
        return not failed

    def close(
        self, drive_timeout_s: float = 0.0, hurry: Callable[[], bool] = lambda: False
    ) -> bool:
        """Flush, stop the Drive worker and give the lock back.

        The copy to Drive gets up to `drive_timeout_s`; lines say what is left, and what is missing.
        Once `hurry` says so (a signal) it gets DRIVE_HURRY_S more at most. Returns False if that
        cut the copy short.
        """
        whole = True
        try:
            self._writer.join()
            if self._drive is not None and self._drive.asked:
                self._drive.notify()  # the small files written since, results.json among them
                whole = self._drive.wait_visibly(drive_timeout_s, hurry, self._on_message)
                self._writer.note_drive()
            self.flush()
        finally:
            if self._drive is not None:
                self._drive.stop()
            if self._lock is not None:
                self._lock.release()
            self._index.next_id = None
            self._buffers.clear()
            self._writer.job = None
        return whole

    def back_up(self) -> None:
        """Bring Drive up to date, also with what an earlier process could not copy; no waiting."""
        if self._drive is not None:
            self._drive.notify()

    def __enter__(self) -> ModelPersistence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def max_checkpoints(self) -> int:
        """Rolling checkpoints kept; may be changed, from the next save on."""
        return self._writer.max_checkpoints

    @max_checkpoints.setter
    def max_checkpoints(self, kept: int) -> None:
        self._writer.max_checkpoints = max(1, kept)

    @property
    def failed_saves(self) -> int:
        """How many saves the disk refused."""
        return self._writer.failed_saves

    @property
    def skipped_saves(self) -> int:
        """How many saves came while the one before was still being written."""
        return self._writer.skipped_saves

    def drive_state(self) -> tuple[str, int]:
        """State of the copy on Drive, "off" without one, and how many files it lacks. Looks at the
        local disk alone."""
        return ("off", 0) if self._drive is None else (self._drive.state, len(self._drive.behind()))

    @property
    def last_durable_id(self) -> int | None:
        """The newest checkpoint that this process has on the disk."""
        return self._writer.last_durable_id

    @property
    def last_failure(self) -> str:
        """Why the newest checkpoint is not on the disk; empty if it is."""
        return self._writer.last_failure

    @property
    def ending(self) -> bool:
        """Set it for the last save of a process: no other will follow."""
        return self._writer.ending

    @ending.setter
    def ending(self, ending: bool) -> None:
        self._writer.ending = ending

    # -- the best model --------------------------------------------------------------------------
    def best_value(self, metric_name: str = "accuracy_delta") -> float | None:
        """The metric of the best model so far, or None."""
        best = self._index.read_best()
        value = best["metrics"].get(metric_name) if best else None
        return float(value) if isinstance(value, (int, float)) else None

    @property
    def best_metric(self) -> str | None:
        """The metric that best_model.pt was chosen by, as far as best_metadata.json tells."""
        recorded = None
        with contextlib.suppress(OSError):
            recorded = read_json(self.best_metadata_path, self._index.fs)
        name = recorded.get("metric_name") if isinstance(recorded, dict) else None
        return name if isinstance(name, str) else None

    def save_best_model(
        self,
        agent: Any,
        qwen: Any,
        solver2: Any,
        efe_loss: Any,
        policy_rl: Any,
        optimizer: Any,
        epoch: int,
        batch: int,
        metrics: Mapping[str, Any],
        *,
        metric_name: str = "accuracy_delta",
        extra: Mapping[str, Any] | None = None,
        higher_is_better: bool = True,
    ) -> bool:
        """Keep this state as best_model.pt if `metrics[metric_name]` beats the best so far.

        Right after `save_checkpoint` of the same state and metrics it costs nothing: the file is a
        hard link. Otherwise it is written like a checkpoint, never in place. Returns True if it is
        (or, with `async_save`, will be) the new best.
        """
        cleaned = clean_metrics(metrics)
        value = cleaned.get(metric_name)
        if not isinstance(value, (int, float)):
            have = ", ".join(sorted(cleaned)) or "none"
            raise PersistenceError(
                f"save_best_model: no number called '{metric_name}' in the metrics",
                f"there are: {have}",
                "Pass metric_name=, or put it into metrics.",
            )
        self.poll()
        if not math.isfinite(value):
            return False
        job = self._writer.job
        if (
            self._writer.busy()
            and job is not None
            and (job.follow_ups or job.checkpoint_id is None)
        ):
            self._writer.join()  # a best model is on its way: compare with that one
        try:
            best = self.best_value(metric_name)
        except OSError as e:
            self._writer.failed("best_model.pt was not updated", e, best=True)
            return False
        if best is not None and (value <= best if higher_is_better else value >= best):
            return False
        objects = SixObjects(agent, qwen, solver2, efe_loss, policy_rl, optimizer)
        state = collect_state(objects, extra)
        if not self._ready():
            return False
        if job is not None and job.holds(state, epoch, batch, cleaned):
            self._writer.link_best_after(job, metric_name)
        else:
            self._writer.join()
            head, seal = self._head(epoch, batch, cleaned, None, "best")
            if self.async_save and self._fits_in_memory(state):
                payload = {**head, **self._buffers.copy(state)}
                best_job = Job(None, self.best_path, payload, seal, in_buffers=True)
                self._writer.enqueue_best(best_job, metric_name)
                return True
            self._writer.publish_best({**head, **compact(state)}, seal, metric_name)
        self._deliver()
        if self._writer.busy():
            return True
        with contextlib.suppress(OSError):
            return self.best_value(metric_name) == value
        return False

    # -- loading ---------------------------------------------------------------------------------
    def load_checkpoint(
        self,
        checkpoint_id: int,
        agent: Any,
        qwen: Any,
        solver2: Any,
        efe_loss: Any,
        policy_rl: Any,
        optimizer: Any,
        device: Any = "cpu",
    ) -> dict[str, Any]:
        """Load one checkpoint by id into the six (None leaves one out), or raise CheckpointError.

        Weights go to wherever the modules' parameters are, so `device` is only checked; tensors in
        the returned metadata (`extra`) are on the CPU. Returns {checkpoint_id, epoch, batch,
        metrics, timestamp, extra, environment, optimizer, ...}.

        An optimizer of another kind, or with other groups, than the saved one is left as it is;
        that is said, and `metadata["optimizer"]` is then "left out: ..." instead of "loaded".
        """
        check_device(device)
        self._writer.join()
        path = self.checkpoint_path(checkpoint_id)
        if not exists(self._index.fs, path):
            raise CheckpointError(
                f"no checkpoint {checkpoint_id}", f"{path} does not exist", self._index.have_text()
            )
        manifest = self._index.manifest()
        older = [i for i in self._index.files() if i < checkpoint_id]
        try:
            loaded = self._index.verify(path, checkpoint_id, manifest)
        except OSError as e:
            raise CheckpointError(f"cannot read {path}", str(e), self._index.have_text()) from e
        except CorruptCheckpointError as e:
            fix = f"Load checkpoint {max(older)} instead." if older else "Use --resume."
            raise CorruptCheckpointError(e.what, e.why, fix) from e
        objects = SixObjects(agent, qwen, solver2, efe_loss, policy_rl, optimizer)
        return self._apply(loaded, objects, path, "checkpoint", any_optimizer=True)

    def load_latest(
        self,
        agent: Any,
        qwen: Any,
        solver2: Any,
        efe_loss: Any,
        policy_rl: Any,
        optimizer: Any,
        device: Any = "cpu",
        *,
        checkpoint: int | str | None = None,
        check: Callable[[dict[str, Any]], object] | None = None,
    ) -> dict[str, Any]:
        """Load the newest good checkpoint: local ones newest first, best_model.pt, then Drive.

        A bad file goes to `checkpoints/quarantine/` with the reason beside it. A good file that
        does not fit the objects, the optimizer included, raises MismatchError at once. `skipped` in
        the result lists what was rejected. Raises NoCheckpointError if nothing is left, saying
        where it looked.

        checkpoint: load this id, or "best", instead; what is newer then moves to `set_aside/` in
        the run directory (`set_aside` in the result), so that no later load takes it and no id
        comes twice.
        check: called with the file's metadata before anything is changed; what it raises is raised.
        """
        check_device(device)
        self._writer.join()
        objects = SixObjects(agent, qwen, solver2, efe_loss, policy_rl, optimizer)
        try:
            if checkpoint is not None:
                return self._load_chosen(objects, checkpoint, check)
            return self._load_newest(objects, check)
        except OSError as e:
            raise CheckpointError(
                f"cannot read {self.output_dir}", str(e), "Check the disk and its permissions."
            ) from e

    def _load_newest(
        self, objects: SixObjects, check: Callable[[dict[str, Any]], object] | None = None
    ) -> dict[str, Any]:
        skipped: list[dict[str, str]] = list(self.passed_over)
        tried: set[Path] = set()
        for source in ("checkpoint", "best model", "Drive copy of checkpoint"):
            if source.startswith("Drive") and not self._fetch_from_drive(skipped):
                continue
            candidates: list[tuple[int | None, Path]]
            candidates = [*sorted(self._index.files().items(), reverse=True)]
            if source == "best model":
                there = exists(self._index.fs, self.best_path)
                candidates = [(None, self.best_path)] if there else []
            for checkpoint_id, path in candidates:
                if path in tried:
                    continue
                loaded = self._verify_or_skip(checkpoint_id, path, skipped)
                if loaded is None:
                    if not exists(self._index.fs, path):
                        continue  # quarantined: the name is free for Drive's copy
                    tried.add(path)
                    continue
                if check is not None:
                    check(metadata_of(loaded, path, source))
                metadata = self._apply(loaded, objects, path, source)
                self._check_best(path, skipped)
                metadata["skipped"] = skipped
                return metadata
        looked = [str(self.checkpoints_dir), str(self.best_path)]
        if self._drive is not None:
            looked.append(str(self._drive.folder))
        raise NoCheckpointError(looked, skipped)

    def peek(self) -> dict[str, Any] | None:
        """What the newest good checkpoint, else best_model.pt, holds beside the six states; None if
        there is none. Nothing is loaded into anything, and nothing is moved."""
        files = sorted(self._index.files().items(), reverse=True)
        for checkpoint_id, path in [*files, (None, self.best_path)]:
            source = "best model" if checkpoint_id is None else "checkpoint"
            with contextlib.suppress(OSError, CheckpointError):
                loaded = verify_checkpoint_file(path, expect_id=checkpoint_id, fs=self._index.fs)
                return metadata_of(loaded, path, source)
        return None

    def _load_chosen(
        self,
        objects: SixObjects,
        checkpoint: int | str,
        check: Callable[[dict[str, Any]], object] | None,
    ) -> dict[str, Any]:
        """The checkpoint that the user names; no other is taken in its place."""
        if isinstance(checkpoint, int):
            path, source, what = self.checkpoint_path(checkpoint), "checkpoint", f" {checkpoint}"
        else:
            path, source, what = self.best_path, "best model", ""
        if not exists(self._index.fs, path):
            aside = ", ".join(names_in(self._index.fs, self.set_aside_dir))
            why = f"{path} does not exist" + (f"; set aside are {aside}" if aside else "")
            raise CheckpointError(f"no {source}{what}", why, self._index.have_text())
        own_id = checkpoint if isinstance(checkpoint, int) else None
        loaded = self._index.verify(path, own_id, self._index.manifest())
        if check is not None:
            check(metadata_of(loaded, path, source))
        metadata = self._apply(loaded, objects, path, source)
        metadata["set_aside"] = self._set_aside(metadata)
        return metadata

    def _set_aside(self, metadata: Mapping[str, Any]) -> list[int]:
        """Move the checkpoints that are newer than a loaded one out of the way, and results.json,
        which tells of them; the ids moved."""
        own_id, here = metadata["checkpoint_id"], (metadata["epoch"], metadata["batch"])
        moved = []
        for checkpoint_id, path in sorted(self._index.files().items(), reverse=True):
            if own_id is None:  # a best model with a file of its own
                told = self._index.describe(path)
                at = (told["epoch"], told["batch"])
                newer = None in at or at > here
            else:
                newer = checkpoint_id > own_id
            if newer:
                self._index.move(path, self.set_aside_dir)
                moved.append(checkpoint_id)
        results = self.output_dir / "results.json"
        if moved and exists(self._index.fs, results):
            self._index.move(results, self.set_aside_dir)
        return moved[::-1]

    def set_best_aside(self) -> Path | None:
        """Move best_model.pt, chosen by figures that no longer compare, to `set_aside/`; where it
        is now, or None."""
        try:
            if not exists(self._index.fs, self.best_path):
                return None
            moved = self._index.move(self.best_path, self.set_aside_dir)
            if exists(self._index.fs, self.best_metadata_path):
                self._index.move(self.best_metadata_path, self.set_aside_dir)
        except OSError as e:
            self._on_message(f"best_model.pt could not be set aside: {e}")
            return None
        return moved

    def _verify_or_skip(
        self, checkpoint_id: int | None, path: Path, skipped: list[dict[str, str]]
    ) -> Loaded | None:
        """Verify one candidate (id None: a best model); a bad one is quarantined and noted."""
        manifest = self._index.manifest()
        try:
            return self._index.verify(path, checkpoint_id, manifest)
        except OSError as e:  # the disk, not the file: leave it where it is
            skipped.append({"file": str(path), "reason": f"cannot be read: {e}"})
        except CorruptCheckpointError as e:
            reason = f"{e.what}: {e.why}" if e.why else e.what
            item = {"file": str(path), "reason": reason.removeprefix(f"{path}: ")}
            moved = self._quarantine(path, item["reason"])
            if moved is not None:
                item["moved_to"] = str(moved)
            skipped.append(item)
        self._on_message(f"Skipped {path}: {skipped[-1]['reason']}")
        return None

    def _check_best(self, loaded_from: Path, skipped: list[dict[str, str]]) -> None:
        """A damaged best_model.pt must not stand in the way of the next, readable best."""
        try:
            best = self._index.fs.stat(self.best_path)
            if os.path.samestat(best, self._index.fs.stat(loaded_from)):
                return
            verify_checkpoint_file(self.best_path, fs=self._index.fs, load=False)
        except OSError:
            return
        except CorruptCheckpointError as e:
            moved = self._quarantine(self.best_path, str(e))
            skipped.append({"file": str(self.best_path), "reason": e.why or e.what})
            self._on_message(f"Skipped {e}; moved to {moved}")

    def _quarantine(self, path: Path, reason: str) -> Path | None:
        """Move a bad file out of the way, the reason beside it. None if the disk forbids it."""
        try:
            target = self._index.move(path, self.quarantine_dir)
            note = {"file": str(path), "reason": reason, "when": timestamp_now()}
            atomic_write_json(target.with_name(f"{target.name}.reason.json"), note, self._index.fs)
        except OSError as e:
            self._on_message(f"{path} could not be moved to quarantine: {e}")
            return None
        return target

    def _apply(
        self,
        loaded: Loaded,
        objects: SixObjects,
        path: Path,
        source: str,
        any_optimizer: bool = False,
    ) -> dict[str, Any]:
        payload = loaded.payload
        named = objects._asdict()
        optimizer = "loaded" if named["optimizer"] is not None else "not given"
        if any_optimizer and named["optimizer"] is not None:
            why = foreign_optimizer(named["optimizer"], payload["optimizer"], str(path))
            if why is not None:
                named["optimizer"], optimizer = None, f"left out: {why}"
        recast = apply_state(payload, named, str(path), self._verify_live)
        for note in loaded.notes:
            self._on_message(note)
        if optimizer.startswith("left out"):
            self._on_message(f"{path}: weights loaded, the optimizer's state {optimizer}")
        metadata = metadata_of(loaded, path, source)
        self.loaded = {k: metadata[k] for k in ("checkpoint_id", "epoch", "batch", "metrics")}
        return metadata | {"cast": recast, "skipped": [], "optimizer": optimizer}

    def load_best_model(
        self,
        agent: Any,
        qwen: Any,
        solver2: Any,
        efe_loss: Any,
        policy_rl: Any,
        optimizer: Any,
        device: Any = "cpu",
    ) -> dict[str, Any]:
        """Load best_model.pt into the six (None leaves one out); see `load_checkpoint`.

        If it is damaged and the checkpoint it was linked from is a separate, good file, that one
        is used.
        """
        check_device(device)
        self._writer.join()
        objects = SixObjects(agent, qwen, solver2, efe_loss, policy_rl, optimizer)
        recorded = read_json(self.best_metadata_path, self._index.fs)
        recorded = recorded if isinstance(recorded, dict) else {}
        files = self._index.files()
        twin = recorded.get("checkpoint_id")
        candidates = [self.best_path] if exists(self._index.fs, self.best_path) else []
        if type(twin) is int and twin in files:
            candidates.append(files[twin])
        reasons = []
        for path in candidates:
            entry = recorded if path == self.best_path and "sha256" in recorded else None
            run_id = recorded.get("run_id")
            try:
                loaded = verify_checkpoint_file(path, entry=entry, run_id=run_id, fs=self._index.fs)
            except (OSError, CorruptCheckpointError) as e:
                reasons.append(str(e))
                continue
            metadata = self._apply(loaded, objects, path, "best model", any_optimizer=True)
            metadata["skipped"] = [{"file": str(self.best_path), "reason": r} for r in reasons]
            return metadata
        if not reasons:
            raise CheckpointError(
                f"no best model in {self.output_dir}",
                "best_model.pt does not exist",
                "Train until the first evaluation, or load a checkpoint by id.",
            )
        raise CorruptCheckpointError(
            "the best model cannot be used",
            "; ".join(reasons),
            f"Load a checkpoint instead. {self._index.have_text()}",
        )

    # -- Drive -----------------------------------------------------------------------------------
    def _fetch_from_drive(self, skipped: list[dict[str, str]]) -> bool:
        """Copy good checkpoints of this run back from Drive. True if there is anything new."""
        if self._drive is None:
            return False
        copied = copy_back_from_drive(self._drive.folder, self.output_dir, skipped, self._index.fs)
        return bool(copied)

    def drive_status(self) -> dict[str, Any]:
        """{state: off | ok | degraded | lost, ...} of the Drive backup."""
        return self._drive.status() if self._drive is not None else {"state": "off"}
