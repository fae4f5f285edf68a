"""What a GPU makes of this project, in one command of at most 25 minutes: speed, memory, resume.

    python benchmarks/bench_gpu.py                           # on an H100 or H200
    python benchmarks/bench_gpu.py --only epoch lora_8 --out figures
    python benchmarks/bench_gpu.py --device cpu --rehearse   # every step once, tiny, on a CPU

Sections, each a process of its own with its own time limit, so that one that fails or hangs costs
only itself:

    first      `--epochs 20 --device cuda` as a user starts it, stopped after 200 batches
    epoch      two epochs, all of the language model trained and saved; the second one counts
    lora_8     LoRA with 8 GB of the GPU's memory allowed, at the largest batch that fits
    lora_16    the same with 16 GB
    resume     a run stopped and resumed against one that was not, bit for bit, with torch's
               deterministic algorithms
    score      the score after --minutes, all included, with --qwen_model tiny

The language model has the shape of Qwen2.5-1.5B and random weights, from a folder that this
benchmark writes, config.json alone: nothing is downloaded, and its scores mean nothing. Results:
bench_gpu.json, a table, and the console of each section beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import (  # noqa: E402 - the scripts are no package
    EXIT_DONE,
    EXIT_MEMORY,
    EXIT_MISSING,
    Parser,
    check_device_name,
    number,
    pick_device,
    say_error,
    settle_threads,
)

QWEN2_5_1_5B = {  # the published config.json of Qwen/Qwen2.5-1.5B
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMALLER = {  # what a rehearsal changes
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LIMITS_S = {
    "first": 300, "epoch": 400, "lora_8": 110, "lora_16": 110, "resume": 180, "score": 300,
}  # fmt: skip
MATRIX = 8192  # rows of the matrices by which the device's own peak is measured
# (--batch_size, --grad_accum) to try under a memory limit, largest first.
BATCHES = ((128, 1), (64, 2), (32, 4), (16, 8), (8, 16))
GB = 2**30
Figures = dict[str, Any]


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(
        prog="bench_gpu.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    # fmt: off
    add("--device", default="cuda", help="cuda or cuda:N (default: %(default)s)")
    add("--rehearse", action="store_true",
        help="a tiny model and a few batches: whether every step runs (default: off)")
    add("--only", nargs="+", choices=tuple(LIMITS_S), default=list(LIMITS_S), metavar="SECTION",
        help=f"of {', '.join(LIMITS_S)} (default: all)")
    add("--out", type=Path, default=Path("bench_gpu"), metavar="DIR",
        help="folder for results and consoles (default: %(default)s)")
    add("--minutes", type=number(float, 0.1, 4.5), default=4.0,
        help="of the section score (default: %(default)s)")
    add("--data", help="as of the trainer (default: arcagi2; of a rehearsal: made up)")
    add("--inside", action="store_true", help="run the one section of --only in this process")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_device_name(parser, args.device)
    settle_threads()
    if args.inside:
        result = SECTIONS[args.only[0]](args)
        result_file(args.out, args.only[0]).write_text(json.dumps(result, indent=1) + "\n")
        return EXIT_DONE
    args.device = pick_device(args.device)
    prepare(args)
    found: Figures = {"device": about(args.device), "rehearsal": args.rehearse, "sections": {}}
    for name in args.only:
        found["sections"][name] = in_its_process(args, name)
        print(line_of(name, found["sections"][name]), flush=True)
        text = json.dumps(found, indent=1) + "\n"
        (args.out / "bench_gpu.json").write_text(text, encoding="utf-8")
    print_table(found)
    bad = [name for name, section in found["sections"].items() if not section["ok"]]
    if bad:
        say_error(f"without a result: {', '.join(bad)}; see {args.out}/*.log")
    return EXIT_MISSING if bad else EXIT_DONE


def prepare(args: argparse.Namespace) -> None:
    """The folder of results, the language model's folder and, for a rehearsal, made-up tasks."""
    model = model_folder(args)
    model.mkdir(parents=True, exist_ok=True)
    shape = QWEN2_5_1_5B | (SMALLER if args.rehearse else {})
    (model / "config.json").write_text(json.dumps(shape, indent=1), encoding="utf-8")
    if args.rehearse and args.data is None:
        from bench_scaling import made_up, write_file

        write_file(args.out / "training.json", made_up(12, sides=(3, 4)))


def model_folder(args: argparse.Namespace) -> Path:
    return args.out / "qwen_shaped"


def result_file(out: Path, name: str) -> Path:
    return out / f"{name}.json"


def about(device: str) -> Figures:
    """What runs this: hardware and versions."""
    import torch

    from command_line import device_name
    from persistence.files import version_of_package
    from run_state import commit_hash

    return {
        "name": device_name(device),
        "memory_gb": memory_of(device),
        "torch": torch.__version__,
        "transformers": version_of_package("transformers"),
        "commit": commit_hash(),
    }


def memory_of(device: str) -> float | None:
    """GB of a GPU; None of a CPU."""
    import torch

    if device == "cpu":
        return None
    return torch.cuda.get_device_properties(torch.device(device)).total_memory / GB


# ---------------------------------------------------------------- a section and its process


def in_its_process(args: argparse.Namespace, name: str) -> Figures:
    """Run a section in a process with a time limit; its result, or how it failed."""
    command = [
        sys.executable, str(Path(__file__).resolve()), "--inside", "--only", name, "--device",
        args.device, "--out", str(args.out), "--minutes", str(args.minutes),
    ]  # fmt: skip
    command += ["--rehearse"] if args.rehearse else []
    command += ["--data", args.data] if args.data else []
    result = result_file(args.out, name)
    result.unlink(missing_ok=True)
    log = args.out / f"{name}.log"
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as console:
        child = subprocess.Popen(
            command, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"exit code {child.wait(LIMITS_S[name])}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {LIMITS_S[name]} s"
            end_session(child)
        except BaseException:
            end_session(child)
            raise
    took = time.monotonic() - begun
    if result.exists():
        return {"ok": True, "s": took, **json.loads(result.read_text(encoding="utf-8"))}
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    return {"ok": False, "s": took, "why": ended, "last_lines": last}


def end_session(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and what it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()


def flags_of(args: argparse.Namespace, name: str, model: str | None = None) -> list[str]:
    """What every section says to the trainer. model: default the folder of random weights."""
    flags = [
        "--device", args.device, "--qwen_model", model or str(model_folder(args)), "--offline",
        "--runs_dir", str(args.out / f"runs_{name}"),
    ]  # fmt: skip
    data = args.data or (str(args.out / "training.json") if args.rehearse else "arcagi2")
    flags += ["--data", data]
    if args.rehearse:
        flags += ["--width", "32", "--batch_size", "6", "--threads", "1", "--val_pairs", "2"]
    return flags


def run_script(
    flags: Sequence[str], prepare_run: Callable[[Any, Any], None] = lambda script, run: None
) -> tuple[int, Any]:
    """The real script in this process: (exit code, its Run object, None where none was made).

    prepare_run(script, run) is called as soon as the run is set up; it may replace functions of the
    script, which are put back.
    """
    import trainloop_complete_with_fixes as script

    made: list[Any] = []
    names = ("set_up", "train_epoch", "save")
    before = {name: getattr(script, name) for name in names}
    real = script.set_up

    def set_up(*given: Any, **options: Any) -> Any:
        made.append(real(*given, **options))
        prepare_run(script, made[-1])
        return made[-1]

    script.set_up = set_up
    try:
        code = script.main(list(flags))
    finally:
        for name, function in before.items():
            setattr(script, name, function)
    return code, made[-1] if made else None


def rows_of(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    """The objects of one kind in a run's metrics.jsonl."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def peak_memory(device: str) -> Figures:
    """Of this process so far: GB of a GPU that tensors took, and that were reserved for them."""
    import torch

    if device == "cpu":
        return {}
    return {
        "peak_gb": torch.cuda.max_memory_allocated(device) / GB,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / GB,
    }


def checked(code: int, wanted: int = EXIT_DONE) -> None:
    if code != wanted:
        raise SystemExit(f"the trainer ended with exit code {code}")


# ---------------------------------------------------------------- the sections


def first(args: argparse.Namespace) -> Figures:
    """The user's first command as a user starts it, stopped by SIGTERM after some batches."""
    wanted = 4 if args.rehearse else 200
    flags = [*flags_of(args, "first"), "--epochs", "20"]
    if args.rehearse:
        flags += ["--save_every", "2"]  # metrics.jsonl is written at saves
    runs = args.out / "runs_first"
    command = [sys.executable, str(ROOT / "trainloop_complete_with_fixes.py"), *flags]
    begun = time.monotonic()
    loud, first_batch_s = False, None
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        print(line, end="", flush=True)
        loud |= "RANDOM WEIGHTS" in line
        if line.startswith("[Batch") and first_batch_s is None:
            first_batch_s = time.monotonic() - begun
            watch_for(child, runs, wanted)
    code = child.wait()
    rows = [row for folder in runs.glob("arc_complete_2*") for row in rows_of(folder, "batch")]
    if len(rows) < wanted:
        raise SystemExit(f"exit code {code} after {len(rows)} batches, not {wanted}")
    half = rows[len(rows) // 2 :]
    took = 60 * (half[-1]["minutes"] - half[0]["minutes"])
    return {
        "exit_code": code,
        "says_random_weights": loud,
        "first_batch_s": first_batch_s,
        "batches": len(rows),
        "pairs_a_s": sum(row["pairs"] for row in half[1:]) / took,
        "minutes": rows[-1]["minutes"],
        "skipped": sum(row["loss"] != row["loss"] for row in rows),
    }


def watch_for(child: subprocess.Popen[str], runs: Path, wanted: int) -> None:
    """In a thread: end the child, as a user would, once that many batches are on the disk."""

    def watch() -> None:
        while child.poll() is None:
            n = sum(len(rows_of(folder, "batch")) for folder in runs.glob("arc_complete_2*"))
            if n >= wanted:
                child.terminate()
                return
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()


def epoch(args: argparse.Namespace) -> Figures:
    """Two epochs, all of the language model trained, checkpoints included."""
    import torch

    times: Figures = {"epoch": [], "saving": [], "tokens": []}
    flags = [
        *flags_of(args, "epoch"), "--epochs", "2", "--qwen_train", "full", "--hypotheses", "off",
        "--save_every", "20", "--max_checkpoints", "1", "--val_pairs", "2", "--eval_views", "1",
        "--vote_batches", "1",
    ]  # fmt: skip
    code, run = run_script(flags, lambda script, run: time_epochs(script, run, times))
    checked(code)
    tokens, took = times["tokens"][-1], times["epoch"][-1]
    decoder = run.system.qwen.transformer
    table = decoder.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in decoder.parameters()) - table
    # renamed in transformers 5; asking for the old name warns there
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    recomputed = next((getattr(decoder, name) for name in names if hasattr(decoder, name)), False)
    done = 6 * weights * tokens  # forward and backward; what is recomputed is no progress
    peak = measured_peak(args.device, run.dtype or torch.float32, 256 if args.rehearse else MATRIX)
    file = max((run.folder / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_size)
    return {
        "epochs_s": times["epoch"],
        "saving_s": times["saving"],
        "tokens": tokens,
        "weights": weights,
        "recomputed": bool(recomputed),
        "tflops_s": done / took / 1e12,
        "peak_tflops_s": peak / 1e12,
        "share_of_peak": done / took / peak,
        "checkpoint_gb": file.stat().st_size / GB,
        **peak_memory(args.device),
    }


def time_epochs(script: Any, run: Any, times: Figures) -> None:
    """Note seconds of every epoch's batches and of the saves waited for, and the tokens read."""
    read = {"tokens": 0}

    def count(module: Any, given: Any, options: Any) -> None:
        if module.training:
            read["tokens"] += options["input_ids"].numel()

    run.system.qwen.backbone.register_forward_pre_hook(count, with_kwargs=True)
    real_epoch, real_save = script.train_epoch, script.save

    def train_epoch(*given: Any) -> None:
        read["tokens"], begun = 0, time.monotonic()
        real_epoch(*given)
        times["epoch"].append(time.monotonic() - begun)
        times["tokens"].append(read["tokens"])

    def save(*given: Any, **options: Any) -> Any:
        begun = time.monotonic()
        result = real_save(*given, **options)
        times["saving"].append(time.monotonic() - begun)
        return result

    script.train_epoch, script.save = train_epoch, save


def measured_peak(device: str, dtype: Any, rows: int) -> float:
    """FLOP/s of square matrix products of that type: what this very device can do."""
    import torch

    a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    sync = torch.cuda.synchronize if device != "cpu" else lambda: None
    best = 0.0
    for _ in range(3):
        sync()
        begun = time.monotonic()
        for _ in range(10):
            a @ b
        sync()
        best = max(best, 10 * 2 * rows**3 / (time.monotonic() - begun))
    return best


def lora(args: argparse.Namespace, name: str, limit_gb: float) -> Figures:
    """Adapters alone are trained, in so much memory; smaller batches where it does not suffice."""
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        raise SystemExit("peft is not installed: pip install peft")
    n = 2 if args.rehearse else 20
    tried = []
    for batch_size, accumulated in BATCHES[-2:] if args.rehearse else BATCHES:
        allow(args.device, limit_gb)
        flags = [
            *flags_of(args, name), "--qwen_train", "lora", "--max_batches", str(n), "--batch_size",
            str(batch_size), "--grad_accum", str(accumulated), "--val_pairs", "2", "--eval_views",
            "1", "--hypotheses", "off",
        ]  # fmt: skip
        code, run = run_script(flags)
        tried.append(batch_size)
        if code != EXIT_MEMORY:
            break
        run = None  # or its tensors stay
        forget(args.device)
    checked(code)
    rows = rows_of(run.folder, "batch")[1:]
    took = 60 * (rows[-1]["minutes"] - rows[0]["minutes"])
    return {
        "limit_gb": limit_gb,
        "batch_size": tried[-1],
        "did_not_fit": tried[:-1],
        "pairs_a_s": sum(row["pairs"] for row in rows[1:]) / took if took else None,
        **peak_memory(args.device),
    }


def allow(device: str, limit_gb: float) -> None:
    """Let this process have so much of a GPU's memory; a CPU's is left as it is."""
    import torch

    total = memory_of(device)
    if total is not None:
        share = min(1.0, limit_gb / total)
        torch.cuda.set_per_process_memory_fraction(share, torch.device(device))


def forget(device: str) -> None:
    """Free what a run that failed has left on a GPU."""
    import gc

    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def resume(args: argparse.Namespace) -> Figures:
    """One epoch, then another after a resume; against two without: every weight, bit for bit."""
    import torch

    n = 2 if args.rehearse else 6
    found: Figures = {}
    models = {"tiny": ("tiny", "full"), "large, lora": (None, "lora")}
    with deterministic():
        for label, (model, train) in models.items():
            name = f"resume_{train}"
            flags = [
                *flags_of(args, name, model), "--qwen_train", train, "--max_batches", str(n),
                "--val_pairs", "2", "--eval_views", "1", "--hypotheses", "off",
            ]  # fmt: skip
            whole, other = args.out / f"runs_{name}" / "whole", args.out / f"runs_{name}" / "parts"
            code, run = run_script([*flags, "--runs_dir", str(whole), "--epochs", "2"])
            checked(code)
            straight = run.folder
            code, run = run_script([*flags, "--runs_dir", str(other), "--epochs", "1"])
            checked(code)
            code, run = run_script(
                ["--resume", "--runs_dir", str(other), "--device", args.device, "--epochs", "2"]
            )
            checked(code)
            a, b = newest(straight), newest(run.folder)
            pairs = list(leaves_beside(a, b))
            differ = [path for path, x, y in pairs if not torch.equal(x, y)]
            found[label] = {"tensors": len(pairs), "differ": len(differ), "first": differ[:3]}
            found[label]["batches"] = b["extra"]["progress"]["total"]
            del a, b, run
            forget(args.device)
    return found


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic algorithms where it has them; set before the GPU is first used."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def newest(run_folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a run."""
    import torch

    path = max((run_folder / "checkpoints").glob("checkpoint_*.pt"))
    payload: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return payload


def leaves_beside(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, tensor, tensor) of two checkpoints' modules and optimizers, as far as they match; a
    part that only one has comes as tensors of unlike length."""
    import torch

    keys = ("agent", "qwen", "solver2", "efe_loss", "policy_rl", "optimizer")
    if not path:
        a, b = ({key: tree[key] for key in keys} for tree in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from leaves_beside(a.get(key), b.get(key), f"{path}.{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from leaves_beside(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        yield path, a, b
    elif a != b:
        yield path, torch.zeros(0), torch.zeros(1)


def score(args: argparse.Namespace) -> Figures:
    """What a time budget gives on this machine, with the tiny language model."""
    budget = ["--time_budget", str(args.minutes)]
    if args.rehearse:  # of which imports alone would take half a minute
        budget = ["--max_batches", "3", "--eval_views", "2"]
    code, run = run_script([*flags_of(args, "score", "tiny"), *budget])
    checked(code)
    result = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    names = ("n", "exact_at_1", "exact_at_2", "size_accuracy", "cell_accuracy", "minutes", "batch")
    found = {name: result[name] for name in names}
    found["slices"] = {name: row["exact_at_2"] for name, row in result["slices"].items()}
    found["alone"] = {name: row["exact_at_2"] for name, row in result["alone"].items()}
    return {**found, **peak_memory(args.device)}


SECTIONS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "first": first,
    "epoch": epoch,
    "lora_8": lambda args: lora(args, "lora_8", 8.0),
    "lora_16": lambda args: lora(args, "lora_16", 16.0),
    "resume": resume,
    "score": score,
}


# ---------------------------------------------------------------- the table


def line_of(name: str, section: Figures) -> str:
    return f"{name}: {'done' if section['ok'] else 'NO RESULT'} in {section['s']:.0f} s"


def print_table(found: Figures) -> None:
    device = found["device"]
    print(f"\n{device['name']}, torch {device['torch']}, commit {device['commit']}")
    if found["rehearsal"]:
        print("A REHEARSAL: a tiny model; none of these figures is a measurement")
    print("| section | s | figures |\n|---|---|---|")
    for name, section in found["sections"].items():
        if section["ok"]:
            shown = {key: rounded(v) for key, v in section.items() if key not in ("ok", "s")}
            text = ", ".join(f"{key} {value}" for key, value in shown.items())
        else:
            text = f"NO RESULT: {section['why']}; {' / '.join(section['last_lines'])}"
        print(f"| {name} | {section['s']:.0f} | {text} |")


def rounded(value: Any) -> Any:
    """Floats to four digits, inside lists, too."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
