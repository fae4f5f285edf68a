"""SIGTERM, SIGINT and SIGHUP in a step, a save, an evaluation and a Drive copy; a second signal.

Each time a durable checkpoint of the batch just finished must be there within 25 s, with exit code
143 or 130. A second signal must end the process at once and harm nothing.
    python tests/faults/signals.py
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from drive import SlowFS
from harness import FileSystem, StopSignals, arguments, finish, forked, scratch, train, warm_up
from kill_points import manager

LIMIT_S = 25.0
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 143}
PLACES = ("step", "save", "background save", "evaluation", "Drive copy")


class SlowDisk(FileSystem):
    """Says when the first checkpoint is being written, and takes a while over it."""

    def __init__(self, say: Any) -> None:
        self.say, self.said = say, False

    def fsync(self, fd: int) -> None:
        if not self.said:
            self.said = True
            self.say("here")
        time.sleep(0.05)
        super().fsync(fd)


def child(place: str, folder: Path, say: Any) -> None:
    """Trains for ever; says `here` when it is in the place, then the batch it stopped after."""
    options: dict[str, Any] = {"epochs": 10**6, "batches": 6, "save_every": 2}
    options["async_save"] = place in ("background save", "Drive copy")

    def step(here: int) -> None:
        if place == "step" and here == 4:
            say("here")
        time.sleep(0.02)

    def evaluate() -> None:
        if place == "evaluation":
            say("here")
            time.sleep(0.3)

    if place in ("save", "background save"):
        options["fs"] = SlowDisk(say)
    if place == "Drive copy":
        options |= {"drive_backup": folder.parent / "drive", "drive_fs": AnnouncingDrive(say)}
    with StopSignals() as stop:
        train(folder, at_batch=step, evaluate=evaluate, stop=stop, **options)


class AnnouncingDrive(SlowFS):
    def __init__(self, say: Any) -> None:
        self.say, self.said = say, False

    def write(self, fd: int, data: bytes | memoryview) -> int:
        if not self.said and len(data) > 1000:
            self.said = True
            self.say("here")
        return super().write(fd, data)


def stubborn(folder: Path, say: Any) -> None:
    """A step that takes for ever: only a second signal ends it."""

    def step(here: int) -> None:
        if here == 4:
            say("here")
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(0.01)

    with StopSignals() as stop:
        train(folder, epochs=3, batches=6, save_every=2, at_batch=step, stop=stop)


def signalled(action: Any, signals: list[int], gap_s: float = 0.0) -> tuple[int, float]:
    """Fork, wait for `here`, send the signals. Returns (exit code, seconds until it ended)."""
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.close(reader)
        action(lambda text: os.write(writer, text.encode()))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb", buffering=0) as pipe:  # noqa: PTH123 - a descriptor, not a path
        pipe.read(4)
        started = time.monotonic()
        for number, which in enumerate(signals):
            if number:
                time.sleep(gap_s)
            os.kill(middle, which)
        _, status = os.waitpid(middle, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def guarded(action: Any) -> Any:
    """Turn SystemExit into an exit code in a forked child."""

    def run(say: Any) -> None:
        try:
            action(say)
        except SystemExit as e:
            os._exit(e.code if isinstance(e.code, int) else 1)
        except BaseException as e:  # noqa: BLE001 - shown by its exit code
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
            os._exit(99)

    return run


def last_logged(folder: Path) -> tuple[int, int]:
    fields = (folder / "losses.txt").read_text().splitlines()[-1].split()
    return int(fields[0]), int(fields[1])


def run() -> dict[str, Any]:
    """Every signal in every place; returns the figures."""
    # Under nohup SIGHUP is ignored, in a shell's background SIGINT, and a run rightly goes on: here
    # for ever.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warm_up()
    figures: dict[str, Any] = {"cases": 0, "good": 0, "slowest_s": 0.0, "problems": []}
    with scratch() as root:
        for name, code in CODES.items():
            for place in PLACES:
                work = root / "runs" / "run"
                shutil.rmtree(root / "runs", ignore_errors=True)
                action = guarded(lambda say, p=place, w=work: child(p, w, say))
                status, took_s = signalled(action, [getattr(signal, name)])
                figures["cases"] += 1
                figures["slowest_s"] = round(max(figures["slowest_s"], took_s), 2)
                info = manager(work).get_resume_info()
                position = (info["epoch"], info["batch"]) if info else None
                if status != code:
                    figures["problems"].append(f"{name} in {place}: exit code {status}")
                elif took_s > LIMIT_S:
                    figures["problems"].append(f"{name} in {place}: took {took_s:.1f} s")
                elif position != last_logged(work):
                    wanted = last_logged(work)
                    figures["problems"].append(f"{name} in {place}: {position}, not {wanted}")
                else:
                    figures["good"] += 1
        for name, code in CODES.items():
            work = root / "second"
            shutil.rmtree(work, ignore_errors=True)
            action = guarded(lambda say, w=work: stubborn(w, say))
            status, took_s = signalled(action, [getattr(signal, name)] * 2, 0.4)
            figures["cases"] += 1
            info = manager(work).get_resume_info()
            if status != code or took_s > 2.0:
                figures["problems"].append(f"second {name}: code {status} after {took_s:.1f} s")
            elif info is None or info["batch"] != 2:
                figures["problems"].append(f"second {name}: resumes from {info}")
            else:
                figures["good"] += 1
    return figures


def main() -> None:
    arguments(__doc__ or "")
    figures = run()
    finish(figures, not figures["problems"])


if __name__ == "__main__":
    main()

__all__ = ["forked", "run"]
