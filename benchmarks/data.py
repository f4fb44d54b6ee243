"""Synthetic images and their OME-Arrow records, in every encoding measured, made without a Python object for any pixel.

Upstream's own writers take dictionaries, which a 402 MB image does not fit into. Here pixels are laid out by NumPy and handed to Arrow as
buffers; types, field order and block order (t, c, z, y, x) are upstream's.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ome_arrow.meta import OME_ARROW_BYTE_STRUCT, OME_ARROW_STRUCT

__all__ = ["FULL", "QUICK", "Shape", "byte_chunks", "list_chunks", "make_image", "stored_planes", "write_parquet"]

#: Elements along T, Z, C, Y, X.
Shape = tuple[int, int, int, int, int]
#: Elements along Z, Y, X.
Chunk = tuple[int, int, int]

#: The image of CONFORMANCE's table: 402 MB of uint16.
FULL: Shape = (1, 16, 3, 2048, 2048)
#: One that a test can afford; each size is still a multiple of the chunks' and tiles'.
QUICK: Shape = (1, 4, 3, 1024, 1024)


def make_image(shape: Shape, seed: int = 20260) -> np.ndarray:
    """A TZCYX uint16 array of noise, the same for the same arguments: no two regions are equal, so a wrong one cannot pass for the right one."""
    return np.random.default_rng(seed).integers(0, 2**16, shape, np.uint16)


def stored_planes(image: np.ndarray) -> pa.StructArray:
    """The image as one record of whole planes."""
    nt, nz, nc, ny, nx = image.shape
    # A copy of its own even where the order would allow a view: what is read must not be in the cache because the floor has just read it.
    flat = image.transpose(0, 2, 1, 3, 4).copy().reshape(-1)
    t, c, z = (axis.reshape(-1) for axis in np.indices((nt, nc, nz)))
    kind = OME_ARROW_STRUCT.field("planes").type
    columns = {"t": t, "c": c, "z": z, "pixels": _lists(flat, np.full(len(t), ny * nx))}
    return _record(image, OME_ARROW_STRUCT, planes=_entries(columns, kind))


def list_chunks(image: np.ndarray, chunk: Chunk) -> pa.StructArray:
    """The image as one record of chunks that are Arrow lists, upstream's default encoding."""
    flat, columns, sizes = _cut(image, chunk)
    kind = OME_ARROW_STRUCT.field("chunks").type
    return _record(image, OME_ARROW_STRUCT, chunks=_entries(columns | {"pixels": _lists(flat, sizes)}, kind), grid=chunk)


def byte_chunks(image: np.ndarray, chunk: Chunk) -> pa.StructArray:
    """The image as one record of chunks that are bytes, uncompressed, as upstream's ``chunk_encoding="bytes"`` writes them by default."""
    flat, columns, sizes = _cut(image, chunk)
    count = len(sizes)
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64) * flat.itemsize
    payload = pa.LargeBinaryArray.from_buffers(pa.large_binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(flat)])
    kind = OME_ARROW_BYTE_STRUCT.field("chunks").type
    columns |= {"dtype": pa.repeat(flat.dtype.name, count), "compression": pa.nulls(count, pa.string()), "pixel_bytes": payload}
    return _record(image, OME_ARROW_BYTE_STRUCT, chunks=_entries(columns, kind), grid=chunk)


def write_parquet(records: pa.StructArray, path: Path) -> None:
    """Records as a file of one OME-Arrow column. Noise does not compress, so no codec is asked to try."""
    pq.write_table(pa.table({"image": records}), path, compression="none", use_dictionary=False, write_statistics=False)


def _blocks(image: np.ndarray, chunk: Chunk) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Origin (t, c, z, y, x) and ZYX pixels of each chunk, in upstream's order."""
    nt, nz, nc, ny, nx = image.shape
    for t, c in product(range(nt), range(nc)):
        for z, y, x in product(*(range(0, n, step) for n, step in zip((nz, ny, nx), chunk, strict=True))):
            yield (t, c, z, y, x), image[t, z : z + chunk[0], c, y : y + chunk[1], x : x + chunk[2]]


def _cut(image: np.ndarray, chunk: Chunk) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """All pixels in chunk order, the columns that place the chunks, and each chunk's number of pixels."""
    flat = np.empty(image.size, image.dtype)
    rows: list[tuple[int, ...]] = []
    at = 0
    for origin, block in _blocks(image, chunk):
        flat[at : at + block.size].reshape(block.shape)[...] = block
        rows.append((*origin, *block.shape))
        at += block.size
    table = np.array(rows, np.int64)
    names = ("t", "c", "z", "y", "x", "shape_z", "shape_y", "shape_x")
    return flat, dict(zip(names, table.T, strict=True)), table[:, 5:].prod(axis=1)


def _lists(flat: np.ndarray, sizes: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _entries(columns: dict[str, Any], kind: pa.ListType) -> pa.ListArray:
    """One list that holds all entries."""
    fields = list(kind.value_type)
    arrays = [
        column if isinstance(column := columns[field.name], pa.Array) else pa.array(column, type=field.type) for field in fields
    ]
    entries = pa.StructArray.from_arrays(arrays, fields=fields)
    return pa.ListArray.from_arrays(pa.array([0, len(entries)], pa.int32()), entries)


def _record(
    image: np.ndarray,
    kind: pa.StructType,
    *,
    planes: pa.ListArray | None = None,
    chunks: pa.ListArray | None = None,
    grid: Chunk | None = None,
) -> pa.StructArray:
    """An array of one record."""
    nt, nz, nc, ny, nx = image.shape
    head = {
        "type": "ome.arrow",
        "version": "0.1.0",
        "id": "synthetic",
        "name": "synthetic",
        "image_type": "image",
        "acquisition_datetime": datetime.datetime(2026, 1, 1),
        "pixels_meta": {
            "dimension_order": "XYZCT",
            "type": image.dtype.name,
            **{f"size_{axis}": size for axis, size in zip("tzcyx", (nt, nz, nc, ny, nx), strict=True)},
            **{f"physical_size_{axis}": 1.0 for axis in "xyz"},
            **{f"physical_size_{axis}_unit": "µm" for axis in "xyz"},
            "channels": [
                {"id": f"ch-{c}", "name": f"C{c}", "illumination": "Unknown", "color_rgba": 0xFFFFFFFF} for c in range(nc)
            ],
        },
        "chunk_grid": None
        if grid is None
        else {
            "order": "TCZYX",
            "chunk_t": 1,
            "chunk_c": 1,
            **{f"chunk_{axis}": size for axis, size in zip("zyx", grid, strict=True)},
            "chunk_order": "ZYX",
        },
        "masks": None,
    }
    pixels = {
        "planes": pa.array([[]], kind.field("planes").type) if planes is None else planes,
        "chunks": pa.nulls(1, kind.field("chunks").type) if chunks is None else chunks,
    }
    arrays = [pixels.get(field.name) for field in kind]
    arrays = [
        pa.array([head[field.name]], field.type) if array is None else array for array, field in zip(arrays, kind, strict=True)
    ]
    return pa.StructArray.from_arrays(arrays, fields=list(kind))
