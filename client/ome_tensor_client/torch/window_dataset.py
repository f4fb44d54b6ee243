"""Windows of images by place, as a map-style torch dataset: one call to the server for a whole batch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset, default_collate

from ome_tensor.batches import ImageBatch
from ome_tensor.errors import InvalidArgument, InvalidSelection
from ome_tensor.tiling import Order, Tiling
from ome_tensor.windows import Origins
from ome_tensor_client.image_read import ImageRead
from ome_tensor_client.image_set import ImageSet
from ome_tensor_client.read_stats import ReadStats

from .batch import Batch, as_batch
from .samples import PIXELS, batch_samples, convert_of, metadata_columns, renamed
from .sources import image_set_of, source_of

__all__ = ["Samples", "WindowDataset"]


class Samples(list[Any]):
    """The samples of one batch, and the batch that they are views of.

    Attributes:
        whole: Their dict with a leading axis N, as it came in one message.
    """

    def __init__(self, samples: Sequence[Any], whole: Any) -> None:
        super().__init__(samples)
        self.whole = whole


def _transformed(transform: Callable[[Any], Any], whole: Any) -> Any:
    try:
        return transform(whole)
    except StopIteration as error:
        # A DataLoader would take it for the end of the epoch.
        raise RuntimeError("transform raised StopIteration") from error


class WindowDataset(Dataset[Any]):  # type: ignore[misc]  # torch is optional, and not typed here
    """Windows of one size of the images of a set (or of one view), by number in a list of origins, or by place.

    ``dataset[3]`` is the fourth listed window; ``dataset[image, y, x]`` (or ``[image, t, z, y, x]``) is any other. A DataLoader fetches a whole
    batch in
    one call, through ``__getitems__``; with ``collate_fn=WindowDataset.collate`` it is the received message, uncopied. Samplers of this package give
    numbers or places: :class:`.WindowSampler`, :class:`.RandomWindowSampler`.

    Samples are dicts as those of :class:`.TileDataset`; ``tile`` is a window's number in its batch.

    Args:
        images: ``client.dataset(...).images(...)``, or a tensor view on a server.
        size: ``(h, w)``; with places that name t and z also ``(z, h, w)`` or ``(t, z, h, w)``.
        origins: (N, 2): y, x; or (N, 4): t, z, y, x; in image coordinates. The list that numbers count.
        numbers: Of each origin the number of its image in the set; by default all are of the first.
        edge: ``error``: every window must lie inside its image; ``pad``: it may stick out.
        pad: The padding value.
        dtype, beside, metadata, transform, selection: As of :class:`.TileDataset`; ``transform`` gets a batch.

    Raises:
        InvalidArgument, InvalidSelection: naming the argument and its value.
    """

    def __init__(
        self,
        images: Any,
        size: tuple[int, ...],
        *,
        origins: Any = None,
        numbers: Any = None,
        edge: Literal["error", "pad"] = "error",
        pad: float = 0,
        dtype: Any = None,
        beside: Sequence[str] | Mapping[str, str] = (),
        metadata: Sequence[str] | Mapping[str, str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        **selection: Any,
    ) -> None:
        found, chosen = image_set_of(images, selection)
        if found is None:
            raise InvalidArgument(
                "images must be on a server: cut windows of a local view with its iter_windows",
                field="images",
                value=repr(images),
            )
        if edge not in ("error", "pad"):
            raise InvalidArgument(f"edge must be error or pad, not {edge!r}", field="edge", value=edge)
        if transform is not None and not callable(transform):
            raise InvalidArgument(f"transform must be callable, not {transform!r}", field="transform", value=transform)
        self.images: ImageSet = found
        self.size = tuple(size) if isinstance(size, (tuple, list)) else size
        self._selection = chosen
        self._edge: Literal["clip", "pad"] = "pad" if edge == "pad" else "clip"
        self._pad = pad
        self._beside = renamed(beside, "beside")
        self._convert = convert_of(dtype, [PIXELS, *self._beside])
        self._columns = metadata_columns(found.metadata, metadata)
        self._transform = transform
        self.stats = ReadStats()
        axes = 4 if isinstance(self.size, tuple) and len(self.size) > 2 else 2
        listed = Origins.of(np.empty((0, axes), np.int64) if origins is None else origins, numbers)
        self._origins, self._numbers = listed.array, listed.images
        # Whatever is wrong with the list is said here, and not in a worker an hour later.
        if len(self):
            self._read(self._origins, self._numbers)
        else:
            Tiling.windows(self._origins, self.size, self._edge, self._pad)

    def __len__(self) -> int:
        """Number of listed windows."""
        return len(self._origins)

    @property
    def digest(self) -> str:
        """Of what the images are, and the list of origins."""
        listed = hashlib.sha256(self._origins.tobytes())
        if self._numbers is not None:
            listed.update(self._numbers.tobytes())
        tiling = Tiling.tiles((1, 1))
        return f"{source_of(self.images, tiling, list(self._beside.values()), self._selection).digest}:{listed.hexdigest()}:{self.size}"

    def frames(self, planes: bool) -> tuple[np.ndarray, np.ndarray]:
        """Of each image along t, z, y, x: where its view begins, and how long it is. (n, 4) each.

        Args:
            planes: Whether t and z are wanted: places of views that choose uneven ones cannot be counted (InvalidArgument).
        """
        read = ImageRead(self.images, Tiling(), Order(), (), self._selection)
        firsts, lengths = read.frames()
        if planes and not read.has_runs:
            raise InvalidArgument("planes=True is for views with all t and z in a row", field="planes", value=planes)
        return firsts, lengths

    @property
    def is_padded(self) -> bool:
        """Whether windows may stick out of their images."""
        return self._edge == "pad"

    def _read(self, origins: np.ndarray, numbers: np.ndarray | None) -> tuple[ImageRead, np.ndarray]:
        """A read of windows, and the images it asks for: only those, for a set may be large."""
        images = np.zeros(len(origins), np.int64) if numbers is None else numbers
        outside = images[(images < 0) | (images >= len(self.images))]
        if len(outside):
            wrong = int(outside[0])
            raise InvalidSelection(f"there is no image {wrong} in a set of {len(self.images)}", field="images", value=wrong)
        used, own = np.unique(images, return_inverse=True)
        tiling = Tiling.windows(origins, self.size, self._edge, self._pad, own.reshape(-1))
        beside = list(self._beside.values())
        return ImageRead(self.images[used], tiling, Order(), beside, self._selection, self.stats), used

    def __getitem__(self, index: Any) -> Any:
        """One window; see the class.

        Raises:
            IndexError: no such number.
            InvalidSelection: a place that does not fit its image.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> Samples:
        """Several windows in one call, by numbers, or by places of one form. Raises as :meth:`__getitem__`."""
        origins, numbers = self._places(list(indices))
        read, used = self._read(origins, numbers)
        (batch,) = read.batches(len(origins), 0, True)
        known = ImageBatch(
            batch.array, batch.numbers, 0, batch.origins, batch.valid, used[batch.images], batch.rows, batch.beside
        )
        began = time.perf_counter()
        whole: Any = batch_samples(known, self._convert, self._beside, self._columns)
        self.stats.convert += time.perf_counter() - began
        if self._transform is not None:
            whole = as_batch(_transformed(self._transform, whole))
            if not isinstance(whole, Mapping):
                return Samples([whole], whole)
        return Samples([Batch({key: values[place] for key, values in whole.items()}) for place in range(len(origins))], whole)

    def _places(self, indices: list[Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """Origins, and numbers of images."""
        if not indices:
            raise InvalidArgument("a batch has no windows", field="indices", value=indices)
        if isinstance(indices[0], (tuple, list)):
            lengths = {len(index) if isinstance(index, (tuple, list)) else 0 for index in indices}
            if len(lengths) != 1 or not lengths <= {3, 5}:
                raise InvalidSelection(
                    "places must all be (image, y, x), or all (image, t, z, y, x)", field="index", value=indices[0]
                )
            places = np.asarray(indices)
            if places.dtype.kind not in "iu":
                raise InvalidSelection(f"places must be integers, not {indices[0]!r}", field="index", value=indices[0])
            return places[:, 1:], places[:, 0]
        numbers = np.asarray(indices)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise InvalidSelection(
                f"an index must be a number, or (image, y, x), or (image, t, z, y, x), not {indices[0]!r}",
                field="index",
                value=indices[0],
            )
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        wrong = (numbers < 0) | (numbers >= len(self))
        if wrong.any():
            raise IndexError(f"window {indices[int(np.argmax(wrong))]} of {len(self)}")
        return self._origins[numbers], None if self._numbers is None else self._numbers[numbers]

    @staticmethod
    def collate(samples: Any) -> Any:
        """For a DataLoader's ``collate_fn``: the batch as it came, where it came as one."""
        return samples.whole if isinstance(samples, Samples) else default_collate(samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stats": ReadStats()}
