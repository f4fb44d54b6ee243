"""The fixed set of images that the suite reads: written to disk once, so that one server can serve all of them.

``IMAGES`` are sound, ``DAMAGED`` are not. The sound ones named in ``SAME_PIXELS`` hold the same pixels in different encodings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from tests.conformance import records

#: T, Z, C, Y, X: no two axes of one size, and no axis a multiple of the chunk's.
SHAPE = (3, 4, 2, 13, 17)
#: z, y, x; spans z.
CHUNK = (2, 5, 6)
FLAT_CHUNK = (1, 5, 6)


@dataclass(frozen=True)
class Image:
    """A record and, where it is sound, the TZCYX pixels that it must read as."""

    record: pa.StructArray
    pixels: np.ndarray | None = None
    #: What upstream can read; the rest are records that it refuses or misreads.
    upstream: bool = True

    @property
    def scalar(self) -> pa.StructScalar:
        """The record as a StructScalar."""
        return self.record[0]

    @cached_property
    def dictionary(self) -> dict[str, Any]:
        """The record as Python objects."""
        return self.record[0].as_py()


def _images() -> dict[str, Image]:
    u16 = records.numbered(SHAPE)
    i16, f32, i8 = (records.numbered(SHAPE, dtype) for dtype in ("int16", "float32", "int8"))
    bit, c64 = records.numbered((1, 2, 1, 5, 9), bool), records.numbered((2, 1, 2, 5, 9), "complex64")
    single, stack = records.numbered((1, 1, 1, 11, 7)), records.numbered((1, 5, 3, 9, 8), "uint8")
    return {
        "planes": Image(records.planes_record(u16), u16),
        "planes_shuffled": Image(records.planes_record(u16, order="zct"), u16),
        "chunks": Image(records.chunks_record(u16, CHUNK), u16),
        "chunks_flat": Image(records.chunks_record(u16, FLAT_CHUNK), u16),
        "chunks_shuffled": Image(records.chunks_record(u16, CHUNK, shuffled=True), u16),
        "chunks_rows": Image(records.chunks_record(u16, (1, 5, 17)), u16),
        "chunks_whole": Image(records.chunks_record(u16, (4, 13, 17)), u16),
        "bytes": Image(records.bytes_record(u16, CHUNK, compression="none"), u16),
        "bytes_zstd": Image(records.bytes_record(u16, FLAT_CHUNK, compression="zstd"), u16),
        "bytes_lz4": Image(records.bytes_record(u16, (4, 13, 6), compression="lz4"), u16),
        "bytes_big_endian": Image(records.bytes_record(u16, CHUNK, dtype=">u2"), u16),
        "nonstrict": Image(records.nonstrict_record(u16, "uint16"), u16, upstream=False),
        "null_chunks": Image(records.nonstrict_record(u16, "uint16", chunk_fields="null"), u16),
        "bytes_i16": Image(records.bytes_record(i16, CHUNK), i16),
        "bytes_f32_zstd": Image(records.bytes_record(f32, (3, 4, 17), compression="zstd"), f32),
        "bytes_i8_lz4": Image(records.bytes_record(i8, (4, 13, 17), compression="lz4"), i8),
        "planes_f32": Image(records.planes_record(f32), f32),
        "chunks_f32": Image(records.chunks_record(f32, CHUNK), f32),
        "single": Image(records.planes_record(single), single),
        "stack": Image(records.planes_record(stack), stack),
        # Stored wider than the logical type: strict records hold every image as uint16 lists.
        "stack_u16": Image(records.planes_record(stack, "uint8", stored="uint16"), stack),
        # Upstream falls back to uint16, or to double, for OME's own names of these types.
        "bit": Image(records.planes_record(bit, "bit", stored="uint8"), bit, upstream=False),
        "bit_packed": Image(records.planes_record(bit, "bit"), bit, upstream=False),
        "bit_bytes": Image(records.bytes_record(bit, (1, 5, 4), "bit"), bit, upstream=False),
        "ome_float": Image(records.planes_record(f32, "float"), f32, upstream=False),
        "ome_complex": Image(records.bytes_record(c64, (1, 5, 4), "complex"), c64, upstream=False),
    }


def _damaged() -> dict[str, Image]:
    pixels = records.numbered((2, 2, 1, 6, 8))
    chunk = (1, 3, 8)
    grid = records.chunk_grid(chunk)

    def chunks(edit: Any, **parts: Any) -> Image:
        entries = list(records.chunk_entries(pixels, chunk))
        entries = edit(entries) or entries
        record = records.as_dict(pixels.shape, "uint16", **{"chunks": entries, "chunk_grid": grid, **parts})
        return Image(records.as_array(record, records.struct_type()), pixels)

    def byte_chunks(edit: Any, compression: str | None = None) -> Image:
        entries = list(records.byte_entries(pixels, chunk, compression=compression))
        edit(entries)
        record = records.as_dict(pixels.shape, "uint16", chunks=entries, chunk_grid=grid)
        return Image(records.as_array(record, records.struct_type(byte_chunks=True)), pixels)

    def planes(edit: Any, pixel_type: str = "uint16", shape: tuple[int, ...] = pixels.shape) -> Image:
        entries = list(records.plane_entries(pixels))
        entries = edit(entries) or entries
        record = records.as_dict(shape, pixel_type, chunks=[], planes=entries)
        return Image(records.as_array(record, records.struct_type()), pixels)

    def change(**fields: Any) -> Any:
        """Change fields of the entry at t=1, z=1, y=3: the last one. A callable makes the new value from the old."""

        def edit(entries: list[dict[str, Any]]) -> None:
            for name, value in fields.items():
                entries[-1][name] = value(entries[-1][name]) if callable(value) else value

        return edit

    wide = pixels.astype(np.int64)
    negative, large = wide.copy(), wide.copy()
    negative[1, 1, 0, 3, 2], large[1, 1, 0, 3, 2] = -1, 70_000
    fractions = np.where(large == 70_000, np.nan, pixels).astype(np.float64)

    return {
        "plane_value_large": Image(records.planes_record(large, "uint16"), pixels),
        "plane_value_nan": Image(records.planes_record(fractions, "uint16"), pixels),
        "chunk_value_negative": Image(records.chunks_record(negative, chunk, "uint16"), pixels),
        "bytes_value_large": Image(records.bytes_record(large, chunk, "uint16", dtype="int32"), pixels),
        "zstd_value_large": Image(records.bytes_record(large, chunk, "uint16", dtype=">i4", compression="zstd"), pixels),
        "chunk_missing": chunks(lambda entries: entries[:-1]),
        "chunk_short": chunks(change(pixels=lambda values: values[:-1])),
        "chunk_long": chunks(change(pixels=lambda values: np.append(values, 1))),
        "chunk_null": chunks(change(pixels=None)),
        "chunk_outside": chunks(change(x=1)),
        "chunk_negative": chunks(change(x=-1)),
        "chunk_flat_shape": chunks(change(shape_y=0, pixels=lambda values: values[:0])),
        "chunk_overlap": chunks(lambda entries: [*entries, entries[-1]]),
        "chunk_partial_overlap": chunks(change(y=2)),
        "chunk_order": chunks(lambda entries: None, chunk_grid=records.chunk_grid(chunk, "XYZ")),
        "bytes_short": byte_chunks(change(pixel_bytes=lambda payload: payload[:-2])),
        "bytes_long": byte_chunks(change(pixel_bytes=lambda payload: payload + b"\0\0")),
        "bytes_odd": byte_chunks(change(pixel_bytes=lambda payload: payload[:-1])),
        "bytes_null": byte_chunks(change(pixel_bytes=None)),
        "bytes_wrong_dtype": byte_chunks(change(dtype="uint8")),
        "bytes_no_dtype": byte_chunks(change(dtype="quaternion")),
        "bytes_no_codec": byte_chunks(change(compression="middle-out")),
        "zstd_short": byte_chunks(
            change(pixel_bytes=pa.Codec("zstd").compress(pixels[1, 1, 0, 3:].tobytes()[:-2], asbytes=True)), "zstd"
        ),
        "zstd_garbage": byte_chunks(change(pixel_bytes=b"not zstd at all"), "zstd"),
        "plane_missing": planes(lambda entries: entries[:-1]),
        "plane_short": planes(change(pixels=lambda values: values[:-1])),
        "plane_tripled": planes(change(pixels=lambda values: np.tile(values, 3))),
        "plane_null": planes(change(pixels=None)),
        "plane_twice": planes(lambda entries: [*entries, entries[-1]]),
        "unknown_type": planes(lambda entries: None, pixel_type="quaternion"),
        "no_width": planes(lambda entries: None, shape=(2, 2, 1, 6, 0)),
        "no_pixels": planes(lambda entries: entries[:0] or [{"t": 0, "z": 0, "c": 0, "pixels": None}]),
    }


IMAGES = _images()
DAMAGED = _damaged()

#: Ways to store one array; ``bytes_big_endian`` stands for a foreign writer.
SAME_PIXELS = [name for name, image in IMAGES.items() if image.pixels is not None and image.pixels is IMAGES["planes"].pixels]
