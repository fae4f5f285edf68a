"""Breakages of the wiring of a run's clock, lines, scores and monitor, for `wiring_mutants.py`.

`from watch_table import WATCH`.
"""

from __future__ import annotations

from wiring_table import SCORES, STATE, SYSTEM, Mutant, T

WATCH = [
    Mutant(
        "50 nothing is taken into the moving average",
        T,
        "            run.recent.add(figures)\n",
        "",
        "run_lines: every_fifty",
    ),
    Mutant(
        "50 the bar expects the whole epoch",
        T,
        "total=batches_expected(run, plan.limits, n_batches),",
        "total=n_batches,",
        "wiring: terminal_shows",
    ),
    Mutant(
        "50 minutes of earlier epochs are not counted",
        T,
        "    run.clock.train_s += run.clock.epoch_s\n",
        "",
        "time_budget: repeated_bit",
    ),
    Mutant(
        "50 the last validation is taken from the answers with proposals",
        SCORES,
        'return result["alone"]["network"] if "alone" in result else result',
        "return result",
        "wiring: both_ask",
    ),
    Mutant(
        "49 batches are not watched",
        T,
        "            watch_batch(run, persistence, figures)\n",
        "",
        "health: colour",
    ),
    Mutant(
        "49 epochs are not watched",
        T,
        "    watch_epoch(run, persistence, row)\n",
        "",
        "health: stands",
    ),
    Mutant(
        "49 waiting for batches is not timed",
        T,
        "timed(run.clock, made)",
        "made",
        "health: slow_collator",
    ),
    Mutant(
        "49 the spread is the targets'",
        T,
        "mean_colour(before.grids())",
        "mean_colour(target)",
        "health: colour",
    ),
    Mutant(
        "49 the gradient's norm is that after clipping",
        T,
        '"grad_norm": norm}',
        '"grad_norm": norm.clamp(max=args.clip)}',
        "health: before_clipping",
    ),
    Mutant(
        "49 other tokens count as memory",
        SYSTEM,
        "mask[:, -memory.n_retrieved :]",
        "mask[:, : memory.n_retrieved]",
        "health: gives",
    ),
    Mutant(
        "49 what was said is not saved",
        STATE,
        '    extra["health"] = run.health.state_dict()\n',
        "",
        "health: resumed",
    ),
    Mutant(
        "49 what was said is not restored",
        STATE,
        '    run.health.load_state_dict(extra.get("health", {}))\n',
        "",
        "health: resumed",
    ),
]
