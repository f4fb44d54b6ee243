"""A table to train on, made of the example image: a row a plane, with the plane's two channels, a mask of its nuclei, and its z."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ome_tensor import TensorView

__all__ = ["DATA", "write_nuclei_table"]

DATA = Path(__file__).parent / "data" / "idr0062a-6001240.chunks.ome.parquet"

#: The channel of the DNA stain; the other one shows the nuclei's envelopes.
_DNA = 1


def write_nuclei_table(path: Path) -> Path:
    """Write the table. Its masks are the smoothed DNA channel above Otsu's threshold."""
    image = TensorView(pq.read_table(DATA).column("ome_arrow")[0], layout="ZCYX", t=0).to_numpy()
    dna = _smoothed(image[:, _DNA].astype(np.float32))
    masks = (dna > _otsu(dna)).astype(np.uint8)
    table = {
        "cells": pa.array([_record(plane, "image") for plane in image]),
        "nuclei": pa.array([_record(mask[None], "label") for mask in masks]),
        "z": pa.array(range(len(image))),
    }
    pq.write_table(pa.table(table), path)
    return path


def _record(pixels: np.ndarray, image_type: str) -> dict[str, Any]:
    """An OME-Arrow record of a CYX array: one chunk of bytes a channel."""
    c, y, x = pixels.shape
    name = pixels.dtype.name
    size = {"size_t": 1, "size_z": 1, "size_c": c, "size_y": y, "size_x": x}
    place = {"t": 0, "z": 0, "y": 0, "x": 0, "shape_z": 1, "shape_y": y, "shape_x": x, "dtype": name}
    return {
        "image_type": image_type,
        "pixels_meta": {"type": name, **size},
        "chunk_grid": {"chunk_z": 1, "chunk_y": y, "chunk_x": x},
        "chunks": [{**place, "c": channel, "pixel_bytes": pixels[channel].tobytes()} for channel in range(c)],
    }


def _smoothed(planes: np.ndarray, size: int = 5) -> np.ndarray:
    """The mean of size x size pixels around each."""
    for axis in (1, 2):
        wide = np.pad(planes, [(0, 0) if one != axis else (size // 2, size // 2) for one in range(3)], mode="edge")
        planes = np.lib.stride_tricks.sliding_window_view(wide, size, axis=axis).mean(-1)
    return planes


def _otsu(values: np.ndarray) -> float:
    """The threshold with the largest variance between its two sides (Otsu 1979, doi:10.1109/TSMC.1979.4310076)."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[np.nanargmax(between)])
