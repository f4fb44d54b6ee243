"""Tensor views of OME-Arrow images: what a view *is*, and how its pixels reach NumPy, PyTorch, JAX and CUDA.

``TensorView`` shows a record in this process; ``LazyTensorView`` defers, and is also what a remote client hands out. Both offer the same exports
and the same iteration. Axis order is TZCYX; a ROI is ``(x, y, w, h)``.

    >>> from ome_tensor import TensorView
    >>> view = TensorView(record, t=0, z=3, roi=(0, 0, 256, 256))   # doctest: +SKIP
    >>> view.to_torch(mode="numpy")                                 # doctest: +SKIP
"""

from .batches import BatchArray
from .errors import (
    BrokenStream,
    Cancelled,
    DatasetChanged,
    DatasetNotFound,
    DeadlineExceeded,
    DeviceUnavailable,
    ImageNotFound,
    InvalidArgument,
    InvalidRecord,
    InvalidSelection,
    LimitExceeded,
    MissingDependency,
    NotAllowed,
    NotAuthenticated,
    NotSupported,
    OmeTensorError,
    Overloaded,
    Rebalance,
    ServerError,
    Unavailable,
)
from .handoff import DLPackTensor
from .iteration import TileArray
from .lazy import LazyTensorView
from .record import Channel, ImageMeta
from .view import TensorView

__all__ = [
    "BatchArray",
    "BrokenStream",
    "Cancelled",
    "Channel",
    "DLPackTensor",
    "DatasetChanged",
    "DatasetNotFound",
    "DeadlineExceeded",
    "DeviceUnavailable",
    "ImageMeta",
    "ImageNotFound",
    "InvalidArgument",
    "InvalidRecord",
    "InvalidSelection",
    "LazyTensorView",
    "LimitExceeded",
    "MissingDependency",
    "NotAllowed",
    "NotAuthenticated",
    "NotSupported",
    "OmeTensorError",
    "Overloaded",
    "Rebalance",
    "ServerError",
    "TensorView",
    "TileArray",
    "Unavailable",
]
