"""What is in the image, and what a container of it is and is not."""

from __future__ import annotations

import re
import time
import tomllib
from typing import Any

import numpy as np
import pytest
from tests.containers.services import KEY, ROOT, SECOND, Start, healthy, logs, plane_of_file, run_in, target_of
from tests.integration.processes import wait_until

from ome_tensor_client import connect

# The first test to run pays for the build.
pytestmark = [pytest.mark.containers, pytest.mark.timeout(900)]


def test_pixels_read_through_a_published_port_are_those_of_the_file(server: Any) -> None:
    with connect(target_of(server)) as client:
        assert [dataset.name for dataset in client.datasets()] == [KEY]
        pixels = client.tensor_view(KEY, t=0, z=3, c=1, layout="YX").to_numpy()
    np.testing.assert_array_equal(pixels, plane_of_file(z=3, c=1))


def test_it_is_healthy_within_ten_seconds(start: Start) -> None:
    """By the image's own check, as often as the image has it."""
    began = time.monotonic()
    healthy(start(healthcheck=None), 10)
    print(f"healthy after {time.monotonic() - began:.1f} s")


def test_the_server_is_not_root(server: Any) -> None:
    assert run_in(server, "id", "-u", "-n").strip() == "ome-tensor"
    for process in run_in(server, "sh", "-c", "cat /proc/[0-9]*/status").split("Name:")[1:]:
        assert "\nUid:\t10001\t10001\t10001\t10001\n" in process
        assert "\nCapEff:\t0000000000000000\n" in process
        assert "\nNoNewPrivs:\t1\n" in process


def test_the_image_holds_what_runs_and_nothing_else(server: Any) -> None:
    """No training framework, nothing to install or to compile with, no packages' cache."""
    found = "import importlib.util as u; print([n for n in ('jax', 'pip', 'torch', 'hatchling', 'pytest') if u.find_spec(n)])"
    assert run_in(server, "python", "-c", found).strip() == "[]"
    named = "gcc cc g++ c++ make git curl wget"
    assert run_in(
        server, "sh", "-c", f"for one in {named}; do command -v $one; done; ls -A /root /src /dist 2>/dev/null; true"
    ) in ("", "/root:\n")
    # Every dependency is there, in a version that fits.
    assert "zarr" in run_in(
        server, "python", "-c", "import tifffile, zarr, jwt, opentelemetry, imagecodecs; print(zarr.__name__)"
    )


def test_its_labels_say_what_it_is(engine: Any, image: str) -> None:
    labels = engine.images.get(image).labels
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert labels["org.opencontainers.image.version"] == version
    assert labels["org.opencontainers.image.licenses"] == "BSD-3-Clause"
    assert labels["org.opencontainers.image.title"] == "ome-tensor"


def test_images_are_small(engine: Any, image: str, base_image: str) -> None:
    """What the project puts on top of its base; a framework, or a forgotten cache, would show."""
    size, base = (engine.images.get(name).attrs["Size"] for name in (image, base_image))
    print(f"server {size / 1e6:.0f} MB, of which base {base / 1e6:.0f} MB")
    assert size - base < 600e6


def test_the_file_system_is_read_only(server: Any) -> None:
    """But for the store, and for what is forgotten."""
    for folder in ("/", "/opt/ome-tensor", "/data", "/etc"):
        status, output = server.exec_run(["touch", f"{folder}/new"])
        assert status != 0
        assert b"Read-only file system" in output or b"Permission denied" in output
    run_in(server, "touch", "/tmp/new", "/var/lib/ome-tensor/new")
    run_in(server, "rm", "/tmp/new", "/var/lib/ome-tensor/new")


def test_nothing_listens_that_is_not_declared(start: Start, engine: Any, image: str) -> None:
    """Also with everything on that could listen, and several workers."""
    environment = {"OME_TENSOR_INSECURE": "true", "OME_TENSOR_METRICS": "0.0.0.0:9464", "OME_TENSOR_WORKERS": "2"}
    container = healthy(start(environment=environment))
    declared = {int(port.partition("/")[0]) for port in engine.images.get(image).attrs["Config"]["ExposedPorts"]}
    listening = set()
    for line in run_in(container, "sh", "-c", "cat /proc/net/tcp /proc/net/tcp6").splitlines():
        # https://www.kernel.org/doc/html/latest/networking/proc_net_tcp.html: 0A is TCP_LISTEN.
        if (match := re.match(r"\s*\d+: [0-9A-F]+:([0-9A-F]{4}) \S+ 0A ", line)) is not None:
            listening.add(int(match[1], 16))
    assert listening == declared == {50051, 9464}


def test_orphans_are_buried(server: Any) -> None:
    """What a command in the container leaves behind belongs to PID 1."""

    def is_there() -> bool:
        return "sleep" in run_in(server, "sh", "-c", "cat /proc/[0-9]*/comm")

    run_in(server, "sh", "-c", "(sleep 5 &) ; exit 0")
    assert is_there()
    # A zombie has a name, too.
    wait_until(lambda: not is_there(), "it is buried", 30)


def test_a_server_that_may_not_start_says_why(start: Start) -> None:
    """Without a certificate it serves nobody beyond its container."""
    container = start(environment={})
    assert container.wait(timeout=30)["StatusCode"] == 1
    said = logs(container)
    assert said.startswith("error: OME_TENSOR_LISTEN '0.0.0.0:50051' reaches beyond this host")
    assert "Traceback" not in said


def test_the_command_line_is_in_it(engine: Any, image: str) -> None:
    help_text = engine.containers.run(image, ["--help"], remove=True, network_mode="none").decode()
    assert "certificate" in help_text
    assert "serve" in help_text


def test_the_clients_image(engine: Any, client_image: str, base_image: str) -> None:
    """PyTorch and the client work, as another user than root and without a place to write to; the server's part is not needed."""
    size, base = (engine.images.get(name).attrs["Size"] for name in (client_image, base_image))
    print(f"client-torch {size / 1e6:.0f} MB, of which base {base / 1e6:.0f} MB")
    code = (
        "import os, torch, ome_tensor_client.torch as t, importlib.util as u;"
        "print(os.getuid(), int(torch.arange(5).sum()), t.TileDataset.__name__, u.find_spec('pip'), u.find_spec('zarr'))"
    )
    said = engine.containers.run(
        client_image, ["python", "-W", "error", "-c", code], remove=True, network_mode="none", read_only=True
    )
    assert said.decode().split() == ["10001", "10", "TileDataset", "None", "None"]


def test_the_health_check_is_the_clients_own(engine: Any, image: str) -> None:
    config = engine.images.get(image).attrs["Config"]
    assert config["Healthcheck"]["Test"] == ["CMD", "ome-tensor", "health", "127.0.0.1:50051"]
    assert config["Healthcheck"]["Interval"] == 5 * SECOND
    assert config["User"] == "10001:10001"
