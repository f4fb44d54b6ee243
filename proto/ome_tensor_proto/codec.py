"""Domain <-> messages: plans, tilings, orders and resolved selections, each as a ``*_to_proto`` / ``*_from_proto`` pair.

Decoding trusts nothing: every form goes through the domain's own canonical functions again, so that a message from a foreign
client is held to what our own client checks before it sends. A malformed message raises :class:`InvalidSelection` (t, z, c,
region) or :class:`InvalidArgument` (all else) with the field's path and the refused value; what the contract names and nobody
has built raises :class:`NotSupported`. Whether a view fits its image, and the limits of a server, are not this layer's.

Messages are values: a decoded object shares nothing with its message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, cast

from ome_tensor.errors import InvalidArgument, InvalidSelection, NotSupported
from ome_tensor.layout import normalize_layout
from ome_tensor.pixel_types import check_dtype
from ome_tensor.plan import Plan
from ome_tensor.selection import Index, Indices, Region, Selection, as_index, canonical_index, canonical_region, compact
from ome_tensor.tiling import Edge, Order, Tiling, check_seed

from .v1 import tensor_service_pb2, view_pb2

__all__ = [
    "Mode",
    "check_built",
    "mode_from_proto",
    "order_from_proto",
    "order_to_proto",
    "plan_from_proto",
    "plan_to_proto",
    "selection_from_proto",
    "selection_to_proto",
    "tiling_from_proto",
    "tiling_to_proto",
]

#: What kind of values is wanted, in the words of ``to_dlpack(mode=...)``.
Mode: TypeAlias = Literal["numpy", "arrow"]

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_UINT64_MAX = 2**64 - 1

# An unset enum is its documented default, so it decodes like that; encoding always names the value.
_POLICIES: Mapping[str, view_pb2.ChannelPolicy] = {
    "error": view_pb2.CHANNEL_POLICY_ERROR,
    "first": view_pb2.CHANNEL_POLICY_FIRST,
}
_MODES: Mapping[str, view_pb2.ViewMode] = {"numpy": view_pb2.VIEW_MODE_TENSOR, "arrow": view_pb2.VIEW_MODE_ARROW}
_EDGES: Mapping[str, view_pb2.EdgePolicy] = {
    "clip": view_pb2.EDGE_POLICY_CLIP,
    "pad": view_pb2.EDGE_POLICY_PAD,
    "drop": view_pb2.EDGE_POLICY_DROP,
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
    with _located(f"{path}.layout"):
        layout = normalize_layout(view.layout)
    dtype = None
    if view.dtype:
        with _located(f"{path}.dtype"):
            # NumPy reads much more than names (structured types, strings with sizes): a foreign text must not reach that parser.
            if not (view.dtype.isascii() and view.dtype.isalnum() and len(view.dtype) <= 16):
                raise InvalidArgument(f"dtype {view.dtype!r} is not the name of a NumPy dtype", value=view.dtype)
            dtype = check_dtype(view.dtype)
    policy = _word(_POLICIES, view.channel_policy, f"{path}.channel_policy", default="error")
    mode_from_proto(view, path)
    return Plan(t, z, c, region, layout, dtype, policy)


def mode_from_proto(view: view_pb2.View, path: str = "view") -> Mode:
    """Which kind of values the message asks for: ``numpy`` or ``arrow``."""
    return cast(Mode, _word(_MODES, view.mode, f"{path}.mode", default="numpy"))


def _write_index(message: view_pb2.AxisIndex, index: Index, axis: str) -> None:
    if isinstance(index, slice):
        # The sub-message must exist even where all three parts are absent.
        message.slice.SetInParent()
        for part in ("start", "stop", "step"):
            value = getattr(index, part)
            if value is not None:
                # Slices clip, so a bound beyond 64 bits means the same as the largest of 64 bits.
                setattr(message.slice, part, max(_INT64_MIN, min(value, _INT64_MAX)))
    elif isinstance(index, int):
        message.index = _int64(index, axis)
    elif index is not None:
        message.list.values.extend([_int64(item, axis) for item in index])
        message.list.SetInParent()


def _read_index(message: view_pb2.AxisIndex, axis: str, path: str) -> Index:
    form = message.WhichOneof("form")
    with _located(path):
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
    values = [_int64(value, region.kind) for value in region.values]
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
    with _located(path):
        if form == "roi":
            roi = message.roi
            return canonical_region(t=t, z=z, roi=(roi.x, roi.y, roi.w, roi.h))
        if form == "roi3d":
            box = message.roi3d
            return canonical_region(t=t, z=z, roi3d=(box.x, box.y, box.z, box.w, box.h, box.d))
        if form == "tile":
            return canonical_region(t=t, z=z, tile=(message.tile.tile_y, message.tile.tile_x))
        kind = _word(_ROI_ND, message.roi_nd.type, f"{path}.type", error=InvalidSelection)
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
            if not chosen or (min(chosen[0], chosen[-1]) >= 0 and max(chosen[0], chosen[-1]) < _INT64_MAX):
                return chosen
    raise InvalidSelection(f"{path} is not resolved: {index!r}", field=path, value=index)


# --- tilings ----------------------------------------------------------------------------------------------------------


def tiling_to_proto(tiling: Tiling) -> view_pb2.Tiling:
    """A tiling as a message.

    Raises:
        InvalidArgument: a size that does not fit in 64 bits, or a pad value that is not a double.
    """
    try:
        pad = float(tiling.pad)
    except (OverflowError, TypeError, ValueError):
        raise InvalidArgument(f"pad must be a number that fits a double: {tiling.pad!r}", field="pad", value=tiling.pad) from None
    message = view_pb2.Tiling(edge=_EDGES[tiling.edge], pad_value=pad)
    t, z, h, w = (_uint64(getattr(tiling, name), "tile_size") for name in "tzhw")
    if tiling.kind == "whole":
        message.whole.SetInParent()
    elif tiling.kind == "time_batches":
        message.time_batches.t = t
    elif tiling.kind == "tiles":
        message.tiles.h, message.tiles.w = h, w
    else:
        message.tiles_3d.z, message.tiles_3d.h, message.tiles_3d.w = z, h, w
    return message


def tiling_from_proto(message: view_pb2.Tiling, path: str = "tiling") -> Tiling:
    """The tiling of a message. (Where a request has none at all, use ``Tiling()``.)

    Raises:
        InvalidArgument: no cut, sizes that are not positive, an edge policy that does not fit the cut.
        NotSupported: windows.
    """
    cut = message.WhichOneof("cut")
    if cut is None:
        raise InvalidArgument(f"{path} has no cut: it needs one of whole, time_batches, tiles, tiles_3d, windows", field=path)
    edge = cast(Edge, _word(_EDGES, message.edge, f"{path}.edge", default="clip"))
    with _located(f"{path}.edge" if edge == "pad" and cut in ("whole", "time_batches") else f"{path}.{cut}"):
        if cut == "whole":
            return Tiling(edge=edge)
        if cut == "time_batches":
            return Tiling.time_batches(message.time_batches.t, edge)
        if cut == "tiles":
            return Tiling.tiles((message.tiles.h, message.tiles.w), edge, message.pad_value)
        if cut == "tiles_3d":
            box = message.tiles_3d
            return Tiling.tiles_3d((box.z, box.h, box.w), edge, message.pad_value)
    raise NotSupported("windows at listed origins are not supported by this server", field=f"{path}.windows")


# --- orders -----------------------------------------------------------------------------------------------------------


def order_to_proto(order: Order, *, start_slab: int = 0) -> view_pb2.Order:
    """An order as a message.

    Args:
        order: The order.
        start_slab: Slabs of the first delivered tile to skip (a resume inside a large tile).

    Raises:
        InvalidArgument: a shuffle without a seed (draw one: a read without a known seed could not be resumed), or a number that
            does not fit in 64 bits.
    """
    seed = check_seed(order.seed)
    if order.shuffle and seed is None:
        raise InvalidArgument("a shuffled order needs a seed on the wire", field="seed")
    return view_pb2.Order(
        shuffle=order.shuffle,
        seed=seed,
        shard_index=_uint64(order.shard_index, "shard_index"),
        shard_count=_uint64(order.shard_count, "shard_count"),
        start=_uint64(order.start, "start"),
        start_slab=_uint64(start_slab, "start_slab"),
    )


def order_from_proto(message: view_pb2.Order, path: str = "order") -> Order:
    """The order of a message; an empty message is all tiles in row-major order. ``start_slab`` is read from the message itself.

    Raises:
        InvalidArgument: a shuffle without a seed, or a shard that is not one of the shards.
        NotSupported: position spans.
    """
    if message.spans:
        raise NotSupported("position spans are not supported by this server", field=f"{path}.spans")
    seed = message.seed if message.HasField("seed") else None
    if message.shuffle and seed is None:
        raise InvalidArgument(f"{path}.seed is required with {path}.shuffle", field=f"{path}.seed")
    with _located(f"{path}.shard_index"):
        return Order(message.shuffle, seed, message.shard_index, message.shard_count or 1, message.start)


# --- what is not built yet --------------------------------------------------------------------------------------------

_UNCOMPRESSED = (tensor_service_pb2.COMPRESSION_UNSPECIFIED, tensor_service_pb2.COMPRESSION_NONE)
_UNCHECKED = (tensor_service_pb2.CHECKSUM_KIND_UNSPECIFIED, tensor_service_pb2.CHECKSUM_KIND_NONE)


def check_built(request: tensor_service_pb2.ReadTilesRequest) -> None:
    """Refuse what the contract names and this version does not do, in the fields that have no codec of their own.

    Raises:
        InvalidArgument: no key, or a compression or checksum the contract does not know.
        NotSupported: several keys, compression, a pyramid level, checksums.
    """
    if not request.keys:
        raise InvalidArgument("keys must name an image", field="keys")
    if len(request.keys) > 1:
        raise NotSupported(
            "reading several images at once is not supported by this server", field="keys", value=len(request.keys)
        )
    if request.compression not in _UNCOMPRESSED:
        name = _enum_name(tensor_service_pb2.Compression, request.compression, "compression")
        raise NotSupported(f"{name} is not supported by this server", field="compression", value=name)
    if request.pyramid_level:
        raise NotSupported("pyramid levels are not supported by this server", field="pyramid_level", value=request.pyramid_level)
    if request.checksum not in _UNCHECKED:
        name = _enum_name(tensor_service_pb2.ChecksumKind, request.checksum, "checksum")
        raise NotSupported(f"{name} is not supported by this server", field="checksum", value=name)


# --- leaves -----------------------------------------------------------------------------------------------------------


def _enum_name(enum: Any, value: int, path: str) -> str:
    """The name of an enum's value. Enums are open on the wire: any number arrives."""
    try:
        return str(enum.Name(value))
    except ValueError:
        raise InvalidArgument(f"{path} {value} is not a value of this contract", field=path, value=value) from None


def _word(
    table: Mapping[str, int],
    value: int,
    path: str,
    *,
    default: str | None = None,
    error: type[InvalidArgument] = InvalidArgument,
) -> str:
    """The domain's word for an enum's value; ``default`` for 0 (unspecified)."""
    if value == 0 and default is not None:
        return default
    for word, number in table.items():
        if number == value:
            return word
    raise error(f"{path} {value} is not one of: {', '.join(table)}", field=path, value=value)


@contextmanager
def _located(path: str) -> Iterator[None]:
    """Name the field's path in the message instead of the domain's argument."""
    try:
        yield
    except InvalidArgument as error:
        if error.field is not None and error.field.startswith(path):
            raise
        raise type(error)(error.message, field=path, value=error.value) from error


def _int64(value: int, name: str) -> int:
    if not _INT64_MIN <= value <= _INT64_MAX:
        raise InvalidSelection(f"{name} {value} does not fit in 64 bits", field=name, value=value)
    return value


def _uint64(value: int, name: str) -> int:
    if not 0 <= value <= _UINT64_MAX:
        raise InvalidArgument(f"{name} {value} does not fit in 64 bits", field=name, value=value)
    return value
