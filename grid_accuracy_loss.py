"""Cell cross-entropy with hard-cell weights, accuracy metrics, and batched resizing of grids and
logits.

Knows nothing of tasks, prompts or models: plain tensors in, plain tensors out, no state.
Grids are long tensors (batch, rows, cols) anchored at the top left, any negative value means
"outside the grid"; sizes are (batch, 2) as (rows, cols). Nothing here loops over cells or samples
or waits for the device.
Import: ``from grid_accuracy_loss import hard_cell_weights, resize_grids, weighted_cell_mean``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

OUTSIDE_GRID = -1


def valid_cells(grids: Tensor) -> Tensor:
    """Bool (batch, rows, cols): True where a cell belongs to the grid."""
    return grids >= 0


def grid_sizes(grids: Tensor) -> Tensor:
    """Sizes (batch, 2) long, (rows, cols), read off the padding of (batch, rows, cols) grids.

    A grid without any cell has size (0, 0).
    """
    inside = valid_cells(grids)
    return torch.stack([inside.any(dim=2).sum(dim=1), inside.any(dim=1).sum(dim=1)], dim=1)


def size_mask(size: Tensor, rows: int, cols: int) -> Tensor:
    """Bool (batch, rows, cols): True on the cells of the top-left rectangle of each `size`
    (batch, 2).
    """
    row = torch.arange(rows, device=size.device) < size[:, :1]
    col = torch.arange(cols, device=size.device) < size[:, 1:]
    return row[:, :, None] & col[:, None, :]


def wrong_cells(prediction: Tensor, target: Tensor) -> Tensor:
    """Bool (batch, rows, cols): cells of the target that the prediction misses (also by not being
    there).
    """
    return (prediction != target) & valid_cells(target)


def mask_ratio(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of wrong cells per grid, float32 (batch,) in [0, 1]; 0 for a target without cells."""
    wrong = wrong_cells(prediction, target).sum(dim=(1, 2))
    return wrong.float() / _cells(target)


def mean_colour(answers: Tensor) -> Tensor:
    """The mean colour of each answer (batch, rows, cols), float32 (batch,): how far these differ
    over a batch says whether the answers do."""
    inside = valid_cells(answers)
    return ((answers * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)).float()


def hard_cell_weights(prediction: Tensor, target: Tensor, *, easy_weight: float = 1.0) -> Tensor:
    """Cell weights, float32 (batch, rows, cols), that lift the wrong cells of a grid over the right
    ones.

    With n cells of which n_wrong are wrong, a wrong cell weighs n / n_wrong, a right cell
    `easy_weight`, a cell outside the target 0. Used in a mean over the n cells, all wrong cells
    together carry the weight of one whole grid however few they are: two of nine get 4.5 times the
    gradient of a plain mean. A grid without a mistake keeps `easy_weight` everywhere, so its loss
    does not vanish.
    """
    wrong = wrong_cells(prediction, target)
    n_wrong = wrong.sum(dim=(1, 2)).clamp(min=1).float()
    hard = (_cells(target) / n_wrong)[:, None, None]
    weights = torch.where(wrong, hard, torch.full_like(hard, easy_weight))
    return weights * valid_cells(target)


def hard_cell_scale(ratio: Tensor) -> Tensor:
    """Factor 0.5 + 0.5 * mask ratio: a nearly solved grid keeps half of its loss, it never
    vanishes.
    """
    return 0.5 + 0.5 * ratio


def weighted_cell_mean(values: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum(weights * values) / number of target cells per grid.

    `values` (..., batch, rows, cols); `target` and `weights` (batch, rows, cols). Returns (...,
    batch). The divisor counts cells, it is not the sum of the weights: heavier cells make a larger
    loss.
    """
    valid = valid_cells(target)
    values = values.masked_fill(~valid, 0.0)
    if weights is not None:
        values = values * weights
    return values.sum(dim=(-2, -1)) / _cells(target)


def pick_colour(values: Tensor, target: Tensor) -> Tensor:
    """values (..., batch, rows, cols, colours) at the target's colours -> (..., batch, rows, cols).

    Cells outside the target read colour 0: mask them afterwards.
    """
    index = target.clamp(min=0).long().unsqueeze(-1)
    return values.gather(-1, index.expand(*values.shape[:-1], 1)).squeeze(-1)


def cell_accuracy(prediction: Tensor, target: Tensor, size_right: Tensor | None = None) -> Tensor:
    """Share of right cells per pair, float32 (batch,); 0 where `size_right` (batch,) bool is False.

    Without `size_right` the sizes are not judged (the prediction was resized to the target).
    """
    right = 1.0 - mask_ratio(prediction, target)
    return right if size_right is None else right * size_right.to(right.dtype)


def exact_match(prediction: Tensor, target: Tensor, size_right: Tensor | None = None) -> Tensor:
    """Bool (batch,): every cell right and no cell too many (and the size right, where that is
    given).
    """
    same = ((prediction == target) | ((prediction < 0) & (target < 0))).flatten(1).all(dim=1)
    return same if size_right is None else same & size_right.bool()


def size_match(size: Tensor, target_size: Tensor) -> Tensor:
    """Bool (batch,): rows and cols both right."""
    return (size == target_size).all(dim=-1)


def resize_grids(
    grids: Tensor, from_size: Tensor, to_size: Tensor, canvas: tuple[int, int]
) -> Tensor:
    """Each grid resized on its own by nearest neighbour, as ``interpolate(mode="nearest")`` does
    it.

    `grids` (batch, rows, cols), `from_size` and `to_size` (batch, 2), `canvas` (rows, cols) of the
    result, at least as large as every `to_size` (what exceeds it is cut off). Equal sizes give the
    same cells. Cells outside `to_size`, and grids of which one size is 0, are -1.
    """
    n_rows, n_cols = canvas
    rows = _nearest_index(from_size[:, 0], to_size[:, 0], n_rows, grids.shape[1])
    cols = _nearest_index(from_size[:, 1], to_size[:, 1], n_cols, grids.shape[2])
    sample = torch.arange(grids.shape[0], device=grids.device)[:, None, None]
    picked = grids[sample, rows[:, :, None], cols[:, None, :]]
    keep = size_mask(to_size, *canvas) & (from_size > 0).all(dim=1)[:, None, None]
    return torch.where(keep, picked, torch.full_like(picked, OUTSIDE_GRID))


def resize_logits(
    logits: Tensor, from_size: Tensor, to_size: Tensor, canvas: tuple[int, int]
) -> Tensor:
    """Each grid's logits resized on their own, as ``interpolate(mode="bilinear",
    align_corners=False)`` does it.

    `logits` (..., batch, rows, cols, colours), sizes (batch, 2), `canvas` (rows, cols) of the
    result, at least as large as every `to_size`. Returns float32 (..., batch, *canvas, colours), 0
    outside `to_size`. Where the sizes are equal the values come back bit for bit; values outside
    `from_size` are never read.
    The interpolation is two small matrix products: their gradient is deterministic on a GPU, a
    gather's is not.
    """
    n_rows, n_cols = canvas
    with torch.autocast(device_type=logits.device.type, enabled=False):
        source = logits.float()
        source = source.masked_fill(~size_mask(from_size, *logits.shape[-3:-1])[..., None], 0.0)
        down = _bilinear_matrix(from_size[:, 0], to_size[:, 0], n_rows, logits.shape[-3])
        across = _bilinear_matrix(from_size[:, 1], to_size[:, 1], n_cols, logits.shape[-2])
        mixed = torch.matmul(down, source.flatten(-2)).unflatten(-1, source.shape[-2:])
        mixed = torch.matmul(across[:, None], mixed)
        same = size_match(from_size, to_size)[:, None, None, None]
        resized = torch.where(same, _fit(source, canvas), mixed)
        return resized.masked_fill(~size_mask(to_size, *canvas)[..., None], 0.0)


def resize_turned(
    logits: Tensor, from_size: Tensor, to_size: Tensor, canvas: tuple[int, int]
) -> Tensor:
    """Each grid in its eight orientations, each resized as `resize_logits` does it.

    `logits` (batch, rows, cols, colours) -> float32 (batch, 8, *canvas, colours), 0 outside
    `to_size`; first as it is, flipped left to right, top to bottom, both; then the same of its
    transpose. The flips are rows of the interpolation in reverse, so all are four matrix products.
    """
    n_rows, n_cols = canvas
    n, height, width = logits.shape[:3]
    side = max(height, width)
    with torch.autocast(device_type=logits.device.type, enabled=False):
        plain = logits.float().masked_fill(~size_mask(from_size, height, width)[..., None], 0.0)
        plain = _fit(plain, (side, side))
        source = torch.cat([plain, plain.transpose(1, 2)])  # (2 batch, side, side, colours)
        # one call for rows and columns of both; few large operations, as these grids are small
        rows, cols = from_size.unbind(1)
        from_side = torch.cat([rows, cols, cols, rows])
        to_side = to_size.t().repeat_interleave(2, dim=0).flatten()
        ways = _bilinear_matrix(from_side, to_side, max(canvas), side)
        row = torch.arange(max(canvas), device=to_side.device)
        back = (to_side[:, None] - 1 - row).clamp(min=0)[..., None].expand_as(ways)
        both = torch.stack([ways, ways.gather(1, back)], dim=1)  # (4 batch, 2, out, side)
        down = both[: 2 * n, :, :n_rows].flatten(1, 2)
        across = both[2 * n :, :, :n_cols].flatten(1, 2)
        mixed = torch.matmul(down, source.flatten(2)).unflatten(-1, source.shape[2:])
        mixed = torch.matmul(across[:, None], mixed)
        mixed = mixed.unflatten(1, (2, n_rows)).unflatten(3, (2, n_cols)).transpose(2, 3)
        mixed = mixed.flatten(1, 2).unflatten(0, (2, n)).transpose(0, 1).flatten(1, 2)
        return mixed.masked_fill(~size_mask(to_size, *canvas)[:, None, ..., None], 0.0)


def copied_share(colours: Tensor, size: Tensor, inp: Tensor, inp_size: Tensor) -> Tensor:
    """How much of the input an answer shows as it is, float32 (batch,): mean probability that it
    gives the input's colours once resized to the input (bilinear).

    `colours` (batch, rows, cols, colours) probabilities, `size` (batch, 2) of the answer, `inp`
    (batch, input rows, input cols).
    """
    there = resize_logits(colours, size, inp_size, (inp.shape[1], inp.shape[2]))
    return weighted_cell_mean(pick_colour(there, inp), inp)


def _cells(target: Tensor) -> Tensor:
    """Number of cells per grid, float32 (batch,), at least 1 so that it can divide."""
    return valid_cells(target).sum(dim=(1, 2)).clamp(min=1).float()


def _fit(logits: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Crop or zero-pad (..., rows, cols, colours) to the canvas."""
    more_rows, more_cols = canvas[0] - logits.shape[-3], canvas[1] - logits.shape[-2]
    return functional.pad(logits, (0, 0, 0, more_cols, 0, more_rows))


def _nearest_index(n_from: Tensor, n_to: Tensor, n_out: int, n_in: int) -> Tensor:
    """Source index (batch, n_out) of every target index, in float32 as torch computes it."""
    scale = n_from.float() / n_to.clamp(min=1).float()
    index = torch.floor(torch.arange(n_out, device=n_from.device)[None, :] * scale[:, None]).long()
    return torch.minimum(index, n_from[:, None] - 1).clamp(min=0, max=n_in - 1)


def _bilinear_matrix(n_from: Tensor, n_to: Tensor, n_out: int, n_in: int) -> Tensor:
    """Interpolation weights (batch, n_out, n_in), at most two non-zero in a row, each row summing
    to 1.
    """
    scale = n_from.float() / n_to.clamp(min=1).float()
    centre = (torch.arange(n_out, device=n_from.device)[None, :] + 0.5) * scale[:, None] - 0.5
    last = (n_from[:, None] - 1).clamp(min=0, max=n_in - 1)
    centre = torch.minimum(centre.clamp(min=0.0), last.float())
    low = centre.floor()
    high = torch.minimum(low.long() + 1, last)
    share = (centre - low)[..., None]
    source = torch.arange(n_in, device=n_from.device)[None, None, :]
    return (source == low.long()[..., None]) * (1.0 - share) + (source == high[..., None]) * share
