"""`fast_math` beside torch's own operations: values and gradients, and where it stands aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fast_math
from fast_math import bag_sum, positive_solver, rms_norm


def gradients(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The value of f, and the gradients of a random sum of it."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = f(*leaves)
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return [value.detach(), *torch.autograd.grad((value * weight).sum(), leaves)]


def assert_alike(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    width=st.integers(1, 9),
    eps=st.sampled_from([None, 1e-6, 1e-2]),
    seed=st.integers(0, 999),
)
def test_rms_norm(shape: list[int], width: int, eps: float | None, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, width, generator=draws)
    weight = torch.randn(width, generator=draws)
    assert_alike(
        gradients(lambda x, w: rms_norm(x, w, eps), x, weight),
        gradients(lambda x, w: F.rms_norm(x, (width,), w, eps), x, weight),
        1e-4,
    )


@settings(deadline=None, max_examples=30)
@given(
    cells=st.integers(1, 40),
    n=st.integers(1, 5),
    rows=st.integers(1, 6),
    chunk=st.sampled_from([1, 24, 1 << 24]),
)
def test_bag_sum(cells: int, n: int, rows: int, chunk: int) -> None:
    """A row named twice counts twice, whatever the chunks."""
    draws = torch.Generator().manual_seed(cells)
    index = torch.randint(0, rows, (cells, n), generator=draws, dtype=torch.int32)
    table = torch.randn(rows, 7, generator=draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_math, "BAG_CHUNK", chunk)
        found = gradients(lambda t: bag_sum(index, t), table)
    assert_alike(found, gradients(lambda t: F.embedding_bag(index, t, mode="sum"), table))


def test_positive_solver() -> None:
    draws = torch.Generator().manual_seed(0)
    half, b = torch.randn(3, 6, 6, generator=draws), torch.randn(3, 6, 2, generator=draws)

    def matrix_of(half: Tensor) -> Tensor:
        return half @ half.mT + 0.1 * torch.eye(6)

    def ours(half: Tensor, b: Tensor) -> Tensor:
        solve, failed = positive_solver(matrix_of(half))
        assert failed.tolist() == [0, 0, 0]
        return solve(solve(b) + b)

    def theirs(half: Tensor, b: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(matrix_of(half))
        return torch.cholesky_solve(torch.cholesky_solve(b, factor) + b, factor)

    assert_alike(gradients(ours, half, b), gradients(theirs, half, b), 1e-3)


def test_a_matrix_that_is_not_positive_is_told() -> None:
    matrices = torch.stack([torch.eye(2), -torch.eye(2)])
    solve, failed = positive_solver(matrices)
    assert (failed != 0).tolist() == [False, True]
    assert torch.equal(solve(torch.ones(2, 2, 1))[0], torch.ones(2, 1))


def test_torch_s_own_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """In other precisions nothing of this is used, bit for bit."""

    def never(*_: Any) -> None:
        raise AssertionError("by hand")

    monkeypatch.setattr(fast_math._RmsNorm, "apply", never)
    monkeypatch.setattr(fast_math._BagSum, "apply", never)
    dtype = torch.bfloat16
    x, weight = torch.randn(3, 4, dtype=dtype), torch.randn(4, dtype=dtype)
    table, index = torch.randn(5, 4, dtype=dtype), torch.tensor([[0, 4], [1, 1]], dtype=torch.int32)
    assert torch.equal(rms_norm(x, weight, 1e-6), F.rms_norm(x, (4,), weight, 1e-6))
    assert torch.equal(bag_sum(index, table), F.embedding_bag(index, table, mode="sum"))
