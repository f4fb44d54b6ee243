"""Pixels into files: ``.npy``, OME-TIFF and PNG, each whole or not there at all.

A file is written beside its place under a passing name and renamed when complete. Large views pass through: ``.npy`` is read into
the mapped file itself, and a projection for a PNG keeps one plane a channel.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ome_tensor.errors import InvalidArgument, MissingDependency, OmeTensorError
from ome_tensor.layout import to_axes

from .imaging import Color, colors_of, composite

if TYPE_CHECKING:
    from ome_tensor.plan import ResolvedPlan
    from ome_tensor.record import Channel, ImageMeta

__all__ = ["SUFFIXES", "Blocks", "check_output", "replacing", "require", "write_npy", "write_png", "write_tif"]

#: Suffix of a file -> the package of the ``image`` extra that writes it.
SUFFIXES = {".npy": None, ".png": "PIL", ".tif": "tifffile", ".tiff": "tifffile"}

#: Pieces of a TZCYX array: where each belongs, and its pixels.
Blocks = Iterator[tuple[tuple[slice, ...], np.ndarray]]

#: NumPy dtypes that OME-TIFF has a pixel type for (OME schema 2016-06).
_OME_TYPES = frozenset("bool int8 int16 int32 uint8 uint16 uint32 float32 float64 complex64 complex128".split())


def check_output(text: str) -> Path:
    """The place of a file to write, links followed.

    Raises:
        InvalidArgument: a suffix that cannot be written, a folder, a missing folder, or no permission there.
        MissingDependency: the format needs a package that is not installed.
    """
    path = Path(os.path.realpath(text))
    suffix = Path(text).suffix.lower()
    why = None
    if path.is_dir():
        why = "it is a folder"
    elif suffix not in SUFFIXES:
        why = "the name must end in .npy, .png, .tif or .tiff, which says what to write"
    elif not path.parent.is_dir():
        why = f"there is no folder {str(path.parent if os.path.islink(text) else Path(text).parent)!r}"
        if os.path.islink(text):
            why = f"it is a link to {str(path)!r}, and {why}"
    elif path.exists() and not path.is_file():
        why = "it is not a regular file"
    elif path.exists() and not os.access(path, os.W_OK):
        why = "it is write-protected"
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        # Where a file is replaced too: the new one is written beside it.
        why = f"the folder {str(path.parent)!r} is write-protected"
    if why is not None:
        raise InvalidArgument(f"cannot write {text!r}: {why}", field="output", value=text)
    package = SUFFIXES[suffix]
    if package is not None:
        require(package, suffix)
    return path


def require(package: str, purpose: str) -> Any:
    """A package of the ``image`` extra. Raises MissingDependency where it is not installed."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        name = {"PIL": "pillow"}.get(package, package)
        raise MissingDependency(f"{purpose} needs {name}: pip install 'ome-tensor[image]'", field="output") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A passing name beside ``path`` to write to; renamed to it at the end, removed if anything goes wrong.

    Raises:
        InvalidArgument: nothing can be created there.
        OSError: writing fails inside (a full disk, above all); it names ``path``.
    """
    passing = path.with_name(f".ome-tensor-{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        os.close(os.open(passing, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise InvalidArgument(f"cannot write {str(path)!r}: {error.strerror}", field="output", value=str(path)) from None
    try:
        yield passing
        os.replace(passing, path)
    except BaseException as error:
        with suppress(OSError):
            passing.unlink()
        # Errors of reading are OSErrors too, of the connection, and say themselves what they are about.
        if isinstance(error, OSError) and not isinstance(error, (OmeTensorError, ConnectionError, TimeoutError)):
            raise _write_error(error, path) from error
        raise


def _write_error(error: OSError, path: Path) -> OSError:
    """What went wrong with the file as its user knows it, whose name is not the passing one."""
    if error.errno is None:
        # NumPy's tofile counts items: "2384800 requested and 51088 written".
        return OSError(errno.EIO, f"not all could be written; is the disk full? ({error})", str(path))
    return OSError(error.errno, error.strerror, str(path))


def write_npy(path: Path, plan: ResolvedPlan, blocks: Blocks, advance: Callable[[int], None]) -> None:
    """The view as ``numpy.save`` would write it, in its layout, without holding it in memory.

    Args:
        path: Where.
        plan: What the view shows.
        blocks: Its pixels.
        advance: Told of the bytes written.
    """
    with replacing(path) as passing:
        if plan.nbytes == 0:
            # Nothing to map.
            with passing.open("wb") as file:
                np.save(file, np.empty(plan.shape, plan.dtype))
            return
        mapped = np.lib.format.open_memmap(passing, mode="w+", dtype=plan.dtype, shape=plan.shape)
        # Without it a full disk would kill the process by SIGBUS.
        _reserve(passing, passing.stat().st_size)
        _fill(to_axes(mapped, plan.layout), blocks, advance)
        mapped.flush()


def _reserve(path: Path, nbytes: int) -> None:
    """Claim the disk space of a file, so that a full disk is found out before anything is read. Raises OSError."""
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise


def _fill(out: np.ndarray, blocks: Blocks, advance: Callable[[int], None]) -> None:
    for place, block in blocks:
        out[place] = block
        advance(block.nbytes)


def write_tif(
    path: Path, plan: ResolvedPlan, meta: ImageMeta, blocks: Blocks, advance: Callable[[int], None], *, name: str = ""
) -> None:
    """The view as an OME-TIFF: axes in the layout's order, channel names and colours, physical sizes.

    Args:
        path: Where.
        plan: What the view shows; its layout ends in YX.
        meta: The image's metadata.
        blocks: Its pixels.
        advance: Told of the bytes read.
        name: The image's name in the file.

    Raises:
        InvalidArgument: a dtype or layout that the format does not have, or nothing selected.
    """
    check_tif(plan)
    tifffile = require("tifffile", ".tif")
    with replacing(path) as passing:
        # The writer begins the file anew; between, somebody else may still take the space.
        _reserve(passing, plan.nbytes)
        array = np.empty(plan.shape, plan.dtype)
        _fill(to_axes(array, plan.layout), blocks, advance)
        # The type is told, since the passing name does not end in .ome.tif.
        tifffile.imwrite(passing, array, ome=True, photometric="minisblack", metadata=_ome_metadata(plan, meta, name))


def check_tif(plan: ResolvedPlan) -> None:
    """What OME-TIFF does not have, before anything is read. Raises InvalidArgument."""
    if plan.dtype.name not in _OME_TYPES:
        raise InvalidArgument(
            f"OME-TIFF has no {plan.dtype.name} pixels: convert with --dtype, or write .npy", field="dtype", value=plan.dtype.name
        )
    if not plan.layout.endswith("HW"):
        raise InvalidArgument("the layout of a .tif must end in YX: leave it out, or write .npy", field="layout")
    if plan.nbytes == 0:
        raise InvalidArgument("the selection is empty: there is nothing to write but an .npy of that shape", field="output")


def _ome_metadata(plan: ResolvedPlan, meta: ImageMeta, name: str) -> dict[str, Any]:
    chosen = plan.shown
    found: dict[str, Any] = {"axes": plan.layout.translate(str.maketrans("HW", "YX"))}
    if name:
        found["Name"] = name
    for axis, size, unit in zip("ZYX", meta.physical_size, meta.physical_unit, strict=True):
        if axis == "Z" and size is not None and len(chosen.z) > 1:
            # Every second plane of a stack is twice as far from the next; planes picked at will have no distance.
            size = size * abs(chosen.z.step) if isinstance(chosen.z, range) else None
        if size:
            found[f"PhysicalSize{axis}"] = size
            found[f"PhysicalSize{axis}Unit"] = unit or "µm"
    channels = [_channel_of(meta, c) for c in chosen.c]
    if any(channels) and "C" in plan.layout:
        described = [channel.name or channel.id if channel else "" for channel in channels]
        found["Channel"] = {
            "Name": [text or f"Channel {c}" for text, c in zip(described, chosen.c, strict=True)],
            # OME's Color is the same four bytes as a signed number.
            "Color": [_signed(0xFFFFFFFF if not c or c.color_rgba is None else c.color_rgba) for c in channels],
        }
    return found


def _signed(rgba: int) -> int:
    return rgba - (1 << 32) if rgba >= 1 << 31 else rgba


def _channel_of(meta: ImageMeta, c: int) -> Channel | None:
    return meta.channels[c] if c < len(meta.channels) else None


def write_png(path: Path, plan: ResolvedPlan, meta: ImageMeta, blocks: Blocks, advance: Callable[[int], None]) -> None:
    """The view as a picture: channels added in their colours, several z as their maximum.

    Args:
        path: Where.
        plan: What the view shows.
        meta: The image's metadata.
        blocks: Its pixels.
        advance: Told of the bytes read.

    Raises:
        InvalidArgument: several t, nothing selected, or complex pixels.
    """
    check_png(plan)
    image = require("PIL.Image", ".png")
    with replacing(path) as passing:
        picture = composite(project(plan, blocks, advance), picture_colors(plan, meta))
        image.fromarray(picture).save(passing, format="PNG")


def check_png(plan: ResolvedPlan) -> None:
    """What no picture can show, before anything is read. Raises InvalidArgument."""
    chosen = plan.shown
    if len(chosen.t) > 1:
        raise InvalidArgument(f"a .png shows one time point, and {len(chosen.t)} are selected: choose one with --t", field="t")
    if chosen.size == 0:
        raise InvalidArgument("the selection is empty: there is nothing to show", field="output")
    if plan.dtype.kind == "c":
        raise InvalidArgument("complex pixels cannot be shown as a picture", field="dtype")


def picture_colors(plan: ResolvedPlan, meta: ImageMeta) -> list[Color]:
    """Display colours of the selected channels."""
    return colors_of([_channel_of(meta, c) for c in plan.shown.c])


def project(plan: ResolvedPlan, blocks: Blocks, advance: Callable[[int], None]) -> Sequence[np.ndarray]:
    """One YX plane a channel: the maximum over z of one time point. NaN counts as no value."""
    _, _, nc, h, w = plan.shown.shape
    planes = np.zeros((nc, h, w), plan.dtype)
    begun = np.zeros(h, bool)
    for (_, _, _, rows, columns), block in blocks:
        highest = np.fmax.reduce(block[0], axis=0)
        here = planes[:, rows, columns]
        # Zero is no neutral element: pixels may be negative.
        here[...] = np.fmax(here, highest) if begun[rows].all() else highest
        begun[rows] = True
        advance(block.nbytes)
    return list(planes)
