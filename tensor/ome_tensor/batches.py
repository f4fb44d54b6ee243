"""Batches: tiles or windows of one shape as one array, and what is known of each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np

from .handoff import Device, DLPackTensor, export_tensor, to_cupy, to_torch, upload_each
from .layout import AXES

__all__ = ["BatchArray", "ImageBatch", "arrays_of", "batch_in_layout", "batch_to_axes", "uploaded", "with_arrays"]


B = TypeVar("B", bound="BatchArray")


@dataclass(frozen=True, slots=True, eq=False)
class BatchArray:
    """Tiles (or windows) of one shape, and where they belong. A DLPack producer.

    Attributes:
        array: The pixels, ``(N, <the view's layout>)``; private memory, writable. With ``device="cuda"`` a torch tensor there.
        numbers: Of each tile its number in the row-major enumeration of the view's tiles, or in the list of origins. (N,)
        position: The first tile's place in this read, from 0; the others follow.
        origins: Of each tile ``(t, z, y, x)`` of its first element, in image coordinates (``-1`` on an axis with nothing selected). (N, 4)
        valid: Of each tile ``(z, h, w)``: how much of it are pixels of the view; the rest is padding. (N, 3)
    """

    array: Any
    numbers: np.ndarray
    position: int
    origins: np.ndarray
    valid: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in elements."""
        return tuple(self.array.shape)

    def to_torch(self) -> Any:
        """The pixels as a torch tensor on the same memory."""
        return to_torch(self._producer)

    def to_cupy(self) -> Any:
        """The pixels as a CuPy array on the same memory, which must be a CUDA device's. Raises InvalidArgument, MissingDependency."""
        return to_cupy(self)

    def __dlpack__(self, **options: Any) -> Any:
        """A capsule, by DLPack 1.0's rules: see :meth:`.DLPackTensor.__dlpack__`, and :func:`.export_tensor` of a torch tensor."""
        producer = self._producer
        return producer.__dlpack__(**options) if isinstance(producer, DLPackTensor) else export_tensor(producer, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._producer.__dlpack_device__()
        return device

    @property
    def _producer(self) -> Any:
        return DLPackTensor(self.array) if isinstance(self.array, np.ndarray) else self.array


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch(BatchArray):
    """Tiles (or windows) of many images. See :class:`BatchArray`; numbers are those of the enumeration of all images' tiles.

    Attributes:
        images: Of each tile which image of the set it is of, from 0. (N,)
        rows: Of each tile its image's row in the dataset. (N,)
        beside: By image column that comes beside, the same regions of its images: ``(N, <the view's layout>)``, where ``array`` is.
    """

    images: np.ndarray
    rows: np.ndarray
    beside: dict[str, Any]


def arrays_of(batch: BatchArray) -> list[Any]:
    """All pixels of a batch: its own, and what comes beside."""
    return [batch.array, *(batch.beside.values() if isinstance(batch, ImageBatch) else ())]


def with_arrays(batch: B, arrays: Sequence[Any]) -> B:
    """The same batch with other arrays, in the order of :func:`arrays_of`."""
    if isinstance(batch, ImageBatch):
        return replace(batch, array=arrays[0], beside=dict(zip(batch.beside, arrays[1:], strict=True)))
    return replace(batch, array=arrays[0])


def uploaded(batches: Iterator[B], device: Device) -> Iterator[B]:
    """The batches with their arrays, and what comes beside, on a CUDA device."""
    return upload_each(batches, device, arrays=arrays_of, rebuild=with_arrays)


@cache
def _axes(layout: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[slice | None, ...]]:
    """With a leading axis: the axes to drop, the order of those left, the order that undoes it, and the index that puts the dropped ones back."""
    kept = [letter for letter in AXES if letter in layout]
    dropped = tuple(1 + axis for axis, letter in enumerate(AXES) if letter not in layout)
    order = (0, *(1 + kept.index(letter) for letter in layout))
    back = (0, *(1 + layout.index(letter) for letter in kept))
    return dropped, order, back, (slice(None), *(slice(None) if letter in layout else None for letter in AXES))


def batch_in_layout(array: np.ndarray, layout: str, contiguous: bool) -> np.ndarray:
    """(N, T, Z, C, H, W) pixels as (N, <layout>): a view, copied only where that is not C-contiguous and ``contiguous`` asks for it."""
    dropped, order, _, _ = _axes(layout)
    shown = array.squeeze(dropped).transpose(order)
    return np.ascontiguousarray(shown) if contiguous else shown


def batch_to_axes(array: np.ndarray, layout: str) -> np.ndarray:
    """The inverse of :func:`batch_in_layout`: an (N, <layout>) array seen as (N, T, Z, C, H, W), so that it can be gathered into."""
    _, _, back, places = _axes(layout)
    return array.transpose(back)[places]
