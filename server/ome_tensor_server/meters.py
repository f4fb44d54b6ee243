"""What a server counts, over all its workers, and how Prometheus is told.

The numbers lie in one anonymous file, a row for each worker that only it writes, so nothing is locked between processes, and what a worker has
counted outlives it. They are written out by prometheus_client.
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import grpc
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ome_tensor.errors import Reason
from ome_tensor_proto.methods import ADMIN_METHODS, METHODS

from .standing import Gauge

__all__ = ["CONTENT_TYPE", "Meters", "MetricsPage"]

#: Of the text that :meth:`MetricsPage.text` gives (Prometheus' text format 0.0.4).
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_METHODS = (*METHODS, *ADMIN_METHODS)
_CODES = tuple(code.name for code in grpc.StatusCode)
_PHASES = ("queue", "gather", "encode", "send")

#: Seconds. A call is anything from a lookup to a training run's epoch, a phase is a part of one message.
_CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_PHASE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)


@dataclass(frozen=True, slots=True)
class _Family:
    """Numbers of one name.

    Attributes:
        name: Without Prometheus' endings (``_total``, ``_bucket``).
        help: What it is.
        labels: Names of labels, and the values that each may have: all there will ever be.
        kind: ``counter``, ``gauge`` or ``histogram``.
        buckets: Upper bounds of a histogram's.
    """

    name: str
    help: str
    kind: str = "counter"
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Numbers for one combination of labels: a histogram's buckets, the last without a bound, and its sum."""
        return len(self.buckets) + 2 if self.buckets else 1

    @property
    def series(self) -> list[tuple[str, ...]]:
        """The combinations of labels."""
        return list(product(*(values for _, values in self.labels)))


_FAMILIES = (
    _Family("calls", "Calls that ended, by method and status.", labels=(("method", _METHODS), ("code", _CODES))),
    _Family("call_seconds", "How long calls took.", "histogram", (("method", _METHODS),), _CALL_BUCKETS),
    _Family(
        "phase_seconds",
        "What messages of tiles cost: waiting for their turn, gathering pixels, encoding, and until their reader took them.",
        "histogram",
        (("phase", _PHASES),),
        _PHASE_BUCKETS,
    ),
    _Family("refused", "Calls that ended with an error, by its reason.", labels=(("reason", tuple(Reason)),)),
    _Family("messages", "Messages of tiles sent."),
    _Family("tiles", "Tiles sent."),
    _Family("sent_bytes", "Bytes of messages sent in answers."),
    _Family("received_bytes", "Bytes of requests, uploads included."),
    _Family("cache_hits", "Chunks found decompressed."),
    _Family("cache_misses", "Chunks that had to be decompressed."),
    _Family("calls_running", "Calls in progress.", "gauge"),
    _Family("reads_running", "Streams of tiles in progress.", "gauge"),
    _Family("reads_waiting", "Streams of tiles that wait for their turn.", "gauge"),
    _Family("in_flight_bytes", "Bytes of messages that are being made, or that their reader has not taken.", "gauge"),
)

_PREFIX = "ome_tensor_"


def _places() -> tuple[dict[tuple[str, ...], int], int]:
    places: dict[tuple[str, ...], int] = {}
    at = 0
    for family in _FAMILIES:
        for values in family.series:
            places[family.name, *values] = at
            at += family.size
    return places, at


_PLACES, _SIZE = _places()
_BUCKETS = {family.name: family.buckets for family in _FAMILIES if family.buckets}
_GAUGES = tuple(_PLACES[family.name,] for family in _FAMILIES if family.kind == "gauge")


class Meters:
    """Counters of a server.

    Args:
        workers: Number of workers.
        descriptor: Of the file that another process's ``Meters`` made; without one it is made.
        worker: Whose numbers this process writes.

    Attributes:
        descriptor: Of the file, to be passed to a worker.
    """

    def __init__(self, workers: int = 1, descriptor: int | None = None, worker: int = 0) -> None:
        self.descriptor = os.memfd_create("ome-tensor-meters") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, 8 * _SIZE * workers)
        self._workers = workers
        self._numbers = memoryview(mmap.mmap(self.descriptor, 8 * _SIZE * workers)).cast("d")
        self._own = self._numbers[worker * _SIZE : (worker + 1) * _SIZE]
        self._lock = threading.Lock()

    def add(self, name: str, *labels: str, value: float = 1.0) -> None:
        """Count."""
        place = _PLACES[name, *labels]
        with self._lock:
            self._own[place] += value

    def add_all(self, **values: float) -> None:
        """Count several, by their names without labels, at once."""
        places = [(_PLACES[name,], value) for name, value in values.items()]
        with self._lock:
            for place, value in places:
                self._own[place] += value

    def set(self, name: str, value: float) -> None:
        """Of what goes up and down, or is counted elsewhere."""
        self._own[_PLACES[name,]] = value

    def observe(self, name: str, label: str, seconds: float) -> None:
        """Add to a histogram."""
        self.observe_all(name, ((label, seconds),))

    def observe_all(self, name: str, observations: Iterable[tuple[str, float]]) -> None:
        """Add to several histograms of one name: label and seconds of each."""
        buckets = _BUCKETS[name]
        with self._lock:
            own = self._own
            for label, seconds in observations:
                place = _PLACES[name, label]
                own[place + bisect_left(buckets, seconds)] += 1.0
                own[place + len(buckets) + 1] += seconds

    def forget_worker(self, worker: int) -> None:
        """A worker has died: what it had in progress is not any more. What it has counted stays. By its supervisor."""
        for place in _GAUGES:
            self._numbers[worker * _SIZE + place] = 0.0

    def families(self) -> Iterator[Metric]:
        """All numbers, over all workers; of series with labels those that have counted anything."""
        sums = [sum(self._numbers[place::_SIZE][: self._workers]) for place in range(_SIZE)]
        for family in _FAMILIES:
            names = [name for name, _ in family.labels]
            kind: type[Metric] = {
                "counter": CounterMetricFamily,
                "gauge": GaugeMetricFamily,
                "histogram": HistogramMetricFamily,
            }[family.kind]
            made = kind(_PREFIX + family.name, family.help, labels=names)  # type: ignore[call-arg]
            for values in family.series:
                at = _PLACES[family.name, *values]
                numbers = sums[at : at + family.size]
                if family.labels and not any(numbers):
                    continue
                if family.buckets:
                    made.add_metric(values, _cumulated(family.buckets, numbers[:-1]), numbers[-1])  # type: ignore[attr-defined]
                else:
                    made.add_metric(values, numbers[0])  # type: ignore[attr-defined]
            yield made

    def close(self) -> None:
        """Close this process's descriptor; the numbers can still be used."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _cumulated(buckets: tuple[float, ...], counts: list[float]) -> list[tuple[str, float]]:
    found, total = [], 0.0
    for bound, count in zip((*map(str, buckets), "+Inf"), counts, strict=True):
        total += count
        found.append((bound, total))
    return found


class MetricsPage(Collector):
    """All that is told of a server.

    Args:
        meters: What is counted.
        others: What is known without counting.
    """

    def __init__(self, meters: Meters, others: Callable[[], Iterable[Gauge]]) -> None:
        self._meters, self._others = meters, others
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: what there is shows when it is asked for."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        yield from self._meters.families()
        for name, help, value in self._others():
            if isinstance(value, tuple):
                label, numbers = value
                family = GaugeMetricFamily(_PREFIX + name, help, labels=[label])
                for word, number in numbers.items():
                    family.add_metric([word], number)
                yield family
            else:
                yield GaugeMetricFamily(_PREFIX + name, help, value=value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Name, labels and value of each number."""
        for family in self._registry.collect():
            for sample in family.samples:
                yield sample.name, dict(sample.labels), float(sample.value)
