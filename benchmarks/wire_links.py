"""Ours beside Flight where the network is the bottleneck: 1 Gbit/s, and 10 ms there and back; with and without compression."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .peers.base import HERE, Data, Peer, Reader, Served, Where
from .peers.client import ClientProcess, Task
from .peers.flight import Flight, FlightReader
from .peers.network import NotPermittedError, delayed, slow_link
from .peers.ours import Ours, OursReader, has_option
from .peers.raw import RawSocket
from .wire import Plan, make_files, read, turns
from .wire_data import LINK
from .wire_figures import Figures

__all__ = ["run"]

_QUICK = (1, 1, 3, 1024, 1024)
_CODECS = ("none", "lz4", "zstd", "auto")
_DELAY_MS = 10.0

#: Gives, for a server, what its clients are to connect to.
Far = Callable[[ExitStack, Served], Served]


@dataclass(frozen=True)
class _Contender:
    """A client with one codec."""

    name: str
    workload: str
    served: Served
    client: ClientProcess


def _with_codec(reader: Reader, codec: str) -> Reader | None:
    """The same client asking for a codec; ``None`` where it knows no such."""
    if isinstance(reader, FlightReader):
        return None if codec == "auto" else replace(reader, codec="" if codec == "none" else codec)
    if isinstance(reader, OursReader):
        if has_option("compression"):
            return replace(reader, options=reader.options | {"compression": codec})
        return reader if codec == "none" else None
    return reader if codec == "none" else None


def _direct(stack: ExitStack, served: Served) -> Served:
    return served


def _proxied(stack: ExitStack, served: Served) -> Served:
    target, _ = stack.enter_context(delayed(served.reader.target, _DELAY_MS))  # type: ignore[attr-defined]
    return replace(served, reader=replace(served.reader, target=target))  # type: ignore[type-var]


def _measure(data: Data, kind: str, codecs: Sequence[str], where: Where, far: Far, plan: Plan, figures: Figures) -> None:
    """All tiles with each codec; single reads without, on noise."""
    contenders: list[_Contender] = []
    names: list[Peer] = [RawSocket(), Flight(), Ours()]
    with ExitStack() as stack:
        for peer in names:
            if why := peer.missing():
                figures.skipped[peer.name] = why
                continue
            served = far(stack, stack.enter_context(peer.serve(data, where)))
            for codec in codecs:
                reader = _with_codec(served.reader, codec)
                if reader is None:
                    continue
                client = stack.enter_context(ClientProcess(reader, data))
                contenders.append(_Contender(peer.name, f"{kind}, {codec}", served, client))
                client.run(Task("tiles", check=True))
        for _, one in turns(contenders, plan.rounds):
            figures.add(one.name, one.workload, read(one.served, [one.client], Task("tiles")))
        if kind == "noise":
            places = [(z % data.shape[1], z % 3, 37 * z % 512, 101 * z % 512) for z in range(max(5, plan.planes // 6))]
            for _, one in turns(contenders, plan.rounds):
                figures.add(one.name, "single 256² reads, p50", read(one.served, [one.client], Task("planes", places)))


@contextmanager
def _link(name: str) -> Iterator[tuple[Where, Far]]:
    if "Gbit" in name:
        with slow_link() as where:
            yield where, _direct
    else:
        yield HERE, _proxied


def run(plan: Plan, *, quick: bool, tell: Callable[[str], None]) -> dict[str, Figures]:
    """Figures of each link."""
    plan = replace(plan, rounds=min(plan.rounds, 3))
    shape = _QUICK if quick else LINK
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = {kind: make_files(Path(folder, kind), shape, kind, zarr=False) for kind in ("noise", "counts")}
        for name in ("1 Gbit/s", f"{_DELAY_MS:g} ms"):
            figures = found[name] = Figures()
            if not has_option("compression"):
                figures.skipped["ours with compression"] = "this tree's client has no compression= yet"
            for kind, data in images.items():
                if quick and (kind == "noise") == (name == "1 Gbit/s"):
                    continue  # Whether it works, one kind a link shows.
                tell(f"{name}: {kind}")
                try:
                    with _link(name) as (where, far):
                        codecs = _CODECS if kind == "counts" else ("none",)
                        _measure(data, kind, codecs, where, far, plan, figures)
                except NotPermittedError as error:
                    figures.skipped["the link"] = str(error)
                    break
    return found
