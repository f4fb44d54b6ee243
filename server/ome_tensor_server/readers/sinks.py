"""Files for Arrow to write to by way of Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import IO, Any

__all__ = ["Sink"]


class Sink(ABC):
    """What ``pyarrow.PythonFile`` asks of a file, over one that stays open when Arrow closes this one.

    Args:
        file: The file that is written.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.closed = False

    @abstractmethod
    def write(self, data: Any) -> int:
        """Take all of a buffer. Gives its size in bytes."""

    def flush(self) -> None:
        """Hand on what is held back."""
        self._file.flush()

    def tell(self) -> int:
        """Where the next byte goes."""
        return self._file.tell()

    def close(self) -> None:
        """Arrow is through."""
        self.closed = True
