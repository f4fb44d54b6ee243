"""Networks that are not the loopback interface: a link of 1 Gbit/s between two network namespaces, and a proxy that delays every byte.

Run as a program it is the proxy: ``python -m benchmarks.peers.network HOST:PORT MILLISECONDS``.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .base import HERE, Where, python_server

__all__ = ["NotPermittedError", "delayed", "slow_link"]

_RATE = "1gbit"
#: What the bucket may send at once, and how long a packet may wait in its queue: enough for full rate, little enough to act as a switch does.
_SHAPE = ("tbf", "rate", _RATE, "burst", "256kb", "latency", "50ms")

_STEP = 1 << 20
#: Reads that the proxy holds in flight each way: more than any window, so that it bounds time and not rate.
_IN_FLIGHT = 256


class NotPermittedError(Exception):
    """This host does not let us make a network."""


@contextmanager
def slow_link() -> Iterator[Where]:
    """A namespace at the far end of a veth pair, shaped to 1 Gbit/s in both directions. Servers run there, clients here.

    Raises:
        NotPermittedError: no root, no ``ip`` or ``tc``, or a kernel without them.
    """
    number = os.getpid()
    name, near, far = f"ome-bench-{number}", f"obn{number}", f"obf{number}"
    third, fourth = number // 64 % 256, number % 64 * 4
    here, there = f"10.213.{third}.{fourth + 1}", f"10.213.{third}.{fourth + 2}"
    inside = ("ip", "netns", "exec", name)
    try:
        for command in (
            ("ip", "netns", "add", name),
            ("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name),
            ("ip", "address", "add", f"{here}/30", "dev", near),
            ("ip", "link", "set", near, "up"),
            (*inside, "ip", "address", "add", f"{there}/30", "dev", far),
            (*inside, "ip", "link", "set", far, "up"),
            (*inside, "ip", "link", "set", "lo", "up"),
            ("tc", "qdisc", "add", "dev", near, "root", *_SHAPE),
            (*inside, "tc", "qdisc", "add", "dev", far, "root", *_SHAPE),
        ):
            _run(command)
        yield Where(there, inside)
    finally:
        # The pair goes with the namespace.
        for command in (("ip", "link", "delete", near), ("ip", "netns", "delete", name)):
            with suppress(NotPermittedError):
                _run(command)


def _run(command: tuple[str, ...]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotPermittedError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise NotPermittedError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def delayed(target: str, milliseconds: float) -> Iterator[tuple[str, int]]:
    """A proxy before a server that adds ``milliseconds`` to every round trip, half of it each way; its address and process id."""
    with python_server(["-m", __name__, target, str(milliseconds)], HERE) as found:
        yield found


# -- the proxy ---------------------------------------------------------------------------------------------------------------------


async def _take(reader: asyncio.StreamReader, waiting: asyncio.Queue[tuple[float, bytes]], delay: float) -> None:
    clock = asyncio.get_running_loop().time
    data = b"?"
    while data:
        try:
            data = await reader.read(_STEP)
        except ConnectionError:
            data = b""
        await waiting.put((clock() + delay, data))


async def _give(writer: asyncio.StreamWriter, waiting: asyncio.Queue[tuple[float, bytes]]) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        due, data = await waiting.get()
        await asyncio.sleep(max(0.0, due - clock()))
        if not data:
            writer.close()
            return
        # Once the far end has gone there is nobody to tell; its own direction ends this one.
        with suppress(ConnectionError):
            writer.write(data)
            await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """One direction: bytes leave ``delay`` seconds after they came."""
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)
    await asyncio.gather(_take(reader, waiting, delay), _give(writer, waiting))


async def _serve(target: str, delay: float) -> None:
    host, _, port = target.rpartition(":")

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, thither = await asyncio.open_connection(host, int(port), limit=_STEP)
        await asyncio.gather(_pump(reader, thither, delay), _pump(there, writer, delay))

    server = await asyncio.start_server(accept, HERE.host, 0, limit=_STEP)
    print("listening on {}:{}".format(*server.sockets[0].getsockname()), flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], float(sys.argv[2]) / 2e3))
