"""When ``compression="auto"`` switches: the rule and its bookkeeping, with no network and a clock that only tests move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ome_tensor import InvalidArgument
from ome_tensor_client import Options
from ome_tensor_client.compression import Advisor, Span, Trial, Tuner, best_codec, is_paying, try_codecs
from ome_tensor_proto.reader import TileBatch
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

MB = 10**6


class Clock:
    """Stands still unless moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def span(rate: float, seconds: float = 1.0, waited: float = 0.9, served: float = 0.1) -> Span:
    """A second of a read over a link of so many MB/s."""
    return Span(int(rate * MB * seconds), seconds, waited * seconds, served * seconds)


FAST = {"lz4": Trial(2.0, 600 * MB, 2000 * MB), "zstd": Trial(3.0, 300 * MB, 900 * MB)}


@pytest.mark.parametrize(
    "seen,trials,wanted",
    [
        # 1 Gbit/s: zstd would bring min(3 x 115, 300), lz4 2 x 115.
        (span(115), FAST, "zstd"),
        # 2.5 Gbit/s: zstd squeezes too slowly.
        (span(290), FAST, "lz4"),
        # 10 Gbit/s, loopback: nothing keeps up.
        (span(1150), FAST, "none"),
        (span(1150), {"lz4": Trial(10.0, 1000 * MB, 4000 * MB)}, "none"),
        # Noise.
        (span(115), {"lz4": Trial(1.0, 2000 * MB, 4000 * MB), "zstd": Trial(1.0, 1000 * MB, 2000 * MB)}, "none"),
        # Hardly smaller.
        (span(115), {"lz4": Trial(1.2, 600 * MB, 2000 * MB)}, "none"),
        # A receiver that unpacks slowly.
        (span(115), {"lz4": Trial(2.0, 600 * MB, 120 * MB)}, "none"),
        # The receiver's caller is slow, not the link.
        (span(10, waited=0.4), FAST, "none"),
        # The server is slow, not the link.
        (span(10, served=0.6), FAST, "none"),
        (span(115), {}, "none"),
        (Span(), FAST, "none"),
    ],
)
def test_the_rule(seen: Span, trials: dict[str, Trial], wanted: str) -> None:
    """Only where the link is what is waited for, and by a margin."""
    assert best_codec(seen, trials) == wanted


def test_what_pays_is_kept() -> None:
    """More pixels a second, or a receiver that has enough of them."""
    assert is_paying(span(115), span(200))
    assert not is_paying(span(115), span(120))
    assert is_paying(span(115), span(110, waited=0.1))


@pytest.mark.parametrize(
    "pixels,seconds,long", [(8 << 20, 0.01, True), (7 << 20, 0.9, False), (1 << 20, 1.0, True), (1 << 19, 9.0, False)]
)
def test_spans_are_long_enough(pixels: int, seconds: float, long: bool) -> None:
    """Buffers on the way hide a link's speed at first."""
    assert Span(pixels, seconds).is_long == long


def test_trials_tell_noise_from_pixels() -> None:
    """With a clock that stands still: only the ratio is known."""
    noise = try_codecs(np.random.default_rng(0).integers(0, 2**16, 100_000).astype(np.uint16), Clock())
    flat = try_codecs(np.zeros((100, 1000), np.uint16), Clock())
    assert noise.keys() == flat.keys() == {"lz4", "zstd"}
    for codec in noise:
        assert noise[codec].ratio < 1.05
        assert flat[codec].ratio > 50


class Reading:
    """A read of 1 MiB messages over a link of so many MB/s, on a fake clock."""

    def __init__(self, advisor: Advisor, clock: Clock, trials: dict[str, Trial] = FAST) -> None:
        self.clock = clock
        self.sampled = 0
        self.trials = trials
        self.tuner = Tuner(advisor, "plates", self._trial)

    def _trial(self, sample: np.ndarray) -> dict[str, Trial]:
        self.sampled += 1
        assert 0 < sample.nbytes <= 512 << 10
        return self.trials

    def read(self, megabytes: int, rate: float, waiting: float = 1.0) -> list[tuple[int, str]]:
        """The messages after which the codec changed, and to which."""
        pixels = np.zeros((2, 1, 1, 1, 512, 512), np.uint16)
        changes = []
        for number in range(megabytes):
            seconds = pixels.nbytes / (rate * MB)
            self.clock.now += seconds
            batch = TileBatch(number, 2, 0, {}, pixels, pb.ReadTilesTimings(gather_us=100))
            if self.tuner.saw(batch, seconds * waiting):
                changes.append((number, self.tuner.codec))
        return changes


@pytest.fixture
def clock() -> Clock:
    """The time of a test."""
    return Clock()


@pytest.fixture
def advisor(clock: Clock) -> Advisor:
    """A connection's."""
    return Advisor(clock)


def test_on_where_it_pays(advisor: Advisor, clock: Clock) -> None:
    """After the first span; kept after the next; other reads begin with it, and look no more, until a minute has gone."""
    reading = Reading(advisor, clock)
    assert reading.tuner.codec == "none"
    assert reading.read(9, 115) == [(8, "zstd")]
    assert reading.read(100, 250) == []
    assert reading.sampled == 1
    again = Reading(advisor, clock)
    assert again.tuner.codec == "zstd"
    assert again.read(50, 250) == []
    assert again.sampled == 0
    clock.now += 61
    later = Reading(advisor, clock)
    assert later.tuner.codec == "none"
    assert later.read(10, 115) == [(8, "zstd")]


def test_off_where_it_does_not(advisor: Advisor, clock: Clock) -> None:
    """It was expected to bring twice as much, and brings the same: back, and no more of it for a minute."""
    reading = Reading(advisor, clock)
    assert reading.read(9, 115) == [(8, "zstd")]
    assert reading.read(50, 116) == [(8, "none")]
    assert reading.sampled == 1
    again = Reading(advisor, clock)
    assert again.read(50, 115) == []
    assert again.sampled == 0
    clock.now += 61
    assert Reading(advisor, clock).read(10, 115) == [(8, "zstd")]


def test_short_reads_prove_it_together(advisor: Advisor, clock: Clock) -> None:
    """A read that ends before its second span leaves the question to the next one."""
    assert Reading(advisor, clock).read(10, 115) == [(8, "zstd")]
    following = Reading(advisor, clock)
    assert following.tuner.codec == "zstd"
    assert following.read(20, 100) == [(8, "none")]


def test_never_on_a_fast_link_nor_for_a_slow_reader(advisor: Advisor, clock: Clock) -> None:
    """Nor is a sample taken where the link is not to blame."""
    fast = Reading(advisor, clock)
    assert fast.read(100, 2000) == []
    slow = Reading(advisor, clock)
    assert slow.read(100, 50, waiting=0.2) == []
    assert slow.sampled == 0
    noise = Reading(advisor, clock, {"lz4": Trial(1.0, 2000 * MB, 4000 * MB)})
    assert noise.read(100, 115) == []


def test_datasets_are_apart(advisor: Advisor, clock: Clock) -> None:
    """What shrinks is a matter of the pixels."""
    Reading(advisor, clock).read(9, 115)
    assert Tuner(advisor, "plates").codec == "zstd"
    assert Tuner(advisor, "others").codec == "none"


@pytest.mark.parametrize("value", ["gzip", "", None, 1, "LZ4"])
def test_options_know_the_words(value: Any) -> None:
    """Four of them."""
    for word in ("none", "lz4", "zstd", "auto"):
        assert Options(compression=word).compression == word
    with pytest.raises(InvalidArgument, match="compression must be one of none, lz4, zstd, auto"):
        Options(compression=value)
