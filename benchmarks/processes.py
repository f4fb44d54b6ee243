"""A real server process, and what the kernel says of a process: memory and processor time, from /proc (Linux)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

__all__ = ["MemoryWatch", "ServerProcess", "cpu_seconds", "family", "private_bytes", "rss_bytes", "serving"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_STOP_SECONDS = 20.0


class ServerProcess:
    """``ome-tensor serve`` in a process of its own, on the loopback interface.

    Args:
        arguments: What it serves, and how.
        store: Where its store goes: what the default leaves in shared memory for a warm restart would stay there.
        listen: ``HOST:PORT``; by default a free port.
        log: File for what it says; by default what is no error is not said.

    Attributes:
        target: ``HOST:PORT`` as bound.
        pid: Its process.

    Raises:
        RuntimeError: it does not start.
    """

    def __init__(self, *arguments: str | Path, store: Path, listen: str = "127.0.0.1:0", log: Path | None = None) -> None:
        self._arguments, self._store, self._log = arguments, store, log
        command = [sys.executable, "-m", "ome_tensor_client", "serve", *map(str, arguments), "--listen", listen]
        command += ["--store", str(store)]
        with ExitStack() as stack:
            if log is None:
                command += ["--log-level", "error"]
            errors = None if log is None else stack.enter_context(log.open("w"))
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line.startswith("listening on "):
            self.kill()
            raise RuntimeError(f"the server did not start: {line!r}")
        self.target = line.removeprefix("listening on ")

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        self._process.kill()
        self._end()

    def again(self) -> ServerProcess:
        """Another one in its place, on its port."""
        return ServerProcess(*self._arguments, store=self._store, listen=self.target, log=self._log)

    def stop(self) -> None:
        """Have it end by itself. Raises TimeoutExpired where it does not."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._end()

    def _end(self) -> None:
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serving(path: Path, *arguments: str) -> ServerProcess:
    """A server of a file, which it loads at once."""
    return ServerProcess(path, "--preload", *arguments, store=path.parent / "ome-tensor-store")


def rss_bytes(pid: int) -> int:
    """Resident memory now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def private_bytes(pid: int) -> int:
    """Resident memory now, less what is mapped from files or shared with others: a mapped dataset is not a process's own."""
    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(resident) - int(shared)) * _PAGE


def family(*pids: int) -> list[int]:
    """Processes and all their children's children: a server's workers are its too."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # ended meanwhile
            children.setdefault(parent, []).append(int(folder.name))
    found = list(pids)
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time so far, user and system, all threads; to a hundredth of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class MemoryWatch:
    """Samples processes' resident memory on a thread while a ``with`` block runs.

    Args:
        pids: The processes.
        every: Seconds between samples: short against a stream of seconds, long against the samples' own cost.
        of: What to sample: :func:`rss_bytes` or :func:`private_bytes`.

    Attributes:
        before, peak: Bytes of each process at the start, and the most seen since.
    """

    def __init__(self, *pids: int, every: float = 0.01, of: Callable[[int], int] = rss_bytes) -> None:
        self._every = every
        self._of = of
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory-watch", daemon=True)
        self.before: dict[int, int] = {pid: of(pid) for pid in pids}
        self.peak = dict(self.before)

    def _look(self) -> None:
        for pid in self.peak:
            self.peak[pid] = max(self.peak[pid], self._of(pid))

    def _sample(self) -> None:
        while not self._stop.wait(self._every):
            self._look()

    def growth(self, pid: int) -> int:
        """The peak above what there was before."""
        return self.peak[pid] - self.before[pid]

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
