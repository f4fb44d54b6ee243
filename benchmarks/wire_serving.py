"""What our server costs beside its streams: memory for readers that are slow, and the time until it serves again."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from ome_tensor.errors import OmeTensorError
from ome_tensor_client.health import check_health

from .peers.base import TILE, Data, Shape, running
from .peers.ours import KEY, Ours, OursReader, serve_flags
from .processes import MemoryWatch, family, private_bytes
from .wire import make_files
from .wire_figures import SECOND_START, SLOW_READERS, Figures

__all__ = ["run"]

_READERS = 64
#: A GB in planes of 2048²: 1.007 GB.
_LARGE = (1, 40, 3, 2048, 2048)
_FIRST_START = "first start of the same, s to SERVING"


def _read_slowly(pipe: Connection, reader: OursReader, count: int, seconds: float) -> None:
    """``count`` streams of all tiles, a tile of each in turn and a pause, until the time is up."""
    reader.open()
    view = reader._client.tensor_view(KEY, t=0, layout="CYX")
    pipe.send("open")
    pipe.recv()
    streams = [view.iter_tiles_3d(tile_size=(1, TILE, TILE)) for _ in range(count)]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for stream in streams:
            next(stream, None)
        time.sleep(0.2)
    pipe.send("read")
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]


def _slow_readers(data: Data, seconds: float) -> float:
    """MiB of server memory a stream, at the peak."""
    context = multiprocessing.get_context("spawn")
    with Ours().serve(data) as served:
        here, there = context.Pipe()
        process = context.Process(target=_read_slowly, args=(there, served.reader, _READERS, seconds), daemon=True)
        process.start()
        try:
            here.recv()
            servers = family(*served.pids)
            with MemoryWatch(*servers, of=private_bytes) as watch:
                here.send("go")
                here.recv()
            return sum(map(watch.growth, servers)) / _READERS / 2**20
        finally:
            process.kill()
            process.join()


def _seconds_to_serving(data: Data, store: str) -> float:
    """From the command to the health service's SERVING."""
    command = [sys.executable, "-m", "ome_tensor_client", "serve", str(data.parquet), "--listen", "127.0.0.1:0", "--store", store]
    began = time.monotonic()
    with running([*command, "--log-level", "error"], stdout=-1) as process:
        assert process.stdout is not None
        target = process.stdout.readline().strip().removeprefix("listening on ")
        while process.poll() is None:
            try:
                if check_health(target) == "SERVING":
                    return time.monotonic() - began
            except OmeTensorError:
                pass  # not yet
            time.sleep(0.005)
    raise RuntimeError(f"the server ended with status {process.returncode}")


def run(figures: Figures, shape: Shape, *, quick: bool, tell: Callable[[str], None]) -> None:
    """Add to the figures."""
    with tempfile.TemporaryDirectory() as folder:
        tell(f"{_READERS} slow readers")
        data = make_files(Path(folder, "noise"), shape, "noise", zarr=False)
        figures.single[SLOW_READERS] = _slow_readers(data, 1 if quick else 5)
        if "--store" not in serve_flags():
            figures.skipped["second start"] = "this tree's server has no --store yet"
            return
        tell("starting twice")
        large = data if quick else make_files(Path(folder, "large"), _LARGE, "counts", zarr=False)
        store = os.path.join(folder, "store")
        figures.single[_FIRST_START] = _seconds_to_serving(large, store)
        figures.single[SECOND_START] = _seconds_to_serving(large, store)
