"""What is uploaded of arrays: what is said of them, and the memory that sending one takes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
from tests.integration.images import random_pixels, record_of

from ome_tensor import InvalidArgument, InvalidRecord
from ome_tensor_client import Client, connect
from ome_tensor_proto.methods import ADMIN_METHODS
from ome_tensor_proto.status import from_rpc_error
from ome_tensor_proto.v1 import admin_service_pb2 as pb
from ome_tensor_server.testing import running_server


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with running_server([], uploads=str(tmp_path / "uploads")) as server, connect(server.target) as connected:
        yield connected


@pytest.mark.parametrize(
    "field, value",
    [
        ("physical_size", "abc"),
        ("physical_size", ("1", "1", "1")),
        ("physical_size", (1.0, 1.0)),
        ("physical_size", (1.0, 1.0, 1.0, 1.0)),
        ("physical_size", (1.0, math.nan, 1.0)),
        ("physical_size", (1.0, math.inf, 1.0)),
        ("physical_size", (1.0, 0.0, 1.0)),
        ("physical_size", (-1.0, 1.0, 1.0)),
        ("physical_size", 0.5),
        ("physical_size", [object()] * 3),
        ("axes", 7),
        ("axes", ["Y", "X"]),
        ("axes", "YY"),
        ("axes", "QX"),
        ("axes", "X"),
        ("image_type", None),
        ("image_type", 3),
        ("image_type", "mask"),
        ("image_type", ["label"]),
        ("column", ""),
        ("column", None),
        ("column", 3),
        ("column", "\udcff"),
        ("channel_names", "a"),
        ("channel_names", [1]),
    ],
)
def test_odd_arguments_are_named_before_anything_is_sent(client: Client, field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=field.partition("_")[0]) as caught:
        client.upload("up", np.zeros((2, 3), np.uint8), **{field: value})
    assert caught.value.field == field
    assert client.datasets() == []


@pytest.mark.parametrize(
    "field, value", [("axes", "YX"), ("channel_names", ["a"]), ("physical_size", (1, 1, 1)), ("image_type", "label")]
)
def test_what_is_for_arrays(client: Client, field: str, value: Any) -> None:
    table = pa.table({"image": pa.array([record_of(random_pixels((1, 1, 1, 2, 3)))])})
    with pytest.raises(InvalidArgument, match=f"{field} is for arrays") as caught:
        client.upload("up", table, **{field: value})
    assert caught.value.field == field


def test_sizes_may_be_known_in_part(client: Client) -> None:
    client.upload("up", np.zeros((2, 3), np.uint8), physical_size=(None, 0.5, np.float32(0.25)))
    meta = client.image("up").meta
    assert meta is not None
    assert meta.physical_size == (None, 0.5, 0.25)


def test_a_column_without_a_name_is_refused(tmp_path: Path) -> None:
    """Sent by a client that does not look."""
    table = pa.table([pa.array([record_of(random_pixels((1, 1, 1, 2, 3)))]), pa.array([1])], names=["image", ""])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    messages = [
        pb.UploadDatasetRequest(header=pb.UploadHeader(name="up")),
        pb.UploadDatasetRequest(payload=sink.getvalue().to_pybytes()),
    ]
    with running_server([], uploads=str(tmp_path / "uploads")) as server, grpc.insecure_channel(server.target) as channel:
        call = channel.stream_unary(ADMIN_METHODS["UploadDataset"].path)
        with pytest.raises(grpc.RpcError) as caught:
            call(iter(message.SerializeToString() for message in messages), timeout=20)
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidRecord)
        assert "a column without a name" in error.message


@pytest.mark.parametrize("order", ["C", "F", "reversed", "swapped"])
def test_however_an_array_lies_in_memory(client: Client, order: str) -> None:
    pixels = random_pixels((2, 3, 40, 50))
    given = {
        "C": pixels,
        "F": np.asfortranarray(pixels),
        "reversed": np.ascontiguousarray(pixels[::-1, :, ::-1])[::-1, :, ::-1],
        "swapped": pixels.astype(pixels.dtype.newbyteorder()),
    }[order]
    client.upload("up", given)
    np.testing.assert_array_equal(client.tensor_view("up", layout="ZCYX").to_numpy(), pixels)


CLIENT = """
import resource, sys
import numpy as np
from ome_tensor_client import connect

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

target, kind, path = sys.argv[1:]
with connect(target) as client:
    client.upload("small", np.zeros((2, 2000, 2000), np.uint16))
    data = np.full((64, 1000, 2000), 3, np.uint16) if kind != "npy" else path
    data = data.transpose(0, 2, 1) if kind == "turned" else data
    before = peak()
    client.upload("large", data)
    print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["array", "turned", "npy"])
def test_an_array_is_not_there_twice(tmp_path: Path, kind: str) -> None:
    """256 MB are sent with a few planes of 4 MB beside them. (What is mapped of a file counts, as far as the system leaves it in memory.)"""
    if kind == "npy":
        np.save(tmp_path / "a.npy", np.full((64, 1000, 2000), 3, np.uint16))
    with running_server([], uploads=str(tmp_path / "uploads")) as server:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, server.target, kind, str(tmp_path / "a.npy")],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        with connect(server.target) as client:
            assert client.tensor_view("large", t=0, c=63, layout="YX").to_numpy().mean() == 3
    assert float(done.stdout) < (300 if kind == "npy" else 64)
