"""Arguments that commands share, and the small languages they are written in: indices, lists of numbers, addresses."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

import typer

from ome_tensor.errors import InvalidSelection

__all__ = ["Dataset", "DatasetName", "Json", "Key", "Level", "Seconds", "Target", "Where", "parse_index", "parse_numbers"]

# No metavars: versions of typer write brackets around them each in their own way.
Target: TypeAlias = Annotated[str, typer.Argument(help="The server's HOST:PORT.", show_default=False)]
Key: TypeAlias = Annotated[str, typer.Argument(help="The image: DATASET, DATASET/ROW or DATASET/COLUMN/ROW.", show_default=False)]
Dataset: TypeAlias = Annotated[str | None, typer.Argument(help="List this dataset's images.", show_default=False)]
DatasetName: TypeAlias = Annotated[str, typer.Argument(help="The dataset's name.", show_default=False)]
Level: TypeAlias = Annotated[int, typer.Option(min=0, help="Level of the image's resolution pyramid.")]
Where: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN OP VALUE", help="Only rows that pass: 'Well in A01,A02', 'Area > 100'. Again: both.", show_default=False
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seconds: TypeAlias = Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="How long to wait for an answer.")]

_INTEGER = re.compile(r"[+-]?[0-9]+")

#: Digits of the largest number of 64 bits; Python reads no more than some thousand.
_MOST_DIGITS = 19

#: Characters of a refused word that are repeated to whoever wrote it.
_MOST_SHOWN = 80


def parse_index(text: str | None, axis: str) -> int | slice | list[int] | None:
    """``3`` or ``-1``: one; ``0:4``, ``::2``: a slice as Python's; ``0,2,5``: a list, in that order.

    Raises:
        InvalidSelection: anything else.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(":")]
    if 2 <= len(words) <= 3 and all(_INTEGER.fullmatch(word) for word in words if word):
        return slice(*(_integer(word, axis) if word else None for word in words))
    words = [word.strip() for word in text.split(",")]
    if not all(_INTEGER.fullmatch(word) for word in words):
        raise InvalidSelection(
            f"--{axis} takes an index (3 or -1), a slice (0:4 or ::2) or a list (0,2,5), not {_shown(text)!r}",
            field=axis,
            value=text,
        )
    numbers = [_integer(word, axis) for word in words]
    return numbers if len(numbers) > 1 else numbers[0]


def parse_numbers(text: str | None, names: str, option: str) -> tuple[int, ...] | None:
    """Integers between commas, as many as ``names`` (``x,y,w,h``) has.

    Raises:
        InvalidSelection: anything else.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if len(words) != len(names.split(",")) or not all(_INTEGER.fullmatch(word) for word in words):
        raise InvalidSelection(f"--{option} takes whole numbers {names}, not {_shown(text)!r}", field=option, value=text)
    return tuple(_integer(word, option) for word in words)


def _integer(word: str, option: str) -> int:
    digits = word.lstrip("+-").lstrip("0")
    if len(digits) > _MOST_DIGITS:
        raise InvalidSelection(f"--{option} {_shown(word)} is out of range: it does not fit in 64 bits", field=option, value=word)
    return int(f"{'-' * word.startswith('-')}{digits or 0}")


def _shown(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
