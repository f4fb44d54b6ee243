"""One worker process: a server on a port it shares, over the datasets that the supervisor has put into the store.

Started by :mod:`.workers` as ``python -m ome_tensor_server.worker`` with its instructions as JSON in the first argument.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from ome_tensor.blocks import ChunkCache
from ome_tensor.errors import InvalidRecord

from .app import TensorServer
from .catalogue import Catalogue, Dataset
from .control import Control
from .logs import configure
from .memory import keep_blocks
from .settings import Settings

__all__ = ["main"]

_log = logging.getLogger(__name__)

#: How often a worker looks whether there is a new catalogue, in seconds.
_POLL = 0.05

_PR_SET_PDEATHSIG = 1


def _open(control: Control, cache: ChunkCache) -> Catalogue:
    """The published datasets, mapped. One whose file has gone meanwhile is left out, saying so: the others are still served."""
    datasets = []
    for entry in control.entries():
        try:
            datasets.append(Dataset(entry.name, entry.manifest.table(), entry.source_name, cache))
        except (InvalidRecord, OSError) as error:
            _log.error("dataset %s cannot be opened: %s", entry.name, error)
    return Catalogue(datasets)


def main(arguments: list[str]) -> None:
    """Serve until told to stop."""
    instructions = json.loads(arguments[0])
    settings = Settings(**instructions["settings"])
    configure(settings.log_format, settings.log_level)
    keep_blocks()
    # Without its supervisor a worker would serve an old catalogue for ever.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != instructions["supervisor"]:
        return
    control = Control(Path(instructions["control"]))
    server = TensorServer(settings, worker=instructions["worker"], control=control)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            threading.Thread(target=server.stop, args=(0,), daemon=True).start()
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    # A terminal sends it to the whole group; the supervisor passes on what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.start()
    cache = ChunkCache(settings.decode_cache_bytes, settings.max_chunk_bytes)
    generation = 0
    try:
        while not stop.wait(_POLL):
            if control.generation != generation:
                generation = control.generation
                server.serve(_open(control, cache), generation)
    finally:
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
