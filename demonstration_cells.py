"""The cells of a batch's demonstrations, one behind another, and which of them a query looks at.

Demonstrations are of many sizes. Each is read on a canvas that holds it (`Batch.demo_rooms`), those
of about one size together: little is computed of cells that are none. The module has no weights.
`from demonstration_cells import Cells, DemonstrationCells, context_cells, groups_of, layout, take`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grid_parts import MAX_SIDE

# In what a cell costs without attention, about 8 us on one CPU core: a further group costs that of
# so many cells; attention to so many cells costs each of them as much again.
GROUP_CELLS = 100
GROUP_CELLS_GPU = 50_000  # guess: 140 launches, in which a GPU computes so many cells
ATTENDED_CELLS = 1000

Room = tuple[int, int]  # rows, cols


@dataclass
class Cells:
    """Where the cells of a batch's demonstrations are: N cells in all, C demonstrations.

    mask (N,) bool: the cells that a grid has.
    right (N, pointers) float32: 1 where that pointer shows the grid's colour.
    place (N,) int64: row * MAX_SIDE + col.
    first, count (C,) int64: where a demonstration's cells begin, and how many there are.
    largest: cells of the largest one; most_seen: no query sees more, padding included.
    """

    mask: Tensor
    right: Tensor
    place: Tensor
    first: Tensor
    count: Tensor
    largest: int
    most_seen: int


@dataclass
class DemonstrationCells(Cells):
    """The encoded demonstrations of a batch, by the cells of their outputs.

    raw (N, width): each cell's sources and features, embedded, before the encoder.
    plain (N, width): the same after the encoder, as a query's cells are encoded.
    tokens (N, width): plain plus the embedded `right`, so the output is known, too.
    """

    raw: Tensor
    plain: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Group:
    """Demonstrations, by number, that are read on one canvas of (rows, cols)."""

    members: tuple[int, ...]
    rows: int
    cols: int


def groups_of(rooms: Sequence[Room], device: str = "cpu") -> list[Group]:
    """Demonstrations grouped so that padding and the number of groups cost least, about: those of
    one size together, and sizes in falling order join the group that it makes dearer by least, or
    open one. device: its type, for which the cost is."""
    further = GROUP_CELLS if device == "cpu" else GROUP_CELLS_GPU

    def cost(n: int, room: Room) -> float:
        cells = room[0] * room[1]
        return n * cells * (1.0 + cells / ATTENDED_CELLS)

    alike: dict[Room, list[int]] = {}
    for number, room in enumerate(rooms):
        alike.setdefault(room, []).append(number)
    groups: list[tuple[Room, list[int]]] = []
    for own in sorted(alike, key=lambda room: (-room[0] * room[1], room)):
        best, place, new = further + cost(len(alike[own]), own), len(groups), (own, alike[own])
        for at, (room, members) in enumerate(groups):
            wide = max(room[0], own[0]), max(room[1], own[1])
            joined = [*members, *alike[own]]
            dearer = cost(len(joined), wide) - cost(len(members), room)
            if dearer <= best:
                best, place, new = dearer, at, (wide, joined)
        groups[place : place + 1] = [new]
    return [Group(tuple(sorted(members)), *room) for room, members in groups]


def layout(groups: Sequence[Group]) -> tuple[list[int], list[int]]:
    """`first` and `count` of `DemonstrationCells`, groups one behind another."""
    n = sum(len(group.members) for group in groups)
    first, count, begun = [0] * n, [0] * n, 0
    for group in groups:
        cells = group.rows * group.cols
        for member in group.members:
            first[member], count[member] = begun, cells
            begun += cells
    return first, count


def places(rows: int, cols: int, device: torch.device) -> Tensor:
    """(rows * cols,) int64: row * MAX_SIDE + col of each cell of a canvas."""
    row = torch.arange(rows, device=device) * MAX_SIDE
    return (row[:, None] + torch.arange(cols, device=device)).flatten()


def context_cells(demos: Cells, context: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Which demonstration cells each query sees: (numbers of cells, seen), both (Q, M).

    context (Q, demonstrations) int64, -1 = none. Where a query's demonstrations have more than
    `limit` cells, cells that differ from the input come first, then an even scatter of the rest.
    """
    pair = context.clamp(min=0).unsqueeze(-1)
    cell = torch.arange(demos.largest, device=context.device)
    count = demos.count[pair]
    within = (cell < count) & (context >= 0).unsqueeze(-1)
    where = (demos.first[pair] + torch.minimum(cell, count - 1)).flatten(1)
    seen = demos.mask[where] & within.flatten(1)
    # M depends on rooms alone: in training, how many cells queries do see would let a query's own
    # output (in its neighbours' contexts) change the rounding of its logits.
    keep = min(limit, demos.most_seen, where.shape[1])
    if keep < where.shape[1]:
        changed = 1.0 - demos.right[..., 0][where]
        # A fixed hash of row and column (not of the canvas, which others in the batch widen).
        slot = torch.arange(context.shape[1], device=context.device)
        slot = slot[:, None].expand(-1, demos.largest).flatten()
        scatter = demos.place[where] * 40503 % 65536 / 65536.0 + 1e-5 * slot
        rank = seen.float() * (1.0 + changed + scatter)
        chosen = rank.topk(keep, dim=1).indices.sort(dim=1).values
        where, seen = where.gather(1, chosen), seen.gather(1, chosen)
    return where, seen


def take(x: Tensor, where: Tensor) -> Tensor:
    """Cells of x (N, dim) at `where` (Q, M): (Q, M, dim)."""
    return x.index_select(0, where.flatten()).view(*where.shape, x.shape[-1])


def take_heads(x: Tensor, where: Tensor) -> Tensor:
    """Cells of x (heads, N, dim) at `where` (Q, M): (Q, heads, M, dim)."""
    heads, _, dim = x.shape
    y = take(x.transpose(0, 1).flatten(1), where)
    return y.view(*where.shape, heads, dim).transpose(1, 2)
