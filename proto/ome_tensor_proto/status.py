"""The one status table: reasons of :mod:`ome_tensor.errors` <-> gRPC status codes, and errors <-> ``google.rpc.Status``.

A server turns an :class:`OmeTensorError` into a status with :func:`to_status`; a client turns what gRPC raised back into the
same class with the same message, field and value with :func:`from_rpc_error`. Neither lets a foreign exception's text through.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from ome_tensor import errors
from ome_tensor.errors import OmeTensorError, Reason

__all__ = ["DOMAIN", "STATUS_CODES", "error_of_reason", "from_rpc_error", "to_status"]

#: ``ErrorInfo.domain`` of every error of this contract.
DOMAIN = "ome-tensor"

STATUS_CODES: Mapping[Reason, grpc.StatusCode] = MappingProxyType(
    {
        Reason.INVALID_SELECTION: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
        Reason.INVALID_RECORD: grpc.StatusCode.DATA_LOSS,
        Reason.DATASET_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.IMAGE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Reason.DATASET_CHANGED: grpc.StatusCode.FAILED_PRECONDITION,
        # Not RESOURCE_EXHAUSTED: retry policies and proxies take that for "later"; a request over a limit is refused for ever.
        # Not INVALID_ARGUMENT: the request is well formed, another server may take it.
        Reason.LIMIT_EXCEEDED: grpc.StatusCode.OUT_OF_RANGE,
        Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.REBALANCE: grpc.StatusCode.UNAVAILABLE,
        Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
        Reason.NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
        Reason.NOT_SUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
        Reason.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
        Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
        Reason.CANCELLED: grpc.StatusCode.CANCELLED,
        Reason.BROKEN_STREAM: grpc.StatusCode.DATA_LOSS,
        Reason.DEVICE_UNAVAILABLE: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.MISSING_DEPENDENCY: grpc.StatusCode.FAILED_PRECONDITION,
        Reason.SERVER_ERROR: grpc.StatusCode.INTERNAL,
    }
)

_CLASSES: Mapping[str, type[OmeTensorError]] = MappingProxyType(
    {
        cls.reason.value: cls
        for cls in (getattr(errors, name) for name in errors.__all__)
        if isinstance(cls, type) and issubclass(cls, OmeTensorError) and cls is not OmeTensorError
    }
)

# For a status without our details: from gRPC itself, a proxy, or another implementation. Codes not listed are SERVER_ERROR.
_CLASS_OF_CODE: Mapping[grpc.StatusCode, type[OmeTensorError]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
        grpc.StatusCode.NOT_FOUND: errors.ImageNotFound,
        grpc.StatusCode.FAILED_PRECONDITION: errors.DatasetChanged,
        grpc.StatusCode.OUT_OF_RANGE: errors.LimitExceeded,
        grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
        grpc.StatusCode.UNAUTHENTICATED: errors.NotAuthenticated,
        grpc.StatusCode.PERMISSION_DENIED: errors.NotAllowed,
        grpc.StatusCode.UNIMPLEMENTED: errors.NotSupported,
        grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
        grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
        grpc.StatusCode.CANCELLED: errors.Cancelled,
        grpc.StatusCode.DATA_LOSS: errors.InvalidRecord,
    }
)

#: Seconds; a server that says more is not believed.
_LONGEST_RETRY_DELAY = 3600.0

# gRPC may drop a call whose trailing metadata pass 8 KiB. A message is in them percent-encoded (up to three bytes a byte) and,
# as base64 (four bytes for three), in the status; its beginning is in the violation too. At these limits the worst case is
# below 7 KiB.
_MAX_MESSAGE_BYTES = 1000
_MAX_DESCRIPTION_BYTES = 300
_MAX_FIELD_BYTES = 200
# OmeTensorError keeps 200 characters of a value: every one of them may take four bytes.
_MAX_VALUE_BYTES = 800


def to_status(error: BaseException) -> grpc.Status:
    """The status to end a call with (``context.abort_with_status``).

    Args:
        error: Anything raised. What is not an :class:`OmeTensorError` becomes ``SERVER_ERROR`` without its text: that is for the
            server's log.

    Returns:
        Code, message (bounded: gRPC's metadata are) and ``google.rpc.Status`` details.
    """
    if not isinstance(error, OmeTensorError):
        error = errors.ServerError("unexpected failure inside the server; its log has the details")
    message = _bounded(error.message, _MAX_MESSAGE_BYTES)
    info = error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN)
    details: list[Any] = [info]
    if error.value is not None:
        info.metadata["value"] = _bounded(error.value, _MAX_VALUE_BYTES)
    if error.field is not None:
        field = info.metadata["field"] = _bounded(error.field, _MAX_FIELD_BYTES)
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field, description=_bounded(error.message, _MAX_DESCRIPTION_BYTES)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(max(0.0, error.retry_after) * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=STATUS_CODES[error.reason].value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    result: grpc.Status = rpc_status.to_status(status)
    return result


def error_of_reason(reason: str, message: str, field: str | None = None, value: str | None = None) -> OmeTensorError:
    """The error of a reason, as it was raised in another process; a ServerError where the reason is none of the contract's."""
    return _CLASSES.get(reason, errors.ServerError)(message, field=field, value=value)


def from_rpc_error(rpc_error: grpc.RpcError) -> OmeTensorError:
    """The error that a server raised, or that gRPC's own failure means. To be raised ``from`` whatever the caller wants to show.

    Args:
        rpc_error: What a call raised: it has ``code()``, ``details()`` and ``trailing_metadata()`` (sync and asyncio alike).

    Returns:
        The same class, message, field and value; without our details a class by the code alone.
    """
    call = cast(Any, rpc_error)
    code = call.code() if hasattr(call, "code") else grpc.StatusCode.UNKNOWN
    try:
        status = rpc_status.from_call(call) if hasattr(call, "trailing_metadata") else None
    except (ValueError, DecodeError):
        # Details that contradict the status are nobody's we know.
        status = None
    retry_after = None if status is None else _retry_after(status)
    if status is not None:
        info = _detail(status, error_details_pb2.ErrorInfo)
        if info is not None and info.domain == DOMAIN and info.reason in _CLASSES:
            metadata = info.metadata
            return _CLASSES[info.reason](
                status.message, field=metadata.get("field"), value=metadata.get("value"), retry_after=retry_after
            )
    text = (call.details() if hasattr(call, "details") else None) or str(getattr(code, "name", code))
    cls = _CLASS_OF_CODE.get(code, errors.ServerError)
    if cls is errors.Overloaded and "message larger than max" in text:
        # gRPC's own size limits share a code with overload, yet trying again is useless.
        cls = errors.LimitExceeded
    if cls is errors.ServerError and code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        text = f"{code.name}: {text}"
    return cls(text, retry_after=retry_after)


def _detail(status: Any, kind: type[Any]) -> Any:
    """The first detail of a kind; ``None`` where there is none that can be read."""
    for packed in status.details:
        found = kind()
        try:
            if packed.Unpack(found):
                return found
        except DecodeError:
            continue
    return None


def _retry_after(status: Any) -> float | None:
    info = _detail(status, error_details_pb2.RetryInfo)
    # What a server says is not trusted to be sensible.
    return None if info is None else min(max(0.0, info.retry_delay.ToNanoseconds() * 1e-9), _LONGEST_RETRY_DELAY)


def _bounded(text: str, limit: int) -> str:
    """Text of at most ``limit`` bytes in UTF-8, cut between characters."""
    # A lone surrogate (from a file name, say) cannot be encoded; it must not turn an error into another.
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode("utf-8", "ignore") + "…"
