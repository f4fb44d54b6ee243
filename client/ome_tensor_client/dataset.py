"""A dataset as its user sees it: its columns and rows, its images, and what else its table says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from google.protobuf.message import DecodeError

from ome_tensor.errors import BrokenStream, InvalidArgument, InvalidRecord
from ome_tensor.keys import check_name, format_key
from ome_tensor.listing import DatasetInfo, DatasetState, ImageInfo
from ome_tensor_proto.filters import filters_to_proto
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .image_set import ImageSet

if TYPE_CHECKING:
    from .client import Client

__all__ = ["RemoteDataset"]

_AXES = "tzcyx"


class RemoteDataset:
    """A dataset on a server. Its attributes are those of :class:`~ome_tensor.listing.DatasetInfo`, as they were when it was asked for.

    Args:
        client: Of the server.
        info: What the server says of it.

    Attributes:
        info: As given.
    """

    name: str
    version: str
    image_count: int
    row_count: int
    image_columns: tuple[str, ...]
    other_columns: tuple[tuple[str, str], ...]
    resident_bytes: int
    source_name: str
    state: DatasetState
    progress: float
    problem: str
    estimated_bytes: int
    format: str

    def __init__(self, client: Client, info: DatasetInfo) -> None:
        self._client = client
        self.info = info
        for field in fields(info):
            setattr(self, field.name, getattr(info, field.name))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns: image columns, then the others."""
        return (*self.image_columns, *(name for name, _ in self.other_columns))

    def __len__(self) -> int:
        """Number of rows."""
        return self.row_count

    def __repr__(self) -> str:
        return f"RemoteDataset({self.name!r}, {self.row_count} rows, columns {', '.join(self.columns)})"

    def images(
        self,
        column: str | None = None,
        filters: Any = None,
        *,
        metadata: bool | Sequence[str] = False,
        level: int = 0,
        on_problem: Literal["raise", "skip"] = "raise",
    ) -> ImageSet:
        """The images of a column in rows that pass, in the order of their rows. Their sizes are asked for, no pixel.

        Args:
            column: The image column; may be left out where there is only one.
            filters: Which rows, by the values of other columns, as pyarrow's ``filters``: a list of ``(column, comparison, value)``, all of which
                must pass (``=``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``in``, ``not in``), or a list of such lists, any of which must. A null
                passes nothing.
            metadata: Other columns whose values are wanted as :attr:`ImageSet.metadata`; ``True`` for all.
            level: Of the images' resolution pyramids.
            on_problem: What becomes of images whose metadata are damaged: ``raise``, or ``skip`` them.

        Raises:
            InvalidArgument: a column that is not there, or filters that do not fit their columns.
            ImageNotFound: no such image column, or several and none named.
            InvalidRecord: an image is damaged; names the first, and says how many there are.
        """
        if on_problem not in ("raise", "skip"):
            raise InvalidArgument(f"on_problem must be raise or skip, not {on_problem!r}", field="on_problem", value=on_problem)
        level = checked_level(level)
        request = self._request(column, filters, metadata)
        table, version = self._client.select(request)
        name = request.column or (self.image_columns[0] if self.image_columns else "")
        rows = np.asarray(table.column("ome_tensor.row"))
        problems = table.column("ome_tensor.problem").to_pylist()
        bad = [place for place, problem in enumerate(problems) if problem]
        if bad and on_problem == "raise":
            key = format_key(self.name, name, int(rows[bad[0]]))
            more = f"; {len(bad)} images are damaged in all (on_problem='skip' leaves them out)" if len(bad) > 1 else ""
            raise InvalidRecord(f"{key}: {problems[bad[0]]}{more}", field="image", value=key)
        if bad:
            table = table.filter(pa.array([not problem for problem in problems]))
            rows = np.asarray(table.column("ome_tensor.row"))
        extents = np.empty((len(rows), 5), np.int64)
        for place, axis in enumerate(_AXES):
            extents[:, place] = np.asarray(table.column(f"ome_tensor.{axis}"))
        if level:
            extents = self._level_extents(name, filters, rows, level)
        own = [column for column in table.column_names if not column.startswith("ome_tensor.")]
        return ImageSet(
            self._client._connection,
            self.name,
            name,
            version,
            np.asarray(rows, np.int64),
            extents,
            table.column("ome_tensor.dtype").to_pylist(),
            table.select(own) if metadata else None,
            level,
        )

    def _level_extents(self, column: str, filters: Any, rows: np.ndarray, level: int) -> np.ndarray:
        """The sizes of a level of images: how large one is is each image's own affair."""
        found = {image.row: image.levels for image in self.list(column, filters, page_size=1000)}
        extents = np.empty((len(rows), 5), np.int64)
        for place, row in enumerate(rows.tolist()):
            levels = found.get(row, ())
            if level >= len(levels):
                raise InvalidArgument(
                    f"{format_key(self.name, column, row)} has levels 0 to {len(levels) - 1}, not {level}",
                    field="level",
                    value=level,
                )
            extents[place] = levels[level].shape
        return extents

    def metadata(self, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
        """What other columns say, as a table; the row numbers come first, as ``ome_tensor.row``.

        Args:
            columns: Names of other columns, in the wanted order; all by default.
            filters: As :meth:`images`.

        Raises:
            InvalidArgument: a column that is not there, or filters that do not fit.
        """
        request = self._request(None, filters, True if columns is None else columns)
        request.whole_table = True
        return self._client.select(request)[0]

    def list(self, column: str | None = None, filters: Any = None, *, page_size: int = 0) -> Iterator[ImageInfo]:
        """What is said of each image, fetched page by page while iterating; see :meth:`Client.images`."""
        return self._client.images(self.name, column, filters=filters, page_size=page_size)

    def _request(self, column: str | None, filters: Any, metadata: bool | Sequence[str]) -> pb.SelectImagesRequest:
        request = pb.SelectImagesRequest(dataset=self.name)
        if column is not None:
            request.column = check_name(column, "column", "column name")
        if filters is not None:
            request.filter.CopyFrom(filters_to_proto(filters))
        if isinstance(metadata, str):
            raise InvalidArgument(f"columns must be a list of names, not {metadata!r}", field="columns", value=metadata)
        if metadata is True:
            request.all_metadata = True
        elif metadata:
            request.metadata_columns.extend(check_name(name, "columns", "column name") for name in metadata)
        return request


def checked_level(level: object) -> int:
    """A pyramid level. Raises InvalidArgument where it is none."""
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < 2**32:
        raise InvalidArgument(f"level must be a number from 0: {level!r}", field="level", value=level)
    return level


def read_selection(messages: Iterator[bytes]) -> tuple[pa.Table, str]:
    """The table of a SelectImages stream, and the dataset's version. Raises BrokenStream where it is not whole."""
    payloads, version, rows = [], "", -1
    for message in messages:
        try:
            part = pb.SelectImagesResponse.FromString(message)
        except DecodeError:
            raise BrokenStream("a part of the table is not a valid message") from None
        if rows < 0:
            version, rows = part.dataset_version, part.row_count
        payloads.append(part.payload)
    try:
        table = pa.ipc.open_stream(pa.py_buffer(b"".join(payloads))).read_all()
        table.validate()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BrokenStream(f"the table did not arrive whole: {error}") from None
    if table.num_rows != rows or not payloads[-1].endswith(b"\xff\xff\xff\xff\0\0\0\0"):
        raise BrokenStream(f"{table.num_rows} of {rows} rows arrived")
    return table, version
