"""One read over several connections: its tiles are dealt out to as many streams, like cards, and taken back in the same order.

Each stream is a read of its own that resumes by itself; what it asks for is a shard of the caller's shard, so that servers know nothing of it.
Each is read on a thread of its own: a connection is only as far ahead as somebody takes from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ome_tensor.prefetch import Prefetcher
from ome_tensor.tiling import Order, Tile

__all__ = ["deal", "taken_back"]

TileAndArray = tuple[Tile, np.ndarray]


def deal(order: Order, length: int, count: int) -> list[tuple[Order, int]]:
    """The orders of up to ``count`` reads that together are one of ``length`` tiles in ``order``, and how many tiles each has.

    The i-th has the tiles at positions i, i + count, i + 2 count, ... of that read.
    """
    parts = []
    for i in range(min(count, length)):
        # Position p of a shard is place shard_index + p * shard_count of the whole order.
        start, residue = divmod(order.start + i, count)
        index = order.shard_index + residue * order.shard_count
        part = replace(order, shard_index=index, shard_count=order.shard_count * count, start=start)
        parts.append((part, -(-(length - i) // count)))
    return parts


def taken_back(parts: Sequence[Prefetcher[TileAndArray]], start: int, length: int) -> Iterator[TileAndArray]:
    """The tiles of dealt reads in the order of the one that they are.

    Args:
        parts: The reads, in the order of :func:`deal`.
        start: Position of the first tile.
        length: Number of tiles.
    """
    try:
        for i in range(length):
            tile, block = next(parts[i % len(parts)])
            yield replace(tile, position=start + i), block
    finally:
        for part in parts:
            part.close()
