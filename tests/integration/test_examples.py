"""The examples run as their readers run them, and show what they say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.processes import wait_until

from ome_tensor_server.testing import running_server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [pytest.mark.slow]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")


def run(name: str, *arguments: str, folder: Path) -> str:
    """What an example prints, from another folder than its own; warnings are errors there, too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@needs_torch
def test_segmentation_learns(tmp_path: Path) -> None:
    """Fewer steps than by default: the loss falls, and nuclei of other planes are found."""
    said = run("torch_segmentation.py", "--epochs", "4", "--windows", "160", "--workers", "2", folder=tmp_path)
    first, last, found = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+); .* IoU ([\d.]+)", said).groups())
    assert last < 0.8 * first
    assert found > 0.5
    assert len(re.findall(r"epoch \d: loss [\d.]+; \d+ tiles/s, starving [\d.]+% of the time", said)) == 4


@needs_torch
def test_ddp_sees_each_tile_once(tmp_path: Path) -> None:
    said = run("ddp.py", folder=tmp_path)
    assert re.findall(r"epoch (\d): each of 400 tiles was seen exactly once", said) == ["0", "1"]
    assert re.search(r"one process goes on with epoch 1: 304 tiles", said)


@needs_torch
def test_a_worker_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Against a server of its own, as compose runs it; what it had learned and read is kept."""
    with running_server([EXAMPLES / "data"]) as server:
        arguments = ("worker.py", server.target, "idr0062a-6001240.chunks", "--state", str(tmp_path / "state"), "--epochs", "2")
        with subprocess.Popen(
            [sys.executable, str(EXAMPLES / arguments[0]), *arguments[1:]], stdout=subprocess.DEVNULL
        ) as killed:
            wait_until((tmp_path / "state").exists, "the first checkpoint", 100)
            killed.kill()
        said = run(*arguments, folder=tmp_path)
        # On a slow machine the kill may come an epoch late.
        assert re.match(r"going on in epoch [01]\n", said)
        losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+); \d+ tiles/s, starving", said)]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 1
        assert run(*arguments, folder=tmp_path).startswith("going on in epoch 1\n")


@needs_jax
def test_jax_reads(tmp_path: Path) -> None:
    said = run("jax_read.py", folder=tmp_path)
    inside, outside = map(int, re.search(r"inside nuclei (\d+), outside (\d+)", said).groups())
    assert inside > 3 * outside > 0
    assert said.startswith("256 tiles in ")


@needs_torch
def test_quickstart(tmp_path: Path) -> None:
    said = run("quickstart.py", folder=tmp_path)
    assert "idr0062a-6001240.chunks/ome_arrow/0" in said
    assert "a batch: (8, 1, 4, 1, 64, 64) uint16" in said
    assert "100 tiles, each exactly once, with a restart in the middle" in said
