"""Which method is carried out how, and what is needed to undo it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import yaml

from gpumanager.config import parse_config
from gpumanager.errors import ConsumerUnreachable
from gpumanager.host import checkpoint, engine, signals, units
from gpumanager.host.errors import ReclaimFailed
from gpumanager.model import StoppedBy
from gpumanager.residency.stopping import Stopping

ME = os.getpid()


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was done to whom, instead of doing it."""
    calls: list[tuple[Any, ...]] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *arguments: calls.append((what, *arguments))

    for module in (units, engine):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "stop", note(f"{name}.stop"))
        monkeypatch.setattr(module, "start", note(f"{name}.start"))
    monkeypatch.setattr(signals, "end", note("signals.end"))
    monkeypatch.setattr(signals, "start", note("signals.start"))
    monkeypatch.setattr(checkpoint, "suspend", note("suspend"))
    monkeypatch.setattr(checkpoint, "resume", note("resume"))
    return calls


def stopping(*eviction_methods: Any, on_card: tuple[int, ...] = (ME,)) -> Stopping:
    consumer = {"url": "http://127.0.0.1:1", "evict": list(eviction_methods), "ready_timeout": 9}
    config = parse_config(yaml.safe_dump({"consumers": {"it": consumer}}))
    return Stopping(config, listening=lambda name: [7, 8], on_card=lambda name: on_card)


@pytest.mark.parametrize(
    ("method", "stopped", "started"),
    [
        (
            {"unit": "it.service", "scope": "system", "grace": 3},
            ("units.stop", "it.service", "system", 3),
            ("units.start", "it.service", "system", 9),
        ),
        (
            {"container": "it", "socket": "/run/x.sock"},
            ("engine.stop", "it", "/run/x.sock", 10),
            ("engine.start", "it", "/run/x.sock", 9),
        ),
        (
            {"signal": "INT", "start": ["serve", "it"]},
            ("signals.end", [7, 8], "INT", 10),
            ("signals.start", ("serve", "it")),
        ),
        ({"signal": "TERM"}, ("signals.end", [7, 8], "TERM", 10), None),
    ],
)
def test_who_is_stopped_can_be_started(
    done: list[tuple[Any, ...]], method: Any, stopped: Any, started: Any
) -> None:
    one = stopping(method)
    config_method = one._config.consumers["it"].eviction_methods[0]
    stopped_by = one.stop("it", config_method)
    assert stopped_by == StoppedBy(config_method.name)
    assert not one.bring_back("it", stopped_by)  # it has yet to get ready
    assert done == [stopped] if started is None else [stopped, started]


def test_a_checkpoint_remembers_whom_it_holds(done: list[tuple[Any, ...]]) -> None:
    one = stopping({"checkpoint": True, "grace": 20})
    stopped_by = one.stop("it", one._config.consumers["it"].eviction_methods[0])
    assert stopped_by.processes == ((ME, psutil.Process(ME).create_time()),)
    assert one.bring_back("it", stopped_by)
    assert done == [("suspend", [ME], 20), ("resume", [ME], 20)]


def test_a_pid_that_is_another_process_by_now_is_left_alone(done: list[tuple[Any, ...]]) -> None:
    one = stopping({"checkpoint": True})
    assert not one.bring_back("it", StoppedBy("checkpoint", ((ME, 12345.0), (2**22 + 7, 1.0))))
    assert done == [("resume", [], 10)]


@pytest.mark.parametrize(
    ("on_card", "driver", "how"),
    [
        ((), True, None),
        ((ME,), True, "resumed"),
        ((ME,), False, None),
        ((ME,), ReclaimFailed("no driver"), None),
    ],
)
def test_a_consumer_is_back_by_itself_when_the_driver_says_so(
    monkeypatch: pytest.MonkeyPatch, on_card: tuple[int, ...], driver: Any, how: str | None
) -> None:
    def run_on(pids: list[int], step_s: float) -> bool:
        assert pids == [ME]
        if isinstance(driver, ReclaimFailed):
            raise driver
        return bool(driver)

    monkeypatch.setattr(checkpoint, "run_on", run_on)
    stopped_by = StoppedBy("checkpoint", ((ME, psutil.Process(ME).create_time()),))
    assert stopping({"checkpoint": True}, on_card=on_card).returned("it", stopped_by) == how


def test_a_consumer_whose_processes_ended_was_replaced() -> None:
    one = stopping({"checkpoint": True})
    assert one.returned("it", StoppedBy("checkpoint", ((ME, 12345.0),))) == "replaced"


def if_stopped_by(one: Stopping, stopped_by: StoppedBy | None) -> None:
    if stopped_by is None:
        one.stop("it", one._config.consumers["it"].eviction_methods[0])
    else:
        one.bring_back("it", stopped_by)


@pytest.mark.parametrize(
    ("method", "stopped_by", "words"),
    [
        ({"checkpoint": True}, None, "it: its processes on the card cannot be seen"),
        ({"unit": "it.service"}, StoppedBy("container"), "which `evict` no longer names"),
        ({"unit": "it.service"}, None, "it: no such unit"),
    ],
)
def test_what_cannot_be_done_is_told(
    done: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    method: Any,
    stopped_by: StoppedBy | None,
    words: str,
) -> None:
    def fail(*_: object) -> None:
        raise ReclaimFailed("no such unit")

    monkeypatch.setattr(units, "stop", fail)
    one = stopping(method, on_card=())
    with pytest.raises(ConsumerUnreachable, match=words):
        if_stopped_by(one, stopped_by)


def test_an_unload_call_is_no_way_to_stop_a_process() -> None:
    from gpumanager.config.memory import HTTP

    with pytest.raises(ConsumerUnreachable, match="http is no way"):
        stopping({"unit": "it.service"}).stop("it", HTTP)
