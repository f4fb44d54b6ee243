"""Tables of images in every format that holds tables, written with pyarrow alone, and what a server makes of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ome_tensor.blocks import ChunkCache
from ome_tensor.listing import DatasetState
from ome_tensor.plan import Plan
from ome_tensor.tables import ImageTable, LoadedTable
from ome_tensor.view import view_of_image
from ome_tensor_server.entries import Entry
from ome_tensor_server.fetching import with_info
from ome_tensor_server.finding import SourceFile
from ome_tensor_server.in_place import Readers, open_in_place, shared_readers
from ome_tensor_server.loading import Loader, load_anonymous, shared_loader

#: One for all tests: a reader's process costs more than most of them.
LOADER = shared_loader()

#: Planes and chunks as lists of numbers, chunks as bytes, and compressed.
ENCODINGS = ("planes", "chunks", "bytes", "zstd")
FORMATS = ("parquet", "arrow", "arrow lz4", "stream", "stream zstd")

_INT32 = ("t", "c", "z", "y", "x", "shape_z", "shape_y", "shape_x")


def boxes(shape: Sequence[int], block: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """The blocks of an array, in order: along each axis where one begins and ends."""
    for starts in itertools.product(*(range(0, size, step) for size, step in zip(shape, block, strict=True))):
        yield tuple((start, min(start + step, size)) for start, step, size in zip(starts, block, shape, strict=True))


def record(pixels: np.ndarray, encoding: str = "bytes", block: Sequence[int] = (1, 32, 32), **more: Any) -> dict[str, Any]:
    """A TZCYX array as a record; chunks are of ``block``, ZYX."""
    t, z, c, y, x = pixels.shape
    sizes = {f"size_{axis}": size for axis, size in zip("tzcyx", pixels.shape, strict=True)}
    made: dict[str, Any] = {"id": "image", "name": "image", "pixels_meta": {"type": pixels.dtype.name, **sizes}} | more
    if encoding == "planes":
        places = itertools.product(range(t), range(z), range(c))
        return made | {"planes": [{"t": it, "z": iz, "c": ic, "pixels": pixels[it, iz, ic].ravel()} for it, iz, ic in places]}
    chunks = []
    for it, ic in itertools.product(range(t), range(c)):
        for (z0, z1), (y0, y1), (x0, x1) in boxes((z, y, x), block):
            values = np.ascontiguousarray(pixels[it, z0:z1, ic, y0:y1, x0:x1])
            place = (it, ic, z0, y0, x0, z1 - z0, y1 - y0, x1 - x0)
            chunk: dict[str, Any] = dict(zip(_INT32, place, strict=True))
            if encoding == "chunks":
                chunk["pixels"] = values.ravel()
            else:
                data = values.tobytes()
                packed = data if encoding == "bytes" else pa.compress(data, encoding, asbytes=True)
                chunk |= {"dtype": pixels.dtype.name, "compression": None if encoding == "bytes" else encoding}
                chunk["pixel_bytes"] = packed
            chunks.append(chunk)
    return made | {"chunks": chunks}


def column(images: Sequence[np.ndarray | None], encoding: str = "bytes", block: Sequence[int] = (1, 32, 32)) -> pa.Array:
    """A column of records, of the dtype of the first; ``None`` is a row without an image."""
    dtype = next(image.dtype for image in images if image is not None)
    sizes = [pa.field(f"size_{axis}", pa.int32()) for axis in "tzcyx"]
    fields = [pa.field("id", pa.string()), pa.field("name", pa.string())]
    fields.append(pa.field("pixels_meta", pa.struct([pa.field("type", pa.string()), *sizes])))
    if encoding == "planes":
        block_fields = [pa.field(name, pa.int32()) for name in "tzc"]
    else:
        block_fields = [pa.field(name, pa.int32()) for name in _INT32]
    if encoding in ("planes", "chunks"):
        block_fields.append(pa.field("pixels", pa.list_(pa.from_numpy_dtype(dtype))))
    else:
        block_fields += [pa.field("dtype", pa.string()), pa.field("compression", pa.string())]
        block_fields.append(pa.field("pixel_bytes", pa.large_binary()))
    fields.append(pa.field("planes" if encoding == "planes" else "chunks", pa.list_(pa.struct(block_fields))))
    rows = [None if image is None else record(image, encoding, block) for image in images]
    return pa.array(rows, pa.struct(fields))


def write(path: Path, table: pa.Table, kind: str = "parquet", rows: int | None = None) -> Path:
    """A table in one of :data:`FORMATS`, ``rows`` to a row group or record batch."""
    name, _, compression = kind.partition(" ")
    if name == "parquet":
        pq.write_table(table, path, row_group_size=rows, compression=compression or "snappy")
        return path
    options = pa.ipc.IpcWriteOptions(compression=compression or None)
    make = pa.ipc.new_stream if name == "stream" else pa.ipc.new_file
    with make(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_typed(
    folder: Path,
    images: Mapping[str, np.ndarray],
    block: Sequence[int] = (1, 1, 1, 32, 32),
    *,
    rows: int = 1,
    index: bool = True,
    others: Mapping[str, Any] | None = None,
    changes: Mapping[str, Callable[[list[dict[str, Any]]], None]] | None = None,
) -> Path:
    """A typed chunk dataset of TZCYX arrays.

    Args:
        folder: Where.
        images: By their identifiers.
        block: Chunk size, TCZYX.
        rows: Chunks in a row group.
        index: Whether it has an index.
        others: More columns of images.parquet.
        changes: For ``images``, ``chunks``, ``index`` functions of that table's rows, which they change.
    """
    changes = changes or {}
    folder.mkdir(parents=True, exist_ok=True)
    image_rows: list[dict[str, Any]] = []
    chunk_rows: list[dict[str, Any]] = []
    for name, pixels in images.items():
        tczyx = pixels.swapaxes(1, 2)
        sizes = {f"size_{axis}": size for axis, size in zip("tczyx", tczyx.shape, strict=True)}
        image_rows.append({"image_id": name, "name": name, "dtype": pixels.dtype.name, **sizes, "channels_json": "[]"})
        for box in boxes(tczyx.shape, block):
            values = tczyx[tuple(slice(start, end) for start, end in box)]
            place = dict(zip("tczyx", (start for start, _ in box), strict=True))
            shape = dict(zip((f"shape_{axis}" for axis in "tczyx"), values.shape, strict=True))
            number = len(chunk_rows)
            chunk_rows.append({"image_id": name, "chunk_id": number, **place, **shape, "dtype": pixels.dtype.name})
            chunk_rows[-1]["pixel_bytes"] = values.tobytes()
    changes.get("images", _as_it_is)(image_rows)
    changes.get("chunks", _as_it_is)(chunk_rows)
    table = pa.Table.from_pylist(image_rows)
    for name, values in (others or {}).items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    pq.write_table(table, folder / "images.parquet")
    schema = pa.Table.from_pylist(chunk_rows[:1]).schema if chunk_rows else None
    if schema is not None:
        schema = schema.set(schema.get_field_index("pixel_bytes"), pa.field("pixel_bytes", pa.large_binary()))
    pq.write_table(pa.Table.from_pylist(chunk_rows, schema), folder / "chunks.parquet", row_group_size=rows)
    if index:
        index_rows = [
            {name: value for name, value in row.items() if name not in ("dtype", "pixel_bytes")}
            | {"row_group_id": place // rows, "row_index_in_group": place % rows, "fragment_path": "chunks.parquet"}
            for place, row in enumerate(chunk_rows)
        ]
        changes.get("index", _as_it_is)(index_rows)
        pq.write_table(pa.Table.from_pylist(index_rows), folder / "index.parquet")
    (folder / "_ome_arrow_dataset.json").write_text(json.dumps({"type": "ome.arrow", "layout": "typed-chunk-dataset"}))
    return folder


def _as_it_is(_: list[dict[str, Any]]) -> None:
    pass


def load(path: Path) -> LoadedTable:
    """A source's table, as a server without a store loads it."""
    return load_anonymous(str(path), LOADER)


def pixels_of(table: ImageTable, row: int = 0, name: str | None = None) -> np.ndarray:
    """The pixels of an image, TZCYX."""
    image = table.image(name, row)
    return view_of_image(image.pixels, Plan(layout="TZCHW")).to_numpy()


def tile_of(table: ImageTable, row: int = 0, name: str | None = None) -> np.ndarray:
    """Its first pixels, read as a server reads them: no memory is asked for beyond theirs."""
    return next(view_of_image(table.image(name, row).pixels, Plan()).iter_tiles(tile_size=(1, 4, 4))).array


def loaded(path: Path) -> ImageTable:
    """A source, loaded."""
    return ImageTable("dataset", load(path), ChunkCache(1 << 20))


def entry_of(path: Path, loader: Loader = LOADER) -> Entry:
    """What a server knows of a source that it serves in place."""
    entry = with_info(Entry.of(SourceFile("dataset", str(path), named=True), False), loader.describe(str(path)))
    return replace(entry, state=DatasetState.IN_PLACE, version="0" * 16)


def in_place(path: Path, readers: Readers | None = None) -> ImageTable:
    """A source, served in place: of what is decoded 1 MiB is kept, or what the readers keep."""
    cache = ChunkCache(1 << 20)
    served = open_in_place(entry_of(path), readers or shared_readers(0, Readers.most << 20))
    return ImageTable("dataset", served.table, cache, served.columns)
