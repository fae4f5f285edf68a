"""What a run says on console and training.log: banner, batch lines, epoch summaries, final results.

The first four fields of a batch line and the summary's first lines are a contract that other
programs read; new fields come after them. It computes nothing and writes no files of its own.
`from run_lines import banner, log_batch, say_epoch, say_results`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from command_line import counted, thread_words
from dataset_arc import TaskSet
from evaluation import gains_line
from health import FEW_BATCHES
from hypotheses import Fitter
from kept_hypotheses import is_ours
from loss_function import PARTS
from run_state import REWARD_FIGURES, Run


def banner(run: Run, tasks: TaskSet, folder: Path | None, found: list[str]) -> None:
    """What is about to run, in a few lines. found: how the run to resume was found."""
    args, say = run.args, run.log.say
    n_agent = sum(p.numel() for p in run.system.agent.parameters())
    precision = "fp32" if run.dtype is None else str(run.dtype).removeprefix("torch.")
    n_pairs = sum(len(task.demonstrations) for task in tasks.train)
    n_tests = sum(len(task.tests) for task in tasks.train)
    n_tasks = counted(len(tasks.train), "task")
    say(f"Data:   {tasks.name}: {n_tasks}, Train: {n_pairs}, test pairs: {n_tests}")
    skipped = run.stream.n_skipped_single + run.stream.n_skipped_large
    if skipped:
        say(
            f"        trained on {run.stream.n_pairs} pairs an epoch; {counted(skipped, 'task')} "
            f"left out ({run.stream.n_skipped_large} above --max_side {args.max_side}, "
            f"{run.stream.n_skipped_single} with one demonstration only)"
        )
    for line in tasks.found:
        say(f"        {line}")
    for warning in (*tasks.left_out, *tasks.warnings):
        say(f"        warning: {warning}")
    say(f"Qwen:   {run.system.qwen.description()}")
    say(
        f"Agent:  {n_agent / 1e6:.2f} M parameters, width {args.width}, {args.planning_steps} steps"
    )
    several = f", {run.ranks.world} processes" if run.ranks.many else ""
    say(f"Device: {run.device}, {precision}, {thread_words(run.at_once)}{several}")
    say(f"Run:    {folder}" if folder is not None else "Run:    nothing is written (--dry_run)")
    for note in args.notes:
        say(note)
    for note in found:
        say(note, important=True)


def log_batch(run: Run, figures: dict[str, float]) -> None:
    """The batch line of the contract, and beneath it what explains it and how the batches since the
    line before went on average."""
    say = run.log.say
    head = f"[Batch {run.progress.batch:4d}] "
    say(
        f"{head}Reward: {figures['reward']:+.4f} | "
        f"Loss: {figures['loss']:.4f} | Qwen_grad: {figures['qwen_grad']:.2e} | "
        f"Mask_ratio: {figures['mask_ratio']:.4f}"
    )
    notes = [] if figures["fits_frac"] else ["sizes only: no output fits the canvas of its input"]
    notes += [qwen_note(run, figures["qwen_grad"])] if not figures["qwen_grad"] else []
    for note in notes:
        say(" " * len(head) + note)
    recent = run.recent.means()
    if run.progress.batch and recent:
        say(
            " " * len(head) + f"last {len(run.recent.rows)} on average: "
            f"reward {recent['reward']:+.4f}, d_acc {recent['d_acc']:+.4f}, "
            f"loss {recent['loss']:.4f}, exact {recent['exact']:.3f}"
        )


def bar_figures(run: Run) -> dict[str, str]:
    """What a training bar carries: the last batches' loss and exact grids, on average."""
    recent = run.recent.means()
    return {"loss": f"{recent['loss']:.2f}", "exact": f"{recent['exact']:.2f}"} if recent else {}


def qwen_note(run: Run, gradient: float) -> str:
    """Why the language model has no gradient, for the line of a 0; empty if it has one."""
    if gradient:
        return ""
    why = run.system.qwen.without_gradient()
    return f"Qwen: {why.value if why else 'no gradient!'}"


def say_epoch(run: Run, mean: dict[str, float]) -> None:
    """The summary block of an epoch, from the means of its batches' figures."""
    say = run.log.say
    line = "=" * 70
    say(line)
    say(f"EPOCH {run.progress.epoch} SUMMARY")
    say(line)
    say(f"  Average Loss: {mean['loss']:.4f}")
    say(f"  Average RL Reward: {mean['reward']:+.4f}")
    why = qwen_note(run, mean["qwen_grad"])
    say(f"  Qwen Gradient Norm: {mean['qwen_grad']:.2e}" + (f" | {why}" if why else ""))
    weight = run.curriculum.get_size_loss_weight(run.progress.epoch)
    say(f"  Size Warmup Weight: {weight:.3f}")
    say(f"  Memory Threshold: {run.threshold.get_threshold():.4f}")
    say(f"  Memory updates: {run.progress.memory_updates}")
    say(f"  Average Mask Ratio: {mean['mask_ratio']:.4f}")
    say(f"  Average EFE Loss: {mean['efe']:.4f}")
    parts = (f"{part} {mean[f'efe_{part}']:.4f}" for part in PARTS)
    say("  Average EFE parts: " + ", ".join(parts))
    deltas = (f"{name} {mean[name]:+.4f}" for name in REWARD_FIGURES)
    say("  Average reward parts: " + ", ".join(deltas))
    say(line)


def say_results(run: Run, result: dict[str, Any], written: bool) -> None:
    """What results.json holds, in a few lines.

    written: it is on the disk; else the console has all of it, even with --quiet.
    """
    important = not written
    run.log.say(
        f"Final: {result['exact_at_2']}/{result['n']} exact in two attempts, "
        f"{result['exact_at_1']} in one; size {result['size_accuracy']:.3f}, cells "
        f"{result['cell_accuracy']:.3f}; {result['minutes']:.1f} minutes",
        important=True,
    )
    budget, n = run.args.time_budget, result["batch"]
    over = result["minutes"] - budget if budget else 0.0
    run.log.say(
        f"       trained {counted(n, 'batch', 'batches')} in "
        f"{result['trained_minutes']:.1f} minutes; {result['views_done']:.1f} views on average"
        + (f"; --time_budget {budget:g} overrun by {60 * over:.0f} s" if over > 0 else ""),
        important=important or over > 0,
    )
    if budget and n < FEW_BATCHES:
        run.log.warn(
            f"warning: {n} trained {'batch is' if n == 1 else 'batches are'} too few to learn "
            "from; give --time_budget more minutes"
        )
    for name, counts in result["slices"].items():
        run.log.say(f"       {name}: {counts['exact_at_2']}/{counts['n']}", important=important)
    for part, counts in result.get("alone", {}).items():
        line = f"       {part} alone: {counts['exact_at_2']}/{result['n']} (both: "
        line += f"+{counts['both_won']} -{counts['both_lost']}, McNemar p = {counts['p']:.2g})"
        reached = result["network_queries" if part == "network" else "hypothesis_queries"]
        if reached < result["n"]:  # the time did not do for all: no comparison
            line = f"       {part} alone: {counts['exact_at_2']} exact of the {reached} reached"
        run.log.say(line, important=important)
    if run.progress.untrained:
        start, end = run.progress.untrained, run.progress.validated
        run.log.say(
            f"       untrained network, one view: {start['exact_at_1']}/{start['n']} of the "
            "validation pairs" + (f"; trained: {end['exact_at_1']}/{end['n']}" if end else ""),
            important=important,
        )
    if "gains" in result:
        run.log.say(
            "       " + gains_line(result["gains"], result["acceptance"] != "off"),
            important=important,
        )
    if run.fitter is not None:
        run.log.say(
            f"       hypotheses for {result['hypothesis_queries']}/{result['n']}, the network for "
            f"{result['network_queries']}/{result['n']}",
            important=important,
        )


def known_line(run: Run, fitter: Fitter) -> str:
    """What of the hypotheses a resumed run need not fit again."""
    if not is_ours(run.kept_hypotheses):
        return "Hypotheses: the checkpoint's are of another version of the rules; fitted anew"
    whose = " of this process" if run.ranks.many else ""
    return f"Hypotheses: {fitter.n_known} of {fitter.n_tasks} tasks{whose} are in the checkpoint"


def fitted_again(run: Run) -> str:
    """What a stop of several processes costs beside the training: the checkpoint is the first
    one's."""
    line = (
        "Hypotheses that the other processes have fitted are in no file; the resumed run fits them "
        "again"
    )
    if run.args.time_budget:
        line += ", in what is left of its --time_budget: fewer of them may vote at the end"
    return line + "."


def how_to_repeat(run: Run, result: dict[str, Any]) -> str:
    """The flags that repeat a run that the clock cut, in place of --time_budget."""
    schedule = run.schedule
    assert schedule.stop_at is not None
    end_at = min(run.progress.total, schedule.stop_at)
    return (
        "The same again, bit for bit on this CPU: in place of --time_budget, "
        f"--schedule_batches {schedule.decay_start}:{schedule.stop_at}:{end_at} "
        f"--eval_views {result['views']} --vote_batches {result['batches_done']}"
        + hypothesis_flags(run.args, result)
    )


def hypothesis_flags(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """What else repeats the voting of a run that the clock cut."""
    if "hypothesis_tasks" not in result:
        return ""
    first, last = result["hypothesis_tasks"]
    return f" --hypothesis_tasks {first}:{last} --acceptance {args.acceptance}"
