"""Three operations of the agent, with gradients by hand where torch's own cost more.

`rms_norm`, `bag_sum` and `positive_solver` give what their torch counterparts give, up to
rounding (tests/test_fast_math.py). Elsewhere than on a CPU in float32 the first two are torch's
own. What each bought: docs/PERFORMANCE.md.
`from fast_math import bag_sum, positive_solver, rms_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BAG_CHUNK = 1 << 24  # numbers of a 0/1 matrix at a time: 64 MB


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """x (..., width) over its root mean square, times weight (width,); eps None: of x's dtype."""
    if _by_hand(x) and weight.dtype == torch.float32:
        return _RmsNorm.apply(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)
    return F.rms_norm(x, tuple(weight.shape), weight, eps)


class _RmsNorm(torch.autograd.Function):
    """Two passes over x forwards and five backwards, where autograd takes a dozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = x * scale
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, scale, weight = ctx.saved_tensors
        product = grad * normal
        along = (product @ weight).unsqueeze(-1).div_(normal.shape[-1])
        grad_x = (grad * weight).sub_(normal * along).mul_(scale)
        return grad_x, product.flatten(0, -2).sum(0), None


def bag_sum(index: Tensor, table: Tensor) -> Tensor:
    """Sum of the rows of table (rows, width) that index (cells, n) int32 names: (cells, width)."""
    if _by_hand(table):
        return _BagSum.apply(index, table)
    return F.embedding_bag(index, table, mode="sum")


class _BagSum(torch.autograd.Function):
    """The table's gradient as a product with a 0/1 matrix; torch's own sorts all indices."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(table)
        return F.embedding_bag(index, table, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (index,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.rows, grad.shape[1])
        for some, g in zip(
            index.split(max(1, BAG_CHUNK // ctx.rows)),
            grad.split(max(1, BAG_CHUNK // ctx.rows)),
            strict=True,
        ):
            ones = torch.ones((), dtype=grad.dtype).expand(some.shape)
            named = grad.new_zeros(len(some), ctx.rows).scatter_add_(1, some.long(), ones)
            total.addmm_(named.t(), g)
        return None, total


def positive_solver(matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(solve, failed) of positive definite matrices (n, rows, rows) float32: solve(b) is the x of
    `matrix @ x = b`, b (n, rows, columns); failed (n,): not 0 where a matrix is not positive.

    On every device, and nothing waits for it. By the Cholesky factor, not by the inverse: that was
    faster and gave gradients two digits worse (docs/LOG.md).
    """
    # _ex: the other one waits for the device to report whether all went well
    factor, failed = torch.linalg.cholesky_ex(matrix.detach())
    return partial(_Solve.apply, matrix, factor), failed


class _Solve(torch.autograd.Function):
    """The gradient by one more solve, where autograd goes back through the factor."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, factor: Tensor, b: Tensor) -> Tensor:
        x = torch.cholesky_solve(b, factor)
        ctx.save_for_backward(factor, x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        factor, x = ctx.saved_tensors
        grad_b = torch.cholesky_solve(grad, factor)
        return -(grad_b @ x.mT), None, grad_b
