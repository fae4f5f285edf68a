"""Pure reward functions: how good one prediction is, and what a refinement of it gained.

Hard scores take colour grids (what the policy is paid for), soft scores take logits and carry
gradient (what the combined loss uses). No state, no resizing, no models; predictions arrive on the
target's canvas.
Every score is float32 (batch,) in [0, 1], 1 is best. Reward = weighted sum of (after - before), so
better is positive, worse negative, unchanged exactly 0.
Import: ``from reward_shaping import hard_scores, soft_scores, shaped_reward``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grid_accuracy_loss import cell_accuracy, pick_colour, valid_cells, weighted_cell_mean
from grid_parts import COLOURS

Scores = dict[str, Tensor]

# The user's weights. The keys are the names of the breakdown.
REWARD_WEIGHTS: Mapping[str, float] = {"d_acc": 1.0, "d_size": 0.5, "d_color": 0.5, "d_rev": 0.5}


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of the target's cells with the right colour. Both (batch, rows, cols)."""
    return cell_accuracy(prediction, target)


def size_score(size: Tensor, target_size: Tensor) -> Tensor:
    """1 where both sides are right, less by half of each side's relative error. Both (batch, 2).

    A side's error is |difference| / larger side, below 1: the score is in (0, 1] for sizes >= 1.
    `size` is what the model itself predicted, before any resize to the target; after one, this
    would always be 1.
    """
    return _side_score(size.float(), target_size.float()).mean(dim=-1)


def colour_agreement(prediction: Tensor, target: Tensor) -> Tensor:
    """Overlap of the two colour histograms, each as shares of its own grid, wherever the cells lie.

    `prediction` and `target` (batch, ...) with any canvas each. A prediction without cells scores
    0.
    """
    return torch.minimum(_histogram(prediction), _histogram(target)).sum(dim=-1)


def reversibility(reconstruction: Tensor, inp: Tensor, copied: Tensor | None = None) -> Tensor:
    """Share of input cells that the backward model gets back from the predicted output. Both
    (batch, rows, cols).

    With `copied` (batch,), the share that the output shows as it is, `beyond_copying` of the two.
    """
    recovered = cell_accuracy(reconstruction, inp)
    return recovered if copied is None else beyond_copying(recovered, copied)


def beyond_copying(recovered: Tensor, copied: Tensor) -> Tensor:
    """(1 + recovered - copied) / 2 in [0, 1]: above one half where more of the input can be
    recovered from the answer than the answer simply shows.

    Without this an answer that leaves the input as it is counts as the most reversible one.
    """
    return 0.5 * (1.0 + recovered - copied)


def soft_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Expected accuracy: mean probability of the right colour. `logits` (batch, rows, cols,
    colours).
    """
    return weighted_cell_mean(pick_colour(_probabilities(logits), target), target)


def soft_size_score(size_logits: Tensor, target_size: Tensor) -> Tensor:
    """Expected `size_score` under the size head. `size_logits` (batch, 2, sides), entry k means
    side k + 1.
    """
    probabilities = _probabilities(size_logits)
    sides = torch.arange(1, size_logits.shape[-1] + 1, device=size_logits.device).float()
    scores = _side_score(sides, target_size.float()[..., None])
    return (probabilities * scores).sum(dim=-1).mean(dim=-1)


def soft_colour_agreement(logits: Tensor, target: Tensor) -> Tensor:
    """Histogram overlap with expected colour counts over the target's cells."""
    probabilities = _probabilities(logits).movedim(-1, 0)
    expected = weighted_cell_mean(probabilities, target).movedim(0, -1)
    return torch.minimum(expected, _histogram(target)).sum(dim=-1)


def soft_reversibility(
    backward_logits: Tensor, inp: Tensor, copied: Tensor | None = None
) -> Tensor:
    """Mean probability that the backward model gives the input's colours, `backward_logits` (batch,
    rows, cols, colours); with `copied` as in `reversibility`.
    """
    recovered = soft_accuracy(backward_logits, inp)
    return recovered if copied is None else beyond_copying(recovered, copied)


def hard_scores(
    prediction: Tensor,
    target: Tensor,
    *,
    size: Tensor,
    target_size: Tensor,
    reconstruction: Tensor | None = None,
    inp: Tensor | None = None,
    copied: Tensor | None = None,
) -> Scores:
    """The four scores of one prediction (see the single functions), keyed as in `REWARD_WEIGHTS`.

    Without `reconstruction` and `inp` the reversibility is 0 (before as after: it then earns
    nothing).
    """
    acc = accuracy(prediction, target)
    rev = torch.zeros_like(acc)
    if reconstruction is not None and inp is not None:
        rev = reversibility(reconstruction, inp, copied)
    return {
        "d_acc": acc,
        "d_size": size_score(size, target_size),
        "d_color": colour_agreement(prediction, target),
        "d_rev": rev,
    }


def soft_scores(
    logits: Tensor,
    target: Tensor,
    *,
    size_logits: Tensor | None = None,
    target_size: Tensor | None = None,
    backward_logits: Tensor | None = None,
    inp: Tensor | None = None,
    copied: Tensor | None = None,
) -> Scores:
    """The four differentiable scores, in float32 under autocast too; what is not given scores 0."""
    with torch.autocast(device_type=logits.device.type, enabled=False):
        acc = soft_accuracy(logits, target)
        size = rev = torch.zeros_like(acc)
        if size_logits is not None and target_size is not None:
            size = soft_size_score(size_logits, target_size)
        if backward_logits is not None and inp is not None:
            rev = soft_reversibility(backward_logits, inp, copied)
        return {
            "d_acc": acc,
            "d_size": size,
            "d_color": soft_colour_agreement(logits, target),
            "d_rev": rev,
        }


def shaped_reward(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    weights: Mapping[str, float] = REWARD_WEIGHTS,
) -> tuple[Tensor, Scores]:
    """Reward (batch,) = sum of weight * (after - before), and the plain differences by name."""
    breakdown = {name: after[name] - before[name] for name in weights}
    reward = torch.stack([weight * breakdown[name] for name, weight in weights.items()]).sum(dim=0)
    return reward, breakdown


def _probabilities(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=-1)


def _side_score(side: Tensor, target_side: Tensor) -> Tensor:
    larger = torch.maximum(side, target_side).clamp(min=1.0)
    return 1.0 - (side - target_side).abs() / larger


def _histogram(grids: Tensor) -> Tensor:
    """Shares of the colours, float32 (batch, colours); all 0 for a grid without cells."""
    colours = torch.arange(COLOURS, device=grids.device)
    counts = (grids.flatten(1)[..., None] == colours).sum(dim=1).float()
    return counts / valid_cells(grids).flatten(1).sum(dim=1).clamp(min=1).float()[:, None]
