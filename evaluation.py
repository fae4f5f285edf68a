"""Prediction without targets, voting over views, and scoring.

`predict_tasks` takes tasks whose test outputs have been removed, and refuses others; `outcomes` and
`score` are the only places where predictions and outputs meet. `joined` lets hypotheses vote beside the network. It trains nothing and writes no files.
`from evaluation import predict_tasks, score, without_outputs`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import one_hot

from arc_agent import AgentOutput
from arc_system import System
from dataset_arc import Batch, Collator, Task, View, evaluation_batches
from grid_accuracy_loss import COLOURS, copied_share, pick_colour, weighted_cell_mean
from reward_shaping import beyond_copying
from rule_list import Explained, Verdict

Grid = NDArray[np.uint8]
Key = tuple[str, int]  # task id, number of the test input

# A view's vote counts 1 + SURE_WEIGHT * probability + REVERSIBLE_WEIGHT * reversibility.
SURE_WEIGHT = 0.5  # guess
# Chosen on demonstrations told from each other, never on test outputs: over two seeds 568 of 2024
# exact at 0; 563, 562, 559 at 0.25, 0.5, 1 (benchmarks/bench_reversibility.py, docs/LOG.md).
REVERSIBLE_WEIGHT = 0.0
EARLIER_WEIGHT = 1e-3  # the answers of earlier planning steps only break ties and fill attempt 2
N_ATTEMPTS = 2
# How likely an answer is exact, by verdict; and a network's answer for which every view votes. Measured on demonstrations
# as queries (benchmarks/bench_hypotheses.py --leave_one_out): 42 of 47, 21 of 32, 5 of 20 and 13 of 97 were exact.
FULL, HALF, SOME, NONE = 0.9, 0.65, 0.25, 0.1
UNTRIED = 0.03  # guess: rules that do not even explain the context
NETWORK = 0.3  # guess: unanimous views, all tasks together
N_COST_GROUPS = 12  # of tasks, by size: in a hurry, each gets all its views in turn


@dataclass
class Candidate:
    """One grid that some views voted for: their number and their summed vote weights."""

    grid: Grid
    votes: int = 0
    weight: float = 0.0


@dataclass
class Prediction:
    """The candidates of one query, in the order they came up; views asked and planning steps taken."""

    candidates: dict[tuple[Any, ...], Candidate] = field(default_factory=dict)
    views: int = 0
    steps: int = 0  # of all views together

    def add(self, grid: Grid, weight: float, votes: int = 1) -> None:
        key = (*grid.shape, grid.tobytes())
        candidate = self.candidates.setdefault(key, Candidate(grid))
        candidate.votes += votes
        candidate.weight += weight

    def attempts(self, n: int = N_ATTEMPTS) -> list[Grid]:
        """The best `n` different grids, heaviest vote first; fewer if fewer came up."""
        ranked = sorted(self.candidates.values(), key=lambda c: -c.weight)  # stable
        return [c.grid for c in ranked[:n]]


def without_outputs(tasks: Iterable[Task]) -> list[Task]:
    """The same tasks with every test output removed: what a predictor may see."""
    return [task.without_test_outputs() for task in tasks]


def predict_tasks(
    system: System,
    tasks: Sequence[Task],
    views: Sequence[View],
    *,
    task_index: dict[str, int] | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    max_context: int = 6,
    seed: int = 0,
    collator: Collator | None = None,
    only: set[Key] | None = None,
    deadline: float | None = None,
    max_batches: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[Key, Prediction]:
    """Predict every test input of `tasks` once per view, and collect the votes.

    task_index: row of the task table by task id (tasks without one are unseen); only: the queries
    wanted (default all); deadline: time.monotonic() after which no further batch is started, except
    in the first view: small tasks are through with all views before large ones start on their
    second; max_batches: batches after which likewise none is started; progress is called with the number of queries done.
    Raises ValueError if a test output is in sight.
    """
    if any(pair.output is not None for task in tasks for pair in task.tests):
        raise ValueError("predict_tasks must not see test outputs: pass without_outputs(tasks)")
    kind = device.split(":")[0]
    found: dict[Key, Prediction] = {}
    n_batches = 0
    was_training = system.agent.training
    system.train(False)
    generator = torch.Generator(device=device).manual_seed(seed)
    try:
        hurried = deadline is not None or max_batches is not None
        for number, view, some in _work(tasks, views, N_COST_GROUPS if hurried else 1):
            for batch in evaluation_batches(
                some,
                view,
                batch_size=batch_size,
                task_table=task_index,
                max_context=max_context,
                collator=collator,
            ):
                late = deadline is not None and time.monotonic() > deadline
                if number and (late or (max_batches is not None and n_batches >= max_batches)):
                    return found
                n_batches += 1
                on_device = batch.to(device)
                with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
                    output, backward = system.predict(on_device, generator)
                n_steps = len(output.logits)
                grids, *earlier = (
                    output.grids(step).cpu().numpy() for step in range(n_steps - 1, -1, -1)
                )
                sure = answer_probability(output).tolist()
                reversible = reversibility(
                    on_device, output.grids(), output.size, backward
                ).tolist()
                sizes, taken = output.size.tolist(), output.n_steps.tolist()
                for row, (task_id, _, number_in_task) in enumerate(batch.pair_ids):
                    key = (task_id, number_in_task)
                    if only is not None and key not in only:
                        continue
                    rows, cols = sizes[row]
                    grid = view.invert(grids[row, :rows, :cols].astype(np.uint8))
                    weight = 1.0 + SURE_WEIGHT * sure[row] + REVERSIBLE_WEIGHT * reversible[row]
                    prediction = found.setdefault(key, Prediction())
                    prediction.views += 1
                    prediction.steps += taken[row]
                    prediction.add(grid, weight)
                    for age, grids_then in enumerate(earlier, start=1):
                        then = view.invert(grids_then[row, :rows, :cols].astype(np.uint8))
                        prediction.add(then, EARLIER_WEIGHT / age, votes=0)
                if progress is not None:
                    progress(len(grids))
    finally:
        system.train(was_training)
    return found


def _work(
    tasks: Sequence[Task], views: Sequence[View], n_groups: int
) -> Iterator[tuple[int, View, Sequence[Task]]]:
    """(number of the view, view, tasks): the first view of all tasks, then the other views of the
    smallest of `n_groups` groups of tasks, and so on to the largest. A small task costs a fraction of a large one and is
    solved three times as often (measured), so a deadline had better cut the large ones' views."""
    if not views:
        return
    yield 0, views[0], tasks
    by_cost = sorted(tasks, key=_cells)
    n_groups = min(n_groups, len(by_cost))
    for group in range(n_groups):
        start, end = (len(by_cost) * i // n_groups for i in (group, group + 1))
        for number, view in enumerate(views[1:], start=1):
            yield number, view, by_cost[start:end]


def _cells(task: Task) -> int:
    """The largest grid of a task that a predictor may see, in cells."""
    pairs = (*task.tests, *task.demonstrations)
    return max(g.size for pair in pairs for g in (pair.input, pair.output) if g is not None)


def reversibility(
    batch: Batch, grids: torch.Tensor, size: torch.Tensor, backward: torch.Tensor
) -> torch.Tensor:
    """How well the inputs can be told from answers, (Q,) in [0, 1]: probability of the input's
    cells by the backward model (geometric mean), beyond what the answer shows as it is.

    grids (Q, H, W) colours and size (Q, 2) of the answers; backward: the backward model's
    log-probabilities (Q, rows, cols, 10) of them, from `System.backward_of` or `System.predict`.
    """
    inp = batch.query_input
    told = weighted_cell_mean(pick_colour(backward, inp), inp).exp()
    answer = one_hot(grids.clamp(min=0), COLOURS)
    return beyond_copying(told, copied_share(answer, size, inp, batch.query_input_size))


def answer_probability(output: AgentOutput) -> torch.Tensor:
    """Probability of the answer's cells (Q,), geometric mean."""
    inside = output.grids() >= 0
    best = output.logits[-1].amax(-1)
    return ((best * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)).exp()


def trust(verdict: Verdict) -> float:
    """How likely an answer with this verdict is exact, in (0, 1)."""
    if not verdict.n_tried:
        return UNTRIED
    if verdict.full:
        return FULL
    if verdict.share >= 0.5:
        return HALF
    return SOME if verdict.share > 0 else NONE


def joined(
    predictions: Mapping[Key, Prediction], explained: Mapping[Key, Explained]
) -> dict[Key, Prediction]:
    """The predictions with the hypotheses' answers as further candidates; the arguments stay as they are.

    A network's candidate counts NETWORK times the share of the views' weight it got, a hypothesis its `trust`; a
    grid that both give counts both. Of the hypotheses of one query that answer alike, the best counts.
    """
    found: dict[Key, Prediction] = {}
    for key in {**predictions, **explained}:
        network = predictions.get(key, Prediction())
        both = Prediction(views=network.views, steps=network.steps)
        total = sum(c.weight for c in network.candidates.values())
        for c in network.candidates.values():
            both.add(c.grid, NETWORK * c.weight / max(total, 1e-9), c.votes)
        seen: set[Any] = set()
        for h in explained[key].hypotheses if key in explained else ():
            content = (h.answer.shape, h.answer.tobytes())
            if content not in seen:
                seen.add(content)
                both.add(h.answer, trust(h.verdict), votes=0)
        found[key] = both
    return found


def alone(explained: Mapping[Key, Explained]) -> dict[Key, Prediction]:
    """Predictions by hypotheses alone, for queries that have one."""
    return joined({}, {key: e for key, e in explained.items() if e.hypotheses})


class Outcome(NamedTuple):
    """How one predicted test output compares with the known one."""

    attempt_1: bool  # exact
    attempt_2: bool  # exact, in the second attempt alone
    size: bool  # attempt 1 has the right size
    cells: float  # share of right cells of attempt 1, 0 for a wrong size

    @property
    def exact(self) -> bool:
        """Whether one of the two attempts is exact."""
        return self.attempt_1 or self.attempt_2


def outcomes(predictions: dict[Key, Prediction], tasks: Iterable[Task]) -> dict[Key, Outcome]:
    """Compare every prediction whose output is known."""
    found: dict[Key, Outcome] = {}
    for task in tasks:
        for number, pair in enumerate(task.tests):
            key = (task.task_id, number)
            if pair.output is None or key not in predictions:
                continue
            attempts = predictions[key].attempts()
            right = [np.array_equal(grid, pair.output) for grid in attempts]
            size = attempts[0].shape == pair.output.shape
            cells = float((attempts[0] == pair.output).mean()) if size else 0.0
            found[key] = Outcome(right[0], any(right[1:]), size, cells)
    return found


def score(
    predictions: dict[Key, Prediction],
    tasks: Sequence[Task],
    slices: Mapping[str, AbstractSet[Key]] | None = None,
) -> dict[str, Any]:
    """Compare predictions with the known outputs of `tasks`' tests.

    Counts `n`, `exact_at_1`, `exact_at_2`; `size_accuracy` and `cell_accuracy` (of attempt 1; 0 for
    a wrong size) as means; `tasks_solved` at two attempts; `planning_steps` taken per query and
    view, on average; the same three counts per slice.
    """
    rows = outcomes(predictions, tasks)
    by_task: dict[str, list[bool]] = {}
    for (task_id, _), row in rows.items():
        by_task.setdefault(task_id, []).append(row.exact)

    def counts(keys: Iterable[Key]) -> dict[str, int]:
        chosen = [rows[key] for key in keys if key in rows]
        return {
            "n": len(chosen),
            "exact_at_1": sum(row.attempt_1 for row in chosen),
            "exact_at_2": sum(row.exact for row in chosen),
        }

    n = max(1, len(rows))
    return {
        **counts(rows),
        "size_accuracy": sum(row.size for row in rows.values()) / n,
        "cell_accuracy": sum(row.cells for row in rows.values()) / n,
        "planning_steps": sum(predictions[key].steps for key in rows)
        / max(1, sum(predictions[key].views for key in rows)),
        "tasks": len(by_task),
        "tasks_solved": sum(all(solved) for solved in by_task.values()),
        "slices": {name: counts(keys) for name, keys in (slices or {}).items()},
    }


def scores_alone(
    predictions: dict[Key, Prediction], explained: Mapping[Key, Explained], tasks: Sequence[Task]
) -> dict[str, dict[str, int]]:
    """`exact_at_1` and `exact_at_2` of the network and of the hypotheses, each by itself."""
    parts = {"network": predictions, "hypotheses": alone(explained)}
    counts = {part: score(found, tasks) for part, found in parts.items()}
    names = ("exact_at_1", "exact_at_2")
    return {part: {name: found[name] for name in names} for part, found in counts.items()}
