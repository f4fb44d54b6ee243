"""A client that is killed in the middle of a read. Run as a script: ``vanishing_client.py TARGET KEY PREFETCH``."""

from __future__ import annotations

import signal
import sys

from ome_tensor_client import connect


def main(target: str, key: str, prefetch: str) -> None:
    """Read one tile of many, and wait."""
    tiles = connect(target).tensor_view(key).iter_tiles(tile_size=(64, 64), prefetch=int(prefetch))
    next(tiles)
    print("reading", flush=True)
    signal.pause()  # Whoever started this kills it now.


if __name__ == "__main__":
    main(*sys.argv[1:])
