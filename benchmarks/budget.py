"""A dataset three times as large as the server's memory limit: ``python -m benchmarks.budget``.

6 GB of OME-Zarr (zstd) under ``--memory-limit 2G``: served in place, chunk by chunk. Every pixel that arrives is checked against the formula that the
image is made by. Reads: tiles at random places of the whole image, of a working set that fits into the cache, and one after the other; a server anew
for each. Hit rates are the server's own; peak memory is the resident memory of its processes, mapped files included, sampled, and the kernel's
high-water mark.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.processes import ServerProcess
from benchmarks.report import number, print_table, yes_no
from ome_tensor_client import Client, connect

__all__ = ["main"]

_SIDE, _CHUNK, _TILE = 8192, 512, 256

#: Bytes of chunks that the server keeps.
_CACHE = 512 << 20


def plane(z: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The image's values: any of them can be computed alone."""
    return (z * 7919 + y[:, None] * 31 + x[None, :] * 17 + (y[:, None] // 64) * (x[None, :] // 64)).astype(np.uint16)


def write_image(path: Path, planes: int) -> int:
    """An OME-Zarr image of so many planes of 8192 x 8192 uint16; its size in bytes."""
    import zarr

    group = zarr.open_group(path, mode="w")
    array = group.create_array("0", shape=(planes, _SIDE, _SIDE), dtype="uint16", chunks=(1, _CHUNK, _CHUNK))
    place = np.arange(_SIDE, dtype=np.int64)
    for z in range(planes):
        array[z] = plane(z, place, place)
    axes = [{"name": axis, "type": "space"} for axis in "zyx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    multiscales = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
    return int(array.nbytes)


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children += (task / "children").read_text().split()
        except OSError:
            continue
    for child in set(children):
        yield from _family(int(child))


def _memory(pid: int, field: str) -> int:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


class Watch:
    """The largest sum of resident memory of a process and its children, looked at every 20 ms."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, sum(_memory(pid, "VmRSS") for pid in _family(self._pid)))

    def stop(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--planes", type=int, default=48, help="of 128 MiB each")
    parser.add_argument("--limit", type=float, default=2.0, help="GiB")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each kind of read")
    options = parser.parse_args()
    limit = int(options.limit * 2**30)
    rows, peaks, marks = [], [], []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "large.ome.zarr"
        nbytes = write_image(path, options.planes)
        for title, read in _READS.items():
            with _Watched(path, limit) as server, connect(server.target, transport="tcp") as client:
                assert str(client.dataset("large").state) != "failed"
                done, pixels, elapsed = read(client, options.planes, options.seconds)
            rows.append(
                (
                    title,
                    number(done / elapsed),
                    number(pixels * 2 / 1e6 / elapsed),
                    f"{server.hits / max(1, server.hits + server.misses):.0%}",
                    f"all of {done:,} tiles",
                )
            )
            peaks.append(server.peak)
            marks.append(server.mark)
    print_table(
        f"{nbytes / 1e9:.3g} GB under {options.limit:g} GiB",
        ("reads", "tiles/s", "MB/s", "chunks found in the cache", "pixels checked"),
        rows,
    )
    print_table(
        "memory",
        ("what", "GiB", "within the limit + 15 %"),
        [
            ("peak of all processes, sampled", number(max(peaks) / 2**30), yes_no(max(peaks) <= 1.15 * limit)),
            ("server's own high-water mark", number(max(marks) / 2**30), ""),
        ],
    )


class _Watched:
    """``ome-tensor serve`` under a memory limit, watched.

    Attributes:
        target: ``HOST:PORT``.
        peak, mark: Most memory of all its processes, and its own high-water mark, once it has ended.
        hits, misses: Of its cache, likewise.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._log = path.parent / "log"
        flags = ["--memory-limit", str(limit), "--decode-cache-bytes", str(_CACHE)]
        self._server = ServerProcess(path, *flags, store=path.parent / "store", log=self._log)
        self.target = self._server.target
        self._watch = Watch(self._server.pid)
        self.peak = self.mark = self.hits = self.misses = 0

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.stop()
        self.peak, self.mark = self._watch.peak, _memory(self._server.pid, "VmHWM")
        self._server.stop()
        found = re.search(r"chunks hits=(\d+) misses=(\d+)", self._log.read_text())
        if found is not None:
            self.hits, self.misses = int(found[1]), int(found[2])


def _random_tiles(client: Client, among: np.ndarray, seconds: float) -> tuple[int, int, float]:
    """Tiles inside chunks chosen at random; how many, their pixels, and the time they took."""
    random = np.random.default_rng(0)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        z, rest = divmod(int(random.choice(among)), (_SIDE // _CHUNK) ** 2)
        y, x = (int(random.integers(0, _CHUNK - _TILE + 1)) + c * _CHUNK for c in divmod(rest, _SIDE // _CHUNK))
        found = client.tensor_view("large", z=z, roi=(x, y, _TILE, _TILE), layout="YX").to_numpy()
        np.testing.assert_array_equal(found, plane(z, np.arange(y, y + _TILE), np.arange(x, x + _TILE)))
        done += 1
    return done, done * _TILE * _TILE, time.perf_counter() - began


def _anywhere(client: Client, planes: int, seconds: float) -> tuple[int, int, float]:
    return _random_tiles(client, np.arange(planes * (_SIDE // _CHUNK) ** 2), seconds)


def _working_set(client: Client, planes: int, seconds: float) -> tuple[int, int, float]:
    chunks = np.random.default_rng(1).choice(planes * (_SIDE // _CHUNK) ** 2, 256, replace=False)
    return _random_tiles(client, chunks, seconds)


def _in_order(client: Client, planes: int, seconds: float) -> tuple[int, int, float]:
    done, began = 0, time.perf_counter()
    for tile in client.tensor_view("large", z=slice(0, planes), layout="ZYX").iter_tiles(tile_size=(1, 256, 256), prefetch=4):
        _, z, y, x = tile.origin
        np.testing.assert_array_equal(tile.array[0], plane(z, np.arange(y, y + 256), np.arange(x, x + 256)))
        done += 1
        if time.perf_counter() - began > seconds:
            break
    return done, done * 256 * 256, time.perf_counter() - began


_READS: dict[str, Callable[[Client, int, float], tuple[int, int, float]]] = {
    "tiles of 256 x 256 anywhere": _anywhere,
    "the same in a working set of 128 MiB": _working_set,
    "all tiles of 256 x 256 in order, one stream": _in_order,
}


if __name__ == "__main__":
    main()
