"""What goes wrong, and what comes of it; ``python -m tests.integration.faults`` does it for longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.integration.faults import FAULTS, run


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name != "disk full"])
def test_nothing_wrong_arrives_and_nothing_hangs(name: str, tmp_path: Path) -> None:
    # Each time for longer than the client waits: it may say so instead, and another try brings nothing else.
    is_silent = name in ("silence", "server stopped")
    (outcome,) = run(name, tmp_path, seconds=6.0 if is_silent else 12.0, enough=2, kinds=("stream",)).values()
    assert not outcome.wrong
    assert not outcome.hung
    if is_silent:
        assert outcome.right or set(outcome.refused) <= {"DeadlineExceeded", "Unavailable"}, outcome
    else:
        # What it is all about: a reader gets through.
        assert outcome.right > 0, outcome


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a small disk")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    outcome = run("disk full", tmp_path, seconds=0.5, kinds=("upload",))["upload"]
    assert set(outcome.refused) == {"Overloaded"}
    assert not list((tmp_path / "upload" / "uploads").glob("*.part")), "nothing of it is left"
