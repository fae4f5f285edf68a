"""The agent: an input grid and a prompt in, five planning steps of colour logits out.

One output cell is one token. The same block is applied once per planning step and the answer so
far is fed back, so five steps are five refinements of one state. Every cell ends as a learned
pointer over elementary transforms of the input (`grid_transforms`), whose weights are read off
similar cells of the demonstrations, plus ten constant colours. A size head points at size rules.

It does not know about losses, tasks' outputs or files. `from arc_agent import ArcAgent`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches import Batch, bare_batch, generator
from demonstration_cells import (
    Cells,
    DemonstrationCells,
    Group,
    context_cells,
    groups_of,
    layout,
    places,
    take,
    take_heads,
)
from fast_math import bag_sum, positive_solver, rms_norm
from grid_accuracy_loss import resize_turned, size_mask
from grid_features import CELL_FEATURE_BINS, N_CELL_FEATURES
from grid_parts import COLOURS, MAX_SIDE, OUTSIDE
from grid_transforms import N_SOURCES
from hypotheses import N_PROPOSAL_FACTS, VERDICTS

N_STEPS = 5  # planning steps; fixed by the contract logits [5, H, W, 10]
N_SURE = 4  # figures of an answer that its confidence is judged by, see `sureness`
N_RELATIONS = 4  # outside, same as the identity source, background, another colour
N_POINTERS = N_SOURCES + COLOURS  # what an output cell can point at
RIDGE_FLOOR = 1e-2  # keeps the fit's matrix positive, also where a GPU multiplies in TF32
N_SHOWN = 9  # what an answer shows at a cell of the input: eight orientations, and from the corner
N_BACKWARD_POINTERS = N_SHOWN + COLOURS
BACKWARD_FLOOR = 1e-5  # guess: the least probability of a colour that the backward model gives
PROPOSAL_GAINS = (4.0, 2.0, 0.5, -0.5, -1.0)  # guess; by verdict, learned from there
EVIDENCE_FLOOR = 1e-3  # guess: a pointer never seen right keeps log(1e-3) of evidence


Keys = tuple[Tensor, Tensor, Tensor]  # keys, values (N, heads, M, head_dim), mask (N, M)


@dataclass(frozen=True)
class AgentConfig:
    """Shape of the agent. Widths in channels; `n_steps` is what the planning loop runs."""

    width: int = 96
    heads: int = 2
    blocks: int = 1
    encoder_blocks: int = 1
    mlp_ratio: float = 2.0
    n_steps: int = N_STEPS
    pointer_heads: int = 4
    pointer_width: int = 24
    backward_width: int = 16
    rule_width: int = 128
    rule_steps: int = 2
    n_size_candidates: int = 0
    max_context_cells: int = 256  # of the demonstrations, looked at cell by cell
    max_rule_cells: int = 1024  # of the demonstrations, for the fitted rule


@dataclass
class Sight:
    """What the agent sees of a batch's queries before any prompt: made once, planned from often.

    cells (Q, cells, width) encoded, after a look at the demonstrations' cells; evidence and outside
    (Q, cells, N_POINTERS); sources (Q, cells, K) int64.
    """

    cells: Tensor
    evidence: Tensor
    outside: Tensor
    sources: Tensor


@dataclass
class Proposal:
    """One proposed answer a query.

    colours (Q, H, W) int64, -1 outside; size (Q, 2) int64, 0 where a query has none; facts
    (Q, N_PROPOSAL_FACTS) float32 (`hypotheses.PROPOSAL_FACTS`).
    """

    colours: Tensor
    size: Tensor
    facts: Tensor

    @property
    def given(self) -> Tensor:
        """(Q,) bool: which queries have one."""
        return (self.size > 0).all(-1)

    @property
    def verdict(self) -> Tensor:
        """(Q,) int64: place in `hypotheses.VERDICTS`."""
        return self.facts[:, : len(VERDICTS)].argmax(-1)


@dataclass
class AgentOutput:
    """The answers of one planning pass. Q queries, H x W the batch's canvas.

    logits (steps, Q, H, W, 10) float32, log-probabilities per planning step;
    size_logits (Q, 2, 30) float32 over rows and cols 1..30; size (Q, 2) int64, the size the
    agent answers with (never larger than the query's canvas); confidence (steps, Q) float32
    logits of the expected share of right cells; n_steps (Q,) int64, the planning steps really
    taken: after an early stop the answer that stood is repeated.
    """

    logits: Tensor
    size_logits: Tensor
    size: Tensor
    confidence: Tensor
    n_steps: Tensor

    def grids(self, step: int = -1) -> Tensor:
        """Colours (Q, H, W) int64 of one planning step, -1 outside the predicted size."""
        colours = self.logits[step].argmax(-1)
        inside = size_mask(self.size, colours.shape[1], colours.shape[2])
        return torch.where(inside, colours, torch.full_like(colours, -1))


def rotary_table(rows: int, cols: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """2D rotary angles: cos, sin (rows * cols, dim // 2); half the pairs turn with the row."""
    n_freq = dim // 4
    freq = torch.logspace(0, -2, n_freq, base=10.0, device=device)  # periods ~6 to ~600 cells
    row = torch.arange(rows, device=device, dtype=torch.float32)[:, None] * freq
    col = torch.arange(cols, device=device, dtype=torch.float32)[:, None] * freq
    angle = torch.cat(
        [
            row[:, None, :].expand(rows, cols, n_freq),
            col[None, :, :].expand(rows, cols, n_freq),
        ],
        dim=-1,
    ).reshape(rows * cols, 2 * n_freq)
    return angle.cos(), angle.sin()


def rotary_at(place: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The angles of cells at `place` (N,), row * MAX_SIDE + col: cos, sin (N, dim // 2)."""
    cos, sin = rotary_table(MAX_SIDE, MAX_SIDE, dim, place.device)
    return cos[place], sin[place]


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first part of each head's channels by position; x (..., cells, head_dim)."""
    cos, sin = table
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def rotary_dim(head_dim: int) -> int:
    """Half of the channels carry position, in fours (row and col, cos and sin)."""
    return max(4, head_dim // 2 // 4 * 4)


class RmsNorm(nn.RMSNorm):
    """RMSNorm whose gain follows the input's precision under autocast (no mixed-type kernel)."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class CellEmbedding(nn.Module):
    """Source planes and cell features -> one vector per canvas cell.

    Each source enters twice: by colour, and by how it relates to the identity source (same,
    background, other), which no colour permutation changes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        n_absolute = N_SOURCES * (COLOURS + 1)
        n_relation = N_SOURCES * N_RELATIONS
        n_feature = N_CELL_FEATURES * (CELL_FEATURE_BINS + 1)
        self.table = nn.Embedding(n_absolute + n_relation + n_feature, width)
        nn.init.normal_(self.table.weight, std=1.0 / math.sqrt(2 * N_SOURCES + N_CELL_FEATURES))
        offsets = torch.cat(
            [
                torch.arange(N_SOURCES) * (COLOURS + 1),
                n_absolute + torch.arange(N_SOURCES) * N_RELATIONS,
                n_absolute + n_relation + torch.arange(N_CELL_FEATURES) * (CELL_FEATURE_BINS + 1),
            ]
        )
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, sources: Tensor, cells: Tensor) -> Tensor:
        """sources (N, K, H, W), cells (N, F, H, W) uint8 -> (N, H * W, width)."""
        n = sources.shape[0]
        planes = sources.flatten(2).transpose(1, 2).to(torch.int32)  # (N, cells, K)
        identity = planes[..., :1]
        relation = torch.where(planes == 0, 2, 3)
        relation = torch.where(planes == identity, 1, relation)
        relation = torch.where(planes == OUTSIDE, 0, relation)
        features = cells.flatten(2).transpose(1, 2).to(torch.int32)
        index = torch.cat([planes, relation.to(torch.int32), features], dim=-1)
        index = index + self.offsets.to(torch.int32)  # type: ignore[operator]
        bag = bag_sum(index.flatten(0, 1), self.table.weight)
        return bag.view(n, planes.shape[1], -1)


class Place(nn.Module):
    """Where a cell lies in its grid: distances to the four sides, as learned vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(4 * (MAX_SIDE + 1), width)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, size: Tensor, rows: int, cols: int) -> Tensor:
        """size (N, 2) -> (N, rows * cols, width)."""
        row = torch.arange(rows, device=size.device)
        col = torch.arange(cols, device=size.device)
        below = (size[:, :1] - 1 - row).clamp(0, MAX_SIDE)
        beside = (size[:, 1:] - 1 - col).clamp(0, MAX_SIDE)
        stride = MAX_SIDE + 1
        by_row = self.table(row) + self.table(below + 2 * stride)  # (N, rows, width)
        by_col = self.table(col + stride) + self.table(beside + 3 * stride)
        return (by_row[:, :, None] + by_col[:, None, :]).flatten(1, 2)


class Mlp(nn.Module):
    """SwiGLU over cells with a depthwise 3x3 before it, so that neighbours meet cheaply."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.norm = RmsNorm(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor, rows: int, cols: int) -> Tensor:
        """x (N, rows * cols, width), mask (N, rows * cols) bool -> x plus what the MLP adds."""
        y = self.norm(x) * mask.unsqueeze(-1)
        grid = y.view(x.shape[0], rows, cols, -1).permute(0, 3, 1, 2)
        y = y + self.depthwise(grid).permute(0, 2, 3, 1).flatten(1, 2)
        gate, up = self.gate_up(y).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class SelfAttention(nn.Module):
    """Attention among the cells of one grid, 2D rotary positions, queries and keys normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm = RmsNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RmsNorm(self.head_dim)
        self.k_norm = RmsNorm(self.head_dim)
        self.out = nn.Linear(width, width, bias=False)

    def heads_of(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, turned by position, and values, each (n, heads, cells, head_dim)."""
        n, cells, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(n, cells, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(self, x: Tensor, mask: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x (N, cells, width), mask (N, cells) bool of the cells looked at, table of
        `rotary_table` -> x plus what attention adds."""
        n, cells, width = x.shape
        q, k, v = self.heads_of(x, table)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return x + self.out(y.transpose(1, 2).reshape(n, cells, width))


class AxialAttention(SelfAttention):
    """Half of the heads (rounded down) look along the cell's row, the others along its column.

    On 25 x 25 cells a fifth of the time of attention among all of them (one CPU thread).
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor, table: tuple[Tensor, Tensor], rows: int, cols: int
    ) -> Tensor:
        """As `SelfAttention.forward`, of cells that lie as (rows, cols)."""
        n, cells, width = x.shape
        q, k, v = self.heads_of(x, table)
        half = self.heads // 2
        inside = mask.view(n, rows, cols)
        grid = (n, self.heads, rows, cols, self.head_dim)
        q, k, v = (y.reshape(grid) for y in (q, k, v))
        # Four dimensions: with five, torch leaves its fast kernel (1.5 to 2 times the time on CPU).
        rq, rk, rv = (y[:, :half].transpose(1, 2).flatten(0, 1) for y in (q, k, v))
        by_row = F.scaled_dot_product_attention(
            rq, rk, rv, attn_mask=_some(inside).flatten(0, 1)[:, None, None]
        ).view(n, rows, half, cols, self.head_dim)
        cq, ck, cv = (y[:, half:].permute(0, 3, 1, 2, 4).flatten(0, 1) for y in (q, k, v))
        by_col = F.scaled_dot_product_attention(
            cq, ck, cv, attn_mask=_some(inside.transpose(1, 2)).flatten(0, 1)[:, None, None]
        ).view(n, cols, self.heads - half, rows, self.head_dim)
        y = torch.cat([by_row.permute(0, 1, 3, 2, 4), by_col.permute(0, 3, 1, 2, 4)], dim=3)
        return x + self.out(y.reshape(n, cells, width))


class CrossAttention(nn.Module):
    """Cells look at keys that do not change between planning steps; a null slot is always there."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm = RmsNorm(width)
        self.key_norm = RmsNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.q_norm = RmsNorm(self.head_dim)
        self.k_norm = RmsNorm(self.head_dim)
        self.out = nn.Linear(width, width, bias=False)
        self.null = nn.Parameter(torch.zeros(2, heads, self.head_dim))

    def keys(self, tokens: Tensor, table: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """tokens (N, cells, width) -> keys, values (N, heads, cells, head_dim)."""
        n, cells, _ = tokens.shape
        kv = self.kv(self.key_norm(tokens)).view(n, cells, 2, self.heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)
        k = self.k_norm(k)
        if table is not None:
            k = rotate(k, table)
        return k.to(v.dtype), v

    def add_null(self, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append the null slot so that a query without any key still has one."""
        n = k.shape[0]
        null = self.null.to(k.dtype)[:, None, :, None].expand(2, n, -1, 1, -1)
        mask = torch.cat([mask, mask.new_ones(n, 1)], dim=1)
        return torch.cat([k, null[0]], dim=2), torch.cat([v, null[1]], dim=2), mask

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor, table: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """x (N, cells, width); k, v (N, heads, M, head_dim) and mask (N, M) bool of the keys, null
        slot included -> x plus what attention adds."""
        n, cells, width = x.shape
        q = self.q(self.norm(x)).view(n, cells, self.heads, self.head_dim).transpose(1, 2)
        q = self.q_norm(q)
        if table is not None:
            q = rotate(q, table)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k, v, attn_mask=mask[:, None, None])
        return x + self.out(y.transpose(1, 2).reshape(n, cells, width))


class EncoderBlock(nn.Module):
    """Cells of one grid meet each other: attention, then the MLP with its 3x3."""

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads)
        self.mlp = Mlp(config.width, config.mlp_ratio)

    def forward(
        self, x: Tensor, mask: Tensor, table: tuple[Tensor, Tensor], rows: int, cols: int
    ) -> Tensor:
        """x (N, rows * cols, width), mask (N, rows * cols) bool -> the same shape as x."""
        return self.mlp(self.attention(x, mask, table), mask, rows, cols)


class PlanningBlock(nn.Module):
    """One planning step: attention to the prompt, to the cell's row and column, then the MLP."""

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.prompt = CrossAttention(config.width, config.heads)
        self.own = AxialAttention(config.width, config.heads)
        self.mlp = Mlp(config.width, config.mlp_ratio)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        prompt: Keys,
        table: tuple[Tensor, Tensor],
        rows: int,
        cols: int,
    ) -> Tensor:
        """x (Q, rows * cols, width), mask (Q, rows * cols) bool of the answer's cells, prompt: the
        keys, values and mask of its tokens -> the same shape as x."""
        x = self.prompt(x, *prompt, None)
        return self.mlp(self.own(x, mask, table, rows, cols), mask, rows, cols)


class PointerHead(nn.Module):
    """Output colours as pointers over sources and constants, with evidence from demonstrations.

    Each cell looks for demonstration cells like itself; `right` of those cells, averaged by
    attention, is the evidence that a pointer is right here. Colour permutations commute with it.
    """

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.pointer_heads, config.pointer_width
        self.norm = RmsNorm(config.width)
        self.key_norm = RmsNorm(config.width)
        inner = self.heads * self.head_dim
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)  # equal cells attend from the start
        self.scale = nn.Parameter(torch.full((self.heads,), 1.0))
        self.evidence = nn.Parameter(torch.full((self.heads, N_POINTERS), 0.5 / self.heads))
        self.global_evidence = nn.Parameter(torch.full((N_POINTERS,), 0.1))
        self.to_pointer = nn.Linear(config.width, N_POINTERS)
        self.to_proposed = nn.Linear(config.width, 1, bias=False)
        nn.init.zeros_(self.to_pointer.weight)
        nn.init.zeros_(self.to_pointer.bias)
        nn.init.zeros_(self.to_proposed.weight)

    def keys(self, tokens: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """tokens (N, cells, width) -> keys (N, heads, cells, head_dim) float32 of length 1."""
        n, cells, _ = tokens.shape
        k = self.key(self.key_norm(tokens)).view(n, cells, self.heads, self.head_dim)
        return rotate(F.normalize(k.float(), dim=-1).transpose(1, 2), table)

    def evidence_of(
        self,
        x: Tensor,
        keys: Tensor,
        right: Tensor,
        mask: Tensor,
        table: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Log-evidence (Q, cells, N_POINTERS) float32 that each pointer is right at each cell.

        x (Q, cells, width); keys (Q, heads, M, head_dim) and right (Q, M, N_POINTERS) of the
        demonstration cells a query sees; mask (Q, M) bool. 0 for a query without demonstrations.
        """
        n, cells, _ = x.shape
        q = self.query(self.norm(x)).view(n, cells, self.heads, self.head_dim)
        q = rotate(F.normalize(q.float(), dim=-1).transpose(1, 2), table)
        q = q * (self.head_dim * self.scale.view(1, -1, 1, 1))
        bias = torch.where(mask, 0.0, -1e4)[:, None, None]
        score = torch.matmul(q, keys.transpose(-1, -2)) + bias  # (Q, heads, cells, M)
        weight = score.softmax(-1)
        share = torch.matmul(weight.flatten(1, 2).to(right.dtype), right)
        share = share.view(n, self.heads, cells, N_POINTERS).float()
        log_share = (share + EVIDENCE_FLOOR).log()
        found = torch.einsum("qhcp,hp->qcp", log_share, self.evidence.float())
        overall = (right * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        everywhere = (overall.float() + EVIDENCE_FLOOR).log() * self.global_evidence.float()
        has_context = mask.any(-1).view(-1, 1, 1)
        return torch.where(has_context, found + everywhere[:, None], 0.0)

    def forward(
        self,
        x: Tensor,
        sources: Tensor,
        outside: Tensor,
        evidence: Tensor,
        proposed: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Log-probabilities of colours (Q, cells, 10) float32.

        x (Q, cells, width); sources (Q, cells, K) int64; outside (Q, cells, N_POINTERS) bool;
        evidence (Q, cells, N_POINTERS) from `evidence_of` and the fitted rule. proposed: one more
        pointer, the colour that a proposed answer shows (Q, cells) int64, -1 none, and its log-odds
        (Q,) against all others, to which the cell adds its own.
        """
        n, cells, _ = x.shape
        pointer = evidence + self.to_pointer(self.norm(x)).float()
        weight = pointer.masked_fill(outside, -1e4).softmax(-1)
        mass = weight.new_zeros(n, cells, COLOURS + 1)
        mass = mass.scatter_add(-1, sources, weight[..., :N_SOURCES])[..., :COLOURS]
        mass = mass + weight[..., N_SOURCES:]
        if proposed is not None:
            colour, odds = proposed
            share = (odds[:, None] + self.to_proposed(self.norm(x)).float().squeeze(-1)).sigmoid()
            share = torch.where(colour >= 0, share, 0.0).unsqueeze(-1)
            mass = (1.0 - share) * mass + share * F.one_hot(colour.clamp(min=0), COLOURS)
        return mass.clamp_min(1e-7).log()


class RuleFit(nn.Module):
    """A linear rule per query, from cell features to pointers, fitted to its demonstrations.

    Ridge regression in closed form to "this pointer is right here", then a few preconditioned
    gradient steps on the log-likelihood of the demonstrated colours, in which pointers compete for
    a cell (Boehning's bound: the ridge's factor is kept). All of it is differentiable, so the
    features learn to be those by which linear rules carry over to the next input (Bertinetto et
    al. 2019, R2-D2). No task has weights of its own here.
    """

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.norm = RmsNorm(config.width)
        self.raw_norm = RmsNorm(config.width)
        self.features = nn.Linear(2 * config.width, config.rule_width)
        self.log_ridge = nn.Parameter(torch.tensor(-4.0))
        self.log_changed = nn.Parameter(torch.tensor(1.0))
        self.gain = nn.Parameter(torch.full((N_POINTERS,), 4.0))
        self.prior = nn.Parameter(torch.zeros(N_POINTERS))
        self.step_size = nn.Parameter(torch.ones(config.rule_steps))

    def of(self, x: Tensor, raw: Tensor) -> Tensor:
        """Features (N, cells, rule_width + 1) float32, the last one 1, of cells (N, cells, width)
        after and before the encoder."""
        y = self.features(torch.cat([self.norm(x), self.raw_norm(raw)], dim=-1))
        return F.pad(F.silu(y.float()), (0, 1), value=1.0)

    def forward(self, query: Tensor, seen: Tensor, right: Tensor, mask: Tensor) -> Tensor:
        """The fitted rule's scores (Q, cells, N_POINTERS) float32; 0 without demonstrations.

        query (Q, cells, R) features; seen (Q, M, R) features, right (Q, M, N_POINTERS) and mask
        (Q, M) bool of the demonstration cells that a query sees. Cells that differ from the input
        weigh more.
        """
        with torch.autocast(query.device.type, enabled=False):
            # ridge regression of `right` on the features, weighted by cell
            changed = 1.0 - right[..., :1]  # pointer 0 is the input's own colour
            weight = mask.unsqueeze(-1) * (1.0 + self.log_changed.exp() * changed)
            weight = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
            rule, failed = fitted_rule(
                seen, right, weight, self.log_ridge, self.gain, self.prior, self.step_size
            )
            score = query @ rule + self.prior
        fitted = mask.any(-1) & (failed == 0)
        return torch.where(fitted.view(-1, 1, 1), score, 0.0)


class SizeHead(nn.Module):
    """Rows and cols of the answer: pointers over size rules with their support, plus 30 numbers."""

    def __init__(self, width: int, n_candidates: int) -> None:
        super().__init__()
        self.support = nn.Parameter(torch.full((n_candidates,), 4.0))
        self.full_support = nn.Parameter(torch.full((n_candidates,), 2.0))
        self.rule = nn.Linear(width, n_candidates)
        self.free = nn.Linear(width, 2 * MAX_SIDE)
        for layer in (self.rule, self.free):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, summary: Tensor, candidates: Tensor, support: Tensor) -> Tensor:
        """summary (Q, width), candidates (Q, 2, S) int64 0 = absent, support (Q, 2, S) ->
        log-probabilities (Q, 2, 30) float32."""
        full = (support > 0.999).float()
        score = self.support * support + self.full_support * full
        score = score + self.rule(summary).float()[:, None]
        score = score.masked_fill(candidates == 0, -1e4)
        free = self.free(summary).float().view(-1, 2, MAX_SIDE)
        weight = torch.cat([score.float(), free], dim=-1).softmax(-1)
        mass = weight.new_zeros(*candidates.shape[:2], MAX_SIDE + 1)
        mass = mass.scatter_add(-1, candidates, weight[..., : candidates.shape[-1]])[..., 1:]
        return (mass + weight[..., candidates.shape[-1] :]).clamp_min(1e-7).log()


class BackwardModel(nn.Module):
    """From an answer back to the input: a colour distribution for every cell of the input.

    Each cell of the input points at what the answer shows there, in its eight orientations resized
    to the input and cell by cell from the corner, or at a constant colour. Which pointer is right
    is learned, and fitted in closed form to the demonstrations read from output to input (as
    `RuleFit` does it forwards): that knows the inverse of this task's rule. It never sees the
    colours of the query's input, nor its target; training gives it the target as an answer.
    """

    def __init__(self, width: int, prompt_width: int, max_cells: int = 256) -> None:
        super().__init__()
        self.max_cells = max_cells
        self.embed = nn.Linear(COLOURS, width)
        self.place = Place(width)
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.overall = nn.Linear(width, width)
        self.near_norm = RmsNorm(width)
        self.mix = nn.Linear(width, width)
        self.film = nn.Linear(prompt_width, width)
        self.norm = RmsNorm(width)
        self.to_pointer = nn.Linear(width, N_BACKWARD_POINTERS)
        nn.init.normal_(self.to_pointer.weight, std=0.02)
        nn.init.zeros_(self.to_pointer.bias)
        with torch.no_grad():
            self.to_pointer.bias[0] = 2.0  # a copy, until it has learned better
        self.log_ridge = nn.Parameter(torch.tensor(-4.0))
        self.gain = nn.Parameter(torch.full((N_BACKWARD_POINTERS,), 4.0))
        self.step_size = nn.Parameter(torch.ones(1))

    def see(
        self, colours: Tensor, size: Tensor, input_size: Tensor, canvas: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What an answer shows at each cell of its input, and what the rule is fitted on.

        colours (N, H, W, 10) probabilities of the answer, size (N, 2) of it, input_size (N, 2),
        canvas of the inputs -> cells (N, cells, width), shown (N, cells, N_SHOWN, 10) float32 and
        features (N, cells, R) float32, the last one 1.
        """
        n = len(colours)
        answer = size_mask(size, *colours.shape[1:3]).unsqueeze(-1)
        real = size_mask(input_size, *canvas)
        turned = resize_turned(colours, size, input_size, canvas)
        corner = _on_canvas(colours.float() * answer, canvas) * real.unsqueeze(-1)
        shown = torch.cat([turned, corner.unsqueeze(1)], dim=1).flatten(2, 3).transpose(1, 2)
        x = self.embed(shown[:, :, 0]) + self.place(input_size, *canvas)
        x = x * real.flatten(1).unsqueeze(-1)
        grid = x.view(n, *canvas, -1).permute(0, 3, 1, 2)
        near = self.near(grid).permute(0, 2, 3, 1).flatten(1, 2)
        share = (colours.float() * answer).sum((1, 2)) / answer.sum((1, 2)).clamp(min=1)
        near = near + self.overall(self.embed((share + 1e-6).sqrt())).unsqueeze(1)
        x = x + self.mix(F.silu(self.near_norm(near)))
        alike = (shown[:, :, 1:] * shown[:, :, :1]).sum(-1)
        features = torch.cat([F.silu(self.norm(x).float()), shown[:, :, 0], alike], dim=-1)
        return x, shown, F.pad(features, (0, 1), value=1.0)

    def fit(self, batch: Batch) -> Tensor:
        """The rule from output to input (Q, R, N_BACKWARD_POINTERS) float32 of each query's
        demonstrations; 0 for a query without any."""
        output, canvas = batch.demo_output, (batch.demo_input.shape[1], batch.demo_input.shape[2])
        rows, cols = batch.demo_output_size.unbind(1)
        shown_size = rows.clamp(max=output.shape[1]), cols.clamp(max=output.shape[2])
        _, shown, features = self.see(
            F.one_hot(output.clamp(min=0), COLOURS).float(),
            torch.stack(shown_size, 1),
            batch.demo_input_size,
            canvas,
        )
        colour = batch.demo_input.flatten(1)
        index = colour.clamp(min=0)[..., None, None].expand(-1, -1, N_SHOWN, 1)
        constant = F.one_hot(colour.clamp(min=0), COLOURS).float()
        right = torch.cat([shown.gather(-1, index).squeeze(-1), constant], dim=-1)
        features, right, mask = features.flatten(0, 1), right.flatten(0, 1), (colour >= 0).flatten()
        n, cells = colour.shape
        demos = Cells(
            mask=mask,
            right=right,
            place=places(*canvas, colour.device).repeat(n),
            first=torch.arange(n, device=colour.device) * cells,
            count=torch.full((n,), cells, device=colour.device),
            largest=cells,
            most_seen=batch.context.shape[1] * cells,
        )
        where, seen = context_cells(demos, batch.context, self.max_cells)
        features, right = take(features, where), take(right, where)
        with torch.autocast(features.device.type, enabled=False):
            weight = seen.float() / seen.sum(1, keepdim=True).clamp(min=1)
            rule, failed = fitted_rule(
                features,
                right,
                weight.unsqueeze(-1),
                self.log_ridge,
                self.gain,
                self.to_pointer.bias,
                self.step_size,
                floor=1e-6,
            )
        fitted = seen.any(-1) & (failed == 0)
        return torch.where(fitted.view(-1, 1, 1), rule, 0.0)

    def forward(
        self,
        colours: Tensor,
        size: Tensor,
        input_size: Tensor,
        canvas: tuple[int, int],
        summary: Tensor,
        rule: Tensor,
    ) -> Tensor:
        """colours (Q, H, W, 10) probabilities of the answer, size (Q, 2) of it, input_size (Q, 2),
        canvas of the inputs, rule from `fit` -> log-probabilities (Q, rows, cols, 10) float32 over
        the input's cells."""
        x, shown, features = self.see(colours, size, input_size, canvas)
        learned = self.to_pointer(self.norm(x + self.film(summary).unsqueeze(1)))
        with torch.autocast(features.device.type, enabled=False):
            weight = (learned.float() + features @ rule).softmax(-1)
            recovered = torch.matmul(weight[..., None, :N_SHOWN], shown).squeeze(-2)
            recovered = recovered + weight[..., N_SHOWN:]
        return recovered.clamp_min(BACKWARD_FLOOR).log().view(len(x), *canvas, COLOURS)


class ArcAgent(nn.Module):
    """Five planning steps from prompt and input to the output grid. See the module docstring."""

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embed = CellEmbedding(width)
        self.place = Place(width)
        self.answer = nn.Linear(COLOURS, width, bias=False)
        self.right = nn.Linear(N_POINTERS, width, bias=False)
        nn.init.normal_(self.right.weight, std=1.0 / math.sqrt(N_POINTERS))
        self.film = nn.Linear(width, width, bias=False)
        self.step_token = nn.Parameter(torch.zeros(config.n_steps, width))
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_blocks))
        self.demonstrations = CrossAttention(config.width, config.heads)
        self.blocks = nn.ModuleList(PlanningBlock(config) for _ in range(config.blocks))
        self.pointer = PointerHead(config)
        self.rule = RuleFit(config)
        self.size_head = SizeHead(width, config.n_size_candidates)
        self.size_query = nn.Sequential(
            RmsNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        # Log-odds, by verdict, that a proposed answer shows the right colour at a cell, and has the
        # right side.
        self.proposal_gain = nn.Parameter(torch.tensor(PROPOSAL_GAINS))
        self.proposal_size_gain = nn.Parameter(torch.tensor(PROPOSAL_GAINS))
        self.proposal_token = nn.Linear(N_PROPOSAL_FACTS, width)
        self.confidence = nn.Linear(width + N_SURE, 1)
        self.state_norm = RmsNorm(width)
        self.backward_model = BackwardModel(config.backward_width, width, config.max_context_cells)

    def _encode(self, x: Tensor, mask: Tensor, rows: int, cols: int) -> Tensor:
        table = self._table(rows, cols, x.device)
        for block in self.encoder:
            x = block(x, mask, table, rows, cols)
        return x

    def _planning_blocks(self) -> list[PlanningBlock]:
        return [block for block in self.blocks if isinstance(block, PlanningBlock)]

    def _table(self, rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
        dim = rotary_dim(self.config.width // self.config.heads)
        return rotary_table(rows, cols, dim, device)

    def read_demonstrations(self, batch: Batch) -> DemonstrationCells:
        """Encode each demonstration of a batch once; every query that may see it reuses it."""
        groups = groups_of(batch.demo_rooms, batch.demo_output.device.type)
        read = [self._read_group(batch, group) for group in groups]
        one = len(read) == 1  # always, in a training batch of whole tasks
        raw, plain, mask, right, place = read[0] if one else map(torch.cat, zip(*read, strict=True))
        begins = torch.tensor(layout(groups)).to(plain.device, non_blocking=True)
        return DemonstrationCells(
            raw=raw,
            plain=plain,
            tokens=plain + self.right(right),
            mask=mask,
            right=right,
            place=place,
            first=begins[0],
            count=begins[1],
            largest=max(group.rows * group.cols for group in groups),
            most_seen=batch.most_seen,
        )

    def _read_group(self, batch: Batch, group: Group) -> tuple[Tensor, ...]:
        """raw, plain, mask, right and place of `DemonstrationCells`, of one group."""
        sources, cells, output = batch.demo_sources, batch.demo_cells, batch.demo_output
        size, rows, cols = batch.demo_output_size, group.rows, group.cols
        if len(group.members) < len(output):
            members = torch.tensor(group.members).to(output.device, non_blocking=True)
            sources, cells, output, size = (
                x.index_select(0, members) for x in (sources, cells, output, size)
            )
        sources, cells, output = (x[..., :rows, :cols] for x in (sources, cells, output))
        mask = (output >= 0).flatten(1)
        colours = F.one_hot(output.clamp(min=0), COLOURS).flatten(1, 2)
        matches = (sources == output.unsqueeze(1)).flatten(2).transpose(1, 2)
        right = torch.cat([matches.float(), colours.float()], dim=-1) * mask.unsqueeze(-1)
        raw = self.embed(sources, cells) + self.place(size, rows, cols)
        plain = self._encode(raw, _with_first(mask), rows, cols)
        place = places(rows, cols, output.device).expand(len(output), -1)
        return tuple(x.flatten(0, 1) for x in (raw, plain, mask, right, place))

    def look(self, batch: Batch, demos: DemonstrationCells) -> Sight:
        """Everything about a batch's queries that no prompt changes. No query's output is used."""
        sources = batch.query_sources
        rows, cols = sources.shape[2:]
        bound = batch.query_canvas
        x = self.embed(sources, batch.query_cells) + self.place(bound, rows, cols)
        raw = x
        x = self._encode(raw, size_mask(bound, rows, cols).flatten(1), rows, cols)

        where, seen = context_cells(demos, batch.context, self.config.max_context_cells)
        dim = rotary_dim(self.config.pointer_width)
        keys = self.pointer.keys(demos.plain[None], rotary_at(demos.place, dim))[0]
        evidence = self.pointer.evidence_of(
            x,
            take_heads(keys, where),
            take(demos.right, where),
            seen,
            rotary_table(rows, cols, dim, sources.device),
        )
        where_fit, seen_fit = context_cells(demos, batch.context, self.config.max_rule_cells)
        evidence = evidence + self.rule(
            self.rule.of(x, raw),
            take(self.rule.of(demos.plain, demos.raw), where_fit),
            take(demos.right, where_fit),
            seen_fit,
        )
        table = rotary_at(demos.place, rotary_dim(self.config.width // self.config.heads))
        k, v = self.demonstrations.keys(demos.tokens[None], table)
        k, v, seen = self.demonstrations.add_null(
            take_heads(k[0], where), take_heads(v[0], where), seen
        )
        x = self.demonstrations(x, k, v, seen, self._table(rows, cols, sources.device))
        flat = sources.flatten(2).transpose(1, 2).long()
        return Sight(x, evidence, F.pad(flat == OUTSIDE, (0, COLOURS)), flat)

    def plan(
        self,
        batch: Batch,
        sight: Sight,
        prompt: Any,
        *,
        steps: int | None = None,
        stop: float | None = None,
        proposal: Proposal | None = None,
    ) -> AgentOutput:
        """Predict every query of a batch in five steps; see `AgentOutput` for shapes.

        `batch` gives query_sources (Q, K, rows, cols) of its canvas, query_canvas (Q, 2), the bound
        of each answer, and size_candidates and size_support (Q, 2, S); `sight` is of the same
        queries, from `look`. `prompt` has tokens (Q, L, width), mask (Q, L) bool and summary
        (Q, width). The size is decided first, from the prompt and the size rules; then each step
        looks at the prompt and at its own cells, points, and feeds its answer back.

        `steps`, for training: the answers of the first so many steps alone (None: of all).

        `stop` in (0, 1], for prediction: a query whose confidence reaches it takes no further step,
        its answer stands and is repeated in the steps that follow. Not differentiable through the
        choice; training leaves it None and takes all steps.

        `proposal`: answers to consider (Q); each is one more pointer for cells and size, with a
        share of the probability that is learned by verdict. Shapes that do not belong together are
        torch's errors.
        """
        n, _, rows, cols = batch.query_sources.shape
        summary = prompt.summary
        size_logits = self.size_head(
            self.size_query(summary), batch.size_candidates, batch.size_support
        )
        bound = batch.query_canvas
        proposed = None
        if proposal is not None:
            size_logits = self._with_proposed_size(size_logits, proposal)
            bound = torch.maximum(bound, proposal.size)
            proposed = proposal.colours.flatten(1), self.proposal_gain[proposal.verdict]
        size = choose_size(size_logits, bound)
        mask = size_mask(size, rows, cols).flatten(1)
        table = self._table(rows, cols, mask.device)
        prompt_keys: list[Keys] = []
        for block in self._planning_blocks():
            k, v = block.prompt.keys(prompt.tokens, None)
            prompt_keys.append(block.prompt.add_null(k, v, prompt.mask))

        x = sight.cells + self.film(summary).unsqueeze(1) + self.place(size, rows, cols)
        all_logits: list[Tensor] = []  # (Q, cells, 10) each
        all_confidence: list[Tensor] = []  # (Q,) each
        n_steps = torch.zeros_like(size[:, 0])
        going = torch.arange(n, device=mask.device)  # the queries that still plan
        sources, outside, evidence = sight.sources, sight.outside, sight.evidence
        n_planned = self.config.n_steps if steps is None else steps
        for step in range(n_planned):
            x = x + self.step_token[step]
            for block, keys in zip(self._planning_blocks(), prompt_keys, strict=True):
                x = block(x, mask, keys, table, rows, cols)
            logits = self.pointer(x, sources, outside, evidence, proposed)
            probability = logits.exp()
            x = x + self.answer(probability.to(x.dtype))
            pooled = _masked_mean(self.state_norm(x).float(), mask)
            previous = all_logits[-1] if step else None
            if previous is not None and len(going) < n:
                previous = previous[going]
            signs = torch.cat([pooled, sureness(logits, previous, mask)], dim=-1)
            confidence = self.confidence(signs).squeeze(-1).float()
            n_steps = n_steps.index_add(0, going, torch.ones_like(going))
            if len(going) < n:  # who has stopped keeps what was said last
                all_logits.append(all_logits[-1].index_copy(0, going, logits))
                all_confidence.append(all_confidence[-1].index_copy(0, going, confidence))
            else:
                all_logits.append(logits)
                all_confidence.append(confidence)
            if stop is None or step + 1 == n_planned:
                continue
            on = (confidence.sigmoid() < stop).nonzero().squeeze(-1)
            if not len(on):
                break
            if len(on) < len(going):
                going, x, mask = going[on], x[on], mask[on]
                sources, outside, evidence = sources[on], outside[on], evidence[on]
                prompt_keys = [(k[on], v[on], seen[on]) for k, v, seen in prompt_keys]
                if proposed is not None:
                    proposed = proposed[0][on], proposed[1][on]
        left = n_planned - len(all_logits)
        logits = torch.stack(all_logits + all_logits[-1:] * left)
        confidence = torch.stack(all_confidence + all_confidence[-1:] * left)
        logits = logits.view(n_planned, n, rows, cols, COLOURS)
        return AgentOutput(logits, size_logits, size, confidence, n_steps)

    def _with_proposed_size(self, size_logits: Tensor, proposal: Proposal) -> Tensor:
        """Log-probabilities of sides (Q, 2, 30), the proposal's size given its learned share."""
        share = self.proposal_size_gain[proposal.verdict].sigmoid() * proposal.given
        share = share[:, None, None]
        side = F.one_hot((proposal.size - 1).clamp(min=0), MAX_SIDE)
        return ((1.0 - share) * size_logits.exp() + share * side).clamp_min(1e-7).log()

    def backward_logits(
        self,
        batch: Batch,
        colours: Tensor,
        size: Tensor,
        summary: Tensor,
        rule: Tensor,
        *,
        learn: bool,
    ) -> Tensor:
        """Log-probabilities (Q, rows, cols, 10) over the input's cells, judging by an answer:
        probabilities (Q, H, W, 10) of its colours, and its size (Q, 2).

        learn=False: gradient to `colours` and `summary`; the backward model's weights learn
        nothing.
        """
        canvas = tuple(batch.query_input.shape[1:])
        given = (colours, size, batch.query_input_size, canvas, summary, rule)
        if learn:
            return self.backward_model(*given)
        fixed = {name: p.detach() for name, p in self.backward_model.named_parameters()}
        given = (*given[:5], rule.detach())
        return torch.func.functional_call(self.backward_model, fixed, given)

    def forward(
        self, input_grid: Any, prompt: Any = None, demos: DemonstrationCells | None = None
    ) -> Any:
        """Inference by hand: a bare grid (H, W) of colours -> logits (5, rows, cols, 10).

        With a batch instead of a grid it is `plan`. A bare grid has no demonstrations, so the
        answer is the one for any task at all; use `evaluation` to solve one. Raises ValueError for
        a grid that is not (rows, cols) with sides 1..30.
        """
        if isinstance(input_grid, Batch):
            if demos is None:
                demos = self.read_demonstrations(input_grid)
            return self.plan(input_grid, self.look(input_grid, demos), prompt)
        batch = bare_batch(input_grid, self.config.n_size_candidates, self.film.weight.device)
        if prompt is None:
            prompt = EmptyPrompt(1, self.config.width, self.film.weight.device)
        sight = self.look(batch, self.read_demonstrations(batch))
        output = self.plan(batch, sight, prompt)
        return output.logits[:, 0]


class EmptyPrompt:
    """A prompt that says nothing: one masked token, a zero summary."""

    def __init__(self, n: int, width: int, device: torch.device) -> None:
        self.tokens = torch.zeros(n, 1, width, device=device)
        self.mask = torch.zeros(n, 1, dtype=torch.bool, device=device)
        self.summary = torch.zeros(n, width, device=device)


def choose_size(size_logits: Tensor, canvas: Tensor) -> Tensor:
    """Most probable rows and cols (Q, 2) int64 that fit each query's canvas (Q, 2)."""
    side = torch.arange(1, MAX_SIDE + 1, device=size_logits.device)
    return size_logits.masked_fill(side > canvas.unsqueeze(-1), -1e9).argmax(-1) + 1


def drawn_steps(n_steps: int, *key: int) -> int:
    """How many of `n_steps` planning steps a training batch takes, by its key (seed, epoch, ...).

    Number k has odds 1 / k, so that every number costs the same share of the time: 2.2 of 5 on
    average. Each step's answer is trained, so any number of them may be taken at prediction.
    """
    odds = 1.0 / np.arange(1, n_steps + 1)
    return int(generator(*key).choice(n_steps, p=odds / odds.sum())) + 1


def fitted_rule(
    seen: Tensor,
    right: Tensor,
    weight: Tensor,
    log_ridge: Tensor,
    gain: Tensor,
    prior: Tensor,
    step_sizes: Tensor,
    *,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(rule (Q, R, pointers), failed (Q,), not 0 where there is none) from features to pointers.

    seen (Q, M, R) features, right (Q, M, pointers) and weight (Q, M, 1) of cells, all float32. By
    ridge regression of `right`, times `gain`; then a step for each size on the likelihood that a
    right pointer is chosen, whichever it is, beside `prior` (pointers,). floor: of the weight of a
    pointer in that likelihood.
    """
    weighted = (seen * weight).transpose(1, 2)
    ridge = log_ridge.exp().clamp(min=RIDGE_FLOOR)
    eye = torch.eye(seen.shape[-1], device=seen.device)
    solve, failed = positive_solver(weighted @ seen + ridge * eye)
    rule = solve(weighted @ right) * gain
    wanted = right.clamp(min=floor) if floor else right
    for step_size in step_sizes:
        belief = (seen @ rule + prior).softmax(-1)
        rule = rule + step_size * solve(weighted @ towards(belief, wanted))
    return rule, failed


def towards(belief: Tensor, right: Tensor) -> Tensor:
    """How belief (..., pointers), probabilities, is to change so that right pointers are chosen,
    right (..., pointers) >= 0 their weights: belief given that one of them is, minus belief. That
    is the gradient of the likelihood's logarithm by logits; where the likelihood is below 1e-30 it
    only leads away from what is believed."""
    chosen = belief * right
    return chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-30) - belief


def sureness(logits: Tensor, previous: Tensor | None, mask: Tensor) -> Tensor:
    """How sure a step's answer is, (Q, N_SURE) float32 without gradient: of its cells' largest
    probabilities the mean, the smallest and the geometric mean; the share of cells that are as in
    the step before.

    logits, previous (Q, cells, 10) log-probabilities, previous None at the first step (share 0);
    mask (Q, cells) bool, the cells of the answer.
    """
    with torch.no_grad():
        best, colour = logits.max(-1)
        same = torch.zeros_like(best) if previous is None else colour == previous.argmax(-1)
        means = _masked_mean(torch.stack([best.exp(), best, same.to(best.dtype)], -1), mask)
        least = best.masked_fill(~mask, 0.0).amin(-1).exp()
        return torch.stack([means[:, 0], least, means[:, 1].exp(), means[:, 2]], dim=-1)


def _on_canvas(x: Tensor, canvas: tuple[int, int]) -> Tensor:
    """x (N, rows, cols, dim) cut or padded with 0 to (N, *canvas, dim)."""
    return F.pad(x, (0, 0, 0, canvas[1] - x.shape[2], 0, canvas[0] - x.shape[1]))


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def _with_first(mask: Tensor) -> Tensor:
    """The mask with cell 0 always on, so that attention over an empty grid stays finite."""
    first = torch.zeros_like(mask)
    first[:, 0] = True
    return mask | first


def _some(mask: Tensor) -> Tensor:
    """The mask (.., keys) with key 0 on where all are off, so that attention stays finite."""
    first = torch.zeros_like(mask)
    first[..., 0] = True
    return mask | (first & ~mask.any(-1, keepdim=True))
