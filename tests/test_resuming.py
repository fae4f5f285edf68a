"""The real script stopped and resumed: bit for bit the run that was never stopped, or refused."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    CHOICE_FIGURES,
    SCRIPT,
    assert_same_end,
    environment,
    full_state,
    make_tasks,
    one_line_error,
    write_tasks,
)

import run_scores
import trainloop_complete_with_fixes as trainloop


def losses_of(folder: Any) -> Any:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["epoch"], r["batch"], r["loss"]) for r in rows if r["kind"] == "batch"]


def stop_in(target: Any, name: Any, nth: Any, number: Any = signal.SIGINT) -> Any:
    """A context in which the nth call of target.name ends with a signal to this process."""
    real = getattr(target, name)
    calls = []

    def wrapped(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        calls.append(1)
        if len(calls) == nth:
            signal.raise_signal(number)
        return result

    return pytest.MonkeyPatch.context(), wrapped


def test_resume_after_a_normal_end_is_bit_identical_in_the_same_directory(
    train: Any, reference: Any
) -> None:
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


@pytest.mark.parametrize(
    ("place", "nth"),
    [("train_step", 3), ("train_step", 0), ("evaluate", 2)],
    ids=["within the first epoch", "at the last batch of it", "in its validation"],
)
def test_ctrl_c_then_resume_is_bit_identical(
    train: Any, reference: Any, place: Any, nth: Any
) -> None:
    module = run_scores if place == "evaluate" else trainloop
    context, wrapped = stop_in(module, place, nth or reference.run.stream.n_batches(0))
    with context as patch:
        patch.setattr(module, place, wrapped)
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


def test_the_printed_command_is_enough_to_go_on_whatever_the_flags_were(train: Any) -> None:
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


def test_a_resume_is_bit_identical_with_hypotheses_and_any_number_of_processes(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: training that depends on which hypotheses are ready; the choice's optimizer not
    saved."""
    flags = ("--epochs", 1, "--hypotheses", "on")
    monkeypatch.setattr(trainloop, "cores", lambda: 2)
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
    assert len(resumed.run.fitter._children) == 4
    assert "Resume: EXACT" in resumed.out
    assert "choice_optimizer" in full_state(whole)
    assert_same_end(resumed, whole)
    results = [
        json.loads((o.folder / "results.json").read_text()) | {"minutes": 0, "trained_minutes": 0}
        for o in (whole, resumed)
    ]
    assert results[0] == results[1]


def test_ctrl_c_between_two_steps_of_gradient_accumulation(train: Any) -> None:
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


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_to_the_process_saves_and_the_run_goes_on_bit_for_bit(
    train: Any, reference: Any, number: Any, code: Any
) -> None:
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


def test_a_run_folder_that_is_gone_comes_back_from_drive(
    train: Any, reference: Any, tmp_path: Path
) -> None:
    drive = ("--drive_backup", tmp_path / "drive")
    first = train("--epochs", 1, *drive)
    assert first.code == 0
    shutil.rmtree(first.folder.parent)
    second = train("--resume", "--epochs", 2, *drive)
    assert second.code == 0, second.err
    assert second.folder.name == first.folder.name
    assert "Resume: EXACT" in second.out
    assert_same_end(second, reference)


# ---------------------------------------------------------------- refused, or nothing to resume


def test_a_changed_seed_is_refused_with_the_list_and_can_be_insisted_on(train: Any) -> None:
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


def test_changed_data_is_refused(train: Any) -> None:
    train("--max_batches", 1)
    other = write_tasks(train.folder / "other.json", make_tasks(seed=5))
    line = one_line_error(train("--resume", "--max_batches", 1, data=other), 3)
    assert "--data: saved " in line


def test_resume_with_nothing_to_resume(train: Any) -> None:
    assert "nothing to resume in" in one_line_error(train("--resume"), 3)
    assert "nothing to resume in" in one_line_error(train("--resume", train.folder / "no"), 3)
    assert not (train.folder / "runs").exists()


def test_resume_auto_starts_fresh_and_says_so_then_goes_on(train: Any) -> None:
    first = train("--resume", "auto", "--max_batches", 1)
    assert first.code == 0
    assert "NOTHING TO RESUME" in first.out
    second = train("--resume", "auto", "--max_batches", 1, "--epochs", 2)
    assert second.folder == first.folder
    assert second.run.progress.epoch == 2
    assert "NOTHING TO RESUME" not in second.out


def test_resuming_a_finished_run_trains_nothing_more(train: Any) -> None:
    first = train("--max_batches", 1)
    again = train("--resume", "--max_batches", 1)
    assert again.code == 0, again.err
    assert again.figures() == first.figures()
