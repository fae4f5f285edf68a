"""model_persistence: the API of the guide, every fault at a bounded share, and the messages.

The scripts in tests/faults/ inject the faults; run without `--share` they reach the full figures.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import corruption
import io_errors
import power_cut
from harness import Bank, FileSystem, Toy, WatchedFS, copy_tree, temps, train

import model_persistence
from model_persistence import (
    CheckpointError,
    CorruptCheckpointError,
    LockedError,
    MismatchError,
    ModelPersistence,
    NoCheckpointError,
    PersistenceError,
    RunLock,
    TrainingState,
    capture_rng_state,
    restore_rng_state,
    resume_report,
    setup_drive_backup,
    verify_checkpoint_file,
)
from persistence import checkpoint_file
from persistence.checkpoint_file import FORMAT_VERSION, MODULES, SixObjects
from persistence.drive import configured_drive_backup
from persistence.files import atomic_write_json, is_space_error
from persistence.find_run import find_latest_run, point_latest_at
from persistence.from_drive import restore_run_from_drive
from persistence.restoring import environment
from persistence.state_tree import check_saveable, state_fingerprint

FAULTS = Path(__file__).parent / "faults"
SCRIPT_LIMIT_S = (
    240.0  # of a fault script, and of waiting for those that another test process needs
)
# The scripts that fork or mostly wait run beside the other tests.
SCRIPTS = {
    "kill_points": ["--share", "1/15"],
    "kill_random": ["--kills", "8"],
    "kill_real_script": ["--kills", "6", "--per_run", "6"],
    "bitwise": ["--batches", "4", "--share", "1/3"],
    "drive": [],
    "signals": [],
}


@pytest.fixture(autouse=True)
def _own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees, or changes, the Drive folder that a user has set up."""
    monkeypatch.setenv("ARC_TRAINER_CONFIG_DIR", str(tmp_path / "config"))


@pytest.fixture(autouse=True)
def _global_generators() -> Iterator[None]:
    """Toys seed the global generators; other tests must not notice."""
    state = capture_rng_state()
    yield
    restore_rng_state(state)


def python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


class Scripts:
    """The fault scripts, each run once, whichever of the parallel test processes comes first;
    by files in `shared`."""

    def __init__(self, shared: Path, names: list[str]) -> None:
        self.shared = shared
        self.running: list[subprocess.Popen[str]] = []
        self.starter = threading.Thread(target=self._run, args=(names,))
        self.starter.start()

    def _run(self, names: list[str]) -> None:
        waiting = []
        for name in names:
            try:
                (self.shared / f"{name}.taken").touch(exist_ok=False)
            except FileExistsError:
                continue  # another test process runs it
            process = python(str(FAULTS / f"{name}.py"), *SCRIPTS[name])
            self.running.append(process)
            end = threading.Thread(target=self._finish, args=(name, process))
            end.start()
            waiting.append(end)
            if name not in ("drive", "signals"):  # those mostly wait
                end.join()
        for end in waiting:
            end.join()

    def _finish(self, name: str, process: subprocess.Popen[str]) -> None:
        output, errors = process.communicate()
        found = {"output": output, "errors": errors, "code": process.returncode}
        (self.shared / f"{name}.part").write_text(json.dumps(found))
        (self.shared / f"{name}.part").rename(self.shared / f"{name}.done")

    def figures_of(self, name: str) -> dict[str, Any]:
        done, end = self.shared / f"{name}.done", time.monotonic() + SCRIPT_LIMIT_S
        while not done.exists():
            assert time.monotonic() < end, f"{name}.py is not done"
            time.sleep(0.05)
        found = json.loads(done.read_text())
        assert found["output"].strip(), found["errors"]
        figures = json.loads(found["output"].strip().splitlines()[-1])
        assert figures["problems"] == []
        assert found["code"] == 0, found["errors"]
        return figures


@pytest.fixture(scope="module")
def scripts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scripts]:
    """The fault scripts whose tests are selected; the ones that mostly wait run side by side."""
    selected = {
        i.callspec.params.get("script")
        for i in request.session.items
        if isinstance(i, pytest.Function) and hasattr(i, "callspec")
    }
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "fault_scripts"
    shared.mkdir(exist_ok=True)
    names = sorted(SCRIPTS, key=lambda n: n not in ("drive", "signals"))
    scripts = Scripts(shared, [n for n in names if n in selected])
    yield scripts
    scripts.starter.join(SCRIPT_LIMIT_S)  # the other test process may wait for what runs here
    for process in scripts.running:
        if process.poll() is None:
            process.kill()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "arc_complete_20260101_000000"


def manager(folder: Path, **options: Any) -> ModelPersistence:
    options = {"on_message": lambda _: None, "drive_backup": False, **options}
    return ModelPersistence(folder, **options)


def save(persistence: ModelPersistence, toy: Toy, batch: int, **options: Any) -> int | None:
    metrics = options.pop("metrics", {"accuracy_delta": 0.01 * batch, "loss": 1.0})
    extra = options.pop("extra", None)
    return persistence.save_checkpoint(
        *toy.six, 0, batch, metrics, extra=toy.extra() if extra is None else extra, **options
    )


def filled(folder: Path, saves: int = 3, **options: Any) -> tuple[ModelPersistence, Toy]:
    persistence, toy = manager(folder, **options), Toy()
    for batch in range(saves):
        toy.step(0, batch)
        save(persistence, toy, batch)
    return persistence, toy


# -- the guide's examples --------------------------------------------------------------------------
def test_the_documented_calls_save_and_resume(run_dir: Path) -> None:
    persistence = ModelPersistence(run_dir, drive_backup=False)
    toy = Toy()
    toy.step(0, 0)
    metrics = {"loss": 3.456, "reward": 0.045}
    assert persistence.save_checkpoint(*toy.six, 3, 287, metrics) == 0
    again = ModelPersistence(run_dir, drive_backup=False)
    assert again.get_resume_info() == {
        "checkpoint_id": 0,
        "epoch": 3,
        "batch": 287,
        "metrics": metrics,
    }
    other = Toy(seed=1)
    metadata = again.load_checkpoint(0, *other.six, device="cpu")
    assert (metadata["epoch"], metadata["batch"], metadata["metrics"]) == (3, 287, metrics)
    assert state_fingerprint(other.agent) == state_fingerprint(toy.agent)


def test_the_checkpoint_file_has_the_documented_keys_and_loads_weights_only(run_dir: Path) -> None:
    persistence, toy = filled(run_dir, 1)
    file = torch.load(persistence.checkpoint_path(0), weights_only=True)
    documented = {"epoch", "batch", "metrics", "timestamp", *MODULES, "optimizer", "extra"}
    assert documented <= set(file)
    assert file["format_version"] == FORMAT_VERSION
    assert set(file["optimizer"]) == {"state", "param_groups"}
    assert torch.equal(file["agent"]["0.weight"], toy.agent.state_dict()["0.weight"])
    assert {p.name for p in run_dir.iterdir()} >= {
        "checkpoints",
        "checkpoint_metadata.json",
        "training_state.json",
    }


def test_previous_checkpoint_by_hand(run_dir: Path) -> None:
    filled(run_dir, 3)
    persistence, toy = manager(run_dir), Toy()
    assert len(persistence.checkpoints) > 1
    previous_id = max(persistence.checkpoints.keys()) - 1
    assert persistence.load_checkpoint(previous_id, *toy.six)["batch"] == 1


def test_best_model_then_inference(run_dir: Path) -> None:
    persistence, toy = filled(run_dir, 2)
    assert persistence.save_best_model(*toy.six, 0, 1, {"accuracy_delta": 0.5})
    wanted = toy.agent.eval()(toy.data)
    agent = Toy(seed=5).agent.eval()
    metadata = manager(run_dir).load_best_model(agent, None, None, None, None, None, device="cpu")
    assert metadata["metrics"] == {"accuracy_delta": 0.5}
    assert torch.equal(agent(toy.data), wanted)


def test_max_checkpoints_two_keeps_two(run_dir: Path) -> None:
    persistence, _ = filled(run_dir, 6, max_checkpoints=2)
    assert sorted(persistence.checkpoints) == [4, 5]
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == ["checkpoint_00004.pt", "checkpoint_00005.pt"]


def test_max_checkpoints_may_be_changed_between_saves(run_dir: Path) -> None:
    persistence, toy = filled(run_dir, 4, max_checkpoints=4)
    assert persistence.max_checkpoints == 4
    persistence.max_checkpoints = 2
    persistence.save_checkpoint(*toy.six, 0, 9, {}, wait=True)
    assert sorted(persistence.checkpoints) == [3, 4]


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_copied_to_drive_and_back(run_dir: Path, tmp_path: Path, nested: bool) -> None:
    persistence, toy = filled(run_dir, 3)
    persistence.close()
    wanted = toy.fingerprint()
    drive = tmp_path / "drive" / "checkpoint_backup_20260101_120000"
    shutil.copytree(run_dir / "checkpoints", drive)
    shutil.rmtree(run_dir / "checkpoints")
    # `cp -r backup checkpoints/` nests the folder if checkpoints/ exists.
    target = run_dir / "checkpoints" / drive.name if nested else run_dir / "checkpoints"
    shutil.copytree(drive, target)
    (run_dir / "checkpoint_metadata.json").unlink()
    other = Toy(seed=2)
    again = manager(run_dir)
    found = again.load_latest(*other.six)
    other.restore(found["extra"])
    assert (found["checkpoint_id"], other.fingerprint()) == (2, wanted)
    assert save(again, other, 3) == 3


SAVES = ("prepare", "save_checkpoint", "save_best_model")
LOADS = ("load_checkpoint", "load_best_model", "load_latest")


@pytest.mark.parametrize("call", [*SAVES, *LOADS])
def test_every_call_takes_the_six_in_the_order_of_their_names(call: str) -> None:
    """Breaks: two of the six change places, and one's state is saved as the other's."""
    names = list(inspect.signature(getattr(ModelPersistence, call)).parameters)
    at = names.index("agent")
    assert tuple(names[at : at + 6]) == SixObjects._fields == (*MODULES, "optimizer")


def test_each_of_the_six_is_saved_and_loaded_under_its_own_name(run_dir: Path) -> None:
    persistence = manager(run_dir)
    for n, name in enumerate(SixObjects._fields):
        one = torch.nn.Linear(1, 1)
        others = SixObjects(*(None if i != n else one for i in range(6)))
        number = persistence.save_checkpoint(*others, 0, n, {})
        assert number is not None
        file = torch.load(persistence.checkpoint_path(number), weights_only=True)
        assert [k for k in SixObjects._fields if file[k] is not None] == [name]
        loaded = torch.nn.Linear(1, 1)
        six = {**dict.fromkeys(SixObjects._fields), name: loaded}
        persistence.load_checkpoint(number, **six)
        assert state_fingerprint(loaded) == state_fingerprint(one)


def test_the_front_door_has_the_names_of_its_documents() -> None:
    """Breaks: what docs/PERSISTENCE.md calls is not there, or not by `import *`."""
    page = (FAULTS.parents[1] / "docs" / "PERSISTENCE.md").read_text(encoding="utf-8")
    for name in model_persistence.__all__:
        assert getattr(model_persistence, name).__module__.startswith(
            ("model_persistence", "persistence.")
        )
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    called = set(re.findall(r"(?<![.\w])([A-Za-z_]+)\(", code))
    others = {"agent", "print", "max", "len", "load_modules", "Path"}
    assert len(called - others) >= 7
    assert called - others <= set(model_persistence.__all__)


def test_save_interval() -> None:
    persistence = manager(Path("unused"), save_every_n_batches=50)
    assert [b for b in range(151) if persistence.should_save_checkpoint(b)] == [50, 100, 150]
    assert not manager(Path("unused"), save_every_n_batches=0).should_save_checkpoint(50)


# -- saving ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "place", "why"),
    [
        (np.ones(2), "extra.deep[1].x", "numpy.ndarray"),
        (np.float64(1.0), "extra.deep[1].x", "numpy.float64"),
        (Path("a"), "extra.deep[1].x", "PosixPath"),
        (lambda: None, "extra.deep[1].x", "function"),
        (torch.ones(2).to_sparse(), "extra.deep[1].x", "sparse"),
        (frozenset({1}), "extra.deep[1].x", "frozenset"),
    ],
)
def test_refuses_what_cannot_be_read_back(run_dir: Path, value: Any, place: str, why: str) -> None:
    persistence, toy = manager(run_dir), Toy()
    with pytest.raises(PersistenceError, match="weights_only") as caught:
        save(persistence, toy, 0, extra={"deep": [1, {"x": value}]})
    assert place in str(caught.value)
    assert why in str(caught.value)
    assert not list(run_dir.rglob("*.pt"))


def test_refuses_a_container_inside_itself(run_dir: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(PersistenceError, match=r"extra\.x\[0\].*contains itself"):
        save(manager(run_dir), Toy(), 0, extra={"x": loop})


def test_everything_allowed_comes_back(run_dir: Path) -> None:
    toy, base = Toy(), torch.arange(1000.0)
    extra = {
        "numbers": [1, 2.5, True, None, 3 + 4j, 10**40, float("inf")],
        "text": {"a": "b", 7: b"bytes", (1, 2): "tuple key"},
        "tuple": (torch.tensor(1), [torch.zeros(0)]),
        "window": base[10:12],
        "expanded": torch.ones(2).expand(3, 2),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    for asynchronous in (False, True):
        persistence = manager(run_dir, async_save=asynchronous)
        number = save(persistence, toy, 0, extra=extra)
        assert persistence.flush()
        assert number is not None
        found = persistence.load_checkpoint(number, *toy.six)["extra"]
        assert state_fingerprint(found) == state_fingerprint(extra)
        assert persistence.checkpoint_path(number).stat().st_size < 50_000  # not all of `base`


def test_tied_weights_are_stored_once_and_stay_tied(run_dir: Path) -> None:
    weight = torch.randn(100, 100)
    for number, asynchronous in enumerate((False, True)):
        persistence = manager(run_dir, async_save=asynchronous)
        save(persistence, Toy(), 0, extra={"embedding": weight, "head": weight})
        persistence.flush()
        path = persistence.checkpoint_path(number)
        assert path.stat().st_size < 1.7 * weight.numel() * 4
        found = torch.load(path, weights_only=True)["extra"]
        assert found["embedding"].data_ptr() == found["head"].data_ptr()


def test_numpy_and_tensor_metrics_become_numbers(run_dir: Path) -> None:
    metrics = {"a": np.float32(0.5), "b": torch.tensor(2), "c": [np.int64(3)], "d": float("nan")}
    persistence = manager(run_dir)
    save(persistence, Toy(), 0, metrics=metrics)
    info = persistence.get_resume_info()
    assert info is not None
    assert str(info["metrics"]) == "{'a': 0.5, 'b': 2, 'c': [3], 'd': nan}"
    json.loads((run_dir / "checkpoint_metadata.json").read_text(), parse_constant=pytest.fail)
    with pytest.raises(PersistenceError, match=r"metrics\.bad"):
        save(persistence, Toy(), 0, metrics={"bad": object()})


def test_metrics_too_many_for_the_seal(run_dir: Path) -> None:
    metrics = {f"metric_{i}": i / 7 for i in range(5000)}
    persistence = manager(run_dir)
    save(persistence, Toy(), 0, metrics=metrics)
    (run_dir / "checkpoint_metadata.json").unlink()
    info = manager(run_dir).get_resume_info()
    assert info is not None
    assert info["metrics"] == metrics


def test_ids_are_never_used_twice(run_dir: Path) -> None:
    persistence, toy = filled(run_dir, 3, max_checkpoints=2)
    persistence.close()
    damage(run_dir / "checkpoints/checkpoint_00002.pt")
    for name in ("checkpoint_metadata.json", "training_state.json"):
        (run_dir / name).unlink()
    again = manager(run_dir)
    assert again.load_latest(*toy.six)["checkpoint_id"] == 1
    assert save(again, toy, 3) == 3  # 2 lies in quarantine
    again.close()
    # The newest file is gone without a trace, but the index remembers.
    (run_dir / "checkpoints/checkpoint_00003.pt").unlink()
    assert save(manager(run_dir), toy, 4) == 4


def test_foreign_temporary_files_are_removed_and_foreign_files_are_not(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True)
    stale = [folder / ".checkpoint_00000.pt.123-4.tmp", run_dir / ".best_model.pt.9-1.tmp"]
    mine = [folder / "notes.txt", folder / "my_checkpoint.pt", run_dir / "x.tmp"]
    for path in (*stale, *mine):
        path.write_text("x")
    filled(run_dir, 4, max_checkpoints=1)
    assert not any(p.exists() for p in stale)
    assert all(p.exists() for p in mine)


def test_a_manager_that_only_loads_changes_nothing(run_dir: Path) -> None:
    _, toy = filled(run_dir, 2)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in run_dir.rglob("*"))
    persistence = manager(run_dir)
    assert persistence.get_resume_info() is not None
    persistence.load_latest(*toy.six)
    persistence.load_checkpoint(0, *toy.six)
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in run_dir.rglob("*"))


def test_order_of_operations(run_dir: Path) -> None:
    """Data, fsync, read-back, rename, directory; the index after it; deletions last."""
    persistence, toy = filled(run_dir, 2, max_checkpoints=2)
    fs = WatchedFS()
    paths: list[tuple[str, str]] = []

    def note(name: str, arguments: tuple[Any, ...]) -> None:
        paths.append((name, str(arguments[-1])))

    fs.before = note  # type: ignore[method-assign]
    persistence._index.fs = persistence.training_state._fs = fs
    toy.step(0, 2)
    save(persistence, toy, 2)
    log = [
        name for name, _ in paths if name in ("create", "fsync", "replace", "fsync_dir", "unlink")
    ]
    one = ["create", "fsync", "replace", "fsync_dir"]
    assert log == [*one, *one, "unlink", *one]
    renamed = [Path(p).name for n, p in paths if n == "replace"]
    assert renamed == ["checkpoint_00002.pt", "checkpoint_metadata.json", "training_state.json"]
    names = [n for n, _ in paths]
    assert names.index("readinto") > names.index("fsync") < names.index("replace")


# -- the best model --------------------------------------------------------------------------------
def test_best_is_a_hard_link_of_the_same_snapshot(run_dir: Path) -> None:
    for asynchronous in (False, True):
        persistence, toy = filled(run_dir, 1, async_save=asynchronous)
        toy.step(0, 1)
        metrics, extra = {"accuracy_delta": 1.0 + asynchronous}, toy.extra()
        number = save(persistence, toy, 1, metrics=metrics, extra=extra, wait=True)
        assert number is not None
        assert persistence.save_best_model(*toy.six, 0, 1, metrics, extra=extra)
        persistence.close()
        assert persistence.best_path.samefile(persistence.checkpoint_path(number))
        record = json.loads((run_dir / "best_metadata.json").read_text())
        assert (record["value"], record["metric_name"]) == (1.0 + asynchronous, "accuracy_delta")


def test_best_in_flight_is_linked_when_the_write_is_done(run_dir: Path) -> None:
    gate = threading.Event()

    class Gated(FileSystem):
        def fsync(self, fd: int) -> None:
            gate.wait(20)
            super().fsync(fd)

    persistence, toy = manager(run_dir, async_save=True, fs=Gated()), Toy()
    toy.step(0, 0)
    arguments = (*toy.six, 0, 0, {"accuracy_delta": 0.1})
    assert persistence.save_checkpoint(*arguments) == 0
    assert persistence.save_best_model(*arguments)
    assert not persistence.best_path.exists()
    gate.set()
    persistence.close()
    assert persistence.best_path.samefile(persistence.checkpoint_path(0))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_best_of_another_state_is_its_own_file(run_dir: Path, asynchronous: bool) -> None:
    persistence, toy = filled(run_dir, 1, async_save=asynchronous)
    persistence.flush()
    toy.step(0, 1)  # the state has moved since the checkpoint
    assert persistence.save_best_model(
        *toy.six, 0, 0, {"accuracy_delta": 0.0, "loss": 1.0}, extra=toy.extra()
    )
    persistence.close()
    assert persistence.best_path.stat().st_nlink == 1
    other = Toy(seed=3)
    other.restore(persistence.load_best_model(*other.six)["extra"])
    assert other.fingerprint() == toy.fingerprint()


def test_only_a_better_value_replaces_the_best(run_dir: Path) -> None:
    persistence, toy = manager(run_dir), Toy()

    def offer(value: float, **options: Any) -> bool:
        toy.step(0, 0)
        metrics = {"accuracy_delta": value, "loss": -value}
        return persistence.save_best_model(*toy.six, 0, 0, metrics, **options)

    assert [offer(v) for v in (float("nan"), -0.5, -0.6, -0.5, 0.1)] == [0, 1, 0, 0, 1]
    persistence = manager(run_dir)  # the best is remembered, also without its JSON
    (run_dir / "best_metadata.json").unlink()
    assert [offer(v) for v in (0.1, 0.2)] == [False, True]
    assert not offer(0.1, metric_name="loss", higher_is_better=False)
    with pytest.raises(PersistenceError, match="no number called 'nothing'"):
        offer(1.0, metric_name="nothing")


def test_best_without_hard_links(run_dir: Path) -> None:
    class NoLinks(FileSystem):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "no links here")

    persistence, toy = filled(run_dir, 1, fs=NoLinks())
    metrics = {"accuracy_delta": 0.0, "loss": 1.0}
    assert persistence.save_best_model(*toy.six, 0, 0, metrics, extra=toy.extra())
    assert persistence.best_path.stat().st_nlink == 1
    assert persistence.load_best_model(*toy.six)["batch"] == 0


def test_rotation_spares_the_checkpoint_that_best_points_to(run_dir: Path) -> None:
    persistence, toy = filled(run_dir, 1, max_checkpoints=2)
    metrics = {"accuracy_delta": 0.0, "loss": 1.0}
    persistence.save_best_model(*toy.six, 0, 0, metrics, extra=toy.extra())
    persistence.best_path.unlink()  # only the metadata is left, and the checkpoint it names
    for batch in range(1, 5):
        save(persistence, toy, batch)
    assert sorted(persistence.checkpoints) == [0, 3, 4]
    assert persistence.load_best_model(*toy.six)["checkpoint_id"] == 0


def test_a_damaged_best_model_does_not_block_the_next(run_dir: Path) -> None:
    persistence, toy = filled(run_dir, 1)
    persistence.save_best_model(*toy.six, 0, 0, {"accuracy_delta": 9.0})
    persistence.close()
    damage(run_dir / "best_model.pt")
    again = manager(run_dir)
    found = again.load_latest(*toy.six)
    assert "best_model.pt" in found["skipped"][0]["file"]
    assert again.save_best_model(*toy.six, 0, 1, {"accuracy_delta": 1.0})


# -- in the background -----------------------------------------------------------------------------
def test_background_save_holds_the_state_of_the_call(run_dir: Path) -> None:
    gate = threading.Event()

    class Gated(FileSystem):
        def create(self, path: Path) -> int:
            gate.wait(20)
            return super().create(path)

    messages: list[str] = []
    persistence = manager(run_dir, async_save=True, fs=Gated(), on_message=messages.append)
    toy = Toy()
    toy.step(0, 0)
    wanted = toy.fingerprint()
    assert save(persistence, toy, 0) == 0
    toy.step(0, 1)  # training goes on while the file is written
    assert save(persistence, toy, 1) is None
    assert persistence.skipped_saves == 1
    assert "Skipped" in messages[-1]
    gate.set()
    assert persistence.flush()
    assert persistence.last_durable_id == 0
    other = Toy(seed=4)
    other.restore(persistence.load_latest(*other.six)["extra"])
    assert other.fingerprint() == wanted


def test_buffers_are_reused(run_dir: Path) -> None:
    persistence, toy = manager(run_dir, async_save=True), Toy()
    toy.step(0, 0)
    persistence.prepare(*toy.six, extra=toy.extra())
    kept = {k: t.data_ptr() for k, t in persistence._buffers._kept.items()}
    save(persistence, toy, 0, wait=True)
    assert {k: t.data_ptr() for k, t in persistence._buffers._kept.items()} == kept


def test_a_writer_error_reaches_the_loop(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    persistence, toy = manager(run_dir, async_save=True), Toy()

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(torch, "save", broken)
    save(persistence, toy, 0)
    persistence._writer.join()
    with pytest.raises(CheckpointError, match="a bug"):
        persistence.should_save_checkpoint(1)
    assert not temps(run_dir)


def test_a_failed_background_save_is_reported_in_the_callers_thread(run_dir: Path) -> None:
    class Full(FileSystem):
        def write(self, fd: int, data: bytes | memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    said: list[tuple[str, threading.Thread]] = []
    persistence = manager(
        run_dir,
        async_save=True,
        fs=Full(),
        on_message=lambda text: said.append((text, threading.current_thread())),
    )
    assert save(persistence, Toy(), 0) == 0  # a promise
    assert not persistence.flush()
    assert persistence.failed_saves == 1
    assert persistence.last_durable_id is None
    assert "Training goes on" in said[0][0]
    assert {thread for _, thread in said} == {threading.main_thread()}


def test_streams_when_memory_is_short(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_persistence, "free_memory_bytes", lambda: 100)
    persistence, toy = manager(run_dir, async_save=True), Toy()
    assert save(persistence, toy, 0) == 0
    assert persistence.last_durable_id == 0  # durable at once: it was not deferred
    assert persistence._buffers._kept == {}


def test_large_state_takes_the_parallel_path(run_dir: Path) -> None:
    toy, big = Toy(), torch.randn(3, 6_000_000)  # 72 MB: hashed and read back by helper threads
    persistence = manager(run_dir)
    assert save(persistence, toy, 0, extra={"big": big, "view": big[:, ::2]}) == 0
    loaded = verify_checkpoint_file(persistence.checkpoint_path(0), expect_id=0)
    assert torch.equal(loaded.payload["extra"]["big"], big)
    assert torch.equal(loaded.payload["extra"]["view"], big[:, ::2])
    import hashlib

    assert loaded.sha256 == hashlib.sha256(persistence.checkpoint_path(0).read_bytes()).hexdigest()


def test_the_interpreter_waits_for_a_background_save(run_dir: Path) -> None:
    code = (
        "import sys, time; sys.path[:0] = sys.argv[2:]\n"
        "from harness import Toy, FileSystem\n"
        "from model_persistence import ModelPersistence\n"
        "class Slow(FileSystem):\n"
        "    def fsync(self, fd): time.sleep(0.1); super().fsync(fd)\n"
        "p = ModelPersistence(sys.argv[1], async_save=True, fs=Slow(), drive_backup=False)\n"
        "p.save_checkpoint(*Toy().six, 0, 0, {})\n"
    )
    process = python("-c", code, str(run_dir), str(FAULTS), str(FAULTS.parents[1]))
    assert process.communicate(timeout=60)[1] == ""
    assert sorted(manager(run_dir).checkpoints) == [0]


# -- space -----------------------------------------------------------------------------------------
class SmallDisk(FileSystem):
    """Holds `files` checkpoints."""

    def __init__(self, folder: Path, files: int, announce: bool) -> None:
        self.folder, self.files, self.announce = folder, files, announce

    def _left(self) -> int:
        return self.files - len(list(self.folder.glob("checkpoint_*.pt")))

    def free_bytes(self, path: Path) -> int | None:
        return (1 << 40 if self._left() > 0 else 1000) if self.announce else None

    def write(self, fd: int, data: bytes | memoryview) -> int:
        if len(data) > 10_000 and self._left() <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data)


@pytest.mark.parametrize("announce", [True, False])
def test_a_full_disk_is_pruned_to_two_and_training_goes_on(run_dir: Path, announce: bool) -> None:
    messages: list[str] = []
    fs = SmallDisk(run_dir / "checkpoints", 3, announce)
    persistence, toy = filled(run_dir, 5, fs=fs, on_message=messages.append)
    assert sorted(persistence.checkpoints) == [2, 3, 4]
    assert persistence.failed_saves == 0
    assert any("removed 1 old checkpoint" in m for m in messages)
    fs.files = 0
    assert save(persistence, toy, 5) is None
    assert sorted(persistence.checkpoints) == [3, 4]
    assert persistence.failed_saves == 1
    assert not temps(run_dir)
    fs.files = 9
    assert save(persistence, toy, 6) == 5


def test_making_room_never_removes_the_last_good_one(run_dir: Path) -> None:
    persistence, toy = filled(run_dir, 3)
    for number in (1, 2):
        damage(persistence.checkpoint_path(number))
    persistence._index.fs = SmallDisk(run_dir / "checkpoints", 0, True)
    assert save(persistence, toy, 3) is None
    assert manager(run_dir).load_latest(*toy.six)["checkpoint_id"] == 0


def test_torch_disguise_of_a_full_disk_is_known() -> None:
    assert is_space_error(RuntimeError("unexpected pos 128 vs 22"))
    assert is_space_error(OSError(errno.EDQUOT, "quota"))
    assert not is_space_error(OSError(errno.EIO, "io"))
    assert not is_space_error(RuntimeError("shape"))


# -- loading: messages, mismatch, extras -----------------------------------------------------------
def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_a_damaged_file_goes_to_quarantine_with_the_reason(run_dir: Path) -> None:
    persistence, toy = filled(run_dir, 3)
    damage(persistence.checkpoint_path(2))
    messages: list[str] = []
    again = manager(run_dir, on_message=messages.append)
    found = again.load_latest(*toy.six)
    assert found["checkpoint_id"] == 1
    assert "content differs" in found["skipped"][0]["reason"]
    assert "Skipped" in messages[0]
    moved = run_dir / "checkpoints/quarantine/checkpoint_00002.pt"
    assert moved.exists()
    reason = json.loads((moved.parent / "checkpoint_00002.pt.reason.json").read_text())
    assert "expected sha256" in reason["reason"]


def test_an_unsealed_file_is_checked_by_its_own_checksums(run_dir: Path) -> None:
    """Written by hand with torch.save: torch itself loads it damaged without a word."""
    persistence, toy = filled(run_dir, 2)
    payload = torch.load(persistence.checkpoint_path(1), weights_only=True)
    del payload["sealed"]
    path = persistence.checkpoint_path(1)
    path.unlink()
    (run_dir / "checkpoint_metadata.json").unlink()
    torch.save(payload, path)
    info = manager(run_dir).get_resume_info()
    assert info is not None
    assert info["checkpoint_id"] == 1
    weight = payload["agent"]["0.weight"].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(weight) + 5] ^= 8
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    found = manager(run_dir).load_latest(*toy.six)
    assert found["checkpoint_id"] == 0
    assert "checksum" in found["skipped"][0]["reason"]


def test_a_disk_that_loses_bytes_is_noticed_before_anything_is_replaced(run_dir: Path) -> None:
    class Lying(FileSystem):
        def write(self, fd: int, data: bytes | memoryview) -> int:
            changed = bytearray(data)
            if len(changed) > 10_000:
                changed[len(changed) // 2] ^= 1
            return super().write(fd, bytes(changed))

    persistence, toy = filled(run_dir, 2, max_checkpoints=1)
    persistence._index.fs = Lying()
    assert save(persistence, toy, 2) is None
    assert persistence.failed_saves == 1
    assert not temps(run_dir)
    assert manager(run_dir).load_latest(*toy.six)["batch"] == 1


def test_by_id_a_damaged_file_is_an_error_that_names_the_next(run_dir: Path) -> None:
    persistence, toy = filled(run_dir, 3)
    damage(persistence.checkpoint_path(2))
    with pytest.raises(
        CorruptCheckpointError, match=r"checkpoint_00002.*Load checkpoint 1 instead"
    ):
        persistence.load_checkpoint(2, *toy.six)
    assert persistence.checkpoint_path(2).exists()
    with pytest.raises(CheckpointError, match=r"no checkpoint 7.*There are: 0, 1, 2"):
        persistence.load_checkpoint(7, *toy.six)
    for wrong in (-1, "../../x", 10**12, True):
        with pytest.raises(CheckpointError):
            persistence.load_checkpoint(wrong, *toy.six)  # type: ignore[arg-type]


def test_nothing_to_resume_says_where_it_looked(run_dir: Path) -> None:
    persistence = manager(run_dir, drive_backup=run_dir.parent / "drive")
    assert persistence.get_resume_info() is None
    with pytest.raises(NoCheckpointError) as caught:
        persistence.load_latest(*Toy().six)
    for place in ("checkpoints", "best_model.pt", "drive"):
        assert place in str(caught.value)
    with pytest.raises(CheckpointError, match="no best model"):
        persistence.load_best_model(*Toy().six)


def test_a_read_error_is_not_a_damaged_file(run_dir: Path) -> None:
    filled(run_dir, 2)

    class Flaky(FileSystem):
        def open_read(self, path: Path) -> int:
            if path.name == "checkpoint_00001.pt":
                raise OSError(errno.EIO, "cable")
            return super().open_read(path)

    found = manager(run_dir, fs=Flaky()).load_latest(*Toy().six)
    assert found["checkpoint_id"] == 0
    assert (run_dir / "checkpoints/checkpoint_00001.pt").exists()


def test_another_model_is_refused_naming_file_and_key_and_nothing_changes(run_dir: Path) -> None:
    filled(run_dir, 1)
    toy = Toy(seed=1)
    toy.policy_rl = torch.nn.Linear(4, 5)
    before = state_fingerprint(toy.agent)
    with pytest.raises(MismatchError) as caught:
        manager(run_dir).load_latest(*toy.six)
    text = str(caught.value)
    assert "checkpoint_00000.pt" in text
    assert "'policy_rl.weight': expected shape [5, 4], found shape [4, 4]" in text
    assert state_fingerprint(toy.agent) == before
    assert not (run_dir / "checkpoints/quarantine").exists()
    toy.policy_rl = torch.nn.Sequential(torch.nn.Linear(4, 4))  # type: ignore[assignment]
    with pytest.raises(MismatchError, match=r"policy_rl\.0\.weight.*expected shape.*found nothing"):
        manager(run_dir).load_latest(*toy.six)
    toy = Toy()
    toy.optimizer = torch.optim.AdamW(toy.agent.parameters())
    with pytest.raises(MismatchError, match=r"optimizer\.param_groups"):
        manager(run_dir).load_latest(*toy.six)


def test_another_optimizer_is_left_as_it_is_and_said_but_never_at_a_resume(run_dir: Path) -> None:
    _, trained = filled(run_dir, 1)
    toy = Toy(seed=1)
    six = [*toy.six[:5], torch.optim.SGD(list(toy.agent.parameters()), lr=0.5, momentum=0.5)]
    said: list[str] = []
    metadata = manager(run_dir, on_message=said.append).load_checkpoint(0, *six)
    assert metadata["optimizer"].startswith("left out: ")
    assert ["weights loaded, the optimizer's state left out" in line for line in said] == [True]
    assert state_fingerprint(toy.agent) == state_fingerprint(trained.agent)
    assert six[5].param_groups[0]["lr"] == 0.5
    groups = [{"params": group["params"]} for group in toy.optimizer.param_groups]
    six[5] = torch.optim.Adagrad(groups, lr=0.5)  # the same groups, other quantities
    metadata = manager(run_dir, on_message=said.append).load_checkpoint(0, *six)
    assert "another kind of optimizer" in metadata["optimizer"]
    assert six[5].param_groups[0]["lr"] == 0.5
    six[5] = torch.optim.SGD(list(toy.agent.parameters()), lr=0.5)
    with pytest.raises(MismatchError, match=r"optimizer\.param_groups"):
        manager(run_dir).load_latest(*six)
    assert manager(run_dir).load_checkpoint(0, *Toy().six)["optimizer"] == "loaded"
    six[5] = None
    assert manager(run_dir).load_checkpoint(0, *six)["optimizer"] == "not given"


def test_a_newer_format_is_refused_and_kept(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(run_dir, 1)
    monkeypatch.setattr(checkpoint_file, "FORMAT_VERSION", 0)
    with pytest.raises(MismatchError, match="newer than this program"):
        manager(run_dir).load_latest(*Toy().six)
    assert (run_dir / "checkpoints/checkpoint_00000.pt").exists()


def test_a_module_that_does_not_restore_is_noticed(run_dir: Path) -> None:
    _, toy = filled(run_dir, 1)

    class Forgetful(Bank):
        def load_persistent_state_dict(self, state: dict[str, Any]) -> None:
            self.rows = state["rows"].clone()

    toy.solver2 = Forgetful()
    with torch.no_grad():
        toy.solver2.scale.add_(1)
    with pytest.raises(MismatchError, match=r"key 'solver2\.scale' differs"):
        manager(run_dir).load_latest(*toy.six)


def test_any_of_the_six_may_be_none(run_dir: Path) -> None:
    toy = Toy()
    persistence = manager(run_dir)
    persistence.save_checkpoint(toy.agent, None, None, None, None, None, 1, 2, {})
    assert persistence.load_latest(toy.agent, None, None, None, None, None)["epoch"] == 1
    with pytest.raises(MismatchError, match="no state for 'qwen'"):
        persistence.load_latest(toy.agent, toy.qwen, None, None, None, None)


def test_a_cast_is_reported_not_refused(run_dir: Path) -> None:
    _, toy = filled(run_dir, 1)
    agent = Toy().agent.to(torch.bfloat16)
    metadata = manager(run_dir).load_latest(agent, None, None, None, None, None)
    assert any("agent.0.weight" in text for text in metadata["cast"])
    assert resume_report(metadata)[0] == "DEGRADED"
    cast, kept = agent.state_dict()["0.weight"], toy.agent.state_dict()["0.weight"]
    assert torch.equal(cast, kept.to(torch.bfloat16))


def test_frozen_weights_are_kept_by_reference(run_dir: Path) -> None:
    class Backbone(torch.nn.Module):
        reference = {"id": "some/model", "revision": "abc", "sha256": "1" * 64}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.frozen = torch.nn.Parameter(torch.randn(200, 200), requires_grad=False)
            self.adapter = torch.nn.Linear(4, 4)

        def frozen_reference(self) -> dict[str, str]:
            return self.reference

        def persistent_state_dict(self) -> dict[str, Any]:
            return self.adapter.state_dict()

        def load_persistent_state_dict(self, state: dict[str, Any]) -> None:
            self.adapter.load_state_dict(state)

    toy, backbone = Toy(), Backbone()
    persistence = manager(run_dir)
    persistence.save_checkpoint(toy.agent, backbone, None, None, None, None, 0, 0, {})
    assert persistence.checkpoint_path(0).stat().st_size < 30_000
    other = Backbone()
    persistence.load_latest(toy.agent, other, None, None, None, None)
    assert torch.equal(other.adapter.weight, backbone.adapter.weight)
    other.reference = {**Backbone.reference, "sha256": "2" * 64}
    with pytest.raises(MismatchError, match=r"'qwen'.*frozen weights, sha256.*--qwen_model"):
        persistence.load_latest(toy.agent, other, None, None, None, None)
    with pytest.raises(MismatchError, match="frozen weights"):
        persistence.load_latest(toy.agent, toy.qwen, None, None, None, None)


def test_batchnorm_metadata_survives(run_dir: Path) -> None:
    for asynchronous in (False, True):
        persistence, toy = filled(run_dir, 1, async_save=asynchronous)
        persistence.close()
        path = persistence.checkpoint_path(max(persistence.checkpoints))
        state = torch.load(path, weights_only=True)["efe_loss"]
        assert state._metadata[""]["version"] == toy.efe_loss._version


# -- resume: random numbers, configuration, report -------------------------------------------------
def test_random_number_states_round_trip() -> None:
    state = capture_rng_state()

    def draw() -> list[Any]:
        legacy = np.random.standard_normal(3).tolist()  # noqa: NPY002 - the global state
        return [random.random(), random.gauss(0, 1), legacy, torch.rand(3).tolist()]

    first = draw()
    assert restore_rng_state(state) == []
    assert draw() == first
    check_saveable(state, "rng")
    with pytest.raises(MismatchError, match="random number state"):
        restore_rng_state({"python": 1})


def test_resume_report(run_dir: Path) -> None:
    _, toy = filled(run_dir, 2)
    damage(run_dir / "checkpoints/checkpoint_00001.pt")
    metadata = manager(run_dir).load_latest(*toy.six)
    verdict, line = resume_report(metadata, last_seen=(1, 3), batches_per_epoch=10)
    assert verdict == "EXACT"
    assert "epoch 0, batch 0" in line
    assert "batches lost: 13" in line
    assert "files skipped: 1" in line
    elsewhere = {**environment(), "gpus": ["T4"]}
    verdict, line = resume_report(
        metadata, rng_missing=["cuda states"], current_environment=elsewhere
    )
    assert verdict == "EQUIVALENT"
    assert "gpus" in line
    assert resume_report(metadata, mismatches=["seed: saved 1, now 2"])[0] == "DEGRADED"


def test_fingerprint_sees_names_types_shapes_and_bits() -> None:
    base = {"a": torch.tensor([0.0, 1.0]), "b": 1}
    variants = [
        {"a": torch.tensor([-0.0, 1.0]), "b": 1},
        {"a": torch.tensor([[0.0, 1.0]]), "b": 1},
        {"a": torch.tensor([0.0, 1.0], dtype=torch.float64), "b": 1},
        {"c": torch.tensor([0.0, 1.0]), "b": 1},
        {"a": torch.tensor([0.0, 1.0]), "b": 1.0},
        {"a": torch.tensor([0.0, 1.0]), "b": 1, "c": []},
    ]
    prints = [state_fingerprint(v) for v in (base, *variants)]
    assert len(set(prints)) == len(prints)
    assert state_fingerprint({"b": 1, "a": torch.tensor([0.0, 1.0])}) == prints[0]


# -- lock, state file, runs ------------------------------------------------------------------------
def test_a_second_writer_is_told(run_dir: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from model_persistence import LockedError, RunLock\n"
        "try:\n    RunLock(sys.argv[1]).acquire()\n"
        "except LockedError as e:\n    print(e); sys.exit(3)\n"
    )
    command = ["-c", code, str(run_dir), str(FAULTS.parents[1])]
    with RunLock(run_dir):
        with RunLock(run_dir):  # the same process may
            pass
        process = python(*command)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 3
        assert f'"pid": {os.getpid()}' in output
        assert "host" in output
    process = python(*command)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_manager_takes_the_lock_at_its_first_save(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    run_dir.mkdir(parents=True)
    with (run_dir / "run.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        persistence, toy = manager(run_dir), Toy()
        with pytest.raises(LockedError, match="in use by another process"):
            save(persistence, toy, 0)
        assert not list(run_dir.rglob("*.pt"))
    assert save(persistence, toy, 0) == 0
    with (run_dir / "run.lock").open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    persistence.close()


def test_training_state_merges_and_survives_garbage(tmp_path: Path) -> None:
    state = TrainingState(tmp_path)
    assert state.load() == {}
    state.save(epoch=1, status="running")
    state.save({"batch": 5}, status="done")
    assert state.load() | {"updated": ""} == {
        "epoch": 1,
        "status": "done",
        "batch": 5,
        "updated": "",
    }
    (tmp_path / "training_state.json").write_text("{")
    assert state.load() == {}


def test_latest_run_by_name_with_something_in_it(tmp_path: Path) -> None:
    assert find_latest_run(tmp_path / "none") is None
    for name in ("arc_complete_20260101_000000", "arc_complete_20260102_000000"):
        filled(tmp_path / name, 1)
    (tmp_path / "arc_complete_20260103_000000").mkdir()  # died before its first save
    (tmp_path / "zzz.txt").write_text("")
    os.utime(tmp_path / "arc_complete_20260101_000000")
    assert find_latest_run(tmp_path) == tmp_path / "arc_complete_20260102_000000"
    point_latest_at(tmp_path / "arc_complete_20260101_000000")
    point_latest_at(tmp_path / "arc_complete_20260102_000000")
    link = tmp_path / "arc_complete_latest"
    assert link.resolve().name == "arc_complete_20260102_000000"
    assert find_latest_run(tmp_path) == tmp_path / "arc_complete_20260102_000000"


def test_atomic_json(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    atomic_write_json(target, {"n": np.int64(3), "x": float("inf"), "p": Path("a")})
    assert json.loads(target.read_text()) == {"n": 3, "x": None, "p": "a"}

    class Broken(FileSystem):
        def fsync(self, fd: int) -> None:
            raise OSError(errno.EIO, "fsync failed")

    with pytest.raises(OSError, match="fsync failed"):
        atomic_write_json(target, {}, Broken())
    assert json.loads(target.read_text())["n"] == 3
    assert [p.name for p in tmp_path.glob(".*tmp")] == []


# -- Drive -----------------------------------------------------------------------------------------
def test_drive_setup_reaches_the_next_process(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drive = tmp_path / "Drive" / "ARC-EFE-Backups"
    assert setup_drive_backup(str(drive)) == drive
    assert capsys.readouterr().out == f"Drive backup enabled: {drive}\n"
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from harness import Toy\n"
        "from model_persistence import ModelPersistence\n"
        "p = ModelPersistence(sys.argv[1])\n"
        "p.save_checkpoint(*Toy().six, 0, 0, {})\n"
        "p.close(drive_timeout_s=20)\n"
        "print(p.drive_status()['state'])\n"
    )
    process = python("-c", code, str(run_dir), str(FAULTS), str(FAULTS.parents[1]))
    output, errors = process.communicate(timeout=60)
    assert output == "ok\n", errors
    assert (drive / run_dir.name / "checkpoint_00000.pt.ok").exists()
    assert json.loads((run_dir / "training_state.json").read_text())["drive"]["state"] == "ok"
    setup_drive_backup(None)
    assert configured_drive_backup() is None


def test_drive_setup_belongs_to_one_project_folder(tmp_path: Path) -> None:
    """Breaks: a setting of the whole account, and one that a copy of the project takes along."""
    ours, theirs = Path(model_persistence.__file__).parent, tmp_path / "another checkout"
    shutil.copytree(ours / "persistence", theirs / "persistence")
    (tmp_path / "link").symlink_to(ours)

    def said_in(project: Path, code: str) -> str:
        code = f"import sys; sys.path[:0] = sys.argv[1:]; from persistence.drive import *; {code}"
        output, errors = python("-c", code, str(project)).communicate(timeout=60)
        assert not errors
        return output

    setup_drive_backup(tmp_path / "Drive")
    shutil.copytree(ours / "persistence", theirs / "later" / "persistence")
    ask = "print(configured_drive_backup())"
    assert said_in(theirs / "later", ask) == "None\n"
    own = f"setup_drive_backup({str(tmp_path / 'Other')!r}); {ask}"
    assert said_in(theirs, own).splitlines()[-1] == str(tmp_path / "Other")
    assert said_in(tmp_path / "link", ask) == f"{tmp_path / 'Drive'}\n"
    assert said_in(theirs, "setup_drive_backup(None)") == "Drive backup disabled\n"
    assert configured_drive_backup() == tmp_path / "Drive"


def test_drive_that_is_not_mounted_or_not_writable_is_an_error(tmp_path: Path) -> None:
    if not Path("/content/drive").is_mount():
        with pytest.raises(PersistenceError, match=r"not mounted.*drive\.mount"):
            setup_drive_backup("/content/drive/MyDrive/ARC-EFE-Backups")
    (tmp_path / "file").write_text("")
    with pytest.raises(PersistenceError, match="cannot back up"):
        setup_drive_backup(tmp_path / "file" / "x")
    assert configured_drive_backup() is None


def test_restore_from_files_laid_flat_into_the_drive(run_dir: Path, tmp_path: Path) -> None:
    persistence, toy = filled(run_dir, 2)
    drive = tmp_path / "drive"
    shutil.copytree(run_dir / "checkpoints", drive)
    damage(drive / "checkpoint_00001.pt")
    found = restore_run_from_drive(drive, tmp_path / "new")
    assert found == tmp_path / "new" / "arc_complete_restored"
    assert manager(found).load_latest(*toy.six)["checkpoint_id"] == 0
    assert restore_run_from_drive(tmp_path / "empty", tmp_path / "new2") is None
    with pytest.raises(PersistenceError, match="not a run name"):
        restore_run_from_drive(drive, tmp_path / "new", "../../etc")
    persistence.close()


# -- faults: a bounded share of each row -----------------------------------------------------------
@pytest.fixture(scope="module", autouse=True)
def _start_scripts(scripts: Any) -> None:
    """Those that are needed run from the first test on."""


def test_power_cuts() -> None:
    figures = power_cut.run(states=60)
    assert figures["problems"] == []
    assert figures["good"] == figures["distinct"] == 60


def test_failing_operations() -> None:
    figures = io_errors.run("1/80")
    assert figures["problems"] == []
    assert figures["went_on"] == figures["cases"] > 25


def test_corrupt_and_hostile_files() -> None:
    figures = corruption.run("1/10")
    assert figures["problems"] == []
    assert figures["detected"] == figures["cases"] >= 100
    assert set(figures["by_kind"]) >= {"bit flip", "hostile pickle", "truncation", "garbage JSON"}


def enough(script: str, figures: dict[str, Any]) -> bool:
    """The figure of each script at its bounded share."""
    if script == "kill_points":
        return figures["points"] == figures["resumed"] >= 30 and figures["lost"] == 0
    if script in ("kill_random", "kill_real_script"):
        equal = figures["equal"] == figures["runs"]
        kills = {"kill_random": 8, "kill_real_script": 6}[script]
        return figures["kills"] == kills and figures["lost"] == 0 and equal
    if script == "bitwise":
        return figures["equal"] == figures["runs"] >= 16
    if script == "drive":
        return len(figures["cases"]) == 8
    return figures["good"] == figures["cases"] == 18 and figures["slowest_s"] < 25


@pytest.mark.parametrize("script", SCRIPTS)
def test_fault_script(scripts: Any, script: str) -> None:
    figures = scripts.figures_of(script)
    assert enough(script, figures), figures


def test_resume_cost_does_not_depend_on_the_position(tmp_path: Path) -> None:
    """A resume reads one checkpoint, and draws nothing for the batches it skips."""
    operations = []
    for position in (10, 3000):
        folder = tmp_path / str(position)
        persistence, toy = manager(folder), Toy()
        toy.step(0, 0)
        persistence.save_checkpoint(*toy.six, 0, position, {}, extra=toy.extra())
        persistence.close()
        fs = WatchedFS()
        train(folder, epochs=1, batches=position + 2, save_every=0, fs=fs)
        operations.append(len(fs.log))
    assert operations[0] == operations[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("full_script", "arguments", "figure", "least"),
    [
        ("kill_points", [], "resumed", 200),
        ("signals", [], "good", 18),
        ("kill_random", ["--kills", "1000"], "kills", 1000),
        ("kill_real_script", ["--kills", "1000", "--per_run", "20"], "kills", 1000),
        ("power_cut", ["--states", "2500"], "good", 2000),
        ("io_errors", [], "went_on", 600),
        ("corruption", [], "detected", 800),
        ("bitwise", ["--batches", "32"], "equal", 128),
        ("mutants", [], "caught", 12),
    ],
)
def test_the_full_figures(full_script: str, arguments: list[str], figure: str, least: int) -> None:
    process = python(str(FAULTS / f"{full_script}.py"), *arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    figures = json.loads(output.strip().splitlines()[-1])
    assert figures["problems"] == []
    assert figures[figure] >= least


def test_trees_are_copied_with_their_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one").write_text("x")
    try:
        os.link(tmp_path / "a/one", tmp_path / "a/two")
    except OSError:
        pytest.skip("no hard links here")
    copy_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b/one").read_text() == "x"
    assert (tmp_path / "b/one").samefile(tmp_path / "b/two")
    assert not (tmp_path / "a/one").samefile(tmp_path / "b/one")
