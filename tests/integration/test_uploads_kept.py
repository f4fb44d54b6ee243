"""Uploads and the disk: none is lost because it is not served just now, and a full disk is said to be one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.integration.images import random_pixels

from ome_tensor import InvalidArgument
from ome_tensor_client import connect
from ome_tensor_server.testing import running_server

_FULL = """
import numpy as np, os
from ome_tensor_client import connect
from ome_tensor_server.testing import running_server
with running_server([], uploads="/dev/shm/uploads") as server, connect(server.target) as client:
    try:
        client.upload("up", np.random.default_rng(0).integers(0, 255, (2000, 2000)).astype(np.uint8))
    except Exception as error:
        print(type(error).__name__, "disk is full" in str(error))
print(os.listdir("/dev/shm/uploads"))
"""


def test_an_upload_that_is_not_served_is_not_lost(tmp_path: Path) -> None:
    """Another dataset had its name when the server started: whoever does not say replace does not replace it."""
    uploads, path = str(tmp_path / "uploads"), tmp_path / "x.npy"
    first, second = random_pixels((1, 1, 1, 4, 5), seed=1), random_pixels((1, 1, 1, 4, 5), seed=2)
    with running_server([], uploads=uploads) as server, connect(server.target) as client:
        client.upload("x", first)
    np.save(path, random_pixels((3, 3)))
    with running_server([path], uploads=uploads) as server, connect(server.target) as client:
        client.admin.remove("x")
        with pytest.raises(InvalidArgument, match="is not served now"):
            client.upload("x", second)
    with running_server([], uploads=uploads) as server, connect(server.target) as client:
        np.testing.assert_array_equal(client.tensor_view("x", layout="TZCYX").to_numpy(), first, strict=True)
    with running_server([path], uploads=uploads) as server, connect(server.target) as client:
        client.admin.remove("x")
        client.upload("x", second, replace=True)
        np.testing.assert_array_equal(client.tensor_view("x", layout="TZCYX").to_numpy(), second, strict=True)


def test_a_full_disk_is_said_to_be_one() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    mount = 'mount -t tmpfs -o size=2m tmpfs /dev/shm || exit 99; exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", _FULL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode == 99 or "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"no small file system to be had: {done.stderr.strip()}")
    assert done.stdout.splitlines() == ["Overloaded True", "['.ome-tensor-uploads']"], done.stderr
