"""What model a checkpoint holds: described in words, and built again from the file alone, as it was
trained or averaged.

    from trained_model import load_model, load_modules
    agent, qwen, solver2, efe_loss, policy_rl, optimizer, metadata = load_modules("runs")

Reads files and never writes one; no training, no scores. `runs` means the newest run in it; a run
folder, `best_model.pt`, a checkpoint file or a folder of `exported_model` do as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from command_line import EXIT_ARGUMENTS, EXIT_MISSING, UserError
from persistence.files import expanded

if TYPE_CHECKING:
    from arc_system import System, SystemConfig
    from optimizers import WeightAverage


class Description(TypedDict):
    """What a checkpoint's `extra` says of its model, so that another process can build it again
    from one file, without the run directory."""

    # The SystemConfig; qwen_train as it was used: "auto" may mean another thing on another device.
    system: dict[str, Any]
    task_ids: list[str]  # in the order of the task table
    average_names: list[str]  # "module.parameter" of each averaged tensor, in the average's order


NEEDED = (*Description.__annotations__, "progress", "average")  # of `extra`, to build a model


def describe(system: System, average: WeightAverage, task_ids: Iterable[str]) -> Description:
    """What a checkpoint of this system has to say of it. average: over all that is trained, in the
    order of the optimizer's groups; task_ids: in the order of the task table."""
    names = {id(p): name for name, p in named_parameters(system).items()}
    return {
        "system": dataclasses.asdict(system.config) | {"qwen_train": system.qwen.train_mode},
        "task_ids": list(task_ids),
        "average_names": [names[id(p)] for p in average.params],
    }


@dataclass
class Model:
    """A trained system with its averaged weights, and where it comes from."""

    system: System
    task_index: dict[str, int]  # row of the task table by task id, for tasks known from training
    path: Path
    n_batches: int  # that it was trained on
    averaged: bool
    notes: list[str]  # files that were passed over, and why

    @property
    def seed(self) -> int:
        return self.system.config.seed


def load_model(
    spec: str | Path, *, checkpoint: str = "latest", device: str = "cpu", offline: bool = False
) -> Model:
    """The model of a run folder, of a folder's newest run, of a .pt file or an export; only reads.

    checkpoint: latest, best or a number. Of the newest checkpoints a damaged one is passed over and
    noted. Raises UserError, ModelError or PersistenceError, each one line: what, why, fix.
    """
    payload, path, notes = read_model(spec, checkpoint)
    model = model_of(payload, path, device=device, offline=offline)
    model.notes = notes
    if not model.n_batches:
        model.notes.append(f"{path}: no batch was trained, its weights are those of the start")
    return model


def load_modules(
    spec: str | Path, *, checkpoint: str = "latest", device: str = "cpu", offline: bool = False
) -> tuple[Any, Any, Any, Any, Any, Any, dict[str, Any]]:
    """(agent, qwen, solver2, efe_loss, policy_rl, optimizer, metadata) of a run or a .pt file.

    Built as the file describes them, with its weights as they were trained (`load_model` has the
    averaged ones) and its optimizer's state, in evaluation mode. metadata: epoch, batch, metrics,
    timestamp, path, extra, ... Arguments and errors as those of `load_model`.
    """
    from persistence.checkpoint_file import MODULES
    from persistence.restoring import apply_state

    payload, path, notes = read_model(spec, checkpoint)
    if "optimizer" not in payload:
        raise UserError(
            f"{path}: an export holds no optimizer. Take load_model, or give the run.", EXIT_MISSING
        )
    system = system_of(payload, path, device=device, offline=offline)
    optimizer = optimizer_of(payload, system)
    apply_state(payload, {"optimizer": optimizer}, str(path))
    left_out = (*MODULES, "optimizer", "sealed")
    metadata = {key: value for key, value in payload.items() if key not in left_out}
    metadata |= {"path": str(path), "notes": notes}
    modules = system.modules()
    agent, qwen, solver2, efe_loss, policy_rl = (modules[name] for name in MODULES)
    return agent, qwen, solver2, efe_loss, policy_rl, optimizer, metadata


def known_errors() -> tuple[type[Exception], ...]:
    """The errors of data, model and files, whose text says what to do."""
    from dataset_arc import DataError
    from language_model import ModelError
    from model_persistence import PersistenceError

    return DataError, ModelError, PersistenceError


def read_model(spec: str | Path, checkpoint: str) -> tuple[dict[str, Any], Path, list[str]]:
    """(payload, its file, what was passed over and why) of the first file that is good."""
    from exported_model import is_export, read_export
    from model_persistence import CheckpointError, CorruptCheckpointError, verify_checkpoint_file

    notes: list[str] = []
    folder = expanded(spec)
    if is_export(folder):
        if checkpoint != "latest":
            raise UserError(
                f"--checkpoint {checkpoint}: {spec} is an export, which holds one model",
                EXIT_ARGUMENTS,
            )
        return read_export(folder), folder, notes
    for path in model_files(expanded(spec), checkpoint, notes):
        try:
            payload = verify_checkpoint_file(path).payload
        except CorruptCheckpointError as error:
            notes.append(f"passed over {error}")
        except OSError as error:
            notes.append(f"passed over {path}: cannot be read ({error.strerror or error})")
        else:
            return payload, path, notes
    fix = "Give another checkpoint with --checkpoint." if Path(spec).is_dir() else "Give another."
    why = "; ".join(note.removeprefix("passed over ") for note in notes)
    raise CheckpointError(f"{spec}: no usable model", why, fix)


def model_files(spec: Path, checkpoint: str, notes: list[str] | None = None) -> list[Path]:
    """The files to try, in order. A file named by the user has no substitute. Runs that were passed
    over are appended to `notes`."""
    from model_persistence import ModelPersistence

    if spec.is_file():
        if checkpoint != "latest":
            raise UserError(
                f"--checkpoint {checkpoint}: {spec} is a file already; give its run folder instead",
                EXIT_ARGUMENTS,
            )
        return [spec]
    run = ModelPersistence(find_run(spec, notes), drive_backup=False, lock=False)
    have = sorted(run.checkpoints, reverse=True)
    if checkpoint == "latest":
        best = [run.best_path] if run.best_path.exists() else []
        return [run.checkpoint_path(i) for i in have] + best
    if checkpoint == "best":
        if not run.best_path.exists():
            raise UserError(
                f"{run.output_dir}: no best_model.pt yet; it comes with the first epoch's "
                "validation. Use --checkpoint latest.",
                EXIT_MISSING,
            )
        return [run.best_path]
    if int(checkpoint) not in have:
        there = ", ".join(map(str, sorted(have))) or "none"
        raise UserError(
            f"{run.output_dir}: no checkpoint {checkpoint}. There are: {there}.", EXIT_MISSING
        )
    return [run.checkpoint_path(int(checkpoint))]


def find_run(spec: Path, notes: list[str] | None = None) -> Path:
    """A run folder as it is (also from its `checkpoints`); of a folder of runs the one saved last.

    Runs that were passed over, and may be the one that is meant, are appended to `notes`.
    """
    from model_persistence import ModelPersistence
    from persistence.find_run import RESTORING, find_latest_run, run_of

    notes = [] if notes is None else notes
    if spec.name == "checkpoints":
        spec = run_of(spec)
    if not spec.is_dir():
        newest = find_latest_run("runs")
        hint = f" The newest run here is {newest}." if newest else " Train one first."
        raise UserError(f"{spec}: no such run folder or model file.{hint}", EXIT_MISSING)
    run = ModelPersistence(spec, drive_backup=False, lock=False)
    newest = spec if run.checkpoints or run.best_path.exists() else find_latest_run(spec, notes)
    if newest is None:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(
            f"{spec}: no checkpoint in it and no run below it{why}. Give a run folder such as "
            "runs/arc_complete_20260101_120000, or train longer: the first save comes at batch 50 "
            "or at the first epoch's end.",
            EXIT_MISSING,
        )
    if (newest / RESTORING).exists():
        notes.append(f"{newest} is not wholly back from Drive yet; --resume brings the rest")
    return newest


def model_of(payload: dict[str, Any], path: Path, *, device: str, offline: bool) -> Model:
    """The modules that a checkpoint describes, with its averaged weights."""
    system = system_of(payload, path, device=device, offline=offline)
    extra = payload["extra"]
    try:
        averaged = apply_average(system, extra, path) or extra["average"].get("applied", False)
        index = {task_id: row for row, task_id in enumerate(extra["task_ids"])}
        n_batches = extra["progress"]["total"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: what it says of its training cannot be read "
            f"({type(error).__name__}: {error}). The file is damaged or was made by hand; use "
            "another.",
            EXIT_MISSING,
        ) from error
    return Model(system, index, path, n_batches, averaged, [])


def system_of(payload: dict[str, Any], path: Path, *, device: str, offline: bool) -> System:
    """The modules that a checkpoint describes, with its weights, in evaluation mode."""
    from arc_system import build_system
    from persistence.restoring import apply_state

    extra = payload.get("extra") or {}
    missing = [key for key in NEEDED if key not in extra]
    if missing:
        raise UserError(
            f"{path}: it does not describe its model ('{missing[0]}' is missing), so another "
            "version wrote it. Resume that run with this version and use its next checkpoint.",
            EXIT_MISSING,
        )
    config = described_config(extra["system"], payload, path)
    revision = payload.get("revision")  # of an export's language model; a checkpoint has its hash
    try:
        system = build_system(config, device, offline=offline, revision=revision)
    except (TypeError, ValueError, KeyError, ArithmeticError, AssertionError) as error:
        raise UserError(
            f"{path}: no model can be built from its settings ({error}). Use the version that "
            "trained it.",
            EXIT_MISSING,
        ) from error
    if "language_model" in payload:
        payload = with_language_model(payload, system, path)
    apply_state(payload, system.modules(), str(path))
    return system.train(False)


def with_language_model(payload: dict[str, Any], system: System, path: Path) -> dict[str, Any]:
    """An export's payload with the weights of its language model, which has been built from files
    of its own. Raises UserError where those are not the exported ones."""
    from exported_model import language_model_facts

    live, saved = language_model_facts(system.qwen), payload["language_model"]
    wrong = [key for key, value in live.items() if saved.get(key) != value]
    if wrong:
        raise UserError(
            f"{path}: its language model is not the one that was exported ({wrong[0]} differs). "
            "Export the run again.",
            EXIT_MISSING,
        )
    own = system.qwen.persistent_state_dict().items()
    backbone = {key: value for key, value in own if key.startswith("backbone.")}
    return {**payload, "qwen": {**payload["qwen"], **backbone}}


def described_config(saved: Any, payload: dict[str, Any], path: Path) -> SystemConfig:
    """The settings of a checkpoint's model, refused before anything is built from them that would
    need more memory than a few times the weights in the file."""
    from arc_system import SystemConfig

    try:
        config = SystemConfig(**saved)
    except TypeError as error:
        raise UserError(
            f"{path}: its model has settings that this version does not know ({error}). Use the "
            "version that trained it.",
            EXIT_MISSING,
        ) from error
    wrong = ""
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        kinds = (int, float) if type(default) is float else (type(default),)
        if type(value) not in kinds or (type(value) is int and not 0 <= value < 2**31):
            wrong = wrong or f"{field.name} is {str(value)[:40]!r}"
    if not wrong:
        agent, solver2 = n_weights(payload["agent"]), n_weights(payload["solver2"])
        blocks = config.blocks + config.encoder_blocks
        # A block has more than 8 matrices of width x width (attention 4, MLP 6).
        needed = {
            "width": (8 * max(1, blocks) * config.width**2, agent),
            "heads": (config.heads, config.width),
            "planning_steps": (config.planning_steps * config.width, agent),
            "n_tasks": (config.n_tasks * config.width, solver2),
        }
        too_large = [name for name, (least, there) in needed.items() if least > there]
        if too_large:
            name = too_large[0]
            wrong = f"{name} is {getattr(config, name)}, which its weights are too few for"
    if wrong:
        raise UserError(
            f"{path}: its settings and its weights do not belong together: {wrong}. The file is "
            "damaged or was made by hand; use another.",
            EXIT_MISSING,
        )
    return config


def n_weights(state: Any) -> int:
    """Numbers in a saved module, each memory counted once."""
    import torch

    found = {}
    for value in state.values() if isinstance(state, dict) else ():
        if isinstance(value, torch.Tensor) and value.numel():
            found[value.untyped_storage().data_ptr()] = value.numel()
    return sum(found.values())


def optimizer_of(payload: dict[str, Any], system: System) -> Any:
    """An optimizer over the system's parameters with the groups of the saved one, no state yet."""
    from optimizers import MuonAdamW

    params = named_parameters(system)
    names = iter(payload["extra"]["average_names"])  # in the order of the optimizer's groups
    groups = [
        {**group, "params": [params[next(names)] for _ in group["params"]]}
        for group in payload["optimizer"]["param_groups"]
    ]
    return MuonAdamW(groups)


def named_parameters(system: System) -> dict[str, Any]:
    """Every parameter by "module.parameter"."""
    return {
        f"{module}.{name}": p
        for module, part in system.modules().items()
        for name, p in part.named_parameters()
    }


def apply_average(system: System, extra: dict[str, Any], path: Path) -> bool:
    """Put the averaged weights in place by name; False where the run kept none (--ema 0)."""
    import torch

    values = extra["average"]["average"]
    if not values:
        return False
    params = named_parameters(system)
    for name, value in zip(extra["average_names"], values, strict=True):
        if name not in params or params[name].shape != value.shape:
            there = list(params[name].shape) if name in params else "nothing"
            raise UserError(
                f"{path}: averaged weights of '{name}' do not fit: expected {there}, found "
                f"{list(value.shape)}. Use the version that trained it.",
                EXIT_MISSING,
            )
        with torch.no_grad():
            params[name].copy_(value)
    return True
