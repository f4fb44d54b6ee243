"""Servers in processes of their own, started as a user does, and waiting for what must come true."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

HERE = Path(__file__).parent


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Poll until a condition holds, and give its value; fails saying what did not come."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)


def health_of(target: str, service: str = "") -> int | None:
    """The service's status, or ``None`` where nobody answers."""
    with grpc.insecure_channel(target) as channel:
        try:
            return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
        except grpc.RpcError:
            return None


class ServerProcess:
    """``ome-tensor serve`` in a process of its own; killed at the end of a ``with`` block if it still runs.

    Args:
        path: What it serves.
        log: File for what it writes to stderr.
        listen: ``HOST:PORT``.
        flags: Further options of the command; without ``--store`` there is no store, so nothing can be mapped. ``--lazy`` is no option of the
            command: without it there is ``--preload``.
    """

    def __init__(self, path: Path, log: Path, *flags: str, listen: str = "127.0.0.1:0") -> None:
        self.log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OME_TENSOR_")}
        # Nothing is left behind in shared memory, and pixels take the wire, unless a test wants it otherwise.
        if "--store" not in flags:
            flags = ("--store", "none", *flags)
        # What is served is there once the server says so, unless a test is about loading.
        if "--lazy" in flags:
            flags = tuple(flag for flag in flags if flag != "--lazy")
        else:
            flags = ("--preload", *flags)
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ome_tensor_client", "serve", str(path), "--listen", listen, *flags],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), f"{line!r}; {log.read_text()}"
        self.target = line.removeprefix("listening on ").strip()

    def wait_serving(self) -> Self:
        """Itself, once its datasets are loaded."""
        serving = health_pb2.HealthCheckResponse.SERVING
        wait_until(lambda: self.process.poll() is not None or health_of(self.target) == serving, "the server is ready")
        assert self.process.poll() is None, self.log.read_text()
        return self

    def kill(self) -> None:
        """As the kernel does when memory is short: no warning, no last word."""
        self.process.kill()
        self.process.wait(10)

    def terminate(self) -> None:
        """As an orchestrator does."""
        self.process.send_signal(signal.SIGTERM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


def workers(server: ServerProcess) -> list[psutil.Process]:
    """The worker processes; a server's other children read its sources."""
    return [one for one in psutil.Process(server.process.pid).children() if "ome_tensor_server.worker" in _command(one)]


def _command(process: psutil.Process) -> list[str]:
    """Its command line; of one that has ended and that its supervisor has not looked after yet, that of a worker."""
    try:
        command: list[str] = process.cmdline()
    except psutil.ZombieProcess:
        return ["ome_tensor_server.worker"]
    except psutil.NoSuchProcess:
        return []
    return command


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more; one that nobody has reaped yet counts as ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def run_script(name: str, *arguments: object, seconds: float = 60.0) -> str:
    """Run a script of this folder to its end in a fresh interpreter; its output. A hang is a failure, not a wait."""
    # Either value of this variable makes gRPC hang after a fork (as of 1.85); left alone it does what these tests need.
    environment = {key: value for key, value in os.environ.items() if key != "GRPC_ENABLE_FORK_SUPPORT"}
    process = subprocess.Popen(
        [sys.executable, str(HERE / name), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # Its children too: they would hold the pipe open.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{name} {arguments}: not within {seconds:g} s\n{output}") from None
    assert process.returncode == 0, f"{name} {arguments}: exit status {process.returncode}\n{output}"
    return output
