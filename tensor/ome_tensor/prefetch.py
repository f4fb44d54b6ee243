"""Reading ahead on one thread, bounded in items and in bytes; the thread ends with the iterator."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["Prefetcher"]

T = TypeVar("T")

#: Joined only as long as a source's current item may reasonably take; a daemon thread ends with the process anyway.
_JOIN_SECONDS = 5.0


class _Shared(Generic[T]):
    """What the reading thread and the iterator both hold. The thread never holds the iterator, or the iterator could not be dropped."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.ready: deque[tuple[T, int]] = deque()
        self.nbytes = 0
        self.done = False
        self.stopped = False
        self.error: BaseException | None = None


class Prefetcher(Iterator[T]):
    """Iterates ``source`` on a thread of its own, up to ``depth`` items ahead.

    Args:
        source: What to read; items and its error come out in order.
        depth: Number of items held ready, positive.
        max_bytes: Bound on the bytes held ready (one item is always allowed); ``None`` for none.
        size: Bytes of an item.
        cancel: Called once when the iterator is closed or dropped, to wake a source that waits on something else (a network).
    """

    def __init__(
        self,
        source: Iterator[T],
        depth: int,
        *,
        max_bytes: int | None = None,
        size: Callable[[T], int] = lambda _: 0,
        cancel: Callable[[], object] | None = None,
    ) -> None:
        shared: _Shared[T] = _Shared()
        self._shared = shared
        self._thread = threading.Thread(
            target=_fill, args=(source, depth, max_bytes, size, shared), name="ome-tensor-prefetch", daemon=True
        )
        self._close = weakref.finalize(self, _stop, shared, cancel, self._thread)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        shared = self._shared
        with shared.changed:
            while not shared.ready and not shared.done:
                shared.changed.wait()
            if shared.ready:
                item, nbytes = shared.ready.popleft()
                shared.nbytes -= nbytes
                shared.changed.notify_all()
                return item
            error, shared.error = shared.error, None
        self.close()
        if error is not None:
            raise error
        raise StopIteration

    @property
    def ready(self) -> int:
        """Number of items that lie ready."""
        return len(self._shared.ready)

    @property
    def is_running(self) -> bool:
        """Whether the thread is still there: after :meth:`close`, where its source does not let go of it."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread and forget what was read ahead; further ``next()`` gives StopIteration."""
        self._close()


def _fill(source: Iterator[T], depth: int, max_bytes: int | None, size: Callable[[T], int], shared: _Shared[T]) -> None:
    error: BaseException | None = None
    try:
        while True:
            with shared.changed:
                while not shared.stopped and (
                    len(shared.ready) >= depth or (max_bytes is not None and shared.ready and shared.nbytes >= max_bytes)
                ):
                    shared.changed.wait()
                if shared.stopped:
                    return
            try:
                item = next(source)
            except StopIteration:
                return
            nbytes = size(item)
            with shared.changed:
                # Stopped meanwhile: nobody will take it, and the loop ends above.
                if not shared.stopped:
                    shared.ready.append((item, nbytes))
                    shared.nbytes += nbytes
                    shared.changed.notify_all()
            del item  # Not kept alive by this frame while it waits for room.
    except BaseException as problem:
        error = problem
    finally:
        try:
            close = getattr(source, "close", None)
            if close is not None:
                close()
        except BaseException as problem:
            error = problem if error is None else error
        with shared.changed:
            shared.done = True
            shared.error = error if not shared.stopped else None
            shared.changed.notify_all()


def _stop(shared: _Shared[T], cancel: Callable[[], object] | None, thread: threading.Thread) -> None:
    with shared.changed:
        shared.stopped = True
        shared.done = True
        shared.ready.clear()
        shared.nbytes = 0
        shared.changed.notify_all()
    if cancel is not None:
        cancel()
    if thread is not threading.current_thread():
        thread.join(_JOIN_SECONDS)
