"""Upstream's TensorView in the client's own process: no wire at all. So slow that it is given a hundredth of the requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .base import BATCH, HERE, TILE, WINDOW, Data, Peer, Place, Plane, Reader, Served, Shape, Where, absent, tile_places

__all__ = ["Upstream", "UpstreamReader"]


class Upstream(Peer):
    """See the module."""

    name = "upstream, in process"
    share = 0.01

    def missing(self) -> str:
        return absent("ome_arrow")

    @contextmanager
    def serve(self, data: Data, where: Where = HERE) -> Iterator[Served]:
        yield Served(UpstreamReader(data.npy, data.shape))


@dataclass
class UpstreamReader(Reader):
    """Its only side. The record is made whole beforehand."""

    path: Path
    shape: Shape

    def open(self) -> None:
        from benchmarks.data import list_chunks

        # Lists are its default and what it reads fastest: ten times as fast as the byte chunks that everybody else's file has.
        self._record = list_chunks(np.load(self.path), (1, 512, 512))

    def _read(self, **selection: Any) -> np.ndarray:
        from ome_arrow.tensor import TensorView

        return np.from_dlpack(TensorView(self._record, t=0, **selection).to_dlpack(mode="numpy"))

    def tiles(self) -> Iterator[np.ndarray]:
        for z, y, x in tile_places(self.shape):
            yield self._read(z=z, roi=(x, y, TILE, TILE), layout="CHW")

    def plane(self, place: Plane) -> np.ndarray:
        z, c, y, x = place
        return self._read(z=z, c=c, roi=(x, y, TILE, TILE), layout="HW")

    def windows(self, origins: Sequence[Place]) -> Iterator[list[np.ndarray]]:
        for first in range(0, len(origins), BATCH):
            yield [self._read(z=z, roi=(x, y, WINDOW, WINDOW), layout="CHW") for z, y, x in origins[first : first + BATCH]]
