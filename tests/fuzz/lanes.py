"""What goes to a server all at once, in lanes of several inputs each, and what is noted of it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tests.fuzz.calls import Caller, problem
from tests.fuzz.port import PortFuzz
from tests.fuzz.requests import RequestMaker
from tests.fuzz.valid import Names

__all__ = ["LANES", "Run", "drive"]

LANES = ("requests", "changes", "port")

#: Inputs in flight of each lane, and connections of the first two. Fewer together than a server has threads: beyond, gRPC refuses calls by itself.
_AT_ONCE = {"requests": 20, "changes": 4, "port": 8}
_CONNECTIONS = 4

#: Inputs of each lane that are kept, to be written down when the server dies.
_KEPT = 40

#: Findings after which there is no use in going on.
_MOST_FINDINGS = 20

#: Bytes of an input that are written down.
_SHOWN = 20_000


@dataclass
class Run:
    """A fuzz in progress.

    Attributes:
        seed: Of all inputs.
        seconds: How long inputs are begun.
        left: Inputs that may still be begun.
        first: Number of each lane's first input.
        counts: By lane and kind of input: what came of them.
        spent: By lane and kind: seconds that they took.
        findings: What is wrong, in words, with the input that shows it.
        recent: Of each lane: the latest inputs, those in flight included.
    """

    seed: int
    seconds: float
    left: float
    first: int = 0
    counts: defaultdict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    spent: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    findings: list[str] = field(default_factory=list)
    recent: dict[str, deque[Callable[[], str]]] = field(default_factory=lambda: {lane: deque(maxlen=_KEPT) for lane in LANES})
    _until: float = 0.0

    def begin(self) -> None:
        """The time runs from now on."""
        self._until = time.monotonic() + self.seconds

    def stop(self) -> None:
        """No more inputs are begun."""
        self.left = 0

    @property
    def goes_on(self) -> bool:
        """Whether another input is to be begun."""
        return self.left > 0 and time.monotonic() < self._until and len(self.findings) < _MOST_FINDINGS

    def find(self, what: str) -> None:
        """Note what is wrong."""
        self.findings.append(what)
        print(f"FOUND {what[:400]}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class _Input:
    """An input to be sent.

    Attributes:
        kind: What is wrong with it.
        show: What it is, for people and to make it again.
        send: Sends it; what came of it, and what is wrong with that, or ``None``.
    """

    kind: str
    show: Callable[[], str]
    send: Callable[[], Awaitable[tuple[str, str | None]]]


async def drive(run: Run, lanes: Sequence[str], target: str, names: Names) -> None:
    """Send inputs of these lanes until the run is over."""
    await asyncio.gather(*(_port(run, target, names) if lane == "port" else _calls(run, lane, target, names) for lane in lanes))


async def _calls(run: Run, lane: str, target: str, names: Names) -> None:
    """Requests, and what is wrong with their answers."""
    maker, caller = RequestMaker(run.seed, lane, names), Caller(target, _CONNECTIONS)

    def make(number: int) -> _Input:
        request = maker.request(number)

        def show() -> str:
            data = request.data()
            return (
                f"lane={lane} number={number} seed={run.seed} kind={request.kind} path={request.path[:80]} timeout={request.timeout:g} "
                f"cancel_after={request.cancel_after:g} compressed={request.compressed} metadata={request.metadata!r:.2000} "
                f"bytes={len(data)} hex={data[:_SHOWN].hex()}"
            )

        async def send() -> tuple[str, str | None]:
            answer = await caller.call(request)
            return answer.label, problem(request, answer)

        return _Input(request.kind, show, send)

    try:
        await _lane(run, lane, make)
    finally:
        await caller.close()


async def _port(run: Run, target: str, names: Names) -> None:
    """Bytes on the port."""
    fuzz = await PortFuzz.recorded(run.seed, target, names)

    def make(number: int) -> _Input:
        attack = fuzz.attack(number)

        def show() -> str:
            data = b"".join(attack.pieces)
            return (
                f"lane=port number={number} seed={run.seed} kind={attack.kind} end={attack.end} pieces={list(map(len, attack.pieces))} "
                f"bytes={len(data)} hex={data[:_SHOWN].hex()}"
            )

        return _Input(attack.kind, show, lambda: fuzz.send(attack))

    await _lane(run, "port", make)


async def _lane(run: Run, lane: str, make: Callable[[int], _Input]) -> None:
    numbers = iter(range(run.first, 1 << 62))

    async def worker() -> None:
        while run.goes_on:
            run.left -= 1
            one = make(next(numbers))
            run.recent[lane].append(one.show)
            began = time.monotonic()
            outcome, wrong = await one.send()
            run.counts[lane, one.kind][outcome] += 1
            run.spent[lane, one.kind] += time.monotonic() - began
            if wrong is not None:
                run.find(f"{wrong}\n{one.show()}")

    await asyncio.gather(*(worker() for _ in range(_AT_ONCE[lane])))
