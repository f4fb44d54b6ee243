"""What a client remembers of a server's images, so that a read is one round trip."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from ome_tensor.record import ImageMeta

__all__ = ["KnownImage", "KnownImages"]

_MOST = 4096


@dataclass(frozen=True, slots=True)
class KnownImage:
    """An image as a server described it.

    Attributes:
        key: Its canonical key.
        meta: Its metadata.
        version: The dataset's version. A read names it, and is refused where the dataset is another by now: so nothing here needs to expire.
        level: Of its pyramid.
    """

    key: str
    meta: ImageMeta
    version: str
    level: int = 0


class KnownImages:
    """The images that a connection has described, by the key that was asked for; the most recent 4,096."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: OrderedDict[tuple[str, int], KnownImage] = OrderedDict()

    def get(self, key: str, level: int = 0) -> KnownImage | None:
        """What is known."""
        place = key, level
        with self._lock:
            if place in self._images:
                self._images.move_to_end(place)
            return self._images.get(place)

    def put(self, key: str, image: KnownImage) -> None:
        """Remember."""
        with self._lock:
            self._images[key, image.level] = image
            self._images.move_to_end((key, image.level))
            if len(self._images) > _MOST:
                self._images.popitem(last=False)

    def forget(self, key: str, level: int = 0) -> None:
        """What was known of a key is not so any more."""
        with self._lock:
            self._images.pop((key, level), None)
