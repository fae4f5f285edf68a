"""Time from a resume to the end of its first batch, for runs that stopped at batch 10 and 3,000.

Order and views are functions of (seed, epoch, position), so nothing is replayed and both take the
same time (CPU time, as machines are shared). The real training script's own set-up, save, resume
and step are used, on tasks of equal size, so that the batches themselves cost the same; the two are
measured in turn, medians compared.
    python benchmarks/bench_resume_position.py
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import settle_threads

POSITIONS = (10, 3000)


def uniform_tasks(path: Path, tasks: int = 200, side: int = 6) -> None:
    """Tasks whose grids all have the same size, in the public JSON form."""
    rng = random.Random(0)

    def pair() -> dict[str, Any]:
        grid = [[rng.randint(0, 9) for _ in range(side)] for _ in range(side)]
        return {"input": grid, "output": [row[::-1] for row in grid]}

    data = {
        f"{n:08x}": {"train": [pair() for _ in range(4)], "test": [pair()]} for n in range(tasks)
    }
    path.write_text(json.dumps(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args().repeats
    settle_threads()

    import trainloop_complete_with_fixes as script
    from dataset_arc import load_tasks
    from model_persistence import ModelPersistence
    from resuming import resume
    from run_log import RunLog
    from run_state import save

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        uniform_tasks(root / "training.json")
        args = script.parse_arguments(["--device", "cpu", "--threads", "1", "--quiet"])
        script.fill_device_defaults(args, "cpu")
        tasks = load_tasks(root / "training.json")
        args.data_sha256 = tasks.sha256

        def fresh(folder: Path) -> tuple[Any, Any]:
            run = script.set_up(args, tasks, time.monotonic())
            run.log = RunLog(folder, quiet=True)
            return run, ModelPersistence(folder, drive_backup=False, on_message=lambda _: None)

        def first_batch(run: Any) -> None:
            n_batches = run.stream.n_batches(run.progress.epoch)
            made: Any = script.batches_of_epoch(run, n_batches)
            script.train_step(run, *next(made), last=True)
            made.close()

        for position in POSITIONS:
            folder = root / str(position)
            folder.mkdir()
            run, persistence = fresh(folder)
            first_batch(run)  # so that the optimizer has its state
            n_batches = run.stream.n_batches(0)
            run.progress.epoch, run.progress.batch = divmod(position, n_batches)
            run.progress.total = position
            save(run, persistence, wait=True)
            persistence.close()
        times: dict[int, list[float]] = {position: [] for position in POSITIONS}
        for _ in range(repeats + 1):
            for position in POSITIONS:
                run, persistence = fresh(root / str(position))
                started = time.process_time()
                resume(run, persistence)
                first_batch(run)
                times[position].append(time.process_time() - started)
                persistence.close()
        medians = {position: statistics.median(t[1:]) for position, t in times.items()}
    early, late = (medians[position] for position in POSITIONS)
    for position, median in medians.items():
        print(
            f"resumed at batch {position:5d}: {median * 1e3:7.1f} ms to the end of its first batch"
        )
    print(f"ratio {late / early:.3f} (median of {repeats}, in turn; the bound is within 0.10 of 1)")


if __name__ == "__main__":
    main()
