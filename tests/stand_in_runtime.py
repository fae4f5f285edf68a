"""One runtime of a hosted notebook, in a process of its own: its code cells in order, as Run all.

    python tests/stand_in_runtime.py BOOK.ipynb SPEC.json

SPEC: {"settings": replaces those of the cell tagged "parameters", "drive": a folder that outlives
the runtime, "upload": archives that the user chooses, "pages": a file for what is displayed}. In
place of Colab: `drive.mount` links that folder there, `files.upload` puts the archives into the
current folder. The first cell that raises ends it, with exit code 1; "until" names a step after
which the machine is gone.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def put_in_place(spec: dict[str, Any]) -> None:
    """Modules that exist in a notebook alone."""

    def mount(path: str) -> None:
        if not Path(path).exists():
            Path(path).symlink_to(spec["drive"])

    def upload() -> dict[str, bytes]:
        chosen = [Path(shutil.copy(archive, Path())) for archive in spec["upload"]]
        return {path.name: path.read_bytes() for path in chosen}

    def show(page: str) -> None:
        with Path(spec["pages"]).open("a", encoding="utf-8") as file:
            file.write(page + "\n")

    parts: dict[str, dict[str, Any]] = {
        "google": {},
        "google.colab": {},
        "google.colab.drive": {"mount": mount},
        "google.colab.files": {"upload": upload},
        "IPython": {},
        "IPython.display": {"HTML": str, "display": show},
    }
    for name, members in parts.items():
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(members)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def main(book: str, spec_file: str) -> None:
    """Run the cells; the settings come after the cell that has the tag."""
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    put_in_place(spec)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(Path(book).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if spec.get("until") in names.get("DONE", ()):
            return
        if "parameters" in cell["metadata"].get("tags", []):
            unknown = spec["settings"].keys() - names.keys()
            if unknown:
                raise KeyError(f"no such settings: {unknown}")
            names |= spec["settings"]


if __name__ == "__main__":
    main(*sys.argv[1:])
