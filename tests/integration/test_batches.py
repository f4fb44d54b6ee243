"""Batches and windows from a server: the local ones' equal, the received message itself, whole after cuts, plain Arrow on the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.integration.images import random_pixels, record_of, write_image
from tests.integration.proxy import Proxy
from tests.integration.raw import RawClient, raw_client, read_arrow, reason_of, request, rows_of
from tests.unit.test_windows import REFUSED

import ome_tensor_client.remote
from ome_tensor import BatchArray, BrokenStream, InvalidRecord, LimitExceeded, TensorView
from ome_tensor.errors import OmeTensorError
from ome_tensor_client import Client, connect
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_proto.v1 import view_pb2
from ome_tensor_server.testing import RunningServer, running_server

ORIGINS = np.random.default_rng(5).integers(0, (200, 230), (60, 2))
PLACES = np.random.default_rng(6).integers((0, -1, -20, -20), (2, 3, 239, 269), (60, 4))

Read = Callable[[Any], Iterator[BatchArray]]
READS: dict[str, Read] = {
    "tiles": lambda view: view.iter_batches(tile_size=(48, 54), batch_size=4),
    "padded": lambda view: view.iter_batches(tile_size=(50, 64), batch_size=3, edge="pad", pad=7),
    "shuffled": lambda view: view.iter_batches(tile_size=(20, 30), batch_size=8, shuffle=True, seed=11),
    "sharded": lambda view: view.iter_batches(tile_size=(20, 30), batch_size=5, shuffle=True, seed=11, shard=(1, 3), start=2),
    "boxes": lambda view: view.iter_batches(tile_size=(2, 60, 60), batch_size=7, edge="pad", prefetch=2),
    "drop_last": lambda view: view.iter_batches(tile_size=(20, 30), batch_size=16, drop_last=True),
    "windows": lambda view: view.iter_windows(ORIGINS, (40, 40), 8),
    "windows shuffled": lambda view: view.iter_windows(ORIGINS, (40, 40), 7, shuffle=True, seed=3, shard=(0, 2), prefetch=2),
    "windows padded": lambda view: view.iter_windows(PLACES, (2, 40, 40), 8, edge="pad", pad=9, start=5),
    "windows one by one": lambda view: view.iter_windows(ORIGINS, (30, 30), 1),
}


@pytest.fixture(scope="module")
def local(pixels: np.ndarray) -> TensorView:
    """The same image without a network."""
    return TensorView(record_of(pixels))


def same_batches(found: list[BatchArray], wanted: list[BatchArray]) -> None:
    """Equal in every way."""
    assert [(len(batch), batch.position) for batch in found] == [(len(batch), batch.position) for batch in wanted]
    for one, other in zip(found, wanted, strict=True):
        for name in ("numbers", "origins", "valid", "array"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.array.dtype == other.array.dtype
        assert one.array.flags.writeable


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("layout", [None, "CTZXY"])
@pytest.mark.parametrize("name", READS)
def test_remote_batches_are_the_local_ones(
    served: RunningServer, local: TensorView, name: str, layout: str | None, compression: str
) -> None:
    """Order, numbers, places, pixels; in any layout; compressed or not."""
    with connect(served.target, compression=compression) as client:
        found = list(READS[name](client.tensor_view("image", layout=layout)))
    same_batches(found, list(READS[name](local.with_layout(layout or "TZCYX"))))


cuts_anywhere = st.lists(st.integers(0, 600_000), min_size=1, max_size=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", READS)
@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(cuts=[100_000, 40_000, 190_000, 35_000])
@given(cuts=cuts_anywhere)
def test_batches_survive_cuts(served: RunningServer, local: TensorView, name: str, cuts: list[int]) -> None:
    """Cut anywhere, in the middle of a batch above all: the batches stay those of an undisturbed read."""
    with Proxy(served.target, cuts) as proxy, connect(proxy.target, retry_for=20) as client:
        found = list(READS[name](client.tensor_view("image")))
    same_batches(found, list(READS[name](local)))


def test_the_proxy_cuts_inside_batches(served: RunningServer, local: TensorView) -> None:
    """A batch of 640 KB is cut three times, and arrives."""
    with Proxy(served.target, [300_000] * 3) as proxy, connect(proxy.target, retry_for=20) as client:
        found = list(client.tensor_view("image").iter_windows(ORIGINS, (40, 40), 30))
        assert proxy.done == 3
    same_batches(found, list(local.iter_windows(ORIGINS, (40, 40), 30)))


def test_a_batch_is_the_message(client: Client, pixels: np.ndarray) -> None:
    """No copy: the array lies in the received bytes, in the view's layout; a permuted one is a strided view of them, copied when asked."""
    view = client.tensor_view("image", t=0, z=1)
    [batch] = view.iter_windows(ORIGINS[:8], (40, 40), 8)
    assert batch.shape == (8, 2, 40, 40)
    assert batch.array.flags.c_contiguous
    assert batch.array.base is not None
    assert not batch.array.flags.owndata
    assert batch.array.ctypes.data % 16 == 0
    torch = pytest.importorskip("torch")
    tensor = torch.from_dlpack(batch)
    assert tensor.data_ptr() == batch.array.ctypes.data
    tensor.zero_()
    [strided] = view.with_layout("YXC").iter_windows(ORIGINS[:8], (40, 40), 8, contiguous=False)
    assert strided.shape == (8, 40, 40, 2)
    assert not strided.array.flags.c_contiguous
    y, x = ORIGINS[3]
    np.testing.assert_array_equal(strided.array[3], np.moveaxis(pixels[0, 1, :, y : y + 40, x : x + 40], 0, -1))
    [copied] = view.with_layout("YXC").iter_windows(ORIGINS[:8], (40, 40), 8)
    assert copied.array.flags.c_contiguous
    np.testing.assert_array_equal(copied.array, strided.array)


def test_a_long_list_goes_out_in_parts(
    client: Client, served: RunningServer, local: TensorView, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several requests, one read: boundaries of batches and the shuffled order do not show them; nor do cuts."""
    monkeypatch.setattr(ome_tensor_client.remote, "_MOST_WINDOWS", 20)
    for arguments in ({}, {"shuffle": True, "seed": 4, "shard": (1, 2), "start": 3}, {"prefetch": 3}):
        wanted = list(local.iter_windows(PLACES, (2, 30, 30), 7, edge="pad", **arguments))
        found = list(client.tensor_view("image").iter_windows(PLACES, (2, 30, 30), 7, edge="pad", **arguments))
        same_batches(found, wanted)
        with Proxy(served.target, [20_000] * 2) as proxy, connect(proxy.target, retry_for=20) as cut:
            same_batches(list(cut.tensor_view("image").iter_windows(PLACES, (2, 30, 30), 7, edge="pad", **arguments)), wanted)
    running = client.tensor_view("image").iter_windows(PLACES, (2, 30, 30), 7, edge="pad", prefetch=1)
    next(running)
    running.close()  # type: ignore[attr-defined]


def test_more_windows_than_a_request_holds(client: Client, local: TensorView) -> None:
    """Two hundred thousand of them, unasked for."""
    origins = np.random.default_rng(0).integers(0, 230, (200_000, 2))
    place, seen = 0, 0
    for batch in client.tensor_view("image", t=0, z=0, c=0).iter_windows(origins, (2, 2), 50_000):
        assert batch.position == place
        np.testing.assert_array_equal(batch.origins[:, 2:], origins[place : place + len(batch)])
        place += len(batch)
        seen += batch.array.size
    assert (place, seen) == (200_000, 800_000)


def test_an_unseeded_shuffle_is_one_order(served: RunningServer, pixels: np.ndarray) -> None:
    """Also where it is cut."""
    with Proxy(served.target, [100_000] * 2) as proxy, connect(proxy.target, retry_for=20) as client:
        view = client.tensor_view("image", t=0, z=0)
        batches = list(view.iter_windows(ORIGINS, (40, 40), 8, shuffle=True))
        tiles = list(view.iter_batches(tile_size=(24, 27), batch_size=8, shuffle=True))
    assert sorted(number for batch in batches for number in batch.numbers.tolist()) == list(range(60))
    assert sorted(number for batch in tiles for number in batch.numbers.tolist()) == list(range(100))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The image of the local tests of windows, behind a server."""
    path = write_image(tmp_path_factory.mktemp("small") / "small.ome.parquet", random_pixels((3, 5, 2, 20, 24)))
    with running_server([path]) as server, connect(server.target) as client:
        yield client


@pytest.mark.parametrize("use,error,words,field", REFUSED.values(), ids=REFUSED)
def test_refusals_are_the_local_ones(small: Client, use: Any, error: type[OmeTensorError], words: str, field: str) -> None:
    """At the call, with the same text."""
    with pytest.raises(error) as here:
        use(TensorView(record_of(random_pixels((3, 5, 2, 20, 24)))))
    with pytest.raises(error) as there:
        use(small.tensor_view("small"))
    assert (str(there.value), there.value.field, there.value.value) == (str(here.value), here.value.field, here.value.value)


def test_empty_views_have_batches(client: Client) -> None:
    """As local ones do."""
    view = client.tensor_view("image", c=[], layout="TZCYX")
    assert [batch.shape for batch in view.iter_windows([(0, 0)] * 3, (5, 5), 2)] == [(2, 2, 3, 0, 5, 5), (1, 2, 3, 0, 5, 5)]
    assert list(client.tensor_view("image").iter_windows([], (5, 5), 2)) == []
    assert list(client.tensor_view("image").iter_batches(tile_size=(999, 999), batch_size=2)) == []


# --- limits and damage -----------------------------------------------------------------------------------------------------------


def test_limits(image_path: Path, local: TensorView) -> None:
    """A batch is one message; a tile that is a batch and larger than one comes in slabs."""
    with (
        running_server([image_path], max_message_bytes=100_000, batch_bytes=65536, max_tiles=50) as server,
        connect(server.target) as client,
    ):
        view = client.tensor_view("image", t=0, z=0)
        with pytest.raises(LimitExceeded, match=r"batch_size.* 64 .*268800 bytes.* 100000 bytes \(max_message_bytes\)"):
            next(view.iter_batches(tile_size=(40, 40), batch_size=64, edge="pad"))
        with pytest.raises(LimitExceeded, match=r"lists 60 windows.*at most 50"):
            next(view.iter_windows(ORIGINS, (4, 4), 8))
        wanted = local.iter_batches(tile_size=(200, 200), batch_size=1, edge="pad")
        found = client.tensor_view("image").iter_batches(tile_size=(200, 200), batch_size=1, edge="pad")
        same_batches(list(found), list(wanted))
        wanted = local.iter_windows([(-3, 100), (50, 60)], (200, 200), 1, edge="pad")
        found = client.tensor_view("image").iter_windows([(-3, 100), (50, 60)], (200, 200), 1, edge="pad")
        same_batches(list(found), list(wanted))


def test_a_damaged_tile_costs_its_batch(tmp_path: Path) -> None:
    """Batches before it are good; its own never comes, here or from a server."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    record = record_of(random_pixels((1, 6, 1, 8, 8)))
    record["chunks"][4]["pixel_bytes"] = b"short"
    path = tmp_path / "damaged.ome.parquet"
    pq.write_table(pa.table({"image": pa.array([record])}), path)
    with running_server([path]) as server, connect(server.target, retry_for=2) as client:
        for view in (TensorView(record), client.tensor_view("damaged")):
            batches = view.iter_batches(tile_size=(1, 8, 8), batch_size=3)
            assert next(batches).numbers.tolist() == [0, 1, 2]
            with pytest.raises(InvalidRecord):
                next(batches)


# --- on the wire -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(served: RunningServer) -> Iterator[RawClient]:
    """Calls by hand."""
    with raw_client(served.target) as client:
        yield client


def windows(**fields: Any) -> view_pb2.Tiling:
    """A cut into windows that may stick out."""
    return view_pb2.Tiling(windows=view_pb2.WindowsCut(**fields), edge="EDGE_POLICY_PAD", pad_value=5)  # type: ignore[arg-type]


COMPRESSIONS = {"none": pb.COMPRESSION_NONE, "lz4": pb.COMPRESSION_LZ4, "zstd": pb.COMPRESSION_ZSTD}


@pytest.mark.parametrize("message_bytes", [0, 64 << 10], ids=["tiles", "slabs"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_plain_arrow_reads_windows(raw: RawClient, pixels: np.ndarray, compression: str, message_bytes: int) -> None:
    """By pyarrow alone, compressed or not, whole or in slabs: a foreign client needs the contract only. The server orders for it."""
    cut = windows(t=2, z=2, h=100, w=100, origin_t=[0] * 3, origin_z=[0, 1, 2], origin_y=[-10, 7, 200], origin_x=[0, -1, 250])
    order = view_pb2.Order(shuffle=True, seed=1)
    messages = raw.read(request(tiling=cut, order=order, compression=COMPRESSIONS[compression], max_message_bytes=message_bytes))
    assert pb.ReadTilesResponse.FromString(messages[0]).header.slabs == bool(message_bytes)
    whole: dict[int, list[np.ndarray]] = {}
    for at, block in rows_of(read_arrow(messages)):
        whole.setdefault(at["tile"], []).append(block.reshape(-1))
        assert (at["z"], at["y"], at["x"]) == [(0, -10, 0), (1, 7, -1), (2, 200, 250)][at["tile"]]
        assert (at["valid_z"], at["valid_h"], at["valid_w"]) == [(2, 90, 100), (2, 100, 99), (1, 40, 20)][at["tile"]]
    assert list(whole) == [1, 2, 0]
    padded = np.full((2, 4, 2, 400, 460), 5, np.uint16)
    padded[:, :3, :, 100:340, 100:370] = pixels
    for number, (z, y, x) in enumerate([(0, -10, 0), (1, 7, -1), (2, 200, 250)]):
        wanted = padded[:, z : z + 2, :, 100 + y : 200 + y, 100 + x : 200 + x]
        np.testing.assert_array_equal(np.concatenate(whole[number]).reshape(wanted.shape), wanted)


def test_windows_outside_are_refused_with_status(raw: RawClient) -> None:
    """A foreign client is held to what ours checks before it sends."""
    for cut in (
        view_pb2.Tiling(windows=view_pb2.WindowsCut(h=9, w=9, origin_y=[0, 239], origin_x=[0, 0])),
        windows(h=9, w=9, origin_y=[0, 999], origin_x=[0, 0]),
    ):
        for call in (
            lambda cut=cut: raw.read(request(tiling=cut)),
            lambda cut=cut: raw.call("ResolveView", pb.ResolveViewRequest(key="image", tiling=cut)),
        ):
            with pytest.raises(grpc.RpcError, match="window 1 at") as caught:
                call()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert reason_of(caught.value)[0] == "INVALID_SELECTION"


def test_a_server_that_ignores_the_batch_size_is_caught(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on batches of another size than asked for would go unnoticed for long."""

    class Forgetful(ome_tensor_client.remote.TileStream):
        def __init__(self, connection: Any, asked: pb.ReadTilesRequest, expected: int) -> None:
            asked.tiles_per_batch = 3
            super().__init__(connection, asked, expected)

    monkeypatch.setattr(ome_tensor_client.remote, "TileStream", Forgetful)
    with pytest.raises(BrokenStream, match="too few tiles"):
        list(client.tensor_view("image").iter_batches(tile_size=(48, 54), batch_size=4))
