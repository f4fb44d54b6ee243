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

from ome_tensor.blocks import ChunkCache
from ome_tensor.errors import InvalidRecord, OmeTensorError
from ome_tensor_proto.memory import keep_blocks

from .app import TensorServer
from .catalogue import Catalogue, Dataset
from .control import Control
from .logs import configure
from .settings import Settings
from .stopping import StopRequests

__all__ = ["main"]

_log = logging.getLogger(__name__)

#: How often a worker looks whether there is a new catalogue, in seconds.
_POLL = 0.05

_PR_SET_PDEATHSIG = 1


def _follow(server: TensorServer, control: Control, cache: ChunkCache, generation: int) -> int:
    """Serve the published datasets, mapped, unless they are those of ``generation``; gives their number.

    One whose file has gone meanwhile is left out, saying so: the others are still served.
    """
    if control.generation == generation:
        return generation
    datasets = []
    generation, entries = control.entries()
    for entry in entries:
        try:
            datasets.append(Dataset(entry.name, entry.manifest.table(), entry.source_name, cache))
        except (InvalidRecord, OSError) as error:
            _log.error("dataset %s cannot be opened: %s", entry.name, error)
    server.serve(Catalogue(datasets), generation)
    return generation


def _speak_up(stderr: int) -> None:
    """From now on write where the supervisor does; first what was said so far, which went into a file that tells it why a worker did not start."""
    sys.stderr.flush()
    said = os.pread(sys.stderr.fileno(), os.fstat(sys.stderr.fileno()).st_size, 0)
    os.dup2(stderr, sys.stderr.fileno())
    os.close(stderr)
    sys.stderr.buffer.write(said)
    sys.stderr.flush()


def main(arguments: list[str]) -> None:
    """Serve until told to stop.

    Raises:
        InvalidArgument: the address cannot be bound.
    """
    instructions = json.loads(arguments[0])
    settings = Settings(**instructions["settings"])
    configure(settings.log_format, settings.log_level)
    keep_blocks()
    # Without its supervisor a worker would serve an old catalogue for ever.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != instructions["supervisor"]:
        return
    control = Control(instructions["control"])
    server = TensorServer(settings, worker=instructions["worker"], control=control)
    stop = StopRequests(signal.SIGTERM, hurry=lambda: server.stop(0)).asked
    # A terminal sends it to the whole group; the supervisor passes on what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cache = ChunkCache(settings.decode_cache_bytes, settings.max_chunk_bytes)
    try:
        # Before it listens: where the other workers serve, a connection that is given to this one finds it ready.
        generation = _follow(server, control, cache, 0)
        server.start()
        _speak_up(instructions["stderr"])
        while not stop.wait(_POLL):
            generation = _follow(server, control, cache, generation)
    finally:
        server.stop()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OmeTensorError as error:
        raise SystemExit(str(error)) from None
