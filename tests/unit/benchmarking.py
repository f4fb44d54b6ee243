"""Benchmarks, run as their user does. None of these tests judges how fast anything is, so several may run side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_side_by_side(commands: Mapping[str, Sequence[str]], seconds: float = 400) -> dict[str, str]:
    """What each of them prints; a failure of any is one of the test.

    Args:
        commands: Arguments by the name of the module.
        seconds: That they may take together.
    """
    begun = {
        name: subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{name}", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Where one fails, the others are ended with the servers that they have begun.
            start_new_session=True,
        )
        for name, arguments in commands.items()
    }
    deadline = time.monotonic() + seconds
    try:
        printed = {}
        for name, process in begun.items():
            # The pipes hold all that one of them prints while another is waited for: a few kilobytes.
            out, errors = process.communicate(timeout=deadline - time.monotonic())
            assert process.returncode == 0, f"{name}: {out}{errors}"
            printed[name] = out
        return printed
    finally:
        for process in begun.values():
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def figures_of(folder: Path, *names: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """What several benchmarks write, by their names; each prints a table."""
    files = {name: folder / f"{name}.json" for name in names}
    printed = run_side_by_side({name: ["--quick", "--json", str(file), *arguments] for name, file in files.items()})
    assert all("| " in out for out in printed.values())
    return {name: json.loads(file.read_text())[name] for name, file in files.items()}
