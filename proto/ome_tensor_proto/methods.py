"""The methods of the contract's services, read from the contract's descriptors: what server and client both need to speak of a
method.

``METHODS["ReadTiles"].path`` is what a channel and a generic handler want; neither side needs generated service code, which
binds itself to one version of grpcio. To send or receive raw message bytes (as :mod:`.batches` makes and reads them), pass
``None`` for the serialiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from .v1 import admin_service_pb2, tensor_service_pb2

__all__ = [
    "ADMIN_METHODS",
    "ADMIN_SERVICE",
    "CHECKSUM",
    "MAY_MOVE",
    "METHODS",
    "ONE_MESSAGE",
    "REQUEST_ID",
    "SERVICE",
    "Method",
    "methods_of",
]


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC.

    Attributes:
        name: E.g. ``ReadTiles``.
        path: E.g. ``/ome_tensor_proto.v1.TensorService/ReadTiles``.
        request, response: The message classes; ``SerializeToString`` and ``FromString`` are their serialisers.
        streaming: Whether the server answers with a stream.
        takes_stream: Whether the client sends one. No method does both.
    """

    name: str
    path: str
    request: type[Message]
    response: type[Message]
    streaming: bool
    takes_stream: bool = False


def methods_of(service: ServiceDescriptor) -> Mapping[str, Method]:
    """The methods of a service by name."""
    table = {}
    for method in service.methods:
        if method.client_streaming and method.server_streaming:
            raise TypeError(f"{method.full_name} takes a stream and gives one: this contract has no such method")
        table[method.name] = Method(
            name=method.name,
            path=f"/{service.full_name}/{method.name}",
            request=GetMessageClass(method.input_type),
            response=GetMessageClass(method.output_type),
            streaming=method.server_streaming,
            takes_stream=method.client_streaming,
        )
    return MappingProxyType(table)


#: Metadata of a ReadTiles call whose client will open another connection where the server answers REBALANCE. Clients that do not send it are never
#: asked to.
MAY_MOVE = "ome-tensor-may-move"

#: Metadata of a ReadTiles call whose client expects one message. On the wire a stream of one message is what the answer of a unary call is, so both
#: sides may leave out what streams need: a fifth of the time of a small read (0.66 ms instead of 0.81 for 128 KiB). A server that does not know it
#: streams; one that does refuses, with this as the field, a read that takes more messages.
ONE_MESSAGE = "ome-tensor-one-message"

#: Metadata of a call other than ReadTiles (whose messages have checksums of their own) whose client wants to know that nothing was damaged on the
#: way. The trailing metadata of its answer then say, under the same key, the XXH3-64 of the request's bytes and of those of all messages of the
#: answer, one behind the other, as 16 hexadecimal digits.
CHECKSUM = "ome-tensor-checksum"

#: Metadata by which a client names a call, so that its error and the server's log can be laid side by side.
REQUEST_ID = "ome-tensor-request-id"

_DESCRIPTOR = tensor_service_pb2.DESCRIPTOR.services_by_name["TensorService"]
_ADMIN = admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"]

#: Full names of the services, as health checks and reflection know them.
SERVICE: str = _DESCRIPTOR.full_name
ADMIN_SERVICE: str = _ADMIN.full_name

#: The services' methods by name.
METHODS: Mapping[str, Method] = methods_of(_DESCRIPTOR)
ADMIN_METHODS: Mapping[str, Method] = methods_of(_ADMIN)
