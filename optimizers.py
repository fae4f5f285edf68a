"""One optimizer object for the whole model: Muon for hidden matrices, AdamW for the rest.

A single `torch.optim.Optimizer`, so that GradScaler, checkpoints and schedules see one thing.
Groups with `muon=True` hold 2D weights; those with `eight_bit=True` keep AdamW's two moments in
eight bits each, by the package bitsandbytes. `from optimizers import MuonAdamW`.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from command_line import EXIT_MISSING, UserError

# Quintic Newton-Schulz coefficients of Muon (Jordan et al., 2024), as in torch.optim.Muon.
NS_A, NS_B, NS_C = 3.4445, -4.7750, 2.0315


# Moments in eight bits: of weights with this many numbers or more, each block of them scaled by its
# largest (bitsandbytes fixes the size of a block).
EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256
EIGHT_BIT_STATE = ("exp_avg_8", "exp_avg_sq_8")


def eight_bit_functions() -> Any:
    """bitsandbytes' functions. Raises UserError where the package cannot be had."""
    try:
        return importlib.import_module("bitsandbytes.functional")
    except Exception as error:  # it loads libraries of its own, and fails in many ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"
        why = "is not installed" if missing else f"fails ({' '.join(str(error).split())[:160]})"
        raise UserError(
            f"--optimizer adamw8bit needs the package bitsandbytes, which {why}. Run: "
            "pip install bitsandbytes, or use --optimizer muon.",
            EXIT_MISSING,
        ) from error


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of (n, rows, cols) matrices towards 1 by Newton-Schulz."""
    x = matrix.to(torch.bfloat16) if matrix.is_cuda else matrix
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        inner = torch.baddbmm(gram, gram, gram, beta=NS_B, alpha=NS_C)
        x = torch.baddbmm(x, inner, x, beta=NS_A)
    return (x.mT if tall else x).to(matrix.dtype)


def _plain_memory(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()


class MuonAdamW(torch.optim.Optimizer):
    """Muon where a group says `muon=True`, else AdamW, `eight_bit=True` with small moments.

    Muon's step is `lr * 0.2 * sqrt(max(rows, cols))` times the orthogonalised Nesterov momentum,
    which matches AdamW's RMS step, so one learning rate fits both (Liu et al., 2025). Matrices of
    one shape are orthogonalised together. Weight decay is decoupled in both.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "muon": False,
        }
        super().__init__(params, defaults)
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. `closure` is accepted for the interface and must be None."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["muon"]:
                self._muon(group, params)
                continue
            small = params
            if group.get("eight_bit"):
                small = [p for p in params if p.numel() < EIGHT_BIT_FROM]
                self._adamw_eight_bit(group, [p for p in params if p.numel() >= EIGHT_BIT_FROM])
            if small:
                self._adamw(group, small)

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        for shape, same in by_shape.items():
            grads = [p.grad for p in same if p.grad is not None]
            moments = []
            for p in same:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                moments.append(state["momentum"])
            torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
            update = torch._foreach_lerp(grads, moments, group["momentum"])
            directions = orthogonalise(torch.stack(list(update)))
            step = group["lr"] * 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, list(directions.unbind(0)), alpha=-step)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params if p.grad is not None]
        first: list[Tensor] = []
        second: list[Tensor] = []
        steps: list[Tensor] = []
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
            first.append(state["exp_avg"])
            second.append(state["exp_avg_sq"])
            steps.append(state["step"])  # kept on the CPU: no sync
        if all(_plain_memory(x) for x in (*params, *grads)):
            # The same in one pass over memory, a fifth of the time. It asks for no strides, and
            # elsewhere than on a CPU for step counts on the device.
            torch._fused_adamw_(
                params, grads, first, second, [], steps,
                lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        denominators = torch._foreach_sqrt(second)
        counts = [float(step) for step in steps]
        corrections = [(1 - beta2**t) ** 0.5 for t in counts]
        torch._foreach_div_(denominators, corrections)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        scale = [-group["lr"] / (1 - beta1**t) for t in counts]
        torch._foreach_addcdiv_(params, first, denominators, scale)

    def _adamw_eight_bit(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """As `_adamw`, but for the rounding of the moments; no copies of all of a group."""
        functions = eight_bit_functions()
        beta1, beta2 = group["betas"]
        for p in params:
            if p.device not in self._maps:
                maps = (functions.create_dynamic_map(signed=signed) for signed in (True, False))
                first, second = (m.to(p.device) for m in maps)
                self._maps[p.device] = first, second
            state = self.state[p]
            if not state:
                n_blocks = -(-p.numel() // EIGHT_BIT_BLOCK)
                state["step"] = torch.zeros(())
                for name in EIGHT_BIT_STATE:
                    state[name] = torch.zeros_like(p, dtype=torch.uint8)
                    state[f"{name}_scale"] = torch.zeros(n_blocks, device=p.device)
            state["step"] += 1
            first, second = self._maps[p.device]
            one, two = EIGHT_BIT_STATE
            functions.optimizer_update_8bit_blockwise(
                "adam", p.grad, p, state[one], state[two], beta1, beta2, 0.0, 0.0, group["eps"],
                int(state["step"]), group["lr"], first, second, state[f"{one}_scale"],
                state[f"{two}_scale"], weight_decay=group["weight_decay"],
            )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which gives every state the dtype of its weight: moments in eight bits get
        their own again."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in EIGHT_BIT_STATE:
                if name in state:
                    state[name] = state[name].to(torch.uint8)


class WeightAverage:
    """Exponential moving average of weights, used for evaluation; decay 0 switches it off.

    The decay warms up as (1 + n) / (10 + n): a short run is not judged by its first weights.
    """

    def __init__(self, params: Iterable[Tensor], decay: float) -> None:
        self.params = [p for p in params if p.requires_grad]
        self.decay = decay
        self.n_updates = 0
        self.average = [p.detach().clone() for p in self.params] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        if not self.decay:
            return
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the modules hold the averaged weights; afterwards their own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for p, a in zip(self.params, self.average, strict=False):
            kept = p.detach().clone()
            p.copy_(a)
            a.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"n_updates": self.n_updates, "average": list(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the number or the shapes of tensors differ."""
        shapes = [tuple(a.shape) for a in self.average]
        found = [tuple(a.shape) for a in state["average"]]
        if shapes != found:
            raise ValueError(f"averaged weights: {len(found)} tensors do not fit {len(shapes)}")
        self.n_updates = state["n_updates"]
        for a, saved in zip(self.average, state["average"], strict=True):
            a.copy_(saved)
