"""Structured logs: one line an event on stderr, as ``key=value`` text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

__all__ = ["AUDIT", "Fields", "configure"]

#: Everything of ours logs below this name; a library's user configures it as any other logger.
ROOT = "ome_tensor_server"

#: The logger of who changed what, and of who was refused: it says so at any level.
AUDIT = f"{ROOT}.audit"

#: Characters of a value; clients choose some of them.
_LONGEST = 300


class Fields:
    """A log message made of named values: ``log.info(Fields("call", method="ReadTiles", ms=3.1))``.

    Args:
        event: What happened, one word.
        values: What there is to say of it; ``None`` is left out.
    """

    def __init__(self, event: str, **values: Any) -> None:
        self.event = event
        self.values = {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        return " ".join([self.event, *(f"{name}={_quoted(value)}" for name, value in self.values.items())])


def _quoted(value: object) -> str:
    text = f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "…"
    # A line stays a line, a terminal is not written to, and a value that looks like more fields stays one value.
    if not text.isprintable():
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' "=') else text


class _Text(logging.Formatter):
    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")


class _Json(logging.Formatter):
    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        if isinstance(record.msg, Fields):
            values = {name: value[:_LONGEST] if isinstance(value, str) else value for name, value in record.msg.values.items()}
            line |= {"event": record.msg.event} | values
        else:
            line["event"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(log_format: str, log_level: str) -> None:
    """Send this package's log to stderr. For a server's own process only; a library leaves logging alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logger = logging.getLogger(ROOT)
    logger.handlers[:] = [handler]
    logger.setLevel(log_level.upper())
    logger.propagate = False
    logging.getLogger(AUDIT).setLevel(logging.INFO)
