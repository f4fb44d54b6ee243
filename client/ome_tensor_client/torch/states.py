"""What is kept of an iteration: by one process, and by a DataLoader that asks each of its workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ome_tensor.errors import InvalidArgument

from .progress import Progress

__all__ = ["WorkerRun", "going_on"]


@dataclass
class WorkerRun:
    """An iteration in one process.

    Attributes:
        begun: Where its rank began.
        worker, workers: Whose part it is.
        block: Samples that workers take in turn.
        taken: How many have been yielded of that part.
    """

    begun: Progress
    worker: int
    workers: int
    block: int
    taken: int

    def state(self) -> dict[str, Any]:
        """For a DataLoader that keeps what its workers say."""
        own = {"worker": self.worker, "workers": self.workers, "block": self.block, "worker_taken": self.taken}
        return self.begun.state() | own

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> WorkerRun:
        """The inverse. Raises InvalidArgument."""
        begun = Progress.of_state(state)
        try:
            numbers = [int(state[name]) for name in ("worker", "workers", "block", "worker_taken")]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(
                f"the state cannot be loaded: it is damaged: {error!r}", field="state_dict", value=dict(state)
            ) from None
        return cls(begun, *numbers)


def going_on(state: Any, here: Progress, drop_last: bool, *, in_step: bool) -> Progress:
    """What a rank goes on with from a state, or from a list of those of all ranks; see :meth:`.Progress.going_on`."""
    states = list(state) if isinstance(state, (list, tuple)) else [state]
    return Progress.going_on([rank_progress(one, drop_last) for one in states], here, in_step=in_step)


def rank_progress(state: Any, drop_last: bool) -> Progress:
    """A rank's progress from whatever keeps it: a dataset's or a TileLoader's state, or a StatefulDataLoader's with those of its workers.

    Raises:
        InvalidArgument: there is none in it, or not that of all workers, or an older one.
    """
    beyond = state.get("_steps_since_snapshot") if isinstance(state, Mapping) else None
    if beyond:
        # What its workers say is of then, and how many samples a step has, nobody says.
        raise InvalidArgument(
            f"the state cannot be loaded: its DataLoader has handed out {beyond} batches since it last asked its workers: give it to a "
            "StatefulDataLoader with as many workers, or make it with snapshot_every_n_steps=1",
            field="state_dict",
            value=beyond,
        )
    found = list(_states_in(state))
    runs = sorted((WorkerRun.of_state(one) for one in found if "worker_taken" in one), key=lambda run: run.worker)
    if not runs:
        return Progress.of_state(found[0] if len(found) == 1 else state)
    first = runs[0]
    if [run.worker for run in runs] != list(range(first.workers)) or any(run.begun != first.begun for run in runs):
        raise InvalidArgument(
            f"the state cannot be loaded: it is of workers {[run.worker for run in runs]}, not of each of {first.workers} once",
            field="state_dict",
            value=[run.worker for run in runs],
        )
    return first.begun.of_workers([run.taken for run in runs], first.block, drop_last)


def _states_in(state: Any) -> Iterator[Mapping[str, Any]]:
    """The states of datasets anywhere in a DataLoader's."""
    if isinstance(state, Mapping):
        if "base" in state and "taken" in state:
            yield state
        else:
            for value in state.values():
                yield from _states_in(value)
