"""What each flag of the trainer means on a resume: one table, and what follows from it.

A resume takes the flags that are not given from the run itself and compares the settings that count
before anything is loaded. Needs the standard library alone; reads and prints nothing.
`from resume_rules import RULES, compare`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SAME = "same"  # refused if changed, unless --allow_mismatch
APPLIED = "applied"  # may change and takes effect: from here on another training than it was
VERDICT = "verdict"  # may change; training goes on alike, but what is measured or computed differs
FREE = "free"  # may change; nothing of the training depends on it
PROCESS = "process"  # of this process alone, never taken from the run

RULES = {
    # run
    "epochs": FREE,
    "time_budget": APPLIED,
    "max_batches": APPLIED,
    "device": PROCESS,
    "seed": SAME,
    "resume": PROCESS,
    "checkpoint": PROCESS,
    "config": PROCESS,
    "allow_mismatch": PROCESS,
    "threads": PROCESS,
    "dry_run": PROCESS,
    "quiet": PROCESS,
    # data
    "data": SAME,
    "strict": FREE,
    "batch_size": SAME,
    "batch_cells": SAME,
    "grad_accum": SAME,
    "max_side": SAME,
    "cost_power": SAME,
    "max_context": SAME,
    "views": SAME,
    # model
    "qwen_model": SAME,
    "qwen_train": SAME,
    "qwen_cache_interval": SAME,
    "offline": PROCESS,
    "width": SAME,
    "blocks": SAME,
    # optimisation
    "agent_lr": APPLIED,
    "qwen_lr": APPLIED,
    "task_lr_factor": APPLIED,
    "optimizer": SAME,
    "weight_decay": APPLIED,
    "warmup_batches": SAME,
    "schedule": SAME,
    "schedule_batches": SAME,
    "decay_frac": SAME,
    "draw_steps": SAME,
    "clip": APPLIED,
    "ema": SAME,
    "amp": VERDICT,
    # saving and reporting
    "runs_dir": PROCESS,
    "save_every": FREE,
    "max_checkpoints": FREE,
    "best_metric": VERDICT,
    "drive_backup": FREE,
    "drive_wait": PROCESS,
    "report_to": FREE,
    # evaluation
    "eval_views": FREE,
    "vote_batches": FREE,
    "val_pairs": VERDICT,
    "hypotheses": SAME,
    "acceptance": FREE,
    "hold_out": SAME,
    "hypothesis_tasks": FREE,
    "stop_confidence": VERDICT,
    # ablations
    "demonstrations": SAME,
    "prompt": SAME,
    "policy": SAME,
    "no_memory": SAME,
    "no_task_tokens": SAME,
    "no_efe_extras": SAME,
    "no_hard_cells": SAME,
    "no_reward": SAME,
    "planning_steps": SAME,
}
# The same data may have another path, the same precision another word: what they do is compared.
BY_EFFECT = ("data", "amp")
# The final evaluation alone depends on these.
OF_THE_VOTE = ("eval_views", "vote_batches", "acceptance", "hypothesis_tasks")


# What every run did before there was the flag, where that is not the default of today.
BEFORE_THE_FLAG: Mapping[str, Any] = {"draw_steps": "off", "batch_cells": None}

# By what name a user gives a flag, where runs record it under another one.
GIVEN_AS = {"views": "augment"}


def as_flags(names: Iterable[str]) -> str:
    """The flags of these names, for a message."""
    return ", ".join(f"--{GIVEN_AS.get(name, name)}" for name in names)


def with_meaning(*meanings: str) -> tuple[str, ...]:
    """The flags that mean one of these on a resume, in the order of the table."""
    return tuple(name for name, meaning in RULES.items() if meaning in meanings)


def plain(value: Any) -> Any:
    """A flag's value as it is saved and compared: A:B for several numbers, None for nothing."""
    if isinstance(value, list | tuple):
        return ":".join(map(str, value))
    return None if value == "" else value


@dataclass
class Changes:
    """How a run's settings differ from the saved ones, a line each: `--width: saved 48, now 96`."""

    refused: list[str] = field(default_factory=list)
    applied: list[str] = field(default_factory=list)
    noticed: list[str] = field(default_factory=list)
    # Flags that the checkpoint does not record: those that had to stay the same, and others.
    unknown: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The saved settings (`settings_of`) beside the present ones.

    Beside flags, `data_sha256` is compared (as --data) and `in_use`, a mapping of what the
    arithmetic depends on, under its own words.
    """
    changes = Changes()
    lists = {SAME: changes.refused, APPLIED: changes.applied, VERDICT: changes.noticed}
    for name, meaning in RULES.items():
        if meaning not in lists or name in BY_EFFECT or name not in now:
            continue
        if name not in saved:
            (changes.unknown if meaning == SAME else changes.unrecorded).append(as_flags([name]))
            continue
        before, after = plain(saved[name]), plain(now[name])
        if before != after:
            flag = as_flags([name])
            lists[meaning].append(f"{flag}: saved {shown(before)}, now {shown(after)}")
    if "data_sha256" not in saved:
        changes.unknown.append("--data")
    elif saved["data_sha256"] != now["data_sha256"]:
        before, after = (
            f"{shown(plain(c.get('data')))} (sha256 {str(c['data_sha256'])[:8]})"
            for c in (saved, now)
        )
        changes.refused.append(f"--data: saved {before}, now {after}")
    used = saved.get("in_use")
    for name, after in now.get("in_use", {}).items():
        if not isinstance(used, Mapping) or name not in used:
            changes.unrecorded.append(name)
        elif used[name] != after:
            changes.noticed.append(f"{name}: saved {shown(used[name])}, now {shown(after)}")
    return changes


def shown(value: Any) -> str:
    """A value for a message."""
    return "none" if value is None else str(value)


def settings_of(extra: Any) -> dict[str, Any]:
    """The flags that a checkpoint's `extra` records, and where they are missing, what it says of
    its model; an empty dict where neither is there."""
    found: dict[str, Any] = {}
    if not isinstance(extra, Mapping):
        return found
    system = extra.get("system")
    if isinstance(system, Mapping):
        for name in RULES:
            if name in system:
                found[name] = system[name]
            elif name.startswith("no_") and isinstance(system.get(name[3:]), bool):
                found[name] = not system[name[3:]]
    for part in ("flags", "config"):
        if isinstance(extra.get(part), Mapping):
            found |= extra[part]
    if isinstance(extra.get("config"), Mapping):
        found = {**BEFORE_THE_FLAG, **found}
    if found.get("qwen_train") == "auto" and isinstance(system, Mapping):
        found["qwen_train"] = system.get("qwen_train", "auto")  # the mode that was really used
    return found


def from_saved(action: argparse.Action, value: Any) -> Any:
    """A saved value as the flag's own parser makes it. ValueError for one it would refuse."""
    value = plain(value)
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")
        return value
    if value is None:
        if action.default is not None:
            raise ValueError("it is missing")
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is no value of a flag")
    if action.type is None and not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    try:
        made = action.type(str(value)) if callable(action.type) else value
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        raise ValueError(str(error)) from error
    if action.choices is not None and made not in action.choices:
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, action.choices))}")
    return made
