"""The methods of ``AdminService`` as plain functions: the life of datasets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ome_tensor.errors import BrokenStream, Cancelled, InvalidArgument, NotAllowed, NotSupported, Overloaded, Unavailable
from ome_tensor.listing import DatasetInfo
from ome_tensor_proto.checksums import UploadChecksum
from ome_tensor_proto.listing import dataset_to_proto
from ome_tensor_proto.methods import ADMIN_METHODS
from ome_tensor_proto.v1 import admin_service_pb2 as pb
from ome_tensor_proto.v1 import image_pb2

from .calls import Call
from .limits import RETRY_AFTER
from .loads import kept_problems
from .meters import MetricsPage
from .offices import Office
from .policy import Policy
from .rpc import Handler
from .scopes import Action
from .uploads import Uploads

__all__ = ["MOST_CALLS", "AdminService"]

#: Calls of each method at one time. Each holds a thread, some for as long as a client sends or a dataset loads: never those that are meant for reads.
_AT_ONCE = 16

#: Calls that can run at one time.
MOST_CALLS = _AT_ONCE * len(ADMIN_METHODS)

#: Seconds between two words on how a load goes.
_WORD = 0.25


class AdminService:
    """Answers calls that change what is served.

    Args:
        policy: Who may.
        office: Gives what does it.
        info: What is said of a dataset, by name.
        uploads: Where uploads are received, or ``None``.
        page: What the server has counted.
    """

    def __init__(
        self,
        policy: Policy,
        office: Callable[[], Office],
        info: Callable[[str], DatasetInfo],
        uploads: Uploads | None,
        page: MetricsPage,
    ) -> None:
        self._page = page
        self._policy = policy
        self._office = office
        self._info = info
        self._uploads = uploads

    @property
    def methods(self) -> Mapping[str, Handler]:
        """The functions by the contract's method names."""
        methods: dict[str, Handler] = {
            "RegisterDataset": self.register,
            "UploadDataset": self.upload,
            "RefreshDataset": self.refresh,
            "RemoveDataset": self.remove,
            "LoadDataset": self.load,
            "CancelLoad": self.cancel,
            "GetMetrics": self.metrics,
        }
        return {name: _limited(name, handler) for name, handler in methods.items()}

    def _permit(self, call: Call, action: Action, dataset: str) -> Office:
        """What changes a dataset, where the caller may change one of that name; without a name, of any."""
        call.image = dataset or None
        policy = self._policy
        if not (policy.permits(call.caller, action, dataset) if dataset else policy.permits_every(call.caller, action)):
            raise _not_allowed()
        return self._office()

    def _dataset(self, name: str) -> image_pb2.Dataset:
        return dataset_to_proto(self._info(name))

    def register(self, request: pb.RegisterDatasetRequest, call: Call) -> pb.RegisterDatasetResponse:
        """Serve a source."""
        office = self._permit(call, Action.ADMIN, request.name)
        names = office.register(request.path, request.name)
        for name in names:
            call.audit("register", "done", name)
        return pb.RegisterDatasetResponse(datasets=[self._dataset(name) for name in names])

    def refresh(self, request: pb.RefreshDatasetRequest, call: Call) -> pb.RefreshDatasetResponse:
        """Look at a source again."""
        changed = self._permit(call, Action.WRITE, request.name).refresh(request.name)
        call.audit("refresh", "changed" if changed else "unchanged")
        return pb.RefreshDatasetResponse(dataset=self._dataset(request.name), changed=changed)

    def remove(self, request: pb.RemoveDatasetRequest, call: Call) -> pb.RemoveDatasetResponse:
        """Serve a dataset no more."""
        self._permit(call, Action.WRITE, request.name).remove(request.name)
        call.audit("remove", "done")
        return pb.RemoveDatasetResponse()

    def load(self, request: pb.LoadDatasetRequest, call: Call) -> Iterator[pb.LoadDatasetResponse]:
        """Load a dataset, and say how it goes."""
        office = self._permit(call, Action.WRITE, request.name)
        while call.is_active:
            try:
                office.load(request.name, _WORD)
            except Unavailable as error:
                if error.field != "loading":
                    raise
                yield pb.LoadDatasetResponse(dataset=self._dataset(request.name))
            else:
                yield pb.LoadDatasetResponse(dataset=self._dataset(request.name))
                return

    def cancel(self, request: pb.CancelLoadRequest, call: Call) -> pb.CancelLoadResponse:
        """Give up a load."""
        return pb.CancelLoadResponse(cancelled=self._permit(call, Action.WRITE, request.name).cancel(request.name))

    def upload(self, requests: Iterator[pb.UploadDatasetRequest], call: Call) -> pb.UploadDatasetResponse:
        """Take in a dataset."""
        # Before anything is waited for: whoever may not change anything takes nobody's place.
        if not self._policy.permits_some(call.caller, Action.WRITE):
            raise _not_allowed()
        self._office()
        first = next(requests, None)
        if first is None or not first.HasField("header"):
            raise InvalidArgument("an upload's first message must have a header", field="header")
        header = first.header
        office = self._permit(call, Action.WRITE, header.name)
        office.check_upload(header.name, header.replace)
        if self._uploads is None:
            raise NotSupported("this server takes no uploads (it was started without an uploads folder)", field="uploads")
        with kept_problems(header.name):
            part = self._uploads.receive(header, _payloads(header.name, first, requests), is_active=lambda: call.is_active)
        try:
            office.check_part(str(part))
            # Checking takes a while, and that a client has gone is at times heard only after the end of its stream.
            if not call.is_active:
                raise Cancelled("the client has gone", field="header.name", value=header.name)
            call.check_access()
            office.take_upload(str(part), header.name, header.replace)
            call.audit("upload", "done")
        finally:
            # Where it was taken it has another name by now.
            part.unlink(missing_ok=True)
        return pb.UploadDatasetResponse(dataset=self._dataset(header.name))

    def metrics(self, request: pb.GetMetricsRequest, call: Call) -> pb.GetMetricsResponse:
        """What the server has counted, over all callers."""
        if not self._policy.permits_some(call.caller, Action.ADMIN):
            raise NotAllowed(
                "this server does not let you see what it counts (that wants an admin scope, or its setting admin)", field="admin"
            )
        return pb.GetMetricsResponse(
            samples=[pb.Sample(name=name, labels=labels, value=value) for name, labels, value in self._page.samples()]
        )


def _not_allowed() -> NotAllowed:
    return NotAllowed("this server does not let you change what it serves (your scopes, or its setting admin)", field="admin")


def _limited(name: str, handler: Handler) -> Handler:
    """A handler that answers so many calls at one time; one more is refused at once with Overloaded."""
    places = threading.BoundedSemaphore(_AT_ONCE)

    def answer(request: Any, call: Call) -> Any:
        if not places.acquire(blocking=False):
            raise Overloaded(
                f"this server answers {_AT_ONCE} calls of {name} at once, and all are taken; try again later",
                field=name,
                value=_AT_ONCE,
                retry_after=RETRY_AFTER,
            )
        call.at_end(places.release)
        return handler(request, call)

    return answer


def _payloads(name: str, first: pb.UploadDatasetRequest, rest: Iterator[pb.UploadDatasetRequest]) -> Iterator[bytes]:
    """The parts of an upload; raises BrokenStream where they are not what was sent."""
    checksum = UploadChecksum(name)
    message = first
    while True:
        checksum.update(message.payload)
        yield message.payload
        if message.xxh3 and message.xxh3 != checksum.number:
            raise BrokenStream(
                "the upload did not arrive as it was sent (its checksum differs)", field="xxh3", value=message.xxh3
            )
        following = next(rest, None)
        if following is None:
            if first.header.checked and not message.xxh3:
                # A flipped bit can hide the checksum, or all of its message.
                raise BrokenStream("the upload did not arrive as it was sent (its checksum is missing)", field="xxh3", value=0)
            return
        if following.HasField("header"):
            raise InvalidArgument("only an upload's first message may have a header", field="header")
        message = following
