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
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from command_line import memory_of
from persistence.files import expanded

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
# Of a trained weight: itself, gradient, two Adam moments, average, and its copy in half precision.
FULL_BYTES_PER_PARAMETER = 4 + 4 + 8 + 4 + 2
# In a checkpoint: weight, two moments, average. Larger ones would fill disks and Drives (guess).
SAVED_BYTES_PER_PARAMETER, LARGEST_CHECKPOINT = 4 + 8 + 4, 8 * 10**9
FITS_SHARE = 0.6  # of a GPU's memory, for that: the rest is for what a batch needs (guess)
CHECKPOINTING_FROM = 500_000_000  # trained on a GPU from this size: activations recomputed (guess)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
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
    """``auto`` -> full where it fits the GPU and its checkpoints a disk, else lora where peft can
    be had, else frozen; and why, in a line for the banner: None for what was asked for, and for a
    model small enough for a CPU."""
    if train not in TRAIN_MODES:
        raise ValueError(f"train must be one of {TRAIN_MODES}, got {train!r}")
    if train != "auto":
        return train, None
    device = torch.device(device)
    if device.type == "cuda":
        memory, needed = memory_of(str(device)), n_parameters * FULL_BYTES_PER_PARAMETER
        figures = (
            f"full training takes {needed / 1e9:.1f} GB, without what a batch needs, and this GPU "
            f"has {memory / 1e9:.1f} GB"
        )
        saved = n_parameters * SAVED_BYTES_PER_PARAMETER
        if needed <= FITS_SHARE * memory and saved <= LARGEST_CHECKPOINT:
            return "full", f"full, chosen as it fits: {figures}"
        if needed <= FITS_SHARE * memory:
            figures = f"each checkpoint of full training would take {saved / 1e9:.1f} GB"
        trouble = lora_trouble()
        if trouble is None:
            return "lora", f"lora, chosen as {figures}"
        return "frozen", f"frozen, chosen as {figures}, and LoRA {trouble}"
    if n_parameters <= LARGEST_CPU_FULL:
        return "full", None
    return "frozen", (
        f"frozen, chosen as more than {LARGEST_CPU_FULL / 1e6:.0f} M parameters are too slow to "
        "train on a CPU"
    )


def weight_dtype(train_mode: str, device: str | torch.device) -> torch.dtype:
    """In which dtype the weights are held: float32 where they are trained and on a CPU, else
    bfloat16 where the GPU has it natively (a T4 only emulates it, and is asked accordingly)."""
    if torch.device(device).type != "cuda" or train_mode == "full":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def recomputes(train_mode: str, n_parameters: int, device: str | torch.device) -> bool:
    """Whether activations are recomputed in the backward pass: no number changes, memory falls."""
    large = n_parameters >= CHECKPOINTING_FROM and train_mode != "frozen"
    return torch.device(device).type == "cuda" and large


def activation_bytes(
    config: Any, train_mode: str, *, half: bool, recompute: bool, dtype: torch.dtype
) -> int:
    """Bytes that reading one token leaves for the backward pass; an estimate.

    Counted on paper for a decoder of SwiGLU blocks, D = hidden_size, I = intermediate_size, L
    layers, V = the width of its values: L * (4 I + 9 D + 2 V) floats where all of it is trained,
    L * (3 I + 5.5 D + 2 V) under LoRA, 0 where it is frozen. Half precision saves 30%, 20% with
    weights in bfloat16: norms and their inputs stay float32. recompute: the L + 2 inputs of the
    layers in `dtype`, and one layer as above. Within a factor of 1.25 of what autograd saves, for
    small models on a CPU (tests/test_memory_plan.py).
    """
    if train_mode == "frozen":
        return 0
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = getattr(config, "num_attention_heads", 1)
    values = hidden * (getattr(config, "num_key_value_heads", None) or heads) / heads
    layer = 4 * inner + 9 * hidden + 2 * values
    if train_mode == "lora":
        layer = 3 * inner + 5.5 * hidden + 2 * values
    bytes_each = 3.2 if dtype != torch.float32 else (2.8 if half else 4.0)
    if not recompute:
        return int(layers * layer * bytes_each)
    return int((layers + 2) * hidden * dtype.itemsize + layer * bytes_each)


@dataclass(frozen=True)
class LanguageModel:
    """A language model that is ready to be trained, or to be read where it is frozen.

    backbone: a transformers decoder without LM head, on its device; tokenizer: None where the model
    came without one; name, revision: as asked for, and a hub model's commit; train_mode: one of
    TRAIN_MODES, not `auto` (for `lora`, `with_lora` has still to add the adapters); saved_dtype: of
    the weights in their files; recompute: activations are recomputed in the backward pass; notes:
    what its user has to be told, a line each.
    """

    backbone: nn.Module
    tokenizer: Any | None
    name: str
    revision: str | None
    train_mode: str
    saved_dtype: torch.dtype
    recompute: bool
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
    weights: bool = True,
) -> LanguageModel:
    """Build ``tiny`` or load a folder or hub id, on ``device``; ``auto`` picks by the device.

    ``dtype`` is that of the weights, default `weight_dtype`. ``gradient_checkpointing``: default
    `recomputes`. ``offline``: a hub id is taken from the local cache only. ``seed`` decides the
    weights of ``tiny``. ``weights=False`` needs config.json alone: shapes without numbers, on
    torch's device "meta", and the tokenizer of ``tiny``; ``tiny`` itself is built all the same.
    Raises ModelError (a folder or hub that does not give a model), ValueError (settings).
    """
    device = torch.device(device)
    name, _ = resolve_qwen_model(model, device)
    notes: list[str] = []
    if name == TINY:
        backbone, tokenizer = build_tiny(seed)
    elif not weights:
        folder, revision = locate_config(name, offline=offline, revision=revision)
        backbone, tokenizer = build_meta(folder, name), character_tokenizer()
    else:
        folder, revision = locate_model(name, offline=offline, revision=revision)
        backbone, tokenizer = load_folder(folder, name)
    if name != TINY and _is_bare(folder):
        notes.append("RANDOM WEIGHTS: the folder holds nothing but config.json")
    n_parameters = sum(p.numel() for p in backbone.parameters())
    saved_dtype = next(backbone.parameters()).dtype
    train_mode, note = resolve_train_mode(train, n_parameters, device)
    if note:
        notes.append(note)
    dtype = dtype or weight_dtype(train_mode, device)
    meta = next(backbone.parameters()).is_meta
    backbone.to("meta" if meta else device).to(dtype)
    if gradient_checkpointing is None:
        gradient_checkpointing = recomputes(train_mode, n_parameters, device)
    if gradient_checkpointing:
        recompute_activations(backbone)
        notes.append("activations are recomputed in the backward pass, which saves memory")
    return LanguageModel(
        backbone,
        tokenizer,
        name,
        revision,
        train_mode,
        saved_dtype,
        gradient_checkpointing,
        tuple(notes),
    )


def build_tiny(seed: int | torch.Generator = 0) -> tuple[nn.Module, Any]:
    """A Qwen2 of 0.05 M parameters with random weights, and its tokenizer; no file, no network.

    One layer of two heads: with two layers of four the answers were no better and the reading cost
    more than twice as much (docs/LOG.md).
    """
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
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


def tokenizer_of(name: str, *, offline: bool = False, revision: str | None = None) -> Any | None:
    """The tokenizer that `load_language_model` finds beside a model; None where there is none.
    Raises ModelError as `locate_model`."""
    if name == TINY:
        return character_tokenizer()
    from transformers import AutoTokenizer

    folder, _ = locate_model(name, offline=offline, revision=revision)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    with _quiet_transformers():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def save_folder(backbone: Any, tokenizer: Any | None, folder: Path) -> None:
    """What `load_folder` reads: the model, in the dtype that it is in, and its tokenizer if any."""
    with _quiet_transformers():
        backbone.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def build_meta(folder: Path, name: str) -> nn.Module:
    """The model of a config.json without numbers, on torch's device "meta", in the dtype that the
    file names. Raises ModelError where it describes no model that transformers can build."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"), _quiet_transformers():
            return AutoModel.from_config(config)
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise ModelError(f"{name}: no model can be built from its config.json ({why})") from error


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
    folder = expanded(name)
    if folder.is_dir():
        return folder, None
    if not HUB_ID.fullmatch(name):
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
        why = _short(error) or type(error).__name__
        raise ModelError(
            _ways_out(name, f"cannot be had: the hub is out of reach ({why})")
        ) from error
    try:
        path = huggingface_hub.snapshot_download(
            name, revision=info.sha, allow_patterns=list(HUB_FILES), etag_timeout=PROBE_TIMEOUT_S
        )
    except Exception as error:
        why = _short(error) or type(error).__name__
        raise ModelError(_ways_out(name, f"could not be downloaded ({why})")) from error
    lacking = _lacking_files(Path(path))
    if lacking:
        raise ModelError(_ways_out(name, f"is incomplete on the hub ({lacking})"))
    return Path(path), info.sha


def locate_config(
    name: str, *, offline: bool = False, revision: str | None = None
) -> tuple[Path, str | None]:
    """A folder with the model's config.json, and the revision: as `locate_model`, but of a hub
    model nothing else is downloaded. Raises ModelError as that does."""
    import huggingface_hub
    from huggingface_hub import constants

    if expanded(name).is_dir() or not HUB_ID.fullmatch(name):
        return locate_model(name, offline=offline, revision=revision)
    ask = huggingface_hub.hf_hub_download
    try:
        path = ask(name, "config.json", revision=revision, local_files_only=True)
    except (OSError, ValueError):
        if offline or constants.HF_HUB_OFFLINE:
            return locate_model(name, offline=True, revision=revision)  # says the ways out
        try:
            path = _with_deadline(
                lambda: ask(name, "config.json", revision=revision, etag_timeout=PROBE_TIMEOUT_S),
                PROBE_TIMEOUT_S,
            )
        except Exception as error:
            why = _short(error) or type(error).__name__
            raise ModelError(
                _ways_out(name, f"cannot be had: no config.json from the hub ({why})")
            ) from error
    folder = Path(path).parent
    return folder, folder.name


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


def lora_trouble() -> str | None:
    """Why there is no LoRA here, and what to do; None where there is. Imports peft."""
    try:
        importlib.import_module("peft")
    except ModuleNotFoundError as error:
        if error.name == "peft":
            return "needs the package peft, which is not installed: pip install peft"
        return f"has peft, but not the package {error.name}: pip install {error.name}"
    except ImportError as error:
        return f"has a peft that cannot be imported ({_short(error)}): pip install -U peft"
    try:
        # peft asks for it when it adds adapters, and raises for an old one (Colab has had such).
        importlib.import_module("peft.import_utils").is_torchao_available()
    except ImportError as error:
        return (
            f"is refused by peft because of another package ({_short(error)}): "
            "pip install -U torchao, or pip uninstall torchao"
        )
    except AttributeError:
        pass  # a peft that does not ask
    return None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def with_lora(backbone: nn.Module) -> nn.Module:
    """``backbone`` frozen, with trained rank-16 adapters on its attention projections."""
    trouble = lora_trouble()
    if trouble is not None:
        raise ModelError(f"--qwen_train lora {trouble}; or use --qwen_train full or frozen")
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    with warnings.catch_warnings():  # peft asks transformers for a property by its old name
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return peft.get_peft_model(backbone, config)


def recompute_activations(backbone: Any) -> None:
    """Trade time for memory in the backward pass; the method was renamed in transformers 5.x."""
    kwargs = {"use_reentrant": False}
    if hasattr(backbone, "activation_checkpointing_enable"):
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def weights_sha256(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """The identity of named weights: names, dtypes, shapes and bytes, in the order of the names.

    dtype: of their files, in which they are compared: bfloat16 weights are the same ones where they
    are held in float32 (on a CPU or a T4) and where they are not.
    """
    digest = hashlib.sha256()
    for key in sorted(weights):
        tensor = weights[key].detach().to(dtype or weights[key].dtype).cpu().contiguous()
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
