"""What a container costs: ``python -m benchmarks.containers`` (after ``make image``), with a Docker engine.

One image of 402 MB is read whole, in tiles of 256 x 256, by the same program: outside, from a server outside; inside, from a server in a container,
by a process in that container, in another one on the same network, and from outside through the published port. By TCP and mapped. Places take
turns, so that a machine whose speed drifts does so under all of them. What is compared is the median of the rounds.

Without checksums, which a client asks for by itself wherever the server's address is not this host's, as between containers.

The versions of Python and of packages are printed: outside they are this environment's, inside the image's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .data import FULL, QUICK, byte_chunks, make_image, write_parquet
from .processes import serving
from .report import number, print_table, yes_no

#: Reads the image so many times and prints the seconds of each; the first time is for caches and is not counted.
_READ = """
import json, platform, sys, time
from importlib.metadata import version
from ome_tensor_client import connect
target, transport, store, rounds = sys.argv[1:5]
seconds = []
with connect(target, transport=transport, store=store, timeout=120, checksum=False) as client:
    view = client.tensor_view("image")
    for turn in range(int(rounds) + 1):
        began, nbytes = time.perf_counter(), 0
        for tile in view.iter_tiles(tile_size=(1, 256, 256), prefetch=4):
            nbytes += tile.array.nbytes
        seconds.append(time.perf_counter() - began)
print(json.dumps({"gb_s": [nbytes / one / 1e9 for one in seconds[1:]], "nbytes": nbytes, "transport": client.transport,
                  "python": platform.python_version(), "grpcio": version("grpcio"), "pyarrow": version("pyarrow")}))
"""

#: Reads of the whole image in each turn.
_READS = 3


@contextmanager
def _contained(image: str, folder: Path) -> Iterator[tuple[Any, Any, str, str]]:
    """A server in a container, a second container beside it, and how the server is reached from there and from outside."""
    import docker

    with ExitStack() as stack:
        engine = docker.from_env(timeout=600)
        stack.callback(engine.close)
        network = engine.networks.create("ome-tensor-benchmark")
        stack.callback(network.remove)
        volume = engine.volumes.create()
        stack.callback(volume.remove, force=True)
        options: dict[str, Any] = {"detach": True, "read_only": True, "tmpfs": {"/tmp": ""}, "network": network.name}
        server = engine.containers.run(
            image,
            name="ome-tensor-benchmark-server",
            environment={"OME_TENSOR_INSECURE": "true", "OME_TENSOR_LOG_LEVEL": "error", "OME_TENSOR_PRELOAD": "true"},
            ports={"50051/tcp": ("127.0.0.1", None)},
            volumes={str(folder): {"bind": "/data", "mode": "ro"}, volume.name: {"bind": "/var/lib/ome-tensor", "mode": "rw"}},
            **options,
        )
        stack.callback(server.remove, force=True, v=True)
        other = engine.containers.run(
            image,
            ["infinity"],
            entrypoint=["sleep"],
            name="ome-tensor-benchmark-client",
            volumes={volume.name: {"bind": "/shared", "mode": "ro"}},
            **options,
        )
        stack.callback(other.remove, force=True, v=True)
        while (health := _health(server)) != "healthy":
            if health == "unhealthy":
                raise RuntimeError(server.logs().decode())
            time.sleep(0.2)
        (binding,) = server.ports["50051/tcp"]
        yield server, other, f"{server.name}:50051", f"127.0.0.1:{binding['HostPort']}"


def _health(container: Any) -> str:
    container.reload()
    return str(container.attrs["State"]["Health"]["Status"])


def _outside(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", _READ, *arguments], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _inside(container: Any, *arguments: str) -> dict[str, Any]:
    status, output = container.exec_run(["python", "-c", _READ, *arguments])
    if status:
        raise RuntimeError(output.decode())
    found: dict[str, Any] = json.loads(output)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.containers", description=__doc__)
    parser.add_argument("--image", default="ome-tensor")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small image, one round: shows that it works")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        # Of each server its own: what is beside the file is the outer one's store.
        folders = [Path(name) / part for part in ("inside", "outside")]
        for folder in folders:
            folder.mkdir(mode=0o755)
        write_parquet(byte_chunks(make_image(QUICK if options.quick else FULL), (1, 512, 512)), folders[0] / "image.ome.parquet")
        os.link(folders[0] / "image.ome.parquet", folders[1] / "image.ome.parquet")
        outside = stack.enter_context(serving(folders[1] / "image.ome.parquet"))
        server, other, near, published = stack.enter_context(_contained(options.image, folders[0]))
        reads = str(_READS)
        places: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
            ("TCP", "outside"): lambda: _outside(outside.target, "tcp", "", reads),
            ("TCP", "in the server's container"): lambda: _inside(server, "127.0.0.1:50051", "tcp", "", reads),
            ("TCP", "between two containers"): lambda: _inside(other, near, "tcp", "", reads),
            ("TCP", "from outside, by the published port"): lambda: _outside(published, "tcp", "", reads),
            ("mapped", "outside"): lambda: _outside(outside.target, "mapped", "", reads),
            ("mapped", "in the server's container"): lambda: _inside(server, "127.0.0.1:50051", "mapped", "", reads),
            ("mapped", "between two containers"): lambda: _inside(other, near, "mapped", "/shared/store", reads),
        }
        figures: dict[tuple[str, str], list[float]] = {place: [] for place in places}
        made: dict[tuple[str, str], dict[str, Any]] = {}
        for _ in range(rounds):
            for place, read in places.items():
                made[place] = read()
                figures[place].append(statistics.median(made[place]["gb_s"]))
        assert len({one["nbytes"] for one in made.values()}) == 1
        assert all(one["transport"] == place[0].lower() for place, one in made.items())
    rows = []
    for (transport, place), values in figures.items():
        base = figures[transport, "outside"]
        # Turn by turn: what drifts between turns is in both.
        ratio = statistics.median(value / other for value, other in zip(values, base, strict=True))
        bar = "0.95x" if place != "outside" and "published" not in place else ""
        rows.append(
            (transport, place, number(statistics.median(values)), f"{ratio:.2f}x", bar, yes_no(ratio >= 0.95 if bar else None))
        )
    print_table(
        f"reading {made['TCP', 'outside']['nbytes'] / 1e6:.0f} MB in tiles of 256 x 256",
        ("", "where", "GB/s", "to outside", "bar", "met"),
        rows,
    )
    for name, one in (("outside", made["TCP", "outside"]), ("inside", made["TCP", "in the server's container"])):
        print(f"{name}: Python {one['python']}, grpcio {one['grpcio']}, pyarrow {one['pyarrow']}")


if __name__ == "__main__":
    main()
