"""What a run scores, and when: the untrained model, validation, the final evaluation.

Every figure is that of the averaged weights, by `evaluation.evaluate`; here stands which queries
and views are counted, and what is kept of it: progress, metrics.jsonl, results.json. It trains
nothing. `import run_scores; run_scores.evaluate(run, tasks, keys, n_views)`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import evaluation
from arc_system import build_system
from batches import evaluation_views
from command_line import device_name, no_bar
from dataset_arc import Task, TaskSet, slices_of
from evaluation import Key
from hypotheses import Fitter
from model_persistence import ModelPersistence
from optimizers import WeightAverage
from run_lines import how_to_repeat, say_results
from run_state import VALIDATED, Run, StopRequested, is_over
from time_budget import FINAL_RESERVE_S, Limits

Slices = Mapping[str, AbstractSet[Key]]


def seen_tasks(tasks: TaskSet, hold_out: int | None) -> tuple[Task, ...]:
    """The training tasks, without every `hold_out`-th in their fixed order."""
    return tuple(t for i, t in enumerate(tasks.train, start=1) if not hold_out or i % hold_out)


@dataclass
class Plan:
    """What evaluation and the clock want of the loop."""

    tasks: TaskSet
    validation: set[Key]
    final: set[Key]
    slices: Slices = field(default_factory=dict)  # of the final queries, counted apart
    views: int = 1  # that vote in the final evaluation
    limits: Limits = field(default_factory=Limits)
    voted: dict[str, Any] | None = None  # the final evaluation, where the last validation was it


def make_plan(args: argparse.Namespace, tasks: TaskSet) -> Plan:
    """Which queries are validated after an epoch, and which are voted on at the end."""
    limit = args.val_pairs
    if args.max_batches:
        most = args.max_batches * args.batch_size
        limit = min(limit, most) if limit else most
    seen = seen_tasks(tasks, args.hold_out)
    validation = evaluation.validation_keys(seen, limit, args.seed)
    everything = evaluation.validation_keys(tasks.train, None, args.seed)
    return Plan(tasks, validation, validation if args.max_batches else everything)


def slices_in(plan: Plan, hold_out: int | None) -> Slices:
    """The parts of the data that the final evaluation reports apart."""
    slices: dict[str, AbstractSet[Key]] = dict(slices_of(plan.tasks))
    if hold_out:
        seen = {task.task_id for task in seen_tasks(plan.tasks, hold_out)}
        slices["seen"] = {key for key in plan.final if key[0] in seen}
        slices["held_out"] = plan.final - slices["seen"]
    return slices


def score_untrained(run: Run, plan: Plan, persistence: ModelPersistence) -> None:
    """Validate the model as it was before training, once; Accuracy Delta counts from there."""
    progress = run.progress
    counted = progress.untrained.get("n", len(plan.validation))
    if plan.validation and (progress.untrained_accuracy < 0 or counted != len(plan.validation)):
        begun = time.monotonic()
        first = before_training(run) if progress.total else run
        untrained = evaluate(first, plan.tasks, plan.validation, 1, title="Untrained model")
        if counted != len(plan.validation):
            aside = persistence.set_best_aside()
            progress.best = float("-inf")
            run.log.say(
                f"Validation: {len(plan.validation)} pairs now, {counted:g} before: the untrained "
                "model was measured again, and Accuracy Delta counts from there"
                + (f"; the best model on those before is {aside} now" if aside else ""),
                important=True,
            )
        run.clock.query_s = run.free_threads() * (time.monotonic() - begun) / len(plan.validation)
        progress.untrained_accuracy = untrained["cell_accuracy"]
        progress.untrained = {name: untrained[name] for name in VALIDATED}
        run.log.say(
            f"Untrained: cell accuracy {untrained['cell_accuracy']:.4f}, exact "
            f"{untrained['exact_at_1']}/{untrained['n']} of the validation pairs"
        )
        run.log.record({"kind": "start", "epoch": -1, "untrained": untrained})


def before_training(run: Run) -> Run:
    """The run with its modules as they were before the first batch: a function of the seed."""
    system = build_system(run.system.config, run.device, offline=run.args.offline)
    return replace(run, system=system, average=WeightAverage([], 0.0))


def evaluate(
    run: Run,
    tasks: TaskSet,
    keys: set[Key],
    n_views: int,
    *,
    slices: Slices | None = None,
    deadline: float | None = None,
    max_batches: int | None = None,
    fitter: Fitter | None = None,
    title: str = "Validation",
    by_task: bool = False,
) -> dict[str, Any]:
    """Score the averaged weights on the given queries; see `evaluation.evaluate`.

    Raises StopRequested after a signal.
    """
    args = run.args

    def heed_stop() -> None:
        if run.stop is not None and run.stop.requested:
            raise StopRequested

    def scored() -> dict[str, Any]:
        return evaluation.evaluate(
            run.system,
            tasks.train,
            keys,
            evaluation_views(n_views, args.seed),
            slices=slices,
            deadline=deadline,
            max_batches=max_batches,
            fitter=fitter,
            hypothesis_tasks=args.hypothesis_tasks,
            propose=args.demonstrations == "on",
            acceptance=args.acceptance,
            title=title,
            by_task=by_task,
            hide_bar=no_bar(args.quiet),
            heed_stop=heed_stop,
            say=run.log.say,
            task_index=run.stream.task_table,
            batch_size=None if run.device == "cpu" else 2 * args.batch_size,
            batch_cells=None if args.batch_cells is None else 4 * args.batch_cells,
            device=run.device,
            dtype=run.dtype,
            seed=args.seed,
            collator=run.collator,
            at_once=run.free_threads,
            ranks=run.ranks,
        )

    with run.average.applied():
        return run.ranks.gather_made(scored)[0]


def validate(run: Run, plan: Plan) -> dict[str, Any]:
    """The network alone on the validation queries, in one view, at the end of an epoch.

    Where the final evaluation comes next and asks the same queries in one view, it is made here
    and kept for `vote`: what the network answers first does not depend on proposals.
    """
    args = run.args
    last = run.progress.epoch + 1 >= args.epochs or is_over(run)
    in_full = plan.limits.deadline is None and args.vote_batches is None
    if last and in_full and plan.views == 1 and plan.validation == plan.final:
        result = final_scores(run, plan)
        plan.voted = result
        return result["alone"]["network"] if "alone" in result else result
    return evaluate(run, plan.tasks, plan.validation, 1)


def final_scores(run: Run, plan: Plan) -> dict[str, Any]:
    """The final evaluation's figures, of `evaluation.evaluate`."""
    until = plan.limits.deadline - FINAL_RESERVE_S if plan.limits.deadline is not None else None
    return evaluate(
        run,
        plan.tasks,
        plan.final,
        plan.views,
        slices=plan.slices,
        deadline=until,
        max_batches=run.args.vote_batches,
        fitter=run.fitter,
        title="Final voting",
        by_task=True,
    )


def vote(run: Run, plan: Plan) -> None:
    """The final evaluation: results.json, and what the console says of it."""
    args, progress = run.args, run.progress
    result = plan.voted or final_scores(run, plan)
    result |= {
        "untrained": progress.untrained,
        "validated": progress.validated,
        "views": plan.views,
        "seed": args.seed,
        "epoch": progress.epoch,
        "batch": progress.total,
        "minutes": (time.monotonic() - run.started) / 60,
        "trained_minutes": run.clock.train_s / 60,
        "device": device_name(run.device, run.at_once),
    }
    written = run.log.write_results(result)
    say_results(run, result, written)
    schedule = run.schedule
    if plan.limits.deadline is not None and schedule.stop_at is not None and run.device == "cpu":
        run.log.say(how_to_repeat(run, result))
