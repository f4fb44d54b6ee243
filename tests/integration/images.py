"""Real OME-Arrow files for the tests of this folder: made with pyarrow alone, so that they run on the oldest supported versions too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def random_pixels(shape: tuple[int, ...], dtype: Any = np.uint16, seed: int = 0) -> np.ndarray:
    """A TZCYX array of random values: a pixel in the wrong place does not go unnoticed."""
    random = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        return np.frombuffer(random.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    values = random.standard_normal(shape)
    return (values + 1j * random.standard_normal(shape) if dtype.kind == "c" else values).astype(dtype)


def record_of(pixels: np.ndarray, name: str = "image") -> dict[str, Any]:
    """The smallest record that says all there is to say: one chunk of bytes for each plane."""
    t, z, c, y, x = pixels.shape
    places = np.ndindex(t, z, c)
    return {
        "id": name,
        "name": name,
        "pixels_meta": {"type": pixels.dtype.name, "size_t": t, "size_z": z, "size_c": c, "size_y": y, "size_x": x},
        "chunk_grid": {"chunk_z": 1, "chunk_y": y, "chunk_x": x, "chunk_order": "ZYX"},
        "chunks": [
            {
                "t": it,
                "z": iz,
                "c": ic,
                "y": 0,
                "x": 0,
                "shape_z": 1,
                "shape_y": y,
                "shape_x": x,
                "dtype": pixels.dtype.name,
                "pixel_bytes": pixels[it, iz, ic].tobytes(),
            }
            for it, iz, ic in places
        ],
    }


def write_images(path: Path, images: Sequence[np.ndarray | None], column: str = "image") -> Path:
    """A file of one image a row; ``None`` is a row without one."""
    rows = [None if pixels is None else record_of(pixels, f"row {row}") for row, pixels in enumerate(images)]
    pq.write_table(pa.table({column: pa.array(rows), "well": [f"A{row}" for row in range(len(rows))]}), path, compression="none")
    return path


def write_image(path: Path, pixels: np.ndarray) -> Path:
    """A file of one image."""
    return write_images(path, [pixels])


def drain(tiles: Iterable[Any], into: list[Any]) -> None:
    """Read to the end; what came before an error stays in the list."""
    for tile in tiles:
        into.append(tile)  # noqa: PERF402  extend() would lose what came before the error


def expected_tile(pixels: np.ndarray, tile: Any) -> np.ndarray:
    """What a delivered tile of the whole image must show, by its own account of where it lies: ``(T, Z, C, H, W)``, clipped."""
    t, z, y, x = tile.origin
    depth, height, width = tile.valid
    nt = tile.array.shape[0]
    return pixels[t : t + nt, z : z + depth, :, y : y + height, x : x + width]
