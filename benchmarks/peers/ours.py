"""This project: ``ome-tensor serve`` in a process of its own, the client in another.

Means that this tree does not have yet (``--workers``, ``--store``, ``iter_windows``, ``compression=``, ``transport=``) are looked for rather than
assumed, so the benchmark measures a tree from before and after each of them. What stood in for one is said beside the figure.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np

from .base import BATCH, HERE, TILE, WINDOW, Data, Peer, Place, Plane, Reader, Served, Where, python_server

__all__ = ["Mapped", "Ours", "OursReader", "Workers", "has_option", "has_windows", "serve_flags", "transport"]

KEY = "image"

#: What the client may call its ways to the pixels: the first that it takes is used.
_WIRE, _MAPPED = ("grpc", "tcp", "wire", "stream"), ("mapped", "map", "shared", "local")


@cache
def serve_flags() -> str:
    """The help of ``serve``: which flags there are."""
    command = [sys.executable, "-m", "ome_tensor_client", "serve", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "200"}).stdout


@cache
def has_option(name: str) -> bool:
    """Whether ``connect`` takes an option."""
    from ome_tensor_client.options import Options

    return name in {option.name for option in fields(Options)}


@cache
def has_windows() -> bool:
    """Whether views iterate over windows."""
    from ome_tensor.lazy import LazyTensorView

    return hasattr(LazyTensorView, "iter_windows")


@cache
def transport(mapped: bool) -> str:
    """The ``transport=`` to ask for; empty where there is no choice."""
    if not has_option("transport"):
        return ""
    from ome_tensor.errors import OmeTensorError
    from ome_tensor_client import connect

    for name in _MAPPED if mapped else _WIRE:
        try:
            connect("localhost:1", transport=name).close()
        except OmeTensorError:
            continue
        return name
    return ""


class Ours(Peer):
    """Over TCP, one server process."""

    name = "ome-tensor, TCP"
    concurrent = True
    mapped = False
    flags: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        return "" if has_windows() else "windows: 16 single reads each, this tree has no iter_windows"

    def missing(self) -> str:
        return ""

    @contextmanager
    def serve(self, data: Data, where: Where = HERE) -> Iterator[Served]:
        command = ["-m", "ome_tensor_client", "serve", str(data.parquet), "--listen", f"{where.host}:0", "--log-level", "error"]
        command += ["--insecure"] if where.host != HERE.host else []
        # Beside the image's other files: what the default leaves in shared memory for a warm restart would stay there.
        command += ["--store", str(data.folder / "ome-tensor-store")]
        choice = transport(self.mapped)
        with python_server([*command, *self.flags], where) as (target, pid):
            yield Served(OursReader(target, {"transport": choice} if choice else {}), (pid,))


class Workers(Ours):
    """Over TCP, two server processes on one port."""

    name = "ome-tensor, TCP, --workers 2"
    only_concurrent = True
    flags = ("--workers", "2")

    @property
    def note(self) -> str:
        return ""

    def missing(self) -> str:
        return "" if "--workers" in serve_flags() else "this tree's server has no --workers yet"


class Mapped(Ours):
    """The server's pixels, mapped by a client on the same host."""

    name = "ome-tensor, mapped"
    concurrent = False
    mapped = True

    def missing(self) -> str:
        return "" if transport(mapped=True) else "this tree's client maps nothing yet"


@dataclass
class OursReader(Reader):
    """Its client.

    Attributes:
        target: ``HOST:PORT``.
        options: For ``connect``.
    """

    target: str
    options: dict[str, Any] = field(default_factory=dict)

    def open(self) -> None:
        from ome_tensor_client import connect

        # A server answers before it has loaded what it serves; a client waits for it.
        self._client = connect(self.target, **{"retry_for": 60.0} | self.options)
        self._client.image(KEY)
        self._view = self._client.tensor_view(KEY, t=0)

    def tiles(self) -> Iterator[np.ndarray]:
        for tile in self._client.tensor_view(KEY, t=0, layout="CYX").iter_tiles_3d(tile_size=(1, TILE, TILE)):
            yield np.from_dlpack(tile)

    def plane(self, place: Plane) -> np.ndarray:
        z, c, y, x = place
        return self._client.tensor_view(KEY, t=0, z=z, c=c, roi=(x, y, TILE, TILE), layout="YX").to_numpy()

    def windows(self, origins: Sequence[Place]) -> Iterator[Sequence[np.ndarray] | np.ndarray]:
        if hasattr(self._view, "iter_windows"):
            view = self._client.tensor_view(KEY, t=0)
            found = view.iter_windows([(0, *origin) for origin in origins], (1, WINDOW, WINDOW), batch_size=BATCH)
            for batch in found:
                yield np.from_dlpack(batch).reshape(-1, *self._one)
            return
        for first in range(0, len(origins), BATCH):
            yield [self._window(origin) for origin in origins[first : first + BATCH]]

    @property
    def _one(self) -> tuple[int, int, int]:
        return (3, WINDOW, WINDOW)

    def _window(self, origin: Place) -> np.ndarray:
        z, y, x = origin
        return self._client.tensor_view(KEY, t=0, z=z, roi=(x, y, WINDOW, WINDOW), layout="CYX").to_numpy()

    def close(self) -> None:
        self._client.close()
