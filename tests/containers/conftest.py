"""A real engine, the image built on it as anybody would, and a server in a container.

The base image is the Dockerfile's, or `BASE_IMAGE` from the environment. Packages are fetched on the host into the git-ignored
`wheels/`, for the base image's Python, and the build itself runs without a network: it then works wherever the host's pip does,
and a second run needs no network at all. Where no engine answers the tests are skipped and say so, unless
`OME_TENSOR_REQUIRE_CONTAINERS` is set.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECOND = 1_000_000_000  # Docker's durations are in nanoseconds.


def _unavailable(reason: str) -> NoReturn:
    if os.environ.get("OME_TENSOR_REQUIRE_CONTAINERS"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """A client of the Docker engine."""
    docker = pytest.importorskip("docker")
    client = None
    with warnings.catch_warnings():
        # docker-py leaves the socket of a failed attempt to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            client = docker.from_env(timeout=600)  # a build answers nothing while a step runs
        except docker.errors.DockerException as error:
            reason = f"no Docker engine answers: {error}"
        gc.collect()
    if client is None:
        _unavailable(reason)
    with closing(client):
        yield client


@pytest.fixture(scope="session")
def base_image(engine: Any) -> str:
    """The name of the base image, which is present."""
    import docker.errors

    default = re.search(r"^ARG BASE_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert default is not None
    name = os.environ.get("BASE_IMAGE") or default[1]
    try:
        engine.images.get(name)
    except docker.errors.ImageNotFound:
        try:
            engine.images.pull(name)
        except docker.errors.APIError as error:
            _unavailable(f"base image {name} is neither here nor to be had ({error.explanation}): set BASE_IMAGE")
    return name


@pytest.fixture(scope="session")
def image(engine: Any, base_image: str) -> str:
    """The tag of the project's image, built by the classic builder without a network."""
    import docker.errors

    version = ["python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    python_version = engine.containers.run(base_image, version, remove=True, network_mode="none").decode().strip()
    subprocess.run([sys.executable, "deploy/fetch_wheels.py", python_version], cwd=ROOT, check=True)
    tag = "ome-tensor:test"
    try:
        engine.images.build(
            path=str(ROOT),
            tag=tag,
            buildargs={"BASE_IMAGE": base_image, "PIP_NO_INDEX": "1"},
            network_mode="none",
            rm=True,
            forcerm=True,
        )
    except docker.errors.BuildError as error:
        log = "".join(part.get("stream", "") for part in error.build_log)
        pytest.fail(f"the image does not build: {error.msg}\n{log[-4000:]}")
    return tag


@pytest.fixture(scope="session")
def compose() -> list[str]:
    """The command of whichever compose is installed."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    _unavailable("neither `docker compose` nor `docker-compose` is installed")


def wait_until_healthy(container: Any, timeout: float = 60) -> None:
    """Wait for the image's own health check to say so."""
    deadline = time.monotonic() + timeout
    while True:
        container.reload()
        state = container.attrs["State"]
        if state["Health"]["Status"] == "healthy":
            return
        if state["Status"] != "running" or time.monotonic() > deadline:
            checks = [check["Output"] for check in state["Health"]["Log"] or []]
            pytest.fail(f"container is {state['Status']}, not healthy: {checks}\n{container.logs().decode()[-4000:]}")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def start_server(engine: Any, image: str) -> Iterator[Callable[[], Any]]:
    """Starts healthy servers on the example images, with the image's own command and check; removes them in the end."""
    with ExitStack() as stack:

        def start() -> Any:
            container = engine.containers.run(
                image,
                detach=True,
                ports={"50051/tcp": ("127.0.0.1", None)},
                volumes={str(ROOT / "examples" / "data"): {"bind": "/data", "mode": "ro"}},
                healthcheck={"interval": SECOND, "timeout": 5 * SECOND},  # the image's command, asked more often
            )
            stack.callback(container.remove, force=True, v=True)
            wait_until_healthy(container)
            return container

        yield start


@pytest.fixture(scope="session")
def server(start_server: Callable[[], Any]) -> Any:
    """One server for every test that leaves it running."""
    return start_server()
