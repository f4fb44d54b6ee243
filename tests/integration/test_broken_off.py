"""Reads that are broken off: days of them leave nothing behind, at the client or at the server."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
from tests.integration.processes import wait_until

from ome_tensor_client import Client, connect
from ome_tensor_server.testing import RunningServer


def kept() -> int:
    """Calls that gRPC keeps in this process."""
    gc.collect()
    return Counter(type(found).__name__ for found in gc.get_objects())["_CallState"]


def break_off(client: Client, how: str) -> None:
    tiles = client.tensor_view("image").iter_tiles(tile_size=(16, 16), prefetch=2 if how == "read ahead" else 0)
    next(tiles)
    if how == "closed":
        tiles.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["closed", "dropped", "read ahead"])
def test_broken_off_reads_leave_nothing_behind(served: RunningServer, how: str) -> None:
    with connect(served.target, transport="tcp", message_bytes=1) as client:
        for _ in range(5):
            break_off(client, how)
        wait_until(lambda: served.server._service.reads.running == 0, "the server has heard of it")
        before = kept()
        for _ in range(40):
            break_off(client, how)
        wait_until(lambda: kept() <= before + 4, "the calls are gone")
        wait_until(lambda: served.server._service.reads.running == 0, "their places are free")
        turns = served.server._service.turns
        wait_until(lambda: (turns.in_flight, turns.waiting) == (0, 0), "nothing is on its way")
