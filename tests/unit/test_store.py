"""The store: what was converted is what was read, whole or not at all, and a restart parses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.integration.images import random_pixels, write_image, write_images

from ome_tensor import InvalidRecord, TensorView
from ome_tensor_server.catalogue import load_table
from ome_tensor_server.store import Manifest, Store

SHAPE = (1, 3, 2, 40, 50)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


def pixels_of(manifest: Manifest, column: str = "image", row: int = 0) -> np.ndarray:
    """An image of a mapped dataset."""
    return TensorView(manifest.table().images[column].slice(row, 1), layout="TZCYX").to_numpy()


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
    assert [file.name for file in store.folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_an_arrow_file_is_served_as_it_lies(store: Store, tmp_path: Path, compression: str | None) -> None:
    """Without a copy; a compressed one is written out once, so that all can map it."""
    table = pq.read_table(write_image(tmp_path / "image.ome.parquet", random_pixels(SHAPE)))
    path = tmp_path / "image.arrow"
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    manifest = store.load(path)
    assert (manifest.file == str(path)) == (compression is None)
    np.testing.assert_array_equal(pixels_of(manifest), random_pixels(SHAPE))
    # Pixels lie in a file, not in this process's memory.
    before = pa.total_allocated_bytes()
    kept = manifest.table()
    assert pa.total_allocated_bytes() - before < 100_000
    assert kept.nbytes > random_pixels(SHAPE).nbytes


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
        left = sorted(file.suffix for file in store.folder.iterdir() if file.name != ".lock")
        assert left == ([".arrow", ".json"] if manifests else [])
        np.testing.assert_array_equal(pixels_of(store.load(path)), pixels)
    print(f"{finished} of 24 conversions were through when they were killed")
