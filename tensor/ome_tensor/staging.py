"""On the way to a device: pinned buffers that are used again, copies beside the computation, bounded in items and in bytes.

What touches CUDA is behind :class:`.CudaEdge`; everything else is arithmetic and order, and is tested without a device.

An item is in one of three states: being read by whoever gives the items (a network: its own reading ahead has its own bounds);
*in flight*, copied to a pinned buffer and from there to the device on a side stream; or handed over, its copy ordered before whatever
the stream that is current then does next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .ahead import Ahead, Part, alone, itself
from .cuda_edge import CudaEdge, Event, empty_like, order_of_axes
from .errors import DeviceUnavailable, InvalidArgument, MissingDependency
from .tiling import positive

__all__ = ["IN_FLIGHT_BYTES", "Ahead", "PinnedPool", "check_pinned", "jax_each", "pinned_each", "upload_each"]

#: Bytes in flight to a device, unless told otherwise.
IN_FLIGHT_BYTES = 256 << 20

#: Pinned buffers are of sizes that are powers of two from this one on: page-locked memory is slow to get, few sizes are often used
#: again, and torch's allocator rounds up to them anyway.
_SMALLEST = 64 << 10

#: Of arrays that share a buffer: what any dtype, and a cache line, want.
_ALIGNMENT = 64


class PinnedPool:
    """Pinned buffers: one is used again when the copy from it is through, and waited for where there may be no more.

    Args:
        edge: Where they come from.
        buffers: How many there may be.
        max_bytes: How many bytes they may have together.

    Attributes:
        nbytes: Bytes of all buffers there are.
    """

    def __init__(self, edge: CudaEdge, buffers: int, max_bytes: int) -> None:
        self._edge, self._buffers, self._max_bytes = edge, buffers, max_bytes
        self._busy: deque[tuple[np.ndarray, Event]] = deque()
        self._free: list[np.ndarray] = []
        self.nbytes = 0

    def take(self, nbytes: int) -> np.ndarray:
        """A buffer of at least so many bytes (no more than ``max_bytes``), from which nothing is being copied any more. 1-D bytes."""
        size = min(max(_SMALLEST, 1 << max(0, nbytes - 1).bit_length()), self._max_bytes)
        # Copies of one stream end in the order in which they were queued.
        while self._busy and self._busy[0][1].query():
            self._free.append(self._busy.popleft()[0])
        while True:
            fitting = [place for place, buffer in enumerate(self._free) if buffer.nbytes >= nbytes]
            if fitting:
                return self._free.pop(min(fitting, key=lambda place: self._free[place].nbytes))
            if self.nbytes + size <= self._max_bytes and len(self._free) + len(self._busy) < self._buffers:
                self.nbytes += size
                return self._edge.pinned(size)
            # Too small, and in the way of a larger one. There is one of the two: all buffers are here while this runs.
            if self._free:
                self.nbytes -= self._free.pop().nbytes
            else:
                self._wait()

    def give(self, buffer: np.ndarray, event: Event) -> None:
        """Give a buffer back: it is free once the event has come."""
        self._busy.append((buffer, event))

    def close(self) -> None:
        """Let go of all buffers, once nothing is copied from them any more."""
        while self._busy:
            self._wait()
        self._free.clear()
        self.nbytes = 0

    def _wait(self) -> None:
        buffer, event = self._busy.popleft()
        event.synchronize()
        self._free.append(buffer)


class _Upload:
    """The way to a CUDA device. See :class:`.Way`."""

    def __init__(self, edge: CudaEdge, depth: int, max_bytes: int) -> None:
        self._edge = edge
        self._pinned = max(max_bytes, _SMALLEST)
        # While one piece is copied to the device, the next one is copied to the other buffer.
        self._piece = self._pinned if depth == 1 else self._pinned // 2
        self._pool = PinnedPool(edge, depth, self._pinned)

    def begin(self, parts: list[Part]) -> tuple[list[Any], Any]:
        tensors = [self._edge.empty_like(part.array) for part in parts]
        nbytes = sum(_aligned(part.array.nbytes) for part in parts)
        event = self._together(parts, tensors, nbytes) if nbytes <= self._pinned else self._in_pieces(parts, tensors)
        # The same bytes by the name that NumPy does not know.
        shown = [tensor if part.dtype is None else tensor.view(part.dtype) for part, tensor in zip(parts, tensors, strict=True)]
        return shown, event

    def _together(self, parts: list[Part], tensors: list[Any], nbytes: int) -> Event:
        """All arrays of an item through one buffer."""
        buffer, at = self._pool.take(nbytes), 0
        for (array, _), tensor in zip(parts, tensors, strict=True):
            if not array.nbytes:
                continue
            # In the order in which it lies: the device gets the layout that the array has, and the copy to here runs along both.
            staged = buffer[at : at + array.nbytes]
            lying = array.transpose(order_of_axes(array))
            np.copyto(staged.view(array.dtype).reshape(lying.shape), lying)
            self._edge.copy(staged, tensor)
            at += _aligned(array.nbytes)
        event = self._edge.record()
        self._pool.give(buffer, event)
        return event

    def _in_pieces(self, parts: list[Part], tensors: list[Any]) -> Event:
        """An item that is larger than all pinned memory may be: through two buffers by turns."""
        for (array, _), tensor in zip(parts, tensors, strict=True):
            # A view, unless the array has gaps.
            flat = array.transpose(order_of_axes(array)).reshape(-1).view(np.uint8)
            for at in range(0, len(flat), self._piece):
                piece = flat[at : at + self._piece]
                buffer = self._pool.take(len(piece))
                staged = buffer[: len(piece)]
                np.copyto(staged, piece)
                self._edge.copy(staged, tensor, at)
                self._pool.give(buffer, self._edge.record())
        return self._edge.record()

    def hand_over(self, tensors: list[Any], known: Any) -> None:
        self._edge.hand_over(tensors, known)

    def close(self) -> None:
        self._pool.close()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def upload_each(
    items: Iterable[Any],
    edge: CudaEdge,
    *,
    depth: int = 2,
    max_bytes: int = IN_FLIGHT_BYTES,
    arrays: Callable[[Any], list[Any]] = itself,
    rebuild: Callable[[Any, list[Any]], Any] = alone,
) -> Ahead:
    """Items with their arrays on a device. Each is ordered after its copies on the stream that is current where ``next()`` is called.

    Tensors lie in memory as their arrays do (a permuted layout stays one), and are theirs alone who takes them.

    Args:
        items, arrays, rebuild: As of :class:`Ahead`; an array's memory may go, or change, as soon as the next item is asked for.
        edge: The device.
        depth: As of :class:`Ahead`, and as many pinned buffers.
        max_bytes: Bytes on the device that are not handed over yet, one item being always allowed; and, strictly, bytes of pinned
            memory (64 KiB at least): what is larger goes in pieces.

    Raises:
        InvalidArgument: naming the argument and its value.
    """
    depth = positive(depth, "depth", "depth must be > 0")
    max_bytes = positive(max_bytes, "max_bytes", "max_bytes must be > 0")
    way = _Upload(edge, depth, max_bytes)
    return Ahead(items, way, depth=depth, max_bytes=max_bytes, arrays=arrays, rebuild=rebuild)


def check_pinned() -> Any:
    """torch, if it can give page-locked memory.

    Raises:
        DeviceUnavailable: without CUDA it cannot.
        MissingDependency: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependency("Torch is not installed. Install it with: pip install 'ome-tensor[torch]'") from error
    if not torch.cuda.is_available():
        raise DeviceUnavailable("pin_memory=True needs CUDA, and torch reports no CUDA.", field="pin_memory", value=True)
    return torch


class _Pin:
    """The way to page-locked memory. See :class:`Way`.

    Not through a :class:`PinnedPool`: whoever gets these tensors begins copies from them on streams that nobody else knows of, and
    drops them at once. torch's own allocator uses memory again, too, and only when copies that torch has begun from it, on whatever
    stream, are through.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def begin(self, parts: list[Part]) -> tuple[list[Any], Any]:
        return [self._pinned(part) for part in parts], None

    def _pinned(self, part: Part) -> Any:
        found = empty_like(self._torch, part.array, pin_memory=True)
        np.copyto(found.numpy(), part.array)
        return found if part.dtype is None else found.view(part.dtype)

    def hand_over(self, tensors: list[Any], known: Any) -> None:
        pass

    def close(self) -> None:
        pass


def pinned_each(
    items: Iterable[Any],
    arrays: Callable[[Any], list[Any]] = itself,
    rebuild: Callable[[Any, list[Any]], Any] = alone,
) -> Ahead:
    """Items with their arrays in page-locked memory, as torch tensors: one copy, and the only one. Nothing is read ahead.

    Memory is used again when its tensors are gone *and* copies that torch began from them are through.

    Args:
        items, arrays, rebuild: As of :class:`Ahead`.

    Raises:
        DeviceUnavailable, MissingDependency: As :func:`check_pinned`; at the call.
    """
    return Ahead(items, _Pin(check_pinned()), depth=1, max_bytes=1, arrays=arrays, rebuild=rebuild)


class _ToJax:
    """The way to JAX. See :class:`Way`."""

    def __init__(self, jax: Any, device: Any, private: bool) -> None:
        self._jax, self._device, self._private = jax, device, private

    def begin(self, parts: list[Part]) -> tuple[list[Any], Any]:
        return [self._put(part) for part in parts], None

    def _put(self, part: Part) -> Any:
        array = part.array
        if part.dtype is not None:
            raise InvalidArgument(f"NumPy has no {part.dtype}: convert it before", field="arrays", value=part.dtype)
        kept = self._jax.dtypes.canonicalize_dtype(array.dtype)
        if kept != array.dtype:
            # It would take the lower half of an integer's bits, and say nothing.
            raise InvalidArgument(
                f"JAX makes {kept} of {array.dtype}: jax.config.update('jax_enable_x64', True) lets it keep them; or ask the view for dtype=",
                field="dtype",
                value=array.dtype,
            )
        return self._jax.device_put(array if self._private else _copied(array), self._device)

    def hand_over(self, tensors: list[Any], known: Any) -> None:
        pass

    def close(self) -> None:
        pass


def _copied(array: np.ndarray) -> np.ndarray:
    """In memory that begins where JAX's CPU takes it as it is: no second copy."""
    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % _ALIGNMENT
    found: np.ndarray = memory[skip : skip + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(found, array)
    return found


def _jax_device(jax: Any, device: Any) -> Any:
    """What ``jax.device_put`` takes. Raises DeviceUnavailable, InvalidArgument."""
    if not isinstance(device, str):
        return device
    kind, _, index = device.strip().lower().partition(":")
    if kind not in ("cpu", "gpu", "cuda", "rocm", "tpu") or not (index.isdecimal() or index == ""):
        raise InvalidArgument(
            f"Unsupported device '{device}'. Expected cpu, cuda, gpu or tpu, or kind:N.", field="device", value=device
        )
    try:
        return jax.devices(kind)[int(index or 0)]
    except (RuntimeError, IndexError) as error:
        raise DeviceUnavailable(f"device '{device}' requested but JAX does not have it.", field="device", value=device) from error


def jax_each(
    items: Iterable[Any],
    device: Any = None,
    *,
    depth: int = 2,
    max_bytes: int = IN_FLIGHT_BYTES,
    arrays: Callable[[Any], list[Any]] = itself,
    rebuild: Callable[[Any, list[Any]], Any] = alone,
    private: bool = False,
) -> Ahead:
    """Items with their arrays as JAX's: ``jax.device_put`` returns at once, so that while one is used the next ones are on their way.

    Args:
        items, depth, max_bytes, arrays, rebuild: As of :class:`Ahead`.
        device: A ``jax.Device``, a sharding, or ``cpu``, ``cuda``, ``cuda:1`` ...; ``None`` for JAX's usual one.
        private: The arrays' memory is never written to again, as that of batches from views is not: JAX may then take it as it is,
            which on a CPU is for good, whatever ``may_alias`` says. Else it gets a copy, which nobody else knows.

    Raises:
        MissingDependency: JAX is not installed.
        DeviceUnavailable, InvalidArgument: naming the argument. Of an item: 64-bit values that JAX would narrow.
    """
    try:
        import jax
    except ImportError as error:
        raise MissingDependency("JAX is not installed. Install it with: pip install 'ome-tensor[jax]'") from error
    way = _ToJax(jax, _jax_device(jax, device), private)
    return Ahead(items, way, depth=depth, max_bytes=max_bytes, arrays=arrays, rebuild=rebuild)
