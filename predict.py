"""Answer ARC tasks with a trained run and write Kaggle's submission.json.

    python predict.py runs/arc_complete_20260101_120000 --data arcagi2 --split evaluation --score
    python predict.py best_model.pt --data arc-agi_test_challenges.json --out submission.json
    python predict.py --score_file submission.json --data arcagi2 --split evaluation

A checkpoint or an export is all it needs; it never writes to the run, not even when it adapts to
new tasks first (`adaptation`). The predictor gets tasks without their test outputs, which are read
afterwards alone, to score and to mark wrong cells in pictures. `--score_file` needs no model and no
torch. In a program of your own: `from trained_model import load_model, load_modules`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
from grid_pictures import Picture, answers_page, colours_of, in_terminal
from persistence.files import atomic_write_bytes, atomic_write_json
from submissions import Answers, checked, outcome_words, score, task_lines, total_lines
from trained_model import known_errors, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptation import Adapted
    from arc_system import System
    from dataset_arc import Task, TaskSet
    from evaluation import Key, Prediction

VIEWS_CPU, VIEWS_GPU = 4, 8  # guess: a CPU user waits for every view
ADAPT_BATCH = 8  # queries; as in training on a CPU
# What says nothing where no model answers.
OF_THE_MODEL = (
    "out", "checkpoint", "views", "batch_size", "hypotheses", "acceptance", "adapt_seconds",
    "adapt_batches", "adapt_parts", "device", "threads", "offline",
)  # fmt: skip
EXAMPLES = """examples:
  python predict.py runs --data my_task.json --show          answer one task, see the grids
  python predict.py runs --data arcagi2 --split evaluation --score --page answers.html
  python predict.py runs --data new_tasks.json --adapt_seconds 60
  python predict.py --score_file submission.json --data arcagi2 --split evaluation

"""


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(
        prog="predict.py",
        description="Answer ARC tasks with a trained run; writes Kaggle's submission.json.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES + "exit codes: 0 done, 1 unexpected, 2 arguments, 3 data/model/checkpoint "
        "missing or\nunreadable, or a submission that is not valid, 4 out of memory, 130 "
        "interrupted (nothing\nis written).",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="RUN_OR_MODEL",
        help="a run folder, a folder of runs (its newest run), best_model.pt, a checkpoint file or "
        "a folder of export.py",
    )
    parser.add_argument(
        "--data",
        default="arcagi2",
        help="arcagi2, arcagi1, a JSON file of one task or many, a Kaggle challenges file, a "
        "folder or a zip archive (default: %(default)s)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first task or file of --data that cannot be used (default: leave it out)",
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
        "--score_file",
        metavar="FILE",
        help="check and score this submission.json; takes no model (default: off)",
    )
    parser.add_argument(
        "--show",
        action="store_true",
        help="draw every test input and both attempts, wrong cells marked (!) where the output is "
        "known",
    )
    parser.add_argument(
        "--page",
        metavar="FILE",
        help="write such pictures as one HTML page, with demonstrations (default: off)",
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
        help="queries per batch at most (default: what suits the device)",
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
    outputs = (("--out", args.out), ("--score_json", args.score_json), ("--page", args.page))
    check_arguments(parser, args, [(flag, path) for flag, path in outputs if path is not None])
    if args.adapt_seconds and args.adapt_batches:
        parser.error("--adapt_seconds and --adapt_batches: give one of them")
    if args.score_file is None and args.model is None:
        parser.error("give a RUN_OR_MODEL that is to answer, or --score_file to score answers")
    if args.score_file is not None:
        if args.model is not None:
            parser.error(f"--score_file scores a file as it is: leave {args.model} out")
        unused = [name for name in OF_THE_MODEL if getattr(args, name) != parser.get_default(name)]
        if unused:
            parser.error(f"--{unused[0]} is for a model that answers; --score_file has none")
    files = [(f, os.path.realpath(path)) for f, path in outputs if path is not None]
    for i, (flag, path) in enumerate(files):
        for other, same in files[:i]:
            if path == same:
                parser.error(f"{other} and {flag} name the same file")
    args.score = args.score or args.score_json is not None or args.score_file is not None
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


def data_line(tasks: TaskSet, split: str, chosen: tuple[Task, ...]) -> str:
    """What is answered; the split is said where there are two."""
    which = f", {split}" if tasks.train and tasks.evaluation else ""
    n_inputs = sum(len(task.tests) for task in chosen)
    return (
        f"Data:   {tasks.name}{which}: {counted(len(chosen), 'task')}, "
        f"{counted(n_inputs, 'test input')}"
    )


def known_slices(tasks: TaskSet, split: str) -> Any:
    """The reporting slices, of the one set that has them."""
    from dataset_arc import slices_of

    return slices_of(tasks) if (tasks.name, split) == ("arcagi2", "train") else None


def submission(predictions: dict[Key, Prediction], tasks: tuple[Task, ...]) -> Answers:
    """Kaggle's format: every task id, every test input in order, two attempts each.

    Attempt 2 repeats attempt 1 only where the network has no second-best answer either.
    """
    answers: Answers = {}
    for task in tasks:
        answers[task.task_id] = []
        for i in range(len(task.tests)):
            grids = [grid.tolist() for grid in predictions[(task.task_id, i)].attempts(2)]
            answers[task.task_id].append({"attempt_1": grids[0], "attempt_2": grids[-1]})
    return answers


def say_line(text: str) -> None:
    """A line on stdout. Where its reader has gone, as `head` does, the work goes on in silence."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def pictures_of(
    answers: Answers, tasks: tuple[Task, ...], by_task: dict[str, Any]
) -> Iterator[tuple[str, list[Picture], list[Picture]]]:
    """(heading, input and both attempts and the known output, demonstrations) of every query."""
    for task in tasks:
        shown = []
        for i, pair in enumerate(task.demonstrations):
            shown.append(Picture(f"input {i}", pair.input.tolist()))
            if pair.output is not None:
                shown.append(Picture(f"output {i}", pair.output.tolist()))
        for i, pair in enumerate(task.tests):
            truth = None if pair.output is None else pair.output.tolist()
            pictures = [Picture("input", pair.input.tolist())]
            for name, grid in answers[task.task_id][i].items():
                pictures.append(Picture(name.replace("_", " "), grid, truth))
            if truth is not None:
                pictures.append(Picture("known output", truth))
            words = outcome_words(by_task[task.task_id][i])
            yield f"{task.task_id}, test {i}: {words}", pictures, shown


def hand_out(
    args: argparse.Namespace,
    answers: Answers,
    tasks: tuple[Task, ...],
    figures: dict[str, Any],
    more: Sequence[str] = (),
) -> None:
    """What --page, --score_json, --show and --score ask for: files first, then what is printed,
    totals last. figures: of `submissions.score`, as they go into the file; more: further totals."""
    totals = [*total_lines(figures), *more]
    if args.page:
        title = f"Answers of {args.score_file or args.model} to {args.data}"
        cards = pictures_of(answers, tasks, figures["by_task"])
        text = answers_page(title, totals, cards)
        write(args.page, lambda path: atomic_write_bytes(path, text.encode()))
    if args.score_json:
        write(args.score_json, lambda path: atomic_write_json(path, figures))
    for path in filter(None, (args.page, args.score_json)):
        if not args.quiet:
            say_line(f"Wrote {path}")
    if args.show:
        width = shutil.get_terminal_size().columns
        colours = colours_of(sys.stdout, os.environ) if sys.stdout else 0
        for heading, pictures, _ in pictures_of(answers, tasks, figures["by_task"]):
            for line in ("", heading, *in_terminal(pictures, width, colours)):
                say_line(line)
        say_line("")
    if args.score:
        for line in () if args.quiet else task_lines(figures["by_task"]):
            say_line(line)
        for line in totals:
            say_line(line)


def run_scoring(args: argparse.Namespace) -> int:
    """--score_file, from parsed arguments to the totals; returns the exit code.

    Raises UserError or DataError where the data cannot be read or the file is not valid.
    """
    from dataset_arc import load_tasks

    tasks = load_tasks(args.data, strict=args.strict)
    split, chosen = choose_split(tasks, args.split)
    other = tasks.train if split == "evaluation" else tasks.evaluation
    answers = checked(args.score_file, chosen, other)
    figures = score(answers, chosen, known_slices(tasks, split))
    for line in tasks.left_out:
        print(f"warning: {line}", file=sys.stderr)
    if not args.quiet:
        say_line(data_line(tasks, split, chosen))
        say_line(f"Valid:  {args.score_file}: every test input, two attempts each")
    about = {"submission": str(args.score_file), "data": tasks.name, "split": split}
    hand_out(args, answers, chosen, about | figures)
    return EXIT_DONE


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
        f"Adapted: {counted(n, 'task')}, {n_accepted} accepted, {n - n_accepted} refused{late}; "
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
    from dataset_arc import load_tasks
    from evaluation import (
        contested_scores,
        gains,
        gains_line,
        joined,
        mean_steps,
        predict_tasks,
        proposals_for,
        scores_alone,
        without_outputs,
        work_bar,
    )
    from hypotheses import Fitter, workers_on

    started = time.monotonic()
    device = pick_device(args.device)
    dtype, _ = pick_precision("auto", device)
    if args.threads:  # of a tiny model fewer later, see `share_cores`
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    on_cpu = device == "cpu"
    n_views = args.views or (VIEWS_CPU if on_cpu else VIEWS_GPU)

    def say(text: str) -> None:
        if not args.quiet:
            say_line(text)

    tasks = load_tasks(args.data, strict=args.strict)
    split, chosen = choose_split(tasks, args.split)
    model = load_model(args.model, checkpoint=args.checkpoint, device=device, offline=args.offline)
    at_once = share_cores(device, args.threads, model.system.one_thread)
    for note in model.notes:
        print(f"warning: {note}", file=sys.stderr)
    n_inputs = sum(len(task.tests) for task in chosen)
    n_known = sum(task.task_id in model.task_index for task in chosen)
    weights = "averaged weights" if model.averaged else "weights as they are"
    say(f"Model:  {model.path} ({counted(model.n_batches, 'batch', 'batches')}), {weights}")
    say(data_line(tasks, split, chosen))
    for line in tasks.found:
        say(f"        {line}")
    for line in tasks.left_out:
        print(f"warning: {line}", file=sys.stderr)
    say(f"        {counted(n_known, 'task')} known from training, {len(chosen) - n_known} unseen")
    say(f"Device: {device}, {counted(n_views, 'view')}")

    hide_bar = no_bar(args.quiet)
    adapting = bool(args.adapt_seconds or args.adapt_batches)
    fitter, workers = None, 0
    if args.hypotheses == "on":
        workers = workers_on(cores() - adapting)
        fitter = Fitter(without_outputs(chosen), workers)
    adapted = None
    if adapting:
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
                at_once=max(1, at_once - workers),
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
            "batch_size": args.batch_size, "at_once": at_once,
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
    seconds = time.monotonic() - started
    say(f"Wrote {args.out}: {counted(n_inputs, 'answer')} in {seconds:.1f} s")
    if args.score or args.show or args.page:
        figures = score(answers, chosen, known_slices(tasks, split) if args.score else None)
        figures["planning_steps"] = mean_steps(predictions.values())
        known = figures["n"] and explained
        figures["alone"] = scores_alone(network, explained, chosen, predictions) if known else {}
        figures["gains"] = gains(network, chosen)
        more = [
            f"  {part} alone: {counts['exact_at_2']}/{figures['n']} ({counts['exact_at_1']} in one)"
            for part, counts in figures["alone"].items()
        ]
        if known:
            more.append("  " + gains_line(figures["gains"], args.acceptance != "off"))
        about: dict[str, Any] = {"model": str(model.path), "data": tasks.name, "split": split}
        about |= {"views": n_views, "seconds": seconds}
        hand_out(args, answers, chosen, about | figures, more)
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """The script: parse, predict, and return an exit code."""
    args = parse_arguments(argv)
    if args.score_file is not None:
        return guarded(lambda: run_scoring(args), "Score fewer tasks.", data_errors)
    return guarded(
        lambda: run_prediction(args),
        "Use a smaller --batch_size.",
        known_errors,
        "interrupted; nothing was written",
    )


def data_errors() -> tuple[type[Exception], ...]:
    """The errors of data alone: those of models would import torch."""
    from dataset_arc import DataError

    return (DataError,)


if __name__ == "__main__":
    sys.exit(main())
