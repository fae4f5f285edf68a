"""What the scripts' command lines share: the parser, exit codes, user errors, device and precision.

Importing it needs the standard library alone, so that `--help` does not wait for torch. It prints
nothing and reads no files. `from command_line import Parser, UserError, number, pick_device`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import sys
from typing import Any, NoReturn

EXIT_DONE, EXIT_UNEXPECTED, EXIT_ARGUMENTS, EXIT_MISSING = 0, 1, 2, 3
EXIT_MEMORY, EXIT_DIVERGED, EXIT_UNSAVED = 4, 5, 6
# What the texts of errors say when the memory of the CPU ran out, beside MemoryError and ENOMEM.
MEMORY_TEXTS = ("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory")


def settle_threads() -> None:
    """Let waiting CPU threads sleep instead of spin; call before torch is imported.

    On a machine with other work, spinning threads take the cores from the ones they wait for:
    two threads on two cores with one of them busy took 5033 ms a batch spinning, 666 ms sleeping
    (measured). A value that the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Parser(argparse.ArgumentParser):
    """argparse with a suggestion for a misspelt flag."""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized arguments:"):
            known = [option for action in self._actions for option in action.option_strings]
            for word in message.split(":", 1)[1].split():
                close = difflib.get_close_matches(word.split("=")[0], known, n=1, cutoff=0.5)
                if word.startswith("-") and close:
                    message += f". Did you mean {close[0]}?"
                    break
        self.exit(EXIT_ARGUMENTS, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float, high: float = float("inf")) -> Any:
    """An argparse type: a finite number in [low, high]."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value <= high or value != value:
            top = "" if high == float("inf") else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} must be at least {low:g}{top}")
        return value

    return parse


class UserError(Exception):
    """Something the user can put right: one message (what, why, fix) and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def memory_message(error: BaseException, advice: str) -> str | None:
    """The line for memory that ran out, on a GPU or a CPU, with `advice`; None for another error.

    What an error was raised from counts, too: threads and loaders wrap what went wrong in them.
    """
    torch = sys.modules.get("torch")  # it may be what the memory did not suffice for
    kinds = (MemoryError, getattr(torch, "OutOfMemoryError", MemoryError))
    seen: BaseException | None = error
    while seen is not None:
        known = isinstance(seen, kinds)
        known |= isinstance(seen, OSError) and seen.errno == errno.ENOMEM
        if not known and isinstance(seen, RuntimeError | OSError | ImportError):
            known = any(text in str(seen) for text in MEMORY_TEXTS)
        if known:
            why = (str(seen).strip().splitlines() or [""])[0].rstrip(".")
            return f"out of memory: {why}. {advice}" if why else f"out of memory. {advice}"
        seen = seen.__cause__
    return None


def leave(code: int) -> NoReturn:
    """End the process with `code`, also where the console can no longer be written.

    Output that a full disk or a closed pipe refuses would otherwise turn any code into 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def pick_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu; a GPU that is not there is an argument error."""
    import torch

    there = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if there else "cpu"
    if name.startswith("cuda"):
        if not there:
            built = torch.version.cuda is not None
            why = "no CUDA device is visible" if built else "this torch build has no CUDA"
            raise UserError(
                f"--device {name}: {why}. Use --device cpu, or install a CUDA build of torch on a "
                "machine with a GPU.",
                EXIT_ARGUMENTS,
            )
        index = int(name[5:]) if ":" in name else 0
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0.",
                EXIT_ARGUMENTS,
            )
    return name


def pick_precision(amp: str, device: str) -> tuple[Any, bool]:
    """(autocast dtype or None, whether gradients need scaling) for --amp on a device."""
    import torch

    if amp == "auto":
        if device == "cpu":
            return None, False
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if native else "fp16"
    if amp == "off":
        return None, False
    return (torch.bfloat16, False) if amp == "bf16" else (torch.float16, True)


def add_process_arguments(parser: argparse.ArgumentParser, quiet: str) -> None:
    """The flags of every script that uses a trained model; `quiet` says what is still printed."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument("--threads", type=number(int, 1, 1024), help="CPU threads (default: cores)")
    parser.add_argument("--offline", action="store_true", help="never ask a model hub")
    parser.add_argument("--quiet", action="store_true", help=quiet)
