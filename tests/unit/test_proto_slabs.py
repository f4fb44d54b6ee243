"""Slabs tile their block exactly, in C order, each contiguous and no larger than asked."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ome_tensor.errors import InvalidArgument
from ome_tensor.slabs import split_into_slabs

shapes = st.tuples(*[st.integers(1, 5)] * 5)


@settings(deadline=None)
@given(shapes, st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 400))
def test_slabs_tile_the_block(shape, itemsize, max_bytes):
    block = np.arange(math.prod(shape)).reshape(shape)
    slabs = split_into_slabs(shape, itemsize, max_bytes)
    due = 0
    for slab in slabs:
        assert slab.offset == due
        assert math.prod(slab.shape) * itemsize <= max(max_bytes, itemsize)
        part = block[tuple(slice(first, first + size) for first, size in zip(slab.origin, slab.shape, strict=True))]
        # C order and contiguity in one: the part's elements are the block's next ones.
        assert np.array_equal(part.ravel(), np.arange(due, due + part.size))
        assert part.shape == slab.shape
        due += part.size
    assert due == block.size
    assert [slabs[i] for i in range(len(slabs))] == list(slabs)
    with pytest.raises(IndexError):
        slabs[len(slabs)]


@settings(deadline=None)
@given(shapes, st.integers(1, 400))
def test_no_slab_could_take_its_neighbour_too(shape, max_bytes):
    """The cut is as coarse as its rule allows: within one run, only the last slab is smaller."""
    slabs = list(split_into_slabs(shape, 1, max_bytes))
    for before, after in itertools.pairwise(slabs):
        same_run = sum(a != b for a, b in zip(before.origin, after.origin, strict=True)) == 1
        if same_run:
            assert math.prod(after.shape) <= math.prod(before.shape)


def test_rows_are_the_smallest_unit_until_one_is_too_large():
    assert [slab.shape for slab in split_into_slabs((1, 1, 1, 5, 10), 2, 40)] == [
        (1, 1, 1, 2, 10),
        (1, 1, 1, 2, 10),
        (1, 1, 1, 1, 10),
    ]
    assert [slab.shape[4] for slab in split_into_slabs((1, 1, 1, 1, 10), 2, 8)] == [4, 4, 2]


def test_a_large_block_costs_nothing():
    slabs = split_into_slabs((10**6, 10**3, 10, 10**5, 10**5), 2, 2**20)
    last = slabs[len(slabs) - 1]
    assert last.offset + math.prod(last.shape) == 10**6 * 10**3 * 10 * 10**10


@pytest.mark.parametrize("shape", [(0, 1, 1, 2, 2), (1, 1, 0, 0, 5)])
def test_an_empty_block_is_one_slab(shape):
    assert [(slab.offset, slab.shape) for slab in split_into_slabs(shape, 2, 10)] == [(0, shape)]


@pytest.mark.parametrize("arguments", [((), 1, 1), ((1, -1), 1, 1), ((1,), 0, 1), ((1,), 1, 0)])
def test_senseless_arguments_are_refused(arguments):
    with pytest.raises(InvalidArgument):
        split_into_slabs(*arguments)
