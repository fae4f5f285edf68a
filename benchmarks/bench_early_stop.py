"""What an early end of planning saves and costs, on one trained model.

    python benchmarks/bench_early_stop.py RUN                    # on demonstrations: to choose by
    python benchmarks/bench_early_stop.py RUN --tests            # on the test outputs: the result

For each --stop_confidence: planning steps taken per query, exact grids in one attempt and one view,
and who gains and loses against taking all steps (exact McNemar test). On demonstrations each is
predicted from the others, in views of an epoch far beyond any that was trained on. Threads and seed
as in training; CPU by default.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import Parser, number, pick_device, settle_threads  # noqa: E402 - no package

STOPS = (1.0, 0.99, 0.98, 0.95, 0.9, 0.8, 0.0)
FAR_EPOCH = 10**6  # no run gets there: its views were never trained on


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(
        prog="bench_early_stop.py",
        description="Planning steps saved and exact grids by --stop_confidence, on one model.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="as predict.py takes it")
    parser.add_argument("--data", default="arcagi2", help="as in training")
    parser.add_argument("--tests", action="store_true", help="the test outputs, all of them")
    parser.add_argument(
        "--pairs", type=number(int, 1), default=1000, help="demonstrations to predict, at least"
    )
    parser.add_argument("--stops", type=number(float, 0, 1), nargs="+", default=STOPS)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=number(int, 1), default=1, help="CPU threads")
    return parser


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value that `gained` and `lost` differ by chance alone."""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, sum(math.comb(n, i) for i in range(k + 1)) * 2 / 2**n)


def on_demonstrations(system: Any, tasks: Any, index: dict[str, int], args: Any) -> Any:
    """A function: stop -> (exact per query, planning steps per query)."""
    import dataclasses

    import torch

    from batches import TrainingStream
    from grid_accuracy_loss import exact_match, resize_grids, size_match

    stream = TrainingStream(tasks.train, seed=0, batch_size=16, task_table=index)
    batches, n = [], 0
    for batch, targets in stream.epoch(FAR_EPOCH):
        batches.append((batch.to(args.device), targets.to(args.device)))
        n += batch.n_queries
        if n >= args.pairs:
            break

    def measure(stop: float) -> tuple[list[bool], list[int]]:
        system.config = dataclasses.replace(system.config, stop_confidence=stop)
        exact: list[bool] = []
        steps: list[int] = []
        for batch, targets in batches:
            output = system.predict(batch, torch.Generator(args.device).manual_seed(0)).before
            canvas = (targets.output.shape[1], targets.output.shape[2])
            shown = resize_grids(output.grids(), output.size, targets.size, canvas)
            right = exact_match(shown, targets.output, size_match(output.size, targets.size))
            exact += (right & targets.fits).tolist()
            steps += output.n_steps.tolist()
        return exact, steps

    return measure


def on_tests(system: Any, tasks: Any, index: dict[str, int], args: Any) -> Any:
    """The same on the test queries of the training tasks."""
    import dataclasses

    from batches import Collator, View
    from evaluation import outcomes, predict_tasks, without_outputs

    collator = Collator()

    def measure(stop: float) -> tuple[list[bool], list[int]]:
        system.config = dataclasses.replace(system.config, stop_confidence=stop)
        found = predict_tasks(
            system, without_outputs(tasks.train), [View()], task_index=index, batch_size=16,
            device=args.device, collator=collator,
        )  # fmt: skip
        rows = outcomes(found, tasks.train)
        keys = sorted(rows)
        return [rows[k].attempt_1 for k in keys], [found[k].steps for k in keys]

    return measure


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settle_threads()
    import torch

    from dataset_arc import load_tasks
    from trained_model import load_model

    args.device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    model = load_model(args.model, device=args.device)
    make = on_tests if args.tests else on_demonstrations
    measure = make(model.system, load_tasks(args.data), model.task_index, args)
    print(
        "| stop_confidence | queries | exact | gained / lost (p) | steps a query | steps saved | "
        "CPU s |\n|---|---|---|---|---|---|---|"
    )
    first: list[bool] = []
    for stop in args.stops:
        begun = time.process_time()
        exact, steps = measure(stop)
        spent = time.process_time() - begun
        first = first or exact
        gained = sum(now and not then for now, then in zip(exact, first, strict=True))
        lost = sum(then and not now for now, then in zip(exact, first, strict=True))
        mean = sum(steps) / len(steps)
        saved = 1 - mean / model.system.config.planning_steps
        print(
            f"| {stop:g} | {len(exact)} | {sum(exact)} | {gained} / {lost} "
            f"({mcnemar(gained, lost):.2f}) | {mean:.2f} | {saved:.0%} | {spent:.0f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
