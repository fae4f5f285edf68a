"""What a run writes beside its checkpoints: console, training.log, metrics.jsonl, small JSON files.

A disk that is full, read-only or gone stops nothing: what it refuses stays in memory, is written at
the next flush, and is said once. Nothing here raises OSError. Importing it needs the standard
library alone. `from run_log import RunLog, read_metrics`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from persistence.files import atomic_write_bytes, atomic_write_json
from sinks import Sink, check_installed

KEPT_BYTES = 16 << 20  # of lines and of rows each, while the disk refuses them; oldest go first
LINE_BYTES = 1 << 20  # a longer line of metrics.jsonl is damage


# ---------------------------------------------------------------------------------------------
# metrics.jsonl: the one reader
# ---------------------------------------------------------------------------------------------


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null where a number is not finite, which JSON cannot say."""
    bad = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return {k: None if k in bad else v for k, v in row.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, whatever is in it: damaged lines are left out, never raised on.

    Each row is a dict with a text as `kind`; its other values are as they were found, and so are
    its keys, but for those of older versions (`_renamed`). No rows where there is no such file, or
    it cannot be read.
    """
    rows = []
    with contextlib.suppress(OSError):
        rows += [_renamed(row) for _, row in scan_metrics(path) if row is not None]
    return rows


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row under the keys of docs/METRICS.md: older versions wrote `step` for `batches_done`, and
    the d_acc of a batch a second time as `accuracy_delta`."""
    if "step" in row:
        row["batches_done"] = row.pop("step")
    if row["kind"] == "batch":
        row.pop("accuracy_delta", None)
    return row


def scan_metrics(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """(line, its row or None where it is damaged) of a metrics.jsonl, in the file's order.

    Nothing where there is no such file. Raises OSError where it cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)  # without blocking: a FIFO in its place must not hang the start
    except FileNotFoundError:
        return
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError("it is not a regular file")
    with os.fdopen(fd, "rb") as file:
        while line := file.readline(LINE_BYTES):
            rest = line
            while not rest.endswith(b"\n") and len(rest) == LINE_BYTES:  # too long to be ours
                rest = file.readline(LINE_BYTES)
            yield line, _row_of(line) if rest is line else None


def _row_of(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("kind"), str) else None


def place_of(row: dict[str, Any]) -> tuple[float, float] | None:
    """(epoch, batch) that a row speaks of, None where it should say so and does not.

    An epoch's own row comes after its batches: its batch is infinite. Rows of other kinds that name
    none come before everything.
    """
    if row["kind"] == "start":
        return (-1.0, -1.0)
    known = row["kind"] in ("batch", "epoch")
    epoch = row.get("epoch", None if known else -1)
    batch = row.get("batch", None if row["kind"] == "batch" else -1)
    if type(epoch) is not int or type(batch) is not int:
        return None
    return (epoch, math.inf if row["kind"] == "epoch" else batch)


# ---------------------------------------------------------------------------------------------
# Files that are appended to
# ---------------------------------------------------------------------------------------------


def append_bytes(path: Path, data: bytes) -> None:
    """Append all of `data`, or nothing of it: what a full disk took of it is taken back."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    fd = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = os.fstat(fd).st_size
        rest = memoryview(data)
        try:
            while len(rest):
                rest = rest[os.write(fd, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


class Appended:
    """A file that grows by lines. Those that the disk refuses wait, up to KEPT_BYTES of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: deque[bytes] = deque()
        self.waiting_bytes = 0
        self.dropped = 0  # oldest lines, for want of memory, since the last write that succeeded
        self.error = ""  # of the last try; empty if it succeeded

    def add(self, line: str) -> None:
        """Keep a line (without its newline) until the next `write`."""
        data = (line + "\n").encode("utf-8", "backslashreplace")
        self.waiting.append(data)
        self.waiting_bytes += len(data)
        while self.waiting_bytes > KEPT_BYTES:
            self.waiting_bytes -= len(self.waiting.popleft())
            self.dropped += 1

    def write(self) -> bool:
        """Append what waits; False if the disk refuses, and it goes on waiting."""
        if not self.waiting:
            return not self.error
        try:
            append_bytes(self.path, b"".join(self.waiting))
        except OSError as error:
            self.error = error.strerror or str(error) or type(error).__name__
            return False
        self.waiting.clear()
        self.waiting_bytes, self.error = 0, ""
        return True


# ---------------------------------------------------------------------------------------------
# The log of a run
# ---------------------------------------------------------------------------------------------


class RunLog:
    """Lines to console and training.log, objects to metrics.jsonl, and whole small JSON files.

    folder: the run's, None to write nothing; report_to: where figures are shown as well (`sinks`);
    offline: no sink sends anything. The constructor raises UserError where the sink's package is
    missing. No method raises OSError: what the disk refuses is
    kept (see `Appended`) and tried again at every `flush`; the trouble is said once on stderr, and
    so is its end. The console goes through tqdm, so that a progress bar and lines do not mix.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        quiet: bool,
        report_to: str = "none",
        offline: bool = False,
    ) -> None:
        self.folder, self.quiet = folder, quiet
        self.sink: Sink | None = None
        self.lines = Appended(folder / "training.log") if folder is not None else None
        self.rows = Appended(folder / "metrics.jsonl") if folder is not None else None
        self.files: dict[str, Any] = {}  # name -> what the disk refused to take under that name
        self._troubled: set[str] = set()  # names of files that are known to fail
        self._rewind: tuple[int, int] | None = None  # owed: the disk refused it so far
        check_installed(report_to)  # a package that is missing is said before there is a folder
        if folder is not None and report_to != "none":
            self.sink = Sink(report_to, folder, offline=offline, quiet=quiet, warn=self.warn)

    # -- lines -----------------------------------------------------------------------------------
    def say(self, text: str = "", *, important: bool = False) -> None:
        """A line for the console (if not quiet, or important) and the log file."""
        self._log(text)
        if important or not self.quiet:
            self._print(text, sys.stdout)

    def warn(self, text: str) -> None:
        """A line about trouble: on stderr, whatever `quiet` says, and in the log file."""
        self._log(text)  # first: what the log itself has to say must not come after the last line
        self._print(text, sys.stderr)

    def _print(self, text: str, stream: Any) -> None:
        from tqdm import tqdm

        # A console may be a file on the same full disk, or a pipe whose reader is gone.
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(text, file=stream)
            stream.flush()

    def _log(self, text: str) -> None:
        if self.lines is None:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        self.lines.add(f"{stamp},{int(1000 * (now % 1)):03d} {text}")
        self._follow("training.log", self.lines.write(), self.lines.error, self.lines)

    def _follow(self, name: str, works: bool, error: str, file: Appended | None = None) -> None:
        """Say it when a file begins to fail, and when it works again."""
        if works == (name not in self._troubled):
            return
        if works:
            self._troubled.discard(name)
            text = f"{name} is written again"
            if file is not None and file.dropped:
                text += f"; its oldest {file.dropped} lines of that time are lost"
                file.dropped = 0
        else:
            self._troubled.add(name)
            text = f"{name} was not written: {error}. What it lacks is kept in memory."
        self.warn(text)

    # -- metrics ---------------------------------------------------------------------------------
    def record(self, row: dict[str, Any]) -> None:
        """Keep one object for metrics.jsonl until `flush`."""
        if self.rows is not None:
            self.rows.add(json.dumps(finite(row)))
        if self.sink is not None:
            self.sink.row(row)

    def write_config(self, config: dict[str, Any]) -> bool:
        """Replace config.json, as `write_json` does, and begin what --report_to says."""
        written = self.write_json("config.json", config)
        if self.sink is not None:
            self.sink.begin(config["arguments"])
        return written

    def write_results(self, results: dict[str, Any]) -> bool:
        """Replace results.json, as `write_json` does."""
        if self.sink is not None:
            self.sink.results(results)
        return self.write_json("results.json", results)

    def flush(self) -> bool:
        """Write everything that waits. True if all of it is in its files now."""
        if self.folder is None or self.lines is None or self.rows is None:
            return True
        if self._rewind is not None:
            self._try_rewind()
        if self._rewind is None:  # else the rows after it would go with those before it
            self._follow("metrics.jsonl", self.rows.write(), self.rows.error, self.rows)
        for name in list(self.files):
            self.write_json(name, self.files[name])
        self._follow("training.log", self.lines.write(), self.lines.error, self.lines)
        return not self._troubled

    def write_json(self, name: str, content: Any) -> bool:
        """Replace a file of the run folder in one step. False if it has to wait for a `flush`."""
        if self.folder is None:
            return True
        error = ""
        try:
            atomic_write_json(self.folder / name, content)
            self.files.pop(name, None)
        except OSError as e:
            error = e.strerror or str(e)
            self.files[name] = content
        self._follow(name, not error, error)
        return not error

    def last_batch(self) -> tuple[int, int] | None:
        """(epoch, batch) of the newest batch in metrics.jsonl, None without one."""
        if self.folder is None:
            return None
        found = None
        for row in read_metrics(self.folder / "metrics.jsonl"):
            if row["kind"] == "batch" and place_of(row) is not None:
                found = (row["epoch"], row["batch"])
        return found

    def rewind(self, epoch: int, batch: int) -> None:
        """Drop metrics of batches at or after (epoch, batch): a resumed run writes them again.

        Damaged lines go, too, and a line says how many. Until the disk lets this happen no row is
        written.
        """
        if self.folder is not None:
            self._rewind = (epoch, batch)
            self._try_rewind()

    def _try_rewind(self) -> None:
        assert self.folder is not None
        assert self._rewind is not None
        path = self.folder / "metrics.jsonl"
        keep: list[bytes] = []
        n_lines = damaged = 0
        prefix = True  # what is kept is the beginning of the file, as it is
        error = ""
        try:
            for line, row in scan_metrics(path):
                n_lines += 1
                place = None if row is None else place_of(row)
                damaged += place is None
                if place is not None and place < self._rewind:
                    prefix &= len(keep) == n_lines - 1 and line.endswith(b"\n")
                    keep.append(line if line.endswith(b"\n") else line + b"\n")
            if len(keep) < n_lines and prefix:
                os.truncate(path, sum(map(len, keep)))  # needs no space, unlike a new file
            elif not prefix:
                atomic_write_bytes(path, b"".join(keep))
        except OSError as e:
            error = e.strerror or str(e)
        else:
            self._rewind = None
        if damaged and not error:
            lines = "one damaged line was" if damaged == 1 else f"{damaged} damaged lines were"
            self.warn(f"metrics.jsonl: {lines} dropped; a kill while it is written leaves one")
        self._follow("metrics.jsonl", not error, error, self.rows)

    # -- the end ---------------------------------------------------------------------------------
    def close(self) -> None:
        """Flush a last time, and say what the disk still refuses."""
        if not self.flush():
            names = sorted(self._troubled)
            self._print(f"Not written to {self.folder}: {', '.join(names)}.", sys.stderr)
        if self.sink is not None:
            self.sink.close()


class MutedLog(RunLog):
    """The log of a process beside the one that writes: it says nothing and writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(None, quiet=True)
        self.folder = folder

    def _print(self, text: str, stream: Any) -> None:
        pass

    def write_json(self, name: str, content: Any) -> bool:
        return True

    def last_batch(self) -> tuple[int, int] | None:
        return None

    def rewind(self, epoch: int, batch: int) -> None:
        pass


def listener(log: RunLog) -> Callable[[str], None]:
    """Where saving and the Drive backup report: trouble is shown whatever --quiet says."""
    troubled = False

    def hear(text: str) -> None:
        nonlocal troubled
        if text.startswith("Drive backup: ok"):
            log.say(text, important=troubled)
            troubled = False
        else:
            troubled |= text.startswith("Drive backup")
            log.warn(text)

    return hear
