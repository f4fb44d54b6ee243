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
import tomllib
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tests.containers.services import DEFAULTS, ROOT, Start, healthy


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
def python_version(engine: Any, base_image: str) -> str:
    """Of the base image."""
    version = ["python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    found: bytes = engine.containers.run(base_image, version, remove=True, network_mode="none")
    return found.decode().strip()


def build(engine: Any, base_image: str, target: str, tag: str, path: Path = ROOT, **arguments: str) -> str:
    """An image's tag, built by the classic builder without a network."""
    import docker.errors

    try:
        engine.images.build(
            path=str(path),
            target=target,
            tag=tag,
            buildargs={"BASE_IMAGE": base_image, "PIP_NO_INDEX": "1"} | arguments,
            network_mode="none",
            rm=True,
            forcerm=True,
        )
    except docker.errors.BuildError as error:
        log = "".join(part.get("stream", "") for part in error.build_log)
        pytest.fail(f"the image does not build: {error.msg}\n{log[-4000:]}")
    return tag


def torch_version() -> str:
    """Which PyTorch the tests run on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (one for one in project["optional-dependencies"]["test"] if one.startswith("torch=="))
    return torch.partition("==")[2]


@pytest.fixture(scope="session")
def wheels(python_version: str) -> bool:
    """`wheels/` has what both images need, all of it before the first build, whose cache would not outlive a new one. Whether PyTorch is there, too:
    it may be gigabytes, and is only fetched where every container test must run."""
    torch = torch_version()
    if os.environ.get("OME_TENSOR_REQUIRE_CONTAINERS") and not list((ROOT / "wheels").glob(f"torch-{torch}*.whl")):
        pip = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--only-binary", ":all:", "--dest", "wheels"]
        subprocess.run([*pip, "--python-version", python_version, f"torch=={torch}"], cwd=ROOT, check=True)
    for arguments in ((), ("--client",)):
        subprocess.run([sys.executable, "deploy/fetch_wheels.py", python_version, *arguments], cwd=ROOT, check=True)
    return bool(list((ROOT / "wheels").glob(f"torch-{torch}*.whl")))


@pytest.fixture(scope="session")
def image(engine: Any, base_image: str, wheels: bool) -> str:
    """The server's image."""
    return build(engine, base_image, "server", "ome-tensor:test")


@pytest.fixture(scope="session")
def client_image(engine: Any, base_image: str, wheels: bool, image: str) -> str:
    """The image for training nodes."""
    torch = torch_version()
    if not wheels:
        pytest.skip(
            f"wheels/ has no PyTorch {torch}: put a build of it there (pip download --no-deps --dest wheels torch=={torch})"
        )
    return build(engine, base_image, "client-torch", "ome-tensor-client-torch:test", TORCH=torch)


@pytest.fixture(scope="session")
def compose() -> list[str]:
    """The command of whichever compose is installed."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    _unavailable("neither `docker compose` nor `docker-compose` is installed")


@contextmanager
def starting(engine: Any, image: str) -> Iterator[Start]:
    """Starts containers of an image, and removes them in the end."""
    with ExitStack() as stack:

        def run(*command: str, image: str = image, **options: Any) -> Any:
            container = engine.containers.run(image, list(command) or None, **DEFAULTS | options)
            stack.callback(container.remove, force=True, v=True)
            return container

        yield run


@pytest.fixture
def volume(engine: Any) -> Iterator[str]:
    """A volume's name; empty. To be asked for before :func:`start`, whose containers have to go first."""
    made = engine.volumes.create()
    yield made.name
    made.remove(force=True)


@pytest.fixture
def network(engine: Any) -> Iterator[str]:
    """A network's name; likewise."""
    made = engine.networks.create(f"ome-tensor-test-{uuid.uuid4().hex[:8]}")
    yield made.name
    made.remove()


@pytest.fixture
def start(engine: Any, image: str) -> Iterator[Start]:
    """Starts containers of the server's image."""
    with starting(engine, image) as made:
        yield made


@pytest.fixture(scope="module")  # Its health checks would take their time from whatever comes later.
def server(engine: Any, image: str) -> Iterator[Any]:
    """One server for every test that leaves it running: with the image's own command and check, and nothing else than it needs."""
    with starting(engine, image) as made:
        yield healthy(made(healthcheck=None))
