"""A Drive that is slow, hangs, vanishes, is full, or silently loses bytes.

Training must not notice, a copy that is bad must never be marked ok, and the state must say what
is the case. At the end a lost run directory is restored from what the Drive has.
    python tests/faults/drive.py
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import FileSystem, Toy, arguments, finish, forked, scratch, warm_up

from model_persistence import ModelPersistence
from persistence.from_drive import restore_run_from_drive

FAST = {"stall_timeout_s": 0.3, "backoff_s": 0.05, "max_backoff_s": 0.1, "chunk_bytes": 4096}
SAVES = 12


class SlowFS(FileSystem):
    """1 MB/s."""

    def write(self, fd: int, data: bytes | memoryview) -> int:
        time.sleep(len(data) / 1e6)
        return super().write(fd, data)


class HangingFS(FileSystem):
    """Writes never come back until `release`."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self.release.wait()
        raise OSError(errno.ETIMEDOUT, "too late")


class FullFS(FileSystem):
    def write(self, fd: int, data: bytes | memoryview) -> int:
        raise OSError(errno.ENOSPC, "no space")


class TruncatingFS(FileSystem):
    """Says that everything was written, and writes half of every third block."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self.count += 1
        if self.count % 3 == 0:
            os.write(fd, bytes(data)[: len(data) // 2])
            return len(data)
        return super().write(fd, data)


class RottingFS(FileSystem):
    """Flips a bit in every fifth block."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self.count += 1
        if self.count % 5 == 0:
            changed = bytearray(data)
            changed[len(changed) // 2] ^= 4
            return super().write(fd, bytes(changed))
        return super().write(fd, data)


class FlakyFS(FileSystem):
    """One in seven of the operations that change something fails."""

    def __init__(self) -> None:
        self.rng = random.Random(0)

    def _maybe(self) -> None:
        if self.rng.random() < 1 / 7:
            raise OSError(errno.EIO, "flaky mount")

    def create(self, path: Path) -> int:
        self._maybe()
        return super().create(path)

    def fsync(self, fd: int) -> None:
        self._maybe()
        super().fsync(fd)

    def replace(self, source: Path, target: Path) -> None:
        self._maybe()
        super().replace(source, target)


def false_marks(drive: Path) -> list[str]:
    """Files marked ok whose content is not what the mark says."""
    wrong = []
    for ok in drive.rglob("*.ok"):
        record, file = json.loads(ok.read_text()), ok.with_name(ok.name.removesuffix(".ok"))
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != record["sha256"]:
            wrong.append(ok.name)
    return wrong


def train_with(
    run_dir: Path,
    drive: Path | bool,
    fs: FileSystem | None,
    options: dict[str, Any] = FAST,
    midway: Callable[[], None] = lambda: None,
    drain_s: float = 0.0,
    until: tuple[str, ...] = ("ok", "lost"),
) -> tuple[float, dict[str, Any], list[str]]:
    """SAVES batches, each saved. Returns (seconds in the manager, Drive status, messages).

    At the end it waits for one of the states `until`, `drain_s` at most: "lost" is no end of the
    copying, so a Drive that shall come back from it is given the time.
    """
    toy = Toy()
    messages: list[str] = []
    persistence = ModelPersistence(
        run_dir,
        max_checkpoints=3,
        drive_backup=drive,
        drive_fs=fs,
        drive_options=options,
        on_message=messages.append,
    )
    blocked_s = 0.0
    for batch in range(SAVES):
        toy.step(0, batch)
        if batch == SAVES // 2:
            midway()
        started = time.perf_counter()
        persistence.should_save_checkpoint(batch)
        extra, metrics = toy.extra(), {"accuracy_delta": float(batch)}
        persistence.save_checkpoint(*toy.six, 0, batch, metrics, extra=extra)
        if batch % 3 == 2:
            persistence.save_best_model(*toy.six, 0, batch, metrics, extra=extra)
        blocked_s += time.perf_counter() - started
        time.sleep(0.05)
    end = time.monotonic() + drain_s
    while time.monotonic() < end:
        persistence.poll()
        settled = persistence.flush(0.05)  # "ok" before that is of an earlier save
        state = persistence.drive_status()["state"]
        if state in until and (settled or state != "ok"):
            break
    persistence.flush(0.01)
    status = persistence.drive_status()
    started = time.perf_counter()
    persistence.close()
    blocked_s += max(0.0, time.perf_counter() - started - 0.6)  # stop() may wait 0.5 s, once
    return blocked_s, status, messages


def run() -> dict[str, Any]:
    """All the ways a Drive fails; returns the figures."""
    warm_up()
    figures: dict[str, Any] = {"cases": {}, "problems": []}

    def require(name: str, condition: bool, what: str) -> None:
        if not condition:
            figures["problems"].append(f"{name}: {what}")

    with scratch() as root:
        kill_in_copy(root, require)
        baseline_s, _, _ = train_with(root / "off", False, None)
        figures["baseline_s"] = round(baseline_s, 3)
        hanging = HangingFS()
        cases: dict[str, tuple[FileSystem | None, str, float]] = {
            "healthy": (None, "ok", 30.0),
            "1 MB/s": (SlowFS(), "ok", 30.0),
            "hangs": (hanging, "lost", 3.0),
            "full": (FullFS(), "lost", 3.0),
            "truncates silently": (TruncatingFS(), "lost", 3.0),
            "flips bits": (RottingFS(), "lost or ok", 3.0),
            "flaky": (FlakyFS(), "ok", 30.0),
        }
        for name, (fs, wanted, drain_s) in cases.items():
            drive, run_dir = root / f"drive {name}", root / "runs" / f"run_{len(figures['cases'])}"
            until = ("ok",) if wanted == "ok" else ("ok", "lost")
            blocked_s, status, messages = train_with(
                run_dir, drive, fs, drain_s=drain_s, until=until
            )
            figures["cases"][name] = {"state": status["state"], "blocked_s": round(blocked_s, 3)}
            require(name, status["state"] in wanted, f"state {status['state']}, wanted {wanted}")
            slower = blocked_s - baseline_s
            require(name, slower < max(0.5, baseline_s), f"blocked {slower:.2f} s more")
            require(name, not false_marks(drive), f"falsely marked ok: {false_marks(drive)}")
            recorded = json.loads((run_dir / "training_state.json").read_text())["drive"]["state"]
            require(name, recorded in wanted, f"training_state.json says {recorded}")
            if wanted == "lost":
                require(name, any("lost" in m for m in messages), "nobody was told")
                require(name, not list(drive.rglob("*.pt.ok")), "something was marked ok")
            if wanted == "ok":
                names = {p.name for p in (drive / run_dir.name).iterdir()}
                needed = {"checkpoint_00010.pt.ok", "checkpoint_00011.pt.ok", "best_model.pt.ok"}
                require(name, needed <= names, f"Drive holds {sorted(names)}")
                kept = [n for n in names if n.startswith("checkpoint_") and n.endswith(".pt")]
                require(name, len(kept) == 2, f"Drive holds {kept}")
                restore(name, drive, run_dir, root / "new machine", require)
        hanging.release.set()
        vanish(root, require, figures)
    return figures


def restore(name: str, drive: Path, run_dir: Path, runs: Path, require: Any) -> None:
    """The run directory is gone: a new machine has only the Drive."""
    shutil.rmtree(runs, ignore_errors=True)
    found = restore_run_from_drive(drive, runs)
    require(name, found == runs / run_dir.name, f"restored {found}")
    if found is None:
        return
    toy = Toy()
    metadata = ModelPersistence(found, drive_backup=False).load_latest(*toy.six)
    require(name, metadata["batch"] == SAVES - 1, f"restored batch {metadata['batch']}")
    # Only the checkpoints are gone: a resume fetches them itself.
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "best_model.pt").unlink()
    persistence = ModelPersistence(run_dir, drive_backup=drive, on_message=lambda _: None)
    metadata = persistence.load_latest(*toy.six)
    require(name, metadata["batch"] == SAVES - 1, f"fetched batch {metadata['batch']}")
    require(name, persistence.load_best_model(*toy.six)["batch"] == SAVES - 1, "no best fetched")


def vanish(root: Path, require: Any, figures: dict[str, Any]) -> None:
    """Unmounted in the middle: an empty folder stays. Nothing may be copied into it."""
    drive, away = root / "drive v", root / "drive away"

    def unmount() -> None:
        end = time.monotonic() + 10
        while not list(drive.rglob("*.pt.ok")) and time.monotonic() < end:
            time.sleep(0.02)
        drive.rename(away)
        drive.mkdir()

    _, status, _ = train_with(root / "runs" / "v", drive, None, FAST, unmount, 3.0)
    figures["cases"]["vanishes"] = {"state": status["state"], "blocked_s": None}
    require("vanishes", status["state"] == "lost", f"state {status['state']}")
    require("vanishes", not list(drive.rglob("*.pt*")), "copied into an unmounted folder")
    require("vanishes", not false_marks(away), f"falsely marked: {false_marks(away)}")


def kill_in_copy(root: Path, require: Any) -> None:
    """SIGKILL during copies: whatever is marked ok is good, and the next process goes on."""
    drive, run_dir = root / "drive k", root / "runs" / "k"
    slow = {**FAST, "stall_timeout_s": 30.0}
    for number in range(4):
        ended, _ = forked(lambda _: train_with(run_dir, drive, SlowFS(), slow), 0.15 + 0.1 * number)
        require("killed", ended == -signal.SIGKILL, f"ended with {ended}")
        require("killed", not false_marks(drive), f"falsely marked: {false_marks(drive)}")
    _, status, _ = train_with(run_dir, drive, None, drain_s=30.0, until=("ok",))
    require("killed", status["state"] == "ok", f"state {status['state']}")
    require("killed", not list(drive.rglob("*.tmp")), "temporary files stay on the Drive")


def main() -> None:
    arguments(__doc__ or "")
    figures = run()
    finish(figures, not figures["problems"])


if __name__ == "__main__":
    main()
