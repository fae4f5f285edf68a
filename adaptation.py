"""Test-time training: fit a trained system to tasks it has never met, on their demonstrations
alone, and say for which of them that helped.

Each unseen task gets a row of task tokens; then every demonstration is asked in turn, predicted
from the others, in random views, while tokens (and, if wanted, weights) learn from the EFE loss and
the policy from its reward. Unlike training it never drops a task's tokens, stores no memories, has
no proposals, no soft reward in its loss, and no d_rev in the policy's reward. No test input or
output is looked at, and nothing is written: the system that is given stays as it is, what learns is
a copy.

*Accepted* is a task whose demonstrations are then predicted from each other better than before:
more of them exactly, or as many and more cells, by one view each at the size that the system itself
predicts. No demonstration is judged by weights that have trained on it: the demonstrations are
dealt into FOLDS folds, a copy trains without the fold that it is judged on, and only a last copy,
which answers, trains on all. So the measure is not flattered by what was learnt by heart; it is
about a system with fewer demonstrations than the one that answers, and of two to six pairs: a rise
can be chance, as can a fall.
`from adaptation import adapt`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from arc_system import System, answer_stats
from batches import Batch, Targets, TrainingStream, generator
from dataset_arc import Task
from evaluation import Outcome, left_out, left_out_outcomes

PARTS = ("tokens", "all")
TOKEN_LR_FACTOR = 10.0  # as in training
CLIP = 1.0
FOLDS = 3  # of two, one would leave a task of three demonstrations, the usual number, a single pair
MEASURE_SHARE = 1 / 6  # of the seconds, before training; as much again after it, the rest trains
MEASURED_AT_ONCE = 8  # tasks; a guess


class Measure(NamedTuple):
    """How well a task's demonstrations were predicted from each other; the greater the better."""

    exact: int = 0
    cells: float = 0.0  # mean share of right cells, 0 at a wrong size


@dataclass(frozen=True)
class Adapted:
    """system: the one that has trained on all demonstrations, for the accepted tasks alone (the
    given one where there are none); task_index: rows of its task table, old and new; before, after:
    the measures of every task that was adapted; n_batches: done in all trainings, those whose
    gradient was not finite included; n_late: tasks for which there was no time."""

    system: System
    task_index: dict[str, int]
    before: dict[str, Measure] = field(default_factory=dict)
    after: dict[str, Measure] = field(default_factory=dict)
    n_batches: int = 0
    n_late: int = 0

    @property
    def accepted(self) -> frozenset[str]:
        """Ids of the tasks that are better answered by the adapted system, by its own measure."""
        return frozenset(t for t, before in self.before.items() if self.after[t] > before)


def adapt(
    system: System,
    tasks: Sequence[Task],
    task_index: Mapping[str, int],
    *,
    seconds: float | None = None,
    n_batches: int | None = None,
    parts: str = "all",
    lr: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    at_once: int = 1,
    progress: Callable[[float], None] | None = None,
) -> Adapted:
    """Train copies of `system` on the demonstrations of those `tasks` that have no row yet, and
    judge. Returns `Adapted`: the copy that answers, its task rows, and what was measured.

    tasks: their tests are not looked at. task_index: row of the task table by task id, of the tasks
    known so far. Ends after `seconds`, measuring included, or each training after `n_batches`,
    whichever is given; the learning rate falls to 0 by then, so n_batches repeats a run bit for bit
    on a CPU. Of `seconds` a sixth is for measuring the tasks, small ones first; those it does not
    get to are left alone. parts: what learns, "tokens" of the new tasks or "all" weights but the
    language model's; the policy learns in both cases. lr: of the weights; tokens take ten times as
    much. batch_size: queries; to measure, twice as many. dtype: of autocast, None = off; float16
    would need a scaler and has none. at_once: as of `predict_tasks`, to measure. progress gets the
    share done, in 0..1. Tasks with one demonstration have nothing to learn from and stay unseen.
    Raises ValueError for other parts, or for no end or two.
    """
    if parts not in PARTS or (seconds is None) == (n_batches is None):
        raise ValueError(f"parts is one of {PARTS}, and one of seconds and n_batches is given")
    unseen = [t for t in tasks if t.task_id not in task_index and len(t.demonstrations) > 1]
    index = dict(task_index)
    if not unseen:
        return Adapted(system, index)
    unseen.sort(key=_largest_grid)
    begun = time.monotonic()
    how: dict[str, Any] = {"device": device, "dtype": dtype, "seed": seed}

    def left(share: float = 0.0) -> float:
        """Seconds until this share of them is left; without end where batches are counted."""
        return begun + (1 - share) * seconds - time.monotonic() if seconds else math.inf

    def report(share: float) -> None:
        if progress is not None:
            progress(1 - max(0.0, left()) / seconds if seconds else share)

    asking: dict[str, Any] = {**how, "batch_size": 2 * batch_size, "at_once": at_once}
    answered: dict[str, list[Outcome]] = {}
    while len(answered) < len(unseen) and (not answered or left(1 - MEASURE_SHARE) > 0):
        some = unseen[len(answered) : len(answered) + MEASURED_AT_ONCE]
        answered |= _outcomes_of_folds(system, some, {}, range(FOLDS), **asking)
        report(0.0)
    measuring_s = time.monotonic() - begun
    chosen = unseen[: len(answered)]
    before = {task_id: _measure(answers) for task_id, answers in answered.items()}
    first_row = len(system.solver2.task_tokens.weight)
    index |= {task.task_id: first_row + i for i, task in enumerate(chosen)}
    answered = {task.task_id: [] for task in chosen}
    n_done = 0

    def trained(number: int, some: Sequence[Task]) -> System:
        """A copy that has trained on these tasks. The trainings share what measuring leaves."""
        nonlocal n_done
        learner = _copy(system, len(chosen))
        share_s = (left() - measuring_s * (FOLDS - number) / FOLDS) / (FOLDS + 1 - number)
        n_done += _train(
            learner,
            TrainingStream(some, seed, batch_size, task_table=index),
            _what_learns(learner, parts, lr),
            until=time.monotonic() + share_s,
            n_batches=n_batches,
            progress=lambda share: report((number + share) / (FOLDS + 1)),
            **how,
        )
        return learner

    for fold in range(FOLDS):
        judge = trained(fold, [_without(task, fold) for task in chosen])
        for task_id, more in _outcomes_of_folds(judge, chosen, index, [fold], **asking).items():
            answered[task_id] += more
    after = {task_id: _measure(answers) for task_id, answers in answered.items()}
    better = any(after[task_id] > before[task_id] for task_id in before)
    answering = trained(FOLDS, chosen) if better else system
    return Adapted(answering, index, before, after, n_done, len(unseen) - len(chosen))


def _largest_grid(task: Task) -> int:
    """Of its demonstrations, in cells."""
    grids = [g for pair in task.demonstrations for g in (pair.input, pair.output)]
    return max(grid.size for grid in grids if grid is not None)


def _without(task: Task, fold: int) -> Task:
    """The task without the demonstrations of a fold."""
    kept = [pair for i, pair in enumerate(task.demonstrations) if i % FOLDS != fold]
    return dataclasses.replace(task, demonstrations=tuple(kept))


def _outcomes_of_folds(
    system: System,
    tasks: Sequence[Task],
    task_index: dict[str, int],
    folds: Iterable[int],
    **how: Any,
) -> dict[str, list[Outcome]]:
    """How the demonstrations of these folds come out, each predicted from all others of its task.

    One of a task at a time: an output that is asked for is in no batch as another query's context.
    """
    found: dict[str, list[Outcome]] = {task.task_id: [] for task in tasks}
    longest = max(len(task.demonstrations) for task in tasks)
    for number in (n for fold in folds for n in range(fold, longest, FOLDS)):
        questions = [left_out(t, number) for t in tasks if number < len(t.demonstrations)]
        answers = left_out_outcomes(system, questions, task_index=task_index, **how)
        for task_id, outcome in answers.items():
            found[task_id].append(outcome)
    return found


def _measure(answers: Sequence[Outcome]) -> Measure:
    cells = [outcome.cells for outcome in answers]
    return Measure(sum(outcome.attempt_1 for outcome in answers), sum(cells) / len(cells))


def _copy(system: System, n_new: int) -> System:
    """The system with rows for new tasks. It shares the language model, which is frozen."""
    backbone = system.qwen.backbone
    copied = copy.deepcopy(system, {id(backbone): backbone})
    copied.solver2.add_tasks(n_new)
    return copied


def _train(
    system: System,
    stream: TrainingStream,
    what: tuple[list[torch.nn.Parameter], torch.optim.Optimizer],
    *,
    until: float,
    n_batches: int | None,
    progress: Callable[[float], None],
    device: str,
    dtype: torch.dtype | None,
    seed: int,
) -> int:
    """Train in place, at least one batch if there is any; the number of batches done.

    what: from `_what_learns`. until: time.monotonic() at which the learning rate has fallen to 0
    and training ends, unless n_batches says when. A gradient that is not finite moves nothing.
    """
    frozen, optimizer = what
    params = [p for group in optimizer.param_groups for p in group["params"]]
    begun = time.monotonic()
    was_training = system.agent.training
    n_done = 0
    system.train(True)
    for p in frozen:
        p.requires_grad_(False)
    try:
        for place, batch, targets in _forever(stream, seed):
            now = time.monotonic()
            done = n_done / n_batches if n_batches else (now - begun) / max(until - begun, 1e-9)
            if n_done and done >= 1.0:
                break
            progress(min(1.0, done))
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * max(0.0, 1.0 - done)
            rng = torch.Generator(device=device).manual_seed(int(generator(*place).integers(2**62)))
            loss, learn_policy = _leave_one_out(
                system, batch.to(device), targets.to(device), rng, device, dtype
            )
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(params, CLIP)
            if bool(torch.isfinite(norm)):
                optimizer.step()
            system.policy_rl.zero_grad(set_to_none=True)
            optimizer.zero_grad(set_to_none=True)
            learn_policy()
            n_done += 1
    finally:
        for p in frozen:
            p.requires_grad_(True)
        system.train(was_training)
    return n_done


def _leave_one_out(
    system: System,
    batch: Batch,
    targets: Targets,
    rng: torch.Generator,
    device: str,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, Callable[[], None]]:
    """(loss, the policy's update to be called after the step) of one batch without proposals."""
    with torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None):
        reading = system.read(batch)
        passed = system.answer_twice(reading, rng)
        after, refinement = passed.after, passed.refinement
        backward = system.backward(reading, after)
        backward_true = system.backward_of(reading, targets.output, targets.size)
    earned = system.reward(reading, passed, targets)
    efe = system.efe_loss(
        logits=earned.logits,
        target=earned.target,
        confidence=after.confidence,
        size_right=earned.size_right,
        size_logits=after.size_logits,
        target_size=targets.size,
        backward_logits=backward,
        backward_logits_true=backward_true,
        inp=batch.query_input,
    )

    def learn_policy() -> None:
        if refinement is None:
            return
        state = system.policy_rl.state(reading.prompt.summary, answer_stats(after))
        system.policy_rl.update(refinement.info, earned.hard, state)

    return efe["total"], learn_policy


def _forever(stream: TrainingStream, seed: int) -> Iterator[tuple[tuple[int, ...], Batch, Targets]]:
    """((seed, epoch, position), batch, targets) without end; none where no task has two pairs."""
    for epoch in itertools.count() if stream.tasks else ():
        for position in range(stream.n_batches(epoch)):
            yield (seed, epoch, position), *stream.batch(epoch, position)


def _what_learns(
    system: System, parts: str, lr: float
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """(parameters that are frozen meanwhile, the optimizer of the others).

    The language model is frozen: its learning rate in training is its own, and with a large one
    its gradient costs more than all else.
    """
    trained = system.trained_parts()
    tokens, frozen = trained.pop("task_tokens"), trained.pop("qwen")
    weights = [p for part in trained.values() for p in part]
    groups: list[dict[str, Any]] = [{"params": tokens, "base_lr": TOKEN_LR_FACTOR * lr}]
    if parts == "all":
        groups.append({"params": weights, "base_lr": lr})
    else:
        frozen += weights
    return frozen, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
