"""What fuzzing has found (``python -m tests.fuzz``), so that it stays found. What it found of health checks is in ``test_health``."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from tests.integration.processes import wait_until
from tests.integration.raw import raw_client, reason_of, request

from ome_tensor_proto.methods import ADMIN_METHODS, ONE_MESSAGE
from ome_tensor_proto.v1 import admin_service_pb2 as admin_pb
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_proto.v1 import view_pb2
from ome_tensor_server.testing import RunningServer

_MOST = 2**64 - 1


@pytest.mark.parametrize(
    "spans,count",
    [
        ([(_MOST, 0, 1)], 0),
        ([(0, 0, _MOST)], 0),
        ([(0, 1, _MOST)], 1),
        ([(_MOST, 0, _MOST), (0, 1, 1)], 1),
    ],
)
def test_spans_whose_numbers_mean_nothing(served: RunningServer, spans: list[tuple[int, int, int]], count: int) -> None:
    """Where a span of no position begins, and how far apart the positions of a single one are, may be any number."""
    order = view_pb2.Order(
        spans=[view_pb2.PositionSpan(first=first, count=length, stride=stride) for first, length, stride in spans]
    )
    with raw_client(served.target) as raw:
        messages = raw.read(request(order=order))
        assert sum(pb.ReadTilesResponse.FromString(message).tile_count for message in messages) == count
        assert raw.call("ResolveView", pb.ResolveViewRequest(key="image", order=order)).tile_count == count


def test_a_span_beyond_what_can_be_counted(served: RunningServer) -> None:
    """Refused as one beyond the end."""
    order = view_pb2.Order(spans=[view_pb2.PositionSpan(first=0, count=_MOST, stride=_MOST)])
    with raw_client(served.target) as raw, pytest.raises(grpc.RpcError) as caught:
        raw.call("ResolveView", pb.ResolveViewRequest(key="image", order=order))
    assert reason_of(caught.value)[0] == "INVALID_ARGUMENT"


def test_a_tile_of_nothing_that_is_wider_than_a_number(served: RunningServer) -> None:
    """A view without elements has tiles of no bytes, however large they are said to be."""
    nothing = view_pb2.View(t=view_pb2.AxisIndex(list=view_pb2.IndexList()))
    tiling = view_pb2.Tiling(tiles=view_pb2.TilesCut(h=16, w=_MOST), edge=view_pb2.EDGE_POLICY_PAD)
    with raw_client(served.target) as raw, pytest.raises(grpc.RpcError) as caught:
        raw.read(request(view=nothing, tiling=tiling))
    assert reason_of(caught.value) == ("LIMIT_EXCEEDED", "tiling")


def test_reflection_of_garbage(served: RunningServer, server_log: pytest.LogCaptureFixture) -> None:
    """Refused as other garbage is, and forgotten: gRPC's own deserialiser writes a traceback, and keeps two of three such calls for good."""
    with raw_client(served.target) as raw:
        reflect = raw.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        for _ in range(20):
            with pytest.raises(grpc.RpcError) as caught:
                list(reflect(iter([b"\xff"]), timeout=10))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    wait_until(lambda: not served.server._server._state.rpc_states, "all calls are forgotten")  # type: ignore[attr-defined]
    assert "Traceback" not in server_log.text


def test_reflection_of_many_at_once(served: RunningServer) -> None:
    """Each such call holds a thread for as long as its client likes: more than a few are refused, and others get through."""
    waiting = threading.Event()

    def nothing_yet() -> Iterator[bytes]:
        waiting.wait(20)
        yield from ()

    with raw_client(served.target) as raw:
        reflect = raw.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        calls = [reflect(nothing_yet(), timeout=20) for _ in range(30)]
        wait_until(lambda: sum(call.done() for call in calls) == 22, "all but eight are refused")
        assert raw.call("ListDatasets", pb.ListDatasetsRequest()).datasets
        waiting.set()
        codes = [call.code() for call in calls]
    assert sorted(code.name for code in codes) == ["OK"] * 8 + ["RESOURCE_EXHAUSTED"] * 22


def test_a_client_that_leaves_before_its_only_message(served: RunningServer, server_log: pytest.LogCaptureFixture) -> None:
    """A stream that ends without a message is nobody's mistake."""
    data = admin_pb.LoadDatasetRequest(name="image").SerializeToString()
    with raw_client(served.target) as raw:
        load = raw.channel.unary_unary(ADMIN_METHODS["LoadDataset"].path)
        for number in range(400):
            call = load.future(data, metadata=((ONE_MESSAGE, "1"),))
            time.sleep(0.0003 * (number % 4))
            call.cancel()
        assert raw.call("ListDatasets", pb.ListDatasetsRequest()).datasets
    assert "unexpected" not in server_log.text
