"""The life of datasets: loaded when they are first used, within a memory limit; registered, refreshed, watched, removed."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from tests.integration.images import random_pixels, record_of, write_image
from tests.integration.processes import ServerProcess, wait_until

from ome_tensor import (
    Cancelled,
    DatasetNotFound,
    InvalidArgument,
    InvalidRecord,
    LimitExceeded,
    NotAllowed,
    NotSupported,
    Overloaded,
)
from ome_tensor.listing import DatasetState
from ome_tensor_client import connect
from ome_tensor_server import room
from ome_tensor_server.testing import running_server

#: 1.5 MB.
SHAPE = (1, 2, 3, 256, 500)

LOADED, NOT_LOADED, IN_PLACE = DatasetState.LOADED, DatasetState.NOT_LOADED, DatasetState.IN_PLACE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files, ``a``, ``b`` and ``c``, of 1.5 MB each."""
    made = tmp_path / "data"
    made.mkdir()
    for seed, name in enumerate("abc"):
        write_image(made / f"{name}.ome.parquet", random_pixels(SHAPE, seed=seed))
    return made


def test_a_dataset_is_loaded_when_it_is_first_used(folder: Path) -> None:
    with running_server([folder], preload=False) as server, connect(server.target) as client:
        before = client.dataset("a")
        assert (before.state, before.version, before.row_count, before.image_columns) == (NOT_LOADED, "", 1, ("image",))
        assert 1_500_000 < before.estimated_bytes < 2_000_000
        assert before.format == "parquet"
        np.testing.assert_array_equal(client.tensor_view("a").to_numpy(), random_pixels(SHAPE))
        states = {dataset.name: dataset.state for dataset in client.datasets()}
        assert states == {"a": LOADED, "b": NOT_LOADED, "c": NOT_LOADED}
        after = client.dataset("a")
        assert (after.image_count, len(after.version)) == (1, 16)
        assert after.resident_bytes > 1_500_000


@pytest.mark.parametrize("store", ["none", "store"])
def test_the_least_recently_used_leaves_for_another(folder: Path, tmp_path: Path, store: str) -> None:
    """Room for two of three, on disk too: what is mapped is memory."""
    place = "none" if store == "none" else str(tmp_path / store)
    with (
        running_server([folder], preload=False, store=place, memory_limit="5M", decode_cache_bytes=1 << 20) as server,
        connect(server.target, transport="tcp") as client,
    ):
        for name, seed in (("a", 0), ("b", 1), ("a", 0), ("c", 2), ("a", 0), ("b", 1)):
            found = client.tensor_view(name, layout="TZCYX").to_numpy()
            np.testing.assert_array_equal(found, random_pixels(SHAPE, seed=seed), strict=True)
        states = {dataset.name: dataset.state for dataset in client.datasets()}
        assert states == {"a": LOADED, "b": LOADED, "c": NOT_LOADED}


def test_what_a_read_uses_does_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reads hold all there is room for: the third is told so, with the sizes, and is served once one of them ends."""
    monkeypatch.setattr(room, "_PATIENCE", 0.3)
    # More than the buffers between server and client swallow.
    large = (1, 4, 3, 1024, 1024)
    for seed, name in enumerate("abc"):
        write_image(tmp_path / f"{name}.ome.parquet", random_pixels(large, seed=seed))
    with (
        running_server([tmp_path], preload=False, memory_limit="64M", decode_cache_bytes=1 << 20) as server,
        connect(server.target) as client,
        connect(server.target, retry_for=0.1) as other,
    ):
        reads = [client.tensor_view(name).iter_tiles(tile_size=(64, 64)) for name in "ab"]
        begun = [next(read) for read in reads]
        with pytest.raises(Overloaded, match=r"takes 24 MiB.*keeps in memory.*are in use"):
            other.tensor_view("c").to_numpy()
        assert {d.name for d in client.datasets() if d.state is LOADED} == {"a", "b"}
        for seed, (first, read) in enumerate(zip(begun, reads, strict=True)):
            pixels = random_pixels(large, seed=seed)
            for tile in [first, *read]:
                _, _, y, x = tile.origin
                np.testing.assert_array_equal(tile.array, pixels[0, :, :, y : y + 64, x : x + 64][None])
        np.testing.assert_array_equal(other.tensor_view("c").to_numpy(), random_pixels(large, seed=2))


def test_many_askers_share_one_load(folder: Path, server_log: pytest.LogCaptureFixture) -> None:
    with running_server([folder / "a.ome.parquet"], preload=False) as server, futures.ThreadPoolExecutor(16) as threads:

        def read(_: int) -> np.ndarray:
            with connect(server.target) as client:
                return client.tensor_view("a", z=0, c=0).to_numpy()

        for found in threads.map(read, range(16)):
            np.testing.assert_array_equal(found, random_pixels(SHAPE)[0, 0, :1])
    assert sum(record.getMessage().startswith("loaded") for record in server_log.records) == 1


def big_npy(path: Path, megabytes: int) -> Path:
    """A file of zeros that takes no room."""
    header = np.lib.format.open_memmap(path, "w+", np.uint16, (1, megabytes * 512, 1024))
    header.flush()
    return path


@pytest.mark.slow
def test_a_load_shows_its_progress_and_can_be_cancelled(tmp_path: Path, folder: Path) -> None:
    """Other datasets are read meanwhile."""
    path = big_npy(tmp_path / "big.npy", 1500)
    with (
        running_server([path, folder], preload=False, memory_limit="8G", load_seconds=0.1) as server,
        connect(server.target) as client,
    ):
        said: list[float] = []
        failures: list[Exception] = []

        def load() -> None:
            try:
                client.admin.load("big", lambda info: said.append(info.progress))
            except Exception as error:
                failures.append(error)

        waiting = threading.Thread(target=load)
        waiting.start()
        wait_until(lambda: said and said[-1] > 0, "the load says how it goes")
        # However busy this machine is, it is not through before all that follows has been looked at.
        for process in psutil.Process().children():
            if any("big.npy" in mapped.path for mapped in process.memory_maps()):
                process.suspend()
        assert client.dataset("big").state is DatasetState.LOADING
        np.testing.assert_array_equal(client.tensor_view("a").to_numpy(), random_pixels(SHAPE))
        assert client.admin.cancel_load("big")
        waiting.join(20)
        assert [type(error) for error in failures] == [Cancelled]
        assert said == sorted(said)
        assert said[-1] < 1
        wait_until(lambda: client.dataset("big").state is NOT_LOADED, "it is as it was")
        assert not client.admin.cancel_load("big")


def test_what_is_larger_than_memory_is_served_in_place(tmp_path: Path) -> None:
    pixels = random_pixels((2, 3, 2, 300, 400), np.int16)
    np.save(tmp_path / "large.npy", pixels)
    with (
        running_server([tmp_path / "large.npy"], memory_limit="1M", decode_cache_bytes=1 << 18) as server,
        connect(server.target) as client,
    ):
        info = client.dataset("large")
        assert (info.state, info.image_count, info.resident_bytes) == (IN_PLACE, 1, 0)
        np.testing.assert_array_equal(client.tensor_view("large").to_numpy(), pixels, strict=True)
        found = client.tensor_view("large", t=[1, 0, 1], z=2, c=1, roi=(17, 33, 100, 200), layout="TYX").to_numpy()
        np.testing.assert_array_equal(found, pixels[[1, 0, 1], 2, 1, 33:233, 17:117])
        # Written to, it is no more what the version says.
        with (tmp_path / "large.npy").open("r+b") as file:
            file.seek(-2, 2)
            file.write(b"\0\0")
        with pytest.raises(InvalidRecord, match="changed while it is served"):
            client.tensor_view("large").to_numpy()


def test_what_is_too_large_and_cannot_be_served_in_place_is_refused_with_sizes(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([record_of(random_pixels(SHAPE))])})
    with pa.ipc.new_stream(tmp_path / "large.arrows", table.schema) as writer:
        writer.write_table(table)
    with (
        running_server([tmp_path / "large.arrows"], preload=False, memory_limit="1M") as server,
        connect(server.target, retry_for=0.1) as client,
    ):
        for _ in range(2):
            with pytest.raises(LimitExceeded, match=r"takes 1\.\d+ MiB, and this server keeps at most 768 KiB in memory"):
                client.tensor_view("large").to_numpy()
        info = client.dataset("large")
        assert info.state is DatasetState.FAILED
        assert "768 KiB" in info.problem


def test_a_refreshed_dataset_replaces_the_old_one_and_running_reads_finish(folder: Path) -> None:
    old, new = random_pixels(SHAPE), random_pixels((1, 1, 1, 70, 80), seed=9)
    with (
        running_server([folder], batch_bytes=4096) as server,
        connect(server.target, message_bytes=4096) as client,
    ):
        version = client.dataset("a").version
        assert client.admin.refresh("a")[1] is False
        read = client.tensor_view("a").iter_tiles(tile_size=(64, 64))
        first = next(read)
        write_image(folder / "new", new)
        (folder / "new").replace(folder / "a.ome.parquet")
        info, changed = client.admin.refresh("a")
        assert changed
        assert info.version != version
        for tile in [first, *read]:
            _, _, y, x = tile.origin
            np.testing.assert_array_equal(tile.array, old[0, :, :, y : y + 64, x : x + 64][None])
        np.testing.assert_array_equal(client.tensor_view("a", layout="TZCYX").to_numpy(), new)


def test_a_source_that_cannot_be_read_fails_until_it_is_mended(folder: Path) -> None:
    """Its footer is good, what it holds is not: found when it is loaded, said to whoever asks, and not tried again by itself."""
    path = folder / "a.ome.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:1000] + bytes(2000) + good[3000:])
    with running_server([folder], preload=False) as server, connect(server.target, retry_for=0.1) as client:
        for _ in range(2):
            with pytest.raises(InvalidRecord, match=r"a\.ome\.parquet"):
                client.tensor_view("a").to_numpy()
        info = client.dataset("a")
        assert info.state is DatasetState.FAILED
        assert "a.ome.parquet" in info.problem
        np.testing.assert_array_equal(client.tensor_view("b").to_numpy(), random_pixels(SHAPE, seed=1))
        path.write_bytes(good)
        client.admin.refresh("a")
        np.testing.assert_array_equal(client.tensor_view("a").to_numpy(), random_pixels(SHAPE))


def test_a_watched_folder(folder: Path) -> None:
    with running_server([folder], preload=False, watch_seconds=0.05) as server, connect(server.target) as client:

        def names() -> list[str]:
            return [dataset.name for dataset in client.datasets()]

        time.sleep(0.2)
        write_image(folder / "d.ome.parquet", random_pixels((1, 1, 1, 8, 9), seed=4))
        (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
        wait_until(lambda: "d" in names(), "the new file is served")
        np.testing.assert_array_equal(client.tensor_view("d").to_numpy(), random_pixels((1, 1, 1, 8, 9), seed=4)[0, 0])
        before = client.dataset("d").version
        write_image(folder / "new", random_pixels((1, 1, 1, 9, 9), seed=5))
        (folder / "new").replace(folder / "d.ome.parquet")
        wait_until(lambda: client.dataset("d").version not in ("", before), "the new version is served")
        np.testing.assert_array_equal(client.tensor_view("d").to_numpy(), random_pixels((1, 1, 1, 9, 9), seed=5)[0, 0])
        (folder / "d.ome.parquet").unlink()
        wait_until(lambda: names() == ["a", "b", "c"], "the file that has gone is not served")


def test_registering(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    write_image(root / "deep" / "x.ome.parquet", random_pixels((1, 1, 1, 8, 9)))
    (root / "out.parquet").symlink_to(folder / "b.ome.parquet")
    (root / "notes.txt").write_text("nothing")
    with running_server([folder / "a.ome.parquet"], roots=str(root)) as server, connect(server.target) as client:
        (info,) = client.admin.register(str(root / "deep" / "x.ome.parquet"), "mine")
        assert (info.name, info.state) == ("mine", NOT_LOADED)
        np.testing.assert_array_equal(client.tensor_view("mine").to_numpy(), random_pixels((1, 1, 1, 8, 9))[0, 0])
        assert [one.name for one in client.admin.register(str(root))] == ["deep.x"]
        outside = (
            str(folder / "b.ome.parquet"),
            str(root / ".." / "data" / "b.ome.parquet"),
            str(root / "out.parquet"),
            "/etc/passwd",
            "http://localhost/x.zarr",
            "",
            "a\0b",
        )
        for path in outside:
            with pytest.raises(InvalidArgument, match=r"does not lie below any folder|path must"):
                client.admin.register(path)
        with pytest.raises(InvalidArgument, match="does not exist"):
            client.admin.register(str(root / "nothing"))
        with pytest.raises(InvalidArgument, match="is not a file of images"):
            client.admin.register(str(root / "notes.txt"))
        with pytest.raises(InvalidArgument, match="there is a dataset 'a' already"):
            client.admin.register(str(root / "deep" / "x.ome.parquet"), "a")
        client.admin.remove("mine")
        with pytest.raises(DatasetNotFound):
            client.tensor_view("mine").to_numpy()
        for call in (client.admin.remove, client.admin.refresh, client.admin.load, client.admin.cancel_load):
            with pytest.raises(DatasetNotFound):
                call("mine")
        with pytest.raises(NotSupported, match="takes no uploads"):
            client.upload("up", np.zeros((4, 4), np.uint8))


def test_whoever_may_not_change_datasets_is_told_so(folder: Path) -> None:
    with running_server([folder], admin="off") as server, connect(server.target) as client:
        for call in (client.admin.remove, client.admin.refresh, client.admin.load, client.admin.cancel_load):
            with pytest.raises(NotAllowed, match="does not let you change"):
                call("a")
        with pytest.raises(NotAllowed):
            client.admin.register(str(folder))
        with pytest.raises(NotAllowed):
            client.upload("x", np.zeros((4, 4), np.uint8))
        assert client.tensor_view("a").to_numpy().any()


@pytest.mark.slow
def test_several_workers_have_one_librarian(folder: Path, tmp_path: Path, start_server: Callable[..., ServerProcess]) -> None:
    """Whichever worker is asked: loads, evictions, uploads and removals are the server's."""
    store, uploads = tmp_path / "store", tmp_path / "uploads"
    flags = ["--lazy", "--workers", "2", "--store", str(store), "--uploads", str(uploads), "--memory-limit", "5M"]
    server = start_server(folder, *flags, "--decode-cache-bytes", "1000000").wait_serving()
    pixels = random_pixels((1, 1, 1, 50, 60), np.int8, seed=7)
    clients = [connect(server.target, transport="tcp") for _ in range(6)]
    for number, client in enumerate(clients):
        for seed, name in enumerate("abc"):
            found = client.tensor_view(name, layout="TZCYX").to_numpy()
            np.testing.assert_array_equal(found, random_pixels(SHAPE, seed=seed))
        client.upload(f"up{number}", pixels)
        (seen,) = {tuple(sorted(d.name for d in other.datasets())) for other in clients}
        assert f"up{number}" in seen
        np.testing.assert_array_equal(clients[number - 1].tensor_view(f"up{number}").to_numpy(), pixels[0, 0])
    assert len([d for d in clients[0].datasets() if d.name in "abc" and d.state is LOADED]) <= 2
    clients[0].admin.remove("up0")
    for client in clients:
        with pytest.raises(DatasetNotFound):
            client.tensor_view("up0", roi=(1, 1, 2, 2)).to_numpy()
        client.close()
    server.terminate()
    assert server.process.wait(20) == 0
    assert "Traceback" not in server.log.read_text()
    again = start_server(folder, *flags).wait_serving()
    with connect(again.target) as client:
        assert [d.name for d in client.datasets()] == ["a", "b", "c", *(f"up{number}" for number in range(1, 6))]
        np.testing.assert_array_equal(client.tensor_view("up3").to_numpy(), pixels[0, 0])


def test_a_restart_finds_in_the_store_what_was_loaded(folder: Path, tmp_path: Path, server_log: pytest.LogCaptureFixture) -> None:
    for expected in (NOT_LOADED, LOADED):
        with (
            running_server([folder], preload=False, store=str(tmp_path / "store")) as server,
            connect(server.target) as client,
        ):
            assert client.dataset("a").state is expected
            np.testing.assert_array_equal(client.tensor_view("a").to_numpy(), random_pixels(SHAPE))
    assert sum(record.getMessage().startswith("loaded") for record in server_log.records) == 1


def test_links_that_lead_out_of_a_folder_are_left_out(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(folder / "a.ome.parquet", outside / "secret.ome.parquet")
    (folder / "out.parquet").symlink_to(outside / "secret.ome.parquet")
    (folder / "inside.parquet").symlink_to(folder / "b.ome.parquet")
    os.symlink(outside, folder / "linked")
    with running_server([folder], preload=False) as server, connect(server.target) as client:
        assert [dataset.name for dataset in client.datasets()] == ["a", "b", "c", "inside"]


@pytest.mark.parametrize("kind", ["zarr", "npy", "tiff"])
def test_a_header_that_claims_an_absurd_size(tmp_path: Path, folder: Path, kind: str) -> None:
    """2^31 - 1 pixels a side, of which next to none is there: nothing is set aside for it, each read says why not, and others are served."""
    side = 2**31 - 1
    path = tmp_path / f"absurd.{kind}"
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        zarr.create_array(path, shape=(side, side), chunks=(side, side), dtype="uint16", zarr_format=2)
    elif kind == "npy":
        np.save(path, np.zeros((4, 4), np.uint16))
        path.write_bytes(path.read_bytes().replace(b"(4, 4), }" + b" " * 18, f"({side}, {side}), }}".encode().ljust(27)))
    else:
        tifffile = pytest.importorskip("tifffile")
        pytest.importorskip("zarr", reason="the reader of TIFF files needs zarr")
        tifffile.imwrite(path, np.zeros((4, 4), np.uint16))
        with tifffile.TiffFile(path, mode="r+") as file:
            for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
                file.pages.first.tags[tag].overwrite(side, dtype="I")
    with (
        running_server([folder, tmp_path], preload=False, memory_limit="64M") as server,
        connect(server.target, retry_for=0) as client,
    ):
        if kind == "npy":
            # It says more than the file has: left out when it is found, and refused by name when it is asked for.
            assert "absurd" not in {dataset.name for dataset in client.datasets()}
            with pytest.raises(InvalidRecord, match="absurd"):
                client.admin.register(str(path))
        else:
            assert client.dataset("absurd").estimated_bytes >= 4 * 10**18
            with pytest.raises(LimitExceeded, match="max_chunk_bytes"):
                client.tensor_view("absurd", roi=(5, 5, 20, 20)).to_numpy()
            with pytest.raises(LimitExceeded):
                client.tensor_view("absurd").to_numpy()
            with pytest.raises(LimitExceeded, match=r"level 1 of absurd/image/0 takes .* GiB"):
                client.tensor_view("absurd", level=1, roi=(5, 5, 20, 20)).to_numpy()
        np.testing.assert_array_equal(client.tensor_view("a").to_numpy(), random_pixels(SHAPE))


@pytest.mark.slow
def test_an_image_of_more_elements_than_31_bits_count(tmp_path: Path) -> None:
    """Each read is far behind the 2^31st element, in a file that is next to empty."""
    shape = (1, 33, 1, 8192, 8192)
    assert np.prod(shape) > 2**31
    large = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint16, shape)
    large[0, 32, 0, -64:, -64:] = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    large.flush()
    with running_server([tmp_path], preload=False) as server, connect(server.target, transport="tcp") as client:
        view = client.tensor_view("large", layout="ZYX", c=0)
        assert view.shape == (33, 8192, 8192)
        np.testing.assert_array_equal(view[32, -64:, -64:].to_numpy(), large[0, 32, 0, -64:, -64:])
        last = deque(view[32:].iter_tiles(tile_size=(1, 4096, 4096)), maxlen=1)[0]
        np.testing.assert_array_equal(last.array[..., -64:, -64:].squeeze(), large[0, 32, 0, -64:, -64:])
