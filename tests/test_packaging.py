"""`pip install .`: a wheel with every module in it, whose commands start as the scripts do."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, without any network; a template is put there if there is none."""
    for name in ("setuptools", "pip"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed here, and builds the wheel")
    version = metadata.version("setuptools")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is older than pyproject.toml asks for")
    source = tmp_path_factory.mktemp("source")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.t[ox]*"), ROOT / "LICENSE"):
        shutil.copy(path, source)
    shutil.copytree(ROOT / "persistence", source / "persistence")
    if (ROOT / "templates").is_dir():
        shutil.copytree(ROOT / "templates", source / "templates")
    (source / "templates").mkdir(exist_ok=True)
    (source / "templates" / "probe.html").write_text("<p>")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-index", "-q", "-w", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return file


def test_every_module_and_template_is_inside(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {p.name for p in ROOT.glob("*.py")} - {"setup.py"}
    for folder in ("persistence", "templates"):
        files = (p for p in (ROOT / folder).glob("*") if p.is_file() and p.suffix != ".pyc")
        modules |= {f"{folder}/{p.name}" for p in files}
    assert inside == modules | {"templates/probe.html"}
    assert "persistence/py.typed" in inside


def test_requirements_txt_alone_says_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith("/METADATA"))
        needs = re.findall(r"^Requires-Dist: (.+)$", file.read(name).decode(), re.MULTILINE)
    core = {need for need in needs if "extra ==" not in need}
    assert core == set((ROOT / "requirements.txt").read_text().split())
    assert not [need for need in core if "<" in need or "==" in need]  # Colab brings its own torch


def test_its_commands_start_as_the_scripts_do(wheel: Path, tmp_path: Path) -> None:
    """Breaks: a command that waits for torch before --help, or loses the exit code."""
    home = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(home)
        (name,) = (n for n in file.namelist() if n.endswith("/entry_points.txt"))
        found = configparser.ConfigParser()
        found.read_string(file.read(name).decode())
    commands = dict(found["console_scripts"])
    assert set(commands) == {f"arc-efe-{name}" for name in ("train", "predict", "report", "export")}
    for command, target in commands.items():
        module, function = target.split(":")
        start = f"import sys; sys.path.insert(0, {str(home)!r}); from {module} import {function}; "
        start += f"sys.argv[0] = {command!r}; sys.exit({function}())"
        for flags, code in ((["--help"], 0), (["--nosuch"], 2), (["--version"], 0)):
            done = subprocess.run(
                [sys.executable, "-S", "-c", start, *flags],
                capture_output=True,
                text=True,
                check=False,
                cwd=tmp_path,
            )
            assert done.returncode == code, done.stderr
        assert done.stdout == "arc-efe-trainer 0.1.0\n" or "(" not in done.stdout  # no checkout
