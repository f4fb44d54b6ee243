"""What an OME-Arrow record says about itself, and where its pixels lie; nothing here reads a pixel.

Records come as a dict, a ``StructScalar``, a ``StructArray`` (row 0) or a ``ChunkedArray`` (first non-empty record). Fields are found by name, so
records as found in the wild are read too: fields in any order, other integer widths, ``chunks`` missing or null. Format:
https://github.com/WayScience/ome-arrow (``ome_arrow.meta.OME_ARROW_STRUCT``).
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from .errors import InvalidArgument, InvalidRecord
from .pixel_types import dtype_of_pixel_type
from .selection import ChunkGrid, Extent

__all__ = ["LARGEST_SIZE", "Channel", "ImageMeta", "Record", "first_record", "read_meta"]

#: OME-Arrow's sizes are int32.
LARGEST_SIZE = 2**31 - 1

#: One record: a mapping of Python objects, or Arrow's scalar (a mapping too, whose values are Arrow scalars).
Record: TypeAlias = "Mapping[str, Any] | pa.StructScalar"


@dataclass(frozen=True, slots=True)
class Channel:
    """One channel's metadata.

    Attributes:
        id, name: As stored; ``""`` where absent.
        emission_um, excitation_um: Wavelengths in micrometres, or ``None``.
        illumination: Modality, e.g. ``Epifluorescence``; ``""`` where absent.
        color_rgba: Packed 0xRRGGBBAA, or ``None``.
    """

    id: str = ""
    name: str = ""
    emission_um: float | None = None
    excitation_um: float | None = None
    illumination: str = ""
    color_rgba: int | None = None


@dataclass(frozen=True, slots=True)
class ImageMeta:
    """One image's metadata.

    Attributes:
        extent: Size in elements, TZCYX.
        dtype: Pixel dtype that ``pixel_type`` means.
        pixel_type: ``pixels_meta.type`` as stored, ``""`` where absent (then uint16).
        id, name, image_type: As stored; ``""`` where absent.
        acquired: Acquisition time as stored (no time zone means UTC by convention), or ``None``.
        physical_size: Size of one pixel along z, y, x in ``physical_unit``; ``None`` where absent.
        physical_unit: Unit along z, y, x; ``""`` where absent.
        channels: One entry a channel where the record lists them; may be shorter than ``extent.c``.
        grid: Chunk size, or ``None`` where the record has no chunk grid.
        chunk_order: Axis order inside a chunk's payload; only ``ZYX`` can be read.
    """

    extent: Extent
    dtype: np.dtype
    pixel_type: str = ""
    id: str = ""
    name: str = ""
    image_type: str = ""
    acquired: datetime.datetime | None = None
    physical_size: tuple[float | None, float | None, float | None] = (None, None, None)
    physical_unit: tuple[str, str, str] = ("", "", "")
    channels: tuple[Channel, ...] = ()
    grid: ChunkGrid | None = None
    chunk_order: str = "ZYX"

    @property
    def nbytes(self) -> int:
        """Bytes of the whole image as its own dtype."""
        t, z, c, y, x = self.extent
        return t * z * c * y * x * self.dtype.itemsize


def first_record(data: object) -> Record:
    """The one record that TensorView shows: a mapping itself, a scalar itself, row 0 of an array, the first record of a chunked array.

    Raises:
        InvalidRecord: no record, or a null one.
        InvalidArgument: not OME-Arrow data at all.
    """
    if isinstance(data, pa.ChunkedArray):
        data = next((chunk for chunk in data.chunks if len(chunk)), None)
        if data is None:
            raise InvalidRecord("Cannot create TensorView from an empty OME-Arrow array.", field="data")
    if isinstance(data, pa.StructArray):
        if len(data) == 0:
            raise InvalidRecord("Cannot create TensorView from an empty OME-Arrow array.", field="data")
        data = data[0]
    if isinstance(data, pa.StructScalar):
        if not data.is_valid:
            raise InvalidRecord("the OME-Arrow record is null", field="data")
        return data
    if isinstance(data, Mapping):
        return data
    raise InvalidArgument(
        "data must be an OME-Arrow dict, StructScalar, StructArray or ChunkedArray of structs, "
        f"not {getattr(data, 'type', None) or type(data).__name__}",
        field="data",
    )


def field_of(record: Record, name: str) -> Any:
    """A field's value (an Arrow scalar or a Python object), or ``None`` where it is missing or null."""
    try:
        value = record[name]
    except KeyError:
        return None
    if isinstance(value, pa.Scalar):
        return value if value.is_valid else None
    return value


def _plain(record: Record, name: str) -> Any:
    """A small field as Python objects, ``None`` where missing, or where Python cannot hold it (text that is no UTF-8). Never for pixels."""
    value = field_of(record, name)
    try:
        return value.as_py() if isinstance(value, pa.Scalar) else value
    except (ValueError, OverflowError, pa.ArrowException):
        return None


def read_meta(record: Record) -> ImageMeta:
    """Metadata of one record. What reading pixels does not need, and is not what it should be, counts as absent: a color of text, for example.

    Raises:
        InvalidRecord: ``pixels_meta`` missing, a size that is not a positive integer, an unknown pixel type.
    """
    pixels = _plain(record, "pixels_meta")
    if not isinstance(pixels, Mapping):
        raise InvalidRecord("pixels_meta is missing from the OME-Arrow record", field="pixels_meta")
    extent = Extent(*(_size(pixels, axis) for axis in "tzcyx"))
    grid = _plain(record, "chunk_grid")
    if not isinstance(grid, Mapping):
        grid = {}
    channels = pixels.get("channels")
    if not isinstance(channels, (Sequence, np.ndarray)):
        channels = ()
    return ImageMeta(
        extent=extent,
        dtype=dtype_of_pixel_type(pixels.get("type")),
        pixel_type=_text(pixels.get("type")),
        id=_text(_plain(record, "id")),
        name=_text(_plain(record, "name")),
        image_type=_text(_plain(record, "image_type")),
        acquired=_time(record),
        physical_size=tuple(_number(pixels.get(f"physical_size_{axis}")) for axis in "zyx"),  # type: ignore[arg-type]
        physical_unit=tuple(_text(pixels.get(f"physical_size_{axis}_unit")) for axis in "zyx"),  # type: ignore[arg-type]
        channels=tuple(_channel(entry) for entry in channels if isinstance(entry, Mapping)),
        grid=_grid(grid),
        chunk_order=_text(grid.get("chunk_order")).strip().upper() or "ZYX",
    )


def _size(pixels: Mapping[str, Any], axis: str) -> int:
    value = pixels.get(f"size_{axis}")
    try:
        size = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        size = 0
    if size > LARGEST_SIZE:
        raise InvalidRecord(
            f"{axis} size is too large: pixels_meta.size_{axis} is {value!r}, at most {LARGEST_SIZE}",
            field=f"pixels_meta.size_{axis}",
            value=value,
        )
    if size <= 0 or size != value:
        raise InvalidRecord(
            f"{axis} size must be positive: pixels_meta.size_{axis} is {value!r}", field=f"pixels_meta.size_{axis}", value=value
        )
    return size


def _grid(grid: Mapping[str, Any]) -> ChunkGrid | None:
    y, x, z, c, t = (_integer(grid.get(f"chunk_{axis}")) for axis in "yxzct")
    # Sizes that are not positive stay, for the error of whoever counts in them.
    if y is None or x is None or max(y, x) > LARGEST_SIZE:
        return None
    return ChunkGrid(y, x, *(1 if size is None or size > LARGEST_SIZE else size for size in (z, c, t)))


def _channel(entry: Mapping[str, Any]) -> Channel:
    color = _integer(entry.get("color_rgba"))
    return Channel(
        _text(entry.get("id")),
        _text(entry.get("name")),
        _number(entry.get("emission_um")),
        _number(entry.get("excitation_um")),
        _text(entry.get("illumination")),
        None if color is None else color & 0xFFFFFFFF,
    )


def _time(record: Record) -> datetime.datetime | None:
    value = field_of(record, "acquisition_datetime")
    if isinstance(value, pa.TimestampScalar):
        # Nanoseconds do not fit in a datetime; a microscope's clock does not have them either.
        try:
            value = value.cast(pa.timestamp("us", value.type.tz), safe=value.type.unit != "ns").as_py()
        except (ValueError, OverflowError, pa.ArrowException):
            return None  # A year that Python does not have, or a time zone that this machine does not know.
    return value if isinstance(value, datetime.datetime) else None


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _number(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _integer(value: object) -> int | None:
    """A whole number, also one that is stored as a float."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    return int(value) if isinstance(value, (float, np.floating)) and value.is_integer() else None
