"""Batches on their way from a worker to its parent: in slots that are used again, and never while somebody looks."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ome_tensor_client.torch import batch as module  # noqa: E402
from ome_tensor_client.torch.batch import Batch, as_batch  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="slots are Linux's")


class Line:
    """A worker and its parent in one process: batches go through pickle and slots."""

    def __init__(self) -> None:
        self.writer = module._Writer()

    def send(self, batch: Batch) -> tuple[Batch, bool]:
        """What arrives, and whether it came in a slot."""
        placed = self.writer.place(batch)
        if placed is None:
            return pickle.loads(pickle.dumps(batch)), False
        function, arguments = pickle.loads(pickle.dumps((module._taken, placed)))
        return function(*arguments), True

    @property
    def busy(self) -> int:
        """Slots in use."""
        return int(np.count_nonzero(self.writer._flags.memory[: module._MOST_SLOTS]))


def batch_of(number: int, *shapes: tuple[int, ...]) -> Batch:
    dtypes = [torch.float32, torch.uint8, torch.int64, torch.bool, torch.bfloat16]
    random = np.random.default_rng(number)
    tensors = {
        f"t{place}": torch.from_numpy(random.integers(0, 2, shape)).to(dtypes[(number + place) % len(dtypes)]) * 1
        for place, shape in enumerate(shapes)
    }
    return Batch(tensors | {"name": f"batch {number}", "labels": [number, None]})


def same(found: Batch, wanted: Batch) -> bool:
    return list(found) == list(wanted) and all(
        torch.equal(found[key], value) and found[key].dtype == value.dtype
        if isinstance(value, torch.Tensor)
        else found[key] == value
        for key, value in wanted.items()
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 50)), max_size=4), min_size=1, max_size=20),
    st.integers(0, 6),
)
def test_what_arrives_is_what_was_sent_for_as_long_as_it_is_held(shapes: list[list[tuple[int, int]]], keep: int) -> None:
    line, held = Line(), []
    for number, each in enumerate(shapes):
        wanted = batch_of(number, *each)
        found, _ = line.send(wanted)
        held.append((found, wanted))
        if len(held) > keep:
            held.pop(0)
        assert all(same(*pair) for pair in held)
        del found
    held.clear()
    assert line.busy == 0


def test_slots_are_used_again_when_the_last_tensor_is_gone() -> None:
    line = Line()
    for number in range(50):
        found, in_slot = line.send(batch_of(number, (50, 50), (5,)))
        assert in_slot
        assert line.busy == 1
        view = found["t0"][3:]
        del found
        # A view of a tensor holds the slot, too.
        assert line.busy == 1
        del view
        assert line.busy == 0
    assert len(line.writer._slots) == 1
    assert line.writer._slots[0].nbytes == 1 << 16


def test_more_than_there_are_slots_for_goes_another_way() -> None:
    line = Line()
    held = [line.send(batch_of(number, (64,))) for number in range(module._MOST_SLOTS + 5)]
    assert [in_slot for _, in_slot in held] == [True] * module._MOST_SLOTS + [False] * 5
    assert all(same(found, batch_of(number, (64,))) for number, (found, _) in enumerate(held))
    del held[7]
    assert line.send(batch_of(1, (64,)))[1]


def forked() -> None:
    """A batch, and a copy of it that dies in a process that is forked off."""
    line = Line()
    wanted = batch_of(1, (50, 50))
    held = [line.send(wanted)[0]]
    child = os.fork()
    if child == 0:
        held.clear()
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert line.busy == 1
    other = line.send(batch_of(2, (50, 50)))[0]
    assert same(held[0], wanted)
    del other
    held.clear()
    assert line.busy == 0


def test_a_copy_that_dies_in_a_forked_process_frees_nothing() -> None:
    """Its parent may still read the slot, or another batch that came in it since. In a process of its own: others' threads do not like a fork."""
    code = "from tests.unit.test_training_batch import forked; forked()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_larger_batches_take_the_room_of_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 3 << 20)
    line = Line()
    small = [line.send(batch_of(number, (1000,)))[0] for number in range(10)]
    del small
    large = line.send(batch_of(0, (800, 800)))
    assert large[1]
    assert same(large[0], batch_of(0, (800, 800)))
    assert sum(slot.nbytes for slot in line.writer._slots) <= 3 << 20
    assert not line.send(batch_of(1, (2000, 2000)))[1]


def test_what_a_worker_has_let_go_of_is_not_kept_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that lives on: batches that grow would leave all that they have been in."""
    monkeypatch.setattr(module, "_MOST_BYTES", 8 << 20)
    line = Line()
    for number in range(1, 8):
        assert line.send(Batch(growing=torch.zeros(number << 20, dtype=torch.uint8)))[1]
        # One has been let go of since the others were looked at.
        mine = [key for key in module._mapped if module._is_kept(*key[:4])]
        assert len(module._mapped) <= len(mine) + 1
    assert len(line.writer._slots) == 1


def test_a_class_of_tensors_of_its_own_stays() -> None:
    class Marked(torch.Tensor):  # type: ignore[misc, name-defined]  # torch is optional, and not typed here
        pass

    line = Line()
    placed = line.writer.place(Batch(marked=torch.ones(3).as_subclass(Marked), plain=torch.ones(2)))
    assert placed is not None
    assert [type(value) for value in module._taken(*placed).values()] == [Marked, torch.Tensor]


def test_what_slots_do_not_take() -> None:
    """Gradients and sparse tensors go torch's own way, whole batches at a time."""
    line = Line()
    assert not line.send(Batch(weight=torch.zeros(3, requires_grad=True)))[1]
    assert not line.send(Batch(sparse=torch.eye(3).to_sparse()))[1]
    found, in_slot = line.send(Batch(words=["a"], turned=torch.arange(12).reshape(3, 4).T))
    assert in_slot
    assert torch.equal(found["turned"], torch.arange(12).reshape(3, 4).T)


def test_outside_of_a_worker_a_batch_is_a_dict() -> None:
    batch = batch_of(3, (4, 5))
    for again in (pickle.loads(pickle.dumps(batch)), copy.copy(batch), copy.deepcopy(batch)):
        assert type(again) is Batch
        assert same(again, batch)
    assert copy.copy(batch)["t0"] is batch["t0"]
    plain: Any = {"a": 1}
    assert type(as_batch(plain)) is Batch
    assert as_batch([1]) == [1]
