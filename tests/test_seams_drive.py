"""Drive, and which run: the seams between saving, restoring and finding a run,
attacked from outside.

Most tests run the real script on tiny tasks; a folder stands in for the mounted Drive.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, Script, differing

sys.path.insert(0, str(Path(__file__).parent / "faults"))

from harness import FileSystem, Toy, forked, temps

import predict
import report
import resuming
import trainloop_complete_with_fixes as trainloop
from model_persistence import (
    CorruptCheckpointError,
    ModelPersistence,
    PersistenceError,
    setup_drive_backup,
    verify_checkpoint_file,
)
from persistence import drive, from_drive
from persistence.checkpoint_file import seal_of
from persistence.drive import DriveBackup, branch_conflict
from persistence.files import TEMP_NAME, AtomicFile
from persistence.find_run import RESTORING, find_latest_run
from persistence.from_drive import locate_run, restore_run_from_drive

SCRIPT = Path(trainloop.__file__)
SMALL = ("--save_every", 2, "--eval_views", 1)


class Bare(Script):
    """The script with the flags of the call alone, as a user on a new machine gives them."""

    def arguments(self, *flags: Any, **_: Any) -> list[str]:
        return list(map(str, flags))


@pytest.fixture(scope="module")
def saved(tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/RUN, one epoch of it, and its backup in drive/RUN; do not change it."""
    script = Script(tmp_path_factory.mktemp("saved"), tasks_file)
    done = script("--epochs", 1, *SMALL, "--drive_backup", script.folder / "drive")
    assert done.code == 0, done.err
    return script.folder


@pytest.fixture
def here(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of both, and the current folder."""
    for name in ("runs", "drive"):
        shutil.copytree(saved / name, tmp_path / name, symlinks=True)
        change_flags(the_run(tmp_path / name), drive_backup=str(tmp_path / "drive"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bare(here: Path, tasks_file: Path) -> Bare:
    return Bare(here, tasks_file)


def the_run(folder: Path) -> Path:
    (run,) = (p for p in folder.glob("arc_complete_2*") if not p.is_symlink())
    return run


def change_flags(run: Path, **flags: Any) -> None:
    """As if the run had been started with these."""
    config = json.loads((run / "config.json").read_text())
    config["arguments"] |= flags
    (run / "config.json").write_text(json.dumps(config))


def on_a_new_machine(here: Path) -> Path:
    """The runs are gone, and Drive holds a run of two epochs after its first; its folder there."""
    shutil.rmtree(here / "runs")
    change_flags(the_run(here / "drive"), epochs=2)
    return the_run(here / "drive")


def one_line(outcome: Outcome, code: int) -> str:
    """The run ended with this code and exactly one line on stderr; the line."""
    assert outcome.code == code, outcome.out + outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    (line,) = outcome.err.strip().splitlines()
    return line


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def contents(folder: Path, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("run.lock", *but))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def toy_run(folder: Path, saves: int = 3, **options: Any) -> tuple[ModelPersistence, Toy]:
    options = {"on_message": lambda _: None, "drive_backup": False, "lock": False, **options}
    persistence, toy = ModelPersistence(folder, **options), Toy()
    for batch in range(saves):
        toy.step(0, batch)
        persistence.save_checkpoint(*toy.six, 0, batch, {}, extra=toy.extra())
    return persistence, toy


# -- a new machine ---------------------------------------------------------------------------------
def test_a_new_machine_needs_nothing_but_resume_and_the_drive_folder(
    bare: Bare, here: Path, reference: Outcome
) -> None:
    backup = on_a_new_machine(here)
    flags = json.loads((backup / "config.json").read_text())["arguments"]
    done = bare("--resume", "--drive_backup", "drive")
    assert done.code == 0, done.err
    assert f"Restoring runs/{backup.name} from {here / 'drive' / backup.name}" in done.out
    assert "Resume: EXACT" in done.out
    assert done.folder == Path("runs") / backup.name
    own = ("resume", "drive_backup", "device", "threads", "runs_dir")
    now = json.loads((done.folder / "config.json").read_text())["arguments"]
    assert {k: v for k, v in now.items() if k not in own} == {
        k: v for k, v in flags.items() if k not in own
    }
    assert "located" not in now
    assert done.figures() == reference.figures()  # also the metrics of before came back
    assert differing(done.checkpoint()["agent"], reference.checkpoint()["agent"]) == []
    assert (done.folder / "best_model.pt").exists()
    assert not (done.folder / RESTORING).exists()


def copies_before_a_kill(patch: pytest.MonkeyPatch) -> list[str]:
    """A restore is interrupted at its fifth file; the names of those that came before, as they
    come."""
    real = from_drive._copy_in
    copied: list[str] = []

    def copy_in(source: Path, *rest: Any) -> None:
        if len(copied) == 4:
            raise KeyboardInterrupt
        real(source, *rest)
        copied.append(source.name)

    patch.setattr(from_drive, "_copy_in", copy_in)
    return copied


def test_a_restore_that_is_killed_at_any_file_is_finished_by_the_next(here: Path) -> None:
    """Breaks: a marker that is missing or late, config.json or best_model.pt at the end."""
    backup = on_a_new_machine(here)
    whole = restore_run_from_drive(here / "drive", here / "whole")
    assert whole is not None
    wanted = contents(whole)
    assert {"config.json", "best_model.pt", "best_metadata.json", "metrics.jsonl"} <= set(wanted)
    order: list[str] = []
    real = AtomicFile.sync
    n = 0
    while True:
        runs = here / f"runs{n}"

        def restore(say: Any, n: int = n, runs: Path = runs) -> None:
            left = [n]

            def sync(self: AtomicFile) -> None:
                say(self.target.name)
                if not left[0]:
                    os._exit(9)  # as a kill does: nothing is cleaned up
                left[0] -= 1
                real(self)

            AtomicFile.sync = sync  # type: ignore[method-assign]
            restore_run_from_drive(here / "drive", runs)

        status, order = forked(restore)
        if status == 0:
            break
        assert status == 9, order
        if n:
            assert (runs / backup.name / RESTORING).exists()
        found = locate_run("latest", runs, here / "drive")
        assert found.folder == runs / backup.name
        assert contents(found.folder) == wanted, order
        assert not temps(runs)
        n += 1
    assert n == len(order) >= 8
    assert order[:4] == [RESTORING, "config.json", "best_metadata.json", "best_model.pt"]
    assert order[4] > order[5] > "checkpoint_"  # the newest first


def test_a_killed_restore_is_finished_by_resume_alone_even_without_the_flag(
    bare: Bare, here: Path
) -> None:
    backup = on_a_new_machine(here)
    with pytest.MonkeyPatch.context() as patch:
        copied = copies_before_a_kill(patch)
        assert bare("--resume", "--drive_backup", "drive").code == 130
    assert copied[-1].startswith("checkpoint_")
    shutil.move(here / "drive", here / "away")
    line = one_line(bare("--resume"), 3)
    assert "is not wholly restored" in line
    assert "Mount the Drive" in line
    shutil.move(here / "away", here / "drive")
    done = bare("--resume", "--dry_run")
    assert done.code == 0, done.err
    assert f"Finished the restore of runs/{backup.name}" in done.out
    restored = contents(here / "runs" / backup.name, ("training.log", "training_state.json"))
    there = contents(backup, ("training.log", "training_state.json"))
    assert {k.removeprefix("checkpoints/"): v for k, v in restored.items()} == {
        k: v for k, v in there.items() if not k.endswith(".ok")
    }


def test_damaged_copies_on_drive_that_are_passed_over_are_reported(bare: Bare, here: Path) -> None:
    backup = on_a_new_machine(here)
    newest = max(backup.glob("checkpoint_*.pt"))
    flip_a_bit(newest)
    done = bare("--resume", "--drive_backup", "drive", "--epochs", 1, "--quiet")
    assert done.code == 0, done.err
    said = [line for line in done.out.splitlines() if newest.name in line]
    assert said[0].startswith(f"Drive: passed over {backup.absolute()}/{newest.name}: ")
    assert "files skipped: 1" in said[-1]
    assert (done.folder / "checkpoints").is_dir()


def test_a_restore_onto_a_full_disk_is_one_line_and_goes_on_later(bare: Bare, here: Path) -> None:
    backup = on_a_new_machine(here)
    real = FileSystem.write

    def full(fs: Any, fd: int, data: Any) -> int:
        if len(data) > 100_000:
            raise OSError(28, "No space left on device")
        return real(fs, fd, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystem, "write", full)
        line = one_line(bare("--resume", "--drive_backup", "drive"), 3)
    assert "No space left" in line
    assert "goes on where this one stopped" in line
    found = locate_run("latest", "runs")
    assert len(list((found.folder / "checkpoints").glob("*.pt"))) == 2  # type: ignore[operator]
    assert (here / "runs" / backup.name / "best_model.pt").exists()


# -- two machines, one Drive -----------------------------------------------------------------------
def test_a_newer_drive_is_noticed_and_taken(bare: Bare, here: Path) -> None:
    run, backup = the_run(here / "runs"), the_run(here / "drive")
    ids = sorted(p.name for p in (run / "checkpoints").glob("*.pt"))
    for name in ids[1:]:  # this machine stopped after its first checkpoint
        (run / "checkpoints" / name).unlink()
    for name in ("checkpoint_metadata.json", "best_model.pt", "best_metadata.json"):
        (run / name).unlink()
    (run / "training_state.json").write_text("{}")
    (run / "results.json").write_text("{}")
    done = bare("--resume", "--drive_backup", "drive", "--device", "cpu")
    assert done.code == 0, done.err
    newest = int(ids[-1][11:16])
    assert "Drive is newer than the run here (its newest checkpoint was 0)" in done.out
    assert f"from checkpoint {newest}" in done.out
    assert "EXACT" in done.out
    assert (run / "best_model.pt").read_bytes() == (backup / "best_model.pt").read_bytes()
    assert not (run / RESTORING).exists()
    assert "another branch" not in done.out


def test_taking_a_newer_drive_can_be_interrupted_too(here: Path) -> None:
    run, backup = the_run(here / "runs"), the_run(here / "drive")
    newer = sorted((run / "checkpoints").glob("*.pt"))[1:]
    for path in (*newer, run / "checkpoint_metadata.json", run / "training_state.json"):
        path.unlink()
    toy, _ = toy_run(here / "other", 1)
    shutil.copy(toy.checkpoint_path(0), run / "best_model.pt")  # an older one
    with pytest.MonkeyPatch.context() as patch:
        copied = copies_before_a_kill(patch)
        with pytest.raises(KeyboardInterrupt):
            locate_run("latest", "runs", here / "drive")
    assert copied[2:] == ["best_model.pt", newer[-1].name]
    found = locate_run("latest", "runs", here / "drive")
    assert (found.folder, found.skipped) == (Path("runs") / run.name, [])
    assert not (run / RESTORING).exists()
    for name in ("best_model.pt", "config.json", "metrics.jsonl"):
        assert (run / name).read_bytes() == (backup / name).read_bytes()
    there = sorted(p.name for p in backup.glob("checkpoint_*.pt"))
    assert sorted(p.name for p in (run / "checkpoints").glob("*.pt"))[1:] == there


def test_two_branches_of_a_run_are_never_mixed(bare: Bare, here: Path) -> None:
    """This machine went on without Drive, another one with it: the same ids, other checkpoints."""
    shutil.copytree(here / "runs", here / "others")
    flags = ("--resume", "--epochs", 2, "--device", "cpu")
    other = bare(*flags, "--runs_dir", "others", "--drive_backup", "drive")
    assert other.code == 0, other.err
    backup = the_run(here / "drive")
    before = contents(backup)
    mine = bare(*flags, "--drive_backup", "elsewhere")
    assert mine.code == 0, mine.err
    done = bare("--resume", "--epochs", 3, "--device", "cpu", "--drive_backup", "drive")
    assert done.code == 0, done.err
    assert "holds another branch of this run (checkpoint" in done.out
    assert "Drive backup: off (" in done.err
    assert contents(backup) == before
    state = json.loads((done.folder / "training_state.json").read_text())["drive"]
    assert (state["state"], state["backed_up"]) == ("off", [])
    assert done.run.progress.epoch == 3  # the one here went on


def test_a_branch_is_seen_without_common_ids_by_the_times_in_the_seals(tmp_path: Path) -> None:
    mine, _ = toy_run(tmp_path / "here", 2)
    toy_run(tmp_path / "there", 4)
    files = {i: tmp_path / f"there/checkpoints/checkpoint_{i:05d}.pt" for i in (2, 3)}
    (tmp_path / "here/checkpoints/checkpoint_00001.pt").unlink()
    why = branch_conflict(mine._index.files(), files)
    assert "of another run" in why
    here = {i: files[i] for i in (2,)}
    assert branch_conflict(here, files) == ""
    assert "newer than any here" in branch_conflict(here, files, known=2)
    toy = Toy()
    mine._index.next_id, mine._index.run_id = 9, seal_of(files[2])["run_id"]  # type: ignore[index]
    mine.save_checkpoint(*toy.six, 0, 0, {})
    late = {1: mine.checkpoints_dir / "checkpoint_00009.pt"}
    assert "was saved before checkpoint 1 here" in branch_conflict(late, files)
    flip_a_bit(files[2])
    flip_a_bit(files[3])
    assert branch_conflict(late, files) == ""  # damaged files are no branch


def test_a_newer_run_of_another_name_on_drive_is_said(bare: Bare, here: Path) -> None:
    toy_run(here / "drive" / "arc_complete_20200101_000000", 1)
    done = bare("--resume", "--drive_backup", "drive", "--dry_run")
    assert done.code == 0, done.err
    assert "--resume runs/arc_complete_20200101_000000 takes that run" in done.out


@pytest.fixture
def two_on_drive(here: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """No run is here; Drive holds one that was saved in 2001, and the run of two epochs."""
    backup = on_a_new_machine(here)
    with monkeypatch.context() as patch:
        patch.setattr("model_persistence.timestamp_now", lambda: "2001-02-03T04:05:06+00:00")
        toy_run(here / "drive" / "arc_complete_older", 3)
    flags = {"arguments": {"data": "arcagi1", "seed": 5}}
    (here / "drive" / "arc_complete_older" / "config.json").write_text(json.dumps(flags))
    shutil.copytree(backup, here / "drive" / "a copy by hand")  # the same run
    return backup, here / "drive" / "arc_complete_older"


def test_several_runs_on_drive_are_listed_and_one_is_named(
    bare: Bare, here: Path, two_on_drive: tuple[Path, Path], reference: Outcome
) -> None:
    """Breaks: a foreign run restored in place of one's own."""
    backup, older = two_on_drive
    asked = bare("--resume", "--drive_backup", "drive", "--device", "cpu")
    assert asked.code == 3
    head, *listed = asked.err.strip().splitlines()
    assert head == (
        f"error: --resume: 2 runs in {here / 'drive'} and none in runs; say which one with "
        "--resume NAME:"
    )
    assert len(listed) == 2
    assert re.fullmatch(
        rf"    {backup.name}  saved 20[\d-]+ [\d:]+, epoch 0, batch \d+, evaluated, data: \S+",
        listed[0],
    )
    assert re.fullmatch(
        rf"    {older.name}  saved 2001-02-0. \S+, epoch 0, batch 2, data: arcagi1", listed[1]
    )
    assert not (here / "runs").exists()
    done = bare("--resume", backup.name, "--drive_backup", "drive", "--device", "cpu")
    assert done.code == 0, done.err
    assert "Resume: EXACT" in done.out
    assert done.folder == Path("runs") / backup.name
    assert differing(done.checkpoint()["agent"], reference.checkpoint()["agent"]) == []
    line = one_line(bare("--resume", "no_such_run", "--drive_backup", "drive"), 3)
    assert "nothing to resume in runs/no_such_run" in line


def test_flags_that_are_given_say_which_run_on_drive_is_meant(
    bare: Bare, here: Path, two_on_drive: tuple[Path, Path]
) -> None:
    backup, older = two_on_drive
    asked = bare("--resume", "--drive_backup", "drive", "--seed", 7)
    assert (asked.code, len(asked.err.splitlines())) == (3, 3)
    assert "2 runs, none of them with this --seed, in" in asked.err
    done = bare("--resume", "--drive_backup", "drive", "--seed", 0, "--epochs", 9, "--dry_run")
    assert done.code == 0, done.err
    took = f"Drive: took {backup.name} from {here / 'drive'}, the only one with this --seed; "
    assert f"{took}passed over {older.name}" in done.out
    assert f"Run:    runs/{backup.name}" in done.out


def test_resume_auto_takes_the_run_on_drive_that_was_saved_last_and_says_so(
    here: Path, two_on_drive: tuple[Path, Path]
) -> None:
    backup, older = two_on_drive

    def located(*flags: str) -> Any:
        given = ["--resume", "auto", "--drive_backup", "drive", *flags]
        args = trainloop.read_flags(given)
        return resuming.locate(args, trainloop.explicit_arguments(given))

    found = located()
    assert found.folder == Path("runs") / backup.name
    took = f"Drive: took {backup.name} from {here / 'drive'}, the one saved last"
    assert f"{took}; passed over {older.name}" in found.notes
    shutil.rmtree(here / "runs")
    found = located("--data", "arcagi1", "--seed", "5")
    assert found.folder == Path("runs") / older.name
    assert any(f"saved last with this --seed, --data; passed over {backup.name}" in note
               for note in found.notes)  # fmt: skip
    shutil.rmtree(here / "runs")
    flip_a_bit(max(backup.glob("checkpoint_*.pt")))  # then its other files, not another run
    assert located().folder == Path("runs") / backup.name


def test_a_backup_that_is_set_up_can_be_left_out_for_one_run(
    train: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARC_TRAINER_CONFIG_DIR", str(tmp_path / "configuration"))
    setup_drive_backup(tmp_path / "drive")
    before = contents(tmp_path / "drive")
    flags = ("--max_batches", 1, *SMALL)
    done = train(*flags, "--drive_backup", "off")
    assert done.code == 0, done.err
    assert train("--resume", "--epochs", 2, *flags).code == 0  # a run's own word
    assert contents(tmp_path / "drive") == before
    assert " --drive_backup off" in resuming.resume_command(done.run)
    assert not Path("off").exists()
    assert train("--resume", "--epochs", 3, *flags, "--drive_backup", tmp_path / "drive").code == 0
    assert (tmp_path / "drive" / done.folder.name / "best_model.pt").exists()


# -- folders that are no backup --------------------------------------------------------------------
def test_a_backup_into_nothing_or_into_the_runs_is_refused(train: Script) -> None:
    assert "names no folder" in one_line(train("--drive_backup", ""), 2)
    assert "names no folder" in one_line(train("--drive_backup", " "), 2)
    for place in ("runs", "runs/backup"):
        line = one_line(train("--max_batches", 1, "--drive_backup", train.folder / place), 2)
        assert "folder of the runs themselves" in line
    assert not (train.folder / "runs").exists()


def test_a_backup_folder_that_cannot_be_meant_is_refused_by_the_class_too(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    for wrong in (True, "", run, run / "x", tmp_path / "runs", tmp_path / "runs" / "b" / ".."):
        with pytest.raises(PersistenceError, match="cannot back up to"):
            ModelPersistence(run, drive_backup=wrong)
    nothing: Any
    for nothing in (True, ""):
        with pytest.raises(PersistenceError, match="names no folder"):
            setup_drive_backup(nothing)
    ModelPersistence(run, drive_backup=tmp_path / "drive")
    (tmp_path / "link").symlink_to(tmp_path / "runs")  # found when it is looked at
    said: list[str] = []
    persistence, _ = toy_run(run, 1, drive_backup=tmp_path / "link", on_message=said.append)
    persistence.close(10)
    assert persistence.drive_status()["state"] == "off"
    assert any("where the run itself is" in line for line in said)
    assert not list(run.rglob("*.ok"))


# -- the end of a run ------------------------------------------------------------------------------
class Slow:
    """Drive takes ten seconds for the first block of a file."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        real = DriveBackup._transfer

        def transfer(drive: Any, fd: int, size: int, file: Any, generation: int) -> str:
            end = time.monotonic() + 10
            while time.monotonic() < end and size > 100_000:
                drive._step(generation)
                time.sleep(0.01)
            return real(drive, fd, size, file, generation)

        patch.setattr(DriveBackup, "_transfer", transfer)


def test_the_end_waits_visibly_for_drive_and_says_what_is_missing(
    train: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "DRIVE_SILENT_S", 0.1)
    monkeypatch.setattr(drive, "DRIVE_SAY_EVERY_S", 0.2)
    flags = ("--max_batches", 1, *SMALL, "--drive_backup", train.folder / "drive")
    with pytest.MonkeyPatch.context() as patch:
        Slow(patch)
        done = train(*flags, "--drive_wait", 0.6)
    assert done.code == 0, done.err
    waiting = [line for line in done.err.splitlines() if "waiting" in line]
    assert len(waiting) in (2, 3)
    assert "files, " in waiting[0]
    (last,) = (line for line in done.err.splitlines() if "NOT complete" in line)
    newest = max((done.folder / "checkpoints").glob("*.pt")).name
    assert newest in last
    assert "best_model.pt" in last
    assert f"not in {train.folder / 'drive' / done.folder.name}" in last
    state = json.loads((done.folder / "training_state.json").read_text())["drive"]
    assert state["state"] == "waiting"
    said: list[str] = []
    with ModelPersistence(
        done.folder, drive_backup=train.folder / "drive", on_message=said.append, lock=False
    ) as again:
        again.back_up()
        again.close(20)
        assert again.drive_status()["state"] == "ok"
    backup = train.folder / "drive" / done.folder.name
    assert (backup / newest).exists()
    assert (backup / "results.json").read_bytes() == (done.folder / "results.json").read_bytes()
    assert not any("NOT complete" in line for line in said)


def test_a_signal_while_the_end_waits_for_drive_shortens_the_wait(
    train: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "DRIVE_HURRY_S", 0.3)
    real = DriveBackup.wait_visibly

    def wait(self: Any, *rest: Any) -> bool:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return real(self, *rest)

    monkeypatch.setattr(DriveBackup, "wait_visibly", wait)
    flags = ("--max_batches", 1, *SMALL, "--drive_backup", train.folder / "drive")
    with pytest.MonkeyPatch.context() as patch:
        Slow(patch)
        begun = time.monotonic()
        done = train(*flags, "--drive_wait", 60)
    assert time.monotonic() - begun < 30
    assert done.code == 143, done.err
    assert (done.folder / "results.json").exists()
    assert "NOT complete after" in done.err


def test_falling_behind_is_said_while_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slower(FileSystem):
        def write(self, fd: int, data: Any) -> int:
            time.sleep(0.3)
            return super().write(fd, data)

    monkeypatch.setattr(DriveBackup, "BEHIND_AFTER_S", 0.1)
    said: list[str] = []
    options = {"drive_backup": tmp_path / "drive", "drive_fs": Slower(), "on_message": said.append}
    persistence, _ = toy_run(tmp_path / "run", 1, **options)
    assert persistence.drive_status()["state"] == "waiting"
    time.sleep(0.15)
    persistence.should_save_checkpoint(1)
    persistence.poll()
    assert said[0].startswith("Drive backup: degraded (1 file, ")
    persistence.close(20)
    assert said[-1] == "Drive backup: ok"


def test_a_process_that_saves_nothing_says_nothing_of_drive(train: Script, here: Path) -> None:
    run = the_run(here / "runs")
    before = (run / "training_state.json").read_bytes()
    assert json.loads(before)["drive"]["state"] == "ok"
    refused = train("--resume", "--epochs", 2, "--seed", 5, "--drive_backup", here / "drive")
    assert refused.code == 3
    assert (run / "training_state.json").read_bytes() == before


# -- which run -------------------------------------------------------------------------------------
def test_the_run_that_was_saved_last_is_taken_and_what_was_passed_over_is_said(
    bare: Bare, here: Path
) -> None:
    run = the_run(here / "runs")
    toy_run(here / "old" / "arc_complete_restored", 1)
    for name in ("arc_complete_restored", "arc_complete_29990101_000000"):
        shutil.copytree(here / "old" / "arc_complete_restored", here / "runs" / name)
    for folder in (here / "runs").glob("arc_complete_2999*/checkpoints"):
        (folder / "quarantine").mkdir()
        for file in folder.glob("*.pt"):
            file.rename(folder / "quarantine" / file.name)
    (here / "runs" / "arc_complete_29980101_000000").mkdir()
    made = ModelPersistence(run, drive_backup=False, lock=False, on_message=lambda _: None)
    made.save_checkpoint(*Toy().six, 0, 9, {})  # later than the restored one
    done = bare("--resume", "--dry_run")
    assert done.code == 0, done.err
    assert f"Run:    runs/{run.name}" in done.out
    assert "passed over runs/arc_complete_restored: last saved 2" in done.out
    assert "passed over runs/arc_complete_29990101_000000: only damaged files" in done.out
    assert "passed over runs/arc_complete_29980101_000000: no checkpoint yet" in done.out
    made.checkpoint_path(max(made.checkpoints)).unlink()
    time.sleep(0.01)
    toy_run(here / "runs" / "a first by name", 1)  # a space, and before all others by name
    assert find_latest_run("runs") == Path("runs/a first by name")
    shutil.move(here / "runs" / "a first by name", here / "überall")
    (here / "runs" / "große Läufe").symlink_to(here / "überall")
    notes: list[str] = []
    assert find_latest_run("runs", notes) == Path("runs/große Läufe")
    assert not any("latest" in note for note in notes)


def test_predict_and_report_say_what_they_passed_over(
    here: Path, tasks_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = the_run(here / "runs")
    (here / "runs" / "arc_complete_29990101_000000").mkdir()
    flags = ["--data", str(tasks_file), "--device", "cpu", "--views", "1", "--hypotheses", "off"]
    assert predict.main(["runs", *flags, "--acceptance", "off"]) == 0
    said = capsys.readouterr()
    assert f"Model:  runs/{run.name}/checkpoints/" in said.out
    assert "warning: passed over runs/arc_complete_29990101_000000: no checkpoint" in said.err
    assert report.main(["runs", "--curves", "c.png"]) in (0, 3)  # 3: without matplotlib
    assert "warning: passed over runs/arc_complete_29990101" in capsys.readouterr().err
    assert report.find_run(run / "checkpoints") == run


@pytest.mark.parametrize("made", ["", "/checkpoints"])
def test_the_recipe_with_the_latest_folder_works_word_for_word(
    train: Script, here: Path, made: str
) -> None:
    backup = here / "checkpoint_backup_20260101"
    shutil.copytree(the_run(here / "runs") / "checkpoints", backup)
    shutil.rmtree(here / "runs")
    subprocess.run(["mkdir", "-p", f"runs/arc_complete_latest{made}"], check=True)
    command = "cp -r checkpoint_backup_* runs/arc_complete_latest/checkpoints/"
    subprocess.run(["bash", "-c", command], check=True)
    done = train("--resume", "--epochs", 1, *SMALL)
    assert done.code == 0, done.err
    assert "Resume: EXACT" in done.out
    assert done.folder == here / "runs" / "arc_complete_latest"


def test_a_file_or_the_checkpoints_folder_after_resume(bare: Bare, here: Path) -> None:
    run = the_run(here / "runs").relative_to(here)
    line = one_line(bare("--resume", run / "checkpoints" / "checkpoint_00001.pt"), 3)
    assert f"--resume {run} --checkpoint 1" in line
    line = one_line(bare("--resume", run / "best_model.pt"), 3)
    assert f"Use --resume {run}" in line
    done = bare("--resume", f"{run}/checkpoints/", "--dry_run")
    assert done.code == 0, done.err
    assert f"Run:    {run}\n" in done.out
    (here / "runs" / "empty").mkdir()
    line = one_line(bare("--resume", "runs/empty"), 3)
    assert "nothing to resume in runs/empty" in line
    assert list((here / "runs" / "empty").iterdir()) == []
    assert {p.suffix for p in (run / "checkpoints").iterdir()} == {".pt"}


# -- left-overs ------------------------------------------------------------------------------------
def test_a_container_whose_process_ids_never_change_can_resume(train: Script, here: Path) -> None:
    space = ["unshare", "-p", "-f", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*space, "true"], check=False).returncode:
        pytest.skip("no process namespaces here; the next test stands in for them")
    run = the_run(here / "runs")
    for name in ("metrics.jsonl", "config.json"):  # what a kill left before names had a random part
        for number in range(3):
            (run / f".{name}.1-{number}.tmp").touch()
    flags = train.arguments("--resume", "--epochs", 1, *SMALL)
    done = subprocess.run(
        [*space, sys.executable, str(SCRIPT), *flags],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert not temps(run)


def test_equal_process_ids_and_counters_give_other_temporary_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for two processes of a container: the same id, the same counter."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    names = []
    for _ in range(2):
        monkeypatch.setattr("persistence.files._temp_numbers", iter(range(9)))
        names.append(AtomicFile(tmp_path / "metrics.jsonl").temp.name)  # never finished
    assert names[0] != names[1]
    assert all(TEMP_NAME.fullmatch(name) for name in (*names, ".metrics.jsonl.1-0.tmp"))
    (tmp_path / ".metrics.jsonl.1-0.tmp").touch()
    (tmp_path / "x.tmp").touch()
    ModelPersistence(tmp_path, drive_backup=False, lock=False).tidy()
    assert [p.name for p in tmp_path.iterdir()] == ["x.tmp"]


def test_left_overs_go_before_a_resume_writes_anything(
    train: Script, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = the_run(here / "runs")
    for name in (".metrics.jsonl.1-0.tmp", "checkpoints/.checkpoint_00009.pt.1-7.tmp"):
        (run / name).touch()
    seen: list[list[str]] = []
    real = resuming.resume

    def resume(*arguments: Any) -> None:
        seen.append(temps(run))
        real(*arguments)

    monkeypatch.setattr(trainloop, "resume", resume)
    assert train("--resume", "--epochs", 1, *SMALL).code == 0
    assert seen == [[]]


# -- hostile and absurd files ----------------------------------------------------------------------
def test_a_file_size_limit_is_no_full_disk(tmp_path: Path) -> None:
    """Breaks: good checkpoints pruned although nothing that is removed makes the limit larger."""
    said: list[str] = []
    persistence, toy = toy_run(tmp_path / "run", 5, on_message=said.append)
    size = persistence.checkpoint_path(4).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        assert persistence.save_checkpoint(*toy.six, 0, 5, {}, extra=toy.extra()) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(persistence.checkpoints) == [0, 1, 2, 3, 4]
    assert "File too large" in said[-1]


def test_absurd_keys_in_the_small_files_are_ignored(tmp_path: Path) -> None:
    persistence, toy = toy_run(tmp_path / "run", 2)
    persistence.save_best_model(*toy.six, 0, 1, {"accuracy_delta": 1.0})
    index = json.loads(persistence.manifest_path.read_text())
    index["checkpoints"]["9" * 5000] = index["checkpoints"]["1"]
    index["checkpoints"]["[1]"] = [1]
    persistence.manifest_path.write_text(json.dumps(index))
    best = json.loads(persistence.best_metadata_path.read_text())
    for absurd in ([1], {"a": 1}, "1", None, 10**30):
        best["checkpoint_id"] = best["timestamp"] = best["run_id"] = absurd
        persistence.best_metadata_path.write_text(json.dumps(best))
        again, _ = toy_run(tmp_path / "run", 0)
        assert sorted(again.checkpoints) == [0, 1]
        assert again.load_best_model(*Toy().six)["metrics"] == {"accuracy_delta": 1.0}
        assert again.load_latest(*Toy().six)["checkpoint_id"] == 1
        assert find_latest_run(tmp_path) == tmp_path / "run"
    (tmp_path / "run" / RESTORING).write_text('{"from": [1], "above": "x", "timestamp": {}}')
    with pytest.raises(PersistenceError, match="not wholly restored"):
        locate_run("latest", tmp_path)


def hostile(run: Path, change: Any, target: Path) -> Path:
    """The run's newest checkpoint, changed, as an unsealed file."""
    newest = max((run / "checkpoints").glob("*.pt"))
    payload = torch.load(newest, weights_only=True)
    del payload["sealed"]
    change(payload)
    torch.save(payload, target)
    return target


def test_tensors_larger_than_their_memory_are_refused(here: Path) -> None:
    one = torch.zeros(1, dtype=torch.int64)

    def words(payload: Any) -> None:
        payload["extra"]["rng"]["python"]["words"] = one.expand(10**12)

    def many(payload: Any) -> None:
        big = torch.zeros(10**5)
        payload["extra"]["views"] = [big[i:] for i in range(2000)]

    def sparse(payload: Any) -> None:
        payload["extra"]["sparse"] = torch.sparse_coo_tensor(
            torch.tensor([[0]]), torch.tensor([1.0]), (10**12,), check_invariants=True
        )

    for change, why in ((words, "claims 8000000000000 bytes"), (many, "claim"), (sparse, "plain")):
        file = hostile(the_run(here / "runs"), change, here / f"{change.__name__}.pt")
        begun = time.perf_counter()
        with pytest.raises(CorruptCheckpointError, match=why):
            verify_checkpoint_file(file)
        assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 48 * 10**5), ("n_tasks", 10**12), ("planning_steps", 10**9), ("blocks", 10**6),
        ("encoder_blocks", 10**6), ("heads", 0), ("heads", 10**9), ("width", "wide"),
        ("width", [1]), ("memory", 5), ("seed", -1), ("seed", 10**30), ("prompt", "none"),
    ],
)  # fmt: skip
def test_absurd_settings_in_a_checkpoint_are_one_line(
    saved: Path, tasks_file: Path, tmp_path: Path, capsys: Any, name: str, value: Any
) -> None:
    def change(payload: Any) -> None:
        payload["extra"]["system"][name] = value

    file = hostile(the_run(saved / "runs"), change, tmp_path / "model.pt")
    flags = ["--data", str(tasks_file), "--device", "cpu", "--out", str(tmp_path / "out.json")]
    assert predict.main([str(file), *flags]) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {file}: ")


def test_argument_errors_stay_quick_with_resume(tmp_path: Path) -> None:
    """Breaks: torch imported, or runs looked at, before the command line is known to be right."""
    for flags in (["--resume", "--device", "gpu"], ["--resume", "--drive_backup", ""]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(SCRIPT), *flags],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2
        assert "| torch" not in done.stderr
