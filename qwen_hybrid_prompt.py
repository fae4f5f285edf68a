"""Demonstration pairs -> text and control features -> Qwen -> prompt tokens: the hybrid prompt.

Each pair is its own sequence, read once by the language model; one pass serves every query of the
batch, and leave-one-out is the index list ``batch.context``. It never sees a query (neither its
input nor its output), draws no global randomness, prints nothing and opens no file at import.
Use: ``build_qwen_prompt("tiny", width=96, n_control=48)``, then ``prompt = module(batch)``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

TINY = "tiny"
HUB_DEFAULT = "Qwen/Qwen2.5-1.5B"
MODES = ("full", "no_qwen", "null", "shuffled")
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

MIN_TOKENS = 64  # one row of 30 cells of each grid and the marks: the rule below always keeps some
MAX_TOKENS = 2048  # a pair of two 30 x 30 grids is 1862 tokens: nothing is cropped by default
# A sequence is padded to the next of these, which depends on its own length alone. A padded length
# that depends on the batch changes the last bits of every row (measured: 1e-6 on CPU). Above 32
# tokens at most a third is padding.
LENGTH_BUCKETS = (
    *(32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512),
    *(640, 768, 896, 1024, 1280, 1536, 1792, 2048),
)
PROBE_TIMEOUT_S = 4.0  # hard: DNS, connection, TLS and the answer together
CACHE_PAIRS = 4096  # readings kept for reuse: all 3232 pairs; 100 MB with Qwen2.5-1.5B
LARGEST_CPU_FULL = 50_000_000  # parameters a CPU is asked to train (guess)
FULL_BYTES_PER_PARAMETER = 24  # fp32 weight, gradient, two Adam moments, half as much activations
CHECKPOINTING_FROM = 500_000_000  # trained on a GPU from this size: activations recomputed (guess)
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # no pickles
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class ModelError(Exception):
    """The language model cannot be had; one line: what, why and the way out."""


class DemoBatch(Protocol):
    """The only fields of a batch that the prompt reads; C pairs, Q queries, M context slots.

    demo_* are in the batch's view; own_* are the pairs as the task has them, for reuse of readings.
    """

    @property
    def demo_input(self) -> Tensor: ...  # [C, rows, cols] long, -1 outside

    @property
    def demo_output(self) -> Tensor: ...  # [C, rows, cols] long, -1 outside

    @property
    def demo_input_size(self) -> Tensor: ...  # [C, 2] long

    @property
    def demo_output_size(self) -> Tensor: ...  # [C, 2] long

    @property
    def demo_control(self) -> Tensor: ...  # [C, n_control] float

    @property
    def demo_task(self) -> Tensor: ...  # [C] long

    @property
    def query_task(self) -> Tensor: ...  # [Q] long

    @property
    def n_tasks(self) -> int: ...

    @property
    def context(self) -> Tensor: ...  # [Q, M] long, -1 = empty slot

    @property
    def own_input(self) -> Tensor: ...  # [C, rows, cols] long, -1 outside

    @property
    def own_output(self) -> Tensor: ...

    @property
    def own_input_size(self) -> Tensor: ...  # [C, 2] long

    @property
    def own_output_size(self) -> Tensor: ...


@dataclass(frozen=True)
class Prompt:
    """What conditions the agent: ``tokens`` [Q, L, width] float32, ``mask`` [Q, L] True = real.

    ``pairs`` [C, n, width]: the tokens of each demonstration of the batch, where they were read.
    """

    tokens: Tensor
    mask: Tensor
    pairs: Tensor | None = None

    @property
    def summary(self) -> Tensor:
        """Mean over the real tokens, [Q, width]; zero where a query has none."""
        weights = self.mask.unsqueeze(-1).to(self.tokens.dtype)
        return (self.tokens * weights).sum(1) / weights.sum(1).clamp(min=1.0)

    def extended(self, tokens: Tensor, mask: Tensor | None = None) -> Prompt:
        """The prompt with ``tokens`` [Q, n, width] behind it; ``mask`` [Q, n], default all real."""
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if tokens.shape[:2] != mask.shape or tokens.shape[0] != self.tokens.shape[0]:
            raise ValueError(
                f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} do not extend a prompt "
                f"of {self.tokens.shape[0]} queries"
            )
        new = torch.where(mask.unsqueeze(-1), tokens.to(self.tokens.dtype), 0.0)
        return Prompt(torch.cat([self.tokens, new], 1), torch.cat([self.mask, mask], 1), self.pairs)


# --------------------------------------------------------------------------------------------
# Text: grids -> symbols -> token ids, all by tensor operations


@dataclass(frozen=True)
class PairSymbols:
    """``symbols`` [C, S] long (PAD behind the text), ``lengths`` [C], ``truncated`` [C] bool."""

    symbols: Tensor
    lengths: Tensor
    truncated: Tensor


def encode_pairs(
    inputs: Tensor,
    input_sizes: Tensor,
    outputs: Tensor,
    output_sizes: Tensor,
    max_tokens: int = MAX_TOKENS,
) -> PairSymbols:
    """Write each pair as input mark, rows of the input, output mark, rows of the output.

    Grids are [C, rows, cols] long, sizes [C, 2]. A pair longer than ``max_tokens`` keeps the first
    r rows of both grids, r as large as fits, and is flagged in ``truncated``.
    """
    if max_tokens < MIN_TOKENS:
        raise ValueError(f"max_tokens must be at least {MIN_TOKENS}, got {max_tokens}")
    device = inputs.device
    n_pairs = inputs.shape[0]
    tallest = max(inputs.shape[1], outputs.shape[1])
    kept = torch.arange(tallest + 1, device=device)
    cost = kept.new_full((n_pairs, tallest + 1), 2)
    for size in (input_sizes, output_sizes):
        cost += torch.minimum(kept, size[:, :1]) * (size[:, 1:] + 1)
    rows_kept = (cost <= max_tokens).sum(1) - 1  # cost grows with the rows kept
    sides = torch.maximum(input_sizes[:, 0], output_sizes[:, 0])
    parts: list[Tensor] = []
    real: list[Tensor] = []
    for grids, sizes, mark in (
        (inputs, input_sizes, INPUT_MARK),
        (outputs, output_sizes, OUTPUT_MARK),
    ):
        n_rows, n_cols = grids.shape[1:]
        row = torch.arange(n_rows, device=device)[None, :, None]
        col = torch.arange(n_cols + 1, device=device)[None, None, :]
        width = sizes[:, 1, None, None]
        cells = functional.pad(grids, (0, 1), value=ROW_END).masked_fill(col == width, ROW_END)
        shown = (row < torch.minimum(sizes[:, 0], rows_kept)[:, None, None]) & (col <= width)
        parts += [cells.new_full((n_pairs, 1), mark), cells.flatten(1)]
        real += [shown.new_ones((n_pairs, 1)), shown.flatten(1)]
    flat, is_real = torch.cat(parts, 1), torch.cat(real, 1)
    lengths = is_real.sum(1)
    longest = int(lengths.max()) if n_pairs else 0
    symbols = flat.new_full((n_pairs, longest), PAD)
    position = is_real.cumsum(1) - 1
    pair = torch.arange(n_pairs, device=device)[:, None].expand_as(position)
    symbols[pair[is_real], position[is_real]] = flat[is_real]
    return PairSymbols(symbols, lengths, rows_kept < sides)


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
# The module


class AttentionPool(nn.Module):
    """Hidden states -> a few vectors: one learned query each, softmax over the real positions.

    With fixed queries a key projection folds into the query and a value projection commutes with
    the mean, so both are left out. ``region_bias`` starts one query on the last position (all a
    causal model knows), one on the output, one on the input; the others look everywhere.
    """

    REGIONS = 3  # input, output, last position

    def __init__(self, hidden: int, n_queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(n_queries, hidden) / hidden**0.5)
        bias = torch.zeros(n_queries, self.REGIONS)
        for number, region in enumerate((2, 1, 0)[:n_queries]):
            bias[number, region] = 4.0 if region == 2 else 2.0
        self.region_bias = nn.Parameter(bias)

    def forward(self, hidden: Tensor, region: Tensor, mask: Tensor) -> Tensor:
        """``hidden`` [C, S, D], ``region`` [C, S] long, ``mask`` [C, S] -> [C, n_queries, D]."""
        hidden = functional.rms_norm(hidden.float(), hidden.shape[-1:])
        where = functional.one_hot(region, self.REGIONS).to(hidden.dtype)
        scores = hidden @ self.queries.T + where @ self.region_bias.T
        weights = scores.masked_fill(~mask.unsqueeze(-1), float("-inf")).softmax(1)
        return weights.transpose(1, 2) @ hidden


class ReadingCache:
    """Pooled readings by pair: read afresh at every ``interval``-th use, reused in between.

    Keys are digests of token ids, hence of a pair as its task has it. Holds at most ``capacity`` entries,
    the one refreshed longest ago goes first; what it decides depends on its content alone, and
    ``state`` holds all of it, so that a resumed run repeats it bit for bit.
    """

    def __init__(self, interval: int, capacity: int) -> None:
        if interval < 1 or capacity < 1:
            raise ValueError(f"interval and capacity must be >= 1, got {interval} and {capacity}")
        self.interval, self.capacity = interval, capacity
        self.hits = self.misses = 0
        self._entries: OrderedDict[bytes, tuple[int, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @staticmethod
    def key(token_ids: Tensor) -> bytes:
        """16 bytes that stand for a row of token ids (the same in every process)."""
        data = token_ids.to("cpu", torch.int32).contiguous().numpy().tobytes()
        return hashlib.blake2b(data, digest_size=16).digest()

    def get(self, key: bytes) -> Tensor | None:
        """The stored reading, or None when the pair has to be read."""
        entry = self._entries.get(key)
        if entry is None or entry[0] + 1 >= self.interval:
            self.misses += 1
            return None
        self._entries[key] = (entry[0] + 1, entry[1])
        self.hits += 1
        return entry[1]

    def put(self, key: bytes, reading: Tensor) -> None:
        self._entries.pop(key, None)
        self._entries[key] = (0, reading.detach().clone())
        if len(self._entries) > self.capacity:
            self._entries.popitem(last=False)

    def state(self) -> dict[str, Tensor]:
        """All content as tensors: ``keys`` [E, 16] uint8, ``uses`` [E], ``readings`` [E, n, D]."""
        keys = torch.tensor([list(key) for key in self._entries], dtype=torch.uint8)
        uses = torch.tensor([uses for uses, _ in self._entries.values()], dtype=torch.long)
        readings = [reading.cpu() for _, reading in self._entries.values()]
        return {
            "keys": keys.reshape(-1, 16),
            "uses": uses,
            "readings": torch.stack(readings) if readings else torch.zeros(0),
            "counts": torch.tensor([self.hits, self.misses], dtype=torch.long),
        }

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        self.hits, self.misses = (int(count) for count in state["counts"])
        self._entries = OrderedDict(
            (bytes(key.tolist()), (int(uses), reading.to(device).clone()))
            for key, uses, reading in zip(
                state["keys"], state["uses"], state["readings"], strict=True
            )
        )


class QwenHybridPrompt(nn.Module):
    """Demonstration pairs -> prompt tokens: ``n_qwen_tokens`` of the LM and one control token each.

    ``backbone`` is a transformers decoder without LM head; ``tokenizer`` maps the grid alphabet to
    its ids (None: ids 0..13). All projections are built here, so an optimizer made from
    ``lm_parameters()`` and ``head_parameters()`` holds every trained weight.

    ``mode`` (may be changed at any time) is an ablation switch:
      full      the prompt as it is;
      no_qwen   the LM is not run, its tokens are their learned type vectors alone;
      null      one learned token, the same for every query;
      shuffled  each query gets the pairs of the next task of the batch; where the batch holds one
                task only, it gets the learned token alone, as its own pairs would tell the truth.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any | None,
        width: int,
        n_control: int,
        *,
        n_qwen_tokens: int = 4,
        max_tokens: int = MAX_TOKENS,
        train_mode: str = "full",
        mode: str = "full",
        cache_interval: int = 1,
        cache_pairs: int = CACHE_PAIRS,
        seed: int | torch.Generator = 0,
        name: str = "model",
        revision: str | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Sizes in tokens and pairs; ``seed`` decides the new weights; see the class for the rest.

        Raises ValueError on an impossible setting, ModelError on a model that does not fit.
        """
        super().__init__()
        if train_mode not in TRAIN_MODES[1:]:
            raise ValueError(f"train_mode must be one of {TRAIN_MODES[1:]}, got {train_mode!r}")
        if max_tokens < MIN_TOKENS:
            raise ValueError(f"max_tokens must be at least {MIN_TOKENS}, got {max_tokens}")
        if n_qwen_tokens < 1:
            raise ValueError(f"n_qwen_tokens must be at least 1, got {n_qwen_tokens}")
        config: Any = backbone.config
        hidden = getattr(config, "hidden_size", None)
        if not isinstance(hidden, int):
            raise ModelError(f"{name}: not a text model (its config has no hidden_size)")
        embedding: nn.Embedding = backbone.get_input_embeddings()  # type: ignore[operator]
        table = symbol_table(tokenizer, embedding.num_embeddings)
        config.attention_dropout = 0.0  # determinism; the layers hold their own copy
        for layer in backbone.modules():
            if hasattr(layer, "attention_dropout"):
                layer.attention_dropout = 0.0  # type: ignore[assignment]
        self.mode = mode
        self.width, self.n_qwen_tokens, self.max_tokens = width, n_qwen_tokens, max_tokens
        self.name, self.revision, self.train_mode = name, revision, train_mode
        self.table, self.notes = table, (*notes, *table.notes)
        # A causal model never looks right, where the padding is: no mask, the fast kernel.
        self._needs_mask = not str(getattr(config, "model_type", "")).startswith("qwen")
        self.n_pairs = self.n_truncated = 0
        self._n_fresh = 0  # pairs of the last batch that were really read
        self.cache = ReadingCache(cache_interval, cache_pairs)
        with _seeded(seed):
            if train_mode == "lora":
                backbone = _with_lora(backbone)
            self.backbone = backbone
            self.pool = AttentionPool(hidden, n_qwen_tokens)
            self.project = nn.Sequential(
                nn.LayerNorm(hidden), nn.Linear(hidden, width), nn.SiLU(), nn.Linear(width, width)
            )
            self.control = nn.Sequential(
                nn.LayerNorm(n_control),
                nn.Linear(n_control, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            self.type_tokens = nn.Parameter(0.5 * torch.randn(n_qwen_tokens + 1, width))
            self.start_token = nn.Parameter(torch.randn(width))
            self.norm = nn.LayerNorm(width)
        self.register_buffer("symbol_ids", torch.tensor(table.ids), persistent=False)
        if train_mode == "frozen":
            self.backbone.requires_grad_(False)
        self._frozen_names = tuple(
            f"backbone.{key}" for key, p in self.backbone.named_parameters() if not p.requires_grad
        )
        self._frozen_sha256: str | None = None
        self.train()

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        self._mode = mode

    @property
    def transformer(self) -> nn.Module:
        """The decoder itself, without LoRA's wrapping: ``qwen.transformer.layers[0]`` is a block."""
        unwrapped = getattr(self.backbone, "get_base_model", lambda: self.backbone)
        return unwrapped()  # type: ignore[operator]

    def train(self, mode: bool = True) -> QwenHybridPrompt:
        """As nn.Module's; a frozen backbone stays in evaluation."""
        super().train(mode)
        if self.train_mode == "frozen":
            self.backbone.eval()
        return self

    # -- reading -------------------------------------------------------------------------------

    def forward(self, batch: DemoBatch) -> Prompt:
        """``batch`` -> the prompt of each query: L = 1 + M * (n_qwen_tokens + 1) tokens.

        Token 0 is a learned start token, real for every query, so that a query without any
        demonstration still has a prompt; the tokens of slot m follow slot by slot. Tokens of empty
        slots are 0 and masked.
        """
        context = batch.context
        n_queries = context.shape[0]
        start = self.norm(self.start_token).float().expand(n_queries, 1, self.width)
        prompt = Prompt(start, context.new_ones((n_queries, 1), dtype=torch.bool))
        if self.mode == "null":
            return prompt
        if self.mode == "shuffled":
            context = context_of_next_task(batch)
        pairs = self.read(batch)
        if not len(pairs):
            return prompt
        real = context >= 0
        tokens = pairs[context.clamp(min=0)].flatten(1, 2)
        prompt = prompt.extended(tokens, real.repeat_interleave(pairs.shape[1], 1))
        return Prompt(prompt.tokens, prompt.mask, pairs)

    def read(self, batch: DemoBatch) -> Tensor:
        """The tokens of each pair, [C, n_qwen_tokens + 1, width] float32; the last is control.

        A pair's tokens depend on that pair alone. In training with a cache, the LM's part may be an
        earlier, detached reading of the same pair; the projections always get gradient.
        """
        n_pairs = batch.demo_input.shape[0]
        device = self.start_token.device
        if not n_pairs:
            return self.start_token.new_zeros(0, self.n_qwen_tokens + 1, self.width)
        pooled = None if self.mode == "no_qwen" else self._readings(batch)
        with torch.autocast(device.type, enabled=False):  # small, and the agent builds on it
            control = self.control(batch.demo_control.float()).unsqueeze(1)
            qwen = control.new_zeros(n_pairs, self.n_qwen_tokens, self.width)
            if pooled is not None:
                qwen = self.project(pooled)
            return self.norm(torch.cat([qwen, control], 1) + self.type_tokens)

    def _text(self, batch: DemoBatch) -> PairSymbols:
        """The pairs as symbols: in the batch's view, or with a cache as the task itself has them.

        Views are random: in its view a pair hardly ever comes up again, and a cache would never hit.
        """
        if self.cache.interval == 1:
            names = ("demo_input", "demo_input_size", "demo_output", "demo_output_size")
        else:
            names = ("own_input", "own_input_size", "own_output", "own_output_size")
        inputs, input_sizes, outputs, output_sizes = (getattr(batch, name) for name in names)
        return encode_pairs(inputs, input_sizes, outputs, output_sizes, self.max_tokens)

    def _readings(self, batch: DemoBatch) -> Tensor:
        """Pooled hidden states of each pair, [C, n_qwen_tokens, D] float32, cached or fresh."""
        text = self._text(batch)
        lengths = text.lengths.tolist()
        self.n_pairs += len(lengths)
        self.n_truncated += int(text.truncated.sum())
        readings: list[Tensor | None] = [None] * len(lengths)
        keys: list[bytes] = []
        if self.training and self.cache.interval > 1:
            rows = text.symbols.cpu()
            keys = [self.cache.key(row[:n]) for row, n in zip(rows, lengths, strict=True)]
            readings = [self.cache.get(key) for key in keys]
        groups: dict[int, list[int]] = {}
        for pair, length in enumerate(lengths):
            if readings[pair] is None:
                bucket = next((b for b in LENGTH_BUCKETS if b >= length), -(-length // 512) * 512)
                groups.setdefault(bucket, []).append(pair)
        fresh: dict[int, Tensor] = {}
        for bucket in sorted(groups):
            members = groups[bucket]
            pooled = self._run(text.symbols[members], text.lengths[members], bucket)
            fresh.update(zip(members, pooled.unbind(0), strict=True))
        self._n_fresh = len(fresh)
        for pair, reading in fresh.items():
            readings[pair] = reading
            if keys:
                self.cache.put(keys[pair], reading)
        return torch.stack([reading for reading in readings if reading is not None])

    def _run(self, symbols: Tensor, lengths: Tensor, padded: int) -> Tensor:
        """Run the LM over ``symbols`` [C, S] at length ``padded``; pooled [C, n, D] float32."""
        width = min(padded, symbols.shape[1])
        symbols = functional.pad(symbols[:, :width], (0, padded - width), value=PAD)
        mask = symbols != PAD
        last = torch.arange(padded, device=symbols.device) == lengths[:, None] - 1
        region = (symbols == OUTPUT_MARK).cumsum(1).masked_fill(last, 2)
        with contextlib.ExitStack() as stack:
            if self.train_mode == "frozen":
                stack.enter_context(torch.no_grad())
            hidden = self.backbone(
                input_ids=self.symbol_ids[symbols],  # type: ignore[index]
                attention_mask=mask.long() if self._needs_mask else None,
                use_cache=False,
            ).last_hidden_state
        with torch.autocast(symbols.device.type, enabled=False):
            return self.pool(hidden, region, mask)

    def pair_texts(self, batch: DemoBatch) -> list[str]:
        """What the LM reads for each pair, as text (for people and tests)."""
        text = self._text(batch)
        return ["".join(self.table.texts[s] for s in row) for row in text.symbols.tolist()]

    def without_gradient(self) -> str | None:
        """Why the last training batch gave the language model no gradient; None if it should have."""
        if self.mode in ("no_qwen", "null"):
            return "not run"
        if self.train_mode == "frozen":
            return "frozen"
        return None if self._n_fresh else "not run, readings reused"

    # -- weights -------------------------------------------------------------------------------

    def lm_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the language model (none when frozen): for ``--qwen_lr``."""
        return [p for p in self.backbone.parameters() if p.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        """All other parameters: pooling, projections, control, types."""
        return [p for key, p in self.named_parameters() if not key.startswith("backbone.")]

    def frozen_reference(self) -> dict[str, str] | None:
        """``id``, ``revision`` and ``sha256`` of the frozen weights; None if all are trained."""
        if not self._frozen_names:
            return None
        if self._frozen_sha256 is None:
            digest = hashlib.sha256()
            weights = dict(self.named_parameters())
            for key in sorted(self._frozen_names):
                tensor = weights[key].detach().cpu().contiguous()
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            self._frozen_sha256 = digest.hexdigest()
        return {"id": self.name, "revision": self.revision or "", "sha256": self._frozen_sha256}

    def check_frozen_reference(self, reference: Mapping[str, str] | None) -> None:
        """Raise ModelError unless the frozen weights are the ones a checkpoint was trained on."""
        mine = self.frozen_reference()
        if (mine is None) != (reference is None):
            saved, now = ("frozen", "trained") if mine is None else ("trained", "frozen")
            raise ModelError(
                f"the checkpoint was made with a {saved} language model and this run has it {now}: "
                "use the same --qwen_train"
            )
        if mine and reference and mine["sha256"] != reference["sha256"]:
            raise ModelError(
                f"the checkpoint belongs to the frozen weights of {reference['id']} "
                f"(sha256 {reference['sha256'][:12]}), but {mine['id']} has "
                f"{mine['sha256'][:12]}: use the same --qwen_model, dtype and revision"
            )

    def persistent_state_dict(self) -> dict[str, Tensor]:
        """``state_dict`` without the frozen base weights: what a checkpoint holds."""
        frozen = set(self._frozen_names)
        return {key: value for key, value in self.state_dict().items() if key not in frozen}

    def load_persistent_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``persistent_state_dict`` gave; ModelError names the first key that differs."""
        expected = self.persistent_state_dict()
        for key in sorted(expected.keys() | state.keys()):
            if key not in state or key not in expected:
                where = "missing from the checkpoint" if key in expected else "unknown here"
                raise ModelError(
                    f"prompt weight {key!r} is {where}: use the --qwen_model and --qwen_train that "
                    "the checkpoint was made with"
                )
            if state[key].shape != expected[key].shape:
                raise ModelError(
                    f"prompt weight {key!r} has shape {tuple(state[key].shape)} in the checkpoint "
                    f"and {tuple(expected[key].shape)} here: use the --qwen_model and widths that "
                    "the checkpoint was made with"
                )
        self.load_state_dict(dict(state), strict=False)

    def cache_state(self) -> dict[str, Tensor]:
        """The cache and the counters as tensors, for an exact resume."""
        read = torch.tensor([self.n_pairs, self.n_truncated], dtype=torch.long)
        return {**self.cache.state(), "read": read}

    def load_cache_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``cache_state`` gave."""
        self.cache.load(state, self.start_token.device)
        self.n_pairs, self.n_truncated = (int(count) for count in state["read"])

    def description(self) -> str:
        """One line for the banner: model, sizes, training, dtype and everything noted."""
        weights = list(self.backbone.parameters())
        count = sum(p.numel() for p in weights)
        size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
        revision = f" @ {self.revision[:12]}" if self.revision else ""
        dtype = str(weights[0].dtype).removeprefix("torch.")
        line = f"{self.name}{revision}, {size} parameters, {self.train_mode}, {dtype}"
        return "; ".join([line, *self.notes])


def context_of_next_task(batch: DemoBatch) -> Tensor:
    """``batch.context`` [Q, M] with as many pairs of the next task instead, -1 where none is."""
    context = batch.context
    if batch.n_tasks < 2 or not len(batch.demo_task):
        return torch.full_like(context, -1)
    order = batch.demo_task.argsort(stable=True)
    counts = (batch.demo_task == torch.arange(batch.n_tasks, device=context.device)[:, None]).sum(1)
    first = counts.cumsum(0) - counts
    other = (batch.query_task + 1) % batch.n_tasks
    slot = torch.arange(context.shape[1], device=context.device)
    place = first[other][:, None] + slot % counts[other].clamp(min=1)[:, None]
    usable = (context >= 0) & (counts[other] > 0)[:, None]
    return order[place.clamp(max=len(order) - 1)].masked_fill(~usable, -1)


# --------------------------------------------------------------------------------------------
# Building: which model, from where, trained how


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


def build_qwen_prompt(
    model: str = TINY,
    *,
    width: int,
    n_control: int,
    train: str = "auto",
    device: str | torch.device = "cpu",
    offline: bool = False,
    max_tokens: int = MAX_TOKENS,
    seed: int | torch.Generator = 0,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool | None = None,
    n_qwen_tokens: int = 4,
    cache_interval: int = 1,
    cache_pairs: int = CACHE_PAIRS,
    mode: str = "full",
    revision: str | None = None,
) -> QwenHybridPrompt:
    """Build the prompt module on ``device`` from ``auto``, ``tiny``, a folder or a hub id.

    ``dtype`` is that of the LM's weights: default float32, and bfloat16 for a frozen or LoRA base
    on a GPU that has it natively. ``gradient_checkpointing`` defaults to on for a large model that
    is trained on a GPU. ``offline``: a hub id is taken from the local cache only.
    Raises ModelError (a folder or hub that does not give a model), ValueError (settings).
    """
    device = torch.device(device)
    name, _ = resolve_qwen_model(model, device)
    seed = _as_seed(seed)
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
        _recompute_activations(backbone)
    module = QwenHybridPrompt(
        backbone,
        tokenizer,
        width,
        n_control,
        n_qwen_tokens=n_qwen_tokens,
        max_tokens=max_tokens,
        train_mode=train_mode,
        mode=mode,
        cache_interval=cache_interval,
        cache_pairs=cache_pairs,
        seed=seed,
        name=name,
        revision=revision,
        notes=tuple(notes),
    )
    return module.to(device)


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
    with _seeded(seed):
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
            with _seeded(0):
                config = AutoConfig.from_pretrained(folder, local_files_only=True)
                return AutoModel.from_config(config), None
        with _seeded(0), _quiet_transformers():
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


def _with_lora(backbone: nn.Module) -> nn.Module:
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


def _recompute_activations(backbone: Any) -> None:
    """Trade time for memory in the backward pass; the method was renamed in transformers 5.x."""
    kwargs = {"use_reentrant": False}
    if hasattr(backbone, "activation_checkpointing_enable"):
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _as_seed(seed: int | torch.Generator) -> int:
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**31, (), generator=seed, device=seed.device))
    return seed


@contextlib.contextmanager
def _seeded(seed: int | torch.Generator) -> Iterator[None]:
    """Initialisation draws from ``seed``; the global CPU generator is left as it was."""
    number = _as_seed(seed)
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
