"""How much is learnt per minute: train for a budget, several seeds and ablations, print a table.

    python benchmarks/bench_learning.py --minutes 10 --seeds 0 1 2 --threads 2
    python benchmarks/bench_learning.py --minutes 10 --seeds 0 1 --ablations
    python benchmarks/bench_learning.py --minutes 10 --device cuda --evaluate_arc2
    python benchmarks/bench_learning.py --minutes 10 --ablations --parallel 2 --threads 1
    python benchmarks/bench_learning.py --batches 600 --ablations --threads 1    # on a busy machine

Each row is the real training script in its own process. Stopped and started again, it goes on with
the runs that are not finished. The table (learning_<budget>.md) and the raw figures (.json) lie
in --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import (  # noqa: E402 - the scripts are no package
    EXIT_DONE,
    EXIT_UNEXPECTED,
    Parser,
    number,
)

# Row -> flags of the training script. Each changes one thing.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "full": (),
    "demonstrations off": ("--demonstrations", "off"),
    "demonstrations shuffled": ("--demonstrations", "shuffled"),
    "prompt null": ("--prompt", "null"),
    "prompt shuffled": ("--prompt", "shuffled"),
    "no Qwen": ("--prompt", "no_qwen"),
    "frozen Qwen": ("--qwen_train", "frozen"),
    "readings reused": ("--qwen_cache_interval", "10"),
    "policy off": ("--policy", "off"),
    "policy random": ("--policy", "random"),
    "no memory": ("--no_memory",),
    "no EFE extras": ("--no_efe_extras",),
    "no hard-cell weights": ("--no_hard_cells",),
    "one planning step": ("--planning_steps", "1"),
    "no reward": ("--no_reward",),
}
SLICES = ("arc1_train", "arc1_eval", "arc2_new", "small")
SLACK_MIN = 10.0  # minutes over the budget after which a run counts as hung


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(
        prog="bench_learning.py",
        description="Train for a budget with several seeds and ablations; print a Markdown table.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--minutes",
        type=number(float, 0.1),
        default=10.0,
        help="budget of each run, all included (default: %(default)s)",
    )
    parser.add_argument(
        "--batches",
        type=number(int, 2),
        metavar="N",
        help="equal batches instead of equal minutes: the learning rate falls from N / 2 to N and "
        "two views vote; figures then do not depend on what else the machine does (default: "
        "minutes)",
    )
    parser.add_argument(
        "--seeds",
        type=number(int, 0, 2**31 - 1),
        nargs="+",
        default=[0, 1, 2],
        help="(default: 0 1 2)",
    )
    parser.add_argument("--threads", type=number(int, 1, 1024), help="CPU threads (default: cores)")
    parser.add_argument(
        "--parallel",
        type=number(int, 1, 64),
        default=1,
        help="runs at a time; give --threads too, so that they share the cores (default: 1)",
    )
    parser.add_argument("--device", default="auto", help="as in training (default: %(default)s)")
    parser.add_argument(
        "--ablations", action="store_true", help="one row per ablation (default: the full one only)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=tuple(ABLATIONS), metavar="ROW", help="these rows only"
    )
    parser.add_argument(
        "--evaluate_arc2",
        action="store_true",
        help="also score each run on ARC-AGI-2's public evaluation (outside the budget)",
    )
    parser.add_argument(
        "--out",
        default=str(ROOT / "runs" / "bench_learning"),
        metavar="DIR",
        help="where runs and tables go (default: runs/bench_learning)",
    )
    parser.add_argument(
        "--train_flags",
        default="",
        metavar="FLAGS",
        help="more flags for every run, in one string (default: none)",
    )
    return parser


def budget_of(args: argparse.Namespace) -> tuple[str, list[str]]:
    """What a run may use: a word for names and tables, and the flags of the training script."""
    if args.batches is None:
        return f"{args.minutes:g}min", ["--time_budget", f"{args.minutes:g}"]
    schedule = f"{args.batches // 2}:{args.batches}"
    return f"{args.batches}batches", ["--schedule_batches", schedule, "--eval_views", "2"]


def run_name(budget: str, row: str, seed: int, more: str) -> str:
    """The folder of one run: everything that makes it another run is in it."""
    flags = "".join(c if c.isalnum() else "_" for c in more)
    words = [budget, row.replace(" ", "_"), f"seed{seed}", *([flags] if flags else [])]
    return "-".join(words)


def finished_run(folder: Path) -> Path | None:
    """The run in a row's folder that has its results, if there is one."""
    found = sorted(folder.glob("arc_complete_*/results.json"))
    found = [file for file in found if not file.parent.is_symlink()]  # arc_complete_latest
    return found[-1].parent if found else None


def train_once(args: argparse.Namespace, row: str, seed: int, folder: Path) -> Path | None:
    """One training run; its folder, or None if it failed (its console log says why)."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, str(ROOT / "trainloop_complete_with_fixes.py"),
        *budget_of(args)[1], "--seed", str(seed), "--device", args.device, "--data", "arcagi2",
        "--runs_dir", str(folder), *ABLATIONS[row], *args.train_flags.split(),
    ]  # fmt: skip
    if args.threads:
        command += ["--threads", str(args.threads)]
    with (folder / "console.log").open("a", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=None if args.batches else 60 * (args.minutes + SLACK_MIN),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    if code != EXIT_DONE:
        print(f"failed: {row}, seed {seed}: exit code {code}, see {folder / 'console.log'}")
        return None
    return finished_run(folder)


def evaluate_arc2(args: argparse.Namespace, run: Path) -> dict[str, Any] | None:
    """Scores on the public evaluation, made once per run by predict.py."""
    scores = run / "arc2_evaluation.json"
    if not scores.is_file():
        command = [
            sys.executable, str(ROOT / "predict.py"), str(run), "--data", "arcagi2",
            "--split", "evaluation", "--out", str(run / "arc2_submission.json"),
            "--score_json", str(scores), "--device", args.device, "--quiet",
        ]  # fmt: skip
        if args.threads:
            command += ["--threads", str(args.threads)]
        if subprocess.run(command, check=False).returncode != EXIT_DONE:
            return None
    result = json.loads(scores.read_text(encoding="utf-8"))
    return {key: result[key] for key in ("n", "exact_at_1", "exact_at_2")}


def pairs_per_s(run: Path) -> float | None:
    """Training pairs a second, from batch to batch of one epoch (evaluations left out)."""
    pairs = minutes = 0.0
    last: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("kind") != "batch":
            continue
        if last.get("epoch") == row["epoch"]:
            pairs += row["pairs"]
            minutes += row["minutes"] - last["minutes"]
        last = row
    return pairs / (60 * minutes) if minutes else None


def figures_of(run: Path, row: str, seed: int) -> dict[str, Any]:
    """One line of raw figures."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return {
        "row": row,
        "seed": seed,
        **results,
        "pairs_per_s": pairs_per_s(run),
        "commit": config.get("commit"),
        "flags": [*ABLATIONS[row]],
    }


def one_run(args: argparse.Namespace, out: Path, row: str, seed: int) -> dict[str, Any] | None:
    """Figures of one run, trained now if it is not there yet; None if it failed."""
    folder = out / run_name(budget_of(args)[0], row, seed, args.train_flags)
    run = finished_run(folder) or train_once(args, row, seed, folder)
    if run is None:
        return None
    figures = figures_of(run, row, seed)
    if args.evaluate_arc2:
        figures["arc2_evaluation"] = evaluate_arc2(args, run)
    return figures


def spread(values: list[float], form: str) -> str:
    """Median, and lowest to highest where there are several."""
    text = format(statistics.median(values), form)
    if len(values) > 1:
        text += f" ({format(min(values), form)} to {format(max(values), form)})"
    return text


def percent(rows: list[dict[str, Any]], key: str, name: str | None = None) -> str:
    """A count's share in percent over seeds, on the whole or on a slice."""
    parts = [row if name is None else row["slices"].get(name, {"n": 0}) for row in rows]
    shares = [100 * part[key] / part["n"] for part in parts if part["n"]]
    return spread(shares, ".1f") if shares else "-"


def markdown(raw: list[dict[str, Any]], budget: str) -> str:
    """The table: shares in percent, medians over seeds with lowest and highest."""
    n = max(row["n"] for row in raw)
    sizes = {name: max(row["slices"].get(name, {}).get("n", 0) for row in raw) for name in SLICES}
    head = ["", "seeds", f"exact@1 ({n})", f"exact@2 ({n})", "size", "cells"]
    head += [f"{name} ({sizes[name]})" for name in SLICES]
    with_arc2 = any(row.get("arc2_evaluation") for row in raw)
    if with_arc2:
        head.append("ARC-AGI-2 evaluation")
    head += ["minutes", "pairs/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in ABLATIONS:
        rows = [row for row in raw if row["row"] == name]
        if not rows:
            continue
        cells = [name, str(len(rows)), percent(rows, "exact_at_1"), percent(rows, "exact_at_2")]
        cells += [
            spread([100 * row[key] for row in rows], ".1f")
            for key in ("size_accuracy", "cell_accuracy")
        ]
        cells += [percent(rows, "exact_at_2", part) for part in SLICES]
        if with_arc2:
            seen = [row["arc2_evaluation"] for row in rows if row.get("arc2_evaluation")]
            cells.append(percent(seen, "exact_at_2") if seen else "-")
        cells.append(spread([row["minutes"] for row in rows], ".1f"))
        speeds = [row["pairs_per_s"] for row in rows if row["pairs_per_s"]]
        cells.append(spread(speeds, ".1f") if speeds else "-")
        lines.append("| " + " | ".join(cells) + " |")
    devices = ", ".join(sorted({row["device"] for row in raw}))
    commits = ", ".join(sorted({str(row["commit"])[:10] for row in raw}))
    seeds = ", ".join(map(str, sorted({row["seed"] for row in raw})))
    note = (
        f"{budget} a run, evaluation included; shares in percent of test pairs, slices in two "
        f"attempts; median over seeds {seeds} (lowest to highest). {devices}; commit {commits}."
    )
    return "\n".join([*lines, "", note, ""])


def write_tables(out: Path, budget: str, rows: list[dict[str, Any]]) -> None:
    """The raw figures and the table, as far as they are there."""
    name = f"learning_{budget}"
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(markdown(rows, budget), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """All runs that are not there yet, then the table."""
    args = build_parser().parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    chosen = args.only or (list(ABLATIONS) if args.ablations else ["full"])
    # Seed by seed, so that a table over all rows is there as early as possible.
    plan = [(row, seed) for seed in args.seeds for row in chosen]
    raw: dict[tuple[str, int], dict[str, Any]] = {}
    with ThreadPoolExecutor(args.parallel) as pool:
        jobs = {pool.submit(one_run, args, out, *member): member for member in plan}
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                figures = job.result()
                if figures is not None:
                    raw[jobs[job]] = figures
                    write_tables(out, budget_of(args)[0], [raw[m] for m in plan if m in raw])
                    rest = (len(plan) - done) * figures["minutes"] / args.parallel
                    row, seed = jobs[job]
                    print(
                        f"[{time.strftime('%H:%M')}] {done}/{len(plan)}: {row}, seed {seed}: "
                        f"{figures['exact_at_2']}/{figures['n']}; about {rest:.0f} minutes to go",
                        flush=True,
                    )
        except BaseException:  # Ctrl+C above all: what has not begun is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if raw:
        print(markdown([raw[member] for member in plan if member in raw], budget_of(args)[0]))
    return EXIT_UNEXPECTED if len(raw) < len(plan) else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
