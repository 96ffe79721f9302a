"""The declared events, the log of them, and the file it is written to."""

from __future__ import annotations

import ast
import json
import logging
import re
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from gpumanager.config import EventsConfig, parse_config
from gpumanager.telemetry.eventfile import EventFile
from gpumanager.telemetry.eventlog import EventLog, Recorded
from gpumanager.telemetry.events import (
    EVENTS,
    FIELDS,
    PRIVATE,
    ConfigReloaded,
    Event,
    Loaded,
    Pinned,
    Started,
    Unhealthy,
    fields_of,
)
from gpumanager.web.openapi import describe
from tests.support.clock import FakeClock
from tests.support.events import evicted, recorded, refused

PACKAGE = Path(__file__).parent.parent.parent / "gpumanager"
SENTENCES = PACKAGE / "web" / "static" / "sentences.js"
MODULES = {
    path: ast.parse(path.read_text("utf-8"))
    for path in PACKAGE.rglob("*.py")
    if path.name != "events.py"
}


def make(keep: int = 100) -> EventLog:
    return EventLog(FakeClock(), keep=keep)


def pinned(*names: str, keep: int = 100) -> EventLog:
    """A log with an event for each name."""
    events = make(keep)
    for name in names:
        events.emit(Pinned(consumer=name))
    return events


def consumers(events: tuple[Recorded, ...]) -> list[str]:
    return [each.fields["consumer"] for each in events]


# -- what is declared ----------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS.values(), ids=list(EVENTS))
def test_every_declared_event_is_emitted_somewhere(event: type[Event]) -> None:
    made = {
        ast.unparse(node.func).removeprefix("events.")
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    assert event.__name__ in made


def test_nothing_is_emitted_that_is_not_declared() -> None:
    """That what is emitted is an Event, mypy sees; that no other module makes up its own, this."""
    assert {each for each in Event.__subclasses__() if "name" in vars(each)} == set(EVENTS.values())
    bases = {
        ast.unparse(base): path
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    }
    named = {"Event", *(each.__name__ for each in EVENTS.values())}
    assert not {base for base in bases if base.removeprefix("events.") in named}


def test_every_field_is_described_once_and_none_in_vain() -> None:
    used = {name for event in EVENTS.values() for name in fields_of(event)}
    assert used == set(FIELDS)
    assert used >= PRIVATE


@pytest.mark.parametrize("event", EVENTS.values(), ids=list(EVENTS))
def test_a_declaration_is_whole(event: type[Event]) -> None:
    assert re.fullmatch("[a-z]+(_[a-z]+)*", event.name)
    assert event.__doc__ is not None
    assert not event.__doc__.startswith(event.__name__)
    taken = {*vars(logging.makeLogRecord({})), "message", "asctime", "time", "level", "event"}
    assert not taken & set(fields_of(event))


def test_the_dashboard_has_a_sentence_for_every_event_and_knows_its_fields() -> None:
    text = SENTENCES.read_text("utf-8")
    table = text[text.index("const SENTENCES = {") :]
    table = table[: table.index("\n};")]
    shorthand, *_ = re.findall(r"\{\n  ([\w, ]+),\n", table)
    own = dict(re.findall(r"^  (\w+): (\(.*?)(?=^  \w+: |\Z)", table, re.MULTILINE | re.DOTALL))
    assert {*own, *shorthand.split(", ")} == set(EVENTS)
    for name in shorthand.split(", "):
        own[name] = text[text.index(f"function {name}(e) {{") :].partition("\n}")[0]
    for name, code in own.items():
        assert set(re.findall(r"\be\.(\w+)", code)) <= {*fields_of(EVENTS[name])}, name


VALUES: dict[str, Any] = {
    "string": "x",
    "integer": 7,
    "boolean": True,
    "number": 0.5,
    "array": ["x"],
}


@pytest.mark.parametrize("event", EVENTS.values(), ids=list(EVENTS))
def test_what_is_told_is_what_is_described(event: type[Event]) -> None:
    document = describe(parse_config("{}"), "1", keys=False)
    schema = Draft202012Validator({**document, "$ref": "#/components/schemas/Event"})
    (shapes,) = (
        each["properties"]
        for each in document["components"]["schemas"]["Event"]["oneOf"]
        if each["properties"]["event"]["const"] == event.name
    )
    values = {
        name: shapes[name]["enum"][0] if "enum" in shapes[name] else VALUES[shapes[name]["type"]]
        for name in fields_of(event)
    }
    told = recorded(event(**values)).as_json()
    schema.validate(told)
    assert not schema.is_valid({**told, "event": "another"})
    for name in values:
        assert not schema.is_valid({**told, name: {}}), name
    needed = {name for name, each in fields_of(event).items() if each.default is MISSING}
    least = recorded(event(**{name: values[name] for name in needed})).as_json()
    schema.validate({name: each for name, each in least.items() if name not in PRIVATE})
    for name in needed - PRIVATE:
        assert not schema.is_valid({key: each for key, each in least.items() if key != name}), name


# -- the log of them -----------------------------------------------------------------------------


def test_events_have_numbers_that_rise_by_one() -> None:
    found = pinned("a", "b", "c").since(0)
    assert [(each.number, each.fields["consumer"]) for each in found.events] == [
        (1, "a"),
        (2, "b"),
        (3, "c"),
    ]
    assert (found.last, found.missed) == (3, 0)
    assert found.events[0].as_json() == {
        "number": 1,
        "time": found.events[0].as_json()["time"],
        "event": "pinned",
        "level": "info",
        "consumer": "a",
    }


def test_what_is_not_known_is_left_out() -> None:
    assert ConfigReloaded(added=("tts",)).fields == {"added": ["tts"]}


def test_a_reader_goes_on_where_it_was() -> None:
    events = pinned(*"0123456789")
    first = events.since(0, limit=4)
    assert consumers(first.events) == list("0123")
    assert consumers(events.since(first.last).events) == list("456789")


def test_what_is_kept_no_more_is_counted() -> None:
    found = pinned(*"0123456789", keep=3).since(2)
    assert [each.number for each in found.events] == [8, 9, 10]
    assert found.missed == 5


def test_a_number_of_an_earlier_run_begins_anew() -> None:
    events = make()
    events.emit(Started(version="1"))
    assert [each.event.name for each in events.since(999).events] == ["started"]
    assert make().boot != make().boot


def test_what_is_not_kept_is_told_to_listeners_only() -> None:
    events, heard = make(), list[Recorded]()
    events.listen(heard.append)
    events.emit(refused(None))
    events.emit(refused("it"))
    assert [each.fields.get("consumer") for each in heard] == [None, "it"]
    assert consumers(events.since(0).events) == ["it"]


def test_a_listener_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    events, heard = make(), list[Recorded]()

    def fails(event: Recorded) -> None:
        raise ValueError(event)

    events.listen(fails)
    events.listen(heard.append)
    events.emit(Pinned(consumer="it"))
    assert len(heard) == 1
    assert "a listener failed" in caplog.text


def test_the_log_has_a_line_with_the_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gpumanager.events")
    events = make()
    events.emit(Unhealthy(consumer="it", reason="refused"))
    events.emit(refused("it"))  # which the request's own line says
    (line,) = caplog.records
    assert (line.message, line.levelname) == ("consumer unhealthy", "WARNING")
    fields = vars(line)
    assert (fields["consumer"], fields["reason"]) == ("it", "refused")


@pytest.mark.parametrize(("outcome", "level"), [("released", "info"), ("leaked", "warning")])
def test_a_release_that_failed_is_a_warning(outcome: str, level: str) -> None:
    assert evicted(outcome=outcome).level == level


def test_what_is_quiet_in_the_log_is_an_event_all_the_same() -> None:
    logging.getLogger("gpumanager.events").setLevel(logging.ERROR)
    try:
        events = make()
        events.emit(Loaded(consumer="it", ms=1))
    finally:
        logging.getLogger("gpumanager.events").setLevel(logging.NOTSET)
    assert consumers(events.since(0).events) == ["it"]


# -- the file ------------------------------------------------------------------------------------


def test_the_file_gets_each_event_once(tmp_path: Path) -> None:
    events = make()
    file = EventFile(events, EventsConfig(file=str(tmp_path / "events.jsonl")))
    events.emit(Pinned(consumer="a"))
    file.write()
    file.write()
    events.emit(Pinned(consumer="b"))
    file.close()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(each["number"], each["consumer"]) for each in lines] == [(1, "a"), (2, "b")]


def test_the_file_is_rotated(tmp_path: Path) -> None:
    events = make(keep=1000)
    settings = EventsConfig(file=str(tmp_path / "events.jsonl"), max_mib=1, keep_files=2)
    file = EventFile(events, settings)
    for _ in range(5):
        for _ in range(40):
            events.emit(Pinned(consumer="x" * 10_000))
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
    events.emit(Pinned(consumer="a"))
    file.write()
    file.write()
    assert caplog.text.count("events not written") == 1
    (tmp_path / "later").mkdir()
    file.close()
    assert "number" in (tmp_path / "later" / "events.jsonl").read_text()
