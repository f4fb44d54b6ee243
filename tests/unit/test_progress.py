"""Who reads what of an epoch, with ranks and workers that come and go: arithmetic, against sets of positions."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ome_tensor import InvalidArgument
from ome_tensor.spans import Spans, count

pytest.importorskip("torch")
from ome_tensor_client.torch.progress import Progress, requests


def listed(spans: Spans) -> list[int]:
    return [first + place * stride for first, length, stride in spans for place in range(length)]


def part_of(begun: Progress, worker: int, workers: int, block: int, skip: int = 0) -> list[int]:
    """All that a worker gets, over its requests."""
    return list(chain.from_iterable(map(listed, requests(begun.remaining(block, False), block, worker, workers, skip))))


def through_json(progress: Progress) -> Progress:
    return Progress.of_state(json.loads(json.dumps(progress.state())))


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int, list[list[int]]]]]:
    """An epoch of some samples, and runs over it: ranks, workers, block, and how much each worker of each rank takes, in parts of 100."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        ranks, workers, block = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
        shares = draw(st.lists(st.lists(st.integers(0, 100), min_size=workers, max_size=workers), min_size=ranks, max_size=ranks))
        found.append((ranks, workers, block, shares))
    return draw(st.integers(0, 200)), found


@settings(max_examples=1500, deadline=None)
@given(runs())
def test_every_sample_once_however_unevenly_workers_and_ranks_have_come(case: Any) -> None:
    total, each = case
    seen: list[int] = []
    states: list[Progress] = []
    for ranks, workers, block, shares in each:
        fresh = [Progress.of_epoch("data", 0, total, rank, ranks) for rank in range(ranks)]
        begun = [Progress.going_on(states, one, in_step=False) for one in fresh] if states else fresh
        states = []
        for one, mine in zip(begun, shares, strict=True):
            taken = []
            for worker, share in enumerate(mine):
                own = part_of(one, worker, workers, block)
                taken.append(len(own) * share // 100)
                seen += own[: taken[-1]]
                assert part_of(one, worker, workers, block, taken[-1]) == own[taken[-1] :]
            states.append(through_json(one.of_workers(taken, block, False)))
    seen += [place for one in states for place in listed(one.remaining(1, False))]
    assert sorted(seen) == list(range(total))


@given(st.integers(0, 300), st.integers(1, 8), st.integers(1, 4), st.integers(1, 6), st.integers(0, 100))
def test_ranks_in_step_stay_a_prefix(total: int, ranks: int, workers: int, block: int, taken: int) -> None:
    """One number is all there is to keep, the workers take turns in the order of the rank, and one state speaks for all."""
    states = []
    for rank in range(ranks):
        begun = Progress.of_epoch("data", 3, total, rank, ranks)
        whole = listed(begun.remaining(1, False))
        assert whole == list(range(rank, total, ranks))
        parts = [part_of(begun, worker, workers, block) for worker in range(workers)]
        turns = [parts[turn % workers][turn // workers * block :][:block] for turn in range(-(-len(whole) // block))]
        assert list(chain.from_iterable(turns)) == whole
        states.append(begun.after(min(taken, len(whole))))
    here = Progress.of_epoch("data", 3, total, 0, ranks + 1)
    first = states[0]
    merged = Progress.going_on(states, here, in_step=False)
    assert listed(merged.base) == list(range(min(total, taken * ranks), total))
    assert Progress.going_on([first], here, in_step=True).base == merged.base or first.taken * ranks > total


def test_all_ranks_get_as_many_whole_batches_with_drop_last() -> None:
    for ranks in range(1, 5):
        counts = {count(Progress.of_epoch("d", 0, 103, rank, ranks).remaining(4, True)) for rank in range(ranks)}
        assert counts == {103 // (4 * ranks) * 4}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": 2}, "of format 2, not 1"),
        ({"base": [[0, 10, 0]]}, "do not fit together"),
        ({"base": [[0, 11, 1]]}, "do not fit together"),
        ({"base": "many"}, "it is damaged"),
        ({"rank": 2}, "do not fit together"),
        ({"taken": None}, "it is damaged"),
        ({"taken": -1}, "do not fit together"),
    ],
)
def test_damaged_states(change: dict[str, Any], words: str) -> None:
    state = Progress.of_epoch("data", 0, 10, 0, 2).state()
    with pytest.raises(InvalidArgument, match=words) as caught:
        Progress.of_state(state | change)
    assert caught.value.field == "state_dict"
    for nothing in ({}, None, 7, {"base": []}):
        with pytest.raises(InvalidArgument, match="none of this dataset's"):
            Progress.of_state(nothing)


def test_states_that_say_too_little() -> None:
    def of(rank: int, ranks: int, **more: Any) -> Progress:
        return Progress.of_epoch(more.get("data", "data"), more.get("epoch", 0), 10, rank, ranks)

    with pytest.raises(InvalidArgument, match=r"rank 0 of 2, and this is rank 0 of 3: give the states of all ranks"):
        Progress.going_on([of(0, 2)], of(0, 3), in_step=False)
    with pytest.raises(InvalidArgument, match="of other samples"):
        Progress.going_on([of(0, 2, data="others")], of(0, 2), in_step=False)
    with pytest.raises(InvalidArgument, match=r"of ranks \[0, 0\], not of each of 2 once"):
        Progress.going_on([of(0, 2), of(0, 2)], of(0, 2), in_step=False)
    with pytest.raises(InvalidArgument, match="of different epochs"):
        Progress.going_on([of(0, 2), of(1, 2, epoch=1)], of(0, 2), in_step=False)
    with pytest.raises(InvalidArgument, match="the list is empty"):
        Progress.going_on([], of(0, 2), in_step=False)


def test_a_long_list_of_spans_is_read_in_several_requests() -> None:
    begun = Progress.of_epoch("data", 0, 4_000_000, 1, 2)
    pieces = list(requests(begun.remaining(32, False), 32, 1, 2, 0))
    assert [len(piece) for piece in pieces[:2]] == [256, 1024]
    assert max(map(len, pieces)) <= 16_384
    assert sum(map(count, pieces)) == 1_000_000
    assert [count(piece) % 32 for piece in pieces[:-1]] == [0] * (len(pieces) - 1)
    # One worker reads a run, whatever its length.
    assert list(requests(begun.remaining(32, False), 32, 0, 1, 100)) == [((201, 1_999_900, 2),)]
