"""Whose message is made next."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ome_tensor.errors import Cancelled, Overloaded
from ome_tensor_server.turns import Turn, Turns

MIB = 1 << 20


def wanted() -> bool:
    return True


def in_background(do: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_alone_nobody_waits() -> None:
    turns = Turns(1, 10, 10)
    turn = turns.stream("a")
    for _ in range(3):
        turn.begin(4, wanted)
        assert turns.in_flight == 4
        turn.made()
        turn.taken()
    turn.close()
    assert (turns.in_flight, turns.waiting) == (0, 0)


def served(turns: Turns, streams: list[tuple[str, str, int]], messages: int) -> Counter[str]:
    """How many messages each stream was served, of those that always want another one: name, caller and bytes of a message of each.

    Without threads, whose pace is the machine's: each asks, and again as soon as its message was taken.
    """
    waiting = {turns.stream(caller): (name, nbytes) for name, caller, nbytes in streams}

    def ask(turn: Turn) -> None:
        turn.woken.acquire(blocking=False)  # As one that was woken has.
        turn.began = False
        with turns.lock:
            turns._enter(turn, waiting[turn][1])
        turn._is_made = False

    for turn in waiting:
        ask(turn)
    counts: Counter[str] = Counter()
    for number in range(messages):
        turn = next(turn for turn in waiting if turn.began)
        if number >= messages // 10:
            counts[waiting[turn][0]] += 1
        turn.made()
        turn.taken()
        ask(turn)
    return counts


def test_callers_share_equally_however_many_streams_they_have() -> None:
    turns = Turns(1, 100 * MIB, 100 * MIB)
    streams = [(f"many {number}", "many", MIB) for number in range(8)] + [(f"one {number}", "one", MIB) for number in range(2)]
    counts = served(turns, streams, 600)
    one = counts["one 0"] + counts["one 1"]
    assert 0.95 < one / (counts.total() - one) < 1.05
    each = [count for name, count in counts.items() if name.startswith("many")]
    assert max(each) - min(each) <= 2


def test_bytes_count_and_not_messages() -> None:
    streams = [(name, name, nbytes) for name, nbytes in (("large", 4 * MIB), ("small", MIB)) for _ in range(2)]
    counts = served(Turns(1, 100 * MIB, 100 * MIB), streams, 500)
    assert 3.8 < counts["small"] / counts["large"] < 4.2


def test_a_stream_that_has_just_begun_is_next() -> None:
    """A small read waits for what is being made, and not for all that wait."""
    turns = Turns(1, 1000 * MIB, 1000 * MIB)
    first = turns.stream("a")
    first.begin(MIB, wanted)
    order: list[str] = []

    def run(turn: Turn, name: str) -> None:
        turn.begin(MIB, wanted)
        order.append(name)
        turn.made()
        turn.taken()

    bulk = [turns.stream("a") for _ in range(5)]
    first.made()
    for turn in bulk:  # Each has been served before, and they are equal.
        turn.begin(MIB, wanted)
        turn.made()
        turn.taken()
    first.taken()
    first.begin(MIB, wanted)
    threads = [in_background(lambda turn=turn: run(turn, "bulk")) for turn in bulk]  # type: ignore[misc]
    wait_for(lambda: turns.waiting == 5)
    small = turns.stream("a")
    threads.append(in_background(lambda: run(small, "small")))
    wait_for(lambda: turns.waiting == 6)
    first.made()
    for thread in threads:
        thread.join(5)
    assert order[0] == "small"
    assert len(order) == 6


def test_what_only_waits_for_others_takes_no_place() -> None:
    turns = Turns(1, 100, 100)
    working = turns.stream("a")
    working.begin(10, wanted)
    elsewhere = turns.stream("a", works=False)
    elsewhere.begin(10, wanted)
    assert turns.in_flight == 20


def test_memory_that_nobody_frees_is_not_waited_for_for_ever() -> None:
    turns = Turns(2, 100, 100, patience=0.2)
    stalled = turns.stream("a")
    stalled.begin(80, wanted)
    stalled.made()
    other = turns.stream("b")
    with pytest.raises(Overloaded) as caught:
        other.begin(30, wanted)
    assert caught.value.field == "max_bytes_in_flight"
    assert caught.value.retry_after
    assert turns.waiting == 0
    other.close()
    assert turns.in_flight == 80
    other = turns.stream("b")
    small = turns.stream("b")
    small.begin(20, wanted)  # There is room for that.
    stalled.taken()
    other.begin(30, wanted)
    assert turns.in_flight == 50


def test_one_callers_stalled_messages_leave_room_for_others() -> None:
    turns = Turns(4, 100, 50, patience=0.2)
    greedy = [turns.stream("greedy") for _ in range(2)]
    greedy[0].begin(40, wanted)
    greedy[0].made()
    with pytest.raises(Overloaded):
        greedy[1].begin(40, wanted)
    other = turns.stream("other")
    other.begin(50, wanted)
    assert turns.in_flight == 90


def test_what_is_larger_than_all_gets_through_alone() -> None:
    turns = Turns(2, 100, 50, patience=0.2)
    turn = turns.stream("a")
    turn.begin(1000, wanted)
    turn.made()
    turn.taken()
    assert turns.in_flight == 0


def test_whoever_has_gone_waits_no_more() -> None:
    turns = Turns(1, 100, 100)
    first = turns.stream("a")
    first.begin(10, wanted)
    second = turns.stream("a")
    with pytest.raises(Cancelled):
        second.begin(10, lambda: False)
    assert turns.waiting == 0
    second.close()
    first.close()
    third = turns.stream("a")
    third.begin(10, wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.booleans(), st.integers(1, 6)), min_size=1, max_size=12),
    st.integers(1, 3),
)
def test_nobody_is_forgotten_and_no_limit_is_passed(streams: list[tuple[str, int, bool, int]], places: int) -> None:
    """Whatever comes: everybody is served, and in the end nothing is counted as taken."""
    turns = Turns(places, 100, 60)
    lock, working, most = threading.Lock(), [0], [0]

    def run(caller: str, nbytes: int, works: bool, messages: int) -> None:
        turn = turns.stream(caller, works=works)
        for _ in range(messages):
            turn.begin(nbytes, wanted)
            assert turns.in_flight <= 100
            if works:
                with lock:
                    working[0] += 1
                    most[0] = max(most[0], working[0])
                with lock:
                    working[0] -= 1
            turn.made()
            turn.taken()
        turn.close()

    threads = [in_background(lambda one=one: run(*one)) for one in streams]  # type: ignore[misc]
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert (turns.in_flight, turns.waiting) == (0, 0)
    assert most[0] <= places
    again = turns.stream("z")
    again.begin(1, wanted)
