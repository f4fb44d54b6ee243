"""How a server's datasets stand, as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ome_tensor.listing import DatasetState

from .entries import Entry
from .settings import Settings

__all__ = ["Gauge", "dataset_gauges"]

#: Name, meaning, and a number, or one for each value of a label.
Gauge = tuple[str, str, float | tuple[str, dict[str, float]]]


def dataset_gauges(entries: Sequence[Entry], resident_bytes: int, settings: Settings) -> Iterator[Gauge]:
    """What can be told of datasets without naming any.

    Args:
        entries: The datasets.
        resident_bytes: What the loaded ones take.
        settings: The server's.
    """
    states = Counter(str(entry.state) for entry in entries)
    yield "datasets", "Datasets by state.", ("state", {str(state): float(states[str(state)]) for state in DatasetState})
    yield "resident_bytes", "Bytes that loaded datasets take.", float(resident_bytes)
    yield "memory_limit_bytes", "Bytes that loaded datasets may take.", float(settings.dataset_bytes)
    yield "workers", "Worker processes.", float(settings.workers)
