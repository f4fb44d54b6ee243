"""How much memory a server may fill with datasets."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ome_tensor.errors import InvalidArgument

__all__ = ["human_bytes", "machine_memory", "parse_size"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?", re.IGNORECASE)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")

#: Files in which a control group's limit stands: version 2, version 1. Within a container they are the container's own.
_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process could use: the machine's, or its control group's where that allows less.

    Args:
        root: Where the file system begins.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _LIMITS:
        try:
            memory = min(memory, int((root / name).read_text()))
        except (OSError, ValueError):
            continue  # Another version, or "max": no limit.
    return memory


def parse_size(text: str, name: str, whole: int) -> int:
    """Bytes that a text means: ``2G``, ``512 MiB``, ``1500000000``, or ``60%`` of ``whole``. Units are powers of 1,024.

    Raises:
        InvalidArgument: it means none, or 0.
    """
    percent = _PERCENT.fullmatch(text.strip())
    found = _SIZE.fullmatch(text.strip())
    size = 0
    if percent is not None and float(percent[1]) <= 100:
        size = int(whole * float(percent[1]) / 100)
    elif found is not None:
        size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size <= 0:
        raise InvalidArgument(f"{name} must be a size such as 2G, 512M or 60%, not {text!r}", field=name, value=text)
    return size


def human_bytes(count: int) -> str:
    """A number of bytes for a person."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{value:.4g} {unit}"
