"""What needs a GPU: the real script trains, saves, resumes and scores there (`pytest -m gpu`).

`python benchmarks/bench_gpu.py` measures it; without one they are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Script, differing

import predict
from trained_model import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = ("--device", "cuda", "--qwen_model", "tiny", "--val_pairs", "4", "--eval_views", "2")


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_three_batches_are_trained_saved_and_scored(
    train: Script, amp: str, tmp_path: Path, tasks_file: Path
) -> None:
    """Breaks: a tensor on the wrong device, a type that autocast does not take, a loss that is not
    finite, a model that does not load on a CPU."""
    done = train(*CUDA, "--max_batches", 3, "--amp", amp)
    assert done.code == 0, done.err
    figures = done.figures()
    assert len(figures) == 3
    assert all(row["loss"] == row["loss"] for row in figures)  # no NaN
    assert all(row["qwen_grad"] > 0 for row in figures) or amp == "fp16"  # its scale may start high
    assert next(done.run.system.agent.parameters()).is_cuda
    results = json.loads((done.folder / "results.json").read_text(encoding="utf-8"))
    assert results["n"] == 4
    assert load_model(done.folder, device="cpu").n_batches == 3
    answers = tmp_path / "answers.json"
    flags = [str(done.folder), "--data", str(tasks_file), "--split", "train", "--out", str(answers)]
    assert predict.main([*flags, "--device", "cuda"]) == 0
    assert len(json.loads(answers.read_text(encoding="utf-8"))) == 6


@pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")  # what has no such version
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_resume_is_bit_for_bit_with_deterministic_algorithms(
    train: Script, amp: str, monkeypatch: Any
) -> None:
    """Breaks: a random state of the GPU, a moment or a scale that is not put back."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        some = (*CUDA, "--amp", amp, "--max_batches", 3)
        whole = train(*some, "--epochs", 2, runs="whole")
        part = train(*some, "--epochs", 1, runs="part")
        rest = train("--resume", "--device", "cuda", "--epochs", 2, runs="part", fast=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (whole.code, part.code, rest.code) == (0, 0, 0), rest.err
    a, b = whole.checkpoint(), rest.checkpoint()
    for name in ("agent", "qwen", "solver2", "efe_loss", "policy_rl", "optimizer"):
        assert differing(a[name], b[name]) == []


def test_out_of_memory_is_one_line_and_its_code(train: Script) -> None:
    """Breaks: a traceback, or another exit code, where a GPU has too little memory."""
    free = torch.cuda.mem_get_info()[0]
    held = torch.empty(int(free * 0.999) - 2**26, dtype=torch.uint8, device="cuda")
    try:
        done = train(*CUDA, "--max_batches", 3, "--width", 512, "--batch_size", 512)
    finally:
        del held
        torch.cuda.empty_cache()
    assert done.code == 4
    assert done.err.startswith("error: out of memory")
    assert done.err.count("\n") == 1
