"""Reward scores against loops, their signs, and that the soft ones carry gradient."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional

from reward_shaping import (
    REWARD_WEIGHTS,
    accuracy,
    beyond_copying,
    colour_agreement,
    hard_scores,
    reversibility,
    shaped_reward,
    size_score,
    soft_accuracy,
    soft_colour_agreement,
    soft_reversibility,
    soft_scores,
    soft_size_score,
)


def grids(seed: int, size: tuple[int, int] = (4, 5), n: int = 3) -> torch.Tensor:
    out = torch.full((n, 6, 6), -1)
    values = torch.randint(0, 4, (n, *size), generator=torch.Generator().manual_seed(seed))
    out[:, : size[0], : size[1]] = values
    return out


def certain(grid: torch.Tensor) -> torch.Tensor:
    """Logits that give each cell's colour (0 outside) with probability 1."""
    return 200.0 * functional.one_hot(grid.clamp(min=0), 10).float()


def test_weights_are_the_users() -> None:
    assert dict(REWARD_WEIGHTS) == {"d_acc": 1.0, "d_size": 0.5, "d_color": 0.5, "d_rev": 0.5}


def test_colour_agreement_matches_counting() -> None:
    a, b = grids(0, (4, 5)), grids(1, (3, 6))
    got = colour_agreement(a, b)
    for i in range(3):
        counts = [Counter(g[i][g[i] >= 0].tolist()) for g in (a, b)]
        wanted = sum(
            min(counts[0][c] / counts[0].total(), counts[1][c] / counts[1].total())
            for c in range(10)
        )
        assert got[i].item() == pytest.approx(wanted, rel=1e-5)
    shuffled = a.flip(1)  # same colours elsewhere
    torch.testing.assert_close(colour_agreement(shuffled, a), torch.ones(3))
    assert colour_agreement(torch.full_like(a, -1), a).eq(0).all()


def test_size_score() -> None:
    got = size_score(
        torch.tensor([[3, 4], [6, 4], [0, 0], [30, 1]]), torch.tensor([[3, 4]] * 3 + [[1, 30]])
    )
    wanted = [1.0, 0.75, 0.0, 1 / 30]
    assert got.tolist() == pytest.approx(wanted)


def test_accuracy_and_reversibility_are_shares_of_cells() -> None:
    target = grids(2)
    prediction = target.clone()
    prediction[0, 0, 0] = 9
    assert accuracy(prediction, target).tolist() == pytest.approx([19 / 20, 1.0, 1.0])
    assert reversibility(prediction, target).tolist() == pytest.approx([19 / 20, 1.0, 1.0])


def test_soft_scores_of_certain_predictions_are_the_hard_ones() -> None:
    target, prediction, inp, back = grids(3), grids(4), grids(5, (2, 2)), grids(6, (2, 2))
    size, target_size = torch.tensor([[4, 5], [2, 9], [30, 1]]), torch.tensor([[4, 5]] * 3)
    hard = hard_scores(
        prediction, target, size=size, target_size=target_size, reconstruction=back, inp=inp
    )
    soft = soft_scores(
        certain(prediction),
        target,
        size_logits=200.0 * functional.one_hot(size - 1, 30).float(),
        target_size=target_size,
        backward_logits=certain(back),
        inp=inp,
    )
    for name in REWARD_WEIGHTS:
        torch.testing.assert_close(soft[name], hard[name])
        assert hard[name].min() >= 0
        assert hard[name].max() <= 1


def test_soft_size_score_is_an_expectation() -> None:
    logits = torch.randn(2, 2, 30, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[3, 7], [30, 1]])
    got = soft_size_score(logits, target)
    for i in range(2):
        wanted = 0.0
        for axis in range(2):
            p = logits[i, axis].softmax(0)
            t = int(target[i, axis])
            for side in range(1, 31):
                wanted += 0.5 * float(p[side - 1]) * (1 - abs(side - t) / max(side, t))
        assert got[i].item() == pytest.approx(wanted, rel=1e-5)


def test_sign_better_worse_equal() -> None:
    target = grids(7)
    wrong = (target + 1).where(target >= 0, target)  # every cell wrong
    half = target.clone()
    half[:, :2] = wrong[:, :2]
    size = torch.tensor([[4, 5]] * 3)

    def score(prediction: torch.Tensor) -> dict[str, torch.Tensor]:
        return hard_scores(prediction, target, size=size, target_size=size)

    better, parts = shaped_reward(score(wrong), score(half))
    worse, _ = shaped_reward(score(half), score(wrong))
    equal, zeros = shaped_reward(score(half), score(half))
    assert better.gt(0).all()
    torch.testing.assert_close(worse, -better)
    assert equal.eq(0).all()
    assert all(v.eq(0).all() for v in zeros.values())
    torch.testing.assert_close(parts["d_acc"], torch.full((3,), 0.5))
    total = sum(REWARD_WEIGHTS[name] * value for name, value in parts.items())
    torch.testing.assert_close(better, total)


@pytest.mark.parametrize("name", ["d_size", "d_color", "d_rev"])
def test_each_extra_score_earns_by_itself(name: str) -> None:
    base = {key: torch.full((2,), 0.5) for key in REWARD_WEIGHTS}
    reward, parts = shaped_reward(base, {**base, name: torch.full((2,), 0.75)})
    assert reward.tolist() == [0.125, 0.125]
    assert [key for key, value in parts.items() if value.any()] == [name]


def test_soft_scores_carry_gradient_that_improves_them() -> None:
    target, inp = grids(8), grids(9)
    size = torch.tensor([[4, 5]] * 3)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 6, 10, generator=generator, requires_grad=True)
    size_logits = torch.randn(3, 2, 30, generator=generator, requires_grad=True)
    backward = torch.randn(3, 6, 6, 10, generator=generator, requires_grad=True)
    for function, leaf, truth in (
        (soft_accuracy, logits, target),
        (soft_colour_agreement, logits, target),
        (soft_size_score, size_logits, size),
        (soft_reversibility, backward, inp),
    ):
        score = function(leaf, truth).sum()
        (gradient,) = torch.autograd.grad(score, leaf)
        assert gradient.abs().sum() > 0
        assert torch.isfinite(gradient).all()
        assert function((leaf + gradient).detach(), truth).sum() > score
        if leaf.dim() == 4:
            assert gradient[truth < 0].eq(0).all()


def test_without_size_or_backward_model_these_parts_are_zero() -> None:
    target = grids(8)
    scores = soft_scores(torch.zeros(3, 6, 6, 10), target)
    assert scores["d_size"].eq(0).all()
    assert scores["d_rev"].eq(0).all()
    torch.testing.assert_close(scores["d_acc"], torch.full((3,), 0.1))


def test_reversibility_counts_what_is_told_beyond_a_copy() -> None:
    """A copy that gives the input back earns nothing; a changed answer that does so earns."""
    inp = grids(2)
    copied = torch.tensor([1.0, 0.4, 0.0])
    assert reversibility(inp, inp, copied).tolist() == pytest.approx([0.5, 0.8, 1.0])
    soft = soft_reversibility(certain(inp), inp, copied)
    torch.testing.assert_close(soft, beyond_copying(torch.ones(3), copied))
    nothing = torch.where(inp >= 0, (inp + 1) % 10, inp)
    assert reversibility(nothing, inp, torch.ones(3)).eq(0).all()
