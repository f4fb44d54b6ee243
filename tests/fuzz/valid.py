"""What there is to ask for, and valid requests for it: the seeds of those that are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from ome_tensor_proto.host import host_proof
from ome_tensor_proto.methods import ADMIN_METHODS, METHODS, Method, methods_of
from ome_tensor_proto.v1 import admin_service_pb2 as admin_pb
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_proto.v1 import view_pb2

__all__ = ["HEALTH", "REFLECTION", "Names", "changes", "reads"]

#: Both services that come with gRPC. Reflection's only method takes a stream and gives one.
HEALTH: Mapping[str, Method] = methods_of(cast(Any, health_pb2.DESCRIPTOR.services_by_name["Health"]))
REFLECTION = Method(
    name="ServerReflectionInfo",
    path="/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    request=reflection_pb2.ServerReflectionRequest,
    response=reflection_pb2.ServerReflectionResponse,
    streaming=True,
    takes_stream=True,
)


@dataclass(frozen=True, slots=True)
class Names:
    """What a server has that requests can be about.

    Attributes:
        read: Datasets that are read.
        changed: Datasets that may be changed and removed; none that has to stay as it is.
        columns: Columns of tables.
        paths: What may be registered.
        upload: A whole upload, as an Arrow IPC stream; empty: none is ever right.
    """

    read: tuple[str, ...] = ()
    changed: tuple[str, ...] = ("fuzz-1",)
    columns: tuple[str, ...] = ("image",)
    paths: tuple[str, ...] = ()
    upload: bytes = b""

    def words(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Texts that make sense, by the names of fields."""
        keys = tuple(f"{name}{end}" for name in names for end in ("", "/0", "/1", "/image/0", "/DNA/3", "/DNA_labels/2"))
        return {
            "name": tuple(names),
            "dataset": tuple(names),
            "keys": keys,
            "key": keys,
            "column": self.columns,
            "metadata_columns": self.columns,
            "beside": self.columns,
            "path": self.paths,
            "layout": ("TZCHW", "CHW", "HW", "YX", "TZCYX", "WHCZT", "HHW", "tzchw", "Q"),
            "dtype": (
                "uint8",
                "uint16",
                "float32",
                "float64",
                "int8",
                "bool",
                "complex64",
                "object",
                "<u2",
                "S5",
                "datetime64[s]",
                "f2",
            ),
            "page_token": ("0", "1", "-1", "0:0", ":", "00000000000000000000", "7"),
            "string_value": ("A1", "A2", "B"),
            "service": ("", "ome_tensor_proto.v1.TensorService", "ome_tensor_proto.v1.AdminService", "grpc.health.v1.Health"),
            "file_by_filename": ("ome_tensor_proto/v1/view.proto", "google/protobuf/timestamp.proto", "x.proto"),
            "file_containing_symbol": (
                "ome_tensor_proto.v1.View",
                "ome_tensor_proto.v1.View.layout",
                "google.protobuf.Any",
                ".a..b",
            ),
            "containing_type": ("ome_tensor_proto.v1.View", "google.protobuf.FieldOptions", "google.protobuf.MessageOptions"),
            "all_extension_numbers_of_type": ("ome_tensor_proto.v1.View", "google.protobuf.FieldOptions", "nothing"),
            # Of fields that are not named here.
            "": (*names, *self.columns)[:6],
        }


def reads(names: Names) -> dict[str, list[Message]]:
    """Valid requests by path, of methods that change nothing."""
    first = names.read[0] if names.read else "nothing"
    table = names.read[-1] if names.read else "nothing"
    column = names.columns[0]
    views = [
        view_pb2.View(),
        view_pb2.View(t=view_pb2.AxisIndex(index=-1), z=view_pb2.AxisIndex(index=0), layout="CHW", dtype="float32"),
        view_pb2.View(
            z=view_pb2.AxisIndex(slice=view_pb2.IndexSlice(start=0, stop=2, step=1)),
            c=view_pb2.AxisIndex(list=view_pb2.IndexList(values=[0, 0])),
            region=view_pb2.Region(roi=view_pb2.Roi(x=1, y=2, w=30, h=20)),
        ),
        view_pb2.View(
            region=view_pb2.Region(roi_nd=view_pb2.RoiNd(type=view_pb2.ROI_ND_TYPE_4D, bounds=[0, 0, 0, 0, 1, 1, 9, 9]))
        ),
        view_pb2.View(region=view_pb2.Region(roi3d=view_pb2.Roi3d(w=9, h=9, d=1))),
        view_pb2.View(mode=view_pb2.VIEW_MODE_ARROW, region=view_pb2.Region(tile=view_pb2.GridTile())),
    ]
    cuts = [
        view_pb2.Tiling(whole=view_pb2.WholeCut()),
        view_pb2.Tiling(tiles=view_pb2.TilesCut(h=16, w=24), edge=view_pb2.EDGE_POLICY_PAD, pad_value=3),
        view_pb2.Tiling(tiles_3d=view_pb2.Tiles3dCut(z=2, h=20, w=20)),
        view_pb2.Tiling(time_batches=view_pb2.TimeBatchesCut(t=1)),
        view_pb2.Tiling(windows=view_pb2.WindowsCut(t=1, z=1, h=8, w=8, origin_t=[0], origin_z=[1], origin_y=[3], origin_x=[4])),
        view_pb2.Tiling(windows=view_pb2.WindowsCut(h=8, w=8, origin_y=[0, 1], origin_x=[2, 3]), edge=view_pb2.EDGE_POLICY_PAD),
        view_pb2.Tiling(centred=view_pb2.CentredCut(h=8, w=8), edge=view_pb2.EDGE_POLICY_PAD),
    ]
    orders = [
        view_pb2.Order(),
        view_pb2.Order(shuffle=True, seed=7, shard_index=1, shard_count=2),
        view_pb2.Order(spans=[view_pb2.PositionSpan(first=0, count=1, stride=2)], start=1),
    ]
    condition = pb.Predicate(column=names.columns[-1], comparison=pb.COMPARISON_GREATER, values=[pb.FilterValue(double_value=3)])
    listed = pb.Predicate(column=names.columns[-1], comparison=pb.COMPARISON_IN, values=[pb.FilterValue(int_value=3)])
    where = pb.RowFilter(any_of=[pb.Conjunction(all_of=[condition]), pb.Conjunction(all_of=[listed, condition])])
    rows = pb.ImageRows(dataset=table, column=column, rows=[0, 2, 2, 4])
    read: list[Message] = [
        pb.ReadTilesRequest(keys=[first], view=view, tiling=cut, order=order)
        for view in views
        for cut in cuts
        for order in orders
    ]
    read += [
        pb.ReadTilesRequest(image_rows=rows, tiling=cut, order=order, beside=list(names.columns[1:2]), tiles_per_batch=number)
        for number, cut in enumerate(cuts)
        for order in orders
    ]
    read += [pb.ReadTilesRequest(keys=[name], pyramid_level=1, compression=pb.COMPRESSION_ZSTD) for name in names.read]
    resolve: list[Message] = [
        pb.ResolveViewRequest(key=f"{first}/0", view=view, tiling=cut, order=order)
        for view in views
        for cut in cuts
        for order in orders
    ]
    select: list[Message] = [
        pb.SelectImagesRequest(dataset=table, column=column, filter=where, all_metadata=True),
        pb.SelectImagesRequest(dataset=table, whole_table=True, metadata_columns=names.columns[-2:]),
        pb.SelectImagesRequest(dataset=first),
    ]
    images: list[Message] = [
        pb.ListImagesRequest(dataset=name, page_size=2, column=column, filter=where) for name in (*names.read, "nothing")
    ]
    nonce = bytes(range(32))
    maps: list[Message] = [
        pb.MapDatasetRequest(dataset=name, nonce=nonce, host_proof=host_proof("client", nonce)) for name in names.read
    ]
    health: list[Message] = [health_pb2.HealthCheckRequest(), health_pb2.HealthCheckRequest(service="nothing")]
    reflection: list[Message] = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="ome_tensor_proto.v1.TensorService"),
        reflection_pb2.ServerReflectionRequest(
            file_containing_extension=reflection_pb2.ExtensionRequest(
                containing_type="google.protobuf.FieldOptions", extension_number=1
            )
        ),
    ]
    by_name: dict[str, list[Message]] = {
        "ReadTiles": read,
        "ResolveView": resolve,
        "SelectImages": select,
        "ListImages": images,
        "MapDataset": maps,
        "GetDataset": [pb.GetDatasetRequest(name=name) for name in names.read],
        "ListDatasets": [pb.ListDatasetsRequest(page_size=1, page_token="1")],
    }
    return {METHODS[name].path: seeds for name, seeds in by_name.items()} | {
        **{method.path: health for method in HEALTH.values() if method.request is health_pb2.HealthCheckRequest},
        REFLECTION.path: reflection,
    }


def changes(names: Names) -> dict[str, list[Message]]:
    """Valid requests by path, of methods that change datasets."""
    made: dict[str, list[Message]] = {
        method.path: [method.request(name=name) for name in names.changed]
        for method in ADMIN_METHODS.values()
        if "name" in method.request.DESCRIPTOR.fields_by_name
    }
    made[ADMIN_METHODS["RegisterDataset"].path] = [admin_pb.RegisterDatasetRequest(path=path) for path in names.paths]
    made[ADMIN_METHODS["UploadDataset"].path] = [
        admin_pb.UploadDatasetRequest(header=admin_pb.UploadHeader(name=name, replace=True), payload=names.upload)
        for name in names.changed
    ]
    return made
