"""Half precision: in bfloat16 and float16 every part learns what it learns in float32.

Under the autocast of a pretended GPU, whose list of operations in float32 is CUDA's
(`pretend_device.py`). The bounds are about twice the largest difference measured over nine batches
of three systems (docs/GPU.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Proposer, Script, make_tasks, stir, write_tasks
from pretend_device import Pretended

import trainloop_complete_with_fixes as trainloop

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLAGS = ("--dry_run", "--device", "cuda", "--qwen_model", "tiny", "--blocks", 1)
LARGEST_ERROR = {"bf16": 0.02, "fp16": 0.0025}  # of a figure, relative to itself or to 0.1
LEAST_COSINE = {"bf16": 0.998, "fp16": 0.9995}  # of a part's gradient with that in float32
LARGEST_NORM_ERROR = {"bf16": 0.07, "fp16": 0.02}  # of its length; not of single numbers
COMPARED = (
    *("loss", "efe", *(f"efe_{part}" for part in trainloop.EFE_PARTS), "soft_reward", "change"),
    *("mask_ratio", "accuracy", "size", "agent_grad", "qwen_grad", "memory_grad"),
    *("refinement_grad", "qwen_heads_grad", "proposal_loss", "proposal_sure_loss"),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Figures and gradients, by module and part, of one step in a precision."""
    folder = tmp_path_factory.mktemp("half")
    script = Script(folder, write_tasks(Path(folder) / "training.json", make_tasks()))

    proposer = Proposer()

    @lru_cache
    def measure(precision: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        with Pretended():
            run = script(*FLAGS, "--amp", "off", "--clip", 1e9).run
            stir(run.system)
            run.dtype = HALF.get(precision)
            run.stream.proposals = proposer
            bank = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).to("cuda")
            row = torch.arange(6, device="cuda")
            run.system.solver2.store(bank, row, torch.ones_like(bank[:, 0]), row >= 0)
            run.optimizer.zero_grad = lambda set_to_none=True: None
            run.optimizer.step = lambda: None
            batch, targets = (part.to("cuda") for part in run.stream.batch(0, 0))
            figures = trainloop.train_step(run, batch, targets)
            gradients: dict[str, list[torch.Tensor]] = {}
            for module, part in run.system.modules().items():
                for name, p in part.named_parameters():
                    if p.grad is not None:
                        assert p.grad.dtype == torch.float32
                        place = f"{module}.{name.split('.')[0]}"
                        gradients.setdefault(place, []).append(p.grad.flatten().cpu())
            return figures, {place: torch.cat(some) for place, some in gradients.items()}

    return measure


@pytest.mark.parametrize("half", HALF)
def test_figures_are_those_of_float32(half: str, measured: Callable[[str], Any]) -> None:
    (wanted, _), (found, _) = measured("fp32"), measured(half)
    assert all(np.isfinite(value) for value in found.values())
    errors = {k: abs(found[k] - wanted[k]) / max(abs(wanted[k]), 0.1) for k in COMPARED}
    assert max(errors.values()) < LARGEST_ERROR[half], errors
    assert found["loss"] != wanted["loss"]  # else nothing was in half precision


@pytest.mark.parametrize("half", HALF)
def test_every_part_gets_the_gradient_of_float32(half: str, measured: Callable[[str], Any]) -> None:
    (_, wanted), (_, found) = measured("fp32"), measured(half)
    assert wanted.keys() == found.keys()
    assert len(wanted) >= 30
    for place, mine in found.items():
        assert torch.isfinite(mine).all(), place
        true = wanted[place]
        if len(true) == 1 or not true.any():  # a sum in which much cancels
            continue
        length, true_length = mine.norm(), true.norm()
        assert float(mine @ true / (length * true_length)) > LEAST_COSINE[half], place
        assert abs(float(length / true_length) - 1.0) < LARGEST_NORM_ERROR[half], place


def test_gradients_too_large_for_float16_move_nothing_and_the_scale_falls(train: Script) -> None:
    """What GradScaler is for: at 65536 squared some overflow; at a fitting scale all is learnt."""
    with Pretended():
        run = train(*FLAGS, "--amp", "fp16").run
        stir(run.system)
        assert run.scaler.is_enabled()
        assert run.dtype == torch.float16
        batch, targets = (part.to("cuda") for part in run.stream.batch(0, 0))
        before = [p.detach().clone() for p in run.system.agent.parameters()]
        for scale, moved in ((2.0**32, False), (2.0**10, True)):
            run.scaler.scale(torch.zeros((), device="cuda"))  # it makes its scale on first use
            run.scaler.update(scale)
            figures = trainloop.train_step(run, batch, targets)
            now = list(run.system.agent.parameters())
            assert any(not torch.equal(a, b) for a, b in zip(now, before, strict=True)) == moved
            assert run.scaler.get_scale() == (scale if moved else scale / 2)
            assert np.isfinite(figures["loss"])
        assert (run.progress.skipped, run.progress.skipped_in_a_row) == (1, 0)
        assert all(torch.isfinite(p).all() for p in now)
