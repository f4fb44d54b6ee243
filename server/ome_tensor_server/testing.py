"""A real server for tests and demos: started on a free port in this process, stopped at the end of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .app import TensorServer
from .catalogue import Catalogue
from .finding import find_sources
from .settings import Settings

__all__ = ["RunningServer", "running_server"]


@dataclass(frozen=True)
class RunningServer:
    """What a test sees of the server.

    Attributes:
        target: ``HOST:PORT`` to connect to.
        server: The server itself.
        catalogue: What it serves.
    """

    target: str
    server: TensorServer
    catalogue: Catalogue


@contextmanager
def running_server(paths: Sequence[str | Path], **settings: Any) -> Iterator[RunningServer]:
    """Serve files or folders on a free port of the loopback interface, in this process.

    Args:
        paths: As for ``ome-tensor serve``.
        settings: Fields of :class:`Settings`; without ``store`` there is none, so nothing is left behind, and nothing can be mapped; without
            ``preload`` datasets are loaded at the start.
    """
    usual: dict[str, Any] = {"listen": "127.0.0.1:0", "store": "none", "preload": True}
    server = TensorServer(Settings(**usual | settings))
    try:
        target = server.start()
        catalogue = server.load(find_sources(paths), [str(path) for path in paths])
        yield RunningServer(target, server, catalogue)
    finally:
        server.stop(grace=0)
