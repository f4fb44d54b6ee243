"""Hand-off in ``mode="numpy"``: NumPy arrays, DLPack objects, torch tensors, JAX arrays; who shares memory with whom."""

from __future__ import annotations

import ctypes
from typing import Any

import jax
import numpy as np
import pytest
import torch
from tests.conformance.images import IMAGES
from tests.conformance.implementations import Implementation, as_numpy

PIXELS = IMAGES["chunks"].pixels
CPU = (1, 0)

PLANS = [
    {},
    {"t": 0, "z": 0},
    {"t": 1, "z": 2, "c": 1, "roi": (5, 4, 7, 6), "layout": "YX"},
    {"t": [2, 0], "layout": "YXCZT"},
    {"c": 0, "roi": (0, 0, 17, 5), "dtype": np.float32},
]


def capsule_name(capsule: Any) -> bytes | None:
    """The name of a DLPack capsule tells which standard it follows."""
    name_of = ctypes.pythonapi.PyCapsule_GetName
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    return name_of(capsule)


def share(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are windows on the same memory."""
    return np.shares_memory(one, other)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_dlpack(any_view: Implementation, plan: dict[str, Any], contiguous: bool) -> None:
    """Tensor-shaped, in the view's layout, dtype and values."""
    view = any_view.view("chunks", **plan)
    exported = np.from_dlpack(view.to_dlpack(mode="numpy", contiguous=contiguous))
    assert exported.shape == view.shape
    assert exported.dtype == view.dtype
    np.testing.assert_array_equal(exported, view.to_numpy())


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_torch(any_view: Implementation, plan: dict[str, Any], contiguous: bool) -> None:
    """A torch tensor of the same shape and values."""
    view = any_view.view("chunks", **plan)
    tensor = view.to_torch(mode="numpy", contiguous=contiguous)
    assert isinstance(tensor, torch.Tensor)
    assert tuple(tensor.shape) == view.shape
    assert tensor.is_contiguous() or not contiguous
    np.testing.assert_array_equal(tensor.numpy(), view.to_numpy())


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_jax(any_view: Implementation, plan: dict[str, Any]) -> None:
    """A JAX array of the same shape and values."""
    view = any_view.view("chunks", **plan)
    array = view.to_jax(mode="numpy")
    assert isinstance(array, jax.Array)
    assert array.shape == view.shape
    np.testing.assert_array_equal(np.asarray(array), view.to_numpy())


@pytest.mark.parametrize("name", ["planes", "chunks", "chunks_whole", "bytes", "bytes_zstd"])
def test_dlpack_shares_memory_with_the_array(any_view: Implementation, name: str) -> None:
    """``contiguous=False`` costs no copy: the same memory as ``to_numpy(contiguous=False)``."""
    view = any_view.view(name, t=1, z=2, layout="YXC")
    array = view.to_numpy()
    exported = np.from_dlpack(view.to_dlpack(mode="numpy", contiguous=False))
    assert share(array, exported)
    assert exported.strides == array.strides


def test_array_is_cached(any_view: Implementation) -> None:
    """The pixels are gathered once."""
    view = any_view.view("chunks", t=1)
    assert share(view.to_numpy(), view.to_numpy())


@pytest.mark.parametrize("name", ["planes", "chunks", "chunks_whole", "bytes", "bytes_zstd", "nonstrict", "planes_f32"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_shared_arrays_are_read_only(our_view: Implementation, name: str, plan: dict[str, Any]) -> None:
    """Upstream's arrays are writable, and writing to one corrupts what the view says next."""
    view = our_view.view(name, **plan)
    array = view.to_numpy()
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 0
    contiguous = view.to_numpy(contiguous=True)
    assert not (contiguous.flags.writeable and share(array, contiguous))
    exported = np.from_dlpack(view.to_dlpack(mode="numpy", contiguous=False))
    assert not exported.flags.writeable


@pytest.mark.parametrize("name", ["planes", "chunks", "chunks_whole", "bytes", "bytes_zstd"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_torch_cannot_harm_the_image(our_view: Implementation, name: str, contiguous: bool) -> None:
    """torch writes through read-only DLPack: what it gets must not be the stored pixels, nor memory that kills the process."""
    plan = {"t": 1, "z": 2, "c": 1}
    before = our_view.view(name, **plan).to_numpy().copy()
    our_view.view(name, **plan).to_torch(mode="numpy", contiguous=contiguous).zero_()
    np.testing.assert_array_equal(our_view.view(name, **plan).to_numpy(), before)
    np.testing.assert_array_equal(before, PIXELS[1, 2, 1:])


@pytest.mark.parametrize("mode", ["numpy", "arrow"])
def test_dlpack_is_reusable(our_view: Implementation, mode: str) -> None:
    """A DLPack object may be consumed more than once, by more than one library."""
    exported = our_view.view("planes", t=1, z=2, c=1, layout="YX").to_dlpack(mode=mode)
    expected = PIXELS[1, 2, 1] if mode == "numpy" else PIXELS[1, 2, 1].ravel()
    for _ in range(2):
        np.testing.assert_array_equal(as_numpy(exported), expected)
        np.testing.assert_array_equal(torch.from_dlpack(exported).numpy(), expected)
    np.testing.assert_array_equal(np.asarray(jax.numpy.from_dlpack(exported)), expected)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_torch_cannot_harm_the_view(our_view: Implementation, plan: dict[str, Any], contiguous: bool) -> None:
    """What torch does to its tensor in place, the view that gave it does not show next."""
    view = our_view.view("chunks", **plan)
    before = view.to_numpy().copy()
    tensor = view.to_torch(mode="numpy", contiguous=contiguous)
    tensor.zero_()
    np.testing.assert_array_equal(view.to_numpy(), before)
    np.testing.assert_array_equal(view.to_torch(mode="numpy", contiguous=contiguous).numpy(), before)
    # In the order in which it lies: a permuted view is still one.
    assert contiguous or tensor.is_contiguous() == view.to_numpy().flags.c_contiguous


def test_dlpack_outlives_the_view(any_view: Implementation) -> None:
    """The exported memory belongs to whoever holds it."""
    exported = any_view.view("chunks").to_dlpack(mode="numpy")
    array = np.from_dlpack(exported)
    del exported
    np.testing.assert_array_equal(array, PIXELS)


@pytest.mark.parametrize("mode", ["numpy", "arrow"])
def test_dlpack_follows_the_standard(our_view: Implementation, mode: str) -> None:
    """``__dlpack__(stream, max_version, dl_device, copy)`` as of the array API of 2023, and the old form without arguments."""
    exported = our_view.view("planes", t=1, z=2, c=1).to_dlpack(mode=mode)
    assert tuple(exported.__dlpack_device__()) == CPU
    assert capsule_name(exported.__dlpack__()) == b"dltensor"
    assert capsule_name(exported.__dlpack__(stream=None)) == b"dltensor"
    assert capsule_name(exported.__dlpack__(max_version=(0, 8))) == b"dltensor"
    assert capsule_name(exported.__dlpack__(max_version=(1, 0))) == b"dltensor_versioned"
    versioned = exported.__dlpack__(stream=None, max_version=(1, 1), dl_device=CPU, copy=None)
    assert capsule_name(versioned) == b"dltensor_versioned"


@pytest.mark.parametrize("mode", ["numpy", "arrow"])
def test_dlpack_copies_on_request(our_view: Implementation, mode: str) -> None:
    """``copy=True`` gives private memory that may be written to; ``copy=False`` does not copy."""
    exported = our_view.view("planes", t=1, z=2, c=1, layout="YX").to_dlpack(mode=mode)
    shared, private = np.from_dlpack(exported, copy=False), np.from_dlpack(exported, copy=True)
    assert share(shared, np.from_dlpack(exported))
    assert not share(shared, private)
    assert private.flags.writeable
    private[...] = 0
    np.testing.assert_array_equal(shared.ravel(), PIXELS[1, 2, 1].ravel())


def test_dlpack_refuses_another_device(our_view: Implementation) -> None:
    """CPU memory cannot be handed out as another device's."""
    exported = our_view.view("planes", t=0, z=0).to_dlpack(mode="numpy")
    with pytest.raises(BufferError):
        exported.__dlpack__(dl_device=(2, 0))


@pytest.mark.parametrize(
    "name, dtype", [("bit", "bool"), ("ome_float", "float32"), ("ome_complex", "complex64"), ("bytes_i8_lz4", "int8")]
)
def test_dlpack_of_other_types(our_view: Implementation, name: str, dtype: str) -> None:
    """Every pixel type can be handed on."""
    view = our_view.view(name)
    tensor = view.to_torch(mode="numpy")
    assert tensor.numpy().dtype == view.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(tensor.numpy(), IMAGES[name].pixels)
    np.testing.assert_array_equal(as_numpy(view.to_dlpack(mode="numpy")), IMAGES[name].pixels)


def test_empty_dlpack(any_view: Implementation) -> None:
    """A view of nothing is handed on as a tensor of size 0."""
    assert as_numpy(any_view.view("chunks", z=[]).to_dlpack(mode="numpy")).shape == (3, 0, 2, 13, 17)


@pytest.mark.parametrize("method", ["to_dlpack", "to_torch", "to_jax", "iter_dlpack", "iter_tiles_3d"])
@pytest.mark.parametrize("device", ["tpu", "gpu", "", "cuda:", "cuda:x", "cuda:-1", "cpu0"])
def test_refused_device(any_view: Implementation, method: str, device: str) -> None:
    """Only cpu and cuda are devices."""
    arguments = {"tile_size": (2, 5, 5)} if method == "iter_tiles_3d" else {}
    any_view.refuses(
        f"Unsupported device '{device}'",
        "single",
        use=lambda view: _first(getattr(view, method)(device=device, mode="numpy", **arguments)),
    )


def _first(result: Any) -> Any:
    """Upstream's iterators fail at the first tile only."""
    return next(result) if hasattr(result, "__next__") else result


@pytest.mark.parametrize("method", ["to_dlpack", "to_torch", "to_jax", "iter_dlpack"])
def test_refused_mode(any_view: Implementation, method: str) -> None:
    """Only arrow and numpy are modes."""
    any_view.refuses("Unsupported mode 'list'", "single", use=lambda view: _first(getattr(view, method)(mode="list")))


def test_words_in_any_case(any_view: Implementation) -> None:
    """Devices and modes are words in any case."""
    view = any_view.view("single", layout="YX")
    np.testing.assert_array_equal(as_numpy(view.to_dlpack(device=" CPU ", mode="NumPy")), IMAGES["single"].pixels[0, 0, 0])
    assert as_numpy(view.to_dlpack(device="cpu", mode=" ARROW ")).ndim == 1


def refuses_cuda(view: Any, method: str, device: str) -> None:
    """Assert upstream's message where torch has no CUDA."""
    with pytest.raises(RuntimeError, match=r"^CUDA device requested but torch reports no CUDA\."):
        _first(getattr(view, method)(device=device, mode="numpy"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device here")
@pytest.mark.parametrize("method", ["to_dlpack", "to_torch", "to_jax", "iter_dlpack"])
def test_no_cuda(any_view: Implementation, method: str) -> None:
    """Without CUDA the message says who reports that."""
    refuses_cuda(any_view.view("single"), method, "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device here")
@pytest.mark.parametrize("method", ["to_dlpack", "to_torch", "to_jax", "iter_dlpack"])
def test_numbered_cuda_is_a_device(our_view: Implementation, method: str) -> None:
    """Upstream refuses ``"cuda:1"`` as unsupported; ours only where it is not there."""
    refuses_cuda(our_view.view("single"), method, "cuda:1")
