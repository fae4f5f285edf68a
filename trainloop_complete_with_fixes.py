"""Train the ARC-AGI agent: the command line, the per-task loop, logging, saving and resuming.

    python trainloop_complete_with_fixes.py --epochs 20 --device cuda
    python trainloop_complete_with_fixes.py --resume --epochs 20 --device cuda
    python trainloop_complete_with_fixes.py --max_batches 100 --device cpu

It holds no model code: the modules live in the files beside it, what a run is in `run_state`, how
one goes on in `resuming`. This file reads top to bottom in the order things happen. Nothing runs at
import; as a script it answers --help and wrong flags before it imports torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sinks
from command_line import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_MEMORY,
    EXIT_MISSING,
    EXIT_UNSAVED,
    Answer,
    Parser,
    UserError,
    add_version,
    answer_early,
    backup_or_off,
    batch_pair,
    check_device_name,
    checkpoint_name,
    cores,
    guarded,
    leave,
    memory_message,
    memory_of,
    no_bar,
    number,
    pick_device,
    pick_precision,
    share_cores,
    task_counts,
)
from config_file import differences, merge_config
from environment import environment_text
from persistence.run_guard import DRIVE_HURRY_S

STARTED = time.monotonic()  # as a script: of the process; a --time_budget counts from here
DRIVE_WAIT_S = 60.0  # at a normal end, seconds the last copy to Drive may still take
MEMORY_ADVICE = (
    "Use a smaller --batch_size (with --grad_accum), a smaller --width, or --qwen_train frozen."
)
EXAMPLES = """examples:
  python %(prog)s --time_budget 4               # minutes, all included
  python %(prog)s --epochs 20 --device cuda     # more --epochs go on later
  python %(prog)s --resume                      # after an interruption
  python %(prog)s --dry_run                     # what memory would it take
  python %(prog)s --data my.json --offline      # your tasks, no network
  python %(prog)s --config runs/RUN --seed 1    # as RUN, with another seed

"""


# ---------------------------------------------------------------------------------------------
# The flags (standard library only: --help must not wait for torch)
# ---------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    """All flags, grouped, each with its unit and default; a wrong one exits with code 2."""
    parser = Parser(
        prog="trainloop_complete_with_fixes.py",
        description="Train on ARC-AGI tasks: demonstrations -> Qwen prompt -> agent -> policy.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES
        + "exit codes: 0 done, 1 unexpected, 2 arguments, 3 data/model/checkpoint missing or\n"
        "unreadable, 4 out of memory, 5 diverged, 6 done or stopped, but the last state is not on\n"
        "the disk, 130/143 stopped by a signal after saving.",
    )
    # fmt: off
    add_version(parser)
    parser.add_argument("--env", action=Answer, const=environment_text,
        help="print versions, GPU, memory, disk, Drive and data, for a bug report, and exit")
    count, real, share = number(int, 1, 10**9), number(float, 0), number(float, 0, 1)
    add = parser.add_argument_group("run").add_argument
    add("--epochs", type=count,
        help="passes over the training tasks (default: 20; 1 with --max_batches; as many as fit "
             "with --time_budget)")
    add("--time_budget", type=number(float, 0.1), metavar="MIN",
        help="minutes for everything, imports to final evaluation; the learning rate falls "
             "towards 0 before the end (default: none)")
    add("--max_batches", type=count, metavar="N",
        help="batches per epoch at most, and validation on N x batch size pairs (default: all)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of everything (default: 0)")
    add("--resume", nargs="?", const="latest", metavar="RUN",
        help="go on with the newest run in --runs_dir, or with folder RUN; 'auto' starts fresh "
             "if there is none (default: off)")
    add("--checkpoint", type=checkpoint_name, metavar="N",
        help="with --resume: go on from checkpoint N, or from 'best'; newer ones move to the "
             "run's folder set_aside (default: the newest)")
    add("--config", metavar="FILE",
        help="the flags of a run's config.json (or of a run's folder) once more, in a fresh run; "
             "flags given beside it win; with a --time_budget in it the clock decides again, "
             "unless --schedule_batches is given (default: none)")
    add("--allow_mismatch", action="store_true",
        help="resume although seed, data, batch size or model differ (default: refuse)")
    add("--threads", type=number(int, 1, 1024),
        help="CPU threads (default: cores; with a --time_budget below 8, one less: hypotheses "
             "want it); a tiny model trains on one and answers so many batches at once, fewer "
             "while hypotheses are fitted")
    add("--dry_run", action="store_true",
        help="set everything up, print it and the memory that the run takes, train nothing; of "
             "Qwen only its config.json is loaded")
    add("--quiet", action="store_true", help="console: epoch lines and errors only")

    add = parser.add_argument_group("data").add_argument
    add("--data",
        help="arcagi2, arcagi1, a JSON file, a Kaggle challenges file, a folder or a zip archive "
             "(default: training.json of this folder or beside the script; else Kaggle's folder, "
             "in its notebooks; else arcagi2)")
    add("--strict", action="store_true",
        help="stop at the first task or file of --data that cannot be used (default: leave it out)")
    add("--batch_size", type=count,
        help="pairs per batch, whole tasks (default: 8 on CPU, 128 on a GPU)")
    add("--batch_cells", type=count, metavar="N",
        help="cells of the queries' canvases per batch at most, a larger task is a batch of its "
             "own (default: none on CPU; on a GPU what its memory holds)")
    add("--grad_accum", type=count, default=1,
        help="batches per optimizer step (default: %(default)s)")
    add("--max_side", type=number(int, 1, 30), default=30,
        help="train on tasks whose demonstrations fit this side, in cells (default: %(default)s)")
    add("--cost_power", type=number(float, 0, 2), metavar="P",
        help="a task of c cells appears (100 / c) ** P times an epoch, at most once, c the area "
             "of its largest demonstration input; 0 = always (default: 0; 1.5 on CPU with "
             "--time_budget or --schedule_batches)")
    add("--max_context", type=number(int, 1, 16), default=4,
        help="demonstrations a query sees at most in training (default: %(default)s)")
    add("--augment", dest="views", choices=("on", "off"), default="on",
        help="train on random views: dihedral transforms and colour permutations (default: "
             "%(default)s)")
    add("--views", dest="views", choices=("on", "off"), default="on", help=argparse.SUPPRESS)

    add = parser.add_argument_group("model").add_argument
    add("--qwen_model", default="auto",
        help="auto (Qwen/Qwen2.5-1.5B on a GPU, tiny on CPU), tiny, a hub id or a folder "
             "(default: %(default)s)")
    add("--qwen_train", choices=("auto", "full", "lora", "frozen"), default="auto",
        help="what of Qwen is trained (default: %(default)s)")
    add("--qwen_cache_interval", type=count, default=1, metavar="N",
        help="1: Qwen reads each pair in its random view; N > 1: as the task has it, with "
             "gradient every Nth time the pair comes up, and its reading is reused in between; a "
             "frozen Qwen reads each pair once anyway (default: %(default)s)")
    add("--offline", action="store_true", help="never ask a model hub")
    add("--width", type=number(int, 16),
        help="channels of the agent (default: 96 on CPU, 512 on a GPU, 256 on one of less than "
             "20 GB)")
    add("--blocks", type=count, help="blocks per planning step (default: 1; 2 on a GPU)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--agent_lr", type=real, default=3e-3,
        help="learning rate of the agent (default: %(default)s; the first design used 1e-5)")
    add("--qwen_lr", type=real,
        help="learning rate of Qwen and its projections (default: 1e-3 for tiny, which starts "
             "from nothing, 5e-5 for other models)")
    add("--task_lr_factor", type=real, default=10.0,
        help="task tokens learn this much faster (default: %(default)s)")
    add("--optimizer", choices=("muon", "adamw", "adamw8bit"), default="muon",
        help="for hidden matrices; the rest is AdamW; adamw8bit: as muon, and of Qwen's own "
             "weights AdamW keeps its moments in 8 bits, 2 bytes a weight for 8 (pip install "
             "bitsandbytes) (default: %(default)s)")
    add("--weight_decay", type=real, default=0.01,
        help="decoupled, per learning rate (default: %(default)s)")
    add("--warmup_batches", type=number(int, 0), default=50,
        help="batches of linear warmup (default: %(default)s)")
    add("--schedule", choices=("auto", "constant", "wsd"), default="auto",
        help="constant, or warmup-stable-decay to 0, which needs --time_budget or "
             "--schedule_batches; auto decays only with these, so that --epochs can be raised "
             "later (default: %(default)s)")
    add("--schedule_batches", type=batch_pair, metavar="A:B[:C]",
        help="wsd in batches: fall from batch A to 0 at batch B; training ends there, or at "
             "batch C; repeats a --time_budget run bit for bit (default: off)")
    add("--decay_frac", type=share, default=0.5,
        help="share of the training time over which wsd falls to 0 (default: %(default)s)")
    add("--draw_steps", choices=("on", "off"), default="on",
        help="a training batch takes 1 to --planning_steps steps, k of them with odds 1/k; off: "
             "always all (default: %(default)s)")
    add("--clip", type=real, default=1.0,
        help="largest gradient norm of all trained modules together (default: %(default)s)")
    add("--ema", type=share, default=0.998,
        help="decay of the averaged weights used for evaluation; 0 = off (default: %(default)s)")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="mixed precision; auto: bf16 where native, else fp16 on a GPU; off on CPU "
             "(default: %(default)s)")

    add = parser.add_argument_group("saving and reporting").add_argument
    add("--runs_dir", default="runs", help="where runs go (default: %(default)s)")
    add("--save_every", type=count, default=50,
        help="batches between checkpoints (default: %(default)s)")
    add("--max_checkpoints", type=count, default=5,
        help="rolling checkpoints kept (default: %(default)s)")
    add("--best_metric", choices=("accuracy_delta", "val_accuracy", "cell_accuracy"),
        default="accuracy_delta", help="what best_model.pt is best by (default: %(default)s)")
    add("--drive_backup", type=backup_or_off, metavar="DIR",
        help="copy checkpoints there; off: nowhere (default: what setup_drive_backup set up for "
             "this project folder, else off)")
    add("--drive_wait", type=real, metavar="S",
        help="seconds that the end of a run waits for copies to Drive at most (default: "
             f"{DRIVE_WAIT_S:g}; {DRIVE_HURRY_S:g} after a signal or an error)")
    add("--report_to", choices=("none", *sinks.NAMES), default="none",
        help="where the figures of metrics.jsonl are shown as well; each needs a pip install of "
             "that name; with --offline nothing is sent (default: %(default)s)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_views", type=number(int, 1, 64),
        help="views that vote in the final evaluation (default: 8, as far as they fit in a "
             "--time_budget; on CPU without one 2, with --max_batches 1)")
    add("--vote_batches", type=count, metavar="N",
        help="batches of the final evaluation at most, its first view always whole; repeats the "
             "voting of a --time_budget run (default: all)")
    add("--val_pairs", type=count,
        help="test pairs of the validation after each epoch, a fixed subset (default: all; 100 "
             "on CPU with --time_budget or --schedule_batches)")
    add("--hypotheses", choices=("on", "off"), default="on",
        help="exact rules fitted to the demonstrations, in processes beside training: the "
             "policy chooses among their answers, in training and in the final evaluation "
             "(default: %(default)s)")
    add("--acceptance", choices=("full", "demonstrations", "off"),
        help="what a refinement needs to be accepted in the final evaluation; full: its way of "
             "fitting re-predicts every demonstration from the others; demonstrations: or more "
             "of their cells than the network does, which costs about one view more; off: "
             "nothing (default: demonstrations; full with --time_budget, --schedule_batches or "
             "--max_batches)")
    add("--hold_out", type=number(int, 2), metavar="N",
        help="leave every Nth training task out of training and validation; the final "
             "evaluation reports them apart (default: none)")
    add("--hypothesis_tasks", type=task_counts, metavar="N[:M]",
        help="the policy chooses among the hypotheses of the N smallest tasks, those up to M "
             "vote without it; waits for them; repeats the voting of a --time_budget run "
             "(default: all; with --time_budget what is ready)")
    add("--stop_confidence", type=share, default=0.8, metavar="P",
        help="at prediction, planning ends where the expected share of right cells reaches P; 1 "
             "= always all steps (default: %(default)s)")

    add = parser.add_argument_group("ablations (what each part earns)").add_argument
    add("--demonstrations", choices=("on", "off", "shuffled"), default="on",
        help="off: nothing sees them, neither Qwen nor agent nor size rules; shuffled: another "
             "task's (default: %(default)s)")
    add("--prompt", choices=("full", "no_qwen", "null", "shuffled"), default="full",
        help="the prompt's tokens alone, the agent still sees the demonstrations; null: none of "
             "them; no_qwen: without the language model; shuffled: another task's (default: "
             "%(default)s)")
    add("--policy", choices=("on", "off", "random"), default="on",
        help="the refinement policy (default: %(default)s)")
    add("--no_memory", action="store_true", help="no memory bank")
    add("--no_task_tokens", action="store_true", help="no per-task tokens")
    add("--no_efe_extras", action="store_true", help="cross-entropy only")
    add("--no_hard_cells", action="store_true", help="plain mean over cells")
    add("--no_reward", action="store_true", help="combined loss without reward")
    add("--planning_steps", type=number(int, 1, 5), default=5,
        help="planning steps (default: %(default)s)")
    # fmt: on
    return parser


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags as given, checked as far as is possible without torch; leaves on wrong ones."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.config is not None:
        merge_config(parser, args, explicit_arguments(argv))
    if args.checkpoint is not None and args.resume is None:
        parser.error(f"--checkpoint {args.checkpoint}: say --resume, too")
    if args.checkpoint is not None and args.resume == "auto":
        args.resume = "latest"  # a named checkpoint means no fresh run
    timed = args.time_budget or args.schedule_batches
    if args.schedule == "wsd" and not timed and args.resume is None:
        parser.error(
            "--schedule wsd: nothing says when the learning rate is to fall; add --time_budget MIN "
            "or --schedule_batches A:B"
        )
    check_device_name(parser, args.device)
    check_width(parser, args.width)
    return args


def explicit_arguments(argv: list[str] | None) -> set[str]:
    """Names of the flags that were really given, defaults left out."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def check_width(parser: Parser, width: int | None) -> None:
    """Heads share the channels of the agent evenly."""
    if width is not None and width % heads_of(width):
        unit = 48 if width < 256 else 64
        parser.error(f"--width {width}: use a multiple of {unit} (channels of a head)")


def heads_of(width: int) -> int:
    """Attention heads of an agent, at least two (rows and columns): of about 48 channels when
    narrow, 64 from width 256 on."""
    return max(2, width // 48) if width < 256 else width // 64


if __name__ == "__main__":
    answer_early(read_flags, MEMORY_ADVICE)

import numpy  # noqa: F401 - where it is missing, torch would complain first
import torch
from tqdm import tqdm

import evaluation
from arc_agent import drawn_steps
from arc_system import (
    SystemConfig,
    answer_stats,
    arms_right,
    build_system,
    rows_of,
    takes_one_thread,
)
from batches import Batch, Collator, Targets, TrainingStream, generator_for, prefetch
from curriculum import (
    DynamicMemoryThreshold,
    GradientMonitor,
    Schedule,
    SizeWarmupCurriculum,
    gradient_norm,
)
from dataset_arc import Task, TaskSet, default_data, found_by_itself, load_tasks
from distributed import check_data, check_flags, nothing_saved, share_state, shared_fitter
from grid_accuracy_loss import (
    cell_accuracy,
    exact_match,
    mean_colour,
    resize_logits,
)
from hypotheses import workers_on
from language_model import resolve_qwen_model
from loss_function import EFE_SHARE, combined_loss
from loss_function import PARTS as EFE_PARTS
from memory_plan import advice_for, cells_that_fit, fixed_needs, plan_of
from model_persistence import ModelPersistence, StopSignals
from optimizers import MuonAdamW, WeightAverage, eight_bit_functions
from persistence.find_run import point_latest_at
from persistence.from_drive import Located
from ranks import ALONE, Part, Ranks, joined_ranks
from resuming import (
    after_divergence,
    drive_folder,
    locate,
    nothing_left,
    results_stand,
    resume,
    resume_command,
    take_saved_arguments,
    unsaved_line,
)
from run_lines import banner, bar_figures, fitted_again, known_line, log_batch, say_epoch
from run_log import MutedLog, RunLog, listener
from run_scores import Plan, make_plan, score_untrained, seen_tasks, slices_in, validate, vote
from run_state import (
    GRADIENT_FIGURES,
    LINE_EVERY,
    POLICY_FIGURES,
    REWARD_FIGURES,
    VALIDATED,
    Clock,
    Progress,
    Run,
    StopRequested,
    budget_spent,
    checkpoint_extra,
    done_by_schedule,
    finish_saving,
    full_config,
    hold,
    is_finished,
    is_over,
    new_run_folder,
    on_disk,
    save,
    save_last,
    settle_best,
)
from time_budget import batches_expected, note_time, out_of_time, plan_decay, share_time
from trained_model import known_errors
from watching import timed, watch_batch, watch_epoch

WIDE_FROM = 20 * 10**9  # bytes of a GPU: an agent of width 512 from there on (estimate)
MAX_SKIPPED_IN_A_ROW = 25  # non-finite batches in a row before the run counts as diverged
# Weight of the first answer's loss where a second one followed (guess): those queries are mostly
# explained already.
FIRST_ANSWER_WEIGHT = 0.5
ENDLESS = 10**6  # epochs; --time_budget or --schedule_batches ends training long before


# ---------------------------------------------------------------------------------------------
# From the command line to a run
# ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """The script: parse, train, and turn what goes wrong into one message and an exit code.

    started: time.monotonic() from which a --time_budget counts; default: now.
    """
    begun = time.monotonic() if started is None else started

    def action() -> int:
        with joined_ranks() as ranks:
            args = parse_arguments(argv) if ranks.first else argparse.Namespace()
            return run_training(ranks.of_first(args), begun, ranks)

    # Ctrl+C before training: nothing to save; a restore is finished by the next --resume.
    return guarded(action, MEMORY_ADVICE, known_errors)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags with those of the run to resume, and the defaults that depend on other flags."""
    args = read_flags(argv)
    notes = []
    if args.resume is not None:
        parser, given = build_parser(), explicit_arguments(argv)
        args.located = locate(args, given)  # first: what Drive brings back holds the run's flags
        notes = take_saved_arguments(args, given | {"drive_backup"}, parser)
        check_width(parser, args.width)
    timed = args.time_budget or args.schedule_batches
    if args.epochs is None:
        args.epochs = ENDLESS if timed else (1 if args.max_batches else 20)
    if args.schedule == "auto":
        args.schedule = "wsd" if timed else "constant"
    args.notes, args.command = notes, sys.argv[1:] if argv is None else argv
    return args


def run_training(args: argparse.Namespace, started: float, ranks: Ranks = ALONE) -> int:
    """From parsed arguments to the exit code: data, modules, run folder; then the run itself."""
    args.device = pick_device(ranks.device(args.device))
    check_flags(args, ranks)
    fill_device_defaults(args, args.device, ranks.local_world)
    if args.threads:  # of a tiny model fewer later, see `share_cores`
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")

    # Data, model, then a folder: nothing is written for a run that cannot start.
    tasks = load_data(args)
    check_data(args, ranks)
    drive_folder(args, Path(args.runs_dir))
    located = run_to_resume(args)
    # its log begins once the run is locked
    run = set_up(args, tasks, started, ranks, fresh=located.folder is None)
    if run.stream.n_batches(0) == 0:
        raise UserError(
            f"{tasks.name}: no task to train on: {run.stream.n_skipped_single} of "
            f"{len(tasks.train)} have one demonstration only, {run.stream.n_skipped_large} exceed "
            f"--max_side {args.max_side}. "
            + ("Raise --max_side or use" if run.stream.n_skipped_large else "Use")
            + " other --data.",
            EXIT_MISSING,
        )
    folder = located.folder
    if args.dry_run:
        banner(run, tasks, folder, located.notes)
        for line in plan_of(run).lines():
            run.log.say(line)
        return EXIT_DONE
    if args.qwen_model != "tiny":
        args.notes += plan_of(run).warnings()
    try:
        if not ranks.first:
            return run_beside(run, make_plan(args, tasks))
        if folder is None:
            folder = new_run_folder(Path(args.runs_dir))
        return run_in_folder(run, make_plan(args, tasks), folder, located)
    except Exception as error:
        if memory_message(error, "") is None:
            raise
        message = memory_message(error, f"{advice_for(run)}; --dry_run shows what needs how much.")
        raise UserError(str(message), EXIT_MEMORY) from error


def fill_device_defaults(args: argparse.Namespace, device: str, n_processes: int = 1) -> None:
    """Defaults that depend on the device (measured on CPU; guesses on a GPU, see docs/LOG.md).
    n_processes: that share this machine's cores."""
    on_cpu = device == "cpu"
    if args.batch_size is None:
        args.batch_size = 8 if on_cpu else 128
    if args.width is None:
        wide = not on_cpu and memory_of(device) >= WIDE_FROM
        args.width = 96 if on_cpu else (512 if wide else 256)
    if args.blocks is None:
        args.blocks = 1 if on_cpu else 2
    short = on_cpu and (args.time_budget is not None or args.schedule_batches is not None)
    if args.val_pairs is None and short:
        args.val_pairs = 100
    if args.cost_power is None:
        args.cost_power = 1.5 if short else 0.0
    if args.acceptance is None:
        quick = (args.time_budget, args.schedule_batches, args.max_batches) != (None,) * 3
        args.acceptance = "full" if quick else "demonstrations"
    n_cores = max(1, cores() // n_processes)
    lm, _ = resolve_qwen_model(args.qwen_model, device)
    small = on_cpu and takes_one_thread(lm, args.width)
    args.workers = workers_on(n_cores - 1 if small else n_cores // 4)
    brief = args.time_budget is not None and args.time_budget < 8
    if args.threads is None and on_cpu and not small and args.hypotheses == "on" and brief:
        args.threads = max(1, n_cores - args.workers)  # they are fitted until the end


def load_data(args: argparse.Namespace) -> TaskSet:
    """The tasks of --data; what is in args of them is filled in."""
    if args.data is None:
        args.data = default_data()
        args.notes += found_by_itself(args.data)
    tasks = load_tasks(args.data, strict=args.strict, training=True)
    args.data_sha256 = tasks.sha256
    args.notes += differences(args)
    return tasks


def run_to_resume(args: argparse.Namespace) -> Located:
    """What `locate` found for --resume; without a folder where a fresh run is to start.

    Raises UserError where there is nothing to resume, unless with --resume auto.
    """
    if args.resume is None:
        return Located(None, [], [])
    located: Located = vars(args).pop("located")  # no setting: it stays out of config.json
    if located.folder is not None:
        return located
    looked = Path(args.runs_dir) if args.resume in ("latest", "auto") else args.resume
    why = f" ({'; '.join(located.notes)})" if located.notes else ""
    if args.resume != "auto":
        raise UserError(
            f"--resume: nothing to resume in {looked}{why}. Start a run without --resume, "
            "name a run with --resume RUN, or its parent with --runs_dir.",
            EXIT_MISSING,
        )
    args.notes.append(f"--resume auto: NOTHING TO RESUME in {looked}{why}; a fresh run starts")
    return Located(None, [], located.skipped)


def set_up(
    args: argparse.Namespace,
    tasks: TaskSet,
    started: float,
    ranks: Ranks = ALONE,
    *,
    fresh: bool = True,
) -> Run:
    """Build every object of the loop; its log writes no files. fresh: not a run that is resumed,
    whose batches are planned already.

    Weights and the order of batches depend on --seed alone.
    """
    device = args.device
    dtype, scaling = pick_precision(args.amp, device)
    if args.optimizer == "adamw8bit":
        eight_bit_functions()  # that they can be had
    args.qwen_model, _ = resolve_qwen_model(args.qwen_model, device)
    if args.qwen_lr is None:
        args.qwen_lr = 1e-3 if args.qwen_model == "tiny" else 5e-5
    config = SystemConfig(
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
    system = build_system(config, device, offline=args.offline, weights=not args.dry_run)
    at_once = share_cores(device, args.threads, system.one_thread)
    args.qwen_train = system.qwen.train_mode  # "auto" may mean another thing on another device
    collator = Collator()
    groups = system.parameter_groups(
        agent_lr=args.agent_lr,
        qwen_lr=args.qwen_lr,
        task_lr_factor=args.task_lr_factor,
        muon=args.optimizer != "adamw",
        eight_bit=args.optimizer == "adamw8bit",
    )
    optimizer = MuonAdamW(groups, weight_decay=args.weight_decay)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    average = WeightAverage(params, args.ema)
    if args.batch_cells is None and device != "cpu" and fresh:
        fixed = fixed_needs(system, optimizer.param_groups, average, dtype, device)
        args.batch_cells = cells_that_fit(system, fixed, args, dtype, device)
        args.notes.append(f"Batches: {args.batch_cells} cells at most, what the GPU's memory holds")
    return Run(
        args=args,
        device=device,
        dtype=dtype,
        system=system,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.split(":")[0], enabled=scaling),
        average=average,
        stream=TrainingStream(
            seen_tasks(tasks, args.hold_out),
            seed=args.seed,
            batch_size=args.batch_size,
            batch_cells=args.batch_cells,
            max_context=args.max_context,
            max_side=args.max_side,
            task_weights=lambda task: frequency(task, args.cost_power),
            augment=args.views == "on",
            collator=collator,
            ranks=ranks,
        ),
        collator=collator,
        schedule=Schedule(
            args.schedule, args.warmup_batches, *(args.schedule_batches or (None, None))
        ),
        progress=Progress(),
        curriculum=SizeWarmupCurriculum(),
        threshold=DynamicMemoryThreshold(),
        monitor=GradientMonitor(),
        log=RunLog(None, quiet=args.quiet, report_to=args.report_to)
        if ranks.first
        else MutedLog(None),
        clock=Clock(),
        started=started,
        at_once=at_once,
        ranks=ranks,
    )


def frequency(task: Task, power: float) -> float:
    """How often a task appears in an epoch: once up to 100 input cells, then less by `power`."""
    return min(1.0, (100 / max(pair.input.size for pair in task.demonstrations)) ** power)


# ---------------------------------------------------------------------------------------------
# The run: resume, train, score, save, leave
# ---------------------------------------------------------------------------------------------


def run_in_folder(run: Run, plan: Plan, folder: Path, located: Located) -> int:
    """The run in its locked folder, signals caught; whatever happens, it ends saved. Exit code."""
    args = run.args
    with hold(folder), StopSignals() as stop:
        run.log = RunLog(folder, quiet=args.quiet, report_to=args.report_to, offline=args.offline)
        banner(run, plan.tasks, folder, located.notes)
        point_latest_at(folder)
        persistence = ModelPersistence(
            folder,
            max_checkpoints=args.max_checkpoints,
            save_every_n_batches=args.save_every,
            drive_backup=drive_folder(args) or False,
            async_save=True,
            on_message=listener(run.log),
            lock=False,  # held here, for life
        )
        persistence.tidy()
        persistence.passed_over = located.skipped
        drive_s = DRIVE_HURRY_S if args.drive_wait is None else args.drive_wait
        code, failed, diverged, unsaved = EXIT_DONE, True, False, None
        try:
            run.stop = stop
            over = False
            if located.folder is not None:
                resume(run, persistence)
                run.resumed_from = run.place()
                settle_best(run, persistence)
                persistence.back_up()
                if is_finished(run):
                    run.log.say(nothing_left(run), important=True)
                    over = results_stand(run)
            if not share_state(run, over):
                run.log.write_config(full_config(run, plan.tasks))
                plan.slices = slices_in(plan, args.hold_out)
                train_and_score(run, plan, persistence)
                finish_saving(run, persistence)
            drive_s = DRIVE_WAIT_S if args.drive_wait is None else args.drive_wait
            failed = False
        except StopRequested:
            run.stopping()
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
        run.ranks.wait()  # who ends before has the others ended, too
        return code if unsaved is None else EXIT_UNSAVED


def run_beside(run: Run, plan: Plan) -> int:
    """A process that writes nothing: it does its part of all work. Exit code."""
    code = EXIT_DONE
    with StopSignals() as stop:
        run.stop = stop
        try:
            if not share_state(run):
                train_and_score(run, plan, nothing_saved())
        except StopRequested:
            run.stopping()
            code = stop.exit_code
        finally:
            if run.fitter is not None:
                run.fitter.close()
        run.ranks.wait()
    return code


def train_and_score(run: Run, plan: Plan, persistence: ModelPersistence) -> None:
    """Untrained accuracy, the loop, the final evaluation with voting, results.json."""
    args = run.args
    plan.limits.ranks = run.ranks
    if args.time_budget:  # of all processes of the run, one after another, together
        plan.limits.deadline = run.started + 60 * args.time_budget
    if args.hypotheses == "on":  # they need nothing that is trained, and no test output
        start_fitting(run, plan)
    score_untrained(run, plan, persistence)
    unhurried = run.device == "cpu" and plan.limits.deadline is None
    plan.views = args.eval_views or ((1 if args.max_batches else 2) if unhurried else 8)
    share_time(run, plan.limits, len(plan.final), plan.views)
    run.train_started, run.resumed_at = time.monotonic(), run.progress.total
    train(run, plan, persistence)
    if plan.final:
        vote(run, plan)
    run.log.say(f"Run: {run.folder}", important=True)


def start_fitting(run: Run, plan: Plan) -> None:
    """Fit hypotheses to the tasks of the final evaluation, in processes beside training."""
    args = run.args
    ids = {task_id for task_id, _ in plan.final}
    some = [task for task in plan.tasks.train if task.task_id in ids]
    run.fitter = shared_fitter(
        evaluation.without_outputs(some), args.workers, run.ranks, run.kept_hypotheses
    )
    if run.kept_hypotheses:
        run.log.say(known_line(run, run.fitter))
    if args.policy != "off" and args.demonstrations == "on":  # else the ablation would leak
        run.stream.proposals = run.fitter


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


def train(run: Run, plan: Plan, persistence: ModelPersistence) -> None:
    """Epochs of batches from where `run.progress` says. Raises StopRequested after a signal."""
    progress = run.progress
    if progress.total and not budget_spent(run) and out_of_time(plan.limits):
        note_time(run, plan.limits)
        if not progress.batch:
            save(run, persistence, wait=True)
    while progress.epoch < run.args.epochs and (progress.batch or not is_over(run)):
        train_epoch(run, plan, persistence)
        note_time(run, plan.limits)
        finish_epoch(run, plan, persistence)
        if budget_spent(run):
            break


def train_epoch(run: Run, plan: Plan, persistence: ModelPersistence) -> None:
    """What is left of the epoch: a step per batch, its line and row, and the saves that are due.

    Raises StopRequested after a signal, UserError after too many bad batches in a row.
    """
    args, progress = run.args, run.progress
    n_batches = run.stream.n_batches(progress.epoch)
    if args.max_batches:
        n_batches = min(n_batches, args.max_batches)
    epoch_started = time.monotonic() - run.clock.epoch_s
    due = False
    with tqdm(
        total=batches_expected(run, plan.limits, n_batches),
        initial=min(progress.batch, n_batches),
        desc=f"Epoch {progress.epoch}",
        unit="batch",
        leave=False,
        disable=no_bar(args.quiet),
    ) as bar:
        # Of an epoch that was cut short and not closed, only summary and validation are left.
        for batch, targets in batches_of_epoch(run, 0 if is_over(run) else n_batches):
            # Gradients are in no checkpoint: save and stop only where none are pending.
            last = (progress.batch + 1) % args.grad_accum == 0 or progress.batch + 1 == n_batches
            figures = train_step(run, batch, targets, last=last)
            run.recent.add(figures)
            if progress.batch % LINE_EVERY == 0:
                log_batch(run, figures)
            minutes = (time.monotonic() - run.started) / 60
            where = {"epoch": progress.epoch, "batch": progress.batch, "minutes": minutes}
            where |= {"batches_done": progress.total}
            run.log.record({"kind": "batch", **where, **figures})
            watch_batch(run, persistence, figures)
            progress.add(figures)
            progress.last_epoch, progress.last_batch = progress.epoch, progress.batch
            progress.batch += 1
            progress.total += 1
            run.clock.epoch_s = time.monotonic() - epoch_started
            bar.total = batches_expected(run, plan.limits, n_batches)
            bar.set_postfix(bar_figures(run), refresh=False)
            bar.update()
            plan_decay(run, plan.limits)
            if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                why = after_divergence(run, persistence) if run.ranks.first else ""
                raise UserError(why, EXIT_DIVERGED)
            if progress.total == run.resumed_at + 1:
                # Memory for the copy that a save takes, before the first save has to wait for it.
                persistence.prepare(*run.saved_objects(), extra=checkpoint_extra(run))
            due |= persistence.should_save_checkpoint(progress.total)
            if not last:
                continue
            if due and not progress.skipped_in_a_row:  # keep those from before bad batches
                run.log.flush()
                save(run, persistence, metrics=checkpoint_metrics(figures))
                due = False
            if run.stopping():
                raise StopRequested
            if done_by_schedule(run) or out_of_time(plan.limits):
                break


def checkpoint_metrics(figures: dict[str, float]) -> dict[str, float]:
    """The figures worth keeping in a checkpoint's metadata."""
    names = ("loss", "reward", "qwen_grad", "mask_ratio", "d_acc", "accuracy", "exact")
    return {name: round(figures[name], 6) for name in names}


def batches_of_epoch(run: Run, n_batches: int) -> Iterator[tuple[Batch, Targets]]:
    """The epoch's remaining (batch, targets), made ahead in a thread, on the run's device."""
    epoch = run.progress.epoch
    positions = range(run.progress.batch, n_batches)
    made = prefetch(lambda p: run.stream.batch(epoch, p), positions, depth=3)
    for batch, targets in timed(run.clock, made):
        yield run.ranks.level(batch.to(run.device)), targets.to(run.device)


# ---------------------------------------------------------------------------------------------
# One batch, in the order of the design
# ---------------------------------------------------------------------------------------------


def train_step(run: Run, batch: Batch, targets: Targets, *, last: bool = True) -> dict[str, float]:
    """One batch through the whole system; returns the figures of its row in metrics.jsonl.

    batch: Q queries with their C demonstrations, see `batches.Batch`; targets: output
    (Q, rows, cols) int64, -1 outside, size (Q, 2), fits (Q,) bool; both on the run's device. last:
    of the batches whose gradients make one update (--grad_accum). A loss or gradient that is not
    finite raises nothing: the update is skipped, counted and said.
    """
    args, system, progress, ranks = run.args, run.system, run.progress, run.ranks
    place = (args.seed, progress.epoch, progress.batch)
    part = batch.part or Part(slice(None), slice(None), batch.n_tasks, batch.n_queries)

    with run.autocast():
        # 1. Task view -> prompt. Half of the tasks go without their own tokens, so that unseen
        #    tasks, which have none, are no surprise.
        chance = torch.rand(part.n_tasks, generator=generator_for("cpu", *place, 1))[part.tasks]
        keep_task = (chance < 0.5).to(run.device, non_blocking=True)[batch.query_task]
        reading = system.read(batch, keep_task)

        # 2. The agent's first answer. Where no proposal is taken it stands, and learns. In a batch
        #    without proposals all that is refined is the prompt: the second answer learns for it.
        # 3. The policy chooses among the ways to explain the demonstrations and changes the prompt;
        #    the agent answers again where it chose one.
        steps = drawn_steps(args.planning_steps, *place, 3) if args.draw_steps == "on" else None
        draws = ranks.draws(generator_for(run.device, *place, 2), part)
        passed = system.answer_twice(reading, draws, steps=steps)
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
        prompt_weight=part.prompt_weight,
    )
    loss = combined_loss(efe["total"], torch.zeros_like(soft) if args.no_reward else soft)
    if len(again):
        # The first answer learns, too, where a second one followed: less, for those queries are
        # mostly explained already.
        first, goal = rows_of(before, again), target[again]
        own_size, canvas = targets.size[again], (goal.shape[1], goal.shape[2])
        share = FIRST_ANSWER_WEIGHT * len(again) / len(target)
        first_efe = system.efe_loss(
            logits=resize_logits(first.logits, first.size, own_size, canvas),
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
    run.scaler.scale(loss * part.share / args.grad_accum).backward()
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    ranks.sum_gradients(params)
    unscale = 1.0
    if last:
        run.scaler.unscale_(run.optimizer)
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
    if not last:
        ranks.keep_sums_once(params)
    else:
        whole_loss = ranks.sum(loss * part.share)
        healthy = bool(torch.isfinite(norm) & torch.isfinite(whole_loss))
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
                f"[Batch {progress.batch:4d}] skipped: loss {float(whole_loss.detach()):.4g}, "
                f"gradient norm {float(norm):.4g} (not finite; {progress.skipped} so far)"
            )

    # 8. The policy learns from the hard reward: after the main step, own graph, own optimizer. The
    #    choice learns from what each of its group of proposals would have earned.
    health: dict[str, Any] = {}
    choosing: dict[str, Any] = {}
    proposed: dict[str, Any] = {}
    if refinement is not None:
        after_state = system.policy_rl.state(reading.prompt.summary, answer_stats(after))
        learned = refinement.info, reward, after_state
        if not passed.everyone:  # the others' prompt was not changed
            learned = refinement.info.of(again), reward[again], after_state[again]
        learned = ranks.join(learned, part)
        if len(learned[1]):
            health = system.policy_rl.update(*learned)
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
            judged = ranks.join((refinement.choice, rewards, right), part)
            choosing = system.policy_rl.learn_choice(*judged)
        ranks.align([system.policy_rl.rl, system.policy_rl.proposals])
        proposed = {
            "proposed_frac": (batch.proposed_size > 0).all(-1).any(1).float().mean(),
            "proposal_taken_frac": (refinement.choice.taken > 0).float().mean(),
            "proposal_exact": right[:, 1:].any(1).float().mean(),
        }

    # 9. Memory: tasks above the threshold are kept; at the epoch's end it follows the accuracy.
    accuracy = cell_accuracy(shown, target, size_right)
    exact = exact_match(shown, target, size_right).float()
    none = torch.zeros(batch.n_tasks, device=run.device)
    counts = none.index_add(0, batch.query_task, torch.ones_like(accuracy)).clamp(min=1)
    by_task = none.index_add(0, batch.query_task, accuracy) / counts
    summary = torch.zeros(batch.n_tasks, reading.summary.shape[1], device=run.device)
    summary = summary.index_add(0, batch.query_task, reading.summary.detach().float())
    owner = torch.zeros(batch.n_tasks, dtype=torch.long, device=run.device)
    owner[batch.query_task] = batch.task_index
    keep = by_task > run.threshold.get_threshold()
    kept = ranks.join((summary / counts[:, None], owner, by_task, keep), part)
    if system.solver2.use_memory:
        system.solver2.store(*kept)
        if refinement is not None and batch.proposed.shape[1]:
            known = arms_right(batch, refinement.fingerprint, right[:, 1:])
            system.solver2.store_arms(*ranks.join(known, part))

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
        "fits_frac": targets.fits.float().mean(),
        "retrieved_frac": system.retrieved(reading),
        "change": none[0] if refinement is None else refinement.info.change_frac,
        **proposed,
    }
    colours = ranks.join(mean_colour(before.grids()), part)
    common = {
        "answer_spread": colours.std(correction=0),
        "stored": kept[3].sum(),
        **({"grad_norm": norm} if last else {}),
        **norms,
        **{ours: health[theirs] for theirs, ours in POLICY_FIGURES.items() if health},
        **choosing,
    }
    shown_figures, common = (
        {name: value.to(run.device) for name, value in some.items()}
        for some in (shown_figures, common)
    )
    result = ranks.means(shown_figures, part, {"change": reading.prompt.mask.sum()}, common)
    progress.memory_updates += int(result["stored"]) if system.solver2.use_memory else 0
    return result | {
        "qwen_grad": qwen_grad,
        "lr_factor": factor,
        **learning_rates(run.optimizer),
        "size_weight": size_weight,
        "threshold": run.threshold.get_threshold(),
        "pairs": part.n_queries,
    }


def learning_rates(optimizer: MuonAdamW) -> dict[str, float]:
    """The rates of this batch, of the agent and of Qwen's projections, for its row."""
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    return {"agent_lr": rates["agent"], "qwen_lr": rates.get("qwen_heads", 0.0)}


# ---------------------------------------------------------------------------------------------
# After a batch, and after an epoch
# ---------------------------------------------------------------------------------------------


def finish_epoch(run: Run, plan: Plan, persistence: ModelPersistence) -> None:
    """Summary, validation, best model; then on to the next epoch."""
    args, progress, say = run.args, run.progress, run.log.say
    run.log.flush()
    save(run, persistence, wait=True)  # a kill during validation must not cost the epoch
    mean = progress.means()
    say_epoch(run, mean)
    row: dict[str, Any] = {
        "kind": "epoch",
        "epoch": progress.epoch,
        **mean,
        "skipped": progress.skipped,
    }
    if plan.validation:
        result = validate(run, plan)
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
    if run.system.qwen.states is not None:
        say(f"[Epoch {progress.epoch}] Frozen Qwen: {run.system.qwen.states.description()}")
    row |= {
        "minutes": (time.monotonic() - run.started) / 60,
        "batch": progress.batch,
        "batches_done": progress.total,
    }
    run.log.record(row)
    watch_epoch(run, persistence, row)
    run.log.flush()
    note_time(run, plan.limits)
    if progress.counted:  # one average an epoch: batches are too unlike to follow one by one
        run.threshold.update(mean["accuracy"])
    progress.next_epoch()
    run.clock.train_s += run.clock.epoch_s
    run.clock.epoch_s = 0.0
    metric = row.get(args.best_metric)
    metrics = {k: v for k, v in row.items() if isinstance(v, float)}
    better = metric is not None and metric > progress.best
    best_of = args.best_metric if better else None
    save(run, persistence, best_of=best_of, wait=True, metrics=metrics)


# ---------------------------------------------------------------------------------------------
# Scores, and the end
# ---------------------------------------------------------------------------------------------


def leave_early(run: Run, persistence: ModelPersistence) -> int:
    """A signal came: save, say how to go on, and leave with the signal's exit code."""
    stop = run.stop
    assert stop is not None
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
        if run.fitter is not None and run.ranks.many:
            run.log.say(fitted_again(run))
    return stop.exit_code


if __name__ == "__main__":
    leave(main(started=STARTED))
