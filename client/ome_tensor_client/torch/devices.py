"""The last step of a batch: to pinned memory, or to a GPU, while the one before is used."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from ome_tensor.handoff import Device, upload_each
from ome_tensor.staging import pinned_each

from .batch import Batch

if TYPE_CHECKING:
    from .loader_stats import LoaderStats

__all__ = ["tensors_of", "to_device", "with_tensors"]


class _Item(Protocol):
    data: Any


T = TypeVar("T", bound=_Item)


def tensors_of(data: Any) -> list[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples, in the order in which :func:`with_tensors` puts them back."""
    if isinstance(data, torch.Tensor):
        return [data]
    if isinstance(data, dict):
        return [tensor for value in data.values() for tensor in tensors_of(value)]
    if isinstance(data, (list, tuple)):
        return [tensor for value in data for tensor in tensors_of(value)]
    return []


def with_tensors(data: Any, tensors: Iterator[Any]) -> Any:
    """The same nested data, with other tensors in the places of its own."""
    if isinstance(data, torch.Tensor):
        return next(tensors)
    if isinstance(data, dict):
        made = {key: with_tensors(value, tensors) for key, value in data.items()}
        return Batch(made) if isinstance(data, Batch) else made
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(with_tensors(value, tensors) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(with_tensors(value, tensors) for value in data)
    return data


def to_device(items: Iterator[T], device: Device, pin_memory: bool, stats: LoaderStats) -> Iterator[T]:
    """Items with their tensors where they are wanted: as they are, pinned, or on a GPU.

    Raises:
        DeviceUnavailable: there is no CUDA.
    """
    if device.kind == "cpu" and not pin_memory:
        return items
    # The source's own time is the network's; what is left of this step is the copy's.
    inside = 0.0

    def measured() -> Iterator[T]:
        nonlocal inside
        while True:
            began = time.perf_counter()
            item = next(items, None)
            inside += time.perf_counter() - began
            if item is None:
                return
            yield item

    def rebuilt(item: T, tensors: list[Any]) -> T:
        item.data = with_tensors(item.data, iter(tensors))
        return item

    arrays = lambda item: tensors_of(item.data)  # noqa: E731
    found = (
        pinned_each(measured(), arrays, rebuilt)
        if device.kind == "cpu"
        else upload_each(measured(), device, arrays=arrays, rebuild=rebuilt)
    )

    def timed() -> Iterator[T]:
        while True:
            began, before = time.perf_counter(), inside
            item = next(found, None)
            stats.copy += time.perf_counter() - began - (inside - before)
            if item is None:
                return
            yield item

    return timed()
