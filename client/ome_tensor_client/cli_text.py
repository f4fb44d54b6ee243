"""Lines that commands print, without what tables need: a health check imports no more."""

from __future__ import annotations

import errno
import sys
from typing import TextIO

__all__ = ["printable", "say", "stdout"]


def printable(text: str) -> str:
    """Text without control characters: a name in a file must neither break a line nor command a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def stdout() -> TextIO:
    """Where output goes. Raises OSError where the command was started without (``>&-``)."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    return sys.stdout


def say(line: str) -> None:
    """A line on stdout. Buffered: a listing may have a million."""
    stdout().write(line + "\n")
