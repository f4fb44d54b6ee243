"""Processes of a benchmark's own that it talks with over pipes."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["PATIENCE", "Child", "sleep_until"]

#: How long a process may take to answer beyond what it was asked to take, and to end.
PATIENCE, _STOP_SECONDS = 60.0, 10.0


@dataclass(frozen=True)
class _Failed:
    """A child's answer where it failed."""

    why: str


class Child:
    """A process of a benchmark's: talks over a pipe, and ends when the pipe is closed, by :meth:`close` or because its parent is gone.

    Args:
        work: Called in it with the other end of the pipe and the arguments.
        arguments: What it needs; pickled.

    Attributes:
        pid: The process.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_guarded, args=(there, work, arguments), daemon=True)
        self._process.start()
        there.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def tell(self, what: Any) -> None:
        """Send it something."""
        self._pipe.send(what)

    def answer(self, within: float = 0.0) -> Any:
        """What it sends, waited for that many seconds and some patience. Raises RuntimeError with its traceback where it failed."""
        if not self._pipe.poll(within + PATIENCE):
            raise RuntimeError(f"process {self.pid} has not answered within {within + PATIENCE:g} s")
        try:
            found = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"process {self.pid} died") from None
        if isinstance(found, _Failed):
            raise RuntimeError(found.why)
        return found

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _guarded(pipe: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        work(pipe, *arguments)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        pass  # the parent is through with it
    except BaseException:
        pipe.send(_Failed(f"{work.__name__}: {traceback.format_exc()}"))


def sleep_until(moment: float) -> None:
    """Until then, by the clock that all processes share."""
    time.sleep(max(0.0, moment - time.monotonic()))
