"""A network that fails on purpose: a relay between client and server that damages, delays, throttles, cuts, goes silent, and comes back."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

__all__ = ["Network", "Trouble"]

_STEP = 16 << 10


@dataclass(frozen=True, slots=True)
class Trouble:
    """What the network does to one direction of a connection; by default nothing.

    Attributes:
        damage_every: Flip a bit in one of so many bytes, behind the first ``quiet``; 0 for none.
        quiet: Bytes at the beginning of a connection that are left alone: what opens it.
        cut_every: End the connection after about so many bytes, with a reset; 0 for never.
        silent_after: Forward nothing more after about so many bytes, and close nothing; 0 for never.
        delay: Seconds that each piece takes.
        bytes_per_second: Throttle; 0 for none.
    """

    damage_every: int = 0
    quiet: int = 2_000
    cut_every: int = 0
    silent_after: int = 0
    delay: float = 0.0
    bytes_per_second: float = 0.0


_NONE = Trouble()


class Network:
    """A relay on the loopback interface. What it does may be changed at any time: connections that there are heed it.

    Args:
        target: ``HOST:PORT`` of the server.
        answers: What becomes of what the server sends.
        requests: What becomes of what clients send.
        seed: Of where bits are flipped and connections cut.

    Attributes:
        target: ``HOST:PORT`` for clients.
        troubles: How often it has flipped a bit, cut or gone silent.
        answers, requests: See above.
    """

    def __init__(self, target: str, answers: Trouble = _NONE, requests: Trouble = _NONE, seed: int = 0) -> None:
        host, _, port = target.rpartition(":")
        self._upstream = (host, int(port))
        self.answers, self.requests = answers, requests
        self._chance = random.Random(seed)
        self.troubles = 0
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def heal(self) -> None:
        """From now on nothing is wrong; what has gone silent is cut, as a network's timers do in the end."""
        was_silent = bool(self.answers.silent_after or self.requests.silent_after)
        self.answers = self.requests = _NONE
        if was_silent:
            self.cut()

    def cut(self) -> None:
        """End all connections."""
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._upstream, timeout=10)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            self._sockets += [near, far]
            threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        passed, damage_at = 0, -1
        limit = self._chance.uniform(0.5, 1.5)
        with suppress(OSError):
            while data := bytearray(source.recv(_STEP)):
                trouble = self.answers if is_answer else self.requests
                if trouble.damage_every:
                    if damage_at < 0:
                        damage_at = trouble.quiet + self._chance.randrange(trouble.damage_every)
                    while damage_at < passed + len(data):
                        if damage_at >= passed:
                            data[damage_at - passed] ^= 1 << self._chance.randrange(8)
                            self.troubles += 1
                        damage_at += 1 + self._chance.randrange(2 * trouble.damage_every)
                passed += len(data)
                if trouble.delay:
                    time.sleep(trouble.delay)
                if trouble.bytes_per_second:
                    time.sleep(len(data) / trouble.bytes_per_second)
                if trouble.cut_every and passed > limit * trouble.cut_every:
                    self.troubles += 1
                    break
                if trouble.silent_after and passed > limit * trouble.silent_after:
                    self.troubles += 1
                    while (self.answers if is_answer else self.requests).silent_after:
                        time.sleep(0.02)
                    break
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.answers = self.requests = _NONE
        self._listener.close()
        self.cut()
        for one in self._sockets:
            one.close()
