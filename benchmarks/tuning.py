"""What a message's size and each of gRPC's options is worth: the real server and the real client over TCP on one host, in turn.

Each way of setting them is a server (``ome-tensor serve``) and a client in processes of their own; in a round each is asked for the same before the
next round begins, and ratios are taken round by round. Every single read is compared with NumPy as it comes, tiles in a pass of their own that also
warms both sides. Options are changed where the processes start, by replacing ``_OPTIONS`` of the server and ``_CHANNEL_OPTIONS`` of the client:
nobody else's are touched. An option that is to be left out and is not there (any more) is an error: what is measured would be the same thing twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .peers.base import HERE, TILE, Data, Plane, Served, Shape, python_server
from .peers.client import ClientProcess, Task
from .peers.ours import OursReader
from .report import environment, number, print_table, write_json
from .wire import make_files, read, turns
from .wire_data import FULL, QUICK
from .wire_figures import Reading

__all__ = ["SHIPPED", "Options", "Row", "Variant", "changed", "main", "options", "run", "sizes"]

_KIB, _MIB = 1 << 10, 1 << 20

#: The server's default is among them: what the others are compared with.
_DEFAULT = _MIB
_SIZES = (128 * _KIB, 256 * _KIB, 512 * _KIB, _DEFAULT, 2 * _MIB, 4 * _MIB)

#: Images of the same number of pixels: tiles of three channels are 384 KiB, which smaller messages hold in slabs; of one channel they are 128 KiB,
#: so that a message of any size here holds whole ones.
_CHANNELS: tuple[tuple[Shape, Shape], ...] = ((FULL, QUICK), ((1, 48, 1, 2048, 2048), (1, 12, 1, 1024, 1024)))

#: Times that all tiles are read in a turn. Processor time is known to a hundredth of a second.
_REPEATS = 2

_LAUNCH = "--launch"

#: An option's name and its value; ``None`` to leave it out.
Options = Mapping[str, int | None]


@dataclass(frozen=True)
class Variant:
    """One way of setting things.

    Attributes:
        name: As in the table.
        server, client: gRPC options of each side that are changed.
        connect: Options for ``connect``.
        flags: For ``serve``.
    """

    name: str
    server: Options = field(default_factory=dict)
    client: Options = field(default_factory=dict)
    connect: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


SHIPPED = "as shipped"
_FRAMES: Options = {"grpc.http2.max_frame_size": None}
_CHUNKS: Options = {"grpc.experimental.tcp_read_chunk_size": None, "grpc.experimental.tcp_min_read_chunk_size": None}
_NO_PROBE: Options = {"grpc.http2.bdp_probe": 0, "grpc.http2.lookahead_bytes": 4 * _MIB}

_VARIANTS = (
    Variant(SHIPPED),
    Variant("without large HTTP/2 frames", server=_FRAMES, client=_FRAMES),
    Variant("without tcp_read_chunk_size", client=_CHUNKS),
    Variant("without SingleThreadedUnaryStream", client={"SingleThreadedUnaryStream": None}),
    # How far a side looks ahead is what it lets the other send: the client's matters, the server's is set for good measure.
    Variant("BDP probe off, lookahead 4 MiB", server=_NO_PROBE, client=_NO_PROBE),
    # Of the side that sends.
    Variant("write_buffer_size 4 MiB", server={"grpc.http2.write_buffer_size": 4 * _MIB}),
    Variant("reuse_memory=False", connect={"reuse_memory": False}),
)


@dataclass(frozen=True)
class Row:
    """A variant's figures: medians over rounds, and medians of each round's ratio to what it is compared with.

    Attributes:
        name: The variant.
        rate: GB/s of pixels in tiles.
        client_cost, server_cost: Processor seconds a GB.
        p50_ms: Of single reads; ``None`` where there were none.
        ratios: Of each of these, under its name.
    """

    name: str
    rate: float
    client_cost: float
    server_cost: float
    p50_ms: float | None
    ratios: Mapping[str, float]


def variants_here() -> list[Variant]:
    """Those that can be measured: an option that is not shipped with the installed grpcio cannot be left out of its own."""
    from ome_tensor_client import connection

    # Older releases are read without it: see ``_CHANNEL_OPTIONS``.
    shipped = dict(connection._CHANNEL_OPTIONS)
    return [
        variant
        for variant in _VARIANTS
        if "SingleThreadedUnaryStream" not in variant.client or "SingleThreadedUnaryStream" in shipped
    ]


def changed(shipped: Sequence[tuple[str, Any]], change: Options) -> tuple[tuple[str, Any], ...]:
    """gRPC options with some set anew or left out. Raises KeyError for one to leave out that is not there."""
    found = dict(shipped)
    for name, value in change.items():
        if value is None:
            del found[name]
        else:
            found[name] = value
    return tuple(found.items())


# -- processes ---------------------------------------------------------------------------------------------------------------------


def launch(change: Options, arguments: Sequence[str]) -> None:
    """The command line ``ome-tensor`` with the server's gRPC options changed: run in the server's process."""
    from ome_tensor_client import cli
    from ome_tensor_server import app

    app._OPTIONS = changed(app._OPTIONS, change)  # type: ignore[assignment]
    sys.argv = ["ome-tensor", *arguments]
    cli.main()


@dataclass
class TunedReader(OursReader):
    """The client of a variant.

    Attributes:
        change: gRPC options that are changed, in the process that opens it.
    """

    change: Options = field(default_factory=dict)

    def open(self) -> None:
        from ome_tensor_client import connection

        connection._CHANNEL_OPTIONS = changed(connection._CHANNEL_OPTIONS, self.change)  # type: ignore[assignment]
        super().open()


@dataclass(frozen=True)
class Running:
    """A variant, its server and its client."""

    variant: Variant
    served: Served
    client: ClientProcess


@contextmanager
def serving(variant: Variant, data: Data) -> Iterator[Served]:
    """A variant's server, and the reader that its client is to be."""
    command = ["-m", "benchmarks.tuning", _LAUNCH, json.dumps(dict(variant.server)), "serve", str(data.parquet)]
    # All servers map one copy of the image.
    command += ["--listen", "127.0.0.1:0", "--log-level", "error", "--store", str(data.folder / "ome-tensor-store")]
    with python_server([*command, *variant.flags], HERE) as (target, pid):
        yield Served(TunedReader(target, {"transport": "tcp", **variant.connect}, variant.client), (pid,))


@contextmanager
def started(variants: Sequence[Variant], data: Data) -> Iterator[list[Running]]:
    """Every variant, connected, its tiles compared with NumPy and both sides warm."""
    with ExitStack() as stack:
        running = []
        for variant in variants:
            served = stack.enter_context(serving(variant, data))
            running.append(Running(variant, served, stack.enter_context(ClientProcess(served.reader, data))))
        for one in running:
            one.client.run(Task("tiles", check=True))
        yield running


# -- measurements ------------------------------------------------------------------------------------------------------------------


def _tiles(one: Running) -> Reading:
    """All tiles, some times over."""
    found = [read(one.served, [one.client], Task("tiles")) for _ in range(_REPEATS)]
    return Reading(
        sum(reading.nbytes for reading in found),
        sum(reading.seconds for reading in found),
        sum(reading.client_cpu for reading in found),
        sum(reading.server_cpu for reading in found),
    )


def _planes(shape: Shape, count: int, seed: int) -> list[Plane]:
    """Places of single reads."""
    rng = np.random.default_rng(seed)
    _, nz, nc, ny, nx = shape
    ends = (nz, nc, ny - TILE + 1, nx - TILE + 1)
    return [tuple(int(rng.integers(end)) for end in ends) for _ in range(count)]  # type: ignore[misc]


def measure(
    variants: Sequence[Variant], data: Data, *, rounds: int, planes: int, base: str, tell: Callable[[str], None]
) -> list[Row]:
    """Every variant in turn.

    Args:
        variants: What to compare.
        data: The image.
        rounds: Rounds.
        planes: Single reads of a variant in a round; 0 for none.
        base: Name of the variant that the others are compared with.
        tell: Told of what comes next.
    """
    tiles: dict[str, list[Reading]] = {variant.name: [] for variant in variants}
    singles: dict[str, list[Reading]] = {variant.name: [] for variant in variants}
    with started(variants, data) as running:
        for turn, one in turns(running, rounds):
            name = one.variant.name
            tell(f"{name}, round {turn + 1} of {rounds}")
            tiles[name].append(_tiles(one))
            if planes:
                # The same for everybody in a round.
                singles[name].append(read(one.served, [one.client], Task("planes", _planes(data.shape, planes, turn))))
    return [_row(variant.name, base, tiles, singles) for variant in variants]


def _row(name: str, base: str, tiles: Mapping[str, list[Reading]], singles: Mapping[str, list[Reading]]) -> Row:
    measures: dict[str, tuple[Callable[[Reading], float], Mapping[str, list[Reading]]]] = {
        "rate": (lambda reading: reading.rate, tiles),
        "client_cost": (lambda reading: reading.client_cost, tiles),
        "server_cost": (lambda reading: reading.server_cost, tiles),
        "p50_ms": (lambda reading: reading.percentile(0.5), singles),
    }
    values: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for what, (of, readings) in measures.items():
        if readings[name]:
            values[what] = median(map(of, readings[name]))
            # Of a small image a side's processor time may be less than a hundredth of a second.
            pairs = [(of(a), of(b)) for a, b in zip(readings[name], readings[base], strict=True)]
            ratios[what] = median([a / b for a, b in pairs if b] or [float("nan")])
    return Row(name, values["rate"], values["client_cost"], values["server_cost"], values.get("p50_ms"), ratios)


def sizes(*, quick: bool, rounds: int, tell: Callable[[str], None]) -> dict[str, list[Row]]:
    """Message sizes, by what a tile is: server and client agree on one, as a server's ``--batch-bytes`` and a client's ``message_bytes``."""
    variants = [
        Variant(_bytes(size), flags=("--batch-bytes", str(size)), connect={"message_bytes": size})
        for size in (_SIZES[1:4:2] if quick else _SIZES)
    ]
    found = {}
    for full, small in _CHANNELS:
        shape = small if quick else full
        tile = f"tiles of {shape[2]} channel{'s' * (shape[2] != 1)}, {_bytes(shape[2] * TILE**2 * 2)}"
        with tempfile.TemporaryDirectory() as folder:
            data = make_files(Path(folder, "noise"), shape, "noise", zarr=False)
            found[tile] = measure(
                variants,
                data,
                rounds=rounds,
                planes=0,
                base=_bytes(_DEFAULT),
                tell=lambda what, tile=tile: tell(f"{tile}: {what}"),  # type: ignore[misc]
            )
    return found


def _bytes(size: int) -> str:
    return f"{size // _MIB} MiB" if size >= _MIB else f"{size // _KIB} KiB"


def options(*, quick: bool, rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Options of gRPC and of the client, at the default message size."""
    with tempfile.TemporaryDirectory() as folder:
        data = make_files(Path(folder, "noise"), QUICK if quick else FULL, "noise", zarr=False)
        # Whether it works, two show as well as seven.
        variants = variants_here()[:2] if quick else variants_here()
        return measure(variants, data, rounds=rounds, planes=10 if quick else 200, base=SHIPPED, tell=tell)


def run(
    *, quick: bool = False, rounds: int | None = None, tell: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, list[Row]], list[Row]]:
    """Measure everything: message sizes, then options."""
    rounds = rounds or (1 if quick else 7)
    return sizes(quick=quick, rounds=rounds, tell=tell), options(quick=quick, rounds=rounds, tell=tell)


def show(by_size: Mapping[str, Sequence[Row]], by_option: Sequence[Row]) -> None:
    """Print the tables."""
    print_table(
        f"Message sizes; x: to {_bytes(_DEFAULT)}; " + ", ".join(f"{name} {what}" for name, what in environment().items()),
        ("what", "messages of", "GB/s", "x", "client s/GB", "x", "server s/GB", "x"),
        [(tile, row.name, *_figures(row)) for tile, rows in by_size.items() for row in rows],
    )
    print_table(
        f"Options, messages of {_bytes(_DEFAULT)}; x: to {SHIPPED}; p50: single 256² reads",
        ("options", "GB/s", "x", "client s/GB", "x", "server s/GB", "x", "p50 ms", "x"),
        [(row.name, *_figures(row)) for row in by_option],
    )


def _figures(row: Row) -> list[str]:
    figures = {name: getattr(row, name) for name in ("rate", "client_cost", "server_cost", "p50_ms")}
    return [number(figure) for name, value in figures.items() if value is not None for figure in (value, row.ratios[name])]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small image and one round: shows that it works, not what anything is worth"
    )
    parser.add_argument("--rounds", type=int, help="rounds that medians are taken over (7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    by_size, by_option = run(quick=options.quick, rounds=options.rounds, tell=lambda what: print(what, file=sys.stderr))
    show(by_size, by_option)
    if options.json:
        sizes = {tile: [asdict(row) for row in rows] for tile, rows in by_size.items()}
        write_json(options.json, "tuning", {"sizes": sizes, "options": [asdict(row) for row in by_option]})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == [_LAUNCH]:
        launch(json.loads(sys.argv[2]), sys.argv[3:])
    else:
        raise SystemExit(main())
