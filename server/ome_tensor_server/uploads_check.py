"""Looking through an upload before it is kept: in a loader's process."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ome_tensor.blocks import ChunkCache
from ome_tensor.errors import InvalidRecord, OmeTensorError
from ome_tensor.pixels import StoredPixels
from ome_tensor.tables import first_line, split_columns

__all__ = ["check_upload"]


def check_upload(location: str) -> int:
    """Look through an Arrow IPC stream: that it is whole, that its images have metadata, and that each has all of its pixels.

    Args:
        location: The file.

    Returns:
        About the bytes that it takes when loaded: nothing of it is compressed then.

    Raises:
        InvalidRecord: anything of it cannot be served; names the row and the column.
    """
    path = Path("the upload")
    try:
        with pa.OSFile(location) as file, pa.ipc.open_stream(file) as reader:
            images, _ = split_columns(reader.schema, path)
            if not all(reader.schema.names):
                raise InvalidRecord("the upload has a column without a name", field="payload")
            row = nbytes = 0
            for batch in reader:
                batch.validate(full=True)
                for name in images:
                    _check_column(batch.column(batch.schema.names.index(name)), name, row)
                row += batch.num_rows
                nbytes += batch.nbytes
            # Arrow takes a stream that ends without its marker for a whole one.
            size, end = file.size(), file.tell()
            file.seek(max(0, size - 8))
            if file.read(8) != b"\xff\xff\xff\xff\0\0\0\0":
                raise InvalidRecord("the upload ends without the end-of-stream marker: it is not whole", field="payload")
            if end != size:
                raise InvalidRecord(
                    f"the upload has {size - end} bytes behind the end of its stream: send one stream", field="payload"
                )
            if row == 0:
                raise InvalidRecord("the upload has no rows", field="payload")
            return nbytes
    except (OmeTensorError, MemoryError):
        raise
    except (pa.ArrowException, OSError) as error:
        raise InvalidRecord(f"the upload is not a readable Arrow stream: {first_line(error)}", field="payload") from None


def _check_column(array: pa.StructArray, name: str, first: int) -> None:
    # A chunk is decompressed once and not kept.
    cache = ChunkCache(0)
    for place in range(len(array)):
        record = array[place]
        if not record.is_valid:
            continue
        try:
            StoredPixels(record, cache).index.check()
        except OmeTensorError as error:
            raise InvalidRecord(
                f"row {first + place} of column {name!r} of the upload: {error.message}", field=error.field, value=error.value
            ) from None
