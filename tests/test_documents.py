"""The README and the notebook name files, flags and words that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import predict
import report
import trainloop_complete_with_fixes as trainloop

ROOT = Path(trainloop.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load_bench() -> Any:
    spec = importlib.util.spec_from_file_location(
        "bench_learning", ROOT / "benchmarks" / "bench_learning.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARSERS = {
    "trainloop_complete_with_fixes.py": trainloop.build_parser,
    "predict.py": predict.build_parser,
    "report.py": report.build_parser,
    "benchmarks/bench_learning.py": lambda: load_bench().build_parser(),
}


def notebook() -> dict[str, Any]:
    return json.loads((ROOT / "notebooks" / "colab.ipynb").read_text(encoding="utf-8"))


def code_of_notebook() -> str:
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def commands(text: str) -> list[list[str]]:
    """Every `python SCRIPT flags` in a text, as words."""
    found = re.findall(r"python ([\w/]+\.py[^\n`#]*)", text)
    return [shlex.split(line.split(" && ")[0]) for line in found]


@pytest.mark.parametrize("words", commands(README) + commands(code_of_notebook()), ids=" ".join)
def test_commands_are_accepted(words: list[str]) -> None:
    script, *flags = words
    assert (ROOT / script).is_file()
    PARSERS[script]().parse_args(flags)  # leaves with SystemExit where a flag is unknown


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


def test_readme_names_every_file_of_the_house() -> None:
    table = README[README.index("## Files") : README.index("## When something goes wrong")]
    named = set(re.findall(r"`([\w]+\.py)`", table))
    assert named == {path.name for path in ROOT.glob("*.py")}


def test_notebook_is_format_4_without_outputs() -> None:
    book = notebook()
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_notebook_python_compiles_and_its_names_exist() -> None:
    import model_persistence

    assert callable(model_persistence.setup_drive_backup)
    lines = [line for line in code_of_notebook().splitlines() if line[:1] not in "!%"]
    compile("\n".join(lines), "colab.ipynb", "exec")
    assert (ROOT / "requirements.txt").is_file()


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
