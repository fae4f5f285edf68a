"""How a --time_budget is kept: the shares of training and voting, and when the learning rate falls.

What the clock has decided is kept as batch numbers, in the schedule and in the progress, and not
decided again: so the run can be resumed and repeated bit for bit. It trains and scores
nothing. `from time_budget import Limits, share_time, out_of_time`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from command_line import MOST_AT_ONCE
from ranks import ALONE, Ranks
from run_state import Run

# All but the first are guesses.
FINAL_RESERVE_S = 6.0  # seconds kept for saving and leaving at the end
VOTING_FRAC = 0.25  # of the budget, what voting gets at most: the rest trains
ONE_VIEW_FRAC = 0.4  # of the budget, what it gets at most where one view alone needs more
VIEWS_MARGIN = 1.2  # on what its views take at the validation's speed, measured on fewer queries
ONE_VIEW_MARGIN = 1.3  # the same of the first view, which may have to be whole
LEAST_TRAINING_FRAC = 0.5  # of what is left, what training gets at least, voting in time or not
SPEED_BATCHES = 10  # of this process, before their mean time is believed
DECAY_MARGIN = 0.98  # of the batches that fit by that time, so that the rate reaches 0 within it


@dataclass
class Limits:
    """Instants of time.monotonic(); None: there is no such limit."""

    train_until: float | None = None  # training has to end
    deadline: float | None = None  # the process should be done
    ranks: Ranks = ALONE  # the first one's clock decides for all


def share_time(run: Run, limits: Limits, n_queries: int, views: int) -> None:
    """Set until when training may go on, so that `views` of the final queries are voted on by the
    deadline; without one nothing is set."""
    args, deadline = run.args, limits.deadline
    if deadline is None:
        return
    # Voting gets what it needs for its views, but at most VOTING_FRAC of the whole budget, or what
    # one view needs up to ONE_VIEW_FRAC. Training gets LEAST_TRAINING_FRAC of what is left at
    # least. With hypotheses, which answer without the network, the deadline cuts the first view,
    # too; without them that one is always whole.
    budget_s = 60 * args.time_budget
    # by then hypotheses are fitted, as a rule, and all threads answer
    view_s = run.clock.query_s * n_queries / min(run.at_once, MOST_AT_ONCE)
    one_view_s = ONE_VIEW_MARGIN * view_s
    if run.fitter is not None:
        one_view_s = min(one_view_s, ONE_VIEW_FRAC * budget_s)
    share = max(min(VIEWS_MARGIN * views * view_s, VOTING_FRAC * budget_s), one_view_s)
    now = time.monotonic()
    end = deadline - FINAL_RESERVE_S
    until = end - share
    limits.train_until = max(until, now + LEAST_TRAINING_FRAC * (end - now))
    minutes = (limits.train_until - run.started) / 60
    run.log.say(
        f"Time:   training ends after {minutes:.1f} of {args.time_budget:g} minutes, voting follows"
    )
    if limits.train_until > until and run.fitter is None:
        over = limits.train_until + one_view_s + FINAL_RESERVE_S - deadline
        run.log.say(
            f"This machine needs about {view_s:.0f} s for one view of the final evaluation: "
            f"--time_budget {args.time_budget:g} will be overrun by about {max(0.0, over):.0f} s",
            important=True,
        )


def out_of_time(limits: Limits) -> bool:
    """Whether training has to end by the clock."""
    if limits.train_until is None:
        return False
    ranks, late = limits.ranks, time.monotonic() >= limits.train_until
    return bool(ranks.highest(int(ranks.first and late)))


def batches_expected(run: Run, limits: Limits, n_batches: int) -> int:
    """How many batches of the epoch there will be, of n_batches: fewer where the schedule or the
    clock ends training before; by the mean speed of this process."""
    progress, schedule = run.progress, run.schedule
    ends = [end for end in (schedule.stop_at, schedule.end_at) if end is not None]
    here = progress.total - run.resumed_at
    if ends:
        left = min(ends) - progress.total
    elif limits.train_until is not None and here:
        now = time.monotonic()
        left = int((limits.train_until - now) * here / max(1e-9, now - run.train_started))
    else:
        return n_batches
    return min(n_batches, progress.batch + max(0, left))


def note_time(run: Run, limits: Limits) -> None:
    """Keep in the checkpoints that time ended training, so that no resume goes on by itself."""
    if out_of_time(limits):
        run.progress.spent_budget = run.args.time_budget


def plan_decay(run: Run, limits: Limits) -> None:
    """Fix the decay's start and end in batches, once, when its share of the time has come."""
    schedule, progress = run.schedule, run.progress
    if schedule.kind != "wsd" or schedule.decay_start is not None or limits.train_until is None:
        return
    now = time.monotonic()
    left = limits.train_until - now
    here = progress.total - run.resumed_at  # batches of this process
    if here < SPEED_BATCHES:
        return
    per_batch_s = (now - run.train_started) / here
    fit = max(1, int(DECAY_MARGIN * left / per_batch_s))
    if left > run.args.decay_frac * (limits.train_until - run.started):
        fit = 0
    fit = run.ranks.of_first(fit)
    if not fit:
        return
    schedule.decay_start = progress.total
    schedule.stop_at = progress.total + fit
    run.log.say(f"Learning rate falls to 0 from batch {schedule.decay_start} to {schedule.stop_at}")
