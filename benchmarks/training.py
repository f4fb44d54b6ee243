"""Training datasets: ``python -m benchmarks.training``. How much of a stream's throughput reaches a training loop, by workers and start method;
whether
reading overlaps with training; what a checkpoint costs.

Each read is an epoch of shuffled tiles of 3 x 256 x 256 uint16 in batches of 16, over TCP, by a null training step; workers live on from an
epoch before.
Ratios are of one round, medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import serving
from benchmarks.report import number, print_table, yes_no
from ome_tensor_client import Client, connect
from ome_tensor_client.image_set import ImageSet
from ome_tensor_client.torch import RandomWindowSampler, TileDataset, TileLoader, WindowDataset

__all__ = ["main"]

FULL, QUICK = (1, 16, 3, 2048, 2048), (1, 4, 3, 1024, 1024)
_BATCH, _SIDE = 16, 256
_TURNS = 6


def write_planes(folder: Path, shape: tuple[int, ...]) -> Path:
    """A table with a row for each z of an image; made in another process's memory would be better, and does not matter here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from benchmarks.data import make_image, stored_planes

    t, z, c, y, x = shape
    path = folder / "data" / "planes.ome.parquet"
    path.parent.mkdir()
    writer = None
    for plane in range(z):
        table = pa.table({"image": stored_planes(make_image((t, 1, c, y, x), plane)), "label": [plane % 3]})
        writer = writer or pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False, write_statistics=False)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return path


def _rate(batches: Iterable[Any], count: Callable[[Any], int]) -> float:
    """Tiles a second, of a whole epoch."""
    began = time.perf_counter()
    tiles = sum(count(batch) for batch in batches)
    return tiles / (time.perf_counter() - began)


def _of(images: ImageSet, **more: Any) -> TileDataset:
    usual: dict[str, Any] = {"tile_size": (_SIDE, _SIDE), "batch_size": _BATCH, "shuffle": True, "seed": 1, "dtype": "uint16"}
    return TileDataset(images, **usual | more)


def throughput(images: ImageSet, rounds: int) -> None:
    """What is left of a stream's throughput on the way to a training loop."""
    from torch.utils.data import DataLoader

    dataset = _of(images)
    loaders: dict[str, Any] = {
        "TileLoader, a thread of this process": TileLoader(dataset),
        "the same, float32 (the usual dtype)": TileLoader(_of(images, dtype=None)),
    }
    for context in ("fork", "forkserver", "spawn"):
        loaders[f"TileLoader, 2 workers, {context}"] = TileLoader(
            dataset, num_workers=2, multiprocessing_context=context, persistent_workers=True
        )
    loaders["torch's DataLoader, 2 workers, fork"] = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", persistent_workers=True
    )
    rates: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        found = {
            "the stream: iter_batches(prefetch=2)": _rate(
                images.iter_batches(tile_size=(_SIDE, _SIDE), batch_size=_BATCH, shuffle=True, seed=1, prefetch=2), len
            )
        }
        for name, loader in loaders.items():
            found[name] = _rate(loader, lambda batch: len(batch["tile"]))
        # The first one warms up what lives on.
        if turn:
            for name, rate in found.items():
                rates.setdefault(name, []).append(rate)
    stream = rates["the stream: iter_batches(prefetch=2)"]
    rows = []
    for name, found_ in rates.items():
        ratio = statistics.median(one / other for one, other in zip(found_, stream, strict=True))
        rate = statistics.median(found_)
        nbytes = rate * 3 * _SIDE * _SIDE * 2 / 1e9
        bar = "" if name.startswith(("the stream", "the same")) else yes_no(ratio >= 0.9)
        rows.append((name, number(rate), number(nbytes), f"{ratio:.2f}x", bar))
    print_table(f"an epoch, {rounds} rounds", ("how", "tiles/s", "GB/s", "of the stream", ">= 0.9x"), rows)


def overlap(images: ImageSet) -> None:
    """A step that takes as long as a batch takes to arrive: the two together must take as long as one."""
    dataset = _of(images)
    rows = []
    for workers in (0, 2):
        more: dict[str, Any] = {"multiprocessing_context": "fork", "persistent_workers": True} if workers else {}
        loader = TileLoader(dataset, num_workers=workers, **more)
        for _ in loader:
            pass
        alone = 1 / (_rate(loader, lambda batch: len(batch["tile"])) / _BATCH)
        began, batches, stepped = time.perf_counter(), 0, 0.0
        for _ in loader:
            batches += 1
            # A GPU's step leaves the processor alone. On a busy machine a sleep takes longer than it was asked to: that is the step, then.
            before = time.perf_counter()
            time.sleep(alone)
            stepped += time.perf_counter() - before
        total = time.perf_counter() - began
        ratio = total / max(alone * batches, stepped)
        rows.append(
            (
                f"{workers} workers" if workers else "a thread",
                number(alone * 1e3),
                number(stepped / batches * 1e3),
                number(total / batches * 1e3),
                f"{ratio:.2f}x",
                yes_no(ratio <= 1.15),
            )
        )
        print(loader.stats())
    print_table(
        "a step as long as a batch takes to arrive",
        ("how", "ms a batch, alone", "ms a step", "ms together", "of the larger", "<= 1.15x"),
        rows,
    )


def checkpoints(images: ImageSet) -> None:
    """A state at every step."""
    loader = TileLoader(_of(images))
    costs = []
    for _ in loader:
        began = time.perf_counter()
        loader.state_dict()
        costs.append((time.perf_counter() - began) * 1e6)
    rows = [
        ("TileLoader.state_dict()", number(statistics.median(costs)), number(max(costs)), yes_no(statistics.median(costs) < 100))
    ]
    print_table("a checkpoint at every step", ("what", "median µs", "largest µs", "< 100 µs"), rows)


def windows(images: ImageSet) -> None:
    """Windows at random places, a call a batch."""
    dataset = WindowDataset(images, (224, 224), dtype="uint16")
    rows = []
    for workers in (0, 2):
        loader = TileLoader(
            dataset,
            batch_size=_BATCH,
            sampler=RandomWindowSampler(dataset, 3200),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        rate = _rate(loader, lambda batch: len(batch["tile"]))
        rows.append((f"{workers} workers" if workers else "this process", number(rate), str(loader.stats().read.messages)))
    print_table("3,200 random windows of 3 x 224 x 224, 200 batches", ("how", "windows/s", "messages"), rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small image, one round: whether it runs")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "This DataLoader will create")
    with tempfile.TemporaryDirectory() as folder:
        path = write_planes(Path(folder), QUICK if options.quick else FULL)
        client: Client
        with serving(path) as server, connect(server.target, transport="tcp") as client:
            images = client.dataset("planes").images("image", metadata=["label"])
            # Each several times: an epoch of seconds, of which its beginning is no large part.
            images = images[np.tile(np.arange(len(images)), 1 if options.quick else _TURNS)]
            throughput(images, 1 if options.quick else options.rounds)
            overlap(images)
            checkpoints(images)
            windows(images)


if __name__ == "__main__":
    main()
