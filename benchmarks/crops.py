"""Ten thousand crops of single cells, of random sizes, from one table: ``python -m benchmarks.crops``.

In one stream, shuffled over all images, as windows of one size and as they are; against one call for each crop (on a warm connection), and against
upstream reading the same Parquet file in this process. Medians of rounds, each of which measures all of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.processes import serving
from benchmarks.report import number, print_table, yes_no
from ome_tensor_client import connect

__all__ = ["main"]

_CHANNELS = 3


def write_crops(path: Path, count: int, seed: int = 0) -> list[np.ndarray]:
    """A Parquet file of crops of 24 to 80 pixels a side, three channels of uint16."""
    from ome_arrow.meta import OME_ARROW_STRUCT

    random = np.random.default_rng(seed)
    crops = [
        random.integers(0, 65535, (_CHANNELS, int(random.integers(24, 81)), int(random.integers(24, 81))), np.uint16)
        for _ in range(count)
    ]
    writer = None
    for first in range(0, count, 500):
        records = [_record(crop, first + place) for place, crop in enumerate(crops[first : first + 500])]
        table = pa.table({"cell": pa.array(records, OME_ARROW_STRUCT), "number": range(first, first + len(records))})
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return crops


def _record(crop: np.ndarray, number: int) -> dict[str, object]:
    c, y, x = crop.shape
    return {
        "type": "ome.arrow",
        "version": "0.1.0",
        "id": f"cell {number}",
        "name": f"cell {number}",
        "pixels_meta": {
            "dimension_order": "XYCZT",
            "type": "uint16",
            "size_t": 1,
            "size_z": 1,
            "size_c": c,
            "size_y": y,
            "size_x": x,
            "channels": [],
        },
        "planes": [{"t": 0, "z": 0, "c": channel, "pixels": crop[channel].reshape(-1)} for channel in range(c)],
    }


def _rate(count: int, read: Callable[[], None]) -> float:
    began = time.perf_counter()
    read()
    return count / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crops", type=int, default=10_000)
    parser.add_argument("--single", type=int, default=1000, help="crops read one call each")
    parser.add_argument("--upstream", type=int, default=300, help="crops read by upstream")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data" / "cells.ome.parquet"
        path.parent.mkdir()
        crops = write_crops(path, options.crops)
        rates: dict[str, list[float]] = {}
        # Over the wire: one of this host would map the file.
        with serving(path) as server, connect(server.target, transport="tcp") as client:
            cells = client.dataset("cells").images("cell")
            some = np.random.default_rng(1).permutation(options.crops)

            def batches() -> None:
                seen = 0
                for batch in cells.iter_batches(centred=(64, 64), batch_size=256, shuffle=True, seed=7, layout="CHW"):
                    seen += len(batch)
                assert seen == options.crops

            def as_they_are() -> None:
                seen = np.zeros(options.crops, bool)
                for tile in cells.iter_tiles(shuffle=True, seed=7, layout="CHW"):
                    assert tile.array.shape == crops[tile.row].shape
                    seen[tile.row] = True
                assert seen.all()

            def single() -> None:
                for row in some[: options.single].tolist():
                    assert client.tensor_view(f"cells/{row}").to_numpy().shape == crops[row].shape

            for tile in cells[:50].iter_tiles(layout="CHW"):
                np.testing.assert_array_equal(tile.array, crops[tile.row])
            for _ in range(options.rounds):
                rates.setdefault("one stream, windows of 64 x 64 in batches of 256", []).append(_rate(options.crops, batches))
                rates.setdefault("one stream, each crop as it is", []).append(_rate(options.crops, as_they_are))
                rates.setdefault("one call a crop", []).append(_rate(options.single, single))
        rates["upstream, in process, the same file"] = [_rate(options.upstream, lambda: _upstream(path, options.upstream, crops))]
    calls = statistics.median(rates["one call a crop"])
    rows = []
    for name, found in rates.items():
        rate = statistics.median(found)
        bar = yes_no(rate >= 10 * calls) if name.startswith("one stream") else ""
        rows.append((name, number(rate), f"{rate / calls:.3g}x", bar))
    print_table(f"{options.crops:,} crops, {options.rounds} rounds", ("how", "crops/s", "of one call a crop", ">= 10x"), rows)


def _upstream(path: Path, count: int, crops: list[np.ndarray]) -> None:
    """As its users read a table: a row's record, and a view of it."""
    from ome_arrow.tensor import TensorView

    table = pq.read_table(path, columns=["cell"])
    for row in range(count):
        found = TensorView(table.column("cell")[row]).to_numpy()
        assert found.shape == crops[row].shape


if __name__ == "__main__":
    main()
