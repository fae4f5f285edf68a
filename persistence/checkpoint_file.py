"""One checkpoint file: torch's zip, sealed by a comment that holds its metadata and its sha256.

Writes, verifies and describes single files. Never runs code from a file; knows nothing about runs.
    from persistence.checkpoint_file import verify_checkpoint_file, write_checkpoint_file
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import queue
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch

from persistence.files import (
    CHUNK_BYTES,
    REAL_FS,
    AtomicFile,
    CorruptCheckpointError,
    FileSystem,
    MismatchError,
    PersistenceError,
    json_safe,
    open_reader,
)
from persistence.state_tree import is_tensor, iter_leaves

FORMAT_VERSION = 1
DEFER_BYTES = 1 << 20  # blocks this large are hashed by a helper thread while they are written
SEAL_MAGIC = b"ARC-CHECKPOINT-1 "  # starts the zip comment that ends every checkpoint file
SEAL_HEX = 64  # a sha256 in hex: the last bytes of the file
MAX_ENTRIES = 2_000_000  # zip members of a plausible checkpoint
MAX_PICKLE_BYTES = 1 << 30
UNFOLD = 16  # times its memory that a checkpoint's tensors may claim together: tied weights


class SixObjects(NamedTuple):
    """The objects whose states a checkpoint holds, each under its name; None: left out.

    The one place that fixes their order.
    """

    agent: Any
    qwen: Any
    solver2: Any
    efe_loss: Any
    policy_rl: Any
    optimizer: Any


MODULES = SixObjects._fields[:-1]  # all but the optimizer
REQUIRED_KEYS = ("epoch", "batch", "metrics", *MODULES, "optimizer")


class SealedWriter:
    """What `torch.save` writes into: hashes while it streams, then adds the seal.

    The seal is the zip archive's comment: `SEAL_MAGIC + metadata JSON + sha256 hex` of all bytes
    before that hex. A checkpoint can so be checked, and listed, with no other file at hand, and
    remains a zip that `torch.load` reads.

    Errors are kept and raised by `finish`, never inside `write`: torch turns an exception that
    passes through its C++ writer into an unrelated one ("unexpected pos").
    """

    END = struct.Struct("<4s4H2LH")  # zip end-of-central-directory record, 22 bytes

    def __init__(self, file: AtomicFile, seal: Mapping[str, Any], stable: Iterable[int]) -> None:
        text = json.dumps(json_safe(seal), separators=(",", ":"), allow_nan=False, default=str)
        self._comment = SEAL_MAGIC + text.encode()
        if len(self._comment) + SEAL_HEX > 0xFFFF:  # e.g. thousands of metrics: the file has them
            small = {k: v for k, v in seal.items() if k != "metrics"}
            self._comment = SEAL_MAGIC + json.dumps(json_safe(small), default=str).encode()
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


def seal_of(path: Path, fs: FileSystem = REAL_FS) -> dict[str, Any] | None:
    """What a file's seal says, unverified; None if it has none, or cannot be read."""
    with (
        contextlib.suppress(OSError, CorruptCheckpointError),
        open_reader(fs, path) as (reader, size),
    ):
        return read_seal(reader, size)
    return None


def is_intact(path: Path, fs: FileSystem, tick: Callable[[], None]) -> bool:
    """True if a sealed file holds what its seal says; reads all of it."""
    with (
        contextlib.suppress(OSError, CorruptCheckpointError),
        open_reader(fs, path) as (reader, size),
    ):
        seal = read_seal(reader, size)
        return seal is not None and seal["seal_sha256"] == _hash_file(reader, size, tick)[0]
    return False


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
    """The archive's members, refused unless they are what `torch.save` writes: plain, bounded."""
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
        if is_tensor(t) and t.device.type == "cpu"
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
        with open_reader(file.fs, file.temp) as (reader, found):
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
    with open_reader(fs, path) as (reader, size):
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
    would become gigabytes where it is used. All together at most UNFOLD times what it holds."""
    total, stored = 0, {}
    for path, leaf in iter_leaves(payload):
        if not is_tensor(leaf):
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
