"""Handing pixels on: DLPack for every consumer, and CUDA where there is one."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.integration.images import random_pixels, record_of

from ome_tensor import DeviceUnavailable, DLPackTensor, InvalidArgument, MissingDependency, TensorView
from ome_tensor.handoff import Device, export_tensor, parse_device, parse_mode, to_jax, to_torch, upload, upload_each
from ome_tensor.staging import pinned_each

HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_JAX = importlib.util.find_spec("jax") is not None
NUMPY_DLPACK_1 = np.lib.NumpyVersion(np.__version__) >= "2.1.0"
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
needs_jax = pytest.mark.skipif(not HAS_JAX, reason="jax is not installed")
needs_dlpack_1 = pytest.mark.skipif(not NUMPY_DLPACK_1, reason=f"NumPy {np.__version__} speaks an older DLPack")

DTYPES = "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()


def cuda_devices() -> int:
    """How many CUDA devices torch sees."""
    if not HAS_TORCH:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


needs_cuda = pytest.mark.skipif(cuda_devices() == 0, reason="torch sees no CUDA device")


@pytest.fixture
def array() -> np.ndarray:
    """A C-ordered array."""
    return np.array(random_pixels((2, 3, 4)))


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_numpy_takes_it(dtype: str) -> None:
    """Same values, same memory, as often as wanted."""
    array = np.array(random_pixels((2, 3), dtype))
    tensor = DLPackTensor(array)
    assert (tensor.shape, tensor.dtype, tensor.__dlpack_device__()) == ((2, 3), np.dtype(dtype), (1, 0))
    for _ in range(3):
        found = np.from_dlpack(tensor)
        np.testing.assert_array_equal(found, array, strict=True)
        assert np.shares_memory(found, array)


@needs_torch
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in ("uint16", "uint32", "uint64")] + ["uint16"])
def test_torch_takes_it(dtype: str) -> None:
    """Also what torch can hardly compute with; on the same memory."""
    array = np.array(random_pixels((2, 3), dtype))
    for _ in range(2):
        tensor = to_torch(DLPackTensor(array))
        np.testing.assert_array_equal(tensor.numpy(), array, strict=True)
        assert tensor.data_ptr() == array.ctypes.data


@needs_jax
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "complex64"])
def test_jax_takes_it(dtype: str) -> None:
    """The same."""
    array = np.array(random_pixels((2, 3), dtype))
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(to_jax(DLPackTensor(array))), array, strict=True)


def test_the_memory_lives_as_long_as_a_consumer() -> None:
    """The producer and the array may be gone by then."""
    found = np.from_dlpack(DLPackTensor(np.full(1 << 16, 7, np.uint8)))
    gc.collect()
    others = [np.zeros(1 << 16, np.uint8) for _ in range(50)]
    assert (found == 7).all()
    assert len(others) == 50


@needs_dlpack_1
def test_shared_memory_is_read_only(array: np.ndarray) -> None:
    """For consumers that can be told; private memory is writable; a copy is anybody's."""
    assert not np.from_dlpack(DLPackTensor(array, shared=True)).flags.writeable
    assert np.from_dlpack(DLPackTensor(array)).flags.writeable
    copied = np.from_dlpack(DLPackTensor(array, shared=True), copy=True)
    assert not np.shares_memory(copied, array)
    np.testing.assert_array_equal(copied, array, strict=True)
    assert array.flags.writeable, "the flag is the capsule's, not the array's"


def test_private_memory(array: np.ndarray) -> None:
    """A copy only where somebody else has the memory, in the order in which it lies."""
    alone = DLPackTensor(array)
    assert alone.private() is alone
    permuted = array.transpose(2, 0, 1)
    copied = np.from_dlpack(DLPackTensor(permuted, shared=True).private())
    assert not np.shares_memory(copied, array)
    assert copied.strides == permuted.strides
    np.testing.assert_array_equal(copied, permuted, strict=True)


@needs_dlpack_1
def test_a_copy_is_one(array: np.ndarray) -> None:
    """``copy=True`` gives other memory, ``copy=False`` the same."""
    assert not np.shares_memory(np.from_dlpack(DLPackTensor(array), copy=True), array)
    assert np.shares_memory(np.from_dlpack(DLPackTensor(array), copy=False), array)


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 1), (2, 0)])
def test_capsules_by_version(array: np.ndarray, version: tuple[int, int] | None) -> None:
    """Versioned for those who know them, else the old form."""
    capsule = DLPackTensor(array).__dlpack__(max_version=version)
    new = version is not None and version[0] >= 1 and NUMPY_DLPACK_1
    assert ('"dltensor_versioned"' if new else '"dltensor"') in repr(capsule)


def test_other_devices_are_refused(array: np.ndarray) -> None:
    """CPU memory stays CPU memory; the protocol's own error types."""
    tensor = DLPackTensor(array)
    with pytest.raises(BufferError, match="CPU"):
        tensor.__dlpack__(dl_device=(2, 0))
    with pytest.raises(RuntimeError, match="stream"):
        tensor.__dlpack__(stream=1)
    assert "dltensor" in repr(tensor.__dlpack__(dl_device=(1, 0)))


@pytest.mark.parametrize(
    "text,device",
    [("cpu", Device("cpu")), (" CPU:0 ", Device("cpu")), ("cuda", Device("cuda")), ("CUDA:3", Device("cuda", 3))],
)
def test_devices(text: str, device: Device) -> None:
    """Any case, with or without an index."""
    assert parse_device(text) == device


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:1", "cuda:0:1", "mps", None, 0])
def test_no_devices(text: object) -> None:
    """In upstream's words."""
    with pytest.raises(InvalidArgument, match="Unsupported device"):
        parse_device(text)


def test_modes() -> None:
    """Two of them."""
    assert (parse_mode(" ARROW "), parse_mode("numpy")) == ("arrow", "numpy")
    with pytest.raises(InvalidArgument, match="Unsupported mode 'torch'"):
        parse_mode("torch")


@pytest.mark.parametrize("package", ["torch", "jax"])
def test_a_missing_framework_is_named(monkeypatch: pytest.MonkeyPatch, array: np.ndarray, package: str) -> None:
    """With what installs it."""
    monkeypatch.setitem(__import__("sys").modules, package, None)
    use = {"torch": to_torch, "jax": to_jax}[package]
    with pytest.raises(MissingDependency, match=rf"ome-tensor\[{package}\]"):
        use(DLPackTensor(array))


@needs_torch
@pytest.mark.skipif(cuda_devices() > 0, reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_no_cuda_is_said_at_once(device: str) -> None:
    """Before a pixel is read, and at the call, not at the first tile."""
    view = TensorView(record_of(random_pixels((1, 1, 1, 8, 8))))
    for use in (
        lambda: view.to_dlpack(device=device, mode="numpy"),
        lambda: view.to_torch(device=device, mode="numpy"),
        lambda: view.iter_dlpack(tile_size=(4, 4), device=device, mode="numpy"),
        lambda: view.iter_tiles_3d(tile_size=(1, 4, 4), device=device),
    ):
        with pytest.raises(DeviceUnavailable, match="CUDA device requested but torch reports no CUDA"):
            use()


# --- with a device --------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_uploads_are_right(depth: int) -> None:
    """More arrays than staging buffers, of several sizes and dtypes, each kept until the end."""
    arrays = [
        np.array(random_pixels((3, 20 + number % 7, 50), ("uint8", "float32", "int16")[number % 3], number))
        for number in range(40)
    ]
    found = list(upload_each(iter(arrays), Device("cuda", 0), depth))
    for tensor, array in zip(found, arrays, strict=True):
        assert str(tensor.device) == "cuda:0"
        np.testing.assert_array_equal(tensor.cpu().numpy(), array, strict=True)


@pytest.mark.cuda
@needs_cuda
def test_uploads_are_ordered_before_the_readers_stream() -> None:
    """Used at once on whatever stream is current, while the next copies run; the allocator does not give its memory away."""
    import torch

    arrays = [np.full((256, 1024, 8), number, np.float32) for number in range(30)]
    stream = torch.cuda.Stream()
    sums = []
    with torch.cuda.stream(stream):
        for tensor in upload_each(iter(arrays), Device("cuda", 0)):
            sums.append(tensor.double().sum())
            del tensor
    assert [float(total) for total in sums] == [number * 256 * 1024 * 8 for number in range(30)]


@pytest.mark.cuda
@needs_cuda
def test_uploads_stay_lazy() -> None:
    """No more is read than is in flight."""
    taken = 0

    def arrays() -> Iterator[np.ndarray]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield np.full(10, number, np.int32)

    found: Any = upload_each(arrays(), Device("cuda", 0), depth=3)
    assert taken == 0
    next(found)
    assert taken == 3


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in ("uint32", "uint64")] + ["bool"])
def test_layouts_and_dtypes_on_a_device(dtype: str) -> None:
    """As on the host: permuted, with gaps, backwards, scalar, empty; whole or in pieces."""
    pixels = np.array(random_pixels((5, 60, 70, 3), dtype))
    shown = [pixels, pixels.transpose(0, 3, 1, 2), pixels[:, ::2, 1:], pixels[::-1], np.array(pixels[0, 0, 0, 0]), pixels[:0]]
    for max_bytes in (1 << 20, 1):
        for tensor, array in zip(upload_each(iter(shown), Device("cuda"), max_bytes=max_bytes), shown, strict=True):
            np.testing.assert_array_equal(tensor.cpu().numpy(), array, strict=True)
    assert next(upload_each([shown[1]], Device("cuda"))).stride() == tuple(
        stride // pixels.itemsize for stride in shown[1].strides
    )


@pytest.mark.cuda
@needs_cuda
def test_a_large_array_goes_in_pieces() -> None:
    """Of more than there is pinned memory for."""
    array = np.arange(40 << 20, dtype=np.int32).reshape(40, 1 << 10, 1 << 10).transpose(1, 2, 0)
    tensor = upload(array, Device("cuda"))
    np.testing.assert_array_equal(tensor.cpu().numpy(), array, strict=True)


@pytest.mark.cuda
@needs_cuda
def test_pinned_memory_is_used_again_and_never_too_early() -> None:
    """Copied from on a stream that nobody else knows of, and dropped at once."""
    import torch

    stream, places, there = torch.cuda.Stream(), set(), []
    for tensor in pinned_each(np.full(1 << 20, number, np.int32) for number in range(40)):
        assert tensor.is_pinned()
        places.add(tensor.data_ptr())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            there.append(tensor.to("cuda", non_blocking=True))
        del tensor
    stream.synchronize()
    assert [(int(one.min()), int(one.max())) for one in there] == [(number, number) for number in range(40)]
    torch.cuda.synchronize()
    again = [next(pinned_each([np.zeros(1 << 20, np.int32)])).data_ptr() for _ in range(3)]
    assert set(again) <= places


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("consumer", ["none", "legacy", "per thread", "another"])
def test_a_consumers_stream_comes_after_what_was_queued(consumer: str) -> None:
    """Each of DLPack's ways to name it."""
    import torch

    producing, consuming = torch.cuda.Stream(), torch.cuda.Stream()
    tensor = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(producing):
        torch.cuda._sleep(50_000_000)
        tensor.fill_(1)
        named = {"none": None, "legacy": 1, "per thread": 2, "another": consuming.cuda_stream}[consumer]
        capsule = export_tensor(tensor, stream=named, max_version=(1, 0))
    with torch.cuda.stream(consuming if consumer == "another" else torch.cuda.default_stream()):
        total = float(torch.utils.dlpack.from_dlpack(capsule).sum())
    assert total == 1 << 20


@pytest.mark.cuda
@needs_cuda
def test_a_copy_for_the_cpu() -> None:
    """Whatever torch does itself about ``dl_device``."""
    import torch

    tensor = torch.arange(10, device="cuda")
    assert torch.utils.dlpack.from_dlpack(export_tensor(tensor, dl_device=(1, 0))).tolist() == list(range(10))
    copied = torch.utils.dlpack.from_dlpack(export_tensor(tensor, copy=True))
    assert copied.is_cuda
    assert copied.data_ptr() != tensor.data_ptr()


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("layout", ["CYX", "YXC"])
def test_views_on_a_device(device: str, layout: str) -> None:
    """Whole views and iterators, contiguous or permuted; DLPack out again."""
    import torch

    pixels = random_pixels((1, 1, 3, 40, 50), np.float32)
    view = TensorView(record_of(pixels), t=0, z=0, layout=layout)
    wanted = pixels[0, 0] if layout == "CYX" else pixels[0, 0].transpose(1, 2, 0)
    for contiguous in (True, False):
        tensor = view.to_torch(device=device, mode="numpy", contiguous=contiguous)
        np.testing.assert_array_equal(tensor.cpu().numpy(), wanted, strict=True)
        np.testing.assert_array_equal(
            torch.from_dlpack(view.to_dlpack(device=device, mode="numpy")).cpu().numpy(), wanted, strict=True
        )
    tiles = list(view.iter_dlpack(tile_size=(16, 16), device=device, mode="numpy", prefetch=2))
    for tensor, tile in zip(tiles, view.iter_dlpack(tile_size=(16, 16), mode="numpy"), strict=True):
        np.testing.assert_array_equal(torch.from_dlpack(tensor).cpu().numpy(), np.from_dlpack(tile), strict=True)


@pytest.mark.cuda
@needs_cuda
def test_what_a_device_refuses() -> None:
    """A device that is not there, and flat Arrow values, which upstream does not give either."""
    view = TensorView(record_of(random_pixels((1, 1, 1, 8, 8))))
    with pytest.raises(DeviceUnavailable, match=f"cuda:{cuda_devices()}"):
        view.to_dlpack(device=f"cuda:{cuda_devices()}", mode="numpy")
    with pytest.raises(InvalidArgument, match="arrow"):
        view.to_dlpack(device="cuda", mode="arrow")
