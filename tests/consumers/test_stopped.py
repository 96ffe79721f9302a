"""Whom the broker has stopped or unloaded, over its restart."""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest
import yaml

from gpumanager.config import parse_config
from gpumanager.consumers.registry import Registry
from gpumanager.consumers.stopped import Stopped
from gpumanager.model import ProbeReport, StoppedBy
from gpumanager.telemetry.events import Draining, Event, Healthy, Loaded
from tests.support.clock import FakeClock
from tests.support.events import evicted

ME = os.getpid()
MY_BIRTH = psutil.Process(ME).create_time()
SLEEPER = {"load": "/wake", "unload": "/sleep"}


def make(**consumers: dict[str, Any]) -> tuple[Stopped, Registry]:
    named = {name: {"url": "http://127.0.0.1:1", **each} for name, each in consumers.items()}
    config = parse_config(yaml.safe_dump({"consumers": named}))
    registry = Registry(config, FakeClock(), lambda consumer: True)
    return Stopped(registry, lambda name: [ME]), registry


def test_who_was_unloaded_and_cannot_tell_is_remembered_with_its_process() -> None:
    stopped, registry = make(sglang=SLEEPER, lazy={"unload": "/free"}, unit={})
    for name in ("sglang", "lazy"):
        registry.set_loaded(name, False)
    registry.mark_stopped("unit", StoppedBy("unit"))
    assert stopped.now() == {
        "sglang": StoppedBy("http", ((ME, MY_BIRTH),)),
        "unit": StoppedBy("unit"),
    }


@pytest.mark.parametrize("why", ["loaded", "it tells", "it is gone"])
def test_who_need_not_be_remembered_is_not(why: str) -> None:
    stopped, registry = make(vllm=SLEEPER)
    if why != "loaded":
        registry.set_loaded("vllm", False)
    if why == "it tells":
        report = ProbeReport(loaded=False)
        version = registry.get("vllm").residency_version
        registry.probe_succeeded("vllm", report, seen_version=version)
    if why == "it is gone":
        registry.probe_failed("vllm", "refused", process_gone=True)
    assert stopped.now() == {}


@pytest.mark.parametrize(
    ("processes", "loaded"),
    [(((ME, MY_BIRTH),), False), (((ME, 12345.0),), True), ((), False)],
)
def test_it_is_unloaded_still_if_its_process_is_the_same(
    processes: tuple[tuple[int, float], ...], loaded: bool
) -> None:
    """Or if that cannot be seen."""
    stopped, registry = make(sglang=SLEEPER, unit={})
    stopped.restore(
        {
            "sglang": StoppedBy("http", processes),
            "unit": StoppedBy("unit"),
            "forgotten": StoppedBy("unit"),
        }
    )
    assert registry.get("sglang").loaded is loaded
    assert registry.get("unit").stopped_by == StoppedBy("unit")


@pytest.mark.parametrize(
    ("event", "concerned"),
    [
        (evicted("sglang", method="http"), True),
        (Loaded(consumer="sglang", ms=1), True),
        (evicted("lazy", method="http"), False),
        (evicted("lazy", method="unit"), True),
        (Healthy(consumer="sglang"), False),
        (evicted("removed", method="unit"), False),
        (Draining(timeout_ms=1), False),
    ],
)
def test_what_is_worth_writing_at_once(event: Event, concerned: bool) -> None:
    stopped, _ = make(sglang=SLEEPER, lazy={"unload": "/free"})
    assert stopped.concerned(event) is concerned
