"""How a view is cut and ordered <-> messages: the part of :mod:`.codec` that is about tiles. Import it from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np

from ome_tensor.errors import InvalidArgument, InvalidSelection
from ome_tensor.tiling import Edge, Order, Tiling, check_seed

from .fields import located, uint64, word_of
from .v1 import view_pb2

__all__ = ["order_from_proto", "order_to_proto", "tiling_from_proto", "tiling_to_proto"]

_EDGES: Mapping[str, view_pb2.EdgePolicy] = {
    "clip": view_pb2.EDGE_POLICY_CLIP,
    "pad": view_pb2.EDGE_POLICY_PAD,
    "drop": view_pb2.EDGE_POLICY_DROP,
}


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
    t, z, h, w = (uint64(getattr(tiling, name), "tile_size") for name in "tzhw")
    if tiling.kind == "whole":
        message.whole.SetInParent()
    elif tiling.kind == "time_batches":
        message.time_batches.t = t
    elif tiling.kind == "tiles":
        message.tiles.h, message.tiles.w = h, w
    elif tiling.kind == "centred":
        message.centred.z, message.centred.h, message.centred.w = z, h, w
    elif tiling.kind == "tiles_3d":
        message.tiles_3d.z, message.tiles_3d.h, message.tiles_3d.w = z, h, w
    else:
        _write_windows(message.windows, tiling)
    return message


def tiling_from_proto(message: view_pb2.Tiling, path: str = "tiling") -> Tiling:
    """The tiling of a message. (Where a request has none at all, use ``Tiling()``.)

    Raises:
        InvalidArgument: no cut, sizes that are not positive, an edge policy that does not fit the cut.
        InvalidSelection: windows without an origin for each.
    """
    cut = message.WhichOneof("cut")
    if cut is None:
        raise InvalidArgument(
            f"{path} has no cut: it needs one of whole, time_batches, tiles, tiles_3d, windows, centred", field=path
        )
    edge = cast(Edge, word_of(_EDGES, message.edge, f"{path}.edge", default="clip"))
    misfit = (edge == "pad" and cut in ("whole", "time_batches")) or (edge == "drop" and cut == "windows")
    with located(f"{path}.edge" if misfit else f"{path}.{cut}"):
        if cut == "whole":
            return Tiling(edge=edge)
        if cut == "time_batches":
            return Tiling.time_batches(message.time_batches.t, edge)
        if cut == "tiles":
            return Tiling.tiles((message.tiles.h, message.tiles.w), edge, message.pad_value)
        if cut == "centred":
            window = message.centred
            size = (window.z, window.h, window.w) if window.z else (window.h, window.w)
            return Tiling.centred(size, edge, message.pad_value)
        if cut == "tiles_3d":
            box = message.tiles_3d
            return Tiling.tiles_3d((box.z, box.h, box.w), edge, message.pad_value)
        return _read_windows(message.windows, edge, message.pad_value, f"{path}.windows")


def _write_windows(message: view_pb2.WindowsCut, tiling: Tiling) -> None:
    assert tiling.origins is not None
    message.t, message.z, message.h, message.w = tiling.t, tiling.z, tiling.h, tiling.w
    array = tiling.origins.array
    if tiling.origins.images is not None:
        message.image.extend(tiling.origins.images.tolist())
    message.origin_y.extend(array[:, -2].tolist())
    message.origin_x.extend(array[:, -1].tolist())
    if not tiling.origins.planar:
        message.origin_t.extend(array[:, 0].tolist())
        message.origin_z.extend(array[:, 1].tolist())


def _read_windows(message: view_pb2.WindowsCut, edge: Edge, pad: float, path: str) -> Tiling:
    if (message.t == 0) != (message.z == 0):
        raise InvalidArgument(f"{path}.t and z must be both positive or both 0", value=(message.t, message.z))
    columns = {"y": message.origin_y, "x": message.origin_x}
    others = {"t": message.origin_t, "z": message.origin_z}
    if message.t:
        columns = others | columns
    elif message.origin_t or message.origin_z:
        raise InvalidSelection(f"{path} has t and z of origins and no t and z in a window", field=path)
    count = len(message.origin_y)
    if any(len(column) != count for column in columns.values()) or (message.image and len(message.image) != count):
        lengths = ", ".join(f"{len(column)} {axis}" for axis, column in columns.items())
        raise InvalidSelection(f"{path} must have one entry a window in each column, not {lengths}", field=path, value=lengths)
    origins = np.empty((count, len(columns)), np.int64)
    for place, column in enumerate(columns.values()):
        origins[:, place] = np.fromiter(column, np.int64, count)
    size = (message.t, message.z, message.h, message.w) if message.t else (message.h, message.w)
    # All of the first image is what no images at all mean, too.
    images = np.fromiter(message.image, np.uint64, len(message.image)) if message.image else None
    return Tiling.windows(origins, size, edge, pad, images if images is not None and images.any() else None)


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
    spans = [
        view_pb2.PositionSpan(first=uint64(first, "spans"), count=uint64(count, "spans"), stride=uint64(stride, "spans"))
        for first, count, stride in order.spans
    ]
    return view_pb2.Order(
        shuffle=order.shuffle,
        seed=seed,
        shard_index=uint64(order.shard_index, "shard_index"),
        shard_count=uint64(order.shard_count, "shard_count"),
        start=uint64(order.start, "start"),
        start_slab=uint64(start_slab, "start_slab"),
        spans=spans,
    )


def order_from_proto(message: view_pb2.Order, path: str = "order") -> Order:
    """The order of a message; an empty message is all tiles in row-major order. ``start_slab`` is read from the message itself.

    Raises:
        InvalidArgument: a shuffle without a seed, or a shard that is not one of the shards.
    """
    seed = message.seed if message.HasField("seed") else None
    if message.shuffle and seed is None:
        raise InvalidArgument(f"{path}.seed is required with {path}.shuffle", field=f"{path}.seed")
    spans = tuple((span.first, span.count, span.stride or 1) for span in message.spans)
    with located(f"{path}.spans" if spans else f"{path}.shard_index"):
        return Order(message.shuffle, seed, message.shard_index, message.shard_count or 1, message.start, spans)
