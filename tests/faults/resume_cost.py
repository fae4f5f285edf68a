"""How long from opening a run to the end of the first batch,
resumed at batch 10 and at batch 3,000.

Skipping must cost nothing: the position is three integers, nothing is replayed.
    python tests/faults/resume_cost.py
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from harness import Toy, arguments, finish, scratch, warm_up
from kill_points import manager

POSITIONS = (10, 3000)


def run(repeats: int = 41) -> dict[str, Any]:
    """Medians in milliseconds, the two positions measured in turn."""
    warm_up()
    taken: dict[int, list[float]] = {p: [] for p in POSITIONS}
    with scratch() as root:
        for position in POSITIONS:
            toy, persistence = Toy(), manager(root / str(position))
            toy.step(0, position)
            persistence.save_checkpoint(*toy.six, 0, position, {}, extra=toy.extra())
            persistence.close()
        for _ in range(repeats):
            for position in POSITIONS:
                toy = Toy()
                started = time.perf_counter()
                found = manager(root / str(position)).load_latest(*toy.six)
                toy.restore(found["extra"])
                toy.step(found["epoch"], found["batch"] + 1)
                taken[position].append(time.perf_counter() - started)
    medians = {str(p): round(1e3 * statistics.median(t), 3) for p, t in taken.items()}
    ratio = medians["3000"] / medians["10"]
    problems = [] if abs(ratio - 1) <= 0.1 else [f"batch 3,000 takes {ratio:.2f} times as long"]
    return {"first_batch_ms": medians, "ratio": round(ratio, 3), "problems": problems}


def main() -> None:
    args = arguments(__doc__ or "", repeats=41)
    figures = run(args.repeats)
    finish(figures, not figures["problems"])


if __name__ == "__main__":
    main()
