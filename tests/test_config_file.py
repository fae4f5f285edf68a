"""`--config FILE`: a run's settings once more, bit for bit, and what is refused in such a file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SCRIPT, Outcome, assert_same_end, environment, one_line_error

import config_file
import trainloop_complete_with_fixes as trainloop
from command_line import UserError

OTHER = (
    "--seed", 3, "--max_batches", 3, "--agent_lr", "2e-3", "--schedule_batches", "1:3",
    "--batch_size", 4, "--no_memory", "--augment", "off", "--clip", "0.5", "--threads", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def first(tasks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run with flags of every kind: numbers, a pair, a switch, a choice."""
    from conftest import Script

    outcome = Script(tmp_path_factory.mktemp("first"), tasks_file)(*OTHER)
    assert outcome.code == 0, outcome.err
    return outcome


def config_of(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((outcome.folder / "config.json").read_text())
    return found


def written(folder: Path, content: Any) -> Path:
    path = folder / "given.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def again(train: Any, *flags: Any) -> Outcome:
    """The script without any flag of the suite's but where its runs go."""
    train.arguments = lambda *given, **_: [
        "--runs_dir", str(train.folder / "runs"), *map(str, given),
    ]  # fmt: skip
    outcome: Outcome = train(*flags)
    return outcome


def test_the_same_settings_give_the_same_bits(train: Any, first: Outcome) -> None:
    """Breaks: a flag of the file that is lost, or taken in another type than the parser's."""
    outcome = again(train, "--config", first.folder / "config.json")
    assert outcome.code == 0, outcome.err
    assert_same_end(first, outcome)
    assert outcome.folder.parent != first.folder.parent
    ours, theirs = config_of(outcome)["arguments"], config_of(first)["arguments"]
    assert ours.pop("config") == str(first.folder / "config.json")
    assert theirs.pop("config") is None
    for one in (ours, theirs):
        one.pop("runs_dir")
    assert ours == theirs
    assert "not the same as then" not in outcome.out


def test_a_run_s_folder_will_do_and_given_flags_win(train: Any, first: Outcome) -> None:
    outcome = again(train, "--config", first.folder, "--seed", 4, "--dry_run")
    assert outcome.code == 0, outcome.err
    args = outcome.run.args
    assert args.seed == 4
    assert (args.batch_size, args.schedule_batches, args.views) == (4, (1, 3), "off")
    assert args.no_memory
    assert not config_of(first)["arguments"]["dry_run"]


def test_threads_are_those_in_use_where_none_were_given(train: Any, first: Outcome) -> None:
    """Breaks: other bits on a machine with another number of cores."""
    config = config_of(first)
    assert config["threads"] == 1
    config["arguments"]["threads"], config["threads"] = None, 3
    path = written(train.folder, config)
    outcome = again(train, "--config", path, "--dry_run")
    assert outcome.code == 0
    assert outcome.run.args.threads == outcome.run.at_once == 3


def test_a_file_from_before_a_flag_means_what_runs_did_then(train: Any, first: Outcome) -> None:
    config = config_of(first)
    del config["arguments"]["draw_steps"]
    path = written(train.folder, config)
    assert trainloop.read_flags(["--config", str(path)]).draw_steps == "off"
    path = written(train.folder, {"arguments": {"width": 48}})  # by hand: the defaults of today
    args = trainloop.read_flags(["--config", str(path)])
    assert (args.draw_steps, args.width, args.epochs) == ("on", 48, None)


def test_the_clock_gives_way_to_batches(train: Any) -> None:
    """Breaks: the flags that a --time_budget run prints, put beside its own config.json."""
    path = str(written(train.folder, {"arguments": {"time_budget": 4.0, "schedule": "wsd"}}))
    assert trainloop.read_flags(["--config", path]).time_budget == 4.0
    args = trainloop.read_flags(["--config", path, "--schedule_batches", "3:9:9"])
    assert (args.time_budget, args.schedule_batches) == (None, (3, 9, 9))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"width": "wide"}, "--width: 'wide' is not a number"),
        ({"width": 97}, "--width 97: use a multiple of 48"),
        ({"optimizer": "sgd"}, "--optimizer: 'sgd' is not one of muon, adamw"),
        ({"views": "maybe"}, "--augment: 'maybe' is not one of on, off"),
        ({"no_memory": 3}, "--no_memory: 3 is not true or false"),
        ({"epochs": 0}, "--epochs: 0 must be at least 1"),
        ({"seed": None}, "--seed: it is missing"),
        ({"schedule_batches": [9, 3]}, "--schedule_batches: '9:3' is not A:B"),
        ({"device": "tpu"}, "--device tpu: use auto, cpu, cuda or cuda:N"),
        ({"learning_rate": 1, "width": 48}, "no flag --learning_rate"),
    ],
)
def test_a_value_that_the_flag_would_refuse_is_refused_by_the_flag_s_name(
    train: Any, arguments: Any, expected: str
) -> None:
    path = written(train.folder, {"arguments": arguments})
    assert expected in one_line_error(again(train, "--config", path), 2)
    assert not (train.folder / "runs").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([1], 'has no "arguments"'),
        ({"arguments": 3}, 'has no "arguments"'),
        ({"width": 48}, 'has no "arguments"'),
    ],
)
def test_another_file_is_refused_with_what_it_lacks(
    train: Any, content: Any, expected: str
) -> None:
    path = train.folder / "given.json" if content is None else written(train.folder, content)
    line = one_line_error(again(train, "--config", path), 3)
    assert expected in line
    assert "given.json" in line
    assert not (train.folder / "runs").exists()


def test_it_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    """Breaks: seconds of imports, or a traceback, before a word about the file."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", str(tmp_path / "none.json")],
        env={**environment(tmp_path), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: --config ")
    assert len(done.stderr.splitlines()) == 1


def test_a_resumed_run_has_its_own_flags(train: Any, first: Outcome) -> None:
    line = one_line_error(again(train, "--config", first.folder, "--resume", first.folder), 2)
    assert "--config and --resume" in line


def test_other_data_and_versions_are_said(train: Any, first: Outcome) -> None:
    config = config_of(first)
    config["data"]["sha256"] = "0123456789abcdef"
    config["versions"]["torch"] = "1.0"
    del config["versions"]["numpy"]
    outcome = again(train, "--config", written(train.folder, config), "--dry_run")
    assert outcome.code == 0, outcome.err
    (line,) = (line for line in outcome.out.splitlines() if "not the same as then" in line)
    assert "data then 01234567, now " in line
    assert "torch then 1.0, now " in line
    assert "numpy" not in line


@pytest.mark.parametrize(
    ("then", "now", "differs"),
    [
        ("2.13.0+cu130", "2.13.0", False),
        ("2.13.0", "2.13.0+cpu", False),
        ("2.13.0+cpu", "2.13.0+cpu", False),
        ("2.13.0+cu130", "2.13.0+cpu", True),
        ("2.13.0+cu130", "2.13.1", True),
        ("2.13.0+cu130", None, True),
        (None, "2.13.0+cpu", True),
        (None, None, False),
        (["2.13.0"], "2.13.0", True),
    ],
)
def test_a_version_without_its_build_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: Any, now: str | None, differs: bool
) -> None:
    """Breaks: torch "not the same as then" on the machine that wrote the file."""
    path = written(tmp_path, {"arguments": {}, "versions": {"torch": then}})
    monkeypatch.setattr(config_file, "version_of_package", lambda _: now)
    args = argparse.Namespace(config=str(path), data_sha256="")
    assert len(config_file.differences(args)) == differs


def test_what_was_typed_is_kept_a_line_a_start(train: Any) -> None:
    done = train("--max_batches", 1)
    assert train("--resume", "--epochs", 2, "--max_batches", 1).code == 0
    commands = config_of(done)["commands"]
    assert len(commands) == 2
    assert commands[0].endswith("--max_batches 1")
    assert "--resume --epochs 2 --max_batches 1" in commands[1]


def test_a_pipe_or_device_in_its_place_is_not_waited_for(tmp_path: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "~nobody_of_that_name/c"):
        with pytest.raises(UserError, match=r"no regular file|No such file"):
            config_file.read_config(str(path))
