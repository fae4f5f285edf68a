"""Breakages of what is read together, in batches of which size, and of its quicker arithmetic, for
`wiring_mutants.py`.

`from together_table import TOGETHER`.
"""

from __future__ import annotations

from wiring_table import AGENT, BATCHES, EVALUATION, SYSTEM, Mutant

GROUPED = "demonstration_cells.py"
TOGETHER = [
    Mutant(
        "12 cells of the group's first demonstration for all of it",
        GROUPED,
        "            begun += cells\n",
        "        begun += cells\n",
        "demonstration_cells: groups_change or cells_are_those",
    ),
    Mutant(
        "12 the padding of a group in sight",
        GROUPED,
        "seen = demos.mask[where] & within.flatten(1)",
        "seen = within.flatten(1)",
        "demonstration_cells: groups_change or context_cells",
    ),
    Mutant(
        "12 cells of the next demonstration in sight",
        GROUPED,
        "within = (cell < count) & (context >= 0).unsqueeze(-1)",
        "within = (context >= 0).unsqueeze(-1)",
        "demonstration_cells: groups_change or context_cells",
    ),
    Mutant(
        "12 every place is on the group's own canvas",
        GROUPED,
        "row = torch.arange(rows, device=device) * MAX_SIDE",
        "row = torch.arange(rows, device=device) * cols",
        "demonstration_cells: groups_change or cells_are_those",
    ),
    Mutant(
        "12 rooms of training tell how large outputs are",
        BATCHES,
        "            rooms = [canvas] * n_c",
        "            rooms = [(min(r, hd), min(c, wd)) for r, c in demo_out.tolist()]",
        "batches: own_output_reaches",
    ),
    Mutant(
        "12 shuffled demonstrations cut to the own context",
        SYSTEM,
        "            most_seen=seen,\n",
        "",
        "demonstration_cells: another_task",
    ),
    Mutant(
        "12 no batch ends for its padding",
        BATCHES,
        "padding is not None and cells - needed > padding",
        "False",
        "batches: pad_too_much",
    ),
    Mutant(
        "12 predictions in batches that suit no device",
        EVALUATION,
        "**batch_bounds(device, batch_size, batch_cells),",
        "batch_size=batch_size or 32,",
        "evaluation: within_the_bounds",
    ),
    Mutant(
        "12 fused AdamW without weight decay",
        "optimizers.py",
        'weight_decay=group["weight_decay"], amsgrad',
        "weight_decay=0.0, amsgrad",
        "optimizers: plain_groups",
    ),
    Mutant(
        "12 the fitted rule goes to what is right alone",
        AGENT,
        ".clamp(min=1e-30) - belief",
        ".clamp(min=1e-30)",
        "arc_agent: likelihood_s_gradient",
    ),
    Mutant(
        "13 batches of an evaluation one after the other",
        EVALUATION,
        "depth = threads if threads > 1 else 0",
        "depth = 0",
        "evaluation: side_by_side",
    ),
    Mutant(
        "13 whole batches in one thread",
        BATCHES,
        "ThreadPoolExecutor(threads,",
        "ThreadPoolExecutor(1,",
        "evaluation: side_by_side",
    ),
    Mutant(
        "13 the spent batches of an evaluation are gone on with",
        EVALUATION,
        "return None if is_over(one) else ballots_of",
        "return ballots_of",
        "evaluation: max_batches or deadline",
    ),
    Mutant(
        "13 evaluations take the cores of hypotheses",
        "run_state.py",
        "free = self.at_once - max(0, busy - max(0, cores() - self.at_once))",
        "free = self.at_once",
        "wiring: threads_that_hypotheses_leave",
    ),
    Mutant(
        "13 evaluations do not hear of --threads",
        "run_scores.py",
        "            at_once=run.free_threads,\n",
        "",
        "wiring: threads_that_hypotheses_leave",
    ),
    Mutant(
        "13 doubtful tasks are asked one batch after the other",
        EVALUATION,
        "            at_once=at_once(),\n            **options,\n        )\n    n_done",
        "            **options,\n        )\n    n_done",
        "wiring: threads_that_hypotheses_leave",
    ),
    Mutant(
        "13 children count as busy for ever",
        "hypotheses.py",
        "self._n_working - self._n_waiting",
        "self._n_working",
        "hypotheses: busy_while",
    ),
    Mutant(
        "13 a tiny model's batch on all threads",
        "command_line.py",
        "1 if one_each else wanted",
        "wanted",
        "command_line: cores_go",
    ),
    Mutant(
        "14 no checkpoint holds hypotheses",
        "run_state.py",
        "    if kept:\n",
        "    if not kept:\n",
        "kept_hypotheses: resumed_run or without_hypotheses",
    ),
    Mutant(
        "14 a resume does not read the hypotheses",
        "run_state.py",
        'isinstance(extra.get("hypotheses"), torch.Tensor)',
        "False",
        "kept_hypotheses: resumed_run",
    ),
    Mutant(
        "14 the fitter is not told what is known",
        "trainloop_complete_with_fixes.py",
        "args.workers, run.ranks, run.kept_hypotheses",
        "args.workers, run.ranks",
        "kept_hypotheses: resumed_run",
    ),
    Mutant(
        "14 hypotheses of an edited task",
        "hypotheses.py",
        "task is None or one.grids != digest_of(pairs_of(task), inputs_of(task))",
        "task is None",
        "kept_hypotheses: other_grids",
    ),
    Mutant(
        "14 proposals of edited demonstrations",
        "hypotheses.py",
        "known.grids == digest_of(self._pairs[task.task_id])",
        "True",
        "kept_hypotheses: other_grids",
    ),
    Mutant(
        "14 hypotheses of another version",
        "kept_hypotheses.py",
        "data[: len(program())] == program()",
        "True",
        "kept_hypotheses: another_version",
    ),
    Mutant(
        "14 what was known is not kept again",
        "hypotheses.py",
        "            self._records[one.kind, one.task_id] = one.record\n",
        "",
        "kept_hypotheses: not_fitted_again",
    ),
    Mutant(
        "13 voting is planned for one batch at a time",
        "time_budget.py",
        " * n_queries / min(run.at_once, MOST_AT_ONCE)",
        " * n_queries",
        "time_budget: batches_are_answered",
    ),
]
