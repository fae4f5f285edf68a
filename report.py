"""One HTML page about a run, or about two: results, health, learning curves, pictures of answers.

    python report.py runs/arc_complete_20260101_120000 --out report.html
    python report.py runs/first runs/second --out comparison.html
    python report.py runs/arc_complete_20260101_120000 --curves curves.png

The page needs no network and no other file. It trains nothing and never writes to the run. Only the
PNG of `--curves` needs matplotlib (`pip install matplotlib`).
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from typing import TYPE_CHECKING, Any

from command_line import (
    EXIT_ARGUMENTS,
    EXIT_DONE,
    EXIT_MISSING,
    Parser,
    UserError,
    add_process_arguments,
    check_arguments,
    cores,
    counted,
    guarded,
    no_bar,
    number,
    pick_device,
    pick_precision,
    share_cores,
    write,
)
from persistence.files import atomic_write_bytes, expanded
from run_record import Record, figure, part, points, read_record, smooth
from trained_model import find_run, known_errors, load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dataset_arc import Task, TaskSet
    from evaluation import Key, Prediction
    from report_page import Answer, Gallery, Grid
    from rule_list import Explained
    from trained_model import Model

SAMPLE_SEED = 0  # the sample is the same for every run on the same data
VIEWS_CPU, VIEWS_GPU = 2, 8  # as in a final evaluation that no clock hurries
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
        description="Write one HTML page about a run: results, health, curves, pictures; or about "
        "two runs beside each other.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 1 unexpected, 2 arguments, 3 run/data/matplotlib missing or\n"
        "unreadable, 4 out of memory, 130 interrupted.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run folder, or a folder of runs (its newest run)"
    )
    parser.add_argument(
        "other", metavar="RUN_B", nargs="?", help="a second run, to compare with the first"
    )
    parser.add_argument(
        "--out", default="report.html", metavar="FILE", help="the page (default: %(default)s)"
    )
    parser.add_argument(
        "--curves", metavar="FILE", help="write only the learning curves, a PNG (default: off)"
    )
    parser.add_argument("--data", help="where the tasks are (default: as in the run)")
    parser.add_argument(
        "--tasks",
        type=number(int, 0),
        default=100,
        metavar="N",
        help="tasks answered for the gallery, a fixed sample; 0: no gallery (default: %(default)s)",
    )
    parser.add_argument(
        "--views",
        type=number(int, 1, 64),
        metavar="N",
        help=f"views that vote in the gallery (default: {VIEWS_CPU} on CPU, {VIEWS_GPU} on a GPU)",
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
    if args.curves and args.other:
        parser.error("--curves: it draws one run; leave the second out")
    return args


# ---------------------------------------------------------------------------------------------
# Curves as a PNG
# ---------------------------------------------------------------------------------------------


def draw_curves(record: Record) -> bytes:
    """The learning curves as a PNG: batches smoothed, validation as dots, the result a star."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "curves: the package matplotlib is missing. Install it: pip install matplotlib",
            EXIT_MISSING,
        ) from error

    canvas = Figure(figsize=(13, 6.4), layout="constrained")
    width = max(1, len(record.batches) // 40)
    results = record.results
    right, n = figure(results, "exact_at_2"), figure(results, "n")
    final = {
        "val_accuracy": right / n if right is not None and n else None,
        "cell_accuracy": figure(results, "cell_accuracy"),
        "size_accuracy": figure(results, "size_accuracy"),
    }
    ended = figure(results, "minutes")
    for axes, (title, key, epoch_key) in zip(canvas.subplots(2, 3).flat, CURVES, strict=True):
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
            if ended is not None and final[epoch_key] is not None:
                axes.plot(
                    ended,
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
    canvas.suptitle(record.name)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
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
# Answers for the gallery
# ---------------------------------------------------------------------------------------------


def sample_tasks(tasks: tuple[Task, ...], n: int) -> list[Task]:
    """A fixed sample of n tasks of which a test output is known."""
    import numpy as np

    known = [task for task in tasks if any(pair.output is not None for pair in task.tests)]
    order = np.random.default_rng(SAMPLE_SEED).permutation(len(known))[:n]
    return [known[i] for i in order]


def make_gallery(
    model: Model, record: Record, tasks: Sequence[Task], args: argparse.Namespace, device: str
) -> Gallery:
    """The model's answers to the tasks' test inputs, made as the final evaluation makes them; it
    sees no test output."""
    import torch

    from batches import evaluation_views
    from evaluation import (
        contested_scores,
        joined,
        predict_tasks,
        proposals_for,
        refined,
        without_outputs,
        work_bar,
    )
    from report_page import Gallery

    views = args.views or (VIEWS_CPU if device == "cpu" else VIEWS_GPU)
    dtype, _ = pick_precision("auto", device)
    at_once = share_cores(device, args.threads, model.system.one_thread)
    how: dict[str, Any] = {
        "task_index": model.task_index, "device": device, "dtype": dtype, "seed": model.seed,
        "at_once": at_once,
    }  # fmt: skip
    flags = record.arguments
    hide = no_bar(args.quiet)
    acceptance = flags.get("acceptance", "demonstrations")
    explained: dict[Key, Explained] = {}
    if tasks and flags.get("hypotheses", "on") == "on":
        explained = explain(tasks, hide)
    proposals = proposals_for(explained) if flags.get("demonstrations", "on") == "on" else None
    own_scores = None
    if explained and acceptance == "demonstrations":
        own_scores = contested_scores(model.system, tasks, explained, **how)
    torch.set_float32_matmul_precision("high")
    with work_bar("Answering", hide) as bar:
        network = predict_tasks(
            model.system,
            without_outputs(tasks),
            evaluation_views(views, model.seed),
            progress=lambda _, share: bar.update(100 * share),
            proposals=proposals,
            own_scores=own_scores,
            accept=acceptance != "off",
            **how,
        )
    steps = planning_steps(model, tasks, proposals, how)
    votes = joined(network, explained) if explained else refined(network)
    answers = [
        answer_of(task, i, network[task.task_id, i], votes[task.task_id, i],
                  explained.get((task.task_id, i)), steps[task.task_id, i])
        for task in tasks
        for i in range(len(task.tests))
    ]  # fmt: skip
    return Gallery(answers, how_made(model, record, answers, views, bool(explained), acceptance))


def explain(tasks: Sequence[Task], hide: bool) -> dict[Key, Explained]:
    """Hypotheses for the tasks' test inputs, fitted in processes of their own."""
    from tqdm import tqdm

    from evaluation import without_outputs
    from hypotheses import Fitter, workers_on

    fitter = Fitter(without_outputs(tasks), workers_on(cores()))
    try:
        with tqdm(
            total=len(tasks), desc="Hypotheses", unit="task", leave=False, disable=hide
        ) as bar:
            found = fitter.collect(waiting=lambda n: bar.update(n - bar.n))
    finally:
        fitter.close()
    if fitter.failed:
        print(
            f"warning: hypotheses for {fitter.n_first()} of {len(tasks)} tasks only: "
            f"{fitter.failed}",
            file=sys.stderr,
        )
    return found


def planning_steps(
    model: Model, tasks: Sequence[Task], proposals: Any, how: dict[str, Any]
) -> dict[Key, tuple[Grid, Grid, int]]:
    """(first, last, number of steps) of each query's planning in the first view, by query."""
    import numpy as np
    import torch

    from batches import View, evaluation_batches
    from evaluation import batch_bounds, without_outputs

    device, dtype = how["device"], how["dtype"]
    generator = torch.Generator(device=device).manual_seed(how["seed"])
    found: dict[Key, tuple[Grid, Grid, int]] = {}
    batches = evaluation_batches(
        without_outputs(tasks), View(), **batch_bounds(device),
        task_table=how["task_index"], proposals=proposals,
    )  # fmt: skip
    for batch in batches:
        with torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None):
            output = model.system.predict(batch.to(device), generator).before
        sizes, taken = output.size.tolist(), output.n_steps.tolist()
        grids = [output.grids(s).cpu().numpy() for s in (0, len(output.logits) - 1)]
        for row, (task_id, _, i) in enumerate(batch.pair_ids):
            rows, cols = sizes[row]
            first, last = (g[row, :rows, :cols].astype(np.uint8) for g in grids)
            found[task_id, i] = first, last, int(taken[row])
    return found


def answer_of(
    task: Task,
    number: int,
    network: Prediction,
    vote: Prediction,
    explained: Explained | None,
    steps: tuple[Grid, Grid, int],
) -> Answer:
    """What the gallery shows of one query. network: its own ballot; vote: the joint one."""
    import numpy as np

    from report_page import Answer

    truth = task.tests[number].output

    def exact(grid: Grid) -> bool:
        return truth is not None and np.array_equal(grid, truth)

    attempts = vote.attempts()
    mended = [not exact(c.before) and exact(c.after) for c in network.changes if c.accepted]
    spoilt = [exact(c.before) and not exact(c.after) for c in network.changes if c.accepted]
    alone = any(map(exact, network.attempts()))
    first = network.changes[0] if network.changes else None
    return Answer(
        task,
        number,
        attempts,
        [source_of(grid, network, explained) for grid in attempts],
        steps[:2],
        steps[2],
        None if first is None else (first.before, first.after, first.accepted),
        won=any(mended),
        lost=any(spoilt) or (alone and not any(map(exact, attempts))),
    )


def source_of(grid: Grid, network: Prediction, explained: Explained | None) -> str:
    """Where an answer comes from, in words: the best hypothesis that gives it, the network."""
    import numpy as np

    from evaluation import content

    own = network.candidates.get(content(grid))
    seen = f"the network alone says so in {own.votes} of {counted(network.views, 'view')}" if (
        own is not None and own.votes
    ) else ""  # fmt: skip
    same = [
        h for h in (explained.hypotheses if explained else ()) if np.array_equal(h.answer, grid)
    ]
    if same:
        best = same[0]
        tried = best.verdict.n_tried
        judged = (
            f"re-predicts {best.verdict.n_right} of {counted(tried, 'demonstration')}"
            if tried
            else "could not be tried on the demonstrations"
        )
        text = f'hypothesis "{best.words}" ({best.arm}; {judged}; size: {best.size_rule})'
        if len(same) > 1:
            text += f", and {counted(len(same) - 1, 'more way')} of fitting"
        return text + (f"; {seen}." if seen else "; the network alone does not say so.")
    if seen:
        return f"no hypothesis; {seen}."
    if own is not None:
        return "no hypothesis; an earlier planning step of the network."
    return "the network, with a hypothesis in sight that answers otherwise."


def how_made(
    model: Model,
    record: Record,
    answers: Sequence[Answer],
    views: int,
    with_hypotheses: bool,
    acceptance: str,
) -> str:
    """How the gallery's answers came about, and that they are not the headline."""
    if not answers:
        return "No task was answered for this page (--tasks 0, or no output is known)."
    n = len(answers)
    solved = sum(answer.solved for answer in answers)
    voters = "network and hypotheses" if with_hypotheses else "the network alone, no hypotheses"
    text = (
        f"{counted(n, 'test query', 'test queries')}, a fixed sample, answered for this page by "
        f"{model.path.name} (after {counted(model.n_batches, 'batch', 'batches')}) in "
        f"{counted(views, 'view')} and two attempts, {voters} voting as in the final evaluation "
        f"(acceptance: {acceptance}): {solved} solved."
    )
    of = figure(record.results, "n")
    if of:
        text += (
            f" This is a sample and not the headline, which counts {of:.0f} queries and may have "
            "had other views."
        )
    return text


# ---------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------


def tasks_of(args: argparse.Namespace, records: Sequence[Record]) -> TaskSet:
    """The tasks of the first run, or of --data; a warning for each run trained on others."""
    from dataset_arc import load_tasks

    data = args.data or records[0].arguments.get("data", "arcagi2")
    tasks = load_tasks(data, training=True)
    for record in records:
        if part(record.config, "data").get("sha256") not in (None, tasks.sha256):
            print(
                f"warning: {tasks.name} is not the data that {record.name} was trained on",
                file=sys.stderr,
            )
    return tasks


def run_report(args: argparse.Namespace) -> int:
    """From parsed arguments to the written file."""
    notes: list[str] = []
    folders = [expanded(spec) for spec in (args.run, args.other) if spec is not None]
    records = [read_record(find_run(folder, notes)) for folder in folders]
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if len(records) > 1 and records[0].folder.resolve() == records[1].folder.resolve():
        raise UserError(f"{args.other}: this is the first run again. Give another.", EXIT_ARGUMENTS)
    if args.curves:
        curves = draw_curves(records[0])
        write(args.curves, lambda path: atomic_write_bytes(path, curves))
        if not args.quiet:
            print(f"Wrote {args.curves}: curves of {len(records[0].batches)} batches")
        return EXIT_DONE
    galleries = make_galleries(args, records)
    text = page_of(records, galleries)
    write(args.out, lambda path: atomic_write_bytes(path, text.encode()))
    if not args.quiet:
        solved = [
            f"{sum(a.solved for a in gallery.answers)} of {len(gallery.answers)}"
            for gallery in galleries
        ]
        told = f"{' and '.join(solved)} sample queries solved" if args.tasks else "no gallery"
        print(f"Wrote {args.out}: {told}")
    return EXIT_DONE


def make_galleries(args: argparse.Namespace, records: Sequence[Record]) -> list[Gallery]:
    """A gallery a run; two runs answer the same tasks, those of the first."""
    from report_page import Gallery

    if not args.tasks:
        return [Gallery([], "No task was answered for this page (--tasks 0).") for _ in records]
    import torch

    device = pick_device(args.device)
    if args.threads:  # of a tiny model fewer later, see `share_cores`
        torch.set_num_threads(args.threads)
    chosen = sample_tasks(tasks_of(args, records).train, args.tasks)
    made = []
    for record in records:
        model = load_model(
            record.folder, checkpoint=args.checkpoint, device=device, offline=args.offline
        )
        for note in model.notes:
            print(f"warning: {note}", file=sys.stderr)
        made.append(make_gallery(model, record, chosen, args, device))
    return made


def page_of(records: Sequence[Record], galleries: Sequence[Gallery]) -> str:
    """The text of the page of one run, or of two."""
    from report_page import compare, render

    if len(records) == 1:
        return render(records[0], galleries[0])
    from evaluation import mcnemar

    return compare((records[0], records[1]), (galleries[0], galleries[1]), mcnemar)


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
