"""Training pairs per second: the trainer's own step beside the same models in a plain loop.

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --cost_power 1.5
    python benchmarks/bench_step.py --device cuda --batches 20 --json step.json

Rows, all in one process, at equal model size, in turn within each repetition:

    ours              `train_step` on what the training stream gives, proposals of hypotheses known
    no hypotheses     the same with --hypotheses off
    no language model the same as the row above, the agent's prompt without the language model
    plain, own size   one pair a step, the language model read before each of the two answers, one
                      optimizer step a pair, nothing kept: the loop as the first design describes
                      it, with this project's modules
    plain, 30 x 30    the same on canvases of 30 x 30
    plain, all 30     the same, and the language model reads grids of 30 x 30, too
    models            forward, losses and backward of the batches of "no hypotheses", made ahead

"no hypotheses" minus "models" is what the loop costs: making batches, clipping, optimizers, the
policy's update, memory, figures. The batches are spread evenly over the sizes that an epoch has,
the pairs of the plain loop over these batches. Medians over the repetitions; compare rows by their
ratios, as machines are shared. CPU seconds are of this process and all its threads. Proposals are
worked out before the clock starts; in a run that happens in processes beside it, once a task.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import (  # noqa: E402 - the scripts are no package
    Parser,
    check_device_name,
    check_output_file,
    number,
    pick_device,
    settle_threads,
)

OURS, NO_HYPOTHESES, NO_MODEL = "ours", "no hypotheses", "no language model"
PLAIN_OWN, PLAIN, PLAIN_ALL = "plain, own size", "plain, 30 x 30", "plain, all 30"
MODELS = "models"
FULL = 30  # cells: side of the largest grid
Figures = dict[str, float]


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(
        prog="bench_step.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--batches", type=number(int, 1), default=6, help="of a repetition (default: %(default)s)")
    add(
        "--plain_pairs",
        type=number(int, 1),
        default=8,
        help="pairs of a repetition in the plain loop (default: %(default)s)",
    )
    add("--repeats", type=number(int, 1), default=3, help="default: %(default)s")
    add("--batch_size", type=number(int, 1), help="pairs (default: the trainer's)")
    add("--width", type=number(int, 16), help="channels of the agent (default: the trainer's)")
    add(
        "--cost_power",
        type=number(float, 0, 2),
        default=0.0,
        help="as of the trainer: 1.5 draws tasks as --time_budget does (default: all alike)",
    )
    add("--qwen_model", default="auto", help="as of the trainer (default: %(default)s)")
    add("--data", default="arcagi2", help="as of the trainer (default: %(default)s)")
    add("--threads", type=number(int, 1, 1024), default=1, help="CPU threads (default: 1)")
    add("--seed", type=number(int, 0), default=0, help="default: 0")
    add("--json", metavar="OUT", help="write the figures there, too (default: off)")
    return parser  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_device_name(parser, args.device)
    if args.json:
        check_output_file(parser, "--json", Path(args.json))
    settle_threads()
    found = measure(args)
    print_table(found)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


# ---------------------------------------------------------------- the runs


class Bench:
    """A run of the trainer that is set up and not begun, for one row of the table."""

    def __init__(self, args: argparse.Namespace, tasks: Any, *, prompt: str = "full") -> None:
        import trainloop_complete_with_fixes as script

        flags = [
            "--device", args.device, "--threads", str(args.threads), "--seed", str(args.seed),
            "--qwen_model", args.qwen_model, "--prompt", prompt, "--quiet", "--offline",
        ]  # fmt: skip
        for flag in ("batch_size", "width", "cost_power"):
            if getattr(args, flag, None):
                flags += [f"--{flag}", str(getattr(args, flag))]
        settings = script.parse_arguments(flags)
        script.fill_device_defaults(settings, args.device)
        settings.data_sha256 = tasks.sha256
        self.script = script
        self.run: Any = script.set_up(settings, tasks, time.monotonic())

    def forget(self, proposals: Any = None) -> None:
        """The stream keeps no analysis of any grid any more, as at the start of a run."""
        from batches import Collator

        self.run.stream.collator = Collator()
        self.run.stream.proposals = proposals
        self.run.stream.n_batches(0)  # the plan of the epoch is made once, not in a batch

    def steps(self, positions: Sequence[int]) -> int:
        """The trainer's own way through some batches of epoch 0, made ahead in a thread as there;
        returns the number of pairs."""
        from batches import prefetch

        pairs = 0
        stream, device = self.run.stream, self.run.device
        made = prefetch(lambda p: stream.batch(0, p), positions, depth=3)
        for number_of_batch, (batch, targets) in enumerate(made):
            self.run.progress.batch = number_of_batch  # it decides how many planning steps
            self.script.train_step(self.run, batch.to(device), targets.to(device))
            pairs += len(targets.size)
        return pairs

    def models(self, prepared: Sequence[tuple[Any, Any]]) -> int:
        """Forward, losses and backward of batches on the device; returns the number of pairs."""
        pairs = 0
        for number_of_batch, (batch, targets) in enumerate(prepared):
            forward_and_loss(self.run, batch, targets, number_of_batch)[0].backward()
            self.run.optimizer.zero_grad(set_to_none=True)
            pairs += len(targets.size)
        return pairs


def forward_and_loss(run: Any, batch: Any, targets: Any, place: int) -> tuple[Any, Any, Any, Any]:
    """(loss, reading, pass, what was earned): what `train_step` asks of the models, and no more, in
    as many planning steps. place: the number of the batch."""
    import torch

    from arc_agent import drawn_steps

    system = run.system
    steps = drawn_steps(run.args.planning_steps, run.args.seed, run.progress.epoch, place, 3)
    with run.autocast():
        reading = system.read(batch, torch.zeros_like(targets.fits))
        draws = torch.Generator(run.device).manual_seed(place)
        passed = system.answer_twice(reading, draws, steps=steps)
        backward = system.backward_both(reading, passed)
        true = system.backward_of(reading, targets.output, targets.size)
    earned = system.reward(reading, passed, targets, backward)
    return loss_of(run, reading, passed, targets, earned, backward, true), reading, passed, earned


def loss_of(
    run: Any, reading: Any, passed: Any, targets: Any, earned: Any, backward: Any, true: Any
) -> Any:
    """The combined loss of an answer that stands."""
    from loss_function import combined_loss

    efe = run.system.efe_loss(
        logits=earned.logits,
        target=earned.target,
        confidence=passed.after.confidence,
        size_right=earned.size_right,
        size_logits=passed.after.size_logits,
        target_size=targets.size,
        size_weight=1.0,
        backward_logits=backward[1],
        backward_logits_true=true,
        inp=reading.batch.query_input,
        pair_summary=reading.pair_summary,
        task_ids=reading.batch.demo_task,
    )
    return combined_loss(efe["total"], earned.soft)


# ---------------------------------------------------------------- the plain loop


def plain_loop(
    bench: Bench, pairs: Sequence[tuple[int, int]], side: int | None = None, *, texts: bool = False
) -> int:
    """One pair a step, as the first design has it; returns the number of pairs.

    pairs: (task, demonstration) of the stream's tasks. side: of every canvas in cells, None: as
    large as the pair asks; texts: the language model reads grids of that side, too.
    """
    import torch

    from batches import Collator, Request, random_view, train_targets

    run = bench.run
    for step, (number_of_task, query) in enumerate(pairs):
        task = run.stream.tasks[number_of_task]
        context = [d for d in range(len(task.demonstrations)) if d != query]
        shown = tuple(context[: run.args.max_context])
        request = Request(
            task=task,
            view=random_view(run.args.seed, step, number_of_task),
            task_index=number_of_task,
            demonstrations=shown,
            queries=(("train", query),),
            contexts=(shown,),
        )
        canvas = None if side is None else (side, side)
        batch = Collator(0).collate([request], canvas)  # keeps nothing
        targets = train_targets([request], batch)
        if side is not None:
            batch.query_input = padded(batch.query_input, side)
            targets.output = padded(targets.output, side)
        if side is not None and texts:
            batch.demo_input = padded(batch.demo_input, side).clamp(min=0)
            batch.demo_output = padded(batch.demo_output, side).clamp(min=0)
            batch.demo_input_size = torch.full_like(batch.demo_input_size, side)
            batch.demo_output_size = torch.full_like(batch.demo_output_size, side)
        plain_step(run, batch.to(run.device), targets.to(run.device), step)
    return len(pairs)


def padded(grids: Any, side: int) -> Any:
    """Grids (n, rows, cols) on a square canvas, -1 outside."""
    from torch.nn.functional import pad

    return pad(grids, (0, side - grids.shape[2], 0, side - grids.shape[1]), value=-1)


def plain_step(run: Any, batch: Any, targets: Any, step: int) -> None:
    """Prompt, answer, prompt again, refined answer, reward, loss, update, policy; nothing kept."""
    import torch

    from arc_system import Pass, answer_stats

    system = run.system
    draws = torch.Generator(run.device).manual_seed(step)
    with run.autocast():
        reading = system.read(batch)
        before = system.answer(reading)
        reading = system.read(batch)  # again: what was read is not kept
        refinement = system.refine(reading, before, draws)
        after = system.answer(reading, refinement)
        nobody = torch.zeros(0, dtype=torch.long, device=run.device)
        passed = Pass(before, after, refinement, nobody, everyone=True)
        backward = (system.backward(reading, before).detach(), system.backward(reading, after))
        true = system.backward_of(reading, targets.output, targets.size)
    earned = system.reward(reading, passed, targets, backward)
    loss = loss_of(run, reading, passed, targets, earned, backward, true)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(params, run.args.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    state = system.policy_rl.state(reading.prompt.summary, answer_stats(after))
    system.policy_rl.update(refinement.info, earned.hard, state)
    float(loss.detach())  # the log line of the pair


# ---------------------------------------------------------------- measuring


class Known:
    """Proposals worked out here, ahead of the clock."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def ask(self, tasks: Sequence[Any]) -> None:
        for task in tasks:
            self.leave_one_out(task)

    def leave_one_out(self, task: Any) -> Any:
        from hypotheses import explain_demonstrations, pairs_of, proposals_of

        if task.task_id not in self.made:
            found = explain_demonstrations(pairs_of(task))
            self.made[task.task_id] = [proposals_of(e) for e in found]
        return self.made[task.task_id]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every row's figures: pairs, and medians of CPU and wall seconds a pair."""
    import torch

    from command_line import device_name
    from dataset_arc import load_tasks

    args.device = pick_device(args.device)
    tasks = load_tasks(args.data)
    ours, bare = Bench(args, tasks), Bench(args, tasks)
    without = Bench(args, tasks, prompt="no_qwen")
    off, plain = Bench(args, tasks), Bench(args, tasks)
    positions = spread(ours.run.stream, args.batches)
    sync = torch.cuda.synchronize if args.device != "cpu" else lambda: None

    # What the rows are about to ask for: proposals, the batches made ahead, the plain loop's pairs.
    known = Known()
    begun = time.process_time()
    names = {task.task_id: i for i, task in enumerate(ours.run.stream.tasks)}
    ids = [pair for position in positions for pair in ours.run.stream.pair_ids(0, position)]
    by_name = {task.task_id: task for task in ours.run.stream.tasks}
    known.ask([by_name[name] for name in dict.fromkeys(name for name, _, _ in ids)])
    proposing_s = (time.process_time() - begun) / len(ids)
    bare.forget()
    prepared = [bare.run.stream.batch(0, position) for position in positions]
    prepared = [(batch.to(args.device), targets.to(args.device)) for batch, targets in prepared]
    every = max(1, len(ids) // args.plain_pairs)
    chosen = [(names[name], i) for name, _, i in ids[::every][: args.plain_pairs]]

    ready = [stream_maker(bench, proposals) for bench, proposals in
             ((ours, known), (off, None), (without, None))]  # fmt: skip
    rows: dict[str, tuple[Callable[[], None], Callable[[], int]]] = {
        OURS: (ready[0], lambda: ours.steps(positions)),
        NO_HYPOTHESES: (ready[1], lambda: off.steps(positions)),
        NO_MODEL: (ready[2], lambda: without.steps(positions)),
        MODELS: (lambda: None, lambda: bare.models(prepared)),
        PLAIN_OWN: (lambda: None, lambda: plain_loop(plain, chosen)),
        PLAIN: (lambda: None, lambda: plain_loop(plain, chosen, FULL)),
        PLAIN_ALL: (lambda: None, lambda: plain_loop(plain, chosen, FULL, texts=True)),
    }
    times: dict[str, list[tuple[int, float, float]]] = {name: [] for name in rows}
    for repeat in range(args.repeats + 1):
        for name, (prepare, work) in rows.items():
            prepare()
            sync()
            cpu, wall = time.process_time(), time.monotonic()
            pairs = work()
            sync()
            if repeat:  # the first one warms up
                took = (pairs, time.process_time() - cpu, time.monotonic() - wall)
                times[name].append(took)
    found = {name: row_of(taken) for name, taken in times.items()}
    loop = {
        clock: 1 - found[MODELS][clock] / found[NO_HYPOTHESES][clock] for clock in ("cpu_s", "s")
    }
    return {
        "device": device_name(args.device),
        "batch_size": ours.run.args.batch_size,
        "batches": len(positions),
        "cost_power": args.cost_power,
        "repeats": args.repeats,
        "qwen": ours.run.system.qwen.description(),
        "rows": found,
        "loop_share": loop,
        "proposals_cpu_s": proposing_s,
        "speedup": {
            name: {clock: found[name][clock] / found[OURS][clock] for clock in ("cpu_s", "s")}
            for name in (PLAIN_OWN, PLAIN, PLAIN_ALL)
        },
    }


def spread(stream: Any, n: int) -> list[int]:
    """Positions of n batches of epoch 0, one in the middle of each of n equal parts of the batches
    by the cells of their inputs."""
    by_name = {task.task_id: task for task in stream.tasks}

    def cells(position: int) -> int:
        found = stream.pair_ids(0, position)
        return sum(by_name[name].demonstrations[i].input.size for name, _, i in found)

    ordered = sorted(range(stream.n_batches(0)), key=cells)
    n = min(n, len(ordered))
    return [ordered[(2 * k + 1) * len(ordered) // (2 * n)] for k in range(n)]


def stream_maker(bench: Bench, proposals: Any) -> Callable[[], None]:
    return lambda: bench.forget(proposals)


def row_of(taken: Sequence[tuple[int, float, float]]) -> Figures:
    """Medians a pair, of CPU and wall seconds, with the lowest and highest CPU seconds."""
    cpu = [c / pairs for pairs, c, _ in taken]
    return {
        "pairs": taken[0][0],
        "cpu_s": statistics.median(cpu),
        "s": statistics.median(s / pairs for pairs, _, s in taken),
        "cpu_s_low": min(cpu),
        "cpu_s_high": max(cpu),
    }


def print_table(found: dict[str, Any]) -> None:
    rows = found["rows"]
    print(f"{found['device']}; {found['qwen']}; batches of {found['batch_size']} pairs")
    print("| loop | pairs | CPU ms a pair (low - high) | pairs a CPU s | pairs a s | times ours |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['pairs']} | {1e3 * row['cpu_s']:.0f} ({1e3 * row['cpu_s_low']:.0f} - "
            f"{1e3 * row['cpu_s_high']:.0f}) | {1 / row['cpu_s']:.2f} | {1 / row['s']:.2f} | "
            f"{row['cpu_s'] / rows[OURS]['cpu_s']:.2f} |"
        )
    share = found["loop_share"]
    print(
        f"the loop beside the models: {100 * share['cpu_s']:.1f}% of the CPU time, "
        f"{100 * share['s']:.1f}% of the time (no hypotheses against models; aim: 5%)"
    )
    ratio = found["speedup"]
    for name, by_clock in ratio.items():
        print(
            f"ours is {by_clock['cpu_s']:.1f} times as fast as: {name} (by CPU time; "
            f"{by_clock['s']:.1f} times by the clock)"
        )
    print(
        f"proposals: {1e3 * found['proposals_cpu_s']:.0f} CPU ms a pair, once a task, beside this"
    )


if __name__ == "__main__":
    sys.exit(main())
