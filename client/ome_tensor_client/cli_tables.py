"""``ome-tensor table``, and the little language of ``--where``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ome_tensor.errors import InvalidArgument

from .cli_arguments import DatasetName, Seconds, Target, Where
from .cli_connect import reach

__all__ = ["parse_where", "table"]

#: Rows that a person reads.
_ROWS = 50

_PREDICATE = re.compile(
    r"\s*(?:\"([^\"]+)\"|([^\s=!<>]+))\s*(==|=|!=|<=|>=|<|>|(?:\bnot\s+)?\bin\b)\s*(.*?)\s*", re.IGNORECASE | re.DOTALL
)

_FORM = "--where takes COLUMN OP VALUE, with OP one of = != < <= > >= in, not in (of values between commas)"


def parse_where(words: Sequence[str] | None) -> list[tuple[str, str, Any]] | None:
    """What ``--where`` options mean as filters: all of them must pass.

    Raises:
        InvalidArgument: one that cannot be understood.
    """
    if not words:
        return None
    return [_predicate(text) for text in words]


def _predicate(text: str) -> tuple[str, str, Any]:
    found = _PREDICATE.fullmatch(text)
    if found is None or not found[4]:
        raise InvalidArgument(f"{_FORM}, not {text!r}", field="where", value=text)
    column, comparison, value = found[1] or found[2], " ".join(found[3].lower().split()), found[4]
    if comparison in ("in", "not in"):
        return column, comparison, [_value(part.strip()) for part in value.split(",")]
    return column, comparison, _value(value)


def _value(text: str) -> Any:
    """A number or a truth value where it reads as one; quoted, it is text."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def table(
    target: Target,
    dataset: DatasetName,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Columns to show.", show_default="all but the images")
    ] = None,
    where: Where = None,
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write all rows as CSV; - for standard output.", show_default=False)
    ] = None,
    timeout: Seconds = 60,
) -> None:
    """Show what a dataset's table says beside its images."""
    from .cli_output import print_rows

    filters = parse_where(where)
    chosen = None if columns is None else [name.strip() for name in columns.split(",")]
    with reach(target, timeout=timeout) as client:
        found = client.dataset(dataset).metadata(chosen, filters)
    found = found.rename_columns(["row" if name == "ome_tensor.row" else name for name in found.column_names])
    if csv is not None:
        from pyarrow import csv as arrow_csv
        from pyarrow import lib

        try:
            arrow_csv.write_csv(found, sys.stdout.buffer if csv == "-" else csv)
        except lib.ArrowException as error:
            raise InvalidArgument(
                f"a column cannot be written as CSV: {str(error).splitlines()[0]}; choose others with --columns", field="columns"
            ) from None
        return
    print_rows(found, _ROWS)
