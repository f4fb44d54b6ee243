"""Which reader a source is for: by what it holds, not by its name."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from ome_tensor.errors import InvalidRecord, MissingDependency

from .arrow import is_arrow_stream
from .base import OpenedSource
from .files import file_fingerprint
from .folders import folder_fingerprint

__all__ = ["fingerprint", "is_address", "leads_up", "location_name", "looks_like_source", "open_source"]

#: What a file of a format begins with. A reader is a module and a class, imported when it is needed.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PAR1", "parquet.ParquetSource"),
    (b"ARROW1", "arrow.ArrowSource"),
    (b"VTXF", "vortex.VortexSource"),
    (b"\x93NUMPY", "npy.NpySource"),
    (b"II*\x00", "ome_tiff.TiffSource"),
    (b"MM\x00*", "ome_tiff.TiffSource"),
    (b"II+\x00", "ome_tiff.TiffSource"),
    (b"MM\x00+", "ome_tiff.TiffSource"),
)

#: What a folder of a format holds.
_MARKS: tuple[tuple[str, str], ...] = (
    ("_ome_arrow_dataset.json", "typed_chunks.TypedChunksSource"),
    ("zarr.json", "ome_zarr.ZarrSource"),
    (".zattrs", "ome_zarr.ZarrSource"),
    (".zgroup", "ome_zarr.ZarrSource"),
    (".zarray", "ome_zarr.ZarrSource"),
)

_ADDRESSES = ("http://", "https://", "s3://")

#: The extra that has what a reader needs beyond the server's own packages.
_EXTRAS = {"vortex": "vortex"}


def is_address(location: str) -> bool:
    """Whether a location is an address and no path."""
    return location.startswith(_ADDRESSES)


def leads_up(path: str) -> bool:
    """Whether a path, or an address, has a part that leads up, in whatever way it is written.

    Whoever asks an address decodes the parts of its path first, and leaves out some characters between (https://url.spec.whatwg.org/#url-parsing).
    """
    plain = unquote(path.translate(dict.fromkeys(map(ord, "\t\r\n"))))
    return ".." in re.split(r"[/\\]", plain)


def location_name(location: str) -> str:
    """The last part of a path or an address, for people: not where it is, which is the server's own business."""
    path = unquote(urlsplit(location).path) if is_address(location) else location
    return PurePosixPath(path.rstrip("/")).name or location


def _reader(location: str) -> str | None:
    """The reader's module and class. Raises OSError where a file cannot be opened."""
    if is_address(location):
        return "ome_zarr.ZarrSource"
    path = Path(location)
    if path.is_dir():
        return next((reader for mark, reader in _MARKS if (path / mark).is_file()), None)
    if not path.is_file():
        return None  # A socket or a pipe would never give a byte.
    with path.open("rb") as file:
        head = file.read(8)
    if is_arrow_stream(head):
        return "arrow.ArrowSource"
    return next((reader for magic, reader in _MAGIC if head.startswith(magic)), None)


def looks_like_source(path: Path) -> bool:
    """Whether a file or folder is one that some reader is for. Cheap: nothing is imported. Raises OSError where it cannot be looked at."""
    return _reader(str(path)) is not None


def open_source(location: str) -> OpenedSource:
    """A source, opened.

    Args:
        location: Absolute path, or address.

    Raises:
        InvalidRecord: it is of no format that is read here, damaged, or holds no images; names it.
        MissingDependency: its format needs a package that is not installed; names the extra.
        OSError: it cannot be opened.
    """
    reader = _reader(location)
    name = Path(location).name
    if reader is None:
        if not os.path.lexists(location):
            raise FileNotFoundError(2, "No such file or directory", location)
        raise InvalidRecord(f"{name} is of no format that this server reads", field="path", value=name)
    module, _, kind = reader.partition(".")
    try:
        opened: type[OpenedSource] = getattr(import_module(f"{__package__}.{module}"), kind)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__):
            raise
        extra = _EXTRAS.get(module, "formats")
        raise MissingDependency(
            f'{name} needs the package {error.name}: pip install "ome-tensor[{extra}]"', field="path", value=name
        ) from None
    return opened(location)  # type: ignore[call-arg]


def fingerprint(location: str) -> str | None:
    """What differs once a source was changed; ``None`` where there is none, or only asking an address would tell."""
    if is_address(location):
        return None
    try:
        if os.path.isdir(location):
            return folder_fingerprint(Path(location))
        return file_fingerprint(os.stat(location))
    except (OSError, InvalidRecord):
        return None
