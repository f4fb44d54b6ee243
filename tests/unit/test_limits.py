"""How much a caller may ask at a time."""

from __future__ import annotations

import pytest

from ome_tensor.errors import Overloaded
from ome_tensor_client.backoff import Backoff
from ome_tensor_server.limits import Rates, Reads
from ome_tensor_server.principals import Caller
from ome_tensor_server.settings import Settings


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def taken(rates: Rates, caller: str, most: int = 100) -> int:
    """How many calls are let in at once."""
    for count in range(most):
        try:
            rates.admit(caller)
        except Overloaded:
            return count
    return most


def test_no_limit() -> None:
    assert taken(Rates(Settings()), "a", 1000) == 1000


def test_each_caller_has_a_rate_of_its_own() -> None:
    clock = Clock()
    rates = Rates(Settings(max_caller_requests_per_second=5), clock)
    assert taken(rates, "a") == 5
    assert taken(rates, "b") == 5
    clock.now = 1.0
    assert taken(rates, "a") == 5
    clock.now = 1.2
    assert taken(rates, "a") == 1
    clock.now = 100.0
    assert taken(rates, "a") == 5, "what was not used is not saved up"


def test_all_callers_together_have_one() -> None:
    clock = Clock()
    rates = Rates(Settings(max_requests_per_second=4, max_caller_requests_per_second=3), clock)
    assert taken(rates, "a") == 3
    assert taken(rates, "b") == 1
    clock.now = 1.0
    assert taken(rates, "b") == 3, "what was refused for all together has not used up its own"


@pytest.mark.parametrize("rate", [0.5, 2.0, 7.5])
def test_what_is_refused_is_told_when_to_come_again(rate: float) -> None:
    clock = Clock()
    rates = Rates(Settings(max_caller_requests_per_second=rate), clock)
    taken(rates, "a")
    with pytest.raises(Overloaded) as caught:
        rates.admit("a")
    assert caught.value.field == "max_caller_requests_per_second"
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 1 / rate
    clock.now += caught.value.retry_after * 1.0001
    rates.admit("a")


def test_callers_that_are_forgotten_cost_nothing() -> None:
    rates = Rates(Settings(max_caller_requests_per_second=1))
    for number in range(10_050):
        rates.admit(f"caller {number}")
    assert len(rates._callers) == 10_000


def test_places_for_reads() -> None:
    reads = Reads(Settings(max_concurrent_reads=3, max_caller_reads=2))
    with reads.one("a"), reads.one("a"):
        assert reads.free == 1
        with pytest.raises(Overloaded) as caught, reads.one("a"):
            pass
        assert caught.value.field == "max_caller_reads"
        with reads.one("b"):
            with pytest.raises(Overloaded) as caught, reads.one("c"):
                pass
            assert caught.value.field == "max_concurrent_reads"
    assert reads.free == 3
    assert not reads._each


def test_one_caller_leaves_room_where_callers_are_known() -> None:
    assert Settings(max_concurrent_reads=64).caller_reads == 64
    assert Settings(max_concurrent_reads=64, tokens="x").caller_reads == 48
    assert Settings(max_concurrent_reads=1, tokens="x").caller_reads == 1
    assert Settings(max_concurrent_reads=64, tokens="x", max_caller_reads=5).caller_reads == 5


def test_a_client_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    backoff = Backoff(10)
    backoff.pause(Overloaded("full", retry_after=1.5))
    assert 1.5 <= slept[0] <= 1.875
    with pytest.raises(Overloaded):
        backoff.pause(Overloaded("full", retry_after=30))


@pytest.mark.parametrize(
    "peer, host, network",
    [
        ("ipv4:10.0.0.7:4321", "10.0.0.7", "10.0.0.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4321", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2::%5D:4321", "2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:4321", "::ffff:10.0.0.7", "10.0.0.7"),
        ("ipv6:%5B::1%5D:4321", "::1", "::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4321", "fe80::1%eth0", "fe80::1%eth0"),
        ("unix:", "unix", "unix"),
    ],
)
def test_a_caller_may_have_a_network_of_addresses(peer: str, host: str, network: str) -> None:
    """One who means harm uses all of it; shares go by hosts, since a laboratory may be in one."""
    caller = Caller(peer)
    assert (caller.host, caller.network) == (host, network)
    assert caller.key == f"anonymous@{host}"
