"""README and documents name files, flags and words that exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import flags_table
import pytest

import export
import predict
import report
import trainloop_complete_with_fixes as trainloop

ROOT = Path(trainloop.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load_bench(name: str = "bench_learning") -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
        spec.loader.exec_module(module)  # one benchmark may import another
    return module


def parser_of(name: str) -> Callable[[], Any]:
    """What makes the parser of a benchmark."""
    return lambda: load_bench(name).build_parser()


PARSERS = {
    "trainloop_complete_with_fixes.py": trainloop.build_parser,
    "fixed.py": trainloop.build_parser,
    "predict.py": predict.build_parser,
    "export.py": export.build_parser,
    "report.py": report.build_parser,
}
PARSERS |= {
    f"benchmarks/{path.name}": parser_of(path.stem)
    for path in (ROOT / "benchmarks").glob("*.py")
    if "def build_parser" in path.read_text(encoding="utf-8")
}


def commands(text: str) -> list[list[str]]:
    """Every `python SCRIPT flags` in a text, as words."""
    found = re.findall(r"python ([\w/]+\.py[^\n`#]*)", text)
    return [shlex.split(line.split(" && ")[0]) for line in found]


DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
LOGS = ("LOG.md",)  # speaks of the past: what it names may be gone


def all_commands() -> list[list[str]]:
    """Of README and documents; the fault scripts have no parser to ask."""
    pages = [path.read_text(encoding="utf-8") for path in DOCUMENTS if path.name not in LOGS]
    found = [words for page in pages for words in commands(page) if words[0] in PARSERS]
    return commands(README) + found


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_commands_are_accepted(words: list[str]) -> None:
    script, *flags = words
    assert (ROOT / script).is_file()
    code: Any = 0
    try:
        PARSERS[script]().parse_args(flags)
    except SystemExit as end:  # a flag is unknown, or --version and --env answer at once
        code = end.code
    assert code == 0, words


def test_readme_flags_exist() -> None:
    """Flags that stand alone in tables and text, without a command."""
    known = {
        option
        for build in PARSERS.values()
        for action in build()._actions
        for option in action.option_strings
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9]*", README))
    assert named - known == set()


def test_ablations_of_the_benchmark_are_flags_of_the_trainer() -> None:
    bench = load_bench()
    plain = vars(trainloop.build_parser().parse_args([]))
    for row, flags in bench.ABLATIONS.items():
        changed = vars(trainloop.build_parser().parse_args(list(flags)))
        assert sum(changed[key] != plain[key] for key in plain) == (row != "full"), row


def test_table_of_the_benchmark() -> None:
    bench = load_bench()
    raw = [
        {
            "row": row,
            "seed": seed,
            "n": 200,
            "exact_at_1": seed,
            "exact_at_2": 2 * seed,
            "size_accuracy": 0.9,
            "cell_accuracy": 0.75,
            "slices": {"small": {"n": 50, "exact_at_1": 1, "exact_at_2": seed}},
            "minutes": 10.0,
            "pairs_per_s": 25.0,
            "device": "CPU",
            "commit": "0123456789abcdef",
        }
        for row in ("full", "policy off")
        for seed in (0, 1, 5)
    ]
    lines = bench.markdown(raw, "10min").splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "| full | 3 | 0.5 (0.0 to 2.5) | 1.0 (0.0 to 5.0) | 90.0 (90.0 to 90.0) |" in lines[2]
    assert "small (50)" in lines[0]
    assert "2.0 (0.0 to 10.0)" in lines[2]
    assert "seeds 0, 1, 5" in lines[5]
    assert bench.run_name("10min", "no Qwen", 1, "--width 32") == "10min-no_Qwen-seed1-__width_32"


def test_the_benchmark_skips_what_is_finished(tmp_path: Path, capsys: Any) -> None:
    bench = load_bench()
    run = tmp_path / bench.run_name("10min", "full", 0, "") / "arc_complete_1"
    run.mkdir(parents=True)
    results: dict[str, Any]
    results = {"n": 4, "exact_at_1": 1, "exact_at_2": 2, "size_accuracy": 1.0}
    results |= {"cell_accuracy": 0.5, "slices": {}, "minutes": 9.9, "device": "CPU"}
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.json").write_text(json.dumps({"commit": "abc"}))
    rows = [
        {"kind": "batch", "epoch": e, "minutes": 5 * e + i / 60, "pairs": 8}
        for e in range(2)
        for i in range(4)
    ]
    text = "\n".join(json.dumps(row) for row in [{"kind": "start"}, *rows])
    (run / "metrics.jsonl").write_text(text + "\n")
    assert bench.main(["--seeds", "0", "--out", str(tmp_path)]) == 0
    assert "| full | 1 | 25.0 | 50.0 |" in capsys.readouterr().out
    raw = json.loads((tmp_path / "learning_10min.json").read_text())
    assert raw[0]["pairs_per_s"] == pytest.approx(8.0)
    assert "50.0" in (tmp_path / "learning_10min.md").read_text()


# ---------------------------------------------------------------------------------------------
# docs/: every test, file and function that is named exists
# ---------------------------------------------------------------------------------------------


@cache
def names_in(file: Path) -> frozenset[str]:
    """`function`, `Class`, `Class.method` and `CONSTANT` defined at the top of a Python file."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return frozenset(found)


def missing_in(text: str) -> list[str]:
    """What a document names that is not there: `file.py::name`,
    `docs/FILE.md`, `folder/file.py`."""
    missing = []
    for file, name in re.findall(r"`([\w/]+\.(?:py|md|ipynb))(?:::([\w.]+))?`", text):
        path = ROOT / file
        if not path.is_file() or (name and name not in names_in(path)):
            missing.append(f"{file}::{name}" if name else file)
    return missing


PAGES = [path for path in DOCUMENTS if path.name not in (*LOGS, "PERSISTENCE.md")]
PAGES += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_the_documents_name_exists(path: Path) -> None:
    assert missing_in(path.read_text(encoding="utf-8")) == []


def test_tests_named_in_the_page_on_saving_exist() -> None:
    text = (ROOT / "docs" / "PERSISTENCE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)(?:\[\w+\])?`", text))
    assert named
    files = [
        ROOT / "tests" / "test_model_persistence.py",
        ROOT / "tests" / "test_sinks.py",
        *(ROOT / "tests").glob("test_seams_*.py"),
    ]
    assert len(files) == 5
    assert named <= set().union(*(names_in(path) for path in files))


def test_something_that_is_not_there_is_noticed() -> None:
    text = (
        "`tests/test_documents.py::no_such_test`, `no_such.py`, `curriculum.py::CURVE`, "
        "`predict.py`"
    )
    assert missing_in(text) == [
        "tests/test_documents.py::no_such_test", "no_such.py", "curriculum.py::CURVE",
    ]  # fmt: skip


def test_the_table_of_fixes_has_all_34_rows_each_with_code_and_a_test() -> None:
    text = (ROOT / "docs" / "FIXES.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [row[0] for row in rows] == [f"| {number}" for number in range(1, 35)]
    assert all(len(row) == 4 and "`" in row[2] and "`tests/" in row[3] for row in rows)


def test_the_table_of_flags_is_that_of_the_parsers() -> None:
    page = (ROOT / "docs" / "FLAGS.md").read_text(encoding="utf-8")
    assert page == flags_table.table(), "python tests/flags_table.py writes it anew"


def test_the_readme_leads_to_every_document() -> None:
    """By name, or through a page that it names."""
    named = [path for path in DOCUMENTS if f"`docs/{path.name}`" in README]
    pages = README + "".join(path.read_text(encoding="utf-8") for path in named)
    assert [path.name for path in DOCUMENTS if f"`docs/{path.name}`" not in pages] == []
    assert len(named) > 15
