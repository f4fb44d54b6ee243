#!/usr/bin/env python3
"""Fills `wheels/` with everything the container image's build installs, so that the build itself needs no package index.

    python3 deploy/fetch_wheels.py 3.12
    docker build --tag ome-tensor --build-arg PIP_NO_INDEX=1 --network none .

The argument is the Python version of the image's base. pip runs here, with whatever configuration it has here; what `wheels/`
already holds is not asked for again.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def fetch(python_version: str) -> None:
    """Put what is missing for that version of Python into `wheels/`.

    Raises:
        subprocess.CalledProcessError: pip could not; it has said why.
    """
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    wanted = [
        *pyproject["build-system"]["requires"],
        *project["dependencies"],
        *project["optional-dependencies"]["server"],
    ]
    pip = [sys.executable, "-m", "pip", "--quiet", "download", "--only-binary=:all:", "--python-version", python_version]
    pip += ["--dest", "wheels", "--find-links", "wheels", *wanted]
    # Without the index first: a set that is whole is left as it is, and needs no network.
    if subprocess.run([*pip, "--no-index"], cwd=ROOT, capture_output=True, check=False).returncode:
        subprocess.run(pip, cwd=ROOT, check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: fetch_wheels.py PYTHON_VERSION")
    fetch(sys.argv[1])
