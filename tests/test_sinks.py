"""`--report_to`: right steps, one run there for all processes of a run, and no harm where it fails.

Pretended packages show what is handed over; the real ones, where they are installed, that it
arrives.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import threading
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, one_line_error

import sinks
from run_log import MutedLog

FEW = (
    "--batch_size", 3, "--policy", "off", "--planning_steps", 1, "--val_pairs", 1,
    "--eval_views", 1,
)  # fmt: skip
TWO = (*FEW, "--epochs", 2, "--max_batches", 2, "--save_every", 2)


class Pretended:
    """The three packages, noting what they get; `fails` names calls that raise."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened: list[dict[str, Any]] = []
        self.got: list[tuple[int, str, float]] = []  # (step, name, value)
        self.closed = 0
        self.fails: set[str] = set()
        tensorboard = types.ModuleType("torch.utils.tensorboard")
        tensorboard.SummaryWriter = self.writer  # type: ignore[attr-defined]
        trackio, wandb = types.ModuleType("trackio"), types.ModuleType("wandb")
        trackio.init = wandb.init = self.init  # type: ignore[attr-defined]
        trackio.finish = self.finish  # type: ignore[attr-defined]
        wandb.Settings = dict  # type: ignore[attr-defined]
        for module in (tensorboard, trackio, wandb):
            module.__spec__ = ModuleSpec(module.__name__, None)
            patch.setitem(sys.modules, module.__name__, module)

    def writer(self, folder: str, purge_step: int | None = None) -> Any:
        Path(folder).mkdir(exist_ok=True)
        return self.init(folder=folder, purge_step=purge_step)

    def init(self, project: str = "", **given: Any) -> Any:
        self.check("open")
        self.opened.append({"project": project, **given})
        return self

    def check(self, call: str) -> None:
        if call in self.fails:
            raise OSError(28, "No space left on device")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.check("log")
        self.got.append((step, name, value))

    def log(self, figures: dict[str, float], step: int | None = None) -> None:
        self.check("log")
        where = figures.pop("batches_done", None) if step is None else step
        assert isinstance(where, int)
        self.got += [(where, name, value) for name, value in figures.items()]

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def finish(self) -> None:
        self.check("close")
        self.closed += 1

    close = finish


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return Pretended(monkeypatch)


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    text = (outcome.folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def expected(outcome: Outcome) -> set[tuple[int, str, float]]:
    """Every number of metrics.jsonl and results.json, where it belongs."""
    found = {
        (row["batches_done"], f"{row['kind']}/{name}", value)
        for row in rows(outcome)
        if "batches_done" in row
        for name, value in shown(row).items()
        if name not in ("kind", "epoch", "batch", "batches_done") and isinstance(value, int | float)
    }
    results = json.loads((outcome.folder / "results.json").read_text())
    return found | {(results["batch"], f"final/{k}", v) for k, v in sinks.numbers(results)}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Of a finding its value alone, under its check's name."""
    return {row["name"]: row["value"]} if row["kind"] == "health" else row


@pytest.mark.parametrize("name", sinks.NAMES)
def test_each_gets_every_figure_at_its_batch(train: Any, pretended: Pretended, name: str) -> None:
    """Breaks: rows at the wrong step, epochs or final results that are lost."""
    done = train(*TWO, "--report_to", name)
    assert done.code == 0, done.err
    assert set(pretended.got) == expected(done)
    assert len(pretended.got) == len(set(pretended.got))
    steps = {step for step, of, _ in pretended.got if of == "batch/loss"}
    assert steps == {0, 1, 2, 3}
    assert {step for step, of, _ in pretended.got if of == "epoch/loss"} == {2, 4}
    assert {step for step, of, _ in pretended.got if of == "final/exact_at_2"} == {4}
    said = [(of, value) for _, of, value in pretended.got if of.startswith("health/")]
    assert said == [("health/few_tasks", 6.0)]
    assert len(pretended.opened) == pretended.closed == 1


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_resumed_run_goes_on_in_the_same_run_there(
    train: Any, pretended: Pretended, name: str
) -> None:
    """Breaks: a new run in the dashboard after each disconnect."""
    done = train(*TWO, "--report_to", name)
    assert train(*FEW, "--resume", "--epochs", 3, "--max_batches", 2).code == 0
    key = "id" if name == "wandb" else "name"
    first, second = pretended.opened
    assert first[key] == second[key]
    assert first["resume"] == second["resume"] == "allow"
    kept = json.loads((done.folder / "report_to.json").read_text())
    assert kept == {name: first[key]}
    assert first["config"]["max_batches"] == 2
    other = train(*FEW, "--max_batches", 1, "--report_to", name)
    assert other.code == 0
    assert pretended.opened[2][key] != first[key]


def test_a_resumed_tensorboard_hides_what_comes_again(train: Any, pretended: Pretended) -> None:
    """Breaks: curves that run back; or the row of the epoch before, hidden with them."""
    flags = ("--report_to", "tensorboard", "--max_batches", 3, "--save_every", 2, *FEW)
    done = train("--epochs", 1, *flags)
    assert pretended.opened[0]["purge_step"] is None
    assert train(*FEW, "--resume", done.folder, "--checkpoint", 0).code == 0
    assert pretended.opened[1]["purge_step"] == 2  # the batch that is trained again
    assert train(*FEW, "--resume", done.folder, "--epochs", 2).code == 0
    assert pretended.opened[2]["purge_step"] == 4  # epoch 0 has its row at batch 3


@pytest.mark.parametrize(
    ("name", "call"),
    [("tensorboard", "log"), ("trackio", "log"), ("wandb", "open"), ("wandb", "close")],
)
def test_a_sink_that_fails_ends_alone(
    train: Any, pretended: Pretended, name: str, call: str
) -> None:
    pretended.fails = {call}
    done = train(*FEW, "--max_batches", 2, "--report_to", name)
    assert done.code == 0, done.err
    assert done.err.count(f"--report_to {name}: its figures end here (No space left") == 1
    assert len(done.err.strip().splitlines()) == 1
    assert (done.folder / "results.json").exists()
    assert (len(pretended.got) > 0) == (call == "close")


@pytest.mark.parametrize("quiet", [False, True])
def test_an_end_that_hangs_is_not_waited_for(
    tmp_path: Path,
    pretended: Pretended,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quiet: bool,
) -> None:
    """Breaks: a run that never ends, or one that is mute from then on."""
    hanging, let_go, ended = threading.Event(), threading.Event(), threading.Event()

    def finish() -> None:
        hanging.set()
        let_go.wait(30)
        ended.set()

    class Closing(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            assert hanging.wait(30)
            super().join(timeout)

    monkeypatch.setattr(sinks, "CLOSE_S", 0.1)
    monkeypatch.setattr(sinks.threading, "Thread", Closing)
    monkeypatch.setattr(pretended, "finish", finish)

    def warn(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    sink = sinks.Sink("wandb", tmp_path, quiet=quiet, warn=warn)
    sink.row({"kind": "batch", "batches_done": 0, "loss": 1.0})
    sink.close()
    assert not ended.is_set()
    sys.stdout.write("what the run says then\n")
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "not everything was sent" in err
    assert out == "what the run says then\n"
    let_go.set()
    assert ended.wait(30)


def test_offline_sends_nothing(
    tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    for offline in (False, True):
        for name in ("wandb", "trackio"):
            monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
            monkeypatch.setenv("TRACKIO_SERVER_URL", "https://there")
            sink = sinks.Sink(name, tmp_path, offline=offline, warn=print)
            sink.row({"kind": "batch", "batches_done": 0, "loss": 1.0})
            left = {n for n in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if n in sinks.os.environ}
            assert (len(left) == 0) == (offline and name == "trackio")
    modes = [given.get("mode") for given in pretended.opened]
    assert modes == [None, None, "offline", None]


def test_a_run_asks_its_sink_to_stay_offline(train: Any, pretended: Pretended) -> None:
    assert train(*FEW, "--max_batches", 1, "--report_to", "wandb", "--offline").code == 0
    assert pretended.opened[0]["mode"] == "offline"


@pytest.mark.parametrize("name", sinks.NAMES)
def test_a_missing_package_is_said_before_any_training(
    train: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, sinks.MODULES[name], None)
    line = one_line_error(train(*FEW, "--max_batches", 1, "--report_to", name), 3)
    assert f"pip install {name}" in line
    assert not (train.folder / "runs").exists()


def test_a_process_beside_the_first_reports_nothing(tmp_path: Path, pretended: Pretended) -> None:
    log = MutedLog(tmp_path)
    log.record({"kind": "batch", "batches_done": 0, "loss": 1.0})
    log.write_results({"batch": 1, "exact_at_2": 3})
    log.close()
    assert pretended.opened == []
    assert list(tmp_path.iterdir()) == []


def test_figures_do_not_change_the_training(train: Any, pretended: Pretended) -> None:
    """Breaks: a sink that draws from the run's random state."""
    from conftest import assert_same_end

    plain = train(*TWO, runs="plain")
    assert_same_end(plain, train(*TWO, "--report_to", "wandb", runs="reported"))


# ---------------------------------------------------------------- the real packages


@pytest.fixture
def really(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`really(name)` skips the test where the package is not installed; nothing is sent, and
    nothing of the user's is touched."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))

    def need(name: str) -> None:
        pytest.importorskip(sinks.MODULES[name], reason=f"{name} is an extra, not installed")

    return need


def resumed(train: Any, name: str) -> Outcome:
    """A run that was stopped after three batches and went back to its second, to end with four."""
    flags = ("--offline", "--quiet")
    done = train(*FEW, "--max_batches", 3, "--save_every", 2, "--report_to", name, *flags)
    assert done.code == 0, done.err
    again = train(*FEW, "--resume", done.folder, "--checkpoint", 0, "--epochs", 1,
                  "--max_batches", 4, *flags)  # fmt: skip
    assert again.code == 0, again.err
    assert done.err == again.err == ""
    assert done.out.count("\n") < 9  # of the package itself not a word
    return again


def test_tensorboard_shows_a_resumed_run_as_one(train: Any, really: Any) -> None:
    really("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = resumed(train, "tensorboard")
    shown = EventAccumulator(str(done.folder / "tensorboard"))
    shown.Reload()
    losses = {event.step: event.value for event in shown.Scalars("batch/loss")}
    assert [event.step for event in shown.Scalars("batch/loss")] == [0, 1, 2, 3]
    in_log = {row["batches_done"]: row["loss"] for row in rows(done) if row["kind"] == "batch"}
    assert losses == pytest.approx(in_log)
    assert shown.Scalars("final/exact_at_2")[-1].step == 4


def test_trackio_keeps_a_resumed_run_as_one(train: Any, really: Any, tmp_path: Path) -> None:
    really("trackio")
    done = resumed(train, "trackio")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(file)) as base:
        found = base.execute("select run_name, step, metrics from metrics").fetchall()
    kept = json.loads((done.folder / "report_to.json").read_text())["trackio"]
    assert {name for name, _, _ in found} == {kept}
    steps = [step for _, step, metrics in found if "batch/loss" in json.loads(metrics)]
    assert steps == [0, 1, 2, 2, 3]  # the third batch was trained twice
    assert any("final/exact_at_2" in json.loads(metrics) for _, _, metrics in found)


def test_wandb_keeps_both_parts_under_one_id(train: Any, really: Any) -> None:
    really("wandb")
    done = resumed(train, "wandb")
    kept = json.loads((done.folder / "report_to.json").read_text())["wandb"]
    files = list((done.folder / "wandb").glob(f"offline-run-*-{kept}/run-{kept}.wandb"))
    assert len(files) == 2
    assert all(file.stat().st_size > 500 for file in files)
