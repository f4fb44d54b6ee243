"""The server that is fuzzed: a real one, with a little of everything to read and to change."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from tests.fuzz.valid import Names
from tests.integration.images import random_pixels, write_image
from tests.integration.processes import ServerProcess
from tests.unit.tabular import column, write

from ome_tensor import OmeTensorError
from ome_tensor_client import connect

__all__ = ["Served", "known_server", "own_server"]

GOOD = "good"

#: Largest image of somebody else's server that is read again and again, in bytes.
_MOST_BYTES = 16 << 20

_EXAMPLE = Path(__file__).parents[2] / "examples" / "data" / "idr0062a-6001240.chunks.ome.parquet"

#: Narrow limits, so that what is over one costs little; and small caches, which are full soon.
_FLAGS = {
    "workers": 1,
    "admin": "on",
    "log-level": "error",
    "memory-limit": "256M",
    "decode-cache-bytes": 16 << 20,
    "max-concurrent-reads": 32,
    "max-tiles": 100_000,
    "max-tile-bytes": 64 << 20,
    "max-upload-bytes": 8 << 20,
    "load-seconds": 2,
    "stall-seconds": 10,
}


@dataclass(frozen=True, slots=True)
class Served:
    """A server to fuzz.

    Attributes:
        target: ``HOST:PORT``.
        names: What requests can be about.
        key: An image that is read again and again, and never changed.
        pixels: Its pixels, TZCYX; ``None`` where there is none.
        process: Its process; ``None`` of one that somebody else has started.
    """

    target: str
    names: Names
    key: str = ""
    pixels: np.ndarray | None = None
    process: ServerProcess | None = None

    @property
    def is_own(self) -> bool:
        """Whether it was started for the fuzz alone."""
        return self.process is not None

    @property
    def pid(self) -> int:
        """Its process; 0 of somebody else's."""
        return self.process.process.pid if self.process else 0


@contextmanager
def own_server(folder: Path) -> Iterator[Served]:
    """Serve what is written into a folder, until the end of the block."""
    data = folder / "data"
    data.mkdir()
    pixels = random_pixels((2, 3, 2, 60, 70))
    write_image(data / f"{GOOD}.ome.parquet", pixels)
    table = _table()
    write(data / "table.ome.parquet", table, rows=5)
    write(data / "spare.arrow", table, "arrow")
    np.save(data / "array.npy", random_pixels((1, 3, 1, 300, 500), np.uint8))
    shutil.copy(_EXAMPLE, data / "example.ome.parquet")
    names = Names(
        read=(GOOD, "array", "example", "table"),
        changed=("spare", "fuzz-1", "fuzz-2", "fuzz é"),
        columns=("DNA", "DNA_labels", "word", "taken", "number"),
        paths=(str(data / "spare.arrow"), str(data), str(folder), str(data / "nothing.npy"), "spare.arrow"),
        upload=write(folder / "upload.arrows", table.slice(0, 4), "stream").read_bytes(),
    )
    flags = [text for name, value in _FLAGS.items() for text in (f"--{name}", str(value))]
    flags += ["--store", str(folder / "store"), "--uploads", str(folder / "uploads")]
    with ServerProcess(data, folder / "server.log", *flags) as process:
        process.wait_serving()
        yield Served(process.target, names, GOOD, pixels, process)


def _table() -> pa.Table:
    """Images of two columns, rows without one, and columns of what tables have beside them."""
    images = [None if row % 7 == 3 else random_pixels((1, 2, 1, 20 + row % 3, 25), seed=row) for row in range(20)]
    masks = [None if image is None else image.astype(np.uint8) for image in images]
    return pa.table(
        {
            "DNA": column(images, "zstd", (1, 16, 16)),
            "DNA_labels": column(masks),
            "word": pa.array(["A1", None, "B", "A2"] * 5).dictionary_encode(),
            "taken": pa.array([datetime(2020, 1, 1 + row) for row in range(20)]),
            "number": pa.array([None, *range(19)], pa.int64()),
        }
    )


def known_server(target: str) -> Served:
    """A server that runs already: what requests can be about, and the pixels of an image as it gives them now."""
    names = Names()
    try:
        with connect(target, transport="tcp", retry_for=1, timeout=20) as client:
            infos = client.datasets()
            names = Names(read=tuple(info.name for info in infos))
            for info in infos:
                for image in client.images(info.name):
                    if not image.problem and image.nbytes <= _MOST_BYTES:
                        return Served(target, names, image.key, client.tensor_view(image.key, layout="TZCHW").to_numpy())
    except OmeTensorError as error:
        print(f"{target}: no image is read again and again: {error}", file=sys.stderr)
    return Served(target, names)
