"""One rank's part of one epoch, read from whichever servers are well. A training would step where this counts."""

import os

from ome_tensor_client import connect
from ome_tensor_client.torch import TileDataset, TileLoader

rank, ranks = int(os.environ["JOB_COMPLETION_INDEX"]), int(os.environ["RANKS"])
with connect(os.environ["SERVERS"].split(","), ca=os.environ["CA"], token_file=os.environ["TOKEN_FILE"]) as client:
    images = client.dataset(os.environ["DATASET"]).images(os.environ["COLUMN"])
    tiles = TileDataset(images, tile_size=(64, 64), batch_size=8, shuffle=True, seed=7, shard=(rank, ranks))
    seen = sum(len(batch["pixels"]) for batch in TileLoader(tiles, num_workers=0))
print(f"rank {rank} of {ranks} has seen {seen} tiles", flush=True)
