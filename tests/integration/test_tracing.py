"""OpenTelemetry: one trace from a client's call to the server's answer."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.processes import ServerProcess, run_script, wait_until

from ome_tensor_server.testing import running_server

pytest.importorskip("opentelemetry.instrumentation.grpc")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")


def test_client_and_server_tell_one_trace(image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one collector: the server's span is a child of the client's."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[tuple[str, Any]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
                spans.extend((names["service.name"], span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_address[1]}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with ServerProcess(image_path, tmp_path / "log", "--tracing") as process:
            process.wait_serving()
            assert "read (2, 3, 2, 240, 270)" in run_script("traced_client.py", process.target)
            wait_until(lambda: {name for name, _ in spans} >= {"trainer", "ome-tensor"}, "spans of both")
            wait_until(lambda: len([1 for name, _ in spans if name == "ome-tensor"]) >= 2, "of both calls")
        collector.shutdown()
    clients = {span.span_id: span for name, span in spans if name == "trainer"}
    served = [span for name, span in spans if name == "ome-tensor"]
    for span in served:
        if "ReadTiles" in span.name or "ResolveView" in span.name:
            assert clients[span.parent_span_id].trace_id == span.trace_id
    assert any("ReadTiles" in span.name for span in served)


def test_health_is_told_where_calls_are_traced(image_path: Path) -> None:
    """Also to whoever watches."""
    with running_server([image_path], tracing=True) as server, grpc.insecure_channel(server.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert stub.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        assert next(iter(stub.Watch(request, timeout=10))).status == health_pb2.HealthCheckResponse.SERVING
