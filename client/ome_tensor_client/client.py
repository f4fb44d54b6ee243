"""The client: a server's datasets and images, and lazy views of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from ome_tensor.errors import InvalidArgument
from ome_tensor.keys import check_name, parse_key
from ome_tensor.lazy import LazyTensorView
from ome_tensor.listing import DatasetInfo, ImageInfo
from ome_tensor.plan import PLAN_ARGUMENTS
from ome_tensor_proto.filters import filters_to_proto
from ome_tensor_proto.listing import dataset_from_proto, image_from_proto
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .admin import Admin
from .connection import Connection
from .dataset import RemoteDataset, checked_level, read_selection
from .mapping import Transport
from .options import Options
from .remote import RemoteSource
from .upload import upload

__all__ = ["Client", "connect"]


class Client:
    """A server, as its user sees it. Connects when first used; a context manager; pickles as its target and options, and may be used in a
    forked child: each process opens a connection of its own.

    Args:
        connection: The server.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def target(self) -> str:
        """``HOST:PORT`` of the server; of several, with commas between them."""
        return self._connection.target

    @property
    def targets(self) -> tuple[str, ...]:
        """``HOST:PORT`` of each server."""
        return self._connection.replicas.targets

    @property
    def options(self) -> Options:
        """How this client talks."""
        return self._connection.options

    @property
    def transport(self) -> str:
        """How pixels come: ``mapped``, ``tcp``, or ``mixed`` where that differs from dataset to dataset; ``undecided`` before any was used."""
        kinds = {transport.kind for transport in self.transports.values()}
        if self.options.transport == "tcp":
            return "tcp"
        return "undecided" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def transports(self) -> dict[str, Transport]:
        """How the pixels of each dataset used so far come, and why they are not mapped where they are not."""
        return self._connection.mapped.transports

    def datasets(self) -> list[DatasetInfo]:
        """All datasets, by name."""
        found: list[DatasetInfo] = []
        token = ""
        while True:
            answer = self._connection.call("ListDatasets", pb.ListDatasetsRequest(page_token=token), pb.ListDatasetsResponse)
            found += map(dataset_from_proto, answer.datasets)
            token = answer.next_page_token
            if not token:
                return found

    def dataset(self, name: str) -> RemoteDataset:
        """One dataset: its columns and rows, and its images to select from. Raises DatasetNotFound; InvalidArgument where the name is not text."""
        check_name(name, "name", "dataset name")
        answer = self._connection.call("GetDataset", pb.GetDatasetRequest(name=name), pb.GetDatasetResponse)
        return RemoteDataset(self, dataset_from_proto(answer.dataset))

    def select(self, request: pb.SelectImagesRequest) -> tuple[pa.Table, str]:
        """Rows of a table, and the version of its dataset: what :class:`RemoteDataset` asks with.

        Args:
            request: Which rows, and what of them.

        Raises:
            DatasetNotFound, ImageNotFound, InvalidArgument.
        """
        return read_selection(iter(self._connection.gather("SelectImages", request)))

    def images(self, dataset: str, column: str | None = None, *, filters: Any = None, page_size: int = 0) -> Iterator[ImageInfo]:
        """The images of a dataset, by row and then by column, fetched page by page while iterating.

        Args:
            dataset: Its name.
            column: Only images of this column.
            filters: Only images of rows that pass, as :meth:`RemoteDataset.images`.
            page_size: Images a page; 0 for the server's choice.

        Raises:
            DatasetNotFound: at the call.
            InvalidArgument: a name that is not text, or a page size that is not a number.
        """
        check_name(dataset, "dataset", "dataset name")
        if column is not None:
            check_name(column, "column", "column name")
        if isinstance(page_size, bool) or not isinstance(page_size, int) or not 0 <= page_size < 2**32:
            raise InvalidArgument(f"page_size must be a number from 0: {page_size!r}", field="page_size", value=page_size)
        request = pb.ListImagesRequest(dataset=dataset, column=column or "", page_size=page_size)
        if filters is not None:
            request.filter.CopyFrom(filters_to_proto(filters))
        return self._pages(request, self._page(request))

    def _page(self, request: pb.ListImagesRequest) -> pb.ListImagesResponse:
        return self._connection.call("ListImages", request, pb.ListImagesResponse)

    def _pages(self, request: pb.ListImagesRequest, page: pb.ListImagesResponse) -> Iterator[ImageInfo]:
        while True:
            yield from map(image_from_proto, page.images)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
            page = self._page(request)

    def image(self, key: str, *, level: int = 0) -> ImageInfo:
        """One image's metadata.

        Args:
            key: ``dataset``, ``dataset/row`` or ``dataset/column/row``, parts percent-encoded; what is the only choice may be left out.
            level: Of its resolution pyramid, whose sizes are then said.

        Raises:
            DatasetNotFound, ImageNotFound, InvalidArgument.
        """
        parse_key(key)
        request = pb.ResolveViewRequest(key=key, pyramid_level=checked_level(level))
        return image_from_proto(self._connection.call("ResolveView", request, pb.ResolveViewResponse).image)

    def tensor_view(self, key: str, *, level: int = 0, **selection: Any) -> LazyTensorView:
        """A lazy view of an image: no traffic until its shape or its pixels are needed.

        Args:
            key: As for :meth:`image`.
            level: Of the image's resolution pyramid; coordinates count that level's pixels. Where the source has no pyramid, the server makes the
                level when it is first asked for.
            selection: TensorView's keyword arguments: t, z, c, roi, roi3d, roi_nd, roi_type, tile, layout, dtype, chunk_policy, channel_policy.

        Raises:
            InvalidArgument: a malformed key, layout or policy. (TypeError for an unknown argument.)
        """
        unknown = selection.keys() - set(PLAN_ARGUMENTS)
        if unknown:
            raise TypeError(f"tensor_view() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        parse_key(key)
        return LazyTensorView.of_source(RemoteSource(self._connection, key, checked_level(level)), selection)

    @property
    def admin(self) -> Admin:
        """What changes the server's datasets: register, refresh, load, remove. InvalidArgument where there are several servers: they would differ."""
        self._connection.check_alone("administration")
        return Admin(self._connection)

    def upload(self, name: str, data: Any, **options: Any) -> DatasetInfo:
        """Send a dataset to the server, which keeps it for good. See :func:`ome_tensor_client.upload.upload`."""
        self._connection.check_alone("an upload")
        return upload(self._connection, name, data, **options)

    def close(self) -> None:
        """Close this process's connection; the next call opens another."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.target!r})"


def connect(target: str | Sequence[str], **options: Any) -> Client:
    """A client of the server at ``HOST:PORT``, or of several that hold the same datasets. Opens no connection yet.

    Reads are spread over several servers: shards by their number, other reads by chance, process by process. A read whose server fails goes on at
    another one, at the next tile; it returns when its own serves again.

    Args:
        target: ``HOST:PORT``, or a list of them (or a text with commas between them).
        options: Fields of :class:`Options`: timeout, retry_for, prefetch_bytes, message_bytes, compression, transport, store,
            reuse_memory, connections, checksum; tls, ca, cert, key, server_name, token, token_file, insecure; tracing.

    Raises:
        InvalidArgument: a malformed target or option. (TypeError for an unknown option.)
    """
    return Client(Connection(target, Options(**options)))
