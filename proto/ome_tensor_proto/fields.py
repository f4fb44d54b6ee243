"""Leaves of the codecs: enums as words, numbers that fit, and errors that name a field's path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ome_tensor.errors import InvalidArgument, InvalidSelection

__all__ = ["INT64_MAX", "INT64_MIN", "enum_name", "int64", "located", "uint64", "word_of"]

INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1
_UINT64_MAX: Final = 2**64 - 1


def enum_name(enum: Any, value: int, path: str) -> str:
    """The name of an enum's value. Enums are open on the wire: any number arrives."""
    try:
        return str(enum.Name(value))
    except ValueError:
        raise InvalidArgument(f"{path} {value} is not a value of this contract", field=path, value=value) from None


def word_of(
    table: Mapping[str, int],
    value: int,
    path: str,
    *,
    default: str | None = None,
    error: type[InvalidArgument] = InvalidArgument,
) -> str:
    """The domain's word for an enum's value; ``default`` for 0 (unspecified)."""
    if value == 0 and default is not None:
        return default
    for word, number in table.items():
        if number == value:
            return word
    raise error(f"{path} {value} is not one of: {', '.join(table)}", field=path, value=value)


class located:  # noqa: N801  read as a word at the head of a block, where contextlib's generators would take a fifth of a small request's time
    """In its block an error names the field's path in the message instead of the domain's argument."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, InvalidArgument) and (error.field is None or not error.field.startswith(self._path)):
            raise type(error)(error.message, field=self._path, value=error.value) from error


def int64(value: int, name: str) -> int:
    if not INT64_MIN <= value <= INT64_MAX:
        raise InvalidSelection(f"{name} {value} does not fit in 64 bits", field=name, value=value)
    return value


def uint64(value: int, name: str) -> int:
    if not 0 <= value <= _UINT64_MAX:
        raise InvalidArgument(f"{name} {value} does not fit in 64 bits", field=name, value=value)
    return value
