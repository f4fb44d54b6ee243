"""The types that a dataset's columns have once it is loaded: those whose values stand for themselves."""

from __future__ import annotations

import pyarrow as pa

from ome_tensor.errors import InvalidRecord

__all__ = ["check_names", "checked", "plain_schema"]

# Text and bytes by reference came with Arrow 16, lists of them with 17.
_VIEWS: dict[str, pa.DataType] = {"string_view": pa.string(), "binary_view": pa.large_binary()}
_UNREADABLE = ("list_view", "large_list_view")


def plain_schema(schema: pa.Schema, name: str) -> pa.Schema:
    """What a source's columns become: values instead of dictionaries, which would be other ones in each record batch, and plain text and bytes
    instead of views of them.

    Args:
        schema: The source's.
        name: The source's, for the error.

    Raises:
        InvalidRecord: a column is of a type that cannot be converted; names it. Or a name is not UTF-8.
    """
    check_names(schema, name)
    fields = []
    for field in schema:
        try:
            fields.append(field.with_type(_plain(field.type)))
        except NotImplementedError:
            raise InvalidRecord(
                f"column {field.name!r} of {name} cannot be read: it is of type {field.type}", field="path", value=name
            ) from None
    return pa.schema(fields)


def check_names(schema: pa.Schema, name: str) -> None:
    """Check that all names in a schema are text, which Arrow leaves to whoever asks for one. Raises InvalidRecord."""
    try:
        for field in schema:
            _look_at(field)
    except UnicodeDecodeError:
        raise InvalidRecord(
            f"{name} has a column, or a field of one, whose name is not UTF-8", field="path", value=name
        ) from None


def _look_at(field: pa.Field) -> None:
    kind = field.type
    _ = field.name, getattr(kind, "tz", None)
    for number in range(kind.num_fields):
        _look_at(kind.field(number))


def _plain(kind: pa.DataType) -> pa.DataType:
    """Raises NotImplementedError where Arrow (as of 26) would convert a type to wrong values."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field), kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if str(kind).startswith(_UNREADABLE):
        raise NotImplementedError
    return _VIEWS.get(str(kind), kind)


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_plain(field.type))


def checked(batch: pa.RecordBatch, schema: pa.Schema, name: str) -> pa.Table:
    """A record batch as a source gave it, looked through, in the types of :func:`plain_schema`.

    Args:
        batch: The batch.
        schema: Those types.
        name: The source's, for the error.

    Raises:
        InvalidRecord: an offset of it leads nowhere, or a text is not UTF-8; names the column.
    """
    for column, field in zip(batch.columns, schema, strict=True):
        try:
            column.validate(full=True)
        except (pa.ArrowException, ValueError) as error:
            why = (str(error).strip().splitlines() or [""])[0]
            raise InvalidRecord(f"column {field.name!r} of {name} is damaged: {why}", field="path", value=name) from None
    table = pa.Table.from_batches([batch])
    return table if table.schema == schema else table.cast(schema)
