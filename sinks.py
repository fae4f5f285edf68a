"""`--report_to`: a run's figures, shown in TensorBoard, trackio or Weights & Biases as well.

Each is an extra package. What fails there stops no training: it is said once, and the figures end
in that place alone. `metrics.jsonl` has them all. Importing this needs the standard library alone.
`from sinks import NAMES, Sink, check_installed`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from command_line import EXIT_MISSING, UserError
from persistence.files import atomic_write_json, read_json

NAMES = ("tensorboard", "trackio", "wandb")
MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
PROJECT = "arc-efe"  # of all runs together, where the user has named no other
ID_FILE = "report_to.json"  # in the run's folder: what a resumed run goes on with
CLOSE_S = 30.0  # that the end of a run waits for figures that are still being sent
PLACES = ("epoch", "batch", "batches_done")  # of a row: where it belongs


def check_installed(name: str) -> None:
    """Raises UserError where the package of a sink is missing; "none" needs none."""
    if name == "none":
        return
    try:
        importlib.import_module(MODULES[name])
    except Exception as error:
        raise UserError(
            f"--report_to {name}: the package {name} cannot be imported ({error}). pip install "
            f"{name}, or leave the flag out (metrics.jsonl is always written).",
            EXIT_MISSING,
        ) from error


class Sink:
    """One place more for the figures of a run; no method raises.

    name: of `NAMES`; folder: the run's; offline: send nothing; quiet: print nothing of the
    package's own; warn: what is told when it fails, a line.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        offline: bool = False,
        quiet: bool = False,
        warn: Callable[[str], None],
    ) -> None:
        self.name, self.folder, self.offline, self.quiet = name, folder, offline, quiet
        self.warn = warn
        self.place: Any = None  # the package's own object
        self.settings: Mapping[str, Any] = {}  # the run's flags, to be shown with it
        self.ended = False

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Before the training: whoever is asked for a password is still there. TensorBoard opens
        with the first figure, which says where a resumed run goes on."""
        self.settings = settings
        if self.name != "tensorboard":
            self._do(lambda: self._open(0))

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl, as `kind/figure` at `batches_done`, a finding's value as
        `health/name`; one without that place is left out."""
        if "batches_done" in row:
            kind = row["kind"]  # of findings, each check has its own unit
            shown = {row["name"]: row["value"]} if kind == "health" else row
            figures = {f"{kind}/{k}": v for k, v in numbers(shown) if k not in PLACES}
            again = row["batches_done"] + (row.get("batch") == 0)  # see `open_tensorboard`
            self._do(lambda: self._put(figures, row["batches_done"], again))

    def results(self, results: Mapping[str, Any]) -> None:
        """What results.json holds, as `final/figure` at the run's last batch."""
        figures = {f"final/{k}": v for k, v in numbers(results)}
        step = results["batch"]
        self._do(lambda: self._put(figures, step, step + 1))

    def close(self) -> None:
        """Have everything written, and sent for CLOSE_S seconds at most."""
        if self.place is None or self.ended:
            return
        if self.name != "wandb":  # trackio waits 30 seconds at most by itself, and in this thread
            self._do(self._end)
        else:
            # Not muted: that is of the whole process, and would outlast an end that hangs.
            end = partial(self._do, self._end, muffled=False)
            closing = threading.Thread(target=end, daemon=True)
            closing.start()
            closing.join(CLOSE_S)
            if closing.is_alive():
                self.warn(
                    f"--report_to wandb: not everything was sent within {CLOSE_S:.0f} seconds; "
                    f"`wandb sync` sends what is in {self.folder / 'wandb'}."
                )
        self.ended = True

    def _do(self, action: Callable[[], object], *, muffled: bool = True) -> None:
        """Something with the package; after a failure nothing more: it may stay broken.

        muffled: with `quiet`, nothing that anything in the process prints meanwhile is shown.
        """
        if self.ended:
            return
        try:
            with muted() if self.quiet and muffled else contextlib.nullcontext():
                action()
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self.ended = True
            said = (str(error).strip().splitlines() or [""])[0]
            why = getattr(error, "strerror", None) or said or type(error).__name__
            self.warn(
                f"--report_to {self.name}: its figures end here ({why}). Training goes on; "
                "metrics.jsonl has every figure."
            )

    def _put(self, figures: Mapping[str, float], step: int, purge: int) -> None:
        self._open(purge)
        if self.name == "tensorboard":
            for name, value in figures.items():
                self.place.add_scalar(name, value, step)
        elif self.name == "trackio":
            self.place.log(dict(figures), step=step)
        else:
            self.place.log({**figures, "batches_done": step})

    def _open(self, purge: int) -> None:
        if self.place is None:
            self.place = OPEN[self.name](self, purge)

    def _end(self) -> None:
        if self.name == "tensorboard":
            self.place.close()
        elif self.name == "wandb":
            self.place.finish()
        else:  # not the run's own: the package would finish it once more when the process ends
            importlib.import_module("trackio").finish()

    # -- what is kept of it in the run's folder ----------------------------------------------------
    def kept_id(self, fresh: str) -> str:
        """Under what name or id the run goes on there, `fresh` for one that begins."""
        path = self.folder / ID_FILE
        known = read_json(path)
        known = known if isinstance(known, dict) else {}
        if not isinstance(known.get(self.name), str):
            known[self.name] = fresh
            atomic_write_json(path, known)
        return str(known[self.name])


def open_tensorboard(sink: Sink, purge: int) -> Any:
    """A writer of <run>/tensorboard. In a resumed run what an earlier process wrote from batch
    `purge` on is hidden: it comes again. Where an epoch begins, its first batch may be there twice,
    for the row of the epoch before has the same place."""
    from torch.utils.tensorboard import SummaryWriter

    folder = sink.folder / "tensorboard"
    return SummaryWriter(str(folder), purge_step=purge if folder.exists() else None)


def open_trackio(sink: Sink, _: int) -> Any:
    """A run of trackio, in its database on this machine (TRACKIO_DIR; `trackio show`)."""
    import trackio

    if sink.offline:
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            os.environ.pop(name, None)
    name = sink.kept_id(f"{sink.folder.name}-{secrets.token_hex(2)}")
    project = os.environ.get("TRACKIO_PROJECT") or PROJECT
    return trackio.init(project, name=name, config=dict(sink.settings), resume="allow", embed=False)


def open_wandb(sink: Sink, _: int) -> Any:
    """A run of Weights & Biases, its files in <run>/wandb; `wandb sync` sends one kept offline."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        id=sink.kept_id(secrets.token_hex(8)),
        name=sink.folder.name,
        dir=str(sink.folder),
        config=dict(sink.settings),
        resume="allow",
        mode="offline" if sink.offline else None,
        settings=wandb.Settings(console="off", silent=sink.quiet),
    )
    run.define_metric("batches_done")
    run.define_metric("*", step_metric="batches_done")
    return run


OPEN: Mapping[str, Callable[[Sink, int], Any]] = {
    "tensorboard": open_tensorboard,
    "trackio": open_trackio,
    "wandb": open_wandb,
}


def numbers(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of a mapping's numbers, those of mappings in it as `outer/inner`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield before + name, value


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """What is printed meanwhile is not shown."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
