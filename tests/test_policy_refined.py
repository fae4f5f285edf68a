"""Refinement of prompts: modes, bounds, gradients, rewards, and learning which change pays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hypotheses import N_PROPOSAL_FACTS
from loss_function import EFELoss, combined_loss
from policy_refined import N_STATS, RefinedPolicy
from proposal_policy import RELATION, Candidates, Choice

BATCH, TOKENS, WIDTH = 6, 5, 24


def policy(seed: int = 0, **options: Any) -> RefinedPolicy:
    return RefinedPolicy(WIDTH, generator=torch.Generator().manual_seed(seed), **options)


def prompt(seed: int = 0, n: int = BATCH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, TOKENS, WIDTH, generator=g)
    mask = torch.ones(n, TOKENS, dtype=torch.bool)
    mask[0, 3:] = False
    summary = torch.randn(n, WIDTH, generator=g)
    return tokens, mask, summary, torch.rand(n, N_STATS, generator=g)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grids(seed: int, rows: int = 4, cols: int = 5, n: int = BATCH) -> Tensor:
    out = torch.full((n, rows + 1, cols + 1), -1)
    g = torch.Generator().manual_seed(seed)
    out[:, :rows, :cols] = torch.randint(0, 10, (n, rows, cols), generator=g)
    return out


def test_off_returns_the_tokens_bit_for_bit() -> None:
    tokens, mask, summary, stats = prompt()
    model = policy()
    refined, info = model.refine(tokens, mask, summary, stats, generator(), "off")
    assert torch.equal(refined, tokens)
    assert info.change_frac == 0
    assert info.action.eq(0).all()
    before = copy.deepcopy(model.state_dict())
    assert model.update(info, torch.zeros(BATCH), model.state(summary, stats)) == {}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("mode", ["on", "random"])
def test_refinement_changes_real_tokens_within_its_bound(mode: str) -> None:
    tokens, mask, summary, stats = prompt()
    model = policy(max_change=0.3)
    refined, info = model.refine(tokens, mask, summary, stats, generator(), mode)
    change = (refined - tokens).norm(dim=-1) / tokens.norm(dim=-1)
    assert change[mask].min() > 0.005
    assert change[~mask].eq(0).all()
    torch.testing.assert_close(info.change_frac, change[mask].mean().detach())
    with torch.no_grad():
        model.basis.mul_(1e4)
    refined, _ = model.refine(tokens, mask, summary, stats, generator(), mode)
    assert ((refined - tokens).norm(dim=-1) / tokens.norm(dim=-1)).max() <= 0.3 + 1e-5


def test_change_follows_the_scale_of_the_prompt() -> None:
    tokens, mask, summary, stats = prompt()
    model = policy()
    small, _ = model.refine(tokens, mask, summary, stats, generator())
    large, _ = model.refine(100 * tokens, mask, summary, stats, generator())
    torch.testing.assert_close(large, 100 * small, rtol=1e-4, atol=1e-3)


def test_modes_and_generators() -> None:
    tokens, mask, summary, stats = prompt()
    model = policy()
    first, info = model.refine(tokens, mask, summary, stats, generator(1), "random")
    again, _ = model.refine(tokens, mask, summary, stats, generator(1), "random")
    other, _ = model.refine(tokens, mask, summary, stats, generator(2), "random")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert info.step is None
    mean, info = model.refine(tokens, mask, summary, stats, deterministic=True)
    assert info.step is not None
    assert torch.equal(info.step.raw_action, info.step.mean)
    assert (mean - tokens).abs().max() < 0.05  # the untrained mean is close to no change
    with pytest.raises(ValueError, match="unknown policy mode 'maybe'"):
        model.refine(tokens, mask, summary, stats, generator(), "maybe")
    with pytest.raises(ValueError, match="Generator"):
        model.refine(tokens, mask, summary, stats, None, "random")
    with pytest.raises(ValueError, match="stats are 3 wide"):
        model.refine(tokens, mask, summary, stats[:, :3], generator())


def test_main_loss_reaches_prompt_and_basis_but_not_the_policy() -> None:
    tokens, mask, summary, stats = prompt()
    tokens.requires_grad_()
    summary.requires_grad_()
    model = policy()
    refined, _ = model.refine(tokens, mask, summary, stats, generator())
    refined.square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[mask].abs().sum() > 0
    assert summary.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.main_parameters())
    assert all(p.grad is None for p in model.policy_parameters())


def test_parameter_groups_are_disjoint_and_complete() -> None:
    model = policy()
    main = {id(p) for p in model.main_parameters()}
    own = {id(p) for p in model.policy_parameters()}
    assert not main & own
    assert main | own == {id(p) for p in model.parameters()}
    steps = [
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (model.optimizer, model.proposals.optimizer)
    ]
    assert not steps[0] & steps[1]
    assert steps[0] | steps[1] == own


def test_dtype_is_kept_under_autocast() -> None:
    tokens, mask, summary, stats = prompt()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined, info = policy().refine(
            tokens.bfloat16(), mask, summary.bfloat16(), stats, generator()
        )
    assert refined.dtype == torch.bfloat16
    assert info.action.dtype == torch.float32


def test_no_double_backward_when_the_update_follows_the_main_step() -> None:
    tokens, mask, _, stats = prompt()
    tokens.requires_grad_()
    model = policy()
    optimizer = torch.optim.SGD(model.main_parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.policy_parameters()]
    for i in range(2):
        hidden = tokens * 1.5  # the upstream graph, freed by the main backward
        refined, info = model.refine(hidden, mask, hidden.mean(1), stats, generator(i))
        refined.square().mean().backward()
        optimizer.step()
        reward = -refined.square().mean(dim=(1, 2))  # still attached to the freed graph
        health = model.update(info, reward, model.state(refined.mean(1), stats))
        assert torch.isfinite(health["explained_variance"])
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.policy_parameters(), strict=True)
    )


def test_reward_signs_and_breakdown() -> None:
    target, inp = grids(0), grids(1, 3, 3)
    wrong = torch.where(target >= 0, (target + 1) % 10, target)
    half = target.clone()
    half[:, :2] = wrong[:, :2]
    model = policy()
    better, parts = model.compute_reward(wrong, half, target, inp)
    worse, _ = model.compute_reward(half, wrong, target, inp)
    equal, zeros = model.compute_reward(half, half, target, inp)
    assert better.shape == (BATCH,)
    assert better.gt(0).all()
    torch.testing.assert_close(worse, -better)
    assert equal.eq(0).all()
    assert set(parts) == {"d_acc", "d_size", "d_color", "d_rev"}
    assert all(v.eq(0).all() for v in zeros.values())


def test_reward_of_single_grids_as_in_the_users_example() -> None:
    target = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    before = torch.tensor([[1, 0, 3], [4, 5, 0], [7, 8, 9]])
    after = torch.tensor([[1, 2, 3], [4, 5, 0], [7, 8, 9]])
    reward, breakdown = policy().compute_reward(before, after, target, torch.zeros(2, 2))
    assert reward.dim() == 0
    assert breakdown["d_acc"].item() == pytest.approx(1 / 9)
    assert breakdown["d_color"].item() == pytest.approx(1 / 9)
    assert reward.item() == pytest.approx(1.5 / 9)


def test_size_part_is_live_with_predicted_sizes_and_after_resizing() -> None:
    target = grids(0)
    before, after = grids(2, 8, 5), grids(3, 4, 5)
    model = policy()
    reward, parts = model.compute_reward(before, after, target, grids(1))
    torch.testing.assert_close(parts["d_size"], torch.full((BATCH,), 0.25))
    assert reward.shape == (BATCH,)
    sizes = torch.tensor([[8, 5]] * BATCH), torch.tensor([[4, 5]] * BATCH)
    _, resized = model.compute_reward(
        target, target, target, grids(1), size_before=sizes[0], size_after=sizes[1]
    )
    torch.testing.assert_close(resized["d_size"], torch.full((BATCH,), 0.25))
    assert resized["d_acc"].eq(0).all()


def test_prediction_of_another_size_is_resized_to_nearest() -> None:
    target = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2]])
    small = torch.tensor([[1, 2]])
    wrong = torch.tensor([[3, 3]])
    _, parts = policy().compute_reward(wrong, small, target, target)
    assert parts["d_acc"].item() == 1.0


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (30, 30), (7, 13)])
def test_any_sizes_go_through(size: tuple[int, int]) -> None:
    model = policy()
    for other in [(1, 1), (30, 30), (2, 17)]:
        reward, _ = model.compute_reward(
            grids(0, *size), grids(1, *other), grids(2, *other), grids(3, *size)
        )
        assert torch.isfinite(reward).all()


def test_reversibility_uses_the_reconstructions() -> None:
    target, inp = grids(0), grids(1, 3, 3)
    broken = torch.where(inp >= 0, (inp + 1) % 10, inp)
    reward, parts = policy().compute_reward(
        target, target, target, inp, reconstruction_before=broken, reconstruction_after=inp
    )
    assert parts["d_rev"].eq(1).all()
    assert reward.eq(0.5).all()
    _, parts = policy().compute_reward(
        target,
        target,
        target,
        inp,
        reconstruction_before=inp,
        reconstruction_after=inp,
        copied_before=torch.full((BATCH,), 0.8),
        copied_after=torch.full((BATCH,), 0.2),
    )
    assert parts["d_rev"].tolist() == pytest.approx([0.3] * BATCH)


def soft_setting() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    target, inp = grids(0), grids(1, 3, 3)
    return {
        "logits_before": torch.randn(*target.shape, 10, generator=g).requires_grad_(),
        "logits_after": torch.randn(*target.shape, 10, generator=g).requires_grad_(),
        "target": target,
        "size_logits_before": torch.randn(BATCH, 2, 30, generator=g).requires_grad_(),
        "size_logits_after": torch.randn(BATCH, 2, 30, generator=g).requires_grad_(),
        "target_size": torch.tensor([[4, 5]] * BATCH),
        "backward_logits_before": torch.randn(*inp.shape, 10, generator=g).requires_grad_(),
        "backward_logits_after": torch.randn(*inp.shape, 10, generator=g).requires_grad_(),
        "inp": inp,
    }


def test_soft_reward_pulls_on_everything_after_and_nothing_before() -> None:
    values = soft_setting()
    reward, parts = policy().soft_reward(**values)
    assert reward.shape == (BATCH,)
    assert all(part.abs().sum() > 0 for part in parts.values())
    reward.mean().backward()
    for name, value in values.items():
        if "after" in name:
            assert value.grad is not None
            assert value.grad.abs().sum() > 0
        else:
            assert value.grad is None
    same = {**values, **{k: values[k.replace("before", "after")] for k in values if "before" in k}}
    assert policy().soft_reward(**same)[0].eq(0).all()


def test_turning_the_reward_off_changes_the_gradient_of_the_prompt() -> None:
    tokens, mask, summary, stats = prompt()
    tokens.requires_grad_()
    head = torch.randn(WIDTH, 10, generator=torch.Generator().manual_seed(0))
    model, target = policy(), torch.arange(BATCH)[:, None, None]
    refined, _ = model.refine(tokens, mask, summary, stats, generator())
    logits = (refined.mean(1) @ head)[None, :, None, None, :]
    efe = EFELoss()(logits=logits, target=target)["total"]
    reward, _ = model.soft_reward(None, logits[-1], target)
    parameters = [tokens, model.basis]
    on = torch.autograd.grad(combined_loss(efe, reward), parameters, retain_graph=True)
    off = torch.autograd.grad(combined_loss(efe, reward.detach()), parameters)
    for a, b in zip(on, off, strict=True):
        assert not torch.allclose(a, b)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bandit_policy_learns_the_change_of_the_prompt_that_pays(seed: int) -> None:
    model = policy(seed)
    g = generator(seed)
    wanted = torch.randn(WIDTH, generator=g)
    wanted /= wanted.norm()

    def earned(refined: Tensor, tokens: Tensor) -> Tensor:
        return ((refined - tokens).detach().mean(1) @ wanted) * 2.0

    def evaluate() -> tuple[Tensor, Tensor]:
        tokens, mask, summary, stats = prompt(99, 32)
        refined, info = model.refine(tokens, mask, summary, stats, deterministic=True)
        return earned(refined, tokens).mean(), info.action.mean(0)

    start, _ = evaluate()
    rewards = []
    for i in range(150):
        tokens, mask, summary, stats = prompt(1000 + i, 16)
        refined, info = model.refine(tokens, mask, summary, stats, g)
        reward = earned(refined, tokens)
        rewards.append(reward.mean())
        model.update(info, reward, model.state(summary, stats))
    end, action = evaluate()
    pays = (model.basis @ wanted).detach()
    assert functional.cosine_similarity(action, pays, dim=0) > 0.6
    assert end > start + 0.1
    assert torch.stack(rewards[-20:]).mean() > torch.stack(rewards[:20]).mean() + 0.1


def test_round_trip_is_exact() -> None:
    tokens, mask, summary, stats = prompt()
    model, other = policy(0), policy(5)
    refined, info = model.refine(tokens, mask, summary, stats, generator())
    model.update(info, refined.mean(dim=(1, 2)).detach(), model.state(summary, stats))
    other.load_state_dict(model.state_dict())
    a, _ = model.refine(tokens, mask, summary, stats, generator(3))
    b, _ = other.refine(tokens, mask, summary, stats, generator(3))
    assert torch.equal(a, b)


# ---------------------------------------------------------------- what candidates would earn


def offered(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Own answers 4 x 5, proposals (BATCH, 3, 5, 6) uint8, their sizes; query 0 has two."""
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([[[4, 5], [2, 3], [4, 5]]] * BATCH)
    size[0, 2] = 0
    proposed = torch.full((BATCH, 3, 5, 6), 255, dtype=torch.uint8)
    for q in range(BATCH):
        for a, (rows, cols) in enumerate(size[q].tolist()):
            cells = torch.randint(0, 10, (rows, cols), generator=g)
            proposed[q, a, :rows, :cols] = cells.to(torch.uint8)
    return grids(7), proposed, size


def test_a_candidate_earns_what_answering_with_it_would() -> None:
    """Breaks: rewards of candidates 0, of another candidate, or against another own answer; sizes
    of candidates taken after the resize."""
    model = policy()
    own, proposed, size = offered()
    target = torch.where(proposed[:, 0] < 10, proposed[:, 0].long(), -1)
    target_size, own_size = size[:, 0], torch.tensor([[4, 5]] * BATCH)
    inp = grids(9)
    rewards, exact = model.proposal_rewards(
        own, proposed, size, target, inp, own_size=own_size, target_size=target_size
    )
    assert rewards.shape == exact.shape == (BATCH, 4)
    assert (rewards[:, 0] == 0).all()
    for q in range(BATCH):
        for a, (rows, cols) in enumerate(size[q].tolist()):
            if not rows:
                assert rewards[q, a + 1] == 0
                assert not exact[q, a + 1]
                continue
            answer = proposed[q, a, :rows, :cols].long()
            wanted = target[q, :4, :5]
            one, parts = model.compute_reward(own[q, :4, :5], answer, wanted, inp[q, :4, :5])
            assert float(parts["d_rev"]) == 0
            assert float(rewards[q, a + 1]) == pytest.approx(float(one), abs=1e-6)
            same = answer.shape == wanted.shape and torch.equal(answer, wanted)
            assert bool(exact[q, a + 1]) == same
    assert (rewards[:, 1] > 0.3).all()  # the right one
    assert exact[:, 1].all()
    assert (rewards[:, 2] != 0).all()


def test_a_right_own_answer_is_exact_and_every_other_candidate_loses() -> None:
    """Breaks: exactness of the own answer never said, or without its size."""
    model = policy()
    own, proposed, size = offered(3)
    sizes = torch.tensor([[4, 5]] * BATCH)
    given = {"own_size": sizes, "target_size": sizes}
    rewards, exact = model.proposal_rewards(own, proposed, size, own, grids(9), **given)
    assert exact[:, 0].all()
    assert not exact[:, 1:].any()
    assert (rewards[1:, 1:] < 0).all()
    large = own.repeat_interleave(2, 1).repeat_interleave(2, 2)  # the same picture, too large
    given = {"own_size": 2 * sizes, "target_size": sizes}
    _, exact = model.proposal_rewards(large, proposed, size, own, grids(9), **given)
    assert not exact[:, 0].any()


def test_the_choice_learns_through_the_policy_with_its_own_optimizer() -> None:
    """Breaks: learn_choice that does nothing, or moves the other policy."""
    model = policy()
    facts = torch.zeros(BATCH, 1, N_PROPOSAL_FACTS)
    facts[..., 0] = 1.0
    width = model.proposals.context.in_features
    mask = torch.ones(BATCH, 2, dtype=torch.bool)
    relation = torch.zeros(BATCH, 2, len(RELATION))
    asked = Candidates(facts, relation, torch.zeros(BATCH, width), mask)
    choice = Choice(asked, torch.tensor([[0, 1, 1, 0]] * BATCH), torch.zeros(BATCH, 2))
    names = [name for name, _ in model.named_parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    figures = model.learn_choice(choice, torch.tensor([[0.0, 1.0]] * BATCH), mask)
    moved = {
        name
        for name, old, new in zip(names, before, model.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert moved
    assert all(name.startswith("proposals.") for name in moved)
    assert set(figures) == {
        "proposal_loss", "proposal_sure_loss", "proposal_entropy", "group_zero_frac",
        "proposal_best_frac",
    }  # fmt: skip
