"""A trained model as a folder that needs no run: safetensors and JSON, no pickle.

    model.safetensors    agent, prompt projections, solver2, policy, loss: "module.weight"
    language_model/      the language model by save_pretrained, with its tokenizer; a merged LoRA.
                         Not there for a frozen model of the hub: config.json names id and revision
    config.json          what `trained_model` builds it from, and SHA-256 of the weights
    README.md            the model card

The weights are those that predict.py uses, averaged where the run averaged them. A folder appears
whole or not at all. `from exported_model import is_export, read_export, write_export`; only
`trained_model` and `export.py` have to know it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file

from language_model import load_folder, save_folder, tokenizer_of, weights_sha256
from persistence.checkpoint_file import MODULES
from persistence.files import (
    REAL_FS,
    CheckpointError,
    CorruptCheckpointError,
    FileSystem,
    atomic_write_json,
    read_json,
    temporary_name,
)
from persistence.restoring import module_state

if TYPE_CHECKING:
    from arc_system import System
    from qwen_hybrid_prompt import QwenHybridPrompt

FORMAT, VERSION = "arc-efe-model", 1
WEIGHTS, CONFIG, CARD, LANGUAGE_MODEL = (
    "model.safetensors", "config.json", "README.md", "language_model",
)  # fmt: skip
NEEDED = ("system", "task_ids", "batches", "averaged", "language_model", "sha256", "sealed")


def is_export(folder: Path) -> bool:
    """Whether a folder looks like an export: neither a run nor a folder of runs has such a file."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def is_reference(qwen: QwenHybridPrompt) -> bool:
    """Whether a language model is named and not copied: frozen, and of the hub."""
    return qwen.train_mode == "frozen" and qwen.revision is not None


def language_model_facts(qwen: QwenHybridPrompt) -> dict[str, Any]:
    """By what a language model is known again: SHA-256 of its weights, in the dtype of their files,
    and the token ids of the alphabet."""
    frozen = qwen.frozen_reference()
    weights = dict(qwen.transformer.named_parameters())
    return {
        "sha256": frozen["sha256"] if frozen is not None else weights_sha256(weights),
        "symbol_ids": list(qwen.table.ids),
    }


def write_export(
    folder: Path,
    system: System,
    about: dict[str, Any],
    card: str,
    *,
    offline: bool = False,
    fs: FileSystem = REAL_FS,
) -> None:
    """Write a system as it is to a folder that does not exist yet, and read it back.

    about: task_ids, batches, averaged, and whatever else config.json is to say; card: README.md. A
    LoRA is merged into the language model of `system`, which is changed by that. Raises OSError, or
    CheckpointError where something is there already or was not written as it is; then nothing is
    left.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} is there already", "", "Choose another folder.")
    temp = folder.with_name(temporary_name(folder.name))
    try:
        fs.mkdir(temp)
        tensors = {
            f"{module}.{name}": value.detach().cpu().clone().contiguous()
            for module, part in system.modules().items()
            for name, value in module_state(part).items()
            if not (module == "qwen" and name.startswith("backbone."))
        }
        try:
            save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise OSError(errno.EIO, str(error)) from error
        language_model = _write_language_model(system.qwen, temp / LANGUAGE_MODEL, offline)
        settings = dataclasses.asdict(system.config)
        settings |= language_model.pop("settings")
        config = {
            "format": FORMAT,
            "version": VERSION,
            **about,
            "system": settings,
            "language_model": language_model,
            "sha256": hashlib.sha256((temp / WEIGHTS).read_bytes()).hexdigest(),
        }
        config["sealed"] = sealed(config)
        atomic_write_json(temp / CONFIG, config, fs)
        (temp / CARD).write_text(card, encoding="utf-8")
        again = read_export(temp)
        for key, value in tensors.items():
            module, _, name = key.partition(".")
            if not value.equal(again[module][name]):
                raise CheckpointError(f"{folder}: {key} was not written as it is", "", "Try again.")
        for path in sorted(temp.rglob("*")):
            if path.is_dir():
                fs.fsync_dir(path)
            else:
                shutil.copymode(temp / CARD, path)  # some come with none for others
                with path.open("rb+") as file:
                    fs.fsync(file.fileno())
        fs.fsync_dir(temp)
        fs.replace(temp, folder)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(temp)
        raise
    with contextlib.suppress(OSError):  # all of it is there; its name is kept a little later
        fs.fsync_dir(folder.parent)


def _write_language_model(qwen: QwenHybridPrompt, folder: Path, offline: bool) -> dict[str, Any]:
    """Its files, where it is to have some; what config.json says of it, with `settings` of the
    system that is built from them."""
    found: dict[str, Any] = {"trained": qwen.train_mode, "name": Path(qwen.name).name}
    if is_reference(qwen):
        found |= {"name": qwen.name, "revision": qwen.revision}
        settings = {"qwen_model": qwen.name, "qwen_train": "frozen"}
        return {**found, **language_model_facts(qwen), "settings": settings}
    qwen.merge_adapters()
    backbone: Any = qwen.backbone
    facts = language_model_facts(qwen)
    # A frozen one goes back to the dtype it came in, so that nothing is rounded or blown up.
    held = next(backbone.parameters()).dtype
    dtype = qwen.saved_dtype if qwen.train_mode == "frozen" else held
    tokenizer = tokenizer_of(qwen.name, offline=offline, revision=qwen.revision)
    # A copy, as its buffers would stay rounded.
    saved = backbone if dtype == held else copy.deepcopy(backbone).to(dtype)
    save_folder(saved, tokenizer, folder)
    again = dict(load_folder(folder, str(folder))[0].named_parameters())
    for name, value in backbone.named_parameters():
        if name not in again or not value.cpu().equal(again[name].to(held)):
            raise CheckpointError(f"{folder}: {name} was not written as it is", "", "Try again.")
    settings = {"qwen_model": LANGUAGE_MODEL, "qwen_train": qwen.train_mode}
    return {**found, "revision": None, **facts, "settings": settings}


def sealed(config: dict[str, Any]) -> str:
    """SHA-256 of what config.json says, but for this."""
    text = json.dumps({k: v for k, v in config.items() if k != "sealed"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_export(folder: Path) -> dict[str, Any]:
    """An export in the form of a checkpoint's payload: the modules' states by name (of the language
    model none), `extra`, `frozen`; and `language_model` and `revision`, which no checkpoint has.

    Raises CorruptCheckpointError where a file is damaged or not of this format.
    """
    fix = "Export the run again."
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CorruptCheckpointError(
            f"{folder}: no exported model", f"its {CONFIG} is not one of export.py", fix
        )
    if config.get("version") != VERSION:
        raise CorruptCheckpointError(
            f"{folder}: an export of format {config.get('version')}",
            f"this version reads format {VERSION}",
            fix,
        )
    missing = [key for key in NEEDED if key not in config]
    kinds = {"system": dict, "language_model": dict, "task_ids": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(config.get(key, kind()), kind)]
    if missing or wrong:
        why = f"its {CONFIG} lacks '{missing[0]}'" if missing else f"'{wrong[0]}' in its {CONFIG}"
        raise CorruptCheckpointError(f"{folder}: cannot be read", why, fix)
    if config["sealed"] != sealed(config):
        raise CorruptCheckpointError(f"{folder / CONFIG}: differs from what was written", "", fix)
    weights = folder / WEIGHTS
    try:
        content = weights.read_bytes()  # not mapped: a file that shrinks then ends the process
        if hashlib.sha256(content).hexdigest() != config["sha256"]:
            raise CorruptCheckpointError(f"{weights}: differs from what was written", "", fix)
        tensors = load(content)
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{weights}: cannot be read", str(error), fix) from error
    payload: dict[str, Any] = {module: {} for module in MODULES}
    for key, value in tensors.items():
        module, _, name = key.partition(".")
        payload.setdefault(module, {})[name] = value
    about = config["language_model"]
    system = dict(config["system"])
    if system.get("qwen_model") == LANGUAGE_MODEL:
        system["qwen_model"] = str((folder / LANGUAGE_MODEL).absolute())
    frozen = about.get("trained") == "frozen"
    reference = {"id": about.get("name"), "revision": about.get("revision") or ""}
    return {
        **payload,
        "extra": {
            "system": system,
            "task_ids": config["task_ids"],
            "average_names": [],
            "average": {"average": [], "applied": config["averaged"]},
            "progress": {"total": config["batches"]},
        },
        "frozen": {"qwen": {**reference, "sha256": about.get("sha256")}} if frozen else {},
        "language_model": about,
        "revision": about.get("revision"),
    }
