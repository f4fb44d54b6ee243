"""Readers of tables: Parquet, Arrow files and streams, typed chunk datasets, Vortex. What was written is what is served, loaded or in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.integration.images import random_pixels
from tests.unit.tabular import (
    ENCODINGS,
    FORMATS,
    LOADER,
    column,
    in_place,
    load,
    loaded,
    pixels_of,
    tile_of,
    write,
    write_typed,
)

from ome_tensor import InvalidRecord, LimitExceeded, MissingDependency, OmeTensorError
from ome_tensor.blocks import ChunkCache
from ome_tensor.tables import LEVEL, LEVEL_OF, ImageTable
from ome_tensor_server.in_place import Readers, shared_readers
from ome_tensor_server.loading import Loader, load_anonymous
from ome_tensor_server.readers import detect, parquet
from ome_tensor_server.readers.detect import fingerprint, looks_like_source, open_source
from ome_tensor_server.readers.parquet import ParquetSource

DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")
SHARED = Path(os.environ.get("OME_TENSOR_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))

round_trips = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def image_lists(draw: st.DrawFn, dtype: str) -> list[np.ndarray | None]:
    """Some images of one dtype, of any size, and rows without one."""
    images: list[np.ndarray | None] = []
    for seed in range(draw(st.integers(1, 4))):
        shape = draw(st.tuples(*(st.integers(1, most) for most in (2, 3, 2, 20, 20))))
        images.append(None if seed and draw(st.booleans()) else random_pixels(shape, dtype, seed))
    return images


# --- round trips -------------------------------------------------------------------------------------------------------------------


@round_trips
@given(data=st.data(), dtype=st.sampled_from(DTYPES), encoding=st.sampled_from(ENCODINGS), kind=st.sampled_from(FORMATS))
def test_what_was_written_is_read(tmp_path: Path, data: st.DataObject, dtype: str, encoding: str, kind: str) -> None:
    """Any dtype, shape, chunking and encoding, in any file."""
    images = data.draw(image_lists(dtype))
    block = data.draw(st.tuples(*(st.integers(1, most) for most in (3, 20, 20))))
    table = pa.table({"image": column(images, encoding, block), "well": [f"A{row}" for row in range(len(images))]})
    path = write(tmp_path / "file", table, kind, data.draw(st.integers(1, 3)))
    info = LOADER.describe(str(path))
    assert (info.rows, list(info.images), info.others) == (len(images), ["image"], [["well", "string"]])
    assert info.fingerprint == fingerprint(str(path))
    tables = [loaded(path)] if info.not_in_place else [loaded(path), in_place(path)]
    assert bool(info.not_in_place) == (kind not in ("parquet", "arrow"))
    for found in tables:
        assert found.metadata is not None
        assert found.metadata.column("well").to_pylist() == table.column("well").to_pylist()
        assert found.columns["image"].is_valid().tolist() == [image is not None for image in images]
        for row, image in enumerate(images):
            if image is not None:
                array = pixels_of(found, row)
                assert array.dtype == image.dtype
                np.testing.assert_array_equal(array, image)


@round_trips
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rows=st.integers(1, 5), index=st.booleans())
def test_typed_chunks_are_read(tmp_path: Path, data: st.DataObject, dtype: str, rows: int, index: bool) -> None:
    """Chunks of several times and channels too, of images that differ in size."""
    images = {f"image {row}": image for row, image in enumerate(data.draw(image_lists(dtype))) if image is not None}
    block = data.draw(st.tuples(*(st.integers(1, most) for most in (2, 2, 3, 20, 20))))
    path = write_typed(tmp_path / "set", images, block, rows=rows, index=index, others={"plate": [7] * len(images)})
    info = LOADER.describe(str(path))
    assert (info.format, info.rows, list(info.images)) == ("typed-chunks", len(images), ["image"])
    assert (info.others, info.fingerprint) == ([["plate", "int64"]], fingerprint(str(path)))
    for found in (loaded(path), in_place(path)):
        assert found.metadata is not None
        assert found.metadata.column("plate").to_pylist() == [7] * len(images)
        for row, (name, image) in enumerate(images.items()):
            assert found.columns["image"].meta(row).id == name
            array = pixels_of(found, row)
            assert array.dtype == image.dtype
            np.testing.assert_array_equal(array, image)
    # Another one with other files takes its place.
    for file in path.iterdir():
        file.unlink()


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_what_upstream_writes_is_read(tmp_path: Path, data: st.DataObject, dtype: str) -> None:
    """Its typed chunk datasets, of any layout."""
    upstream = pytest.importorskip("ome_arrow.dataset")
    images = [image for image in data.draw(image_lists(dtype)) if image is not None]
    upstream.write_ome_arrow_dataset(
        [image.swapaxes(1, 2) for image in images],
        tmp_path / "set",
        layout=data.draw(st.sampled_from(["auto", "image", "tile", "volume", "z-plane", "block", "hybrid"])),
        compression=data.draw(st.sampled_from([None, "zstd", "snappy"])),
        build_physical_index=data.draw(st.booleans()),
        chunk_rows_per_row_group=data.draw(st.integers(1, 4)),
    )
    table = loaded(tmp_path / "set")
    theirs = upstream.OMEArrowDataset(tmp_path / "set")
    for row, (name, image) in enumerate(zip(theirs.image_ids, images, strict=True)):
        np.testing.assert_array_equal(theirs.read_image(name).swapaxes(1, 2), image)
        np.testing.assert_array_equal(pixels_of(table, row), image)
        assert table.columns["image"].meta(row).id == name


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(DTYPES), encoding=st.sampled_from(ENCODINGS))
def test_vortex_is_read(tmp_path: Path, data: st.DataObject, dtype: str, encoding: str) -> None:
    """What its own package writes."""
    vortex = pytest.importorskip("vortex", reason="vortex-data is not installed")
    images = data.draw(image_lists(dtype))
    table = pa.table({"image": column(images, encoding, (1, 8, 8)), "well": [f"A{row}" for row in range(len(images))]})
    vortex.io.write(table, str(tmp_path / "file.vortex"))
    found = loaded(tmp_path / "file.vortex")
    assert found.metadata is not None
    assert found.metadata.to_pydict() == table.drop_columns(["image"]).to_pydict()
    for row, image in enumerate(images):
        if image is not None:
            array = pixels_of(found, row)
            assert array.dtype == image.dtype
            np.testing.assert_array_equal(array, image)


@pytest.mark.parametrize("name", ["chunks.ome.parquet", "planes.ome.parquet", "bytes.ome.parquet", "typed-chunks.ome-arrow"])
def test_stores_of_one_image_are_equal(name: str) -> None:
    """Real ones, through every reader, loaded and in place."""
    path, other = SHARED / f"idr0062a-6001240.{name}", SHARED / "idr0062a-6001240.bytes.ome.parquet"
    if not path.exists():
        pytest.skip(f"{path} is absent: set OME_TENSOR_TEST_DATA")
    expected = pixels_of(loaded(other))
    assert expected.shape == (1, 16, 2, 275, 271)
    for table in (loaded(path), in_place(path, shared_readers(0, Readers.most << 26))):
        array = pixels_of(table)
        assert array.dtype == np.uint16
        np.testing.assert_array_equal(array, expected)


def test_a_table_of_cells_is_read() -> None:
    """As CytoDataFrame writes it: fields in another order, wide integers, columns of nothing."""
    path = SHARED / "jump-BR00117006.ome.parquet"
    if not path.exists():
        pytest.skip(f"{path} is absent: set OME_TENSOR_TEST_DATA")
    source = pq.read_table(path)
    for table in (loaded(path), in_place(path, shared_readers(0, Readers.most << 26))):
        assert len(table.columns) == 8
        assert table.metadata is not None
        assert table.metadata.equals(source.drop_columns(list(table.columns)).replace_schema_metadata())
        for name in table.columns:
            for row in range(3):
                values = source.column(name)[row]["planes"].values.field("pixels").flatten().to_numpy()
                # Composites in three colours say that they have one channel.
                with pytest.raises(InvalidRecord, match="pixels length") if name.endswith("_COMP") else nullcontext():
                    np.testing.assert_array_equal(pixels_of(table, row, name).ravel(), values)


# --- other columns ---------------------------------------------------------------------------------------------------------------------


IMAGES = [random_pixels((1, 1, 1, 5, 7), seed=seed) for seed in range(4)]


@pytest.mark.parametrize("kind", FORMATS)
def test_other_columns_are_kept(tmp_path: Path, kind: str) -> None:
    """Dictionaries as the values that they stand for, also deep inside; all else as it is."""
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0], pa.int8()), ["a", "b"])
    table = pa.table(
        {
            "word": words,
            "image": column([*IMAGES]),
            "number": pa.array([1.5, None, 3.5, 4.5], pa.float32()),
            "day": pa.array([0, 1, 2, None], pa.date32()),
            "list": pa.array([[1], [], None, [2, 3]], pa.list_(pa.int16())),
            "map": pa.array([[("k", 1)], [], None, []], pa.map_(pa.string(), pa.int64())),
            "nothing": pa.nulls(4),
            "deep": pa.StructArray.from_arrays([words, pa.array([1, 2, 3, 4])], ["word", "n"]),
            "id": pa.array([bytes([row] * 16) for row in range(4)], pa.binary(16)),
        }
    )
    found = load(write(tmp_path / "file", table, kind, 2))
    assert found.metadata is not None
    assert found.metadata.to_pydict() == table.drop_columns(["image"]).to_pydict()
    assert [name for name, _ in found.others] == [name for name in table.schema.names if name != "image"]
    # Parquet has its own ideas of which indices are wide enough.
    assert dict(found.others)["word"].startswith("dictionary<values=string")
    if kind != "arrow":
        assert found.metadata.schema.field("word").type == pa.string()
        assert found.metadata.schema.field("deep").type == pa.struct({"word": pa.string(), "n": pa.int64()})


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_of_levels_are_not_images_of_their_own(tmp_path: Path, kind: str) -> None:
    """They belong to the images that they are levels of."""
    halves: list[np.ndarray | None] = [np.ascontiguousarray(image[..., ::2, ::2]) for image in IMAGES[:3]]
    table = pa.table({"image": column([*IMAGES]), "level": column([*halves, None]), "well": list("abcd")})
    marked = table.schema.field("level").with_metadata({LEVEL: b"1", LEVEL_OF: b"image"})
    table = table.cast(table.schema.set(1, marked))
    found = loaded(write(tmp_path / "file", table, kind))
    assert list(found.columns) == ["image"]
    assert found.metadata is not None
    assert found.metadata.schema.names == ["well"]
    assert [level.shape for level in found.levels("image", 0)] == [(1, 1, 1, 5, 7), (1, 1, 1, 3, 4)]
    assert len(found.levels("image", 3)) == 1
    np.testing.assert_array_equal(
        np.asarray(found.image(None, 2, 1).pixels.index.blocks.flat(0)), IMAGES[2][..., ::2, ::2].ravel()
    )


def test_a_list_view_is_refused(tmp_path: Path) -> None:
    """Arrow would make something else of it."""
    table = pa.table({"image": column([*IMAGES]), "odd": pa.array([[1], [2], None, []], pa.list_view(pa.int8()))})
    with pytest.raises(InvalidRecord, match=r"column 'odd' of file cannot be read: it is of type list_view<"):
        load(write(tmp_path / "file", table, "stream"))


def test_a_large_row_group_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what its footer says of its size."""
    monkeypatch.setattr("ome_tensor_server.readers.parquet._PIECE", 4 * 5 * 7 * 2)
    images = [random_pixels((1, 1, 1, 5, 7), seed=seed) for seed in range(50)]
    path = write(tmp_path / "file", pa.table({"image": column([*images], "chunks", (1, 5, 7))}))
    with ParquetSource(str(path)) as source, (tmp_path / "out").open("wb") as file:
        written: list[int] = []
        source.write(file, written.append)
    with pa.ipc.open_file(tmp_path / "out") as reader:
        assert 15 < reader.num_record_batches <= 50
    assert written == sorted(written)
    np.testing.assert_array_equal(pixels_of(loaded(tmp_path / "out"), 49), images[49])


# --- damage ------------------------------------------------------------------------------------------------------------------------------


def read_all(path: Path, make: Callable[[Path], ImageTable] = loaded) -> None:
    """Every image of a source, whatever its columns are called: a damaged byte may be in a name."""
    table = make(path)
    for name, images in table.columns.items():
        for row in range(table.rows):
            if not images.is_image(row):
                continue
            try:
                pixels_of(table, row, name)
            except MemoryError:
                # All of an image whose damaged header says terabytes. Nobody else asks for that: a server makes tiles.
                tile_of(table, row, name)


def refused(path: Path) -> str:
    """The error of a source that cannot be read; it names the file, and not where that is."""
    with pytest.raises((InvalidRecord, LimitExceeded)) as caught:
        read_all(path)
    assert str(path.parent) not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str) -> None:
    """Wherever it ends; but a stream may end after any record batch."""
    path = write(tmp_path / "file", pa.table({"image": column([*IMAGES], "chunks")}), kind, 2)
    whole = path.read_bytes()
    step = len(whole) // 30
    for size in range(0, len(whole) - 1, step):
        path.write_bytes(whole[:size])
        try:
            assert "file" in refused(path)
        except pytest.fail.Exception:
            assert kind.startswith("stream")
            assert load(path).rows in (0, 2, 4)


def test_a_footer_that_lies_is_refused(tmp_path: Path) -> None:
    """Fewer rows, or more than there are."""
    path = write(tmp_path / "file", pa.table({"image": column([*IMAGES])}))
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # The number of rows is a varint after the schema: 4 rows are 0x08, and 0x0a would be 5.
    places = [place for place in range(footer, len(data) - 8) if data[place] == 8]
    seen = 0
    for place in places:
        path.write_bytes(data[:place] + b"\x0a" + data[place + 1 :])
        try:
            table = load(path)
        except (InvalidRecord, LimitExceeded, OSError) as error:
            seen += "rows" in str(error)
        else:
            assert table.rows == 4
    assert seen


def test_text_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    """Naming the column."""
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    for kind in FORMATS:
        path = write(tmp_path / "file", pa.table({"image": column([IMAGES[0]]), "text": bad}), kind)
        assert "column 'text' of file is damaged" in refused(path)


def test_offsets_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    """Of a file that would be served as it lies."""
    path = write(tmp_path / "file", pa.table({"image": column([random_pixels((1, 1, 1, 11, 13))], "chunks")}), "arrow")
    offsets = np.array([0, 11 * 13], np.int32).tobytes()
    data = path.read_bytes()
    # What comes first describes the buffers.
    place = data.rindex(offsets)
    path.write_bytes(data[:place] + np.array([0, 1 << 30], np.int32).tobytes() + data[place + len(offsets) :])
    assert "column 'image' of file is damaged" in refused(path)


@pytest.mark.parametrize("kind", ["parquet zstd", "stream zstd", "vortex"])
def test_a_bomb_is_refused(tmp_path: Path, kind: str) -> None:
    """A small file that becomes large: by the memory that a reader may have, and it is ready for the next one."""
    count = 1 << 27
    lists = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.uint8)))
    pixels: Any = pa.array([bytes(count)]) if kind == "parquet zstd" else lists
    planes = pa.StructArray.from_arrays([pa.array([0])] * 3 + [pixels], ["t", "z", "c", "pixels"])
    meta = pa.array([{f"size_{axis}": size for axis, size in zip("tzcyx", (1, 1, 1, 1 << 13, 1 << 14), strict=True)}])
    image = pa.StructArray.from_arrays(
        [meta, pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), planes)], ["pixels_meta", "planes"]
    )
    table, path = pa.table({"image": image}), tmp_path / "file"
    if kind == "vortex":
        pytest.importorskip("vortex", reason="vortex-data is not installed").io.write(table, str(path))
    else:
        write(path, table, kind)
    assert path.stat().st_size < 1 << 20
    loader = type(LOADER)(200 << 20)
    good = write(tmp_path / "good", pa.table({"image": column([*IMAGES])}))
    try:
        with open(os.memfd_create("target"), "r+b") as target:
            with pytest.raises((LimitExceeded, InvalidRecord), match="more memory"):
                loader.load(str(path), target.fileno())
            assert loader.load(str(good), target.fileno()).info.rows == 4
    finally:
        loader.close()


def test_what_is_no_source_is_said(tmp_path: Path) -> None:
    """A text, a folder of something else, a pipe, nothing at all."""
    (tmp_path / "text").write_text("no image")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("text", "folder", "pipe"):
        assert not looks_like_source(tmp_path / name)
        with pytest.raises(InvalidRecord, match=f"{name} is of no format that this server reads"):
            LOADER.describe(str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        LOADER.describe(str(tmp_path / "nothing"))
    assert fingerprint(str(tmp_path / "nothing")) is None
    assert fingerprint("https://example.org/image.zarr") is None


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With how to get it."""
    (tmp_path / "file").write_bytes(b"VTXF" + bytes(100))

    def missing(_: str) -> Any:
        raise ModuleNotFoundError("no vortex", name="vortex")

    monkeypatch.setattr(detect, "import_module", missing)
    with pytest.raises(MissingDependency, match=r'file needs the package vortex: pip install "ome-tensor\[vortex\]"'):
        open_source(str(tmp_path / "file"))


# --- damaged typed chunk datasets --------------------------------------------------------------------------------------------------------

CHUNKED = {"a": random_pixels((2, 2, 2, 10, 12)), "b": random_pixels((1, 1, 1, 5, 7), seed=1)}

Rows = list[dict[str, Any]]


def change(number: int, **values: Any) -> Callable[[Rows], None]:
    """A change of one row."""
    return lambda rows: rows[number].update(values)


def drop(number: int) -> Callable[[Rows], None]:
    """A row less."""
    return lambda rows: rows.__delitem__(number)


@pytest.mark.parametrize("in_place_too", [False, True])
@pytest.mark.parametrize(
    "table,damage,message",
    [
        ("chunks", drop(1), "chunk missing"),
        ("chunks", lambda rows: rows.append(rows[1]), "overlap"),
        ("chunks", change(1, pixel_bytes=bytes(5)), r"chunk \(t=0, z=1, c=0, y=0, x=0\) of shape .* has 5 bytes, not 240"),
        ("chunks", change(1, pixel_bytes=None), "has 0 bytes, not 240"),
        ("chunks", change(1, dtype="float64"), "not 960"),
        ("chunks", change(1, dtype="object"), "'object' is not a pixel type"),
        ("chunks", change(1, x=1), "out of range of the image"),
        ("chunks", change(1, z=-1), "out of range of the image"),
        ("chunks", change(1, shape_y=1 << 31, shape_x=1 << 31), "out of range of the image"),
        ("chunks", change(1, shape_y=0), "out of range of the image"),
        ("chunks", change(1, y=None), "y must be integers, none missing"),
        ("chunks", change(1, image_id="c"), "of image 'c', which is not in images.parquet"),
        ("images", change(0, size_y=1 << 31, size_x=1 << 31), "too large"),
        ("images", change(0, size_x=0), "out of range of the image"),
        ("images", change(0, dtype="unknown"), "'unknown' is not a pixel type"),
        ("images", change(0, image_id="b"), "image_id must differ"),
        ("index", change(1, z=0), "index.parquet: it contradicts chunks.parquet|chunks overlap"),
        ("index", change(1, image_id="b"), "index.parquet: it contradicts|out of range of the image"),
        ("index", drop(1), "index.parquet: it does not list the chunks that there are"),
        ("index", change(1, row_group_id=1 << 30), "index.parquet: it does not list the chunks that there are"),
        ("index", change(1, fragment_path="../chunks.parquet"), "names a file that does not lie in it"),
        ("index", change(1, fragment_path="/etc/passwd"), "names a file that does not lie in it"),
        ("index", change(1, fragment_path="nothing.parquet"), "it has no file 'nothing.parquet'"),
        ("index", change(1, fragment_path="_ome_arrow_dataset.json"), "_ome_arrow_dataset.json: "),
        ("index", change(1, fragment_path=""), "names a file that does not lie in it"),
    ],
)
def test_damaged_chunks_are_refused(
    tmp_path: Path, table: str, damage: Callable[[Rows], None], message: str, in_place_too: bool
) -> None:
    """When the dataset is loaded or the image is read; the same in place."""
    path = write_typed(tmp_path / "set", CHUNKED, (1, 1, 1, 10, 12), index=table == "index", changes={table: damage})
    with pytest.raises(InvalidRecord, match=message):
        read_all(path, in_place if in_place_too else loaded)


@pytest.mark.parametrize("mark", ["", "[]", "{}", '{"layout": "other"}', "[" * 100_000, '{"layout": "' + "x" * (1 << 20) + '"}'])
def test_another_mark_is_refused(tmp_path: Path, mark: str) -> None:
    """A folder with such a file need not be upstream's."""
    path = write_typed(tmp_path / "set", CHUNKED)
    (path / "_ome_arrow_dataset.json").write_text(mark)
    assert "does not say that its layout is typed-chunk-dataset" in refused(path)


def test_links_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    """Whatever they lead to; those inside are fine."""
    path = write_typed(tmp_path / "set", CHUNKED)
    os.rename(path / "chunks.parquet", path / "real")
    (path / "chunks.parquet").symlink_to("real")
    np.testing.assert_array_equal(pixels_of(loaded(path)), CHUNKED["a"])
    os.rename(path / "real", tmp_path / "outside")
    (path / "chunks.parquet").unlink()
    (path / "chunks.parquet").symlink_to("../outside")
    assert "set has a link that leads out of it: chunks.parquet" in refused(path)
    assert fingerprint(str(path)) is None


def test_what_channels_are_called(tmp_path: Path) -> None:
    """As far as ``channels_json`` says it; what is not what it should be counts as absent."""
    text = r"""[{"id": "ch-0", "name": "DNA \ud800", "emission_um": 0.461, "excitation_um": "x", "color_rgba": 4278190335}, 7,
               {"name": 3, "illumination": "Epifluorescence", "emission_um": 1e999, "color_rgba": -1}]"""
    for said, names in ((text, ["DNA ?", ""]), ("[" * 100_000, []), ("{}", []), (None, [])):
        path = write_typed(tmp_path / "set", {"a": CHUNKED["a"]}, changes={"images": change(0, channels_json=said)})
        meta = loaded(path).columns["image"].meta(0)
        assert [channel.name for channel in meta.channels] == names
        if names:
            first, second = meta.channels
            assert (first.id, first.emission_um, first.excitation_um, first.color_rgba) == ("ch-0", 0.461, None, 0xFF0000FF)
            assert (second.illumination, second.emission_um, second.color_rgba) == ("Epifluorescence", None, 0xFFFFFFFF)


def test_fragments_of_chunks_are_read(tmp_path: Path) -> None:
    """An index may name several files."""
    path = write_typed(tmp_path / "set", CHUNKED, (1, 1, 1, 5, 12), rows=3)
    chunks, index = pq.read_table(path / "chunks.parquet"), pq.read_table(path / "index.parquet").to_pylist()
    (path / "more").mkdir()
    pq.write_table(chunks.slice(0, 9), path / "chunks.parquet", row_group_size=3)
    pq.write_table(chunks.slice(9), path / "more" / "chunks.parquet", row_group_size=3)
    for row in index[9:]:
        row["fragment_path"] = "more/chunks.parquet"
        row["row_group_id"] -= 3
    pq.write_table(pa.Table.from_pylist(index[::-1]), path / "index.parquet")
    for found in (loaded(path), in_place(path)):
        for row, image in enumerate(CHUNKED.values()):
            np.testing.assert_array_equal(pixels_of(found, row), image)


def blank_images(path: Path, rows: int, size: int, *, group: int | None = None) -> Path:
    """Rows that all hold the same image, which a Parquet file has once."""
    one = column([np.full((1, 1, 1, size, size), 7, np.uint16)], "bytes", (1, size, size))
    table = pa.table({"image": pa.concat_arrays([one] * rows)})
    pq.write_table(table, path, row_group_size=group or rows)
    return path


def test_what_a_file_stores_once_for_many_rows(tmp_path: Path) -> None:
    """800 MB in a file of a few: its size is told by the images', and it is loaded by a reader that may have less than that."""
    path = blank_images(tmp_path / "a.parquet", 400, 1024)
    assert path.stat().st_size < 16 << 20
    loader = Loader(512 << 20)
    with open_source(str(path)) as source:
        assert 400 << 21 <= source.nbytes < 1.05 * (400 << 21)
        assert "largest row group takes 800 MiB" in source.not_in_place
    table = ImageTable("dataset", load_anonymous(str(path), loader), ChunkCache(1 << 20))
    loader.close()
    for row in (0, 31, 32, 200, 399):
        assert (pixels_of(table, row) == 7).all()


@pytest.mark.parametrize("sizes", [(1, 1000), (1000, 1), (500, 500)])
def test_rows_that_differ_in_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]) -> None:
    """Pieces get smaller where rows turn out larger than those before; no row is lost, and none comes twice."""
    monkeypatch.setattr(parquet, "_PIECE", 1 << 14)
    words = ["x" * sizes[row % 60 > 30] for row in range(300)]
    images = [random_pixels((1, 1, 1, 3, 4), seed=row) for row in range(300)]
    table = pa.table({"image": column([*images]), "word": pa.array(words), "n": range(300)})
    path = write(tmp_path / "a", table, rows=150)
    with open_source(str(path)) as source, (tmp_path / "out").open("wb") as file:
        source.write(file, lambda _: None)
    found = pa.ipc.open_file(tmp_path / "out").read_all()
    assert found.column("n").to_pylist() == list(range(300))
    assert found.column("word").to_pylist() == words


def test_a_source_that_changes_while_it_is_served_in_place_is_noticed(tmp_path: Path) -> None:
    """Before any of its bytes are taken for those of before."""
    parquet = write(tmp_path / "file", pa.table({"image": column([*IMAGES])}), rows=1)
    typed = write_typed(tmp_path / "set", CHUNKED, rows=1)
    for path, changed in ((parquet, parquet), (typed, typed / "chunks.parquet")):
        table = in_place(path)
        pixels_of(table, 0)
        os.utime(changed, ns=(1, 1))
        with pytest.raises(InvalidRecord, match="was changed while it is served"):
            pixels_of(table, 1)
        np.testing.assert_array_equal(pixels_of(in_place(path), 1), pixels_of(loaded(path), 1))


def test_row_groups_are_kept_within_the_cache(tmp_path: Path) -> None:
    """What is served in place is read once as long as there is room, and one that there is none for, once for all of its rows in turn."""
    images = [random_pixels((1, 1, 1, 64, 64), seed=seed) for seed in range(8)]
    path = write(tmp_path / "file", pa.table({"image": column([*images], "bytes", (1, 64, 64))}), rows=1)
    readers = Readers(cache_bytes=Readers.most * 4 * 9000)
    table = in_place(path, readers)
    for row in (0, 1, 2, 0, 1, 2, 7, 6, 5, 4, 7, 0):
        np.testing.assert_array_equal(pixels_of(table, row), images[row])
    assert readers.misses == len([0, 1, 2, 7, 6, 5, 4, 0])
    readers.close()
    path = write(tmp_path / "large", pa.table({"image": column([*images], "bytes", (1, 64, 64))}), rows=8)
    readers = Readers(cache_bytes=0)
    table = in_place(path, readers)
    for row, image in enumerate(images):
        np.testing.assert_array_equal(pixels_of(table, row), image)
    assert readers.misses == 1
    readers.close()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_size_of_terabytes_takes_no_memory(tmp_path: Path, kind: str) -> None:
    """One damaged byte makes it of a small one: what is there can be read, and what is not is refused."""
    (record,) = column([IMAGES[0]], "chunks").to_pylist()
    record["pixels_meta"]["size_z"] = 2**31 - 1
    path = write(tmp_path / "file", pa.table({"image": pa.array([record], column([IMAGES[0]], "chunks").type)}), kind, 1)
    with suppress(OmeTensorError):
        read_all(path)
    with pytest.raises((InvalidRecord, MemoryError)):
        pixels_of(loaded(path))


@pytest.mark.parametrize("kind", [*FORMATS, "typed"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_is_more_than_an_error(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Bytes changed anywhere: read all the same, or refused by name; the reader goes on."""
    if kind == "typed":
        folder = write_typed(tmp_path / "set", CHUNKED, (2, 1, 1, 10, 12))
        path, source = folder / data.draw(st.sampled_from(sorted(file.name for file in folder.iterdir()))), folder
    else:
        path = source = write(tmp_path / "file", pa.table({"image": column([*IMAGES], "chunks"), "n": range(4)}), kind, 2)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(OmeTensorError):
        read_all(source)
