"""Files that appear whole or not at all: errors, the file operations, atomic writes, small JSON;
and which version of a package there is.

All file operations of `persistence` go through one small `FileSystem`, so tests can count, fail or
cut each of them. Knows nothing about checkpoints, and needs the standard library alone.
    from persistence.files import PersistenceError, atomic_write_json
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows
    fcntl = None  # type: ignore[assignment]

CHUNK_BYTES = 4 << 20  # read, write and hash in pieces of this size
MAX_JSON_BYTES = 64 << 20
SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})  # EFBIG is a limit of the process
SPACE_SLACK_BYTES = 1 << 20  # to be free beyond what is written
TEMP_NAME = re.compile(r"\.(.+)\.(\d+)-(\d+)(?:-[0-9a-f]{8})?\.tmp")
log = logging.getLogger("model_persistence")  # under the name that users know


# --------------------------------------------------------------------------------------------------
# Errors: what happened, why, what to do
# --------------------------------------------------------------------------------------------------
class PersistenceError(Exception):
    """One line that says what happened, why, and what to do about it."""

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        text = what + (f": {why}" if why else "")
        super().__init__(f"{text.rstrip('.')}. {fix}" if fix else text)


class CheckpointError(PersistenceError):
    """A checkpoint cannot be used."""


class CorruptCheckpointError(CheckpointError):
    """The file itself is bad: damaged, cut short, not ours, or carrying code."""


class MismatchError(CheckpointError):
    """The file is good but does not fit the objects or settings it is loaded into."""


class NoCheckpointError(CheckpointError):
    """Nothing to resume from. `looked_in` says where, `skipped` what was rejected and why."""

    def __init__(self, looked_in: list[str], skipped: list[dict[str, str]]) -> None:
        self.looked_in, self.skipped = looked_in, skipped
        why = "; ".join(f"{s['file']}: {s['reason']}" for s in skipped) or "no checkpoint file"
        super().__init__(
            f"nothing to resume from in {', '.join(looked_in)}",
            why,
            "Start without --resume, point --runs_dir at the runs, or give --drive_backup DIR.",
        )


class LockedError(PersistenceError):
    """Another process writes to this run."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with ~ as the home folder; as it is where nobody knows whose home that would be."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def is_space_error(error: BaseException) -> bool:
    """True for a full disk or quota, also in the disguise `torch.save` gives it."""
    if isinstance(error, OSError):
        return error.errno in SPACE_ERRNOS
    return isinstance(error, RuntimeError) and "unexpected pos" in str(error)


# --------------------------------------------------------------------------------------------------
# The file operations
# --------------------------------------------------------------------------------------------------
class FileSystem:
    """Every file operation of saving, one thin method each. Tests subclass it.

    `concurrent` False runs steps that would overlap (fsync and read-back) one after the other,
    which gives tests a fixed order of operations.
    """

    concurrent = True

    def create(self, path: Path) -> int:
        """A new file for writing; fails if the name exists."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)
        return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)

    def open_read(self, path: Path) -> int:
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        # O_NONBLOCK: a FIFO put in a checkpoint's place must not hang the start.
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

    def write(self, fd: int, data: bytes | memoryview) -> int:
        return os.write(fd, data)

    def readinto(self, fd: int, buffer: memoryview) -> int:
        if sys.platform == "win32":  # pragma: no cover
            data = os.read(fd, len(buffer))
            buffer[: len(data)] = data
            return len(data)
        return os.readv(fd, [buffer])

    def seek(self, fd: int, position: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(fd, position, whence)

    def fsync(self, fd: int) -> None:
        full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone stops at the drive's cache
        if full is not None:  # pragma: no cover
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, full)
                return
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)  # noqa: PTH105 - one system call, no Path wrapper

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)  # noqa: PTH108

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def fsync_dir(self, path: Path) -> None:
        """Make renames in a directory durable. File systems without the notion are let off."""
        if os.name == "nt":  # pragma: no cover
            return
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(fd)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)

    def listdir(self, path: Path) -> list[str]:
        return sorted(os.listdir(path))  # noqa: PTH208

    def stat(self, path: Path) -> os.stat_result:
        return path.stat()

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def free_bytes(self, path: Path) -> int | None:
        """Bytes an ordinary user may still write, or None where that is not known."""
        if not hasattr(os, "statvfs"):  # pragma: no cover
            return None
        s = os.statvfs(path)
        return s.f_bavail * s.f_frsize if s.f_blocks else None


REAL_FS = FileSystem()


class _RawReader(io.RawIOBase):
    """A file descriptor of the shim as a seekable stream."""

    def __init__(self, fs: FileSystem, fd: int) -> None:
        self._fs, self._fd = fs, fd

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        return self._fs.readinto(self._fd, view) if len(view) else 0

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        return self._fs.seek(self._fd, position, whence)

    def tell(self) -> int:
        return self._fs.seek(self._fd, 0, os.SEEK_CUR)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._fs.close(self._fd)


@contextlib.contextmanager
def open_reader(fs: FileSystem, path: Path) -> Iterator[tuple[io.BufferedReader, int]]:
    """A buffered reader of a regular file, and its size in bytes."""
    fd = fs.open_read(path)
    raw = _RawReader(fs, fd)
    try:
        stat = fs.fstat(fd)
        if not _is_regular(stat.st_mode):
            raise CorruptCheckpointError(f"{path} is not a regular file")
        yield io.BufferedReader(raw, CHUNK_BYTES), stat.st_size
    finally:
        raw.close()


def _is_regular(mode: int) -> bool:
    return (mode & 0o170000) == 0o100000


def exists(fs: FileSystem, path: Path) -> bool:
    """Whether there is such a file or folder. Other errors than that there is none are raised."""
    try:
        fs.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def names_in(fs: FileSystem, path: Path) -> list[str]:
    """Names in a directory; none if there is no such directory."""
    try:
        return fs.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_file(path: Path) -> bool:
    """Whether it is a file that can be looked at; never raises OSError."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether it is a folder that can be looked at; never raises OSError."""
    try:
        return path.is_dir()
    except OSError:
        return False


def version_of(path: Path) -> tuple[int, int, int] | None:
    """(bytes, time of change in ns, inode): tells contents of a file apart; None: no file."""
    try:
        s = path.stat()
    except OSError:
        return None
    return s.st_size, s.st_mtime_ns, s.st_ino


@lru_cache
def version_of_package(package: str) -> str | None:
    """The version of an installed package, without importing it; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --------------------------------------------------------------------------------------------------
# Atomic, durable writes
# --------------------------------------------------------------------------------------------------
_temp_numbers = iter(range(1 << 62))


def temporary_name(name: str) -> str:
    """An unused one. Containers start every process with the same id: a random part, too."""
    return f".{name}.{os.getpid()}-{next(_temp_numbers)}-{os.urandom(4).hex()}.tmp"


class AtomicFile:
    """A file that appears under its name complete and durable, or not at all.

    The temporary name lies in the target's own directory: `os.replace` across file systems would be
    a plain copy, and a kill in the middle of that destroys the old file.
    """

    def __init__(self, target: Path, fs: FileSystem = REAL_FS) -> None:
        self.target, self.fs = target, fs
        self.temp = target.parent / temporary_name(target.name)
        self._fd: int | None = fs.create(self.temp)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            assert self._fd is not None
            done = self.fs.write(self._fd, view[:CHUNK_BYTES])
            if done <= 0:
                raise OSError(errno.ENOSPC, "the disk took no more bytes", str(self.temp))
            view = view[done:]

    def sync(self) -> None:
        """All bytes on the disk; a failed fsync raises and the file must not be published."""
        assert self._fd is not None
        self.fs.fsync(self._fd)
        fd, self._fd = self._fd, None
        self.fs.close(fd)

    def publish(self) -> None:
        self.fs.replace(self.temp, self.target)
        self.fs.fsync_dir(self.target.parent)

    def abort(self) -> None:
        """Close and remove the temporary file, whatever state it is in. Never raises OSError."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with contextlib.suppress(OSError):
                self.fs.close(fd)
        for _ in range(2):  # one failed unlink is tried again
            try:
                self.fs.unlink(self.temp)
            except FileNotFoundError:
                return
            except OSError:
                continue
            return


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes, fs: FileSystem = REAL_FS) -> None:
    """Replace a file by `data`: temporary name, write, fsync, rename, fsync of the directory."""
    file = AtomicFile(Path(path), fs)
    try:
        file.write(data)
        file.sync()
        file.publish()
    except BaseException:
        file.abort()
        raise


def atomic_write_json(path: str | os.PathLike[str], obj: Any, fs: FileSystem = REAL_FS) -> None:
    """`atomic_write_bytes` of indented, strict JSON (a number that is not finite becomes null)."""
    text = json.dumps(json_safe(obj), indent=2, allow_nan=False, default=str) + "\n"
    atomic_write_bytes(path, text.encode(), fs)


def json_safe(obj: Any) -> Any:
    """As strict JSON has it: what is not finite becomes null, keys text, numpy's scalars plain."""
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {str(k): json_safe(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [json_safe(v) for v in obj]
    of_numpy = getattr(sys.modules.get("numpy"), "generic", None)  # not imported for this alone
    if of_numpy is not None and isinstance(obj, of_numpy):
        return json_safe(obj.item())
    return obj


def read_json(path: str | os.PathLike[str], fs: FileSystem = REAL_FS) -> Any:
    """The JSON in a file, or None if it is missing, too large or garbage. I/O errors are raised."""
    try:
        with open_reader(fs, Path(path)) as (reader, size):
            if size > MAX_JSON_BYTES:
                return None
            return json.loads(reader.read())
    except (FileNotFoundError, NotADirectoryError, CorruptCheckpointError):
        return None
    except (ValueError, RecursionError):
        return None


# --------------------------------------------------------------------------------------------------
# Times
# --------------------------------------------------------------------------------------------------
def timestamp_now() -> str:
    """The local time with its UTC offset, to the millisecond."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def seconds_of(stamp: Any) -> float | None:
    """A saved timestamp as seconds since 1970; None if it is none. Old ones have no UTC offset."""
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None
