"""Calls made by hand, past the client: to send what the client never would, and to see what is really on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ome_tensor_proto.methods import METHODS
from ome_tensor_proto.v1 import tensor_service_pb2 as pb


class RawClient:
    """Calls with messages or with any bytes; gRPC's errors come out as they are."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel

    def call(self, name: str, request: Message | bytes) -> Any:
        """A unary call."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        return METHODS[name].response.FromString(self.channel.unary_unary(METHODS[name].path)(data, timeout=30))

    def read(self, request: Message | bytes) -> list[bytes]:
        """All messages of a read, as bytes."""
        return list(self.stream(request))

    def stream(self, request: Message | bytes) -> Any:
        """A read in progress."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        return self.channel.unary_stream(METHODS["ReadTiles"].path)(data, timeout=60)


@contextmanager
def raw_client(target: str) -> Iterator[RawClient]:
    """A client of its own connection."""
    with grpc.insecure_channel(
        target, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    ) as channel:
        yield RawClient(channel)


def request(key: str = "image", **fields: Any) -> pb.ReadTilesRequest:
    """A read of one image."""
    return pb.ReadTilesRequest(keys=[key], **fields)


def payload_of(messages: list[bytes]) -> bytes:
    """The Arrow stream of a read, cut out by protobuf itself."""
    return b"".join(pb.ReadTilesResponse.FromString(message).payload for message in messages)


def read_arrow(messages: list[bytes]) -> pa.Table:
    """A read as plain pyarrow sees it."""
    payload = payload_of(messages)
    # pyarrow takes a stream without it for a whole one.
    assert payload.endswith(b"\xff\xff\xff\xff\x00\x00\x00\x00")
    with pa.ipc.open_stream(payload) as stream:
        return stream.read_all()


def rows_of(table: pa.Table) -> Iterator[tuple[dict[str, int], np.ndarray]]:
    """Each row's numbers, and its pixels in the shape and as the type that the schema says, by pyarrow and NumPy alone."""
    names = [name for name in table.column_names if name != "pixels"]
    dtype = np.dtype(table.schema.metadata[b"ome_tensor.dtype"].decode())
    for batch in table.to_batches():
        column = batch.column("pixels")
        for row in range(len(batch)):
            numbers = {name: batch.column(name)[row].as_py() for name in names}
            if isinstance(column, pa.FixedShapeTensorArray):
                block = column.to_numpy_ndarray()[row]
            else:
                # A pyarrow that knows the variable tensor wraps its storage; an older one shows it as it is.
                struct = (column.storage if isinstance(column, pa.ExtensionArray) else column)[row]
                block = struct["data"].values.to_numpy().reshape(struct["shape"].as_py())
            if dtype.kind == "c":
                block = np.ascontiguousarray(block).view(dtype)[..., 0]
            yield numbers, block.astype(bool) if dtype.kind == "b" else block


def reason_of(error: grpc.RpcError) -> tuple[str, str | None]:
    """``ErrorInfo.reason`` and the field to blame; both are in the details of every refusal."""
    status = rpc_status.from_call(error)
    assert status is not None, f"{error} has no details"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "ome-tensor"
    field = info.metadata.get("field")
    if field is not None:
        violation = error_details_pb2.BadRequest()
        assert status.details[1].Unpack(violation)
        assert [entry.field for entry in violation.field_violations] == [field]
    return info.reason, field
