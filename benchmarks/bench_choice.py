"""What the choice among proposals is worth: queries solved after 1, 2, 4, 8 proposals,
by who orders them.

    python benchmarks/bench_choice.py runs/RUN --every 4

Queries are demonstrations, each explained from its task's others by every arm; no test output is
read. Of every five tasks one is held out (of a --hold_out run the tasks that it held out): the
choice is trained anew on the others (a few passes over the network's answers of the run's
checkpoint, 3 seeds) and measured on the held-out ones. Orders: the policy's; the verdicts' (as
`rule_list` ranks them); the best fixed order of arms (greedy on the training tasks); random (mean
of 20). The policy is also trained and measured without one of its inputs: memory empty, memory of
other tasks shuffled, prompt summary zero, prompt summary of another query, no verdict, no look at
the network's own answer. AUC: mean of the shares solved after 1..8 proposals.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import Parser, number, settle_threads  # noqa: E402 - the scripts are no package

N_BEST = 8
SHOWN = (1, 2, 4, 8)
HELD_OUT = 5  # every so many tasks


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(prog="bench_choice.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder or model file")
    parser.add_argument("--data", default="arcagi2", help="as of training (default: %(default)s)")
    parser.add_argument("--every", type=number(int, 1), default=4, help="take every Nth task")
    parser.add_argument("--offset", type=number(int, 0), default=0, help="first task taken")
    parser.add_argument("--passes", type=number(int, 1), default=15, help="over the queries")
    parser.add_argument("--seeds", type=number(int, 1), default=3, help="of training the choice")
    parser.add_argument("--cache", type=Path, help="keep and reuse the explanations in this file")
    parser.add_argument("--out", type=Path, help="write the figures as JSON too (default: nowhere)")
    return parser


def explanations(tasks: Any, cache: Path | None) -> dict[str, list[Any]]:
    """Every arm's answers to every demonstration, from the others, by task id."""
    import pickle

    import rule_list
    from hypotheses import pairs_of
    from rule_arms import Limits

    known: dict[str, list[Any]] = {}
    if cache is not None and cache.is_file():
        known = pickle.loads(cache.read_bytes())
    limits = Limits(max_cells=1600, stop=False)
    for task in tasks:
        if task.task_id not in known:
            known[task.task_id] = rule_list.leave_one_out(pairs_of(task), limits=limits)
    if cache is not None:
        cache.write_bytes(pickle.dumps(known))
    return known


def collect(model: Any, tasks: Any, explained: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """A row a query: its candidates, rewards, and what is exact;
    by the checkpoint's own first answers."""
    import torch

    from arc_system import arms_right, fingerprint
    from batches import TrainingStream
    from hypotheses import proposals_of

    class Known:
        def ask(self, tasks: Any) -> None:
            pass

        def leave_one_out(self, task: Any) -> Any:
            return [proposals_of(e) for e in explained[task.task_id]]

    system = model.system
    system.train(False)
    stream = TrainingStream(
        tasks, 0, 8, augment=False, overflow=False, task_table=model.task_index, proposals=Known()
    )
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for batch, targets in stream.epoch(0):
            if not batch.proposed.shape[1]:
                continue
            reading = system.read(batch)
            before = system.answer(reading)
            generator = torch.Generator().manual_seed(0)
            refinement = system.refine(reading, before, generator, deterministic=True)
            target = targets.output.masked_fill(~targets.fits[:, None, None], -1)
            rewards, exact = system.policy_rl.proposal_rewards(
                before.grids(), batch.proposed, batch.proposed_size, target, batch.query_input,
                own_size=before.size, target_size=targets.size,
            )  # fmt: skip
            c = refinement.choice.candidates
            prints, _, arms = arms_right(batch, fingerprint(batch), exact[:, 1:])
            for q, (task_id, _, number_in_task) in enumerate(batch.pair_ids):
                rows.append({
                    "task": task_id, "number": number_in_task,
                    "facts": c.facts[q], "mask": c.mask[q],
                    "relation": c.relation[q], "state": c.state[q], "rewards": rewards[q],
                    "exact": exact[q], "print": prints[batch.query_task[q]],
                    "arms": arms[batch.query_task[q]],
                })  # fmt: skip
    return rows


def packed(
    rows: list[dict[str, Any]], change: str, train: list[dict[str, Any]], seed: int
) -> tuple[Any, Any, Any]:
    """Rows as one batch of candidates, with one input taken away or exchanged."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from hypotheses import N_ARM_SLOTS, VERDICTS
    from policy_refined import N_STATS
    from proposal_policy import ARM_FACTS, RELATION, Candidates
    from solver2 import Solver2

    def stacked(name: str) -> Any:
        return pad_sequence([row[name] for row in rows], batch_first=True)

    facts, relation, mask = stacked("facts"), stacked("relation"), stacked("mask")
    state = torch.stack([row["state"] for row in rows])
    generator = torch.Generator().manual_seed(seed)
    # memory: what the training tasks' entries say of each query, own task excluded
    memory = Solver2(1, 8)
    ids = sorted({row["task"] for row in train})
    number_of = {task_id: i for i, task_id in enumerate(ids)}
    first = {row["task"]: row for row in reversed(train)}
    arms = torch.stack([first[i]["arms"] for i in ids])
    if change == "memory shuffled":
        arms = arms[torch.randperm(len(arms), generator=generator)]
    if change != "memory empty":
        memory.store_arms(
            torch.stack([first[i]["print"] for i in ids]), torch.arange(len(ids)), arms
        )
    owner = torch.tensor([number_of.get(row["task"], -1) for row in rows])
    recalled = memory.recall(torch.stack([row["print"] for row in rows]), owner)
    assert recalled.shape[1] == N_ARM_SLOTS
    at = RELATION.index("recalled")
    relation[:, 1:, at] = (facts[..., ARM_FACTS] * recalled.clamp(min=0)[:, None]).amax(-1)
    relation[:, 1:, at + 1] = (recalled >= 0).any(-1, keepdim=True).float()
    relation = relation * mask.unsqueeze(-1)
    if change == "prompt zero":
        state[:, :-N_STATS] = 0.0
    elif change == "prompt of another query":
        state[:, :-N_STATS] = state[torch.randperm(len(state), generator=generator), :-N_STATS]
    elif change == "no verdict":
        facts[..., : len(VERDICTS) + 3] = 0.0
        facts[..., 11] = 0.0  # rank
    elif change == "no look at the own answer":
        relation[..., 1:7] = 0.0
        state[:, -N_STATS:] = 0.0
    candidates = Candidates(facts, relation, state, mask)
    return candidates, stacked("rewards"), stacked("exact")


def curve(order: Any, exact: Any) -> list[float]:
    """Share of queries of which one of the first 1..N_BEST proposals is exact.

    order (Q, A): numbers of proposals.
    """
    hit = exact.gather(1, order).float().cummax(1).values
    n = hit.shape[1]
    return [float(hit[:, min(k, n) - 1].mean()) for k in range(1, N_BEST + 1)]


def fixed_order(facts: Any, exact: Any) -> list[int]:
    """Arms, each next one the one that solves most of what those before it do not."""
    from proposal_policy import ARM_FACTS

    by_arm = (facts[..., ARM_FACTS] * exact[:, 1:].unsqueeze(-1)).amax(1) > 0  # (Q, arms)
    left, order = list(range(by_arm.shape[1])), []
    open_ = by_arm.any(1)
    while left:
        best = max(left, key=lambda a: int((by_arm[:, a] & open_).sum()))
        order.append(best)
        left.remove(best)
        open_ = open_ & ~by_arm[:, best]
    return order


def train_policy(candidates: Any, rewards: Any, exact: Any, passes: int, seed: int) -> Any:
    import torch

    from proposal_policy import ProposalPolicy

    generator = torch.Generator().manual_seed(seed)
    policy = ProposalPolicy(candidates.state.shape[1], generator=generator)
    n = len(rewards)
    for _ in range(passes):
        for some in torch.randperm(n, generator=generator).split(32):
            part = dataclasses.replace(
                candidates,
                **{
                    f.name: getattr(candidates, f.name)[some]
                    for f in dataclasses.fields(candidates)
                },
            )
            policy.learn(policy.choose(part, generator), rewards[some], exact[some])
    return policy


def main() -> None:
    args = build_parser().parse_args()
    settle_threads()
    import numpy as np
    import torch

    from dataset_arc import load_tasks
    from proposal_policy import ARM_FACTS
    from trained_model import load_model

    torch.set_num_threads(1)
    chosen = [
        t
        for t in load_tasks(args.data).train[args.offset :: args.every]
        if len(t.demonstrations) > 1
    ]
    explained = explanations(chosen, args.cache)
    model = load_model(args.run)
    rows = collect(model, chosen, explained)
    held = {task.task_id for task in chosen if task.task_id not in model.task_index}
    if not held:
        held = {task.task_id for task in chosen[HELD_OUT - 1 :: HELD_OUT]}
    train = [r for r in rows if r["task"] not in held]
    test = [r for r in rows if r["task"] in held]
    _, _, exact = packed(test, "", train, 0)
    print(
        f"{len(train)} queries to learn from, {len(test)} of held-out tasks, of which the network "
        "alone solves "
        f"{int(exact[:, 0].sum())}, any proposal {int(exact[:, 1:].any(1).sum())}"
    )
    print(
        f"| order | {' | '.join(f'after {k}' for k in SHOWN)} | AUC |\n|---|"
        + "---|" * (1 + len(SHOWN))
    )
    figures: dict[str, Any] = {}

    def show(name: str, curves: list[list[float]]) -> None:
        mean = np.mean(curves, axis=0)
        aucs = [float(np.mean(c)) for c in curves]
        shown = " | ".join(f"{100 * mean[k - 1]:.1f}" for k in SHOWN)
        spread = f" ({min(aucs):.4f}-{max(aucs):.4f})" if len(aucs) > 1 else ""
        print(f"| {name} | {shown} | {np.mean(aucs):.4f}{spread} |", flush=True)
        figures[name] = {"curves": curves, "auc": aucs}

    candidates, rewards, exact = packed(test, "", train, 0)
    offered = exact[:, 1:]
    there = candidates.mask[:, 1:]
    n_offered = offered.shape[1]
    learn_from = packed(train, "", train, 0)
    order = fixed_order(learn_from[0].facts, learn_from[2])
    place = torch.tensor([order.index(a) for a in range(len(order))]).float()
    by_arm = torch.where(candidates.facts[..., ARM_FACTS] > 0, place, 1e3).amin(-1)
    show("best fixed order of arms", [curve((by_arm + 1e4 * ~there).argsort(1), offered)])
    show("verdicts", [curve(torch.arange(n_offered).expand(len(offered), -1), offered)])
    shuffled = []
    for seed in range(20):
        noise = torch.rand(offered.shape, generator=torch.Generator().manual_seed(seed))
        shuffled.append(curve((noise + 10.0 * ~there).argsort(1), offered))
    show("random", [np.mean(shuffled, axis=0).tolist()])
    changes = (
        "", "memory empty", "memory shuffled", "prompt zero", "prompt of another query",
        "no verdict", "no look at the own answer",
    )  # fmt: skip
    for change in changes:
        curves, kept, sure = [], [], []
        for seed in range(args.seeds):
            policy = train_policy(*packed(train, change, train, seed), args.passes, seed)
            inputs, _, _ = packed(test, change, train, seed)
            with torch.no_grad():
                log_p, odds = policy(inputs)
            curves.append(curve(log_p[:, 1:].argsort(1, descending=True), offered))
            best = odds.masked_fill(~inputs.mask, -1e4).argmax(1, keepdim=True)
            kept.append(float(exact.gather(1, best).float().mean()))
            taken = log_p.argmax(1, keepdim=True)
            sure.append(float(rewards.gather(1, taken).mean()))
        show(f"policy{', ' + change if change else ''}", curves)
        name = f"policy, {change}" if change else "policy"
        figures[name] |= {"exact_first": kept, "reward": sure}
        print(
            f"|   the most likely of all candidates is exact | {100 * np.mean(kept):.1f} | "
            f"reward of the chosen | {np.mean(sure):+.4f} | | |"
        )
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
