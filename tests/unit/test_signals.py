"""Signals that end a command."""

from __future__ import annotations

import os
import signal
import time
import weakref

import pytest

from ome_tensor_client.signals import unwinding


class _Thing:
    pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_runs(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def work() -> None:
        with unwinding():
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_inside_a_finaliser_ends_what_runs_all_the_same() -> None:
    """Python drops what is raised there."""

    def finalise(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)

    def work() -> None:
        thing = _Thing()
        kept = weakref.ref(thing, finalise)
        with unwinding():
            del thing
            assert kept() is None
            time.sleep(10)

    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - began < 5
