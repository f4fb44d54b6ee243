"""Read batches into JAX while it computes: ``python examples/jax_read.py``. Needs the extras ``server`` and ``jax``."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from nuclei_table import write_nuclei_table

from ome_tensor_client import connect
from ome_tensor_client.demo_server import server_process
from ome_tensor_client.jax import device_put_each


@jax.jit
def step(total: jax.Array, pixels: jax.Array, masks: jax.Array) -> jax.Array:
    """Adds up (count, intensity) of pixels inside and outside of nuclei."""
    inside = masks[:, 0] > 0
    values = pixels[:, 0].astype(jnp.float32)
    found = [jnp.stack([chosen.sum(), (values * chosen).sum()]) for chosen in (inside, ~inside)]
    return total + jnp.stack(found)


def main() -> None:
    """Read and print."""
    with tempfile.TemporaryDirectory() as folder:
        table = write_nuclei_table(Path(folder) / "nuclei.ome.parquet")
        with server_process(table) as server, connect(server.target) as client:
            images = client.dataset("nuclei").images("cells")
            batches = images.iter_batches(
                tile_size=(64, 64),
                batch_size=16,
                edge="drop",
                shuffle=True,
                seed=1,
                c=1,
                layout="CYX",
                beside=["nuclei"],
                prefetch=2,
            )
            total, tiles, began = jnp.zeros((2, 2)), 0, time.perf_counter()
            # While a step runs, the next batch is on its way to the device.
            for batch in device_put_each(batches):
                total = step(total, batch.array, batch.beside["nuclei"])
                tiles += len(batch)
            (inside, bright), (outside, dark) = np.asarray(total).tolist()
            seconds = time.perf_counter() - began
    print(f"{tiles} tiles in {seconds:.2f} s on {jax.devices()[0].platform}")
    print(f"DNA inside nuclei {bright / inside:.0f}, outside {dark / outside:.0f} counts a pixel")


if __name__ == "__main__":
    main()
