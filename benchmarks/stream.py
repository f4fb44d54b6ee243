"""Streams over TCP, between a real server process and this one: memory, latency, throughput and processor time.

Timed reads are not compared while the clock runs: the comparison is a pass of its own over the same requests, and covers every tile. The client
holds no image until then, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ome_tensor_client import Client, connect

from .processes import MemoryWatch, ServerProcess, cpu_seconds, rss_bytes, serving
from .report import environment, number, print_table, write_json, yes_no

__all__ = ["Row", "main", "run"]

#: Elements along T, Z, C, Y, X; the shapes of :mod:`benchmarks.data`, which only the process that makes the file imports.
FULL, QUICK = (1, 16, 3, 2048, 2048), (1, 4, 3, 1024, 1024)
CHUNK = (1, 512, 512)
#: Both sides of the small tiles, of one channel and one z: 8 KiB of pixels, so that the cost of a tile is what is measured.
SMALL = 64
LARGE = 256
_KEY = "image"
_MB = 1e6
#: Bytes a plain socket is given at once, about a message of ours.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: What was measured.
        value: The figure, in ``unit``.
        below: The bar: it must be less; ``None`` without one.
    """

    what: str
    value: float
    unit: str
    below: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is met."""
        return None if self.below is None else self.value < self.below


def make_file(path: str, shape: tuple[int, ...]) -> None:
    """Write the image's file: run in a process of its own, whose memory is gone when the client's is measured."""
    from .data import byte_chunks, make_image, write_parquet

    write_parquet(byte_chunks(make_image(shape), CHUNK), Path(path))  # type: ignore[arg-type]


def small_tiles(client: Client, shape: Sequence[int], count: int, *, seed: int | None = None) -> tuple[Any, list[int]]:
    """A view with at least ``count`` small tiles, as an iterator, and the z of each of its planes: an image has fewer, so its depths come again.

    With a seed they are shuffled.
    """
    a_plane = (shape[3] // SMALL) * (shape[4] // SMALL)
    z = [turn % shape[1] for turn in range(-(-count // a_plane))]
    view = client.tensor_view(_KEY, t=0, z=z, c=0, layout="YX")
    return view.iter_tiles_3d(tile_size=(1, SMALL, SMALL), shuffle=seed is not None, seed=seed), z


def large_tiles(client: Client, prefetch: int = 0) -> Iterator[Any]:
    """All 256² tiles of the image with their three channels."""
    return client.tensor_view(_KEY, t=0, layout="CYX").iter_tiles_3d(tile_size=(1, LARGE, LARGE), prefetch=prefetch)


# -- measurements ------------------------------------------------------------------------------------------------------------------


def first_tile(client: Client, shape: Sequence[int], count: int, seeds: Sequence[int | None]) -> float:
    """Median milliseconds from asking for a view to its first tile in hand, its description by the server included; one read for each seed."""
    times = []
    for seed in seeds:
        start = time.perf_counter()
        tiles, _ = small_tiles(client, shape, count, seed=seed)
        next(tiles)
        times.append(time.perf_counter() - start)
        # Dropped here: the server stops, and the next turn does not compete with this one's stream.
        tiles.close()
        time.sleep(0.02)
    return median(times) * 1e3


def small_stream(server: ServerProcess, client: Client, shape: Sequence[int], count: int) -> list[Row]:
    """A long stream of small tiles: memory of both sides, and tiles a second."""
    gc.collect()
    me = os.getpid()
    with MemoryWatch(server.pid, me) as watch:
        start = time.perf_counter()
        tiles, _ = small_tiles(client, shape, count)
        received = sum(1 for _ in tiles)
        took = time.perf_counter() - start
    if received < count:
        raise AssertionError(f"{received} tiles arrived of {count}")
    nbytes = int(np.prod(shape)) * 2
    what = f"{received:,} tiles of {SMALL}², one channel"
    return [
        Row(f"{what}: server memory before", watch.before[server.pid] / _MB, "MB"),
        Row(f"{what}: server peak above that", watch.growth(server.pid) / _MB, "MB"),
        Row(
            f"{what}: server peak above the dataset's {nbytes / _MB:.0f} MB, interpreter and libraries included",
            (watch.peak[server.pid] - nbytes) / _MB,
            "MB",
        ),
        Row(f"{what}: client peak above its start", watch.growth(me) / _MB, "MB"),
        Row(f"{what}: rate", received / took, "tiles/s"),
    ]


def throughput(server: ServerProcess, client: Client, nbytes: int, prefetch: int, rounds: int) -> list[Row]:
    """The whole image in tiles: pixels a second, and processor seconds a gigabyte on each side."""
    rates, here, there = [], [], []
    for _ in range(rounds):
        cpu, cpu_there, start = time.process_time(), cpu_seconds(server.pid), time.perf_counter()
        received = 0
        for tile in large_tiles(client, prefetch):
            received += np.from_dlpack(tile).nbytes
        took = time.perf_counter() - start
        if received != nbytes:
            raise AssertionError(f"{received} bytes of pixels arrived of {nbytes}")
        rates.append(nbytes / took / 1e9)
        here.append((time.process_time() - cpu) / nbytes * 1e9)
        there.append((cpu_seconds(server.pid) - cpu_there) / nbytes * 1e9)
    what = f"all {LARGE}² CYX tiles ({nbytes / _MB:.0f} MB), prefetch={prefetch}"
    return [
        Row(f"{what}: pixels", median(rates), "GB/s"),
        Row(f"{what}: server processor time", median(there), "s/GB"),
        Row(f"{what}: client processor time", median(here), "s/GB"),
    ]


def single_reads(client: Client, image: np.ndarray, count: int) -> list[Row]:
    """Random 256² windows of one plane, one after the other; each compared."""
    rng = np.random.default_rng(11)
    _, nz, nc, ny, nx = image.shape
    times = []
    for _ in range(count):
        z, c, y, x = (int(rng.integers(n)) for n in (nz, nc, ny - LARGE + 1, nx - LARGE + 1))
        start = time.perf_counter()
        got = client.tensor_view(_KEY, t=0, z=z, c=c, roi=(x, y, LARGE, LARGE), layout="YX").to_numpy()
        times.append(time.perf_counter() - start)
        _equal(got, image[0, z, c, y : y + LARGE, x : x + LARGE])
    what = f"one {LARGE}² window of one plane, view made anew"
    return [Row(f"{what}: p{p}", float(np.percentile(times, p)) * 1e3, "ms") for p in (50, 95, 99)]


def dropped_streams(server: ServerProcess, client: Client, shape: Sequence[int], count: int, drops: int) -> list[Row]:
    """Streams dropped after their first tile: what the server keeps of them."""
    tiles, _ = small_tiles(client, shape, count)
    next(tiles)
    tiles.close()
    time.sleep(0.5)
    before, threads = rss_bytes(server.pid), _threads(server.pid)
    for _ in range(drops):
        tiles, _ = small_tiles(client, shape, count)
        next(tiles)
        tiles.close()
    time.sleep(0.5)
    what = f"{drops} streams dropped after one tile"
    return [
        Row(f"{what}: server memory kept", (rss_bytes(server.pid) - before) / _MB, "MB"),
        # Pool threads stay for the next call; more of them than calls ever ran at once would be a leak.
        Row(f"{what}: server threads more", _threads(server.pid) - threads, ""),
    ]


def _threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def compare(client: Client, image: np.ndarray, count: int) -> None:
    """Every tile of the streams above, compared with NumPy."""
    tiles, depths = small_tiles(client, image.shape, count)
    for z in depths:
        for y in range(0, image.shape[3], SMALL):
            for x in range(0, image.shape[4], SMALL):
                _equal(np.from_dlpack(next(tiles)), image[0, z, 0, y : y + SMALL, x : x + SMALL])
    _ended(tiles)
    tiles = iter(large_tiles(client))
    for z in range(image.shape[1]):
        for y in range(0, image.shape[3], LARGE):
            for x in range(0, image.shape[4], LARGE):
                _equal(np.from_dlpack(next(tiles)), image[0, z, :, y : y + LARGE, x : x + LARGE])
    _ended(tiles)


def _equal(got: np.ndarray, want: np.ndarray) -> None:
    if got.dtype != want.dtype or not np.array_equal(got, want):
        raise AssertionError(f"a tile of shape {got.shape} is not what NumPy gives")


def _ended(tiles: Iterator[Any]) -> None:
    if next(tiles, None) is not None:
        raise AssertionError("more tiles than there should be")


# -- a floor -----------------------------------------------------------------------------------------------------------------------


def _send(connection: Connection, nbytes: int, times: int) -> None:
    """The sending process of :func:`raw_socket`."""
    block = bytes(_BLOCK)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection.send(listener.getsockname())
        stream, _ = listener.accept()
        with stream:
            for _ in range(times):
                # A byte asks for the next round.
                stream.recv(1)
                for first in range(0, nbytes, _BLOCK):
                    stream.sendall(block[: nbytes - first])


def raw_socket(nbytes: int, rounds: int) -> list[Row]:
    """The same number of bytes through a plain socket between two processes: no gather, no framing, no HTTP/2, always the same memory."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_send, args=(there, nbytes, rounds))
    process.start()
    rates = []
    block = memoryview(bytearray(_BLOCK))
    with socket.create_connection(here.recv()) as stream:
        for _ in range(rounds):
            start = time.perf_counter()
            stream.sendall(b"!")
            left = nbytes
            while left:
                left -= stream.recv_into(block)
            rates.append(nbytes / (time.perf_counter() - start) / 1e9)
    process.join()
    return [Row(f"the floor: {nbytes / _MB:.0f} MB through a plain socket, nothing else", median(rates), "GB/s")]


# -- running -----------------------------------------------------------------------------------------------------------------------


def run(*, quick: bool = False, rounds: int | None = None) -> list[Row]:
    """Measure everything."""
    shape = QUICK if quick else FULL
    rounds = rounds or (1 if quick else 5)
    count = 2_000 if quick else 100_000
    nbytes = int(np.prod(shape)) * 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{_KEY}.ome.parquet")
        maker = multiprocessing.get_context("spawn").Process(target=make_file, args=(str(path), shape))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError(f"the image's file could not be made (exit status {maker.exitcode})")
        with serving(path) as server, connect(server.target, transport="tcp") as client:
            # Loaded, indexed and connected; what follows is not about that.
            client.tensor_view(_KEY, t=0, z=0, c=0, roi=(0, 0, 1, 1)).to_numpy()
            rows = small_stream(server, client, shape, count)
            what = f"first of {count:,} tiles of {SMALL}²"
            repeats = 3 if quick else 25
            rows.append(Row(what, first_tile(client, shape, count, [None] * repeats), "ms", below=10))
            # A server may remember an order: only a seed that it has not seen shows what a new epoch waits for.
            rows.append(Row(f"{what}, shuffled, a new seed each time", first_tile(client, shape, count, range(repeats)), "ms"))
            rows.append(Row(f"{what}, shuffled, the same seed again", first_tile(client, shape, count, [0] * repeats), "ms"))
            for prefetch in (0, 2):
                rows += throughput(server, client, nbytes, prefetch, rounds)
            rows += raw_socket(nbytes, rounds)
            rows += dropped_streams(server, client, shape, count, 5 if quick else 50)
            from .data import make_image

            image = make_image(shape)  # type: ignore[arg-type]
            rows += single_reads(client, image, 20 if quick else 500)
            compare(client, image, count)
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    print_table(
        "Stream: server and client processes over TCP on one host; "
        + ", ".join(f"{name} {what}" for name, what in environment().items() if name != "ome-arrow"),
        ("what", "figure", "unit", "bar", "met"),
        [(r.what, number(r.value), r.unit, "" if r.below is None else f"< {r.below:g} {r.unit}", yes_no(r.met)) for r in rows],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small image and one round: shows that it works, not how fast it is"
    )
    parser.add_argument("--rounds", type=int, help="rounds that medians of throughput are taken over (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    rows = run(quick=options.quick, rounds=options.rounds)
    show(rows)
    if options.json:
        write_json(options.json, "stream", [asdict(row) | {"met": row.met} for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
