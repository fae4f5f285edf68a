"""A file's way to the disk: in the background, in order, with room made where there is none.

One job at a time: file, index entry, rotation, each durable before the next; then the best model.
Collects no state and loads nothing.
    from persistence.saving import CheckpointWriter, Job
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from persistence.checkpoint_file import write_checkpoint_file
from persistence.drive import DriveBackup
from persistence.files import (
    SPACE_SLACK_BYTES,
    atomic_write_json,
    exists,
    is_space_error,
    temporary_name,
)
from persistence.run_index import RunIndex
from persistence.state_tree import same_content, state_bytes

NO_LINK_ERRNOS = frozenset(
    {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
)


class Job:
    """One file on its way to the disk: a checkpoint, or (`checkpoint_id` None) a best model.

    Args:
        checkpoint_id: of a checkpoint.
        target: where the file goes.
        payload: what the file holds: of a job in the background a copy, else the live tensors.
        seal: what the file's seal says.
        in_buffers: whether the payload is such a copy.
    """

    def __init__(
        self,
        checkpoint_id: int | None,
        target: Path,
        payload: dict[str, Any],
        seal: dict[str, Any],
        in_buffers: bool,
    ) -> None:
        self.checkpoint_id, self.target = checkpoint_id, target
        self.payload, self.seal, self.in_buffers = payload, seal, in_buffers
        self.entry: dict[str, Any] | None = None  # of the index; None: not on the disk
        self.follow_ups: list[Callable[[], None]] = []
        self.closed = False  # no more follow-ups: the thread is past them

    def holds(self, state: Any, epoch: int, batch: int, metrics: Mapping[str, Any]) -> bool:
        """True if a checkpoint, in flight or on disk, has exactly this state and these metrics."""
        if self.checkpoint_id is None:
            return False
        if (self.seal["epoch"], self.seal["batch"]) != (epoch, batch):
            return False
        if self.seal["metrics"] != metrics:
            return False
        if self.closed and self.entry is None:
            return False
        kept = self.payload
        if not self.in_buffers:
            # What was streamed were the live tensors themselves: compare with the file instead.
            try:
                kept = torch.load(self.target, map_location="cpu", weights_only=True, mmap=True)
            except Exception:  # noqa: BLE001 - any doubt means: write a file of its own
                return False
        return all(same_content(kept[name], value) for name, value in state.items())


class CheckpointWriter:
    """Puts checkpoints and the best model of one run on the disk, one job at a time.

    A job that the disk refuses is counted and said, and training goes on. What there is to say goes
    into `messages`; what else a thread raised waits in `error` for the caller's thread.

    Args:
        index: the run directory, with the run's lock held and `claim` called before the first job.
        max_checkpoints: how many are kept (at least 1).
        messages: receives one-line reports, from any thread.
        drive: told of every new file.
    """

    def __init__(
        self,
        index: RunIndex,
        max_checkpoints: int,
        messages: queue.SimpleQueue[str],
        drive: DriveBackup | None,
    ) -> None:
        self._index, self.max_checkpoints = index, max_checkpoints
        self._messages, self._drive = messages, drive
        self.failed_saves = self.skipped_saves = self.completed_saves = 0
        self.last_durable_id: int | None = None
        self.last_failure = ""  # why the newest checkpoint is not on the disk; empty if it is
        self.ending = False  # no other save will follow
        self.untidy = False  # a failed save may have left a temporary file
        self.error: BaseException | None = None
        self.job: Job | None = None  # the last one, done or not
        self._thread: threading.Thread | None = None
        self._guard = threading.RLock()

    def busy(self) -> bool:
        """Whether a job is under way in the thread."""
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        """Wait until it is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def enqueue(self, job: Job) -> None:
        """Write a checkpoint after the one in flight: in the thread if it is a copy, else now."""
        self.join()
        self.job = job
        if job.in_buffers:
            # Not a daemon: the interpreter waits for it, so that a script's last save completes.
            self._thread = threading.Thread(
                target=self._carry_out, args=(job,), name="checkpoint-writer"
            )
            self._thread.start()
        else:
            self._carry_out(job)

    def _carry_out(self, job: Job) -> None:
        """Publish it, then what was asked for meanwhile."""
        try:
            self._publish_checkpoint(job)
        except BaseException as e:  # reaches the loop at its next call
            if threading.current_thread() is not self._thread:
                raise
            self.failed_saves += 1
            self.last_failure = f"the checkpoint writer failed: {e!r}"
            self.error = e
        finally:
            while True:
                with self._guard:
                    if not job.follow_ups:
                        job.closed = True
                        break
                    task = job.follow_ups.pop(0)
                try:
                    task()
                except BaseException as e:  # noqa: BLE001 - reaches the loop at its next call
                    self.error = e

    def _publish_checkpoint(self, job: Job) -> None:
        """The protocol: file, index entry, rotation, each durable before the next."""
        checkpoint_id = job.checkpoint_id
        assert checkpoint_id is not None
        try:
            size, sha256 = self._write_where_there_is_room(job.target, job.payload, job.seal)
        except (OSError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and not is_space_error(e):
                raise
            try:
                # There although the write failed: renamed, but the directory's fsync was refused.
                taken = exists(self._index.fs, job.target)
            except OSError:
                taken = True  # unknown: an id must not be used twice
            if taken:
                self._index.next_id = checkpoint_id + 1
            self.failed(f"checkpoint {checkpoint_id} was not saved", e)
            return
        self._index.next_id = checkpoint_id + 1
        entry = {k: v for k, v in job.seal.items() if k not in ("checkpoint_id", "run_id", "kind")}
        entry |= {"size": size, "sha256": sha256, "torch": str(torch.__version__)}
        job.entry = entry
        self.completed_saves += 1
        self.last_durable_id = checkpoint_id
        self.last_failure = ""
        indexed = self._guarded(
            f"checkpoint {checkpoint_id} is safe, but the index was not updated",
            lambda: self._index.write(checkpoint_id, entry),
        )
        if indexed:
            self._rotate(self.max_checkpoints)
        self._note_state(job)
        if self._drive is not None:
            self._drive.notify()

    def _write_where_there_is_room(
        self, target: Path, payload: dict[str, Any], seal: dict[str, Any]
    ) -> tuple[int, str]:
        """Check the space, write, and once more after making room if the disk is full."""
        needed = state_bytes(payload) + SPACE_SLACK_BYTES
        free = self._index.fs.free_bytes(target.parent)
        if free is not None and free < needed:
            self._make_room()
            free = self._index.fs.free_bytes(target.parent)
            if free is not None and free < needed:
                why = f"{needed >> 20} MiB needed, {free >> 20} MiB free"
                raise OSError(errno.ENOSPC, why, str(target.parent))
        try:
            return write_checkpoint_file(target, payload, seal, self._index.fs)
        except (OSError, RuntimeError) as e:
            if not is_space_error(e):
                raise
            self._make_room()
            return write_checkpoint_file(target, payload, seal, self._index.fs)

    def _make_room(self) -> None:
        removed = self._rotate(min(2, self.max_checkpoints), verify=True)
        if removed:
            self._messages.put(f"Disk full: removed {len(removed)} old checkpoints, trying again.")

    def _rotate(self, keep: int, verify: bool = False) -> list[int]:
        """Remove the oldest own checkpoints beyond `keep`.

        Never the last good one: rotation follows a save that was read back, or (`verify`, making
        room on a full disk) checks that a kept one is good. Never the one that best points to.
        """
        removed: list[int] = []
        try:
            files = self._index.own_files()
            ids = sorted(files)
            doomed = [i for i in ids[: max(0, len(ids) - keep)] if i != self._index.protected_id()]
            kept = ids[-keep:][::-1]  # one good one is enough: the newest first
            if doomed and verify and not any(self._index.is_good(i, files[i]) for i in kept):
                return removed
            for checkpoint_id in doomed:
                self._index.fs.unlink(files[checkpoint_id])
                removed.append(checkpoint_id)
        except OSError as e:
            self._messages.put(f"Old checkpoints were not removed: {e}")
        return removed

    def _note_state(self, job: Job) -> None:
        fields = {
            "checkpoint_id": job.checkpoint_id,
            "epoch": job.seal["epoch"],
            "batch": job.seal["batch"],
            "saved": job.seal["timestamp"],
            "completed_saves": self.completed_saves,
            "skipped_saves": self.skipped_saves,
            "failed_saves": self.failed_saves,
            "drive": self._drive.status() if self._drive is not None else {"state": "off"},
        }
        self._guarded(
            "training_state.json was not updated", lambda: self._index.training_state.save(fields)
        )

    def _guarded(self, what: str, action: Callable[[], object]) -> bool:
        """Run a step whose failure costs only derived data."""
        try:
            action()
        except OSError as e:
            if is_space_error(e):
                self._make_room()
                with contextlib.suppress(OSError):
                    action()
                    return True
            self.untidy = True
            self._messages.put(f"{what}: {e}")
            return False
        return True

    def failed(self, what: str, error: BaseException, best: bool = False) -> None:
        """Count and say a save that the disk refused; of a best model, if `best`."""
        self.failed_saves += 1
        self.untidy = True
        if not best:
            self.last_failure = f"{what}: {error}"
        hope = "an epoch that beats the kept one is kept" if best else "the next save tries again"
        hope = "" if self.ending else f"Training goes on; {hope} "
        self._messages.put(f"{what}: {error}. {hope}({self.failed_saves} failed so far).")

    def note_drive(self) -> None:
        """Write into training_state.json how the backup is doing."""
        assert self._drive is not None
        fields = {"drive": self._drive.status()}
        self._guarded(
            "training_state.json was not updated", lambda: self._index.training_state.save(fields)
        )

    # -- the best model ----------------------------------------------------------------------------
    def enqueue_best(self, job: Job, metric_name: str) -> None:
        """Write best_model.pt, a file of its own, in the thread. Nothing may be in flight."""

        def write() -> None:
            try:
                job.entry = self.publish_best(job.payload, job.seal, metric_name)
            except BaseException as e:  # noqa: BLE001 - reaches the loop at its next call
                self.error = e

        job.closed = True
        self.job = job
        self._thread = threading.Thread(target=write, name="checkpoint-writer")
        self._thread.start()

    def link_best_after(self, job: Job, metric_name: str) -> None:
        """Make a checkpoint the best model too, now or as soon as it is written."""
        with self._guard:
            queued = not job.closed
            if queued:
                job.follow_ups.append(lambda: self._link_best(job, metric_name))
        if not queued:
            self._link_best(job, metric_name)

    def _link_best(self, job: Job, metric_name: str) -> None:
        """best_model.pt as a hard link of a checkpoint just written; its own file if that fails."""
        if job.entry is None:  # the checkpoint failed; the best may still fit
            self.publish_best(job.payload, job.seal, metric_name)
            return
        fs, best_path = self._index.fs, self._index.best_path
        temp = self._index.output_dir / temporary_name(best_path.name)
        try:
            fs.link(job.target, temp)
            fs.replace(temp, best_path)
            fs.fsync_dir(self._index.output_dir)
        except OSError as e:
            with contextlib.suppress(OSError):
                fs.unlink(temp)
            if e.errno in NO_LINK_ERRNOS:  # FAT, some network mounts: a file of its own
                self.publish_best(job.payload, job.seal, metric_name)
            else:
                self.failed("best_model.pt was not updated", e, best=True)
            return
        with contextlib.suppress(OSError):  # renaming a link onto its own file leaves both names
            if exists(fs, temp):
                fs.unlink(temp)
        self._record_best(job.seal, job.entry["size"], job.entry["sha256"], metric_name)

    def publish_best(
        self, payload: dict[str, Any], seal: dict[str, Any], metric_name: str
    ) -> dict[str, Any] | None:
        """Write best_model.pt and its metadata now. {size, sha256}; None if the disk refuses."""
        try:
            size, sha256 = self._write_where_there_is_room(self._index.best_path, payload, seal)
        except (OSError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and not is_space_error(e):
                raise
            self.failed("best_model.pt was not updated", e, best=True)
            return None
        self._record_best(seal, size, sha256, metric_name)
        return {"size": size, "sha256": sha256}

    def _record_best(
        self, seal: Mapping[str, Any], size: int, sha256: str, metric_name: str
    ) -> None:
        record = {**seal, "metric_name": metric_name, "size": size, "sha256": sha256}
        record["value"] = seal["metrics"].get(metric_name)
        self._guarded(
            "best_model.pt is safe, but best_metadata.json was not updated",
            lambda: atomic_write_json(self._index.best_metadata_path, record, self._index.fs),
        )
        if self._drive is not None:
            self._drive.notify()
