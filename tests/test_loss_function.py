"""The EFE loss: every part against a slow reference, its gradient, and the switches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from grid_accuracy_loss import grid_sizes
from loss_function import (
    PARTS,
    EFELoss,
    backward_divergence,
    combined_loss,
    confidence_divergence,
    expected_steps,
    observed_share,
    prompt_inconsistency,
    size_cross_entropy,
)

STEPS, BATCH, ROWS, COLS = 3, 4, 4, 5


def example(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 10, (BATCH, ROWS, COLS), generator=g)
    target[1, 2:] = -1
    target[2, :, 1:] = -1
    inp = torch.randint(0, 10, (BATCH, 3, 3), generator=g)
    inp[0, 2:] = -1
    logits = torch.randn(STEPS, BATCH, ROWS, COLS, 10, generator=g)
    # some cells right, so that weights and confidence targets are not all alike
    logits = logits + 2.0 * functional.one_hot(target.clamp(min=0), 10)
    return {
        "logits": logits.requires_grad_(),
        "target": target,
        "confidence": torch.randn(STEPS, BATCH, generator=g).requires_grad_(),
        "size_logits": torch.randn(BATCH, 2, 30, generator=g).requires_grad_(),
        "target_size": grid_sizes(target),
        "backward_logits": torch.randn(BATCH, 3, 3, 10, generator=g).requires_grad_(),
        "inp": inp,
        "pair_summary": torch.randn(7, 6, generator=g).requires_grad_(),
        "task_ids": torch.tensor([0, 0, 0, 1, 1, 2, 0]),
    }


LEAVES = {
    "risk": "logits",
    "amb": "logits",
    "cons": "logits",
    "step": "confidence",
    "z": "confidence",
    "bi": "backward_logits",
    "prompt": "pair_summary",
    "size": "size_logits",
}


def cells(target: Tensor, b: int) -> list[tuple[int, int]]:
    return [
        (r, c)
        for r in range(target.shape[1])
        for c in range(target.shape[2])
        if target[b, r, c] >= 0
    ]


def test_parts_are_finite_scalars_and_add_up() -> None:
    loss = EFELoss()
    out = loss(**example(), size_weight=0.5)
    out = {name: value.detach() for name, value in out.items()}
    assert set(out) == {*PARTS, "total", "mask_ratio"}
    assert all(value.dim() == 0 and torch.isfinite(value) for value in out.values())
    assert all(out[name] > 0 for name in PARTS)
    state = {name: float(getattr(loss, f"lambda_{name}")) for name in PARTS}
    state["size"] *= 0.5
    assert out["total"].item() == pytest.approx(sum(state[n] * float(out[n]) for n in PARTS))


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_gradient_where_it_should_and_a_step_along_it_helps(part: str) -> None:
    values = example()
    out = EFELoss()(**values)
    leaf = values[LEAVES[part]]
    gradients = torch.autograd.grad(
        out[part], [values[n] for n in set(LEAVES.values())], allow_unused=True
    )
    by_leaf = dict(zip(set(LEAVES.values()), gradients, strict=True))
    gradient = by_leaf.pop(LEAVES[part])
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    assert all(g is None for g in by_leaf.values())
    moved = {**values, LEAVES[part]: (leaf - 1e-2 * gradient / gradient.norm()).detach()}
    assert EFELoss()(**moved)[part] < out[part]


def test_cons_is_scaled_hard_weighted_cross_entropy_of_the_last_step() -> None:
    values = example()
    out = EFELoss()(**values)
    logits, target = values["logits"].detach()[-1], values["target"]
    total, ratios = 0.0, []
    for b in range(BATCH):
        inside = cells(target, b)
        wrong = [rc for rc in inside if logits[b][rc].argmax() != target[b][rc]]
        value = 0.0
        for rc in inside:
            weight = len(inside) / len(wrong) if rc in wrong else 1.0
            value -= weight * float(logits[b][rc].log_softmax(0)[target[b][rc]])
        ratios.append(len(wrong) / len(inside))
        total += value / len(inside) * (0.5 + 0.5 * ratios[-1])
    assert out["cons"].item() == pytest.approx(total / BATCH, rel=1e-5)
    assert out["mask_ratio"].item() == pytest.approx(sum(ratios) / BATCH)


@pytest.mark.parametrize("hard", [True, False])
def test_risk_is_the_step_weighted_divergence_to_the_smoothed_target(hard: bool) -> None:
    values = example()
    out = EFELoss(smoothing=0.1, easy_weight=0.5, hard_cells=hard)(**values)
    logits, target = values["logits"].detach(), values["target"]
    total = 0.0
    for b in range(BATCH):
        inside = cells(target, b)
        wrong = [rc for rc in inside if logits[-1, b][rc].argmax() != target[b][rc]]
        assert 0 < len(wrong) < len(inside)
        for t in range(STEPS):
            for r, c in inside:
                q = logits[t, b, r, c].softmax(0)
                preference = torch.full((10,), 0.01)
                preference[target[b, r, c]] += 0.9
                divergence = float((q * (q / preference).log()).sum())
                weight = len(inside) / len(wrong) if (r, c) in wrong else 0.5
                total += (t + 1) / 6 * (weight if hard else 1.0) * divergence / len(inside)
    assert out["risk"].item() == pytest.approx(total / BATCH, rel=1e-4)


def test_risk_is_zero_at_the_preference_and_trains_every_step() -> None:
    target = torch.tensor([[[3]]])
    preference = torch.full((2, 1, 1, 1, 10), 0.005)
    preference[..., 3] += 0.95
    out = EFELoss()(logits=preference.log(), target=target)
    assert out["risk"].item() == pytest.approx(0.0, abs=1e-5)
    values = example()
    (gradient,) = torch.autograd.grad(EFELoss()(**values)["risk"], values["logits"])
    size = gradient.abs().sum(dim=(1, 2, 3, 4))
    assert size.gt(0).all()
    same = values["logits"].detach()[-1:].repeat(STEPS, 1, 1, 1, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(EFELoss()(**{**values, "logits": same})["risk"], same)
    assert gradient[2].norm() > gradient[1].norm() > gradient[0].norm() > 0


def test_amb_is_mean_entropy() -> None:
    values = example()
    logits, target = values["logits"].detach(), values["target"]
    total = 0.0
    for b in range(BATCH):
        inside = cells(target, b)
        for t in range(STEPS):
            entropies = [
                torch.distributions.Categorical(logits=logits[t, b, r, c]).entropy().item()
                for r, c in inside
            ]
            total += sum(entropies) / len(entropies)
    assert EFELoss()(**values)["amb"].item() == pytest.approx(total / BATCH / STEPS, rel=1e-5)


def test_expected_steps() -> None:
    confidence = torch.tensor([[0.3, -1.0], [0.7, 2.0], [5.0, -5.0]])
    for b in range(2):
        p = confidence[:, b].sigmoid()
        wanted = (1 + (1 - p[0]) + (1 - p[0]) * (1 - p[1])) / 3
        assert expected_steps(confidence)[b].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert expected_steps(torch.full((5, 1), -50.0)).item() == pytest.approx(1.0)
    assert expected_steps(torch.full((5, 1), 50.0)).item() == pytest.approx(0.2)


def test_z_calibrates_confidence() -> None:
    confidence = torch.tensor([[0.4, -2.0]], requires_grad=True)
    share = torch.tensor([[0.7, 0.3]])
    p = torch.distributions.Bernoulli(logits=confidence)
    wanted = torch.distributions.kl_divergence(p, torch.distributions.Bernoulli(share)).mean(0)
    torch.testing.assert_close(confidence_divergence(confidence, share), wanted)
    for _ in range(400):
        (gradient,) = torch.autograd.grad(
            confidence_divergence(confidence, share).sum(), confidence
        )
        confidence = (confidence - gradient).detach().requires_grad_()
    torch.testing.assert_close(confidence.sigmoid(), share, atol=1e-2, rtol=0)
    extreme = confidence_divergence(torch.tensor([[80.0, -80.0]]), torch.tensor([[0.0, 1.0]]))
    assert torch.isfinite(extreme).all()


def test_observed_share_counts_right_cells_and_wrong_sizes() -> None:
    values = example()
    got = observed_share(values["logits"], values["target"])
    assert not got.requires_grad
    for t in range(STEPS):
        for b in range(BATCH):
            inside = cells(values["target"], b)
            right = [
                int(values["logits"][t, b][rc].argmax() == values["target"][b][rc]) for rc in inside
            ]
            assert got[t, b].item() == pytest.approx(sum(right) / len(right))
    size_right = torch.tensor([True, False, True, True])
    masked = observed_share(values["logits"], values["target"], size_right)
    assert masked[:, 1].eq(0).all()
    assert torch.equal(masked[:, 0], got[:, 0])


def test_bi_is_a_bounded_symmetric_divergence() -> None:
    values = example()
    got = backward_divergence(values["backward_logits"].detach(), values["inp"], 0.05)
    for b in range(BATCH):
        inside = cells(values["inp"], b)
        total = 0.0
        for rc in inside:
            q = values["backward_logits"].detach()[b][rc].softmax(0)
            p = torch.full((10,), 0.005)
            p[values["inp"][b][rc]] += 0.95
            m = (p + q) / 2
            total += 0.5 * float((p * (p / m).log()).sum() + (q * (q / m).log()).sum())
        assert got[b].item() == pytest.approx(total / len(inside), rel=1e-4)
    far = backward_divergence(
        torch.full((1, 1, 1, 10), 0.0).index_fill(3, torch.tensor([1]), 90.0),
        torch.tensor([[[2]]]),
        0.05,
    )
    assert 0.5 < far.item() <= math.log(2)


def test_bi_reaches_the_agent_through_a_live_backward_model() -> None:
    values = example()
    torch.manual_seed(0)
    backward_model = nn.Linear(10, 10)
    answer = values["logits"][-1].softmax(-1)[:, :3, :3]
    values["backward_logits"] = backward_model(answer)
    out = EFELoss()(**values)
    gradients = torch.autograd.grad(out["bi"], [backward_model.weight, values["logits"]])
    assert all(g.abs().sum() > 0 for g in gradients)


def test_bi_is_of_the_predicted_and_of_the_true_output() -> None:
    """The agent's part and the backward model's, each with its own gradient."""
    values = example()
    both = {**values, "backward_logits_true": torch.randn(BATCH, 3, 3, 10).requires_grad_()}
    one = EFELoss()(**values)["bi"]
    out = EFELoss()(**both)["bi"]
    more = backward_divergence(both["backward_logits_true"], values["inp"], 0.05).mean()
    torch.testing.assert_close(out, one + more)
    leaves = [both["backward_logits"], both["backward_logits_true"]]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out, leaves))


def test_prompt_part_falls_with_consistency() -> None:
    summary = example()["pair_summary"].detach()
    task_ids = example()["task_ids"]
    total, n = 0.0, 0
    for i in range(7):
        others = [j for j in range(7) if j != i and task_ids[j] == task_ids[i]]
        if others:
            cosines = [
                functional.cosine_similarity(summary[i], summary[j], 0).item() for j in others
            ]
            total += 1 - sum(cosines) / len(cosines)
            n += 1
    assert prompt_inconsistency(summary, task_ids).item() == pytest.approx(total / n, rel=1e-5)
    two = torch.tensor([0, 0])
    same = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    opposite = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert prompt_inconsistency(same, two).item() == pytest.approx(0.0, abs=1e-6)
    assert prompt_inconsistency(opposite, two).item() == pytest.approx(2.0)
    assert prompt_inconsistency(same, torch.tensor([0, 1])).item() == 0.0


def test_size_part_matches_cross_entropy_and_is_weighted_by_the_curriculum() -> None:
    values = example()
    wanted = functional.cross_entropy(
        values["size_logits"].flatten(0, 1), (values["target_size"] - 1).flatten()
    )
    got = size_cross_entropy(values["size_logits"], values["target_size"]).mean()
    torch.testing.assert_close(got, wanted)
    loss = EFELoss(lambda_size=2.0)
    full, half = loss(**values, size_weight=1.0), loss(**values, size_weight=0.5)
    torch.testing.assert_close(full["size"], half["size"])
    torch.testing.assert_close(full["total"] - half["total"], full["size"])


def test_cross_entropy_only() -> None:
    values = example()
    out = EFELoss(extras=False)(**values)
    torch.testing.assert_close(out["total"], out["cons"] + out["size"])
    assert all(out[name] == 0 for name in PARTS if name not in ("cons", "size"))
    out["total"].backward()
    assert values["confidence"].grad is None
    assert values["pair_summary"].grad is None


def test_hard_cells_switch_changes_the_gradient_of_wrong_cells() -> None:
    target = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    prediction = torch.tensor([[[1, 0, 3], [4, 5, 0], [7, 8, 9]]])
    logits = 3.0 * functional.one_hot(prediction, 10).float()[None]
    logits.requires_grad_()
    wrong = prediction != target
    gradients = []
    for hard in (True, False):
        loss = EFELoss(extras=False, hard_cells=hard)(logits=logits, target=target)["total"]
        gradients.append(torch.autograd.grad(loss, logits)[0][0][wrong])
    torch.testing.assert_close(gradients[0], 4.5 * (0.5 + 0.5 * 2 / 9) * gradients[1])


def test_a_solved_grid_still_trains() -> None:
    target = torch.tensor([[[1, 2], [3, 4]]])
    logits = functional.one_hot(target, 10).float()[None].requires_grad_()
    out = EFELoss()(logits=logits, target=target)
    assert out["mask_ratio"] == 0
    assert out["total"] > 0.4
    (gradient,) = torch.autograd.grad(out["total"], logits)
    assert gradient.abs().sum(-1).gt(0).all()


def test_reward_term_carries_gradient() -> None:
    weight = torch.tensor([0.5, -0.25], requires_grad=True)
    efe, reward = weight.square().sum(), torch.tanh(weight)
    (both,) = torch.autograd.grad(combined_loss(efe, reward), weight, retain_graph=True)
    (off,) = torch.autograd.grad(combined_loss(efe, reward.detach()), weight, retain_graph=True)
    torch.testing.assert_close(off, 0.7 * 2 * weight.detach())
    assert (both < off).all()
    assert combined_loss(efe, reward).item() == pytest.approx(
        0.7 * efe.item() - 0.3 * reward.mean().item()
    )


def test_float32_under_autocast_and_same_value() -> None:
    values = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = EFELoss()(**values)
    outside = EFELoss()(**values)
    assert all(value.dtype == torch.float32 for value in inside.values())
    assert torch.equal(inside["total"], outside["total"])
    halves = {k: v.bfloat16() if v.is_floating_point() else v for k, v in values.items()}
    assert EFELoss()(**halves)["total"].dtype == torch.float32


def test_extreme_logits_stay_finite() -> None:
    values = example()
    for scale in (1e4, -1e4):
        big = {k: v.detach() * scale if v.is_floating_point() else v for k, v in values.items()}
        leaf = big["logits"].requires_grad_()
        out = EFELoss()(**big)
        assert all(torch.isfinite(v) for v in out.values())
        (gradient,) = torch.autograd.grad(out["total"], leaf)
        assert torch.isfinite(gradient).all()


def test_weights_are_state_not_parameters() -> None:
    loss, other = EFELoss(lambda_risk=0.7), EFELoss()
    assert list(loss.parameters()) == []
    assert set(loss.state_dict()) == {f"lambda_{name}" for name in PARTS}
    other.load_state_dict(loss.state_dict())
    values = example()
    assert torch.equal(other(**values)["total"], loss(**values)["total"])
    with pytest.raises(ValueError, match="smoothing"):
        EFELoss(smoothing=0.0)


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8, torch.float32])
def test_one_pair_by_position_is_a_batch_of_one_by_name(dtype: torch.dtype) -> None:
    data = example()
    pred, target = data["logits"][:, 0], data["target"][0]
    loss = EFELoss()
    expected = loss(logits=pred[:, None], target=target[None])
    found = loss(pred, target.to(dtype))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    whole = loss(data["logits"], data["target"])  # batches by position, padding and all
    assert torch.equal(whole["total"], loss(logits=data["logits"], target=data["target"])["total"])
    found["total"].backward()
    assert data["logits"].grad is not None


def test_logits_of_another_size_are_resized_to_the_target() -> None:
    logits, target = torch.randn(STEPS, 4, 4, 10), torch.randint(0, 10, (6, 3))
    planes = logits.permute(0, 3, 1, 2)
    by_hand = functional.interpolate(planes, (6, 3), mode="bilinear", align_corners=False)
    expected = EFELoss()(by_hand.permute(0, 2, 3, 1), target)["total"]
    assert EFELoss()(logits, target)["total"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_shapes_that_do_not_belong_together_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits \(5, 4, 4, 10\) and target \(2, 4, 4\)"):
        EFELoss()(torch.zeros(5, 4, 4, 10), torch.zeros(2, 4, 4))
