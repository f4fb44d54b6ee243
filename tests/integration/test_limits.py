"""What one caller, and all together, may ask of a server; and that small reads are answered while large ones run."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from tests.fuzz import http2
from tests.integration.processes import ServerProcess
from tests.integration.raw import raw_client, request
from tests.integration.raw_calls import EMPTY, begin_calls

from ome_tensor import Overloaded
from ome_tensor_client import connect
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_server import tokens
from ome_tensor_server.scopes import parse_scopes
from ome_tensor_server.testing import running_server


def retry_delay(error: grpc.RpcError) -> float:
    """What the server says."""
    status = rpc_status.from_call(error)
    for packed in status.details:
        info = error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            return float(info.retry_delay.ToNanoseconds() * 1e-9)
    raise AssertionError("no RetryInfo")


def test_too_many_calls_are_told_when_to_come_again(image_path: Path) -> None:
    with running_server([image_path], max_caller_requests_per_second=5) as server:
        with raw_client(server.target) as raw:
            message = pb.GetDatasetRequest(name="image")
            for _ in range(5):
                raw.call("GetDataset", message)
            with pytest.raises(grpc.RpcError) as caught:
                raw.call("GetDataset", message)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            delay = retry_delay(caught.value)
            assert 0 < delay <= 0.2
            time.sleep(delay)
            raw.call("GetDataset", message)
        with connect(server.target, retry_for=5) as client:
            # The client obeys: slower than it would like, and nothing fails.
            began = time.monotonic()
            for _ in range(8):
                client.dataset("image")
            assert time.monotonic() - began > 0.8
        with connect(server.target, retry_for=0) as client, pytest.raises(Overloaded) as refused:
            [client.dataset("image") for _ in range(10)]
        assert refused.value.field == "max_caller_requests_per_second"


def test_one_callers_streams_leave_places_for_others(big_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    texts = [tokens.create(file, parse_scopes(["read:*"]), name=name)[1] for name in ("greedy", "modest")]
    with ExitStack() as stack:
        server = stack.enter_context(running_server([big_path], tokens=str(file), max_concurrent_reads=4))
        clients = [connect(server.target, token=text, transport="tcp", retry_for=0) for text in texts]
        reads = [clients[0].tensor_view("big").iter_tiles(tile_size=(256, 256)) for _ in range(3)]
        for read in reads:
            next(read)
        with pytest.raises(Overloaded) as caught:
            next(clients[0].tensor_view("big").iter_tiles(tile_size=(256, 256)))
        assert (caught.value.field, caught.value.value) == ("max_caller_reads", "3")
        assert next(clients[1].tensor_view("big").iter_tiles(tile_size=(256, 256))) is not None
        for client in clients:
            client.close()


def test_messages_that_nobody_takes_are_bounded(big_path: Path) -> None:
    """Readers that stall hold a message each, and no more than the limit together; who comes then is told to come again, and others go on."""
    with running_server([big_path], max_bytes_in_flight=3 << 20, log_level="error") as server, ExitStack() as stack:
        server.server._service.turns.patience = 0.5
        stalled = []
        for _ in range(6):
            raw = stack.enter_context(raw_client(server.target))
            stream = raw.stream(request("big", max_message_bytes=1 << 20))
            stalled.append(stream)
        time.sleep(1.5)
        assert server.server._service.turns.in_flight <= 3 << 20
        codes = []
        for stream in stalled:
            try:
                for _ in stream:
                    pass
                codes.append(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.append(error.code())
        assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert grpc.StatusCode.OK in codes
    assert server.server._service.turns.in_flight == 0


def test_a_stalled_reader_does_not_hold_up_others(big_path: Path, big_pixels: np.ndarray) -> None:
    with running_server([big_path], log_level="error") as server, raw_client(server.target) as raw:
        stalled = [raw.stream(request("big")) for _ in range(4)]
        time.sleep(0.5)
        with connect(server.target, transport="tcp", timeout=10) as client:
            np.testing.assert_array_equal(client.tensor_view("big", layout="TZCYX").to_numpy(), big_pixels)
        for stream in stalled:
            stream.cancel()


@pytest.mark.slow
def test_small_reads_get_through_while_large_ones_run(big_path: Path, tmp_path: Path) -> None:
    """As ``python -m benchmarks.load`` measures with more of them for longer."""
    with ServerProcess(big_path, tmp_path / "log", "--log-level", "error") as process:
        process.wait_serving()
        stop = threading.Event()

        def bulk() -> None:
            with connect(process.target, transport="tcp") as client:
                while not stop.is_set():
                    for _ in client.tensor_view("big").iter_batches(tile_size=(512, 512), batch_size=2):
                        if stop.is_set():
                            return

        def small(count: int) -> float:
            with connect(process.target, transport="tcp") as client:
                seconds = []
                for _ in range(count):
                    began = time.perf_counter()
                    client.tensor_view("big", z=0, c=0, roi=(5, 7, 128, 128)).to_numpy()
                    seconds.append(time.perf_counter() - began)
                return statistics.median(seconds)

        alone = small(100)
        threads = [threading.Thread(target=bulk, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        beside = small(60)
        stop.set()
        for thread in threads:
            thread.join(20)
        # The readers share this process and two cores with it: a bound that only a queue behind all the bulk would pass.
        assert beside < max(50 * alone, 0.25), (alone, beside)


def test_health_watches_are_bounded(image_path: Path) -> None:
    """Each has a place for as long as its client likes: one host must not take all, nor several more than there are."""
    with running_server([image_path]) as server, grpc.insecure_channel(server.target) as channel, ExitStack() as stack:
        watches = [health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()) for _ in range(80)]
        codes = [code_of(watch) for watch in watches]
        assert codes.count(grpc.StatusCode.OK) == 16
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 64
        for host, answered in (("127.0.0.2", 16), ("127.0.0.3", 0)):
            connection = stack.enter_context(
                begin_calls(server.target, "/grpc.health.v1.Health/Watch", 20, host=host, request=EMPTY)
            )
            said, frames = b"", list[bytes]()
            while len({one[5:9] for one in frames if one[3] == http2.DATA or one[4] & http2.END_STREAM}) < 20:
                said += connection.recv(1 << 16)
                frames = http2.whole_frames(said)
            assert len({one[5:9] for one in frames if one[3] == http2.DATA}) == answered
        with connect(server.target, timeout=10) as client:
            assert client.datasets()
        for watch in watches:
            watch.cancel()
        deadline = time.monotonic() + 10
        while True:
            again = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            if code_of(again) is grpc.StatusCode.OK:
                break
            assert time.monotonic() < deadline, "the places of watches that ended are free again"
        again.cancel()


def code_of(watch: Any) -> grpc.StatusCode:
    """OK where it says something."""
    try:
        next(watch)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_a_deadline_is_heeded_in_the_middle_of_a_stream(big_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ome_tensor_server")
    with running_server([big_path]) as server, grpc.insecure_channel(server.target) as channel:
        path = "/ome_tensor_proto.v1.TensorService/ReadTiles"
        stream = channel.unary_stream(path)(request("big").SerializeToString(), timeout=1.0)
        next(stream)
        time.sleep(1.2)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        deadline = time.monotonic() + 5
        while server.server._service.reads.running:
            assert time.monotonic() < deadline, "the read still holds its place"
            time.sleep(0.01)
