"""Serving an array source where it lies: blocks are read when they are asked for, and kept for a while."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import IO

import numpy as np
import pyarrow as pa

from ome_tensor.blocks import ChunkCache
from ome_tensor.columns import Column, Sizes, sizes_of
from ome_tensor.errors import InvalidRecord, InvalidSelection, OmeTensorError
from ome_tensor.index import cut_at_blocks
from ome_tensor.listing import Level
from ome_tensor.pixels import Pixels
from ome_tensor.record import ImageMeta
from ome_tensor.selection import ChunkGrid, Indices, Selection
from ome_tensor.tables import LoadedTable, first_line

from .arrays import ArrayImage, ArrayRow, PlacedArray, array_records, pixel_type_name, write_arrays
from .base import InPlace, OpenedSource, Progress

__all__ = ["ArraySource", "DirectColumn", "DirectPixels"]


class DirectPixels:
    """An array's pixels. See :class:`~ome_tensor.pixels.Pixels`.

    Args:
        meta: The image's metadata.
        array: Its pixels.
        cache: Where blocks are kept.
        check: Raises InvalidRecord where what was just read is not of what was opened.
    """

    def __init__(self, meta: ImageMeta, array: PlacedArray, cache: ChunkCache, check: Callable[[], None]) -> None:
        self.meta = meta
        self._array = array
        self._cache = cache
        self._check = check
        self._owner = cache.new_owner()
        self._counts = [-(-size // block) for size, block in zip(array.extent, array.block, strict=True)]

    @property
    def stored_dtype(self) -> np.dtype | None:
        """See :attr:`Pixels.stored_dtype`."""
        return self._array.dtype

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """See :meth:`Pixels.gather`."""
        if out.size == 0:
            return
        s, (bt, bz, bc, by, bx) = selection, self._array.block
        y_runs, x_runs = cut_at_blocks(s.y, s.h, by), cut_at_blocks(s.x, s.w, bx)
        # Block by block, so that each is asked for once.
        for t, t_places in _grouped(s.t, bt):
            for z, z_places in _grouped(s.z, bz):
                for c, c_places in _grouped(s.c, bc):
                    for y, y_to, y_from in y_runs:
                        for x, x_to, x_from in x_runs:
                            block = self._block((t, z, c, y, x))
                            for it, t_in in t_places:
                                for iz, z_in in z_places:
                                    for ic, c_in in c_places:
                                        out[it, iz, ic, y_to, x_to] = block[t_in, z_in, c_in, y_from, x_from]

    def _block(self, place: Sequence[int]) -> np.ndarray:
        """A block by its place in the grid of blocks, TZCYX, clipped to the image."""
        number = 0
        for count, index in zip(self._counts, place, strict=True):
            number = number * count + index
        key = (self._owner, number)
        block = self._cache.get(key)
        if block is None:
            with self._cache.busy(key):
                block = self._cache.get(key)
                if block is None:
                    block = self._read(place)
                    self._cache.put(key, block)
        return block

    def _read(self, place: Sequence[int]) -> np.ndarray:
        array = self._array
        begin = [index * size for index, size in zip(place, array.block, strict=True)]
        end = [min(first + size, length) for first, size, length in zip(begin, array.block, array.extent, strict=True)]
        nbytes = array.dtype.itemsize
        for first, last in zip(begin, end, strict=True):
            nbytes *= last - first
        self._cache.check_size("a stored block", nbytes)
        try:
            # Its own memory: what a view of the source would keep alive is the source's affair.
            block = np.array(array.read(begin, end), order="C")
        except MemoryError:
            raise
        except Exception as error:
            # Of a source that is half one and half another anything may be said.
            self._check()
            if isinstance(error, OmeTensorError):
                raise
            # Whatever a library says of bytes that it did not expect.
            raise InvalidRecord(
                f"the block at {tuple(begin)} (TZCYX) cannot be read: {first_line(error)}", field="chunks"
            ) from error
        # Afterwards: what has gone reads as zeros in some formats.
        self._check()
        return block

    def flat_values(self, selection: Selection) -> np.ndarray:
        """See :meth:`Pixels.flat_values`: what is stored are bytes."""
        raise InvalidSelection("mode='arrow' does not support byte-backed inline chunks; use mode='numpy'.", field="mode")


def _grouped(indices: Indices, block: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Chosen indices by the block that they are in: its number, and where in the output and in the block each is."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for place, index in enumerate(indices):
        number, inside = divmod(index, block)
        groups.setdefault(number, []).append((place, inside))
    return list(groups.items())


class DirectColumn:
    """An image column of an array source. See :class:`~ome_tensor.columns.Column`.

    Args:
        images: A row each; ``None`` where it holds none.
        cache: Where blocks are kept.
        check: Raises InvalidRecord where what was just read is not of what was opened.
    """

    def __init__(self, images: Sequence[ArrayImage | None], cache: ChunkCache, check: Callable[[], None]) -> None:
        self._images = images
        self._cache = cache
        self._check = check
        self.row_count = len(images)
        self.image_count = sum(image is not None for image in images)

    def _image(self, row: int) -> ArrayImage:
        image = self._images[row]
        assert image is not None
        return image

    def is_image(self, row: int) -> bool:
        """See :meth:`Column.is_image`."""
        return self._images[row] is not None

    def is_valid(self) -> np.ndarray:
        """See :meth:`Column.is_valid`."""
        return np.array([image is not None for image in self._images], bool)

    def only_row(self) -> int | None:
        """See :meth:`Column.only_row`."""
        return int(np.argmax(self.is_valid())) if self.image_count == 1 else None

    def meta(self, row: int) -> ImageMeta:
        """See :meth:`Column.meta`."""
        return meta_of(self._image(row))

    def sizes(self, rows: np.ndarray) -> Sizes:
        """See :meth:`Column.sizes`."""
        return sizes_of(self, rows)

    def levels(self, row: int) -> tuple[Level, ...]:
        """See :meth:`Column.levels`."""
        image = self._image(row)
        return tuple(Level(tuple(one.array.extent)) for one in (image, *image.levels))  # type: ignore[arg-type]

    def pixels(self, row: int, level: int = 0) -> Pixels:
        """See :meth:`Column.pixels`."""
        image = self._image(row)
        image = image if level == 0 else image.levels[level - 1]
        return DirectPixels(meta_of(image), image.array, self._cache, self._check)


def meta_of(image: ArrayImage) -> ImageMeta:
    """What is said of an image, its array's size, dtype and blocks included."""
    array, block = image.array, image.array.stored
    return replace(
        image.meta,
        extent=array.extent,
        dtype=array.dtype,
        pixel_type=image.meta.pixel_type or pixel_type_name(array.dtype),
        grid=image.meta.grid or ChunkGrid(block.y, block.x, block.z, block.c, block.t),
    )


class ArraySource(OpenedSource):
    """A source of arrays: what is written and what is served in place come from the same rows."""

    _rows: Sequence[ArrayRow]

    def write(self, file: IO[bytes], progress: Progress) -> None:
        """See :meth:`OpenedSource.write`."""
        write_arrays(self.schema, self._rows, file, progress)

    def in_place(self, version: str, cache: ChunkCache) -> InPlace:
        """See :meth:`OpenedSource.in_place`."""
        rows, schema = self._rows, self.schema
        metadata = pa.table(
            {name: pa.array([row.others.get(name) for row in rows], schema.field(name).type) for name, _ in self.others}
        )
        table = LoadedTable({}, tuple(self.others), len(rows), version, metadata=metadata)
        columns: dict[str, Column] = {
            name: DirectColumn([row.images.get(name) for row in rows], cache, self.check_read) for name in self.images
        }
        return InPlace(table, columns, array_records(rows, schema))
