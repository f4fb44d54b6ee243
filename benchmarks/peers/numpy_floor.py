"""NumPy on a plain array in the client's own process: what copying the same pixels costs here and now. The floor of whoever maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .base import BATCH, CHANNELS, HERE, TILE, WINDOW, Data, Peer, Place, Plane, Reader, Served, Shape, Where, tile_places

__all__ = ["Floor", "FloorReader"]


class Floor(Peer):
    """See the module."""

    name = "NumPy, in process"

    def missing(self) -> str:
        return ""

    @contextmanager
    def serve(self, data: Data, where: Where = HERE) -> Iterator[Served]:
        yield Served(FloorReader(data.npy, data.shape))


@dataclass
class FloorReader(Reader):
    """Its only side; each result is a fresh array, as everybody's is."""

    path: Path
    shape: Shape

    def open(self) -> None:
        self._pixels = np.load(self.path)[0]

    def tiles(self) -> Iterator[np.ndarray]:
        for z, y, x in tile_places(self.shape):
            yield self._pixels[z, :, y : y + TILE, x : x + TILE].copy()

    def plane(self, place: Plane) -> np.ndarray:
        z, c, y, x = place
        return self._pixels[z, c, y : y + TILE, x : x + TILE].copy()

    def windows(self, origins: Sequence[Place]) -> Iterator[np.ndarray]:
        for first in range(0, len(origins), BATCH):
            some = origins[first : first + BATCH]
            batch = np.empty((len(some), CHANNELS, WINDOW, WINDOW), self._pixels.dtype)
            for out, (z, y, x) in zip(batch, some, strict=True):
                out[...] = self._pixels[z, :, y : y + WINDOW, x : x + WINDOW]
            yield batch
