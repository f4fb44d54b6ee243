"""The engine in this process, beside its peers: upstream's TensorView, and NumPy on the same pixels as the floor.

All three answer the same requests in turn, so that a machine's bad minute is everybody's. Every single result is compared with NumPy.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from ome_arrow.tensor import TensorView as UpstreamView

from ome_tensor import TensorView

from .data import FULL, QUICK, Shape, byte_chunks, list_chunks, make_image, stored_planes
from .report import environment, number, print_table, write_json, yes_no

__all__ = ["Bar", "Case", "Figures", "Round", "main", "measure", "run"]

ROI = 256
TILE = 512

#: Where a request begins, along z, c, y, x; each case uses what it needs.
Place = tuple[int, int, int, int]
#: Answers a request by one or more arrays, or by objects that NumPy takes through DLPack, made one by one as they are asked for.
Reader = Callable[[Place], Iterator[Any]]


@dataclass(frozen=True)
class Bar:
    """What a case is held to; ``None`` where to nothing.

    Attributes:
        upstream: At least this many times as fast as upstream.
        floor: At least this share of NumPy's speed.
        over_us: Less than this many microseconds more than NumPy.
    """

    upstream: float | None = None
    floor: float | None = None
    over_us: float | None = None

    def __str__(self) -> str:
        parts = (("≥ {:g}x upstream", self.upstream), ("≥ {:g}x floor", self.floor), ("< {:g} µs over", self.over_us))
        return ", ".join(text.format(value) for text, value in parts if value is not None)


@dataclass(frozen=True)
class Case:
    """One kind of request to one encoding.

    Attributes:
        encoding: How the pixels are stored.
        name: What is asked for.
        ours, upstream, floor: Who answers. The floor's answers are the expected ones.
        expected: The arrays that all must give, as views of the image: nothing is copied before the clock runs.
        bar: What it is held to.
        cold: Whether its pixels are to come from memory rather than from the processor's cache.
        fast, slow: Requests a round for ours and the floor, and for upstream, which takes up to a second for one.
    """

    encoding: str
    name: str
    ours: Reader
    upstream: Reader
    floor: Reader
    expected: Callable[[Place], Iterable[np.ndarray]]
    bar: Bar
    fast: int
    slow: int
    cold: bool = False


@dataclass(frozen=True)
class Round:
    """Median seconds for a request in one round."""

    ours: float
    upstream: float
    floor: float


@dataclass(frozen=True)
class Figures:
    """A case's result: medians over the rounds of times, and of each round's ratios.

    Attributes:
        ours_ms, upstream_ms, floor_ms: Milliseconds a request.
        upstream_ratio: How many times as fast as upstream.
        floor_ratio: Share of NumPy's speed.
        over_us: Microseconds more than NumPy.
        met: Whether the bar is met; ``None`` without one.
    """

    encoding: str
    case: str
    ours_ms: float
    upstream_ms: float
    floor_ms: float
    upstream_ratio: float
    floor_ratio: float
    over_us: float
    bar: str
    met: bool | None

    @classmethod
    def of(cls, case: Case, rounds: Sequence[Round]) -> Figures:
        """From the rounds of a case."""
        upstream = median(r.upstream / r.ours for r in rounds)
        floor = median(r.floor / r.ours for r in rounds)
        over = median((r.ours - r.floor) * 1e6 for r in rounds)
        bar = case.bar
        verdicts = [
            verdict
            for limit, verdict in (
                (bar.upstream, bar.upstream is not None and upstream >= bar.upstream),
                (bar.floor, bar.floor is not None and floor >= bar.floor),
                (bar.over_us, bar.over_us is not None and over < bar.over_us),
            )
            if limit is not None
        ]
        ours, theirs, numpys = (median(getattr(r, who) for r in rounds) * 1e3 for who in ("ours", "upstream", "floor"))
        met = all(verdicts) if verdicts else None
        return cls(case.encoding, case.name, ours, theirs, numpys, upstream, floor, over, str(bar), met)


def seconds(read: Reader, place: Place, expected: Iterable[np.ndarray], who: str) -> float:
    """Time one request. Only the making of answers is on the clock: not their comparison, nor their release."""
    clock = time.perf_counter
    start = clock()
    answers = read(place)
    total = clock() - start
    for turn, want in enumerate(expected):
        start = clock()
        answer = next(answers)
        total += clock() - start
        got = answer if isinstance(answer, np.ndarray) else np.from_dlpack(answer)
        if got.dtype != want.dtype or not np.array_equal(got, want):
            raise AssertionError(f"{who}: answer {turn} for {place} is not what NumPy gives")
        del answer, got
    if next(answers, None) is not None:
        raise AssertionError(f"{who}: more answers for {place} than there should be")
    return total


def measure(case: Case, places: Sequence[Place], rounds: int) -> Figures:
    """Run a case: ours and the floor in turn, upstream now and then between them.

    Each timed request follows an untimed one of the same kind: measured is a loop's steady state, in which nobody's code or memory has just been
    pushed out by a comparison or by another's work. It is for the same place, so that a small request's pixels are in the processor's cache for
    everyone, as they were where CONFORMANCE's floor of 0.006 ms was measured; a cold case's is for another place, and its pixels are not.
    """

    def timed(read: Reader, who: str, turn: int) -> float:
        place = places[turn % len(places)]
        # Upstream's requests of half a second are warm after their first hundredth.
        if who != "upstream" or case.slow > 1:
            deque(read(places[(turn + len(places) // 3) % len(places)] if case.cold else place), maxlen=0)
        return seconds(read, place, case.expected(place), who)

    found = []
    for _ in range(rounds):
        ours, upstream, floor = [], [], []
        for turn in range(case.fast):
            ours.append(timed(case.ours, "ours", turn))
            # A floor that reads what the comparison has just brought into the cache would be no floor.
            floor.append(timed(case.floor, "floor", turn + len(places) // 2))
            if turn * case.slow // case.fast != (turn + 1) * case.slow // case.fast:
                upstream.append(timed(case.upstream, "upstream", turn))
        found.append(Round(median(ours), median(upstream), median(floor)))
    return Figures.of(case, found)


# -- cases -------------------------------------------------------------------------------------------------------------------------


def _reader(view_of: Callable[..., Any], data: Any) -> Reader:
    """A 256² ROI of one plane, view made anew."""

    def read(place: Place) -> Iterator[np.ndarray]:
        z, c, y, x = place
        yield view_of(data, z=z, c=c, roi=(x, y, ROI, ROI)).to_numpy()

    return read


def _deep_reader(view_of: Callable[..., Any], data: Any) -> Reader:
    """A 256² ROI of every plane, view made anew."""

    def read(place: Place) -> Iterator[np.ndarray]:
        _, _, y, x = place
        yield view_of(data, roi=(x, y, ROI, ROI)).to_numpy()

    return read


def _tile_reader(view_of: Callable[..., Any], data: Any) -> Reader:
    """All 512² tiles of all channels of one z."""

    def read(place: Place) -> Iterator[Any]:
        return iter(view_of(data, z=place[0]).iter_dlpack(tile_size=(TILE, TILE), mode="numpy"))

    return read


def _tiles_of(image: np.ndarray, z: int) -> Iterator[np.ndarray]:
    for y, x in product(range(0, image.shape[3], TILE), range(0, image.shape[4], TILE)):
        yield image[0, z, :, y : y + TILE, x : x + TILE]


def cases_of(encoding: str, data: pa.StructArray, image: np.ndarray) -> Iterator[Case]:
    """The cases every encoding of the large image is measured by."""

    def plane_roi(place: Place) -> np.ndarray:
        z, c, y, x = place
        return image[0, z, c : c + 1, y : y + ROI, x : x + ROI]

    def deep_roi(place: Place) -> np.ndarray:
        return image[:, :, :, place[2] : place[2] + ROI, place[3] : place[3] + ROI]

    def copies(views: Callable[[Place], Iterable[np.ndarray]]) -> Reader:
        return lambda place: (np.ascontiguousarray(view) for view in views(place))

    def one(view: Callable[[Place], np.ndarray]) -> Callable[[Place], Iterable[np.ndarray]]:
        return lambda place: (view(place),)

    def tiles(place: Place) -> Iterator[np.ndarray]:
        return _tiles_of(image, place[0])

    nz, nc, ny, nx = image.shape[1:]
    roi = f"{ROI}² ROI of one plane"
    for name, reader, expected, bar, fast, few in (
        (roi, _reader, one(plane_roi), Bar(upstream=300, over_us=60), 300, 8),
        (f"{roi}, cold", _reader, one(plane_roi), Bar(), 300, 2),
        (
            f"{TILE}² tiles of {nc} channels ({ny // TILE * (nx // TILE)} tiles)",
            _tile_reader,
            tiles,
            Bar(upstream=100, floor=0.5),
            12,
            1,
        ),
        (f"{ROI}² ROI over {nz * nc} planes", _deep_reader, one(deep_roi), Bar(floor=0.5), 40, 1),
    ):
        yield Case(
            encoding,
            name,
            reader(TensorView, data),
            reader(UpstreamView, data),
            copies(expected),
            expected,
            bar,
            fast,
            few,
            cold=name.endswith("cold"),
        )


def scalar_cases(image: np.ndarray) -> Iterator[Case]:
    """Records that are no array: upstream turns each of their pixels into a Python object, so they are small (one plane).

    Ours cannot remember an index for them, so this is also what the first view of any record costs.
    """
    scalar = stored_planes(image)[0]

    def plane_roi(place: Place) -> Iterable[np.ndarray]:
        return (image[0, 0, :, place[2] : place[2] + ROI, place[3] : place[3] + ROI],)

    def floor(place: Place) -> Iterator[np.ndarray]:
        return map(np.ascontiguousarray, plane_roi(place))

    for name, data, fast in (("StructScalar", scalar, 100), ("dict of lists", scalar.as_py(), 8)):
        yield Case(
            f"{name}, {image.size / 2**20:g} Mpixel plane",
            f"{ROI}² ROI of one plane",
            _reader_at_origin(TensorView, data),
            _reader_at_origin(UpstreamView, data),
            floor,
            plane_roi,
            Bar(),
            fast,
            2,
        )


def _reader_at_origin(view_of: Callable[..., Any], data: Any) -> Reader:
    """:func:`_reader` on an image of one plane."""
    read = _reader(view_of, data)
    return lambda place: read((0, 0, place[2], place[3]))


def places_in(shape: Sequence[int], count: int, seed: int) -> list[Place]:
    """Random places of a 256² ROI; z in turn, so that every round of tiles visits all depths."""
    rng = np.random.default_rng(seed)
    _, nz, nc, ny, nx = shape
    return [
        (turn % nz, int(rng.integers(nc)), int(rng.integers(ny - ROI + 1)), int(rng.integers(nx - ROI + 1)))
        for turn in range(count)
    ]


def first_view_ms(data: pa.StructArray, rounds: int) -> float:
    """What the first view of a record costs beyond a later one: its metadata and its index, built once for an array."""
    times = []
    for _ in range(rounds):
        fresh = data.slice(0)  # Another Arrow object on the same buffers: nothing is remembered of it.
        start = time.perf_counter()
        TensorView(fresh, z=0, c=0, roi=(0, 0, 1, 1)).to_numpy()
        times.append(time.perf_counter() - start)
    return median(times) * 1e3


# -- running -----------------------------------------------------------------------------------------------------------------------


def run(*, quick: bool = False, rounds: int | None = None) -> tuple[list[Figures], dict[str, float]]:
    """Measure everything; gives the figures, and the first view's milliseconds by encoding."""
    shape: Shape = QUICK if quick else FULL
    rounds = rounds or (1 if quick else 5)
    image = make_image(shape)
    places = places_in(shape, 64, seed=7)
    figures: list[Figures] = []
    first: dict[str, float] = {}
    encodings: tuple[tuple[str, Callable[[], pa.StructArray]], ...] = (
        ("stored planes", lambda: stored_planes(image)),
        ("list chunks 512²", lambda: list_chunks(image, (1, TILE, TILE))),
        ("byte chunks 512²", lambda: byte_chunks(image, (1, TILE, TILE))),
        ("list chunks 4×512²", lambda: list_chunks(image, (4, TILE, TILE))),
    )
    for encoding, build in encodings:
        # One at a time: each is as large as the image.
        data = build()
        first[encoding] = first_view_ms(data, 5)
        for case in cases_of(encoding, data, image):
            figures.append(measure(case, places, rounds))
            del case
        del data
    plane = np.ascontiguousarray(image[:, :1, :1, :1024, :1024])
    figures += [measure(case, places_in(plane.shape, 64, seed=7), rounds) for case in scalar_cases(plane)]
    return figures, first


def show(figures: Sequence[Figures], first: dict[str, float], shape: Shape) -> None:
    """Print the tables."""
    megabytes = int(np.prod(shape)) * 2 / 1e6
    title = f"Engine: {megabytes:.0f} MB image, TZCYX {shape}, uint16; " + ", ".join(
        f"{name} {what}" for name, what in environment().items() if name not in ("grpcio", "protobuf")
    )
    print_table(
        title,
        ("encoding", "case", "ours ms", "upstream ms", "NumPy ms", "x upstream", "x NumPy", "µs over", "bar", "met"),
        [
            (
                f.encoding,
                f.case,
                number(f.ours_ms),
                number(f.upstream_ms),
                number(f.floor_ms),
                number(f.upstream_ratio),
                number(f.floor_ratio, 2),
                number(f.over_us),
                f.bar,
                yes_no(f.met),
            )
            for f in figures
        ],
    )
    print_table(
        "First view of a record (index built, once)", ("encoding", "ms"), [(name, number(ms)) for name, ms in first.items()]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small image and one round: shows that it works, not how fast it is"
    )
    parser.add_argument("--rounds", type=int, help="rounds that medians are taken over (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    figures, first = run(quick=options.quick, rounds=options.rounds)
    show(figures, first, QUICK if options.quick else FULL)
    if options.json:
        write_json(options.json, "engine", {"cases": [asdict(f) for f in figures], "first_view_ms": first})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
