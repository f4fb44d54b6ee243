"""Clients and views in other processes: forked, spawned, pickled, and in the workers of torch's DataLoader.

Each case runs in a process of its own against a server elsewhere, as it does for a user, and a hang is a failure.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.integration.processes import run_script

from ome_tensor import InvalidArgument
from ome_tensor_client import Client, Options, connect
from ome_tensor_server.testing import RunningServer

# A fork while other threads are inside gRPC is not among them: its core then skips its own preparations for a fork.
STATES = ["fresh", "used", "closed", "midstream", "prefetching"]
CONTEXTS = ["fork", "forkserver", "spawn"]

#: grpcio survives a fork of a process that has used it since 1.74 (its core's fork support is on from then).
OLD_GRPC = tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 74)


@pytest.fixture(scope="module")
def pixels_file(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    """The pixels for scripts to compare with."""
    path = tmp_path_factory.mktemp("pixels") / "pixels.npy"
    np.save(path, pixels)
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork is the default on Linux only")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_client_in_another_process(served: RunningServer, pixels_file: Path, context: str, state: str) -> None:
    """Right pixels in the child, in bounded time; and the parent goes on, its running read included."""
    if context == "fork" and state != "fresh" and OLD_GRPC:
        pytest.skip(f"grpcio {grpc.__version__} does not survive a fork")
    if context != "fork" and state in ("closed", "prefetching"):
        pytest.skip("nothing is inherited: the other states say it all")
    assert context in multiprocessing.get_all_start_methods()
    run_script("fork_client.py", served.target, pixels_file, context, state)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("state", ["fresh", "used"])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_view_in_a_data_loader(served: RunningServer, pixels_file: Path, context: str, state: str) -> None:
    """Sharded over workers, two epochs, every tile once each."""
    run_script("loader_client.py", served.target, pixels_file, context, state)


def test_clients_pickle_as_target_and_options(client: Client) -> None:
    """A copy connects for itself and behaves alike."""
    original = connect(client.target, timeout=7, retry_for=3, prefetch_bytes=1000, message_bytes=2000)
    copy = pickle.loads(pickle.dumps(original))
    assert (copy.target, copy.options) == (original.target, original.options)
    assert copy.options == Options(timeout=7, retry_for=3, prefetch_bytes=1000, message_bytes=2000)
    with copy, original:
        assert copy.datasets() == original.datasets()


@pytest.mark.parametrize("used", [False, True])
def test_views_pickle_as_their_plan(client: Client, pixels: np.ndarray, used: bool) -> None:
    """Whatever has been read by then stays behind."""
    view = client.tensor_view("image", t=1, c=[1, 0], roi=(10, 20, 100, 50), layout="ZCYX", dtype="float32")
    wanted = pixels[1, :, [1, 0], 20:70, 10:110].swapaxes(0, 1).astype(np.float32)
    if used:
        view.to_numpy()
    data = pickle.dumps(view)
    assert len(data) < 5000
    copy = pickle.loads(data)
    np.testing.assert_array_equal(copy.to_numpy(), wanted, strict=True)
    np.testing.assert_array_equal(copy[1:, 0].to_numpy(), wanted[1:, 0], strict=True)


def test_closing_is_not_the_end(client: Client, pixels: np.ndarray) -> None:
    """A closed client connects anew when it is used, and so do its views."""
    with connect(client.target) as other:
        view = other.tensor_view("image", c=1)
        assert view.shape == (2, 3, 1, 240, 270)
    np.testing.assert_array_equal(view.to_numpy(), pixels[:, :, 1:], strict=True)
    assert [dataset.name for dataset in other.datasets()] == ["image"]
    other.close()
    other.close()


@pytest.mark.parametrize(
    "target,options,words",
    [
        ("", {}, "target"),
        ("  ", {}, "target"),
        (50051, {}, "target"),
        ("localhost:1", {"timeout": 0}, "timeout"),
        ("localhost:1", {"timeout": -1}, "timeout"),
        ("localhost:1", {"timeout": True}, "timeout"),
        ("localhost:1", {"retry_for": "10"}, "retry_for"),
        ("localhost:1", {"prefetch_bytes": 0}, "prefetch_bytes"),
        ("localhost:1", {"message_bytes": -1}, "message_bytes"),
        ("localhost:1", {"timeout": float("nan")}, "timeout"),
        ("localhost:1", {"message_bytes": 0.5}, "message_bytes"),
        ("localhost:1", {"message_bytes": 2**64}, "message_bytes"),
        ("localhost:1", {"connections": 0}, "connections"),
        ("localhost:1", {"connections": 17}, "connections"),
        ("localhost:1", {"connections": True}, "connections"),
        ("localhost:1", {"connections": 2.0}, "connections"),
        ("localhost:1", {"reuse_memory": 1}, "reuse_memory"),
    ],
)
def test_what_connect_refuses(target: object, options: dict[str, object], words: str) -> None:
    """At the call, naming the argument."""
    with pytest.raises(InvalidArgument, match=words) as caught:
        connect(target, **options)  # type: ignore[arg-type]
    assert caught.value.field == words


def test_unknown_arguments_are_type_errors(client: Client) -> None:
    """As of any Python function."""
    with pytest.raises(TypeError, match="patience"):
        connect("localhost:1", patience=3)
    with pytest.raises(TypeError, match="zoom"):
        client.tensor_view("image", zoom=2)
