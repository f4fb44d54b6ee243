"""What takes tensors over: DLPack consumers with their streams, CuPy, page-locked memory, JAX. With fakes where there is no device."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.integration.images import random_pixels

from ome_tensor import DeviceUnavailable, DLPackTensor, InvalidArgument, MissingDependency, TensorView, handoff, staging
from ome_tensor.batches import BatchArray
from ome_tensor.handoff import check_stream, export_tensor, to_cupy
from ome_tensor.staging import jax_each, pinned_each

HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_JAX = importlib.util.find_spec("jax") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
needs_jax = pytest.mark.skipif(not HAS_JAX, reason="jax is not installed")


# --- DLPack -----------------------------------------------------------------------------------------------------------


class FakeCudaTensor:
    """What torch's tensor on a device is to a DLPack consumer, in releases that know DLPack 1.0."""

    def __init__(self, asked: list[dict[str, Any]] | None = None) -> None:
        self.asked: list[dict[str, Any]] = [] if asked is None else asked
        self.copies = 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, stream: Any = -1, max_version: Any = None, dl_device: Any = None, copy: bool | None = None) -> str:
        self.asked.append({"stream": stream, "max_version": max_version, "dl_device": dl_device, "copy": copy})
        return "capsule"

    def clone(self) -> FakeCudaTensor:
        self.copies += 1
        return type(self)(self.asked)

    def cpu(self) -> DLPackTensor:
        return DLPackTensor(np.arange(3))


class OldCudaTensor(FakeCudaTensor):
    """The same in older ones."""

    def __dlpack__(self, stream: Any = None) -> str:  # type: ignore[override]
        self.asked.append({"stream": stream})
        return "capsule"


def batch_of(array: Any) -> BatchArray:
    one = np.zeros(1, np.int64)
    return BatchArray(array, one, 0, np.zeros((1, 4), np.int64), np.zeros((1, 3), np.int64))


@pytest.mark.parametrize("stream,told", [(None, 1), (1, 1), (-1, -1), (94_000_000_000, 94_000_000_000), (np.int64(7), 7)])
@pytest.mark.parametrize("kind", [FakeCudaTensor, OldCudaTensor])
def test_a_batch_on_a_device_passes_the_consumers_stream_on(kind: type[FakeCudaTensor], stream: Any, told: int) -> None:
    """Always outright; and nothing that an older torch does not know."""
    tensor = kind()
    batch = batch_of(tensor)
    assert batch.__dlpack__(stream=stream) == "capsule"
    assert batch.__dlpack__(stream=stream, max_version=(1, 0), copy=None, dl_device=None) == "capsule"
    assert batch.__dlpack__(stream=stream, dl_device=(2, 0), copy=False) == "capsule"
    assert [asked["stream"] for asked in tensor.asked] == [told] * 3
    if kind is FakeCudaTensor:
        assert [asked["max_version"] for asked in tensor.asked] == [None, (1, 0), None]
    assert batch.__dlpack_device__() == (2, 0)
    assert tensor.copies == 0


@pytest.mark.parametrize("kind", [FakeCudaTensor, OldCudaTensor])
def test_copies_and_other_devices_by_any_torch(kind: type[FakeCudaTensor]) -> None:
    """A copy where it is; one on the CPU; and nowhere else."""
    tensor = kind()
    assert export_tensor(tensor, copy=True) == "capsule"
    assert (tensor.copies, len(tensor.asked)) == (1, 1)
    assert "dltensor" in repr(export_tensor(tensor, dl_device=(1, 0), stream=None))
    for device, copy in (((1, 0), False), ((2, 1), None), ((13, 0), True)):
        with pytest.raises(BufferError, match="cannot be exported"):
            export_tensor(tensor, dl_device=device, copy=copy)


def test_the_threads_own_stream_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of torch refuse it."""
    finished: list[Any] = []
    monkeypatch.setattr(handoff, "_finish", finished.append)
    tensor = FakeCudaTensor()
    assert export_tensor(tensor, stream=2) == "capsule"
    assert finished == [tensor]
    assert tensor.asked[0]["stream"] == -1


@pytest.mark.parametrize("stream", [0, -2, True, "1", 1.0])
def test_what_is_no_stream(stream: Any) -> None:
    with pytest.raises(BufferError, match="stream must be None, 1, 2, -1 or a cudaStream_t"):
        check_stream(stream)
    with pytest.raises(BufferError, match="stream must be"):
        batch_of(FakeCudaTensor()).__dlpack__(stream=stream)


def test_a_batch_on_the_cpu_takes_no_stream() -> None:
    batch = batch_of(np.zeros((1, 4), np.uint8))
    assert np.from_dlpack(batch).shape == (1, 4)
    with pytest.raises(RuntimeError, match="a CPU tensor takes no stream"):
        batch.__dlpack__(stream=1)


@needs_torch
def test_a_batch_of_a_torch_tensor_on_the_cpu() -> None:
    """As pinned ones are."""
    import torch

    batch = batch_of(torch.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(np.from_dlpack(batch), np.arange(6).reshape(2, 3))
    assert batch.to_torch() is batch.array
    with pytest.raises(RuntimeError, match="takes no stream"):
        batch.__dlpack__(stream=1)


# --- other frameworks -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_cupy_that_is_not_there() -> None:
    for use in (lambda: to_cupy(FakeCudaTensor()), batch_of(FakeCudaTensor()).to_cupy):
        with pytest.raises(MissingDependency, match="CuPy is not installed"):
            use()


def test_cupy_wants_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CuPy that says what it was given."""
    import sys

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(from_dlpack=lambda producer: ("cupy", producer)))
    tensor = FakeCudaTensor()
    assert to_cupy(tensor) == ("cupy", tensor)
    with pytest.raises(InvalidArgument, match="ask for device='cuda'"):
        to_cupy(DLPackTensor(np.zeros(3)))


def test_pinned_memory_needs_a_device() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceUnavailable, match="pin_memory=True needs CUDA, and torch reports no CUDA") as caught:
        pinned_each(iter([]))
    assert caught.value.field == "pin_memory"


@needs_jax
@pytest.mark.parametrize("depth", [1, 3])
def test_jax_gets_items_while_others_are_on_their_way(depth: int) -> None:
    import jax

    taken = []

    def items() -> Iterator[dict[str, Any]]:
        for number in range(8):
            taken.append(number)
            yield {"pixels": np.full((2, 3), number, np.float32), "name": number}

    found = jax_each(
        items(), depth=depth, arrays=lambda item: [item["pixels"]], rebuild=lambda item, parts: item | {"pixels": parts[0]}
    )
    assert taken == []
    for number in range(8):
        item = next(found)
        assert len(taken) == min(8, number + depth)
        assert isinstance(item["pixels"], jax.Array)
        assert item["name"] == number
        np.testing.assert_array_equal(np.asarray(item["pixels"]), np.full((2, 3), number, np.float32))
    assert next(found, None) is None


@needs_torch
def test_pinned_memory_is_one_copy_in_the_same_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a torch whose page-locked memory is any memory."""
    import torch

    asked = []

    def empty_strided(*args: Any, pin_memory: bool, **more: Any) -> Any:
        asked.append(pin_memory)
        return torch.empty_strided(*args, **more)

    monkeypatch.setattr(
        staging, "check_pinned", lambda: SimpleNamespace(empty_strided=empty_strided, from_numpy=torch.from_numpy)
    )
    pixels = np.array(random_pixels((2, 5, 6, 3), "float32"))
    given = {"a": pixels.transpose(0, 3, 1, 2), "b": torch.rand(3).bfloat16(), "c": np.zeros((0, 2), np.int16)}
    taken = []
    found = pinned_each(
        (taken.append(n) or dict(given, n=n) for n in range(3)),  # type: ignore[func-returns-value]
        arrays=lambda item: [item[key] for key in "abc"],
        rebuild=lambda item, tensors: item | dict(zip("abc", tensors, strict=True)),
    )
    for n, item in enumerate(found):
        assert taken == list(range(n + 1)), "nothing is read ahead"
        assert item["n"] == n
        np.testing.assert_array_equal(item["a"].numpy(), given["a"], strict=True)
        assert item["a"].numpy().strides == given["a"].strides
        assert not np.shares_memory(item["a"].numpy(), pixels)
        assert torch.equal(item["b"], given["b"])
        assert tuple(item["c"].shape) == (0, 2)
        assert item["c"].is_contiguous()
    assert asked == [True] * 9


@needs_torch
def test_no_cuda_is_said_before_anything_is_read() -> None:
    """At the call."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceUnavailable, match="CUDA device requested but torch reports no CUDA"):
        handoff.upload_each(iter([]), handoff.Device("cuda"))
    view = TensorView.__new__(TensorView)
    with pytest.raises(DeviceUnavailable, match="CUDA device requested"):
        view.to_cupy()


@needs_jax
@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "not aligned"])
def test_memory_that_is_used_again_does_not_change_a_jax_array(skip: int) -> None:
    """On a CPU JAX uses aligned memory as it is, so it gets some of its own."""
    memory = np.zeros(5000, np.uint8)
    start = -memory.ctypes.data % 64 + skip
    array = memory[start : start + 4096]

    def items() -> Iterator[np.ndarray]:
        for number in range(6):
            array[:] = number
            yield array

    found = list(jax_each(items(), depth=3))
    memory[:] = 99
    assert [int(np.asarray(one)[-1]) for one in found] == list(range(6))
    assert [int(np.asarray(one)[0]) for one in found] == list(range(6))


@needs_jax
def test_private_memory_is_jaxs_for_as_long_as_it_needs_it() -> None:
    """No copy; and what was its array's may not be used again while JAX has it."""
    memory = np.full(5000, 7, np.uint8)
    start = -memory.ctypes.data % 64
    found = next(jax_each([memory[start : start + 4096]], "cpu", private=True))
    gone = weakref.ref(memory)
    del memory
    gc.collect()
    others = [np.zeros(5000, np.uint8) for _ in range(50)]
    assert (np.asarray(found) == 7).all()
    assert len(others) == 50
    del found
    gc.collect()
    assert gone() is None


@needs_jax
@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_jax_would_narrow_it(dtype: str) -> None:
    """Silently: an integer's upper half would be gone."""
    with pytest.raises(InvalidArgument, match=f"JAX makes .* of {dtype}: .*jax_enable_x64"):
        next(jax_each([np.ones(3, dtype)]))


@needs_jax
def test_devices_of_jax() -> None:
    import jax

    cpu = jax.devices("cpu")[0]
    for device in (None, "cpu", "CPU:0", cpu, jax.sharding.SingleDeviceSharding(cpu)):
        assert next(jax_each([np.zeros(3, np.int16)], device)).devices() == {cpu}
    with pytest.raises(DeviceUnavailable, match="'cpu:99' requested but JAX does not have it"):
        jax_each([], "cpu:99")
    with pytest.raises(InvalidArgument, match="Unsupported device 'abacus'"):
        jax_each([], "abacus")


@needs_jax
def test_jax_is_bounded_in_bytes() -> None:
    taken = 0

    def items() -> Iterator[np.ndarray]:
        nonlocal taken
        for number in range(10):
            taken += 1
            yield np.full(1000, number, np.uint8)

    found = jax_each(items(), depth=8, max_bytes=3000)
    for number in range(10):
        assert int(np.asarray(next(found))[0]) == number
        # One is read, and waits for room.
        assert taken <= min(10, number + 4)
