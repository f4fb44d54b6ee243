"""The client of an ome-tensor server.

>>> from ome_tensor_client import connect
>>> with connect("localhost:50051") as client:                                    # doctest: +SKIP
...     view = client.tensor_view("plate7/dna/12", t=0)
...     for tile in view.iter_dlpack(tile_size=(256, 256), mode="numpy", prefetch=2):
...         batch = torch.from_dlpack(tile)
"""

from typing import TYPE_CHECKING

from ome_tensor.on_demand import names_on_demand

if TYPE_CHECKING:
    from .client import Client, connect
    from .options import Options
else:
    __getattr__, __dir__ = names_on_demand(__name__, {"Client": "client", "Options": "options", "connect": "client"})

__all__ = ["Client", "Options", "connect"]
