"""Arithmetic on spans against the lists that they stand for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ome_tensor.spans import Spans, blocks, count, every, left, part

sequences = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9), st.integers(1, 5)), max_size=5).map(tuple)


def listed(spans: Spans) -> list[int]:
    return [first + place * stride for first, length, stride in spans for place in range(length)]


@given(sequences, st.integers(0, 40), st.integers(0, 40))
def test_part(spans: Spans, begin: int, length: int) -> None:
    assert count(spans) == len(listed(spans))
    assert listed(part(spans, begin, begin + length)) == listed(spans)[begin : begin + length]


@given(sequences, st.integers(0, 9), st.integers(1, 6))
def test_every(spans: Spans, offset: int, step: int) -> None:
    assert listed(every(spans, offset, step)) == listed(spans)[offset::step]


@given(sequences, st.integers(1, 7), st.integers(0, 5), st.integers(1, 4))
def test_blocks(spans: Spans, size: int, offset: int, step: int) -> None:
    wanted = [listed(spans)[begin : begin + size] for begin in range(0, count(spans), size)][offset::step]
    assert [listed(block) for block in blocks(spans, size, offset, step)] == wanted


@given(sequences, st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_left(spans: Spans, taken: list[int]) -> None:
    """What each has not taken, and nothing else; a prefix where all have taken as many."""
    cards = [listed(spans)[rank :: len(taken)] for rank in range(len(taken))]
    rest = sorted(place for mine, number in zip(cards, taken, strict=True) for place in mine[number:])
    assert sorted(listed(left(spans, taken))) == rest
    if len(set(taken)) == 1:
        assert listed(left(spans, taken)) == listed(spans)[taken[0] * len(taken) :]


def test_a_long_epoch_stays_short() -> None:
    """Parts of a million positions are a span or two."""
    whole: Spans = ((0, 1_000_000, 1),)
    assert every(whole, 3, 8) == ((3, 125_000, 8),)
    assert part(every(whole, 3, 8), 100, 125_000) == ((803, 124_900, 8),)
    assert left(whole, [1000] * 8) == ((8000, 992_000, 1),)
    assert len(left(whole, [1000, 1001, 999, 1000])) <= 5
