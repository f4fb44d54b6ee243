"""The container image and the compose file, on a real engine."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ome_tensor_client import connect

ROOT = Path(__file__).resolve().parents[2]
KEY = "idr0062a-6001240.chunks"

# The first test to run pays for the build.
pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]


def published(server: Any) -> str:
    """Where a server in a container is reached from outside."""
    (binding,) = server.ports["50051/tcp"]
    return f"{binding['HostIp']}:{binding['HostPort']}"


def plane_of_file(*, z: int, c: int) -> np.ndarray[Any, Any]:
    """One plane of the example image, put together from its chunks without any of the project's code."""
    (record,) = pq.read_table(ROOT / "examples" / "data" / f"{KEY}.ome.parquet").column("ome_arrow").to_pylist()
    meta = record["pixels_meta"]
    plane = np.zeros((meta["size_y"], meta["size_x"]), np.uint16)
    for chunk in record["chunks"]:
        if (chunk["t"], chunk["z"], chunk["c"]) == (0, z, c):
            height, width = chunk["shape_y"], chunk["shape_x"]
            block = np.array(chunk["pixels"], np.uint16).reshape(height, width)
            plane[chunk["y"] : chunk["y"] + height, chunk["x"] : chunk["x"] + width] = block
    return plane


def test_pixels_read_through_a_published_port_are_those_of_the_file(server: Any) -> None:
    with connect(published(server)) as client:
        assert [dataset.name for dataset in client.datasets()] == [KEY]
        pixels = client.tensor_view(KEY, t=0, z=3, c=1, layout="YX").to_numpy()
    np.testing.assert_array_equal(pixels, plane_of_file(z=3, c=1))


def test_the_server_is_not_root(server: Any) -> None:
    status, output = server.exec_run(["id", "-u"])
    assert (status, output.decode().strip()) == (0, "10001")
    # PID 1 is the server itself, so that signals reach it.
    _, identity = server.exec_run(["cat", "/proc/1/status"])
    assert b"\nUid:\t10001\t10001\t10001\t10001\n" in identity


def test_the_image_holds_neither_a_training_framework_nor_pip(server: Any) -> None:
    found = "import importlib.util as u; print([n for n in ('jax', 'pip', 'torch') if u.find_spec(n)])"
    status, output = server.exec_run(["python", "-c", found])
    assert (status, output.decode().strip()) == (0, "[]")


def test_sigterm_ends_the_server_at_once_and_cleanly(start_server: Callable[[], Any]) -> None:
    container = start_server()
    began = time.monotonic()
    container.kill("SIGTERM")
    status = container.wait(timeout=30)["StatusCode"]
    assert status == 0, container.logs().decode()[-4000:]
    # Nothing is running that would have to be waited for.
    assert time.monotonic() - began < 10


def test_compose_brings_up_a_server_and_a_client_that_reads_from_it(compose: list[str], image: str, base_image: str) -> None:
    project = [*compose, "--project-name", f"ome-tensor-test-{uuid.uuid4().hex[:8]}"]
    environment = os.environ | {
        "BASE_IMAGE": base_image,
        "PIP_NO_INDEX": "1",
        "OME_TENSOR_IMAGE": image,
        "OME_TENSOR_PORT": "0",  # any free one
        # The classic builder, whose cache holds what the fixture built.
        "COMPOSE_DOCKER_CLI_BUILD": "0",
        "DOCKER_BUILDKIT": "0",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*project, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    try:
        # Its exit status is the client's, and the client starts only once the server is healthy.
        up = run("up", "--build", "--exit-code-from", "client")
        assert up.returncode == 0, up.stdout[-4000:] + up.stderr[-4000:]
    finally:
        down = run("down", "--volumes")
    assert down.returncode == 0, down.stderr
