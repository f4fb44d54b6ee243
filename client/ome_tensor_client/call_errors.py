"""This project's errors for what gRPC raises, in words for people: which server, what became of it."""

from __future__ import annotations

from typing import Any

import grpc

from ome_tensor.errors import Cancelled, DeadlineExceeded, OmeTensorError, Unavailable
from ome_tensor_proto.status import from_rpc_error

from .options import Options

__all__ = ["error_about", "error_of_call"]


def error_of_call(rpc_error: grpc.RpcError, options: Options, target: str, among: str = "") -> OmeTensorError:
    """The error of a call: as the server raised it, or one about the connection.

    Args:
        rpc_error: What gRPC raised.
        options: The client's.
        target: Whom it called.
        among: All of its servers, where there are several.
    """
    error = from_rpc_error(rpc_error)
    if error.field is not None or not isinstance(error, (Unavailable, DeadlineExceeded, Cancelled)):
        return error
    seconds = f" within {options.timeout:g} s" if isinstance(error, DeadlineExceeded) else ""
    # gRPC's own word, and nobody here has cancelled it: a server that is stopped hard does, one that has waited too long for the request, and
    # gRPC in one that is flooded by others.
    kind = Unavailable if isinstance(error, Cancelled) and not _has_details(rpc_error) else type(error)
    return error_about(target, f"{_plain(error, options.is_secure)}{seconds}", kind, among)


def error_about(target: str, words: str, kind: type[OmeTensorError], among: str = "") -> OmeTensorError:
    """An error about a server, of several perhaps."""
    return kind(f"{target}: {words}" + (f" (one of {among})" if among not in ("", target) else ""), field="target", value=target)


def _has_details(rpc_error: grpc.RpcError) -> bool:
    """Whether it was the server's service that ended a call, and says why."""
    metadata: Any = rpc_error.trailing_metadata() if hasattr(rpc_error, "trailing_metadata") else None
    return any(name == "grpc-status-details-bin" for name, _ in metadata or ())


def _plain(error: OmeTensorError, is_secure: bool) -> str:
    """gRPC's text without its jargon where that says nothing more."""
    if isinstance(error, DeadlineExceeded):
        return "no answer"
    text = error.message
    for said, meant in (
        ("Connection refused", "connection refused; is a server running there?"),
        ("DNS resolution failed", "no such host"),
        ("Domain name not found", "no such host"),
        ("Socket closed", "the connection was closed"),
    ):
        if said in text:
            # That is all a server that speaks TLS says to somebody who does not.
            return f"{meant}; a server that speaks TLS wants ca or tls" if said == "Socket closed" and not is_secure else meant
    return text
