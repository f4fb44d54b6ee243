"""One version, in `pyproject.toml`: whatever else names one has to name that."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

#: Where a version of ours may be written: an image's label or default argument, and an image's tag in a manifest or a compose file.
_LABEL = re.compile(r"(?:^ARG VERSION=|image\.version[=\"]*=|app\.kubernetes\.io/version: )[\"']?([^\s\"'$\\]+)", re.MULTILINE)
_TAG = re.compile(r"\bome-tensor:([\w.-]+)|\bnewTag: [\"']?([\w.-]+)")


def stated(text: str) -> list[str]:
    """Every version of ours that a file states."""
    tags = [tag or new for tag, new in _TAG.findall(text)]
    # Tags that are no version: of what is built and used on the spot.
    return _LABEL.findall(text) + [tag for tag in tags if tag[0].isdigit()]


def deployed() -> Iterator[Path]:
    """What images are built and run from."""
    yield ROOT / "Dockerfile"
    yield ROOT / "docker-compose.yml"
    for pattern in ("*.yaml", "*.yml", ".env.example"):
        yield from (ROOT / "deploy").rglob(pattern)


@pytest.mark.parametrize("path", list(deployed()), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_deployed_states_the_version_of_the_project_or_none(path: Path) -> None:
    assert set(stated(path.read_text())) <= {VERSION}


@pytest.mark.parametrize(
    "line, found",
    [
        ("ARG VERSION=1.2.3", ["1.2.3"]),
        ("ARG VERSION", []),
        ('LABEL org.opencontainers.image.version="1.2.3"', ["1.2.3"]),
        ("LABEL org.opencontainers.image.version=${VERSION}", []),
        ('LABEL org.opencontainers.image.version="$VERSION" \\', []),
        ("    app.kubernetes.io/version: '1.2.3'", ["1.2.3"]),
        ("      image: registry.example/ome-tensor:1.2.3", ["1.2.3"]),
        ("      image: ome-tensor:latest", []),
        ("    newTag: 1.2.3", ["1.2.3"]),
        ('    newTag: "1.2.3"', ["1.2.3"]),
        ("      image: prom/prometheus:v3.1.0", []),
    ],
)
def test_a_version_is_seen_where_it_may_be_written(line: str, found: list[str]) -> None:
    assert stated(f"# first\n{line}\n") == found


def test_the_newest_release_in_the_changelog_is_the_version() -> None:
    releases = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == VERSION


def test_the_command_line_says_the_version() -> None:
    if version("ome-tensor") != VERSION:
        pytest.fail(f"{version('ome-tensor')} is installed, not {VERSION}: `make test` installs it")
    said = subprocess.run(
        [sys.executable, "-m", "ome_tensor_client.cli", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout == f"ome-tensor {VERSION}\n"


def test_no_code_states_a_version_of_its_own() -> None:
    for folder in ("tensor", "proto", "client", "server"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^(?:__version__|VERSION)\s*(?::.*)?=\s*[\"']\d", path.read_text(), re.MULTILINE), path
