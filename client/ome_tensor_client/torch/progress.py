"""How far an epoch has been read, and who reads what is left of it: arithmetic on positions, without torch.

An epoch has ``total`` samples in one order. What is to be read of it (its *base*) is dealt out like cards to the ranks, one sample each in
turn, and what a rank gets is dealt out to its workers in blocks of one batch. A DataLoader takes batches from its workers in turn, so the
samples of a rank come in the same order whatever the number of its workers. Ranks in step have always read a prefix of the order: what is
left is one span, and any other number of ranks can go on with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ome_tensor.errors import InvalidArgument
from ome_tensor.spans import Span, Spans, append, blocks, count, every, left, part

__all__ = ["Progress", "requests"]

_FORMAT = 1

#: Spans of positions that one request lists: a worker's part of an epoch is many short ones, and a server takes 4 MiB.
_MOST_SPANS = 16_384
#: The first request of a worker lists so many: its first batch is not to wait for a long list.
_FIRST_SPANS = 256


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one rank has come in an epoch.

    Attributes:
        data: Digest of what the samples are: a state of other samples is refused.
        epoch: Its number.
        total: Number of samples in the whole epoch.
        base: Positions that the ranks read, from when they were last dealt out.
        rank, ranks: Whose progress it is.
        taken: How many of its samples this rank has taken since.
        alone: Whether the base is this rank's own, and nobody else's: where workers of one rank had come unevenly far.
    """

    data: str
    epoch: int
    total: int
    base: Spans
    rank: int = 0
    ranks: int = 1
    taken: int = 0
    alone: bool = False

    @classmethod
    def of_epoch(cls, data: str, epoch: int, total: int, rank: int, ranks: int) -> Progress:
        """The beginning of an epoch."""
        return cls(data, epoch, total, ((0, total, 1),) if total else (), rank, ranks)

    def positions(self, size: int, drop_last: bool) -> Spans:
        """The positions that this rank reads, from its first of the base on.

        Args:
            size: Samples a batch.
            drop_last: Whether every rank stops after the same number of whole batches.
        """
        if self.alone:
            return self.base
        mine = every(self.base, self.rank, self.ranks)
        if drop_last:
            mine = part(mine, 0, count(self.base) // (self.ranks * size) * size)
        return mine

    def remaining(self, size: int, drop_last: bool) -> Spans:
        """Those that it has not taken."""
        mine = self.positions(size, drop_last)
        return part(mine, self.taken, count(mine))

    def is_over(self, size: int, drop_last: bool) -> bool:
        """Whether nothing is left."""
        return not count(self.remaining(size, drop_last))

    def after(self, taken: int) -> Progress:
        """Progress after so many more samples of this rank."""
        return replace(self, taken=self.taken + taken)

    def state(self) -> dict[str, Any]:
        """This, as numbers and texts in lists: for torch.save, JSON, or whatever else keeps checkpoints."""
        return {
            "format": _FORMAT,
            "data": self.data,
            "epoch": self.epoch,
            "total": self.total,
            "base": [list(span) for span in self.base],
            "rank": self.rank,
            "ranks": self.ranks,
            "taken": self.taken,
            "alone": self.alone,
        }

    @classmethod
    def of_state(cls, state: object) -> Progress:
        """The inverse of :meth:`state`. Raises InvalidArgument where it is none, naming what is wrong with it."""
        if not isinstance(state, Mapping) or "base" not in state or "taken" not in state:
            raise _wrong("it is none of this dataset's", state)
        if state.get("format") != _FORMAT:
            raise _wrong(f"it is of format {state.get('format')!r}, not {_FORMAT}", state.get("format"))
        try:
            numbers = {name: int(state[name]) for name in ("epoch", "total", "rank", "ranks", "taken")}
            base = tuple((int(first), int(length), int(stride)) for first, length, stride in state["base"])
            data = str(state["data"])
        except (KeyError, TypeError, ValueError) as error:
            raise _wrong(f"it is damaged: {error!r}", state) from None
        ends = [first + (length - 1) * stride for first, length, stride in base]
        bad = any(first < 0 or length < 1 or stride < 1 for first, length, stride in base)
        if (
            bad
            or any(end >= numbers["total"] for end in ends)
            or not 0 <= numbers["rank"] < numbers["ranks"]
            or numbers["taken"] < 0
        ):
            raise _wrong("it is damaged: its numbers do not fit together", state)
        return cls(data, base=base, alone=bool(state.get("alone")), **numbers)

    def at(self, rank: int, ranks: int, *, in_step: bool) -> Progress:
        """The same epoch for a rank of maybe another number of them.

        Args:
            rank, ranks: Who goes on.
            in_step: Whether all ranks have taken as many samples as this one: only then can one state speak for all of them.

        Raises:
            InvalidArgument: it would have to, and nobody says that it can.
        """
        if (rank, ranks) == (self.rank, self.ranks):
            return self
        if not in_step or self.alone:
            raise _wrong(
                f"it is of rank {self.rank} of {self.ranks}, and this is rank {rank} of {ranks}: give the states of all ranks as a "
                "list, or say in_step=True if every rank had taken as many samples",
                self.rank,
            )
        return replace(self, base=left(self.base, self._in_step()), rank=rank, ranks=ranks, taken=0)

    def _in_step(self) -> list[int]:
        """How many each rank has taken, if all have come as far as this one."""
        most = [count(every(self.base, rank, self.ranks)) for rank in range(self.ranks)]
        return [min(self.taken, number) for number in most]

    @classmethod
    def merged(cls, parts: Sequence[Progress], rank: int, ranks: int) -> Progress:
        """What is left after the progress of all ranks, dealt out anew.

        Args:
            parts: Of every rank, in any order.
            rank, ranks: Who goes on.

        Raises:
            InvalidArgument: they are not those of all ranks of one run, once each.
        """
        first = parts[0]
        if any(
            (one.data, one.total, one.epoch, one.ranks) != (first.data, first.total, first.epoch, first.ranks) for one in parts
        ):
            raise _wrong("the states are of different epochs, samples or numbers of ranks", [one.epoch for one in parts])
        found = sorted(one.rank for one in parts)
        if found != list(range(first.ranks)):
            raise _wrong(f"the states are of ranks {found}, not of each of {first.ranks} once", found)
        by_rank = sorted(parts, key=lambda one: one.rank)
        shared = [one for one in by_rank if not one.alone]
        if any(one.base != shared[0].base for one in shared):
            raise _wrong("the states are not of one run: its ranks were dealt different samples", found)
        if len(shared) == len(by_rank):
            base = left(first.base, [one.taken for one in by_rank])
        else:
            base = tuple(span for one in by_rank for span in one.remaining(1, False))
        return replace(first, base=base, rank=rank, ranks=ranks, taken=0, alone=False)

    @classmethod
    def going_on(cls, parts: Sequence[Progress], here: Progress, *, in_step: bool) -> Progress:
        """What a rank goes on with.

        Args:
            parts: One state, or those of all ranks.
            here: An epoch's beginning for this rank, of the samples that there are.
            in_step: See :meth:`at`.

        Raises:
            InvalidArgument: they are of other samples, or not enough to go on with.
        """
        if not parts:
            raise _wrong("the list is empty", [])
        for one in parts:
            if one.data != here.data or one.total != here.total:
                raise _wrong(
                    f"it is of other samples (another dataset or version of it, tiling, selection, shuffle or seed) than these {here.total}",
                    one.data,
                )
        first = parts[0]
        if len(parts) == 1 and (first.ranks > 1 or here.ranks == 1):
            return first.at(here.rank, here.ranks, in_step=in_step)
        return cls.merged(parts, here.rank, here.ranks)

    def of_workers(self, taken: Sequence[int], size: int, drop_last: bool) -> Progress:
        """This rank's progress after its workers have taken so many samples each, of what was left when they began."""
        mine = self.remaining(size, drop_last)
        total = sum(taken)
        if list(taken) == [count(piece) for piece in _dealt_out(part(mine, 0, total), size, len(taken))]:
            return replace(self, taken=self.taken + total)
        pieces = _dealt_out(mine, size, len(taken))
        base = tuple(span for piece, number in zip(pieces, taken, strict=True) for span in part(piece, number, count(piece)))
        return replace(self, base=base, taken=0, alone=True)


def requests(mine: Spans, block: int, worker: int, workers: int, skip: int) -> Iterator[Spans]:
    """The positions of a worker's part, in as many pieces as requests are to be made: each of whole blocks, from ``skip`` samples on."""
    if workers == 1:
        rest = part(mine, skip, count(mine))
        # More than one where ranks that had come unevenly far were put together.
        if len(rest) <= _MOST_SPANS:
            if rest:
                yield rest
            return
    passed, skip = divmod(skip, block)
    most = _FIRST_SPANS
    found: list[Span] = []
    for piece in blocks(mine, block, worker + passed * workers, workers):
        for span in part(piece, skip, block):
            append(found, span)
        skip = 0
        if len(found) >= most:
            yield tuple(found)
            found, most = [], min(4 * most, _MOST_SPANS)
    if found:
        yield tuple(found)


def _dealt_out(mine: Spans, size: int, workers: int) -> list[Spans]:
    """What each worker gets of a rank's positions."""
    return [tuple(span for block in blocks(mine, size, worker, workers) for span in block) for worker in range(workers)]


def _wrong(why: str, value: object) -> InvalidArgument:
    return InvalidArgument(f"the state cannot be loaded: {why}", field="state_dict", value=value)
