"""OME-Zarr, versions 0.4 (Zarr 2) and 0.5 (Zarr 3): images, labels, series and plates, in local folders and at addresses.

Format: https://ngff.openmicroscopy.org/0.5/ and https://ngff.openmicroscopy.org/0.4/. A chunk that is not stored is one of the array's fill value, as
Zarr has it. A plain Zarr array without OME metadata is an image too, its axes the last of TZCYX.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import zarr
from zarr.storage import FsspecStore, LocalStore

from ome_tensor.errors import InvalidRecord, OmeTensorError
from ome_tensor.record import Channel, ImageMeta
from ome_tensor.tables import first_line
from ome_tensor_server.file_system import FileState, file_state

from .arrays import ArrayImage, ArrayRow, PlacedArray, arrays_nbytes, arrays_schema
from .detect import is_address, leads_up, location_name
from .direct import ArraySource
from .folders import folder_digest, folder_fingerprint, folder_states, states_fingerprint

__all__ = ["ZarrSource"]

_log = logging.getLogger(__name__)

_AXES = "TZCYX"

#: Units as OME-Zarr writes them out, and as OME abbreviates them.
_UNITS = {
    "angstrom": "Å",
    "nanometer": "nm",
    "micrometer": "µm",
    "micron": "µm",
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
}

#: Images of one source: a plate of 384 wells with a hundred fields has fewer.
_MOST_IMAGES = 100_000


class _Unreadable(Exception):
    """Why a group is no image that can be read."""


class _NotedStore(LocalStore):  # type: ignore[misc]
    """A folder that notes which of its files are asked for. zarr reads on a thread of its own."""

    def __init__(self, root: Path | str, *, read_only: bool = True) -> None:
        super().__init__(root, read_only=read_only)
        self._asked: set[str] = set()

    def take(self) -> set[str]:
        """Those asked for since the last time."""
        asked, self._asked = self._asked, set()
        return asked

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        self._asked.add(key)
        return await super().get(key, *arguments, **options)

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]) -> Any:
        ranges = list(key_ranges)
        self._asked.update(key for key, _ in ranges)
        return await super().get_partial_values(prototype, ranges)

    def get_sync(self, key: str, **options: Any) -> Any:
        self._asked.add(key)
        return super().get_sync(key, **options)


class ZarrSource(ArraySource):
    """An OME-Zarr image, collection or plate. See :class:`OpenedSource`.

    An image is one row, its labels further image columns ``label_NAME`` beside it where they are of its size. A collection (bioformats2raw's layout)
    has a row for each image, and its ``path``; a plate one for each field, and ``well``, ``field`` and ``path``.

    Args:
        location: Path of the folder, or an address (http, https, s3).

    Raises:
        InvalidRecord: it is damaged, or holds no image; names it.
        OSError: it cannot be opened.
    """

    format: ClassVar[str] = "ome-zarr"

    def __init__(self, location: str) -> None:
        self.location = location
        self._name = location_name(location)
        self._folder: Path | None = None
        self._fingerprint = ""
        self._documents: list[str] = []
        #: Of a folder: what the file system said of its files, and which of them are read.
        self._states: dict[str, FileState] = {}
        self._noted: _NotedStore | None = None
        store: Any
        if is_address(location):
            # Public buckets need no key, and without one a signed request fails.
            anonymous = location.startswith("s3://") and not _has_s3_key()
            store = FsspecStore.from_url(location, storage_options={"anon": True} if anonymous else {}, read_only=True)
        else:
            self._folder = Path(location)
            self._states = folder_states(self._folder)
            self._fingerprint = states_fingerprint(self._states)
            store = self._noted = _NotedStore(location, read_only=True)
        try:
            root = zarr.open(store, mode="r")
            found = list(self._find(root))
        except OmeTensorError:
            raise
        except _Unreadable as error:
            raise self._error(str(error)) from None
        except (OSError, ImportError):
            raise
        except Exception as error:
            # Zarr raises whatever its parts do.
            raise self._error(first_line(error)) from None
        if not found:
            raise self._error("it holds no image")
        self._rows = found
        columns: dict[str, int] = {}
        for row in found:
            for name, image in row.images.items():
                columns[name] = max(columns.get(name, 0), len(image.levels) if image is not None else 0)
        kinds = {name: pa.int64() if name == "field" else pa.string() for row in found[:1] for name in row.others}
        self.schema = arrays_schema(columns, kinds)
        self.images = list(columns)
        self.others = [(name, str(kind)) for name, kind in kinds.items()]
        self.rows = len(found)
        self.nbytes = arrays_nbytes(found)

    def _error(self, why: str) -> InvalidRecord:
        return InvalidRecord(f"{self._name} is not a readable OME-Zarr image: {why}", field="path", value=self._name)

    # -- what there is -------------------------------------------------------------------------------------------------------------

    def _find(self, root: zarr.Group | zarr.Array[Any]) -> Iterator[ArrayRow]:
        """The rows."""
        if isinstance(root, zarr.Array):
            yield ArrayRow({"image": self._plain(root)})
            return
        attributes = self._attributes(root)
        if "multiscales" in attributes:
            yield self._row(root, self._name, {})
        elif "plate" in attributes:
            yield from self._plate(root, attributes["plate"])
        elif "bioformats2raw.layout" in attributes:
            number = 0
            while str(number) in root and number < _MOST_IMAGES:
                yield self._row(self._group(root, str(number)), f"{self._name} {number}", {"path": str(number)})
                number += 1
        elif "well" in attributes:
            for path in self._fields(attributes["well"]):
                yield self._row(self._group(root, path), f"{self._name} {path}", {"path": path})

    def _plate(self, root: zarr.Group, plate: Any) -> Iterator[ArrayRow]:
        count = 0
        for well in _listed(plate, "wells"):
            path = _path(well)
            group = self._group(root, path)
            attributes = self._attributes(group)
            for number, field in enumerate(self._fields(attributes.get("well", {}))):
                count += 1
                if count > _MOST_IMAGES:
                    raise _Unreadable(f"it has more than {_MOST_IMAGES} images")
                image = self._group(group, field)
                others = {"well": path.replace("/", ""), "field": number, "path": f"{path}/{field}"}
                yield self._row(image, f"{path}/{field}", others)

    def _fields(self, well: Any) -> list[str]:
        return [_path(image) for image in _listed(well, "images")]

    def _group(self, parent: zarr.Group, path: str) -> zarr.Group:
        found = parent.get(path)
        if not isinstance(found, zarr.Group):
            raise _Unreadable(f"it lacks the group {path!r} that its metadata name")
        return found

    def _attributes(self, group: zarr.Group) -> Mapping[str, Any]:
        """A group's OME metadata: of version 0.5 they stand under ``ome``."""
        attributes = group.attrs.asdict()
        self._documents.append(json.dumps(attributes, sort_keys=True, default=str))
        ome = attributes.get("ome")
        return ome if isinstance(ome, dict) else attributes

    def _row(self, group: zarr.Group, name: str, others: Mapping[str, Any]) -> ArrayRow:
        """An image and its labels."""
        attributes = self._attributes(group)
        image = self._image(group, attributes, name, "label" if "image-label" in attributes else "image")
        images: dict[str, ArrayImage | None] = {"image": image}
        labels = group.get("labels")
        if isinstance(labels, zarr.Group):
            for one in _listed(self._attributes(labels), "labels", str):
                label = self._label(labels, _path({"path": one}))
                if label is None:
                    continue
                extent = label.array.extent
                if (*extent[:2], *extent[3:]) != (*image.array.extent[:2], *image.array.extent[3:]):
                    _log.warning("%s: label %s is of another size than its image, and left out", self._name, one)
                    continue
                images[f"label_{one}"] = label
        return ArrayRow(images, others)

    def _label(self, labels: zarr.Group, path: str) -> ArrayImage | None:
        found = labels.get(path)
        if not isinstance(found, zarr.Group):
            return None
        attributes = self._attributes(found)
        return self._image(found, attributes, path, "label") if "multiscales" in attributes else None

    def _image(self, group: zarr.Group, attributes: Mapping[str, Any], name: str, image_type: str) -> ArrayImage:
        """An image and its pyramid."""
        multiscales = attributes.get("multiscales")
        if not isinstance(multiscales, list) or not multiscales or not isinstance(multiscales[0], dict):
            raise _Unreadable("its multiscales are none")
        scales = multiscales[0]
        axes = _axes(scales)
        levels = []
        for dataset in _listed(scales, "datasets"):
            path = _path(dataset)
            array = group.get(path)
            if not isinstance(array, zarr.Array):
                raise _Unreadable(f"it lacks the array {path!r} that its metadata name")
            letters = axes or _AXES[-array.ndim :]
            placed = self._placed(array, letters)
            size, unit = _physical(scales, dataset, letters)
            channels = _channels(attributes, placed.extent.c) if image_type == "image" else ()
            own = str(scales.get("name") or name)
            meta = ImageMeta(
                placed.extent,
                placed.dtype,
                id=name,
                name=own,
                image_type=image_type,
                physical_size=size,
                physical_unit=unit,
                channels=channels,
            )
            levels.append(ArrayImage(meta, placed))
        if not levels:
            raise _Unreadable("its multiscales have no datasets")
        first, *rest = levels
        for level in rest:
            if level.array.dtype != first.array.dtype or tuple(level.array.extent[:1]) != tuple(first.array.extent[:1]):
                raise _Unreadable("its levels differ in dtype or in number of time points")
        return ArrayImage(first.meta, first.array, rest)

    def _plain(self, array: zarr.Array[Any]) -> ArrayImage:
        if not 2 <= array.ndim <= len(_AXES):
            raise _Unreadable(f"its array has {array.ndim} axes, not 2 to 5")
        self._documents.append(json.dumps([list(array.shape), str(array.dtype)]))
        placed = self._placed(array, _AXES[-array.ndim :])
        return ArrayImage(ImageMeta(placed.extent, placed.dtype, id=self._name, name=self._name, image_type="image"), placed)

    def _placed(self, array: zarr.Array[Any], axes: str) -> PlacedArray:
        # Of a sharded array the shard's inner chunks are what is decoded.
        try:
            return PlacedArray(array, axes, array.chunks)
        except InvalidRecord as error:
            raise _Unreadable(error.message) from None

    # -- what every source has -----------------------------------------------------------------------------------------------------

    def version(self) -> str:
        """See :meth:`OpenedSource.version`: of all files; at an address, where not even a list of them can be had, of its metadata."""
        return self.fingerprint()[:16] if self._folder is None else folder_digest(self._folder)

    def fingerprint(self) -> str:
        """See :meth:`OpenedSource.fingerprint`; at an address of its metadata."""
        if self._folder is not None:
            return self._fingerprint
        return hashlib.sha256("\0".join([self.location, *self._documents]).encode()).hexdigest()[:32]

    def is_unchanged(self) -> bool:
        """See :meth:`OpenedSource.is_unchanged`; an address is taken to be."""
        try:
            return self._folder is None or folder_fingerprint(self._folder) == self._fingerprint
        except (OSError, InvalidRecord):
            return False

    def check_read(self) -> None:
        """See :meth:`OpenedSource.check_read`. Of a folder only the files count that were read, or were to be: a look at all of many takes longer
        than a read.
        """
        if self._folder is None or self._noted is None:
            return
        keys = self._noted.take()
        if not keys and not self.is_unchanged():
            raise self.changed()
        for key in keys:
            if file_state(os.path.join(self.location, key)) != self._states.get(os.path.normpath(key)):
                raise self.changed()

    def close(self) -> None:
        """See :meth:`OpenedSource.close`."""


@functools.cache
def _has_s3_key() -> bool:
    """Whether this process has a key for S3: wherever boto finds one (variables, profiles, roles of the machine or the container)."""
    from botocore.session import Session

    session = Session()
    # Of a machine that is none of Amazon's nobody answers.
    session.set_config_variable("metadata_service_timeout", 1)
    session.set_config_variable("metadata_service_num_attempts", 1)
    return session.get_credentials() is not None


def _listed(parent: Any, name: str, kind: type = dict) -> list[Any]:
    entries = parent.get(name, []) if isinstance(parent, Mapping) else []
    if not isinstance(entries, list) or not all(isinstance(entry, kind) for entry in entries):
        raise _Unreadable(f"its {name} are no list of {'text' if kind is str else 'objects'}")
    return entries


def _path(entry: Mapping[str, Any]) -> str:
    """A path that metadata name; never one that leads out."""
    path = entry.get("path")
    if not isinstance(path, str) or not path or path.startswith("/") or "\\" in path or leads_up(path):
        raise _Unreadable(f"its metadata name a path {path!r} that does not lie in it")
    return path


def _axes(scales: Mapping[str, Any]) -> str:
    """Letters of the axes; empty where it does not say."""
    letters = ""
    for axis in scales.get("axes") or ():
        name = axis.get("name") if isinstance(axis, dict) else axis
        letter = str(name).upper()
        if letter not in _AXES or letter in letters:
            raise _Unreadable(f"its axes are {scales['axes']!r}")
        letters += letter
    return letters


def _physical(
    scales: Mapping[str, Any], dataset: Mapping[str, Any], axes: str
) -> tuple[tuple[float | None, float | None, float | None], tuple[str, str, str]]:
    """Size of a pixel along z, y, x, and its unit."""
    factors = dict.fromkeys(axes, 1.0)
    known = False
    for transformation in (*_transformations(dataset), *_transformations(scales)):
        scale = transformation.get("scale")
        if transformation.get("type") == "scale" and isinstance(scale, list) and len(scale) == len(axes):
            known = True
            for axis, factor in zip(axes, scale, strict=True):
                if isinstance(factor, (int, float)) and not isinstance(factor, bool):
                    factors[axis] *= float(factor)
    units = {}
    for axis in scales.get("axes") or ():
        if isinstance(axis, dict) and isinstance(axis.get("unit"), str):
            units[str(axis.get("name")).upper()] = _UNITS.get(axis["unit"], axis["unit"])
    return (
        tuple(factors[axis] if known and axis in axes else None for axis in "ZYX"),  # type: ignore[return-value]
        tuple(units.get(axis, "") for axis in "ZYX"),
    )


def _transformations(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = entry.get("coordinateTransformations")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _channels(attributes: Mapping[str, Any], count: int) -> tuple[Channel, ...]:
    """Channels as ``omero`` describes them."""
    omero = attributes.get("omero")
    listed = omero.get("channels") if isinstance(omero, dict) else None
    if not isinstance(listed, list) or len(listed) != count:
        return ()
    channels = []
    for number, entry in enumerate(listed):
        known = entry if isinstance(entry, dict) else {}
        color = str(known.get("color") or "").lstrip("#")
        try:
            rgba = int(color, 16) << 8 | 0xFF if len(color) == 6 else None
        except ValueError:
            rgba = None
        channels.append(Channel(id=f"Channel:0:{number}", name=str(known.get("label") or ""), color_rgba=rgba))
    return tuple(channels)
