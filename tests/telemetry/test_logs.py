"""The two shapes of a log line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from gpumanager.config import LogConfig
from gpumanager.errors import ClientGone, TruncatedAnswer
from gpumanager.telemetry import logs

LOGGERS = ("gpumanager", "waitress", "waitress.queue")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    kept = {}
    for name in LOGGERS:
        logger = logging.getLogger(name)
        kept[name] = (logger.handlers, logger.propagate, logger.level, list(logger.filters))
    yield
    for name, (handlers, propagate, level, filters) in kept.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate, logger.filters = handlers, propagate, filters
        logger.setLevel(level)


def test_logfmt_is_one_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig())
    logging.getLogger("gpumanager.web").info("request", extra={"path": '/a b"\n=', "ms": 1.5})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("time=20")
    assert ' level=INFO logger=gpumanager.web msg=request path="/a b\\"\\n=" ms=1.5' in line


@pytest.mark.parametrize("odd", ["\x85", "\u2028", "\u2029", "\x9b", "\x7f", "\x1b"])
def test_nothing_in_a_line_ends_it_or_drives_a_terminal(odd: str) -> None:
    record = logging.makeLogRecord({"msg": f"said{odd}", "path": f"/a{odd}level=ERROR"})
    for shape in ("logfmt", "json"):
        line = logs.formatter(shape).format(record)
        assert odd not in line
        assert f"\\u{ord(odd):04x}" in line


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig(format="json"))
    try:
        raise ValueError("a\nb")
    except ValueError:
        logging.getLogger("gpumanager.web").exception("failed", extra={"path": "/a\n"})
    (line,) = capsys.readouterr().err.splitlines()
    fields = json.loads(line)
    assert (fields["level"], fields["msg"], fields["path"]) == ("ERROR", "failed", "/a\n")
    assert "ValueError" in fields["exc_info"]


def test_the_level_is_respected(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig(level="warning"))
    logging.getLogger("gpumanager").info("quiet")
    logging.getLogger("gpumanager").warning("loud")
    assert "quiet" not in (err := capsys.readouterr().err)
    assert "loud" in err


def test_configuring_twice_does_not_log_twice(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogConfig())
    logs.configure(LogConfig())
    logging.getLogger("gpumanager").info("once")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_servers_trace_of_a_truncated_answer_is_dropped_and_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure(LogConfig())
    for error in (TruncatedAnswer(ClientGone("left")), RuntimeError("a real one")):
        try:
            raise error
        except (TruncatedAnswer, RuntimeError):
            logging.getLogger("waitress").error("Exception while serving", exc_info=sys.exc_info())
    (line,) = capsys.readouterr().err.splitlines()
    assert "a real one" in line
