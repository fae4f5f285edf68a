"""The language model: which one, from where, its alphabet, loading and what fails there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import language_model
from grid_features import N_CONTROL
from language_model import ModelError
from qwen_hybrid_prompt import QwenHybridPrompt, build_qwen_prompt

ROOT = Path(language_model.__file__).parent
WIDTH = 24


def tiny(**settings: Any) -> QwenHybridPrompt:
    return build_qwen_prompt("tiny", **{"width": WIDTH, "n_control": N_CONTROL, **settings})


# ---- which model ---------------------------------------------------------------------------


def test_auto_model_and_auto_training() -> None:
    assert language_model.resolve_qwen_model("auto", "cpu")[0] == "tiny"
    assert language_model.resolve_qwen_model("auto", "cuda")[0] == "Qwen/Qwen2.5-1.5B"
    assert language_model.resolve_qwen_model("some/model", "cuda")[0] == "some/model"
    assert language_model.resolve_train_mode("auto", 90_000, "cpu") == ("full", None)
    mode, reason = language_model.resolve_train_mode("auto", 1_500_000_000, "cpu")
    assert mode == "frozen"
    assert reason
    assert tiny(train="auto").train_mode == "full"
    assert "tiny, 0.05 M parameters, full, float32" in tiny().description()
    with pytest.raises(ValueError, match="train must be one of"):
        language_model.resolve_train_mode("no", 1, "cpu")
    with pytest.raises(ValueError, match="mode must be one of"):
        tiny(mode="no")


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders by save_pretrained: ``bare`` without tokenizer, ``chars``, ``bytes``, ``lm_head``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

    root = tmp_path_factory.mktemp("models")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({text: n for n, text in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        for name, kind in (("bare", Qwen2Model), ("chars", Qwen2Model), ("bytes", Qwen2Model)):
            kind(config).save_pretrained(root / name)
        Qwen2ForCausalLM(config).save_pretrained(root / "lm_head")
    language_model.character_tokenizer().save_pretrained(root / "chars")
    for name in ("bytes", "lm_head"):
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ["bare", "chars", "bytes", "lm_head"])
def test_saved_folder_loads_and_trains(saved_models: Path, name: str, whole_batch: Any) -> None:
    from safetensors.torch import load_file

    folder = saved_models / name
    state = torch.random.get_rng_state()
    module = build_qwen_prompt(str(folder), width=WIDTH, n_control=N_CONTROL, offline=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = load_file(folder / "model.safetensors")
    saved = next(value for key, value in weights.items() if key.endswith("embed_tokens.weight"))
    assert torch.equal(module.state_dict()["backbone.embed_tokens.weight"], saved)
    tokens = module(whole_batch).tokens
    assert torch.equal(tokens, module(whole_batch).tokens), "dropout is off"
    (tokens * torch.linspace(-1, 1, tokens.numel()).reshape(tokens.shape).sin()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    noted = any("no tokenizer" in note for note in module.notes)
    assert noted == (name == "bare")
    if name in ("bytes", "lm_head"):
        ids = module.table.ids[:13]
        assert len(set(module.table.ids)) == language_model.N_SYMBOLS
        from transformers import AutoTokenizer

        assert AutoTokenizer.from_pretrained(folder).decode(list(ids)) == "0123456789\nIO"


def test_tiny_can_be_saved_and_loaded_by_folder(tmp_path: Path, whole_batch: Any) -> None:
    module = tiny()
    module.backbone.save_pretrained(tmp_path)  # type: ignore[operator]
    language_model.character_tokenizer().save_pretrained(tmp_path)
    again = build_qwen_prompt(str(tmp_path), width=WIDTH, n_control=N_CONTROL)
    assert again.table == module.table
    assert torch.equal(again(whole_batch).tokens, module(whole_batch).tokens)


def test_spare_ids_are_noted_and_missing_digits_are_an_error() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def word_level(texts: str) -> PreTrainedTokenizerFast:
        vocabulary = {text: number for number, text in enumerate(texts)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)))

    table = language_model.symbol_table(word_level("0123456789;"), 20)
    assert table.ids[:11] == tuple(range(11))
    assert table.texts[language_model.ROW_END] == ";"
    assert len(set(table.ids)) == language_model.N_SYMBOLS
    assert max(table.ids) < 20
    assert [note for note in table.notes if "input mark" in note]
    with pytest.raises(ModelError, match="no single token for the digit 9"):
        language_model.symbol_table(word_level("012345678;"), 20)
    with pytest.raises(ModelError, match="has 13 tokens but the grid alphabet needs 14"):
        language_model.symbol_table(None, 13)


def test_unusable_folders_and_names(saved_models: Path, tmp_path: Path) -> None:
    build: dict[str, Any] = {"width": WIDTH, "n_control": N_CONTROL}
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        build_qwen_prompt(str(tmp_path), **build)
    for name in ("tinny", "/no/such/folder", "./here", "a/b/c"):
        with pytest.raises(ModelError, match="neither 'auto', 'tiny', an existing folder nor"):
            build_qwen_prompt(name, **build)
    (tmp_path / "config.json").write_bytes((saved_models / "bare" / "config.json").read_bytes())
    (tmp_path / "vocab.txt").write_text("its weights are lost\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        build_qwen_prompt(str(tmp_path), **build)
    (tmp_path / "vocab.txt").unlink()
    from safetensors.torch import load_file, save_file

    weights = load_file(saved_models / "bare" / "model.safetensors")
    weights.pop("norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not in its files, the first norm\.weight"):
        build_qwen_prompt(str(tmp_path), **build)


def test_a_folder_with_a_config_alone_gives_random_weights_and_says_so(
    saved_models: Path, tmp_path: Path, whole_batch: Any
) -> None:
    """For measuring speed and memory of a model that cannot be downloaded."""
    (tmp_path / "config.json").write_bytes((saved_models / "bare" / "config.json").read_bytes())
    modules = [build_qwen_prompt(str(tmp_path), width=WIDTH, n_control=N_CONTROL) for _ in "ab"]
    assert all("RANDOM WEIGHTS" in module.description() for module in modules)
    pairs = zip(modules[0].parameters(), modules[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.isfinite(modules[0](whole_batch).tokens).all()


WAYS_OUT = ("--qwen_model tiny", "--qwen_model /path/to/folder", "--offline")


def load_in_new_process(tmp_path: Path, offline: bool, **environment: str) -> tuple[str, float]:
    """Message and seconds of a failing load of the real hub id, in a process of its own; imports,
    which a busy machine draws out, are not counted."""
    program = textwrap.dedent(f"""
        import time
        import huggingface_hub, transformers
        from language_model import ModelError
        from qwen_hybrid_prompt import build_qwen_prompt
        start = time.monotonic()
        try:
            build_qwen_prompt("Qwen/Qwen2.5-1.5B", width=8, n_control=2, offline={offline})
        except ModelError as error:
            print(error)
            print(time.monotonic() - start)
    """)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    return lines[0], float(lines[1])


def test_offline_hub_id_names_three_ways_out(tmp_path: Path) -> None:
    message, seconds = load_in_new_process(tmp_path, offline=True)
    assert "Qwen/Qwen2.5-1.5B is not in the local cache" in message
    assert all(way in message for way in WAYS_OUT)
    assert seconds < 10


def test_refused_hub_fails_fast(tmp_path: Path) -> None:
    message, seconds = load_in_new_process(
        tmp_path, offline=False, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DOWNLOAD_TIMEOUT="60"
    )
    assert "out of reach" in message
    assert all(way in message for way in WAYS_OUT)
    assert seconds < 10


def test_silent_hub_fails_within_the_deadline(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, never answers
        port = server.getsockname()[1]
        message, seconds = load_in_new_process(
            tmp_path, offline=False, HF_ENDPOINT=f"http://127.0.0.1:{port}"
        )
    assert "out of reach" in message
    assert all(way in message for way in WAYS_OUT)
    assert seconds < 10


def test_deadline_holds_even_if_name_resolution_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def hang(*_: Any, **__: Any) -> None:
        time.sleep(3)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", hang)
    monkeypatch.setattr(language_model, "PROBE_TIMEOUT_S", 0.2)
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"no answer within 0\.2 s"):
        language_model.locate_model("nobody/has-this-model")
    assert time.monotonic() - start < 2


def test_complete_cache_is_used_and_an_incomplete_one_is_not(
    saved_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.mkdir()
    for file in (saved_models / "chars").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    whole = huggingface_hub.snapshot_download

    def from_this_cache(*args: Any, **settings: Any) -> str:
        return whole(*args, **settings, cache_dir=tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_this_cache)
    module = build_qwen_prompt(
        "some/model", width=WIDTH, n_control=N_CONTROL, offline=True, train="frozen"
    )
    reference = module.frozen_reference()
    assert reference is not None
    assert (reference["id"], reference["revision"]) == ("some/model", commit)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        language_model.locate_model("some/model", offline=True)


# ---- what is chosen, and what refuses ------------------------------------------------------


def test_a_t4_is_asked_for_bfloat16_without_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: asking as torch asks by default, to which a T4 says yes."""
    for native in (False, True):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: native or including_emulation,
        )
        expected = torch.bfloat16 if native else torch.float32
        for mode in ("lora", "frozen"):
            assert language_model.weight_dtype(mode, "cuda") == expected
            assert language_model.weight_dtype(mode, "cpu") == torch.float32
        assert language_model.weight_dtype("full", "cuda") == torch.float32


def test_a_small_model_is_trained_in_full_on_a_gpu_and_a_large_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(language_model, "memory_of", lambda device: 24 * 10**9)
    monkeypatch.setattr(language_model, "lora_trouble", lambda: None)
    chosen = {n: language_model.resolve_train_mode("auto", n, "cuda") for n in (10**8, 10**9)}
    assert {n: mode for n, (mode, _) in chosen.items()} == {10**8: "full", 10**9: "lora"}
    assert chosen[10**8][1] == (
        "full, chosen as it fits: full training takes 2.2 GB, without what a batch needs, and this "
        "GPU has 24.0 GB"
    )


def test_activations_are_recomputed_for_what_is_large_and_trained_on_a_gpu() -> None:
    n = language_model.CHECKPOINTING_FROM
    asked = [("full", n, "cuda"), ("lora", n, "cuda:1"), ("full", n - 1, "cuda"),
             ("frozen", n, "cuda"), ("full", n, "cpu")]  # fmt: skip
    assert [language_model.recomputes(*one) for one in asked] == [True, True, False, False, False]
    recomputed = language_model.load_language_model("tiny", gradient_checkpointing=True)
    assert any("recomputed in the backward pass" in note for note in recomputed.notes)
    assert language_model.load_language_model("tiny").notes == ()


def test_an_old_torchao_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: peft's own ImportError, out of the middle of a library, as on Colab."""
    pytest.importorskip("peft")
    from peft import import_utils

    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("")
    info = tmp_path / "torchao-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_utils.is_torchao_available.cache_clear()
    try:
        with pytest.raises(ModelError, match=r"0\.10\.0.*pip uninstall torchao") as failed:
            tiny(train="lora")
    finally:
        import_utils.is_torchao_available.cache_clear()
    assert "\n" not in str(failed.value)
    assert "--qwen_train full or frozen" in str(failed.value)


def test_frozen_weights_are_the_same_ones_in_either_precision(tmp_path: Path) -> None:
    """A run that begins on an H100 (bfloat16) goes on on a T4 (float32). Breaks: an identity that
    hangs on how the weights are held."""
    backbone, tokenizer = language_model.build_tiny(3)
    backbone.to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"width": WIDTH, "n_control": N_CONTROL, "train": "frozen"}
    held = [
        build_qwen_prompt(str(tmp_path), dtype=dtype, **settings)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    dtypes = [next(module.backbone.parameters()).dtype for module in held]
    assert dtypes == [torch.float32, torch.bfloat16]
    assert held[0].frozen_reference() == held[1].frozen_reference()
    with torch.no_grad():
        next(held[1].backbone.parameters())[0, 0] += 1
    held[1]._frozen_sha256 = None
    assert held[0].frozen_reference() != held[1].frozen_reference()


def test_a_config_is_had_without_the_weights(
    saved_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks: a dry run that downloads or asks for more than config.json."""
    import huggingface_hub

    asked: list[tuple[Any, ...]] = []

    def download(name: str, file: str, **settings: Any) -> str:
        asked.append((name, file, settings.get("local_files_only", False)))
        if settings.get("local_files_only"):
            raise OSError("not in the cache")
        (tmp_path / "config.json").write_bytes((saved_models / "chars/config.json").read_bytes())
        return str(tmp_path / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    loaded = language_model.load_language_model("some/model", weights=False)
    assert asked == [("some/model", "config.json", True), ("some/model", "config.json", False)]
    assert all(p.is_meta for p in loaded.backbone.parameters())
    asked.clear()
    with pytest.raises(ModelError, match="--qwen_model tiny"):
        language_model.load_language_model("some/model", weights=False, offline=True)
    assert len(asked) == 1
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no model can be built from its config\.json"):
        language_model.load_language_model(str(tmp_path), weights=False)


# ---- through the real script ---------------------------------------------------------------

BRIEF = ("--max_batches", 2, "--val_pairs", 1, "--eval_views", 1, "--planning_steps", 1)


def test_another_family_trains_through_the_script(tmp_path: Path, train: Any) -> None:
    """A Llama, of another class, config and attention mask, with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    folder = tmp_path / "llama"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
    language_model.character_tokenizer().save_pretrained(folder)
    done = train(*BRIEF, "--qwen_model", folder, "--qwen_train", "full")
    assert done.code == 0, done.err
    assert "no tokenizer" not in done.out
    assert all(row["qwen_grad"] > 0 for row in done.rows("batch"))
    frozen = train(*BRIEF, "--qwen_model", folder, "--qwen_train", "frozen")
    assert frozen.code == 0, frozen.err


def test_a_bare_folder_trains_through_the_script_and_says_what_it_is(
    saved_models: Path, tmp_path: Path, train: Any
) -> None:
    (tmp_path / "config.json").write_bytes((saved_models / "bare" / "config.json").read_bytes())
    done = train(*BRIEF, "--qwen_model", tmp_path)
    assert done.code == 0, done.err
    assert "RANDOM WEIGHTS: the folder holds nothing but config.json" in done.out
    assert all(row["qwen_grad"] > 0 for row in done.rows("batch"))


def test_what_is_chosen_is_kept_on_a_resume(saved_models: Path, train: Any) -> None:
    """Breaks: `auto` that is decided again, on another device another way."""
    done = train(*BRIEF, "--qwen_model", saved_models / "chars", "--batch_cells", 400)
    assert done.code == 0, done.err
    (saved,) = [done.checkpoint()["extra"]["config"]]
    assert (saved["qwen_train"], saved["batch_cells"]) == ("full", 400)
    again = train("--resume", done.folder, "--device", "cpu", "--dry_run", fast=False)
    assert again.code == 0, again.err
    assert (again.run.args.qwen_train, again.run.args.batch_cells) == ("full", 400)
    other = ("--qwen_train", "frozen")
    refused = train("--resume", done.folder, "--device", "cpu", *other, fast=False)
    assert refused.code == 3
    assert "--qwen_train: saved full, now frozen" in refused.err
