"""Upstream as oracle: the same random plan on upstream and on each of our views gives the same tensor, or is refused by both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.conformance.images import IMAGES
from tests.conformance.implementations import Implementation, Upstream, as_numpy
from tests.conformance.strategies import iterations, plans

import ome_tensor

#: Encodings and dtypes that upstream reads, one of each kind.
NAMES = ["planes", "chunks", "chunks_flat", "bytes_lz4", "bytes_i16", "chunks_f32", "stack", "stack_u16", "single"]

# The fixtures hold servers and clients, which no example changes. No database: a run depends on nothing that lies about.
ORACLE = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate, Phase.target, Phase.shrink],
)

#: A refused plan's outcome: that it is refused. Messages are compared row by row elsewhere.
REFUSED = "refused"

Outcome = Any


def described(view: Any) -> Outcome:
    """All that can be said of a view, and its pixels."""
    array = view.to_numpy()
    return view.shape, view.strides, view.dtype, view.layout, array


def outcome(implementation: Implementation, name: str, plan: dict[str, Any], use: Any = described) -> Outcome:
    """What a plan gives, or that it is refused: by a ValueError, ours by one of our own."""
    refusals = (ValueError,) if implementation.name == "upstream" else (ome_tensor.InvalidArgument,)
    try:
        return use(implementation.view(name, **plan))
    except refusals:
        return REFUSED


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    """Equal outcomes, arrays included."""
    if ours is REFUSED or theirs is REFUSED:
        assert ours is theirs
        return
    assert ours[:-1] == theirs[:-1]
    assert (ours[-1].shape, ours[-1].dtype) == (theirs[-1].shape, theirs[-1].dtype)
    np.testing.assert_array_equal(ours[-1], theirs[-1])


@pytest.fixture
def examples(our_view: Implementation) -> int:
    """Fewer where each example is a call over a socket."""
    return 150 if our_view.name == "remote" else 300


def test_plans(our_view: Implementation, examples: int) -> None:
    """Arrays, shapes, strides, dtypes and layouts of random plans."""

    @settings(ORACLE, max_examples=examples)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(NAMES), label="image")
        plan = data.draw(plans(IMAGES[name]), label="plan")
        assert_same(outcome(our_view, name, plan), outcome(Upstream(), name, plan))

    check()


def described_tiles(method: str, arguments: dict[str, Any]) -> Any:
    """All tiles, in order."""

    def use(view: Any) -> list[np.ndarray]:
        return [as_numpy(tile) for tile in getattr(view, method)(**arguments)]

    return use


def test_iterations(our_view: Implementation, examples: int) -> None:
    """Batches and tiles of random plans: the same ones, in the same order, for the same seed."""

    @settings(ORACLE, max_examples=examples // 3)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(NAMES), label="image")
        plan = data.draw(plans(IMAGES[name]), label="plan")
        use = described_tiles(*data.draw(iterations(IMAGES[name]), label="iteration"))
        ours, theirs = outcome(our_view, name, plan, use), outcome(Upstream(), name, plan, use)
        if ours is REFUSED or theirs is REFUSED:
            assert ours is theirs
            return
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)

    check()


def test_messages_agree(our_view: Implementation, examples: int) -> None:
    """Whatever a random plan is refused for, local, lazy and remote views say it in the same words."""

    def verdict(implementation: Implementation, name: str, plan: dict[str, Any]) -> tuple[type, str] | None:
        try:
            described(implementation.view(name, **plan))
        except ome_tensor.OmeTensorError as error:
            return type(error), str(error)
        return None

    @settings(ORACLE, max_examples=examples)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(["chunks", "planes"]), label="image")
        plan = data.draw(plans(IMAGES[name]), label="plan")
        assert verdict(our_view, name, plan) == verdict(Implementation(), name, plan)

    check()


def test_numpy_is_the_oracle_of_indexing(our_view: Implementation, examples: int) -> None:
    """``view[...]`` is NumPy basic indexing of the view's array, on every encoding."""

    @settings(ORACLE, max_examples=examples // 3)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(IMAGES)), label="image")
        layout = "".join(data.draw(st.permutations("TZCYX"), label="layout"))
        view = our_view.view(name, layout=layout)
        array = IMAGES[name].pixels.transpose(["TZCYX".index(letter) for letter in layout])
        key = []
        for letter, size in zip(layout, array.shape, strict=True):
            start = data.draw(st.integers(0, size - 1))
            stop = data.draw(st.integers(start + 1, size))
            step = data.draw(st.sampled_from([1, 2])) if letter in "TZC" else 1
            # One axis must stay: it is the first.
            part: Any = slice(start, stop, step)
            key.append(part if not key or data.draw(st.booleans()) else data.draw(st.sampled_from([start, start - size])))
        key = key[: data.draw(st.integers(1, 5))]
        narrowed = view[tuple(key)]
        assert narrowed.shape == array[tuple(key)].shape
        np.testing.assert_array_equal(narrowed.to_numpy(), array[tuple(key)])

    check()
