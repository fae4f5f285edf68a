"""What pip installs: every module of this folder, found by itself. The rest: pyproject.toml."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
# Folders that are read beside the modules; a page's template is data, no package of its own.
DATA = [name for name in ("templates",) if (HERE / name).is_dir()]

setup(
    py_modules=sorted(path.stem for path in HERE.glob("*.py") if path.name != "setup.py"),
    packages=["persistence", *DATA],
    package_data={"persistence": ["py.typed"], **{name: ["*"] for name in DATA}},
)
