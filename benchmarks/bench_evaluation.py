"""CPU seconds that a trained network takes to answer every test input in one view.

    python benchmarks/bench_evaluation.py runs
    python benchmarks/bench_evaluation.py RUN --every 4 --repeats 3

Without hypotheses. "cold": with the analysis of every grid, as the first evaluation of a run has
it; "warm": with the analyses kept, as all later ones of the same grids have it, the median of the
repetitions. Then, of one warm pass, the parts that take most, in CPU seconds of the threads that
call them; a part is counted in those that call it, too. It trains nothing and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import Parser, counted, guarded, number, share_cores  # noqa: E402 - the scripts are no package
from trained_model import known_errors, load_model  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="bench_evaluation.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("run", help="a run folder, or a folder of runs for the newest one in it")
    add("--data", default="arcagi2", help="as of the trainer (default: %(default)s)")
    add("--every", type=number(int, 1), default=1, help="ask one task of so many (default: 1)")
    add("--repeats", type=number(int, 1), default=3, help="warm passes (default: 3)")
    add("--threads", type=number(int, 1, 1024), default=1, help="as of the trainer (default: 1)")
    args = parser.parse_args(argv)
    return guarded(lambda: measure(args), "Ask fewer tasks with --every.", known_errors)


def measure(args: argparse.Namespace) -> int:
    """The figures, printed as they come. Raises UserError, or what `load_model` and `load_tasks`
    do."""
    from batches import Collator, View
    from dataset_arc import load_tasks
    from evaluation import predict_tasks, without_outputs

    model = load_model(args.run)
    at_once = share_cores("cpu", args.threads, model.system.one_thread)
    tasks = without_outputs(load_tasks(args.data).train[:: args.every])
    collator = Collator()

    def answer() -> tuple[int, float, float]:
        """Queries answered, CPU seconds of all threads, and seconds."""
        cpu, wall = time.process_time(), time.monotonic()
        found = predict_tasks(
            model.system,
            tasks,
            [View()],
            task_index=model.task_index,
            collator=collator,
            at_once=at_once,
        )
        return len(found), time.process_time() - cpu, time.monotonic() - wall

    n, cold, cold_s = answer()
    together = f"{counted(at_once, 'batch', 'batches')} at a time"
    print(f"{n} test inputs of {len(tasks)} tasks, one view, {together}")
    print(f"cold: {cold:.1f} CPU s, {cold_s:.1f} s")
    taken = [answer()[1:] for _ in range(args.repeats)]
    warm, warm_s = ([one[clock] for one in taken] for clock in (0, 1))
    low, high = min(warm), max(warm)
    median, median_s = statistics.median(warm), statistics.median(warm_s)
    print(f"warm: {median:.1f} CPU s ({low:.1f} - {high:.1f}), {median_s:.1f} s")
    parts = watched(model.system, answer)
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"  {seconds:6.2f} {name}")
    return 0


def watched(system: Any, work: Callable[[], Any]) -> dict[str, float]:
    """CPU seconds of some parts of the system while it works."""
    agent = system.agent
    places = [
        (system.qwen, "forward", "language model and prompt"),
        (agent, "read_demonstrations", "demonstrations read"),
        (agent, "look", "looks at demonstrations, all in"),
        (agent.pointer, "evidence_of", "evidence"),
        (agent.rule, "forward", "fitted rule"),
        (agent, "plan", "planning"),
        (system, "refine", "policy"),
    ]

    spent: dict[str, float] = {}

    def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begun = time.thread_time()
            try:
                return real(*args, **options)
            finally:
                spent[name] = spent.get(name, 0.0) + time.thread_time() - begun

        return call

    for owner, method, name in places:
        setattr(owner, method, wrapped(getattr(owner, method), name))
    try:
        work()
    finally:
        for owner, method, _ in places:
            delattr(owner, method)
    return spent


if __name__ == "__main__":
    sys.exit(main())
