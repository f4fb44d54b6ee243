"""Health checks while others watch: nobody who watches, well or badly, keeps an answer from anybody else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.processes import health_of, wait_until
from tests.integration.raw_calls import EMPTY, begin_calls

from ome_tensor_proto.methods import SERVICE
from ome_tensor_server.testing import RunningServer, running_server

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
Request = health_pb2.HealthCheckRequest


@pytest.fixture
def watched(image_path: Path) -> Iterator[RunningServer]:
    """A server that gives a client a second to take a message."""
    with running_server([image_path], stall_seconds=1) as server:
        yield server


def unwilling_watch(target: str) -> socket.socket:
    """A watch whose client takes no message: it has given the server no room for one."""
    return begin_calls(target, "/grpc.health.v1.Health/Watch", request=EMPTY, settings=[(4, 0)])


def test_watches_that_come_and_go(watched: RunningServer) -> None:
    """gRPC's own health service stops the server within a second of this, for good: see ``ome_tensor_server.health``."""
    end = time.monotonic() + 1.5

    def come_and_go() -> None:
        with grpc.insecure_channel(watched.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < end:
                watch = stub.Watch(Request(), timeout=5)
                assert next(watch).status == SERVING
                watch.cancel()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert health_of(watched.target) == SERVING
    # None is remembered.
    health = watched.server._health
    wait_until(lambda: not health._watches, "all watches are forgotten")


def test_a_watch_that_takes_nothing(watched: RunningServer) -> None:
    """Checks, other watches and changes go on; it is ended when it has had its time."""
    with unwilling_watch(watched.target):
        health = watched.server._health
        wait_until(lambda: health._watches.get(""), "the watch has begun")
        assert health_of(watched.target) == SERVING
        with grpc.insecure_channel(watched.target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(Request(), timeout=10)
            assert next(watch).status == SERVING
            health.set(("",), NOT_SERVING)
            assert next(watch).status == NOT_SERVING
            health.set(("",), SERVING)
            assert next(watch).status == SERVING
            watch.cancel()
        wait_until(lambda: not health._watches, "it is ended")


def test_a_server_stops_beside_a_watch_that_takes_nothing(image_path: Path) -> None:
    """At once, as it does without."""
    with running_server([image_path]) as server, unwilling_watch(server.target):
        wait_until(lambda: server.server._health._watches.get(""), "the watch has begun")
        began = time.monotonic()
        server.server.stop(grace=0)
        assert time.monotonic() - began < 5


def test_services_that_are_not_there(watched: RunningServer) -> None:
    """A check is refused; a watch is told so, and hears of it when there is one."""
    with grpc.insecure_channel(watched.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(Request(service="nothing"), timeout=10)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert stub.Check(Request(service=SERVICE), timeout=10).status == SERVING
        watch = stub.Watch(Request(service="later"), timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watched.server._health.set(("later",), SERVING)
        assert next(watch).status == SERVING
        watch.cancel()
