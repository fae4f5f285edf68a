"""One writer per run, and signals that let it save first.

The lock on a run directory, and SIGTERM, SIGINT and SIGHUP as a flag. Saves nothing itself, and
needs the standard library alone.
    from persistence.run_guard import RunLock, StopSignals
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from persistence.files import LockedError, is_space_error, log, timestamp_now

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows; runs there go unlocked
    fcntl = None  # type: ignore[assignment]

DRIVE_HURRY_S = 5.0  # what a signal, or an error, leaves of the wait for the last copy to Drive


class RunLock:
    """One writer per run directory, for life: `flock` on `run.lock`, pid and host inside.

    The kernel drops the lock when the process ends, however it ends. Re-entrant within a process.
    """

    _held: dict[str, tuple[int, int]] = {}  # noqa: RUF012 - path -> (descriptor, uses), per process
    _guard = threading.Lock()
    _fork_hook = False

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.path = Path(output_dir) / "run.lock"
        self._key = str(self.path.parent.resolve() / self.path.name)
        self._mine = False

    def acquire(self) -> RunLock:
        """Take the lock, or raise LockedError naming the holder."""
        if self._mine:
            return self
        with RunLock._guard:
            if self._key in RunLock._held:
                fd, uses = RunLock._held[self._key]
                RunLock._held[self._key] = (fd, uses + 1)
            else:
                RunLock._held[self._key] = (self._open(), 1)
        self._mine = True
        return self

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        try:
            fd = os.open(self.path, flags, 0o666)
        except OSError as e:
            if not is_space_error(e):
                raise
            return self._unlocked(e)
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = os.read(fd, 1000).decode("utf-8", "replace").strip() or "unknown"
            os.close(fd)
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                return self._unlocked(e)
            raise LockedError(
                f"{self.path.parent} is in use by another process",
                holder,
                "Stop that process, or start a new run.",
            ) from e
        text = json.dumps(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": timestamp_now()}
        )
        with contextlib.suppress(OSError):  # locked all the same; the text is for people
            os.ftruncate(fd, 0)
            os.write(fd, text.encode() + b"\n")
        if not RunLock._fork_hook and hasattr(os, "register_at_fork"):
            # A forked data worker that outlives the run must not keep it locked.
            os.register_at_fork(after_in_child=RunLock._forget)
            RunLock._fork_hook = True
        return fd

    def _unlocked(self, error: OSError) -> int:
        """A descriptor that holds nothing, where the file system gives no lock; said."""
        log.warning("No lock on %s (%s): do not start a second writer.", self.path, error)
        return os.open(os.devnull, os.O_RDONLY)

    @classmethod
    def _forget(cls) -> None:
        for fd, _ in cls._held.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        cls._held.clear()
        cls._guard = threading.Lock()

    def release(self) -> None:
        if not self._mine:
            return
        self._mine = False
        with RunLock._guard:
            if self._key not in RunLock._held:
                return  # forgotten by a fork
            fd, uses = RunLock._held.pop(self._key)
            if uses > 1:
                RunLock._held[self._key] = (fd, uses - 1)
            else:
                os.close(fd)

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class StopSignals:
    """Turns SIGTERM, SIGINT and SIGHUP into a flag that the loop reads between batches.

        with StopSignals() as stop:
            for batch in batches:
                ...
                if stop.requested:
                    break  # save, print the resume command, sys.exit(stop.exit_code)

    A second signal ends the process at once; that is safe at any instant, because nothing is ever
    written in place. Signals within `settle_s` count as one: `timeout` and terminals send two.
    """

    SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")

    def __init__(self, settle_s: float = 0.2) -> None:
        self.signum: int | None = None
        self._first_s = 0.0
        self._settle_s = settle_s
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signum is not None

    @property
    def name(self) -> str:
        return "" if self.signum is None else signal.Signals(self.signum).name

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM or SIGHUP, 0 if there was none."""
        if self.signum is None:
            return 0
        return 130 if self.signum == signal.SIGINT else 143

    def learn(self, signum: int) -> None:
        """A process that works with this one was told to stop: so was this one. A signal that is
        still to come here is the first."""
        if self.signum is None:
            self.signum, self._first_s = signum, math.inf

    def _handle(self, signum: int, _frame: object) -> None:
        now = time.monotonic()
        if self.signum is None or self._first_s == math.inf:
            self.signum, self._first_s = signum, now
        elif now - self._first_s >= self._settle_s:
            with contextlib.suppress(OSError):
                os.write(2, b"\nSecond signal: stopping at once.\n")
            os._exit(self.exit_code)

    def __enter__(self) -> StopSignals:
        for text in self.SIGNALS:
            number = getattr(signal, text, None)
            if number is None or threading.current_thread() is not threading.main_thread():
                continue
            if text == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started under nohup
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
