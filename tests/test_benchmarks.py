"""The benchmarks run, at the smallest size, and what they compute of their figures is right.

What they measure is no test's matter: no time is looked at.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lively_system

import dataset_arc
import trainloop_complete_with_fixes as trainloop

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A benchmark as a module, by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


# ---------------------------------------------------------------- a step


def test_a_step_is_measured_row_by_row(
    load: Any, tasks_file: Path, tmp_path: Path, capsys: Any
) -> None:
    """Breaks: a row that trains nothing, or another number of pairs than the others."""
    bench = load("bench_step")
    out = tmp_path / "step.json"
    flags = ["--data", str(tasks_file), "--batches", "1", "--plain_pairs", "1", "--repeats", "1"]
    assert bench.main([*flags, "--batch_size", "3", "--width", "32", "--json", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    whole = {name: row["pairs"] for name, row in found["rows"].items()}
    assert whole == {
        bench.OURS: 3, bench.NO_HYPOTHESES: 3, bench.NO_MODEL: 3, bench.MODELS: 3,
        bench.PLAIN_OWN: 1, bench.PLAIN: 1, bench.PLAIN_ALL: 1,
    }  # fmt: skip
    assert all(row["cpu_s"] > 0 for row in found["rows"].values())
    share = 1 - found["rows"][bench.MODELS]["cpu_s"] / found["rows"][bench.NO_HYPOTHESES]["cpu_s"]
    assert found["loop_share"]["cpu_s"] == pytest.approx(share)
    assert "times as fast as: plain, 30 x 30" in capsys.readouterr().out


def test_the_plain_loop_is_what_it_says(load: Any, task_set: Any, monkeypatch: Any) -> None:
    """Breaks: a reading that is kept, a canvas or a text that is not 30 x 30, no update."""
    bench = load("bench_step")
    settings = argparse.Namespace(
        device="cpu", threads=1, seed=0, qwen_model="tiny", batch_size=3, width=32
    )
    one = bench.Bench(settings, task_set)
    lengths: list[int] = []
    canvases: list[Any] = []
    backbone, agent = one.run.system.qwen.backbone, one.run.system.agent
    backbone.register_forward_pre_hook(
        lambda _, __, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    real = agent.plan

    def plan(batch: Any, *given: Any, **options: Any) -> Any:
        canvases.append(tuple(batch.query_sources.shape[2:]))
        return real(batch, *given, **options)

    monkeypatch.setattr(agent, "plan", plan)
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    bench.plain_loop(one, [(0, 1)], 30, texts=True)
    assert canvases == [(30, 30)] * 2
    assert lengths == [2048] * 2  # 1862 tokens of two grids of 30 x 30, padded
    assert all(not torch.equal(p, before[name]) for name, p in backbone.named_parameters())
    lengths.clear()
    canvases.clear()
    bench.plain_loop(one, [(0, 1), (1, 0)])
    assert len(canvases) == 4
    assert max(max(canvas) for canvas in canvases) < 30
    assert max(lengths) < 200


# ---------------------------------------------------------------- an evaluation


def test_an_evaluation_is_measured_whole_and_in_its_parts(
    load: Any, reference: Any, tasks_file: Path, capsys: Any
) -> None:
    """Breaks: a part that is never called, or one that stays watched."""
    bench = load("bench_evaluation")
    flags = ["--data", str(tasks_file), "--repeats", "1"]
    assert bench.main([str(reference.folder), *flags]) == 0
    printed = capsys.readouterr().out
    assert "6 test inputs of 6 tasks, one view, 1 batch at a time" in printed
    parts = [line.split(maxsplit=1)[1] for line in printed.splitlines() if line.startswith("  ")]
    assert sorted(parts) == [
        "demonstrations read", "evidence", "fitted rule", "language model and prompt",
        "looks at demonstrations, all in", "planning", "policy",
    ]  # fmt: skip
    assert bench.main([str(reference.folder), *flags, "--every", "3"]) == 0
    assert "2 test inputs of 2 tasks" in capsys.readouterr().out
    assert bench.main([str(tasks_file.parent / "none"), *flags]) == 3
    assert "no such run folder" in capsys.readouterr().err


def test_what_is_watched_is_as_it_was_afterwards(load: Any) -> None:
    system = lively_system()
    before = {name for part in (system.agent, system.qwen) for name in vars(part)}
    with pytest.raises(ZeroDivisionError):
        load("bench_evaluation").watched(system, lambda: 1 // 0)
    assert before == {name for part in (system.agent, system.qwen) for name in vars(part)}
    assert "refine" not in vars(system)


# ---------------------------------------------------------------- scaling


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_an_exponent_is_the_power(load: Any, power: float) -> None:
    bench = load("bench_scaling")
    points = [(x, 3.0 * x**power) for x in (1.0, 7.0, 50.0)]
    assert bench.exponent(points) == pytest.approx(power)
    assert bench.exponent(points[:1]) is None
    assert bench.exponent([(1.0, 1.0), (2.0, -1.0)]) is None


@pytest.mark.parametrize("write", ["write_file", "write_folder"])
def test_made_up_tasks_are_what_was_asked_for(load: Any, write: str, tmp_path: Path) -> None:
    bench = load("bench_scaling")
    path = tmp_path / ("training.json" if write == "write_file" else "tasks")
    getattr(bench, write)(path, bench.made_up(1003, sides=(2, 4), demonstrations=2))
    tasks = dataset_arc.load_tasks(path).train
    assert len(tasks) == len({task.task_id for task in tasks}) == 1003
    assert {len(task.demonstrations) for task in tasks} == {2}
    sides = {s for task in tasks for pair in task.demonstrations for s in pair.input.shape}
    assert sides == {2, 3, 4}
    for task in tasks:
        for pair in task.demonstrations:
            assert pair.output is not None
            assert np.array_equal(pair.output, pair.input[:, ::-1])


def test_an_axis_is_measured_and_drawn(load: Any, tmp_path: Path, capsys: Any) -> None:
    """Breaks: a cost of the wrong thing: per pair it hardly grows with the batch."""
    pytest.importorskip("matplotlib")
    bench = load("bench_scaling")
    out, figure = tmp_path / "scaling.json", tmp_path / "scaling.png"
    flags = ["--axes", "cells", "--largest", "8", "--repeats", "1"]
    assert bench.main([*flags, "--json", str(out), "--figure", str(figure)]) == 0
    row = json.loads(out.read_text(encoding="utf-8"))["cells"]
    assert [x for x, _ in row["points"]] == [25.0, 64.0]
    assert row["exponent"] == pytest.approx(bench.exponent(row["points"]))
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "cells" in capsys.readouterr().out


@pytest.mark.slow
def test_a_start_is_measured_with_the_real_script(load: Any, tmp_path: Path) -> None:
    bench = load("bench_scaling")
    out = tmp_path / "tasks.json"
    assert bench.main(["--axes", "tasks", "--tasks", "20", "40", "80", "--json", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [x for x, _ in found["tasks, s"]["points"]] == [20, 40, 80]


# ---------------------------------------------------------------- a GPU


def gpu_flags(folder: Path, *names: str) -> list[str]:
    return ["--device", "cpu", "--rehearse", "--out", str(folder), "--only", *names]


def test_an_epoch_is_rehearsed_and_the_script_is_as_before(load: Any, tmp_path: Path) -> None:
    """Breaks: no tokens are counted, an epoch is missing, or hooks stay in the script."""
    bench = load("bench_gpu")
    functions = [trainloop.set_up, trainloop.train_epoch, trainloop.save]
    args = bench.build_parser().parse_args(gpu_flags(tmp_path, "epoch"))
    bench.prepare(args)
    assert json.loads((tmp_path / "qwen_shaped" / "config.json").read_text())["hidden_size"] == 32
    assert bench.main([*gpu_flags(tmp_path, "epoch"), "--inside"]) == 0
    found = json.loads((tmp_path / "epoch.json").read_text(encoding="utf-8"))
    assert len(found["epochs_s"]) == 2
    # 12 tasks of three demonstrations, each read once a batch of its task at 32 tokens or more
    assert found["tokens"] >= 12 * 3 * 32
    assert found["share_of_peak"] > 0
    assert found["checkpoint_gb"] > 0
    assert [trainloop.set_up, trainloop.train_epoch, trainloop.save] == functions


def test_lora_takes_a_smaller_batch_where_memory_runs_out(
    load: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("peft")
    bench = load("bench_gpu")
    asked: list[tuple[str, str]] = []
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"kind": "batch", "pairs": 32, "minutes": i / 60}) + "\n" for i in range(5)
        )
    )

    def run_script(flags: list[str]) -> tuple[int, Any]:
        size = flags[flags.index("--batch_size") + 1]
        asked.append((size, flags[flags.index("--grad_accum") + 1]))
        return (0 if size == "32" else 4), SimpleNamespace(folder=tmp_path)

    monkeypatch.setattr(bench, "run_script", run_script)
    args = bench.build_parser().parse_args(["--device", "cpu", "--out", str(tmp_path)])
    found = bench.lora(args, "lora_8", 8.0)
    assert asked == [("128", "1"), ("64", "2"), ("32", "4")]
    assert found["batch_size"] == 32
    assert found["did_not_fit"] == [128, 64]
    assert found["pairs_a_s"] == pytest.approx(32)


def test_a_section_that_hangs_or_fails_costs_only_itself(
    load: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Breaks: the results of the others are lost, or the failure is not told."""
    bench = load("bench_gpu")
    monkeypatch.setitem(bench.LIMITS_S, "epoch", 0.2)
    real = bench.in_its_process

    def in_its_process(args: Any, name: str) -> Any:
        return {"ok": True, "s": 1.0, "x": 2.0} if name == "score" else real(args, name)

    monkeypatch.setattr(bench, "in_its_process", in_its_process)
    assert bench.main(gpu_flags(tmp_path, "epoch", "score")) == 3
    found = json.loads((tmp_path / "bench_gpu.json").read_text(encoding="utf-8"))["sections"]
    assert found["score"] == {"ok": True, "s": 1.0, "x": 2.0}
    assert found["epoch"]["ok"] is False
    assert found["epoch"]["why"] == "stopped after 0.2 s"
    told = capsys.readouterr()
    assert "| epoch | 0 | NO RESULT: stopped after 0.2 s" in told.out
    assert "without a result: epoch" in told.err


def test_checkpoints_that_differ_are_told(load: Any) -> None:
    bench = load("bench_gpu")
    keys = ("agent", "qwen", "solver2", "efe_loss", "policy_rl", "optimizer")

    def checkpoint(value: float, **more: Any) -> dict[str, Any]:
        return {key: {"w": [torch.ones(2), torch.tensor([value])], **more} for key in keys}

    def differing(a: Any, b: Any) -> list[str]:
        leaves = bench.leaves_beside(a, b)
        return [path for path, x, y in leaves if not torch.equal(x, y)]

    assert len(list(bench.leaves_beside(checkpoint(1.0), checkpoint(1.0)))) == 12
    assert differing(checkpoint(1.0), checkpoint(1.0)) == []
    assert len(differing(checkpoint(1.0), checkpoint(2.0))) == 6
    assert len(differing(checkpoint(1.0), checkpoint(1.0, lr=3))) == 6


@pytest.mark.slow
def test_the_gpu_command_rehearsed(tmp_path: Path) -> None:
    """Every section in its own process; a resume is bit for bit what no stop would have given."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py")]
    names = ["first", "epoch", "lora_8", "lora_16", "resume", "score"]
    done = subprocess.run([*command, *gpu_flags(tmp_path, *names)], text=True, capture_output=True)
    found = json.loads((tmp_path / "bench_gpu.json").read_text(encoding="utf-8"))
    sections = found["sections"]
    assert {name: section["ok"] for name, section in sections.items()} == dict.fromkeys(names, True)
    assert done.returncode == 0, done.stderr
    assert sections["first"]["says_random_weights"]
    assert sections["first"]["exit_code"] == 143  # stopped, everything saved
    assert sections["first"]["batches"] >= 4
    for model in ("tiny", "large, lora"):
        assert sections["resume"][model]["tensors"] > 500
        assert sections["resume"][model]["differ"] == 0
    assert sections["score"]["n"] == 2
    assert "A REHEARSAL" in done.stdout
