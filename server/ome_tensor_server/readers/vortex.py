"""Vortex files (https://vortex.dev), through what the package ``vortex-data`` makes of them in Arrow: an optional extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, ClassVar

import pyarrow as pa
import vortex

from ome_tensor.tables import first_line, split_columns

from .arrow_writer import write_images
from .base import Progress
from .files import FileSource
from .plain import checked, plain_schema

__all__ = ["VortexSource"]

#: About the bytes of a batch, and the rows.
_PIECE, _PIECE_ROWS = 64 << 20, 1 << 16

#: About the times that a file is smaller than what is in it.
_PACKED = 2


class VortexSource(FileSource):
    """A Vortex file. See :class:`OpenedSource`.

    Args:
        location: Its path.

    Raises:
        InvalidRecord: not a readable Vortex file, or none of its columns holds OME-Arrow images; names the file.
        OSError: it cannot be opened.
    """

    format: ClassVar[str] = "vortex"

    def __init__(self, location: str) -> None:
        super().__init__(location)
        size = self._stat.st_size
        with self._understood():
            # By the file that was opened, whatever its path names by now.
            self._vortex: Any = vortex.open(f"/proc/self/fd/{self.file.fileno()}")
            self.rows = len(self._vortex)
            self._step = max(1, min(_PIECE_ROWS, self.rows, self.rows * _PIECE // (_PACKED * size)))
            schema = self._vortex.to_arrow(batch_size=self._step).schema
        self.images, self.others = split_columns(schema, self.path)
        self.schema = plain_schema(schema, self.path.name)
        self.nbytes = _PACKED * size
        self.not_in_place = "Vortex files are read as a whole; write it as Parquet"

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, OSError, pa.ArrowException) as error:
            raise self.unreadable("Vortex file", first_line(error)) from None

    def write(self, file: IO[bytes], progress: Progress) -> None:
        """See :meth:`OpenedSource.write`."""
        # Vortex may give the same memory to several batches.
        self.rows = write_images(self.schema, self._tables(), file, progress, releases=False)

    def _tables(self) -> Iterator[pa.Table]:
        with self._understood():
            reader = self._vortex.to_arrow(batch_size=self._step)
        while True:
            with self._understood():
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    return
                table = checked(batch, self.schema, self.path.name)
            del batch
            yield table
            del table
