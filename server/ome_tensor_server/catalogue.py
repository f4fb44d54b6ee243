"""The catalogue: datasets by name, images by key. Immutable, so any number of threads may read it; each change is a new one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TypeAlias

import numpy as np

from ome_tensor.blocks import ChunkCache
from ome_tensor.columns import Column
from ome_tensor.errors import DatasetNotFound, InvalidRecord, OmeTensorError, Unavailable
from ome_tensor.keys import format_key
from ome_tensor.listing import DatasetInfo, DatasetState, ImageInfo, Level
from ome_tensor.pixels import Pixels
from ome_tensor.pyramids import ArrayPixels, made_levels
from ome_tensor.selection import Extent
from ome_tensor.tables import Image, ImageTable, LoadedTable

from .entries import Entry
from .in_place import Readers, open_in_place
from .levels import level_name, open_level
from .logs import Fields
from .usage import Usage

__all__ = ["Catalogue", "Dataset", "Shelves"]

_log = logging.getLogger(__name__)

#: So many times a level is asked for that leaves memory before it is opened.
_TRIES = 5

#: Gives the path of the file of a pyramid level: of a dataset by name, column, row, level. Takes its time, or raises Unavailable.
MakeLevel: TypeAlias = Callable[[str, str, int, int], str]


class Dataset(ImageTable):
    """A dataset that can be read: its images, and what is said of them.

    Args:
        entry: What it is.
        table: Its images in memory.
        cache: Where decompressed chunks are kept.
        columns: Its image columns where they are served in place.
        make_level: Makes pyramid levels of images that have none; without it there are none.
    """

    def __init__(
        self,
        entry: Entry,
        table: LoadedTable,
        cache: ChunkCache,
        columns: Mapping[str, Column] | None = None,
        make_level: MakeLevel | None = None,
    ) -> None:
        super().__init__(entry.name, table, cache, columns)
        self.entry = entry
        self._make_level = make_level
        self._cells: dict[str, np.ndarray] = {}
        self.info = DatasetInfo(
            name=entry.name,
            version=table.version,
            image_count=sum(column.image_count for column in self.columns.values()),
            row_count=table.rows,
            image_columns=tuple(self.columns),
            other_columns=table.others,
            resident_bytes=table.nbytes,
            source_name=entry.source_name,
            state=entry.state,
            estimated_bytes=entry.estimated_bytes,
            format=entry.format,
        )

    def levels(self, column: str, row: int) -> tuple[Level, ...]:
        """The levels of an image's pyramid, those included that are made when they are asked for."""
        stored = super().levels(column, row)
        if len(stored) > 1 or not stored or self._make_level is None:
            return stored
        return made_levels(Extent(*stored[0].shape))

    def _level(self, column: str, row: int, level: int) -> Pixels:
        levels = self.levels(column, row)
        if self._make_level is None or level >= len(levels) or levels[level].is_stored:
            return super()._level(column, row, level)
        meta = self.columns[column].meta(row)
        name = level_name(self.entry.location, self.entry.version, format_key(self.name, column, row), level)
        for _ in range(_TRIES):
            # Between the two it may have left memory for another.
            with suppress(FileNotFoundError, BlockingIOError):
                return open_level(self._make_level(self.name, column, row, level), name, meta, level)
        raise Unavailable(f"level {level} of {format_key(self.name, column, row)} leaves memory again and again; try again")

    def _may_keep(self, image: Image) -> bool:
        # A level that was made is in use as long as it is open: only as long as it is read.
        return not isinstance(image.pixels, ArrayPixels)

    def places(
        self, column: str | None, first: int, count: int, passing: np.ndarray | None = None
    ) -> tuple[list[tuple[int, str]], int]:
        """(row, column) of ``count`` images from the ``first`` on, by row and then by column; and how many images there are in all.

        Args:
            column: Only images of this column.
            first, count: Which of them.
            passing: For each row whether its images count; all do where it is left out.
        """
        chosen = [column] if column else list(self.columns)
        cells = self._valid(column)
        if passing is not None:
            numbers = np.asarray(cells)
            cells = numbers[passing[numbers // len(chosen)]]
        found = cells[first : first + count]
        return [(int(place) // len(chosen), chosen[int(place) % len(chosen)]) for place in found], len(cells)

    def _valid(self, column: str | None) -> np.ndarray | range:
        """Numbers of the cells that hold an image, counted by row and then by column."""
        chosen = [self.columns[column]] if column else list(self.columns.values())
        cells = self.info.row_count * len(chosen)
        if sum(images.image_count for images in chosen) == cells:
            return range(cells)
        key = column or ""
        if key not in self._cells:
            self._cells[key] = np.flatnonzero(np.stack([images.is_valid() for images in chosen], axis=1))
        return self._cells[key]

    def describe(self, row: int, column: str) -> ImageInfo:
        """What is said of an image in a list: a damaged one is listed with its problem."""
        key = format_key(self.name, column, row)
        try:
            images = self.columns[column]
            return ImageInfo(key, self.name, column, row, images.meta(row), levels=self.levels(column, row))
        except OmeTensorError as error:
            return ImageInfo(key, self.name, column, row, None, error.message)
        except Exception as error:
            # Whatever is odd about one record: the others are still to be listed.
            _log.exception(Fields("unexpected", image=key))
            return ImageInfo(key, self.name, column, row, None, f"its metadata cannot be read ({type(error).__name__})")


class _Shelf:
    """A dataset's place in catalogues: opened once, when it is first asked for or before."""

    def __init__(
        self, entry: Entry, table: LoadedTable | None, cache: ChunkCache, readers: Readers, make_level: MakeLevel | None
    ) -> None:
        self.entry = entry
        self._readers = readers
        self._make_level = make_level
        self._table = table
        self._cache = cache
        self._dataset: Dataset | None = None
        self._lock = threading.Lock()

    @property
    def opened(self) -> Dataset | None:
        """The dataset, if it is open."""
        return self._dataset

    def open(self) -> Dataset:
        """The dataset. Raises InvalidRecord or OSError where its file, or its source, is not there any more or another one."""
        with self._lock:
            if self._dataset is None:
                entry, table = self.entry, self._table
                if entry.state is DatasetState.IN_PLACE:
                    served = open_in_place(entry, self._readers)
                    self._dataset = Dataset(entry, served.table, self._cache, served.columns, self._make_level)
                else:
                    if table is None:
                        if entry.manifest is None:
                            raise InvalidRecord(f"dataset {entry.name!r} lies nowhere", field="name", value=entry.name)
                        table = entry.manifest.table()
                    self._dataset = Dataset(entry, table, self._cache, make_level=self._make_level)
            return self._dataset


class Catalogue:
    """Datasets by name.

    Args:
        shelves: Their places.
    """

    def __init__(self, shelves: Iterable[_Shelf] = ()) -> None:
        self._shelves = {shelf.entry.name: shelf for shelf in sorted(shelves, key=lambda shelf: shelf.entry.name)}

    def __len__(self) -> int:
        return len(self._shelves)

    def __contains__(self, name: str) -> bool:
        return name in self._shelves

    @property
    def names(self) -> list[str]:
        """Of all datasets, sorted."""
        return list(self._shelves)

    @property
    def entries(self) -> list[Entry]:
        """What is known of each, sorted by name."""
        return [shelf.entry for shelf in self._shelves.values()]

    @property
    def resident_bytes(self) -> int:
        """What the loaded ones take."""
        return sum(found.info.resident_bytes for found in self.datasets.values() if found.info.state is DatasetState.LOADED)

    @property
    def datasets(self) -> dict[str, Dataset]:
        """Those that are open, by name."""
        return {name: shelf.opened for name, shelf in self._shelves.items() if shelf.opened is not None}

    def entry(self, name: str) -> Entry:
        """What is known of a dataset. Raises DatasetNotFound."""
        return self._shelf(name).entry

    def dataset(self, name: str) -> Dataset:
        """A dataset that is ready to be read. Raises DatasetNotFound, and what :meth:`_Shelf.open` does."""
        return self._shelf(name).open()

    def info(self, name: str, usage: Usage) -> DatasetInfo:
        """What is said of a dataset, loaded or not. Raises DatasetNotFound."""
        shelf = self._shelf(name)
        if shelf.entry.is_ready:
            try:
                return shelf.open().info
            except (OmeTensorError, OSError) as error:
                _log.warning("dataset %s cannot be opened: %s", name, error)
        return shelf.entry.info(usage)

    def _shelf(self, name: str) -> _Shelf:
        shelf = self._shelves.get(name)
        if shelf is None:
            # Which ones there are is not everybody's to know.
            raise DatasetNotFound(f"no dataset {name!r}", field="key", value=name)
        return shelf


class Shelves:
    """Makes catalogues of entries; what has not changed from one to the next stays open.

    Args:
        cache: Where decompressed chunks are kept.
        readers: Read what is served in place.
        make_level: Makes pyramid levels of images that have none.
    """

    def __init__(self, cache: ChunkCache, readers: Readers, make_level: MakeLevel | None = None) -> None:
        self._cache = cache
        self._readers = readers
        self._make_level = make_level
        self._shelves: dict[str, _Shelf] = {}

    def catalogue(self, entries: Iterable[Entry], tables: Mapping[str, LoadedTable] | None = None) -> Catalogue:
        """The catalogue of these entries. One thread at a time.

        Args:
            entries: What there is.
            tables: Those that lie in this process's own memory, by name.
        """
        before, self._shelves = self._shelves, {}
        for entry in entries:
            shelf = before.get(entry.name)
            if shelf is None or shelf.entry != entry:
                shelf = _Shelf(entry, (tables or {}).get(entry.name), self._cache, self._readers, self._make_level)
            self._shelves[entry.name] = shelf
        for name, shelf in before.items():
            if self._shelves.get(name) is not shelf and shelf.opened is not None:
                # Reads that run keep it alive; nothing else is to.
                shelf.opened.forget()
        for shelf in self._shelves.values():
            if shelf.opened is None and shelf.entry.state is DatasetState.LOADED:
                try:
                    # Before anybody asks, and before its file can go.
                    shelf.open()
                except (OmeTensorError, OSError) as error:
                    _log.error("dataset %s cannot be opened: %s", shelf.entry.name, error)
        return Catalogue(self._shelves.values())
