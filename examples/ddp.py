"""Two ranks train together on one server's images: ``python examples/ddp.py``. Needs the extras ``server`` and ``torch``.

Each rank reads its own part of every epoch. The run is stopped in the middle of an epoch, and a single process goes on with what is left of it:
every sample
of the epoch is seen once, whoever sees it.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nuclei_table import write_nuclei_table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ome_tensor_client import connect
from ome_tensor_client.demo_server import server_process
from ome_tensor_client.torch import TileDataset, TileLoader


def loader_of(target: str, shard: tuple[int, int] | None = None) -> TileLoader:
    """This rank's part: torch.distributed is asked who that is, unless told."""
    images = connect(target).dataset("nuclei").images("cells")
    dataset = TileDataset(
        images, tile_size=(64, 64), batch_size=8, shuffle=True, seed=3, c=0, layout="CYX", beside={"mask": "nuclei"}, shard=shard
    )
    return TileLoader(dataset)


def train(rank: int, ranks: int, port: int, target: str, folder: str, steps: int) -> None:
    """One rank: a whole epoch, and then some steps of the next."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = DistributedDataParallel(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    criterion = nn.BCEWithLogitsLoss()
    loader = loader_of(target)
    tiles: list[list[int]] = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        tiles.append([])
        # Ranks may differ by a batch; whoever is done first stands in for the rest.
        with model.join():
            for step, batch in enumerate(loader):
                loss = criterion(model(batch["pixels"] / 1000), batch["mask"].float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                tiles[-1] += batch["tile"].tolist()
                if epoch == 1 and step + 1 == steps:
                    break
        print(f"rank {rank}, epoch {epoch}: {len(tiles[-1])} tiles, loss {loss.item():.3f}", flush=True)
    torch.save({"loader": loader.state_dict(), "tiles": tiles}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Train, stop, go on, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="of the second epoch, before the run is stopped")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = write_nuclei_table(Path(folder) / "nuclei.ome.parquet")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with server_process(table) as server:
            mp.spawn(train, (options.ranks, port, server.target, folder, options.steps), options.ranks)
            saved: list[dict[str, Any]] = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(options.ranks)]
            loader = loader_of(server.target, shard=(0, 1))
            loader.load_state_dict([one["loader"] for one in saved])
            rest = [tile for batch in loader for tile in batch["tile"].tolist()]
            print(f"one process goes on with epoch {loader.epoch}: {len(rest)} tiles")
            dataset = loader.dataset
            assert isinstance(dataset, TileDataset)
            for epoch, more in ((0, []), (1, rest)):
                seen = Counter([tile for one in saved for tile in one["tiles"][epoch]] + more)
                if seen != Counter(range(dataset.total)):
                    raise SystemExit(f"epoch {epoch}: not every tile was seen exactly once")
                print(f"epoch {epoch}: each of {dataset.total} tiles was seen exactly once")


if __name__ == "__main__":
    main()
