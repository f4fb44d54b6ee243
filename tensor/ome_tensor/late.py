"""Arrow buffers that are made only while they are written: pixels that memory has no room for, or that need not be there twice."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import pyarrow as pa

__all__ = ["NORESERVE", "is_late", "late_buffer"]

#: Of mmap: memory that nobody touches takes no room. Python knows the flag by name from 3.13 on; the number is Linux's.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def late_buffer(size: int) -> pa.Buffer:
    """A place holder of so many bytes that takes no memory. Raises OSError, OverflowError where there cannot be as many."""
    if size == 0:
        return pa.py_buffer(b"")
    return pa.py_buffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE, prot=mmap.PROT_READ))


def is_late(data: Any, late: pa.Buffer) -> bool:
    """Whether what Arrow writes is a place holder: then its bytes are to be written instead."""
    return bool(memoryview(data).nbytes) and pa.py_buffer(data).address == late.address
