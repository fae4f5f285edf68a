"""State trees of dicts, lists, tensors and numbers: what may be saved, copies, comparison, sha256.

Touches no file and no module; a tree is what `state_dict` gives.
    from persistence.state_tree import SnapshotBuffers, iter_leaves, state_fingerprint
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persistence.files import CorruptCheckpointError, PersistenceError

# Objects in a plausible checkpoint; stops a small pickle that unfolds for ever.
MAX_NODES = 20_000_000
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


def same_leaf(a: Any, b: Any) -> bool:
    """Bitwise equality of two leaves, on whatever devices; dtypes, shapes and types count."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.device != b.device:
            a, b = a.cpu(), b.cpu()
        return torch.equal(a, b) or torch.equal(_tensor_bytes(a), _tensor_bytes(b))  # NaN, -0.0
    return type(a) is type(b) and (a == b or repr(a) == repr(b))


def same_content(a: Any, b: Any) -> bool:
    """Bitwise equality of two trees; a dict's order does not count."""
    left, right = iter_leaves(a), iter_leaves(b)
    for (path_a, leaf_a), (path_b, leaf_b) in zip(left, right, strict=False):
        if path_a != path_b or not same_leaf(leaf_a, leaf_b):
            return False
    return next(left, None) is None and next(right, None) is None


def state_bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree, shared ones as often as they occur."""
    return sum(t.numel() * t.element_size() for _, t in iter_leaves(tree) if is_tensor(t))


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class SnapshotBuffers:
    """Copies of a state tree in memory that is kept and reused, pinned where the source is on
    CUDA."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def missing_bytes(self, tree: Any) -> int:
        """Bytes a copy of `tree` would have to allocate."""
        return sum(
            t.numel() * t.element_size()
            for path, t in iter_leaves(tree)
            if is_tensor(t) and not self._fits(self._kept.get(path), t)
        )

    def copy(self, tree: Any) -> Any:
        """A tree of the same form whose tensors live in the buffers until the next `copy`."""
        used: dict[str, torch.Tensor] = {}
        aliases: dict[tuple[Any, ...], torch.Tensor] = {}
        gpus: set[torch.device] = set()

        def visit(value: Any, path: str) -> Any:
            if isinstance(value, torch.Tensor):
                source = value.detach()
                if source.is_cuda:
                    gpus.add(source.device)
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
        for gpu in gpus:  # whichever the process takes for its current one
            torch.cuda.synchronize(gpu)
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


def compact(tree: Any) -> Any:
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
    """Bytes that can be taken without swapping, within a container's limit; None if unknown."""
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
