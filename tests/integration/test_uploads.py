"""Uploads: whole or not at all, checked before they are kept, there after a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.integration.images import random_pixels, record_of, write_image
from tests.integration.processes import ServerProcess, wait_until

from ome_tensor import BrokenStream, DatasetNotFound, InvalidArgument, InvalidRecord, LimitExceeded, OmeTensorError
from ome_tensor_client import Client, connect
from ome_tensor_proto.methods import ADMIN_METHODS
from ome_tensor_proto.status import from_rpc_error
from ome_tensor_proto.v1 import admin_service_pb2 as pb
from ome_tensor_server.testing import running_server
from ome_tensor_server.uploads import Uploads


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "uploads"


@pytest.fixture
def client(folder: Path) -> Iterator[Client]:
    with running_server([], uploads=str(folder), max_upload_bytes=4 << 20) as server, connect(server.target) as connected:
        yield connected


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".ome-tensor-uploads")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int32", "float32", "float64", "bool", "complex64"])
@pytest.mark.parametrize("axes", ["YX", "CYX", "ZCYX", "TZCYX", "XYZ"])
def test_an_array(client: Client, dtype: str, axes: str) -> None:
    shape = tuple(range(4, 4 + len(axes)))
    array = random_pixels(shape, dtype)
    info = client.upload("up", array, axes="" if axes != "XYZ" else axes)
    assert (info.name, info.row_count, info.image_columns) == ("up", 1, ("image",))
    found = client.tensor_view("up", layout="TZCYX").to_numpy()
    order = [axes.index(axis) for axis in "TZCYX" if axis in axes]
    np.testing.assert_array_equal(found.reshape(array.transpose(order).shape), array.transpose(order), strict=True)


def test_what_is_said_of_an_array(client: Client) -> None:
    client.upload(
        "up",
        random_pixels((2, 6, 7)),
        column="nuclei",
        image_type="label",
        channel_names=["DNA", "RNA"],
        physical_size=(1.0, 0.5, 0.25),
    )
    meta = client.image("up").meta
    assert meta is not None
    assert (meta.image_type, meta.physical_size, meta.physical_unit) == ("label", (1.0, 0.5, 0.25), ("µm", "µm", "µm"))
    assert [channel.name for channel in meta.channels] == ["DNA", "RNA"]
    assert client.dataset("up").image_columns == ("nuclei",)


def test_tables_records_and_files(client: Client, tmp_path: Path) -> None:
    images = [random_pixels((1, 1, 1, 5, 6), seed=row) for row in range(5)]
    table = pa.table({"cell": pa.array([record_of(one) for one in images]), "n": range(5)})
    path = write_image(tmp_path / "one.ome.parquet", images[0])
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    np.save(tmp_path / "a.npy", images[0][0, 0])
    kinds: dict[str, Any] = {
        "table": table,
        "reader": table.to_reader(),
        "parquet": tmp_path / "t.parquet",
        "arrow": str(tmp_path / "t.arrow"),
    }
    for name, data in kinds.items():
        sent: list[int] = []
        client.upload(name, data, progress=lambda done, _, sent=sent: sent.append(done))
        assert sent == sorted(sent)
        assert sent
        for tile in client.dataset(name).images(filters=[("n", ">", 1)]).iter_tiles():
            np.testing.assert_array_equal(tile.array, images[tile.row][0, 0])
    for name, data in {
        "npy": tmp_path / "a.npy",
        "one": path,
        "struct": table["cell"].chunk(0),
        "scalar": table["cell"][0],
    }.items():
        client.upload(name, data)
        np.testing.assert_array_equal(next(iter(client.dataset(name).images().iter_tiles())).array, images[0][0, 0])


def test_an_object_of_upstream(client: Client) -> None:
    ome_arrow = pytest.importorskip("ome_arrow")
    pixels = random_pixels((1, 2, 3, 9, 8))
    made = ome_arrow.OMEArrow(data=pixels.swapaxes(1, 2))
    client.upload("up", made)
    np.testing.assert_array_equal(
        client.tensor_view("up", layout="TZCYX").to_numpy(), made.tensor_view(layout="TZCYX").to_numpy()
    )


@pytest.mark.parametrize(
    "data, options, words",
    [
        ("nothing.parquet", {}, "cannot be read: No such file"),
        (7, {}, "data must be a NumPy array"),
        (np.zeros(3), {}, "axes must name"),
        (np.zeros((2, 2)), {"axes": "YQ"}, "axes must name"),
        (np.zeros((2, 2, 2)), {"axes": "TZC"}, "axes must name"),
        (np.zeros((0, 2)), {}, "has no pixels"),
        (np.zeros((2, 2), "M8[s]"), {}, "dtype"),
        (np.zeros((2, 2, 2)), {"channel_names": ["a"]}, "2 channels, and there are 1 names"),
        (pa.table({"n": [1]}), {}, "no OME-Arrow image column"),
        (pa.table({"image": pa.array([record_of(np.zeros((1, 1, 1, 2, 2)))])}).slice(0, 0), {}, "no rows"),
    ],
)
def test_what_is_no_dataset_is_not_sent(client: Client, data: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        client.upload("up", data, **options)
    assert client.datasets() == []


def damaged(change: Callable[[dict[str, Any]], Any]) -> pa.Table:
    record = record_of(random_pixels((1, 2, 2, 6, 7)))
    change(record)
    good = record_of(random_pixels((1, 2, 2, 6, 7)))
    return pa.table({"image": pa.array([good, record])})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: r["chunks"][1].update(pixel_bytes=b"short"), "pixels length 2 != expected 42"),
        (lambda r: r["chunks"].pop(2), "chunk missing at"),
        (lambda r: r["chunks"][3].update(z=0, c=0), "overlap|missing"),
        (lambda r: r["chunks"][0].update(x=5), "out of range of the image"),
        (lambda r: r["pixels_meta"].update(size_x=2**31 - 1, size_y=2**31 - 1), "missing|expected"),
        (lambda r: r["pixels_meta"].update(size_x=0), "x size must be positive"),
        (lambda r: r["pixels_meta"].update(type="nonsense"), "is not a pixel type"),
        (lambda r: r["chunks"].clear(), "holds no pixels"),
    ],
)
def test_damaged_images_are_refused_and_leave_nothing(
    client: Client, folder: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    with pytest.raises(InvalidRecord, match=words) as caught:
        client.upload("up", damaged(change))
    assert "row 1 of column 'image' of the upload" in caught.value.message
    assert client.datasets() == []
    assert files(folder) == []


def raw(target: str, *messages: pb.UploadDatasetRequest) -> OmeTensorError | None:
    """An upload by hand; what the server says."""
    with grpc.insecure_channel(target) as channel:
        call = channel.stream_unary(ADMIN_METHODS["UploadDataset"].path)
        try:
            call(iter([message.SerializeToString() for message in messages]), timeout=20)
        except grpc.RpcError as error:
            return from_rpc_error(error)
    return None


def stream_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_streams_that_are_none(folder: Path) -> None:
    good = stream_of(damaged(lambda _: None))
    head = pb.UploadDatasetRequest(header=pb.UploadHeader(name="up"))

    def part(data: bytes) -> pb.UploadDatasetRequest:
        return pb.UploadDatasetRequest(payload=data)

    with running_server([], uploads=str(folder), max_upload_bytes=1 << 20) as server, connect(server.target) as client:
        for wrong in (b"", b"nonsense", good[:-8], good[: len(good) // 2], b"PAR1" + good):
            assert isinstance(raw(server.target, head, part(wrong)), InvalidRecord)
        assert isinstance(raw(server.target), InvalidArgument)
        assert isinstance(raw(server.target, part(good)), InvalidArgument)
        assert isinstance(raw(server.target, head, head), InvalidArgument)
        # A checksum that was announced, and whose tag or message the network has damaged.
        announced = pb.UploadDatasetRequest(header=pb.UploadHeader(name="up", checked=True))
        for last in ((), (part(b""),)):
            assert isinstance(raw(server.target, announced, part(good), *last), BrokenStream)
        short = pb.UploadDatasetRequest(header=pb.UploadHeader(name="up", total_bytes=5))
        assert "bytes arrived of an upload of 5" in str(raw(server.target, short, part(good)))
        large = pb.UploadDatasetRequest(header=pb.UploadHeader(name="up", total_bytes=2 << 20))
        assert isinstance(raw(server.target, large, part(good)), LimitExceeded)
        assert isinstance(raw(server.target, head, *[part(bytes(1 << 19))] * 3), LimitExceeded)
        for name in ("", "x" * 300, "ü" * 100):
            assert isinstance(
                raw(server.target, pb.UploadDatasetRequest(header=pb.UploadHeader(name=name)), part(good)), InvalidArgument
            )
        assert client.datasets() == []
        assert files(folder) == []
        for name in ("../x", "a/b", ".", "..", "%41", "a b", "CON", "x\n"):
            assert raw(server.target, pb.UploadDatasetRequest(header=pb.UploadHeader(name=name)), part(good)) is None
        assert sorted(dataset.name for dataset in client.datasets()) == sorted(
            ("../x", "a/b", ".", "..", "%41", "a b", "CON", "x\n")
        )
        assert len(files(folder)) == 8
    with running_server([], uploads=str(folder)) as server, connect(server.target) as client:
        assert sorted(dataset.name for dataset in client.datasets()) == sorted(
            ("../x", "a/b", ".", "..", "%41", "a b", "CON", "x\n")
        )


@pytest.mark.slow
def test_a_bomb_is_refused(folder: Path) -> None:
    """A few kilobytes that claim to be gigabytes: whoever reads them may have so much memory and no more."""
    table = pa.table(
        {
            "image": pa.array([record_of(np.zeros((1, 1, 1, 2, 2), np.uint8))]),
            "b": pa.array([bytes(1_500_000_000)], pa.large_binary()),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    assert len(data) < 1 << 20
    messages = (pb.UploadDatasetRequest(header=pb.UploadHeader(name="bomb")), pb.UploadDatasetRequest(payload=data))
    with running_server([], uploads=str(folder), memory_limit="1G") as server, connect(server.target) as client:
        error = raw(server.target, *messages)
        assert isinstance(error, (InvalidRecord, LimitExceeded)), error
        assert "memory" in error.message
        assert files(folder) == []
        client.upload("up", np.zeros((4, 4), np.uint8))
        assert not client.tensor_view("up").to_numpy().any()


def test_replacing_and_removing(client: Client, folder: Path) -> None:
    first, second = random_pixels((1, 1, 2, 50, 60)), random_pixels((1, 1, 1, 20, 30), np.int8)
    client.upload("up", first)
    tiles = client.tensor_view("up").iter_tiles(tile_size=(8, 8))
    begun = next(tiles)
    with pytest.raises(InvalidArgument, match="there is an upload 'up' already"):
        client.upload("up", second)
    client.upload("up", second, replace=True)
    np.testing.assert_array_equal(client.tensor_view("up", layout="TZCYX").to_numpy(), second)
    for tile in [begun, *tiles]:
        y, x = tile.origin[2:]
        np.testing.assert_array_equal(tile.array, first[0, 0, :, y : y + 8, x : x + 8])
    assert files(folder) == ["up.arrows"]
    client.admin.remove("up")
    assert files(folder) == []
    with pytest.raises(DatasetNotFound):
        client.tensor_view("up").to_numpy()
    client.upload("up", first)


def test_a_client_that_goes_leaves_nothing(client: Client, folder: Path) -> None:
    """Its stream ends; that is not what an upload's end is."""
    going = threading.Event()

    def messages() -> Iterator[bytes]:
        yield pb.UploadDatasetRequest(header=pb.UploadHeader(name="up")).SerializeToString()
        yield pb.UploadDatasetRequest(payload=stream_of(damaged(lambda _: None))[:1000]).SerializeToString()
        going.wait(20)

    with grpc.insecure_channel(client.target) as channel:
        call = channel.stream_unary(ADMIN_METHODS["UploadDataset"].path).future(messages())
        wait_until(lambda: any(name.endswith(".part") for name in files(folder)), "it is being received")
        call.cancel()
    going.set()
    wait_until(lambda: files(folder) == [], "nothing is left")
    assert client.datasets() == []


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.9, 1.2, 1.6])
def test_kill_nine(tmp_path: Path, start_server: Callable[..., ServerProcess], seconds: float) -> None:
    """At some moment of an upload: afterwards it is there whole, or not at all. (``python -m benchmarks.uploads`` does it a hundred times.)"""
    (tmp_path / "data").mkdir()
    flags = ("--uploads", str(tmp_path / "uploads"), "--store", str(tmp_path / "store"))
    pixels = random_pixels((1, 4, 2, 500, 600))
    server = start_server(tmp_path / "data", *flags).wait_serving()
    done = []

    def send() -> None:
        try:
            with connect(server.target, retry_for=0.1) as client:
                client.upload("kept", pixels[:, :1])
                done.append("kept")
                client.upload("up", pixels)
                done.append("up")
        except OmeTensorError:
            pass

    sending = threading.Thread(target=send)
    sending.start()
    wait_until(lambda: done, "the first is taken")
    time.sleep(seconds)
    server.kill()
    sending.join(20)
    again = start_server(tmp_path / "data", *flags).wait_serving()
    assert not [name for name in files(tmp_path / "uploads") if name.endswith(".part")]
    with connect(again.target) as client:
        names = [dataset.name for dataset in client.datasets()]
        assert set(done) <= set(names) <= {"kept", "up"}
        for name, wanted in (("kept", pixels[:, :1]), ("up", pixels)):
            if name in names:
                np.testing.assert_array_equal(client.tensor_view(name, layout="TZCYX").to_numpy(), wanted)


def test_a_folder_that_holds_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match=r"holds other files \(mine.txt\)"):
        Uploads(tmp_path, 1)
    with pytest.raises(InvalidArgument, match="cannot be used"):
        Uploads(tmp_path / "mine.txt", 1)
