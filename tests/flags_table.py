"""docs/FLAGS.md, made from the scripts' own parsers: `python tests/flags_table.py` writes it.

`from flags_table import table`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("trainloop_complete_with_fixes", "predict", "report")
HEAD = """# Flags

Every flag of every script, made from the scripts themselves by `python tests/flags_table.py`; a test compares. What to use for what stands
in the README, which of them a resume may change in `resume_rules.py`.
"""


def shown(action: argparse.Action) -> str:
    """A flag with what it takes, as `--help` shows it."""
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    if action.nargs == 0:
        return f"`{action.option_strings[-1]}`"
    words = " or ".join(map(str, action.choices)) if action.choices else ""
    what = words or str(action.metavar or action.dest.upper())
    return f"`{action.option_strings[-1]} {f'[{what}]' if action.nargs == '?' else what}`"


def table() -> str:
    """The page."""
    page = HEAD
    for name in SCRIPTS:
        parser = importlib.import_module(name).build_parser()
        page += f"\n## {name}.py\n"
        for group in parser._action_groups:
            actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
            if not actions:
                continue
            page += f"\n| {group.title} | |\n|---|---|\n"
            for action in actions:
                told = (action.help or "") % {"default": action.default, "prog": parser.prog}
                page += f"| {shown(action)} | {told.replace('|', '/')} |\n"
    return page


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    (ROOT / "docs" / "FLAGS.md").write_text(table(), encoding="utf-8")
