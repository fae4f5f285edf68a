"""A run's settings once more: what `--config FILE` takes from a run's config.json.

The flags of the file go through the parser's own types and choices, and those given on the command
line win. Needs the standard library alone; it trains nothing and writes nothing.
`from config_file import merge_config, differences`.
"""

from __future__ import annotations

import argparse
import errno
import json
import platform
from collections.abc import Mapping
from typing import Any

from command_line import EXIT_MISSING, UserError
from persistence.files import expanded, version_of_package
from resume_rules import BEFORE_THE_FLAG, RULES, as_flags, from_saved

# Of the process that wrote the file: how it was started, not what it trained.
NOT_TAKEN = frozenset(
    {"resume", "checkpoint", "allow_mismatch", "dry_run", "quiet", "config", "runs_dir"}
)
COMPUTED = frozenset({"workers", "data_sha256"})  # recorded beside the flags, worked out again
# The clock or the batches end training: the one on the command line drops the file's other.
INSTEAD = {"time_budget": "schedule_batches", "schedule_batches": "time_budget"}


def merge_config(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]
) -> None:
    """Set the flags of `args` that are not `given` to those of the file args.config, a config.json
    or the folder of its run.

    Ends the process as the parser does, naming the flag, where the file has a value that the
    command line would refuse, or a flag that is not known. Raises UserError where it is no
    config.json.
    """
    if args.resume is not None:
        parser.error(
            "--config and --resume: a resumed run has its own flags; leave --config out, or start "
            "a fresh run without --resume"
        )
    config = read_config(args.config)
    saved = config["arguments"]
    if unknown := sorted(saved.keys() - RULES.keys() - COMPUTED):
        parser.error(
            f"--config {args.config}: this version knows no flag {as_flags(unknown)}; take it out "
            "of a copy of the file, or use the version that wrote it"
        )
    if "versions" in config:  # what a run wrote, not a hand
        saved = {**BEFORE_THE_FLAG, **saved}
    if saved.get("threads") is None and isinstance(config.get("threads"), int):
        saved = {**saved, "threads": config["threads"]}  # by whatever number it had: bits follow it
    dropped = {INSTEAD[name] for name in given & INSTEAD.keys()}
    actions = {action.dest: action for action in parser._actions}
    for name in RULES:
        if name in NOT_TAKEN | given | dropped or name not in saved:
            continue
        try:
            setattr(args, name, from_saved(actions[name], saved[name]))
        except ValueError as error:
            parser.error(f"--config {args.config}: {as_flags([name])}: {error}")


def read_config(path: str) -> dict[str, Any]:
    """The content of a config.json, or of the one in a run's folder: "arguments" is a mapping.

    Raises UserError.
    """
    file = expanded(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        if file.exists() and not file.is_file():  # a pipe or a device may have no end
            raise OSError(errno.EINVAL, "it is no regular file")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--config {path}: {file} cannot be read ({error.strerror or error}). Give a run's "
            "folder, or its config.json.",
            EXIT_MISSING,
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--config {path}: {file} is not JSON ({error}). Give a run's folder, or its "
            "config.json.",
            EXIT_MISSING,
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("arguments"), dict):
        raise UserError(
            f'--config {path}: {file} is no config.json of a run: it has no "arguments". Give a '
            "run's folder, or its config.json.",
            EXIT_MISSING,
        )
    return config


def differences(args: argparse.Namespace) -> list[str]:
    """Why a run by --config may differ from that of the file, a line for the banner; nothing where
    data and versions are the same, or without --config. args: with `data_sha256` of the data."""
    if args.config is None:
        return []
    config = read_config(args.config)
    data, then = config.get("data"), config.get("versions")
    found = []
    if isinstance(data, Mapping) and data.get("sha256", args.data_sha256) != args.data_sha256:
        found.append(f"data then {str(data['sha256'])[:8]}, now {args.data_sha256[:8]}")
    for name, version in (then if isinstance(then, Mapping) else {}).items():
        now = platform.python_version() if name == "python" else version_of_package(name)
        if not same_version(version, now):
            found.append(f"{name} then {version}, now {now or 'missing'}")
    return [f"--config: not the same as then: {'; '.join(found)}"] if found else []


def same_version(then: object, now: str | None) -> bool:
    """Whether two versions are the same; where only one says of which build ("2.13.0+cu130"), as
    torch does of itself and pip may not, that is left out."""
    if isinstance(then, str) and now is not None and ("+" in then) != ("+" in now):
        then, now = then.split("+")[0], now.split("+")[0]
    return then == now
