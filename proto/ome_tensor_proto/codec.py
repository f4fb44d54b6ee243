"""Domain <-> messages: plans, tilings, orders and resolved selections, each as a ``*_to_proto`` / ``*_from_proto`` pair.

Decoding trusts nothing: every form goes through the domain's own canonical functions again, so that a message from a foreign
client is held to what our own client checks before it sends. A malformed message raises :class:`InvalidSelection` (t, z, c,
region) or :class:`InvalidArgument` (all else) with the field's path and the refused value; what the contract names and nobody
has built raises :class:`NotSupported`. Whether a view fits its image, and the limits of a server, are not this layer's.

Messages are values: a decoded object shares nothing with its message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, cast

from ome_tensor.errors import InvalidArgument, InvalidSelection
from ome_tensor.layout import normalize_layout
from ome_tensor.pixel_types import check_dtype
from ome_tensor.plan import Plan
from ome_tensor.selection import Index, Indices, Region, Selection, as_index, canonical_index, canonical_region, compact

from .cuts import order_from_proto, order_to_proto, tiling_from_proto, tiling_to_proto
from .fields import INT64_MAX, INT64_MIN, enum_name, int64, located, word_of
from .v1 import tensor_service_pb2, view_pb2

__all__ = [
    "Mode",
    "check_images_named",
    "compression_from_proto",
    "compression_to_proto",
    "mode_from_proto",
    "order_from_proto",
    "order_to_proto",
    "plan_from_proto",
    "plan_to_proto",
    "selection_from_proto",
    "selection_to_proto",
    "tiling_from_proto",
    "tiling_to_proto",
    "wants_checksum",
]

#: What kind of values is wanted, in the words of ``to_dlpack(mode=...)``.
Mode: TypeAlias = Literal["numpy", "arrow"]

# An unset enum is its documented default, so it decodes like that; encoding always names the value.
_POLICIES: Mapping[str, view_pb2.ChannelPolicy] = {
    "error": view_pb2.CHANNEL_POLICY_ERROR,
    "first": view_pb2.CHANNEL_POLICY_FIRST,
}
_MODES: Mapping[str, view_pb2.ViewMode] = {"numpy": view_pb2.VIEW_MODE_TENSOR, "arrow": view_pb2.VIEW_MODE_ARROW}
_COMPRESSIONS: Mapping[str, tensor_service_pb2.Compression] = {
    "none": tensor_service_pb2.COMPRESSION_NONE,
    "lz4": tensor_service_pb2.COMPRESSION_LZ4,
    "zstd": tensor_service_pb2.COMPRESSION_ZSTD,
}
_ROI_ND: Mapping[str, view_pb2.RoiNdType] = {
    "2d": view_pb2.ROI_ND_TYPE_2D,
    "2d_timelapse": view_pb2.ROI_ND_TYPE_2D_TIMELAPSE,
    "3d": view_pb2.ROI_ND_TYPE_3D,
    "4d": view_pb2.ROI_ND_TYPE_4D,
}


# --- plans ------------------------------------------------------------------------------------------------------------


def plan_to_proto(plan: Plan, *, mode: Mode = "numpy") -> view_pb2.View:
    """A plan as a message.

    Raises:
        InvalidSelection: an index or bound that does not fit in 64 bits.
    """
    view = view_pb2.View(channel_policy=_POLICIES[plan.channel_policy], mode=_MODES[mode])
    for axis, index in zip("tzc", (plan.t, plan.z, plan.c), strict=True):
        if index is not None:
            _write_index(getattr(view, axis), index, axis)
    if plan.region is not None:
        _write_region(view.region, plan.region)
    if plan.layout is not None:
        view.layout = plan.layout
    if plan.dtype is not None:
        view.dtype = plan.dtype.name
    return view


def plan_from_proto(view: view_pb2.View, path: str = "view") -> Plan:
    """The plan of a message; an empty message is the whole image.

    Args:
        view: The message.
        path: Where it stands in its request, for errors.

    Raises:
        InvalidSelection, InvalidArgument: malformed or contradictory.
    """
    t, z, c = (
        _read_index(getattr(view, axis), axis, f"{path}.{axis}") if view.HasField(cast(Any, axis)) else None for axis in "tzc"
    )
    region = _read_region(view.region, t, z, f"{path}.region") if view.HasField("region") else None
    with located(f"{path}.layout"):
        layout = normalize_layout(view.layout)
    dtype = None
    if view.dtype:
        with located(f"{path}.dtype"):
            # NumPy reads much more than names (structured types, strings with sizes): a foreign text must not reach that parser.
            if not (view.dtype.isascii() and view.dtype.isalnum() and len(view.dtype) <= 16):
                raise InvalidArgument(f"dtype {view.dtype!r} is not the name of a NumPy dtype", value=view.dtype)
            dtype = check_dtype(view.dtype)
    policy = word_of(_POLICIES, view.channel_policy, f"{path}.channel_policy", default="error")
    mode_from_proto(view, path)
    return Plan(t, z, c, region, layout, dtype, policy)


def mode_from_proto(view: view_pb2.View, path: str = "view") -> Mode:
    """Which kind of values the message asks for: ``numpy`` or ``arrow``."""
    return cast(Mode, word_of(_MODES, view.mode, f"{path}.mode", default="numpy"))


def _write_index(message: view_pb2.AxisIndex, index: Index, axis: str) -> None:
    if isinstance(index, slice):
        # The sub-message must exist even where all three parts are absent.
        message.slice.SetInParent()
        for part in ("start", "stop", "step"):
            value = getattr(index, part)
            if value is not None:
                # Slices clip, so a bound beyond 64 bits means the same as the largest of 64 bits.
                setattr(message.slice, part, max(INT64_MIN, min(value, INT64_MAX)))
    elif isinstance(index, int):
        message.index = int64(index, axis)
    elif index is not None:
        message.list.values.extend([int64(item, axis) for item in index])
        message.list.SetInParent()


def _read_index(message: view_pb2.AxisIndex, axis: str, path: str) -> Index:
    form = message.WhichOneof("form")
    with located(path):
        if form == "index":
            return canonical_index(message.index, axis)
        if form == "slice":
            part = message.slice
            if part.HasField("step") and part.step == 0:
                raise InvalidSelection(f"{axis} slice step cannot be zero", value=0)
            return canonical_index(
                slice(
                    part.start if part.HasField("start") else None,
                    part.stop if part.HasField("stop") else None,
                    part.step if part.HasField("step") else None,
                ),
                axis,
            )
        if form == "list":
            return canonical_index(tuple(message.list.values), axis)
        raise InvalidSelection(f"{path} has no form: it needs one of index, slice, list (leave it out for the whole axis)")


def _write_region(message: view_pb2.Region, region: Region) -> None:
    values = [int64(value, region.kind) for value in region.values]
    if region.kind == "roi":
        message.roi.CopyFrom(view_pb2.Roi(**dict(zip("xywh", values, strict=True))))
    elif region.kind == "roi3d":
        message.roi3d.CopyFrom(view_pb2.Roi3d(**dict(zip("xyzwhd", values, strict=True))))
    elif region.kind == "tile":
        message.tile.CopyFrom(view_pb2.GridTile(tile_y=values[0], tile_x=values[1]))
    else:
        message.roi_nd.CopyFrom(view_pb2.RoiNd(type=_ROI_ND[region.kind], bounds=values))


def _read_region(message: view_pb2.Region, t: Index, z: Index, path: str) -> Region | None:
    form = message.WhichOneof("form")
    if form is None:
        raise InvalidSelection(
            f"{path} has no form: it needs one of roi, roi3d, roi_nd, tile (leave it out for the full frame)", field=path
        )
    path = f"{path}.{form}"
    with located(path):
        if form == "roi":
            roi = message.roi
            return canonical_region(t=t, z=z, roi=(roi.x, roi.y, roi.w, roi.h))
        if form == "roi3d":
            box = message.roi3d
            return canonical_region(t=t, z=z, roi3d=(box.x, box.y, box.z, box.w, box.h, box.d))
        if form == "tile":
            return canonical_region(t=t, z=z, tile=(message.tile.tile_y, message.tile.tile_x))
        kind = word_of(_ROI_ND, message.roi_nd.type, f"{path}.type", error=InvalidSelection)
        return canonical_region(t=t, z=z, roi_nd=tuple(message.roi_nd.bounds), roi_type=kind)


# --- resolved selections ----------------------------------------------------------------------------------------------


def selection_to_proto(selection: Selection) -> view_pb2.Selection:
    """A resolved selection as a message: t, z, c as slices where evenly spaced, else as lists."""
    message = view_pb2.Selection(roi=view_pb2.Roi(x=selection.x, y=selection.y, w=selection.w, h=selection.h))
    for axis, indices in zip("tzc", (selection.t, selection.z, selection.c), strict=True):
        _write_index(getattr(message, axis), as_index(indices), axis)
    return message


def selection_from_proto(message: view_pb2.Selection, path: str = "selection") -> Selection:
    """The resolved selection of a message.

    Raises:
        InvalidSelection: an axis is missing, is not in resolved form, or holds a negative index; or the ROI is not positive.
    """
    t, z, c = (_read_indices(getattr(message, axis), axis, f"{path}.{axis}") for axis in "tzc")
    roi = message.roi
    if roi.x < 0 or roi.y < 0 or roi.w <= 0 or roi.h <= 0:
        values = (roi.x, roi.y, roi.w, roi.h)
        raise InvalidSelection(f"{path}.roi is not a rectangle inside an image: {values}", field=f"{path}.roi", value=values)
    return Selection(t, z, c, roi.x, roi.y, roi.w, roi.h)


def _read_indices(message: view_pb2.AxisIndex, axis: str, path: str) -> Indices:
    index = _read_index(message, axis, path)
    if isinstance(index, tuple):
        if index and min(index) < 0:
            raise InvalidSelection(f"{path} is not resolved: it holds {min(index)}", field=path, value=min(index))
        return compact(index)
    if isinstance(index, slice) and index.start is not None and index.step is not None:
        # Downwards to 0 has no stop, as in Python.
        stop = index.stop if index.stop is not None else -1 if index.step < 0 else None
        if stop is not None:
            chosen = range(index.start, stop, index.step)
            # len() overflows beyond 63 bits, and no axis is so long.
            if not chosen or (min(chosen[0], chosen[-1]) >= 0 and max(chosen[0], chosen[-1]) < INT64_MAX):
                return chosen
    raise InvalidSelection(f"{path} is not resolved: {index!r}", field=path, value=index)


# --- compression ------------------------------------------------------------------------------------------------------


def compression_to_proto(word: str) -> tensor_service_pb2.Compression:
    """``none``, ``lz4`` or ``zstd`` as the request's field."""
    return _COMPRESSIONS[word]


def compression_from_proto(value: int, path: str = "compression") -> str:
    """The request's field as ``none``, ``lz4`` or ``zstd``.

    Raises:
        InvalidArgument: a value that the contract does not know.
    """
    return word_of(_COMPRESSIONS, value, path, default="none")


# --- fields that have no type of their own in the domain --------------------------------------------------------------


def wants_checksum(request: tensor_service_pb2.ReadTilesRequest) -> bool:
    """Whether a read is to bring checksums. Raises InvalidArgument for a kind the contract does not know."""
    enum_name(tensor_service_pb2.ChecksumKind, request.checksum, "checksum")
    return request.checksum == tensor_service_pb2.CHECKSUM_KIND_XXH3_64


def check_images_named(request: tensor_service_pb2.ReadTilesRequest) -> None:
    """Refuse a read that does not say of which images.

    Raises:
        InvalidArgument: neither keys nor rows, or both.
    """
    if request.HasField("image_rows"):
        if request.keys:
            raise InvalidArgument("a read has keys or image_rows, not both", field="keys", value=len(request.keys))
        if not request.image_rows.rows:
            raise InvalidArgument("image_rows lists no rows", field="image_rows.rows")
    elif not request.keys:
        raise InvalidArgument("keys must name an image", field="keys")
