"""Several processes train one run: the batches, gradients, files and scores of one process.

They are forked by `faults/several.py`, which is told what torchrun would tell them; torchrun itself
is in the slow test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import CLOCKS, MODULES, Script, differing, environment, make_tasks, write_tasks

import trainloop_complete_with_fixes as trainloop
from command_line import UserError
from distributed import check_flags
from persistence.run_guard import StopSignals
from ranks import ALONE, Part, Ranks, part_of, split
from resuming import start_of_command
from time_budget import Limits, out_of_time

Job = Callable[..., list[dict[str, Any]]]
SEVERAL = Path(__file__).with_name("faults") / "several.py"
TINY = (
    "--width", "16", "--threads", "1", "--device", "cpu", "--batch_size", "9", "--val_pairs", "4",
    "--eval_views", "1", "--warmup_batches", "4", "--save_every", "2", "--max_batches", "3",
    "--hypotheses", "off",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of two to five demonstrations, so that parts are unlike."""
    rules = ("flip", "double")  # the second has overflow batches, of one query a task
    tasks = {
        f"{n}{name}": task
        for n in (2, 3, 5)
        for name, task in make_tasks(rules, seed=n, n_demonstrations=n, sides=(2, 3)).items()
    }
    return write_tasks(tmp_path_factory.mktemp("data") / "training.json", tasks)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """`job(n, "script" or "gradients", arguments, ...)`: exit code, out and err of each process."""
    launcher = subprocess.Popen(
        [sys.executable, str(SEVERAL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(tmp_path_factory.mktemp("configuration")),
    )
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    stdin, stdout = launcher.stdin, launcher.stdout

    def call(n: int, action: str, *arguments: Any, **more: Any) -> list[dict[str, Any]]:
        job = {"n": n, "action": action, "arguments": [*map(str, arguments)], **more}
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        answer: list[dict[str, Any]] = json.loads(stdout.readline())
        return answer

    yield call
    stdin.close()
    launcher.wait(60)
    stdout.close()


def the_run(runs: Path) -> Path:
    """The one run folder there."""
    (folder,) = (p for p in runs.iterdir() if not p.is_symlink())
    return folder


def rows(runs: Path, kind: str = "batch") -> list[dict[str, Any]]:
    """Of metrics.jsonl, without the clock."""
    lines = (the_run(runs) / "metrics.jsonl").read_text().splitlines()
    found = [{k: v for k, v in json.loads(line).items() if k != "minutes"} for line in lines]
    return [row for row in found if row["kind"] == kind]


def state(runs: Path) -> dict[str, Any]:
    """All that the newest checkpoint holds of the training."""
    newest = max((the_run(runs) / "checkpoints").glob("checkpoint_*.pt"))
    file = torch.load(newest, weights_only=True)
    extra = {k: v for k, v in file["extra"].items() if k not in CLOCKS}
    return {name: file[name] for name in (*MODULES, "optimizer", "epoch", "batch")} | extra


def well(ended: list[dict[str, Any]]) -> None:
    """All processes ended well, and the first alone spoke."""
    assert [one["code"] for one in ended] == [0] * len(ended), ended
    assert [one["out"] + one["err"] for one in ended[1:]] == [""] * (len(ended) - 1)


@pytest.fixture(scope="module")
def two(job: Job, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two epochs by two processes; read it only."""
    runs = tmp_path_factory.mktemp("two")
    well(job(2, "script", "--data", data, "--runs_dir", runs, *TINY, "--epochs", 2))
    return runs


@pytest.fixture(scope="module")
def one(job: Job, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by one process."""
    runs = tmp_path_factory.mktemp("one")
    well(job(1, "script", "--data", data, "--runs_dir", runs, *TINY, "--epochs", 2))
    return runs


# ---------------------------------------------------------------- the split


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[3], [3, 3], [2, 9, 2, 4], [1] * 20, [30, 1, 1]])
def test_every_task_is_one_process_s_and_the_order_stays(sizes: list[int], world: int) -> None:
    parts = [split(sizes, rank, world) for rank in range(world)]
    tasks = [t for first, end in parts for t in range(first, end)]
    assert tasks == list(range(len(sizes)))


def test_equal_tasks_are_shared_evenly() -> None:
    assert [split([3] * 8, rank, 4) for rank in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_shares_add_up_to_the_batch_and_who_has_no_task_does_not_count() -> None:
    sizes, partners = [3, 4], [3, 0]
    parts = [part_of(sizes, partners, rank, 4) for rank in range(4)]
    assert sum(part.share for part in parts) == pytest.approx(1.0)
    assert sum(part.prompt_share for part in parts) == pytest.approx(1.0)
    idle = [part for part in parts if not part.counted]
    assert len(idle) == 2
    assert {(part.tasks.start, part.tasks.stop, part.share) for part in idle} == {(0, 1, 0.0)}
    assert {part.prompt_weight for part in idle} == {0.0}


def test_one_process_gets_back_what_it_gives() -> None:
    part = Part(slice(None), slice(None), 2, 4)
    tree = (torch.ones(3), {"a": torch.zeros(2)})
    generator = torch.Generator()
    assert ALONE.join(tree, part) is tree
    assert ALONE.draws(generator, part) is generator
    assert ALONE.sum(tree[0]) is tree[0]
    assert ALONE.device("cuda:1") == "cuda:1"


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("n", "proposing", "flags"),
    [
        (2, True, ()),
        (3, False, ("--grad_accum", 2)),
        pytest.param(4, True, ("--batch_size", 4), marks=pytest.mark.slow),
    ],
)
def test_gradients_figures_and_weights_are_those_of_one_process(
    n: int, proposing: bool, flags: tuple[Any, ...], job: Job, data: Path, tmp_path: Path
) -> None:
    """In float64, where rounding leaves room to see it: in float32 a fitted rule magnifies it."""
    arguments = ("--data", data, "--runs_dir", tmp_path, *TINY, *flags)
    found = []
    for many in (1, n):
        out = tmp_path / str(many)
        more = {"out": str(out), "steps": 2 if proposing else 6, "proposing": proposing}
        ended = job(many, "gradients", *arguments, **more)
        assert {one["code"] for one in ended} == {0}, ended
        found.append(torch.load(out, weights_only=True))
    (steps, weights), (others, their_weights) = found
    for (gradient, figures), (theirs, their_figures) in zip(steps, others, strict=True):
        assert gradient.keys() == theirs.keys()
        size = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
        apart = sum(float((g - theirs[k]).square().sum()) for k, g in gradient.items()) ** 0.5
        assert apart <= 1e-9 * size
        assert their_figures == pytest.approx(figures, rel=1e-6, abs=1e-9)
    assert (
        differing(
            {k: v for k, v in weights.items() if not v.is_floating_point()},
            {k: v for k, v in their_weights.items() if not v.is_floating_point()},
        )
        == []
    )  # owners and counters of the memory
    for name, w in weights.items():
        torch.testing.assert_close(their_weights[name], w, rtol=1e-6, atol=1e-8, msg=name)


# ---------------------------------------------------------------- a run


def test_two_processes_train_as_one_does(one: Path, two: Path) -> None:
    assert rows(two, "start") == rows(one, "start")  # validation of the same weights: exactly
    for mine, theirs in zip(rows(one), rows(two), strict=True):
        assert mine["pairs"] == theirs["pairs"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-3)
    # Single weights whose gradient is almost 0 may go either way: AdamW steps by its sign.
    agents = [torch.cat([w.flatten() for w in state(r)["agent"].values()]) for r in (one, two)]
    apart = float((agents[1] - agents[0]).norm() / agents[0].norm())
    assert apart < 1e-3


def test_the_first_process_alone_writes(one: Path, two: Path) -> None:
    names = [sorted(p.name for p in the_run(runs).iterdir()) for runs in (one, two)]
    assert names[0] == names[1]
    assert [row["batch"] for row in rows(two)] == [row["batch"] for row in rows(one)]
    log = (the_run(two) / "training.log").read_text()
    assert log.count("EPOCH 1 SUMMARY") == 1
    assert "2 processes" in log


@pytest.mark.parametrize("policy", ["on", "random"])
def test_votes_and_hypotheses_of_two_processes_are_those_of_one(
    policy: str, job: Job, data: Path, tmp_path: Path
) -> None:
    first, results = tmp_path / "first", []
    start = ("--data", data, "--runs_dir", first, *TINY[:-2], "--max_batches", 1)
    well(job(2, "script", *start, "--policy", policy))
    for n in (1, 2):
        runs = tmp_path / str(n)
        shutil.copytree(first, runs, symlinks=True)
        well(job(n, "script", "--resume", "--runs_dir", runs, "--eval_views", 3, *TINY[2:6]))
        results.append(json.loads((the_run(runs) / "results.json").read_text()))
        assert results[-1].pop("minutes") > results[-1].pop("trained_minutes") > 0
        assert results[-1]["views"] == 3
    assert results[0] == results[1]
    assert results[0]["hypothesis_queries"] == results[0]["n"] > 2


def test_a_resume_by_as_many_processes_is_exact_by_another_number_it_is_said(
    job: Job, data: Path, two: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    start = ("--data", data, "--runs_dir", runs, *TINY)
    ended = job(2, "script", *start, "--epochs", 2, fault="SIGTERM", at=3)
    assert [one["code"] for one in ended] == [143, 143], ended
    assert "Stopped by SIGTERM; everything is saved" in ended[0]["out"]
    assert "torchrun --standalone --nproc_per_node 2" in ended[0]["out"]
    assert ended[1]["out"] + ended[1]["err"] == ""
    shutil.copytree(runs, tmp_path / "other", symlinks=True)
    ended = job(2, "script", "--resume", "--runs_dir", runs, *TINY[2:6])
    well(ended)
    assert "Resume: EXACT" in ended[0]["out"]
    assert differing(state(runs), state(two)) == []
    assert rows(runs) == rows(two)
    arguments = ("--resume", "--runs_dir", tmp_path / "other", *TINY[2:6], "--epochs", 1)
    ended = job(1, "script", *arguments)
    assert "EQUIVALENT (same data order, other processes: saved 2, now 1)" in ended[0]["out"]


def test_a_stop_says_that_the_others_hypotheses_are_fitted_again(
    job: Job, data: Path, tmp_path: Path
) -> None:
    """Breaks: "everything is saved" of what only one process has."""
    runs = tmp_path / "runs"
    start = ("--data", data, "--runs_dir", runs, *TINY[:-2], "--epochs", 2)
    ended = job(2, "script", *start, "--time_budget", 9, fault="SIGTERM", at=2)
    assert [one["code"] for one in ended] == [143, 143], ended
    said = ended[0]["out"]
    assert "Hypotheses that the other processes have fitted are in no file" in said
    assert "fewer of them may vote at the end." in said
    ended = job(2, "script", "--resume", "--runs_dir", runs, *TINY[2:6])
    well(ended)
    assert "tasks of this process are in the checkpoint" in ended[0]["out"]


def test_a_process_that_is_killed_ends_the_others_and_all_start_again(
    job: Job, data: Path, two: Path, tmp_path: Path
) -> None:
    start = ("--data", data, "--runs_dir", tmp_path, *TINY, "--epochs", 2, "--resume", "auto")
    begun = time.monotonic()
    ended = job(2, "script", *start, fault="SIGKILL", at=4)
    assert [one["code"] for one in ended] == [1, -9], ended
    (line,) = ended[0]["err"].splitlines()
    assert line.startswith("error: another of the 2 processes cannot be reached (")
    assert time.monotonic() - begun < 60
    well(job(2, "script", *start))
    assert differing(state(tmp_path), state(two)) == []
    assert rows(tmp_path) == rows(two)


def test_an_error_of_one_process_is_said_once_and_ends_all(
    job: Job, data: Path, tmp_path: Path
) -> None:
    flags = ("--data", data, "--runs_dir", tmp_path, *TINY)
    ended = job(2, "script", *flags, fault="memory", at=2)
    assert [one["code"] for one in ended] == [1, 4]
    assert ended[1]["err"].count("\n") == 1
    assert "out of memory: made for a test" in ended[1]["err"]
    assert ended[0]["err"] == ""


def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_of_all(
    job: Job, data: Path, tmp_path: Path
) -> None:
    flags = ("--data", data, "--runs_dir", tmp_path, *TINY)
    ended = job(2, "script", *flags, fault="nan", at=0, bad_batches=3)
    assert [one["code"] for one in ended] == [5, 5], ended
    assert ended[0]["err"].count("\n") == 1
    assert ended[0]["err"].startswith("error: diverged: 3 batches in a row")
    assert ended[1]["err"] == ""


@pytest.mark.slow
def test_torchrun_starts_a_killed_worker_again(data: Path, two: Path, tmp_path: Path) -> None:
    runs, log = tmp_path / "runs", tmp_path / "log"
    start = ["--data", data, "--runs_dir", runs, *TINY, "--epochs", 2, "--resume", "auto"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "--max-restarts", "3", str(trainloop.__file__)]
    with log.open("w") as file:
        torchrun = subprocess.Popen(
            [*command, *map(str, start)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(tmp_path / "configuration"),
        )
        try:
            while not list(runs.glob("arc_complete_2*/checkpoints/checkpoint_*.pt")):
                assert torchrun.poll() is None, log.read_text()
                time.sleep(0.01)
            found = subprocess.run(
                ["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True, check=True
            )
            os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
            assert torchrun.wait(120) == 0, log.read_text()
        finally:
            torchrun.terminate()
            torchrun.wait(60)
    assert log.read_text().count("Resume: EXACT") == 1
    assert differing(state(runs), state(two)) == []


# ---------------------------------------------------------------- what is refused, and small things

TWO = Ranks(1, 2, 1, 2)


@pytest.mark.parametrize(
    "flag", [{"qwen_cache_interval": 3}, {"prompt": "shuffled"}, {"demonstrations": "shuffled"}]
)
def test_what_needs_the_other_processes_tasks_is_refused(flag: dict[str, Any]) -> None:
    usual = {"qwen_cache_interval": 1, "prompt": "full", "demonstrations": "on", "quiet": False}
    check_flags(argparse.Namespace(**usual), TWO)
    check_flags(argparse.Namespace(**{**usual, **flag}), ALONE)
    with pytest.raises(UserError, match=f"--{next(iter(flag))}"):
        check_flags(argparse.Namespace(**{**usual, **flag}), TWO)


def test_cuda_means_the_gpu_of_the_process_s_number() -> None:
    assert TWO.device("cuda") == "cuda:1"
    assert TWO.device("cpu") == "cpu"
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        TWO.device("cuda:0")


def test_a_wrong_flag_is_said_by_the_first_process_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], train: Script
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            trainloop.read_flags(["--epoch", "3"])
        assert ("Did you mean --epochs?" in capsys.readouterr().err) == (rank == "0")


def test_the_command_that_goes_on_starts_as_many_processes() -> None:
    assert start_of_command(ALONE) == ["python"]
    machines = start_of_command(Ranks(0, 8, 0, 4))
    assert machines == ["torchrun", "--nnodes", "2", "--nproc_per_node", "4"]


def test_a_signal_told_by_another_process_is_not_a_first_of_two() -> None:
    with StopSignals() as stop:
        stop.learn(signal.SIGTERM)
        assert stop.requested
        time.sleep(0.3)  # longer than signals may lie apart to count as one
        signal.raise_signal(signal.SIGTERM)  # a second one would end this process
        assert stop.exit_code == 143


def test_the_first_process_s_clock_decides() -> None:
    past = time.monotonic() - 1
    agreed = mock.Mock(many=True, first=False, highest=lambda number: number)
    assert not out_of_time(Limits(past, ranks=agreed))
    assert out_of_time(Limits(past))
