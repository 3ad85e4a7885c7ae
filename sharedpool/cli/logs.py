"""The log of `sharedpool broker` and `sharedpool run`: on stderr, one event a line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the subject of the event.

    The subject is a record's `extra={"sharedpool": ...}`: any of pool, lease, session, epoch,
    reason.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        event: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "sharedpool", {}),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


def log_option(command: F) -> F:
    """Add the option --log-format."""
    option = click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        envvar="SHAREDPOOL_LOG_FORMAT",
        show_envvar=True,
        help="Format of the log on stderr. json: one object a line with time, level, logger,"
        " message and, where they apply, pool, lease, session, epoch, reason.",
    )
    return option(command)


def log_to_stderr(log_format: str) -> None:
    """Send the log to stderr, one event a line."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
