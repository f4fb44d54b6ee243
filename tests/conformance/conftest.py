"""Fixtures of the conformance suite: the implementations, and the servers behind the remote one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conformance.images import DAMAGED, IMAGES
from tests.conformance.implementations import Implementation, Lazy, Mapped, Remote, Upstream


@pytest.fixture(scope="session")
def client_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Any]]:
    """Connected clients by transport and the name of the served folder; a server starts when the first test wants it."""
    folders = {"images": IMAGES, "damaged": DAMAGED}
    targets: dict[str, str] = {}
    clients: dict[tuple[str, str], Any] = {}
    with ExitStack() as stack:

        def client(transport: str, folder: str) -> Any:
            # Imported here: the tests of the other implementations must run where no server is installed.
            from ome_tensor_client import connect
            from ome_tensor_server.testing import running_server

            if folder not in targets:
                path = tmp_path_factory.mktemp(folder)
                for name, image in folders[folder].items():
                    pq.write_table(pa.table({"ome_arrow": image.record}), path / f"{name}.ome.parquet")
                store = tmp_path_factory.mktemp("store")
                targets[folder] = stack.enter_context(running_server([path], store=str(store))).target
            if (transport, folder) not in clients:
                clients[transport, folder] = stack.enter_context(connect(targets[folder], transport=transport))
            return clients[transport, folder]

        yield client


def _implementation(name: str, request: pytest.FixtureRequest) -> Implementation:
    if name in ("remote", "mapped"):
        client_of, transport = request.getfixturevalue("client_of"), "tcp" if name == "remote" else "mapped"
        return (Remote if name == "remote" else Mapped)(lambda folder: client_of(transport, folder))
    return {"upstream": Upstream, "local": Implementation, "lazy": Lazy}[name]()


# Upstream exports Arrow values in the old form, which pyarrow 26 deprecates. Ours must not.
UPSTREAM = pytest.param("upstream", marks=pytest.mark.filterwarnings("ignore:Exporting an unversioned DLPack:DeprecationWarning"))


@pytest.fixture(params=[UPSTREAM, "local", "lazy", "remote", "mapped"])
def any_view(request: pytest.FixtureRequest) -> Implementation:
    """Every implementation, upstream included: for behaviour that is the same."""
    return _implementation(request.param, request)


@pytest.fixture(params=["local", "lazy", "remote", "mapped"])
def our_view(request: pytest.FixtureRequest) -> Implementation:
    """Our implementations: for behaviour that upstream gets wrong or refuses."""
    return _implementation(request.param, request)


@pytest.fixture(params=["lazy", "remote", "mapped"])
def our_lazy_view(request: pytest.FixtureRequest) -> Implementation:
    """Our lazy views, over a loader, over the wire, and over a mapped dataset."""
    return _implementation(request.param, request)
