"""Datasets and images <-> messages."""

from __future__ import annotations

import datetime
from collections.abc import Mapping

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from ome_tensor.listing import DatasetInfo, DatasetState, ImageInfo, Level
from ome_tensor.record import Channel, ImageMeta
from ome_tensor.selection import ChunkGrid, Extent

from .v1 import image_pb2

__all__ = ["dataset_from_proto", "dataset_to_proto", "image_from_proto", "image_to_proto"]


_STATES: Mapping[DatasetState, image_pb2.DatasetState] = {
    DatasetState.LOADED: image_pb2.DATASET_STATE_LOADED,
    DatasetState.NOT_LOADED: image_pb2.DATASET_STATE_NOT_LOADED,
    DatasetState.LOADING: image_pb2.DATASET_STATE_LOADING,
    DatasetState.IN_PLACE: image_pb2.DATASET_STATE_IN_PLACE,
    DatasetState.FAILED: image_pb2.DATASET_STATE_FAILED,
}
_STATE_OF = {value: state for state, value in _STATES.items()}


def dataset_to_proto(info: DatasetInfo) -> image_pb2.Dataset:
    """A dataset as its message."""
    return image_pb2.Dataset(
        name=info.name,
        version=info.version,
        image_count=info.image_count,
        row_count=info.row_count,
        image_columns=info.image_columns,
        other_columns=[image_pb2.Column(name=name, arrow_type=arrow_type) for name, arrow_type in info.other_columns],
        resident_bytes=info.resident_bytes,
        source_name=info.source_name,
        state=_STATES[info.state],
        progress=info.progress if info.state is DatasetState.LOADING else 0,
        problem=info.problem,
        estimated_bytes=info.estimated_bytes,
        format=info.format,
    )


def dataset_from_proto(message: image_pb2.Dataset) -> DatasetInfo:
    """A dataset from its message."""
    return DatasetInfo(
        message.name,
        message.version,
        message.image_count,
        message.row_count,
        tuple(message.image_columns),
        tuple((column.name, column.arrow_type) for column in message.other_columns),
        message.resident_bytes,
        message.source_name,
        # A state that is not known here is a later server's; whatever it is, the dataset can be asked for.
        state := _STATE_OF.get(message.state, DatasetState.LOADED),
        message.progress if state is DatasetState.LOADING else float(state is DatasetState.LOADED),
        message.problem,
        message.estimated_bytes,
        message.format,
    )


def image_to_proto(info: ImageInfo) -> image_pb2.Image:
    """An image as its message. Stored times without a zone are taken as UTC."""
    message = image_pb2.Image(key=info.key, dataset=info.dataset, column=info.column, row=info.row, problem=info.problem)
    for level in info.levels:
        t, z, c, y, x = level.shape
        message.levels.add(size_t=t, size_z=z, size_c=c, size_y=y, size_x=x, is_stored=level.is_stored)
    meta = info.meta
    if meta is None:
        return message
    message.id, message.name, message.image_type = meta.id, meta.name, meta.image_type
    message.pixel_type, message.dtype = meta.pixel_type, str(meta.dtype)
    message.size_t, message.size_z, message.size_c, message.size_y, message.size_x = meta.extent
    message.nbytes = meta.nbytes
    if meta.acquired is not None:
        moment = meta.acquired
        message.acquisition_datetime.FromDatetime(moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC))
    for axis, value, unit in zip("zyx", meta.physical_size, meta.physical_unit, strict=True):
        if value is not None:
            getattr(message, f"physical_size_{axis}").CopyFrom(image_pb2.PhysicalSize(value=value, unit=unit))
    message.channels.extend(
        image_pb2.Channel(
            id=channel.id,
            name=channel.name,
            emission_um=channel.emission_um,
            excitation_um=channel.excitation_um,
            illumination=channel.illumination,
            color_rgba=channel.color_rgba,
        )
        for channel in meta.channels
    )
    if meta.grid is not None and min(meta.grid) > 0:
        grid = meta.grid
        message.chunk_grid.CopyFrom(image_pb2.ChunkGrid(t=grid.t, z=grid.z, c=grid.c, y=grid.y, x=grid.x))
    return message


def image_from_proto(message: image_pb2.Image) -> ImageInfo:
    """An image from its message; a wholly unreadable one has no metadata."""
    meta = None
    if message.dtype:
        sizes = [message.physical_size_z, message.physical_size_y, message.physical_size_x]
        known = [message.HasField(name) for name in ("physical_size_z", "physical_size_y", "physical_size_x")]
        grid = message.chunk_grid
        meta = ImageMeta(
            extent=Extent(message.size_t, message.size_z, message.size_c, message.size_y, message.size_x),
            dtype=np.dtype(message.dtype),
            pixel_type=message.pixel_type,
            id=message.id,
            name=message.name,
            image_type=message.image_type,
            acquired=_moment(message.acquisition_datetime) if message.HasField("acquisition_datetime") else None,
            physical_size=tuple(size.value if there else None for size, there in zip(sizes, known, strict=True)),  # type: ignore[arg-type]
            physical_unit=tuple(size.unit for size in sizes),  # type: ignore[arg-type]
            channels=tuple(_channel(channel) for channel in message.channels),
            grid=ChunkGrid(grid.y, grid.x, grid.z, grid.c, grid.t) if message.HasField("chunk_grid") else None,
        )
    levels = tuple(
        Level((level.size_t, level.size_z, level.size_c, level.size_y, level.size_x), level.is_stored) for level in message.levels
    )
    return ImageInfo(message.key, message.dataset, message.column, message.row, meta, message.problem, levels)


def _moment(stamp: Timestamp) -> datetime.datetime:
    return stamp.ToDatetime(tzinfo=datetime.UTC)


def _channel(message: image_pb2.Channel) -> Channel:
    return Channel(
        message.id,
        message.name,
        message.emission_um if message.HasField("emission_um") else None,
        message.excitation_um if message.HasField("excitation_um") else None,
        message.illumination,
        message.color_rgba if message.HasField("color_rgba") else None,
    )
