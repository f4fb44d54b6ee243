"""The catalogue: datasets by name, images by key. Immutable once loaded, so any number of threads may read it."""

from __future__ import annotations

import bisect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from ome_tensor.blocks import ChunkCache
from ome_tensor.errors import DatasetNotFound, ImageNotFound, InvalidArgument, InvalidRecord, OmeTensorError
from ome_tensor.keys import format_key, parse_key
from ome_tensor.listing import DatasetInfo, ImageInfo
from ome_tensor.pixels import StoredPixels
from ome_tensor.record import read_meta

from .arrow_file import is_arrow_file, map_arrow_file
from .logs import Fields
from .parquet import is_parquet, read_parquet
from .store import Store
from .table import LoadedTable, digest

__all__ = ["Catalogue", "Dataset", "Image", "find_sources", "load_catalogue", "load_each"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: Indexes kept for each image column. An index costs about 100 bytes a chunk; a table of single cells has many small images.
_INDEXES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Image:
    """An image found by its key.

    Attributes:
        dataset: The dataset it is in.
        key: Its canonical key.
        column, row: The key's parts.
        pixels: Its pixels, indexed when first read.
    """

    dataset: Dataset
    key: str
    column: str
    row: int
    pixels: StoredPixels

    @property
    def info(self) -> ImageInfo:
        """What is said of it to a client."""
        return ImageInfo(self.key, self.dataset.name, self.column, self.row, self.pixels.meta)


class ImageColumn:
    """One column of OME-Arrow records.

    Args:
        array: The records.
        cache: Where decompressed chunks are kept.
    """

    def __init__(self, array: pa.ChunkedArray, cache: ChunkCache) -> None:
        self._chunks: list[pa.StructArray] = array.chunks
        self._starts: list[int] = []
        rows = 0
        for chunk in self._chunks:
            self._starts.append(rows)
            rows += len(chunk)
        self.image_count = rows - array.null_count
        self.row_count = rows
        self._cache = cache
        self._indexes: OrderedDict[int, StoredPixels] = OrderedDict()
        self._lock = threading.Lock()

    def record(self, row: int) -> pa.StructScalar:
        """The record at a row that exists; may be null."""
        chunk = bisect.bisect_right(self._starts, row) - 1
        return self._chunks[chunk][row - self._starts[chunk]]

    def pixels(self, row: int) -> StoredPixels:
        """The pixels at a row that holds an image. Raises InvalidRecord where its metadata is damaged."""
        with self._lock:
            pixels = self._indexes.get(row)
            if pixels is None:
                pixels = self._indexes[row] = StoredPixels(self.record(row), self._cache)
                if len(self._indexes) > _INDEXES_KEPT:
                    self._indexes.popitem(last=False)
            else:
                self._indexes.move_to_end(row)
            return pixels

    def is_valid(self) -> np.ndarray:
        """For each row, whether it holds an image."""
        return np.concatenate([chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in self._chunks])

    def only_row(self) -> int | None:
        """The row of the only image, or ``None`` where there are several or none."""
        if self.image_count != 1:
            return None
        return int(np.argmax(self.is_valid()))


class Dataset:
    """One registered file.

    Args:
        name: Its name.
        table: Its images in memory.
        source_name: Its file name.
        cache: Where decompressed chunks are kept.
    """

    def __init__(self, name: str, table: LoadedTable, source_name: str, cache: ChunkCache) -> None:
        self.name = name
        self.version = table.version
        self.columns = {column: ImageColumn(array, cache) for column, array in table.images.items()}
        self._cells: dict[str, np.ndarray] = {}
        self.info = DatasetInfo(
            name=name,
            version=table.version,
            image_count=sum(column.image_count for column in self.columns.values()),
            row_count=table.rows,
            image_columns=tuple(self.columns),
            other_columns=table.others,
            resident_bytes=table.nbytes,
            source_name=source_name,
        )

    def column(self, name: str | None) -> tuple[str, ImageColumn]:
        """The named image column, or the only one. Raises ImageNotFound."""
        if name is None:
            if len(self.columns) > 1:
                raise ImageNotFound(
                    f"dataset {self.name!r} has {len(self.columns)} image columns; name one in the key, as "
                    f"'{format_key(self.name, next(iter(self.columns)), 0)}' (columns: {', '.join(self.columns)})",
                    field="key",
                    value=self.name,
                )
            name = next(iter(self.columns))
        if name not in self.columns:
            raise ImageNotFound(
                f"dataset {self.name!r} has no image column {name!r}; it has: {', '.join(self.columns)}", field="key", value=name
            )
        return name, self.columns[name]

    def image(self, column: str | None, row: int | None) -> Image:
        """One image. Raises ImageNotFound, or InvalidRecord where its metadata is damaged."""
        name, images = self.column(column)
        if row is None:
            row = images.only_row()
            if row is None:
                raise ImageNotFound(
                    f"dataset {self.name!r} has {images.image_count} images in column {name!r}; name a row in the key, as "
                    f"'{format_key(self.name, None if len(self.columns) == 1 else name, 0)}'",
                    field="key",
                    value=self.name,
                )
        if row >= images.row_count or not images.record(row).is_valid:
            why = (
                f"it has rows 0 to {images.row_count - 1}"
                if row >= images.row_count
                else "that row holds no image in this column"
            )
            raise ImageNotFound(
                f"no image at row {row} of column {name!r} of dataset {self.name!r}: {why}",
                field="key",
                value=format_key(self.name, name, row),
            )
        return Image(self, format_key(self.name, name, row), name, row, images.pixels(row))

    def places(self, column: str | None, first: int, count: int) -> list[tuple[int, str]]:
        """(row, column) of ``count`` images from the ``first`` on, by row and then by column; of one column only where it is named."""
        chosen = [column] if column else list(self.columns)
        found = self._valid(column)[first : first + count]
        return [(int(place) // len(chosen), chosen[int(place) % len(chosen)]) for place in found]

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
            return ImageInfo(key, self.name, column, row, read_meta(self.columns[column].record(row)))
        except OmeTensorError as error:
            return ImageInfo(key, self.name, column, row, None, error.message)


class Catalogue:
    """Datasets by name.

    Args:
        datasets: With names that differ.
    """

    def __init__(self, datasets: Sequence[Dataset] = ()) -> None:
        self.datasets = {dataset.name: dataset for dataset in sorted(datasets, key=lambda dataset: dataset.name)}

    def __len__(self) -> int:
        return len(self.datasets)

    def dataset(self, name: str) -> Dataset:
        """A dataset by name. Raises DatasetNotFound, naming some that exist."""
        dataset = self.datasets.get(name)
        if dataset is None:
            some = ", ".join(list(self.datasets)[:10]) or "none"
            more = f" and {len(self.datasets) - 10} more" if len(self.datasets) > 10 else ""
            raise DatasetNotFound(f"no dataset {name!r}; there are: {some}{more}", field="key", value=name)
        return dataset

    def image(self, key: str) -> Image:
        """An image by key. Raises DatasetNotFound, ImageNotFound, InvalidArgument, InvalidRecord."""
        parsed = parse_key(key)
        return self.dataset(parsed.dataset).image(parsed.column, parsed.row)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to load and the name to give it.

    Attributes:
        name: The dataset's name.
        path: The file.
        named: Whether the user named this very file: then it must load. One found in a folder may turn out to be something else.
    """

    name: str
    path: Path
    named: bool


def find_sources(paths: Sequence[str | Path]) -> list[SourceFile]:
    """The files that paths name: a file itself, or every Parquet or Arrow file in a folder and below.

    A dataset is named after its file, without ``.parquet``, ``.arrow`` or ``.feather`` and ``.ome``; one in a subfolder after its path below
    the folder, parts joined with dots.

    Raises:
        InvalidArgument: a path that does not exist, a file of another kind, or two files of one name.
    """
    found: list[SourceFile] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            files = sorted(
                file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".") and _may_load(file)
            )
            found += [SourceFile(_name(file.relative_to(path)), file, named=False) for file in files]
        elif path.is_file():
            if not _is_table(path):
                raise InvalidArgument(f"{path} is not a Parquet or Arrow file", field="path", value=str(path))
            found.append(SourceFile(_name(Path(path.name)), path, named=True))
        else:
            raise InvalidArgument(f"{path} does not exist", field="path", value=str(path))
    by_name: dict[str, SourceFile] = {}
    for source in found:
        other = by_name.setdefault(source.name, source)
        if other.path.resolve() != source.path.resolve():
            raise InvalidArgument(
                f"{other.path} and {source.path} would both be dataset {source.name!r}; serve them apart or rename one",
                field="path",
                value=source.name,
            )
    return list(by_name.values())


def _is_table(path: Path) -> bool:
    return is_parquet(path) or is_arrow_file(path)


def _may_load(file: Path) -> bool:
    """Whether a file found in a folder is Parquet; one that cannot be read is left out, saying so."""
    try:
        return _is_table(file)
    except OSError as error:
        _log.warning("left out %s: %s", file, error.strerror or error)
        return False


def _name(relative: Path) -> str:
    last = relative.name
    for suffix in (".parquet", ".arrow", ".feather", ".ome"):
        if last.lower().endswith(suffix) and len(last) > len(suffix):
            last = last[: -len(suffix)]
    return ".".join([*relative.parts[:-1], last])


def load_table(path: Path, store: Store | None) -> LoadedTable:
    """A file's images: from the store where there is one, else in this process's memory (an Arrow file is mapped, not read)."""
    if store is not None:
        return store.load(path).table()
    return map_arrow_file(path, digest(path)) if is_arrow_file(path) else read_parquet(path)


def load_each(
    sources: Sequence[SourceFile], load: Callable[[Path], T], stopped: Callable[[], bool]
) -> Iterator[tuple[SourceFile, T]]:
    """Each source and what loading it gave, until ``stopped()`` is true.

    A file found in a folder that turns out not to hold readable images is left out with a warning, so that one bad file does not take a lab's
    folder off the air.

    Raises:
        InvalidRecord, InvalidArgument: a file that was named itself cannot be loaded.
    """
    for source in sources:
        if stopped():
            return
        try:
            loaded = load(source.path)
        except (InvalidRecord, OSError) as error:
            problem = (
                error
                if isinstance(error, InvalidRecord)
                else InvalidArgument(
                    f"{source.path} cannot be loaded: {error.strerror or error}", field="path", value=str(source.path)
                )
            )
            if source.named:
                raise problem from None
            _log.warning("left out %s: %s", source.path, problem)
        else:
            yield source, loaded


def load_catalogue(
    sources: Sequence[SourceFile],
    cache: ChunkCache,
    stopped: Callable[[], bool] = lambda: False,
    store: Store | None = None,
) -> Catalogue:
    """Load every source, into memory or through the store. Raises what :func:`load_each` does."""
    datasets = []
    for source, table in load_each(sources, lambda path: load_table(path, store), stopped):
        dataset = Dataset(source.name, table, source.path.name, cache)
        _log.info(
            Fields("loaded", dataset=source.name, images=dataset.info.image_count, bytes=table.nbytes, version=table.version)
        )
        datasets.append(dataset)
    return Catalogue(datasets)
