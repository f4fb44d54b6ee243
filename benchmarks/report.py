"""Tables, and the environment that figures were measured in."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["environment", "number", "print_table", "write_json", "yes_no"]

_PACKAGES = ("ome-arrow", "numpy", "pyarrow", "grpcio", "protobuf")


def environment() -> dict[str, str]:
    """What figures depend on: cores, Python, packages."""
    found = {"cores": str(len(os.sched_getaffinity(0))), "machine": platform.machine(), "python": platform.python_version()}
    return found | {name: version(name) for name in _PACKAGES}


def number(value: float | None, digits: int = 3) -> str:
    """A figure for reading: ``digits`` significant digits, thousands apart, nothing for ``None``."""
    if value is None:
        return ""
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def yes_no(met: bool | None) -> str:
    """Whether a bar is met; nothing where there is none."""
    return "" if met is None else "yes" if met else "NO"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that reads in a terminal and is Markdown too."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    print(f"\n{title}\n")
    for line in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")
    print(flush=True)


def write_json(path: Path, name: str, figures: Any) -> None:
    """Figures into a file, beside those of other benchmarks that are there already."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= {"environment": environment(), name: figures}
    path.write_text(json.dumps(found, indent=2) + "\n")
