"""Test-time training: fit a trained system to tasks it has never met, on their demonstrations alone.

Each unseen task gets a row of task tokens; then every demonstration is asked in turn, told from the
others, in random views, while tokens (and, if wanted, weights) learn from the EFE loss and the
policy from its reward. Unlike training it never drops a task's tokens, stores no memories, and has
no soft reward in its loss. No test input or output is looked at, and nothing is written: the
checkpoint stays as it is. `from adaptation import adapt`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from arc_system import System, answer_stats
from dataset_arc import Batch, Targets, Task, TrainingStream, generator
from grid_accuracy_loss import exact_match, resize_grids, resize_logits

PARTS = ("tokens", "all")
TOKEN_LR_FACTOR = 10.0  # as in training
CLIP = 1.0


@dataclass(frozen=True)
class Adapted:
    """task_index: rows of the task table, old and new; n_batches: done, those whose gradient was not
    finite included; exact_first, exact_last: share of leave-one-out queries answered right in their
    first and last quarter. These are trained on, so the last says little about tests."""

    task_index: dict[str, int]
    n_batches: int
    exact_first: float
    exact_last: float


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
    """Train `system`, in place, on the demonstrations of those `tasks` that have no row yet.

    Ends after `seconds` or after `n_batches`, whichever is given; the learning rate falls to 0 by
    then, so n_batches repeats a run bit for bit on a CPU. parts: what learns, "tokens" of the new
    tasks or "all" weights but the language model's; the policy learns in both cases. lr: of the weights;
    tokens take ten times as much. progress gets the share done. Tasks with one demonstration have
    nothing to learn from and stay unseen. Raises ValueError for other parts or no end.
    """
    if parts not in PARTS or (seconds is None) == (n_batches is None):
        raise ValueError(f"parts is one of {PARTS}, and one of seconds and n_batches is given")
    unseen = [t for t in tasks if t.task_id not in task_index and len(t.demonstrations) > 1]
    index = dict(task_index)
    if not unseen:
        return Adapted(index, 0, 0.0, 0.0)
    first_row = system.solver2.add_tasks(len(unseen))
    index |= {task.task_id: first_row + i for i, task in enumerate(unseen)}
    stream = TrainingStream(unseen, seed, batch_size, task_table=index)
    frozen, optimizer = _what_learns(system, parts, lr)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    exact: list[torch.Tensor] = []
    begun = time.monotonic()
    was_training = system.agent.training
    system.train(True)
    for p in frozen:
        p.requires_grad_(False)
    try:
        for number, (place, batch, targets) in enumerate(_forever(stream, seed)):
            done = (
                number / n_batches if n_batches else (time.monotonic() - begun) / (seconds or 1.0)
            )
            if number and done >= 1.0:
                break
            if progress is not None:
                progress(done)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * max(0.0, 1.0 - done)
            rng = torch.Generator(device=device).manual_seed(int(generator(*place).integers(2**62)))
            loss, right, learn_policy = _leave_one_out(
                system, batch.to(device), targets.to(device), rng, device, dtype
            )
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(params, CLIP)
            if bool(torch.isfinite(norm)):
                optimizer.step()
            system.policy_rl.zero_grad(set_to_none=True)
            optimizer.zero_grad(set_to_none=True)
            learn_policy()
            exact.append(right)
    finally:
        for p in frozen:
            p.requires_grad_(True)
        system.train(was_training)
    quarter = max(1, len(exact) // 4)
    shares = [float(torch.cat(part).mean()) for part in (exact[:quarter], exact[-quarter:])]
    return Adapted(index, len(exact), *shares)


def _leave_one_out(
    system: System,
    batch: Batch,
    targets: Targets,
    rng: torch.Generator,
    device: str,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    """(loss, exact (Q,) float, the policy's update to be called after the step) of one batch."""
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
    shown = resize_grids(after.grids(), after.size, targets.size, canvas)
    right = exact_match(shown, target, size_right).float()

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

    return efe["total"], right, learn_policy


def _forever(stream: TrainingStream, seed: int) -> Iterator[tuple[tuple[int, ...], Batch, Targets]]:
    """((seed, epoch, position), batch, targets) without end."""
    for epoch in itertools.count():
        for position in range(stream.n_batches(epoch)):
            yield (seed, epoch, position), *stream.batch(epoch, position)


def _what_learns(
    system: System, parts: str, lr: float
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """(trained tensors that have to stand still meanwhile, the optimizer of the others).

    The language model stands still: its learning rate in training is its own, and with a large one
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
