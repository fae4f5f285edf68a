"""From live objects to what is saved of them and back, and how exact a resume is.

States of modules and optimizer, random numbers, settings, the resume's verdict. Writes no file.
    from persistence.restoring import apply_state, collect_state, environment
"""

from __future__ import annotations

import platform
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persistence.checkpoint_file import MODULES, Loaded, SixObjects
from persistence.files import MismatchError, PersistenceError, version_of_package
from persistence.state_tree import check_saveable, is_tensor, iter_leaves, same_leaf

# Settings of torch's optimizers that say how, not what, is computed, and come and go by version.
OPTIMIZER_SWITCHES = frozenset(
    {"capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize"}
)

SETTINGS_FIX = (
    "Take the model settings of that run and the version of the program that trained it, or start "
    "a new run."
)


# --------------------------------------------------------------------------------------------------
# States of live objects, out and in
# --------------------------------------------------------------------------------------------------
def module_state(module: Any) -> Any:
    """What is saved of a module: `persistent_state_dict()` if it has one, else `state_dict()`."""
    if module is None:
        return None
    if hasattr(module, "persistent_state_dict"):
        return module.persistent_state_dict()
    return module.state_dict()


def frozen_reference_of(module: Any) -> dict[str, Any] | None:
    """What identifies the weights that a module keeps by reference, not in its state; or None."""
    reference = module.frozen_reference() if hasattr(module, "frozen_reference") else None
    return None if reference is None else dict(reference)


def collect_state(objects: SixObjects, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """{module: state, optimizer: state, extra: ..., frozen: ...}, checked to be loadable.

    The tensors are the live ones. Raises PersistenceError for what no checkpoint can hold.
    """
    named = objects._asdict()
    state: dict[str, Any] = {}
    frozen = {}
    for name in MODULES:
        state[name] = module_state(named[name])
        reference = frozen_reference_of(named[name])
        if reference is not None:
            frozen[name] = reference
    optimizer = objects.optimizer
    state["optimizer"] = None if optimizer is None else optimizer.state_dict()
    state["extra"] = {} if extra is None else dict(extra)
    state["frozen"] = frozen
    for name, value in state.items():
        check_saveable(value, name)
    return state


def metadata_of(loaded: Loaded, path: Path, source: str) -> dict[str, Any]:
    """What a load returns of a file beside what it did: everything but the six states."""
    left_out = (*MODULES, "optimizer", "sealed")
    metadata = {k: v for k, v in loaded.payload.items() if k not in left_out}
    metadata.setdefault("checkpoint_id", None)
    metadata.setdefault("extra", {})
    metadata |= {"path": str(path), "source": source}
    return metadata | {"notes": loaded.notes, "sha256": loaded.sha256}


def check_device(device: Any) -> None:
    """PersistenceError for a GPU that is not there."""
    wanted = torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise PersistenceError("device 'cuda' asked for", "there is no GPU", "Use device='cpu'.")


def _is_plain(module: Any) -> bool:
    """True if the module loads by name and shape alone, so that a mismatch can be foreseen."""
    return (
        isinstance(module, torch.nn.Module)
        and not hasattr(module, "load_persistent_state_dict")
        and type(module).load_state_dict is torch.nn.Module.load_state_dict
        and all(
            type(m)._load_from_state_dict is torch.nn.Module._load_from_state_dict
            and not m._load_state_dict_pre_hooks
            for m in module.modules()
        )
    )


def _shape_text(value: Any) -> str:
    return f"shape {list(value.shape)}" if is_tensor(value) else type(value).__name__


def _check_fit(name: str, module: Any, saved: Any, where: str) -> None:
    """Names and shapes of one module before anything is changed; a difference is an error."""
    if saved is None:
        raise MismatchError(
            f"{where} has no state for '{name}'", "it was saved as None", SETTINGS_FIX
        )
    if not _is_plain(module):
        return
    live = module.state_dict()
    for key, value in live.items():
        if key not in saved:
            raise MismatchError(
                f"{where} does not fit '{name}'",
                f"key '{name}.{key}': expected {_shape_text(value)}, found nothing",
                SETTINGS_FIX,
            )
        if key.endswith("_extra_state") or not is_tensor(value):
            continue
        if not is_tensor(saved[key]) or saved[key].shape != value.shape:
            raise MismatchError(
                f"{where} does not fit '{name}'",
                f"key '{name}.{key}': expected {_shape_text(value)}, "
                f"found {_shape_text(saved[key])}",
                SETTINGS_FIX,
            )
    unexpected = [k for k in saved if k not in live]
    if unexpected:
        raise MismatchError(
            f"{where} does not fit '{name}'",
            f"key '{name}.{unexpected[0]}': expected nothing, "
            f"found {_shape_text(saved[unexpected[0]])}",
            SETTINGS_FIX,
        )


def _check_optimizer_fit(optimizer: Any, saved: Any, where: str) -> None:
    fix = "Resume with the model and optimizer settings of that run."
    if saved is None:
        raise MismatchError(f"{where} has no state for 'optimizer'", "it was saved as None", fix)
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or "param_groups" not in saved:
        return
    live = [len(g["params"]) for g in groups]
    found = [len(g["params"]) for g in saved["param_groups"]]
    if live != found:
        raise MismatchError(
            f"{where} does not fit 'optimizer'",
            f"key 'optimizer.param_groups': expected {live} parameters per group, found {found}",
            fix,
        )
    live_names, found_names = (
        [g.get("name") for g in g_list] for g_list in (groups, saved["param_groups"])
    )
    if None not in (*live_names, *found_names) and live_names != found_names:
        raise MismatchError(
            f"{where} does not fit 'optimizer'",
            f"key 'optimizer.param_groups': expected {live_names}, found {found_names}",
            fix,
        )


def foreign_optimizer(optimizer: Any, saved: Any, where: str) -> str | None:
    """Why the saved state is not this optimizer's, or None: other groups, or other quantities."""
    try:
        _check_optimizer_fit(optimizer, saved, where)
    except MismatchError as e:
        return e.why
    defaults = set(getattr(optimizer, "defaults", ())) - OPTIMIZER_SWITCHES
    for group in saved.get("param_groups", ()):
        if missing := sorted(defaults - set(group)):
            return f"it was saved by another kind of optimizer, without '{missing[0]}'"
    return None


def apply_state(
    payload: Mapping[str, Any], objects: Mapping[str, Any], where: str, verify_live: bool = True
) -> list[str]:
    """Load a payload into live objects, then compare the live state with it bit by bit.

    Everything is checked before anything is changed. Returns the keys that were cast to another
    dtype; raises MismatchError if something does not fit or does not arrive as it was saved.
    """
    frozen = payload.get("frozen") or {}
    for name in MODULES:
        if objects.get(name) is not None:
            _check_fit(name, objects[name], payload[name], where)
            _check_frozen(name, frozen_reference_of(objects[name]), frozen.get(name), where)
    optimizer = objects.get("optimizer")
    if optimizer is not None:
        _check_optimizer_fit(optimizer, payload["optimizer"], where)
    for name in (*MODULES, "optimizer"):
        target = objects.get(name)
        if target is None:
            continue
        loader = getattr(target, "load_persistent_state_dict", None) or target.load_state_dict
        try:
            loader(payload[name])
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
            raise MismatchError(
                f"{where} does not fit '{name}'",
                f"{type(e).__name__}: {e}",
                SETTINGS_FIX,
            ) from e
    recast: list[str] = []
    if not verify_live:
        return recast
    for name in (*MODULES, "optimizer"):
        if objects.get(name) is None:
            continue
        live = dict(iter_leaves(module_state(objects[name]), name))
        for path, saved in iter_leaves(payload[name], name):
            now: Any = live.get(path)
            if same_leaf(now, saved):
                continue
            if is_tensor(now) and is_tensor(saved) and now.dtype != saved.dtype:
                recast.append(f"{path}: {saved.dtype} -> {now.dtype}")
                continue
            if not is_tensor(saved) and name != "optimizer":
                continue  # a module may keep counters that loading itself moves
            if not is_tensor(saved) and now == saved:
                continue  # list against tuple, int against float
            raise MismatchError(
                f"{where} was not restored as saved",
                f"key '{path}' differs in the live state after loading",
                "Report this: the module's load_state_dict does not restore what it saved.",
            )
    return recast


def _check_frozen(name: str, live: Any, saved: Any, where: str) -> None:
    """Weights kept by reference must be the same weights."""
    if live is None and saved is None:
        return
    if live is None or saved is None:
        raise MismatchError(
            f"{where} does not fit '{name}'",
            f"frozen weights: expected {live}, found {saved}",
            "Use the same --qwen_model and --qwen_train as that run.",
        )
    for field in ("sha256", "revision", "id"):
        if live.get(field) and saved.get(field):
            if live[field] != saved[field]:
                raise MismatchError(
                    f"{where} does not fit '{name}'",
                    f"frozen weights, {field}: expected {live[field]}, found {saved[field]}",
                    "Use the same --qwen_model, in the same revision, as that run.",
                )
            if field == "sha256":
                return  # the same bytes, wherever they came from


# --------------------------------------------------------------------------------------------------
# Random number states, configuration, environment, resume report
# --------------------------------------------------------------------------------------------------
def capture_rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's, torch's and every CUDA generator as tensors and ints."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": {
            "version": version,
            "words": torch.tensor(words, dtype=torch.int64),
            "gauss": gauss,
        },
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def restore_rng_state(state: Mapping[str, Any]) -> list[str]:
    """Put back what `capture_rng_state` took; the last act before the first batch.

    Returns what could not be restored (CUDA generators that this machine does not have).
    """
    try:
        python, legacy = state["python"], state["numpy"]
        words = tuple(int(w) for w in python["words"].tolist())
        keys = legacy["keys"].numpy().astype(np.uint32)
        random.setstate((python["version"], words, python["gauss"]))
        np.random.set_state(  # noqa: NPY002 - the legacy global state is what is being restored
            (legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"])
        )
        torch.set_rng_state(state["torch"].cpu())
        cuda = [t.cpu() for t in state["cuda"]]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise MismatchError("the saved random number state cannot be restored", str(e)) from e
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, one in enumerate(cuda[:have]):
        torch.cuda.set_rng_state(one, index)
    if len(cuda) == have:
        return []
    return [f"random number states of {len(cuda)} CUDA devices, {have} here"]


def environment() -> dict[str, Any]:
    """What decides whether the same arithmetic gives the same bits here."""
    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "transformers": version_of_package("transformers"),
        "cuda": str(torch.version.cuda),
        "gpus": gpus,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def resume_report(
    metadata: Mapping[str, Any],
    *,
    rng_missing: Iterable[str] = (),
    mismatches: Iterable[str] = (),
    changed: Iterable[str] = (),
    last_seen: tuple[int, int] | None = None,
    batches_per_epoch: int | None = None,
    batches_lost: int | None = None,
    current_environment: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """(verdict, one line) after a resume: EXACT, EQUIVALENT or DEGRADED, and why.

    `metadata` is what a load returned. `rng_missing` is what `restore_rng_state` returned (or a
    reason why it was not called), `mismatches` what trains otherwise from here on or is missing,
    `changed` what else is not as it was. `last_seen` is the (epoch, batch) that the log saw last,
    for the number of batches to repeat where `batches_lost` does not give it.
    """
    here = environment() if current_environment is None else current_environment
    saved = metadata.get("environment") or {}
    known = {k: saved.get(k, "not recorded") for k in here}
    other = [f"{k}: {known[k]} -> {here[k]}" for k in here if known[k] != here[k]]
    broken = [*metadata.get("cast", ()), *mismatches]
    hardware_moved = any(o.startswith(("gpus:", "cuda:")) for o in other)
    (other if hardware_moved else broken).extend(rng_missing)
    other.extend(changed)
    if broken:
        verdict, why = "DEGRADED", "; ".join([*broken, *other])
    elif other:
        verdict, why = "EQUIVALENT", "same data order, other " + "; ".join(other)
    else:
        verdict, why = "EXACT", "same state, same data order, same random numbers"
    epoch, batch = metadata["epoch"], metadata["batch"]
    line = f"Resume: {verdict} ({why}) | from {metadata.get('source', 'checkpoint')}"
    line += f" {metadata.get('checkpoint_id')}, epoch {epoch}, batch {batch}"
    if batches_lost is None and last_seen is not None:
        batches_lost = (last_seen[0] - epoch) * (batches_per_epoch or 0) + last_seen[1] - batch
    if batches_lost is not None:
        line += f" | batches lost: {max(0, batches_lost)}"
    skipped = metadata.get("skipped") or []
    line += f" | files skipped: {len(skipped)}"
    for item in skipped:
        line += f" [{item['file']}: {item['reason']}]"
    return verdict, line
