"""Handing pixels on: DLPack objects, torch tensors, JAX arrays, CUDA. Frameworks are imported when used, never before.

DLPack: https://dmlc.github.io/dlpack/latest/python_spec.html. torch writes through a DLPack object that is flagged read-only, so whatever is
handed out here is *private* memory (a gathered copy or a received message), never a dataset's. Memory that a view keeps and shows again may be shared
with a consumer who asks for DLPack, and is flagged then; torch never gets it (:meth:`DLPackTensor.private`).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import DeviceUnavailable, InvalidArgument, MissingDependency

__all__ = ["DLPackTensor", "Device", "parse_device", "parse_mode", "to_jax", "to_torch", "upload", "upload_each"]

_MODES = ("arrow", "numpy")
_KDLCPU = (1, 0)
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
    """One array on a CUDA device, as a torch tensor (itself a DLPack producer that minds streams)."""
    return next(upload_each(iter([array]), device, depth=1))


class _Slot:
    """One pinned staging buffer and the event that says when its last copy is through."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.event = torch.cuda.Event()
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def stage(self, array: np.ndarray) -> Any:
        """The array's values in pinned memory, as a torch tensor of its shape."""
        self.event.synchronize()
        if self._pinned.numel() < array.nbytes:
            self._pinned = self._torch.empty(array.nbytes, dtype=self._torch.uint8, pin_memory=True)
        staged = self._pinned.numpy()[: array.nbytes].view(array.dtype).reshape(array.shape)
        np.copyto(staged, array)
        return self._torch.from_numpy(staged)


def upload_each(arrays: Iterator[np.ndarray], device: Device, depth: int = 2) -> Iterator[Any]:
    """Arrays as torch tensors on a CUDA device: ``depth`` pinned buffers are reused, copies run on a side stream while the next array arrives.

    Each tensor is ordered after its copy on the stream that is current where ``next()`` is called.
    """
    torch = _cuda(device)
    where = torch.device(str(device))
    with torch.cuda.device(where):
        side = torch.cuda.Stream()
        slots = [_Slot(torch) for _ in range(depth)]
    pending: deque[tuple[Any, Any]] = deque()

    def hand_over() -> Any:
        tensor, event = pending.popleft()
        current = torch.cuda.current_stream(where)
        current.wait_event(event)
        tensor.record_stream(current)
        return tensor

    for number, array in enumerate(arrays):
        slot = slots[number % depth]
        staged = slot.stage(array)
        with torch.cuda.stream(side):
            tensor = staged.to(where, non_blocking=True)
            slot.event = torch.cuda.Event()
            slot.event.record(side)
        pending.append((tensor, slot.event))
        if len(pending) >= depth:
            yield hand_over()
    while pending:
        yield hand_over()


def to_torch(producer: Any) -> Any:
    """A torch tensor on the producer's memory; MissingDependency where torch is not installed."""
    torch = _import_torch()
    return producer if isinstance(producer, torch.Tensor) else torch.utils.dlpack.from_dlpack(producer)


def to_jax(producer: Any) -> Any:
    """A JAX array from a DLPack producer; MissingDependency where JAX is not installed."""
    try:
        import jax.numpy as jnp
    except ImportError as error:
        raise MissingDependency("JAX is not installed. Install it with: pip install 'ome-tensor[jax]'") from error
    return jnp.from_dlpack(producer)
