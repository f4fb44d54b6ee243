"""Batches as JAX arrays.

>>> from ome_tensor_client.jax import device_put_each
>>> batches = view.iter_batches(tile_size=(256, 256), batch_size=16, prefetch=2)      # doctest: +SKIP
>>> for batch in device_put_each(batches):                                            # doctest: +SKIP
...     step(batch.array)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from ome_tensor.batches import BatchArray, arrays_of, with_arrays
from ome_tensor.staging import jax_each
from ome_tensor.tiling import positive

__all__ = ["device_put_each"]

B = TypeVar("B", bound=BatchArray)


def device_put_each(batches: Iterable[B], device: Any = None, *, depth: int = 2) -> Iterator[B]:
    """The batches of ``iter_batches`` or ``iter_windows`` with their pixels, and what comes beside, as JAX arrays.

    While one batch is used, the next ones are on their way to the device: ``jax.device_put`` does not wait. A batch's memory is nobody
    else's, so on a CPU JAX may use it as it is.

    Args:
        batches: What to take there.
        device: A ``jax.Device`` or sharding; ``None`` for JAX's usual one.
        depth: Batches on their way, positive.

    Raises:
        InvalidArgument: a depth that is none.
        MissingDependency: JAX is not installed.
    """
    size = positive(depth, "depth", "depth must be > 0")
    return jax_each(iter(batches), device, depth=size, arrays=arrays_of, rebuild=with_arrays, private=True)
