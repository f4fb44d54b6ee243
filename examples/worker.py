"""A training worker on a machine of its own: ``python examples/worker.py images.lab:50051 plate7``. Needs the extra ``torch``.

It reads one image's planes from a server elsewhere and teaches a small network to draw them through a narrow place (an autoencoder). What it needs to
know of the server it takes from the variables that the command line takes it from: ``OME_TENSOR_CLIENT_CA``, ``OME_TENSOR_CLIENT_TOKEN_FILE``. With
``--state FILE`` it can be killed at any time, and goes on with the next sample.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import nn

from ome_tensor_client import connect
from ome_tensor_client.torch import TileDataset, TileLoader

SIZE = 64


def network(width: int = 16) -> nn.Module:
    """Sixteen numbers for each 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 8, stride=8),
        nn.ReLU(),
        nn.Conv2d(width, 4 * width, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * width, 1, 8, stride=8),
    )


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="HOST:PORT, or several with commas between them")
    parser.add_argument("key", help="a dataset of one image")
    parser.add_argument("--channel", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--state", type=Path, help="where to keep what it takes to go on")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    begin = 0
    with connect(
        options.target,
        ca=os.environ.get("OME_TENSOR_CLIENT_CA", ""),
        token_file=os.environ.get("OME_TENSOR_CLIENT_TOKEN_FILE", ""),
        retry_for=60,  # A server that is being replaced comes back.
    ) as client:
        view = client.tensor_view(options.key, c=options.channel, layout="TZYX")
        tiles = TileDataset(view, tile_size=(1, SIZE, SIZE), edge="pad", batch_size=16, shuffle=True, seed=1)
        loader = TileLoader(tiles)
        if options.state and options.state.exists():
            state = torch.load(options.state)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            loader.load_state_dict(state["loader"])
            begin = state["epoch"]
            print(f"going on in epoch {begin}")
        for epoch in range(begin, options.epochs):
            loader.set_epoch(epoch)
            losses = []
            for batch in loader:
                pixels = batch["pixels"].reshape(-1, 1, SIZE, SIZE)
                pixels = (pixels - pixels.mean()) / (pixels.std() + 1)
                loss = nn.functional.mse_loss(model(pixels), pixels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                if options.state:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
                    scratch = options.state.with_suffix(".new")
                    torch.save(state | {"epoch": epoch}, scratch)
                    scratch.replace(options.state)
            if not losses:
                continue  # It had been at the end of this one.
            stats = loader.stats()
            print(
                f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}; {stats.samples_per_second:.0f} tiles/s, "
                f"starving {stats.starving:.1%} of the time",
                flush=True,
            )
        print(loader.stats())


if __name__ == "__main__":
    main()
