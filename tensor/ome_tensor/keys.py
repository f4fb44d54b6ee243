"""Image keys: ``dataset``, ``dataset/row`` or ``dataset/column/row``.

Parts that are the only choice may be left out; two parts mean dataset and row. Each part is percent-encoded (RFC 3986), so that
names with a slash, a space or a percent sign are keys too.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from .errors import InvalidArgument

__all__ = ["ImageKey", "check_name", "format_key", "parse_key"]

#: A row fits in 64 bits, whoever sends it.
_MOST_DIGITS = 18


@dataclass(frozen=True, slots=True)
class ImageKey:
    """A parsed key.

    Attributes:
        dataset: The dataset's name, decoded.
        column: The image column's name, decoded, or ``None`` for the only one.
        row: The row in the dataset, from 0, or ``None`` for the only one.
    """

    dataset: str
    column: str | None = None
    row: int | None = None

    def __str__(self) -> str:
        return format_key(self.dataset, self.column, self.row)


def format_key(dataset: str, column: str | None = None, row: int | None = None) -> str:
    """The key of an image; ``column`` needs ``row``."""
    parts = [quote(dataset, safe="")]
    if column is not None:
        parts.append(quote(column, safe=""))
    if row is not None:
        parts.append(str(row))
    return "/".join(parts)


def check_name(value: object, field: str, what: str) -> str:
    """A name as it can be sent: text, without the halves of characters that Python makes of bytes which are no text (a shell's ``$'\\xff'``).

    Args:
        value: What a caller gave.
        field: The argument, for the error.
        what: What it names, for the message.

    Raises:
        InvalidArgument: not text, or not valid text.
    """
    if not isinstance(value, str):
        raise InvalidArgument(f"{what} must be text, not {type(value).__name__}: {value!r}", field=field, value=value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{what} {value!r} is not valid text: {value[error.start]!r} is no character", field=field, value=repr(value)
        ) from None
    return value


def parse_key(key: str) -> ImageKey:
    """Take a key apart.

    Raises:
        InvalidArgument: not text, empty parts, more than three parts, or a row that is not a number from 0.
    """
    check_name(key, "key", "image key")
    parts = key.split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise InvalidArgument(
            f"image key {key!r} must be 'dataset', 'dataset/row' or 'dataset/column/row'", field="key", value=key
        )
    dataset = unquote(parts[0])
    if len(parts) == 1:
        return ImageKey(dataset)
    column = unquote(parts[1]) if len(parts) == 3 else None
    if not (parts[-1].isascii() and parts[-1].isdecimal() and len(parts[-1]) <= _MOST_DIGITS):
        raise InvalidArgument(f"image key {key!r}: row {parts[-1]!r} is not a row number", field="key", value=key)
    return ImageKey(dataset, column, int(parts[-1]))
