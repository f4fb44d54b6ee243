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
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.integration.images import random_pixels, write_image, write_images

from ome_tensor import DatasetChanged, InvalidArgument, InvalidRecord, TensorView
from ome_tensor.blocks import ChunkCache
from ome_tensor_server.catalogue import Dataset, find_sources, load_table
from ome_tensor_server.parquet import ParquetImages
from ome_tensor_server.sources import Source, read_source
from ome_tensor_server.store import Manifest, Store

SHAPE = (1, 3, 2, 40, 50)

#: What a store has beside datasets.
KEPT = {".ome-tensor-store", ".lock", ".leases"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


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
    manifest = store.load(path)
    table, plain = manifest.table(), load_table(path, None)
    assert (table.version, table.rows, table.others) == (plain.version, plain.rows, plain.others)
    assert table.images["image"].is_valid().to_pylist() == [True, False, True]
    for row in (0, 2):
        np.testing.assert_array_equal(pixels_of(manifest, row=row), images[row])


def test_row_groups_are_written_one_by_one(store: Store, tmp_path: Path) -> None:
    """A file of many row groups becomes a file of many record batches."""
    path = write_images(tmp_path / "many.ome.parquet", [random_pixels((1, 1, 1, 8, 8), seed=row) for row in range(6)])
    pq.write_table(pq.read_table(path), path, row_group_size=2)
    manifest = store.load(path)
    assert pa.ipc.open_file(manifest.file).num_record_batches == 3
    np.testing.assert_array_equal(pixels_of(manifest, row=5), random_pixels((1, 1, 1, 8, 8), seed=5))


def test_a_second_load_maps_what_is_there(store: Store, tmp_path: Path) -> None:
    """Also by another process's store object; nothing is written."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    first = store.load(path)
    before = os.stat(first.file)
    assert Store(store.folder).load(path) == first
    after = os.stat(first.file)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_changed_source_replaces_its_dataset(store: Store, tmp_path: Path) -> None:
    """Those who mapped the old one keep it; its file is gone."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE, seed=1))
    old = store.load(path)
    mapped = old.table()
    write_image(path, random_pixels(SHAPE, seed=2))
    new = store.load(path)
    assert new.version != old.version
    assert not Path(old.file).exists()
    np.testing.assert_array_equal(TensorView(mapped.images["image"], layout="TZCYX").to_numpy(), random_pixels(SHAPE, seed=1))
    np.testing.assert_array_equal(pixels_of(new), random_pixels(SHAPE, seed=2))


@pytest.mark.parametrize("damage", ["manifest", "truncated", "gone", "format"])
def test_damage_is_mended(store: Store, tmp_path: Path, damage: str) -> None:
    """A store that something else has meddled with is made anew from the source."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    manifest = store.load(path)
    (record,) = store.folder.glob("*.json")
    if damage == "manifest":
        record.write_text("{")
    elif damage == "format":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 0}))
    elif damage == "gone":
        Path(manifest.file).unlink()
    else:
        os.truncate(manifest.file, 100)
    np.testing.assert_array_equal(pixels_of(store.load(path)), random_pixels(SHAPE))


def test_an_unreadable_source_leaves_the_store_as_it_was(store: Store, tmp_path: Path) -> None:
    """No half file, no manifest."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    damaged = bytearray(path.read_bytes())
    damaged[200:1200] = bytes(1000)
    path.write_bytes(damaged)
    with pytest.raises(InvalidRecord, match=r"image\.ome\.parquet"):
        store.load(path)
    assert datasets_in(store) == []


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_an_arrow_file_takes_no_room(store: Store, tmp_path: Path, compression: str | None) -> None:
    """It is the store's by a name or by blocks that are shared; a compressed one is written out once, so that all can map it."""
    path = write_arrow(tmp_path / "image.arrow", random_pixels(SHAPE), compression)
    manifest = store.load(path)
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
    assert load_table(path, None).rows == 1


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
        Store(folder).load(tmp_path / "image.ome.parquet")
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
        Store(store).load(path)
    else:
        store.mkdir()
    path.chmod(source)
    store.chmod(folder)
    assert os.stat(Store(store).load(path).file).st_mode & 0o777 == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another group")
@pytest.mark.parametrize("source,expected", [(0o640, 0o600), (0o644, 0o644), (0o604, 0o600)])
def test_the_sources_group_is_not_the_stores(tmp_path: Path, source: int, expected: int) -> None:
    """What one group may read, another may not; and one that is shut out may not as one of the others."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    os.chown(path, -1, 12345)
    path.chmod(source)
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o755)
    assert os.stat(Store(tmp_path / "store").load(path).file).st_mode & 0o777 == expected


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
    manifest = store.load(path)
    write_arrow(path, random_pixels(SHAPE, seed=2))
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))
    path.unlink()
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))
    write_arrow(path, random_pixels(SHAPE, seed=3))
    new = store.load(path)
    assert new.version != manifest.version
    np.testing.assert_array_equal(pixels_of(new), random_pixels(SHAPE, seed=3))
    assert not Path(manifest.file).exists()


def test_a_source_on_another_file_system_is_opened_only_as_it_was(tmp_path: Path, other_device: Path) -> None:
    """It is served where it lies; another file in its place, or another content, is never taken for the version that was loaded."""
    store = Store(other_device / "store")
    path = write_arrow(tmp_path / "image.arrow", random_pixels(SHAPE))
    manifest = store.load(path)
    assert manifest.file == str(path)
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))
    stat = path.stat()
    write_arrow(path, random_pixels(SHAPE, seed=2))
    # The same size, and by chance the same time.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InvalidRecord, match=str(path)):
        manifest.table()
    assert not manifest.is_current
    np.testing.assert_array_equal(pixels_of(store.load(path)), random_pixels(SHAPE, seed=2))


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
    table = load_table(path, None if place == "no store" else Store(folder / "store"))
    dataset = Dataset("image", table, path.name, ChunkCache(0, 1 << 20))
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
    manifest = store.load(path)
    dataset = Dataset("image", manifest.table(), path.name, ChunkCache(0, 1 << 20))
    os.truncate(path, 100)
    dataset.check_unchanged()
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))


def test_a_parquet_file_may_be_changed(store: Store, tmp_path: Path) -> None:
    """The store's file is nobody else's."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    manifest = store.load(path)
    dataset = Dataset("image", manifest.table(), path.name, ChunkCache(0, 1 << 20))
    os.truncate(path, 100)
    dataset.check_unchanged()
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))


# --- sources that change while they are read -----------------------------------------------------------------------------------------


def test_a_source_that_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    """Once."""
    path = tmp_path / "file"
    path.write_text("0")

    def read(source: Source) -> str:
        text = source.file.read().decode()
        if int(text) < changes:
            (tmp_path / "next").write_text(str(int(text) + 1))
            (tmp_path / "next").replace(path)
        source.check()
        return text

    changes = 1
    assert read_source(path, read) == "1"
    changes = 9
    with pytest.raises(InvalidRecord, match="file is being changed while it is read"):
        read_source(path, read)


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
        versions.append(load_table(path, None).version)
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
                table = load_table(path, Store(tmp_path / "stores" / str(attempt)) if stored else None)
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
    before = store.load(path)
    number = inode(before.file)
    os.utime(path, ns=(1, 1))
    after = store.load(path)
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
    old = one.load(path)
    write(path, random_pixels(SHAPE, seed=2))
    new = other.load(path)
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
from ome_tensor_server.store import Store
store = Store(Path(sys.argv[1]))
store.load(Path(sys.argv[2]))
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
    used = store.load(paths[0])
    other = Store(store.folder)
    kept = [other.load(path) for path in paths][2]
    del other
    gc.collect()
    paths[0].unlink()
    paths[1].unlink()
    store.clean()
    assert {name for name in datasets_in(store) if name.endswith(".arrow")} == {Path(used.file).name, Path(kept.file).name}
    assert len(datasets_in(store)) == 4


def test_a_second_server_need_not_wait_for_anothers_conversion(store: Store, tmp_path: Path) -> None:
    """Of another dataset: what is there is served at once, and cleaning is left for a later time."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE))
    first = store.load(path)
    (store.folder / "0123456789abcdef-0123456789abcdef.arrow.tmp").write_text("being written")
    with (store.folder / ".lock").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other = Store(store.folder)
        other.clean()
        assert other.load(path) == first
        assert len(datasets_in(store)) == 3


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
    assert pixels.nbytes <= ParquetImages(path).decoded_bytes < 1.1 * pixels.nbytes + 1000


# In name spaces of its own, where /dev/shm is a small file system.
_AUTO = """
import gc, os, sys
from pathlib import Path
from ome_tensor_server.catalogue import load_table
from ome_tensor_server.store import open_store
path = Path(sys.argv[1])

def fill(leaving):
    with open("/dev/shm/filler", "wb") as file:
        free = os.statvfs("/dev/shm")
        file.write(bytes(free.f_bavail * free.f_frsize - leaving))

def started():
    store = open_store("auto", [path])
    store.clean()
    return store.load(path).file
"""


def auto(tmp_path: Path, script: str, size: int) -> list[str]:
    """The lines that a script printed, run where shared memory is of this many bytes."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels((1, 2, 2, 512, 512)))
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mount} || exit 99; exec "$@"', "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, sys.executable, "-c", _AUTO + script, str(path)], env=environment, capture_output=True, text=True, timeout=60
    )
    if done.returncode == 99 or "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"no small file system to be had: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_auto_goes_on_where_it_began(tmp_path: Path) -> None:
    """A second start finds the datasets of the first, though there is less room now; and so it does after shared memory was lost."""
    lines = auto(
        tmp_path,
        """
print(started())
fill(leaving=100_000)
print(started())
os.unlink("/dev/shm/filler")
os.system("rm -r /dev/shm/ome-tensor-*")
fill(leaving=3_000_000)
print(started())
os.unlink("/dev/shm/filler")
print(started())
""",
        6 << 20,
    )
    assert lines[0].startswith("/dev/shm/ome-tensor-")
    assert lines[1] == lines[0]
    # 2 MiB do not fit in half of 3 MB.
    assert lines[2].startswith(str(tmp_path / "cache"))
    assert lines[3] == lines[2]


def test_auto_goes_elsewhere_when_it_is_full(tmp_path: Path) -> None:
    """What fitted at the start may no longer fit; nothing is left where it did not."""
    lines = auto(
        tmp_path,
        """
store = open_store("auto", [path])
fill(leaving=1_000_000)
print(store.load(path).file)
print(*(name for name in os.listdir(store.folder) if not name.startswith(".")))
""",
        6 << 20,
    )
    assert len(lines) == 1
    assert lines[0].startswith(str(tmp_path / "cache"))


def test_memory_is_the_last_place(tmp_path: Path) -> None:
    """Where nobody has asked for a store, and there is no room anywhere; one that was asked for is full, and says so."""
    lines = auto(
        tmp_path,
        """
os.environ["XDG_CACHE_HOME"] = "/dev/shm/cache"
store = open_store("auto", [path])
fill(leaving=500_000)
print(load_table(path, store).file)
named = open_store("/dev/shm/named", [path])
try:
    load_table(path, named)
except OSError as error:
    print(error.errno)
print(*(name for name in os.listdir(named.folder) if not name.startswith(".")))
""",
        6 << 20,
    )
    assert lines == ["None", "28"]


_PEAK = """
import re, sys
from pathlib import Path
import pyarrow as pa
from ome_tensor_server.store import Store

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

store = Store(Path(sys.argv[1]))
before = status("VmRSS")
# The peak is forgotten.
Path("/proc/self/clear_refs").write_text("5")
store.load(Path(sys.argv[2]))
print(pa.default_memory_pool().max_memory(), status("VmHWM") - before)
"""


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_conversion_never_has_the_dataset_in_memory(tmp_path: Path, kind: str) -> None:
    """A few batches of it at most: Parquet's decoder needs several times what it gives."""
    batches, size = 32, 4 << 20
    path = write_images(tmp_path / "image", [random_pixels((1, 1, 1, 1024, size // 2048), seed=seed) for seed in range(batches)])
    table = pq.read_table(path)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=1, compression="zstd")
    else:
        with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table, max_chunksize=1)
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "store"), str(path)]
    pool, resident = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    print(f"{kind}: {pool / size:.1f} batches in Arrow's memory, {resident / size:.1f} in all")
    assert pool < (8 if kind == "parquet" else 3) * size
    assert resident < (18 if kind == "parquet" else 12) * size


_CONVERT = """
import sys
from pathlib import Path
from ome_tensor_server.store import Store
print("go", flush=True)
Store(Path(sys.argv[1])).load(Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_all_or_nothing(tmp_path: Path) -> None:
    """kill -9 while converting, at many moments: what is there afterwards is right, and clean() leaves nothing else."""
    pixels = random_pixels((1, 8, 2, 512, 512))
    path = write_image(tmp_path / "image.ome.parquet", pixels)
    finished = 0
    for attempt in range(24):
        store = Store(tmp_path / f"store{attempt}")
        command = [sys.executable, "-c", _CONVERT, str(store.folder), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            # Up to about the time that it takes; some get through.
            time.sleep(attempt * 0.004)
            process.send_signal(signal.SIGKILL)
        manifests = list(store.folder.glob("*.json"))
        finished += len(manifests)
        store.clean()
        left = [Path(name).suffix for name in datasets_in(store)]
        assert sorted(left) == ([".arrow", ".json"] if manifests else [])
        np.testing.assert_array_equal(pixels_of(store.load(path)), pixels)
    print(f"{finished} of 24 conversions were through when they were killed")
