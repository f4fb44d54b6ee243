"""Many streams on one server: ``python -m benchmarks.load``.

A server in a process of its own, readers in others. Printed are: how many streams ended with an error, how equally they were served (Jain's
index, https://arxiv.org/abs/cs/9809099), the server's memory, threads and open files in the course of it, the latency of small reads on a
server that is idle and on one that is busy, and what one reader that takes nothing costs the others. Exit status 1 where a stream failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil

from benchmarks.processes import serving
from benchmarks.report import number, print_table, write_json, yes_no
from benchmarks.training import QUICK, write_planes
from ome_tensor_client import connect
from ome_tensor_proto.methods import METHODS
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_proto.v1 import view_pb2

__all__ = ["jain", "main"]

_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
_READ = METHODS["ReadTiles"].path

_NICE = 10

#: Small reads a second of the one who measures them.
_PROBES = 20.0


def jain(shares: Sequence[float]) -> float:
    """How equal shares are: 1 where all are the same, 1/n where one has everything."""
    total = sum(shares)
    return total * total / (len(shares) * sum(share * share for share in shares)) if total else 0.0


def _request() -> bytes:
    tiling = view_pb2.Tiling(tiles=view_pb2.TilesCut(h=256, w=256))
    rows = pb.ImageRows(dataset="planes", column="image", rows=range(QUICK[1]))
    return pb.ReadTilesRequest(image_rows=rows, tiling=tiling).SerializeToString()


def _read_for_ever(target: str, streams: int, first: int, counts: Any, errors: Any, stop: Any) -> None:
    """One client process: ``streams`` streams, each read again and again, on connections of their own."""
    # They stand for other machines: what they want of these cores is not to be what a small read waits for.
    os.nice(_NICE)
    data = _request()

    def read(place: int) -> None:
        with grpc.insecure_channel(target, options=_OPTIONS) as channel:
            method = channel.unary_stream(_READ)
            while not stop.is_set():
                call = method(data, timeout=3600)
                try:
                    for message in call:
                        counts[place] += len(message)
                        if stop.is_set():
                            call.cancel()
                            break
                except grpc.RpcError as error:
                    if not stop.is_set():
                        errors[place] += 1
                        print(f"stream {place}: {error.code()} {error.details()}", file=sys.stderr)  # type: ignore[attr-defined]
                        time.sleep(0.5)

    threads = [threading.Thread(target=read, args=(first + number,), daemon=True) for number in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _probe(target: str, seconds: float, answers: Any) -> None:
    """Small reads, so many a second; their latencies."""
    random = np.random.default_rng(1)
    found = []
    with connect(target, transport="tcp", timeout=30) as client:
        client.tensor_view("planes/0", roi=(0, 0, 64, 64)).to_numpy()
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            x, y = (int(one) for one in random.integers(0, 200, 2))
            began = time.perf_counter()
            client.tensor_view("planes/0", roi=(x, y, 128, 128)).to_numpy()
            took = time.perf_counter() - began
            found.append(took)
            time.sleep(max(0.0, 1 / _PROBES - took))
    answers.put(found)


class Watch(threading.Thread):
    """Looks at a server's process every second.

    Attributes:
        looks: Resident bytes, threads and open files.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process, self._ended = psutil.Process(pid), threading.Event()
        self.looks: list[tuple[float, float, float]] = []

    def run(self) -> None:
        """Until it is told to end."""
        while not self._ended.wait(1.0):
            with self._process.oneshot():
                self.looks.append((self._process.memory_info().rss, self._process.num_threads(), self._process.num_fds()))

    def end(self) -> list[tuple[float, float, float]]:
        """What it has seen."""
        self._ended.set()
        self.join()
        return self.looks


def _probed(target: str, seconds: float) -> list[float]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_probe, args=(target, seconds, answers))
    process.start()
    found: list[float] = answers.get(timeout=seconds + 120)
    process.join()
    return found


def _quantile(values: Sequence[float], part: float) -> float:
    return float(np.quantile(values, part))


def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the load")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--processes", type=int, default=4, help="of the readers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = write_planes(Path(folder), QUICK)
        server = serving(path, "--max-concurrent-reads", str(options.streams + 16))
        try:
            alone = _probed(server.target, min(30.0, options.seconds / 4))
            counts = context.Array("d", options.streams, lock=False)
            errors = context.Array("i", options.streams, lock=False)
            stop = context.Event()
            each = options.streams // options.processes
            readers = [
                context.Process(target=_read_for_ever, args=(server.target, each, number * each, counts, errors, stop))
                for number in range(options.processes)
            ]
            for reader in readers:
                reader.start()
            used = each * options.processes
            while sum(1 for place in range(used) if counts[place]) < used:
                time.sleep(0.2)
            watch = Watch(server.pid)
            watch.start()
            first = list(counts[:used])
            began = time.monotonic()
            busy = _probed(server.target, options.seconds / 2)
            shares = [now - then for now, then in zip(counts[:used], first, strict=True)]
            rate = sum(shares) / (time.monotonic() - began)
            # A reader that takes its first message and then nothing: before, beside, before, beside ...
            rates: dict[bool, list[float]] = {False: [], True: []}
            slice_seconds = options.seconds / 2 / 10
            for turn in range(10):
                is_stalled = bool(turn % 2)
                with grpc.insecure_channel(server.target, options=_OPTIONS) as channel:
                    call = channel.unary_stream(_READ)(_request(), timeout=3600) if is_stalled else None
                    then, at = sum(counts[:used]), time.monotonic()
                    time.sleep(slice_seconds)
                    rates[is_stalled].append((sum(counts[:used]) - then) / (time.monotonic() - at))
                    if call is not None:
                        call.cancel()
            stop.set()
            for reader in readers:
                reader.join(60)
                if reader.is_alive():
                    reader.kill()
            looks = watch.end()
            server.stop()
        finally:
            server.kill()
    failed = sum(errors[:used])
    index = jain(shares)
    tenth = max(1, len(looks) // 10)
    early, late = (
        [statistics.median(one) for one in zip(*part, strict=True)] for part in (looks[tenth : 2 * tenth + 1], looks[-tenth:])
    )
    p50, p99 = (_quantile(alone, part) * 1e3 for part in (0.5, 0.99))
    busy50, busy99 = (_quantile(busy, part) * 1e3 for part in (0.5, 0.99))
    cost = statistics.median(rates[True]) / statistics.median(rates[False])
    memory, threads, files = zip(early, late, strict=True)
    rows = [
        ("streams, seconds", "", f"{used}, {options.seconds:g}", ""),
        ("bytes a second, all together", "", f"{rate / 1e6:,.0f} MB/s", ""),
        ("streams that ended with an error", "0", str(failed), yes_no(failed == 0)),
        ("Jain's index of the streams' bytes", ">= 0.9", number(index), yes_no(index >= 0.9)),
        (
            "server's memory, early and late",
            "flat",
            f"{memory[0] / 1e6:,.0f} and {memory[1] / 1e6:,.0f} MB",
            yes_no(memory[1] < 1.1 * memory[0] + 20e6),
        ),
        ("its threads", "flat", f"{threads[0]:.0f} and {threads[1]:.0f}", yes_no(threads[1] <= threads[0] + 4)),
        ("its open files", "flat", f"{files[0]:.0f} and {files[1]:.0f}", yes_no(files[1] <= files[0] + 4)),
        ("small reads alone: p50, p99", "", f"{p50:.1f}, {p99:.1f} ms ({len(alone)})", ""),
        ("small reads beside all that: p50, p99", "", f"{busy50:.1f}, {busy99:.1f} ms ({len(busy)})", ""),
        ("their p99, beside to alone", "<= 10x", f"{busy99 / p99:.1f}x", yes_no(busy99 <= 10 * p99)),
        ("the others' rate beside a stalled reader", ">= 0.95x", f"{cost:.3f}x", yes_no(cost >= 0.95)),
    ]
    title = f"Load: one server, {os.cpu_count()} cores for it and {options.processes + 1} processes of readers"
    print_table(title, ("", "bar", "measured", "met"), rows)
    if options.json:
        write_json(options.json, "load", json.loads(json.dumps({row[0]: row[2] for row in rows})))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
