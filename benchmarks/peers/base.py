"""What is asked of every peer, and the image it is asked of.

Importing this pulls in NumPy and nothing else of weight: each peer's client and server run in processes of their own, and none of them should hold
another's libraries when its memory is measured.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

__all__ = [
    "BATCH",
    "CHANNELS",
    "HERE",
    "TILE",
    "WINDOW",
    "Data",
    "Peer",
    "Place",
    "Plane",
    "Reader",
    "Served",
    "Shape",
    "Where",
    "absent",
    "free_port",
    "python_server",
    "running",
    "tile_places",
]

#: Sides of the tiles and single planes; of the windows; windows in a batch; channels of the image.
TILE, WINDOW, BATCH, CHANNELS = 256, 224, 16, 3

#: Elements along T, Z, C, Y, X.
Shape = tuple[int, int, int, int, int]
#: z, y, x of a tile's or a window's first element, and z, c, y, x of a plane's.
Place = tuple[int, int, int]
Plane = tuple[int, int, int, int]

_STOP_SECONDS = 20.0

#: glibc keeps freed blocks of up to 32 MiB instead of returning their pages, which costs more than the copies do. Our server asks for the same by
#: itself (ome_tensor_proto.memory), so the other Python servers are given it too.
_KEEP_BLOCKS = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}


@dataclass(frozen=True)
class Data:
    """One image, stored once for each peer's liking.

    Attributes:
        folder: Where its files are.
        shape: Elements along T, Z, C, Y, X; T is 1.
    """

    folder: Path
    shape: Shape

    @property
    def npy(self) -> Path:
        """A plain array, for comparison and for the servers that hold one."""
        return self.folder / "image.npy"

    @property
    def parquet(self) -> Path:
        """OME-Arrow, in uncompressed byte chunks of 512²."""
        return self.folder / "image.ome.parquet"

    @property
    def zarr(self) -> Path:
        """Zarr v3 without codecs, a tile a chunk."""
        return self.folder / "image.zarr"

    @property
    def nbytes(self) -> int:
        """Bytes of pixels."""
        return 2 * int(np.prod(self.shape))


def tile_places(shape: Sequence[int]) -> Iterator[Place]:
    """All tiles, row-major."""
    yield from product(range(shape[1]), range(0, shape[3], TILE), range(0, shape[4], TILE))


@dataclass(frozen=True)
class Where:
    """Where servers run.

    Attributes:
        host: The address they bind.
        prefix: Command that runs another inside a network namespace; empty for this one.
    """

    host: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


HERE = Where()


class Reader(ABC):
    """A peer's client: made by the benchmark, pickled, and opened in the client's own process."""

    @abstractmethod
    def open(self) -> None:
        """Import what it needs and connect."""

    @abstractmethod
    def tiles(self) -> Iterator[np.ndarray]:
        """All (C, 256, 256) tiles, row-major. One is valid until the next is asked for."""

    @abstractmethod
    def plane(self, place: Plane) -> np.ndarray:
        """One (256, 256) window of one plane."""

    @abstractmethod
    def windows(self, origins: Sequence[Place]) -> Iterator[Sequence[np.ndarray] | np.ndarray]:
        """(C, 224, 224) windows in the listed order, in batches of 16."""

    def close(self) -> None:  # noqa: B027  most have nothing to close
        """Disconnect."""


@dataclass(frozen=True)
class Served:
    """A peer that runs.

    Attributes:
        reader: Its client.
        pids: Its server's processes (their children count too).
    """

    reader: Reader
    pids: tuple[int, ...] = ()


class Peer(ABC):
    """Something that serves images.

    Attributes:
        name: As in the table.
        share: Part of the requests that it is given: one that takes ten times as long need not hold up everybody.
        concurrent: Whether it takes part in the workload of four clients.
        only_concurrent: Whether it takes part in no other.
    """

    name: ClassVar[str]
    share: ClassVar[float] = 1.0
    concurrent: ClassVar[bool] = False
    only_concurrent: ClassVar[bool] = False

    @property
    def note(self) -> str:
        """What a reader of the table has to know; empty for nothing."""
        return ""

    @abstractmethod
    def missing(self) -> str:
        """Why it cannot run here, and what would help; empty where it can."""

    @abstractmethod
    def serve(self, data: Data, where: Where = HERE) -> AbstractContextManager[Served]:
        """Its server, until the block ends."""


def absent(*modules: str) -> str:
    """Which of some modules are not installed, as :meth:`Peer.missing` says it."""
    names = [name for name in modules if find_spec(name) is None]
    return f"{', '.join(names)} not installed: pip install -e '.[bench]'" if names else ""


def free_port(host: str) -> int:
    """A port that nobody listens on now, for servers that cannot say which one they took."""
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended, by its own id, with the block."""
    process = subprocess.Popen(command, text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def python_server(arguments: Sequence[str], where: Where) -> Iterator[tuple[str, int]]:
    """A Python server that prints ``listening on HOST:PORT``; gives that address and its process id."""
    command = [*where.prefix, sys.executable, *arguments]
    with running(command, stdout=subprocess.PIPE, env=os.environ | _KEEP_BLOCKS) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line.startswith("listening on "):
            raise RuntimeError(f"{' '.join(arguments)} did not start: {line!r}")
        yield line.removeprefix("listening on "), process.pid
