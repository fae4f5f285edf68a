"""What kept readings save: CPU time of the language model with and without reuse.

    python benchmarks/bench_cache.py                       # a random Qwen2 of 50 M parameters
    python benchmarks/bench_cache.py --qwen tiny --epochs 6
    python benchmarks/bench_cache.py --frozen              # its first and its second epoch

Three runs of the real training script on the same batches, one after the other, one thread each:
without the language model (--prompt no_qwen), with a reading of every pair in every batch
(interval 1), and with readings reused (--interval, default 10). The language model's time is what a
run costs beyond the first one. Validation and final evaluation are cut to one query, so that
training is what is timed. The table is printed and written to --out. With --frozen the model is
not trained, its states are kept, and runs of one and of two epochs, with the language model and
without, tell its time in each of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import Parser, number  # noqa: E402 - the scripts are no package

# A Qwen2 of 49 M parameters in its decoder; the vocabulary holds the grid alphabet and little else.
QWEN2_50M = {
    "architectures": ["Qwen2Model"],
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 13,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(
        prog="bench_cache.py",
        description="CPU time of the language model with and without reused readings.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--qwen", default="50M", help="50M (random weights), or a --qwen_model (default: 50M)"
    )
    parser.add_argument(
        "--interval", type=number(int, 2), default=10, help="reuse (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=number(int, 1), default=4, help="of each run (default: %(default)s)"
    )
    parser.add_argument(
        "--max_side",
        type=number(int, 1, 30),
        default=5,
        help="tasks up to this side, in cells (default: %(default)s)",
    )
    parser.add_argument(
        "--frozen", action="store_true", help="time two epochs of a frozen model (default: off)"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="(default: 0)")
    parser.add_argument(
        "--out", metavar="FILE", help="also write the figures there as JSON (default: off)"
    )
    return parser


def run_once(
    args: argparse.Namespace, model: str, flags: list[str], runs: Path
) -> dict[str, float]:
    """One training run; CPU seconds (of training and start-up), batches and mean loss."""
    command = [
        sys.executable, str(ROOT / "trainloop_complete_with_fixes.py"), "--device", "cpu",
        "--threads", "1", "--seed", str(args.seed), "--epochs", str(args.epochs),
        "--max_side", str(args.max_side), "--val_pairs", "1", "--max_batches", "100000",
        "--eval_views", "1", "--qwen_model", model, "--qwen_lr", "1e-4", "--qwen_train",
        "frozen" if args.frozen else "full", "--hypotheses", "off" if args.frozen else "on",
        "--runs_dir", str(runs), "--save_every", "100000", "--max_checkpoints", "1", "--quiet",
        *flags,
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = next(runs.glob("arc_complete_*/metrics.jsonl")).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "batch"]
    ran = sum(row["qwen_grad"] > 0 for row in rows)
    return {
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "batches": len(rows),
        "batches_with_language_model": ran,
        "loss": sum(row["loss"] for row in rows) / len(rows),
    }


def two_epochs(args: argparse.Namespace, model: str, place: Path) -> dict[str, dict[str, float]]:
    """CPU seconds of a frozen model in the first and in the second epoch; a row a run."""
    arms = {"no language model": ["--prompt", "no_qwen"], "frozen": []}
    found = {}
    for name, flags in arms.items():
        for epochs in (1, 2):
            args.epochs = epochs
            row = run_once(args, model, flags, place / f"{name} {epochs}")
            found[f"{name}, {epochs} epochs"] = row
            print(f"{name}, {epochs} epochs: {row['batches']} batches, {row['cpu_s']:.1f} CPU s")
    none, frozen = ([found[f"{name}, {n} epochs"]["cpu_s"] for n in (1, 2)] for name in arms)
    first, second = frozen[0] - none[0], frozen[1] - frozen[0] - (none[1] - none[0])
    print(f"language model: {first:.1f} CPU s in the first epoch, {second:.1f} in the second")
    return found


def with_reuse(args: argparse.Namespace, model: str, place: Path) -> dict[str, dict[str, float]]:
    """CPU seconds of a trained model with and without reuse; a row a run."""
    arms = {
        "no language model": ["--prompt", "no_qwen"],
        "interval 1": [],
        f"interval {args.interval}": ["--qwen_cache_interval", str(args.interval)],
    }
    found: dict[str, dict[str, float]] = {}
    print(
        "| run | batches | with the language model | CPU s | language model, CPU s | mean loss |\n"
        "|---|---|---|---|---|---|"
    )
    for number_of_arm, (name, flags) in enumerate(arms.items()):
        row = run_once(args, model, flags, place / str(number_of_arm))
        found[name] = row
        row["language_model_cpu_s"] = row["cpu_s"] - found["no language model"]["cpu_s"]
        print(
            f"| {name} | {row['batches']} | {row['batches_with_language_model']} | "
            f"{row['cpu_s']:.1f} | {row['language_model_cpu_s']:.1f} | {row['loss']:.4f} |",
            flush=True,
        )
    every, reused = (found[name]["language_model_cpu_s"] for name in list(arms)[1:])
    print(f"language model: {every / max(reused, 1e-9):.1f} times less CPU time with reuse")
    return found


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as place:
        model = args.qwen
        if model == "50M":
            folder = Path(place) / "qwen2_50M"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(QWEN2_50M), encoding="utf-8")
            model = str(folder)
        found = (two_epochs if args.frozen else with_reuse)(args, model, Path(place))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
