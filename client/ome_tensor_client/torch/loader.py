"""A DataLoader that does all that is right for tiles from a server: whole batches, exact checkpoints, the way to a GPU, and a report of who waits."""

from __future__ import annotations

import itertools
import multiprocessing
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ome_tensor.errors import InvalidArgument
from ome_tensor.handoff import check_device, parse_device
from ome_tensor.prefetch import Prefetcher
from ome_tensor.staging import check_pinned
from ome_tensor.tiling import positive
from ome_tensor_client.read_stats import ReadStats

from .batch import as_batch
from .devices import to_device
from .loader_stats import LoaderStats
from .progress import Progress
from .ranks import worker_here
from .samplers import EpochSampler, WindowSampler
from .samples import nbytes_of
from .sources import TileReader
from .tile_dataset import TileDataset
from .window_dataset import WindowDataset

__all__ = ["TileLoader"]


#: Batches that lie ready in this process: windows, and what workers bring.
_AHEAD = 2

#: Bytes of those.
_AHEAD_BYTES = 64 << 20


#: Threads of this process that read from a server.
_reading: weakref.WeakSet[Prefetcher[Any]] = weakref.WeakSet()


class _Item:
    """A batch on its way from a worker.

    Attributes:
        taken: Number of samples in it.
        data: The batch.
        read: What reading has cost in that worker since its last item.
    """

    __slots__ = ("data", "read", "taken")

    def __init__(self, taken: int, data: Any, read: ReadStats) -> None:
        self.taken = taken
        self.data = data
        self.read = read


class _TileFeed(IterableDataset[Any]):  # type: ignore[misc]  # torch is optional, and not typed here
    """What a worker does with a dataset of tiles: its part, in batches that say how many samples they are.

    Args:
        dataset: The tiles.
        size: Samples a batch.
        collate: Makes a batch of samples, where the dataset gives single ones.
    """

    def __init__(self, dataset: TileDataset, size: int, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._size, self._collate = dataset, size, collate
        self._begun: Progress | None = None
        self._reader: TileReader | None = None
        # Persistent workers hold this as it was when they began; of which epoch a later iteration is, they see here.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def begin(self, begun: Progress, reader: TileReader | None) -> None:
        """Where the iteration that is about to begin begins, for all workers alike; and by what it reads, where it does so in this process."""
        self._begun, self._reader = begun, reader
        self._epoch[0] = begun.epoch

    def __iter__(self) -> Iterator[_Item]:
        # Not in a generator: where it begins is settled when it is made.
        begun, self._begun = self._begun, None
        reader, self._reader = self._reader, None
        return self._items(self._dataset.whole(int(self._epoch[0])) if begun is None else begun, reader)

    def _items(self, begun: Progress, reader: TileReader | None) -> Iterator[_Item]:
        dataset = self._dataset
        worker, workers = worker_here()
        dataset.stats.taken()  # What was read before is not of this iteration.
        found = dataset.read(begun, worker, workers, self._size, ahead=False, reader=reader)
        if dataset.batch_size is not None:
            for taken, batch in found:
                yield _Item(taken, batch, dataset.stats.taken())
            return
        samples = []
        for _, sample in found:
            samples.append(sample)
            if len(samples) == self._size:
                yield _Item(len(samples), as_batch(self._collate(samples)), dataset.stats.taken())
                samples = []
        if samples:
            yield _Item(len(samples), as_batch(self._collate(samples)), dataset.stats.taken())


class _WindowFeed(Dataset[Any]):  # type: ignore[misc]  # torch is optional, and not typed here
    """What a worker does with a dataset of windows: a batch a call."""

    def __init__(self, dataset: WindowDataset, collate: Callable[[Any], Any]) -> None:
        self._dataset, self._collate = dataset, collate

    def __getitem__(self, indices: list[Any]) -> _Item:
        samples = self._dataset.__getitems__(indices)
        return _Item(len(indices), as_batch(self._collate(samples)), self._dataset.stats.taken())


class _Batches:
    """The indices of batches, as a DataLoader's sampler: it is given no batch size, so that each is one index."""

    def __init__(self, sampler: EpochSampler, size: int, drop_last: bool) -> None:
        self._sampler, self._size, self._drop_last = sampler, size, drop_last
        #: Where the iteration begins that is about to begin.
        self.begun: Progress | None = None

    def __iter__(self) -> Iterator[list[Any]]:
        assert self.begun is not None
        return self._batched(self._sampler.read(self.begun))

    def _batched(self, indices: Iterator[Any]) -> Iterator[list[Any]]:
        batch: list[Any] = []
        for index in indices:
            batch.append(index)
            if len(batch) == self._size:
                yield batch
                batch = []
        if batch and not self._drop_last:
            yield batch

    def __len__(self) -> int:
        samples = len(self._sampler)
        return samples // self._size if self._drop_last else -(-samples // self._size)


def _as_it_is(item: Any) -> Any:
    return item


class TileLoader:
    """Iterates over batches of a :class:`.TileDataset` or a :class:`.WindowDataset`, read by worker processes or by a thread of this one.

    The samples of a rank, and their order, are the same whatever ``num_workers`` is. ``state_dict()`` says what the training loop has been
    handed, whatever
    else has been read ahead, so nothing is lost or repeated.

    Args:
        dataset: What to read.
        batch_size: Samples a batch, where the dataset does not make batches itself.
        num_workers: Processes that read; 0: a thread of this one, which is often enough, since the server makes the batches. While it
            reads, other loaders' workers have to be started by ``multiprocessing_context="forkserver"`` (or spawn).
        sampler: Of a WindowDataset, which windows; by default all listed ones in order.
        drop_last: Of a WindowDataset, leave out a last batch of fewer samples. (A TileDataset has its own.)
        collate_fn: Makes a batch of a list of single samples; by default torch's, and of windows the batch as it came.
        device: ``cpu``, ``cuda`` or ``cuda:N``: tensors of each batch are there, copied while the one before is used.
        pin_memory: Tensors in page-locked memory, copied once; for those who go to the device by themselves.
        multiprocessing_context, persistent_workers, prefetch_factor, worker_init_fn, timeout: As of torch's DataLoader.

    Raises:
        InvalidArgument: naming the argument and its value.
        DeviceUnavailable: CUDA is asked for and not there.
    """

    def __init__(
        self,
        dataset: TileDataset | WindowDataset,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
        sampler: EpochSampler | None = None,
        drop_last: bool = False,
        collate_fn: Callable[[Any], Any] | None = None,
        device: str = "cpu",
        pin_memory: bool = False,
        multiprocessing_context: Any = None,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        worker_init_fn: Callable[[int], None] | None = None,
        timeout: float = 0,
    ) -> None:
        self.dataset = dataset
        self._device = parse_device(device)
        check_device(self._device, "numpy")
        self._pin_memory = bool(pin_memory)
        if self._pin_memory:
            check_pinned()
        feed, self._batches, self._counter = self._fed(dataset, batch_size, sampler, drop_last, collate_fn)
        try:
            self._loader: Any = DataLoader(
                feed,
                batch_size=None,
                sampler=self._batches,
                num_workers=num_workers,
                collate_fn=_as_it_is,
                multiprocessing_context=multiprocessing_context,
                persistent_workers=persistent_workers,
                prefetch_factor=prefetch_factor,
                worker_init_fn=worker_init_fn,
                timeout=timeout,
            )
        except (ValueError, TypeError, AssertionError) as error:
            # What torch says of its own arguments.
            raise InvalidArgument(f"the DataLoader cannot be made: {error}", field="num_workers", value=num_workers) from None
        self._run: tuple[Progress, int] | None = None
        self._ahead: Prefetcher[_Item] | None = None
        #: Whose workers serve a later one by now.
        self._superseded: weakref.WeakSet[Prefetcher[_Item]] = weakref.WeakSet()
        self._stats = LoaderStats()

    def _fed(
        self,
        dataset: TileDataset | WindowDataset,
        batch_size: int | None,
        sampler: EpochSampler | None,
        drop_last: bool,
        collate: Callable[[Any], Any] | None,
    ) -> tuple[Any, _Batches | None, TileDataset | EpochSampler]:
        """What workers read, how many batches that is, and who counts epochs and progress."""
        if isinstance(dataset, WindowDataset):
            size = positive(batch_size, "batch_size", "batch_size must be > 0")
            if sampler is not None and not isinstance(sampler, EpochSampler):
                raise InvalidArgument(
                    f"sampler must be one of this package, which can be gone on with, not {type(sampler).__name__}; others work "
                    "with torch's own DataLoader",
                    field="sampler",
                    value=type(sampler).__name__,
                )
            chosen = sampler or WindowSampler(dataset)
            return _WindowFeed(dataset, collate or WindowDataset.collate), _Batches(chosen, size, bool(drop_last)), chosen
        if not isinstance(dataset, TileDataset):
            raise InvalidArgument(
                f"dataset must be a TileDataset or a WindowDataset, not {type(dataset).__name__}", field="dataset", value=dataset
            )
        if sampler is not None or drop_last:
            name = "sampler" if sampler is not None else "drop_last"
            raise InvalidArgument(
                f"{name} is for windows: a TileDataset has shuffle= and drop_last=", field=name, value=drop_last
            )
        if (batch_size is None) == (dataset.batch_size is None):
            raise InvalidArgument(
                "name a batch_size for the loader, or for its dataset, and not for both", field="batch_size", value=batch_size
            )
        size = dataset.batch_size or positive(batch_size, "batch_size", "batch_size must be > 0")
        return _TileFeed(dataset, size, collate or default_collate), None, dataset

    def __len__(self) -> int:
        """Batches of a whole epoch, of this rank."""
        if self._batches is not None:
            return len(self._batches)
        assert isinstance(self.dataset, TileDataset)
        size: int = self._loader.dataset._size
        return -(-self.dataset.samples_of(size) // size)

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""
        return self._counter.epoch

    def set_epoch(self, epoch: int) -> None:
        """Which epoch to read next: another shuffle, or other draws, for each. Raises InvalidArgument where it is no number from 0."""
        self._counter.set_epoch(epoch)

    def stats(self) -> LoaderStats:
        """Of the iteration in progress, or the last one; ``str()`` of it is one line."""
        return self._stats

    # -- iteration -----------------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch, or of what is left of it."""
        tiles = self.dataset if isinstance(self.dataset, TileDataset) and not self._loader.num_workers else None
        reader = None if tiles is None else tiles.reader()
        if isinstance(self.dataset, TileDataset):
            begun = self.dataset.take()
            self._loader.dataset.begin(begun, reader)
            if begun != self.dataset.whole(begun.epoch):
                # Workers that live do not know of it.
                self._loader._iterator = None
        else:
            assert self._batches is not None
            assert isinstance(self._counter, EpochSampler)
            begun = self._batches.begun = self._counter.take()
            self.dataset.stats.taken()  # What was read before is not of this iteration, and workers that are forked off would each count it.
        self._stats = stats = LoaderStats(begun.epoch)
        self._run = (begun, 0)
        if self._ahead is not None and self._loader.persistent_workers:
            # Workers that live on serve one iteration at a time.
            self._superseded.add(self._ahead)
            self._ahead.close()
            if self._ahead.is_running:
                # Its thread still waits for a slow worker: two of them must not read from the same workers.
                self._loader._iterator = None
        self._check_fork()
        items: Any = iter(self._loader)
        queue = getattr(items, "_data_queue", None)
        # On a thread of its own: taking a batch from workers costs something, too, and that is not to be the training loop's time.
        self._ahead = ahead = Prefetcher(
            items if self._loader.persistent_workers else _owned(items),
            _AHEAD if tiles is None else tiles.prefetch,
            max_bytes=_AHEAD_BYTES if tiles is None else tiles.ahead_bytes,
            size=lambda item: nbytes_of(item.data),
            cancel=None if reader is None else reader.cancel,
        )
        if not self._loader.num_workers:
            _reading.add(ahead)
        return self._iterate(begun, ahead, queue, stats)

    def _check_fork(self) -> None:
        """InvalidArgument where workers are about to be forked off while a thread of this process reads: they would take its connection with
        them, and the read may die of it, now or much later.
        """
        loader = self._loader
        if not loader.num_workers or (loader.persistent_workers and loader._iterator is not None):
            return
        context = loader.multiprocessing_context or multiprocessing
        if context.get_start_method() == "fork" and any(one.is_running for one in list(_reading)):
            raise InvalidArgument(
                "workers cannot be forked while another loader's thread reads in this process (num_workers=0): give one of the two "
                "multiprocessing_context='forkserver' and workers, or let the other come to its end first",
                field="multiprocessing_context",
                value="fork",
            )

    def _iterate(self, begun: Progress, ahead: Prefetcher[_Item], queue: Any, stats: LoaderStats) -> Iterator[Any]:
        began = time.perf_counter()
        found = to_device(_measured(ahead, queue, stats), self._device, self._pin_memory, stats)
        try:
            while True:
                asked = time.perf_counter()
                item = next(found, None)
                if item is None:
                    if ahead in self._superseded:
                        raise InvalidArgument(
                            "another iteration of this loader has begun, and workers that live on (persistent_workers) serve one at a time",
                            field="persistent_workers",
                            value=True,
                        )
                    return
                now = time.perf_counter()
                stats.waited += now - asked
                stats.elapsed = now - began
                stats.first = stats.first if stats.batches else now - asked
                stats.batches += 1
                stats.samples += item.taken
                # What has been handed out, whatever has been read ahead; of the iteration that was begun last.
                if self._ahead is ahead:
                    self._run = (begun, stats.samples)
                yield item.data
        finally:
            ahead.close()

    # -- checkpoints ---------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """How far the training loop has come: after the batch that it was handed last. Small, and made in microseconds."""
        if self._run is not None and self._run[0].epoch == self._counter.epoch:
            begun, taken = self._run
            return begun.after(taken).state()
        return self._counter.upcoming().state()

    def load_state_dict(self, state: Any, *, in_step: bool = False) -> None:
        """Go on from a state; see :meth:`.TileDataset.load_state_dict`. Workers that live are ended, and others begin where it says."""
        self._counter.load_state_dict(state, in_step=in_step)
        self._run = self._ahead = None
        # Persistent workers hold the dataset as it was.
        self._loader._iterator = None


def _owned(items: Any) -> Iterator[_Item]:
    """Items, whose workers end with them. torch leaves those of an iteration that failed to the garbage collector, for an error and its traceback
    hold each other: until then they live, and it waits five seconds for each.
    """
    try:
        yield from items
    finally:
        end = getattr(items, "_shutdown_workers", None)
        if end is not None:
            end()


def _measured(ahead: Prefetcher[_Item], queue: Any, stats: LoaderStats) -> Iterator[_Item]:
    """Items as they come; adds up what they cost, and how many lay ready: here, and in the queue of workers."""
    for asked in itertools.count():
        ready = ahead.ready + _size_of(queue)
        try:
            item = next(ahead)
        except StopIteration:
            return
        stats.ready = (stats.ready * asked + ready) / (asked + 1)
        stats.read.add(item.read)
        yield item


def _size_of(queue: Any) -> int:
    try:
        return 0 if queue is None else int(queue.qsize())
    except NotImplementedError:  # not on every system
        return 0
