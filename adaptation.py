"""Test-time training: fit a trained system to tasks it has never met, on their demonstrations alone,
and say for which of them that helped.

Each unseen task gets a row of task tokens; then every demonstration is the query in turn, predicted
from the others, in random views, while tokens (and, if wanted, weights) learn from the EFE loss and the
policy from its reward. Unlike training it never drops a task's tokens, stores no memories, and has
no soft reward in its loss. No test input or output is looked at, and nothing is written: the system
that is given stays as it is, what learns is a copy.

*Accepted* is a task whose demonstrations are then predicted from each other better: more of
them exactly, or as many and more cells, by one view each at the size that the system itself predicts.
No demonstration is judged by weights that have trained on it: the demonstrations are dealt into FOLDS
folds, a copy trains without the fold that it is judged on, and only a last copy, which answers, trains
on all. So the measure is not flattered by what was learnt by heart; it is about a system with fewer
demonstrations than the one that answers, and of two to six pairs: a rise can be chance, as can a fall.
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
from dataset_arc import Batch, Targets, Task, TrainingStream, View, generator
from evaluation import outcomes, predict_tasks, without_outputs
from grid_accuracy_loss import resize_logits

PARTS = ("tokens", "all")
TOKEN_LR_FACTOR = 10.0  # as in training
CLIP = 1.0
FOLDS = 3  # of two, one would leave a task of three demonstrations, the usual number, a single pair
MEASURE_SHARE = 1 / 6  # of the seconds, before training; as much again after it, the rest trains
MEASURED_AT_ONCE = 8  # tasks; a guess
ASKED_AT_ONCE = 16  # queries
Judged = tuple[bool, float]  # an answer: whether it is exact, share of right cells


class Measure(NamedTuple):
    """How well a task's demonstrations were predicted from each other; the greater the better."""

    exact: int = 0
    cells: float = 0.0  # mean share of right cells, 0 at a wrong size


@dataclass(frozen=True)
class Adapted:
    """system: the one that has trained on all demonstrations, for the accepted tasks alone (the given
    one where there are none); task_index: rows of its task table, old and new; before, after: the
    measures of every task that was adapted; n_batches: done in all trainings, those whose gradient was
    not finite included; n_late: tasks for which there was no time."""

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
    progress: Callable[[float], None] | None = None,
) -> Adapted:
    """Train copies of `system` on the demonstrations of those `tasks` that have no row yet, and judge.

    Ends after `seconds`, measuring included, or each training after `n_batches`, whichever is given;
    the learning rate falls to 0 by then, so n_batches repeats a run bit for bit on a CPU. Of `seconds`
    a sixth is for measuring the tasks, small ones first; those it does not get to are left alone. parts: what
    learns, "tokens" of the new tasks or "all" weights but the language model's; the policy learns in
    both cases. lr: of the weights; tokens take ten times as much. progress gets the share done. Tasks
    with one demonstration have nothing to learn from and stay unseen. Raises ValueError for other
    parts or no end.
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

    judged: dict[str, list[Judged]] = {}
    while len(judged) < len(unseen) and (not judged or left(1 - MEASURE_SHARE) > 0):
        some = unseen[len(judged) : len(judged) + MEASURED_AT_ONCE]
        judged |= _told_from_others(system, some, {}, range(FOLDS), **how)
        report(0.0)
    measuring_s = time.monotonic() - begun
    chosen = unseen[: len(judged)]
    before = {task_id: _measure(answers) for task_id, answers in judged.items()}
    first_row = len(system.solver2.task_tokens.weight)
    index |= {task.task_id: first_row + i for i, task in enumerate(chosen)}
    judged = {task.task_id: [] for task in chosen}
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
        for task_id, more in _told_from_others(judge, chosen, index, [fold], **how).items():
            judged[task_id] += more
    after = {task_id: _measure(answers) for task_id, answers in judged.items()}
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


def _told_from_others(
    system: System,
    tasks: Sequence[Task],
    task_index: dict[str, int],
    folds: Iterable[int],
    **how: Any,
) -> dict[str, list[Judged]]:
    """How the demonstrations of these folds come out, each predicted from all others of its task.

    One of a task at a time: an output that is asked for is in no batch as another query's context.
    """
    found: dict[str, list[Judged]] = {task.task_id: [] for task in tasks}
    longest = max(len(task.demonstrations) for task in tasks)
    for number in (n for fold in folds for n in range(fold, longest, FOLDS)):
        asked = [
            dataclasses.replace(
                task, demonstrations=(*d[:number], *d[number + 1 :]), tests=(d[number],)
            )
            for task in tasks
            if number < len(d := task.demonstrations)
        ]
        answers = predict_tasks(
            system,
            without_outputs(asked),
            [View()],
            task_index=task_index,
            batch_size=ASKED_AT_ONCE,
            **how,
        )
        for (task_id, _), outcome in outcomes(answers, asked).items():
            found[task_id].append((outcome.attempt_1, outcome.cells))
    return found


def _measure(answers: Sequence[Judged]) -> Measure:
    exact, cells = zip(*answers, strict=True)
    return Measure(sum(exact), sum(cells) / len(cells))


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
    """Train in place, at least one batch if there is any; the number of batches done."""
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
    """(loss, the policy's update to be called after the step) of one batch."""
    refining = system.config.policy != "off"
    with torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None):
        reading = system.read(batch)
        with torch.set_grad_enabled(not refining):
            before = after = system.answer(reading)
        info = None
        if refining:
            refinement = system.refine(reading, before, rng)
            info, after = refinement.info, system.answer(reading, refinement)
        backward = system.backward(reading, after)
        backward_true = system.backward_of(reading, targets.output, targets.size)
    canvas = (targets.output.shape[1], targets.output.shape[2])
    target = targets.output.masked_fill(~targets.fits[:, None, None], -1)
    size_right = (after.size == targets.size).all(-1)
    efe = system.efe_loss(
        logits=resize_logits(after.logits, after.size, targets.size, canvas),
        target=target,
        confidence=after.confidence,
        size_right=size_right,
        size_logits=after.size_logits,
        target_size=targets.size,
        backward_logits=backward,
        backward_logits_true=backward_true,
        inp=batch.query_input,
    )

    def learn_policy() -> None:
        if info is None:
            return
        reward, _ = system.policy_rl.compute_reward(
            before.grids(),
            after.grids(),
            target,
            batch.query_input,
            size_before=before.size,
            size_after=after.size,
            target_size=targets.size,
        )
        state = system.policy_rl.state(reading.prompt.summary, answer_stats(after))
        system.policy_rl.update(info, reward, state)

    return efe["total"], learn_policy


def _forever(stream: TrainingStream, seed: int) -> Iterator[tuple[tuple[int, ...], Batch, Targets]]:
    """((seed, epoch, position), batch, targets) without end; nothing where no task has two pairs."""
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
    tokens = system.solver2.task_tokens.weight
    agent, solver2 = system.agent.parameters(), system.solver2.parameters()
    refinement, heads = system.policy_rl.main_parameters(), system.qwen.head_parameters()
    weights = [
        p for p in (*agent, *solver2, *refinement, *heads) if p.requires_grad and p is not tokens
    ]
    frozen = [p for p in system.qwen.lm_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [tokens], "base_lr": TOKEN_LR_FACTOR * lr}]
    if parts == "all":
        groups.append({"params": weights, "base_lr": lr})
    else:
        frozen += weights
    return frozen, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
