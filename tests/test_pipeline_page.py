"""docs/PIPELINE.md: every shape in its tables is that of a real pass over one task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Proposer

import arc_system
import dataset_arc
from arc_system import SystemConfig, build_system
from batches import TrainingStream
from loss_function import EFELoss

PAGE = Path(__file__).resolve().parents[1] / "docs" / "PIPELINE.md"
TASK = "be94b721"
ROW = re.compile(r"^\| `(?P<name>[\w.]+)` \| \((?P<shape>[\d, ]*)\) \|", re.MULTILINE)


def walked() -> dict[str, tuple[int, ...]]:
    """The shapes of one task's pass through the system of the defaults on a CPU, by name."""
    tasks = dataset_arc.load_tasks("arcagi2").train
    (task,) = [task for task in tasks if task.task_id == TASK]
    stream = TrainingStream((task,), seed=0, batch_size=8, max_context=4)
    stream.proposals = Proposer()  # type: ignore[assignment]
    batch, targets = next(iter(stream.epoch(0)))
    config = SystemConfig(n_tasks=1, qwen_model="tiny", seed=0)
    system = build_system(config, "cpu", offline=True)
    draws = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {f"batch.{n}": v for n, v in vars(batch).items()}
    found |= {f"targets.{n}": v for n, v in vars(targets).items()}
    with torch.no_grad():
        reading = system.read(batch, torch.ones(batch.n_queries, dtype=torch.bool))
        passed = system.answer_twice(reading, draws)
        backward = system.backward_both(reading, passed)
        earned = system.reward(reading, passed, targets, backward)
        state = system.policy_rl.state(
            reading.prompt.summary, arc_system.answer_stats(passed.before)
        )
    assert passed.refinement is not None
    named = {
        "prompt": reading.prompt, "reading": reading, "before": passed.before,
        "after": passed.after, "refinement": passed.refinement, "earned": earned,
        "choice": passed.refinement.choice,
    }  # fmt: skip
    for part, thing in named.items():
        found |= {f"{part}.{name}": value for name, value in vars(thing).items()}
    found |= {"policy.state": state, "backward_before": backward[0]}
    return {n: tuple(v.shape) for n, v in found.items() if isinstance(v, torch.Tensor)}


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    return walked()


def test_the_shapes_of_the_walk_are_those_of_the_pass(shapes: dict[str, tuple[int, ...]]) -> None:
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert len(rows) >= 25
    said = {name: tuple(int(n) for n in shape.split(",") if n.strip()) for name, shape in rows}
    assert said == {name: shapes.get(name) for name in said}


def test_the_walk_tells_of_every_part_of_the_loss() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert EFELoss.__name__ in page
    assert f"`{TASK}`" in page
