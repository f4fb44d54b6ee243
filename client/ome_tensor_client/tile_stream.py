"""A stream of tiles that owns its position: what is cut is resumed at the next tile (or slab), nothing twice, nothing skipped."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import grpc

from ome_tensor.errors import BrokenStream, Cancelled, DeadlineExceeded, OmeTensorError, Rebalance, ServerError, Unavailable
from ome_tensor.keys import parse_key
from ome_tensor_proto.codec import compression_to_proto
from ome_tensor_proto.methods import ONE_MESSAGE
from ome_tensor_proto.reader import BatchReader, TileBatch
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .answers import end_call
from .backoff import TRANSIENT, Backoff
from .channels import Moves
from .compression import Tuner
from .connection import Connection
from .identity import Outgoing
from .read_stats import ReadStats

__all__ = ["TileStream", "read_one"]

#: What must not differ between the calls of one read.
_SAME = ("dataset_version", "total_tiles", "tile_shape", "dtype", "slabs", "slab_bytes", "beside")


class _Read:
    """The state of one read over its calls. The generator that reads holds this, and not the stream, so that a dropped stream ends at once.

    Attributes:
        waiting_since: When the wait for the next message began; ``None`` while the caller is busy with the last one.
    """

    def __init__(
        self, connection: Connection, request: pb.ReadTilesRequest, expected: int, stats: ReadStats, server: int | None
    ) -> None:
        self.connection = connection
        self.stats = stats
        self.request = pb.ReadTilesRequest()
        self.request.CopyFrom(request)
        if connection.checks:
            self.request.checksum = pb.CHECKSUM_KIND_XXH3_64
        self.sent = b""
        self.outgoing: Outgoing | None = None
        self.remaining = expected
        self.header: pb.ReadTilesHeader | None = None
        self.retries = 0
        # A shard's reader knows its number: shards spread over several servers.
        order = request.order
        self.offset = order.shard_index if server is None and order.shard_count > 1 else server
        self.channels = connection.replicas.pick(self.offset)
        self.moves = Moves(self.channels)
        self.channel: grpc.Channel | None = None
        self.stop = threading.Event()
        self.call: Any = None
        self.timed_out = False
        self.began = 0.0
        self.waiting_since: float | None = None
        self.waited = 0.0
        self.tuner: Tuner | None = None
        if connection.options.compression == "auto":
            dataset = request.image_rows.dataset if request.HasField("image_rows") else parse_key(request.keys[0]).dataset
            self.tuner = Tuner(connection.advisor, dataset)
            self.request.compression = compression_to_proto(self.tuner.codec)

    def expire(self) -> None:
        """No message came in time."""
        self.timed_out = True
        self.cancel_call()

    def cancel_call(self) -> None:
        """End the call in progress, from any thread."""
        call = self.call
        if call is not None:
            call.cancel()

    def reader(self) -> BatchReader:
        """For the messages of the next call."""
        self.sent = self.request.SerializeToString()
        order = self.request.order
        checked = self.sent if self.request.checksum == pb.CHECKSUM_KIND_XXH3_64 else None
        return BatchReader(start=order.start, start_slab=order.start_slab, request=checked)

    def begin(self) -> Iterator[bytes]:
        """The messages of a call for what has not arrived yet."""
        self.timed_out, self.began = False, time.monotonic()
        channels = self.connection.replicas.pick(self.offset)
        if channels is not self.channels:
            self.channels, self.moves = channels, Moves(channels)
        outgoing = self.outgoing = self.connection.outgoing("ReadTiles", may_move=self.moves.offer())
        with outgoing, channels.use(self) as self.channel:
            self.call = self.connection.stream("ReadTiles", self.sent, self.channel, outgoing)
            if self.stop.is_set():
                self.call.cancel()
            has_answered = False
            while True:
                self.waiting_since = time.monotonic()
                try:
                    message = next(self.call)
                except StopIteration:
                    return
                finally:
                    self.waited = time.monotonic() - self.waiting_since
                    self.waiting_since = None
                    self.stats.network += self.waited
                if not has_answered:
                    channels.answered(self.channel)
                    has_answered = True
                yield message

    def move(self) -> bool:
        """Whether to call again at once, where the server has answered Rebalance."""
        assert self.channel is not None
        return self.moves.make(self.channel, self.stop)

    def decode(self, reader: BatchReader, message: bytes) -> TileBatch | None:
        """The batch in a message, accounted for."""
        began = time.perf_counter()
        batch = reader.feed(message)
        stats = self.stats
        stats.decode += time.perf_counter() - began
        stats.messages += 1
        stats.nbytes += len(message)
        if batch is not None:
            stats.tiles += batch.tile_count
            timings = batch.timings
            stats.queue += timings.queue_us * 1e-6
            stats.gather += timings.gather_us * 1e-6
            stats.encode += timings.encode_us * 1e-6
        return batch

    @property
    def may_go_home(self) -> bool:
        """Whether the server that this read prefers serves again, and another one is being read from."""
        replicas = self.connection.replicas
        if not replicas.are_several:
            return False
        home = replicas.home(self.offset)
        return home is not self.channels and not replicas.is_aside(home)

    def tune(self, batch: TileBatch) -> bool:
        """Whether what comes after this batch should be asked for anew, with another compression."""
        # Near the end there is nothing to win.
        if self.tuner is None or self.remaining == 0 or not self.tuner.saw(batch, self.waited):
            return False
        self.request.compression = compression_to_proto(self.tuner.codec)
        self.cancel_call()
        return True

    def check(self, header: pb.ReadTilesHeader) -> None:
        """A read must be the one that was asked for, and a resumed one the one that was begun."""
        wanted = self.request.if_version or header.dataset_version
        if header.dataset_version != wanted:
            raise BrokenStream(f"the stream is of version {header.dataset_version!r} of the dataset, not of {wanted!r}")
        self.request.if_version = wanted
        if header.tile_count != self.remaining:
            raise BrokenStream(f"the server announces {header.tile_count} tiles where {self.remaining} were asked for")
        beside = [one.column for one in header.beside]
        if beside != list(self.request.beside):
            raise BrokenStream(
                f"the server sends {beside or 'nothing'} beside the tiles where {list(self.request.beside)} was asked for"
            )
        first = self.header
        if first is None:
            self.header = header
            return
        for name in _SAME:
            if getattr(first, name) != getattr(header, name):
                raise BrokenStream(f"the resumed stream's {name} is {getattr(header, name)}, not {getattr(first, name)}")

    def advance(self, batch: TileBatch) -> None:
        """Ask for what comes after this batch, should there be another call."""
        order = self.request.order
        order.start = batch.first_position + batch.tile_count
        order.start_slab = 0
        self.remaining -= batch.tile_count
        if self.header is not None and self.header.slabs:
            # Slabs are cut by this size; another server's choice would be another cut.
            self.request.max_message_bytes = self.header.slab_bytes
            if batch.tile_count == 0:
                order.start_slab = batch.slab + 1

    def error_of(self, rpc_error: grpc.RpcError) -> OmeTensorError:
        """Why a call ended."""
        connection = self.connection
        if self.timed_out:
            return connection.no_message(self.channels)
        error = connection.error_of(rpc_error, self.channels, self.outgoing)
        # Not cancelled by us: a server that is stopped hard cancels what runs, and one whose reader stalled frees its place.
        if not isinstance(error, Cancelled):
            return error
        found = Unavailable(error.message, field=error.field, value=error.value)
        found.request_id = error.request_id
        return found


def read_one(connection: Connection, request: pb.ReadTilesRequest) -> TileBatch | None:
    """The only batch of a read of one tile that fits in a message, sooner than a stream would bring it; ``None`` where it has to be streamed after
    all: the server makes more messages of it, or something went wrong that a stream would get over.

    Raises:
        OmeTensorError: what the server refuses, and DeadlineExceeded.
    """
    checked = connection.checks
    request.checksum = pb.CHECKSUM_KIND_XXH3_64 if checked else pb.CHECKSUM_KIND_NONE
    data = request.SerializeToString()
    reader = BatchReader(pixels_only=True, request=data if checked else None)
    try:
        batch = reader.feed(connection.read_one(data))
        reader.finish()
    except DeadlineExceeded:
        raise
    except (*TRANSIENT, Cancelled, ServerError):
        return None
    except OmeTensorError as error:
        if error.field != ONE_MESSAGE:
            raise
        return None
    header = reader.header
    if header is None or header.tile_count != 1 or header.dataset_version != request.if_version:
        return None
    return batch


class TileStream(Iterator[TileBatch]):
    """The batches of one ReadTiles request, over as many calls as it takes.

    A call may end early: the connection is lost, the server drains or is killed, no message comes in time. The next call then asks for what comes
    after the last batch that arrived whole, of the same dataset version.

    Args:
        connection: The server.
        request: What to read; its ``order.start`` is where to begin.
        expected: Number of tiles that must come.
        stats: Where to add what the read costs.
        server: Number of the server to prefer, counted round, where there are several: by default the shard's, or else the connection's choice.
    """

    def __init__(
        self,
        connection: Connection,
        request: pb.ReadTilesRequest,
        expected: int,
        stats: ReadStats | None = None,
        server: int | None = None,
    ) -> None:
        self._read = _Read(connection, request, expected, ReadStats() if stats is None else stats, server)
        self._batches = _batches(self._read)

    @property
    def header(self) -> pb.ReadTilesHeader:
        """What the stream is; known once a batch has arrived."""
        header = self._read.header
        assert header is not None
        return header

    @property
    def retries(self) -> int:
        """Calls beyond the first."""
        return self._read.retries

    def __iter__(self) -> TileStream:
        return self

    def __next__(self) -> TileBatch:
        return next(self._batches)

    def cancel(self) -> None:
        """End the read from any thread: a ``next()`` that is waiting stops."""
        self._read.stop.set()
        self._read.cancel_call()

    def close(self) -> None:
        """End the read, on the thread that iterates."""
        self.cancel()
        self._batches.close()

    def __del__(self) -> None:
        self.cancel()


def _batches(read: _Read) -> Generator[TileBatch, None, None]:
    backoff = Backoff(read.connection.options.retry_for)
    watchdog = read.connection.watchdog
    watchdog.watch(read)
    try:
        while True:
            arrived = False
            error: OmeTensorError | None = None
            reader = read.reader()
            try:
                for message in read.begin():
                    fresh = reader.header is None
                    batch = read.decode(reader, message)
                    if fresh and reader.header is not None:
                        read.check(reader.header)
                    if batch is not None:
                        arrived = True
                        read.advance(batch)
                        anew = read.tune(batch) or (read.remaining > 0 and read.may_go_home)
                        yield batch
                        if anew:
                            break
                else:
                    reader.finish()
                    return
            except grpc.RpcError as rpc_error:
                error = read.error_of(rpc_error)
            except BrokenStream as broken:
                error = broken
            finally:
                call, read.call = read.call, None
                if call is not None:
                    end_call(call)
            if read.stop.is_set():
                return
            if arrived:
                # Also where the call was ended on purpose: the next one may fail long after the last failure.
                backoff.progress()
            if error is None:
                continue
            if isinstance(error, Rebalance):
                if read.move():
                    continue
                target = read.channels.target
                error = Unavailable(f"{target}: the server sends this read away again and again", field="target", value=target)
            if read.connection.fails_over(read.channels, error, backoff, None if arrived else read.began):
                read.retries += 1
                read.stats.retries += 1
                continue
            if isinstance(error, DeadlineExceeded) and not arrived:
                raise error
            backoff.pause(error, read.stop)
            read.retries += 1
            read.stats.retries += 1
    finally:
        watchdog.forget(read)
