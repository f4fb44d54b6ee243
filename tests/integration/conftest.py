"""Files, servers and clients of the integration tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tests.integration.images import random_pixels, write_image
from tests.integration.processes import ServerProcess

from ome_tensor_client import Client, connect
from ome_tensor_server.testing import RunningServer, running_server

#: T, Z, C, Y, X; some 1.5 MiB: many messages at the small message size that tests ask for.
SHAPE = (2, 3, 2, 240, 270)


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """The pixels of ``image.ome.parquet``."""
    return random_pixels(SHAPE)


@pytest.fixture(scope="session")
def image_path(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    """A file with one image."""
    return write_image(tmp_path_factory.mktemp("image") / "image.ome.parquet", pixels)


@pytest.fixture(scope="session")
def big_pixels() -> np.ndarray:
    """The pixels of ``big.ome.parquet``: 32 MiB, so that no buffers between server and client swallow a whole stream."""
    return random_pixels((1, 4, 2, 2048, 1024), seed=1)


@pytest.fixture(scope="session")
def big_path(tmp_path_factory: pytest.TempPathFactory, big_pixels: np.ndarray) -> Path:
    """A file with one large image."""
    return write_image(tmp_path_factory.mktemp("big") / "big.ome.parquet", big_pixels)


@pytest.fixture(scope="module")
def served(image_path: Path) -> Iterator[RunningServer]:
    """A server of the small image in this process."""
    with running_server([image_path]) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: RunningServer) -> Iterator[Client]:
    """A client of it."""
    with connect(served.target) as connected:
        yield connected


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers in processes of their own; all of them are gone when the test ends."""
    with ExitStack() as stack:

        def start(path: Path, *flags: str, listen: str = "127.0.0.1:0") -> ServerProcess:
            number = len(list(tmp_path.glob("server*.log")))
            return stack.enter_context(ServerProcess(path, tmp_path / f"server{number}.log", *flags, listen=listen))

        yield start


@pytest.fixture
def server_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What servers in this process log during the test."""
    caplog.set_level(logging.INFO, logger="ome_tensor_server")
    return caplog
