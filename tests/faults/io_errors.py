"""Every file operation of a save fails in turn, once and for good, with every error of a bad disk.

Training must go on, no good file may be harmed, no temporary file may stay, and the next save on
a healthy disk must work.
    python tests/faults/io_errors.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import (
    ERRORS,
    FailingFS,
    ModelPersistence,
    Toy,
    WatchedFS,
    arguments,
    copy_tree,
    finish,
    scratch,
    share_of,
    temps,
)
from kill_points import manager, prepare


def two_saves(folder: Path, fs: Any) -> tuple[list[int], dict[int, str], ModelPersistence, Toy]:
    """Two batches, each saved and best. Returns the ids called saved, and batch -> state."""
    persistence, toy = manager(folder, fs), Toy()
    found = manager(folder).load_latest(*toy.six)
    toy.restore(found["extra"])
    first, saved, states = found["batch"] + 1, [], {}
    for batch in (first, first + 1):
        toy.step(0, batch)
        metrics = {"accuracy_delta": float(batch)}
        states[batch] = toy.fingerprint()
        number = persistence.save_checkpoint(*toy.six, 0, batch, metrics, extra=toy.extra())
        if number is not None:
            saved.append(number)
        persistence.save_best_model(*toy.six, 0, batch, metrics, extra=toy.extra())
    return saved, states, persistence, toy


def run(share: str = "1/1", seed: int = 0) -> dict[str, Any]:
    """Inject the errors; returns the figures."""
    figures: dict[str, Any] = {"cases": 0, "went_on": 0, "saves_refused": 0, "problems": []}
    with scratch() as root:
        base, work = root / "base", root / "work"
        prepare(base, 2)
        copy_tree(base, work)
        watched = WatchedFS()
        two_saves(work, watched)
        cases = [
            (number, text, for_good)
            for number in range(len(watched.log))
            for text in ERRORS
            for for_good in (False, True)
            if text != "short write"
        ]
        writes = sum(name == "write" for name in watched.log)
        cases += [(n, "short write", g) for n in range(writes) for g in (False, True)]
        for number, text, for_good in share_of(cases, share, seed):
            copy_tree(base, work)
            fs = FailingFS(number, ERRORS[text], for_good)
            figures["cases"] += 1
            problem = check(work, fs, figures)
            if problem:
                how = "for good" if for_good else "once"
                where = watched.log[number] if text != "short write" else "write"
                figures["problems"].append(f"{text} at {where} {number} {how}: {problem}")
            else:
                figures["went_on"] += 1
    return figures


def check(work: Path, fs: FailingFS, figures: dict[str, Any]) -> str:
    try:
        saved, states, persistence, toy = two_saves(work, fs)
    except Exception as e:  # noqa: BLE001 - any exception here would have ended the training
        return f"training ended with {type(e).__name__}: {e}"
    figures["saves_refused"] += 2 - len(saved)
    if fs.code == "short" and len(saved) != 2:
        return "a short write is not an error, yet a save failed"
    if not fs.for_good and not saved:
        return "one error cost two saves"
    # What was there, and what was called saved, is good.
    healthy, other = manager(work), Toy()
    found = healthy.load_latest(*other.six)
    other.restore(found["extra"])
    if found["skipped"]:
        return f"a file is damaged: {found['skipped']}"
    if saved and found["checkpoint_id"] < saved[-1]:
        return f"loaded {found['checkpoint_id']}, but {saved[-1]} was called saved"
    if found["batch"] in states and other.fingerprint() != states[found["batch"]]:
        return "the state is not the one that was saved"
    if found["checkpoint_id"] < 1:
        return "a good checkpoint was lost"
    healthy.load_best_model(*other.six)
    # The disk recovers; the same process saves again.
    fs.active = False
    next_batch = max(states) + 1
    metrics = {"accuracy_delta": float(next_batch)}
    number = persistence.save_checkpoint(*toy.six, 0, next_batch, metrics, extra=toy.extra())
    if number is None or number <= found["checkpoint_id"]:
        return f"the save after recovery got id {number} after {found['checkpoint_id']}"
    if not persistence.save_best_model(*toy.six, 0, next_batch, metrics, extra=toy.extra()):
        return "the best model after recovery was not kept"
    persistence.close()
    if temps(work):
        return f"left behind: {temps(work)}"
    if len(list((work / "checkpoints").glob("*.pt"))) > 2:
        return "old checkpoints were not removed after recovery"
    return ""


def main() -> None:
    args = arguments(__doc__ or "")
    figures = run(args.share, args.seed)
    finish(figures, not figures["problems"])


if __name__ == "__main__":
    main()
