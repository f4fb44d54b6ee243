"""Sources that are served where they lie, while somebody changes them, or when they were made to do harm."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.integration.images import random_pixels, record_of
from tests.unit.tabular import column, entry_of, in_place, pixels_of, write, write_typed

from ome_tensor import InvalidArgument, InvalidRecord, LimitExceeded
from ome_tensor.tables import ImageTable
from ome_tensor_server.entries import Entry
from ome_tensor_server.in_place import Readers, open_in_place

#: What a reader may have in these tests.
LIMIT = 512 << 20


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    """Readers that keep nothing, and may not take much."""
    found = Readers(LIMIT, cache_bytes=0, patience=20)
    yield found
    found.close()


def gather(table: ImageTable, row: int = 0) -> np.ndarray:
    return pixels_of(table, row)


def write_zarr(path: Path, compressors: object = "auto", fill: int = 0) -> Path:
    """512 x 2048 pixels that are not 0, in two chunks."""
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(
        path, shape=(512, 2048), chunks=(256, 2048), dtype="uint16", zarr_format=2, fill_value=fill, compressors=compressors
    )
    array[:] = 1 + random_pixels((512, 2048)) % 1000
    return path


def remove_chunk(path: Path) -> None:
    (path / "1.0").unlink()


def remove_all(path: Path) -> None:
    shutil.rmtree(path)


def rewrite(path: Path) -> None:
    chunk = path / "1.0"
    content = chunk.read_bytes()
    chunk.with_name("new").write_bytes(content)
    chunk.with_name("new").replace(chunk)


def swap(path: Path) -> None:
    """The same folder made anew, files' times kept: what a tool that copies does."""
    shutil.copytree(path, path.with_name("copy"))
    shutil.rmtree(path)
    path.with_name("copy").rename(path)


@pytest.mark.parametrize("change", [remove_chunk, remove_all, rewrite, swap])
def test_a_zarr_that_changes_is_never_read_as_zeros(tmp_path: Path, readers: Readers, change: Callable[[Path], None]) -> None:
    """Right after a read: no time has to pass until it is noticed, and nothing of it is kept."""
    table = in_place(write_zarr(tmp_path / "a.zarr"), readers)
    first = table.image("image", 0).pixels
    whole = gather(table)
    assert whole.all()
    change(tmp_path / "a.zarr")
    for _ in range(2):
        with pytest.raises(InvalidRecord, match=r"a\.zarr was changed while it is served; refresh it") as caught:
            gather(table)
        assert caught.value.field == "path"
    assert first.meta.extent.y == 512


def test_a_chunk_that_comes_to_be_is_a_change(tmp_path: Path, readers: Readers) -> None:
    path = write_zarr(tmp_path / "a.zarr", fill=7)
    content = (path / "1.0").read_bytes()
    (path / "1.0").unlink()
    table = in_place(path, readers)
    assert (gather(table)[..., 256:, :] == 7).all()
    (path / "1.0").write_bytes(content)
    with pytest.raises(InvalidRecord, match="was changed while it is served"):
        gather(table)


def test_what_is_not_read_may_change(tmp_path: Path, readers: Readers) -> None:
    """A look at every file of a large folder would take longer than reading one."""
    from ome_tensor.selection import Selection

    path = write_zarr(tmp_path / "a.zarr")
    pixels = in_place(path, readers).image("image", 0).pixels
    out = np.empty((1, 1, 1, 10, 2048), np.uint16)
    remove_chunk(path)
    pixels.gather(Selection((0,), (0,), (0,), 0, 0, 2048, 10), out)
    assert out.all()
    with pytest.raises(InvalidRecord, match="was changed"):
        pixels.gather(Selection((0,), (0,), (0,), 0, 300, 2048, 10), out)


def test_a_file_that_is_cut_off(tmp_path: Path, readers: Readers) -> None:
    """A `.npy` is mapped: what is not there any more ends the process that touches it, which is not this one."""
    pixels = random_pixels((1024, 2048))
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "b.npy", pixels)
    table = in_place(tmp_path / "a.npy", readers)
    np.testing.assert_array_equal(gather(table)[0, 0, 0], pixels)
    os.truncate(tmp_path / "a.npy", 4096)
    with pytest.raises(InvalidRecord, match=r"a\.npy"):
        gather(table)
    np.testing.assert_array_equal(gather(in_place(tmp_path / "b.npy", readers))[0, 0, 0], pixels)


@pytest.mark.parametrize("kind", ["tiff", "parquet", "typed", "arrow"])
def test_other_files_that_change(tmp_path: Path, readers: Readers, kind: str) -> None:
    images = [random_pixels((1, 1, 1, 64, 80), seed=seed) for seed in range(2)]
    if kind == "tiff":
        tifffile = pytest.importorskip("tifffile")
        pytest.importorskip("zarr", reason="the reader of TIFF files needs zarr")
        path = changed = tmp_path / "a.tiff"
        tifffile.imwrite(path, images[0][0, 0], ome=True, metadata={"axes": "CYX"})
    elif kind in ("parquet", "arrow"):
        path = changed = write(tmp_path / "a", pa.table({"image": column([*images])}), kind, rows=1)
    else:
        path = write_typed(tmp_path / "a", {str(row): image for row, image in enumerate(images)}, rows=1)
        changed = path / "chunks.parquet"
    table = in_place(path, readers)
    last = 0 if kind == "tiff" else 1
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + b"?")
    with pytest.raises(InvalidRecord, match="was changed while it is served"):
        gather(table, last)


def test_blocks_are_kept(tmp_path: Path) -> None:
    """For the next read of the same image, whoever asks; with a look at each block that is read, and none at what is kept."""
    readers = Readers(cache_bytes=Readers.most << 22)
    path = write_zarr(tmp_path / "a.zarr")
    for _ in range(3):
        gather(in_place(path, readers))
    assert (readers.hits, readers.misses) == (4, 2)
    readers.close()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_bomb_in_a_chunk(tmp_path: Path, readers: Readers) -> None:
    """A chunk of half a megabyte that unpacks to more than a reader may have."""
    pytest.importorskip("zarr")
    from numcodecs import GZip

    path = write_zarr(tmp_path / "a.zarr", GZip())
    packer = zlib.compressobj(1, wbits=31)
    packed = b"".join([packer.compress(bytes(1 << 24)) for _ in range(64)] + [packer.flush()])
    assert len(packed) < 8 << 20
    (path / "1.0").write_bytes(packed)
    before = peak()
    with pytest.raises((LimitExceeded, InvalidRecord), match=r"a\.zarr"):
        gather(in_place(path, readers))
    assert peak() - before < 64 << 20


@pytest.mark.parametrize("where", ["pixels", "others"])
def test_a_bomb_of_a_dictionary(tmp_path: Path, readers: Readers, where: str) -> None:
    """One value of some megabytes, and a thousand rows that are it: its footer says what is stored, and not what that stands for."""
    size, rows = 1024, 600
    image = pa.array([record_of(np.ones((1, 1, 1, size, size), np.uint16))])
    image = (
        image.take(pa.array([0] * rows))
        if where == "pixels"
        else pa.array([record_of(np.ones((1, 1, 1, 2, 2), np.uint16))] * rows)
    )
    word = pa.array(["x" * (1 << 21)] * rows if where == "others" else ["x"] * rows)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": image, "word": word}), path, compression="zstd", row_group_size=rows)
    assert path.stat().st_size < 16 << 20
    before = peak()
    with pytest.raises((LimitExceeded, InvalidRecord), match=r"a\.parquet"):
        gather(in_place(path, readers))
    assert peak() - before < 64 << 20


def test_a_reader_that_dies_is_replaced(tmp_path: Path) -> None:
    """Many threads read all the while."""
    readers = Readers(LIMIT, cache_bytes=0)
    table = in_place(write_zarr(tmp_path / "a.zarr"), readers)
    whole = gather(table)
    with ThreadPoolExecutor(8) as threads:
        reads = [threads.submit(gather, table) for _ in range(24)]
        for _ in range(5):
            for number in readers.processes:
                os.kill(number, signal.SIGKILL)
        for read in reads:
            np.testing.assert_array_equal(read.result(60), whole)
    assert len(readers.processes) <= Readers.most
    readers.close()


def test_a_source_that_leads_out_of_its_root_by_now(tmp_path: Path, readers: Readers) -> None:
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "secret.npy", tmp_path / "folder" / "a.npy"):
        np.save(place, random_pixels((4, 5)))
    from dataclasses import replace

    entry: Entry = replace(entry_of(tmp_path / "folder" / "a.npy"), root=os.path.realpath(tmp_path / "folder"))
    open_in_place(entry, readers)
    (tmp_path / "folder" / "a.npy").unlink()
    (tmp_path / "folder" / "a.npy").symlink_to(tmp_path / "secret.npy")
    with pytest.raises(InvalidArgument, match=r"a\.npy leads out of the folder"):
        open_in_place(entry, readers)


def test_what_was_looked_at_and_changed_before_it_was_opened(tmp_path: Path, readers: Readers) -> None:
    np.save(tmp_path / "a.npy", random_pixels((4, 5)))
    entry = entry_of(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", random_pixels((40, 50)))
    with pytest.raises(InvalidRecord, match=r"a\.npy was changed while it is served; refresh it"):
        open_in_place(entry, readers)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(InvalidRecord, match=r"a\.npy was changed while it is served; refresh it"):
        open_in_place(entry, readers)
