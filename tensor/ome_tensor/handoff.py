"""Handing pixels on: DLPack objects, torch tensors, JAX arrays, CUDA. Frameworks are imported when used, never before.

DLPack: https://dmlc.github.io/dlpack/latest/python_spec.html. torch writes through a DLPack object that is flagged read-only, so whatever is
handed out here is *private* memory (a gathered copy or a received message), never a dataset's. Memory that a view keeps and shows again may be shared
with a consumer who asks for DLPack, and is flagged then; torch never gets it (:meth:`DLPackTensor.private`).
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import staging
from .cuda_edge import TorchCuda
from .errors import DeviceUnavailable, InvalidArgument, MissingDependency
from .staging import IN_FLIGHT_BYTES

__all__ = [
    "DLPackTensor",
    "Device",
    "check_stream",
    "export_tensor",
    "parse_device",
    "parse_mode",
    "to_cupy",
    "to_jax",
    "to_torch",
    "upload",
    "upload_each",
]

_MODES = ("arrow", "numpy")
_KDLCPU = (1, 0)
_KDLCUDA = 2
_PER_THREAD = 2

#: Of pinned memory for a whole view, which goes through it in pieces: of a few MiB each, so that both copies are at their speed.
_WHOLE_VIEW_BYTES = 64 << 20

# NumPy speaks DLPack 1.0 (max_version, dl_device, copy, the read-only flag) from 2.1 on.
_NUMPY_DLPACK_1 = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


@dataclass(frozen=True, slots=True)
class Device:
    """Where a tensor goes: ``cpu``, or ``cuda`` with an index (``None`` for torch's current device)."""

    kind: str
    index: int | None = None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


def parse_device(device: object) -> Device:
    """``"cpu"``, ``"cuda"`` or ``"cuda:N"``, any case; raises InvalidArgument ``Unsupported device '...'``."""
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", str(device).strip().lower())
    if match is None or (match[1] == "cpu" and match[2] not in (None, "0")):
        raise InvalidArgument(f"Unsupported device '{device}'. Expected cpu, cuda or cuda:N.", field="device", value=device)
    return Device("cpu") if match[1] == "cpu" else Device("cuda", None if match[2] is None else int(match[2]))


def parse_mode(mode: object) -> str:
    """``"arrow"`` or ``"numpy"``, any case; raises InvalidArgument ``Unsupported mode '...'``."""
    word = str(mode).strip().lower()
    if word not in _MODES:
        raise InvalidArgument(f"Unsupported mode '{mode}'. Expected one of: {', '.join(_MODES)}.", field="mode", value=mode)
    return word


class DLPackTensor:
    """A DLPack producer over a NumPy array in private memory; may be consumed any number of times.

    Args:
        array: The array; its memory stays alive as long as any consumer needs it.
        shared: Whether a view keeps the same memory: it is then flagged read-only for consumers that can be told (those that ask for DLPack 1.0).
    """

    __slots__ = ("_array", "_shared")

    def __init__(self, array: np.ndarray, *, shared: bool = False) -> None:
        self._array = array
        self._shared = shared

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in elements."""
        return self._array.shape

    @property
    def dtype(self) -> np.dtype:
        """NumPy dtype of the elements."""
        return self._array.dtype

    def private(self) -> DLPackTensor:
        """The same tensor in memory that nobody else has, for a consumer who may write: a copy where a view keeps this one, else itself."""
        # In the order in which it lies: a permuted tensor stays one.
        return DLPackTensor(self._array.copy(order="K")) if self._shared else self

    def __dlpack_device__(self) -> tuple[int, int]:
        return _KDLCPU

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule; versioned where the consumer knows DLPack 1.0.

        Raises:
            BufferError: ``dl_device`` is not this memory's device.
            RuntimeError: ``stream`` is given, which means nothing on a CPU.
        """
        if dl_device is not None and tuple(int(part) for part in dl_device) != _KDLCPU:
            raise BufferError(f"this tensor is in CPU memory; it cannot be exported to DLPack device {tuple(dl_device)}")
        if stream is not None:
            raise RuntimeError("a CPU tensor takes no stream")
        array = self._array.copy() if copy else self._array
        if not _NUMPY_DLPACK_1:
            return array.__dlpack__()
        if max_version is None or max_version[0] < 1:
            return array.__dlpack__()
        if self._shared and not copy:
            array = array.view()
            array.flags.writeable = False
        return array.__dlpack__(max_version=max_version)

    def __repr__(self) -> str:
        return f"DLPackTensor(shape={self.shape}, dtype={self.dtype}, device='cpu')"


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependency("Torch is not installed. Install it with: pip install 'ome-tensor[torch]'") from error
    return torch


def _cuda(device: Device) -> Any:
    """torch, if it can reach that CUDA device."""
    torch = _import_torch()
    if not torch.cuda.is_available():
        raise DeviceUnavailable("CUDA device requested but torch reports no CUDA.", field="device", value=str(device))
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise DeviceUnavailable(
            f"device '{device}' requested but torch reports {torch.cuda.device_count()} CUDA devices.",
            field="device",
            value=str(device),
        )
    return torch


def check_device(device: Device, mode: str) -> None:
    """What can be refused before a pixel is read.

    Raises:
        DeviceUnavailable, MissingDependency: CUDA is asked for and not there.
        InvalidArgument: flat Arrow values on CUDA, which upstream does not give either.
    """
    if device.kind == "cuda":
        _cuda(device)
        if mode == "arrow":
            raise InvalidArgument("mode='arrow' does not support device='cuda'.", field="mode", value=mode)


def upload(array: np.ndarray, device: Device) -> Any:
    """One array on a CUDA device, as a torch tensor (itself a DLPack producer that minds streams). A large one goes in pieces."""
    return next(upload_each([array], device, max_bytes=_WHOLE_VIEW_BYTES))


def upload_each(
    items: Iterable[Any],
    device: Device,
    depth: int = 2,
    *,
    max_bytes: int = IN_FLIGHT_BYTES,
    arrays: Callable[[Any], list[Any]] = lambda item: [item],
    rebuild: Callable[[Any, list[Any]], Any] = lambda _, tensors: tensors[0],
) -> staging.Ahead:
    """Items with their arrays as torch tensors on a CUDA device; see :func:`ome_tensor.staging.upload_each`.

    Raises:
        DeviceUnavailable, MissingDependency, InvalidArgument: at the call.
    """
    edge = TorchCuda(_cuda(device), str(device))
    return staging.upload_each(items, edge, depth=depth, max_bytes=max_bytes, arrays=arrays, rebuild=rebuild)


def to_torch(producer: Any) -> Any:
    """A torch tensor on the producer's memory; MissingDependency where torch is not installed."""
    torch = _import_torch()
    return producer if isinstance(producer, torch.Tensor) else torch.utils.dlpack.from_dlpack(producer)


def to_cupy(producer: Any) -> Any:
    """A CuPy array on the producer's memory, which must be a CUDA device's, ordered on CuPy's current stream.

    Raises:
        MissingDependency: CuPy is not installed.
        InvalidArgument: the memory is not a CUDA device's.
    """
    try:
        import cupy
    except ImportError as error:
        raise MissingDependency("CuPy is not installed. Install it with: pip install cupy-cuda12x") from error
    if producer.__dlpack_device__()[0] != _KDLCUDA:
        raise InvalidArgument("CuPy's arrays are on CUDA devices: ask for device='cuda'", field="device", value="cpu")
    return cupy.from_dlpack(producer)


def check_stream(stream: object) -> int:
    """A consumer's stream as DLPack says it of CUDA: ``None`` or 1, the legacy default stream; 2, the thread's; -1, no ordering wanted;
    else a ``cudaStream_t``. https://dmlc.github.io/dlpack/latest/python_spec.html

    Returns:
        The same, said outright: of ``None`` 1, which some releases of torch take for -1.

    Raises:
        BufferError: 0, which is ambiguous, or what is no stream.
    """
    number = (
        1 if stream is None else -2 if isinstance(stream, bool) or not hasattr(stream, "__index__") else operator.index(stream)
    )
    if number < -1 or number == 0:
        raise BufferError(f"stream must be None, 1, 2, -1 or a cudaStream_t for a CUDA tensor, not {stream!r}")
    return number


def export_tensor(
    tensor: Any,
    *,
    stream: Any = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
) -> Any:
    """A capsule of a torch tensor by DLPack 1.0's rules, whatever release of torch made it (older ones know ``stream`` alone).

    Args:
        tensor: The tensor.
        stream: As :func:`check_stream`, of a tensor on CUDA: what has been queued for the tensor on the stream that is current in torch is ordered
            before what the consumer does on this one.
        max_version: Of DLPack; an older capsule may be the answer.
        dl_device: Its own, or the CPU: a copy there.
        copy: ``True``: of memory of its own; ``False``: never.

    Raises:
        BufferError: what DLPack does not know as a stream; a device where it would have to be copied to otherwise, or may not be.
        RuntimeError: ``stream`` is given, of memory of the CPU.
    """
    own = _device_of(tensor.__dlpack_device__())
    if dl_device is not None and _device_of(dl_device) != own:
        if copy is False or _device_of(dl_device) != _KDLCPU:
            raise BufferError(
                f"this tensor is on DLPack device {own}; it cannot be exported to {_device_of(dl_device)} (copy={copy})"
            )
        # Waits for what the current stream does; there is nothing for the consumer to wait for.
        return export_tensor(tensor.cpu(), max_version=max_version)
    options: dict[str, Any] = {}
    with _current(tensor):
        if copy:
            tensor = tensor.clone()
        if own[0] == _KDLCUDA:
            number = check_stream(stream)
            if number == _PER_THREAD:
                # torch has no name for it: wait here, and leave nothing to order.
                _finish(tensor)
                number = -1
            options["stream"] = number
        elif stream is not None:
            raise RuntimeError("a CPU tensor takes no stream")
        if max_version is not None and "max_version" in inspect.signature(type(tensor).__dlpack__).parameters:
            options["max_version"] = max_version
        return tensor.__dlpack__(**options)


def _device_of(device: Any) -> tuple[int, int]:
    kind, index = device
    return int(kind), int(index)


def _current(tensor: Any) -> AbstractContextManager[Any]:
    """With the tensor's device as torch's current one, whose streams are meant, and of whose tensors alone torch makes capsules."""
    if not getattr(tensor, "is_cuda", False):
        return nullcontext()
    found: AbstractContextManager[Any] = _import_torch().cuda.device(tensor.device)
    return found


def _finish(tensor: Any) -> None:
    """Wait until the current stream of the tensor's device has done all it was given."""
    _import_torch().cuda.current_stream(tensor.device).synchronize()


def to_jax(producer: Any) -> Any:
    """A JAX array from a DLPack producer; MissingDependency where JAX is not installed."""
    try:
        import jax.numpy as jnp
    except ImportError as error:
        raise MissingDependency("JAX is not installed. Install it with: pip install 'ome-tensor[jax]'") from error
    return jnp.from_dlpack(producer)
