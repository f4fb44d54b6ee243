"""Figures of :mod:`benchmarks.wire`: what was read, the ratios of one run, and what they are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .report import number, print_table, yes_no

__all__ = ["CHECKS", "Check", "Figures", "Reading", "Verdict", "judge", "show_checks", "show_peers"]

OURS, WORKERS, MAPPED = "ome-tensor, TCP", "ome-tensor, TCP, --workers 2", "ome-tensor, mapped"
RAW, FLIGHT, TENSORSTORE = "raw TCP socket", "Arrow Flight", "TensorStore, Zarr, nginx"
ZARR, TILED, FLOOR = "zarr-python, Zarr, nginx", "bluesky tiled", "NumPy, in process"


@dataclass(frozen=True)
class Reading:
    """One workload of one peer in one round.

    Attributes:
        nbytes: Bytes of pixels.
        seconds: From the first request to the last pixel; of several clients, from the first one's to the last one's.
        client_cpu, server_cpu: Processor seconds of each side.
        latencies: Milliseconds of single reads, in order of time.
    """

    nbytes: int
    seconds: float
    client_cpu: float
    server_cpu: float
    latencies: tuple[float, ...] = ()

    @property
    def rate(self) -> float:
        """GB of pixels a second."""
        return self.nbytes / self.seconds / 1e9

    @property
    def client_cost(self) -> float:
        """Processor seconds a GB, on the client's side."""
        return self.client_cpu / self.nbytes * 1e9

    @property
    def server_cost(self) -> float:
        """Processor seconds a GB, on the server's side."""
        return self.server_cpu / self.nbytes * 1e9

    def percentile(self, share: float) -> float:
        """Milliseconds within which that share of the single reads was done."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


Measure = Callable[[Reading], float]


def rate(reading: Reading) -> float:
    """GB/s."""
    return reading.rate


def client_cost(reading: Reading) -> float:
    """s/GB."""
    return reading.client_cost


def p50(reading: Reading) -> float:
    """ms."""
    return reading.percentile(0.5)


def p99(reading: Reading) -> float:
    """ms."""
    return reading.percentile(0.99)


@dataclass
class Figures:
    """Everything measured in one run.

    Attributes:
        readings: Of each peer and workload, one a round; rounds of different peers stand side by side.
        peaks: Most private MB above what was held before, of each peer's client and server.
        single: Figures that are no ratio, by name.
        skipped: Who did not run, and why.
        notes: What to know of a peer's figures.
    """

    readings: dict[tuple[str, str], list[Reading]] = field(default_factory=dict)
    peaks: dict[str, tuple[float, float]] = field(default_factory=dict)
    single: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, peer: str, workload: str, reading: Reading) -> None:
        """One more round."""
        self.readings.setdefault((peer, workload), []).append(reading)

    def value(self, peer: str, workload: str, measure: Measure) -> float | None:
        """Median over the rounds."""
        found = self.readings.get((peer, workload))
        return median(map(measure, found)) if found else None

    def ratio(self, peer: str, other: str, workload: str, measure: Measure) -> float | None:
        """Median of the rounds' ratios: a bad minute for both is none for the ratio."""
        ours, theirs = self.readings.get((peer, workload)), self.readings.get((other, workload))
        if not ours or not theirs:
            return None
        return median(measure(a) / measure(b) for a, b in zip(ours, theirs, strict=True) if measure(b))

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        workloads: dict[str, dict[str, Any]] = {}
        for (peer, workload), rounds in self.readings.items():
            found = {"GB/s": [r.rate for r in rounds], "client s/GB": [r.client_cost for r in rounds]}
            found["server s/GB"] = [r.server_cost for r in rounds]
            if rounds[0].latencies:
                found |= {f"p{share}": [r.percentile(share / 100) for r in rounds] for share in (50, 95, 99)}
            workloads.setdefault(workload, {})[peer] = found
        return {
            "workloads": workloads,
            "peak MB": self.peaks,
            "single": self.single,
            "skipped": self.skipped,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Check:
    """A figure and what it is held to.

    Attributes:
        name: What it is.
        value: Takes it from a run; ``None`` where the run has none.
        goal: What issue 3 asks for.
        limit: Where the run fails: a regression, whatever the goal.
        reason: Why the limit stands there.
        least: Whether goal and limit are the least that is good, or the most.
    """

    name: str
    value: Callable[[Figures], float | None]
    goal: float
    limit: float
    reason: str
    least: bool = True

    def holds(self, value: float, bar: float) -> bool:
        """Whether a value is as good as a bar."""
        return value >= bar if self.least else value <= bar


def _against(peer: str, other: str, workload: str, measure: Measure = rate) -> Callable[[Figures], float | None]:
    return lambda figures: figures.ratio(peer, other, workload, measure)


def _single(name: str) -> Callable[[Figures], float | None]:
    return lambda figures: figures.single.get(name)


SLOW_READERS = "server memory for 64 slow readers, MiB a stream"
SECOND_START = "second start of a 1 GB dataset, s to SERVING"

_COPY = "a second copy would halve it"

#: Limits lie below (above) what this tree measured by more than runs differ on a busy machine, so that one fails for a change and not for a
#: neighbour.
CHECKS: tuple[Check, ...] = (
    Check("all tiles over TCP, rate, against Flight", _against(OURS, FLIGHT, "tiles"), 1.0, 0.5, "0.65-0.75 on a busy machine"),
    Check(
        "all tiles over TCP, client CPU, against Flight's",
        _against(OURS, FLIGHT, "tiles", client_cost),
        1.0,
        2.5,
        "1.6-1.9; one copy more, or fresh pages for every message, is 0.6",
        least=False,
    ),
    Check("all tiles over TCP, rate, against a raw socket", _against(OURS, RAW, "tiles"), 0.5, 0.2, "0.35-0.5"),
    Check(
        "all tiles, mapped, against Flight",
        _against(MAPPED, FLIGHT, "tiles"),
        5,
        1.5,
        "2.3-4.3: what memory gives in that minute, which the floor below shows; the wire itself is below 1",
    ),
    Check("all tiles, mapped, against NumPy in process", _against(MAPPED, FLOOR, "tiles"), 0.7, 0.4, _COPY),
    Check(
        "256² reads over TCP, p50, against Flight",
        _against(OURS, FLIGHT, "planes", p50),
        1.0,
        8,
        "4-5; a third round trip is 2",
        least=False,
    ),
    Check(
        "256² reads over TCP, p99, against a raw socket's",
        _against(OURS, RAW, "planes", p99),
        5,
        120,
        "25-60: the raw socket's own tail is 0.1 ms or less, and is what varies",
        least=False,
    ),
    Check("windows over TCP, against Flight", _against(OURS, FLIGHT, "windows"), 1.0, 0.35, "0.6; single reads instead are 0.07"),
    Check(
        "windows, mapped, against Flight",
        _against(MAPPED, FLIGHT, "windows"),
        5,
        1.0,
        "1.4-3.0: as above; memory is read at random places, which NumPy itself does at twice Flight's rate",
    ),
    Check("windows, mapped, against NumPy in process", _against(MAPPED, FLOOR, "windows"), 0.7, 0.4, _COPY),
    Check(
        "4 clients, --workers 2, against Flight",
        _against(WORKERS, FLIGHT, "clients"),
        1.3,
        0.4,
        "0.7: six processes of ours share 2 cores, all in Python",
    ),
    Check("all tiles over TCP, against TensorStore", _against(OURS, TENSORSTORE, "tiles"), 1.0, 0.4, "0.6-0.8"),
    Check("windows over TCP, against TensorStore", _against(OURS, TENSORSTORE, "windows"), 3, 1.0, "2; single reads are 0.3"),
    Check(
        "256² reads, p50, against TensorStore",
        _against(OURS, TENSORSTORE, "planes", p50),
        1.0,
        8,
        "4; a third round trip is 2",
        least=False,
    ),
    Check("all tiles over TCP, against zarr-python", _against(OURS, ZARR, "tiles"), 3, 0.8, "1.3-1.5"),
    Check("windows over TCP, against zarr-python", _against(OURS, ZARR, "windows"), 15, 2.0, "4; single reads are 0.6"),
    Check("all tiles over TCP, against tiled", _against(OURS, TILED, "tiles"), 3, 1.8, "3-5"),
    Check("windows over TCP, against tiled", _against(OURS, TILED, "windows"), 15, 10, "25-30; single reads are 3"),
    Check(SLOW_READERS, _single(SLOW_READERS), 8, 8, "2; the goal itself, far from any noise", least=False),
    Check(SECOND_START, _single(SECOND_START), 1.0, 3.0, "0.3-0.4; a time and no ratio, so three times the goal", least=False),
)


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        check: The check.
        value: The figure; ``None`` where the run has none.
        met: Whether the goal is met.
        failed: Whether it is beyond the limit.
    """

    check: Check
    value: float | None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; ``None`` without a figure."""
        return None if self.value is None else self.check.holds(self.value, self.check.goal)

    @property
    def failed(self) -> bool:
        """Whether it is beyond the limit."""
        return self.value is not None and not self.check.holds(self.value, self.check.limit)


def judge(figures: Figures, checks: tuple[Check, ...] = CHECKS) -> list[Verdict]:
    """Every check's verdict."""
    return [Verdict(check, check.value(figures)) for check in checks]


# -- tables ------------------------------------------------------------------------------------------------------------------------

_COLUMNS = (
    "peer",
    "tiles GB/s",
    "x Flight",
    "client s/GB",
    "server s/GB",
    "client MB",
    "server MB",
    "p50 ms",
    "p95",
    "p99",
    "x Flight",
    "aligned p50",
    "windows/s",
    "x Flight",
    "4 clients GB/s",
    "x Flight",
)


def show_peers(figures: Figures, title: str, window_bytes: int) -> None:
    """The table of peers."""
    rows = []
    for peer in dict.fromkeys(peer for peer, _ in figures.readings):

        def value(workload: str, measure: Measure, peer: str = peer) -> float | None:
            return figures.value(peer, workload, measure)

        def ratio(workload: str, measure: Measure = rate, peer: str = peer) -> float | None:
            return figures.ratio(peer, FLIGHT, workload, measure)

        windows = value("windows", rate)
        cells = (
            value("tiles", rate),
            ratio("tiles"),
            value("tiles", client_cost),
            value("tiles", lambda r: r.server_cost),
            *figures.peaks.get(peer, (None, None)),
            value("planes", p50),
            value("planes", lambda r: r.percentile(0.95)),
            value("planes", p99),
            ratio("planes", p50),
            value("aligned", p50),
            None if windows is None else windows * 1e9 / window_bytes,
            ratio("windows"),
            value("clients", rate),
            ratio("clients"),
        )
        rows.append((peer, *map(number, cells)))
    print_table(title, _COLUMNS, rows)
    for what, why in (figures.notes | {name: f"skipped: {reason}" for name, reason in figures.skipped.items()}).items():
        print(f"* {what}: {why}")


def show_links(links: Mapping[str, Figures]) -> None:
    """The table of slow links."""
    if not links:
        return
    rows = []
    for link, figures in links.items():
        for workload in dict.fromkeys(workload for _, workload in figures.readings):
            for peer in dict.fromkeys(peer for peer, name in figures.readings if name == workload):
                latency = bool(figures.readings[peer, workload][0].latencies)
                measure = p50 if latency else rate
                value, ratio = figures.value(peer, workload, measure), figures.ratio(peer, FLIGHT, workload, measure)
                cost = None if latency else figures.value(peer, workload, client_cost)
                rows.append((link, workload, peer, number(value), "ms" if latency else "GB/s", number(ratio), number(cost)))
    print_table("Slow links", ("link", "workload", "peer", "figure", "unit", "x Flight", "client s/GB"), rows)
    for link, figures in links.items():
        for what, why in figures.skipped.items():
            print(f"* {link}, {what}: skipped: {why}")


def show_checks(verdicts: list[Verdict]) -> None:
    """The table of checks."""
    rows = [
        (
            v.check.name,
            ("≥ " if v.check.least else "≤ ") + f"{v.check.goal:g}",
            "not measured" if v.value is None else number(v.value),
            yes_no(v.met),
            ("≥ " if v.check.least else "≤ ") + f"{v.check.limit:g}",
            "FAILED" if v.failed else "",
            v.check.reason,
        )
        for v in verdicts
    ]
    print_table("Ratios of this run", ("figure", "goal", "measured", "met", "limit", "regression", "why this limit"), rows)
