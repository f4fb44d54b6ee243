"""The Arrow side of a stream of tiles: its schema, and where everything lies in a record batch's body.

Shared by the writer (:mod:`.batches`) and the reader (:mod:`.reader`). The schema is specified at ``ReadTilesResponse`` in
``v1/tensor_service.proto``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ome_tensor.errors import BrokenStream, InvalidArgument, LimitExceeded
from ome_tensor.pixel_types import check_dtype

from .ipc import BatchTemplate

__all__ = ["COLUMNS", "CONTRACT_VERSION", "PIXELS", "Array", "BatchFormat", "beside_name", "physical_dtype"]

Array: TypeAlias = npt.NDArray[Any]

#: ``ome_tensor.version`` in the schema's metadata.
CONTRACT_VERSION: Final = "1"

#: The columns before the pixels, in their order.
COLUMNS: Final[Mapping[str, np.dtype[Any]]] = {
    "tile": np.dtype(np.int64),
    "image": np.dtype(np.int32),
    "t": np.dtype(np.int32),
    "z": np.dtype(np.int32),
    "y": np.dtype(np.int32),
    "x": np.dtype(np.int32),
    "valid_z": np.dtype(np.int32),
    "valid_h": np.dtype(np.int32),
    "valid_w": np.dtype(np.int32),
    "offset": np.dtype(np.int64),
}

#: Name of the column of pixels, the last.
PIXELS: Final = "pixels"


def beside_name(number: int) -> str:
    """Name of the column of pixels of an image column that comes beside, from 0."""
    return f"beside_{number}"


_DIM_NAMES = ("t", "z", "c", "y", "x")
_VARIABLE = "arrow.variable_shape_tensor"
_METADATA_PREFIX = "ome_tensor."

# Arrow's lists hold int32 offsets and sizes.
_MAX_ELEMENTS = 2**31 - 1


def physical_dtype(dtype: np.dtype[Any]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """How a dtype travels: the dtype of Arrow's values, and the axes that an element becomes (``(2,)`` for complex, else
    none)."""
    if dtype.kind == "b":
        return np.dtype(np.uint8), ()
    if dtype.kind == "c":
        return np.dtype(np.float32 if dtype.itemsize == 8 else np.float64), (2,)
    return dtype, ()


@dataclass(frozen=True, slots=True)
class BatchFormat:
    """What all record batches of one stream have in common.

    Attributes:
        tile_shape: (T, Z, C, H, W) in elements: every tile's, or the largest where ``variable``.
        dtype: The dtype of the view's elements.
        variable: Whether rows differ in shape (clipped tiles, slabs).
        metadata: What the schema says of the view, without the prefix ``ome_tensor.``: ``layout``, ``shape``, ``key``,
            ``dataset_version``. (``version`` and ``dtype`` are added.)
        schema: The Arrow schema.
        schema_bytes: The same as the first message of an Arrow IPC stream.
        layouts: Where writers keep what the messages of this format have in common; of the format, since many short streams share one.
    """

    tile_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    variable: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    schema: pa.Schema = field(init=False, compare=False, repr=False)
    schema_bytes: bytes = field(init=False, compare=False, repr=False)
    layouts: dict[Any, Any] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.tile_shape) != 5:
            raise InvalidArgument(f"tile_shape must be (T, Z, C, H, W), not {self.tile_shape}", field="tile_shape")
        if not self.variable and self.wire_elements(self.tile_shape) > _MAX_ELEMENTS:
            raise LimitExceeded(f"a tile of shape {self.tile_shape} is too large for one row", field="tile_shape")
        object.__setattr__(self, "schema", self._make_schema())
        object.__setattr__(self, "schema_bytes", self.schema.serialize().to_pybytes())

    @classmethod
    def of(
        cls,
        tile_shape: Sequence[int],
        dtype: np.dtype[Any],
        *,
        variable: bool,
        layout: str,
        shape: Sequence[int],
        key: str,
        dataset_version: str,
    ) -> BatchFormat:
        """A server's format: the view's layout and shape (in layout order), the image's canonical key and its dataset's
        version. The same object for the same arguments, as long as they are among the last few."""
        return _server_format(tuple(tile_shape), dtype, variable, layout, tuple(shape), key, dataset_version)

    @classmethod
    def from_schema(cls, schema: pa.Schema, tile_shape: Sequence[int]) -> BatchFormat:
        """The format that a received schema means.

        Args:
            schema: As received; columns beside the contract's are allowed.
            tile_shape: From the stream's header.

        Raises:
            BrokenStream: it is not a schema of this contract, or contradicts the header's tile shape.
        """
        texts = {
            key.decode("utf-8", "replace").removeprefix(_METADATA_PREFIX): value.decode("utf-8", "replace")
            for key, value in (schema.metadata or {}).items()
            if key.startswith(_METADATA_PREFIX.encode())
        }
        version = texts.pop("version", None)
        if version != CONTRACT_VERSION:
            raise BrokenStream(f"the stream is of contract version {version!r}, not {CONTRACT_VERSION!r}")
        name = texts.pop("dtype", "")
        if not (name.isascii() and name.isalnum() and len(name) <= 16):
            raise BrokenStream(f"the stream's dtype is {name!r}")
        if len(tile_shape) != 5 or min(tile_shape) < 0:
            raise BrokenStream(f"the stream's tiles have shape {tuple(tile_shape)}, not (T, Z, C, H, W)")
        index = schema.get_field_index(PIXELS)
        if index < 0:
            raise BrokenStream("the stream has no column of pixels, or several")
        try:
            return cls(tuple(tile_shape), check_dtype(name), not _is_uniform(schema.field(index)), texts).checked_against(schema)
        except (InvalidArgument, LimitExceeded, pa.ArrowException) as error:
            raise BrokenStream(f"the stream's format is damaged: {error}") from error

    @classmethod
    def of_beside(cls, schema: pa.Schema, number: int, tile_shape: Sequence[int], dtype: str) -> BatchFormat:
        """The format of a column that comes beside, of a received schema.

        Args:
            schema: As received.
            number: Which of the columns beside, from 0.
            tile_shape, dtype: From the stream's header.

        Raises:
            BrokenStream: there is none, or it contradicts the header.
        """
        name = beside_name(number)
        index = schema.get_field_index(name)
        if (
            index < 0
            or len(tile_shape) != 5
            or min(tile_shape) < 0
            or not (dtype.isascii() and dtype.isalnum() and len(dtype) <= 16)
        ):
            raise BrokenStream(f"the stream has no {name} as its header says")
        try:
            made = cls(tuple(tile_shape), check_dtype(dtype), not _is_uniform(schema.field(index)))
        except (InvalidArgument, LimitExceeded, pa.ArrowException) as error:
            raise BrokenStream(f"the stream's format is damaged: {error}") from error
        if not _same_storage(schema.field(index).type, made.schema.field(PIXELS).type):
            raise BrokenStream(f"the stream's column {name} is of type {schema.field(index).type}")
        return made

    def checked_against(self, schema: pa.Schema) -> BatchFormat:
        """Itself, or BrokenStream where a received schema lacks a column of this format or has it with another type."""
        for wanted in self.schema:
            index = schema.get_field_index(wanted.name)
            found = schema.field(index) if index >= 0 else None
            if found is None or not _same_storage(found.type, wanted.type):
                raise BrokenStream(
                    f"the stream's column {wanted.name} is of type {found and found.type}, not {wanted.type}", field=wanted.name
                )
        return self

    @property
    def template(self) -> BatchTemplate:
        """The metadata template of this format's record batches."""
        return _template(self.variable, None)

    def compressed_template(self, codec: str) -> BatchTemplate:
        """The metadata template of this format's record batches where their buffers are compressed."""
        return _template(self.variable, codec)

    def wire_elements(self, shape: Sequence[int]) -> int:
        """Number of Arrow values that a block of that (T, Z, C, H, W) becomes."""
        return math.prod(shape) * math.prod(physical_dtype(self.dtype)[1])

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a block of that (T, Z, C, H, W)."""
        return math.prod(shape) * self.dtype.itemsize

    def _make_schema(self) -> pa.Schema:
        values, trailing = physical_dtype(self.dtype)
        value_type = pa.from_numpy_dtype(values)
        names = _DIM_NAMES + ("complex",) * len(trailing)
        if self.variable:
            dimensions = len(names)
            pixels = pa.field(
                PIXELS,
                _variable_storage(value_type, dimensions),
                nullable=False,
                metadata={
                    "ARROW:extension:name": _VARIABLE,
                    "ARROW:extension:metadata": json.dumps({"dim_names": list(names)}),
                },
            )
        else:
            tensor = pa.fixed_shape_tensor(value_type, [*self.tile_shape, *trailing], dim_names=list(names))
            pixels = pa.field(PIXELS, tensor, nullable=False)
        texts = {"version": CONTRACT_VERSION, "dtype": self.dtype.name, **self.metadata}
        return pa.schema(
            [pa.field(name, pa.from_numpy_dtype(dtype), nullable=False) for name, dtype in COLUMNS.items()] + [pixels],
            metadata={_METADATA_PREFIX + key: text for key, text in texts.items()},
        )


def _variable_storage(value_type: pa.DataType, dimensions: int) -> pa.DataType:
    return pa.struct(
        [
            pa.field("data", pa.list_(pa.field("item", value_type, nullable=False)), nullable=False),
            pa.field("shape", pa.list_(pa.field("item", pa.int32(), nullable=False), dimensions), nullable=False),
        ]
    )


def _storage(dtype: pa.DataType) -> pa.DataType:
    """The type below an extension type, whether or not this pyarrow knows the extension."""
    return dtype.storage_type if isinstance(dtype, pa.BaseExtensionType) else dtype


def _is_uniform(pixels: pa.Field) -> bool:
    return bool(pa.types.is_fixed_size_list(_storage(pixels.type)))


def _same_storage(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a received column can be read as the wanted one: same layout in memory; names and nullability of children do not
    count."""
    if isinstance(wanted, pa.FixedShapeTensorType):
        # Another shape, or axes permuted in memory, are other pixels. Dim names are only names.
        if not isinstance(found, pa.FixedShapeTensorType) or found.permutation is not None:
            return False
        return bool(found.value_type == wanted.value_type and list(found.shape) == list(wanted.shape))
    found = _storage(found)
    if pa.types.is_struct(wanted):
        if not pa.types.is_struct(found) or found.num_fields != 2:
            return False
        data, shape = found.field(0).type, found.field(1).type
        return bool(
            pa.types.is_list(data)
            and data.value_type == wanted.field(0).type.value_type
            and pa.types.is_fixed_size_list(shape)
            and shape.value_type == pa.int32()
            and shape.list_size == wanted.field(1).type.list_size
        )
    return bool(found == wanted)


@lru_cache(maxsize=256)
def _server_format(
    tile_shape: tuple[int, ...], dtype: np.dtype[Any], variable: bool, layout: str, shape: tuple[int, ...], key: str, version: str
) -> BatchFormat:
    # Kept, since making a schema takes longer than reading a small tile, and reads of one image are alike.
    metadata = {"layout": layout, "shape": json.dumps(list(shape)), "key": key, "dataset_version": version}
    return BatchFormat(tile_shape, dtype, variable, metadata)


@cache
def _template(variable: bool, codec: str | None) -> BatchTemplate:
    # Types and sizes do not show in a batch's metadata, so two templates (for each codec) serve every stream.
    pixels = _variable_storage(pa.uint8(), 1) if variable else pa.list_(pa.uint8(), 1)
    row: Any = {"data": [0], "shape": [1]} if variable else [0]
    arrays = [pa.array([0], type=pa.from_numpy_dtype(dtype)) for dtype in COLUMNS.values()]
    return BatchTemplate(pa.RecordBatch.from_arrays([*arrays, pa.array([row], type=pixels)], names=[*COLUMNS, PIXELS]), codec)
