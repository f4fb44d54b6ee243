"""bluesky tiled: an array service over HTTP, the nearest of its kind. Run as a program it is the server.

The array is held in memory in one chunk a depth, and a slice is one request: what its client does by itself for anything below 100 MiB.
Compression is off, for noise does not compress.
"""

from __future__ import annotations

import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import (
    BATCH,
    HERE,
    TILE,
    WINDOW,
    Data,
    Peer,
    Place,
    Plane,
    Reader,
    Served,
    Shape,
    Where,
    absent,
    python_server,
    tile_places,
)

__all__ = ["Tiled", "TiledReader"]

#: Depths that its client reads ahead.
_AHEAD = 2


class Tiled(Peer):
    """See the module."""

    name = "bluesky tiled"
    share = 0.1

    def missing(self) -> str:
        return absent("tiled", "uvicorn", "dask", "httpx")

    @contextmanager
    def serve(self, data: Data, where: Where = HERE) -> Iterator[Served]:
        with python_server(["-m", __name__, str(data.npy), where.host], where) as (target, pid):
            yield Served(TiledReader(target, data.shape), (pid,))


@dataclass
class TiledReader(Reader):
    """Its client: whole depths where all tiles are wanted, the next one under way; windows on eight threads."""

    target: str
    shape: Shape

    def open(self) -> None:
        from tiled.client import from_uri

        headers = {"Accept-Encoding": "identity"}
        self._array: Any = from_uri(f"http://{self.target}/api/v1", api_key="benchmark", headers=headers)["image"]
        self._pool = ThreadPoolExecutor(8)

    def tiles(self) -> Iterator[np.ndarray]:
        waiting = deque(self._pool.submit(self._array.__getitem__, (0, z)) for z in range(min(_AHEAD, self.shape[1])))
        for z in range(self.shape[1]):
            depth = waiting.popleft().result()
            if z + _AHEAD < self.shape[1]:
                waiting.append(self._pool.submit(self._array.__getitem__, (0, z + _AHEAD)))
            for _, y, x in tile_places((1, 1, *self.shape[2:])):
                yield depth[:, y : y + TILE, x : x + TILE]

    def plane(self, place: Plane) -> np.ndarray:
        z, c, y, x = place
        found: np.ndarray = self._array[0, z, c, y : y + TILE, x : x + TILE]
        return found

    def windows(self, origins: Sequence[Place]) -> Iterator[list[np.ndarray]]:
        def one(place: Place) -> Any:
            z, y, x = place
            return self._array[0, z, :, y : y + WINDOW, x : x + WINDOW]

        for first in range(0, len(origins), BATCH):
            yield list(self._pool.map(one, origins[first : first + BATCH]))

    def close(self) -> None:
        self._pool.shutdown()


def _main() -> None:
    import uvicorn
    from tiled.adapters.array import ArrayAdapter
    from tiled.adapters.mapping import MapAdapter
    from tiled.config import Authentication
    from tiled.server.app import build_app

    image = np.load(sys.argv[1])
    chunks = tuple((1,) * length if axis < 2 else (length,) for axis, length in enumerate(image.shape))
    tree = MapAdapter({"image": ArrayAdapter.from_array(image, chunks=chunks)})
    app = build_app(tree, authentication=Authentication(single_user_api_key="benchmark"))
    with socket.create_server((sys.argv[2], 0)) as listener:
        host, port = listener.getsockname()[:2]
        print(f"listening on {host}:{port}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    _main()
