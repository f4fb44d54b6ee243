"""Image columns whose pixels are read when they are asked for, while all else is in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ome_tensor.columns import ImageColumn, Sizes
from ome_tensor.listing import Level
from ome_tensor.pixels import Pixels
from ome_tensor.record import ImageMeta

__all__ = ["KnownColumn"]


class KnownColumn(ABC):
    """An image column of a source that is served in place. See :class:`ome_tensor.columns.Column`.

    Args:
        records: Its records without their pixels.
        levels: Those of its pyramids' levels, from level 1 on.
    """

    def __init__(self, records: pa.ChunkedArray, levels: Sequence[pa.ChunkedArray] = ()) -> None:
        self._known = ImageColumn(records, None, levels)
        self.row_count = len(records)
        self.image_count = len(records) - records.null_count

    def is_image(self, row: int) -> bool:
        """See :meth:`Column.is_image`."""
        return self._known.is_image(row)

    def is_valid(self) -> np.ndarray:
        """See :meth:`Column.is_valid`."""
        return self._known.is_valid()

    def only_row(self) -> int | None:
        """See :meth:`Column.only_row`."""
        return self._known.only_row()

    def meta(self, row: int) -> ImageMeta:
        """See :meth:`Column.meta`."""
        return self._known.meta(row)

    def sizes(self, rows: np.ndarray) -> Sizes:
        """See :meth:`Column.sizes`."""
        return self._known.sizes(rows)

    def levels(self, row: int) -> tuple[Level, ...]:
        """See :meth:`Column.levels`."""
        return self._known.levels(row)

    @abstractmethod
    def pixels(self, row: int, level: int = 0) -> Pixels:
        """See :meth:`Column.pixels`."""
