"""What a run is and how it is saved: its folder, what a checkpoint holds, and what comes back."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from conftest import MODULES, make_tasks

import trainloop_complete_with_fixes as trainloop
from curriculum import Schedule
from run_state import SUMS, Progress, restore, save
from trained_model import NEEDED, Description

# ---------------------------------------------------------------- the run directory


def test_the_run_directory_has_the_files_of_the_contract(reference: Any) -> None:
    folder = reference.folder
    assert re.fullmatch(r"arc_complete_\d{8}_\d{6}(_\d+)?", folder.name)
    for name in (
        "best_model.pt", "best_metadata.json", "checkpoint_metadata.json", "training_state.json",
        "training.log", "metrics.jsonl", "config.json", "results.json",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    assert list((folder / "checkpoints").glob("checkpoint_0000*.pt"))


def test_config_json(reference: Any) -> None:
    config = json.loads((reference.folder / "config.json").read_text())
    assert config["arguments"]["seed"] == 0
    assert config["arguments"]["device"] == "cpu"
    assert config["versions"]["torch"] == torch.__version__
    assert len(config["data"]["sha256"]) == 64
    assert config["task_ids"] == sorted(make_tasks())
    assert "commit" in config


def test_checkpoints_load_safely_and_hold_everything(reference: Any) -> None:
    file = reference.checkpoint()  # weights_only=True
    for name in (*MODULES, "optimizer", "epoch", "batch", "metrics", "timestamp", "extra"):
        assert name in file, name
    for name in (
        "scaler", "schedule", "policy_optimizer", "curriculum", "threshold", "average", "rng",
        "progress", "config",
    ):  # fmt: skip
        assert name in file["extra"], name
    assert {"keys", "owners", "scores", "counters"} <= set(file["solver2"])


def test_best_model_has_the_best_epoch(reference: Any) -> None:
    best = json.loads((reference.folder / "best_metadata.json").read_text())
    top = max(reference.rows("epoch"), key=lambda row: row["accuracy_delta"])
    assert reference.run.progress.best == top["accuracy_delta"]
    assert (best["metric_name"], best["value"]) == ("accuracy_delta", top["accuracy_delta"])
    file = torch.load(reference.folder / "best_model.pt", weights_only=True, map_location="cpu")
    for saved in (best, file):
        assert saved["epoch"] == top["epoch"]
        assert saved["metrics"]["accuracy_delta"] == top["accuracy_delta"]
        assert saved["metrics"]["loss"] == top["loss"]


def test_old_checkpoints_go_and_ids_are_not_used_again(train: Any) -> None:
    outcome = train("--save_every", 1, "--max_checkpoints", 2, "--max_batches", 4)
    names = sorted(p.name for p in (outcome.folder / "checkpoints").glob("*.pt"))
    assert len(names) == 2
    assert names[-1] >= "checkpoint_00002.pt"


# ---------------------------------------------------------------- what is saved is what comes back


def test_the_names_that_save_writes_are_the_names_that_restore_reads(fresh_run: Any) -> None:
    run, batch, targets = fresh_run()
    trainloop.train_step(run, batch, targets)
    written = {}

    class Persistence:
        def save_checkpoint(self, *modules: Any, extra: Any, **rest: Any) -> None:
            written.update(extra)

    class Reading(dict):
        read: set[str] = set()  # noqa: RUF012

        def __getitem__(self, name: Any) -> Any:
            self.read.add(name)
            return super().__getitem__(name)

    persistence: Any = Persistence()
    save(run, persistence)
    extra = Reading(written)
    restore(run, {"extra": extra})
    # The rest is for `resume` (config) and for other programs (what the model is).
    identity = set(Description.__annotations__)
    assert set(NEEDED) <= set(written)
    assert set(written) - extra.read == {"config", "flags", "in_use", "health"} | identity
    assert set(run.state()) | {"qwen_cache", "rng"} == extra.read


def test_every_field_of_the_loop_s_state_survives_a_round_trip() -> None:
    progress = Progress()
    for number, name in enumerate(progress.__dataclass_fields__):
        value = getattr(progress, name)
        changed = dict.fromkeys(value, 0.5) if isinstance(value, dict) else type(value)(number + 2)
        setattr(progress, name, changed)
    other = Progress()
    other.load_state_dict(progress.state_dict())
    assert other == progress
    schedule = Schedule("wsd", 5, 10, 20)
    again = Schedule("wsd", 5)
    again.load_state_dict(schedule.state_dict())
    assert again == schedule


def test_an_epoch_s_means_are_of_its_finite_batches_and_begin_anew() -> None:
    progress = Progress(epoch=3, batch=7, memory_updates=2)
    for value in (1.0, 3.0):
        progress.add(dict.fromkeys(SUMS, value))
    progress.add(dict.fromkeys(SUMS, 5.0) | {"loss": float("nan")})
    assert progress.means() == dict.fromkeys(SUMS, 2.0)
    progress.next_epoch()
    assert progress == Progress(epoch=4)
    assert progress.means() == dict.fromkeys(SUMS, 0.0)
