"""All benchmarks, one after the other, each in a process of its own so that none measures another's memory."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

_ALL = ("engine", "stream", "wire", "imports")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones ({', '.join(_ALL)}); default all")
    parser.add_argument(
        "--quick", action="store_true", help="small data, one round: shows that they work, not how fast anything is"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if unknown := set(options.names) - set(_ALL):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(_ALL)}")
    flags = (["--quick"] if options.quick else []) + (["--json", str(options.json)] if options.json else [])
    failed = [
        name
        for name in options.names or _ALL
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=False).returncode
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
