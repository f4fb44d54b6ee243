"""TLS, client certificates, and certificates that are replaced under a running server."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.integration.processes import ServerProcess

from ome_tensor import InvalidArgument, NotAllowed, OmeTensorError, Unavailable
from ome_tensor_client import connect
from ome_tensor_client.health import check_health
from ome_tensor_server import tokens
from ome_tensor_server.scopes import parse_scopes
from ome_tensor_server.testing import RunningServer, running_server

trustme = pytest.importorskip("trustme")


class Authority:
    """Signs certificates, and writes them where servers and clients find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.ca = trustme.CA()
        self.path = str(folder / "ca.pem")
        self.ca.cert_pem.write_to_path(self.path)

    def issue(self, name: str, *identities: str, common_name: str | None = None) -> tuple[str, str]:
        """The paths of a certificate and its key."""
        made = self.ca.issue_cert(*identities, common_name=common_name)
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        # As deployments do: each file appears whole.
        for path, blobs in ((cert, made.cert_chain_pems), (key, [made.private_key_pem])):
            (scratch := path.with_suffix(".new")).write_bytes(b"".join(blob.bytes() for blob in blobs))
            os.replace(scratch, path)
        return str(cert), str(key)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@pytest.fixture
def secured(authority: Authority, image_path: Path) -> Iterator[RunningServer]:
    cert, key = authority.issue("server", "localhost", "127.0.0.1")
    with running_server([image_path], tls_cert=cert, tls_key=key) as server:
        yield server


def test_pixels_by_tls(secured: RunningServer, authority: Authority, pixels: np.ndarray) -> None:
    with connect(secured.target, ca=authority.path) as client:
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), pixels)
    assert check_health(secured.target, ca=authority.path) == "SERVING"


@pytest.mark.parametrize("how", ["in plain text", "trusting the system", "trusting another authority"])
def test_who_does_not_trust_the_server_reads_nothing(
    secured: RunningServer, authority: Authority, tmp_path: Path, how: str
) -> None:
    options = {
        "in plain text": {},
        "trusting the system": {"tls": True},
        "trusting another authority": {"ca": Authority(tmp_path / "other").path},
    }[how]
    with connect(secured.target, timeout=5, retry_for=0, **options) as client, pytest.raises(Unavailable):
        client.datasets()


def test_a_certificate_for_another_name_is_not_believed(authority: Authority, image_path: Path) -> None:
    cert, key = authority.issue("server", "images.example")
    with (
        running_server([image_path], tls_cert=cert, tls_key=key) as server,
        connect(server.target, ca=authority.path, timeout=5, retry_for=0) as client,
        pytest.raises(Unavailable),
    ):
        client.datasets()


def test_certificates_are_read_again_when_they_change(secured: RunningServer, authority: Authority, tmp_path: Path) -> None:
    """New connections get the new one at once; one that is there goes on; a pair that does not fit changes nothing."""
    with connect(secured.target, ca=authority.path) as before:
        assert before.datasets()
        renewed = Authority(tmp_path / "renewed")
        for path in renewed.issue("server", "127.0.0.1"):
            shutil.copy(path, authority.folder / Path(path).name)
        with connect(secured.target, ca=renewed.path, retry_for=0) as client:
            assert client.datasets()
        assert before.datasets()
        with connect(secured.target, ca=authority.path, timeout=5, retry_for=0) as client, pytest.raises(Unavailable):
            client.datasets()
        (authority.folder / "server.key").write_text("no key")
        with connect(secured.target, ca=renewed.path, retry_for=0) as client:
            assert client.datasets()


def test_a_client_that_does_not_speak_tls_is_told_of_it(secured: RunningServer) -> None:
    """All that comes from the server is the end of the connection."""
    with (
        connect(secured.target, timeout=5, retry_for=0) as client,
        pytest.raises(Unavailable, match="speaks TLS wants ca or tls"),
    ):
        client.datasets()


def test_client_certificates(authority: Authority, image_path: Path, tmp_path: Path) -> None:
    """No connection without one; what it allows is said by its name, or for all."""
    cert, key = authority.issue("server", "127.0.0.1")
    file = tmp_path / "tokens.json"
    tokens.create(file, parse_scopes(["admin:*"]), certificate="operator")
    with running_server(
        [image_path],
        tls_cert=cert,
        tls_key=key,
        tls_client_ca=authority.path,
        certificate_scopes="read:im*",
        tokens=str(file),
    ) as server:
        worker = authority.issue("worker", common_name="worker-1")
        with connect(server.target, ca=authority.path, cert=worker[0], key=worker[1]) as client:
            assert [dataset.name for dataset in client.datasets()] == ["image"]
            with pytest.raises(NotAllowed):
                client.admin.refresh("image")
        operator = authority.issue("operator", common_name="operator")
        with connect(server.target, ca=authority.path, cert=operator[0], key=operator[1]) as client:
            client.admin.refresh("image")
            (listed,) = [token for token in tokens.find(file) if token.certificate]
            tokens.revoke(file, listed.id)
            with pytest.raises(NotAllowed):
                client.admin.refresh("image")
        with connect(server.target, ca=authority.path, timeout=5, retry_for=0) as client, pytest.raises(Unavailable):
            client.datasets()
        cert, key = Authority(tmp_path / "stranger").issue("worker", common_name="operator")
        stranger = connect(server.target, ca=authority.path, cert=cert, key=key, timeout=5, retry_for=0)
        with stranger as client, pytest.raises(Unavailable):
            client.datasets()


def test_workers_serve_tls_and_tokens(authority: Authority, image_path: Path, tmp_path: Path, pixels: np.ndarray) -> None:
    cert, key = authority.issue("server", "127.0.0.1")
    _, text = tokens.create(tmp_path / "tokens.json", parse_scopes(["read:*"]))
    flags = ("--workers", "2", "--store", str(tmp_path / "store"), "--tls-cert", cert, "--tls-key", key)
    flags += ("--tokens", str(tmp_path / "tokens.json"))
    with ServerProcess(image_path, tmp_path / "log", *flags) as process:
        deadline = time.monotonic() + 30
        while check(process.target, authority.path) != "SERVING":
            assert time.monotonic() < deadline, process.log.read_text()
            time.sleep(0.05)
        for _ in range(4):
            with connect(process.target, ca=authority.path, token=text) as client:
                np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), pixels)
    assert text.split("_", 2)[2] not in process.log.read_text()


def check(target: str, ca: str) -> str:
    try:
        return check_health(target, ca=ca)
    except OmeTensorError:
        return ""


@pytest.mark.parametrize("wrong", ["absent", "garbage", "another's key", "key as certificate"])
def test_wrong_files_are_said_at_the_start(authority: Authority, image_path: Path, wrong: str) -> None:
    cert, key = authority.issue("server", "127.0.0.1")
    if wrong == "absent":
        Path(cert).unlink()
    elif wrong == "garbage":
        Path(cert).write_text("garbage")
    elif wrong == "another's key":
        shutil.copy(authority.issue("other", "127.0.0.1")[1], key)
    else:
        shutil.copy(key, cert)
    with (
        pytest.raises(InvalidArgument, match="tls_cert") as caught,
        running_server([image_path], tls_cert=cert, tls_key=key),
    ):
        pass
    assert "PRIVATE" not in str(caught.value)


def test_wrong_files_of_a_client_are_said(authority: Authority, tmp_path: Path) -> None:
    with connect("127.0.0.1:1", ca=str(tmp_path / "absent")) as client, pytest.raises(InvalidArgument, match=r"ca .*absent"):
        client.datasets()
    with pytest.raises(InvalidArgument, match="cert needs key"):
        connect("127.0.0.1:1", cert="x.pem")
