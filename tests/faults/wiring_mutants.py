"""Break the wiring of the training step in a copy, one way at a time, and show which test notices.

The breakages stand in `wiring_table.py` and the tables beside it. One that no test catches is a
promise that nothing keeps.
    python tests/faults/wiring_mutants.py                # all, and the table
    python tests/faults/wiring_mutants.py reward         # those whose name contains `reward`
    python tests/faults/wiring_mutants.py device:        # what only a GPU would show
    python tests/faults/wiring_mutants.py --check        # only whether the table fits the code
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from device_table import DEVICE
from together_table import TOGETHER
from watch_table import WATCH
from wiring_table import MUTANTS as WIRING
from wiring_table import Mutant

REPO = Path(__file__).resolve().parents[2]
MUTANTS = [*WIRING, *TOGETHER, *WATCH, *DEVICE]
LIMIT_S = 240.0  # of one mutant; one that hangs the tests is noticed by them


def run_tests(folder: Path, test: str) -> None:
    """In a forked process: pytest's own exit code; what it prints goes to `folder`/out."""
    import pytest

    os.chdir(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != REPO)]
    module, expression = test.split(": ", 1)
    with Path("out").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-k", expression]
        code = 99
        try:
            code = int(pytest.main([f"tests/test_{module}.py", *options]))
        except BaseException:
            traceback.print_exc(file=out)
            raise
        finally:
            sys.stdout.flush()
            out.flush()
            os._exit(code)


def outcome_of(test: str, file: str = "", text: str = "") -> tuple[int | None, str]:
    """(pytest's exit code or None at the time limit, what it said) in a copy; `text` is put in
    `file`."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        for source in (*REPO.glob("*.py"), REPO / "pyproject.toml"):
            shutil.copy(source, folder)
        for part in ("persistence", "tests"):
            shutil.copytree(REPO / part, folder / part, ignore=shutil.ignore_patterns("__p*"))
        if file:
            (folder / file).write_text(text, encoding="utf-8")
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, test))
        process.start()
        process.join(LIMIT_S)
        if process.is_alive():
            process.kill()
            process.join()
            return None, ""
        return process.exitcode, (folder / "out").read_text(encoding="utf-8", errors="replace")


def misfits() -> list[str]:
    """Which texts of the table their file has not exactly once, and which test files are
    missing."""
    found = []
    for m in MUTANTS:
        n = (REPO / m.file).read_text(encoding="utf-8").count(m.old)
        if n != 1:
            found.append(f"{m.name}: its text is found {n} times in {m.file}")
        if not (REPO / f"tests/test_{m.test.split(': ')[0]}.py").is_file():
            found.append(f"{m.name}: there is no file of its test, {m.test}")
    return found


def try_out(mutant: Mutant) -> str:
    """By what it was caught, or ""."""
    source = (REPO / mutant.file).read_text(encoding="utf-8")
    code, said = outcome_of(mutant.test, mutant.file, source.replace(mutant.old, mutant.new))
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", said, re.MULTILINE)
    if code == 0:
        return ""
    if code is None:
        return "the time limit"
    if code != 1 or not failed:  # no test at all, or none that could be read
        raise SystemExit(f"{mutant.name}: exit code {code}\n{said[-3000:]}")
    return failed[0]


def check_the_whole(chosen: list[Mutant]) -> None:
    """Without a breakage the same tests pass."""
    by_module: dict[str, set[str]] = {}
    for mutant in chosen:
        module, expression = mutant.test.split(": ", 1)
        by_module.setdefault(module, set()).add(f"({expression})")
    for module, expressions in by_module.items():
        code, said = outcome_of(f"{module}: {' or '.join(sorted(expressions))}")
        if code != 0:
            raise SystemExit(f"{module}: its tests fail without a breakage\n{said[-3000:]}")


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    wrong = misfits()
    if wrong or wanted == "--check":
        sys.exit("\n".join([*wrong, "adapt the table"]) if wrong else 0)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1")
    # Plugins of installed packages complain about being imported already.
    os.environ.update(TOKENIZERS_PARALLELISM="false", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.dont_write_bytecode = True
    import tokenizers  # noqa: F401 - once for all: the forks have it then
    import torch  # noqa: F401
    import tqdm  # noqa: F401
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model  # noqa: F401

    missed, chosen, begun = [], [m for m in MUTANTS if wanted in m.name], time.monotonic()
    check_the_whole(chosen)
    print("| breakage | caught by | seconds |\n|---|---|---|", flush=True)
    for mutant in chosen:
        since = time.monotonic()
        by = try_out(mutant)
        if not by:
            missed.append(mutant.name)
        took_s = time.monotonic() - since
        print(f"| {mutant.name} | {by or 'NOTHING'} | {took_s:.0f} |", flush=True)
    figures = {
        "mutants": len(chosen),
        "caught": len(chosen) - len(missed),
        "problems": missed,
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps({**figures, "ok": not missed}))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
