"""A client that writes into everything it can reach of a mapped dataset. Run as a script: ``writing_client.py TARGET``."""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from ome_tensor_client import connect

with connect(sys.argv[1], transport="mapped") as client:
    view = client.tensor_view("image", layout="TZCYX")
    # What a view hands out, as torch takes it: without regard for a guard.
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.from_dlpack(view.to_dlpack(mode="numpy")).fill_(7)
        for tile in client.tensor_view("image").iter_dlpack(tile_size=(32, 32), mode="numpy"):
            torch.from_dlpack(tile).zero_()
    # And the mapping itself, past all guards: every byte of every image.
    table = client._connection.mapped.table("image")
    for column in table.columns.values():
        for chunk in column._chunks:
            for buffer in chunk.buffers():
                if buffer is not None and buffer.size:
                    np.ctypeslib.as_array((ctypes.c_ubyte * buffer.size).from_address(buffer.address))[...] ^= 0xFF
print("written")
