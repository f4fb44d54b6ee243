"""Names that a client is given: what cannot be sent is refused at the call, naming the argument, without traffic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ome_tensor import InvalidArgument, TensorView, Unavailable
from ome_tensor_client import Client, connect
from ome_tensor_client.health import check_health

NAMES: dict[str, tuple[Callable[[Client, Any], object], str]] = {
    "images": (lambda client, name: client.images(name), "dataset"),
    "images of a column": (lambda client, name: client.images("dataset", name), "column"),
    "dataset": (lambda client, name: client.dataset(name), "name"),
    "image": (lambda client, name: client.image(name), "key"),
    "tensor_view": (lambda client, name: client.tensor_view(name), "key"),
    "target": (lambda client, name: connect(name), "target"),
}


@pytest.mark.parametrize("name", [5, 3.5, b"bytes", ["a"], "\udcff", "a\ud800b:1"], ids=repr)
@pytest.mark.parametrize("use, field", NAMES.values(), ids=NAMES)
def test_names_are_text(use: Callable[[Client, Any], object], field: str, name: object) -> None:
    """Not protobuf's TypeError, nor an encoding's error from inside it."""
    with connect("127.0.0.1:9", retry_for=0, timeout=0.1) as client, pytest.raises(InvalidArgument) as caught:
        use(client, name)
    assert caught.value.field == field
    # Of a list of targets one is to blame.
    assert (repr(name[0]) if field == "target" and isinstance(name, list) else repr(name)) in str(caught.value)
    # Whoever prints it can.
    str(caught.value).encode()


@pytest.mark.parametrize("port", ["9" * 5000, "00080000", "0", "65536", "-1", ""])
def test_ports(port: str) -> None:
    """Also those that Python would not even read."""
    with pytest.raises(InvalidArgument, match="target must be HOST:PORT") as caught:
        connect(f"127.0.0.1:{port}")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "targets, words",
    [
        ([], "a list of 1 to 64 of them"),
        (["a:1"] * 65, "a list of 1 to 64 of them"),
        (["a:1", "b:2", "a:1"], "target 'a:1' is named twice"),
        ("a:1,b:2,a:1", "target 'a:1' is named twice"),
        ("a:1,,b:2", "target must be HOST:PORT, not ''"),
        (["a:1", 5], "target must be HOST:PORT, not 5"),
        ({"a:1"}, "target must be HOST:PORT, or a list"),
        (",".join(f"a:{port}" for port in range(1, 66)), "a list of 1 to 64 of them"),
        # In a list each is one: where a comma is meant to separate two, the text alone says so.
        (["a,b:2"], "target must be HOST:PORT, not 'a,b:2'"),
    ],
)
def test_several_targets(targets: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        connect(targets)
    assert caught.value.field == "target"


def test_what_is_of_one_server() -> None:
    """What would make several differ is refused, and so is to map from one of them."""
    with connect(["a:1", "b:2"]) as client:
        assert (client.target, client.targets) == ("a:1,b:2", ("a:1", "b:2"))
        with pytest.raises(InvalidArgument, match="administration is of one server"):
            client.admin.refresh("x")
        with pytest.raises(InvalidArgument, match="an upload is of one server"):
            client.upload("x", None)
    with pytest.raises(InvalidArgument, match="a health check is of one server"):
        check_health("a:1,b:2")
    with pytest.raises(InvalidArgument, match="transport='mapped' is of one server"):
        connect(["a:1", "b:2"], transport="mapped")
    for one in (" 127.0.0.1:1\n", ["127.0.0.1:1"]):
        with pytest.raises(Unavailable, match=r"^127\.0\.0\.1:1: connection refused"):
            check_health(one)  # type: ignore[arg-type]
    assert connect("a:1").targets == connect(["a:1"]).targets == ("a:1",)


@pytest.mark.parametrize(
    "selection, words",
    [
        ({"t": 2**63}, "t index 9223372036854775808 out of range: it does not fit in 64 bits"),
        ({"z": [0, -(2**63) - 1]}, "z index -9223372036854775809 out of range: it does not fit in 64 bits"),
        ({"c": range(2**70, 2**70 + 2)}, "c index 1180591620717411303424 out of range"),
        ({"t": 10**5000}, "t index of 16610 bits out of range"),
        ({"roi": (0, 0, 1, 2**64)}, "roi is out of bounds: value 18446744073709551616 does not fit in 64 bits"),
        ({"roi_nd": (0, 0, 1, 10**5000)}, "roi_nd is out of bounds: value of 16610 bits does not fit in 64 bits"),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, str) else "",
)
def test_numbers_beyond_64_bits(selection: dict[str, Any], words: str) -> None:
    """The same words here and there, before anything is sent."""
    record = {"pixels_meta": {f"size_{axis}": 4 for axis in "tzcyx"}}
    with pytest.raises(InvalidArgument) as here:
        TensorView(record, **selection)
    with connect("127.0.0.1:9", retry_for=0) as client, pytest.raises(InvalidArgument) as there:
        _ = client.tensor_view("dataset", **selection).shape
    assert str(here.value) == str(there.value)
    assert words in str(here.value)
    assert type(here.value) is type(there.value)
