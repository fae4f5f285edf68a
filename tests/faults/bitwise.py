"""Kill at every batch of two epochs, resume, and compare the end with an uninterrupted run.

The sha256 of the whole final state and every per-batch loss must be equal: fp32 and bf16, random
augmentation, dropout and shuffle on. Also five kills in one run, kills in an evaluation and in a
save, and the number of files read by a resume at batch 10 and at batch 3,000.
    python tests/faults/bitwise.py --batches 32
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import (
    KillFS,
    arguments,
    finish,
    forked,
    read_losses,
    scratch,
    share_of,
    train,
    warm_up,
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def attempt(folder: Path, options: dict[str, Any]) -> tuple[int, str]:
    """One process: from where it is to the end. Returns (status, final sha256)."""
    status, lines = forked(lambda say: say(train(folder, **options)))
    return status, lines[-1] if lines else ""


def at(step: int) -> Callable[[int], None]:
    return lambda here: die() if here == step else None


def plans(steps: int, share: str, seed: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, options of the attempts that are killed, in order)."""
    rng = random.Random(seed)
    found: list[tuple[str, list[dict[str, Any]]]]
    found = [(f"batch {s}", [{"at_batch": at(s)}]) for s in range(steps)]
    found = share_of(found, share, seed)
    for _ in range(2):
        kills = sorted(rng.sample(range(steps), 5))
        found.append((f"5 kills {kills}", [{"at_batch": at(s)} for s in kills]))
    found.append(("evaluation", [{"evaluate": die}]))
    for number in (0, 7, 31, 45):
        found.append((f"save, operation {number}", [{"fs": KillFS(number, "before")}]))
    return found


def run(batches: int = 32, share: str = "1/1", seed: int = 0) -> dict[str, Any]:
    """Kill, resume, compare; returns the figures."""
    figures: dict[str, Any] = {"runs": 0, "killed": 0, "equal": 0, "problems": []}
    warm_up()
    with scratch() as root:
        for bf16 in (False, True):
            options: dict[str, Any] = {"epochs": 2, "batches": batches, "save_every": 5}
            options["bf16"] = bf16
            reference = root / f"reference-{bf16}"
            status, wanted = attempt(reference, options)
            assert status == 0, wanted
            losses = read_losses(reference)
            for number, (name, kills) in enumerate(plans(2 * batches, share, seed + bf16)):
                work = root / "work"
                shutil.rmtree(work, ignore_errors=True)
                # Every other run saves in the background, as the trainer does.
                ours = {**options, "async_save": number % 2 == 1 and "fs" not in kills[0]}
                for kill in kills:
                    status, _ = attempt(work, {**ours, **kill})
                    figures["killed"] += status == -signal.SIGKILL
                status, final = attempt(work, ours)
                figures["runs"] += 1
                if status != 0 or final != wanted:
                    figures["problems"].append(f"bf16={bf16} {name}: {status} {final[:80]}")
                elif read_losses(work) != losses:
                    figures["problems"].append(f"bf16={bf16} {name}: losses differ")
                else:
                    figures["equal"] += 1
    return figures


def main() -> None:
    args = arguments(__doc__ or "", batches=32)
    figures = run(args.batches, args.share, args.seed)
    finish(figures, not figures["problems"])


if __name__ == "__main__":
    main()
