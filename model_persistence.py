"""Checkpoints that survive kills, power cuts, full disks and rotten files; best model; resume state.

Owns every durable file of a run directory and the Drive backup. Knows nothing about models: a module
is anything with `state_dict` and `load_state_dict`. Never unpickles code, never seeds, never trains.
All file operations go through one small `FileSystem`, so tests can count, fail or cut each of them.
    from model_persistence import ModelPersistence
    persistence = ModelPersistence("runs/arc_complete_20260101_120000", max_checkpoints=5)
What is guaranteed, and how to recover by hand: docs/PERSISTENCE.md.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import platform
import queue
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
import uuid
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache, partial
from importlib import metadata as installed
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch

from resume_rules import APPLIED, FREE, NO_FLAGS, PROCESS, VERDICT, with_meaning

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows; runs there go unlocked
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
MODULES = ("agent", "qwen", "solver2", "efe_loss", "policy_rl")
REQUIRED_KEYS = ("epoch", "batch", "metrics", *MODULES, "optimizer")
CHUNK_BYTES = 4 << 20  # read, write and hash in pieces of this size
DEFER_BYTES = 1 << 20  # blocks this large are hashed by a helper thread while they are written
SEAL_MAGIC = b"ARC-CHECKPOINT-1 "  # starts the zip comment that ends every checkpoint file
SEAL_HEX = 64  # a sha256 in hex: the last bytes of the file
MAX_ENTRIES = 2_000_000  # zip members of a plausible checkpoint
MAX_NODES = (
    20_000_000  # objects in a plausible checkpoint; stops a small pickle that unfolds for ever
)
MAX_PICKLE_BYTES = 1 << 30
MAX_JSON_BYTES = 64 << 20
UNFOLD = 16  # times its memory that a checkpoint's tensors may claim together: tied weights
MAX_ID = 10**9
FREE_MEMORY_FRAC = 0.6  # a snapshot that needs more of the free memory is streamed instead
SPACE_SLACK_BYTES = 1 << 20
SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})  # EFBIG is a limit of the process
NO_LINK_ERRNOS = frozenset(
    {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
)
CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{5,9})\.pt")
RUN_NAME = re.compile(r"[^./\\\0][^/\\\0]*")  # one folder that is not hidden
TEMP_NAME = re.compile(r"\.(.+)\.(\d+)-(\d+)(?:-[0-9a-f]{8})?\.tmp")
# Written beside the checkpoints; small, derived, and worth having on a new machine.
RUN_SIDE_FILES = (
    "config.json",
    "best_metadata.json",
    "training_state.json",
    "results.json",
    "metrics.jsonl",
    "training.log",
)
MAX_SIDE_FILE_BYTES = 64 << 20
RESTORING = ".restoring.json"  # in a run directory that is not yet wholly back from Drive
FIRST_BACK = ("config.json", "best_metadata.json")  # a resume needs them before any checkpoint
DRIVE_ANSWER_S = 30.0  # a mount that says nothing for so long is left out of account
DRIVE_SILENT_S = 1.0  # of waiting for a copy at the end, before a line says so
DRIVE_SAY_EVERY_S = 10.0  # ... and between two such lines
DRIVE_HURRY_S = 5.0  # what a signal leaves of that wait
DRIVE_LOOK_S = 0.1  # between two looks for a signal
MAX_FOLDERS = 200  # looked into for checkpoints that were copied by hand
DRIVE_MARKER = ".arc_drive_backup"
LATEST_LINK = "arc_complete_latest"  # beside the runs: a link to the one that is, or was, trained
# Settings of torch's optimizers that say how, not what, is computed, and come and go by version.
OPTIMIZER_SWITCHES = frozenset(
    {"capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize"}
)
# A resumed run may change these; everything else must be what it was.
MAY_CHANGE = frozenset({*with_meaning(APPLIED, VERDICT, FREE, PROCESS), *NO_FLAGS})
_log = logging.getLogger("model_persistence")


def __getattr__(name: str) -> Any:
    """`DynamicMemoryThreshold` by this name, too; imported when asked for (PEP 562)."""
    if name == "DynamicMemoryThreshold":
        import curriculum

        return curriculum.DynamicMemoryThreshold
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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


def is_space_error(error: BaseException) -> bool:
    """True for a full disk or quota, also in the disguise `torch.save` gives it."""
    if isinstance(error, OSError):
        return error.errno in SPACE_ERRNOS
    return isinstance(error, RuntimeError) and "unexpected pos" in str(error)


# --------------------------------------------------------------------------------------------------
# The file-operation shim
# --------------------------------------------------------------------------------------------------
class FileSystem:
    """Every file operation of this module, one thin method each. Tests subclass it.

    `concurrent` False runs steps that would overlap (fsync and read-back) one after the other, which
    gives tests a fixed order of operations.
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
def _open_reader(fs: FileSystem, path: Path) -> Iterator[tuple[io.BufferedReader, int]]:
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


def _identity_of(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _is_regular(mode: int) -> bool:
    return (mode & 0o170000) == 0o100000


def _exists(fs: FileSystem, path: Path) -> bool:
    try:
        fs.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _names(fs: FileSystem, path: Path) -> list[str]:
    """Names in a directory; none if there is no such directory."""
    try:
        return fs.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _may_be_folder(name: str) -> bool:
    """False for what lies beside checkpoints: hidden files, our small files, the quarantine."""
    small = name.endswith((".pt", ".json", ".ok"))
    return not (small or name.startswith(".") or name == "quarantine")


# --------------------------------------------------------------------------------------------------
# Atomic, durable writes
# --------------------------------------------------------------------------------------------------
_temp_numbers = iter(range(1 << 62))


def _unused() -> str:
    """The middle of a temporary name. Containers start every process with the same id: a random part, too."""
    return f"{os.getpid()}-{next(_temp_numbers)}-{os.urandom(4).hex()}"


def _remove_temporaries(run_dir: Path, fs: FileSystem) -> bool:
    """Remove what interrupted writes left in a run directory. False if the disk forbids it."""
    done = True
    for folder in (run_dir, run_dir / "checkpoints"):
        try:
            for name in _names(fs, folder):
                if TEMP_NAME.fullmatch(name):
                    fs.unlink(folder / name)
        except OSError:
            done = False
    return done


class AtomicFile:
    """A file that appears under its name complete and durable, or not at all.

    The temporary name lies in the target's own directory: `os.replace` across file systems would be
    a plain copy, and a kill in the middle of that destroys the old file.
    """

    def __init__(self, target: Path, fs: FileSystem = REAL_FS) -> None:
        self.target, self.fs = target, fs
        self.temp = target.parent / f".{target.name}.{_unused()}.tmp"
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
    text = json.dumps(_json_safe(obj), indent=2, allow_nan=False, default=str) + "\n"
    atomic_write_bytes(path, text.encode(), fs)


def _json_safe(obj: Any) -> Any:
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {str(k): _json_safe(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_json_safe(v) for v in obj]
    if isinstance(obj, np.generic):
        return _json_safe(obj.item())
    return obj


def read_json(path: str | os.PathLike[str], fs: FileSystem = REAL_FS) -> Any:
    """The JSON in a file, or None if it is missing, too large or garbage. I/O errors are raised."""
    try:
        with _open_reader(fs, Path(path)) as (reader, size):
            if size > MAX_JSON_BYTES:
                return None
            return json.loads(reader.read())
    except (FileNotFoundError, NotADirectoryError, CorruptCheckpointError):
        return None
    except (ValueError, RecursionError):
        return None


# --------------------------------------------------------------------------------------------------
# State trees: what may be saved, copies, comparison, fingerprints
# --------------------------------------------------------------------------------------------------
_PRIMITIVES = (type(None), bool, int, float, complex, str, bytes, bytearray)
_TORCH_CONSTANTS = (torch.dtype, torch.device, torch.Size)


def check_saveable(obj: Any, name: str) -> None:
    """Refuse what `torch.load(weights_only=True)` could not read back, naming the key."""
    on_path: set[int] = set()

    def visit(value: Any, path: str) -> None:
        kind = type(value)
        if kind in _PRIMITIVES or kind in _TORCH_CONSTANTS:
            return
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if value.layout is not torch.strided or value.is_quantized:
                raise refuse(path, f"a {value.layout} tensor", "Save it dense: `.to_dense()`.")
            if value.is_meta:
                raise refuse(path, "a tensor without data (device meta)", "Materialise it first.")
            return
        if kind not in (dict, OrderedDict, list, tuple, set):
            raise refuse(path, f"a {kind.__module__}.{kind.__qualname__}", _hint(value))
        if id(value) in on_path:
            raise refuse(path, "a container that contains itself", "Save a plain tree.")
        on_path.add(id(value))
        if isinstance(value, dict):
            for key, item in value.items():
                visit(key, f"key {key!r} of {path}")
                visit(item, f"{path}.{key}")
        else:
            for number, item in enumerate(value):
                visit(item, f"{path}[{number}]")
        on_path.discard(id(value))

    def refuse(path: str, what: str, fix: str) -> PersistenceError:
        return PersistenceError(
            f"cannot save '{path}'",
            f"it is {what}, which torch.load(weights_only=True) does not read back",
            fix,
        )

    visit(obj, name)


def _hint(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "Save torch.from_numpy(array) instead."
    if isinstance(value, np.generic):
        return "Save value.item() instead."
    if isinstance(value, os.PathLike):
        return "Save str(path) instead."
    if isinstance(value, dict):
        return "Save dict(value) instead."
    return "Save tensors, numbers, strings, dicts, lists and tuples only."


def iter_leaves(obj: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a state tree in a fixed order: dict keys sorted by their text."""
    count = 0
    stack: list[tuple[str, Any]] = [(name, obj)]
    while stack:
        path, value = stack.pop()
        count += 1
        if count > MAX_NODES:
            raise CorruptCheckpointError(f"'{name}' holds more than {MAX_NODES} objects")
        if isinstance(value, Mapping):
            items = sorted(value.items(), key=lambda kv: (str(kv[0]), type(kv[0]).__name__))
            if not items:
                yield path, {}
            stack.extend((f"{path}.{k}" if path else str(k), v) for k, v in reversed(items))
        elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            if not value:
                yield path, ()
            stack.extend((f"{path}[{i}]", v) for i, v in reversed(list(enumerate(value))))
        else:
            yield path, value


def _tensor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as uint8, in row-major order, on the CPU. Shape (bytes,)."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def state_fingerprint(state: Any, **named: Any) -> str:
    """sha256 over names, dtypes, shapes and contents in name order; equal iff bitwise equal.

    `state` is a tree of dicts, lists, tensors and primitives, or anything with `state_dict`.
    Keyword arguments add further named parts.
    """
    tree = {"": state, **named} if named else state
    digest = hashlib.sha256()
    for path, leaf in iter_leaves(_expand(tree)):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{path}\0{leaf.dtype}\0{tuple(leaf.shape)}\0".encode())
            digest.update(memoryview(_tensor_bytes(leaf).numpy()))
        else:
            digest.update(f"{path}\0{type(leaf).__name__}\0{leaf!r}\0".encode())
    return digest.hexdigest()


def _expand(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: _expand(v) for k, v in tree.items()}
    return tree.state_dict() if hasattr(tree, "state_dict") else tree


def _same_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.device != b.device:
            a, b = a.cpu(), b.cpu()
        return torch.equal(a, b) or torch.equal(_tensor_bytes(a), _tensor_bytes(b))  # NaN, -0.0
    return type(a) is type(b) and (a == b or repr(a) == repr(b))


def _same_content(a: Any, b: Any) -> bool:
    left, right = iter_leaves(a), iter_leaves(b)
    for (path_a, leaf_a), (path_b, leaf_b) in zip(left, right, strict=False):
        if path_a != path_b or not _same_leaf(leaf_a, leaf_b):
            return False
    return next(left, None) is None and next(right, None) is None


def _state_bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for _, t in iter_leaves(tree) if _is_tensor(t))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class SnapshotBuffers:
    """Copies of a state tree in memory that is kept and reused, pinned where the source is on CUDA."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def missing_bytes(self, tree: Any) -> int:
        """Bytes a copy of `tree` would have to allocate."""
        return sum(
            t.numel() * t.element_size()
            for path, t in iter_leaves(tree)
            if _is_tensor(t) and not self._fits(self._kept.get(path), t)
        )

    def copy(self, tree: Any) -> Any:
        """A tree of the same form whose tensors live in the buffers until the next `copy`."""
        used: dict[str, torch.Tensor] = {}
        aliases: dict[tuple[Any, ...], torch.Tensor] = {}
        on_cuda = False

        def visit(value: Any, path: str) -> Any:
            nonlocal on_cuda
            if isinstance(value, torch.Tensor):
                source = value.detach()
                on_cuda = on_cuda or source.is_cuda
                key = _alias_key(source)
                if key in aliases:  # tied weights stay tied, and are stored once
                    return aliases[key]
                buffer = self._kept.get(path)
                if not self._fits(buffer, source):
                    buffer = _like(source)
                assert buffer is not None
                buffer.copy_(source, non_blocking=source.is_cuda)
                used[path] = aliases[key] = buffer
                return buffer
            return _rebuild(value, path, visit)

        copied = visit(tree, "")
        if on_cuda:  # pragma: no cover - needs a GPU
            torch.cuda.synchronize()
        self._kept = used
        return copied

    def clear(self) -> None:
        self._kept = {}

    @staticmethod
    def _fits(buffer: torch.Tensor | None, source: torch.Tensor) -> bool:
        return (
            buffer is not None
            and buffer.shape == source.shape
            and buffer.dtype == source.dtype
            and (buffer.stride() == source.stride() or buffer.is_contiguous())
        )


def _alias_key(t: torch.Tensor) -> tuple[Any, ...]:
    if not t.numel():
        return ("empty", id(t))
    return (t.device, t.dtype, t.data_ptr(), tuple(t.shape), t.stride())


def _like(source: torch.Tensor) -> torch.Tensor:
    """CPU memory for one tensor: nothing around it is saved with it; dense strides are kept."""
    try:
        return torch.empty_like(
            source, device="cpu", memory_format=torch.preserve_format, pin_memory=source.is_cuda
        )
    except RuntimeError:  # pinned memory can run out; ordinary memory is only slower
        return torch.empty_like(source, device="cpu", memory_format=torch.preserve_format)


def _rebuild(value: Any, path: str, visit: Callable[[Any, str], Any]) -> Any:
    """One container with its items visited. Paths match `iter_leaves`."""
    if isinstance(value, dict):
        items = [(k, visit(v, f"{path}.{k}" if path else str(k))) for k, v in value.items()]
        rebuilt = OrderedDict(items) if type(value) is OrderedDict else dict(items)
        if hasattr(value, "_metadata"):  # module versions that nn.Module.state_dict attaches
            metadata = {k: dict(v) for k, v in value._metadata.items()}
            rebuilt._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
        return rebuilt
    if type(value) in (list, tuple):
        return type(value)(visit(v, f"{path}[{i}]") for i, v in enumerate(value))
    return set(value) if type(value) is set else value


def _compact(tree: Any) -> Any:
    """The tree for streaming: a tensor that is a small window of a large storage is copied out."""
    aliases: dict[tuple[Any, ...], torch.Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            source = value.detach()
            key = _alias_key(source)
            if key not in aliases:
                whole = source.untyped_storage().nbytes() == source.numel() * source.element_size()
                aliases[key] = source if whole else source.clone()
            return aliases[key]
        return _rebuild(value, path, visit)

    return visit(tree, "")


def free_memory_bytes() -> int | None:
    """Memory that can be taken without swapping, respecting a container's limit; None if unknown."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            stat = dict(
                line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
            )
            found.append(int(limit) - used + int(stat.get("inactive_file", 0)))
    return max(0, min(found)) if found else None


# --------------------------------------------------------------------------------------------------
# The checkpoint file: torch's zip, sealed by a comment that holds its metadata and its sha256
# --------------------------------------------------------------------------------------------------
class SealedWriter:
    """What `torch.save` writes into: hashes while it streams, then adds the seal.

    The seal is the zip archive's comment: `SEAL_MAGIC + metadata JSON + sha256 hex` of all bytes
    before that hex. A checkpoint can so be checked, and listed, with no other file at hand, and
    remains a zip that `torch.load` reads.

    Errors are kept and raised by `finish`, never inside `write`: torch turns an exception that passes
    through its C++ writer into an unrelated one ("unexpected pos").
    """

    END = struct.Struct("<4s4H2LH")  # zip end-of-central-directory record, 22 bytes

    def __init__(self, file: AtomicFile, seal: Mapping[str, Any], stable: Iterable[int]) -> None:
        text = json.dumps(_json_safe(seal), separators=(",", ":"), allow_nan=False, default=str)
        self._comment = SEAL_MAGIC + text.encode()
        if len(self._comment) + SEAL_HEX > 0xFFFF:  # e.g. thousands of metrics: the file has them
            small = {k: v for k, v in seal.items() if k != "metrics"}
            self._comment = SEAL_MAGIC + json.dumps(_json_safe(small), default=str).encode()
        self._file, self._stable = file, frozenset(stable)
        self._digest = hashlib.sha256()
        self._small = bytearray()
        self._end: bytes | None = None
        self.size = 0
        self.error: BaseException | None = None
        self._blocks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._hasher: threading.Thread | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                self._take(view)
            except BaseException as e:  # noqa: BLE001 - raised again by finish()
                self.error = e
        return len(view)

    def flush(self) -> None:
        """Called by torch; everything is flushed by `finish`."""

    def _take(self, view: memoryview) -> None:
        if self._end is not None:
            self._small += self._end
            self._end = None
        if len(view) == self.END.size and view[:4] == b"PK\x05\x06":
            self._end = bytes(view)  # held back: its last two bytes say how long the comment is
            return
        if len(view) < DEFER_BYTES:
            self._small += view
            if len(self._small) >= CHUNK_BYTES:
                self._drain()
            return
        self._drain()
        self._put(view, stable=_address(view) in self._stable)

    def _drain(self) -> None:
        if self._small:
            block, self._small = bytes(self._small), bytearray()
            self._put(memoryview(block), stable=True)

    def _put(self, view: memoryview, stable: bool) -> None:
        """Hash and write one block, the hash in a helper thread.

        A block whose memory outlives this call (`stable`) is hashed while torch prepares the next.
        """
        self.size += len(view)
        if len(view) < DEFER_BYTES and self._hasher is None:
            self._digest.update(view)
            self._file.write(view)
            return
        if self._hasher is None:
            self._hasher = threading.Thread(target=self._hash_blocks, name="checkpoint-hash")
            self._hasher.start()
        done = None if stable else threading.Event()
        self._blocks.put((view, done))
        try:
            self._file.write(view)
        finally:
            if done is not None:
                done.wait()

    def _hash_blocks(self) -> None:
        while (item := self._blocks.get()) is not None:
            self._digest.update(item[0])
            if item[1] is not None:
                item[1].set()

    def stop(self) -> None:
        """End the helper thread."""
        if self._hasher is not None:
            self._blocks.put(None)
            self._hasher.join()
            self._hasher = None

    def finish(self) -> tuple[int, str]:
        """Write the seal. Returns (bytes, sha256 of the whole file); raises what `write` kept."""
        if self.error is None and self._end is None:
            self.error = PersistenceError("torch.save did not write a zip archive")
        if self.error is not None:
            raise self.error
        assert self._end is not None
        self._drain()
        self.stop()
        fields = list(self.END.unpack(self._end))
        fields[-1] = len(self._comment) + SEAL_HEX
        tail = self.END.pack(*fields) + self._comment
        self._digest.update(tail)
        hexes = self._digest.hexdigest().encode()
        self._digest.update(hexes)
        self._file.write(tail + hexes)
        self.size += len(tail) + len(hexes)
        return self.size, self._digest.hexdigest()


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def read_seal(reader: io.BufferedReader, size: int) -> dict[str, Any] | None:
    """The metadata in a checkpoint's seal, unchecked; None if the file has none."""
    span = min(size, 0xFFFF + SealedWriter.END.size)
    reader.seek(size - span)
    tail = reader.read(span)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + SealedWriter.END.size + len(SEAL_MAGIC) + SEAL_HEX:
        return None
    comment = tail[at + SealedWriter.END.size :]
    if not comment.startswith(SEAL_MAGIC):
        return None
    try:
        seal = json.loads(comment[len(SEAL_MAGIC) : -SEAL_HEX])
        seal["seal_sha256"] = comment[-SEAL_HEX:].decode("ascii")
    except (ValueError, TypeError, RecursionError):
        return None
    return seal


def _hash_file(
    reader: io.BufferedReader, size: int, tick: Callable[[], None] = lambda: None
) -> tuple[str, str]:
    """(sha256 of all but the last 64 bytes, sha256 of everything)."""
    reader.seek(0)
    digest, left = hashlib.sha256(), max(0, size - SEAL_HEX)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while left:
        tick()
        got = reader.readinto(buffer[: min(left, CHUNK_BYTES)])
        if not got:
            raise CorruptCheckpointError("the file ended while it was read")
        digest.update(buffer[:got])
        left -= got
    body = digest.hexdigest()
    digest.update(reader.read(SEAL_HEX + 1))
    return body, digest.hexdigest()


def _zip_members(reader: io.BufferedReader, size: int) -> list[zipfile.ZipInfo]:
    """The archive's members, refused unless they are what `torch.save` writes: plain and bounded."""
    reader.seek(0)
    try:
        with zipfile.ZipFile(reader) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError) as e:
        raise CorruptCheckpointError("not a readable checkpoint archive", str(e)) from e
    if len(members) > MAX_ENTRIES:
        raise CorruptCheckpointError("implausible archive", f"{len(members)} members")
    if sum(m.file_size for m in members) > size:
        raise CorruptCheckpointError("implausible archive", "members larger than the file")
    for m in members:
        if m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size:
            raise CorruptCheckpointError("implausible archive", f"{m.filename} is compressed")
        if m.filename.endswith("data.pkl") and m.file_size > MAX_PICKLE_BYTES:
            raise CorruptCheckpointError("implausible archive", f"{m.filename} is too large")
    return members


def _check_crc(reader: io.BufferedReader, size: int) -> None:
    """Compare every member with the CRC-32 that torch computed from memory when it wrote it."""
    buffer = memoryview(bytearray(1 << 20))
    for m in _zip_members(reader, size):
        reader.seek(m.header_offset)
        header = reader.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise CorruptCheckpointError("damaged archive", f"no header for {m.filename}")
        name_bytes, extra_bytes = struct.unpack_from("<2H", header, 26)
        reader.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        crc, left = 0, m.file_size
        while left:
            got = reader.readinto(buffer[: min(left, len(buffer))])
            if not got:
                raise CorruptCheckpointError("damaged archive", f"{m.filename} is cut short")
            crc = zlib.crc32(buffer[:got], crc)
            left -= got
        if crc != m.CRC:
            raise CorruptCheckpointError("damaged archive", f"wrong checksum of {m.filename}")


def write_checkpoint_file(
    target: Path, payload: Mapping[str, Any], seal: Mapping[str, Any], fs: FileSystem = REAL_FS
) -> tuple[int, str]:
    """Stream, hash, seal, fsync, read back, publish. Returns (bytes, sha256); raises OSError.

    On any error the temporary file is gone and whatever stood under the name before stands there
    still.
    """
    stable = {
        t.untyped_storage().data_ptr()
        for _, t in iter_leaves(payload)
        if _is_tensor(t) and t.device.type == "cpu"
    }
    file = AtomicFile(target, fs)
    try:
        writer = SealedWriter(file, seal, stable)
        try:
            torch.save(dict(payload), cast(IO[bytes], writer))
            size, sha256 = writer.finish()
        finally:
            writer.stop()
        _sync_and_read_back(file, size)
        file.publish()
    except BaseException:
        file.abort()
        raise
    return size, sha256


def _sync_and_read_back(file: AtomicFile, size: int) -> None:
    """fsync the file and compare what can be read from it with torch's own checksums."""

    def read_back() -> None:
        with _open_reader(file.fs, file.temp) as (reader, found):
            if found != size:
                raise OSError(errno.EIO, f"wrote {size} bytes, {found} are there", str(file.temp))
            try:
                _check_crc(reader, size)
            except CorruptCheckpointError as e:
                raise OSError(errno.EIO, f"read back differently: {e}", str(file.temp)) from e

    if not file.fs.concurrent or size < 16 * CHUNK_BYTES:
        file.sync()
        read_back()
        return
    failed: list[BaseException] = []

    def run() -> None:
        try:
            read_back()
        except BaseException as e:  # noqa: BLE001 - raised below, in the caller's thread
            failed.append(e)

    helper = threading.Thread(target=run, name="checkpoint-read-back")
    helper.start()
    try:
        file.sync()
    finally:
        helper.join()
    if failed:
        raise failed[0]


class Loaded(NamedTuple):
    """A verified checkpoint: its payload, the seal's metadata, size and sha256 of the file."""

    payload: dict[str, Any]
    size: int
    sha256: str
    notes: list[str]


def verify_checkpoint_file(
    path: Path,
    *,
    expect_id: int | None = None,
    entry: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    fs: FileSystem = REAL_FS,
    load: bool = True,
) -> Loaded:
    """Check size, hash, archive and (with `load`) content of one file. Code in it is never run.

    Raises CorruptCheckpointError with the reason if the file is bad, OSError if it cannot be read.
    """
    try:
        return _verify(path, expect_id, entry or {}, run_id, fs, load)
    except CorruptCheckpointError as e:
        if str(path) in str(e):
            raise
        raise CorruptCheckpointError(f"{path}: {e.what}", e.why, e.fix) from e


def _verify(
    path: Path,
    expect_id: int | None,
    entry: Mapping[str, Any],
    run_id: str | None,
    fs: FileSystem,
    load: bool,
) -> Loaded:
    notes: list[str] = []
    with _open_reader(fs, path) as (reader, size):
        if not size:
            raise CorruptCheckpointError("the file is empty")
        seal = read_seal(reader, size)
        body, sha256 = _hash_file(reader, size)
        agrees = entry.get("size") == size and entry.get("sha256") == sha256
        if seal is not None:
            if seal["seal_sha256"] != body:
                why = f"expected sha256 {seal['seal_sha256'][:12]}..., found {body[:12]}..."
                raise CorruptCheckpointError("the content differs from what was written", why)
            if entry and not agrees:
                if run_id is not None and seal.get("run_id") != run_id:
                    raise CorruptCheckpointError("the file belongs to another run")
                notes.append(f"{path.name}: the index was stale; the file's own seal is intact")
        elif entry and not agrees:
            why = f"expected {entry.get('size')} bytes, sha256 {str(entry.get('sha256'))[:12]}..."
            raise CorruptCheckpointError(
                "the content differs from what was written",
                f"{why}, found {size}, {sha256[:12]}...",
            )
        if agrees or seal is not None:
            _zip_members(reader, size)
        else:
            _check_crc(reader, size)
        if not load:
            return Loaded(dict(seal or {}), size, sha256, notes)
        reader.seek(0)
        try:
            payload = _unpickle(reader)
        except CorruptCheckpointError as e:
            cause = e.__cause__
            if seal is not None and cause is not None and _is_memory_error(cause):
                raise cause from None  # its seal is intact: the memory is at fault, not the file
            raise
    _check_payload(payload, seal, expect_id)
    return Loaded(payload, size, sha256, notes)


def _is_memory_error(error: BaseException) -> bool:
    """Whether the memory of the CPU ran out; torch says so in a RuntimeError."""
    told = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return told or isinstance(error, MemoryError)


def _unpickle(reader: io.BufferedReader) -> Any:
    try:
        # Always to the CPU: random number states must stay there, and the modules copy from it.
        return torch.load(reader, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # a hostile file can raise anything
        if isinstance(e.__cause__, OSError):
            raise e.__cause__ from e
        first = (str(e).strip().splitlines() or [""])[0]
        raise CorruptCheckpointError(
            "cannot be read with weights_only=True", f"{type(e).__name__}: {first[:200]}"
        ) from e


def _check_payload(payload: Any, seal: Mapping[str, Any] | None, expect_id: int | None) -> None:
    if type(payload) is not dict:
        raise CorruptCheckpointError("not a checkpoint", f"it holds a {type(payload).__name__}")
    missing = [k for k in REQUIRED_KEYS if k not in payload]
    if missing:
        raise CorruptCheckpointError("not a checkpoint", f"key '{missing[0]}' is missing")
    version = payload.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version > FORMAT_VERSION:
        raise MismatchError(
            f"checkpoint format {version} is newer than this program's {FORMAT_VERSION}",
            "",
            "Update the program.",
        )
    for key, kind in (("epoch", int), ("batch", int), ("metrics", dict)):
        if type(payload[key]) is not kind:
            found = type(payload[key]).__name__
            raise CorruptCheckpointError(
                "not a checkpoint", f"key '{key}': expected {kind.__name__}, found {found}"
            )
    for key in (*MODULES, "optimizer"):
        if payload[key] is not None and not isinstance(payload[key], dict):
            found = type(payload[key]).__name__
            raise CorruptCheckpointError(
                "not a checkpoint", f"key '{key}': expected dict, found {found}"
            )
    if payload.get("sealed") and seal is None:
        raise CorruptCheckpointError("the seal at the end of the file is damaged or missing")
    _check_tensors(payload)  # and bounds the size of the unfolded tree
    found_id = payload.get("checkpoint_id")
    if expect_id is not None and found_id is not None and found_id != expect_id:
        raise CorruptCheckpointError(
            "the file holds another checkpoint than its name says",
            f"expected {expect_id}, found {found_id}",
        )


def _check_tensors(payload: Mapping[str, Any]) -> None:
    """Refuse tensors that are more than the memory behind them: a small file with a stride of 0
    would become gigabytes where it is used. All together at most UNFOLD times what the file holds."""
    total, stored = 0, {}
    for path, leaf in iter_leaves(payload):
        if not _is_tensor(leaf):
            continue
        if leaf.layout is not torch.strided or leaf.is_meta or leaf.is_quantized:
            raise CorruptCheckpointError("not a checkpoint", f"key '{path}' is no plain tensor")
        size, storage = leaf.numel() * leaf.element_size(), leaf.untyped_storage()
        if size > storage.nbytes():
            raise CorruptCheckpointError(
                "not a checkpoint", f"key '{path}' claims {size} bytes and has {storage.nbytes()}"
            )
        total += size
        stored[storage.data_ptr()] = storage.nbytes()
    if total > UNFOLD * sum(stored.values()):
        raise CorruptCheckpointError(
            "not a checkpoint", f"its tensors claim {total} bytes of {sum(stored.values())}"
        )


# --------------------------------------------------------------------------------------------------
# Applying a payload to live objects
# --------------------------------------------------------------------------------------------------
def unwrap(module: Any) -> Any:
    """The module inside DistributedDataParallel or torch.compile wrappers."""
    while True:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


def module_state(module: Any) -> Any:
    """What is saved of a module: `persistent_state_dict()` if it has one, else `state_dict()`."""
    module = unwrap(module)
    if module is None:
        return None
    if hasattr(module, "persistent_state_dict"):
        return module.persistent_state_dict()
    return module.state_dict()


def _frozen(module: Any) -> dict[str, Any] | None:
    module = unwrap(module)
    reference = module.frozen_reference() if hasattr(module, "frozen_reference") else None
    return None if reference is None else dict(reference)


def _is_plain(module: Any) -> bool:
    """True if the module loads by name and shape alone, so that a mismatch can be foreseen."""
    return (
        isinstance(module, torch.nn.Module)
        and not hasattr(module, "load_persistent_state_dict")
        and type(module).load_state_dict is torch.nn.Module.load_state_dict
        and all(
            type(m)._load_from_state_dict is torch.nn.Module._load_from_state_dict
            and not m._load_state_dict_pre_hooks
            for m in module.modules()
        )
    )


def _shape_text(value: Any) -> str:
    return f"shape {list(value.shape)}" if _is_tensor(value) else type(value).__name__


def _check_fit(name: str, module: Any, saved: Any, where: str) -> None:
    """Names and shapes of one module before anything is changed; the first difference is an error."""
    fix = "Resume with the model settings of that run, or start a new run."
    if saved is None:
        raise MismatchError(f"{where} has no state for '{name}'", "it was saved as None", fix)
    module = unwrap(module)
    if not _is_plain(module):
        return
    live = module.state_dict()
    for key, value in live.items():
        if key not in saved:
            raise MismatchError(
                f"{where} does not fit '{name}'",
                f"key '{name}.{key}': expected {_shape_text(value)}, found nothing",
                fix,
            )
        if key.endswith("_extra_state") or not _is_tensor(value):
            continue
        if not _is_tensor(saved[key]) or saved[key].shape != value.shape:
            raise MismatchError(
                f"{where} does not fit '{name}'",
                f"key '{name}.{key}': expected {_shape_text(value)}, "
                f"found {_shape_text(saved[key])}",
                fix,
            )
    unexpected = [k for k in saved if k not in live]
    if unexpected:
        raise MismatchError(
            f"{where} does not fit '{name}'",
            f"key '{name}.{unexpected[0]}': expected nothing, "
            f"found {_shape_text(saved[unexpected[0]])}",
            fix,
        )


def _check_optimizer_fit(optimizer: Any, saved: Any, where: str) -> None:
    fix = "Resume with the model and optimizer settings of that run."
    if saved is None:
        raise MismatchError(f"{where} has no state for 'optimizer'", "it was saved as None", fix)
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or "param_groups" not in saved:
        return
    live = [len(g["params"]) for g in groups]
    found = [len(g["params"]) for g in saved["param_groups"]]
    if live != found:
        raise MismatchError(
            f"{where} does not fit 'optimizer'",
            f"key 'optimizer.param_groups': expected {live} parameters per group, found {found}",
            fix,
        )
    live_names, found_names = (
        [g.get("name") for g in g_list] for g_list in (groups, saved["param_groups"])
    )
    if None not in (*live_names, *found_names) and live_names != found_names:
        raise MismatchError(
            f"{where} does not fit 'optimizer'",
            f"key 'optimizer.param_groups': expected {live_names}, found {found_names}",
            fix,
        )


def _foreign_optimizer(optimizer: Any, saved: Any, where: str) -> str | None:
    """Why the saved state is not this optimizer's, or None: other groups, or other quantities."""
    try:
        _check_optimizer_fit(optimizer, saved, where)
    except MismatchError as e:
        return e.why
    defaults = set(getattr(optimizer, "defaults", ())) - OPTIMIZER_SWITCHES
    for group in saved.get("param_groups", ()):
        if missing := sorted(defaults - set(group)):
            return f"it was saved by another kind of optimizer, without '{missing[0]}'"
    return None


def apply_state(
    payload: Mapping[str, Any], objects: Mapping[str, Any], where: str, verify_live: bool = True
) -> list[str]:
    """Load a payload into live objects, then compare the live state with it bit by bit.

    Everything is checked before anything is changed. Returns the keys that were cast to another
    dtype; raises MismatchError if something does not fit or does not arrive as it was saved.
    """
    frozen = payload.get("frozen") or {}
    for name in MODULES:
        if objects.get(name) is not None:
            _check_fit(name, objects[name], payload[name], where)
            _check_frozen(name, _frozen(objects[name]), frozen.get(name), where)
    optimizer = objects.get("optimizer")
    if optimizer is not None:
        _check_optimizer_fit(optimizer, payload["optimizer"], where)
    for name in (*MODULES, "optimizer"):
        target = unwrap(objects.get(name))
        if target is None:
            continue
        loader = getattr(target, "load_persistent_state_dict", None) or target.load_state_dict
        try:
            loader(payload[name])
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
            raise MismatchError(
                f"{where} does not fit '{name}'",
                f"{type(e).__name__}: {e}",
                "Resume with the model settings of that run, or start a new run.",
            ) from e
    recast: list[str] = []
    if not verify_live:
        return recast
    for name in (*MODULES, "optimizer"):
        if objects.get(name) is None:
            continue
        live = dict(iter_leaves(module_state(objects[name]), name))
        for path, saved in iter_leaves(payload[name], name):
            now: Any = live.get(path)
            if _same_leaf(now, saved):
                continue
            if _is_tensor(now) and _is_tensor(saved) and now.dtype != saved.dtype:
                recast.append(f"{path}: {saved.dtype} -> {now.dtype}")
                continue
            if not _is_tensor(saved) and name != "optimizer":
                continue  # a module may keep counters that loading itself moves
            if not _is_tensor(saved) and now == saved:
                continue  # list against tuple, int against float
            raise MismatchError(
                f"{where} was not restored as saved",
                f"key '{path}' differs in the live state after loading",
                "Report this: the module's load_state_dict does not restore what it saved.",
            )
    return recast


def _check_frozen(name: str, live: Any, saved: Any, where: str) -> None:
    """Weights kept by reference must be the same weights."""
    if live is None and saved is None:
        return
    if live is None or saved is None:
        raise MismatchError(
            f"{where} does not fit '{name}'",
            f"frozen weights: expected {live}, found {saved}",
            "Use the same --qwen_model and --qwen_train as that run.",
        )
    for field in ("sha256", "revision", "id"):
        if live.get(field) and saved.get(field):
            if live[field] != saved[field]:
                raise MismatchError(
                    f"{where} does not fit '{name}'",
                    f"frozen weights, {field}: expected {live[field]}, found {saved[field]}",
                    "Use the same --qwen_model, in the same revision, as that run.",
                )
            if field == "sha256":
                return  # the same bytes, wherever they came from


# --------------------------------------------------------------------------------------------------
# Random number states, configuration, environment, resume report
# --------------------------------------------------------------------------------------------------
def capture_rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's, torch's and every CUDA generator as tensors and ints."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": {
            "version": version,
            "words": torch.tensor(words, dtype=torch.int64),
            "gauss": gauss,
        },
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def restore_rng_state(state: Mapping[str, Any]) -> list[str]:
    """Put back what `capture_rng_state` took; the last act before the first batch.

    Returns what could not be restored (CUDA generators that this machine does not have).
    """
    try:
        python, legacy = state["python"], state["numpy"]
        words = tuple(int(w) for w in python["words"].tolist())
        keys = legacy["keys"].numpy().astype(np.uint32)
        random.setstate((python["version"], words, python["gauss"]))
        np.random.set_state(  # noqa: NPY002 - the legacy global state is what is being restored
            (legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"])
        )
        torch.set_rng_state(state["torch"].cpu())
        cuda = [t.cpu() for t in state["cuda"]]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise MismatchError("the saved random number state cannot be restored", str(e)) from e
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, one in enumerate(cuda[:have]):
        torch.cuda.set_rng_state(one, index)
    if len(cuda) == have:
        return []
    return [f"random number states of {len(cuda)} CUDA devices, {have} here"]


@lru_cache
def _version(package: str) -> str | None:
    """The version of an installed package, without importing it; None if there is none."""
    try:
        return installed.version(package)
    except installed.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """What decides whether the same arithmetic gives the same bits here."""
    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "transformers": _version("transformers"),
        "cuda": str(torch.version.cuda),
        "gpus": gpus,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def compare_config(
    saved: Mapping[str, Any], current: Mapping[str, Any], may_change: Iterable[str] = MAY_CHANGE
) -> list[str]:
    """Differences that forbid a resume, one line each: `key: saved X, now Y`.

    Nested dicts are compared under dotted names; a name in `may_change` lets its branch differ.
    """
    allowed = frozenset(may_change)

    def flatten(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in config.items():
            name = f"{prefix}{key}"
            if name in allowed or str(key) in allowed:
                continue
            if isinstance(value, Mapping):
                yield from flatten(value, f"{name}.")
            else:
                yield name, list(value) if isinstance(value, tuple) else value

    before, now = dict(flatten(saved, "")), dict(flatten(current, ""))
    differences = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, "(absent)"), now.get(key, "(absent)")
        if old != new:
            differences.append(f"{key}: saved {old!r}, now {new!r}")
    return differences


def resume_report(
    metadata: Mapping[str, Any],
    *,
    rng_missing: Iterable[str] = (),
    mismatches: Iterable[str] = (),
    changed: Iterable[str] = (),
    last_seen: tuple[int, int] | None = None,
    batches_per_epoch: int | None = None,
    batches_lost: int | None = None,
    current_environment: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """(verdict, one line) after a resume: EXACT, EQUIVALENT or DEGRADED, and why.

    `metadata` is what a load returned. `rng_missing` is what `restore_rng_state` returned (or a
    reason why it was not called), `mismatches` what trains otherwise from here on or is missing,
    `changed` what else is not as it was. `last_seen` is the (epoch, batch) that the log saw last, for
    the number of batches to repeat where `batches_lost` does not give it.
    """
    here = environment() if current_environment is None else current_environment
    saved = metadata.get("environment") or {}
    known = {k: saved.get(k, "not recorded") for k in here}
    other = [f"{k}: {known[k]} -> {here[k]}" for k in here if known[k] != here[k]]
    broken = [*metadata.get("cast", ()), *mismatches]
    hardware_moved = any(o.startswith(("gpus:", "cuda:")) for o in other)
    (other if hardware_moved else broken).extend(rng_missing)
    other.extend(changed)
    if broken:
        verdict, why = "DEGRADED", "; ".join([*broken, *other])
    elif other:
        verdict, why = "EQUIVALENT", "same data order, other " + "; ".join(other)
    else:
        verdict, why = "EXACT", "same state, same data order, same random numbers"
    epoch, batch = metadata["epoch"], metadata["batch"]
    line = f"Resume: {verdict} ({why}) | from {metadata.get('source', 'checkpoint')}"
    line += f" {metadata.get('checkpoint_id')}, epoch {epoch}, batch {batch}"
    if batches_lost is None and last_seen is not None:
        batches_lost = (last_seen[0] - epoch) * (batches_per_epoch or 0) + last_seen[1] - batch
    if batches_lost is not None:
        line += f" | batches lost: {max(0, batches_lost)}"
    skipped = metadata.get("skipped") or []
    line += f" | files skipped: {len(skipped)}"
    for item in skipped:
        line += f" [{item['file']}: {item['reason']}]"
    return verdict, line


# --------------------------------------------------------------------------------------------------
# Lock, signals, small state files
# --------------------------------------------------------------------------------------------------
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
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()})
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
        _log.warning("No lock on %s (%s): do not start a second writer.", self.path, error)
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

    def _handle(self, signum: int, _frame: object) -> None:
        now = time.monotonic()
        if self.signum is None:
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


_state_file_guard = threading.Lock()  # the loop and the writer thread update the same small file


class TrainingState:
    """`training_state.json`: a few facts about the run for people and tools; derived, may be lost."""

    def __init__(self, output_dir: str | os.PathLike[str], fs: FileSystem = REAL_FS) -> None:
        self.path = Path(output_dir) / "training_state.json"
        self._fs = fs

    def save(self, state: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """Merge fields into the file, atomically. Returns everything that is in it now."""
        with _state_file_guard:
            merged = {**self._read(), **(state or {}), **fields, "updated": _now()}
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


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def _seconds(stamp: Any) -> float | None:
    """A timestamp of a file as seconds since 1970; None if it is none. Older ones have no UTC offset."""
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


# --------------------------------------------------------------------------------------------------
# The manager
# --------------------------------------------------------------------------------------------------
class _Job:
    """One checkpoint on its way to the disk."""

    def __init__(self, checkpoint_id: int, payload: dict[str, Any], seal: dict[str, Any]) -> None:
        self.checkpoint_id, self.payload, self.seal = checkpoint_id, payload, seal
        self.in_buffers = False  # the payload is a copy, not the live tensors
        self.entry: dict[str, Any] | None = None
        self.follow_ups: list[Callable[[], None]] = []
        self.closed = False  # no more follow-ups: the thread is past them


class ModelPersistence:
    """Checkpoints of one run directory.

    Args:
        output_dir: the run directory; created at the first save.
        max_checkpoints: rolling checkpoints kept (at least 1). Old ones go only after the new one is
            durable and read back; one that only `best_metadata.json` points to is never removed.
        save_every_n_batches: interval of `should_save_checkpoint`; 0 never.
        drive_backup: folder of a mounted Drive; None uses what `setup_drive_backup` recorded, False
            switches it off.
        async_save: copy into memory and write in a thread; the loop is blocked only for the copy. At
            most one write is in flight; a save that comes too early is skipped and counted.
        fs, drive_fs: the file operations.
        drive_options: further arguments of `DriveBackup` (keep, stall_timeout_s, backoff_s, ...).
        on_message: receives one-line reports, always in the caller's thread; default: logging.
        lock: take the run's lock at the first save; LockedError if another process holds it.

    A save that fails for a reason of the disk is reported and counted (`failed_saves`), and training
    goes on; anything else a writer thread raised is raised at the next call.
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
        self.checkpoints_dir = self.output_dir / "checkpoints"
        self.quarantine_dir = self.checkpoints_dir / "quarantine"
        self.set_aside_dir = self.output_dir / "set_aside"
        self.best_path = self.output_dir / "best_model.pt"
        self.manifest_path = self.output_dir / "checkpoint_metadata.json"
        self.best_metadata_path = self.output_dir / "best_metadata.json"
        self.max_checkpoints = max_checkpoints
        self.save_every_n_batches = save_every_n_batches
        self.async_save = async_save
        self.fs = fs
        self.training_state = TrainingState(self.output_dir, fs)
        self.failed_saves = self.skipped_saves = self.completed_saves = 0
        self.last_durable_id: int | None = None
        self.last_failure = ""  # why the newest checkpoint is not on the disk; empty if it is
        self.ending = False  # set it for the last save of a process: no other will follow
        self.loaded: dict[str, Any] = {}  # {checkpoint_id, epoch, batch, metrics} of the last load
        self.last_blocked_s = 0.0  # how long the last save held the caller
        self._on_message = on_message or _log.warning
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._raise_later: BaseException | None = None
        self._guard = threading.RLock()
        self._lock = RunLock(self.output_dir) if lock else None
        self._verify_live = verify_live
        self._buffers = SnapshotBuffers()
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._next_id: int | None = None
        self._run_id: str | None = None
        self._verified: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._untidy = False  # a failed save may have left a temporary file
        self.passed_over: list[dict[str, str]] = []  # before this process looked: on Drive
        self._drive: DriveBackup | None = None
        if drive_backup is None:
            drive_backup = configured_drive_backup() or False
        if drive_backup is not False:  # True is refused: it names no folder
            self._drive = DriveBackup(
                backup_folder(drive_backup),
                self.output_dir,
                wanted=self._wanted_on_drive,
                known_id=lambda: self._highest_id(self._manifest()),
                on_message=self._messages.put,
                fs=drive_fs or REAL_FS,
                **(drive_options or {}),
            )

    # -- what is there ---------------------------------------------------------------------------
    @property
    def checkpoints(self) -> dict[int, dict[str, Any]]:
        """id -> {checkpoint_id, epoch, batch, metrics, timestamp, ...}, oldest first."""
        entries = self._manifest()["checkpoints"]
        found: dict[int, dict[str, Any]] = {}
        for checkpoint_id, path in sorted(self._files().items()):
            found[checkpoint_id] = entries.get(checkpoint_id) or self._describe(path)
            found[checkpoint_id] = {**found[checkpoint_id], "checkpoint_id": checkpoint_id}
        return found

    def checkpoint_path(self, checkpoint_id: int) -> Path:
        """Where a checkpoint lies, or would lie."""
        if type(checkpoint_id) is not int or not 0 <= checkpoint_id < MAX_ID:
            raise CheckpointError(
                f"no checkpoint {checkpoint_id!r}",
                "ids are whole numbers from 0",
                self._have_text(),
            )
        own = self.checkpoints_dir / f"checkpoint_{checkpoint_id:05d}.pt"
        return self._files().get(checkpoint_id, own)

    def _files(self) -> dict[int, Path]:
        """id -> file. `cp -r backup checkpoints/` nests folders: those count where no own file is,
        later names (dates) first."""
        found: dict[int, Path] = {}
        folders = [(self.checkpoints_dir, 0)]
        for folder, depth in folders:  # grows while it is walked
            for name in reversed(_names(self.fs, folder)):
                match = CHECKPOINT_NAME.fullmatch(name)
                if match:
                    found.setdefault(int(match[1]), folder / name)
                elif depth < 3 and len(folders) < MAX_FOLDERS and _may_be_folder(name):
                    folders.append((folder / name, depth + 1))
        return found

    def _own_files(self) -> dict[int, Path]:
        return {i: p for i, p in self._files().items() if p.parent == self.checkpoints_dir}

    def _manifest(self) -> dict[str, Any]:
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

    def _describe(self, path: Path) -> dict[str, Any]:
        """Metadata of a file that the index does not know, from its seal. Not verified."""
        seal: dict[str, Any] | None = None
        with (
            contextlib.suppress(OSError, CorruptCheckpointError),
            _open_reader(self.fs, path) as (reader, size),
        ):
            seal = read_seal(reader, size)
        keys = ("epoch", "batch", "metrics", "timestamp", "run_id", "checkpoint_id")
        described = {k: (seal or {}).get(k) for k in keys}
        if not isinstance(described["metrics"], dict):
            described["metrics"] = {}
        return described

    def _have_text(self) -> str:
        have = ", ".join(str(i) for i in sorted(self._files())) or "none"
        return f"There are: {have}."

    def get_resume_info(self) -> dict[str, Any] | None:
        """{checkpoint_id, epoch, batch, metrics} of the newest checkpoint that verifies, or None."""
        self._deliver()
        manifest = self._manifest()
        for checkpoint_id, path in sorted(self._files().items(), reverse=True):
            try:
                info = self._verified_info(path, checkpoint_id, manifest)
            except (OSError, CheckpointError) as e:
                self._on_message(f"Not resumable: {e}")
                continue
            return {"checkpoint_id": checkpoint_id, **info}
        return None

    def _verified_info(
        self, path: Path, checkpoint_id: int, manifest: dict[str, Any]
    ) -> dict[str, Any]:
        stat = self.fs.stat(path)
        key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._verified:
            loaded = verify_checkpoint_file(
                path,
                expect_id=checkpoint_id,
                entry=manifest["checkpoints"].get(checkpoint_id),
                run_id=manifest["run_id"],
                fs=self.fs,
            )
            self._verified[key] = {k: loaded.payload[k] for k in ("epoch", "batch", "metrics")}
        return dict(self._verified[key])

    # -- saving ----------------------------------------------------------------------------------
    def should_save_checkpoint(self, batch: int) -> bool:
        """True every `save_every_n_batches` batches, not at batch 0. Call it once per batch: it also
        delivers what the writer and the Drive worker have to say."""
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
        error, self._raise_later = self._raise_later, None
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
        objects = (agent, qwen, solver2, efe_loss, policy_rl, optimizer)
        state = self._collect(objects, extra)
        if self.async_save and self._job is None and self._fits_in_memory(state):
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
                self._join()
            self.poll()
            if self._busy():
                self.skipped_saves += 1
                self._on_message(
                    f"Skipped the checkpoint at epoch {epoch}, batch {batch}: the previous one is "
                    f"still being written ({self.skipped_saves} skipped so far)."
                )
                return None
            objects = (agent, qwen, solver2, efe_loss, policy_rl, optimizer)
            state = self._collect(objects, extra)
            if not self._ready():
                return None
            if self._untidy:
                self.tidy()
            assert self._next_id is not None
            checkpoint_id = self._next_id
            head, seal = self._head(epoch, batch, metrics, checkpoint_id, "checkpoint")
            in_background = self.async_save and self._fits_in_memory(state)
            if in_background:
                state = self._buffers.copy(state)
            else:
                self._buffers.clear()
                state = _compact(state)
            job = _Job(checkpoint_id, self._payload(head, state), seal)
            job.in_buffers = in_background
            self._start(job, in_background)
            if wait:
                self._join()
            if wait or not in_background:
                self._deliver()
                return None if job.entry is None else checkpoint_id
            return checkpoint_id
        finally:
            self.last_blocked_s = time.perf_counter() - started

    def _collect(self, objects: tuple[Any, ...], extra: Mapping[str, Any] | None) -> dict[str, Any]:
        """{module: state, optimizer: state, extra: ..., frozen: ...}, checked to be loadable."""
        state: dict[str, Any] = {}
        frozen = {}
        for name, module in zip(MODULES, objects, strict=False):
            state[name] = module_state(module)
            reference = _frozen(module)
            if reference is not None:
                frozen[name] = reference
        state["optimizer"] = None if objects[-1] is None else objects[-1].state_dict()
        state["extra"] = {} if extra is None else dict(extra)
        state["frozen"] = frozen
        for name, value in state.items():
            check_saveable(value, name)
        return state

    def _payload(self, head: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
        return {**head, **state}

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
            "timestamp": _now(),
            "checkpoint_id": checkpoint_id,
            "run_id": self._run_id,
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
        if self._next_id is not None:
            return True
        if self._lock is not None:
            try:
                self._lock.acquire()
            except OSError as e:
                self._failed(f"cannot lock {self.output_dir}", e)
                return False
        try:
            self.fs.mkdir(self.checkpoints_dir)
            self.fs.fsync_dir(self.output_dir)
            self.fs.fsync_dir(self.output_dir.parent)
            self.tidy()
            manifest = self._manifest()
            run_id = manifest["run_id"]
            if run_id is None:
                seals = (self._describe(p).get("run_id") for p in self._files().values())
                run_id = next((s for s in seals if isinstance(s, str)), None)
            self._run_id = run_id or uuid.uuid4().hex
            self._next_id = self._highest_id(manifest) + 1
        except OSError as e:
            self._failed(f"cannot prepare {self.output_dir}", e)
            return False
        return True

    def _highest_id(self, manifest: dict[str, Any]) -> int:
        """The largest id ever seen, from every place that may remember one; -1 if none."""
        seen = [-1, manifest["next_id"] - 1, *manifest["checkpoints"], *self._files()]
        for folder in (self.checkpoints_dir, self.quarantine_dir, self.set_aside_dir):
            for name in _names(self.fs, folder):
                match = CHECKPOINT_NAME.search(name)
                if match:
                    seen.append(int(match[1]))
        best = self._read_best()
        remembered = [best.get("checkpoint_id") if best else None]
        remembered.append(self.training_state.load().get("checkpoint_id"))
        seen += [i for i in remembered if type(i) is int and 0 <= i < MAX_ID]
        return max(seen)

    def tidy(self) -> None:
        """Remove temporary files of processes that are gone. Only with the run's lock, which says
        that nobody else writes here."""
        self._untidy = not _remove_temporaries(self.output_dir, self.fs)

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _start(self, job: _Job, in_background: bool) -> None:
        self._join()
        self._job = job
        if in_background:
            # Not a daemon: the interpreter waits for it, so that a script's last save completes.
            self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer")
            self._thread.start()
        else:
            self._run(job)

    def _run(self, job: _Job) -> None:
        try:
            self._write(job)
        except BaseException as e:  # reaches the loop at its next call
            if threading.current_thread() is not self._thread:
                raise
            self.failed_saves += 1
            self.last_failure = f"the checkpoint writer failed: {e!r}"
            self._raise_later = e
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
                    self._raise_later = e

    def _write(self, job: _Job) -> None:
        """The protocol: file, index entry, rotation, each durable before the next."""
        target = self.checkpoints_dir / f"checkpoint_{job.checkpoint_id:05d}.pt"
        try:
            size, sha256 = self._write_file(target, job.payload, job.seal)
        except (OSError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and not is_space_error(e):
                raise
            try:
                taken = _exists(self.fs, target)  # renamed, but the directory's fsync failed
            except OSError:
                taken = True  # unknown: an id must not be used twice
            if taken:
                self._next_id = job.checkpoint_id + 1
            self._failed(f"checkpoint {job.checkpoint_id} was not saved", e)
            return
        self._next_id = job.checkpoint_id + 1
        entry = {k: v for k, v in job.seal.items() if k not in ("checkpoint_id", "run_id", "kind")}
        entry |= {"size": size, "sha256": sha256, "torch": str(torch.__version__)}
        job.entry = entry
        self.completed_saves += 1
        self.last_durable_id = job.checkpoint_id
        self.last_failure = ""
        indexed = self._guarded(
            f"checkpoint {job.checkpoint_id} is safe, but the index was not updated",
            lambda: self._write_manifest(job.checkpoint_id, entry),
        )
        if indexed:
            self._rotate(self.max_checkpoints)
        self._note_state(job)
        if self._drive is not None:
            self._drive.notify()

    def _write_file(
        self, target: Path, payload: dict[str, Any], seal: dict[str, Any]
    ) -> tuple[int, str]:
        """Check the space, write, and once more after making room if the disk is full."""
        needed = _state_bytes(payload) + SPACE_SLACK_BYTES
        free = self.fs.free_bytes(target.parent)
        if free is not None and free < needed:
            self._make_room()
            free = self.fs.free_bytes(target.parent)
            if free is not None and free < needed:
                why = f"{needed >> 20} MiB needed, {free >> 20} MiB free"
                raise OSError(errno.ENOSPC, why, str(target.parent))
        try:
            return write_checkpoint_file(target, payload, seal, self.fs)
        except (OSError, RuntimeError) as e:
            if not is_space_error(e):
                raise
            self._make_room()
            return write_checkpoint_file(target, payload, seal, self.fs)

    def _make_room(self) -> None:
        removed = self._rotate(min(2, self.max_checkpoints), verify=True)
        if removed:
            self._messages.put(f"Disk full: removed {len(removed)} old checkpoints, trying again.")

    def _write_manifest(self, checkpoint_id: int, entry: dict[str, Any]) -> None:
        manifest = self._manifest()
        entries = manifest["checkpoints"]
        files = self._files()
        kept = {i: e for i, e in entries.items() if i in files and i != checkpoint_id}
        kept[checkpoint_id] = entry
        self._write_index(kept)

    def _write_index(self, entries: Mapping[int, dict[str, Any]]) -> None:
        index = {
            "format_version": FORMAT_VERSION,
            "run_id": self._run_id,
            "next_id": self._next_id,
            "checkpoints": {str(i): entries[i] for i in sorted(entries)},
        }
        atomic_write_json(self.manifest_path, index, self.fs)

    def _rotate(self, keep: int, verify: bool = False) -> list[int]:
        """Remove the oldest own checkpoints beyond `keep`.

        Never the last good one: rotation follows a save that was read back, or (`verify`, making
        room on a full disk) checks that a kept one is good. Never the one that best points to.
        """
        removed: list[int] = []
        try:
            files = self._own_files()
            ids = sorted(files)
            doomed = [i for i in ids[: max(0, len(ids) - keep)] if i != self._protected_id()]
            if doomed and verify and not any(self._is_good(i, files[i]) for i in ids[-keep:][::-1]):
                return removed
            for checkpoint_id in doomed:
                self.fs.unlink(files[checkpoint_id])
                removed.append(checkpoint_id)
        except OSError as e:
            self._messages.put(f"Old checkpoints were not removed: {e}")
        return removed

    def _is_good(self, checkpoint_id: int, path: Path) -> bool:
        try:
            self._verified_info(path, checkpoint_id, self._manifest())
        except (OSError, CheckpointError):
            return False
        return True

    def _protected_id(self) -> int | None:
        """The checkpoint that best points to, unless best_model.pt holds those bytes itself."""
        if _exists(self.fs, self.best_path):
            return None
        recorded = read_json(self.best_metadata_path, self.fs)
        return recorded.get("checkpoint_id") if isinstance(recorded, dict) else None

    def _note_state(self, job: _Job) -> None:
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
            "training_state.json was not updated", lambda: self.training_state.save(fields)
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
            self._untidy = True
            self._messages.put(f"{what}: {e}")
            return False
        return True

    def _failed(self, what: str, error: BaseException, best: bool = False) -> None:
        self.failed_saves += 1
        self._untidy = True
        if not best:
            self.last_failure = f"{what}: {error}"
        hope = "an epoch that beats the kept one is kept" if best else "the next save tries again"
        hope = "" if self.ending else f"Training goes on; {hope} "
        self._messages.put(f"{what}: {error}. {hope}({self.failed_saves} failed so far).")

    def flush(self, drive_timeout_s: float = 0.0) -> bool:
        """Wait for the writer, then up to `drive_timeout_s` for the Drive copy.

        Returns True if everything asked for so far is durable. Raises what the writer raised.
        """
        self._join()
        if self._drive is not None and self._drive.asked and drive_timeout_s > 0:
            self._drive.drain(drive_timeout_s)
            fields = {"drive": self._drive.status()}
            self._guarded(
                "training_state.json was not updated", lambda: self.training_state.save(fields)
            )
        failed = self._job is not None and self._job.entry is None
        self._deliver()
        return not failed

    def close(
        self, drive_timeout_s: float = 0.0, hurry: Callable[[], bool] = lambda: False
    ) -> bool:
        """Flush, stop the Drive worker and give the lock back.

        The copy to Drive gets up to `drive_timeout_s`; lines say what is left, and what is missing. Once `hurry` says so
        (a signal) it gets DRIVE_HURRY_S more at most. Returns False if that cut the copy short.
        """
        whole = True
        try:
            self._join()
            if self._drive is not None and self._drive.asked:
                self._drive.notify()  # the small files written since, results.json among them
                whole = self._wait_for_drive(drive_timeout_s, hurry)
            self.flush()
        finally:
            if self._drive is not None:
                self._drive.stop()
            if self._lock is not None:
                self._lock.release()
            self._next_id = None
            self._buffers.clear()
            self._job = None
        return whole

    def back_up(self) -> None:
        """Bring Drive up to date, also with what an earlier process could not copy. Does not wait."""
        if self._drive is not None:
            self._drive.notify()

    def _wait_for_drive(self, timeout_s: float, hurry: Callable[[], bool]) -> bool:
        """Give the copy to Drive its time, visibly, and say how far behind it is in the end. False if `hurry` cut it."""
        drive, started = self._drive, time.monotonic()
        assert drive is not None
        end, shown, hurried = started + timeout_s, False, hurry()
        cut = False
        say_at = started + DRIVE_SILENT_S
        done = drive.drain(min(DRIVE_LOOK_S, timeout_s))
        while not done and drive.state not in ("lost", "off") and time.monotonic() < end:
            now = time.monotonic()
            if hurry() and not hurried:
                hurried, say_at = True, now
                cut = end > now + DRIVE_HURRY_S
                end = min(end, now + DRIVE_HURRY_S)
            if now >= say_at:
                left = end - now
                self._on_message(
                    f"Drive backup: {drive.behind_text()} to copy; waiting, {left:.0f} s at most"
                )
                shown, say_at = True, now + DRIVE_SAY_EVERY_S
            done = drive.drain(min(DRIVE_LOOK_S, max(0.0, end - time.monotonic())))
        missing = drive.behind()
        if missing:
            names = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in missing)
            why = f" ({drive.state}: {drive.last_error})" if drive.last_error else ""
            self._on_message(
                f"Drive backup: NOT complete after {time.monotonic() - started:.0f} s{why}: {names} "
                f"not in {drive.folder}. Here they are in {self.output_dir}; --resume copies them."
            )
        elif not done and timeout_s > 0:
            self._on_message("Drive backup: complete but for logs and results")
        elif shown:
            self._on_message(f"Drive backup: complete, {drive.folder}")
        fields = {"drive": drive.status()}
        self._guarded(
            "training_state.json was not updated", lambda: self.training_state.save(fields)
        )
        return done or not cut

    def __enter__(self) -> ModelPersistence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the best model --------------------------------------------------------------------------
    def _read_best(self) -> dict[str, Any] | None:
        """Metadata of best_model.pt: its own seal, or the JSON if the seal has no metrics.

        A kill between the two leaves a JSON that speaks of the best model before; the file decides.
        """
        try:
            size = self.fs.stat(self.best_path).st_size
        except FileNotFoundError:
            return None
        described = self._describe(self.best_path)
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

    def best_value(self, metric_name: str = "accuracy_delta") -> float | None:
        """The metric of the best model so far, or None."""
        best = self._read_best()
        value = best["metrics"].get(metric_name) if best else None
        return float(value) if isinstance(value, (int, float)) else None

    @property
    def best_metric(self) -> str | None:
        """The metric that best_model.pt was chosen by, as far as best_metadata.json tells."""
        recorded = None
        with contextlib.suppress(OSError):
            recorded = read_json(self.best_metadata_path, self.fs)
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
        job = self._job
        if self._busy() and job is not None and (job.follow_ups or job.checkpoint_id < 0):
            self._join()  # a best model is on its way: compare with that one
        try:
            best = self.best_value(metric_name)
        except OSError as e:
            self._failed("best_model.pt was not updated", e, best=True)
            return False
        if best is not None and (value <= best if higher_is_better else value >= best):
            return False
        objects = (agent, qwen, solver2, efe_loss, policy_rl, optimizer)
        state = self._collect(objects, extra)
        if not self._ready():
            return False
        if job is not None and self._is_same_snapshot(job, state, epoch, batch, cleaned):
            with self._guard:
                queued = not job.closed
                if queued:
                    job.follow_ups.append(lambda: self._link_best(job, metric_name))
            if not queued:
                self._link_best(job, metric_name)
        else:
            self._join()
            head, seal = self._head(epoch, batch, cleaned, None, "best")
            if self.async_save and self._fits_in_memory(state):
                state = self._buffers.copy(state)
                best_job = _Job(-1, self._payload(head, state), seal)
                self._start_best(best_job, metric_name)
                return True
            self._write_best(self._payload(head, _compact(state)), seal, metric_name)
        self._deliver()
        if self._busy():
            return True
        with contextlib.suppress(OSError):
            return self.best_value(metric_name) == value
        return False

    def _start_best(self, job: _Job, metric_name: str) -> None:
        def write() -> None:
            try:
                job.entry = self._write_best(job.payload, job.seal, metric_name)
            except BaseException as e:  # noqa: BLE001 - reaches the loop at its next call
                self._raise_later = e

        job.closed = True
        self._job = job
        self._thread = threading.Thread(target=write, name="checkpoint-writer")
        self._thread.start()

    def _is_same_snapshot(
        self, job: _Job, state: Any, epoch: int, batch: int, metrics: Mapping[str, Any]
    ) -> bool:
        """True if a checkpoint (in flight or on disk) holds exactly this state and these metrics."""
        if job.checkpoint_id < 0 or (job.seal["epoch"], job.seal["batch"]) != (epoch, batch):
            return False
        if job.seal["metrics"] != metrics:
            return False
        if job.closed and job.entry is None:
            return False
        kept = job.payload
        if not job.in_buffers:
            # What was streamed were the live tensors themselves: compare with the file instead.
            path = self.checkpoints_dir / f"checkpoint_{job.checkpoint_id:05d}.pt"
            try:
                kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception:  # noqa: BLE001 - any doubt means: write a file of its own
                return False
        return all(_same_content(kept[name], value) for name, value in state.items())

    def _link_best(self, job: _Job, metric_name: str) -> None:
        """best_model.pt as a hard link of a checkpoint just written; its own file if that fails."""
        if job.entry is None:  # the checkpoint failed; the best may still fit
            self._write_best(job.payload, job.seal, metric_name)
            return
        source = self.checkpoints_dir / f"checkpoint_{job.checkpoint_id:05d}.pt"
        temp = self.output_dir / f".best_model.pt.{_unused()}.tmp"
        try:
            self.fs.link(source, temp)
            self.fs.replace(temp, self.best_path)
            self.fs.fsync_dir(self.output_dir)
        except OSError as e:
            with contextlib.suppress(OSError):
                self.fs.unlink(temp)
            if e.errno in NO_LINK_ERRNOS:  # FAT, some network mounts: a file of its own
                self._write_best(job.payload, job.seal, metric_name)
            else:
                self._failed("best_model.pt was not updated", e, best=True)
            return
        with contextlib.suppress(OSError):  # renaming a link onto its own file leaves both names
            if _exists(self.fs, temp):
                self.fs.unlink(temp)
        self._write_best_metadata(job.seal, job.entry["size"], job.entry["sha256"], metric_name)

    def _write_best(
        self, payload: dict[str, Any], seal: dict[str, Any], metric_name: str
    ) -> dict[str, Any] | None:
        try:
            size, sha256 = self._write_file(self.best_path, payload, seal)
        except (OSError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and not is_space_error(e):
                raise
            self._failed("best_model.pt was not updated", e, best=True)
            return None
        self._write_best_metadata(seal, size, sha256, metric_name)
        return {"size": size, "sha256": sha256}

    def _write_best_metadata(
        self, seal: Mapping[str, Any], size: int, sha256: str, metric_name: str
    ) -> None:
        record = {**seal, "metric_name": metric_name, "size": size, "sha256": sha256}
        record["value"] = seal["metrics"].get(metric_name)
        self._guarded(
            "best_model.pt is safe, but best_metadata.json was not updated",
            lambda: atomic_write_json(self.best_metadata_path, record, self.fs),
        )
        if self._drive is not None:
            self._drive.notify()

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
        _check_device(device)
        self._join()
        path = self.checkpoint_path(checkpoint_id)
        if not _exists(self.fs, path):
            raise CheckpointError(
                f"no checkpoint {checkpoint_id}", f"{path} does not exist", self._have_text()
            )
        manifest = self._manifest()
        older = [i for i in self._files() if i < checkpoint_id]
        try:
            loaded = verify_checkpoint_file(
                path,
                expect_id=checkpoint_id,
                entry=manifest["checkpoints"].get(checkpoint_id),
                run_id=manifest["run_id"],
                fs=self.fs,
            )
        except OSError as e:
            raise CheckpointError(f"cannot read {path}", str(e), self._have_text()) from e
        except CorruptCheckpointError as e:
            fix = f"Load checkpoint {max(older)} instead." if older else "Use --resume."
            raise CorruptCheckpointError(e.what, e.why, fix) from e
        objects = (agent, qwen, solver2, efe_loss, policy_rl, optimizer)
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

        A bad file goes to `checkpoints/quarantine/` with the reason beside it. A good file that does
        not fit the objects, the optimizer included, raises MismatchError at once. `skipped` in the result lists what was
        rejected. Raises NoCheckpointError if nothing is left, saying where it looked.

        checkpoint: load this id, or "best", instead; what is newer then moves to `set_aside/` in the run
        directory (`set_aside` in the result), so that no later load takes it and no id comes twice.
        check: called with the file's metadata before anything is changed; what it raises is raised.
        """
        _check_device(device)
        self._join()
        objects = (agent, qwen, solver2, efe_loss, policy_rl, optimizer)
        try:
            if checkpoint is not None:
                return self._load_chosen(objects, checkpoint, check)
            return self._load_newest(objects, check)
        except OSError as e:
            raise CheckpointError(
                f"cannot read {self.output_dir}", str(e), "Check the disk and its permissions."
            ) from e

    def _load_newest(
        self, objects: tuple[Any, ...], check: Callable[[dict[str, Any]], object] | None = None
    ) -> dict[str, Any]:
        skipped: list[dict[str, str]] = list(self.passed_over)
        tried: set[Path] = set()
        for source in ("checkpoint", "best model", "Drive copy of checkpoint"):
            if source.startswith("Drive") and not self._fetch_from_drive(skipped):
                continue
            candidates = list(self._files().items())
            if source == "best model":
                candidates = [(-1, self.best_path)] if _exists(self.fs, self.best_path) else []
            for checkpoint_id, path in sorted(candidates, reverse=True):
                if path in tried:
                    continue
                loaded = self._try(checkpoint_id, path, skipped)
                if loaded is None:
                    if not _exists(self.fs, path):
                        continue  # quarantined: the name is free for Drive's copy
                    tried.add(path)
                    continue
                if check is not None:
                    check(_metadata_of(loaded, path, source))
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
        files = sorted(self._files().items(), reverse=True)
        for checkpoint_id, path in [*files, (None, self.best_path)]:
            source = "best model" if checkpoint_id is None else "checkpoint"
            with contextlib.suppress(OSError, CheckpointError):
                loaded = verify_checkpoint_file(path, expect_id=checkpoint_id, fs=self.fs)
                return _metadata_of(loaded, path, source)
        return None

    def _load_chosen(
        self,
        objects: tuple[Any, ...],
        checkpoint: int | str,
        check: Callable[[dict[str, Any]], object] | None,
    ) -> dict[str, Any]:
        """The checkpoint that the user names; no other is taken in its place."""
        if isinstance(checkpoint, int):
            path, source, what = self.checkpoint_path(checkpoint), "checkpoint", f" {checkpoint}"
        else:
            path, source, what = self.best_path, "best model", ""
        if not _exists(self.fs, path):
            aside = ", ".join(_names(self.fs, self.set_aside_dir))
            why = f"{path} does not exist" + (f"; set aside are {aside}" if aside else "")
            raise CheckpointError(f"no {source}{what}", why, self._have_text())
        manifest = self._manifest()
        loaded = verify_checkpoint_file(
            path,
            expect_id=checkpoint if isinstance(checkpoint, int) else None,
            entry=manifest["checkpoints"].get(checkpoint),
            run_id=manifest["run_id"],
            fs=self.fs,
        )
        if check is not None:
            check(_metadata_of(loaded, path, source))
        metadata = self._apply(loaded, objects, path, source)
        metadata["set_aside"] = self._set_aside(metadata)
        return metadata

    def _set_aside(self, metadata: Mapping[str, Any]) -> list[int]:
        """Move the checkpoints that are newer than a loaded one out of the way, and results.json,
        which tells of them; the ids moved."""
        own_id, here = metadata["checkpoint_id"], (metadata["epoch"], metadata["batch"])
        moved = []
        for checkpoint_id, path in sorted(self._files().items(), reverse=True):
            if own_id is None:  # a best model with a file of its own
                told = self._describe(path)
                at = (told["epoch"], told["batch"])
                newer = None in at or at > here
            else:
                newer = checkpoint_id > own_id
            if newer:
                self._move(path, self.set_aside_dir)
                moved.append(checkpoint_id)
        results = self.output_dir / "results.json"
        if moved and _exists(self.fs, results):
            self._move(results, self.set_aside_dir)
        return moved[::-1]

    def set_best_aside(self) -> Path | None:
        """Move best_model.pt, chosen by figures that no longer compare, to `set_aside/`; where it is
        now, or None."""
        try:
            if not _exists(self.fs, self.best_path):
                return None
            moved = self._move(self.best_path, self.set_aside_dir)
            if _exists(self.fs, self.best_metadata_path):
                self._move(self.best_metadata_path, self.set_aside_dir)
        except OSError as e:
            self._on_message(f"best_model.pt could not be set aside: {e}")
            return None
        return moved

    def _move(self, path: Path, folder: Path) -> Path:
        """Move a file into a folder of the run, durably, under a name that is free there."""
        self.fs.mkdir(folder)
        taken = set(_names(self.fs, folder))
        name, number = path.name, 1
        while name in taken:
            number += 1
            name = f"{path.stem}.{number}{path.suffix}"
        target = folder / name
        self.fs.replace(path, target)
        self.fs.fsync_dir(folder)
        self.fs.fsync_dir(path.parent)
        return target

    def _try(self, checkpoint_id: int, path: Path, skipped: list[dict[str, str]]) -> Loaded | None:
        """Verify one candidate; a bad one is quarantined and noted."""
        manifest = self._manifest()
        try:
            return verify_checkpoint_file(
                path,
                expect_id=checkpoint_id if checkpoint_id >= 0 else None,
                entry=manifest["checkpoints"].get(checkpoint_id),
                run_id=manifest["run_id"],
                fs=self.fs,
            )
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
            best = self.fs.stat(self.best_path)
            if (best.st_dev, best.st_ino) == _identity_of(self.fs.stat(loaded_from)):
                return
            verify_checkpoint_file(self.best_path, fs=self.fs, load=False)
        except OSError:
            return
        except CorruptCheckpointError as e:
            moved = self._quarantine(self.best_path, str(e))
            skipped.append({"file": str(self.best_path), "reason": e.why or e.what})
            self._on_message(f"Skipped {e}; moved to {moved}")

    def _quarantine(self, path: Path, reason: str) -> Path | None:
        """Move a bad file out of the way, with the reason beside it. None if the disk forbids it."""
        try:
            target = self._move(path, self.quarantine_dir)
            note = {"file": str(path), "reason": reason, "when": _now()}
            atomic_write_json(target.with_name(f"{target.name}.reason.json"), note, self.fs)
        except OSError as e:
            self._on_message(f"{path} could not be moved to quarantine: {e}")
            return None
        return target

    def _apply(
        self,
        loaded: Loaded,
        objects: tuple[Any, ...],
        path: Path,
        source: str,
        any_optimizer: bool = False,
    ) -> dict[str, Any]:
        payload = loaded.payload
        named = dict(zip((*MODULES, "optimizer"), objects, strict=True))
        optimizer = "loaded" if named["optimizer"] is not None else "not given"
        if any_optimizer and named["optimizer"] is not None:
            why = _foreign_optimizer(named["optimizer"], payload["optimizer"], str(path))
            if why is not None:
                named["optimizer"], optimizer = None, f"left out: {why}"
        recast = apply_state(payload, named, str(path), self._verify_live)
        for note in loaded.notes:
            self._on_message(note)
        if optimizer.startswith("left out"):
            self._on_message(f"{path}: weights loaded, the optimizer's state {optimizer}")
        metadata = _metadata_of(loaded, path, source)
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

        If it is damaged and the checkpoint it was linked from is a separate, good file, that is used.
        """
        _check_device(device)
        self._join()
        objects = (agent, qwen, solver2, efe_loss, policy_rl, optimizer)
        recorded = read_json(self.best_metadata_path, self.fs)
        recorded = recorded if isinstance(recorded, dict) else {}
        files = self._files()
        twin = recorded.get("checkpoint_id")
        candidates = [self.best_path] if _exists(self.fs, self.best_path) else []
        if type(twin) is int and twin in files:
            candidates.append(files[twin])
        reasons = []
        for path in candidates:
            entry = recorded if path == self.best_path and "sha256" in recorded else None
            run_id = recorded.get("run_id")
            try:
                loaded = verify_checkpoint_file(path, entry=entry, run_id=run_id, fs=self.fs)
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
            f"Load a checkpoint instead. {self._have_text()}",
        )

    # -- Drive -----------------------------------------------------------------------------------
    def _wanted_on_drive(self, keep: int) -> list[tuple[Path, str]]:
        """(local file, name on Drive) of what the backup should hold, most important first."""
        files = self._own_files()
        wanted = [(files[i], files[i].name) for i in sorted(files, reverse=True)[:keep]]
        if _exists(self.fs, self.best_path):
            wanted.insert(min(1, len(wanted)), (self.best_path, self.best_path.name))
        return wanted

    def _fetch_from_drive(self, skipped: list[dict[str, str]]) -> bool:
        """Copy good checkpoints of this run back from Drive. True if there is anything new."""
        if self._drive is None:
            return False
        copied = copy_back_from_drive(self._drive.folder, self.output_dir, skipped, self.fs)
        return bool(copied)

    def drive_status(self) -> dict[str, Any]:
        """{state: off | ok | degraded | lost, ...} of the Drive backup."""
        return self._drive.status() if self._drive is not None else {"state": "off"}


def _metadata_of(loaded: Loaded, path: Path, source: str) -> dict[str, Any]:
    """What a load returns of a file beside what it did: everything but the six states."""
    left_out = (*MODULES, "optimizer", "sealed")
    metadata = {k: v for k, v in loaded.payload.items() if k not in left_out}
    metadata.setdefault("checkpoint_id", None)
    metadata.setdefault("extra", {})
    metadata |= {"path": str(path), "source": source}
    return metadata | {"notes": loaded.notes, "sha256": loaded.sha256}


def clean_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as plain numbers and strings: numpy scalars and one-element tensors are converted."""

    def clean(value: Any, path: str) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, torch.Tensor):
            if value.numel() == 1:
                return value.detach().item()
            return value.detach().cpu().tolist()
        if isinstance(value, Mapping):
            return {str(k): clean(v, f"{path}.{k}") for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(v, f"{path}[{i}]") for i, v in enumerate(value)]
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise PersistenceError(
            f"cannot save '{path}'",
            f"it is a {type(value).__name__}",
            "Metrics are numbers or text.",
        )

    return {str(k): clean(v, f"metrics.{k}") for k, v in metrics.items()}


def _check_device(device: Any) -> None:
    wanted = torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise PersistenceError("device 'cuda' asked for", "there is no GPU", "Use device='cpu'.")


# --------------------------------------------------------------------------------------------------
# Drive backup
# --------------------------------------------------------------------------------------------------
class DriveBackup:
    """Copies the newest checkpoints and the best model to a mounted Drive, beside the training.

    A worker thread does everything that touches the mount; if it hangs there it is abandoned and
    replaced, and training never waits. A file counts as backed up when its copy was read back with
    the right size and hash, renamed, and `<name>.ok` was written, in this order. "In the Drive folder"
    is not yet "in the cloud": the mount uploads when it likes, and nothing here can see that.

    `state`: waiting (the first copies are under way), ok (everything wanted is there), degraded
    (behind for long, or failing and retrying), lost (five failures in a row, or three workers hung),
    off (the folder must not be written: it holds another branch of this run, or the run itself).

    known_id: the newest checkpoint id that the run here has ever had. A folder that holds another run
    under this run's name, the same ids with other content, or newer ones than that, is left alone:
    nothing is copied to it, and nothing there is replaced or removed.
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
        on_message: Callable[[str], None] = _log.warning,
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
            found = [(name, _identity(path)) for path, name in self._wanted(self.keep)]
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
            self.last_ok, self.last_error = _now(), ""
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
            todo = [(p, n) for p, n in wanted if self._done.get(n) != _identity(p)]
            if not todo:
                break
            path, name = todo[0]
            identity = _identity(path)
            if identity is not None and self._copy(path, name, generation):
                self._done[name] = identity
                self.failures_in_a_row = 0  # slow and flaky is not lost
        self._copy_side_files(RUN_SIDE_FILES, generation)
        self._prune({n for _, n in wanted}, generation)

    def _copy_side_files(self, names: Iterable[str], generation: int) -> None:
        for name in names:
            path = self.run_dir / name
            identity = _identity(path)
            if identity is None or identity == self._done.get(name):
                continue
            if identity[0] <= MAX_SIDE_FILE_BYTES and self._copy(path, name, generation, False):
                self._done[name] = identity
                self.failures_in_a_row = 0

    def _refuse_other_branch(self, generation: int) -> None:
        """Never write over, or beside, another branch of the run: two machines, one folder."""
        self._step(generation)
        there = _flat_files(self.folder, self._fs)
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
                f"{self.folder} holds another branch of this run: {why}. Nothing there is changed. To "
                "back up this one, give another --drive_backup folder, or move that folder away"
            )

    def _check_mount(self, generation: int) -> None:
        """An unmounted Drive leaves an empty folder; copies into that would be no backup."""
        marker = self.drive_dir / DRIVE_MARKER
        self._step(generation)
        if _exists(self._fs, marker):
            self._seen_mount = True
        elif self._seen_mount:
            raise OSError(
                errno.ENOTCONN, "the Drive folder is no longer mounted", str(self.drive_dir)
            )
        else:
            _refuse_unmounted_colab(self.drive_dir)
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
                if mark and _exists(self._fs, ok):  # it speaks of the file about to be replaced
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
        digest, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(self._chunk_bytes))
        with _open_reader(self._fs, path) as (reader, _):
            while True:
                self._step(generation)
                got = reader.readinto(buffer)
                if not got:
                    return size, digest.hexdigest()
                digest.update(buffer[:got])
                size += got

    def _already_there(self, target: Path, ok: Path, fd: int, size: int, generation: int) -> bool:
        """A complete copy from an earlier attempt or process; its mark is added if it is missing."""
        if not _exists(self._fs, target) or self._fs.stat(target).st_size != size:
            return False
        record = read_json(ok, self._fs)
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(self._chunk_bytes))
        REAL_FS.seek(fd, 0)
        while got := REAL_FS.readinto(fd, buffer):
            self._step(generation)
            digest.update(buffer[:got])
        mine = digest.hexdigest()
        if isinstance(record, dict) and record.get("sha256") != mine:
            return False
        if self._hash_back(target, generation) != (size, mine):
            return False
        if not isinstance(record, dict):
            self._mark(ok, target.name, size, mine)
        return True

    def _mark(self, ok: Path, name: str, size: int, sha256: str) -> None:
        record = {"name": name, "size": size, "sha256": sha256, "copied": _now()}
        atomic_write_json(ok, record, self._fs)

    def _prune(self, wanted: set[str], generation: int) -> None:
        """Remove older checkpoints from Drive, their marks first; and temporary files left there."""
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


def backup_folder(path: Any) -> Path:
    """The folder that is meant for backups. PersistenceError for what names none: "" would be the
    current folder."""
    if isinstance(path, bool) or not str(path).strip():
        raise PersistenceError(
            f"cannot back up to {path!r}",
            "it names no folder",
            "Give a folder, e.g. /content/drive/MyDrive/ARC-EFE-Backups, or leave it out.",
        )
    return Path(path).expanduser()


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
    drive, runs = backup_folder(drive_dir).absolute(), Path(runs_dir).expanduser().absolute()
    drive, runs = Path(os.path.normpath(drive)), Path(os.path.normpath(runs))
    if drive.is_relative_to(runs):
        raise PersistenceError(
            f"cannot back up to {drive_dir}",
            f"it is {'the' if drive == runs else 'in the'} folder of the runs themselves, {runs}",
            "Give a folder on another disk, e.g. a mounted Drive, or leave it out.",
        )


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        s = path.stat()
    except OSError:
        return None
    return s.st_size, s.st_mtime_ns, s.st_ino


def _refuse_unmounted_colab(path: Path) -> None:
    """`/content/drive` is a mount on Colab; a folder made there without it is not a Drive."""
    mount = Path("/content/drive")
    if path.is_relative_to(mount) and not mount.is_mount():
        raise PersistenceError(
            f"cannot back up to {path}",
            "Google Drive is not mounted",
            "Run: from google.colab import drive; drive.mount('/content/drive')",
        )


def _drive_config_path() -> Path:
    """Where `setup_drive_backup` records the folder; `ARC_TRAINER_CONFIG_DIR` overrides it."""
    override = os.environ.get("ARC_TRAINER_CONFIG_DIR")
    if override:
        return Path(override) / "drive_backup.json"
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "arc_trainer" / "drive_backup.json"


def setup_drive_backup(path: str | os.PathLike[str] | None) -> Path | None:
    """Use `path` for backups from now on, in this and in every later process of this machine.

    Prints `Drive backup enabled: <path>` and returns the path. None switches the backup off.
    """
    config = _drive_config_path()
    if path is None:
        config.unlink(missing_ok=True)
        print("Drive backup disabled")  # noqa: T201 - the notebook cell shows this line
        return None
    folder = backup_folder(path)
    _refuse_unmounted_colab(folder)
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
    atomic_write_json(config, {"path": str(folder), "since": _now()})
    print(f"Drive backup enabled: {path}")  # noqa: T201 - the notebook cell shows this line
    return folder


def configured_drive_backup() -> Path | None:
    """The folder that `setup_drive_backup` recorded, or None."""
    try:
        record = read_json(_drive_config_path())
    except OSError:
        return None
    path = record.get("path") if isinstance(record, dict) else None
    return Path(path) if isinstance(path, str) and path else None


def _flat_files(folder: Path, fs: FileSystem = REAL_FS) -> dict[int, Path]:
    """id -> file of a backup's folder: beside its marks, or in a `checkpoints` folder put there."""
    found: dict[int, Path] = {}
    for place in (folder, folder / "checkpoints"):
        for name in _names(fs, place):
            if match := CHECKPOINT_NAME.fullmatch(name):
                found.setdefault(int(match[1]), place / name)
    return found


def _seal_of(path: Path, fs: FileSystem = REAL_FS) -> dict[str, Any] | None:
    """What a file's seal says, unverified; None if it has none, or cannot be read."""
    with (
        contextlib.suppress(OSError, CorruptCheckpointError),
        _open_reader(fs, path) as (reader, size),
    ):
        return read_seal(reader, size)
    return None


def _same_seal(there: Path, here: Path, fs: FileSystem) -> bool:
    seal = _seal_of(here, fs)
    return seal is not None and seal == _seal_of(there)


def _is_intact(path: Path, fs: FileSystem, tick: Callable[[], None]) -> bool:
    """True if a sealed file holds what its seal says; reads all of it."""
    with (
        contextlib.suppress(OSError, CorruptCheckpointError),
        _open_reader(fs, path) as (reader, size),
    ):
        seal = read_seal(reader, size)
        return seal is not None and seal["seal_sha256"] == _hash_file(reader, size, tick)[0]
    return False


def branch_conflict(
    here: Mapping[int, Path],
    there: Mapping[int, Path],
    *,
    known: int | None = None,
    there_fs: FileSystem = REAL_FS,
    tick: Callable[[], None] = lambda: None,
) -> str:
    """Why two sets of checkpoints are not one history of one run, as far as their seals tell; or "".

    Speaks against it: another run's id, the same id with other content, ids in another order than
    their times, and (with `known`, the newest id that was ever here) one there that is newer. A
    damaged file counts for nothing.
    """
    mine = {i: seal for i, path in here.items() if (seal := _seal_of(path)) is not None}
    runs = [seal.get("run_id") for seal in mine.values()]
    for i, path in sorted(there.items()):
        tick()
        seal = _seal_of(path, there_fs)
        if seal is None:
            continue
        why, saved = "", _seconds(seal.get("timestamp"))
        if mine and seal.get("run_id") not in runs:
            why = f"checkpoint {i} there is of another run"
        elif i in mine and mine[i]["seal_sha256"] != seal["seal_sha256"]:
            if _is_intact(here[i], REAL_FS, tick):
                why = f"checkpoint {i} there is another than here"
        elif known is not None and i > known:
            why = f"checkpoint {i} there is newer than any here"
        for j, own in mine.items():
            at = _seconds(own.get("timestamp"))
            if why or saved is None or at is None or i == j:
                continue
            if saved > at if i < j else saved < at:
                order = "after" if i < j else "before"
                why = f"checkpoint {i} there was saved {order} checkpoint {j} here"
        if why and _is_intact(path, there_fs, tick):
            return why
    return ""


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
    Only what is missing here is copied, and only what verifies; with `above` checkpoints with higher
    ids alone, and the other files replace those here. Returns the files written; rejected ones are
    appended to `skipped`. A backup that is not this run's history is rejected as a whole. Raises
    PersistenceError if the local disk does not take the files.
    """
    flat = _flat_files(source)
    places: list[tuple[Path, Path, int | None]] = [
        (path, output_dir / "checkpoints" / path.name, i)
        for i, path in sorted(flat.items(), reverse=True)
        if i > above
    ]
    for place in (source / "checkpoints", source):
        if _exists(REAL_FS, place / "best_model.pt"):
            places = [p for p in places if p[2] is not None]
            places.insert(0, (place / "best_model.pt", output_dir / "best_model.pt", None))
    here = ModelPersistence(output_dir, drive_backup=False, lock=False, fs=fs)._files()
    marker = output_dir / RESTORING
    if why := branch_conflict(here, flat):
        skipped.append({"file": str(source), "reason": f"it holds another branch: {why}"})
        with contextlib.suppress(OSError):
            fs.unlink(marker)
        return []
    if above >= 0:  # an interrupted one may have brought some already
        places = [(p, t, i) for p, t, i in places if not _same_seal(p, t, fs)]
    else:
        places = [(p, t, i) for p, t, i in places if not _exists(fs, t)]
    written: list[Path] = []
    if not places and not _exists(fs, marker):
        return written
    seals = [seal for p, _, _ in places if (seal := _seal_of(p)) is not None]
    newest = max(seals, key=lambda s: _seconds(s.get("timestamp")) or 0.0, default={})
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
        if _is_file(source) and (replace or not _exists(fs, target)):
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
        with _open_reader(REAL_FS, path) as (reader, _):
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

    Without `run_name` the run that was saved last (by the seals) and has a good checkpoint is taken.
    Checkpoints laid flat into the Drive folder by hand are restored as `arc_complete_restored`. Bad
    copies that were passed over are appended to `skipped`. An interrupted restore is finished by the
    next call, or by `--resume`.
    """
    root = Path(drive_dir)
    if run_name is not None and not RUN_NAME.fullmatch(run_name):
        raise PersistenceError(f"not a run name: {run_name!r}", "", "Use the run directory's name.")
    skipped = [] if skipped is None else skipped
    found = [c for c in _candidates(root, _flat_files) if c.saved is not None]
    found.sort(key=_order, reverse=True)
    sources = [(c.folder, c.folder.name) for c in found if run_name in (None, c.folder.name)]
    if run_name is None and _saved_last(root, _flat_files(root))[0] is not None:
        sources.append((root, "arc_complete_restored"))
    for source, name in sources:
        target = Path(runs_dir) / name
        new = not target.exists()
        with RunLock(target):
            _remove_temporaries(target, fs)
            if copy_back_from_drive(source, target, skipped, fs, say=say):
                return target
            if new:
                with contextlib.suppress(OSError):
                    (target / "run.lock").unlink()
                    (target / "checkpoints").rmdir()
                    target.rmdir()
    return None


# --------------------------------------------------------------------------------------------------
# Which run
# --------------------------------------------------------------------------------------------------
class _Candidate(NamedTuple):
    """A folder that may be a run, or a run's backup."""

    folder: Path
    saved: float | None  # of its newest seal, seconds since 1970; 0 without one; None: no file
    run_id: Any
    touched: float  # a rough sign of life, for the notes alone


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _saved_last(folder: Path, files: Mapping[int, Path]) -> tuple[float | None, Any]:
    """When a run was last saved and its run_id, by its newest readable seal; contents unverified."""
    paths = [files[i] for i in sorted(files, reverse=True)]
    if _is_file(folder / "best_model.pt"):
        paths.append(folder / "best_model.pt")
    for path in paths:
        if (seal := _seal_of(path)) is not None:
            return _seconds(seal.get("timestamp")) or 0.0, seal.get("run_id")
    marker = read_json(folder / RESTORING)
    if isinstance(marker, dict):  # the first file is not yet back
        return _seconds(marker.get("timestamp")) or 0.0, None
    return (0.0 if paths else None), None


def _local_files(folder: Path) -> dict[int, Path]:
    return ModelPersistence(folder, drive_backup=False, lock=False)._files()


def _candidates(root: Path, files_of: Callable[[Path], dict[int, Path]]) -> list[_Candidate]:
    """Folders below `root`; a link to one of the others is not a second one."""
    folders = [root / name for name in _names(REAL_FS, root) if RUN_NAME.fullmatch(name)]
    found, seen = [], set()
    for folder in sorted(folders, key=lambda f: f.is_symlink()):
        if not _is_folder(folder) or folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        with contextlib.suppress(OSError):  # one that cannot be read is none
            signs = [_identity(folder / name) for name in ("config.json", "training.log", ".")]
            touched = max((s[1] for s in signs if s is not None), default=0) / 1e9
            saved, run_id = _saved_last(folder, files_of(folder))
            found.append(_Candidate(folder, saved, run_id, touched))
    return found


def _order(c: _Candidate) -> tuple[float, bool, str]:
    """By time; of two copies of a run not the one that a copied link has become."""
    return c.saved or 0.0, c.folder.name != LATEST_LINK, c.folder.name


def find_latest_run(
    runs_dir: str | os.PathLike[str] = "runs", notes: list[str] | None = None
) -> Path | None:
    """The run that was saved last, as the seals of its checkpoints say; None if there is none.

    What was passed over although it may be the one that is meant is appended to `notes`: newer
    folders without a usable checkpoint, and those that come later by name.
    """
    found = _candidates(Path(runs_dir), _local_files)
    usable = [c for c in found if c.saved is not None]
    best = max(usable, key=_order, default=None)
    for c in found:
        if notes is None or c is best:
            continue
        if c.saved and best is not None and best.saved:
            same = c.run_id is not None and c.run_id == best.run_id
            if same or c.folder.name > best.folder.name:
                kind = "the same run, " if same else ""
                notes.append(
                    f"passed over {c.folder}: {kind}last saved {_date(c.saved)}, "
                    f"{best.folder.name} {_date(best.saved)}"
                )
        elif _looks_like_run(c.folder) and (
            best is None or c.folder.name > best.folder.name or c.touched >= (best.saved or 0.0)
        ):
            why = "no checkpoint yet" if c.saved is None else "no readable seal in it"
            quarantine = c.folder / "checkpoints" / "quarantine"
            if c.saved is None and any(n.endswith(".pt") for n in _names(REAL_FS, quarantine)):
                why = "only damaged files (checkpoints/quarantine)"
            notes.append(f"passed over {c.folder}: {why}")
    return None if best is None else best.folder


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _looks_like_run(folder: Path) -> bool:
    signs = ("config.json", "training.log", "run.lock", "checkpoints")
    return folder.name.startswith("arc_complete_") or any((folder / s).exists() for s in signs)


def run_of(path: str | os.PathLike[str]) -> Path:
    """The run folder that a path means: RUN for RUN/checkpoints, the run behind the latest link."""
    folder = Path(path).expanduser()
    if folder.name == "checkpoints" and not _is_folder(folder / "checkpoints"):
        folder = folder.parent
    if folder.name in ("", ".."):
        folder = folder.resolve()
    # Through runs/arc_complete_latest the run itself: its name is that of its backup, too.
    return folder.resolve() if folder.name == LATEST_LINK and folder.is_symlink() else folder


class Located(NamedTuple):
    """The run that --resume means; None: nothing to resume. What was passed over on the way there, or
    done, in lines to show; and the copies on Drive that were rejected."""

    folder: Path | None
    notes: list[str]
    skipped: list[dict[str, str]]


def locate_run(
    resume: str,
    runs_dir: str | os.PathLike[str] = "runs",
    drive: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Located:
    """Find the run to resume, and bring it back, or up to date, from Drive.

    resume: "latest" or "auto" (what was saved last in `runs_dir`), or a run folder. An interrupted
    restore is finished; a run that is gone is restored; if its backup is newer than the run here and
    the run here is that one's past, the newer state is taken. Raises PersistenceError.
    """
    notes: list[str] = []
    skipped: list[dict[str, str]] = []
    latest = resume in ("latest", "auto")
    try:
        if latest:
            folder, parent, name = find_latest_run(runs_dir, notes), Path(runs_dir), None
        else:
            if _is_file(Path(resume).expanduser()):
                raise _a_file(Path(resume).expanduser())
            folder = run_of(resume)
            parent, name = folder.parent, folder.name
            if name == LATEST_LINK and not _is_folder(folder):
                name = None
        usable = folder is not None and _saved_last(folder, _local_files(folder))[0] is not None
        if folder is not None and _exists(REAL_FS, folder / RESTORING):
            _finish_restore(folder, drive, skipped, say)
            notes.append(f"Finished the restore of {folder}")
        elif usable and drive is not None:
            assert folder is not None
            _take_newer(folder, Path(drive), latest, notes, skipped, say)
        elif drive is not None:  # a new machine
            _refuse_unmounted_colab(Path(drive))
            folder = restore_run_from_drive(drive, parent, name, skipped=skipped, say=say)
            if folder is not None:
                notes.append(f"Restored {folder} from {drive}")
        if folder is not None and _saved_last(folder, _local_files(folder))[0] is None:
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
        fix = f"Use --resume {run} --checkpoint {int(match[1])} to go on from this one, or --resume {run}."
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
        if _saved_last(source, _flat_files(source))[0] is not None:
            above = record.get("above")
            with RunLock(folder):
                _remove_temporaries(folder, REAL_FS)
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
    run = ModelPersistence(folder, drive_backup=False, lock=False)
    known = run._highest_id(run._manifest())

    def compare() -> tuple[list[int], str, _Candidate | None]:
        there = _flat_files(backup)
        why = branch_conflict(run._files(), there)
        others = [c for c in _candidates(drive, _flat_files) if c.saved] if latest else []
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
            _remove_temporaries(folder, REAL_FS)
            took = copy_back_from_drive(backup, folder, skipped, above=known, say=say)
        ids = [str(p.stem.removeprefix("checkpoint_").lstrip("0") or 0) for p in took
               if CHECKPOINT_NAME.fullmatch(p.name)]  # fmt: skip
        if ids:
            notes.append(
                f"Drive is newer than the run here (its newest checkpoint was {known}): took "
                f"{', '.join(reversed(ids))} from {backup}"
            )
    saved, run_id = _saved_last(folder, run._files())
    if other is not None and other.run_id != run_id and (other.saved or 0.0) > (saved or 0.0):
        notes.append(
            f"Drive: {other.folder} was saved later ({_date(other.saved or 0.0)}): "
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


if sys.platform == "win32":  # pragma: no cover
    del FileSystem.readinto

    def _readinto(self: FileSystem, fd: int, buffer: memoryview) -> int:
        data = os.read(fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    FileSystem.readinto = _readinto  # type: ignore[method-assign]
