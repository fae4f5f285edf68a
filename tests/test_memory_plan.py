"""How much memory a run takes: the table of --dry_run, its estimates, and what is chosen by it."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import command_line
import memory_plan
from arc_system import SystemConfig, build_system
from batches import TrainingStream
from dataset_arc import Pair, Task
from language_model import activation_bytes, recompute_activations, with_lora
from loss_function import combined_loss

# The shape of Qwen/Qwen2.5-1.5B, as its config.json has it.
QWEN_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a model of 1.5 billion parameters, and nothing else."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(QWEN_1_5B), encoding="utf-8")
    return folder


class Saved:
    """Bytes that autograd keeps for the backward pass, weights left out, each memory once."""

    def __init__(self, parameters: Any) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in parameters}
        self.seen: dict[int, torch.Tensor] = {}  # held, so that no address is used twice

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.own:
            self.seen[address] = tensor
        return tensor

    @property
    def n_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.seen.values())


def square_tasks(n: int, side: int) -> list[Task]:
    """Tasks of three demonstrations, all grids side x side."""
    rng = np.random.default_rng(0)

    def grid() -> Any:
        return rng.integers(0, 10, (side, side)).astype(np.uint8)

    pairs = [[Pair(grid(), grid()) for _ in range(3)] for _ in range(n)]
    return [Task(f"t{i}", tuple(some), ()) for i, some in enumerate(pairs)]


# ---------------------------------------------------------------- the estimates


@pytest.mark.parametrize(
    ("width", "blocks", "steps", "side", "half"),
    [(48, 1, 5, 6, False), (96, 1, 2, 12, False), (48, 2, 5, 12, False), (96, 1, 5, 10, True)],
)
def test_the_agents_activations_are_as_estimated(
    width: int, blocks: int, steps: int, side: int, half: bool
) -> None:
    """Breaks: a formula that the agent has outgrown; the docstring says a factor of 1.3."""
    config = SystemConfig(
        width=width, heads=2, blocks=blocks, planning_steps=steps, n_tasks=2, prompt="null"
    )
    system = build_system(config)
    stream = TrainingStream(square_tasks(2, side), 0, 6)
    batch, targets = stream.batch(0, 0)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
    with Saved(p for m in system.modules().values() for p in m.parameters()) as saved, autocast:
        reading = system.read(batch)
        passed = system.answer_twice(reading, torch.Generator().manual_seed(0))
        backward = system.backward_both(reading, passed)
        true = system.backward_of(reading, targets.output, targets.size)
        earned = system.reward(reading, passed, targets, backward)
        efe = system.efe_loss(
            logits=earned.logits,
            target=earned.target,
            confidence=passed.after.confidence,
            size_right=earned.size_right,
            size_logits=passed.after.size_logits,
            target_size=targets.size,
            size_weight=1.0,
            backward_logits=backward[1],
            backward_logits_true=true,
            inp=batch.query_input,
            pair_summary=reading.pair_summary,
            task_ids=batch.demo_task,
        )
        loss = combined_loss(efe["total"], earned.soft)
    assert torch.isfinite(loss)
    cells = stream.load(0, 0).n_cells
    assert cells == batch.n_queries * side * side
    estimate = cells * memory_plan.cell_bytes(config, half=half, twice=False)
    assert saved.n_bytes / 1.3 <= estimate <= 1.3 * saved.n_bytes
    assert memory_plan.cell_bytes(config, half=half, twice=True) > estimate / cells


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("case", ["float32", "autocast", "bfloat16", "recomputed"])
@pytest.mark.parametrize("shape", [(64, 176, 2, 4, 2), (256, 1500, 3, 8, 2)])
def test_the_language_models_activations_are_as_estimated(
    mode: str, case: str, shape: tuple[int, ...]
) -> None:
    from transformers import Qwen2Config, Qwen2Model

    if mode == "lora":
        pytest.importorskip("peft")
    if (mode, case) == ("full", "bfloat16"):
        pytest.skip("what is trained is held in float32")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes: dict[str, Any] = dict(zip(names, shape, strict=False))
    config = Qwen2Config(vocab_size=16, num_key_value_heads=shape[4], **sizes)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    model: Any = Qwen2Model(config)
    model.to(dtype)
    if case == "recomputed":
        recompute_activations(model)
    if mode == "lora":
        model = with_lora(model)
    model.train()
    half = case == "autocast"
    ids = torch.arange(512).reshape(2, 256) % 16
    with Saved(model.parameters()) as saved, torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(input_ids=ids, use_cache=False)
    n_bytes = saved.n_bytes
    if half:  # copies of the weights are a row of their own
        n_bytes -= sum(2 * p.numel() for p in model.parameters() if p.ndim > 1 and p.requires_grad)
    recompute = case == "recomputed"
    estimate = 512 * activation_bytes(config, mode, half=half, recompute=recompute, dtype=dtype)
    if recompute:  # and one layer in the backward pass, which no hook sees before it
        plain = activation_bytes(config, mode, half=False, recompute=False, dtype=dtype)
        n_bytes += 512 * plain // shape[2]
    assert n_bytes / 1.25 <= estimate <= 1.25 * n_bytes
    assert activation_bytes(config, "frozen", half=half, recompute=False, dtype=dtype) == 0


@pytest.mark.parametrize(
    "flags",
    [(), ("--qwen_train", "frozen", "--ema", 0), ("--optimizer", "adamw", "--no_memory")],
    ids=str,
)
def test_a_checkpoint_is_as_large_as_was_said(train: Any, flags: Any) -> None:
    """Breaks: an optimizer's state, averages or buffers that the table forgets or counts twice."""
    done = train("--max_batches", 1, "--val_pairs", 1, "--eval_views", 1, *flags)
    assert done.code == 0, done.err
    size = max(p.stat().st_size for p in done.folder.glob("checkpoints/*.pt"))
    assert memory_plan.checkpoint_bytes(done.run) == pytest.approx(size, rel=0.06, abs=200_000)


# ---------------------------------------------------------------- the table


def test_a_dry_run_of_a_large_model_needs_its_config_alone(train: Any, large: Path) -> None:
    """Breaks: weights that are made or loaded to be counted, or a table that is not printed."""
    done = train("--dry_run", "--qwen_model", large, "--drive_backup", train.folder / "drive")
    assert done.code == 0, done.err
    for module in done.run.system.modules().values():
        assert all(p.is_meta for p in module.parameters())
    assert "1.54 B parameters, frozen, float32" in done.out
    assert "RANDOM WEIGHTS" in done.out
    rows = {
        line[8:54].strip(): float(line[55:].split()[0])
        for line in done.out.splitlines()
        if line.startswith("        ") and " GB" in line[55:]
    }
    assert rows["weights"] == pytest.approx(4 * 1.5437, abs=0.02)
    assert rows["gradients"] < 0.1
    assert rows["total"] > rows["weights"]
    each = rows["Disk: one checkpoint"]
    assert rows["Disk: 7 files at most"] == pytest.approx(7 * each, abs=0.005)
    assert rows["Drive: 6 files at most"] == pytest.approx(6 * each, abs=0.005)
    assert not list(train.folder.glob("runs/*"))
    assert not (train.folder / "drive").exists()


def test_what_does_not_fit_is_said_with_what_to_change(
    train: Any, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: `fits` by another figure than the total, advice without a value, or no word of the
    disk."""
    monkeypatch.setattr(memory_plan, "memory_of", lambda device: 16 * 10**9)
    monkeypatch.setattr(memory_plan, "_free", lambda folder: 10**9)
    flags = ("--dry_run", "--qwen_model", large, "--qwen_train")
    done = train(*flags, "full")
    (line,) = (text for text in done.out.splitlines() if "DOES NOT FIT" in text)
    assert "--qwen_train lora (about " in line
    assert "--qwen_train frozen (about " in line
    assert "--batch_size" not in line, "no batch is small enough"
    assert "Disk: NOT ENOUGH for 7 checkpoints of 24" in done.out
    done = train(*flags, "frozen")
    assert "        fits: " in done.out
    assert "NOT ENOUGH" not in done.out
    plan = memory_plan.plan_of(done.run)
    monkeypatch.setattr(memory_plan, "memory_of", lambda device: int(plan.total / 0.9) - 10**7)
    (line,) = (text for text in train(*flags, "frozen").out.splitlines() if "DOES NOT FIT" in text)
    assert "--batch_size 1 --grad_accum 6 (now 6)" in line


def test_a_drawn_out_epoch_is_looked_at_in_part(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("--dry_run", "--batch_size", 2).run
    whole = memory_plan.plan_of(run)
    looked: list[int] = []
    real = run.stream.load

    def load(epoch: int, position: int) -> Any:
        looked.append(position)
        return real(epoch, position)

    monkeypatch.setattr(run.stream, "load", load)
    monkeypatch.setattr(memory_plan, "MOST_LOOKED_AT", 2)
    assert memory_plan.plan_of(run).n_cells <= whole.n_cells
    assert 1 < len(looked) <= 3


# ---------------------------------------------------------------- what is chosen by it

T4, RTX_4090, H100 = 15.8e9, 25.3e9, 85.0e9


def pretend_gpu(patch: pytest.MonkeyPatch, n_bytes: float, bf16: bool) -> None:
    """A GPU that can be asked for its memory and its precisions, and for nothing else. Like a T4's,
    its answer is True where it is asked for bfloat16 with emulation."""
    cuda = torch.cuda
    patch.setattr(cuda, "is_available", lambda: True)
    patch.setattr(cuda, "device_count", lambda: 1)
    patch.setattr(
        cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
    )
    properties = types.SimpleNamespace(total_memory=int(n_bytes))
    patch.setattr(cuda, "get_device_properties", lambda device: properties)
    patch.setattr(cuda, "get_device_name", lambda device: "a GPU")
    patch.setattr(torch.amp, "GradScaler", lambda device, enabled: enabled)


@pytest.mark.parametrize(
    ("n_bytes", "bf16", "mode", "dtype"),
    [(T4, False, "lora", "float32"), (RTX_4090, True, "lora", "bfloat16"),
     (H100, True, "lora", "bfloat16")],
    ids=["T4", "4090", "H100"],
)  # fmt: skip
def test_auto_takes_what_fits_the_gpu_and_says_why(
    train: Any, large: Path, monkeypatch: pytest.MonkeyPatch, n_bytes: float, bf16: bool, mode: str,
    dtype: str,
) -> None:  # fmt: skip
    """Breaks: a mode that does not fit, bfloat16 where it is emulated, batches that do not fit, or
    a choice that is not said."""
    pytest.importorskip("peft")
    pretend_gpu(monkeypatch, n_bytes, bf16)
    done = train("--dry_run", "--qwen_model", large, "--device", "cuda", fast=False)
    assert done.code == 0, done.err
    assert f"B parameters, {mode}, {dtype}" in done.out
    assert f"{mode}, chosen as " in done.out
    why = f"this GPU has {n_bytes / 1e9:.1f} GB"
    if n_bytes == H100:
        why = "each checkpoint of full training would take 24.7 GB"
    assert why in done.out
    assert done.run.args.width == (256 if n_bytes == T4 else 512)
    assert "activations are recomputed" in done.out
    assert done.run.args.qwen_train == mode
    plan = memory_plan.plan_of(done.run)
    assert plan.memory == int(n_bytes)
    assert plan.fits, done.out
    assert "        fits: " in done.out
    assert f"Batches: {done.run.args.batch_cells} cells at most" in done.out
    assert plan.n_cells <= max(done.run.args.batch_cells, 9 * 30 * 30)


def test_without_peft_what_does_not_fit_is_frozen(
    train: Any, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, T4, bf16=False)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    done = train("--dry_run", "--qwen_model", large, "--device", "cuda", fast=False)
    assert "frozen, chosen as full training takes" in done.out
    assert "LoRA needs the package peft" in done.out
    assert "recomputed" not in done.out


# ---------------------------------------------------------------- when it runs out


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
     RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate")],
    ids=["gpu", "cpu", "allocator"],
)  # fmt: skip
def test_memory_that_runs_out_names_flags_with_values(
    train: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Breaks: advice that knows nothing of the run, another exit code, or a traceback."""
    import trainloop_complete_with_fixes as trainloop

    def step(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(trainloop, "train_step", step)
    done = train("--max_batches", 1, "--batch_size", 4, "--width", 192, "--val_pairs", 1)
    assert done.code == command_line.EXIT_MEMORY
    (line,) = done.err.strip().splitlines()
    assert line.startswith("error: out of memory")
    assert "Use --batch_size 1 --grad_accum 4 (now 4), or --width 96 (now 192)" in line
    assert "--dry_run" in line
    done = train("--max_batches", 1, "--batch_cells", 200, "--val_pairs", 1)
    assert "Use --batch_cells 100 (now 200)" in done.err


# ---------------------------------------------------------------- batches by cells


def test_a_batch_has_at_most_so_many_cells(train: Any) -> None:
    """Breaks: a bound that is not passed on or not kept, or pairs that get lost by it."""
    tasks = [t for side in (3, 9, 15) for t in square_tasks(6, side)]
    tasks = [Task(f"{n}", t.demonstrations, ()) for n, t in enumerate(tasks)]
    free, bound = (TrainingStream(tasks, 0, 12, batch_cells=most) for most in (None, 800))
    assert bound.n_batches(0) > free.n_batches(0)
    asked: list[Any] = []
    for position in range(bound.n_batches(0)):
        batch, _ = bound.batch(0, position)
        load = bound.load(0, position)
        cells = batch.n_queries * batch.query_cells.shape[2] * batch.query_cells.shape[3]
        assert (load.n_queries, load.n_cells) == (batch.n_queries, cells)
        assert cells <= 800 or batch.n_tasks == 1
        sides = zip(batch.demo_input_size.tolist(), batch.demo_output_size.tolist(), strict=True)
        lengths = [2 + sum(h * (w + 1) for h, w in both) for both in sides]
        assert sorted(load.lengths) == sorted(lengths)
        asked += batch.pair_ids
    assert sorted(asked) == sorted(p for n in range(free.n_batches(0)) for p in free.pair_ids(0, n))
    run = train("--dry_run", "--batch_cells", 77).run
    assert run.stream.batch_cells == 77
    assert train("--dry_run").run.stream.batch_cells is None
