"""Tensor views of OME-Arrow images: what a view *is*, and how its pixels reach NumPy, PyTorch, JAX and CUDA.

``TensorView`` shows a record in this process; ``LazyTensorView`` defers, and is also what a remote client hands out. Both offer the same exports
and the same iteration. Axis order is TZCYX; a ROI is ``(x, y, w, h)``.

    >>> from ome_tensor import TensorView
    >>> view = TensorView(record, t=0, z=3, roi=(0, 0, 256, 256))   # doctest: +SKIP
    >>> view.to_torch(mode="numpy")                                 # doctest: +SKIP
"""

from typing import TYPE_CHECKING

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
from .on_demand import names_on_demand

if TYPE_CHECKING:
    from .batches import BatchArray
    from .handoff import DLPackTensor
    from .iteration import TileArray
    from .lazy import LazyTensorView
    from .record import Channel, ImageMeta
    from .view import TensorView
else:
    __getattr__, __dir__ = names_on_demand(
        __name__,
        {
            "BatchArray": "batches",
            "Channel": "record",
            "DLPackTensor": "handoff",
            "ImageMeta": "record",
            "LazyTensorView": "lazy",
            "TensorView": "view",
            "TileArray": "iteration",
        },
    )

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
