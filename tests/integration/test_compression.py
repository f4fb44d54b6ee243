"""Compressed streams: smaller, the same pixels, plain Arrow; and what does not shrink is sent as it is."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.integration.images import expected_tile, random_pixels, write_image
from tests.integration.proxy import Proxy
from tests.integration.raw import RawClient, raw_client, read_arrow, request, rows_of

import ome_tensor_client.tile_stream
from ome_tensor import BrokenStream
from ome_tensor_client import connect
from ome_tensor_proto.envelope import parse_envelope
from ome_tensor_proto.ipc import RECORD_BATCH, SCHEMA, Located, locate
from ome_tensor_proto.reader import BatchReader
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_proto.v1 import view_pb2
from ome_tensor_server.testing import RunningServer, running_server

SHAPE = (1, 4, 2, 300, 320)
CODECS = {"lz4": pb.COMPRESSION_LZ4, "zstd": pb.COMPRESSION_ZSTD}


def smooth(dtype: str) -> np.ndarray:
    """Pixels that shrink: a few values."""
    return (np.add.outer(np.arange(300) // 40, np.arange(320) // 50) + np.arange(8).reshape(1, 4, 2, 1, 1)).astype(dtype)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, dict[str, np.ndarray]]]:
    """A server of smooth and of noisy images."""
    folder = tmp_path_factory.mktemp("compressible")
    found = {
        "smooth": smooth("uint16"),
        "floats": smooth("float32"),
        "complexes": smooth("complex64"),
        "noise": random_pixels(SHAPE),
    }
    for name, pixels in found.items():
        write_image(folder / f"{name}.ome.parquet", pixels)
    with running_server([folder]) as server:
        yield server, found


@pytest.fixture
def raw(images: tuple[RunningServer, Any]) -> Iterator[RawClient]:
    """Calls by hand."""
    with raw_client(images[0].target) as client:
        yield client


def batch_of(message: bytes) -> Located:
    """The record batch's metadata."""
    envelope = parse_envelope(message)
    at = envelope.payload_at
    found = locate(message, at, len(message))
    assert found is not None
    if found.kind == SCHEMA:
        found = locate(message, found.end, len(message))
        assert found is not None
    assert found.kind == RECORD_BATCH
    return found


CUTS = {
    "uniform": view_pb2.Tiling(tiles=view_pb2.TilesCut(h=100, w=80)),
    "clipped": view_pb2.Tiling(tiles=view_pb2.TilesCut(h=90, w=90)),
    "slabs": view_pb2.Tiling(whole={}),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["smooth", "floats", "complexes", "noise"])
def test_plain_arrow_reads_compressed_streams(
    images: tuple[RunningServer, dict[str, np.ndarray]], raw: RawClient, name: str, cut: str, codec: str
) -> None:
    """By pyarrow alone; noise comes uncompressed, which Arrow allows batch by batch."""
    pixels = images[1][name]
    messages = raw.read(request(name, tiling=CUTS[cut], compression=CODECS[codec], max_message_bytes=600 << 10))
    seen = np.zeros_like(pixels)
    for at, block in rows_of(read_arrow(messages)):
        if cut == "slabs":
            seen.reshape(-1)[at["offset"] : at["offset"] + block.size] = block.reshape(-1)
        else:
            seen[..., at["y"] : at["y"] + at["valid_h"], at["x"] : at["x"] + at["valid_w"]] = block
    np.testing.assert_array_equal(seen, pixels)
    assert {batch_of(message).compressed for message in messages} == {name != "noise"}
    if name != "noise":
        assert sum(map(len, messages)) < pixels.nbytes / 5


@pytest.mark.parametrize("codec", CODECS)
def test_compressed_views(images: tuple[RunningServer, dict[str, np.ndarray]], codec: str) -> None:
    """Whole reads, tiles and batches; in memory that is the reader's own; cuts are survived."""
    server, found = images
    for name in ("smooth", "noise"):
        with (
            Proxy(server.target, [10_000, 9_000]) as proxy,
            connect(proxy.target, compression=codec, message_bytes=65536, retry_for=20) as client,
        ):
            view = client.tensor_view(name)
            np.testing.assert_array_equal(view.to_numpy(), found[name][0:1])
            for tile in view.iter_tiles(tile_size=(2, 90, 90), prefetch=2):
                np.testing.assert_array_equal(tile.array, expected_tile(found[name], tile))
                tile.array[:] = 0
            for batch in view.iter_batches(tile_size=(1, 100, 80), batch_size=4):
                assert batch.array.flags.writeable
                batch.array[:] = 0
            np.testing.assert_array_equal(client.tensor_view(name).to_numpy(), found[name])
            assert proxy.done == 2


def test_auto_stays_off_on_this_host(images: tuple[RunningServer, dict[str, np.ndarray]]) -> None:
    """Too little is read here for a decision, and uncompressed is what it begins with."""
    with connect(images[0].target, compression="auto") as client:
        view = client.tensor_view("smooth")
        np.testing.assert_array_equal(view.to_numpy(), images[1]["smooth"])
        assert len(list(view.iter_batches(tile_size=(1, 100, 80), batch_size=4))) == 12


@pytest.mark.parametrize("read", ["batches", "tiles", "slabs"])
def test_a_read_goes_on_with_another_codec(
    images: tuple[RunningServer, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    """In the middle of a read, again and again: nothing twice, nothing skipped."""
    calls = []

    class Restless:
        """Changes its mind at every third message."""

        def __init__(self, *_: Any) -> None:
            self.codec, self.seen = "none", 0

        def saw(self, batch: Any, waited: float) -> bool:
            assert waited >= 0
            self.seen += 1
            if self.seen % 3:
                return False
            self.codec = {"none": "lz4", "lz4": "zstd", "zstd": "none"}[self.codec]
            calls.append(self.codec)
            return True

    monkeypatch.setattr(ome_tensor_client.tile_stream, "Tuner", Restless)
    server, found = images
    pixels = found["smooth"]
    with connect(server.target, compression="auto", message_bytes=65536, retry_for=0) as client:
        view = client.tensor_view("smooth")
        if read == "slabs":
            np.testing.assert_array_equal(view.to_numpy(), pixels)
        elif read == "tiles":
            tiles = list(view.iter_tiles(tile_size=(60, 64)))
            assert [tile.number for tile in tiles] == list(range(25))
            for tile in tiles:
                np.testing.assert_array_equal(tile.array, expected_tile(pixels, tile))
        else:
            batches = list(view.iter_batches(tile_size=(1, 60, 64), batch_size=8))
            assert [number for batch in batches for number in batch.numbers.tolist()] == list(range(100))
            assert [len(batch) for batch in batches] == [8] * 12 + [4]
            wanted = pixels.reshape(4, 2, 5, 60, 5, 64).transpose(0, 2, 4, 1, 3, 5).reshape(100, 1, 1, 2, 60, 64)
            np.testing.assert_array_equal(np.concatenate([batch.array for batch in batches]), wanted)
    assert len(calls) >= 3


def test_a_batch_that_claims_too_much(raw: RawClient) -> None:
    """Its receiver allocates nothing on a few bytes' say-so."""
    message, *_ = raw.read(request("smooth", view=view_pb2.View(t=view_pb2.AxisIndex(index=0)), compression=pb.COMPRESSION_ZSTD))
    found = batch_of(message)
    places = struct.unpack_from(f"<{2 * found.buffer_count}q", message, found.buffers_at)
    largest = max(range(found.buffer_count), key=lambda index: places[2 * index + 1])
    damaged = bytearray(message)
    struct.pack_into("<q", damaged, found.end + places[2 * largest], 2**45)
    with pytest.raises(BrokenStream, match="unpack"):
        BatchReader().feed(bytes(damaged))
    assert pa.total_allocated_bytes() < 1 << 30
