"""A trained model as a folder to share: safetensors, the language model by save_pretrained, a card.

    python export.py runs/arc_complete_20260101_120000 --out my_model
    python predict.py my_model --data my_task.json --show

The folder holds the weights that predict.py uses and needs no run; `exported_model` says what lies
in it. The card (README.md) has the run's own figures, from its config.json and results.json. Never
writes to the run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import (
    EXIT_ARGUMENTS,
    EXIT_DONE,
    EXIT_MISSING,
    Parser,
    UserError,
    add_version,
    check_arguments,
    counted,
    guarded,
)
from persistence.files import expanded
from run_record import figure, part, percent, reached_of, read_object
from trained_model import known_errors, load_model

if TYPE_CHECKING:
    from qwen_hybrid_prompt import QwenHybridPrompt
    from trained_model import Model

CARD_HEAD = """---
license: {licence}
tags:
- arc-agi
---
# {name}

A solver of ARC-AGI puzzles, trained with the ARC-EFE trainer. Exported from the run `{run}`,
{weights} after {batches}.

    python predict.py {name} --data my_task.json --show
    python predict.py {name} --data arcagi2 --split evaluation --score

Both need the trainer's code, not the run. Where the language model is in the folder, `AutoModel` of
transformers reads `{name}/language_model` by itself, `PreTrainedTokenizerFast` its tokenizer.
"""
LIMITS = """## Limits

- **Transductive.** Each task that training met has tokens of its own, learned from its
  demonstrations. So a score on the test inputs of these tasks is not one on tasks it never met.
- **{rules}** Short lists of exact rules are fitted to a task's demonstrations while predicting,
  without these weights; "network alone" above is without them.
- One run with one seed. The test outputs that the score counts were never trained on.
- It answers grids of up to 30 x 30 and knows nothing but ARC's ten colours.
"""


def build_parser() -> Parser:
    """All flags, each with its default."""
    parser = Parser(
        prog="export.py",
        description="Write a trained model as a folder of safetensors with a model card.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python export.py runs --out my_model\n"
        "  python predict.py my_model --data my_task.json --show\n\n"
        "exit codes: 0 done, 1 unexpected, 2 arguments, 3 run/model missing or unreadable, or the\n"
        "folder cannot be written, 4 out of memory, 130 interrupted (nothing is left).",
    )
    add_version(parser)
    parser.add_argument(
        "model",
        metavar="RUN_OR_MODEL",
        help="a run folder, a folder of runs (its newest run), best_model.pt or a checkpoint file",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="the folder to make; it must not exist yet"
    )
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="WHICH",
        help="latest, best or a checkpoint's number; for a run (default: %(default)s)",
    )
    parser.add_argument("--offline", action="store_true", help="never ask a model hub")
    parser.add_argument("--quiet", action="store_true", help="errors only")
    parser.set_defaults(device="cpu")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, checked as far as is possible without torch."""
    parser = build_parser()
    args = parser.parse_args(argv)
    out = Path(os.path.abspath(expanded(args.out)))  # noqa: PTH100 - no links followed
    if os.path.lexists(out):
        parser.error(f"--out {args.out}: is there already; choose a new folder")
    check_arguments(parser, args, [("--out", str(out))])
    args.out = out
    return args


# ---------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------


def run_of(path: Path) -> Path:
    """The folder of a checkpoint's run, where it lies in one; else the file's own."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def card(model: Model, name: str) -> str:
    """The model card: where the weights come from, the run's figures as it measured them, limits,
    licence. What the run's files do not say is left out, and said to be unknown."""
    run = run_of(model.path)
    config, results = (read_object(run / file) for file in ("config.json", "results.json"))
    qwen = model.system.qwen
    copied = qwen.name != "tiny"
    if copied:
        licence = "other"
        terms = (
            f"MIT, but for the language model, {_plain(Path(qwen.name).name)}: its own licence "
            "holds for its weights, here or on the hub."
        )
    else:
        licence, terms = "mit", "MIT: code and weights; the language model was made by the run."
    parts = [
        CARD_HEAD.format(
            licence=licence,
            name=name,
            run=run.name,
            weights="averaged weights" if model.averaged else "weights as they were",
            batches=counted(model.n_batches, "batch", "batches"),
        ),
        "## Training\n\n" + _table(training_rows(model, config, results)),
        "## Score\n\n" + score_text(model, results),
        LIMITS.format(rules=share_of_rules(part(results, "alone"))),
        f"## Licence\n\n{terms}\n",
    ]
    return "\n".join(parts)


def share_of_rules(alone: dict[str, Any]) -> str:
    """How much of a score is not the network's, from the parts by themselves."""
    rules, network = (figure(part(alone, key), "exact_at_2") for key in ("hypotheses", "network"))
    if (rules or 0) > (network or 0):
        return "Most of the score comes from rules."
    return "Rules answer, too."


def _plain(value: Any) -> str:
    """Text from a run's files in a table of Markdown."""
    return " ".join(str(value).replace("|", "/").split())


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {head} | {_plain(value)} |" for head, value in rows if value is not None]
    return "\n".join(lines) + "\n"


def training_rows(
    model: Model, config: dict[str, Any], results: dict[str, Any]
) -> list[tuple[str, Any]]:
    """(what, value) of the training; None: unknown."""
    data, versions = part(config, "data"), part(config, "versions")
    name = data.get("name")
    tasks = f", {counted(data['tasks'], 'task')}" if isinstance(data.get("tasks"), int) else ""
    same = results.get("batch") == model.n_batches
    minutes = figure(results, "minutes") if same else None
    language_model = model.system.qwen.description().split(";")[0]
    if model.system.qwen.revision is None and model.system.qwen.name != "tiny":
        language_model = language_model.replace(
            model.system.qwen.name, Path(model.system.qwen.name).name
        )
    return [
        ("Data", f"{Path(str(name)).name}{tasks}, demonstrations alone" if name else None),
        ("Minutes, evaluation included", f"{minutes:.1f}" if minutes is not None else None),
        ("Batches", model.n_batches),
        ("Seed", model.seed),
        ("Language model", language_model),
        ("Device", config.get("device")),
        ("Commit", config.get("commit")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or None),
    ]


def score_text(model: Model, results: dict[str, Any]) -> str:
    """The run's final evaluation, if these are the weights that it scored."""
    if not results:
        return "Unknown: there is no final evaluation beside the weights (no results.json).\n"
    if results.get("batch") != model.n_batches:
        return (
            f"Unknown: the run's final evaluation is of its weights after batch "
            f"{_plain(results.get('batch'))}, these are after {model.n_batches}.\n"
        )
    rows = _score_rows(results)
    if not rows:
        return "Unknown: the run's results.json holds no score that can be read.\n"
    lines = [
        "| test outputs | n | exact in one attempt | in two | share |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    n = f"{figure(results, 'n'):.0f}"
    views, most, network, rules = (
        figure(results, key)
        for key in ("views_done", "views", "network_queries", "hypothesis_queries")
    )
    if views is not None:
        of = "" if most is None else f" of {most:g}"
        lines.append(f"{views:g}{of} views voted, on average over the test inputs.")
    if network is not None and rules is not None:
        lines.append(
            f"The network answered {network:.0f} of {n} test inputs, hypotheses were fitted for "
            f"{rules:.0f}."
        )
    sizes, cells = (figure(results, key) for key in ("size_accuracy", "cell_accuracy"))
    if sizes is not None and cells is not None:
        lines.append(
            f"Size right: {percent(sizes)}. Cells right: {percent(cells)} (0 where the size is "
            "wrong)."
        )
    start = part(results, "untrained")
    right, of_start = figure(start, "exact_at_1"), figure(start, "n")
    if right is not None and of_start is not None:
        lines.append(
            f"The untrained network, one view: {right:.0f} of {of_start:.0f} validation pairs."
        )
    return "\n".join(lines) + "\n"


def _score_rows(results: dict[str, Any]) -> list[str]:
    """The table's lines, the whole first; none where that cannot be read, and no line of a part
    that cannot."""
    found = []
    counted_on = [("final", results, figure(results, "n"), "")]
    for name in part(results, "alone"):
        own = part(part(results, "alone"), name)
        reached = reached_of(results, name)
        n = figure(results, "n") if reached is None else reached
        note = "" if reached is None else f" that it reached (of {figure(results, 'n'):.0f})"
        counted_on.append((f"{name} alone", own, n, note))
    for name in part(results, "slices"):
        own = part(part(results, "slices"), name)
        counted_on.append((name, own, figure(own, "n"), ""))
    for name, counts, n, note in counted_on:
        one, two = (figure(counts, key) for key in ("exact_at_1", "exact_at_2"))
        if n and one is not None and two is not None:
            found.append(
                f"| {_plain(name)} | {n:.0f}{note} | {one:.0f} | {two:.0f} | {percent(two / n)} |"
            )
        elif counts is results:
            return []
    return found


# ---------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------


def notes_on(qwen: QwenHybridPrompt) -> list[str]:
    """What is done with the language model, where that is not simply a copy."""
    from exported_model import is_reference

    if is_reference(qwen):
        return [
            f"the language model is not copied: {qwen.name} at revision {qwen.revision}, frozen, "
            "is taken from the hub or its cache"
        ]
    if qwen.train_mode == "lora":
        return ["LoRA is merged into the language model: the same up to rounding"]
    return []


def run_export(args: argparse.Namespace) -> int:
    """From parsed arguments to the folder; returns the exit code.

    Raises UserError, ModelError or PersistenceError, with what to do, where the model is missing or
    unreadable, and UserError where the folder cannot be written.
    """
    from exported_model import is_export, write_export

    if is_export(expanded(args.model)):
        raise UserError(f"{args.model}: is an export already; copy the folder", EXIT_ARGUMENTS)
    model = load_model(args.model, checkpoint=args.checkpoint, offline=args.offline)
    for note in model.notes:
        print(f"warning: {note}", file=sys.stderr)
    notes = notes_on(model.system.qwen)
    about = {
        "run": run_of(model.path).name,
        "task_ids": sorted(model.task_index, key=model.task_index.__getitem__),
        "batches": model.n_batches,
        "averaged": model.averaged,
    }
    text = card(model, args.out.name)
    try:
        write_export(args.out, model.system, about, text, offline=args.offline)
    except OSError as error:
        raise UserError(
            f"{args.out}: cannot be written ({error.strerror or error}). Choose another place.",
            EXIT_MISSING,
        ) from error
    if args.quiet:
        return EXIT_DONE
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    weights = "averaged weights" if model.averaged else "weights as they are"
    print(f"Model:  {model.path} ({counted(model.n_batches, 'batch', 'batches')}), {weights}")
    for note in notes:
        print(f"        {note}")
    print(f"Wrote {args.out}: {size / 1e6:.1f} MB, the weights read back and found the same")
    print(f"Use it: python predict.py {args.out} --data my_task.json --show")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """The script: parse, export, and return an exit code."""
    args = parse_arguments(argv)
    return guarded(
        lambda: run_export(args),
        "Export on a machine with more memory.",
        known_errors,
        "interrupted; nothing was written",
    )


if __name__ == "__main__":
    sys.exit(main())
