"""The whole way on one image, for people to watch: a server process, a client, tensors checked against the file, a picture."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from ome_tensor.errors import BrokenStream, InvalidArgument, OmeTensorError
from ome_tensor.record import ImageMeta
from ome_tensor.view import TensorView

from .cli_output import size_text
from .cli_text import printable
from .client import Client, connect
from .demo_picture import write_picture
from .demo_server import server_process
from .files import check_output

if TYPE_CHECKING:
    from ome_tensor.listing import ImageInfo

__all__ = ["run_demo"]

_EXAMPLE = Path("examples", "data", "idr0062a-6001240.chunks.ome.parquet")

#: Rows and columns of a training tile; the example's frame has 25 of them, the edge ones clipped.
_TILE = (64, 64)

_SEED = 6001240
_PREFETCH = 4

#: Seconds to measure throughput for, and how often to measure a latency: enough for steady figures, too short to wait for.
_MEASURE_FOR = 1.0
_LATENCIES = 50


def run_demo(data: str | None, output: str) -> None:
    """Run it, printing as it goes.

    Args:
        data: An OME-Arrow Parquet file; ``None`` for the example image of the repository.
        output: The picture to write, a .png.

    Raises:
        OmeTensorError: anything that is not as it should be, a single wrong pixel included.
    """
    path = _find_data(data)
    picture = _check_picture(output)
    console = Console(highlight=False, soft_wrap=True)
    say = _Headings(console)
    began = time.perf_counter()

    say.heading("Serve")
    console.print(f"  $ ome-tensor serve {_quiet(path)} --listen 127.0.0.1:0", style="dim", markup=False)
    with server_process(path) as server:
        say.fact("process", f"{server.pid}, listening on {server.target}")
        # What is shown is the wire, as another host would see it; this one could map the pixels.
        with connect(server.target, transport="tcp") as client:
            image = _list(client, say)
            meta = image.meta
            assert meta is not None  # images with a problem were passed over
            _resolve(client, image, say)
            truth = _read_file(path, image)
            _stream(client, image, truth, say)
            with connect(server.target) as mapping:
                _measure(client, mapping, image, meta, say)
            say.heading("Picture")
            pixels = client.tensor_view(image.key, t=0, layout="TZCYX").to_numpy()
        write_picture(picture, pixels[0], meta)
        say.fact("written", printable(output))
        say.heading("Stop")
        status = server.stop()
    say.fact("SIGTERM", f"the server finished and exited with status {status}")
    if status != 0:
        raise OmeTensorError(f"the server exited with status {status} at SIGTERM, not 0: {server.complaint()}")
    console.print(f"\n[green]✓[/] the demo ran as it should, in {time.perf_counter() - began:.1f} s")


class _Headings:
    """Numbered headings, and facts under them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._number = 0

    def heading(self, text: str) -> None:
        self._number += 1
        self.console.print(f"\n[bold cyan]{self._number}[/] [bold]{text}[/]")

    def fact(self, name: str, text: str) -> None:
        self.console.print(f"  {name:<20} {printable(text)}", markup=False)

    def good(self, text: str) -> None:
        self.console.print(f"  [green]✓[/] {text}")


def _find_data(data: str | None) -> Path:
    if data is not None:
        path = Path(data)
        if not path.is_file():
            raise InvalidArgument(f"--data {data!r} is not a file", field="data", value=data)
        if not os.access(path, os.R_OK):
            raise InvalidArgument(f"--data {data!r} may not be read by this user", field="data", value=data)
        return path
    # The working directory or one above it; else the checkout that an editable installation runs from.
    for folder in (Path.cwd(), *Path.cwd().parents, *Path(__file__).resolve().parents[2:3]):
        if (folder / _EXAMPLE).is_file():
            return folder / _EXAMPLE
    raise InvalidArgument(
        f"the example image {_EXAMPLE} is not here: run this in a checkout of the project, or name an OME-Arrow Parquet file with --data",
        field="data",
    )


def _check_picture(output: str) -> Path:
    path = check_output(output)
    if path.suffix.lower() != ".png":
        raise InvalidArgument(f"the demo writes a .png, not {output!r}", field="output", value=output)
    return path


def _quiet(path: Path) -> str:
    """The shortest way to write a path."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _list(client: Client, say: _Headings) -> ImageInfo:
    """List everything; the first image that can be read."""
    say.heading("List")
    found: ImageInfo | None = None
    for dataset in client.datasets():
        count = f"{dataset.image_count} image" + ("" if dataset.image_count == 1 else "s")
        say.fact("dataset", f"{dataset.name}: {count}, {size_text(dataset.resident_bytes)} in memory")
        found = found or next((image for image in client.images(dataset.name) if not image.problem and image.meta), None)
    if found is None or found.meta is None:
        raise InvalidArgument("the file holds no image that can be read", field="data")
    say.fact("image", found.key)
    say.fact("shape (TZCYX)", f"{' × '.join(map(str, found.shape))} {found.meta.dtype.name}, {size_text(found.nbytes)}")
    say.fact("channels", ", ".join(channel.name or f"#{i}" for i, channel in enumerate(found.meta.channels)) or "unnamed")
    return found


def _resolve(client: Client, image: ImageInfo, say: _Headings) -> None:
    """A lazy view: its shape is one small call away, its pixels are not read."""
    say.heading("A lazy view: no pixels yet")
    say.console.print(f'  view = client.tensor_view("{image.key}", t=0, layout="CZYX")', style="dim", markup=False)
    began = time.perf_counter()
    view = client.tensor_view(image.key, t=0, layout="CZYX")
    shape = view.shape
    say.fact(
        "resolved", f"shape {shape}, {view.dtype}, {size_text(view.nbytes)}, in {_milliseconds(time.perf_counter() - began)}"
    )


def _read_file(path: Path, image: ImageInfo) -> np.ndarray:
    """The image from the file itself, without any server: TZCYX."""
    import pyarrow.parquet as pq

    record = pq.read_table(path, columns=[image.column]).column(0)[image.row]
    return TensorView(record, layout="TZCYX").to_numpy()


def _stream(client: Client, image: ImageInfo, truth: np.ndarray, say: _Headings) -> None:
    """Stream all tiles in a shuffled order into tensors, and compare each with the file."""
    say.heading("Stream tiles into tensors, and check each against the file")
    framework, to_tensor = _framework()
    call = f"view.iter_tiles(tile_size={_TILE}, shuffle=True, seed={_SEED}, prefetch={_PREFETCH})"
    say.console.print(f"  {call}", style="dim", markup=False)
    checked = pixels = 0
    seen: set[tuple[int, int]] = set()
    orders = []
    for t in range(truth.shape[0]):
        view = client.tensor_view(image.key, t=t, layout="CZYX")
        for tile in view.iter_tiles(tile_size=_TILE, shuffle=True, seed=_SEED, prefetch=_PREFETCH):
            tensor = to_tensor(tile)
            _, _, y, x = tile.origin
            _, h, w = tile.valid
            expected = truth[t, :, :, y : y + h, x : x + w].transpose(1, 0, 2, 3)
            if not np.array_equal(np.asarray(tensor), expected, equal_nan=truth.dtype.kind in "fc"):
                raise BrokenStream(f"tile {tile.number} of t={t} at y={y}, x={x} differs from the file")
            if not checked:
                say.fact("each a", f"{framework} tensor through DLPack, {tuple(tensor.shape)} {tensor.dtype} at first")
            checked, pixels = checked + 1, pixels + tensor.shape[-1] * tensor.shape[-2] * truth.shape[1] * truth.shape[2]
            seen.add((t, tile.number))
            orders.append(tile.number)
    if pixels != truth.size or len(seen) != checked:
        raise BrokenStream(
            f"{pixels} pixels arrived in {checked} tiles, of which {len(seen)} differ; the file has {truth.size} pixels"
        )
    say.fact("arrived in order", ", ".join(map(str, orders[:12])) + (", …" if len(orders) > 12 else ""))
    say.good(f"all {checked} tiles, {pixels:,} pixels, are exactly those of the file")


def _framework() -> tuple[str, Any]:
    """PyTorch where it is installed, else NumPy."""
    try:
        import torch
    except ImportError:
        return "NumPy", np.from_dlpack
    return "PyTorch", torch.from_dlpack


def _measure(client: Client, mapping: Client, image: ImageInfo, meta: ImageMeta, say: _Headings) -> None:
    """Throughput and latencies of a warm server: over the wire, and mapped from its store where ``mapping`` can do that."""
    say.heading("Measure")
    view = client.tensor_view(image.key, t=0, layout="ZCYX")
    first = [_first_tile(view, seed) for seed in range(_LATENCIES)]
    h, w = (min(256, size) for size in (meta.extent.y, meta.extent.x))
    rate, told = _throughput(view)
    say.fact("throughput", f"{_rate(rate)}: {told}")
    say.fact("first tile", f"{_milliseconds(statistics.median(first))} from request to tensor, median of {len(first)}")
    single = _single_read(client, image, meta, (h, w))
    say.fact("single read", f"{_milliseconds(single)} for {h} × {w} pixels, shape included, p50 of {_LATENCIES}")
    say.console.print(f"  over loopback, client and server sharing {os.cpu_count()} cores", style="dim")
    mapped = mapping.tensor_view(image.key, t=0, layout="ZCYX")
    if mapped.shape and mapping.transport == "mapped":
        rate, _ = _throughput(mapped)
        single = _single_read(mapping, image, meta, (h, w))
        say.fact(
            "on the same host", f"{_rate(rate)}, single read {_milliseconds(single)}: mapped from the server's store, no wire"
        )


def _throughput(view: Any) -> tuple[float, str]:
    """Bytes a second of tiles turned into tensors, and of how many of them."""
    _, to_tensor = _framework()
    nbytes = tiles = epochs = 0
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < _MEASURE_FOR:
        for tile in view.iter_tiles(tile_size=_TILE, shuffle=True, seed=epochs, prefetch=_PREFETCH):
            to_tensor(tile)
            nbytes += tile.array.nbytes
            tiles += 1
        epochs += 1
    return nbytes / elapsed, f"{tiles:,} tiles in {epochs} shuffled epochs, {elapsed:.1f} s"


def _single_read(client: Client, image: ImageInfo, meta: ImageMeta, size: tuple[int, int]) -> float:
    """Median seconds for a plane's corner of that height and width, each of a view made anew."""
    h, w = size
    took = []
    for number in range(_LATENCIES):
        began = time.perf_counter()
        z, c = number % meta.extent.z, number % meta.extent.c
        client.tensor_view(image.key, t=0, z=z, c=c, roi=(0, 0, w, h)).to_numpy()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def _first_tile(view: Any, seed: int) -> float:
    began = time.perf_counter()
    tiles: Any = view.iter_tiles(tile_size=_TILE, shuffle=True, seed=seed)
    next(tiles)
    took = time.perf_counter() - began
    # To the end: what a dropped stream still has in flight would delay the next one's first tile.
    for _ in tiles:
        pass
    return took


def _rate(bytes_per_second: float) -> str:
    if bytes_per_second >= 1e9:
        return f"{bytes_per_second / 1e9:.2f} GB/s"
    return f"{bytes_per_second / 1e6:.0f} MB/s"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
