"""What a resume means: flags and settings, precision, divergence, finished runs,
older checkpoints."""

import argparse
import contextlib
import io
import json
import re
import shlex
import shutil
from typing import Any

import pytest
import torch
from conftest import Script, differing, interrupt_after, work_moves_the_clock

import evaluation
import model_persistence
import resume_rules
import run_scores
import run_state
import trainloop_complete_with_fixes as trainloop
from model_persistence import MismatchError, ModelPersistence
from persistence import restoring

SHORT = (
    "--max_batches", 4, "--val_pairs", 2, "--eval_views", 1, "--policy", "off",
    "--planning_steps", 1, "--batch_size", 4,
)  # fmt: skip
PLAIN = ("--device", "cpu", "--threads", 1)


def save_each(patch):
    """Every save waits, so that a slow disk makes none of them be skipped."""
    real = run_state.save
    patch.setattr(trainloop, "save", lambda *args, **rest: real(*args, **{**rest, "wait": True}))


@pytest.fixture(scope="module")
def stopped_run(tasks_file, tmp_path_factory):
    """A run of 2 x 4 batches, stopped by a signal after 2 of them; copy it, do not change it."""
    script = Script(tmp_path_factory.mktemp("stopped"), tasks_file)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        save_each(patch)
        outcome = script("--epochs", 2, *SHORT, "--save_every", 1)
    assert outcome.code == 130, outcome.err
    return outcome


@pytest.fixture(scope="module")
def finished_run(tasks_file, tmp_path_factory):
    """A finished run of 2 x 4 batches with all its checkpoints; copy it, do not change it."""
    script = Script(tmp_path_factory.mktemp("finished"), tasks_file)
    flags = ("--save_every", 1, "--max_checkpoints", 20)
    with pytest.MonkeyPatch.context() as patch:
        save_each(patch)
        outcome = script("--epochs", 2, *SHORT, *flags)
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture
def copied(train):
    """`copied(outcome)` is the run's folder, copied among this test's runs."""

    def copy(outcome):
        folder = train.folder / "runs" / outcome.folder.name
        shutil.copytree(outcome.folder, folder)
        return folder

    return copy


@pytest.fixture
def again(train):
    """The script with --resume and no other flag than those of the machine; `whole=False` ends it
    where training would begin."""

    def call(folder, *flags, whole=True):
        with pytest.MonkeyPatch.context() as patch:
            if not whole:
                patch.setattr(trainloop, "train_and_score", lambda *_: None)
            return train("--resume", folder, *PLAIN, *flags, fast=False)

    return call


def one_line(outcome, code):
    """The run ended with this code and one line on stderr, which is returned."""
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    (line,) = outcome.err.strip().splitlines()
    return line


def verdict(outcome):
    assert outcome.code == 0, outcome.err
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("Resume: "))
    return line


def command_in(text):
    """The arguments of the last command of the trainer that a text prints."""
    return shlex.split(text[text.rindex("trainloop_complete_with_fixes.py") :].splitlines()[0])[1:]


def call(words):
    """(exit code, console text) of the script with these arguments."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = trainloop.main(words)
    return code, out.getvalue()


def checkpoints_of(folder):
    return sorted(folder.glob("checkpoints/checkpoint_*.pt"))


def rewrite(folder, change):
    """The newest checkpoint, and no other, as another version would have written its `extra`."""
    *older, newest = checkpoints_of(folder)
    payload = torch.load(newest, weights_only=True)
    change(payload["extra"])
    del payload["sealed"]
    for path in (*older, newest):
        path.unlink()
    for name in ("checkpoint_metadata.json", "best_model.pt", "best_metadata.json"):
        (folder / name).unlink(missing_ok=True)
    torch.save(payload, newest)


def break_losses(monkeypatch, batches):
    """The losses of these calls of `train_step`, counted from 0, become infinite."""
    real, calls = trainloop.train_step, iter(range(10**6))

    def step(run, *args, **options):
        forward = run.system.efe_loss.forward

        def broken(**given):
            parts = forward(**given)
            return {**parts, "total": parts["total"] * float("inf")}

        if next(calls) in batches:
            run.system.efe_loss.forward = broken
        try:
            return real(run, *args, **options)
        finally:
            run.system.efe_loss.forward = forward

    monkeypatch.setattr(trainloop, "train_step", step)


# ---------------------------------------------------------------- the table


def flags():
    """Those that --help shows and that set something; an older name is not another flag."""
    all_of_them = trainloop.build_parser()._actions
    actions = [a for a in all_of_them if a.dest not in ("help", argparse.SUPPRESS)]
    shown = [a for a in actions if a.help != argparse.SUPPRESS]
    assert {a.dest for a in actions} == {a.dest for a in shown}
    return shown


def test_every_flag_has_a_meaning_on_a_resume():
    meanings = {"same", "applied", "verdict", "free", "process"}
    assert list(resume_rules.RULES) == [action.dest for action in flags()]
    assert set(resume_rules.RULES.values()) == meanings
    assert set(resume_rules.OF_THE_VOTE) <= set(resume_rules.with_meaning("free"))


@pytest.mark.parametrize("action", flags(), ids=lambda action: action.dest)
def test_a_changed_flag_is_told_as_the_table_says(action):
    rules = resume_rules.RULES
    now: dict[str, Any]
    now = {name: "before" for name, meaning in rules.items() if meaning != "process"}
    now |= {"data_sha256": "1" * 64, "in_use": {"precision": "float32"}}
    assert resume_rules.compare(now, now) == resume_rules.Changes()
    changes = resume_rules.compare(now, {**now, action.dest: "after"})
    told = {"same": changes.refused, "applied": changes.applied, "verdict": changes.noticed}
    # Of data and precision what they are counts, not how they were named.
    by_effect = action.dest in ("data", "amp")
    for meaning, lines in told.items():
        mine = meaning == rules[action.dest] and not by_effect
        assert lines == ([f"{action.option_strings[0]}: saved before, now after"] if mine else [])


# ---------------------------------------------------------------- settings before weights


def test_a_changed_width_is_named_before_a_weight_is_touched(
    copied, again, finished_run, monkeypatch
):
    folder = copied(finished_run)
    monkeypatch.setattr(
        model_persistence, "apply_state", lambda *_: pytest.fail("weights were loaded")
    )
    line = one_line(again(folder, "--width", 48, "--epochs", 3), 3)
    assert "--width: saved 32, now 48" in line
    assert "agent." not in line
    assert "--allow_mismatch" in line


def test_changed_data_is_called_data(copied, train, finished_run, tasks_file):
    folder = copied(finished_run)
    tasks = json.loads(tasks_file.read_text())
    del tasks[min(tasks)]
    other = train.folder / "other.json"
    other.write_text(json.dumps(tasks))
    line = one_line(train("--resume", folder, *PLAIN, data=other, fast=False), 3)
    assert re.search(rf"--data: saved {tasks_file} \(sha256 \w{{8}}\), now {other} \(sha256", line)


def no_config(path):
    path.unlink()


def garbled(path):
    path.write_bytes(b"{\xff")


def nested(path):
    path.write_text("[" * 100_000)


def wrong_types(path):
    config = json.loads(path.read_text())
    config["arguments"] |= {"width": "wide", "epochs": {"a": 1}, "no_memory": 3, "views": "maybe"}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [no_config, garbled, nested, wrong_types])
def test_without_a_usable_config_the_checkpoint_says_the_flags(copied, again, stopped_run, damage):
    folder = copied(stopped_run)
    damage(folder / "config.json")
    outcome = again(folder, whole=damage is no_config)
    assert "EXACT" in verdict(outcome)
    (note,) = (line for line in outcome.out.splitlines() if line.startswith("config.json"))
    assert str(checkpoints_of(stopped_run.folder)[-1].name) in note
    assert outcome.run.args.width == 32
    assert outcome.run.progress.total == (8 if damage is no_config else 2)
    before = stopped_run.run.args
    for name in resume_rules.with_meaning("same", "applied", "verdict", "free"):
        assert getattr(outcome.run.args, name) == getattr(before, name), name
    assert json.loads((folder / "config.json").read_text())["arguments"]["width"] == 32


def test_without_config_and_settings_the_model_says_what_it_can(copied, again, stopped_run):
    folder = copied(stopped_run)
    (folder / "config.json").unlink()

    def older(extra):
        for name in ("config", "flags", "in_use"):
            del extra[name]

    rewrite(folder, older)
    flags = ("--batch_size", 6, "--warmup_batches", 4, "--hypotheses", "off", "--epochs", 2)
    outcome = again(folder, *flags, "--max_batches", 4, whole=False)
    line = verdict(outcome)
    assert "DEGRADED" in line
    assert "does not record --" in line
    assert "--batch_size" in line
    assert outcome.run.args.width == 32
    assert "which lacks --epochs" not in outcome.out
    assert "--max_side" in outcome.out


# ---------------------------------------------------------------- what takes effect


def test_learning_rates_given_on_a_resume_are_the_ones_used(copied, again, stopped_run):
    folder = copied(stopped_run)
    given = {
        "agent_lr": 1e-5, "qwen_lr": 2e-5, "task_lr_factor": 3.0, "weight_decay": 0.25, "clip": 0.5,
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    outcome = again(folder, *words)
    line = verdict(outcome)
    assert "DEGRADED" in line
    for name, value in given.items():
        assert re.search(rf"--{name}: saved [\d.e-]+, now {value}", line), name
    rows = outcome.rows("batch")
    assert len(rows) == 8
    for row in rows[:2]:
        assert row["agent_lr"] == pytest.approx(3e-3 * row["lr_factor"])
    for row in rows[2:]:
        assert row["agent_lr"] == pytest.approx(1e-5 * row["lr_factor"])
        assert row["qwen_lr"] == pytest.approx(2e-5 * row["lr_factor"])
    groups = {group["name"]: group for group in outcome.run.optimizer.param_groups}
    assert groups["task_tokens"]["base_lr"] == pytest.approx(3e-5)
    assert groups["task_tokens"]["weight_decay"] == 0
    assert groups["agent"]["weight_decay"] == 0.25
    assert outcome.checkpoint()["extra"]["config"]["agent_lr"] == 1e-5
    kept = again(folder, "--epochs", 3, whole=False)
    assert "EXACT" in verdict(kept)
    assert kept.run.optimizer.param_groups[0]["base_lr"] == 1e-5


def test_groups_of_another_order_are_refused_by_name():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    saved = torch.optim.SGD([{"params": [a], "name": "x"}, {"params": [b], "name": "y"}], lr=1)
    other = torch.optim.SGD([{"params": [b], "name": "y"}, {"params": [a], "name": "x"}], lr=1)
    restoring._check_optimizer_fit(saved, saved.state_dict(), "file")
    with pytest.raises(MismatchError, match=r"expected \['y', 'x'\], found \['x', 'y'\]"):
        restoring._check_optimizer_fit(other, saved.state_dict(), "file")


# ---------------------------------------------------------------- divergence


def test_the_advice_of_exit_5_works_as_printed(train, monkeypatch):
    monkeypatch.setattr(trainloop, "MAX_SKIPPED_IN_A_ROW", 3)
    with monkeypatch.context() as patch:
        break_losses(patch, range(5, 99))
        save_each(patch)
        ended = train("--epochs", 9, *SHORT, "--save_every", 1)
    line = one_line(ended, 5)
    assert "3 batches in a row" in line
    words = command_in(line)
    assert words[:2] == ["--resume", str(ended.folder)]
    number = int(words[words.index("--checkpoint") + 1])
    assert float(words[words.index("--agent_lr") + 1]) == pytest.approx(1e-3)
    named = ended.folder / "checkpoints" / f"checkpoint_{number:05d}.pt"
    assert torch.load(named, weights_only=True)["extra"]["progress"]["total"] == 5
    newer = [path.name for path in checkpoints_of(ended.folder) if path > named]
    code, out = call([*words, "--epochs", "2"])
    assert code == 0, out
    assert "--agent_lr: saved 0.003, now 0.001" in out
    aside = sorted(path.name for path in (ended.folder / "set_aside").glob("*.pt"))
    assert aside == newer
    assert ("Set aside in" in out) == bool(newer)
    ids = {int(path.stem[-5:]) for path in checkpoints_of(ended.folder)}
    assert not ids & {int(name[11:16]) for name in aside}


def test_a_count_of_bad_batches_begins_anew_on_a_resume(train, again, monkeypatch):
    monkeypatch.setattr(trainloop, "MAX_SKIPPED_IN_A_ROW", 3)
    with monkeypatch.context() as patch:
        break_losses(patch, (1, 2))
        interrupt_after(patch, 3)
        stopped = train("--epochs", 2, *SHORT)
    assert stopped.code == 130, stopped.err
    assert stopped.checkpoint()["extra"]["progress"]["skipped_in_a_row"] == 2
    with monkeypatch.context() as patch:
        break_losses(patch, (0, 1))
        outcome = again(stopped.folder)
    assert "EXACT" in verdict(outcome)
    assert outcome.run.progress.skipped == 4


def test_no_checkpoint_is_saved_within_bad_batches(train, monkeypatch):
    with monkeypatch.context() as patch:
        break_losses(patch, (1, 2))
        save_each(patch)
        outcome = train("--epochs", 1, *SHORT, "--save_every", 1)
    assert outcome.code == 0, outcome.err
    at = [entry["batch"] for entry in ModelPersistence(outcome.folder).checkpoints.values()]
    assert at == [0, 3, 3, 3]  # the last two are the epoch's own


def test_an_earlier_checkpoint_can_be_named(copied, again, finished_run):
    folder = copied(finished_run)
    results = (folder / "results.json").read_bytes()
    everything = {path.name for path in checkpoints_of(folder)}
    named = verdict(again(folder, "--checkpoint", 2, whole=False))
    assert "EXACT" in named
    assert "checkpoint 2, epoch 0, batch 2" in named
    for name in ("checkpoint_metadata.json", "training_state.json", "best_model.pt"):
        (folder / name).unlink()  # what else remembers the ids
    outcome = again(folder)
    assert "from checkpoint 2," in verdict(outcome)
    assert outcome.figures() == finished_run.figures()
    aside = {path.name for path in (folder / "set_aside").glob("*.pt")}
    assert aside == {name for name in everything if name > "checkpoint_00002.pt"}
    assert (folder / "set_aside" / "results.json").read_bytes() == results
    assert not aside & {path.name for path in checkpoints_of(folder)}
    assert (folder / "best_model.pt").exists()
    missing = one_line(again(folder, "--checkpoint", 5), 3)
    assert "no checkpoint 5" in missing
    assert "checkpoint_00005.pt" in missing  # it lies among those set aside
    assert "There are: 0, 1, 2," in missing


def test_best_can_be_named_and_a_refusal_moves_nothing(copied, again, finished_run):
    folder = copied(finished_run)
    before = checkpoints_of(folder)
    refused = one_line(again(folder, "--checkpoint", 2, "--seed", 7), 3)
    assert "--seed: saved 0, now 7" in refused
    assert checkpoints_of(folder) == before
    assert not (folder / "set_aside").exists()
    best = torch.load(folder / "best_model.pt", weights_only=True)
    outcome = again(folder, "--checkpoint", "best", "--epochs", 2)
    assert "EXACT" in verdict(outcome)
    aside = sorted((folder / "set_aside").glob("*.pt"))
    assert all(int(path.stem[-5:]) > best["checkpoint_id"] for path in aside)
    assert outcome.figures() == finished_run.figures()


@pytest.mark.parametrize("words", [("--checkpoint", 1), ("--resume", "--checkpoint", "x")])
def test_a_checkpoint_without_a_run_is_an_argument_error(train, words):
    assert "--checkpoint" in one_line(train(*words), 2).split("usage")[-1]


def test_a_named_checkpoint_is_never_a_fresh_run(train):
    assert "nothing to resume" in one_line(train("--resume", "auto", "--checkpoint", 1), 3)


# ---------------------------------------------------------------- precision and hardware


def test_every_precision_goes_on_from_every_other(train, again):
    first = train(
        "--epochs", 1, "--max_batches", 1, "--val_pairs", 1, "--eval_views", 1,
        "--qwen_cache_interval", 3,
    )  # fmt: skip
    assert first.code == 0, first.err
    names = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}
    used = "off"
    for epochs, amp in enumerate(("bf16", "fp16", "off", "fp16"), start=2):
        outcome = again(first.folder, "--epochs", epochs, "--amp", amp)
        line = verdict(outcome)
        assert "EQUIVALENT" in line
        assert f"precision: saved {names[used]}, now {names[amp]}" in line
        assert ("loss scaling starts afresh" in line) == (amp == "fp16")
        assert outcome.run.progress.epoch == epochs
        used = amp
    scale = outcome.checkpoint()["extra"]["scaler"]["scale"]
    same = again(first.folder, "--epochs", epochs + 1)
    assert "EXACT" in verdict(same)
    assert same.run.args.amp == "fp16"
    assert same.checkpoint()["extra"]["scaler"]["scale"] <= scale


def test_another_word_for_the_same_precision_is_exact(copied, again, stopped_run):
    assert "EXACT" in verdict(again(copied(stopped_run), "--amp", "off", whole=False))


@pytest.mark.parametrize(
    ("words", "word", "why"),
    [
        (("--val_pairs", 3), "EQUIVALENT", "--val_pairs: saved 2, now 3"),
        (("--best_metric", "cell_accuracy"), "EQUIVALENT", "now cell_accuracy"),
        (("--stop_confidence", 0.5), "EQUIVALENT", "--stop_confidence: saved 0.8, now 0.5"),
        (("--max_batches", 5), "DEGRADED", "--max_batches: saved 4, now 5"),
        (("--save_every", 3, "--eval_views", 2), "EXACT", ""),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else "",
)
def test_what_is_measured_otherwise_is_not_called_exact(
    copied, again, stopped_run, words, word, why
):
    line = verdict(again(copied(stopped_run), *words, whole=False))
    assert line.startswith(f"Resume: {word} (")
    assert why in line


def test_other_hardware_libraries_and_program_are_not_called_exact(
    copied, again, stopped_run, monkeypatch
):
    folder = copied(stopped_run)

    def elsewhere(extra):
        extra["in_use"] |= {"device": "Tesla T4", "program": "0" * 40}

    rewrite(folder, elsewhere)
    monkeypatch.setattr(restoring, "version_of_package", lambda _: "9.9")
    line = verdict(again(folder, whole=False))
    assert line.startswith("Resume: EQUIVALENT (")
    assert "device: saved Tesla T4, now cpu" in line
    assert re.search(r"transformers: [\d.]+\S* -> 9\.9", line)
    assert f"program: saved {'0' * 40}" in line


def test_other_validation_pairs_get_a_baseline_and_a_best_of_their_own(
    copied, again, train, finished_run
):
    folder = copied(finished_run)
    before = (folder / "best_model.pt").read_bytes()
    outcome = again(folder, "--val_pairs", 4, "--epochs", 3)
    assert outcome.code == 0, outcome.err
    assert "Validation: 4 pairs now, 2 before" in outcome.out
    fresh = train("--dry_run", *SHORT)
    assert fresh.code == 0
    untrained = run_scores.evaluate(
        fresh.run, finished_tasks(train), set(validation(train, 4)), 1, title="x"
    )
    start = outcome.rows("start")[-1]["untrained"]
    assert start["n"] == 4
    assert start == json.loads(json.dumps(untrained))
    last = outcome.rows("epoch")[-1]
    assert last["accuracy_delta"] == last["cell_accuracy"] - untrained["cell_accuracy"]
    assert (folder / "set_aside" / "best_model.pt").read_bytes() == before
    best = json.loads((folder / "best_metadata.json").read_text())
    assert best["epoch"] == 2
    assert best["value"] == pytest.approx(last["accuracy_delta"])


def finished_tasks(train):
    from dataset_arc import load_tasks

    return load_tasks(train.data)


def validation(train, n):
    return evaluation.validation_keys(finished_tasks(train).train, n, 0)


# ---------------------------------------------------------------- how much was lost, and the end


def test_batches_lost_counts_with_max_batches(copied, again, finished_run):
    folder = copied(finished_run)
    assert finished_run.run.stream.n_batches(0) > 4
    for path in checkpoints_of(folder)[2:]:
        path.unlink()
    line = verdict(again(folder, whole=False))
    assert "epoch 0, batch 1" in line
    assert "batches lost: 6" in line


def test_a_finished_run_says_so_and_keeps_its_results(copied, again, finished_run, monkeypatch):
    folder = copied(finished_run)
    results = (folder / "results.json").read_bytes()
    rows = (folder / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(run_scores, "evaluate", lambda *_, **__: pytest.fail("it voted again"))
        outcome = again(folder, "--quiet")
    assert outcome.code == 0, outcome.err
    assert "Nothing is left to train: all epochs are done (--epochs 2)" in outcome.out
    assert "results.json stays as it is" in outcome.out
    assert "Going on" not in outcome.out
    assert (folder / "results.json").read_bytes() == results
    assert (folder / "metrics.jsonl").read_bytes() == rows
    code, out = call(command_in(outcome.out.split("To train more")[1]))
    assert code == 0, out
    assert "EXACT" in out
    assert json.loads((folder / "results.json").read_text())["batch"] > 8


def test_a_finished_run_votes_again_where_its_vote_is_missing_or_other(copied, again, finished_run):
    folder = copied(finished_run)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").unlink()
    outcome = again(folder)
    assert outcome.code == 0, outcome.err
    assert "Nothing is left to train" in outcome.out
    made = json.loads((folder / "results.json").read_text())
    untimed = {"minutes": 0, "trained_minutes": 0}
    assert made | untimed == results | untimed
    more = again(folder, "--eval_views", 2)
    assert more.code == 0, more.err
    assert json.loads((folder / "results.json").read_text())["views"] == 2
    assert "stays as it is" in again(folder).out


@pytest.fixture
def working_clock(monkeypatch):
    """A clock that the work moves: a step takes a second, a batch of predictions as long."""
    work_moves_the_clock(monkeypatch)


TIMED = ("--planning_steps", 1, "--policy", "off", "--eval_views", 1, "--val_pairs", 1)


def test_a_spent_budget_trains_and_votes_no_more(train, again, working_clock, monkeypatch):
    flags = ("--time_budget", 0.3, "--schedule", "constant", *TIMED)
    first = train(*flags, "--save_every", 5)
    assert first.code == 0, first.err
    results, rows = (first.folder / "results.json").read_bytes(), first.figures()
    for words in ((), ("--eval_views", 2)):
        outcome = again(first.folder, *words)
        assert outcome.code == 0, outcome.err
        assert "Nothing is left to train: --time_budget 0.3 is spent" in outcome.out
        assert "results.json stays" in outcome.out
        assert outcome.figures() == rows
        assert (first.folder / "results.json").read_bytes() == results
    words = command_in(outcome.out.split("To train more")[1])
    assert words[words.index("--time_budget") + 1] == "0.6"
    with monkeypatch.context() as patch:
        patch.setattr(trainloop, "MAX_SKIPPED_IN_A_ROW", 0)  # ends it after a batch
        code, out = call(words)
    assert code == 5, out
    assert f"Going on at epoch {first.run.progress.epoch}, batch 0" in out


def test_a_fallen_learning_rate_is_extended_from_before_its_fall(
    train, again, working_clock, monkeypatch
):
    first = train("--time_budget", 0.5, *TIMED, "--save_every", 3, "--max_checkpoints", 60)
    assert first.code == 0, first.err
    rows = first.figures()
    outcome = again(first.folder)
    assert "Nothing is left to train: " in outcome.out
    assert outcome.figures() == rows
    words = command_in(outcome.out.split("To train more")[1])
    assert "--checkpoint" in words
    assert words[words.index("--time_budget") + 1] == "1"
    with monkeypatch.context() as patch:
        patch.setattr(trainloop, "MAX_SKIPPED_IN_A_ROW", 0)  # ends it after a batch
        code, out = call(words)
    assert code == 5, out
    assert "--time_budget: saved 0.5, now 1" in out
    assert "Going on at epoch" in out


def test_an_epoch_that_the_schedule_ended_is_still_closed(train, again, monkeypatch):
    real, calls = run_scores.evaluate, []

    def evaluate(*args, **options):
        calls.append(1)
        if len(calls) == 2:  # the validation of the only epoch
            raise run_state.StopRequested
        return real(*args, **options)

    flags = ("--schedule_batches", "1:3", "--val_pairs", 1, "--eval_views", 1, "--policy", "off")
    with monkeypatch.context() as patch:
        patch.setattr(run_scores, "evaluate", evaluate)
        patch.setattr(trainloop, "leave_early", lambda *_: 130)
        stopped = train(*flags)
    assert stopped.code == 130
    outcome = again(stopped.folder)
    assert "EXACT" in verdict(outcome)
    assert len(outcome.rows("batch")) == 3
    assert len(outcome.rows("epoch")) == 1


# ---------------------------------------------------------------- checkpoints of another version


PARTS = (
    "scaler", "policy_optimizer", "choice_optimizer", "average", "schedule", "curriculum",
    "threshold", "monitor", "clock", "qwen_cache",
)  # fmt: skip


@pytest.fixture(scope="module")
def set_up(tasks_file, tmp_path_factory):
    """A run that is set up, and the `extra` of one that has trained."""
    script = Script(tmp_path_factory.mktemp("parts"), tasks_file)
    outcome = script("--dry_run", *SHORT, "--amp", "fp16")
    run = outcome.run
    batch, targets = run.stream.batch(0, 0)
    trainloop.train_step(run, batch, targets)
    return run, run_state.checkpoint_extra(run)


def test_every_part_of_the_state_is_tried(set_up):
    run, _ = set_up
    assert set(PARTS) == {*run.state(), "qwen_cache"} - {"progress"}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["missing", "of another kind"])
def test_a_part_that_the_checkpoint_lacks_is_named_and_fresh(set_up, part, damage):
    run, extra = set_up
    given = dict(extra)
    if damage == "missing":
        del given[part]
    elif part != "clock":  # any figures of a clock are taken
        given[part] = {"unheard": 1} if part != "average" else {"average": []}
    else:
        given[part] = [1]
    missing, fresh = run_state.restore(run, {"extra": given})
    (line,) = fresh
    assert f"'{part}'" in line
    assert missing == []
    if part == "average":
        for p, average in zip(run.average.params, run.average.average, strict=True):
            assert torch.equal(p, average)


def test_an_older_checkpoint_goes_on_without_what_it_lacks(copied, again, stopped_run):
    folder = copied(stopped_run)

    def older(extra):
        for name in (*PARTS, "rng", "flags", "in_use", "average_names"):
            del extra[name]
        del extra["progress"]["spent_budget"], extra["progress"]["untrained"]

    rewrite(folder, older)
    line = verdict(again(folder, whole=False))
    assert line.startswith("Resume: DEGRADED (")
    for name in (*PARTS, "rng"):
        assert f"'{name}'" in line, name
    assert "does not record precision, device, program" in line


def no_progress(extra):
    del extra["progress"]


def no_place(extra):
    del extra["progress"]["total"]


def nothing(extra):
    extra.clear()


@pytest.mark.parametrize("change", [no_progress, no_place, nothing])
def test_a_checkpoint_without_a_position_is_refused(copied, again, stopped_run, change):
    folder = copied(stopped_run)
    rewrite(folder, change)
    line = one_line(again(folder), 3)
    assert "'progress'" in line
    assert "checkpoint_" in line


def test_a_checkpoint_of_the_version_before_this_table_resumes(copied, again, stopped_run):
    folder = copied(stopped_run)
    new = {"time_budget", "max_batches", "best_metric", "val_pairs", "stop_confidence"}

    def older(extra):
        del extra["flags"], extra["in_use"]
        extra["config"] = {k: v for k, v in extra["config"].items() if k not in new}
        extra["config"] |= {"qwen_train": "auto", "schedule_batches": ""}

    rewrite(folder, older)
    line = verdict(again(folder, whole=False))
    assert line.startswith("Resume: EQUIVALENT (")
    assert "does not record --time_budget, --max_batches, --best_metric, --val_pairs" in line


# ---------------------------------------------------------------- a frozen language model


def test_a_frozen_run_goes_on_bit_for_bit_though_its_kept_states_are_gone(train, monkeypatch):
    """Breaks: states that differ between a hit and a miss, or counts of them in a checkpoint."""
    flags = (
        "--epochs", 2, *SHORT, "--max_batches", 2, "--qwen_train", "frozen", "--save_every", 1,
        "--hypotheses", "off",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        save_each(patch)
        whole = train(*flags, runs="whole")
        interrupt_after(patch, 3)
        stopped = train(*flags)
    assert (whole.code, stopped.code) == (0, 130), whole.err + stopped.err
    with monkeypatch.context() as patch:
        save_each(patch)
        resumed = train("--resume", stopped.folder, *PLAIN, fast=False)
    assert "EXACT" in verdict(resumed)
    states = [outcome.run.system.qwen.states for outcome in (whole, resumed)]
    assert states[1].misses > 0, "the second process had nothing kept"
    assert states[0].misses == len(states[0]) > 0
    assert states[0].hits > 2 * states[0].misses, "evaluation and later epochs look up"
    ends = [torch.load(checkpoints_of(o.folder)[-1], weights_only=True) for o in (whole, resumed)]
    for end in ends:
        for name in ("clock", "flags"):  # seconds, and where the runs lie
            end["extra"].pop(name)
        for name in ("timestamp", "run_id", "sealed", "environment", "metrics", "checkpoint_id"):
            end.pop(name)
    assert differing(*ends) == []
    line = "[Epoch 1] Frozen Qwen: "
    assert any(text.startswith(line) for text in whole.out.splitlines())


def test_a_run_from_before_a_flag_goes_on_as_it_was(train):
    """Breaks: a resumed run takes drawn planning steps that it never took, or batches of another
    bound."""
    first = train(*SHORT, "--draw_steps", "off", "--planning_steps", 2, "--epochs", 1)
    assert first.code == 0, first.err
    file = first.folder / "config.json"
    config = json.loads(file.read_text())
    for name in resume_rules.BEFORE_THE_FLAG:
        del config["arguments"][name]
    file.write_text(json.dumps(config))
    resumed = train("--resume", first.folder, *PLAIN, "--epochs", 2, fast=False)
    assert resumed.code == 0, resumed.err
    assert "EXACT" in resumed.out
    assert json.loads(file.read_text())["arguments"]["draw_steps"] == "off"


def test_a_checkpoint_from_before_a_flag_says_what_was_done_then():
    """Breaks: the missing flag counts as today's default, or overrules what is recorded."""
    assert resume_rules.settings_of({"config": {"seed": 3}}) == {
        "seed": 3,
        **resume_rules.BEFORE_THE_FLAG,
    }
    assert resume_rules.settings_of({"config": {"draw_steps": "on"}})["draw_steps"] == "on"
    assert resume_rules.settings_of({}) == {}
