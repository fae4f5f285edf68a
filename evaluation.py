"""Prediction without targets, voting over views, and scoring.

`predict_tasks` takes tasks whose test outputs have been removed, and refuses others; `outcomes`,
`score` and `gains` are the only places where predictions and outputs meet. Each query has two
ballots: the network's alone, and one in which the refined answers and the proposals vote too.
`evaluate` is all of it for a run, hypotheses included. It trains nothing and writes no files.
`from evaluation import evaluate, predict_tasks, refined, score, without_outputs`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import one_hot
from tqdm import tqdm

from arc_agent import AgentOutput
from arc_system import Answered, System
from batches import Batch, Collator, Request, View, evaluation_requests, generator_for, prefetch
from command_line import MOST_AT_ONCE
from dataset_arc import Task
from grid_accuracy_loss import copied_share, pick_colour, weighted_cell_mean
from grid_parts import COLOURS
from hypotheses import Fitter, Proposals, proposals_of, verdict_name
from proposal_policy import PRIOR
from ranks import ALONE, Ranks
from reward_shaping import REWARD_WEIGHTS, beyond_copying
from rule_list import Explained, Hypothesis, Verdict
from submissions import Outcome, counts

Grid = NDArray[np.uint8]
Key = tuple[str, int]  # task id, number of the test input

# On the network's own ballot a view's vote counts 1 + SURE_WEIGHT * probability. How well the input
# can be recovered from an answer has no weight: on demonstrations predicted from each other, over
# two seeds, 568 of 2024 were exact without it; 563, 562, 559 at weights 0.25, 0.5, 1
# (benchmarks/bench_reversibility.py, docs/LOG.md).
SURE_WEIGHT = 0.5  # guess
EARLIER_WEIGHT = 1e-3  # the answers of earlier planning steps only break ties and fill attempt 2
N_ATTEMPTS = 2
NETWORK = 0.3  # guess: how likely an unanimous network is exact, where no policy judged it
OVERRULED = (
    0.9  # guess: of a proposal's chance, where the agent answered otherwise with it in sight
)
N_COST_GROUPS = 12  # of tasks, by size: in a hurry, each gets its views in turn
CPU_CELLS, CPU_PADDING = 4000, 400  # of canvases, in a batch on a CPU (docs/PERFORMANCE.md)
N_EARLY_VIEWS = 3  # of each task, before any gets more


def content(grid: Grid) -> tuple[Any, ...]:
    """What two grids share that are the same grid: the key of a ballot's candidates."""
    return (*grid.shape, grid.tobytes())


@dataclass
class Candidate:
    """One grid that some views voted for: their number and their summed vote weights."""

    grid: Grid
    votes: int = 0
    weight: float = 0.0


@dataclass
class Change:
    """One view's refinement: the answers before and after, and how well the input can be
    recovered from each (in [0, 1])."""

    before: Grid
    after: Grid
    reversible_before: float
    reversible_after: float
    accepted: bool


@dataclass
class Prediction:
    """The candidates of one query, in the order they came up; views asked and planning steps taken.

    refined: the ballot in which refined answers and proposals vote too, None where no policy ran;
    changes: a view each. spare: what to hand in as attempt 2 where nothing else came up, and its
    chance beside the answer that it departs from, in [0, 1].
    """

    candidates: dict[tuple[Any, ...], Candidate] = field(default_factory=dict)
    views: int = 0
    steps: int = 0  # of all views together
    refined: Prediction | None = None
    changes: list[Change] = field(default_factory=list)
    spare: tuple[Grid, float] | None = None

    def add(self, grid: Grid, weight: float, votes: int = 1) -> None:
        candidate = self.candidates.setdefault(content(grid), Candidate(grid))
        candidate.votes += votes
        candidate.weight += weight

    def take(self, other: Prediction) -> None:
        """Add the votes of a further view."""
        for c in other.candidates.values():
            self.add(c.grid, c.weight, c.votes)
        self.views += other.views
        self.steps += other.steps
        self.changes += other.changes
        if other.spare is not None and (self.spare is None or other.spare[1] > self.spare[1]):
            self.spare = other.spare
        if other.refined is not None:
            if self.refined is None:
                self.refined = Prediction()
            self.refined.take(other.refined)

    def attempts(self, n: int = N_ATTEMPTS) -> list[Grid]:
        """The best `n` different grids, heaviest vote first; where fewer came up, the spare is the
        last, if it is another; fewer where there is none."""
        ranked = sorted(self.candidates.values(), key=lambda c: -c.weight)  # stable
        grids = [c.grid for c in ranked[:n]]
        if len(grids) < n and self.spare and content(self.spare[0]) not in self.candidates:
            grids.append(self.spare[0])
        return grids


def without_outputs(tasks: Iterable[Task]) -> list[Task]:
    """The same tasks with every test output removed: what a predictor may see."""
    return [task.without_test_outputs() for task in tasks]


class Bounds(TypedDict):
    """Of a batch, as `evaluation_batches` takes them."""

    batch_size: int
    batch_cells: int | None
    padding: int | None


def batch_bounds(
    device: str, batch_size: int | None = None, batch_cells: int | None = None
) -> Bounds:
    """How large the batches of predictions are, for `evaluation_batches`: on a GPU as many queries
    as it has a use for, on a CPU what fits its caches, and no more padding for a further task than
    the cells for which another batch would be computed. batch_size, batch_cells: at most."""
    if not device.startswith("cpu"):
        return {"batch_size": batch_size or 256, "batch_cells": batch_cells, "padding": None}
    cells = min(batch_cells or CPU_CELLS, CPU_CELLS)
    return {"batch_size": batch_size or 32, "batch_cells": cells, "padding": CPU_PADDING}


def predict_tasks(
    system: System,
    tasks: Sequence[Task],
    views: Sequence[View],
    *,
    task_index: dict[str, int] | None = None,
    batch_size: int | None = None,
    batch_cells: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    max_context: int = 6,
    seed: int = 0,
    collator: Collator | None = None,
    only: set[Key] | None = None,
    deadline: float | None = None,
    max_batches: int | None = None,
    progress: Callable[[int, float], None] | None = None,
    proposals: Mapping[Key, Proposals] | None = None,
    own_scores: Mapping[str, float] | None = None,
    accept: bool = True,
    whole_first: bool = True,
    at_once: int = 1,
    ranks: Ranks = ALONE,
) -> dict[Key, Prediction]:
    """Predict every test input of `tasks` once per view, and collect the votes.

    Returns predictions by (task id, number of the test input). task_index: row of the task table by
    task id (tasks without one are unseen); batch_size, batch_cells: queries and cells of their
    canvases in a batch at most, None = as `batch_bounds` has it; dtype: of autocast, None = off;
    max_context: demonstrations that a query sees; only: the queries wanted (default all); deadline:
    time.monotonic() after which no further batch is started, except in the first view. Small
    tasks come first: each gets up to N_EARLY_VIEWS views, then each the others. max_batches:
    batches after which likewise none is started; progress is called with the number of queries
    done and their share of all work, by cells. proposals: what the policy may choose from;
    own_scores: by task id, how well the system does on the demonstrations without them
    (`demonstration_scores`); accept=False: see `System.predict`; whole_first=False: the deadline
    and max_batches hold in the first view, too, small tasks first; what is not reached has no
    prediction. at_once: batches that are answered at a time on a CPU, each in a thread of its own;
    the predictions are the same. ranks: processes that take the batches in turn and all have all
    predictions in the end; progress then hears of 0 queries meanwhile, and of the batches at the
    end. Raises ValueError if a test output is in sight.
    """
    if any(pair.output is not None for task in tasks for pair in task.tests):
        raise ValueError("predict_tasks must not see test outputs: pass without_outputs(tasks)")
    kind = device.split(":")[0]
    collator = collator or Collator()
    found: dict[Key, Prediction] = {}
    turns = _Turns(ranks)

    cost = {task.task_id: _cells(task) for task in tasks}
    all_cells = len(views) * sum(cost[task.task_id] * len(task.tests) for task in tasks)

    def take(cast: Ballots) -> None:
        for key, ballot in cast:
            if only is None or key in only:
                found.setdefault(key, Prediction()).take(ballot)
        if progress is not None:
            progress(len(cast), sum(cost[task_id] for (task_id, _), _ in cast) / all_cells)

    def asked() -> Iterator[_Asked]:
        """Of the batches that are this process's."""
        hurried = deadline is not None or max_batches is not None
        for number, view, some in _work(tasks, views, N_COST_GROUPS if hurried else 1):
            for requests in evaluation_requests(
                some,
                view,
                **batch_bounds(device, batch_size, batch_cells),
                task_table=task_index,
                max_context=max_context,
                proposals=proposals,
                turns=turns,
            ):
                yield _Asked(turns.n, number == 0, view, requests)

    def is_over(one: _Asked) -> bool:
        late = deadline is not None and time.monotonic() > deadline
        spent = late or (max_batches is not None and one.n >= max_batches)
        return spent and not (one.first_view and whole_first)

    def ballots_of(one: _Asked, batch: Batch) -> tuple[int, Ballots]:
        on_device = batch.to(device)
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            answered = system.predict(
                on_device,
                generator_for(device, seed, one.n),
                own_score=_by_query(batch, own_scores).to(device),
                accept=accept,
            )
        keys = [(task_id, number) for task_id, _, number in batch.pair_ids]
        of_view = _ballots(batch, on_device, answered, one.view)
        return one.n, list(zip(keys, of_view, strict=True))

    def whole(one: _Asked) -> tuple[int, Ballots] | None:
        return None if is_over(one) else ballots_of(one, collator.collate(one.requests))

    def made(one: _Asked) -> tuple[_Asked, Batch]:
        return one, collator.collate(one.requests)

    def ballots() -> Iterator[tuple[int, Ballots]]:
        """Of each batch, by its number, until time or batches are spent."""
        if kind == "cpu":
            # Batches made ahead in a thread gain nothing here (docs/PERFORMANCE.md); whole batches
            # side by side do.
            threads = min(at_once, MOST_AT_ONCE)
            depth = threads if threads > 1 else 0
            with contextlib.closing(prefetch(whole, asked(), depth, threads)) as coming:
                yield from itertools.takewhile(lambda some: some is not None, coming)
            return
        with contextlib.closing(prefetch(made, asked())) as ahead:
            for one, batch in ahead:
                if is_over(one):
                    return
                yield ballots_of(one, batch)

    was_training = system.agent.training
    system.train(False)
    try:
        if not ranks.many:
            for _, some in ballots():
                take(some)
            return found

        def mine() -> dict[int, Ballots]:
            made = {}
            for n, some in ballots():
                made[n] = some
                if progress is not None:
                    progress(0, 0.0)
            return made

        by_number = {n: some for part in ranks.gather_made(mine) for n, some in part.items()}

        def take_all() -> None:
            for n in range(len(by_number)):
                if n not in by_number:  # time was up for who had that one: it is the end
                    break
                take(by_number[n])

        ranks.gather_made(take_all)  # a signal may end it, then for all
    finally:
        system.train(was_training)
    return found


Ballots = list[tuple[Key, "Prediction"]]


class _Asked(NamedTuple):
    """A batch to be: its number, whether it is of the first view, the view, what it asks for."""

    n: int
    first_view: bool
    view: View
    requests: list[Request]


class _Turns:
    """Whose turn each batch is: those of the processes in turn. n: number of the last batch."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.n = ranks, -1

    def __iter__(self) -> Iterator[bool]:
        return self

    def __next__(self) -> bool:
        self.n += 1
        return self.n % self.ranks.world == self.ranks.rank


def _by_query(batch: Batch, scores: Mapping[str, float] | None) -> torch.Tensor:
    """(Q,) float32: the task's score, NaN where there is none."""
    named = scores or {}
    return torch.tensor([named.get(task_id, float("nan")) for task_id, _, _ in batch.pair_ids])


def _ballots(
    batch: Batch, on_device: Batch, answered: Answered, view: View
) -> Iterator[Prediction]:
    """What one view says of each query of a batch, in the task's own colours and orientation: a
    ballot of one view per query, in the batch's order.

    batch lies on the CPU, on_device where answered (Q queries, all in `view`) was made from it.
    """
    own, after = answered.before, answered.after
    n_steps = len(own.logits)
    grids, *earlier = (own.grids(step).cpu().numpy() for step in range(n_steps - 1, -1, -1))
    sure = answer_probability(own).tolist()
    second, beside = second_best(own)
    others, chances_of_others = second.cpu().numpy(), beside.tolist()
    recovered = [[0.0] * batch.n_queries, [0.0] * batch.n_queries]
    again = answered.again
    for column, output, backward in (
        (recovered[0], own, answered.backward_before),
        (recovered[1], after, answered.backward_after),
    ):
        if backward is not None:
            inp, size = on_device.query_input[again], on_device.query_input_size[again]
            found = reversibility(output.grids()[again], output.size[again], backward, inp, size)
            for row, value in zip(again.tolist(), found.tolist(), strict=True):
                column[row] = value
    sizes, taken = own.size.tolist(), own.n_steps.tolist()
    later, later_sizes = after.grids().cpu().numpy(), after.size.tolist()
    choice = answered.refinement.choice if answered.refinement is not None else None
    chances = choice.chance.tolist() if choice is not None else []
    numbers = choice.taken.tolist() if choice is not None else []
    proposed, proposed_size = batch.proposed.numpy(), batch.proposed_size.tolist()
    for row in range(batch.n_queries):

        def mine(canvas: Any, size: Sequence[int], row: int = row) -> Grid:
            return view.invert(canvas[row, : size[0], : size[1]].astype(np.uint8))

        spare = mine(others, sizes[row]), chances_of_others[row]
        ballot = Prediction(views=1, steps=taken[row], spare=spare)
        grid = mine(grids, sizes[row])
        ballot.add(grid, 1.0 + SURE_WEIGHT * sure[row])
        for age, grids_then in enumerate(earlier, start=1):
            ballot.add(mine(grids_then, sizes[row]), EARLIER_WEIGHT / age, votes=0)
        if choice is not None:
            chance, number = chances[row], numbers[row]
            both = Prediction(views=1, steps=taken[row], spare=spare)
            weights: dict[tuple[Any, ...], tuple[Grid, float]] = {}

            def vote(
                grid: Grid, weight: float, weights: dict[Any, tuple[Grid, float]] = weights
            ) -> None:
                key = content(grid)
                weights[key] = (grid, max(weight, weights.get(key, (grid, 0.0))[1]))

            vote(grid, chance[0])
            answer = mine(later, later_sizes[row])
            if number:
                vote(answer, chance[number])
            for a, size in enumerate(proposed_size[row]):
                if size[0]:
                    shown = mine(proposed[:, a], size)
                    overruled = number == a + 1 and not np.array_equal(shown, answer)
                    vote(shown, chance[a + 1] * (OVERRULED if overruled else 1.0))
            for candidate, weight in weights.values():
                both.add(candidate, weight)
            for c in ballot.candidates.values():
                both.add(c.grid, EARLIER_WEIGHT * c.weight, votes=0)
            ballot.refined = both
            ballot.changes = [
                Change(grid, answer, recovered[0][row], recovered[1][row], number > 0)
            ]
        yield ballot


def left_out(task: Task, number: int, name: str | None = None) -> Task:
    """A question: demonstration `number` of a task as its only test, the others as demonstrations.

    name: the question's task id (default: the task's own). Keep its output from a predictor.
    """
    pairs = task.demonstrations
    others = (*pairs[:number], *pairs[number + 1 :])
    return Task(task.task_id if name is None else name, others, (pairs[number],))


def left_out_outcomes(
    system: System, questions: Sequence[Task], **options: Any
) -> dict[str, Outcome]:
    """How the network alone, without proposals, answers questions of `left_out` in one view; by
    their task ids. options: as of `predict_tasks`."""
    found = predict_tasks(system, without_outputs(questions), [View()], **options)
    return {task_id: row for (task_id, _), row in outcomes(found, questions).items()}


def demonstration_scores(
    system: System,
    tasks: Sequence[Task],
    *,
    task_index: Mapping[str, int] | None = None,
    **options: Any,
) -> dict[str, float]:
    """How well the system does on each task's demonstrations without proposals: mean share of right
    cells (0 for a wrong size), each predicted from the others in one view. Tasks of one
    demonstration have none.

    options: as of `predict_tasks`. The demonstrations were trained on, if the task is known: the
    score flatters.
    """
    questions: list[Task] = []
    index: dict[str, int] = {}
    task_of: dict[str, str] = {}
    for task in tasks:
        n = len(task.demonstrations)
        for number in range(n if n > 1 else 0):
            name = f"{task.task_id}/{number}"
            questions.append(left_out(task, number, name))
            task_of[name] = task.task_id
            if task_index is not None and task.task_id in task_index:
                index[name] = task_index[task.task_id]
    shares: dict[str, list[float]] = {}
    for name, row in left_out_outcomes(system, questions, task_index=index, **options).items():
        shares.setdefault(task_of[name], []).append(row.cells)
    return {task_id: float(np.mean(share)) for task_id, share in shares.items()}


def contested(explained: Mapping[Key, Explained]) -> set[str]:
    """Tasks of which the demonstrations say neither that a hypothesis holds nor that none does:
    there the network's own `demonstration_scores` decide whether one is accepted."""
    found = set()
    for (task_id, _), e in explained.items():
        verdicts = [h.verdict for h in e.hypotheses]
        if verdicts and not verdicts[0].full and any(v.share > 0 for v in verdicts):
            found.add(task_id)
    return found


def contested_scores(
    system: System, tasks: Sequence[Task], explained: Mapping[Key, Explained], **options: Any
) -> dict[str, float]:
    """What acceptance by the demonstrations asks of the network: `demonstration_scores` of those
    tasks that are `contested`. options: as of `predict_tasks`."""
    doubtful = contested(explained)
    some = [task for task in tasks if task.task_id in doubtful]
    return demonstration_scores(system, some, **options)


def refined(predictions: Mapping[Key, Prediction]) -> dict[Key, Prediction]:
    """The ballots in which refined answers and proposals voted, the network's alone where no policy
    ran."""
    return {key: p if p.refined is None else p.refined for key, p in predictions.items()}


def gains(predictions: Mapping[Key, Prediction], tasks: Iterable[Task]) -> dict[str, float]:
    """What the refinements gained, means over views and queries with known outputs: the reward and
    its four parts (after minus before, each answer at its own size; cells 0 and colours by
    histogram as in training), the share of accepted ones, and their number `n`."""
    known = {(t.task_id, i): p.output for t in tasks for i, p in enumerate(t.tests)}
    rows: list[list[float]] = []
    n_accepted = 0
    for key, prediction in predictions.items():
        target = known.get(key)
        if target is None:
            continue
        for change in prediction.changes:
            n_accepted += change.accepted
            if change.before is change.after:
                rows.append([0.0] * len(REWARD_WEIGHTS))
                continue
            scores: list[dict[str, float]] = []
            for grid, rev in (
                (change.before, change.reversible_before),
                (change.after, change.reversible_after),
            ):
                same = grid.shape == target.shape
                cells = float((grid == target).mean()) if same else 0.0
                sides = np.minimum(grid.shape, target.shape) / np.maximum(grid.shape, target.shape)
                shares = [
                    np.bincount(g.ravel(), minlength=COLOURS) / g.size for g in (grid, target)
                ]
                scores.append(
                    {
                        "d_acc": cells,
                        "d_size": float(sides.mean()),
                        "d_color": float(np.minimum(*shares).sum()),
                        "d_rev": rev,
                    }
                )
            before, after = scores
            rows.append([after[name] - before[name] for name in REWARD_WEIGHTS])
    means = np.mean(rows, axis=0).tolist() if rows else [0.0] * len(REWARD_WEIGHTS)
    parts = dict(zip(REWARD_WEIGHTS, means, strict=True))
    reward = sum(REWARD_WEIGHTS[name] * value for name, value in parts.items())
    return {
        "n": len(rows),
        "accepted": n_accepted / max(1, len(rows)),
        "reward": reward,
        **parts,
    }


def gains_line(won: Mapping[str, float], accept: bool = True) -> str:
    """What `gains` found, for a person. accept: the demonstrations had to approve."""
    how = "accepted by the demonstrations" if accept else "taken, whatever the demonstrations say"
    return (
        f"refinements: reward {won['reward']:+.4f}, d_acc {won['d_acc']:+.4f} a query and view; "
        f"{100 * won['accepted']:.1f}% {how}"
    )


def mcnemar(won: int, lost: int) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split of won + lost differing queries is
    by chance."""
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
    return min(1.0, 2.0 * tail)


def _work(
    tasks: Sequence[Task], views: Sequence[View], n_groups: int
) -> Iterator[tuple[int, View, Sequence[Task]]]:
    """(number of the view, view, tasks): the first view of all tasks, then the next two of the
    smallest of `n_groups` groups of tasks, and so on to the largest, then likewise all others. A
    small task costs a fraction of a large one and is solved three times as often (measured), so a
    deadline had better cut the large ones' views; beyond the third a view changes little
    (docs/LOG.md)."""
    if not views:
        return
    yield 0, views[0], tasks
    by_cost = sorted(tasks, key=_cells)
    n_groups = min(n_groups, len(by_cost))
    rounds = (1, min(N_EARLY_VIEWS, len(views))), (N_EARLY_VIEWS, len(views))
    for first, last in rounds:
        for group in range(n_groups):
            start, end = (len(by_cost) * i // n_groups for i in (group, group + 1))
            for number in range(first, last):
                yield number, views[number], by_cost[start:end]


def _cells(task: Task) -> int:
    """The largest grid of a task that a predictor may see, in cells."""
    pairs = (*task.tests, *task.demonstrations)
    return max(g.size for pair in pairs for g in (pair.input, pair.output) if g is not None)


def reversibility(
    grids: torch.Tensor,
    size: torch.Tensor,
    backward: torch.Tensor,
    inp: torch.Tensor,
    input_size: torch.Tensor,
) -> torch.Tensor:
    """How well the inputs can be recovered from answers, (Q,) in [0, 1]: probability of the input's
    cells by the backward model (geometric mean), beyond what the answer shows as it is.

    grids (Q, H, W) colours and size (Q, 2) of the answers; backward: the backward model's
    log-probabilities (Q, rows, cols, 10) of them, from `System.backward_of` or `System.predict`;
    inp (Q, rows, cols) and input_size (Q, 2).
    """
    recovered = weighted_cell_mean(pick_colour(backward, inp), inp).exp()
    answer = one_hot(grids.clamp(min=0), COLOURS)
    return beyond_copying(recovered, copied_share(answer, size, inp, input_size))


def answer_probability(output: AgentOutput) -> torch.Tensor:
    """Probability of the answer's cells (Q,), geometric mean."""
    inside = output.grids() >= 0
    best = output.logits[-1].amax(-1)
    return ((best * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)).exp()


def second_best(output: AgentOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest other answers of the last planning step at the same sizes: (Q, H, W) int64, the
    least sure cell in its second colour and all others as they are, -1 outside; and how likely that
    is beside the answer itself, (Q,) in [0, 1]."""
    grids, logits = output.grids(), output.logits[-1]
    best = logits.argmax(-1, keepdim=True)
    others, second = logits.scatter(-1, best, float("-inf")).max(-1)
    gap = (logits.amax(-1) - others).masked_fill(grids < 0, float("inf")).flatten(1)
    least, place = gap.min(1, keepdim=True)
    changed = grids.flatten(1).scatter(1, place, second.flatten(1).gather(1, place))
    return changed.view_as(grids), (-least[:, 0]).exp()


def trust(verdict: Verdict) -> float:
    """How likely an answer with this verdict is exact, in (0, 1), where no policy judged it."""
    return PRIOR[verdict_name(verdict)]


def joined(
    predictions: Mapping[Key, Prediction], explained: Mapping[Key, Explained]
) -> dict[Key, Prediction]:
    """The predictions with the hypotheses' answers as further candidates; the arguments stay as
    they are.

    Where the policy judged a query's proposals they have voted already. Elsewhere a network's
    candidate counts NETWORK times the share of the views' weight it got, a hypothesis its `trust`;
    a grid that both give counts both. Of the hypotheses of one query that answer alike, the best
    counts.
    """
    found: dict[Key, Prediction] = {}
    for key in {**predictions, **explained}:
        network = predictions.get(key, Prediction())
        if network.refined is not None and any(
            c.votes for c in network.refined.candidates.values()
        ):
            asked = {content(h.answer) for h in _hypotheses(explained, key)}
            if asked <= set(network.refined.candidates):
                found[key] = network.refined
                continue
        both = Prediction(views=network.views, steps=network.steps, spare=network.spare)
        total = sum(c.weight for c in network.candidates.values())
        for c in network.candidates.values():
            both.add(c.grid, NETWORK * c.weight / max(total, 1e-9), c.votes)
        seen: set[Any] = set()
        for h in _hypotheses(explained, key):
            if content(h.answer) not in seen:
                seen.add(content(h.answer))
                both.add(h.answer, trust(h.verdict), votes=0)
        found[key] = both
    return found


def _hypotheses(explained: Mapping[Key, Explained], key: Key) -> tuple[Hypothesis, ...]:
    return explained[key].hypotheses if key in explained else ()


def answered_all(
    predictions: Mapping[Key, Prediction], tasks: Iterable[Task], only: set[Key]
) -> dict[Key, Prediction]:
    """The predictions, with the input as it is where there is none: every query gets an answer. The
    input is the spare, too, where the network, which has a better one, was not asked."""
    found = dict(predictions)
    for task in tasks:
        for number, pair in enumerate(task.tests):
            key = (task.task_id, number)
            if key not in only:
                continue
            if not (key in found and found[key].candidates):
                found[key] = Prediction()
                found[key].add(pair.input, 0.0, votes=0)
            if found[key].spare is None:
                found[key] = replace(found[key], spare=(pair.input, 0.0))
    return found


def alone(explained: Mapping[Key, Explained]) -> dict[Key, Prediction]:
    """Predictions by hypotheses alone, for queries that have one: the best ranked first."""
    found = {}
    for key, e in explained.items():
        if e.hypotheses:
            found[key] = Prediction()
            for rank, grid in enumerate(e.attempts(N_ATTEMPTS)):
                found[key].add(grid, 1.0 / (1 + rank), votes=0)
    return found


def proposals_for(explained: Mapping[Key, Explained]) -> dict[Key, Proposals]:
    """What the policy may choose from, by query."""
    made = {key: proposals_of(e) for key, e in explained.items()}
    return {key: p for key, p in made.items() if p is not None}


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


def outcomes_by_task(
    predictions: dict[Key, Prediction], tasks: Iterable[Task]
) -> dict[str, list[dict[str, Any] | None]]:
    """Of each task the `Outcome` of its test inputs in order, as `submissions.score` has them; None
    where nothing was compared."""
    found = outcomes(predictions, tasks)
    return {
        task.task_id: [
            None if row is None else row.row()
            for row in (found.get((task.task_id, n)) for n in range(len(task.tests)))
        ]
        for task in tasks
    }


def mean_steps(predictions: Collection[Prediction]) -> float:
    """Planning steps taken, a query and view on average."""
    return sum(p.steps for p in predictions) / max(1, sum(p.views for p in predictions))


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

    n = max(1, len(rows))
    return {
        **counts(list(rows.values())),
        "size_accuracy": sum(row.size for row in rows.values()) / n,
        "cell_accuracy": sum(row.cells for row in rows.values()) / n,
        "planning_steps": mean_steps([predictions[key] for key in rows]),
        "tasks": len(by_task),
        "tasks_solved": sum(all(solved) for solved in by_task.values()),
        "slices": {
            name: counts([rows[key] for key in keys if key in rows])
            for name, keys in (slices or {}).items()
        },
    }


def scores_alone(
    predictions: dict[Key, Prediction],
    explained: Mapping[Key, Explained],
    tasks: Sequence[Task],
    both: Mapping[Key, Prediction],
) -> dict[str, dict[str, Any]]:
    """The figures of `score`, without slices, of the network and of the hypotheses, each by itself
    on the queries that it answers; and of the queries that either it or `both` solves alone, in two
    attempts, how many `both` won and lost, with McNemar's p."""
    together = outcomes(dict(both), tasks)
    found: dict[str, dict[str, Any]] = {}
    for part, mine in {"network": predictions, "hypotheses": alone(explained)}.items():
        solved = {key for key, row in outcomes(mine, tasks).items() if row.exact}
        solved_together = {key for key, row in together.items() if row.exact}
        won, lost = len(solved_together - solved), len(solved - solved_together)
        figures = score(mine, tasks)
        del figures["slices"]
        found[part] = {
            **figures,
            "both_won": won,
            "both_lost": lost,
            "p": mcnemar(won, lost),
        }
    return found


def work_bar(title: str, hide: bool) -> tqdm[Any]:
    """A progress bar in percent of the work: queries cost too different amounts to count them."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    return tqdm(total=100.0, desc=title, leave=False, disable=hide, bar_format=form)


def validation_keys(tasks: Iterable[Task], limit: int | None, seed: int) -> set[Key]:
    """The test queries of tasks with known outputs, or a fixed random `limit` of them."""
    keys = [
        (task.task_id, number)
        for task in tasks
        for number, pair in enumerate(task.tests)
        if pair.output is not None
    ]
    if limit is not None and limit < len(keys):
        chosen = np.random.default_rng([seed, 7]).permutation(len(keys))[:limit]
        keys = [keys[i] for i in sorted(chosen)]
    return set(keys)


def evaluate(
    system: System,
    tasks: Sequence[Task],
    keys: set[Key],
    views: Sequence[View],
    *,
    slices: Mapping[str, AbstractSet[Key]] | None = None,
    deadline: float | None = None,
    max_batches: int | None = None,
    fitter: Fitter | None = None,
    hypothesis_tasks: tuple[int, int] | None = None,
    propose: bool = True,
    acceptance: str = "demonstrations",
    title: str = "Validation",
    hide_bar: bool = True,
    by_task: bool = False,
    heed_stop: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
    at_once: Callable[[], int] = lambda: 1,
    **options: Any,
) -> dict[str, Any]:
    """Score the system on the given queries of `tasks`; targets meet predictions in `score`,
    `scores_alone` and `gains`, when all have been made.

    Returns the figures of results.json: `score` with slices, views and batches done; with a fitter
    also "alone", "gains", "acceptance" and how far network and hypotheses came.

    fitter: hypotheses for the policy to choose from (if `propose`), as far as they are fitted when
    the voting starts; those fitted later, by the deadline, vote without it. "alone" then holds the
    counts of network and hypotheses by themselves, "gains" what the refinements won.
    hypothesis_tasks: the hypotheses of so many tasks before the voting, and after it, however long
    that takes; repeats what a deadline cut. acceptance: full, demonstrations or off, what a
    refinement needs. by_task: with each query's `Outcome`. heed_stop: called between batches; what
    it raises ends the evaluation. say: hears of trouble. at_once: asked how many batches are
    answered at a time, when they are about to be. deadline, max_batches and options
    (task_index, batch_size, device, dtype, seed, collator): as of `predict_tasks`.
    """
    ids = {task_id for task_id, _ in keys}
    wanted = [task for task in tasks if task.task_id in ids]
    first, last = hypothesis_tasks or (None, None)

    def collect(until: float | None, n_tasks: int | None) -> dict[Key, Explained]:
        assert fitter is not None
        with tqdm(
            total=fitter.n_tasks, desc="Hypotheses", unit="task", leave=False, disable=hide_bar
        ) as fitting:

            def ready(n: int) -> None:
                fitting.update(n - fitting.n)
                heed_stop()

            found = fitter.collect(until, n_tasks, ready)
        return {key: e for key, e in found.items() if key in keys}

    explained: dict[Key, Explained] = {}
    if fitter is not None:
        hurried = deadline is not None and first is None
        explained = collect(time.monotonic() if hurried else None, first)
        first = len({task_id for task_id, _ in explained}) if first is None else first
    own_scores = None
    if fitter is not None and acceptance == "demonstrations":
        own_scores = contested_scores(
            system,
            wanted,
            explained,
            progress=lambda *_: heed_stop(),
            at_once=at_once(),
            **options,
        )
    n_done = n_batches = 0
    with work_bar(title, hide_bar) as bar:
        begun = time.monotonic()
        done = 0.0

        def step(n: int, share: float) -> None:
            nonlocal n_done, n_batches, done
            n_done += n
            n_batches += n > 0
            done += share
            spent = 0.0  # of the time: the deadline may be the end
            if deadline is not None:
                spent = (time.monotonic() - begun) / max(1e-9, deadline - begun)
            bar.update(min(100.0, 100 * max(done, spent)) - bar.n)
            heed_stop()

        predictions = predict_tasks(
            system,
            without_outputs(wanted),
            views,
            only=keys,
            deadline=deadline,
            max_batches=max_batches,
            progress=step,
            proposals=proposals_for(explained) if propose else None,
            own_scores=own_scores,
            accept=acceptance != "off",
            whole_first=fitter is None,
            at_once=at_once(),
            **options,
        )
    views_done = n_done / max(1, sum(len(task.tests) for task in wanted))
    came: dict[str, Any] = {"views_done": round(views_done, 2), "batches_done": n_batches}
    if fitter is None:
        if by_task:
            came["by_task"] = outcomes_by_task(predictions, wanted)
        return {**score(predictions, wanted, slices), **came}
    explained = collect(deadline if last is None else None, last)
    if fitter.failed:
        say(f"Hypotheses: {fitter.failed}; {fitter.n_first()} tasks were fitted before")
    both = answered_all(joined(predictions, explained), wanted, keys)
    if by_task:
        came["by_task"] = outcomes_by_task(both, wanted)
    return {
        **score(both, wanted, slices),
        **came,
        "network_queries": len(predictions),
        "alone": scores_alone(predictions, explained, wanted, both),
        "gains": gains(predictions, wanted),
        "acceptance": acceptance,
        "hypothesis_tasks": [first, len({task_id for task_id, _ in explained})],
        "hypothesis_queries": len(explained),
    }
