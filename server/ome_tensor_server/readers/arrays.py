"""Sources that are arrays: their axes as this project has them, and their pixels as OME-Arrow records, written or served a piece at a time."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa

from ome_tensor.errors import InvalidRecord
from ome_tensor.late import NORESERVE
from ome_tensor.pixel_types import check_dtype
from ome_tensor.record import LARGEST_SIZE, ImageMeta
from ome_tensor.selection import ChunkGrid, Extent
from ome_tensor.tables import LEVEL, LEVEL_OF

from .base import Progress
from .sinks import Sink

__all__ = [
    "ArrayImage",
    "ArrayRow",
    "PlacedArray",
    "array_records",
    "arrays_nbytes",
    "arrays_schema",
    "pixel_type_name",
    "write_arrays",
]

_AXES = "TZCYX"

#: Bytes that are read at a time.
_STRIP = 32 << 20

#: More blocks than this must not be smaller: each takes some 50 microseconds, whatever is in it.
_MOST_TINY, _TINY = 10_000_000, 1024

#: A stored block of less is read together with others.
_SMALL = 512 << 10

_OME_NAMES = {"bool": "bit", "float32": "float", "float64": "double", "complex64": "complex", "complex128": "double-complex"}


def pixel_type_name(dtype: np.dtype) -> str:
    """The OME name of a dtype; NumPy's where OME has none."""
    return _OME_NAMES.get(dtype.name, dtype.name)


class PlacedArray:
    """An array whose axes are put into TZCYX order when it is read.

    Args:
        array: Has a shape, a dtype, and is read by slicing.
        axes: A letter for each of its axes: those of TZCYX, and S for samples, which count as channels (the fastest among them).
        chunks: Size of the blocks it is stored in, along its own axes; the whole array where it is left out.
        bits: Whether its values are bits, however wide they are stored: all but 0 are True.

    Attributes:
        extent: Size in elements.
        dtype: Of what :meth:`read` gives, in native byte order.
        stored: Size of the stored blocks along TZCYX.
        block: Size of the blocks that are best read: several stored ones where those are small, as strips of a row are.

    Raises:
        InvalidRecord: axes that are none, an empty axis, one that is too long, or a dtype that is no pixel type.
    """

    def __init__(self, array: Any, axes: str, chunks: Sequence[int] | None = None, *, bits: bool = False) -> None:
        self._array = array
        self._axes = axes
        shape = tuple(int(length) for length in array.shape)
        if len(axes) != len(shape) or len(set(axes)) != len(axes) or not {"Y", "X"} <= set(axes) <= set(_AXES) | {"S"}:
            raise InvalidRecord(f"its axes {axes!r} of shape {shape} are not an image's", field="axes", value=axes)
        sizes = dict.fromkeys(_AXES, 1) | dict(zip(axes, shape, strict=True))
        self._samples = sizes.get("S", 1)
        self._channels = sizes["C"]
        sizes["C"] *= self._samples
        self.extent = Extent(*(sizes[axis] for axis in _AXES))
        for axis, size in zip(_AXES, self.extent, strict=True):
            if not 0 < size <= LARGEST_SIZE:
                raise InvalidRecord(
                    f"its size along {axis} is {size}; it must be positive, and at most {LARGEST_SIZE}",
                    field="shape",
                    value=shape,
                )
        try:
            self.dtype = np.dtype(bool) if bits else check_dtype(array.dtype)
        except ValueError as error:
            raise InvalidRecord(
                f"its pixels are of no type that is served: {error}", field="dtype", value=str(array.dtype)
            ) from None
        blocks = dict.fromkeys(_AXES, 1) | dict(zip(axes, chunks or shape, strict=True))
        blocks["C"] *= blocks.get("S", 1) if blocks["C"] == 1 or blocks.get("S", 1) == self._samples else 1
        self.stored = Extent(*(max(1, min(blocks[axis], sizes[axis])) for axis in _AXES))
        count = math.prod(-(-size // block) for size, block in zip(self.extent, self.stored, strict=True))
        each = math.prod(self.stored) * self.dtype.itemsize
        if count > _MOST_TINY and each < _TINY:
            raise InvalidRecord(
                f"it is stored in {count} blocks of {each} bytes: no reader comes to their end; store it in larger ones",
                field="shape",
                value=shape,
            )
        self.block = _grown(self.stored, self.extent, self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of all its pixels."""
        t, z, c, y, x = self.extent
        return t * z * c * y * x * self.dtype.itemsize

    def read(self, begin: Sequence[int], end: Sequence[int]) -> np.ndarray:
        """A box, TZCYX: from ``begin`` up to ``end``, both counted along TZCYX. One channel at a time where there are samples."""
        if self._samples > 1 and end[2] - begin[2] > 1:
            parts = [self.read((*begin[:2], c, *begin[3:]), (*end[:2], c + 1, *end[3:])) for c in range(begin[2], end[2])]
            return np.concatenate(parts, axis=2)
        spans = {axis: slice(first, last) for axis, first, last in zip(_AXES, begin, end, strict=True)}
        if self._samples > 1:
            c, s = divmod(begin[2], self._samples)
            spans |= {"C": slice(c, c + 1), "S": slice(s, s + 1)}
        part = np.asarray(self._array[tuple(spans[axis] for axis in self._axes)])
        if "S" in self._axes:
            part = part.squeeze(self._axes.index("S"))
        letters = self._axes.replace("S", "")
        part = part.transpose([letters.index(axis) for axis in _AXES if axis in letters])
        part = np.expand_dims(part, [place for place, axis in enumerate(_AXES) if axis not in letters])
        wanted = tuple(last - first for first, last in zip(begin, end, strict=True))
        if part.shape != wanted:
            raise InvalidRecord(f"a block of shape {part.shape} came where {wanted} was due", field="pixels", value=part.shape)
        return part.astype(self.dtype, copy=False)


def _grown(stored: Extent, extent: Extent, itemsize: int) -> Extent:
    """Several stored blocks along Y and X, as long as they are small: reading any number takes about as long as reading one."""
    t, z, c, y, x = stored
    nbytes = t * z * c * y * x * itemsize
    while nbytes * 2 <= _SMALL and (y < extent.y or x < extent.x):
        y, x = (min(extent.y, 2 * y), x) if y < extent.y else (y, min(extent.x, 2 * x))
        nbytes *= 2
    # Whole stored blocks, but for the last.
    y = y if y == extent.y else y // stored.y * stored.y
    x = x if x == extent.x else x // stored.x * stored.x
    return Extent(t, z, c, y, x)


@dataclass(frozen=True, slots=True)
class ArrayImage:
    """An image of an array source.

    Attributes:
        meta: What is said of it; of ``extent`` and ``dtype`` the array's own count.
        array: Its pixels.
        levels: Its pyramid's levels, from level 1 on.
    """

    meta: ImageMeta
    array: PlacedArray
    levels: Sequence[ArrayImage] = ()


@dataclass(frozen=True, slots=True)
class ArrayRow:
    """A row of an array source.

    Attributes:
        images: By image column; ``None`` or missing where the row has none.
        others: By other column.
    """

    images: Mapping[str, ArrayImage | None]
    others: Mapping[str, Any] = field(default_factory=dict)


_CHUNK = pa.struct(
    [
        *((name, pa.int32()) for name in ("t", "z", "c", "y", "x", "shape_z", "shape_y", "shape_x")),
        ("dtype", pa.string()),
        ("compression", pa.string()),
        ("pixel_bytes", pa.large_binary()),
    ]
)
_HEAD = pa.struct(
    [
        ("type", pa.string()),
        ("version", pa.string()),
        ("id", pa.string()),
        ("name", pa.string()),
        ("image_type", pa.string()),
        ("acquisition_datetime", pa.timestamp("us")),
        (
            "pixels_meta",
            pa.struct(
                [
                    ("dimension_order", pa.string()),
                    ("type", pa.string()),
                    *((f"size_{axis}", pa.int32()) for axis in "xyzct"),
                    *((f"physical_size_{axis}", pa.float64()) for axis in "xyz"),
                    *((f"physical_size_{axis}_unit", pa.string()) for axis in "xyz"),
                    (
                        "channels",
                        pa.list_(
                            pa.struct(
                                [
                                    ("id", pa.string()),
                                    ("name", pa.string()),
                                    ("emission_um", pa.float64()),
                                    ("excitation_um", pa.float64()),
                                    ("illumination", pa.string()),
                                    ("color_rgba", pa.uint32()),
                                ]
                            )
                        ),
                    ),
                ]
            ),
        ),
        (
            "chunk_grid",
            pa.struct(
                [("order", pa.string()), *((f"chunk_{axis}", pa.int32()) for axis in "tczyx"), ("chunk_order", pa.string())]
            ),
        ),
    ]
)
_RECORD = pa.struct([*_HEAD, pa.field("chunks", pa.list_(_CHUNK))])


def _level_name(column: str, level: int) -> str:
    return f"{column}@{level}"


def arrays_schema(levels: Mapping[str, int], others: Mapping[str, pa.DataType]) -> pa.Schema:
    """The schema of an array source's table.

    Args:
        levels: The image columns, and how many levels above 0 the deepest pyramid in each has.
        others: The other columns' types.
    """
    fields = [pa.field(column, _RECORD) for column in levels]
    for column, count in levels.items():
        for level in range(1, count + 1):
            mark = {LEVEL_OF: column.encode(), LEVEL: str(level).encode()}
            fields.append(pa.field(_level_name(column, level), _RECORD, metadata=mark))
    return pa.schema([*fields, *(pa.field(name, kind) for name, kind in others.items())])


def array_records(rows: Sequence[ArrayRow], schema: pa.Schema) -> dict[str, pa.ChunkedArray]:
    """The records of an array source without their pixels, by column: image columns, and those of their pyramids' levels.

    Args:
        rows: Its rows.
        schema: Of :func:`arrays_schema`.
    """
    found = {}
    for entry in schema:
        if entry.type == _RECORD:
            images = [_image_of(row, entry) for row in rows]
            found[entry.name] = pa.chunked_array([pa.array([None if image is None else _head(image) for image in images], _HEAD)])
    return found


def _image_of(row: ArrayRow, entry: pa.Field) -> ArrayImage | None:
    """A row's image in an image column, or in that of a level."""
    mark = entry.metadata or {}
    column, level = (mark[LEVEL_OF].decode(), int(mark[LEVEL])) if LEVEL_OF in mark else (entry.name, 0)
    image = row.images.get(column)
    if image is None or not level:
        return image
    return image.levels[level - 1] if level <= len(image.levels) else None


def arrays_nbytes(rows: Sequence[ArrayRow]) -> int:
    """About the bytes that :func:`write_arrays` writes."""
    images = [image for row in rows for image in row.images.values() if image is not None]
    everything = [one.array for image in images for one in (image, *image.levels)]
    return sum(array.nbytes + 200 * array.extent.t * array.extent.z * array.extent.c for array in everything)


def write_arrays(schema: pa.Schema, rows: Sequence[ArrayRow], file: IO[bytes], progress: Progress) -> None:
    """Write an array source's rows, a record batch each, as an uncompressed Arrow IPC file.

    No image is ever in memory whole: the file is laid out with holes where pixels belong, and those are written into their places a strip of a
    plane at a time.

    Raises:
        InvalidRecord: pixels that cannot be read.
        OSError: the file cannot be written.
    """
    sink = _HoledFile(file, progress)
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
        for row in rows:
            columns = []
            for entry in schema:
                if entry.type != _RECORD:
                    columns.append(pa.array([row.others.get(entry.name)], entry.type))
                    continue
                image = _image_of(row, entry)
                columns.append(pa.nulls(1, entry.type) if image is None else sink.record(image))
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            sink.fill()
    file.flush()


class _HoledFile(Sink):
    """A file for Arrow to write to that leaves holes for pixels, and is filled afterwards."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        super().__init__(file)
        self._progress = progress
        self._images: list[tuple[int, int, PlacedArray]] = []
        self._holes: list[tuple[int, PlacedArray]] = []
        self._written = 0

    def record(self, image: ArrayImage) -> pa.StructArray:
        """An image's record, its pixels memory that is neither there nor ever touched: one chunk for each plane, all in a row."""
        array = image.array
        t, z, c, y, x = array.extent
        plane = y * x * array.dtype.itemsize
        count = t * z * c
        # Shared memory that nobody touches takes no room, and is not counted as this process's own.
        memory = pa.py_buffer(mmap.mmap(-1, max(1, count * plane), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | NORESERVE))
        self._images.append((memory.address, memory.size, array))
        offsets = pa.py_buffer(np.arange(count + 1, dtype=np.int64) * plane)
        pixels = pa.Array.from_buffers(pa.large_binary(), count, [None, offsets, memory])
        places = np.indices((t, z, c), dtype=np.int32).reshape(3, -1)
        fixed = {"y": 0, "x": 0, "shape_z": 1, "shape_y": y, "shape_x": x}
        stored = "uint8" if array.dtype.kind == "b" else array.dtype.name
        chunks = pa.StructArray.from_arrays(
            [
                *(pa.array(place) for place in places),
                *(pa.array(np.full(count, value, np.int32)) for value in fixed.values()),
                pa.array([stored] * count, pa.string()),
                pa.nulls(count, pa.string()),
                pixels,
            ],
            fields=list(_CHUNK),
        )
        lists = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), chunks).cast(_RECORD.field("chunks").type)
        head = pa.array([_head(image)], _HEAD)
        return pa.StructArray.from_arrays([*head.flatten(), lists], fields=list(_RECORD))

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        address = pa.py_buffer(data).address if len(view) else 0
        for begin, size, array in self._images:
            # Arrow writes a buffer in one piece; a memory that small could be written in any case.
            if begin <= address < begin + size:
                if len(view) != array.nbytes:
                    raise InvalidRecord("pixels were to be written in pieces", field="pixels")
                self._holes.append((self._file.tell(), array))
                self._file.seek(len(view), os.SEEK_CUR)
                return len(view)
        self._file.write(view)
        self._written += len(view)
        return len(view)

    def fill(self) -> None:
        """Write the pixels of all images that were laid out since."""
        self._file.flush()
        descriptor = self._file.fileno()
        for offset, array in self._holes:
            for place, strip in _strips(array):
                _write_all(descriptor, strip, offset + place)
                self._written += strip.nbytes
                self._progress(self._written)
        self._holes.clear()
        self._images.clear()


def _strips(array: PlacedArray) -> Iterator[tuple[int, np.ndarray]]:
    """An array's pixels in strips of planes, and where in its TZCYX block each begins, in bytes. Blocks of several planes are read once for all."""
    t, z, c, y, x = array.extent
    itemsize = array.dtype.itemsize
    bt, bz, bc, by, _ = array.block
    # As many planes of a block at a time as fit, whole rows of blocks of each.
    rows = min(y, max(by, _STRIP // max(1, x * itemsize * bt * bz * bc) // by * by))
    whole_blocks = bt * bz * bc * rows * x * itemsize <= 4 * _STRIP
    st, sz, sc = (bt, bz, bc) if whole_blocks else (1, 1, 1)
    if not whole_blocks:
        rows = min(y, max(1, _STRIP // max(1, x * itemsize)))
    for t0 in range(0, t, st):
        for z0 in range(0, z, sz):
            for c0 in range(0, c, sc):
                for y0 in range(0, y, rows):
                    end = (min(t, t0 + st), min(z, z0 + sz), min(c, c0 + sc), min(y, y0 + rows), x)
                    box = array.read((t0, z0, c0, y0, 0), end)
                    for it, iz, ic in np.ndindex(box.shape[:3]):
                        plane = ((t0 + it) * z + z0 + iz) * c + c0 + ic
                        yield (plane * y + y0) * x * itemsize, np.ascontiguousarray(box[it, iz, ic])


def _write_all(descriptor: int, data: np.ndarray, offset: int) -> None:
    view = memoryview(data.reshape(-1).view(np.uint8).data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _head(image: ArrayImage) -> dict[str, Any]:
    """A record without its chunks."""
    meta, array = image.meta, image.array
    stored = array.stored
    grid = meta.grid or ChunkGrid(stored.y, stored.x, stored.z, stored.c, stored.t)
    return {
        "type": "ome.arrow",
        "id": meta.id,
        "name": meta.name,
        "image_type": meta.image_type,
        "acquisition_datetime": meta.acquired if meta.acquired is None else meta.acquired.replace(tzinfo=None),
        "pixels_meta": {
            "dimension_order": "XYCZT",
            "type": meta.pixel_type or pixel_type_name(array.dtype),
            **{f"size_{axis}": getattr(array.extent, axis) for axis in "xyzct"},
            **{f"physical_size_{axis}": size for axis, size in zip("zyx", meta.physical_size, strict=True)},
            **{f"physical_size_{axis}_unit": unit or None for axis, unit in zip("zyx", meta.physical_unit, strict=True)},
            "channels": [
                {
                    "id": channel.id,
                    "name": channel.name,
                    "emission_um": channel.emission_um,
                    "excitation_um": channel.excitation_um,
                    "illumination": channel.illumination,
                    "color_rgba": channel.color_rgba,
                }
                for channel in meta.channels
            ],
        },
        "chunk_grid": {
            "order": "TCZYX",
            **{f"chunk_{axis}": getattr(grid, axis) for axis in "tczyx"},
            "chunk_order": "ZYX",
        },
    }
