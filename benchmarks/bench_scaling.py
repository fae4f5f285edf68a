"""How the cost of training and of starting grows, as exponents: 1 is in proportion.

    python benchmarks/bench_scaling.py --figure scaling.png      # about ten minutes of CPU time
    python benchmarks/bench_scaling.py --axes tasks --tasks 1000 10000 100000
    python benchmarks/bench_scaling.py --axes tasks --folder     # one file a task

Each axis changes one number and holds the others; the exponent is the slope of the cost over that
number, both as logarithms. Tasks are made up: grids of random colours, outputs mirrored.

    pairs           CPU s of training, of how many pairs are trained on
    cells           CPU s a pair, of the cells of a grid (sides 5 to 30)
    demonstrations  CPU s a pair, of how many demonstrations a task has (4 are seen at most)
    batch           CPU s a pair, of the pairs in a batch
    processes       s a task until its hypotheses are fitted, of the processes that fit them
    tasks           s, CPU s and MB from the command to the end of the first batch, of how many
                    tasks --data has: the real script, with the untrained model's evaluation on 8
                    outputs; what it takes beyond the smallest number of tasks

Medians of --repeats, in turn. Within a process the trainer's own step and stream are measured; on a
GPU seconds take the place of CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_step import Bench

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import (  # noqa: E402 - the scripts are no package
    Parser,
    check_device_name,
    check_output_file,
    number,
    pick_device,
    settle_threads,
)

# What each exponent is to be at most; seconds by the clock depend on what else a machine does.
BOUNDS = {
    "pairs": 1.1, "cells": 1.2, "demonstrations": 1.0, "batch": 0.0, "tasks, CPU s": 1.1,
    "tasks, peak MB": 1.1,
}  # fmt: skip
SIDES = (5, 8, 12, 18, 24, 30)
DEMONSTRATIONS = (2, 3, 4, 6, 8)
BATCHES = (1, 2, 4, 8, 16, 32)
PAIRS = (24, 48, 96, 192)
PROCESSES = (1, 2)
AXES = ("pairs", "cells", "demonstrations", "batch", "processes", "tasks")
FIRST_BATCH = "[Batch    0]"


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(
        prog="bench_scaling.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    add, whole = parser.add_argument, number(int, 1)
    # fmt: off
    add("--axes", nargs="+", choices=AXES, default=list(AXES), help="default: all")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--tasks", nargs="+", type=whole, default=[1000, 10_000, 30_000, 100_000],
        help="numbers of tasks (default: 1000 10000 30000 100000)")
    add("--folder", action="store_true", help="tasks as one file each (default: one file)")
    add("--repeats", type=whole, default=3, help="default: %(default)s; tasks: once each")
    add("--largest", type=whole, default=30,
        help="leave points above this out on the axes demonstrations and batch, and sides above it "
             "(default: %(default)s)")
    add("--threads", type=number(int, 1, 1024), default=1, help="CPU threads (default: 1)")
    add("--seed", type=number(int, 0), default=0, help="default: 0")
    add("--json", metavar="OUT", help="write the figures there, too (default: off)")
    add("--figure", metavar="PNG", help="draw them there; needs matplotlib (default: off)")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_device_name(parser, args.device)
    for flag, path in (("--json", args.json), ("--figure", args.figure)):
        if path:
            check_output_file(parser, flag, Path(path))
    settle_threads()
    args.device = pick_device(args.device)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as scratch:
        for axis in args.axes:
            for name, points in MEASURES[axis](args, Path(scratch)).items():
                # A start has a fixed cost: what comes on top of it is what grows.
                grown = (
                    [(x, y - points[0][1]) for x, y in points[1:]] if axis == "tasks" else points
                )
                found[name] = {"points": points, "exponent": exponent(grown)}
                print_axis(name, found[name], BOUNDS.get(name))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.figure:
        draw(found, Path(args.figure))
    return 0


# ---------------------------------------------------------------- made-up tasks


def made_up(
    n: int, *, sides: tuple[int, int] = (3, 5), demonstrations: int = 3, seed: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """n tasks by id, in the public JSON form, with sides from sides[0] to sides[1]."""
    import numpy as np

    rng = np.random.default_rng(seed)
    n_pairs = demonstrations + 1
    for start in range(0, n, 1000):
        size = rng.integers(sides[0], sides[1] + 1, (1000, n_pairs, 2)).tolist()
        cells = rng.integers(0, 10, (1000, n_pairs, sides[1], sides[1]), dtype=np.uint8)
        for k in range(min(1000, n - start)):
            pairs = []
            for (rows, cols), grid in zip(size[k], cells[k], strict=True):
                shown = grid[:rows, :cols]
                pairs.append({"input": shown.tolist(), "output": shown[:, ::-1].tolist()})
            task = {"train": pairs[:demonstrations], "test": pairs[demonstrations:]}
            yield f"{start + k:08x}", task


def write_file(path: Path, tasks: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """One JSON object of tasks by id, written task by task."""
    with path.open("w", encoding="utf-8") as file:
        for i, (name, task) in enumerate(tasks):
            file.write(f'{"," if i else "{"}"{name}": {json.dumps(task)}\n')
        file.write("}\n")


def write_folder(path: Path, tasks: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """One JSON file a task."""
    path.mkdir()
    for name, task in tasks:
        (path / f"{name}.json").write_text(json.dumps(task), encoding="utf-8")


# ---------------------------------------------------------------- the axes

Points = list[tuple[float, float]]


def training(
    args: argparse.Namespace,
    scratch: Path,
    settings: Mapping[float, tuple[Mapping[str, Any], int, int]],
    per_pair: bool,
) -> Points:
    """Medians of the seconds that training takes, at each x of settings: what the tasks are made
    with, pairs in a batch, batches. per_pair: of one pair, else of all."""
    from dataset_arc import load_tasks

    benches: dict[float, tuple[Bench, int]] = {}
    for x, (made_with, batch_size, n_batches) in settings.items():
        per_task = made_with.get("demonstrations", 3)
        n = max(4, math.ceil(n_batches * batch_size / per_task))
        path = scratch / "training.json"
        write_file(path, made_up(n, seed=args.seed, **made_with))
        flags = argparse.Namespace(
            **vars(args), qwen_model="auto", batch_size=batch_size, width=None
        )
        benches[x] = Bench(flags, load_tasks(path)), n_batches
    clock: Callable[[], float] = time.process_time if args.device == "cpu" else time.monotonic
    taken: dict[float, list[float]] = {x: [] for x in benches}
    for repeat in range(args.repeats + 1):
        for x, (bench, n_batches) in benches.items():
            bench.forget()
            positions = range(min(n_batches, bench.run.stream.n_batches(0)))
            begun = clock()
            pairs = bench.steps(positions if repeat else positions[:1])
            took = clock() - begun  # the figures of a batch have waited for the device
            if repeat:
                taken[x].append(took / pairs if per_pair else took)
    return [(x, statistics.median(times)) for x, times in taken.items()]


def pairs_axis(args: argparse.Namespace, scratch: Path) -> dict[str, Points]:
    made_with = {"sides": (6, 6)}
    points = {float(n): (made_with, 12, n // 12) for n in PAIRS}
    return {"pairs": training(args, scratch, points, per_pair=False)}


def cells_axis(args: argparse.Namespace, scratch: Path) -> dict[str, Points]:
    sides = [side for side in SIDES if side <= args.largest]
    points = {float(side * side): ({"sides": (side, side)}, 6, 1) for side in sides}
    return {"cells": training(args, scratch, points, per_pair=True)}


def demonstrations_axis(args: argparse.Namespace, scratch: Path) -> dict[str, Points]:
    some = [n for n in DEMONSTRATIONS if n <= args.largest]
    points = {float(n): ({"sides": (8, 8), "demonstrations": n}, n, 2) for n in some}
    return {"demonstrations": training(args, scratch, points, per_pair=True)}


def batch_axis(args: argparse.Namespace, scratch: Path) -> dict[str, Points]:
    some = [n for n in BATCHES if n <= args.largest]
    # Tasks of two demonstrations: a batch holds whole tasks, so one pair a batch cannot be.
    points = {2.0 * n: ({"sides": (8, 8), "demonstrations": 2}, 2 * n, 2) for n in some}
    return {"batch": training(args, scratch, points, per_pair=True)}


def processes_axis(args: argparse.Namespace, scratch: Path) -> dict[str, Points]:
    from dataset_arc import load_tasks
    from evaluation import without_outputs
    from hypotheses import Fitter

    path = scratch / "training.json"
    write_file(path, made_up(200, sides=(10, 10), seed=args.seed))
    tasks = without_outputs(load_tasks(path).train)
    taken: dict[int, list[float]] = {n: [] for n in PROCESSES}
    for _ in range(args.repeats):
        for n in PROCESSES:
            begun = time.monotonic()
            fitter = Fitter(tasks, n)
            fitter.collect()
            fitter.close()
            taken[n].append((time.monotonic() - begun) / len(tasks))
    return {"processes": [(float(n), statistics.median(t)) for n, t in taken.items()]}


def tasks_axis(args: argparse.Namespace, scratch: Path) -> dict[str, Points]:
    names = ("tasks, s", "tasks, CPU s", "tasks, peak MB")
    found: dict[str, Points] = {name: [] for name in names}
    for n in args.tasks:
        path = scratch / (f"tasks_{n}" if args.folder else f"tasks_{n}.json")
        (write_folder if args.folder else write_file)(path, made_up(n, seed=args.seed))
        flags = [
            "--data", str(path), "--max_batches", "1", "--device", args.device, "--threads",
            str(args.threads), "--runs_dir", str(scratch / "runs"), "--offline",
        ]  # fmt: skip
        for name, value in zip(names, until_first_batch(flags), strict=True):
            if value is not None:
                found[name].append((float(n), value))
    return {name: points for name, points in found.items() if points}


def until_first_batch(flags: Sequence[str]) -> tuple[float, float | None, float | None]:
    """(s, CPU s, MB at most) of the real script until its first batch is done; the last two where
    the system tells (Linux). Raises RuntimeError where it ends before."""
    command = [sys.executable, str(ROOT / "trainloop_complete_with_fixes.py"), *flags]
    begun = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        if line.startswith(FIRST_BATCH):
            took = time.monotonic() - begun
            cpu_s, peak_mb = usage_of(child.pid)
            child.terminate()
            child.communicate()
            return took, cpu_s, peak_mb
    raise RuntimeError(f"exit code {child.wait()} before the first batch: {''.join(lines)}")


def usage_of(pid: int) -> tuple[float | None, float | None]:
    """CPU seconds and peak MB of memory of a process that runs, without its children."""
    folder = Path("/proc") / str(pid)
    if not folder.is_dir():
        return None, None
    ticks = (folder / "stat").read_text().rsplit(")", 1)[1].split()[11:13]
    status = (folder / "status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), peak / 1024


MEASURES: dict[str, Callable[[argparse.Namespace, Path], dict[str, Points]]] = {
    "pairs": pairs_axis,
    "cells": cells_axis,
    "demonstrations": demonstrations_axis,
    "batch": batch_axis,
    "processes": processes_axis,
    "tasks": tasks_axis,
}


# ---------------------------------------------------------------- what was found


def exponent(points: Points) -> float | None:
    """The slope of log cost over log x by least squares; None for less than two points, or where
    one costs nothing."""
    if len(points) < 2 or min(cost for _, cost in points) <= 0:
        return None
    xs, ys = ([math.log(v) for v in values] for values in zip(*points, strict=True))
    x0, y0 = statistics.mean(xs), statistics.mean(ys)
    across = sum((x - x0) ** 2 for x in xs)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / across


def print_axis(name: str, row: Mapping[str, Any], bound: float | None) -> None:
    shown = "  ".join(f"{x:g}: {cost:.4g}" for x, cost in row["points"])
    slope = row["exponent"]
    verdict = ""
    if slope is not None:
        verdict = f"exponent {slope:.2f}" + (f" (at most {bound:g})" if bound is not None else "")
        if bound is not None and slope > bound + 0.05:
            verdict += ": GROWS TOO FAST"
    print(f"{name:16s} {verdict:45s} {shown}", flush=True)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The axes side by side, log-log, each with the line of its exponent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 3), squeeze=False)
    for axis, (name, row) in zip(axes[0], found.items(), strict=True):
        xs, ys = zip(*row["points"], strict=True)
        axis.loglog(xs, ys, "o-")
        slope = row["exponent"]
        axis.set_title(name if slope is None else f"{name}: exponent {slope:.2f}", fontsize=9)
        axis.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
