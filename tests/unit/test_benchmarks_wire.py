"""The wire benchmark runs, compares what it reads, and fails for a regression; how fast anybody is, is not for a test to judge."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from benchmarks import wire
from benchmarks.peers import peers
from benchmarks.peers.base import BATCH, TILE, WINDOW, Reader, tile_places
from benchmarks.peers.client import Task, _perform
from benchmarks.peers.network import delayed
from benchmarks.wire_figures import (
    CHECKS,
    FLIGHT,
    MAPPED,
    OURS,
    RAW,
    TENSORSTORE,
    TILED,
    WORKERS,
    ZARR,
    Check,
    Figures,
    Reading,
    judge,
    rate,
)
from tests.unit.benchmarking import figures_of

SHAPE = (1, 2, 3, 2 * TILE, 2 * TILE)


class Local(Reader):
    """Reads an image in this process; adds ``error`` to whatever it gives."""

    def __init__(self, image: np.ndarray, error: int = 0) -> None:
        self.image = image + np.uint16(error)

    def open(self) -> None:
        """Nothing."""

    def tiles(self) -> Iterator[np.ndarray]:
        for z, y, x in tile_places(self.image.shape):
            yield self.image[0, z, :, y : y + TILE, x : x + TILE]

    def plane(self, place) -> np.ndarray:
        z, c, y, x = place
        return self.image[0, z, c, y : y + TILE, x : x + TILE]

    def windows(self, origins) -> Iterator[list[np.ndarray]]:
        for first in range(0, len(origins), BATCH):
            yield [self.image[0, z, :, y : y + WINDOW, x : x + WINDOW] for z, y, x in origins[first : first + BATCH]]


TASKS = [
    Task("tiles", check=True),
    Task("tiles", limit=3, check=True),
    Task("planes", [(1, 2, 3, 4), (0, 0, 256, 256)]),
    Task("windows", [(1, 5, 7)] * (BATCH + 1), check=True),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.kind} {task.limit}")
def test_results_are_compared(task: Task) -> None:
    image = np.random.default_rng(0).integers(0, 2**16, SHAPE, np.uint16)
    sample = _perform(task, Local(image), image)
    assert sample.nbytes > 0
    assert len(sample.latencies) == (len(task.places) if task.kind == "planes" else 0)
    with pytest.raises(AssertionError, match="is not what NumPy gives"):
        _perform(task, Local(image, error=1), image)


def test_missing_pixels_are_an_error() -> None:
    image = np.zeros(SHAPE, np.uint16)
    with pytest.raises(AssertionError, match="bytes of pixels arrived"):
        _perform(Task("tiles"), Local(image[:, :1]), image)


def figures(ours: list[float], theirs: list[float]) -> Figures:
    found = Figures()
    for who, seconds in ((OURS, ours), (FLIGHT, theirs)):
        for one in seconds:
            found.add(who, "tiles", Reading(10**9, one, one, 1.0))
    return found


def test_ratios_are_medians_of_rounds() -> None:
    # A minute that was bad for both changes nothing; one that was bad for us alone is outvoted.
    found = figures([1.0, 10.0, 8.0], [2.0, 20.0, 2.0])
    assert found.ratio(OURS, FLIGHT, "tiles", rate) == pytest.approx(2.0)
    assert found.ratio(OURS, TENSORSTORE, "tiles", rate) is None


def test_a_regression_is_told_from_a_goal_not_reached() -> None:
    least = Check("rate", lambda f: f.ratio(OURS, FLIGHT, "tiles", rate), 1.0, 0.5, "why")
    most = Check("time", lambda f: f.ratio(FLIGHT, OURS, "tiles", rate), 1.0, 2.0, "why", least=False)
    for seconds, met, failed in ((1.0, True, False), (1.5, False, False), (2.5, False, True)):
        for verdict in judge(figures([seconds], [1.0]), (least, most)):
            assert (verdict.met, verdict.failed) == (met, failed)
    nothing = judge(Figures())
    assert {(verdict.met, verdict.failed) for verdict in nothing} == {(None, False)}


def test_every_check_is_of_peers_that_exist_and_says_why() -> None:
    names = {peer.name for peer in peers()}
    assert {OURS, WORKERS, MAPPED, RAW, FLIGHT, TENSORSTORE, ZARR, TILED} <= names
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert check.reason
        # The limit is laxer than the goal, or there would be no such thing as a goal that is missed.
        assert check.holds(check.goal, check.limit)


def test_the_proxy_delays_each_round_trip() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            stream, _ = listener.accept()
            with stream:
                while data := stream.recv(1 << 16):
                    stream.sendall(data)

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        with delayed(f"127.0.0.1:{listener.getsockname()[1]}", 30) as (target, _):
            host, _, port = target.rpartition(":")
            with socket.create_connection((host, int(port))) as stream:
                for _ in range(3):
                    began = time.monotonic()
                    stream.sendall(b"x" * 1000)
                    assert len(stream.recv(1000, socket.MSG_WAITALL)) == 1000
                    assert time.monotonic() - began >= 0.03
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.timeout(420)  # whether it works, not how fast it is
def test_wire(tmp_path: Path) -> None:
    # The peers that every test environment has; the others need nginx and packages of their own.
    found = figures_of(tmp_path, "wire", arguments=["--peers", "raw", "flight", "tcp"])["wire"]
    assert {FLIGHT, OURS, RAW} <= set(found["workloads"]["tiles"])
    assert {"tiles", "planes", "aligned", "windows", "clients"} == set(found["workloads"])
    assert all(rounds["GB/s"][0] > 0 for workload in found["workloads"].values() for rounds in workload.values())
    assert {"10 ms", "1 Gbit/s"} == set(found["links"])
    assert found["links"]["10 ms"]["workloads"]["single 256² reads, p50"][FLIGHT]["p50"][0] >= 10


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        wire.main(["--quick", "--peers", "no such"])
    assert "no such" in capsys.readouterr().err
