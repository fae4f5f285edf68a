"""CPU seconds that a trained network takes to answer every test input in one view.

    python benchmarks/bench_evaluation.py runs
    python benchmarks/bench_evaluation.py RUN --every 4 --repeats 3

Without hypotheses. "cold": with the analysis of every grid, as the first evaluation of a run has
it; "warm": with the analyses kept, as all later ones of the same grids have it, the median of the
repetitions. Then, of one warm pass, the parts that take most, by this thread's CPU seconds; a part
is counted in those that call it, too. It trains nothing and writes nothing.
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

from command_line import Parser, guarded, number  # noqa: E402 - the scripts are no package
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
    add("--threads", type=number(int, 1, 1024), default=1, help="CPU threads (default: 1)")
    args = parser.parse_args(argv)
    return guarded(lambda: measure(args), "Ask fewer tasks with --every.", known_errors)


def measure(args: argparse.Namespace) -> int:
    """The figures, printed as they come. Raises UserError, or what `load_model` and `load_tasks`
    do."""
    import torch

    from batches import Collator, View
    from dataset_arc import load_tasks
    from evaluation import predict_tasks, without_outputs

    torch.set_num_threads(args.threads)
    model = load_model(args.run)
    tasks = without_outputs(load_tasks(args.data).train[:: args.every])
    collator = Collator()

    def answer() -> tuple[int, float]:
        """Queries answered, and CPU seconds, those of the thread that makes batches included."""
        begun = time.process_time()
        found = predict_tasks(
            model.system, tasks, [View()], task_index=model.task_index, collator=collator
        )
        return len(found), time.process_time() - begun

    n, cold = answer()
    print(f"{n} test inputs of {len(tasks)} tasks, one view, {torch.get_num_threads()} thread(s)")
    print(f"cold: {cold:.1f} CPU s")
    warm = [answer()[1] for _ in range(args.repeats)]
    low, high = min(warm), max(warm)
    print(f"warm: {statistics.median(warm):.1f} CPU s ({low:.1f} - {high:.1f})")
    parts = watched(model.system, answer)
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"  {seconds:6.2f} {name}")
    return 0


def watched(system: Any, work: Callable[[], Any]) -> dict[str, float]:
    """CPU seconds of this thread in some parts of the system while it works."""
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
