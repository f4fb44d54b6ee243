"""Coverage-guided fuzzing with atheris (https://github.com/google/atheris): ``python -m tests.unit.fuzz_codecs messages -max_total_time=600``.

Two targets. ``messages``: what a client reads from a server that it does not trust, and what a server decodes of a request; whatever comes, there
may be no other exception than this project's. ``readers``: what a server's reading process does with a file's bytes; that process names any
exception (:mod:`ome_tensor_server.loader`), so what is looked for is what it could not: crashes, hangs, memory. Arguments behind the target are
libFuzzer's. (`tests.unit.fuzz_readers` damages good files instead, in processes of their own.)
"""

from __future__ import annotations

import atexit
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import pyarrow as pa

with atheris.instrument_imports(include=["ome_tensor", "ome_tensor_proto", "ome_tensor_server"]):
    from ome_tensor.errors import OmeTensorError
    from ome_tensor_proto import codec, filters, reader
    from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from google.protobuf.message import DecodeError

__all__ = ["TARGETS"]


def _messages(data: bytes) -> None:
    """As a stream of messages, and as a request."""
    if not data:
        return
    kind, rest = data[0] % 3, data[1:]
    try:
        if kind == 0:
            found = reader.BatchReader()
            # A byte that says where each message ends.
            for part in rest.split(b"\xf5\xf5"):
                found.feed(bytes(part))
            found.finish()
        elif kind == 1:
            request = pb.ReadTilesRequest.FromString(rest)
            codec.check_images_named(request)
            codec.plan_from_proto(request.view)
            codec.tiling_from_proto(request.tiling)
            codec.order_from_proto(request.order)
            codec.compression_from_proto(request.compression)
            codec.wants_checksum(request)
        else:
            filters.filters_from_proto(pb.SelectImagesRequest.FromString(rest).filter)
    except (OmeTensorError, DecodeError):
        return


def _readers(data: bytes) -> None:
    """As a file, of whatever kind it says; but for Parquet, at which Arrow itself ends the process (``tests.unit.fuzz_readers`` has those)."""
    if data.startswith(b"PAR1"):
        return
    from ome_tensor_server.readers.detect import open_source

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        try:
            with open_source(str(path)) as source:
                source.info()
                source.write(io.BytesIO(), lambda _: None)
        except Exception as error:
            _unnamed[type(error).__name__] += not isinstance(error, (OmeTensorError, OSError, pa.ArrowException))


#: Exceptions of the readers that are not this project's, by class: no fault, and worth a look.
_unnamed: Counter[str] = Counter()

TARGETS: dict[str, Callable[[bytes], None]] = {"messages": _messages, "readers": _readers}


def seeds(target: str, folder: Path) -> None:
    """Good inputs to begin with."""
    from tests.integration.images import random_pixels, write_image

    from ome_tensor_server.testing import running_server

    path = write_image(folder / "image.parquet", random_pixels((1, 1, 2, 9, 8)))
    if target == "readers":
        import numpy as np
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        with pa.ipc.new_file(folder / "image.arrow", table.schema) as writer:
            writer.write_table(table)
        np.save(folder / "image.npy", random_pixels((3, 4)))
        path.unlink()
        return
    import grpc

    with running_server([path]) as server, grpc.insecure_channel(server.target) as channel:
        request = pb.ReadTilesRequest(keys=["image"]).SerializeToString()
        call: Any = channel.unary_stream("/ome_tensor_proto.v1.TensorService/ReadTiles")(request)
        (folder / "stream").write_bytes(b"\0" + b"\xf5\xf5".join(call))
    (folder / "request").write_bytes(b"\1" + request)
    path.unlink()


def main() -> None:
    """Fuzz until libFuzzer has enough."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"name a target: {' or '.join(TARGETS)}")
    target = sys.argv.pop(1)
    folder = tempfile.mkdtemp(prefix="fuzz-")
    seeds(target, Path(folder))
    atexit.register(lambda: print("other exceptions:", dict(+_unnamed), file=sys.stderr))
    atheris.Setup([sys.argv[0], *sys.argv[1:], folder], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
