#!/usr/bin/env python3
"""Fills `wheels/` with everything the container image's build installs, so that the build itself needs no package index.

    python3 deploy/fetch_wheels.py 3.12
    docker build --tag ome-tensor --build-arg PIP_NO_INDEX=1 --network none .

The first argument is the Python version of the image's base. What is fetched is what the lock files pin, by hash: those of the
server, or with `--client` of the training client (without torch: put a wheel of it there yourself), and those that build the
project. pip runs here, with whatever configuration it has here; what `wheels/` already holds is not asked for again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from lockfiles import PYTHONS, ROOT, Pin, pins_for

try:
    from packaging.tags import Tag, compatible_tags, cpython_tags, platform_tags
    from packaging.utils import canonicalize_name, parse_wheel_filename
except ImportError:  # a bare Python has it inside its pip only
    from pip._vendor.packaging.tags import Tag, compatible_tags, cpython_tags, platform_tags
    from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

WHEELS = ROOT / "wheels"


def fetch(pins: list[Pin], python_version: str, into: Path) -> None:
    """Put what is missing of some pins into a folder, for that version of Python on a machine like this one.

    Raises:
        subprocess.CalledProcessError: pip could not; it has said why.
    """
    missing = [pin for pin in pins if find(pin, python_version, into) is None]
    if not missing:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.writelines(f"{pin.line()}\n" for pin in missing)
        wanted.flush()
        pip = [sys.executable, "-m", "pip", "--quiet", "download", "--require-hashes", "--no-deps", "--only-binary", ":all:"]
        pip += ["--python-version", python_version, "--dest", str(into), "--requirement", wanted.name]
        subprocess.run(pip, check=True)


def find(pin: Pin, python_version: str, folder: Path) -> Path | None:
    """The wheel of a pin in a folder that such a Python can install, if it is one of those that are locked."""
    installable = _tags(python_version)
    for path in folder.glob("*.whl"):
        if canonicalize_name(path.name.partition("-")[0]) != pin.name:
            continue
        _, version, _, tags = parse_wheel_filename(path.name)
        right = str(version) == pin.version and tags & installable
        if right and f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" in pin.hashes:
            return path
    return None


@functools.cache
def _tags(python_version: str) -> frozenset[Tag]:
    """What wheels for that Python are called, on this kind of machine."""
    major, minor = map(int, python_version.split("."))
    platforms = list(platform_tags())
    own = cpython_tags((major, minor), platforms=platforms)
    return frozenset([*own, *compatible_tags((major, minor), f"cp{major}{minor}", platforms)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the wheels of a container image into wheels/.")
    parser.add_argument("python_version", choices=PYTHONS, help="of the image's base")
    parser.add_argument("--client", action="store_true", help="of the training client, not of the server")
    parser.add_argument("--into", type=Path, default=WHEELS, metavar="FOLDER", help="elsewhere than in wheels/")
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    for name in ("build", "client-torch" if arguments.client else "server"):
        # Markers are decided here: pip would ask them of the Python that it runs on.
        pins = pins_for(name, arguments.python_version, platform.machine())
        fetch(pins, arguments.python_version, arguments.into.resolve())


if __name__ == "__main__":
    main()
