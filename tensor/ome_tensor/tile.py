"""One tile of a view: which pixels it is of, and where in the delivered block they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .selection import Indices, Selection

__all__ = ["Edge", "Tile", "centred_tile", "grid_tile"]

Edge: TypeAlias = Literal["clip", "pad", "drop"]


@dataclass(frozen=True, slots=True)
class Tile:
    """One block of a view.

    Attributes:
        position: Where it stands in this read, from 0; what a resume counts.
        number: Its number in the row-major enumeration after the edge policy; the same in every order and shard.
        selection: Its pixels, in image coordinates, clipped to the view.
        shape: (T, Z, C, H, W) as delivered: the selection's, or the full size where padded.
        inset: Where along Z, Y and X of the delivered block the pixels begin: not at 0 only in a window that begins before the view.
        listed: A window's origin as it was listed, or found; ``None`` of other tiles.
        image: Of which of a read's images it is.
    """

    position: int
    number: int
    selection: Selection
    shape: tuple[int, int, int, int, int]
    inset: tuple[int, int, int] = (0, 0, 0)
    listed: tuple[int, int, int, int] | None = None
    image: int = 0

    @property
    def origin(self) -> tuple[int, int, int, int]:
        """``(t, z, y, x)`` of the delivered block's first element, in image coordinates; -1 on an axis with nothing selected."""
        if self.listed is not None:
            return self.listed
        s = self.selection
        return (s.t[0] if s.t else -1), (s.z[0] if s.z else -1), s.y, s.x

    @property
    def is_padded(self) -> bool:
        """Whether the delivered block is larger than its pixels."""
        return self.shape != self.selection.shape


def grid_tile(
    whole: Selection,
    all_t: Indices,
    edge: Edge,
    sizes: Sequence[int],
    counts: Sequence[int],
    place: int,
    number: int,
    position: int,
    image: int = 0,
) -> Tile:
    """A tile of a view that is cut into a grid.

    Args:
        whole: What the view shows.
        all_t: Its time points as they are cut.
        edge: What happens to tiles that stick out.
        sizes, counts: Along t, z, y, x the size of a tile, and the number of tiles.
        place: The tile's number in the view.
        number, position, image: Of the tile that is made.
    """
    rest, ix = divmod(place, counts[3])
    rest, iy = divmod(rest, counts[2])
    it, iz = divmod(rest, counts[1])
    st, sz, sh, sw = sizes
    whole_t, whole_z = len(whole.t), len(whole.z)
    x, y = ix * sw, iy * sh
    w, h = min(sw, whole.w - x), min(sh, whole.h - y)
    # An axis that is not cut is left as it is: the usual case, and slicing costs.
    t: Indices = all_t if st >= whole_t else all_t[it * st : it * st + st]
    z: Indices = whole.z if sz >= whole_z else whole.z[iz * sz : iz * sz + sz]
    selection = Selection(t, z, whole.c, whole.x + x, whole.y + y, w, h)
    shape = (len(t), sz, len(whole.c), sh, sw) if edge == "pad" else selection.shape
    return Tile(position, number, selection, shape, image=image)


def centred_tile(s: Selection, edge: Edge, all_sizes: Sequence[int], number: int, position: int, image: int = 0) -> Tile:
    """The window in the middle of a view.

    Args:
        s: What the view shows.
        edge: What happens where the view is smaller.
        all_sizes: Of the window, along t, z, y, x.
        number, position, image: Of the tile that is made.
    """
    nt, *sizes = all_sizes
    lengths = (len(s.z), s.h, s.w)
    starts = [(length - size) // 2 for length, size in zip(lengths, sizes, strict=True)]
    begins = [max(0, start) for start in starts]
    ends = [min(length, start + size) for length, start, size in zip(lengths, starts, sizes, strict=True)]
    z: Indices = s.z[begins[0] : ends[0]]
    shown = Selection(s.t, z, s.c, s.x + begins[2], s.y + begins[1], ends[2] - begins[2], ends[1] - begins[1])
    if edge != "pad" or shown.shape[1:2] + shown.shape[3:] == tuple(sizes):
        return Tile(position, number, shown, shown.shape, image=image)
    first_z = s.z[0] if s.z else -1
    # Planes before the first have the numbers that they would have in an even sequence.
    step = s.z.step if isinstance(s.z, range) else 1
    origin = (s.t[0] if s.t else -1, first_z + min(0, starts[0]) * step if starts[0] < 0 else (z[0] if z else -1))
    inset = tuple(max(0, -start) for start in starts)
    full = (nt, sizes[0], len(s.c), sizes[1], sizes[2])
    return Tile(position, number, shown, full, inset, (*origin, s.y + starts[1], s.x + starts[2]), image)  # type: ignore[arg-type]
