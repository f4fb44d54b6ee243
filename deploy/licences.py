#!/usr/bin/env python3
"""The licences of everything that the lock files pin: `deploy/LICENSES.md`.

    python3 deploy/licences.py write FOLDER     what `make licences` does: reads them from the locked wheels, fetched into the folder
    python3 deploy/licences.py check            needs no network

Both fail where a licence is not one of `ALLOWED`.
"""

from __future__ import annotations

import email
import re
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

from fetch_wheels import fetch, find
from lockfiles import CONTENTS, LOCKS, PYTHONS, ROOT, Pin, pins, pins_for

LIST = ROOT / "deploy" / "LICENSES.md"

_NOTICE = "permissive: its notice goes along, and the wheel in the image brings it"
#: What may be shipped, by SPDX identifier, and why.
ALLOWED = {
    "0BSD": "permissive: asks for nothing",
    "Apache-2.0": _NOTICE,
    "BSD-2-Clause": _NOTICE,
    "BSD-3-Clause": _NOTICE,
    "CC0-1.0": "public domain",
    "ISC": _NOTICE,
    "MIT": _NOTICE,
    "MIT-0": "permissive: asks for nothing",
    "MIT-CMU": _NOTICE,
    "MPL-2.0": "copyleft of single files, which are shipped unchanged",
    "PSF-2.0": _NOTICE,
    "Zlib": _NOTICE,
}

#: What packages without an SPDX expression call their licence.
_SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}

#: Packages that say "BSD", or "dual", and not which; read from the licence file in the wheel.
_READ = {
    "dumb-init": "MIT",
    "jinja2": "BSD-3-Clause",
    "mpmath": "BSD-3-Clause",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "s3fs": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
}

_HEAD = """# Licences

What the images install, beside their base image: every package of `deploy/locks`, and what its own metadata says of its licence. Made by
`make licences`; `make check` fails where it is not what the locks say, or where a licence is none of those allowed in `deploy/licences.py`.
Libraries that a wheel bundles have licences of their own, which lie in the wheel. PyTorch is chosen by whoever builds the client's image.

| Package | Version | Licence | In |
|---|---|---|---|
"""
_ROW = re.compile(r"\| (\S+) \| (\S+) \| (.+) \| (.+) \|")


def locked(folder: Path = LOCKS) -> dict[tuple[str, str], str]:
    """Name and version of everything that is locked, and the names of the locks."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in CONTENTS:
        for pin in pins(name, folder):
            found.setdefault((pin.name, pin.version), []).append(name)
    return {key: ", ".join(names) for key, names in sorted(found.items())}


def licence(metadata: Message, name: str) -> str:
    """The licence as an SPDX expression, or whatever else the package says."""
    if expression := metadata["License-Expression"]:
        return str(expression)
    if name in _READ:
        return _READ[name]
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if line.startswith("License :: ")]
    said = classifiers[0] if len(classifiers) == 1 else (metadata["License"] or "unknown").strip().partition("\n")[0]
    return _SPDX.get(said, said)


def refused(expression: str) -> bool:
    """Whether a licence is not to be shipped: some part of it that has to be obeyed is not allowed."""
    every = [part.strip(" ()") for part in re.split(r" AND ", expression)]
    return not all(any(choice.strip(" ()") in ALLOWED for choice in part.split(" OR ")) for part in every)


def read(path: Path = LIST) -> dict[tuple[str, str], tuple[str, str]]:
    """The list: name and version, to licence and locks."""
    rows = [_ROW.fullmatch(line) for line in path.read_text().removeprefix(_HEAD).splitlines()]
    return {(row[1], row[2]): (row[3], row[4]) for row in rows if row is not None}


def problems(path: Path = LIST, folder: Path = LOCKS) -> Iterator[str]:
    """What is wrong with the list, in a line each."""
    listed, wanted = read(path), locked(folder)
    for (name, version), where in wanted.items():
        if (name, version) not in listed or listed[name, version][1] != where:
            yield f"{name}=={version} ({where}) is locked and not in the list"
    for (name, version), (expression, _) in listed.items():
        if (name, version) not in wanted:
            yield f"{name}=={version} is in the list and not locked"
        if refused(expression):
            yield f"{name}=={version}: {expression!r} is none of the licences that are allowed"


def write(wheels: Path, path: Path = LIST) -> None:
    """Make the list anew from the wheels, which are fetched where they are not there."""
    wheels.mkdir(parents=True, exist_ok=True)
    expressions: dict[tuple[str, str], str] = {}
    for name in CONTENTS:
        for python in PYTHONS:
            new = [pin for pin in pins_for(name, python) if (pin.name, pin.version) not in expressions]
            fetch(new, python, wheels)
            expressions |= {(pin.name, pin.version): licence(_metadata(pin, python, wheels), pin.name) for pin in new}
    rows = [f"| {name} | {version} | {expressions[name, version]} | {where} |" for (name, version), where in locked().items()]
    path.write_text(_HEAD + "\n".join(rows) + "\n")


def _metadata(pin: Pin, python: str, wheels: Path) -> Message:
    wheel = find(pin, python, wheels)
    if wheel is None:
        raise FileNotFoundError(f"{wheels}: no wheel of {pin.name}=={pin.version} for Python {python}")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return email.message_from_bytes(archive.read(name))


def main() -> int:
    match sys.argv[1:]:
        case ["write", folder]:
            write(Path(folder).resolve())
            print(LIST.read_text())
        case ["check"]:
            pass
        case _:
            print("usage: licences.py write FOLDER | check", file=sys.stderr)
            return 2
    wrong = [f"deploy/LICENSES.md: {problem}" for problem in problems()]
    if wrong:
        print(*wrong, "`make licences` makes the list anew.", sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
