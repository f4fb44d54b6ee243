"""A client that runs as another user than its server. Run as a script: ``stranger_client.py TARGET``; prints the transport, and why."""

from __future__ import annotations

import os
import sys

# Everything that is used, while this user may still read it.
import numpy as np
import pyarrow.compute  # noqa: F401

import ome_tensor_client.mapping
import ome_tensor_client.remote  # noqa: F401
from ome_tensor_client import connect

NOBODY = 65534

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
with connect(sys.argv[1]) as client:
    pixels = client.tensor_view("image", layout="TZCYX").to_numpy()
    assert isinstance(pixels, np.ndarray)
    transport = client.transports["image"]
    print(f"refused: {transport.kind}, {transport.reason}" if transport.reason else transport.kind)
