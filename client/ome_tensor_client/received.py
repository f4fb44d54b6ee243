"""From a stream's batches to tiles and to training batches, each row checked to be the tile that its number says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np

from ome_tensor.errors import BrokenStream
from ome_tensor.tiling import OrderedTiles, Tile
from ome_tensor_proto.reader import TileBatch

from .tile_stream import TileStream

__all__ = ["uniform_batches", "whole_tiles"]

_PLACE = ("image", "t", "z", "y", "x", "valid_z", "valid_h", "valid_w")


def whole_tiles(stream: TileStream, numbered: OrderedTiles) -> Iterator[tuple[Tile, np.ndarray, tuple[np.ndarray, ...]]]:
    """Tiles as they arrive, those in slabs put together, each with what came beside it.

    Raises:
        BrokenStream: a row is not the tile that its number says.
    """
    assembly = _Assembly()
    with closing(stream):
        for batch in stream:
            places = zip(*map(batch.columns.listed, _PLACE), strict=True)
            for row, (number, place) in enumerate(zip(batch.columns.listed("tile"), places, strict=True)):
                _check_number(number, numbered)
                tile = numbered.tile(number, batch.first_position + row)
                s = tile.selection
                due = (tile.image, *tile.origin, len(s.z), s.h, s.w)
                if place != due:
                    raise _misplaced(number, place, due)
                block = assembly.add(batch, number, tile.shape) if stream.header.slabs else batch.pixels[row]
                if block is None:
                    continue
                if block.shape != tile.shape:
                    raise BrokenStream(f"tile {number} arrived as {block.shape}, not {tile.shape}")
                beside = tuple(pixels[row] for pixels in batch.beside)
                for part in beside:
                    _check_beside(part.shape, tile.shape)
                yield tile, block, beside


def uniform_batches(
    stream: TileStream, numbered: OrderedTiles, size: int, expected: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, ...]]]:
    """Batches of ``size`` tiles of one shape (the last one may be smaller), each the array of one message.

    Args:
        stream: A read that asked for as many tiles a batch.
        numbered: The enumeration that its numbers are of.
        size: Tiles a batch.
        expected: Number of tiles that must come.

    Yields:
        The position of the first tile, their numbers, their places (as :meth:`OrderedTiles.table`), their (N, T, Z, C, H, W) pixels, and those of
        each column that came beside.

    Raises:
        BrokenStream: a row is not the tile that its number says, or a batch is of another size.
    """
    assembly = _Assembly()
    shape = numbered.shape
    short = False
    with closing(stream):
        for batch in stream:
            if short:
                raise BrokenStream("a batch of too few tiles arrived before the last one")
            table = _check_places(batch, numbered)
            numbers = batch.columns["tile"]
            pixels = batch.pixels
            if stream.header.slabs:
                # A tile that is a batch, and larger than a message.
                block = assembly.add(batch, int(numbers[0]), shape)
                if block is None:
                    continue
                pixels = [block]
            if isinstance(pixels, list):
                pixels = np.stack(pixels) if len({block.shape for block in pixels}) == 1 else np.empty(0, np.uint8)
            if pixels.shape[1:] != shape:
                raise BrokenStream(f"a batch arrived as {pixels.shape}, not as tiles of {shape}")
            # Before a tile that cannot be read its server sends what is good of the batch; the error comes next.
            short = len(pixels) != min(size, expected)
            if short:
                continue
            expected -= len(pixels)
            beside = tuple(_stacked(part) for part in batch.beside)
            for part in beside:
                _check_beside(part.shape[1:], shape)
            yield batch.first_position, numbers, table, pixels, beside


def _stacked(pixels: np.ndarray | list[np.ndarray]) -> np.ndarray:
    if not isinstance(pixels, list):
        return pixels
    if len({block.shape for block in pixels}) != 1:
        raise BrokenStream("what came beside a batch differs in shape from tile to tile")
    return np.stack(pixels)


def _check_beside(found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """BrokenStream where what came beside a tile is of another shape, but for having a single channel."""
    if (*found[:2], *found[3:]) != (*shape[:2], *shape[3:]) or found[2] not in (1, shape[2]):
        raise BrokenStream(f"what came beside a tile of {shape} is of {found}")


def _check_places(batch: TileBatch, numbered: OrderedTiles) -> np.ndarray:
    """The rows' places, (n, 7) as :meth:`OrderedTiles.table`; BrokenStream where they are not those of the tiles of their numbers."""
    numbers = batch.columns["tile"]
    for number in (numbers.min(), numbers.max()) if len(numbers) else ():
        _check_number(int(number), numbered)
    table = numbered.table(numbers)
    wanted = np.concatenate([numbered.images(numbers)[:, None], table], axis=1)
    got = np.stack([batch.columns[name] for name in _PLACE], axis=1)
    if not np.array_equal(got, wanted):
        row = int(np.argmax((got != wanted).any(axis=1)))
        raise _misplaced(int(numbers[row]), tuple(got[row].tolist()), tuple(wanted[row].tolist()))
    return table


def _check_number(number: int, numbered: OrderedTiles) -> None:
    if not 0 <= number < numbered.total:
        raise BrokenStream(f"tile {number} arrived of a view with {numbered.total}")


def _misplaced(number: int, found: tuple[int, ...], due: tuple[int, ...]) -> BrokenStream:
    return BrokenStream(f"tile {number} arrived with (image, t, z, y, x, depth, height, width) {found}, not {due}")


class _Assembly:
    """A tile that arrives in slabs. The reader has seen to it that they come in order and without gaps."""

    def __init__(self) -> None:
        self._block: np.ndarray | None = None

    def add(self, batch: TileBatch, number: int, shape: tuple[int, ...]) -> np.ndarray | None:
        """Take in the next slab; the tile where that was its last."""
        slab = batch.pixels[0]
        if self._block is None:
            self._block = np.empty(shape, slab.dtype)
        block = self._block
        first = int(batch.columns["offset"][0])
        end = first + slab.size
        if end > block.size or (batch.tile_count == 1) != (end == block.size):
            raise BrokenStream(f"tile {number} of {block.size} elements arrived up to {end}")
        block.reshape(-1)[first:end] = slab.reshape(-1)
        if batch.tile_count == 0:
            return None
        self._block = None
        return block
