"""The health monitor: every fault is said, once, and alone; sound runs hear nothing.

Faults are put into real runs of the script: into the model, where steps are really taken, or around
it (disk, Drive, batches, memory), where a step's figures are those of a sound one. The looks back
are shorter than a user's, and there is one after every batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RULES, Outcome, Script, make_task, write_tasks

import health
import persistence.drive
import persistence.saving
import trainloop_complete_with_fixes as trainloop
import watching
from curriculum import SizeWarmupCurriculum

MODEL = ("--max_batches", 13, "--val_pairs", 1, "--planning_steps", 1, "--save_every", 1000)
Prepare = Callable[[Any], None]


@pytest.fixture(autouse=True)
def _short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WINDOW": 8, "SHORT": 6, "NEWEST": 4, "KEPT": 24}.items():
        monkeypatch.setattr(health, name, value)
    monkeypatch.setattr(watching, "LOOK_EVERY", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small tasks, ten rules twice."""
    names = list(RULES)
    tasks = {f"t{i:02d}": make_task(names[i % 10], seed=i, sides=(3, 4)) for i in range(20)}
    return write_tasks(tmp_path_factory.mktemp("health") / "training.json", tasks)


@pytest.fixture
def trained(train: Script, data: Path) -> Callable[..., Outcome]:
    """The script on twenty tasks; its run ended well."""

    def call(*flags: Any, prepare: Prepare | None = None, **where: Any) -> Outcome:
        outcome = train(*flags, prepare=prepare, **{"data": data, **where})
        assert outcome.code == 0, outcome.err
        return outcome

    return call


def names_of(outcome: Outcome) -> list[str]:
    """The findings of a run: rows and lines say the same."""
    rows = outcome.rows("health")
    lines = [line for line in outcome.out.splitlines() if ": Health: " in line]
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        value = float("nan") if row["value"] is None else row["value"]
        assert line == (
            f"{row['level']}: Health: {row['name']} {value:.4g}: {row['message']}. {row['fix']}"
        )
    return [row["name"] for row in rows]


# ---------------------------------------------------------------- faults of the model


def changed_answers(change: Callable[[torch.Tensor], torch.Tensor], which: str) -> Prepare:
    """The agent's logits (steps, Q, H, W, 10) of its first or second answers, changed."""

    def prepare(run: Any) -> None:
        real = run.system.answer

        def answer(reading: Any, refinement: Any = None, **given: Any) -> Any:
            made = real(reading, refinement, **given)
            if which == ("first" if refinement is None else "second") or which == "all":
                made = dataclasses.replace(made, logits=change(made.logits))
            return made

        run.system.answer = answer

    return prepare


def detached(run: Any) -> None:
    real = run.system.qwen.backbone.forward

    def forward(*args: Any, **given: Any) -> Any:
        made = real(*args, **given)
        made.last_hidden_state = made.last_hidden_state.detach()
        return made

    run.system.qwen.backbone.forward = forward


def gradient_times(factor: float, batches: range) -> Prepare:
    def prepare(run: Any) -> None:
        for p in run.system.qwen.backbone.parameters():
            p.register_hook(lambda g: g * (factor if run.progress.total in batches else 1.0))

    return prepare


def deaf(run: Any) -> None:
    """What the policy does is lost on its way to the second answer."""
    real = run.system.answer
    run.system.answer = lambda reading, refinement=None, **given: real(reading, **given)


def one_cell_worse(logits: torch.Tensor) -> torch.Tensor:
    changed = logits.clone()
    changed[..., 0, 0, :] = changed[..., 0, 0, :].roll(1, -1)
    return changed


def settled(run: Any) -> None:
    with torch.no_grad():
        run.system.policy_rl.rl.std_logit.fill_(-20.0)


def nothing_proposed(run: Any) -> None:
    class Silent:
        def leave_one_out(self, task: Any) -> Any:
            return [None] * len(task.demonstrations)

        def ask(self, tasks: Any) -> None:
            pass

    run.stream.proposals = Silent()


def masked(run: Any) -> None:
    real = run.system.efe_loss.forward

    def forward(**given: Any) -> Any:
        made = real(**given)
        return {**made, "mask_ratio": torch.zeros_like(made["mask_ratio"])}

    run.system.efe_loss.forward = forward


def unretrieved(run: Any) -> None:
    real = run.system.solver2.retrieve

    def retrieve(*given: Any) -> Any:
        found, mask = real(*given)
        return found, torch.zeros_like(mask)

    run.system.solver2.retrieve = retrieve


def set_threshold(run: Any) -> None:
    run.threshold.get_threshold = lambda: 1.0


def set_curriculum(run: Any) -> None:
    run.curriculum = SizeWarmupCurriculum(end=1.0)


def always_three(logits: torch.Tensor) -> torch.Tensor:
    return logits + 30.0 * torch.eye(10)[3]


MODEL_FAULTS: dict[str, tuple[str, Prepare | None, tuple[Any, ...]]] = {
    "the language model is cut off": ("qwen_gradient_zero", detached, ()),
    "its gradient explodes": ("gradient_exploding", gradient_times(1e5, range(8, 99)), ()),
    "its gradient is infinite once": (
        "gradient_exploding", gradient_times(float("inf"), range(9, 10)), (),
    ),
    "the refinement reaches no answer": ("reward_zero", deaf, ()),
    "the refinement harms a little": (
        "reward_negative", changed_answers(one_cell_worse, "second"), (),
    ),
    "the refinement harms a lot": (
        "d_acc_low", changed_answers(lambda x: x.roll(1, -1), "second"), (),
    ),
    "the policy's spread is at its floor": ("policy_spread_low", settled, ()),
    "hypotheses propose nothing": ("no_proposals", nothing_proposed, ()),
    "no cell counts as hard": ("mask_stuck", masked, ()),
    "the size curriculum stands still": (
        "size_weight_stuck", set_curriculum, ("--epochs", 3, "--max_batches", 3),
    ),
    "the memory's threshold is out of reach": ("memory_not_updating", set_threshold, ()),
    "the memory gives nothing back": ("memory_not_retrieved", unretrieved, ()),
    "learning rates are 0": (
        "loss_flat", None,
        ("--agent_lr", 0, "--qwen_lr", 0, "--epochs", 5, "--max_batches", 9, "--batch_size", 30,
         "--augment", "off"),
    ),
    "one colour for every cell": ("same_answers", changed_answers(always_three, "all"), ()),
}  # fmt: skip


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_fault_of_the_model_is_said_and_only_it(fault: str, trained: Any) -> None:
    name, prepare, flags = MODEL_FAULTS[fault]
    assert names_of(trained(*MODEL, *flags, prepare=prepare)) == [name]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda loss, batch: loss * float("nan") if batch == 9 else loss, "loss_not_finite"),
        (lambda loss, batch: loss * 20 if batch >= 9 else loss, "loss_spiking"),
    ],
)
def test_a_bad_loss_is_said_and_only_it(
    change: Any, name: str, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    real = trainloop.combined_loss
    monkeypatch.setattr(
        trainloop, "combined_loss", lambda *given: change(real(*given), runs[0].progress.total)
    )
    outcome = trained(*MODEL, prepare=runs.append)
    assert names_of(outcome) == [name]
    if name == "loss_not_finite":
        (row,) = outcome.rows("health")
        assert (row["batch"], row["value"]) == (9, 1.0)  # at once


# ---------------------------------------------------------------- faults of the machine


@pytest.fixture(scope="module")
def sound_figures(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[dict[str, float]]:
    """What `train_step` returned in a sound run of thirteen batches."""
    script = Script(tmp_path_factory.mktemp("sound"), data)
    place = {"kind", "epoch", "batch", "minutes", "batches_done"}
    rows = script(*MODEL).rows("batch")
    return [{name: value for name, value in row.items() if name not in place} for row in rows]


@pytest.fixture
def quick(
    trained: Any, sound_figures: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Runs whose steps take no time: their figures are a sound run's, over and over."""

    def call(*flags: Any, step: Callable[[], None] | None = None, **where: Any) -> Outcome:
        figures = itertools.cycle(sound_figures)

        def train_step(*given: Any, **more: Any) -> Any:
            if step is not None:
                step()
            return dict(next(figures))

        monkeypatch.setattr(trainloop, "train_step", train_step)
        return trained(*MODEL, *flags, **where)

    return call


def test_a_slow_collator_is_said_and_only_it(quick: Any) -> None:
    def slow(run: Any) -> None:
        real = run.stream.batch

        def batch(*place: Any) -> Any:
            time.sleep(0.1)
            return real(*place)

        run.stream.batch = batch

    outcome = quick(prepare=slow)
    assert names_of(outcome) == ["data_bound"]
    assert outcome.rows("health")[0]["value"] > 0.5


def test_a_leak_is_said_and_only_it(quick: Any) -> None:
    leak: list[bytes] = []

    def step() -> None:
        time.sleep(0.05)  # else the run waits for its batches
        leak.append(b"x" * (24 << 20))

    outcome = quick(step=step)
    leak.clear()
    assert names_of(outcome) == ["memory_creeping"]
    assert 4 < outcome.rows("health")[0]["value"] < 40  # MiB a batch


def a_while() -> None:
    time.sleep(0.05)


def test_a_small_data_set_is_said_and_only_it(quick: Any, tasks_file: Path) -> None:
    outcome = quick(data=tasks_file, step=a_while)
    assert names_of(outcome) == ["few_tasks"]
    assert outcome.rows("health")[0]["value"] == 6


def test_saves_that_come_too_early_are_said_and_only_they(
    quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LOOK_EVERY", 5)
    looked = itertools.count()  # the disk takes its time at first
    real = persistence.saving.CheckpointWriter.busy
    monkeypatch.setattr(
        persistence.saving.CheckpointWriter, "busy", lambda w: next(looked) < 10 or real(w)
    )
    assert names_of(quick("--save_every", 1, step=a_while)) == ["saves_behind"]


def test_a_drive_that_hangs_is_said_and_only_it(
    quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = tmp_path / "drive"
    drive.mkdir()
    monkeypatch.setattr(persistence.drive.DriveBackup, "BEHIND_AFTER_S", 0.2)
    monkeypatch.setattr(persistence.drive.DriveBackup, "_copy", lambda *_: time.sleep(2) or True)
    outcome = quick(
        "--save_every", 4, "--drive_backup", drive, "--drive_wait", 0, step=lambda: time.sleep(0.1)
    )
    assert names_of(outcome) == ["drive_behind"]
    assert outcome.rows("health")[0]["value"] >= 1


def test_a_disk_that_is_nearly_full_is_said_and_only_it(
    quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        fields = list(real(path))
        fields[4] = (100 << 20) // fields[1]
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", statvfs)
    outcome = quick(step=a_while)
    assert names_of(outcome) == ["disk_full_soon"]
    assert outcome.rows("health")[0]["value"] == pytest.approx(100, abs=1)
