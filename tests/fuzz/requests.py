"""Requests of every method that a server has, most of which are wrong: the input of a number is always the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz import valid
from tests.fuzz.messages import MessageMaker, damaged, noise
from tests.fuzz.valid import HEALTH, REFLECTION, Names

from ome_tensor_proto.methods import ADMIN_METHODS, MAY_MOVE, METHODS, ONE_MESSAGE, Method
from ome_tensor_proto.v1 import admin_service_pb2 as admin_pb

__all__ = ["KINDS", "Request", "RequestMaker", "method_of"]

#: How often which method is called, of those that change nothing and of those that do.
_READING = {
    "ReadTiles": 8,
    "ResolveView": 6,
    "SelectImages": 4,
    "ListImages": 3,
    "MapDataset": 2,
    "GetDataset": 1,
    "ListDatasets": 1,
}
_CHANGING = {"UploadDataset": 4, "RegisterDataset": 2, "LoadDataset": 2, "RefreshDataset": 1, "RemoveDataset": 1, "CancelLoad": 1}

_ALL: dict[str, Method] = {
    method.path: method for method in (*METHODS.values(), *ADMIN_METHODS.values(), *HEALTH.values(), REFLECTION)
}

#: What is wrong with a request.
KINDS = ("built", "tweaked", "mutated", "random", "metadata", "nowhere")


@dataclass(frozen=True, slots=True)
class Request:
    """One call.

    Attributes:
        lane, number: Which input it is.
        kind: One of :data:`KINDS`.
        path: Of the method.
        messages: What is sent; several only where the method takes a stream.
        metadata: Sent along.
        timeout: Seconds that the caller waits; 0: as long as any good answer takes.
        cancel_after: Seconds after which it gives up; negative: it does not.
        compressed: Whether its messages are.
    """

    lane: str
    number: int
    kind: str
    path: str
    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout: float = 0.0
    cancel_after: float = -1.0
    compressed: bool = False

    @property
    def method(self) -> Method | None:
        """What it calls; ``None`` where there is no such method."""
        return method_of(self.path)

    def data(self) -> bytes:
        """Its messages as gRPC frames them."""
        return b"".join(b"\0" + len(one).to_bytes(4, "big") + one for one in self.messages)


def method_of(path: str) -> Method | None:
    """The method of a path, or ``None``."""
    return _ALL.get(path)


class RequestMaker:
    """Makes requests by number.

    Args:
        seed: Of all of them.
        lane: ``requests``, which change nothing, or ``changes``, which may.
        names: What the server has.
    """

    def __init__(self, seed: int, lane: str, names: Names) -> None:
        self._seed, self._lane = seed, lane
        changes = lane == "changes"
        self._maker = MessageMaker(names.words(names.changed if changes else (*names.read, "nothing")))
        seeds = valid.changes(names) if changes else valid.reads(names)
        self._seeds = {path: tuple(seeds.get(path, ())) or (method.request(),) for path, method in _ALL.items()}
        self._others = tuple(seed.SerializeToString() for several in self._seeds.values() for seed in several)
        self._upload = names.upload
        weights = _CHANGING if changes else _READING
        methods = [method for method in _ALL.values() if method.name in weights]
        self._paths = [method.path for method in methods for _ in range(weights[method.name])]
        if not changes:
            self._paths += [method.path for method in (*HEALTH.values(), REFLECTION)]

    def request(self, number: int) -> Request:
        """The request of a number."""
        chance = random.Random(f"{self._seed}/{self._lane}/{number}")
        kind = chance.choices(KINDS, (6, 8, 6, 1, 3, 1))[0]
        path = chance.choice(self._paths) if kind != "nowhere" else _nowhere(chance)
        method = _ALL.get(path)
        messages = self._messages(kind, method, chance)
        metadata = _metadata(chance) if kind == "metadata" or chance.random() < 0.05 else ()
        if method is not None and method.streaming and method in METHODS.values() and chance.random() < 0.15:
            metadata += ((ONE_MESSAGE, "1"),)
        moment = chance.random()
        return Request(
            lane=self._lane,
            number=number,
            kind=kind,
            path=path,
            messages=messages,
            metadata=metadata,
            timeout=chance.choice((1e-9, 1e-6, 1e-4, 1e-3, 3e-3, 1e9)) if moment < 0.03 else 0.0,
            cancel_after=chance.choice((0.0, 0.0, 1e-4, 1e-3, 5e-3)) if moment > 0.96 else -1.0,
            compressed=chance.random() < 0.03,
        )

    def _messages(self, kind: str, method: Method | None, chance: random.Random) -> tuple[bytes, ...]:
        count = chance.choice((1, 1, 1, 2, 3, 0)) if method and method.takes_stream else 1
        if method is ADMIN_METHODS["UploadDataset"] and chance.random() < 0.3:
            return self._whole_upload(chance)
        return tuple(self._message(kind, method, chance) for _ in range(count))

    def _message(self, kind: str, method: Method | None, chance: random.Random) -> bytes:
        if method is None or kind == "random":
            return noise(chance)
        if kind == "built":
            return self._maker.message(method.request.DESCRIPTOR, chance).SerializeToString()
        message = method.request()
        message.CopyFrom(chance.choice(self._seeds[method.path]))
        if kind == "tweaked":
            for _ in range(chance.choice((1, 1, 2, 3))):
                self._maker.tweak(message, chance)
        data: bytes = message.SerializeToString()
        return damaged(data, chance, self._others) if kind == "mutated" else data

    def _whole_upload(self, chance: random.Random) -> tuple[bytes, ...]:
        """An upload whose header is right, of bytes that are not, or seldom are: each is put on disk and read by a process of its own."""
        data = self._upload if chance.random() < 0.1 else damaged(self._upload, chance)
        header = admin_pb.UploadHeader(name=self._maker.text("name", chance), replace=chance.random() < 0.8)
        header.total_bytes = chance.choice((0, len(data), len(data), 1, (1 << 64) - 1))
        cut = chance.randrange(len(data) + 1)
        messages = [
            admin_pb.UploadDatasetRequest(header=header, payload=data[:cut]),
            admin_pb.UploadDatasetRequest(payload=data[cut:]),
        ]
        if chance.random() < 0.1:
            messages.append(messages[0])
        return tuple(message.SerializeToString() for message in messages)


def _nowhere(chance: random.Random) -> str:
    """A path that no method has."""
    return chance.choice(
        (
            "/",
            "//",
            "/a",
            "/ome_tensor_proto.v1.TensorService",
            "/ome_tensor_proto.v1.TensorService/",
            "/ome_tensor_proto.v1.TensorService/Delete",
            "/ome_tensor_proto.v1.TensorService/ListDatasets/",
            "/ome_tensor_proto.v1.TensorService/listdatasets",
            "/ome_tensor_proto.v2.TensorService/ListDatasets",
            "/grpc.health.v1.Health/Nothing",
            "/%2e%2e/x",
            "/" + "x" * 3000,
        )
    )


#: Values of metadata that are text; gRPC's own library sends nothing else (``port.py`` does).
_VALUES: tuple[Callable[[random.Random], str], ...] = (
    lambda chance: "",
    lambda chance: "1",
    lambda chance: "%zz%2",
    lambda chance: "%00%0a%0d",
    lambda chance: "%FF%FE" * 20,
    lambda chance: "a, b;q=0.1, *",
    lambda chance: "=?utf-8?q?x?=",
    lambda chance: "x" * chance.choice((1000, 2000, 4000, 9000, 17_000)),
    lambda chance: "".join(chr(chance.randrange(32, 127)) for _ in range(chance.randrange(200))).strip(),
)
_AUTHORIZATION = (
    "",
    "Bearer",
    "Bearer ",
    "bearer  x",
    "Bearer " + "A" * 4000,
    "Bearer a.b.c",
    "Bearer eyJhbGciOiJub25lIn0.e30.",
    "Basic Og==",
    "Basic !!!!",
    "Basic",
    "Negotiate YII=",
    'Digest username="x", realm=',
    "Bearer a, Bearer b",
    "\\",
    "%42earer x",
)
_KEYS = ("x", "x-fuzz", "user-agent", "cookie", "accept-encoding", "traceparent", "host", "ome-tensor", "a" * 300, "0", "-", "_.")


def _metadata(chance: random.Random) -> tuple[tuple[str, str | bytes], ...]:
    made: list[tuple[str, str | bytes]] = []
    # Over 8 KiB gRPC may refuse them, and over 16 KiB does: that takes it 0.2 s, and is known.
    most, size = chance.choice((20_000, *[6000] * 40)), 0
    for _ in range(chance.choice((1, 1, 2, 5, 60))):
        how = chance.randrange(6)
        if how == 0:
            made.append(
                (
                    chance.choice(("x-fuzz-bin", "traceparent-bin", "grpc-trace-bin")),
                    chance.randbytes(chance.choice((0, 1, 33, 3000))),
                )
            )
        elif how == 1:
            made.append(("authorization", chance.choice(_AUTHORIZATION)))
        elif how == 2:
            made.append((chance.choice((ONE_MESSAGE, MAY_MOVE)), chance.choice(_VALUES)(chance)))
        else:
            made.append((chance.choice(_KEYS), chance.choice(_VALUES)(chance)))
        # What gRPC counts: 32 bytes for each on top.
        size += len(made[-1][0]) + len(made[-1][1]) + 32
        if size > most:
            made.pop()
            break
    return tuple(made)
