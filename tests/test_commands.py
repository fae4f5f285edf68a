"""Every command of README and documents really runs, in the order in which the pages give them.

As written, but for what SMALL exchanges: a GPU, minutes, a model and data for small ones. What
stands for something of the reader's (my_task.json, FOLDER, ...) is a file of that name. Commands of
`torchrun` run in test_distributed.py, those of tests/faults in test_model_persistence.py and by
hand, benchmarks in test_benchmarks.py.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tasks, write_tasks
from test_documents import DOCUMENTS, LOGS, README, commands
from test_snippets import TRAINER, python

SCRIPTS = (TRAINER, "fixed.py", "predict.py", "report.py", "export.py")
SMALL = (
    (r"--time_budget \d+", "--max_batches 2"),
    (r"--max_batches 100", "--max_batches 2"),
    (r"--adapt_seconds \d+", "--adapt_batches 1"),
    (r"--device auto", "--device cpu"),
    (r"arcagi2", "arc"),  # a folder here
    (r"^(predict.py (?!.*--data).*)$", r"\1 --data arc"),
    (r"^fixed.py$", "fixed.py --epochs 1"),
    (r"runs/arc_complete_DATE_TIME", "runs/arc_complete_latest"),
)


def all_commands() -> list[str]:
    """Each once, README first; of the trainer those that train before those that resume."""
    pages = [README]
    pages += [path.read_text(encoding="utf-8") for path in DOCUMENTS if path.name not in LOGS]
    found = [" ".join(words) for page in pages for words in commands(page) if words[0] in SCRIPTS]
    return list(dict.fromkeys(found))


def without_outputs(tasks: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tasks as Kaggle's challenges file has them."""
    return {
        prefix + name: {**task, "test": [{"input": pair["input"]} for pair in task["test"]]}
        for name, task in tasks.items()
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted, a small trained run among it."""
    folder = tmp_path_factory.mktemp("reader")
    tasks: dict[str, Any] = make_tasks()
    write_tasks(folder / "training.json", tasks)
    for split in ("training", "evaluation"):
        (folder / "arc" / "data" / split).mkdir(parents=True)
        for name, task in make_tasks(("same", "flip")).items():
            write_tasks(folder / "arc" / "data" / split / f"{split}_{name}.json", task)
    one = next(iter(tasks.values()))
    (folder / "my_task.json").write_text(json.dumps(one))
    write_tasks(folder / "new_tasks.json", make_tasks(("turn",)))
    (folder / "FOLDER").mkdir()
    for where in (folder, folder / "FOLDER"):
        hidden = without_outputs(make_tasks(("crop", "double")), "new_")
        write_tasks(where / "arc-agi_test_challenges.json", hidden)
    known = without_outputs(tasks)
    write_tasks(folder / "FOLDER" / "arc-agi_training_challenges.json", known)
    solutions = {n: [pair["output"] for pair in task["test"]] for n, task in tasks.items()}
    write_tasks(folder / "FOLDER" / "arc-agi_training_solutions.json", solutions)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ARC_TRAINER_CONFIG_DIR", str(folder / "configuration"))
        done = python(f"python {TRAINER} --epochs 1")
    assert done.code == 0, done.err
    (run,) = (folder / "runs").glob("arc_complete_2*")
    for name in ("first", "second"):
        shutil.copytree(run, folder / "runs" / name)
    return folder


def test_every_command_of_the_pages_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("ARC_TRAINER_CONFIG_DIR", str(home / "configuration"))
    monkeypatch.setenv("NO_COLOR", "1")
    found = all_commands()
    assert len(found) >= 20
    if find_spec("matplotlib") is None:  # an extra, for curves alone
        found = [command for command in found if "--curves" not in command]
    failed = []
    for command in found:
        small = command
        for old, new in SMALL:
            small = re.sub(old, new, small)
        done = python(f"python {small}")
        if done.code:
            failed.append((command, small, done.code, done.err.strip().splitlines()[-3:]))
    assert failed == []
