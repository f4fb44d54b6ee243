"""The checksums by which whole calls show that they arrived as they were sent: what goes into each, and how it is written.

A message of tiles has one of its own payload besides: see :mod:`.batches`.
"""

from __future__ import annotations

from xxhash import xxh3_64

__all__ = ["AnswerChecksum", "UploadChecksum"]


class AnswerChecksum:
    """Of a request and the messages of its answer, as bytes on the wire: what an answer's trailing metadata name ``CHECKSUM``."""

    def __init__(self, request: bytes) -> None:
        self._hasher = xxh3_64(request)

    def update(self, message: bytes) -> None:
        """Add a message, in the order of the answer."""
        self._hasher.update(message)

    @property
    def text(self) -> str:
        """Its value so far."""
        return self._hasher.hexdigest()


class UploadChecksum:
    """Of an upload's name and payloads: ``xxh3`` of :class:`UploadDatasetRequest`."""

    def __init__(self, name: str) -> None:
        self._hasher = xxh3_64(name.encode())

    def update(self, payload: bytes) -> None:
        """Add a payload, in the order of the upload."""
        self._hasher.update(payload)

    @property
    def number(self) -> int:
        """Its value so far."""
        return self._hasher.intdigest()
