"""What the processes of one run share beside the batches: the state they start from, hypotheses.

`ranks` is how they talk; the first of them alone writes, and what stands in its place in the others
is here. It trains and scores nothing. `from distributed import share_state, shared_fitter`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from command_line import EXIT_ARGUMENTS, EXIT_MISSING, UserError
from dataset_arc import Task
from hypotheses import Fitter, Key, by_size
from model_persistence import ModelPersistence
from persistence.restoring import apply_state, collect_state
from ranks import Ranks
from rule_list import Explained
from run_log import MutedLog
from run_state import Run, checkpoint_extra, restore


def check_flags(args: argparse.Namespace, ranks: Ranks) -> None:
    """Refuse what several processes cannot do. Raises UserError."""
    if not ranks.many:
        return
    if not ranks.first:
        args.quiet = True
    why = None
    if args.qwen_cache_interval > 1:
        why = "--qwen_cache_interval above 1: each process would keep readings of its own"
    for name in ("prompt", "demonstrations"):
        if getattr(args, name) == "shuffled":
            why = f"--{name} shuffled: the other tasks of a batch may be another process's"
    if why is not None:
        raise UserError(f"{why}. Leave it out, or train in one process.", EXIT_ARGUMENTS)


def check_data(args: argparse.Namespace, ranks: Ranks) -> None:
    """Refuse data that is not the same in all processes. Raises UserError."""
    if not ranks.alike(args.data_sha256):
        raise UserError(
            f"--data {args.data}: not all processes found the same tasks there. Copy the same "
            "files to every machine.",
            EXIT_MISSING,
        )


def share_state(run: Run, over: bool = False) -> bool:
    """Every process takes the first one's state: modules, optimizers, position, random numbers, as
    a checkpoint has them. Returns the first one's `over`, whether nothing is left to train."""
    ranks = run.ranks
    if not ranks.many:
        return over
    state: dict[str, Any] = {}
    folder = None
    if ranks.first:
        state, folder = collect_state(run.saved_objects(), checkpoint_extra(run)), run.folder
    over, folder = ranks.of_first((over, folder))
    state = ranks.state_of_first(state)
    if not ranks.first:
        apply_state(state, run.saved_objects()._asdict(), "the first process")
        restore(run, {"extra": state["extra"]})
        run.log = MutedLog(cast(Path, folder))
    return over


class NothingSaved:
    """In place of a `ModelPersistence` in the processes that write nothing."""

    def should_save_checkpoint(self, batch: int) -> bool:
        return False

    def prepare(self, *objects: Any, extra: Any) -> None:
        pass

    def set_best_aside(self) -> None:
        return None


def nothing_saved() -> ModelPersistence:
    """What training is given where nothing is written; it asks no more of it."""
    return cast(ModelPersistence, NothingSaved())


class SharedFitter(Fitter):
    """A Fitter whose tasks are divided among the processes; `collect` gives all of them to each.

    What training asks for is fitted in the process that asks.
    """

    def __init__(
        self, tasks: Sequence[Task], n_workers: int, ranks: Ranks, known: bytes = b""
    ) -> None:
        self.ranks, self.of_all = ranks, [task.task_id for task in by_size(tasks)]
        self.n_kept = 0
        super().__init__(by_size(tasks)[ranks.rank :: ranks.world], n_workers, known, tasks)

    def collect(
        self, deadline: float | None = None, n_tasks: int | None = None, waiting: Any = None
    ) -> dict[Key, Explained]:
        """As Fitter's; every process has to call it. It ends where the first task is missing."""
        mine, collect = n_tasks, super().collect
        if n_tasks is not None:
            mine = len(range(self.ranks.rank, n_tasks, self.ranks.world))
        found: dict[Key, Explained] = {}
        for part, failed in self.ranks.gather_made(
            lambda: (collect(deadline, mine, waiting), self.failed)
        ):
            found |= part
            self.failed = self.failed or failed
        there = {task_id for task_id, _ in found}
        gap = next((i for i, task_id in enumerate(self.of_all) if task_id not in there), None)
        kept = set(self.of_all[:gap])
        self.n_kept = len(kept)
        return {key: found[key] for key in self._in_order(found) if key[0] in kept}

    def _in_order(self, found: dict[Key, Explained]) -> list[Key]:
        place = {task_id: i for i, task_id in enumerate(self.of_all)}
        return sorted(found, key=lambda key: (place[key[0]], key[1]))

    def n_first(self) -> int:
        """How many of the smallest tasks were collected."""
        return self.n_kept


def shared_fitter(
    tasks: Sequence[Task], n_workers: int, ranks: Ranks, known: bytes = b""
) -> Fitter:
    """Hypotheses of these tasks, without test outputs, made beside training; known: of a
    checkpoint."""
    if ranks.many:
        return SharedFitter(tasks, n_workers, ranks, known)
    return Fitter(tasks, n_workers, known)
