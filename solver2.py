"""Permanent memory: what the run keeps about tasks it has met.

Task tokens (learned, one row per training task), a view token per dihedral view, a bank of
prompt summaries of tasks that went well, retrieved by likeness into later prompts, and a bank of
which ways of fitting (arms) were right for which tasks, by a fingerprint that no colour permutation
changes. It stores summaries and fingerprints of demonstrations only: no grid, no output, nothing of
a test pair.
`from solver2 import Solver2`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grid_features import N_CONTROL
from hypotheses import N_ARM_SLOTS

N_VIEWS = 8
N_ALIKE = 16  # tasks whose arms are recalled


class Solver2(nn.Module):
    """Task tokens, view tokens and the memory bank.

    n_tasks: rows of the task table; width: channels of a token; n_task_tokens: tokens per task;
    capacity: entries of the bank (a ring: the oldest is replaced); n_retrieved: tokens retrieved.
    """

    def __init__(
        self,
        n_tasks: int,
        width: int,
        *,
        n_task_tokens: int = 4,
        capacity: int = 1024,
        n_retrieved: int = 2,
        use_memory: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.n_task_tokens = width, n_task_tokens
        self.n_retrieved, self.use_memory = n_retrieved, use_memory
        self.task_tokens = nn.Embedding(max(1, n_tasks), n_task_tokens * width)
        self.view_tokens = nn.Embedding(N_VIEWS, width)
        self.unknown = nn.Parameter(torch.zeros(n_task_tokens, width))
        nn.init.normal_(self.task_tokens.weight, std=0.02)
        nn.init.normal_(self.view_tokens.weight, std=0.02)
        self.value = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.tensor(0.1))
        self.keys: Tensor
        self.owners: Tensor
        self.scores: Tensor
        self.counters: Tensor
        self.register_buffer("keys", torch.zeros(capacity, width))
        self.register_buffer("owners", torch.full((capacity,), -2, dtype=torch.long))
        self.register_buffer("scores", torch.zeros(capacity))
        self.register_buffer("counters", torch.zeros(2, dtype=torch.long))  # next slot, updates
        self.fingerprints: Tensor
        self.arm_owners: Tensor
        self.arms_right: Tensor
        self.arm_counter: Tensor
        self.register_buffer("fingerprints", torch.zeros(capacity, N_CONTROL))
        self.register_buffer("arm_owners", torch.full((capacity,), -2, dtype=torch.long))
        self.register_buffer("arms_right", torch.full((capacity, N_ARM_SLOTS), -1.0))
        self.register_buffer("arm_counter", torch.zeros(1, dtype=torch.long))

    def add_tasks(self, n: int) -> int:
        """Add rows for `n` new tasks, which start as unseen tasks do; returns the first row."""
        rows = self.task_tokens.weight.detach()
        new = self.unknown.detach().flatten().expand(n, -1)
        self.task_tokens = nn.Embedding.from_pretrained(torch.cat([rows, new]), freeze=False)
        return len(rows)

    def recall(self, fingerprint: Tensor, task_index: Tensor) -> Tensor:
        """How often each arm was right in the N_ALIKE stored tasks most like each query's, other
        tasks only: (Q, N_ARM_SLOTS) float32 in [0, 1], -1 where no such task tried the arm.

        fingerprint (Q, N_CONTROL) float32: mean control features of the demonstrations; task_index
        (Q,), -1 = unseen.
        """
        distance = torch.cdist(fingerprint.detach().float(), self.fingerprints)
        known = (self.arm_owners >= -1) & (
            (self.arm_owners[None] != task_index[:, None]) | (task_index[:, None] < 0)
        )
        n_alike = min(N_ALIKE, len(self.fingerprints))
        nearest = distance.masked_fill(~known, math.inf).topk(n_alike, dim=-1, largest=False)
        right = self.arms_right[nearest.indices]  # (Q, N_ALIKE, arms)
        tried = (right >= 0) & nearest.values.isfinite().unsqueeze(-1)
        share = (right * tried).sum(1) / tried.sum(1).clamp(min=1)
        found = torch.where(tried.any(1), share, -1.0)
        return found if self.use_memory else torch.full_like(found, -1.0)

    @torch.no_grad()
    def store_arms(self, fingerprint: Tensor, task_index: Tensor, right: Tensor) -> None:
        """Keep which arms were right for tasks (N,): right (N, N_ARM_SLOTS), share of their
        demonstrations, -1 = not tried; fingerprint (N, N_CONTROL). A task that is already there is
        replaced; waits for no device."""
        capacity = self.fingerprints.shape[0]
        for row in range(fingerprint.shape[0]):  # a few tasks a batch
            same = (self.arm_owners == task_index[row]) & (task_index[row] >= 0)
            slot = torch.where(same.any(), same.long().argmax(), self.arm_counter[0] % capacity)
            for bank, new in (
                (self.fingerprints, fingerprint[row].float()),
                (self.arm_owners, task_index[row]),
                (self.arms_right, right[row].float()),
            ):
                bank.index_copy_(0, slot.view(1), new.unsqueeze(0))
            self.arm_counter[0] += (~same.any()).long()

    @property
    def n_updates(self) -> int:
        """How many entries were ever stored."""
        return int(self.counters[1])

    def tokens(
        self, task_index: Tensor, view_id: Tensor, keep_task: Tensor, summary: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens to add to each query's prompt.

        task_index (Q,) int64, -1 = unseen; view_id (Q,) int64; keep_task (Q,) bool, False drops the
        task tokens; summary (Q, width) of the demonstrations' prompt. Returns tokens
        (Q, n_task_tokens + 1 + n_retrieved, width) and their mask (bool).
        """
        n = task_index.shape[0]
        known = (task_index >= 0) & keep_task
        own = self.task_tokens(task_index.clamp(min=0)).view(n, self.n_task_tokens, self.width)
        own = torch.where(known.view(-1, 1, 1), own, self.unknown.to(own.dtype))
        view = self.view_tokens(view_id).unsqueeze(1)
        parts, masks = [own, view], [own.new_ones(n, self.n_task_tokens + 1, dtype=torch.bool)]
        if self.use_memory:
            found, mask = self.retrieve(summary, task_index)
            parts.append(found)
            masks.append(mask)
        return torch.cat(parts, dim=1), torch.cat(masks, dim=1)

    def retrieve(self, summary: Tensor, task_index: Tensor) -> tuple[Tensor, Tensor]:
        """The `n_retrieved` stored summaries most like `summary` (cosine), of other tasks."""
        query = F.normalize(summary.detach().float(), dim=-1)
        score = query @ F.normalize(self.keys, dim=-1).T  # (Q, capacity)
        allowed = (self.owners >= -1) & (
            (self.owners[None] != task_index[:, None]) | (task_index[:, None] < 0)
        )
        score = score.masked_fill(~allowed, -math.inf)
        best, slot = score.topk(self.n_retrieved, dim=-1)
        mask = best > -math.inf
        weight = torch.where(mask, best, 0.0).clamp(min=0).unsqueeze(-1)
        found = self.value(self.keys[slot].to(summary.dtype))
        return self.gate * weight * found, mask

    @torch.no_grad()
    def store(self, summary: Tensor, task_index: Tensor, accuracy: Tensor, keep: Tensor) -> None:
        """Keep the summaries (N, width) of tasks (N,) where `keep` (N,) bool, with accuracy (N,).

        A task that is already in the bank has its entry replaced. Runs without a device sync
        except on the number of rows, which is the batch's number of tasks.
        """
        capacity = self.keys.shape[0]
        for row in range(summary.shape[0]):  # a few tasks a batch
            same = (self.owners == task_index[row]) & (task_index[row] >= 0)
            slot = torch.where(same.any(), same.long().argmax(), self.counters[0] % capacity)
            take, slot = keep[row], slot.view(1)
            for bank, new in (
                (self.keys, summary[row].float()),
                (self.owners, task_index[row]),
                (self.scores, accuracy[row].float()),
            ):
                bank.index_copy_(0, slot, torch.where(take, new, bank[slot][0]).unsqueeze(0))
            self.counters[0] += (take & ~same.any()).long()
            self.counters[1] += take.long()
