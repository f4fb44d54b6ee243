"""Bytes on the port: what is no HTTP/2, what nearly is, and what real clients have sent, in another order."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tests.fuzz import http2
from tests.fuzz.calls import Caller
from tests.fuzz.http2 import PREFACE, Frame, frame, frames, grpc_headers, settings
from tests.fuzz.messages import damaged, noise
from tests.fuzz.requests import RequestMaker
from tests.fuzz.valid import Names

__all__ = ["Attack", "PortFuzz"]

#: Seconds that the server gets to say something, or to hang up; what it does then is its own affair.
_PATIENCE = 0.04

#: Frames of a flood, at most.
_FLOOD = 1500

#: Requests that are recorded, and of which lanes.
_RECORDED = (("requests", 60), ("changes", 12))

#: What gRPC's own end says with INTERNAL: of what is no HTTP/2, and of messages that are framed or compressed wrongly. Nothing of it comes from a
#: handler of this project.
_GRPCS_OWN = (
    b"Failed parsing HTTP/2",
    b"Error parsing '",
    b"Metadata keys cannot be zero length",
    b"Duplicate '",
    b"Illegal header",
    b"Compression bit set but no encoding configured",
    b"Decompression failed",
)


@dataclass(frozen=True, slots=True)
class Attack:
    """What is sent on one connection.

    Attributes:
        number: Which it is.
        kind: What is wrong with it.
        pieces: Its bytes; between them the server gets a moment.
        end: How the connection ends: ``close``, ``half`` (nothing more is sent, but read), or ``reset``.
    """

    number: int
    kind: str
    pieces: tuple[bytes, ...]
    end: str


class PortFuzz:
    """Makes and sends attacks.

    Args:
        seed: Of all of them.
        target: ``HOST:PORT``.
        recorded: What real clients have sent, each with the preface.
    """

    def __init__(self, seed: int, target: str, recorded: Sequence[bytes]) -> None:
        self._seed = seed
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._recorded = [(data, frames(data)) for data in recorded]
        self._all = [one for _, several in self._recorded for one in several]

    @classmethod
    async def recorded(cls, seed: int, target: str, names: Names) -> PortFuzz:
        """With calls of a real client to this server recorded first."""
        streams: list[bytes] = []
        for lane, count in _RECORDED:
            streams += await _record(target, RequestMaker(seed, lane, names), count)
        return cls(seed, target, [stream for stream in streams if stream.startswith(PREFACE)])

    def attack(self, number: int) -> Attack:
        """The attack of a number."""
        chance = random.Random(f"{self._seed}/port/{number}")
        kind = chance.choices(tuple(_KINDS), [weight for _, weight in _KINDS.values()])[0]
        pieces = _KINDS[kind][0](self, chance)
        if chance.random() < 0.2:
            data = b"".join(pieces)
            cut = chance.randrange(len(data) + 1)
            pieces = [data[:cut], data[cut:]]
        return Attack(number, kind, tuple(pieces), chance.choice(("close", "close", "half", "reset")))

    async def send(self, attack: Attack) -> tuple[str, str | None]:
        """Send an attack; what came of it, and what is wrong with that, or ``None``."""
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        except OSError as error:
            return "no connection", f"the port takes no connection: {error}"
        answer = bytearray()
        reading = asyncio.create_task(_read(reader, answer))
        try:
            with suppress(OSError):  # Hung up on.
                for piece in attack.pieces:
                    writer.write(piece)
                    await asyncio.wait_for(writer.drain(), 5)
                    if len(attack.pieces) > 1:
                        await asyncio.sleep(0.001)
                if attack.end == "half" and writer.can_write_eof():
                    writer.write_eof()
            done, _ = await asyncio.wait({reading}, timeout=_PATIENCE)
        except TimeoutError:
            return "took nothing", None
        finally:
            reading.cancel()
            if attack.end == "reset":
                own: socket.socket = writer.get_extra_info("socket")
                with suppress(OSError):  # Closed already, as the server has reset it.
                    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        return _outcome(bytes(answer), bool(done))

    # -- what is wrong ---------------------------------------------------------------------------------------------------------------

    def _noise(self, chance: random.Random) -> list[bytes]:
        return [
            chance.choice(
                (
                    noise(chance, 5000),
                    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + noise(chance),
                )
            )
        ]

    def _preface(self, chance: random.Random) -> list[bytes]:
        return [PREFACE[: chance.choice((len(PREFACE), len(PREFACE), 3, 23))], noise(chance, 3000)]

    def _chosen(self, chance: random.Random) -> list[Frame]:
        return list(chance.choice(self._recorded)[1]) if self._recorded else [settings()]

    def _truncated(self, chance: random.Random) -> list[bytes]:
        data = PREFACE + b"".join(self._chosen(chance))
        return [data[: chance.randrange(len(data) + 1)]]

    def _reordered(self, chance: random.Random) -> list[bytes]:
        chosen = self._chosen(chance)
        for _ in range(chance.choice((1, 2, 6))):
            place = chance.randrange(len(chosen))
            how = chance.randrange(5)
            if how == 0:
                chance.shuffle(chosen)
            elif how == 1 and len(chosen) > 1:
                del chosen[place]
            elif how == 2:
                chosen[place:place] = [chosen[place]] * chance.choice((1, 1, 20))
            elif how == 3:
                chosen.insert(place, chance.choice(self._all or chosen))
            else:
                other = chance.randrange(len(chosen))
                chosen[place], chosen[other] = chosen[other], chosen[place]
        return [PREFACE, b"".join(chosen)]

    def _flipped(self, chance: random.Random) -> list[bytes]:
        chosen = self._chosen(chance)
        for _ in range(chance.choice((1, 3))):
            place = chance.randrange(len(chosen))
            one = bytearray(chosen[place])
            # Half of the time in the head, which says what the rest is.
            for _bit in range(chance.choice((1, 1, 4))):
                one[chance.randrange(min(len(one), chance.choice((9, len(one)))))] ^= 1 << chance.randrange(8)
            chosen[place] = bytes(one)
        return [PREFACE, b"".join(chosen)]

    def _lengths(self, chance: random.Random) -> list[bytes]:
        chosen = self._chosen(chance)
        place = chance.randrange(len(chosen))
        size = chance.choice((0, 1, len(chosen[place]) - 8, len(chosen[place]) - 10, 16_384, 16_385, (1 << 24) - 1))
        chosen[place] = max(0, size).to_bytes(3, "big") + chosen[place][3:]
        return [PREFACE, b"".join(chosen)]

    def _damaged(self, chance: random.Random) -> list[bytes]:
        """The messages inside of DATA frames are damaged, the frames are not."""
        chosen = [
            frame(one[3], one[4], int.from_bytes(one[5:9], "big"), damaged(one[9:], chance)[:16_000])
            if one[3:4] == b"\0"
            else one
            for one in self._chosen(chance)
        ]
        return [PREFACE, b"".join(chosen)]

    def _continuations(self, chance: random.Random) -> list[bytes]:
        part = http2.block([(b"x", b"y" * chance.choice((1, 100, 4000)))])
        count = min(chance.choice((5, 100, _FLOOD)), (4 << 20) // len(part))
        start = frame(http2.HEADERS, 0, 1, http2.block(grpc_headers("/x/y")))
        end = frame(http2.CONTINUATION, chance.choice((0, http2.END_HEADERS)), chance.choice((1, 1, 3)))
        return [PREFACE, settings(), start, frame(http2.CONTINUATION, 0, 1, part) * count, end]

    def _resets(self, chance: random.Random) -> list[bytes]:
        path = chance.choice(("/ome_tensor_proto.v1.TensorService/ListDatasets", "/grpc.health.v1.Health/Watch", "/x/y"))
        head, made = grpc_headers(path), []
        for number in range(chance.choice((10, 100, 400))):
            stream = 2 * number + 1
            made.append(http2.headers(stream, head))
            if chance.random() < 0.5:
                made.append(frame(http2.DATA, http2.END_STREAM, stream, bytes(5)))
            made.append(frame(http2.RST, 0, stream, chance.choice((8, 0, 99)).to_bytes(4, "big")))
        return [PREFACE, settings(), b"".join(made)]

    def _floods(self, chance: random.Random) -> list[bytes]:
        one = chance.choice(
            (
                settings(),
                settings([(chance.choice((1, 3, 4, 5, 6)), chance.choice((0, 1, 100, 65_535)))]),
                settings(flags=http2.ACK),
                frame(http2.PING, 0, 0, bytes(8)),
                frame(http2.PING, http2.ACK, 0, bytes(8)),
                frame(http2.PRIORITY, 0, 1, bytes(5)),
                frame(http2.WINDOW, 0, 0, (1).to_bytes(4, "big")),
                frame(http2.DATA, 0, 1),
                frame(http2.GOAWAY, 0, 0, bytes(8)),
                frame(77, 255, 5, b"?"),
            )
        )
        return [PREFACE, settings(), http2.headers(1, grpc_headers("/x/y")), one * chance.choice((10, 200, _FLOOD))]

    def _windows(self, chance: random.Random) -> list[bytes]:
        """Windows and settings of nonsense, around a read that is right."""
        odd = (0, 1, 65_535, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
        chosen = self._chosen(chance)
        for _ in range(chance.choice((1, 3, 10))):
            update = frame(http2.WINDOW, 0, chance.choice((0, 0, 1, 2, 3, 1 << 30)), chance.choice(odd).to_bytes(4, "big"))
            pairs = [
                (chance.choice((1, 2, 3, 4, 5, 6, 8, 0xFE03, 0xFFFF)), chance.choice(odd)) for _ in range(chance.choice((1, 4)))
            ]
            chosen.insert(chance.randrange(len(chosen) + 1), chance.choice((update, settings(pairs))))
        return [PREFACE, b"".join(chosen)]

    def _headers(self, chance: random.Random) -> list[bytes]:
        """Calls whose headers no library would send."""
        requests = [one for one in self._all if one[3:4] == b"\0" and len(one) < 9000]
        made = [PREFACE, settings()]
        for number in range(chance.choice((1, 1, 5))):
            stream = 2 * number + 1
            path = chance.choice(_PATHS)
            pairs = grpc_headers(path)
            for _ in range(chance.choice((1, 1, 2, 4))):
                chance.choice(_HEADER_FAULTS)(pairs, chance)
            made.append(http2.headers(stream, pairs))
            body = chance.choice(requests)[9:] if requests and chance.random() < 0.6 else b"\0" + bytes(4)
            if chance.random() < 0.5:
                size = chance.choice((0, 1, len(body), 1 << 20, (1 << 32) - 1))
                body = bytes((chance.choice((0, 0, 1, 2, 255)),)) + size.to_bytes(4, "big") + body[5:]
            made.append(frame(http2.DATA, http2.END_STREAM, stream, body))
        return [b"".join(made)]


_PATHS = (
    "/ome_tensor_proto.v1.TensorService/ReadTiles",
    "/ome_tensor_proto.v1.TensorService/ResolveView",
    "/ome_tensor_proto.v1.TensorService/ListDatasets",
    "/ome_tensor_proto.v1.AdminService/UploadDataset",
    "/ome_tensor_proto.v1.AdminService/CancelLoad",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "",
    "x",
    "/\0",
)
_Pairs = list[tuple[bytes, bytes]]


def _dropped(pairs: _Pairs, chance: random.Random) -> None:
    if pairs:
        del pairs[chance.randrange(len(pairs))]


def _doubled(pairs: _Pairs, chance: random.Random) -> None:
    if pairs:
        pairs.insert(chance.randrange(len(pairs)), chance.choice(pairs))


def _changed(pairs: _Pairs, chance: random.Random) -> None:
    if pairs:
        place = chance.randrange(len(pairs))
        pairs[place] = (
            pairs[place][0],
            chance.choice((b"", b"GET", b"application/json", b"\xff\xfe", b"a\0b", b"x" * 9000, noise(chance, 60))),
        )


def _added(pairs: _Pairs, chance: random.Random) -> None:
    name = chance.choice(tuple(_ODD_HEADERS))
    pairs.append((name, chance.choice(_ODD_HEADERS[name])))


_ODD_HEADERS: dict[bytes, tuple[bytes, ...]] = {
    b"grpc-timeout": (b"", b"0n", b"1n", b"-1m", b"99999999H", b"999999999999999H", b"1", b"1x", b"1.5S", b" 1S", b"5m", b"\xff"),
    b"grpc-encoding": (b"gzip", b"deflate", b"identity", b"snappy", b"", b"\xff"),
    b"grpc-accept-encoding": (b"gzip,,,", b"x" * 5000, b"\xff"),
    b"grpc-message": (b"%zz%", b"%FF"),
    b"grpc-status": (b"0", b"99", b"x"),
    b"grpc-previous-rpc-attempts": (b"-1", b"99999999999"),
    b"x-bin": (b"!!!!", b"AA", b"A", b"\xff\xff", b"QUJD,QUJD"),
    b"grpc-status-details-bin": (b"!!!!", b"CAISAA"),
    b"authorization": (b"\xff\xfe", b"Bearer \x80", b"Bearer\0x", b"\r\nx: y", b"x" * 70_000),
    b"UPPER": (b"x",),
    b"": (b"x",),
    b"sp ace": (b"x",),
    b"%zz": (b"%zz",),
    b":status": (b"200",),
    b":unknown": (b"x",),
    b"connection": (b"close",),
    b"transfer-encoding": (b"chunked",),
    b"content-length": (b"0", b"-1", b"99999999999999999999"),
    b"host": (b"", b"a", b"\xff"),
    b"ome-tensor-one-message": (b"\xff", b""),
}
_HEADER_FAULTS: tuple[Callable[[_Pairs, random.Random], None], ...] = (_dropped, _doubled, _changed, _added, _added, _added)

_KINDS: dict[str, tuple[Callable[[PortFuzz, random.Random], list[bytes]], int]] = {
    "noise": (PortFuzz._noise, 2),
    "preface, then noise": (PortFuzz._preface, 2),
    "truncated": (PortFuzz._truncated, 3),
    "reordered": (PortFuzz._reordered, 5),
    "flipped": (PortFuzz._flipped, 5),
    "wrong lengths": (PortFuzz._lengths, 3),
    "damaged messages": (PortFuzz._damaged, 3),
    "odd headers": (PortFuzz._headers, 5),
    "windows, settings": (PortFuzz._windows, 3),
    "continuations": (PortFuzz._continuations, 1),
    "resets": (PortFuzz._resets, 1),
    "floods": (PortFuzz._floods, 1),
}


async def _read(reader: asyncio.StreamReader, into: bytearray) -> None:
    """Read until the server hangs up; what is more than a little is thrown away."""
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            if len(into) < 1 << 18:
                into += data


#: The first status of a connection is written out: gRPC indexes it for the next.
_STATUS = re.compile(
    rb"\x0bgrpc-status[\x01\x02](\d{1,2})(?:[\0@]\x0cgrpc-message(?:[\0-\x7e]|\x7f[\x80-\xff]*[\0-\x7f])(.{0,60}))?", re.DOTALL
)


def _outcome(answer: bytes, hung_up: bool) -> tuple[str, str | None]:
    """What a server has said and done, and what is wrong with it."""
    wrong = None
    for match in _STATUS.finditer(answer):
        code, text = int(match[1]), match[2] or b""
        if code == 2 or code > 16 or (code == 13 and not text.startswith(_GRPCS_OWN)):
            wrong = f"a call on a raw connection ended with status {code}: {text!r}"
    if not answer:
        return ("hung up" if hung_up else "silent"), None
    seen = {one[3] for one in frames(answer) if len(one) >= 9}
    said = (
        "GOAWAY" if http2.GOAWAY in seen else "RST" if http2.RST in seen else "answered" if http2.HEADERS in seen else "settings"
    )
    return f"{said}{', hung up' if hung_up else ''}", wrong


async def _record(target: str, maker: RequestMaker, count: int) -> list[bytes]:
    """What gRPC's own client sends of so many requests, over one connection for every six."""
    host, _, port = target.rpartition(":")
    streams: list[bytearray] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, into: bytearray | None) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if into is not None:
                    into += data
                writer.write(data)
                await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ours, theirs = await asyncio.open_connection(host, int(port))
        streams.append(bytearray())
        await asyncio.gather(pump(reader, theirs, streams[-1]), pump(ours, writer, None))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        for first in range(0, count, 6):
            caller = Caller(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", 1)
            for number in range(first, first + 6):
                request = maker.request(number)
                if len(request.data()) < 1 << 16:
                    await caller.call(request)
            await caller.close()
    finally:
        server.close()
        await server.wait_closed()
    return [bytes(stream) for stream in streams]
