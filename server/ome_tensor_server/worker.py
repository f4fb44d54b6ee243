"""One worker process: a server on a port it shares, over the datasets that the supervisor has put into the store.

Started by :mod:`.workers` as ``python -m ome_tensor_server.worker`` with its instructions as JSON in the first argument.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys

from ome_tensor.errors import OmeTensorError
from ome_tensor_proto.memory import keep_blocks

from .app import TensorServer
from .control import Control
from .exchange import Asker
from .logs import configure
from .meters import Meters
from .offices import AskedOffice, Office
from .settings import Settings
from .stopping import StopRequests
from .tracing import export_traces
from .usage import Usage

__all__ = ["main"]

#: How often a worker looks whether there is a new catalogue, in seconds.
_POLL = 0.05

_PR_SET_PDEATHSIG = 1


def _follow(server: TensorServer, control: Control, office: Office, generation: int) -> int:
    """Serve the published datasets, mapped, unless they are those of ``generation``; gives their number."""
    if control.generation == generation:
        return generation
    generation, entries = control.entries()
    server.follow(entries, generation, office)
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
    export_traces(settings)
    keep_blocks()
    # Without its supervisor a worker would serve an old catalogue for ever.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != instructions["supervisor"]:
        return
    control = Control(instructions["control"])
    usage = Usage(settings.workers, instructions["usage"], instructions["worker"])
    office = AskedOffice(Asker(socket.socket(fileno=instructions["exchange"])))
    meters = Meters(settings.workers, instructions["meters"], instructions["worker"])
    server = TensorServer(settings, worker=instructions["worker"], control=control, usage=usage, meters=meters)
    stop = StopRequests(signal.SIGTERM, hurry=lambda: server.stop(0)).asked
    # A terminal sends it to the whole group; the supervisor passes on what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # Before it listens: where the other workers serve, a connection that is given to this one finds it ready.
        generation = _follow(server, control, office, 0)
        server.start()
        _speak_up(instructions["stderr"])
        while not stop.wait(_POLL):
            generation = _follow(server, control, office, generation)
    finally:
        server.stop()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OmeTensorError as error:
        raise SystemExit(str(error)) from None
