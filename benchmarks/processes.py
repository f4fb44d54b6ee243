"""A real server process, and what the kernel says of a process: memory and processor time, from /proc (Linux)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryWatch", "ServerProcess", "cpu_seconds", "family", "private_bytes", "rss_bytes", "serving"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_STOP_SECONDS = 20.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that runs.

    Attributes:
        target: ``HOST:PORT``.
        pid: Its process.
    """

    target: str
    pid: int


@contextmanager
def serving(path: Path) -> Iterator[ServerProcess]:
    """``ome-tensor serve`` on a free port of the loopback interface, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "ome_tensor_client.cli",
        "serve",
        str(path),
        "--listen",
        "127.0.0.1:0",
        "--preload",
        "--log-level",
        "error",
        # What the default leaves in shared memory for a warm restart would stay there.
        "--store",
        str(path.parent / "ome-tensor-store"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the server did not start: {line!r}")
        yield ServerProcess(line.removeprefix("listening on "), process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            if process.stdout is not None:
                process.stdout.close()


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
