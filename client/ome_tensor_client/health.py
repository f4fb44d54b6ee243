"""Whether a server is ready, asked by the standard health protocol (grpc.health.v1) without its package.

``grpcio-health-checking`` belongs to the server's extra, and a check should need nothing beyond the base installation. The protocol
is two messages of one field each, and protobuf's own wrapper types have the same field at the same number, so their bytes are the
same: ``StringValue`` is ``HealthCheckRequest{string service = 1}``, and ``Int32Value`` is ``HealthCheckResponse{ServingStatus status =
1}``, since an enum travels as an int32.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from ome_tensor.errors import BrokenStream, ImageNotFound, InvalidArgument, NotSupported
from ome_tensor_proto.methods import SERVICE

from .call_errors import error_of_call
from .channels import Channels
from .identity import Identity
from .options import Options, checked_targets

__all__ = ["check_health"]

_CHECK = "/grpc.health.v1.Health/Check"

#: ``HealthCheckResponse.ServingStatus``.
_STATUS = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}


def check_health(target: str, *, timeout: float = 3.0, service: str = SERVICE, **security: Any) -> str:
    """Ask once, without retrying.

    Args:
        target: ``HOST:PORT``.
        timeout: Seconds to wait.
        service: Full name of the gRPC service to ask about; ``""`` for the server as a whole.
        security: Fields of :class:`Options` about TLS: tls, ca, cert, key, server_name.

    Returns:
        ``SERVING``, ``NOT_SERVING`` (loading, or shutting down), ``SERVICE_UNKNOWN`` or ``UNKNOWN``.

    Raises:
        InvalidArgument: a malformed target, or several.
        Unavailable, DeadlineExceeded: nobody answers.
        NotSupported: the server does not speak the health protocol.
    """
    options = Options(timeout=timeout, retry_for=0, **security)
    targets = checked_targets(target)
    if len(targets) > 1:
        raise InvalidArgument(f"a health check is of one server, not of several ({target})", field="target", value=target)
    target, identity = targets[0], Identity(options, targets)
    # A connection that is shared, as gRPC's are, could wait out another's pause between attempts to make it.
    channels = Channels(target, lambda target: identity.channel(target, (("grpc.use_local_subchannel_pool", 1),)))
    try:
        request = StringValue(value=service).SerializeToString()
        check: Any = channels.current.unary_unary(_CHECK)
        status = Int32Value.FromString(check(request, timeout=timeout)).value
    except grpc.RpcError as rpc_error:
        error = error_of_call(rpc_error, options, target)
        if isinstance(error, ImageNotFound):
            # The protocol's NOT_FOUND: a server that does not know the service.
            return "SERVICE_UNKNOWN"
        if isinstance(error, NotSupported):
            raise NotSupported(
                f"{target}: the server there does not answer health checks", field="target", value=target
            ) from None
        raise error from None
    except DecodeError:
        raise BrokenStream(f"{target}: what answers there is not a health service", field="target", value=target) from None
    finally:
        channels.close()
    return _STATUS.get(status, f"status {status}")
