"""Sources that are served where they lie: what is known of them is in the process that serves them, and their pixels are read by others.

So a source that is damaged, or made to do harm, costs a reader's process and an error, as one that is loaded does. The other side is
:mod:`.in_place_jobs`.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ome_tensor.columns import ImageColumn
from ome_tensor.pixels import Pixels
from ome_tensor.record import ImageMeta
from ome_tensor.selection import Selection
from ome_tensor.tables import LoadedTable, level_columns

from .entries import Entry
from .finding import check_below
from .loads import as_problem
from .processes import Pool, shared_pool
from .readers.base import InPlace
from .readers.known import KnownColumn
from .settings import Settings

__all__ = ["Readers", "open_in_place", "settings_readers", "shared_readers"]

#: Bytes that may be known of a source without its pixels, or be handed out as stored values at one time.
_LARGEST = 1 << 30


class Readers(Pool):
    """Has pixels read in processes of their own, which keep sources open. For any number of threads. See :class:`Pool`.

    Args:
        memory_limit: Bytes of memory that each process may have.
        cache_bytes: Bytes of decoded blocks that all processes keep together.
        max_chunk_bytes: Largest block that is decoded.
        patience: See :class:`Pool`.

    Attributes:
        most: Processes at one time.
        hits, misses: How often a block was there, and how often one had to be decoded.
    """

    #: At one time, and kept: each is a decoder at work.
    most: ClassVar[int] = min(4, os.cpu_count() or 1)
    _most_idle = most

    #: Others wait for their turn meanwhile.
    _opening = 2

    #: Each has a cache that is warm, and sources open.
    _most_jobs: ClassVar[int] = 1_000_000

    def __init__(
        self, memory_limit: int = 0, cache_bytes: int = 64 << 20, max_chunk_bytes: int | None = None, patience: float = 60.0
    ) -> None:
        super().__init__(memory_limit, patience)
        self._common = {"cache_bytes": cache_bytes // self.most, "max_chunk_bytes": max_chunk_bytes}
        self._turns = threading.BoundedSemaphore(self.most)
        self._counting = threading.Lock()
        self.hits = self.misses = 0

    def ask(self, job: str, entry: Entry, descriptor: int | None = None, **values: Any) -> dict[str, Any]:
        """What comes of a job on a source.

        Args:
            job: Its name; see :class:`InPlaceJobs`.
            entry: The source.
            descriptor: Where it writes to.
            values: What else it is told.

        Raises:
            InvalidRecord: the source is damaged, was changed, or ended its reader.
            LimitExceeded, InvalidArgument, Unavailable and the like: it cannot be read.
        """
        source = {"location": entry.location, "fingerprint": entry.fingerprint, "version": entry.version}
        try:
            with self._turns:
                return self._run({"job": job, **source, **self._common, **values}, descriptor)
        except OSError as error:
            raise as_problem(error, entry.location) from None

    def count(self, hits: int, misses: int) -> None:
        """So many blocks were there, and so many had to be decoded."""
        with self._counting:
            self.hits += hits
            self.misses += misses


def shared_readers(memory_limit: int = 0, cache_bytes: int = 64 << 20, max_chunk_bytes: int | None = None) -> Readers:
    """This process's readers with such limits. See :class:`Readers`."""
    return shared_pool(Readers, memory_limit, cache_bytes, max_chunk_bytes)


def settings_readers(settings: Settings) -> Readers:
    """This process's readers with the limits of a server's settings."""
    return shared_readers(settings.reader_bytes, settings.reader_cache_bytes, settings.max_chunk_bytes)


def open_in_place(entry: Entry, readers: Readers) -> InPlace:
    """A source to be served as it lies.

    Args:
        entry: The dataset; its version is what the source's contents are called.
        readers: Read its pixels.

    Raises:
        InvalidRecord: it cannot be read, or is not what it was when it was looked at.
        InvalidArgument: it leads out of its root.
        MissingDependency, LimitExceeded, Unavailable, OSError: it cannot be opened.
    """
    check_below(entry.location, entry.root)
    descriptor = os.memfd_create("ome-tensor-outline", os.MFD_CLOEXEC)
    try:
        said = readers.ask("outline", entry, descriptor, limit=_LARGEST)
        # Read, not mapped: the other process has it open, too.
        with open(descriptor, "rb", closefd=False) as file:
            file.seek(0)
            table = pa.ipc.open_file(pa.py_buffer(file.read())).read_all()
    finally:
        os.close(descriptor)
    check_below(entry.location, entry.root)
    others = tuple((name, kind) for name, kind in said["others"])
    metadata = table.select([name for name, _ in others])
    columns = {}
    for name in said["images"]:
        levels = [table.column(level) for level in level_columns(table.schema, name)]
        columns[name] = _FarColumn(entry, name, table.column(name), levels, readers)
    return InPlace(LoadedTable({}, others, said["rows"], entry.version, metadata=metadata), columns)


class _FarColumn(KnownColumn):
    """An image column whose pixels are read elsewhere. See :class:`~ome_tensor.columns.Column`."""

    def __init__(
        self, entry: Entry, name: str, records: pa.ChunkedArray, levels: Sequence[pa.ChunkedArray], readers: Readers
    ) -> None:
        super().__init__(records, levels)
        self._levels = [ImageColumn(level, None) for level in levels]
        self._entry, self._name, self._readers = entry, name, readers

    def pixels(self, row: int, level: int = 0) -> Pixels:
        """See :meth:`Column.pixels`."""
        meta = self.meta(row) if level == 0 else self._levels[level - 1].meta(row)
        return _FarPixels(meta, self._entry, self._readers, {"column": self._name, "row": row, "level": level})


class _FarPixels:
    """Pixels that are read elsewhere. See :class:`~ome_tensor.pixels.Pixels`."""

    def __init__(self, meta: ImageMeta, entry: Entry, readers: Readers, place: dict[str, Any]) -> None:
        self.meta = meta
        self._entry, self._readers, self._place = entry, readers, place
        self._stored: tuple[np.dtype | None] | None = None

    @property
    def stored_dtype(self) -> np.dtype | None:
        """See :attr:`Pixels.stored_dtype`."""
        if self._stored is None:
            said = self._readers.ask("stored_dtype", self._entry, **self._place)["dtype"]
            self._stored = (None if said is None else np.dtype(said),)
        return self._stored[0]

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """See :meth:`Pixels.gather`."""
        if out.size == 0:
            return
        target = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        descriptor = os.memfd_create("ome-tensor-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, out.nbytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
            said = self._readers.ask(
                "gather", self._entry, descriptor, **self._place, **_told(selection), shape=out.shape, dtype=out.dtype.str
            )
            memory = target.reshape(-1).view(np.uint8).data
            done = 0
            while done < len(memory):
                # Of one call Linux gives at most 2 GiB.
                done += os.preadv(descriptor, [memory[done:]], done)
        finally:
            os.close(descriptor)
        if target is not out:
            out[...] = target
        self._readers.count(said["hits"], said["misses"])

    def flat_values(self, selection: Selection) -> np.ndarray:
        """See :meth:`Pixels.flat_values`."""
        descriptor = os.memfd_create("ome-tensor-values", os.MFD_CLOEXEC)
        try:
            said = self._readers.ask("values", self._entry, descriptor, **self._place, **_told(selection), limit=_LARGEST)
            with open(descriptor, "rb", closefd=False) as file:
                file.seek(0)
                return np.frombuffer(file.read(), np.dtype(said["dtype"]))
        finally:
            os.close(descriptor)


def _told(selection: Selection) -> dict[str, Any]:
    s = selection
    return {"selection": [list(s.t), list(s.z), list(s.c), s.x, s.y, s.w, s.h]}
