"""A server in a process of its own, as the demo needs it: started by the command line, stopped by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ome_tensor.errors import OmeTensorError, Unavailable

from .health import check_health
from .signals import unwinding

__all__ = ["ServerProcess", "server_process"]

#: Seconds for a server to start, or to stop with nothing to finish; a cold disk and a busy machine included.
_PATIENCE = 60.0


class ServerProcess:
    """A running ``ome-tensor serve``.

    Attributes:
        target: ``HOST:PORT``.
        pid: Its process.
    """

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process = process
        self._log = log
        self.pid = process.pid
        self.target = self._wait_for_address()
        self._wait_until_serving()

    def _wait_for_address(self) -> str:
        assert self._process.stdout is not None
        # A server that hangs before it prints anything is ended, and its silence ends the wait.
        watch = threading.Timer(_PATIENCE, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline().strip()
        finally:
            watch.cancel()
        if not line.startswith("listening on "):
            self._process.wait()
            raise Unavailable(f"the server did not start: {self.complaint()}")
        return line.removeprefix("listening on ")

    def _wait_until_serving(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:
            if check_health(self.target) == "SERVING":
                return
            time.sleep(0.02)
        raise Unavailable(f"the server did not become ready: {self.complaint()}")

    def complaint(self) -> str:
        """What it wrote to stderr about why it ended: its ``error:`` line, else the last one that says anything."""
        self._log.seek(0)
        return complaint_of(self._log.read())

    def stop(self) -> int:
        """SIGTERM, and the status it exits with. May be called again."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise OmeTensorError(f"the server had not stopped {_PATIENCE:g} s after SIGTERM, and was killed") from None


def complaint_of(log: str) -> str:
    """The one line of a server's stderr to repeat to a person."""
    # Boxes are drawn around the parser's complaints.
    lines = [line.strip(" │╭╮╰╯─|+-") for line in log.splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = errors or [line for line in lines if any(map(str.isalnum, line))]
    return said[-1] if said else "it said nothing"


@contextmanager
def server_process(path: Path) -> Iterator[ServerProcess]:
    """Serve a file on a free port of the loopback interface; stopped at the end, and its store gone, whatever happens.

    Raises:
        Unavailable: it does not start; with what it said.
    """
    # The demo is to be the same everywhere: the user's settings are for the user's servers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OME_TENSOR_")}
    command = [sys.executable, "-m", "ome_tensor_client", "serve", str(path), "--listen", "127.0.0.1:0"]
    with (
        unwinding(),
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        # Not the server's own choice, shared memory: of a server that is killed the store would stay there.
        tempfile.TemporaryDirectory(prefix="ome-tensor-demo-") as store,
    ):
        command += ["--store", store]
        process = subprocess.Popen(
            # In a process group of its own: a Ctrl-C is for us, and we stop it.
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            process_group=0,
        )
        with process:
            try:
                server = ServerProcess(process, log)
                yield server
                server.stop()
            finally:
                if process.poll() is None:
                    process.kill()
