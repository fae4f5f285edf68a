"""What is wrong with a run while it trains: figures in, findings out.

`Health` keeps the last figures of the batches and epochs, as plain numbers. A check says of them
one number, and whether it is ill; a finding comes once, when that begins, and again only after the
number was healthy. It opens no files, keeps no tensors and knows neither run nor clock:
`watching.py` brings the figures and says what is found. docs/HEALTH.md explains every check.
`from health import CHECKS, Finding, Health, Setting, Storage`.
"""

from __future__ import annotations

import math
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

# How far back a check looks. Most figures differ so much from batch to batch (the tasks do) that
# fewer say little: over WINDOW batches none of nine sound runs came near a threshold.
WINDOW = 50  # batches
SHORT = 20  # batches; for figures that are the same in every batch where they are ill
NEWEST = 10  # batches that are compared with the WINDOW before them
KEPT = 120  # batches that are kept: NEWEST and what they are compared with

# Thresholds. "sound runs": nine runs of 100 to 1,368 batches on a CPU, their worst window.
D_ACC_LOW = -0.2  # the first design's own red flag; sound runs: -0.02
NEVER_POSITIVE = 0.05  # share of batches with a positive reward; sound runs: 0.42
NEGATIVE = -0.001  # mean reward (guess): less is noise of reversibility; sound runs: +0.002
SPREAD_LOW = 0.1  # guess: the policy starts at 0.5, its floor is 0.08; sound runs: 0.499
ALIKE = 0.98  # guess; share of queries whose draws all earned the same; sound runs: 0.57
MASK_ZERO, MASK_ONE = 0.001, 0.999  # the first design's red flag is 0.0001
SOLVED = 0.9  # guess; exact grids from which a figure may stand still because all is learned
EXPLODES = 50.0  # guess; gradient norm, as a multiple of what it was; sound runs: 9
SPIKES, SPIKE_RISE = 3.0, 1.0  # guess; loss, as a multiple, and as a difference; sound runs: 1.63
FLAT, FLAT_EPOCHS = 0.01, 3  # guess; the loss falls by less than this share, so many epochs long
OVERFIT, OVERFIT_EPOCHS = 0.02, 3  # guess; accuracy won in training and lost in validation
OVERFLOWS = 5  # guess; not finite batches of SHORT that fp16 may have: its scale falls by them
SIZE_WEIGHT_END = 0.5  # the first design's: 1.0, 0.833, 0.667, then this
FEW_TASKS = 20  # guess
FEW_BATCHES = 50  # guess; fewer are too few to learn from: `run_lines` and `run_record` say so
WAITS, WAITS_LESS = 0.5, 0.4  # guess; share of the time in which the next batch is waited for
CREEP = 4 << 20  # guess; bytes a batch
SKIPPED_SAVES = 3  # guess; between two looks
SPARE_CHECKPOINTS, SPARE_BYTES = 3, 256 << 20  # guess; what a disk should have free

# `silent` of a batch: it should give the language model a gradient; it need not, others do; none
# does, for the language model is not trained.
ASKED, RESTING, BY_CHOICE = 0.0, 1.0, 2.0

FORMAT = 1  # of state_dict; another one for other figures, or another meaning of them

# What is kept of a batch.
FIGURES = (
    "loss", "exact", "reward", "d_acc", "fits_frac", "mask_ratio", "qwen_grad", "grad_norm",
    "policy_std", "group_zero_frac", "proposed_frac", "stored", "threshold", "retrieved_frac",
    "answer_spread", "size_weight", "pairs",
)  # fmt: skip
# What the checks take for granted, of a batch and of an epoch.
ROW_HAS = frozenset(
    {"loss", "exact", "reward", "d_acc", "mask_ratio", "qwen_grad", "stored", "threshold",
     "size_weight", "pairs", "silent"}
)  # fmt: skip
EPOCH_HAS = frozenset({"loss", "accuracy", "exact", "unweighted"})


@dataclass(frozen=True)
class Setting:
    """What a check has to know of a run beside its figures."""

    n_tasks: int  # that are trained on
    refines: bool = True  # a second answer may follow: --policy is not off
    proposes: bool = True  # hypotheses are proposed while training
    memory: bool = True
    scaling: bool = False  # GradScaler is on: it skips batches by design
    clip: float = 1.0


@dataclass(frozen=True)
class Storage:
    """The run's disk and its saves, at a look."""

    free_bytes: int | None = None  # of the disk; None = not known
    checkpoint_bytes: int = 0  # of the newest checkpoint; 0 = there is none yet
    skipped_saves: int = 0  # of this process: the one before was still being written
    failed_saves: int = 0  # of this process: the disk refused
    drive: str = "off"  # state of the copy, see `persistence.drive.DriveBackup`
    drive_files: int = 0  # that are not on Drive yet


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or (level "note") that is so by choice."""

    name: str
    value: float
    message: str  # what it means
    fix: str
    level: str = "warning"

    def line(self) -> str:
        """For the console: name, number, cause, fix, wrapped at 100 columns."""
        text = f"{self.level}: Health: {self.name} {self.value:.4g}: {self.message}. {self.fix}"
        wrapped = textwrap.wrap(text, 100, subsequent_indent=" " * 9, break_on_hyphens=False)
        return "\n".join(wrapped)


class Seen(NamedTuple):
    """What the checks look at; all lists oldest first."""

    rows: list[dict[str, float]]  # of batches: FIGURES that they had, and `silent`
    epochs: list[dict[str, float]]
    shares: list[float]  # of time spent waiting, a batch
    resident: list[float]  # bytes of the process, a batch
    setting: Setting
    storage: Storage
    before: Storage  # at the look before


# (number, ill); ill None: neither ill nor sound, so nothing changes. None: too little is seen.
Verdict = tuple[float, bool | None] | None


class Check(NamedTuple):
    """A number and when it is ill, what that means, and what to do.

    unless: checks before it that explain it; while one of them is ill, nothing is said of this one.
    """

    name: str
    look: Callable[[Seen], Verdict]
    message: str
    fix: str
    level: str = "warning"
    unless: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------


def column(rows: Iterable[Mapping[str, float]], name: str, n: int) -> list[float] | None:
    """The last n finite values of a figure, None where there are not as many."""
    found = [row[name] for row in rows if name in row and math.isfinite(row[name])]
    return found[-n:] if len(found) >= n else None


def full(rows: Iterable[dict[str, float]], n: int) -> list[dict[str, float]] | None:
    """The last n batches some of whose outputs fit their canvas; the others train sizes alone."""
    found = [row for row in rows if row.get("fits_frac", 1.0) > 0 and math.isfinite(row["loss"])]
    return found[-n:] if len(found) >= n else None


def solved(rows: Iterable[Mapping[str, float]]) -> bool:
    """Whether nearly all that is trained on is right."""
    return fmean(row["exact"] for row in rows) >= SOLVED


# ---------------------------------------------------------------------------------------------
# The language model and the gradients
# ---------------------------------------------------------------------------------------------


def qwen_gradient(seen: Seen) -> Verdict:
    asked = [row["qwen_grad"] for row in seen.rows if row["silent"] == ASKED][-SHORT:]
    return None if len(asked) < SHORT else (max(asked), not any(asked))


def qwen_by_choice(seen: Seen) -> Verdict:
    return (0.0, True) if seen.rows and seen.rows[-1]["silent"] == BY_CHOICE else None


def exploding(seen: Seen) -> Verdict:
    """The whole gradient, and the language model's own before clipping, beside what they were."""
    last = seen.rows[-SHORT:]
    bad = sum(
        math.isfinite(row["loss"]) and not math.isfinite(row.get("grad_norm", 0.0)) for row in last
    )
    if bad > allowed(seen.setting):
        return float(bad), True
    clip = seen.setting.clip
    norms = [row for row in seen.rows if math.isfinite(row.get("grad_norm", math.nan))]
    own = [row["qwen_grad"] * max(1.0, row["grad_norm"] / clip) for row in norms if clip > 0]
    ratios = [
        median(some[-NEWEST:]) / median(some[:-NEWEST])
        for some in ([row["grad_norm"] for row in norms], own)
        if len(some) >= NEWEST + WINDOW and median(some[:-NEWEST]) > 0
    ]
    return (max(ratios), max(ratios) > EXPLODES) if ratios else None


def allowed(setting: Setting) -> int:
    """How many of SHORT batches may be not finite."""
    return OVERFLOWS if setting.scaling else 0


# ---------------------------------------------------------------------------------------------
# Reward, refinement, proposals
# ---------------------------------------------------------------------------------------------


def reward_zero(seen: Seen) -> Verdict:
    rows = full(seen.rows, WINDOW)
    if rows is None or not seen.setting.refines:
        return None
    share = fmean(row["reward"] == 0 for row in rows)
    return share, share == 1


def reward_negative(seen: Seen) -> Verdict:
    rows = full(seen.rows, WINDOW)
    if rows is None:
        return None
    positive, mean = (fmean(row["reward"] > 0 for row in rows), fmean(r["reward"] for r in rows))
    return mean, positive <= NEVER_POSITIVE and mean <= NEGATIVE


def d_acc_low(seen: Seen) -> Verdict:
    rows = full(seen.rows, SHORT)
    if rows is None:
        return None
    mean = fmean(row["d_acc"] for row in rows)
    return mean, mean < D_ACC_LOW


def policy_spread(seen: Seen) -> Verdict:
    values = column(seen.rows, "policy_std", SHORT)
    return None if values is None else (fmean(values), fmean(values) < SPREAD_LOW)


def proposals_alike(seen: Seen) -> Verdict:
    rows = [r for r in seen.rows if r.get("proposed_frac", 0) > 0 and "group_zero_frac" in r]
    rows = rows[-WINDOW:]
    if len(rows) < WINDOW or solved(rows):
        return None
    share = fmean(row["group_zero_frac"] for row in rows)
    return share, share >= ALIKE


def no_proposals(seen: Seen) -> Verdict:
    if not seen.setting.proposes or len(seen.rows) < WINDOW:
        return None
    share = fmean(row.get("proposed_frac", 0.0) for row in seen.rows[-WINDOW:])
    return share, share == 0


# ---------------------------------------------------------------------------------------------
# Hard cells, sizes, memory
# ---------------------------------------------------------------------------------------------


def mask_stuck(seen: Seen) -> Verdict:
    """At 0, at 1 or at anything; at 0 because all is solved is no fault."""
    rows = full(seen.rows, WINDOW)
    if rows is None or solved(rows):
        return None
    mask = [row["mask_ratio"] for row in rows]
    stuck = max(mask) <= MASK_ZERO or min(mask) >= MASK_ONE or max(mask) - min(mask) < 1e-6
    return fmean(mask), stuck


def size_weight_stuck(seen: Seen) -> Verdict:
    values = column(seen.epochs, "size_weight", 2)
    if values is None:
        return None
    return values[1], values[1] >= values[0] and values[1] > SIZE_WEIGHT_END + 1e-6


def memory_not_updating(seen: Seen) -> Verdict:
    stored = column(seen.rows, "stored", WINDOW)
    if stored is None or not seen.setting.memory:
        return None
    return seen.rows[-1]["threshold"], not any(stored)


def memory_not_retrieved(seen: Seen) -> Verdict:
    rows = [row for row in seen.rows if "retrieved_frac" in row][-WINDOW:]
    if not seen.setting.memory or len(rows) < WINDOW:
        return None
    if not any(row["stored"] for row in rows[: WINDOW // 2]):
        return None  # nothing is there yet
    share = fmean(row["retrieved_frac"] for row in rows)
    return share, share == 0


# ---------------------------------------------------------------------------------------------
# The loss, and what it leads to
# ---------------------------------------------------------------------------------------------


def loss_not_finite(seen: Seen) -> Verdict:
    if not seen.rows:
        return None
    bad = sum(not math.isfinite(row["loss"]) for row in seen.rows[-SHORT:])
    return float(bad), bad > allowed(seen.setting)


def loss_flat(seen: Seen) -> Verdict:
    """Epoch by epoch, for the tasks of a batch say more of its loss than training does: cells and
    sizes unweighted, for the curriculum lowers the loss by itself. Or the very same number in every
    batch."""
    last = column(seen.rows, "loss", SHORT)
    if last is not None and max(last) - min(last) <= 1e-9 * abs(last[0]):
        return 0.0, True
    everything = [e["unweighted"] for e in seen.epochs if math.isfinite(e["unweighted"])]
    if len(everything) <= FLAT_EPOCHS or seen.epochs[-1]["exact"] >= SOLVED:
        return None
    before, after = min(everything[:-FLAT_EPOCHS]), min(everything[-FLAT_EPOCHS:])
    fall = (before - after) / max(abs(before), 1e-12)
    return fall, fall < FLAT


def loss_spiking(seen: Seen) -> Verdict:
    losses = column(seen.rows, "loss", NEWEST + WINDOW)
    if losses is None:
        return None
    before, now = fmean(losses[:-NEWEST]), fmean(losses[-NEWEST:])
    return now, now > SPIKES * before and now > before + SPIKE_RISE


def overfitting(seen: Seen) -> Verdict:
    """Cells: exact grids are few, and come by ones."""
    last = seen.epochs[-OVERFIT_EPOCHS:]
    if len(last) < OVERFIT_EPOCHS or not all("cell_accuracy" in epoch for epoch in last):
        return None
    rise = [b["accuracy"] - a["accuracy"] for a, b in pairwise(last)]
    fall = [a["cell_accuracy"] - b["cell_accuracy"] for a, b in pairwise(last)]
    ill = min(rise) > 0 and min(fall) > 0 and sum(rise) >= OVERFIT and sum(fall) >= OVERFIT
    return -sum(fall), ill


def few_tasks(seen: Seen) -> Verdict:
    return float(seen.setting.n_tasks), seen.setting.n_tasks < FEW_TASKS


def same_answers(seen: Seen) -> Verdict:
    """`answer_spread` 0: the first answers of a batch's queries have the same mean colour."""
    rows = [row for row in seen.rows if row["pairs"] > 1 and "answer_spread" in row][-SHORT:]
    if len(rows) < SHORT or solved(rows):
        return None
    spread = max(row["answer_spread"] for row in rows)
    return spread, spread < 1e-6


# ---------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------


def data_bound(seen: Seen) -> Verdict:
    if len(seen.shares) < SHORT:
        return None
    share = fmean(seen.shares[-WINDOW:])
    return share, True if share > WAITS else False if share < WAITS_LESS else None


def memory_creeping(seen: Seen) -> Verdict:
    """Growth a batch, in MiB, where every quarter of the window holds more than the one before."""
    if len(seen.resident) < WINDOW:
        return None
    quarter = WINDOW // 4
    some = seen.resident[-4 * quarter :]
    means = [fmean(some[i : i + quarter]) for i in range(0, 4 * quarter, quarter)]
    steps = [b - a for a, b in pairwise(means)]
    return min(steps) / quarter / 2**20, min(steps) > CREEP * quarter


def saves_behind(seen: Seen) -> Verdict:
    skipped = seen.storage.skipped_saves - seen.before.skipped_saves
    failed = seen.storage.failed_saves - seen.before.failed_saves
    return float(skipped + failed), skipped >= SKIPPED_SAVES or failed > 0


def drive_behind(seen: Seen) -> Verdict:
    return float(seen.storage.drive_files), seen.storage.drive in ("degraded", "lost")


def disk_full_soon(seen: Seen) -> Verdict:
    free = seen.storage.free_bytes
    if free is None:
        return None
    need = max(SPARE_BYTES, SPARE_CHECKPOINTS * seen.storage.checkpoint_bytes)
    return free / 2**20, True if free < need else False if free > 1.5 * need else None


CHECKS = (
    Check(
        "loss_not_finite", loss_not_finite,
        "the loss is NaN or infinite; such batches are skipped",
        "Go on from an earlier checkpoint with a lower --agent_lr, or with --amp off",
    ),
    Check(
        "d_acc_low", d_acc_low,
        "second answers have far fewer right cells than first ones",
        "Go on from an earlier checkpoint (--resume RUN --checkpoint N), or compare with "
        "--policy off",
    ),
    Check(
        "same_answers", same_answers,
        "different inputs get the same answer",
        "Lower --agent_lr and start again; look whether the data has one output for all",
    ),
    Check(
        "qwen_gradient_zero", qwen_gradient,
        "the language model is to be trained, but no gradient reaches it",
        "Look at --prompt and --qwen_train; in the code, for a detached tensor behind the backbone",
    ),
    Check(
        "qwen_not_trained", qwen_by_choice,
        "the language model does not learn, by choice, so Qwen_grad is 0",
        "--qwen_train full or lora, with --prompt full, trains it",
        "note",
    ),
    Check(
        "gradient_exploding", exploding,
        "the gradient is many times what it was, or not finite",
        "Go on from an earlier checkpoint with a lower --agent_lr and --qwen_lr, or --amp off",
    ),
    Check(
        "reward_zero", reward_zero,
        "no refinement has changed an answer for long: what the policy does does not reach it",
        "Leave out --demonstrations off and --prompt null; try --hypotheses on",
    ),
    Check(
        "reward_negative", reward_negative,
        "the refinement makes answers worse, batch after batch",
        "Lower --agent_lr, or compare with --policy off",
        unless=("d_acc_low",),
    ),
    Check(
        "policy_spread_low", policy_spread,
        "the policy has stopped exploring: its proposals for the prompt are all the same",
        "Start again with another --seed, or train the rest with --policy random",
    ),
    Check(
        "proposals_alike", proposals_alike,
        "all proposals of a query earn the same, so the choice among them learns nothing",
        "Use more varied tasks (--data), or --policy off to save the time",
    ),
    Check(
        "no_proposals", no_proposals,
        "hypotheses are on, but none has proposed an answer",
        "Look above for a line on hypotheses that failed; --hypotheses off saves their time",
    ),
    Check(
        "mask_stuck", mask_stuck,
        "the share of wrong cells stands still, so the hard cells are not told from the others",
        "Look at the data (are inputs and outputs the same?) and at --no_hard_cells",
    ),
    Check(
        "size_weight_stuck", size_weight_stuck,
        "the weight of the size loss has not fallen with the epochs: the curriculum stands still",
        "Look at SizeWarmupCurriculum, and whether epochs are counted",
    ),
    Check(
        "memory_not_updating", memory_not_updating,
        "no task was good enough to be stored in memory for long (the number is the threshold)",
        "Train on easier tasks first (--max_side 10), or leave memory out with --no_memory",
        unless=("same_answers", "d_acc_low", "loss_not_finite"),
    ),
    Check(
        "memory_not_retrieved", memory_not_retrieved,
        "tasks are stored in memory, but no prompt draws on them",
        "Use more tasks: a task never retrieves its own entry; or --no_memory",
    ),
    Check(
        "loss_flat", loss_flat,
        "the loss does not fall any more",
        "Raise --agent_lr if it is small; else train on more tasks, or with a larger --width",
    ),
    Check(
        "loss_spiking", loss_spiking,
        "the loss has jumped to a multiple of what it was",
        "Lower --agent_lr, lengthen --warmup_batches, or go on from an earlier checkpoint",
    ),
    Check(
        "overfitting", overfitting,
        "training gets better and validation worse, epoch after epoch",
        "Stop here and use best_model.pt, or use more tasks, --augment on, a smaller --width",
    ),
    Check(
        "few_tasks", few_tasks,
        "so few tasks teach their own answers, not how to solve others",
        "Add tasks to --data; arcagi2 has 1000",
    ),
    Check(
        "data_bound", data_bound,
        "most of the time is spent waiting for the next batch, not training",
        "Give the machine more cores, or --hypotheses off, --max_side, --max_context; close other "
        "programs",
    ),
    Check(
        "memory_creeping", memory_creeping,
        "the process needs more memory with every batch (MiB a batch)",
        "Stop and --resume before it runs out; look for what is kept from batch to batch",
    ),
    Check(
        "saves_behind", saves_behind,
        "checkpoints are not written as fast as they are due, or the disk refuses them",
        "Raise --save_every, or use a faster disk with room (--runs_dir)",
    ),
    Check(
        "drive_behind", drive_behind,
        "the copy on Drive lags behind (files still to copy)",
        "Look whether Drive is mounted and has room; raise --save_every; training goes on",
    ),
    Check(
        "disk_full_soon", disk_full_soon,
        "the disk has little room left (MiB)",
        "Delete old runs, lower --max_checkpoints, or move --runs_dir",
    ),
)  # fmt: skip


class Health:
    """What was seen of a run, and what is known to be wrong with it.

    `see` takes a batch, `close_epoch` an epoch, `look` runs the checks. state_dict holds plain
    numbers and names, so that a resumed run says nothing twice; waiting times, memory and saves are
    of the process and begin anew.
    """

    def __init__(self) -> None:
        self.rows: deque[dict[str, float]] = deque(maxlen=KEPT)
        self.epochs: list[dict[str, float]] = []
        self.ill: set[str] = set()
        self.shares: deque[float] = deque(maxlen=WINDOW)
        self.resident: deque[float] = deque(maxlen=WINDOW)
        self.storage = Storage()
        self.met = 0  # batches of this process
        self.failed = False  # a look has, in this process

    def see(
        self,
        figures: Mapping[str, float],
        silent: float = ASKED,
        *,
        waited: float | None = None,
        resident: int | None = None,
    ) -> bool:
        """Take a batch; whether it calls for a look at once, being not finite.

        figures: of `train_step`; silent:
        ASKED, RESTING or BY_CHOICE; waited: share of the time since the batch before that was spent
        waiting for this one, None where that is not known; resident: bytes of the process.
        """
        row = {name: float(figures[name]) for name in FIGURES if name in figures}
        row["silent"] = silent
        self.rows.append(row)
        if waited is not None:
            self.shares.append(waited)
        self.met += 1
        if resident is not None and self.met > SHORT:  # before that, buffers and caches fill
            self.resident.append(float(resident))
        return not all(math.isfinite(row.get(name, 0.0)) for name in ("loss", "grad_norm"))

    def close_epoch(self, row: Mapping[str, Any]) -> None:
        """Take an epoch's row of metrics.jsonl."""
        names = ("loss", "accuracy", "exact", "cell_accuracy")
        epoch = {name: float(row[name]) for name in names if row.get(name) is not None}
        epoch["unweighted"] = float(row["efe_cons"]) + float(row["efe_size"])
        if self.rows:
            epoch["size_weight"] = self.rows[-1]["size_weight"]
        self.epochs.append(epoch)

    def look(self, setting: Setting, storage: Storage | None = None) -> list[Finding]:
        """What began to be wrong since the last look."""
        now = storage or Storage()
        seen = Seen(
            list(self.rows), self.epochs, list(self.shares), list(self.resident), setting, now,
            self.storage,
        )  # fmt: skip
        self.storage = now
        found = []
        for check in CHECKS:
            verdict = check.look(seen)
            if verdict is None or verdict[1] is None or self.ill.intersection(check.unless):
                continue
            value, ill = verdict
            if ill and check.name not in self.ill:
                found.append(Finding(check.name, value, check.message, check.fix, check.level))
            (self.ill.add if ill else self.ill.discard)(check.name)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "rows": [dict(row) for row in self.rows],
            "epochs": [dict(epoch) for epoch in self.epochs],
            "ill": sorted(self.ill),
        }

    def load_state_dict(self, state: object) -> None:
        """What `state_dict` gave. A state of another version, or none, begins anew: nothing that is
        trained depends on it."""
        self.rows, self.epochs, self.ill = deque(maxlen=KEPT), [], set()
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            return
        rows, epochs = (
            figures_of(state.get("rows"), ROW_HAS),
            figures_of(state.get("epochs"), EPOCH_HAS),
        )
        ill = state.get("ill")
        if rows is None or epochs is None or not isinstance(ill, list):
            return
        if all(isinstance(name, str) for name in ill):
            self.rows.extend(rows)
            self.epochs, self.ill = epochs, set(ill)


def figures_of(rows: object, needed: frozenset[str]) -> list[dict[str, float]] | None:
    """Rows of figures as they were kept; None where they are anything else."""
    if not isinstance(rows, list):
        return None
    for row in rows:
        if not isinstance(row, dict) or not needed <= row.keys():
            return None
        if not all(isinstance(k, str) and type(v) is float for k, v in row.items()):
            return None
    return [dict(row) for row in rows]
