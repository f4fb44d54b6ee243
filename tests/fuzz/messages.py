"""Messages that nobody would send: built field by field from their descriptors, or bytes of valid ones that are damaged."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

__all__ = ["MessageMaker", "damaged", "noise"]

#: Deepest message in a message that is built.
_DEEPEST = 6

#: Lengths of repeated fields; the last ones are rare.
_COUNTS = (0, 1, 1, 1, 2, 2, 3, 4, 7)
_LONG_COUNTS = (300, 2000, 20_000, 70_000)

_ODD_TEXTS = (
    "",
    " ",
    "/",
    "//",
    "%",
    "%2",
    "%zz",
    "%00",
    "%2F%2e%2e",
    "\0",
    "a\0b",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "s3://nobody/nothing",
    "http://127.0.0.1:1/x.zarr",
    "\n\r\t\x1b[31m",
    "\u202e\u200b\ufeff",
    "e\u0301" * 20,
    "\U0001f9ea" * 50,
    "\ud7ff\ue000\uffff",
    "\u0660\u0661",  # Digits, but none of ASCII's.
    "-1",
    "9" * 40,
    "NaN",
    "1e999",
    "x" * 255,
    "x" * 5000,
    "{}%s%n{0.__class__}",
)

_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 255.0, 65535.5, 1e-320, 1e308, -1e308, math.inf, -math.inf, math.nan)

_TYPES = FieldDescriptor
_BITS = {
    _TYPES.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    _TYPES.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    _TYPES.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    _TYPES.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


@dataclass
class MessageMaker:
    """Builds messages of any type.

    Attributes:
        words: Texts by the name of the field that they make sense in; those of ``""`` are for any field.
        widest: Largest number of entries of a repeated field.
    """

    words: Mapping[str, Sequence[str]]
    widest: int = 70_000
    _texts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def message(self, descriptor: Any, chance: random.Random, depth: int = 0) -> Message:
        """A message with some of its fields set to something."""
        message = GetMessageClass(descriptor)()
        share = chance.choice((0.15, 0.4, 0.7))
        for one in descriptor.fields:
            if chance.random() < share:
                self.set(message, one, chance, depth)
        return message

    def tweak(self, message: Message, chance: random.Random) -> None:
        """Change one field of a message, however deep it lies."""
        for _ in range(_DEEPEST):
            inner = [value for one, value in _fields_of(message) if _is_message(one) and not _is_repeated(one)]
            if not inner or chance.random() < 0.4:
                break
            message = chance.choice(inner)
        fields: Any = message.DESCRIPTOR.fields
        if not fields:
            return
        one = chance.choice(fields)
        if chance.random() < 0.2:
            message.ClearField(one.name)
        else:
            self.set(message, one, chance, 3)

    def set(self, message: Message, one: Any, chance: random.Random, depth: int) -> None:
        """Set a field to something."""
        if depth >= _DEEPEST and _is_message(one):
            return
        if not _is_repeated(one):
            if _is_message(one):
                getattr(message, one.name).MergeFrom(self.message(one.message_type, chance, depth + 1))
                getattr(message, one.name).SetInParent()
            else:
                setattr(message, one.name, self.scalar(one, chance))
            return
        count = chance.choice(_COUNTS)
        if chance.random() < 0.006:
            count = min(chance.choice(_LONG_COUNTS), self.widest)
        values = getattr(message, one.name)
        if _is_message(one):
            made = [self.message(one.message_type, chance, depth + 1) for _ in range(min(count, 8))]
            # Many, but made quickly: the same few again and again.
            values.extend(made[number % len(made)] for number in range(min(count, 2000)))
        else:
            made = [self.scalar(one, chance) for _ in range(min(count, 8))]
            # A long list of long texts is only large.
            most = 300 if isinstance(made[0] if made else None, str | bytes) else count
            values.extend(made[number % len(made)] for number in range(min(count, most)))

    def scalar(self, one: Any, chance: random.Random) -> Any:
        """A value for a field that is no message."""
        kind = one.cpp_type
        if kind in _BITS:
            low, high = _BITS[kind]
            return chance.choice(
                (
                    0,
                    1,
                    1,
                    2,
                    3,
                    7,
                    64,
                    255,
                    65_536,
                    high,
                    high - 1,
                    high // 2,
                    low,
                    max(low, -1),
                    max(low, -2),
                    chance.randint(low, high),
                )
            )
        if kind == _TYPES.CPPTYPE_ENUM:
            known = [value.number for value in one.enum_type.values]
            return chance.choice((*known, *known, max(known) + 1, 99, -1, -(1 << 31), (1 << 31) - 1))
        if kind == _TYPES.CPPTYPE_BOOL:
            return chance.random() < 0.5
        if kind in (_TYPES.CPPTYPE_DOUBLE, _TYPES.CPPTYPE_FLOAT):
            return chance.choice(_FLOATS)
        if one.type == _TYPES.TYPE_BYTES:
            return chance.randbytes(chance.choice((0, 1, 15, 16, 32, 64, 65, 1000)))
        return self.text(one.name, chance)

    def text(self, name: str, chance: random.Random) -> str:
        """A text for a field of that name: mostly one that means something there."""
        if name not in self._texts:
            self._texts[name] = tuple(self.words.get(name, ())) * 2 + tuple(self.words.get("", ()))
        texts = self._texts[name]
        if texts and chance.random() < 0.75:
            return chance.choice(texts)
        return chance.choice(_ODD_TEXTS)


def _fields_of(message: Message) -> list[tuple[Any, Any]]:
    return list(message.ListFields())


def _is_message(one: Any) -> bool:
    return bool(one.cpp_type == _TYPES.CPPTYPE_MESSAGE)


def _is_repeated(one: Any) -> bool:
    # `label` is deprecated where `is_repeated` is there, and `is_repeated` is missing from the oldest supported versions.
    repeated: Any = getattr(one, "is_repeated", None)
    return bool(one.label == _TYPES.LABEL_REPEATED if repeated is None else repeated)


def noise(chance: random.Random, most: int = 400) -> bytes:
    """Random bytes; sometimes none, sometimes all the same."""
    size = chance.choice((0, 1, 2, 5, 20, 100, most))
    return chance.randbytes(size) if chance.random() < 0.8 else bytes([chance.randrange(256)]) * size


def damaged(data: bytes, chance: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Bytes of a message after one to four accidents."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(_ACCIDENTS)(data, chance, others)
    return data


def _flipped(data: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    content = bytearray(data)
    for _place in range(min(len(content), chance.choice((1, 1, 2, 8)))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def _replaced(data: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    content = bytearray(data)
    if content:
        content[chance.randrange(len(content))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
    return bytes(content)


def _truncated(data: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _spliced(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """The beginning of one and the end of another: fields of other types, and oneofs with two choices."""
    other = chance.choice(others) if others else data
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other) + 1) :]


def _merged(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """Two messages on end are one, in which later fields win."""
    return data + (chance.choice(others) if others else data)


def _repeated(data: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    start = chance.randrange(len(data) + 1)
    part = data[start : start + chance.randrange(1, 64)]
    return data[:start] + part * chance.choice((2, 3, 50)) + data[start:]


def _length_lie(data: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    """A field of a length that is not there."""
    length = chance.choice((1, 127, 128, 1 << 20, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1))
    return data + _varint(chance.randrange(1, 13) << 3 | 2) + _varint(length) + chance.randbytes(chance.randrange(8))


def _nested(data: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    """A message in a message in a message: parsers stop at a hundred or so."""
    number, depth = chance.choice((1, 2, 3, 4, 5, 11)), chance.choice((5, 99, 101, 300))
    inner = b""
    for _level in range(depth):
        inner = _varint(number << 3 | 2) + _varint(len(inner)) + inner
    return data + inner


def _grouped(data: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    """Groups, which are begun and not ended, or ended and not begun."""
    number = chance.choice((1, 5, 1000))
    return data + _varint(number << 3 | 3) * chance.choice((1, 90, 5000)) + _varint(number << 3 | 4) * chance.choice((0, 1, 90))


def _unknown(data: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    """Fields that the contract does not know."""
    number = chance.choice((50, 99, 1000, 19_000, (1 << 29) - 1, 0))
    kind = chance.randrange(8)
    value = {0: _varint(chance.getrandbits(64)), 1: bytes(8), 2: _varint(3) + b"abc", 5: bytes(4)}.get(kind, b"")
    return (_varint(number << 3 | kind) + value) * chance.choice((1, 1, 1000)) + data


def _long_varint(data: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    """A number of more bytes than any has."""
    return data + _varint(chance.randrange(1, 12) << 3) + b"\xff" * chance.choice((9, 10, 30)) + b"\x01"


_Accident = Callable[[bytes, random.Random, Sequence[bytes]], bytes]
_ACCIDENTS: tuple[_Accident, ...] = (
    _flipped,
    _flipped,
    _replaced,
    _truncated,
    _spliced,
    _merged,
    _repeated,
    _length_lie,
    _nested,
    _grouped,
    _unknown,
    _long_varint,
)


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)
