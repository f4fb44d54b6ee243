"""Filters of a table's rows <-> messages, and what they let through.

The convention is that of pyarrow's ``filters`` (disjunctive normal form): a list of predicates ``(column, comparison, value)``, all of which must
pass; or a list of such lists, any of which must. https://arrow.apache.org/docs/python/generated/pyarrow.parquet.ParquetDataset.html
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ome_tensor.errors import InvalidArgument

from .fields import INT64_MAX, INT64_MIN, word_of
from .v1 import tensor_service_pb2 as pb

__all__ = ["Filters", "filters_from_proto", "filters_to_proto", "passing"]

#: One predicate, and a filter as this module has it: conjunctions of predicates, any of which must pass.
Predicate: TypeAlias = tuple[str, str, Any]
Filters: TypeAlias = list[list[Predicate]]

_COMPARISONS: Mapping[str, pb.Comparison] = {
    "=": pb.COMPARISON_EQUAL,
    "!=": pb.COMPARISON_NOT_EQUAL,
    "<": pb.COMPARISON_LESS,
    "<=": pb.COMPARISON_LESS_EQUAL,
    ">": pb.COMPARISON_GREATER,
    ">=": pb.COMPARISON_GREATER_EQUAL,
    "in": pb.COMPARISON_IN,
    "not in": pb.COMPARISON_NOT_IN,
}

_FORM = "filters must be a list of (column, comparison, value), or a list of such lists"


def _refuse(message: str, value: object) -> InvalidArgument:
    return InvalidArgument(message, field="filters", value=value)


# --- a user's filters -------------------------------------------------------------------------------------------------


def filters_to_proto(filters: object) -> pb.RowFilter:
    """A user's filters as a message.

    Raises:
        InvalidArgument: they are not of that form, a comparison is none, or a value cannot be sent.
    """
    message = pb.RowFilter()
    for conjunction in _normal(filters):
        part = message.any_of.add()
        for predicate in conjunction:
            _write(part.all_of.add(), predicate)
    return message


def _normal(filters: object) -> list[list[object]]:
    """Filters as conjunctions of predicates, as far as their form goes."""
    if not isinstance(filters, (list, tuple)) or not filters:
        raise _refuse(f"{_FORM}, not {filters!r}", filters)
    if _is_predicate(filters):
        raise _refuse(f"{_FORM}: put {filters!r} into a list", filters)
    if all(_is_predicate(entry) for entry in filters):
        return [list(filters)]
    for entry in filters:
        if not isinstance(entry, (list, tuple)) or not entry or not all(map(_is_predicate, entry)):
            raise _refuse(f"{_FORM}; {entry!r} is neither", entry)
    return [list(entry) for entry in filters]


def _is_predicate(entry: object) -> bool:
    return isinstance(entry, (list, tuple)) and len(entry) == 3 and isinstance(entry[0], str) and isinstance(entry[1], str)


def _write(message: pb.Predicate, predicate: Any) -> None:
    column, word, value = predicate
    comparison = " ".join(word.lower().split())
    comparison = "=" if comparison == "==" else comparison
    if comparison not in _COMPARISONS:
        raise _refuse(f"{word!r} in {predicate!r} is no comparison: there are {', '.join(_COMPARISONS)}", word)
    try:
        message.column = column
    except (ValueError, UnicodeEncodeError):
        raise _refuse(f"the column's name in {predicate!r} is no text", column) from None
    message.comparison = _COMPARISONS[comparison]
    if comparison in ("in", "not in"):
        is_list = isinstance(value, (list, tuple, set, frozenset, np.ndarray)) or (
            isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
        )
        if not is_list:
            raise _refuse(f"{comparison!r} in {predicate!r} wants a list of values", value)
        values = list(value)
        if not values:
            raise _refuse(f"{comparison!r} in {predicate!r} wants at least one value", value)
    else:
        values = [value]
    for each in values:
        _write_value(message.values.add(), each, predicate)


def _write_value(message: pb.FilterValue, value: object, predicate: object) -> None:
    value = value.item() if isinstance(value, np.generic) and not isinstance(value, np.datetime64) else value
    if isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]").item()
    try:
        if isinstance(value, bool):
            message.bool_value = value
        elif isinstance(value, int):
            if not INT64_MIN <= value <= INT64_MAX:
                raise _refuse(f"{value} in {predicate!r} does not fit in 64 bits", value)
            message.int_value = value
        elif isinstance(value, float):
            message.double_value = value
        elif isinstance(value, str):
            message.string_value = value
        elif isinstance(value, bytes):
            message.bytes_value = value
        elif isinstance(value, datetime.datetime):
            message.time_value.FromDatetime(value)
        elif isinstance(value, datetime.date):
            message.time_value.FromDatetime(datetime.datetime.combine(value, datetime.time()))
        else:
            raise _refuse(
                f"a value must be a bool, a number, text, bytes, a date or a time, not {type(value).__name__} (in {predicate!r})",
                value,
            )
    except (UnicodeEncodeError, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise _refuse(f"{value!r} in {predicate!r} cannot be sent: {error}", value) from None


# --- a message's filters ----------------------------------------------------------------------------------------------


def filters_from_proto(message: pb.RowFilter, path: str = "filter") -> Filters:
    """The filters of a message.

    Raises:
        InvalidArgument: empty, or malformed.
    """
    if not message.any_of or not all(part.all_of for part in message.any_of):
        raise InvalidArgument(f"{path} has no predicates; leave it out for all rows", field=path)
    return [[_read(predicate, path) for predicate in part.all_of] for part in message.any_of]


def _read(message: pb.Predicate, path: str) -> Predicate:
    comparison = word_of(_COMPARISONS, message.comparison, f"{path}.comparison")
    values = [_read_value(value, path) for value in message.values]
    if comparison in ("in", "not in"):
        if not values:
            raise InvalidArgument(f"{path}: {comparison!r} wants at least one value", field=path)
        return message.column, comparison, values
    if len(values) != 1:
        raise InvalidArgument(f"{path}: {comparison!r} wants one value, not {len(values)}", field=path, value=len(values))
    return message.column, comparison, values[0]


def _read_value(message: pb.FilterValue, path: str) -> Any:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidArgument(f"{path} has a value of no kind", field=path)
    if kind == "time_value":
        try:
            return message.time_value.ToDatetime()
        except (ValueError, OverflowError):
            raise InvalidArgument(f"{path} has a time that is none", field=path) from None
    return getattr(message, kind)


# --- what passes ------------------------------------------------------------------------------------------------------


def passing(table: pa.Table, filters: Filters) -> np.ndarray:
    """For each row of a table, whether it passes. A null passes nothing.

    Raises:
        InvalidArgument: a column that is not there, or that cannot be compared with a value.
    """
    result = np.zeros(table.num_rows, bool)
    for conjunction in filters:
        all_pass = np.ones(table.num_rows, bool)
        for predicate in conjunction:
            all_pass &= _passes(table, predicate)
        result |= all_pass
    return result


_FUNCTIONS = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def _passes(table: pa.Table, predicate: Predicate) -> np.ndarray:
    name, comparison, value = predicate
    if table.schema.names.count(name) != 1:
        some = ", ".join(table.schema.names[:20]) + (f" and {table.num_columns - 20} more" if table.num_columns > 20 else "")
        raise _refuse(f"there is no column {name!r} to filter by; there are: {some or 'none'}", name)
    column = table.column(name)
    values: Sequence[Any] = value if comparison in ("in", "not in") else [value]
    try:
        wanted = [_scalar(each, column.type) for each in values]
        if comparison in ("in", "not in"):
            found = _is_in(column, [each for each in wanted if each is not None])
            if comparison == "not in":
                found = pc.and_(pc.invert(found), pc.is_valid(column))
        elif wanted[0] is None:
            # No value of the column's type is equal to it; how it lies to them is for a common type to say.
            found = _FUNCTIONS[comparison](column, pa.scalar(value))
        else:
            found = _FUNCTIONS[comparison](column, wanted[0])
        passes = pc.fill_null(found, False)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise _refuse(f"column {name!r} ({column.type}) cannot be compared with {value!r} by {comparison!r}", value) from None
    result: np.ndarray = np.asarray(passes.combine_chunks() if isinstance(passes, pa.ChunkedArray) else passes)
    return result.astype(bool, copy=False)


def _is_in(column: pa.ChunkedArray, wanted: Sequence[pa.Scalar]) -> pa.ChunkedArray:
    """Whether values are among others; a null is not."""
    if not pa.types.is_floating(column.type):
        return pc.is_in(column, value_set=pa.array([each.as_py() for each in wanted], column.type))
    # By their bits 0 and -0 would differ.
    found = pc.fill_null(pc.equal(column, wanted[0]), False)
    for each in wanted[1:]:
        found = pc.or_(found, pc.fill_null(pc.equal(column, each), False))
    return found


def _scalar(value: Any, kind: pa.DataType) -> pa.Scalar | None:
    """A value in the column's own type; ``None`` where that has no such value. Raises where the two have nothing to do with each other."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if pa.types.is_integer(kind) and is_number:
        if isinstance(value, float) and not (math.isfinite(value) and value.is_integer()):
            return None
        try:
            return pa.scalar(int(value), kind)
        except (pa.ArrowInvalid, OverflowError):
            return None
    if pa.types.is_temporal(kind) and isinstance(value, datetime.datetime) and not pa.types.is_time(kind):
        moment = value.replace(tzinfo=datetime.UTC) if pa.types.is_timestamp(kind) and kind.tz else value
        return pa.scalar(moment.date() if pa.types.is_date(kind) else moment, kind)
    fits = (
        (pa.types.is_floating(kind) and is_number)
        or (pa.types.is_decimal(kind) and is_number)
        or (pa.types.is_boolean(kind) and isinstance(value, bool))
        or ((pa.types.is_string(kind) or pa.types.is_large_string(kind)) and isinstance(value, str))
        or ((pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) and isinstance(value, bytes))
    )
    if not fits:
        raise TypeError(f"{type(value).__name__} and {kind}")
    return pa.scalar(value, kind)
