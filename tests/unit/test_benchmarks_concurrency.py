"""The benchmarks behind two decisions (sync or asyncio, sizes and options) run; what they find, is not for a test to judge."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from benchmarks import concurrency, tuning
from benchmarks.children import Child
from benchmarks.concurrency import Case
from benchmarks.concurrency import Reading as Streams
from benchmarks.concurrency_clients import Begun
from benchmarks.peers.base import Data
from benchmarks.wire_figures import Reading
from tests.unit.benchmarking import figures_of


@pytest.mark.slow
@pytest.mark.timeout(420)  # whether they work, not how fast anything is
def test_concurrency_and_tuning(tmp_path: Path) -> None:
    pytest.importorskip("ome_arrow")
    both = figures_of(tmp_path, "concurrency", "tuning")
    found = both["concurrency"]
    assert [row["peer"] for row in found["cases"]] == [*concurrency.PEERS, *concurrency.PEERS]
    assert all(row["rate"] > 0 and row["reads"] > 0 and row["threads"] > 0 for row in found["cases"])
    assert all((row["fairness"] is None) == (row["case"] == "1 stream") for row in found["cases"])
    assert [start["peer"] for start in found["starts"]] == list(concurrency.PEERS)
    assert all(start["seconds"] > 0 for start in found["starts"])
    found = both["tuning"]
    assert len(found["sizes"]) == 2
    for rows in found["sizes"].values():
        assert [row["ratios"]["rate"] for row in rows if row["name"] == "1 MiB"] == [1]
        assert all(row["rate"] > 0 and row["p50_ms"] is None for row in rows)
    assert found["options"][0]["name"] == tuning.SHIPPED
    assert all(row["rate"] > 0 and row["p50_ms"] > 0 for row in found["options"])


def test_fairness() -> None:
    assert concurrency.fairness([5, 5, 5, 5]) == pytest.approx(1)
    assert concurrency.fairness([20, 0, 0, 0]) == pytest.approx(1 / 4)


@pytest.mark.parametrize("case", concurrency.CASES, ids=lambda case: case.name)
def test_streams_are_dealt_out(case: Case) -> None:
    loads = concurrency._loads(case, "localhost:1", Data(Path(), (1, 16, 3, 2048, 2048)), 5, wait=True)
    live, stalled = [start for load in loads for start in load.live], [start for load in loads for start in load.stalled]
    assert (len(live), len(stalled)) == (case.streams - case.stalled, case.stalled)
    assert len({*live, *stalled}) == case.streams
    assert max(len(load.live) for load in loads) - min(len(load.live) for load in loads) <= 1


def test_a_server_is_compared_with_the_sync_one_round_by_round() -> None:
    sync = [Streams((10**9, 10**9), 1.0, 2.0, 9, 10**6, (0.001,)), Streams((10**8, 10**8), 1.0, 0.2, 9, 10**6, (0.003,))]
    other = [Streams((10**9, 2 * 10**9), 1.0, 3.0, 5, 0, (0.002,)), Streams((10**8, 2 * 10**8), 1.0, 0.3, 5, 0, (0.002,))]
    first, second = concurrency.summary({("case", "sync"): sync, ("case", "asyncio, inline"): other})
    assert (first.ratio, first.slowest, first.reads) == (1, 1, 2)
    assert second.ratio == pytest.approx(1.5)
    assert second.slowest == pytest.approx(0.5)
    assert second.cost == pytest.approx(1)
    with pytest.raises(AssertionError, match="nothing arrived"):
        concurrency.summary({("case", "sync"): [Streams((0, 0), 1.0, 1.0, 9, 0, (0.001,))]})


def test_streams_that_never_begin_are_counted() -> None:
    (start,) = concurrency.starts({("case", "sync"): [Begun(1.0, 0), Begun(35.0, 7), Begun(2.0, 0)]})
    assert (start.seconds, start.lost) == (2, 7)


def echo(pipe: Connection) -> None:
    """Gives back what it gets; fails for ``None``."""
    while True:
        what = pipe.recv()
        if what is None:
            raise ValueError("nothing to give back")
        pipe.send(what)


def test_a_child_answers_says_why_it_failed_and_ends() -> None:
    with Child(echo) as child:
        child.tell("hello")
        assert child.answer() == "hello"
        child.tell(None)
        with pytest.raises(RuntimeError, match="nothing to give back"):
            child.answer()
    with Child(echo) as child:
        os.kill(child.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_options_are_set_anew_or_left_out() -> None:
    shipped = (("a", 1), ("b", 2))
    assert tuning.changed(shipped, {"a": None, "c": 3}) == (("b", 2), ("c", 3))
    assert tuning.changed(shipped, {"b": 5}) == (("a", 1), ("b", 5))
    with pytest.raises(KeyError, match="'d'"):
        tuning.changed(shipped, {"d": None})


def test_what_is_left_out_is_shipped() -> None:
    from ome_tensor_client import connection
    from ome_tensor_server import app

    variants = tuning.variants_here()
    assert len(variants) >= len(tuning._VARIANTS) - 1
    for variant in variants:
        assert (tuning.changed(app._OPTIONS, variant.server) == app._OPTIONS) == (not variant.server)
        assert (tuning.changed(connection._CHANNEL_OPTIONS, variant.client) == connection._CHANNEL_OPTIONS) == (
            not variant.client
        )


def test_ratios_are_medians_of_rounds() -> None:
    def rounds(*seconds: float) -> list[Reading]:
        return [Reading(10**9, one, one, one / 2) for one in seconds]

    # A minute that was bad for both changes nothing.
    row = tuning._row("b", "a", {"a": rounds(1, 10, 1), "b": rounds(2, 20, 2)}, {"a": [], "b": []})
    assert row.ratios == {"rate": 0.5, "client_cost": 2, "server_cost": 2}
    assert (row.rate, row.client_cost, row.server_cost, row.p50_ms) == (0.5, 2, 1, None)
