"""SelectImages: which rows of a table pass, how large their images are, and what else its columns say."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from ome_tensor.errors import DatasetChanged, InvalidArgument
from ome_tensor_proto.filters import filters_from_proto, passing
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .catalogue import Dataset

__all__ = ["check_version", "passing_rows", "select"]

#: Rows in a record batch, and about the bytes of one.
_ROWS, _BATCH_BYTES = 65_536, 1 << 20


def check_version(dataset: Dataset, version: str) -> None:
    """DatasetChanged where a dataset is not the version that a caller names."""
    if version and version != dataset.version:
        raise DatasetChanged(
            f"dataset {dataset.name!r} is now version {dataset.version}, not {version}: going on would mix pixels of two versions",
            field="if_version",
            value=version,
        )


def passing_rows(dataset: Dataset, message: pb.RowFilter) -> np.ndarray:
    """For each row, whether it passes a filter. Raises InvalidArgument where the filter does not fit the table."""
    return passing(_metadata(dataset), filters_from_proto(message))


def _metadata(dataset: Dataset) -> pa.Table:
    """The other columns; a table without any still has its rows."""
    metadata = dataset.metadata
    return pa.table({}) if metadata is None else metadata


def select(request: pb.SelectImagesRequest, dataset: Dataset) -> Iterator[pb.SelectImagesResponse]:
    """The messages of an answer.

    Raises:
        InvalidArgument: a column that is not there, or a filter that does not fit.
        DatasetChanged: the dataset is of another version.
    """
    check_version(dataset, request.if_version)
    metadata = _metadata(dataset)
    wanted = metadata.schema.names if request.all_metadata else list(request.metadata_columns)
    for name in wanted:
        if name not in metadata.schema.names:
            raise InvalidArgument(
                f"dataset {dataset.name!r} has no other column {name!r}; it has: {', '.join(metadata.schema.names[:20]) or 'none'}",
                field="metadata_columns",
                value=name,
            )
    chosen = passing_rows(dataset, request.filter) if request.HasField("filter") else np.ones(dataset.rows, bool)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    if request.whole_table:
        rows = np.flatnonzero(chosen)
    else:
        _, images = dataset.column(request.column or None)
        rows = np.flatnonzero(chosen & images.is_valid())
        sizes = images.sizes(rows)
        columns = {f"ome_tensor.{axis}": pa.array(sizes.extents[:, place], pa.int32()) for place, axis in enumerate("tzcyx")}
        columns["ome_tensor.dtype"] = pa.array(sizes.dtypes, pa.string())
        problems = [""] * len(rows)
        for place, problem in sizes.problems.items():
            problems[place] = problem
        columns["ome_tensor.problem"] = pa.array(problems, pa.string())
    table = pa.table({"ome_tensor.row": pa.array(rows, pa.int64())} | columns)
    for name in wanted:
        field = metadata.schema.field(name)
        if name in table.schema.names:
            raise InvalidArgument(
                f"column {name!r} has the name of one of this answer's own", field="metadata_columns", value=name
            )
        table = table.append_column(field.remove_metadata(), metadata.column(name).take(pa.array(rows)))
    yield from _messages(table, dataset.version)


def _messages(table: pa.Table, version: str) -> Iterator[pb.SelectImagesResponse]:
    sink = io.BytesIO()
    step = max(1, min(_ROWS, _BATCH_BYTES * max(table.num_rows, 1) // max(table.nbytes, 1)))
    head = pb.SelectImagesResponse(dataset_version=version, row_count=table.num_rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=step):
            writer.write_batch(batch)
            head.payload = sink.getvalue()
            yield head
            head = pb.SelectImagesResponse()
            sink.seek(0)
            sink.truncate()
    head.payload = sink.getvalue()
    yield head
