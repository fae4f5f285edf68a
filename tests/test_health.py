"""The health monitor: every fault is said, once, and alone; sound runs hear nothing.

Faults are put into real runs of the script: into the model, where steps are really taken, or around
it (disk, Drive, batches, memory), where a step's figures are those of a sound one. The looks back
are shorter than a user's, and there is one after every batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RULES, Outcome, Script, assert_same_end, make_task, write_tasks

import health
import persistence.drive
import persistence.saving
import trainloop_complete_with_fixes as trainloop
import watching
from curriculum import SizeWarmupCurriculum
from health import CHECKS, Finding, Health, Setting, Storage
from qwen_hybrid_prompt import NoGradient, QwenHybridPrompt

MODEL = ("--max_batches", 10, "--val_pairs", 1, "--planning_steps", 1, "--save_every", 1000)
Prepare = Callable[[Any], None]


@pytest.fixture(autouse=True)
def _short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"WINDOW": 6, "SHORT": 5, "NEWEST": 3, "KEPT": 20, "FLAT_EPOCHS": 2}
    for name, value in short.items():
        monkeypatch.setattr(health, name, value)
    monkeypatch.setattr(watching, "LINE_EVERY", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small tasks, ten rules twice."""
    names = list(RULES)
    tasks = {f"t{i:02d}": make_task(names[i % 10], seed=i, sides=(3, 4)) for i in range(20)}
    return write_tasks(tmp_path_factory.mktemp("health") / "training.json", tasks)


@pytest.fixture
def trained(train: Script, data: Path) -> Callable[..., Outcome]:
    """The script on twenty tasks; its run ended well."""

    def call(*flags: Any, prepare: Prepare | None = None, **where: Any) -> Outcome:
        outcome = train(*flags, prepare=prepare, **{"data": data, **where})
        assert outcome.code == 0, outcome.err
        return outcome

    return call


def names_of(outcome: Outcome) -> list[str]:
    """The findings of a run: rows and lines say the same."""
    rows = outcome.rows("health")
    assert len(rows) == outcome.out.count(": Health: ")
    for row in rows:
        value = float("nan") if row["value"] is None else row["value"]
        told = (row["name"], value, row["message"], row["fix"], row["level"])
        assert Finding(*told).line() in outcome.out
    return [row["name"] for row in rows]


# ---------------------------------------------------------------- faults of the model


def changed_answers(change: Callable[[torch.Tensor], torch.Tensor], which: str) -> Prepare:
    """The agent's logits (steps, Q, H, W, 10) of its first or second answers, changed."""

    def prepare(run: Any) -> None:
        real = run.system.answer

        def answer(reading: Any, refinement: Any = None, **given: Any) -> Any:
            made = real(reading, refinement, **given)
            if which == ("first" if refinement is None else "second"):
                made = dataclasses.replace(made, logits=change(made.logits))
            return made

        run.system.answer = answer

    return prepare


def detached(run: Any) -> None:
    real = run.system.qwen.backbone.forward

    def forward(*args: Any, **given: Any) -> Any:
        made = real(*args, **given)
        made.last_hidden_state = made.last_hidden_state.detach()
        return made

    run.system.qwen.backbone.forward = forward


def gradient_times(factor: float, batches: range) -> Prepare:
    def prepare(run: Any) -> None:
        for p in run.system.qwen.backbone.parameters():
            p.register_hook(lambda g: g * (factor if run.progress.total in batches else 1.0))

    return prepare


def deaf(run: Any) -> None:
    """What the policy does is lost on its way to the second answer."""
    real = run.system.answer
    run.system.answer = lambda reading, refinement=None, **given: real(reading, **given)


def one_cell_worse(logits: torch.Tensor) -> torch.Tensor:
    changed = logits.clone()
    changed[..., 0, 0, :] = changed[..., 0, 0, :].roll(1, -1)
    return changed


def settled(run: Any) -> None:
    with torch.no_grad():
        run.system.policy_rl.rl.std_logit.fill_(-20.0)


def nothing_proposed(run: Any) -> None:
    class Silent:
        def leave_one_out(self, task: Any) -> Any:
            return [None] * len(task.demonstrations)

        def ask(self, tasks: Any) -> None:
            pass

    run.stream.proposals = Silent()


def masked(run: Any) -> None:
    real = run.system.efe_loss.forward

    def forward(**given: Any) -> Any:
        made = real(**given)
        return {**made, "mask_ratio": torch.zeros_like(made["mask_ratio"])}

    run.system.efe_loss.forward = forward


def unretrieved(run: Any) -> None:
    real = run.system.solver2.retrieve

    def retrieve(*given: Any) -> Any:
        found, mask = real(*given)
        return found, torch.zeros_like(mask)

    run.system.solver2.retrieve = retrieve


def set_threshold(run: Any) -> None:
    run.threshold.get_threshold = lambda: 1.0


def set_curriculum(run: Any) -> None:
    run.curriculum = SizeWarmupCurriculum(end=1.0)


def one_colour(run: Any) -> None:
    """The first answers are all of colour 3, the second ones of colour 4."""

    def always(colour: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda logits: (logits + 30.0 * torch.eye(10)[colour]).log_softmax(-1)

    changed_answers(always(3), "first")(run)
    changed_answers(always(4), "second")(run)


MODEL_FAULTS: dict[str, tuple[str, Prepare | None, tuple[Any, ...]]] = {
    "the language model is cut off": ("qwen_gradient_zero", detached, ()),
    "its gradient explodes": ("gradient_exploding", gradient_times(1e5, range(7, 99)), ()),
    "its gradient is infinite once": (
        "gradient_exploding", gradient_times(float("inf"), range(8, 9)), (),
    ),
    "the refinement reaches no answer": ("reward_zero", deaf, ()),
    "the refinement harms a little": (
        "reward_negative", changed_answers(one_cell_worse, "second"), (),
    ),
    "the refinement harms a lot": (
        "d_acc_low", changed_answers(lambda x: x.roll(1, -1), "second"), (),
    ),
    "the policy's spread is at its floor": ("policy_spread_low", settled, ()),
    "hypotheses propose nothing": ("no_proposals", nothing_proposed, ()),
    "no cell counts as hard": ("mask_stuck", masked, ()),
    "the size curriculum stands still": (
        "size_weight_stuck", set_curriculum, ("--epochs", 2, "--max_batches", 2),
    ),
    "the memory's threshold is out of reach": ("memory_not_updating", set_threshold, ()),
    "the memory gives nothing back": ("memory_not_retrieved", unretrieved, ()),
    "learning rates are nearly 0": (
        "loss_flat", None,
        ("--agent_lr", 1e-6, "--qwen_lr", 1e-6, "--epochs", 3, "--batch_size", 30, "--augment",
         "off", "--draw_steps", "off"),
    ),
    "one colour for every cell": ("same_answers", one_colour, ()),
}  # fmt: skip


SLOW = {  # their figures are also given by hand below
    "its gradient is infinite once", "the refinement harms a little",
    "the policy's spread is at its floor", "hypotheses propose nothing",
    "learning rates are nearly 0", "no cell counts as hard",
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=pytest.mark.slow if f in SLOW else ()) for f in MODEL_FAULTS],
)
def test_a_fault_of_the_model_is_said_and_only_it(fault: str, trained: Any) -> None:
    name, prepare, flags = MODEL_FAULTS[fault]
    assert names_of(trained(*MODEL, *flags, prepare=prepare)) == [name]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda loss, batch: loss * float("nan") if batch == 8 else loss, "loss_not_finite"),
        (lambda loss, batch: loss * 20 if batch >= 7 else loss, "loss_spiking"),
    ],
)
def test_a_bad_loss_is_said_and_only_it(
    change: Any, name: str, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    real = trainloop.combined_loss
    monkeypatch.setattr(
        trainloop, "combined_loss", lambda *given: change(real(*given), runs[0].progress.total)
    )
    outcome = trained(*MODEL, prepare=runs.append)
    assert names_of(outcome) == [name]
    if name == "loss_not_finite":
        (row,) = outcome.rows("health")
        assert (row["batch"], row["value"]) == (8, 1.0)  # at once


# ---------------------------------------------------------------- faults of the machine


@pytest.fixture(scope="module")
def sound_figures(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[dict[str, float]]:
    """What `train_step` returned in a sound run of ten batches."""
    script = Script(tmp_path_factory.mktemp("sound"), data)
    place = {"kind", "epoch", "batch", "minutes", "batches_done"}
    rows = script(*MODEL).rows("batch")
    return [{name: value for name, value in row.items() if name not in place} for row in rows]


class HandClock:
    """In place of `time`: it goes on when it is told to, whatever the machine's speed."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    """The clock of whoever watches."""
    by_hand = HandClock()
    monkeypatch.setattr(watching, "time", by_hand)
    return by_hand


@pytest.fixture
def quick(
    trained: Any, sound_figures: Any, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Runs whose steps are not computed, and take a second by the clock: their figures are a sound
    run's, over and over."""

    def call(
        *flags: Any,
        step: Callable[[], None] | None = None,
        changed: dict[str, float] | None = None,
        **where: Any,
    ) -> Outcome:
        figures = itertools.cycle(sound_figures)

        def train_step(run: Any, *given: Any, **more: Any) -> Any:
            clock.tick(1)
            if step is not None:
                step()
            size_weight = run.curriculum.get_size_loss_weight(run.progress.epoch)
            return {**next(figures), "size_weight": size_weight, **(changed or {})}

        monkeypatch.setattr(trainloop, "train_step", train_step)
        return trained(*MODEL, *flags, **where)

    return call


def test_the_whole_gradient_is_measured_before_clipping(sound_figures: Any) -> None:
    """Breaks: the norm after clipping, which can never explode."""
    assert max(part["grad_norm"] for part in sound_figures) > 1.01  # --clip 1
    assert all(part["grad_norm"] >= part["qwen_grad"] for part in sound_figures)


def test_a_slow_collator_is_said_and_only_it(
    quick: Any, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(make: Callable[[int], Any], positions: range, depth: int) -> Iterator[Any]:
        for position in positions:
            clock.tick(3)
            yield make(position)

    monkeypatch.setattr(trainloop, "prefetch", slow)
    outcome = quick()
    assert names_of(outcome) == ["data_bound"]
    assert outcome.rows("health")[0]["value"] == pytest.approx(0.75)


def test_a_leak_is_said_and_only_it(quick: Any) -> None:
    leak: list[bytes] = []

    def step() -> None:
        leak.append(b"x" * (24 << 20))

    outcome = quick("--max_batches", 14, step=step)
    leak.clear()
    assert names_of(outcome) == ["memory_creeping"]
    assert 4 < outcome.rows("health")[0]["value"] < 40  # MiB a batch


def test_a_small_data_set_is_said_and_only_it(quick: Any, tasks_file: Path) -> None:
    outcome = quick(data=tasks_file)
    assert names_of(outcome) == ["few_tasks"]
    assert outcome.rows("health")[0]["value"] == 6


def test_saves_that_come_too_early_are_said_and_only_they(
    quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LINE_EVERY", 5)
    looked = itertools.count()  # the disk takes its time at first
    real = persistence.saving.CheckpointWriter.busy
    monkeypatch.setattr(
        persistence.saving.CheckpointWriter, "busy", lambda w: next(looked) < 10 or real(w)
    )
    assert names_of(quick("--save_every", 1)) == ["saves_behind"]


def test_a_drive_that_hangs_is_said_and_only_it(
    quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = tmp_path / "drive"
    drive.mkdir()
    monkeypatch.setattr(persistence.drive.DriveBackup, "BEHIND_AFTER_S", 0.2)

    hangs, let_go = threading.Event(), threading.Event()

    def hanging(*_: Any) -> bool:
        hangs.set()
        return let_go.wait(60)

    steps = itertools.count()

    def step() -> None:
        if next(steps) > 4:  # a checkpoint was written, or soon is
            assert hangs.wait(60)
            time.sleep(0.1)  # so that it is late

    monkeypatch.setattr(persistence.drive.DriveBackup, "_copy", hanging)
    try:
        outcome = quick("--save_every", 4, "--drive_backup", drive, "--drive_wait", 0, step=step)
    finally:
        let_go.set()
    assert names_of(outcome) == ["drive_behind"]
    assert outcome.rows("health")[0]["value"] >= 1


def test_a_disk_that_is_nearly_full_is_said_and_only_it(
    quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        fields = list(real(path))
        fields[4] = (100 << 20) // fields[1]
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", statvfs)
    outcome = quick()
    assert names_of(outcome) == ["disk_full_soon"]
    assert outcome.rows("health")[0]["value"] == pytest.approx(100, abs=1)


# ---------------------------------------------------------------- sound runs


def fewer_steps(*flags: Any) -> tuple[Any, ...]:
    return ("--val_pairs", 2, "--planning_steps", 2, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--epochs", 2, "--max_batches", 10),
        ("--policy", "off", "--no_memory", "--max_batches", 13, "--epochs", 1),
        ("--amp", "bf16", "--grad_accum", 2, "--qwen_cache_interval", 2, "--max_batches", 13),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)  # fmt: skip
def test_a_sound_run_hears_nothing(
    flags: tuple[Any, ...], trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WINDOW": 12, "NEWEST": 6}.items():  # fewer batches wander too much
        monkeypatch.setattr(health, name, value)
    outcome = trained(*fewer_steps(*flags))
    assert len(outcome.rows("batch")) >= 10
    assert names_of(outcome) == []


def test_a_choice_is_no_fault_and_is_said_once_in_words(trained: Any) -> None:
    outcome = trained(*MODEL, "--qwen_train", "frozen", "--max_batches", 6)
    (row,) = outcome.rows("health")
    assert (row["name"], row["level"], row["batch"]) == ("qwen_not_trained", "note", 0)
    assert "note: Health: qwen_not_trained 0: the language model does not learn, by" in outcome.out


@pytest.mark.parametrize("why", [None, *NoGradient])
def test_each_reason_for_no_gradient_has_its_place(
    quick: Any, monkeypatch: pytest.MonkeyPatch, why: NoGradient | None
) -> None:
    """Breaks: another wording of a reason that makes a fault of a choice."""
    monkeypatch.setattr(QwenHybridPrompt, "without_gradient", lambda _: why)
    outcome = quick(changed={"qwen_grad": 0.0})
    expected = {None: ["qwen_gradient_zero"], NoGradient.REUSED: []}
    assert names_of(outcome) == expected.get(why, ["qwen_not_trained"])


def test_watching_changes_no_bit(
    reference: Outcome, train: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainloop, "watch_batch", lambda *_: None)
    monkeypatch.setattr(trainloop, "watch_epoch", lambda *_: None)
    assert_same_end(train("--epochs", 2), reference)


# ---------------------------------------------------------------- once, and again after a cure


def test_a_resumed_run_says_nothing_twice(quick: Any, tasks_file: Path) -> None:
    first = quick("--max_batches", 4, data=tasks_file)
    assert names_of(first) == ["few_tasks"]
    more = ("--resume", first.folder, "--max_batches", 4, "--epochs", 2)
    again = quick(*more, data=tasks_file)
    assert "Resume: EXACT" in again.out
    assert "Health" not in again.out
    assert {line["epoch"] for line in again.rows("batch")} == {0, 1}
    assert [row["name"] for row in again.rows("health")] == ["few_tasks"]
    assert len(again.run.health.rows) == len(again.rows("batch"))  # of before the resume, too


def test_what_a_checkpoint_holds_is_plain_and_junk_begins_anew() -> None:
    sick = seen_by(Health(), [row(loss=float("nan"))] * 3)
    assert [finding.name for finding in sick.look(SETTING)] == ["loss_not_finite"]
    sick.close_epoch(epoch(0))
    state = sick.state_dict()
    again = Health()
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.look(SETTING) == []
    assert str(again.state_dict()) == str(state)
    for junk in junk_of(state):
        again.load_state_dict(junk)
        assert not again.rows
        assert not again.epochs
        assert not again.ill
        assert again.look(SETTING) == []


def junk_of(state: dict[str, Any]) -> Iterator[Any]:
    """States of other versions and none: one thing in each is not as it should be."""
    yield from (None, 3, [], {}, {"rows": [], "epochs": [{}], "ill": []})
    yield {name: part for name, part in state.items() if name != "format"}
    wrong: dict[str, tuple[Any, ...]] = {
        "format": (0, 2, "1", None, [1]),
        "rows": (3, None, {}, [3], [{}], "rows"),
        "epochs": (3, None, {}, [3], [{}], "epochs"),
        "ill": (3, None, {}, [3], "ill", [["few_tasks"]]),
    }
    for name, parts in wrong.items():
        yield {key: part for key, part in state.items() if key != name}
        for part in parts:
            yield {**state, name: part}
    for part, needed in (("rows", health.ROW_HAS), ("epochs", health.EPOCH_HAS)):
        for figure in needed:
            lacks = {key: value for key, value in state[part][0].items() if key != figure}
            yield {**state, part: [lacks]}
            for value in ("1", None, True, [1.0], 10**400):
                yield {**state, part: [{**state[part][0], figure: value}]}


def test_the_checks_need_no_figure_that_a_state_may_lack() -> None:
    """Breaks: a check that ends the training of a resumed run with a KeyError."""
    full = seen_by(Health(), rows_of(20))
    for number in range(4):
        full.close_epoch(epoch(number, cell_accuracy=0.5))
    state = full.state_dict()
    for part, needed in (("rows", health.ROW_HAS), ("epochs", health.EPOCH_HAS)):
        for figure in {name for row in state[part] for name in row} - needed:
            lacks = [{k: v for k, v in row.items() if k != figure} for row in state[part]]
            again = Health()
            again.load_state_dict({**state, part: lacks})
            assert again.state_dict()[part] == lacks
            again.look(SETTING)
            again.look(dataclasses.replace(SETTING, scaling=True))


def test_a_monitor_that_fails_ends_no_training(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """... and says so, once."""

    def fail(*_: Any) -> Any:
        raise KeyError("unweighted")

    monkeypatch.setattr(health, "CHECKS", (CHECKS[0]._replace(look=fail), *CHECKS[1:]))
    outcome = quick()
    said = "warning: Health: looks no more (KeyError: 'unweighted'); training goes on"
    assert outcome.err.count("Health") == outcome.err.count(said) == 1
    assert outcome.rows("health") == []
    assert len(outcome.rows("batch")) == 10
    assert (outcome.folder / "results.json").exists()


def test_a_finding_comes_again_only_after_the_figure_was_sound() -> None:
    monitor = seen_by(Health(), rows_of(health.SHORT))
    full, empty = Storage(free_bytes=1 << 20), Storage(free_bytes=1 << 40)
    between = Storage(free_bytes=int(1.2 * health.SPARE_BYTES))
    said = [
        [finding.name for finding in monitor.look(SETTING, storage)]
        for storage in (empty, full, full, between, full, empty, full)
    ]
    assert said == [[], ["disk_full_soon"], [], [], [], [], ["disk_full_soon"]]


# ---------------------------------------------------------------- the figures, by hand

SETTING = Setting(n_tasks=100)


def row(number: int = 0, **figures: float) -> dict[str, float]:
    """A sound batch's figures; they wander with its number."""
    wave = 0.1 * (number % 5)
    sound = {
        "loss": 2.0 + wave, "exact": 0.2, "reward": 0.03 - wave / 10, "d_acc": 0.02,
        "fits_frac": 1.0, "mask_ratio": 0.1 + wave, "qwen_grad": 0.02 + wave / 10,
        "grad_norm": 4.0 + wave, "policy_std": 0.5, "group_zero_frac": 0.4, "proposed_frac": 0.9,
        "stored": 2.0, "threshold": 0.22, "retrieved_frac": 1.0, "answer_spread": 1.0,
        "size_weight": 1.0, "pairs": 8.0,
    }  # fmt: skip
    return {**sound, **figures}


def epoch(number: int, **figures: float) -> dict[str, float]:
    """A sound epoch's row: its loss falls."""
    sound = {"loss": 2.0, "accuracy": 0.5, "exact": 0.2, "efe_size": 0.3}
    return {**sound, "efe_cons": 2.0 - 0.3 * number, **figures}


def rows_of(n: int, **figures: float) -> list[dict[str, float]]:
    return [row(i, **figures) for i in range(n)]


def seen_by(monitor: Health, rows: list[dict[str, float]], silent: float = 0.0) -> Health:
    for some in rows:
        monitor.see(some, silent, waited=0.1, resident=10**9)
    return monitor


N = 50  # more batches than any check looks back over here
BY_HAND: dict[str, tuple[dict[str, float], Setting]] = {
    "proposals_alike": ({"group_zero_frac": 0.99}, SETTING),
    "no_proposals": ({"proposed_frac": 0.0}, SETTING),
    "mask_stuck": ({"mask_ratio": 1.0}, SETTING),
    "loss_flat": ({"loss": 1.5}, SETTING),
    "reward_zero": ({"reward": 0.0}, SETTING),
    "reward_negative": ({"reward": -0.01}, SETTING),
    "d_acc_low": ({"d_acc": -0.21, "reward": -0.2}, SETTING),
    "policy_spread_low": ({"policy_std": 0.09}, SETTING),
    "qwen_gradient_zero": ({"qwen_grad": 0.0}, SETTING),
    "memory_not_updating": ({"stored": 0.0}, SETTING),
    "memory_not_retrieved": ({"retrieved_frac": 0.0}, SETTING),
    "same_answers": ({"answer_spread": 0.0}, SETTING),
    "few_tasks": ({}, dataclasses.replace(SETTING, n_tasks=19)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_figures_by_hand(name: str) -> None:
    figures, setting = BY_HAND[name]
    monitor = seen_by(Health(), rows_of(N, **figures))
    assert [finding.name for finding in monitor.look(setting)] == [name]
    assert monitor.look(setting) == []
    # ... and none of it where there is nothing to say it of
    assert seen_by(Health(), rows_of(N)).look(SETTING) == []


@pytest.mark.parametrize(
    ("figures", "setting", "silent"),
    [
        ({"reward": 0.0}, dataclasses.replace(SETTING, refines=False), health.ASKED),
        ({"reward": 0.0, "fits_frac": 0.0}, SETTING, health.ASKED),
        ({"proposed_frac": 0.0}, dataclasses.replace(SETTING, proposes=False), health.ASKED),
        ({"stored": 0.0}, dataclasses.replace(SETTING, memory=False), health.ASKED),
        ({"retrieved_frac": 0.0}, dataclasses.replace(SETTING, memory=False), health.ASKED),
        ({"qwen_grad": 0.0}, SETTING, health.RESTING),
        ({"exact": 1.0, "mask_ratio": 0.0, "group_zero_frac": 1.0}, SETTING, health.ASKED),
        ({"d_acc": -0.19}, SETTING, health.ASKED),
        ({"answer_spread": 0.0, "pairs": 1.0}, SETTING, health.ASKED),
    ],
)
def test_what_is_so_by_choice_or_because_all_is_solved_is_no_fault(
    figures: dict[str, float], setting: Setting, silent: float
) -> None:
    assert seen_by(Health(), rows_of(N, **figures), silent).look(setting) == []


def test_half_precision_may_overflow_now_and_then() -> None:
    scaled = dataclasses.replace(SETTING, scaling=True)
    for n_bad, names in ((4, []), (5, []), (6, ["loss_not_finite"])):
        monitor = Health()
        monitor.rows = type(monitor.rows)(maxlen=N)
        seen_by(monitor, rows_of(N))
        health.SHORT, short = 20, health.SHORT
        seen_by(monitor, [row(loss=float("inf"))] * n_bad)
        assert [finding.name for finding in monitor.look(scaled)] == names
        health.SHORT = short


def test_overfitting_is_three_epochs_of_better_training_and_worse_validation() -> None:
    def epochs(*figures: tuple[float, float]) -> list[str]:
        monitor = seen_by(Health(), rows_of(3))
        for number, (training, validation) in enumerate(figures):
            monitor.close_epoch(epoch(number, accuracy=training, cell_accuracy=validation))
            monitor.rows[-1]["size_weight"] = 0.5
        monitor.epochs[0]["size_weight"] = 0.5
        return [finding.name for finding in monitor.look(SETTING)]

    assert epochs((0.5, 0.70), (0.6, 0.69), (0.7, 0.67)) == ["overfitting"]
    assert epochs((0.5, 0.70), (0.6, 0.69)) == []
    assert epochs((0.5, 0.70), (0.6, 0.71), (0.7, 0.67)) == []
    assert epochs((0.5, 0.70), (0.4, 0.69), (0.7, 0.67)) == []
    assert epochs((0.5, 0.70), (0.6, 0.695), (0.7, 0.69)) == []


def test_the_curriculum_may_rest_at_its_end() -> None:
    def weights(*values: float) -> list[str]:
        monitor = Health()
        for number, value in enumerate(values):
            seen_by(monitor, [row(size_weight=value)])
            monitor.close_epoch(epoch(number))
        return [finding.name for finding in monitor.look(SETTING)]

    assert weights(1.0, 0.833, 0.667, 0.5) == []
    assert weights(0.5, 0.5) == []
    assert weights(0.833, 0.833) == ["size_weight_stuck"]


def test_saves_that_the_disk_refuses_are_said() -> None:
    monitor = seen_by(Health(), rows_of(3))
    assert monitor.look(SETTING, Storage(skipped_saves=2)) == []
    assert monitor.look(SETTING, Storage(skipped_saves=4)) == []  # two more
    (found,) = monitor.look(SETTING, Storage(skipped_saves=4, failed_saves=1))
    assert (found.name, found.value) == ("saves_behind", 1.0)


def test_a_drive_that_is_lost_is_said_and_one_that_waits_is_not() -> None:
    for state, names in (("waiting", []), ("ok", []), ("off", []), ("lost", ["drive_behind"])):
        monitor = seen_by(Health(), rows_of(3))
        storage = Storage(drive=state, drive_files=2)
        assert [finding.name for finding in monitor.look(SETTING, storage)] == names


def test_every_check_has_a_cause_and_a_fix_in_one_line() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS) >= 19
    for number, check in enumerate(CHECKS):
        line = Finding(check.name, 0.0, check.message, check.fix, check.level).line()
        assert max(map(len, line.splitlines())) <= 100
        assert not check.message.endswith(".")
        assert check.fix
        assert set(check.unless) <= {before.name for before in CHECKS[:number]}


def test_the_page_has_a_row_for_every_check() -> None:
    page = (Path(health.__file__).parent / "docs" / "HEALTH.md").read_text(encoding="utf-8")
    named = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(named) == sorted(check.name for check in CHECKS)


def test_waiting_is_timed_and_working_is_not(clock: HandClock) -> None:
    def slowly() -> Iterator[int]:
        for number in range(3):
            clock.tick(2)
            yield number

    spent = trainloop.Clock()
    made = []
    for number in watching.timed(spent, slowly()):
        made.append(number)
        clock.tick(50)
    assert made == [0, 1, 2]
    assert spent.wait_s == pytest.approx(6)
