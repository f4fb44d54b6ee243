"""What a training process tells its data-loading workers while they live: which epoch it is, and from where to go on.

Persistent workers hold a copy of the dataset from when they were started; what is set in the main process afterwards reaches them only through shared
memory.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["SharedEpoch"]

#: The epoch; how often a state was loaded; how many iterations have begun; which of them goes on from what was loaded; which of its workers have.
_EPOCH, _GENERATION, _BEGUN, _WHO, _USED = 0, 1, 2, 3, 4

#: Who goes on from what was loaded, where it is not so many workers of a DataLoader: the process itself, or somebody who knows all workers.
_ITSELF, _SOMEBODY = -1, -2

#: More workers than any DataLoader has.
_MOST_WORKERS = 1024


class SharedEpoch:
    """An epoch's number and a generation of progress, in memory that worker processes see, however they were started."""

    def __init__(self, epoch: int = 0) -> None:
        self._numbers = torch.zeros(_USED + _MOST_WORKERS, dtype=torch.int64).share_memory_()
        self.epoch = epoch

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Of a worker it is shared already. A copy gets numbers of its own, which its own workers are to see.
        self._numbers.share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch to read."""
        return int(self._numbers[_EPOCH])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._numbers[_EPOCH] = epoch

    @property
    def generation(self) -> int:
        """How often progress has been loaded. A worker with an older one must not go on."""
        return int(self._numbers[_GENERATION])

    def loaded(self) -> int:
        """Progress has been loaded: nobody has gone on from it yet. Returns its generation."""
        self._numbers[_WHO:] = 0
        self._numbers[_GENERATION] += 1
        return self.generation

    def use(self, worker: int, workers: int, *, is_worker: bool) -> bool:
        """Whether that worker goes on from loaded progress now: once, and only beside workers that do so too.

        Args:
            worker, workers: Which of how many.
            is_worker: Whether it is a DataLoader's.
        """
        self._numbers[_BEGUN] += 1
        who = workers if is_worker else _ITSELF
        if not self._numbers[_WHO]:
            self._numbers[_WHO] = who
        place = _USED + worker
        # Of another iteration: had some of its workers gone on and others begun anew, samples would be missing and others come twice.
        if self._numbers[_WHO] != who or self._numbers[place]:
            return False
        self._numbers[place] = 1
        return True

    def use_all(self) -> None:
        """Somebody goes on from loaded progress who knows all workers, and tells each where to begin."""
        self._numbers[_BEGUN] += 1
        self._numbers[_WHO] = _SOMEBODY

    @property
    def is_used(self) -> bool:
        """Whether anybody has begun to read since progress was last loaded (or ever)."""
        return bool(self._numbers[_WHO])

    @property
    def begun(self) -> int:
        """How many have begun to read, in whatever process."""
        return int(self._numbers[_BEGUN])
