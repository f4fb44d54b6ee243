"""A training application that traces: reads an image, and exports its spans."""

from __future__ import annotations

import sys

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from ome_tensor_client import connect

provider = TracerProvider(resource=Resource({"service.name": "trainer"}))
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
with connect(sys.argv[1], transport="tcp", tracing=True) as client:
    print("read", client.tensor_view("image", layout="TZCYX").to_numpy().shape)
provider.shutdown()
