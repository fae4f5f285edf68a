"""Small schedules and monitors beside the losses: learning rate, size warmup, memory threshold,
gradient norms.

They hold a few floats each, never a tensor or a model, and every one has state_dict /
load_state_dict so that a resumed run continues with the same figures. They print and log nothing.
Import: ``from curriculum import DynamicMemoryThreshold, GradientMonitor, Schedule``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Schedule:
    """Learning rate factor by batch: linear warmup, stable, linear decay to 0 (wsd) or constant.

    With a time budget the decay's start and length in batches are fixed once, when the clock says
    so; `stop_at` is where it reaches 0 and training ends, unless time is up at batch `end_at`. The
    three reproduce the run bit for bit on a CPU.
    """

    kind: str
    warmup: int
    decay_start: int | None = None
    stop_at: int | None = None
    end_at: int | None = None

    def factor(self, batch: int) -> float:
        rise = min(1.0, (batch + 1) / self.warmup) if self.warmup else 1.0
        if self.kind == "constant" or self.decay_start is None or self.stop_at is None:
            return rise
        length = max(1, self.stop_at - self.decay_start)
        return rise * min(1.0, max(0.0, (self.stop_at - batch) / length))

    def state_dict(self) -> dict[str, Any]:
        return {"decay_start": self.decay_start, "stop_at": self.stop_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.decay_start, self.stop_at = state["decay_start"], state["stop_at"]


class SizeWarmupCurriculum:
    """Weight of the size loss: `start` at epoch 0, falling in a line to `end` at `warmup_epochs`,
    then constant.

    With the defaults 1.000, 0.833, 0.667, then 0.500: first learn how large the answer is.
    """

    def __init__(self, warmup_epochs: int = 3, start: float = 1.0, end: float = 0.5) -> None:
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be 0 or more, got {warmup_epochs}")
        self.warmup_epochs = warmup_epochs
        self.start = start
        self.end = end

    def get_size_loss_weight(self, epoch: float) -> float:
        """Weight at `epoch` (epochs done so far, may be fractional; below 0 counts as 0)."""
        if epoch >= self.warmup_epochs:
            return self.end
        return self.start - (self.start - self.end) * max(epoch, 0.0) / self.warmup_epochs

    def state_dict(self) -> dict[str, Any]:
        return {"warmup_epochs": self.warmup_epochs, "start": self.start, "end": self.end}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.warmup_epochs = int(state["warmup_epochs"])
        self.start = float(state["start"])
        self.end = float(state["end"])


class DynamicMemoryThreshold:
    """Accuracy above which a solution is worth storing: a running average of accuracies x `margin`.

    It follows the model: early solutions get in, later ones have to be better than what is usual by
    then. The trainer feeds it the mean of each epoch: single batches differ so much that an average
    over them wanders (measured: .49 to .91 within one run) where it should rise.
    """

    # A running average above 0.91 would ask for more than 100%: a perfect answer must always be
    # storable.
    CEILING = 0.999

    def __init__(
        self, initial_threshold: float = 0.2, ema_alpha: float = 0.1, margin: float = 1.10
    ) -> None:
        if not 0.0 < ema_alpha <= 1.0:
            raise ValueError(f"ema_alpha must be in (0, 1], got {ema_alpha}")
        self.ema_accuracy = initial_threshold
        self.ema_alpha = ema_alpha
        self.margin = margin
        self.n_updates = 0
        self.n_skipped = 0

    def update(self, current_accuracy: float) -> float:
        """Take in one accuracy in [0, 1]; returns the new threshold. A non-finite one is counted,
        not used.
        """
        accuracy = float(current_accuracy)
        if math.isfinite(accuracy):
            self.ema_accuracy = (
                1.0 - self.ema_alpha
            ) * self.ema_accuracy + self.ema_alpha * accuracy
            self.n_updates += 1
        else:
            self.n_skipped += 1
        return self.get_threshold()

    def get_threshold(self) -> float:
        """Running average x 1.10, at most 0.999. Store when the accuracy is above it."""
        return min(self.ema_accuracy * self.margin, self.CEILING)

    def state_dict(self) -> dict[str, Any]:
        return {
            "ema_accuracy": self.ema_accuracy,
            "ema_alpha": self.ema_alpha,
            "margin": self.margin,
            "n_updates": self.n_updates,
            "n_skipped": self.n_skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ema_accuracy = float(state["ema_accuracy"])
        self.ema_alpha = float(state["ema_alpha"])
        self.margin = float(state["margin"])
        self.n_updates = int(state["n_updates"])
        self.n_skipped = int(state["n_skipped"])


class GradientMonitor:
    """Gradient norms of modules. Its state is the sum and the number of the finite ones, by
    name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def check_gradients(self, module: nn.Module, name: str) -> dict[str, float]:
        """L2 `norm` over all gradients, largest absolute entry `max`, and how many parameters have
        one.

        Call it after backward (and after unscaling). Keys: norm, max, n_params (trainable tensors),
        n_with_grad, n_nonzero (with any non-zero entry), finite (1.0 or 0.0). Waits for the device
        once. A non-finite norm is reported but does not enter the sum of `name`.
        """
        trainable = [p for p in module.parameters() if p.requires_grad]
        gradients = [p.grad.detach() for p in trainable if p.grad is not None]
        info = {
            "norm": 0.0,
            "max": 0.0,
            "n_params": float(len(trainable)),
            "n_with_grad": float(len(gradients)),
            "n_nonzero": 0.0,
            "finite": 1.0,
        }
        if gradients:
            device = gradients[0].device
            peaks = torch.stack([_peak(g).to(device) for g in gradients])
            norm = gradient_norm(trainable, device)
            figures = torch.stack([norm, peaks.max(), (peaks > 0).sum().float()])
            info["norm"], info["max"], info["n_nonzero"] = figures.tolist()
            info["finite"] = float(math.isfinite(info["norm"]))
        if info["finite"]:
            self._sums[name] = self._sums.get(name, 0.0) + info["norm"]
            self._counts[name] = self._counts.get(name, 0) + 1
        return info

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {str(name): float(value) for name, value in state["sums"].items()}
        self._counts = {str(name): int(value) for name, value in state["counts"].items()}


def gradient_norm(parameters: Iterable[nn.Parameter], device: torch.device | str) -> torch.Tensor:
    """L2 norm over the gradients of `parameters`, 0-dim float32 on `device`; 0 where none has one.

    Does not wait for the device.
    """
    norms = [
        torch.linalg.vector_norm(p.grad.detach(), dtype=torch.float32).to(device)
        for p in parameters
        if p.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)


def _peak(gradient: torch.Tensor) -> torch.Tensor:
    return (
        gradient.abs().max().float()
        if gradient.numel()
        else gradient.new_zeros((), dtype=torch.float32)
    )
