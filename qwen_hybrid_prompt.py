"""Demonstration pairs -> text and control features -> Qwen -> prompt tokens: the hybrid prompt.

Each pair is its own sequence, read once by the language model; one pass serves every query of the
batch, and leave-one-out is the index list ``batch.context``. It never sees a query (neither its
input nor its output), draws no global randomness, prints nothing and opens no file at import.
Use: ``build_qwen_prompt("tiny", width=96, n_control=48)``, then ``prompt = module(batch)``.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from batches import Batch
from command_line import memory_of
from language_model import (
    INPUT_MARK,
    MAX_TOKENS,
    OUTPUT_MARK,
    PAD,
    ROW_END,
    TINY,
    TRAIN_MODES,
    ModelError,
    activation_bytes,
    as_seed,
    load_language_model,
    seeded,
    symbol_table,
    weights_sha256,
    with_lora,
)

MODES = ("full", "no_qwen", "null", "shuffled")
MIN_TOKENS = 64  # one row of 30 cells of each grid and the marks: the rule below always keeps some
# A sequence is padded to the next of these, which depends on its own length alone. A padded length
# that depends on the batch changes the last bits of every row (measured: 1e-6 on CPU). Above 32
# tokens at most a third is padding.
LENGTH_BUCKETS = (
    *(32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512),
    *(640, 768, 896, 1024, 1280, 1536, 1792, 2048),
)
CACHE_PAIRS = 4096  # readings kept for reuse: all 3232 pairs; 100 MB with Qwen2.5-1.5B
# What the states of a trained model may take in one batch, on a CPU, and of a GPU's memory: a batch
# with more tokens is read in parts.
READ_BYTES, READ_SHARE = 4 << 30, 0.125
# A frozen model's states are kept in this much of the RAM, and never in more than so many bytes.
STATES_SHARE, STATES_MOST = 0.25, 32 << 30


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
# Text: grids -> symbols, all by tensor operations


@dataclass(frozen=True)
class PairSymbols:
    """``symbols`` [C, S] long (PAD behind the text; S follows from the grids' canvases alone),
    ``lengths`` [C], ``truncated`` [C] bool."""

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
    n_places = flat.shape[1]
    # What is not real goes to one place more, which is cut off.
    position = (is_real.cumsum(1) - 1).masked_fill(~is_real, n_places)
    symbols = flat.new_full((n_pairs, n_places + 1), PAD).scatter(1, position, flat)
    return PairSymbols(symbols[:, :n_places], is_real.sum(1), rows_kept < sides)


def bucket_of(length: int) -> int:
    """The length in tokens to which a sequence of this length is padded."""
    return next((b for b in LENGTH_BUCKETS if b >= length), -(-length // 512) * 512)


def padded_to(symbols: Tensor, length: int) -> Tensor:
    """``symbols`` [C, S] as [C, length], PAD behind the text, which is not longer than that."""
    width = min(length, symbols.shape[1])
    return functional.pad(symbols[:, :width], (0, length - width), value=PAD)


def regions(symbols: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Region (0 input, 1 output, 2 last position) [C, S] long and mask [C, S] (True: text)."""
    last = torch.arange(symbols.shape[1], device=symbols.device) == lengths[:, None] - 1
    region = (symbols == OUTPUT_MARK).cumsum(1).masked_fill(last, 2)
    return region, symbols != PAD


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

    Keys are digests of token ids, hence of a pair as its task has it. Holds at most ``capacity``
    entries, the one refreshed longest ago goes first; what it decides depends on its content alone,
    and ``state`` holds all of it, so that a resumed run repeats it bit for bit.
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


class KeptStates:
    """What a frozen language model makes of a pair, computed once: its last states, each divided by
    its root mean square, [length, D] float16 in the RAM.

    Nothing in them is trained, so a hit gives the numbers of a miss, bit for bit, and no checkpoint
    holds them. Holds at most ``max_bytes``; what comes when it is full is not kept: pairs come up
    in turn, once an epoch, and a pair that had to leave for a newer one would be gone each time.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be >= 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.n_bytes = self.hits = self.misses = 0
        self._entries: dict[bytes, Tensor] = {}
        self._lock = threading.Lock()  # an evaluation reads several batches at a time

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: object) -> KeptStates:
        return self  # constants: a copy of a system reads the same ones

    def get(self, key: bytes) -> Tensor | None:
        """The pair's states, or None where they have to be computed."""
        with self._lock:
            found = self._entries.get(key)
            self.hits += found is not None
            self.misses += found is None
            return found

    def put(self, key: bytes, states: Tensor) -> None:
        size = states.numel() * states.element_size()
        with self._lock:
            if key not in self._entries and self.n_bytes + size <= self.max_bytes:
                self._entries[key] = states
                self.n_bytes += size

    def description(self) -> str:
        """What has been kept and used so far, in words."""
        return (
            f"{self.misses} pairs read, {self.hits} looked up; {len(self)} kept in "
            f"{self.n_bytes / 1e9:.2f} of {self.max_bytes / 1e9:.1f} GB"
        )


class NoGradient(Enum):
    """Why a batch gave the language model no gradient, in the words of the batch line."""

    NOT_RUN = "not run"
    FROZEN = "frozen"
    REUSED = "not run, readings reused"


class QwenHybridPrompt(nn.Module):
    """Demonstration pairs -> prompt tokens: ``n_qwen_tokens`` of the LM and one control token each.

    Of a batch it reads the demonstrations (demo_* and own_*) and who may see which (query_task,
    n_tasks, context): nothing else of a query. ``backbone`` is a transformers decoder without LM
    head; ``tokenizer`` maps the grid alphabet to its ids (None: ids 0..13). All projections are
    built here, so an optimizer made from ``lm_parameters()`` and ``head_parameters()`` holds every
    trained weight.

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
        states_bytes: int | None = None,
        read_tokens: int | None = None,
        seed: int | torch.Generator = 0,
        name: str = "model",
        revision: str | None = None,
        saved_dtype: torch.dtype | None = None,
        recompute: bool = False,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Sizes in tokens and pairs; ``seed`` decides the new weights; see the class for the rest.
        ``states_bytes``: RAM for a frozen model's states, default STATES_SHARE of what there is.
        ``read_tokens``: of a forward of the LM at most, but a pair; default: no bound.

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
        self.saved_dtype, self.recompute = saved_dtype, recompute
        self.table, self.notes = table, (*notes, *table.notes)
        # A causal model never looks right, where the padding is: no mask, the fast kernel.
        self._needs_mask = not str(getattr(config, "model_type", "")).startswith("qwen")
        self.n_pairs = self.n_truncated = 0
        self.read_tokens = read_tokens
        self._n_fresh = 0  # pairs of the last batch that were really read
        self.cache = ReadingCache(cache_interval, cache_pairs)
        self.states: KeptStates | None = None
        if train_mode == "frozen":
            if states_bytes is None:
                states_bytes = min(STATES_MOST, int(STATES_SHARE * memory_of("cpu")))
            self.states = KeptStates(states_bytes)
        with seeded(seed):
            if train_mode == "lora":
                backbone = with_lora(backbone)
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
        """The decoder itself, without LoRA around it: ``qwen.transformer.layers[0]`` is a block."""
        unwrapped = getattr(self.backbone, "get_base_model", lambda: self.backbone)
        return unwrapped()  # type: ignore[operator]

    def train(self, mode: bool = True) -> QwenHybridPrompt:
        """As nn.Module's; a frozen backbone stays in evaluation."""
        super().train(mode)
        if self.train_mode == "frozen":
            self.backbone.eval()
        return self

    # -- reading -------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Prompt:
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

    def read(self, batch: Batch) -> Tensor:
        """The tokens of each pair, [C, n_qwen_tokens + 1, width] float32; the last is control.

        A pair's tokens depend on that pair alone. In training with a cache, the LM's part may be an
        earlier, detached reading of the same pair; of a frozen LM its states are looked up. The
        projections always get gradient.
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

    def _text(self, batch: Batch) -> PairSymbols:
        """The pairs as symbols: in the batch's view; as the task itself has them with a cache, and
        for a frozen LM.

        Views are random: in its view a pair hardly ever comes up again; a cache would never hit.
        """
        if self.cache.interval == 1 and self.states is None:
            names = ("demo_input", "demo_input_size", "demo_output", "demo_output_size")
        else:
            names = ("own_input", "own_input_size", "own_output", "own_output_size")
        inputs, input_sizes, outputs, output_sizes = (getattr(batch, name) for name in names)
        return encode_pairs(inputs, input_sizes, outputs, output_sizes, self.max_tokens)

    def _readings(self, batch: Batch) -> Tensor:
        """Pooled hidden states of each pair, [C, n_qwen_tokens, D] float32, cached or fresh."""
        text = self._text(batch)
        # the one wait for the device: which pairs are read together is decided here
        lengths, truncated = torch.stack([text.lengths, text.truncated.long()]).tolist()
        if self.training:
            self.n_pairs += len(lengths)
            self.n_truncated += sum(truncated)
        if self.states is not None:
            return self._from_states(self.states, text.symbols, lengths)
        readings: list[Tensor | None] = [None] * len(lengths)
        keys: list[bytes] = []
        if self.training and self.cache.interval > 1:
            on_cpu = text.symbols.cpu()
            keys = [self.cache.key(row[:n]) for row, n in zip(on_cpu, lengths, strict=True)]
            readings = [self.cache.get(key) for key in keys]
        groups: dict[int, list[int]] = {}
        for pair, length in enumerate(lengths):
            if readings[pair] is None:
                groups.setdefault(bucket_of(length), []).append(pair)
        fresh: dict[int, Tensor] = {}
        for members, bucket, again in self._parts(groups):
            rows = torch.tensor(members).to(text.symbols.device, non_blocking=True)
            pooled = self._run(text.symbols[rows], text.lengths[rows], bucket, again)
            fresh.update(zip(members, pooled.unbind(0), strict=True))
        if self.training:
            self._n_fresh = len(fresh)
        for pair, reading in fresh.items():
            readings[pair] = reading
            if keys:
                self.cache.put(keys[pair], reading)
        return torch.stack([reading for reading in readings if reading is not None])

    def _parts(self, groups: Mapping[int, list[int]]) -> Iterator[tuple[list[int], int, bool]]:
        """The forwards of a batch: pairs, their padded length, and whether the backward pass is to
        run the forward again. One forward a length, unless all of them together have more than
        `read_tokens`: then parts of at most so many tokens, and only one part's activations at a
        time."""
        total = sum(bucket * len(members) for bucket, members in groups.items())
        most = self.read_tokens
        for bucket in sorted(groups):
            members = groups[bucket]
            if most is None or total <= most:
                yield members, bucket, False
                continue
            step = max(1, most // bucket)
            for start in range(0, len(members), step):
                yield members[start : start + step], bucket, torch.is_grad_enabled()

    def _run(self, symbols: Tensor, lengths: Tensor, padded: int, again: bool) -> Tensor:
        """Run the LM over ``symbols`` [C, S] at length ``padded``; pooled [C, n, D] float32.

        again: keep nothing for the backward pass, which runs this once more.
        """
        if again:
            return checkpoint(  # type: ignore[no-any-return]
                self._run, symbols, lengths, padded, False,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        symbols = padded_to(symbols, padded)
        region, mask = regions(symbols, lengths)
        hidden = self.backbone(
            input_ids=self.symbol_ids[symbols],  # type: ignore[index]
            attention_mask=mask.long() if self._needs_mask else None,
            use_cache=False,
        ).last_hidden_state
        with torch.autocast(symbols.device.type, enabled=False):
            return self.pool(hidden, region, mask)

    def _from_states(self, kept: KeptStates, symbols: Tensor, lengths: list[int]) -> Tensor:
        """Pooled states of each pair of a frozen LM, [C, n_qwen_tokens, D] float32.

        The LM reads a pair by itself, at its own length: what is kept depends on nothing else.
        """
        device = symbols.device
        autocast = torch.is_autocast_enabled(device.type)
        precision = str(torch.get_autocast_dtype(device.type) if autocast else "").encode()
        found: list[Tensor] = []
        for row, host, length in zip(symbols, symbols.cpu(), lengths, strict=True):
            key = self.cache.key(host[:length]) + precision
            states = kept.get(key)
            if states is None:
                states = self._states(row[None, :length])
                kept.put(key, states)
            found.append(states)
        groups: dict[int, list[int]] = {}
        for pair, length in enumerate(lengths):
            groups.setdefault(bucket_of(length), []).append(pair)
        pooled: dict[int, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            for bucket in sorted(groups):
                members = groups[bucket]
                ends = torch.tensor([lengths[m] for m in members], device=device)
                region, mask = regions(padded_to(symbols[members], bucket), ends)
                hidden = found[0].new_zeros(len(members), bucket, found[0].shape[-1])
                for place, member in enumerate(members):
                    hidden[place, : lengths[member]] = found[member]
                out = self.pool(hidden.to(device), region, mask)
                pooled.update(zip(members, out.unbind(0), strict=True))
        return torch.stack([pooled[pair] for pair in range(len(lengths))])

    @torch.no_grad()
    def _states(self, symbols: Tensor) -> Tensor:
        """What `KeptStates` keeps of one pair: ``symbols`` [1, S] -> [S, D] float16, in the RAM."""
        ids = self.symbol_ids[symbols]  # type: ignore[index]
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        return functional.rms_norm(hidden.float(), hidden.shape[-1:]).to(torch.float16).cpu()

    def without_gradient(self) -> NoGradient | None:
        """Why the last training batch gave the LM no gradient; None if it should have."""
        if self.mode in ("no_qwen", "null"):
            return NoGradient.NOT_RUN
        if self.train_mode == "frozen":
            return NoGradient.FROZEN
        return None if self._n_fresh else NoGradient.REUSED

    def bytes_per_token(self, half: bool = False) -> int:
        """`language_model.activation_bytes` of the LM; half: under autocast."""
        config: Any = self.transformer.config
        dtype = next(self.backbone.parameters()).dtype
        return activation_bytes(
            config, self.train_mode, half=half, recompute=self.recompute, dtype=dtype
        )

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
            weights = dict(self.named_parameters())
            frozen = {key: weights[key] for key in self._frozen_names}
            self._frozen_sha256 = weights_sha256(frozen, self.saved_dtype)
        return {"id": self.name, "revision": self.revision or "", "sha256": self._frozen_sha256}

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

    def merge_adapters(self) -> None:
        """LoRA's adapters become part of the weights they adapt: from now on a plain model, all of
        which counts as trained. Its numbers stay the same up to rounding."""
        if self.train_mode != "lora":
            return
        self.backbone = self.backbone.merge_and_unload()  # type: ignore[operator]
        self.train_mode, self._frozen_names, self._frozen_sha256 = "full", (), None

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
        if self.states is not None:
            line += f", its states kept in up to {self.states.max_bytes / 1e9:.1f} GB of RAM"
        return "; ".join([line, *self.notes])


def context_of_next_task(batch: Batch) -> Tensor:
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
# Building


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
    states_bytes: int | None = None,
    read_tokens: int | None = None,
    mode: str = "full",
    revision: str | None = None,
    weights: bool = True,
) -> QwenHybridPrompt:
    """Build the prompt module on ``device`` from ``auto``, ``tiny``, a folder or a hub id.

    ``train``, ``offline``, ``dtype``, ``gradient_checkpointing``, ``revision`` and ``weights`` are
    settings of `language_model.load_language_model`, the others those of QwenHybridPrompt.
    Raises ModelError (a folder or hub that does not give a model), ValueError (settings).
    """
    device = torch.device(device)
    seed = as_seed(seed)
    language_model = load_language_model(
        model,
        train=train,
        device=device,
        offline=offline,
        seed=seed,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        revision=revision,
        weights=weights,
    )
    module = QwenHybridPrompt(
        language_model.backbone,
        language_model.tokenizer,
        width,
        n_control,
        n_qwen_tokens=n_qwen_tokens,
        max_tokens=max_tokens,
        train_mode=language_model.train_mode,
        mode=mode,
        cache_interval=cache_interval,
        cache_pairs=cache_pairs,
        states_bytes=states_bytes,
        read_tokens=read_tokens,
        seed=seed,
        name=language_model.name,
        revision=language_model.revision,
        saved_dtype=language_model.saved_dtype,
        recompute=language_model.recompute,
        notes=language_model.notes,
    )
    per_token = module.bytes_per_token()
    if read_tokens is None and per_token:
        room = READ_BYTES if device.type == "cpu" else int(READ_SHARE * memory_of(str(device)))
        module.read_tokens = max(MAX_TOKENS, room // per_token)
    return module.to(next(module.backbone.parameters()).device)
