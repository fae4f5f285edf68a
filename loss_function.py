"""The EFE loss: what the agent minimises, as named parts and a total.

Takes plain tensors that are already on the target's canvas; never sees batches, models or prompts
as text, and keeps no state but its weights (buffers, so that a checkpoint carries them). All parts
are computed in float32, also under autocast, are means over the batch, and have no loop over cells,
samples or steps.
Import: ``from loss_function import EFELoss, combined_loss``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from grid_accuracy_loss import (
    grid_sizes,
    hard_cell_scale,
    hard_cell_weights,
    mask_ratio,
    pick_colour,
    resize_logits,
    weighted_cell_mean,
)
from grid_parts import COLOURS

EFE_SHARE = 0.7
REWARD_SHARE = 0.3

# Confidence targets stay off 0 and 1, where the Bernoulli divergence is infinite (guess).
CONFIDENCE_MARGIN = 0.02

PARTS = ("risk", "amb", "step", "cons", "bi", "z", "prompt", "size")


class EFELoss(nn.Module):
    """total = lambda_risk * KL(Q_fwd(o_t) || C) + lambda_amb * E[H(P(o_t|s_t))] + lambda_step * T
    + lambda_cons * CE(Q(o_T), target) + lambda_bi * JS(Q_fwd || Q_bwd)
    + lambda_z * KL(sigma(c) || C_hat) + lambda_prompt * (1 - consistency)
    + lambda_size * size_weight * CE(size).

    The default weights keep everything but `cons` and `size` small (guesses, to be measured).

    `smoothing`: label smoothing of the preference C. `easy_weight`: weight of cells that are right.
    `hard_cells=False` takes hard-cell weights and scale out; `extras=False` leaves cross-entropy
    only (`cons` and `size`), the other parts are then 0 without gradient.
    """

    lambda_risk: Tensor
    lambda_amb: Tensor
    lambda_step: Tensor
    lambda_cons: Tensor
    lambda_bi: Tensor
    lambda_z: Tensor
    lambda_prompt: Tensor
    lambda_size: Tensor

    def __init__(
        self,
        lambda_risk: float = 0.3,
        lambda_amb: float = 0.01,
        lambda_step: float = 0.01,
        lambda_cons: float = 1.0,
        lambda_bi: float = 0.1,
        lambda_z: float = 0.05,
        lambda_prompt: float = 0.01,
        lambda_size: float = 1.0,
        *,
        smoothing: float = 0.05,
        easy_weight: float = 1.0,
        hard_cells: bool = True,
        extras: bool = True,
    ) -> None:
        super().__init__()
        if not 0.0 < smoothing < 1.0:
            raise ValueError(
                f"smoothing must be in (0, 1), got {smoothing}: at 0 the preference C has zeros "
                "and KL(Q || C) is infinite"
            )
        weights = (
            lambda_risk,
            lambda_amb,
            lambda_step,
            lambda_cons,
            lambda_bi,
            lambda_z,
            lambda_prompt,
            lambda_size,
        )
        for name, value in zip(PARTS, weights, strict=True):
            self.register_buffer(f"lambda_{name}", torch.tensor(float(value)))
        self.smoothing = smoothing
        self.easy_weight = easy_weight
        self.hard_cells = hard_cells
        self.extras = extras

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        confidence: Tensor | None = None,
        size_right: Tensor | None = None,
        size_logits: Tensor | None = None,
        target_size: Tensor | None = None,
        size_weight: float | Tensor = 1.0,
        backward_logits: Tensor | None = None,
        backward_logits_true: Tensor | None = None,
        inp: Tensor | None = None,
        pair_summary: Tensor | None = None,
        task_ids: Tensor | None = None,
        prompt_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """All parts (unweighted), "total" (weighted) and "mask_ratio" (no gradient) as scalars.

        logits (steps, batch, rows, cols, colours): answers of all steps at target size.
        target (batch, rows, cols), negative outside the grid.
        Also for one pair, `efe_loss(agent(grid), target)`: logits (steps, rows, cols, colours) with
        target (rows, cols). Targets of any number type; logits of another size than the target's
        are resized to it (bilinear). Raises ValueError where the shapes do not belong together.
        The cell weights are those of the last step's argmax, see `hard_cell_weights`.
        confidence (steps, batch): logit per planning step of "this answer is right, stop here".
        size_right (batch,) bool: where False the confidence should be low whatever the cells are.
        size_logits (batch, 2, sides), entry k = side k + 1; target_size (batch, 2).
        size_weight: the curriculum's factor on the size part.
        backward_logits (batch, input rows, input cols, colours): the input that the live backward
        model finds for the predicted output; backward_logits_true: for the true output.
        inp (batch, input rows, input cols): the input that it should find.
        pair_summary (pairs, width) and task_ids (pairs,): pooled prompts of demonstration pairs.
        prompt_weight: a factor on their part, which is a mean over other things than the queries:
        1 unless the batch is part of a larger one.

        Parts whose tensors are not given are 0.
        """
        logits, target = _batched(logits, target)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            logits = logits.float()
            final = logits[-1].detach().argmax(dim=-1)
            ratio = mask_ratio(final, target)
            scale = torch.ones_like(ratio)
            weights: Tensor | None = None
            if self.hard_cells:
                scale = hard_cell_scale(ratio)
                weights = hard_cell_weights(final, target, easy_weight=self.easy_weight)

            log_q = functional.log_softmax(logits, dim=-1)
            log_q_target = pick_colour(log_q, target)
            zero = torch.zeros_like(ratio)
            pairs = dict.fromkeys(PARTS, zero)
            pairs["cons"] = scale * weighted_cell_mean(-log_q_target[-1], target, weights)
            if size_logits is not None and target_size is not None:
                pairs["size"] = size_cross_entropy(size_logits, target_size)
            if self.extras:
                entropy = -(log_q.exp() * log_q).sum(dim=-1)
                pairs["risk"] = _risk(entropy, log_q_target, target, weights, self.smoothing)
                pairs["amb"] = weighted_cell_mean(entropy, target).mean(dim=0)
                if confidence is not None:
                    pairs["step"] = expected_steps(confidence)
                    pairs["z"] = confidence_divergence(
                        confidence, observed_share(logits, target, size_right)
                    )
                if inp is not None:
                    for found in (backward_logits, backward_logits_true):
                        if found is not None:
                            pairs["bi"] = pairs["bi"] + backward_divergence(
                                found, inp, self.smoothing
                            )

            parts = {name: value.mean() for name, value in pairs.items()}
            if self.extras and pair_summary is not None and task_ids is not None:
                parts["prompt"] = prompt_weight * prompt_inconsistency(pair_summary, task_ids)

            lambdas = {name: getattr(self, f"lambda_{name}") for name in PARTS}
            lambdas["size"] = lambdas["size"] * size_weight
            total = torch.stack([lambdas[name] * parts[name] for name in PARTS]).sum()
            return {**parts, "total": total, "mask_ratio": ratio.mean()}


def combined_loss(efe: Tensor, soft_reward: Tensor) -> Tensor:
    """0.7 * efe + 0.3 * (-mean soft reward), 0-dim. The reward carries gradient of its own."""
    return EFE_SHARE * efe + REWARD_SHARE * (-soft_reward.mean())


def _batched(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(steps, batch, rows, cols, colours) and long (batch, rows, cols) of batches or one pair."""
    given = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
    logits = logits.unsqueeze(1) if logits.dim() == 4 else logits
    target = (target.unsqueeze(0) if target.dim() == 2 else target).long()
    if logits.dim() != 5 or target.dim() != 3 or logits.shape[1] != target.shape[0]:
        raise ValueError(
            f"{given} do not belong together: give (steps, batch, rows, cols, {COLOURS}) with "
            f"(batch, rows, cols), or (steps, rows, cols, {COLOURS}) with (rows, cols)"
        )
    canvas = (target.shape[1], target.shape[2])
    if logits.shape[2:4] != target.shape[1:]:
        own = torch.tensor([logits.shape[2:4]] * len(target), device=logits.device)
        logits = resize_logits(logits, own, grid_sizes(target), canvas)
    return logits, target


def _risk(
    entropy: Tensor, log_q_target: Tensor, target: Tensor, weights: Tensor | None, smoothing: float
) -> Tensor:
    """Risk (batch,): KL(Q(o_t) || C) per cell, cell-weighted, averaged over steps, later ones
    heavier.

    Reason: deep supervision; every planning step is pulled towards the preferred outcome C (the
    smoothed target), step t of T with weight t / sum. C has two values, so KL needs only Q's
    entropy and Q(target):
    sum_k Q_k log Q_k - log C_other - Q_target * (log C_target - log C_other).
    """
    log_other = math.log(smoothing / COLOURS)
    log_right = math.log(1.0 - smoothing + smoothing / COLOURS)
    divergence = -entropy - log_other - log_q_target.exp() * (log_right - log_other)
    per_step = weighted_cell_mean(divergence, target, weights)
    step_weights = torch.arange(1, per_step.shape[0] + 1, device=per_step.device).float()
    return (per_step * (step_weights / step_weights.sum())[:, None]).sum(dim=0)


def expected_steps(confidence: Tensor) -> Tensor:
    """Expected share of the planning steps that are taken, (batch,) in [1/T, 1].

    Reason: an answer that is sure early is worth more; the gradient raises early confidence, `z`
    keeps it honest. Step t is reached if no earlier one stopped: sum_t prod_{s<t} (1 - sigma(c_s)),
    over T.
    `confidence` (steps, batch) logits; the last one decides nothing.
    """
    keep_going = functional.logsigmoid(-confidence.float())
    reached = (keep_going.cumsum(dim=0) - keep_going).exp()
    return reached.mean(dim=0)


def observed_share(logits: Tensor, target: Tensor, size_right: Tensor | None = None) -> Tensor:
    """Share of right cells at every step, (steps, batch), without gradient; 0 where the size is
    wrong.
    """
    right = (logits.detach().argmax(dim=-1) == target).float()
    share = weighted_cell_mean(right, target)
    return share if size_right is None else share * size_right.float()


def confidence_divergence(confidence: Tensor, share_right: Tensor) -> Tensor:
    """Bernoulli KL(sigma(c) || C_hat), mean over steps, (batch,), in nats.

    Reason: confidence has to mean something; C_hat is the share of cells that were right at that
    step (constant, clamped to 0.02..0.98). Both arguments (steps, batch).
    """
    c = confidence.float()
    wanted = share_right.detach().clamp(CONFIDENCE_MARGIN, 1.0 - CONFIDENCE_MARGIN)
    p = c.sigmoid()
    divergence = p * (functional.logsigmoid(c) - wanted.log()) + (1.0 - p) * (
        functional.logsigmoid(-c) - (1.0 - wanted).log()
    )
    return divergence.mean(dim=0)


def backward_divergence(backward_logits: Tensor, inp: Tensor, smoothing: float) -> Tensor:
    """Jensen-Shannon divergence between the input and what the backward model makes of the output.

    Reason: an answer from which the input can be recovered has kept the information of the task.
    Q_fwd(o_0) is the smoothed one-hot input, Q_bwd the backward model's distribution; mean over the
    input's cells, (batch,), in [0, log 2]. `bi` is this of the predicted output, whose gradient is
    meant for the agent, plus this of the true output, from which the backward model learns: trained
    on predictions, it learns what wrong answers kept of the input.
    """
    log_q = functional.log_softmax(backward_logits.float(), dim=-1)
    one_hot = functional.one_hot(inp.clamp(min=0).long(), COLOURS).float()
    p = one_hot * (1.0 - smoothing) + smoothing / COLOURS
    log_p = p.log()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    divergence = 0.5 * (p * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(dim=-1)
    return weighted_cell_mean(divergence, inp)


def prompt_inconsistency(pair_summary: Tensor, task_ids: Tensor) -> Tensor:
    """1 - mean cosine between each pair's summary and the others of its task; scalar in [0, 2].

    Reason: demonstrations of one task show one rule; the more alike their prompts, the lower the
    loss.
    Mean over the pairs that have a partner; 0 if none has. Keep its weight small: alone it would
    make all prompts equal. `pair_summary` (pairs, width), `task_ids` (pairs,).
    """
    unit = functional.normalize(pair_summary.float(), dim=-1, eps=1e-6)
    cosine = unit @ unit.T
    alone = torch.eye(len(task_ids), dtype=torch.bool, device=task_ids.device)
    partners = ((task_ids[:, None] == task_ids[None, :]) & ~alone).float()
    n_partners = partners.sum(dim=1)
    inconsistency = 1.0 - (cosine * partners).sum(dim=1) / n_partners.clamp(min=1.0)
    has_partner = (n_partners > 0).float()
    return (inconsistency * has_partner).sum() / has_partner.sum().clamp(min=1.0)


def size_cross_entropy(size_logits: Tensor, target_size: Tensor) -> Tensor:
    """Cross-entropy of the size head, mean over rows and cols, (batch,).

    Reason: the size is predicted, and a wrong one is a wrong answer whatever the cells are.
    `size_logits` (batch, 2, sides) with entry k = side k + 1; `target_size` (batch, 2), clamped to
    1..sides.
    """
    log_p = functional.log_softmax(size_logits.float(), dim=-1)
    index = (target_size.long() - 1).clamp(0, size_logits.shape[-1] - 1)
    return -log_p.gather(-1, index[..., None]).squeeze(-1).mean(dim=-1)
