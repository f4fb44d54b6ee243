#!/usr/bin/env python3
"""The lock files: what each image installs, to the version and the hash, and whether `pyproject.toml` still says the same.

    python3 deploy/lockfiles.py write [--upgrade]     what `make locks` does; wants uv
    python3 deploy/lockfiles.py check                 needs no network

The files are for pip: `pip install --require-hashes --only-binary :all: --requirement deploy/locks/server.txt`. Each holds for all
of `PYTHONS` on all of `MACHINES`, by markers. `write` keeps the versions of a file that is there unless told to upgrade.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from packaging.markers import Marker
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ImportError:  # a bare Python has it inside its pip only
    from pip._vendor.packaging.markers import Marker
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "deploy" / "locks"

PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")


@dataclass(frozen=True, slots=True)
class Contents:
    """What one lock file is made from, in the words of `pyproject.toml`."""

    project: bool = True  #: the dependencies of the project itself
    extras: tuple[str, ...] = ()
    build: bool = False  #: what builds the project's own wheel
    left_out: str = r"(?!)"  #: names, as a pattern, that are resolved with the rest but not pinned


CONTENTS = {
    "server": Contents(extras=("server", "formats", "oidc", "otel", "container")),
    # Which torch, for which CUDA or none, is for whoever builds the image to choose: only what any of them needs is pinned.
    "client-torch": Contents(extras=("image", "torch", "container"), left_out=r"torch|triton|cuda-.*|nvidia-.*"),
    "build": Contents(project=False, build=True),
}

#: How the file says that it is `pyproject.toml` itself that asks for a package.
_ASKED = "pyproject.toml"
_HEADER = "# Made from pyproject.toml by `make locks`; edit that, not this.\n# sha256 of the rest: "
_PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[^\s;]+)(?: ; (?P<marker>.+?))? \\")
_HASH = re.compile(r"    --hash=(sha256:[0-9a-f]{64})(?: \\)?")


@dataclass(frozen=True, slots=True)
class Pin:
    """One version of one package."""

    name: str
    version: str
    marker: str  #: where it is the one to install; empty: everywhere
    hashes: tuple[str, ...]
    asked_by: tuple[str, ...]  #: names of packages, and `_ASKED`
    text: str  #: as in the file

    def holds(self, environment: dict[str, str]) -> bool:
        return not self.marker or Marker(self.marker).evaluate(environment)

    def line(self) -> str:
        """For pip, without the marker."""
        return " ".join([f"{self.name}=={self.version}", *(f"--hash={value}" for value in self.hashes)])


def environment(python: str, machine: str = "x86_64", patch: int = 99) -> dict[str, str]:
    """What markers are asked about: CPython of that version on Linux."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.{patch}",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.{patch}",
        "python_version": python,
        "sys_platform": "linux",
    }


def environments() -> list[dict[str, str]]:
    """Those that the files are for: the first and the last patch release of each Python, on each machine."""
    return [environment(*choice) for choice in itertools.product(PYTHONS, MACHINES, (0, 99))]


def pins(name: str, folder: Path = LOCKS) -> list[Pin]:
    """What a lock file pins.

    Raises:
        ValueError: a line of it is neither a pin with its hashes nor a comment.
    """
    return list(_pins((folder / f"{name}.txt").read_text()))


def pins_for(name: str, python: str, machine: str = "x86_64") -> list[Pin]:
    """What is installed from a lock file on one Python, the last of its patch releases."""
    there = environment(python, machine)
    return [pin for pin in pins(name) if pin.holds(there)]


def _pins(text: str) -> Iterator[Pin]:
    for block in re.split(r"\n(?=[^\s#])", re.sub(r"\A(?:#.*\n)+", "", text).strip("\n")):
        first, *rest = block.split("\n")
        head = _PIN.fullmatch(first)
        hashes = [found[1] for line in rest if (found := _HASH.fullmatch(line))]
        comments = [line.strip(" #") for line in rest if line.startswith("    #")]
        if head is None or len(hashes) + len(comments) != len(rest):
            raise ValueError(f"not a pin with its hashes and what asked for it: {block!r}")
        asked_by = [line.removeprefix("via").strip() for line in comments]
        yield Pin(head["name"], head["version"], head["marker"] or "", tuple(hashes), tuple(filter(None, asked_by)), block)


def asked(contents: Contents, pyproject: dict[str, Any]) -> list[Requirement]:
    """The requirements of `pyproject.toml` that a lock file has to meet."""
    project = pyproject["project"]
    lines = pyproject["build-system"]["requires"] if contents.build else []
    lines = lines + (project["dependencies"] if contents.project else [])
    for extra in contents.extras:
        lines = lines + project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


# --- write ----------------------------------------------------------------------------------------------------------


def write(name: str, uv: str, *, upgrade: bool = False) -> None:
    """Resolve one lock file anew.

    Raises:
        subprocess.CalledProcessError: uv could not; it has said why.
    """
    contents = CONTENTS[name]
    path = LOCKS / f"{name}.txt"
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / path.name
        if path.exists() and not upgrade:
            output.write_text(path.read_text())  # uv keeps what it finds there
        wanted = Path(scratch) / "wanted.in"
        wanted.write_text("".join(f"{requirement}\n" for requirement in asked(contents, pyproject)))
        # The torch that is tested says what torch needs.
        tested = Path(scratch) / "tested.in"
        tested.write_text(
            "\n".join(line for line in pyproject["project"]["optional-dependencies"]["test"] if line.startswith("torch=="))
        )
        command = [uv, "pip", "compile", str(wanted), "--constraints", str(tested), "--output-file", str(output), "--quiet"]
        command += ["--universal", "--python-version", PYTHONS[0], "--generate-hashes", "--only-binary", ":all:"]
        command += ["--no-header", "--no-emit-index-url", "--no-emit-find-links"]
        subprocess.run(command, cwd=ROOT, check=True)
        text = re.sub(r"^(    #(?: via|  ) )-[rc] \S*\.in$", rf"\1{_ASKED}", output.read_text(), flags=re.MULTILINE)
    kept = [pin.text for pin in _pins(text) if _belongs(pin, contents)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(_with_header("\n".join(kept) + "\n"))


def _belongs(pin: Pin, contents: Contents) -> bool:
    return re.fullmatch(contents.left_out, pin.name) is None and any(map(pin.holds, environments()))


def _with_header(body: str) -> str:
    return f"{_HEADER}{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


# --- check ----------------------------------------------------------------------------------------------------------


def problems(name: str, *, folder: Path = LOCKS, pyproject: Path = ROOT / "pyproject.toml") -> Iterator[str]:
    """All that is wrong with one lock file, in a line each."""
    contents = CONTENTS[name]
    text = (folder / f"{name}.txt").read_text()
    if text != _with_header(text.removeprefix(_HEADER).partition("\n")[2]):
        yield "has been edited by hand"
    try:
        found = pins(name, folder)
    except ValueError as error:
        yield str(error)
        return
    requirements = asked(contents, tomllib.loads(pyproject.read_text()))
    yield from _not_met(requirements, found, contents)
    yield from _not_needed({canonicalize_name(requirement.name) for requirement in requirements}, found, contents)


def _not_met(requirements: list[Requirement], found: list[Pin], contents: Contents) -> Iterator[str]:
    for pin in found:
        if not pin.hashes:
            yield f"{pin.name}=={pin.version} has no hash"
    for there in environments():
        where = f"on Python {there['python_full_version']}, {there['platform_machine']}"
        here: dict[str, list[str]] = {}
        for pin in found:
            if pin.holds(there):
                here.setdefault(pin.name, []).append(pin.version)
        yield from (f"{name} has {len(versions)} versions {where}" for name, versions in here.items() if len(versions) > 1)
        for requirement in requirements:
            name = canonicalize_name(requirement.name)
            if re.fullmatch(contents.left_out, name) or (requirement.marker and not requirement.marker.evaluate(there)):
                continue
            if name not in here:
                yield f"{requirement} is not pinned {where}"
            elif not requirement.specifier.contains(here[name][0], prereleases=True):
                yield f"{name}=={here[name][0]} is not {requirement} {where}"


def _not_needed(wanted: set[str], found: list[Pin], contents: Contents) -> Iterator[str]:
    reached: set[str] = set()
    while True:
        # A package is needed where pyproject.toml, or one that is needed, asks for it.
        more = {
            pin.name
            for pin in found
            if pin.name not in reached
            and any(
                (by == _ASKED and pin.name in wanted) or by in reached or (by in wanted and re.fullmatch(contents.left_out, by))
                for by in pin.asked_by
            )
        }
        if not more:
            break
        reached |= more
    for pin in found:
        if pin.name not in reached or not _belongs(pin, contents):
            yield f"{pin.name}=={pin.version} is pinned, but nothing needs it"
        elif _ASKED in pin.asked_by and pin.name not in wanted:
            yield f"{pin.name}=={pin.version} is said to be asked for by pyproject.toml, and is not"


# --- command line ---------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Lock files of the container images.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="fail where a lock file is not what pyproject.toml asks for")
    writing = commands.add_parser("write", help="resolve them anew, keeping versions")
    writing.add_argument("--upgrade", action="store_true", help="take the newest versions")
    writing.add_argument("--uv", default="uv", help="the command to resolve with")
    arguments = parser.parse_args()
    if arguments.command == "write":
        for name in CONTENTS:
            write(name, arguments.uv, upgrade=arguments.upgrade)
    wrong = [f"deploy/locks/{name}.txt: {problem}" for name in CONTENTS for problem in problems(name)]
    if wrong:
        print(*wrong, "Run `make locks`.", sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
