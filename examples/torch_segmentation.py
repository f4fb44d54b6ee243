"""Train a small U-Net to find nuclei: ``python examples/torch_segmentation.py``. On a CPU, in about a minute.

A server keeps a table of the example image's planes: its two channels, and a mask of the nuclei made from the DNA channel. The network sees
only the other
channel, the nuclei's envelopes, and learns where the nuclei are. Batches of image and mask come together, aligned, from the server. Needs the extras
``server`` and ``torch``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from nuclei_table import write_nuclei_table
from torch import nn

from ome_tensor_client import connect
from ome_tensor_client.demo_server import server_process
from ome_tensor_client.torch import RandomWindowSampler, TileDataset, TileLoader, WindowDataset


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Two levels deep (Ronneberger et al. 2015, arXiv:1505.04597)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(1, width), _block(width, 2 * width)])
        self.bottom = _block(2 * width, 4 * width)
        self.up = nn.ModuleList([_block(6 * width, 2 * width), _block(3 * width, width)])
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Of each pixel (N, 1, H, W), how likely it is of a nucleus, as a logit."""
        kept = []
        for block in self.down:
            pixels = block(pixels)
            kept.append(pixels)
            pixels = nn.functional.max_pool2d(pixels, 2)
        pixels = self.bottom(pixels)
        for block in self.up:
            pixels = nn.functional.interpolate(pixels, scale_factor=2.0)
            pixels = block(torch.cat([pixels, kept.pop()], 1))
        return self.out(pixels)


def prepared(batch: dict[str, Any]) -> dict[str, Any]:
    """In the worker, before a batch is handed out: each window's own contrast, and the mask as the loss wants it."""
    pixels = batch["pixels"]
    middle, spread = pixels.mean((2, 3), keepdim=True), pixels.std((2, 3), keepdim=True)
    return batch | {"pixels": (pixels - middle) / (spread + 1), "mask": batch["mask"].float()}


def overlap(model: nn.Module, loader: TileLoader) -> float:
    """How much of the nuclei that are there or are found is both (intersection over union)."""
    both = either = 0.0
    with torch.no_grad():
        for batch in loader:
            found, true = model(batch["pixels"]) > 0, batch["mask"] > 0
            both += float((found & true).sum())
            either += float((found | true).sum())
    return both / either


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--windows", type=int, default=512, help="random windows an epoch")
    parser.add_argument("--workers", type=int, default=0, help="processes that read; 0: a thread of this one")
    options = parser.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table = write_nuclei_table(Path(folder) / "nuclei.ome.parquet")
        with server_process(table) as server, connect(server.target) as client:
            dataset = client.dataset("nuclei")
            # Whole planes are held back, by a filter that the server applies.
            train, test = dataset.images("cells", [("z", "<", 13)]), dataset.images("cells", [("z", ">=", 13)])
            common: dict[str, Any] = {"c": 0, "layout": "CYX", "beside": {"mask": "nuclei"}, "transform": prepared}
            # A mask has one channel, and the image two: masks are cut with channel 0, too.
            windows = WindowDataset(train, (96, 96), **common)
            sampler = RandomWindowSampler(windows, options.windows, seed=1)
            loader = TileLoader(windows, batch_size=16, sampler=sampler, num_workers=options.workers)
            held = TileLoader(TileDataset(test, tile_size=(96, 96), edge="drop", batch_size=8, **common))

            model = UNet()
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            criterion = nn.BCEWithLogitsLoss()
            first = last = 0.0
            for epoch in range(options.epochs):
                loader.set_epoch(epoch)
                losses = []
                for batch in loader:
                    loss = criterion(model(batch["pixels"]), batch["mask"])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
                last = sum(losses) / len(losses)
                first = first or last
                stats = loader.stats()
                print(
                    f"epoch {epoch}: loss {last:.3f}; {stats.samples_per_second:.0f} tiles/s, starving {stats.starving:.1%} of the time",
                    flush=True,
                )
            print(f"loss {first:.3f} -> {last:.3f}; nuclei of planes it has not seen: IoU {overlap(model, held):.2f}")
            print(loader.stats())
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
