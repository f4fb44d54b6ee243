# %% [markdown]
# # ome-tensor in five minutes
#
# Run it cell by cell (VS Code, Spyder and Jupyter with jupytext know the `# %%`), or as a whole: `python examples/quickstart.py`.
# It needs the extra `server`, and the last cells `torch`.

# %% A server of the example image, in a process of its own. `ome-tensor serve examples/data` does the same.
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ome_tensor_client import connect
from ome_tensor_client.demo_server import server_process

stack = ExitStack()
data = Path(__file__).parent / "data" / "idr0062a-6001240.chunks.ome.parquet"
server = stack.enter_context(server_process(data))
client = stack.enter_context(connect(server.target))

# %% What does it have?
for dataset in client.datasets():
    print(dataset.name, dataset.format, dataset.state)
image = client.image(dataset.name)
print(image.key, image.meta.extent, image.meta.dtype)

# %% A lazy view: what it shows is known after one small call, its pixels are read when they are needed.
view = client.tensor_view(image.key, t=0, c=1)
print(view.shape, view.layout, view.dtype)
plane = view[0, 8].to_numpy()
print("brightest pixel of plane 8:", plane.max())

# %% Tiles, in one stream. They come while you work; an order is a seed.
tiles = list(view.iter_tiles(tile_size=(128, 128), edge="pad", shuffle=True, seed=7, prefetch=2))
print(len(tiles), "tiles; the first is number", tiles[0].number, "at", tiles[0].origin)
assert sorted(tile.number for tile in tiles) == list(range(len(tiles)))

# %% Batches are made on the server: each is one tensor, and the received message itself.
for batch in view.iter_batches(tile_size=(4, 64, 64), batch_size=8, shuffle=True, seed=7):
    array = np.from_dlpack(batch)
print("a batch:", array.shape, array.dtype)

# %% For PyTorch: an epoch, exactly once, over any number of workers and ranks.
from ome_tensor_client.torch import TileDataset, TileLoader  # noqa: E402

loader = TileLoader(TileDataset(view, tile_size=(4, 64, 64), batch_size=8, shuffle=True, seed=7))
seen = []
for step, batch in enumerate(loader):
    seen += batch["tile"].tolist()
    if step == 4:
        state = loader.state_dict()  # a checkpoint: microseconds, and nothing that was read ahead is lost
        break
loader.load_state_dict(state)
for batch in loader:
    seen += batch["tile"].tolist()
assert sorted(seen) == list(range(loader.dataset.total))
print(len(seen), "tiles, each exactly once, with a restart in the middle")
print(loader.stats())

# %% The end.
stack.close()
