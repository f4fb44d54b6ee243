"""A server under fuzz: ``python -m tests.fuzz --seconds 60``.

Requests of every method, most of them wrong (``requests``), requests that change datasets (``changes``), and bytes that are no HTTP/2 (``port``)
go to a server all at once, from several connections. Once a second an image is read whose pixels are known. What is wanted: every answer is OK or
a status that the contract defines (``calls.problem`` says which), every such read is right, the server lives and logs no exception, and what its
process holds does not grow (``watch.growth`` says by how much it may).

Exit status 1 where that is not so. The input that shows it, or those that were the latest, are then in a file: lane, number, seed, and bytes in hex.
With the same seed a number is the same input: ``--lane requests --first NUMBER --inputs 1``; those of the port rest on a recording, which differs a
little from run to run.

Never point ``--server`` at data that matter: datasets named ``fuzz-1`` are made and removed there.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from benchmarks.report import number, print_table
from tests.fuzz.lanes import LANES, Run, drive
from tests.fuzz.serving import Served, known_server, own_server
from tests.fuzz.watch import MEASURES, Sample, Watch, alarms, growth, sample

from ome_tensor import OmeTensorError
from ome_tensor_client import Client, connect

_SAMPLE_SECONDS = 0.25

#: The kernel, and gRPC, take a moment to see that everybody has gone.
_SETTLE_SECONDS = 15.0


async def fuzz(run: Run, lanes: Sequence[str], served: Served) -> tuple[Watch | None, float]:
    """All lanes at once; what the server's process held meanwhile (``None`` of one that is not ours), and the seconds that it took."""
    pid = served.pid
    before = sample(pid) if pid else None
    run.begin()
    began = time.monotonic()
    busy = asyncio.create_task(drive(run, lanes, served.target, served.names))
    watching = asyncio.create_task(_watching(run, pid, busy)) if pid else None
    with connect(served.target, transport="tcp", retry_for=5, timeout=20) as client:
        await asyncio.gather(busy, _good_reads(run, client, served, busy))
        seconds = time.monotonic() - began
        during = await watching if watching else []
        if served.is_own:
            await asyncio.to_thread(_clean_up, run, client, served)
    if before is None or not during or (after := await _settled(pid, before, during)) is None:
        return None, seconds
    return Watch(before, during, after), seconds


async def _settled(pid: int, before: Sample, during: Sequence[Sample]) -> Sample | None:
    """What the process holds in the end: as soon as that is well, or after a while."""
    end = time.monotonic() + _SETTLE_SECONDS
    while (after := sample(pid)) and growth(Watch(before, during, after)) and time.monotonic() < end:
        await asyncio.sleep(0.5)
    return after


async def _good_reads(run: Run, client: Client, served: Served, busy: asyncio.Task[None]) -> None:
    """Read what is known once a second, as long as the fuzz runs, and once more behind it."""
    pixels = served.pixels
    last = False
    while pixels is not None and not last:
        last = busy.done()
        try:
            found = await asyncio.to_thread(lambda: client.tensor_view(served.key, layout="TZCHW").to_numpy())
            run.counts["good reads", served.key]["OK"] += 1
            if not np.array_equal(found, pixels):
                run.find("a known good read gave wrong pixels")
        except OmeTensorError as error:
            run.find(f"a known good read failed: {type(error).__name__}: {error}")
        await asyncio.wait({busy}, timeout=1.0)


async def _watching(run: Run, pid: int, busy: asyncio.Task[None]) -> list[Sample]:
    """Samples of the server's process as long as the fuzz runs. One that has died ends it."""
    seen: list[Sample] = []
    while not busy.done():
        one = sample(pid)
        if one is None:
            run.find("the server has died")
            run.stop()
            break
        seen.append(one)
        await asyncio.wait({busy}, timeout=_SAMPLE_SECONDS)
    return seen


def _clean_up(run: Run, client: Client, served: Served) -> None:
    """Remove the datasets that the fuzz has brought: they are meant to be held."""
    try:
        for name in {info.name for info in client.datasets()} - {*served.names.read, *served.names.changed[:1]}:
            client.admin.remove(name)
    except OmeTensorError as error:
        run.find(f"datasets cannot be removed: {type(error).__name__}: {error}")


def report(run: Run, watch: Watch | None, seconds: float) -> None:
    """Tables of what was sent and what came of it, and of what the server held."""
    rows = []
    total = 0
    for (lane, kind), outcomes in sorted(run.counts.items()):
        inputs = outcomes.total()
        total += inputs
        said = ", ".join(f"{what} {count}" for what, count in outcomes.most_common())
        rows.append(
            (f"{lane}: {kind}", f"{inputs:,}", number(run.spent[lane, kind] / inputs * 1e3), number(inputs / seconds), said)
        )
    rows.append(("all", f"{total:,}", "", number(total / seconds), ""))
    print_table(f"{seconds:.1f} s, seed {run.seed}", ("input", "number", "ms each", "a second", "what came of them"), rows)
    if watch is None:
        return
    lines = []
    for what, of, unit in MEASURES:
        values = (of(watch.before), watch.warm(of), watch.late(of), max(map(of, watch.during)), of(watch.after))
        lines.append((what, *(f"{value // unit:,}" for value in values)))
    print_table("the server's process", ("what", "before", "warm (median)", "late (median)", "most", "after"), lines)


def keep(run: Run, folder: Path, log: str) -> None:
    """Write down what was found, the latest inputs, and what the server has written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "findings.txt").write_text("\n\n".join(run.findings) + "\n", errors="replace")
    latest = [show() for shows in run.recent.values() for show in shows]
    (folder / "latest.txt").write_text("\n".join(latest) + "\n", errors="replace")
    if log:
        (folder / "server.log").write_text(log)
    print(f"{len(run.findings)} findings; see {folder}", file=sys.stderr)


def _log_of(run: Run, served: Served) -> str:
    """What the server has written; of one that hangs, with where all its threads are."""
    if served.process is None:
        return ""
    for alarm in Counter(alarms(served.process.log.read_text(errors="replace"))):
        run.find(f"the server's log: {alarm}")
    if any("no answer within" in what for what in run.findings) and served.process.process.poll() is None:
        # Python's fault handler, which is on there, writes them down.
        served.process.process.send_signal(signal.SIGABRT)
        served.process.process.wait(10)
    return served.process.log.read_text(errors="replace")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long inputs are begun")
    parser.add_argument("--inputs", type=float, default=float("inf"), help="how many at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each lane")
    parser.add_argument("--lane", action="append", choices=LANES, help="only these")
    parser.add_argument("--server", default="own", help="HOST:PORT of one that runs already; its process is not watched")
    parser.add_argument("--keep", type=Path, help="folder for what is found; default: a new one")
    options = parser.parse_args()
    run = Run(options.seed, options.seconds, options.inputs, options.first)
    # For the server: one that crashes says where; and what is freed is given back. Arrow's own allocator, and malloc with its sixteen arenas, keep
    # some for each of the server's many threads, so that a process grows for minutes without a leak.
    os.environ |= {"PYTHONFAULTHANDLER": "1", "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        served = stack.enter_context(own_server(Path(name))) if options.server == "own" else known_server(options.server)
        watch, seconds = asyncio.run(fuzz(run, options.lane or LANES, served))
        for grown in growth(watch) if watch else ():
            run.find(grown)
        report(run, watch, seconds)
        log = _log_of(run, served)
        if run.findings:
            keep(run, options.keep or Path(tempfile.mkdtemp(prefix="ome-tensor-fuzz-")), log)
    return 1 if run.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
