"""The methods of ``TensorService`` as plain functions over a catalogue."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial

import numpy as np

from ome_tensor.errors import (
    DatasetChanged,
    DatasetNotFound,
    InvalidArgument,
    InvalidRecord,
    LimitExceeded,
    NotSupported,
    Rebalance,
    Unavailable,
)
from ome_tensor.keys import format_key, parse_key
from ome_tensor.listing import DatasetInfo, DatasetState
from ome_tensor.plan import Plan, ResolvedPlan
from ome_tensor.tables import Image
from ome_tensor.tiling import Order, TileSequence, Tiling
from ome_tensor.view import TensorView, view_of_image
from ome_tensor_proto.codec import (
    check_images_named,
    compression_from_proto,
    mode_from_proto,
    order_from_proto,
    plan_from_proto,
    selection_to_proto,
    tiling_from_proto,
    wants_checksum,
)
from ome_tensor_proto.host import host_proof, is_host_proof
from ome_tensor_proto.listing import dataset_to_proto, image_to_proto
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_proto.v1 import view_pb2

from .calls import Call
from .catalogue import Catalogue, Dataset
from .control import Control
from .entries import Entry
from .limits import Reads
from .offices import Office
from .policy import Policy
from .reads import ReadImages, images_of_keys, images_of_rows
from .rpc import Handler
from .scopes import Action
from .selecting import check_version, passing_rows, select
from .settings import Settings
from .stream import TileRead, check_tiles
from .turns import Turns
from .usage import Usage

__all__ = ["TensorService"]

_PAGE, _LARGEST_PAGE = 200, 1000

_LEAST_MESSAGE = 64 << 10

#: Datasets that are named to whoever asks for one that is not there.
_NAMED = 10

#: A read of at least so many bytes is long: it keeps a worker busy for some 10 ms, and its client waits longer for the pixels than for a
#: connection to another worker. Shorter ones come and go: how many there are at one moment says nothing about the next.
_LONG_READ = 8 << 20

#: Seconds that a call waits for its worker to open a catalogue that others may serve already; that takes milliseconds.
_PATIENCE = 10.0

#: Calls that wait for datasets to be loaded at one time: each holds a thread, and reads of other datasets want theirs.
_WAITERS = 8

#: Elements that no image has, but repeated indices can ask for; beyond, numbers stop fitting their fields.
_MOST_ELEMENTS = 2**56


class TensorService:
    """Answers calls from a catalogue.

    Args:
        settings: The limits.
        worker: Which of several workers this is.
        control: What they share, or ``None``.
        usage: Where the use of datasets is counted.
        report: Told whenever a read begins or ends.

    Attributes:
        is_draining: Whether new calls are refused.
        policy: Who may do what.
        reads: The reads in progress.
        turns: Whose message is made next.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        worker: int = 0,
        control: Control | None = None,
        usage: Usage | None = None,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        self._report_read = report
        self.is_draining = False
        self.policy = Policy(settings)
        self._usage = usage or Usage()
        self._office: Office | None = None
        self._waiters = threading.BoundedSemaphore(_WAITERS)
        self._catalogue: Catalogue | None = None
        self._generation = 0
        self._served = threading.Condition()
        self._worker = worker
        self._control = control
        self._settings = settings
        self._long_reads = 0
        self.reads = Reads(settings)
        self.turns = Turns(max(2, min(8, os.cpu_count() or 1)), settings.max_bytes_in_flight, settings.caller_bytes_in_flight)
        self._lock = threading.Lock()

    @property
    def methods(self) -> Mapping[str, Handler]:
        """The functions by the contract's method names."""
        return {
            "ListDatasets": self.list_datasets,
            "GetDataset": self.get_dataset,
            "ListImages": self.list_images,
            "SelectImages": self.select_images,
            "ResolveView": self.resolve_view,
            "ReadTiles": self.read_tiles,
            "MapDataset": self.map_dataset,
        }

    def serve(self, catalogue: Catalogue, generation: int, announce: Callable[[], None], office: Office | None = None) -> None:
        """Answer from this catalogue from now on.

        Args:
            catalogue: The datasets.
            generation: Its number in the shared control state.
            announce: Says that they are served: before anybody goes on who waits for it.
            office: What loads datasets that are not loaded.
        """
        with self._served:
            self._catalogue = catalogue
            self._office = office or self._office
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

    @property
    def is_serving(self) -> bool:
        """Whether calls about data are answered now."""
        return self._catalogue is not None and not self.is_draining

    @property
    def catalogue(self) -> Catalogue:
        """What is served; nothing before there is anything."""
        return self._catalogue or Catalogue()

    @property
    def office(self) -> Office:
        """What changes datasets. Raises Unavailable while nothing is served yet."""
        self._loaded()
        if self._office is None:
            raise NotSupported("this server's datasets cannot be changed", field="admin")
        return self._office

    def info(self, name: str) -> DatasetInfo:
        """What is said of a dataset, loaded or not. Raises DatasetNotFound."""
        return self._loaded().info(name, self._usage)

    def _visible(self, name: str, call: Call) -> Catalogue:
        """The catalogue, where the caller may read that dataset in it: every way to one leads through here. What one may not read is not there."""
        catalogue = self._loaded()
        if name in catalogue and self.policy.permits(call.caller, Action.READ, name):
            return catalogue
        readable = self._readable(catalogue, call)
        some = ", ".join(readable[:_NAMED]) or "none"
        more = f" and {len(readable) - _NAMED} more" if len(readable) > _NAMED else ""
        raise DatasetNotFound(f"no dataset {name!r}; there are: {some}{more}", field="key", value=name)

    def _readable(self, catalogue: Catalogue, call: Call) -> list[str]:
        return [name for name in catalogue.names if self.policy.permits(call.caller, Action.READ, name)]

    def _dataset(self, name: str, call: Call) -> Dataset:
        """A dataset that the caller may read: loaded first, if it is not, and in use until the call is through."""
        while True:
            catalogue = self._visible(name, call)
            entry = catalogue.entry(name)
            if entry.is_ready:
                self._usage.begin(entry.slot)
                # From here on it does not leave, unless it just has.
                if self._catalogue is catalogue or self._is_served(entry):
                    call.at_end(partial(self._usage.end, entry.slot))
                    try:
                        return catalogue.dataset(name)
                    except OSError as error:
                        raise InvalidRecord(
                            f"dataset {name!r} cannot be opened: {error.strerror or error}", field="key", value=name
                        ) from None
                self._usage.end(entry.slot)
                continue
            self._wait_for(name, call)

    def _is_served(self, entry: Entry) -> bool:
        try:
            return self._loaded().entry(entry.name) == entry
        except DatasetNotFound:
            return False

    def _wait_for(self, name: str, call: Call) -> None:
        """Have a dataset loaded, for as long as this call may wait. Only so many calls wait: other datasets are read meanwhile."""
        office = self._office
        if office is None:
            raise Unavailable(f"dataset {name!r} is not loaded", field="loading", value="0")
        waits = self._waiters.acquire(blocking=False)
        try:
            # The client is to hear of it before it gives up.
            office.load(name, min(self._settings.load_seconds, 0.7 * call.time_remaining) if waits else 0.0)
        finally:
            if waits:
                self._waiters.release()

    # -- listings ------------------------------------------------------------------------------------------------------------------

    def list_datasets(self, request: pb.ListDatasetsRequest, call: Call) -> pb.ListDatasetsResponse:
        """All datasets by name, in pages; a page token is the number of datasets before it."""
        catalogue = self._loaded()
        datasets = self._readable(catalogue, call)
        first = _token(request.page_token, len(datasets)) if request.page_token else 0
        count = _page_size(request.page_size)
        return pb.ListDatasetsResponse(
            datasets=[dataset_to_proto(catalogue.info(name, self._usage)) for name in datasets[first : first + count]],
            next_page_token=str(first + count) if first + count < len(datasets) else "",
        )

    def get_dataset(self, request: pb.GetDatasetRequest, call: Call) -> pb.GetDatasetResponse:
        """One dataset."""
        return pb.GetDatasetResponse(dataset=dataset_to_proto(self._visible(request.name, call).info(request.name, self._usage)))

    def list_images(self, request: pb.ListImagesRequest, call: Call) -> pb.ListImagesResponse:
        """The images of a dataset, in pages; a page token is the version it was given for and the number of images before it."""
        dataset = self._dataset(request.dataset, call)
        if request.column and request.column not in dataset.columns:
            raise InvalidArgument(
                f"{request.column!r} is not an image column of dataset {dataset.name!r}; those are: {', '.join(dataset.columns)}",
                field="column",
                value=request.column,
            )
        chosen = passing_rows(dataset, request.filter) if request.HasField("filter") else None
        version, _, number = request.page_token.rpartition(":")
        if request.page_token and version != dataset.version:
            raise DatasetChanged(
                f"dataset {dataset.name!r} is no longer the one this list of images began with",
                field="page_token",
                value=request.page_token,
            )
        first = _token(number, dataset.info.image_count) if request.page_token else 0
        count = _page_size(request.page_size)
        places, total = dataset.places(request.column or None, first, count, chosen)
        return pb.ListImagesResponse(
            images=[image_to_proto(dataset.describe(row, column)) for row, column in places],
            next_page_token=f"{dataset.version}:{first + count}" if first + count < total else "",
            total_count=total,
            dataset_version=dataset.version,
        )

    def select_images(self, request: pb.SelectImagesRequest, call: Call) -> Iterator[pb.SelectImagesResponse]:
        """Rows of a table, and what is said of their images."""
        call.image = request.dataset
        yield from select(request, self._dataset(request.dataset, call))

    # -- views ---------------------------------------------------------------------------------------------------------------------

    def resolve_view(self, request: pb.ResolveViewRequest, call: Call) -> pb.ResolveViewResponse:
        """What a view is; no pixel is read."""
        image, view, resolved, arrow = self._view(request.key, request.view, call, request.pyramid_level)
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
        check_images_named(request)
        with ExitStack() as after:
            # Of a read that fails or is given up as well, once it has left its place.
            after.callback(self._report_read)
            after.enter_context(self.reads.one(call.caller.key))
            is_long = False
            self._report_read()
            try:
                read = self._read(request, call)
                is_long = self._place(read, call)
                # What is served in place is read by other processes, however long their disks take.
                turn = self.turns.stream(call.caller.key, works=read.images.dataset.info.state is not DatasetState.IN_PLACE)
                with closing(turn):
                    yield from read.messages(call, self._settings, turn)
            finally:
                if is_long:
                    with self._lock:
                        self._long_reads -= 1
                        self._report()

    def map_dataset(self, request: pb.MapDatasetRequest, call: Call) -> pb.MapDatasetResponse:
        """Where a client on this host finds a dataset's file."""
        dataset = self._dataset(request.dataset, call)
        if not self.policy.permits(call.caller, Action.MAP, dataset.name):
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
        return self.reads.free

    def _read(self, request: pb.ReadTilesRequest, call: Call) -> TileRead:
        images = self._images(request, call)
        tiling, order, start_slab = _cut(request)
        aim = min(self._settings.batch_bytes, self._settings.max_message_bytes)
        # A hint: not so small that a view becomes millions of messages, not so large that a few clients fill the memory.
        least = min(aim, _LEAST_MESSAGE)
        message_bytes = (
            max(least, min(request.max_message_bytes, self._settings.max_message_bytes)) if request.max_message_bytes else aim
        )
        compression = compression_from_proto(request.compression)
        checksum = wants_checksum(request)
        return TileRead(images, tiling, order, start_slab, request.tiles_per_batch, message_bytes, compression, checksum)

    def _images(self, request: pb.ReadTilesRequest, call: Call) -> ReadImages:
        """The images of a read, all of one dataset, their views resolved."""
        self._loaded()  # Before the request is looked at: while there is nothing to serve, nothing else is worth saying.
        listed = request.image_rows if request.HasField("image_rows") else None
        keys = []
        if listed is not None:
            name = listed.dataset
            call.image = format_key(name, listed.column or None, None)
        else:
            call.image = request.keys[0]
            keys = [parse_key(key) for key in request.keys]
            name = keys[0].dataset
            other = next((key for key, parsed in zip(request.keys, keys, strict=True) if parsed.dataset != name), None)
            if other is not None:
                raise InvalidArgument(
                    f"the images of one read are of one dataset: {name!r}, not {other!r}", field="keys", value=other
                )
        dataset = self._dataset(name, call)
        # Before anything else: of another version every other complaint would mislead.
        check_version(dataset, request.if_version)
        dataset.check_unchanged()
        if listed is not None:
            rows = np.fromiter(listed.rows, np.uint64, len(listed.rows))
            # What is no row of any table must stay none.
            rows = np.minimum(rows, np.uint64(2**62)).astype(np.int64)
            places = images_of_rows(dataset, listed.column, rows, request.pyramid_level, self._settings.max_tiles)
        else:
            if len(keys) > self._settings.max_indices:
                raise LimitExceeded(
                    f"the request lists {len(keys)} keys; this server takes at most {self._settings.max_indices} (image_rows may be more)",
                    field="keys",
                    value=len(keys),
                )
            places = images_of_keys(dataset, keys, request.pyramid_level)
        self._check_indices(request.view)
        plan: Plan = plan_from_proto(request.view)
        images = ReadImages(dataset, places, plan, mode_from_proto(request.view) == "arrow", request.beside)
        call.image = images.key(0) if len(images) == 1 else call.image
        for view in images.views:
            _check_elements(view)
        return images

    def _view(self, key: str, message: view_pb2.View, call: Call, level: int = 0) -> tuple[Image, TensorView, ResolvedPlan, bool]:
        """The image, the view, what it shows (in the stored dtype where flat values are wanted) and whether flat values are wanted.

        Args:
            key: The image.
            message: The view.
            call: Who asks.
            level: Of the image's pyramid.
        """
        call.image = key
        self._loaded()  # Before the request is looked at: while there is nothing to serve, nothing else is worth saying.
        parsed = parse_key(key)
        dataset = self._dataset(parsed.dataset, call)
        dataset.check_unchanged()
        image = dataset.image(parsed.column, parsed.row, level)
        call.image = image.key
        self._check_indices(message)
        plan: Plan = plan_from_proto(message)
        view = view_of_image(image.pixels, plan)
        resolved = view.resolved
        _check_elements(resolved)
        arrow = mode_from_proto(message) == "arrow"
        if arrow:
            stored = image.pixels.stored_dtype
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


def _check_elements(resolved: ResolvedPlan) -> None:
    if resolved.selection.size > _MOST_ELEMENTS:
        raise LimitExceeded(
            f"the view has {resolved.selection.size} elements; this server takes at most {_MOST_ELEMENTS}",
            field="view",
            value=resolved.shown.shape,
        )


def _page_size(asked: int) -> int:
    return min(asked, _LARGEST_PAGE) or _PAGE


def _token(token: str, total: int) -> int:
    """How many entries come before a page; raises InvalidArgument for a token that this server did not give."""
    if not (token.isascii() and token.isdecimal() and len(token) <= 18 and int(token) <= total):
        raise InvalidArgument(f"page_token {token!r} is not one this server gave", field="page_token", value=token)
    return int(token)
