"""Asking for known vulnerabilities: nobody could be asked, nothing is known, something is known: three different answers."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".venv-supply" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOOLS.exists(), reason="pip-audit is not installed: `make audit` does"),
]


@contextmanager
def advisories(known: dict[str, str], status: int = 200) -> Iterator[str]:
    """A database in OSV's words: package names, each with the id of what is known against it."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
            answer: dict[str, Any] = {}
            if name in known:
                ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9999"}]}]
                affected = [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": ranges}]
                answer = {"vulns": [{"id": known[name], "summary": "", "details": "", "affected": affected}]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def audit(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(TOOLS), "deploy/audit.py", "--osv-url", url, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_nothing_known_is_a_success_that_counts_what_was_asked() -> None:
    with advisories({}) as url:
        done = audit(url)
    assert done.returncode == 0, done.stderr
    pinned = {
        line.split(" ")[0]
        for path in (ROOT / "deploy" / "locks").glob("*.txt")
        for line in path.read_text().splitlines()
        if line[0] not in " #"
    }
    assert done.stdout.strip() == f"audit: {len(pinned)} locked packages, 0 with something known against them"


def test_what_is_known_fails_and_is_named() -> None:
    # Of one package there are two versions, for older and newer Pythons: both are told.
    with advisories({"jinja2": "GHSA-made-up", "numpy": "PYSEC-made-up"}) as url:
        done = audit(url)
    assert done.returncode == 1
    assert "jinja2==" in done.stdout
    assert "GHSA-made-up, fixed in 9999" in done.stdout
    assert done.stdout.count("PYSEC-made-up") == 2


@pytest.mark.parametrize("options, status", [([], 0), (["--required"], 2)])
def test_a_database_that_cannot_be_reached_is_said_in_one_line(options: list[str], status: int) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        done = audit(f"http://127.0.0.1:{closed.getsockname()[1]}/v1/query", *options)
    assert done.returncode == status
    assert done.stdout.startswith("audit: NOT done, the advisory database cannot be reached")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_database_that_is_broken_has_not_been_reached() -> None:
    with advisories({"jinja2": "GHSA-made-up"}, status=503) as url:
        done = audit(url)
    assert done.returncode == 0
    assert "NOT done" in done.stdout
    assert "503" in done.stdout


def test_a_database_that_says_nothing_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        done = audit(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/query")
    assert (done.returncode, "NOT done" in done.stdout) == (0, True)
    assert time.monotonic() - began < 20
