"""Having sources read by loaders: processes of their own, started when they are first needed and kept for the next job."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ome_tensor.arrow_file import ArrowImages
from ome_tensor.errors import InvalidRecord
from ome_tensor.tables import LoadedTable

from .processes import Pool, shared_pool
from .readers.base import SourceInfo
from .readers.detect import location_name
from .readers.files import check_unchanged

__all__ = ["Loaded", "Loader", "load_anonymous", "load_in_memory", "shared_loader"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a loader has made of a source.

    Attributes:
        version: Digest of the source's contents.
        fingerprint: See :class:`SourceInfo`.
        info: What it holds.
        is_mapped: It is an uncompressed Arrow IPC file, and nothing was written: it is to be served itself.
        is_known: It is the version that is there already, and nothing was written.
    """

    version: str
    fingerprint: str
    info: SourceInfo
    is_mapped: bool
    is_known: bool = False


class Loader(Pool):
    """Has sources read in processes of their own. See :class:`Pool`."""

    def describe(self, location: str) -> SourceInfo:
        """What a source holds.

        Raises:
            InvalidRecord, MissingDependency: it cannot be read, holds no images, or lacks a package.
            OSError: it cannot be opened.
        """
        return SourceInfo(**self._run({"job": "describe", "location": location})["info"])

    def load(
        self,
        location: str,
        descriptor: int,
        *,
        known: str = "",
        progress: Callable[[int], None] = lambda _: None,
        cancelled: threading.Event | None = None,
    ) -> Loaded:
        """Write a source as an uncompressed Arrow IPC file.

        Args:
            location: The source.
            descriptor: The file, opened for reading and writing.
            known: A version that there is already.
            progress: Told how many bytes have been written so far; may raise, which ends the load.
            cancelled: Set by another thread to give up.

        Raises:
            InvalidRecord, LimitExceeded, MissingDependency: the source cannot be read.
            OSError: it cannot be opened, or the file not be written.
            Cancelled: it was given up.
        """
        result = self._run({"job": "load", "location": location, "known": known}, descriptor, progress, cancelled)
        return Loaded(**result | {"info": SourceInfo(**result["info"])})

    def check(self, location: str) -> int:
        """Look through an upload; about the bytes that it takes when loaded. Raises InvalidRecord where anything of it cannot be served."""
        nbytes: int = self._run({"job": "check", "location": location})["nbytes"]
        return nbytes


def shared_loader(memory_limit: int = 0) -> Loader:
    """This process's loader with such a limit: starting one costs half a second, and many servers in one process can have the same.

    Args:
        memory_limit: See :class:`Pool`.
    """
    return shared_pool(Loader, memory_limit)


def load_anonymous(location: str, loader: Loader) -> LoadedTable:
    """A source's table in this process's own memory. See :func:`load_in_memory`."""
    return load_in_memory(location, loader)[0]


def load_in_memory(
    location: str,
    loader: Loader,
    *,
    progress: Callable[[int], None] = lambda _: None,
    cancelled: threading.Event | None = None,
) -> tuple[LoadedTable, Loaded]:
    """A source's table in this process's own memory, and what was said of the source; an uncompressed Arrow file is mapped where it lies.

    Args:
        location: The source.
        loader: Reads it.
        progress, cancelled: See :meth:`Loader.load`.

    Raises:
        InvalidRecord, LimitExceeded, MissingDependency, OSError, Cancelled: as :meth:`Loader.load`.
    """
    path = Path(location)
    descriptor = os.memfd_create("ome-tensor-dataset")
    try:
        loaded = loader.load(location, descriptor, progress=progress, cancelled=cancelled)
        if not loaded.is_mapped:
            table = ArrowImages(path, descriptor).load(loaded.version)
        else:
            with path.open("rb") as file:
                check_unchanged(os.fstat(file.fileno()), loaded.fingerprint, path)
                return ArrowImages(path, file.fileno()).load(loaded.version), loaded
    except pa.ArrowException as error:
        name = location_name(location)
        raise InvalidRecord(f"{name} cannot be read: {error}", field="path", value=name) from None
    finally:
        os.close(descriptor)
    return table.unnamed(tuple((name, kind) for name, kind in loaded.info.others)), loaded
