"""The refined policy: changes a prompt, chooses a proposed answer, says what that earned, and
passes it on to the policies' updates.

Glue only: the decision and its learning are `human_rl_agent`'s, the scores `reward_shaping`'s. It
never sees a target when it refines; targets enter `compute_reward` and `soft_reward` alone.
Which proposal is `proposal_policy`'s.
Import: ``from policy_refined import RefinedPolicy``. Per batch: ``refine`` -> agent forward ->
``compute_reward`` / ``soft_reward`` -> main loss stepped -> ``update``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from grid_accuracy_loss import OUTSIDE_GRID, exact_match, grid_sizes, resize_grids
from grid_parts import COLOURS
from human_rl_agent import ACTION_WIDTH, INITIAL_STD, HumanRLAgent, PolicyStep
from proposal_policy import Choice, ProposalPolicy
from ranks import Draws, draw_normal
from reward_shaping import Scores, hard_scores, shaped_reward, soft_scores

Mode = Literal["on", "off", "random"]
MODES: tuple[str, ...] = get_args(Mode)

N_STATS = 8  # figures of an answer that the state takes in, see `arc_system.answer_stats`
SUMMARY_WIDTH = 32  # the policy reads the prompt through this many fixed random projections (guess)
KEY_WIDTH = 16
MAX_CHANGE = 0.5  # the change of a token stays below this share of the token's own norm (guess)
BASIS_STD = (
    0.1  # with actions of 0.45 rms: a first change of about 0.18 of the token norm times the gate
)
PROJECTION_SEED = (
    20_240_601  # the projection is an untrained constant of the model, not a draw of the run
)


@dataclass(frozen=True)
class PolicyInfo:
    """What `refine` did; hand it to `update`. Everything is detached."""

    mode: str
    action: Tensor  # (batch, action), in (-1, 1); zeros when off
    step: PolicyStep | None  # the policy's decision; None unless mode is "on"
    change_frac: Tensor  # () mean norm of the change relative to the token's norm

    def of(self, rows: Tensor) -> PolicyInfo:
        """What was done to the given queries (n,); `change_frac` stays the mean of all."""
        step = self.step
        if step is not None:
            step = PolicyStep(**{f.name: getattr(step, f.name)[rows] for f in fields(step)})
        return replace(self, action=self.action[rows], step=step)


class RefinedPolicy(nn.Module):
    """Refines a prompt by a low-rank, gated, bounded change that the policy chooses.

    change of token l = |token_l| * gate_l * bounded(action @ basis), gate_l = sigmoid(key_l .
    query(action)).
    Two groups of parameters learn from two losses and need two optimizers:
    `main_parameters()` (basis, gates: what an action means) from the main loss through the refined
    tokens, the action being a constant there; `policy_parameters()` (which action to take) in
    `update` by its own `optimizer`.
    """

    summary_projection: Tensor

    def __init__(
        self,
        width: int,
        *,
        summary_width: int | None = None,
        n_stats: int = N_STATS,
        action_width: int = ACTION_WIDTH,
        max_change: float = MAX_CHANGE,
        generator: torch.Generator | None = None,
        **agent_options: Any,
    ) -> None:
        """`width` of prompt tokens, `summary_width` of summaries (default the same), `n_stats` per
        query.

        `generator` (CPU) draws the initial weights. `agent_options` go to `HumanRLAgent` (lr,
        hidden, ...).
        """
        super().__init__()
        self.width = width
        self.n_stats = n_stats
        self.max_change = max_change
        summary_width = width if summary_width is None else summary_width
        projected = min(SUMMARY_WIDTH, summary_width)
        self.register_buffer("summary_projection", _projection(summary_width, projected))
        self.basis = nn.Parameter(BASIS_STD * torch.randn(action_width, width, generator=generator))
        self.key = nn.Linear(width, KEY_WIDTH, bias=False)
        self.query = nn.Linear(action_width, KEY_WIDTH, bias=False)
        self.gate_bias = nn.Parameter(torch.zeros(()))
        for layer in (self.key, self.query):
            bound = 1.0 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        self.rl = HumanRLAgent(
            projected + n_stats, action_width, generator=generator, **agent_options
        )
        self.proposals = ProposalPolicy(projected + n_stats, generator=generator)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The policy's own optimizer (to be saved beside the main one)."""
        return self.rl.optimizer

    def main_parameters(self) -> list[nn.Parameter]:
        """Trained by the main loss: basis and gates."""
        return [self.basis, *self.key.parameters(), *self.query.parameters(), self.gate_bias]

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trained by `update` only; never hand them to the main optimizer."""
        return [*self.rl.parameters(), *self.proposals.parameters()]

    def state(self, summary: Tensor, stats: Tensor) -> Tensor:
        """The policy's state (batch, state): summary (batch, summary width) projected, then stats;
        detached.
        """
        if stats.shape[-1] != self.n_stats:
            raise ValueError(f"stats are {stats.shape[-1]} wide, this policy reads {self.n_stats}")
        with torch.no_grad(), torch.autocast(device_type=summary.device.type, enabled=False):
            normed = functional.layer_norm(summary.float(), summary.shape[-1:])
            return torch.cat([normed @ self.summary_projection, stats.float()], dim=-1)

    def refine(
        self,
        prompt_tokens: Tensor,
        mask: Tensor,
        summary: Tensor,
        stats: Tensor,
        generator: Draws | None = None,
        mode: str = "on",
        *,
        deterministic: bool = False,
    ) -> tuple[Tensor, PolicyInfo]:
        """(refined tokens like `prompt_tokens` in shape and dtype, what was done).

        prompt_tokens (batch, tokens, width), mask (batch, tokens) bool: False stays as it is.
        summary (batch, summary width), stats (batch, n_stats) of the answer: see `state`.
        mode "on": the policy decides; "random": tanh of 0.5 * normal, untrained; "off": the tokens
        come back as they are, bit for bit. `deterministic` (evaluation) takes the policy's mean; in
        the other cases "on" and "random" draw from `generator`. Gradient flows to the tokens and to
        `main_parameters()`.
        """
        if mode not in MODES:
            raise ValueError(f"unknown policy mode {mode!r}: choose one of {', '.join(MODES)}")
        n = prompt_tokens.shape[0]
        device = prompt_tokens.device
        if mode == "off":
            action = torch.zeros(n, self.rl.action_width, device=device)
            return prompt_tokens, PolicyInfo(mode, action, None, torch.zeros((), device=device))
        step = None
        if mode == "on":
            step = self.rl.act(self.state(summary, stats), generator, deterministic=deterministic)
            action = step.action
        else:
            if generator is None:
                raise ValueError("policy mode 'random' needs a torch.Generator")
            like = torch.empty(n, self.rl.action_width, device=device)
            action = (INITIAL_STD * draw_normal(like, generator)).tanh()
        refined, change_frac = self.apply_action(prompt_tokens, mask, action)
        return refined, PolicyInfo(mode, action, step, change_frac)

    def apply_action(
        self, prompt_tokens: Tensor, mask: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens changed by `action` (batch, action), a constant; and the mean relative change,
        0-dim.
        """
        with torch.autocast(device_type=prompt_tokens.device.type, enabled=False):
            tokens = prompt_tokens.float()
            action = action.detach().float()
            # In units of the token's own root mean square, below max_change however large the basis
            # grows.
            delta = action @ self.basis
            mean_square = delta.square().mean(dim=-1, keepdim=True)
            delta = delta * self.max_change * torch.rsqrt(self.max_change**2 + mean_square)
            token_rms = tokens.detach().square().mean(dim=-1, keepdim=True).sqrt()
            direction = tokens / (token_rms + 1e-6)
            score = (self.key(direction) * self.query(action)[:, None]).sum(dim=-1, keepdim=True)
            gate = torch.sigmoid(score / math.sqrt(KEY_WIDTH) + self.gate_bias)
            gate = gate * mask[..., None]
            refined = tokens + token_rms * gate * delta[:, None]
            with torch.no_grad():
                size = gate.squeeze(-1) * delta.square().mean(dim=-1, keepdim=True).sqrt()
                change_frac = size.sum() / mask.sum().clamp(min=1)
        return refined.to(prompt_tokens.dtype), change_frac

    def compute_reward(
        self,
        before: Tensor,
        after: Tensor,
        target: Tensor,
        inp: Tensor,
        *,
        size_before: Tensor | None = None,
        size_after: Tensor | None = None,
        target_size: Tensor | None = None,
        reconstruction_before: Tensor | None = None,
        reconstruction_after: Tensor | None = None,
        copied_before: Tensor | None = None,
        copied_after: Tensor | None = None,
    ) -> tuple[Tensor, Scores]:
        """Hard reward (batch,) = 1.0 d_acc + 0.5 d_size + 0.5 d_color + 0.5 d_rev, and the four
        differences.

        before, after, target, inp: colour grids (batch, rows, cols), negative outside, each on its
        own canvas;
        or single (rows, cols) grids, then all results are 0-dim. Grids that differ from the target
        in size are resized to it (nearest) for accuracy and colours.
        size_before, size_after (batch, 2): the model's own predicted sizes; default: the grids'
        own. They are never the resized ones, so `d_size` is live also when the caller resized
        already.
        reconstruction_* (batch, input rows, input cols): the input that the backward model finds
        for each prediction, on the input's canvas; without them d_rev is 0. copied_* (batch,): the
        share of the input that each prediction shows as it is; with them d_rev pays what comes on
        top.
        """
        if target.dim() == 2:
            grids = [_batch_of_one(g) for g in (before, after, target, inp)]
            reward, breakdown = self.compute_reward(
                grids[0],
                grids[1],
                grids[2],
                grids[3],
                size_before=_optional_batch(size_before),
                size_after=_optional_batch(size_after),
                target_size=_optional_batch(target_size),
                reconstruction_before=_optional_batch(reconstruction_before),
                reconstruction_after=_optional_batch(reconstruction_after),
                copied_before=_optional_batch(copied_before),
                copied_after=_optional_batch(copied_after),
            )
            return reward[0], {name: value[0] for name, value in breakdown.items()}
        target_size = grid_sizes(target) if target_size is None else target_size
        canvas = (target.shape[1], target.shape[2])
        scores = []
        for grids_in, size, reconstruction, copied in (
            (before, size_before, reconstruction_before, copied_before),
            (after, size_after, reconstruction_after, copied_after),
        ):
            own_size = grid_sizes(grids_in)
            scores.append(
                hard_scores(
                    resize_grids(grids_in.long(), own_size, target_size, canvas),
                    target,
                    size=own_size if size is None else size,
                    target_size=target_size,
                    reconstruction=reconstruction,
                    inp=inp,
                    copied=copied,
                )
            )
        return shaped_reward(scores[0], scores[1])

    def proposal_rewards(
        self,
        own: Tensor,
        proposed: Tensor,
        size: Tensor,
        target: Tensor,
        inp: Tensor,
        *,
        own_size: Tensor,
        target_size: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What each candidate would earn if the agent answered with it as it is, and whether it is
        exact: (batch, A + 1) float32 and bool, number 0 the agent's own answer, which earns 0.

        own (batch, rows, cols) and own_size (batch, 2); proposed (batch, A, rows, cols) uint8 and
        size (batch, A, 2), 0 = none; target, inp (batch, ...) each on its own canvas; target_size
        (batch, 2). The reward is `compute_reward`'s but for d_rev, for which every candidate would
        have to be read backwards.
        """
        n, offered = size.shape[:2]
        canvas = (target.shape[1], target.shape[2])
        shown = resize_grids(own.long(), own_size, target_size, canvas)
        earned = torch.zeros(n, 1, device=own.device)
        exact = exact_match(shown, target, (own_size == target_size).all(-1))[:, None]
        if not offered:
            return earned, exact

        def each(x: Tensor) -> Tensor:
            """A query's row once for each of its candidates."""
            return x.repeat_interleave(offered, 0)

        grids = proposed.flatten(0, 1).long()
        grids = torch.where(grids < COLOURS, grids, OUTSIDE_GRID)
        is_there = (size > 0).all(-1).flatten()
        side = size.flatten(0, 1).clamp(min=1)
        goal, goal_size = each(target), each(target_size)
        reward, _ = self.compute_reward(
            each(own),
            grids,
            goal,
            each(inp),
            size_before=each(own_size),
            size_after=side,
            target_size=goal_size,
        )
        right = resize_grids(grids, side, goal_size, canvas)
        hit = exact_match(right, goal, is_there & (side == goal_size).all(-1))
        earned = torch.cat([earned, torch.where(is_there, reward, 0.0).view(n, offered)], 1)
        return earned, torch.cat([exact, hit.view(n, offered)], 1)

    def learn_choice(self, choice: Choice, rewards: Tensor, exact: Tensor) -> dict[str, Tensor]:
        """The choice among proposals learns from `proposal_rewards`; see `ProposalPolicy.learn`."""
        return self.proposals.learn(choice, rewards, exact)

    def soft_reward(
        self,
        logits_before: Tensor | None,
        logits_after: Tensor,
        target: Tensor,
        *,
        size_logits_before: Tensor | None = None,
        size_logits_after: Tensor | None = None,
        target_size: Tensor | None = None,
        backward_logits_before: Tensor | None = None,
        backward_logits_after: Tensor | None = None,
        inp: Tensor | None = None,
        copied_before: Tensor | None = None,
        copied_after: Tensor | None = None,
    ) -> tuple[Tensor, Scores]:
        """The same reward in expectation, (batch,), with gradient through everything "after".

        logits_* (batch, rows, cols, colours) on the target's canvas (resized bilinearly),
        size_logits_* (batch, 2, sides), backward_logits_* on the input's canvas. "Before" is a
        constant: with gradient it would pay the agent for a worse first answer.
        `logits_before=None` counts it as 0 (same gradient).
        """
        after = soft_scores(
            logits_after,
            target,
            size_logits=size_logits_after,
            target_size=target_size,
            backward_logits=backward_logits_after,
            inp=inp,
            copied=copied_after,
        )
        before: Mapping[str, Tensor] = {name: torch.zeros_like(s) for name, s in after.items()}
        if logits_before is not None:
            with torch.no_grad():
                before = soft_scores(
                    logits_before,
                    target,
                    size_logits=size_logits_before,
                    target_size=target_size,
                    backward_logits=backward_logits_before,
                    inp=inp,
                    copied=copied_before,
                )
        return shaped_reward(before, after)

    def update(self, info: PolicyInfo, reward: Tensor, next_state: Tensor) -> dict[str, Tensor]:
        """The policy learns from the hard `reward` (batch,); `next_state` = ``state(summary,
        stats)`` afterwards.

        Run it after the main optimizer's step. Returns `HumanRLAgent.update`'s figures; an empty
        dict when the policy did not decide (modes "off" and "random").
        """
        return {} if info.step is None else self.rl.update(info.step, reward, next_state)


def _projection(width: int, projected: int) -> Tensor:
    """A fixed random matrix (width, projected) that keeps the scale of a layer-normed vector's
    entries.
    """
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    return torch.randn(width, projected, generator=generator) / math.sqrt(width)


def _batch_of_one(grid: Tensor) -> Tensor:
    return grid[None]


def _optional_batch(value: Tensor | None) -> Tensor | None:
    return None if value is None else value[None]
