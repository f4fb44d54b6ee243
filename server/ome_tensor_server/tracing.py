"""OpenTelemetry traces: opt-in, by OpenTelemetry's own instrumentation of gRPC."""

from __future__ import annotations

import grpc

from ome_tensor.errors import MissingDependency

from .settings import Settings

__all__ = ["export_traces", "interceptors"]

_MISSING = "tracing needs OpenTelemetry; install it with: pip install 'ome-tensor[otel]'"


def interceptors(settings: Settings) -> list[grpc.ServerInterceptor]:
    """What a server wants around its handlers. Raises MissingDependency."""
    if not settings.tracing:
        return []
    try:
        from opentelemetry.instrumentation.grpc import filters, server_interceptor
    except ImportError:
        raise MissingDependency(_MISSING) from None
    # Health is left out: its Watch is a method of the kind that keeps no thread, which the instrumentation does not know.
    return [server_interceptor(filter_=filters.negate(filters.health_check()))]


def export_traces(settings: Settings) -> None:
    """Send this process's spans where ``OTEL_EXPORTER_OTLP_*`` variables say (by default to a collector on this host). For a server's own process
    only: an application that runs a server has its own way. Raises MissingDependency.
    """
    if not settings.tracing:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingDependency(_MISSING) from None
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
    provider = TracerProvider(resource=Resource.create({"service.name": "ome-tensor"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
