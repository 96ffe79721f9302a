"""The event log, and the file it is written to."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from gpumanager.config import EventsConfig
from gpumanager.events import LOGGED, Event, EventHandler, EventLog
from gpumanager.monitoring.eventfile import EventFile
from tests.support.clock import FakeClock

PACKAGE = Path(__file__).parent.parent / "gpumanager"


def make(keep: int = 100) -> EventLog:
    return EventLog(FakeClock(), keep=keep)


def test_events_have_numbers_that_rise_by_one() -> None:
    events = make()
    for name in ("a", "b", "c"):
        events.note(name, {"x": 1, "left_out": None})
    found = events.since(0)
    assert [(each.number, each.name) for each in found.events] == [(1, "a"), (2, "b"), (3, "c")]
    assert (found.last, found.missed) == (3, 0)
    assert found.events[0].as_json()["x"] == 1
    assert "left_out" not in found.events[0].fields


def test_a_reader_goes_on_where_it_was() -> None:
    events = make()
    for number in range(10):
        events.note(str(number), {})
    first = events.since(0, limit=4)
    assert [each.name for each in first.events] == list("0123")
    assert [each.name for each in events.since(first.last).events] == list("456789")


def test_what_is_kept_no_more_is_counted() -> None:
    events = make(keep=3)
    for number in range(10):
        events.note(str(number), {})
    found = events.since(2)
    assert [each.number for each in found.events] == [8, 9, 10]
    assert found.missed == 5


def test_a_number_of_an_earlier_run_begins_anew() -> None:
    events = make()
    events.note("started", {})
    assert [each.name for each in events.since(999).events] == ["started"]
    assert make().boot != make().boot


def test_what_is_not_kept_is_told_to_listeners_only() -> None:
    events, heard = make(), list[Event]()
    events.listen(heard.append)
    events.note("refused", {}, keep=False)
    events.note("job", {})
    assert [each.name for each in heard] == ["refused", "job"]
    assert [each.name for each in events.since(0).events] == ["job"]


def test_a_listener_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    events, heard = make(), list[Event]()

    def fails(event: Event) -> None:
        raise ValueError(event.name)

    events.listen(fails)
    events.listen(heard.append)
    events.note("job", {})
    assert len(heard) == 1
    assert "a listener failed" in caplog.text


def test_log_records_become_events() -> None:
    events = make()
    logger = logging.getLogger("gpumanager.test_events")
    logger.setLevel(logging.INFO)
    handler = EventHandler(events)
    logger.addHandler(handler)
    try:
        logger.warning("consumer unhealthy", extra={"consumer": "it", "reason": "refused"})
        logger.info("something else")
    finally:
        logger.removeHandler(handler)
    (event,) = events.since(0).events
    assert (event.name, event.level) == ("unhealthy", "warning")
    assert event.fields == {"consumer": "it", "reason": "refused"}


@pytest.mark.parametrize("message", sorted(LOGGED))
def test_every_message_that_is_an_event_is_still_logged(message: str) -> None:
    texts = [path.read_text("utf-8") for path in PACKAGE.rglob("*.py") if path.name != "events.py"]
    assert any(f'"{message}"' in text for text in texts)


def test_the_file_gets_each_event_once(tmp_path: Path) -> None:
    events = make()
    file = EventFile(events, EventsConfig(file=str(tmp_path / "events.jsonl")))
    events.note("a", {})
    file.write()
    file.write()
    events.note("b", {"consumer": "it"})
    file.close()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(each["number"], each["event"]) for each in lines] == [(1, "a"), (2, "b")]


def test_the_file_is_rotated(tmp_path: Path) -> None:
    events = make(keep=1000)
    settings = EventsConfig(file=str(tmp_path / "events.jsonl"), max_mib=1, keep_files=2)
    file = EventFile(events, settings)
    for _ in range(5):
        for _ in range(40):
            events.note("big", {"text": "x" * 10_000})
        file.write()
    file.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["events.jsonl", "events.jsonl.1", "events.jsonl.2"]
    assert all(path.stat().st_size <= 1024 * 1024 for path in tmp_path.iterdir())


def test_a_disk_that_takes_nothing_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events = make()
    file = EventFile(events, EventsConfig(file=str(tmp_path / "later" / "events.jsonl")))
    events.note("a", {})
    file.write()
    file.write()
    assert caplog.text.count("events not written") == 1
    (tmp_path / "later").mkdir()
    file.close()
    assert "number" in (tmp_path / "later" / "events.jsonl").read_text()
