"""The lines of console and training.log: the contract to the letter, and what they leave out."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from conftest import make_tasks, write_tasks

import loss_function
import reward_shaping
import run_state
import trainloop_complete_with_fixes as trainloop
import watching

NUMBER = r"\d+\.\d{4}"

BATCH_LINE = re.compile(
    rf"^\[Batch (?P<batch> {{0,3}}\d+)\] Reward: (?P<reward>[+-]{NUMBER}) \| "
    rf"Loss: (?P<loss>{NUMBER}) \| Qwen_grad: (?P<grad>\d\.\d\de[+-]\d\d) \| "
    rf"Mask_ratio: (?P<mask>[01]\.\d{{4}})$"
)
RECENT_LINE = re.compile(
    rf"^ {{13}}last (?P<n>\d+) on average: reward (?P<reward>[+-]{NUMBER}), "
    rf"d_acc (?P<d_acc>[+-]{NUMBER}), loss (?P<loss>{NUMBER}), exact (?P<exact>[01]\.\d{{3}})$",
    re.MULTILINE,
)

SUMMARY = re.compile(
    rf"""^={{70}}
EPOCH (?P<epoch>\d+) SUMMARY
={{70}}
  Average Loss: (?P<loss>{NUMBER})
  Average RL Reward: (?P<reward>[+-]{NUMBER})
  Qwen Gradient Norm: (?P<grad>\d\.\d\de[+-]\d\d)(?P<idle> \| Qwen: .+)?
  Size Warmup Weight: (?P<size>\d\.\d{{3}})
  Memory Threshold: (?P<threshold>\d\.\d{{4}})
  Memory updates: (?P<updates>\d+)
  Average Mask Ratio: (?P<mask>[01]\.\d{{4}})
  Average EFE Loss: (?P<efe>{NUMBER})
  Average EFE parts: (?P<parts>(?:\w+ {NUMBER}(?:, )?){{8}})
  Average reward parts: (?P<deltas>(?:\w+ [+-]{NUMBER}(?:, )?){{4}})
={{70}}
\[Epoch (?P=epoch)\] Val Accuracy: (?P<val>[01]\.\d{{4}}) \((?P<right>\d+)/(?P<n>\d+)\)
\[Epoch (?P=epoch)\] Accuracy Delta: (?P<delta>[+-]\d\.\d{{4}})
\[Epoch (?P=epoch)\] Time: \d+\.\d\ds$""",
    re.MULTILINE,
)


def test_batch_lines_are_to_the_letter(reference: Any) -> None:
    lines = [line for line in reference.out.splitlines() if line.startswith("[Batch")]
    assert len(lines) == 2  # batch 0 of each epoch
    for line in lines:
        found = BATCH_LINE.match(line)
        assert found, line
        assert found["batch"] == "   0"
        assert float(found["grad"]) > 0
        assert 0 <= float(found["mask"]) <= 1  # the tiny tasks can be right from the start
        assert math.isfinite(float(found["loss"]))


def test_a_batch_line_comes_every_fifty_batches(train: Any) -> None:
    rules = ["same", "flip"] * 26
    data = write_tasks(train.folder / "d.json", make_tasks(rules, sides=(1, 2), n_demonstrations=2))
    outcome = train(
        "--batch_size", 2, "--epochs", 1, "--val_pairs", 1, "--qwen_train", "frozen",
        "--planning_steps", 1, "--policy", "off", data=data,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    index = (outcome.folder / "checkpoint_metadata.json").read_text(encoding="utf-8")
    lines: list[Any] = [
        BATCH_LINE.match(line) for line in outcome.out.splitlines() if "[Batch" in line
    ]
    assert [line["batch"] for line in lines] == ["   0", "  50"]
    rows = outcome.rows("batch")
    assert len(rows) == 52
    assert float(lines[1]["loss"]) == pytest.approx(rows[50]["loss"], abs=1e-4)
    saved = [e["batch"] for e in json.loads(index)["checkpoints"].values()]
    assert 49 in saved  # a checkpoint after every fiftieth batch
    batch_lines = outcome.out[outcome.out.index("[Batch") : outcome.out.index("=====")]
    assert max(map(len, batch_lines.splitlines())) <= 100
    (said,) = RECENT_LINE.finditer(outcome.out)
    assert said["n"] == "50"
    for name, close in (("reward", 1e-4), ("d_acc", 1e-4), ("loss", 1e-4), ("exact", 1e-3)):
        mean = sum(row[name] for row in rows[1:51]) / 50
        assert float(said[name]) == pytest.approx(mean, abs=close), name


def test_lines_looks_and_averages_are_as_far_apart() -> None:
    """Breaks: an average over other batches than those since the line before."""
    assert run_state.LINE_EVERY == 50
    assert trainloop.LINE_EVERY == watching.LINE_EVERY == run_state.LINE_EVERY
    assert run_state.Recent().rows.maxlen == run_state.LINE_EVERY


def test_epoch_summaries_are_to_the_letter(reference: Any) -> None:
    found = list(SUMMARY.finditer(reference.out))
    assert [m["epoch"] for m in found] == ["0", "1"]
    assert [m["size"] for m in found] == ["1.000", "0.833"]
    epochs = reference.rows("epoch")
    for match, row in zip(found, epochs, strict=True):
        assert float(match["loss"]) == pytest.approx(row["loss"], abs=1e-4)
        assert float(match["grad"]) > 0
        assert int(match["updates"]) > 0
        assert 0 < float(match["mask"]) <= 1
        assert match["n"] == "6"
        assert float(match["val"]) == pytest.approx(int(match["right"]) / 6, abs=1e-4)
        assert float(match["delta"]) == pytest.approx(row["accuracy_delta"], abs=1e-4)
        assert float(match["efe"]) == pytest.approx(row["efe"], abs=1e-4)
        said = dict(part.split() for part in match["parts"].split(", "))
        assert {k: float(v) for k, v in said.items()} == {
            part: pytest.approx(row[f"efe_{part}"], abs=1e-4) for part in loss_function.PARTS
        }
        said = dict(part.split() for part in match["deltas"].split(", "))
        assert {k: float(v) for k, v in said.items()} == {
            name: pytest.approx(row[name], abs=1e-4) for name in reward_shaping.REWARD_WEIGHTS
        }


def test_the_log_file_has_what_the_console_has(reference: Any) -> None:
    logged = (reference.folder / "training.log").read_text(encoding="utf-8")
    for line in reference.out.splitlines():
        assert line.strip() in logged


def test_quiet_says_epoch_lines_only(train: Any) -> None:
    outcome = train("--max_batches", 1, "--quiet")
    kinds = {line.split()[0] for line in outcome.out.splitlines() if line.strip(" ") == line != ""}
    assert kinds == {"[Epoch", "Final:", "Run:", "warning:"}  # six tasks are few
    assert "[Batch    0]" in (outcome.folder / "training.log").read_text()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--qwen_train", "frozen"), "frozen"),
        (("--prompt", "no_qwen"), "not run"),
        (("--qwen_cache_interval", 9), "not run, readings reused"),
    ],
    ids=lambda x: str(x),
)
def test_a_qwen_grad_of_zero_is_explained_in_its_line(train: Any, flags: Any, why: Any) -> None:
    outcome = train(*flags, "--epochs", 2, "--val_pairs", 1, "--eval_views", 1)
    assert outcome.code == 0, outcome.err
    printed = outcome.out.splitlines()
    at = [number for number, line in enumerate(printed) if line.startswith("[Batch")]
    lines = [printed[number] for number in at]
    assert f"Qwen: {why}" in [line.strip() for line in printed[at[1] + 1 : at[1] + 3]]
    assert "Qwen_grad: 0.00e+00" in lines[1]
    first_has_gradient = flags[0] == "--qwen_cache_interval"  # nothing to reuse yet
    assert ("Qwen_grad: 0.00e+00" not in lines[0]) == first_has_gradient
    summaries = list(SUMMARY.finditer(outcome.out))
    assert [bool(m["idle"]) for m in summaries] == [not first_has_gradient, True]
    assert all(row["qwen_heads_grad"] > 0 for row in outcome.rows("batch"))
