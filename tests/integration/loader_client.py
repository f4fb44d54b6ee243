"""A view in the workers of torch's DataLoader. Run as a script: ``loader_client.py TARGET PIXELS.npy CONTEXT STATE``; see fork_client.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ome_tensor import LazyTensorView
from ome_tensor_client import connect

WORKERS = 2


class Tiles(IterableDataset):  # type: ignore[type-arg]
    """Each worker streams its own shard."""

    def __init__(self, view: LazyTensorView) -> None:
        self.view = view

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        worker = get_worker_info()
        for tile in self.view.iter_tiles(
            tile_size=(60, 90), shuffle=True, seed=5, shard=(worker.id, worker.num_workers), prefetch=2
        ):
            yield tile.number, tile.to_torch()


def main(target: str, file: str, context: str, state: str) -> None:
    """Two epochs."""
    pixels = np.load(file)
    with connect(target, timeout=20) as client:
        view = client.tensor_view("image")
        if state == "used":
            np.testing.assert_array_equal(view.to_numpy(), pixels, strict=True)
        loader = DataLoader(Tiles(view), batch_size=None, num_workers=WORKERS, multiprocessing_context=context, timeout=30)
        for _ in range(2):
            found = {number: tensor.numpy().copy() for number, tensor in loader}
            assert sorted(found) == list(range(12))
            for number, tile in found.items():
                y, x = divmod(number, 3)
                np.testing.assert_array_equal(tile, pixels[..., y * 60 :, x * 90 :][..., :60, :90], strict=True)
        np.testing.assert_array_equal(view.select(t=0).to_numpy(), pixels[:1], strict=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
