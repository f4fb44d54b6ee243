"""Framing: what is written is what is read, by plain Arrow and by the project's reader; nothing is copied; nothing damaged becomes an array."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ome_tensor.errors import BrokenStream, InvalidArgument, LimitExceeded
from ome_tensor.selection import Selection
from ome_tensor.slabs import split_into_slabs
from ome_tensor.tiling import Tile
from ome_tensor_proto.batch_format import COLUMNS, BatchFormat, physical_dtype
from ome_tensor_proto.batches import TileWriter
from ome_tensor_proto.reader import BatchReader
from ome_tensor_proto.v1.tensor_service_pb2 import ReadTilesHeader, ReadTilesResponse

DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()


def address(message):
    """Where the bytes of a message lie in memory."""
    return pa.py_buffer(message).address


def at(array):
    """Where an array's first element lies in memory."""
    return array.__array_interface__["data"][0]


def make_tile(position, shape, x=0):
    t, z, c, h, w = shape
    return Tile(position, 100 - position, Selection(range(3, 3 + t), (9, 7, 8, 5)[:z], range(c), x, 2, w, h), shape)


def make_block(shape, dtype, seed):
    """Random bits: every value of a dtype, NaNs too."""
    random = np.random.default_rng(seed)
    if dtype == np.bool_:
        return random.integers(0, 2, shape).astype(bool)
    return np.frombuffer(random.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


@dataclass(repr=False)
class Stream:
    """One written stream.

    Attributes:
        format: Its format.
        messages: Its messages.
        rows: (tile, offset, block) of every row.
        batches: Number of rows of each message that has some.
        tiles: Number of whole tiles.
    """

    format: BatchFormat
    messages: list
    rows: list
    batches: list
    tiles: int


def write(kind, dtype, shapes, batch_sizes, *, opening=True, closing=True, slab_bytes=64, first=0):
    """Write a stream of ``kind`` uniform, variable or slabs; ``opening``/``closing``: in messages of their own."""
    largest = tuple(map(max, zip(*shapes, strict=True)))
    format = BatchFormat.of(
        largest, dtype, variable=kind != "uniform", layout="TZCHW", shape=(1, 2), key="d/c/0", dataset_version="v"
    )
    header = ReadTilesHeader(
        dataset_version="v", tile_count=len(shapes), total_tiles=101, tile_shape=largest, dtype=dtype.name, slabs=kind == "slabs"
    )
    writer, messages, rows, batches = TileWriter(format), [], [], []
    tiles = [make_tile(first + i, shape) for i, shape in enumerate(shapes)]
    pending = []
    if kind == "slabs":
        for i, tile in enumerate(tiles):
            block = make_block(tile.shape, dtype, i)
            slabs = split_into_slabs(tile.shape, dtype.itemsize, slab_bytes)
            for number, slab in enumerate(slabs):
                part = block.reshape(-1)[slab.offset :][: math.prod(slab.shape)].reshape(slab.shape)
                pending.append(
                    ("slab", (tile, slab, number), {"ends_tile": number + 1 == len(slabs)}, [(tile, slab.offset, part)])
                )
    else:
        while tiles:
            count = batch_sizes[len(pending) % len(batch_sizes)]
            batch, tiles = tiles[:count], tiles[count:]
            blocks = [(tile, 0, make_block(tile.shape, dtype, tile.position)) for tile in batch]
            pending.append(("batch", (batch,), {}, blocks))
    if opening:
        messages.append(writer.opening(header))
    for i, (method, arguments, options, blocks) in enumerate(pending):
        message = getattr(writer, method)(
            *arguments,
            **options,
            header=header if i == 0 and not opening else None,
            last=i == len(pending) - 1 and not closing,
        )
        assert len(message.pixels) == len(blocks)
        for out, (_, _, block) in zip(message.pixels, blocks, strict=True):
            assert out.shape == block.shape
            out[...] = block
        messages.append(message.finish(queue_us=1, gather_us=2, encode_us=2**40))
        rows += blocks
        batches.append(len(blocks))
    if closing:
        messages.append(writer.closing())
    return Stream(format, messages, rows, batches, len(shapes))


@st.composite
def streams(draw):
    kind = draw(st.sampled_from(["uniform", "variable", "slabs"]))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = st.tuples(*[st.integers(0, 4)] * 4, st.integers(0, 9))
    shapes = draw(st.lists(shape, min_size=1, max_size=6))
    if kind == "uniform":
        shapes = shapes[:1] * len(shapes)
    batch_sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return write(
        kind,
        dtype,
        shapes,
        batch_sizes,
        opening=draw(st.booleans()),
        closing=draw(st.booleans()),
        slab_bytes=draw(st.integers(1, 99)),
    )


def expected_columns(tile, offset):
    s = tile.selection
    t, z = (s.t[0] if s.t else -1), (s.z[0] if s.z else -1)
    return (tile.number, 0, t, z, s.y, s.x, len(s.z), s.h, s.w, offset)


def plain_rows(stream):
    """What Arrow alone reads from the concatenated payloads: (columns, values, shape) of every row."""
    payloads = b"".join(ReadTilesResponse.FromString(message).payload for message in stream.messages)
    source = pa.BufferReader(payloads)
    rows = []
    with pa.ipc.open_stream(source) as reader:
        for batch in reader:
            batch.validate(full=True)
            columns = [batch.column(name).to_pylist() for name in COLUMNS]
            pixels = batch.column("pixels")
            pixels = getattr(pixels, "storage", pixels)
            for i in range(batch.num_rows):
                if stream.format.variable:
                    values, shape = pixels.field("data")[i].values, pixels.field("shape")[i].as_py()
                else:
                    values, shape = pixels[i].values, list(reader.schema.field("pixels").type.shape)
                rows.append((tuple(column[i] for column in columns), values.to_numpy(zero_copy_only=False), shape))
        schema = reader.schema
    assert source.tell() == len(payloads), "the end-of-stream marker is the end"
    return rows, schema


@settings(max_examples=200, deadline=None)
@given(streams())
def test_plain_arrow_reads_the_payloads(stream):
    rows, schema = plain_rows(stream)
    assert schema.metadata[b"ome_tensor.version"] == b"1"
    assert schema.metadata[b"ome_tensor.dtype"].decode() == stream.format.dtype.name
    assert schema.metadata[b"ome_tensor.key"] == b"d/c/0"
    assert json.loads(schema.metadata[b"ome_tensor.shape"]) == [1, 2]
    assert len(rows) == len(stream.rows)
    trailing = list(physical_dtype(stream.format.dtype)[1])
    for (columns, values, shape), (tile, offset, block) in zip(rows, stream.rows, strict=True):
        assert columns == expected_columns(tile, offset)
        assert values.tobytes() == block.tobytes()
        assert shape == [*block.shape, *trailing]


@settings(max_examples=200, deadline=None)
@given(streams())
def test_the_reader_reads_it_without_a_copy(stream):
    reader = BatchReader()
    found, sizes = [], []
    for message in stream.messages:
        batch = reader.feed(message)
        if batch is None:
            continue
        sizes.append(len(batch))
        assert (batch.timings.queue_us, batch.timings.gather_us, batch.timings.encode_us) == (1, 2, 2**32 - 1)
        first, end = address(message), address(message) + len(message)
        pixels = list(batch.pixels)
        if pixels[0].size:
            assert (at(pixels[0]) - first) % 64 == 0
            assert at(pixels[0]) % 16 == 0
        for i, block in enumerate(pixels):
            assert block.dtype == stream.format.dtype
            assert block.flags.writeable
            assert block.flags.c_contiguous
            assert not block.size or first <= at(block) <= at(block) + block.nbytes <= end
            found.append((tuple(int(batch.columns[name][i]) for name in COLUMNS), block))
    reader.finish()
    assert reader.tiles == stream.tiles
    assert reader.format == stream.format
    assert sizes == stream.batches
    for (columns, block), (tile, offset, sent) in zip(found, stream.rows, strict=True):
        assert columns == expected_columns(tile, offset)
        assert block.shape == sent.shape
        assert block.tobytes() == sent.tobytes()


def test_a_uniform_batch_is_one_array():
    stream = write("uniform", np.dtype("u2"), [(1, 2, 3, 4, 5)] * 3, [3])
    reader = BatchReader()
    reader.feed(stream.messages[0])
    pixels = reader.feed(stream.messages[1]).pixels
    assert pixels.shape == (3, 1, 2, 3, 4, 5)
    assert np.array_equal(pixels, np.stack([block for _, _, block in stream.rows]))


@pytest.mark.parametrize("kind", ["batch", "slab"])
def test_a_message_is_the_memory_the_pixels_were_gathered_into(kind):
    """The writer's whole point: no copy between the gather and gRPC. Pins CPython's BytesIO on every version the tests run on."""
    shape = (1, 1, 3, 256, 256)
    writer = TileWriter(BatchFormat(shape, np.dtype("u2"), kind == "slab"))
    tile = make_tile(0, shape)
    if kind == "slab":
        message = writer.slab(tile, split_into_slabs(shape, 2, 2**20)[0], 0, ends_tile=True)
    else:
        message = writer.batch([tile, tile])
    size, block = message.size, message.pixels[0]
    place = at(block)
    # Written before the end and, through an array that the caller still holds, after it.
    block[...] = 258
    done = message.finish()
    assert type(done) is bytes
    assert len(done) == size
    assert address(done) < place < address(done) + size
    assert np.shares_memory(np.frombuffer(done, np.uint8), block)
    assert done[place - address(done) :][: block.nbytes] == b"\x02\x01" * block.size


@pytest.mark.parametrize("kind", ["uniform", "variable", "slab"])
@pytest.mark.parametrize("dtype", [np.dtype("u1"), np.dtype("f8")], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_a_message_holds_nothing_of_old_memory(kind, dtype, last):
    """Its bytes begin uninitialised: whatever was in that memory before, the same rows make the same message."""
    shape = (1, 1, 1, 3, 5)
    writer = TileWriter(BatchFormat(shape, dtype, kind != "uniform"))
    found = set()
    for poison in range(0, 250, 50):
        # What is freed last is given out first: fill blocks of every size that the message may have.
        junk = [bytes([poison]) * size for size in range(400, 2400, 8)]
        del junk
        tile = make_tile(3, shape)
        if kind == "slab":
            message = writer.slab(tile, split_into_slabs(shape, dtype.itemsize, 2**20)[0], 0, ends_tile=True, last=last)
        else:
            message = writer.batch([tile], last=last)
        for block in message.pixels:
            block[...] = 7
        found.add(message.finish())
    assert len(found) == 1


def test_arrays_outlive_the_message_and_are_private():
    stream = write("uniform", np.dtype("u1"), [(1, 1, 1, 64, 64)], [1])
    reader = BatchReader()
    reader.feed(stream.messages[0])
    message = stream.messages.pop(1)
    pixels = reader.feed(message).pixels
    del message
    pixels[...] = 7
    assert (pixels == 7).all()
    # NumPy exports no read-only array.
    assert np.shares_memory(np.from_dlpack(pixels), pixels)


def test_a_read_without_tiles_is_one_message():
    format = BatchFormat((1, 1, 1, 2, 2), np.dtype("u2"))
    message = TileWriter(format).opening(ReadTilesHeader(tile_shape=format.tile_shape, dtype="uint16"), last=True)
    reader = BatchReader()
    assert reader.feed(message) is None
    reader.finish()
    assert reader.tiles == 0


SMALL = [
    write("uniform", np.dtype("u2"), [(1, 1, 2, 2, 3)] * 3, [2]),
    write("uniform", np.dtype("c8"), [(1, 1, 1, 2, 2)] * 2, [1], opening=False, closing=False),
    write("variable", np.dtype("f4"), [(1, 1, 1, 2, 3), (1, 1, 1, 1, 3), (1, 1, 1, 2, 1)], [2], opening=False, closing=False),
    write("slabs", np.dtype("u2"), [(1, 2, 1, 4, 9)] * 2, [1], slab_bytes=40),
]


@pytest.mark.parametrize("stream", SMALL)
def test_a_message_cut_at_any_byte_is_broken(stream):
    for i, message in enumerate(stream.messages):
        for cut in range(len(message)):
            reader = BatchReader()
            for before in stream.messages[:i]:
                reader.feed(before)
            with pytest.raises(BrokenStream):
                reader.feed(message[:cut])


@pytest.mark.parametrize("stream", SMALL)
def test_a_stream_that_lacks_or_repeats_or_swaps_messages_is_broken(stream):
    messages = stream.messages
    changed = [messages[:i] + messages[i + 1 :] for i in range(len(messages))]
    changed += [messages[: i + 1] + messages[i:] for i in range(len(messages))]
    changed += [[*messages[:i], messages[i + 1], messages[i], *messages[i + 2 :]] for i in range(len(messages) - 1)]
    for sequence in changed:
        reader = BatchReader()
        with pytest.raises(BrokenStream):  # noqa: PT012 - it may be noticed at any message, or at the end only
            for message in sequence:
                reader.feed(message)
            reader.finish()


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_damaged_bytes_break_the_stream_and_nothing_else(data):
    """Whatever arrives: BrokenStream, or arrays that lie within the message."""
    stream = data.draw(st.sampled_from(SMALL))
    messages = [bytearray(message) for message in stream.messages]
    for _ in range(data.draw(st.integers(1, 4))):
        message = data.draw(st.sampled_from(messages))
        place = data.draw(st.integers(0, len(message) - 1))
        message[place] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    reader = BatchReader()
    try:
        for message in map(bytes, messages):
            batch = reader.feed(message)
            for array in [] if batch is None else [*batch.pixels, *batch.columns.values()]:
                assert array.nbytes <= len(message)
                array.tobytes()
        reader.finish()
    except BrokenStream:
        pass


def foreign(stream, **options):
    """The same stream as another implementation may send it: written by Arrow, a column more, compressed, protobuf's own encoding."""
    payloads = b"".join(ReadTilesResponse.FromString(message).payload for message in stream.messages)
    messages = []
    sink = pa.BufferOutputStream()
    batches = list(pa.ipc.open_stream(payloads))
    extra = pa.field("comment", pa.string())
    schema = pa.schema([extra, *batches[0].schema], metadata=batches[0].schema.metadata)
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(
            pa.RecordBatch.from_arrays([pa.array(["x"] * batches[0].num_rows), *batches[0].columns], schema=schema)
        )
    data = sink.getvalue().to_pybytes()
    header = ReadTilesHeader(tile_count=batches[0].num_rows, tile_shape=stream.format.tile_shape, dtype=stream.format.dtype.name)
    response = ReadTilesResponse(header=header, tile_count=batches[0].num_rows, payload=data)
    # Fields may come in any order, unknown ones among them; of a field given twice the last counts.
    payload = ReadTilesResponse(payload=data).SerializeToString()
    decoy = ReadTilesResponse(payload=b"decoy", first_position=9).SerializeToString()
    response.ClearField("payload")
    messages.append(decoy + payload + b"\xf8\x07\x05" + response.SerializeToString() + b"\x11" + bytes(8))
    return messages


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("kind", ["uniform", "variable"])
@pytest.mark.parametrize("dtype", ["uint16", "bool", "complex64"])
def test_streams_of_other_implementations_are_read(compression, kind, dtype):
    shapes = [(1, 2, 1, 16, 16)] * 2 if kind == "uniform" else [(1, 2, 1, 16, 16), (1, 2, 1, 3, 16)]
    stream = write(kind, np.dtype(dtype), shapes, [2])
    reader = BatchReader()
    (message,) = foreign(stream, compression=compression)
    batch = reader.feed(message)
    reader.finish()
    for block, (tile, offset, sent), number in zip(batch.pixels, stream.rows, batch.columns["tile"], strict=True):
        assert (number, offset) == (tile.number, 0)
        assert block.tobytes() == sent.tobytes()
        assert block.shape == sent.shape
        block[...] = 0


def break_schema(change):
    """A first message whose schema was changed."""
    format = SMALL[0].format
    header = ReadTilesHeader(tile_count=1, tile_shape=format.tile_shape, dtype="uint16")
    schema = change(format.schema)
    return ReadTilesResponse(header=header, payload=schema.serialize().to_pybytes()).SerializeToString()


@pytest.mark.parametrize(
    "change",
    [
        lambda schema: schema.remove_metadata(),
        lambda schema: schema.with_metadata({"ome_tensor.version": "2", "ome_tensor.dtype": "uint16"}),
        lambda schema: schema.with_metadata({"ome_tensor.version": "1", "ome_tensor.dtype": "int16"}),
        lambda schema: schema.with_metadata({"ome_tensor.version": "1", "ome_tensor.dtype": "f8,f8"}),
        lambda schema: schema.with_metadata({"ome_tensor.version": "1", "ome_tensor.dtype": "object"}),
        lambda schema: schema.remove(0),
        lambda schema: schema.remove(10),
        lambda schema: schema.append(schema.field("pixels")),
        lambda schema: schema.set(0, pa.field("tile", pa.string())),
        lambda schema: schema.set(10, pa.field("pixels", pa.fixed_shape_tensor(pa.uint16(), [1, 1, 2, 3, 2]))),
        lambda schema: schema.set(
            10, pa.field("pixels", pa.fixed_shape_tensor(pa.uint16(), [1, 1, 2, 2, 3], permutation=[0, 1, 2, 4, 3]))
        ),
        lambda schema: schema.set(10, pa.field("pixels", pa.binary())),
        lambda schema: schema.set(10, pa.field("pixels", pa.struct([("data", pa.list_(pa.uint16()))]))),
    ],
)
def test_schemas_that_are_not_the_contracts_are_refused(change):
    with pytest.raises(BrokenStream):
        BatchReader().feed(break_schema(change))


def test_writers_refuse_what_they_cannot_write():
    writer = TileWriter(BatchFormat((1, 1, 1, 2, 2), np.dtype("u2")))
    with pytest.raises(InvalidArgument):
        writer.batch([])
    with pytest.raises(InvalidArgument, match="shape"):
        writer.batch([make_tile(0, (1, 1, 1, 2, 1))])
    with pytest.raises(InvalidArgument, match="slabs"):
        writer.slab(make_tile(0, (1, 1, 1, 2, 2)), split_into_slabs((1, 1, 1, 2, 2), 2, 4)[0], 0, ends_tile=False)
    huge = (1, 1, 1, 2**16, 2**15)
    with pytest.raises(LimitExceeded):
        BatchFormat(huge, np.dtype("u1"))
    with pytest.raises(LimitExceeded):
        TileWriter(BatchFormat(huge, np.dtype("u1"), variable=True)).batch([make_tile(0, huge)])
    with pytest.raises(InvalidArgument):
        BatchFormat((1, 2), np.dtype("u1"))


def test_a_resumed_read_may_begin_inside_a_tile():
    stream = write("slabs", np.dtype("u2"), [(1, 2, 1, 4, 9)] * 2, [1], slab_bytes=40, first=5)
    reader = BatchReader(start=5, start_slab=2)
    assert reader.feed(stream.messages[0]) is None
    for message in stream.messages[3:]:
        reader.feed(message)
    reader.finish()
    assert reader.tiles == 2
    for start, start_slab in ((5, 0), (5, 1), (6, 2)):
        reader = BatchReader(start=start, start_slab=start_slab)
        reader.feed(stream.messages[0])
        with pytest.raises(BrokenStream, match="due"):
            reader.feed(stream.messages[3])


def test_after_the_end_nothing_may_come():
    for stream in SMALL:
        reader = BatchReader()
        for message in stream.messages:
            reader.feed(message)
        reader.finish()
        with pytest.raises(BrokenStream):
            reader.feed(stream.messages[-1])
