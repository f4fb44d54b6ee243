"""The index over one stored record, and the gather from it: only the pixels asked for, from where they lie straight to where they are going.

An index is built once per record and recognises how the blocks lie:

* *dense*: whole planes at evenly spaced addresses are one strided array, and a read is one NumPy slice;
* *grid*: a regular chunk grid finds the blocks of a ROI by division;
* *scattered*: anything else finds them by comparing origins, and proves for each plane that they cover the ROI exactly once.
"""

from __future__ import annotations

import math

import numpy as np

from .blocks import Blocks, ChunkCache, find_blocks
from .errors import InvalidRecord, InvalidSelection
from .record import ImageMeta, Record, read_meta
from .selection import Indices, Selection, as_index

__all__ = ["PixelIndex", "copy_dense", "cut_at_blocks", "require_single_plane"]


class PixelIndex:
    """The index over one record; immutable once built, so any number of threads may read from it.

    Args:
        record: The record; its pixel buffers are referred to, not copied.
        meta: Its metadata, if already read.
        cache: Where decompressed chunks are kept.
        blocks: Its blocks, at least one, where they do not lie in the record.
    """

    def __init__(
        self, record: Record, meta: ImageMeta | None = None, cache: ChunkCache | None = None, blocks: Blocks | None = None
    ) -> None:
        self.meta = meta or read_meta(record)
        self.blocks: Blocks = find_blocks(record, self.meta, cache or ChunkCache()) if blocks is None else blocks
        self._cells: np.ndarray | None = None
        self._block: tuple[int, ...] | None = None
        self._dense: np.ndarray | None = None
        self._by_plane: dict[tuple[int, int], np.ndarray] | None = None
        if self._find_grid():
            self._find_dense()
        else:
            self._group_by_plane()

    @property
    def stored_dtype(self) -> np.dtype | None:
        """Dtype of the stored values where all blocks share one."""
        return self.blocks.payload.dtype

    # -- building ------------------------------------------------------------------------------------------------------------------

    def _find_grid(self) -> bool:
        """Recognise a regular grid: every block is a cell of one block size, no cell is taken twice. Missing cells are allowed."""
        blocks, extent = self.blocks, self.meta.extent
        size = tuple(int(n.max()) for n in (blocks.nz, blocks.ny, blocks.nx))
        counts = tuple(-(-length // n) for length, n in zip((extent.z, extent.y, extent.x), size, strict=True))
        shape = (extent.t, extent.c, *counts)
        total = math.prod(shape)
        # A table much larger than the list of blocks means a mostly empty image, or a header that lies: do not allocate for it.
        if total > 4 * len(blocks) + 1024:
            return False
        for origin, count, n, length in (
            (blocks.z, blocks.nz, size[0], extent.z),
            (blocks.y, blocks.ny, size[1], extent.y),
            (blocks.x, blocks.nx, size[2], extent.x),
        ):
            if (origin % n).any() or (count != np.minimum(n, length - origin)).any():
                return False
        place = np.ravel_multi_index((blocks.t, blocks.c, blocks.z // size[0], blocks.y // size[1], blocks.x // size[2]), shape)
        cells = np.full(total, -1, np.int64)
        cells[place] = np.arange(len(blocks))
        if np.count_nonzero(cells >= 0) != len(blocks):
            return False
        self._cells, self._block = cells.reshape(shape), size
        return True

    def _find_dense(self) -> None:
        """Recognise whole planes that lie evenly spaced in one memory: then the image is one strided TZCYX array."""
        blocks, extent, payload = self.blocks, self.meta.extent, self.blocks.payload
        cells, where, dtype = self._cells, payload.addresses(), payload.dtype
        if cells is None or where is None or dtype is None or cells.shape[3:] != (1, 1) or (cells < 0).any():
            return
        memory, offsets = where
        sizes = np.diff(offsets)
        if (sizes != blocks.nz * blocks.ny * blocks.nx * dtype.itemsize).any():
            return  # A damaged block: leave it to the read that touches it.
        plane = extent.y * extent.x * dtype.itemsize
        z = np.arange(extent.z)
        depth = self._block[0] if self._block else 1
        # start[t, c, z]: byte address of each plane.
        start = offsets[:-1][cells[:, :, z // depth, 0, 0]] + (z % depth) * plane
        first = int(start[0, 0, 0])
        steps = [
            int(start[i]) - first if n > 1 else 0 for i, n in zip(((1, 0, 0), (0, 1, 0), (0, 0, 1)), start.shape, strict=True)
        ]
        even = first + sum(
            np.arange(n).reshape([-1 if k == axis else 1 for k in range(3)]) * step
            for axis, (n, step) in enumerate(zip(start.shape, steps, strict=True))
        )
        if not np.array_equal(start, even):
            return
        if any(step % dtype.itemsize for step in steps):
            return
        step_t, step_c, step_z = steps
        lowest = int(start.min())
        flat = np.frombuffer(memory, dtype, count=(int(start.max()) - lowest + plane) // dtype.itemsize, offset=lowest)
        # as_strided cannot check bounds, but every address in `start` is of a block whose size was checked above.
        self._dense = np.lib.stride_tricks.as_strided(
            flat[(first - lowest) // dtype.itemsize :],
            shape=tuple(extent),
            strides=(step_t, step_z, step_c, extent.x * dtype.itemsize, dtype.itemsize),
            writeable=False,
        )

    def _group_by_plane(self) -> None:
        """Blocks of each (t, c), sorted: the fallback for grids that are not regular."""
        blocks = self.blocks
        order = np.lexsort((blocks.z, blocks.c, blocks.t))
        keys = np.stack((blocks.t[order], blocks.c[order]))
        cuts = np.flatnonzero((np.diff(keys, axis=1) != 0).any(axis=0)) + 1
        groups = np.split(order, cuts)
        self._by_plane = {(int(blocks.t[g[0]]), int(blocks.c[g[0]])): g for g in groups}

    def check(self) -> None:
        """Look at every block: that each has as many values as its size, all of which fit the pixel type, and that together they are all of the
        image's pixels, none twice. Decompresses each once.

        Raises:
            InvalidRecord: that is not so.
        """
        blocks = self.blocks
        for block in range(len(blocks)):
            blocks.array(block)
            if not blocks.all_fit:
                blocks.check_fit([block])
        if self._cells is not None:
            holes = np.argwhere(self._cells < 0)
            if len(holes):
                assert self._block is not None
                t, c, z, y, x = (int(place) for place in holes[0])
                self._missing(t, z * self._block[0], c, y * self._block[1], x * self._block[2])
            return
        assert self._by_plane is not None
        for group in self._by_plane.values():
            self._check_overlaps(group)
        # Blocks lie inside the image, and none over another: then they are all of it where they have as many elements.
        stored = sum(map(math.prod, zip(blocks.nz.tolist(), blocks.ny.tolist(), blocks.nx.tolist(), strict=True)))
        if stored != math.prod(self.meta.extent):
            raise InvalidRecord(
                f"{blocks.what} are missing: those stored have {stored} of the image's {math.prod(self.meta.extent)} pixels",
                field=blocks.what,
            )

    def _check_overlaps(self, group: np.ndarray) -> None:
        """InvalidRecord where two blocks of a group, which have one t and c, have pixels in common."""
        blocks = self.blocks
        begins = np.stack([blocks.z[group], blocks.y[group], blocks.x[group]])
        ends = begins + np.stack([blocks.nz[group], blocks.ny[group], blocks.nx[group]])
        for place in range(len(group) - 1):
            meet = (begins[:, place + 1 :] < ends[:, place, None]) & (ends[:, place + 1 :] > begins[:, place, None])
            if meet.all(axis=0).any():
                raise InvalidRecord(
                    f"{blocks.what} overlap: {blocks.name(int(group[place]))} covers pixels that another one has stored too",
                    field=blocks.what,
                )

    # -- reading -------------------------------------------------------------------------------------------------------------------

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """See :meth:`ome_tensor.pixels.Pixels.gather`."""
        if out.size == 0:
            return
        # Whoever names another dtype than the image's has asked for numpy.astype, from what is stored.
        fitting = not self.blocks.all_fit and out.dtype == self.meta.dtype
        if self._dense is not None:
            if fitting:
                self.blocks.check_fit(self._planes_of(selection))
            copy_dense(self._dense, selection, out)
        elif self._cells is not None:
            self._gather_grid(selection, out, fitting)
        else:
            self._gather_scattered(selection, out, fitting)

    def _planes_of(self, s: Selection) -> set[int]:
        """The blocks of a dense image that a selection touches."""
        assert self._cells is not None
        assert self._block is not None
        block_at, nz = self._cells.item, self._block[0]
        return {block_at(t, c, z // nz, 0, 0) for t in s.t for c in s.c for z in s.z}

    def _gather_grid(self, s: Selection, out: np.ndarray, fitting: bool) -> None:
        assert self._cells is not None
        assert self._block is not None
        cells, window = self._cells, self.blocks.window
        nz, ny, nx = self._block
        z_runs = _runs(s.z, nz)
        y_runs = cut_at_blocks(s.y, s.h, ny)
        x_runs = cut_at_blocks(s.x, s.w, nx)
        for it, t in enumerate(s.t):
            for ic, c in enumerate(s.c):
                plane_cells = cells[t, c]
                for gz, z_to, z_from in z_runs:
                    for gy, y_to, y_from in y_runs:
                        for gx, x_to, x_from in x_runs:
                            block = plane_cells.item(gz, gy, gx)
                            if block < 0:
                                self._missing(t, gz * nz + z_from.start, c, gy * ny, gx * nx)
                            out[it, z_to, ic, y_to, x_to] = window(block, z_from, y_from, x_from, fitting=fitting)

    def _gather_scattered(self, s: Selection, out: np.ndarray, fitting: bool) -> None:
        assert self._by_plane is not None
        blocks = self.blocks
        nothing = np.empty(0, np.int64)
        for it, t in enumerate(s.t):
            for ic, c in enumerate(s.c):
                group = self._by_plane.get((t, c), nothing)
                y, x, ny, nx = blocks.y[group], blocks.x[group], blocks.ny[group], blocks.nx[group]
                z, nz = blocks.z[group], blocks.nz[group]
                near = (y < s.y + s.h) & (y + ny > s.y) & (x < s.x + s.w) & (x + nx > s.x)
                for iz, want in enumerate(s.z):
                    covered = np.zeros((s.h, s.w), bool)
                    for block in group[near & (z <= want) & (want < z + nz)]:
                        by, bx = int(blocks.y[block]), int(blocks.x[block])
                        y0, y1 = max(by, s.y), min(by + int(blocks.ny[block]), s.y + s.h)
                        x0, x1 = max(bx, s.x), min(bx + int(blocks.nx[block]), s.x + s.w)
                        target = np.s_[y0 - s.y : y1 - s.y, x0 - s.x : x1 - s.x]
                        if covered[target].any():
                            raise InvalidRecord(
                                f"{blocks.what} overlap at (t={t}, z={want}, c={c}): {blocks.name(block)} covers pixels that "
                                "another one has stored too",
                                field=blocks.what,
                            )
                        covered[target] = True
                        depth = want - int(blocks.z[block])
                        out[(it, iz, ic, *target)] = blocks.window(
                            int(block),
                            slice(depth, depth + 1),
                            slice(y0 - by, y1 - by),
                            slice(x0 - bx, x1 - bx),
                            fitting=fitting,
                        )[0]
                    if not covered.all():
                        hole_y, hole_x = (int(i[0]) for i in np.nonzero(~covered))
                        self._missing(t, want, c, s.y + hole_y, s.x + hole_x)

    def _missing(self, t: int, z: int, c: int, y: int, x: int) -> None:
        place = f"(t={t}, z={z}, c={c})"
        if self.blocks.what == "planes":
            raise InvalidRecord(f"Plane {place} not found for the requested (t, z, c).", field="planes")
        raise InvalidRecord(f"chunk missing at {place}: no stored chunk has the pixels from y={y}, x={x} on", field="chunks")

    def flat_values(self, selection: Selection) -> np.ndarray:
        """See :meth:`ome_tensor.pixels.Pixels.flat_values`."""
        s, blocks = selection, self.blocks
        require_single_plane(s)
        if blocks.what == "planes":
            if s.roi != (0, 0, self.meta.extent.x, self.meta.extent.y):
                raise InvalidSelection(
                    "mode='arrow' requires a full-frame ROI; use mode='numpy' for crops.", field="roi", value=s.roi
                )
            found = np.flatnonzero((blocks.t == s.t[0]) & (blocks.z == s.z[0]) & (blocks.c == s.c[0]))
            if len(found) != 1:
                raise InvalidRecord(
                    f"Plane (t={s.t[0]}, z={s.z[0]}, c={s.c[0]}) not found for the requested (t, z, c).", field="planes"
                )
            return blocks.stored(int(found[0]))
        if blocks.payload.bytes_backed:
            raise InvalidSelection("mode='arrow' does not support byte-backed inline chunks; use mode='numpy'.", field="mode")
        block = self._chunk_at(s)
        if blocks.nz[block] != 1:
            raise InvalidSelection("mode='arrow' requires shape_z == 1 for chunked selections.", field="roi", value=s.roi)
        if (blocks.nx[block], blocks.ny[block]) != (s.w, s.h):
            raise InvalidSelection(
                f"mode='arrow' requires ROI to match chunk size. The chunk at ({s.x}, {s.y}) is "
                f"{blocks.nx[block]} x {blocks.ny[block]}, the ROI {s.w} x {s.h}.",
                field="roi",
                value=s.roi,
            )
        return blocks.stored(block)

    def _chunk_at(self, s: Selection) -> int:
        """The chunk whose origin is the selection's."""
        t, z, c = s.t[0], s.z[0], s.c[0]
        found: int | None = None
        if self._cells is not None and self._block is not None:
            nz, ny, nx = self._block
            if z % nz == 0 and s.y % ny == 0 and s.x % nx == 0:
                found = int(self._cells[t, c, z // nz, s.y // ny, s.x // nx])
        else:
            b = self.blocks
            matches = np.flatnonzero((b.t == t) & (b.z == z) & (b.c == c) & (b.y == s.y) & (b.x == s.x))
            found = int(matches[0]) if len(matches) == 1 else None
        if found is None or found < 0:
            raise InvalidSelection(
                f"Chunk not found for the requested (t, z, c, roi). No chunk starts at t={t}, z={z}, c={c}, y={s.y}, x={s.x}.",
                field="roi",
                value=s.roi,
            )
        return found


def require_single_plane(selection: Selection) -> None:
    """InvalidSelection unless exactly one t, z and c are selected: what ``mode="arrow"`` needs."""
    if len(selection.t) != 1 or len(selection.z) != 1 or len(selection.c) != 1:
        raise InvalidSelection("mode='arrow' requires a single (t, z, c) selection.", field="mode", value="arrow")


def copy_dense(source: np.ndarray, s: Selection, out: np.ndarray) -> None:
    """Copy a selection out of a TZCYX array. Lists are walked (fancy indexing would build the result a second time)."""
    frame = source[..., s.y : s.y + s.h, s.x : s.x + s.w]
    _copy_axes(frame, (s.t, s.z, s.c), out)


def _copy_axes(frame: np.ndarray, axes: tuple[Indices, Indices, Indices], out: np.ndarray) -> None:
    for axis, indices in enumerate(axes):
        if isinstance(indices, tuple):
            before = (slice(None),) * axis
            one = range(1)
            for place, index in enumerate(indices):
                rest = (*axes[:axis], one, *axes[axis + 1 :])
                _copy_axes(frame[(*before, slice(index, index + 1))], rest, out[(*before, slice(place, place + 1))])  # type: ignore[arg-type]
            return
    out[...] = frame[tuple(as_index(indices) for indices in axes)]


def cut_at_blocks(origin: int, length: int, block: int) -> list[tuple[int, slice, slice]]:
    """[origin, origin + length) cut at multiples of ``block``: of each part its block's number, where it is in the output and in the block."""
    parts = []
    at, end = origin, origin + length
    while at < end:
        number, inside = divmod(at, block)
        stop = min(end, at - inside + block)
        parts.append((number, slice(at - origin, stop - origin), slice(inside, inside + stop - at)))
        at = stop
    return parts


def _runs(indices: Indices, block: int) -> list[tuple[int, slice, slice]]:
    """The same for a list of indices: neighbours in one block become one run."""
    if isinstance(indices, range) and indices.step == 1:
        return cut_at_blocks(indices.start, len(indices), block)
    return [(i // block, slice(n, n + 1), slice(i % block, i % block + 1)) for n, i in enumerate(indices)]
