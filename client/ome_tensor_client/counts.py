"""What a server says it has counted, and what follows from two looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Counts", "Sample"]

_PREFIX = "ome_tensor_"


@dataclass(frozen=True, slots=True)
class Sample:
    """One number.

    Attributes:
        name: As on the server's metrics page, e.g. ``ome_tensor_tiles_total``.
        labels: Names and values of its labels.
        value: The number.
    """

    name: str
    labels: dict[str, str]
    value: float


class Counts:
    """The numbers at one moment.

    Args:
        samples: The numbers.
        at: When, in seconds of any clock.
    """

    def __init__(self, samples: Sequence[Sample], at: float) -> None:
        self.samples = samples
        self.at = at

    def total(self, name: str, **labels: str) -> float:
        """The sum of all numbers of a name (without ``ome_tensor_``) that have these labels."""
        wanted = labels.items()
        return sum(sample.value for sample in self.samples if sample.name == _PREFIX + name and wanted <= sample.labels.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        """The numbers of a name for each value of a label."""
        found: dict[str, float] = {}
        for sample in self.samples:
            if sample.name == _PREFIX + name and label in sample.labels:
                found[sample.labels[label]] = found.get(sample.labels[label], 0.0) + sample.value
        return found

    def rate(self, before: Counts, name: str, **labels: str) -> float:
        """How fast a number grew, a second. One that shrank is a server's that has started again: it counts from nothing."""
        now, then = self.total(name, **labels), before.total(name, **labels)
        return (now - then if now >= then else now) / max(1e-9, self.at - before.at)

    def quantile(self, before: Counts, name: str, part: float, **labels: str) -> float | None:
        """A quantile of a histogram's growth, interpolated inside its bucket as Prometheus' ``histogram_quantile`` does; ``None`` of nothing."""
        grown: list[tuple[float, float]] = []
        for bound in sorted({float(sample.labels["le"]) for sample in self.samples if sample.name == f"{_PREFIX}{name}_bucket"}):
            text = next(
                sample.labels["le"] for sample in self.samples if "le" in sample.labels and float(sample.labels["le"]) == bound
            )
            now = self.total(f"{name}_bucket", le=text, **labels)
            then = before.total(f"{name}_bucket", le=text, **labels)
            grown.append((bound, now - then if now >= then else now))
        if not grown or grown[-1][1] <= 0:
            return None
        rank = part * grown[-1][1]
        low, below = 0.0, 0.0
        for bound, count in grown:
            if count >= rank:
                if bound == float("inf"):
                    return low
                return low + (bound - low) * (rank - below) / max(1e-9, count - below)
            low, below = bound, count
        return low
