"""What the way to a device asks of CUDA, and torch's answer: all that a test without a device has to put something in the place of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np

__all__ = ["CudaEdge", "Event", "TorchCuda", "empty_like", "order_of_axes"]


def order_of_axes(array: np.ndarray) -> list[int]:
    """The axes from the one with the longest way between its elements to the one with the shortest."""
    if array.flags.c_contiguous:
        return list(range(array.ndim))
    return sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))


def empty_like(torch: Any, array: np.ndarray, **where: Any) -> Any:
    """A dense torch tensor of an array's shape and dtype, its axes in the same order in memory."""
    strides, step = [1] * array.ndim, 1
    for axis in reversed(order_of_axes(array)):
        strides[axis] = step
        step *= max(array.shape[axis], 1)
    return torch.empty_strided(array.shape, strides, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, **where)


class Event(Protocol):
    """A point in the work of a stream."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class CudaEdge(Protocol):
    """What is asked of CUDA, of one device and one side stream."""

    def pinned(self, nbytes: int) -> np.ndarray:
        """New page-locked memory: writable bytes, 1-D. It goes with the array."""

    def empty_like(self, array: np.ndarray) -> Any:
        """A tensor on the device, of the array's shape, dtype and order of axes in memory, for the side stream to copy to."""

    def copy(self, staged: np.ndarray, into: Any, at: int = 0) -> None:
        """Let the side stream copy bytes in pinned memory into a tensor's memory; returns at once.

        Args:
            staged: 1-D bytes.
            into: Of :meth:`empty_like`.
            at: The byte of the tensor's memory where they go.
        """

    def record(self) -> Event:
        """The point that the side stream's work has been queued up to."""

    def hand_over(self, tensors: Sequence[Any], event: Event) -> None:
        """Order the event before all that the current stream does from now on; others get the tensors' memory only after that."""


@cache
def _side_stream(index: int) -> Any:
    """One for all copies to a device: it copies one thing at a time anyway, and what torch's allocator has kept of one stream's is of no
    use to another."""
    import torch

    return torch.cuda.Stream(torch.device("cuda", index))


class TorchCuda:
    """CUDA through torch.

    Args:
        torch: The module.
        device: ``cuda``, which is the device that is current now, or ``cuda:N``.
    """

    def __init__(self, torch: Any, device: str) -> None:
        self._torch = torch
        where = torch.device(device)
        self._where = where if where.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._side = _side_stream(self._where.index)

    def pinned(self, nbytes: int) -> np.ndarray:
        """See :meth:`CudaEdge.pinned`."""
        # Without it this would wake up the current device, which may be another process's.
        with self._torch.cuda.device(self._where):
            found: np.ndarray = self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True).numpy()
        return found

    def empty_like(self, array: np.ndarray) -> Any:
        """See :meth:`CudaEdge.empty_like`."""
        with self._torch.cuda.stream(self._side):
            return empty_like(self._torch, array, device=self._where)

    def copy(self, staged: np.ndarray, into: Any, at: int = 0) -> None:
        """See :meth:`CudaEdge.copy`."""
        torch = self._torch
        with torch.cuda.stream(self._side):
            # Bytes to bytes: for whatever else torch may need a kernel, or memory that is not pinned.
            memory = torch.empty(0, dtype=torch.uint8, device=self._where).set_(into.untyped_storage())
            memory[at : at + len(staged)].copy_(torch.from_numpy(staged), non_blocking=True)

    def record(self) -> Event:
        """See :meth:`CudaEdge.record`."""
        event: Event = self._torch.cuda.Event()
        event.record(self._side)  # type: ignore[attr-defined]
        return event

    def hand_over(self, tensors: Sequence[Any], event: Event) -> None:
        """See :meth:`CudaEdge.hand_over`."""
        current = self._torch.cuda.current_stream(self._where)
        current.wait_event(event)
        for tensor in tensors:
            # Made on the side stream, whose next copies would get this memory as soon as it is dropped here.
            tensor.record_stream(current)
