"""From batches of pixels to what a training step takes: dicts of tensors, with what is known of each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ome_tensor.batches import ImageBatch
from ome_tensor.errors import InvalidArgument
from ome_tensor.iteration import ImageTileArray

from .batch import Batch

__all__ = ["PIXELS", "Columns", "Convert", "batch_samples", "convert_of", "metadata_columns", "nbytes_of", "renamed"]

#: The key of the pixels in a sample.
PIXELS = "pixels"

#: What else a sample says of itself.
_OWN = (PIXELS, "image", "row", "tile", "origin", "valid")

#: Where float32 holds every value.
_EXACT_IN_FLOAT32 = (np.dtype(np.uint8), np.dtype(np.int8), np.dtype(np.uint16), np.dtype(np.int16), np.dtype(np.float16))

#: torch has these, but next to no operations on them: wider ones that have.
_WIDER = {np.dtype(np.uint16): torch.int32, np.dtype(np.uint32): torch.int64, np.dtype(np.uint64): torch.int64}

#: What NumPy has too.
_NUMPY = {getattr(torch, name): np.dtype(name) for name in "uint8 int8 int16 int32 int64 float16 float32 float64".split()}

#: Values of metadata columns by name of the sample's key: an array or a list, one entry an image.
Columns = Mapping[str, "torch.Tensor | list[Any]"]


def renamed(names: Sequence[str] | Mapping[str, str], argument: str) -> dict[str, str]:
    """Column names by the keys that samples have them under. Raises InvalidArgument where two, or one of a sample's own, are the same."""
    if isinstance(names, str) or not isinstance(names, (Mapping, Sequence)):
        raise InvalidArgument(
            f"{argument} must be a list of column names, or a dict of key: column, not {names!r}", field=argument, value=names
        )
    pairs = list(names.items()) if isinstance(names, Mapping) else [(name, name) for name in names]
    for place, (key, column) in enumerate(pairs):
        if not isinstance(key, str) or not isinstance(column, str):
            raise InvalidArgument(f"{argument}: a column's name must be text, not {column!r}", field=argument, value=column)
        if key in _OWN or key in [other for other, _ in pairs[:place]]:
            raise InvalidArgument(
                f"{argument}: a sample has {key!r} already; give {column!r} another key: {argument}={{'my_{key}': {column!r}}}",
                field=argument,
                value=key,
            )
    return dict(pairs)


def metadata_columns(
    table: pa.Table | None, wanted: Sequence[str] | Mapping[str, str] | None
) -> dict[str, torch.Tensor | list[Any]]:
    """The wanted columns of a set's metadata, by key: numbers as tensors, all else as lists.

    Args:
        table: The metadata, a row an image.
        wanted: Names, or keys and names; ``None``: all there are.

    Raises:
        InvalidArgument: a column that has not been asked for when the images were selected.
    """
    have = [] if table is None else table.column_names
    chosen = renamed(have if wanted is None else wanted, "metadata")
    found: dict[str, torch.Tensor | list[Any]] = {}
    for key, name in chosen.items():
        if name not in have:
            raise InvalidArgument(
                f"the images come without the column {name!r}: select them with images(..., metadata=[{name!r}])",
                field="metadata",
                value=name,
            )
        assert table is not None
        column = table.column(name)
        kind = column.type
        if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
            # A null is a NaN, of an integer too: there is no other way to say it in a tensor.
            values = column.to_numpy()
            if values.dtype != object:
                found[key] = torch.from_numpy(np.array(values))
                continue
        found[key] = column.to_pylist()
    return found


class Convert:
    """What becomes of pixels: the dtype of the tensors.

    Args:
        dtypes: Of each key, a torch dtype; ``None`` for the usual one.
    """

    def __init__(self, dtypes: Mapping[str, torch.dtype | None]) -> None:
        self._dtypes = dtypes

    def __call__(self, key: str, array: np.ndarray) -> torch.Tensor:
        """A tensor of the pixels of one key: on the same memory where the dtype is the same."""
        wanted = self._dtypes.get(key)
        if wanted is None:
            if key == PIXELS and array.dtype in _EXACT_IN_FLOAT32:
                wanted = torch.float32
            else:
                wanted = _WIDER.get(array.dtype)
        # NumPy takes half of torch's time to make floats of integers: the memory that it makes them in has been used before.
        same = _NUMPY.get(wanted) if wanted is not None else None
        if same is not None:
            return torch.from_numpy(array.astype(same, copy=False))
        tensor = torch.from_numpy(array)
        return tensor if wanted is None else tensor.to(wanted)

    def alone(self, key: str, array: np.ndarray) -> torch.Tensor:
        """The same in memory of its own: of a small tile, which else would keep (and take to another process) the message that it came
        in."""
        tensor = self(key, array)
        is_part = array.base is not None and tensor.data_ptr() == array.__array_interface__["data"][0]
        return tensor.clone() if is_part else tensor


def convert_of(dtype: Any, keys: Sequence[str]) -> Convert:
    """From the user's ``dtype``: one for the pixels, or a dict of one for each key. Raises InvalidArgument."""
    given = dtype if isinstance(dtype, Mapping) else {PIXELS: dtype}
    found: dict[str, torch.dtype | None] = {}
    for key, value in given.items():
        if key not in keys:
            raise InvalidArgument(f"dtype: samples have no pixels {key!r}, but {', '.join(keys)}", field="dtype", value=key)
        if value is None or isinstance(value, torch.dtype):
            found[key] = value
            continue
        name = value if isinstance(value, str) else getattr(np.dtype(value) if isinstance(value, type) else value, "name", "")
        name = {"half": "float16", "float": "float32", "double": "float64"}.get(name, name)
        real = getattr(torch, name, None) if name.isidentifier() else None
        if not isinstance(real, torch.dtype):
            raise InvalidArgument(f"dtype must be a torch dtype or its name, not {value!r}", field="dtype", value=value)
        found[key] = real
    return Convert(found)


def batch_samples(batch: ImageBatch | ImageTileArray, convert: Convert, beside: Mapping[str, str], columns: Columns) -> Batch:
    """A batch, or a single tile, as a dict.

    Args:
        batch: The pixels, and where they belong.
        convert: Their dtypes.
        beside: Columns that came beside, by key.
        columns: What is known of each image, by key.

    Returns:
        ``pixels`` (N, <layout>), and as many of each key of ``beside``; ``image`` (N,): numbers of the images in the set; ``row`` (N,):
        their rows in
        the dataset; ``tile`` (N,): numbers in the enumeration of tiles; ``origin`` (N, 4): t, z, y, x; ``valid`` (N, 3): z, h, w that are
        not padding;
        and each key of ``columns``. Of a single tile the same without N.
    """
    make = convert.alone if isinstance(batch, ImageTileArray) else convert
    found = Batch({PIXELS: make(PIXELS, batch.array)})
    for key, name in beside.items():
        found[key] = make(key, batch.beside[name])
    if isinstance(batch, ImageTileArray):
        place = batch.image
        found |= {"image": place, "row": batch.row, "tile": batch.number}
        found |= {"origin": torch.tensor(batch.origin), "valid": torch.tensor(batch.valid)}
        found |= {key: values[place] for key, values in columns.items()}
        return found
    # Copies: what was sliced out of a table would take the whole of it to another process.
    images = torch.tensor(batch.images)
    found |= {"image": images, "row": torch.tensor(batch.rows), "tile": torch.tensor(batch.numbers)}
    found |= {"origin": torch.tensor(batch.origins), "valid": torch.tensor(batch.valid)}
    for key, values in columns.items():
        found[key] = values[images] if isinstance(values, torch.Tensor) else [values[image] for image in images.tolist()]
    return found


def nbytes_of(samples: Any) -> int:
    """Bytes of the tensors of a dict of them; whatever else counts as nothing."""
    if not isinstance(samples, Mapping):
        return 0
    return sum(value.nbytes for value in samples.values() if isinstance(value, torch.Tensor))
