"""Slabs: how one block too large for a message is cut into pieces that are contiguous in it.

Pure arithmetic. The cut depends on nothing but its arguments, so that a reader that lost its connection inside a large tile can
go on at the next slab of another server.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .errors import InvalidArgument

__all__ = ["Slab", "SlabSequence", "split_into_slabs"]


class Slab(NamedTuple):
    """One contiguous box of a C-ordered block.

    Attributes:
        offset: Where it begins in the block, in elements.
        origin: Its first element's index along each axis of the block.
        shape: Its size along each axis; as many axes as the block.
    """

    offset: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]


class SlabSequence(Sequence[Slab]):
    """The slabs of one block in C order: ``len()``, indexing and iteration, computed on demand."""

    def __init__(self, shape: tuple[int, ...], itemsize: int, max_bytes: int) -> None:
        self._shape = shape
        # The outermost axis below which a sub-block fits is cut into runs of sub-blocks; axes outside it are stepped one by one.
        inner = math.prod(shape)
        self._axis, self._inner = -1, inner
        while self._inner * itemsize > max_bytes and self._axis < len(shape) - 1:
            self._axis += 1
            self._inner //= shape[self._axis]
        if self._axis < 0:
            self._run = self._per_step = self._length = 1
            return
        size = shape[self._axis]
        # A single element larger than max_bytes still travels.
        self._run = min(size, max(1, max_bytes // (self._inner * itemsize)))
        self._per_step = -(-size // self._run)
        self._length = math.prod(shape[: self._axis]) * self._per_step

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Slab:  # type: ignore[override]
        if not 0 <= index < self._length:
            raise IndexError(index)
        shape, axis = self._shape, self._axis
        if axis < 0:
            return Slab(0, (0,) * len(shape), shape)
        step, place = divmod(index, self._per_step)
        first = place * self._run
        count = min(self._run, shape[axis] - first)
        origin = [0] * len(shape)
        origin[axis] = first
        rest = step
        for outer in range(axis - 1, -1, -1):
            rest, origin[outer] = divmod(rest, shape[outer])
        offset = (step * shape[axis] + first) * self._inner
        return Slab(offset, tuple(origin), (1,) * axis + (count,) + shape[axis + 1 :])

    def __iter__(self) -> Iterator[Slab]:
        return map(self.__getitem__, range(self._length))


def split_into_slabs(shape: Sequence[int], itemsize: int, max_bytes: int) -> SlabSequence:
    """Cut a C-ordered block into contiguous boxes of at most ``max_bytes`` each.

    Args:
        shape: The block's size along each axis, outermost first. A block without elements is one slab without elements.
        itemsize: Bytes of an element.
        max_bytes: Most bytes in a slab; only a single element may be larger.

    Returns:
        The slabs, in C order; together they are the block. All but the last of a run have the same shape.

    Raises:
        InvalidArgument: a negative size, or ``itemsize`` or ``max_bytes`` not positive.
    """
    if not shape or min(shape) < 0:
        raise InvalidArgument(f"shape must have sizes >= 0: {tuple(shape)}", field="shape", value=tuple(shape))
    for name, value in (("itemsize", itemsize), ("max_bytes", max_bytes)):
        if value <= 0:
            raise InvalidArgument(f"{name} must be positive: {value}", field=name, value=value)
    return SlabSequence(tuple(shape), itemsize, max_bytes)
