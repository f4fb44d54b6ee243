"""Many images of one column of a dataset, read in one stream: in order or shuffled over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import pyarrow as pa

from ome_tensor.batches import ImageBatch
from ome_tensor.errors import InvalidArgument
from ome_tensor.iteration import ImageTileArray, check_batch_edge, in_batches, order_of, prefetch_of, tiling_of, windows_of
from ome_tensor.keys import format_key
from ome_tensor.lazy import LazyTensorView
from ome_tensor.tiling import Edge, Order, Tiling

from .image_read import ImageRead
from .remote import RemoteSource

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["ImageSet", "cut_of"]


class ImageSet(Sequence[LazyTensorView]):
    """Images of one column at one version of the dataset. Made by :meth:`RemoteDataset.images`; pickles.

    ``len()`` is their number, an index gives one image's lazy view, a slice a smaller set. Iterating over tiles reads all of them in one stream.

    Args:
        connection: The server.
        dataset, column, version: What they are of.
        rows: (n,) int64: their rows in the dataset.
        extents: (n, 5) int64: sizes in elements, TZCYX.
        dtypes: NumPy name of each one's dtype.
        metadata: What other columns say of them, n rows; ``None`` where that was not asked for.
        level: Of their resolution pyramids.

    Attributes:
        dataset, column, version, rows, dtypes, metadata, level: As given.
        shapes: As ``extents``.
    """

    def __init__(
        self,
        connection: Connection,
        dataset: str,
        column: str,
        version: str,
        rows: np.ndarray,
        extents: np.ndarray,
        dtypes: list[str],
        metadata: pa.Table | None = None,
        level: int = 0,
    ) -> None:
        self._connection = connection
        self.dataset = dataset
        self.column = column
        self.version = version
        self.rows = rows
        self.shapes = extents
        self.dtypes = dtypes
        self.metadata = metadata
        self.level = level

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, image: int) -> str:
        """The key of an image by its number in the set."""
        return format_key(self.dataset, self.column, int(self.rows[image]))

    @overload
    def __getitem__(self, index: int) -> LazyTensorView: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> ImageSet: ...
    def __getitem__(self, index: Any) -> LazyTensorView | ImageSet:
        """One image's lazy view; or the set of those that a slice, a mask or an array of numbers chooses."""
        # An array has the method too, and means it only where it has no axes.
        if hasattr(index, "__index__") and not (isinstance(index, np.ndarray) and index.ndim):
            number = range(len(self))[index]
            return LazyTensorView.of_source(RemoteSource(self._connection, self.key(number), self.level), {})
        chosen = np.arange(len(self))[index]
        return ImageSet(
            self._connection,
            self.dataset,
            self.column,
            self.version,
            self.rows[chosen],
            self.shapes[chosen],
            [self.dtypes[number] for number in chosen.tolist()],
            None if self.metadata is None else self.metadata.take(pa.array(chosen)),
            self.level,
        )

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images of {self.dataset}/{self.column})"

    # -- reading -------------------------------------------------------------------------------------------------------------------

    def iter_tiles(
        self,
        *,
        tile_size: tuple[int, ...] | None = None,
        centred: tuple[int, ...] | None = None,
        edge: Edge | None = None,
        pad: float = 0,
        shuffle: bool = False,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        start: int = 0,
        prefetch: int = 0,
        contiguous: bool = True,
        beside: Sequence[str] = (),
        **selection: Any,
    ) -> Iterator[ImageTileArray]:
        """Iterate over the tiles of all images, in one stream; whole images where neither ``tile_size`` nor ``centred`` is given.

        Args:
            tile_size: ``(h, w)`` or ``(z, h, w)``, as :meth:`TensorView.iter_tiles`.
            centred: ``(h, w)`` or ``(z, h, w)``: one window in the middle of each image.
            edge: ``clip``, ``pad`` or ``drop`` what sticks out of an image; by default ``clip``, of ``centred`` windows ``pad``.
            pad: The padding value.
            shuffle, seed: Shuffle the tiles of all images, by ``random.Random(seed).shuffle`` on their enumeration: by image, then t, z, y, x.
            shard, start, prefetch, contiguous: As :meth:`TensorView.iter_tiles`.
            beside: Other image columns of which every tile brings the same region too.
            selection: TensorView's keyword arguments, for each image: t, z, c, roi, layout, dtype, channel_policy ...

        Raises:
            InvalidArgument, InvalidSelection: naming the argument and its value, and the image that it does not fit.
            DatasetChanged: the dataset is another version by now: select anew.
        """
        read = ImageRead(self, cut_of(tile_size, centred, edge, pad), order_of(shuffle, seed, shard, start), beside, selection)
        return read.tiles(prefetch_of(prefetch), contiguous)

    def iter_batches(
        self,
        *,
        batch_size: int,
        tile_size: tuple[int, ...] | None = None,
        centred: tuple[int, ...] | None = None,
        edge: Literal["drop", "pad"] = "pad",
        pad: float = 0,
        shuffle: bool = False,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        start: int = 0,
        drop_last: bool = False,
        prefetch: int = 0,
        device: str = "cpu",
        contiguous: bool = True,
        beside: Sequence[str] = (),
        **selection: Any,
    ) -> Iterator[ImageBatch]:
        """Iterate over batches of tiles of one shape, of all images in one stream. Each is one ``(N, <layout>)`` tensor.

        Args:
            batch_size: Tiles a batch; the last one may have fewer.
            tile_size, centred: As :meth:`iter_tiles`, and one of the two.
            edge: ``pad`` or ``drop`` what sticks out of an image.
            pad, shuffle, seed, shard, start, beside, selection: As :meth:`iter_tiles`.
            drop_last, prefetch, device, contiguous: As :meth:`TensorView.iter_batches`.

        Raises:
            InvalidArgument, InvalidSelection, DatasetChanged: As :meth:`iter_tiles`.
        """
        check_batch_edge(edge)
        if tile_size is None and centred is None:
            raise InvalidArgument("name a tile_size or a centred window: images may differ in size", field="tile_size")
        tiling = cut_of(tile_size, centred, edge, pad)
        return self._batched(
            tiling, order_of(shuffle, seed, shard, start), batch_size, drop_last, prefetch, device, contiguous, beside, selection
        )

    def iter_windows(
        self,
        images: Any,
        origins: Any,
        size: tuple[int, ...],
        batch_size: int,
        *,
        edge: Literal["error", "pad"] = "error",
        pad: float = 0,
        shuffle: bool = False,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        start: int = 0,
        drop_last: bool = False,
        prefetch: int = 0,
        device: str = "cpu",
        contiguous: bool = True,
        beside: Sequence[str] = (),
        **selection: Any,
    ) -> Iterator[ImageBatch]:
        """Iterate over windows of one size at listed places of listed images, in listed order; batches as in :meth:`iter_batches`.

        Args:
            images: N numbers of images in this set, from 0.
            origins: (N, 2) or (N, 4), as :meth:`TensorView.iter_windows`.
            size, batch_size, edge, pad: As :meth:`TensorView.iter_windows`.
            shuffle, seed, shard, start, drop_last, prefetch, device, contiguous, beside, selection: As :meth:`iter_batches`.

        Raises:
            InvalidSelection: a window does not fit its image, or there is no such image; names its number.
            InvalidArgument, DatasetChanged: As :meth:`iter_batches`.
        """
        tiling = windows_of(origins, size, edge, pad, images)
        return self._batched(
            tiling, order_of(shuffle, seed, shard, start), batch_size, drop_last, prefetch, device, contiguous, beside, selection
        )

    def _batched(
        self,
        tiling: Tiling,
        order: Order,
        batch_size: int,
        drop_last: bool,
        prefetch: int,
        device: str,
        contiguous: bool,
        beside: Sequence[str],
        selection: dict[str, Any],
    ) -> Iterator[ImageBatch]:
        def read(size: int, depth: int) -> Iterator[ImageBatch]:
            return ImageRead(self, tiling, order, beside, selection).batches(size, depth, contiguous)

        return in_batches(read, batch_size, drop_last, prefetch, device)


def cut_of(tile_size: Any, centred: Any, edge: Edge | None, pad: float) -> Tiling:
    """The tiling that arguments mean; whole images where there are neither tiles nor a window. Raises InvalidArgument."""
    if tile_size is not None and centred is not None:
        raise InvalidArgument("name a tile_size or a centred window, not both", field="centred", value=centred)
    if centred is not None:
        return Tiling.centred(centred, edge or "pad", pad)
    if tile_size is not None:
        return tiling_of(tile_size, edge or "clip", pad)
    return Tiling(edge=edge or "clip")
