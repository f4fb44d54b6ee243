"""Keys: whatever the names are, a key is taken apart into what it was made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ome_tensor.errors import InvalidArgument
from ome_tensor.keys import ImageKey, format_key, parse_key

# Lone surrogates are not text that a file name or a column could have in UTF-8.
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
rows = st.integers(0, 10**18 - 1)


@given(dataset=names, column=names, row=rows)
def test_round_trip(dataset: str, column: str, row: int) -> None:
    """Also of names with slashes, spaces, percent signs and any script."""
    for key in (ImageKey(dataset), ImageKey(dataset, None, row), ImageKey(dataset, column, row)):
        assert parse_key(str(key)) == key
        assert str(parse_key(str(key))) == str(key)


@pytest.mark.parametrize("key", ["\udcff", "a/\ud800/0", 5, None, b"a"])
def test_what_cannot_be_sent_is_refused(key: object) -> None:
    """Bytes that are no text come from a shell as halves of characters; they would fail deep inside a message."""
    with pytest.raises(InvalidArgument, match="image key") as caught:
        parse_key(key)  # type: ignore[arg-type]
    assert caught.value.field == "key"
    str(caught.value).encode()


@given(dataset=names, column=names, row=rows)
def test_an_encoded_key_is_plain(dataset: str, column: str, row: int) -> None:
    """RFC 3986: what a URL, a shell and a log line carry without quoting; slashes only between parts."""
    key = format_key(dataset, column, row)
    assert key.count("/") == 2
    assert all(c.isascii() and (c.isalnum() or c in "-._~%/") for c in key)


def test_two_parts_are_dataset_and_row() -> None:
    """Never dataset and column."""
    assert parse_key("plate7/12") == ImageKey("plate7", None, 12)
    assert parse_key("a%2Fb/c%20d/007") == ImageKey("a/b", "c d", 7)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "a/",
        "/1",
        "a//1",
        "a/b/c/d",
        "a/b",
        "a/-1",
        "a/1.0",
        "a/b/x",
        "a/ 1",
        "a/1_0",
        "a/²",
        "a/٣",
        "a/+1",
        None,
        7,
        b"a/1",
    ],
)
def test_malformed_keys(key: object) -> None:
    """Refused before any traffic, naming the key."""
    with pytest.raises(InvalidArgument) as caught:
        parse_key(key)  # type: ignore[arg-type]
    assert caught.value.field == "key"


def test_a_row_of_many_digits() -> None:
    """Python refuses to read numbers of more than 4300 digits; that too is a malformed key."""
    with pytest.raises(InvalidArgument):
        parse_key("a/" + "9" * 5000)
