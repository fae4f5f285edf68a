"""MuonAdamW against slow references, the weight average, exact round trips of both."""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import pytest
import torch

from command_line import UserError
from optimizers import (
    NS_A,
    NS_B,
    NS_C,
    MuonAdamW,
    WeightAverage,
    eight_bit_functions,
    orthogonalise,
)


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def copies(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


# ---------------------------------------------------------------- AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.999)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # fused, and step by step
def test_plain_groups_are_torch_adamw(weight_decay: Any, betas: Any, dtype: Any) -> None:
    ours = [torch.nn.Parameter(p.to(dtype)) for p in tensors((5, 3), (7,), (), (2, 3, 4))]
    theirs = copies(ours)
    options: dict[str, Any] = {"lr": 3e-2, "betas": betas, "weight_decay": weight_decay}
    a, b = MuonAdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(12):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_lies_transposed_in_memory_counts_as_it_reads() -> None:
    """Breaks: memory walked through without asking how the numbers lie in it."""
    ours = tensors((5, 3), (4, 4))
    theirs = copies(ours)
    a, b = MuonAdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95))
    b.param_groups[0]["weight_decay"] = 0.0
    for step in range(3):
        for params in (ours, theirs):
            give_gradients(params, step)
            for p in params:
                assert p.grad is not None
                p.grad = p.grad.t().contiguous().t()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_learning_rate_of_a_group_can_change_between_steps_as_in_torch() -> None:
    ours = tensors((4, 4))
    theirs = copies(ours)
    a, b = MuonAdamW(ours, lr=1.0), torch.optim.AdamW(theirs, lr=1.0, betas=(0.9, 0.95))
    b.param_groups[0]["weight_decay"] = 0.0
    for step, lr in enumerate((0.1, 0.02, 0.0, 0.3)):
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = lr
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_parameters_without_gradient_stay_and_have_no_state() -> None:
    params = tensors((3, 3), (3, 3), (4,))
    optimizer = MuonAdamW([{"params": params[:2], "muon": True}, {"params": params[2:]}], lr=0.1)
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones(3, 3)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    assert torch.equal(params[2], before[2])
    assert params[1] not in optimizer.state
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()  # nothing to do is no error


# ---------------------------------------------------------------- Muon


def slow_newton_schulz(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The polynomial applied to the singular values, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = NS_A * s + NS_B * s**3 + NS_C * s**5
    return (u * s) @ vh


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5), (32, 96)])
def test_orthogonalise_moves_singular_values_alone(shape: Any) -> None:
    matrix = tensors((3, *shape), seed=3)[0].detach()
    found = orthogonalise(matrix)
    for one, expected in zip(found, matrix, strict=True):
        torch.testing.assert_close(one.double(), slow_newton_schulz(expected), atol=1e-3, rtol=1e-3)
    values = torch.linalg.svdvals(found)
    assert 0.3 < values.median() < 1.3


def test_orthogonalise_of_zero_is_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_muon_groups_follow_the_written_formula() -> None:
    shapes = ((6, 4), (6, 4), (4, 8), (5, 5))
    ours = tensors(*shapes)
    reference = [p.detach().double().clone() for p in ours]
    moments = [torch.zeros_like(p) for p in reference]
    lr, decay, momentum = 0.05, 0.1, 0.9
    optimizer = MuonAdamW(
        [{"params": ours, "muon": True}], lr=lr, weight_decay=decay, momentum=momentum
    )
    for step in range(6):
        give_gradients(ours, step)
        for i, p in enumerate(ours):
            assert p.grad is not None
            g = p.grad.double()
            moments[i] = momentum * moments[i] + (1 - momentum) * g
            nesterov = momentum * moments[i] + (1 - momentum) * g
            size = 0.2 * max(p.shape) ** 0.5
            reference[i] = reference[i] * (1 - lr * decay)
            reference[i] -= lr * size * slow_newton_schulz(nesterov)
        optimizer.step()
        for p, q in zip(ours, reference, strict=True):
            torch.testing.assert_close(p.double(), q, atol=2e-3, rtol=0)


def test_matrices_of_one_shape_do_not_mix() -> None:
    together, alone = tensors((4, 6), (4, 6)), tensors((4, 6), (4, 6))
    a = MuonAdamW([{"params": together, "muon": True}], lr=0.1)
    b = [MuonAdamW([{"params": [p], "muon": True}], lr=0.1) for p in alone]
    for step in range(3):
        give_gradients(together, step)
        give_gradients(alone, step)
        a.step()
        for one in b:
            one.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_closures_are_refused() -> None:
    with pytest.raises(ValueError, match="no closure"):
        MuonAdamW(tensors((2, 2)), lr=0.1).step(lambda: 0.0)


def test_state_dict_round_trip_through_a_file_is_bit_exact() -> None:
    def build(params: list[torch.nn.Parameter]) -> MuonAdamW:
        groups = [
            {"params": params[:2], "muon": True, "name": "matrices", "base_lr": 0.1},
            {"params": params[2:], "lr": 0.02, "name": "rest", "base_lr": 0.02},
        ]
        return MuonAdamW(groups, lr=0.1, weight_decay=0.01)

    straight = tensors((5, 4), (5, 4), (6,), (3, 2))
    first = build(straight)
    for step in range(3):
        give_gradients(straight, step)
        first.step()
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in straight], "state": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(w) for w in saved["weights"]]
    second = build(resumed)
    second.load_state_dict(saved["state"])
    for step in range(3, 7):
        for params, optimizer in ((straight, first), (resumed, second)):
            give_gradients(params, step)
            optimizer.step()
    for p, q in zip(straight, resumed, strict=True):
        assert torch.equal(p, q)
    assert [g["name"] for g in second.param_groups] == ["matrices", "rest"]


def test_grad_scaler_accepts_the_optimizer_and_skips_on_infinity() -> None:
    params = tensors((3, 3), (4,))
    optimizer = MuonAdamW([{"params": params[:1], "muon": True}, {"params": params[1:]}], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (True, False):
        before = [p.detach().clone() for p in params]
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack([p.square().sum() for p in params]).sum() * (
            float("inf") if bad else 1.0
        )
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        changed = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
        assert changed == [not bad, not bad]
    assert scaler.get_scale() == 512.0


# ---------------------------------------------------------------- the average


def test_average_follows_the_formula_with_its_warmup() -> None:
    params = tensors((3, 2), (4,))
    average = WeightAverage(params, 0.9)
    expected = [p.detach().clone() for p in params]
    for n in range(1, 40):
        with torch.no_grad():
            for p in params:
                p.add_(0.1 * n)
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        both = zip(expected, params, strict=True)
        expected = [decay * e + (1 - decay) * p.detach() for e, p in both]
    for a, e in zip(average.average, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_applied_swaps_the_weights_in_and_out_bit_for_bit_even_after_an_error() -> None:
    params = tensors((3, 2), (4,))
    average = WeightAverage(params, 0.5)
    with torch.no_grad():
        for p in params:
            p.mul_(3.0)
    average.update()
    own = [p.detach().clone() for p in params]
    averaged = [a.clone() for a in average.average]
    with average.applied():
        assert all(torch.equal(p, a) for p, a in zip(params, averaged, strict=True))
    assert all(torch.equal(p, o) for p, o in zip(params, own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(average.average, averaged, strict=True))
    with pytest.raises(RuntimeError, match="stop"), average.applied():
        raise RuntimeError("stop")
    assert all(torch.equal(p, o) for p, o in zip(params, own, strict=True))


def test_decay_zero_switches_the_average_off() -> None:
    params = tensors((3, 2))
    average = WeightAverage(params, 0.0)
    with torch.no_grad():
        params[0].add_(1.0)
    average.update()
    own = params[0].detach().clone()
    with average.applied():
        assert torch.equal(params[0], own)
    assert average.state_dict() == {"n_updates": 0, "average": []}


def test_eight_bits_without_the_package_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(UserError, match="pip install bitsandbytes, or use --optimizer muon"):
        eight_bit_functions()


def test_eight_bit_moments_are_loaded_as_they_were_saved() -> None:
    """Breaks: torch's own loading, which makes float32 of them."""
    p = torch.nn.Parameter(torch.ones(64, 64))
    optimizer, again = (MuonAdamW([{"params": [p], "eight_bit": True}]) for _ in "ab")
    optimizer.state[p] = {
        "step": torch.tensor(3.0),
        "exp_avg_8": torch.arange(4096).reshape(64, 64).to(torch.uint8),
        "exp_avg_8_scale": torch.rand(16),
        "exp_avg_sq_8": torch.arange(4096).reshape(64, 64).to(torch.uint8) // 2,
        "exp_avg_sq_8_scale": torch.rand(16),
    }
    again.load_state_dict(optimizer.state_dict())
    for name, value in optimizer.state[p].items():
        assert again.state[p][name].dtype == value.dtype, name
        assert torch.equal(again.state[p][name], value), name


def test_eight_bit_adamw_follows_adamw_and_a_copy_goes_on_bit_for_bit() -> None:
    """Breaks: wrong order of the package's arguments, decay, or weights that are left out."""
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(64, 96, generator=generator), torch.randn(8, generator=generator)]
    grads = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(8)]
    ends: dict[bool, list[torch.nn.Parameter]] = {}
    for eight_bit in (False, True):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        group = {"params": params, "eight_bit": eight_bit, "weight_decay": 0.1}
        optimizer = MuonAdamW([group], lr=0.01)
        for number, step in enumerate(grads):
            if eight_bit and number == 4:
                state = optimizer.state_dict()
                optimizer = MuonAdamW([group], lr=0.01)
                optimizer.load_state_dict(state)
            for p, grad in zip(params, step, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        ends[eight_bit] = params
    moved = (ends[False][0] - start[0]).abs().mean()
    assert (ends[True][0] - ends[False][0]).abs().mean() < 0.05 * moved
    assert not torch.equal(ends[True][0], ends[False][0])
    assert torch.equal(ends[True][1], ends[False][1]), "small weights keep whole moments"


def test_average_leaves_frozen_weights_out() -> None:
    params = tensors((3, 2), (4,))
    params[0].requires_grad_(False)
    assert [a.shape for a in WeightAverage(params, 0.9).average] == [(4,)]


def test_average_state_round_trip_is_bit_exact_and_a_misfit_is_told() -> None:
    params = tensors((3, 2), (4,))
    average = WeightAverage(params, 0.9)
    with torch.no_grad():
        params[0].add_(1.0)
    average.update()
    state = copy.deepcopy(average.state_dict())
    other = WeightAverage(tensors((3, 2), (4,), seed=9), 0.9)
    other.load_state_dict(state)
    assert other.n_updates == 1
    assert all(torch.equal(a, b) for a, b in zip(other.average, average.average, strict=True))
    with pytest.raises(ValueError, match="1 tensors do not fit 2"):
        other.load_state_dict({"n_updates": 1, "average": state["average"][:1]})
    with pytest.raises(ValueError, match="do not fit"):
        other.load_state_dict({"n_updates": 1, "average": [torch.zeros(2, 3), torch.zeros(4)]})
