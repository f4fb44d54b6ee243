"""Which windows an epoch has, in which order, for any number of ranks: exact, and to be gone on with after a restart."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ome_tensor.errors import InvalidArgument
from ome_tensor.spans import count, part
from ome_tensor.tiling import MAX_SEED, check_seed, permutation, positive

from .progress import Progress
from .ranks import checked_epoch, checked_shard, rank_here
from .states import going_on
from .window_dataset import WindowDataset

__all__ = ["EpochSampler", "RandomWindowSampler", "WindowSampler"]

#: Positions that are worked out together.
_TOGETHER = 1024


class EpochSampler(Sampler[Any]):  # type: ignore[misc]  # torch is optional, and not typed here
    """An epoch of numbered samples, dealt out to ranks like :class:`.TileDataset`'s. Of one process: workers get what it yields.

    Args:
        total: Samples in an epoch, over all ranks.
        data: Digest of what the samples are.
        seed: Of the order.
        drop_last: Leave out what would make ranks uneven.
        shard: ``(rank, ranks)``; by default torch.distributed's, else what torchrun says, else ``(0, 1)``.
    """

    def __init__(self, total: int, data: str, seed: int, drop_last: bool, shard: tuple[int, int] | None) -> None:
        self._total, self._data, self._seed = total, data, check_seed(seed) or 0
        self._drop_last = bool(drop_last)
        self._shard = checked_shard(shard)
        self._epoch = 0
        #: Whether somebody has set it, and it has not begun yet.
        self._is_set = False
        self._loaded: Progress | None = None
        self._run: tuple[Progress, int] | None = None
        #: Which iteration it is that counts.
        self._latest: object = None

    @abstractmethod
    def _indices(self, positions: np.ndarray, epoch: int) -> list[Any]:
        """The samples at positions of an epoch's order."""

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration samples."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Which epoch to sample next. Raises InvalidArgument where it is no number from 0."""
        self._epoch = checked_epoch(epoch)
        self._is_set = True

    def __len__(self) -> int:
        """Samples that this rank gets of an epoch."""
        return count(self._whole().positions(1, self._drop_last))

    def _whole(self) -> Progress:
        return Progress.of_epoch(self._data, self._epoch, self._total, *(self._shard or rank_here()))

    def upcoming(self) -> Progress:
        """Where the next iteration begins."""
        loaded = self._loaded
        return loaded if loaded is not None and loaded.epoch == self._epoch else self._whole()

    def __iter__(self) -> Iterator[Any]:
        # Settled at once, and not when the first one is taken: by then it may be another epoch's turn.
        return self._started(self.upcoming())

    def _started(self, begun: Progress) -> Iterator[Any]:
        # torch's DataLoader asks for two iterators, and takes from the second.
        if self._loaded is begun:
            self._loaded = None
        self._is_set = False
        self._latest = latest = object()
        self._run = (begun, 0)
        for place, index in enumerate(self.read(begun)):
            if self._latest is latest:
                self._run = (begun, place + 1)
            yield index

    def take(self) -> Progress:
        """Where an iteration begins that is read with :meth:`read`: what was loaded is used then."""
        begun, self._loaded, self._is_set = self.upcoming(), None, False
        return begun

    def read(self, begun: Progress) -> Iterator[Any]:
        """The samples of this rank from there on."""
        mine = begun.remaining(1, self._drop_last)
        for first in range(0, count(mine), _TOGETHER):
            spans = part(mine, first, first + _TOGETHER)
            positions = np.concatenate([begin + stride * np.arange(length, dtype=np.int64) for begin, length, stride in spans])
            yield from self._indices(positions, begun.epoch)

    def state_dict(self) -> dict[str, Any]:
        """How far this has come: after the sample yielded last. A DataLoader takes samples ahead: ask it, not this, what has been handed out."""
        if self._run is not None and self._run[0].epoch == self._epoch:
            begun, taken = self._run
            return begun.after(taken).state()
        return self.upcoming().state()

    def load_state_dict(self, state: Any, *, in_step: bool = False) -> None:
        """Go on from a state; see :meth:`.TileDataset.load_state_dict`."""
        self._loaded = going_on(state, self._whole(), self._drop_last, in_step=in_step)
        if not (self._is_set and self._loaded.is_over(1, self._drop_last)):
            self._epoch = self._loaded.epoch
        self._run = self._latest = None


class WindowSampler(EpochSampler):
    """The listed windows of a dataset, once each an epoch.

    Args:
        dataset: Whose windows.
        shuffle: Whether to shuffle them, by ``random.Random(seed + epoch).shuffle`` on their numbers.
        seed: The same on every rank.
        drop_last, shard: See :class:`EpochSampler`.

    Raises:
        InvalidArgument: naming the argument and its value.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        shard: tuple[int, int] | None = None,
    ) -> None:
        self._shuffle = bool(shuffle)
        super().__init__(len(dataset), _digest(dataset, "listed", len(dataset), shuffle, seed), seed, drop_last, shard)

    def _indices(self, positions: np.ndarray, epoch: int) -> list[Any]:
        if self._shuffle:
            order = np.frombuffer(permutation(self._total, (self._seed + epoch) & MAX_SEED), np.int64)  # type: ignore[call-overload]
            positions = order[positions]
        found: list[Any] = positions.tolist()
        return found


class RandomWindowSampler(EpochSampler):
    """Windows at random places, with replacement: each draw an image by weight, and then any place in it alike.

    Draw k of an epoch depends on the seed, the epoch and k alone, so any number of ranks draws the same epoch, and a restart goes on with it.

    Args:
        dataset: Whose images and window size.
        samples: Draws an epoch, over all ranks.
        weights: Of each image, how likely it is, relative to others; by default as many as it has places for a window, so that every
            place is as likely.
        planes: Whether to draw t and z too, for windows of one plane (or of the size's t and z); else windows have all t and z.
        seed: The same on every rank.
        drop_last, shard: See :class:`EpochSampler`.

    Raises:
        InvalidArgument: naming the argument and its value; an image with a weight that is too small for a window, unless windows may be
            padded: then it is in its middle.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        samples: int,
        *,
        weights: Any = None,
        planes: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        shard: tuple[int, int] | None = None,
    ) -> None:
        positive(samples, "samples", "samples must be > 0")
        self._planes = bool(planes)
        #: Of each image along t, z, y, x: where places begin, and how many there are.
        self._firsts, self._places = _room(dataset, self._planes)
        given = self._places.astype(float).prod(axis=1) if weights is None else _weights(weights, len(self._places))
        tight = (given > 0) & (self._places.min(axis=1) < 1)
        if tight.any():
            number = int(np.argmax(tight))
            raise InvalidArgument(
                f"image {number} has weight {given[number]:g} and is too small for a window of {dataset.size}: give it weight 0, or "
                "let windows be padded (edge='pad')",
                field="weights",
                value=float(given[number]),
            )
        if not given.sum() > 0:
            raise InvalidArgument(f"no image has room for a window of {dataset.size}", field="size", value=dataset.size)
        self._shares = np.cumsum(given / given.sum())
        digest = _digest(dataset, "random", samples, planes, seed, hashlib.sha256(self._shares.tobytes()).hexdigest())
        super().__init__(samples, digest, seed, drop_last, shard)

    def _indices(self, positions: np.ndarray, epoch: int) -> list[Any]:
        numbers = np.empty((len(positions), 5), np.int64)
        drawn, at = np.divmod(positions, _TOGETHER)
        for one in np.unique(drawn).tolist():
            mine = drawn == one
            numbers[mine] = self._draws(one, epoch)[at[mine]]
        chosen = numbers if self._planes else numbers[:, [0, 3, 4]]
        return [tuple(row) for row in chosen.tolist()]

    def _draws(self, number: int, epoch: int) -> np.ndarray:
        """A block of draws: image, t, z, y, x. Philox counts: https://numpy.org/doc/stable/reference/random/bit_generators/philox.html"""
        # A list of numbers from 2^63 on would be one of floats.
        key = np.array([self._seed, epoch], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number])).random((_TOGETHER, 5))
        images = np.minimum(np.searchsorted(self._shares, random[:, 0], side="right"), len(self._shares) - 1)
        places = self._firsts[images] + (random[:, 1:] * self._places[images]).astype(np.int64)
        return np.concatenate([images[:, None], places], axis=1)


def _room(dataset: WindowDataset, planes: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of each image's view along t, z, y, x: the first place of a window, and the number of places. (n, 4) each."""
    size = tuple(dataset.size)
    if not planes and len(size) != 2:
        raise InvalidArgument(f"windows of {size} have places along t and z, too: say planes=True", field="planes", value=planes)
    lengths = np.array((1, 1, *size)[-4:], np.int64)
    firsts, extents = dataset.frames(planes)
    places = extents - lengths + 1
    if dataset.is_padded:
        # In the middle, where the window is the larger one.
        small = places < 1
        small[:, 0] = False
        firsts = np.where(small, firsts + (extents - lengths) // 2, firsts)
        places = np.where(small, 1, places)
    if not planes:
        places[:, :2] = 1
    return firsts, np.maximum(places, 0)


def _weights(weights: Any, images: int) -> np.ndarray:
    try:
        found = np.asarray(weights, float)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (images,) or not np.isfinite(found).all() or (found < 0).any():
        raise InvalidArgument(
            f"weights must be {images} numbers from 0, one for each image", field="weights", value=str(weights)[:80]
        )
    return found


def _digest(dataset: WindowDataset, *parts: object) -> str:
    return hashlib.sha256("\0".join([dataset.digest, *map(repr, parts)]).encode()).hexdigest()[:32]
