"""One host: pixels that are mapped from the server's store, exactly those of the wire, and never another file's or another version's."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.integration.images import expected_tile, random_pixels, write_image, write_images
from tests.integration.processes import ServerProcess, run_script, wait_until
from tests.integration.proxy import Proxy
from tests.integration.raw import raw_client
from tests.integration.relay import relay

from ome_tensor import DatasetChanged, DatasetNotFound, ImageNotFound, InvalidArgument, NotSupported
from ome_tensor_client import Client, connect
from ome_tensor_proto.host import host_proof, is_host_proof
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_server.finding import find_sources
from ome_tensor_server.policy import Policy
from ome_tensor_server.principals import Caller, Principal
from ome_tensor_server.scopes import Action, parse_scopes
from ome_tensor_server.settings import Settings
from ome_tensor_server.testing import RunningServer, running_server

SHAPE = (2, 3, 2, 60, 70)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The served folder: one image."""
    path = tmp_path / "data"
    path.mkdir()
    write_image(path / "image.ome.parquet", random_pixels(SHAPE))
    return path


@pytest.fixture
def stored(folder: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server with a store."""
    with running_server([folder], store=str(tmp_path / "store")) as server:
        yield server


@pytest.fixture
def mapped(stored: RunningServer) -> Iterator[Client]:
    """A client that would rather fail than have pixels sent."""
    with connect(stored.target, transport="mapped") as client:
        yield client


def reload(server: RunningServer, folder: Path) -> None:
    """Have the server look at its sources again, as a restart would, without a pause."""
    server.server.load(find_sources([folder]))


def calls(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The methods that were called."""
    return [record.msg.values["method"] for record in caplog.records if getattr(record.msg, "event", "") == "call"]


READS: dict[str, Callable[[Any], list[np.ndarray]]] = {
    "whole": lambda view: [view.to_numpy()],
    "narrower": lambda view: [view[0, 1:3, 0, 10:30].to_numpy()],
    "tiles": lambda view: [tile.array for tile in view.iter_tiles(tile_size=(32, 32), shuffle=True, seed=3, prefetch=2)],
    "boxes": lambda view: [np.array(np.from_dlpack(tile)) for tile in view.iter_tiles_3d(tile_size=(2, 32, 32), prefetch=1)],
    "batches": lambda view: [batch.array for batch in view.iter_batches(tile_size=(20, 20), batch_size=4, edge="pad")],
    "windows": lambda view: [b.array for b in view.iter_windows([(3, 4), (40, 50)], (16, 16), batch_size=2, edge="pad")],
    "times": lambda view: [np.array(np.from_dlpack(part)) for part in view.iter_dlpack(batch_size=1, mode="numpy")],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_mapped_read_is_the_wires(stored: RunningServer, mapped: Client, read: Callable[[Any], list[np.ndarray]]) -> None:
    """Value for value, in the same order."""
    with connect(stored.target, transport="tcp") as wire:
        wanted = read(wire.tensor_view("image", layout="TZCYX"))
        found = read(mapped.tensor_view("image", layout="TZCYX"))
        assert (wire.transport, mapped.transport) == ("tcp", "mapped")
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_no_bytes_move(stored: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """By itself, without being asked for: one small call for a dataset, however many views and reads."""
    caplog.set_level(logging.INFO, "ome_tensor_server")
    with connect(stored.target) as client:
        assert (client.transport, client.transports) == ("undecided", {})
        for z in range(3):
            view = client.tensor_view("image", z=z, layout="TZCYX")
            np.testing.assert_array_equal(view.to_numpy(), random_pixels(SHAPE)[:, z : z + 1])
            assert sum(1 for _ in view.iter_tiles(tile_size=(16, 16))) == 20
        assert client.transport == client.transports["image"].kind == "mapped"
        assert client.transports["image"].reason == ""
    assert calls(caplog) == ["MapDataset"]


def test_a_warm_read_is_one_round_trip(stored: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """Over the wire: what is known of the image is not asked for again."""
    with connect(stored.target, transport="tcp") as client:
        client.tensor_view("image", t=0, z=0, c=0).to_numpy()
        caplog.set_level(logging.INFO, "ome_tensor_server")
        for z in range(3):
            found = client.tensor_view("image", t=1, z=z, c=1, roi=(5, 6, 32, 32), layout="YX").to_numpy()
            np.testing.assert_array_equal(found, random_pixels(SHAPE)[1, z, 1, 6:38, 5:37])
    assert calls(caplog) == ["ReadTiles"] * 3


# --- when it cannot be -----------------------------------------------------------------------------------------------------------


def refused(target: str, words: str, **options: Any) -> None:
    """Pixels are sent then, which says why; who insists on a mapping is told so."""
    with connect(target, **options) as client:
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE))
        assert client.transport == "tcp"
        assert words in client.transports["image"].reason
    with connect(target, transport="mapped", **options) as client:
        with pytest.raises(NotSupported, match="cannot be mapped") as caught:
            client.tensor_view("image").to_numpy()
        assert words in str(caught.value)
        assert (caught.value.field, caught.value.value) == ("transport", "mapped")


def test_a_server_without_a_store(folder: Path) -> None:
    """Its pixels are in its own memory."""
    with running_server([folder], store="none") as server:
        refused(server.target, "no file of it")


def test_a_server_that_does_not_allow_it(folder: Path, tmp_path: Path) -> None:
    """``--mapping off``."""
    with running_server([folder], store=str(tmp_path / "store"), mapping="off") as server:
        refused(server.target, "does not allow it")


def test_another_file_at_that_path(stored: RunningServer, tmp_path: Path) -> None:
    """In another container's file system, say: the very same bytes will do no more than others."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "store", elsewhere)
    refused(stored.target, "is another file here than at the server", store=str(elsewhere))


def test_no_file_at_that_path(stored: RunningServer, tmp_path: Path) -> None:
    """Another container that shares the kernel, and not the folder."""
    refused(stored.target, "No such file", store=str(tmp_path / "nowhere"))


def test_the_store_under_another_path(stored: RunningServer, tmp_path: Path) -> None:
    """Two containers may have one volume in two places."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(tmp_path / "store")
    with connect(stored.target, transport="mapped", store=str(elsewhere)) as client:
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE))


NONCE = bytes(range(32))
PROOF = host_proof("client", NONCE)
WRONG_PROOFS = {
    "none": (NONCE, b""),
    "short": (NONCE, PROOF[:-1]),
    "zeros": (NONCE, bytes(32)),
    "the server's": (NONCE, host_proof("server", NONCE)),
    "another nonce's": (NONCE[::-1], PROOF),
    "without a nonce": (b"", PROOF),
}


@pytest.mark.parametrize("nonce,proof", WRONG_PROOFS.values(), ids=WRONG_PROOFS)
def test_a_client_that_proves_nothing(stored: RunningServer, nonce: bytes, proof: bytes) -> None:
    """It is told no path, neither an inode."""
    with raw_client(stored.target) as raw:
        answer = raw.call("MapDataset", pb.MapDatasetRequest(dataset="image", nonce=nonce, host_proof=proof))
        assert answer == pb.MapDatasetResponse(refusal=pb.MAP_REFUSAL_OTHER_HOST)
        good = raw.call("MapDataset", pb.MapDatasetRequest(dataset="image", nonce=NONCE, host_proof=PROOF))
        assert not good.refusal
        assert os.stat(good.path).st_ino == good.inode
        assert is_host_proof("server", NONCE, good.host_proof)


Edit = Callable[[pb.MapDatasetResponse], None]


@contextmanager
def between(truth: str, edit: Edit) -> Iterator[str]:
    """A server that passes all calls on to a true one, and changes its answers about mapping."""

    def edited(data: bytes) -> bytes:
        answer = pb.MapDatasetResponse.FromString(data)
        edit(answer)
        return answer.SerializeToString()

    with relay(truth, {"MapDataset": edited}) as target:
        yield target


def test_a_server_that_proves_nothing(stored: RunningServer) -> None:
    """It may name any path; nothing is opened."""
    with between(stored.target, lambda answer: answer.ClearField("host_proof")) as target:
        refused(target, "has not shown that it is on this host")


def test_a_path_that_is_no_file(stored: RunningServer, tmp_path: Path) -> None:
    """Opening a FIFO waits for ever for somebody to write into it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    there = os.stat(fifo)

    def edit(answer: pb.MapDatasetResponse) -> None:
        answer.path, answer.inode, answer.size, answer.modified_ns = str(fifo), there.st_ino, 0, there.st_mtime_ns

    with between(stored.target, edit) as target:
        refused(target, "is another file here")


def test_a_mapping_is_confirmed(folder: Path, tmp_path: Path) -> None:
    """The server may withdraw it, or serve another dataset by that name, although the file is still there: the next look notices."""
    now = [0.0]
    withdrawn: list[bool] = []

    def edit(answer: pb.MapDatasetResponse) -> None:
        if withdrawn:
            answer.CopyFrom(pb.MapDatasetResponse(refusal=pb.MAP_REFUSAL_NOT_ALLOWED))

    with (
        running_server([folder], store=str(tmp_path / "store")) as server,
        between(server.target, edit) as target,
        connect(target) as client,
    ):
        mapped = client._connection.mapped
        mapped._clock = lambda: now[0]
        for seconds, kind in ((0, "mapped"), (1, "mapped"), (3, "tcp"), (30, "tcp")):
            now[0] = seconds
            np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE))
            assert client.transport == kind
            withdrawn.append(True)
        withdrawn.clear()
        now[0] = 70
        client.tensor_view("image").to_numpy()
        assert client.transport == "mapped"


def test_another_server_on_that_address(folder: Path, tmp_path: Path) -> None:
    """The old dataset's file is still in the store; its name means another file now."""
    other = tmp_path / "other"
    other.mkdir()
    write_image(other / "image.ome.parquet", random_pixels(SHAPE, seed=8))
    store = str(tmp_path / "store")
    with running_server([folder], store=store) as server:
        target = server.target
        client = connect(target, transport="mapped", retry_for=20)
        client._connection.mapped._clock = lambda: now[0]
        now = [0.0]
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE))
    now[0] = 3
    # While nobody is there, what is mapped is good.
    np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE))
    with running_server([other], store=store, listen=target), client:

        def is_new() -> bool:
            # gRPC itself may still be waiting before it connects again.
            now[0] += 10
            found = client.tensor_view("image", layout="TZCYX").to_numpy()
            return np.array_equal(found, random_pixels(SHAPE, seed=8))

        wait_until(is_new, "the new server's pixels")
        assert client.transport == "mapped"


def test_names_and_keys_that_are_wrong(mapped: Client) -> None:
    """The same errors as of the wire."""
    with pytest.raises(DatasetNotFound, match="nothing"):
        mapped.tensor_view("nothing").to_numpy()
    with pytest.raises(ImageNotFound, match="no image at row 9"):
        mapped.tensor_view("image/9").to_numpy()
    with pytest.raises(ImageNotFound, match="no image column 'mask'"):
        mapped.tensor_view("image/mask/0").to_numpy()
    with pytest.raises(InvalidArgument, match="t index 5 out of range"):
        mapped.tensor_view("image", t=5).to_numpy()
    with pytest.raises(InvalidArgument, match="transport"):
        connect("localhost:1", transport="pigeon")
    with pytest.raises(InvalidArgument, match="store"):
        connect("localhost:1", store=7)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_file_permissions_decide(folder: Path) -> None:
    """Another user has pixels sent; once an operator lets that user into the store, they are mapped."""
    # Not below pytest's own folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        store = Path(above, "store")
        with running_server([folder], store=str(store)) as server:
            assert "refused: tcp" in (said := run_script("stranger_client.py", server.target))
            assert "Permission denied" in said
        store.chmod(0o755)
        next(store.glob("*.arrow")).unlink()
        with running_server([folder], store=str(store)) as server:
            assert run_script("stranger_client.py", server.target) == "mapped\n"


def test_what_the_store_lets_others_do(stored: RunningServer, tmp_path: Path) -> None:
    """Nothing by default; never to write."""
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in (tmp_path / "store").iterdir()}
    assert modes == {".arrow": 0o600, ".json": 0o600, "": 0o600}
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "mapping,authenticates,allowed", [("auto", False, True), ("auto", True, False), ("on", True, True), ("off", False, False)]
)
def test_the_policy(mapping: str, authenticates: bool, allowed: bool) -> None:
    """A server that wants to know its callers hands out whole files only where it is told to."""
    policy = Policy(Settings(mapping=mapping, tokens="tokens.json" if authenticates else ""))
    caller = Caller("ipv4:127.0.0.1:1", Principal("somebody", parse_scopes(["read:*"])))
    assert policy.permits(caller, Action.MAP, "image") is allowed
    assert policy.permits(caller, Action.READ, "image")


# --- memory ----------------------------------------------------------------------------------------------------------------------


def test_a_write_stays_in_the_process(stored: RunningServer, tmp_path: Path) -> None:
    """Through every address that a client has of a mapped dataset: neither the process dies, nor does the server see it."""
    (file,) = (tmp_path / "store").glob("*.arrow")
    before = file.read_bytes()
    assert "written" in run_script("writing_client.py", stored.target)
    assert file.read_bytes() == before
    with connect(stored.target, transport="tcp") as client:
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("state", ["used", "midstream"])
def test_a_mapped_client_in_another_process(
    stored: RunningServer, tmp_path: Path, context: str, state: str, image_path: Path, pixels: np.ndarray
) -> None:
    """Forked, or pickled and sent, in use."""
    np.save(tmp_path / "pixels.npy", pixels)
    with running_server([image_path], store=str(tmp_path / "store2")) as server:
        run_script("fork_client.py", server.target, tmp_path / "pixels.npy", context, state, "mapped")


# --- replaced, evicted -----------------------------------------------------------------------------------------------------------


def test_a_dataset_that_is_replaced(stored: RunningServer, mapped: Client, folder: Path) -> None:
    """A read that has begun goes on with what it began with; the next view sees the new one, whatever its size."""
    old, new = random_pixels(SHAPE), random_pixels((1, 2, 1, 40, 30), np.float32, seed=9)
    view = mapped.tensor_view("image", layout="TZCYX")
    tiles = view.iter_tiles(tile_size=(16, 16), prefetch=1)
    begun = [next(tiles)]
    write_image(folder / "image.ome.parquet", new)
    reload(stored, folder)
    for tile in [*begun, *tiles]:
        np.testing.assert_array_equal(tile.array, expected_tile(old, tile), strict=True)
    np.testing.assert_array_equal(view.to_numpy(), old, strict=True)
    np.testing.assert_array_equal(mapped.tensor_view("image", layout="TZCYX").to_numpy(), new, strict=True)
    assert mapped.transport == "mapped"


def test_a_file_that_is_evicted(stored: RunningServer, folder: Path, tmp_path: Path) -> None:
    """The server still has it mapped: pixels are sent, until there is a file again."""
    pixels = random_pixels(SHAPE)
    with connect(stored.target) as client:
        old = client.tensor_view("image", layout="TZCYX")
        np.testing.assert_array_equal(old.to_numpy(), pixels)
        next((tmp_path / "store").glob("*.arrow")).unlink()
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), pixels)
        assert client.transports["image"].kind == "tcp"
        np.testing.assert_array_equal(old[0].to_numpy(), pixels[0])
        reload(stored, folder)
    with connect(stored.target) as client:
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), pixels)
        assert client.transport == "mapped"


def test_a_source_that_is_changed_in_place(tmp_path: Path) -> None:
    """An Arrow file is served as it lies; where somebody has written into it, it is no more what the server told."""
    path = tmp_path / "image.arrow"
    table = pq.read_table(write_image(tmp_path / "made.parquet", random_pixels(SHAPE)))
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    with running_server([path], store=str(tmp_path / "store")) as server, connect(server.target, transport="mapped") as client:
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE))
        os.utime(path, ns=(1, 1))
        with pytest.raises(NotSupported, match="no file of it"):
            client.tensor_view("image", z=0).to_numpy()


def test_remembered_images_and_new_versions(folder: Path) -> None:
    """Over the wire: a new view reads the new version, of whatever size, although the client remembers the old one."""
    with running_server([folder], store="none") as server, connect(server.target, transport="tcp") as client:
        begun = client.tensor_view("image", layout="TZCYX")
        assert begun.shape == SHAPE
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE))
        write_image(folder / "image.ome.parquet", random_pixels(SHAPE, seed=5))
        reload(server, folder)
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE, seed=5))
        # A view that has told its shape never gives pixels of another version.
        for read in (lambda: list(begun.iter_tiles(tile_size=(16, 16))), begun.to_numpy):
            with pytest.raises(DatasetChanged):
                read()
        smaller = random_pixels((1, 1, 1, 20, 20), seed=6)
        write_image(folder / "image.ome.parquet", smaller)
        reload(server, folder)
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), smaller)
        with pytest.raises(DatasetChanged):
            begun.to_numpy()


def test_many_columns_and_rows(tmp_path: Path) -> None:
    """Keys mean the same, whoever looks them up; a row without an image is one here too."""
    images = [random_pixels((1, 1, 2, 30, 20), seed=1), None, random_pixels((1, 2, 1, 9, 11), np.int8, seed=2)]
    write_images(tmp_path / "cells.ome.parquet", images)
    with (
        running_server([tmp_path / "cells.ome.parquet"], store=str(tmp_path / "store")) as server,
        connect(server.target, transport="mapped") as client,
    ):
        for key, image in (("cells/0", images[0]), ("cells/image/2", images[2])):
            np.testing.assert_array_equal(client.tensor_view(key, layout="TZCYX").to_numpy(), image, strict=True)
        with pytest.raises(ImageNotFound, match="holds no image"):
            client.tensor_view("cells/1").to_numpy()


# --- through other servers -------------------------------------------------------------------------------------------------------


def test_with_workers(start_server: Callable[..., ServerProcess], folder: Path, tmp_path: Path) -> None:
    """Any worker tells of the one file."""
    server = start_server(folder, "--workers", "2", "--store", str(tmp_path / "store")).wait_serving()
    for _ in range(4):
        with connect(server.target, transport="mapped") as client:
            np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE))


def test_a_server_that_goes_away(stored: RunningServer) -> None:
    """What is mapped needs no server; the first look at a dataset does."""
    with Proxy(stored.target) as proxy:
        client = connect(proxy.target, transport="mapped", retry_for=0)
        client.tensor_view("image").to_numpy()
    with client:
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), random_pixels(SHAPE))
