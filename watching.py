"""A run watched while it trains: what `health` is told of it, and what becomes of its findings.

Figures of a batch are those that its row has already; beside them this reads the clock, the
process's memory, the disk and the saves, and never the device. A finding is a line on the console
(with --quiet, too, unless it is a note) and a row in metrics.jsonl; the training does not depend on
it.
`from watching import timed, watch_batch, watch_epoch`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from health import ASKED, BY_CHOICE, RESTING, Finding, Setting, Storage
from model_persistence import ModelPersistence
from persistence.files import REAL_FS
from qwen_hybrid_prompt import NoGradient
from run_state import LINE_EVERY, Clock, Run

T = TypeVar("T")

SILENT: dict[NoGradient | None, float] = {
    None: ASKED,
    NoGradient.REUSED: RESTING,
    NoGradient.FROZEN: BY_CHOICE,
    NoGradient.NOT_RUN: BY_CHOICE,
}


def timed(clock: Clock, items: Iterable[T]) -> Iterator[T]:
    """The items; what is waited for each is added to `clock.wait_s`."""
    waiting = iter(items)
    while True:
        begun = time.monotonic()
        try:
            item = next(waiting)
        except StopIteration:
            return
        clock.wait_s += time.monotonic() - begun
        yield item


def watch_batch(run: Run, persistence: ModelPersistence, figures: dict[str, float]) -> None:
    """Take the batch that was just recorded; at a batch line, or where it is not finite, look."""

    def found() -> list[Finding]:
        clock, health, now = run.clock, run.health, time.monotonic()
        took, waited = now - run.watched[0], clock.wait_s - run.watched[1]
        run.watched = now, clock.wait_s
        # Before the first batch of an epoch, or of a process, there is more than a wait.
        known = run.progress.batch > 0 and run.progress.total > run.resumed_at
        at_once = health.see(
            figures,
            SILENT[None if figures["qwen_grad"] else run.system.qwen.without_gradient()],
            waited=min(1.0, waited / max(took, 1e-9)) if known else None,
            resident=resident_bytes(),
        )
        if at_once or run.progress.batch % LINE_EVERY == 0:
            return health.look(setting_of(run), storage_of(run, persistence))
        return []

    tell(run, found)


def watch_epoch(run: Run, persistence: ModelPersistence, row: dict[str, Any]) -> None:
    """Take the epoch's row, validation included, and look."""

    def found() -> list[Finding]:
        run.health.close_epoch(row)
        return run.health.look(setting_of(run), storage_of(run, persistence))

    tell(run, found)


def tell(run: Run, look: Callable[[], list[Finding]]) -> None:
    """Look, say each finding and record it at the batch that the run is at. A look that fails is
    the last of this process: no training ends by being watched."""
    if not run.ranks.first or run.health.failed:
        return
    try:
        findings = look()
    except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
        run.health.failed = True
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        run.log.warn(f"warning: Health: looks no more ({why}); training goes on")
        return
    progress = run.progress
    for finding in findings:
        run.log.say(finding.line(), important=finding.level != "note")
        run.log.record(
            {
                "kind": "health",
                "epoch": progress.epoch,
                "batch": progress.batch,
                "batches_done": progress.total,
                "minutes": (time.monotonic() - run.started) / 60,
                **vars(finding),
            }
        )


def setting_of(run: Run) -> Setting:
    """What the checks have to know of this run."""
    args = run.args
    return Setting(
        n_tasks=len(run.stream.tasks),
        refines=args.policy != "off",
        proposes=run.stream.proposals is not None,
        memory=run.system.solver2.use_memory,
        scaling=run.scaler.is_enabled(),
        clip=args.clip,
    )


def storage_of(run: Run, persistence: ModelPersistence) -> Storage:
    """The run's disk, its newest checkpoint, and how its saves and their copies are doing."""
    free, size = None, 0
    with contextlib.suppress(OSError):
        free = REAL_FS.free_bytes(run.folder)
    with contextlib.suppress(OSError):
        files = [path.stat() for path in persistence.checkpoints_dir.glob("checkpoint_*.pt")]
        size = max(files, key=lambda stat: stat.st_mtime).st_size if files else 0
    drive, n_files = persistence.drive_state()
    return Storage(free, size, persistence.skipped_saves, persistence.failed_saves, drive, n_files)


def resident_bytes() -> int | None:
    """The process's memory; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
