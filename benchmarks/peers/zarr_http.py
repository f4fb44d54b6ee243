"""Zarr v3 behind nginx, read by TensorStore and by zarr-python: pixels as files on a web server.

Chunks are (1, 1, 3, 256, 256), exactly a tile, without codecs: an aligned tile is one GET of a file that nginx hands to the kernel. nginx runs with
sendfile, a cache of open files, no access log, and connections that are never closed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

from .base import (
    BATCH,
    CHANNELS,
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
    free_port,
    running,
    tile_places,
)

__all__ = ["CHUNK", "TensorStore", "ZarrPython", "write"]

CHUNK = (1, 1, CHANNELS, TILE, TILE)

#: Reads that TensorStore's client keeps under way: more gained nothing.
_AHEAD = 16

_CONF = """
worker_processes 2;
error_log stderr crit;
pid {folder}/nginx.pid;
daemon off;
user root;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
    open_file_cache max=20000 inactive=10m;
    open_file_cache_valid 10m;
    open_file_cache_errors on;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{ listen {host}:{port}; root {root}; }}
}}
"""


def write(image: np.ndarray, folder: Path) -> None:
    """The store."""
    import zarr

    array = zarr.create_array(
        store=str(folder),
        shape=image.shape,
        chunks=CHUNK,
        dtype=image.dtype,
        compressors=None,
        filters=None,
        dimension_names=tuple("tzcyx"),
    )
    array[...] = image


@contextmanager
def _nginx(data: Data, where: Where) -> Iterator[tuple[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        # Its workers run as the same user, but leave the folder to be found by any.
        Path(folder).chmod(0o755)
        port = free_port(where.host)
        conf = Path(folder, "nginx.conf")
        conf.write_text(_CONF.format(folder=folder, host=where.host, port=port, root=data.folder))
        with running(["nginx", "-p", folder, "-c", str(conf)]) as process:
            url = f"http://{where.host}:{port}/{data.zarr.name}"
            for _ in range(100):
                try:
                    urlopen(f"{url}/zarr.json", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            else:
                raise RuntimeError("nginx did not start")
            yield url, process.pid


class _ZarrHTTP(Peer):
    modules: tuple[str, ...] = ()
    reader: type[Any]

    def missing(self) -> str:
        return absent("zarr", *self.modules) or ("" if shutil.which("nginx") else "no nginx: apt-get install nginx-light")

    @contextmanager
    def serve(self, data: Data, where: Where = HERE) -> Iterator[Served]:
        with _nginx(data, where) as (url, pid):
            yield Served(self.reader(url, data.shape), (pid,))


@dataclass
class TensorStoreReader(Reader):
    """TensorStore, its own cache off: every read goes to the server, as everybody's."""

    url: str
    shape: Shape

    def open(self) -> None:
        import tensorstore as ts

        self._array = ts.open(
            {"driver": "zarr3", "kvstore": f"{self.url}/", "recheck_cached_metadata": False, "recheck_cached_data": True}
        ).result()

    def _each(self, regions: Iterator[Any]) -> Iterator[np.ndarray]:
        """Reads in order, some of them ahead."""
        waiting: deque[Any] = deque()
        for region in regions:
            waiting.append(self._array[region].read())
            if len(waiting) == _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def tiles(self) -> Iterator[np.ndarray]:
        yield from self._each(_region(place, TILE) for place in tile_places(self.shape))

    def plane(self, place: Plane) -> np.ndarray:
        z, c, y, x = place
        found: np.ndarray = self._array[0, z, c, y : y + TILE, x : x + TILE].read().result()
        return found

    def windows(self, origins: Sequence[Place]) -> Iterator[list[np.ndarray]]:
        found = self._each(_region(place, WINDOW) for place in origins)
        for first in range(0, len(origins), BATCH):
            yield [next(found) for _ in origins[first : first + BATCH]]


@dataclass
class ZarrReader(Reader):
    """zarr-python over fsspec. Its chunks of one read are fetched together, so whole planes are read where whole planes are wanted."""

    url: str
    shape: Shape

    def open(self) -> None:
        import zarr

        self._array: Any = zarr.open_array(zarr.storage.FsspecStore.from_url(self.url), mode="r")

    def tiles(self) -> Iterator[np.ndarray]:
        for z in range(self.shape[1]):
            depth = self._array[0, z]
            for _, y, x in tile_places((1, 1, *self.shape[2:])):
                yield depth[:, y : y + TILE, x : x + TILE]

    def plane(self, place: Plane) -> np.ndarray:
        z, c, y, x = place
        found: np.ndarray = self._array[0, z, c, y : y + TILE, x : x + TILE]
        return found

    def windows(self, origins: Sequence[Place]) -> Iterator[list[np.ndarray]]:
        for first in range(0, len(origins), BATCH):
            yield [self._array[_region(place, WINDOW)] for place in origins[first : first + BATCH]]


def _region(place: Place, size: int) -> tuple[Any, ...]:
    z, y, x = place
    return (0, z, slice(None), slice(y, y + size), slice(x, x + size))


class TensorStore(_ZarrHTTP):
    """Google's C++ reader."""

    name = "TensorStore, Zarr, nginx"
    modules = ("tensorstore",)
    reader = TensorStoreReader


class ZarrPython(_ZarrHTTP):
    """The Python reader."""

    name = "zarr-python, Zarr, nginx"
    modules = ("aiohttp", "fsspec")
    reader = ZarrReader
    share = 0.25
