"""What a run is: its parts, where it stands, what a checkpoint holds of it, and how it is saved.

The script makes one `Run` and hands it from function to function; `Run.state` lists what is written
beside the six objects of a checkpoint, and `restore` reads the same list. It trains nothing, scores
nothing and parses no flags. `from run_state import Run, save, restore`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import platform
import shlex
import time
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arc_system import System
from batches import Collator, TrainingStream
from command_line import (
    EXIT_MISSING,
    EXIT_UNEXPECTED,
    MOST_AT_ONCE,
    UserError,
    cores,
    device_name,
    git,
)
from curriculum import DynamicMemoryThreshold, GradientMonitor, Schedule, SizeWarmupCurriculum
from dataset_arc import TaskSet
from health import Health
from hypotheses import Fitter
from loss_function import PARTS
from model_persistence import (
    ModelPersistence,
    PersistenceError,
    RunLock,
    StopSignals,
    capture_rng_state,
    restore_rng_state,
)
from optimizers import MuonAdamW, WeightAverage
from persistence.checkpoint_file import SixObjects
from persistence.files import read_json, version_of_package
from ranks import ALONE, Ranks
from resume_rules import APPLIED, BY_EFFECT, FREE, SAME, VERDICT, plain, with_meaning
from reward_shaping import REWARD_WEIGHTS
from run_log import RunLog
from trained_model import describe

Place = tuple[int, int, int]  # epoch, next batch of it, batches done in the run

LINE_EVERY = 50  # batches between two batch lines, and two looks of the health monitor

# Names in metrics.jsonl, each explained in docs/METRICS.md.
REWARD_FIGURES = tuple(REWARD_WEIGHTS)  # d_acc, d_size, d_color, d_rev
EFE_FIGURES = tuple(f"efe_{part}" for part in PARTS)
POLICY_FIGURES = {  # the policy's own name for a figure -> ours
    "approx_kl": "policy_kl",
    "clip_fraction": "policy_clip_frac",
    "explained_variance": "policy_explained_variance",
    "entropy": "policy_entropy",
    "action_std": "policy_std",
    "value_loss": "policy_value_loss",
    "grad_norm": "policy_grad",
    "skipped": "policy_skipped",
}
GRADIENT_FIGURES = {  # our name -> the parts of `System.trained_parts` whose gradients it measures
    "agent_grad": ("agent",),
    "memory_grad": ("solver2", "task_tokens"),
    "refinement_grad": ("refinement",),
    "qwen_heads_grad": ("qwen_heads",),
}
SUMS = (
    "loss", "reward", "qwen_grad", "mask_ratio", "accuracy", "exact", "efe", *REWARD_FIGURES,
    *EFE_FIGURES,
)  # fmt: skip
# What results.json holds of a validation.
VALIDATED = ("n", "exact_at_1", "size_accuracy", "cell_accuracy")


class StopRequested(Exception):
    """A signal came while an evaluation was running; nothing of the training state is half done."""

    shared = True  # where one process raises it, all do


@dataclass
class Progress:
    """Where the run is. Fresh and resumed runs declare the same fields; all go into checkpoints."""

    epoch: int = 0
    batch: int = 0  # next batch of the epoch
    total: int = 0  # batches done in the run
    skipped: int = 0  # non-finite batches
    skipped_in_a_row: int = 0
    memory_updates: int = 0  # of this epoch
    untrained_accuracy: float = -1.0  # validation cell accuracy before training; -1 = not measured
    untrained: dict[str, float] = field(default_factory=dict)  # that validation's counts, one view
    validated: dict[str, float] = field(default_factory=dict)  # those of the last epoch's
    best: float = float("-inf")
    last_epoch: int = 0  # of the last batch done
    last_batch: int = -1
    spent_budget: float = 0.0  # the --time_budget in minutes that ended training; 0 = none did
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))
    counted: int = 0

    def add(self, figures: dict[str, float]) -> None:
        """Take a batch into the epoch's means, unless one of its figures is not finite."""
        if all(math.isfinite(figures[name]) for name in SUMS):
            for name in SUMS:
                self.sums[name] += figures[name]
            self.counted += 1

    def means(self) -> dict[str, float]:
        """Of the epoch so far, over the batches that counted."""
        return {name: value / max(1, self.counted) for name, value in self.sums.items()}

    def next_epoch(self) -> None:
        """On to the first batch of the next epoch, with counts and sums of its own."""
        self.epoch += 1
        self.batch = 0
        self.memory_updates = 0
        self.sums = dict.fromkeys(SUMS, 0.0)
        self.counted = 0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError without a position in the data; what else an older version did not keep
        stays as it is."""
        for name in self.__dataclass_fields__:
            if name in state or name in ("epoch", "batch", "total"):
                setattr(self, name, state[name])
        self.sums = dict.fromkeys(SUMS, 0.0) | self.sums  # an older version summed fewer


RECENT = ("loss", "reward", "d_acc", "exact")


@dataclass
class Recent:
    """The last batches of this process, for a moving average; not saved."""

    rows: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=LINE_EVERY))

    def add(self, figures: dict[str, float]) -> None:
        """Take a batch, unless a figure is not finite."""
        if all(math.isfinite(figures[name]) for name in RECENT):
            self.rows.append({name: figures[name] for name in RECENT})

    def means(self) -> dict[str, float]:
        """Over the batches held; empty where there are none."""
        n = len(self.rows)
        return {name: sum(row[name] for row in self.rows) / n for name in RECENT if n}


@dataclass
class Clock:
    """Seconds spent, over all processes of the run. Saved, but no part of the training state."""

    elapsed_s: float = 0.0
    epoch_s: float = 0.0
    train_s: float = 0.0  # of the epochs before
    query_s: float = 0.0  # of evaluation, per query and view, where one batch is made at a time
    wait_s: float = 0.0  # of training, for the next batch

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)


@dataclass
class Run:
    """Everything the loop holds, made once when it is set up."""

    args: argparse.Namespace
    device: str
    dtype: torch.dtype | None  # of autocast; None: it is off
    system: System
    optimizer: MuonAdamW
    scaler: torch.amp.GradScaler
    average: WeightAverage
    stream: TrainingStream
    collator: Collator  # of evaluation: keeps the analyses of the identity view
    schedule: Schedule
    progress: Progress
    curriculum: SizeWarmupCurriculum
    threshold: DynamicMemoryThreshold
    monitor: GradientMonitor
    log: RunLog
    clock: Clock
    started: float  # time.monotonic() of the process's start
    at_once: int = 1  # batches that an evaluation may answer at a time, each in a thread
    ranks: Ranks = ALONE  # the processes that train it together
    recent: Recent = field(default_factory=Recent)
    train_started: float = 0.0  # time.monotonic() of this process's first batch
    resumed_at: int = 0  # batches that were done before this process
    stop: StopSignals | None = None  # while they are caught
    fitter: Fitter | None = None  # hypotheses of the final evaluation's tasks, made beside training
    kept_hypotheses: bytes = b""  # of the checkpoint that was resumed, for the fitter
    # What is known to be saved: the state of each checkpoint, by its id, and the resumed one.
    promised: dict[int, Place] = field(default_factory=dict)
    resumed_from: Place | None = None
    # Of the newest save: where it was, its metrics, and the metric of a best_model.pt that failed.
    last_save: tuple[Place, dict[str, float]] | None = None
    owed_best: str | None = None
    health: Health = field(default_factory=Health)
    watched: tuple[float, float] = (0.0, 0.0)  # time.monotonic(), clock.wait_s at the last batch

    @property
    def folder(self) -> Path:
        """The run's own; a run that is only set up (--dry_run) has none."""
        assert self.log.folder is not None
        return self.log.folder

    def autocast(self) -> torch.autocast:
        """The context of a forward pass: mixed precision where it is on."""
        kind = self.device.split(":")[0]
        return torch.autocast(kind, dtype=self.dtype, enabled=self.dtype is not None)

    def free_threads(self) -> int:
        """How many batches an evaluation is to answer at a time now: hypotheses keep their cores,
        those that are no evaluation's first."""
        busy = 0 if self.fitter is None else self.fitter.n_busy
        free = self.at_once - max(0, busy - max(0, cores() - self.at_once))
        return max(1, min(free, MOST_AT_ONCE))

    def stopping(self) -> bool:
        """Whether a signal has come, to this process or another one: all learn of it here."""
        if self.stop is None:
            return False
        if signum := self.ranks.highest(self.stop.signum or 0):
            self.stop.learn(signum)
        return self.stop.requested

    def place(self) -> Place:
        """Which state a checkpoint made now holds."""
        return self.progress.epoch, self.progress.batch, self.progress.total

    def saved_objects(self) -> SixObjects:
        """The six that ModelPersistence takes, by name."""
        return SixObjects(**self.system.modules(), optimizer=self.optimizer)

    def state(self) -> dict[str, Any]:
        """What changes while training, beside the six objects: saved and put back alike."""
        return {
            "scaler": self.scaler,
            "policy_optimizer": self.system.policy_rl.optimizer,
            "choice_optimizer": self.system.policy_rl.proposals.optimizer,
            "average": self.average,
            "schedule": self.schedule,
            "progress": self.progress,
            "curriculum": self.curriculum,
            "threshold": self.threshold,
            "monitor": self.monitor,
            "clock": self.clock,
        }


# ---------------------------------------------------------------------------------------------
# How far a run is
# ---------------------------------------------------------------------------------------------


def done_by_schedule(run: Run) -> bool:
    """Whether the learning rate has reached its end, or the batch at which to end before."""
    ends = (run.schedule.stop_at, run.schedule.end_at)
    return any(end is not None and run.progress.total >= end for end in ends)


def budget_spent(run: Run) -> bool:
    """Whether this --time_budget, or a larger one, has ended training."""
    budget = run.args.time_budget
    return budget is not None and run.progress.spent_budget >= budget


def is_over(run: Run) -> bool:
    """Whether no batch may follow, however many epochs are left."""
    return done_by_schedule(run) or budget_spent(run)


def is_finished(run: Run) -> bool:
    """Whether all that is to be trained has been, by what the checkpoint says."""
    return run.progress.batch == 0 and (is_over(run) or run.progress.epoch >= run.args.epochs)


# ---------------------------------------------------------------------------------------------
# Its folder
# ---------------------------------------------------------------------------------------------


def new_run_folder(runs_dir: Path) -> Path:
    """runs/arc_complete_YYYYMMDD_HHMMSS, made here; a second one in the same second gets _1."""
    stamp = time.strftime("arc_complete_%Y%m%d_%H%M%S")
    for suffix in ("", *(f"_{i}" for i in range(1, 100))):
        folder = runs_dir / (stamp + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"cannot make a run folder in {runs_dir}: {error.strerror}. Choose another place "
                "with --runs_dir.",
                EXIT_MISSING,
            ) from error
        return folder
    raise UserError(f"100 runs in {runs_dir} within one second", EXIT_UNEXPECTED)


def hold(folder: Path) -> RunLock:
    """The run's lock, taken.

    Raises UserError where nothing could be saved, LockedError if another process holds it.
    """
    why = "" if os.access(folder, os.W_OK) else "it is read-only, or someone else's"
    try:
        if not why:
            return RunLock(folder).acquire()
    except OSError as error:
        why = error.strerror or str(error)
    raise UserError(
        f"nothing can be saved in {folder}: {why}. Make it writable, or copy the run to another "
        "place and resume it there.",
        EXIT_MISSING,
    )


def full_config(run: Run, tasks: TaskSet) -> dict[str, Any]:
    """config.json: arguments, model, versions, commit, device, data; and what was typed, a line for
    each time that the run was started or resumed."""
    before = None
    with contextlib.suppress(OSError):
        before = read_json(run.folder / "config.json")
    typed = before.get("commands") if isinstance(before, dict) else None
    given = {k: v for k, v in vars(run.args).items() if k not in ("notes", "command")}
    return {
        "commands": [*(typed if isinstance(typed, list) else []), shlex.join(run.args.command)],
        "arguments": given,
        "threads": max(torch.get_num_threads(), run.at_once),
        "system": dataclasses.asdict(run.system.config),
        "data": {"name": tasks.name, "sha256": tasks.sha256, "tasks": len(tasks.train)},
        "task_ids": [task.task_id for task in tasks.train],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version_of_package("transformers"),
            "numpy": np.__version__,
        },
        "commit": commit_hash(),
        "device": device_name(run.device, run.at_once),
    }


@lru_cache
def commit_hash() -> str | None:
    """The project's commit, for config.json; None outside a git checkout."""
    return git("rev-parse", "HEAD")


# ---------------------------------------------------------------------------------------------
# What a checkpoint holds
# ---------------------------------------------------------------------------------------------


def checkpoint_extra(run: Run) -> dict[str, Any]:
    """All that a checkpoint holds beside the six objects: `Run.state`, the settings and what the
    arithmetic depends on, which model it is, Qwen's kept readings, what is known to be wrong, the
    hypotheses fitted so far, and the random state."""
    run.clock.elapsed_s = time.monotonic() - run.started
    extra = {name: part.state_dict() for name, part in run.state().items()}
    extra["config"] = run_config(run)
    extra["flags"] = other_flags(run)
    extra["in_use"] = in_use(run)
    extra |= describe(run.system, run.average, run.stream.task_table)
    extra["qwen_cache"] = run.system.qwen.cache_state()
    extra["health"] = run.health.state_dict()
    kept = run.kept_hypotheses if run.fitter is None else run.fitter.kept()
    if kept:
        extra["hypotheses"] = torch.frombuffer(bytearray(kept), dtype=torch.uint8)
    extra["rng"] = capture_rng_state()
    return extra


def run_config(run: Run) -> dict[str, Any]:
    """The settings that a run's training and figures depend on."""
    names = [name for name in with_meaning(SAME, APPLIED, VERDICT) if name not in BY_EFFECT]
    flags = {name: plain(getattr(run.args, name)) for name in names}
    return {**flags, "data_sha256": run.args.data_sha256}


def other_flags(run: Run) -> dict[str, Any]:
    """The flags on which no training depends, so that a checkpoint knows all of them."""
    return {name: plain(getattr(run.args, name)) for name in (*with_meaning(FREE), *BY_EFFECT)}


def in_use(run: Run) -> dict[str, str | None]:
    """What the arithmetic depends on beside the libraries, in words."""
    device = torch.device(run.device)
    return {
        "precision": str(run.dtype or torch.float32).removeprefix("torch."),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "program": (commit_hash() or "")[:12] or None,
        "processes": str(run.ranks.world),
    }


def restore(run: Run, metadata: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Put back everything `save` wrote beside modules and optimizer; random state last.

    Returns what of the random state could not be put back, and what the file lacks and so starts
    afresh. Raises UserError where it does not say how far training was.
    """
    extra, fresh = metadata["extra"], []
    parts = {name: part.load_state_dict for name, part in run.state().items()}
    before = {name: part.state_dict() for name, part in run.state().items()}
    for name, load in {**parts, "qwen_cache": run.system.qwen.load_cache_state}.items():
        if name not in extra:
            fresh.append(f"the checkpoint lacks '{name}': a fresh one is used")
        elif name == "scaler" and run.scaler.is_enabled() and not extra[name]:
            continue  # saved without loss scaling: a fresh one is all there can be
        else:
            try:
                load(extra[name])
                continue
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
                why = f"{type(e).__name__}: {e}"
            if name in before:
                parts[name](before[name])
            fresh.append(
                f"'{name}' of the checkpoint is not this version's ({why}): a fresh one is used"
            )
        if name == "average":  # of weights that are loaded already
            run.average = WeightAverage(run.average.params, run.average.decay)
        if name == "progress":
            raise unknown_position(metadata)
    run.progress.skipped_in_a_row = 0  # the next ones decide anew
    run.health.load_state_dict(extra.get("health", {}))
    if isinstance(extra.get("hypotheses"), torch.Tensor):
        run.kept_hypotheses = extra["hypotheses"].to("cpu", torch.uint8).numpy().tobytes()
    run.started = time.monotonic() - run.clock.elapsed_s
    try:
        missing = restore_rng_state(extra["rng"])
    except KeyError:
        missing = ["the checkpoint lacks 'rng': random numbers are not those of the run"]
    except PersistenceError as error:
        missing = [str(error)]
    return missing, fresh


def unknown_position(metadata: dict[str, Any]) -> UserError:
    """The error of a checkpoint that says of no batch that it is the next one."""
    return UserError(
        f"{metadata.get('path', 'the checkpoint')}: it does not say how far training was "
        "('progress' is missing or not this version's), so another program wrote it. Resume with "
        "that one, from another checkpoint with --checkpoint N, or start a new run.",
        EXIT_MISSING,
    )


# ---------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------


def save(
    run: Run,
    persistence: ModelPersistence,
    *,
    best_of: str | None = None,
    wait: bool = False,
    metrics: dict[str, float] | None = None,
) -> None:
    """Write a checkpoint (and best_model.pt, if `best_of` names the metric that rose). A disk that
    refuses is said; training goes on. Of several processes the first alone saves.

    wait: until it is on the disk; for saves that must not be skipped.
    """
    if not run.ranks.first:
        return
    progress = run.progress
    extra = checkpoint_extra(run)
    where: dict[str, Any] = {"epoch": progress.last_epoch, "batch": progress.last_batch}
    where["metrics"] = metrics or {}
    saved = persistence.save_checkpoint(*run.saved_objects(), **where, extra=extra, wait=wait)
    if saved is not None:
        run.promised[saved] = run.place()
    run.last_save = (run.place(), where["metrics"])
    run.owed_best = None
    if best_of is not None:
        save_best(run, persistence, best_of, where, extra)
    run.log.flush()  # where room was made for the checkpoint, what had to wait may fit, too


def save_best(
    run: Run,
    persistence: ModelPersistence,
    metric: str,
    where: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    """best_model.pt of the state just saved or loaded; the record rises once it is there."""
    six = run.saved_objects()
    persistence.save_best_model(*six, **where, metric_name=metric, extra=extra)
    persistence.flush()
    if best_on_disk(persistence, metric) == where["metrics"][metric]:
        run.progress.best = where["metrics"][metric]
    else:
        run.owed_best = metric


def best_on_disk(persistence: ModelPersistence, metric: str) -> float:
    """What best_model.pt has in a metric; minus infinity without one."""
    try:
        value = persistence.best_value(metric)
    except OSError:
        value = None
    return float("-inf") if value is None else value


def settle_best(run: Run, persistence: ModelPersistence) -> None:
    """After a resume the record is what best_model.pt holds, in this run's metric.

    One that a kill or the disk prevented is written now if the loaded state is the one, else at the
    end of the next epoch.
    """
    metric, progress = run.args.best_metric, run.progress
    record, progress.best = progress.best, best_on_disk(persistence, metric)
    has = f"has {progress.best:+.4f}" if math.isfinite(progress.best) else "is not there"
    if persistence.best_metric not in (None, metric):
        record = float("-inf")  # in another metric
        run.log.say(
            f"best_model.pt was chosen by {persistence.best_metric}; from now on by {metric}, and "
            "what it has of that is the record",
            important=True,
        )
    loaded = persistence.loaded
    value = loaded["metrics"].get(metric)
    if isinstance(value, float) and value > progress.best:
        where = {name: loaded[name] for name in ("epoch", "batch", "metrics")}
        save_best(run, persistence, metric, where, checkpoint_extra(run))
    if progress.best < record:
        run.log.say(
            f"best_model.pt {has}, the record of {metric} was {record:+.4f}: the next epoch's "
            "model takes its place if it has more, though it be below the record",
            important=True,
        )


def on_disk(run: Run, persistence: ModelPersistence) -> Place | None:
    """The newest `Run.place` that is durable, None if there is none. The writer must be done."""
    newest = persistence.last_durable_id
    return run.resumed_from if newest is None else run.promised.get(newest, run.resumed_from)


def save_last(run: Run, persistence: ModelPersistence) -> None:
    """The last save of a process, with what the newest one at this place was to hold."""
    persistence.ending = True
    again = run.last_save is not None and run.last_save[0] == run.place()
    metrics = run.last_save[1] if run.last_save is not None and again else None
    save(run, persistence, best_of=run.owed_best if again else None, wait=True, metrics=metrics)


def finish_saving(run: Run, persistence: ModelPersistence) -> None:
    """At the end of a run, try once more what the disk has refused so far."""
    persistence.flush()
    if on_disk(run, persistence) != run.place() or run.owed_best is not None:
        save_last(run, persistence)
    run.log.flush()
