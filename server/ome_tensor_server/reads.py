"""From a request for tiles to the images that it is of, their views resolved: all that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ome_tensor.columns import Sizes
from ome_tensor.errors import ImageNotFound, InvalidArgument, InvalidRecord, InvalidSelection, LimitExceeded
from ome_tensor.image_views import resolve_views
from ome_tensor.keys import ImageKey, format_key
from ome_tensor.pixels import Pixels
from ome_tensor.plan import Plan, ResolvedPlan
from ome_tensor.selection import Selection
from ome_tensor.tiling import Tile
from ome_tensor.view import TensorView

from .catalogue import Dataset

__all__ = ["Beside", "ReadImages", "images_of_keys", "images_of_rows"]


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a read's images are, and what they are.

    Attributes:
        columns: The image column of each, or the one of all.
        rows: Their rows.
        extents: (n, 5) int64, TZCYX.
        dtypes: NumPy name of each one's dtype.
        level: Of their pyramids.
    """

    columns: Sequence[str]
    rows: np.ndarray
    extents: np.ndarray
    dtypes: list[str]
    level: int

    def column(self, image: int) -> str:
        return self.columns[image] if len(self.columns) > 1 else self.columns[0]


def images_of_keys(dataset: Dataset, keys: Sequence[ImageKey], level: int) -> _Places:
    """The images of keys of one dataset. Raises ImageNotFound, InvalidRecord, or InvalidArgument where there is no such level."""
    images = [dataset.image(key.column, key.row, level) for key in keys]
    return _Places(
        [image.column for image in images],
        np.array([image.row for image in images], np.int64),
        np.array([tuple(image.pixels.meta.extent) for image in images], np.int64),
        [image.pixels.meta.dtype.name for image in images],
        level,
    )


def images_of_rows(dataset: Dataset, column: str, rows: np.ndarray, level: int, most: int) -> _Places:
    """The images of rows of one column.

    Raises:
        LimitExceeded: more than ``most``.
        ImageNotFound: there is no such column, or a row holds no image.
        InvalidRecord: an image's metadata are damaged.
        InvalidArgument: an image has no such level.
    """
    if len(rows) > most:
        raise LimitExceeded(
            f"the request lists {len(rows)} images; this server reads at most {most} at once (max_tiles)",
            field="image_rows.rows",
            value=len(rows),
        )
    name, _ = dataset.column(column or None)
    sizes = _sizes(dataset, name, rows)
    if level == 0:
        return _Places([name], rows, sizes.extents, sizes.dtypes, 0)
    metas = [dataset.image(name, row, level).pixels.meta for row in rows.tolist()]
    return _Places(
        [name], rows, np.array([tuple(meta.extent) for meta in metas], np.int64), [meta.dtype.name for meta in metas], level
    )


def _sizes(dataset: Dataset, name: str, rows: np.ndarray) -> Sizes:
    """What the images of rows are, all of which hold one that can be read."""
    images = dataset.columns[name]
    if len(rows):
        known = rows < images.row_count
        known[known] = images.is_valid()[rows[known]]
        if not known.all():
            # Says why.
            dataset.image(name, int(rows[np.argmin(known)]))
            raise ImageNotFound(f"no image at row {rows[np.argmin(known)]} of column {name!r}", field="image_rows.rows")
    sizes = images.sizes(rows)
    for place, problem in sorted(sizes.problems.items()):
        raise InvalidRecord(f"{format_key(dataset.name, name, int(rows[place]))}: {problem}", field="image_rows.rows")
    return sizes


@dataclass(frozen=True, slots=True)
class Beside:
    """An image column that comes beside.

    Attributes:
        column: Its name.
        dtype: Of all its images.
        channels: Number of channels of each read image's counterpart.
    """

    column: str
    dtype: np.dtype
    channels: np.ndarray


class ReadImages:
    """The images of one read, each with its view.

    Args:
        dataset: Theirs.
        places: Where they are.
        plan: What is wanted of each.
        arrow: Whether flat stored values are wanted.
        beside: Image columns that come beside.

    Attributes:
        dataset: As given.
        views: What views there are: images of one size have one.
        of: Which of them is each image's.
        arrow: As given.
        dtype: Of the pixels that are delivered.
        beside: The columns that come beside.

    Raises:
        InvalidSelection, InvalidArgument: a view does not fit its image, or the images' pixels cannot travel in one stream.
        ImageNotFound, InvalidRecord: an image that is to come beside.
    """

    def __init__(self, dataset: Dataset, places: _Places, plan: Plan, arrow: bool, beside: Sequence[str]) -> None:
        self.dataset = dataset
        self._places = places
        self.arrow = arrow
        self._override = plan.dtype
        # Of stored values the dtype is the stored one, whatever is asked for besides.
        wanted = replace(plan, dtype=None) if arrow else plan
        grid = lambda image: self.pixels(image).meta.grid  # noqa: E731  one line that says what it is
        self.views, self.of = resolve_views(wanted, places.extents, places.dtypes, self.key, grid)
        self.dtype = self.views[0].dtype
        if arrow:
            stored = self.pixels(0).stored_dtype or np.dtype(np.uint16)
            self.views = [ResolvedPlan(view.selection, view.layout, stored, view.channel_policy) for view in self.views]
            self.dtype = stored
        if arrow and beside:
            raise InvalidArgument("stored values (mode arrow) have nothing beside them", field="beside", value=beside[0])
        self.beside = [self._find_beside(name) for name in beside]

    def __len__(self) -> int:
        return len(self.of)

    def key(self, image: int) -> str:
        """An image's key."""
        return format_key(self.dataset.name, self._places.column(image), int(self._places.rows[image]))

    @property
    def selections(self) -> list[Selection]:
        """What each view shows: stored values need the selection as it is, since a channel policy does not make one chunk of several."""
        return [view.selection if self.arrow else view.shown for view in self.views]

    def pixels(self, image: int) -> Pixels:
        """An image's pixels."""
        places = self._places
        return self.dataset.image(places.column(image), int(places.rows[image]), places.level).pixels

    def view(self, image: int) -> TensorView:
        """An image's view."""
        return TensorView.of_pixels(self.pixels(image), self.views[self.of[image]], self._override)

    def pixels_beside(self, number: int, image: int) -> Pixels:
        """The pixels of an image's counterpart in a column that comes beside."""
        return self.dataset.image(self.beside[number].column, int(self._places.rows[image]), self._places.level).pixels

    def tile_beside(self, number: int, tile: Tile) -> Tile:
        """The same tile in a column that comes beside: with its own channel where it has only one."""
        if self.beside[number].channels[tile.image] != 1 or self._places.extents[tile.image, 2] == 1:
            return tile
        t, z, _, h, w = tile.shape
        return replace(tile, selection=replace(tile.selection, c=range(1)), shape=(t, z, 1, h, w))

    def _find_beside(self, name: str) -> Beside:
        if name not in self.dataset.columns:
            raise InvalidArgument(
                f"dataset {self.dataset.name!r} has no image column {name!r} to come beside; it has: {', '.join(self.dataset.columns)}",
                field="beside",
                value=name,
            )
        places = self._places
        if places.level:
            sizes = images_of_keys(
                self.dataset, [ImageKey(self.dataset.name, name, row) for row in places.rows.tolist()], places.level
            )
            extents, dtypes = sizes.extents, sizes.dtypes
        else:
            found = _sizes(self.dataset, name, places.rows)
            extents, dtypes = found.extents, found.dtypes
        for image, (own, other, dtype) in enumerate(zip(places.extents.tolist(), extents.tolist(), dtypes, strict=True)):
            key = format_key(self.dataset.name, name, int(places.rows[image]))
            if (*own[:2], *own[3:]) != (*other[:2], *other[3:]) or other[2] not in (1, own[2]):
                raise InvalidSelection(
                    f"{key} is of shape {tuple(other)} (TZCYX), and {self.key(image)}, which it is to come beside, of {tuple(own)}: they may "
                    "differ only where it has one channel",
                    field="beside",
                    value=name,
                )
            if dtype != dtypes[0]:
                raise InvalidArgument(
                    f"{key} is {dtype}, and other images of its column are {dtypes[0]}: a stream has one dtype for each column",
                    field="beside",
                    value=name,
                )
        return Beside(name, np.dtype(dtypes[0]), extents[:, 2])
