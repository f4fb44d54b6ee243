"""Where the time of a read goes: to be looked at when a GPU waits."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["ReadStats"]


@dataclass(slots=True)
class ReadStats:
    """What reading has cost so far, summed up over the calls of one iterator.

    Attributes:
        network: Seconds spent waiting for messages.
        decode: Seconds spent from a message's bytes to arrays that lie in them, decompression included.
        convert: Seconds spent from those arrays to a training step's dtype.
        queue: Seconds for which the server had a batch ready to be made and waited to send the one before; long where the client, or the network, is
            the slow one.
        gather: Seconds the server took to gather pixels (and to read and decode them, where the dataset is served in place).
        encode: Seconds the server took to lay out and compress messages.
        messages, tiles: Number of them.
        nbytes: Bytes of the messages, as they came over the wire.
        retries: Calls beyond the first, of all streams.
    """

    network: float = 0.0
    decode: float = 0.0
    convert: float = 0.0
    queue: float = 0.0
    gather: float = 0.0
    encode: float = 0.0
    messages: int = 0
    tiles: int = 0
    nbytes: int = 0
    retries: int = 0

    def add(self, other: ReadStats) -> None:
        """Add another's figures to these."""
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def taken(self) -> ReadStats:
        """These figures; they begin anew at zero."""
        found = ReadStats(*(getattr(self, name) for name in _NAMES))
        for name in _NAMES:
            setattr(self, name, type(getattr(self, name))())
        return found


_NAMES = tuple(field.name for field in fields(ReadStats))
