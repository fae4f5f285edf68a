"""A CUDA device that is pretended on the CPU: its tensors hold CPU memory that is marked.

`with Pretended() as device:` makes the names `cuda`, `cuda:0` and `cuda:1` work. Memory made there
is marked, and so is what is computed from it. As on a real GPU, an operation that mixes devices, a
generator of another one or `.numpy()` raises; and each call for which the CPU would wait for the
device is noted in `device.waits`, with the line of the project it comes from. What product code
catches is kept in `device.faults`, and raised at the end of the block. Autocast is the CPU's, with
those operations in float32 that CUDA's keeps there, and none that only the CPU's does. No kernel of
CUDA runs: what that leaves unseen stands in docs/GPU.md. Other threads do not pretend.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
N_DEVICES, MEMORY_BYTES = 2, 80 * 2**30
REAL_AUTOCAST = torch.autocast
REAL_GROUPS = torch._C._group_tensors_by_device_and_dtype
REAL_APPLY = torch.autograd.function.BackwardCFunction.apply
REAL_BACKWARD = torch.autograd._engine_run_backward  # type: ignore[attr-defined]


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What brings a value, or a shape that depends on values, to the CPU; the last ones ask whether all
# went well.
READS = words(
    "item tolist nonzero argwhere masked_select unique unique_consecutive _unique2 bincount histc "
    "__bool__ __int__ __float__ __index__ __format__ __repr__ __contains__ is_nonzero equal "
    "allclose cholesky linalg_cholesky linalg_inv inverse linalg_solve linalg_eigh"
)
# What is the same wherever a tensor is: properties and functions.
PLAIN = words(
    "shape dtype requires_grad ndim is_leaf is_meta layout is_quantized grad_fn stride numel "
    "element_size dim size data_ptr untyped_storage is_floating_point is_contiguous __len__ "
    "is_same_size _set_grad_enabled _has_compatible_shallow_copy_type"
)
FACTORIES = words(
    "zeros ones empty full arange linspace logspace eye rand randn randint randperm tensor "
    "as_tensor scalar_tensor"
)
MOVES = words("to cuda cpu pin_memory is_pinned get_device")
INDEXING = words("__getitem__ __setitem__ index_put index_put_")
JOINING = words("stack cat concat concatenate hstack vstack")
# Under autocast CUDA computes these in float32, the CPU in what it is given ...
FLOAT32_ON_CUDA = words(
    "softmax log_softmax exp expm1 log log1p log2 log10 pow __pow__ rsqrt reciprocal sum cumsum "
    "cumprod norm linalg_vector_norm layer_norm rms_norm logsumexp softplus"
)
# ... and these in what it is given, the CPU in float32 or in the widest type among them.
AS_GIVEN_ON_CUDA = words(
    "linalg_cholesky_ex cholesky_solve linalg_solve triangular_solve index_copy quantile"
)


def named(device: Any) -> torch.device:
    """The device, with its number if it is a GPU."""
    device = torch.device(device)
    return CUDA if device.type == "cuda" and device.index is None else device


class Wait(NamedTuple):
    """The CPU waited: in which file and function of the project, at which line, by what."""

    file: str
    function: str
    line: int
    call: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.call}"


class Generator(torch.Generator):
    """A generator that says it is on the device it was asked for, with the CPU's numbers."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return torch._C.Generator.__new__(cls, "cpu")  # type: ignore[call-arg]

    def __init__(self, device: Any = "cpu") -> None:
        self.where = named(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where


class Autocast(REAL_AUTOCAST):  # type: ignore[misc,valid-type]
    """The CPU's autocast under CUDA's name."""

    def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **options)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """All tensors of arguments, in lists and tuples, too."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            data = len(value) > 8 and isinstance(value[0], int | float)  # long, and no tensor
            found += [] if data else tensors_in(value)
    return found


def home(x: Tensor) -> torch.device:
    """The device whose memory the tensor has."""
    return getattr(x.untyped_storage(), "pretended", CPU)


def mark(result: Any, device: torch.device, but: Sequence[Tensor] = ()) -> Any:
    """The result, its tensors moved to the device but for those whose memory `but` has."""
    kept = {x.untyped_storage()._cdata for x in but}
    for x in tensors_in((result,)):
        if x.untyped_storage()._cdata not in kept:
            x.untyped_storage().pretended = device  # type: ignore[attr-defined]
    return result


def gradients_at_home(function: Any, *gradients: Any) -> Any:
    """A backward pass in Python: what comes from torch's own passes lies where was saved what the
    forward pass had."""
    places = [home(x) for x in function.saved_tensors]
    if CUDA.type in {place.type for place in places}:
        mark(list(gradients), next(place for place in places if place.type == CUDA.type))
    return REAL_APPLY(function, *gradients)


class Pretended(TorchFunctionMode):
    """The device, while the block lasts. waits: of all calls so far; faults: what went wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.faults: list[str] = []
        self.random_states = [torch.zeros(16, dtype=torch.uint8) for _ in range(N_DEVICES)]
        self.synchronised: list[torch.device] = []
        self._stack = contextlib.ExitStack()
        self._depth = 0

    def __enter__(self) -> Pretended:
        self._depth += 1
        if self._depth == 1:
            for owner, name, fake in self._fakes():
                self._stack.enter_context(mock.patch.object(owner, name, fake))
        super().__enter__()
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        super().__exit__(kind, value, trace)
        self._depth -= 1
        if self._depth:
            return
        self._stack.close()
        if kind is None and self.faults:
            raise AssertionError("; ".join(self.faults))

    def take_waits(self) -> Counter[Wait]:
        """The waits since the last call, counted."""
        found, self.waits = self.waits, []
        return Counter(found)

    # ---- what torch has beside its operations

    def _fakes(self) -> Iterator[tuple[Any, str, Any]]:
        """What a build without CUDA cannot answer."""
        properties = SimpleNamespace(name="pretended", total_memory=MEMORY_BYTES)
        answers: dict[str, Callable[..., Any]] = {
            "is_available": lambda: True,
            "device_count": lambda: N_DEVICES,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: properties.name,
            "get_device_properties": lambda device=None: properties,
            "is_bf16_supported": lambda including_emulation=True: True,
            "get_rng_state_all": lambda: [state.clone() for state in self.random_states],
            "set_rng_state": self._set_random_state,
            "synchronize": self._synchronise,
            "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "memory_reserved": lambda device=None: 0,
            "max_memory_reserved": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": lambda: None,
        }
        yield from ((torch.cuda, name, fake) for name, fake in answers.items())
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if hasattr(
                torch.optim.Optimizer, name
            ):  # it asks the driver; which, by torch's version
                yield torch.optim.Optimizer, name, lambda optimizer: None
        yield torch, "Generator", Generator
        yield torch, "autocast", Autocast
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            real = getattr(torch, name)
            yield torch, name, lambda device="cuda", real=real: real("cpu")
        yield torch._C, "_group_tensors_by_device_and_dtype", self._groups
        yield torch.autograd, "_engine_run_backward", self._backward
        yield torch.autograd.function.BackwardCFunction, "apply", gradients_at_home

    def _set_random_state(self, state: Tensor, device: Any = 0) -> None:
        if home(state) != CPU or state.dtype != torch.uint8:
            self._fault("set_rng_state wants bytes on the CPU")
        self.random_states[device] = state.clone()

    def _synchronise(self, device: Any = None) -> None:
        self._wait("synchronize")
        self.synchronised.append(CUDA if device is None else named(device))

    def _groups(self, lists: Any, with_indices: bool = False) -> dict[Any, Any]:
        """torch's grouping of lists of tensors, with the device that the first list has."""
        groups: dict[Any, Any] = REAL_GROUPS(lists, with_indices)
        return {(home(group[0][0][0]), key[1]): group for key, group in groups.items()}

    def _backward(self, *args: Any, **options: Any) -> Any:
        """torch's pass backward; what is computed anew there pretends, too."""
        with self:
            return REAL_BACKWARD(*args, **options)

    # ---- notes

    def _wait(self, call: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.parent in (ROOT, ROOT / "persistence"):
                where = path.relative_to(ROOT).as_posix(), frame.f_code.co_name, frame.f_lineno
                self.waits.append(Wait(*where, call))
                return
            frame = frame.f_back
        self.waits.append(Wait("", "", 0, call))

    def _fault(self, what: str) -> None:
        self._wait(what)  # for its place
        self.faults.append(str(self.waits.pop()))
        raise RuntimeError(self.faults[-1])

    # ---- operations

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        name = func.__name__
        if name in PLAIN:
            return func(*args, **options)
        if name == "__get__":
            return self._attribute(func, args)
        if name in MOVES:
            return self._moved(func, name, args, options)
        given = tensors_in((*args, *options.values()) if name != "__deepcopy__" else args[:1])
        homes = [home(x) for x in given]
        inside = [x for x, at in zip(given, homes, strict=True) if at != CPU]
        outside = [x for x, at in zip(given, homes, strict=True) if at == CPU]
        if name in ("numpy", "__array__") and inside:
            self._fault(f"{name}() of a tensor on the device: use .cpu() first")
        there = home(inside[0]) if inside else CPU
        if "pin_memory" in options:
            options["pin_memory"] = False
        if options.get("device") is not None:
            there = named(options["device"])
            options["device"] = "cpu"
            if name in ("tensor", "as_tensor") and there != CPU:
                self._wait(f"{name}: data copied to the device")
        elif name in FACTORIES:
            there = CPU
        if inside and name in FACTORIES:
            self._wait(f"{name} of a value on the device")
        generator = options.get("generator")
        if generator is not None and generator.device != there:
            self._fault(f"{name}: the generator is on {generator.device}")
        if inside:
            self._check(func, args, options, inside, outside)
            args, options = self._as_autocast(name, args, options)
        if inside and name in AS_GIVEN_ON_CUDA and torch.is_autocast_enabled("cpu"):
            with REAL_AUTOCAST("cpu", enabled=False):
                result = func(*args, **options)
        else:
            result = func(*args, **options)
        return mark(result, there, outside) if there != CPU else result

    def _attribute(self, func: Any, args: Any) -> Any:
        """A property of a tensor, with the device it pretends to be on."""
        name = func.__self__.__name__
        if name in PLAIN:
            return func(*args)
        there = home(args[0])
        if name == "device":
            return there
        if name in ("is_cuda", "is_cpu"):
            return (there != CPU) == (name == "is_cuda")
        result = func(*args)
        return mark(result, there) if there != CPU else result

    def _moved(self, func: Any, name: str, args: Any, options: dict[str, Any]) -> Any:
        """Tensor.to and its kind."""
        x, rest = args[0], args[1:]
        here = home(x)
        if name == "is_pinned":
            return False
        if name == "get_device":
            return -1 if here == CPU else here.index
        if name == "pin_memory":
            return x.clone()
        no_wait = options.get("non_blocking", False)
        there, dtype = here, None
        if name == "to":
            copied = options.pop("copy", False)
            if rest and isinstance(rest[0], Tensor):
                there, dtype = home(rest[0]), rest[0].dtype
            else:
                device, dtype, no_wait, _ = torch._C._nn._parse_to(*rest, **options)
                there = here if device is None else named(device)
        else:
            copied, there = False, named(rest[0] if rest else name)
        result = x.to(dtype=x.dtype if dtype is None else dtype, copy=copied)
        if here == there:
            return mark(result, here) if here != CPU else result
        if here != CPU or not no_wait:
            self._wait(f"{name}: copied to {there.type}")
        if result.untyped_storage() is x.untyped_storage():
            result = result.clone()
        return mark(result, there) if there != CPU else result

    def _check(
        self,
        func: Any,
        args: Any,
        options: dict[str, Any],
        inside: list[Tensor],
        outside: list[Tensor],
    ) -> None:
        """Devices that do not go together, and waits, of an operation on tensors of the device."""
        name = func.__name__
        if name in INDEXING:
            self._check_index(name, args)
            return
        if name == "__set__" and func.__self__.__name__ == "data":
            return
        if name in ("copy_", "_foreach_copy_"):
            if outside and not (options.get("non_blocking") or args[2:3] == (True,)):
                self._wait(f"{name} between CPU and device")
            return
        homes = {home(x) for x in inside}
        if len(homes) > 1:
            self._fault(f"{name}: {' meets '.join(sorted(map(str, homes)))}")
        odd = [x for x in outside if x.dim() or name in JOINING]
        if odd:
            self._fault(f"{name}: a tensor {tuple(odd[0].shape)} on the CPU meets the device's")
        if name == "where" and outside:
            self._wait("where: a number in a CPU tensor copied to the device")
        given = (*args[1:], *options.values())
        reads = name in READS or (name in ("where", "one_hot") and not given)
        reads |= name == "multinomial" and (True not in given[1:] or given[0] == 1)
        reads |= name == "repeat_interleave" and len(inside) > 1 and "output_size" not in options
        if reads:
            self._wait(name)

    def _check_index(self, name: str, args: Any) -> None:
        """x[index] and x[index] = value."""
        whole, index = args[0], args[1]
        parts = index if isinstance(index, tuple) else (index,)
        if name.startswith("index_put"):
            parts = tuple(index)
        for part in parts:
            if isinstance(part, list | range | np.ndarray):
                self._wait(f"{name}: a list of numbers copied to the device")
            elif isinstance(part, Tensor) and part.dim():
                if home(part) not in (CPU, home(whole)):
                    self._fault(f"{name}: an index on another device")
                if home(part) != home(whole):
                    self._wait(f"{name}: an index copied to the device")
                number = len(args) > 2 and not isinstance(args[2], Tensor)
                if part.dtype in (torch.bool, torch.uint8) and not number:
                    self._wait(f"{name} by a mask")
            elif isinstance(part, Tensor) and home(part) != CPU and part.dtype == torch.bool:
                self._wait(f"{name} by a mask")
        for value in (x for x in args[2:] if isinstance(x, Tensor)):
            if home(value) != home(whole):
                if value.dim() and any(isinstance(part, Tensor) for part in parts):
                    self._fault(f"{name}: the value is on the other device")
                self._wait(f"{name}: the value copied between CPU and device")

    @staticmethod
    def _as_autocast(name: str, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Arguments in float32 where CUDA's autocast has them so."""
        if name not in FLOAT32_ON_CUDA or not torch.is_autocast_enabled("cpu"):
            return args, options

        def wide(value: Any) -> Any:
            half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
            return value.float() if half else value

        return tuple(map(wide, args)), {key: wide(value) for key, value in options.items()}
