"""Does a right answer tell more of its input than a wrong one? Of one trained run.

    python benchmarks/bench_reversibility.py runs/arc_complete_20260101_120000 --threads 1
    python benchmarks/bench_reversibility.py RUN --max_side 30 --views 2   # all 1076 test queries

Prints, for the reversibility that votes (`evaluation.reversibility`) and for what it is made of,
  a  across queries: AUC for "this answer is exact" (first view; all views together)
  b  within a query, of wrong answers: how often the true output scores more, the same, less than
     the model's own answer, and P(more) with ties counted half
  c  within a query: how often a right candidate scores above a wrong one, over the candidates of
     all views (a candidate's score: mean over its views), mean over queries that have both
and the exact counts in one and two attempts for several vote weights. Scores: `reversibility`;
`recovered`, its first part alone (probability of the input given the answer); `not copied`, one
minus its second part, which needs no backward model; `cell probability`, the model's own certainty.

Two sets of queries. *Demonstrations*: each predicted from the others, in epochs (hence views) that
no run trains on; the vote weight is chosen here (most exact in two attempts, then in one, then the
smallest). *Test*: the held-out test queries of the training tasks; their outputs only measure.
It trains nothing and writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arc_system import System  # noqa: E402 - the scripts are no package
from batches import (  # noqa: E402
    Batch,
    Targets,
    TrainingStream,
    evaluation_batches,
    evaluation_targets,
    evaluation_views,
    longest_side,
)
from command_line import Parser, number  # noqa: E402
from dataset_arc import Task, load_tasks  # noqa: E402
from evaluation import (  # noqa: E402
    SURE_WEIGHT,
    answer_probability,
    reversibility,
)
from grid_accuracy_loss import (  # noqa: E402
    copied_share,
    exact_match,
    pick_colour,
    weighted_cell_mean,
)
from grid_parts import COLOURS  # noqa: E402
from trained_model import load_model  # noqa: E402

UNSEEN_EPOCH = 1_000_000  # no run gets there, so its views are new
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)
SAME = 1e-6  # scores closer than this are equal

Answers = list[dict[str, Any]]
Query = tuple[int, Batch, Targets]  # number of the view, queries, their true outputs


class Within(NamedTuple):
    """How the true outputs of wrong answers score against these: shares, and P with half ties."""

    more: float
    equal: float
    less: float

    @property
    def p(self) -> float:
        return self.more + self.equal / 2


def auc(score: Any, right: Any) -> float:
    """P(a right one scores above a wrong one), ties counted half; nan where one kind is missing."""
    score, right = np.asarray(score, np.float64), np.asarray(right, bool)
    n_right = int(right.sum())
    if n_right in (0, len(right)):
        return float("nan")
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]
    n_pairs = n_right * (len(right) - n_right)
    return float((rank[right].sum() - n_right * (n_right + 1) / 2) / n_pairs)


def within(answers: Answers, name: str) -> Within:
    """Definition b."""
    gain = np.array([a["true"][name] - a["own"][name] for a in answers if not a["exact"]])
    if not len(gain):
        return Within(float("nan"), float("nan"), float("nan"))
    more, less = float((gain > SAME).mean()), float((gain < -SAME).mean())
    return Within(more, 1.0 - more - less, less)


def by_candidate(answers: Answers, score: Callable[[Any], float]) -> Iterator[list[Any]]:
    """Per query: (scores of the views, exact) of each candidate."""
    queries: dict[Any, dict[Any, tuple[list[float], bool]]] = {}
    for a in answers:
        candidates = queries.setdefault(a["id"], {})
        candidates.setdefault(a["grid"], ([], a["exact"]))[0].append(score(a))
    return (list(candidates.values()) for candidates in queries.values())


def among_candidates(answers: Answers, name: str) -> tuple[float, int]:
    """Definition c: (mean over queries, their number)."""
    shares = []
    for candidates in by_candidate(answers, lambda a: a["own"][name]):
        right = [np.mean(scores) for scores, exact in candidates if exact]
        wrong = [np.mean(scores) for scores, exact in candidates if not exact]
        if right and wrong:
            shares.append(auc(np.round(right + wrong, 6), [1] * len(right) + [0] * len(wrong)))
    return (float(np.mean(shares)) if shares else float("nan")), len(shares)


def exact_counts(answers: Answers, weight: float) -> tuple[int, int]:
    """Queries exact in two attempts and in one, if reversibility weighs so much in the vote (the
    answers of earlier planning steps, which only break ties, are left out)."""

    def vote(a: Any) -> float:
        return 1 + SURE_WEIGHT * a["own"]["cell probability"] + weight * a["own"]["reversibility"]

    one = two = 0
    for candidates in by_candidate(answers, vote):
        ranked = sorted(candidates, key=lambda c: -sum(c[0]))  # stable
        one += ranked[0][1]
        two += any(exact for _, exact in ranked[:2])
    return two, one


def scores_of(
    batch: Batch, grids: torch.Tensor, size: torch.Tensor, backward: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Each score (Q,) of answers."""
    inp = batch.query_input
    colours = torch.nn.functional.one_hot(grids.clamp(min=0), COLOURS)
    return {
        "reversibility": reversibility(
            grids, size, backward, batch.query_input, batch.query_input_size
        ),
        "recovered": weighted_cell_mean(pick_colour(backward, inp), inp).exp(),
        "not copied": 1.0 - copied_share(colours, size, inp, batch.query_input_size),
    }


@torch.no_grad()
def answers_of(system: System, queries: Iterator[Query]) -> Answers:
    """One row per query and view: the answer, whether it is exact, its scores and the truth's."""
    found: Answers = []
    generator = torch.Generator().manual_seed(0)
    for view_number, batch, targets in queries:
        output = system.predict(batch, generator).before
        reading = system.read(batch)
        backward = system.backward_of(reading, output.grids(), output.size)
        truth = system.backward_of(reading, targets.output, targets.size)
        grids = output.grids()
        own = scores_of(batch, grids, output.size, backward)
        own["cell probability"] = answer_probability(output)
        true = scores_of(batch, targets.output, targets.size, truth)
        true["cell probability"] = own["cell probability"]  # not defined: always a tie
        canvas = [max(grids.shape[i], targets.output.shape[i]) for i in (1, 2)]
        exact = exact_match(_padded(grids, canvas), _padded(targets.output, canvas)).tolist()
        for q, (pair, view) in enumerate(zip(batch.pair_ids, batch.views, strict=True)):
            rows, cols = output.size[q].tolist()
            grid = view.invert(grids[q, :rows, :cols].numpy().astype(np.uint8))
            found.append(
                {
                    "id": pair,
                    "view": view_number,
                    "grid": (grid.shape, grid.tobytes()),
                    "exact": exact[q],
                    "own": {name: float(value[q]) for name, value in own.items()},
                    "true": {name: float(value[q]) for name, value in true.items()},
                }
            )
    return found


def _padded(grids: torch.Tensor, canvas: list[int]) -> torch.Tensor:
    more = [canvas[0] - grids.shape[1], canvas[1] - grids.shape[2]]
    return torch.nn.functional.pad(grids, (0, more[1], 0, more[0]), value=-1)


def demonstration_queries(
    tasks: list[Task], index: dict[str, int], n_views: int, batch_size: int
) -> Iterator[Query]:
    """Every demonstration of every task, predicted from the others, once per view."""
    stream = TrainingStream(tasks, 0, batch_size, task_table=index, overflow=False)
    for view in range(n_views):
        for batch, targets in stream.epoch(UNSEEN_EPOCH + view):
            yield view, batch, targets


def test_queries(
    tasks: list[Task], index: dict[str, int], n_views: int, batch_size: int, seed: int
) -> Iterator[Query]:
    """Every test query of every task, once per view; the predictor's batches hold no output."""
    hidden = [task.without_test_outputs() for task in tasks]
    for number_, view in enumerate(evaluation_views(n_views, seed)):
        for batch in evaluation_batches(hidden, view, batch_size, task_table=index):
            yield number_, batch, evaluation_targets(tasks, batch)


def report(title: str, answers: Answers, chosen: float) -> None:
    """The table of one set of queries."""
    first = [a for a in answers if a["view"] == 0]
    n_exact = sum(a["exact"] for a in first)
    print(f"{title}: {len(first)} queries, {n_exact} exact in the first view")
    head = ("a, first view", "a, all views", "b", "more", "equal", "less", "c", "queries of c")
    print(f"  {'score':<17}" + "".join(f"{name:>14}" for name in head))
    for name in ("reversibility", "recovered", "not copied", "cell probability"):
        a_first, a_all = (
            auc([a["own"][name] for a in some], [a["exact"] for a in some])
            for some in (first, answers)
        )
        b, (c, n_c) = within(answers, name), among_candidates(answers, name)
        figures: tuple[float, ...] = (a_first, a_all, b.p, b.more, b.equal, b.less, c)
        if name == "cell probability":  # of the model's own answer only
            figures = (a_first, a_all, *[float("nan")] * 4, c)
        print(f"  {name:<17}" + "".join(f"{figure:14.3f}" for figure in figures) + f"{n_c:14d}")
    for weight in sorted({*WEIGHTS, chosen}):
        two, one = exact_counts(answers, weight)
        notes = [" (chosen on demonstrations)"] * (weight == chosen)
        notes += [" (the project's)"] * (weight == 0.0)
        print(f"  vote weight {weight:<5g} exact {two} ({one} in one attempt){''.join(notes)}")


def main(argv: list[str] | None = None) -> None:
    """Measure one run and print."""
    parser = Parser(prog="bench_reversibility.py", description="Reversibility of a run's answers.")
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint file")
    parser.add_argument("--data", default="arcagi2", help="as in training (default: %(default)s)")
    parser.add_argument(
        "--max_side",
        type=number(int, 1, 30),
        default=10,
        help="tasks whose grids all fit this side, in cells (default: %(default)s: the small "
        "slice)",
    )
    parser.add_argument("--views", type=number(int, 1, 64), default=8, help="(default: 8)")
    parser.add_argument(
        "--demonstration_views",
        type=number(int, 0, 64),
        default=8,
        help="views of the demonstrations; 0 = leave them out (default: 8)",
    )
    parser.add_argument("--batch_size", type=number(int, 1), default=16, help="(default: 16)")
    parser.add_argument("--threads", type=number(int, 1, 1024), help="CPU threads")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(args.run, offline=True)
    tasks = [
        task
        for task in load_tasks(args.data).train
        if longest_side(task) <= args.max_side
        and all(max(p.input.shape) <= args.max_side for p in task.tests)
        and all(p.output is not None and max(p.output.shape) <= args.max_side for p in task.tests)
    ]
    index, chosen = model.task_index, 0.0
    if args.demonstration_views:
        shown = answers_of(
            model.system,
            demonstration_queries(tasks, index, args.demonstration_views, args.batch_size),
        )
        chosen = max(WEIGHTS, key=lambda w: (*exact_counts(shown, w), -w))
        report("Demonstrations, each predicted from the others", shown, chosen)
    tests = test_queries(tasks, index, args.views, args.batch_size, model.seed)
    report("Test queries", answers_of(model.system, tests), chosen)


if __name__ == "__main__":
    main()
