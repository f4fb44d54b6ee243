"""Changing what a server serves: for its operators, as far as the server lets them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from ome_tensor.errors import BrokenStream
from ome_tensor.keys import check_name
from ome_tensor.listing import DatasetInfo
from ome_tensor_proto.listing import dataset_from_proto
from ome_tensor_proto.v1 import admin_service_pb2 as pb

from .counts import Counts, Sample

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["Admin"]

#: Seconds that a change may take which reads a dataset: one that is loaded is replaced only once the new version is loaded too.
_LONG = 24 * 3600.0


class Admin:
    """The life of a server's datasets.

    All methods raise NotAllowed where the server's policy does not let this caller, and DatasetNotFound.

    Args:
        connection: The server.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def register(self, path: str, name: str = "") -> list[DatasetInfo]:
        """Have a file, a folder or an address served from now on; what is served then.

        Args:
            path: As the server sees it, below one of its roots.
            name: Name for the dataset; by default its file's, without the endings of its format.

        Raises:
            InvalidArgument: the path is outside all roots or no source, or the name is taken.
            InvalidRecord: it holds no images that can be read.
        """
        request = pb.RegisterDatasetRequest(path=check_name(path, "path", "path"), name=name)
        answer = self._connection.call("RegisterDataset", request, pb.RegisterDatasetResponse, timeout=_LONG)
        return [dataset_from_proto(dataset) for dataset in answer.datasets]

    def refresh(self, name: str) -> tuple[DatasetInfo, bool]:
        """Have the server look at a dataset's source again; the dataset, and whether it has changed."""
        request = pb.RefreshDatasetRequest(name=check_name(name, "name", "dataset name"))
        answer = self._connection.call("RefreshDataset", request, pb.RefreshDatasetResponse, timeout=_LONG)
        return dataset_from_proto(answer.dataset), answer.changed

    def remove(self, name: str) -> None:
        """Have a dataset served no more. Its source stays; an upload is deleted."""
        request = pb.RemoveDatasetRequest(name=check_name(name, "name", "dataset name"))
        self._connection.call("RemoveDataset", request, pb.RemoveDatasetResponse)

    def load(self, name: str, progress: Callable[[DatasetInfo], None] = lambda _: None) -> DatasetInfo:
        """Have a dataset loaded now; returns when it is.

        Args:
            name: Its name.
            progress: Told how it goes, a few times a second.

        Raises:
            Cancelled, Overloaded, InvalidRecord, LimitExceeded: why it could not be loaded.
        """
        request = pb.LoadDatasetRequest(name=check_name(name, "name", "dataset name"))
        info: DatasetInfo | None = None
        for message in self._connection.watch("LoadDataset", request):
            try:
                info = dataset_from_proto(pb.LoadDatasetResponse.FromString(message).dataset)
            except DecodeError:
                raise BrokenStream("the answer to LoadDataset is not a valid message") from None
            progress(info)
        if info is None:
            raise BrokenStream("the server said nothing of the load")
        return info

    def cancel_load(self, name: str) -> bool:
        """Have the server give up loading a dataset; whether it was loading it."""
        request = pb.CancelLoadRequest(name=check_name(name, "name", "dataset name"))
        return self._connection.call("CancelLoad", request, pb.CancelLoadResponse).cancelled

    def metrics(self) -> Counts:
        """What the server has counted since it started, all its workers together: what its metrics page says."""
        answer = self._connection.call("GetMetrics", pb.GetMetricsRequest(), pb.GetMetricsResponse)
        samples = [Sample(sample.name, dict(sample.labels), sample.value) for sample in answer.samples]
        return Counts(samples, time.monotonic())
