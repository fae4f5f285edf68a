"""Damaged, swapped, stale and hostile files: all are detected, and no code in them runs.

Detected means: the file is rejected with a reason and the resume uses an older good one, or (damage
to the JSON beside it) the resume is right all the same.
    python tests/faults/corruption.py
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Toy, arguments, copy_tree, finish, scratch, share_of
from kill_points import expected_states, manager, prepare

from model_persistence import CheckpointError, NoCheckpointError
from persistence.checkpoint_file import write_checkpoint_file

SAVES = 4  # max_checkpoints=2: ids 2 and 3 are there, best is 3
NEWEST = "checkpoints/checkpoint_00003.pt"
OLDER = "checkpoints/checkpoint_00002.pt"
INDEX = "checkpoint_metadata.json"

Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    replace(path, bytes(data))


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    replace(path, data[: rng.randrange(len(data))])


def hole(path: Path, rng: random.Random) -> None:
    """A block that came back as zeros, where there were none."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((16, 512, 4096)))
    if not any(data[start:end]):
        return flip(path, rng)
    data[start:end] = bytes(end - start)
    return replace(path, bytes(data))


def extend(path: Path, rng: random.Random) -> None:
    replace(path, path.read_bytes() + rng.randbytes(rng.randrange(1, 5000)))


def replace(path: Path, data: bytes) -> None:
    """New content under a name, leaving hard links to the old one alone."""
    path.unlink()
    path.write_bytes(data)


class _Evil:
    """Its pickle would create a file."""

    marker = ""

    def __init__(self, call: int) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return [
            (os.system, (f"touch {self.marker}",)),
            (eval, (f"open({self.marker!r}, 'w')",)),
            (exec, (f"open({self.marker!r}, 'w').close()",)),
            (io.open, (self.marker, "w")),
            (os.mkdir, (self.marker,)),
            (__import__, ("colorsys",)),
        ][self.call]


def hostile(path: Path, rng: random.Random, marker: Path) -> None:
    """A checkpoint that looks right and carries code, in one of several wrappings."""
    _Evil.marker = str(marker)
    evil = _Evil(rng.randrange(6))
    good = torch.load(path, weights_only=True)
    good.pop("sealed")
    place = rng.choice(("extra", "metrics", "agent", "optimizer"))
    if rng.random() < 0.25:
        data: Any = evil
    else:
        data = {**good, place: {**good[place], "evil": evil}}
    path.unlink()
    kind = rng.randrange(6)
    if kind > 3:  # sealed like a real one: a seal proves integrity, not origin
        write_checkpoint_file(path, {"head": 0, **data} if type(data) is dict else {"x": data}, {})
    elif kind == 0:
        path.write_bytes(pickle.dumps(data))
    elif kind == 1:
        torch.save(data, path, _use_new_zipfile_serialization=False)
    elif kind == 2:
        torch.save(data, path)
    else:
        torch.save(data, path)
        compressed = io.BytesIO()  # a member that unfolds to far more than the file's size
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(compressed, "w") as new:
            for m in old.infolist():
                body = old.read(m)
                if m.filename.endswith("data.pkl"):
                    body += bytes(1 << 20)
                new.writestr(m.filename, body, zipfile.ZIP_DEFLATED)
        path.write_bytes(compressed.getvalue())


def wrong_content(path: Path, rng: random.Random) -> None:
    """Valid archives that are no checkpoint."""
    good = torch.load(path, weights_only=True)
    good.pop("sealed")
    damaged: list[Any] = [
        {k: v for k, v in good.items() if k != rng.choice(("agent", "epoch", "optimizer"))},
        {**good, "epoch": "three"},
        {**good, "metrics": [1]},
        {**good, "agent": torch.ones(3)},
        {**good, "checkpoint_id": 77},
        torch.ones(2),
        [good],
    ]
    choice = damaged[rng.randrange(len(damaged))]
    if choice is damaged[0] and len(choice) == len(good):
        choice = damaged[1]
    path.unlink()
    torch.save(choice, path)


GARBAGE = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00garbage",
    b'{"checkpoints": {"3": 5}, "next_id": "x"}',
    b'{"checkpoints": {"../../etc/passwd": {}}, "next_id": -4}',
    b'{"checkpoints": [1, 2], "run_id": 7}',
    b'{"checkpoints": {"3": {"epoch": 0, "batch": 3, "size": 1, "sha256": "00", "metrics": {}}}}',
    b'{"next_id": 1e400}',
    b"[" * 100_000,
    json.dumps({"checkpoints": {"9": {"epoch": 9, "batch": 9, "metrics": {}}}}).encode(),
    json.dumps({"next_id": 10**30, "checkpoints": {str(10**12): {}}}).encode(),
)


def cases(share: str, seed: int) -> list[tuple[str, int]]:
    counts = {
        "bit flip": 240,
        "bit flip, no index": 160,
        "truncation": 120,
        "truncation, no index": 60,
        "zero hole": 80,
        "zero hole, no index": 40,
        "extra bytes": 30,
        "swapped files": 10,
        "file of another run": 10,
        "best swapped": 10,
        "best bit flip": 40,
        "hostile pickle": 80,
        "wrong content": 40,
        "garbage JSON": 3 * len(GARBAGE),
        "stale index": 10,
        "not a file": 10,
        "both damaged": 30,
    }
    return share_of([(k, i) for k, n in counts.items() for i in range(n)], share, seed)


def inject(kind: str, number: int, work: Path, other: Path, rng: random.Random) -> str:
    """Do the damage. Returns what must happen: 'older', 'same', 'best rejected' or 'none'."""
    newest, older, best = work / NEWEST, work / OLDER, work / "best_model.pt"
    if kind.endswith("no index"):
        (work / INDEX).unlink()
        (work / "best_metadata.json").unlink()
    simple: dict[str, Damage] = {
        "bit flip": flip,
        "truncation": truncate,
        "zero hole": hole,
        "extra bytes": extend,
        "wrong content": wrong_content,
    }
    name = kind.removesuffix(", no index")
    if name in simple:
        simple[name](newest, rng)
        return "older"
    if kind == "hostile pickle":
        if number % 2:  # else the index rejects it before anything is unpickled
            (work / INDEX).unlink()
        hostile(newest, rng, work / "code-was-run")
        return "older"
    if kind == "swapped files":
        temporary = work / "swap"
        newest.rename(temporary)
        older.rename(newest)
        temporary.rename(older)
        return "best only"
    if kind == "file of another run":
        replace(newest, (other / NEWEST).read_bytes())
        return "older"
    if kind == "best swapped":
        replace(best, (other / "best_model.pt").read_bytes())
        return "best rejected"
    if kind == "best bit flip":
        flip(best, rng)
        return "best rejected"
    if kind == "garbage JSON":
        targets = (INDEX, "best_metadata.json", "training_state.json")
        (work / targets[number // len(GARBAGE)]).write_bytes(GARBAGE[number % len(GARBAGE)])
        return "same"
    if kind == "stale index":
        entry = json.loads((work / INDEX).read_text())
        entry["checkpoints"]["3"] = {**entry["checkpoints"]["2"], "size": 12 + number}
        (work / INDEX).write_text(json.dumps(entry))
        return "same"
    if kind == "not a file":
        newest.unlink()
        makers: list[Callable[[], object]] = [
            newest.mkdir,
            lambda: os.mkfifo(newest),
            lambda: newest.symlink_to("/dev/zero"),
            lambda: newest.symlink_to(work / "nowhere"),
            lambda: newest.write_bytes(b""),
        ]
        makers[number % len(makers)]()
        return "older"
    assert kind == "both damaged"
    for path in (newest, older, best):
        rng.choice((flip, truncate, hole))(path, rng)
    return "none"


def check(kind: str, wanted: str, work: Path, expected: dict[int, str]) -> str:
    """Resume; returns what is wrong, or an empty text."""
    persistence, toy = manager(work), Toy()
    if wanted == "none":
        try:
            found = persistence.load_latest(*toy.six)
        except NoCheckpointError as e:
            return "" if len(e.skipped) == 3 else f"only {len(e.skipped)} files were rejected"
        return f"loaded {found['checkpoint_id']} though every file is damaged"
    info = persistence.get_resume_info()
    found = persistence.load_latest(*toy.six)
    toy.restore(found["extra"])
    if (work / "code-was-run").exists():
        return "code in the file was run"
    if found["batch"] not in expected or toy.fingerprint() != expected[found["batch"]]:
        return "a state was loaded that never was saved"
    source = {"older": 2, "same": 3, "best only": 3, "best rejected": 3}[wanted]
    if found["batch"] != source:
        return f"resumed from batch {found['batch']}, not {source}"
    if wanted in ("older", "same") and (info is None or info["batch"] != source):
        return f"get_resume_info says {info}"
    if wanted == "older" and not any(NEWEST in s["file"] for s in found["skipped"]):
        return "the damaged file was not reported"
    if wanted == "best only" and len(found["skipped"]) != 2:
        return "swapped files were not reported"
    if wanted == "best rejected":
        try:
            metadata = persistence.load_best_model(*toy.six)
        except CheckpointError:
            return ""
        toy.restore(metadata["extra"])
        if toy.fingerprint() != expected.get(metadata["batch"]):
            return "a damaged best model was loaded"
    return ""


def run(share: str = "1/1", seed: int = 0) -> dict[str, Any]:
    """Damage files; returns the figures."""
    expected = expected_states()
    figures: dict[str, Any] = {"cases": 0, "detected": 0, "by_kind": {}, "problems": []}
    with scratch() as root:
        base, other, work = root / "base", root / "other", root / "work"
        prepare(base, SAVES)
        prepare(other, SAVES)
        for kind, number in cases(share, seed):
            rng = random.Random(f"{seed} {kind} {number}")
            shutil.rmtree(work, ignore_errors=True)
            copy_tree(base, work)
            wanted = inject(kind, number, work, other, rng)
            figures["cases"] += 1
            try:
                problem = check(kind, wanted, work, expected)
            except Exception as e:  # noqa: BLE001 - any exception here ends a resume
                problem = f"{type(e).__name__}: {e}"
            if problem:
                figures["problems"].append(f"{kind} {number}: {problem}")
            else:
                figures["detected"] += 1
                figures["by_kind"][kind] = figures["by_kind"].get(kind, 0) + 1
    return figures


def main() -> None:
    args = arguments(__doc__ or "")
    figures = run(args.share, args.seed)
    finish(figures, not figures["problems"])


if __name__ == "__main__":
    main()
