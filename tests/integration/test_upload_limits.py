"""Uploads that stop halfway, and calls that wait: reads go on, and nothing is left behind."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pytest
from google.protobuf.message import Message
from tests.integration.images import random_pixels, record_of, write_image
from tests.integration.processes import wait_until

from ome_tensor import DeadlineExceeded, OmeTensorError, Overloaded
from ome_tensor.listing import DatasetState
from ome_tensor_client import connect
from ome_tensor_proto.methods import ADMIN_METHODS
from ome_tensor_proto.status import from_rpc_error
from ome_tensor_proto.v1 import admin_service_pb2 as pb
from ome_tensor_server import tokens
from ome_tensor_server.scopes import parse_scopes
from ome_tensor_server.testing import RunningServer, running_server

PIXELS = random_pixels((1, 1, 2, 6, 7))

#: Many more than there may be at one time, yet no more than the server has threads, so that it answers each itself.
MANY = 50

#: Calls of one method of AdminService that are answered at one time.
AT_ONCE = 16


def arrow_stream() -> bytes:
    table = pa.table({"image": pa.array([record_of(PIXELS)])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def messages_of(name: str, parts: int, **header: Any) -> list[bytes]:
    """A whole upload in so many messages behind its header."""
    data = arrow_stream()
    size = -(-len(data) // parts)
    payloads = [data[first : first + size] for first in range(0, len(data), size)]
    messages = [
        pb.UploadDatasetRequest(header=pb.UploadHeader(name=name, **header)),
        *(pb.UploadDatasetRequest(payload=payload) for payload in payloads),
    ]
    return [message.SerializeToString() for message in messages]


class Sending:
    """An upload by hand that sends some messages and then neither more nor its end, until it is let go.

    Attributes:
        call: gRPC's future.
        has_sent: Set once gRPC has asked for what comes behind the last message, which it does when it has passed that on.
    """

    def __init__(self, channel: grpc.Channel, messages: list[bytes], timeout: float | None = None) -> None:
        self._messages = messages
        self._let_go = threading.Event()
        self.has_sent = threading.Event()
        self.call: Any = channel.stream_unary(ADMIN_METHODS["UploadDataset"].path).future(self._requests(), timeout=timeout)

    def _requests(self) -> Iterator[bytes]:
        yield from self._messages
        self.has_sent.set()
        self._let_go.wait(60)

    def error(self, timeout: float = 30) -> OmeTensorError:
        """What the server says."""
        error = self.call.exception(timeout)
        assert isinstance(error, grpc.RpcError)
        return from_rpc_error(error)

    def close(self) -> None:
        self.call.cancel()
        self._let_go.set()


@contextmanager
def sending(target: str, *uploads: list[bytes], timeout: float | None = None) -> Iterator[list[Sending]]:
    """These uploads, of one connection, until the end of a ``with`` block."""
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel, ExitStack() as stack:
        calls = [Sending(channel, upload, timeout) for upload in uploads]
        for call in calls:
            stack.callback(call.close)
        yield calls


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "uploads"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path / "image.parquet", PIXELS)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".ome-tensor-uploads")


def check_reads(server: RunningServer) -> None:
    """The image is read, at once."""
    with connect(server.target, retry_for=0) as client:
        np.testing.assert_array_equal(client.tensor_view("image", layout="TZCYX").to_numpy(), PIXELS)


def errors_of(log: pytest.LogCaptureFixture) -> list[str]:
    """What the server has logged as its own fault."""
    servers = ("ome_tensor_server", "grpc._server", "grpc._cython")
    return [record.getMessage() for record in log.records if record.levelno >= logging.ERROR and record.name.startswith(servers)]


def test_idle_uploads_leave_reads_their_threads(folder: Path, image: Path) -> None:
    """Whether they have begun or not; those that are too many are told how many there may be."""
    idle: list[list[bytes]] = [messages_of(f"up{number}", 3)[: number % 3] for number in range(MANY)]
    with running_server([image], uploads=str(folder), max_concurrent_reads=2) as server:
        with sending(server.target, *idle) as calls:
            refused = wait_until(lambda: len(done := [call for call in calls if call.call.done()]) == MANY - AT_ONCE and done, "")
            for call in refused:
                error = call.error()
                assert isinstance(error, Overloaded)
                assert (
                    error.message == "this server answers 16 calls of UploadDataset at once, and all are taken; try again later"
                )
                assert (error.field, error.value) == ("UploadDataset", "16")
            check_reads(server)
            with connect(server.target) as client, pytest.raises(Overloaded, match="16 calls of UploadDataset"):
                client.upload("mine", PIXELS)
        wait_until(lambda: files(folder) == [], "nothing of them is left")
        with connect(server.target) as client:
            client.upload("mine", PIXELS)
            assert [dataset.name for dataset in client.datasets()] == ["image", "mine"]


def test_an_upload_that_stalls_is_ended(folder: Path, server_log: pytest.LogCaptureFixture) -> None:
    """It is told why, and its part is gone; one that is slow and goes on is taken."""

    def slowly(messages: list[bytes]) -> Iterator[bytes]:
        for message in messages:
            yield message
            time.sleep(0.3)

    with running_server([], uploads=str(folder), stall_seconds=1.0) as server:
        begun = time.monotonic()
        whole = messages_of("up", 4)
        with (
            sending(server.target, [], whole[:1], whole[:2], whole) as calls,
            grpc.insecure_channel(server.target) as channel,
        ):
            slow: Any = channel.stream_unary(ADMIN_METHODS["UploadDataset"].path).future(slowly(messages_of("slow", 4)))
            wait_until(lambda: len(files(folder)) == 4, "they are received")
            for call in calls:
                error = call.error()
                assert isinstance(error, DeadlineExceeded)
                assert (
                    error.message
                    == "UploadDataset: the client sent nothing for 1 s, which this server waits at most (stall_seconds)"
                )
                assert (error.field, error.value) == ("stall_seconds", "1.0")
            assert 1 <= time.monotonic() - begun < 10
            slow.result(20)
        assert time.monotonic() - begun >= 1.2
        assert files(folder) == ["slow.arrows"]
        with connect(server.target) as client:
            assert [dataset.name for dataset in client.datasets()] == ["slow"]
    assert errors_of(server_log) == []


@contextmanager
def hanging_readers() -> Iterator[None]:
    """The processes that read sources do nothing."""
    readers = [child for child in psutil.Process().children() if "ome_tensor_server.loader" in child.cmdline()]
    assert readers
    try:
        for reader in readers:
            os.kill(reader.pid, signal.SIGSTOP)
        yield
    finally:
        for reader in readers:
            with suppress(ProcessLookupError):
                os.kill(reader.pid, signal.SIGCONT)


def test_calls_that_wait_leave_reads_their_threads(tmp_path: Path, image: Path) -> None:
    """For a dataset to be loaded, or for a source to be looked at."""
    write_image(tmp_path / "other.parquet", PIXELS)
    write_image(tmp_path / "third.parquet", PIXELS)
    requests: dict[str, Message] = {
        "LoadDataset": pb.LoadDatasetRequest(name="other"),
        "RegisterDataset": pb.RegisterDatasetRequest(path=str(tmp_path / "third.parquet")),
    }

    def ask(channel: grpc.Channel, name: str) -> Any:
        method = ADMIN_METHODS[name]
        call = channel.unary_stream(method.path) if method.streaming else channel.unary_unary(method.path)
        data = requests[name].SerializeToString()
        try:
            return list(call(data)) if method.streaming else call(data)
        except grpc.RpcError as error:
            return from_rpc_error(error)

    paths = [image, tmp_path / "other.parquet"]
    with (
        running_server(paths, preload=False, roots=str(tmp_path), max_concurrent_reads=2) as server,
        connect(server.target) as client,
        grpc.insecure_channel(server.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel,
        futures.ThreadPoolExecutor(2 * MANY) as threads,
    ):
        check_reads(server)
        with hanging_readers():
            calls = {name: [threads.submit(ask, channel, name) for _ in range(MANY)] for name in requests}
            for name, several in calls.items():
                refused = wait_until(lambda s=several: len(done := [c for c in s if c.done()]) == MANY - AT_ONCE and done, name)
                for call in refused:
                    assert isinstance(call.result(), Overloaded)
                    assert call.result().field == name
            check_reads(server)
            assert client.dataset("other").state is DatasetState.LOADING
        for several in calls.values():
            assert sum(not isinstance(call.result(20), Exception) for call in several) == AT_ONCE
        assert client.dataset("other").state is DatasetState.LOADED


def test_whoever_may_not_upload_takes_no_place(folder: Path) -> None:
    """Before anything of the upload has come."""
    with running_server([], uploads=str(folder), admin="off") as server, sending(server.target, []) as (call,):
        assert "does not let you change" in call.error().message


@pytest.mark.parametrize("way", ["cancel", "deadline", "close"])
def test_an_upload_that_is_given_up(folder: Path, server_log: pytest.LogCaptureFixture, way: str) -> None:
    """Behind any of its messages, the last one too: it is no dataset, and no fault of the server's."""
    whole = messages_of("up", 6)
    with running_server([], uploads=str(folder)) as server, connect(server.target) as client:
        for sent in range(len(whole) + 1):
            for _ in range(3):
                with sending(server.target, whole[:sent], timeout=0.05 if way == "deadline" else None) as (call,):
                    if way == "deadline":
                        assert isinstance(call.error(), DeadlineExceeded)
                    else:
                        assert call.has_sent.wait(20)
                    if way == "cancel":
                        call.call.cancel()
                if way != "deadline":
                    assert call.call.cancelled()
        wait_until(lambda: files(folder) == [], "nothing is left")
        assert client.datasets() == []
        client.upload("up", PIXELS)
    assert errors_of(server_log) == []


def test_an_upload_that_is_given_up_while_it_is_checked(folder: Path, image: Path) -> None:
    """All of it has come, and yet it is not wanted."""
    with running_server([image], uploads=str(folder)) as server, connect(server.target) as client:
        with grpc.insecure_channel(server.target) as channel, hanging_readers():
            call: Any = channel.stream_unary(ADMIN_METHODS["UploadDataset"].path).future(iter(messages_of("up", 2)))
            size = len(arrow_stream())
            wait_until(lambda: [path for path in folder.glob("*.part") if path.stat().st_size == size], "all of it has come")
            time.sleep(0.1)
            call.cancel()
            time.sleep(0.1)
        wait_until(lambda: files(folder) == [], "nothing is left")
        assert [dataset.name for dataset in client.datasets()] == ["image"]


def test_an_upload_whose_token_is_revoked_while_it_is_checked(tmp_path: Path, folder: Path, image: Path) -> None:
    """All of it has come, and yet nothing is changed by whoever may not any more."""
    path = tmp_path / "tokens.json"
    token, text = tokens.create(path, parse_scopes(["write:*"]))
    with running_server([image], uploads=str(folder), tokens=str(path)) as server:
        with grpc.insecure_channel(server.target) as channel:
            with hanging_readers():
                call: Any = channel.stream_unary(ADMIN_METHODS["UploadDataset"].path).future(
                    iter(messages_of("up", 2)), metadata=(("authorization", f"Bearer {text}"),)
                )
                size = len(arrow_stream())
                wait_until(lambda: [part for part in folder.glob("*.part") if part.stat().st_size == size], "all of it has come")
                time.sleep(0.1)
                tokens.revoke(path, token.id)
            assert call.code() is grpc.StatusCode.UNAUTHENTICATED
        wait_until(lambda: files(folder) == [], "nothing is left")


class Cut:
    """Passes one connection on to a server, and cuts it once so many bytes have come from the client.

    Attributes:
        target: ``HOST:PORT`` to connect to.
        sent: What was passed on.
    """

    def __init__(self, target: str, after: int) -> None:
        host, _, port = target.rpartition(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = b""
        self._thread = threading.Thread(target=self._run, args=((host, int(port)), after))
        self._thread.start()

    def _run(self, server: tuple[str, int], after: int) -> None:
        with self._listener:
            client, _ = self._listener.accept()
        with client, socket.create_connection(server) as upstream:
            back = threading.Thread(target=self._back, args=(upstream, client))
            back.start()
            while len(self.sent) < after and (data := client.recv(after - len(self.sent))):
                upstream.sendall(data)
                self.sent += data
            for end in (upstream, client):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            back.join()

    @staticmethod
    def _back(upstream: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := upstream.recv(1 << 16):
                client.sendall(data)

    def close(self) -> None:
        """Returns once all is cut."""
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def is_whole(self) -> bool:
        """Whether the frame that ends a stream was passed on: a frame is its length in 3 bytes, type, flags, stream, and the rest."""
        place = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        while place + 9 <= len(self.sent):
            length, kind, flags = int.from_bytes(self.sent[place : place + 3]), self.sent[place + 3], self.sent[place + 4]
            place += 9 + length
            if kind == 0 and flags & 1 and place <= len(self.sent):
                return True
        return False


def test_an_upload_that_is_cut_anywhere(folder: Path, server_log: pytest.LogCaptureFixture) -> None:
    """At every so many bytes of what a client sends, up to the very end: it is no dataset until that has come."""
    whole = messages_of("up", 2)
    cuts = 0
    with running_server([], uploads=str(folder)) as server, connect(server.target) as client:
        while True:
            cut = Cut(server.target, 1 + 43 * cuts)
            with grpc.insecure_channel(cut.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                call: Any = channel.stream_unary(ADMIN_METHODS["UploadDataset"].path).future(iter(whole))
                assert call.exception(20) is not None or cut.is_whole
            cut.close()
            if cut.is_whole:
                break
            cuts += 1
            assert client.datasets() == []
        assert cuts > 30
        wait_until(lambda: [name for name in files(folder) if name.endswith(".part")] == [], "no part is left")
    assert errors_of(server_log) == []


def test_a_client_whose_data_fail(folder: Path, server_log: pytest.LogCaptureFixture) -> None:
    """What it sent until then is forgotten, and the server says whose doing it was."""

    def batches() -> Iterator[pa.RecordBatch]:
        yield from table.to_batches()
        raise RuntimeError("the disk has gone")

    table = pa.table({"image": pa.array([record_of(PIXELS)])})
    with running_server([], uploads=str(folder)) as server, connect(server.target) as client:
        with pytest.raises(Exception, match="the disk has gone"):
            client.upload("up", pa.RecordBatchReader.from_batches(table.schema, batches()))
        wait_until(lambda: "method=UploadDataset" in server_log.text, "the server has noticed")
        assert files(folder) == []
        assert client.datasets() == []
    assert errors_of(server_log) == []
    assert "status=CANCELLED" in server_log.text
