"""SIGKILL a training run at random instants, again and again, saving in the background.

After every kill the run resumes by itself; nothing that was acknowledged as durable may be lost,
and the run must end in the same state as one that was left alone.
    python tests/faults/kill_random.py --kills 1000
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from harness import arguments, finish, forked, read_losses, scratch, train, warm_up
from kill_points import manager


def run(kills: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Kill `kills` times in as many runs as that takes; returns the figures."""
    rng = random.Random(seed)
    figures: dict[str, Any] = {
        "kills": 0,
        "in_mid_write": 0,
        "runs": 0,
        "equal": 0,
        "lost": 0,
        "problems": [],
    }
    options: dict[str, Any] = {"epochs": 2, "batches": 40, "save_every": 1}
    warm_up()
    with scratch() as root:
        started = time.monotonic()
        status, lines = forked(lambda say: say(train(root / "reference", **options)))
        length_s = time.monotonic() - started
        wanted, losses = lines[-1], read_losses(root / "reference")
        assert status == 0, lines
        while figures["kills"] < kills:
            work = root / "work"
            shutil.rmtree(work, ignore_errors=True)
            newest = -1
            figures["runs"] += 1
            for number in range(200):
                last = number == 199 or figures["kills"] >= kills
                ours = {**options, "async_save": number % 3 != 0}

                def action(say: Any, work: Path = work, ours: dict[str, Any] = ours) -> None:
                    final = train(work, acknowledge=lambda i: say(f"ack {i}"), **ours)
                    say(final)

                wait_s = None if last else rng.uniform(0.0, length_s)
                status, lines = forked(action, wait_s)
                seen = [int(x.split()[1]) for x in lines if x.startswith("ack") and "None" not in x]
                newest = max([newest, *seen])
                if status != -signal.SIGKILL:
                    break
                figures["kills"] += 1
                figures["in_mid_write"] += any(work.rglob("*.tmp"))
                if not check_newest(work, newest):
                    figures["lost"] += 1
                    figures["problems"].append(f"checkpoint {newest} lost, kill {figures['kills']}")
            if status == 0 and lines[-1] == wanted and read_losses(work) == losses:
                figures["equal"] += 1
            else:
                figures["problems"].append(f"run {figures['runs']} ended differently: {lines[-1:]}")
    return figures


def check_newest(work: Path, newest: int) -> bool:
    if newest < 0:
        return True
    info = manager(work).get_resume_info()
    return info is not None and info["checkpoint_id"] >= newest


def main() -> None:
    args = arguments(__doc__ or "", kills=1000)
    figures = run(args.kills, args.seed)
    finish(figures, not figures["problems"])


if __name__ == "__main__":
    main()
