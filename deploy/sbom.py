#!/usr/bin/env python3
"""Software bills of materials of the images, as CycloneDX JSON in `dist/`: what `make sbom` does.

    python deploy/sbom.py [PYTHON_VERSION]

cyclonedx-py makes each from a lock file, for one Python (the base image's; 3.12 unless told). Added to it are the licences of
`deploy/LICENSES.md` and which package asked for which, and the whole is held against CycloneDX's own schema.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from typing import Any

import licences
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from lockfiles import PYTHONS, ROOT, Pin, pins_for

DIST = ROOT / "dist"
SPEC_VERSION = "1.6"


def bill(name: str, python: str) -> dict[str, Any]:
    """What one image holds.

    Raises:
        ValueError: it would not be valid.
    """
    pins = pins_for(name, python)
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "-", "--pyproject", str(ROOT / "pyproject.toml")]
    command += ["--spec-version", SPEC_VERSION, "--output-reproducible", "--short-PURLs", "--output-format", "JSON"]
    lines = "\n".join(pin.line() for pin in pins)
    made = subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(made)
    _add_licences(found)
    _add_dependencies(found, pins)
    text = json.dumps(found)
    if error := JsonStrictValidator(SchemaVersion.from_version(SPEC_VERSION)).validate_str(text):
        raise ValueError(f"not CycloneDX {SPEC_VERSION}: {error}")
    return found


def _add_licences(found: dict[str, Any]) -> None:
    listed = licences.read()
    for component in found["components"]:
        expression, _ = listed[component["name"], component["version"]]
        component["licenses"] = [{"expression": expression}]


def _add_dependencies(found: dict[str, Any], pins: list[Pin]) -> None:
    root = found["metadata"]["component"]["bom-ref"]
    references = {component["name"]: component["bom-ref"] for component in found["components"]}
    wanted: dict[str, list[str]] = {reference: [] for reference in (root, *references.values())}
    for pin in pins:
        for by in pin.asked_by:
            # What torch needs has no other parent here than the image itself, since torch is not locked.
            wanted[references.get(by, root)].append(references[pin.name])
    found["dependencies"] = [{"ref": of, "dependsOn": sorted(set(on))} for of, on in sorted(wanted.items())]


def main() -> None:
    python = sys.argv[1] if len(sys.argv) > 1 else "3.12"
    if python not in PYTHONS or len(sys.argv) > 2:
        sys.exit(f"usage: sbom.py [{' | '.join(PYTHONS)}]")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    DIST.mkdir(exist_ok=True)
    for name in ("server", "client-torch"):
        path = DIST / f"ome-tensor-{version}-{name}.cdx.json"
        found = bill(name, python)
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{path.relative_to(ROOT)}: {len(found['components'])} packages, valid CycloneDX {SPEC_VERSION}")


if __name__ == "__main__":
    main()
