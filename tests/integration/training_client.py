"""Training datasets in DataLoader workers. Run as a script: ``training_client.py CASE TARGET [CONTEXT]``; see fork_client.py."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ome_tensor import DatasetChanged, InvalidArgument
from ome_tensor_client import Client, connect
from ome_tensor_client.torch import RandomWindowSampler, TileDataset, TileLoader, WindowDataset, batch

# Three workers on two cores are what some of these cases are about.
warnings.filterwarnings("ignore", "This DataLoader will create")
warnings.filterwarnings("ignore", ".*set_vital")

SIZE = (16, 16)


def dataset_of(client: Client, **more: Any) -> TileDataset:
    images = client.dataset("plate").images("cell", metadata=["well", "label"])
    usual = {"tile_size": SIZE, "batch_size": 8, "shuffle": True, "seed": 3, "beside": {"target": "mask"}}
    return TileDataset(images, **usual | more)


def numbers_of(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch["tile"].tolist()]


def same(first: Any, second: Any) -> bool:
    """Whether two batches are bit for bit the same."""
    return all(
        torch.equal(first[key], second[key]) if isinstance(first[key], torch.Tensor) else first[key] == second[key]
        for key in first
    )


def workers(client: Client, context: str) -> None:
    """The same batches in the same order from any number of workers; epochs reach those that live on; a client that was used before."""
    dataset = dataset_of(client)
    wanted = {}
    for epoch in range(2):
        dataset.set_epoch(epoch)
        wanted[epoch] = list(dataset)
    assert numbers_of(wanted[0]) != numbers_of(wanted[1])
    loaders: list[Any] = [
        DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context, persistent_workers=True, timeout=30),
        TileLoader(dataset, num_workers=2, multiprocessing_context=context, persistent_workers=True, timeout=30),
    ]
    if context == "fork":
        loaders += [DataLoader(dataset, batch_size=None, num_workers=3), TileLoader(dataset, num_workers=1)]
    for loader in loaders:
        for epoch in (0, 1, 0):
            dataset.set_epoch(epoch)
            found = list(loader)
            assert len(found) == len(wanted[epoch])
            assert all(map(same, found, wanted[epoch]))
    # The parent goes on.
    assert numbers_of(dataset) == numbers_of(wanted[0])


def windows(client: Client, context: str) -> None:
    """Windows in workers are those of this process; and so is a loader's place after a restart."""
    dataset = WindowDataset(client.dataset("plate").images("cell"), SIZE, edge="pad", beside=["mask"])
    sampler = RandomWindowSampler(dataset, 100, seed=1)
    wanted = list(TileLoader(dataset, batch_size=8, sampler=sampler))
    loader = TileLoader(dataset, batch_size=8, sampler=sampler, num_workers=2, multiprocessing_context=context)
    read = iter(loader)
    first = [next(read) for _ in range(5)]
    state = loader.state_dict()
    other = TileLoader(
        dataset, batch_size=8, sampler=RandomWindowSampler(dataset, 100, seed=1), num_workers=2, multiprocessing_context=context
    )
    other.load_state_dict(state)
    assert all(map(same, first + list(other), wanted))
    assert len(first) + sum(1 for _ in read) == len(wanted)


def resume(client: Client, context: str) -> None:
    """A checkpoint in the middle, with workers that have read ahead: nothing lost, nothing repeated; with other numbers of workers after it."""
    wanted = list(dataset_of(client))
    for before, after in ((2, 0), (2, 3), (0, 2)):
        loader = TileLoader(dataset_of(client), num_workers=before, multiprocessing_context=context if before else None)
        read = iter(loader)
        first = [next(read) for _ in range(7)]
        time.sleep(0.2)  # for workers to read ahead
        state = loader.state_dict()
        del read
        other = TileLoader(
            dataset_of(client),
            num_workers=after,
            multiprocessing_context=context if after else None,
            persistent_workers=bool(after),
        )
        other.load_state_dict(state)
        assert all(map(same, first + list(other), wanted))
        assert all(map(same, list(other), wanted))
        # Loaded while workers live that know nothing of it.
        other.load_state_dict(state)
        assert all(map(same, first + list(other), wanted))


def plain(client: Client, context: str) -> None:
    """torch's own DataLoader cannot say where it is, and nobody pretends that it can; what is loaded for it is used once."""
    wanted = numbers_of(dataset_of(client))
    read = iter(dataset_of(client))
    dataset = dataset_of(client)
    for _ in range(5):
        next(read)
    half = dataset_of(client)
    it = iter(half)
    for _ in range(5):
        next(it)
    dataset.load_state_dict(half.state_dict())
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context, persistent_workers=True)
    assert numbers_of(loader) == wanted[40:]
    assert numbers_of(loader) == wanted
    with pytest.raises(InvalidArgument, match="only the DataLoader knows"):
        dataset.state_dict()
    dataset.load_state_dict(half.state_dict())
    with pytest.raises(InvalidArgument, match="after the DataLoader's workers were started"):
        list(loader)


def stateful(client: Client, _: str) -> None:
    """torchdata's StatefulDataLoader, batches and single samples; and its state in another number of workers."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    for more, own in (({}, {"batch_size": None}), ({"batch_size": None}, {"batch_size": 8, "collate_fn": list})):

        def tiles(batches: Any) -> list[int]:
            found = [one["tile"] for batch in batches for one in (batch if isinstance(batch, list) else [batch])]
            return [int(number) for one in found for number in torch.as_tensor(one).reshape(-1)]

        for count in (0, 2):
            wanted = tiles(StatefulDataLoader(dataset_of(client, **more), num_workers=count, **own))
            loader = StatefulDataLoader(dataset_of(client, **more), num_workers=count, **own)
            read = iter(loader)
            first = tiles([next(read) for _ in range(7)])
            state = loader.state_dict()
            again = StatefulDataLoader(dataset_of(client, **more), num_workers=count, **own)
            again.load_state_dict(state)
            assert first + tiles(again) == wanted
            assert tiles(again) == wanted
            # Another number of workers, and ranks, go on with what is left.
            dataset = dataset_of(client, **more)
            dataset.load_state_dict(state)
            rest = tiles(DataLoader(dataset, num_workers=1, **own))
            assert sorted(first + rest) == sorted(wanted)
            rest = []
            for rank in range(3):
                part = dataset_of(client, shard=(rank, 3), **more)
                part.load_state_dict([state])
                rest += tiles(DataLoader(part, num_workers=0, **own))
            assert sorted(first + rest) == sorted(wanted)


def windows_stateful(client: Client, _: str) -> None:
    """Samplers of windows in torchdata's StatefulDataLoader, which takes samples ahead."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = WindowDataset(client.dataset("plate").images("cell"), SIZE, edge="pad")

    def made(count: int) -> Any:
        sampler = RandomWindowSampler(dataset, 100, seed=1)
        return StatefulDataLoader(dataset, batch_size=8, sampler=sampler, num_workers=count, collate_fn=WindowDataset.collate)

    for count in (0, 2):
        wanted = list(made(count))
        loader = made(count)
        read = iter(loader)
        first = [next(read) for _ in range(5)]
        again = made(count)
        again.load_state_dict(loader.state_dict())
        assert all(map(same, first + list(again), wanted))
        assert len(wanted) == 13


def held(client: Client, context: str) -> None:
    """Whoever keeps every batch has every batch: memory that goes from workers to here is not used again before it is dropped."""
    dataset = dataset_of(client, batch_size=1)
    wanted = list(dataset)
    for loader in (
        TileLoader(dataset, num_workers=2, multiprocessing_context=context),
        DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context),
    ):
        found = list(loader)
        assert len(found) == len(wanted) > 300
        assert all(map(same, found, wanted))


def epochs(client: Client, context: str) -> None:
    """Workers that come and go with each epoch leave nothing here: neither memory of theirs that is mapped, nor descriptors, nor threads."""
    loader = TileLoader(dataset_of(client, batch_size=4), num_workers=2, multiprocessing_context=context)
    seen = []
    for epoch in range(7):
        loader.set_epoch(epoch)
        assert len(list(loader)) > 20
        gc.collect()
        seen.append((len(os.listdir("/proc/self/fd")), threading.active_count(), len({key[0] for key in batch._mapped})))
    assert all(workers <= 2 for _, _, workers in seen), seen
    assert max(seen[3:])[0] <= max(seen[:3])[0] + 8, seen
    assert seen[-1][1] <= seen[2][1] + 1, seen


def begins(client: Client, context: str) -> None:
    """All workers of an iteration begin at the same place of the same epoch, whoever has read before and whatever is set meanwhile."""
    orders = []
    for epoch in range(3):
        dataset = dataset_of(client)
        dataset.set_epoch(epoch)
        orders.append(numbers_of(dataset))
    half = dataset_of(client)
    it = iter(half)
    for _ in range(5):
        next(it)
    state = half.state_dict()
    # Somebody had a look first: then what was loaded is used, for all.
    dataset = dataset_of(client)
    dataset.load_state_dict(state)
    next(iter(dataset))
    assert numbers_of(TileLoader(dataset, num_workers=2, multiprocessing_context=context)) == orders[0]
    dataset.load_state_dict(state)
    next(iter(dataset))
    assert numbers_of(DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context)) == orders[0]
    # This process has read once, and does not know how far they are.
    with pytest.raises(InvalidArgument, match="only the DataLoader knows"):
        dataset.state_dict()
    # One worker goes on; three later ones begin anew.
    dataset.load_state_dict(state)
    assert numbers_of(TileLoader(dataset, num_workers=1, multiprocessing_context=context)) == orders[0][40:]
    assert numbers_of(TileLoader(dataset, num_workers=3, multiprocessing_context=context)) == orders[0]
    # An epoch that is set while another is read is the next one's.
    for persistent in (False, True):
        loader = TileLoader(dataset_of(client), num_workers=2, multiprocessing_context=context, persistent_workers=persistent)
        for epoch in range(3):
            loader.set_epoch(epoch)
            it = iter(loader)
            loader.set_epoch((epoch + 1) % 3)
            assert numbers_of(it) == orders[epoch]


def beside(client: Client, context: str) -> None:
    """Workers are not forked off in the middle of another loader's read by a thread of this process, which could die of it."""
    dataset = dataset_of(client, batch_size=1)
    wanted = numbers_of(dataset_of(client, batch_size=1))
    reading = iter(TileLoader(dataset))
    first = numbers_of([next(reading)])
    other = TileLoader(dataset_of(client), num_workers=2, multiprocessing_context=context)
    with pytest.raises(InvalidArgument, match="cannot be forked while another loader's thread reads") as caught:
        iter(other)
    assert caught.value.field == "multiprocessing_context"
    assert first + numbers_of(reading) == wanted
    assert len(list(other)) > 20


def saved(client: Client, context: str) -> None:
    """A batch that is saved in a worker has its tensors in the file."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = dataset_of(client, transform=functools.partial(_save, folder))
        wanted = list(TileLoader(dataset, num_workers=2, multiprocessing_context=context))
        found = {
            tuple(one["tile"].tolist()): one for one in (torch.load(path, weights_only=False) for path in Path(folder).iterdir())
        }
        assert len(found) == len(wanted)
        assert all(same(found[tuple(one["tile"].tolist())], one) for one in wanted)


def _save(folder: str, samples: Any) -> Any:
    torch.save(samples, f"{folder}/{int(samples['tile'][0])}")
    return samples


def slow(client: Client, context: str) -> None:
    """A loop that is left while a worker takes its time, and the next one: with workers of its own, and no wait without end."""
    dataset = dataset_of(client, transform=_very_slow)
    loader = TileLoader(dataset, num_workers=1, multiprocessing_context=context, persistent_workers=True)
    for _ in loader:
        break
    old = iter(loader)
    assert next(old)["tile"].tolist() == numbers_of(dataset_of(client))[:8]
    iter(loader)
    with pytest.raises(InvalidArgument, match="another iteration of this loader has begun"):
        list(old)
    # The threads that wait for slow workers end with those.
    del loader, old
    gc.collect()
    deadline = time.monotonic() + 40
    while any(thread.name == "ome-tensor-prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _very_slow(samples: Any) -> Any:
    """The first batch of a worker comes at once, the second only after longer than anybody waits for the thread that reads it."""
    _very_slow.__dict__["calls"] = calls = _very_slow.__dict__.get("calls", 0) + 1
    if calls == 2:
        time.sleep(8)
    return samples


def killed(client: Client, context: str) -> None:
    """A worker that is killed is an error at once, which says so; never a wait without end, never a batch too few."""
    dataset = dataset_of(client, transform=_slow)
    loader = TileLoader(dataset, num_workers=2, multiprocessing_context=context, prefetch_factor=1)
    read = iter(loader)
    next(read)
    began = time.monotonic()
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        list(read)
    assert time.monotonic() - began < 20
    # What was handed out before is known, and another loader goes on from there.
    state = loader.state_dict()
    assert state["taken"] % 8 == 0
    other = TileLoader(dataset_of(client), num_workers=2, multiprocessing_context=context)
    other.load_state_dict(state)
    wanted = numbers_of(dataset_of(client))
    assert numbers_of(other) == wanted[state["taken"] :]


def _slow(batch: Any) -> Any:
    time.sleep(0.05)
    return batch


def errors(client: Client, context: str) -> None:
    """What goes wrong in a worker is this project's error here, with its field."""
    images = client.dataset("plate").images("cell")
    images.version = "another"
    loader = TileLoader(TileDataset(images, tile_size=SIZE, batch_size=4), num_workers=1, multiprocessing_context=context)
    with pytest.raises(DatasetChanged, match="plate"):
        list(loader)


CASES: dict[str, Callable[[Client, str], None]] = {
    function.__name__: function
    for function in (
        workers,
        windows,
        resume,
        plain,
        stateful,
        windows_stateful,
        held,
        epochs,
        begins,
        beside,
        saved,
        slow,
        killed,
        errors,
    )
}


def main(case: str, target: str, context: str = "fork") -> None:
    """One case."""
    with connect(target, timeout=20) as client:
        CASES[case](client, context)


if __name__ == "__main__":
    main(*sys.argv[1:])
