"""Hypotheses of many tasks, fitted in a process of their own while something else runs.

`Fitter` runs `rule_list.fit_task` on tasks, smallest first; it takes nothing from a training loop but a core. Tasks
come without test outputs. The child process ends by itself when its parent is gone, however that ended. How its
answers vote is `evaluation`'s. Use: `from hypotheses import Fitter`; needs NumPy alone.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from dataset_arc import Task
from rule_list import Explained

Key = tuple[str, int]  # task id, number of the test input
HEADER = struct.Struct("<Q")


def by_size(tasks: Sequence[Task]) -> list[Task]:
    """Tasks by the cells that a fit has to look at, smallest first; ties by id."""

    def cells(task: Task) -> int:
        return sum(
            p.input.size + (0 if p.output is None else p.output.size) for p in task.demonstrations
        )

    return sorted(tasks, key=lambda task: (cells(task), task.task_id))


class Fitter:
    """Hypotheses of tasks, made in a child process from the moment this object is made.

    tasks: without test outputs; fitted smallest first. Raises ValueError if a test output is in sight.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if any(pair.output is not None for task in tasks for pair in task.tests):
            raise ValueError("Fitter must not see test outputs: pass without_outputs(tasks)")
        self.n_tasks = len(tasks)
        self.done: dict[str, list[Explained]] = {}
        self.failed: str | None = None  # why the child ended before its work was done
        ordered = by_size(tasks)
        self._order = [task.task_id for task in ordered]
        self._results: queue.Queue[tuple[str, list[Explained]] | None] = queue.Queue()
        work = [
            (t.task_id, [(p.input, p.output) for p in t.demonstrations], [p.input for p in t.tests])
            for t in ordered
        ]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads},
        )
        threading.Thread(target=self._feed, args=(pickle.dumps(work),), daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()

    def collect(
        self, deadline: float | None = None, n_tasks: int | None = None, waiting: Any = None
    ) -> dict[Key, Explained]:
        """What is fitted by `deadline` (time.monotonic(); None: wait for all), by query.

        n_tasks: wait for so many tasks, take no more; repeats what a deadline cut. waiting(n) is called with the number
        of tasks done whenever one came.
        """
        wanted = self.n_tasks if n_tasks is None else min(n_tasks, self.n_tasks)
        while len(self.done) < wanted and self.failed is None:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                item = self._results.get(timeout=None if left is None else max(0.0, left))
            except queue.Empty:
                break
            if item is None:
                self.failed = f"its process ended with exit code {self._child.wait()}"
                break
            self.done[item[0]] = item[1]
            if waiting is not None:
                waiting(len(self.done))
        kept = [task_id for task_id in self._order[:wanted] if task_id in self.done]
        return {(name, i): e for name in kept for i, e in enumerate(self.done[name])}

    def close(self) -> None:
        """End the child; what was collected stays."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue  # a pipe to a process that is gone

    def _feed(self, data: bytes) -> None:
        assert self._child.stdin is not None
        try:
            _write(self._child.stdin, data)
        except (OSError, ValueError):
            return  # the child is gone: `collect` says so
        # stdin stays open: its end tells the child that this process is gone

    def _listen(self) -> None:
        assert self._child.stdout is not None
        try:
            while (data := _read(self._child.stdout)) is not None:
                self._results.put(pickle.loads(data))
        except (OSError, ValueError, EOFError):
            pass  # closed: said below
        self._results.put(None)


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
    """The child: tasks from stdin, one message a task to stdout; ends when stdin does."""
    from rule_list import fit_task

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the parent's; it closes our stdin
    data = _read(sys.stdin.buffer)
    if data is None:
        return

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    for task_id, demonstrations, inputs in pickle.loads(data):
        _write(sys.stdout.buffer, pickle.dumps((task_id, fit_task(demonstrations, inputs))))
    sys.stdin.buffer.read()  # until the parent has read everything and is gone


if __name__ == "__main__":
    serve()
