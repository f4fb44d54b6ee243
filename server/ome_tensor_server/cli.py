"""The server's part of the command line; the client's ``ome-tensor`` finds it by entry point."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from .app import TensorServer
from .catalogue import find_sources
from .logs import configure
from .memory import keep_blocks
from .settings import Settings

__all__ = ["register", "serve"]


def register(app: typer.Typer) -> None:
    """Add the server's commands."""
    app.command()(serve)


def serve(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="OME-Arrow Parquet files, or folders of them.", show_default=False)
    ],
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Port 0 takes a free one. [default: 127.0.0.1:50051]")
    ] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Allow plain text beyond this host.")] = None,
    batch_bytes: Annotated[int | None, typer.Option(help="Aim of a message's size. [default: 1 MiB]")] = None,
    max_request_bytes: Annotated[int | None, typer.Option(help="Largest request. [default: 4 MiB]")] = None,
    max_tile_bytes: Annotated[int | None, typer.Option(help="Largest tile. [default: 2 GiB]")] = None,
    max_tiles: Annotated[int | None, typer.Option(help="Most tiles of one read. [default: 10,000,000]")] = None,
    max_indices: Annotated[int | None, typer.Option(help="Most indices listed for an axis. [default: 65,536]")] = None,
    max_concurrent_reads: Annotated[int | None, typer.Option(help="Streams served at once. [default: 64]")] = None,
    decode_cache_bytes: Annotated[int | None, typer.Option(help="Decompressed chunks kept. [default: 256 MiB]")] = None,
    grace_seconds: Annotated[float | None, typer.Option(help="Time for running streams at SIGTERM. [default: 30]")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json. [default: text]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. [default: info]")] = None,
) -> None:
    """Serve OME-Arrow images. Every option is also a variable, OME_TENSOR_LISTEN and so on; options win.

    SIGTERM drains: health turns to NOT_SERVING, new calls are refused, running streams finish within the grace period.
    """
    flags = {name: value for name, value in locals().items() if name != "paths"}
    settings = Settings.load(flags, os.environ)
    sources = find_sources(paths)
    configure(settings.log_format, settings.log_level)
    keep_blocks()
    server = TensorServer(settings)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    # Before anything listens: whoever reads the address below may send a signal at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    # Scripts wait for this line; it comes once the port is bound. Readiness is health's to tell.
    print(f"listening on {server.start()}", flush=True)  # noqa: T201  the command's output
    try:
        catalogue = server.load(sources)
        images = sum(dataset.info.image_count for dataset in catalogue.datasets.values())
        print(f"serving {images} images in {len(catalogue.datasets)} datasets", file=sys.stderr, flush=True)  # noqa: T201
        stop.wait()
    finally:
        server.stop()
