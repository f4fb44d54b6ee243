"""What every reader of a format offers: a description of what a source holds, all of it as one Arrow IPC file, and, where that is too much, its
pixels one block at a time.

Foreign bytes are read in a process of their own (:mod:`..loader`), which may run out of memory or crash without taking the server with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, ClassVar, Self, TypeAlias

import pyarrow as pa

from ome_tensor.blocks import ChunkCache
from ome_tensor.columns import Column
from ome_tensor.errors import InvalidRecord
from ome_tensor.tables import LoadedTable

__all__ = ["PIXELS", "InPlace", "OpenedSource", "Progress", "SourceInfo", "changed"]

#: What of a record is pixels.
PIXELS = ("planes", "chunks")

#: Called with the number of bytes written so far; may raise, which ends the reading.
Progress: TypeAlias = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What a source holds, without its pixels. All of it JSON: it travels from a loader to the server.

    Attributes:
        format: ``parquet``, ``arrow``, ``typed-chunks``, ``vortex``, ``ome-tiff``, ``ome-zarr`` or ``npy``.
        images: The image columns.
        others: Name and Arrow type of the other columns.
        rows: Number of rows.
        nbytes: About the memory that it takes when loaded, in bytes.
        fingerprint: What differs once the source was changed, and costs little to find out.
        not_in_place: Why it cannot be served in place, for a person; empty where it can.
    """

    format: str
    images: Sequence[str]
    others: Sequence[Sequence[str]]
    rows: int
    nbytes: int
    fingerprint: str
    not_in_place: str = ""


@dataclass(frozen=True, slots=True)
class InPlace:
    """A source that is served as it lies.

    Attributes:
        table: Its rows, other columns and version; no image column.
        columns: The image columns: their pixels are read when they are asked for.
        records: The records of the image columns, and of the columns of their pyramids' levels, without their pixels, by column.
    """

    table: LoadedTable
    columns: Mapping[str, Column]
    records: Mapping[str, pa.ChunkedArray] = field(default_factory=dict)


def changed(location: str) -> InvalidRecord:
    """The error of a source that is served in place and is not what it was."""
    name = location.rstrip("/").rpartition("/")[2]
    return InvalidRecord(f"{name} was changed while it is served; refresh it", field="path", value=name)


class OpenedSource(ABC):
    """A source of images, opened.

    Attributes:
        format: See :class:`SourceInfo`.
        location: Absolute path, or address.
        schema: What :meth:`write` writes: image columns, columns of their pyramids' levels (see :data:`ome_tensor.tables.LEVEL`), and the other
            columns, these in types that Arrow IPC keeps as they are (no dictionaries).
        images: The image columns.
        others: Name and Arrow type in the source of the other columns.
        rows: Number of rows.
        nbytes: About the bytes that :meth:`write` writes.
        not_in_place: Why it cannot be served in place; empty where it can.
    """

    format: ClassVar[str]
    location: str
    schema: pa.Schema
    images: Sequence[str]
    others: Sequence[tuple[str, str]]
    rows: int
    nbytes: int
    not_in_place: str = ""

    @abstractmethod
    def version(self) -> str:
        """16 hexadecimal digits of a digest of the source's contents."""

    @abstractmethod
    def fingerprint(self) -> str:
        """See :class:`SourceInfo`. Equal as long as nobody has touched the source."""

    @abstractmethod
    def is_unchanged(self) -> bool:
        """Whether it still is what was opened: looked at when it has been read, before anything that was made of it is made known."""

    def check_read(self) -> None:
        """Check that what was just read, while it is served in place, is of what was opened: after each read, before anything is made of it.

        Raises:
            InvalidRecord: it was changed.
        """
        if not self.is_unchanged():
            raise self.changed()

    def changed(self) -> InvalidRecord:
        """The error of a source that is not what was opened any more."""
        return changed(self.location)

    @abstractmethod
    def write(self, file: IO[bytes], progress: Progress) -> None:
        """Write everything as an uncompressed Arrow IPC file of :attr:`schema`, a piece at a time.

        Raises:
            InvalidRecord: the source is damaged; names it.
            OSError: it cannot be read, or the file not be written.
        """

    @property
    def is_mapped(self) -> bool:
        """Whether the source is an uncompressed Arrow IPC file itself: then it is served as it is, and need not be written."""
        return False

    def in_place(self, version: str, cache: ChunkCache) -> InPlace:
        """The source as it is served in place.

        Args:
            version: What its contents are called.
            cache: Where decompressed chunks are kept.

        Raises:
            InvalidRecord: it cannot be read.
            NotImplementedError: :attr:`not_in_place` says why it cannot.
        """
        raise NotImplementedError(self.not_in_place)

    def validate(self) -> None:
        """Look through a source that :attr:`is_mapped`, since it is served unread. Raises InvalidRecord where it is damaged."""
        raise NotImplementedError(self.format)

    @abstractmethod
    def close(self) -> None:
        """Close the source."""

    def info(self) -> SourceInfo:
        """What it holds."""
        others = [list(other) for other in self.others]
        # A header may claim any size; one of that size does not fit anywhere.
        nbytes = min(self.nbytes, 1 << 62)
        return SourceInfo(self.format, list(self.images), others, self.rows, nbytes, self.fingerprint(), self.not_in_place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
