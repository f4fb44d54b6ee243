"""Clients that begin calls and send no request: they get a thread for a while, and never all."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.fuzz import http2
from tests.integration.processes import health_of, wait_until
from tests.integration.raw_calls import begin_calls

from ome_tensor_client import connect
from ome_tensor_proto.methods import METHODS
from ome_tensor_server.calls import Call
from ome_tensor_server.testing import RunningServer, running_server

CHECK, WATCH = (f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/{name}" for name in ("Check", "Watch"))
REFLECT = f"/{reflection_pb2.DESCRIPTOR.services_by_name['ServerReflection'].full_name}/ServerReflectionInfo"
METHOD_PATHS = [METHODS["ListDatasets"].path, METHODS["ReadTiles"].path, CHECK, WATCH, REFLECT]
#: Another of this host's addresses.
ELSEWHERE = "127.0.0.2"


@pytest.fixture
def open_server(image_path: Path) -> Iterator[RunningServer]:
    """One that asks nobody who they are, and waits a second for a request."""
    with running_server([image_path], stall_seconds=1, max_concurrent_reads=4) as server:
        yield server


def read_until(connection: socket.socket, is_enough: Callable[[bytes], bool]) -> bytes:
    """What a server says until that is enough."""
    said = b""
    while not is_enough(said):
        more = connection.recv(1 << 16)
        assert more, f"the connection ended behind {said!r}"
        said += more
    return said


def ended_streams(said: bytes) -> set[int]:
    """The numbers of the calls that a server has ended."""
    return {
        int.from_bytes(one[5:9], "big")
        for one in http2.whole_frames(said)
        if one[3] == http2.RST or (one[4] & http2.END_STREAM and one[3] in (0, 1))
    }


@pytest.mark.parametrize("path", METHOD_PATHS)
def test_others_get_through(open_server: RunningServer, path: str, pixels: np.ndarray) -> None:
    """Whatever is called by whoever is silent, and also a thousand times."""
    with ExitStack() as stack:
        stack.enter_context(begin_calls(open_server.target, path, 1000, host=ELSEWHERE))
        time.sleep(0.2)
        with connect(open_server.target, timeout=5, retry_for=0) as client:
            np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), pixels)
        assert health_of(open_server.target) == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("path", METHOD_PATHS)
def test_a_call_without_a_request_comes_to_an_end(open_server: RunningServer, path: str) -> None:
    """Its thread is free again; the client hears of it."""
    with begin_calls(open_server.target, path, 3, host=ELSEWHERE) as connection:
        read_until(connection, lambda said: ended_streams(said) == {1, 3, 5})
    requests = open_server.server._requests
    wait_until(lambda: not requests._waiting, "nothing is waited for")


def test_a_host_with_too_many_of_them_is_told_so(open_server: RunningServer) -> None:
    """And may go on when some have ended."""
    most = open_server.server._requests._most
    with ExitStack() as stack:
        stack.enter_context(begin_calls(open_server.target, METHODS["ReadTiles"].path, most, host=ELSEWHERE))
        wait_until(lambda: open_server.server._requests._waiting[ELSEWHERE] == most, "all are waited for")
        connection = stack.enter_context(begin_calls(open_server.target, METHODS["ListDatasets"].path, 1, host=ELSEWHERE))
        said = read_until(connection, lambda said: ended_streams(said) == {1})
        assert b"127.0.0.2 have sent no request yet" in said
        assert b"grpc-status" in said


def test_an_end_without_a_request_is_an_error_of_the_client(open_server: RunningServer) -> None:
    with grpc.insecure_channel(open_server.target) as channel:
        call = channel.stream_unary(METHODS["ListDatasets"].path).future(iter(()), timeout=10)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the call has no request" in call.details()


def test_a_server_stops_beside_them(image_path: Path) -> None:
    """Whoever drains waits for no request."""
    with running_server([image_path]) as server, begin_calls(server.target, METHODS["ReadTiles"].path, 8, host=ELSEWHERE):
        wait_until(lambda: sum(server.server._requests._waiting.values()) == 8, "all are waited for")
        began = time.monotonic()
        server.server.stop(grace=20)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("way", ["reset", "close"])
def test_a_client_that_goes_is_no_client_without_a_request(open_server: RunningServer, way: str) -> None:
    """What is counted, and said in the log, is that it has gone; and its time is not the server's."""
    many = 40
    for _ in range(many):
        with begin_calls(open_server.target, METHODS["ListDatasets"].path, 1, host=ELSEWHERE) as connection:
            wait_until(lambda: open_server.server._requests._waiting, "it is waited for")
            time.sleep(0.01)
            if way == "reset":
                connection.sendall(http2.frame(http2.RST, 0, 1, (8).to_bytes(4, "big")))
                wait_until(lambda: not open_server.server._requests._waiting, "it has been noticed")

    def counted() -> dict[str, float]:
        return {
            labels["code"]: value
            for name, labels, value in open_server.server._page.samples()
            if name == "ome_tensor_calls_total" and labels["method"] == "ListDatasets"
        }

    wait_until(lambda: sum(counted().values()) == many, "all are counted")
    assert counted() == {"CANCELLED": many}
    seconds = [value for name, _, value in open_server.server._page.samples() if name == "ome_tensor_call_seconds_sum"]
    assert sum(seconds) < 0.01 * many


def test_a_call_that_the_server_ends_is_made_again(open_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody here has cancelled it: not the caller's affair."""
    admit, times = Call.admit, iter(range(2))

    def end_two(call: Call) -> None:
        if next(times, None) is not None:
            call._context.cancel()
        admit(call)

    monkeypatch.setattr(Call, "admit", end_two)
    with connect(open_server.target, timeout=5, retry_for=5) as client:
        assert [dataset.name for dataset in client.datasets()] == ["image"]
    assert next(times, None) is None
