"""The real script on disks that are full, read-only or damaged, and how its runs end.

A full disk is a tmpfs of its own, filled to the last byte, where this user can mount one; beside
it, and everywhere else, a stand-in that refuses the same operations.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Script

import report
import run_log
import run_record
import run_scores
import trainloop_complete_with_fixes as trainloop
from command_line import EXIT_MEMORY, EXIT_UNSAVED, guarded, memory_message
from persistence import saving
from persistence.files import FileSystem
from run_log import RunLog, read_metrics
from trained_model import known_errors

SMALL = (
    "--max_batches", 3, "--batch_size", 3, "--policy", "off", "--planning_steps", 1,
    "--val_pairs", 1, "--eval_views", 1,
)  # fmt: skip

SHORT = (*SMALL, "--max_batches", 1)


# ---------------------------------------------------------------- disks


class Disk:
    """A tmpfs that can be filled to the last byte and emptied again."""

    prunes = True  # room that is made counts

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def mount(self) -> bool:
        call = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(self.folder)]
        with contextlib.suppress(OSError):
            return subprocess.run(call, capture_output=True).returncode == 0
        return False

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=True)

    def fill(self) -> None:
        with (self.folder / "ballast").open("ab", buffering=0) as file:
            size = 1 << 20
            while size:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2

    def empty(self) -> None:
        (self.folder / "ballast").unlink()


class StandIn(Disk):
    """Refuses to write while it is full, as such a disk would."""

    prunes = False

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
        super().__init__(folder)
        self.full, self.code = False, code
        self.patch(patch, run_log, "append_bytes")
        for name in ("create", "write", "mkdir", "link", "unlink", "replace"):
            self.patch(patch, FileSystem, name)

    def patch(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def refusing(*args: Any) -> Any:
            if self.full:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args)

        patch.setattr(owner, name, refusing)

    def fill(self) -> None:
        self.full = True

    def empty(self) -> None:
        self.full = False


@pytest.fixture
def disk(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """A disk for the script's runs: a tmpfs, or the stand-in where it is asked for,
    or has to do."""
    made = Disk(tmp_path / "disk")
    if getattr(request, "param", "tmpfs") == "stand-in" or not made.mount():
        made.folder.rmdir()
        sys.stderr.write("No tmpfs: operations are refused by a stand-in\n")
        yield StandIn(made.folder, monkeypatch)
        return
    yield made
    made.unmount()


@pytest.fixture
def on_disk(disk: Any, tasks_file: Any) -> Any:
    return Script(disk.folder, tasks_file)


def writer_done() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint-writer":
            thread.join()


@contextlib.contextmanager
def at_steps(actions: Any) -> Iterator[Any]:
    """`actions`: number of a train_step (from 1) -> what happens right after it."""
    real, calls = trainloop.train_step, []

    def step(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        calls.append(1)
        if len(calls) in actions:
            writer_done()
            actions[len(calls)]()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainloop, "train_step", step)
        yield


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def batches_of(folder: Path) -> list[tuple[int, int]]:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "batch"]
    return [(row["epoch"], row["batch"]) for row in rows]


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("disk", ["tmpfs", "stand-in"], indirect=True)
def test_a_full_disk_stops_nothing_and_what_it_cost_is_the_last_line(
    disk: Any, on_disk: Any
) -> None:
    """Breaks: any unguarded write; exit 0 or silence though the last state is not on the disk."""
    flags = (*SMALL, "--epochs", 2, "--save_every", 2, "--max_checkpoints", 1)
    with at_steps({4: disk.fill}):
        full = on_disk(*flags)
    assert full.code == EXIT_UNSAVED == 6, full.err
    assert "Traceback" not in full.err + full.out
    for words in ("[Epoch 1] Val Accuracy", "Final: ", "untrained network", f"Run: {full.folder}"):
        assert words in full.out
    assert "was not saved: [Errno 28]" in full.err
    line = last_line(full.err)
    assert line.startswith("NOT SAVED: the last state is not on the disk (checkpoint ")
    assert "goes on at epoch 1, batch 0: 3 batches are lost" in line
    assert full.err.count("metrics.jsonl was not written") <= 1

    disk.empty()
    resumed = on_disk("--resume", full.folder, *flags)
    assert resumed.code == 0, resumed.err
    assert "Going on at epoch 1, batch 0" in resumed.out
    assert "NOT SAVED" not in resumed.err
    assert batches_of(full.folder) == [(e, b) for e in (0, 1) for b in range(3)]


def test_a_full_disk_that_pruning_makes_room_on_costs_nothing(disk: Any, on_disk: Any) -> None:
    if not disk.prunes:
        pytest.skip("the stand-in knows no sizes")
    flags = (*SMALL, "--epochs", 2, "--save_every", 1)
    with at_steps({4: disk.fill}):
        full = on_disk(*flags)
    assert full.code == 0, full.err
    assert "Disk full: removed" in full.err
    assert "Final: " in full.out
    assert "NOT SAVED" not in full.err
    assert full.checkpoint()["extra"]["progress"]["total"] == 6


def test_failures_to_save_are_on_stderr_with_quiet_and_all_results_on_the_console(
    disk: Any, on_disk: Any
) -> None:
    """Breaks: --quiet hides that nothing was saved."""
    with at_steps({1: disk.fill}):
        full = on_disk(*SMALL, "--quiet", "--save_every", 2)
    assert full.code == 6
    assert full.err.count("failed so far") >= 2
    assert "Nothing of this run is saved: 3 batches are lost" in last_line(full.err)
    assert "untrained network" in full.out  # results.json has to wait for ever
    assert "Traceback" not in full.err


def test_after_sigterm_on_a_full_disk_no_word_is_untrue(disk: Any, on_disk: Any) -> None:
    """Breaks: "everything is saved", or "training goes on", without looking."""
    actions = {4: disk.fill, 5: lambda: signal.raise_signal(signal.SIGTERM)}
    with at_steps(actions):
        full = on_disk(*SMALL, "--epochs", 2, "--max_checkpoints", 1)
    assert full.code == 6
    assert "Stopped by SIGTERM; the last state could not be saved." in full.out
    for words in ("everything is saved", "is saved,", "Training goes on", "tries again"):
        assert words not in full.out + full.err
    line = last_line(full.err)
    assert "goes on at epoch 1, batch 0: 2 batches are lost" in line
    assert f"--resume {full.folder} --device cpu" in line


def test_a_disk_that_is_emptied_again_gets_everything(disk: Any, on_disk: Any) -> None:
    """Breaks: rows, lines or files that a full disk refused are thrown away."""
    flags = (*SMALL, "--epochs", 3, "--save_every", 1, "--max_checkpoints", 1)
    with at_steps({2: disk.fill, 8: disk.empty}):
        full = on_disk(*flags)
    assert full.code == 0, full.err
    assert "was not saved" in full.err
    assert "metrics.jsonl is written again" in full.err
    assert "NOT SAVED" not in full.err
    assert batches_of(full.folder) == [(e, b) for e in range(3) for b in range(3)]
    assert json.loads((full.folder / "results.json").read_text())["batch"] == 9
    logged = (full.folder / "training.log").read_text()
    assert all(line.strip() in logged for line in (full.out + full.err).splitlines())


def test_a_resume_on_a_full_disk_trains_to_its_end(disk: Any, on_disk: Any) -> None:
    first = on_disk(*SMALL, "--max_checkpoints", 1)
    assert first.code == 0, first.err
    disk.fill()
    resumed = on_disk("--resume", first.folder, *SMALL, "--epochs", 2, "--max_checkpoints", 1)
    assert resumed.code == 6, resumed.err
    assert "Traceback" not in resumed.err
    assert "Resume: EXACT" in resumed.out
    assert "[Epoch 1] Val Accuracy" in resumed.out
    assert "epoch 1, batch 0: 3 batches are lost" in last_line(resumed.err)


def test_a_run_that_fails_between_two_saves_says_what_is_lost(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own code stays; only what is not on the disk is called lost."""

    def full() -> None:
        raise MemoryError

    with at_steps({5: full}):
        failed = train(*SMALL, "--epochs", 2)
    assert failed.code == EXIT_MEMORY
    assert "NOT SAVED" in failed.out
    assert "epoch 1, batch 0: 1 batch is lost" in failed.out
    assert last_line(failed.err).startswith("error: out of memory. Use --batch_size 1 --grad_accum")
    with at_steps({1: lambda: torch.empty(1)}):
        assert "NOT SAVED" not in train("--resume", failed.folder).err


def test_a_run_on_a_disk_that_became_read_only_ends_with_its_results(
    tmp_path: Path, tasks_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = StandIn(tmp_path / "disk", monkeypatch, errno.EROFS)
    script = Script(disk.folder, tasks_file)
    with at_steps({1: disk.fill}):
        outcome = script(*SMALL)
    assert outcome.code == 6
    assert "Final: " in outcome.out
    assert "Traceback" not in outcome.err
    assert "training.log was not written: Read-only file system" in outcome.err


def test_a_read_only_run_is_not_resumed_and_the_reason_is_one_line(
    tmp_path: Path, tasks_file: Any
) -> None:
    """Breaks: a traceback from the lock or the log."""
    disk = Disk(tmp_path / "disk")
    if not disk.mount():
        pytest.skip("this user cannot mount a tmpfs")
    try:
        script = Script(disk.folder, tasks_file)
        first = script(*SMALL)
        remount = ["mount", "-o", "remount,ro", str(disk.folder)]
        if subprocess.run(remount, capture_output=True).returncode:
            pytest.skip("this user cannot mount it read-only")
        again = script("--resume", first.folder, "--epochs", 2)
    finally:
        disk.unmount()
    assert again.code == 3
    assert len(again.err.strip().splitlines()) == 1
    assert f"nothing can be saved in {first.folder}: it is read-only" in again.err


def test_a_log_that_cannot_be_written_stops_no_resume(train: Any) -> None:
    first = train(*SMALL)
    for name in ("training.log", "config.json", "results.json"):
        (first.folder / name).unlink()
        (first.folder / name).mkdir()
    again = train("--resume", first.folder, *SMALL, "--epochs", 2)
    assert again.code == 0, again.err
    assert "Traceback" not in again.err
    for name in ("training.log", "config.json", "results.json"):
        assert again.err.count(f"{name} was not written: Is a directory") == 1
    assert "config.json, results.json, training.log" in last_line(again.err)


# ---------------------------------------------------------------- the log itself


class Refusing:
    """Stands in for `append_bytes`: refuses, or does as it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real, self.on = run_log.append_bytes, False
        monkeypatch.setattr(run_log, "append_bytes", self)

    def __call__(self, path: Path, data: bytes) -> None:
        if self.on:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.real(path, data)


def test_what_the_disk_refused_is_written_in_its_order_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = Refusing(monkeypatch)
    log = RunLog(tmp_path, quiet=True)
    for number in range(6):
        refusing.on = 1 <= number < 5
        log.say(f"line {number}")
        log.record({"kind": "batch", "epoch": 0, "batch": number, "loss": float("nan")})
        assert log.flush() == (not refusing.on)
    log.close()
    logged = (tmp_path / "training.log").read_text()
    assert [logged.index(f"line {n}") for n in range(6)] == sorted(
        logged.index(f"line {n}") for n in range(6)
    )
    assert [row["batch"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(6))
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] is None
    said = capsys.readouterr()
    assert said.out == ""
    for name in ("training.log", "metrics.jsonl"):
        assert said.err.count(f"{name} was not written: No space left on device") == 1
        assert said.err.count(f"{name} is written again") == 1


def test_what_waits_in_memory_is_bounded_and_what_is_lost_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = Refusing(monkeypatch)
    monkeypatch.setattr(run_log, "KEPT_BYTES", 1000)
    log = RunLog(tmp_path, quiet=True)
    refusing.on = True
    for number in range(100):
        log.record({"kind": "batch", "epoch": 0, "batch": number})
        log.flush()
    assert log.rows is not None
    assert log.rows.waiting_bytes <= 1000
    refusing.on = False
    assert log.flush()
    kept = [row["batch"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == list(range(100 - len(kept), 100))
    assert f"its oldest {100 - len(kept)} lines" in capsys.readouterr().err


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    run_log.append_bytes(path, b"whole\n")
    real = os.write

    def short(fd: Any, data: Any) -> Any:
        if len(data) <= 4:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, bytes(data[:4]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        with pytest.raises(OSError, match="full"):
            run_log.append_bytes(path, b"another\n")
    assert path.read_bytes() == b"whole\n"


def test_closing_raises_nothing_and_names_what_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = Refusing(monkeypatch)
    log = RunLog(tmp_path, quiet=True)
    refusing.on = True
    log.record({"kind": "batch", "epoch": 0, "batch": 0})
    (tmp_path / "results.json").mkdir()
    assert not log.write_json("results.json", {"n": 1})
    log.close()
    line = last_line(capsys.readouterr().err)
    assert line == f"Not written to {tmp_path}: metrics.jsonl, results.json, training.log."


def test_rows_of_older_versions_are_read_under_today_s_names(tmp_path: Path) -> None:
    """Breaks: curves of a run that an older version began."""
    old = [
        {"kind": "batch", "epoch": 0, "batch": 3, "step": 3, "d_acc": 0.5, "accuracy_delta": 0.5},
        {"kind": "epoch", "epoch": 0, "batch": 4, "step": 4, "accuracy_delta": 0.25},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert read_metrics(path) == [
        {"kind": "batch", "epoch": 0, "batch": 3, "batches_done": 3, "d_acc": 0.5},
        {"kind": "epoch", "epoch": 0, "batch": 4, "batches_done": 4, "accuracy_delta": 0.25},
    ]


def test_a_console_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    log = RunLog(tmp_path, quiet=False)
    log.say("a line")
    log.warn("a warning")
    assert "a line" in (tmp_path / "training.log").read_text()
    assert "a warning" in (tmp_path / "training.log").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_console_on_a_full_disk_leaves_the_exit_code_alone() -> None:
    """Breaks: Python's own flush at the end turns every code into 120."""
    code = "import command_line; print('x'); command_line.leave(6)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    here = Path(trainloop.__file__).parent
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, cwd=here, env=buffered)
    assert done.returncode == 6


# ---------------------------------------------------------------- damage in metrics.jsonl

DAMAGE = {
    "torn": b'{"kind": "batch", "epo',
    "no text": b"\xff\xfe\x80 \x00\n",
    "a number": b"17\n",
    "null": b"null\n",
    "a list": b"[1, 2]\n",
    "nesting": b"[" * 100_000 + b"\n",
    "keys missing": b'{"kind": "batch"}\n',
    "nulls": b'{"kind": "batch", "epoch": null, "batch": null}\n',
    "wrong types": b'{"kind": "batch", "epoch": "0", "batch": [1]}\n'
    b'{"kind": ["batch"], "epoch": 0}\n',
    "zeros": bytes(4096) + b"\n",
    "too long": b"1" * (run_log.LINE_BYTES + 10) + b"\n",
    "no kind": b'{"epoch": 0, "batch": 0}\n',
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_between_rows_costs_the_damaged_lines_alone(
    tmp_path: Path, kind: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks: a reader that trusts what a line holds."""
    row = '{{"kind": "batch", "epoch": 0, "batch": {}, "minutes": 1.0, "loss": 2.0}}\n'
    path = tmp_path / "metrics.jsonl"
    first, second, third = (row.format(n).encode() for n in range(3))
    damage = DAMAGE[kind] + (b"\n" if kind == "torn" else b"")
    path.write_bytes(first + damage + second + third)
    log = RunLog(tmp_path, quiet=True)
    assert log.last_batch() == (0, 2)
    log.rewind(0, 2)
    assert path.read_bytes() == first + second
    number = damage.count(b"\n")
    words = "one damaged line was" if number == 1 else f"{number} damaged lines were"
    assert f"metrics.jsonl: {words} dropped" in capsys.readouterr().err


def test_damage_of_every_kind_at_once_stops_no_resume(train: Any) -> None:
    first = train(*SMALL)
    whole = (first.folder / "metrics.jsonl").read_bytes()
    damage = b"".join(text for name, text in DAMAGE.items() if name != "torn")
    (first.folder / "metrics.jsonl").write_bytes(damage + whole + damage + DAMAGE["torn"])
    record = report.read_record(first.folder)
    if find_spec("matplotlib") is not None:
        assert report.draw_curves(record).startswith(b"\x89PNG")
    assert run_record.summary_rows(record)
    again = train("--resume", first.folder, *SMALL)
    assert again.code == 0, again.err
    assert "Traceback" not in again.err
    assert "Resume: EXACT" in again.out
    assert "damaged lines were dropped" in again.err
    assert (first.folder / "metrics.jsonl").read_bytes() == whole


def test_a_folder_in_the_place_of_metrics_stops_no_resume(train: Any) -> None:
    first = train(*SMALL)
    (first.folder / "metrics.jsonl").unlink()
    (first.folder / "metrics.jsonl").mkdir()
    again = train("--resume", first.folder, *SMALL, "--epochs", 2)
    assert again.code == 0, again.err
    assert again.err.count("metrics.jsonl was not written: it is not a regular file") == 1
    assert read_metrics(first.folder / "metrics.jsonl") == []


def test_rows_wait_until_the_old_ones_after_the_resumed_place_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks: new rows behind old ones of the same batches, or dropped together with them."""
    log = RunLog(tmp_path, quiet=True)
    for number in range(4):
        log.record({"kind": "batch", "epoch": 0, "batch": number, "loss": 0.0})
    log.flush()

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    again = RunLog(tmp_path, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", refuse)
        again.rewind(0, 2)
        again.record({"kind": "batch", "epoch": 0, "batch": 2, "loss": 1.0})
        assert not again.flush()
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    assert again.flush()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["batch"], row["loss"]) for row in rows] == [(0, 0.0), (1, 0.0), (2, 1.0)]
    assert "metrics.jsonl was not written: Read-only" in capsys.readouterr().err


# ---------------------------------------------------------------- the best model


@contextlib.contextmanager
def validations(cells: Any, exact: Any = ()) -> Iterator[Any]:
    """Cell accuracy (and exact grids) of the validation after each epoch;
    0 of the untrained model."""
    real = run_scores.evaluate

    def evaluate(run: Any, *args: Any, title: Any = "Validation", **options: Any) -> Any:
        result = real(run, *args, title=title, **options)
        if title == "Untrained model":
            result["cell_accuracy"] = 0.0
        epoch = run.progress.epoch
        if title != "Untrained model" and epoch < len(cells):  # the last one may be the final vote
            result["cell_accuracy"] = cells[run.progress.epoch]
            if exact:
                result["exact_at_1"] = exact[run.progress.epoch]
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_scores, "evaluate", evaluate)
        yield


def best_of(folder: Path) -> tuple[int, float]:
    """(epoch, cell accuracy) in best_model.pt."""
    found = torch.load(folder / "best_model.pt", weights_only=True)
    return found["epoch"], found["metrics"]["cell_accuracy"]


def failing_links(monkeypatch: pytest.MonkeyPatch, numbers: set[int]) -> None:
    real, calls = FileSystem.link, []

    def link(self, source: Any, target: Any) -> None:
        calls.append(1)
        if len(calls) in numbers:
            raise OSError(errno.EIO, "Input/output error")
        real(self, source, target)

    monkeypatch.setattr(FileSystem, "link", link)


def test_a_best_model_that_could_not_be_saved_is_no_record(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: the record is raised before the file is there, and keeps the next good ones out."""
    failing_links(monkeypatch, {2})
    with validations([0.2, 0.6, 0.4]):
        outcome = train(*SHORT, "--epochs", 3)
    assert outcome.code == 0, outcome.err
    assert "best_model.pt was not updated: [Errno 5]" in outcome.err
    assert best_of(outcome.folder) == (2, 0.4)
    assert outcome.run.progress.best == 0.4


def test_the_last_best_model_is_tried_again_at_the_end_of_the_run(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_links(monkeypatch, {2})
    with validations([0.2, 0.6]):
        outcome = train(*SHORT, "--epochs", 2)
    assert outcome.code == 0, outcome.err
    assert "best_model.pt was not updated" in outcome.err
    assert best_of(outcome.folder) == (1, 0.6)


def test_a_damaged_best_model_is_written_again_though_the_epoch_is_below_the_record(
    train: Any,
) -> None:
    with validations([0.6, 0.2]):
        first = train(*SHORT, "--epochs", 2)
    path = first.folder / "best_model.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    with validations([0.6, 0.2, 0.3]):
        again = train("--resume", first.folder, *SHORT, "--epochs", 3)
    assert again.code == 0, again.err
    assert "best_model.pt is not there, the record of accuracy_delta was +0.6000" in again.out
    assert best_of(first.folder) == (2, 0.3)


def test_a_best_model_that_a_kill_prevented_is_written_by_the_resume(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state as if killed between the checkpoint of an epoch's end and best_model.pt."""
    with validations([0.2, 0.6]):
        first = train(*SHORT, "--epochs", 2)
        (first.folder / "best_model.pt").unlink()
        (first.folder / "best_metadata.json").unlink()
    with validations([0.2, 0.6, 0.1]):
        again = train("--resume", first.folder, *SHORT, "--epochs", 3)
    assert again.code == 0, again.err
    assert best_of(first.folder) == (1, 0.6)
    assert again.run.progress.best == 0.6


def test_values_of_two_metrics_are_never_compared(train: Any) -> None:
    """Breaks: the record of the old metric is the bar for the new one."""
    with validations([0.6, 0.6], exact=[0, 0]):
        first = train(*SHORT, "--epochs", 2, "--best_metric", "cell_accuracy")
    assert best_of(first.folder)[0] == 0
    flags = ("--resume", first.folder, *SHORT, "--epochs", 3, "--best_metric", "val_accuracy")
    with validations([0.6, 0.6, 0.5], exact=[0, 0, 1]):
        again = train(*flags)
    assert again.code == 0, again.err
    assert "best_model.pt was chosen by cell_accuracy; from now on by val_accuracy" in again.out
    assert best_of(first.folder) == (2, 0.5)


# ---------------------------------------------------------------- memory


def ask_torch() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def ask_python() -> None:
    bytearray(1 << 60)


@pytest.mark.parametrize("ask", [ask_torch, ask_python])
def test_memory_of_the_cpu_that_runs_out_exits_4_with_what_to_do(
    train: Any, capsys: pytest.CaptureFixture[str], ask: Any
) -> None:
    with at_steps({1: ask}):
        outcome = train(*SMALL)
    assert outcome.code == EXIT_MEMORY
    assert "Traceback" not in outcome.err
    line = last_line(outcome.err)
    assert line.startswith("error: out of memory")
    assert "Use --batch_size 1 --grad_accum 3 (now 3); --dry_run shows" in line
    assert guarded(ask, "Use a smaller --batch_size.", known_errors) == EXIT_MEMORY
    assert "Use a smaller --batch_size." in capsys.readouterr().err


def test_memory_that_runs_out_in_the_writer_thread_exits_4(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory for the copy")

    monkeypatch.setattr(saving, "write_checkpoint_file", full)
    outcome = train(*SMALL, "--save_every", 1)
    assert outcome.code == EXIT_MEMORY
    assert "out of memory: no memory for the copy. Use" in last_line(outcome.err)


def test_too_little_memory_to_load_a_good_checkpoint_harms_no_file(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: a file whose seal is intact goes to quarantine because memory was short."""
    first = train(*SMALL)
    before = sorted(p.name for p in (first.folder / "checkpoints").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: ask_python())
        short = train("--resume", first.folder)
    assert short.code == EXIT_MEMORY, short.err
    assert sorted(p.name for p in (first.folder / "checkpoints").iterdir()) == before


def test_other_errors_are_no_want_of_memory() -> None:
    for error in (RuntimeError("shape"), OSError(errno.ENOSPC, "full"), ValueError("memory")):
        assert memory_message(error, "Buy more.") is None
    wrapped = RuntimeError("the writer failed")
    wrapped.__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")
    assert memory_message(wrapped, "Buy more.") is not None


# ---------------------------------------------------------------- printed commands


def test_the_printed_command_is_quoted_complete_and_works_from_another_folder(
    tasks_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: unquoted names, relative paths, --threads, --offline,
    --quiet or the backup left out."""
    home = tmp_path / "my work"
    elsewhere = tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "tasks of mine.json").write_bytes(tasks_file.read_bytes())
    monkeypatch.chdir(home)
    script = Script(Path(), Path("tasks of mine.json"))
    flags = (*SMALL, "--offline", "--quiet", "--drive_backup", "my drive")
    with at_steps({2: lambda: signal.raise_signal(signal.SIGTERM)}):
        stopped = script(*flags, runs="my runs")
    assert stopped.code == 143, stopped.err
    assert "everything is saved" in stopped.out
    words = shlex.split(last_line(stopped.out))
    assert words[:3] == ["cd", str(home), "&&"]
    assert words[3:5] == ["python", str(Path(trainloop.__file__).resolve())]
    for flag in ("--offline", "--quiet"):
        assert flag in words
    assert words[words.index("--threads") + 1] == "1"
    assert words[words.index("--drive_backup") + 1] == str(home / "my drive")

    monkeypatch.chdir(elsewhere)
    monkeypatch.chdir(words[1])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert trainloop.main(words[5:]) == 0, err.getvalue()
    assert "Resume: EXACT" in out.getvalue()
    assert not list(elsewhere.iterdir())


def test_with_absolute_paths_the_command_needs_no_folder(train: Any) -> None:
    with at_steps({2: lambda: signal.raise_signal(signal.SIGINT)}):
        stopped = train(*SMALL)
    words = shlex.split(last_line(stopped.out))
    assert words[0] == "python"
    assert words[2:] == ["--resume", str(stopped.folder), "--device", "cpu", "--threads", "1"]


# ---------------------------------------------------------------- one writer


def test_a_second_process_writes_nothing_before_it_holds_the_lock(train: Any) -> None:
    """Breaks: the banner of a refused process in the log of the running one."""
    first = train(*SMALL)

    def contents() -> dict[str, bytes]:
        files = (path for path in first.folder.rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files if path.name != "run.lock"}

    before = contents()
    with (first.folder / "run.lock").open("r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        second = train("--resume", first.folder, *SMALL, "--epochs", 2)
    assert second.code == 3
    assert "is in use by another process" in second.err
    assert contents() == before
