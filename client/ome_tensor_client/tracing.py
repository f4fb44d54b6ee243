"""Spans of a client's calls, for applications that trace with OpenTelemetry.

Its own instrumentation of gRPC wraps a stream in a generator that cannot be cancelled (opentelemetry-instrumentation-grpc 0.66b), and a read's
call is cancelled whenever its reader goes; so the span is begun and ended here, by its semantic conventions
(https://opentelemetry.io/docs/specs/semconv/rpc/grpc/), and carried by its propagators. The server's side is its instrumentation's.
"""

from __future__ import annotations

from typing import Any

from ome_tensor.errors import MissingDependency

__all__ = ["begin_span", "end_span"]


def begin_span(path: str) -> tuple[Any, list[tuple[str, str]]]:
    """A span of a call, child of the application's current one, and the metadata that carry it. Raises MissingDependency.

    Args:
        path: The method's, e.g. ``/ome_tensor_proto.v1.TensorService/ReadTiles``.
    """
    try:
        from opentelemetry import propagate, trace
    except ImportError:
        raise MissingDependency("tracing needs OpenTelemetry; install it with: pip install 'ome-tensor[otel]'") from None
    service, _, method = path.lstrip("/").partition("/")
    span = trace.get_tracer("ome_tensor_client").start_span(
        path.lstrip("/"),
        kind=trace.SpanKind.CLIENT,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
    )
    carrier: dict[str, str] = {}
    # Not made the current one: a read's call is begun, read and ended in a generator, whose caller has a context of its own.
    propagate.inject(carrier, context=trace.set_span_in_context(span))
    return span, list(carrier.items())


def end_span(span: Any, error: BaseException | None) -> None:
    """The call is over."""
    from opentelemetry.trace import Status, StatusCode

    # A reader that has seen enough is no error.
    if error is not None and not isinstance(error, GeneratorExit):
        code = error.code() if hasattr(error, "code") else None
        span.set_status(Status(StatusCode.ERROR, getattr(code, "name", type(error).__name__)))
    span.end()
