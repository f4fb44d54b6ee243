"""OME-TIFF and other TIFF files, through tifffile; OME-XML through ome-types. Format: https://docs.openmicroscopy.org/ome-model/latest/ome-tiff/"""

from __future__ import annotations

import datetime
import math
import re
import struct
from typing import Any, ClassVar

import numpy as np
import tifffile
import zarr

from ome_tensor.errors import InvalidRecord, OmeTensorError
from ome_tensor.record import Channel, ImageMeta
from ome_tensor.tables import first_line

from .arrays import ArrayImage, ArrayRow, PlacedArray, arrays_nbytes, arrays_schema
from .direct import ArraySource
from .files import FileSource

__all__ = ["TiffSource"]

_AXES = "TZCYX"

#: Files that an OME-XML says its planes are in.
_FILE_NAME = re.compile(r'FileName="([^"]*)"')

#: Metres in the units of wavelengths.
_LENGTHS = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "Å": 1e-4, "m": 1e6, "pm": 1e-6}


class TiffSource(ArraySource, FileSource):
    """A TIFF file: a row for each of its series (of an OME-TIFF, each image). See :class:`OpenedSource`.

    Args:
        location: Its path.

    Raises:
        InvalidRecord: it is damaged, holds no image, or is only a part of a set of files; names it.
        OSError: it cannot be opened.
    """

    format: ClassVar[str] = "ome-tiff"

    def __init__(self, location: str) -> None:
        super().__init__(location)
        try:
            # Of a set of files only this one: others may lie anywhere.
            self._tiff = tifffile.TiffFile(self.file, name=self.path.name, _multifile=False)
            self._check_chain()
            found = [self._row(number, series) for number, series in enumerate(self._series())]
        except OmeTensorError:
            raise
        except OSError as error:
            if error.errno is not None:
                raise
            raise self.unreadable("TIFF file", str(error)) from None
        except Exception as error:
            # Whatever its parts raise of bytes that they did not expect.
            raise self.unreadable("TIFF file", first_line(error)) from None
        if not found:
            raise self.unreadable("TIFF file", "it holds no image")
        self._rows = found
        levels = max(len(image.levels) for row in found for image in row.images.values() if image is not None)
        self.schema = arrays_schema({"image": levels}, {})
        self.images, self.others, self.rows = ["image"], (), len(found)
        self.nbytes = arrays_nbytes(found)

    def _check_chain(self) -> None:
        """InvalidRecord where a page names one before it as the next: tifffile would follow for ever."""
        tiff, file = self._tiff.tiff, self._tiff.filehandle
        begin, offset = file.tell(), self._tiff.pages.first.offset
        seen: set[int] = set()
        while offset:
            if offset in seen:
                raise self.unreadable("TIFF file", f"its list of pages leads back to where it was (page {len(seen)})")
            seen.add(offset)
            file.seek(offset)
            head = file.read(tiff.tagnosize)
            if len(head) < tiff.tagnosize:
                break  # For tifffile to say.
            (tags,) = struct.unpack(tiff.tagnoformat, head)
            file.seek(offset + tiff.tagnosize + tags * tiff.tagsize)
            following = file.read(tiff.offsetsize)
            if len(following) < tiff.offsetsize:
                break
            (offset,) = struct.unpack(tiff.offsetformat, following)
        file.seek(begin)

    def _series(self) -> list[Any]:
        xml = self._tiff.ome_metadata
        if xml is None:
            return list(self._tiff.series)
        files = set(_FILE_NAME.findall(xml))
        if len(files) > 1:
            raise self.unreadable(
                "TIFF file", f"its planes are spread over {len(files)} files; write them into one (or as OME-Zarr)"
            )
        return list(self._tiff.series)

    def _row(self, number: int, series: Any) -> ArrayRow:
        described = _described(self._tiff.ome_metadata, number) if self._tiff.is_ome else None
        levels = [self._image(series, level, described) for level in range(len(series.levels))]
        return ArrayRow({"image": ArrayImage(levels[0].meta, levels[0].array, levels[1:])})

    def _image(self, series: Any, level: int, described: Any) -> ArrayImage:
        one = series.levels[level]
        if any(page is None for page in one.pages):
            raise self.unreadable("TIFF file", "planes that its metadata name are missing")
        self._check_pages(one)
        opened: Any = zarr.open(one.aszarr(), mode="r")
        array: Any = opened["0"] if isinstance(opened, zarr.Group) else opened
        axes = _letters(one.axes)
        letters, bits = axes.replace("_", ""), described is not None and _type(described) == "bit"
        placed = PlacedArray(_Squeezed(array, one.axes, axes), letters, _kept(array.chunks, axes), bits=bits)
        full = PlacedArray(_Shape(series.levels[0].shape, one.axes, axes, array.dtype), letters)
        scale = (1.0, full.extent.y / placed.extent.y, full.extent.x / placed.extent.x)
        meta = _meta(described, placed, self.path.stem, scale)
        return ArrayImage(meta, placed)

    def _check_pages(self, series: Any) -> None:
        """InvalidRecord where a strip or tile is not in the file: tifffile would show zeros in its place."""
        size = self._stat.st_size
        for number, page in enumerate(series.pages):
            # Of pages that are alike only the first is described whole.
            due = math.prod(page.keyframe.chunked)
            offsets, counts = page.dataoffsets, page.databytecounts
            if len(offsets) != due or len(counts) != due:
                raise self.unreadable("TIFF file", f"plane {number} has {len(offsets)} of the {due} strips or tiles of its size")
            for offset, count in zip(offsets, counts, strict=True):
                if not (offset > 0 and 0 < count <= size - offset):
                    raise self.unreadable("TIFF file", f"a strip or tile of plane {number} does not lie in the file")

    def close(self) -> None:
        """See :meth:`OpenedSource.close`."""
        self._tiff.close()
        super().close()


def _letters(axes: str) -> str:
    """tifffile's axes as letters of TZCYX and S.

    Others (I: whatever a file does not name) take the place of one that is free; what is left is ``_``, and must have one element.
    """
    free = [axis for axis in "ZTC" if axis not in axes]
    letters = ""
    for axis in axes:
        if axis in "TZCYXS":
            letters += axis
        else:
            letters += free.pop(0) if free else "_"
    return letters


def _kept(sizes: Any, axes: str) -> list[int]:
    return [int(size) for size, axis in zip(sizes, axes, strict=True) if axis != "_"]


class _Shape:
    """The shape that an array has without the axes that are left out."""

    def __init__(self, shape: Any, named: str, axes: str, dtype: np.dtype) -> None:
        extra = [size for size, axis in zip(shape, axes, strict=True) if axis == "_"]
        if any(size != 1 for size in extra):
            raise InvalidRecord(f"its axes {named!r} of shape {tuple(shape)} are more than an image's", field="axes", value=named)
        self.shape = tuple(_kept(shape, axes))
        self.dtype = dtype


class _Squeezed(_Shape):
    """An array without the axes that are left out."""

    def __init__(self, array: Any, named: str, axes: str) -> None:
        super().__init__(array.shape, named, axes, array.dtype)
        self._array, self._axes = array, axes

    def __getitem__(self, places: tuple[slice, ...]) -> np.ndarray:
        rest = iter(places)
        part: np.ndarray = np.asarray(self._array[tuple(0 if axis == "_" else next(rest) for axis in self._axes)])
        return part


# --- what OME-XML says ------------------------------------------------------------------------------------------------


def _described(xml: str | None, number: int) -> Any:
    """An image as OME-XML describes it, or ``None`` where that cannot be read: pixels do not depend on it."""
    if xml is None:
        return None
    try:
        from ome_types import from_xml

        images = from_xml(xml).images
    except ImportError:
        raise
    except Exception:
        return None
    return images[number] if number < len(images) else None


def _meta(image: Any, array: PlacedArray, stem: str, scale: tuple[float, float, float]) -> ImageMeta:
    if image is None:
        return ImageMeta(array.extent, array.dtype, id=stem, name=stem, image_type="image")
    pixels = image.pixels
    sizes = (pixels.physical_size_z, pixels.physical_size_y, pixels.physical_size_x)
    units = (pixels.physical_size_z_unit, pixels.physical_size_y_unit, pixels.physical_size_x_unit)
    return ImageMeta(
        array.extent,
        array.dtype,
        # A bit may be stored as a byte; what else the XML says of the type counts for less than what is stored.
        pixel_type="bit" if _type(image) == "bit" else "",
        id=str(image.id or stem),
        name=str(image.name or stem),
        image_type="image",
        acquired=_moment(image.acquisition_date),
        physical_size=tuple(None if size is None else float(size) * by for size, by in zip(sizes, scale, strict=True)),  # type: ignore[arg-type]
        physical_unit=tuple(
            "" if size is None else str(getattr(unit, "value", unit)) for size, unit in zip(sizes, units, strict=True)
        ),  # type: ignore[arg-type]
        channels=_channels(pixels.channels, array.extent.c),
    )


def _type(image: Any) -> str:
    return str(getattr(image.pixels.type, "value", image.pixels.type))


def _moment(value: Any) -> datetime.datetime | None:
    return value if isinstance(value, datetime.datetime) else None


def _channels(listed: Any, count: int) -> tuple[Channel, ...]:
    """Channels; one with several samples stands for as many."""
    channels: list[Channel] = []
    for entry in listed:
        channel = Channel(
            id=str(entry.id or ""),
            name=str(entry.name or ""),
            emission_um=_micrometres(entry.emission_wavelength, entry.emission_wavelength_unit),
            excitation_um=_micrometres(entry.excitation_wavelength, entry.excitation_wavelength_unit),
            illumination=str(getattr(entry.illumination_type, "value", entry.illumination_type) or ""),
            color_rgba=_color(entry.color),
        )
        channels += [channel] * int(entry.samples_per_pixel or 1)
    return tuple(channels) if len(channels) == count else ()


def _micrometres(value: Any, unit: Any) -> float | None:
    factor = _LENGTHS.get(str(getattr(unit, "value", unit)))
    return None if value is None or factor is None else float(value) * factor


def _color(color: Any) -> int | None:
    """0xRRGGBBAA: OME packs the same into a signed number."""
    if color is None:
        return None
    try:
        return int(color.as_int32()) & 0xFFFFFFFF
    except (AttributeError, TypeError, ValueError):
        return None
