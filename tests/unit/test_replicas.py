"""Which of several servers a call goes to."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import grpc

from ome_tensor_client.replicas import Replicas

TARGETS = ("a:1", "b:2", "c:3")


def plain(target: str, options: tuple[tuple[str, Any], ...]) -> grpc.Channel:
    return grpc.insecure_channel(target, options)


def replicas_of(*serving: str) -> Replicas:
    found = Replicas(TARGETS, plain, ask=lambda target: target in serving)
    found.preferred = 0
    return found


def test_the_preferred_one_and_then_the_next() -> None:
    replicas = replicas_of()
    assert [replicas.pick(offset).target for offset in range(4)] == ["a:1", "b:2", "c:3", "a:1"]
    assert replicas.put_aside(replicas.pick())
    assert [replicas.pick(offset).target for offset in range(3)] == ["b:2", "b:2", "c:3"]
    assert replicas.put_aside(replicas.pick())
    assert replicas.pick().target == "c:3"
    # Of those that all failed, the one that has been away for longest.
    assert not replicas.put_aside(replicas.pick())
    assert replicas.pick().target == "a:1"
    assert not replicas.put_aside(replicas.pick())
    assert replicas.pick().target == "b:2"
    assert replicas.home().target == "a:1"


def test_one_that_serves_again_is_used_again_and_nobody_asks_any_more() -> None:
    replicas = replicas_of("a:1")
    replicas.put_aside(replicas.channels[0])
    assert replicas.is_aside(replicas.channels[0])
    thread = replicas._asking
    assert thread is not None
    thread.join(5)
    assert not thread.is_alive()
    assert replicas.pick().target == "a:1"
    # And once more.
    replicas.put_aside(replicas.channels[0])
    assert replicas._asking is not thread


def test_one_that_stays_away_is_asked_until_the_connection_is_dropped() -> None:
    asked = threading.Event()

    def ask(target: str) -> bool:
        asked.set()
        return False

    replicas = Replicas(TARGETS, plain, ask=ask)
    replicas.put_aside(replicas.channels[1])
    thread, gone = replicas._asking, weakref.ref(replicas)
    assert thread is not None
    assert asked.wait(5)
    del replicas
    deadline = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert not thread.is_alive()
    assert gone() is None


def test_a_single_one_is_never_put_aside() -> None:
    replicas = Replicas(["a:1"], plain, ask=lambda target: True)
    assert not replicas.put_aside(replicas.pick())
    assert replicas._asking is None
    assert replicas.pick(5).target == "a:1"
    assert not replicas.are_several


def test_the_clients_of_one_that_is_away_spread_over_the_others() -> None:
    replicas = replicas_of()
    replicas.put_aside(replicas.channels[0])
    # Every third shard of twelve is at home there.
    assert [replicas.pick(shard).target for shard in range(0, 12, 3)] == ["b:2", "c:3", "b:2", "c:3"]
    assert [replicas.pick(shard).target for shard in (1, 4, 2, 5)] == ["b:2", "b:2", "c:3", "c:3"]
    replicas.put_aside(replicas.channels[1])
    assert {replicas.pick(shard).target for shard in range(12)} == {"c:3"}


def test_one_that_says_it_serves_and_does_not_is_believed_ever_later() -> None:
    now = 1000.0
    # The thread that asks by itself is too late for this test.
    replicas = Replicas(TARGETS, plain, ask=lambda target: True, clock=lambda: now)
    troubled = replicas.channels[0]

    def away_for() -> float:
        """How long it stays aside, in quarters of a second."""
        nonlocal now
        since = now
        while True:
            replicas._look(troubled)
            if not replicas.is_aside(troubled):
                return now - since
            now += 0.25

    replicas._asking = threading.current_thread()
    times = []
    for _ in range(6):
        # Back, and the first call, a second later, hangs for two.
        now += 3
        replicas.put_aside(troubled, began=now - 2)
        times.append(away_for())
    assert times == [2, 8, 32, 60, 60, 60]
    # It did well for a minute: what is refused then is asked for at once.
    now += 60
    replicas.put_aside(troubled, began=now)
    assert away_for() == 0
    # Nor is one that brings something held off, however often it fails.
    for _ in range(3):
        replicas.put_aside(troubled, None)
        assert away_for() == 0
    # A failure while it is aside is no further one.
    replicas.put_aside(troubled, began=now - 2)
    replicas.put_aside(troubled, began=now - 2)
    assert away_for() == 2
    replicas.put_aside(troubled, began=now)
    replicas.close()
    assert not replicas.is_aside(troubled)


def test_a_thread_that_has_died_is_replaced() -> None:
    replicas = replicas_of("a:1")
    replicas._asking = threading.Thread(target=print)
    replicas.put_aside(replicas.channels[0])
    assert replicas._asking.is_alive()
    replicas._asking.join(5)
    assert not replicas.is_aside(replicas.channels[0])
