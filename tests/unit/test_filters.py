"""Filters of rows: pyarrow's convention, on their way and on a table."""

from __future__ import annotations

import datetime
import operator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ome_tensor.errors import InvalidArgument
from ome_tensor_proto.filters import filters_from_proto, filters_to_proto, passing
from ome_tensor_proto.v1 import tensor_service_pb2 as pb


def over_the_wire(filters: object) -> Any:
    """What arrives of a user's filters."""
    return filters_from_proto(pb.RowFilter.FromString(filters_to_proto(filters).SerializeToString()))


COLUMNS = {
    "n": (pa.int16(), st.integers(-5, 5)),
    "x": (pa.float64(), st.floats(-2, 2)),
    "well": (pa.string(), st.sampled_from(["A01", "A02", "B01", ""])),
    "ok": (pa.bool_(), st.booleans()),
    "when": (pa.timestamp("us"), st.datetimes(datetime.datetime(2026, 1, 1), datetime.datetime(2026, 1, 3))),
}

COMPARE = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    rows = draw(st.integers(0, 12))
    return pa.table(
        {name: pa.array([draw(st.none() | values) for _ in range(rows)], kind) for name, (kind, values) in COLUMNS.items()}
    )


@st.composite
def predicates(draw: st.DrawFn) -> tuple[str, str, Any]:
    name = draw(st.sampled_from(sorted(COLUMNS)))
    values = COLUMNS[name][1]
    if draw(st.booleans()):
        return name, draw(st.sampled_from(["in", "not in"])), draw(st.lists(values, min_size=1, max_size=3))
    return name, draw(st.sampled_from(sorted(COMPARE))), draw(values)


def passes(row: dict[str, Any], predicate: tuple[str, str, Any]) -> bool:
    """What a predicate means."""
    name, comparison, value = predicate
    if row[name] is None:
        return False
    if comparison in ("in", "not in"):
        return (row[name] in value) == (comparison == "in")
    return bool(COMPARE[comparison](row[name], value))


@settings(deadline=None)
@given(table=tables(), conjunctions=st.lists(st.lists(predicates(), min_size=1, max_size=3), min_size=1, max_size=3))
def test_what_passes(table: pa.Table, conjunctions: list[list[tuple[str, str, Any]]]) -> None:
    wanted = [any(all(passes(row, one) for one in conjunction) for conjunction in conjunctions) for row in table.to_pylist()]
    assert passing(table, over_the_wire(conjunctions)).tolist() == wanted
    if len(conjunctions) == 1:
        assert passing(table, over_the_wire(conjunctions[0])).tolist() == wanted


def test_numbers_of_another_kind() -> None:
    table = pa.table({"n": [1, 2, None], "x": pa.array([1.0, 2.5, None], pa.float32())})
    for predicate, wanted in {
        ("n", "<", 1.5): [True, False, False],
        ("n", "=", 2.0): [False, True, False],
        ("n", "=", 2.5): [False, False, False],
        ("n", "!=", 2.5): [True, True, False],
        ("n", "<", 10**18): [True, True, False],
        ("n", "in", (1, 2.5, 10**12)): [True, False, False],
        ("x", ">=", 2): [False, True, False],
        ("n", "==", np.int8(2)): [False, True, False],
    }.items():
        assert passing(table, over_the_wire([predicate])).tolist() == wanted, predicate


@pytest.mark.parametrize(
    "filters, words",
    [
        (None, "must be a list"),
        ([], "must be a list"),
        ("n = 1", "must be a list"),
        (("n", "=", 1), "put .* into a list"),
        ([("n", "=")], "is neither"),
        ([("n", "=", 1), [("n", "=", 1)]], "is neither"),
        ([[]], "is neither"),
        ([(1, "=", 1)], "is neither"),
        ([("n", "~", 1)], "'~' in .* is no comparison"),
        ([("n", "in", 1)], "wants a list"),
        ([("n", "in", "abc")], "wants a list"),
        ([("n", "in", [])], "wants at least one"),
        ([("n", "=", None)], "not NoneType"),
        ([("n", "=", [1])], "not list"),
        ([("n", "=", 2**63)], "does not fit in 64 bits"),
        ([("n", "=", "\ud800")], "cannot be sent"),
    ],
)
def test_filters_that_are_none(filters: object, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        filters_to_proto(filters)
    assert caught.value.field == "filters"


@pytest.mark.parametrize(
    "predicate, words",
    [
        (("z", "=", 1), "there is no column 'z' to filter by; there are: n, well"),
        (("well", ">", 1), r"column 'well' \(string\) cannot be compared with 1"),
        (("n", "=", "1"), r"column 'n' \(int64\) cannot be compared with '1'"),
        (("n", "=", True), "cannot be compared with True"),
        (("well", "in", ["A", 1]), "cannot be compared"),
        (("n", "=", datetime.datetime(2026, 1, 1)), "cannot be compared"),
    ],
)
def test_filters_that_do_not_fit_their_column(predicate: tuple[str, str, Any], words: str) -> None:
    table = pa.table({"n": [1, 2], "well": ["A", "B"]})
    with pytest.raises(InvalidArgument, match=words):
        passing(table, over_the_wire([predicate]))


def test_messages_that_are_malformed() -> None:
    for message in (
        pb.RowFilter(),
        pb.RowFilter(any_of=[pb.Conjunction()]),
        pb.RowFilter(any_of=[pb.Conjunction(all_of=[pb.Predicate(column="n")])]),
        pb.RowFilter(any_of=[pb.Conjunction(all_of=[pb.Predicate(column="n", comparison=pb.COMPARISON_EQUAL)])]),
        pb.RowFilter(
            any_of=[pb.Conjunction(all_of=[pb.Predicate(column="n", comparison=pb.COMPARISON_EQUAL, values=[pb.FilterValue()])])]
        ),
    ):
        with pytest.raises(InvalidArgument):
            filters_from_proto(message)
