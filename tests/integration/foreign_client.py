"""Another client: what anybody can write who knows the server's address, with none of this project's code.

Takes the contract from the server's own reflection, reads tiles, and saves what they hold. Run as a script:
``foreign_client.py TARGET KEY TILE_H TILE_W FILE.npz``.
"""

from __future__ import annotations

import sys

import grpc
import numpy as np
import pyarrow as pa
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def main(target: str, key: str, height: str, width: str, file: str) -> None:
    """Read the tiles of an image."""
    with grpc.insecure_channel(target) as channel:
        reflected = ProtoReflectionDescriptorDatabase(channel)
        assert "ome_tensor_proto.v1.TensorService" in reflected.get_services()
        service = DescriptorPool(reflected).FindServiceByName("ome_tensor_proto.v1.TensorService")
        method = service.FindMethodByName("ReadTiles")
        request = GetMessageClass(method.input_type)(keys=[key])
        request.tiling.tiles.h, request.tiling.tiles.w = int(height), int(width)
        read = channel.unary_stream(
            f"/{service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        messages = list(read(request, timeout=30))
    payloads = b"".join(message.payload for message in messages)
    with pa.ipc.open_stream(payloads) as stream:
        table = stream.read_all()
    assert len(table) == messages[0].header.tile_count
    pixels = np.concatenate([chunk.to_numpy_ndarray() for chunk in table["pixels"].chunks])
    np.savez(file, pixels=pixels, y=table["y"].to_numpy(), x=table["x"].to_numpy())
    # What this proves: nothing of the project was needed.
    assert not [name for name in sys.modules if name.startswith("ome_tensor")]


if __name__ == "__main__":
    main(*sys.argv[1:])
