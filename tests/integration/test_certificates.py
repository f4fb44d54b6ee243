"""Certificates made by ``ome-tensor certificate``, as servers and clients use them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ome_tensor import InvalidArgument, NotAllowed, Unavailable
from ome_tensor_client import connect
from ome_tensor_client.health import check_health
from ome_tensor_server.testing import running_server

pytest.importorskip("cryptography")

from ome_tensor_server.certificates import issue


def tls(folder: Path) -> dict[str, str]:
    return {"tls_cert": str(folder / "server.pem"), "tls_key": str(folder / "server.key")}


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ome_tensor_client.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_server_and_a_client_of_it(image_path: Path, tmp_path: Path, pixels: np.ndarray) -> None:
    """As the README says, by the command line."""
    made = cli("certificate", str(tmp_path / "pki"), "127.0.0.1", "images.lab")
    assert made.returncode == 0, made.stderr
    assert [Path(line).name for line in made.stdout.split()] == ["ca.pem", "ca.key", "server.pem", "server.key"]
    ca = str(tmp_path / "pki" / "ca.pem")
    with running_server([image_path], **tls(tmp_path / "pki")) as server:
        with connect(server.target, ca=ca) as client:
            np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), pixels)
        assert cli("--ca", ca, "health", server.target).stdout == "SERVING\n"


def test_a_server_that_is_reached_by_another_name(image_path: Path, tmp_path: Path) -> None:
    """By a number, or through a tunnel."""
    issue(tmp_path / "pki", "server", ["images.lab"], 1)
    ca = str(tmp_path / "pki" / "ca.pem")
    with running_server([image_path], **tls(tmp_path / "pki")) as server:
        with connect(server.target, ca=ca, timeout=1, retry_for=0) as client, pytest.raises(Unavailable):
            client.datasets()
        with connect(server.target, ca=ca, server_name="images.lab") as client:
            assert client.datasets()
        assert check_health(server.target, ca=ca, server_name="images.lab") == "SERVING"
        assert cli("--ca", ca, "--server-name", "images.lab", "health", server.target).stdout == "SERVING\n"


def test_clients_that_have_certificates(image_path: Path, tmp_path: Path) -> None:
    """Of the same authority; another one's are strangers."""
    pki = tmp_path / "pki"
    issue(pki, "server", ["127.0.0.1"], 1)
    issue(pki, "worker", [], 1)
    issue(tmp_path / "other", "worker", [], 1)
    ca = str(pki / "ca.pem")
    with running_server([image_path], tls_client_ca=ca, certificate_scopes="read:im*", **tls(pki)) as server:
        with connect(server.target, ca=ca, cert=str(pki / "worker.pem"), key=str(pki / "worker.key")) as client:
            assert [dataset.name for dataset in client.datasets()] == ["image"]
            with pytest.raises(NotAllowed):
                client.admin.refresh("image")
        stranger = {name: str(tmp_path / "other" / f"worker.{end}") for name, end in (("cert", "pem"), ("key", "key"))}
        with connect(server.target, ca=ca, timeout=1, retry_for=0, **stranger) as client, pytest.raises(Unavailable):
            client.datasets()
        # A server's certificate is not a client's.
        server_s = {name: str(pki / f"server.{end}") for name, end in (("cert", "pem"), ("key", "key"))}
        with connect(server.target, ca=ca, timeout=1, retry_for=0, **server_s) as client, pytest.raises(Unavailable):
            client.datasets()


def test_a_certificate_is_renewed(image_path: Path, tmp_path: Path) -> None:
    """By the authority that clients know; under a running server, and with the modes that its operator has given the files."""
    pki = tmp_path / "pki"
    issue(pki, "server", ["127.0.0.1"], 1)
    assert [(pki / name).stat().st_mode & 0o777 for name in ("", "ca.key", "server.key", "ca.pem")] == [
        0o700,
        0o600,
        0o600,
        0o644,
    ]
    (pki / "server.key").chmod(0o640)
    before = {name: (pki / name).read_bytes() for name in ("ca.pem", "ca.key", "server.pem", "server.key")}
    with running_server([image_path], **tls(pki)) as server:
        assert [path.name for path in issue(pki, "server", ["127.0.0.1", "localhost"], 1)] == ["server.pem", "server.key"]
        port = server.target.rpartition(":")[2]
        with connect(f"localhost:{port}", ca=str(pki / "ca.pem")) as client:
            assert client.datasets()
    after = {name: (pki / name).read_bytes() for name in before}
    assert {name for name in before if after[name] != before[name]} == {"server.pem", "server.key"}
    assert (pki / "server.key").stat().st_mode & 0o777 == 0o640


def test_an_authority_half_made_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "ca.key").write_bytes(b"")
    issue(tmp_path, "server", ["localhost"], 1)
    issue(tmp_path, "server", ["localhost"], 1)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("a b",), "host must be the name or the address of a host, without a port: 'a b'"),
        (("localhost:50051",), "host must be the name or the address of a host, without a port: 'localhost:50051'"),
        (("--name", "ca"), "name must be letters, digits, '.', '_' or '-', and not ca: 'ca'"),
        (("--name", "../x"), "name must be letters"),
        ((), "say the server's names and addresses, or --name for a client's certificate"),
        (("localhost", "--days", "0"), "days must be from 1 to 3650: 0"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    """One line each, and nothing is written."""
    made = cli("certificate", str(tmp_path / "pki"), *arguments)
    assert made.returncode == 1
    assert said in made.stderr
    assert "Traceback" not in made.stderr
    assert not (tmp_path / "pki").exists()


def test_folders_that_are_something_else(tmp_path: Path) -> None:
    """What lies there is left alone."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidArgument, match="folder"):
        issue(tmp_path / "file", "server", [], 1)
    for name in ("ca.pem", "ca.key"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidArgument, match=r"has a ca\.pem and a ca\.key that are not an authority made here") as caught:
        issue(tmp_path, "server", [], 1)
    assert caught.value.field == "folder"
    assert (tmp_path / "ca.pem").read_text() == "mine"


def test_a_server_name_without_tls() -> None:
    with pytest.raises(InvalidArgument, match="needs tls or ca") as caught:
        connect("127.0.0.1:1", server_name="images.lab")
    assert caught.value.field == "server_name"
