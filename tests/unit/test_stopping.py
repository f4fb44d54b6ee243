"""Signals as requests to stop: at whatever moment they come, none can make a server hang."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

_WAITING = """
import signal, threading
from ome_tensor_server.stopping import StopRequests

hurried = threading.Semaphore(0)
stop = StopRequests(signal.SIGTERM, hurry=hurried.release)
print("ready", flush=True)
while not stop.asked.wait(0.0001):
    pass
print("asked", flush=True)
for _ in range(19):
    hurried.acquire()
# Python itself takes the handlers away before it ends.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("hurried", flush=True)
"""


def test_signals_come_at_any_moment() -> None:
    """Twenty of them, while the main thread is in and out of the very lock that an Event.set() in a handler would wait for."""
    for attempt in range(5):
        with subprocess.Popen([sys.executable, "-c", _WAITING], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "ready\n"
                time.sleep(0.001 * attempt)
                for sent in range(20):
                    process.send_signal(signal.SIGTERM)
                    # The system merges signals that are still pending: each must have been seen before the next.
                    if sent == 0:
                        assert process.stdout.readline() == "asked\n"
                    time.sleep(0.005)
                # A merged one would be missing for ever.
                for _ in range(100):
                    if process.poll() is not None:
                        break
                    process.send_signal(signal.SIGTERM)
                    time.sleep(0.02)
                assert process.wait(20) == 0
                assert process.stdout.readline() == "hurried\n"
            finally:
                process.kill()
