"""kill -9 during uploads at random bytes: ``python -m benchmarks.uploads --kills 100``.

A server in a process of its own takes uploads until it is killed: somewhere in the stream, at some moment after its last byte, or as soon as the
upload has its name, before it is registered and the call answered. Every other upload takes the place of one that is served. After each restart
every upload whose call had returned must be there with its pixels, every other one whole or not at all; and one that was to take another's place must
be that or the other. Exit status 1 where that is not so.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.processes import ServerProcess
from benchmarks.report import print_table
from ome_tensor import DatasetNotFound, OmeTensorError
from ome_tensor_client import Client, connect

__all__ = ["main"]


def taking_uploads(folder: Path) -> ServerProcess:
    """A server over a folder of uploads."""
    return ServerProcess("--uploads", folder / "uploads", store=folder / "store")


def pixels_of(number: int) -> np.ndarray:
    """The pixels of an upload; its size differs, too."""
    random_ = np.random.default_rng(number)
    return random_.integers(0, 65535, (2, 3, int(random_.integers(200, 800)), 700), np.uint16)


def wait_serving(client: Client) -> None:
    """Until the server has found its uploads."""
    for _ in range(200):
        try:
            client.datasets()
            return
        except OmeTensorError:
            time.sleep(0.05)
    raise RuntimeError("the server does not come back")


def main() -> None:
    """Kill, look, and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Which pixels each upload may have; None: it may be absent.
        may: dict[str, set[int | None]] = {}
        recent: list[str] = []
        server = taking_uploads(folder)
        for number in range(options.kills):
            pixels = pixels_of(number)
            whole = [name for name, numbers in may.items() if None not in numbers]
            replaces = bool(number % 2 and whole)
            name_ = chance.choice(whole) if replaces else f"up {number}"
            kind = chance.choice(("byte", "byte", "later", "named"))
            late = kind != "byte"
            at = pixels.nbytes if late else chance.randrange(pixels.nbytes)
            # Its first reader takes most of a second to start.
            delay = (
                chance.uniform(0, 2.0) if kind == "later" else chance.uniform(0, 0.05) if replaces and kind == "named" else 0.0
            )
            killed = threading.Event()
            # Of one that takes another's place, as soon as that is set aside.
            file = folder / "uploads" / f"{name_}.arrows{'.before' if replaces else ''}"

            def end(
                server: ServerProcess = server,
                delay: float = delay,
                killed: threading.Event = killed,
                named: Path | None = file if kind == "named" else None,
            ) -> None:
                patience = time.monotonic() + 10
                while named is not None and not named.exists() and time.monotonic() < patience:
                    pass
                time.sleep(delay)
                server.kill()
                killed.set()

            before = may.get(name_, {None})
            with connect(server.target, retry_for=0.1, timeout=20) as client:
                wait_serving(client)
                began = False

                def progress(sent: int, _: int, at: int = at, late: bool = late) -> None:
                    nonlocal began
                    if sent >= at and not began:
                        began = True
                        # Where it is to be killed at a byte, nothing more is sent before it is dead.
                        thread = threading.Thread(target=end)
                        thread.start()
                        if not late:
                            thread.join()

                try:
                    client.upload(name_, pixels, replace=replaces, progress=progress)
                    may[name_] = {number}
                    counts["returned"] += 1
                except OmeTensorError:
                    may[name_] = before | {number}
                    counts["cut"] += 1
            counts[f"killed: {kind}"] += 1
            counts["replacing"] += replaces
            recent = [*[one for one in recent if one != name_][-3:], name_]
            if not began:
                end()
            killed.wait(30)
            server = taking_uploads(folder)
            with connect(server.target, retry_for=10, timeout=20) as client:
                wait_serving(client)
                there = {info.name for info in client.datasets()}
                if any(not path.endswith(".arrows") for path in os.listdir(folder / "uploads") if path[0] != "."):
                    counts["left a part behind"] += 1
                for known in recent:
                    was_cut = len(may[known]) > 1
                    try:
                        found = client.tensor_view(known, layout="ZCYX").to_numpy()
                    except DatasetNotFound:
                        if None not in may[known]:
                            counts["LOST"] += 1
                        elif known == name_:
                            counts["absent"] += 1
                        may[known] = {None}
                        continue
                    except OmeTensorError as error:
                        print(f"{known}: {error}")
                        counts["HALF"] += 1
                        continue
                    one = next((one for one in may[known] if one is not None and np.array_equal(found, pixels_of(one))), None)
                    if one is None:
                        counts["HALF"] += 1
                    elif was_cut and known == name_:
                        what = "whole, though its call was cut"
                        counts[what if not replaces else "the new one" if one == number else "the one before"] += 1
                    may[known] = {one}
                counts["LOST"] += len({known for known, numbers in may.items() if None not in numbers} - there)
        server.kill()
    rows = [
        ("kills", str(options.kills)),
        ("at a random byte", str(counts["killed: byte"])),
        ("up to 2 s after the last byte", str(counts["killed: later"])),
        ("as soon as the upload had its name", str(counts["killed: named"])),
        ("that took another's place", str(counts["replacing"])),
        *((what, str(counts[what])) for what in ("returned", "cut", "absent", "whole, though its call was cut")),
        ("cut while taking another's place: the new one is there", str(counts["the new one"])),
        ("the one before is there", str(counts["the one before"])),
        ("half datasets (bar: 0)", str(counts["HALF"])),
        ("finished ones lost (bar: 0)", str(counts["LOST"])),
        ("parts left behind after a restart", str(counts["left a part behind"])),
    ]
    print_table("kill -9 during uploads", ("what", "number"), rows)
    sys.exit(1 if counts["HALF"] or counts["LOST"] or counts["left a part behind"] else 0)


if __name__ == "__main__":
    main()
