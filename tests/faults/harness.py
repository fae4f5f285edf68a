"""What the fault scripts share: a toy trainer that uses everything,
and file systems that misbehave.

Each script in this folder injects one kind of fault, prints its figures as one JSON line and exits
non-zero if a figure is missed: `python tests/faults/kill_points.py --share 1/1`.
Children are forked from a process that has imported torch but started no thread.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from model_persistence import (
    ModelPersistence,
    StopSignals,
    capture_rng_state,
    restore_rng_state,
)
from persistence.checkpoint_file import SixObjects
from persistence.files import REAL_FS, AtomicFile, FileSystem
from persistence.state_tree import state_fingerprint

MUTATING = frozenset(
    {"create", "write", "fsync", "close", "replace", "link", "unlink", "mkdir", "fsync_dir"}
)
OPERATIONS = (
    "create",
    "open_read",
    "write",
    "readinto",
    "fsync",
    "close",
    "replace",
    "link",
    "unlink",
    "mkdir",
    "fsync_dir",
    "listdir",
    "stat",
    "fstat",
    "free_bytes",
)


# -- the toy trainer -------------------------------------------------------------------------------
class Bank(torch.nn.Module):
    """A memory that grows, as solver2's does: its state has no fixed shape."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.rows = torch.zeros(0, 4)

    def persistent_state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale.detach(), "rows": self.rows}

    def load_persistent_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.scale.copy_(state["scale"])
        self.rows = state["rows"].clone()


class Toy:
    """Six objects and a loop state, small enough to be killed a thousand times.

    Order and augmentation come from (seed, epoch, position); dropout and noise from the global
    generators of Python, numpy and torch, so that a resume without them is noticed.
    """

    def __init__(self, seed: int = 0, bf16: bool = False) -> None:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is part of what must be restored
        torch.manual_seed(seed)
        self.seed, self.bf16 = seed, bf16
        nn = torch.nn
        self.agent = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 4))
        self.qwen = nn.Linear(4, 4)
        self.solver2 = Bank()
        self.efe_loss = nn.BatchNorm1d(4)
        self.policy_rl = nn.Linear(4, 4)
        modules = (self.agent, self.qwen, self.solver2, self.efe_loss, self.policy_rl)
        self.parameters = [p for m in modules for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.99)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.threshold = 0.2
        generator = torch.Generator().manual_seed(seed + 99)
        self.data = torch.randn(64, 4, generator=generator)

    @property
    def six(self) -> SixObjects:
        return SixObjects(
            self.agent,
            self.qwen,
            self.solver2,
            self.efe_loss,
            self.policy_rl,
            self.optimizer,
        )

    def extra(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.state_dict(),
            "ema": self.ema,
            "threshold": self.threshold,
            "rng": capture_rng_state(),
        }

    def restore(self, extra: dict[str, Any]) -> None:
        self.schedule.load_state_dict(extra["schedule"])
        self.ema = [t.clone() for t in extra["ema"]]
        self.threshold = extra["threshold"]
        restore_rng_state(extra["rng"])  # last: nothing after this may draw

    def step(self, epoch: int, batch: int) -> float:
        """One optimizer step; returns the loss."""
        private = torch.Generator().manual_seed(self.seed * 7919 + epoch * 104729 + batch)
        rows = torch.randint(0, len(self.data), (4,), generator=private)
        flip = torch.randint(0, 2, (4,), generator=private).bool()
        inputs = torch.where(flip[:, None], self.data[rows].flip(1), self.data[rows])
        noise = random.random() + float(np.random.rand())  # noqa: NPY002 - global on purpose
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            hidden = self.qwen(inputs) * self.solver2.scale + 0.01 * noise
            output = self.efe_loss(self.agent(hidden)) + self.policy_rl(inputs)
            loss = (output.float() - inputs.roll(1, 0)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.parameters, strict=True):
                average.lerp_(parameter, 0.1)
        value = float(loss.detach())
        self.threshold = 0.9 * self.threshold + 0.1 * value
        if value > self.threshold:
            self.solver2.rows = torch.cat([self.solver2.rows, inputs[:1].detach()])
        return value

    def metrics(self) -> dict[str, float]:
        with torch.no_grad():
            return {"accuracy_delta": -float((self.qwen(self.data) - self.data).square().mean())}

    def fingerprint(self) -> str:
        """sha256 of everything that a resume must restore."""
        names = ("agent", "qwen", "solver2", "efe_loss", "policy_rl", "optimizer")
        state = {
            n: m.persistent_state_dict() if isinstance(m, Bank) else m.state_dict()
            for n, m in zip(names, self.six, strict=True)
        }
        return state_fingerprint({**state, "extra": self.extra()})


def train(
    folder: Path,
    *,
    epochs: int = 2,
    batches: int = 8,
    save_every: int = 3,
    bf16: bool = False,
    async_save: bool = False,
    fs: FileSystem | None = None,
    at_batch: Callable[[int], None] | None = None,
    acknowledge: Callable[[int | None], None] | None = None,
    stop: StopSignals | None = None,
    evaluate: Callable[[], None] | None = None,
    **options: Any,
) -> str:
    """The loop: resume if there is something, train, save, keep the best. Returns the final sha256.

    Every batch appends `epoch batch loss` to losses.txt, as a log does.
    """
    toy = Toy(bf16=bf16)
    persistence = ModelPersistence(
        folder,
        max_checkpoints=2,
        save_every_n_batches=save_every,
        async_save=async_save,
        drive_backup=options.pop("drive_backup", False),
        on_message=options.pop("on_message", lambda _: None),
        fs=REAL_FS if fs is None else fs,
        **options,
    )
    start_epoch = start_batch = 0
    if persistence.checkpoints:
        found = persistence.load_latest(*toy.six)
        start_epoch, start_batch = found["epoch"], found["batch"] + 1
        toy.restore(found["extra"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "losses.txt").open("a") as log:
        for epoch in range(start_epoch, epochs):
            for batch in range(start_batch if epoch == start_epoch else 0, batches):
                loss = toy.step(epoch, batch)
                log.write(f"{epoch} {batch} {struct.pack('>d', loss).hex()}\n")
                log.flush()
                last = batch == batches - 1
                if at_batch is not None:
                    at_batch(epoch * batches + batch)
                stopping = stop is not None and stop.requested
                if last and evaluate is not None:
                    evaluate()
                if persistence.should_save_checkpoint(batch) or last or stopping:
                    arguments = (*toy.six, epoch, batch, toy.metrics())
                    saved = persistence.save_checkpoint(
                        *arguments, extra=toy.extra(), wait=stopping
                    )
                    if last:
                        persistence.save_best_model(*arguments, extra=toy.extra())
                    if acknowledge is not None:
                        acknowledge(persistence.last_durable_id if async_save else saved)
                if stop is not None and stopping:
                    persistence.close()
                    raise SystemExit(stop.exit_code)
    persistence.close()
    return toy.fingerprint()


def read_losses(folder: Path) -> dict[tuple[int, int], set[str]]:
    """(epoch, batch) -> every loss, in hex, that any attempt logged for it."""
    losses: dict[tuple[int, int], set[str]] = {}
    for line in (folder / "losses.txt").read_text().splitlines():
        fields = line.split()
        if len(fields) == 3 and len(fields[2]) == 16:  # a kill may tear the last line
            losses.setdefault((int(fields[0]), int(fields[1])), set()).add(fields[2])
    return losses


# -- file systems ----------------------------------------------------------------------------------
class WatchedFS(FileSystem):
    """Counts operations and calls `before` and `after` around each one."""

    concurrent = False

    def __init__(self) -> None:
        self.log: list[str] = []

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Runs before an operation; may raise or kill."""

    def after(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Runs after an operation."""


def _watched(name: str) -> Callable[..., Any]:
    plain = getattr(FileSystem, name)

    def method(self: WatchedFS, *arguments: Any) -> Any:
        self.log.append(name)
        self.before(name, arguments)
        result = plain(self, *arguments)
        self.after(name, arguments, result)
        return result

    return method


for _name in OPERATIONS:
    setattr(WatchedFS, _name, _watched(_name))


class KillFS(WatchedFS):
    """SIGKILLs its own process at one mutating operation: before it, in the middle, or after it."""

    def __init__(self, number: int, phase: str) -> None:
        super().__init__()
        self.number, self.phase, self.count = number, phase, -1

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name not in MUTATING:
            return
        self.count += 1
        if self.count != self.number or self.phase == "after":
            return
        if self.phase == "middle" and name == "write":
            os.write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def after(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if name in MUTATING and self.count == self.number and self.phase == "after":
            os.kill(os.getpid(), signal.SIGKILL)


class FailingFS(WatchedFS):
    """Operation `number` raises `code` (or writes short), once or from then on."""

    def __init__(self, number: int, code: int | str, for_good: bool = False) -> None:
        super().__init__()
        self.number, self.code, self.for_good = number, code, for_good
        self.count, self.fired = -1, 0
        self.active = True

    def _due(self) -> bool:
        if not self.active:
            return False
        self.count += 1
        return self.count >= self.number if self.for_good else self.count == self.number

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.code == "short":
            return
        if self._due():
            self.fired += 1
            if name == "close":
                FileSystem.close(self, arguments[0])  # a failed close still closes
            raise OSError(self.code, os.strerror(int(self.code)), name)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        if self.code != "short":
            return _watched("write")(self, fd, data)
        self.log.append("write")
        if self._due():
            self.fired += 1
            return FileSystem.write(self, fd, bytes(data)[: max(1, len(data) // 3)])
        return FileSystem.write(self, fd, data)


ERRORS: dict[str, int | str] = {
    name: getattr(errno, name)
    for name in ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "ENOTCONN", "ETIMEDOUT")
}
ERRORS["short write"] = "short"


# -- helpers ---------------------------------------------------------------------------------------
def warm_up() -> None:
    """Do everything once, so that what torch imports lazily is not imported by every child."""
    with scratch() as folder:
        for bf16 in (False, True):
            train(folder / str(bf16), epochs=1, batches=2, save_every=1, bf16=bf16)
            train(folder / str(bf16), epochs=1, batches=3, save_every=1, bf16=bf16)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards; in memory where possible, as a thousand fsyncs are slow."""
    shm = Path("/dev/shm")
    place = shm if shm.is_dir() and os.access(shm, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_tree(source: Path, target: Path) -> None:
    """A copy that keeps hard links between files hard links."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    seen: dict[int, Path] = {}
    for path in sorted(source.rglob("*")):
        to = target / path.relative_to(source)
        if path.is_dir():
            to.mkdir()
            continue
        inode = path.stat().st_ino
        if inode in seen:
            os.link(seen[inode], to)
        else:
            shutil.copyfile(path, to)
            seen[inode] = to


def forked(
    action: Callable[[Callable[[str], None]], object], kill_after_s: float | None = None
) -> tuple[int, list[str]]:
    """Run `action(say)` in a forked child. Returns (wait status, lines it said).

    A positive status is an exit code; a negative one the signal that ended it. With `kill_after_s`
    the child is SIGKILLed after that time, wherever it is.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            if "tqdm" in sys.modules:
                # tqdm's own lock is shared between forks: one child killed while it held the lock
                # would stop all later ones. Processes started afresh share nothing.
                sys.modules["tqdm"].tqdm.set_lock(threading.RLock())

            def say(text: str) -> None:
                os.write(writer, (text + "\n").encode())

            action(say)
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
        except BaseException as e:  # noqa: BLE001 - the parent shows it
            os.write(writer, f"error {type(e).__name__}: {e}\n".encode())
        finally:
            os._exit(status)
    os.close(writer)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with open(reader, "rb") as pipe:  # noqa: PTH123 - a descriptor, not a path
        lines = pipe.read().decode().splitlines()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), lines


def temps(folder: Path) -> list[str]:
    """Temporary files anywhere below a run directory."""
    return [str(p) for p in folder.rglob("*.tmp")]


def share_of(items: list[Any], share: str, seed: int = 0) -> list[Any]:
    """`1/5` picks a fixed fifth of the items, spread over all of them."""
    part, whole = (int(n) for n in share.split("/"))
    if part == whole:
        return items
    picker = random.Random(seed)
    chosen = sorted(picker.sample(range(len(items)), max(1, len(items) * part // whole)))
    return [items[i] for i in chosen]


def arguments(description: str, **options: Any) -> argparse.Namespace:
    """`--share a/b` and the given options with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--share", default="1/1", help="part of the cases, e.g. 1/5")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def finish(figures: dict[str, Any], ok: bool) -> None:
    """Print the figures and end the script."""
    print(json.dumps({**figures, "ok": ok}))
    sys.exit(0 if ok else 1)


torch.set_num_threads(1)

__all__ = [
    "ERRORS",
    "MUTATING",
    "AtomicFile",
    "Bank",
    "FailingFS",
    "FileSystem",
    "KillFS",
    "ModelPersistence",
    "StopSignals",
    "Toy",
    "WatchedFS",
    "arguments",
    "copy_tree",
    "finish",
    "forked",
    "read_losses",
    "scratch",
    "share_of",
    "temps",
    "train",
    "warm_up",
]
