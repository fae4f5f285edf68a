"""What each part earns on one checkpoint: untrained, network, hypotheses, both,
both without acceptance; exact McNemar tests.

    python benchmarks/bench_parts.py runs/RUN                            # the 1076 test outputs
    python benchmarks/bench_parts.py runs/RUN --every 4 --views 2
    python benchmarks/bench_parts.py runs/RUN --data arcagi1 --split evaluation

Every row answers the same queries in two attempts, in the same views, with the averaged weights of
the run's last checkpoint; the untrained row has the weights that the run started from. Hypotheses
are fitted for all tasks first. A McNemar test compares a row with the one above it: of the queries
that only one of them solves, how many each does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import Parser, number, settle_threads  # noqa: E402 - the scripts are no package


def build_parser() -> Parser:
    """All flags, each with its unit and default."""
    parser = Parser(prog="bench_parts.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder or model file")
    parser.add_argument("--data", default="arcagi2", help="as of training (default: %(default)s)")
    parser.add_argument("--split", choices=("train", "evaluation"), default="train")
    parser.add_argument("--every", type=number(int, 1), default=1, help="take every Nth task")
    parser.add_argument("--offset", type=number(int, 0), default=0, help="first task taken")
    parser.add_argument("--views", type=number(int, 1, 64), default=4, help="default: %(default)s")
    parser.add_argument("--threads", type=number(int, 1, 1024), default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the figures as JSON too (default: nowhere)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    settle_threads()
    import torch

    from arc_system import build_system
    from batches import evaluation_views
    from dataset_arc import load_tasks, slices_of
    from evaluation import (
        alone,
        contested_scores,
        gains,
        joined,
        mcnemar,
        outcomes,
        predict_tasks,
        proposals_for,
        refined,
        without_outputs,
    )  # fmt: skip
    from hypotheses import Fitter
    from trained_model import load_model

    torch.set_num_threads(args.threads)
    tasks = load_tasks(args.data)
    chosen = getattr(tasks, args.split)[args.offset :: args.every]
    hidden = without_outputs(chosen)
    model = load_model(args.run, checkpoint="latest", device=args.device)
    fitter = Fitter(hidden)
    untrained = build_system(model.system.config, args.device)
    common: dict[str, Any] = {
        "batch_size": 16, "device": args.device, "seed": model.seed, "task_index": model.task_index
    }  # fmt: skip
    views = evaluation_views(args.views, model.seed)
    begun = time.process_time()
    start = predict_tasks(untrained, hidden, views, **common)
    network_s = time.process_time() - begun
    explained = fitter.collect()
    fitter.close()
    own = contested_scores(model.system, chosen, explained, **common)
    offered: dict[str, Any] = {"proposals": proposals_for(explained), "own_scores": own}
    both = predict_tasks(model.system, hidden, views, **common, **offered)
    free = predict_tasks(model.system, hidden, views, **common, **offered, accept=False)
    start_both = predict_tasks(untrained, hidden, views, **common, **offered)
    rows = {
        "untrained network": start,
        "untrained, with hypotheses": joined(start_both, explained),
        "network alone": both,
        "hypotheses alone": alone(explained),
        "both": joined(both, explained),
        "both, without acceptance": refined(free),
    }
    found = {name: outcomes(predictions, chosen) for name, predictions in rows.items()}
    keys = sorted(set().union(*found.values()))
    solved = {name: [key in row and row[key].exact for key in keys] for name, row in found.items()}
    slices = slices_of(tasks) if (tasks.name, args.split) == ("arcagi2", "train") else {}
    print(
        f"{len(keys)} queries, {args.views} views; {network_s:.0f} CPU s for one row of the network"
    )
    print(
        f"| row | exact in two attempts | in one | {' | '.join(slices)} | "
        "McNemar against the row above |"
    )
    print("|---" * (4 + len(slices)) + "|")
    above: list[bool] | None = None
    figures: dict[str, Any] = {"n": len(keys), "rows": {}, "gains": {}}
    for name, hits in solved.items():
        first = sum(key in found[name] and found[name][key].attempt_1 for key in keys)
        parts = [
            f"{sum(h for key, h in zip(keys, hits, strict=True) if key in some)}/"
            f"{sum(key in some for key in keys)}"
            for some in slices.values()
        ]
        test = "" if above is None else describe(above, hits, mcnemar)
        print(
            f"| {name} | {sum(hits)} ({100 * sum(hits) / len(keys):.1f}%) | {first} | "
            f"{' | '.join(parts)} | {test} |"
        )
        figures["rows"][name] = {"exact_at_2": sum(hits), "exact_at_1": first, "slices": parts}
        above = hits
    for name in ("network alone", "hypotheses alone"):
        print(f"both against {name}: {describe(solved[name], solved['both'], mcnemar)}")
    for name, predictions in (
        ("both", both),
        ("both, without acceptance", free),
        ("untrained", start_both),
    ):
        figures["gains"][name] = gains(predictions, chosen)
        print(
            f"gains, {name}: "
            + ", ".join(f"{k} {v:+.4f}" for k, v in figures["gains"][name].items())
        )
    if args.out is not None:
        figures["solved"] = {
            f"{t}/{i}": [s[k] for s in solved.values()] for k, (t, i) in enumerate(keys)
        }
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def describe(before: list[bool], after: list[bool], test: Any) -> str:
    won = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    return f"+{won} -{lost}, p = {test(won, lost):.2g}"


if __name__ == "__main__":
    main()
