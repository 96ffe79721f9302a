"""Structured logs on stderr: one line a request, and events, as logfmt or JSON."""

from __future__ import annotations

import logging
import re
import sys
import time

from logfmter import Logfmter
from pythonjsonlogger.json import JsonFormatter

from gpumanager.config import LogConfig
from gpumanager.errors import TruncatedAnswer

_RAW_CONTROLS = re.compile("[\x7f-\x9f\u2028\u2029]")
_DATE_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def configure(settings: LogConfig) -> None:
    """Send the package's and waitress's logs to stderr in the configured shape."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(settings.format))
    handler.setLevel(settings.level.upper())
    for name in ("gpumanager", "waitress"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(settings.level.upper())
    logging.getLogger("gpumanager.access").setLevel(settings.level.upper())
    # Waitress says "Serving on …" at INFO, which is worth having, but logs a trace for every
    # answer that has to be cut short, which the broker has logged already, and each wait for a
    # free thread, which the queue shows better.
    logging.getLogger("waitress").addFilter(_not_truncated)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


def formatter(shape: str) -> logging.Formatter:
    """A formatter that writes one line a record."""
    if shape == "json":
        made: logging.Formatter = JsonFormatter(
            ["asctime", "levelname", "name", "message"],
            datefmt=_DATE_FORMAT,
            rename_fields={
                "asctime": "time",
                "levelname": "level",
                "name": "logger",
                "message": "msg",
            },
        )
    else:
        made = _OneLine(
            keys=["time", "level", "logger"],
            mapping={
                "time": "asctime",
                "level": "levelname",
                "logger": "name",
            },
            datefmt=_DATE_FORMAT,
        )
    made.converter = time.gmtime
    return made


class _OneLine(Logfmter):
    """Logfmt, which leaves some of what ends a line, or drives a terminal, as it is."""

    def format(self, record: logging.LogRecord) -> str:
        line: str = super().format(record)
        return _RAW_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def _not_truncated(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], TruncatedAnswer))
