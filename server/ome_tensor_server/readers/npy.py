"""NumPy's ``.npy`` files. Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html"""

from __future__ import annotations

from tokenize import TokenError
from typing import ClassVar

import numpy as np

from ome_tensor.errors import InvalidRecord
from ome_tensor.record import ImageMeta
from ome_tensor.tables import first_line

from .arrays import ArrayImage, ArrayRow, PlacedArray, arrays_nbytes, arrays_schema
from .direct import ArraySource
from .files import FileSource

__all__ = ["NpySource"]

#: Axes by their number. Three are CYX, as torch has them.
_AXES = {2: "YX", 3: "CYX", 4: "ZCYX", 5: "TZCYX"}

#: Rows that count as a block where the file is served in place, about so many bytes of them.
_BLOCK = 1 << 20


class NpySource(ArraySource, FileSource):
    """An array of 2 to 5 axes: YX, CYX, ZCYX or TZCYX. See :class:`OpenedSource`.

    Args:
        location: Its path.

    Raises:
        InvalidRecord: it is damaged, of objects, or no image.
        OSError: it cannot be opened.
    """

    format: ClassVar[str] = "npy"

    def __init__(self, location: str) -> None:
        super().__init__(location)
        try:
            # Mapped: reads its header only, and looks whether the file is as long as that says. What needs pickle is refused.
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, SyntaxError, TypeError, OverflowError, RecursionError, TokenError) as error:
            raise self.unreadable(".npy file", first_line(error)) from None
        if array.ndim not in _AXES:
            raise self.unreadable(".npy file of an image", f"it has {array.ndim} axes, not 2 to 5")
        axes = _AXES[array.ndim]
        rows = max(1, _BLOCK // max(1, array.shape[-1] * array.dtype.itemsize))
        try:
            placed = PlacedArray(array, axes, [1] * (array.ndim - 2) + [min(rows, array.shape[-2] or 1), array.shape[-1]])
        except InvalidRecord as error:
            raise self.unreadable(".npy file of an image", error.message) from None
        meta = ImageMeta(placed.extent, placed.dtype, id=self.path.stem, name=self.path.stem, image_type="image")
        self._rows = [ArrayRow({"image": ArrayImage(meta, placed)})]
        self.images, self.others, self.rows = ["image"], (), 1
        self.schema = arrays_schema({"image": 0}, {})
        self.nbytes = arrays_nbytes(self._rows)
