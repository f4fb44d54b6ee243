"""Items on their way somewhere else, a few of them ahead of whoever takes them: the order, the bounds and the end of it, whatever the way is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from .errors import InvalidArgument
from .tiling import positive

__all__ = ["Ahead", "Part", "Way", "alone", "itself"]


class Part(NamedTuple):
    """One array of an item. ``dtype``: torch's, where NumPy has none of that name; the array is of integers of the same width then."""

    array: np.ndarray
    dtype: Any = None


def _part(value: Any) -> Part:
    """An array of an item. Raises InvalidArgument."""
    if isinstance(value, np.ndarray):
        return Part(value)
    try:
        # torch's, with no copy but of what is not there as values (a conjugate).
        found = value.detach().resolve_conj().resolve_neg()
        try:
            return Part(found.numpy())
        except TypeError:
            import torch  # which is loaded: this is a tensor of its

            same_width = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}[found.element_size()]
            integers = found.view(getattr(torch, same_width))
            return Part(integers.numpy(), found.dtype)
    except (AttributeError, TypeError, KeyError, RuntimeError) as error:
        raise InvalidArgument(
            f"arrays must be NumPy's, or dense torch tensors in host memory, not {type(value).__name__}",
            field="arrays",
            value=value,
        ) from error


class Way(Protocol):
    """How parts of an item become tensors somewhere else."""

    def begin(self, parts: list[Part]) -> tuple[list[Any], Any]:
        """Tensors that need not have arrived, and what :meth:`hand_over` wants to know. The parts' memory may go, or change, afterwards."""

    def hand_over(self, tensors: list[Any], known: Any) -> None:
        """Somebody uses them from now on."""

    def close(self) -> None:
        """No more of them."""


def itself(item: Any) -> list[Any]:
    return [item]


def alone(_: Any, tensors: list[Any]) -> Any:
    return tensors[0]


class Ahead(Iterator[Any]):
    """Iterates over items that are on their way, a few ahead of whoever takes them. No thread: what is read is read in ``next()``.

    An error of the source, or of the way, comes where its item would have: what was good before is handed over first.

    Args:
        items: What to take there, one after the other; closed with this iterator, if it can be.
        way: The way.
        depth: Items in flight, positive: while one is used, ``depth - 1`` are on their way.
        max_bytes: Their bytes, positive; one item is always allowed.
        arrays: The arrays of an item: NumPy's, or dense torch tensors in host memory.
        rebuild: An item with tensors in their places, called as soon as they are begun: it must not compute with them, nor hold the
            arrays, whose memory may go.

    Raises:
        InvalidArgument: naming the argument and its value.
    """

    def __init__(
        self,
        items: Iterable[Any],
        way: Way,
        *,
        depth: int,
        max_bytes: int,
        arrays: Callable[[Any], list[Any]],
        rebuild: Callable[[Any, list[Any]], Any],
    ) -> None:
        self._closed = True  # until there is something to close
        self._depth = positive(depth, "depth", "depth must be > 0")
        self._max_bytes = positive(max_bytes, "max_bytes", "max_bytes must be > 0")
        self._source = iter(items)
        self._way, self._arrays, self._rebuild = way, arrays, rebuild
        #: Read, and waiting for room.
        self._next: tuple[Any, list[Part], int] | None = None
        self._flying: deque[tuple[Any, list[Any], Any, int]] = deque()
        self._nbytes = 0
        self._error: Exception | None = None
        self._ended = self._closed = False

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Any:
        try:
            if not self._ended:
                self._fill()
            if self._flying:
                found, tensors, known, nbytes = self._flying.popleft()
                self._nbytes -= nbytes
                self._way.hand_over(tensors, known)
                return found
        except BaseException:
            self.close()
            raise
        error, self._error = self._error, None
        self.close()
        if error is not None:
            raise error
        raise StopIteration

    def _fill(self) -> None:
        """Begin as many items as there is room for."""
        try:
            while len(self._flying) < self._depth:
                if self._next is None:
                    item = next(self._source)
                    parts = [_part(value) for value in self._arrays(item)]
                    self._next = item, parts, sum(part.array.nbytes for part in parts)
                item, parts, nbytes = self._next
                if self._flying and self._nbytes + nbytes > self._max_bytes:
                    return
                self._next = None
                tensors, known = self._way.begin(parts)
                self._flying.append((self._rebuild(item, tensors), tensors, known, nbytes))
                self._nbytes += nbytes
                # Not kept by this frame while the source waits for the next one.
                del item, parts, tensors
        except StopIteration:
            self._ended = True
        except Exception as error:
            self._ended, self._error, self._next = True, error, None

    def close(self) -> None:
        """Forget what is in flight, and close the source; further ``next()`` gives StopIteration."""
        if self._closed:
            return
        self._closed = self._ended = True
        self._next = self._error = None
        self._flying.clear()
        try:
            self._way.close()
        finally:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()
