"""Size warmup, memory threshold and gradient monitor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from curriculum import DynamicMemoryThreshold, GradientMonitor, SizeWarmupCurriculum


def test_size_weights_are_the_documented_ones() -> None:
    curriculum = SizeWarmupCurriculum()
    weights = [f"{curriculum.get_size_loss_weight(epoch):.3f}" for epoch in range(5)]
    assert weights == ["1.000", "0.833", "0.667", "0.500", "0.500"]


def test_size_weight_between_epochs_and_at_the_edges() -> None:
    curriculum = SizeWarmupCurriculum()
    assert curriculum.get_size_loss_weight(1.5) == pytest.approx(0.75)
    assert curriculum.get_size_loss_weight(2.999) == pytest.approx(0.5, abs=1e-3)
    assert curriculum.get_size_loss_weight(-1) == 1.0
    assert SizeWarmupCurriculum(warmup_epochs=0).get_size_loss_weight(0) == 0.5
    with pytest.raises(ValueError, match="warmup_epochs"):
        SizeWarmupCurriculum(warmup_epochs=-1)


def test_curriculum_state_round_trip() -> None:
    other = SizeWarmupCurriculum()
    other.load_state_dict(SizeWarmupCurriculum(5, 0.9, 0.1).state_dict())
    assert other.get_size_loss_weight(2.5) == pytest.approx(0.5)


def test_threshold_is_the_running_average_plus_ten_percent() -> None:
    threshold = DynamicMemoryThreshold(initial_threshold=0.2, ema_alpha=0.1)
    assert threshold.get_threshold() == pytest.approx(0.22)
    ema = 0.2
    for accuracy in (0.15, 0.3, 0.6):
        threshold.update(accuracy)
        ema = 0.9 * ema + 0.1 * accuracy
        assert threshold.get_threshold() == pytest.approx(1.1 * ema)


def test_threshold_rises_with_the_model_and_solutions_get_in() -> None:
    threshold = DynamicMemoryThreshold()
    start = threshold.get_threshold()
    stored = 0
    for i in range(50):
        accuracy = 0.2 + 0.01 * i
        stored += accuracy > threshold.get_threshold()
        threshold.update(accuracy)
    assert threshold.get_threshold() > start
    assert stored > 10


def test_a_perfect_answer_is_always_storable_and_nan_is_ignored() -> None:
    threshold = DynamicMemoryThreshold()
    for _ in range(200):
        threshold.update(1.0)
    assert 0.9 < threshold.get_threshold() < 1.0
    before = threshold.get_threshold()
    assert threshold.update(math.nan) == before
    assert threshold.n_skipped == 1
    with pytest.raises(ValueError, match="ema_alpha"):
        DynamicMemoryThreshold(ema_alpha=0.0)


def test_threshold_state_round_trip() -> None:
    threshold, other = DynamicMemoryThreshold(), DynamicMemoryThreshold(0.9, 0.5)
    threshold.update(0.4)
    other.load_state_dict(threshold.state_dict())
    assert other.state_dict() == threshold.state_dict()
    assert other.update(0.7) == threshold.update(0.7)


def test_gradient_norm_and_counts() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    module[2].requires_grad_(False)
    monitor = GradientMonitor()
    assert monitor.check_gradients(module, "agent")["norm"] == 0.0
    module[0](torch.ones(1, 3)).square().sum().backward()
    info = monitor.check_gradients(module, "agent")
    flat = torch.cat([p.grad.flatten() for p in module[0].parameters() if p.grad is not None])
    assert info["norm"] == pytest.approx(flat.norm().item(), rel=1e-5)
    assert info["max"] == pytest.approx(flat.abs().max().item())
    assert (info["n_params"], info["n_with_grad"], info["n_nonzero"]) == (4, 2, 2)
    assert monitor.state_dict() == {"sums": {"agent": info["norm"]}, "counts": {"agent": 2}}


def test_non_finite_gradient_is_reported_but_not_summed() -> None:
    module = nn.Linear(2, 1)
    module.weight.grad = torch.tensor([[math.nan, 1.0]])
    monitor = GradientMonitor()
    info = monitor.check_gradients(module, "agent")
    assert info["finite"] == 0.0
    assert monitor.state_dict() == {"sums": {}, "counts": {}}


def test_monitor_state_round_trip() -> None:
    module = nn.Linear(2, 1)
    module(torch.ones(1, 2)).sum().backward()
    monitor, other = GradientMonitor(), GradientMonitor()
    monitor.check_gradients(module, "qwen")
    other.load_state_dict(monitor.state_dict())
    assert other.state_dict() == monitor.state_dict()
    assert other.state_dict()["sums"]["qwen"] > 0
