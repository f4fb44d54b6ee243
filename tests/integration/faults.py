"""What goes wrong, and what comes of it: ``python -m tests.integration.faults``.

Real servers, real files, real clients. Each fault is made to happen while a client reads in three ways (a shuffled stream that is read ahead of,
small reads, lookups) or uploads, and it is counted how many were right, how many ended with an error of this project's, how many were wrong, and
how many took longer than they may. Exit status 1 where anything was wrong or hung.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tests.integration.images import random_pixels, write_image
from tests.integration.network import Network, Trouble
from tests.integration.processes import ServerProcess

from ome_tensor import OmeTensorError
from ome_tensor_client import Client, connect

__all__ = ["FAULTS", "Outcome", "run"]

SHAPE = (1, 3, 2, 512, 512)
PIXELS = random_pixels(SHAPE, seed=4)
#: What a replaced file holds.
OTHERS = random_pixels(SHAPE, seed=5)

#: Seconds that a client waits for an answer, and tries again without progress; nothing may take longer than all of that together and a little.
TIMEOUT, RETRY_FOR = 1.0, 6.0
MOST_SECONDS = 4 * (TIMEOUT + RETRY_FOR)


@dataclass(slots=True)
class Outcome:
    """What came of the reads under one fault.

    Attributes:
        right: Reads that ended well, each pixel as it should be.
        refused: Reads that ended with an error of this project's, by its class.
        wrong: What came that should not have, in words.
        hung: Reads that took longer than they may.
        troubles: How often the fault has happened.
    """

    right: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    troubles: int = 0


def check(found: np.ndarray, y: int, x: int, z: int, c: int, which: list[np.ndarray]) -> list[np.ndarray]:
    """Those of the versions that a tile may be of; AssertionError where it is of none."""
    h, w = found.shape[-2:]
    fitting = [one for one in which if np.array_equal(found.reshape(h, w), one[0, z, c, y : y + h, x : x + w])]
    assert fitting, (z, c, y, x)
    return fitting


def stream(client: Client, which: list[np.ndarray]) -> None:
    """All tiles, shuffled, read ahead of: each once."""
    seen = set()
    for c in range(2):
        for z in range(3):
            view = client.tensor_view("image", z=z, c=c, layout="YX")
            fitting = list(which)
            for tile in view.iter_tiles(tile_size=(64, 64), shuffle=True, seed=3, prefetch=3):
                # One read is of one version.
                fitting = check(tile.array, tile.origin[2], tile.origin[3], z, c, fitting)
                assert (z, c, tile.number) not in seen, "a tile came twice"
                seen.add((z, c, tile.number))
    assert len(seen) == 6 * 64, "tiles are missing"


def small(client: Client, which: list[np.ndarray]) -> None:
    """A few regions, each a call."""
    for number in range(12):
        x, y = 37 * number % 400, 53 * number % 400
        view = client.tensor_view("image", z=number % 3, c=number % 2, roi=(x, y, 90, 70), layout="YX")
        check(view.to_numpy(), y, x, number % 3, number % 2, which)


def lookup(client: Client, which: list[np.ndarray]) -> None:
    """What a server says of what it holds."""
    assert client.image("image").shape == SHAPE
    assert client.dataset("image").metadata().num_rows == 1


def upload(client: Client, which: list[np.ndarray]) -> None:
    """A dataset sent, and read back."""
    client.upload("sent", PIXELS[:, :1], replace=True)
    np.testing.assert_array_equal(client.tensor_view("sent", layout="TZCYX").to_numpy(), PIXELS[:, :1])


READS: dict[str, Callable[[Client, list[np.ndarray]], None]] = {
    "stream": stream,
    "small": small,
    "lookup": lookup,
    "upload": upload,
}


class Scene:
    """A server of one image, and what stands between it and its clients.

    Attributes:
        which: The pixels that the image has, or has had.
        target: Where clients connect.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder, self._flags = folder, (*flags, "--uploads", str(folder / "uploads"), "--log-level", "error")
        (folder / "data").mkdir()
        self.path = write_image(folder / "data" / "image.parquet", PIXELS)
        self.which = [PIXELS]
        self.process = self._start("127.0.0.1:0")
        self.target = self.process.target
        self.network: Network | None = None

    def _start(self, listen: str) -> ServerProcess:
        return ServerProcess(self.folder / "data", self.folder / "log", *self._flags, listen=listen).wait_serving()

    def restart(self) -> None:
        """kill -9, and another one on the same port."""
        target = self.process.target
        self.process.kill()
        self.process.__exit__()
        time.sleep(0.2)
        self.process = self._start(target)

    def close(self) -> None:
        """End everything."""
        if self.network is not None:
            self.network.__exit__()
        with suppress(ProcessLookupError):
            os.kill(self.process.process.pid, signal.SIGCONT)
        self.process.__exit__()


def _network(answers: Trouble = Trouble(), requests: Trouble = Trouble()) -> Callable[[Scene], Iterator[None]]:  # noqa: B008  frozen
    def fault(scene: Scene) -> Iterator[None]:
        network = scene.network = Network(scene.target, answers, requests, seed=6)
        scene.target = network.target
        yield
        before = -1
        while network.troubles != before or not (answers.silent_after or requests.silent_after):
            before = network.troubles
            yield

    return fault


def _silence(scene: Scene) -> Iterator[None]:
    """Nothing goes through any more, and nothing is closed; after a while it does again."""
    network = scene.network = Network(scene.target)
    scene.target = network.target
    yield
    while True:
        time.sleep(0.3)
        network.answers = network.requests = Trouble(silent_after=1)
        network.troubles += 1
        time.sleep(1.5)
        network.heal()
        yield


def _kill(scene: Scene) -> Iterator[None]:
    yield
    while True:
        # Long enough for a reader that came back to get on.
        time.sleep(1.2)
        scene.restart()
        yield


def _stop(scene: Scene) -> Iterator[None]:
    yield
    while True:
        # Long enough for a read to get on; then longer than its client waits.
        time.sleep(1.0)
        os.kill(scene.process.process.pid, signal.SIGSTOP)
        time.sleep(1.6)
        os.kill(scene.process.process.pid, signal.SIGCONT)
        yield


def _replace(scene: Scene) -> Iterator[None]:
    """Another file in its place, and back, each time served anew."""
    yield
    scene.which = [PIXELS, OTHERS]
    with connect(scene.process.target, timeout=30) as client:
        for number in range(10**6):
            scratch = write_image(scene.folder / "image.parquet", (OTHERS, PIXELS)[number % 2])
            os.replace(scratch, scene.path)
            with suppress(OmeTensorError):
                client.admin.refresh("image")
            time.sleep(0.3)
            yield


def _damage_file(how: str) -> Callable[[Scene], Iterator[None]]:
    def fault(scene: Scene) -> Iterator[None]:
        yield
        content = scene.path.read_bytes()
        while True:
            # As long as it takes to notice that the file is whole again, and to read it.
            time.sleep(1.0)
            if how == "deleted":
                scene.path.unlink()
            else:
                with scene.path.open("r+b") as file:
                    file.truncate(len(content) // 2)
            time.sleep(0.5)
            scene.path.write_bytes(content)
            yield

    return fault


def _full_disk(scene: Scene) -> Iterator[None]:
    """Where uploads are kept there is room for a part of one."""
    room = scene.folder / "uploads"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(room)], check=True)
    try:
        while True:
            yield
    finally:
        subprocess.run(["umount", "-l", str(room)], check=True)


_IN_PLACE = ("--memory-limit", "1M", "--lazy", "--watch-seconds", "0.2")

#: By name: what happens, the reads that it happens to, and flags of the server.
FAULTS: dict[str, tuple[Callable[[Scene], Iterator[None]], tuple[str, ...], tuple[str, ...]]] = {
    "connections cut": (_network(Trouble(cut_every=300_000)), ("stream", "small", "lookup"), ()),
    "requests cut": (_network(requests=Trouble(cut_every=1_500)), ("stream", "small", "upload"), ()),
    "slow answers": (_network(Trouble(delay=0.01)), ("stream", "small", "lookup"), ()),
    "throttled": (_network(Trouble(bytes_per_second=4e6)), ("stream", "small"), ()),
    "bits flipped in answers": (_network(Trouble(damage_every=400_000)), ("stream", "small", "lookup"), ()),
    "bits flipped in requests": (_network(requests=Trouble(damage_every=2_000, quiet=300)), ("stream", "small", "upload"), ()),
    "silence": (_silence, ("stream", "small", "lookup"), ()),
    "server killed": (_kill, ("stream", "small", "lookup"), ()),
    "server stopped": (_stop, ("stream", "small", "lookup"), ()),
    "file replaced": (_replace, ("stream", "small"), ()),
    "file deleted": (_damage_file("deleted"), ("stream", "small"), ()),
    "file truncated": (_damage_file("truncated"), ("stream", "small"), ()),
    "file in place replaced": (_replace, ("stream", "small"), _IN_PLACE),
    "file in place deleted": (_damage_file("deleted"), ("stream", "small"), _IN_PLACE),
    "file in place truncated": (_damage_file("truncated"), ("stream", "small"), _IN_PLACE),
    "disk full": (_full_disk, ("upload", "stream"), ()),
}


@contextmanager
def _happening(scene: Scene, name: str, outcome: Outcome) -> Iterator[None]:
    """While the fault happens, again and again."""
    steps = FAULTS[name][0](scene)
    next(steps)
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            next(steps)
            if scene.network is None:
                outcome.troubles += 1
            over.wait(0.1)
        steps.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)
        if scene.network is not None:
            outcome.troubles = scene.network.troubles


def run(
    name: str, folder: Path, seconds: float, enough: int = 10**9, kinds: tuple[str, ...] = tuple(READS)
) -> dict[str, Outcome]:
    """One fault, for so many seconds of each kind of read, or until as many have ended well."""
    found = {}
    for kind in (kind for kind in FAULTS[name][1] if kind in kinds):
        own = folder / kind
        own.mkdir()
        scene, outcome = Scene(own, *FAULTS[name][2]), Outcome()
        try:
            with (
                _happening(scene, name, outcome),
                connect(scene.target, transport="tcp", checksum=True, timeout=TIMEOUT, retry_for=RETRY_FOR) as client,
            ):
                ends = time.monotonic() + seconds
                while time.monotonic() < ends and outcome.right < enough:
                    began = time.monotonic()
                    try:
                        READS[kind](client, scene.which)
                        outcome.right += 1
                    except OmeTensorError as error:
                        outcome.refused[type(error).__name__] += 1
                    except Exception as error:
                        outcome.wrong.append(f"{type(error).__name__}: {error}"[:300])
                    if time.monotonic() - began > MOST_SECONDS:
                        outcome.hung.append(f"{time.monotonic() - began:.1f} s")
            if scene.process.process.poll() is not None:
                outcome.wrong.append(f"the server ended: {scene.process.log.read_text()[-500:]}")
            if "Traceback" in (log := scene.process.log.read_text()):
                outcome.wrong.append(f"the server's log has a traceback: {log[log.index('Traceback') :][:1500]}")
        finally:
            scene.close()
        found[kind] = outcome
    return found


def main() -> None:
    """All faults; a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each fault and kind of read")
    parser.add_argument("--fault", choices=FAULTS, action="append")
    options = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    failed = False
    for name in options.fault or FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            for kind, outcome in run(name, Path(folder), options.seconds).items():
                refused = ", ".join(f"{count} {error}" for error, count in sorted(outcome.refused.items())) or "none"
                rows.append(
                    (
                        name,
                        kind,
                        str(outcome.troubles),
                        str(outcome.right),
                        refused,
                        str(len(outcome.wrong)),
                        str(len(outcome.hung)),
                    )
                )
                print(" | ".join(rows[-1]), *outcome.wrong[:2], file=sys.stderr)
                failed |= bool(outcome.wrong or outcome.hung)
    from benchmarks.report import print_table

    print_table("Faults", ("fault", "reads", "times", "right", "refused", "wrong", "hung"), rows)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
