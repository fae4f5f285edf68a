"""SIGKILL the real training script in every batch of two epochs, resume it, and compare the end.

The child kills itself inside the chosen batch, after the optimizer has moved and before the loop
sees it; also inside the untrained, the validating and the final evaluation. The resumed run must
end in the state, and with the losses, of a run left alone: views, task-token dropout, policy noise
and all.
    python tests/faults/kill_each_batch.py --amp off
    python tests/faults/kill_each_batch.py --amp bf16
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import signal
import sys
from typing import Any

from harness import finish, forked, scratch
from kill_real_script import OPTIONS, final_state, judge, losses, tiny_data

N_TASKS = 32  # one task a batch: 32 batches an epoch, 64 in two
EVALUATIONS = (0, 1, 2, 3)  # untrained, after each epoch, final


def attempt(options: list[str], batch: int = -1, evaluation: int = -1) -> tuple[int, list[str]]:
    """One process; it kills itself in the given batch of the run, or in the given evaluation."""

    def run(say: Any) -> None:
        import run_scores
        import trainloop_complete_with_fixes as script

        step, evaluate, seen = script.train_step, run_scores.evaluate, [0]

        def deadly_step(run: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(run, *args, **kwargs)
            if run.progress.total == batch:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        def deadly_evaluation(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] - 1 == evaluation:
                os.kill(os.getpid(), signal.SIGKILL)
            return evaluate(*args, **kwargs)

        script.train_step, run_scores.evaluate = deadly_step, deadly_evaluation
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(script.main(options))

    return forked(run)


def run(amp: str = "off", every: int = 1) -> dict[str, Any]:
    """Kill at every `every`-th batch and in every evaluation; returns the figures."""
    import trainloop_complete_with_fixes as script

    figures: dict[str, Any] = {"amp": amp, "kills": 0, "equal": 0, "problems": []}
    with scratch() as root:
        data = root / "tasks.json"
        tiny_data(data, N_TASKS)
        options = [*OPTIONS.split(), "--max_batches", str(N_TASKS), "--save_every", "5"]
        options += ["--amp", amp, "--data", str(data), "--runs_dir"]
        with contextlib.redirect_stdout(io.StringIO()):  # imports, before the forks
            script.main([*options, str(root / "warm"), "--epochs", "1", "--max_batches", "2"])
        status, lines = attempt([*options, str(root / "reference")])
        if status != 0:
            figures["problems"].append(f"the uninterrupted run ended with {status}: {lines}")
            return figures
        wanted, wanted_losses = final_state(root / "reference"), losses(root / "reference")
        figures["batches"] = len(wanted_losses)
        work = root / "work"
        points = [{"batch": n} for n in range(0, len(wanted_losses), every)]
        points += [{"evaluation": n} for n in EVALUATIONS]
        for point in points:
            shutil.rmtree(work, ignore_errors=True)
            resuming = [*options, str(work), "--resume", "auto"]
            status, _ = attempt(resuming, **point)
            if status != -signal.SIGKILL:
                figures["problems"].append(f"{point}: not killed, ended with {status}")
                continue
            figures["kills"] += 1
            status, lines = attempt(resuming)
            if status != 0 and not any(work.glob("*/checkpoints/*.pt")):
                shutil.rmtree(work)  # killed before the first save: nothing was promised
                status, lines = attempt(resuming)
            judge(figures, str(point), status, lines, work, (wanted, wanted_losses))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--every", type=int, default=1, help="kill at every Nth batch")
    args = parser.parse_args()
    figures = run(args.amp, args.every)
    finish(figures, not figures["problems"] and figures["equal"] == figures["kills"])


if __name__ == "__main__":
    main()
