"""What is running, so that any thread can end it."""

from __future__ import annotations

from typing import Protocol, TypeVar

__all__ = ["Running"]


class _Cancellable(Protocol):
    def cancel(self) -> None: ...


C = TypeVar("C", bound=_Cancellable)


class Running:
    """The one that runs now of streams, or reads, that begin one after another on one thread: any other thread can end it, and with it all that
    would begin later.

    Attributes:
        is_cancelled: Whether that has been done.
    """

    def __init__(self) -> None:
        self.is_cancelled = False
        self._latest: _Cancellable | None = None

    def begin(self, one: C) -> C:
        """Put one in the place of that before; it is cancelled at once where all are."""
        # In the opposite order of cancel: whichever comes first, one of the two sees what the other has done.
        self._latest = one
        if self.is_cancelled:
            one.cancel()
        return one

    def cancel(self) -> None:
        """End it, and whatever begins later; from any thread."""
        self.is_cancelled = True
        if self._latest is not None:
            self._latest.cancel()
