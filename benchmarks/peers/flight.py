"""Arrow Flight, C++ on both sides with the gather in Python: what one would build today.

A ticket names the request; the server slices NumPy into record batches of about 1 MiB (a row a tile, pixels a fixed-size list), so that one batch is
one array for the client, without a copy. Run as a program it is the server: ``python -m benchmarks.peers.flight IMAGE.npy HOST``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    Where,
    absent,
    python_server,
    tile_places,
)

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Flight", "FlightReader"]

#: Tiles in a record batch: 1.2 MB, measured best of 1 to 12.
_RUN = 3


class Flight(Peer):
    """See the module."""

    name = "Arrow Flight"
    concurrent = True

    def missing(self) -> str:
        return absent("pyarrow.flight")

    @contextmanager
    def serve(self, data: Data, where: Where = HERE) -> Iterator[Served]:
        with python_server(["-m", __name__, str(data.npy), where.host], where) as (target, pid):
            yield Served(FlightReader(target), (pid,))


@dataclass
class FlightReader(Reader):
    """Its client.

    Attributes:
        target: ``HOST:PORT``.
        codec: Compression to ask for: ``lz4``, ``zstd`` or empty.
    """

    target: str
    codec: str = ""

    def open(self) -> None:
        import pyarrow.flight as fl

        self._flight = fl
        self._client = fl.connect(f"grpc://{self.target}")

    def _batches(self, kind: str, shape: tuple[int, ...], places: Sequence[Sequence[int]] = ()) -> Iterator[np.ndarray]:
        ticket = json.dumps({"kind": kind, "places": places, "codec": self.codec}).encode()
        for chunk in self._client.do_get(self._flight.Ticket(ticket)):
            column = chunk.data.column(0)
            yield column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), *shape)

    def tiles(self) -> Iterator[np.ndarray]:
        for batch in self._batches("tiles", (CHANNELS, TILE, TILE)):
            yield from batch

    def plane(self, place: Plane) -> np.ndarray:
        (batch,) = self._batches("plane", (TILE, TILE), [place])
        return batch[0]

    def windows(self, origins: Sequence[Place]) -> Iterator[np.ndarray]:
        yield from self._batches("windows", (CHANNELS, WINDOW, WINDOW), origins)

    def close(self) -> None:
        self._client.close()


# -- the server --------------------------------------------------------------------------------------------------------------------


def _batch(pa: Any, schema: pa.Schema, pixels: np.ndarray) -> pa.RecordBatch:
    """Rows of pixels as a record batch on the same memory."""
    values = pa.array(pixels.reshape(-1))
    return pa.record_batch([pa.FixedSizeListArray.from_arrays(values, pixels[0].size)], schema=schema)


def _gather(image: np.ndarray, kind: str, places: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """The answer's batches, each in memory of its own: Flight sends it after the next has been asked for."""
    if kind == "plane":
        z, c, y, x = places[0]
        yield image[0, z, c, y : y + TILE, x : x + TILE].copy()[np.newaxis]
        return
    size, run = (TILE, _RUN) if kind == "tiles" else (WINDOW, BATCH)
    wished: Sequence[Sequence[int]] = list(tile_places(image.shape)) if kind == "tiles" else places
    for first in range(0, len(wished), run):
        part = wished[first : first + run]
        out = np.empty((len(part), CHANNELS, size, size), np.uint16)
        for block, (z, y, x) in zip(out, part, strict=True):
            block[...] = image[0, z, :, y : y + size, x : x + size]
        yield out


def _main() -> None:
    import pyarrow as pa
    import pyarrow.flight as fl

    image = np.load(sys.argv[1])
    schemas = {
        size: pa.schema([("pixels", pa.list_(pa.uint16(), size))])
        for size in (TILE * TILE, CHANNELS * TILE * TILE, CHANNELS * WINDOW * WINDOW)
    }
    elements = {"plane": TILE * TILE, "tiles": CHANNELS * TILE * TILE, "windows": CHANNELS * WINDOW * WINDOW}

    class Server(fl.FlightServerBase):  # type: ignore[misc]
        def do_get(self, context: Any, ticket: Any) -> Any:
            request = json.loads(ticket.ticket)
            schema = schemas[elements[request["kind"]]]
            batches = (_batch(pa, schema, part) for part in _gather(image, request["kind"], request["places"]))
            options = pa.ipc.IpcWriteOptions(compression=request["codec"] or None)
            return fl.GeneratorStream(schema, batches, options=options)

    server = Server(f"grpc://{sys.argv[2]}:0")
    print(f"listening on {sys.argv[2]}:{server.port}", flush=True)
    server.serve()


if __name__ == "__main__":
    _main()
