"""How much memory a run takes, before it takes it: the table of --dry_run, and what to change.

Weights, gradients, optimizer state and checkpoints are counted; what a batch leaves for the
backward pass is estimated, and said to be. Needs the shapes of the modules alone: they may lie on
torch's device "meta". It trains nothing, asks no GPU for memory and writes no files.
`from memory_plan import Plan, plan_of, cells_that_fit`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arc_system import System, SystemConfig
from batches import DEFAULT_CACHE_BYTES
from command_line import NO_BACKUP, device_name, memory_of
from dataset_arc import Task
from language_model import FULL_BYTES_PER_PARAMETER, weight_dtype
from optimizers import WeightAverage
from qwen_hybrid_prompt import bucket_of
from run_state import Run

GB = 1e9
MOST_LOOKED_AT = 4000  # batches of an epoch, evenly, for the largest one
USABLE = 0.9  # of a device's memory: the rest is lost between blocks, or another program's (guess)
# Of the process itself: on a GPU its context and kernels (guess), on a CPU the libraries (measured)
CONTEXT_BYTES, LIBRARY_BYTES = 700 * 10**6, 600 * 10**6
BYTES_OF_STATE = {"muon": 4, "adamw": 8, "adamw8bit": 2}  # a trained number
# Copies that an update makes of its group's numbers, for a moment, on a GPU.
COPIES_IN_STEP = {"muon": 3, "adamw": 1, "adamw8bit": 0}
HALF = 0.77  # of what the agent's blocks keep in float32, they keep under autocast
KEPT_BYTES = 1200  # of a task's hypotheses, all in all; 40 tasks of ARC-AGI-2: 1,183 on average
ON_DISK_BESIDE = 2  # files beside the rolling checkpoints: best_model.pt, and the one being written


@dataclass(frozen=True)
class Line:
    """One row of the table: what, how many bytes, and whether that is an estimate."""

    name: str
    n_bytes: float
    estimate: bool = False


@dataclass(frozen=True)
class Plan:
    """The table: what lies on the device all the time, and what the largest batch adds.

    device: in words; memory: its bytes. fixed: for the whole run; batch: of the largest batch
    (n_queries, n_cells, n_tokens), half of it of a batch half as large. step: of an update, when
    the batch's is free again. host: RAM beside it. checkpoint: bytes of a file; n_files on disk and
    n_copies on Drive, free_disk bytes there are. advice: what to change, where it does not fit.
    """

    device: str
    memory: int
    fixed: tuple[Line, ...]
    batch: tuple[Line, ...]
    step: Line
    host: tuple[Line, ...]
    n_queries: int
    n_cells: int
    n_tokens: int
    checkpoint: int
    n_files: int
    n_copies: int
    free_disk: int
    advice: str

    @property
    def total(self) -> float:
        """Bytes on the device at the worst moment."""
        return total_of(self.fixed) + max(total_of(self.batch), self.step.n_bytes)

    @property
    def fits(self) -> bool:
        return self.total <= USABLE * self.memory

    def warnings(self) -> list[str]:
        """What will go wrong, a line each; none where all fits."""
        found = []
        if not self.fits:
            share = f"{self.total / GB:.1f} of {USABLE * self.memory / GB:.1f} usable GB"
            found.append(f"Memory: DOES NOT FIT, by estimate: {share}. {self.advice}")
        disk = self.n_files * self.checkpoint
        if disk > self.free_disk:
            each = f"{self.checkpoint / GB:.1f} GB"
            found.append(
                f"Disk: NOT ENOUGH for {self.n_files} checkpoints of {each}, "
                f"{self.free_disk / GB:.1f} GB are free. Use a smaller --max_checkpoints, "
                "--qwen_train lora or frozen, or --runs_dir on another disk"
            )
        return found

    def lines(self) -> list[str]:
        """The table, a line each."""
        rows = [f"Memory: {self.device}, {self.memory / GB:.1f} GB (~ marks an estimate)"]
        work: tuple[Line, ...] = self.batch
        if self.step.n_bytes > total_of(self.batch):
            work = (self.step,)
        rows += [_row(line) for line in (*self.fixed, *work)]
        rows.append(_row(Line("total", self.total, True)))
        if self.fits:
            share = f"{self.total / GB:.1f} of {USABLE * self.memory / GB:.1f} usable GB"
            rows.append(f"        fits: {share}")
        rows.append(
            f"        largest batch: {self.n_queries} queries, {self.n_cells} cells, "
            f"{self.n_tokens} tokens of text"
        )
        rows += [_row(line, "RAM: ") for line in self.host]
        disk = self.n_files * self.checkpoint
        rows.append(_row(Line("one checkpoint", self.checkpoint, True), "Disk: "))
        most = _row(Line(f"{self.n_files} files at most", disk, True), "Disk: ")
        rows.append(f"{most}, {self.free_disk / GB:.1f} GB free")
        if self.n_copies:
            copies = Line(f"{self.n_copies} files at most", self.n_copies * self.checkpoint, True)
            rows.append(_row(copies, "Drive: "))
        return rows + self.warnings()


def _row(line: Line, place: str = "") -> str:
    mark = "~" if line.estimate else " "
    return f"        {place + line.name:<46}{mark}{line.n_bytes / GB:9.3f} GB"


def total_of(lines: Iterable[Line]) -> float:
    """Bytes of some rows together."""
    return sum(line.n_bytes for line in lines)


def plan_of(run: Run) -> Plan:
    """The plan of a run that is set up, or of one whose modules are shapes alone."""
    args, system = run.args, run.system
    n_batches = run.stream.n_batches(0)
    some = range(0, n_batches, 1 + n_batches // MOST_LOOKED_AT)
    loads = [run.stream.load(0, position) for position in some]
    tokens = [sum(bucket_of(n) for n in load.lengths) for load in loads]
    n_cells = max((load.n_cells for load in loads), default=0)
    n_queries = max((load.n_queries for load in loads), default=0)
    fixed = fixed_needs(system, run.optimizer.param_groups, run.average, run.dtype, run.device)
    step = Line("an update's copies", _step_bytes(run.optimizer.param_groups), True)
    per_cell = cell_bytes(system.config, half=run.dtype is not None, twice=answers_twice(args))
    reads = reads_language_model(system)
    batch = (
        Line("activations of the agent", per_cell * n_cells, True),
        Line("activations of the language model", _read_bytes(run, max(tokens, default=0)), True),
    )
    memory = memory_of(run.device)
    size = checkpoint_bytes(run)
    host = [Line("analyses of grids, at most", DEFAULT_CACHE_BYTES)]
    if reads and system.qwen.states is not None:
        kept = 2 * _hidden(system) * n_tokens(run.stream.tasks)
        host.append(Line("kept states", min(kept, system.qwen.states.max_bytes), True))
    host.append(Line("a checkpoint's copy, while it is written", size, True))
    if run.device == "cpu":  # the same memory
        fixed, host = (*fixed, *host), []
    plan = Plan(
        device="RAM" if run.device == "cpu" else device_name(run.device),
        memory=memory,
        fixed=tuple(fixed),
        batch=batch,
        step=step,
        host=tuple(host),
        n_queries=n_queries,
        n_cells=n_cells,
        n_tokens=max(tokens, default=0),
        checkpoint=size,
        n_files=args.max_checkpoints + ON_DISK_BESIDE,
        n_copies=0 if args.drive_backup in (None, NO_BACKUP) else args.max_checkpoints + 1,
        free_disk=_free(Path(args.runs_dir)),
        advice=advice_for(run),
    )
    return plan


def fixed_needs(
    system: System,
    groups: Sequence[dict[str, Any]],
    average: WeightAverage,
    dtype: torch.dtype | None,
    device: str,
) -> tuple[Line, ...]:
    """What lies on the device for the whole run; dtype: of autocast."""
    modules = system.modules().values()
    weights = sum(_bytes(t) for m in modules for t in (*m.parameters(), *m.buffers()))
    trained = [p for m in modules for p in m.parameters() if p.requires_grad]
    mine = {id(p) for group in groups for p in group["params"]}
    state = sum(
        BYTES_OF_STATE[kind_of(group)] * p.numel() for group in groups for p in group["params"]
    )
    state += sum(BYTES_OF_STATE["adamw"] * p.numel() for p in trained if id(p) not in mine)
    lines = [
        Line("weights", weights),
        Line("gradients", sum(map(_bytes, trained))),
        Line("optimizer state", state),
        Line("averaged weights (--ema)", sum(map(_bytes, average.average))),
    ]
    if dtype is not None:
        halves = sum(2 * p.numel() for p in trained if p.ndim > 1 and p.dtype == torch.float32)
        lines.append(Line("copies in half precision", halves, True))
    own = LIBRARY_BYTES if device == "cpu" else CONTEXT_BYTES
    return (*lines, Line("libraries" if device == "cpu" else "context of the GPU", own, True))


def n_tokens(tasks: Iterable[Task]) -> int:
    """Tokens of all demonstrations, as text."""
    grids = [g for t in tasks for p in t.demonstrations for g in (p.input, p.output)]
    return sum(1 + g.shape[0] * (g.shape[1] + 1) for g in grids if g is not None)


def kind_of(group: dict[str, Any]) -> str:
    """Which optimizer an optimizer's group has."""
    if group.get("muon"):
        return "muon"
    return "adamw8bit" if group.get("eight_bit") else "adamw"


def cell_bytes(config: SystemConfig, *, half: bool, twice: bool) -> int:
    """Bytes that the agent keeps for the backward pass, per cell of a query's canvas; an estimate.

    Fitted to what autograd saves on a CPU (widths 48 to 192, canvases of 36 to 400 cells): 33 kB a
    cell for sources, cell features and pointers, 316 W for the encoded cells at width W, and for
    each planning step 131 W a block, 20 W and 0.8 kB; 5 kB for losses, reward and backward model.
    Autocast keeps 77% of what grows with W. twice: queries answer again with a proposal, at worst
    all of them. Within a factor of 1.3 (tests/test_memory_plan.py).
    """
    width = config.width * (HALF if half else 1.0)
    step = 131 * width * config.blocks + 20 * width + 800
    answers = (2 if twice else 1) * config.planning_steps * step
    return int(33_000 + 316 * width * config.encoder_blocks + answers + 5_000)


def answers_twice(args: Any) -> bool:
    """Whether both answers of a query may have to be kept for the backward pass."""
    return bool(args.policy != "off" and args.hypotheses == "on" and args.demonstrations == "on")


def reads_language_model(system: System) -> bool:
    """Whether the language model is run at all."""
    return system.qwen.mode not in ("null", "no_qwen")


def _read_bytes(run: Run, n_tokens: int) -> float:
    """What the language model keeps of a batch with so many tokens, padding included."""
    qwen = run.system.qwen
    if not reads_language_model(run.system):
        return 0
    pooled = 4 * _hidden(run.system) * n_tokens  # what the trained pooling keeps
    if qwen.train_mode == "frozen":
        return pooled
    if qwen.read_tokens is not None and n_tokens > qwen.read_tokens:
        n_tokens, pooled = qwen.read_tokens, 4 * _hidden(run.system) * qwen.read_tokens
    return pooled + n_tokens * qwen.bytes_per_token(half=run.dtype is not None)


def _hidden(system: System) -> int:
    return int(system.qwen.pool.queries.shape[1])


def _step_bytes(groups: Sequence[dict[str, Any]]) -> float:
    sizes = (COPIES_IN_STEP[kind_of(group)] * sum(map(_bytes, group["params"])) for group in groups)
    return max(sizes, default=0)


def checkpoint_bytes(run: Run) -> int:
    """Bytes of a checkpoint: what is saved of the modules, optimizer states, averaged weights, all
    hypotheses; 0.3 MB for the rest of it."""
    total = 300_000
    if run.args.hypotheses == "on":
        total += KEPT_BYTES * len(run.stream.tasks)
    for module in run.system.modules().values():
        saved = getattr(module, "persistent_state_dict", module.state_dict)()
        total += sum(_bytes(t) for t in saved.values() if isinstance(t, torch.Tensor))
    for group in run.optimizer.param_groups:
        each = BYTES_OF_STATE[kind_of(group)]
        total += sum(each * p.numel() for p in group["params"])
    mine = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    policy = [p for p in run.system.policy_rl.parameters() if id(p) not in mine]
    total += sum(BYTES_OF_STATE["adamw"] * p.numel() for p in policy)
    total += sum(map(_bytes, run.average.average))
    qwen = run.system.qwen
    if qwen.states is None and qwen.cache.interval > 1 and reads_language_model(run.system):
        n_pairs = min(qwen.cache.capacity, run.stream.n_pairs)
        total += n_pairs * 4 * int(qwen.pool.queries.numel())
    return total


def cells_that_fit(
    system: System, fixed: Sequence[Line], args: Any, dtype: torch.dtype | None, device: str
) -> int:
    """Cells of canvases that a batch may have on a GPU, beside what lies there for the whole run
    and what the language model keeps of a batch; at least one canvas."""
    room = USABLE * memory_of(device) - total_of(fixed)
    qwen = system.qwen
    if reads_language_model(system) and qwen.train_mode != "frozen":
        tokens = qwen.read_tokens or 0
        room -= tokens * (qwen.bytes_per_token(half=dtype is not None) + 4 * _hidden(system))
    per_cell = cell_bytes(system.config, half=dtype is not None, twice=answers_twice(args))
    if reads_language_model(system) and qwen.train_mode == "frozen":
        per_cell += 2 * 4 * _hidden(system)  # about as many tokens as cells of both grids
    return max(900, int(room / per_cell))


def advice_for(run: Run) -> str:
    """What to change where memory does not suffice: flags with values, most useful first."""
    args, mode, found = run.args, run.system.qwen.train_mode, []
    fixed = fixed_needs(run.system, run.optimizer.param_groups, run.average, run.dtype, run.device)
    hopeless = total_of(fixed) > USABLE * memory_of(run.device)  # with whatever batch
    if args.batch_cells and not hopeless:
        found.append(f"--batch_cells {max(1, args.batch_cells // 2)} (now {args.batch_cells})")
    elif args.batch_size > 1 and not hopeless:
        smaller = max(1, args.batch_size // 4)
        factor = args.grad_accum * -(-args.batch_size // smaller)
        found.append(f"--batch_size {smaller} --grad_accum {factor} (now {args.batch_size})")
    n = sum(p.numel() for p in run.system.qwen.backbone.parameters())
    if reads_language_model(run.system) and n > 10**6:
        base = {kind: n * weight_dtype(kind, run.device).itemsize for kind in ("lora", "frozen")}
        have = {"full": n * FULL_BYTES_PER_PARAMETER, **base}
        others = {"full": ("lora", "frozen"), "lora": ("frozen",)}.get(mode, ())
        for other in others:
            less = (have[mode] - have[other]) / GB
            gain = f"about {less:.1f} GB less" if less > 0 else "keeps no activations of Qwen"
            found.append(f"--qwen_train {other} ({gain})")
        if mode == "frozen" and hopeless:
            found.append("a smaller --qwen_model")
        if mode == "full" and args.optimizer != "adamw8bit":
            found.append(f"--optimizer adamw8bit (about {6 * n / GB:.1f} GB less)")
    if args.width > 96:
        found.append(f"--width {max(96, args.width // 128 * 64)} (now {args.width})")
    if not found:
        return "Close other programs, or use a machine with more memory"
    return "Use " + ", or ".join(found)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _free(folder: Path) -> int:
    """Free bytes of the disk that holds a folder, or will."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
