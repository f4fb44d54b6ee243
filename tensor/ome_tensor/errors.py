"""The one exception tree of ome-tensor, raised locally and re-raised identically by a client.

Every error knows its `reason` (a closed set, :class:`Reason`, which travels as ``google.rpc.ErrorInfo.reason``), and where one
argument is to blame the `field` and the `value` that were refused. All of them survive pickling: loader workers are processes.

This module is the domain's: it knows nothing of gRPC. The table from reasons to status codes is in ``ome_tensor_proto.status``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

__all__ = [
    "BrokenStream",
    "Cancelled",
    "DatasetChanged",
    "DatasetNotFound",
    "DeadlineExceeded",
    "DeviceUnavailable",
    "ImageNotFound",
    "InvalidArgument",
    "InvalidRecord",
    "InvalidSelection",
    "LimitExceeded",
    "MissingDependency",
    "NotAllowed",
    "NotAuthenticated",
    "NotSupported",
    "OmeTensorError",
    "Overloaded",
    "Reason",
    "Rebalance",
    "ServerError",
    "Unavailable",
]


class Reason(StrEnum):
    """Why a call failed: the closed set of ``ErrorInfo.reason`` values of the v1 contract."""

    INVALID_SELECTION = "INVALID_SELECTION"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    INVALID_RECORD = "INVALID_RECORD"
    DATASET_NOT_FOUND = "DATASET_NOT_FOUND"
    IMAGE_NOT_FOUND = "IMAGE_NOT_FOUND"
    DATASET_CHANGED = "DATASET_CHANGED"
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED"
    OVERLOADED = "OVERLOADED"
    REBALANCE = "REBALANCE"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    NOT_ALLOWED = "NOT_ALLOWED"
    NOT_SUPPORTED = "NOT_SUPPORTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    BROKEN_STREAM = "BROKEN_STREAM"
    DEVICE_UNAVAILABLE = "DEVICE_UNAVAILABLE"
    MISSING_DEPENDENCY = "MISSING_DEPENDENCY"
    SERVER_ERROR = "SERVER_ERROR"


class OmeTensorError(Exception):
    """Base of every error that ome-tensor raises on purpose.

    Attributes:
        message: One line for a person; what ``str()`` gives.
        field: The argument, request field or record field to blame, or ``None``.
        value: The refused value, as text, or ``None``.
        retry_after: Seconds after which the same call may succeed, where that can be told; else ``None``.
        request_id: What the server's log names the call by that failed; ``None`` where no call was made.
    """

    reason: ClassVar[Reason] = Reason.SERVER_ERROR

    def __init__(self, message: str, *, field: str | None = None, value: object = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.value = None if value is None else _short(value)
        self.retry_after = retry_after
        self.request_id: str | None = None

    def __str__(self) -> str:
        # KeyError's own __str__ would show the message's repr.
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.field, self.value, self.retry_after, self.request_id)


def _short(value: object, limit: int = 200) -> str:
    """Text of a refused value, bounded: an error is a line, not a dump."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _rebuild(
    cls: type[OmeTensorError],
    message: str,
    field: str | None,
    value: str | None,
    retry_after: float | None = None,
    request_id: str | None = None,
) -> OmeTensorError:
    error = cls(message, field=field, value=value, retry_after=retry_after)
    error.request_id = request_id
    return error


class InvalidArgument(OmeTensorError, ValueError):
    """An argument is malformed whatever image it is applied to (layout, mode, device, tile size, policy ...)."""

    reason = Reason.INVALID_ARGUMENT


class InvalidSelection(InvalidArgument):
    """The selection (t, z, c, roi, roi3d, roi_nd, tile) is malformed or does not fit the image."""

    reason = Reason.INVALID_SELECTION


class InvalidRecord(OmeTensorError, ValueError):
    """The stored OME-Arrow record is damaged: a hole, a payload of the wrong length, an unknown pixel type ..."""

    reason = Reason.INVALID_RECORD


class DatasetNotFound(OmeTensorError, KeyError):
    """The server holds no dataset of that name."""

    reason = Reason.DATASET_NOT_FOUND


class ImageNotFound(OmeTensorError, KeyError):
    """The dataset exists but the key names no single image in it."""

    reason = Reason.IMAGE_NOT_FOUND


class DatasetChanged(OmeTensorError, RuntimeError):
    """The dataset's version is no longer the one a read began with; going on would mix pixels."""

    reason = Reason.DATASET_CHANGED


class LimitExceeded(OmeTensorError, ValueError):
    """The request is over one of the server's stated limits; the same request will never succeed there."""

    reason = Reason.LIMIT_EXCEEDED


class Overloaded(OmeTensorError, RuntimeError):
    """The server has no room for the call now; the same call may succeed later."""

    reason = Reason.OVERLOADED


class Rebalance(OmeTensorError, ConnectionError):
    """Another worker of the same server has less to do: connect anew. A client does so by itself."""

    reason = Reason.REBALANCE


class NotAuthenticated(OmeTensorError, PermissionError):
    """The server does not know who calls: no token where one is needed, or one that is wrong, has expired or was revoked."""

    reason = Reason.UNAUTHENTICATED


class NotAllowed(OmeTensorError, PermissionError):
    """The server's policy does not let this caller do that."""

    reason = Reason.NOT_ALLOWED


class NotSupported(OmeTensorError, NotImplementedError):
    """The contract names it, this server has not built it."""

    reason = Reason.NOT_SUPPORTED


class Unavailable(OmeTensorError, ConnectionError):
    """The server cannot be reached, is still loading, or is shutting down."""

    reason = Reason.UNAVAILABLE


class DeadlineExceeded(OmeTensorError, TimeoutError):
    """No answer within the timeout."""

    reason = Reason.DEADLINE_EXCEEDED


class Cancelled(OmeTensorError, RuntimeError):
    """The call was cancelled."""

    reason = Reason.CANCELLED


class BrokenStream(OmeTensorError, ConnectionError):
    """What arrived is not a valid stream of the contract (truncated, reordered, damaged)."""

    reason = Reason.BROKEN_STREAM


class DeviceUnavailable(OmeTensorError, RuntimeError):
    """The requested device is not there, e.g. ``device="cuda"`` where torch has no CUDA."""

    reason = Reason.DEVICE_UNAVAILABLE


class MissingDependency(OmeTensorError, RuntimeError):
    """An optional package is needed; the message names the extra that installs it."""

    reason = Reason.MISSING_DEPENDENCY


class ServerError(OmeTensorError, RuntimeError):
    """An unexpected failure inside the server; its log has the details."""

    reason = Reason.SERVER_ERROR
