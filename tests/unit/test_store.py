"""The store: what was converted is what was read, whole or not at all, and a restart parses nothing."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.integration.images import random_pixels, write_image, write_images
from tests.unit.tabular import LOADER, write_typed

from ome_tensor import Cancelled, DatasetChanged, InvalidArgument, InvalidRecord, TensorView
from ome_tensor.blocks import ChunkCache
from ome_tensor.tables import ImageTable, LoadedTable
from ome_tensor_server.finding import find_sources
from ome_tensor_server.leases import Locks
from ome_tensor_server.loader import steadily
from ome_tensor_server.loading import Loader, load_anonymous
from ome_tensor_server.manifest import dataset_id
from ome_tensor_server.mounts import is_memory
from ome_tensor_server.readers.base import OpenedSource
from ome_tensor_server.readers.parquet import ParquetSource
from ome_tensor_server.store import Manifest, Store

SHAPE = (1, 3, 2, 40, 50)

#: What a store has beside datasets.
KEPT = {".ome-tensor-store", ".lock", ".leases"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


def load(store: Store, path: Path) -> Manifest:
    """A file's dataset in a store."""
    return store.load(str(path), LOADER)


def plain(path: Path) -> LoadedTable:
    """A file's dataset without a store."""
    return load_anonymous(str(path), LOADER)


def pixels_of(manifest: Manifest, column: str = "image", row: int = 0) -> np.ndarray:
    """An image of a mapped dataset."""
    return TensorView(manifest.table().images[column].slice(row, 1), layout="TZCYX").to_numpy()


def write_arrow(path: Path, pixels: np.ndarray, compression: str | None = None) -> Path:
    """An Arrow IPC file of one image, put in its place by renaming."""
    table = pq.read_table(write_image(path.with_name("made.parquet"), pixels))
    new = path.with_name("new")
    with pa.ipc.new_file(new, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return new.replace(path)


def datasets_in(store: Store) -> list[str]:
    """Names of a store's files, but for those that every store has."""
    return sorted({file.name for file in store.folder.iterdir()} - KEPT)


def inode(path: str | Path) -> int:
    """Which file it is."""
    return os.stat(path).st_ino


def test_a_dataset_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    """All rows, also one without an image; the version is that of a server without a store."""
    images = [random_pixels(SHAPE, seed=1), None, random_pixels((2, 1, 1, 7, 9), np.float32, seed=2)]
    path = write_images(tmp_path / "some.ome.parquet", images)
    manifest = load(store, path)
    table, other = manifest.table(), plain(path)
    assert (table.version, table.rows, table.others) == (other.version, other.rows, other.others)
    assert table.images["image"].is_valid().to_pylist() == [True, False, True]
    for row in (0, 2):
        np.testing.assert_array_equal(pixels_of(manifest, row=row), images[row])


def test_row_groups_are_written_one_by_one(store: Store, tmp_path: Path) -> None:
    """A file of many row groups becomes a file of many record batches."""
    path = write_images(tmp_path / "many.ome.parquet", [random_pixels((1, 1, 1, 8, 8), seed=row) for row in range(6)])
    pq.write_table(pq.read_table(path), path, row_group_size=2)
    manifest = load(store, path)
    assert pa.ipc.open_file(manifest.file).num_record_batches == 3
    np.testing.assert_array_equal(pixels_of(manifest, row=5), random_pixels((1, 1, 1, 8, 8), seed=5))


def test_a_second_load_maps_what_is_there(store: Store, tmp_path: Path) -> None:
    """Also by another process's store object; nothing is written."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    first = load(store, path)
    before = os.stat(first.file)
    assert load(Store(store.folder), path) == first
    after = os.stat(first.file)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_changed_source_replaces_its_dataset(store: Store, tmp_path: Path) -> None:
    """Those who mapped the old one keep it; its file is gone."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE, seed=1))
    old = load(store, path)
    mapped = old.table()
    write_image(path, random_pixels(SHAPE, seed=2))
    new = load(store, path)
    assert new.version != old.version
    assert not Path(old.file).exists()
    np.testing.assert_array_equal(TensorView(mapped.images["image"], layout="TZCYX").to_numpy(), random_pixels(SHAPE, seed=1))
    np.testing.assert_array_equal(pixels_of(new), random_pixels(SHAPE, seed=2))


@pytest.mark.parametrize("damage", ["manifest", "truncated", "gone", "format"])
def test_damage_is_mended(store: Store, tmp_path: Path, damage: str) -> None:
    """A store that something else has meddled with is made anew from the source."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    manifest = load(store, path)
    (record,) = store.folder.glob("*.json")
    if damage == "manifest":
        record.write_text("{")
    elif damage == "format":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 0}))
    elif damage == "gone":
        Path(manifest.file).unlink()
    else:
        os.truncate(manifest.file, 100)
    np.testing.assert_array_equal(pixels_of(load(store, path)), random_pixels(SHAPE))


def test_an_unreadable_source_leaves_the_store_as_it_was(store: Store, tmp_path: Path) -> None:
    """No half file, no manifest."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    damaged = bytearray(path.read_bytes())
    damaged[200:1200] = bytes(1000)
    path.write_bytes(damaged)
    with pytest.raises(InvalidRecord, match=r"image\.ome\.parquet"):
        load(store, path)
    assert datasets_in(store) == []


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_an_arrow_file_takes_no_room(store: Store, tmp_path: Path, compression: str | None) -> None:
    """It is the store's by a name or by blocks that are shared; a compressed one is written out once, so that all can map it."""
    path = write_arrow(tmp_path / "image.arrow", random_pixels(SHAPE), compression)
    manifest = load(store, path)
    assert Path(manifest.file).parent == store.folder
    assert (inode(manifest.file) == inode(path)) == (compression is None and not shares_blocks(tmp_path))
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))
    # Pixels lie in a file, not in this process's memory.
    before = pa.total_allocated_bytes()
    kept = manifest.table()
    assert pa.total_allocated_bytes() - before < 100_000
    assert kept.nbytes > random_pixels(SHAPE).nbytes


# --- whose files -----------------------------------------------------------------------------------------------------------------


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    """And left as it was."""
    path = write_arrow(tmp_path / "image.arrow", random_pixels(SHAPE))
    (tmp_path / "work.tmp").write_text("mine")
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(InvalidArgument, match=r"holds other files \(image\.arrow, made\.parquet, work\.tmp\)") as caught:
        Store(tmp_path)
    assert (caught.value.field, caught.value.value) == ("store", str(tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    assert plain(path).rows == 1


def test_files_of_other_names_are_never_touched(store: Store) -> None:
    """Whatever somebody has put into a store."""
    for name in ("image.arrow", "work.tmp", "notes.json", "0123456789abcdef-0123456789abcdef.arrow.bak", "0123456789abcdef.tmp"):
        (store.folder / name).write_text("mine")
    before = datasets_in(store)
    (store.folder / "0123456789abcdef-0123456789abcdef.arrow").write_text("a crash left it")
    (store.folder / "0123456789abcdef-0123456789abcdef.arrow.tmp").write_text("a crash left it")
    (store.folder / "0123456789abcdef.json.tmp").write_text("a crash left it")
    Store(store.folder).clean()
    assert datasets_in(store) == before


def test_a_new_file_system_may_become_a_store(tmp_path: Path) -> None:
    """ext4 has a folder of its own in it."""
    (tmp_path / "lost+found").mkdir()
    Store(tmp_path)
    Store(tmp_path)


def test_a_store_in_a_served_folder_is_not_served(tmp_path: Path) -> None:
    """Nor is anything that is hidden; a folder that is a store itself is no folder of images."""
    write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    (tmp_path / "plate").mkdir()
    write_image(tmp_path / "plate" / "well.ome.parquet", random_pixels(SHAPE, seed=2))
    (tmp_path / ".trash").mkdir()
    write_image(tmp_path / ".trash" / "old.ome.parquet", random_pixels(SHAPE, seed=3))
    for folder in (tmp_path / "store", tmp_path / "plate" / ".store"):
        load(Store(folder), tmp_path / "image.ome.parquet")
    assert [source.name for source in find_sources([tmp_path])] == ["image", "plate.well"]
    with pytest.raises(InvalidArgument, match="is a store"):
        find_sources([tmp_path / "store"])


@pytest.mark.parametrize(
    "source,folder,expected",
    [
        (0o600, 0o755, 0o600),
        (0o640, 0o755, 0o640),
        (0o644, 0o755, 0o644),
        (0o666, 0o755, 0o644),
        (0o644, 0o750, 0o640),
        (0o644, 0o700, 0o600),
        (0o604, 0o755, 0o604),
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["from the beginning", "changed later"])
def test_nobody_reads_more_than_the_source(tmp_path: Path, source: int, folder: int, expected: int, late: bool) -> None:
    """Nor more than the folder lets in; also where that was changed after the conversion."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    store = tmp_path / "store"
    if late:
        load(Store(store), path)
    else:
        store.mkdir()
    path.chmod(source)
    store.chmod(folder)
    assert os.stat(load(Store(store), path).file).st_mode & 0o777 == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another group")
@pytest.mark.parametrize("source,expected", [(0o640, 0o600), (0o644, 0o644), (0o604, 0o600)])
def test_the_sources_group_is_not_the_stores(tmp_path: Path, source: int, expected: int) -> None:
    """What one group may read, another may not; and one that is shut out may not as one of the others."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    os.chown(path, -1, 12345)
    path.chmod(source)
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o755)
    assert os.stat(load(Store(tmp_path / "store"), path).file).st_mode & 0o777 == expected


def test_nobody_reads_more_than_any_file_of_a_folder(tmp_path: Path) -> None:
    """Of a source that is one: the strictest decides."""
    path = write_typed(tmp_path / "set", {"a": random_pixels(SHAPE)})
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o755)
    path.chmod(0o755)
    for file in path.iterdir():
        file.chmod(0o644)
    assert os.stat(load(Store(tmp_path / "store"), path).file).st_mode & 0o777 == 0o644
    (path / "chunks.parquet").chmod(0o640)
    assert os.stat(load(Store(tmp_path / "store"), path).file).st_mode & 0o777 == 0o640


# --- Arrow files, mapped where they lie --------------------------------------------------------------------------------------------


def shares_blocks(folder: Path) -> bool:
    """Whether files of this file system can share blocks."""
    one, other = folder / "one", folder / "other"
    one.write_bytes(bytes(4096))
    try:
        with one.open("rb") as source, other.open("wb") as target:
            fcntl.ioctl(target, 0x40049409, source.fileno())
    except OSError:
        return False
    finally:
        one.unlink()
        other.unlink()
    return True


@pytest.fixture
def other_device(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than ``tmp_path``."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is only one file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_a_source_that_is_renamed_replaced_or_removed_stays_mapped(store: Store, tmp_path: Path) -> None:
    """Whoever opens the dataset later gets what was loaded; the next load what is there then."""
    path = write_arrow(tmp_path / "image.arrow", random_pixels(SHAPE))
    manifest = load(store, path)
    write_arrow(path, random_pixels(SHAPE, seed=2))
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))
    path.unlink()
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))
    write_arrow(path, random_pixels(SHAPE, seed=3))
    new = load(store, path)
    assert new.version != manifest.version
    np.testing.assert_array_equal(pixels_of(new), random_pixels(SHAPE, seed=3))
    assert not Path(manifest.file).exists()


def test_a_source_on_another_file_system_is_opened_only_as_it_was(tmp_path: Path, other_device: Path) -> None:
    """It is served where it lies; another file in its place, or another content, is never taken for the version that was loaded."""
    store = Store(other_device / "store")
    path = write_arrow(tmp_path / "image.arrow", random_pixels(SHAPE))
    manifest = load(store, path)
    assert manifest.file == str(path)
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))
    stat = path.stat()
    write_arrow(path, random_pixels(SHAPE, seed=2))
    # The same size, and by chance the same time.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InvalidRecord, match=str(path)):
        manifest.table()
    assert not manifest.is_current
    np.testing.assert_array_equal(pixels_of(load(store, path)), random_pixels(SHAPE, seed=2))


@pytest.mark.parametrize("place", ["linked", "in place", "no store"])
@pytest.mark.parametrize("change", ["write", "truncate", "touch"])
def test_a_source_that_is_changed_in_place_is_noticed(
    tmp_path: Path, request: pytest.FixtureRequest, place: str, change: str
) -> None:
    """Before the next read, by whoever asks: pixels that are not the version's are not served."""
    if place == "linked" and shares_blocks(tmp_path):
        pytest.skip("the store has the file's blocks, which nobody changes")
    folder = request.getfixturevalue("other_device") if place == "in place" else tmp_path
    path = write_arrow(tmp_path / "image.arrow", random_pixels(SHAPE))
    table = plain(path) if place == "no store" else load(Store(folder / "store"), path).table()
    dataset = ImageTable("image", table, ChunkCache(0, 1 << 20))
    dataset.check_unchanged()
    os.rename(path, tmp_path / "renamed")
    dataset.check_unchanged()
    if change == "write":
        with (tmp_path / "renamed").open("r+b") as file:
            file.seek(1000)
            file.write(b"other")
    elif change == "truncate":
        os.truncate(tmp_path / "renamed", 100)
    else:
        os.utime(tmp_path / "renamed", ns=(1, 1))
    with pytest.raises(DatasetChanged, match="file of dataset 'image' was changed in place"):
        dataset.check_unchanged()


def test_a_source_whose_blocks_are_shared_may_be_changed(store: Store, tmp_path: Path) -> None:
    """On a file system that can do it the store's file is nobody else's."""
    if not shares_blocks(tmp_path):
        pytest.skip("this file system cannot share blocks between files")
    path = write_arrow(tmp_path / "image.arrow", random_pixels(SHAPE))
    manifest = load(store, path)
    dataset = ImageTable("image", manifest.table(), ChunkCache(0, 1 << 20))
    os.truncate(path, 100)
    dataset.check_unchanged()
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))


def test_a_parquet_file_may_be_changed(store: Store, tmp_path: Path) -> None:
    """The store's file is nobody else's."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    manifest = load(store, path)
    dataset = ImageTable("image", manifest.table(), ChunkCache(0, 1 << 20))
    os.truncate(path, 100)
    dataset.check_unchanged()
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))


# --- sources that change while they are read -----------------------------------------------------------------------------------------


def test_a_source_that_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    """Once."""
    path = write_image(tmp_path / "file", random_pixels(SHAPE))
    turns = 0

    def read(source: OpenedSource) -> dict[str, int]:
        nonlocal turns
        turns += 1
        if turns <= changes:
            write_image(tmp_path / "next", random_pixels(SHAPE, seed=turns))
            (tmp_path / "next").replace(path)
        return {"turn": turns}

    changes = 1
    assert steadily(str(path), read) == {"turn": 2}
    changes, turns = 9, 0
    with pytest.raises(InvalidRecord, match="file is being changed while it is read"):
        steadily(str(path), read)
    assert turns == 2


@pytest.mark.parametrize("kind", ["parquet", "arrow", "zstd"])
@pytest.mark.parametrize("stored", [True, False])
def test_version_and_pixels_are_of_one_file(tmp_path: Path, kind: str, stored: bool) -> None:
    """However often the source is replaced meanwhile."""
    names, versions = [], []
    for seed in range(2):
        pixels = random_pixels(SHAPE, seed=seed)
        path = tmp_path / f"{seed}"
        names.append(
            write_image(path, pixels) if kind == "parquet" else write_arrow(path, pixels, None if kind == "arrow" else kind)
        )
        versions.append(plain(path).version)
    path = tmp_path / "source"
    shutil.copy(names[0], path)
    stop = threading.Event()

    def replace_again_and_again() -> None:
        turn = 0
        while not stop.wait(0.004):
            turn += 1
            shutil.copy(names[turn % 2], tmp_path / "next")
            (tmp_path / "next").replace(path)

    thread = threading.Thread(target=replace_again_and_again)
    thread.start()
    found = 0
    try:
        for attempt in range(40):
            try:
                table = load(Store(tmp_path / "stores" / str(attempt)), path).table() if stored else plain(path)
            except InvalidRecord as error:
                # Or the file that was served as it lay is another one by now.
                if "is being changed" not in str(error) and "is not the file that was loaded" not in str(error):
                    raise
                continue
            found += 1
            seed = versions.index(table.version)
            pixels = TensorView(table.images["image"].slice(0, 1), layout="TZCYX").to_numpy()
            np.testing.assert_array_equal(pixels, random_pixels(SHAPE, seed=seed))
    finally:
        stop.set()
        thread.join()
    print(f"{found} of 40 loads came between two changes")


def test_a_source_that_was_touched_is_not_converted_again(store: Store, tmp_path: Path) -> None:
    """Its bytes are the same."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    before = load(store, path)
    number = inode(before.file)
    os.utime(path, ns=(1, 1))
    after = load(store, path)
    assert (after.version, after.file, inode(after.file)) == (before.version, before.file, number)
    assert after.is_current
    assert not before.is_current


# --- several servers on one store ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_dataset_that_another_server_replaces_stays_while_it_is_used(tmp_path: Path, kind: str) -> None:
    """A worker that this server starts later can map it; when no server uses it any more it goes."""
    path = tmp_path / "source"
    write = write_image if kind == "parquet" else write_arrow
    write(path, random_pixels(SHAPE, seed=1))
    one, other = Store(tmp_path / "store"), Store(tmp_path / "store")
    old = load(one, path)
    write(path, random_pixels(SHAPE, seed=2))
    new = load(other, path)
    other.clean()
    Store(tmp_path / "store").clean()
    np.testing.assert_array_equal(pixels_of(old), random_pixels(SHAPE, seed=1))
    np.testing.assert_array_equal(pixels_of(new), random_pixels(SHAPE, seed=2))
    del one
    gc.collect()
    other.clean()
    assert not Path(old.file).exists()
    np.testing.assert_array_equal(pixels_of(new), random_pixels(SHAPE, seed=2))


_USE = """
import sys
from pathlib import Path
from ome_tensor_server.loading import shared_loader
from ome_tensor_server.store import Store
store = Store(Path(sys.argv[1]))
store.load(sys.argv[2], shared_loader())
print("loaded", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_server_used_can_go(store: Store, tmp_path: Path) -> None:
    """kill -9 ends its leases."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    command = [sys.executable, "-c", _USE, str(store.folder), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loaded\n"
        path.unlink()
        store.clean()
        assert len(datasets_in(store)) == 2
        process.kill()
        process.wait()
        store.clean()
        assert datasets_in(store) == []


def test_datasets_whose_source_is_gone_go(store: Store, tmp_path: Path) -> None:
    """The others stay, and so does what somebody serves."""
    paths = [write_image(tmp_path / f"{number}.parquet", random_pixels(SHAPE, seed=number)) for number in range(3)]
    used = load(store, paths[0])
    other = Store(store.folder)
    kept = [load(other, path) for path in paths][2]
    del other
    gc.collect()
    paths[0].unlink()
    paths[1].unlink()
    store.clean()
    assert {name for name in datasets_in(store) if name.endswith(".arrow")} == {Path(used.file).name, Path(kept.file).name}
    assert len(datasets_in(store)) == 4


def test_nobody_waits_for_the_conversion_of_another_dataset(store: Store, tmp_path: Path) -> None:
    """What is there is served, what is not is converted; only cleaning is left for a later time."""
    path, other_path = (write_image(tmp_path / f"{seed}.ome.parquet", random_pixels(SHAPE, seed=seed)) for seed in range(2))
    first = load(store, path)
    (store.folder / "0123456789abcdef-0123456789abcdef.arrow.tmp").write_text("being written")
    with Locks(store.folder / ".lock").held("0123456789abcdef"):
        other = Store(store.folder)
        other.clean()
        assert load(other, path) == first
        np.testing.assert_array_equal(pixels_of(load(other, other_path)), random_pixels(SHAPE, seed=1))
        assert len(datasets_in(store)) == 5
    other.clean()
    assert len(datasets_in(store)) == 4


def test_one_converts_a_dataset_at_a_time(store: Store, tmp_path: Path) -> None:
    """Whoever waits may give up; else finds it done."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    cancelled = threading.Event()
    with Locks(store.folder / ".lock").held(dataset_id(str(path))):
        threading.Timer(0.1, cancelled.set).start()
        with pytest.raises(Cancelled):
            store.load(str(path), LOADER, cancelled=cancelled)
        assert datasets_in(store) == []
    stores = [Store(store.folder) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda one: load(one, path), stores))
    assert made == made[:1] * 4
    assert len(datasets_in(store)) == 2


def test_what_an_address_names_is_not_gone(store: Store, tmp_path: Path) -> None:
    """Though there is no such file here; a restart asks nobody."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    manifest, address = load(store, path), "https://example.org/image.zarr"
    name = dataset_id(address)
    (store.folder / f"{dataset_id(str(path))}.json").unlink()
    record = asdict(manifest) | {"source": address, "fingerprint": "etag"}
    record["file"] = str(store.folder / f"{name}-{manifest.version}.arrow")
    os.rename(manifest.file, record["file"])
    (store.folder / f"{name}.json").write_text(json.dumps(record))
    path.unlink()
    store.clean()
    assert datasets_in(store) == [f"{name}-{manifest.version}.arrow", f"{name}.json"]
    found = Store(store.folder).current(address)
    assert found is not None
    np.testing.assert_array_equal(pixels_of(found), random_pixels(SHAPE))


# --- room --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("encoding", ["bytes", "list"])
def test_the_room_that_a_dataset_will_take_is_known(tmp_path: Path, kind: type, encoding: str) -> None:
    """From a Parquet file's footer, also where a dictionary makes the file small."""
    pixels = np.zeros((4, 256, 256), kind)
    planes = [pixel.tobytes() if encoding == "bytes" else pixel.ravel() for pixel in pixels]
    kinds = {"bytes": pa.binary(), "list": pa.list_(pa.from_numpy_dtype(kind))}
    meta = {"type": pixels.dtype.name, "size_t": 1, "size_z": 4, "size_c": 1, "size_y": 256, "size_x": 256}
    record = pa.StructArray.from_arrays(
        [pa.array([meta]), pa.array([[{"pixels": plane} for plane in planes]], pa.list_(pa.struct({"pixels": kinds[encoding]})))],
        ["pixels_meta", "planes"],
    )
    path = tmp_path / "image.parquet"
    pq.write_table(
        pa.table({"image": record, "other": pa.array([bytes(1 << 20)])}),
        path,
        compression="zstd",
        use_dictionary=encoding == "list",
    )
    assert path.stat().st_size < pixels.nbytes // 10
    with ParquetSource(str(path)) as source:
        assert pixels.nbytes + (1 << 20) <= source.nbytes < 1.1 * pixels.nbytes + (1 << 20) + 2000


@pytest.fixture
def memory_store() -> Iterator[Store]:
    """An empty store in memory."""
    if not is_memory(Path("/dev/shm")):
        pytest.skip("there is no file system in memory")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Store(Path(folder))


def test_a_dataset_that_is_discarded_gives_its_memory_back(memory_store: Store, tmp_path: Path) -> None:
    """It is loaded anew when it is wanted again; who has mapped it has it."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    manifest = load(memory_store, path)
    mapped = manifest.table()
    assert memory_store.discard(manifest)
    assert datasets_in(memory_store) == []
    assert memory_store.current(str(path)) is None
    np.testing.assert_array_equal(TensorView(mapped.images["image"], layout="TZCYX").to_numpy(), random_pixels(SHAPE))
    np.testing.assert_array_equal(pixels_of(load(memory_store, path)), random_pixels(SHAPE))


def test_what_another_server_uses_is_not_discarded(memory_store: Store, tmp_path: Path) -> None:
    """Until that one has no use for it either."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    other = Store(memory_store.folder)
    manifest = load(memory_store, path)
    assert load(other, path) == manifest
    assert not memory_store.discard(manifest)
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))
    assert other.discard(manifest)
    assert datasets_in(memory_store) == []


def test_a_dataset_on_a_disk_stays_when_it_is_discarded(tmp_path: Path) -> None:
    """For the next time; but nobody holds it, so that it can go with its source."""
    store = Store(tmp_path / "store")
    if is_memory(store.folder):
        pytest.skip("temporary files lie in memory")
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    manifest = load(store, path)
    assert not store.discard(manifest)
    assert store.current(str(path)) == manifest
    assert not store.discard(manifest)
    path.unlink()
    store.clean()
    assert datasets_in(store) == []


def own_memory(process: int) -> int:
    """Bytes that a process has beside files that it has mapped."""
    (line,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_conversion_never_has_the_dataset_in_memory(store: Store, tmp_path: Path, kind: str) -> None:
    """A few batches of it at most: Parquet's decoder needs several times what it gives."""
    batches, size = 32, 4 << 20
    path = write_images(tmp_path / "image", [random_pixels((1, 1, 1, 1024, size // 2048), seed=seed) for seed in range(batches)])
    table = pq.read_table(path)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=1, compression="zstd")
    else:
        with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table, max_chunksize=1)
    with closing(Loader()) as loader:
        loader.describe(str(path))
        (process,) = loader.processes
        before, peak, done = own_memory(process), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, own_memory(process))

        thread = threading.Thread(target=watch)
        thread.start()
        store.load(str(path), loader)
        done.set()
        thread.join()
    print(f"{kind}: {(peak - before) / size:.1f} batches in memory")
    assert peak - before < (18 if kind == "parquet" else 12) * size


_CONVERT = """
import sys
from pathlib import Path
from ome_tensor_server.loading import shared_loader
from ome_tensor_server.store import Store
shared_loader().describe(sys.argv[2])
print("go", flush=True)
Store(Path(sys.argv[1])).load(sys.argv[2], shared_loader())
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_all_or_nothing(tmp_path: Path) -> None:
    """kill -9 while converting, at many moments: what is there afterwards is right, and clean() leaves nothing else."""
    pixels = random_pixels((1, 8, 2, 512, 512))
    path = write_image(tmp_path / "image.ome.parquet", pixels)
    finished = 0
    for attempt in range(12):
        store = Store(tmp_path / f"store{attempt}")
        command = [sys.executable, "-c", _CONVERT, str(store.folder), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            # Up to about the time that it takes; some get through.
            time.sleep(attempt * 0.008)
            process.send_signal(signal.SIGKILL)
        manifests = list(store.folder.glob("*.json"))
        finished += len(manifests)
        store.clean()
        left = [Path(name).suffix for name in datasets_in(store)]
        assert sorted(left) == ([".arrow", ".json"] if manifests else [])
        np.testing.assert_array_equal(pixels_of(load(store, path)), pixels)
    print(f"{finished} of 12 conversions were through when they were killed")
