"""Sending a dataset to a server: whatever holds images becomes an Arrow IPC stream, a piece at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from google.protobuf.message import DecodeError

from ome_tensor.errors import BrokenStream, InvalidArgument, Unavailable
from ome_tensor.keys import check_name
from ome_tensor.late import is_late, late_buffer
from ome_tensor.listing import DatasetInfo
from ome_tensor.pixel_types import check_dtype
from ome_tensor.tables import first_line, is_image_type
from ome_tensor_proto.checksums import UploadChecksum
from ome_tensor_proto.listing import dataset_from_proto
from ome_tensor_proto.v1 import admin_service_pb2 as pb

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["upload"]

#: Bytes in a message.
_MESSAGE = 1 << 20

#: About the bytes of a record batch that is read from a file.
_BATCH = 64 << 20

_AXES = "TZCYX"

_IMAGE_TYPES = ("image", "label")

_CHUNK = pa.struct(
    [
        *((name, pa.int32()) for name in ("t", "z", "c", "y", "x", "shape_z", "shape_y", "shape_x")),
        ("dtype", pa.string()),
        ("pixel_bytes", pa.large_binary()),
    ]
)
_CHANNEL = pa.struct([("id", pa.string()), ("name", pa.string())])
_HEAD = pa.struct(
    [
        ("id", pa.string()),
        ("name", pa.string()),
        ("image_type", pa.string()),
        (
            "pixels_meta",
            pa.struct(
                [
                    ("type", pa.string()),
                    *((f"size_{axis.lower()}", pa.int32()) for axis in _AXES),
                    *((f"physical_size_{axis}", pa.float64()) for axis in "xyz"),
                    *((f"physical_size_{axis}_unit", pa.string()) for axis in "xyz"),
                    ("channels", pa.list_(_CHANNEL)),
                ]
            ),
        ),
        ("chunk_grid", pa.struct([(f"chunk_{axis}", pa.int32()) for axis in "zyx"])),
    ]
)
_RECORD = pa.struct([*_HEAD, pa.field("chunks", pa.large_list(_CHUNK))])


class _Late(NamedTuple):
    """A record batch, one buffer of which is made only while it is sent: that which ``buffer`` stands for, of these parts."""

    batch: pa.RecordBatch
    buffer: pa.Buffer
    parts: Iterator[memoryview]


Batches = tuple[pa.Schema, Iterator["pa.RecordBatch | _Late"], int]


def upload(
    connection: Connection,
    name: str,
    data: Any,
    *,
    replace: bool = False,
    column: str = "image",
    axes: str = "",
    image_type: str = "image",
    channel_names: Sequence[str] = (),
    physical_size: tuple[float, float, float] | None = None,
    progress: Callable[[int, int], None] = lambda sent, total: None,
) -> DatasetInfo:
    """Send a dataset; it is served once this returns, and after every restart of the server. Before that, nothing of it is.

    Args:
        connection: The server.
        name: What to call it.
        data: A NumPy array of 2 to 5 axes; an ``ome_arrow.OMEArrow``, or an OME-Arrow StructScalar or StructArray; a table with image columns
            (pyarrow, or whatever exports the Arrow stream protocol, as pandas and polars do); or the path of a Parquet, Arrow or ``.npy`` file.
        replace: Take the place of an upload of that name.
        column: Name of the image column where ``data`` is no table.
        axes: Axes of an array, letters of TZCYX each at most once; by default its last axes: YX, CYX, ZCYX, TZCYX.
        image_type: Of an array: ``image`` or ``label``.
        channel_names: Of an array, as many as it has channels.
        physical_size: Of an array, size of a pixel along Z, Y and X in micrometres.
        progress: Told how many bytes have been sent, and about how many there are (0: unknown).

    Raises:
        InvalidArgument: data that hold no images, or a name that is taken.
        InvalidRecord: images are damaged; names the row.
        LimitExceeded: it is larger than the server takes.
        NotAllowed, NotSupported: the server takes no uploads, from this caller or at all.
        BrokenStream: it was damaged on its way; nothing of it was taken.
        Unavailable: the connection was lost: whether the upload was taken then, ``client.dataset(name)`` tells.
    """
    check_name(name, "name", "dataset name")
    if not check_name(column, "column", "column name"):
        raise InvalidArgument("column must be a name, not ''", field="column", value=column)
    schema, batches, total = _batches(data, column, axes, image_type, channel_names, physical_size)
    if not any(is_image_type(field.type) for field in schema):
        raise InvalidArgument(
            f"there is no OME-Arrow image column among the columns: {', '.join(schema.names) or 'none'}", field="data"
        )
    failures: list[Exception] = []

    def messages() -> Iterator[bytes]:
        header = pb.UploadHeader(name=name, replace=replace, checked=True)
        sent = 0
        checksum = UploadChecksum(name)
        yield pb.UploadDatasetRequest(header=header).SerializeToString()
        try:
            for payload in _stream(schema, batches):
                checksum.update(payload)
                yield pb.UploadDatasetRequest(payload=payload).SerializeToString()
                sent += len(payload)
                progress(sent, max(total, sent) if total else 0)
        except Exception as error:
            # gRPC would only say that there was one. The stream then lacks its end, and the server takes nothing.
            failures.append(error)
            raise
        # What the network damages is not to be kept for good.
        yield pb.UploadDatasetRequest(xxh3=checksum.number).SerializeToString()

    try:
        answer = connection.send("UploadDataset", messages())
    except Exception as error:
        if failures:
            raise _readable(failures[0]) from None
        if isinstance(error, Unavailable):
            raise Unavailable(
                f"{error.message}; whether {name!r} was taken, a look at the server's datasets tells",
                field=error.field,
                value=error.value,
            ) from None
        raise
    try:
        return dataset_from_proto(pb.UploadDatasetResponse.FromString(answer).dataset)
    except DecodeError:
        raise BrokenStream("the answer to UploadDataset is not a valid message") from None


def _readable(error: Exception) -> Exception:
    if isinstance(error, (pa.ArrowException, OSError)):
        return InvalidArgument(f"the data cannot be read: {first_line(error)}", field="data")
    return error


def _stream(schema: pa.Schema, batches: Iterator[pa.RecordBatch | _Late]) -> Iterator[bytes]:
    """An Arrow IPC stream in parts of a message's size."""
    sink = _Parts()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as writer:
        for batch in batches:
            sink.late = batch if isinstance(batch, _Late) else None
            writer.write_batch(batch.batch if isinstance(batch, _Late) else batch)
            yield from sink.taken()
    yield from sink.taken()


class _Parts:
    """A file for Arrow to write to, which keeps what is written until it is taken."""

    def __init__(self) -> None:
        self._parts: list[Iterable[Any]] = []
        self._size = 0
        self.late: _Late | None = None
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._size += len(view)
        if self.late is not None and is_late(data, self.late.buffer):
            self._parts.append(self.late.parts)
            return len(view)
        # A small buffer may be used again for the next; a large one is a batch's own and stays as it is.
        self._parts.append([view if len(view) >= _MESSAGE else bytes(view)])
        return len(view)

    def taken(self) -> Iterator[bytes]:
        """What has been written, in parts."""
        parts, self._parts = self._parts, []
        small = bytearray()
        for part in chain.from_iterable(parts):
            for at in range(0, len(part), _MESSAGE):
                piece = part[at : at + _MESSAGE]
                if len(small) + len(piece) > _MESSAGE:
                    yield bytes(small)
                    small.clear()
                small += piece
        if small:
            yield bytes(small)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self.closed = True


def _batches(
    data: Any,
    column: str,
    axes: str,
    image_type: str,
    channel_names: Sequence[str],
    physical_size: tuple[float, float, float] | None,
) -> Batches:
    """The data as record batches, their schema, and about how many bytes they are."""
    if isinstance(data, (str, os.PathLike)):
        return _of_file(Path(data), column, axes, image_type, channel_names, physical_size)
    if isinstance(data, np.ndarray):
        return _of_array(data, column, axes, image_type, channel_names, physical_size)
    for field, given in (
        ("axes", axes),
        ("channel_names", channel_names),
        ("physical_size", physical_size),
        ("image_type", image_type != "image" and image_type),
    ):
        if given:
            raise InvalidArgument(f"{field} is for arrays, which say nothing of it themselves", field=field, value=given)
    own = getattr(data, "data", None)
    if type(data).__module__.partition(".")[0] == "ome_arrow" and own is not None:
        data = own
    if isinstance(data, pa.StructScalar):
        data = _array_of(data)
    if isinstance(data, pa.ChunkedArray):
        data = pa.table({column: data})
    if isinstance(data, pa.StructArray):
        data = pa.table({column: data})
    if isinstance(data, pa.RecordBatch):
        data = pa.Table.from_batches([data])
    if isinstance(data, pa.RecordBatchReader):
        return data.schema, iter(data), 0
    if not isinstance(data, pa.Table) and hasattr(data, "__arrow_c_stream__"):
        data = pa.table(data)
    if isinstance(data, pa.Table):
        if data.num_rows == 0:
            raise InvalidArgument("the table has no rows", field="data")
        return data.schema, iter(data.to_batches(max_chunksize=_rows(data.nbytes, data.num_rows))), data.nbytes
    raise InvalidArgument(
        "data must be a NumPy array, an OMEArrow, a table, or the path of a Parquet, Arrow or .npy file, not "
        f"{type(data).__name__}",
        field="data",
        value=type(data).__name__,
    )


def _array_of(record: pa.StructScalar) -> pa.StructArray:
    """A record as an array of one."""
    if not record.is_valid:
        return pa.array([], record.type)
    try:
        return pa.array([record], record.type)
    except pa.ArrowNotImplementedError:
        # Arrow (as of 26) cannot append a field of no type; through Python's objects it can.
        return pa.array([record.as_py()], record.type)


def _rows(nbytes: int, rows: int) -> int:
    """Rows of a record batch of a usual size."""
    return max(1, min(rows, rows * _BATCH // max(nbytes, 1)))


def _of_file(path: Path, column: str, axes: str, image_type: str, names: Sequence[str], size: Any) -> Batches:
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if head.startswith(b"\x93NUMPY"):
            return _of_array(np.load(path, mmap_mode="r", allow_pickle=False), column, axes, image_type, names, size)
        if head.startswith(b"PAR1"):
            # Only where it is needed: it takes a while to import.
            import pyarrow.parquet as pq

            parquet = pq.ParquetFile(path, pre_buffer=False)
            metadata = parquet.metadata
            rows = max(metadata.num_rows, 1)
            nbytes = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
            return parquet.schema_arrow, parquet.iter_batches(_rows(nbytes, rows)), nbytes
        if head.startswith(b"ARROW1"):
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            return reader.schema, batches, path.stat().st_size
        if head.startswith(b"\xff\xff\xff\xff"):
            stream = pa.ipc.open_stream(pa.memory_map(str(path)))
            return stream.schema, iter(stream), path.stat().st_size
    except (pa.ArrowException, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"{path} cannot be read: {first_line(error)}", field="data", value=str(path)) from None
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror or error}", field="data", value=str(path)) from None
    raise InvalidArgument(
        f"{path} is not a Parquet, Arrow or .npy file; OME-TIFF and OME-Zarr are read by the server: register them there",
        field="data",
        value=str(path),
    )


def _physical_size(size: Any) -> Sequence[float | None]:
    """Size of a pixel along Z, Y and X, in micrometres. Raises InvalidArgument."""
    if size is None:
        return (None, None, None)
    try:
        # Text could be read as a number, too: whoever sends it means something else.
        found = [one if one is None else math.nan if isinstance(one, str) else float(one) for one in size]
    except (TypeError, ValueError):
        found = []
    if len(found) != 3 or not all(one is None or (math.isfinite(one) and one > 0) for one in found):
        raise InvalidArgument(
            f"physical_size must be three positive numbers (along Z, Y and X, in micrometres), not {size!r}",
            field="physical_size",
            value=size,
        )
    return found


def _of_array(
    array: np.ndarray, column: str, axes: str, image_type: str, channel_names: Sequence[str], physical_size: Any
) -> Batches:
    """One image of an array: one chunk of bytes for each plane."""
    dtype = check_dtype(array.dtype)
    if not isinstance(axes, str):
        raise InvalidArgument(f"axes must be text of letters of TZCYX, not {axes!r}", field="axes", value=axes)
    letters = (axes or {2: "YX", 3: "CYX", 4: "ZCYX", 5: "TZCYX"}.get(array.ndim, "")).upper()
    if len(letters) != array.ndim or len(set(letters)) != len(letters) or not {"Y", "X"} <= set(letters) <= set(_AXES):
        raise InvalidArgument(
            f"axes must name the array's {array.ndim} axes with letters of TZCYX, Y and X among them, not {axes!r}",
            field="axes",
            value=axes,
        )
    order = [letters.index(axis) for axis in _AXES if axis in letters]
    whole = np.expand_dims(array.transpose(order), [place for place, axis in enumerate(_AXES) if axis not in letters])
    if not whole.size:
        raise InvalidArgument(f"the array of shape {array.shape} has no pixels", field="data", value=array.shape)
    t, z, c, y, x = whole.shape
    if image_type not in _IMAGE_TYPES:
        raise InvalidArgument(f"image_type must be 'image' or 'label', not {image_type!r}", field="image_type", value=image_type)
    if isinstance(channel_names, str) or not all(isinstance(one, str) for one in channel_names):
        raise InvalidArgument(f"channel_names must be texts, not {channel_names!r}", field="channel_names", value=channel_names)
    if channel_names and len(channel_names) != c:
        raise InvalidArgument(
            f"the array has {c} channels, and there are {len(channel_names)} names",
            field="channel_names",
            value=list(channel_names),
        )
    sizes = dict(zip("zyx", _physical_size(physical_size), strict=True))
    record = {
        "id": column,
        "name": column,
        "image_type": image_type,
        "pixels_meta": {
            "type": dtype.name,
            **{f"size_{axis.lower()}": size for axis, size in zip(_AXES, whole.shape, strict=True)},
            **{f"physical_size_{axis}": size for axis, size in sizes.items()},
            **{f"physical_size_{axis}_unit": None if size is None else "µm" for axis, size in sizes.items()},
            "channels": [{"id": f"Channel:0:{number}", "name": one} for number, one in enumerate(channel_names)],
        },
        "chunk_grid": {"chunk_z": 1, "chunk_y": y, "chunk_x": x},
    }
    count, plane = t * z * c, y * x * dtype.itemsize
    # Plane by plane as they are sent: the array is in memory once, if at all.
    buffer = late_buffer(count * plane)
    pixels = pa.Array.from_buffers(
        pa.large_binary(), count, [None, pa.py_buffer(np.arange(count + 1, dtype=np.int64) * plane), buffer]
    )
    places = np.indices((t, z, c), np.int32).reshape(3, -1)
    fixed = (np.full(count, value, np.int32) for value in (0, 0, 1, y, x))
    chunks = pa.StructArray.from_arrays(
        [*map(pa.array, places), *map(pa.array, fixed), pa.array([dtype.name] * count, pa.string()), pixels], fields=list(_CHUNK)
    )
    lists = pa.LargeListArray.from_arrays(pa.array([0, count], pa.int64()), chunks).cast(_RECORD.field("chunks").type)
    image = pa.StructArray.from_arrays([*pa.array([record], _HEAD).flatten(), lists], fields=list(_RECORD))
    schema = pa.schema([(column, _RECORD)])
    batch = pa.RecordBatch.from_arrays([image], schema=schema)
    planes = (np.ascontiguousarray(whole[place], dtype).reshape(-1).view(np.uint8).data for place in np.ndindex(whole.shape[:3]))
    return schema, iter([_Late(batch, buffer, planes)]), batch.nbytes
