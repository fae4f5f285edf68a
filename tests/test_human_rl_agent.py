"""The policy: log-probabilities, baseline, curiosity, skipping, bandits, exact state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributions import Normal

from human_rl_agent import (
    HEALTH,
    HumanRLAgent,
    RunningNorm,
    explained_variance,
    gaussian_log_prob,
    leave_one_out_advantage,
)

STATE, ACTION = 5, 3


def agent(seed: int = 0, **options: Any) -> HumanRLAgent:
    return HumanRLAgent(STATE, ACTION, generator=torch.Generator().manual_seed(seed), **options)


def states(seed: int, n: int = 8) -> torch.Tensor:
    return torch.randn(n, STATE, generator=torch.Generator().manual_seed(seed))


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_log_prob_is_the_normals_of_the_pre_squash_sample() -> None:
    policy = agent()
    step = policy.act(states(0), torch.Generator().manual_seed(1))
    wanted = Normal(step.mean, step.std).log_prob(step.raw_action).sum(-1)
    torch.testing.assert_close(step.log_prob, wanted)
    assert torch.equal(step.action, step.raw_action.tanh())
    at_action = Normal(step.mean, step.std).log_prob(step.action).sum(-1)
    assert not torch.allclose(step.log_prob, at_action)


def test_score_matches_automatic_differentiation_of_torch_distributions() -> None:
    mean = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    std = torch.full((4, 3), 0.4, requires_grad=True)
    sample = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(gaussian_log_prob(sample, mean, std).sum(), [mean, std])
    theirs = torch.autograd.grad(Normal(mean, std).log_prob(sample).sum(), [mean, std])
    torch.testing.assert_close(ours, theirs)


def test_sampling_uses_only_its_generator() -> None:
    policy = agent()
    before = torch.random.get_rng_state()
    first = policy.act(states(0), torch.Generator().manual_seed(1))
    again = policy.act(states(0), torch.Generator().manual_seed(1))
    other = policy.act(states(0), torch.Generator().manual_seed(2))
    assert torch.equal(first.action, again.action)
    assert not torch.equal(first.action, other.action)
    with pytest.raises(ValueError, match="Generator"):
        policy.act(states(0))
    mean = policy.act(states(0), deterministic=True)
    assert torch.equal(mean.raw_action, mean.mean)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_come_from_the_generator() -> None:
    a, b, c = agent(0), agent(0), agent(1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.mean_head.weight, c.mean_head.weight)


def test_untrained_policy_proposes_almost_nothing_and_bounds_hold() -> None:
    policy = agent()
    step = policy.act(states(0), deterministic=True)
    assert step.action.abs().max() < 0.05
    torch.testing.assert_close(step.std, torch.full_like(step.std, 0.5))
    with torch.no_grad():
        policy.std_logit.fill_(100.0)
        policy.mean_head.bias.fill_(1e6)
    step = policy.act(states(0), deterministic=True)
    assert step.std.max() <= 1.0
    assert step.mean.max() <= 2.0


def test_wrong_shapes_are_told() -> None:
    policy = agent()
    with pytest.raises(ValueError, match="7 wide, this policy reads 5"):
        policy.act(torch.zeros(2, 7), deterministic=True)
    step = policy.act(states(0), deterministic=True)
    with pytest.raises(ValueError, match="one per decision"):
        policy.update(step, torch.zeros(8, 1), states(1))


def test_leave_one_out_advantage_matches_a_loop() -> None:
    error = torch.tensor([1.0, -2.0, 0.5, 4.0])
    got = leave_one_out_advantage(error)
    for i in range(4):
        others = [error[j].item() for j in range(4) if j != i]
        assert got[i].item() == pytest.approx(error[i].item() - sum(others) / 3)
    assert leave_one_out_advantage(torch.tensor([3.0])).tolist() == [3.0]


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns).item() == pytest.approx(1.0)
    assert explained_variance(torch.full((3,), 9.0), returns).item() == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones(3)).item() == 0.0
    assert explained_variance(torch.ones(1), torch.ones(1)).item() == 0.0


def test_running_norm_matches_all_states_at_once() -> None:
    norm = RunningNorm(STATE)
    assert torch.equal(norm(torch.zeros(1, STATE)), torch.zeros(1, STATE))
    chunks = [3.0 + 2.0 * states(i, n) for i, n in enumerate((1, 7, 64, 200))]
    for chunk in chunks:
        norm.absorb(chunk)
    everything = torch.cat(chunks)
    torch.testing.assert_close(norm.mean, everything.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.var, everything.var(0, unbiased=False), atol=0.02, rtol=0.01)
    assert norm(everything).mean().abs() < 1e-2


def test_update_changes_the_policy_and_reports_finite_health() -> None:
    policy = agent()
    before = snapshot(policy)
    step = policy.act(states(0), torch.Generator().manual_seed(1))
    reward = torch.linspace(-0.2, 0.2, 8)
    health = policy.update(step, reward, states(1))
    assert set(health) == set(HEALTH)
    assert all(v.dim() == 0 and torch.isfinite(v) and not v.requires_grad for v in health.values())
    assert health["curiosity"] > 0
    assert health["skipped"] == 0
    assert health["return_mean"].item() == pytest.approx(health["curiosity"].item(), abs=1e-6)
    after = policy.state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == ["n_skipped"]
    assert all(p.grad is None for p in policy.parameters())


def test_first_pass_is_reinforce_with_ratio_one() -> None:
    policy = agent(n_epochs=1)
    step = policy.act(states(0), torch.Generator().manual_seed(1))
    mean, std, _ = policy.distribution(step.state)
    assert torch.equal(gaussian_log_prob(step.raw_action, mean, std), step.log_prob)
    health = policy.update(step, torch.linspace(0, 1, 8), states(1))
    assert health["approx_kl"].item() == pytest.approx(0.0, abs=1e-6)
    assert health["clip_fraction"] == 0


def test_reward_is_scaled_by_five() -> None:
    policy = agent(curiosity_scale=0.0)
    step = policy.act(states(0), torch.Generator().manual_seed(1))
    health = policy.update(step, torch.full((8,), 0.1), states(1))
    assert health["return_mean"].item() == pytest.approx(0.5)


def test_batch_of_one_and_equal_rewards_are_fine() -> None:
    policy = agent()
    step = policy.act(states(0, 1), torch.Generator().manual_seed(1))
    health = policy.update(step, torch.zeros(1), states(1, 1))
    assert all(torch.isfinite(v) for v in health.values())
    assert all(torch.isfinite(v).all() for v in policy.state_dict().values())


@pytest.mark.parametrize("where", ["reward", "state", "next_state"])
def test_non_finite_batch_changes_nothing_and_is_counted(where: str) -> None:
    policy = agent()
    state, reward, next_state = states(0), torch.zeros(8), states(1)
    {"reward": reward, "state": state, "next_state": next_state}[where].view(-1)[0] = float("nan")
    step = policy.act(state, torch.Generator().manual_seed(1))
    before = snapshot(policy)
    health = policy.update(step, reward, next_state)
    assert health["skipped"] == 1
    assert set(health) == set(HEALTH)
    assert int(policy.n_skipped) == 1
    after = policy.state_dict()
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["n_skipped"]
    assert policy.optimizer.state_dict()["state"] == {}


def test_huge_finite_numbers_do_not_break_it() -> None:
    policy = agent()
    for i in range(3):
        step = policy.act(states(i) * 1e6, torch.Generator().manual_seed(i))
        policy.update(step, torch.full((8,), 1e20), states(i + 1) * 1e6)
    assert all(torch.isfinite(v).all() for v in policy.state_dict().values())


def test_curiosity_reads_the_true_next_state_and_fades_where_it_can_predict() -> None:
    policy = agent(entropy_weight=0.0)
    step = policy.act(states(0), torch.Generator().manual_seed(1))
    a = copy.deepcopy(policy).update(step, torch.zeros(8), states(1))
    b = copy.deepcopy(policy).update(step, torch.zeros(8), states(2))
    assert a["curiosity"] != b["curiosity"]
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(ACTION, STATE, generator=generator)
    errors = []
    for i in range(150):
        state = states(100 + i)
        step = policy.act(state, generator)
        errors.append(policy.update(step, torch.zeros(8), state + step.action @ mix))
    first = torch.stack([h["forward_loss"] for h in errors[:20]]).mean()
    last = torch.stack([h["forward_loss"] for h in errors[-20:]]).mean()
    assert last < 0.6 * first
    inverse = [
        torch.stack([h["inverse_loss"] for h in part]).mean()
        for part in (errors[:20], errors[-20:])
    ]
    assert inverse[1] < inverse[0]


def test_curiosity_features_learn_from_the_inverse_model_only() -> None:
    policy = agent()
    inverse, forward = policy.curiosity(states(0), torch.zeros(8, ACTION), states(1))
    weight = next(policy.curiosity.features.parameters())
    assert torch.autograd.grad(inverse.sum(), weight)[0].abs().sum() > 0
    assert torch.autograd.grad(forward.sum(), weight, allow_unused=True)[0] is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bandit_mean_moves_where_the_reward_is(seed: int) -> None:
    policy = agent(seed)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.tensor([1.0, -1.0, 0.0]) / 2**0.5
    rewards = []
    for _ in range(150):
        state = torch.randn(16, STATE, generator=generator)
        step = policy.act(state, generator)
        reward = 0.2 * step.action @ direction + 0.02 * torch.randn(16, generator=generator)
        policy.update(step, reward, state)
        rewards.append(reward.mean())
    mean = policy.act(states(9, 64), deterministic=True).action.mean(0)
    assert torch.nn.functional.cosine_similarity(mean, direction, dim=0) > 0.85
    assert mean[2].abs() < 0.75  # what pays nothing stays near no change
    assert torch.stack(rewards[-20:]).mean() > torch.stack(rewards[:20]).mean() + 0.1


def test_state_dependent_bandit_and_value() -> None:
    policy = agent(3)
    generator = torch.Generator().manual_seed(3)
    health = []
    for _ in range(250):
        state = torch.randn(16, STATE, generator=generator)
        step = policy.act(state, generator)
        sign = state[:, 0].sign()
        reward = 0.2 * step.action[:, 0] * sign + 0.1 * state[:, 1]
        health.append(policy.update(step, reward, state))
    state = states(11, 256)
    action = policy.act(state, deterministic=True).action[:, 0]
    assert (action.sign() == state[:, 0].sign()).float().mean() > 0.8
    late = torch.stack([h["explained_variance"] for h in health[-20:]]).mean()
    assert late > 0.3


def test_update_needs_no_graph_of_the_caller_and_works_without_gradient_mode() -> None:
    policy = agent()
    leaf = states(0).requires_grad_()
    state = leaf * 2
    step = policy.act(state, torch.Generator().manual_seed(1))
    loss = (state.sum(-1) * step.action.sum(-1)).sum()
    loss.backward()
    reward = (state.sum(-1) * 0.01).tanh()
    with torch.no_grad():
        policy.update(step, reward, state)
    policy.update(step, reward, state)
    assert leaf.grad is not None


def test_round_trip_is_exact_and_training_continues_bit_for_bit() -> None:
    def train(policy: HumanRLAgent, first: int, last: int) -> None:
        for i in range(first, last):
            step = policy.act(states(i), torch.Generator().manual_seed(i))
            policy.update(step, step.action.sum(-1) * 0.1, states(i + 1))

    straight, stopped, resumed = agent(0), agent(0), agent(7)
    train(straight, 0, 6)
    train(stopped, 0, 3)
    resumed.load_state_dict(stopped.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(stopped.optimizer.state_dict()))
    train(resumed, 3, 6)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert int(resumed.n_updates) == 6
    assert float(resumed.norm.count) == 48
