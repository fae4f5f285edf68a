"""Which language model reads the demonstrations, from where, in which alphabet, trained how.

In: a name, `auto`, `tiny`, a folder or a hub id. Out: a decoder without LM head, its tokenizer, and
what a user has to be told of it. It knows nothing of batches and prompts, draws no global
randomness, prints nothing, and opens no file and no connection at import.
`from language_model import load_language_model`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TINY = "tiny"
HUB_DEFAULT = "Qwen/Qwen2.5-1.5B"
TRAIN_MODES = ("auto", "full", "lora", "frozen")

# The alphabet: ten colours, the end of a row, the two markers that open the grids, and padding.
ROW_END, INPUT_MARK, OUTPUT_MARK, PAD = 10, 11, 12, 13
SYMBOL_NAMES = (*"0123456789", "end of row", "input mark", "output mark", "padding")
SYMBOL_TEXTS: tuple[tuple[str, ...], ...] = (
    *((str(colour),) for colour in range(10)),
    ("\n", ";", ","),
    ("I", "in", "["),
    ("O", "out", "]"),
)  # first choice first; a tokenizer that has none as one token gets a spare id, which is noted
N_SYMBOLS = len(SYMBOL_NAMES)

MAX_TOKENS = 2048  # a pair of two 30 x 30 grids is 1862 tokens: nothing is cropped by default
PROBE_TIMEOUT_S = 4.0  # hard: DNS, connection, TLS and the answer together
LARGEST_CPU_FULL = 50_000_000  # parameters a CPU is asked to train (guess)
FULL_BYTES_PER_PARAMETER = 24  # fp32 weight, gradient, two Adam moments, half as much activations
CHECKPOINTING_FROM = 500_000_000  # trained on a GPU from this size: activations recomputed (guess)
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # no pickles
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class ModelError(Exception):
    """The language model cannot be had; one line: what, why and the way out."""


# --------------------------------------------------------------------------------------------
# The alphabet: symbols and token ids


@dataclass(frozen=True)
class SymbolTable:
    """The token id and the text of each symbol, and what had to be chosen otherwise (``notes``)."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    notes: tuple[str, ...] = ()


def _single_id(tokenizer: Any, vocabulary: Mapping[str, int], text: str) -> int | None:
    """The one token that stands for ``text``, or None."""
    if text in vocabulary:
        return vocabulary[text]
    try:  # bytes and word starts are spelled otherwise in the vocabulary
        ids = tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # noqa: BLE001 - a word-level one without [UNK] raises a bare Exception
        return None
    if not ids or ids[-1] == tokenizer.unk_token_id:
        return None
    # Some tokenizers put a lone word-start token before the symbol: the last id is the symbol.
    read_back = tokenizer.decode(ids[-1:])
    return int(ids[-1]) if read_back.strip(" ") == text else None


def symbol_table(tokenizer: Any | None, vocabulary: int) -> SymbolTable:
    """Map the alphabet to single token ids once, so that encoding is a table lookup.

    An id is the vocabulary's own entry or is read back by the tokenizer. A mark or row end that it
    has no single token for gets a spare id, which is noted; without a tokenizer all symbols take
    the first ids, noted too.
    Raises ModelError when a digit is missing or the vocabulary is too small.
    """
    if vocabulary < N_SYMBOLS:
        raise ModelError(
            f"the model's vocabulary has {vocabulary} tokens but the grid alphabet needs "
            f"{N_SYMBOLS}: choose another --qwen_model"
        )
    if tokenizer is None:
        note = f"no tokenizer beside the model: symbols take the token ids 0..{N_SYMBOLS - 1}"
        texts = (*(choices[0] for choices in SYMBOL_TEXTS), "")
        return SymbolTable(tuple(range(N_SYMBOLS)), texts, (note,))
    entries = tokenizer.get_vocab()
    ids: list[int | None] = []
    texts_found: list[str] = []
    for name, choices in zip(SYMBOL_NAMES, SYMBOL_TEXTS, strict=False):
        found = [(_single_id(tokenizer, entries, text), text) for text in choices]
        usable = [(i, text) for i, text in found if i is not None and i < vocabulary]
        usable = [(i, text) for i, text in usable if i not in ids]
        if not usable and name.isdigit():
            raise ModelError(
                f"the tokenizer has no single token for the digit {name} inside the model's "
                f"{vocabulary} tokens: choose another --qwen_model"
            )
        ids.append(usable[0][0] if usable else None)
        texts_found.append(usable[0][1] if usable else choices[0])
    pad = tokenizer.pad_token_id
    if pad is None or not 0 <= pad < vocabulary or pad in ids:
        pad = tokenizer.eos_token_id
    ids.append(pad if pad is not None and 0 <= pad < vocabulary and pad not in ids else None)
    spare = (i for i in range(vocabulary - 1, -1, -1) if i not in ids)
    notes: list[str] = []
    final: list[int] = []
    for name, token in zip(SYMBOL_NAMES, ids, strict=True):
        if token is None:
            token = next(spare)
            if name != "padding":  # padding is behind the text, where nothing reads it
                notes.append(f"the tokenizer has no single token for the {name}: id {token} is it")
        final.append(token)
    return SymbolTable(tuple(final), (*texts_found, ""), tuple(notes))


def character_tokenizer() -> Any:
    """The tokenizer of the tiny model, built in code; one character, one token, decodes exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {choices[0]: number for number, choices in enumerate(SYMBOL_TEXTS)}
    vocabulary |= {"<pad>": PAD, "<unk>": PAD + 1}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


# --------------------------------------------------------------------------------------------
# Which model, from where, trained how


def resolve_qwen_model(name: str, device: str | torch.device) -> tuple[str, str]:
    """``auto`` -> the model for this device; (name, reason), both for the banner."""
    if name != "auto":
        return name, "as asked by --qwen_model"
    if torch.device(device).type == "cuda":
        return HUB_DEFAULT, "auto on a GPU"
    return TINY, "auto without a GPU: a small Qwen2 built from a config, trained from scratch"


def resolve_train_mode(
    train: str, n_parameters: int, device: str | torch.device
) -> tuple[str, str | None]:
    """``auto`` -> full where it fits, else lora where peft is installed, else frozen; and why."""
    if train not in TRAIN_MODES:
        raise ValueError(f"train must be one of {TRAIN_MODES}, got {train!r}")
    if train != "auto":
        return train, None
    device = torch.device(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if n_parameters * FULL_BYTES_PER_PARAMETER <= memory:
            return "full", None
        if importlib.util.find_spec("peft") is not None:
            return "lora", "full training does not fit this GPU's memory: LoRA"
        return "frozen", "full training does not fit this GPU's memory and peft is missing: frozen"
    if n_parameters <= LARGEST_CPU_FULL:
        return "full", None
    return "frozen", "too large to be trained on a CPU: frozen"


@dataclass(frozen=True)
class LanguageModel:
    """A language model that is ready to be trained, or to be read where it is frozen.

    backbone: a transformers decoder without LM head, on its device; tokenizer: None where the model
    came without one; name, revision: as asked for, and a hub model's commit; train_mode: one of
    TRAIN_MODES, not `auto` (for `lora`, `with_lora` has still to add the adapters); notes: what its
    user has to be told, a line each.
    """

    backbone: nn.Module
    tokenizer: Any | None
    name: str
    revision: str | None
    train_mode: str
    notes: tuple[str, ...]


def load_language_model(
    model: str,
    *,
    train: str = "auto",
    device: str | torch.device = "cpu",
    offline: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Build ``tiny`` or load a folder or hub id, on ``device``; ``auto`` picks by the device.

    ``dtype`` is that of the weights: default float32, and bfloat16 for a frozen or LoRA base on a
    GPU that has it natively. ``gradient_checkpointing`` defaults to on for a large model that is
    trained on a GPU. ``offline``: a hub id is taken from the local cache only. ``seed`` decides the
    weights of ``tiny``.
    Raises ModelError (a folder or hub that does not give a model), ValueError (settings).
    """
    device = torch.device(device)
    name, _ = resolve_qwen_model(model, device)
    notes: list[str] = []
    if name == TINY:
        backbone, tokenizer = build_tiny(seed)
    else:
        folder, revision = locate_model(name, offline=offline, revision=revision)
        backbone, tokenizer = load_folder(folder, name)
        if _is_bare(folder):
            notes.append("RANDOM WEIGHTS: the folder holds nothing but config.json")
    n_parameters = sum(p.numel() for p in backbone.parameters())
    train_mode, note = resolve_train_mode(train, n_parameters, device)
    if note:
        notes.append(note)
    on_gpu = device.type == "cuda"
    if dtype is None:
        half = on_gpu and train_mode != "full"
        native = half and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if native else torch.float32
    backbone.to(device).to(dtype)
    if gradient_checkpointing is None:
        gradient_checkpointing = (
            on_gpu and train_mode != "frozen" and n_parameters >= CHECKPOINTING_FROM
        )
    if gradient_checkpointing:
        recompute_activations(backbone)
    return LanguageModel(backbone, tokenizer, name, revision, train_mode, tuple(notes))


def build_tiny(seed: int | torch.Generator = 0) -> tuple[nn.Module, Any]:
    """A Qwen2 of 0.09 M parameters with random weights, and its tokenizer; no file, no network."""
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        attention_dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    with seeded(seed):
        return Qwen2Model(config), character_tokenizer()


def load_folder(folder: Path, name: str) -> tuple[nn.Module, Any | None]:
    """Model (no LM head, in the dtype it was saved in) and tokenizer of a ``save_pretrained``.

    The tokenizer is None where the folder has none. A folder that holds config.json and nothing
    else gives random weights, for measuring speed and memory; `_is_bare` tells, for the banner.
    Raises ModelError if a file is missing or unreadable, or if the weights do not fill the model
    (they would be random without a word).
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{name}: the folder holds no config.json, so it is no saved model: pass a folder that "
            "save_pretrained wrote, or --qwen_model tiny"
        )
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    tokenizer = None
    try:
        if _is_bare(folder):
            with seeded(0):
                config = AutoConfig.from_pretrained(folder, local_files_only=True)
                return AutoModel.from_config(config), None
        with seeded(0), _quiet_transformers():
            backbone, info = AutoModel.from_pretrained(
                folder, local_files_only=True, dtype="auto", output_loading_info=True
            )
            if any((folder / file).is_file() for file in TOKENIZER_FILES):
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{name}: the saved model cannot be loaded ({why}): save it again with "
            "save_pretrained, or use --qwen_model tiny"
        ) from error
    for problem in ("missing_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(problem) or ()))
        if keys:
            raise ModelError(
                f"{name}: {len(keys)} weights of the model are not in its files, the first "
                f"{keys[0]}: save it again with save_pretrained"
            )
    return backbone, tokenizer


def _is_bare(folder: Path) -> bool:
    """Whether a model folder holds config.json and nothing else."""
    return [path.name for path in folder.iterdir()] == ["config.json"]


def locate_model(
    name: str, *, offline: bool = False, revision: str | None = None
) -> tuple[Path, str | None]:
    """Folder and revision (a commit; None for a local folder) of a folder name or hub id.

    A hub model that the local cache holds in full is used from there. Otherwise the hub is asked
    once, with a hard limit of PROBE_TIMEOUT_S, before anything is downloaded.
    Raises ModelError that names the ways out; needs neither a model library nor a GPU.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, None
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or name.startswith((".", "/", "~")):
        raise ModelError(
            f"{name!r} is neither 'auto', 'tiny', an existing folder nor a hub id "
            "(owner/name): correct --qwen_model"
        )
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        cached = Path(
            huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
        )
        lacking = _lacking_files(cached)
    except (OSError, ValueError):
        cached, lacking = None, "the cache has nothing of it"
    if cached is not None and not lacking:
        return cached, cached.name
    if offline or constants.HF_HUB_OFFLINE:
        raise ModelError(
            _ways_out(name, f"is not in the local cache ({lacking}) and we are offline")
        )
    try:
        info = _with_deadline(
            lambda: huggingface_hub.HfApi().model_info(
                name, revision=revision, timeout=PROBE_TIMEOUT_S
            ),
            PROBE_TIMEOUT_S,
        )
    except errors.RepositoryNotFoundError as error:  # a gated model is one of these
        raise ModelError(_ways_out(name, "does not exist on the hub, or needs a token")) from error
    except Exception as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(
            _ways_out(name, f"cannot be had: the hub is out of reach ({why})")
        ) from error
    try:
        path = huggingface_hub.snapshot_download(
            name, revision=info.sha, allow_patterns=list(HUB_FILES), etag_timeout=PROBE_TIMEOUT_S
        )
    except Exception as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(_ways_out(name, f"could not be downloaded ({why})")) from error
    lacking = _lacking_files(Path(path))
    if lacking:
        raise ModelError(_ways_out(name, f"is incomplete on the hub ({lacking})"))
    return Path(path), info.sha


def _ways_out(name: str, problem: str) -> str:
    return (
        f"{name} {problem}. Three ways out: (1) --qwen_model tiny, a small model that needs no "
        "file; (2) --qwen_model /path/to/folder, a model saved by save_pretrained; (3) run once "
        f"with network to fill the local cache (or: hf download {name}), then add --offline"
    )


def _lacking_files(folder: Path) -> str:
    """What a cached model lacks to be loaded, in words; empty if it is complete."""
    if not (folder / "config.json").is_file():
        return "no config.json"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        if absent:
            return f"no {absent[0]}"
    elif not (folder / "model.safetensors").is_file():
        return "no model.safetensors"
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return "no tokenizer"
    return ""


def _with_deadline(call: Callable[[], Any], limit_s: float) -> Any:
    """Result of ``call``, or TimeoutError after ``limit_s``, whatever it hangs in (DNS as well)."""
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["result"] = call()
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            box["error"] = error

    thread = threading.Thread(target=work, daemon=True)  # daemon: a hung one must not delay exit
    thread.start()
    thread.join(limit_s)
    if "error" in box:
        raise box["error"]
    if "result" not in box:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    return box["result"]


def with_lora(backbone: nn.Module) -> nn.Module:
    """``backbone`` frozen, with trained rank-16 adapters on its attention projections."""
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ModelError(
            "--qwen_train lora needs the package peft, which is not installed: "
            "pip install peft, or use --qwen_train full or frozen"
        ) from error
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    return peft.get_peft_model(backbone, config)


def recompute_activations(backbone: Any) -> None:
    """Trade time for memory in the backward pass; the method was renamed in transformers 5.x."""
    kwargs = {"use_reentrant": False}
    if hasattr(backbone, "activation_checkpointing_enable"):
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """The identity of named weights: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        tensor = weights[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def as_seed(seed: int | torch.Generator) -> int:
    """The seed itself, or one drawn from a generator."""
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**31, (), generator=seed, device=seed.device))
    return seed


@contextlib.contextmanager
def seeded(seed: int | torch.Generator) -> Iterator[None]:
    """Initialisation draws from ``seed``; the global CPU generator is left as it was."""
    number = as_seed(seed)
    before = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(number)
    try:
        yield
    finally:
        torch.random.set_rng_state(before)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars or load reports; problems are raised from the loading info instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
