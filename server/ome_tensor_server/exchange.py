"""How a worker asks its supervisor for what only that one does: loading, registering, removing datasets.

One pair of connected sockets for each worker; a line of JSON for each request and each answer, any number of requests at a time.
"""

from __future__ import annotations

import itertools
import json
import logging
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ome_tensor.errors import OmeTensorError, ServerError, Unavailable
from ome_tensor_proto.status import error_of_reason

from .loads import start_thread
from .logs import Fields

__all__ = ["Asker", "answer_requests"]

_log = logging.getLogger(__name__)

#: What a supervisor does for its workers, by name: a function of JSON values that gives one.
Offices = Callable[[str], Callable[..., Any]]


class Asker:
    """A worker's end.

    Args:
        connection: The socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile("rb")
        self._numbers = itertools.count()
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        threading.Thread(target=self._listen, name="ome-tensor-exchange", daemon=True).start()

    def ask(self, office: str, /, **values: Any) -> Any:
        """What an office gives. Raises what it raised; Unavailable where the supervisor has gone."""
        number = next(self._numbers)
        answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        line = json.dumps({"number": number, "office": office, "values": values}).encode() + b"\n"
        with self._lock:
            self._waiting[number] = answers
            if self._is_closed:
                answers.put(_GONE)
            else:
                try:
                    self._socket.sendall(line)
                except OSError:
                    answers.put(_GONE)
        answer = answers.get()
        with self._lock:
            self._waiting.pop(number, None)
        if "error" in answer:
            error = answer["error"]
            raise error_of_reason(error["reason"], error["message"], error["field"], error["value"])
        return answer["value"]

    def _listen(self) -> None:
        try:
            for line in self._file:
                answer = json.loads(line)
                with self._lock:
                    waiting = self._waiting.get(answer["number"])
                if waiting is not None:
                    waiting.put(answer)
        except (OSError, ValueError):
            pass  # As at its end.
        with self._lock:
            self._is_closed = True
            for waiting in self._waiting.values():
                waiting.put(_GONE)


_GONE: dict[str, Any] = {
    "error": {
        "reason": Unavailable.reason.value,
        "message": "the server is shutting down; try again",
        "field": None,
        "value": None,
    }
}


def answer_requests(connection: socket.socket, offices: Offices) -> None:
    """Answer a worker's requests until it closes its end, each on a thread of its own: a load may take minutes."""
    lock = threading.Lock()

    def serve(request: dict[str, Any], problem: OmeTensorError | None = None) -> None:
        answer: dict[str, Any] = {"number": request["number"]}
        try:
            if problem is not None:
                raise problem
            answer["value"] = offices(request["office"])(**request["values"])
        except Exception as error:
            if not isinstance(error, OmeTensorError):
                _log.exception(Fields("unexpected", office=request["office"]))
                error = ServerError(f"unexpected {type(error).__name__} in {request['office']}; the server's log has the details")
            answer["error"] = {
                "reason": error.reason.value,
                "message": error.message,
                "field": error.field,
                "value": error.value,
            }
        # The worker may have gone, and with it whoever asked.
        with lock, suppress(OSError):
            connection.sendall(json.dumps(answer).encode() + b"\n")

    with connection, connection.makefile("rb") as lines:
        try:
            for line in lines:
                request = json.loads(line)
                try:
                    start_thread(serve, request, name="ome-tensor-office")
                except Unavailable as error:
                    # The next one may find a thread.
                    serve(request, error)
        except (OSError, ValueError):
            return
