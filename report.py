"""One HTML page about a run: settings, results, learning curves, pictures of what it answers.

    python report.py runs/arc_complete_20260101_120000 --out report.html
    python report.py runs/arc_complete_20260101_120000 --curves curves.png

The page needs no network and no other file. It trains nothing and never writes to the run. The
curves need matplotlib (`pip install matplotlib`).
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import (
    EXIT_DONE,
    EXIT_MISSING,
    Parser,
    UserError,
    add_process_arguments,
    check_arguments,
    guarded,
    no_bar,
    number,
    pick_device,
    pick_precision,
    write,
)
from persistence.files import atomic_write_bytes, read_json
from run_log import read_metrics
from trained_model import find_run, known_errors, load_model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dataset_arc import Task
    from trained_model import Model

# The colours 0..9 as the ARC web pages show them.
PALETTE = (
    "#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00",
    "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25",
)  # fmt: skip
PICTURE_PX = 112  # longest side of a grid's picture
CELL_PX = 16  # largest side of a cell
SHOWN_DEMONSTRATIONS = 4
SAMPLE_SEED = 0  # the sample is the same for every run on the same data
CURVES = (
    # (title, key of batch rows, key of epoch rows)
    ("Loss", "loss", None),
    ("Exact grids", "exact", "val_accuracy"),
    ("Cell accuracy", "accuracy", "cell_accuracy"),
    ("Size accuracy", "size", "size_accuracy"),
    ("d_acc: cells won by the refinement", "d_acc", None),
    ("Reward", "reward", None),
)


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(
        prog="report.py",
        description="Write one HTML page about a run: settings, results, curves, pictures.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 1 unexpected, 2 arguments, 3 run/data/matplotlib missing or\n"
        "unreadable, 4 out of memory, 130 interrupted.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run folder, or a folder of runs (its newest run)"
    )
    parser.add_argument(
        "--out", default="report.html", metavar="FILE", help="the page (default: %(default)s)"
    )
    parser.add_argument(
        "--curves", metavar="FILE", help="write only the learning curves, a PNG (default: off)"
    )
    parser.add_argument("--data", help="where the tasks are (default: as in the run)")
    parser.add_argument(
        "--pool",
        type=number(int, 1),
        default=120,
        help="test queries answered for the pictures, a fixed sample (default: %(default)s)",
    )
    parser.add_argument(
        "--pictures",
        type=number(int, 0),
        default=8,
        help="solved and unsolved queries shown at most, each (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest, best or a checkpoint's number (default: %(default)s)",
    )
    add_process_arguments(parser, "errors only")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, checked as far as is possible without torch."""
    parser = build_parser()
    args = parser.parse_args(argv)
    output = ("--curves", args.curves) if args.curves else ("--out", args.out)
    check_arguments(parser, args, [output])
    return args


# ---------------------------------------------------------------------------------------------
# What the run wrote
# ---------------------------------------------------------------------------------------------


@dataclass
class Record:
    """The files of a run that a report reads; `results` is empty before the final evaluation."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]
    batches: list[dict[str, Any]]
    epochs: list[dict[str, Any]]


def read_record(folder: Path) -> Record:
    """Read a run's JSON files. Raises UserError where there is nothing to report on."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        why = "it is not a file" if path.exists() else "there is no such file"
        raise UserError(
            f"{path}: cannot be read ({why}). Give the folder of a run that trained.", EXIT_MISSING
        )
    rows = read_metrics(path)
    batches = [row for row in rows if row["kind"] == "batch"]
    if not batches:
        raise UserError(f"{path}: no batches in it yet. Wait for the first save.", EXIT_MISSING)
    config, results = (read_json(folder / name) for name in ("config.json", "results.json"))
    return Record(
        folder,
        config if isinstance(config, dict) else {},
        results if isinstance(results, dict) else {},
        batches,
        [row for row in rows if row["kind"] == "epoch"],
    )


# ---------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------


def smooth(values: list[float], width: int) -> list[float]:
    """Mean of up to `width` values around each, over those that are finite."""
    out = []
    for i in range(len(values)):
        window = values[max(0, i - width // 2) : i + width // 2 + 1]
        finite = [v for v in window if math.isfinite(v)]
        out.append(sum(finite) / len(finite) if finite else math.nan)
    return out


def points(rows: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(minutes, values) of the rows that have both as numbers; null, not finite, is NaN."""

    def plain(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    some = [row for row in rows if key in row and plain(row.get("minutes"))]
    some = [row for row in some if row[key] is None or plain(row[key])]
    return (
        [float(row["minutes"]) for row in some],
        [math.nan if row[key] is None else float(row[key]) for row in some],
    )


def draw_curves(record: Record) -> bytes:
    """The learning curves as a PNG: batches smoothed, validation as dots, the result a star."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "curves: the package matplotlib is missing. Install it: pip install matplotlib",
            EXIT_MISSING,
        ) from error

    figure = Figure(figsize=(13, 6.4), layout="constrained")
    width = max(1, len(record.batches) // 40)
    results = record.results
    final = {
        "val_accuracy": results.get("exact_at_2", 0) / max(1, results.get("n", 0)),
        "cell_accuracy": results.get("cell_accuracy"),
        "size_accuracy": results.get("size_accuracy"),
    }
    for axes, (title, key, epoch_key) in zip(figure.subplots(2, 3).flat, CURVES, strict=True):
        minutes, values = points(record.batches, key)
        axes.plot(minutes, values, color="#0074d9", alpha=0.15, linewidth=0.6)
        axes.plot(minutes, smooth(values, width), color="#0074d9", label="training batches")
        if epoch_key:
            axes.plot(
                *points(record.epochs, epoch_key),
                "o-",
                color="#ff851b",
                label="validation, one view",
            )
            if results and final[epoch_key] is not None:
                axes.plot(
                    results["minutes"],
                    final[epoch_key],
                    "*",
                    markersize=12,
                    color="#ff4136",
                    label="final: two attempts" if key == "exact" else "final",
                )
        low, high = robust_range(values)
        if key in ("loss", "d_acc", "reward") and low < high:
            axes.set_ylim(low, high)
        axes.set_title(title)
        axes.set_xlabel("minutes")
        axes.grid(alpha=0.3)
        if epoch_key or key == "loss":
            axes.legend(fontsize=8)
    figure.suptitle(record.folder.name)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def robust_range(values: list[float]) -> tuple[float, float]:
    """From the 1st to the 99th percentile with a margin: one outlier does not flatten all."""
    finite = sorted(v for v in values if math.isfinite(v))
    if not finite:
        return 0.0, 0.0
    low, high = finite[len(finite) // 100], finite[-1 - len(finite) // 100]
    margin = 0.05 * (high - low)
    return low - margin, high + margin


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What the model says to one test query: a grid per planning step, all of the same size."""

    task: Task
    number: int
    steps: list[NDArray[np.uint8]]

    @property
    def truth(self) -> NDArray[np.uint8]:
        output = self.task.tests[self.number].output
        assert output is not None
        return output

    def right(self, step: int = -1) -> bool:
        grid = self.steps[step]
        return grid.shape == self.truth.shape and bool((grid == self.truth).all())


def sample_queries(tasks: tuple[Task, ...], n: int) -> list[tuple[Task, int]]:
    """A fixed sample of n test queries with known outputs."""
    import numpy as np

    known = [(t, i) for t in tasks for i, pair in enumerate(t.tests) if pair.output is not None]
    order = np.random.default_rng(SAMPLE_SEED).permutation(len(known))[:n]
    return [known[i] for i in order]


def answer_queries(
    model: Model, queries: list[tuple[Task, int]], device: str, *, quiet: bool
) -> list[Answer]:
    """The model's planning steps for the queries, in their order; it sees no test output."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from batches import View, evaluation_batches
    from evaluation import without_outputs

    tasks = {task.task_id: task for task, _ in queries}
    dtype, _ = pick_precision("auto", device)
    generator = torch.Generator(device=device).manual_seed(model.seed)
    steps: dict[tuple[str, int], list[Any]] = {}
    bar = tqdm(
        total=sum(len(task.tests) for task in tasks.values()),
        desc="Answering",
        unit="query",
        leave=False,
        disable=no_bar(quiet),
    )
    batches = evaluation_batches(
        without_outputs(tasks.values()), View(), batch_size=32, task_table=model.task_index
    )
    with bar:
        for batch in batches:
            with torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None):
                output = model.system.predict(batch.to(device), generator).before
            sizes = output.size.tolist()
            grids = [output.grids(s).cpu().numpy() for s in range(len(output.logits))]
            for row, (task_id, _, number_in_task) in enumerate(batch.pair_ids):
                rows, cols = sizes[row]
                steps[(task_id, number_in_task)] = [
                    grid[row, :rows, :cols].astype(np.uint8) for grid in grids
                ]
            bar.update(len(sizes))
    return [Answer(task, i, steps[(task.task_id, i)]) for task, i in queries]


def svg(grid: NDArray[np.uint8], label: str) -> str:
    """A grid as inline SVG: one path per colour, runs of cells in a row drawn as one."""
    rows, cols = grid.shape
    cell = min(CELL_PX, PICTURE_PX / max(rows, cols))
    runs: dict[int, list[str]] = {}
    for r in range(rows):
        c = 0
        while c < cols:
            end = c
            while end < cols and grid[r, end] == grid[r, c]:
                end += 1
            runs.setdefault(int(grid[r, c]), []).append(f"M{c} {r}h{end - c}v1h{c - end}z")
            c = end
    paths = "".join(
        f'<path fill="{PALETTE[k]}" d="{"".join(d)}"/>' for k, d in sorted(runs.items())
    )
    lines = "".join(f"M0 {r}h{cols}" for r in range(1, rows))
    lines += "".join(f"M{c} 0v{rows}" for c in range(1, cols))
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {cols} {rows}" '
        f'width="{cols * cell:.0f}" height="{rows * cell:.0f}">{paths}'
        f'<path d="{lines}" stroke="#555" stroke-width=".04" fill="none"/></svg>'
    )


def figure_of(grid: NDArray[np.uint8], caption: str, kind: str = "") -> str:
    """A picture with its caption and size."""
    rows, cols = grid.shape
    return (
        f'<figure class="{kind}">{svg(grid, f"{caption}, {rows} x {cols}")}'
        f"<figcaption>{html.escape(caption)}<br><small>{rows} x {cols}</small></figcaption>"
        "</figure>"
    )


def card(answer: Answer) -> str:
    """One query: demonstrations, then query, answer by planning step, and the truth."""
    task = answer.task
    shown = task.demonstrations[:SHOWN_DEMONSTRATIONS]
    demonstrations = []
    for i, pair in enumerate(shown):
        assert pair.output is not None
        demonstrations.append(
            '<div class="pair">'
            + figure_of(pair.input, f"demonstration {i}")
            + figure_of(pair.output, "output")
            + "</div>"
        )
    more = len(task.demonstrations) - len(shown)
    rest = f"<p>and {more} more</p>" if more else ""
    steps = []
    for s in range(len(answer.steps)):
        mark = "&#10003;" if answer.right(s) else "&#10007;"
        kind = "right" if answer.right(s) else "wrong"
        picture = figure_of(answer.steps[s], f"step {s + 1}", kind)
        steps.append(picture.replace("<figcaption>", f"<figcaption>{mark} ", 1))
    state = "right" if answer.right() else "wrong"
    word = "solved" if answer.right() else "not solved"
    return (
        f'<section class="card"><h3 class="{state}">{html.escape(task.task_id)}, test '
        f'{answer.number}: {word}</h3><div class="strip">{"".join(demonstrations)}{rest}</div>'
        f'<div class="strip">{figure_of(task.tests[answer.number].input, "query")}'
        f"{''.join(steps)}{figure_of(answer.truth, 'truth')}</div></section>"
    )


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;
color:#222;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1rem}
td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
img{max-width:100%}
figure{margin:.2rem;text-align:center;font-size:12px}
svg{border:1px solid #555;display:block;margin:auto}
.strip{display:flex;flex-wrap:wrap;align-items:flex-start;gap:.4rem;margin:.4rem 0}
.pair{display:flex;border:1px solid #ddd;border-radius:4px;padding:.2rem}
.card{border-top:1px solid #bbb;padding:.4rem 0}
h3{margin:.2rem 0;font-size:15px}
h3.right,.right figcaption{color:#137333}
h3.wrong,.wrong figcaption{color:#b3261e}
small{color:#666}
"""


def table(rows: list[tuple[Any, ...]], head: tuple[str, ...] = ()) -> str:
    """An HTML table; numbers, and percentages in text, to the right."""

    def cell(value: Any, tag: str, column: int) -> str:
        kind = ' class="n"' if column and head else ""
        return f"<{tag}{kind}>{html.escape(str(value))}</{tag}>"

    parts = ["<table>"]
    if head:
        parts.append("<tr>" + "".join(cell(v, "th", i) for i, v in enumerate(head)) + "</tr>")
    for row in rows:
        parts.append("<tr>" + "".join(cell(v, "td", i) for i, v in enumerate(row)) + "</tr>")
    return "".join([*parts, "</table>"])


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"


def summary_rows(record: Record) -> list[tuple[Any, ...]]:
    """What was run, in a few lines; what an interrupted run has not written is left out."""
    config, results, last = record.config, record.results, record.batches[-1]
    minutes = max(points(record.batches, "minutes")[0], default=0.0)
    arguments = config.get("arguments", {})
    data, versions = config.get("data", {}), config.get("versions", {})
    rows = [
        ("Data", f"{data.get('name')}: {data.get('tasks')} training tasks"),
        ("Qwen", f"{arguments.get('qwen_model')}, trained: {arguments.get('qwen_train')}"),
        ("Agent", f"width {arguments.get('width')}, {arguments.get('planning_steps')} steps"),
        ("Seed", arguments.get("seed")),
        ("Device", config.get("device")),
        ("Batches", f"{len(record.batches)}, in epoch {last.get('epoch', '?')} at the end"),
        ("Minutes", f"{results.get('minutes', minutes):.1f}"),
        ("Commit", config.get("commit") or "not a git checkout"),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
    ]
    return [row for row in rows if row[1] is not None]


def result_tables(results: dict[str, Any]) -> str:
    """The final evaluation and its slices."""
    if not results:
        return "<p>No final evaluation yet: the run is going on, or was stopped.</p>"
    n = results["n"]
    rows = [("all", n, results["exact_at_1"], results["exact_at_2"])]
    rows += [
        (name, c["n"], c["exact_at_1"], c["exact_at_2"])
        for name, c in results.get("slices", {}).items()
    ]
    head = ("test pairs", "n", "exact in one attempt", "exact in two attempts", "share")
    views = results.get("views")
    return (
        table([(*row, percent(row[3], row[1])) for row in rows], head)
        + f"<p>Size right: {100 * results['size_accuracy']:.1f}%. Cells right: "
        f"{100 * results['cell_accuracy']:.1f}% (0 where the size is wrong). "
        f"{views} views voted; weights of the last batch, averaged.</p>"
    )


def page(
    record: Record, curves: bytes, answers: list[Answer], model: Model, n_pictures: int
) -> str:
    """The whole page."""
    title = html.escape(record.folder.name)
    image = base64.b64encode(curves).decode()
    solved = [a for a in answers if a.right()]
    unsolved = [a for a in answers if not a.right()]
    arguments = record.config.get("arguments", {})
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>",
        table(summary_rows(record)),
        "<details><summary>All settings</summary>",
        table(sorted(arguments.items())),
        "</details><h2>Final evaluation</h2>",
        result_tables(record.results),
        "<h2>Learning curves</h2>",
        f'<img alt="Learning curves" src="data:image/png;base64,{image}">',
        "<h2>Answers</h2>",
        f"<p>{len(answers)} test queries, the same sample for every run on these tasks, answered "
        f"in one view and one attempt by {html.escape(model.path.name)} (after {model.n_batches} "
        f"batches): {len(solved)} solved. Shown are the first of each kind; the marks "
        "say whether a planning step's grid is right.</p>",
    ]
    for name, group in (("Solved", solved), ("Not solved", unsolved)):
        parts.append(f"<h2>{name}: {len(group)} of {len(answers)}</h2>")
        parts += [card(answer) for answer in group[:n_pictures]]
    parts.append("</body></html>\n")
    return "".join(parts)


def run_report(args: argparse.Namespace) -> int:
    """From parsed arguments to the written file."""
    import torch

    from dataset_arc import load_tasks

    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    notes: list[str] = []
    record = read_record(find_run(Path(args.run).expanduser(), notes))
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    curves = draw_curves(record)
    if args.curves:
        write(args.curves, lambda path: atomic_write_bytes(path, curves))
        if not args.quiet:
            print(f"Wrote {args.curves}: curves of {len(record.batches)} batches")
        return EXIT_DONE
    arguments = record.config.get("arguments", {})
    tasks = load_tasks(args.data or arguments.get("data", "arcagi2"), training=True)
    expected = record.config.get("data", {}).get("sha256")
    if expected not in (None, tasks.sha256):
        print(f"warning: {tasks.name} is not the data that the run was trained on", file=sys.stderr)
    model = load_model(
        record.folder, checkpoint=args.checkpoint, device=device, offline=args.offline
    )
    queries = sample_queries(tasks.train, args.pool)
    answers = answer_queries(model, queries, device, quiet=args.quiet)
    text = page(record, curves, answers, model, args.pictures)
    write(args.out, lambda path: atomic_write_bytes(path, text.encode()))
    if not args.quiet:
        solved = sum(answer.right() for answer in answers)
        print(f"Wrote {args.out}: {solved} of {len(answers)} sample queries solved")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """The script: parse, report, and return an exit code."""
    args = parse_arguments(argv)
    return guarded(
        lambda: run_report(args),
        "Use --device cpu.",
        known_errors,
        "interrupted; nothing was written",
    )


if __name__ == "__main__":
    sys.exit(main())
