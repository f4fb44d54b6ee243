"""Whose message is made next: few at a time, in turn between callers and between a caller's streams, and no more than the memory for them allows.

Threads that gather pixels compete for the interpreter's lock, and where two hundred do, a small read waits behind all of them. So only as many
work at a time as there are processors; the others sleep until it is their turn, which costs nothing. Turns are given by start-time fair queueing
(Goyal, Vin and Cheng 1996, https://doi.org/10.1145/248156.248171): every caller, and within a caller every stream, has a clock that runs by the
bytes it was served; the one whose clock is least is next. A stream that has just begun is a little ahead of its caller's others, so that a small
read is answered between two messages of large ones.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from ome_tensor.errors import Cancelled, Overloaded

__all__ = ["Turn", "Turns"]

#: Seconds between two looks whether whoever waits is still wanted.
_LOOK = 0.5

#: Seconds that a message waits for the memory of messages that nobody takes; then its reader is told to come again, and resumes where it was.
_PATIENCE = 5.0

#: When it is told to come again.
_RETRY_AFTER = 1.0


class _Caller:
    """One caller's share.

    Attributes:
        clock: Bytes served, as far as they count.
        floor: The clock of the stream served last: where a stream begins.
        streams: How many it has.
        in_flight: Bytes of messages that are being made, or not taken yet.
        waiting: Its streams that wait: clock, number, stream.
    """

    __slots__ = ("clock", "floor", "in_flight", "streams", "waiting")

    def __init__(self, clock: float) -> None:
        self.clock = clock
        self.floor = 0.0
        self.streams = 0
        self.in_flight = 0
        self.waiting: list[tuple[float, int, Turn]] = []


class Turns:
    """Shared by all streams of a server. Safe to use from any thread.

    Args:
        places: Messages that are made at a time.
        most_bytes: Bytes of messages that are being made or not taken yet.
        most_caller_bytes: The same, of one caller.
        patience: Seconds that a message waits for memory.

    Attributes:
        waiting: How many streams wait for their turn.
        in_flight: Bytes of messages that are being made or not taken yet.
    """

    def __init__(self, places: int, most_bytes: int, most_caller_bytes: int, patience: float = _PATIENCE) -> None:
        self._free = places
        self._most_bytes, self._most_caller_bytes = most_bytes, most_caller_bytes
        self.patience = patience
        self.lock = threading.Lock()
        self._callers: dict[str, _Caller] = {}
        self._clock = 0.0
        self._numbers = itertools.count()
        self.waiting = 0
        self.in_flight = 0

    def stream(self, caller: str, *, works: bool = True) -> Turn:
        """A place in line for a stream, to be closed behind it.

        Args:
            caller: Whose share it counts to.
            works: Whether making its messages takes this process's time. What only waits for other processes or disks holds up nobody.
        """
        with self.lock:
            found = self._callers.get(caller)
            if found is None:
                found = self._callers[caller] = _Caller(self._clock)
            found.streams += 1
            return Turn(self, caller, found, works)

    def _enter(self, turn: Turn, nbytes: int) -> bool:
        """Whether it may begin at once; else it waits in line. With the lock."""
        caller = turn.caller
        if not caller.waiting:
            # Back from having had nothing to send: what it did not use meanwhile is nobody's debt.
            caller.clock = max(caller.clock, self._clock)
        # Ahead of all that wait, whose clocks are the floor's at least, by less than any message.
        turn.clock = max(turn.clock, caller.floor - 1.0)
        turn.nbytes = nbytes
        if not self.waiting and self._fits(turn):
            self._begin(turn)
            return True
        heapq.heappush(caller.waiting, (turn.clock, next(self._numbers), turn))
        self.waiting += 1
        self._give()
        return turn.began

    def _fits(self, turn: Turn) -> bool:
        caller, nbytes = turn.caller, turn.nbytes
        return (
            (self._free > 0 or not turn.works)
            # What is larger than all that is allowed gets through alone.
            and (self.in_flight + nbytes <= self._most_bytes or not self.in_flight)
            and (caller.in_flight + nbytes <= self._most_caller_bytes or not caller.in_flight)
        )

    def _begin(self, turn: Turn) -> None:
        caller = turn.caller
        self._free -= turn.works
        self.in_flight += turn.nbytes
        caller.in_flight += turn.nbytes
        self._clock = max(self._clock, caller.clock)
        caller.floor = max(caller.floor, turn.clock)
        caller.clock += turn.nbytes
        turn.clock += turn.nbytes
        turn.began = True

    def _give(self) -> None:
        """Let begin who may. With the lock."""
        while self.waiting:
            fitting = [caller for caller in self._callers.values() if caller.waiting and self._fits(caller.waiting[0][2])]
            if not fitting:
                return
            caller = min(fitting, key=_clock_of)
            _, _, turn = heapq.heappop(caller.waiting)
            self.waiting -= 1
            self._begin(turn)
            turn.woken.release()

    def _leave(self, turn: Turn) -> bool:
        """Give up waiting; whether it did wait. With the lock."""
        if turn.began:
            return False
        caller = turn.caller
        # It never took what it asked for.
        turn.nbytes = 0
        caller.waiting = [entry for entry in caller.waiting if entry[2] is not turn]
        heapq.heapify(caller.waiting)
        self.waiting -= 1
        return True

    def _made(self, turn: Turn) -> None:
        self._free += turn.works
        self._give()

    def _taken(self, turn: Turn) -> None:
        self.in_flight -= turn.nbytes
        turn.caller.in_flight -= turn.nbytes
        turn.nbytes = 0
        self._give()

    def _close(self, turn: Turn) -> None:
        turn.caller.streams -= 1
        if not turn.caller.streams:
            self._callers.pop(turn.name, None)
        self._give()

    def is_short_of_memory(self, turn: Turn) -> bool:
        """Whether what keeps a stream waiting is memory, and not others' turns."""
        with self.lock:
            caller, nbytes = turn.caller, turn.nbytes
            return not turn.began and (
                self.in_flight + nbytes > self._most_bytes or caller.in_flight + nbytes > self._most_caller_bytes
            )


def _clock_of(caller: _Caller) -> float:
    return caller.clock


class Turn:
    """One stream's place in line. Made by :meth:`Turns.stream`; for one thread."""

    __slots__ = ("_is_made", "_turns", "began", "caller", "clock", "name", "nbytes", "woken", "works")

    def __init__(self, turns: Turns, name: str, caller: _Caller, works: bool) -> None:
        self._turns = turns
        self.name, self.caller, self.works = name, caller, works
        self.clock = 0.0
        self.nbytes = 0
        self.began = False
        self._is_made = True
        self.woken = threading.Lock()
        self.woken.acquire()

    def begin(self, nbytes: int, is_wanted: Callable[[], bool]) -> None:
        """Wait until a message of so many bytes may be made.

        Raises:
            Overloaded: others' messages, which their readers do not take, leave no memory for it.
            Cancelled: nobody wants it any more.
        """
        turns = self._turns
        with turns.lock:
            self.began = False
            if turns._enter(self, nbytes):
                # It may have been woken by its own way in.
                self.woken.acquire(blocking=False)
                self._is_made = False
                return
        short_since: float | None = None
        while not self.woken.acquire(timeout=_LOOK):
            now = time.monotonic()
            if not turns.is_short_of_memory(self):
                short_since = None
            elif short_since is None:
                short_since = now
            is_short = short_since is not None and now - short_since >= turns.patience
            if is_wanted() and not is_short:
                continue
            with turns.lock:
                if not turns._leave(self):
                    break  # Just now.
                turns._give()
            if not is_wanted():
                raise Cancelled("the client has gone")
            raise Overloaded(
                "messages that other readers do not take fill this server's memory for them (max_bytes_in_flight); try again later",
                field="max_bytes_in_flight",
                value=nbytes,
                retry_after=_RETRY_AFTER,
            )
        else:
            self._is_made = False
            return
        self.woken.acquire()
        self._is_made = False

    def made(self) -> None:
        """The message is made, and offered to its reader."""
        if not self._is_made:
            self._is_made = True
            with self._turns.lock:
                self._turns._made(self)

    def taken(self) -> None:
        """Its reader has it, or never will."""
        if self.nbytes and self._is_made:
            with self._turns.lock:
                self._turns._taken(self)

    def close(self) -> None:
        """The stream is through."""
        self.made()
        self.taken()
        with self._turns.lock:
            self._turns._close(self)
