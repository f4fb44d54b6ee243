"""Datasets for PyTorch over images on a server: exact over ranks, workers and restarts.

>>> from ome_tensor_client.torch import TileDataset, TileLoader
>>> images = connect("localhost:50051").dataset("plate7").images("dna", metadata=["label"])      # doctest: +SKIP
>>> tiles = TileDataset(images, tile_size=(256, 256), batch_size=32, shuffle=True, seed=7)        # doctest: +SKIP
>>> loader = TileLoader(tiles, num_workers=2)                                                    # doctest: +SKIP
>>> for epoch in range(10):                                                                      # doctest: +SKIP
...     loader.set_epoch(epoch)
...     for batch in loader:
...         step(batch["pixels"], batch["label"])
"""

from .loader import TileLoader
from .loader_stats import LoaderStats
from .samplers import RandomWindowSampler, WindowSampler
from .tile_dataset import TileDataset
from .window_dataset import WindowDataset

__all__ = ["LoaderStats", "RandomWindowSampler", "TileDataset", "TileLoader", "WindowDataset", "WindowSampler"]
