"""What is on the wire: plain Arrow for anybody, read by pyarrow alone and by a client that has none of this project's code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tests.integration.images import random_pixels, write_image
from tests.integration.processes import run_script
from tests.integration.raw import RawClient, payload_of, raw_client, read_arrow, request, rows_of

from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_proto.v1 import view_pb2
from ome_tensor_server.testing import RunningServer, running_server

SHAPE = (2, 3, 2, 24, 36)
DTYPES = "bool int8 uint8 uint16 int32 uint64 float16 float32 float64 complex64 complex128".split()


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, dict[str, np.ndarray]]]:
    """A server of one image of each pixel type, and their pixels."""
    folder = tmp_path_factory.mktemp("typed")
    images = {name: random_pixels(SHAPE, name, seed) for seed, name in enumerate(DTYPES)}
    for name, pixels in images.items():
        write_image(folder / f"{name}.ome.parquet", pixels)
    with running_server([folder]) as server:
        yield server, images


@pytest.fixture
def raw(typed: tuple[RunningServer, dict[str, np.ndarray]]) -> Iterator[RawClient]:
    """Calls by hand to that server."""
    with raw_client(typed[0].target) as client:
        yield client


def tiles(h: int, w: int, edge: int = view_pb2.EDGE_POLICY_CLIP) -> view_pb2.Tiling:
    """A cut into rectangles."""
    return view_pb2.Tiling(tiles=view_pb2.TilesCut(h=h, w=w), edge=edge)  # type: ignore[arg-type]


def check_tiles(pixels: np.ndarray, table: pa.Table) -> None:
    """Every row holds the pixels of the place it names, and the rows together are the image."""
    seen = np.zeros(pixels.shape[-2:], int)
    for at, block in rows_of(table):
        y, x, h, w = at["y"], at["x"], at["valid_h"], at["valid_w"]
        assert block.dtype == pixels.dtype
        np.testing.assert_array_equal(block[..., :h, :w], pixels[..., y : y + h, x : x + w], strict=True)
        seen[y : y + h, x : x + w] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(8, 12), (10, 16)], ids=["uniform", "clipped"])
def test_plain_arrow_reads_the_payloads(
    typed: tuple[RunningServer, dict[str, np.ndarray]], raw: RawClient, dtype: str, size: tuple[int, int]
) -> None:
    """Concatenated payloads are one Arrow stream; uniform tiles are the canonical tensor type, one batch one array."""
    table = read_arrow(raw.read(request(dtype, tiling=tiles(*size))))
    assert isinstance(table.schema.field("pixels").type, pa.FixedShapeTensorType) == (size == (8, 12))
    assert len(table) == 9
    check_tiles(typed[1][dtype], table)


def test_a_uniform_batch_is_one_tensor_without_a_copy(typed: tuple[RunningServer, dict[str, np.ndarray]], raw: RawClient) -> None:
    """(N, T, Z, C, H, W), named axes, in memory that Arrow received."""
    payload = payload_of(raw.read(request("uint16", tiling=tiles(8, 12), tiles_per_batch=9)))
    with pa.ipc.open_stream(payload) as stream:
        batch = stream.read_next_batch()
    column = batch.column("pixels")
    assert column.type.dim_names == ["t", "z", "c", "y", "x"]
    assert column.type.permutation is None
    array = column.to_numpy_ndarray()
    assert array.shape == (9, *SHAPE[:3], 8, 12)
    source = np.frombuffer(payload, np.uint8)
    assert np.shares_memory(array, source)


@pytest.mark.parametrize("dtype", ["uint16", "bool", "complex64", "float16"])
def test_slabs_are_plain_arrow_too(tmp_path: Path, dtype: str) -> None:
    """A view larger than a message: its slabs, each at the offset that its row says, are the view."""
    pixels = random_pixels((1, 3, 2, 150, 261), dtype)
    path = write_image(tmp_path / "large.ome.parquet", pixels)
    with running_server([path]) as server, raw_client(server.target) as raw:
        messages = raw.read(request("large", max_message_bytes=64 << 10))
    header = pb.ReadTilesResponse.FromString(messages[0]).header
    assert (header.slabs, header.tile_count) == (True, 1)
    # A message holds a slab and the columns; the first one the schema too.
    assert 0 < header.slab_bytes <= 64 << 10
    assert max(map(len, messages[1:])) < header.slab_bytes + 2000
    whole = np.zeros(pixels.size, pixels.dtype)
    filled = 0
    for at, block in rows_of(read_arrow(messages)):
        assert at["offset"] == filled
        whole[filled : filled + block.size] = block.reshape(-1)
        filled += block.size
    np.testing.assert_array_equal(whole.reshape(pixels.shape), pixels, strict=True)


def test_one_tile_is_one_message(typed: tuple[RunningServer, dict[str, np.ndarray]], raw: RawClient) -> None:
    """A training worker's single read is one round trip and one wake-up."""
    roi = view_pb2.Region(roi=view_pb2.Roi(x=3, y=5, w=7, h=4))
    messages = raw.read(request("uint16", view=view_pb2.View(region=roi)))
    assert len(messages) == 1
    [(at, block)] = rows_of(read_arrow(messages))
    assert (at["tile"], at["t"], at["z"], at["y"], at["x"]) == (0, 0, 0, 5, 3)
    np.testing.assert_array_equal(block, typed[1]["uint16"][..., 5:9, 3:10], strict=True)


def test_padding_and_dropping(typed: tuple[RunningServer, dict[str, np.ndarray]], raw: RawClient) -> None:
    """Padded tiles are uniform and filled; dropped ones are not counted."""
    pixels = typed[1]["float32"]
    padded = tiles(10, 16, view_pb2.EDGE_POLICY_PAD)
    padded.pad_value = -7.5
    table = read_arrow(raw.read(request("float32", tiling=padded)))
    check_tiles(pixels, table)
    for at, block in rows_of(table):
        assert block.shape[-2:] == (10, 16)
        assert (block[..., at["valid_h"] :, :] == -7.5).all()
        assert (block[..., at["valid_w"] :] == -7.5).all()
    dropped = read_arrow(raw.read(request("float32", tiling=tiles(10, 16, view_pb2.EDGE_POLICY_DROP))))
    assert [(at["tile"], at["y"], at["x"]) for at, _ in rows_of(dropped)] == [(0, 0, 0), (1, 0, 16), (2, 10, 0), (3, 10, 16)]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float64", "complex128"])
def test_pixels_are_aligned_in_the_message(raw: RawClient, dtype: str) -> None:
    """Consumers of DLPack want aligned memory, and a message is used where it lies."""
    schema = None
    for message in raw.read(request(dtype, tiling=tiles(8, 12), tiles_per_batch=2)):
        payload = pb.ReadTilesResponse.FromString(message).payload
        assert message.endswith(payload)
        buffer = pa.py_buffer(payload)
        with pa.BufferReader(buffer) as source:
            schema = schema or pa.ipc.read_schema(source)
            batch = pa.ipc.read_record_batch(source, schema)
        pixels = batch.column("pixels").storage.buffers()[-1]
        assert (len(message) - len(payload) + pixels.address - buffer.address) % 64 == 0


def test_a_view_without_elements_has_no_batches(raw: RawClient) -> None:
    """Its header says so, and the stream is still whole."""
    nothing = view_pb2.AxisIndex(list=view_pb2.IndexList())
    messages = raw.read(request("uint16", view=view_pb2.View(t=nothing)))
    assert len(read_arrow(messages)) == 0
    assert pb.ReadTilesResponse.FromString(messages[0]).header.tile_count == 0


def test_unknown_fields_are_tolerated(typed: tuple[RunningServer, dict[str, np.ndarray]], raw: RawClient) -> None:
    """A newer client's extra fields are ignored, as protobuf promises."""
    newer = b"\xfa\xe2\x09\x05later"  # field 20015, length-delimited
    view = view_pb2.View(c=view_pb2.AxisIndex(index=1)).SerializeToString() + newer
    sent = request("uint16").SerializeToString() + b"\x12" + bytes([len(view)]) + view + newer
    [(_, block)] = rows_of(read_arrow(raw.read(sent)))
    np.testing.assert_array_equal(block, typed[1]["uint16"][:, :, 1:2], strict=True)


def test_another_client_reads_tiles(typed: tuple[RunningServer, dict[str, np.ndarray]], tmp_path: Path) -> None:
    """Made from the contract alone, as the server's reflection tells it; no code of this project."""
    file = tmp_path / "read.npz"
    run_script("foreign_client.py", typed[0].target, "uint16", 8, 12, file)
    with np.load(file) as read:
        for block, y, x in zip(read["pixels"], read["y"], read["x"], strict=True):
            np.testing.assert_array_equal(block, typed[1]["uint16"][..., y : y + 8, x : x + 12], strict=True)
        assert len(read["pixels"]) == 9


def test_reflection_lists_the_services(typed: tuple[RunningServer, dict[str, np.ndarray]]) -> None:
    """grpcurl and its like can look around."""
    with grpc.insecure_channel(typed[0].target) as channel:
        services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert services == {
        "ome_tensor_proto.v1.TensorService",
        "ome_tensor_proto.v1.AdminService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_header_and_timings(typed: tuple[RunningServer, dict[str, np.ndarray]], raw: RawClient) -> None:
    """The first message says what comes; each says where it stands and what it cost."""
    messages = [
        pb.ReadTilesResponse.FromString(message)
        for message in raw.read(request("uint16", tiling=tiles(8, 12), tiles_per_batch=4))
    ]
    header = messages[0].header
    assert (header.tile_count, header.total_tiles, list(header.tile_shape), header.dtype) == (9, 9, [*SHAPE[:3], 8, 12], "uint16")
    assert header.dataset_version == raw.call("GetDataset", pb.GetDatasetRequest(name="uint16")).dataset.version
    assert not any(message.HasField("header") for message in messages[1:])
    filled = [message for message in messages if message.tile_count]
    assert [(message.first_position, message.tile_count) for message in filled] == [(0, 4), (4, 4), (8, 1)]
    assert all(message.HasField("timings") for message in filled)
