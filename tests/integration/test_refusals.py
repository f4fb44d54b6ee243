"""What the server refuses, and how: standard codes with ErrorInfo for every client, nothing of its insides, and room for the next call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tests.integration.images import random_pixels, write_image, write_images
from tests.integration.processes import wait_until
from tests.integration.raw import RawClient, raw_client, reason_of, request

from ome_tensor import DatasetChanged, DatasetNotFound, ImageNotFound, InvalidArgument, LimitExceeded, Overloaded
from ome_tensor_client import connect
from ome_tensor_proto.methods import METHODS
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_proto.v1 import view_pb2
from ome_tensor_server.testing import RunningServer, running_server

Code = grpc.StatusCode
LIMITS = {
    "max_request_bytes": 2000,
    "max_tile_bytes": 50_000,
    "max_tiles": 1000,
    "max_indices": 20,
    "max_concurrent_reads": 2,
    "batch_bytes": 64 << 10,
    "max_message_bytes": 1 << 20,
}


@pytest.fixture(scope="module")
def limited(image_path: Path, big_path: Path) -> Iterator[RunningServer]:
    """A server with narrow limits."""
    with running_server([image_path, big_path], **LIMITS) as server:
        yield server


@pytest.fixture
def raw(limited: RunningServer) -> Iterator[RawClient]:
    """Calls by hand to it."""
    with raw_client(limited.target) as client:
        yield client


def cut(**sizes: int) -> view_pb2.Tiling:
    """A cut into rectangles, or boxes where ``z`` is given."""
    if "z" in sizes:
        return view_pb2.Tiling(tiles_3d=view_pb2.Tiles3dCut(**sizes))
    return view_pb2.Tiling(tiles=view_pb2.TilesCut(**sizes))


WINDOWS = view_pb2.Tiling(windows=view_pb2.WindowsCut(h=4, w=4, origin_y=[1], origin_x=[0], image=[1]))


def with_view(**fields: object) -> pb.ReadTilesRequest:
    """A read of a view."""
    return request(view=view_pb2.View(**fields))  # type: ignore[arg-type]


REFUSED = {
    "keys of two datasets": (pb.ReadTilesRequest(keys=["image", "big"]), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", "keys"),
    "keys and rows": (
        pb.ReadTilesRequest(keys=["image"], image_rows=pb.ImageRows(dataset="image", rows=[0])),
        Code.INVALID_ARGUMENT,
        "INVALID_ARGUMENT",
        "keys",
    ),
    "no rows": (
        pb.ReadTilesRequest(image_rows=pb.ImageRows(dataset="image")),
        Code.INVALID_ARGUMENT,
        "INVALID_ARGUMENT",
        "image_rows.rows",
    ),
    "a row that is not there": (
        pb.ReadTilesRequest(image_rows=pb.ImageRows(dataset="image", rows=[0, 2**64 - 1])),
        Code.NOT_FOUND,
        "IMAGE_NOT_FOUND",
        "key",
    ),
    "a level that is not there": (request(pyramid_level=9), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", "pyramid_level"),
    "a window of another image": (request(tiling=WINDOWS), Code.INVALID_ARGUMENT, "INVALID_SELECTION", "images"),
    "a span beyond the end": (
        request(order=view_pb2.Order(spans=[view_pb2.PositionSpan(first=1, count=1)])),
        Code.INVALID_ARGUMENT,
        "INVALID_ARGUMENT",
        "spans",
    ),
    "a column beside that is not there": (request(beside=["mask"]), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", "beside"),
    "no key": (pb.ReadTilesRequest(), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", "keys"),
    "malformed key": (request("a/b/c/d"), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", "key"),
    "no dataset": (request("nothing"), Code.NOT_FOUND, "DATASET_NOT_FOUND", "key"),
    "endless row": (request("image/" + "9" * 1500), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", "key"),
    "no row": (request("image/7"), Code.NOT_FOUND, "IMAGE_NOT_FOUND", "key"),
    "no column": (request("image/mask/0"), Code.NOT_FOUND, "IMAGE_NOT_FOUND", "key"),
    "t outside": (with_view(t=view_pb2.AxisIndex(index=9)), Code.INVALID_ARGUMENT, "INVALID_SELECTION", "t"),
    "roi outside": (
        with_view(region=view_pb2.Region(roi=view_pb2.Roi(x=0, y=0, w=999, h=1))),
        Code.INVALID_ARGUMENT,
        "INVALID_SELECTION",
        "roi",
    ),
    "no cut": (request(tiling=view_pb2.Tiling()), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", None),
    "tile of nothing": (request(tiling=cut(h=0, w=4)), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", None),
    "dtype": (with_view(dtype="object"), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", None),
    "layout": (with_view(layout="QQ"), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", None),
    "another version": (request(if_version="other"), Code.FAILED_PRECONDITION, "DATASET_CHANGED", "if_version"),
    "shuffle without seed": (request(order=view_pb2.Order(shuffle=True)), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", None),
    "shard": (request(order=view_pb2.Order(shard_index=2, shard_count=2)), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", None),
    "start_slab": (
        request(tiling=cut(h=20, w=20), order=view_pb2.Order(start_slab=1)),
        Code.INVALID_ARGUMENT,
        "INVALID_ARGUMENT",
        "order.start_slab",
    ),
    "too many indices": (
        with_view(t=view_pb2.AxisIndex(list=view_pb2.IndexList(values=[0] * 21))),
        Code.OUT_OF_RANGE,
        "LIMIT_EXCEEDED",
        "view.t",
    ),
    "too many tiles": (request(tiling=cut(h=4, w=4)), Code.OUT_OF_RANGE, "LIMIT_EXCEEDED", "tiling"),
    "too large a tile": (request(tiling=cut(h=200, w=200)), Code.OUT_OF_RANGE, "LIMIT_EXCEEDED", "tiling"),
    "too large a box": (request(tiling=cut(z=3, h=100, w=100)), Code.OUT_OF_RANGE, "LIMIT_EXCEEDED", "tiling"),
    "too many tiles a batch": (
        request(tiling=cut(h=20, w=20), tiles_per_batch=1000),
        Code.OUT_OF_RANGE,
        "LIMIT_EXCEEDED",
        "tiles_per_batch",
    ),
}


@pytest.mark.parametrize("message,code,reason,field", REFUSED.values(), ids=REFUSED)
def test_refusals(raw: RawClient, message: pb.ReadTilesRequest, code: grpc.StatusCode, reason: str, field: str | None) -> None:
    """Code, reason and the field to blame; and before the first message."""
    stream = raw.stream(message)
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() == code
    found, blamed = reason_of(caught.value)
    assert found == reason
    assert blamed is not None
    assert field is None or blamed == field


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("data", [b"\xff" * 20, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05ab", bytes(range(256))])
def test_garbage_is_an_invalid_argument(raw: RawClient, server_log: pytest.LogCaptureFixture, name: str, data: bytes) -> None:
    """Bytes that are no request are the caller's mistake: no INTERNAL, no traceback at either end."""
    call = raw.read if METHODS[name].streaming else lambda garbage: raw.call(name, garbage)
    with pytest.raises(grpc.RpcError) as caught:
        call(data)
    assert caught.value.code() == Code.INVALID_ARGUMENT
    assert reason_of(caught.value)[0] == "INVALID_ARGUMENT"
    assert "Traceback" not in caught.value.details() + server_log.text
    assert not [record for record in server_log.records if record.exc_info]


def test_an_unknown_method(raw: RawClient) -> None:
    """gRPC's own answer; the server stays up."""
    with pytest.raises(grpc.RpcError) as caught:
        raw.channel.unary_unary("/ome_tensor_proto.v1.TensorService/Delete")(b"", timeout=10)
    assert caught.value.code() == Code.UNIMPLEMENTED
    assert raw.call("ListDatasets", pb.ListDatasetsRequest()).datasets[1].name == "image"


def test_a_request_over_the_limit(raw: RawClient) -> None:
    """Just over it the service says so clearly; far over it gRPC does; and what is at the limit is read."""
    with pytest.raises(grpc.RpcError) as caught:
        raw.read(request("x" * 2000))
    assert caught.value.code() == Code.OUT_OF_RANGE
    assert reason_of(caught.value) == ("LIMIT_EXCEEDED", "request")
    with pytest.raises(grpc.RpcError) as caught:
        raw.read(request("x" * (4 << 20)))
    assert caught.value.code() == Code.RESOURCE_EXHAUSTED
    longest = request()
    longest.if_version = "v" * (2000 - longest.ByteSize() - 3)
    assert longest.ByteSize() == 2000
    with pytest.raises(grpc.RpcError) as caught:
        raw.read(longest)
    assert reason_of(caught.value)[0] == "DATASET_CHANGED"


def test_the_clients_errors_are_this_projects(limited: RunningServer) -> None:
    """No RpcError reaches a user, and what is hopeless is not retried."""
    with connect(limited.target, retry_for=30) as client:
        view = client.tensor_view("image")
        with pytest.raises(LimitExceeded, match="max_tile_bytes"):
            list(view.iter_tiles(tile_size=(200, 200)))
        with pytest.raises(LimitExceeded, match="indices"):
            client.tensor_view("image", t=[0, 1, 0] * 10).to_numpy()
        with pytest.raises(LimitExceeded):
            client.tensor_view("image", t=[0, 1, 0] * 500_000).to_numpy()
        with pytest.raises(DatasetNotFound, match="nothing"):
            client.dataset("nothing")
        with pytest.raises(ImageNotFound):
            client.image("image/9")


def test_concurrent_reads_are_limited(raw: RawClient, limited: RunningServer) -> None:
    """The stream too many is refused at once and told to come later; metadata calls get through; a freed place is taken."""
    # Of 32 MiB each: what fits the buffers between here and there would be over at once.
    streams = [raw.stream(request("big", tiling=cut(h=50, w=55), tiles_per_batch=1)) for _ in range(2)]
    for stream in streams:
        next(stream)
    with pytest.raises(grpc.RpcError) as caught:
        next(raw.stream(request()))
    assert caught.value.code() == Code.RESOURCE_EXHAUSTED
    assert reason_of(caught.value) == ("OVERLOADED", "max_concurrent_reads")
    assert raw.call("ListDatasets", pb.ListDatasetsRequest()).datasets
    with connect(limited.target, retry_for=0) as client, pytest.raises(Overloaded, match="try again"):
        client.tensor_view("image").to_numpy()

    streams[0].cancel()
    # The client's own retry is what waits for the place here.
    with connect(limited.target, retry_for=20) as client:
        assert client.tensor_view("image", t=0, z=0, c=0).to_numpy().shape == (1, 240, 270)
    assert sum(pb.ReadTilesResponse.FromString(message).tile_count for message in streams[1]) == 41 * 19 - 1


def rows(count: int, seed: int = 0) -> list[object]:
    """Small images, some rows without one."""
    return [None if row % 5 == 3 else random_pixels((1, 1, 1, 4, 5), seed=seed + row) for row in range(count)]


def pages(raw: RawClient, size: int, column: str = "") -> list[str]:
    """Keys of all images, page by page."""
    found: list[str] = []
    token = ""
    while True:
        page = raw.call("ListImages", pb.ListImagesRequest(dataset="many", page_size=size, page_token=token, column=column))
        assert page.total_count == 24
        assert 0 < len(page.images) <= size
        found += [image.key for image in page.images]
        token = page.next_page_token
        if not token:
            return found


def test_images_come_in_pages(tmp_path: Path) -> None:
    """Every page size gives the same list; a token of another version of the dataset is refused, and so is any other text."""
    path = write_images(tmp_path / "many.ome.parquet", rows(30))  # type: ignore[arg-type]
    everything = [f"many/image/{row}" for row in range(30) if row % 5 != 3]
    with running_server([path]) as server, raw_client(server.target) as raw:
        for size in (1, 7, 24, 1000):
            assert pages(raw, size) == everything
        assert pages(raw, 5, "image") == everything
        with connect(server.target) as client:
            assert [image.key for image in client.images("many", page_size=4)] == everything
            with pytest.raises(InvalidArgument, match="mask"):
                client.images("many", column="mask")
        token = raw.call("ListImages", pb.ListImagesRequest(dataset="many", page_size=10)).next_page_token
        for bad in (
            "x",
            token + "0",
            token.rpartition(":")[0] + ":-1",
            token.rpartition(":")[0] + ":",
            token.rpartition(":")[0] + ":1e3",
        ):
            with pytest.raises(grpc.RpcError) as caught:
                raw.call("ListImages", pb.ListImagesRequest(dataset="many", page_token=bad))
            reason, field = reason_of(caught.value)
            assert (reason in ("INVALID_ARGUMENT", "DATASET_CHANGED"), field) == (True, "page_token"), bad
        target = server.target
    write_images(path, rows(30, seed=100))  # type: ignore[arg-type]
    with running_server([path], listen=target) as server, raw_client(server.target) as raw:
        with pytest.raises(grpc.RpcError) as caught:
            raw.call("ListImages", pb.ListImagesRequest(dataset="many", page_token=token))
        assert caught.value.code() == Code.FAILED_PRECONDITION
        assert reason_of(caught.value) == ("DATASET_CHANGED", "page_token")


def test_a_list_that_changes_under_the_client(tmp_path: Path) -> None:
    """The iterator fails clearly rather than mixing two lists."""
    path = write_images(tmp_path / "many.ome.parquet", rows(30))  # type: ignore[arg-type]
    with running_server([path]) as server:
        target = server.target
        client = connect(target)
        images = client.images("many", page_size=10)
        next(images)
    write_images(path, rows(30, seed=100))  # type: ignore[arg-type]
    with running_server([path], listen=target), client, pytest.raises(DatasetChanged):
        list(images)


def test_datasets_come_in_pages(tmp_path: Path) -> None:
    """By name, whatever the page size."""
    for number in range(5):
        write_image(tmp_path / f"d{number}.ome.parquet", random_pixels((1, 1, 1, 2, 2)))
    with running_server([tmp_path]) as server, raw_client(server.target) as raw:
        names, token = [], ""
        for _ in range(3):
            page = raw.call("ListDatasets", pb.ListDatasetsRequest(page_size=2, page_token=token))
            names += [dataset.name for dataset in page.datasets]
            token = page.next_page_token
        assert (names, token) == ([f"d{number}" for number in range(5)], "")
        with pytest.raises(grpc.RpcError) as caught:
            raw.call("ListDatasets", pb.ListDatasetsRequest(page_token="99"))
        assert reason_of(caught.value) == ("INVALID_ARGUMENT", "page_token")


def test_one_line_a_call(limited: RunningServer, raw: RawClient, server_log: pytest.LogCaptureFixture) -> None:
    """Method, image, bytes, tiles, milliseconds, status."""
    messages = raw.read(request(tiling=cut(h=40, w=40)))

    def line() -> dict[str, object] | None:
        lines = [getattr(record.msg, "values", {}) for record in server_log.records]
        return next((values for values in lines if values.get("method") == "ReadTiles"), None)

    values = wait_until(line, "the call's line")
    assert {name: values[name] for name in ("image", "tiles", "bytes", "status")} == {
        "image": "image/image/0",
        "tiles": 42,
        "bytes": sum(map(len, messages)),
        "status": "OK",
    }
    assert values["ms"] > 0
