"""When compressed pixels arrive sooner: the rule behind ``compression="auto"``, and the measurements that it goes by.

Compression pays where the *link* is what a read waits for, and the pixels shrink, and both ends squeeze and unpack them faster than the link
carries them. Only the receiver can tell a slow link from a slow reader, so it measures and decides, and asks for the rest of its read anew. The rule:

1. Look at spans of a read, of at least 8 MiB of pixels (1 MiB on a link so slow that this takes a second).
2. Where the receiver spent less than half of a span waiting for messages, its own caller is what is slow: leave compression off. Where the server was
   busy (gathering, encoding: it says so in each message) for more than half of it, the server is: leave it off.
3. Otherwise the link carried ``bytes / seconds``. Squeeze and unpack a sample of the pixels that have just arrived, with each codec: that is
   the ratio and the speeds. Pixels would then arrive at the least of ``link * ratio``, the squeezing and the unpacking.
4. Take the codec that gives most, if that is at least 1.25 times what the link carried.
5. Look at the next span: where pixels do not arrive 1.1 times as fast as before, go back, and let it be for a minute.

A decision holds for a minute and for all reads of one dataset over one connection; then it is made anew. On a loopback interface the link is faster
than any codec (3 and 4 say no); noise does not shrink (4 says no, and the server sends what does not shrink as it is).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from ome_tensor_proto.reader import TileBatch

__all__ = ["Advisor", "Span", "Trial", "Tuner", "best_codec", "is_paying", "try_codecs"]

#: The codecs of the contract.
CODECS: Final = ("lz4", "zstd")

NONE: Final = "none"

# Long enough that buffers on the way (some MiB) have filled and a link shows its speed.
_SPAN_BYTES = 8 << 20
_SLOW_SPAN_BYTES, _SLOW_SPAN_SECONDS = 1 << 20, 1.0

#: A sample takes some milliseconds; a larger one would say the same.
_SAMPLE_BYTES = 512 << 10

#: Restarting a read costs a round trip and what was on its way.
_WORTH_BEGINNING = 1.25
_WORTH_KEEPING = 1.1

_KEPT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Span:
    """What was seen of a stretch of a read.

    Attributes:
        pixel_bytes: Bytes of pixels that arrived, as they are once unpacked.
        seconds: How long it took.
        waited: Seconds of these in which the receiver waited for messages.
        served: Seconds that the server says to have worked on them.
    """

    pixel_bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    served: float = 0.0

    @property
    def is_long(self) -> bool:
        """Whether it says something of the link."""
        return self.pixel_bytes >= _SPAN_BYTES or (self.pixel_bytes >= _SLOW_SPAN_BYTES and self.seconds >= _SLOW_SPAN_SECONDS)

    @property
    def is_held_up_by_link(self) -> bool:
        """Whether neither the receiver nor the server was what took the time."""
        return self.seconds > 0 and self.waited >= 0.5 * self.seconds and self.served <= 0.5 * self.seconds

    @property
    def pixel_rate(self) -> float:
        """Pixels that arrived, in bytes a second."""
        return self.pixel_bytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Trial:
    """What a codec makes of a sample of pixels.

    Attributes:
        ratio: Size before by size after.
        squeezes, unpacks: Bytes of pixels a second.
    """

    ratio: float
    squeezes: float
    unpacks: float


def best_codec(span: Span, trials: Mapping[str, Trial]) -> str:
    """The codec with which the rest of an uncompressed read would arrive sooner, or ``none``: steps 2 to 4 of the rule."""
    if not span.is_held_up_by_link:
        return NONE
    best, most = NONE, _WORTH_BEGINNING * span.pixel_rate
    for codec, trial in trials.items():
        rate = min(span.pixel_rate * trial.ratio, trial.squeezes, trial.unpacks)
        if rate >= most:
            best, most = codec, rate
    return best


def is_paying(before: Span, after: Span) -> bool:
    """Whether compression did what it was expected to: step 5. A receiver that does not wait any more has what it can use."""
    return after.pixel_rate >= _WORTH_KEEPING * before.pixel_rate or after.waited < 0.5 * after.seconds


def try_codecs(sample: np.ndarray, clock: Callable[[], float] = time.perf_counter) -> dict[str, Trial]:
    """Squeeze and unpack a sample with each codec."""
    data = np.ascontiguousarray(sample).reshape(-1).view(np.uint8)
    trials = {}
    for name in CODECS:
        codec = pa.Codec(name)
        began = clock()
        squeezed = codec.compress(pa.py_buffer(data))
        done = clock()
        codec.decompress(squeezed, len(data))
        unpacked = clock()
        # A clock may not tick in between; then it was fast.
        trials[name] = Trial(
            len(data) / max(1, len(squeezed)), len(data) / max(done - began, 1e-9), len(data) / max(unpacked - done, 1e-9)
        )
    return trials


@dataclass(frozen=True, slots=True)
class Decision:
    """What was found out about one dataset.

    Attributes:
        codec: What to read with.
        until: When it is to be looked at again.
        before: What an uncompressed read was like, as long as the codec has not proved better.
    """

    codec: str
    until: float
    before: Span | None


class Advisor:
    """What one connection has found out, by dataset.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._decisions: dict[str, Decision] = {}

    def current(self, dataset: str) -> Decision | None:
        """The decision that holds."""
        with self._lock:
            found = self._decisions.get(dataset)
            return found if found is not None and self.clock() < found.until else None

    def decide(self, dataset: str, codec: str, before: Span | None = None) -> None:
        """Remember a decision."""
        with self._lock:
            now = self.clock()
            self._decisions = {name: decision for name, decision in self._decisions.items() if decision.until > now}
            self._decisions[dataset] = Decision(codec, now + _KEPT_SECONDS, before)


class Tuner:
    """Watches one read and says when to go on with another codec.

    Args:
        advisor: Where decisions are kept.
        dataset: Whose pixels are read.
        trial: Tries the codecs on a sample.

    Attributes:
        codec: What the read is to ask for now.
    """

    def __init__(self, advisor: Advisor, dataset: str, trial: Callable[[np.ndarray], Mapping[str, Trial]] = try_codecs) -> None:
        self._advisor = advisor
        self._dataset = dataset
        self._trial = trial
        decision = advisor.current(dataset)
        self.codec = NONE if decision is None else decision.codec
        self._before = None if decision is None else decision.before
        self._began: float | None = None
        self._span = Span()

    def saw(self, batch: TileBatch, waited: float) -> bool:
        """Take note of a message.

        Args:
            batch: What it held.
            waited: Seconds that the receiver waited for it.

        Returns:
            Whether :attr:`codec` has changed: what has not arrived yet should be asked for anew.
        """
        now = self._advisor.clock()
        if self._began is None:
            # The first message says when the span begins: before it came a round trip.
            self._began = now
            return False
        pixels = batch.pixels if isinstance(batch.pixels, list) else [batch.pixels]
        timings, span = batch.timings, self._span
        self._span = span = Span(
            span.pixel_bytes + sum(block.nbytes for block in pixels),
            now - self._began,
            span.waited + waited,
            span.served + (timings.gather_us + timings.encode_us) * 1e-6,
        )
        if not span.is_long:
            return False
        self._began, self._span = now, Span()
        if self._before is not None:
            paying = is_paying(self._before, span)
            self._before = None
            self._advisor.decide(self._dataset, self.codec if paying else NONE)
            return not paying and self._change(NONE)
        if self.codec != NONE or self._advisor.current(self._dataset) is not None or not span.is_held_up_by_link:
            return False
        block = pixels[0]
        codec = best_codec(span, self._trial(block.reshape(-1)[: max(1, _SAMPLE_BYTES // block.itemsize)]))
        if codec == NONE:
            return False
        self._before = span
        self._advisor.decide(self._dataset, codec, span)
        return self._change(codec)

    def _change(self, codec: str) -> bool:
        self.codec = codec
        self._began = None
        return True
