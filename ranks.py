"""The processes that train one run together: who is who, what they tell each other, how a batch is
split among them.

One process alone (`ALONE`) has no process group: every function gives back what it was given. The
others work by torch.distributed, started by torchrun. A collective that fails, because another
process has ended, raises PeerLost. It knows no tasks, models or files.
`from ranks import ALONE, Part, Ranks, joined_ranks`.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from command_line import EXIT_ARGUMENTS, EXIT_UNEXPECTED, UserError

T = TypeVar("T")
BUCKET_NUMEL = 1 << 23  # gradients that are summed in one go: 32 MiB of float32
SAY_FIRST_S = 1.0  # for the process that knows why, before others speak
PATIENCE = timedelta(hours=2)  # the first process may be bringing a run back from Drive
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun


class PeerLost(Exception):
    """Another process of the run has ended, or did something else; it says itself why."""


@dataclass(frozen=True)
class Part:
    """Which tasks and queries of a whole batch are one process's, in the batch's order.

    counted: False where the batch has fewer tasks than there are processes: the process then works
    on its first task without effect, so that it takes the same steps as the others. share: of the
    batch's queries. prompt_share: of its demonstrations that have a partner in their task.
    """

    tasks: slice
    queries: slice
    n_tasks: int  # of the whole batch
    n_queries: int
    counted: bool = True
    share: float = 1.0
    prompt_share: float = 1.0

    @property
    def prompt_weight(self) -> float:
        """What makes a mean over this part's demonstrations, counted as `share` of the batch, count
        as `prompt_share` of it."""
        return self.prompt_share / self.share if self.share else 0.0


def split(sizes: Sequence[int], rank: int, world: int) -> tuple[int, int]:
    """(first, end) of the consecutive tasks, of these sizes in queries, that a process gets; all
    together get each task once, and about the same number of queries. Empty where first == end."""
    ends, total, before = [0], sum(sizes), 0
    for number, size in enumerate(sizes):
        # a task is the process's in whose stretch of the queries its middle lies
        owner = min(world - 1, int((before + size / 2) * world / total))
        while len(ends) <= owner:
            ends.append(number)
        before += size
    ends += [len(sizes)] * (world + 1 - len(ends))
    return ends[rank], ends[rank + 1]


def part_of(sizes: Sequence[int], partners: Sequence[int], rank: int, world: int) -> Part:
    """One process's part of a batch of tasks.

    sizes: queries of each task; partners: its demonstrations that have another one beside them.
    """
    first, end = split(sizes, rank, world)
    counted = first < end
    end = end if counted else 1
    first = first if counted else 0
    before = sum(sizes[:first])
    mine, of_pairs = sum(sizes[first:end]), sum(partners[first:end])
    return Part(
        slice(first, end),
        slice(before, before + mine),
        len(sizes),
        sum(sizes),
        counted,
        mine / sum(sizes) if counted else 0.0,
        of_pairs / max(1, sum(partners)) if counted else 0.0,
    )


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them, number `rank` of `world`; 0 is the first,
    which alone writes. local: its number on its machine, of `local_world`.

    All methods but `part` and `device` are collectives where there are several: every process has
    to call them, in the same order.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @property
    def many(self) -> bool:
        return self.world > 1

    @property
    def first(self) -> bool:
        """Whether this process writes, and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """--device of this process: cuda means the GPU of its number. Raises UserError."""
        if not self.many or name == "cpu":
            return name
        if name.startswith("cuda:"):
            raise UserError(
                f"--device {name}: each of the {self.world} processes takes a GPU of its own; "
                "use --device cuda, and CUDA_VISIBLE_DEVICES to choose among GPUs.",
                EXIT_ARGUMENTS,
            )
        return f"cuda:{self.local}" if name == "cuda" or torch.cuda.is_available() else name

    # ---- small things, agreed on

    def of_first(self, value: T) -> T:
        """The first process's value, everywhere."""
        if not self.many:
            return value
        box = [value if self.first else None]
        with _lost():
            dist.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def gather(self, value: T) -> list[T]:
        """Every process's value, by number."""
        if not self.many:
            return [value]
        found: list[Any] = [None] * self.world
        with _lost():
            dist.all_gather_object(found, value)
        return found

    def gather_made(self, make: Callable[[], T]) -> list[T]:
        """What each process makes, by number. What one of them raises is raised by all."""
        if not self.many:
            return [make()]
        made: T | None = None
        error: Exception | None = None
        try:
            made = make()
        except Exception as e:  # noqa: BLE001 - raised below, when all have been told
            error = e
        told = self.gather((made, None if error is None else type(error)))
        if error is not None:
            raise error
        for _, kind in told:
            if kind is not None:
                raise _again(kind)
        return [cast(T, value) for value, _ in told]

    def highest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if not self.many:
            return number
        largest = torch.tensor(number)
        with _lost():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def alike(self, value: Any) -> bool:
        """Whether all processes have the same value."""
        return len(set(map(repr, self.gather(value)))) == 1

    def wait(self) -> None:
        """Until all processes are here, or one is gone."""
        with contextlib.suppress(PeerLost):
            self.highest(0)

    def state_of_first(self, state: T) -> T:
        """`of_first` of a tree of dicts, lists, tuples and tensors, a tensor at a time, on the CPU.
        What the others give does not matter."""
        if not self.many:
            return state
        mine = [t.detach().cpu().contiguous() for t in _tensors(state)] if self.first else []
        found = iter([t.to("meta") for t in mine])
        shape = self.of_first(_exchanged(state, found, every=True) if self.first else state)
        new = mine or [torch.empty_like(t, device="cpu") for t in _tensors(shape)]
        for t in new:
            if t.numel():
                with _lost():
                    dist.broadcast(t, src=0)
        return state if self.first else cast(T, _exchanged(shape, iter(new), every=True))

    # ---- a batch

    def part(self, sizes: Sequence[int], partners: Sequence[int]) -> Part:
        """This process's part of a batch, see `part_of`."""
        return part_of(sizes, partners, self.rank, self.world)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all processes' values, without gradient; alone: the value itself."""
        if not self.many:
            return value
        total = value.detach().clone()
        with _lost():
            dist.all_reduce(total)
        return total

    def sum_gradients(self, params: Iterable[Tensor]) -> None:
        """Every gradient becomes the sum over all processes, in float32; a parameter has one where
        it has one in any process."""
        if not self.many:
            return
        params = list(params)
        there = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8)
        with _lost():
            dist.all_reduce(there, op=dist.ReduceOp.MAX)
        bucket: list[Tensor] = []
        for p, has in zip(params, there.tolist(), strict=True):
            if not has:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if bucket and sum(g.numel() for g in bucket) + p.numel() > BUCKET_NUMEL:
                self._sum_in_place(bucket)
                bucket = []
            bucket.append(p.grad)
        if bucket:
            self._sum_in_place(bucket)

    def _sum_in_place(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([t.flatten().float() for t in tensors])
        with _lost():
            dist.all_reduce(flat)
        for t, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(summed.view_as(t))

    def keep_sums_once(self, params: Iterable[Tensor]) -> None:
        """Between two batches of one update: what is summed already stays in the first process
        alone, so that the next sum counts it once."""
        if self.many and not self.first:
            for p in params:
                p.grad = None

    def join(self, tree: T, part: Part | None) -> T:
        """The rows of a whole batch from the parts of it: every tensor that has rows, in tuples,
        lists, dicts and dataclasses, becomes that of all processes, in the batch's order.

        Without gradient. Everything else stays this process's; alone: the tree itself.
        """
        if not self.many or part is None:
            return tree
        mine = [t.detach() for t in _tensors(tree) if t.dim()]
        mine = [(t if part.counted else t[:0]).cpu() for t in mine]
        parts = self.gather(mine)
        whole = iter([torch.cat(list(some)) for some in zip(*parts, strict=True)])
        return cast(T, _exchanged(tree, whole))

    def means(
        self,
        figures: Mapping[str, Tensor],
        part: Part,
        counts: Mapping[str, Tensor],
        common: Mapping[str, Tensor],
    ) -> dict[str, float]:
        """Means over a whole batch from those over the parts of it, in one go: one wait for the
        device.

        counts: of what a figure is a mean over, where that is not the queries. common: figures of
        the whole batch, which all have alike.
        """
        both = {**figures, **common}
        values = torch.stack([value.detach().float() for value in both.values()])
        if not self.many:
            return dict(zip(both, values.tolist(), strict=True))
        like = values.new_tensor
        weights = [
            like(self.first) if name in common
            else like(part.share) if name not in counts
            else counts[name].float() * part.counted
            for name in both
        ]  # fmt: skip
        weight = torch.stack(weights)
        # a process that does not count has no say, whatever it found
        weighted = torch.where(weight > 0, values * weight, 0.0)
        total, n = self.sum(torch.stack([weighted, weight])).unbind(0)
        return dict(zip(both, (total / n.clamp(min=1e-30)).tolist(), strict=True))

    def level(self, batch: T) -> T:
        """The part of a batch with as many proposals a query as the whole batch has; its fields
        `proposed`, `proposed_size` and `proposed_facts` (Q, A, ...) are filled up with none."""
        if not self.many:
            return batch
        part: Any = batch
        n = part.proposed.shape[1]
        more = self.highest(n) - n
        if not more:
            return batch
        filled = {}
        for name, nothing in (("proposed", 255), ("proposed_size", 0), ("proposed_facts", 0)):
            have = getattr(part, name)
            room = have.new_full((have.shape[0], more, *have.shape[2:]), nothing)
            filled[name] = torch.cat([have, room], 1)
        return cast(T, replace(part, **filled))

    def draws(self, generator: torch.Generator, part: Part | None) -> Draws:
        """The generator, of whose draws for a whole batch this process takes those of its part."""
        return generator if not self.many or part is None else PartOfDraws(generator, self, part)

    def align(self, modules: Iterable[torch.nn.Module]) -> None:
        """Everyone takes the first process's weights and buffers of these modules."""
        if not self.many:
            return
        by_kind: dict[torch.dtype, list[Tensor]] = {}
        for module in modules:
            for tensor in module.state_dict().values():
                by_kind.setdefault(tensor.dtype, []).append(tensor)
        for tensors in by_kind.values():
            flat = torch.cat([t.flatten() for t in tensors])
            with _lost():
                dist.broadcast(flat, src=0)
            for t, new in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(new.view_as(t))


ALONE = Ranks()


# ---- draws


@dataclass(frozen=True)
class PartOfDraws:
    """A generator that draws for a whole batch, whoever works on it: what a query gets does not
    depend on the number of processes."""

    generator: torch.Generator
    ranks: Ranks
    part: Part


Draws = torch.Generator | PartOfDraws


def draw_normal(like: Tensor, draws: Draws | None) -> Tensor:
    """Standard normal numbers shaped like `like` (queries, ...), drawn where the generator lives
    and moved to `like`."""
    if isinstance(draws, PartOfDraws):
        whole = like.new_empty(draws.part.n_queries, *like.shape[1:])
        return draw_normal(whole, draws.generator)[draws.part.queries]
    device = like.device if draws is None else draws.device
    return torch.randn(like.shape, generator=draws, device=device).to(like.device)


def draw_numbers(chance: Tensor, n: int, draws: Draws) -> Tensor:
    """`n` numbers a row, drawn with replacement by their chances (queries, numbers)."""
    if isinstance(draws, PartOfDraws):
        whole = draws.ranks.join(chance, draws.part)
        return draw_numbers(whole, n, draws.generator)[draws.part.queries]
    chance, device = chance.to(draws.device), chance.device
    return chance.multinomial(n, replacement=True, generator=draws).to(device)


# ---- the process group


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes that torchrun started, connected while the block runs; ALONE without it.

    An error of one process ends all: the first to fail says why, the others end without a word
    (UserError with an empty message and the same exit code).
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if not all(name in os.environ for name in NEEDED) or world == "1":
        yield ALONE
        return
    ranks = Ranks(
        int(os.environ["RANK"]),
        int(world),
        int(os.environ["LOCAL_RANK"]),
        int(os.environ.get("LOCAL_WORLD_SIZE", world)),
    )
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpus and ranks.local < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local)
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world, timeout=PATIENCE))
    # After a restart the store still holds what those before have left there.
    store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=PATIENCE
    )
    try:
        yield ranks
    except PeerLost as lost:
        time.sleep(SAY_FIRST_S)  # who knows why says it
        if not _first_to_fail(store, ranks.rank):
            raise UserError("", EXIT_UNEXPECTED) from None
        why = re.sub(r"^\[[^]]*\] *", "", str(lost)).split(". ")[0].splitlines()[:1]
        raise UserError(
            f"another of the {ranks.world} processes cannot be reached ({''.join(why)}). Start "
            "all of them again with --resume auto; torchrun --max-restarts does that by itself.",
            EXIT_UNEXPECTED,
        ) from None
    except Exception as error:
        silent = isinstance(error, UserError) and not str(error)  # the first process says it
        if not silent and not _first_to_fail(store, ranks.rank):
            code = error.code if isinstance(error, UserError) else EXIT_UNEXPECTED
            raise UserError("", code) from None
        raise
    finally:
        dist.destroy_process_group()


def _first_to_fail(store: dist.Store, rank: int) -> bool:
    """Whether this process is the first of this start that has an error to tell."""
    try:
        return bool(store.compare_set("failed", "", str(rank)) == str(rank).encode())
    except RuntimeError:
        return True  # nobody can be asked: better said twice than never


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error)) from error


def _again(kind: type[Exception]) -> Exception:
    """An error that another process has had: of those that are no failure the same, else
    PeerLost."""
    return kind() if getattr(kind, "shared", False) else PeerLost(kind.__name__)


# ---- tensors in trees


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree of dicts, lists, tuples and dataclasses, in a fixed order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)
    elif is_dataclass(tree):
        for f in fields(tree):
            yield from _tensors(getattr(tree, f.name))


def _exchanged(tree: Any, new: Iterator[Tensor], *, every: bool = False) -> Any:
    """The tree with the next of `new` in place of each of its tensors; every: without rows, too."""
    if isinstance(tree, Tensor):
        if every:
            return next(new)
        return next(new).to(tree.device) if tree.dim() else tree
    if isinstance(tree, dict):
        return {key: _exchanged(value, new, every=every) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_exchanged(value, new, every=every) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        inside = {f.name: getattr(tree, f.name) for f in fields(tree)}
        return replace(tree, **_exchanged(inside, new, every=every))
    return tree
