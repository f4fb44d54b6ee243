"""The floor: NumPy gathers into a reused buffer, a plain TCP socket carries it, the client receives into a reused buffer. No framing, no checks.

Run as a program it is the server: ``python -m benchmarks.peers.raw IMAGE.npy HOST``.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
    python_server,
    tile_places,
)

__all__ = ["RawReader", "RawSocket"]

#: A request: its kind, and the number of places (four int32 each) that follow.
_HEAD = struct.Struct("<ii")
_TILES, _PLANE, _WINDOWS = range(3)
#: Tiles sent at once: about 1 MiB, as everybody's messages.
_RUN = 3


class RawSocket(Peer):
    """See the module."""

    name = "raw TCP socket"
    concurrent = True

    def missing(self) -> str:
        return ""

    @contextmanager
    def serve(self, data: Data, where: Where = HERE) -> Iterator[Served]:
        with python_server(["-m", __name__, str(data.npy), where.host], where) as (target, pid):
            yield Served(RawReader(target, data.shape), (pid,))


@dataclass
class RawReader(Reader):
    """Its client."""

    target: str
    shape: Shape

    def open(self) -> None:
        host, _, port = self.target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._run = np.empty((_RUN, CHANNELS, TILE, TILE), np.uint16)
        self._plane = np.empty((TILE, TILE), np.uint16)
        self._batch = np.empty((BATCH, CHANNELS, WINDOW, WINDOW), np.uint16)

    def _ask(self, kind: int, places: Sequence[Sequence[int]] = ()) -> None:
        self._socket.sendall(_HEAD.pack(kind, len(places)) + np.array(places, np.int32).tobytes())

    def _receive(self, into: np.ndarray) -> np.ndarray:
        view = memoryview(into.reshape(-1).view(np.uint8))
        while view:
            got = self._socket.recv_into(view)
            if not got:
                raise ConnectionError("the raw server closed the connection")
            view = view[got:]
        return into

    def tiles(self) -> Iterator[np.ndarray]:
        left = sum(1 for _ in tile_places(self.shape))
        self._ask(_TILES)
        while left:
            count = min(left, _RUN)
            yield from self._receive(self._run[:count])
            left -= count

    def plane(self, place: Plane) -> np.ndarray:
        self._ask(_PLANE, [place])
        return self._receive(self._plane)

    def windows(self, origins: Sequence[Place]) -> Iterator[np.ndarray]:
        self._ask(_WINDOWS, [(z, 0, y, x) for z, y, x in origins])
        for first in range(0, len(origins), BATCH):
            yield self._receive(self._batch[: len(origins[first : first + BATCH])])

    def close(self) -> None:
        self._socket.close()


# -- the server --------------------------------------------------------------------------------------------------------------------


def _answer(stream: socket.socket, image: np.ndarray) -> None:
    """One connection, on a thread of its own."""
    run = np.empty((_RUN, CHANNELS, TILE, TILE), np.uint16)
    batch = np.empty((BATCH, CHANNELS, WINDOW, WINDOW), np.uint16)
    one = np.empty((TILE, TILE), np.uint16)
    with stream:
        while head := stream.recv(_HEAD.size, socket.MSG_WAITALL):
            kind, count = _HEAD.unpack(head)
            wanted = stream.recv(16 * count, socket.MSG_WAITALL) if count else b""
            places = np.frombuffer(wanted, np.int32).reshape(count, 4).tolist()
            if kind == _PLANE:
                z, c, y, x = places[0]
                one[...] = image[0, z, c, y : y + TILE, x : x + TILE]
                stream.sendall(one)
                continue
            size, room = (TILE, run) if kind == _TILES else (WINDOW, batch)
            wished = list(tile_places(image.shape)) if kind == _TILES else [(z, y, x) for z, _, y, x in places]
            for first in range(0, len(wished), len(room)):
                part = wished[first : first + len(room)]
                for block, (z, y, x) in zip(room, part, strict=False):
                    block[...] = image[0, z, :, y : y + size, x : x + size]
                stream.sendall(room[: len(part)])


def _main() -> None:
    image = np.load(sys.argv[1])
    with socket.create_server((sys.argv[2], 0)) as listener:
        host, port = listener.getsockname()[:2]
        print(f"listening on {host}:{port}", flush=True)
        while True:
            stream, _ = listener.accept()
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_answer, args=(stream, image), daemon=True).start()


if __name__ == "__main__":
    _main()
