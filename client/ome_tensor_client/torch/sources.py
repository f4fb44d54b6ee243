"""What a training dataset reads from: a set of images on a server, or a view in this process; both as batches and tiles in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ome_tensor.batches import ImageBatch
from ome_tensor.errors import InvalidArgument
from ome_tensor.exports import TensorExports
from ome_tensor.iteration import ImageTileArray
from ome_tensor.keys import parse_key
from ome_tensor.lazy import LazyTensorView
from ome_tensor.plan import Plan
from ome_tensor.selection import as_index
from ome_tensor.tiling import Order, OrderedTiles, TileSequence, Tiling
from ome_tensor_client.image_read import ImageRead
from ome_tensor_client.image_set import ImageSet
from ome_tensor_client.read_stats import ReadStats
from ome_tensor_client.remote import RemoteSource
from ome_tensor_client.running import Running

__all__ = ["TileReader", "TileSource", "image_set_of", "source_of"]


class TileReader(Protocol):
    """The reads of one iteration."""

    def batches(self, order: Order, size: int) -> Iterator[ImageBatch]:
        """Batches of tiles of one shape."""

    def tiles(self, order: Order) -> Iterator[ImageTileArray]:
        """Tiles of whatever shape."""

    def cancel(self) -> None:
        """End the read in progress, and begin no other; from any thread."""


class TileSource(Protocol):
    """Tiles of images that can be read in any order.

    Attributes:
        enumeration: All tiles, in row-major order; ``None`` where there are no images.
        stats: Where what reading costs is summed up.
        digest: Of what the tiles are.
    """

    enumeration: OrderedTiles | None
    stats: ReadStats
    digest: str

    @property
    def ahead_bytes(self) -> int:
        """Bytes that may be read ahead."""

    def reader(self) -> TileReader:
        """For one iteration; several may run at a time."""

    def prefer(self, index: int) -> None:
        """Read from that one of several servers that hold the images, where there are several."""


def image_set_of(images: Any, selection: dict[str, Any]) -> tuple[ImageSet | None, dict[str, Any]]:
    """The set that a view on a server is, and the selection of its images; ``None`` and the selection as it is for a view in this process.

    A read of many processes must be of one version, which a set names and a view does not.
    """
    if isinstance(images, ImageSet):
        return images, selection
    if not isinstance(images, TensorExports):
        raise InvalidArgument(
            f"images must be an ImageSet (client.dataset(...).images(...)) or a tensor view, not {type(images).__name__}",
            field="images",
            value=type(images).__name__,
        )
    if selection:
        name = sorted(selection)[0]
        raise InvalidArgument(f"{name}= is for sets of images: select on the view itself", field=name, value=selection[name])
    if not isinstance(images, LazyTensorView) or not isinstance(images._source, RemoteSource):
        return None, selection
    source = images._source
    described = source.described(Plan.of(images._arguments))
    pixels, shown = described.pixels, described.resolved
    key = parse_key(pixels.key)
    found = ImageSet(
        source.connection,
        key.dataset,
        key.column or "",
        pixels.version,
        np.array([key.row or 0], np.int64),
        np.array([pixels.meta.extent], np.int64),
        [pixels.meta.dtype.name],
        None,
        source.level,
    )
    s = shown.selection
    return found, {
        "t": as_index(s.t),
        "z": as_index(s.z),
        "c": as_index(s.c),
        "roi": s.roi,
        "layout": shown.layout,
        "dtype": described.override,
        "channel_policy": shown.channel_policy,
    }


def source_of(images: Any, tiling: Tiling, beside: Sequence[str], selection: dict[str, Any]) -> TileSource:
    """The source of a training dataset, of what :func:`image_set_of` gave.

    Raises:
        InvalidArgument, InvalidSelection: the tiling does not fit the images.
    """
    if isinstance(images, ImageSet):
        return _SetSource(images, tiling, beside, selection)
    if beside:
        raise InvalidArgument("beside= is for sets of images", field="beside", value=list(beside))
    return _ViewSource(images, tiling)


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()[:32]


class _SetSource:
    """Images on a server. See :class:`TileSource`."""

    def __init__(self, images: ImageSet, tiling: Tiling, beside: Sequence[str], selection: dict[str, Any]) -> None:
        self.images = images
        self._arguments = (tiling, list(beside), selection)
        self._read: ImageRead | None = None
        self.stats = ReadStats()
        rows = hashlib.sha256(np.ascontiguousarray(images.rows).tobytes()).hexdigest()
        chosen = {name: _plain(value) for name, value in sorted(selection.items()) if value is not None}
        self.digest = _digest(images.dataset, images.column, images.version, images.level, rows, tiling, list(beside), chosen)
        self.enumeration = self._opened().enumeration

    def _opened(self) -> ImageRead:
        if self._read is None:
            tiling, beside, selection = self._arguments
            self._read = ImageRead(self.images, tiling, Order(), beside, selection, self.stats)
        return self._read

    @property
    def ahead_bytes(self) -> int:
        """See :class:`TileSource`."""
        return self.images._connection.options.prefetch_bytes

    def reader(self) -> TileReader:
        """See :class:`TileSource`."""
        return _SetReader(self._opened())

    def prefer(self, index: int) -> None:
        """See :meth:`TileSource.prefer`."""
        self.images._connection.prefer(index)

    def __getstate__(self) -> dict[str, Any]:
        # What has been worked out from sizes can be worked out again; of a hundred thousand images it is larger than they are.
        return {**self.__dict__, "_read": None, "enumeration": None, "stats": ReadStats()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.enumeration = self._opened().enumeration


class _SetReader:
    """See :class:`TileReader`. Each read is its own: what ends one is not to end another's."""

    def __init__(self, read: ImageRead) -> None:
        self._read = read
        self._running = Running()

    def batches(self, order: Order, size: int) -> Iterator[ImageBatch]:
        """See :meth:`TileReader.batches`."""
        return self._begun(order).batches(size, 0, True)

    def tiles(self, order: Order) -> Iterator[ImageTileArray]:
        """See :meth:`TileReader.tiles`."""
        return self._begun(order).tiles(0, True)

    def _begun(self, order: Order) -> ImageRead:
        return self._running.begin(self._read.reordered(order))

    def cancel(self) -> None:
        """See :meth:`TileReader.cancel`."""
        self._running.cancel()


class _ViewSource:
    """A view in this process. See :class:`TileSource`."""

    def __init__(self, view: Any, tiling: Tiling) -> None:
        self._view = view
        self._tiling = view._fitting(tiling)
        self.stats = ReadStats()
        resolved = view._resolve()
        self.enumeration: OrderedTiles | None = TileSequence(resolved.shown, tiling)
        self.digest = _digest("view", resolved.shown, resolved.layout, resolved.dtype, tiling)

    #: The memory is there anyway.
    ahead_bytes = 64 << 20

    def __getstate__(self) -> dict[str, Any]:
        raise InvalidArgument(
            "a view in this process does not go to workers that are not forked: multiprocessing_context='fork', or num_workers=0",
            field="images",
        )

    def reader(self) -> TileReader:
        """See :class:`TileSource`."""
        return self

    def batches(self, order: Order, size: int) -> Iterator[ImageBatch]:
        """See :meth:`TileReader.batches`."""
        for batch in self._view._batches(self._tiling, order, size, contiguous=True, prefetch=0):
            self.stats.tiles += len(batch)
            zeros = np.zeros(len(batch), np.int64)
            yield ImageBatch(batch.array, batch.numbers, batch.position, batch.origins, batch.valid, zeros, zeros, {})

    def cancel(self) -> None:
        """See :meth:`TileReader.cancel`: nothing waits."""

    def tiles(self, order: Order) -> Iterator[ImageTileArray]:
        """See :meth:`TileReader.tiles`."""
        for tile, array in self._view._tiles(self._tiling, order, contiguous=True, prefetch=0, arrow=False):
            self.stats.tiles += 1
            shown = tile.selection
            valid = (len(shown.z), shown.h, shown.w)
            yield ImageTileArray(array, tile.number, tile.position, tile.origin, valid, 0, 0, {})

    def prefer(self, index: int) -> None:
        """See :meth:`TileSource.prefer`."""


def _plain(value: Any) -> Any:
    """A selection's value as its digest has it, whatever it was written as."""
    return (
        value.tolist()
        if isinstance(value, np.ndarray)
        else list(value)
        if isinstance(value, (list, tuple, range))
        else str(value)
    )
