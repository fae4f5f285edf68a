"""Answer ARC tasks with a trained run and write Kaggle's submission.json.

    python predict.py runs/arc_complete_20260101_120000 --data arcagi2 --split evaluation --score
    python predict.py best_model.pt --data arc-agi_test_challenges.json --out submission.json

A checkpoint is all it needs; it never writes to the run, not even when it adapts to new tasks first
(`adaptation`). The predictor gets tasks without their test outputs, which only `--score` reads,
afterwards. In a program of your own: `from trained_model import load_model, load_modules`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
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
from persistence.files import atomic_write_bytes, atomic_write_json
from trained_model import known_errors, load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptation import Adapted
    from arc_system import System
    from dataset_arc import Task, TaskSet
    from evaluation import Key, Prediction

VIEWS_CPU, VIEWS_GPU = 4, 8  # guess: a CPU user waits for every view
BATCH_CPU, BATCH_GPU = 16, 256  # queries; as in the evaluations of training
ADAPT_BATCH = 8  # queries; as in training on a CPU


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(
        prog="predict.py",
        description="Answer ARC tasks with a trained run; writes Kaggle's submission.json.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 1 unexpected, 2 arguments, 3 data/model/checkpoint missing or\n"
        "unreadable, 4 out of memory, 130 interrupted (nothing is written).",
    )
    parser.add_argument(
        "model",
        metavar="RUN_OR_MODEL",
        help="a run folder, a folder of runs (its newest run), best_model.pt or a checkpoint file",
    )
    parser.add_argument(
        "--data",
        default="arcagi2",
        help="arcagi2, arcagi1, a JSON file of one task or many, a Kaggle challenges file or a "
        "folder (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        choices=("train", "evaluation"),
        help="which tasks of the data (default: evaluation, or train where there are no others)",
    )
    parser.add_argument(
        "--out",
        default="submission.json",
        metavar="FILE",
        help="where the answers go (default: %(default)s)",
    )
    parser.add_argument(
        "--score",
        action="store_true",
        help="compare with the outputs that are known: per output, per task, in total",
    )
    parser.add_argument(
        "--score_json", metavar="FILE", help="write the scores there; means --score (default: off)"
    )
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest, best or a checkpoint's number; for a run (default: %(default)s)",
    )
    parser.add_argument(
        "--views",
        type=number(int, 1, 64),
        metavar="N",
        help=f"views that vote (default: {VIEWS_CPU} on CPU, {VIEWS_GPU} on a GPU)",
    )
    parser.add_argument(
        "--batch_size",
        type=number(int, 1),
        help=f"queries per batch (default: {BATCH_CPU} on CPU, {BATCH_GPU} on a GPU)",
    )
    parser.add_argument(
        "--hypotheses",
        choices=("on", "off"),
        default="on",
        help="exact rules fitted to the demonstrations, from whose answers the policy chooses "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--acceptance",
        choices=("demonstrations", "full", "off"),
        default="demonstrations",
        help="what a refinement needs; demonstrations: its way of fitting re-predicts more of them "
        "from the others than the network does; full: all of them; off: nothing (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--adapt_seconds",
        type=number(float, 0.1),
        metavar="S",
        help="first train a copy on the demonstrations of unseen tasks, for so long with judging; "
        "it answers the tasks whose demonstrations, held out of it, come out better (default: off)",
    )
    parser.add_argument(
        "--adapt_batches",
        type=number(int, 1),
        metavar="N",
        help="the same for so many batches in each of its four trainings (three judge, one "
        "answers), which can be repeated bit for bit (default: off)",
    )
    parser.add_argument(
        "--adapt_parts",
        choices=("tokens", "all"),
        default="all",
        help="what learns then: the new tasks' own tokens, or all weights but the language model's "
        "(default: %(default)s)",
    )
    add_process_arguments(parser, "totals and errors only")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, checked as far as is possible without torch."""
    parser = build_parser()
    args = parser.parse_args(argv)
    outputs = (("--out", args.out), ("--score_json", args.score_json))
    check_arguments(parser, args, [(flag, path) for flag, path in outputs if path is not None])
    if args.adapt_seconds and args.adapt_batches:
        parser.error("--adapt_seconds and --adapt_batches: give one of them")
    args.score = args.score or args.score_json is not None
    return args


# ---------------------------------------------------------------------------------------------
# Answers and scores
# ---------------------------------------------------------------------------------------------


def choose_split(tasks: TaskSet, split: str | None) -> tuple[str, tuple[Task, ...]]:
    """The name and tasks of the wanted split; the evaluation tasks, if any, by default."""
    if split is None:
        split = "evaluation" if tasks.evaluation else "train"
    chosen = tasks.evaluation if split == "evaluation" else tasks.train
    if not chosen:
        other = "train" if split == "evaluation" else "evaluation"
        raise UserError(
            f"{tasks.name}: no tasks in the split '{split}'. Use --split {other}, which holds "
            f"{len(tasks.evaluation or tasks.train)}.",
            EXIT_MISSING,
        )
    return split, chosen


def submission(predictions: dict[Key, Prediction], tasks: tuple[Task, ...]) -> dict[str, Any]:
    """Kaggle's format: every task id, every test input in order, two attempts each.

    Where all views agreed there is one candidate, and attempt 2 repeats it.
    """
    answers: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        answers[task.task_id] = []
        for i in range(len(task.tests)):
            grids = [grid.tolist() for grid in predictions[(task.task_id, i)].attempts(2)]
            answers[task.task_id].append({"attempt_1": grids[0], "attempt_2": grids[-1]})
    return answers


def score_report(
    predictions: dict[Key, Prediction], tasks: tuple[Task, ...], slices: Any
) -> tuple[dict[str, Any], list[str], list[str]]:
    """(figures for a file, one line per task with each of its outputs, lines of totals)."""
    from evaluation import outcomes, score

    totals = score(predictions, tasks, slices)
    found = outcomes(predictions, tasks)
    lines, by_task = [], {}
    unknown = 0
    for task in tasks:
        known = [found.get((task.task_id, i)) for i in range(len(task.tests))]
        unknown += sum(outcome is None for outcome in known)
        states = []
        for i, outcome in enumerate(known):
            if outcome is None:
                states.append(f"test {i}: no known output")
            elif outcome.exact:
                states.append(f"test {i}: exact in attempt {1 if outcome.attempt_1 else 2}")
            elif outcome.size:
                states.append(f"test {i}: wrong, {100 * outcome.cells:.1f}% of cells")
            else:
                states.append(f"test {i}: wrong size")
        scored = [outcome for outcome in known if outcome is not None]
        right = sum(outcome.exact for outcome in scored)
        mark = "solved" if scored and right == len(scored) else "      "
        mark = mark if scored else "unknown"
        lines.append(f"{task.task_id:<10} {mark:<7} {right}/{len(scored)}  " + "; ".join(states))
        by_task[task.task_id] = [
            None if o is None else {**o._asdict(), "exact": o.exact} for o in known
        ]
    n = totals["n"]
    if not n:
        ends = [f"Nothing to score: none of the {unknown} test inputs has a known output."]
    else:
        ends = [
            f"Outputs: {totals['exact_at_2']}/{n} exact in two attempts "
            f"({100 * totals['exact_at_2'] / n:.2f}%), {totals['exact_at_1']} in one; size right "
            f"{100 * totals['size_accuracy']:.1f}%, cells {100 * totals['cell_accuracy']:.1f}%",
            f"Tasks:   {totals['tasks_solved']}/{totals['tasks']} solved: every known output "
            "exact in two attempts",
        ]
        if unknown:
            ends.append(f"Not scored: {unknown} test inputs without a known output")
        for name, c in totals["slices"].items():
            ends.append(f"  {name:<11} {c['exact_at_2']}/{c['n']}  ({c['exact_at_1']} in one)")
    return {**totals, "unknown": unknown, "by_task": by_task}, lines, ends


def adaptation_report(adapted: Adapted) -> list[str]:
    """What adaptation did, and what its own measure says; for the console."""
    before, after, n = adapted.before, adapted.after, len(adapted.before)
    if not n:
        return ["Adapted: no task; none is unseen with two demonstrations"]
    n_accepted = len(adapted.accepted)
    late = f", {adapted.n_late} more had no time" if adapted.n_late else ""
    exact = [sum(m.exact for m in measures.values()) for measures in (before, after)]
    cells = [sum(m.cells for m in measures.values()) / n for measures in (before, after)]
    return [
        f"Adapted: {n} tasks, {n_accepted} accepted, {n - n_accepted} refused{late}; "
        f"{adapted.n_batches} batches",
        f"         their demonstrations, held out: {exact[0]} -> {exact[1]} exact, cells "
        f"{100 * cells[0]:.1f}% -> {100 * cells[1]:.1f}%",
    ]


def run_prediction(args: argparse.Namespace) -> int:
    """From parsed arguments to the written submission; returns the exit code.

    Raises UserError, DataError, ModelError or PersistenceError, with what to do, where data or
    model are missing or unreadable, and UserError where `--out` cannot be written.
    """
    import torch
    from tqdm import tqdm

    from batches import evaluation_views
    from dataset_arc import load_tasks, slices_of
    from evaluation import (
        contested_scores,
        gains,
        gains_line,
        joined,
        predict_tasks,
        proposals_for,
        scores_alone,
        without_outputs,
        work_bar,
    )
    from hypotheses import Fitter

    started = time.monotonic()
    device = pick_device(args.device)
    dtype, _ = pick_precision("auto", device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    on_cpu = device == "cpu"
    n_views = args.views or (VIEWS_CPU if on_cpu else VIEWS_GPU)

    def say(text: str, *, important: bool = False) -> None:
        if important or not args.quiet:
            print(text, flush=True)

    tasks = load_tasks(args.data)
    split, chosen = choose_split(tasks, args.split)
    model = load_model(args.model, checkpoint=args.checkpoint, device=device, offline=args.offline)
    for note in model.notes:
        print(f"warning: {note}", file=sys.stderr)
    n_inputs = sum(len(task.tests) for task in chosen)
    n_known = sum(task.task_id in model.task_index for task in chosen)
    weights = "averaged weights" if model.averaged else "weights as they are"
    say(f"Model:  {model.path} ({model.n_batches} batches), {weights}")
    say(f"Data:   {tasks.name}, {split}: {len(chosen)} tasks, {n_inputs} test inputs")
    say(f"        {n_known} tasks known from training, {len(chosen) - n_known} unseen")
    say(f"Device: {device}, {n_views} views")

    hide_bar = no_bar(args.quiet)
    fitter = Fitter(without_outputs(chosen)) if args.hypotheses == "on" else None
    adapted = None
    if args.adapt_seconds or args.adapt_batches:
        from adaptation import adapt

        percent = tqdm(total=100, desc="Adapting", unit="%", leave=False, disable=hide_bar)
        with percent:
            adapted = adapt(
                model.system,
                without_outputs(chosen),
                model.task_index,
                seconds=args.adapt_seconds,
                n_batches=args.adapt_batches,
                parts=args.adapt_parts,
                batch_size=args.batch_size or ADAPT_BATCH,
                seed=model.seed,
                device=device,
                dtype=None if dtype is torch.float16 else dtype,  # it would need a scaler
                progress=lambda share: percent.update(int(100 * share) - percent.n),
            )
        for line in adaptation_report(adapted):
            say(line)

    explained: dict[Key, Any] = {}
    if fitter is not None:
        with tqdm(
            total=len(chosen), desc="Hypotheses", unit="task", leave=False, disable=hide_bar
        ) as fitting:
            explained = fitter.collect(waiting=lambda n: fitting.update(n - fitting.n))
        fitter.close()
        if fitter.failed:
            print(
                f"warning: hypotheses for {fitter.n_first()} of {len(chosen)} tasks only: "
                f"{fitter.failed}",
                file=sys.stderr,
            )
    offered = proposals_for(explained)

    def answers_of(
        system: System, tasks: Sequence[Task], task_index: dict[str, int], title: str
    ) -> dict[Key, Prediction]:
        how: dict[str, Any] = {
            "task_index": task_index, "device": device, "dtype": dtype, "seed": model.seed,
            "batch_size": args.batch_size or (BATCH_CPU if on_cpu else BATCH_GPU),
        }  # fmt: skip
        own_scores = None
        if args.acceptance == "demonstrations":
            own_scores = contested_scores(system, tasks, explained, **how)
        with work_bar(title, hide_bar) as bar:
            return predict_tasks(
                system,
                without_outputs(tasks),
                evaluation_views(n_views, model.seed),
                progress=lambda _, share: bar.update(100 * share),
                proposals=offered,
                own_scores=own_scores,
                accept=args.acceptance != "off",
                **how,
            )

    predictions = answers_of(model.system, chosen, model.task_index, "Predicting")
    if adapted is not None and adapted.accepted:
        some = [task for task in chosen if task.task_id in adapted.accepted]
        predictions |= answers_of(adapted.system, some, adapted.task_index, "Predicting again")
    network = predictions
    predictions = joined(predictions, explained)
    answers = submission(predictions, chosen)
    write(args.out, lambda path: atomic_write_bytes(path, json.dumps(answers).encode()))
    say(f"Wrote {args.out}: {n_inputs} answers in {time.monotonic() - started:.1f} s")
    if args.score:
        slices = slices_of(tasks) if (tasks.name, split) == ("arcagi2", "train") else None
        figures, lines, totals = score_report(predictions, chosen, slices)
        for line in lines:
            say(line)
        for line in totals:
            say(line, important=True)
        known = figures["n"] and explained
        figures["alone"] = scores_alone(network, explained, chosen, predictions) if known else {}
        figures["gains"] = gains(network, chosen)
        for part, counts in figures["alone"].items():
            say(
                f"  {part} alone: {counts['exact_at_2']}/{figures['n']} "
                f"({counts['exact_at_1']} in one)",
                important=True,
            )
        if known:
            say("  " + gains_line(figures["gains"], args.acceptance != "off"), important=True)
        if args.score_json:
            about: dict[str, Any] = {"model": str(model.path), "data": tasks.name, "split": split}
            about |= {"views": n_views, "seconds": time.monotonic() - started}
            write(args.score_json, lambda path: atomic_write_json(path, about | figures))
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """The script: parse, predict, and return an exit code."""
    args = parse_arguments(argv)
    return guarded(
        lambda: run_prediction(args),
        "Use a smaller --batch_size.",
        known_errors,
        "interrupted; nothing was written",
    )


if __name__ == "__main__":
    sys.exit(main())
