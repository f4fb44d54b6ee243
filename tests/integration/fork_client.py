"""A client that goes on in other processes. Run as a script: ``fork_client.py TARGET PIXELS.npy CONTEXT STATE [TRANSPORT]``.

``CONTEXT`` is multiprocessing's start method. ``STATE`` is what the parent's client has done by then: ``fresh`` nothing, ``used`` reads, ``closed``
reads and was closed, ``midstream`` and ``prefetching`` have a read in progress that goes on afterwards.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from typing import Any

import numpy as np

from ome_tensor import LazyTensorView
from ome_tensor_client import Client, connect

CHILDREN = 3
SECONDS = 30


def check(view: LazyTensorView, pixels: np.ndarray) -> None:
    """The view is right in every way of reading it."""
    np.testing.assert_array_equal(view.to_numpy(), pixels, strict=True)
    seen = 0
    for tile in view.iter_tiles(tile_size=(60, 90), prefetch=2):
        _, _, y, x = tile.origin
        np.testing.assert_array_equal(tile.array, pixels[..., y : y + 60, x : x + 90], strict=True)
        seen += 1
    assert seen == 12


def child(client: Client, view: LazyTensorView, file: str) -> None:
    """With a client and a view that came from the parent."""
    pixels = np.load(file)
    check(view, pixels)
    check(client.tensor_view("image"), pixels)


def main(target: str, file: str, context: str, state: str, transport: str = "auto") -> None:
    """Prepare the parent, start children, and see that both can go on."""
    pixels = np.load(file)
    client = connect(target, timeout=20, transport=transport)
    view = client.tensor_view("image")
    assert pickle.loads(pickle.dumps(client)).target == target
    if state != "fresh":
        check(client.tensor_view("image"), pixels)
        assert view.shape == pixels.shape
    if state == "closed":
        client.close()
    running: Any = iter(())
    if state in ("midstream", "prefetching"):
        running = client.tensor_view("image").iter_tiles(tile_size=(3, 3), prefetch=2 * (state == "prefetching"))
        next(running)

    processes = multiprocessing.get_context(context)
    children = [processes.Process(target=child, args=(client, view, file)) for _ in range(CHILDREN)]
    for process in children:
        process.start()
    for process in children:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in children] == [0] * CHILDREN
    rest = sum(1 for _ in running)
    assert rest == (80 * 90 - 1 if state in ("midstream", "prefetching") else 0)
    check(client.tensor_view("image"), pixels)
    client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
