"""States and ranks of training datasets in processes of their own. Run as a script: ``training_states_client.py CASE TARGET``; see fork_client.py."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from training_client import SIZE, dataset_of, numbers_of

from ome_tensor import InvalidArgument
from ome_tensor_client import Client, connect
from ome_tensor_client.torch import RandomWindowSampler, TileDataset, TileLoader, WindowDataset

warnings.filterwarnings("ignore", "This DataLoader will create")
warnings.filterwarnings("ignore", ".*set_vital")


def stateful_of(dataset: Any, workers: int, **more: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset, num_workers=workers, **{"batch_size": None} | more)


def order_of(client: Client, epoch: int) -> list[int]:
    dataset = dataset_of(client)
    dataset.set_epoch(epoch)
    return numbers_of(dataset)


def some(loader: Any, batches: int) -> tuple[list[int], Any]:
    """The tiles of so many batches, and the state after them."""
    read = iter(loader)
    return numbers_of([next(read) for _ in range(batches)]), loader.state_dict()


def later(client: Client) -> None:
    """A state early in the epoch after one that was gone on with: also of workers who have not handed out anything yet."""
    _, state = some(TileLoader(dataset_of(client)), 5)
    wanted = order_of(client, 1)
    for batches in (0, 1):
        dataset = dataset_of(client)
        dataset.load_state_dict(state)
        loader = stateful_of(dataset, 2)
        assert numbers_of(loader) == order_of(client, 0)[40:]
        dataset.set_epoch(1)
        first, found = some(loader, batches)
        again = dataset_of(client)
        loader = stateful_of(again, 2)
        loader.load_state_dict(found)
        assert first + numbers_of(loader) == wanted
        assert again.epoch == 1
        again.load_state_dict(found)
        assert first + numbers_of(again) == wanted


def finished(client: Client) -> None:
    """A state of the end of an epoch does not take back the next one, though it is loaded only when that begins."""
    for workers in (0, 2):
        loader = stateful_of(dataset_of(client), workers)
        list(loader)
        state = loader.state_dict()
        for is_loaded_first in (False, True):
            dataset = dataset_of(client)
            loader = stateful_of(dataset, workers)
            if is_loaded_first:
                loader.load_state_dict(state)
            dataset.set_epoch(1)
            if not is_loaded_first:
                loader.load_state_dict(state)
            assert numbers_of(loader) == order_of(client, 1)
            assert dataset.epoch == 1
    windows = WindowDataset(client.dataset("plate").images("cell"), SIZE, edge="pad")
    for workers in (0, 2):
        loaders = []
        for _ in range(2):
            sampler = RandomWindowSampler(windows, 20)
            loaders.append((sampler, stateful_of(windows, workers, batch_size=8, sampler=sampler)))
        list(loaders[0][1])
        sampler, loader = loaders[1]
        loader.load_state_dict(loaders[0][1].state_dict())
        sampler.set_epoch(1)
        assert (sum(len(batch["tile"]) for batch in loader), sampler.epoch) == (20, 1)


def refused(client: Client) -> None:
    """States that do not say what has been handed out of what these workers would read."""
    first, state = some(stateful_of(dataset_of(client), 2), 7)
    other = dataset_of(client, batch_size=4)
    read: Any = iter(DataLoader(_Resumed(other, state), batch_size=None, num_workers=2))
    with pytest.raises(InvalidArgument, match="take turns by 8 samples, and these do by 4"):
        next(read)
    read._shutdown_workers()
    other.load_state_dict(state)
    assert first + numbers_of(other) == order_of(client, 0)
    first, state = some(stateful_of(dataset_of(client), 2, snapshot_every_n_steps=3), 5)
    with pytest.raises(InvalidArgument, match="handed out 2 batches since"):
        dataset_of(client).load_state_dict(state)
    loader = stateful_of(dataset_of(client), 2, snapshot_every_n_steps=3)
    loader.load_state_dict(state)
    assert first + numbers_of(loader) == order_of(client, 0)


class _Resumed(IterableDataset[Any]):  # type: ignore[misc]  # torch is optional, and not typed here
    """Does in workers what a StatefulDataLoader does, which takes ten seconds to get over an error there."""

    def __init__(self, dataset: TileDataset, state: Any) -> None:
        self._dataset, self._states = dataset, state["_snapshot"]["_worker_snapshots"]

    def __iter__(self) -> Any:
        self._dataset.load_state_dict(self._states[f"worker_{get_worker_info().id}"]["dataset_state"])
        yield from self._dataset


def ranks(client: Client) -> None:
    """A dataset that is handed to processes is theirs, whatever rank they are; and that of their workers, who know nothing of ranks."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_read, args=(rank, dataset_of(client), queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(queue.get() for _ in processes)
    assert [one[:2] for one in found] == [(0, (0, 2)), (1, (1, 2))]
    assert sorted(found[0][2] + found[1][2]) == sorted(order_of(client, 0))
    for process in processes:
        process.join()


def _read(rank: int, dataset: TileDataset, queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn", worker_init_fn=_forget, timeout=60
    )
    queue.put((rank, dataset.rank, numbers_of(loader)))


def _forget(_: int) -> None:
    del os.environ["RANK"]


class _Marked(torch.Tensor):  # type: ignore[misc]  # torch is optional, and not typed here
    """A transform's own kind of tensor."""


def _mark(samples: Any) -> Any:
    return samples | {"pixels": samples["pixels"].as_subclass(_Marked)}


def classes(client: Client) -> None:
    """What a transform makes is what arrives, from workers too."""
    for workers in (0, 1):
        (first, *_) = TileLoader(dataset_of(client, transform=_mark), num_workers=workers)
        assert [type(first[key]) for key in ("pixels", "target")] == [_Marked, torch.Tensor]


def failed(client: Client) -> None:
    """A loop that fails leaves no workers, without help from the garbage collector; nor does one that is left."""
    gc.disable()
    loader = TileLoader(dataset_of(client, transform=_fail), num_workers=2)
    for _ in range(3):
        with pytest.raises(ValueError, match="the third"):
            list(loader)
        assert not multiprocessing.active_children()
        for _ in loader:
            break
        assert not multiprocessing.active_children()


def _fail(samples: Any) -> Any:
    _fail.__dict__["calls"] = calls = _fail.__dict__.get("calls", 0) + 1
    if calls == 3:
        raise ValueError("the third")
    return samples


def windows(client: Client) -> None:
    """Loaders of windows count what they have read, and are no readers beside whom workers may be forked off."""
    dataset = WindowDataset(client.dataset("plate").images("cell"), SIZE, edge="pad", origins=[(0, 0)] * 200, numbers=[1] * 200)
    dataset.__getitems__(range(200))
    loader = TileLoader(dataset, batch_size=8, num_workers=2)
    for _ in range(2):
        assert sum(len(batch["tile"]) for batch in loader) == loader.stats().read.tiles == 200
    reading = iter(TileLoader(dataset, batch_size=1))
    next(reading)
    with pytest.raises(InvalidArgument, match="cannot be forked while another loader's thread reads"):
        iter(loader)
    assert sum(1 for _ in reading) == 199


CASES: dict[str, Callable[[Client], None]] = {
    function.__name__: function for function in (later, finished, refused, ranks, classes, failed, windows)
}


def main(case: str, target: str) -> None:
    """One case."""
    with connect(target, timeout=20) as client:
        CASES[case](client)


if __name__ == "__main__":
    main(*sys.argv[1:])
