"""What a checkpoint costs: ours beside a raw write, torch.save, DCP, Lightning and Accelerate.

One run, methods interleaved, medians of `--repeats` after one discarded round. "Blocking" is how
long the training loop stands still; "whole" is until the bytes are durable (ours: read back, too).
    python benchmarks/bench_checkpoint.py --mib 1024 --repeats 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model_persistence import ModelPersistence
from persistence.state_tree import iter_leaves

RAW = "raw write + fsync"


class Model(torch.nn.Module):
    """A quarter of the state; AdamW's two moments and an EMA are the rest."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        count = max(1, mib // 4 // 4)
        self.layers = torch.nn.ParameterList(torch.randn(1024, 1024) for _ in range(count))


def training_state(mib: int) -> tuple[Model, torch.optim.Optimizer, list[torch.Tensor]]:
    model = Model(mib)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, [p.detach().clone() for p in model.parameters()]


def tensors_of(*trees: Any) -> list[torch.Tensor]:
    return [t for tree in trees for _, t in iter_leaves(tree) if isinstance(t, torch.Tensor)]


def settle() -> None:
    """The same start for everyone: nothing left to write, no file in the page cache (as root)."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@contextlib.contextmanager
def new_file(folder: Path, name: str) -> Iterator[Path]:
    """A new path; the one before is removed afterwards, as a checkpoint's predecessor is.

    So every method writes to memory and blocks that the file before it does not give back yet.
    """
    old = list(folder.glob(f"{name}.*"))
    yield folder / f"{name}.{time.monotonic_ns()}"
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def methods(folder: Path, mib: int) -> dict[str, Callable[[], dict[str, float]]]:
    """name -> measurement; each returns {column: seconds} and leaves nothing behind."""
    model, optimizer, ema = training_state(mib)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
    tensors = tensors_of(state)

    def raw() -> dict[str, float]:
        def write() -> None:
            with target.open("wb", buffering=0) as file:
                for t in tensors:
                    view = memoryview(t.contiguous().view(-1).view(torch.uint8).numpy())
                    while len(view):
                        view = view[file.write(view[: 4 << 20]) :]
                os.fsync(file.fileno())

        with new_file(folder, "raw") as target:
            took_s = timed(write)
        return {"blocking": took_s, "whole": took_s}

    def torch_save() -> dict[str, float]:
        with new_file(folder, "torch") as target:
            took_s = timed(lambda: torch.save(state, target))
        return {"blocking": took_s}

    def torch_save_fsync() -> dict[str, float]:
        def write() -> None:
            with target.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())

        with new_file(folder, "durable") as target:
            took_s = timed(write)
        return {"blocking": took_s, "whole": took_s}

    managers = {
        name: ModelPersistence(
            folder / name, max_checkpoints=1, async_save=asynchronous, drive_backup=False
        )
        for name, asynchronous in (("ours-async", True), ("ours-sync", False))
    }

    def ours(name: str) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            manager = managers[name]
            started = time.perf_counter()
            manager.save_checkpoint(
                model, None, None, None, None, optimizer, 0, 0, {}, extra={"ema": ema}
            )
            blocking_s = time.perf_counter() - started
            assert manager.flush()
            return {"blocking": blocking_s, "whole": time.perf_counter() - started}

        return measure

    found: dict[str, Callable[[], dict[str, float]]] = {
        RAW: raw,
        "torch.save": torch_save,
        "torch.save + fsync": torch_save_fsync,
        "ours, in the background": ours("ours-async"),
        "ours, streamed": ours("ours-sync"),
    }
    found |= peers(folder, model, optimizer, ema, state)
    return found


def peers(
    folder: Path, model: Any, optimizer: Any, ema: list[torch.Tensor], state: dict[str, Any]
) -> dict[str, Callable[[], dict[str, float]]]:
    """Those that are installed, called as their documentation does."""
    found: dict[str, Callable[[], dict[str, float]]] = {}
    try:
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

        def dcp_async() -> dict[str, float]:
            with new_file(folder, "dcp") as target:
                started = time.perf_counter()
                future: Any = dcp.async_save(state, checkpoint_id=str(target))
                blocking_s = time.perf_counter() - started
                future.result()
                whole_s = time.perf_counter() - started
            return {"blocking": blocking_s, "whole": whole_s}

        found["torch DCP async_save"] = dcp_async
    except (ImportError, RuntimeError) as e:
        print(f"DCP left out: {e}")
    try:
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=1)

        def lightning() -> dict[str, float]:
            parts = {"model": model, "optimizer": optimizer, "ema": ema}
            with new_file(folder, "lightning") as target:
                took_s = timed(lambda: fabric.save(target, parts))
            return {"blocking": took_s}

        found["Lightning Fabric.save"] = lightning
    except ImportError as e:
        print(f"Lightning left out: {e}")
    try:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        prepared = accelerator.prepare(model, optimizer)

        class Average:
            def state_dict(self) -> dict[str, Any]:
                return {"ema": ema}

            def load_state_dict(self, _: dict[str, Any]) -> None:
                pass

        accelerator.register_for_checkpointing(Average())

        def accelerate() -> dict[str, float]:
            with new_file(folder, "accelerate") as target:
                took_s = timed(lambda: accelerator.save_state(str(target)))
            return {"blocking": took_s}

        assert prepared
        found["Accelerate save_state"] = accelerate
    except ImportError as e:
        print(f"Accelerate left out: {e}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state in MiB")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds")
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=args.folder))
    try:
        measured: dict[str, dict[str, list[float]]] = {}
        table = methods(folder, args.mib)
        for round_ in range(args.repeats + 1):
            names = [n for n in table if args.only in n or n == RAW]
            random.Random(round_).shuffle(names)  # nobody always comes after the same one
            for name in names:
                measure = table[name]
                settle()
                for column, seconds in measure().items():
                    if round_:  # the first round warms buffers and the page cache
                        measured.setdefault(name, {}).setdefault(column, []).append(seconds)
    finally:
        shutil.rmtree(folder)
    raw_s = statistics.median(measured[RAW]["whole"])
    print(f"{args.mib} MiB of state, medians of {args.repeats}, torch {torch.__version__}")
    print("| method | blocking s | x raw | whole s | x raw |\n|---|---|---|---|---|")
    figures = {}
    for name, columns in measured.items():
        cells = []
        for column in ("blocking", "whole"):
            if column in columns:
                middle = statistics.median(columns[column])
                figures[f"{name}, {column}"] = round(middle / raw_s, 3)
                cells += [f"{middle:.3f}", f"{middle / raw_s:.2f}"]
            else:
                cells += ["not durable", "-"]
        print(f"| {name} | {' | '.join(cells)} |")
    blocking = figures.get("ours, in the background, blocking", 0.0)
    whole = figures.get("ours, in the background, whole", 0.0)
    print(json.dumps({"x_raw": figures, "ok": blocking <= 0.2 and whole <= 2.0}))


if __name__ == "__main__":
    main()
