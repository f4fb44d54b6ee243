"""Whether a training loop waits for data, and for what."""

from __future__ import annotations

from dataclasses import dataclass, field

from ome_tensor_client.read_stats import ReadStats

__all__ = ["LoaderStats"]


@dataclass(slots=True)
class LoaderStats:
    """One iteration over a loader, so far.

    Attributes:
        epoch: Which.
        elapsed: Seconds since it was begun, up to the last batch that was asked for.
        waited: Seconds of those for which the training loop waited for batches: it was starving. The first batch's is among them.
        first: Seconds it waited for the first batch.
        copy: Seconds spent on the way to pinned memory or to the device.
        batches, samples: Number handed out.
        ready: Mean number of batches that lay ready in this process when the next one was asked for.
        read: What the readers of all workers have cost, summed up: seconds of many readers may be more than the time that passed.
    """

    epoch: int = 0
    elapsed: float = 0.0
    waited: float = 0.0
    first: float = 0.0
    copy: float = 0.0
    batches: int = 0
    samples: int = 0
    ready: float = 0.0
    read: ReadStats = field(default_factory=ReadStats)

    @property
    def starving(self) -> float:
        """The part of the time for which the training loop waited, 0 to 1."""
        return self.waited / self.elapsed if self.elapsed else 0.0

    @property
    def samples_per_second(self) -> float:
        """Samples handed out a second."""
        return self.samples / self.elapsed if self.elapsed else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bytes that came over the wire a second."""
        return self.read.nbytes / self.elapsed if self.elapsed else 0.0

    def __str__(self) -> str:
        read = self.read
        retries = f", {read.retries} retries" if read.retries else ""
        return (
            f"epoch {self.epoch}: {self.samples} tiles in {self.elapsed:.1f} s ({self.samples_per_second:.0f} tiles/s, "
            f"{self.bytes_per_second / 1e6:.1f} MB/s), waited {self.starving:.0%} of it ({self.ready:.1f} batches ready); "
            f"network {read.network:.1f} s, decode {read.decode:.1f} s, convert {read.convert:.1f} s, copy {self.copy:.1f} s; "
            f"server queue {read.queue:.1f} s, gather {read.gather:.1f} s, encode {read.encode:.1f} s{retries}"
        )
