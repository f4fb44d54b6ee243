"""Builders of OME-Arrow records: one TZCYX array, written in every encoding that is read.

Nothing here uses the code under test. Records are built from Python dicts and cast by Arrow, so they are slow to make and easy
to trust; keep them small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
from ome_arrow.meta import OME_ARROW_BYTE_STRUCT, OME_ARROW_STRUCT

Chunk = tuple[int, int, int]


def numbered(shape: tuple[int, ...], dtype: Any = np.uint16) -> np.ndarray:
    """A TZCYX array in which neighbours differ and no two planes are equal; values fit in the dtype."""
    dtype = np.dtype(dtype)
    values = np.arange(int(np.prod(shape)), dtype=np.int64) * 7 + 3
    if dtype.kind == "b":
        values = values % 3 == 0
    elif dtype.kind in "iu":
        # Prime moduli, so that values do not repeat in step with rows or planes; signed types get negatives too.
        modulus = {1: 251, 2: 32749}.get(dtype.itemsize, 2**31 - 1)
        values = values % modulus - (modulus // 2 if dtype.kind == "i" else 0)
    elif dtype.kind == "c":
        values = values % 4093 + 1j * (values % 251)
    else:
        values = (values % 4093) / 4
    return values.astype(dtype).reshape(shape)


def struct_type(pixels: pa.DataType = pa.uint16(), *, byte_chunks: bool = False) -> pa.StructType:  # noqa: B008 (types are constants)
    """Upstream's record type with another type of pixel values."""
    return _with_pixels(OME_ARROW_BYTE_STRUCT if byte_chunks else OME_ARROW_STRUCT, pixels)


def _with_pixels(kind: pa.DataType, pixels: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct(
            [pa.field(f.name, pa.list_(pixels) if f.name == "pixels" else _with_pixels(f.type, pixels)) for f in kind]
        )
    if pa.types.is_list(kind):
        return pa.list_(_with_pixels(kind.value_type, pixels))
    return kind


def pixels_meta(shape: tuple[int, ...], pixel_type: str | None) -> dict[str, Any]:
    """``pixels_meta`` of a TZCYX shape."""
    t, z, c, y, x = shape
    return {
        "dimension_order": "XYZCT",
        "type": pixel_type,
        "size_x": x,
        "size_y": y,
        "size_z": z,
        "size_c": c,
        "size_t": t,
        "physical_size_x": 1.0,
        "physical_size_y": 1.0,
        "physical_size_z": 1.0,
        "physical_size_x_unit": "µm",
        "physical_size_y_unit": "µm",
        "physical_size_z_unit": "µm",
        "channels": [
            {
                "id": f"Channel:{i}",
                "name": f"C{i}",
                "emission_um": None,
                "excitation_um": None,
                "illumination": "",
                "color_rgba": 0xFF0000FF,
            }
            for i in range(c)
        ],
    }


def chunk_grid(chunk: Chunk, order: str = "ZYX") -> dict[str, Any]:
    """``chunk_grid`` of a (z, y, x) chunk."""
    z, y, x = chunk
    return {"order": "TCZYX", "chunk_t": 1, "chunk_c": 1, "chunk_z": z, "chunk_y": y, "chunk_x": x, "chunk_order": order}


def as_dict(shape: tuple[int, ...], pixel_type: str | None, **parts: Any) -> dict[str, Any]:
    """A record as a Python dict; ``parts`` are its planes, chunks and chunk_grid."""
    return {
        "type": "ome.arrow",
        "version": "0.1.0",
        "id": "image",
        "name": "image",
        "image_type": "image",
        "acquisition_datetime": None,
        "pixels_meta": pixels_meta(shape, pixel_type),
        "chunk_grid": None,
        "chunks": None,
        "planes": [],
        "masks": None,
        **parts,
    }


def plane_entries(array: np.ndarray, order: str = "tcz") -> Iterator[dict[str, Any]]:
    """One entry for each plane, the first letter of ``order`` varying slowest."""
    sizes = dict(zip("tzc", array.shape[:3], strict=True))
    for place in product(*(range(sizes[axis]) for axis in order)):
        at = dict(zip(order, place, strict=True))
        yield {**at, "pixels": array[at["t"], at["z"], at["c"]].ravel()}


def blocks(array: np.ndarray, chunk: Chunk) -> Iterator[tuple[dict[str, int], np.ndarray]]:
    """Origin and shape of each chunk, and its values in ZYX order; edge chunks are clipped."""
    nt, nz, nc, ny, nx = array.shape
    for t, c in product(range(nt), range(nc)):
        for z, y, x in product(*(range(0, n, step) for n, step in zip((nz, ny, nx), chunk, strict=True))):
            part = array[t, z : z + chunk[0], c, y : y + chunk[1], x : x + chunk[2]]
            sz, sy, sx = part.shape
            yield {"t": t, "c": c, "z": z, "y": y, "x": x, "shape_z": sz, "shape_y": sy, "shape_x": sx}, part.ravel()


def chunk_entries(array: np.ndarray, chunk: Chunk) -> Iterator[dict[str, Any]]:
    """List-encoded chunks."""
    for place, values in blocks(array, chunk):
        yield {**place, "pixels": values}


def byte_entries(
    array: np.ndarray, chunk: Chunk, *, compression: str | None = None, dtype: str | None = None
) -> Iterator[dict[str, Any]]:
    """Byte-encoded chunks; ``dtype`` is the stored one (also ``">u2"``), the array's own where not given."""
    name = array.dtype.name if dtype is None else dtype
    for place, values in blocks(array, chunk):
        payload = values.astype(np.dtype(name)).tobytes()
        if compression not in (None, "", "none"):
            payload = pa.Codec(compression).compress(payload, asbytes=True)
        yield {**place, "dtype": name, "compression": compression, "pixel_bytes": payload}


def as_array(record: Mapping[str, Any], kind: pa.StructType) -> pa.StructArray:
    """One record as a StructArray of that type."""
    return pa.array([dict(record)], type=kind)


def planes_record(array: np.ndarray, pixel_type: str | None = None, *, stored: Any = None, order: str = "tcz") -> pa.StructArray:
    """A record with planes only; ``stored`` is the dtype of the stored lists, the array's own where not given."""
    values = array if stored is None else array.astype(stored)
    record = as_dict(array.shape, pixel_type or array.dtype.name, planes=list(plane_entries(values, order)), chunks=[])
    return as_array(record, struct_type(pa.from_numpy_dtype(values.dtype)))


def chunks_record(
    array: np.ndarray, chunk: Chunk, pixel_type: str | None = None, *, shuffled: bool = False, order: str = "ZYX"
) -> pa.StructArray:
    """A record with list-encoded chunks; ``shuffled`` stores them in an order that means nothing."""
    entries = list(chunk_entries(array, chunk))
    if shuffled:
        entries = [entries[i] for i in np.random.default_rng(5).permutation(len(entries))]
    record = as_dict(array.shape, pixel_type or array.dtype.name, chunks=entries, chunk_grid=chunk_grid(chunk, order))
    return as_array(record, struct_type(pa.from_numpy_dtype(array.dtype)))


def bytes_record(
    array: np.ndarray, chunk: Chunk, pixel_type: str | None = None, *, compression: str | None = None, dtype: str | None = None
) -> pa.StructArray:
    """A record with byte-encoded chunks."""
    entries = list(byte_entries(array, chunk, compression=compression, dtype=dtype))
    record = as_dict(array.shape, pixel_type or array.dtype.name, chunks=entries, chunk_grid=chunk_grid(chunk))
    return as_array(record, struct_type(byte_chunks=True))


def nonstrict_record(array: np.ndarray, pixel_type: str, *, chunk_fields: str = "missing") -> pa.StructArray:
    """Planes as found in the wild: fields sorted by name, wide integers, chunk fields ``missing`` or ``null``."""
    planes = [{key: entry[key] for key in sorted(entry)} for entry in plane_entries(array.astype(np.int64))]
    record = as_dict(array.shape, pixel_type, planes=planes)
    if chunk_fields == "missing":
        del record["chunks"], record["chunk_grid"]
    wide = pa.struct([(key, _widened(struct_type(pa.int64()).field(key).type)) for key in sorted(record)])
    return as_array(record, wide)


def _widened(kind: pa.DataType) -> pa.DataType:
    """The same type with 64-bit numbers and its struct fields sorted by name."""
    if pa.types.is_struct(kind):
        return pa.struct(sorted(((f.name, _widened(f.type)) for f in kind), key=lambda field: field[0]))
    if pa.types.is_list(kind):
        return pa.list_(_widened(kind.value_type))
    if pa.types.is_integer(kind):
        return pa.int64()
    return pa.float64() if pa.types.is_floating(kind) else kind
