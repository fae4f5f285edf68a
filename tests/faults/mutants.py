"""Remove each guard of saving in a copy, and show which test notices.

A guard whose removal no test catches is either useless or untested.
    python tests/faults/mutants.py            # all, and the table
    python tests/faults/mutants.py fsync      # those whose name contains `fsync`
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[2]
IGNORED = shutil.ignore_patterns("__pycache__")
DOOR = "model_persistence.py"
FILES, SEALED, RESTORING, INDEX, SAVING, GUARD, DRIVE = (
    f"persistence/{name}.py"
    for name in (
        "files", "checkpoint_file", "restoring", "run_index", "saving", "run_guard", "drive",
    )
)  # fmt: skip


class Mutant(NamedTuple):
    """A guard, its file, the edit that removes it, and the test expected to notice."""

    guard: str
    file: str
    old: str
    new: str
    test: str  # a pytest -k expression, or `script.py --options`


IN_PLACE = """self.fs.mkdir(self.target.parent)
        data = self.temp.read_bytes()
        if exists(self.fs, self.target):
            self.fs.unlink(self.target)
        fd = self.fs.create(self.target)
        self.fs.write(fd, data)
        self.fs.close(fd)
        self.fs.unlink(self.temp)
"""
MUTANTS = [
    Mutant("fsync of the file", FILES, "        self.fs.fsync(self._fd)\n", "", "test_power_cuts"),
    Mutant(
        "fsync of the directory",
        FILES,
        "self.fs.fsync_dir(self.target.parent)\n",
        "pass\n",
        "test_power_cuts",
    ),
    Mutant(
        "temporary file in the same directory",
        FILES,
        "self.temp = target.parent / temp",
        "self.temp = Path(os.environ.get('TMPDIR', '/tmp')) / temp",
        "test_order_of_operations or test_failing_operations",
    ),
    Mutant(
        "rename instead of writing in place",
        FILES,
        "self.fs.replace(self.temp, self.target)\n",
        IN_PLACE,
        "kill_points.py --share 1/15",
    ),
    Mutant(
        "index after the file",
        SAVING,
        "            size, sha256 = self._write_where_there_is_room("
        "job.target, job.payload, job.seal)\n"
        "        except (OSError, RuntimeError) as e:\n"
        "            if isinstance(e, RuntimeError) and not is_space_error(e):\n"
        "                raise\n"
        "            try:",
        "            early = {**job.seal, 'size': 1, 'sha256': ''}\n"
        "            self._index.write(checkpoint_id, early)\n"
        "            size, sha256 = self._write_where_there_is_room("
        "job.target, job.payload, job.seal)\n"
        "        except (OSError, RuntimeError) as e:\n"
        "            if isinstance(e, RuntimeError) and not is_space_error(e):\n"
        "                raise\n"
        "            try:",
        "test_order_of_operations",
    ),
    Mutant(
        "hash compared on load",
        SEALED,
        'if seal["seal_sha256"] != body:',
        "if False:",
        "test_corrupt_and_hostile_files",
    ),
    Mutant(
        "checksums of an unsealed file",
        SEALED,
        "        else:\n            _check_crc(reader, size)\n        if not load",
        "        if not load",
        "test_an_unsealed_file",
    ),
    Mutant(
        "file holds what its name says",
        SEALED,
        "if expect_id is not None and found_id is not None and found_id != expect_id:",
        "if False:",
        "test_corrupt_and_hostile_files",
    ),
    Mutant(
        "weights only, no code",
        SEALED,
        'map_location="cpu", weights_only=True)\n    except OSError',
        'map_location="cpu", weights_only=False)\n    except OSError',
        "test_corrupt_and_hostile_files",
    ),
    Mutant(
        "fallback to an older file",
        DOOR,
        '            item = {"file": str(path), "reason": reason.removeprefix',
        '            raise\n            item = {"file": str(path), "reason": reason.removeprefix',
        "test_a_damaged_file_goes_to_quarantine",
    ),
    Mutant(
        "read back before publishing",
        SEALED,
        "        _sync_and_read_back(file, size)\n",
        "        file.sync()\n",
        "test_a_disk_that_loses_bytes",
    ),
    Mutant(
        "rotation after the save",
        SAVING,
        '        """The protocol: file, index entry',
        "        self._rotate(self.max_checkpoints - 1)\n"
        '        """The protocol: file, index entry',
        "kill_points.py --only only",
    ),
    Mutant(
        "rotation spares what best points to",
        SAVING,
        "if i != self._index.protected_id()]",
        "]",
        "test_rotation_spares",
    ),
    Mutant(
        "making room spares the last good one",
        SAVING,
        "if doomed and verify and not any(",
        "if False and not any(",
        "test_making_room_never",
    ),
    Mutant(
        "second try on a full disk",
        SAVING,
        "            if not is_space_error(e):\n                raise\n"
        "            self._make_room()\n"
        "            return write",
        "            raise\n            return write",
        "test_a_full_disk",
    ),
    Mutant(
        "own temporary file removed after a failure",
        FILES,
        "                self.fs.unlink(self.temp)\n            except FileNotFoundError:",
        "                pass\n            except FileNotFoundError:",
        "test_failing_operations",
    ),
    Mutant(
        "ids from every place that remembers one",
        INDEX,
        'seen = [-1, manifest["next_id"] - 1, *manifest["checkpoints"], *self.files()]\n'
        "        for folder in (self.checkpoints_dir, self.quarantine_dir, self.set_aside_dir):",
        "seen = [-1, *self.files()]\n        for folder in ():",
        "test_ids_are_never_used_twice",
    ),
    Mutant(
        "best model replaced in one step",
        SAVING,
        "            fs.replace(temp, best_path)\n",
        "            if exists(fs, best_path):\n"
        "                fs.unlink(best_path)\n"
        "            fs.replace(temp, best_path)\n",
        "kill_points.py --only best",
    ),
    Mutant(
        "snapshot copied before training goes on",
        DOOR,
        "                state = self._buffers.copy(state)\n            else:\n"
        "                self._buffers.clear()",
        "                pass\n            else:\n                self._buffers.clear()",
        "test_background_save_holds",
    ),
    Mutant(
        "random number states restored",
        RESTORING,
        '        torch.set_rng_state(state["torch"].cpu())\n',
        "",
        "bitwise.py --batches 4 --share 1/3",
    ),
    Mutant(
        "live state compared after loading",
        RESTORING,
        "    if not verify_live:\n        return recast\n",
        "    return recast\n",
        "test_a_module_that_does_not_restore",
    ),
    Mutant(
        "lock on the run",
        GUARD,
        "                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "                pass\n",
        "test_a_second_writer or test_a_manager_takes_the_lock",
    ),
    Mutant(
        "signals become a flag",
        GUARD,
        "self._previous[number] = signal.signal(number, self._handle)",
        "pass",
        "signals.py",
    ),
    Mutant(
        "Drive copy read back before it is marked",
        DRIVE,
        "                if found != (size, sha256):",
        "                if False:",
        "drive.py",
    ),
    Mutant(
        "Drive still mounted",
        DRIVE,
        "        elif self._seen_mount:\n            raise OSError(",
        "        elif False:\n            raise OSError(",
        "drive.py",
    ),
]


def try_out(mutant: Mutant) -> tuple[bool, str, float]:
    """(caught, by what, seconds)."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        source = (REPO / mutant.file).read_text()
        if source.count(mutant.old) != 1:
            raise SystemExit(
                f"{mutant.guard}: the guard is found {source.count(mutant.old)} times in "
                f"{mutant.file}; adapt the table"
            )
        shutil.copy(REPO / "model_persistence.py", copy)
        shutil.copytree(REPO / "persistence", copy / "persistence", ignore=IGNORED)
        (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new))
        (copy / "tests").mkdir()
        shutil.copytree(REPO / "tests/faults", copy / "tests/faults")
        shutil.copy(REPO / "tests/test_model_persistence.py", copy / "tests")
        shutil.copy(REPO / "pyproject.toml", copy)
        started = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if ".py" in mutant.test:
            script, *options = mutant.test.split()
            command = [sys.executable, f"tests/faults/{script}", *options]
        else:
            command = [sys.executable, "-m", "pytest", "tests", "-x", "-q", "-k", mutant.test]
            command += ["-p", "no:cacheprovider"]
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False
        )
        took_s = time.monotonic() - started
        if done.returncode == 0:
            return False, mutant.test, took_s
        if done.returncode not in (1,) or "ERROR collecting" in done.stdout:
            raise SystemExit(f"{mutant.guard}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        failed = re.findall(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
        return True, failed[0] if failed else mutant.test, took_s


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [m for m in MUTANTS if wanted in m.guard]
    missed = []
    print("| guard removed | caught by | seconds |\n|---|---|---|")
    for mutant in chosen:
        caught, by, took_s = try_out(mutant)
        if not caught:
            missed.append(mutant.guard)
        print(f"| {mutant.guard} | {by if caught else 'NOTHING'} | {took_s:.0f} |", flush=True)
    figures = {
        "mutants": len(chosen),
        "caught": len(chosen) - len(missed),
        "problems": missed,
    }
    print(json.dumps({**figures, "ok": not missed}))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
