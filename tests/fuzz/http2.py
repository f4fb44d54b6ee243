"""As much of HTTP/2 as it takes to break it: frames, and headers written out in full."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["PREFACE", "Frame", "block", "frame", "frames", "grpc_headers", "headers", "settings", "whole_frames"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1

#: A frame's bytes, its head included.
Frame = bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> Frame:
    """A frame; ``length`` where it is to say another one than it has."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes((kind & 0xFF, flags & 0xFF)) + (stream & 0xFFFFFFFF).to_bytes(4, "big") + payload


def frames(data: bytes) -> list[Frame]:
    """What a client has sent behind the preface, frame by frame; the last one may be cut."""
    rest = data.removeprefix(PREFACE)
    found, place = [], 0
    while place < len(rest):
        end = place + 9 + int.from_bytes(rest[place : place + 3], "big")
        found.append(rest[place:end])
        place = end
    return found


def whole_frames(data: bytes) -> list[Frame]:
    """Those of :func:`frames` that have come to their end."""
    return [one for one in frames(data) if len(one) >= 9 and len(one) == 9 + int.from_bytes(one[:3], "big")]


def settings(pairs: Iterable[tuple[int, int]] = (), flags: int = 0) -> Frame:
    """A SETTINGS frame."""
    return frame(SETTINGS, flags, 0, b"".join(name.to_bytes(2, "big") + value.to_bytes(4, "big") for name, value in pairs))


def block(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A header block (HPACK) in which nothing is indexed and nothing compressed: any bytes can be in it."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in pairs)


def _text(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes((len(text),)) + text
    length, out = len(text) - 127, bytearray((127,))
    while length > 127:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes(out) + bytes((length,)) + text


def headers(stream: int, pairs: Iterable[tuple[bytes, bytes]], flags: int = END_HEADERS) -> Frame:
    """A HEADERS frame."""
    return frame(HEADERS, flags, stream, block(pairs))


def grpc_headers(path: str) -> list[tuple[bytes, bytes]]:
    """The headers of a gRPC call."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode("utf-8", "replace")),
        (b":authority", b"fuzz"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]
