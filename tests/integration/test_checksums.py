"""Bytes that are damaged on their way: never taken for pixels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tests.integration.images import random_pixels
from tests.integration.network import Network, Trouble
from tests.integration.raw import RawClient, raw_client
from tests.integration.relay import relay
from xxhash import xxh3_64_intdigest

from ome_tensor import (
    BrokenStream,
    DatasetChanged,
    DatasetNotFound,
    ImageNotFound,
    InvalidArgument,
    LimitExceeded,
    NotSupported,
    OmeTensorError,
)
from ome_tensor.listing import ImageInfo
from ome_tensor_client import Client, connect
from ome_tensor_proto.reader import BatchReader
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_server.testing import RunningServer, running_server

XXH3 = pb.CHECKSUM_KIND_XXH3_64


@pytest.fixture
def raw(served: RunningServer) -> Iterator[RawClient]:
    with raw_client(served.target) as client:
        yield client


@pytest.mark.parametrize("compression", [pb.COMPRESSION_NONE, pb.COMPRESSION_LZ4])
@pytest.mark.parametrize("max_message_bytes", [0, 70_000])
def test_each_message_says_what_its_payload_is(raw: RawClient, compression: int, max_message_bytes: int) -> None:
    request = pb.ReadTilesRequest(
        keys=["image"],
        checksum=XXH3,
        compression=compression,  # type: ignore[arg-type]
        max_message_bytes=max_message_bytes,
    )
    messages = [pb.ReadTilesResponse.FromString(message) for message in raw.read(request)]
    assert messages[0].header.request_xxh3 == xxh3_64_intdigest(request.SerializeToString())
    for message in messages:
        assert message.xxh3 == xxh3_64_intdigest(message.payload)


def test_nothing_is_said_where_nobody_asks(raw: RawClient) -> None:
    messages = [pb.ReadTilesResponse.FromString(message) for message in raw.read(pb.ReadTilesRequest(keys=["image"]))]
    assert {message.xxh3 for message in messages} == {0}
    assert messages[0].header.request_xxh3 == 0


def test_every_flipped_bit_of_a_payload_is_noticed(raw: RawClient) -> None:
    request = pb.ReadTilesRequest(keys=["image"], checksum=XXH3, max_message_bytes=70_000)
    data = request.SerializeToString()
    first = raw.read(data)[0]
    whole = pb.ReadTilesResponse.FromString(first)
    at = first.index(whole.payload)
    chance = random.Random(5)
    for place in chance.sample(range(at, len(first)), 300):
        damaged = bytearray(first)
        damaged[place] ^= 1 << chance.randrange(8)
        with pytest.raises(BrokenStream, match="checksum"):
            BatchReader(request=data).feed(bytes(damaged))
    assert BatchReader(request=data).feed(first)


def test_the_answer_to_another_request_is_noticed(raw: RawClient) -> None:
    """One that was damaged on its way to the server may be a good request for other tiles."""
    request = pb.ReadTilesRequest(keys=["image"], checksum=XXH3)
    first = raw.read(request)[0]
    request.order.start = 1
    with pytest.raises(BrokenStream, match="request"):
        BatchReader(request=request.SerializeToString()).feed(first)


@pytest.mark.parametrize("seed", range(3))
def test_no_damaged_tile_arrives(served: RunningServer, pixels: np.ndarray, seed: int) -> None:
    """A network that damages: every tile that comes is right, and what was damaged is asked for again."""
    right = 0
    with (
        Network(served.target, Trouble(damage_every=300_000), seed=seed) as network,
        connect(network.target, checksum=True, transport="tcp", timeout=0.4, retry_for=1.5) as client,
    ):
        for attempt in range(25):
            z = attempt % pixels.shape[1]
            try:
                for c in range(pixels.shape[2]):
                    for tile in client.tensor_view("image", t=0, z=z, c=c, layout="YX").iter_tiles(tile_size=(80, 90)):
                        y, x = tile.origin[2:]
                        np.testing.assert_array_equal(tile.array, pixels[0, z, c, y : y + 80, x : x + 90])
                        right += 1
            except OmeTensorError:
                # Damaged again and again; or a frame's length, and the connection hangs.
                continue
            if network.troubles >= 4 and right:
                break
        assert network.troubles >= 3
        assert right > 0


def flipped(data: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(data)
    damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def sometimes(chance: random.Random, part: float) -> Callable[[bytes], bytes]:
    return lambda data: flipped(data, chance) if data and chance.random() < part else data


def test_a_damaged_request_is_never_answered_for_another(served: RunningServer, pixels: np.ndarray) -> None:
    """One flipped bit makes tile 4 of tile 5, or z=0 of z=1: a good request, whose answer is right, for something else."""
    chance = random.Random(3)
    right = 0
    damage = sometimes(chance, 0.5)
    with (
        relay(served.target, {}, {"ReadTiles": damage}) as network,
        connect(network, checksum=True, transport="tcp", timeout=5, retry_for=5) as client,
    ):
        for attempt in range(60):
            z, y, x = attempt % 3, attempt * 3 % 160, attempt * 5 % 170
            try:
                found = client.tensor_view("image", t=0, z=z, c=0, roi=(x, y, 70, 60), layout="YX").to_numpy()
            except (InvalidArgument, LimitExceeded, DatasetNotFound, ImageNotFound, DatasetChanged, NotSupported):
                continue  # No good request any more: said, and not read.
            np.testing.assert_array_equal(found, pixels[0, z, 0, y : y + 60, x : x + 70])
            right += 1
    assert 15 < right < 60


@pytest.mark.slow
def test_damaged_answers_of_other_calls_are_asked_for_again(served: RunningServer) -> None:
    """Shapes, keys and metadata decide what is read, and what it is labelled as."""
    with connect(served.target) as plain:
        wanted, rows = plain.image("image"), plain.dataset("image").metadata()
    damage = sometimes(random.Random(4), 0.3)
    changes = {
        "ResolveView": damage,
        "GetDataset": damage,
        "SelectImages": lambda messages: list(map(damage, messages)),
    }
    with relay(served.target, changes, {"ResolveView": damage}) as network:
        with connect(network, checksum=True, timeout=5, retry_for=10) as client:
            for _ in range(30):
                with suppress(InvalidArgument, LimitExceeded, DatasetNotFound, ImageNotFound, NotSupported):
                    assert client.image("image") == wanted
                assert client.dataset("image").metadata().equals(rows)
        with connect(network, checksum=False, timeout=5, retry_for=10) as client:
            # So that the test can fail: without checksums something else does come.
            assert any(differs(client, wanted) for _ in range(200))


def differs(client: Client, wanted: ImageInfo) -> bool:
    try:
        return client.image("image") != wanted
    except OmeTensorError:
        return False


def test_a_damaged_upload_is_not_kept(tmp_path: Path) -> None:
    pixels = random_pixels((1, 1, 1, 500, 500))
    with running_server([], uploads=str(tmp_path / "uploads")) as server, connect(server.target) as plain:
        for seed in range(6):
            with (
                Network(server.target, requests=Trouble(damage_every=200_000, quiet=10_000), seed=seed) as network,
                connect(network.target, timeout=2, retry_for=0) as client,
            ):
                try:
                    client.upload("image", pixels, replace=True)
                except OmeTensorError:
                    assert network.troubles
                for dataset in plain.datasets():
                    found = plain.tensor_view(dataset.name, layout="TZCYX").to_numpy()
                    np.testing.assert_array_equal(found, pixels)
