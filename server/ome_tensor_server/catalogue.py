"""The catalogue: datasets by name, images by key. Immutable once loaded, so any number of threads may read it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ome_tensor.arrow_file import ArrowImages, is_arrow, is_arrow_file
from ome_tensor.blocks import ChunkCache
from ome_tensor.errors import DatasetNotFound, InvalidArgument, InvalidRecord, OmeTensorError
from ome_tensor.keys import format_key
from ome_tensor.listing import DatasetInfo, ImageInfo
from ome_tensor.record import read_meta
from ome_tensor.tables import ImageTable, LoadedTable, digest

from .logs import Fields
from .parquet import is_parquet, read_parquet
from .sources import Source, read_source
from .store import Store, is_full, is_store

__all__ = ["Catalogue", "Dataset", "find_sources", "load_catalogue", "load_each"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Dataset(ImageTable):
    """One registered file: its images, and what is said of them.

    Args:
        name: Its name.
        table: Its images in memory.
        source_name: Its file name.
        cache: Where decompressed chunks are kept.
    """

    def __init__(self, name: str, table: LoadedTable, source_name: str, cache: ChunkCache) -> None:
        super().__init__(name, table, cache)
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
        except Exception as error:
            # Whatever is odd about one record: the others are still to be listed.
            _log.exception(Fields("unexpected", image=key))
            return ImageInfo(key, self.name, column, row, None, f"its metadata cannot be read ({type(error).__name__})")


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

    Hidden files and folders are left out, and so are stores.

    A dataset is named after its file, without ``.parquet``, ``.arrow`` or ``.feather`` and ``.ome``; one in a subfolder after its path below
    the folder, parts joined with dots.

    Raises:
        InvalidArgument: a path that does not exist, a file of another kind, a store, or two files of one name.
    """
    found: list[SourceFile] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            if is_store(path):
                raise InvalidArgument(
                    f"{path} is a store of this server's, not a folder of images; serve the files it was made from",
                    field="path",
                    value=str(path),
                )
            files = sorted(file for file in _files(path) if file.is_file() and _may_load(file))
            found += [SourceFile(_name(file.relative_to(path)), file, named=False) for file in files]
        elif path.is_file():
            if not _is_text(path):
                raise InvalidArgument(f"the name of {str(path)!r} is not UTF-8; rename it", field="path", value=str(path))
            if not _is_named_table(path):
                raise InvalidArgument(f"{path} is not a Parquet or Arrow file", field="path", value=str(path))
            found.append(SourceFile(_name(Path(path.name)), path, named=True))
        else:
            what = "is not a file or a folder" if os.path.lexists(path) else "does not exist"
            raise InvalidArgument(f"{path} {what}", field="path", value=str(path))
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


def _files(path: Path) -> Iterator[Path]:
    """Files in a folder and below, but for hidden ones, hidden folders and stores: one may well lie beside what it was made from."""

    def unreadable(error: OSError) -> None:
        _log.warning("left out %s: %s", error.filename, error.strerror or error)

    for name, folders, files in os.walk(path, onerror=unreadable):
        here = Path(name)
        folders[:] = [folder for folder in folders if not folder.startswith(".") and not is_store(here / folder)]
        yield from (here / file for file in files if not file.startswith("."))


def _is_table(path: Path) -> bool:
    return is_parquet(path) or is_arrow_file(path)


def _is_text(path: Path) -> bool:
    """Whether a path can be said in UTF-8, which names in messages are."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_named_table(path: Path) -> bool:
    """Whether a file that the user named is one to load; InvalidArgument where it cannot be read."""
    try:
        return _is_table(path)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror or error}", field="path", value=str(path)) from None


def _may_load(file: Path) -> bool:
    """Whether a file found in a folder is one to load; one that cannot be read is left out, saying so."""
    if not _is_text(file):
        _log.warning("left out %r: its name is not UTF-8", str(file))
        return False
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
    """A file's images: from the store where there is one, else in this process's memory (an Arrow file is mapped, not read).

    Also where a store that nobody asked for is full.

    Raises:
        InvalidRecord: it cannot be read, holds no images, or is being changed.
        OSError: it cannot be opened, or the store is full.
    """
    if store is not None:
        try:
            return store.load(path).table()
        except OSError as error:
            if not (store.is_optional and is_full(error)):
                raise
            _log.warning("%s is kept in this process's memory: store %s is full", path.name, store.folder)
    return read_source(path, _read)


def _read(source: Source) -> LoadedTable:
    version = digest(source.file)
    if is_arrow(source.file):
        table = ArrowImages(source.path, source.file.fileno()).load(version)
    else:
        table = read_parquet(source.path, source.file, version)
    source.check()
    return table


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
