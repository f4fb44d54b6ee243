"""Ours and its peers on the wire, in one run and in turn: raw TCP, Arrow Flight, Zarr over nginx by two readers, tiled; and upstream without a wire.

Each peer's server and client are processes of their own, so that processor time and memory are each side's alone. A round asks every peer for the
same before the next begins; ratios are taken round by round. Every result is compared with NumPy: single reads as they come, tiles and windows in a
pass of their own over the very requests that are timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import wire_data
from .peers import peers
from .peers.base import CHANNELS, TILE, WINDOW, Data, Peer, Served, Shape
from .peers.client import ClientProcess, Task
from .processes import MemoryWatch, cpu_seconds, family, private_bytes
from .report import environment, write_json
from .wire_figures import Figures, Reading, judge, show_checks, show_links, show_peers

__all__ = ["Plan", "main", "read", "run", "turns"]

_CLIENTS = 4
#: Below this share a peer is given single tiles, not whole depths.
_LEAST_DEPTH = 0.05


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
        shape: The image's.
        rounds: Rounds.
        planes, windows: Single reads and windows a round.
        only: Parts of the names of the peers to run; empty for all.
    """

    shape: Shape
    rounds: int
    planes: int
    windows: int
    only: tuple[str, ...] = ()

    def wants(self, peer: Peer) -> bool:
        """Whether a peer is to run."""
        return not self.only or any(part.lower() in peer.name.lower() for part in self.only)


@dataclass(frozen=True)
class Running:
    """A peer, its server and its client."""

    peer: Peer
    served: Served
    client: ClientProcess


def make_files(folder: Path, shape: Shape, kind: str, zarr: bool) -> Data:
    """The image's files, made in a process whose memory is gone when anything is measured."""
    work: Callable[..., Any] = wire_data.make
    process = multiprocessing.get_context("spawn").Process(target=work, args=(folder, shape), kwargs={"kind": kind, "zarr": zarr})
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the image's files could not be made (exit status {process.exitcode})")
    return Data(folder, shape)


@contextmanager
def started(names: Sequence[Peer], data: Data, figures: Figures) -> Iterator[list[Running]]:
    """Every peer that can run here, in its processes; the others are noted as skipped."""
    with ExitStack() as stack:
        found = []
        for peer in names:
            if why := peer.missing():
                figures.skipped[peer.name] = why
                continue
            served = stack.enter_context(peer.serve(data))
            found.append(Running(peer, served, stack.enter_context(ClientProcess(served.reader, data))))
            if peer.note:
                figures.notes[peer.name] = peer.note
        yield found


def turns(running: Sequence[Any], rounds: int) -> Iterator[tuple[int, Any]]:
    """Everybody in turn, each round beginning with another: nobody is always first after a pause."""
    for turn in range(rounds):
        first = turn % max(1, len(running))
        for one in (*running[first:], *running[:first]):
            yield turn, one


def read(served: Served, clients: Sequence[ClientProcess], task: Task) -> Reading:
    """One task by one client, or by several at once; what it cost both sides."""
    pids = family(*served.pids)
    before = sum(map(cpu_seconds, pids))
    for client in clients:
        client.begin(task)
    samples = [client.finish() for client in clients]
    return Reading(
        sum(sample.nbytes for sample in samples),
        max(sample.end for sample in samples) - min(sample.start for sample in samples),
        sum(sample.cpu for sample in samples),
        sum(map(cpu_seconds, pids)) - before,
        tuple(1e3 * seconds for sample in samples for seconds in sample.latencies),
    )


class _Requests:
    """The tasks of one run: the same for everybody, or the first part of the same."""

    def __init__(self, plan: Plan, seed: int = 11) -> None:
        rng = np.random.default_rng(seed)
        _, nz, nc, ny, nx = plan.shape

        def draw(count: int, *ends: int) -> list[tuple[int, ...]]:
            return [tuple(int(rng.integers(end)) for end in ends) for _ in range(count)]

        self._plan = plan
        self._planes = draw(plan.planes, nz, nc, ny - TILE + 1, nx - TILE + 1)
        self._aligned = [(z, c, y * TILE, x * TILE) for z, c, y, x in draw(plan.planes // 2, nz, nc, ny // TILE, nx // TILE)]
        self._windows = draw(plan.windows, nz, ny - WINDOW + 1, nx - WINDOW + 1)

    def tiles(self, share: float, *, check: bool = False) -> Task:
        """All tiles; of a slow peer's, some depths of them."""
        _, nz, _, ny, nx = self._plan.shape
        depth = (ny // TILE) * (nx // TILE)
        few = max(1, round(share * nz)) * depth if share >= _LEAST_DEPTH else max(1, round(share * nz * depth))
        return Task("tiles", limit=0 if share == 1 else few, check=check)

    def windows(self, share: float, *, check: bool = False) -> Task:
        """Windows: at least one batch."""
        return Task("windows", self._windows[: max(16, round(share * len(self._windows)))], check=check)  # type: ignore[arg-type]

    def planes(self, share: float) -> Task:
        """Single reads anywhere."""
        return Task("planes", self._planes[: max(8, round(share * len(self._planes)))])  # type: ignore[arg-type]

    def aligned(self, share: float) -> Task:
        """Single reads of exactly a tile's rows and columns."""
        return Task("planes", self._aligned[: max(4, round(share * len(self._aligned)))])


def _one_client(plan: Plan, data: Data, figures: Figures, tell: Callable[[str], None]) -> None:
    requests = _Requests(plan)
    names = [peer for peer in peers() if not peer.only_concurrent and plan.wants(peer)]
    with started(names, data, figures) as running:
        for one in running:
            tell(f"{one.peer.name}: memory, and every tile and window against NumPy")
            share = one.peer.share
            # Untimed, and before anything is compared: memory is the read's own, and everything is warm from here on.
            servers = family(*one.served.pids)
            with MemoryWatch(one.client.pid, *servers, of=private_bytes) as watch:
                one.client.run(requests.tiles(share))
            figures.peaks[one.peer.name] = (watch.growth(one.client.pid) / 1e6, sum(map(watch.growth, servers)) / 1e6)
            one.client.run(requests.tiles(share, check=True))
            one.client.run(requests.windows(share, check=True))
        for workload in ("tiles", "planes", "aligned", "windows"):
            tell(f"{workload}: {plan.rounds} rounds")
            for _, one in turns(running, plan.rounds):
                task = getattr(requests, workload)(one.peer.share)
                figures.add(one.peer.name, workload, read(one.served, [one.client], task))


def _four_clients(plan: Plan, data: Data, figures: Figures, tell: Callable[[str], None]) -> None:
    names = [peer for peer in peers() if (peer.concurrent or peer.only_concurrent) and plan.wants(peer)]
    tell(f"{_CLIENTS} clients: {plan.rounds} rounds")
    with started(names, data, figures) as running, ExitStack() as stack:
        crowds = [
            (one, [one.client, *(stack.enter_context(ClientProcess(one.served.reader, data)) for _ in range(_CLIENTS - 1))])
            for one in running
        ]
        for one, clients in crowds:
            read(one.served, clients, Task("tiles", check=True))
        for _, (one, clients) in turns(crowds, plan.rounds):
            figures.add(one.peer.name, "clients", read(one.served, clients, Task("tiles")))


def run(plan: Plan, *, tell: Callable[[str], None] = lambda _: None) -> Figures:
    """Measure on the loopback interface.

    Args:
        plan: How much.
        tell: Is told what comes next.
    """
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        tell("making the image's files")
        zarr = any("Zarr" in peer.name and not peer.missing() for peer in peers() if plan.wants(peer))
        data = make_files(Path(folder, "noise"), plan.shape, "noise", zarr)
        _one_client(plan, data, figures, tell)
        _four_clients(plan, data, figures, tell)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small image and one round: shows that it works, not how fast it is"
    )
    parser.add_argument("--rounds", type=int, help="rounds that medians are taken over (5)")
    parser.add_argument("--peers", nargs="+", metavar="NAME", default=[], help="only peers whose name has one of these in it")
    parser.add_argument("--no-links", action="store_true", help="leave out the slow links")
    parser.add_argument("--no-serving", action="store_true", help="leave out slow readers and the second start")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    quick = options.quick
    for part in options.peers:
        if not any(part.lower() in peer.name.lower() for peer in peers()):
            parser.error(f"no peer's name has {part!r} in it; there are: {', '.join(peer.name for peer in peers())}")
    plan = Plan(
        wire_data.QUICK if quick else wire_data.FULL,
        options.rounds or (1 if quick else 5),
        20 if quick else 300,
        32 if quick else 512,
        tuple(options.peers),
    )

    def tell(what: str) -> None:
        print(f"… {what}", file=sys.stderr, flush=True)

    # Imported here: every client's process imports this module, and needs none of it.
    from . import wire_links, wire_serving

    figures = run(plan, tell=tell)
    links = {} if options.no_links else wire_links.run(plan, quick=quick, tell=tell)
    if not options.no_serving:
        wire_serving.run(figures, plan.shape, quick=quick, tell=tell)
    versions = ", ".join(f"{name} {what}" for name, what in environment().items())
    size = Data(Path(), plan.shape).nbytes / 1e6
    show_peers(figures, f"All 256² CYX tiles of {size:.0f} MB, single 256² reads, windows: {versions}", 2 * CHANNELS * WINDOW**2)
    show_links(links)
    verdicts = judge(figures)
    show_checks(verdicts)
    if options.json:
        found = figures.as_json() | {"links": {name: link.as_json() for name, link in links.items()}}
        found["checks"] = [{"name": v.check.name, "value": v.value, "met": v.met, "failed": v.failed} for v in verdicts]
        write_json(options.json, "wire", found)
    failed = [verdict.check.name for verdict in verdicts if verdict.failed]
    if failed and quick:
        print("(a quick run's ratios mean nothing: no regression is reported)")
    elif failed:
        print(f"REGRESSION: {'; '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
