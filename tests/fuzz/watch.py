"""What a server's process holds, as /proc tells: that it does not grow is half of what fuzzing has to show."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

__all__ = ["MEASURES", "Sample", "Watch", "alarms", "growth", "sample"]

#: What may come on top of the median after the warm-up, in the units of :data:`MEASURES`. Memory: pages that the allocator keeps for the next large
#: request of a few at once. Threads: a pool that grows with how many calls happen to run at once; descriptors: connections, which come and go.
_MOST_MORE = {"resident MiB": 64, "threads": 64, "descriptors": 64}

#: And on top of what there was before anybody connected, once all clients have gone.
_MOST_LEFT = {"descriptors": 16, "children": 8}

#: The part of the run that is warm-up, and the part at the end that is compared.
_WARM_UP, _LAST = 0.3, 0.25

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process holds at one moment.

    Attributes:
        rss: Resident bytes, without those of mapped files.
        descriptors, threads: How many.
        children: Processes that it has started and that still run, or that nobody has waited for.
    """

    rss: int
    descriptors: int
    threads: int
    children: int


#: What is measured: its name, how, and its unit.
MEASURES: tuple[tuple[str, Callable[[Sample], int], int], ...] = (
    ("resident MiB", lambda one: one.rss, 1 << 20),
    ("descriptors", lambda one: one.descriptors, 1),
    ("threads", lambda one: one.threads, 1),
    ("children", lambda one: one.children, 1),
)


def sample(pid: int) -> Sample | None:
    """What a process holds now; ``None`` where there is none."""
    folder = Path("/proc") / str(pid)
    try:
        # One that has ended is still there, as long as nobody has waited for it.
        if (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return None
        _, resident, shared = map(int, (folder / "statm").read_text().split()[:3])
        descriptors = len(os.listdir(folder / "fd"))
        threads = os.listdir(folder / "task")
    except OSError:
        return None
    children = 0
    for thread in threads:
        with suppress(OSError):  # It has ended meanwhile.
            children += len((folder / "task" / thread / "children").read_text().split())
    return Sample((resident - shared) * _PAGE, descriptors, len(threads), children)


@dataclass(frozen=True, slots=True)
class Watch:
    """All that was seen.

    Attributes:
        before: Before anybody connected.
        during: Through the run, evenly spaced.
        after: Once all clients have gone.
    """

    before: Sample
    during: Sequence[Sample]
    after: Sample

    def warm(self, of: Callable[[Sample], int]) -> int:
        """The median behind the warm-up."""
        first = int(len(self.during) * _WARM_UP)
        return _median(self.during[first : first + max(1, int(len(self.during) * _LAST))], of)

    def late(self, of: Callable[[Sample], int]) -> int:
        """The median at the end of the run."""
        return _median(self.during[-max(1, int(len(self.during) * _LAST)) :], of)


def growth(watch: Watch) -> list[str]:
    """What has grown beyond its bound, in words."""
    found = []
    for what, of, unit in MEASURES:
        if what not in _MOST_MORE:
            continue
        warm, most = watch.warm(of), _MOST_MORE[what]
        for when, value in (("at the end of the run", watch.late(of)), ("once all clients have gone", of(watch.after))):
            if value > warm + most * unit:
                found.append(
                    f"{what} grew from {warm // unit:,} after the warm-up to {value // unit:,} {when} (at most {most} more)"
                )
    for what, of, _ in MEASURES:
        before, value = of(watch.before), of(watch.after)
        if what in _MOST_LEFT and value > before + _MOST_LEFT[what]:
            found.append(
                f"{value:,} {what} are left once all clients have gone, of {before:,} before (at most {_MOST_LEFT[what]} more)"
            )
    return found


#: What a server writes to stderr when something has happened that it did not expect.
_ALARMS = ("Traceback", "unexpected", "Fatal", "assertion failed", "Check failed")


def alarms(log: str) -> list[str]:
    """What a server has written of things that it did not expect; each with the lines that follow."""
    lines = log.splitlines()
    found: list[str] = []
    last = -1
    for place, line in enumerate(lines):
        if place > last and any(alarm in line for alarm in _ALARMS):
            # A traceback goes on as long as lines are indented, and one line longer.
            last = place + 1
            while last < len(lines) and (lines[last].startswith((" ", "Traceback")) or not lines[last]):
                last += 1
            found.append("\n".join(lines[place : last + 1]))
    return found


def _median(samples: Sequence[Sample], of: Callable[[Sample], int]) -> int:
    return int(median(map(of, samples))) if samples else 0
