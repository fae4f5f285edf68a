"""The policy: given a small state vector it proposes a small action, and learns from the reward it
brought.

Knows nothing of grids, prompts or tasks. Owns its networks, its optimizer, its curiosity and its
running normalisation; the caller decides what an action does and what it earns. Draws only from a
generator it is given.
Import: ``from human_rl_agent import HumanRLAgent``; ``step = agent.act(state, generator)``, then
``agent.update(step, reward, next_state)`` once the main loss has been stepped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ranks import Draws, draw_normal

ACTION_WIDTH = 16
REWARD_SCALE = 5.0  # the user's: stronger signal for the policy
REWARD_LIMIT = (
    10.0  # after scaling; shaped rewards are within 2.5 * 5, so this cuts freak values only
)
STATE_LIMIT = 5.0  # standard deviations
MEAN_LIMIT = 2.0  # pre-squash; tanh(2) = 0.96, beyond it actions no longer differ
LOG_STD_MIN, LOG_STD_MAX = -2.5, 0.0  # std 0.08 .. 1 before the squash (guess)
INITIAL_STD = 0.5


@dataclass(frozen=True)
class PolicyStep:
    """One decision, all tensors detached. `state` is what the network saw (normalised), `raw_state`
    what came in.
    """

    raw_state: Tensor  # (batch, state)
    state: Tensor  # (batch, state)
    raw_action: Tensor  # (batch, action) the Gaussian's sample, before the squash
    action: Tensor  # (batch, action) tanh(raw_action)
    log_prob: Tensor  # (batch,) of raw_action
    value: Tensor  # (batch,)
    mean: Tensor  # (batch, action) before the squash
    std: Tensor  # (batch, action)


class RunningNorm(nn.Module):
    """Mean and variance of everything seen, in buffers; the identity before anything was."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, state: Tensor) -> Tensor:
        scaled = (state - self.mean) * torch.rsqrt(self.var + 1e-4)
        return scaled.clamp(-STATE_LIMIT, STATE_LIMIT)

    @torch.no_grad()
    def absorb(self, state: Tensor) -> None:
        """Merge a batch (batch, width) into the running figures (Chan et al.'s pairwise update).

        The initial unit variance counts as one observation, so that a first batch of one is not
        divided by 0.
        """
        n_new = state.shape[0]
        total = self.count + n_new
        delta = state.mean(dim=0) - self.mean
        within = state.var(dim=0, unbiased=False) * n_new
        spread = self.var * self.count.clamp(min=1.0) + within
        self.var.copy_(
            (spread + delta.square() * self.count * n_new / total) / total.clamp(min=1.0)
        )
        self.mean.add_(delta * n_new / total)
        self.count.copy_(total)


class Curiosity(nn.Module):
    """Intrinsic curiosity module (Pathak et al. 2017) on (state, action, next state).

    Features are trained by the inverse model only (which action led from here to there?), so they
    hold what actions can change; the forward model predicts the next features from constant ones,
    so that the features cannot collapse to please it. Its error is the bonus: high where the effect
    of an action is not yet known.
    """

    def __init__(
        self, state_width: int, action_width: int, feature_width: int, hidden: int
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(state_width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, feature_width),
            nn.LayerNorm(feature_width, elementwise_affine=False),
        )
        self.inverse = nn.Sequential(
            nn.Linear(2 * feature_width, hidden), nn.SiLU(), nn.Linear(hidden, action_width)
        )
        self.forward_model = nn.Sequential(
            nn.Linear(feature_width + action_width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, feature_width),
        )

    def forward(self, state: Tensor, action: Tensor, next_state: Tensor) -> tuple[Tensor, Tensor]:
        """(inverse error, forward error), each (batch,), mean squared over action or feature
        entries.
        """
        here, there = self.features(state), self.features(next_state)
        inverse_error = (self.inverse(torch.cat([here, there], dim=-1)) - action).square().mean(-1)
        predicted = self.forward_model(torch.cat([here.detach(), action], dim=-1))
        forward_error = (predicted - there.detach()).square().mean(-1)
        return inverse_error, forward_error


class HumanRLAgent(nn.Module):
    """Gaussian policy with tanh squash, value baseline, entropy bonus and curiosity.

    How it differs from textbook REINFORCE / PPO:

    1. One-step episodes (a contextual bandit): one state, one action, one reward. No discount, no
       bootstrap, no advantage estimation over time; the next state serves curiosity only.
    2. Every batch is used `n_epochs` times whole, with PPO's clipped ratio; no minibatches and no
       stop by KL (both would wait for the device). The first pass is REINFORCE with a baseline.
    3. Log-probabilities are those of the Gaussian's sample *before* the squash. The tanh correction
       sum log(1 - tanh(u)^2) depends on the sample u alone, not on the policy's parameters: it
       cancels in the ratio and has no score. Entropy is the Gaussian's, too.
    4. Baseline: own value, then leave-one-out; with e = return - value,
       advantage_i = e_i - mean_{j != i} e_j. Neither depends on the pair's own action, so the
       gradient stays unbiased; a batch of one uses the value alone. Advantages are not
       standardised: that would blow up noise when all rewards are equal.
    5. Return = 5 * reward + curiosity bonus. The bonus is the forward model's error before this
       update, clipped, times a small scale.
    6. The standard deviation does not depend on the state and is bounded; so is the mean.
    7. States are normalised by running figures that change only at the end of an update: the
       update sees exactly the numbers that the decision was taken on.
    8. The mean is drawn to 0 (no change) by a small `prior_weight`. Measured on a bandit of three
       directions, one of which pays nothing, 200 updates of 16: without it that one wanders to the
       bound (|action| 0.8 to 0.96 in 4 of 4 seeds), with 0.01 it stays inside (median 0.15, at
       worst 0.58, 8 seeds) while the paying ones reach 0.96.
    9. A batch with any non-finite number changes nothing and is counted in `n_skipped`.

    `update` has its own graph, optimizer and clipping: run it after the main optimizer's step.
    """

    n_updates: Tensor
    n_skipped: Tensor

    def __init__(
        self,
        state_width: int,
        action_width: int = ACTION_WIDTH,
        *,
        hidden: int = 64,
        feature_width: int = 16,
        lr: float = 1e-3,
        n_epochs: int = 2,
        clip_ratio: float = 0.2,
        value_weight: float = 0.5,
        entropy_weight: float = 1e-3,
        prior_weight: float = 0.01,
        curiosity_scale: float = 0.02,
        curiosity_limit: float = 2.0,
        max_grad_norm: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """`generator` (CPU) draws the initial weights; None leaves them to torch's default
        initialisation.
        """
        super().__init__()
        self.state_width = state_width
        self.action_width = action_width
        self.n_epochs = n_epochs
        self.clip_ratio = clip_ratio
        self.value_weight = value_weight
        self.entropy_weight = entropy_weight
        self.prior_weight = prior_weight
        self.curiosity_scale = curiosity_scale
        self.curiosity_limit = curiosity_limit
        self.max_grad_norm = max_grad_norm

        self.norm = RunningNorm(state_width)
        self.trunk = nn.Sequential(
            nn.Linear(state_width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.mean_head = nn.Linear(hidden, action_width)
        self.value_head = nn.Linear(hidden, 1)
        self.std_logit = nn.Parameter(torch.full((action_width,), _std_logit(INITIAL_STD)))
        self.curiosity = Curiosity(state_width, action_width, feature_width, hidden)
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("n_skipped", torch.zeros((), dtype=torch.long))
        if generator is not None:
            _draw_weights(self, generator)
        # Near-zero heads: the untrained policy proposes (almost) no change and expects nothing.
        with torch.no_grad():
            for head in (self.mean_head, self.value_head):
                head.weight.mul_(0.01)
                head.bias.zero_()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def distribution(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-squash mean and std (batch, action) and value (batch,) for a *normalised* state."""
        hidden = self.trunk(state)
        mean = MEAN_LIMIT * torch.tanh(self.mean_head(hidden) / MEAN_LIMIT)
        log_std = LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * self.std_logit.sigmoid()
        return mean, log_std.exp().expand_as(mean), self.value_head(hidden).squeeze(-1)

    @torch.no_grad()
    def act(
        self,
        state: Tensor,
        generator: Draws | None = None,
        *,
        deterministic: bool = False,
    ) -> PolicyStep:
        """Decide for `state` (batch, state). `deterministic` takes the mean, else `generator` is
        required.
        """
        if state.shape[-1] != self.state_width:
            raise ValueError(
                f"state is {state.shape[-1]} wide, this policy reads {self.state_width}"
            )
        if generator is None and not deterministic:
            raise ValueError("sampling needs a torch.Generator (or deterministic=True)")
        with torch.autocast(device_type=state.device.type, enabled=False):
            raw_state = state.detach().float()
            seen = self.norm(raw_state)
            mean, std, value = self.distribution(seen)
            raw_action = mean if deterministic else mean + std * draw_normal(mean, generator)
            return PolicyStep(
                raw_state=raw_state,
                state=seen,
                raw_action=raw_action,
                action=raw_action.tanh(),
                log_prob=gaussian_log_prob(raw_action, mean, std),
                value=value,
                mean=mean,
                std=std,
            )

    def update(self, step: PolicyStep, reward: Tensor, next_state: Tensor) -> dict[str, Tensor]:
        """Learn from what `step` earned: `reward` (batch,) unscaled, `next_state` (batch, state) as
        it came about.

        Returns 0-dim tensors, left on the device: policy_loss, value_loss, entropy, approx_kl,
        clip_fraction, explained_variance, grad_norm, curiosity (mean bonus), inverse_loss,
        forward_loss, return_mean, action_std, skipped (0 or 1). Losses are of the first pass, KL,
        clip fraction and norm of the last.
        Waits for the device once, to decide whether the batch is finite.
        """
        device_type = step.state.device.type
        with torch.enable_grad(), torch.autocast(device_type=device_type, enabled=False):
            reward = reward.detach().float()
            next_raw = next_state.detach().float()
            if reward.shape != step.value.shape:
                raise ValueError(
                    f"reward has shape {tuple(reward.shape)}, expected one per decision: "
                    f"{tuple(step.value.shape)}"
                )
            incoming = (step.raw_state, step.raw_action, step.log_prob, reward, next_raw)
            if not bool(torch.stack([torch.isfinite(t).all() for t in incoming]).all()):
                self.n_skipped += 1
                return self._skipped(reward.device)
            return self._learn(step, reward, next_raw)

    def _learn(self, step: PolicyStep, reward: Tensor, next_raw: Tensor) -> dict[str, Tensor]:
        next_seen = self.norm(next_raw)
        with torch.no_grad():
            _, surprise = self.curiosity(step.state, step.action, next_seen)
            bonus = self.curiosity_scale * surprise.clamp(max=self.curiosity_limit)
            returns = (REWARD_SCALE * reward).clamp(-REWARD_LIMIT, REWARD_LIMIT) + bonus
            advantage = leave_one_out_advantage(returns - step.value)

        health: dict[str, Tensor] = {}
        for epoch in range(self.n_epochs):
            mean, std, value = self.distribution(step.state)
            log_ratio = gaussian_log_prob(step.raw_action, mean, std) - step.log_prob
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1.0 - self.clip_ratio, 1.0 + self.clip_ratio)
            policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
            value_loss = functional.smooth_l1_loss(value, returns)
            entropy = (0.5 + 0.5 * math.log(2.0 * math.pi) + std.log()).sum(dim=-1).mean()
            inverse_error, forward_error = self.curiosity(step.state, step.action, next_seen)
            loss = (
                policy_loss
                + self.value_weight * value_loss
                - self.entropy_weight * entropy
                + self.prior_weight * mean.square().sum(dim=-1).mean()
                + inverse_error.mean()
                + forward_error.mean()
            )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(self.parameters(), self.max_grad_norm)
            self.optimizer.step()
            if epoch == 0:
                health = {
                    "policy_loss": policy_loss.detach(),
                    "value_loss": value_loss.detach(),
                    "entropy": entropy.detach(),
                    "inverse_loss": inverse_error.detach().mean(),
                    "forward_loss": forward_error.detach().mean(),
                    "explained_variance": explained_variance(step.value, returns),
                    "curiosity": bonus.mean(),
                    "return_mean": returns.mean(),
                    "action_std": std.detach().mean(),
                    "skipped": torch.zeros((), device=reward.device),
                }
        with torch.no_grad():
            # Schulman's low-variance estimate of KL(old || new).
            health["approx_kl"] = ((ratio - 1.0) - log_ratio).mean().detach()
            health["clip_fraction"] = ((ratio - 1.0).abs() > self.clip_ratio).float().mean()
            health["grad_norm"] = grad_norm.detach()
        self.optimizer.zero_grad(set_to_none=True)
        self.norm.absorb(step.raw_state)
        self.n_updates += 1
        return health

    def _skipped(self, device: torch.device) -> dict[str, Tensor]:
        health = {name: torch.zeros((), device=device) for name in HEALTH}
        health["skipped"] = torch.ones((), device=device)
        return health


HEALTH = (
    "policy_loss",
    "value_loss",
    "entropy",
    "inverse_loss",
    "forward_loss",
    "explained_variance",
    "curiosity",
    "return_mean",
    "action_std",
    "skipped",
    "approx_kl",
    "clip_fraction",
    "grad_norm",
)


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of `sample` (batch, action) under independent Gaussians, summed over the action:
    (batch,).
    """
    z = (sample - mean) / std
    return (-0.5 * z.square() - std.log() - 0.5 * math.log(2.0 * math.pi)).sum(dim=-1)


def leave_one_out_advantage(error: Tensor) -> Tensor:
    """error_i minus the mean of the others, (batch,); a batch of one keeps its error."""
    n = error.shape[0]
    if n < 2:
        return error
    return (error - error.mean()) * (n / (n - 1))


def explained_variance(value: Tensor, returns: Tensor) -> Tensor:
    """1 - var(returns - value) / var(returns), 0-dim; 0 where the returns do not vary."""
    spread = returns.var(unbiased=False)
    left = (returns - value).var(unbiased=False)
    share = 1.0 - left / spread.clamp(min=1e-8)
    return torch.where(spread > 1e-8, share, torch.zeros_like(share))


def _std_logit(std: float) -> float:
    share = (math.log(std) - LOG_STD_MIN) / (LOG_STD_MAX - LOG_STD_MIN)
    return math.log(share / (1.0 - share))


def _draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Uniform fan-in initialisation of all linear layers from one generator."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = 1.0 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
