"""On the way to a device, with a fake one: buffers that are used again, order, bounds.

The fake's side stream does nothing before it is told to, so that whoever writes to a pinned buffer too early, or shows a tensor before its copy is
ordered, shows wrong pixels. Two tests are of the fake: with events that lie, and with nobody who orders, the pixels are wrong.
"""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.integration.images import random_pixels

from ome_tensor import InvalidArgument
from ome_tensor.batches import ImageBatch, arrays_of, with_arrays
from ome_tensor.cuda_edge import TorchCuda
from ome_tensor.staging import PinnedPool, upload_each

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


class FakeEvent:
    def __init__(self, edge: FakeEdge, point: int) -> None:
        self._edge, self.point = edge, point

    def query(self) -> bool:
        return self._edge.done >= self.point

    def synchronize(self) -> None:
        # How much was still queued behind it: 0 is a wait for everything.
        self._edge.waits.append(len(self._edge.queue) - self.point)
        self._edge.run(self.point)


class FakeTensor:
    """Memory on the device: shows what has been copied there, up to what the current stream waits for."""

    def __init__(self, edge: FakeEdge, memory: np.ndarray, array: np.ndarray) -> None:
        self._edge, self.memory, self.array = edge, memory, array

    def numpy(self) -> np.ndarray:
        assert any(self is kept for kept in self._edge.kept), "used before it was handed over"
        self._edge.run(self._edge.current_waits_for)
        return self.array


class FakeEdge:
    """A device whose copies run when somebody waits for them, or after so many of them are queued.

    Args:
        behind: How many copies the side stream may be behind; none more.

    Attributes:
        pinned_bytes, buffers: Of pinned memory that is alive now.
        made: Bytes of each buffer there ever was.
        begun: Bytes of all tensors there ever were.
    """

    def __init__(self, behind: int = 10**6) -> None:
        self.queue: list[tuple[Callable[[], np.ndarray | None], np.ndarray]] = []
        self.done = 0
        self.current_waits_for = 0
        self.kept: list[FakeTensor] = []
        self.waits: list[int] = []
        self.made: list[int] = []
        self.begun = self.pinned_bytes = self.buffers = 0
        self._behind = behind

    def pinned(self, nbytes: int) -> np.ndarray:
        self.made.append(nbytes)
        self.pinned_bytes += nbytes
        self.buffers += 1
        found = np.zeros(nbytes, np.uint8)
        weakref.finalize(found, self._gone, nbytes)
        return found

    def _gone(self, nbytes: int) -> None:
        self.pinned_bytes -= nbytes
        self.buffers -= 1

    def empty_like(self, array: np.ndarray) -> FakeTensor:
        self.begun += array.nbytes
        memory = np.full(array.nbytes, 99, np.uint8)
        dense = np.empty_like(array)
        return FakeTensor(self, memory, np.ndarray(array.shape, array.dtype, memory, strides=dense.strides))

    def copy(self, staged: np.ndarray, into: FakeTensor, at: int = 0) -> None:
        assert (staged.ndim, staged.dtype) == (1, np.uint8)
        assert at + len(staged) <= len(into.memory)
        # An address, as for CUDA: it keeps nobody's memory alive, or a buffer could not be seen to go too early.
        self.queue.append((_borrowed(staged), into.memory[at : at + len(staged)]))
        self.run(len(self.queue) - self._behind)

    def record(self) -> FakeEvent:
        return FakeEvent(self, len(self.queue))

    def hand_over(self, tensors: Sequence[Any], event: FakeEvent) -> None:
        self.current_waits_for = max(self.current_waits_for, event.point)
        self.kept += tensors

    def run(self, point: int) -> None:
        while self.done < point:
            source, target = self.queue[self.done]
            found = source()
            assert found is not None, "pinned memory went before its copy had run"
            target[...] = found
            self.queue[self.done] = (_nothing, target)
            self.done += 1


def _nothing() -> None:
    return None


def _borrowed(source: np.ndarray) -> Callable[[], np.ndarray | None]:
    """A call that gives the bytes, if the buffer that they are of still lives. Views of a buffer name it as their base."""
    buffer = source if source.base is None else source.base
    alive = weakref.ref(buffer)
    start, size = source.ctypes.data - buffer.ctypes.data, source.size

    def look() -> np.ndarray | None:
        found = alive()
        return None if found is None else found[start : start + size]

    return look


def arrays_of_sizes(sizes: Sequence[int]) -> list[np.ndarray]:
    dtypes = ("uint8", "int16", "float32")
    return [np.array(random_pixels((size,), dtypes[number % 3], number)) for number, size in enumerate(sizes)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 60_000), max_size=4), max_size=12),
    st.integers(1, 5),
    st.sampled_from([1, 70_000, 150_000, 1 << 20]),
    st.integers(0, 6),
    st.integers(0, 3),
)
def test_every_array_arrives_in_order_and_within_bounds(
    sizes: list[list[int]], depth: int, max_bytes: int, behind: int, keep: int
) -> None:
    """Whatever their sizes and number, however far the device is behind, and whenever a consumer looks."""
    items, edge = [arrays_of_sizes(some) for some in sizes], FakeEdge(behind)
    nbytes = [sum(array.nbytes for array in arrays) for arrays in items]
    held: list[tuple[int, list[FakeTensor]]] = []

    def check(number: int, tensors: list[FakeTensor]) -> None:
        for tensor, array in zip(tensors, items[number], strict=True):
            np.testing.assert_array_equal(tensor.numpy(), array, strict=True)

    found = upload_each(iter(items), edge, depth=depth, max_bytes=max_bytes, arrays=list, rebuild=lambda _, tensors: tensors)
    for number, tensors in enumerate(found):
        held.append((number, tensors))
        assert edge.pinned_bytes <= max(max_bytes, 1 << 16)
        assert edge.buffers <= depth
        # What is in flight beside the one just handed over.
        assert edge.begun - sum(nbytes[: number + 1]) <= max(max_bytes, *nbytes)
        if len(held) > keep:
            check(*held.pop(0))
    for number, tensors in held:
        check(number, tensors)
    assert len(edge.kept) == sum(map(len, items))
    assert edge.pinned_bytes == 0


def test_events_that_lie_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that does not wait for copies writes over what they have not read yet: this fake sees it."""
    monkeypatch.setattr(FakeEvent, "query", lambda _: True)
    found = list(upload_each((np.full(1000, number, np.int32) for number in range(6)), FakeEdge()))
    assert [int(tensor.numpy()[0]) for tensor in found] != list(range(6))


def test_a_stream_that_is_not_told_to_wait_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that reads before the copy."""
    monkeypatch.setattr(FakeEdge, "hand_over", lambda edge, tensors, event: edge.kept.extend(tensors))
    found = upload_each([np.zeros(1000, np.uint8)], FakeEdge())  # kept: to end it is to wait
    assert next(found).numpy()[0] == 99


def test_pinned_buffers_are_used_again() -> None:
    """As many as are in flight, and no more."""
    edge = FakeEdge()
    arrays = (np.full(50_000, number, np.int32) for number in range(40))
    found = [int(tensor.numpy()[0]) for tensor in upload_each(arrays, edge)]
    assert found == list(range(40))
    assert edge.made == [1 << 18] * 2


def test_sizes_that_change_do_not_cost_a_buffer_each_time() -> None:
    """A smaller item goes through a larger buffer; an item of image and mask through one."""
    edge = FakeEdge()
    items = [[np.full(200_000 if number % 2 else 70_000, number, np.uint8), np.full(5, number, np.uint8)] for number in range(20)]
    found = upload_each(iter(items), edge, arrays=list, rebuild=lambda _, tensors: tensors)
    for number, (image, mask) in enumerate(found):
        assert (image.numpy() == number).all()
        assert (mask.numpy() == number).all()
    assert len(edge.made) <= 3


def test_a_full_pool_waits_for_the_oldest_copy_alone() -> None:
    """The next copy to a buffer runs while the one before runs to the device."""
    edge = FakeEdge()
    arrays = (np.full(100_000, number, np.uint8) for number in range(40))
    assert len(list(upload_each(arrays, edge, depth=2, max_bytes=256 << 10))) == 40
    assert edge.waits.count(0) == 1, "at the end alone"


def test_the_pool() -> None:
    """A buffer is free when the copy from it is through, and goes when a larger one needs its place."""
    edge = FakeEdge()
    pool = PinnedPool(edge, buffers=3, max_bytes=1 << 20)

    def used(nbytes: int) -> np.ndarray:
        buffer = pool.take(nbytes)
        edge.copy(buffer[:10], edge.empty_like(buffer[:10]))
        pool.give(buffer, edge.record())
        return buffer

    first = used(1000)
    assert used(1000) is not first
    edge.run(1)
    assert used(1000) is first
    del first
    assert edge.pinned_bytes == pool.nbytes == 2 << 16
    used(1 << 20)
    assert edge.pinned_bytes == pool.nbytes == 1 << 20
    pool.close()
    assert edge.pinned_bytes == pool.nbytes == 0
    assert edge.done == len(edge.queue)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_no_more_is_read_than_is_in_flight(depth: int) -> None:
    taken = 0

    def arrays() -> Iterator[np.ndarray]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield np.full(10, number, np.int32)

    found = upload_each(arrays(), FakeEdge(), depth=depth)
    assert taken == 0
    for number in range(20):
        assert next(found).numpy()[0] == number
        assert taken == min(20, number + depth)


def test_bytes_in_flight_are_full_and_no_fuller() -> None:
    """To the end: what has been handed over makes room."""
    edge = FakeEdge()
    found = upload_each((np.full(100_000, number, np.uint8) for number in range(20)), edge, depth=10, max_bytes=350_000)
    for handed in range(1, 18):
        next(found)
        assert edge.begun - handed * 100_000 == 200_000


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_larger_than_all_pinned_memory_goes_in_pieces(depth: int) -> None:
    """Of any layout, also with gaps."""
    edge = FakeEdge()
    pixels = np.array(random_pixels((7, 100, 333), "uint16"))
    shown = [pixels, pixels.transpose(2, 0, 1), pixels[:, ::2, 1:], np.array(random_pixels((90_001,), "complex64"))]
    for tensor, array in zip(upload_each(iter(shown), edge, depth=depth, max_bytes=100_000), shown, strict=True):
        assert edge.pinned_bytes <= 100_000
        np.testing.assert_array_equal(tensor.numpy(), array, strict=True)


def test_a_permuted_array_stays_one() -> None:
    """In the order in which it lies, so that no element has to be moved for it; whole or in pieces."""
    pixels = np.array(random_pixels((4, 30, 20, 3), "uint16"))
    for max_bytes in (1 << 20, 1):
        for array in (pixels, pixels.transpose(0, 3, 1, 2), pixels[::-1, :, ::2], np.broadcast_to(pixels[:1], (4, 30, 20, 3))):
            tensor = next(upload_each([array], FakeEdge(), max_bytes=max_bytes))
            np.testing.assert_array_equal(tensor.numpy(), array, strict=True)
        tensor = next(upload_each([pixels.transpose(0, 3, 1, 2)], FakeEdge(), max_bytes=max_bytes))
        assert tensor.array.strides == pixels.transpose(0, 3, 1, 2).strides


@pytest.mark.parametrize("value", [np.array(7, np.uint16), np.zeros((0, 3), np.float32), np.zeros((2, 0), bool)])
def test_scalars_and_empty_arrays(value: np.ndarray) -> None:
    found = list(upload_each([value, value], FakeEdge()))
    assert len(found) == 2
    for tensor in found:
        np.testing.assert_array_equal(tensor.numpy(), value, strict=True)


def test_an_arrays_memory_may_change_once_it_is_on_its_way() -> None:
    """What is copied from is the pinned buffer's own."""
    memory = np.zeros(1000, np.int32)

    def arrays() -> Iterator[np.ndarray]:
        for number in range(8):
            memory[:] = number
            yield memory

    found = list(upload_each(arrays(), FakeEdge(), depth=3))
    assert [int(tensor.numpy()[0]) for tensor in found] == list(range(8))


def test_what_is_in_flight_does_not_keep_its_source() -> None:
    """A message's memory goes when it is in a buffer, also while the next one is waited for."""
    gone: list[bool] = []

    def arrays() -> Iterator[np.ndarray]:
        for number in range(3):
            array = np.full(10, number)
            alive = weakref.ref(array)
            yield array
            del array
            gone.append(alive() is None)

    found = upload_each(arrays(), FakeEdge(), depth=3)
    next(found)
    assert gone == [True, True]
    found.close()


@pytest.mark.parametrize("depth", [1, 2, 4, 9])
def test_an_error_of_the_source_comes_after_all_that_was_good(depth: int) -> None:
    def arrays() -> Iterator[np.ndarray]:
        for number in range(5):
            yield np.full(3, number, np.uint8)
        raise InvalidArgument("the sixth")

    found = upload_each(arrays(), FakeEdge(), depth=depth)
    assert [int(next(found).numpy()[0]) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(InvalidArgument, match="the sixth"):
        next(found)
    assert next(found, None) is None


def test_what_is_no_array_is_refused_where_it_comes() -> None:
    found = upload_each([np.zeros(3), "pixels"], FakeEdge())
    next(found)
    with pytest.raises(InvalidArgument, match="NumPy's, or dense torch tensors in host memory, not str"):
        next(found)


@pytest.mark.parametrize("name,value", [("depth", 0), ("depth", True), ("max_bytes", 0), ("max_bytes", "1")])
def test_bounds_are_checked_at_the_call(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        upload_each([], FakeEdge(), **{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize("how", ["close", "drop", "unused"])
def test_whoever_stops_early_lets_go_of_everything(how: str) -> None:
    """Of the source, and of buffers, once their copies are through."""
    closed = []

    class Source:
        def __iter__(self) -> Source:
            return self

        def __next__(self) -> np.ndarray:
            return np.zeros(3, np.uint8)

        def close(self) -> None:
            closed.append(True)

    edge = FakeEdge()
    found: Any = upload_each(Source(), edge, depth=3)
    if how != "unused":
        next(found)
        assert edge.buffers == 3
    if how == "drop":
        del found
        gc.collect()
    else:
        found.close()
        found.close()
        assert next(found, None) is None
    assert closed == [True]
    assert edge.buffers == 0
    assert edge.done == len(edge.queue)


def test_image_batches_with_their_masks() -> None:
    """And all else that is known of them."""
    one = np.arange(2)
    batches = [
        ImageBatch(
            np.full((2, 4, 4), n, np.uint16), one + n, n, np.zeros((2, 4), int), np.zeros((2, 3), int), one, one,
            {"mask": np.full((2, 1, 4, 4), n, np.uint8), "other": np.full((2, 4, 4), -n, np.int16)},
        )
        for n in range(5)
    ]  # fmt: skip
    for n, batch in enumerate(upload_each(iter(batches), FakeEdge(), arrays=arrays_of, rebuild=with_arrays)):
        assert (batch.array.numpy() == n).all()
        assert list(batch.beside) == ["mask", "other"]
        assert (batch.beside["mask"].numpy() == n).all()
        assert (batch.beside["other"].numpy() == -n).all()
        assert batch.position == n
        np.testing.assert_array_equal(batch.numbers, one + n)
    assert isinstance(batches[0].array, np.ndarray), "the source's own are as they were"


@needs_torch
def test_torch_tensors_are_taken_too() -> None:
    """By memory, in their layout; also of dtypes that NumPy does not have; not what is not dense."""
    import torch

    channels_last = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensor = next(upload_each([channels_last], FakeEdge()))
    assert [stride // 4 for stride in tensor.array.strides] == list(channels_last.stride())
    np.testing.assert_array_equal(tensor.numpy(), channels_last.numpy(), strict=True)

    class Viewing(FakeEdge):
        def empty_like(self, array: np.ndarray) -> Any:
            found: Any = super().empty_like(array)
            found.view = lambda dtype: SimpleNamespace(bits=found, dtype=dtype)
            return found

    edge = Viewing()
    half = torch.rand(7).bfloat16()
    found = upload_each([half], edge)
    edge.hand_over = lambda tensors, event: None  # type: ignore[method-assign]
    shown = next(found)
    edge.run(len(edge.queue))
    assert shown.dtype is torch.bfloat16
    np.testing.assert_array_equal(shown.bits.array, half.view(torch.int16).numpy(), strict=True)
    with pytest.raises(InvalidArgument, match="dense torch tensors"):
        next(upload_each([torch.eye(3).to_sparse()], FakeEdge()))


@needs_torch
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint16", "float16", "float64", "complex64"])
def test_what_torch_makes_of_it(dtype: str) -> None:
    """Its part of the way, on tensors of the CPU: layouts and bytes, whole or in pieces."""
    import torch

    class OnCpu(TorchCuda):
        def __init__(self) -> None:
            cuda = SimpleNamespace(stream=lambda _: nullcontext())
            names = ("empty", "empty_strided", "from_numpy", "uint8")
            self._torch = SimpleNamespace(cuda=cuda, **{name: getattr(torch, name) for name in names})
            self._where, self._side = torch.device("cpu"), None

        def pinned(self, nbytes: int) -> np.ndarray:
            return np.full(nbytes, 77, np.uint8)

        def record(self) -> Any:
            return SimpleNamespace(query=lambda: True, synchronize=lambda: None)

        def hand_over(self, tensors: Sequence[Any], event: Any) -> None:
            pass

    pixels = np.array(random_pixels((3, 40, 50, 2), dtype))
    shown = [pixels, pixels.transpose(0, 3, 1, 2), pixels[::-1, :, ::2], np.broadcast_to(pixels[:1], pixels.shape)]
    shown += [pixels[:0], pixels[:, :0].transpose(3, 2, 1, 0), np.array(pixels[0, 0, 0, 0]), pixels[:1].transpose(1, 0, 3, 2)]
    # More than fits into pinned memory as such.
    shown += [np.tile(pixels, (70, 1, 1, 1))[:, 1:].transpose(3, 1, 0, 2)]
    for tensor, array in zip(upload_each(iter(shown), OnCpu(), max_bytes=1), shown, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array, strict=True)
        assert not tensor._is_view()
        assert tensor.untyped_storage().nbytes() == array.nbytes
        if array.flags.c_contiguous:
            assert tensor.is_contiguous()
        if not array.size:
            assert torch.empty(0).stride() == tensor.reshape(-1).stride()
    half = torch.rand(3, 4).bfloat16().t()
    found = next(upload_each([half], OnCpu()))
    assert torch.equal(found, half)
    assert found.stride() == half.stride()
