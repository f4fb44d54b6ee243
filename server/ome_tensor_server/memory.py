"""Keeping freed blocks: a server fills and frees messages of about a MiB all day, and fresh pages cost more than the copy into them."""

from __future__ import annotations

import ctypes

__all__ = ["keep_blocks"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

#: glibc takes no larger threshold; messages are far below it.
_MMAP_THRESHOLD = 32 << 20
_KEEP = 256 << 20
_TOP_PAD = 16 << 20


def keep_blocks() -> bool:
    """Tell glibc to reuse blocks up to 32 MiB instead of returning them to the system page by page.

    Changes the whole process, so only a server's own process calls it. The container image sets the same by environment (``MALLOC_*``).

    Returns:
        Whether the C library took it (one that is not glibc has no ``mallopt``).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in ((_M_MMAP_THRESHOLD, _MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _KEEP), (_M_TOP_PAD, _TOP_PAD))
    )
