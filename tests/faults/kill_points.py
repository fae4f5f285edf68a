"""SIGKILL before, in the middle of and after every file operation of a save.

Seven situations, among them the very first save, one that rotates, one that keeps a single file, a
new best model, and the first save after a resume. After each kill a new process resumes by itself;
no acknowledged checkpoint may be missing, and the next save must work and leave no temporary file.
    python tests/faults/kill_points.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from harness import (
    MUTATING,
    KillFS,
    ModelPersistence,
    Toy,
    WatchedFS,
    arguments,
    copy_tree,
    finish,
    forked,
    scratch,
    share_of,
    temps,
)


def manager(folder: Path, fs: Any = None, keep: int = 2) -> ModelPersistence:
    options = {"fs": fs} if fs is not None else {}
    return ModelPersistence(
        folder, max_checkpoints=keep, drive_backup=False, on_message=lambda _: None, **options
    )


def save(toy: Toy, persistence: ModelPersistence, batch: int, best: bool = False) -> int | None:
    """One optimizer step and one save; `accuracy_delta` rises with the batch."""
    toy.step(0, batch)
    metrics = {"accuracy_delta": float(batch)}
    saved = persistence.save_checkpoint(*toy.six, 0, batch, metrics, extra=toy.extra())
    if best:
        persistence.save_best_model(*toy.six, 0, batch, metrics, extra=toy.extra())
    return saved


def scenario(name: str, folder: Path, fs: Any, say: Any) -> None:
    """The part that is killed. It says `ack ID` for every save that returned."""
    persistence = manager(folder, fs, 1 if name == "only one kept" else 2)
    toy = Toy()
    if name == "resume + save":
        found = persistence.load_latest(*toy.six)
        toy.restore(found["extra"])
        first, count, best = found["batch"] + 1, 1, False
    else:
        if persistence.checkpoints:
            found = manager(folder).load_latest(*toy.six)  # not part of what is killed
            toy.restore(found["extra"])
            first = found["batch"] + 1
        else:
            first = 0
        count, best = (2 if name == "two saves" else 1), name == "new best"
    for batch in range(first, first + count):
        say(f"ack {save(toy, persistence, batch, best)}")
    persistence.close()


SITUATIONS = {  # name -> saves made before
    "first save": 0,
    "steady state": 1,
    "rotation": 3,
    "only one kept": 1,
    "new best": 3,
    "two saves": 2,
    "resume + save": 3,
}


def prepare(base: Path, saves: int) -> None:
    base.mkdir()
    if saves:
        toy, persistence = Toy(), manager(base)
        for batch in range(saves):
            save(toy, persistence, batch, best=True)
        persistence.close()


def expected_states() -> dict[int, str]:
    """Checkpoint id -> sha256 of the toy's state when it is saved."""
    toy, states = Toy(), {}
    for batch in range(8):
        toy.step(0, batch)
        states[batch] = toy.fingerprint()
    return states


def run(share: str = "1/1", seed: int = 0, only: str = "") -> dict[str, Any]:
    """Inject the kills; returns the figures."""
    expected = expected_states()
    figures: dict[str, Any] = {
        "points": 0,
        "killed": 0,
        "resumed": 0,
        "acknowledged": 0,
        "lost": 0,
        "problems": [],
    }
    with scratch() as root:
        cases: list[tuple[str, int, str]] = []
        for number, (name, saves) in enumerate(SITUATIONS.items()):
            if only not in name:
                continue
            base = root / f"base{number}"
            prepare(base, saves)
            copy_tree(base, root / "count")
            watched = WatchedFS()
            scenario(name, root / "count", watched, lambda _: None)
            mutating = [o for o in watched.log if o in MUTATING]
            for index, operation in enumerate(mutating):
                phases = ["before", "after"] + (["middle"] if operation == "write" else [])
                cases += [(name, index, phase) for phase in phases]
        for name, index, phase in share_of(cases, share, seed):
            base = root / f"base{list(SITUATIONS).index(name)}"
            work = root / "work"
            copy_tree(base, work)
            fs = KillFS(index, phase)
            status, lines = forked(partial(scenario, name, work, fs))
            figures["points"] += 1
            figures["killed"] += status == -9
            problem = check(work, SITUATIONS[name], lines, status, expected, figures)
            if problem:
                figures["problems"].append(f"{name}, operation {index} {phase}: {problem}")
    return figures


def check(
    work: Path,
    saves_before: int,
    lines: list[str],
    status: int,
    expected: dict[int, str],
    figures: dict[str, Any],
) -> str:
    """Resume as a user would; returns what is wrong, or an empty text."""
    if status != -9:
        return f"the child was not killed but ended with {status}: {lines}"
    acknowledged = [int(line.split()[1]) for line in lines if line.startswith("ack")]
    figures["acknowledged"] += len(acknowledged)
    newest = max([saves_before - 1, *acknowledged])
    persistence, toy = manager(work), Toy()
    before = set(persistence.checkpoints)
    best_before = persistence.best_value()
    if before:
        found = persistence.load_latest(*toy.six)
        toy.restore(found["extra"])
        if found["skipped"]:
            return f"a file was damaged: {found['skipped']}"
        if toy.fingerprint() != expected[found["batch"]]:
            return "the state is not the one that was saved"
        if found["checkpoint_id"] < newest:
            figures["lost"] += 1
            return f"acknowledged checkpoint {newest} is gone"
        next_batch = found["batch"] + 1
        if saves_before:
            best, value = Toy(), persistence.best_value()
            loaded = persistence.load_best_model(*best.six)
            if value is None or loaded["metrics"]["accuracy_delta"] != value:
                return "best_model.pt and its metadata disagree"
            best.restore(loaded["extra"])
            if best.fingerprint() != expected[loaded["batch"]]:
                return "the best model is not the one that was saved"
            toy.restore(found["extra"])  # the second toy has moved the global generators
    elif newest >= 0:
        figures["lost"] += 1
        return "nothing to resume from"
    else:
        next_batch = 0
    new_id = save(toy, persistence, next_batch, best=True)
    persistence.close()
    if new_id is None or (before and new_id <= max(before)):
        return f"the next save got id {new_id} after {sorted(before)}"
    if toy.fingerprint() != expected[next_batch]:
        return "the next step differs from the uninterrupted run"
    if best_before is not None and persistence.best_value() != float(next_batch):
        return "the next best model was not kept"
    if temps(work):
        return f"left behind: {temps(work)}"
    figures["resumed"] += 1
    return ""


def main() -> None:
    args = arguments(__doc__ or "", only="")
    figures = run(args.share, args.seed, args.only)
    finish(figures, not figures["problems"] and figures["lost"] == 0)


if __name__ == "__main__":
    main()
