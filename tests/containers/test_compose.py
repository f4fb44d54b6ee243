"""The compose file, as the README has it: TLS, tokens, a store that stays, a training worker, a Prometheus."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.containers.services import KEY, ROOT, free_port, plane_of_file
from tests.integration.processes import wait_until

from ome_tensor import NotAuthenticated, OmeTensorError
from ome_tensor_client import connect
from ome_tensor_client.health import check_health

pytestmark = [pytest.mark.containers, pytest.mark.timeout(900)]


@dataclass
class Project:
    """A compose project of the test's own, with a port and secrets of its own."""

    command: list[str]
    name: str
    secrets: Path
    environment: dict[str, str]
    port: int = field(default_factory=free_port)

    @property
    def target(self) -> str:
        return f"localhost:{self.port}"

    @property
    def reader(self) -> dict[str, Any]:
        """How a client is told of it."""
        return {"ca": str(self.secrets / "client" / "ca.pem"), "token_file": str(self.secrets / "client" / "reader.token")}

    @property
    def admin(self) -> dict[str, Any]:
        return self.reader | {"token_file": str(self.secrets / "admin.token")}

    def run(self, *arguments: str, **environment: str) -> str:
        """What compose prints; it must end well."""
        done = subprocess.run(
            [*self.command, *arguments],
            cwd=ROOT,
            env=os.environ | self.environment | {"OME_TENSOR_PORT": str(self.port)} | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    def wait_until_serving(self) -> None:
        """As a client sees it."""
        wait_until(self._serves, "the server serves", 60)

    def _serves(self) -> bool:
        try:
            return check_health(self.target, ca=self.reader["ca"]) == "SERVING"
        except OmeTensorError:
            return False


@pytest.fixture(scope="session")
def secrets(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make secrets` makes."""
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run(["make", "secrets", f"IMAGE={image}", f"SECRETS={folder}"], cwd=ROOT, check=True)
    return folder


@pytest.fixture
def project(compose: list[str], image: str, base_image: str, secrets: Path, tmp_path: Path) -> Iterator[Project]:
    name = f"ome-tensor-test-{uuid.uuid4().hex[:8]}"
    environment = {
        "BASE_IMAGE": base_image,
        "PIP_NO_INDEX": "1",
        "OME_TENSOR_IMAGE": image,
        "OME_TENSOR_BIND": "127.0.0.1",
        "OME_TENSOR_SECRETS": str(secrets),
        # The classic builder, whose cache holds what the fixture built.
        "COMPOSE_DOCKER_CLI_BUILD": "0",
        "DOCKER_BUILDKIT": "0",
    }
    # Instead of the .env of whoever runs the tests.
    (tmp_path / "env").touch()
    made = Project([*compose, "--env-file", str(tmp_path / "env"), "--project-name", name], name, secrets, environment)
    try:
        yield made
    finally:
        made.run("--profile", "train", "--profile", "observe", "down", "--volumes")


def test_it_serves_those_who_may(project: Project) -> None:
    """Cold: from `up` to the first pixels."""
    began = time.monotonic()
    project.run("up", "--detach", "server")
    project.wait_until_serving()
    with connect(project.target, **project.reader) as client:
        pixels = client.tensor_view(KEY, t=0, z=3, c=1, layout="YX").to_numpy()
        print(f"cold `compose up` to the first tile: {time.monotonic() - began:.1f} s")
        np.testing.assert_array_equal(pixels, plane_of_file(z=3, c=1))
    with connect(project.target, ca=project.reader["ca"], retry_for=0) as client, pytest.raises(NotAuthenticated):
        client.datasets()
    with connect(project.target, timeout=3, retry_for=0) as client, pytest.raises(OmeTensorError):
        client.datasets()
    said = project.run("logs", "--no-color", "server")
    assert "listening on 0.0.0.0:50051" in said
    assert "method=ListDatasets" in said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if "WARNING" in line]) <= 2  # The stranger's call, and the audit's line of it.


def test_tokens_are_heeded_at_once(project: Project, image: str) -> None:
    """Also one that is revoked while the server runs: its folder is mounted, and not a file that another one replaces."""
    project.run("up", "--detach", "server")
    project.wait_until_serving()
    folder = project.secrets / "server"
    token = ["docker", "run", "--rm", "--user", f"{os.getuid()}:{os.getgid()}", "--volume", f"{folder}:/s", image, "token"]

    def change(*arguments: str) -> str:
        command = [*token, arguments[0], "--tokens", "/s/tokens.json", *arguments[1:]]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    text = change("create", "--scope", "read:*", "--name", "guest")
    with connect(project.target, ca=project.reader["ca"], token=text, retry_for=0) as client:
        wait_until(lambda: _may(client), "the new token is known", 10)
        change("revoke", text.split("_")[1])
        wait_until(lambda: not _may(client), "the revoked token is refused", 10)


def _may(client: Any) -> bool:
    try:
        return bool(client.datasets())
    except NotAuthenticated:
        return False


def test_an_upload_survives_down_and_up(project: Project) -> None:
    pixels = np.random.default_rng(3).integers(0, 60_000, (1, 2, 1, 40, 50), np.uint16)
    project.run("up", "--detach", "server")
    project.wait_until_serving()
    with connect(project.target, **project.admin) as client:
        client.upload("kept", pixels)
    project.run("down")
    project.run("up", "--detach", "server")
    project.wait_until_serving()
    with connect(project.target, **project.reader) as client:
        np.testing.assert_array_equal(client.tensor_view("kept", layout="TZCYX").to_numpy(), pixels)


def test_a_worker_trains(project: Project, client_image: str) -> None:
    """The profile `train`: its exit status is the worker's, which begins when the server is healthy."""
    said = project.run(
        "--profile",
        "train",
        "up",
        "--no-color",
        "--exit-code-from",
        "worker",
        "server",
        "worker",
        OME_TENSOR_CLIENT_IMAGE=client_image,
    )
    assert "epoch 2: loss" in said
    assert "starving" in said


def test_prometheus_sees_it(project: Project, engine: Any, base_image: str, tmp_path: Path) -> None:
    """The profile `observe`, with Debian's Prometheus in place of the image that no registry is asked for."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (Debian's package prometheus)")
    shutil.copy(binary, tmp_path / "prometheus")
    (tmp_path / "Dockerfile").write_text(
        f'FROM {base_image}\nCOPY prometheus /bin/prometheus\nRUN install -d -o 65534 /prometheus\nUSER 65534\nENTRYPOINT ["prometheus"]\n'
    )
    engine.images.build(path=str(tmp_path), tag="ome-tensor-prometheus:test", rm=True, forcerm=True, network_mode="none")
    port = str(free_port())
    project.run(
        "--profile",
        "observe",
        "up",
        "--detach",
        "server",
        "prometheus",
        PROMETHEUS_IMAGE="ome-tensor-prometheus:test",
        PROMETHEUS_PORT=port,
    )
    project.wait_until_serving()

    def up() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?query=up", timeout=5) as answer:
                found = json.load(answer)["data"]["result"]
        except OSError:
            return False
        return [one["value"][1] for one in found] == ["1"]

    wait_until(up, "Prometheus scrapes the server", 60)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/rules", timeout=5) as answer:
        groups = json.load(answer)["data"]["groups"]
    assert sum(len(group["rules"]) for group in groups) >= 8


def test_the_whole_file_is_understood(project: Project) -> None:
    """By the compose that is here, with all profiles; every service is confined."""
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load(project.run("--profile", "train", "--profile", "observe", "config"))["services"]
    assert services.keys() == {"server", "worker", "prometheus", "grafana"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_what_runs_is_confined(project: Project, engine: Any) -> None:
    """As the engine has it: the compose file's words are one thing, the container another."""
    project.run("up", "--detach", "server")
    (container,) = engine.containers.list(filters={"label": f"com.docker.compose.project={project.name}"})
    host = container.attrs["HostConfig"]
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["SecurityOpt"]) == (True, ["ALL"], ["no-new-privileges:true"])
    assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (4 << 30, 2_000_000_000, 2048)
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    writable = {mount["Destination"] for mount in container.attrs["Mounts"] if mount["RW"]}
    assert writable == {"/var/lib/ome-tensor"}
    assert list(host["PortBindings"]) == ["50051/tcp"]


def test_secrets_are_renewed_for_the_same_hosts(image: str, tmp_path: Path) -> None:
    """Whatever else is said the second time; and what is not of this authority is left alone."""
    from cryptography import x509

    folder = tmp_path / "of the lab"
    certificate = folder / "server" / "server.pem"

    def made(*hosts: str) -> list[str]:
        subprocess.run(
            ["make", "secrets", f"IMAGE={image}", f"SECRETS={folder}", f"HOSTS={' '.join(hosts)}"], cwd=ROOT, check=True
        )
        names = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        return names.value.get_values_for_type(x509.DNSName)

    assert made("images.lab") == ["localhost", "server", "images.lab"]
    first, tokens = certificate.read_bytes(), (folder / "server" / "tokens.json").read_bytes()
    assert made("other.lab") == ["localhost", "server", "images.lab", "other.lab"]
    assert certificate.read_bytes() != first
    assert (folder / "server" / "tokens.json").read_bytes() == tokens
    (folder / "client" / "ca.pem").write_bytes(b"the institution's")
    (folder / "server" / "server.key").write_bytes(b"the institution's")
    made()
    assert (folder / "server" / "server.key").read_bytes() == b"the institution's"
