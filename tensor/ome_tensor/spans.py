"""Sequences of positions as a few arithmetic runs: who reads what of an epoch, and what is left of one.

A *span* is ``(first, count, stride)``: the positions first, first + stride, ... A tuple of spans is one sequence, one span after the other. All
functions take such a sequence and give another, without ever listing its positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

__all__ = ["Span", "Spans", "append", "blocks", "count", "every", "left", "part"]

Span: TypeAlias = tuple[int, int, int]
Spans: TypeAlias = tuple[Span, ...]


def count(spans: Sequence[Span]) -> int:
    """Number of positions."""
    return sum(length for _, length, _ in spans)


def part(spans: Sequence[Span], begin: int, end: int) -> Spans:
    """The positions with indices from ``begin`` up to ``end`` of a sequence; as many as there are."""
    found: list[Span] = []
    for first, length, stride in spans:
        low, high = max(0, begin), min(length, end)
        if low < high:
            append(found, (first + low * stride, high - low, stride))
        begin -= length
        end -= length
        if end <= 0:
            break
    return tuple(found)


def every(spans: Sequence[Span], offset: int, step: int) -> Spans:
    """Every ``step``-th position of a sequence, from index ``offset`` on."""
    found: list[Span] = []
    for first, length, stride in spans:
        if offset < length:
            taken = -(-(length - offset) // step)
            append(found, (first + offset * stride, taken, stride * step))
            offset += taken * step
        offset -= length
    return tuple(found)


def blocks(spans: Sequence[Span], size: int, offset: int, step: int) -> Iterator[Spans]:
    """Every ``step``-th block of ``size`` positions of a sequence, from block ``offset`` on; the last block of all may be shorter."""
    total = count(spans)
    # Walked once: a long sequence has many blocks.
    at, passed = 0, 0
    for begin in range(offset * size, total, step * size):
        end = min(begin + size, total)
        while passed + spans[at][1] <= begin:
            passed += spans[at][1]
            at += 1
        last, beyond = at, passed
        while beyond < end:
            beyond += spans[last][1]
            last += 1
        yield part(spans[at:last], begin - passed, end - passed)


def left(spans: Sequence[Span], taken: Sequence[int]) -> Spans:
    """What is left of a sequence that was dealt out like cards to ``len(taken)`` readers, each of whom has taken so many of its cards.

    In the order of the sequence as far as all have come; what some have taken already is not among it.
    """
    ranks = len(taken)
    longest = max(taken)
    if min(taken) == longest:
        return part(spans, longest * ranks, count(spans))
    found: list[Span] = []
    for rank, number in enumerate(taken):
        for span in part(every(spans, rank, ranks), number, longest):
            append(found, span)
    for span in part(spans, longest * ranks, count(spans)):
        append(found, span)
    return tuple(found)


def append(found: list[Span], span: Span) -> None:
    """Add a span to a sequence: to its last one where it continues that."""
    first, length, stride = span
    if length == 1:
        stride = 1
    if found:
        begin, number, step = found[-1]
        # A single position continues whatever is one step away from it.
        step = first - begin if number == 1 and first > begin else step
        if first == begin + number * step and (length == 1 or stride == step):
            found[-1] = (begin, number + length, step)
            return
    found.append((first, length, stride))
