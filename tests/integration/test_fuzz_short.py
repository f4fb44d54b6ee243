"""A short fuzz of a real server; and that the harness finds what is wrong with one that is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.fuzz.calls import Answer, problem
from tests.fuzz.requests import KINDS, Request, RequestMaker
from tests.fuzz.valid import Names
from tests.fuzz.watch import Sample, Watch, alarms, growth

from ome_tensor.errors import DatasetNotFound
from ome_tensor_proto.methods import METHODS
from ome_tensor_proto.status import to_status

_ROOT = Path(__file__).parents[2]
Code = grpc.StatusCode


def fuzz(*options: object) -> subprocess.CompletedProcess[str]:
    """``python -m tests.fuzz``, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *map(str, options)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@contextmanager
def answering(answer: Callable[[bytes, grpc.ServicerContext], bytes]) -> Iterator[str]:
    """A server that answers every unary call so."""

    class Anything(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    pool = futures.ThreadPoolExecutor(4)
    server = grpc.server(pool, handlers=(Anything(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
        pool.shutdown()


@pytest.mark.slow
def test_a_short_fuzz_finds_nothing(tmp_path: Path) -> None:
    """Every kind of input was sent, and answered as the contract says; the server is what it was."""
    done = fuzz("--seconds", 8, "--seed", 1, "--keep", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in (
        *(f"{lane}: {kind}" for lane in ("requests", "changes") for kind in KINDS),
        "port: ",
        "good reads: good",
    ):
        assert kind in done.stdout
    assert "resident MiB" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_server_that_answers_unknown_is_found(tmp_path: Path) -> None:
    """With the input that shows it, so that it can be sent again."""

    def fail(data: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(Code.UNKNOWN, "oops")
        return b""

    with answering(fail) as target:
        done = fuzz("--inputs", 60, "--seconds", 20, "--seed", 3, "--lane", "requests", "--server", target, "--keep", tmp_path)
        assert done.returncode == 1, done.stdout + done.stderr
        found = (tmp_path / "findings.txt").read_text().splitlines()
        at = next(number for number, line in enumerate(found) if line.startswith("UNKNOWN: 'oops'"))
        words = dict(word.split("=", 1) for word in found[at + 1].split() if "=" in word)
        # The same number is the same input.
        made = RequestMaker(int(words["seed"]), words["lane"], Names()).request(int(words["number"]))
        assert made.data().hex().startswith(words["hex"])
        assert made.path.startswith(words["path"])


_OF_OURS = Request("requests", 0, "built", METHODS["GetDataset"].path, (b"",))
_ERROR = to_status(DatasetNotFound("no dataset", field="key"))
_DETAILS = dict(_ERROR.trailing_metadata)["grpc-status-details-bin"]


@pytest.mark.parametrize(
    "answer,found",
    [
        (Answer(Code.NOT_FOUND, "no dataset", _DETAILS), None),
        (Answer(Code.OK, messages=[b""]), None),
        (Answer(Code.OK, messages=[b"\xff"]), "no GetDatasetResponse"),
        (Answer(Code.NOT_FOUND, "no dataset"), "no details"),
        (Answer(Code.DATA_LOSS, "no dataset", _DETAILS), "reason 'DATASET_NOT_FOUND'"),
        (Answer(Code.NOT_FOUND, "no dataset", b"\xff"), "no Status"),
        (Answer(Code.INTERNAL, "", _DETAILS), "INTERNAL"),
        (Answer(Code.INTERNAL, "Exception deserializing request!"), "INTERNAL"),
        (Answer(Code.UNAVAILABLE, "Socket closed"), "no details"),
        (Answer(Code.DEADLINE_EXCEEDED, "Deadline Exceeded"), "no answer within"),
        (Answer(Code.UNIMPLEMENTED, "Method not found!"), "is not found"),
        (Answer(Code.NOT_FOUND, 'Traceback (most recent call last):\n  File "x"', _DETAILS), "insides"),
        (Answer(Code.CANCELLED, given_up=True), None),
    ],
    ids=lambda value: value.code.name if isinstance(value, Answer) else "",
)
def test_what_is_wrong_with_an_answer(answer: Answer, found: str | None) -> None:
    """Each rule by itself."""
    wrong = problem(_OF_OURS, answer)
    assert (wrong is None) == (found is None)
    assert found is None or found in (wrong or "")


def test_growth_is_found() -> None:
    """Of each thing that is measured; a little more is none."""
    calm = Sample(100 << 20, 20, 30, 1)
    assert growth(Watch(calm, [calm] * 40, calm)) == []
    assert growth(Watch(calm, [calm] * 40, Sample(120 << 20, 25, 40, 2))) == []
    for grown in (
        Sample(300 << 20, 20, 30, 1),
        Sample(100 << 20, 200, 30, 1),
        Sample(100 << 20, 20, 300, 1),
        Sample(100 << 20, 20, 30, 20),
    ):
        assert growth(Watch(calm, [calm] * 40, grown)), grown
    leak = [Sample((100 + 10 * at) << 20, 20, 30, 1) for at in range(40)]
    assert "resident MiB grew" in growth(Watch(calm, leak, calm))[0]


def test_alarms_in_a_log_are_found() -> None:
    """A traceback is one, with what announces it."""
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\nValueError: x\n'
    assert alarms("serving 5 datasets\n") == []
    assert len(alarms("ERROR unexpected method=ReadTiles\n" + trace + "serving 5 datasets\n" + trace)) == 2
