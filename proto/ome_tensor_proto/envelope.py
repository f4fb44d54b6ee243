"""The protobuf around a payload, cut by hand: ``ReadTilesResponse`` written and read without a copy of its payload.

Parsing a large ``bytes`` field with protobuf's Python runtime copies it twice. Here the payload's place in the message is found
by skipping over the fields, and protobuf parses only what is left (some tens of bytes). Both directions stay plain protobuf:
any other client reads what is written here, and any valid encoding, fields in any order and unknown ones included, is read
here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from ome_tensor.errors import BrokenStream

from .ipc import ALIGNMENT
from .v1 import tensor_service_pb2

__all__ = ["FIXED_SIZE", "Envelope", "head", "parse_envelope", "write_fixed"]

_FIELDS = tensor_service_pb2.ReadTilesResponse.DESCRIPTOR.fields_by_name
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PAYLOAD: Final[int] = _FIELDS["payload"].number


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(name: str, wire_type: int) -> bytes:
    return _varint(_FIELDS[name].number << 3 | wire_type)


_HEADER_TAG = _tag("header", _BYTES)
_PADDING_TAG = _tag("padding", _BYTES)
_PAYLOAD_TAG = _tag("payload", _BYTES)

# first_position, tile_count, slab, timings (with its three numbers) and xxh3, each with its tag: always written, also where zero, so
# that they have one place in every message and can be filled in after the pixels.
_FIXED = struct.Struct("<BQBIBQBBBIBIBIBQ")
_FIXED_TAGS = (
    _tag("first_position", _FIXED64)[0],
    _tag("tile_count", _FIXED32)[0],
    _tag("slab", _FIXED64)[0],
    _tag("timings", _BYTES)[0],
)
_TIMINGS_SIZE = 15
_TIMING_TAGS = tuple(field.number << 3 | _FIXED32 for field in tensor_service_pb2.ReadTilesTimings.DESCRIPTOR.fields)

_XXH3_TAG = _tag("xxh3", _FIXED64)[0]
_TAGS = (*_FIXED_TAGS, *_TIMING_TAGS, _XXH3_TAG)

#: Bytes of the fields that :func:`write_fixed` fills in.
FIXED_SIZE: Final = _FIXED.size

_UINT32_MAX = 2**32 - 1


def head(header: tensor_service_pb2.ReadTilesHeader | None, payload_size: int, align_at: int) -> tuple[bytes, int]:
    """Everything of a message before its payload.

    Args:
        header: The stream's header, for the first message.
        payload_size: Bytes of the payload.
        align_at: The place in the payload that is to lie at a multiple of 64 in the message.

    Returns:
        The bytes, and where in them the :data:`FIXED_SIZE` bytes for :func:`write_fixed` lie (zero until then).
    """
    first = b""
    if header is not None:
        encoded = header.SerializeToString()
        first = _HEADER_TAG + _varint(len(encoded)) + encoded
    last = _PAYLOAD_TAG + _varint(payload_size)
    missing = -(len(first) + FIXED_SIZE + len(last) + align_at) % ALIGNMENT
    padding = b""
    if missing:
        # A field takes a tag and a length; below that, take a whole alignment more.
        frame = len(_PADDING_TAG) + 1
        zeros = (missing - frame) % ALIGNMENT
        padding = _PADDING_TAG + _varint(zeros) + bytes(zeros)
    return b"".join((first, bytes(FIXED_SIZE), padding, last)), len(first)


def write_fixed(
    target: bytearray | memoryview,
    at: int,
    *,
    first_position: int,
    tile_count: int,
    slab: int,
    queue_us: int,
    gather_us: int,
    encode_us: int,
    xxh3: int = 0,
) -> None:
    """Fill in the numbers of a message; times are capped at what 32 bits hold (71 minutes)."""
    position, count, slab_tag, timings = _FIXED_TAGS
    queue, gather, encode = _TIMING_TAGS
    _FIXED.pack_into(
        target,
        at,
        position,
        first_position,
        count,
        tile_count,
        slab_tag,
        slab,
        timings,
        _TIMINGS_SIZE,
        queue,
        min(queue_us, _UINT32_MAX),
        gather,
        min(gather_us, _UINT32_MAX),
        encode,
        min(encode_us, _UINT32_MAX),
        _XXH3_TAG,
        xxh3,
    )


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message, its payload left where it is.

    Attributes:
        fields: The message without its payload and padding.
        payload_at: Where the payload begins in the message's bytes.
        payload_size: Its size in bytes; positive.
    """

    fields: tensor_service_pb2.ReadTilesResponse
    payload_at: int
    payload_size: int


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A varint and where it ends."""
    if at < len(message) and message[at] < 0x80:
        return message[at], at + 1
    value = shift = 0
    while shift < 64:
        if at >= len(message):
            raise BrokenStream("a message is cut inside a field")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise BrokenStream("a message holds a number of more than 64 bits")


def parse_envelope(message: bytes) -> Envelope:
    """Find the payload in the bytes of a ``ReadTilesResponse`` and parse the rest.

    Args:
        message: The received bytes.

    Raises:
        BrokenStream: they are cut, damaged, or have no payload.
    """
    return _parse_usual(message) or _parse_any(message)


def _parse_usual(message: bytes) -> Envelope | None:
    """A message without a header as :func:`head` begins it, which most are: no field to be looked for. ``None`` for any other."""
    if len(message) < FIXED_SIZE + 2 or message[0] != _TAGS[0]:
        return None
    fixed = _FIXED.unpack_from(message)
    if fixed[::2] != _TAGS or fixed[7] != _TIMINGS_SIZE:
        return None
    at = FIXED_SIZE
    if message.startswith(_PADDING_TAG, at):
        length, at = _read_varint(message, at + len(_PADDING_TAG))
        at += length
    if not message.startswith(_PAYLOAD_TAG, at):
        return None
    size, at = _read_varint(message, at + len(_PAYLOAD_TAG))
    if size == 0 or at + size != len(message):
        return None
    return Envelope(tensor_service_pb2.ReadTilesResponse.FromString(message[:FIXED_SIZE]), at, size)


def _parse_any(message: bytes) -> Envelope:
    at = kept_to = 0
    size = len(message)
    payload: tuple[int, int] | None = None
    rest = []
    while at < size:
        start = at
        key, at = _read_varint(message, at)
        wire_type = key & 7
        if wire_type == _BYTES:
            length, at = _read_varint(message, at)
            begin, at = at, at + length
            if key >> 3 == _PAYLOAD and at <= size:
                # Of a field given twice the last counts.
                payload = begin, length
                rest.append(message[kept_to:start])
                kept_to = at
        elif wire_type == _VARINT:
            _, at = _read_varint(message, at)
        elif wire_type == _FIXED32:
            at += 4
        elif wire_type == _FIXED64:
            at += 8
        else:
            raise BrokenStream(f"a message is damaged: wire type {wire_type}")
        if not key >> 3:
            raise BrokenStream("a message is damaged: field 0")
    if at > size:
        raise BrokenStream("a message is cut inside a field")
    if payload is None or payload[1] == 0:
        raise BrokenStream("a message has no payload")
    rest.append(message[kept_to:])
    try:
        fields = tensor_service_pb2.ReadTilesResponse.FromString(b"".join(rest))
    except DecodeError as error:
        raise BrokenStream("a message's fields are damaged") from error
    return Envelope(fields, *payload)
