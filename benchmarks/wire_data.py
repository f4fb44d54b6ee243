"""The images of :mod:`benchmarks.wire`, as files for every peer. Run in a process of its own: none of this memory is left to anybody else."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .peers.base import Data, Shape

__all__ = ["CHUNK", "FULL", "LINK", "QUICK", "counts", "make"]

#: The shapes of :mod:`benchmarks.data`, which only the process that makes the files imports: upstream comes with it, and every client's process
#: imports this module.
FULL: Shape = (1, 16, 3, 2048, 2048)
QUICK: Shape = (1, 4, 3, 1024, 1024)

#: How OME-Arrow stores it: upstream's chunks, smaller than a plane and larger than a tile.
CHUNK = (1, 512, 512)
#: The image that is sent over slow links: 101 MB.
LINK: Shape = (1, 4, 3, 2048, 2048)


def counts(shape: Shape, seed: int = 7) -> np.ndarray:
    """Photon counts over a smooth background, as a camera gives them: compressible by a third (lz4) to a half (zstd), unlike noise."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[: shape[3], : shape[4]]
    mean = 60 + 50 * np.sin(x / 211) * np.cos(y / 173)
    plane = rng.poisson(mean).astype(np.uint16)
    out = np.empty(shape, np.uint16)
    for number, (z, c) in enumerate(np.ndindex(shape[1], shape[2])):
        # Planes that differ from each other at every place, for the price of one.
        out[0, z, c] = np.roll(plane, (37 * number, 101 * number), (0, 1))
    return out


def make(folder: Path, shape: Shape, *, kind: str = "noise", zarr: bool = False) -> None:
    """Write an image's files."""
    from .data import byte_chunks, make_image, write_parquet

    image = make_image(shape) if kind == "noise" else counts(shape)
    data = Data(folder, shape)
    folder.mkdir(exist_ok=True)
    np.save(data.npy, image)
    write_parquet(byte_chunks(image, CHUNK), data.parquet)
    if zarr:
        from .peers.zarr_http import write

        write(image, data.zarr)
