"""export.py end to end: what is written, that it predicts as the run does, and what fails there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import differing, make_task
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

import evaluation
import export
import exported_model
import language_model
import predict
import trained_model
from arc_system import SystemConfig, build_system
from batches import View, evaluation_batches
from dataset_arc import Pair, Task
from persistence.checkpoint_file import MODULES
from persistence.files import FileSystem
from persistence.restoring import module_state


def call(script: Any, *argv: Any) -> int:
    """main's exit code; argparse leaves by SystemExit."""
    try:
        return script.main([*map(str, argv)])
    except SystemExit as left:
        return int(left.code or 0)


@pytest.fixture(scope="module")
def exported(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the reference run; read it, do not change it."""
    out = tmp_path_factory.mktemp("exports") / "model"
    assert call(export, reference.folder, "--out", out, "--quiet") == 0
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """An export to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def states(model: trained_model.Model) -> dict[str, Any]:
    return {name: dict(module_state(part)) for name, part in model.system.modules().items()}


def submission_of(model: Path, data: Path, out: Path, *flags: Any) -> bytes:
    flags = ("--data", data, "--out", out, "--device", "cpu", *flags)
    assert call(predict, model, *flags) == 0
    return out.read_bytes()


def test_an_export_answers_as_its_run_bit_for_bit_and_without_it(
    reference: Any, exported: Path, tasks_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Breaks: weights that are not the averaged ones, a module left out, another seed, task tokens
    in another order, or a pickle that is read."""
    flags = ("--views", 2)
    expected = submission_of(reference.folder, tasks_file, tmp_path / "run.json", *flags)
    original = trained_model.load_model(reference.folder)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", refuse)
    moved = Path(shutil.copytree(exported, tmp_path / "elsewhere"))
    assert submission_of(moved, tasks_file, tmp_path / "export.json", *flags) == expected
    model = trained_model.load_model(moved)
    assert differing(states(model), states(original)) == []
    assert model.averaged
    assert (model.seed, model.n_batches) == (original.seed, original.n_batches)
    assert model.task_index == original.task_index
    assert {path.name for path in exported.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "language_model",
    }  # fmt: skip
    suffixes = {path.suffix for path in exported.rglob("*") if path.is_file()}
    assert suffixes == {".md", ".json", ".safetensors"}


def test_the_weights_are_the_averaged_ones(reference: Any, exported: Path) -> None:
    file = reference.checkpoint()
    found = load_file(exported / "model.safetensors")
    names, values = file["extra"]["average_names"], file["extra"]["average"]["average"]
    moved = 0
    for name, value in zip(names, values, strict=True):
        module, _, key = name.partition(".")
        if not key.startswith("backbone."):
            assert torch.equal(found[name], value), name
            moved += not torch.equal(value, file[module][key])
    assert moved > 20  # else the test could not tell them from the last weights


def test_the_language_model_is_a_folder_of_its_own(exported: Path) -> None:
    """Breaks: a folder that transformers cannot read by itself, or another alphabet."""
    from transformers import AutoModel, PreTrainedTokenizerFast

    folder = exported / "language_model"
    backbone = AutoModel.from_pretrained(folder, local_files_only=True)
    own = dict(trained_model.load_model(exported).system.qwen.backbone.named_parameters())
    assert {name for name, _ in backbone.named_parameters()} == set(own)
    assert all(torch.equal(p, own[name]) for name, p in backbone.named_parameters())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    assert tokenizer.decode(tokenizer.encode("I12\nO3")) == "I12\nO3"


def small_model(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    backbone, tokenizer = language_model.build_tiny(3)
    language_model.save_folder(backbone.to(dtype), tokenizer, folder)
    return folder


def stirred(**options: Any) -> Any:
    """A small system of which no trained weight is at its start; what is frozen stays as it is."""
    config = SystemConfig(width=32, heads=2, n_tasks=2, **options)
    system = build_system(config, "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in system.modules().values():
            for p in module.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return system.train(False)


ABOUT = {"task_ids": ["t0_flip", "t1_same"], "batches": 3, "averaged": False}


def written(system: Any, out: Path) -> Any:
    """The system that an export of this one gives."""
    exported_model.write_export(out, system, dict(ABOUT), "card")
    return trained_model.load_model(out).system


def test_a_folder_above_that_cannot_be_flushed_is_no_failed_export(tmp_path: Path) -> None:
    """Breaks: a whole export that is said to have failed, and is refused the next time."""
    asked: list[Path] = []

    class Unflushed(FileSystem):
        def fsync_dir(self, path: Path) -> None:
            asked.append(path)
            if path == tmp_path:
                raise OSError(5, "Input/output error")
            super().fsync_dir(path)

    system, out = stirred(), tmp_path / "model"
    exported_model.write_export(out, system, dict(ABOUT), "card", fs=Unflushed())
    assert asked[-1] == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert trained_model.load_model(out).n_batches == ABOUT["batches"]


def answers_of(system: Any) -> list[Any]:
    """Size, colours and confidences, as they are computed, of six queries."""
    tasks = {name: make_task(name) for name in ("flip", "same", "double")}
    made = [
        Task(name, pairs_of(raw["train"]), pairs_of(raw["test"])) for name, raw in tasks.items()
    ]
    found: list[Any] = []
    for batch in evaluation_batches(evaluation.without_outputs(made), View(), batch_size=4):
        with torch.no_grad():
            output = system.predict(batch, torch.Generator().manual_seed(1)).before
        found += [output.logits, output.size_logits, output.confidence]
    return found


def pairs_of(raw: Any) -> Any:
    return tuple(Pair(*(np.array(pair[k], np.uint8) for k in ("input", "output"))) for pair in raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_model_from_a_folder_is_copied_as_it_came(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Breaks: a frozen model rounded, blown up or left behind."""
    source = small_model(tmp_path / "small", dtype)
    system = stirred(qwen_model=str(source), qwen_train="auto")
    frozen = stirred(qwen_model=str(source), qwen_train="frozen")
    assert system.qwen.train_mode == "full"  # small enough
    for number, one in enumerate((system, frozen)):
        again = written(one, tmp_path / f"out{number}")
        assert again.qwen.train_mode == one.qwen.train_mode
        assert differing(answers_of(again), answers_of(one)) == []
        size = (tmp_path / f"out{number}" / "language_model" / "model.safetensors").stat().st_size
        assert size < 1.1 * 92_000 * (4 if one is system else dtype.itemsize)
    assert frozen.qwen.saved_dtype == dtype
    licence = export.card(trained_model.Model(frozen, {}, tmp_path / "m.pt", 3, False, []), "x")
    assert "small: its own licence" in licence
    assert str(tmp_path) not in licence


def test_lora_is_merged(tmp_path: Path) -> None:
    """Breaks: adapters left out, or an export that still needs peft."""
    pytest.importorskip("peft")
    source = small_model(tmp_path / "small")
    system = stirred(qwen_model=str(source), qwen_train="lora")
    ids = torch.arange(13)[None]
    with torch.no_grad():
        expected = system.qwen.backbone(ids).last_hidden_state
        plain = language_model.load_folder(source, "small")[0](ids).last_hidden_state
    before = answers_of(system)
    assert export.notes_on(system.qwen) == [
        "LoRA is merged into the language model: the same up to rounding"
    ]
    again = written(system, tmp_path / "out")
    with torch.no_grad():
        found = again.qwen.backbone(ids).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)  # the adapters do something
    assert again.qwen.train_mode == "full"
    assert not any("lora" in name for name in again.qwen.state_dict())
    for a, b in zip(answers_of(again), before, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_a_frozen_model_of_the_hub_is_named_and_not_copied(
    tmp_path: Path, monkeypatch: Any, capsys: Any, tasks_file: Path
) -> None:
    """Breaks: gigabytes copied, a revision not asked for, or another model taken without a word."""
    source = small_model(tmp_path / "small")
    asked: list[Any] = []

    def locate(name: str, *, offline: bool = False, revision: str | None = None) -> Any:
        asked.append((name, revision))
        return source, "0123abcd"

    monkeypatch.setattr(language_model, "locate_model", locate)
    system = stirred(qwen_model="owner/small", qwen_train="frozen")
    (note,) = export.notes_on(system.qwen)
    assert "not copied: owner/small at revision 0123abcd" in note
    out = tmp_path / "out"
    asked.clear()
    again = written(system, out)
    assert asked == [("owner/small", "0123abcd")]
    assert not (out / "language_model").exists()
    assert differing(answers_of(again), answers_of(system)) == []
    weights = load((source / "model.safetensors").read_bytes())
    weights["norm.weight"][0] += 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert call(predict, out, "--data", tasks_file, "--device", "cpu") == 3
    assert "not the one that was exported (sha256 differs)" in capsys.readouterr().err


# ---------------------------------------------------------------- the card


def test_the_card_has_the_run_s_own_figures(reference: Any, exported: Path) -> None:
    results = json.loads((reference.folder / "results.json").read_text())
    card = (exported / "README.md").read_text()
    n, one, two = (results[key] for key in ("n", "exact_at_1", "exact_at_2"))
    assert f"| final | {n} | {one} | {two} | {100 * two / n:.1f}% |" in card
    assert f"| Minutes, evaluation included | {results['minutes']:.1f} |" in card
    assert f"| Batches | {results['batch']} |" in card
    assert f"| Seed | {results['seed']} |" in card
    assert f"{results['views_done']:g} of {results['views']} views voted" in card
    assert "| Data | training.json, 6 tasks, demonstrations alone |" in card
    assert "license: mit" in card
    assert "Transductive" in card
    assert str(reference.folder.parent) not in card  # nor any other path of this machine


def made_card(model: Any, folder: Path, results: Any) -> str:
    (folder / "results.json").write_text(json.dumps(results))
    return export.card(model, "name")


def test_the_card_says_whose_the_figures_are(reference: Any, tmp_path: Path) -> None:
    """Breaks: the score of other weights, of a run that has none, or a guess of what earns it."""
    model = trained_model.load_model(reference.folder)
    results = json.loads((reference.folder / "results.json").read_text())
    model.path = tmp_path / "best_model.pt"
    assert "no final evaluation beside the weights" in export.card(model, "name")
    text = made_card(model, tmp_path, results | {"batch": 1})
    assert f"after batch 1, these are after {model.n_batches}" in text
    assert "| final |" not in text
    assert "Minutes" not in text
    alone = {
        "network": {"exact_at_1": 1, "exact_at_2": 2},
        "hypotheses": {"exact_at_1": 3, "exact_at_2": 5},
    }
    text = made_card(model, tmp_path, results | {"alone": alone})
    assert "| network alone | 6 | 1 | 2 | 33.3% |" in text
    assert "Most of the score comes from rules." in text
    cut = {"alone": {"network": alone["network"]}, "network_queries": 4}
    text = made_card(model, tmp_path, results | cut)
    assert "| network alone | 4 that it reached (of 6) | 1 | 2 | 50.0% |" in text
    alone["network"]["exact_at_2"] = 6
    text = made_card(model, tmp_path, results | {"alone": alone})
    assert "Most of the score comes from rules." not in text


ODD: tuple[Any, ...] = (
    [],
    {},
    "x",
    None,
    -1,
    10**400,
    {"network": 1},
    {"network": {"n": "x"}},
    True,
)


def test_a_card_of_odd_results_says_what_is_unknown(reference: Any, tmp_path: Path) -> None:
    """Breaks: a traceback for a results.json that lacks a key, or holds another kind of value."""
    model = trained_model.load_model(reference.folder)
    results = json.loads((reference.folder / "results.json").read_text())
    config = json.loads((reference.folder / "config.json").read_text())
    model.path = tmp_path / "best_model.pt"
    bare = {"batch": model.n_batches}
    unknown = "Unknown: the run's results.json holds no score that can be read."
    assert unknown in made_card(model, tmp_path, bare)
    assert unknown in made_card(model, tmp_path, results | {"n": "many"})
    for key in results:
        made_card(model, tmp_path, {k: v for k, v in results.items() if k != key})
        for value in ODD:
            made_card(model, tmp_path, results | {key: value})
    for key in config:
        for value in ODD:
            (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
            assert "| final | 6 |" in made_card(model, tmp_path, results)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "results.json").write_text("{")
    assert "no final evaluation beside the weights" in export.card(model, "name")


# ---------------------------------------------------------------- what fails


def edit(change: Callable[[dict[str, Any]], object], seal: bool = True) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        if seal:
            config["sealed"] = exported_model.sealed(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip("model.safetensors"), "model.safetensors: differs from what was written"),
        (flip("language_model/model.safetensors"), "not the one that was exported"),
        (lambda f: (f / "config.json").write_text("{"), "its config.json is not one of export.py"),
        (lambda f: (f / "config.json").write_text("[]"), "its config.json is not one of export.py"),
        (edit(lambda c: c.update(format="x")), "its config.json is not one of export.py"),
        (edit(lambda c: c.update(version=9)), "this version reads format 1"),
        (edit(lambda c: c.pop("task_ids")), "lacks 'task_ids'"),
        (edit(lambda c: c.update(task_ids=[]), False), "config.json: differs from what was"),
        (edit(lambda c: c["system"].update(policy="of"), False), "differs from what was written"),
        (edit(lambda c: c.update(task_ids=3)), "'task_ids' in its config.json"),
        (edit(lambda c: c.update(system=[])), "'system' in its config.json"),
        (edit(lambda c: c.update(language_model=None)), "'language_model' in its config.json"),
        (edit(lambda c: c["system"].update(width=10**6)), "do not belong together"),
        (edit(lambda c: c["system"].update(wings=2)), "this version does not know"),
        (edit(lambda c: c["system"].pop("n_tasks")), "does not fit"),
        (edit(lambda c: c["language_model"].update(symbol_ids=[1])), "symbol_ids differs"),
        (lambda f: shutil.rmtree(f / "language_model"), "language_model"),
        (lambda f: (f / "language_model" / "config.json").unlink(), "no config.json"),
    ],
)  # fmt: skip
def test_a_damaged_export_is_one_line_and_exit_3(
    copy: Path, tasks_file: Path, capsys: Any, damage: Any, says: str
) -> None:
    damage(copy)
    assert call(predict, copy, "--data", tasks_file, "--device", "cpu") == 3
    printed = capsys.readouterr()
    assert says in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert "Traceback" not in printed.err


def test_weights_that_are_no_safetensors_or_lack_one(
    copy: Path, tasks_file: Path, capsys: Any
) -> None:
    """Breaks: a file whose hash is right and whose content is not."""
    weights = copy / "model.safetensors"
    tensors = load(weights.read_bytes())
    missing = next(name for name in tensors if name.startswith("agent."))
    del tensors[missing]
    for content, says in ((b"no safetensors", "cannot be read"), (save(tensors), missing)):
        weights.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        config = json.loads((copy / "config.json").read_text())
        config |= {"sha256": digest}
        config["sealed"] = exported_model.sealed(config)
        (copy / "config.json").write_text(json.dumps(config))
        assert call(predict, copy, "--data", tasks_file, "--device", "cpu") == 3
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("where", ["weights", "language model", "config", "last"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(
    reference: Any, tmp_path: Path, monkeypatch: Any, capsys: Any, where: str, error: BaseException
) -> None:
    """Breaks: half a folder, or a temporary one beside it."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    places: dict[str, tuple[Any, str]] = {
        "weights": (exported_model, "save_file"),
        "language model": (exported_model, "save_folder"),
        "config": (exported_model, "atomic_write_json"),
        "last": (FileSystem, "replace"),
    }
    monkeypatch.setattr(*places[where], fail)
    code = call(export, reference.folder, "--out", tmp_path / "out")
    printed = capsys.readouterr()
    if isinstance(error, OSError):
        assert code == 3
        assert "No space left on device" in printed.err
    else:
        assert code == 130
    assert len(printed.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_that_the_disk_gives_back_otherwise_are_no_export(
    reference: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Breaks: a folder handed out that was never read back."""

    def wrong(tensors: dict[str, Any], *args: Any, **options: Any) -> None:
        name = next(k for k, v in tensors.items() if v.is_floating_point() and v.numel())
        save_file(tensors | {name: tensors[name] + 1}, *args, **options)

    monkeypatch.setattr(exported_model, "save_file", wrong)
    assert call(export, reference.folder, "--out", tmp_path / "out") == 3
    assert "was not written as it is" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(
    reference: Any, exported: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Breaks: a folder overwritten, a wrong flag found late, an error of several lines."""
    run, there = reference.folder, tmp_path / "there"
    there.mkdir()
    for argv, code, says in (
        ([run], 2, "--out"),
        ([run, "--out", there], 2, "is there already"),
        ([run, "--out", tmp_path / "no" / "folder"], 2, "does not exist"),
        ([run, "--out", tmp_path / "out", "--checkpoint", "x"], 2, "use latest, best"),
        ([run, "--out", tmp_path / "out", "--checkpoint", "99999"], 3, "no checkpoint 99999"),
        ([tmp_path / "none", "--out", tmp_path / "out"], 3, "no such run"),
        ([exported, "--out", tmp_path / "out"], 2, "is an export already"),
    ):
        assert call(export, *argv) == code
        printed = capsys.readouterr()
        assert says in printed.err
        assert len(printed.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [there]
    assert call(predict, exported, "--checkpoint", "best") == 2
    assert "is an export, which holds one model" in capsys.readouterr().err
    with pytest.raises(trained_model.UserError, match="holds no optimizer"):
        trained_model.load_modules(exported)


def test_the_run_is_not_written_to(reference: Any, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, Any]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}

    before = content(reference.folder)
    assert call(export, reference.folder, "--out", tmp_path / "out", "--quiet") == 0
    assert content(reference.folder) == before


def test_every_module_is_in_the_file(exported: Path) -> None:
    names = {key.split(".")[0] for key in load_file(exported / "model.safetensors")}
    assert names == set(MODULES)


def test_a_disk_that_is_full_for_the_weights(
    reference: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Breaks: safetensors has an error of its own for it."""

    def full(*_: Any, **__: Any) -> Any:
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(exported_model, "save_file", full)
    assert call(export, reference.folder, "--out", tmp_path / "out") == 3
    printed = capsys.readouterr().err
    assert "cannot be written" in printed
    assert len(printed.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
