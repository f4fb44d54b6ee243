"""The memory that a server's datasets may take together, and who has which part of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ome_tensor.errors import Cancelled, Overloaded

from .budget import human_bytes

__all__ = ["Room", "Share"]

#: Seconds to wait for something in use to be let go, where there is no room otherwise.
_PATIENCE = 10.0

_POLL = 0.05


@dataclass(eq=False, slots=True)
class Share:
    """A part of the room, set aside for one thing: whoever holds this has it, whatever else goes by the same name.

    Attributes:
        what: What for, for people.
        nbytes: How much; 0 once it was given back.
    """

    what: str
    nbytes: int = 0


class Room:
    """Memory set aside, in shares.

    Args:
        budget: Bytes that all shares may have together.
        lock: Held while shares change, so that what they are of can be changed in the same moment.
        leave: Has what is least recently used leave; whether anything could.

    Attributes:
        budget: See above.
    """

    def __init__(self, budget: int, lock: threading.RLock, leave: Callable[[Share], bool]) -> None:
        self.budget = budget
        self._lock = lock
        self._leave = leave
        self._shares: set[Share] = set()

    @property
    def taken(self) -> int:
        """Bytes of all shares."""
        with self._lock:
            return sum(share.nbytes for share in self._shares)

    def take(self, share: Share, size: int) -> bool:
        """Give a share so many bytes, instead of what it had, if there is room; whether there was."""
        with self._lock:
            if self.taken - share.nbytes + size > self.budget:
                return False
            self.set(share, size)
            return True

    def set(self, share: Share, size: int) -> None:
        """Write down what a share takes by now, room or none."""
        with self._lock:
            share.nbytes = size
            self._shares.add(share)

    def give_back(self, share: Share | None) -> None:
        """Its memory is free."""
        with self._lock:
            if share is not None:
                share.nbytes = 0
                self._shares.discard(share)

    def make(self, share: Share, size: int, cancelled: threading.Event) -> None:
        """Give a share so many bytes, instead of what it had; for it leave others, the least recently used first.

        Raises:
            Overloaded: all that could leave is in use.
            Cancelled: it is not wanted any more.
        """
        waited = 0.0
        while not self.take(share, size):
            if cancelled.is_set():
                raise Cancelled(f"loading {share.what} was cancelled", field="name")
            if self._leave(share):
                continue
            if waited >= _PATIENCE:
                raise Overloaded(
                    f"{share.what} takes {human_bytes(size)}; of the {human_bytes(self.budget)} that this server keeps in memory (memory_limit) "
                    f"{human_bytes(self.taken - share.nbytes)} are in use; try again later",
                    field="memory_limit",
                    value=size,
                )
            cancelled.wait(_POLL)
            waited += _POLL
