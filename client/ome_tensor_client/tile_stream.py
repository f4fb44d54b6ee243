"""A stream of tiles that owns its position: what is cut is resumed at the next tile (or slab), nothing twice, nothing skipped."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Any

import grpc

from ome_tensor.errors import BrokenStream, Cancelled, DeadlineExceeded, OmeTensorError, Unavailable
from ome_tensor_proto.reader import BatchReader, TileBatch
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .connection import Backoff, Connection

__all__ = ["TileStream"]


class TileStream(Iterator[TileBatch]):
    """The batches of one ReadTiles request, over as many calls as it takes.

    A call may end early: the connection is lost, the server drains or is killed, the deadline of one call passes. The next call then asks for what
    comes after the last batch that arrived whole, of the same dataset version.

    Args:
        connection: The server.
        request: What to read; its ``order.start`` is where to begin.

    Attributes:
        retries: Calls beyond the first.
    """

    def __init__(self, connection: Connection, request: pb.ReadTilesRequest) -> None:
        self._connection = connection
        self._request = pb.ReadTilesRequest()
        self._request.CopyFrom(request)
        self._stop = threading.Event()
        self._call: Any = None
        self.retries = 0
        self.header: pb.ReadTilesHeader | None = None
        self._batches = self._read()

    def __iter__(self) -> TileStream:
        return self

    def __next__(self) -> TileBatch:
        return next(self._batches)

    def cancel(self) -> None:
        """End the read from any thread: a ``next()`` that is waiting stops."""
        self._stop.set()
        call = self._call
        if call is not None:
            call.cancel()

    def close(self) -> None:
        """End the read."""
        self.cancel()
        self._batches.close()

    def __del__(self) -> None:
        self.cancel()

    def _read(self) -> Generator[TileBatch, None, None]:
        backoff = Backoff(self._connection.options.retry_for)
        while True:
            arrived = False
            reader = BatchReader(start=self._request.order.start, start_slab=self._request.order.start_slab)
            try:
                self._call = self._connection.stream("ReadTiles", self._request)
                for message in self._call:
                    fresh = reader.header is None
                    batch = reader.feed(message)
                    if fresh and reader.header is not None:
                        self._check(reader.header)
                    if batch is not None:
                        arrived = True
                        self._advance(batch, reader.header)
                        yield batch
                reader.finish()
                return
            except grpc.RpcError as rpc_error:
                error: OmeTensorError = self._connection.error_of(rpc_error)
            except BrokenStream as broken:
                error = broken
            finally:
                if self._call is not None:
                    self._call.cancel()
                    self._call = None
            if self._stop.is_set():
                return
            if isinstance(error, Cancelled):
                # Not by us: a server that is stopped hard cancels what runs.
                error = Unavailable(error.message, field=error.field, value=error.value)
            if isinstance(error, DeadlineExceeded) and not arrived:
                raise error
            if arrived:
                backoff.progress()
            backoff.pause(error, self._stop)
            self.retries += 1

    def _check(self, header: pb.ReadTilesHeader) -> None:
        """A resumed read must be the read that was begun."""
        first = self.header
        self._request.if_version = header.dataset_version
        if first is None:
            self.header = header
            return
        same = ("dataset_version", "total_tiles", "tile_shape", "dtype", "slabs", "slab_bytes")
        for name in same:
            if getattr(first, name) != getattr(header, name):
                raise BrokenStream(f"the resumed stream's {name} is {getattr(header, name)}, not {getattr(first, name)}")

    def _advance(self, batch: TileBatch, header: pb.ReadTilesHeader | None) -> None:
        """Ask for what comes after this batch, should there be another call."""
        order = self._request.order
        order.start = batch.first_position + batch.tile_count
        order.start_slab = 0
        if header is not None and header.slabs:
            # Slabs are cut by this size; another server's choice would be another cut.
            self._request.max_message_bytes = header.slab_bytes
            if batch.tile_count == 0:
                order.start_slab = batch.slab + 1
