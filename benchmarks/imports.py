"""What ``from ome_tensor_client import connect`` costs, and what it must not bring in."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from .report import environment, number, print_table, write_json

__all__ = ["HEAVY", "ImportTime", "main", "run"]

#: Packages of tens to hundreds of milliseconds, or of another room: a client that only talks to a server needs none of them.
HEAVY = frozenset(
    "IPython PIL jax jaxlib matplotlib ome_arrow ome_tensor_server pandas rich scipy tifffile torch typer zarr".split()
)
#: Named in the table: what the client stands on.
_PARTS = ("numpy", "pyarrow", "grpc", "google")


@dataclass(frozen=True)
class ImportTime:
    """One run.

    Attributes:
        total_ms: The whole import.
        parts_ms: What of that is a dependency's own modules, wherever they were imported from.
        packages: All packages imported.
    """

    total_ms: float
    parts_ms: dict[str, float]
    packages: frozenset[str]


_STATEMENT = "from ome_tensor_client import connect"


def import_time() -> ImportTime:
    """Import the client in a fresh interpreter, watched by the interpreter's own clock."""
    code = f"import time; began = time.perf_counter(); {_STATEMENT}; print((time.perf_counter() - began) * 1e3)"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], check=True, capture_output=True, text=True)
    own: dict[str, float] = {}
    for line in done.stderr.splitlines():
        if not line.startswith("import time:") or "[us]" in line:
            continue
        self_us, _, name = (part.strip() for part in line.removeprefix("import time:").split("|"))
        package = name.partition(".")[0]
        own[package] = own.get(package, 0.0) + float(self_us) / 1e3
    return ImportTime(float(done.stdout), {part: own.get(part, 0.0) for part in _PARTS}, frozenset(own))


def run(*, repeats: int = 11) -> ImportTime:
    """Medians over some runs.

    Raises:
        AssertionError: a heavy package was imported.
    """
    runs = [import_time() for _ in range(repeats)]
    packages = frozenset().union(*(one.packages for one in runs))
    if heavy := packages & HEAVY:
        raise AssertionError(f"ome_tensor_client imports {', '.join(sorted(heavy))}")
    parts = {part: median(one.parts_ms[part] for one in runs) for part in _PARTS}
    return ImportTime(median(one.total_ms for one in runs), parts, packages)


def show(found: ImportTime) -> None:
    """Print the table."""
    rest = found.total_ms - sum(found.parts_ms.values())
    print_table(
        f"{_STATEMENT}; " + ", ".join(f"{name} {what}" for name, what in environment().items() if name != "ome-arrow"),
        ("what", "ms"),
        [
            (f"{_STATEMENT} (no heavy package)", number(found.total_ms)),
            *((f"  of that {part}", number(ms)) for part, ms in found.parts_ms.items()),
            ("  of that this project and the standard library", number(rest)),
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imports", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    found = run(repeats=1 if options.quick else 11)
    show(found)
    if options.json:
        write_json(options.json, "imports", asdict(found) | {"packages": sorted(found.packages)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
