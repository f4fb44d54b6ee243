"""Messages with several columns of pixels: written, read, and read by Arrow alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ome_tensor.errors import BrokenStream
from ome_tensor.selection import Selection
from ome_tensor.tiling import Tile, TileSequence, Tiling
from ome_tensor_proto.batch_format import BatchFormat
from ome_tensor_proto.beside import BesideWriter
from ome_tensor_proto.reader import BatchReader
from ome_tensor_proto.v1 import tensor_service_pb2 as pb


def random_block(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    values = random.integers(0, 100, shape).astype(dtype)
    return values + values.dtype.type(1j) if dtype.startswith("complex") else values


DTYPES = st.sampled_from(["uint8", "int16", "float32", "bool", "complex64", "uint32"])


@settings(deadline=None, max_examples=60)
@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    edge=st.sampled_from(["clip", "pad"]),
    dtypes=st.lists(DTYPES, min_size=2, max_size=3),
    codec=st.sampled_from([None, "lz4", "zstd"]),
    size=st.integers(1, 4),
)
def test_a_stream(h: int, w: int, edge: str, dtypes: list[str], codec: str | None, size: int) -> None:
    tiles = TileSequence(Selection(range(1), range(2), range(2), 0, 0, w, h), Tiling.tiles((4, 3), edge))  # type: ignore[arg-type]
    largest = tiles.tile(0).shape
    shapes = [largest, *[(*largest[:2], 1, *largest[3:])] * (len(dtypes) - 1)]
    formats = [BatchFormat(shape, np.dtype(dtype), not tiles.uniform) for shape, dtype in zip(shapes, dtypes, strict=True)]
    writer = BesideWriter(formats[0], formats[1:])
    header: pb.ReadTilesHeader | None = pb.ReadTilesHeader(
        tile_count=len(tiles),
        total_tiles=tiles.total,
        tile_shape=largest,
        dtype=dtypes[0],
        beside=[
            pb.Beside(column=f"c{number}", dtype=dtype, tile_shape=shape)
            for number, (dtype, shape) in enumerate(zip(dtypes[1:], shapes[1:], strict=True))
        ],
    )
    every: list[Tile] = list(tiles)
    messages, wanted = [], []
    for first in range(0, len(every), size):
        batch = every[first : first + size]
        narrow = [replace(tile, shape=(*tile.shape[:2], 1, *tile.shape[3:])) for tile in batch]
        message = writer.batch(batch, [narrow] * (len(dtypes) - 1), header=header, last=first + size >= len(every))
        header = None
        for place, tile in enumerate(batch):
            blocks = []
            for number, dtype in enumerate(dtypes):
                shape = (tile if number == 0 else narrow[place]).shape
                blocks.append(random_block(shape, dtype, 10 * tile.number + number))
                message.blocks[number][place][...] = blocks[-1]
            wanted.append(blocks)
        if codec:
            message.compress(codec)
        messages.append(message.finish(queue_us=1, gather_us=2, encode_us=3))
    reader = BatchReader()
    found = []
    for message_bytes in messages:
        read = reader.feed(message_bytes)
        assert read is not None
        assert read.timings.gather_us == 2
        assert len(read.beside) == len(dtypes) - 1
        for row in range(len(read)):
            found.append([read.pixels[row], *(pixels[row] for pixels in read.beside)])
            assert read.columns["tile"][row] == len(found) - 1
    reader.finish()
    for blocks, due in zip(found, wanted, strict=True):
        for block, one in zip(blocks, due, strict=True):
            np.testing.assert_array_equal(block, one, strict=True)
    payloads = b"".join(pb.ReadTilesResponse.FromString(message).payload for message in messages)
    table = pa.ipc.open_stream(payloads).read_all()
    table.validate(full=True)
    assert table.column_names[-len(dtypes) :] == ["pixels", *(f"beside_{number}" for number in range(len(dtypes) - 1))]
    assert table.num_rows == len(every)


def test_a_header_that_promises_what_does_not_come() -> None:
    form = BatchFormat((1, 1, 1, 2, 2), np.dtype(np.uint8))
    (tile,) = TileSequence(Selection(range(1), range(1), range(1), 0, 0, 2, 2), Tiling())
    beside = [pb.Beside(column="mask", dtype="uint8", tile_shape=[1, 1, 1, 2, 2])]
    header = pb.ReadTilesHeader(tile_count=1, total_tiles=1, tile_shape=[1, 1, 1, 2, 2], dtype="uint8", beside=beside)
    message = BesideWriter(form, []).batch([tile], [], header=header, last=True).finish()
    with pytest.raises(BrokenStream, match="has no beside_0"):
        BatchReader().feed(message)
    header.beside[0].dtype = "uint16"
    message = BesideWriter(form, [form]).batch([tile], [[tile]], header=header, last=True).finish()
    with pytest.raises(BrokenStream, match="column beside_0 is of type"):
        BatchReader().feed(message)
