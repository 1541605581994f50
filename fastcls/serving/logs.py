"""What a server logs: a line each, as text or as JSON, and never a text of anybody's."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

_RESERVED = frozenset(vars(logging.makeLogRecord({})))


class _Fields(logging.Formatter):
    """A record's time, level and message, and behind them what was passed as ``extra``."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _RESERVED and name != "message"}
        error = self.formatException(record.exc_info) if record.exc_info else None
        at = self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03}"
        if self._as_json:
            fields: dict[str, Any] = {"timestamp": at, "level": record.levelname, "message": record.getMessage()}
            return json.dumps({**fields, **extra, **({"error": error} if error else {})}, default=str)
        # A path may hold what moves a terminal's cursor.
        printable = {name: value if str(value).isprintable() else ascii(value) for name, value in extra.items()}
        shown = "".join(f" {name}={value}" for name, value in printable.items())
        return f"{at} {record.levelname} {record.getMessage()}{shown}" + ("" if error is None else f"\n{error}")


def set_up(level: str, *, as_json: bool) -> None:
    """Has the server, and what it stands on, log to stderr.

    Args:
        level: "debug", "info", "warning" or "error".
        as_json: one JSON object a line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Fields(as_json=as_json))
    for name in ("fastcls.serving", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    # Of uvicorn what goes wrong is enough.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger("uvicorn").level))


def say(message: str, **fields: Any) -> None:
    """Logs what happens to the server as a whole."""
    logging.getLogger(__package__).info(message, extra=fields)
