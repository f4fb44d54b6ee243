"""What every view offers, whatever stands behind it: exports here, iteration in :mod:`.iteration`, written once over a few primitives.

The base classes check arguments, choose the tiling and hand pixels on. Subclasses say how to describe the view and how to read it:
``TensorView`` from a record in this process, ``LazyTensorView`` from its source, which may be a server.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from .errors import InvalidArgument
from .handoff import DLPackTensor, check_device, parse_device, parse_mode, to_cupy, to_jax, to_torch, upload
from .iteration import TileIteration
from .layout import apply_layout, to_axes

__all__ = ["TensorExports"]


class TensorExports(TileIteration):
    """Exports and iteration shared by all views."""

    # -- primitives ----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _array(self) -> np.ndarray:
        """The whole view in its layout, in memory that the view keeps; writable, never handed out without a guard."""

    @abstractmethod
    def _read_into(self, out: np.ndarray) -> None:
        """Read the whole view into ``out``, a writable TZCYX array of the shape and dtype that is shown."""

    @abstractmethod
    def _values(self) -> np.ndarray:
        """``mode="arrow"``: the flat stored values, in private memory."""

    # -- whole view ----------------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in elements, in layout order. Reads no pixels."""
        return self._resolve().shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in bytes of the C-ordered TZCYX selection, permuted to the layout. Reads no pixels."""
        return self._resolve().strides

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the elements. Reads no pixels."""
        return self._resolve().dtype

    @property
    def layout(self) -> str:
        """Axis letters of TZCHW, in order. Reads no pixels."""
        return self._resolve().layout

    @property
    def nbytes(self) -> int:
        """Bytes of the view's elements. Reads no pixels."""
        return self._resolve().nbytes

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.layout)

    def __len__(self) -> int:
        return self.shape[0]

    def to_numpy(self, *, contiguous: bool = False, out: np.ndarray | None = None) -> np.ndarray:
        """The view as a read-only NumPy array in its layout.

        The array shares memory with the view, which reads its pixels once; copy it to change it.

        Args:
            contiguous: Give a C-contiguous array: a copy of its own where the layout is permuted.
            out: A writable array of the view's shape and dtype to read into, past the view's own memory; it is what is returned.

        Raises:
            InvalidArgument: ``out`` does not fit.
        """
        if out is not None:
            self._read_into(to_axes(self._fitting_out(out), self.layout))
            return out
        array = self._array()
        if contiguous and not array.flags.c_contiguous:
            return np.ascontiguousarray(array)
        array = array.view()
        array.flags.writeable = False
        return array

    def _fitting_out(self, out: object) -> np.ndarray:
        shape, dtype = self.shape, self.dtype
        if not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != dtype or not out.flags.writeable:
            got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise InvalidArgument(f"out must be a writable {dtype} array of shape {shape}, not {got}", field="out", value=got)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.to_numpy()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"a {array.dtype} view cannot be seen as {np.dtype(dtype)} without a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def to_dlpack(self, *, device: str = "cpu", contiguous: bool = True, mode: str = "arrow") -> Any:
        """The view as a DLPack producer.

        Args:
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            contiguous: Copy a permuted layout into C order.
            mode: ``numpy``: tensor-shaped; on the CPU it shares memory with :meth:`to_numpy` where that needs no copy: to be read, not written.
                It is exported read-only to consumers that ask for DLPack 1.0; older ones cannot be told, and torch does not heed it: use
                :meth:`to_torch`. ``arrow``: the flat stored values of the one plane or chunk that is selected, copied.

        Raises:
            InvalidArgument: an unknown device or mode; a selection that ``mode="arrow"`` cannot give.
            DeviceUnavailable: no CUDA.
        """
        where, mode = parse_device(device), parse_mode(mode)
        check_device(where, mode)
        if mode == "arrow":
            return DLPackTensor(self._values())
        array = self._array()
        copied = contiguous and not array.flags.c_contiguous
        if copied:
            array = np.ascontiguousarray(array)
        return DLPackTensor(array, shared=not copied) if where.kind == "cpu" else upload(array, where)

    def to_torch(self, *, device: str = "cpu", contiguous: bool = True, mode: str = "arrow") -> Any:
        """The view as a torch tensor in memory of its own, to be written to at will; arguments as in :meth:`to_dlpack`."""
        tensor = self.to_dlpack(device=device, contiguous=contiguous, mode=mode)
        return to_torch(tensor.private() if isinstance(tensor, DLPackTensor) else tensor)

    def to_jax(self, *, device: str = "cpu", contiguous: bool = True, mode: str = "arrow") -> Any:
        """The view as a JAX array; arguments as in :meth:`to_dlpack`."""
        return to_jax(self.to_dlpack(device=device, contiguous=contiguous, mode=mode))

    def to_cupy(self, *, device: str = "cuda", contiguous: bool = True, mode: str = "numpy") -> Any:
        """The view as a CuPy array, which is on a CUDA device; arguments as in :meth:`to_dlpack`. Raises MissingDependency, too."""
        return to_cupy(self.to_dlpack(device=device, contiguous=contiguous, mode=mode))


def in_layout(array: np.ndarray, layout: str, contiguous: bool) -> np.ndarray:
    """A tile's TZCYX pixels as the view shows them."""
    shown = apply_layout(array, layout)
    return np.ascontiguousarray(shown) if contiguous else shown
