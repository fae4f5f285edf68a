"""Hypotheses of many tasks, fitted in processes of their own while something else runs.

`Fitter` runs `rule_list.fit_task` on tasks, smallest first, and in between
`rule_list.leave_one_out` on those that training asks for; it takes nothing from a training loop but
cores. Tasks come without test outputs. The child processes end by themselves when their parent is
gone, however that ended. `proposals_of` says of an explanation what a policy may know.
Use: `from hypotheses import Fitter, proposals_of`; needs NumPy alone.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import kept_hypotheses
import rule_list
from dataset_arc import Grid, Task
from kept_hypotheses import Kept
from rule_arms import ARMS, TRAINING_ARMS, TRAINING_LIMITS
from rule_list import Explained, Hypothesis, Verdict

Key = tuple[str, int]  # task id, number of the test input
Pairs = list[tuple[Any, Any]]
HEADER = struct.Struct("<Q")
MOST_WORKERS = 4  # child processes; guess: there is other work beside
MAX_PROPOSALS = 12  # different answers a query

# What is known of a proposed answer before anybody looks at it: how the demonstrations judge the
# way it was found, each predicted from the others ("verdict": all, half, some, none right, not
# tried), and by which ways (arms) it was found. `proposals_of` fills it in.
VERDICTS = ("full", "half", "some", "none", "untried")
N_ARM_SLOTS = 24
PROPOSAL_FACTS: tuple[str, ...] = (
    *VERDICTS, "share_right", "cells_right", "n_tried", "explains", "n_rules", "n_arms", "rank",
    *(f"arm_{i}" for i in range(N_ARM_SLOTS)),
)  # fmt: skip
N_PROPOSAL_FACTS = len(PROPOSAL_FACTS)


@dataclass(frozen=True, eq=False)
class Proposals:
    """Answers proposed for one query, best first; made from its demonstrations alone.

    grids: uint8 (rows, cols), colours 0..9, in the task's own colours and orientation; facts:
    float32 (n, N_PROPOSAL_FACTS), see PROPOSAL_FACTS.
    """

    grids: tuple[Grid, ...]
    facts: NDArray[np.float32]


def workers_on(n_cores: int) -> int:
    """How many child processes fit hypotheses where so many cores are free."""
    return max(1, min(MOST_WORKERS, n_cores))


def by_size(tasks: Sequence[Task]) -> list[Task]:
    """Tasks by the cells that a fit has to look at, smallest first; ties by id."""

    def cells(task: Task) -> int:
        return sum(
            p.input.size + (0 if p.output is None else p.output.size) for p in task.demonstrations
        )

    return sorted(tasks, key=lambda task: (cells(task), task.task_id))


def verdict_name(verdict: Verdict) -> str:
    """One of VERDICTS."""
    if not verdict.n_tried:
        return "untried"
    if verdict.full:
        return "full"
    return "half" if verdict.share >= 0.5 else "some" if verdict.share > 0 else "none"


def proposals_of(explained: Explained) -> Proposals | None:
    """The different answers of an explanation, best first, with facts of each; None without any.

    Arms that answer alike make one proposal: the facts are those of the best ranked, `n_arms` and
    the arms count all.
    """
    slot = {name: i for i, name in enumerate(ARMS)}
    found: dict[tuple[Any, ...], list[Hypothesis]] = {}
    for h in explained.hypotheses:
        found.setdefault((h.answer.shape, h.answer.tobytes()), []).append(h)
    groups = list(found.values())[:MAX_PROPOSALS]
    if not groups:
        return None
    facts = np.zeros((len(groups), N_PROPOSAL_FACTS), np.float32)
    at = {name: i for i, name in enumerate(PROPOSAL_FACTS)}
    for row, (fact, group) in enumerate(zip(facts, groups, strict=True)):
        best = group[0]
        fact[VERDICTS.index(verdict_name(best.verdict))] = 1.0
        fact[at["share_right"]] = best.verdict.share
        fact[at["cells_right"]] = best.verdict.cells_frac
        fact[at["n_tried"]] = min(best.verdict.n_tried, 8) / 8
        fact[at["explains"]] = best.explains
        fact[at["n_rules"]] = min(best.n_rules, 8) / 8
        fact[at["n_arms"]] = min(len(group), 8) / 8
        fact[at["rank"]] = row / MAX_PROPOSALS
        for h in group:
            if slot.get(h.arm, N_ARM_SLOTS) < N_ARM_SLOTS:
                fact[at["arm_0"] + slot[h.arm]] = 1.0
    return Proposals(tuple(group[0].answer for group in groups), facts)


def pairs_of(task: Task) -> Pairs:
    """A task's demonstrations as rule_list takes them."""
    return [(p.input, p.output) for p in task.demonstrations]


def inputs_of(task: Task) -> list[Any]:
    """A task's test inputs."""
    return [p.input for p in task.tests]


def digest_of(pairs: Pairs, inputs: Sequence[Any] = ()) -> str:
    """`kept_hypotheses.digest` of what a task is fitted to."""
    return kept_hypotheses.digest([*(g for pair in pairs for g in pair), *inputs])


def explain_demonstrations(pairs: Pairs) -> list[Explained]:
    """Each demonstration explained from the others with TRAINING_ARMS; pure."""
    arms = {name: ARMS[name] for name in TRAINING_ARMS}
    return rule_list.leave_one_out(pairs, arms=arms, limits=TRAINING_LIMITS)


class Fitter:
    """Hypotheses of tasks, made in `n_workers` child processes from the moment this object is made.

    tasks: whose test inputs are answered, without test outputs; fitted smallest first. What is
    asked for with `ask` comes before them. known: of an earlier one's `kept`; what is in it is not
    fitted again. others: further tasks; what is known of them is kept, no more. Raises ValueError
    if a test output is in sight.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        n_workers: int = 1,
        known: bytes = b"",
        others: Sequence[Task] = (),
    ) -> None:
        if any(pair.output is not None for task in tasks for pair in task.tests):
            raise ValueError("Fitter must not see test outputs: pass without_outputs(tasks)")
        self.n_tasks = len(tasks)
        self.done: dict[str, list[Explained]] = {}
        self.failed: str | None = None  # why the last child ended before its work was done
        ordered = by_size(tasks)
        self._order = [task.task_id for task in ordered]
        self._n_gapless = 0  # of the order's first: done, none left out
        self._records: dict[tuple[str, str], bytes] = {}  # of `kept_hypotheses`, by kind and task
        self._known: dict[str, Kept] = {}  # of demonstrations, until training asks for them
        self._take(known, tasks, others)
        self.n_known = len(self.done)
        self._later = deque(
            (t.task_id, pairs_of(t), inputs_of(t)) for t in ordered if t.task_id not in self.done
        )
        self._asked: deque[str] = deque()
        self._pairs: dict[str, Pairs] = {}
        self._proposed: dict[str, list[Proposals | None]] = {}
        self._changed = threading.Condition()
        self._closed = False
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._children = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **threads},
            )
            for _ in range(n_workers)
        ]
        self._n_working, self._n_waiting = n_workers, 0
        for child in self._children:
            threading.Thread(target=self._drive, args=(child,), daemon=True).start()

    # ---- test inputs

    def collect(
        self, deadline: float | None = None, n_tasks: int | None = None, waiting: Any = None
    ) -> dict[Key, Explained]:
        """What is fitted by `deadline` (time.monotonic(); None: wait for all), by query.

        n_tasks: wait for so many tasks, take no more; repeats what a deadline cut. waiting(n) is
        called with the number of tasks done whenever one came.
        """
        wanted = self.n_tasks if n_tasks is None else min(n_tasks, self.n_tasks)
        shown = 0
        while True:
            with self._changed:
                done = self._n_first(wanted)
                if done == shown and done < wanted and self.failed is None:
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        break
                    self._changed.wait(0.2 if left is None else min(0.2, left))
                done = self._n_first(wanted)
            if done > shown and waiting is not None:
                waiting(done)
            shown = done
            if done >= wanted or self.failed is not None:
                break
        with self._changed:
            kept = self._order[: self._n_first(wanted)]
            return {(name, i): e for name in kept for i, e in enumerate(self.done[name])}

    @property
    def n_busy(self) -> int:
        """How many child processes have work."""
        with self._changed:
            return 0 if self._closed else self._n_working - self._n_waiting

    def n_first(self) -> int:
        """How many of the smallest tasks are fitted without a gap."""
        with self._changed:
            return self._n_first(self.n_tasks)

    def _n_first(self, n: int) -> int:
        """How many tasks are done without a gap in the order of sizes, at most n: what n_tasks
        repeats. Goes on where it stopped: it is asked once a task."""
        while self._n_gapless < len(self._order) and self._order[self._n_gapless] in self.done:
            self._n_gapless += 1
        return min(n, self._n_gapless)

    # ---- demonstrations, for training

    def ask(self, tasks: Sequence[Task]) -> None:
        """Explain the demonstrations of these tasks next, in this order."""
        with self._changed:
            for task in tasks:
                if task.task_id not in self._pairs:
                    self._pairs[task.task_id] = pairs_of(task)
                    known = self._known.pop(task.task_id, None)
                    if known is not None and known.grids == digest_of(self._pairs[task.task_id]):
                        self._proposed[task.task_id] = [proposals_of(e) for e in known.found]
                    else:
                        self._asked.append(task.task_id)
            self._changed.notify_all()

    def leave_one_out(self, task: Task) -> list[Proposals | None]:
        """Proposals per demonstration, made from the others alone; waits for them. A pure function
        of the task: made here when the children are gone."""
        self.ask([task])
        with self._changed:
            while task.task_id not in self._proposed:
                if self.failed is not None or self._closed:
                    break
                self._changed.wait(1.0)
            if task.task_id in self._proposed:
                return self._proposed[task.task_id]
        found = explain_demonstrations(pairs_of(task))
        self._put("demonstrations", task.task_id, found, digest_of(pairs_of(task)))
        return self._proposed[task.task_id]

    # ---- kept

    def kept(self) -> bytes:
        """All that is fitted so far, for another Fitter's `known`."""
        with self._changed:
            return kept_hypotheses.packed(self._records.values())

    def _take(self, known: bytes, tasks: Sequence[Task], others: Sequence[Task]) -> None:
        """What of it belongs to these tasks' test inputs, or may to demonstrations."""
        mine = {task.task_id for task in tasks}
        by_id = {task.task_id: task for task in (*tasks, *others)}
        for one in kept_hypotheses.unpacked(known):
            task = by_id.get(one.task_id)
            if one.kind == "demonstrations":
                self._known[one.task_id] = one
            elif task is None or one.grids != digest_of(pairs_of(task), inputs_of(task)):
                continue
            elif one.task_id in mine:
                self.done[one.task_id] = one.found
            self._records[one.kind, one.task_id] = one.record

    def _put(self, kind: str, task_id: str, found: list[Explained], grids: str) -> None:
        """Take in what was fitted, and tell who waits for it."""
        record = kept_hypotheses.record(kind, task_id, grids, found)
        proposed = [proposals_of(e) for e in found] if kind == "demonstrations" else []
        with self._changed:
            if kind == "tests":
                self.done[task_id] = found
            else:
                self._proposed[task_id] = proposed
            self._records[kind, task_id] = record
            self._changed.notify_all()

    # ---- the children

    def close(self) -> None:
        """End the children; what was collected stays."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for child in self._children:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except OSError:
                        continue  # a pipe to a process that is gone

    def _next(self) -> tuple[str, Any] | None:
        """The next piece of work, waited for; None when closed."""
        with self._changed:
            while not self._closed:
                if self._asked:
                    task_id = self._asked.popleft()
                    return "demonstrations", (task_id, self._pairs[task_id])
                if self._later:
                    return "tests", self._later.popleft()
                self._n_waiting += 1
                self._changed.wait()
                self._n_waiting -= 1
        return None

    def _drive(self, child: subprocess.Popen[bytes]) -> None:
        """Give one child its work, piece by piece, and take the results."""
        assert child.stdin is not None
        assert child.stdout is not None
        work: tuple[str, Any] | None = None
        why = ""
        try:
            while (work := self._next()) is not None:
                _write(child.stdin, pickle.dumps(work))
                data = _read(child.stdout)
                if data is None:
                    break
                kind, task_id, found = pickle.loads(data)
                self._put(kind, task_id, found, digest_of(*work[1][1:]))
                work = None
        except (OSError, EOFError):
            pass  # closed, or killed: said below
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits has to hear of it
            why = f"{type(error).__name__}: {error}"
        code = _exit_code(child)
        with self._changed:
            self._n_working -= 1
            if work is not None and work[0] == "tests":  # another child may do it
                self._later.appendleft(work[1])
            elif work is not None:
                self._asked.appendleft(work[1][0])
            if not self._closed and not self._n_working:
                self.failed = why or f"its process ended with exit code {code}"
            self._changed.notify_all()


def _exit_code(child: subprocess.Popen[bytes]) -> int:
    """Of a child that has ended, or has no work to come and is ended here."""
    try:
        return child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _write(stream: IO[bytes], data: bytes) -> None:
    stream.write(HEADER.pack(len(data)) + data)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes | None:
    """One message, None at the end of the stream."""
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    (length,) = HEADER.unpack(head)
    data = stream.read(length)
    return data if len(data) == length else None


def serve() -> None:
    """A child: one piece of work a message from stdin, one answer a message to stdout; ends when
    stdin does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the parent's; it closes our stdin
    waiting: deque[bytes] = deque()
    came = threading.Semaphore(0)

    def listen() -> None:
        while (data := _read(sys.stdin.buffer)) is not None:
            waiting.append(data)
            came.release()
        os._exit(0)  # the parent is gone

    threading.Thread(target=listen, daemon=True).start()
    while True:
        came.acquire()
        kind, work = pickle.loads(waiting.popleft())
        if kind == "tests":
            task_id, pairs, inputs = work
            found = rule_list.fit_task(pairs, inputs)
        else:
            task_id, pairs = work
            found = explain_demonstrations(pairs)
        _write(sys.stdout.buffer, pickle.dumps((kind, task_id, found)))


if __name__ == "__main__":
    serve()
