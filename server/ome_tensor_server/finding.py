"""Which sources paths name: files of images, folders that are one source, and what lies in other folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ome_tensor.errors import InvalidArgument

from .readers.detect import is_address, location_name, looks_like_source
from .store import is_store

__all__ = ["SourceFile", "check_below", "find_all", "find_sources"]

_log = logging.getLogger(__name__)

#: Endings that a dataset's name leaves out; several may stand one behind the other, as in ``.ome.tiff``.
_SUFFIXES = (".parquet", ".arrow", ".arrows", ".feather", ".vortex", ".tiff", ".tif", ".zarr", ".npy", ".ome-arrow", ".ome")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A source to serve and the name to give it.

    Attributes:
        name: The dataset's name.
        location: The file or folder, absolute, or an address.
        named: Whether the user named this very source: then it must be one. One found in a folder may turn out to be something else.
        root: Real path of the folder below which it has to lie, whatever it is made a link to; empty where any will do.
    """

    name: str
    location: str
    named: bool
    root: str = ""


def check_below(location: str, root: str) -> None:
    """Check that a source lies below its root: what its path leads to counts, and not what it says.

    Args:
        location: The source.
        root: See :class:`SourceFile`.

    Raises:
        InvalidArgument: it does not.
    """
    if root and not is_address(location) and not Path(os.path.realpath(location)).is_relative_to(root):
        name = location_name(location)
        raise InvalidArgument(f"{name} leads out of the folder that it is served from", field="path", value=name)


def find_sources(paths: Sequence[str | Path]) -> list[SourceFile]:
    """The sources that paths name: a source itself, or every source in a folder and below.

    Hidden files and folders are left out, and so are stores, and links that lead out of the folder. A folder that is one source itself (OME-Zarr,
    typed chunks) is taken whole.

    A dataset is named after its file or folder, without the endings of its format; one in a subfolder after its path below the folder, parts joined
    with dots.

    Raises:
        InvalidArgument: a path that does not exist or is no source, a store, or two sources of one name.
    """
    by_name: dict[str, SourceFile] = {}
    for source in find_all(paths):
        other = by_name.setdefault(source.name, source)
        if other is not source:
            raise InvalidArgument(
                f"{other.location} and {source.location} would both be dataset {source.name!r}; serve them apart or rename one",
                field="path",
                value=source.name,
            )
    return list(by_name.values())


def find_all(paths: Sequence[str | Path]) -> list[SourceFile]:
    """As :func:`find_sources`, also where two sources would have one name. Raises InvalidArgument for a path that does not exist and the like."""
    found: dict[tuple[str, str], SourceFile] = {}
    for given in paths:
        for source in _at_address(str(given)) if is_address(str(given)) else _at_path(Path(given)):
            found.setdefault((source.name, _real(source.location)), source)
    return list(found.values())


def _at_address(address: str) -> list[SourceFile]:
    return [SourceFile(_name(PurePosixPath(location_name(address))), address.rstrip("/"), named=True)]


def _at_path(path: Path) -> list[SourceFile]:
    if not _is_text(path):
        raise InvalidArgument(f"the name of {str(path)!r} is not UTF-8; rename it", field="path", value=str(path))
    try:
        is_source = looks_like_source(path)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror or error}", field="path", value=str(path)) from None
    if is_source:
        return [SourceFile(_name(PurePosixPath(path.absolute().name)), str(path.absolute()), named=True)]
    if path.is_dir():
        if is_store(path):
            raise InvalidArgument(
                f"{path} is a store of this server's, not a folder of images; serve the files it was made from",
                field="path",
                value=str(path),
            )
        return [
            SourceFile(
                _name(PurePosixPath(found.relative_to(path))), str(found.absolute()), named=False, root=os.path.realpath(path)
            )
            for found in sorted(_walk(path))
        ]
    if path.is_file():
        raise InvalidArgument(
            f"{path} is not a file of images that this server reads (Parquet, Arrow, Vortex, OME-TIFF, npy)",
            field="path",
            value=str(path),
        )
    what = "is not a file or a folder" if os.path.lexists(path) else "does not exist"
    raise InvalidArgument(f"{path} {what}", field="path", value=str(path))


def _walk(root: Path) -> Iterator[Path]:
    """The sources in a folder and below."""
    real = Path(os.path.realpath(root))

    def unreadable(error: OSError) -> None:
        _log.warning("left out %s: %s", error.filename, error.strerror or error)

    for name, folders, files in os.walk(root, onerror=unreadable):
        here = Path(name)
        inside = [folder for folder in folders if not folder.startswith(".") and not is_store(here / folder)]
        sources = [folder for folder in inside if _may_serve(here / folder, real)]
        # What is a source is one: what lies in it is its own business.
        folders[:] = [folder for folder in inside if folder not in sources]
        yield from (here / folder for folder in sources)
        yield from (here / file for file in files if not file.startswith(".") and _may_serve(here / file, real))


def _may_serve(path: Path, root: Path) -> bool:
    """Whether something found in a folder is a source to serve; one that cannot be is left out, saying so."""
    if not _is_text(path):
        _log.warning("left out %r: its name is not UTF-8", str(path))
        return False
    try:
        if not looks_like_source(path):
            return False
    except OSError as error:
        _log.warning("left out %s: %s", path, error.strerror or error)
        return False
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
        _log.warning("left out %s: it is a link that leads out of the folder", path)
        return False
    return True


def _real(location: str) -> str:
    return location if is_address(location) else os.path.realpath(location)


def _is_text(path: Path) -> bool:
    """Whether a path can be said in UTF-8, which names in messages are."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _name(relative: PurePosixPath) -> str:
    last = relative.name
    shorter = True
    while shorter:
        shorter = False
        for suffix in _SUFFIXES:
            if last.lower().endswith(suffix) and len(last) > len(suffix):
                last, shorter = last[: -len(suffix)], True
                break
    return ".".join([*relative.parts[:-1], last])
