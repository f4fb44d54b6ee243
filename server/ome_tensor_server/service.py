"""The methods of ``TensorService`` as plain functions over a catalogue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ome_tensor.errors import DatasetChanged, DatasetNotFound, InvalidArgument, LimitExceeded, Overloaded, Rebalance, Unavailable
from ome_tensor.keys import parse_key
from ome_tensor.plan import Plan, ResolvedPlan
from ome_tensor.tables import Image
from ome_tensor.tiling import Order, TileSequence, Tiling
from ome_tensor.view import TensorView, view_of_record
from ome_tensor_proto.codec import (
    check_built,
    compression_from_proto,
    mode_from_proto,
    order_from_proto,
    plan_from_proto,
    selection_to_proto,
    tiling_from_proto,
)
from ome_tensor_proto.host import host_proof, is_host_proof
from ome_tensor_proto.listing import dataset_to_proto, image_to_proto
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_proto.v1 import view_pb2

from .catalogue import Catalogue, Dataset
from .control import Control
from .policy import Action, Caller, Policy
from .rpc import Call, Handler
from .settings import Settings
from .stream import TileRead, check_tiles

__all__ = ["TensorService"]

_PAGE, _LARGEST_PAGE = 200, 1000

_LEAST_MESSAGE = 64 << 10

#: A read of at least so many bytes is long: it keeps a worker busy for some 10 ms, and its client waits longer for the pixels than for a
#: connection to another worker. Shorter ones come and go: how many there are at one moment says nothing about the next.
_LONG_READ = 8 << 20

#: Seconds that a call waits for its worker to open a catalogue that others may serve already; that takes milliseconds.
_PATIENCE = 10.0

#: Elements that no image has, but repeated indices can ask for; beyond, numbers stop fitting their fields.
_MOST_ELEMENTS = 2**56


class TensorService:
    """Answers calls from a catalogue.

    Args:
        settings: The limits.
        worker: Which of several workers this is.
        control: What they share, or ``None``.

    Attributes:
        is_draining: Whether new calls are refused.
    """

    def __init__(self, settings: Settings, *, worker: int = 0, control: Control | None = None) -> None:
        self.is_draining = False
        self._catalogue: Catalogue | None = None
        self._generation = 0
        self._served = threading.Condition()
        self._worker = worker
        self._control = control
        self._settings = settings
        self._policy = Policy(settings)
        self._reading = 0
        self._long_reads = 0
        self._lock = threading.Lock()

    @property
    def methods(self) -> Mapping[str, Handler]:
        """The functions by the contract's method names."""
        return {
            "ListDatasets": self.list_datasets,
            "GetDataset": self.get_dataset,
            "ListImages": self.list_images,
            "ResolveView": self.resolve_view,
            "ReadTiles": self.read_tiles,
            "MapDataset": self.map_dataset,
        }

    def serve(self, catalogue: Catalogue, generation: int, announce: Callable[[], None]) -> None:
        """Answer from this catalogue from now on.

        Args:
            catalogue: The datasets.
            generation: Its number in the shared control state.
            announce: Says that they are served: before anybody goes on who waits for it.
        """
        with self._served:
            self._catalogue = catalogue
            announce()
            self._generation = generation
            self._served.notify_all()

    def open(self) -> None:
        """The server takes calls now: tell the other workers."""
        with self._lock:
            self._report()

    def drain(self) -> None:
        """Refuse new calls from now on. A client that is refused connects anew; where other workers listen, to one of them."""
        with self._lock:
            self.is_draining = True
            self._report()
        with self._served:
            self._served.notify_all()

    def _report(self) -> None:
        if self._control is not None:
            self._control.report(self._worker, None if self.is_draining else self._long_reads)

    def catch_up(self) -> None:
        """Wait, a moment at most, until this worker serves what others may serve already.

        Once any worker serves a catalogue, all do: a client that saw it at one must not be told otherwise by the next.
        """
        control = self._control
        if control is not None and control.generation != self._generation:
            with self._served:
                self._served.wait_for(lambda: self._generation >= control.generation or self.is_draining, _PATIENCE)

    def _loaded(self) -> Catalogue:
        if self.is_draining:
            raise Unavailable("the server is shutting down; try again, or elsewhere")
        self.catch_up()
        catalogue = self._catalogue
        if catalogue is None:
            raise Unavailable("the server is still loading its datasets; try again shortly")
        return catalogue

    def _dataset(self, name: str, call: Call) -> Dataset:
        """A dataset that the caller may read: every way to one leads through here. What one may not read is not there."""
        catalogue = self._loaded()
        if not self._policy.permits(Caller(call.peer), Action.READ, name):
            raise DatasetNotFound(f"no dataset {name!r}", field="key", value=name)
        return catalogue.dataset(name)

    # -- listings ------------------------------------------------------------------------------------------------------------------

    def list_datasets(self, request: pb.ListDatasetsRequest, call: Call) -> pb.ListDatasetsResponse:
        """All datasets by name, in pages; a page token is the number of datasets before it."""
        caller = Caller(call.peer)
        datasets = [one for one in self._loaded().datasets.values() if self._policy.permits(caller, Action.READ, one.name)]
        first = _token(request.page_token, len(datasets)) if request.page_token else 0
        count = _page_size(request.page_size)
        return pb.ListDatasetsResponse(
            datasets=[dataset_to_proto(dataset.info) for dataset in datasets[first : first + count]],
            next_page_token=str(first + count) if first + count < len(datasets) else "",
        )

    def get_dataset(self, request: pb.GetDatasetRequest, call: Call) -> pb.GetDatasetResponse:
        """One dataset."""
        return pb.GetDatasetResponse(dataset=dataset_to_proto(self._dataset(request.name, call).info))

    def list_images(self, request: pb.ListImagesRequest, call: Call) -> pb.ListImagesResponse:
        """The images of a dataset, in pages; a page token is the version it was given for and the number of images before it."""
        dataset = self._dataset(request.dataset, call)
        if request.column and request.column not in dataset.columns:
            raise InvalidArgument(
                f"{request.column!r} is not an image column of dataset {dataset.name!r}; those are: {', '.join(dataset.columns)}",
                field="column",
                value=request.column,
            )
        total = dataset.columns[request.column].image_count if request.column else dataset.info.image_count
        version, _, number = request.page_token.rpartition(":")
        if request.page_token and version != dataset.version:
            raise DatasetChanged(
                f"dataset {dataset.name!r} is no longer the one this list of images began with",
                field="page_token",
                value=request.page_token,
            )
        first = _token(number, total) if request.page_token else 0
        count = _page_size(request.page_size)
        places = dataset.places(request.column or None, first, count)
        return pb.ListImagesResponse(
            images=[image_to_proto(dataset.describe(row, column)) for row, column in places],
            next_page_token=f"{dataset.version}:{first + count}" if first + count < total else "",
            total_count=total,
            dataset_version=dataset.version,
        )

    # -- views ---------------------------------------------------------------------------------------------------------------------

    def resolve_view(self, request: pb.ResolveViewRequest, call: Call) -> pb.ResolveViewResponse:
        """What a view is; no pixel is read."""
        image, view, resolved, arrow = self._view(request.key, request.view, call)
        tiling, order, _ = _cut(request)
        tiles = TileSequence(resolved.selection if arrow else resolved.shown, tiling, order)
        check_tiles(tiles, resolved.dtype, self._settings)
        if arrow:
            # Each tile must be one stored plane or chunk, so there are no more to look at than those.
            for tile in tiles:
                view.stored_values(tile.selection)
        return pb.ResolveViewResponse(
            dataset_version=image.dataset.version,
            key=image.key,
            image=image_to_proto(image.info),
            selection=selection_to_proto(resolved.selection),
            layout=resolved.layout,
            dtype=resolved.dtype.name,
            shape=resolved.shape if resolved.fits else (),
            strides=resolved.strides if resolved.fits else (),
            nbytes=resolved.nbytes,
            tile_count=len(tiles),
            total_tiles=tiles.total,
        )

    def read_tiles(self, request: pb.ReadTilesRequest, call: Call) -> Iterator[bytes]:
        """The tiles of a view, as message bytes."""
        check_built(request)
        with self._lock:
            if self._reading >= self._settings.max_concurrent_reads:
                raise Overloaded(
                    f"this server serves {self._settings.max_concurrent_reads} reads at once, and all are taken; try again later",
                    field="max_concurrent_reads",
                    value=self._settings.max_concurrent_reads,
                )
            self._reading += 1
        is_long = False
        try:
            read = self._read(request, call)
            is_long = self._place(read, call)
            yield from read.messages(call, self._settings)
        finally:
            with self._lock:
                self._reading -= 1
                if is_long:
                    self._long_reads -= 1
                    self._report()

    def map_dataset(self, request: pb.MapDatasetRequest, call: Call) -> pb.MapDatasetResponse:
        """Where a client on this host finds a dataset's file."""
        dataset = self._dataset(request.dataset, call)
        if not self._policy.permits(Caller(call.peer), Action.MAP, dataset.name):
            return pb.MapDatasetResponse(refusal=pb.MAP_REFUSAL_NOT_ALLOWED)
        if not is_host_proof("client", request.nonce, request.host_proof):
            return pb.MapDatasetResponse(refusal=pb.MAP_REFUSAL_OTHER_HOST)
        file = dataset.file
        # Another file at that path is not what this server serves: the dataset is just being replaced.
        if file is None or not file.is_there:
            return pb.MapDatasetResponse(refusal=pb.MAP_REFUSAL_NO_FILE)
        return pb.MapDatasetResponse(
            dataset_version=dataset.version,
            path=str(file.path),
            inode=file.inode,
            size=file.size,
            modified_ns=file.modified_ns,
            host_proof=host_proof("server", request.nonce),
        )

    def _place(self, read: TileRead, call: Call) -> bool:
        """Whether a read is long; then it is counted, unless its client can go to another worker that has clearly less to do.

        The kernel spreads connections over workers by a hash of their addresses: of four clients on two workers all four land on one in an eighth
        of all cases, and only three in eight are spread evenly (``python -m benchmarks.spread``). A client that says it can connect anew is asked
        to where that makes the load more even, and not just other.

        Raises:
            Rebalance: the client is to connect anew.
        """
        if self._control is None or read.nbytes < _LONG_READ:
            return False
        with self._lock:
            others = [reads for worker, reads in enumerate(self._control.reads()) if worker != self._worker and reads is not None]
            least = min(others, default=self._long_reads)
            if self._long_reads > least and call.may_move:
                raise Rebalance(f"worker {self._worker} serves {self._long_reads} long reads, another one {least}")
            self._long_reads += 1
            self._report()
        return True

    @property
    def free_reads(self) -> int:
        """Reads that could be taken on now."""
        with self._lock:
            return self._settings.max_concurrent_reads - self._reading

    def _read(self, request: pb.ReadTilesRequest, call: Call) -> TileRead:
        image, view, resolved, arrow = self._view(request.keys[0], request.view, call, request.if_version)
        tiling, order, start_slab = _cut(request)
        aim = min(self._settings.batch_bytes, self._settings.max_message_bytes)
        # A hint: not so small that a view becomes millions of messages, not so large that a few clients fill the memory.
        least = min(aim, _LEAST_MESSAGE)
        message_bytes = (
            max(least, min(request.max_message_bytes, self._settings.max_message_bytes)) if request.max_message_bytes else aim
        )
        compression = compression_from_proto(request.compression)
        return TileRead(
            image, view, resolved, tiling, order, arrow, start_slab, request.tiles_per_batch, message_bytes, compression
        )

    def _view(
        self, key: str, message: view_pb2.View, call: Call, version: str = ""
    ) -> tuple[Image, TensorView, ResolvedPlan, bool]:
        """The image, the view, what it shows (in the stored dtype where flat values are wanted) and whether flat values are wanted.

        Args:
            version: What the dataset must be; empty for any. Looked at before anything else: of another version every other complaint would mislead.
        """
        call.image = key
        self._loaded()  # Before the request is looked at: while there is nothing to serve, nothing else is worth saying.
        parsed = parse_key(key)
        dataset = self._dataset(parsed.dataset, call)
        if version and version != dataset.version:
            raise DatasetChanged(
                f"dataset {dataset.name!r} is now version {dataset.version}, not {version}: going on would mix pixels of two versions",
                field="if_version",
                value=version,
            )
        dataset.check_unchanged()
        image = dataset.image(parsed.column, parsed.row)
        call.image = image.key
        self._check_indices(message)
        plan: Plan = plan_from_proto(message)
        view = view_of_record(image.pixels, plan)
        resolved = view.resolved
        if resolved.selection.size > _MOST_ELEMENTS:
            raise LimitExceeded(
                f"the view has {resolved.selection.size} elements; this server takes at most {_MOST_ELEMENTS}",
                field="view",
                value=resolved.shown.shape,
            )
        arrow = mode_from_proto(message) == "arrow"
        if arrow:
            stored = image.pixels.index.stored_dtype
            resolved = ResolvedPlan(resolved.selection, resolved.layout, stored or np.dtype(np.uint16), resolved.channel_policy)
        return image, view, resolved, arrow

    def _check_indices(self, view: view_pb2.View) -> None:
        """Before a list is even turned into a tuple."""
        for axis in "tzc":
            count = len(getattr(view, axis).list.values)
            if count > self._settings.max_indices:
                raise LimitExceeded(
                    f"{axis} lists {count} indices; this server takes at most {self._settings.max_indices} (a slice is not counted)",
                    field=f"view.{axis}",
                    value=count,
                )


_WHOLE, _IN_ORDER = Tiling(), Order()


def _cut(request: pb.ReadTilesRequest | pb.ResolveViewRequest) -> tuple[Tiling, Order, int]:
    """How the view is cut, in which order, and at which slab to begin."""
    order = request.order
    return (
        tiling_from_proto(request.tiling) if request.HasField("tiling") else _WHOLE,
        order_from_proto(order) if request.HasField("order") else _IN_ORDER,
        order.start_slab,
    )


def _page_size(asked: int) -> int:
    return min(asked, _LARGEST_PAGE) or _PAGE


def _token(token: str, total: int) -> int:
    """How many entries come before a page; raises InvalidArgument for a token that this server did not give."""
    if not (token.isascii() and token.isdecimal() and len(token) <= 18 and int(token) <= total):
        raise InvalidArgument(f"page_token {token!r} is not one this server gave", field="page_token", value=token)
    return int(token)
