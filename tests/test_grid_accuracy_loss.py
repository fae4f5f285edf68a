"""Cell loss, hard-cell weights, metrics and resizing against slow, obvious references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from grid_accuracy_loss import (
    cell_accuracy,
    copied_share,
    exact_match,
    grid_sizes,
    hard_cell_scale,
    hard_cell_weights,
    mask_ratio,
    pick_colour,
    resize_grids,
    resize_logits,
    resize_turned,
    size_mask,
    size_match,
    valid_cells,
    weighted_cell_mean,
)

TARGET = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
PREDICTION = torch.tensor([[[1, 0, 3], [4, 5, 0], [7, 8, 9]]])
SIDES = st.integers(1, 30)
SIZES = st.tuples(SIDES, SIDES)


def padded(grids: list[torch.Tensor], canvas: tuple[int, int]) -> torch.Tensor:
    out = torch.full((len(grids), *canvas), -1)
    for i, grid in enumerate(grids):
        out[i, : grid.shape[0], : grid.shape[1]] = grid
    return out


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, 4, 5, 6, 10) and targets of four sizes on a 5 x 6 canvas."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(5, 6), (1, 1), (2, 5), (4, 3)]
    grids = [torch.randint(0, 10, size, generator=generator) for size in sizes]
    return torch.randn(3, 4, 5, 6, 10, generator=generator), padded(grids, (5, 6))


def cell_loss(
    logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy per grid, put together as the EFE loss does it."""
    return weighted_cell_mean(-pick_colour(logits.log_softmax(-1), target), target, weights)


def test_wrong_cells_of_the_three_by_three_example_get_4_5_times_the_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 3, 3, 10, generator=generator, requires_grad=True)
    weights = hard_cell_weights(PREDICTION, TARGET)
    (plain,) = torch.autograd.grad(cell_loss(logits, TARGET).sum(), logits)
    (hard,) = torch.autograd.grad(cell_loss(logits, TARGET, weights).sum(), logits)
    wrong = PREDICTION != TARGET
    assert int(wrong.sum()) == 2
    torch.testing.assert_close(hard[wrong], 4.5 * plain[wrong])
    torch.testing.assert_close(hard[~wrong], plain[~wrong])
    assert weights[wrong].tolist() == [4.5, 4.5]


def test_easy_weight_and_cells_outside() -> None:
    target = functional.pad(TARGET, (0, 2, 0, 1), value=-1)
    prediction = functional.pad(PREDICTION, (0, 2, 0, 1), value=4)
    weights = hard_cell_weights(prediction, target, easy_weight=0.25)
    assert weights[target < 0].eq(0).all()
    assert weights[(prediction == target) & (target >= 0)].eq(0.25).all()
    assert weights[(prediction != target) & (target >= 0)].eq(4.5).all()


def test_a_grid_without_mistakes_keeps_its_loss() -> None:
    logits = torch.zeros(1, 3, 3, 10, requires_grad=True)
    ratio = mask_ratio(TARGET, TARGET)
    loss = hard_cell_scale(ratio) * cell_loss(logits, TARGET, hard_cell_weights(TARGET, TARGET))
    assert ratio.item() == 0.0
    assert hard_cell_scale(ratio).item() == 0.5
    loss.sum().backward()
    assert loss.item() > 1.0
    assert logits.grad is not None
    assert logits.grad.abs().amin(dim=(0, 3)).min() > 0


def test_mask_ratio() -> None:
    assert mask_ratio(PREDICTION, TARGET).item() == pytest.approx(2 / 9)
    missing = torch.where(TARGET == 1, -1, TARGET)
    assert mask_ratio(missing, TARGET).item() == pytest.approx(1 / 9)
    empty = torch.full_like(TARGET, -1)
    assert mask_ratio(TARGET, empty).item() == 0.0


def test_cross_entropy_matches_a_loop_over_cells() -> None:
    logits, target = example()
    weights = torch.rand(target.shape, generator=torch.Generator().manual_seed(1))
    got = cell_loss(logits, target, weights)
    assert got.shape == (3, 4)
    for t in range(3):
        for b in range(4):
            rows, cols = grid_sizes(target)[b].tolist()
            total = 0.0
            for r in range(rows):
                for c in range(cols):
                    p = logits[t, b, r, c].exp() / logits[t, b, r, c].exp().sum()
                    total -= float(weights[b, r, c] * p[target[b, r, c]].log())
            assert got[t, b].item() == pytest.approx(total / (rows * cols), rel=1e-5)
    torch.testing.assert_close(cell_loss(logits[1], target, weights), got[1])


def test_cells_outside_the_target_have_no_gradient_and_no_say() -> None:
    logits, target = example()
    logits = logits.requires_grad_()
    cell_loss(logits, target).sum().backward()
    assert logits.grad is not None
    assert logits.grad[:, target < 0].eq(0).all()
    assert logits.grad[:, target >= 0].abs().sum(-1).gt(0).all()
    noisy = torch.where(valid_cells(target)[..., None], logits.detach(), torch.tensor(1e4))
    assert torch.equal(cell_loss(noisy, target), cell_loss(logits, target))


def test_resized_logits_are_float32_under_autocast() -> None:
    logits, target = example()
    sizes = grid_sizes(target), grid_sizes(target) * 2, (10, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = resize_logits(logits, *sizes)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, resize_logits(logits, *sizes))


def test_accuracy_metrics() -> None:
    both = torch.cat([PREDICTION, TARGET, TARGET])
    target = TARGET.expand(3, 3, 3)
    size_right = torch.tensor([True, True, False])
    torch.testing.assert_close(
        cell_accuracy(both, target, size_right), torch.tensor([7 / 9, 1.0, 0.0])
    )
    torch.testing.assert_close(cell_accuracy(both, target), torch.tensor([7 / 9, 1.0, 1.0]))
    assert exact_match(both, target).tolist() == [False, True, True]
    assert exact_match(both, target, size_right).tolist() == [False, True, False]
    sizes = torch.tensor([[3, 3], [3, 4]])
    assert size_match(sizes, torch.tensor([[3, 3], [3, 3]])).tolist() == [True, False]


def test_exact_match_counts_cells_too_many() -> None:
    target = functional.pad(TARGET, (0, 1), value=-1)
    assert exact_match(target, target).all()
    assert not exact_match(functional.pad(TARGET, (0, 1), value=0), target).any()


def test_size_mask_is_the_top_left_rectangle() -> None:
    mask = size_mask(torch.tensor([[2, 3], [0, 1]]), 3, 4)
    assert mask.int().tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0]] * 3,
    ]


def test_grid_sizes() -> None:
    _, target = example()
    assert grid_sizes(target).tolist() == [[5, 6], [1, 1], [2, 5], [4, 3]]
    assert grid_sizes(torch.full((1, 2, 2), -1)).tolist() == [[0, 0]]


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_resizing_any_sizes_equals_interpolate_per_sample(pairs: Any, seed: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    from_size = torch.tensor([p[0] for p in pairs])
    to_size = torch.tensor([p[1] for p in pairs])
    canvas = (30, 30)
    grids = padded([torch.randint(0, 10, p[0], generator=generator) for p in pairs], canvas)
    logits = torch.randn(2, len(pairs), 30, 30, 3, generator=generator)
    logits[:, (grids < 0)] = float("nan")  # whatever lies outside a grid must not be read
    got_grids = resize_grids(grids, from_size, to_size, canvas)
    got_logits = resize_logits(logits, from_size, to_size, canvas)
    for i, ((h, w), (h2, w2)) in enumerate(pairs):
        grid = grids[i, :h, :w][None, None].float()
        wanted = functional.interpolate(grid, size=(h2, w2), mode="nearest")[0, 0].long()
        assert torch.equal(got_grids[i], padded([wanted], canvas)[0])
        source = logits[:, i, :h, :w].permute(0, 3, 1, 2)
        smooth = functional.interpolate(
            source, size=(h2, w2), mode="bilinear", align_corners=False
        ).permute(0, 2, 3, 1)
        torch.testing.assert_close(got_logits[:, i, :h2, :w2], smooth, atol=1e-5, rtol=1e-5)
        assert got_logits[:, i, h2:].eq(0).all()
        assert got_logits[:, i, :, w2:].eq(0).all()
        if (h, w) == (h2, w2):
            assert torch.equal(got_logits[:, i, :h, :w], logits[:, i, :h, :w])


def test_nearest_equals_interpolate_for_every_pair_of_sides() -> None:
    line = torch.arange(30)
    for n_from in range(1, 31):
        grids = torch.where(line < n_from, line, -1)[None, None].expand(30, 1, 30)
        from_size = torch.tensor([[1, n_from]]).expand(30, 2)
        to_size = torch.stack([torch.ones(30, dtype=torch.long), line + 1], dim=1)
        got = resize_grids(grids, from_size, to_size, (1, 30))
        for n_to in range(1, 31):
            wanted = functional.interpolate(line[None, None, :n_from].float(), size=n_to)[0, 0]
            assert got[n_to - 1, 0, :n_to].tolist() == wanted.long().tolist()


def test_equal_sizes_are_the_identity_bit_for_bit() -> None:
    logits, target = example()
    sizes = grid_sizes(target)
    got = resize_logits(logits, sizes, sizes, (5, 6))
    inside = valid_cells(target)
    assert torch.equal(got[:, inside], logits[:, inside])
    assert torch.equal(resize_grids(target, sizes, sizes, (5, 6)), target)
    # on a larger and on a smaller canvas than it came on
    assert torch.equal(resize_grids(target, sizes, sizes, (9, 9))[:, :5, :6], target)
    assert torch.equal(resize_logits(logits, sizes, sizes, (7, 8))[:, :, :5, :6], got)
    one = sizes.new_tensor([[1, 1]])
    small = resize_logits(logits[:, 1:2], one, one, (1, 1))
    assert torch.equal(small, logits[:, 1:2, :1, :1])
    # not a product with ones and zeros: that would turn infinities into NaN, or round on a GPU
    infinite = logits.clone()
    infinite[0, 0, 0, 0, 3] = -torch.inf
    got = resize_logits(infinite, sizes, sizes, (5, 6))
    assert torch.equal(got[:, inside], infinite[:, inside])


def test_resized_logits_carry_gradient_from_inside_only() -> None:
    logits, target = example()
    logits = logits.requires_grad_()
    sizes = grid_sizes(target)
    resize_logits(logits, sizes, sizes * 2, (10, 12)).square().sum().backward()
    assert logits.grad is not None
    assert logits.grad[:, valid_cells(target)].abs().sum(-1).gt(0).all()
    assert logits.grad[:, target < 0].eq(0).all()


def test_a_prediction_without_cells_becomes_empty() -> None:
    empty = torch.full((1, 2, 2), -1)
    got = resize_grids(empty, torch.tensor([[0, 0]]), torch.tensor([[2, 2]]), (2, 2))
    assert got.eq(-1).all()


@pytest.mark.parametrize("to_size", [(2, 3), (3, 2), (4, 5), (1, 1)])
def test_turned_grids_are_the_eight_orientations_each_resized(to_size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 3, 10, generator=generator)
    sizes = torch.tensor([[2, 3]]), torch.tensor([to_size])
    got = resize_turned(functional.pad(logits, (0, 0, 0, 2, 0, 1), value=9.0), *sizes, (5, 6))
    for k in range(8):
        grid = logits.transpose(1, 2) if k >= 4 else logits
        size = sizes[0].flip(1) if k >= 4 else sizes[0]
        grid = grid.flip(2) if k % 2 else grid
        grid = grid.flip(1) if k % 4 >= 2 else grid
        wanted = resize_logits(grid, size, sizes[1], (5, 6))
        torch.testing.assert_close(got[:, k], wanted, atol=1e-6, rtol=1e-5)


def test_copied_share_is_what_an_answer_shows_of_the_input() -> None:
    inp = torch.tensor([[[1, 2], [3, 4]], [[1, 2], [-1, -1]]])
    answer = torch.tensor([[[1, 0, 9], [3, 0, 9]], [[1, 2, 9], [9, 9, 9]]])
    colours = functional.one_hot(answer, 10).float()
    size = torch.tensor([[2, 2], [1, 2]])
    assert copied_share(colours, size, inp, size).tolist() == [0.5, 1.0]
    other = torch.tensor([[1, 1], [1, 2]])  # a single cell, spread over the input
    assert copied_share(colours, other, inp, size).tolist() == [0.25, 1.0]
