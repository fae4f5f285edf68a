"""What hypotheses alone answer: exact outputs by arm, what verdicts foretell, CPU seconds.

    python benchmarks/bench_hypotheses.py                          # every 8th training task
    python benchmarks/bench_hypotheses.py --every 8 --offset 0 2 4 6
    python benchmarks/bench_hypotheses.py --every 1 --data arcagi1 --split evaluation
    python benchmarks/bench_hypotheses.py --leave_one_out          # demonstrations as queries

Tasks are sorted by id. Sizes are predicted; two attempts are the two best-ranked different answers;
a query without a hypothesis counts as wrong. Test outputs are read for scoring alone: choose
between variants by --leave_one_out, whose queries are demonstrations. --all_arms runs every arm
even after a full verdict, for the table by arm. CPU seconds are of the process, so start it with
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rule_list  # noqa: E402 - the scripts are no package
from command_line import Parser, number  # noqa: E402
from dataset_arc import Grid, Task, load_tasks, slices_of  # noqa: E402
from rule_arms import ARMS, Limits  # noqa: E402


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(
        prog="bench_hypotheses.py",
        description="What hypotheses alone answer, by arm and verdict, and what they cost.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data", default="arcagi2", help="as of the training script (default: %(default)s)"
    )
    parser.add_argument(
        "--split",
        default="train",
        choices=("train", "evaluation"),
        help="which tasks (default: %(default)s)",
    )
    parser.add_argument(
        "--every", type=number(int, 1), default=8, help="take every Nth task (default: %(default)s)"
    )
    parser.add_argument(
        "--offset",
        type=number(int, 0),
        nargs="+",
        default=[0],
        help="first tasks of the series taken (default: 0)",
    )
    parser.add_argument(
        "--arms", nargs="+", choices=sorted(ARMS), help="these arms only (default: all)"
    )
    parser.add_argument(
        "--all_arms", action="store_true", help="go on after a full verdict (default: off)"
    )
    parser.add_argument(
        "--leave_one_out",
        action="store_true",
        help="demonstrations are the queries, each explained from the others (default: off)",
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON too (default: nowhere)")
    return parser


@dataclass(frozen=True)
class Row:
    """One query: hypotheses best first, which are exact, and CPU seconds."""

    key: tuple[str, int]
    hypotheses: tuple[rule_list.Hypothesis, ...]
    exact: list[bool]
    size_right: bool
    attempts: list[bool]
    cpu_s: float


def is_exact(answer: Grid, target: Grid) -> bool:
    return answer.shape == target.shape and bool((answer == target).all())


def rows_of(task: Task, args: argparse.Namespace) -> list[Row]:
    """A task's rows. Targets are compared with finished hypotheses only."""
    pairs = [(p.input, p.output) for p in task.demonstrations if p.output is not None]
    arms = ARMS if not args.arms else {a: ARMS[a] for a in args.arms}
    limits = Limits(stop=not args.all_arms)
    begun = time.process_time()
    if args.leave_one_out:
        found = rule_list.leave_one_out(pairs, arms=arms, limits=limits)
        targets = [output for _, output in pairs]
    else:
        tests = [p for p in task.tests if p.output is not None]
        found = rule_list.fit_task(pairs, [p.input for p in tests], arms=arms, limits=limits)
        targets = [p.output for p in tests if p.output is not None]
    cpu_s = (time.process_time() - begun) / max(1, len(targets))
    rows = []
    for i, (explained, target) in enumerate(zip(found, targets, strict=True)):
        hypotheses = explained.hypotheses
        exact = [is_exact(h.answer, target) for h in hypotheses]
        attempts = [is_exact(a, target) for a in explained.attempts(2)]
        size_right = bool(hypotheses) and hypotheses[0].answer.shape == target.shape
        rows.append(Row((task.task_id, i), hypotheses, exact, size_right, attempts, cpu_s))
    return rows


def share(rows: Iterable[Row], attempts: int) -> str:
    rows = list(rows)
    return f"{sum(any(r.attempts[:attempts]) for r in rows)}/{len(rows)}"


def main() -> None:
    args = build_parser().parse_args()
    tasks = load_tasks(args.data)
    chosen = getattr(tasks, args.split)
    rows = [
        row
        for offset in args.offset
        for task in chosen[offset :: args.every]
        for row in rows_of(task, args)
    ]
    if not rows:
        raise SystemExit("no query with a known output: nothing to measure")
    cpu = [r.cpu_s for r in rows]
    print(
        f"{len(rows)} queries: exact {share(rows, 1)} in one attempt, {share(rows, 2)} in two; any "
        f"hypothesis {sum(any(r.exact) for r in rows)}; size right "
        f"{sum(r.size_right for r in rows)}; no hypothesis {sum(not r.hypotheses for r in rows)}; "
        f"{sum(cpu):.1f} CPU s, {np.mean(cpu):.3f} a query, median {np.median(cpu):.3f}"
    )
    print(
        f"{'arm':22s} {'ran':>5s} {'exact':>6s} {'full':>5s} {'exact':>6s} {'answers':>8s} "
        f"{'exact':>6s}"
    )
    table: dict[str, Any] = {}
    for name in ARMS:
        mine = [
            (h, hit, i == 0)
            for r in rows
            for i, (h, hit) in enumerate(zip(r.hypotheses, r.exact, strict=True))
            if h.arm == name
        ]
        full = [hit for h, hit, _ in mine if h.verdict.full]
        first = [hit for _, hit, is_first in mine if is_first]
        figures = (len(mine), sum(m[1] for m in mine), len(full), sum(full), len(first), sum(first))
        table[name] = figures
        a, b, c, d, e, f = figures
        print(f"{name:22s} {a:5d} {b:6d} {c:5d} {d:6d} {e:8d} {f:6d}")
    for low, high in ((1.0, 1.0), (0.5, 0.999), (0.001, 0.499), (0.0, 0.0)):
        some = [r for r in rows if r.hypotheses and low <= r.hypotheses[0].verdict.share <= high]
        print(
            f"best verdict {low:.2f}-{high:.2f}: {share(some, 1)} in one attempt, "
            f"{share(some, 2)} in two"
        )
    sliced = {}
    if args.data == "arcagi2" and args.split == "train" and not args.leave_one_out:
        for name, keys in slices_of(tasks).items():
            sliced[name] = share((r for r in rows if r.key in keys), 2)
            print(f"{name:22s} {sliced[name]} in two attempts")
    if args.out is not None:
        figures_out = {
            "n": len(rows),
            "exact_at_1": sum(any(r.attempts[:1]) for r in rows),
            "exact_at_2": sum(any(r.attempts[:2]) for r in rows),
            "cpu_s": sum(cpu),
            "arms": table,
            "slices": sliced,
        }
        args.out.write_text(json.dumps(figures_out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
