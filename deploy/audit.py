#!/usr/bin/env python3
"""Known vulnerabilities of what the lock files pin, by pip-audit and the OSV database.

    python deploy/audit.py [--required]

Exit status 0: none is known, or nobody could be asked, which one line says (with `--required` that is 2); 1: some are known, or
pip-audit failed. The index's own database is not used: behind a mirror it answers that nothing is known of any package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lockfiles import CONTENTS, PYTHONS, pins_for

OSV = "https://api.osv.dev/v1/query"
# Long enough for a slow answer, and the whole of what a machine without a network waits.
PROBE_SECONDS = 10

#: In a process of its own, since nothing else bounds how long a name is looked up.
_PROBE = """
import json, sys, urllib.request
query = {"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "24.0"}
request = urllib.request.Request(sys.argv[1], json.dumps(query).encode(), {"Content-Type": "application/json"})
try:
    with urllib.request.urlopen(request, timeout=5) as answer:
        sys.exit(None if isinstance(json.load(answer), dict) else "it answers something else")
except (OSError, ValueError) as error:
    sys.exit(str(error))
"""


def why_not_reached(url: str) -> str:
    """Why the database does not answer; empty if it does."""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE, url], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_SECONDS} s"
    return (probe.stderr.strip().splitlines() or ["no reason given"])[-1] if probe.returncode else ""


def audit(url: str) -> list[dict[str, Any]]:
    """What pip-audit says of each locked package, on every Python that the lock files are for.

    Raises:
        RuntimeError: it said nothing.
    """
    # One file for each version of a package, since a file may name a package only once.
    locked = {pin.name: {} for name in CONTENTS for python in PYTHONS for pin in pins_for(name, python)}
    for name in CONTENTS:
        for python in PYTHONS:
            for pin in pins_for(name, python):
                locked[pin.name][pin.version] = pin.line()
    found: list[dict[str, Any]] = []
    for turn in range(max(map(len, locked.values()))):
        lines = [list(versions.values())[turn] for versions in locked.values() if turn < len(versions)]
        found += _pip_audit(lines, url)
    return found


def _pip_audit(lines: list[str], url: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "locked.txt"
        wanted.write_text("\n".join(lines))
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(wanted), "--require-hashes", "--disable-pip"]
        command += ["--vulnerability-service", "osv", "--osv-url", url, "--format", "json", "--progress-spinner", "off"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        dependencies: list[dict[str, Any]] = json.loads(ran.stdout)["dependencies"]
    except (ValueError, KeyError):
        raise RuntimeError(f"pip-audit failed, status {ran.returncode}:\n{ran.stderr[-2000:]}") from None
    return dependencies


def main() -> int:
    parser = argparse.ArgumentParser(description="Known vulnerabilities of the locked packages.")
    parser.add_argument("--required", action="store_true", help="fail, with status 2, where the database cannot be reached")
    parser.add_argument("--osv-url", default=OSV, help="where the database is asked")
    arguments = parser.parse_args()
    if reason := why_not_reached(arguments.osv_url):
        print(f"audit: NOT done, the advisory database cannot be reached ({reason})")
        return 2 if arguments.required else 0
    try:
        packages = audit(arguments.osv_url)
    except RuntimeError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 1
    wrong = []
    for package in packages:
        if "skip_reason" in package:
            wrong.append(f"{package['name']} was not looked up: {package['skip_reason']}")
        for known in package.get("vulns", ()):
            fixed = ", ".join(known["fix_versions"]) or "nothing yet"
            wrong.append(f"{package['name']}=={package['version']}: {known['id']}, fixed in {fixed}")
    print(*wrong, f"audit: {len(packages)} locked packages, {len(wrong)} with something known against them", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
