"""Tiles of many images as a torch dataset: every sample of an epoch exactly once, over any number of ranks and workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from ome_tensor.errors import InvalidArgument
from ome_tensor.prefetch import Prefetcher
from ome_tensor.spans import Spans, count
from ome_tensor.tiling import MAX_SEED, Edge, Order, check_seed, positive
from ome_tensor_client.image_set import cut_of
from ome_tensor_client.read_stats import ReadStats

from .batch import as_batch
from .progress import Progress, requests
from .ranks import Handed, checked_epoch, checked_shard, handed, inherited_rank, is_worker, rank_here, worker_here
from .samples import PIXELS, batch_samples, convert_of, metadata_columns, nbytes_of, renamed
from .shared import SharedEpoch
from .sources import TileReader, image_set_of, source_of
from .states import WorkerRun, going_on

__all__ = ["TileDataset"]

#: Single samples that are read ahead for each of ``prefetch``.
_TOGETHER = 32


class TileDataset(IterableDataset[Any]):  # type: ignore[misc]  # torch is optional, and not typed here
    """Tiles of the images of a set (or of one view), as dicts of tensors; for a DataLoader's workers and for any number of ranks.

    Batches are made on the server: with ``batch_size`` a batch is one received message, and a DataLoader must leave it as it is
    (``batch_size=None``). :class:`.TileLoader` does all that is right by itself.

    The order of an epoch is that of ``iter_batches(shuffle=..., seed=seed + epoch)``. Rank r of R reads its positions r, r + R, r + 2R
    ...; workers of a rank take turns batch by batch. So ranks get the same number of samples, give or take one (exactly with
    ``drop_last``), and each sample comes exactly once.

    Samples are dicts: ``pixels`` (N, <layout>); the keys of ``beside``, likewise; ``image``, ``row``, ``tile`` (N,); ``origin`` (N, 4): t,
    z, y, x; ``valid`` (N, 3): z, h, w that are no padding; and the keys of ``metadata``. Without ``batch_size`` a sample is one tile,
    without N.

    Pixels of 8 and 16 bits become float32, which holds them exactly, without scaling; wider ones stay what they are. What comes beside
    stays what it is, but uint16 becomes int32, and uint32 int64: torch has few operations on those. They travel as they are stored.

    Args:
        images: ``client.dataset(...).images(...)``, or a tensor view.
        tile_size: ``(h, w)``: all selected t, z and c in each tile; or ``(z, h, w)``.
        centred: Instead: one window of that size in the middle of each image.
        batch_size: Samples a batch; ``None``: single samples.
        edge: ``pad`` tiles that stick out of an image, ``drop`` them, or (single samples only) ``clip`` them.
        pad: The padding value.
        shuffle: Whether to shuffle, over all images.
        seed: Of the shuffle, the same on every rank.
        dtype: A torch dtype or its name, or a dict of one for ``pixels`` and each key of ``beside``.
        beside: Other image columns of which every sample brings the same region too, or a dict of key: column; the mask beside its image.
        metadata: Columns of ``images.metadata`` that samples bring, or a dict of key: column; by default all that were selected with the
            images.
        drop_last: Leave out what does not fill a batch on every rank: all ranks get the same number of whole batches.
        shard: ``(rank, ranks)``; by default torch.distributed's, else what torchrun says (RANK, WORLD_SIZE), else ``(0, 1)``.
        prefetch: Batches that are read ahead on a thread, where no DataLoader's workers do it (``prefetch_factor``).
        transform: Called with each dict, where it is read (in a worker, or a TileLoader's thread); what it returns is the sample.
        selection: For sets: TensorView's keyword arguments: t, z, c, roi, layout, channel_policy ...

    Raises:
        InvalidArgument, InvalidSelection: naming the argument and its value.
    """

    def __init__(
        self,
        images: Any,
        *,
        tile_size: tuple[int, ...] | None = None,
        centred: tuple[int, ...] | None = None,
        batch_size: int | None = None,
        edge: Edge = "pad",
        pad: float = 0,
        shuffle: bool = False,
        seed: int = 0,
        dtype: Any = None,
        beside: Sequence[str] | Mapping[str, str] = (),
        metadata: Sequence[str] | Mapping[str, str] | None = None,
        drop_last: bool = False,
        shard: tuple[int, int] | None = None,
        prefetch: int = 2,
        transform: Callable[[Any], Any] | None = None,
        **selection: Any,
    ) -> None:
        self._size = None if batch_size is None else positive(batch_size, "batch_size", "batch_size must be > 0")
        self._prefetch = positive(prefetch, "prefetch", "prefetch must be > 0")
        if shuffle and seed is None:
            raise InvalidArgument("seed must be a number: every rank needs the same", field="seed", value=seed)
        if transform is not None and not callable(transform):
            raise InvalidArgument(f"transform must be callable, not {transform!r}", field="transform", value=transform)
        self._shuffle, self._seed = bool(shuffle), check_seed(seed) or 0
        self._beside = renamed(beside, "beside")
        self._convert = convert_of(dtype, [PIXELS, *self._beside])
        self._drop_last = bool(drop_last)
        self._shard = checked_shard(shard)
        self._handed: Handed | None = None
        self._transform = transform
        if tile_size is None and centred is None:
            raise InvalidArgument("name a tile_size or a centred window", field="tile_size")
        tiling = cut_of(tile_size, centred, edge, pad)
        found, chosen = image_set_of(images, selection)
        self._columns = metadata_columns(None if found is None else found.metadata, metadata)
        clashing = set(self._columns) & set(self._beside)
        if clashing:
            key = min(clashing)
            raise InvalidArgument(f"beside and metadata both have {key!r}: give one another key", field="metadata", value=key)
        self._source = source_of(images if found is None else found, tiling, list(self._beside.values()), chosen)
        tiles = self._source.enumeration
        self._total = 0 if tiles is None else tiles.total
        if self._size is not None and tiles is not None and not tiles.uniform:
            raise InvalidArgument(
                "tiles of these images differ in shape, and a batch has tiles of one: edge='pad' or 'drop', or a centred window",
                field="edge",
                value=edge,
            )
        self._shared = SharedEpoch()
        #: Whether somebody has set an epoch that this process has not begun yet.
        self._is_set = False
        self._loaded: Progress | None = None
        self._generation = 0
        #: How many had begun to read when this process was the last to know how far it is.
        self._seen = 0
        #: In a DataLoader's worker: what to go on from, and how many of its own samples it has taken of that.
        self._resumed: tuple[Progress, int] | None = None
        self._run: WorkerRun | None = None

    # -- epochs --------------------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""
        return self._shared.epoch

    def set_epoch(self, epoch: int) -> None:
        """Which epoch to read next: another shuffle for each. Reaches workers that live already.

        Raises:
            InvalidArgument: not a number from 0.
        """
        self._shared.epoch = checked_epoch(epoch)
        self._is_set = True

    @property
    def total(self) -> int:
        """Samples in an epoch, over all ranks."""
        return self._total

    @property
    def batch_size(self) -> int | None:
        """As given."""
        return self._size

    @property
    def stats(self) -> ReadStats:
        """What reading in this process has cost so far."""
        return self._source.stats

    @property
    def rank(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks."""
        return self._shard or inherited_rank(self._handed) or rank_here()

    def __len__(self) -> int:
        """Batches (or single samples) that this rank gets of a whole epoch."""
        size = self._size or 1
        return -(-self.samples_of(size) // size)

    def samples_of(self, size: int) -> int:
        """Samples that this rank gets of a whole epoch, in batches of so many."""
        return count(self._whole().positions(size, self._drop_last))

    def _whole(self) -> Progress:
        """The beginning of the epoch."""
        return self.whole(self.epoch)

    def whole(self, epoch: int) -> Progress:
        """The beginning of an epoch, for this rank."""
        return Progress.of_epoch(self._digest, epoch, self._total, *self.rank)

    @property
    def _digest(self) -> str:
        return f"{self._source.digest}:{self._seed if self._shuffle else 'in order'}"

    # -- reading -------------------------------------------------------------------------------------------------------------------

    def upcoming(self) -> Progress:
        """Where the next iteration will begin, in whatever process."""
        loaded = self._loaded
        return self._whole() if loaded is None or loaded.epoch != self.epoch or self._shared.is_used else loaded

    def begin(self, worker: int) -> Progress:
        """Where an iteration begins that begins now: at what was loaded, the first time after that; else with the epoch.

        Args:
            worker: Who asks, of a rank's workers: each goes on from what was loaded once.

        Raises:
            InvalidArgument: a state was loaded that this copy of the dataset does not know of.
        """
        if self._generation != self._shared.generation:
            raise InvalidArgument(
                "a state was loaded after the DataLoader's workers were started, and they know nothing of it: make a new DataLoader, or "
                "use TileLoader",
                field="state_dict",
            )
        _, workers = worker_here()
        is_first = self._shared.use(worker, workers, is_worker=is_worker())
        loaded = self._loaded
        if not is_first or loaded is None or loaded.epoch != self.epoch:
            return self._whole()
        return self._checked(loaded)

    def take(self) -> Progress:
        """Where an iteration begins of whoever tells each worker so: what was loaded is used then. Raises InvalidArgument as :meth:`begin`."""
        begun, self._is_set = self._checked(self.upcoming()), False
        self._shared.use_all()
        return begun

    def _checked(self, loaded: Progress) -> Progress:
        if (loaded.rank, loaded.ranks) != self.rank:
            raise InvalidArgument(
                f"the state was loaded by rank {loaded.rank} of {loaded.ranks}, and this is rank {self.rank[0]} of {self.rank[1]}",
                field="state_dict",
                value=loaded.rank,
            )
        return loaded

    def __iter__(self) -> Iterator[Any]:
        """The samples of this process: this rank's, or what this worker has of them."""
        # Where it begins is settled now, and not when the first is taken: by then it may be another epoch's turn, and a StatefulDataLoader asks a
        # worker for its state before that.
        try:
            run = self._begin_run()
        except InvalidArgument as error:
            if not is_worker():
                raise
            # What goes wrong in a worker has to go wrong where torch looks for it.
            return _failing(error)
        return self._yielded(run)

    def _begin_run(self) -> WorkerRun:
        worker, workers = worker_here()
        resumed, self._resumed = self._resumed, None
        begun, taken = (self.begin(worker), 0) if resumed is None else resumed
        self._is_set = False
        self._run = run = WorkerRun(begun, worker, workers, self._size or 1, taken)
        self._seen = self._shared.begun
        return run

    def _yielded(self, run: WorkerRun) -> Iterator[Any]:
        begun, worker, workers, taken = run.begun, run.worker, run.workers, run.taken
        # A DataLoader's worker is ahead of the training loop anyway.
        for number, samples in self.read(begun, worker, workers, run.block, taken, ahead=not is_worker()):
            run.taken += number
            yield samples

    def read(
        self,
        begun: Progress,
        worker: int,
        workers: int,
        block: int,
        skip: int = 0,
        *,
        ahead: bool = True,
        reader: TileReader | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """One worker's part of what is left of an epoch: how many samples, and those, transformed.

        Args:
            begun: Where to begin.
            worker, workers: Which part.
            block: Samples that workers take in turn.
            skip: How many of that part's to leave out.
            ahead: Whether to read ahead, on a thread; not where somebody else does.
            reader: By which, where somebody else is to end it.
        """
        reader = reader or self.reader()
        self._source.prefer(begun.rank * workers + worker)
        spans = requests(begun.remaining(block, self._drop_last), block, worker, workers, skip)
        found: Iterator[tuple[int, Any]] = self._made(reader, spans, (self._seed + begun.epoch) & MAX_SEED)
        if ahead:
            # Tensors are made on the thread that reads: what they cost is no part of a training loop's time.
            depth = self._prefetch * (_TOGETHER if self._size is None else 1)
            found = Prefetcher(
                found, depth, max_bytes=self.ahead_bytes, size=lambda made: nbytes_of(made[1]), cancel=reader.cancel
            )
        for taken, samples in found:
            yield taken, samples if self._transform is None else as_batch(self._transform(samples))

    @property
    def ahead_bytes(self) -> int:
        """Bytes that one process may read ahead."""
        return self._source.ahead_bytes

    @property
    def prefetch(self) -> int:
        """As given."""
        return self._prefetch

    def reader(self) -> TileReader:
        """What one iteration reads by."""
        return self._source.reader()

    def _made(self, reader: TileReader, pieces: Iterator[Spans], seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Samples as they arrive, one request after the other."""
        for spans in pieces:
            order = Order(self._shuffle, seed, spans=spans)
            found: Iterator[Any] = reader.tiles(order) if self._size is None else reader.batches(order, self._size)
            for one in found:
                began = time.perf_counter()
                samples = batch_samples(one, self._convert, self._beside, self._columns)
                self.stats.convert += time.perf_counter() - began
                yield (1 if self._size is None else len(one)), samples

    # -- checkpoints ---------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """How far this process has come: after the sample that it yielded last. In a DataLoader's worker that worker's, for
        StatefulDataLoader.

        Raises:
            InvalidArgument: a DataLoader's workers read, and this process cannot know how far: use ``TileLoader`` or
                ``StatefulDataLoader``.
        """
        run = self._run
        if is_worker():
            worker, workers = worker_here()
            if run is None:
                begun = self._loaded if self._resumed is None else self._resumed[0]
                begun = begun or self._whole()
                run = WorkerRun(begun, worker, workers, self._size or 1, 0 if self._resumed is None else self._resumed[1])
            return run.state()
        if self._shared.begun != self._seen:
            raise InvalidArgument(
                "a DataLoader's workers read this dataset, and only the DataLoader knows what has been handed out: use "
                "TileLoader(...).state_dict(), or torchdata's StatefulDataLoader",
                field="state_dict",
            )
        if run is not None and run.begun.epoch == self.epoch:
            return run.begun.after(run.taken).state()
        loaded = self._loaded
        if loaded is not None and loaded.epoch == self.epoch:
            return loaded.state()
        return self._whole().state()

    def load_state_dict(self, state: Any, *, in_step: bool = False) -> None:
        """Go on from a state: the next iteration over its epoch begins there. That is the next epoch to be read, unless nothing is left of it and
        another one has been set. (A StatefulDataLoader loads a state only when it begins to read.)

        Args:
            state: What a ``state_dict`` of this dataset, of a TileLoader, or of a StatefulDataLoader over it gave. A list of those of all
                ranks where their number has changed, or where they had come unevenly far.
            in_step: The state is one rank's, and all had taken as many samples: it may speak for all, whatever the number of ranks now.

        Raises:
            InvalidArgument: it is of other samples, or not enough to go on with.
        """
        if is_worker() and isinstance(state, Mapping) and "worker_taken" in state:
            self._resume_worker(WorkerRun.of_state(state))
            return
        found = going_on(state, self._whole(), self._drop_last, in_step=in_step)
        self._loaded, self._run, self._resumed = found, None, None
        if not (self._is_set and found.is_over(self._size or 1, self._drop_last)):
            self._shared.epoch = found.epoch
        self._generation, self._seen = self._shared.loaded(), self._shared.begun

    def _resume_worker(self, run: WorkerRun) -> None:
        """In a worker: go on from that worker's own state."""
        Progress.going_on([run.begun], self._whole(), in_step=True)
        here = (*worker_here(), *self.rank)
        if (run.worker, run.workers, run.begun.rank, run.begun.ranks) != here:
            raise InvalidArgument(
                f"the state is of worker {run.worker} of {run.workers} of rank {run.begun.rank} of {run.begun.ranks}, and this is worker "
                f"{here[0]} of {here[1]} of rank {here[2]} of {here[3]}: where their number changes, give the DataLoader's state to "
                "dataset.load_state_dict instead",
                field="state_dict",
                value=run.worker,
            )
        block = self._size or 1
        if run.block != block and run.workers > 1:
            # They would take other turns: what this one has taken is no part of what it would take.
            raise InvalidArgument(
                f"the state is of workers that take turns by {run.block} samples, and these do by {block}: where batch_size changes, give the "
                "DataLoader's state to dataset.load_state_dict instead",
                field="state_dict",
                value=run.block,
            )
        self._resumed = self._run = None
        mine = requests(run.begun.remaining(block, self._drop_last), block, run.worker, run.workers, run.taken)
        if self._is_set and run.begun.epoch != self.epoch and next(mine, None) is None:
            return
        self._resumed = run.begun, run.taken
        self._shared.epoch = run.begun.epoch

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handed": handed(self.rank) or self._handed, "_run": None}


def _failing(error: InvalidArgument) -> Iterator[Any]:
    yield from ()
    raise error
