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


class Bench:
    """Streams that make messages of one size, one after the other, on threads of their own; who was served is written down."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.served: list[str] = []
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []

    def stream(self, caller: str, name: str, nbytes: int) -> None:
        def run() -> None:
            turn = self.turns.stream(caller)
            while not self.stop.is_set():
                turn.begin(nbytes, wanted)
                self.served.append(name)
                time.sleep(0.0002)
                turn.made()
                turn.taken()
            turn.close()

        self.threads.append(in_background(run))

    def count(self, messages: int) -> Counter[str]:
        wait_for(lambda: len(self.served) >= messages)
        self.stop.set()
        for thread in self.threads:
            thread.join(5)
            assert not thread.is_alive()
        return Counter(self.served[messages // 10 : messages])


def test_callers_share_equally_however_many_streams_they_have() -> None:
    bench = Bench(Turns(1, 100 * MIB, 100 * MIB))
    for number in range(8):
        bench.stream("many", f"many {number}", MIB)
    bench.stream("one", "one", MIB)
    counts = bench.count(600)
    one, many = counts["one"], sum(counts.values()) - counts["one"]
    assert 0.8 < one / many < 1.25
    each = [count for name, count in counts.items() if name != "one"]
    assert max(each) - min(each) <= 4


def test_bytes_count_and_not_messages() -> None:
    bench = Bench(Turns(1, 100 * MIB, 100 * MIB))
    for _ in range(4):  # Of each caller one waits whenever there is something to choose.
        bench.stream("a", "large", 4 * MIB)
        bench.stream("b", "small", MIB)
    counts = bench.count(400)
    assert 3 < counts["small"] / counts["large"] < 5


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
