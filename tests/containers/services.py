"""Servers in containers, and what is known of what they serve."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"
KEY = "idr0062a-6001240.chunks"

SECOND = 1_000_000_000  # Docker's durations are in nanoseconds.

#: How a server runs in these tests unless one says otherwise: confined as the compose file has it, for anybody, and for this host alone.
DEFAULTS: dict[str, Any] = {
    "detach": True,
    "ports": {"50051/tcp": ("127.0.0.1", None)},
    "volumes": {str(DATA): {"bind": "/data", "mode": "ro"}},
    "environment": {"OME_TENSOR_INSECURE": "true"},
    "read_only": True,
    "tmpfs": {"/tmp": ""},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
    # The image's own check, asked more often: a test need not wait five seconds to hear of a server that serves after one.
    "healthcheck": {"interval": SECOND},
}


class Start(Protocol):
    """Starts a container: the image's command or another one, and Docker's options (``image`` is one) over :data:`DEFAULTS`."""

    def __call__(self, *command: str, **options: Any) -> Any: ...


def healthy(container: Any, timeout: float = 60) -> Any:
    """The container, when the image's own health check says so."""
    deadline = time.monotonic() + timeout
    while True:
        container.reload()
        state = container.attrs["State"]
        if state["Status"] == "running" and state["Health"]["Status"] == "healthy":
            return container
        if state["Status"] not in ("created", "running") or time.monotonic() > deadline:
            checks = [check["Output"] for check in state["Health"]["Log"] or []]
            pytest.fail(f"container is {state['Status']}, not healthy: {checks}\n{logs(container)}")
        time.sleep(0.1)


def logs(container: Any) -> str:
    """The last it has said."""
    return str(container.logs().decode()[-4000:])


def target_of(container: Any) -> str:
    """Where a server in a container is reached from outside."""
    (binding,) = container.ports["50051/tcp"]
    return f"{binding['HostIp']}:{binding['HostPort']}"


def free_port() -> int:
    """A port that a container can have again when it is started again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_in(container: Any, *command: str) -> str:
    """What a command in a container prints; it must end well."""
    status, output = container.exec_run(list(command))
    assert status == 0, output.decode()
    return str(output.decode())


def plane_of_file(*, z: int, c: int) -> np.ndarray[Any, Any]:
    """One plane of the example image, put together from its chunks without any of the project's code."""
    (record,) = pq.read_table(DATA / f"{KEY}.ome.parquet").column("ome_arrow").to_pylist()
    meta = record["pixels_meta"]
    plane = np.zeros((meta["size_y"], meta["size_x"]), np.uint16)
    for chunk in record["chunks"]:
        if (chunk["t"], chunk["z"], chunk["c"]) == (0, z, c):
            height, width = chunk["shape_y"], chunk["shape_x"]
            block = np.array(chunk["pixels"], np.uint16).reshape(height, width)
            plane[chunk["y"] : chunk["y"] + height, chunk["x"] : chunk["x"] + width] = block
    return plane
